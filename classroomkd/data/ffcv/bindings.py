"""The one door to FFCV, whose last release is older than the packages it runs beside today.

Four things are put right on the way through it:

- One module imports ``distutils``, which Python 3.12 no longer has, and never uses it.
- Importing FFCV sets torch's and numba's thread counts to 1, for the whole process.
- A table of two entries is a typed dictionary of numba's, which takes seconds to compile.
- The memory manager that reads through the system's file cache marks *numba's own* type of byte
  arrays, shared by everything in the process, as read-only. Code that was compiled before then no
  longer matches its own key, and "Exception ignored … KeyError" is printed when it is collected.
  It does so where it declares the types of the function that reads: that declares none here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from classroomkd.errors import UserError


def import_ffcv() -> ModuleType:
    """Import ``ffcv`` so that it works, and leaves the process as it was.

    Its submodules can be imported as usual afterwards. Raises UserError if FFCV or one of the
    packages it runs on is not installed.
    """
    try:
        with kept_threads(), _replaced():
            import ffcv
            from ffcv.memory_managers import OSCacheManager
    except (ImportError, OSError) as error:  # OSError: a library that it loads itself is not there
        reason = " ".join(str(error).split())
        raise UserError(
            f"FFCV cannot be imported ({reason}): scripts/install_ffcv.sh in the repository "
            "installs it"
        ) from error
    OSCacheManager.compile_reader = _compile_reader
    return ffcv


@contextmanager
def kept_threads() -> Iterator[None]:
    """Within it torch's and numba's thread counts may change: they are put back at the end."""
    import numba
    import torch

    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


@contextmanager
def _replaced() -> Iterator[None]:
    """Within it, FFCV finds a ``distutils.log``, and for its table of two modes a plain dict."""
    import numba.typed

    stubs = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.11 warns of what 3.12 left out
            import distutils.log  # noqa: F401
    except ImportError:
        stubs = {name: ModuleType(name) for name in ("distutils", "distutils.log")}
        vars(stubs["distutils.log"])["warn"] = warnings.warn
    typed_dict = numba.typed.Dict
    sys.modules |= stubs
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed_dict
        for name in stubs:
            del sys.modules[name]


def _compile_reader(_):
    """FFCV's own, but for the types, which it takes from its arguments."""
    import numpy as np
    from ffcv.pipeline.compiler import Compiler

    def read(address, state):
        file, starts, sizes = state
        return file[address : address + sizes[np.searchsorted(starts, address)]]

    return Compiler.compile(read)
