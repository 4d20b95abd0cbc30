"""Networks on disk: our own safetensors files, training checkpoints and everyone else's.

A file of our own says what it holds. A foreign one is recognised by the names and shapes of its
tensors, which differ between any two networks of the zoo.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.models.catalogue import is_external
from classroomkd.models.info import NetworkInfo
from classroomkd.models.registry import CLASSIFIER_BIASES, ZOO, build

Shapes = dict[str, tuple[int, ...]]

_METADATA_KEY = "classroomkd"
_COUNTER = "num_batches_tracked"
_SHOWN = 3  # tensors named per kind of difference in an error


def save_network(path: Path, model: nn.Module, info: NetworkInfo) -> None:
    """Write the weights and ``info`` to ``path``, a .safetensors file, atomically.

    A compiled or data-parallel wrapper around the network leaves no trace in the names.
    """
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in _unwrap(model.state_dict()).items()
    }
    metadata = {_METADATA_KEY: json.dumps(asdict(info))}
    atomic_write(path, safetensors.torch.save(state, metadata))


def student_file(run: Path) -> Path:
    """The weights of a run's student: as it was taught, or alone if that is all that was trained.

    Raises UserError if there are none.
    """
    taught, alone = run / "student.safetensors", run / "student_alone.safetensors"
    if taught.is_file():
        return taught
    if alone.is_file() and (run / "summary.json").is_file():
        return alone
    raise UserError(f"{run} holds no student.safetensors: it is not a finished run")


def load_network(
    path: Path, num_classes: int | None = None
) -> tuple[nn.Module, NetworkInfo | None, str]:
    """Load a network: (model in eval mode on the CPU, its info, its architecture).

    ``path`` is a .safetensors file, a run folder (then its `student_file`), or anything that
    ``torch.load`` reads with ``weights_only=True``: a state dict, bare or under ``model``,
    ``state_dict`` or ``net``, from a wrapped network or not. The info is None unless this project
    wrote the file; foreign files are of networks of the zoo. Floating-point weights of any
    precision become float32.

    Raises UserError if the file cannot be read, is damaged, fits no network, or has other than
    ``num_classes`` classes.
    """
    path = Path(path)
    if path.is_dir():
        path = student_file(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        path.open("rb").close()  # of a file it may not read safetensors says that there is none
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        state, info = read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if info is None:
        found = next((shapes[name] for name in CLASSIFIER_BIASES if name in shapes), ())
        classes = found[0] if len(found) == 1 else 100
        architecture = _nearest(shapes, classes)
        claim = f"{path} fits no network of the zoo; the nearest, {architecture}, differs"
    else:
        architecture, classes = info.architecture, len(info.classes)
        if architecture not in ZOO and not is_external(architecture):
            raise UserError(f"{path} is of an unknown network, {architecture!r}")
        claim = f"{path} claims to be {architecture} with {classes} classes but differs"
    try:
        model = _blank(architecture, classes)
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from None
    expected = _state_shapes(model)
    differences = _differences(shapes, expected)
    if differences:
        raise UserError(f"{claim}: {differences}")
    if num_classes not in (None, classes):
        raise UserError(
            f"{path} is a {architecture} for {classes} classes, but {num_classes} are needed"
        )
    # Checkpoints from before batch norm counted its steps have no counters.
    counters = {name: torch.tensor(0) for name in expected if name.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state})
    return model.eval(), info, architecture


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], NetworkInfo | None]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    try:
        values = json.loads(metadata.get(_METADATA_KEY, "null"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its metadata is not JSON ({error})") from error
    return _unwrap(state), _info(values, path)


def _read_torch(path: Path) -> tuple[dict[str, Tensor], NetworkInfo | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle can fail in any way
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if refused:
            raise UserError(
                f"{path} holds a pickled {refused[1]}, which could run code when loaded: save the "
                "network's state_dict() alone, where you trust the file"
            ) from error
        raise UserError(f"{path} is not a checkpoint of tensors, or is damaged") from error
    holder = content if isinstance(content, dict) else {}
    for state in (content, *(holder.get(key) for key in ("model", "state_dict", "net"))):
        if _is_state_dict(state):
            return _unwrap(state), _info(holder.get("info"), path)
    raise UserError(
        f"{path} holds no state dict, neither bare nor under 'model', 'state_dict' or 'net'"
    )


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _info(values: object, path: Path) -> NetworkInfo | None:
    """The info in the file ``path``, or None if it is not ours."""
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(NetworkInfo)}:
        return None
    means, stds = (_channels(values[name]) for name in ("mean", "std"))
    sound = {
        "architecture": isinstance(values["architecture"], str),
        "classes": isinstance(values["classes"], list)
        and bool(values["classes"])
        and all(isinstance(name, str) for name in values["classes"]),
        "mean": means is not None,
        "std": stds is not None and min(stds) > 0,
        "image_size": type(values["image_size"]) is int and values["image_size"] > 0,
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise UserError(f"{path} is damaged: its {name} cannot be {str(values[name])[:60]!r}")
    return NetworkInfo(**{**values, "mean": means, "std": stds})


def _channels(values: object) -> tuple[float, float, float] | None:
    """Three finite numbers, or None if ``values`` is anything else."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    sound = (isinstance(value, int | float) and math.isfinite(value) for value in values)
    return tuple(values) if all(sound) else None


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that DataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _meta(architecture: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):  # no memory, no time and no random numbers spent on values
        return build(architecture, num_classes)


def _blank(architecture: str, num_classes: int) -> nn.Module:
    """The network on the CPU with any weights; draws nothing from the random number generator."""
    if not is_external(architecture):
        return _meta(architecture, num_classes).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):  # buffers may hold values that no checkpoint has
        return build(architecture, num_classes)


def _state_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@functools.cache
def _shapes(architecture: str, num_classes: int) -> Shapes:
    return _state_shapes(_meta(architecture, num_classes))


def _nearest(shapes: Shapes, num_classes: int) -> str:
    """The network that shares the largest part of its names and shapes with ``shapes``."""

    def similarity(architecture: str) -> float:
        ours, theirs = _shapes(architecture, num_classes).items(), shapes.items()
        return len(ours & theirs) / len(ours | theirs)

    return max(ZOO, key=similarity)


def _differences(shapes: Shapes, expected: Shapes) -> str:
    """What keeps tensors of these shapes from loading, in one line; empty if nothing does."""
    kinds = {
        "missing": [
            f"{name} {list(shape)}"
            for name, shape in expected.items()
            if name not in shapes and not name.endswith(_COUNTER)
        ],
        "unexpected": [
            f"{name} {list(shape)}" for name, shape in shapes.items() if name not in expected
        ],
        "of another shape": [
            f"{name} {list(shape)} instead of {list(expected[name])}"
            for name, shape in shapes.items()
            if name in expected and shape != expected[name]
        ],
    }
    return "; ".join(
        f"{kind}: {', '.join(items[:_SHOWN])}"
        + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
        for kind, items in kinds.items()
        if items
    )
