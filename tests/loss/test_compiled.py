"""The kernels as machine code, cross-compiled for four GPUs."""

import ast
import itertools
import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from classroomkd.loss.inputs import FLOATS, INDICES, KERNEL_LOGITS
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
from processes import context

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@pytest.fixture(scope="module")
def compile_all():
    """Compile in fresh processes, since this one may be interpreting the kernels."""
    with ProcessPoolExecutor(2, mp_context=context()) as pool:
        yield lambda function, jobs: list(pool.map(function, jobs))


def _compile(job):
    from classroomkd.kernels.ahead_of_time import compile_call

    return compile_call(**job)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_classes", [100, 1000])
def test_wide_loads_and_no_spill(compile_all, n_classes, dtype):
    """Each logit is loaded twice: held rows' student beside every network, swept ones' in both
    halves, but for the student's, which is still there.
    """
    n_lanes = 8
    # On H100 all four; each of the others has both sizes, and both dtypes. At 1000 classes these
    # have two mentors, which compile sooner; at 100, two would be loaded once.
    alike = (n_classes == 100) == (dtype == torch.float32)
    targets = ("cuda:90", "cuda:80") if alike else ("cuda:90", "cuda:100", "hip:gfx942")
    jobs = [
        {
            "n_classes": n_classes,
            "n_mentors": 6 if target == "cuda:90" or n_classes == 100 else 2,
            "dtype": dtype,
            "target": target,
            "gradient": "autograd",
            "reduction": "none",  # nothing but the rows: no counting, no summing
        }
        for target in targets
    ]
    for job, kernels in zip(jobs, compile_all(_compile, jobs), strict=True):
        got, target, n_mentors = kernels["classroom"], job["target"], job["n_mentors"]
        assert got.spilled_bytes == 0, target
        cut = got.blocks
        threads = cut.num_warps * (32 if target.startswith("cuda") else 64)
        if cut.PIECES:  # four columns a thread, which are aligned in bfloat16 of 100 classes too
            rows, width = 2 * n_lanes * cut.PIECES * cut.ROWS, 4 * dtype.itemsize
        else:
            rows, width = 2 * (n_mentors + 1) - 1, 16
        n_loads, rest = divmod(rows * cut.BLOCK_C * dtype.itemsize, threads * width)
        assert rest == 0
        # Besides the target class, 8 bytes, and the logit of each row that it names. AMD's compiler
        # may take these as scalars, keep a row in registers, and load the class for four layouts.
        wide = Counter({width: n_loads})
        kept = Counter({width: n_loads // rows}) if target.startswith("hip") else Counter()
        others = Counter({8: 4 if kept else 1}) + Counter({dtype.itemsize: n_mentors + 1})
        assert wide - kept <= Counter(got.loads) <= wide + others, f"{target}: {got.loads}"


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
    """Every option of the public functions, each value of those that name one, each dtype."""
    factors = compiled.FACTORS
    known = {"call", "targets", "n_classes", "n_mentors", "target", "n_rows", "dtype"}
    known |= {"mentor_dtypes", "row_padding", "n_positions", "row_weight", "with_report"}
    options = {field.name for field in fields(LossOptions)} | {"mentor_weight"}
    in_calls = {"reduction", "label_smoothing"}
    numbers = {"temperature", "ignore_index"}  # values at run time, of which nothing is specialised
    assert set(factors) == known | options - in_calls - numbers
    assert set(factors["ranking"]) == set(RANKINGS)
    assert set(factors["knowledge_filter"]) == set(KNOWLEDGE_FILTERS)
    assert set(factors["mentoring"]) == set(MENTORINGS)
    assert set(factors["weighting"]) == set(WEIGHTINGS)
    assert set(factors["target"]) == set(TARGETS)
    assert {reduction for _, reduction, _ in factors["call"]} == set(REDUCTIONS)

    def names(dtypes):
        return {str(dtype).removeprefix("torch.") for dtype in dtypes}

    assert set(factors["dtype"]) == set(factors["mentor_dtypes"][-1]) == names(KERNEL_LOGITS)
    assert {dtype for dtype, _ in factors["targets"]} == names(INDICES + FLOATS)
    assert set(factors["mentor_weight"]) == names(FLOATS) | {None}
    assert {scale for *_, scale in factors["call"]} == names(FLOATS) | {None}


@pytest.mark.slow
def test_no_spill_of_many_rows_loaded_one_column_at_a_time(compile_all):
    more = {"with_report": True, "mentoring": "dtkd", "label_smoothing": 0.1, "rank_decimals": 2}
    call = {"n_classes": 15, "target": "cuda:90", "gradient": "autograd", **more}
    for kernels in compile_all(_compile, [call | {"n_mentors": m} for m in (6, 12, 16)]):
        assert kernels["classroom"].blocks.PIECES
        assert kernels["classroom"].spilled_bytes == 0


def _described(ignore_index):
    """What Triton is told of the arguments of both launches, rows held and swept."""
    from classroomkd.kernels import ahead_of_time as ahead

    described, original = [], ahead._compile
    ahead._compile = lambda kernel, arguments, *_: described.append((kernel.__name__, arguments))
    try:
        for n_classes in (100, 9000):
            call = {"n_classes": n_classes, "n_mentors": 1, "target": "cuda:90"}
            ahead.compile_call(**call, ranking="batch", ignore_index=ignore_index)
    finally:
        ahead._compile = original
    return [(name, arguments["ignore_index"]) for name, arguments in described]


def test_no_ignored_index_compiles_anew_unless_it_is_longer(compile_all):
    """Of an integer Triton would make a constant (1) or a multiple of 16."""
    indices = [-100, 0, 1, 16, -(2**31), -(2**31) - 1, 2**31]
    first, *others, low, high = compile_all(_described, indices)
    assert low == high
    assert len(first) == len(low) == 4
    assert {kind for _, kind in first} == {"i32"}
    assert all(other == first for other in others)
    assert {kind for _, kind in low} == {"i64"}


def sampled():
    """Of the covering rows, for each target the first that is swept and the first that is dense.

    Held rows are compiled above. Two mentors compile in seconds, sixteen in minutes.
    """
    rows = [row for row in compiled.covering(compiled.FACTORS) if row["n_mentors"] <= 2]
    chosen = {}
    for row in rows:
        dense = row["n_classes"] <= 256 and row["n_positions"] is not None
        if dense or row["n_classes"] >= 9000:
            chosen.setdefault((row["target"], dense), row)
    assert len(chosen) == 2 * len(TARGETS)
    return list(chosen.values())


@pytest.mark.slow
def test_a_sample_of_the_covering_rows_compiles(compile_all):
    for row, call in zip(sampled(), compile_all(compiled.compile_row, sampled()), strict=True):
        assert "error" not in call, f"{row}: {call['error']}"
        assert compiled.spilled(call) == 0, f"{row}: {call}"


FACTORS = {"n_classes": (10, 9000), "n_mentors": (1, 6), "target": ("cuda:90",)}
DONE = {"n_classes": 10, "kernels": {}, "target": "cuda:90", "n_mentors": 1, "dtype": "float32"}


def run(monkeypatch, path, outcomes):
    """The command, with what `compile_row` is to give in turn; what it was called with."""
    rows, outcomes = [], iter(outcomes)

    def compile_rows(left, _):
        for row in left:
            rows.append(row)
            outcome = next(outcomes)
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    monkeypatch.setattr(compiled, "FACTORS", FACTORS)
    monkeypatch.setattr(compiled, "compile_rows", compile_rows)
    monkeypatch.setattr(sys, "argv", ["compiled.py", "--out", str(path)])
    return compiled.main(), rows


def test_an_interrupted_record_is_gone_on_with(monkeypatch, tmp_path, capsys):
    """Quick calls first; what fails and what spills is counted."""
    rows = compiled.covering(FACTORS)
    assert [(row["n_mentors"], row["n_classes"]) for row in rows] == [
        *((1, 10), (1, 9000), (6, 10), (6, 9000))
    ]
    path = tmp_path / "compiled.json"
    spills = DONE | {"kernels": {"classroom": {"spilled_bytes": 8}}}
    code, called = run(monkeypatch, path, [DONE, spills, KeyboardInterrupt()])
    assert (code, called) == (130, rows[:3])
    assert "2 of 4 calls are in" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert [record[key] for key in ("calls", "done", "failed", "spilling")] == [4, 2, 0, 1]
    assert record["compiled"] == [DONE, spills]

    fails = {key: DONE[key] for key in DONE if key != "kernels"} | {"error": "no"}
    record["compiled"][1] = DONE
    path.write_text(json.dumps(record))
    code, called = run(monkeypatch, path, [DONE, fails])
    assert (code, called) == (1, rows[2:])
    record = json.loads(path.read_text())
    assert [record[key] for key in ("calls", "done", "failed", "spilling")] == [4, 4, 1, 0]
    assert run(monkeypatch, path, []) == (1, [])  # nothing is left, and the failure still told


@pytest.mark.parametrize("key", ["triton", "source", "calls"])
def test_a_record_of_something_else_is_started_anew(monkeypatch, tmp_path, capsys, key):
    path = tmp_path / "compiled.json"
    run(monkeypatch, path, [DONE, KeyboardInterrupt()])
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "other"}))
    code, called = run(monkeypatch, path, [DONE] * 4)
    assert (code, len(called)) == (0, 4)
    assert "compiled.json is of another Triton" in capsys.readouterr().out


@pytest.mark.slow
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
        for target in ("cuda:80", "hip:gfx942")
    ]
    for job, got in zip(jobs, compile_all(_compile, jobs), strict=True):
        assert got.keys() == {"confidence", "classroom"}
        assert all(kernel.spilled_bytes == 0 for kernel in got.values()), job


def _compile_squeezed(target, cut):
    """A row in fewer registers than it needs."""
    from classroomkd.kernels import launch_plan

    launch_plan.blocks = lambda *_: launch_plan.Blocks(**cut)
    return _compile({"n_classes": cut["BLOCK_C"], "n_mentors": 1, "target": target})["classroom"]


@pytest.mark.slow
def test_the_reader_sees_spills_and_narrow_loads(compile_all):
    """The counts above are only worth something if they can come out otherwise."""
    sizes = {"n_classes": 99, "n_mentors": 2, "target": "cuda:90"}
    (narrow,) = compile_all(_compile, [sizes | {"gradient": "autograd", "reduction": "none"}])
    # Rows of 99 floats: four bytes a load; besides, the target.
    assert narrow["classroom"].loads.keys() == {4, 8}
    assert narrow["classroom"].loads[8] == 1
    one_warp = {"ROWS": 1, "num_warps": 1, "V": 4}
    with ProcessPoolExecutor(2, mp_context=context()) as pool:  # they are not as they were, after
        squeezed = [
            pool.submit(
                _compile_squeezed, "cuda:90", {**one_warp, "BLOCK_C": 512, "max_registers": 32}
            ),
            pool.submit(_compile_squeezed, "hip:gfx942", {**one_warp, "BLOCK_C": 8192}),
        ]
        assert all(kernel.result().spilled_bytes > 0 for kernel in squeezed)


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
