"""Find the state dicts in a checkpoint, at any depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

COUNTER = "num_batches_tracked"
_DEPTH = 4  # of nested dicts to search
FEWEST = 6  # tensors in a network, if there are others beside it
_SHOWN = 3  # names listed of each kind
# Names of tensors that are not a network's weights: losses and metrics, counters of profilers and
# averaging, the images' mean and std, and heads used only in training.
_OTHER = re.compile(
    r"(^|[._])(criterion|loss|losses|metric|metrics|accuracy|acc)\d*([._]|$)"
    r"|(^|\.)((pixel_)?(mean|std)$)|(^|\.)(n_averaged|total_ops|total_params|AuxLogits|aux\d|aux_logits|aux_classifier)(\.|$)"
)
# Keys and prefixes of averaged weights, of another network's weights, and of optimizer states: such
# a word at the end of a key, or followed only by words for weights.
_NOT_PLAIN = re.compile(
    r"(^|[._])(ema|swa|shadow|polyak|teacher|momentum|averaged?|avg|optimi[sz]er)\d*"
    r"(_(model|net|network|module|backbone|encoder|state|states|dict|weights?|params?|parameters|"
    r"buffers?|sq))*(\.|$)",
    re.IGNORECASE,
)


@dataclass
class State:
    """Tensors by name, found at ``entry``: keys and prefixes joined by dots, "" for the file.

    ``left_out`` are the names in the file of the tensors next to them that are not included.
    ``rank`` is 0 for plain weights exactly at the requested entry, else higher.
    """

    entry: str
    tensors: dict[str, Tensor]
    left_out: list[str] = field(default_factory=list)
    rank: int = 0

    @property
    def may_be_network(self) -> bool:
        """Whether there are enough tensors, including a convolution of images."""
        return len(self.tensors) >= FEWEST and _takes_images(self.tensors)

    def holds(self, other: State) -> bool:
        """Whether ``other`` is inside this state or the same."""
        return not self.entry or f"{other.entry}.".startswith(f"{self.entry}.")


def states(content: Mapping[str, Any], entry: str | None, everything: bool) -> list[State]:
    """All possible state dicts of networks, by rank; only those of ``entry`` if it is not None.

    Unless ``everything`` is wanted, losses, metrics and the like are left out by their names.
    """
    found = [
        state for path, tensors in _holders(content) for state in _within(path, tensors, everything)
    ]
    requested = f".{entry}." if entry else "."
    found = [state for state in found if requested in f".{state.entry}."]
    for state in found:
        before, _, beyond = f".{state.entry}.".partition(requested)
        state.rank = 2 * bool(before) + bool(_NOT_PLAIN.search(f"{before}.{beyond}"))
    return sorted(found, key=lambda state: state.rank)


def entries(content: Mapping[str, Any]) -> list[str]:
    """The keys, joined by dots, of the dicts that contain tensors."""
    return [path for path, _ in _holders(content) if path]


def summary(names: Iterable[str]) -> str:
    """The first few of ``names``, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _holders(
    content: Mapping[Any, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and not value.is_nested
    }
    if tensors:
        yield path, tensors
    if depth < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _holders(value, _joined(path, key), depth + 1)


def _within(path: str, tensors: dict[str, Tensor], everything: bool) -> Iterator[State]:
    """The tensors with one prefix after another removed, then those of each network among them.

    If there are few tensors beside a network (`head.*` beside `backbone.*`), also all together.
    """
    kept = {n: tensor for n, tensor in tensors.items() if everything or not _OTHER.search(n)}
    pending = [""]
    while pending:
        prefix = pending.pop(0)
        inside = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
        left_out = [name for name in tensors if name not in kept or not name.startswith(prefix)]
        yield State(_joined(path, prefix.rstrip(".")), inside, left_out)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in inside.items():
            first, dot, _ = name.partition(".")
            groups.setdefault(first + dot, {})[name] = tensor
        for first, group in groups.items():
            if not first.endswith("."):
                continue
            beside = {name: tensor for name, tensor in inside.items() if name not in group}
            if not beside or (len(group) >= FEWEST and _takes_images(group)):
                pending.append(prefix + first)
                if 0 < len(beside) <= FEWEST:
                    within = {name.removeprefix(first): tensor for name, tensor in group.items()}
                    yield State(_joined(path, prefix.rstrip(".")), beside | within, left_out)


def _takes_images(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is a convolution with three input channels."""
    return any(tensor.dim() == 4 and tensor.shape[1] == 3 for tensor in tensors.values())


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
