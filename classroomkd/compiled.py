"""Functions that numba compiles: without the interpreter's lock, and cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def compiled(*sources: str, **flags: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at its first call, for threads and for later processes.

    It releases the interpreter's lock, and is cached where numba finds a folder that it can write
    to. numba finds that a function's own file has changed; ``sources`` are the files of others that
    it calls, which become part of its name.
    """
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ += f"_{digest.hexdigest()[:8]}" if sources else ""
        try:
            dispatcher = njit(nogil=True, cache=True, **flags)(function)
        except RuntimeError:  # numba finds no folder for its cache
            dispatcher = njit(nogil=True, **flags)(function)
        return dispatcher

    return decorate
