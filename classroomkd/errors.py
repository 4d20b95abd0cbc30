"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """Its message says in one line what was wrong, with the value, and what to do.

    The command line prints the message after ``classroomkd: error:`` and exits with status 2.
    """
