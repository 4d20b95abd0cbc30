"""The import shim for torchvision, which is needed only for its data sets and models.

    import_torchvision()  # before importing lightning, transformers, timm, … which import it

torchvision's wheel has compiled operators for one build of torch. With another build, such as a
CPU-only torch, they fail to load, and the import fails with ``operator torchvision::nms does not
exist`` because Python code refers to undefined schemas. The operators are not used here, so
defining the two schemas is enough.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch import library

T = TypeVar("T")

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_fragments: list[library.Library] = []  # kept, because collecting one unregisters its schemas


def import_torchvision(submodule: str | None = None) -> ModuleType:
    """Import ``torchvision``, or one of its submodules, with any build of torch.

    Raises ImportError if torchvision is not installed.
    """
    name = "torchvision" if submodule is None else f"torchvision.{submodule}"
    return retried(lambda: importlib.import_module(name))


def retried(make: Callable[[], T]) -> T:
    """The result of ``make``, called again with the schemas if importing torchvision fails."""
    try:
        return make()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for operator, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, operator):
            fragment = library.Library("torchvision", "FRAGMENT")
            fragment.define(schema)
            _fragments.append(fragment)
    return make()
