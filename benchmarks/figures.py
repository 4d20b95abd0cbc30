"""Figures of the records. matplotlib is imported on use.

The same record and matplotlib version give the same SVG, byte by byte. The background is white, so
that figures are readable on light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from summary import THIS, on_gpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Rows = Sequence[Record]

STYLE = {
    "svg.hashsalt": "classroomkd",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
OWN, OTHER = "#0072b2", "#999999"
BY_MENTORS = ("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")
PARTS = {  # the networks' parts, which cannot be saved, are blue
    "mentors": "#0b3c5d",
    "student forward": "#3f7fb0",
    "student backward": "#9cc4e4",
    "loss": "#d55e00",
    "optimizer": "#009e73",
    "rest of the step": "#999999",
    "loader and between": "#f0c419",
}


@dataclass(frozen=True)
class Drawing:
    """A figure and its caption."""

    caption: str
    draw: Callable[[], Figure]

    def svg(self) -> bytes:
        """Draw the figure; raises ModuleNotFoundError without matplotlib."""
        import matplotlib

        file = io.BytesIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            self.draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return _numbered_clips(file.getvalue())


def _numbered_clips(svg: bytes) -> bytes:
    """The same SVG with numbered clip paths.

    Matplotlib names them by a hash of their coordinates, whose last bits depend on the processor.
    """
    names = dict.fromkeys(re.findall(rb'<clipPath id="(\w+)"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"clip%d" % number)
    return svg


def drawings(device: str, name: str, record: Record) -> dict[str, Drawing]:
    """The figures of the record ``name`` of a device, by file name."""
    found = {}
    rows = [row for row in record.get("rows", []) if row.get("status", "ok") == "ok"]
    if name == "loss" and on_gpu(record):
        grid = [row for row in rows if not row["case"] and row["implementation"] == THIS]
        named = [row for row in rows if row["case"]]
        if len(_sizes(grid)) > 1:
            found["loss"] = Drawing(
                f"This project's loss and gradient on {device}: device time and share of the "
                "roofline by size, number of mentors and ranking.",
                lambda: _loss(grid),
            )
        if len({row["implementation"] for row in named}) > 1:
            found["implementations"] = Drawing(
                f"Loss and gradient on {device}: device time of all implementations.",
                lambda: _implementations(named),
            )
    sizes = [row for row in rows if name == "loss_cpu" and row["kind"] == "size"]
    if one := [row for row in sizes if row["threads"] == 1]:
        found["loss"] = Drawing(
            "Loss and gradient on one CPU core: this project beside the same loss in PyTorch, "
            "eager and compiled.",
            lambda: _loss_on_a_cpu(one),
        )
    if name == "loaders" and len(rows) > 1:
        found["loaders"] = Drawing(
            f"Loaders on {device}: images per second, median and range of the rounds. Blue: this "
            "project; orange: others; grey: the bare copies that bound them.",
            lambda: _loaders(rows),
        )
    timed = [row for row in rows if "parts_ms" in row]
    if name == "step" and timed:
        found["step"] = Drawing(
            f"A training step on {device}: its duration and breakdown. Blue: the networks "
            "themselves.",
            lambda: _step(timed),
        )
    if name == "gradients":
        found["gradients"] = Drawing(
            "Norm of the mentor terms' gradient divided by that of cross-entropy, with respect to "
            f"the student's parameters, on {device}. Left: before the first step, strong mentors. "
            "Middle: the same at temperature 12 with one factor left out. Right: during training "
            "with cross-entropy, three mentors, temperature 12; dashed: weak mentors.",
            lambda: _gradients(rows),
        )
    return {f"{device}-{figure}.svg": drawing for figure, drawing in found.items()}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure, its size in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _sizes(rows: Iterable[Record]) -> list[tuple[int, int]]:
    return sorted({(row["rows"], row["classes"]) for row in rows}, key=lambda size: (size[1], size))


def _loss(rows: Rows) -> Figure:
    """One column of panels per dtype: time above, share of the roofline below."""
    sizes = _sizes(rows)
    rows = sorted(
        rows, key=lambda row: (row["mentors"], sizes.index((row["rows"], row["classes"])))
    )
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = _figure(5.2 * len(dtypes), 6.4, 2, len(dtypes))
    for column, dtype in enumerate(dtypes):
        time, share = panels[:, column]
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        kinds = dict.fromkeys((row["mentors"], row["ranking"]) for row in of_dtype)
        mentors = sorted({m for m, _ in kinds})
        for m, ranking in kinds:
            line = [row for row in of_dtype if (row["mentors"], row["ranking"]) == (m, ranking)]
            places = [sizes.index((row["rows"], row["classes"])) for row in line]
            batch = ranking == "batch"
            colour = BY_MENTORS[mentors.index(m) % len(BY_MENTORS)]
            style = {
                "color": colour,
                "linestyle": "--" if batch else "-",
                "marker": "o",
                "markersize": 4,
                "markerfacecolor": "white" if batch else colour,
                "linewidth": 1.2,
                "label": f"M = {m}{', ranked by batch' if batch else ''}",
            }
            time.plot(places, [row["device_time_us"] for row in line], **style)
            share.plot(places, [row["roofline_percent"] for row in line], **style)
        time.set_yscale("log")
        time.set_title(f"{dtype}: device time")
        time.set_ylabel("device time of one call, µs")
        share.set_title(f"{dtype}: share of the measured roofline")
        share.set_ylabel("share of the roofline, %")
        share.set_ylim(bottom=0)
        for axes in (time, share):
            labels = [f"{b:,} × {c:,}" if axes is share else "" for b, c in sizes]
            axes.set_xticks(range(len(sizes)), labels, rotation=40, ha="right")
            axes.set_xlim(-0.6, len(sizes) - 0.4)
        share.set_xlabel("rows × classes")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _loss_on_a_cpu(rows: Rows) -> Figure:
    """One panel per size, one bar per implementation."""
    figure, panels = _figure(2.6 * len(rows), 1.7, 1, len(rows))
    for axes, row in zip(panels[0], rows, strict=True):
        times = {name: us / 1000 for name, us in row["microseconds"].items() if "+" not in name}
        _bars(axes, times, ".2g")
        axes.set_title("B {rows:,}, C {classes:,}, M {mentors}".format(**row))
        names = ["this project" if name.startswith("fused_") else name for name in times]
        axes.set_yticks(range(len(names)), names if axes is panels[0, 0] else [])
        axes.margins(x=0.2)
        axes.set_xlabel("ms")
    return figure


def _bars(axes: Axes, times: Mapping[str, float], form: str) -> None:
    """A bar for each implementation, labelled with its time, in ``form`` below 100; 0 is none."""
    colours = [OWN if name.startswith("fused_") else OTHER for name in times]
    drawn = axes.barh(range(len(times)), [*times.values()], color=colours, height=0.7)
    labels = [format(t, ",.0f" if t >= 100 else form) if t else "–" for t in times.values()]
    axes.bar_label(drawn, labels, padding=3)
    axes.set_yticks(range(len(times)), [*times])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _implementations(rows: Rows) -> Figure:
    """One panel per named case, one bar per implementation measured there."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, panels = _figure(5.4 * columns, lines * (1.1 + 0.24 * len(names)), lines, columns)
    for number, axes in enumerate(panels.flat):
        if number >= len(cases):
            axes.set_visible(False)
            continue
        own = {row["implementation"]: row for row in rows if row["case"] == cases[number]}
        row = next(iter(own.values()))
        kind = "B {rows:,}, C {classes:,}, M {mentors}, {dtype}".format(**row)
        kind += ", ranked by batch" if row["ranking"] == "batch" else ""
        axes.set_title(f"{cases[number]}\n{kind}")
        times = {name: own[name]["device_time_us"] if name in own else 0 for name in names}
        _bars(axes, times, ".1f")
        axes.margins(x=0.15)
        axes.set_xlabel("device time of one call, µs")
    return figure


def _loaders(rows: Rows) -> Figure:
    figure, panels = _figure(7.2, 0.9 + 0.3 * len(rows))
    axes: Axes = panels[0, 0]
    for place, row in enumerate(rows):
        floor = row["floor"] is None
        own = row["loader"] in ("resident", "ffcv", "torch")
        colour = OWN if own else "#bbbbbb" if floor else "#d55e00"
        axes.plot([min(row["rounds"]), max(row["rounds"])], [place] * 2, color=colour, linewidth=3)
        axes.plot(row["images_per_second"], place, "o", color=colour, markersize=6)
        text = f"{row['images_per_second']:,.0f}"
        at = (row["images_per_second"], place)
        axes.annotate(text, at, (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
    names = [f"{row['loader']}{', {workers}'.format(**row) * bool(row['workers'])}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_xscale("log")
    axes.set_xlabel("images/s, logarithmic (after the name: number of workers)")
    return figure


def _step(rows: Rows) -> Figure:
    """One panel per classroom and batch size, one bar per implementation."""
    classrooms = list(dict.fromkeys(row["classroom"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    height = len(batches) * (0.85 + 0.27 * len(names)) + 0.5
    figure, panels = _figure(5.4 * len(classrooms), height, len(batches), len(classrooms))
    shown = {}
    for line, batch in enumerate(batches):
        for column, classroom in enumerate(classrooms):
            axes = panels[line, column]
            own = {
                row["implementation"]: row["parts_ms"]
                for row in rows
                if (row["classroom"], row["batch"]) == (classroom, batch)
            }
            left = [0.0] * len(names)
            for part, colour in PARTS.items():
                widths = [
                    100 * own[name][part] / sum(own[name].values()) if name in own else 0.0
                    for name in names
                ]
                shown[part] = axes.barh(range(len(names)), widths, left=left, color=colour)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            for place, name in enumerate(names):
                text = f"{sum(own[name].values()):,.2f} ms" if name in own else "–"
                axes.text(left[place] + 1, place, text, va="center", fontsize=8)
            axes.set_title(f"{classroom.partition(' ')[0]} and its mentors, batch {batch}")
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_xlim(0, 118)
            axes.set_xticks(range(0, 101, 20))
            axes.grid(visible=False, axis="y")
            axes.set_xlabel("share of the time from one step to the next, %")
    columns = min(4, 3 * len(classrooms))  # as many as the figure is wide enough for
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns)
    return figure


def _gradients(rows: Rows) -> Figure:
    """Three panels: by classes for each M and temperature, by factor left out, and by step."""
    figure, panels = _figure(10.8, 5.4, 1, 3)
    start, without, along = panels[0]

    def lines(axes: Axes, over: str, by: Sequence[str], rows: Iterable[Record]) -> None:
        found: dict[tuple, list[Record]] = {}
        for row in rows:
            found.setdefault(tuple(row[key] for key in by), []).append(row)
        firsts = list(dict.fromkeys(kind[0] for kind in found))
        colours = dict(zip(firsts, BY_MENTORS, strict=False))
        seconds = list(dict.fromkeys(kind[1] for kind in found))
        for kind, line in found.items():
            axes.plot(
                [row[over] for row in line],
                [row["times_task"] for row in line],
                color=colours[kind[0]],
                linestyle=("-", "--", ":")[seconds.index(kind[1])],
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=", ".join(
                    f"{name} {value:g}" if isinstance(value, int | float) else value
                    for name, value in zip(by, kind, strict=True)
                ),
            )
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.16))

    first = [row for row in rows if row["step"] == 0 and row["strength"] == "strong"]
    whole = [row for row in first if row["left_out"] == "nothing"]
    lines(start, "classes", ("mentors", "temperature"), whole)
    hottest = [row for row in first if row["temperature"] == 12 and row["mentors"] in (1, 6)]
    lines(without, "classes", ("left_out", "mentors"), hottest)
    training = [
        row
        for row in rows
        if (row["mentors"], row["temperature"], row["left_out"]) == (3, 12, "nothing")
    ]
    lines(along, "step", ("classes", "strength"), training)
    for axes in (start, without):
        axes.set_xscale("log")
        axes.set_xlabel("classes")
    along.set_xscale("symlog", linthresh=10)
    along.set_xlim(0)
    along.set_xlabel("step of the student's training")
    start.set_ylabel("mentor terms' gradient / cross-entropy's")
    start.set_title("before the first step")
    without.set_title("with one factor left out")
    along.set_title("during training")
    return figure
