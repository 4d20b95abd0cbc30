"""A table's results as Markdown, to be included anywhere, and as a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from classroomkd.files import atomic_write
from classroomkd.report.document import document, sections, table, warning
from classroomkd.report.figures import COLOURS, MARKERS, Plot, framed
from classroomkd.reproduce.status import duration
from classroomkd.reproduce.tables import (
    PUBLISHED,
    PUBLISHED_EPOCHS,
    PUBLISHED_FROM,
    TABLES,
    Published,
)

Rows = list[list[str]]

_NOTES = (
    "Top-1 in percent on the test images, mean ± sample standard deviation over the seeds. last is "
    "after the last epoch; best is the highest of any epoch, chosen on the test images, as papers "
    "print it; chosen is the epoch that does best on the validation images. over alone and over kd "
    "are differences of last, in percentage points, between runs of the same seed."
)


def write_tables(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Write tables/TABLE.md and tables/TABLE.html in ``out``, of what results.json holds."""
    name = results["table"]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    paths = [out / "tables" / f"{name}.{kind}" for kind in ("md", "html")]
    atomic_write(paths[0], markdown(results))
    atomic_write(paths[1], _page(results))
    return paths


def markdown(results: Mapping[str, Any]) -> str:
    """The table as Markdown, below a heading of the second level."""
    blocks = [f"## {TABLES[results['table']].title}", *_facts(results)]
    blocks += [f"**{line}**" for line in _warnings(results)]
    blocks += [_NOTES, *(_markdown_table(*part) for part in _parts(results))]
    if _published(results):
        blocks.append(PUBLISHED_FROM)
    return "\n\n".join(blocks) + "\n"


def _markdown_table(columns: Sequence[str], rows: Rows) -> str:
    left = {"classroom", "variant", "mentors"}
    rule = ["---" if column in left else "---:" for column in columns]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _page(results: Mapping[str, Any]) -> str:
    body = "".join(f"<p>{escape(line)}</p>" for line in _facts(results))
    body += "".join(map(warning, _warnings(results)))
    for columns, rows in _parts(results):
        cells = ("</td><td>".join(map(escape, row)) for row in rows)
        body += table("groups", columns, "".join(f"<tr><td>{row}</td></tr>" for row in cells))
    notes = [_NOTES, *([PUBLISHED_FROM] if _published(results) else [])]
    body += "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return document(TABLES[results["table"]].title, body + sections(_plots(results)))


def _facts(results: Mapping[str, Any]) -> list[str]:
    """What was run, on what."""
    runs = results["runs"]
    if not runs:
        return ["No run has finished yet."]
    sets = {
        f"{run['data']} ({run['classes']} classes; {run['train_images']:,} training, "
        f"{run['validation_images']:,} validation and {run['test_images']:,} test images)"
        for run in runs
    }
    epochs = {f"{run['epochs']} epochs (mentors {run['mentor_epochs']})" for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    firsts = {group["classroom"]: group for group in reversed(results["groups"])}
    recipes = {
        f"{name} ({group['student']} ← {' '.join(group['mentors'])})"
        for name, group in firsts.items()
    }
    return [
        f"Data: {_listed(sets)}. Training: {_listed(epochs)}. Recipes: {_listed(recipes)}. "
        f"Seeds: {_listed(map(str, seeds))}; they share the mentors. {len(runs)} runs on "
        f"{_listed({run['device'] for run in runs})}, with classroomkd "
        f"{_listed({run['classroomkd'] for run in runs})} and torch "
        f"{_listed({run['torch'] for run in runs})}, "
        f"{duration(sum(run['seconds'] for run in runs))} without the mentors' training."
    ]


def _warnings(results: Mapping[str, Any]) -> list[str]:
    runs, lines = results["runs"], []
    why = []
    if others := sorted({run["data"] for run in runs if not run["cifar100"]}):
        why.append(f"the data is {_listed(others)}, not CIFAR-100")
    if others := sorted({run["epochs"] for run in runs if run["epochs"] != PUBLISHED_EPOCHS}):
        why.append(f"the epochs are {_listed(map(str, others))}, not {PUBLISHED_EPOCHS}")
    if why:
        lines.append(f"Not to be compared with published numbers: {', and '.join(why)}.")
    if len({run["test_digest"] for run in runs}) > 1:
        lines.append("Not all runs were measured on the same test images.")
    return lines


def _parts(results: Mapping[str, Any]) -> list[tuple[list[str], Rows]]:
    """Tables as columns and rows: one line a classroom where there are several, then all groups."""
    groups = results["groups"]
    classrooms = list(dict.fromkeys(group["classroom"] for group in groups))
    parts = [_overview(results, classrooms)] if len(classrooms) > 1 else []
    parts.append(result_cells(results))
    if len(classrooms) == 1 and (published := _published(results)):
        (numbers,) = published.values()
        columns = [f"published {field}" for field in Published._fields]
        parts.append((columns, [[f"{number:.2f}" for number in numbers]]))
    return parts


def result_cells(results: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Columns, and a row of text for each classroom and variant."""
    columns = ["classroom", "variant", "seeds", "teacher", "last", "best", "chosen"]
    columns += ["over alone", "over kd", "time of a run"]
    keys = ("last", "best", "chosen", "over_alone", "over_kd")
    rows = [
        [
            group["classroom"],
            group["variant"],
            str(len(group["seeds"])),
            _percent(group["teacher_last"] and [group["teacher_last"], None]),
            *(_percent(group[key], signed=key.startswith("over")) for key in keys),
            duration(group["seconds"][0]),
        ]
        for group in results["groups"]
    ]
    return columns, rows


def _overview(results: Mapping[str, Any], classrooms: Sequence[str]) -> tuple[list[str], Rows]:
    groups, published = results["groups"], _published(results)
    last = {(group["classroom"], group["variant"]): group["last"] for group in groups}
    variants = list(dict.fromkeys(group["variant"] for group in groups))
    columns = ["classroom", "teacher", *variants]
    if published:
        columns += [f"published {field}" for field in Published._fields]
    rows = []
    for classroom in classrooms:
        teachers = {
            group["teacher_last"]
            for group in groups
            if group["classroom"] == classroom and group["teacher_last"] is not None
        }
        row = [classroom, _percent([max(teachers), None]) if len(teachers) == 1 else "–"]
        row += [_percent(last.get((classroom, variant))) for variant in variants]
        if published:
            numbers = published.get(classroom) or [None] * len(Published._fields)
            row += ["–" if number is None else f"{number:.2f}" for number in numbers]
        rows.append(row)
    return columns, rows


def _published(results: Mapping[str, Any]) -> dict[str, Published]:
    """What is known of the classrooms, by their teachers and students."""
    found = {}
    for run in results["runs"]:
        numbers = PUBLISHED.get((run["mentors"].partition(" ")[0], run["student"]))
        if numbers and run["variant"] in ("alone", "kd", "classroom"):
            found[run["classroom"]] = numbers
    return found


def _plots(results: Mapping[str, Any]) -> list[Plot]:
    """One of each classroom: every run, and mean and deviation beside them."""
    plots = []
    for number, classroom in enumerate(dict.fromkeys(g["classroom"] for g in results["groups"])):
        groups = [group for group in results["groups"] if group["classroom"] == classroom]
        runs = [run for run in results["runs"] if run["classroom"] == classroom]
        colour = COLOURS[number % len(COLOURS)]
        traces = [
            go.Scatter(
                x=[group["variant"] for group in groups],
                y=[group["last"][0] for group in groups],
                error_y={"array": [group["last"][1] or 0.0 for group in groups]},
                mode="markers",
                marker={"size": 11, "color": colour, "symbol": MARKERS[number % len(MARKERS)]},
                name="mean ± deviation",
            ),
            go.Scatter(
                x=[run["variant"] for run in runs],
                y=[run["last"] for run in runs],
                text=[f"seed {run['seed']}" for run in runs],
                mode="markers",
                marker={"size": 7, "color": "#777777", "symbol": "line-ew-open"},
                name="a run",
            ),
        ]
        drawn = framed(
            traces, {"type": "category", "title": None}, {"title": "top-1", "tickformat": ".1%"}
        )
        drawn.update_layout(height=380, showlegend=False)
        note = "Test top-1 after the last epoch: every run, mean and sample standard deviation."
        plots.append(Plot(f"plot-{number}", classroom, note, drawn, wide=len(groups) > 8))
    return plots


def _percent(spread: Sequence[float | None] | None, signed: bool = False) -> str:
    if spread is None:
        return "–"
    middle, deviation = spread
    text = format(100 * middle, "+.2f" if signed else ".2f")
    return text if deviation is None else f"{text} ± {100 * deviation:.2f}"


def _listed(words: Any) -> str:
    return ", ".join(sorted(words) if isinstance(words, set) else words)
