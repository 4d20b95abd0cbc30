"""A table's results as Markdown and as an HTML page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from classroomkd.files import atomic_write
from classroomkd.report.axes import ALONE, COLOURS, Axis
from classroomkd.report.drawing import Plot, dots
from classroomkd.report.export import export
from classroomkd.report.markup import Block, Page, Table, TableRow, markdown_table, warning
from classroomkd.report.numbers import UNKNOWN, counted, duration, filled, image_counts, percent
from classroomkd.report.published import PUBLISHED, PUBLISHED_EPOCHS, PUBLISHED_FROM, Published

Rows = list[list[str]]

_NOTES = {
    "teacher": "teacher: the first mentor after its last epoch",
    "last": "last: after the last epoch",
    "best": "best: the highest of any epoch, selected on the same images, as papers print it",
    "chosen": "chosen: the epoch that is best on the validation images",
    "over alone": "over alone: last minus that of alone with the same seed, in percentage points",
    "over kd": "over kd: last minus that of kd with the same seed, in percentage points",
    "time per run": "time per run: the mean, without training the mentors",
}


def write_tables(results: Mapping[str, Any], title: str, out: Path) -> list[Path]:
    """Write tables/TABLE.md and tables/TABLE.html in ``out`` from the content of results.json.

    What a paper includes of the page is in the folder tables/TABLE, as `export` writes it.
    """
    name = results["table"]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    paths = [out / "tables" / f"{name}.{kind}" for kind in ("md", "html")]
    atomic_write(paths[0], markdown(results, title))
    page = _page(results, title)
    atomic_write(paths[1], page.html())
    export(page, out / "tables" / name)
    return paths


def markdown(results: Mapping[str, Any], title: str) -> str:
    """The table as Markdown, under a level-2 heading."""
    blocks = [f"## {title}", *_facts(results)]
    blocks += [f"**{line}**" for line in _warnings(results)]
    blocks += [
        _note(results),
        *(markdown_table(*filled(*part)) for part in _parts(results).values()),
    ]
    if _published(results):
        blocks.append(PUBLISHED_FROM)
    return "\n\n".join(blocks) + "\n"


def _page(results: Mapping[str, Any], title: str) -> Page:
    blocks: list[Block] = [f"<p>{escape(line)}</p>" for line in _facts(results)]
    blocks += map(warning, _warnings(results))
    for name, (columns, rows) in _parts(results).items():
        blocks.append(Table(name, columns, [TableRow(row) for row in rows]))
    notes = [_note(results), *([PUBLISHED_FROM] if _published(results) else [])]
    blocks += [f'<p class="note">{escape(note)}</p>' for note in notes]
    return Page(title, [*blocks, _plots(results)])


def _note(results: Mapping[str, Any]) -> str:
    """The meaning of the columns that are shown."""
    columns, _ = filled(*result_cells(results))
    notes = "; ".join(text for column, text in _NOTES.items() if column in columns)
    return (
        "Top-1 in percent on the held-out images (the data set's test part, or a split if it has "
        f"none), mean ± sample standard deviation over the seeds. Columns: {notes}."
    )


def _facts(results: Mapping[str, Any]) -> list[str]:
    """Data, training, classrooms, seeds, device and versions of the runs."""
    runs = results["runs"]
    if not runs:
        return ["No run has finished yet."]
    sets = {f"{run['data']} ({image_counts(run)})" for run in runs}
    epochs = {f"{counted(run['epochs'], 'epoch')} (mentors {run['mentor_epochs']})" for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    shared = f"Seeds: {_listed(map(str, seeds))}, sharing the mentors."
    firsts = {group["classroom"]: group for group in reversed(results["groups"])}
    classrooms = {
        f"{name} ({group['student']} ← {' '.join(group['mentors'])})"
        for name, group in firsts.items()
    }
    return [
        f"Data: {_listed(sets)}. Training: {_listed(epochs)}. Classrooms (student ← "
        f"mentors): {_listed(classrooms)}. "
        f"{shared if len(seeds) > 1 else f'Seed: {seeds[0]}.'} {counted(len(runs), 'run')} on "
        f"{_listed({run['device'] for run in runs})}, with classroomkd "
        f"{_listed({run['classroomkd'] for run in runs})} and torch "
        f"{_listed({run['torch'] for run in runs})}, "
        f"{duration(sum(run['seconds'] for run in runs))} without training the mentors."
    ]


def _warnings(results: Mapping[str, Any]) -> list[str]:
    runs, lines = results["runs"], []
    why = []
    if others := sorted({run["data"] for run in runs if not run["cifar100"]}):
        why.append(f"the data is {_listed(others)}, not CIFAR-100")
    if others := sorted({run["epochs"] for run in runs if run["epochs"] != PUBLISHED_EPOCHS}):
        why.append(f"the epochs are {_listed(map(str, others))}, not {PUBLISHED_EPOCHS}")
    if why:
        lines.append(f"Not comparable with published numbers: {', and '.join(why)}.")
    if len({run["test_digest"] for run in runs}) > 1:
        lines.append("The runs were not all measured on the same held-out images.")
    return lines


def _parts(results: Mapping[str, Any]) -> dict[str, tuple[list[str], Rows]]:
    """Tables as columns and rows: an overview if there are several classrooms, then all groups."""
    groups = results["groups"]
    classrooms = list(dict.fromkeys(group["classroom"] for group in groups))
    parts = {"overview": _overview(results, classrooms)} if len(classrooms) > 1 else {}
    parts["results"] = result_cells(results)
    if len(classrooms) == 1 and (published := _published(results)):
        (numbers,) = published.values()
        columns = [f"published {field}" for field in Published._fields]
        parts["published"] = columns, [[f"{number:.2f}" for number in numbers]]
    return parts


def result_cells(results: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Columns, and a row of text for each classroom and variant."""
    columns = ["classroom", "variant", "seeds", "teacher", "last", "best", "chosen"]
    columns += ["over alone", "over kd", "time per run"]
    keys = ("last", "best", "chosen", "over_alone", "over_kd")
    rows = [
        [
            group["classroom"],
            group["variant"],
            str(len(group["seeds"])),
            percent(group["teacher_last"] and (group["teacher_last"], None)),
            *(percent(group[key], signed=key.startswith("over")) for key in keys),
            duration(group["seconds"][0]),
        ]
        for group in results["groups"]
    ]
    return columns, rows


def _overview(results: Mapping[str, Any], classrooms: Sequence[str]) -> tuple[list[str], Rows]:
    groups, published = results["groups"], _published(results)
    last = {(group["classroom"], group["variant"]): group["last"] for group in groups}
    variants = list(dict.fromkeys(group["variant"] for group in groups))
    # The first column has no name: "classroom" is also the name of a variant.
    columns = ["", "teacher", *variants]
    if published:
        columns += [f"published {field}" for field in Published._fields]
    rows = []
    for classroom in classrooms:
        teachers = {
            group["teacher_last"]
            for group in groups
            if group["classroom"] == classroom and group["teacher_last"] is not None
        }
        row = [classroom, percent((max(teachers), None)) if len(teachers) == 1 else UNKNOWN]
        row += [percent(last.get((classroom, variant))) for variant in variants]
        if published:
            numbers = published.get(classroom) or [None] * len(Published._fields)
            row += [UNKNOWN if number is None else f"{number:.2f}" for number in numbers]
        rows.append(row)
    if len(columns) > 10 and len(columns) > len(rows):  # wider than a page
        columns, *rows = map(list, zip(columns, *rows, strict=True))
    return columns, rows


def _published(results: Mapping[str, Any]) -> dict[str, Published]:
    """The published numbers of the classrooms, looked up by teacher and student."""
    found = {}
    for run in results["runs"]:
        numbers = PUBLISHED.get((run["mentors"].partition(" ")[0], run["student"]))
        if numbers and run["variant"] in ("alone", "kd", "classroom"):
            found[run["classroom"]] = numbers
    return found


def _plots(results: Mapping[str, Any]) -> list[Plot]:
    """One plot per classroom, with every run and the mean and deviation of each variant."""
    plots = []
    for number, classroom in enumerate(dict.fromkeys(g["classroom"] for g in results["groups"])):
        groups = [
            group
            for group in results["groups"]
            if group["classroom"] == classroom and group["last"] is not None
        ]
        runs = [run for run in results["runs"] if run["classroom"] == classroom]
        means = [
            (group["variant"], *group["last"], ALONE if group["variant"] == "alone" else COLOURS[0])
            for group in groups
        ]
        each = [
            (run["variant"], run["last"], run["seed"]) for run in runs if run["last"] is not None
        ]
        axis = Axis("held-out top-1 (%)", percent=True, tip=".2%")
        note = (
            "Top-1 after the last epoch: a line per run, a dot for the mean, and bars of ± one "
            "sample standard deviation."
        )
        heading = f"Top-1 of {classroom}"
        plots.append(Plot(f"plot-{number}", heading, note, dots(means, each, axis)))
    return plots


def _listed(words: Any) -> str:
    return ", ".join(sorted(words) if isinstance(words, set) else words)
