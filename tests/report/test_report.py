"""The report of a run: what its page shows, read back from a browser, against the records."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console
from selenium import webdriver

from classroomkd.errors import UserError
from classroomkd.report.axes import ALONE, DARK, GRID
from classroomkd.report.export import latex
from classroomkd.report.markup import Table, TableRow, table
from classroomkd.report.numbers import are_numbers, percent, spread
from classroomkd.report.page import write_report
from classroomkd.report.run_table import result_rows, results_table

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
    curves += [("alone", "resnet8", 0.93), ("student", "resnet8", 0.95)]
    records = [epoch_record(*curve, epoch) for curve in curves for epoch in range(1, epochs + 1)]
    for record in records:
        if record["phase"] == "student":
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
                ("student", "resnet8", 0.95),
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
    suffix = {"mentor": " (mentor)", "alone": " alone", "student": " in the classroom"}
    plots = {"accuracy": {}, "loss": {}} | {key: {} for key in LESSONS}
    for record in records:
        name = record["name"] + suffix[record["phase"]]
        points = [("accuracy", name, record["test_top1"]), ("loss", name, record["train_loss"])]
        if record["phase"] == "student":
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
        const texts = (svg, where) => [...svg.querySelectorAll(where)].map(t => t.textContent);
        const number = (mark, of) => mark && parseFloat(mark.getAttribute(of));
        const ticks = (svg, axis, of) => [...svg.querySelectorAll('g.' + axis)].map(tick =>
            [tick.querySelector('text')?.textContent, number(tick.querySelector('use'), of)]);
        const hex = rgb => '#' + rgb.match(/\\d+/g).slice(0, 3)
            .map(part => (+part).toString(16).padStart(2, '0')).join('');
        const plots = [];  // arrays, for objects come back with their keys sorted
        for (const svg of document.querySelectorAll('section svg')) {
            const section = svg.closest('section'), link = section.querySelector('a');
            const room = section.querySelector('.figure').getBoundingClientRect().width;
            const frame = svg.querySelector('g.axes > g.patch path').getBBox();
            plots.push([svg.id, {
                file: link.download,
                csv: decodeURIComponent(link.href.slice(link.href.indexOf(',') + 1)),
                xticks: ticks(svg, 'xtick', 'x'),
                yticks: ticks(svg, 'ytick', 'y'),
                frame: [frame.y, frame.y + frame.height],
                curves: [...svg.querySelectorAll('g.curve')].map(curve => ({
                    colour: hex(getComputedStyle(curve.querySelector('path')).stroke),
                    marks: [...curve.querySelectorAll('use')]
                        .map(mark => [number(mark, 'x'), number(mark, 'y')]),
                    line: curve.querySelector(':scope > path').getTotalLength(),
                })),
                bands: [...svg.querySelectorAll('g.band use')].map(band => band.getBBox())
                    .map(box => [box.y, box.y + box.height]),
                bars: [...svg.querySelectorAll('g.bar path')].map(bar => bar.getBBox())
                    .map(box => [box.y, box.y + box.height]),
                errors: svg.querySelectorAll('g.LineCollection path').length,
                images: [...svg.querySelectorAll('g.axes:has(> g.text) image')]
                    .map(image => image.getBoundingClientRect().width),
                titles: texts(svg, 'g.axes > g.text text'),
                axes: [texts(svg, 'g.matplotlib\\\\.axis > g.text text')].flat(),
                legend: texts(svg, 'g.legend text'),
                tips: texts(svg, 'g.tips title'),
                smallest: Math.min(...[...svg.querySelectorAll('text')]
                    .map(text => parseFloat(getComputedStyle(text).fontSize)))
                    * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
                inside: svg.getBoundingClientRect().width <= room + 1 || window.innerWidth < 1200,
            }]);
        }
        return {plots, requests: performance.getEntriesByType('resource').length,
                scripts: document.scripts.length,
                overflow: document.documentElement.scrollWidth - window.innerWidth};
    """)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page["requests"] == 0, "the page asks for something that is not in it"
    assert page["scripts"] == 0
    assert page["overflow"] <= 0, "the page scrolls sideways"
    assert path.stat().st_size < LARGEST
    for name, plot in page["plots"]:
        assert plot["file"] == f"{name}.csv"
        assert plot["inside"], "a plot scrolls sideways on a wide screen"
        assert plot["smallest"] > 8, "pixels of the smallest letters"
        header, *rows = csv.reader(io.StringIO(plot["csv"]))
        plot["table"] = [header, *([number_of(cell) for cell in row] for row in rows)]
    return dict(page["plots"])


LARGEST = 1_500_000  # bytes of a page


def number_of(text: str) -> float | str | None:
    try:
        return float(text.removesuffix("%").replace("−", "-")) if text else None
    except ValueError:
        return text


def points(plot: dict) -> dict[str, tuple[list, list]]:
    """For each curve its epochs and values, from the numbers that the plot links to."""
    header, *rows = plot["table"]
    found = {}
    for place, name in enumerate(header[1:], start=1):
        known = [row for row in rows if row[place] is not None]
        found[name] = [row[0] for row in known], [row[place] for row in known]
    return found


def measured(plot: dict, heights: list[float], scale=lambda tick: tick) -> list[float]:
    """The values at ``heights``, in pixels, on the axis that the plot's first and last ticks span.

    ``scale`` makes the axis linear.
    """
    ticks = [(number_of(text), y) for text, y in plot["yticks"]]
    if scale is log_error:
        ticks = [(top, y) for top, y in ticks if top < 100]  # which has no logarithm
    (low, bottom), *_, (high, top) = ticks
    low, high = scale(low), scale(high)
    return [low + (y - bottom) / (top - bottom) * (high - low) for y in heights]


def log_error(top: float) -> float:
    return math.log10(100 - top)


SCALES = {"accuracy": log_error, "validation": log_error, "loss": math.log10}


def assert_drawn(plots: dict, expected: dict) -> None:
    """Assert that the numbers, the legend, and what is drawn are as ``expected``."""
    assert list(plots) == list(expected)
    for name, plot in plots.items():
        finite = {
            curve: zip(*((x, y) for x, y in zip(*of, strict=True) if y is not None), strict=True)
            for curve, of in expected[name].items()
        }
        found = points(plot)
        assert list(found) == plot["legend"] == list(finite), name
        for drawn, (curve, (epochs, values)) in zip(plot["curves"], finite.items(), strict=True):
            assert found[curve] == (list(epochs), pytest.approx(values, rel=1e-6)), name
            assert drawn["marks"], name
            assert (drawn["line"] > 0) == (len(epochs) > 1)
            assert_placed(name, plot, drawn["marks"], epochs, values)
        assert plot["axes"][0] == "epoch"
        assert plot["axes"][1].endswith(")"), "the vertical axis names its unit"


def assert_placed(name: str, plot: dict, marks: list, epochs, values) -> None:
    """Assert that the marks of a curve lie where its values lie on the plot's axes."""
    scale = SCALES.get(name, lambda tick: tick)
    if name == "loss" and "log" not in plot["axes"][1]:
        scale = float
    factor = 100 if name in ("accuracy", "validation", "active_share") else 1
    heights = measured(plot, [y for _, y in marks], scale)
    pixel = abs(measured(plot, [1], scale)[0] - measured(plot, [0], scale)[0])
    truth = dict(zip(epochs, values, strict=True))
    often = math.ceil(max(epochs) / 30)
    shown = [epoch for epoch in range(1, max(epochs) + 1, often) if epoch in truth]
    assert len(marks) == len(shown), name
    for epoch, height in zip(shown, heights, strict=True):
        if name in ("accuracy", "validation") and truth[epoch] == 1:
            continue  # it has no logarithm
        assert height == pytest.approx(scale(factor * truth[epoch]), abs=pixel / 4), (name, epoch)


class Finished(NamedTuple):
    """A finished run."""

    records: list[dict]
    summary: dict
    page: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    run = tmp_path_factory.mktemp("finished") / "run"
    return Finished(*make_run(run), write_report(run))


@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_shows_the_records(browser, finished, width):
    records = finished.records
    plots = open_page(browser, finished.page, width)
    expected = expected_plots(records)
    assert_drawn(plots, expected)
    colours = colours_of(plots["active_share"])
    assert len(set(colours.values())) == len(MENTORS)
    for plot in plots.values():
        assert colours | colours_of(plot) == colours_of(plot) | colours, "a mentor changes colour"
    tip = plots["temperature"]["tips"][4].split("\n")
    mentors = next(r["mentors"] for r in records if r["phase"] == "student" and r["epoch"] == 5)
    told = [f"{name} (mentor): {mentors[name]['temperature']:.4g}" for name in MENTORS]
    assert tip == ["epoch 5", *told]


def colours_of(plot: dict) -> dict[str, str]:
    colours = [curve["colour"] for curve in plot["curves"]]
    return dict(zip(plot["legend"], colours, strict=True))


def test_page_tells_the_results(browser, finished):
    summary = finished.summary
    open_page(browser, finished.page)
    text = browser.find_element("tag name", "body").text
    for fact in ("resnet8 on digits", ", ".join(MENTORS), "30 epochs", "seed 7", "device cpu"):
        assert fact in text
    rows = table_rows(browser)
    assert len(rows) == len(summary["results"])
    given = ["resnet110 (mentor)", "272,474", "–", "98.50%", "–", "100.00%", "0.1234"]
    assert rows[0] == given
    assert rows[4][::2] == ["resnet20-2 (mentor)", "30", "99.33%", "0.1234"]
    assert [row[0] for row in rows[-2:]] == ["resnet8 alone", "resnet8 in the classroom"]
    assert "best is the highest of any epoch on the same images" in text
    # 599 images: 100/599 = 0.167; 569 right: sqrt(0.94992 * 0.05008 / 599) = 0.00891
    assert "599 held-out images of digits: one image is 0.17 percentage points" in text
    assert "near 95.0% is 0.89 points" in text
    assert "torch 2.13.0" in text
    assert "device: cpu" not in text, "the configuration starts collapsed"
    browser.find_element("tag name", "summary").click()
    assert "device: cpu" in browser.find_element("tag name", "pre").text


def contrast(*colours: str) -> float:
    """WCAG's contrast of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(map(math.prod, zip((0.2126, 0.7152, 0.0722), linear, strict=True)))

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_a_dark_scheme_is_followed(browser, finished):
    style = "return getComputedStyle(document.body).{}"
    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        plots = open_page(browser, finished.page)
        rgb = browser.execute_script(style.format("backgroundColor"))
        page = "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", rgb)[:3])
        curves = {
            name: colour for plot in plots.values() for name, colour in colours_of(plot).items()
        }
        assert len(set(curves.values())) == len(MENTORS) + 2
        seen[scheme] = page, curves
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"][0] == "#ffffff"
    page, curves = seen["dark"]
    assert {name for name, colour in curves.items() if contrast(page, colour) < 3} == set()
    assert contrast(page, curves["resnet8 in the classroom"]) > 10 > contrast(page, DARK[GRID])
    assert {colour for colour in DARK.values() if contrast(page, colour) < 3} == {DARK[GRID]}


def test_a_long_run_has_a_small_page(browser, tmp_path):
    """As long as the tables' runs on CIFAR-100; on ImageNet, 90 epochs of a thousand classes."""
    for name, epochs, classes in (("cifar", 240, 100), ("imagenet", 90, 1000)):
        make_run(tmp_path / name, epochs=epochs)
        tell_classes(tmp_path / name, [f"class {number}" for number in range(classes)])
        plots = open_page(browser, write_report(tmp_path / name))  # where the size is asserted
        assert len(plots["gain"]["bars"]) == classes - 1
        assert len(plots["accuracy"]["table"]) == epochs + 1


def test_what_a_paper_includes_is_exported(seeds, tmp_path):
    folder, _, page = seeds
    runs = [folder / f"seed-{seed}" for seed in range(3)]
    for _ in range(2):  # the second time in place of the first
        write_report(runs, tmp_path / "page.html", export=tmp_path / "paper")
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes(), "the same bytes every time"
    plots = ["accuracy", "active_share-1", "gain-1", "temperature-1"]
    expected = [f"{plot}.{kind}" for plot in plots for kind in ("csv", "pdf", "svg")]
    expected += ["comparison.csv", "comparison.tex"]
    assert sorted(path.name for path in (tmp_path / "paper").iterdir()) == sorted(expected)
    for plot in plots:
        svg = ElementTree.parse(tmp_path / "paper" / f"{plot}.svg").getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        texts = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert {"epoch", "class"} & set(texts)
        pdf = (tmp_path / "paper" / f"{plot}.pdf").read_bytes()
        assert (pdf[:5], pdf.rstrip()[-5:]) == (b"%PDF-", b"%%EOF")
    with (tmp_path / "paper" / "comparison.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert (first["run"], first["top-1"], first["gain"]) == ("seed-0", "95.00%", "+2.00")
    assert last["top-1"] == "96.00 ± 1.00%"
    lines = (tmp_path / "paper" / "comparison.tex").read_text().splitlines()
    assert lines[0].startswith(r"\begin{tabular}{lrrrrr}")
    assert r"seed-0 & 0 & 95.00\% & 97.50\% & 93.00\% & +2.00 \\" in lines
    assert lines[-1] == r"\end{tabular}"


def test_latex_means_what_the_table_says():
    cells = ("a_b & c$", "−0.50 ± 0.10%")
    text = latex(Table("t", ("run", "gain #1"), [TableRow(cells), TableRow((r"\x~{y}^2", "–"))]))
    assert text.splitlines()[2:6] == [
        r"run & gain \#1 \\",
        r"\midrule",
        r"a\_b \& c\$ & $-$0.50 $\pm$ 0.10\% \\",
        r"\textbackslash{}x\textasciitilde{}\{y\}\textasciicircum{}2 & -- \\",
    ]


def test_an_export_that_is_no_folder_is_refused(finished, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot export to .*file: it is not a folder"):
        write_report(finished.page.parent, tmp_path / "page.html", export=tmp_path / "file")
    assert not (tmp_path / "page.html").exists()


def test_single_epoch_shows_its_markers(browser, tmp_path):
    records, _ = make_run(tmp_path / "run", epochs=1)
    plots = open_page(browser, write_report(tmp_path / "run"))
    assert_drawn(plots, expected_plots(records))
    assert all(len(curve["marks"]) == 1 for plot in plots.values() for curve in plot["curves"])


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
    assert f"mentors {', '.join(MENTORS)} · 30 epochs" in text
    assert f"line {len(kept) + 1} of metrics.jsonl" in text
    assert "resnet8 in the classroom: epoch 3 of 30" in text
    assert "resnet8 on digits" in text
    assert "seed 7" in text


@pytest.mark.parametrize(
    ("config", "heading", "facts"),
    [
        (
            {"student": "resnet14", "method": "kd", "training": {"epochs": 1}},
            "resnet14 by kd on photos",
            "mentors so far: resnet56, resnet32 · 1 epoch · seed 3",
        ),
        (
            {"student": "", "mentor_training": {"epochs": 9}},
            "Mentors on photos",
            "mentors so far: resnet56, resnet32 · 9 epochs · seed 3",
        ),
    ],
)
def test_a_run_under_way_tells_what_its_configuration_says(tmp_path, config, heading, facts):
    run = tmp_path / "run"
    records, _ = make_run(run)
    (run / "summary.json").unlink()
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": "/sets/photos", "seed": 3}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:40]))
    page = write_report(run).read_text()
    assert f"<h1>{heading}</h1>" in page
    assert f"<p>{facts}</p>" in page
    assert [plot for plot in ("accuracy", "loss", *LESSONS) if f'id="{plot}"' in page] == [
        *("accuracy", "loss")  # it has not reached the classroom
    ]


def test_run_without_an_epoch(browser, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert open_page(browser, write_report(run)) == {}
    assert "no epoch yet" in browser.find_element("tag name", "body").text


def test_gaps_and_an_epoch_recorded_twice(browser, tmp_path):
    """What was not finite is a gap; of an epoch run again after a kill the last record counts."""
    run = tmp_path / "run"
    records, summary = make_run(run)
    records[3]["train_loss"] = records[5]["test_top1"] = None
    records[-2]["mentors"]["resnet56"]["kl"] = None
    summary["results"][-1] |= {"top1": None, "loss": None}
    stale = records[9] | {"test_top1": 0.01, "train_loss": 99.0}
    lines = [json.dumps(record) + "\n" for record in [*records[:9], stale, *records[9:]]]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "summary.json").write_text(json.dumps(summary))
    assert_drawn(open_page(browser, write_report(run)), expected_plots(records))
    assert browser.find_elements("css selector", "tr.student")[-1].text.count("–") == 2


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
    summary["results"][0]["name"] = summary["data"]["name"] = "[red]a:five:[/red] [/x]"
    assert terminal(summary).count("[red]a:five:[/red] [/x]") == 2


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
    narrow = [line for line in terminal(summary, width=80).splitlines() if "272,474" in line]
    assert [row.split("  ")[0] for row in narrow] == [row[0] for row in result_rows(summary)]
    summary["results"][-1]["top1"] = 1.0  # certainty is not on offer: one image away from it
    assert "near 99.8% is 0.17 points" in " ".join(terminal(summary).split())
    top5 = [row[5] for row in result_rows(summary)]
    assert top5 == ["100.00%"] * len(top5)
    for classes, shown in ((6, "100.00%"), (5, "–")):  # of five the best five say nothing
        summary["data"]["classes"] = classes
        assert {row[5] for row in result_rows(summary)} == {shown}


def test_the_epoch_that_validation_chooses_is_told(tmp_path):
    _, summary = make_run(tmp_path / "run")
    assert "validation images" not in terminal(summary)
    summary["data"]["validation_images"] = 120
    summary["results"][-1] |= {"chosen_epoch": 17, "chosen_top1": 0.9449}
    text = " ".join(terminal(summary).split())
    assert "On the 120 validation images, the student of epoch 17 is best" in text
    assert "94.49%" in text


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


@pytest.mark.parametrize(
    "text", ['{"data": 3, "results": 4}', "{}", "[]", "3", '{"data": {}, "results": []}']
)
def test_summary_of_no_run(tmp_path, text):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json is not a run's summary: delete it"):
        write_report(tmp_path / "run")


@pytest.mark.parametrize("damage", [{"test_top1": "x"}, {"epoch": "x"}, {"mentors": {"a": 3}}])
def test_damaged_records_are_told_and_left_out(tmp_path, damage):
    records, _ = make_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(records[-1] | damage) + "\n")
    page = write_report(tmp_path / "run").read_text()
    assert f"Skipped incomplete line {len(records) + 1} of metrics.jsonl" in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml", "starts.jsonl"])
def test_files_that_may_not_be_read_are_named(tmp_path, monkeypatch, name):
    make_run(tmp_path / "run")
    denied, opened = tmp_path / "run" / name, io.open
    denied.touch()

    def deny(path, *args, **kwargs):
        if Path(path) == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", deny)  # root may read whatever its permissions
    with pytest.raises(UserError, match=rf"cannot read .*{name}: Permission denied"):
        write_report(tmp_path / "run")


CLASSES = [f"class {number}" for number in range(9)] + ["<b>&amp;"]


def tell_classes(folder: Path, classes: list[str], seed: int = 0) -> dict:
    """Give the finished run in ``folder`` results per class; return its summary."""
    rng = random.Random(seed)
    summary = json.loads((folder / "summary.json").read_text())
    summary["data"] |= {"classes": len(classes), "class_names": classes}

    def shares() -> list[float | None]:  # of the third class there is no image
        return [None if c == 2 else rng.random() for c in range(len(classes))]

    for result in summary["results"]:
        result |= {"per_class": shares(), "calibration_error": rng.random() / 10}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for record in records:
        for numbers in record.get("mentors", {}).values():
            numbers["taught"] = shares()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def gains(summary: dict) -> list[float | None]:
    alone, classroom = (result["per_class"] for result in summary["results"][-2:])
    return [None if a is None else 100 * (c - a) for a, c in zip(alone, classroom, strict=True)]


def make_seeds(folder: Path, count: int = 3) -> list[dict]:
    """Runs of seeds 0, 1, … that end differently; return their summaries."""
    folder.mkdir(exist_ok=True)
    summaries = []
    for seed in range(count):
        run = folder / f"seed-{seed}"
        make_run(run)
        settings = {"data": {"source": "/sets/digits", "loader": "auto"}, "seed": seed}
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"training": {"epochs": 30}}))
        summary = tell_classes(run, CLASSES, seed)
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        for record in records:
            if record["phase"] != "mentor":
                record["test_top1"] -= 0.004 * seed * seed
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        summary["seed"] = seed
        summary["results"][-1] |= {"top1": 0.95 + 0.01 * seed, "best_test_top1": 0.975}
        summary["results"][-2]["top1"] = 0.93 - 0.005 * seed**2
        (run / "summary.json").write_text(json.dumps(summary))
        summaries.append(summary)
    return summaries


def two_seeds(folder: Path) -> list[Path]:
    make_seeds(folder, 2)
    return [folder / "seed-0", folder / "seed-1"]


def table_rows(browser) -> list[list[str]]:
    return browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )


def test_validation_stands_beside_the_test(browser, tmp_path):
    run = tmp_path / "run"
    records, _ = make_run(run)
    for record in records:
        record["validation_top1"] = 0.9 * record["test_top1"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plots = open_page(browser, write_report(run))
    accuracy, *others = expected_plots(records).items()
    measured = {name: (x, [0.9 * y for y in ys]) for name, (x, ys) in accuracy[1].items()}
    assert_drawn(plots, dict([accuracy, ("validation", measured), *others]))
    assert plots["accuracy"]["yticks"] == plots["validation"]["yticks"]


@pytest.mark.parametrize(
    ("classes", "width", "mentors", "epochs"),
    [(CLASSES, 1280, MENTORS, 30), ([f"class {n}" for n in range(100)], 400, MENTORS[:2], 5)],
)
def test_classes_taught_and_gained(browser, tmp_path, classes, width, mentors, epochs):
    run = tmp_path / "run"
    make_run(run, mentors, epochs=epochs)
    summary = tell_classes(run, classes)
    plots = open_page(browser, write_report(run), width)
    assert list(plots)[-2:] == ["taught", "gain"]
    shown = [c for c in range(len(classes)) if c != 2]
    expected = gains(summary)
    order = sorted(shown, key=lambda c: -expected[c])

    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    by_epoch = [record["mentors"] for record in records if record["phase"] == "student"]
    assert plots["taught"]["titles"] == list(mentors)
    header, *rows = plots["taught"]["table"]
    assert header[2:] == [classes[c] for c in order], "the classes stand as beside it"
    assert [row[:2] for row in rows] == [
        [name, epoch] for name in mentors for epoch in range(1, epochs + 1)
    ]
    for name, epoch, *cells in rows:
        taught = by_epoch[int(epoch) - 1][name]["taught"]
        assert cells == pytest.approx([taught[c] for c in order], rel=1e-3)
    assert len(plots["taught"]["images"]) == len(mentors)
    assert all(width > 0 for width in plots["taught"]["images"])

    assert plots["gain"]["table"] == [
        ["class", "gain (percentage points)"],
        *([classes[c], pytest.approx(expected[c], rel=1e-6)] for c in order),
    ]
    for (top, bottom), c in zip(plots["gain"]["bars"], order, strict=True):
        ends = measured(plots["gain"], [bottom, top])
        assert ends == pytest.approx(sorted((0, expected[c])), abs=0.2)
    assert plots["gain"]["errors"] == 0
    # Every name is legible.
    assert [name for name, _ in plots["gain"]["xticks"]] == [classes[c] for c in order]
    text = browser.find_element("tag name", "body").text
    images = 599 / len(classes)
    assert f"A class has about {images:.0f} held-out images" in text
    errors = [result["calibration_error"] for result in summary["results"][-2:]]
    told = f"calibration error is {errors[0]:.4f} alone and {errors[1]:.4f} in the classroom"
    assert told in text
    assert told in " ".join(terminal(summary).split())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> tuple[Path, list[dict], Path]:
    """The folder of three seeds' runs, their summaries, and the page that compares them."""
    folder = tmp_path_factory.mktemp("seeds")
    summaries = make_seeds(folder)
    folders = [folder / f"seed-{seed}" for seed in range(3)]
    return folder, summaries, write_report(folders, folder / "page.html")


@pytest.mark.parametrize("width", [1280, 400])
def test_comparison_of_seeds(browser, seeds, width):
    folder, summaries, page = seeds
    assert page == folder / "page.html"
    plots = open_page(browser, page, width)
    records = [json.loads(line) for line in (folder / "seed-0" / "metrics.jsonl").open()]
    one = expected_plots(records)
    assert list(plots) == ["accuracy", "active_share-1", "temperature-1", "gain-1"]
    gain = plots.pop("gain-1")

    # The seeds lie 0, 0.4 and 1.6 points below the first one.
    middle, deviation = 0.02 / 3, stdev([0, 0.004, 0.016])
    named = {"resnet8 in the classroom": "", "resnet8 alone": "student alone: "}
    drawn = points(plots["accuracy"])
    for own, prefix in named.items():
        name = f"{prefix}seed-0 and 2 other seeds"
        epochs, values = one["accuracy"][own]
        assert drawn[name] == (epochs, pytest.approx([value - middle for value in values]))
        around = pytest.approx([deviation] * len(epochs), rel=1e-6)
        assert drawn[f"{name}, deviation"] == (epochs, around)
    top, bottom = plots["accuracy"]["frame"]
    assert len(plots["accuracy"]["bands"]) == 2
    assert all(top < high < low < bottom for high, low in plots["accuracy"]["bands"])
    for key in ("active_share", "temperature"):
        for name, (xs, ys) in one[key].items():
            assert points(plots[f"{key}-1"])[name] == (xs, pytest.approx(ys, rel=1e-6))

    values = list(zip(*map(gains, summaries), strict=True))
    order = sorted((c for c in range(10) if c != 2), key=lambda c: -mean(values[c]))
    _, *rows = gain["table"]
    assert rows == [
        [CLASSES[c], *(pytest.approx(of(values[c]), rel=1e-6) for of in (mean, stdev))]
        for c in order
    ]
    assert len(gain["bars"]) == gain["errors"] == 9

    rows = table_rows(browser)
    mentors = ", ".join(MENTORS)
    told = f"In common: data digits · epochs 30 · student resnet8 · mentors {mentors} · method"
    assert told in browser.find_element("tag name", "body").text
    assert rows[1] == ["seed-1", "1", "96.00%", "97.50%", "92.50%", "+3.50"]
    last, alone = [0.95, 0.96, 0.97], [0.93, 0.925, 0.91]
    gain = [100 * (a - b) for a, b in zip(last, alone, strict=True)]
    assert rows[3][-4:] == [
        f"96.00 ± {100 * stdev(last):.2f}%",
        "97.50 ± 0.00%",
        f"{100 * mean(alone):.2f} ± {100 * stdev(alone):.2f}%",
        f"{mean(gain):+.2f} ± {stdev(gain):.2f}",
    ]
    assert "n = 3" in rows[3][0]
    assert rows[3][1] == "0, 1, 2"
    assert not browser.find_elements("css selector", ".warning")
    assert (
        browser.execute_script(
            "const box = document.querySelector('.wide'); return box.scrollWidth - box.clientWidth"
        )
        <= 0
    ), "the table scrolls sideways"


def separate(folder: Path) -> list[Path]:
    """Runs of make_seeds taken apart: in one the student alone, in another taught by KD."""
    make_seeds(folder)
    runs = []
    for seed in range(3):
        whole = folder / f"seed-{seed}"
        settings = yaml.safe_load((whole / "config.yaml").read_text())
        summary = json.loads((whole / "summary.json").read_text())
        records = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
        for method, phase, change in (
            ("alone", "alone", {"mentors": []}),
            ("kd", "student", {"mentors": ["resnet20"], "loss": {"temperature": 4.0}}),
        ):
            run = folder / f"{method}-{seed}"
            run.mkdir()
            changed = settings | change | {"method": method, "alone": False}
            (run / "config.yaml").write_text(yaml.safe_dump(changed))
            lines = [json.dumps(r) + "\n" for r in records if r["phase"] == phase]
            (run / "metrics.jsonl").write_text("".join(lines))
            results = [result for result in summary["results"] if result["phase"] == phase]
            finished = summary | {"method": method, "results": results}
            (run / "summary.json").write_text(json.dumps(finished))
            runs.append(run)
    return runs


def test_runs_of_one_seed_are_compared_with_the_student_alone(browser, tmp_path):
    runs = separate(tmp_path)
    write_report(runs, tmp_path / "page.html")
    plots = open_page(browser, tmp_path / "page.html")
    rows = {row[0]: row for row in table_rows(browser)}
    alone, kd = rows["alone-1"], rows["kd-1"]
    assert kd[-2:] == ["92.50%", "+3.50"]
    assert alone[-2:] == ["–", "–"]
    # 0.95 - 0.93, 0.96 - 0.925, 0.97 - 0.91
    gains = [2.0, 3.5, 6.0]
    mean_of_kd = table_rows(browser)[7]
    # kd less alone, seed by seed: the same, for alone stands first
    paired = table_rows(browser)[8]
    error = stdev(gains) / math.sqrt(3)
    assert paired == [
        "method=kd, mentors=[resnet20], loss.temperature=4.0 (3 seeds) − "
        "method=alone, mentors=[] (3 seeds)",
        f"{mean(gains):+.2f} ± {error:.2f}",
        "3",
        "0: +2.00, 1: +3.50, 2: +6.00",
    ]
    assert mean_of_kd[-1] == f"{mean(gains):+.2f} ± {stdev(gains):.2f}"
    assert [name for name in plots if name.startswith("gain")] == ["gain-2"]
    assert kd[1] == "method=kd, mentors=[resnet20], loss.temperature=4.0"
    assert alone[1] == "method=alone, mentors=[]"
    values = list(zip(*(gains_of(tmp_path, seed) for seed in range(3)), strict=True))
    order = sorted((c for c in range(10) if c != 2), key=lambda c: -mean(values[c]))
    drawn = [row[1] for row in plots["gain-2"]["table"][1:]]
    assert drawn == pytest.approx([mean(values[c]) for c in order])
    taught = "method=kd, mentors=[resnet20], loss.temperature=4.0 (3 seeds)"
    by_itself = "student alone: method=alone, mentors=[] (3 seeds)"
    assert plots["accuracy"]["legend"] == [taught, by_itself]
    colours = colours_of(plots["accuracy"])
    assert colours[by_itself] == ALONE != colours[taught]

    # Another seed's, another schedule's or other images' is not the same student.
    settings = yaml.safe_load((runs[0] / "config.yaml").read_text())
    others = settings | {"training": {"epochs": 31}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(others))
    (runs[2] / "inputs.json").write_text('{"the train images": "others"}')
    write_report(runs, tmp_path / "page.html")
    plots = open_page(browser, tmp_path / "page.html")
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h2')].map(h => h.innerText)"
    )
    assert [text for text in headings if text.startswith("Gain")] == ["Gain per class: kd-2"]
    assert len([name for name in plots if name.startswith("gain")]) == 1
    rows = table_rows(browser)
    assert [row[0] for row in rows[1:4]] == ["kd-0", "kd-1", "kd-2"]
    assert [row[-2:] for row in rows[1:4]] == [["–", "–"], ["–", "–"], ["91.00%", "+6.00"]]
    assert rows[4][-2:] == ["–", "+6.00"]


def gains_of(folder: Path, seed: int) -> list[float | None]:
    return gains(json.loads((folder / f"seed-{seed}" / "summary.json").read_text()))


@pytest.mark.parametrize("width", [1200, 700, 390])
def test_columns_of_the_comparison(browser, seeds, width):
    open_page(browser, seeds[-1], width)
    lines, sides, hidden = browser.execute_script("""
        const words = [...document.querySelectorAll('td:nth-child(2), th')];
        const range = document.createRange();
        const lines = words.filter(word => word.offsetParent).map(word => {
            range.selectNodeContents(word);
            return [...range.getClientRects()].length;
        });
        const cells = [...document.querySelectorAll('tbody tr')[1].cells];
        const box = document.querySelector('.wide');
        return [lines, cells.map(cell => getComputedStyle(cell).textAlign),
                box.scrollWidth - box.clientWidth];
    """)
    assert set(lines) == {1}, "a word is broken"
    assert sides == ["left"] + (["right"] if width == 1200 else ["left"]) * 5
    assert hidden <= 0


def test_columns_without_a_value_are_left_out():
    html = table(("a", "b", "c"), [TableRow(("2024-11-03", "–", "1")), TableRow(("1", "", "–"))])
    assert ">b<" not in html
    assert '<td class="text" title="a">1</td><td title="c">–</td>' in html


@pytest.mark.parametrize(
    "cell", ["1", "−0.50", "+1.00 ± 0.20", "97.50%", "1e-07", "3 of 30", "2 h"]
)
def test_numbers_are_told_from_words(cell):
    assert are_numbers([cell, "–"])
    assert not are_numbers([cell, "e1"])
    assert not are_numbers([cell, "end"])


def test_numbers_have_one_minus_and_no_negative_nothing():
    assert percent(spread([-0.02, -0.04]), signed=True) == "−3.00 ± 1.41"
    assert percent(spread([-1e-9]), signed=True) == "+0.00"
    assert percent(spread([0.5]), unit="%") == "50.00%"
    assert percent(spread([0.5, None])) == percent(spread([])) == "–"


def test_only_runs_that_differ_in_the_seed_are_averaged(browser, tmp_path):
    make_seeds(tmp_path, 4)
    other, again = tmp_path / "seed-1", tmp_path / "seed-3"
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["loss"] = {"temperature": 4.0}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    # A seed twice, with another loader and elsewhere, counts once.
    settings = yaml.safe_load((tmp_path / "seed-0" / "config.yaml").read_text())
    settings["data"] = {"source": "/moved/digits", "loader": "torch"}
    (again / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = json.loads((again / "summary.json").read_text())
    (again / "summary.json").write_text(json.dumps(summary | {"seed": 0}))
    for run in (tmp_path / "seed-0", tmp_path / "seed-2", again, other):
        (run / "inputs.json").write_text('{"the test images": "c0ffee"}')
    write_report([tmp_path / f"seed-{seed}" for seed in range(4)], tmp_path / "page.html")
    plots = open_page(browser, tmp_path / "page.html")
    rows = table_rows(browser)
    names = [row[0] for row in rows]
    assert names == ["seed-0", "seed-2", "seed-3", "mean ± deviation, n = 2", "seed-1"]
    assert [row[1] for row in rows] == ["", "", "repeats seed-0", "", "loss.temperature=4.0"]
    assert rows[3][2] == "0, 2"
    assert rows[3][3] == f"96.00 ± {100 * stdev([0.95, 0.97]):.2f}%"
    assert [name for name in plots if name.startswith("gain")] == ["gain-1", "gain-2"]
    assert not browser.find_elements("css selector", ".warning")


def test_comparison_tells_data_sets_and_runs_apart(browser, tmp_path):
    nasty = "<i>&amp;"
    for place, data in (("a", "digits"), ("b", nasty)):
        (tmp_path / place).mkdir()
        make_run(tmp_path / place / "run", mentors=("resnet20", nasty), data=data)
    unfinished = tmp_path / "b" / "killed"
    make_run(unfinished, mentors=("resnet20", nasty), epochs=5)
    (unfinished / "summary.json").unlink()
    *lines, last = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines) + last[:90])
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", unfinished]
    plots = open_page(browser, write_report(runs, tmp_path / "page.html"))
    assert plots["accuracy"]["legend"] == [
        "a/run on digits",
        "killed on digits",
        f"b/run on {nasty}",
        "student alone: a/run on digits",
        f"student alone: b/run on {nasty}",
    ]
    first, *_, last = (plot for name, plot in plots.items() if "active_share" in name)
    assert first["legend"] == ["resnet20 (mentor)", f"{nasty} (mentor)"]
    colours = [colours_of(plot)["resnet20 (mentor)"] for plot in (first, last)]
    assert colours[0] == colours[1]
    rows = {row[0]: row for row in table_rows(browser)}
    assert list(rows) == ["a/run", "killed", "b/run"], "those of one recipe stand together"
    # run, what differs, data, epochs, seed, top-1, best, alone and gain
    assert rows["b/run"][1:3] == [f"data={nasty}", nasty]
    assert rows["killed"][3] == "4 of 5"
    assert rows["killed"][5:7] == ["–", "–"]
    assert rows["killed"][7].endswith("%"), "the student alone has finished"
    assert rows["killed"][8] == "–"
    warnings = [w.text for w in browser.find_elements("css selector", ".warning")]
    assert warnings[0].startswith(
        f"These runs were measured on different data sets (digits, {nasty})"
    )
    assert any("killed is unfinished" in line for line in warnings)
    assert any("of metrics.jsonl in killed" in line for line in warnings)


def test_held_out_images_that_differ_are_told(tmp_path):
    runs = two_seeds(tmp_path)
    for run in runs:
        page = write_report(runs, tmp_path / "page.html").read_text()
        assert 'class="warning"' not in page
        (run / "inputs.json").write_text(json.dumps({"the test images": run.name}))
    page = write_report(runs, tmp_path / "page.html").read_text()
    (line,) = re.findall('class="warning">(.*)', page)
    assert line.startswith("The runs on digits held out different images")
    assert "mean ± deviation, n = 2" in page, "they are of one data set all the same"


def test_where_pages_are_written(tmp_path, monkeypatch):
    runs = two_seeds(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert write_report([runs[0]]) == runs[0] / "report.html"
    assert write_report([runs[0], tmp_path / "." / "seed-0"]) == runs[0] / "report.html"
    for _ in range(2):  # its own page it replaces
        assert write_report(runs).resolve() == tmp_path / "comparison.html"
    assert write_report(runs[0], tmp_path / "comparison.html") == tmp_path / "comparison.html"
    (tmp_path / "thesis.html").write_text("<html>three years of work</html>")
    for out, message in (
        ("thesis.html", "is not a page of classroomkd: give --out another file"),
        ("seed-0", "it is a folder"),
        ("missing/page.html", "missing is not a folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            write_report(runs, tmp_path / out)
        assert "\n" not in str(error.value)
    assert (tmp_path / "thesis.html").read_text() == "<html>three years of work</html>"
    with pytest.raises(UserError, match="no run to report"):
        write_report([])
    with pytest.raises(UserError, match=r"no metrics\.jsonl in"):
        write_report([runs[0], tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("config", ["data: [", "- a\n- b\n", "data: {source: /sets/digits}\n"])
def test_any_configuration_can_be_reported(tmp_path, config):
    run = tmp_path / "run"
    make_run(run)
    (run / "summary.json").unlink()
    (run / "config.yaml").write_text(config)
    page = write_report(run).read_text()
    assert ("<h1>Classroom of resnet8 on digits</h1>" in page) == ("digits" in config)
    write_report([run, shutil.copytree(run, tmp_path / "copy")], tmp_path / "page.html")


def test_runs_that_differ_in_no_setting_tell_what_else_differs(tmp_path):
    runs = two_seeds(tmp_path)
    settings = yaml.safe_load((runs[0] / "config.yaml").read_text()) | {"seed": 0}
    for run, threads in zip(runs, (1, 8), strict=True):
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"threads": threads}))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"seed": 0}))
    page = write_report(runs, tmp_path / "page.html").read_text()
    assert ">threads=1<" in page
    assert ">threads=8, repeats seed-0<" in page


def test_charts_side_by_side_have_one_order_and_scale_of_the_classes(browser, tmp_path):
    runs = two_seeds(tmp_path)
    settings = yaml.safe_load((runs[1] / "config.yaml").read_text())
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(settings | {"loss": {"ranking": "batch"}}))
    plots = open_page(browser, write_report(runs, tmp_path / "page.html"))
    first, second = plots["gain-1"], plots["gain-2"]
    assert first["yticks"] == second["yticks"]
    assert first["xticks"] == second["xticks"]
    drawn = [abs(row[1]) for plot in (first, second) for row in plot["table"][1:]]
    highest, lowest = measured(first, first["frame"])
    assert max(drawn) < highest == pytest.approx(-lowest, rel=1e-3)


def test_gains_of_nothing_are_told_in_words(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    summary = tell_classes(run, CLASSES)
    assert 'id="gain"' in write_report(run).read_text()
    summary["results"][-1]["per_class"] = summary["results"][-2]["per_class"]
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(run).read_text()
    assert 'id="gain"' not in page
    assert "Gain per class" in page
    assert "It is 0 for each of the 9 classes." in page


def test_curves_that_end_near_one_another_at_the_top_are_told_apart(browser, tmp_path):
    run = tmp_path / "run"
    records, _ = make_run(run, mentors=("resnet56", "resnet32"), given=())
    ends = {"mentor": 0.97, "alone": 0.98, "student": 1.0}
    for record in records:
        if record["epoch"] == 30:
            record["test_top1"] = ends[record["phase"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plot = open_page(browser, write_report(run))["accuracy"]
    ends = [curve["marks"][-1][1] for curve in plot["curves"]]
    heights = dict(zip(plot["legend"], ends, strict=True))
    (error,) = measured(plot, [heights["resnet8 alone"]], log_error)
    assert heights["resnet32 (mentor)"] - heights["resnet8 alone"] > 15, "pixels"
    assert heights["resnet8 alone"] > heights["resnet8 in the classroom"] > 0
    assert error == pytest.approx(math.log10(2), abs=0.005)
    assert "100" in [text for text, _ in plot["yticks"]]
    assert len(plot["yticks"]) >= 5


def test_the_page_tells_time_machine_and_command(tmp_path):
    run = tmp_path / "run"
    _, summary = make_run(run, given=())
    summary["results"][0]["reused"] = True  # its epochs took another run's time
    (run / "summary.json").write_text(json.dumps(summary))
    versions = {"torch": "2.13.0", "triton": "3.7.1"}
    starts = [
        {"started": "2026-01-02T03:04:05+00:00", "command": command, "device": "cpu"}
        | {"processor": "Abacus <9>", "cores": 8, "threads": 1, "processes": 2}
        | {"versions": versions}
        for command in ("classroomkd train --data 'a b'", "classroomkd train --resume run")
    ]
    lines = [json.dumps(start) for start in starts] + ['{"started": "20']
    (run / "starts.jsonl").write_text("\n".join(lines))
    page = write_report(run).read_text()
    # 5 mentors and 2 students, 30 epochs of 0.24 seconds each
    assert "took: mentors 36 s, student 14 s." in page
    hardware = "cpu · Abacus &lt;9&gt; · 8 cores · 1 thread · 2 processes · torch 2.13.0 · triton"
    assert page.count(hardware) == 2
    assert "<pre>classroomkd train --data &#x27;a b&#x27;</pre>" in page
    assert "<pre>classroomkd train --resume run</pre>" in page
    (run / "summary.json").unlink()
    assert "<pre>classroomkd train --resume run</pre>" in write_report(run).read_text()
