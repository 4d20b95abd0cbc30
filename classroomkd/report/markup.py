"""The HTML of a page: a single file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.io

from classroomkd.report.axes import Plot
from classroomkd.report.numbers import are_numbers, filled

GENERATOR = '<meta name="generator" content="classroomkd">'  # identifies our pages

_STYLE = """
:root { color-scheme: light; overflow-y: scroll; }
* { box-sizing: border-box; }
body { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; color: #222; background: #fff;
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 0; font-size: 1.1rem; }
p { margin: .25rem 0 1rem; }
.note { color: #595959; font-size: .875rem; max-width: 48rem; }
.warning { padding: .5rem .75rem; background: #fff6e0; border-left: 4px solid #e69f00; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1rem; }
table { margin-top: 1rem; border-collapse: collapse; font-size: .875rem;
        font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th { font-weight: 600; color: #595959; vertical-align: bottom; }
.text { text-align: left; white-space: normal; }
.text:first-child { min-width: 10rem; }
.student td, .mean td { font-weight: 600; }
.mean td { border-bottom-color: #767676; }
i { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.plots { display: grid; gap: 2rem; margin: 2rem 0;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
section { min-width: 0; display: flex; flex-direction: column; }
section .note { flex: 1; }  /* aligns plots side by side */
section.whole { grid-column: 1 / -1; }
summary { cursor: pointer; font-weight: 600; }
pre { padding: .75rem; background: #f6f6f6; overflow-x: auto; font-size: .8125rem; }
"""
# If a table does not fit, its rows become paragraphs, with the column's name beside each number.
_NARROW = """@media (max-width: WIDTH) {
  TABLE { width: 100%; overflow-wrap: anywhere; }
  TABLE thead { display: none; }
  TABLE tr { display: grid; column-gap: .5rem; padding: .3rem 0; border-bottom: 1px solid #ddd;
             grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
  TABLE td { padding: 0; border: 0; text-align: left; white-space: normal; }
  TABLE .text:first-child { grid-column: 1 / -1; }
  TABLE td:not(.text:first-child)::before { content: attr(title) " "; color: #595959;
                                            font-weight: 400; }
}
"""
for _width, _table in ("40rem", "table"), ("72rem", "table.broad"):
    _STYLE += _NARROW.replace("WIDTH", _width).replace("TABLE", _table)


def document(title: str, body: str) -> str:
    """A complete page; ``body`` is HTML and ``title`` is text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def warning(text: str) -> str:
    """A highlighted warning."""
    return f'<p class="warning">{escape(text)}</p>'


class TableRow(NamedTuple):
    """A row of a table: ``kind`` is its CSS class, ``colour`` that of its curve."""

    cells: Sequence[str]
    kind: str = ""
    colour: str = ""


def table(columns: Sequence[str], rows: Sequence[TableRow], broad: bool = False) -> str:
    """A table without empty columns; the first column holds names.

    A ``broad`` table, or one with many columns, is shown as paragraphs except on wide screens.
    """
    columns, cells = filled(columns, [row.cells for row in rows])
    texts = [n == 0 or not are_numbers([row[n] for row in cells]) for n in range(len(columns))]
    styles = [' class="text"' * text for text in texts]
    head = "".join(
        f"<th{style}>{escape(column)}</th>" for column, style in zip(columns, styles, strict=True)
    )
    body = ""
    for row, kept in zip(rows, cells, strict=True):
        dots = [f'<i style="background:{row.colour}"></i>' * bool(row.colour)]
        dots += [""] * (len(columns) - 1)
        tagged = (
            f'<td{style} title="{escape(column)}">{dot}{escape(text)}</td>'
            for column, style, dot, text in zip(columns, styles, dots, kept, strict=True)
        )
        body += f'<tr class="{row.kind}">{"".join(tagged)}</tr>'
    kind = ' class="broad"' * (broad or len(columns) > 9)
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; pipes and line breaks in cells are replaced."""
    texts = [not are_numbers([row[n] for row in rows]) for n in range(len(columns))]
    lines = [columns, ["---" if text else "---:" for text in texts], *rows]
    cleaned = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cleaned)


def sections(plots: Sequence[Plot]) -> str:
    """The plots, with plotly's library included once, in the first figure."""
    first = next((plot for plot in plots if plot.figure), None)
    drawn = "".join(_section(plot, with_library=plot is first) for plot in plots)
    return f'<div class="plots">{drawn}</div>'


def _section(plot: Plot, with_library: bool) -> str:
    figure = plot.figure and plotly.io.to_html(
        plot.figure,
        full_html=False,
        include_plotlyjs=with_library,
        div_id=plot.id,
        config={
            "displaylogo": False,
            "displayModeBar": "hover",
            # By default plotly adds a button that uploads the plot.
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        },
    )
    return (
        f"<section{' class=whole' * plot.wide}><h2>{escape(plot.heading)}</h2>"
        f'<p class="note">{escape(plot.note)}</p>{figure or ""}</section>\n'
    )
