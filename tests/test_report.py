"""The report of a run: what its page shows, read back from a browser, against the records."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from selenium import webdriver

from classroomkd.errors import UserError
from classroomkd.report import results_table, write_report
from classroomkd.report.results import result_rows

MENTORS = ("resnet110", "resnet56", "resnet32", "resnet20", "resnet20-2", "resnet8-2")
LESSONS = ("active_share", "temperature", "rank_weight", "kl")


def make_run(
    folder: Path,
    mentors: tuple[str, ...] = MENTORS,
    given: tuple[str, ...] = ("resnet110",),
    epochs: int = 30,
    data: str = "digits",
) -> tuple[list[dict], dict]:
    """Write a finished run of the student resnet8; return its records and its summary."""
    rng = random.Random(0)

    def epoch_record(phase: str, name: str, best: float, epoch: int) -> dict:
        learnt = 1 - math.exp(-6 * epoch / epochs)
        top1 = min(1.0, 0.1 + (best - 0.1) * learnt + rng.gauss(0, 0.006))
        return {
            "phase": phase,
            "name": name,
            "epoch": epoch,
            "epochs": epochs,
            "learning_rate": 0.05 * (1 + math.cos(math.pi * epoch / epochs)),
            "train_loss": 2.3 * (1 - learnt) + 0.03 * rng.uniform(0.8, 1.2),
            "train_top1": min(1.0, top1 + 0.01),
            "test_loss": 2.3 * (1 - learnt) + 0.12 * rng.uniform(0.8, 1.2),
            "test_top1": top1,
            "images_per_second": 5000 * rng.uniform(0.9, 1.1),
            "seconds": 0.24,
        }

    best = {name: 0.985 - 0.012 * place for place, name in enumerate(mentors)}
    curves = [("mentor", name, best[name]) for name in mentors if name not in given]
    curves += [("alone", "resnet8", 0.93), ("classroom", "resnet8", 0.95)]
    records = [epoch_record(*curve, epoch) for curve in curves for epoch in range(1, epochs + 1)]
    for record in records:
        if record["phase"] == "classroom":
            left = 1 - record["epoch"] / (epochs + 5)
            record["train_loss"] *= 9
            record |= {"task_loss": record["train_loss"] / 9, "student_confidence": 1 - 0.8 * left}
            record["mentors"] = {
                name: {
                    "active_share": (best[name] - 0.5) * (1 + left) * rng.uniform(0.97, 1.03),
                    "rank_weight": 1 + 4 * (best[name] - 0.93) + rng.gauss(0, 0.01),
                    "temperature": 1 + 9 * left * best[name] ** 6 * rng.uniform(0.97, 1.03),
                    "kl": 0.6 * left * best[name] * rng.uniform(0.95, 1.05),
                }
                for name in mentors
            }
    summary = {
        "data": {"name": data, "classes": 10, "train_images": 1198, "test_images": 599},
        "seed": 7,
        "device": "cpu",
        "versions": {"classroomkd": "0.1.0", "torch": "2.13.0"},
        "results": [
            {
                "phase": phase,
                "name": name,
                "architecture": name.removesuffix("-2"),
                "parameters": 272474,
                "top1": round(599 * top1) / 599,
                "top5": 1.0,
                "loss": 0.1234,
                "trained": name not in given,
                "epochs": None if name in given else epochs,
                **({} if name in given else {"best_test_top1": 0.9933}),
            }
            for phase, name, top1 in (
                *(("mentor", name, best[name]) for name in mentors),
                ("alone", "resnet8", 0.93),
                ("classroom", "resnet8", 0.95),
            )
        ],
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(f"data: {json.dumps(data)}\nseed: 7\ndevice: cpu\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps(summary))
    return records, summary


def expected_plots(records: list[dict], mentors: tuple[str, ...] = MENTORS) -> dict:
    """For each plot its traces, {name: (epochs, values)}, straight from the records."""
    suffix = {"mentor": " (mentor)", "alone": " alone", "classroom": " in the classroom"}
    plots = {"accuracy": {}, "loss": {}} | {key: {} for key in LESSONS}
    for record in records:
        name = record["name"] + suffix[record["phase"]]
        points = [("accuracy", name, record["test_top1"]), ("loss", name, record["train_loss"])]
        if record["phase"] == "classroom":
            points += [
                (key, f"{m} (mentor)", record["mentors"][m][key])
                for key in LESSONS
                for m in mentors
            ]
        for plot, trace, value in points:
            xs, ys = plots[plot].setdefault(trace, ([], []))
            xs.append(record["epoch"])
            ys.append(value)
    return plots


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "needs chromium and chromedriver on PATH"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield session
    session.quit()


def open_page(browser, path: Path, width: int = 1280) -> dict:
    """Open the page; assert that it is sound; return {plot id: what is drawn in it}."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(path.as_uri())
    page = browser.execute_script("""
        const plots = [];  // arrays, for objects come back with their keys sorted
        for (const div of document.querySelectorAll('.plotly-graph-div')) {
            const drawn = [...div.querySelectorAll('svg.main-svg .scatterlayer .trace')];
            plots.push([div.id, {
                traces: div.data.map(t => [t.name, [...t.x], [...t.y]]),
                colours: Object.fromEntries(div._fullData.map(t => [t.name, t.line.color])),
                axes: [div.layout.xaxis.title.text, div.layout.yaxis.title.text],
                lines: drawn.filter(t => t.querySelector('path.js-line')).length,
                markers: drawn.map(t => t.querySelectorAll('.points path').length),
                legend: [...div.querySelectorAll('.legendtext')].map(t => t.textContent),
                buttons: [...div.querySelectorAll('.modebar-btn')].map(b => b.dataset.title),
                width: div.querySelector('svg.main-svg').getBoundingClientRect().width,
                room: div.closest('section').getBoundingClientRect().width,
            }]);
        }
        return {plots, requests: performance.getEntriesByType('resource').length,
                overflow: document.documentElement.scrollWidth - window.innerWidth};
    """)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page["requests"] == 0, "the page asks for something that is not in it"
    assert page["overflow"] <= 0, "the page scrolls sideways"
    return dict(page["plots"])


def assert_drawn(plots: dict, expected: dict) -> None:
    assert list(plots) == list(expected)
    for name, plot in plots.items():
        assert plot["traces"] == [[k, x, y] for k, (x, y) in expected[name].items()], name
        assert plot["legend"] == list(expected[name]), name
        assert len(plot["markers"]) == len(expected[name]), name
        assert all(plot["markers"]), name
        assert plot["axes"][0] == "epoch"
        assert plot["axes"][1].endswith(")"), "the vertical axis names its unit"
        assert plot["width"] == pytest.approx(plot["room"], abs=1)
        assert plot["buttons"][1:] == ["Zoom", "Pan", "Reset axes"]
        assert "Download" in plot["buttons"][0]


@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_shows_the_records(browser, tmp_path, width):
    records, _ = make_run(tmp_path / "run")
    plots = open_page(browser, write_report(tmp_path / "run"), width)
    expected = expected_plots(records)
    assert_drawn(plots, expected)
    for name, plot in plots.items():
        assert plot["lines"] == len(expected[name])
    colours = plots["active_share"]["colours"]
    assert len(set(colours.values())) == len(MENTORS)
    for plot in plots.values():
        assert colours | plot["colours"] == plot["colours"] | colours, "a mentor changes colour"


def test_page_tells_the_results(browser, tmp_path):
    _, summary = make_run(tmp_path / "run")
    open_page(browser, write_report(tmp_path / "run"))
    text = browser.find_element("tag name", "body").text
    for fact in ("resnet8 on digits", ", ".join(MENTORS), "30 epochs", "seed 7", "device cpu"):
        assert fact in text
    rows = browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert len(rows) == len(summary["results"])
    given = ["resnet110 (mentor)", "272,474", "–", "98.50%", "–", "100.00%", "0.1234"]
    assert rows[0] == given
    assert rows[4][::2] == ["resnet20-2 (mentor)", "30", "99.33%", "0.1234"]
    assert [row[0] for row in rows[-2:]] == ["resnet8 alone", "resnet8 in the classroom"]
    assert "best is the highest of any epoch on these same images" in text
    # 599 images: 100/599 = 0.167; 569 right: sqrt(0.94992 * 0.05008 / 599) = 0.00891
    assert "599 held-out images of digits: one image is 0.17 percentage points" in text
    assert "near 95.0% is 0.89 points" in text
    assert "torch 2.13.0" in text
    assert "device: cpu" not in text, "the configuration starts collapsed"
    browser.find_element("tag name", "summary").click()
    assert "device: cpu" in browser.find_element("tag name", "pre").text


def test_single_epoch_shows_its_markers(browser, tmp_path):
    records, _ = make_run(tmp_path / "run", epochs=1)
    plots = open_page(browser, write_report(tmp_path / "run"))
    assert_drawn(plots, expected_plots(records))
    assert all(set(plot["markers"]) == {1} for plot in plots.values())


def test_unfinished_run(browser, tmp_path):
    """Killed in the classroom's fourth epoch: no summary, and half of the last line."""
    run = tmp_path / "run"
    records, _ = make_run(run)
    (run / "summary.json").unlink()
    (run / "config.yaml").write_text("data: /home/me/sets/digits\nseed: 7\n")
    kept = records[: -30 + 3]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines[: len(kept)], lines[len(kept)][:90]]))
    plots = open_page(browser, write_report(run))
    assert_drawn(plots, expected_plots(kept))
    text = browser.find_element("tag name", "body").text
    assert "Unfinished" in text
    assert f"line {len(kept) + 1} of metrics.jsonl" in text
    assert "resnet8 in the classroom: epoch 3 of 30" in text
    assert "resnet8 on digits" in text
    assert "seed 7" in text


def test_run_that_has_not_reached_the_classroom(browser, tmp_path):
    run = tmp_path / "run"
    records, _ = make_run(run)
    (run / "summary.json").unlink()
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:40]))
    plots = open_page(browser, write_report(run))
    assert_drawn(plots, {k: v for k, v in expected_plots(records[:40]).items() if k not in LESSONS})


def test_run_without_an_epoch(browser, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert open_page(browser, write_report(run)) == {}
    assert "no epoch yet" in browser.find_element("tag name", "body").text


def test_numbers_that_were_not_finite_are_gaps(browser, tmp_path):
    run = tmp_path / "run"
    records, summary = make_run(run)
    records[3]["train_loss"] = records[5]["test_top1"] = None
    records[-2]["mentors"]["resnet56"]["kl"] = None
    summary["results"][-1] |= {"top1": None, "loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "summary.json").write_text(json.dumps(summary))
    assert_drawn(open_page(browser, write_report(run)), expected_plots(records))
    assert browser.find_elements("css selector", "tr.student")[-1].text.count("–") == 2


def test_an_epoch_recorded_twice_counts_once(browser, tmp_path):
    """A run killed between its record and its checkpoint runs that epoch again."""
    run = tmp_path / "run"
    records, _ = make_run(run)
    stale = records[9] | {"test_top1": 0.01, "train_loss": 99.0}
    lines = [json.dumps(record) + "\n" for record in [*records[:9], stale, *records[9:]]]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert_drawn(open_page(browser, write_report(run)), expected_plots(records))


def test_text_from_files_is_not_markup(browser, tmp_path):
    run = tmp_path / "run"
    nasty = "</script><script>window.ran = 1</script><b>&amp;"
    _, summary = make_run(run, mentors=(nasty, "resnet20"), given=(), data=nasty)
    summary["device"] = summary["versions"]["torch"] = nasty
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "config.yaml").open("a") as config:
        config.write(f"classes: ['{nasty}']\n")
    plots = open_page(browser, write_report(run))
    assert len(plots) == 6
    for name, plot in plots.items():
        assert plot["legend"][0] == f"{nasty} (mentor)", name
    assert browser.execute_script("return window.ran") is None
    browser.find_element("tag name", "summary").click()
    text = browser.find_element("tag name", "body").text
    assert text.count(nasty) >= 6
    # Rich reads square brackets as its own markup.
    summary["results"][0]["name"] = summary["data"]["name"] = "[red]a[/red] [/x]"
    assert terminal(summary).count("[red]a[/red] [/x]") == 2


def terminal(summary: dict, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(summary))
    return console.export_text()


def test_terminal_table(tmp_path):
    _, summary = make_run(tmp_path / "run")
    text = terminal(summary)
    given = next(line for line in text.splitlines() if "resnet110" in line)
    assert given.split() == [
        "resnet110",
        "(mentor)",
        "272,474",
        "–",
        "98.50%",
        "–",
        "100.00%",
        "0.1234",
    ]
    assert "resnet8 in the classroom" in text
    assert "599 held-out images of digits" in text
    summary["results"][-1]["top1"] = 1.0  # certainty is not on offer: one image away from it
    assert "near 99.8% is 0.17 points" in " ".join(terminal(summary).split())
    top5 = [row[5] for row in result_rows(summary)]
    assert top5 == ["100.00%"] * len(top5)
    for classes, shown in ((6, "100.00%"), (5, "–")):  # of five the best five say nothing
        summary["data"]["classes"] = classes
        assert {row[5] for row in result_rows(summary)} == {shown}


def test_the_epoch_that_validation_chooses_is_told(tmp_path):
    _, summary = make_run(tmp_path / "run")
    assert "would be chosen" not in terminal(summary)
    summary["data"]["validation_images"] = 120
    summary["results"][-1] |= {"chosen_epoch": 17, "chosen_top1": 0.9449}
    text = " ".join(terminal(summary).split())
    assert "By the 120 validation images the student of epoch 17 would be chosen" in text
    assert "94.49%" in text


def test_terminal_of_80_characters_breaks_no_row(tmp_path):
    _, summary = make_run(tmp_path / "run")
    rows = [line for line in terminal(summary, width=80).splitlines() if "272,474" in line]
    assert [row.split("  ")[0] for row in rows] == [row[0] for row in result_rows(summary)]


def test_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match=r"no run folder at .*missing"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no metrics\.jsonl in "):
        write_report(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON") as error:
        write_report(tmp_path / "run")
    assert "\n" not in str(error.value)
