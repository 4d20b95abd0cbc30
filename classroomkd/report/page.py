"""report.html for one run and comparison.html for several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.report.comparison import comparison
from classroomkd.report.export import export as write_files
from classroomkd.report.markup import GENERATOR, Block, Page, Table, TableRow, warning
from classroomkd.report.numbers import counted, duration, image_counts
from classroomkd.report.plots import colour, plots
from classroomkd.report.records import RunRecords, at_chance, incomplete, label, read_run
from classroomkd.report.run_table import COLUMNS, evidence, result_rows


def write_report(
    runs: Path | Sequence[Path], out: Path | None = None, *, export: Path | None = None
) -> Path:
    """Write the page of a run, or a comparison of several runs, and return its path.

    ``out`` defaults to report.html in the run folder of a single run, and to comparison.html in
    the current folder otherwise. Runs may be unfinished; duplicates are ignored. ``export`` is a
    folder for what a paper includes: each plot as SVG, PDF and CSV, each table as LaTeX and CSV.
    It is created, and files of the same names in it are replaced.

    Raises UserError if a folder does not exist or has no metrics.jsonl, or if ``out`` is a file
    that is not such a page, or ``export`` one.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else runs
    folders = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not folders:
        raise UserError("no run to report: give at least one run folder")
    if out is not None or len(folders) > 1:
        out = Path(out or "comparison.html")
        _require_ours(out)
    if export is not None and Path(export).exists() and not Path(export).is_dir():
        raise UserError(f"cannot export to {export}: it is not a folder")
    read = [read_run(folder) for folder in folders]
    page = _page(read[0]) if len(read) == 1 else comparison(read)
    out = out or folders[0] / "report.html"
    atomic_write(out, page.html().encode("utf-8", errors="replace"))
    if export is not None:
        write_files(page, Path(export))
    return out


def _require_ours(out: Path) -> None:
    """Raise UserError unless ``out`` does not exist or is a page written by this module."""
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: {out.parent} is not a folder")
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder; give --out a file in it")
    if out.exists():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(1000):
                raise UserError(
                    f"{out} exists and is not a page of classroomkd: give --out another file"
                )


def _page(run: RunRecords) -> Page:
    heading, facts = _title(run)
    return Page(
        heading,
        [
            f"<p>{escape(facts)}</p>",
            warning(incomplete(run) + ".") if run.unreadable else "",
            *(warning(f"{line}.") for line in at_chance(run)),
            *(_results(run, run.summary) if run.summary else [_progress(run)]),
            plots(run),
            f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>",
            _starts(run),
        ],
    )


def _title(run: RunRecords) -> tuple[str, str]:
    """The title of a run's page, and the line below it."""
    heading = "Mentors" if run.student is None else f"Classroom of {run.student}"
    if run.student and run.method != "classroom":
        phase = "alone" if run.method == "alone" else "student"
        heading = label(phase, run.student, run.method)
    if run.data:
        heading += f" on {run.data}"
    so_far = "" if run.summary or run.classroom else " so far:"
    facts = [f"mentors{so_far} {', '.join(run.mentors)}"] if run.mentors else []
    facts += [image_counts(run.summary["data"])] if run.summary else []
    facts += [counted(run.epochs, "epoch")] if run.epochs else []
    facts += [f"{key} {run.fact(key)}" for key in ("seed", "device") if run.fact(key) is not None]
    return heading, " · ".join(facts)


def _starts(run: RunRecords) -> str:
    """The time that the run took; hardware, versions and command line of each start."""
    times = {"mentors": run.seconds(mentors=True), "student": run.seconds(mentors=False)}
    told = [f"{who} {duration(seconds)}" for who, seconds in times.items() if seconds]
    blocks = [f"<p>Epochs trained and measured here took: {', '.join(told)}.</p>"] if told else []
    versions = (run.summary or {}).get("versions") or {}
    for start in run.starts or [{"versions": versions}]:
        facts = [str(start[key]) for key in ("started", "device", "processor") if start.get(key)]
        facts += [
            counted(start[f"{noun}{ending}"], noun, ending)
            for noun, ending in (("core", "s"), ("thread", "s"), ("process", "es"))
            if start.get(f"{noun}{ending}")
        ]
        facts += [f"{name} {version}" for name, version in (start.get("versions") or {}).items()]
        blocks.append(f'<p class="note">{escape(" · ".join(facts))}</p>')
        if command := start.get("command"):
            blocks.append(f"<pre>{escape(command)}</pre>")
    return f"<h2>How it was run</h2>{''.join(blocks)}"


def _results(run: RunRecords, summary: dict) -> list[Block]:
    rows = [
        TableRow(
            cells,
            "mentor" if result["phase"] == "mentor" else "student",
            colour(run, result["phase"], result["name"]),
        )
        for result, cells in zip(summary["results"], result_rows(summary), strict=True)
    ]
    note = f'<p class="note">{escape(evidence(summary))}</p>'
    return [Table("results", COLUMNS, rows), note]


def _progress(run: RunRecords) -> str:
    done = "".join(
        f"<li>{escape(label(*key, run.method))}: epoch {last['epoch']} of {last.get('epochs')}</li>"
        for key, (*_, last) in run.curves.items()
    )
    unfinished = (
        "Unfinished: this run has no summary.json yet; this is what it has recorded so far."
    )
    return f"{warning(unfinished)}<ul>{done or '<li>no epoch yet</li>'}</ul>"
