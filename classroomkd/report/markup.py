"""The HTML of a page: a single file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple
from urllib.parse import quote

from classroomkd.report.axes import DARK, themed
from classroomkd.report.drawing import Plot
from classroomkd.report.numbers import are_numbers, filled

GENERATOR = '<meta name="generator" content="classroomkd">'  # identifies our pages

_STYLE = """
:root { color-scheme: light dark; overflow-y: scroll; }
* { box-sizing: border-box; }
body { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 3rem;
       color: var(--text); background: var(--page); font: 1rem/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 0; font-size: 1.1rem; }
p { margin: .25rem 0 1rem; }
.note { color: var(--soft); font-size: .875rem; max-width: 48rem; }
.warning { padding: .5rem .75rem; background: var(--alert); border-left: 4px solid #e69f00; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1rem; }
table { margin-top: 1rem; border-collapse: collapse; font-size: .875rem;
        font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right;
         white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
.text { text-align: left; white-space: normal; }
.text:first-child { min-width: 10rem; }
.student td, .mean td { font-weight: 600; }
.mean td { border-bottom-color: var(--soft); }
i { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.plots { display: grid; gap: 2rem; margin: 2rem 0;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
section { min-width: 0; display: flex; flex-direction: column; }
section h2 + .note { flex: 1; }  /* aligns plots side by side */
section.whole { grid-column: 1 / -1; }
.figure { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg.narrow { min-width: 28rem; }
svg.wide { min-width: 70rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif; }
.tips rect { fill: transparent; }
.tips rect:hover { fill: rgba(128, 128, 128, .2); }
a { color: inherit; }
@media print {
  .figure { overflow-x: visible; }
  svg[class] { min-width: 0; }
  section { break-inside: avoid; }
}
summary { cursor: pointer; font-weight: 600; }
pre { padding: .75rem; background: var(--code); overflow-x: auto; font-size: .8125rem; }
"""
# If a table does not fit, its rows become paragraphs, with the column's name beside each number.
_NARROW = """@media (max-width: WIDTH) {
  TABLE { width: 100%; overflow-wrap: anywhere; }
  TABLE thead { display: none; }
  TABLE tr { display: grid; column-gap: .5rem; padding: .3rem 0;
             border-bottom: 1px solid var(--rule);
             grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
  TABLE td { padding: 0; border: 0; text-align: left; white-space: normal; }
  TABLE .text:first-child { grid-column: 1 / -1; }
  TABLE td:not(.text:first-child)::before { content: attr(title) " "; color: var(--soft);
                                            font-weight: 400; }
}
"""
for _width, _table in ("40rem", "table"), ("72rem", "table.broad"):
    _STYLE += _NARROW.replace("WIDTH", _width).replace("TABLE", _table)

# Variables of the style sheet, in a light scheme and in a dark one.
_SCHEMES = {
    "text": ("#222222", "#e6e6e6"),
    "page": ("#ffffff", "#1b1b1b"),
    "soft": ("#595959", "#a8a8a8"),
    "rule": ("#dddddd", "#3a3a3a"),
    "code": ("#f6f6f6", "#262626"),
    "alert": ("#fff6e0", "#3a2f14"),
} | {colour[1:]: (colour, dark) for colour, dark in DARK.items()}
_LIGHT, _DARK = (
    "".join(f"--{name}: {colours[scheme]}; " for name, colours in _SCHEMES.items())
    for scheme in (0, 1)
)
_STYLE += f":root {{ {_LIGHT}}}\n"
_STYLE += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK}}} }}\n"


def warning(text: str) -> str:
    """A highlighted warning."""
    return f'<p class="warning">{escape(text)}</p>'


class TableRow(NamedTuple):
    """A row of a table: ``kind`` is its CSS class, ``colour`` that of its curve."""

    cells: Sequence[str]
    kind: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text with its id, which names its files; see `table`."""

    id: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    broad: bool = False


Block = str | Table | Sequence[Plot]


@dataclass(frozen=True)
class Page:
    """A page: its title, and its parts in order, which are HTML, tables and plots."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """The whole file."""
        title, body = escape(self.title), "\n".join(map(_html, self.blocks))
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _html(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Table):
        return table(block.columns, block.rows, block.broad)
    return f'<div class="plots">{"".join(map(_section, block))}</div>'


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
        dots = [f'<i style="background:{themed(row.colour)}"></i>' * bool(row.colour)]
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


def _section(plot: Plot) -> str:
    figure = ""
    if plot.drawing:
        numbers = quote(plot.drawing.csv, safe=",;:()+/=")
        figure = (
            f'<div class="figure">{plot.drawing.svg(plot.id)}</div><p class="note">'
            f'<a download="{plot.id}.csv" href="data:text/csv;charset=utf-8,{numbers}">'
            "The numbers (CSV)</a></p>"
        )
    return (
        f"<section{' class=whole' * plot.wide}><h2>{escape(plot.heading)}</h2>"
        f'<p class="note">{escape(plot.note)}</p>{figure}</section>\n'
    )
