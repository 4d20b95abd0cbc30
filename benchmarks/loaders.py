"""Compare the loaders with FFCV's own operations, torchvision's transforms and bare copies.

    python benchmarks/loaders.py [--images N] [--size 32] [--batch 512] [--rounds 3] [--workers N]
                                 [--device cpu|cuda] [--minutes M] [--out FOLDER]

Random images are shuffled, cropped with a padding of 4 pixels, flipped and normalised, to float32
on the CPU and bfloat16 on a GPU. Every row runs in its own process, because some set thread counts
or may abort, and memory is measured per process. On a GPU the resident loader's kernel comes first.
All rows are prepared, then timed in rounds, interleaved. Prints the tables and writes loaders.json
after every row.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classroomkd.data import ImageSet
from classroomkd.errors import UserError
from loader_processes import Process, ProcessRow, RowError, reason, stop_all
from loader_rows import FLOORS, Kernel, RunningLoader, Setting, floor_of, row_names
from measure import environment, write_json
from result_tables import LOADER_LEGEND, floor_lines, terminal

KERNEL_SIZES = (32, 224)
PACKAGES = ("numba", "numpy", "ffcv", "opencv-python-headless", "torchvision", "pillow")


class LoaderRow(ProcessRow):
    """One loader with one number of workers."""

    def __init__(self, setting: Setting, name: str, workers: int) -> None:
        super().__init__(
            partial(RunningLoader, setting, name, workers),
            setting.device,
            loader=name,
            workers=workers,
            floor=floor_of(name, setting.device) if name not in FLOORS else None,
        )

    def prepare(self) -> None:
        """Open two loaders, one after another, and read an epoch of each."""
        before = self.process.memory()
        first, held = self.process.ask("open"), []
        gpu = self.process.ask("finish", held)
        again = self.process.ask("open")
        self.process.ask("finish")
        self.record |= {
            "first_batch": first,
            "first_batch_again": again,
            "host_mib": (max(held) - before) / 2**20 if before else None,
            "gpu_mib": None if gpu is None else gpu / 2**20,
        }

    def measure(self) -> None:
        """Time one round."""
        self.record["rounds"].append(self.process.ask("round"))
        rate = statistics.median(self.record["rounds"])
        self.record |= {"status": "ok", "images_per_second": rate}


def floors(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The fastest bare copy of each kind; adds to every row its share of its floor."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row["loader"]
        if name in FLOORS and row["status"] == "ok":
            n_bytes = setting.bytes_per_image(name)
            fastest = max(row["images_per_second"], found.get(name, {}).get("images_per_second", 0))
            found[name] = {
                "bytes_per_image": n_bytes,
                "gigabytes_per_second": n_bytes * fastest / 1e9,
                "images_per_second": fastest,
            }
    for row in rows:
        floor = found.get(row["floor"] or row["loader"])
        measured = floor is not None and row["status"] == "ok"
        row["floor_percent"] = (
            100 * row["images_per_second"] / floor["images_per_second"] if measured else None
        )
    return found


def kernel_row(setting: Setting, size: int, ends: float) -> dict[str, Any]:
    """The resident loader's kernel alone: time of a batch on the GPU and on the host."""
    row = {"size": size, "batch": setting.batch, "status": "not run: out of time"}
    if time.monotonic() > ends - 30:
        return row
    process = Process(partial(Kernel, setting, size), setting.device, ends)
    try:
        process.ready()
        row |= process.ask("measure")
    except RowError as failure:
        return row | {"status": str(failure)}
    finally:
        process.stop()
    return row | {"status": "ok", "images_per_second": setting.batch / row["graph_us"] * 1e6}


def kernel_share(setting: Setting, row: dict[str, Any], found: dict[str, dict[str, float]]) -> None:
    """Add the kernel's share of the bare copy within GPU memory, if both were measured."""
    floor = found.get("device copy")
    if floor and "images_per_second" in row:
        n_bytes = 3 * row["size"] ** 2 * (1 + setting.dtype.itemsize)
        gigabytes = n_bytes * row["images_per_second"] / 1e9
        row["floor_percent"] = 100 * gigabytes / floor["gigabytes_per_second"]


def random_images(count: int, size: int) -> ImageSet:
    """``count`` random images of 100 classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, 100, count), [str(k) for k in range(100)])


def pack_beton(setting: Setting) -> None:
    """Write the images as .beton, if FFCV is available."""
    try:
        from classroomkd.data.ffcv.beton import pack

        pack(setting.images(), setting.beton)
    except (UserError, ImportError) as error:  # the rows that need the file report it too
        print(reason(error), file=sys.stderr)


def run(setting: Setting, n_rounds: int, seconds: float, report: Callable[[dict], None]) -> dict:
    """Measure all rows; ``report`` is called with the record as it grows."""
    to_prepare, to_measure, ends = (time.monotonic() + x * seconds for x in (0.5, 0.8, 0.95))
    rows = [LoaderRow(setting, *name) for name in row_names(setting)]
    record = {
        "benchmark": "loaders",
        "environment": environment(*PACKAGES),
        "images": setting.count,
        "size": setting.shape[:2],
        "batch": setting.batch,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": setting.device.type,
        "rows": [row.record for row in rows],
        "kernel": [],
        "floors": {},
    }
    if setting.device.type == "cuda":
        for size in KERNEL_SIZES:
            record["kernel"].append(kernel_row(setting, size, ends))
            report(record)
    try:
        for row in rows:  # in parallel, before anything is timed
            row.start(ends)
        pack_beton(setting)
        for row in rows:
            row.attempt(row.process.ready)
        report(record)
        for row in rows:
            if time.monotonic() < to_prepare:
                row.attempt(row.prepare)
                report(record)
            about = row.record.get("first_batch", row.record["status"])
            print(row.record["loader"], row.record["workers"], about, file=sys.stderr, flush=True)
        for number in range(n_rounds):
            for row in rows:
                if time.monotonic() < to_measure and "first_batch" in row.record:
                    row.attempt(row.measure)
                    record["floors"] = floors(setting, record["rows"])
                    report(record)
            print(f"round {number + 1} of {n_rounds}", file=sys.stderr, flush=True)
    finally:
        stop_all(rows)
    for row in record["kernel"]:
        kernel_share(setting, row, record["floors"])
    report(record)
    return record


def main() -> int:
    """Run the benchmark; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu, cores = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--images", type=int, default=50_000 if gpu else 10_000, help="how many (%(default)s)")
    add("--size", type=int, default=32, help="height and width (%(default)s)")
    add("--batch", type=int, default=512, help="images per batch (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--workers", type=int, default=cores, help="besides rows with 1 (the cores: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--minutes", type=float, default=math.inf, help="time limit")
    add("--out", type=Path, help="folder for loaders.json")
    arguments = parser.parse_args()
    if arguments.batch > arguments.images:
        parser.error(f"a batch of {arguments.batch} needs more than {arguments.images} images")

    def report(record: dict[str, Any]) -> None:
        if arguments.out:
            write_json(arguments.out, "loaders", record)

    with tempfile.TemporaryDirectory(prefix="loaders-") as folder:
        image_set = random_images(arguments.images, arguments.size)
        device = torch.device(arguments.device)
        setting = Setting.of(Path(folder), image_set, arguments.batch, arguments.workers, device)
        record = run(setting, arguments.rounds, 60 * arguments.minutes, report)
    report(record)
    print(terminal(record), record["environment"], floor_lines(record), LOADER_LEGEND, sep="\n")
    return int(any("failed" in row["status"] for row in record["rows"] + record["kernel"]))


if __name__ == "__main__":
    sys.exit(main())
