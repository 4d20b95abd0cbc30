"""Errors that the user can fix, and the text of others."""


class UserError(ValueError):
    """The message says in one line what was wrong, with the value, and how to fix it.

    The command line prints it after ``classroomkd: error:`` and exits with status 2.
    """


OF_TRAIN = {
    *("PIL", "filelock", "matplotlib", "omegaconf", "rich"),
    *("safetensors", "scipy", "sklearn", "torchvision", "yaml"),
}
"""What the extra "train" of setup.py installs, by the names of the modules."""


def missing_of_train(error: ModuleNotFoundError) -> str | None:
    """What to tell the user if the missing module is of the extra "train", else None."""
    package = (error.name or "").partition(".")[0]
    if package not in OF_TRAIN:
        return None
    return f'{package}, which is not installed: pip install "classroomkd[train]"'


def one_line(error: BaseException) -> str:
    """The message of any error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
