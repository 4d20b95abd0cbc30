"""What this project wants to reach, and what the records say of each bar.

    python benchmarks/bars.py OUT

prints the verdicts on the records in the folder OUT.

A record is what a benchmark wrote; a bar is met if every value that it is about keeps it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
# Of what, and its number, or why there is none.
Value = tuple[str, float | str]

OURS = "fused_classroom_loss_and_grad"
REPORTED = f"{OURS}, report"
COMPILE_MODES = ("compile default", "compile reduce-overhead", "compile max-autotune")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of C: from, to, and the share of the roofline in percent (stretch).
ROOFLINE_BARS: tuple[tuple[str, int, int, str, float, float | None], ...] = (
    ("C 1,000", 1000, 1000, "float32", 80, 90),
    ("C 1,000", 1000, 1000, "bfloat16", 50, 70),
    ("C 4,096", 4096, 4096, "float32", 80, 90),
    ("C 4,096", 4096, 4096, "bfloat16", 50, 70),
    ("C ≥ 16,384", 16_384, 262_144, "float32", 95, None),
    ("C ≥ 16,384", 16_384, 262_144, "bfloat16", 88, 93),
)
REPORT_ROWS = (8192, 1000, 6, "float32")  # where the report's own time is measured


@dataclass(frozen=True)
class Bar:
    """A bound on all that ``find`` finds in the records of that name."""

    what: str
    text: str
    bound: float
    stretch: float | None
    form: str
    record: str
    find: Callable[[Record], Iterable[Value]]
    at_most: bool = False
    device: str = ""  # the bar is for devices with this in their name

    def judge(self, record: Record) -> tuple[str, str]:
        """What was measured, and the verdict."""
        values = list(self.find(record))
        numbers = [(value, where) for where, value in values if not isinstance(value, str)]
        missing = [f"{where}: {why}".lstrip(": ") for where, why in values if isinstance(why, str)]
        if not numbers:
            return "; ".join(missing), "not measured"
        numbers.sort(key=lambda number: number[0], reverse=self.at_most)
        (worst, where), (best, _) = numbers[0], numbers[-1]
        measured = self.form.format(worst) + (f" ({where})" if where else "")
        if len(numbers) > 1:
            measured += f" to {self.form.format(best)}, {len(numbers)} values"
        if self.device not in record["environment"]["device"]:
            return measured, f"not an {self.device}"
        if not self._keeps(worst, self.bound):
            return measured, "**not met**"
        if missing:
            return f"{measured}; {'; '.join(missing)}", "not measured in full"
        if self.stretch is not None and self._keeps(worst, self.stretch):
            return measured, "met, the stretch too"
        return measured, "met"

    def _keeps(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


def on_gpu(record: Record) -> bool:
    """Whether a benchmark's record is of a GPU."""
    return "multiprocessors" in record.get("environment", {})


def size(row: Record) -> str:
    """A row of the loss benchmark in short."""
    return "B {rows}, C {classes}, M {mentors}, {dtype}".format(**row)


def _value(row: Record, value: Callable[[Record], float | None]) -> float | str:
    number = value(row) if row["status"] == "ok" else None
    why = row["status"] if row["status"] != "ok" else row.get("parts_status", "not measured")
    return why if number is None else number


def _grid(
    record: Record,
    wanted: Callable[[Record], bool],
    value: Callable[[Record], float | None],
    implementations: Sequence[str] = (OURS,),
) -> list[Value]:
    """Of this project's loss on a GPU, every mentor active, ranked by row."""
    return [
        (size(row) + ", report" * (row["implementation"] == REPORTED), _value(row, value))
        for row in record["rows"]
        if on_gpu(record) and not row["case"] and row["ranking"] == "sample" and wanted(row)
        if row["implementation"] in implementations
    ]


def is_cifar(row: Record) -> bool:
    """Whether it is of the size at which the launch is compared with eager and torch.compile."""
    return (row["classes"], row["mentors"]) == (100, 6) and 64 <= row["rows"] <= 512


def _is_large(row: Record) -> bool:
    return row["rows"] * row["classes"] >= 2**22


def _has_report_bar(row: Record) -> bool:
    return tuple(row[key] for key in ("rows", "classes", "mentors", "dtype")) == REPORT_ROWS


def is_barred(row: Record) -> bool:
    """Whether a bar is set for the loss at this size, dtype and ranking."""
    return row["ranking"] == "sample" and (is_cifar(row) or roofline_bar(row) is not None)


def reports(row: Record) -> bool:
    """Whether a bar is set for it with the report."""
    return is_barred(row) and (is_cifar(row) or _has_report_bar(row))


def _launch(record: Record) -> list[Value]:
    return _grid(record, is_cifar, lambda row: row["device_time_us"], (OURS, REPORTED))


def _report(record: Record) -> list[Value]:
    """What the report adds, in µs."""
    times = [
        dict(_grid(record, _has_report_bar, lambda row: row["device_time_us"], (name,))).values()
        for name in (REPORTED, OURS)
    ]
    pairs = list(zip(*times, strict=False))
    why = [value for pair in pairs for value in pair if isinstance(value, str)]
    return [("", why[0] if why else pair[0] - pair[1]) for pair in pairs]


def _times(key: str, others: Sequence[str]) -> Callable[[Record], list[Value]]:
    """How many times this project's the others' ``key`` is, in the named cases on a GPU."""

    def find(record: Record) -> list[Value]:
        named: dict[str, dict[str, Record]] = {}
        for row in record["rows"]:
            if on_gpu(record) and row["case"] and row["ranking"] == "sample" and is_cifar(row):
                named.setdefault(row["case"], {})[row["implementation"]] = row
        values = []
        for case, rows in named.items():
            for other in (name for name in others if name in rows):
                ours, theirs = (_value(rows[name], lambda row: row[key]) for name in (OURS, other))
                why = [value for value in (ours, theirs) if isinstance(value, str)]
                values.append((f"{case}, {other}", why[0] if why else theirs / ours))
        return values

    return find


def roofline_bar(row: Record) -> tuple[float, float | None] | None:
    """The share of the roofline that is wanted of a row of the loss, and the stretch."""
    for _, least, most, dtype, bound, stretch in ROOFLINE_BARS:
        if least <= row["classes"] <= most and dtype == row["dtype"]:
            return (bound, stretch) if _is_large(row) and row["ranking"] == "sample" else None
    return None


def _roofline(least: int, most: int, dtype: str) -> Callable[[Record], list[Value]]:
    def wanted(row: Record) -> bool:
        return least <= row["classes"] <= most and dtype == row["dtype"] and _is_large(row)

    return lambda record: _grid(record, wanted, lambda row: row["roofline_percent"])


def _memory(record: Record) -> list[Value]:
    def gradients(row: Record) -> float | None:
        gradient = row["rows"] * row["classes"] * ITEMSIZES[row["dtype"]] / 2**20
        return None if row["peak_extra_mib"] is None else row["peak_extra_mib"] / gradient

    return _grid(record, _is_large, gradients)


def _kernel(record: Record) -> list[Value]:
    return [
        # Its status may tell of a way of timing that failed beside one that did not.
        ("", row["images_per_second"] / 1e6 if row.get("images_per_second") else row["status"])
        for row in record["kernel"]
        if (row["size"], row["batch"]) == (32, 512)
    ]


def _ffcv(record: Record) -> list[Value]:
    rows = {(row["loader"], row["workers"]): row for row in record["rows"]}
    values = []
    for (name, workers), theirs in rows.items():
        if name == "torch" and (ours := rows.get(("ffcv", workers))):
            why = [row["status"] for row in (ours, theirs) if row["status"] != "ok"]
            number = why[0] if why else ours["images_per_second"] / theirs["images_per_second"]
            values.append((f"{workers} workers", number))
    return values


def _is_classroom(row: Record) -> bool:
    return row["classroom"].startswith("resnet20 ← resnet56 ") and row["batch"] == 64


def _step(key: str) -> Callable[[Record], list[Value]]:
    def find(record: Record) -> list[Value]:
        return [
            ("", _value(row, lambda row: row.get(key)))
            for row in record["rows"]
            if on_gpu(record) and _is_classroom(row) and row["implementation"] == "trainer"
        ]

    return find


def _whole(record: Record) -> list[Value]:
    """Minutes of 240 epochs with their evaluation, from as many as were trained."""
    rows = [row for row in record["whole"] if _is_classroom(row)] if on_gpu(record) else []
    for row in rows:
        if epochs := row.get("epochs"):
            seconds = row["train_seconds"] + row["evaluation_seconds"]
            return [(f"{epochs} epochs trained", 240 * seconds / epochs / 60)]
    projected = _step("projected_minutes")(record)
    return [
        ("", f"projected from a round, training alone: {number:.1f} min")
        for _, number in projected
        if not isinstance(number, str)
    ]


_LAUNCH = "Loss and gradient in one launch, B 64–512, C 100, M 6: "
_SHARE = "Loss and gradient, all mentors active, B·C ≥ 2²², share of the roofline: "
_STEP = "Whole step, resnet20 ← resnet56 and 5 peers, batch 64"
# As the records have them, in the order of the page.
BARS = (
    Bar(
        _LAUNCH + "GPU time of a graph's replay on an H100, with the report and without",
        *("≤ 4.5 µs (3.5)", 4.5, 3.5, "{:.2f} µs", "loss", _launch, True, "H100"),
    ),
    Bar(
        _LAUNCH + "beside eager, replayed alike",
        *("≥ 15× (25×)", 15, 25, "{:.1f}×", "loss", _times("device_time_us", ["eager"])),
    ),
    Bar(
        _LAUNCH + "beside the best mode of `torch.compile`, replayed alike",
        *("≥ 2× (4×)", 2, 4, "{:.1f}×", "loss", _times("device_time_us", COMPILE_MODES)),
    ),
    Bar(
        _LAUNCH + "host time beside eager, no graphs",
        *("≥ 10×", 10, None, "{:.1f}×", "loss", _times("host_time_us", ["eager"])),
    ),
    *(
        Bar(
            f"{_SHARE}{classes}, {dtype}",
            *(f"≥ {bound} %" + (f" ({stretch})" if stretch else ""), bound, stretch),
            *("{:.0f} %", "loss", _roofline(least, most, dtype)),
        )
        for classes, least, most, dtype, bound, stretch in ROOFLINE_BARS
    ),
    Bar(
        "What the report adds to one launch, B 8192, C 1,000, M 6, float32: GPU time",
        *("≤ 3 µs", 3, None, "{:.2f} µs", "loss", _report, True),
    ),
    Bar(
        "Extra memory of the loss, B·C ≥ 2²², where what grows with B·M hardly counts",
        *("≤ 2 gradients + O(B·M)", 2, None, "{:.2f} gradients", "loss", _memory, True),
    ),
    Bar(
        "Resident loader, batch 512, CIFAR images to bfloat16, channels-last: GPU time",
        *("≥ 50 million images/s (150)", 50, 150, "{:.0f} million images/s", "loaders", _kernel),
    ),
    Bar(
        "FFCV loader beside the torch DataLoader, same cores",
        *("≥ 5×", 5, None, "{:.1f}×", "loaders", _ffcv),
    ),
    Bar(
        f"{_STEP}: images/s beside the straightforward loop",
        *("≥ 8× (15×)", 8, 15, "{:.1f}×", "step", _step("times_the_loop")),
    ),
    Bar(
        f"{_STEP}: time outside the networks' own forward and backward",
        *("≤ 10 %", 10, None, "{:.0f} %", "step", _step("outside_networks_percent"), True),
    ),
    Bar(
        "The 240-epoch run of that classroom, evaluation included, on one H100",
        *("≤ 8 min (4)", 8, 4, "{:.1f} min", "step", _whole, True, "H100"),
    ),
)


def main() -> None:
    """Print each bar that a folder's records are about, what was measured, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that benchmarks wrote")
    out = parser.parse_args().out
    for name in dict.fromkeys(bar.record for bar in BARS):
        if (path := out / f"{name}.json").exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            for bar in BARS:
                if bar.record == name:
                    measured, verdict = bar.judge(record)
                    print(f"{bar.what}: {bar.text}: {measured[:150]}: {verdict}")


if __name__ == "__main__":
    main()
