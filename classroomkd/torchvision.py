"""The import shim for torchvision, which the library needs only for data sets and models.

    import_torchvision()  # before lightning, transformers, timm or whatever else imports it

torchvision's wheel has compiled operators for one build of torch. With another build (a CPU-only
torch, say) they fail to load, and the import then fails with ``operator torchvision::nms does not
exist`` because Python code refers to schemas that are not defined. Neither operator is called here,
so for the import to succeed the two schemas are enough.
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
_fragments: list[library.Library] = []  # each unregisters its schemas when it is collected


def import_torchvision(submodule: str | None = None) -> ModuleType:
    """Import ``torchvision``, or one of its submodules, with whatever torch is installed.

    Raises ImportError if torchvision is not installed.
    """
    name = "torchvision" if submodule is None else f"torchvision.{submodule}"
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for operator, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, operator):
            fragment = library.Library("torchvision", "FRAGMENT")
            fragment.define(schema)
            _fragments.append(fragment)
    return importlib.import_module(name)


def retried(make: Callable[[], T]) -> T:
    """The result of ``make``, which may import torchvision where only the shim makes that work."""
    try:
        return make()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import_torchvision()
    return make()
