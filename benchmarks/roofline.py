"""Measure the limits of this device: bytes copied and exponentials computed per second.

    python benchmarks/roofline.py [--out FOLDER]

On a GPU: a large device-to-device copy, bytes read plus bytes written, and a Triton kernel in which
each thread computes a long chain of exp2 in registers. On the CPU, as a rough scale: a copy in
memory, and torch.exp2 on a tensor that fits into the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from measure import DEVICE, GPU, environment, graph_time, host_time, write_json

BLOCK = 1024  # eight independent chains per thread hide latency
STEPS = 1024


@triton.jit
def exponentials_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """STEPS times x = 2^(−x): each depends on the one before, and none overflows."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offsets, x)


def measure() -> dict[str, float]:
    """The two ceilings: "copy_gigabytes_per_second" and "gigaexponentials_per_second"."""
    time = graph_time if GPU else host_time
    n_bytes = min(2**31, torch.cuda.mem_get_info()[0] // 4) if GPU else 2**26
    source = torch.randint(256, (n_bytes,), dtype=torch.uint8, device=DEVICE)
    copy_time = time(lambda to, source: to.copy_(source), [(torch.empty_like(source), source)])

    if GPU:
        n_programs, steps = 64 * torch.cuda.get_device_properties(0).multi_processor_count, STEPS
    else:
        n_programs, steps = 256, 1
    x = torch.rand(n_programs * BLOCK, device=DEVICE)

    def exponentials(x: torch.Tensor, out: torch.Tensor) -> None:
        if steps > 1:
            exponentials_kernel[(n_programs,)](x, out, BLOCK=BLOCK, STEPS=steps)
        else:
            torch.exp2(x, out=out)

    exponentials_time = time(exponentials, [(x, torch.empty_like(x))])
    return {
        "copy_gigabytes_per_second": 2 * n_bytes / copy_time / 1e9,
        "gigaexponentials_per_second": x.numel() * steps / exponentials_time / 1e9,
    }


def main() -> None:
    """Measure, print JSON and, with ``--out``, write roofline.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for roofline.json")
    out = parser.parse_args().out
    record = {"benchmark": "roofline", "environment": environment(), "roofline": measure()}
    print(json.dumps(record, indent=1))
    if out:
        write_json(out, "roofline", record)


if __name__ == "__main__":
    main()
