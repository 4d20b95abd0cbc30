"""The one door to torchvision, which the library needs only for data sets and models.

    import_torchvision()  # before lightning, transformers, timm or whatever else imports it

torchvision's wheel carries compiled operators for one build of torch. Beside another build (a
CPU-only torch, say) they fail to load, and the import then dies with ``operator torchvision::nms
does not exist`` because Python code refers to schemas that nobody defined. Who calls neither
operator, as here, needs no more than the two schemas for the import to succeed.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import library

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_fragments: list[library.Library] = []  # each unregisters its schemas when collected


def import_torchvision(submodule: str | None = None) -> ModuleType:
    """Import ``torchvision``, or one of its submodules, beside whatever torch is installed.

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
