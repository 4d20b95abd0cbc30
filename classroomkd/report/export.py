"""What a paper includes of a page: its plots and tables as files."""

from __future__ import annotations

from pathlib import Path

from classroomkd.files import atomic_write
from classroomkd.report.markup import Page, Table
from classroomkd.report.numbers import UNKNOWN, are_numbers, csv_text, filled

_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "−": "$-$", "–": "--", "τ": r"$\tau$", "<": "$<$", ">": "$>$", "|": "$|$"}
)


def export(page: Page, folder: Path) -> None:
    """Write the plots as SVG, PDF and CSV, and the tables as LaTeX and CSV, named by their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in page.blocks:
        if isinstance(block, Table):
            atomic_write(folder / f"{block.id}.tex", latex(block))
            atomic_write(folder / f"{block.id}.csv", table_csv(block))
        elif not isinstance(block, str):
            for plot in block:
                if plot.drawing:
                    atomic_write(folder / f"{plot.id}.csv", plot.drawing.csv)
                    for kind in (".svg", ".pdf"):
                        atomic_write(folder / f"{plot.id}{kind}", plot.drawing.file(kind, plot.id))


def latex(table: Table) -> str:
    """The table as a tabular with the rules of the package booktabs."""
    columns, rows = filled(table.columns, [row.cells for row in table.rows])
    texts = [n == 0 or not are_numbers([row[n] for row in rows]) for n in range(len(columns))]
    head, *body = (
        " & ".join(" ".join(cell.translate(_LATEX).split()) for cell in line) + r" \\"
        for line in (columns, *rows)
    )
    aligned = "".join("l" if text else "r" for text in texts)
    lines = [rf"\begin{{tabular}}{{{aligned}}}  % \usepackage{{booktabs}}", r"\toprule", head]
    lines += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def table_csv(table: Table) -> str:
    """The table's cells as they are shown, with ASCII's minus; what is unknown is empty."""
    columns, rows = filled(table.columns, [row.cells for row in table.rows])
    shown = (["" if cell == UNKNOWN else cell.replace("−", "-") for cell in row] for row in rows)
    return csv_text(columns, shown)
