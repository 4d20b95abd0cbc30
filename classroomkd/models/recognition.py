"""Identify the network of a state dict by the names and shapes of its tensors.

The zoo is searched first, then torchvision, then timm if it is installed.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from classroomkd.models import external
from classroomkd.models.network_names import is_code
from classroomkd.models.states import COUNTER, FEWEST, summary
from classroomkd.models.zoo import ZOO, build

Shapes = dict[str, tuple[int, ...]]

# A number of classes that equals no other size in a network, so that it identifies classifiers.
_CLASSES = 9973
# How many parameters of a network under construction may have other shapes. It can then still be
# the nearest network, or the right one, because some constructors of timm discard parameters.
_NEAR = 8
# Names that public repositories use for the parts of the zoo's networks, one set per convention.
_RENAMINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ((r"\bdownsample\.", "shortcut."),),
    ((r"\bshortcut\.", "downsample."),),
    (
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        (r"^conv2_x\.", "layer1."),
        (r"^conv3_x\.", "layer2."),
        (r"^conv4_x\.", "layer3."),
        (r"^conv5_x\.", "layer4."),
        (r"\bresidual_function\.0\.", "conv1."),
        (r"\bresidual_function\.1\.", "bn1."),
        (r"\bresidual_function\.3\.", "conv2."),
        (r"\bresidual_function\.4\.", "bn2."),
        (r"\bresidual_function\.6\.", "conv3."),
        (r"\bresidual_function\.7\.", "bn3."),
    ),
)


@dataclass
class Match:
    """A network and its tensors: ``names`` maps its names to those in the file.

    ``classes`` is None for a user's own network with a fixed number of them. ``alike`` are other
    networks with the same names and shapes.
    """

    architecture: str
    classes: int | None
    names: dict[str, str]
    alike: list[str] = field(default_factory=list)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected(architecture: str, classes: int = _CLASSES) -> Shapes:
    """The names and shapes in the state dict of a network, built on the meta device.

    Raises UserError if there is no such network.
    """
    # A user's file may change meanwhile.
    shapes = _built_shapes if is_code(architecture) else _cached_shapes
    return shapes(architecture, classes)


def _built_shapes(architecture: str, classes: int) -> Shapes:
    with torch.device("meta"):  # no memory, computation or random numbers
        return shapes_of(build(architecture, classes).state_dict())


_cached_shapes = functools.cache(_built_shapes)


def find_in_zoo(shapes: Shapes) -> Match | None:
    """The network of the zoo with these ``shapes``, for any number of classes.

    The classifier may have any name.
    """
    return next(filter(None, (fit(shapes, architecture) for architecture in ZOO)), None)


def find_elsewhere(shapes: Shapes, library: str) -> Match | None:
    """The same for "tv" or "timm"; of several networks, the one with the shortest name."""
    near = _near(library, frozenset(shapes.items()))
    found = [match for name in near if (match := _fit(shapes, near[name], name))]
    found.sort(key=lambda match: (len(match.architecture), match.architecture))
    if found:
        found[0].alike = [match.architecture for match in found[1:]]
    return found[0] if found else None


def fit(shapes: Shapes, architecture: str) -> Match | None:
    """The match of ``shapes`` with a network, or None."""
    if is_code(architecture):
        classes = _classes(shapes, architecture)
        wanted = expected(architecture, classes or 1)
        names = {name: name for name in wanted if shapes.get(name) == wanted[name]}
        return None if differences(shapes, wanted) else Match(architecture, classes, names)
    return _fit(shapes, expected(architecture), architecture)


def misfit(shapes: Shapes, architecture: str) -> str:
    """Why tensors of these shapes cannot be those of a network, in one line."""
    classes = _classes(shapes, architecture)
    return differences(shapes, expected(architecture, classes or _CLASSES))


def _classes(shapes: Shapes, architecture: str) -> int | None:
    """The number of classes of a network with these shapes; None if no shape depends on it."""
    for name, shape in expected(architecture).items():
        given = shapes.get(name, ())
        if _CLASSES in shape and len(given) == len(shape):
            return given[shape.index(_CLASSES)]
    return None


def _fit(shapes: Shapes, wanted: Shapes, architecture: str) -> Match | None:
    given = [name for name in shapes if not name.endswith(COUNTER)]
    weights = {name: shape for name, shape in wanted.items() if not name.endswith(COUNTER)}
    if len(weights) != len(given):
        return None
    heads = {name: shape for name, shape in weights.items() if _is_head(shape)}
    body = {name: shape for name, shape in weights.items() if name not in heads}
    for renaming in _RENAMINGS:
        called = {_renamed(name, renaming): name for name in shapes}
        rest = {_renamed(name, renaming): shapes[name] for name in given}
        if any(rest.pop(name, None) != shape for name, shape in body.items()):
            continue
        if found := _head(heads, rest):
            head, classes = found
            names = {
                name: called[name]
                for name, shape in wanted.items()  # a counter may be missing, or of another shape
                if name not in heads and name in called and shapes[called[name]] == shape
            }
            names |= {name: called[other] for name, other in head.items()}
            return Match(architecture, classes, names)
    return None


def _renamed(name: str, renaming: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renaming:
        name = re.sub(pattern, replacement, name)
    return name


def _is_head(shape: tuple[int, ...]) -> bool:
    return shape[:1] == (_CLASSES,)


def _head(wanted: Shapes, given: Shapes) -> tuple[dict[str, str], int] | None:
    """The classifier's tensors, by the network's names, and its number of classes."""
    names: dict[str, str] = {}
    for name, shape in wanted.items():
        kind = name.rpartition(".")[2]
        fitting = [
            other
            for other, its in given.items()
            if its[1:] == shape[1:] and len(its) == len(shape) and other.rpartition(".")[2] == kind
        ]
        chosen = name if name in fitting else fitting[0] if len(fitting) == 1 else None
        if chosen is None:
            return None
        names[name] = chosen
    classes = {given[name][0] for name in names.values()}
    if len(classes) != 1 or len(set(names.values())) != len(given):
        return None
    return names, classes.pop()


class Nearest(NamedTuple):
    """A network, its shapes, and their similarity to others: |intersection| / |union|."""

    architecture: str
    shapes: Shapes
    similarity: float


def nearest(shapes: Shapes) -> Nearest:
    """The network whose names and shapes are most similar to ``shapes``."""
    candidates = {name: expected(name) for name in ZOO}
    for library in ("tv", "timm"):
        candidates |= _near(library, frozenset(shapes.items()))

    def compared(name: str) -> Nearest:
        return Nearest(name, candidates[name], similarity(shapes, candidates[name]))

    return max(map(compared, candidates), key=lambda near: near.similarity)


def similarity(shapes: Shapes, wanted: Shapes) -> float:
    """The share of all tensors that have the same name and shape in both, 0 to 1."""
    ours, theirs = wanted.items(), shapes.items()
    return len(ours & theirs) / max(1, len(ours | theirs))


def differences(shapes: Shapes, wanted: Shapes) -> str:
    """Why tensors of these shapes cannot be loaded, in one line; empty if they can."""

    def only_in(ours: Shapes, theirs: Shapes) -> list[str]:
        names = (name for name in ours if name not in theirs and not name.endswith(COUNTER))
        return [f"{name} {_shown(ours[name])}" for name in names]

    kinds = {
        "missing": only_in(wanted, shapes),
        "unexpected": only_in(shapes, wanted),
        "with another shape": [
            f"{name} {_shown(shape)} instead of {_shown(wanted[name])}"
            for name, shape in shapes.items()
            if name in wanted
            and shape != wanted[name]
            and not (_is_head(wanted[name]) and shape[1:] == wanted[name][1:])
        ],
    }
    return "; ".join(f"{kind}: {summary(items)}" for kind, items in kinds.items() if items)


def _shown(shape: tuple[int, ...]) -> str:
    sizes = ("classes" if size == _CLASSES else str(size) for size in shape)
    return f"[{', '.join(sizes)}]"


@functools.lru_cache(maxsize=16)
def _near(library: str, shapes: frozenset[tuple[str, tuple[int, ...]]]) -> dict[str, Shapes]:
    """The networks of a library that have these shapes, except for a few parameters."""
    parts = {name.partition(".")[0] for name, _ in shapes}
    if len(shapes) < FEWEST or len(parts) < 2:  # not a network, or a wrapped one
        return {}
    counts = Counter(shape for _, shape in shapes)
    found = {}
    for name in external.with_tensors(library, {name for name, _ in shapes}):
        with suppress(_DifferentError), _construction_of(counts):
            found[name] = expected(name)
    return found


class _DifferentError(Exception):
    """A network under construction has too many parameters of other shapes."""


@contextmanager
def _construction_of(shapes: Counter[tuple[int, ...]]) -> Iterator[None]:
    """Within this context, building a network raises _DifferentError after _NEAR differences.

    Most networks differ within a few layers, so all networks of a library can be tried.
    """
    left, wrong, thread = Counter(shapes), 0, threading.get_ident()

    def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        nonlocal wrong
        if parameter is None or parameter.dim() < 2 or threading.get_ident() != thread:
            return
        shape = tuple(parameter.shape)
        if not _is_head(shape):
            left[shape] -= 1
            wrong += left[shape] < 0
            if wrong > _NEAR:
                raise _DifferentError

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
