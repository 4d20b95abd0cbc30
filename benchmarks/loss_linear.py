"""The loss of linear heads beside whole logits, and beside Liger's fused linear JSD.

    python benchmarks/loss_linear.py [--small] [--seconds N] [--out FOLDER]

Loss and gradients at hidden states and weight: `fused_linear_classroom_loss`; both products with
`fused_classroom_loss` on whole logits; and where liger-kernel is installed, on a GPU, one call of
its fused linear JSD for each mentor, which is another loss (forward KL, neither ranks nor task).
Each with a fraction of the tokens and of the vocabulary too: how the peak memory grows. Prints the
table and writes loss_linear.json. On the CPU sizes are small; memory there is the process's peak
beyond what it held before, where Linux tells it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from classroomkd import fused_classroom_loss, fused_linear_classroom_loss
from measure import DEVICE, GPU, attempted, environment, peak_extra_bytes, synchronize, write_json
from result_tables import terminal

THIS, WHOLE, LIGER = (
    *("fused_linear_classroom_loss", "whole logits, fused_classroom_loss"),
    "Liger's fused linear JSD, M calls",
)
DTYPE = torch.bfloat16 if GPU else torch.float32
_CALLS = 5


class Size(NamedTuple):
    """Tokens, vocabulary, hidden size of student and mentors, and number of mentors."""

    n_rows: int
    n_classes: int
    width: int
    n_mentors: int


class Batch(NamedTuple):
    """A student's hidden states [N, H] and weight [V, H], M such pairs, and targets [N]."""

    hidden: Tensor
    weight: Tensor
    mentors: list[tuple[Tensor, Tensor]]
    targets: Tensor


GPU_SIZES = ((8192, 32_768, 2048), (4096, 128_256, 4096))
CPU_SIZES, CPU_BUDGET = ((1024, 4096, 64),), 2**22
SMALL_SIZES = ((64, 512, 16),)


def sizes(small: bool) -> list[Size]:
    """Each size with one mentor and three; then with a half and a quarter of tokens and classes."""
    of_device = SMALL_SIZES if small else GPU_SIZES if GPU else CPU_SIZES
    found = [Size(*size, n_mentors) for size in of_device for n_mentors in (1, 3)]
    for N, V, H in of_device:
        found += [Size(N // part, V, H, 3) for part in (2, 4)]
        found += [Size(N, V // part, H, 3) for part in (2, 4)]
    return found


def batch_of(size: Size) -> Batch:
    """Random heads, in bfloat16 on a GPU and float32 on the CPU."""
    rng = torch.Generator(DEVICE).manual_seed(0)

    def randn(rows: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, size.width, generator=rng, device=DEVICE)
        return (scale * values).to(DTYPE)

    deviation = 2 / math.sqrt(size.width)  # of logits: 2
    mentors = [
        (randn(size.n_rows), randn(size.n_classes, deviation)) for _ in range(size.n_mentors)
    ]
    return Batch(
        randn(size.n_rows).requires_grad_(),
        randn(size.n_classes, deviation).requires_grad_(),
        mentors,
        torch.randint(size.n_classes, (size.n_rows,), generator=rng, device=DEVICE),
    )


def chunked(batch: Batch) -> Tensor:
    """The loss of heads: without whole logits."""
    budget = {} if GPU else {"memory_budget": CPU_BUDGET}
    return fused_linear_classroom_loss(*batch, **budget)


def whole(batch: Batch) -> Tensor:
    """The same loss of whole logits."""
    with torch.no_grad():
        mentors = [linear(*mentor) for mentor in batch.mentors]
    return fused_classroom_loss(linear(batch.hidden, batch.weight), mentors, batch.targets)


def liger(batch: Batch) -> Tensor:
    """The sum of forward KLs by Liger, over the same tokens and heads."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return sum(
        liger_fused_linear_jsd(
            batch.hidden, batch.weight, *mentor, shift_labels=batch.targets, jsd_beta=0.0
        )
        for mentor in batch.mentors
    )


IMPLEMENTATIONS: dict[str, Callable[[Batch], Tensor]] = {THIS: chunked, WHOLE: whole, LIGER: liger}


def not_here(name: str) -> str | None:
    """Why an implementation is not run on this machine, or None."""
    if name != LIGER:
        return None
    if not GPU:
        return "not run: needs a GPU"
    installed = importlib.util.find_spec("liger_kernel")
    return None if installed else "not installed: liger-kernel"


def measure(name: str, batch: Batch) -> dict[str, float | None]:
    """Median time of loss and gradients, and their peak memory, results included."""

    def call() -> tuple[Tensor, ...]:
        loss = IMPLEMENTATIONS[name](batch)
        return torch.autograd.grad(loss, (batch.hidden, batch.weight))

    peak = peak_extra_bytes(call, ()) if GPU else _host_peak(call)
    seconds = []
    for _ in range(_CALLS):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    difference = None
    if name == WHOLE:
        pairs = zip(call(), torch.autograd.grad(chunked(batch), batch[:2]), strict=True)
        difference = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    return {
        "milliseconds": 1e3 * statistics.median(seconds),
        "peak_extra_mib": None if peak is None else peak / 2**20,
        "difference": difference,
    }


def _host_peak(call: Callable[[], object]) -> int | None:
    """The most bytes that the process holds during a call, beyond those before it."""
    call()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed counts as held before
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def rows(size: Size, deadline: float = math.inf) -> Iterator[dict[str, Any]]:
    """One row per implementation, also if it does not run."""
    made = cache(lambda: batch_of(size))
    about: dict[str, Any] = dict(zip(("rows", "classes", "width", "mentors"), size, strict=True))
    about["dtype"] = str(DTYPE).removeprefix("torch.")
    for name in IMPLEMENTATIONS:
        numbers = attempted(not_here(name), deadline, lambda name=name: measure(name, made()))
        yield about | {"implementation": name, **numbers}


def main() -> int:
    """Measure, print and write loss_linear.json; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for loss_linear.json")
    parser.add_argument("--small", action="store_true", help="one tiny size: checks the script")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no row after N seconds"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if not GPU:
        torch.set_num_threads(1)
    record: dict[str, Any] = {"benchmark": "loss_linear", "environment": environment(), "rows": []}
    for size in sizes(arguments.small):
        for row in rows(size, deadline):
            record["rows"].append(row)
            print(row, file=sys.stderr, flush=True)
            if arguments.out:
                write_json(arguments.out, "loss_linear", record)
    print(terminal(record))
    return int(any(row["status"].startswith("failed") for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
