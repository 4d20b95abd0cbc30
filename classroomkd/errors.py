"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """The message says in one line what was wrong, with the value, and how to fix it.

    The command line prints it after ``classroomkd: error:`` and exits with status 2.
    """
