"""report.html: one file that tells of a run, from disk and without a network."""

from __future__ import annotations

from html import escape
from pathlib import Path

import plotly.io
import yaml

from classroomkd.files import atomic_write
from classroomkd.report.plots import Plot, colour, plots
from classroomkd.report.records import Run, label, read_run
from classroomkd.report.results import COLUMNS, evidence, result_rows

STYLE = """
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
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:first-child { white-space: normal; min-width: 9rem; }
.student td { font-weight: 600; }
i { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.plots { display: grid; gap: 2rem; margin: 2rem 0;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
section { min-width: 0; }
summary { cursor: pointer; font-weight: 600; }
pre { padding: .75rem; background: #f6f6f6; overflow-x: auto; font-size: .8125rem; }
@media (max-width: 40rem) {
  table { width: 100%; font-size: .75rem; }
  tr { display: grid; grid-template-columns: 1.4fr .9fr 1fr 1.05fr 1.1fr 1fr; column-gap: .2rem;
       padding: .3rem 0; border-bottom: 1px solid #ddd; }
  th, td { padding: 0; border: 0; }
  th:first-child { display: none; }
  td:first-child { grid-column: 1 / -1; font-size: .875rem; }
  th:last-child, td:last-child { text-align: right; }
}
"""


def write_report(run: Path) -> Path:
    """Write ``run``/report.html from the records in the run folder and return its path.

    The run need not have finished. Raises UserError if there is no such folder or it holds no
    metrics.jsonl.
    """
    path = Path(run) / "report.html"
    atomic_write(path, _page(read_run(run)).encode("utf-8", errors="replace"))
    return path


def _page(run: Run) -> str:
    heading, facts = _title(run)
    drawn = plots(run)
    figures = "".join(_section(plot, with_library=plot is drawn[0]) for plot in drawn)
    versions = (run.summary or {}).get("versions") or {}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(heading)}</h1>
<p>{escape(facts)}</p>
{_left_out(run)}
{_results(run) if run.summary else _progress(run)}
<div class="plots">{figures}</div>
<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>
<p class="note">{escape(" · ".join(f"{name} {version}" for name, version in versions.items()))}</p>
</body>
</html>
"""


def _title(run: Run) -> tuple[str, str]:
    """What was trained on what, and how."""
    students = [name for phase, name in run.curves if phase in ("alone", "classroom")]
    if run.summary:
        known = run.summary | {"data": run.summary["data"]["name"]}
        students += [r["name"] for r in run.summary["results"] if r["phase"] != "mentor"]
    else:
        known = yaml.safe_load(run.config) or {}
    heading = "Classroom"
    if students:
        heading += f" of {students[-1]}"
    if known.get("data"):
        heading += f" on {Path(known['data']).name}"  # the configuration has the whole path
    epochs = [records[-1].get("epochs") for records in run.curves.values()]
    facts = [f"mentors {', '.join(run.mentors)}"] if run.mentors else []
    facts += [f"{epochs[-1]} epochs"] if epochs else []
    facts += [f"{key} {known[key]}" for key in ("seed", "device") if known.get(key) is not None]
    return heading, " · ".join(facts)


def _left_out(run: Run) -> str:
    if not run.unreadable:
        return ""
    lines = ", ".join(map(str, run.unreadable))
    return f'<p class="warning">Incomplete and left out: line {lines} of metrics.jsonl.</p>'


def _results(run: Run) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = ""
    for result, row in zip(run.summary["results"], result_rows(run.summary), strict=True):
        kind = "mentor" if result["phase"] == "mentor" else "student"
        swatch = f'<i style="background:{colour(run, result["phase"], result["name"])}"></i>'
        cells = "</td><td>".join(map(escape, row))
        body += f'<tr class="{kind}"><td>{swatch}{cells}</td></tr>'
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="note">{escape(evidence(run.summary))}</p>'
    )


def _progress(run: Run) -> str:
    done = "".join(
        f"<li>{escape(label(*network))}: epoch {last['epoch']} of {last.get('epochs')}</li>"
        for network, (*_, last) in run.curves.items()
    )
    return (
        '<p class="warning">Unfinished: this run has no summary.json yet; '
        f"here is what it has recorded so far.</p><ul>{done or '<li>no epoch yet</li>'}</ul>"
    )


def _section(plot: Plot, with_library: bool) -> str:
    figure = plotly.io.to_html(
        plot.figure,
        full_html=False,
        include_plotlyjs=with_library,
        div_id=plot.id,
        default_height=f"{330 + 14 * len(plot.figure.data)}px",  # the legend takes its share
        config={
            "displaylogo": False,
            "displayModeBar": "hover",
            # Without a list of its own plotly adds a button that uploads the plot.
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        },
    )
    return f'<section><h2>{plot.heading}</h2><p class="note">{plot.note}</p>{figure}</section>\n'
