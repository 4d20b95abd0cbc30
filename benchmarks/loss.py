"""Compare the loss and its gradient with other implementations.

    python benchmarks/loss.py [--small] [--seconds N] [--out FOLDER]

Measures this project over a grid of sizes, and all implementations at seven named cases. Prints the
tables and writes loss.json after every row. The headline sizes come first, the tuning modes of
torch.compile last. Every mentor is active, so no work is skipped. On the CPU it measures wall times
at small sizes, which only checks the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import roofline
import summary
from baselines import float64_loss_and_grad, liger_loss, per_mentor_loop
from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.kernels.blocks import blocks
from classroomkd.kernels.launch import WARP_SIZE
from measure import (
    DEVICE,
    GPU,
    attempted,
    environment,
    graph_time,
    host_time,
    n_cold_sets,
    peak_extra_bytes,
    profiler_time,
    write_json,
)
from result_tables import LEGEND, cells, terminal

LossAndGrad = Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """Size, dtype and ranking of a batch."""

    n_rows: int
    n_classes: int
    n_mentors: int
    dtype: torch.dtype
    ranking: str


SIZES = (
    *((64, 100), (128, 100), (512, 100)),
    *((256, 1000), (1024, 1000), (4096, 1000), (8192, 1000)),
    *((8192, 4096), (4096, 16_384), (2048, 32_768), (2048, 128_256)),
)
# CIFAR-100; a large batch; the same with the published ranking; ImageNet; then sizes bound
# by bandwidth and exponentials, up to a vocabulary.
NAMED = {
    "CIFAR": Case(64, 100, 6, torch.float32, "sample"),
    "CIFAR, 512 rows": Case(512, 100, 6, torch.float32, "sample"),
    "CIFAR, large batch": Case(512, 100, 6, torch.float32, "batch"),
    "ImageNet": Case(256, 1000, 6, torch.bfloat16, "sample"),
    "ImageNet, large batch": Case(8192, 1000, 6, torch.float32, "sample"),
    "many classes": Case(8192, 4096, 6, torch.bfloat16, "sample"),
    "vocabulary": Case(2048, 32_768, 2, torch.bfloat16, "sample"),
}
SMALL_NAMED = {"small": Case(4, 100, 2, torch.float32, "sample")}
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


def grid(small: bool) -> list[Case]:
    """All sizes, numbers of mentors, dtypes and rankings."""
    sizes, mentors = (((4, 100), (2, 1000)), (2,)) if small else (SIZES, (1, 2, 6, 12))
    kinds = itertools.product(sizes, mentors, LARGEST_ERROR, ("sample", "batch"))
    return [Case(*size, *kind) for size, *kind in kinds]


def size(case: Case) -> dict[str, Any]:
    """The case as columns of a row."""
    return {
        "rows": case.n_rows,
        "classes": case.n_classes,
        "mentors": case.n_mentors,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ranking": case.ranking,
    }


def work(case: Case) -> tuple[int, int]:
    """Bytes that the kernels must move, and exponentials, with all mentors active.

    One pass reads student and mentors and writes the gradient: M + 2 times [B, C] elements.
    Ranking by batch reads all logits once more: 2M + 3. Rows longer than one sweep's step are read
    three times: 3M + 4. Each class of a row needs one exponential for the student, one for each
    mentor, and two for each KD term; exponentials repeated by another sweep are not counted.
    """
    M = case.n_mentors
    passes = M + 2 if case.ranking == "sample" else 2 * M + 3
    cut = blocks(case.n_classes, M, case.dtype.itemsize, WARP_SIZE)
    if not cut.PIECES and case.n_classes > cut.BLOCK_C:
        passes = 3 * M + 4
    elements = case.n_rows * case.n_classes
    return passes * elements * case.dtype.itemsize, (1 + 3 * M) * elements


def input_sets(case: Case, n_sets: int) -> list[tuple[Tensor, list[Tensor], Tensor]]:
    """Random (student, mentors, targets) in which all mentors beat the student on the target."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    shape = (n_sets, 1 + case.n_mentors, case.n_rows, case.n_classes)
    logits = torch.randn(shape, generator=rng, dtype=case.dtype, device=DEVICE).mul_(2)
    targets = torch.randint(case.n_classes, (n_sets, case.n_rows), generator=rng, device=DEVICE)
    for k in range(1 + case.n_mentors):
        logits[:, k].scatter_(2, targets[..., None], 4.0 if k else -4.0)
    return [
        (everyone[0].detach().requires_grad_(), list(everyone[1:]), target)
        for everyone, target in zip(logits, targets, strict=True)
    ]


def differentiated(loss_function: Callable[..., Tensor], ranking: str) -> LossAndGrad:
    """Loss and gradient by autograd."""

    def call(student: Tensor, mentors: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_function(student, mentors, targets, ranking=ranking)
        (grad,) = torch.autograd.grad(loss, student)
        return loss.detach(), grad

    return call


def reported(ranking: str) -> LossAndGrad:
    """The same launch with a report, as the trainer uses it."""

    def call(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad, _ = fused_classroom_loss_and_grad(
            *arguments, ranking=ranking, return_report=True
        )
        return loss, grad

    return call


def compiled(ranking: str, mode: str) -> LossAndGrad:
    """The definition through torch.compile."""
    torch.compiler.reset()
    call = differentiated(
        torch.compile(classroom_loss, mode=mode, dynamic=False, fullgraph=GPU), ranking
    )

    def step(*arguments: Any) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*arguments)

    return step if mode == "reduce-overhead" else call


THIS, REPORTED = summary.THIS, summary.REPORTED
# Name → timer, and a function from ranking to implementation.
IMPLEMENTATIONS: dict[str, tuple[str, Callable[[str], LossAndGrad]]] = {
    THIS: ("graph", lambda ranking: partial(fused_classroom_loss_and_grad, ranking=ranking)),
    REPORTED: ("graph", reported),
    "fused_classroom_loss + backward": ("graph", partial(differentiated, fused_classroom_loss)),
    "eager": ("graph", partial(differentiated, classroom_loss)),
    "compile default": ("graph", partial(compiled, mode="default")),
    # No graph can capture these: .item() waits for the GPU, and so does Liger's backward, which
    # makes a tensor from a Python number.
    "per-mentor loop": ("profiler", partial(differentiated, per_mentor_loop)),
    "Liger KL": ("profiler", partial(differentiated, liger_loss)),
    "compile reduce-overhead": ("own graph", partial(compiled, mode="reduce-overhead")),
    # Without its own graphs, so that it is replayed like the others, without copies of its inputs.
    "compile max-autotune": ("graph", partial(compiled, mode="max-autotune-no-cudagraphs")),
}
TIMERS = {"graph": graph_time, "profiler": profiler_time, "own graph": profiler_time}
COMPILED = tuple(name for name in IMPLEMENTATIONS if name.startswith("compile"))
Todo = list[tuple[Case, str, tuple[str, ...]]]


def phases(small: bool) -> list[Todo]:
    """Cases, their titles ("" for the grid) and implementations, in the order of measurement.

    The headline sizes come first, then the remaining named cases and the grid. The slowest modes of
    torch.compile come last, as time may run out.
    """
    named = SMALL_NAMED if small else NAMED
    cifar = {
        title: case
        for title, case in named.items()
        if summary.is_cifar(size(case)) and case.ranking == "sample"
    }
    others = {title: case for title, case in named.items() if title not in cifar}
    first = THIS, REPORTED, "eager"
    rest = tuple(name for name in IMPLEMENTATIONS if name not in (*first, *COMPILED))
    cases = grid(small)
    headline = [case for case in cases if summary.is_headline(size(case))]
    return [
        [(case, title, first) for title, case in cifar.items()],
        [(case, "", (THIS, REPORTED)[: 1 + reports(case)]) for case in headline],
        [(case, title, (name,)) for name in COMPILED[:2] for title, case in cifar.items()],
        [(case, title, (*first, *rest)) for title, case in others.items()],
        [(case, title, rest) for title, case in cifar.items()],
        [(case, "", (THIS,)) for case in cases if case not in headline],
        [(case, title, (name,)) for name in COMPILED[:2] for title, case in others.items()],
        [(case, title, COMPILED[2:]) for title, case in (cifar | others).items()],
    ]


def reports(case: Case) -> bool:
    """Whether a headline size is also measured with the report."""
    of_tail = (8192, 1000, 6, torch.float32)  # the longest sum of the last program
    return summary.is_cifar(size(case)) or case[:4] == of_tail


def not_here(name: str) -> str | None:
    """Why an implementation is not run on this machine, or None."""
    if not GPU and name in ("compile reduce-overhead", "compile max-autotune", "Liger KL"):
        return "not run: needs a GPU"
    if name == "Liger KL" and importlib.util.find_spec("liger_kernel") is None:
        return "not installed: liger-kernel"
    return None


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative error in norm, in chunks of rows, as a float64 copy of all may not fit."""
    pairs = zip(value.split(1024), truth.split(1024), strict=True)
    squares = sum((part.double() - true).square().sum().item() for part, true in pairs)
    return math.sqrt(squares) / truth.norm().item()


def measure(
    case: Case, name: str, prepared: Callable[[Case], tuple[list, list[Tensor]]], ceilings: dict
) -> dict[str, Any]:
    """One row's numbers; raises ArithmeticError if the result is wrong."""
    sets, truth = prepared(case)
    by, make = IMPLEMENTATIONS[name]
    call = make(case.ranking)
    loss, grad = call(*sets[0])
    errors = relative_error(loss[None], truth[0][None]), relative_error(grad, truth[1])
    del loss, grad
    if not all(error < LARGEST_ERROR[case.dtype] for error in errors):
        raise ArithmeticError(f"relative errors of loss and gradient: {errors}")

    counted = GPU and by != "own graph"
    memory = peak_extra_bytes(call, sets[0]) / 2**20 if counted else None
    host = host_time(call, sets)
    seconds = TIMERS[by](call, sets) if GPU else host
    n_bytes, n_exponentials = work(case)
    gigabytes, gigaexponentials = n_bytes / seconds / 1e9, n_exponentials / seconds / 1e9
    shares = (
        gigabytes / ceilings["copy_gigabytes_per_second"],
        gigaexponentials / ceilings["gigaexponentials_per_second"],
    )
    return {
        "device_time_us": seconds * 1e6,
        "device_time_by": by if GPU else "wall",
        "host_time_us": host * 1e6,
        "gigabytes_per_second": gigabytes,
        "gigaexponentials_per_second": gigaexponentials,
        "roofline_percent": 100 * max(shares),
        "peak_extra_mib": memory,
        "loss_relative_error": errors[0],
        "grad_relative_error": errors[1],
    }


def rows(
    case: Case, title: str, names: Iterable[str], ceilings: dict, deadline: float
) -> Iterator[dict[str, Any]]:
    """One row per implementation, also if it fails."""
    prepared = cache(_prepare)
    for name in names:
        numbers = attempted(not_here(name), deadline, measure, case, name, prepared, ceilings)
        yield {"case": title, "implementation": name, **size(case), **numbers}


def _prepare(case: Case) -> tuple[list, list[Tensor]]:
    """Input sets, and the reference loss and gradient of the first."""
    elements = (1 + case.n_mentors) * case.n_rows * case.n_classes
    sets = input_sets(case, n_cold_sets(elements * case.dtype.itemsize))
    *truth, active = float64_loss_and_grad(*sets[0], case.ranking)
    if not active.all():
        raise ArithmeticError("the inputs leave a mentor inactive")
    return sets, truth


def precompile(todo: Todo, deadline: float) -> None:
    """Compile this project's kernels for a phase in parallel, into Triton's disk cache."""
    wanted = dict.fromkeys(
        (case, name) for case, _, names in todo for name in names if name in (THIS, REPORTED)
    )
    if not wanted or time.monotonic() > deadline:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(14, os.cpu_count() or 1, len(wanted)), mp_context=context)
    jobs = [pool.submit(_compile, *each) for each in wanted]
    wait(jobs, timeout=max(0, deadline - time.monotonic()))
    pool.shutdown(cancel_futures=True)


def _compile(case: Case, name: str) -> None:
    try:
        ((student, _, targets),) = input_sets(case._replace(n_mentors=0), 1)
        _, make = IMPLEMENTATIONS[name]
        make(case.ranking)(student, [student.detach()] * case.n_mentors, targets)
    except Exception as error:  # the case's row reports it too
        print(f"{case}: {error!r}", file=sys.stderr)
    if GPU:
        torch.cuda.empty_cache()  # for the next case and the other processes


def main() -> int:
    """Run the benchmark; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for loss.json")
    parser.add_argument(
        "--small", action="store_true", default=not GPU, help="few, small cases (CPU: always)"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no row after N seconds"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if not GPU:
        torch.set_num_threads(1)  # steadier at small sizes

    ceilings = roofline.measure()
    record = {"benchmark": "loss", "environment": environment(), "roofline": ceilings, "rows": []}
    for todo in phases(arguments.small):
        if GPU:
            precompile(todo, deadline)
        for case, title, names in todo:
            for row in rows(case, title, names, ceilings, deadline):
                record["rows"].append(row)
                print(row["implementation"], *case, *cells(row), file=sys.stderr, flush=True)
                if arguments.out:
                    write_json(arguments.out, "loss", record)

    print(terminal(record), record["environment"], ceilings, LEGEND, sep="\n")
    return int(any(row["status"].startswith("failed") for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
