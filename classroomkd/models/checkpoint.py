"""Networks on disk: this project's safetensors files and training states, and other checkpoints.

Files of this project name their network. In other files the state dict is searched for
(``states``) and recognised by the names and shapes of its tensors (``recognition``).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.files import atomic_write, sha256
from classroomkd.models import external, factories, recognition, weight_files
from classroomkd.models.info import NetworkInfo
from classroomkd.models.network_names import (
    code_file,
    is_code,
    is_external,
    label,
    split_code,
    split_entry,
)
from classroomkd.models.recognition import Match, Shapes, shapes_of
from classroomkd.models.states import COUNTER, State, entries, states, summary
from classroomkd.models.zoo import ZOO, build

_METADATA_KEY = "classroomkd"


def save_network(path: Path, model: nn.Module, info: NetworkInfo) -> None:
    """Write the weights and ``info`` atomically to ``path``, a .safetensors file.

    Prefixes added by torch.compile and DataParallel are removed from the names. If the network is
    a user's own, its file is copied into the folder code/ beside ``path``, where `load_network`
    finds it.
    """
    path = Path(path)
    # Clones, because safetensors takes no tensors that share memory, as tied weights do.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _unwrap(model.state_dict()).items()
    }
    if is_code(info.architecture):
        content = factories.content(info.architecture, info.code)
        digest = hashlib.sha256(content).hexdigest()
        if split_code(info.architecture)[0].endswith(".py"):
            copy = _kept(path, label(info.architecture), digest)
            copy.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(copy, content)
        info = replace(info, architecture=label(info.architecture), code=digest)
    # A field that is None is left out, so that earlier versions can read the file.
    metadata = {_METADATA_KEY: json.dumps({k: v for k, v in asdict(info).items() if v is not None})}
    atomic_write(path, safetensors.torch.save(state, metadata))


def _kept(path: Path, called: str, digest: str) -> Path:
    """The copy of a user-defined network's file that is kept beside the weights at ``path``."""
    return path.parent / "code" / digest[:12] / split_code(called)[0]


def student_file(run: Path) -> Path:
    """The weights of a run's student, or of the student alone if that is all the run trained.

    Raises UserError if there are none.
    """
    taught, alone = run / "student.safetensors", run / "student_alone.safetensors"
    if taught.is_file():
        return taught
    if alone.is_file() and (run / "summary.json").is_file():
        return alone
    raise UserError(f"{run} holds no student.safetensors: it is not a finished run")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def load_network(
    path: str | Path,
    num_classes: int | None = None,
    *,
    architecture: str | None = None,
    notify: Callable[[str], None] = _warn,
) -> tuple[nn.Module, NetworkInfo | None, str]:
    """Load a network: (model in eval mode on the CPU, its info, its architecture).

    ``path`` is a .safetensors file, a run folder (then its `student_file`), or any file that
    ``torch.load`` reads with ``weights_only=True``, with a state dict under any keys and prefixes;
    ``FILE:ENTRY`` selects one of several. The info is None unless this project wrote the file;
    other files may hold networks of the zoo, torchvision or timm. Floating-point weights of any
    precision become float32. ``architecture`` names the network as for `create`, users' own
    included; without it the network is recognised. ``notify`` is called with one line about what
    was selected, left out, renamed or guessed; by default it warns.

    Raises UserError if the file cannot be read, is damaged, fits no network, has other than
    ``num_classes`` classes, or if the file of a user's own network is missing.
    """
    path, entry = split_entry(path)
    if path.is_dir():
        path = student_file(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = weight_files.read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    info = _own_info(content, path)
    own = architecture or (_located(info, path, notify) if info else None)
    found = states(content, entry, everything=own is not None and is_code(own))
    if not found and entry is not None:
        known = ", ".join(entries(content)) or "none"
        raise UserError(f"{path} has no entry {entry!r} with tensors; its entries are: {known}")
    if not found:
        raise UserError(f"{path} holds no state dict, neither bare nor under any key")
    if architecture is not None:
        state, match = _as(architecture, found, path)
    elif info is not None and own is not None:
        state, match = _own(found, own, len(info.classes), path)
    else:
        state, match = _recognised(found, content, path)
    _require_weights(state, match, path)
    if match.classes is not None and num_classes not in (None, match.classes):
        raise UserError(
            f"{path} is a {label(match.architecture)} for {match.classes} classes, but "
            f"{num_classes} are needed"
        )
    try:
        model = _blank(match.architecture, match.classes or 1)
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from None
    # In old versions of PyTorch, batch norm counted no steps, so checkpoints have no counters.
    counters = {name: torch.tensor(0) for name in model.state_dict() if name.endswith(COUNTER)}
    tensors = {name: state.tensors[theirs] for name, theirs in match.names.items()}
    model.load_state_dict({**counters, **tensors})
    if info is None and (notes := "; ".join(_notes(path, state, match, found, counters))):
        notify(f"{path}: {notes}")
    return model.eval(), info, match.architecture


def _require_weights(state: State, match: Match, path: Path) -> None:
    """Raise UserError if the matching tensors cannot be weights, for example without values."""
    if match.classes == 0:
        raise UserError(f"{path} is a {match.architecture} for 0 classes")
    for name, theirs in match.names.items():
        tensor = state.tensors[theirs]
        if tensor.is_meta:
            wrong = "on the meta device, without values"
        elif tensor.layout != torch.strided:
            wrong = "not dense"
        elif tensor.is_floating_point() or name.endswith(COUNTER):
            continue
        else:
            wrong = f"{tensor.dtype}"
        raise UserError(
            f"{path} is a {match.architecture} whose {theirs} is {wrong}: save its weights as "
            "dense floating-point tensors"
        )


def _located(info: NetworkInfo, path: Path, notify: Callable[[str], None]) -> str:
    """The architecture that a file of this project names, as `create` knows it here.

    Raises UserError if there is no such network, or its own file is missing.
    """
    architecture = info.architecture
    if not is_code(architecture):
        if architecture not in ZOO and not is_external(architecture):
            raise UserError(
                f"{path} is of an unknown network, {architecture!r}: if it is a module of your "
                "own, load the weights into it with safetensors.torch.load_model"
            )
        return architecture
    place, name = split_code(architecture)
    if place.endswith(".py"):
        copy = _kept(path, architecture, info.code or "")
        places = [copy, path.parent / Path(place).name, Path(place)]
        existing = next((file for file in places if file.is_file()), None)
        if existing is None:
            raise UserError(
                f"{path} is of {label(architecture)}, whose file is missing: put {copy} back"
            )
        architecture = f"{existing}:{name}"
    try:
        file = code_file(architecture)
    except UserError as error:
        raise UserError(f"{path} is of an unknown network, {architecture!r}: {error}") from None
    if info.code not in (None, sha256(file)):
        notify(f"{file} has changed since {path} was written: its network may compute otherwise")
    return architecture


def _as(architecture: str, found: list[State], path: Path) -> tuple[State, Match]:
    """The tensors that fit the network that the user names."""
    for state in found:
        if match := recognition.fit(shapes_of(state.tensors), architecture):
            return state, match
    shapes = _most_similar(found, recognition.expected(architecture))
    wrong = f"{path} does not fit {label(architecture)}: {recognition.misfit(shapes, architecture)}"
    if not is_code(architecture):
        wrong += " (if the network was altered, give what makes the altered one, FILE.py:NAME)"
    raise UserError(wrong)


def _most_similar(found: list[State], wanted: Shapes) -> Shapes:
    """The shapes of the tensors that come nearest to a network's."""
    shapes = [shapes_of(state.tensors) for state in found]
    return max(shapes, key=lambda given: recognition.similarity(given, wanted))


def _own(found: list[State], architecture: str, classes: int, path: Path) -> tuple[State, Match]:
    """The tensors of the network that a file of this project says it holds."""
    try:
        wanted = recognition.expected(architecture, classes)
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from None
    wrong = [recognition.differences(shapes_of(state.tensors), wanted) for state in found]
    if all(wrong):
        raise UserError(
            f"{path} claims to be {label(architecture)} with {classes} classes but differs: "
            f"{recognition.differences(_most_similar(found, wanted), wanted)}"
        )
    state = found[wrong.index("")]
    given = shapes_of(state.tensors)
    names = {name: name for name, shape in wanted.items() if given.get(name) == shape}
    return state, Match(architecture, classes, names)


def _recognised(found: list[State], content: Mapping[str, Any], path: Path) -> tuple[State, Match]:
    """The tensors of the lowest rank that fit a network, preferably one of the zoo."""
    texts = set(_texts(content))
    for _, group in itertools.groupby(found, key=lambda state: state.rank):
        if recognised := _first(list(group), texts):
            return recognised
    nearest = [recognition.nearest(shapes_of(state.tensors)) for state in found]
    near, state = max(zip(nearest, found, strict=True), key=lambda pair: pair[0].similarity)
    libraries = "torchvision or timm" if external.architectures("timm") else "torchvision"
    within = f" in {state.entry}" if state.entry else ""
    raise UserError(
        f"{path} fits no network of the zoo, {libraries}; the nearest, {near.architecture}, "
        f"differs{within}: {recognition.differences(shapes_of(state.tensors), near.shapes)}; "
        f"a network of your own is given as FILE.py:NAME={path} (docs/networks.md)"
    )


def _first(found: list[State], texts: set[str]) -> tuple[State, Match] | None:
    """The first state that fits a network of the zoo, else one named in ``texts``, else any."""
    for way in _ways(texts):
        for state in found:
            if match := way(shapes_of(state.tensors)):
                return state, match
    return None


def _ways(texts: set[str]) -> Iterator[Callable[[Shapes], Match | None]]:
    yield recognition.find_in_zoo
    for name in external.named(texts):  # imports timm, which takes seconds
        yield functools.partial(recognition.fit, architecture=name)
    for library in ("tv", "timm"):
        yield functools.partial(recognition.find_elsewhere, library=library)


def _notes(
    path: Path, state: State, match: Match, found: list[State], counters: Mapping[str, Tensor]
) -> Iterator[str]:
    """What the user should know about how the file was read."""
    if is_external(match.architecture):
        yield f"recognised as {match.architecture} by its names and shapes"
    if match.alike:
        yield (
            f"{summary(match.alike)} would fit too: the logits are right only if it is "
            f"{match.architecture}"
        )
    beside = [other for other in found if not (state.holds(other) or other.holds(state))]
    others = [
        other.entry
        for other in beside
        if other.may_be_network and not any(o.holds(other) for o in beside if o is not other)
    ]
    if others:
        yield f"used {state.entry}, not {summary(others)} (to select it: {path}:{others[0]})"
    unused = [name for name in state.tensors if name not in match.names.values()]
    if left_out := [*state.left_out, *unused]:
        yield f"left out: {summary(left_out)}"
    renamed = [
        f"{theirs} for {name}"
        for name, theirs in match.names.items()
        if name != theirs and not name.endswith(COUNTER)
    ]
    if renamed:
        yield f"renamed: {summary(renamed)}"
    if counters and not match.names.keys() & counters.keys():
        yield f"without {COUNTER}"


def _texts(content: object, depth: int = 0) -> Iterator[str]:
    """All strings in the file, one of which may be the name of its network."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict) and depth < 3:
        for value in content.values():
            yield from _texts(value, depth + 1)


def _own_info(content: dict[str, Any], path: Path) -> NetworkInfo | None:
    """The info if this project wrote the file, or None; removes ``content``'s metadata."""
    metadata = content.pop("__metadata__", None)
    if metadata is None:
        return _info(content.get("info"), path)
    try:
        values = json.loads(metadata.get(_METADATA_KEY, "null"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its metadata is not JSON ({error})") from error
    return _info(values, path)


def _info(values: object, path: Path) -> NetworkInfo | None:
    """The info in the file ``path``, or None if it is foreign."""
    names = {field.name for field in fields(NetworkInfo)}
    if not isinstance(values, dict) or not names - {"code"} <= set(values) <= names:
        return None
    means, stds = (_channels(values[name]) for name in ("mean", "std"))
    sound = {
        "architecture": isinstance(values["architecture"], str),
        "classes": isinstance(values["classes"], list)
        and bool(values["classes"])
        and all(isinstance(name, str) for name in values["classes"]),
        "mean": means is not None,
        "std": stds is not None and min(stds) > 0,
        "code": isinstance(values.get("code"), str | None),
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
    """Remove the prefixes that DataParallel and torch.compile add to every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _blank(architecture: str, num_classes: int) -> nn.Module:
    """The network on the CPU with arbitrary weights; the random number generator is unchanged."""
    if architecture in ZOO:
        with torch.device("meta"):
            network = build(architecture, num_classes)
        return network.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):  # buffers may hold values that no checkpoint has
        return build(architecture, num_classes)
