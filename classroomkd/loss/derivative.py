"""The loss has a first derivative only.

Its weights are constants to the first; a second derivative would silently be wrong, so it raises.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class _Final(torch.autograd.Function):
    """The gradient as it is; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, logits: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "the classroom loss has no second derivative: which mentors teach, their weights and "
            "their temperatures are constants to the first"
        )


def final(grad: Tensor, logits: Tensor) -> Tensor:
    """Make ``grad``, the gradient at ``logits``, raise RuntimeError if it is differentiated."""
    return _Final.apply(grad, logits) if torch.is_grad_enabled() else grad


class OnceDifferentiable(torch.autograd.Function):
    """Logits as they are, whose gradient is `final`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return final(grad, logits)
