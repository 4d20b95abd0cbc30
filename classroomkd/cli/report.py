"""`classroomkd report`: the page of a run, or of several."""

from __future__ import annotations

import argparse
from typing import Any

from classroomkd.cli.arguments import add_command, path_option


def add_to(commands: Any) -> None:
    what = "write the page of a run, or one that compares several"
    parser = add_command(commands, report, what)
    parser.add_argument(
        "runs", type=path_option, nargs="+", metavar="RUN", help="run folders, finished or not"
    )
    parser.add_argument(
        "--out",
        type=path_option,
        metavar="FILE.html",
        help="(default: RUN/report.html; of several runs ./comparison.html)",
    )
    parser.add_argument(
        "--export",
        type=path_option,
        metavar="DIR",
        help="also write each plot as SVG, PDF and CSV and each table as LaTeX and CSV into DIR",
    )


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a run, or one that compares several."""
    from classroomkd.report.records import require_records

    for folder in arguments.runs:  # before importing matplotlib, which is slow
        require_records(folder)
    from classroomkd.report.page import write_report

    print(f"report: {write_report(arguments.runs, arguments.out, export=arguments.export)}")
    if arguments.export:
        print(f"exported to {arguments.export}")
