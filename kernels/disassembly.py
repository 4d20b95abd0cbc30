"""A compiled kernel's resources and the widths of its loads and stores, from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.compiler import CompiledKernel


def read_cubin(compiled: CompiledKernel) -> dict[str, object]:
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


def read_amdgcn(compiled: CompiledKernel) -> dict[str, object]:
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
