"""Checkpoints read safely: tensors and plain values, never code; and what another file is."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import pathlib
import re
import typing
import warnings
import zipfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from classroomkd.errors import UserError


def read(path: Path) -> dict[str, Any]:
    """What the file holds: of a .safetensors its tensors and, as ``__metadata__``, its metadata.

    Values are tensors on the CPU, numbers, text, and containers of such. Nothing that a file holds
    is run: of classes only those of `_harmless` are made.

    Raises UserError, saying what the file is, if it is no checkpoint, is damaged, or holds another
    class; OSError if it cannot be read.
    """
    with path.open("rb") as file:  # of a file it may not read safetensors says that there is none
        start = file.read(512)
    if other := _other_kind(start):
        raise UserError(f"{path} {other}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, start)


def _other_kind(start: bytes) -> str:
    """What the file is that begins so, if that is told at once and it is no checkpoint."""
    if not start:
        return "is not a checkpoint: it is empty, or is damaged: fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself: run git lfs pull"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: the download got a page in its place"
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"is {kind}, not a PyTorch checkpoint"
    return ""


_REFUSED = r"GLOBAL (\S+) was not an allowed global|but got <class '(\S+)'>"
_MAGIC = {
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy array",
}


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return content | {"__metadata__": file.metadata() or {}}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file, is cut off, or is damaged: {error}"
        ) from error


def _read_torch(path: Path, start: bytes) -> dict[str, Any]:
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # about pickle protocols, before the error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle can fail in any way
        refused = re.search(_REFUSED, str(error))
        if refused:
            raise UserError(
                f"{path} holds a pickled {refused[1] or refused[2]}, which could run code when "
                "loaded: save the network's state_dict() alone, where you trust the file"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint of tensors, is cut off, or is damaged"
        ) from error
    return content if isinstance(content, dict) else {}


def _check_archive(path: Path) -> None:
    """Raise UserError of a zip archive that is cut off, or is not one of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a whole archive: it is cut off, or is damaged: fetch it again"
        ) from error
    if "constants.pkl" in members:
        raise UserError(
            f"{path} is a TorchScript archive, which holds code: where you trust it, save "
            "torch.jit.load(FILE).state_dict()"
        )
    if "data.pkl" not in members:
        raise UserError(f"{path} is a zip archive, not a checkpoint: unpack it")


@functools.cache
def _harmless() -> list[Any]:
    """Classes and functions that may be called while a file is read; none runs code of the file's.

    Paths are made as names only, of whatever system. Classes are listed under the names that older
    and newer versions of their libraries give them, too.
    """
    allowed: list[Any] = [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        *{type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"},
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
    ]
    for name in ("scalar", "_reconstruct"):
        function = getattr(importlib.import_module("numpy.core.multiarray"), name)
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    for name in ("PosixPath", "WindowsPath"):
        pure = pathlib.PurePosixPath if name == "PosixPath" else pathlib.PureWindowsPath
        allowed += [
            (pure, f"{module}.{prefix}{name}")
            for module in ("pathlib", "pathlib._local")
            for prefix in ("", "Pure")
        ]
    with suppress(ImportError):
        from omegaconf import DictConfig, ListConfig, base, nodes

        # Their values are not looked at, so that no interpolation is resolved.
        allowed += [DictConfig, ListConfig, base.Metadata, base.ContainerMetadata, typing.Any]
        allowed += [kind for kind in vars(nodes).values() if _is_node(kind, base.Node)]
        allowed += [defaultdict, bool, bytes, dict, float, int, list, str, tuple]
    return allowed


def _is_node(kind: object, node: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, node)
