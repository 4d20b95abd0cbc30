"""Format records as tables: for the terminal, and as Markdown for the page of ``document.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, headings, body

MACHINE = {  # key of an environment → how its value is printed
    "multiprocessors": "{} multiprocessors",
    "memory_gib": "{} GiB",
    "l2_mib": "{} MiB of L2 cache",
    "cpu_threads": "{} CPU threads in torch",
}
COLUMNS = (  # heading, key, format
    ("device µs", "device_time_us", ".2f"),
    ("timed by", "device_time_by", ""),
    ("host µs", "host_time_us", ".0f"),
    ("GB/s", "gigabytes_per_second", ".4g"),
    ("Gexp/s", "gigaexponentials_per_second", ".4g"),
    ("roofline %", "roofline_percent", ".0f"),
    ("peak MiB", "peak_extra_mib", ".2f"),
    ("loss error", "loss_relative_error", ".0e"),
    ("gradient error", "grad_relative_error", ".0e"),
)
LEGEND = (
    "GB/s, Gexp/s and roofline % are based, in every row, on what this project's kernels must move "
    "and compute. Device time is the replay time of a CUDA graph with a cold L2 cache. Where no "
    "graph can be captured, it is the profiler's sum over kernels and copies, without the gaps "
    "between them (own graph: the same for the graphs that this mode makes itself, whose memory "
    "is not counted). On the CPU it is wall time. Host time is that of the Python call, outside "
    "graphs. Errors are relative norms against float64."
)

KERNEL_COLUMNS = (
    ("graph µs", "graph_us", ".2f"),
    ("host µs", "host_us", ".1f"),
    ("images/s", "images_per_second", ",.0f"),
    ("% of floor", "floor_percent", ".0f"),
)
LOADER_HEADINGS = (
    *("loader", "workers", "images/s", "slowest–fastest round", "% of floor"),
    *("first batch, s", "again, s", "host MiB", "GPU MiB"),
)
LOADER_LEGEND = (
    "Images per second over whole epochs: the median of the rounds, which are interleaved with "
    "those of all other rows. The first batch is that of a new process, including its imports "
    "beyond torch and this library; again is that of a new loader in the same process. * marks "
    "times that include compilation; elsewhere the code was compiled already. Host memory is the "
    "peak of the process and its workers in an epoch minus that before loading the images, without "
    "file pages. GPU memory is what torch allocated. The floor is a bare copy: on the CPU, of each "
    "image's bytes into as many numbers, always to the same memory; on a GPU, of as many bytes "
    "within its memory for the resident loader, and of the finished numbers from pinned memory for "
    "all others."
)

STEP_COLUMNS = (
    ("images/s", "images_per_second", ",.0f"),
    ("× the loop", "times_the_loop", ".1f"),
    ("240 epochs, projected min", "projected_minutes", ",.1f"),
    ("start, s", "start_seconds", ".1f"),
    ("host MiB", "host_mib", ",.0f"),
    ("GPU MiB", "gpu_mib", ",.0f"),
)
LOSS_CPU_LEGEND = (
    "float32, default options, all mentors active. Each time is the minimum over rounds in which "
    "the implementations alternate: process CPU time with one thread, else wall time. "
    "Eager and torch.compile have the same plain formulation, and autograd; torch.compile "
    "compiles each of the first sizes separately, the grid with dynamic sizes. A load average "
    "above the number of threads means that other processes were using the machine."
)
LOSS_LINEAR_LEGEND = (
    "Loss and gradients at hidden states and weight, results included. On the CPU, with one thread "
    "and a memory budget of 4 MiB in place of the default's 256, time is that of the clock, and "
    "memory the process's peak beyond what it held before. Liger's is another loss: forward KL, "
    "without ranks, temperatures or task. The difference is that of the gradients of whole logits "
    "from those of the linear heads, as a relative norm."
)
STEP_LEGEND = (
    "Images per second over an epoch or its first seconds, loader included: the median of the "
    "rounds, which are interleaved with those of the other rows. The projection is for training "
    "240 epochs of 50,000 images, without evaluation. Start is the time until the first steps are "
    "done, compilation included. Host memory is the peak of the process and its workers until then "
    "minus that before; GPU memory is what torch reserved. The breakdown, in ms per step, comes "
    "from further steps: each part ends with its last kernel, and is timed by events in the step's "
    "CUDA graph if there is one, on the CPU by the clock. “loader and between” is the time from "
    "the end of a step to the start of the next. The trainer's loss includes its gradient and "
    "report; the loop computes the gradient of the loss in its student backward. The loop's "
    "convolutions use torch's defaults, that is TF32 on GPUs that have it."
)


_LEGENDS = {"step": STEP_LEGEND, "loss_cpu": LOSS_CPU_LEGEND, "loss_linear": LOSS_LINEAR_LEGEND}


def _formatted(row: Row, key: str, form: str) -> str:
    return "–" if row.get(key) is None else format(row[key], form)


def cells(row: Row) -> list[str]:
    """A row's measurements, or its status if there are none."""
    if row["status"] != "ok":
        return [row["status"]]
    return [_formatted(row, key, form) for _, key, form in COLUMNS]


def loader_cells(row: Row) -> list[str]:
    """A loader's measurements, or its status if there are none."""
    name = [row["loader"], str(row["workers"] or "–")]
    if row["status"] != "ok":
        return [*name, row["status"]]
    return [
        *name,
        _formatted(row, "images_per_second", ",.0f"),
        f"{min(row['rounds']):,.0f}–{max(row['rounds']):,.0f}",
        _formatted(row, "floor_percent", ".0f" if (row["floor_percent"] or 0) >= 10 else ".1f"),
        *(
            f"{row[key]['seconds']:.2f}{'*' if row[key]['compiled'] else ''}"
            for key in ("first_batch", "first_batch_again")
        ),
        _formatted(row, "host_mib", ".0f"),
        _formatted(row, "gpu_mib", ".0f"),
    ]


def _loader_tables(record: Row) -> list[Table]:
    """All loaders, then the kernel of the resident loader if there is a GPU."""
    height, width = record["size"]
    title = (
        f"{record['images']:,} images of {height}×{width}, batches of {record['batch']}, "
        f"{record['dtype']}, {record['device']}"
    )
    found = [(title, list(LOADER_HEADINGS), [loader_cells(row) for row in record["rows"]])]
    if record["kernel"]:
        headings = ["size", *(heading for heading, _, _ in KERNEL_COLUMNS), "status"]
        body = [
            [
                f"{row['size']}×{row['size']}",
                *(_formatted(row, key, form) for _, key, form in KERNEL_COLUMNS),
                row["status"],
            ]
            for row in record["kernel"]
        ]
        found.append(("The resident loader's kernel, per batch", headings, body))
    return found


def _step_tables(record: Row) -> list[Table]:
    """For each classroom the rates and the breakdown; then the whole epochs."""
    found = []
    for classroom in dict.fromkeys(row["classroom"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["classroom"] == classroom]
        headings = ["batch", "implementation", "loader", "dtype"]
        headings += [heading for heading, _, _ in STEP_COLUMNS]
        headings.insert(5, "slowest–fastest round")
        title = f"{classroom}: {_images_of(rows[0])}"
        found.append((title, headings, [_step_cells(row) for row in rows]))
        timed = [row for row in rows if "parts_status" in row]
        parts = next((list(row["parts_ms"]) for row in timed if "parts_ms" in row), [])
        body = [[str(row["batch"]), row["implementation"], *_part_cells(row)] for row in timed]
        headings = ["batch", "implementation", *parts, "ms per step", "outside the networks %"]
        found.append((f"{classroom}: breakdown of a step", headings, body))
    if record["whole"]:
        headings = ["classroom", "images", "batch", "epochs", "min", "evaluation min", "status"]
        body = [
            [row["classroom"], _images_of(row), str(row["batch"]), *_whole_cells(row)]
            for row in record["whole"]
        ]
        title = "Whole epochs of the trainer, evaluated on a fifth as many images"
        found.append((title, headings, body))
    return found


def _images_of(row: Row) -> str:
    height, width = row["size"]
    return f"{row['images']:,} images of {height}×{width}"


def _step_cells(row: Row) -> list[str]:
    name = [str(row["batch"]), row["implementation"], row.get("loader", ""), row.get("dtype", "")]
    if row["status"] != "ok":
        return [*name, row["status"]]
    values = [_formatted(row, key, form) for _, key, form in STEP_COLUMNS]
    values.insert(1, f"{min(row['rounds']):,.0f}–{max(row['rounds']):,.0f}")
    return name + values


def _part_cells(row: Row) -> list[str]:
    if row["parts_status"] != "ok":
        return [row["parts_status"]]
    times = row["parts_ms"].values()
    return [
        *(f"{milliseconds:.3f}" for milliseconds in (*times, sum(times))),
        f"{row['outside_networks_percent']:.0f}",
    ]


def _whole_cells(row: Row) -> list[str]:
    if not row.get("epochs"):
        return ["0", "–", "–", row["status"]]
    evaluation = row["evaluation_seconds"]
    minutes = [(row["train_seconds"] + evaluation) / 60, evaluation / 60]
    return [str(row["epochs"]), *(f"{value:.2f}" for value in minutes), row["status"]]


def tables(record: Row) -> list[Table]:
    """The tables of a record; a row that has only its status is filled up."""
    by_name = {
        **{"loaders": _loader_tables, "step": _step_tables, "roofline": lambda _: []},
        **{"loss_cpu": _loss_cpu_tables, "loss_linear": _loss_linear_tables},
    }
    made = by_name.get(record.get("benchmark"), _loss_tables)(record)
    return [
        (title, headings, [row + [""] * (len(headings) - len(row)) for row in body])
        for title, headings, body in made
    ]


def _loss_cpu_tables(record: Row) -> list[Table]:
    """For each number of threads the sizes in full, and of the grid the gain."""
    found = []
    for threads in dict.fromkeys(row["threads"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["threads"] == threads]
        names = [*rows[0]["microseconds"]]
        for kind, what in (("size", "loss and gradient, ms"), ("grid", "the grid, ms")):
            body = [
                [
                    *(str(row[key]) for key in ("rows", "classes", "mentors")),
                    *(f"{row['microseconds'][name] / 1000:.3f}" for name in names),
                    f"{row['times_faster']:.1f}",
                ]
                for row in rows
                if row["kind"] == kind
            ]
            title = f"{threads} thread{'s' * (threads > 1)}: {what}"
            if body:
                found.append((title, ["B", "C", "M", *names, "× the best of PyTorch"], body))
    return found


def _loss_linear_tables(record: Row) -> list[Table]:
    """One table: sizes by implementations."""
    body = [
        [
            *(str(row[key]) for key in ("rows", "classes", "width", "mentors", "dtype")),
            row["implementation"],
            _formatted(row, "milliseconds", ".1f") if row["status"] == "ok" else row["status"],
            _formatted(row, "peak_extra_mib", ".0f"),
            _formatted(row, "difference", ".0e"),
        ]
        for row in record["rows"]
    ]
    headings = ["N", "V", "H", "M", "dtype", "implementation", "ms", "peak MiB", "difference"]
    return [("Loss and gradients of linear heads", headings, body)]


def _loss_tables(record: Row) -> list[Table]:
    """The grid, then each named case in detail."""
    headings = ["B", "C", "M"]
    grid: dict[tuple, dict[str, str]] = {}
    named: dict[str, list[list[str]]] = {}
    for row in record["rows"]:
        kind = f"{row['dtype']}, {row['ranking']}"
        if row["implementation"].endswith(", report") and not row["case"]:
            kind += ", report"
        size = row["rows"], row["classes"], row["mentors"]
        if row["case"]:
            title = "{}: B = {}, C = {}, M = {}, ".format(row["case"], *size) + kind
            named.setdefault(title, []).append([row["implementation"], *cells(row)])
            continue
        if kind not in headings:
            headings.append(kind)
        measured = row["status"] == "ok"
        grid.setdefault(size, {})[kind] = (
            f"{row['device_time_us']:.2f} µs, {row['roofline_percent']:.0f} %"
            if measured
            else row["status"]
        )
    body = [
        [*map(str, size), *(by_kind.get(kind, "") for kind in headings[3:])]
        for size, by_kind in sorted(grid.items(), key=lambda line: (line[0][1], line[0]))
    ]
    full = ["implementation", *(heading for heading, _, _ in COLUMNS)]
    return [
        ("This project: device time and share of the roofline", headings, body),
        *((title, full, rows) for title, rows in named.items()),
    ]


def terminal(record: Row) -> str:
    """The tables in columns of plain text."""
    return "\n\n".join(
        f"{title}\n{columns([headings, *body])}" for title, headings, body in tables(record)
    )


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(record: Row) -> str:
    """The tables as Markdown, below the machine and the legend."""
    from classroomkd.report.markup import markdown_table  # needs the packages of reports

    lines = [_machine(record["environment"]), "", _limits(record)]
    for title, headings, body in tables(record):
        lines += ["", f"**{title}**", "", markdown_table(headings, body)]
    return "\n".join(lines) + "\n"


def _machine(about: Row) -> str:
    """Machine, versions and date of a measurement."""
    parts = [about["device"]]
    parts += [said.format(about[key]) for key, said in MACHINE.items() if key in about]
    named = {"device", "date", *MACHINE}
    parts += [f"{key} {value}" for key, value in about.items() if value and key not in named]
    return f"{', '.join(parts)}; {about['date']}."


def _limits(record: Row) -> str:
    """The measured limits of the machine, and the meaning of the columns."""
    name = record.get("benchmark")
    if name == "loaders":
        return f"{floor_lines(record)} {LOADER_LEGEND}"
    if name in _LEGENDS:
        return _LEGENDS[name]
    ceilings = record["roofline"]
    measured = (
        f"Measured roofline: {ceilings['copy_gigabytes_per_second']:.0f} GB/s copied, "
        f"{ceilings['gigaexponentials_per_second']:.0f} Gexp/s."
    )
    return f"{measured} {LEGEND}" if "rows" in record else measured


def floor_lines(record: Row) -> str:
    """Each floor as bytes per image at the measured bandwidth."""
    return " ".join(
        f"Floor, {name}: {floor['bytes_per_image']:,} bytes per image at "
        f"{floor['gigabytes_per_second']:.1f} GB/s = {floor['images_per_second']:,.0f} images/s."
        for name, floor in record["floors"].items()
    )
