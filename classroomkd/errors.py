"""The one exception that stands for a mistake the user can mend."""


class UserError(ValueError):
    """What was wrong, with the value, and what to do, in one line.

    The command line prints the message after ``classroomkd: error:`` and exits with status 2.
    """
