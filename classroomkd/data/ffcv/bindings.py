"""The import shim for FFCV, whose last release is older than its current dependencies.

It works around four problems:

- One module imports ``distutils``, which Python 3.12 removed, and never uses it.
- Importing FFCV sets torch's and numba's thread counts to 1 for the whole process.
- A table of two entries is a typed dictionary of numba's, which takes seconds to compile.
- The memory manager for the page cache marks numba's own byte array type, shared by the whole
  process, as read-only. Code compiled before no longer matches its own key, and "Exception ignored
  … KeyError" is printed when it is collected. The cause is the declared types of its read function;
  the replacement here declares none.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from classroomkd.errors import UserError, one_line


def import_ffcv() -> ModuleType:
    """Import ``ffcv`` with these workarounds.

    Its submodules can be imported as usual afterwards. Raises UserError if FFCV or one of the
    packages that it needs is not installed.
    """
    try:
        with kept_threads(), _replaced():
            import ffcv
            from ffcv.memory_managers import OSCacheManager
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        absent = isinstance(error, ModuleNotFoundError) and error.name == "ffcv"
        what = "is not installed" if absent else f"cannot be imported ({one_line(error)})"
        raise UserError(
            f"FFCV {what}: scripts/install_ffcv.sh in the repository installs it"
        ) from error
    OSCacheManager.compile_reader = _compile_reader
    return ffcv


@contextmanager
def kept_threads() -> Iterator[None]:
    """Restore torch's and numba's thread counts on exit."""
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
    """While FFCV is imported, provide ``distutils.log`` and a plain dict as numba's typed one."""
    import numba.typed

    stubs = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in Python 3.11
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
    """FFCV's own function without declared types."""
    import numpy as np
    from ffcv.pipeline.compiler import Compiler

    def read(address, state):
        file, starts, sizes = state
        return file[address : address + sizes[np.searchsorted(starts, address)]]

    return Compiler.compile(read)
