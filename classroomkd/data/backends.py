"""Which loader feeds a run, and where FFCV's files are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from classroomkd.data.image_sets import ImageSet
from classroomkd.data.loader import Loader
from classroomkd.data.resident import ResidentLoader
from classroomkd.data.torch_loader import TorchLoader
from classroomkd.errors import UserError
from classroomkd.files import remove_leftovers

try:
    import fcntl
except ImportError:
    fcntl = None

BACKENDS = ("auto", "ffcv", "resident", "torch")

_SHARE = 0.5  # of a GPU's free memory that images may take, for networks need the rest


class Loaders:
    """Opens loaders of ``image_sets`` through one back end.

    "auto" is ffcv where FFCV imports and its files can be packed, else resident where the sets fit
    into the device's memory, else torch; ``backend`` says which it came to and ``reason`` why.
    Another name is taken at its word. FFCV's files are packed at first use into a cache, in the
    folder ``CLASSROOMKD_CACHE`` names or ~/.cache/classroomkd, under the digest of their content.

    Raises UserError if the back end asked for cannot be used.
    """

    def __init__(
        self, backend: str, image_sets: Sequence[ImageSet], device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self._image_sets, self._files = list(image_sets), []
        if backend not in BACKENDS:
            raise UserError(f"no loader {backend!r}: choose one of {', '.join(BACKENDS)}")
        self.backend, self.reason = backend, "asked for"
        if backend in ("auto", "ffcv"):
            try:
                self._files = [packed(image_set) for image_set in image_sets]
                if backend == "auto":
                    self.backend, self.reason = "ffcv", f"files in {cache_folder()}"
            except (UserError, OSError) as error:
                if backend == "ffcv":
                    raise
                self.backend, self.reason = self._without_ffcv(image_sets, error)

    def _without_ffcv(
        self, image_sets: Sequence[ImageSet], error: UserError | OSError
    ) -> tuple[str, str]:
        reason = " ".join(str(error).split())
        if self.device.type == "cpu":  # where the sets are in memory already
            return "resident", reason
        needed = sum(image_set.images.nbytes for image_set in image_sets)
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed <= _SHARE * free:
            return "resident", reason
        sizes = f"{needed / 1e9:.1f} GB of images beside {free / 1e9:.1f} GB free on the GPU"
        return "torch", f"{reason}; {sizes}"

    def open(self, image_set: ImageSet, batch_size: int, **options) -> Loader:
        """A loader of one of the sets; the options are those of `Loader`, less the device.

        Raises UserError if it is none of the sets that this was made for.
        """
        options |= {"device": self.device}
        places = [i for i, known in enumerate(self._image_sets) if known is image_set]
        if not places:
            raise UserError("this image set is none of those that the loaders were made for")
        if self.backend == "ffcv":
            from classroomkd.data.ffcv_loader import FFCVLoader

            return FFCVLoader(self._files[places[0]], batch_size, **options)
        kind = ResidentLoader if self.backend == "resident" else TorchLoader
        return kind(image_set, batch_size, **options)


def cache_folder() -> Path:
    """Where packed files are kept between runs."""
    if "CLASSROOMKD_CACHE" in os.environ:
        return Path(os.environ["CLASSROOMKD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "classroomkd"


def packed(image_set: ImageSet) -> Path:
    """The ``.beton`` file of ``image_set`` in the cache, packed if it is not there whole.

    Raises UserError if FFCV is not installed or there is no space for it, OSError if the cache
    cannot be written to.
    """
    from classroomkd.data.beton import pack

    digest = image_set.digest()
    names = hashlib.sha256(json.dumps(image_set.classes).encode()).hexdigest()
    path = cache_folder() / f"{digest[:16]}-{names[:8]}.beton"
    if not _is_whole(path, digest):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _packing_alone(path.parent):
            if not _is_whole(path, digest):  # another process may have packed it meanwhile
                remove_leftovers(path.parent)
                pack(image_set, path, overwrite=True)
    return path


def _is_whole(path: Path, digest: str) -> bool:
    from classroomkd.data.beton import open_beton

    try:
        return path.exists() and open_beton(path).sha256 == digest
    except (UserError, FileNotFoundError):  # cut off, overwritten, or just removed
        return False


@contextmanager
def _packing_alone(folder: Path) -> Iterator[None]:
    """Within it no other process packs into ``folder``, where the system has such locks."""
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
