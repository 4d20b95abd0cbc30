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

from classroomkd.kernels.classroom import classroom_kernel, confidence_kernel, scale_rows_kernel
from classroomkd.kernels.launch import Blocks, alignment, blocks, scaling_blocks

KERNELS = {
    "classroom": classroom_kernel,
    "confidence": confidence_kernel,
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
    blocks: Blocks


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
    with_grad: bool = True,
    with_statistics: bool = False,
) -> Compiled:
    """Compile one kernel as a launch with these options would.

    Args:
        kernel: "classroom", "confidence" (ranking "batch" runs it first) or "scale_rows"
            (autograd's backward).
        target: "cuda:<compute capability × 10>" or "hip:<architecture>".
        dtype: of all logits, in Triton's words: "fp32", "fp16" or "bf16".
        ranking, knowledge_filter, mentoring: as in the loss.
        class_probabilities: targets [B, C], smoothed; otherwise class indices.
        rounded: with ``rank_decimals``.

    Raises:
        ValueError: so many classes and mentors do not fit the kernel.

    """
    backend, architecture = target.split(":")
    cuda = backend == "cuda"
    warp_size = 32 if cuda else 64
    cut = scaling_blocks(n_classes) if kernel == "scale_rows" else None
    cut = cut or blocks(n_classes, n_mentors, warp_size)
    if cut is None:
        raise ValueError(f"{n_classes} classes with {n_mentors} mentors do not fit the kernel")

    mentors = (f"*{dtype}",) * n_mentors
    inputs = {
        "student_ptr": f"*{dtype}",
        "mentor_ptrs": mentors,
        "target_ptr": "*fp32" if class_probabilities else "*i64",
        "student_stride": "i32",
        "mentor_strides": ("i32",) * n_mentors,
        "target_stride": "i32" if class_probabilities else None,
        "n_rows": "i32",
        "label_smoothing": "fp32" if class_probabilities else None,
        "ignore_index": "i32",
        "ALIGN": alignment([n_classes]),
    }
    arguments = {
        "classroom": inputs
        | {
            "mentor_weight_ptr": None,
            "batch_ell_ptr": "*fp32" if ranking == "batch" else None,
            "loss_ptr": "*fp32",
            "grad_ptr": f"*{dtype}" if with_grad else None,
            "statistics_ptr": "*fp32" if with_statistics else None,
            "temperature": "fp32",
            "task_weight": None,
            "share_scale": "fp32" if rounded else None,
            "KNOWLEDGE_FILTER": tl.constexpr(knowledge_filter),
            "MENTORING": tl.constexpr(mentoring),
            "RANK_WEIGHTING": True,
        },
        "confidence": inputs | {"ell_ptr": "*fp32"},
        "scale_rows": {
            "grad_ptr": f"*{dtype}",
            "factor_ptr": "*fp32",
            "out_ptr": f"*{dtype}",
            "factor_stride": "i32",
            "n_rows": "i32",
        },
    }[kernel] | {"C": n_classes, "BLOCK_C": cut.BLOCK_C, "ROWS": cut.ROWS}
    compiled = triton.compile(
        _source(KERNELS[kernel], arguments),
        target=GPUTarget(backend, int(architecture) if cuda else architecture, warp_size),
        options={"num_warps": cut.num_warps},
    )
    read = _read_cubin if cuda else _read_amdgcn
    return Compiled(**read(compiled), blocks=cut)


def _source(kernel: triton.JITFunction, arguments: dict[str, object]) -> ASTSource:
    """Types as the kernel's signature, all else as constants; pointers aligned to 16 bytes."""
    signature, constants, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, (str, tuple)):
            signature[name] = value
            if isinstance(value, tuple):
                pointers = {(index, i) for i, kind in enumerate(value) if kind[0] == "*"}
            else:
                pointers = {(index,)} if value[0] == "*" else set()
            aligned |= {pointer: [["tt.divisibility", 16]] for pointer in pointers}
        else:
            signature[name] = "constexpr"
            constants[name] = value.value if isinstance(value, tl.constexpr) else value
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
    loads = Counter()
    for width in re.findall(r"\bLDG\.E((?:\.[A-Z0-9_]+)*)", code):
        size = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", width)
        loads[int(size[1]) // 8 if size else 4] += 1
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": local,
        "shared_bytes": int(re.search(r"SHARED:(\d+)", usage)[1]),
        "loads": dict(loads),
    }


def _read_amdgcn(compiled: CompiledKernel) -> dict[str, object]:
    code = compiled.asm["amdgcn"]
    loads = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", code):
        size = re.fullmatch(r"(?:dword|b)(?:x?(\d+))?", kind)
        loads[4 * int(size[1] or 1) if size else 2 if "short" in kind or "16" in kind else 1] += 1
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "spilled_bytes": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "shared_bytes": int(re.search(r"\.group_segment_fixed_size:\s+(\d+)", code)[1]),
        "loads": dict(loads),
    }
