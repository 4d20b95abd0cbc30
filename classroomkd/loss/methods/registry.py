"""Every method by its name."""

from __future__ import annotations

import difflib
from typing import Any

from classroomkd.errors import UserError
from classroomkd.loss.methods.alone import Alone
from classroomkd.loss.methods.at import AT
from classroomkd.loss.methods.aver import AVER
from classroomkd.loss.methods.base import Method
from classroomkd.loss.methods.ca_mkd import CAMKD
from classroomkd.loss.methods.classroom import Classroom
from classroomkd.loss.methods.dist import DIST
from classroomkd.loss.methods.dkd import DKD
from classroomkd.loss.methods.dtkd import DTKD
from classroomkd.loss.methods.fitnet import FitNet
from classroomkd.loss.methods.kd import KD

METHODS: dict[str, type[Method]] = {
    "alone": Alone,
    "classroom": Classroom,
    "kd": KD,
    "aver": AVER,
    "ca_mkd": CAMKD,
    "dtkd": DTKD,
    "dkd": DKD,
    "dist": DIST,
    "fitnet": FitNet,
    "at": AT,
}


def names() -> list[str]:
    """The names of the methods."""
    return list(METHODS)


def create(name: str, **options: Any) -> Method:
    """The method of this name with these options, the others as they are by default.

    Raises UserError, in one line, if there is no such method, it has no such option, or an option
    is out of its range.
    """
    if name not in METHODS:
        nearest = ", ".join(difflib.get_close_matches(str(name).lower(), METHODS, cutoff=0.0))
        raise UserError(f"no method is called {name!r}; the nearest names are {nearest}")
    known = METHODS[name].options()
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"method {name} has no option {option!r}; {has}")
    try:
        return METHODS[name](**options)
    except UserError as error:
        raise UserError(f"method {name}: {error}") from None
