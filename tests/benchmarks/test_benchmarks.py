"""The benchmark scripts run, count right, compare like with like, and say so when a row fails."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classroomkd import classroom_loss
from classroomkd.errors import UserError
from fake_cuda import HereProcess
from ffcv_required import requires_ffcv
from patience import LAST_RESORT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

import baselines  # noqa: E402
import loader_processes  # noqa: E402
import loader_rows  # noqa: E402
import loaders  # noqa: E402
import loss as benchmark  # noqa: E402
import result_tables  # noqa: E402
import step  # noqa: E402
import step_rows  # noqa: E402

CEILINGS = {"copy_gigabytes_per_second": 10.0, "gigaexponentials_per_second": 1.0}
NUMBERS = {key for _, key, _ in result_tables.COLUMNS} - {"device_time_by", "peak_extra_mib"}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL = benchmark.Case(8, 10, 2, FLOAT32, "sample")


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run a script, whose rows have processes here: its record and what it prints.

    ``test_rows_fail_alone`` has the processes themselves. Here a collection would take a second.
    """
    monkeypatch.setattr(loader_processes, "Process", PickledHere)
    monkeypatch.setattr(loader_rows, "gc", SimpleNamespace(collect=lambda: None))
    threads = torch.get_num_threads()

    def run_it(module, *options):
        command = [module.__name__, "--out", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        status = module.main()
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads((tmp_path / f"{module.__name__}.json").read_text()), printed.out

    yield run_it
    torch.set_num_threads(threads)


def test_the_script_on_this_machine(script, monkeypatch):
    """Inductor, which takes ten seconds, compiles the definition in ``test_operator.py``."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function, mode, **how: traced(function, **how))
    record, printed = script(benchmark, "--small")
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
    of_the_grid = next(row for row in measured if not row["case"])
    assert f"{of_the_grid['device_time_us']:.2f} µs" in printed
    assert f"{measured[0]['device_time_us']:.2f}" in printed


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

    found = statuses(time.monotonic() + LAST_RESORT)
    assert found["large"] == found["large in capture"] == "out of memory"
    assert found["broken"] == "failed: RuntimeError('oh')"
    assert found["wrong"].startswith("failed: ArithmeticError('relative errors")
    assert found["eager"] == "ok"
    assert set(statuses(time.monotonic() - 1).values()) == {"not run: out of time"}


# ---------------------------------------------------------------- the loaders


class PickledHere(HereProcess):
    """What a row's process would be given is pickled, as it is for a process of its own."""

    def __init__(self, make, device, ends):
        super().__init__(pickle.loads(pickle.dumps(make)), device, ends)


def by_loader(record):
    return {(row["loader"], row["workers"]): row for row in record["rows"]}


TINY = ("--device", "cpu", "--images", 256, "--batch", 64, "--workers", 1, "--rounds")


@pytest.mark.slow
@requires_ffcv
def test_all_loaders_on_this_machine(script, monkeypatch):
    """One worker: FFCV's own operations take twice as long to compile for more."""
    monkeypatch.setattr(loader_rows, "SHORTEST", 0.0)
    record, printed = script(loaders, *TINY, 1)
    rows = by_loader(record)
    assert [name for name, _ in rows] == [
        *("bare copy", "resident", "ffcv", "torch"),
        *("FFCV's operations", "torchvision's transforms"),
    ]
    assert record["environment"].keys() >= {"date", "device", "python", "torch", "numba", "ffcv"}
    assert (record["images"], record["size"], record["batch"]) == (256, [32, 32], 64)
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["rounds"] == [row["images_per_second"]]
        assert row["first_batch"]["seconds"] > 0
        assert row["first_batch_again"]["seconds"] > 0
        assert row["gpu_mib"] is None
        assert row["host_mib"] is not None
        assert f"{row['images_per_second']:,.0f}" in printed
    stock = rows["FFCV's operations", 1]
    assert stock["first_batch_again"]["compiled"]
    assert stock["first_batch"]["seconds"] > 10 * rows["ffcv", 1]["first_batch_again"]["seconds"]
    floor = record["floors"]["bare copy"]
    assert floor["bytes_per_image"] == 32 * 32 * 3 * (1 + 4)
    assert rows["bare copy", 1]["floor_percent"] == pytest.approx(100)
    own = rows["resident", 0]
    expected = 100 * own["images_per_second"] / floor["images_per_second"]
    assert own["floor_percent"] == pytest.approx(expected)
    assert "15,360 bytes per image" in printed


def test_loaders_without_ffcv(tmp_path, script, monkeypatch):
    """The rows of what is not installed say so, and the others are there."""
    monkeypatch.setattr(loader_rows, "SHORTEST", 0.0)
    rows = loaders.row_names

    def without_our_own(setting):
        return [row for row in rows(setting) if row[0] not in ("resident", "torch")]

    monkeypatch.setattr(loaders, "row_names", without_our_own)
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("ffcv", "torchvision"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("ffcv", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})")
    monkeypatch.syspath_prepend(tmp_path)
    record, printed = script(loaders, *TINY, 2, "--size", 8, "--images", 150)
    found = by_loader(record)
    assert (record["images"], record["size"]) == (150, [8, 8])
    assert {key: row["status"] for key, row in found.items()} == {
        ("bare copy", 1): "ok",
        ("ffcv", 1): "not installed: ffcv",
        ("FFCV's operations", 1): "not installed: ffcv",
        ("torchvision's transforms", 1): "not installed: torchvision",
    }
    low, high = sorted(found["bare copy", 1]["rounds"])
    assert low < found["bare copy", 1]["images_per_second"] < high
    assert "not installed: ffcv" in printed


class Misbehaving:
    """What a row's process might serve."""

    def right(self):
        return 7

    def wrong(self):
        raise ValueError("no\nsuch batch")

    def aborting(self):
        os.abort()

    def hanging(self):
        time.sleep(LAST_RESORT)


def test_rows_fail_alone(monkeypatch):
    device = torch.device("cpu")
    processes = [
        loaders.Process(Misbehaving, device, time.monotonic() + LAST_RESORT) for _ in range(2)
    ]
    one, other = processes
    try:
        for process in processes:
            process.ready()
            held = []
            assert process.ask("right", held) == 7
            assert all(0 < n_bytes < 4e9 for n_bytes in held), held
            assert len(held) >= 1
            with pytest.raises(loaders.RowError, match=r"^failed: no such batch$"):
                process.ask("wrong")
        with pytest.raises(loaders.RowError, match=r"^failed: its process ended with status -6$"):
            one.ask("aborting")
        monkeypatch.setattr(loader_processes, "LONGEST", 0.2)
        with pytest.raises(loaders.RowError, match=r"^failed: no answer in 0.2 s$"):
            other.ask("hanging")
        other.ends = time.monotonic()
        with pytest.raises(loaders.RowError, match=r"^not run: out of time$"):
            other.ask("right")
    finally:
        begin = time.monotonic()
        for process in processes:
            process.stop()
    assert time.monotonic() - begin < LAST_RESORT / 2  # the hanging one was not waited for


def test_shares_of_the_floors(tmp_path):
    """On the GPU the resident loader is bound by its memory, the others by the bus."""
    image_bytes = 32 * 32 * 3
    half = (0.5, 0.5, 0.5)
    gpu = torch.device("cuda")
    setting = loaders.Setting(tmp_path, 50_000, (32, 32, 3), 512, 2, gpu, half, half)
    assert setting.dtype == torch.bfloat16
    rates = {"device copy": 1000.0, "pinned copy": 100.0, "resident": 400.0, "torch": 25.0}
    rows = [loaders.LoaderRow(setting, name, 0).record for name in rates]
    for row, rate in zip(rows, rates.values(), strict=True):
        row |= {"status": "ok", "images_per_second": rate}
    rows.append(loaders.LoaderRow(setting, "ffcv", 1).record | {"status": "failed: oh"})
    found = loaders.floors(setting, rows)
    assert found["device copy"]["bytes_per_image"] == image_bytes + 2 * image_bytes
    assert found["pinned copy"]["bytes_per_image"] == 2 * image_bytes
    assert found["pinned copy"]["gigabytes_per_second"] == 100 * 2 * image_bytes / 1e9
    assert [row["floor_percent"] for row in rows[:4]] == pytest.approx([100, 100, 40, 25])
    assert rows[4]["floor_percent"] is None


def test_a_row_of_the_kernel(device, monkeypatch, tmp_path):
    class Process(loaders.Kernel):
        """Its work, in this process."""

        def __new__(cls, make, *_):
            kernel = make()
            kernel.ready = kernel.stop = lambda: None
            kernel.ask = lambda method: getattr(kernel, method)()
            return kernel

    def timed(call, sets):
        images, targets = call(*sets[-1])
        assert (images.shape, len(targets)) == ((16, 3, 20, 20), 16)
        assert images.dtype == setting.dtype
        return 2e-6

    def raising(call, sets):
        raise loaders.RowError("oh")  # as its process reports what is raised there

    half = (0.5, 0.5, 0.5)
    setting = loaders.Setting(tmp_path, 1000, (32, 32, 3), 16, 1, device, half, half)
    monkeypatch.setattr(loaders, "Process", Process)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 1200 * 100, 0))
    for name in ("host_time", "graph_time"):
        monkeypatch.setattr(loader_rows, name, timed)
    n_bytes = 3 * 20 * 20 * (1 + setting.dtype.itemsize)
    floor = {"device copy": {"gigabytes_per_second": 16e-3 * n_bytes}}
    row = loaders.kernel_row(setting, 20, time.monotonic() + LAST_RESORT)
    loaders.kernel_share(setting, row, floor)
    assert row.pop("images_per_second") == pytest.approx(8e6)
    assert row.pop("floor_percent") == pytest.approx(50)
    assert [row.pop(key) for key in ("host_us", "graph_us")] == pytest.approx([2.0] * 2)
    assert row == {"size": 20, "batch": 16, "status": "ok", "images": 96}

    monkeypatch.setattr(loader_rows, "graph_time", raising)
    row = loaders.kernel_row(setting, 20, time.monotonic() + LAST_RESORT)
    loaders.kernel_share(setting, row, floor)
    assert row == {"size": 20, "batch": 16, "status": "oh"}
    assert loaders.kernel_row(setting, 20, 0)["status"] == "not run: out of time"


# ---------------------------------------------------------------- the whole step


def test_the_step_on_this_machine(script, monkeypatch):
    monkeypatch.setenv("CLASSROOMKD_CACHE", "")  # which the script sets
    options = "--small --images 128 --size 8 --batch 32 --rounds 1 --seconds 0.2 --workers 1"
    record, printed = script(step, *options.split())
    rows = {row["implementation"]: row for row in record["rows"]}
    assert rows.keys() >= {step.THIS, step.CACHED, step.LOOP}
    for row in rows.values():
        assert (row["status"], row["parts_status"]) == ("ok", "ok"), row
        assert (row["classroom"], row["batch"]) == ("resnet8 ← resnet14 resnet8", 32)
        assert (row["images"], row["size"]) == (128, [8, 8])
        assert row["rounds"] == [row["images_per_second"]]
        minutes = 240 * 50_000 / row["images_per_second"] / 60
        assert row["projected_minutes"] == pytest.approx(minutes)
        parts = row["parts_ms"]
        assert all(parts[part] > 0 for part in (*step_rows.PARTS[:-1], step_rows.REST))
        networks = sum(parts[part] for part in step_rows.NETWORKS)
        if row["implementation"] == step.CACHED:  # whose mentors are read, not run
            networks -= parts[step_rows.MENTORS]
        share = 100 * (1 - networks / sum(parts.values()))
        assert row["outside_networks_percent"] == pytest.approx(share)
        assert row["host_mib"] is not None
        assert f"{row['images_per_second']:,.0f}" in printed
    loop = rows[step.LOOP]["images_per_second"]
    times = rows[step.THIS]["images_per_second"] / loop
    assert rows[step.THIS]["times_the_loop"] == pytest.approx(times)
    assert rows[step.LOOP]["loader"] == "torchvision"


def test_a_step_record_keeps_other_classrooms(tmp_path):
    machine = {"device": "cpu", "torch": "2.13", "date": "yesterday", "load_average": 0.5}
    rows = [{"classroom": name, "batch": 64, "status": name} for name in ("a", "b")]
    earlier = {"environment": machine, "rows": rows, "whole": rows[1:]}
    now = {"environment": machine | {"date": "today"}, "rows": [{"classroom": "a", "batch": 64}]}
    assert step.kept_rows(tmp_path, now) == {"rows": [], "whole": []}
    (tmp_path / "step.json").write_text(json.dumps(earlier))
    assert step.kept_rows(tmp_path, now) == {"rows": rows[1:], "whole": rows[1:]}
    now["rows"][0]["batch"] = 256
    assert step.kept_rows(tmp_path, now)["rows"] == rows
    now["environment"]["torch"] = "2.14"
    assert step.kept_rows(tmp_path, now) == {"rows": [], "whole": []}


STEP_CASE = step_rows.StepCase("resnet8", ("resnet14", "resnet8"), 32)


@pytest.fixture
def step_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    image_set = loaders.random_images(128, 8)
    return loaders.Setting.of(tmp_path, image_set, 32, 1, torch.device("cpu"))


def test_trainer_and_loop_take_the_same_step(step_setting):
    ours = step_rows.OurLoop(step_setting, STEP_CASE, step_rows.TRAINERS[step.THIS])
    loop = step_rows.StraightforwardLoop(step_setting, STEP_CASE)
    # In float64: in float32 the rounding of the processor decides on which side of 0 a ReLU falls.
    for network in (ours.trainer.network, loop._network, *loop._mentors):
        network.double()
    before = [parameter.clone() for parameter in loop._network.parameters()]
    rng = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(32, 3, 8, 8, generator=rng, dtype=torch.float64)
        targets = torch.randint(100, (32,), generator=rng)
        ours.trainer.network.train()
        loop._network.train()
        ours.trainer._step(images, targets)
        mean_loss, hits = loop.step(images, targets)
    seen, sick, total_loss, all_hits = ours.trainer.sums[:4].tolist()
    assert (seen, sick) == (64, 0)
    assert 0 <= all_hits - hits <= 32
    assert total_loss / 32 > mean_loss > 0
    # Some mentors teach and some do not, as random networks' logits are of ordinary size.
    active = ours.trainer.sums[6:8] / 64
    assert ((active > 0.05) & (active < 0.95)).all()
    pairs = zip(before, ours.trainer.network.parameters(), loop._network.parameters(), strict=True)
    for first, own, other in pairs:
        moved = (other - first).norm().item()
        assert moved > 0
        assert (own - other).norm().item() < 1e-3 * moved


def test_rounds_begin_with_an_epoch(step_setting):
    running = step_rows.RunningStep(step_setting, STEP_CASE, step.THIS, 0.0)
    assert running.open()["dtype"] == "float32"
    trainer = running._loop.trainer
    for expected in (4, 5):  # the warm-up took two whole epochs of four steps
        assert running.round() > 0
        assert (trainer.epoch, trainer.batch, trainer.sums[0].item()) == (expected, 0, 0)
    assert min(running.train_and_evaluate()) > 0
    assert (trainer.epoch, trainer.network.training) == (6, False)
    trainer.sums[1] = 32
    with pytest.raises(UserError, match="the loss is not finite"):
        running.round()


class ScriptedProcess:
    """Replies as its row's name says."""

    def __init__(self, make, device, ends):
        *_, case, self.name, _ = make.args
        self.connection = self
        self.rounds = iter([case.batch, 3 * case.batch, 2 * case.batch])

    def ready(self):
        pass

    close = stop = memory = ready

    def ask(self, method, memory=None):
        if memory is not None:
            memory.append(2**20)
        if self.name == "large" and method == "open":
            raise step.RowError("out of memory")
        if self.name == "breaks" and method == "parts":
            raise step.RowError("failed: oh")
        seconds = dict.fromkeys((*step_rows.PARTS[:-1], step_rows.REST, step_rows.LOADER), 1.0)
        return {
            "open": {"start_seconds": 1.0},
            "round": next(self.rounds) if method == "round" else None,
            "gpu_bytes": 2**21,
            "parts": seconds,
            "train_and_evaluate": (2.0, 1.0),
        }[method]


def test_steps_that_fail_are_told_apart(step_setting, monkeypatch):
    monkeypatch.setattr("loader_processes.Process", ScriptedProcess)
    later = time.monotonic() + LAST_RESORT

    def measured(ends):
        rows = [
            step.StepRow(step_setting, STEP_CASE, name, 1.0)
            for name in (step.THIS, "large", "breaks", step.LOOP)
        ]
        step.measure(rows, 3, ends)
        records = [row.record for row in rows]
        step.compare(records)
        return {record["implementation"]: record for record in records}

    found = measured(later)
    assert found["large"]["status"] == "out of memory"
    assert found["breaks"]["status"] == "ok"
    assert found["breaks"]["parts_status"] == "failed: oh"
    for name in (step.THIS, "breaks", step.LOOP):
        assert found[name]["images_per_second"] == 64
        assert found[name]["times_the_loop"] == 1
    assert found[step.THIS]["gpu_mib"] == 2
    assert found[step.THIS]["outside_networks_percent"] == pytest.approx(100 * 4 / 7)
    out_of_time = measured(time.monotonic() - 1).values()
    assert {record["status"] for record in out_of_time} == {"not run: out of time"}

    row = step.StepRow(step_setting, STEP_CASE, step.THIS, 1.0)
    step.whole(row, 5, later)
    assert (row.record["status"], row.record["epochs"]) == ("ok", 5)
    assert (row.record["train_seconds"], row.record["evaluation_seconds"]) == (10, 5)


def run_gpu(folder, *options, python="venv/python", **environment):
    environment = {"PYTHON": str(python), "FFCV_WHEEL": "", "DATA": ""} | environment
    return subprocess.run(
        ["bash", str(BENCHMARKS / "run_gpu.sh"), *options],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LAST_RESORT,
    )


def scripted(folder, body):
    """A Python that does what a shell script says, beside the calls that it is given."""
    python = folder / "venv" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{folder}/called\n{body}\n')
    python.chmod(0o755)
    return folder / "called"


def test_run_gpu_takes_the_readmes_python(tmp_path):
    """A path from where it is called, though the parts run elsewhere; each of them is begun."""
    called = scripted(tmp_path, 'case "$*" in *methods*) echo {} >"$6-runs"; esac')
    result = run_gpu(tmp_path, "out", "--minutes", "1", DATA=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = called.read_text()
    begun = [re.search(rf".*{part}.*", lines) for part in PARTS.values()]
    assert all(begun)
    assert [line.start() for line in begun] == sorted(line.start() for line in begun)
    assert (tmp_path / "out/log.txt").exists()
    summary = result.stdout.split("=== the headline numbers")[1]
    assert all(re.search(rf"^{part} .* passed", summary, re.MULTILINE) for part in PARTS)


PARTS = {
    "tests": "gpu_tests.py --seconds",
    "roofline": "roofline.py",
    "loss": "loss.py",
    "linear": "loss_linear.py --out",
    "loaders": "loaders.py",
    "step": "step.py",
    "reproduce": "reproduce methods",
}


def test_run_gpu_takes_parts_by_name(tmp_path):
    called = scripted(tmp_path, "")
    assert run_gpu(tmp_path, "out", "--parts", "step,roofline").returncode == 0
    lines = called.read_text()
    assert {part for part, command in PARTS.items() if command in lines} == {"step", "roofline"}
    for options, reason in (
        (("out", "--parts", "lose"), "no part 'lose'"),
        (("out", "--parts", ""), "no part is named"),
        (("out", "--parts", "reproduce"), "reproduce needs DATA=FOLDER"),
        (("out", "--minutes", "a"), "a whole number, not 'a'"),
        (("out", "--minute", "3"), "--minute"),
        ((), "usage"),
    ):
        result = run_gpu(tmp_path, *options)
        (line,) = result.stderr.splitlines()
        assert (result.returncode, result.stdout) == (2, "")
        assert reason in line


@pytest.mark.parametrize(
    ("code", "lines", "failed", "told"),
    [
        (0, ["3 of 4 noted", "2 passed, 1 skipped in 3.0s"], False, "2 passed, 1 skipped"),
        (2, ["!!!! Interrupted: out of time !!!!", "1 passed in 9s"], False, "1 passed, 1 proc"),
        (2, ["!!!! Interrupted: 1 error !!!!", "1 error in 9s"], True, "1 error"),
        (1, ["FAILED test_x.py", "1 failed in 9s"], True, "1 failed"),
        (5, [], False, ""),  # nothing in its share
        (-9, [], True, ""),
    ],
)
def test_the_gpu_tests_are_summed_up(monkeypatch, capsys, code, lines, failed, told):
    """By the last line of each process; one that is out of time has not failed."""
    import gpu_tests

    class Process:
        def __init__(self, command, stdout, stderr):
            stdout.write("\n".join(lines))

        def wait(self):
            return code

    monkeypatch.setattr(gpu_tests.torch.cuda, "is_available", lambda: False)  # one process
    monkeypatch.setattr(gpu_tests.subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py"])
    assert gpu_tests.main() == failed
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)


def test_run_gpu_says_what_it_left_out(tmp_path):
    """A package that is not there is no failure, but for numba, pytest and its own modules, with
    which it measures; what comes after is run.
    """
    absent = "ModuleNotFoundError: No module named"
    scripted(
        tmp_path,
        f"""case "$*" in
        *step.py*) echo "{absent} 'omegaconf'" >&2; exit 1;;
        *loaders.py*) echo "{absent} 'measure'" >&2; exit 1;;
        *loss.py*) echo "{absent} 'numba'" >&2; exit 1;;
        *gpu_tests.py*) echo "No module named pytest" >&2; exit 1;;
        esac""",
    )
    result = run_gpu(tmp_path, "out", "--parts", "tests,loss,linear,loaders,step")
    assert result.returncode == 1
    summary = result.stdout.split("=== the headline numbers")[1]
    for part in ("tests", "loss", "loaders"):
        assert re.search(rf"^{part} .* failed \(1\)", summary, re.MULTILINE)
    assert re.search(r"^step .* left out: needs omegaconf", summary, re.MULTILINE)
    assert re.search(r"^linear .* passed", summary, re.MULTILINE)
    assert f"{absent} 'omegaconf'" in (tmp_path / "out/log.txt").read_text()
    result = run_gpu(tmp_path, "out", "--parts", "step")
    assert result.returncode == 0


def test_run_gpu_ends_in_time(tmp_path):
    """A part that hangs is ended, the others have their share, and what was written stays."""
    scripted(
        tmp_path,
        """case "$*" in
        *roofline.py*) echo half >.roofline.json.x; echo '{"benchmark": 1}' >kept.json; sleep 9999;;
        esac""",
    )
    begin = time.monotonic()
    result = run_gpu(tmp_path, "out", "--minutes", "1", "--parts", "roofline,reproduce", DATA=".")
    assert result.returncode == 0, result.stdout
    assert time.monotonic() - begin < LAST_RESORT
    assert re.search(r"^roofline .* out of time", result.stdout, re.MULTILINE)
    assert re.search(r"^reproduce .* passed", result.stdout, re.MULTILINE)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kept.json", "log.txt"}


BARE = {"omegaconf", "rich", "hypothesis", "sklearn", "yaml", "PIL", "safetensors"}
BARE |= {"cv2", "ffcv", "lightning", "matplotlib", "psutil", "selenium"}
BARE |= {"tensorboard", "timm", "torchvision", "transformers", "liger_kernel"}


def test_run_gpu_on_a_bare_machine(tmp_path):
    """Where only torch, Triton, numpy, numba and pytest are, all but the step runs."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BARE}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
""")
    path = os.pathsep.join([str(tmp_path), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    # Hypothesis's plugin is hidden with it; where it is not installed, there is none.
    options = ["-q", "-rs", "--collect-only", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    code = f"""
import gpu_tests, loaders, loss, loss_linear, pytest, roofline, summary, sys
sys.exit(pytest.main([*{options}, *(str(gpu_tests.TESTS / name) for name in gpu_tests.ON_A_GPU)]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=LAST_RESORT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_fused_kernels.py::test_on_any_numbers" in result.stdout
    assert "test_operator.py::test_cuda_graph" in result.stdout
    assert re.search(r"test_loaders.py.*not installed: ", result.stdout)


def test_run_gpu_stops_at_once_without_what_it_needs(tmp_path):
    """In one line, and before it writes anything."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback\necho \"No module named 'torch'\"\nexit 1\n")
    python.chmod(0o755)
    for path, reason in (
        (python, "No module named 'torch'"),
        (tmp_path / "absent", "No such file"),
    ):
        result = subprocess.run(
            ["bash", str(BENCHMARKS / "run_gpu.sh"), "out"],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(path), "FFCV_WHEEL": "", "DATA": ""},
            capture_output=True,
            text=True,
            timeout=LAST_RESORT,
        )
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert f"{path} lacks what is needed: " in line
        assert reason in line
        assert line.endswith("set PYTHON to one that has it")
    assert not (tmp_path / "out").exists()
