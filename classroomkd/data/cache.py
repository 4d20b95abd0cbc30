"""The cache folder, and digests of files, which are cached because reading can take minutes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from classroomkd.files import atomic_write

_CHUNK = 64  # files per task of a thread


def cache_folder() -> Path:
    """The folder of packed files, trained mentors and digests."""
    if "CLASSROOMKD_CACHE" in os.environ:
        return Path(os.environ["CLASSROOMKD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "classroomkd"


def files_digest(files: Sequence[Path]) -> str:
    """The SHA-256, in hexadecimal, of the content of all ``files``, in order.

    It is cached by file names, sizes and modification times; while these stay the same, the files
    are not read again. Raises OSError, naming the file, if one cannot be read.
    """
    key = hashlib.sha256()
    for file in files:
        stat = file.stat()
        key.update(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    kept = cache_folder() / "digests" / key.hexdigest()
    with suppress(OSError):
        return kept.read_text()

    def digests_from(start: int) -> bytes:
        return b"".join(
            hashlib.sha256(file.read_bytes()).digest() for file in files[start : start + _CHUNK]
        )

    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for digests in pool.map(digests_from, range(0, len(files), _CHUNK)):
            digest.update(digests)
    with suppress(OSError):  # the cache only saves time
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, digest.hexdigest())
    return digest.hexdigest()
