"""The frozen mentors of a student as one callable, optimized for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.loss.methods import Outputs
from classroomkd.models.layout import to_channels_last
from classroomkd.models.stages import StageOutputs
from classroomkd.training.fold import fold_batch_norms


class MentorBank:
    """Maps a batch of images to the outputs of every mentor.

    The bank holds copies of the mentors: in eval mode, frozen, with batch norms folded, channels
    last, in ``dtype``. On a GPU each mentor runs on its own stream, after the work before the call
    and before the work after it. A CUDA graph can capture this; as long as multiprocessors are
    idle, the call takes as long as the slowest mentor.

    Args:
        mentors: unique name → network, which maps images [B, 3, H, W] to logits [B, C].
        num_classes: C.
        device: where the mentors run.
        dtype: torch.float32 or torch.bfloat16, for weights, activations and logits. Batch norms
            that are not folded keep float32 statistics, because rounding would bias every image.
        compile: pass each mentor through ``torch.compile``.
        features: return the outputs of ``layers`` too, by default of the stages.
        layers: module paths, the same in each mentor.

    Attributes:
        names: names of the mentors, in the order of the logits.

    """

    def __init__(
        self,
        mentors: Mapping[str, nn.Module],
        num_classes: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        features: bool = False,
        layers: Sequence[str] = (),
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.names = list(mentors)
        self._num_classes = num_classes
        self._device = torch.device(device)
        self._dtype = dtype
        networks = [_prepare(mentor, self._device, dtype) for mentor in mentors.values()]
        self._stages = [StageOutputs(network, layers) for network in networks] if features else None
        # Weights that never change become constants of the code; on a CPU the code is then faster,
        # and compiled in less time.
        options: dict[str, Any] | None = {"freezing": True} if self._device.type == "cpu" else None
        self._networks: Sequence[Callable[[Tensor], Tensor]] = (
            [torch.compile(n, options=options) for n in networks] if compile else networks
        )
        self._streams = (
            [torch.cuda.Stream(self._device) for _ in networks]
            if self._device.type == "cuda"
            else []
        )

    def __len__(self) -> int:
        return len(self.names)

    @torch.inference_mode()
    def __call__(self, images: Tensor, names: Sequence[str] | None = None) -> list[Outputs]:
        """The logits [B, C] of the mentors ``names``, by default all, for images [B, 3, H, W].

        Images of another dtype are converted once for all mentors. Logits and features are new
        tensors of the bank's dtype, made in inference mode. The call never waits for the GPU.

        Raises UserError if a mentor's logits are not [B, num_classes].
        """
        names = self.names if names is None else names
        which = [self.names.index(name) for name in names]
        # Mentors compute in the bank's dtype, independently of the student's autocast.
        with torch.autocast(self._device.type, enabled=False):
            if images.is_floating_point():  # of one's own batches they may be anything
                images = images.to(self._dtype)
            if images.dim() == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            if self._streams:
                logits = self._side_by_side(images, which)
            else:
                logits = [self._networks[i](images) for i in which]
        for name, rows in zip(names, logits, strict=True):
            if rows.shape != (len(images), self._num_classes):
                raise UserError(
                    f"mentor {name} returns logits of shape {list(rows.shape)} for {len(images)} "
                    f"images of {self._num_classes} classes: use a network for these classes"
                )
        features = [self._stages[i].take() if self._stages else () for i in which]
        return list(map(Outputs, logits, features))

    def _side_by_side(self, images: Tensor, which: Sequence[int]) -> list[Tensor]:
        # Memory is safe without Tensor.record_stream: the current stream waits until all others are
        # done with the images. Freed memory of logits is reused only by their own stream, which
        # first waits for the current one, and so for the loss.
        current = torch.cuda.current_stream(self._device)
        logits = []
        for i in which:
            self._streams[i].wait_stream(current)
            with torch.cuda.stream(self._streams[i]):
                logits.append(self._networks[i](images))
        for i in which:
            current.wait_stream(self._streams[i])
        return logits


def _prepare(mentor: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    network = fold_batch_norms(mentor).requires_grad_(False)
    for module in network.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return to_channels_last(network, device)
