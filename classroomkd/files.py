"""Write files atomically, and lock them."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock

_SUFFIX = ".unfinished"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write ``data`` to a temporary file beside ``path``, sync it, and rename it into place."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; synced and renamed to ``path`` at the end.

    On any exception or interruption it is removed, and ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(path: Path, patience: float = -1) -> BaseFileLock:
    """Lock the file at ``path``, created if missing, until ``release()`` or the process ends.

    The owner may remove the file; waiting processes notice that. On a file system without locks,
    such as some network file systems, nothing is locked.

    Raises filelock.Timeout if another process holds the lock for more than ``patience`` seconds (a
    negative number waits forever); OSError if the file cannot be opened.
    """
    # Without flock, filelock would by default treat an existing file as locked.
    held = FileLock(path, fallback_to_soft=False)
    try:
        held.acquire(timeout=patience)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return held


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` of processes killed while writing."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256, in hexadecimal, of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush the content of ``path`` to disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
