"""Mentors' logits in files: those cached by runs, and those written by other programs.

Both are memory-mapped arrays [epochs, N, C] for N training images in the order of their set. Each
cached row has a tag, a hash of its bytes, without which it counts as missing. So a run can be
killed at any moment, and a damaged row is detected when it is read.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from errno import EINVAL, EOPNOTSUPP
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import BaseFileLock, Timeout
from safetensors import SafetensorError, safe_open

from classroomkd.data.cache import cache_folder
from classroomkd.errors import UserError
from classroomkd.files import atomic_write, lock

_KEY, _LOGITS, _TAGS, _LOCK = "key.json", "logits.npy", "tags.npy", ".lock"
_ROWS = 4096  # verified at a time


class Rows(NamedTuple):
    """Logits [B, C] of some images, and which of the rows are known, bool [B]."""

    logits: np.ndarray
    known: np.ndarray


class OwnLogits:
    """The logits [epochs or 1, N, C] of a mentor, written by another program.

    ``path`` is a .npy file, or a .safetensors file with one tensor, called logits. The logits of a
    single epoch are used for all.

    Raises UserError if the file is anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.of_samples: np.ndarray | None = None
        """The rows of the run's images, int64 [N]; None for all rows, in order."""
        try:
            if path.suffix == ".npy":
                self._logits = np.load(path, mmap_mode="r")
            else:
                with safe_open(path, "pt") as file:  # which maps it
                    self._logits = file.get_tensor("logits").numpy()
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"cannot read the logits in {path}: {error}") from None
        if self._logits.ndim != 3 or self._logits.dtype.kind != "f" or not self._logits.size:
            raise UserError(
                f"{path} holds {list(self._logits.shape)} of {self._logits.dtype}: logits are "
                "floating-point [epochs or 1, images, classes]"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Epochs, N and C."""
        epochs, n_images, n_classes = self._logits.shape
        return epochs, n_images, n_classes

    def read_ahead(self, epoch: int) -> None:
        """Let the system read the logits of an epoch, from 1, without waiting for it."""
        _will_need(self._logits, self._index(epoch))

    def read(self, epoch: int, samples: np.ndarray) -> Rows:
        """The logits of the images ``samples`` [B] in an epoch, float32."""
        if self.of_samples is not None:
            samples = self.of_samples[samples]
        rows = self._logits[self._index(epoch), samples]
        return Rows(rows.astype(np.float32, copy=False), np.ones(len(samples), bool))

    def _index(self, epoch: int) -> int:
        return epoch - 1 if len(self._logits) > 1 else 0


class KeptLogits:
    """The logits of one mentor, cached in ``folder`` and shared by runs with the same ``key``.

    ``key`` is everything that the logits depend on, with their "shape" [epochs, N, C] and "dtype".
    One run at a time writes, until `close`: ``writes`` says whether it is this one. Others read
    what is there. The other processes of a run create no files; ``joins`` says whether they write.

    Raises UserError if the folder has another key, naming the difference, and OSError if it cannot
    be written to.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], joins: bool | None = None) -> None:
        self.folder, self._key = folder, key
        self.damaged: dict[int, int] = {}
        """The damaged rows that were read, by epoch."""
        self.begun_again = False
        """Whether files were missing or truncated."""
        self.writes = bool(joins)
        self._joins = joins is not None
        self._held: BaseFileLock | None = None
        self._logits: np.ndarray | None = None
        self._tags: np.ndarray | None = None
        if difference := key_difference(folder, key):
            raise UserError(f"{folder} has another key: {difference}: remove it")
        self._shape, self._dtype = tuple(key["shape"]), np.dtype(key["dtype"])
        self.claim()

    def claim(self) -> None:
        """Become the writer if no other run is, and open files created since."""
        if self._held or (self._joins and self._logits is not None):
            return
        if not self._joins:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                self._held = lock(self.folder / _LOCK, 0)
            if self._held and not self._is_whole():
                self.begun_again = read_key(self.folder) is not None
                self._create()
            self.writes = self._held is not None
        if (self.writes or self._logits is None) and self._is_whole():
            mode: Any = "r+" if self.writes else "r"
            self._logits = np.load(self.folder / _LOGITS, mmap_mode=mode)
            self._tags = np.load(self.folder / _TAGS, mmap_mode=mode)

    def read_ahead(self, epoch: int) -> None:
        """Let the system read the logits of an epoch, from 1, without waiting for it."""
        if self._logits is not None:
            _will_need(self._logits, epoch - 1)

    def read(self, epoch: int, samples: np.ndarray) -> Rows:
        """The logits of the images ``samples`` [B] in an epoch, where they are known."""
        if self._logits is None or self._tags is None:
            rows = np.zeros((len(samples), self._shape[2]), self._dtype)
            return Rows(rows, np.zeros(len(samples), bool))
        logits, tags = self._logits[epoch - 1, samples], self._tags[epoch - 1, samples]
        known = self._hash(logits) == tags
        # While another process writes, its last rows may look damaged.
        if self.writes and (damaged := int(((tags != 0) & ~known).sum())):
            self.damaged[epoch] = self.damaged.get(epoch, 0) + damaged
        return Rows(logits, known)

    def write(self, epoch: int, samples: np.ndarray, logits: np.ndarray) -> None:
        """Store the ``logits`` [B, C] of the images ``samples`` [B] in an epoch."""
        if self.writes and self._logits is not None and self._tags is not None:
            self._logits[epoch - 1, samples] = logits
            self._tags[epoch - 1, samples] = self._hash(logits)

    def verify(self) -> tuple[int, dict[int, int]]:
        """The number of known rows, and of damaged rows in each epoch.

        Raises UserError if a file is missing or truncated.
        """
        if self._logits is None or self._tags is None:
            raise UserError(f"{self.folder} has a missing or truncated file")
        known, damaged = 0, {}
        for epoch, (logits, tags) in enumerate(zip(self._logits, self._tags, strict=True), 1):
            bad = 0
            for first in range(0, len(tags), _ROWS):
                part = slice(first, first + _ROWS)
                right = self._hash(logits[part]) == tags[part]
                known += int(right.sum())
                bad += int(((tags[part] != 0) & ~right).sum())
            if bad:
                damaged[epoch] = bad
        return known, damaged

    def close(self) -> None:
        """Let another process write; a second call does nothing."""
        self._logits = self._tags = None
        self.writes = False
        if self._held:
            self._held.release()
            self._held = None

    def _is_whole(self) -> bool:
        if read_key(self.folder) is None:
            return False
        with suppress(OSError, ValueError):
            logits = np.load(self.folder / _LOGITS, mmap_mode="r")
            tags = np.load(self.folder / _TAGS, mmap_mode="r")
            right = logits.dtype == self._dtype and tags.dtype == np.uint32
            return right and logits.shape == self._shape and tags.shape == self._shape[:2]
        return False

    def _create(self) -> None:
        """Create the files at full size, the key last."""
        for path in (self.folder / _KEY, self.folder / _LOGITS, self.folder / _TAGS):
            path.unlink(missing_ok=True)
        _create_array(self.folder / _LOGITS, self._dtype, self._shape)
        _create_array(self.folder / _TAGS, np.dtype(np.uint32), self._shape[:2])
        atomic_write(self.folder / _KEY, json.dumps(dict(self._key), indent=1))

    def _hash(self, logits: np.ndarray) -> np.ndarray:
        """A hash of each row's bytes, uint32 [B], never 0.

        It is multilinear: the upper half of Σ wᵢ·xᵢ modulo 2⁶⁴, x being the row's words. Two
        different rows have equal hashes with a probability of about 2⁻³².
        """
        words = np.ascontiguousarray(logits).view(f"u{self._dtype.itemsize}").astype(np.uint64)
        return np.maximum((words @ self._weights) >> np.uint64(32), 1).astype(np.uint32)

    @cached_property
    def _weights(self) -> np.ndarray:
        drawn = np.random.default_rng(0).integers(0, 2**64, self._shape[2], np.uint64)
        return drawn | np.uint64(1)


def _create_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Create a .npy file of zeros with allocated disk space, so that mapped writes cannot fail."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (EINVAL, EOPNOTSUPP):
                    raise


def _will_need(logits: np.ndarray, index: int) -> None:
    mapped = getattr(logits, "_mmap", None)
    if mapped is None or not hasattr(mapped, "madvise") or index >= len(logits):
        return
    begin = mapped.size() - logits.nbytes + index * logits[0].nbytes
    page = begin - begin % mmap.PAGESIZE
    with suppress(OSError, ValueError):  # advice only
        mapped.madvise(mmap.MADV_WILLNEED, page, begin + logits[0].nbytes - page)


def logits_folder() -> Path:
    """The folder of cached logits."""
    return cache_folder() / "mentor-logits"


def read_key(folder: Path) -> dict[str, Any] | None:
    """The key of cached logits; None if they are incomplete."""
    with suppress(OSError, ValueError):
        return json.loads((folder / _KEY).read_bytes())
    return None


def key_difference(folder: Path, key: Mapping[str, Any]) -> str:
    """The difference between ``key`` and that of ``folder``; empty if there is none, or no key."""
    kept, key = read_key(folder), json.loads(json.dumps(dict(key)))
    if kept is None:
        return ""
    names = [name for name in {**kept, **key} if kept.get(name) != key.get(name)]
    return ", ".join(
        f"{name} {_short(kept.get(name))}, not {_short(key.get(name))}" for name in names
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:16]}…"


def remove(folder: Path) -> None:
    """Remove cached logits; UserError if a run is writing them."""
    try:
        held = lock(folder / _LOCK, 0)
    except Timeout:
        raise UserError(f"{folder} is in use by a run: stop it first") from None
    shutil.rmtree(folder)
    held.release()


def size(shape: tuple[int, int, int], dtype: str) -> int:
    """The bytes of one mentor's logits and their tags."""
    epochs, n_images, n_classes = shape
    return epochs * n_images * (n_classes * np.dtype(dtype).itemsize + 4)


def size_text(count: int) -> str:
    """A number of bytes, as text."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if count >= power / 10:
            return f"{count / power:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
