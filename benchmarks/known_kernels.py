"""Plain kernels whose speed on an H100 has been published, for the model to be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from classroomkd.kernels.ahead_of_time import MachineCode, kernel_code

SOURCE = "https://github.com/Dao-AILab/quack/blob/main/media/2025-07-10-membound-sol.md"
ROWS = 16384


@triton.jit
def copy_kernel(x_ptr, out_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = x, one row a program."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def softmax_kernel(x_ptr, out_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Softmax of rows that registers hold."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + at).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + at, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty))


@triton.jit
def two_read_softmax_kernel(x_ptr, out_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Softmax of rows that are read twice, with a running maximum and sum for each column."""
    x_ptr += tl.program_id(0).to(tl.int64) * C
    out_ptr += tl.program_id(0).to(tl.int64) * C
    highest = tl.full([BLOCK_C], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK_C)).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    whole = tl.sum(total * tl.exp(highest - top), 0)
    for start in range(0, C, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + at).to(tl.float32)
        tl.store(out_ptr + at, (tl.exp(x - top) / whole).to(out_ptr.dtype.element_ty))


@triton.jit
def cross_entropy_kernel(x_ptr, target_ptr, out_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The loss of each row, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * C + tl.arange(0, BLOCK_C)).to(tl.float32)
    picked = tl.load(x_ptr + row * C + tl.load(target_ptr + row)).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(out_ptr + row, tl.log(tl.sum(tl.exp(x - top), 0)) + top - picked)


class Known(NamedTuple):
    """A kernel, its size, and how many TB/s were published for it, or for one like it."""

    kernel: triton.JITFunction
    n_classes: int
    block: int
    num_warps: int
    dtype: torch.dtype
    published: float
    of: str

    def code(self, target: str) -> MachineCode:
        """Compiled for tensors without memory."""
        x = torch.empty(ROWS, self.n_classes, dtype=self.dtype, device="meta")
        arguments = {"x_ptr": x, "out_ptr": x, "C": self.n_classes, "BLOCK_C": self.block}
        if self.kernel is cross_entropy_kernel:
            arguments["target_ptr"] = torch.empty(ROWS, dtype=torch.int64, device="meta")
            arguments["out_ptr"] = torch.empty(ROWS, device="meta")
        return kernel_code(self.kernel, (ROWS,), arguments, {"num_warps": self.num_warps}, target)

    @property
    def bytes_needed(self) -> int:
        """Each number read once and, but for the cross-entropy, written once."""
        times = 1 if self.kernel is cross_entropy_kernel else 2
        return times * ROWS * self.n_classes * self.dtype.itemsize


def known() -> Iterator[Known]:
    """The comparison's rows."""
    f32, bf16 = torch.float32, torch.bfloat16
    best = "the best kernel there, CuTe"
    yield Known(copy_kernel, 4096, 4096, 4, f32, 3.01, "DRAM throughput reached there")
    yield Known(softmax_kernel, 4096, 4096, 4, f32, 3.0, best)
    yield Known(softmax_kernel, 4096, 4096, 4, bf16, 3.0, best)
    yield Known(softmax_kernel, 32768, 32768, 32, f32, 3.0, "Liger's, one row a program")
    yield Known(softmax_kernel, 65536, 65536, 32, f32, 2.0, "Liger's, which spills")
    yield Known(two_read_softmax_kernel, 131072, 4096, 16, f32, 2.0, "torch.compile's, two reads")
    yield Known(two_read_softmax_kernel, 262144, 4096, 16, f32, 1.89, "torch.compile's, two reads")
    yield Known(cross_entropy_kernel, 4096, 4096, 4, bf16, 3.0, best)
    yield Known(cross_entropy_kernel, 32768, 32768, 32, f32, 3.0, best)
