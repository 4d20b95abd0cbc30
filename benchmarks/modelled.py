"""The model's record as Markdown: assumptions, predictions and measurements, known kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from classroomkd.report.markup import markdown_table
from summary import REPORTED, THIS

Record = Mapping[str, Any]
LIMITS = ("memory", "exponentials", "issue", "latency")
CASE = ("rows", "classes", "mentors", "dtype", "report")
CARD = "H100"


def markdown(record: Record, devices: Mapping[str, Mapping[str, Record]]) -> Iterator[str]:
    """Blocks of the page; ``devices`` have the measured records."""
    done = len(record["rows"])
    yield (
        "The time of the loss with its gradient on an H100 (SXM): the machine code that Triton "
        f"{record['triton']} generates for compute capability 9.0, simulated instruction by "
        "instruction on a model of the card. **None of these numbers was measured**, except those "
        "under “measured”. All mentors are active, no tensor is in L2 when the launch starts, and "
        "the time is that of the launch alone."
        + (f" {done} of {record['calls']} cases." if done < record["calls"] else "")
    )
    yield _predictions(record, _measured(devices))
    yield (
        "The floor is the larger of the bytes that must move over 3 TB/s and 1 + 3M exponentials a "
        "class over their rate; with as many reads of each row as the kernel makes, and with one "
        "(in brackets). The tail is what the last program does after all others. What limits is "
        "the largest of four times, each as if nothing else took any: the bytes from and to DRAM, "
        "the special function units, issuing, and the programs' own latencies."
    )
    yield "The results' sensitivity to the latency of DRAM, the least certain assumption:"
    yield markdown_table(
        ["B", "C", "M", "dtype", "500 cycles", "1200 cycles"],
        [
            [
                *(str(one[key]) for key in CASE[:4]),
                *(f"{one[f'dram_latency_{cycles}']:,.4g} µs" for cycles in (500, 1200)),
            ]
            for one in record["sensitivity"]
        ],
    )
    yield (
        "The same model on plain kernels (`benchmarks/known_kernels.py`), beside the TB/s "
        "published for similar kernels, counting each number as read once and written once. All "
        "are limited by memory, so they show that the model adds no spurious limit, but not that "
        "its latencies are right. It is too fast if a kernel's spills leave L1:"
    )
    yield markdown_table(
        ["kernel", "rows", "classes", "dtype", "modelled TB/s", "published TB/s", "of"],
        [
            [
                *(str(one[key]) for key in ("kernel", "rows", "classes", "dtype")),
                *(f"{one[key]:.2f}" for key in ("modelled", "published")),
                one["of"],
            ]
            for one in record["compared"]
        ],
    )
    yield "What is assumed:"
    yield markdown_table(["what", "how much", "from"], [list(one) for one in record["assumptions"]])


def _measured(devices: Mapping[str, Mapping[str, Record]]) -> dict[tuple[object, ...], float]:
    """Device times measured on the modelled card, by case."""
    reports = {THIS: False, REPORTED: True}
    return {
        (*(row[key] for key in CASE[:4]), reports[row["implementation"]]): row["device_time_us"]
        for records in devices.values()
        for row in records.get("loss", {}).get("rows", ())
        if CARD in records["loss"]["environment"]["device"]
        and row["implementation"] in reports
        and (row["ranking"], row["status"]) == ("sample", "ok")
    }


def _predictions(record: Record, measured: Mapping[tuple[object, ...], float]) -> str:
    body = []
    for row in sorted(record["rows"], key=lambda row: (row["classes"], *map(row.get, CASE))):
        case = tuple(row[key] for key in CASE)
        small = row["rows"] * row["classes"] < 2**22
        body.append(
            [
                *(str(value) for value in case[:3]),
                f"{row['dtype']}{', report' if row['report'] else ''}",
                f"{row['time']:,.4g}",
                f"{measured[case]:,.4g}" if case in measured else "–",
                "–" if small else f"{row['path_percent']:.0f} ({row['one_read_percent']:.0f})",
                f"{row['tail']:.2g}",
                max(LIMITS, key=row.__getitem__),
                f"{row['warps']:.0f}",
                f"{row['registers']:.0f}",
                f"{row['in_flight'] / 1000:.1f}",
            ]
        )
    headings = ["B", "C", "M", "dtype", "µs", "measured µs", "% of floor", "tail µs", "limited by"]
    return markdown_table([*headings, "warps", "registers", "KB in flight"], body)
