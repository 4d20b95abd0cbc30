"""Errors that the user can fix, and the text of others."""


class UserError(ValueError):
    """The message says in one line what was wrong, with the value, and how to fix it.

    The command line prints it after ``classroomkd: error:`` and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """The message of any error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
