"""Compile the kernels for GPUs that are not there, and read what the compiler made of them.

    compile_kernel("classroom", n_classes=100, n_mentors=6, target="cuda:90").registers

works on any Linux machine with Triton. The arguments' types and alignments are those that the
launch in ``launch.py`` would specialise on for contiguous logits.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from classroomkd.kernels.augment import Tiles, gather_augment_kernel, tiles
from classroomkd.kernels.classroom import classroom_kernel, confidence_kernel, scale_rows_kernel
from classroomkd.kernels.launch import (
    Blocks,
    alignment,
    blocks,
    scaling_blocks,
    sum_blocks,
    tile_blocks,
)
from classroomkd.kernels.tiled import tiled_classroom_kernel
from classroomkd.kernels.tiled_scan import tiled_confidence_kernel

KERNELS = {
    "classroom": classroom_kernel,
    "confidence": confidence_kernel,
    "tiled_classroom": tiled_classroom_kernel,
    "tiled_confidence": tiled_confidence_kernel,
    "scale_rows": scale_rows_kernel,
}
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on one target."""

    registers: int
    """A thread's; on AMD, vector registers."""
    spilled_bytes: int
    """Bytes a thread keeps in local memory."""
    shared_bytes: int
    loads: dict[int, int]
    """Global loads in the machine code: bytes a thread and load → how many."""
    stores: dict[int, int]
    """Global stores, likewise."""
    blocks: Blocks | Tiles


def compile_kernel(
    kernel: str,
    *,
    n_classes: int,
    n_mentors: int,
    target: str,
    dtype: str = "fp32",
    ranking: str = "sample",
    knowledge_filter: str = "better",
    mentoring: str = "adaptive",
    class_probabilities: bool = False,
    rounded: bool = False,
    reduction: str = "mean",
    n_rows: int = 512,
    with_grad: bool = True,
    finished_grad: bool = False,
    with_report: bool = False,
) -> Compiled:
    """Compile one kernel as a launch with these options would.

    Args:
        kernel: "classroom", "confidence" (ranking "batch" runs it first), of which a launch takes
            the ones over tiles where the rows need it, or "scale_rows" (autograd's backward).
        target: "cuda:<compute capability × 10>" or "hip:<architecture>".
        dtype: of all logits, in Triton's words: "fp32", "fp16" or "bf16".
        ranking, knowledge_filter, mentoring, reduction: as in the loss.
        class_probabilities: targets [B, C], smoothed; otherwise class indices.
        rounded: with ``rank_decimals``.
        n_rows: Triton makes a 1 a constant.
        finished_grad: as for `fused_classroom_loss_and_grad`, with a scale.

    """
    warp_size = _gpu(target).warp_size
    if kernel == "scale_rows":
        cut = scaling_blocks(n_classes)
    else:
        cut = blocks(n_classes, n_mentors, warp_size)
        if cut is None:
            cut = tile_blocks(warp_size)
            kernel = f"tiled_{kernel}"
    n_lines = n_mentors + 2 if "confidence" in kernel else 4 * n_mentors + 3 if with_report else 1

    align = alignment([n_classes])
    stride = _integer(n_classes // align)
    logits, one = f"*{dtype}", "*fp32"
    arguments = {
        "student_ptr": logits,
        "mentor_ptrs": (logits,) * n_mentors,
        "target_ptr": "*fp32" if class_probabilities else "*i64",
        "mentor_weight_ptr": None,
        "ell_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "ell_sums_ptr": "*fp32" if ranking == "batch" else None,
        "lines_ptr": "*fp32",
        "grad_ptr": logits if with_grad else None,
        "out_ptr": logits,
        "factor_ptr": "*fp32",
        "loss_ptr": one if reduction != "none" else None,
        "count_ptr": one if reduction != "none" or with_report else None,
        "report_ptr": "*fp32" if with_report else None,
        "counter_ptr": "*i32",
        "scale_ptr": one if finished_grad else None,
        "n_valid_ptr": None,
        "student_stride": stride,
        "mentor_strides": (stride,) * n_mentors,
        "target_stride": stride if class_probabilities else None,
        "factor_stride": _integer(0),
        "n_rows": _integer(n_rows),
        "temperature": "fp32",
        "task_weight": None,
        "label_smoothing": "fp32" if class_probabilities else None,
        "share_scale": "fp32" if rounded else None,
        "ignore_index": "i32",
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ROWS": cut.ROWS,
        "ALIGN": align,
        **sum_blocks(n_lines),
        "KNOWLEDGE_FILTER": tl.constexpr(knowledge_filter),
        "MENTORING": tl.constexpr(mentoring),
        "RANK_WEIGHTING": True,
        "MEAN": reduction == "mean",
        "FINISHED_GRAD": finished_grad,
    }
    return _compile(KERNELS[kernel], arguments, target, cut)


def compile_augmentation(
    height: int,
    width: int,
    *,
    target: str,
    dtype: str,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 0,
) -> Compiled:
    """Compile the kernel of the resident loader for images of this size; the rest as above."""
    cut = tiles(width, tl.dtype(dtype).primitive_bitwidth // 8, _gpu(target).warp_size)
    arguments = {
        "image_ptr": "*u8",
        "target_ptr": "*i64",
        "order_ptr": "*i64",
        "table_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "out_target_ptr": "*i64",
        "order_stride": 1,
        "augment_key": "i32",
        "cutout_key": "i32",
        "H": height,
        "W": width,
        "PADDING": padding,
        "FLIP": flip,
        "CUTOUT": cutout,
        "GROUP": cut.GROUP,
        "GROUPS": cut.GROUPS,
    }
    return _compile(gather_augment_kernel, arguments, target, cut)


def _gpu(target: str) -> GPUTarget:
    backend, architecture = target.split(":")
    if backend == "cuda":
        return GPUTarget(backend, int(architecture), 32)
    return GPUTarget(backend, architecture, 64)


def _compile(
    kernel: triton.JITFunction, arguments: dict[str, object], target: str, cut: Blocks | Tiles
) -> Compiled:
    gpu = _gpu(target)
    options = {"num_warps": cut.num_warps}
    compiled = triton.compile(_source(kernel, arguments), target=gpu, options=options)
    read = _read_cubin if gpu.backend == "cuda" else _read_amdgcn
    return Compiled(**read(compiled), blocks=cut)


def _integer(value: int) -> str | int:
    """Describe an integer as Triton sees it: 1 is a constant, a multiple of 16 known to be one."""
    if value == 1:
        return 1
    return "i32 of 16" if value % 16 == 0 else "i32"


def _source(kernel: triton.JITFunction, arguments: dict[str, object]) -> ASTSource:
    """Describe a call: strings are types, all else constants; pointers are aligned to 16 bytes."""
    signature, constants, aligned = {}, {}, {}

    def describe(place: tuple[int, ...], value: object) -> str:
        if not isinstance(value, str):
            constants[place] = value.value if isinstance(value, tl.constexpr) else value
            return "constexpr"
        if value[0] == "*" or value.endswith(" of 16"):
            aligned[place] = [["tt.divisibility", 16]]
        return value.removesuffix(" of 16")

    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, tuple):
            signature[name] = tuple(describe((index, i), item) for i, item in enumerate(value))
        else:
            signature[name] = describe((index,), value)
    return ASTSource(kernel, signature, constants, aligned)


def _read_cubin(compiled: CompiledKernel) -> dict[str, object]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    local = sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL"))

    def widths(instruction: str) -> dict[int, int]:
        counts = Counter()
        for width in re.findall(rf"\b{instruction}\.E((?:\.[A-Z0-9_]+)*)", code):
            size = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", width)
            counts[int(size[1]) // 8 if size else 4] += 1
        return dict(counts)

    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": local,
        "shared_bytes": compiled.metadata.shared,
        "loads": widths("LDG"),
        "stores": widths("STG"),
    }


def _read_amdgcn(compiled: CompiledKernel) -> dict[str, object]:
    code = compiled.asm["amdgcn"]

    def widths(instruction: str) -> dict[int, int]:
        counts = Counter()
        for kind in re.findall(rf"\b(?:global|buffer)_{instruction}_(\w+)", code):
            size = re.fullmatch(r"(?:dword|b)(?:x?(\d+))?", kind)
            narrow = 2 if "short" in kind or "16" in kind else 1
            counts[4 * int(size[1] or 1) if size else narrow] += 1
        return dict(counts)

    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spilled_bytes": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "shared_bytes": compiled.metadata.shared,
        "loads": widths("load"),
        "stores": widths("store"),
    }
