"""Tables of runs: planned, split into parts that fit together, run to the end, and added up."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import shutil
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from classroomkd import cli
from classroomkd.errors import UserError
from classroomkd.files import lock
from classroomkd.loss import methods
from classroomkd.models import create
from classroomkd.recipes import find
from classroomkd.report.published import PUBLISHED
from classroomkd.report.seeds import aggregate
from classroomkd.report.table_page import markdown
from classroomkd.reproduce import runner
from classroomkd.reproduce.plan import forward_flops, make_plan
from classroomkd.reproduce.status import add_seconds_waited, seconds_left
from classroomkd.reproduce.tables import TABLES, variant_names
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.store import MentorStore
from image_folders import write_classes
from patience import LAST_RESORT
from processes import COMMAND, Running

TINY = {
    "student": "resnet8",
    "mentors": ["resnet14", "resnet8"],
    "data": {"image_size": 8, "validation": 0.0},
    "training": {"epochs": 4, "batch_size": 8},
    "mentor_training": {"epochs": 8, "batch_size": 8, "learning_rate": None, "schedule": "steps"},
    "threads": 1,
}
SOME = [f"cifar100/{name}" for name in ("vgg13-vgg8", "resnet56-resnet20", "wrn_40_2-wrn_16_2")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "colours"
    write_classes(root / "train", 12)
    write_classes(root / "val", 5, seed=1)
    return root


def ids(tasks) -> list[str]:
    return [task.id for task in tasks]


whole_plan = functools.cache(make_plan)


def planned(task):
    """The recipe that the task's process will have."""
    command, option, recipe, *overrides = task.arguments
    assert (command, option) == ("mentors" if "mentors/" in task.id else "train", "--recipe")
    return load_recipe(find(recipe), overrides)


# Planning


@pytest.mark.parametrize(
    ("table", "rows", "mentors"),
    [
        ("main", 12 * 3, 12),
        ("ablation", 12, 6),
        ("methods", 13, 6),
        ("ca_mkd", 11, 6),
        ("temperature", 4, 6),
        ("peers", 4 + 8 * 3, 6),
        ("multi-teacher", 4 * 6, 8),
    ],
)
def test_the_plan_of_a_table(table, rows, mentors):
    plan = whole_plan(table)
    assert len(plan.runs) == 3 * rows
    assert len(set(ids(plan.runs))) == len(plan.runs)
    assert len(plan.mentors) == mentors
    assert len(set(ids(plan.mentors))) == mentors
    assert [run.recipe.seed for run in plan.runs] == sorted(run.recipe.seed for run in plan.runs)
    for run in plan.runs:
        assert (run.recipe.mentor_seed, run.recipe.data.split_seed) == (0, 0)
        assert not run.recipe.alone
        assert set(run.needs) <= set(ids(plan.mentors))
        assert bool(run.needs) == (run.recipe.method != "alone")
    assert {need for run in plan.runs for need in run.needs} == set(ids(plan.mentors))
    assert [task.work for task in plan.mentors] == sorted(
        (task.work for task in plan.mentors), reverse=True
    )
    for task in plan.mentors:
        assert planned(task).mentors == task.recipe.mentors
    for run in plan.runs[-1:0:-19]:
        assert planned(run) == run.recipe


def test_the_variants_towards_ca_mkd_change_one_thing():
    """From the classroom to CA-MKD's loss, or from there to the classroom."""
    losses = {
        run.id.split("/")[-2]: vars(run.recipe.loss)
        for run in whole_plan("ca_mkd", seeds=(0,)).runs
        if run.recipe.method == "classroom"
    }
    classroom = losses["classroom"]
    ca_mkd = classroom | {"knowledge_filter": "none", "mentoring": "fixed", "temperature": 4.0}
    ca_mkd |= {"weighting": "confidence", "task_weight": 1.0}
    torch.manual_seed(0)
    student, *mentors = (methods.Outputs(logits) for logits in 3 * torch.randn(4, 8, 100))
    targets = torch.randint(100, (8,))
    ours, theirs = methods.create("classroom", **ca_mkd), methods.create("ca_mkd")
    assert torch.equal(ours(student, mentors, targets), theirs(student, mentors, targets))
    one = {
        "weights": {"weighting"},
        "ranks": {"weighting"},
        "task-weight": {"task_weight"},
        "filter": {"knowledge_filter"},
        "no-filter": {"knowledge_filter"},
        "temperature": {"mentoring", "temperature"},
        "mentoring": {"mentoring", "temperature"},
    }
    assert len(losses) == 9
    for name, loss in losses.items():
        origin, _, change = name.partition("+")
        start, end = (classroom, ca_mkd) if origin == "classroom" else (ca_mkd, classroom)
        changed = one[change] if change else set()
        assert loss == start | {key: end[key] for key in changed}, name


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_a_partition(count):
    plan = whole_plan("main", seeds=(0, 1), classrooms=tuple(SOME))
    shards = [plan.shard(number, count) for number in range(1, count + 1)]
    assert sorted(run for shard in shards for run in ids(shard.runs)) == sorted(ids(plan.runs))
    again = make_plan("main", seeds=(0, 1), classrooms=SOME).shard(1, count)
    assert ids(again.runs) == ids(shards[0].runs)
    for shard in shards:
        assert {need for run in shard.runs for need in run.needs} == set(ids(shard.mentors))
        work = sum(run.work for run in shard.runs)
        total = sum(run.work for run in plan.runs)
        assert abs(work - total / count) <= max(run.work for run in plan.runs)


def test_work_is_counted_by_hand():
    # resnet8: a first convolution 3→16 on 32², then of 16, 32 and 64 channels one block each.
    convolutions = 9 * 3 * 16 * 32**2 + 2 * 9 * 16 * 16 * 32**2
    convolutions += (9 + 1) * 16 * 32 * 16**2 + 9 * 32 * 32 * 16**2
    convolutions += (9 + 1) * 32 * 64 * 8**2 + 9 * 64 * 64 * 8**2
    assert forward_flops("resnet8", 32) == 2 * (convolutions + 64 * 100)


@pytest.mark.parametrize("size", [16, 224])
@pytest.mark.parametrize("network", ["resnet8", "vgg8", "mobilenetv2", "shufflenetv1"])
def test_work_at_other_sizes_is_nearly_what_is_counted(network, size):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        create(network).eval()(torch.empty(1, 3, size, size))
    counted = counter.get_total_flops()
    assert 0.94 * counted <= forward_flops(network, size) <= 1.02 * counted


def test_work_of_other_networks_is_counted():
    in_layers = 1_814_073_344 - 512 * 1000  # torchvision gives 1.81 billion, with 1000 classes
    assert forward_flops("tv:resnet18", 224) == 2 * (in_layers + 512 * 100)
    assert forward_flops("a/b.pt", 32) == 0


def test_epochs_scale_students_and_mentors(tiny):
    values = TINY | {"mentors": [{"source": "resnet14", "epochs": 16}, "resnet8@4"]}
    values["training"] = values["training"] | {"warmup_epochs": 1}
    other = tiny.with_name("other.yaml")
    other.write_text(yaml.safe_dump(values))
    (run,) = make_plan(
        "main", classrooms=[str(other)], method_names=["classroom"], seeds=[5], epochs=2
    ).runs
    assert (run.recipe.training.epochs, run.recipe.mentor_training.epochs) == (2, 4)
    assert run.recipe.training.warmup_epochs == 0.5
    assert [(m.source, m.epochs, m.at) for m in run.recipe.mentors] == [
        ("resnet14", 8, None),
        ("resnet8", None, 2),
    ]
    assert (run.id, run.epochs) == ("runs/other/classroom/seed5", 2)


def test_peers_that_are_epochs_of_one_network(tiny):
    plan = make_plan("peers", classrooms=[str(tiny)], seeds=[0], epochs=240)
    assert ids(plan.runs) == [f"runs/tiny/{v}/seed0" for v in ("alone", "weak", "mixed", "strong")]
    (task,) = plan.mentors  # one training
    assert task.epochs == 480
    weak, mixed, strong = ([mentor.at for mentor in run.recipe.mentors] for run in plan.runs[1:])
    assert weak == [None, 4, 10, 20, 40, 80]
    assert mixed == [None, 4, 20, 80, 380, 460]
    assert strong == [None, 340, 380, 420, 440, 460]
    assert {m.at for m in task.recipe.mentors} == {*weak, *mixed, *strong}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method_names": ["kdd"]},
            "no variant or method is called 'kdd'; the table's variants are alone, kd, cl",
        ),
        ({"classrooms": ["cifar100/nothing"]}, "cifar100/nothing is neither a file nor"),
        ({"overrides": ["seed=3"]}, "leave out the override 'seed=3': use the option --seeds"),
        ({"seeds": [1, 1]}, "--seeds has a duplicate: 1 1"),
        ({"overrides": ["training.epoch=3"]}, "epoch"),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(UserError, match=message):
        make_plan("main", **options)


# Adding up


def row(variant: str, seed: int, last: float, **others) -> dict:
    values = {
        "table": "main",
        "classroom": "cifar100/resnet56-resnet20",
        "variant": variant,
        "method": variant,
        "student": "resnet20",
        "mentors": "resnet56 resnet8",
        "seed": seed,
        "epochs": 30,
        "mentor_epochs": 30,
        "data": "photos",
        "cifar100": False,
        "classes": 100,
        "train_images": 50_000,
        "validation_images": 0,
        "test_images": 5000,
        "test_digest": "a",
        "last": last,
        "best": last + 0.01,
        "chosen": None,
        "teacher_last": None if variant == "alone" else 0.6,
        "seconds": 600.0,
        "device": "NVIDIA X",
        "classroomkd": "0.1.0",
        "torch": "2.13.0",
    }
    return values | others


ROWS = [
    *(row("alone", seed, last) for seed, last in enumerate((0.50, 0.52, 0.57))),
    *(row("kd", seed, last) for seed, last in enumerate((0.51, 0.53))),
    row("classroom", 2, 0.60),
]


def test_means_and_deviations_by_hand():
    alone, kd, classroom = aggregate(ROWS)
    assert alone["seeds"] == [0, 1, 2]
    assert alone["last"] == pytest.approx([0.53, (0.0013) ** 0.5])  # (9 + 1 + 16)e-4 / 2
    assert alone["over_alone"] is None
    assert kd["best"] == pytest.approx([0.53, 0.01 * 2**0.5])
    assert kd["over_alone"] == pytest.approx([0.01, 0], abs=1e-12)
    assert classroom["last"] == (0.60, None)
    assert classroom["over_alone"] == (pytest.approx(0.03), None)
    assert classroom["over_kd"] is None  # no seed in common
    assert kd["chosen"] is None


def test_the_markdown():
    assert markdown({"groups": aggregate(ROWS), "runs": ROWS}, TABLES["main"].title) == EXPECTED


EXPECTED = """\
## Every classroom

Data: photos (100 classes, 50,000 training and 5,000 held-out images). Training: 30 epochs \
(mentors 30). Classrooms (student ← mentors): cifar100/resnet56-resnet20 (resnet20 ← resnet56 \
resnet8). Seeds: 0, 1, 2, sharing the mentors. 6 runs on NVIDIA X, with classroomkd 0.1.0 and \
torch 2.13.0, 1.0 h without training the mentors.

**Not comparable with published numbers: the data is photos, not CIFAR-100, and the epochs are \
30, not 240.**

Top-1 in percent on the held-out images (the data set's test part, or a split if it has none), \
mean ± sample standard deviation over the seeds. Columns: teacher: the first mentor after its \
last epoch; last: after the last epoch; best: the highest of any epoch, selected on the same \
images, as papers print it; over alone: last minus that of alone with the same seed, in \
percentage points; over kd: last minus that of kd with the same seed, in percentage points; time \
per run: the mean, without training the mentors.

| classroom | variant | seeds | teacher | last | best | over alone | over kd | time per run |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| cifar100/resnet56-resnet20 | alone | 3 | – | 53.00 ± 3.61 | 54.00 ± 3.61 | – | −1.00 ± 0.00 | \
10 min |
| cifar100/resnet56-resnet20 | kd | 2 | 60.00 | 52.00 ± 1.41 | 53.00 ± 1.41 | +1.00 ± 0.00 | – | \
10 min |
| cifar100/resnet56-resnet20 | classroom | 1 | 60.00 | 60.00 | 61.00 | +3.00 | – | 10 min |

| published teacher | published alone | published kd | published best |
| ---: | ---: | ---: | ---: |
| 72.34 | 69.06 | 70.66 | 73.46 |

Published: top-1 on CIFAR-100's test images after 240 epochs; teacher, alone and KD from \
RepDistiller's tables; best from NTCE-KD, which uses stronger augmentation.
"""


def test_on_cifar100_there_is_no_warning():
    rows = [row("alone", 0, 0.69, cifar100=True, epochs=240, data="cifar-100-python")]
    text = markdown({"groups": aggregate(rows), "runs": rows}, TABLES["main"].title)
    assert "Not comparable" not in text
    assert "Seed: 0. 1 run on" in text
    others = {"epochs": 1, "test_digest": "b", "validation_images": 900, "chosen": 0.6}
    rows = [row("alone", 1, 0.69, **others), *(run | {"chosen": 0.5} for run in rows)]
    text = markdown({"groups": aggregate(rows), "runs": rows}, TABLES["main"].title)
    assert "**The runs were not all measured on the same held-out images.**" in text
    assert "Training: 1 epoch (mentors 30), 240 epochs" in text
    assert "50,000 training, 900 validation and 5,000 held-out images" in text
    assert "; chosen: the epoch that is best on the validation images" in text
    assert "| chosen |" in text


def test_several_classrooms_stand_in_lines_of_one_table():
    other = [
        row("kd", 0, 0.4, classroom="own", student="resnet8", teacher_last=0.7),
        row("fancy", 0, 0.45, classroom="own", student="resnet8", teacher_last=0.7),
    ]
    rows = ROWS + other
    lines = markdown({"groups": aggregate(rows), "runs": rows}, TABLES["main"].title).splitlines()
    (head,) = [number for number, line in enumerate(lines) if "| teacher | alone | kd" in line]
    assert [cell.strip() for cell in lines[head].strip("|").split("|")] == [
        *("", "teacher", "alone", "kd", "classroom", "fancy", "published teacher"),
        *("published alone", "published kd", "published best"),
    ]
    assert lines[head + 1] == "| --- |" + " ---: |" * 9
    assert lines[head + 2] == (
        "| cifar100/resnet56-resnet20 | 60.00 | 53.00 ± 3.61 | 52.00 ± 1.41 | 60.00 | – "
        "| 72.34 | 69.06 | 70.66 | 73.46 |"
    )
    assert lines[head + 3] == "| own | 70.00 | – | 40.00 | – | 45.00 | – | – | – | – |"


def test_more_variants_than_a_page_is_wide_are_lines():
    variants = ["alone", "classroom", *(f"T{number}" for number in range(8))]
    rows = [
        row(variant, 0, 0.5 + 0.01 * place, classroom=classroom, student="resnet8")
        for classroom in ("one", "two")
        for place, variant in enumerate(variants)
    ]
    text = markdown({"groups": aggregate(rows), "runs": rows}, TABLES["temperature"].title)
    lines = text[text.index("|  | one | two |") :].splitlines()
    assert lines[1:4] == [
        "| --- | ---: | ---: |",
        "| teacher | 60.00 | 60.00 |",
        "| alone | 50.00 | 50.00 |",
    ]
    assert lines[12] == "| T7 | 59.00 | 59.00 |"


def test_published_numbers_are_those_of_recipes():
    main = {tuple(name.split("/")[1].split("-")) for name in TABLES["main"].rows}
    assert set(PUBLISHED) == main - {("resnet110", "resnet20")}
    for numbers in PUBLISHED.values():
        assert numbers.alone < numbers.kd < numbers.best


def test_the_loss_given_for_all_rows_is_of_those_that_have_it(tiny):
    plan = make_plan(
        "main",
        classrooms=[str(tiny)],
        method_names=["kd", "classroom"],
        seeds=[0],
        overrides=["loss.temperature=7"],
    )
    kd, classroom = plan.runs
    assert "loss.temperature=7" not in kd.arguments
    assert "loss.temperature=7" in classroom.arguments
    assert classroom.recipe.loss.temperature == 7


def test_the_estimate(tmp_path, tiny):
    plan = make_plan("main", classrooms=[str(tiny)], method_names=["alone", "kd"], seeds=[0])
    alone, kd = plan.runs
    (mentor,) = plan.mentors
    assert seconds_left(plan, tmp_path, 1) is None
    folder = tmp_path / alone.id
    folder.mkdir(parents=True)
    line = json.dumps({"phase": "alone", "seconds": 10.0}) + "\n"
    (folder / "metrics.jsonl").write_text(line * 2)
    rate = 20 / (alone.work / 2)
    expected = rate * (alone.work / 2 + kd.work + mentor.work)
    assert seconds_left(plan, tmp_path, 1) == pytest.approx(expected)
    assert seconds_left(plan, tmp_path, 4) == pytest.approx(expected / 4)
    (folder / "metrics.jsonl").write_text(line * 4)
    (folder / "summary.json").touch()
    left = 10 * (kd.work + mentor.work) / (alone.work / 4)
    assert seconds_left(plan, tmp_path, 1) == pytest.approx(left)
    # Processes that have ended count as long as they took, with their starts.
    (tmp_path / "logs" / alone.id).parent.mkdir(parents=True)
    for seconds in (20.0, 60.0):
        add_seconds_waited(alone, tmp_path, seconds)
    assert seconds_left(plan, tmp_path, 1) == pytest.approx(2 * left)
    add_seconds_waited(alone, tmp_path / "nosuch", 1.0)  # as on a full disk: not worth stopping


# Running


def arguments(tiny: Path, data: Path, out: Path, *others: str) -> list[str]:
    given = ["--classrooms", str(tiny), "--data", str(data), "--out", str(out)]
    return ["reproduce", "main", *given, "--devices", "cpu", "cpu", *others]


class Here:
    """In the place of a process: the command runs in this one, its output in the same file."""

    def __init__(self, command, stdout, **_):
        with open(stdout.name, "a") as output, redirect_stdout(output), redirect_stderr(output):
            self.code = cli.main(command[3:])

    def poll(self):
        return self.code


@pytest.fixture
def in_this_process(monkeypatch):
    """Tasks run here one after another; the interruption below has processes side by side."""
    monkeypatch.setattr(runner.subprocess, "Popen", Here)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_two_shards_and_their_table(tiny, data, tmp_path, capsys):
    outs = [tmp_path / "first", tmp_path / "second"]
    two = ("--methods", "alone", "kd", "--seeds", "0", "1", "--epochs", "1")
    for number, out in enumerate(outs, 1):
        assert cli.main(arguments(tiny, data, out, *two, "--shard", f"{number}/2")) == 0
    shares = [{p.parent for p in out.rglob("runs/**/summary.json")} for out in outs]
    assert all(shares)
    assert sum(map(len, shares)) == 4
    shutil.copytree(outs[1] / "runs", outs[0] / "runs", dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in outs[0].rglob("summary.json")}
    capsys.readouterr()
    assert cli.main(arguments(tiny, data, outs[0], *two)) == 0
    assert "0 of 4 runs left" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in outs[0].rglob("summary.json")} == before
    results = json.loads((outs[0] / "results.json").read_bytes())
    assert [(run["variant"], run["seed"]) for run in results["runs"]] == [
        (variant, seed) for variant in ("alone", "kd") for seed in (0, 1)
    ]
    for run in results["runs"]:
        summary = json.loads(
            (outs[0] / f"runs/tiny/{run['variant']}/seed{run['seed']}/summary.json").read_bytes()
        )
        own = summary["results"][-1]
        assert (run["last"], run["best"]) == (own["top1"], own["best_test_top1"])
        assert (run["method"], run["epochs"], run["mentor_epochs"]) == (run["variant"], 1, 2)
        assert (run["data"], run["cifar100"], run["test_images"]) == ("colours", False, 15)
    teachers = {run["teacher_last"] for run in results["runs"] if run["variant"] != "alone"}
    assert len(teachers) == 1  # the seeds share it
    with (outs[0] / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(line["last"]) for line in table] == [run["last"] for run in results["runs"]]
    assert (outs[0] / "tables" / "main.md").read_text() == markdown(results, TABLES["main"].title)
    assert "</svg>" in (outs[0] / "tables" / "main.html").read_text()
    with (outs[0] / "tables" / "main" / "plot-0.csv").open(newline="") as file:
        drawn = [(line["variant"], int(line["seed"])) for line in csv.DictReader(file)]
    assert drawn == [(run["variant"], run["seed"]) for run in results["runs"]]
    assert r"\toprule" in (outs[0] / "tables" / "main" / "results.tex").read_text()

    # Another recipe does not go on with these runs, and other methods stand beside them.
    assert cli.main(arguments(tiny, data, outs[0], *two, "training.momentum=0.8")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{outs[0]}/runs/tiny/alone/seed0 was started with training.momentum 0.9" in line


class Finishing:
    """In the place of a process: done at once, and noted."""

    started: ClassVar[list[tuple[list[str], str | None]]] = []

    def __init__(self, command, env, **_):
        self.started.append((command[3:], env.get("CUDA_VISIBLE_DEVICES")))
        folder = Path(command[-1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").touch()

    def poll(self):
        return 0


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr(runner.subprocess, "Popen", Finishing)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)
    Finishing.started.clear()
    return Finishing.started


def test_order_and_devices(tiny, tmp_path, started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    plan = make_plan("main", classrooms=[str(tiny)], seeds=[0, 1])
    begun = tmp_path / plan.runs[0].id
    begun.mkdir(parents=True)
    (begun / "config.yaml").touch()
    (tmp_path / plan.runs[1].id / "mentors").mkdir(parents=True)  # killed at its start
    runner.Runner(plan, tmp_path, ["cuda:1", "cuda"], Console(quiet=True)).run()
    (first, *_), (second, *_) = (command for command, _ in started[:2])
    assert (first, second) == ("mentors", "mentors")
    assert "resnet14" in started[0][0][-1]  # it takes longer
    assert {visible for _, visible in started} == {"7", "4,7"}
    assert ["train", "--resume", str(begun)] in [command for command, _ in started]
    others = [command for command, _ in started if "--resume" not in command]
    assert all("device=cuda" in command for command in others)
    ends = [Path(command[-1]).relative_to(tmp_path).as_posix() for command, _ in started]
    assert ends == ids([*plan.mentors, *plan.runs])
    assert not (tmp_path / plan.runs[1].id / "mentors").exists()


def test_runs_of_other_processes_are_left_to_them(tiny, tmp_path, started, capsys):
    plan = make_plan("main", classrooms=[str(tiny)], seeds=[0], method_names=["alone", "kd"])
    folder = tmp_path / plan.runs[0].id
    folder.mkdir(parents=True)
    theirs = lock(folder / "config.yaml")
    runner.Runner(plan, tmp_path, ["cpu"], Console(width=500)).run()
    theirs.release()
    assert f"another process is running {plan.runs[0].id}" in capsys.readouterr().out
    assert len(started) == 2  # the mentor and kd


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_fails(tiny, data, tmp_path, capsys):
    """Its output is shown, what needs it is left out, and the others are run."""
    options = ("--seeds", "0", "--epochs", "1", "--methods", "alone", "kd")
    noted = tmp_path / "logs/runs/tiny/alone/seed0.seconds"  # of a run folder that is gone
    noted.parent.mkdir(parents=True)
    noted.write_text("9000")
    diverging = "mentor_training.learning_rate=1e30"
    assert cli.main(arguments(tiny, data, tmp_path, *options, diverging)) == 1
    text = capsys.readouterr().out
    assert "is not finite" in text or "its loss on the test images is" in text
    assert "skipped: runs/tiny/kd/seed0, which needs mentors/resnet14-" in text
    (seconds,) = re.findall("done: runs/tiny/alone/seed0, ([0-9]+) s", text)
    assert int(seconds) < 9000
    results = json.loads((tmp_path / "results.json").read_bytes())
    assert [run["variant"] for run in results["runs"]] == ["alone"]


@pytest.mark.slow
def test_an_interruption_and_its_continuation(tiny, data, tmp_path, monkeypatch):
    """Two real processes side by side, and Ctrl-C; ``test_resume.py`` has both signals."""
    command = arguments(
        *(tiny, data, tmp_path, "--seeds", "0", "1", "--epochs", "25", "--methods", "alone")
    )
    begun = Running(COMMAND, *command)
    records = [tmp_path / f"runs/tiny/alone/seed{seed}/metrics.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + LAST_RESORT
    while not all(path.exists() and path.read_bytes().count(b"\n") > 1 for path in records):
        assert begun.running, begun.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(begun.pid).children(recursive=True)
    os.kill(begun.pid, signal.SIGINT)
    errors = begun.wait().stderr
    assert begun.returncode == 128 + signal.SIGINT
    assert f"all runs are kept in {tmp_path}: the same command resumes" in errors
    at_work = [child for child in children if child.is_running()]
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in at_work)  # init reaps them
    before = [path.read_text().splitlines() for path in records]
    assert all(1 < len(lines) < 25 for lines in before)
    assert not list(tmp_path.rglob("summary.json"))
    noted = [float(path.read_text()) for path in tmp_path.rglob("*.seconds")]
    assert len(noted) == 2
    assert min(noted) > 0
    monkeypatch.setattr(runner.subprocess, "Popen", Here)
    assert cli.main(command) == 0
    for path, lines in zip(records, before, strict=True):
        assert path.read_text().splitlines()[: len(lines)] == lines  # with their seconds
        assert (path.parent / "summary.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "--shard must be like 1/4"),
        (["--devices", "cpu", "tpu"], "there is no device 'tpu'"),
        (["--devices", "cuda:99"], "there is no device 'cuda:99'"),
        ([], "--data is required"),
    ],
)
def test_mistakes_are_told_in_a_line(options, message, tiny, tmp_path, capsys):
    given = ["reproduce", "main", "--classrooms", str(tiny), "--out", str(tmp_path / "out")]
    assert cli.main([*given, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_plan_runs_nothing(tiny, tmp_path, capsys):
    given = ["reproduce", "ablation", "--classrooms", str(tiny), "--out", str(tmp_path / "out")]
    assert cli.main([*given, "--plan"]) == 0
    text = capsys.readouterr().out
    assert "36 of 36 runs left, before them 2 of 2 trainings of mentors" in text
    assert "tiny/mentoring-dtkd" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_this_process")
def test_mentors_side_by_side(tiny, data, store, tmp_path, capsys, monkeypatch):
    """Each network by a task of its own, found afterwards by a run that wants them all."""
    wanted = "mentors=[resnet14,resnet8@2,resnet8,{source: resnet8, epochs: 2}]"
    options = ["--recipe", str(tiny), "--data", str(data), "--loader", "resident", wanted]
    options.append("mentor_training.epochs=3")
    side = [*options, "--at-once", "2", "--out", str(tmp_path / "side")]
    assert cli.main(["mentors", *side]) == 0, capsys.readouterr()
    done, *others, last = capsys.readouterr().out.splitlines()
    assert re.match("done: mentors/resnet(8|14)-", done)
    assert (len(others), last) == (1, f"the mentors are in {store}")
    assert len(list(store.glob("*.safetensors"))) == 4
    # Where no folder was asked for, none is left; what was in the store is not called done.
    monkeypatch.chdir(tmp_path)
    assert cli.main(["mentors", *options, "--at-once", "2"]) == 0
    assert not (tmp_path / "runs").exists()
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("from the store: mentors/resnet")
    assert second.startswith("from the store: mentors/resnet")
    assert cli.main(["mentors", *options, "--out", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("taken from") == 4
    # Done again there is nothing left to do; with another recipe it is another's folder.
    assert cli.main(["mentors", *side]) == 0
    (store / "damaged.json").write_text("{")
    next(store.glob("*.safetensors")).write_bytes(b"")
    assert cli.main(["mentors", *side]) == 0
    assert f"not all mentors are in the store: see {tmp_path / 'side'}" in capsys.readouterr().out
    monkeypatch.setattr(MentorStore, "holds_all", lambda *_: False)
    assert cli.main(["mentors", *options, "--at-once", "2"]) == 0
    assert "not all mentors are in the store: see runs/mentors" in capsys.readouterr().out
    assert list(Path("runs/mentors").rglob("*.safetensors"))
    assert cli.main(["mentors", *side, "seed=3"]) == 2
    assert "side was started with another recipe" in capsys.readouterr().err


def test_images_that_are_not_there_are_missed_before_anything_is_run(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--classrooms", str(tiny), "--out", str(out)]
    (tmp_path / "empty").mkdir()
    assert cli.main(["reproduce", "methods", *options, "--data", str(tmp_path / "empty")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no class folders in {tmp_path / 'empty'}" in line
    assert not out.exists()


def test_the_help_names_every_variant(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for table in TABLES:
        variants = dict.fromkeys(run.id.split("/")[-2] for run in whole_plan(table).runs)
        assert variant_names(table) == list(variants)
        assert f"variants of {table}: {', '.join(variants)}" in text
