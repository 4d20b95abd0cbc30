"""Compile the kernels for GPUs that are not there, and read what the compiler made of them.

    compile_classroom(n_classes=100, n_mentors=6, target="cuda:90").registers

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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from classroomkd.kernels.classroom import classroom_kernel
from classroomkd.kernels.launch import alignment, blocks

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
    num_warps: int


def compile_classroom(
    *,
    n_classes: int,
    n_mentors: int,
    target: str,
    dtype: str = "fp32",
    with_grad: bool = True,
    with_statistics: bool = False,
    knowledge_filter: str = "better",
    mentoring: str = "adaptive",
) -> Compiled:
    """Compile `classroom_kernel` for class indices and ranking "sample".

    Args:
        target: "cuda:<compute capability × 10>" or "hip:<architecture>".
        dtype: of all logits, in Triton's words: "fp32", "fp16" or "bf16".

    Raises:
        ValueError: so many classes and mentors do not fit the kernel.

    """
    backend, architecture = target.split(":")
    cuda = backend == "cuda"
    warp_size = 32 if cuda else 64
    cut = blocks(n_classes, n_mentors, warp_size)
    if cut is None:
        raise ValueError(f"{n_classes} classes with {n_mentors} mentors do not fit the kernel")
    align = alignment([n_classes])
    signature = {
        "student_ptr": f"*{dtype}",
        "mentor_ptrs": (f"*{dtype}",) * n_mentors,
        "target_ptr": "*i64",
        "mentor_weight_ptr": "constexpr",
        "batch_ell_ptr": "constexpr",
        "loss_ptr": "*fp32",
        "grad_ptr": f"*{dtype}" if with_grad else "constexpr",
        "statistics_ptr": "*fp32" if with_statistics else "constexpr",
        "student_stride": "i32",
        "mentor_strides": ("i32",) * n_mentors,
        "target_stride": "constexpr",
        "n_rows": "i32",
        "temperature": "fp32",
        "task_weight": "constexpr",
        "label_smoothing": "constexpr",
        "share_scale": "constexpr",
        "ignore_index": "i32",
    }
    names = list(signature)
    constants = {name: None for name, kind in signature.items() if kind == "constexpr"} | {
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ROWS": cut.ROWS,
        "ALIGN": align,
        "KNOWLEDGE_FILTER": knowledge_filter,
        "MENTORING": mentoring,
        "RANK_WEIGHTING": True,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned for index, name in enumerate(names) if str(signature[name])[0] == "*"
    } | {(names.index("mentor_ptrs"), m): aligned for m in range(n_mentors)}
    compiled = triton.compile(
        ASTSource(classroom_kernel, signature, constants, attributes),
        target=GPUTarget(backend, int(architecture) if cuda else architecture, warp_size),
        options={"num_warps": cut.num_warps},
    )
    read = _read_cubin if cuda else _read_amdgcn
    return Compiled(**read(compiled), num_warps=cut.num_warps)


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
