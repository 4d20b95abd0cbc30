"""Functions that numba compiles: without the interpreter's lock, and cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**flags: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call, for threads and for later processes.

    It releases the interpreter's lock, and is cached where numba finds a folder that it can write
    to.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            dispatcher = njit(nogil=True, cache=True, **flags)(function)
        except RuntimeError:  # numba finds no folder for its cache
            dispatcher = njit(nogil=True, **flags)(function)
        return dispatcher  # type: ignore[no-any-return]

    return decorate
