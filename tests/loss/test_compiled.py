"""The kernels as machine code, compiled ahead of time for GPUs that need not be there."""

import ast
import itertools
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from classroomkd.loss.options import (
    KNOWLEDGE_FILTERS,
    MENTORINGS,
    RANKINGS,
    REDUCTIONS,
    WEIGHTINGS,
    LossOptions,
)

pytest.importorskip("triton", "3.3", reason="needs Triton 3.3")

import compiled

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@pytest.fixture(scope="module")
def compile_all():
    """Compile in fresh processes, since this one may be interpreting the kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield lambda function, jobs: list(pool.map(function, jobs))


def _compile(job):
    from classroomkd.kernels.ahead_of_time import compile_call

    return compile_call(**job)


# The widest load that 16-byte registers and the rows' alignment allow: a row of 100 bfloat16
# numbers is 200 bytes long, which 8 divides and 16 does not.
@pytest.mark.parametrize(
    ("n_classes", "dtype", "width"),
    [
        (100, torch.float32, 16),
        (100, torch.bfloat16, 8),
        (1000, torch.float32, 16),
        (1000, torch.bfloat16, 16),
    ],
)
def test_one_wide_load_a_logit_and_no_spill(compile_all, n_classes, dtype, width):
    n_mentors = 6
    jobs = [
        {
            "n_classes": n_classes,
            "n_mentors": n_mentors,
            "dtype": dtype,
            "target": target,
            "gradient": "autograd",
            "reduction": "none",  # nothing but the rows: no counting, no summing
        }
        for target in TARGETS
    ]
    for target, kernels in zip(TARGETS, compile_all(_compile, jobs), strict=True):
        got = kernels["classroom"]
        assert got.spilled_bytes == 0, target
        threads = got.blocks.num_warps * (32 if target.startswith("cuda") else 64)
        elements = (n_mentors + 1) * got.blocks.ROWS * got.blocks.BLOCK_C
        n_loads, rest = divmod(elements * dtype.itemsize, threads * width)
        assert rest == 0
        # Besides the rows at most the target class, 8 bytes, and the one logit of each row that it
        # names; AMD's compiler may take these as scalars.
        rows = Counter({width: n_loads})
        others = Counter({8: 1}) + Counter({dtype.itemsize: n_mentors + 1})
        assert rows <= Counter(got.loads) <= rows + others, f"{target}: {got.loads}"


def test_every_pair_of_values_is_compiled_somewhere():
    """Counted without regard to how the rows were found."""
    rows = compiled.covering(compiled.FACTORS)
    wanted = set()
    for (a, values), (b, others) in itertools.combinations(compiled.FACTORS.items(), 2):
        wanted |= {(a, str(x), b, str(y)) for x in values for y in others}
    got = {
        (a, str(row[a]), b, str(row[b]))
        for row in rows
        for a, b in itertools.combinations(compiled.FACTORS, 2)
    }
    assert got == wanted
    assert rows == compiled.covering(compiled.FACTORS)


def test_the_factors_are_all_that_a_call_can_be():
    """Every option of the public functions, each value of those that name one."""
    known = {"call", "targets", "n_classes", "n_mentors", "target", "n_rows", "dtype"}
    known |= {"mentor_dtypes", "row_padding", "with_report"}
    options = {field.name for field in fields(LossOptions)} | {"mentor_weight"}
    in_calls = {"reduction", "label_smoothing"}
    numbers = {"temperature", "ignore_index"}  # values at run time, of which nothing is specialised
    assert set(compiled.FACTORS) == known | options - in_calls - numbers
    assert set(compiled.FACTORS["ranking"]) == set(RANKINGS)
    assert set(compiled.FACTORS["knowledge_filter"]) == set(KNOWLEDGE_FILTERS)
    assert set(compiled.FACTORS["mentoring"]) == set(MENTORINGS)
    assert set(compiled.FACTORS["weighting"]) == set(WEIGHTINGS)
    assert {reduction for _, reduction in compiled.FACTORS["call"]} == set(REDUCTIONS)


def sampled():
    """Of the covering rows, for each target the first of each way to cut rows up, with few mentors.

    Two mentors compile in seconds, sixteen in minutes.
    """
    rows = [row for row in compiled.covering(compiled.FACTORS) if row["n_mentors"] <= 2]
    chosen = {}
    for row in rows:
        chosen.setdefault((row["target"], row["n_classes"] >= 9000), row)
    assert len(chosen) == 2 * len(TARGETS)
    return list(chosen.values())


def test_a_sample_of_the_covering_rows_compiles(compile_all):
    for row, lines in zip(sampled(), compile_all(compiled.compile_row, sampled()), strict=True):
        for line in lines:
            assert "error" not in line, f"{row}: {line['error']}"
            assert line["spilled_bytes"] == 0, f"{row}: {line}"


def test_class_probabilities_compile_over_tiles(compile_all):
    """Unsmoothed they are a bare load, whose sum and maximum no loop may carry on."""
    jobs = [
        {
            "n_classes": 9000,
            "n_mentors": 1,
            "target": target,
            "targets": torch.float32,
            "ranking": "batch",
        }
        for target in TARGETS
    ]
    for job, got in zip(jobs, compile_all(_compile, jobs), strict=True):
        assert got.keys() == {"confidence", "classroom"}
        assert all(kernel.spilled_bytes == 0 for kernel in got.values()), job


def _compile_squeezed(target, n_classes):
    """A row in the registers of one warp, where it cannot fit."""
    from classroomkd.kernels import launch

    original, launch.blocks = launch.blocks, lambda *_: launch.Blocks(n_classes, 1, 1)
    try:
        return _compile({"n_classes": n_classes, "n_mentors": 6, "target": target})["classroom"]
    finally:
        launch.blocks = original


def test_the_reader_sees_spills_and_narrow_loads():
    """The counts above are only worth something if they can come out otherwise."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        squeezed = pool.map(_compile_squeezed, ["cuda:90", "hip:gfx942"], [1024, 4096])
        sizes = {"n_classes": 99, "n_mentors": 2, "target": "cuda:90"}
        narrow = pool.submit(_compile, sizes | {"gradient": "autograd", "reduction": "none"})
        assert all(got.spilled_bytes > 0 for got in squeezed)
        # Rows of 99 floats: four bytes a load, four of them a thread; the targets beside.
        assert narrow.result()["classroom"].loads == {4: 12 + 3, 8: 1}


def test_bounds_of_unrolled_loops_are_constants_to_triton_3_3():
    """There ``min`` and ``max`` of two constants are tensors, which such loops refuse."""
    kernels = Path(__file__).parents[2] / "kernels"
    loops = [
        node
        for file in kernels.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.static_range"
    ]
    assert len(loops) > 10
    for loop in loops:
        called = {ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)}
        assert called <= {"tl.static_range", "len"}, ast.unparse(loop)
