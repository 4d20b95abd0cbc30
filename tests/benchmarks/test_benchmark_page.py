"""docs/benchmarks.md is what its command gives, and takes in a GPU's records."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest

import document
import figures
import loss
import result_tables
import step
import step_rows
import summary
from classroomkd.errors import UserError
from classroomkd.report.numbers import differences
from mentor_cache import Stored
from teaching import interval

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
MODEL = json.loads((ROOT / "benchmarks/results/modelled/model.json").read_text(encoding="utf-8"))
COMPILED = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())
H100 = {
    "device": "NVIDIA H100 80GB HBM3",
    **{"multiprocessors": 132, "memory_gib": 79.1, "l2_mib": 50.0, "cpu_threads": 16},
    **{"torch": "2.13.0", "cuda": "13.0", "triton": "3.7.1", "date": "2026-01-02T03:04:05+00:00"},
}


def test_the_page_is_what_the_command_gives():
    assert document.document(document.read(document.RESULTS), COMPILED, MODEL) == PAGE, (
        "run: python benchmarks/document.py"
    )


@pytest.mark.parametrize(
    ("path", "written", "line"),
    [
        (document.REPRODUCTION, document.reproduction, ""),
        (document.TEACHING, document.teaching, ""),
        (document.MENTOR_CHECK, document.checked, "| NaN in a weight | 25 | 25 | 25 |"),
        (document.MENTOR_CACHE, document.cached, "| float16 | 50 % |"),
    ],
)
def test_tables_in_other_pages_are_what_the_command_gives(path, written, line):
    text = path.read_text(encoding="utf-8")
    assert document.MARK in text
    assert written(text, document.read(document.RESULTS)) == text
    assert line in text


def test_what_the_page_says_of_the_mentor_cache_holds():
    cpu = document.read(document.RESULTS)["cpu"]
    small = [run for run in cpu["reproduction-methods"]["runs"] if run["classroom"] == "small-100"]
    known = {
        variant: {run["seed"]: run["last"] for run in small if run["variant"] == variant}
        for variant in ("alone", "classroom")
    }
    found = {}
    for row in cpu["mentor_cache"]["rows"]:
        way = Stored(*(row[key] for key in Stored._fields))
        found.setdefault(way, {})[row["seed"]] = row["top1"]
    assert found[Stored(5)] == known["classroom"]  # the same students
    for way, top1 in found.items():
        lost = differences(found[Stored(way.epochs)], top1)
        if way.top:
            assert min(lost) > 0.01
            assert way.top == 25 or max(differences(top1, known["alone"])) < 0
        elif way != Stored(way.epochs):
            middle, half = interval(lost)
            assert (abs(middle) < half) == (way.repeat != 30)


def test_figures_are_what_the_command_gives():
    pytest.importorskip("matplotlib")
    pinned = re.findall(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned != [importlib.metadata.version("matplotlib")]:
        pytest.skip("another matplotlib may draw otherwise")
    for device, records in document.read(document.RESULTS).items():
        for name, record in records.items():
            for file, drawing in figures.drawings(device, name, record).items():
                assert drawing.svg() == (ROOT / "docs/figures" / file).read_bytes(), file


def test_without_a_gpu_the_page_says_so():
    assert "**Nothing has been measured on a GPU yet.**" in document.document({}, COMPILED, MODEL)


# ---------------------------------------------------------------- a GPU


def loss_rows(case, title, names, monkeypatch, times):
    """Rows as the benchmark writes them, of times made up."""

    def measure(case, name, *_):
        if isinstance(times[name], Exception):
            raise times[name]
        device, host = times[name]
        return {
            **{"device_time_us": device, "device_time_by": "graph", "host_time_us": host},
            **{"gigabytes_per_second": 1.0, "gigaexponentials_per_second": 1.0},
            "roofline_percent": 80.0 if case.n_mentors > 1 else 76.0,
            "peak_extra_mib": case.n_rows * case.n_classes * case.dtype.itemsize / 2**20,
            **{"loss_relative_error": 1e-7, "grad_relative_error": 1e-7},
        }

    monkeypatch.setattr(loss, "_prepare", lambda case: ([], []))
    monkeypatch.setattr(loss, "measure", measure)
    monkeypatch.setattr(loss, "not_here", lambda name: None)
    return list(loss.rows(case, title, names, {}, float("inf")))


TIMES = {
    loss.THIS: (4.0, 31.0),
    loss.REPORTED: (4.25, 33.0),
    "fused_classroom_loss + backward": (6.0, 60.0),
    "eager": (64.0, 200.0),
    "compile default": (12.0, 100.0),
    "per-mentor loop": (90.0, 2000.0),
    "Liger KL": (40.0, 400.0),
    "compile reduce-overhead": (10.0, 100.0),
    "compile max-autotune": RuntimeError("a | b\nc"),
}


@pytest.fixture
def gpu_records(monkeypatch):
    rows = [
        row
        for phase in loss.phases(small=False)
        for case, title, names in phase
        for row in loss_rows(case, title, names, monkeypatch, TIMES)
    ]
    ceilings = {"copy_gigabytes_per_second": 2900.0, "gigaexponentials_per_second": 3600.0}
    common = {"environment": H100, "roofline": ceilings}

    loaders = json.loads((ROOT / "benchmarks/results/cpu/loaders.json").read_text())
    kernel = {"size": 32, "batch": 512, "status": "ok", "images": 50_000, "graph_us": 8.0}
    kernel |= {"host_us": 30.0, "floor_percent": 30}
    kernel |= {"images_per_second": 64e6}
    loaders |= {"environment": loaders["environment"] | H100, "kernel": [kernel]}

    parts = dict.fromkeys((*step_rows.PARTS[:-1], step_rows.REST, step_rows.LOADER), 0.1)
    steps = []
    for student, mentors in step.CLASSROOMS.items():
        case = step_rows.StepCase(student, mentors, 64)
        for name in (*step_rows.TRAINERS, step_rows.LOOP):
            row = {"classroom": case.classroom, "batch": 64, "implementation": name}
            row |= {"status": "ok", "rounds": [800.0], "images_per_second": 800.0}
            row |= {"projected_minutes": 7.5, "times_the_loop": 16.0, "start_seconds": 1.0}
            row |= {"parts_status": "ok", "parts_ms": parts, "outside_networks_percent": 12.0}
            row |= {"images": 50_000, "size": [32, 32]}
            steps.append(row | {"loader": "ffcv", "dtype": "bfloat16"})
    whole = {key: steps[0][key] for key in ("classroom", "batch", "status", "images", "size")}
    whole |= {"epochs": 5, "train_seconds": 8.0, "evaluation_seconds": 0.5}
    return {
        "roofline": {"benchmark": "roofline"} | common,
        "loss": {"benchmark": "loss", "rows": rows} | common,
        "loaders": loaders,
        "step": {"benchmark": "step", "rows": steps} | {"environment": H100, "whole": [whole]},
        "reproduction-methods": {"table": "methods", "groups": [], "runs": []},
    }


def test_compiled_kernels_that_failed_or_spill_are_listed():
    kernel = {"registers": 40, "spilled_bytes": 0}
    call = {"target": "cuda:90", "n_classes": 10, "n_mentors": 2, "dtype": "float32"}
    compiled = {"triton": "3.7.1", "calls": 4, "done": 3, "failed": 1, "spilling": 1}
    compiled["compiled"] = [
        call | {"kernels": {"confidence": kernel, "classroom": kernel | {"registers": 99}}},
        call | {"n_mentors": 6, "kernels": {"classroom": kernel | {"spilled_bytes": 24}}},
        call | {"target": "cuda:80", "error": "PassManager::run failed\nat line 7"},
    ]
    text = document.document({}, compiled, MODEL).partition("## Compiled kernels")[2]
    assert "3 kernels of 3 calls" in text
    assert "one of 4 calls, of which these are the 3 quickest to compile. 1 failed" in text
    assert "| cuda:90 | 99 | 40 |" in text
    assert "| cuda:80 | 10 | 2 | float32 | PassManager::run failed |" in text
    assert "2 kernels spill no registers; these do:" in text
    assert "| cuda:90 | classroom | 10 | 6 | float32 | 24 |" in text
    compiled |= {"done": 4, "failed": 0, "compiled": compiled["compiled"][:1]}
    text = document.document({}, compiled, MODEL)
    assert "occurs in one of 4 calls. None failed" in text
    assert "No kernel spills registers." in text


def test_a_gpus_records_fill_their_places(gpu_records):
    cpu = document.read(document.RESULTS)["cpu"]
    text = document.document({"h100": gpu_records, "cpu": cpu}, COMPILED, MODEL)
    assert "Nothing has been measured on a GPU" not in text
    for name in ("roofline", "loss", "loaders", "step"):
        assert result_tables.markdown(gpu_records[name]).strip() in text
    assert "NVIDIA H100 80GB HBM3, 132 multiprocessors, 79.1 GiB, 50.0 MiB of L2 cache" in text
    assert "2900 GB/s copied, 3600 Gexp/s." in text
    assert text.index("## h100") < text.index("## cpu")
    assert "\n### Reproduction: Methods\n" in text
    page = document.reproduction(f"# Title\n\n{document.MARK}\nold", {"h100": gpu_records})
    assert page.startswith(f"# Title\n\n{document.MARK}\n\n## Methods\n")
    assert "h100/reproduction-methods.json" in page
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines() if "|  |" not in line}) == 1


def test_what_is_modelled_stands_beside_what_was_measured(gpu_records):
    without = document.document({}, COMPILED, MODEL).partition("## Modelled, not measured\n")[2]
    text = document.document({"h100": gpu_records}, COMPILED, MODEL)
    text = text.partition("## Modelled, not measured\n")[2].partition("\n## ")[0]
    row = next(r for r in MODEL["rows"] if r["classes"] == 100 and r["mentors"] == 6)
    case = rf"\| {row['rows']} \| 100 \| 6 \| {row['dtype']} \| [\d.]+ \| "
    assert re.search(case + r"4 \| – ", text)
    assert re.search(case + r"– \| – ", without)
    other = {**gpu_records["loss"], "environment": H100 | {"device": "NVIDIA A100"}}
    assert document.document({"a": {"loss": other}}, COMPILED, MODEL).endswith(without)


def test_the_summary_after_a_gpu_run(gpu_records, tmp_path, monkeypatch, capsys):
    for name in ("loss", "loaders", "step"):
        (tmp_path / f"{name}.json").write_text(json.dumps(gpu_records[name]))
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path)])
    summary.main()
    lines = capsys.readouterr().out.splitlines()
    loss = "B 64, C 100, M 6, float32: 4.00 µs (4.25 with the report), 80 % of the roofline"
    assert f"{'loss':12}{loss}" in lines
    (cifar,) = (line for line in lines if line.endswith("[CIFAR]"))
    assert "16.0× eager, 2.5× best torch.compile" in cifar
    assert any("compile max-autotune: failed: RuntimeError" in line for line in lines)
    assert any(re.match(r"loaders +32×32 .* 64,000,000 .* ok$", line) for line in lines)
    assert any(re.match(r"step +64 +trainer .* 800 .* 16\.0 ", line) for line in lines)


@pytest.mark.parametrize(
    ("name", "files", "texts"),
    [
        (
            "loss",
            ["h100-loss.svg", "h100-implementations.svg"],
            ["device time of one call, µs", "share of the roofline, %", "M = 12, ranked by batch"],
        ),
        ("loaders", ["h100-loaders.svg"], ["images/s", "ffcv, 2", "513,859"]),
        ("step", ["h100-step.svg"], ["trainer, compiled", "0.70 ms", "next, %"]),
        ("roofline", [], []),
        ("reproduction-methods", [], []),
    ],
)
def test_figures_of_a_gpu(gpu_records, name, files, texts):
    found = figures.drawings("h100", name, gpu_records[name])
    assert list(found) == files
    pytest.importorskip("matplotlib")
    drawn = [drawing.svg() for drawing in found.values()]
    assert drawn == [drawing.svg() for drawing in found.values()]
    for text in texts:
        assert any(f"{text}" in svg.decode() for svg in drawn), text


def test_taking_in_what_was_measured(gpu_records, tmp_path, monkeypatch):
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    with pytest.raises(UserError, match="holds no records"):
        document.take(out, results)
    for name in ("loss", "step"):
        (out / f"{name}.json").write_text(json.dumps(gpu_records[name]))
    (out / "other.json").write_text("{}")
    reproduction = json.dumps(gpu_records["reproduction-methods"])
    (out / "reproduction-methods.json").write_text(reproduction)
    folder = document.take(out, results)
    assert folder == results / "nvidia-h100-80gb-hbm3"
    names = ["loss.json", "reproduction-methods.json", "step.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert document.read(results)[folder.name]["step"] == gpu_records["step"]

    (results / "compiled.json").write_text(json.dumps(COMPILED))
    (results / "modelled").mkdir()
    (results / "modelled/model.json").write_text(json.dumps(MODEL))
    monkeypatch.setattr(document, "RESULTS", results)
    monkeypatch.setattr(document, "PAGE", tmp_path / "benchmarks.md")
    for page in ("REPRODUCTION", "TEACHING", "MENTOR_CHECK", "MENTOR_CACHE"):
        monkeypatch.setattr(document, page, tmp_path / f"{page.lower()}.md")
        (tmp_path / f"{page.lower()}.md").write_text(document.MARK)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert document.main([str(out)]) == 1  # the page is whole without matplotlib
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text == document.document(document.read(results), COMPILED, MODEL)

    loaders = json.loads((ROOT / "benchmarks/results/cpu/loaders.json").read_text())
    (out / "loaders.json").write_text(json.dumps(loaders))
    with pytest.raises(UserError, match=r"of several devices \(cpu, nvidia-h100-80gb-hbm3\)"):
        document.take(out, results)
