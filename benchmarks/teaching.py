"""The tables of docs/teaching.md: of gradients.py, drop_in.py, small_data.py and examples.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from classroomkd.loss import automatic_mentor_weight
from classroomkd.report.markup import markdown_table
from classroomkd.report.numbers import differences, percent, spread

Row = Mapping[str, Any]


def _gradients(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "Norm of the mentor terms' gradient divided by that of cross-entropy, with strong mentors, "
        "before the first step:"
    )
    first = [row for row in rows if row["step"] == 0 and row["strength"] == "strong"]
    cells = {
        (row["classes"], row["mentors"], row["temperature"], row["left_out"]): row["times_task"]
        for row in first
    }
    classes, mentors = (sorted({key[n] for key in cells}) for n in (0, 1))
    kinds = {
        "temperature 12": (12.0, "nothing"),
        "temperature 1": (1.0, "nothing"),
        "temperature 12, weight 1 instead of the rank": (12.0, "rank weights"),
        "no temperatures": (12.0, "temperatures"),
    }
    yield markdown_table(
        ["", "M", *(f"C = {c:,}" for c in classes)],
        [
            [name, str(m), *(f"{cells[c, m, *kind]:.2g}" for c in classes)]
            for name, kind in kinds.items()
            for m in mentors
        ],
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % confidence interval; None in its place for one value."""
    if len(values) < 2:
        return mean(values), None
    quantile = student_t.ppf(0.975, len(values) - 1)
    return mean(values), float(quantile * stdev(values) / math.sqrt(len(values)))


def _name(row: Row) -> str:
    """The name of a row's loss."""
    if row.get("loss", row.get("method")) != "classroom":
        return {"kd": "KD"}.get(row.get("loss", row.get("method")), row.get("loss", "alone"))
    cool = "" if row.get("temperature", 12.0) == 12.0 else f", temperature {row['temperature']:g}"
    weight, m = row["mentor_weight"], len(row["mentors_top1"])
    automatic = math.isclose(weight, automatic_mentor_weight(row["classes"], m))
    task = row.get("task_weight", "confidence")
    own = "" if task == "confidence" else f", task weight {task:g}"
    return f"classroom, weight {weight:.3g}{' (auto)' * automatic}{cool}{own}"


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _by_seed(rows: Sequence[Row], column: str = "top1") -> dict[int, float]:
    return {row["seed"]: row[column] for row in rows}


def _order(item: tuple[tuple, list[Row]]) -> tuple:
    """Sort by the number of mentors, then by mentor weight, the paper's first."""
    (m, loss, weight, temperature, task_weight), _ = item
    return m, loss, temperature or 0, -(weight or 0), str(task_weight)


def collapsed(row: Row) -> bool:
    """Whether a student's training accuracy is at most 1.5 times chance."""
    return row["train_top1"] < 1.5 / row["classes"]


def _drop_in(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for place, own in _grouped(rows, ("set", "network")).items():
        baseline = _by_seed([row for row in own if row["loss"] == "cross-entropy"])
        groups = _grouped(own, ("mentors", "loss", "mentor_weight", "temperature", "task_weight"))
        for (m, *_), group in sorted(groups.items(), key=_order):
            found = differences(_by_seed(group), baseline)
            error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
            lines.append(
                [
                    ", ".join(place),
                    str(m) if m else "",
                    _name(group[0]),
                    percent(spread([row["top1"] for row in group])),
                    percent([mean(found), error], signed=True) if m else "",
                    str(sum(map(collapsed, group))),
                    str(len(group)),
                ]
            )
    yield (
        "± is the standard deviation over the seeds for top-1, and the standard error of the mean "
        "for the differences, which are paired by seed."
    )
    headings = (
        *("set, network", "M", "loss", "top-1"),
        *("minus cross-entropy", "collapsed", "seeds"),
    )
    yield markdown_table(headings, lines)


def _small_data(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"{len(_grouped(rows, ('set', 'images_per_class', 'student')))} combinations of set, "
        "images per class and student. Top-1 of the last epoch with its standard deviation over "
        "the seeds, and its difference from alone, paired by seed, with the half-width of the 95 % "
        "confidence interval."
    )
    lines = []
    for place, own in _grouped(rows, ("set", "images_per_class", "student")).items():
        alone = [row for row in own if row["method"] == "alone"]
        for group in _grouped(own, ("method", "mentor_weight", "task_weight")).values():
            cells = [place[0], str(place[1]), place[2], _name(group[0])]
            for column in ("validation_top1", "top1"):
                cells.append(percent(spread([row[column] for row in group])))
                found = differences(_by_seed(group, column), _by_seed(alone, column))
                is_alone = group[0]["method"] == "alone"
                cells.append("" if is_alone else percent(interval(found), signed=True))
            lines.append([*cells, str(len(group))])
    headings = (
        *("set", "images per class", "student", "method"),
        *("validation", "minus alone", "test", "minus alone", "seeds"),
    )
    yield markdown_table(headings, lines)


def _examples(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "Held-out accuracy, mean IoU or PCK within 2 pixels, in percent, or perplexity, the less "
        "the better, with its standard deviation over the seeds, and the difference with its "
        "standard error, paired by seed."
    )
    lines = []
    for (name, measure), own in _grouped(rows, ("example", "measure")).items():
        scale, digits = (1, 3) if measure == "perplexity" else (100, 2)

        def told(values: Sequence[float], difference: bool = False, digits: int = digits) -> str:
            text = f"{mean(values):{'+' if difference else ''}.{digits}f}".replace("-", "−")
            if len(values) == 1:
                return text
            deviation = stdev(values) / (math.sqrt(len(values)) if difference else 1)
            return f"{text} ± {deviation:.{digits}f}"

        alone, classroom = ([scale * row[key] for row in own] for key in ("alone", "classroom"))
        mentors = zip(*(row["mentors"] for row in own), strict=True)
        lines.append(
            [
                f"[{name}.py](../examples/{name}.py)",
                measure,
                ", ".join(f"{scale * mean(of):.{digits}f}" for of in mentors),
                told(alone),
                told(classroom),
                told([b - a for a, b in zip(alone, classroom, strict=True)], difference=True),
                str(len(own)),
            ]
        )
    headings = ("example", "measure", "mentors", "alone", "in the classroom", "difference", "seeds")
    yield markdown_table(headings, lines)
    tokens = [row["taught_percent"] for row in rows if row["taught_percent"]]
    if tokens:
        *shares, of_the_sick = (f"{mean(of):.1f} %" for of in zip(*tokens, strict=True))
        yield (
            f"In the classroom of language models the mentors taught {' and '.join(shares)} of the "
            f"tokens, and the third, the first with its vocabulary shuffled, {of_the_sick}."
        )


RECORDS = {  # record → heading, command that measures it, its tables
    "gradients": ("The gradients", "python benchmarks/gradients.py --out OUT", _gradients),
    "drop_in": ("In your own trainer", "python benchmarks/drop_in.py --out OUT", _drop_in),
    "small_data": (
        "`classroomkd train` on small data",
        "python benchmarks/small_data.py --out OUT --photos FOLDER",
        _small_data,
    ),
    "examples": ("The examples", "python benchmarks/examples.py --out OUT", _examples),
}
