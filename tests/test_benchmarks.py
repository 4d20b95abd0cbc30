"""The benchmark scripts run, count right, compare like with like, and say so when a row fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from classroomkd import classroom_loss

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import baselines  # noqa: E402
import loss as benchmark  # noqa: E402
import tables  # noqa: E402

CEILINGS = {"copy_gigabytes_per_second": 10.0, "gigaexponentials_per_second": 1.0}
NUMBERS = {key for _, key, _ in tables.COLUMNS} - {"device_time_by", "peak_extra_mib"}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def run(out, **environment):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "loss.py", "--small", "--out", out],
        capture_output=True,
        text=True,
        cwd=out,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "loss.json").read_text()), done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_script_on_this_machine(tmp_path):
    record, printed = run(tmp_path)
    assert record["environment"].keys() >= {"date", "device", "python", "torch", "triton"}
    assert all(value > 0 for value in record["roofline"].values())
    measured = [row for row in record["rows"] if row["status"] == "ok"]
    assert {row["implementation"] for row in measured if row["case"]} >= {
        *(benchmark.THIS, "fused_classroom_loss + backward"),
        *("eager", "compile default", "per-mentor loop"),
    }
    assert sum(not row["case"] for row in measured) == len(benchmark.grid(small=True))
    for row in measured:
        assert all(row[key] > 0 for key in NUMBERS), row
        assert row["loss_relative_error"] < 1e-4
        assert row["grad_relative_error"] < (1e-4 if row["dtype"] == "float32" else 4e-3)
    assert "per-mentor loop" in printed
    assert f"{measured[0]['device_time_us']:.2f} µs" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
def test_the_script_through_the_interpreted_kernels(tmp_path):
    record, _ = run(tmp_path, TRITON_INTERPRET="1")
    assert "interpreter" in record["environment"]["device"]
    rows = [row for row in record["rows"] if row["implementation"] == benchmark.THIS]
    assert {row["status"] for row in rows} == {"ok"}
    eager = next(row for row in record["rows"] if row["implementation"] == "eager")
    assert min(row["host_time_us"] for row in rows) > 5 * eager["host_time_us"]


@pytest.mark.parametrize(
    ("case", "n_bytes", "n_exponentials"),
    [
        # student, 6 mentors and gradient, 64 · 100 numbers of 4 bytes; 1 + 6 + 2 · 6 exponentials
        ((64, 100, 6, FLOAT32, "sample"), 8 * 25_600, 19 * 6400),
        ((64, 100, 6, BFLOAT16, "sample"), 8 * 12_800, 19 * 6400),
        # all seven once more, for the means
        ((64, 100, 6, FLOAT32, "batch"), 15 * 25_600, 19 * 6400),
        # three sweeps over both, and the gradient
        ((2, 128_256, 1, FLOAT32, "sample"), 7 * 1_026_048, 4 * 256_512),
        ((2, 128_256, 1, FLOAT32, "batch"), 7 * 1_026_048, 4 * 256_512),
        ((2, 128_256, 12, BFLOAT16, "sample"), 40 * 513_024, 37 * 256_512),
    ],
)
def test_bytes_and_exponentials_by_hand(case, n_bytes, n_exponentials):
    assert benchmark.work(benchmark.Case(*case)) == (n_bytes, n_exponentials)


def test_the_grid():
    cases = benchmark.grid(small=False)
    assert len(cases) == len(set(cases)) == 11 * 4 * 2 * 2
    assert set(benchmark.NAMED.values()) <= set(cases)
    assert len(benchmark.NAMED) == 6


@pytest.mark.parametrize("ranking", ["sample", "batch"])
def test_all_compute_the_same_loss(ranking):
    case = benchmark.Case(7, 30, 3, FLOAT32, ranking)
    ((student, mentors, targets),) = benchmark.input_sets(case, 1)
    exact = student.detach().double().requires_grad_()
    expected = classroom_loss(exact, [one.double() for one in mentors], targets, ranking=ranking)
    expected.backward()
    *truth, active = baselines.float64_loss_and_grad(
        student, mentors, targets, ranking, chunk_bytes=2 * 4 * 30 * 8
    )
    assert active.all()
    torch.testing.assert_close(truth, [expected.detach(), exact.grad], rtol=1e-12, atol=1e-15)
    for function in (baselines.per_mentor_loop, baselines.composed_loss):
        loss, grad = benchmark.differentiated(function, ranking)(student, mentors, targets)
        assert benchmark.relative_error(loss[None], truth[0][None]) < 1e-5
        assert benchmark.relative_error(grad, truth[1]) < 1e-5


def test_relative_error_in_chunks_of_rows():
    truth = torch.full((3000, 2), 2.0, dtype=torch.float64)
    value = truth.float()
    value[2999, 1] += 1.0
    assert benchmark.relative_error(value, truth) == pytest.approx(1 / (4 * 6000) ** 0.5)
    value[0, 0] = torch.nan
    assert not benchmark.relative_error(value, truth) < 1


def test_rows_that_fail_are_told_apart(monkeypatch):
    def raising(error):
        def call(*_):
            raise error

        return "graph", lambda ranking: call

    broken = RuntimeError("capture ended")
    broken.__context__ = torch.OutOfMemoryError("no more")
    eager = benchmark.differentiated(classroom_loss, "sample")
    monkeypatch.setattr(
        benchmark,
        "IMPLEMENTATIONS",
        {
            "large": raising(torch.OutOfMemoryError("no more")),
            "large in capture": raising(broken),
            "broken": raising(RuntimeError("oh")),
            "wrong": ("graph", lambda ranking: lambda *inputs: [2 * one for one in eager(*inputs)]),
            "eager": ("graph", lambda ranking: eager),
        },
    )
    case = benchmark.SMALL_NAMED["small"]

    def statuses(deadline):
        found = benchmark.rows(case, "small", benchmark.IMPLEMENTATIONS, CEILINGS, deadline)
        return {row["implementation"]: row["status"] for row in found}

    found = statuses(time.monotonic() + 60)
    assert found["large"] == found["large in capture"] == "out of memory"
    assert found["broken"] == "failed: RuntimeError('oh')"
    assert found["wrong"].startswith("failed: ArithmeticError('relative errors")
    assert found["eager"] == "ok"
    assert set(statuses(time.monotonic() - 1).values()) == {"not run: out of time"}


def test_markdown_tables():
    row = {"case": "", "implementation": benchmark.THIS, "status": "ok", "ranking": "sample"}
    row |= {"rows": 64, "classes": 100, "mentors": 6, "dtype": "float32"}
    row |= {"device_time_us": 3.456, "device_time_by": "graph", "host_time_us": 31.4}
    row |= {"gigabytes_per_second": 1234.5, "gigaexponentials_per_second": 67.8}
    row |= {"roofline_percent": 41.5, "peak_extra_mib": None}
    row |= {"loss_relative_error": 1.2e-7, "grad_relative_error": 2e-7}
    large = {key: value for key, value in row.items() if key not in NUMBERS}
    large |= {"case": "CIFAR", "implementation": "eager", "status": "out of memory"}
    about = {"device": "Some GPU", "torch": "2.6", "triton": "3.3", "date": "2026-01-01"}
    rows = [row, row | {"case": "CIFAR"}, large]
    record = {"environment": about, "roofline": CEILINGS, "rows": rows}
    text = tables.markdown(record)
    assert "| B | C | M | float32, sample |\n| --- | --- | --- | --- |" in text
    assert "| 64 | 100 | 6 | 3.46 µs, 42 % |" in text
    assert "**CIFAR: B = 64, C = 100, M = 6, float32, sample**" in text
    assert "loss_and_grad | 3.46 | graph | 31 | 1234 | 67.8 | 42 | – | 1e-07 | 2e-07 |" in text
    assert "| eager | out of memory |  |  |" in text
    assert len(tables.terminal(record)) == 2
