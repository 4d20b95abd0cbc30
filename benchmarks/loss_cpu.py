"""The loss and its gradient on a CPU: this project beside plain PyTorch, eager and compiled.

    python benchmarks/loss_cpu.py [--small] [--threads 1 2] [--out FOLDER]

Four sizes and a grid. Each number is the minimum over rounds in which the implementations
alternate, so that other work on the machine affects all equally. The formulation in PyTorch is
`composed_loss` of ``baselines.py``; torch.compile gets it for each of the four sizes, and for the
grid once with dynamic sizes. Results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines import composed_loss
from classroomkd import fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.runs.machine import processor
from loss import LossAndGrad, differentiated
from measure import environment, write_json

THIS, AUTOGRAD, EAGER, COMPILED = (
    *("fused_classroom_loss_and_grad", "fused_classroom_loss + backward"),
    *("eager", "torch.compile"),
)
SIZES = ((64, 100, 6), (512, 100, 6), (1024, 1000, 6), (256, 32_000, 3))
ROWS, CLASSES, MENTORS = (1, 64, 512, 4096), (2, 10, 100, 1000, 32_000), (1, 6, 12)
_MOST_LOGITS = 2**24  # of student and mentors together, lest the grid take hours
_ROUNDS, _ROUND_SECONDS = 5, 0.03

Inputs = tuple[Tensor, list[Tensor], Tensor]


def grid() -> list[tuple[int, int, int]]:
    """Sizes B, C, M."""
    return [
        (B, C, M)
        for B, C, M in itertools.product(ROWS, CLASSES, MENTORS)
        if (1 + M) * B * C <= _MOST_LOGITS
    ]


def inputs(size: tuple[int, int, int]) -> Inputs:
    """Random logits; all mentors beat the student on the target, so that all teach."""
    n_rows, n_classes, n_mentors = size
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1 + n_mentors, n_rows, n_classes, generator=rng)
    targets = torch.randint(n_classes, (n_rows,), generator=rng)
    logits[0].scatter_(1, targets[:, None], -4.0)
    logits[1:].scatter_(2, targets.expand(n_mentors, -1)[..., None], 4.0)
    student, *mentors = logits.unbind()
    return student.clone().requires_grad_(), [mentor.clone() for mentor in mentors], targets


def implementations(dynamic: bool) -> dict[str, LossAndGrad]:
    """All implementations; earlier results of torch.compile are kept only if dynamic."""
    if not dynamic:
        torch.compiler.reset()
    compiled = torch.compile(composed_loss, dynamic=dynamic)
    return {
        THIS: fused_classroom_loss_and_grad,
        AUTOGRAD: differentiated(fused_classroom_loss, "sample"),
        EAGER: differentiated(composed_loss, "sample"),
        COMPILED: differentiated(compiled, "sample"),
    }


def measure(calls: dict[str, LossAndGrad], size: tuple[int, int, int]) -> dict[str, float]:
    """Seconds of one call of each.

    With one thread this is the process's CPU time, independent of other work on the machine.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    batch = inputs(size)
    expected = calls[EAGER](*batch)
    for name, call in calls.items():
        torch.testing.assert_close(call(*batch), expected, rtol=1e-3, atol=1e-6, msg=name)
    least: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            begin, n_calls = clock(), 0
            while n_calls == 0 or clock() - begin < _ROUND_SECONDS:
                start = clock()
                call(*batch)
                seconds = clock() - start
                least[name] = min(least.get(name, seconds), seconds)
                n_calls += 1
    return least


def rows(threads: int, small: bool) -> Iterator[dict[str, Any]]:
    """One row for each size: its numbers in microseconds."""
    torch.set_num_threads(threads)
    named = [(size, "size") for size in SIZES[: 1 if small else None]]
    cases = named + [(size, "grid") for size in grid()[:: 20 if small else 1]]
    of_grid = None
    for size, kind in cases:
        if kind == "grid" and of_grid is None:
            of_grid = implementations(dynamic=True)
        least = measure(of_grid or implementations(dynamic=False), size)
        B, C, M = size
        yield {
            **{"kind": kind, "threads": threads, "rows": B, "classes": C, "mentors": M},
            "microseconds": {name: 1e6 * seconds for name, seconds in least.items()},
            "times_faster": min(least[EAGER], least[COMPILED]) / least[THIS],
        }


def main() -> int:
    """Measure, print and write loss_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for loss_cpu.json")
    parser.add_argument("--small", action="store_true", help="few sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch's threads")
    arguments = parser.parse_args()
    about = environment() | {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        # More than the number of threads: other processes were using the machine.
        "load_average": os.getloadavg()[0],
    }
    record: dict[str, Any] = {"benchmark": "loss_cpu", "environment": about, "rows": []}
    for threads in arguments.threads:
        for row in rows(threads, arguments.small):
            record["rows"].append(row)
            print(row, file=sys.stderr, flush=True)
            if arguments.out:
                write_json(arguments.out, "loss_cpu", record)
    worst = min(record["rows"], key=lambda row: row["times_faster"])
    print(f"least gain: {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
