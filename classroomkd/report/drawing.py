"""Figures drawn by matplotlib: for the page as SVG in its text, and as files for a paper."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, nan
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from classroomkd.report.axes import FRAME, GRID, INK, Axis, Curve, themed
from classroomkd.report.numbers import csv_text

NARROW, WIDE = 600, 1216  # pixels: one of two columns of a page, and the full width
MANY_CLASSES = 20  # with more, a plot needs the full width of the page
_DPI = 72  # that of matplotlib's SVG, in which a point is then a pixel
_MARKERS = 30  # a curve
_TIPS = 80  # epochs of a plot that can be pointed at
_LEFT = 76  # pixels left of the axes, for numbers and title
_LONGEST = 40  # letters of a class's name
_NAMES = 120  # classes whose names fit below a wide plot

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": FRAME,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "figure.dpi": _DPI,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": GRID,
    "image.composite_image": False,  # which would be a single image of all cells, and smoothed
    "legend.frameon": False,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # text that can be edited
    "svg.fonttype": "none",  # text remains text
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": FRAME,
    "xtick.labelcolor": INK,
    "ytick.color": FRAME,
    "ytick.labelcolor": INK,
}
_styled = style.context(_STYLE, after_reset=True)  # whatever the user's matplotlibrc says

_PLACES = {"d", "x", "y", "transform"}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Tip:
    """What is shown for the part of a figure from ``low`` to ``high`` on the horizontal axis."""

    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A figure, the numbers that it shows as a table, and its tips."""

    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    tips: Sequence[Tip]

    @property
    def csv(self) -> str:
        """The numbers as CSV, with seven digits."""
        rows = (
            [f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row]
            for row in self.rows
        )
        return csv_text(self.columns, rows)

    def file(self, kind: str, name: str) -> bytes:
        """The figure as a file of the kind ".svg" or ".pdf"."""
        dated = {".svg": "Date", ".pdf": "CreationDate"}[kind]
        return self._written(kind[1:], name, {dated: None})  # the same bytes at any time

    def _written(self, kind: str, salt: str, metadata: dict) -> bytes:
        file = io.BytesIO()
        salted = _STYLE | {"svg.hashsalt": salt}  # which makes ids unique on a page
        with style.context(salted, after_reset=True), warnings.catch_warnings():
            # The browser has a font for every name; in a PDF it is a box.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(file, format=kind, dpi=_DPI, metadata=metadata)
        return file.getvalue()

    def svg(self, name: str) -> str:
        """The figure as an element of a page, with ``name`` as its id.

        Its colours follow the page's scheme. What matplotlib calls ids, such as "xtick_3", are
        classes, because a page has several figures.
        """
        file = self._written("svg", name, dict.fromkeys(("Creator", "Date", "Format", "Type")))
        root = ElementTree.fromstring(file)
        for unused in ("width", "height"):
            del root.attrib[unused]
        root.attrib |= {"id": name, "class": "wide" if self.wide else "narrow"}
        for element in root.iter():
            if element.tag == f"{{{_SVG}}}g" and (named := element.attrib.pop("id", "")):
                element.set("class", re.sub(r"_\d+$", "", named))
            for key in _PLACES.intersection(element.keys()):  # a hundredth of a pixel is enough
                element.set(key, re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[key]))
            if look := element.get("style"):
                look = re.sub(r"font-family:[^;]*;?", "", look)
                element.set("style", re.sub("#[0-9a-f]{6}", lambda found: themed(found[0]), look))
        for sheet in root.findall(f".//{{{_SVG}}}style/..") + root.findall(f"{{{_SVG}}}metadata"):
            root.remove(sheet)
        ElementTree.SubElement(root, "g", {"class": "tips"}).extend(map(self._tip, self.tips))
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _XLINK)
        return ElementTree.tostring(root, encoding="unicode")

    @property
    def wide(self) -> bool:
        """Whether the figure needs the full width of the page."""
        return round(self.figure.get_figwidth() * _DPI) > NARROW

    def _tip(self, tip: Tip) -> ElementTree.Element:
        every = [axes for axes in self.figure.axes if axes.get_subplotspec()]  # but a colour bar
        top, bottom = every[0], every[-1]
        (left, _), (right, _) = (top.transData.transform((x, 0)) for x in (tip.low, tip.high))
        left, right = max(left, top.bbox.x0), min(right, top.bbox.x1)
        height = self.figure.bbox.height
        sizes = {"x": left, "width": right - left}
        sizes |= {"y": height - top.bbox.y1, "height": top.bbox.y1 - bottom.bbox.y0}
        place: dict[str, Any] = {key: f"{size:.1f}" for key, size in sizes.items()}
        column = ElementTree.Element("rect", place)
        ElementTree.SubElement(column, "title").text = tip.text
        return column


@dataclass(frozen=True)
class Plot:
    """A drawing with the id of its page element and files, its heading and its note.

    Without a ``drawing`` only the text is shown.
    """

    id: str
    heading: str
    note: str
    drawing: Drawing | None

    @property
    def wide(self) -> bool:
        """Whether the plot needs the full width of the page."""
        return self.drawing is not None and self.drawing.wide


def plain(name: str) -> str:
    """A name without the characters that XML forbids."""
    return "".join(letter if letter.isprintable() else " " for letter in name)


def thinned(epochs: Sequence[int], most: int) -> list[int]:
    """At most ``most`` evenly spaced epochs, including the first and the last."""
    count, last = min(len(epochs), most), len(epochs) - 1
    return [epochs[round(place * last / max(count - 1, 1))] for place in range(count)]


@_styled
def over_epochs(curves: Sequence[Curve], axis: Axis, wide: bool = False) -> Drawing:
    """Curves over the epochs, with a legend below."""
    names = [plain(curve.name) for curve in curves]
    width = WIDE if wide else NARROW
    longest = max(map(len, names))
    beside = min(max(1, width // (8 * longest + 50)), len(names))
    legend = 18 * ceil(len(names) / beside)
    figure = _figure(width, 260, below=50 + legend)
    axes = figure.add_subplot()
    lines = []
    for curve in curves:
        places = [nan if value is None else axis.place(value) for value in curve.values]
        if curve.deviations:
            lower, upper = (
                [
                    nan if y is None or d is None else axis.place(y + side * d)
                    for y, d in zip(curve.values, curve.deviations, strict=True)
                ]
                for side in (-1, 1)
            )
            look: dict[str, Any] = {"color": curve.line["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(curve.epochs, lower, upper, **look, gid="band")
        often = ceil(len(places) / _MARKERS) or 1
        line: dict[str, Any] = {"marker": curve.marker, "markevery": often, **curve.line}
        lines += axes.plot(curve.epochs, places, **line, gid="curve")
    place: dict[str, Any] = {"loc": "lower left", "borderaxespad": 0.2, "labelspacing": 0.3}
    most = width // 8  # letters that fit
    texts = [name if len(name) <= most else f"{name[: most - 1]}…" for name in names]
    figure.legend(lines, texts, ncols=beside, **place)
    epochs = sorted({epoch for curve in curves for epoch in curve.epochs})
    margin = max(0.02 * (epochs[-1] - epochs[0]), 0.2)
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    _set_axis(axes, axis)
    by_epoch = [dict(zip(curve.epochs, curve.values, strict=True)) for curve in curves]
    deviations = [dict(zip(c.epochs, c.deviations, strict=False)) for c in curves if c.deviations]
    columns = ["epoch", *names]
    columns += [f"{plain(curve.name)}, deviation" for curve in curves if curve.deviations]
    rows = [[e, *(of.get(e) for of in (*by_epoch, *deviations))] for e in epochs]
    shown = thinned(epochs, _TIPS)
    starts = [(before + after) / 2 for before, after in pairwise(shown)]
    borders = [epochs[0] - margin, *starts, epochs[-1] + margin]
    tips = []
    for epoch, (low, high) in zip(shown, pairwise(borders), strict=True):
        values = zip(names, (of.get(epoch) for of in by_epoch), strict=True)
        told = [f"{name}: {value:{axis.tip}}" for name, value in values if value is not None]
        tips.append(Tip(low, high, "\n".join([f"epoch {epoch}", *told])))
    return Drawing(figure, columns, rows, tips)


@_styled
def heat_maps(
    maps: dict[str, list[list[float | None]]],
    epochs: Sequence[int],
    classes: Sequence[str],
    colours: tuple[str, str, str],
) -> Drawing:
    """One heat map of shares for each name, epochs × classes, on a scale from 0 to 1."""
    names = list(map(plain, classes))
    panel = min(max(40, 12 * len(epochs)), 120)
    gap = 34  # for a name
    height = panel * len(maps) + gap * (len(maps) - 1)
    figure = _class_figure(names, height, above=80)
    scale = LinearSegmentedColormap.from_list("shares", colours).with_extremes(bad="none")
    rows = {"hspace": gap / panel}
    every = figure.subplots(len(maps), sharex=True, squeeze=False, gridspec_kw=rows)[:, 0]
    for axes, (name, shares) in zip(every, maps.items(), strict=True):
        cells = [[nan if share is None else share for share in row] for row in shares]
        look: dict[str, Any] = {
            "vmin": 0,
            "vmax": 1,
            "cmap": scale,
            "aspect": "auto",
            "interpolation": "none",
        }
        image = axes.imshow(cells, **look)
        axes.set_title(plain(name), loc="left", fontsize=12)
        ends = sorted({0, len(epochs) - 1})
        axes.set_yticks(ends, [str(epochs[end]) for end in ends])
        axes.grid(visible=False)
        axes.tick_params(axis="x", length=0)
    every[0].set_ylabel("epoch")
    wide, high = figure.bbox.size
    scale_of = figure.add_axes((_LEFT / wide, 1 - 30 / high, 240 / wide, 10 / high))
    percents = PercentFormatter(1, decimals=0)
    figure.colorbar(image, cax=scale_of, orientation="horizontal", format=percents)
    _name_classes(every[-1], names)
    numbers = [
        [plain(name), epoch, *(None if share is None else float(f"{share:.4g}") for share in row)]
        for name, shares in maps.items()
        for epoch, row in zip(epochs, shares, strict=True)
    ]
    tips = []
    for number, name in enumerate(names):
        last = ((of, shares[-1][number]) for of, shares in maps.items())
        told = [f"{plain(of)}: {share:.1%}" for of, share in last if share is not None]
        text = "\n".join([f"{name}, epoch {epochs[-1]}", *told])
        tips.append(Tip(number - 0.5, number + 0.5, text))
    return Drawing(figure, ["mentor", "epoch", *names], numbers, tips)


@_styled
def bars(
    classes: Sequence[str],
    heights: Sequence[float],
    deviations: Sequence[float | None],
    colours: tuple[str, str],
    axis: Axis,
) -> Drawing:
    """A bar for each class, in one colour above 0 and in another below."""
    names = list(map(plain, classes))
    known = [deviation for deviation in deviations if deviation is not None]
    figure = _class_figure(names, 260)
    axes = figure.add_subplot()
    bars = axes.bar(
        range(len(names)),
        heights,
        color=[colours[height < 0] for height in heights],
        yerr=[deviation or 0 for deviation in deviations] if known else None,
        error_kw={"ecolor": INK, "elinewidth": 1},
    )
    for bar in bars:
        bar.set_gid("bar")
    axes.tick_params(axis="x", length=0)
    axes.axhline(0, color=FRAME, linewidth=0.8)
    _name_classes(axes, names)
    _set_axis(axes, axis)
    columns = ["class", axis.title, *(["deviation"] if known else [])]
    rows = [
        [name, height, *([deviation] if known else [])]
        for name, height, deviation in zip(names, heights, deviations, strict=True)
    ]
    tips = [
        Tip(number - 0.5, number + 0.5, f"{name}: {height:{axis.tip}}")
        for number, (name, height) in enumerate(zip(names, heights, strict=True))
    ]
    return Drawing(figure, columns, rows, tips)


@_styled
def dots(
    groups: Sequence[tuple[str, float, float | None, str]],
    runs: Sequence[tuple[str, float, int]],
    axis: Axis,
) -> Drawing:
    """A dot and ± its deviation for each group, and a dash for each run (group, value, seed).

    Groups have a name, a mean, a deviation and a colour.
    """
    names = [plain(name) for name, *_ in groups]
    figure = _figure(WIDE if len(groups) > 8 else NARROW, 300)
    axes = figure.add_subplot()
    for number, (_, middle, deviation, colour) in enumerate(groups):
        look: dict[str, Any] = {"fmt": "o", "color": colour, "markersize": 9, "gid": "dot"}
        axes.errorbar([number], [middle], yerr=deviation, **look)
    places = [names.index(plain(name)) for name, *_ in runs]
    look = {"marker": "_", "markersize": 20, "linestyle": "", "color": INK, "gid": "runs"}
    axes.plot(places, [value for _, value, _ in runs], **look)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel("variant")
    _set_axis(axes, axis)
    tips = []
    for number, (_, middle, deviation, _) in enumerate(groups):
        spread = "" if deviation is None else f" ± {deviation:{axis.tip}}"
        told = [
            f"seed {seed}: {v:{axis.tip}}" for of, v, seed in runs if plain(of) == names[number]
        ]
        text = "\n".join([f"{names[number]}: {middle:{axis.tip}}{spread}", *told])
        tips.append(Tip(number - 0.5, number + 0.5, text))
    rows = [[plain(name), seed, value] for name, value, seed in runs]
    return Drawing(figure, ["variant", "seed", axis.title], rows, tips)


def _figure(width: float, inner: float, below: float = 44, above: float = 10) -> Figure:
    """A figure whose axes have the height ``inner``, with room below and above them, in pixels.

    Matplotlib's own layouts find the room themselves, and take as long as all the drawing.
    """
    height = below + inner + above
    figure = Figure(figsize=(width / _DPI, height / _DPI))
    figure.subplots_adjust(_LEFT / width, below / height, 1 - 8 / width, 1 - above / height)
    return figure


def _class_figure(names: Sequence[str], inner: float, above: float = 10) -> Figure:
    many = len(names) > MANY_CLASSES
    letter = 6.5 if many else 8.5
    below = 40 + letter * min(max(map(len, names)), _LONGEST)
    return _figure(WIDE if many else NARROW, inner, below, above)


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    often = ceil(len(names) / _NAMES)
    places = range(0, len(names), often)
    look: dict[str, Any] = {"fontsize": 9 if len(names) > MANY_CLASSES else 12, "rotation": 90}
    axes.set_xticks(places, [names[place][:_LONGEST] for place in places], **look)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel("class")


def _set_axis(axes: Axes, axis: Axis) -> None:
    axes.set_ylabel(axis.title)
    if axis.log:
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_ylim(*axis.limits)
    if axis.ticks:
        low, high = sorted(axes.get_ylim())
        shown = {tick: text for tick, text in axis.ticks.items() if low <= tick <= high}
        axes.set_yticks(list(shown), list(shown.values()))
    if axis.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
