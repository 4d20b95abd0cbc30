"""Read checkpoints safely, without running code, and identify files that are no checkpoints."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch

from classroomkd.errors import UserError


def read(path: Path) -> dict[str, Any]:
    """The content of a file; for safetensors, the tensors and the metadata as ``__metadata__``.

    Values are tensors on the CPU, numbers, strings, and containers of these. No code in a file is
    run: objects of other common classes become empty placeholders.

    Raises UserError if the file is not a checkpoint, is damaged, or holds an object of another
    class; OSError if it cannot be read.
    """
    with path.open("rb") as file:  # without permission, safetensors reports a missing file
        start = file.read(512)
    if other := _other_kind(start):
        raise UserError(f"{path} {other}")
    # Eight bytes for the length of the JSON header, then the header.
    is_safetensors = start[5:9] == b"\0\0\0{"
    return _read_safetensors(path) if is_safetensors else _read_torch(path, start)


def _other_kind(start: bytes) -> str:
    """What a file that starts with these bytes is, if it is not a checkpoint; else empty."""
    if not start:
        return "is not a checkpoint, but empty: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself: run git lfs pull"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: download the file itself"
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"is {kind}, not a PyTorch checkpoint"
    return ""


_REFUSED = r"GLOBAL (\S+) was not an allowed global|but got <class '(\S+)'>"
_MAGIC = {b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip archive", b"\x93NUMPY": "a NumPy array"}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return content | {"__metadata__": file.metadata() or {}}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file, or is truncated or damaged: {error}"
        ) from error


def _read_torch(path: Path, start: bytes) -> dict[str, Any]:
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
    try:
        with (
            path.open("rb") as file,  # given a path, torch.load depends on the suffix
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_ALLOWED),
        ):
            warnings.simplefilter("ignore")  # about pickle protocols, before the error below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        refused = re.search(_REFUSED, str(error))
        if refused:
            raise UserError(
                f"{path} holds a pickled {refused[1] or refused[2]}, which could run code when "
                "loaded: if you trust the file, save only the network's state_dict()"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint of tensors, or is truncated or damaged"
        ) from error
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if name != "__metadata__"}


def _check_archive(path: Path) -> None:
    """Raise UserError for a zip archive that is truncated or not a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a complete archive, it is truncated or damaged: download it again"
        ) from error
    if "constants.pkl" in members:
        raise UserError(
            f"{path} is a TorchScript archive, which holds code: if you trust it, save "
            "torch.jit.load(FILE).state_dict()"
        )
    if "data.pkl" not in members:
        raise UserError(f"{path} is a zip archive, not a checkpoint: unpack it")


class _Unread:
    """An empty placeholder for an object that is not read."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_UNREAD = {
    "builtins": "bool bytes dict float frozenset int list str tuple",
    "collections": "defaultdict",
    "datetime": "date datetime time timedelta timezone",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "omegaconf.base": "ContainerMetadata Metadata UnionNode",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode "
    "InterpolationResultNode PathNode StringNode",
    "pathlib": "PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "typing": "Any",
}
# The real classes are not safe: NumPy trusts the sizes in an array's pickled state, and OmegaConf
# runs resolvers. A Namespace is kept, because it may name the architecture.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    *(
        type(name, (_Unread,), {"__module__": module})  # torch looks classes up by these names
        for module in _UNREAD
        for name in _UNREAD[module].split()
    ),
]
