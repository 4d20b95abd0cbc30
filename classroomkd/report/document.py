"""The HTML around a page's plots: one file, read from disk and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.io

from classroomkd.report.figures import Plot

GENERATOR = '<meta name="generator" content="classroomkd">'  # tells our pages from other files

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
table { margin-top: 1rem; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th { font-weight: 600; font-size: .875rem; color: #595959; }
th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; min-width: 9rem; }
.student td, .mean td { font-weight: 600; }
.runs { font-size: .875rem; }
.runs th:nth-child(-n+4), .runs td:nth-child(-n+4) { text-align: left; white-space: normal; }
.mean td { border-bottom-color: #767676; }
i { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.plots { display: grid; gap: 2rem; margin: 2rem 0;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
section { min-width: 0; }
section.whole { grid-column: 1 / -1; }
summary { cursor: pointer; font-weight: 600; }
pre { padding: .75rem; background: #f6f6f6; overflow-x: auto; font-size: .8125rem; }
@media (max-width: 40rem) {
  table { width: 100%; font-size: .75rem; }
  tr { display: grid; column-gap: .2rem; padding: .3rem 0; border-bottom: 1px solid #ddd; }
  th, td { padding: 0; border: 0; }
  td:first-child { grid-column: 1 / -1; font-size: .875rem; }
  .results tr { grid-template-columns: 1.4fr .9fr 1fr 1.05fr 1.1fr 1fr; }
  .results th:first-child, .runs thead { display: none; }
  .runs tr { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .runs td { text-align: left; }
  .runs td:nth-child(-n+4) { grid-column: 1 / -1; }
  .runs td:not(:first-child)::before { content: attr(title) " "; color: #595959;
                                       font-weight: 400; }
}
"""


def document(title: str, body: str) -> str:
    """A whole page, ``body`` being HTML and ``title`` text."""
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
    """A line that must not be missed."""
    return f'<p class="warning">{escape(text)}</p>'


def table(kind: str, columns: Sequence[str], rows: str) -> str:
    """A table of the style ``kind`` around ``rows``, which are HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def swatch(colour: str) -> str:
    """A dot in a curve's colour."""
    return f'<i style="background:{colour}"></i>'


def sections(plots: Sequence[Plot]) -> str:
    """The plots, with plotly's library once before them all."""
    drawn = "".join(_section(plot, with_library=plot is plots[0]) for plot in plots)
    return f'<div class="plots">{drawn}</div>'


def _section(plot: Plot, with_library: bool) -> str:
    figure = plotly.io.to_html(
        plot.figure,
        full_html=False,
        include_plotlyjs=with_library,
        div_id=plot.id,
        config={
            "displaylogo": False,
            "displayModeBar": "hover",
            # Without a list of its own plotly adds a button that uploads the plot.
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        },
    )
    return (
        f"<section{' class=whole' * plot.wide}><h2>{escape(plot.heading)}</h2>"
        f'<p class="note">{escape(plot.note)}</p>{figure}</section>\n'
    )
