"""The benchmarks' lines for a GPU run, in a stand-in for one, and measure the headline sizes."""

import json
import re
import sys
from argparse import Namespace
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

import loader_processes
import loader_rows
import loaders
import loss
import loss_linear
import measure
import roofline
import step
import step_rows
import summary
from classroomkd.runs.recipe import DataConfig
from fake_cuda import CUDA, FakeCuda, HereProcess
from patience import LAST_RESORT


class HerePool:
    """A pool whose jobs are done where they are handed in."""

    def __init__(self, processes, mp_context):
        assert processes >= 1

    def submit(self, function, *arguments):
        job = Future()
        job.set_result(function(*arguments))
        return job

    def shutdown(self, cancel_futures):
        assert cancel_futures


@pytest.fixture
def cuda(monkeypatch):
    """The stand-in, found by every benchmark."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fake = FakeCuda(monkeypatch)
    for module in (measure, roofline, loss, loss_linear, step):
        monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(measure, "profile", fake.profile)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return fake


def test_roofline(cuda, monkeypatch):
    """The exponentials' kernel in its interpreter would take minutes: one program, few steps."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda x, out, BLOCK, STEPS: launched.append((grid, BLOCK, STEPS))

    monkeypatch.setattr(roofline, "exponentials_kernel", Kernel())
    found = roofline.measure()
    assert all(value > 0 for value in found.values())
    assert set(launched) == {((64,), roofline.BLOCK, roofline.STEPS)}
    assert cuda.calls["replay"] > 20
    assert cuda.calls["mem_get_info"] == 1


def test_the_loss(cuda, monkeypatch, tmp_path, capsys):
    """Every implementation by its way of timing; the headline sizes before all others."""
    cases = [loss.Case(n, 100, 6, torch.float32, r) for n in (64, 512) for r in ("sample", "batch")]
    cases += [loss.Case(4, 30, 2, torch.bfloat16, "sample")]
    ceilings = {"copy_gigabytes_per_second": 1e3, "gigaexponentials_per_second": 1e3}
    monkeypatch.setattr(loss, "grid", lambda small: cases)
    monkeypatch.setattr(loss, "NAMED", {"CIFAR": cases[0], "other": cases[-1]})
    monkeypatch.setattr(loss, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(roofline, "measure", lambda: ceilings)
    monkeypatch.setattr(loss, "not_here", lambda name: None)
    liger = "profiler", loss.partial(loss.differentiated, loss.per_mentor_loop)
    monkeypatch.setitem(loss.IMPLEMENTATIONS, "Liger KL", liger)
    monkeypatch.setattr(sys, "argv", ["loss.py", "--out", str(tmp_path)])
    written = []
    write = measure.write_json

    def counted(out, name, record):
        written.append(len(record["rows"]))
        write(out, name, record)

    monkeypatch.setattr(loss, "write_json", counted)
    assert loss.main() == 0
    record = json.loads((tmp_path / "loss.json").read_text())
    rows = record["rows"]
    assert written == list(range(1, len(rows) + 1))  # a kill would leave every row before it
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["implementation"] for row in rows if row["case"]} == {*loss.IMPLEMENTATIONS}
    ways = {row["implementation"]: row["device_time_by"] for row in rows}
    assert ways == {name: by for name, (by, _) in loss.IMPLEMENTATIONS.items()}
    own_graph = [row["peak_extra_mib"] for row in rows if row["device_time_by"] == "own graph"]
    assert {row["peak_extra_mib"] for row in rows if row["peak_extra_mib"]} == {1.0}
    assert own_graph == [None] * 2
    first = [
        summary.is_headline(row) and row["implementation"] in (loss.THIS, loss.REPORTED, "eager")
        for row in rows
    ]
    assert first == sorted(first, reverse=True)
    for name in ("CUDAGraph", "graph", "replay", "profile", "Event", "empty_cache", "synchronize"):
        assert cuda.calls[name], name
    assert loss.THIS in capsys.readouterr().out


def test_out_of_time_every_row_says_so(cuda, monkeypatch, tmp_path):
    """And nothing is compiled any more."""
    monkeypatch.setattr(loss, "ProcessPoolExecutor", None)
    monkeypatch.setattr(roofline, "measure", dict)
    monkeypatch.setattr(loss, "terminal", str)
    monkeypatch.setattr(sys, "argv", ["loss.py", "--out", str(tmp_path), "--seconds", "-1"])
    assert loss.main() == 0
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    missing = {row["status"] for row in rows}
    assert missing <= {"not run: out of time", "not installed: liger-kernel"}
    kinds = [(row["case"], *(row[key] for key in loss.size(loss.NAMED["CIFAR"]))) for row in rows]
    assert {kind[1:] for kind in kinds} == {tuple(loss.size(c).values()) for c in loss.grid(False)}


def test_the_loss_of_linear_heads(cuda, monkeypatch, tmp_path, capsys):
    """Whole sizes first, in bfloat16; Liger's place is taken by a sum of KLs."""

    def kls(batch):
        log_student = torch.log_softmax(batch.hidden @ batch.weight.T, -1)
        return sum(
            torch.nn.functional.kl_div(
                log_student, torch.softmax(h @ w.T, -1), reduction="batchmean"
            )
            for h, w in batch.mentors
        )

    monkeypatch.setattr(loss_linear, "DTYPE", torch.bfloat16)
    monkeypatch.setattr(loss_linear, "GPU_SIZES", ((32, 64, 16), (16, 128, 8)))
    monkeypatch.setattr(loss_linear, "not_here", lambda name: None)
    monkeypatch.setitem(loss_linear.IMPLEMENTATIONS, loss_linear.LIGER, kls)
    monkeypatch.setattr(sys, "argv", ["loss_linear.py", "--out", str(tmp_path)])
    assert loss_linear.main() == 0
    rows = json.loads((tmp_path / "loss_linear.json").read_text())["rows"]
    assert {(row["status"], row["dtype"]) for row in rows} == {("ok", "bfloat16")}
    assert {row["peak_extra_mib"] for row in rows} == {1.0}
    first = [(row["rows"], row["classes"], row["width"], row["mentors"]) for row in rows[:12:3]]
    assert first == [(32, 64, 16, 1), (32, 64, 16, 3), (16, 128, 8, 1), (16, 128, 8, 3)]
    assert all(
        row["difference"] < 0.02 for row in rows if row["implementation"] == loss_linear.WHOLE
    )
    for name in ("empty_cache", "synchronize", "max_memory_allocated"):
        assert cuda.calls[name], name
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path)])
    summary.main()
    assert re.search(r"16 +128 +8 +3 .* fused_linear_classroom_loss ", capsys.readouterr().out)


def test_out_of_time_every_size_of_heads_says_so(cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(loss_linear, "batch_of", None)
    monkeypatch.setattr(loss_linear, "not_here", lambda name: None)
    argv = ["loss_linear.py", "--out", str(tmp_path), "--seconds", "-1"]
    monkeypatch.setattr(sys, "argv", argv)
    assert loss_linear.main() == 0
    rows = json.loads((tmp_path / "loss_linear.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"not run: out of time"}
    assert len(rows) == 3 * len(loss_linear.sizes(small=False))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """32 images of 8×8 for a GPU."""
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    return loader_rows.Setting.of(tmp_path, loaders.random_images(32, 8), 16, 1, CUDA)


def gather(images, targets, order, table, **options):
    """The resident loader's kernel without augmentation: an image's border is black."""
    values = table[torch.arange(3), images[order].long()]
    values[:, 0] = table[:, 0]
    return values.permute(0, 3, 1, 2), targets[order]


def test_the_loaders(cuda, setting, monkeypatch):
    for module in (loaders, loader_processes):
        monkeypatch.setattr(module, "Process", HereProcess)
    monkeypatch.setattr(loaders, "KERNEL_SIZES", (8,))
    monkeypatch.setattr(loaders, "pack_beton", lambda setting: None)
    monkeypatch.setattr(loader_rows, "SHORTEST", 0.0)
    monkeypatch.setattr(loader_rows, "gc", SimpleNamespace(collect=lambda: None))  # seconds here
    monkeypatch.setattr("classroomkd.kernels.augment.gather_augment", gather)
    rows = loaders.row_names(setting)
    assert rows[:3] == [("device copy", 0), ("pinned copy", 0), ("resident", 0)]
    monkeypatch.setattr(loaders, "row_names", lambda setting: rows[:3])
    reports = []
    with cuda.on_cuda():
        record = loaders.run(setting, 2, 300.0, lambda record: reports.append(str(record)))
    assert {row["status"] for row in record["rows"]} == {"ok"}, record["rows"]
    (kernel,) = record["kernel"]
    assert kernel["status"] == "ok"
    assert kernel["images_per_second"] > 0
    assert kernel["floor_percent"] > 0
    assert "'images_per_second'" in reports[0]  # the kernel's, before all else
    assert "first_batch" not in reports[0]
    assert len(reports) == 1 + 1 + 3 + 2 * 3 + 1
    assert all(row["gpu_mib"] is not None for row in record["rows"])
    for name in ("Event", "replay", "mem_get_info", "max_memory_allocated"):
        assert cuda.calls[name], name


@pytest.mark.slow
def test_the_step(cuda, setting, monkeypatch):
    monkeypatch.setattr(loader_processes, "Process", HereProcess)
    monkeypatch.setattr(step, "CLASSROOMS", {"resnet8": ("resnet8",)})
    monkeypatch.setattr("classroomkd.kernels.augment.gather_augment", gather)
    # The kernels, interpreted, would take minutes: test_the_loss has them.
    monkeypatch.setattr("classroomkd.loss.fused._use_kernels", lambda device_type: False)
    monkeypatch.setattr(step_rows, "WARM_UP", 4)  # the fourth captures
    resident = {"data": DataConfig(loader="resident")}
    trainers = {name: options | resident for name, options in step.TRAINERS.items()}
    monkeypatch.setattr(step_rows, "TRAINERS", trainers)
    left_out = {step.LOOP, "trainer, resident loader"}  # all have that loader here
    names = [name for name in step.implementations() if name not in left_out]
    monkeypatch.setattr(step, "implementations", lambda: names)
    arguments = Namespace(
        **{
            "minutes": LAST_RESORT / 60,
            "small": False,
            "student": None,
            "batch": [16],
            "rounds": 1,
        },
        **{"seconds": 0.0, "whole": 1},
    )
    orders = []

    def report(record):
        orders.append((len(record["rows"]), len(record["whole"])))

    with cuda.on_cuda():
        record = step.run(arguments, setting, report)
    assert [row["status"] for row in record["rows"]] == ["ok"] * (len(names) + 1)
    assert {row["parts_status"] for row in record["rows"]} == {"ok"}
    for row in record["rows"]:
        assert row["gpu_mib"] == 4
        assert row["dtype"] == ("float32" if "float32" in row["implementation"] else "bfloat16")
    assert [row["epochs"] for row in record["whole"]] == [1]
    assert (len(names), 1) in orders  # whole epochs before what compiles for minutes
    assert record["rows"][-1]["implementation"] == step.COMPILED
    for name in ("CUDAGraph", "graph", "replay", "stream", "max_memory_reserved"):
        assert cuda.calls[name], name
