"""Choose the loader of a run, and keep FFCV's files in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from classroomkd.data.batches import Batches
from classroomkd.data.cache import cache_folder
from classroomkd.data.ffcv import beton
from classroomkd.data.image_sets import ImageFiles, ImageSet
from classroomkd.data.loader import Loader
from classroomkd.data.resident import ResidentLoader
from classroomkd.data.torch_loader import TorchLoader
from classroomkd.errors import UserError, one_line
from classroomkd.files import lock, remove_leftovers
from classroomkd.limits import Backend

BACKENDS = get_args(Backend)
"""The names of the loaders."""

_SHARE = 0.5  # of a GPU's free memory for images; networks need the rest


class Loaders:
    """Opens loaders of ``image_sets``, all of one kind.

    "auto" selects ffcv if FFCV can be imported and its files packed, else resident if the sets fit
    into the device's memory, else torch. ``backend`` is the selected loader and ``reason`` the
    reason. FFCV's files are packed on first use into the cache (``CLASSROOMKD_CACHE``, by default
    ~/.cache/classroomkd) and named by a digest of their content.

    Photographs (`ImageFiles`) cannot be resident. For ffcv they are packed as JPEGs; those larger
    than ``max_side`` pixels are shrunk to it.

    Raises UserError if the requested loader cannot be used.
    """

    def __init__(
        self,
        backend: str,
        image_sets: Sequence[ImageSet | ImageFiles],
        device: torch.device | str,
        max_side: int = beton.MAX_SIDE,
    ) -> None:
        self.device = torch.device(device)
        self._image_sets, self._files = list(image_sets), []
        if backend not in BACKENDS:
            raise UserError(f"no loader {backend!r}: choose one of {', '.join(BACKENDS)}")
        self._are_photos = any(isinstance(image_set, ImageFiles) for image_set in image_sets)
        if backend == "resident" and self._are_photos:
            raise UserError(
                "the resident loader needs images of one size, and photographs differ: use the "
                "loader ffcv or torch"
            )
        self.backend, self.reason = backend, "requested"
        if backend in ("auto", "ffcv"):
            try:
                self._files = [packed(image_set, max_side) for image_set in image_sets]
                if backend == "auto":
                    self.backend, self.reason = "ffcv", f"files in {cache_folder()}"
            except (UserError, OSError) as error:
                if backend == "ffcv":
                    raise
                self.backend, self.reason = self._without_ffcv(error)

    def _without_ffcv(self, error: UserError | OSError) -> tuple[str, str]:
        """The loader that "auto" selects if FFCV raises ``error``, and the reason."""
        reason = one_line(error)
        if self._are_photos:
            return "torch", reason
        if self.device.type == "cpu":  # the sets are in memory already
            return "resident", reason
        needed = sum(part.images.nbytes for part in self._image_sets if isinstance(part, ImageSet))
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed <= _SHARE * free:
            return "resident", reason
        sizes = f"{needed / 1e9:.1f} GB of images and {free / 1e9:.1f} GB free on the GPU"
        return "torch", f"{reason}; {sizes}"

    def open(
        self, image_set: ImageSet | ImageFiles | Batches, batch_size: int, **options
    ) -> Loader:
        """A loader of one of the sets; the options are those of `Loader`, except the device.

        Raises UserError if ``image_set`` is not one of the sets given to the constructor.
        """
        options |= {"device": self.device}
        places = [i for i, known in enumerate(self._image_sets) if known is image_set]
        if not places:
            raise UserError("the image set is not one of those given to the constructor")
        if self.backend == "ffcv":
            from classroomkd.data.ffcv.ffcv_loader import FFCVLoader

            return FFCVLoader(self._files[places[0]], batch_size, **options)
        if self.backend == "resident":
            assert isinstance(image_set, ImageSet)  # the constructor rejects photographs
            return ResidentLoader(image_set, batch_size, **options)
        return TorchLoader(image_set, batch_size, **options)


def packed(image_set: ImageSet | ImageFiles, max_side: int = beton.MAX_SIDE) -> Path:
    """The ``.beton`` file of ``image_set`` in the cache, packed first if missing or incomplete.

    Photographs become JPEGs of at most ``max_side`` pixels per side.

    Raises UserError if FFCV is not installed, there is not enough space or a photograph cannot be
    read, and OSError if the cache is not writable.
    """
    content = image_set.digest()
    options: dict[str, Any] = {}
    if isinstance(image_set, ImageFiles):
        options = {"jpeg": True, "quality": beton.QUALITY, "max_side": max_side}
    others = hashlib.sha256(json.dumps([image_set.classes, options]).encode()).hexdigest()
    path = cache_folder() / f"{content[:16]}-{others[:8]}.beton"
    digest = None if options else content  # a JPEG's bytes depend on the encoder
    if not _is_whole(path, digest):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path.parent / ".lock")
        try:
            if not _is_whole(path, digest):  # another process may have packed it meanwhile
                remove_leftovers(path.parent)
                beton.pack(image_set, path, overwrite=True, **options)
        finally:
            held.release()
    return path


def _is_whole(path: Path, digest: str | None) -> bool:
    """Whether the file and its side file are complete, and match ``digest`` if one is given."""
    try:
        found = beton.open_beton(path).sha256 if path.exists() else None
    except (UserError, FileNotFoundError):  # truncated, overwritten, or just removed
        return False
    return found is not None and digest in (None, found)
