"""The loss has a first derivative only: its weights are constants to it, so a second would lie."""

from __future__ import annotations

import torch
from torch import Tensor


class _Final(torch.autograd.Function):
    """The gradient as it is; differentiating it raises."""

    @staticmethod
    def forward(ctx, grad, logits):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the classroom loss has no second derivative: who teaches, how loudly and at which "
            "temperature are constants to the first"
        )


def final(grad: Tensor, logits: Tensor) -> Tensor:
    """Make ``grad``, the gradient at ``logits``, raise RuntimeError if it is differentiated."""
    return _Final.apply(grad, logits) if torch.is_grad_enabled() else grad


class OnceDifferentiable(torch.autograd.Function):
    """Logits as they are, whose gradient is `final`."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return final(grad, logits)
