"""Generate docs/benchmarks.md, its figures, and the tables of other pages under docs/.

    python benchmarks/document.py [OUT]

The input is benchmarks/results/. OUT is a folder written by the benchmarks or by run_gpu.sh; its
records are first copied to the folder of their device, where they replace older ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mentor_cache
import mentor_check
import modelled
import teaching as teaching_tables
from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.report.markup import markdown_table
from classroomkd.report.numbers import differences, percent
from classroomkd.report.run_table import COLUMNS, evidence, result_rows
from classroomkd.report.table_page import markdown as reproduction_markdown
from classroomkd.reproduce.tables import TABLES
from figures import drawings
from measure import as_json
from result_tables import markdown
from summary import on_gpu

ROOT = Path(__file__).resolve().parent.parent
MODELLED = "modelled"  # the folder of what no device measured
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/benchmarks.md"
REPRODUCTION = ROOT / "docs/reproduction.md"
TEACHING = ROOT / "docs/teaching.md"
MENTOR_CHECK = ROOT / "docs/mentor-check.md"
MENTOR_CACHE = ROOT / "docs/mentor-cache.md"
LINK = "../benchmarks/results"  # of the page

Record = Mapping[str, Any]
Records = dict[str, dict[str, Record]]  # device → name → record

SECTIONS = {  # record → heading, command that measures it
    "roofline": ("Roofline", "python benchmarks/roofline.py --out OUT"),
    "loss": ("Loss", "python benchmarks/loss.py --out OUT"),
    "loss_cpu": ("Loss on a CPU", "python benchmarks/loss_cpu.py --out OUT"),
    "loss_linear": ("Loss of linear heads", "python benchmarks/loss_linear.py --out OUT"),
    "loaders": ("Loaders", "python benchmarks/loaders.py --images 50000 --out OUT"),
    "step": ("Training step", "python benchmarks/step.py --whole 5 --out OUT"),
    "quickstart": ("Quickstart", "classroomkd quickstart --out RUN"),
}
REPRODUCTIONS = {
    f"reproduction-{name}": (
        f"Reproduction: {table.title}",
        f"classroomkd reproduce {name} --data cifar-100-python/ --out OUT/{name}",
    )
    for name, table in TABLES.items()
}
MARK = "<!-- benchmarks/document.py writes what follows -->"
ON_A_GPU = "benchmarks/run_gpu.sh OUT"


def read(results: Path) -> Records:
    """The records of all devices, GPUs first."""
    found = {
        folder.name: {path.stem: _json(path) for path in sorted(folder.glob("*.json"))}
        for folder in sorted(results.iterdir())
        if folder.is_dir() and folder.name != MODELLED
    }
    return dict(sorted(found.items(), key=lambda device: not _is_gpu(device[1])))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _is_gpu(records: Mapping[str, Record]) -> bool:
    return any(map(on_gpu, records.values()))


def document(devices: Records, compiled: Record, model: Record) -> str:
    """The page."""
    blocks = [_HEAD]
    if not any(map(_is_gpu, devices.values())):
        blocks.append(_NOT_YET)
    for device, records in devices.items():
        blocks += [f"## {device}", *_of_device(device, records)]
    blocks += ["## Modelled, not measured", *_of_model(model, devices)]
    blocks += ["## Compiled kernels", *_of_compiled(compiled)]
    return _joined(blocks)


def _joined(blocks: Iterable[str]) -> str:
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


_HEAD = f"""# Benchmarks

`python benchmarks/document.py` generates this page and its figures from the records in
`benchmarks/results/`. On a machine with a GPU,

```sh
{ON_A_GPU}
python benchmarks/document.py OUT
```

measures everything that needs a GPU, within nine minutes, and adds the records.
`--parts loss --minutes 9` gives all the time to one benchmark."""
_NOT_YET = "**Nothing has been measured on a GPU yet.**"


def _of_device(device: str, records: Mapping[str, Record]) -> Iterator[str]:
    for name, (heading, command) in (SECTIONS | REPRODUCTIONS).items():
        if name not in records:
            continue
        yield f"### {heading}"
        if name in REPRODUCTIONS:
            data = ", ".join(sorted({run["data"] for run in records[name]["runs"]}))
            link = _link(device, name)
            yield f"[reproduction.md]({REPRODUCTION.name}) has the table of {link}, run on {data}."
            continue
        yield f"{_link(device, name)}, by `{command}`:"
        yield _quickstart(records[name]) if name == "quickstart" else markdown(records[name])
        yield from _figures(device, name, records[name])


def _link(device: str, name: str) -> str:
    return f"[{name}.json]({LINK}/{device}/{name}.json)"


def _figures(device: str, name: str, record: Record) -> Iterator[str]:
    for figure, drawing in drawings(device, name, record).items():
        yield f"![{drawing.caption}](figures/{figure})\n\n{drawing.caption}"


def _up_to_mark(text: str) -> str:
    head, mark, _ = text.partition(MARK)
    return head + mark


def reproduction(text: str, devices: Records) -> str:
    """docs/reproduction.md: ``text`` up to the mark, and all tables after it."""
    blocks = [_up_to_mark(text)]
    for device, records in devices.items():
        for name in filter(records.__contains__, REPRODUCTIONS):
            table = TABLES[records[name]["table"]]
            blocks.append(reproduction_markdown(records[name], table.title))
            if name == "reproduction-ca_mkd":
                blocks.append(_one_change(records[name]))
            blocks.append(f"From {_link(device, name)}.")
    return _joined(blocks)


def _one_change(record: Record) -> str:
    """What each change of the classroom, or of CA-MKD, makes of the accuracy."""
    parts = {"test images": "last", "validation images": "validation_last"}
    top1: dict[tuple[str, str, str], dict[int, float]] = {}
    for run in record["runs"]:
        for key in parts.values():
            these = top1.setdefault((run["classroom"], run["variant"], key), {})
            these[run["seed"]] = run[key]
    rows = []
    variants = dict.fromkeys((run["classroom"], run["variant"]) for run in record["runs"])
    for classroom, variant in variants:
        origin, _, change = variant.partition("+")
        origin = "classroom" if variant == "ca_mkd" else origin
        if origin == variant:  # alone and classroom, which others are compared with
            continue
        row = [classroom, f"{origin} + {change}" if change else f"{origin} → {variant}"]
        for key in parts.values():
            values = differences(top1[classroom, variant, key], top1[classroom, origin, key])
            row.append(percent(teaching_tables.interval(values), signed=True))
        rows.append([*row, str(len(values))])
    columns = ["classroom", "one change", *(f"on the {part}" for part in parts), "seeds"]
    table = markdown_table(columns, rows)
    return (
        "### One change at a time\n\nDifferences of *last*, paired by seed, in percentage points, "
        "with their 95 % confidence intervals by Student's t over the seeds:\n\n"
        f"{table}"
    )


def teaching(text: str, devices: Records) -> str:
    """docs/teaching.md: ``text`` up to the mark, and all tables after it."""
    blocks = [_up_to_mark(text)]
    for device, records in devices.items():
        for name in filter(records.__contains__, teaching_tables.RECORDS):
            heading, command, tables = teaching_tables.RECORDS[name]
            blocks += [f"## {heading}", f"{_link(device, name)}, by `{command}`:"]
            blocks += tables(records[name]["rows"])
            blocks += _figures(device, name, records[name])
    return _joined(blocks)


def checked(text: str, devices: Records) -> str:
    """docs/mentor-check.md: ``text`` up to the mark, and what was found after it."""
    blocks = [_up_to_mark(text)]
    for device, records in devices.items():
        if "mentor_check" in records:
            command = "python benchmarks/mentor_check.py --out OUT"
            blocks.append(f"{_link(device, 'mentor_check')}, by `{command}`:")
            blocks += mentor_check.markdown(records["mentor_check"])
    return _joined(blocks)


def cached(text: str, devices: Records) -> str:
    """docs/mentor-cache.md: ``text`` up to the mark, and what its options cost after it."""
    head, mark, _ = text.partition(MARK)
    blocks = [head + mark]
    for device, records in devices.items():
        if "mentor_cache" in records:
            command = "python benchmarks/mentor_cache.py --data FOLDER --out OUT"
            blocks.append(f"{_link(device, 'mentor_cache')}, by `{command}`:")
            blocks += mentor_cache.markdown(records["mentor_cache"])
    return _joined(blocks)


def _quickstart(summary: Record) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in summary["versions"].items())
    table = markdown_table(COLUMNS, result_rows(summary))
    return f"{summary['device']}, {versions}. {evidence(summary)}\n\n{table}"


def _of_compiled(compiled: Record) -> Iterator[str]:
    """Register counts per target and number of mentors, failed calls, and kernels that spill."""
    done, calls = compiled["done"], compiled["calls"]
    kernels = [
        (call, name, kernel)
        for call in compiled["compiled"]
        for name, kernel in call.get("kernels", {}).items()
    ]
    quickest = f", of which these are the {done} quickest to compile" if done < calls else ""
    yield (
        f"The kernels of the loss, cross-compiled with Triton {compiled['triton']}: {len(kernels)} "
        f"kernels of {done} calls ([compiled.json]({LINK}/compiled.json), by `python "
        "benchmarks/compiled.py --out FILE`). Every pair of values of the options, shapes, dtypes, "
        f"layouts and targets occurs in one of {calls} calls{quickest}. "
        f"{compiled['failed'] or 'None'} failed to compile. "
        "The largest number of registers per thread:"
    )
    mentors = sorted({call["n_mentors"] for call, *_ in kernels})
    most: dict[str, dict[int, int]] = {}
    for call, _, kernel in kernels:
        of_target = most.setdefault(call["target"], dict.fromkeys(mentors, 0))
        m = call["n_mentors"]
        of_target[m] = max(of_target[m], kernel["registers"])
    yield markdown_table(
        ["target", *(f"M = {m}" for m in mentors)],
        [
            [target, *(str(n or "–") for n in by_mentors.values())]
            for target, by_mentors in sorted(most.items())
        ],
    )
    failed = [call for call in compiled["compiled"] if "error" in call]
    if failed:
        yield "These calls failed:"
        keys = ("target", "n_classes", "n_mentors", "dtype", "error")
        yield markdown_table(
            ("target", "C", "M", "dtype", "error"),
            [[str(call[key]).partition("\n")[0] for key in keys] for call in failed],
        )
    spilling = [(call, name, kernel) for call, name, kernel in kernels if kernel["spilled_bytes"]]
    if not spilling:
        yield "No kernel spills registers."
        return
    yield f"{len(kernels) - len(spilling)} kernels spill no registers; these do:"
    yield markdown_table(
        ("target", "kernel", "C", "M", "dtype", "bytes per thread"),
        [
            [
                *(call["target"], name),
                *(str(call[key]) for key in ("n_classes", "n_mentors", "dtype")),
                str(kernel["spilled_bytes"]),
            ]
            for call, name, kernel in spilling
        ],
    )


def _of_model(model: Record, devices: Records) -> Iterator[str]:
    command = f"python benchmarks/model.py --out benchmarks/results/{MODELLED}/model.json"
    yield f"[model.json]({LINK}/{MODELLED}/model.json), by `{command}`:"
    yield from modelled.markdown(model, devices)


def take(out: Path, results: Path) -> Path:
    """Copy the records in ``out`` into the folder of their device, and return that folder.

    Raises UserError if there are no records, or records of several devices.
    """
    found = {path.name: path for path in sorted(out.glob("*.json")) if "benchmark" in _json(path)}
    names = {_folder_name(_json(path)) for path in found.values()}
    if len(names) != 1:
        what = f"of several devices ({', '.join(sorted(names))})" if names else "no"
        raise UserError(
            f"{out} holds {what} records; give a folder that benchmarks/run_gpu.sh wrote"
        )
    for path in sorted([*out.glob("*/results.json"), *out.glob("reproduction-*.json")]):
        found[f"reproduction-{_json(path)['table']}.json"] = path
    folder = results / names.pop()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        atomic_write(folder / name, as_json(_json(path)))
    return folder


def _folder_name(record: Record) -> str:
    if not on_gpu(record):
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write pages and figures; return 1 if matplotlib, for the figures, is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=Path, nargs="?", help="a folder of new records, copied to benchmarks/results"
    )
    out = parser.parse_args(arguments).out
    if out:
        try:
            print(take(out, RESULTS))
        except UserError as error:
            parser.error(str(error))
    devices = read(RESULTS)
    model = _json(RESULTS / MODELLED / "model.json")
    atomic_write(PAGE, document(devices, _json(RESULTS / "compiled.json"), model))
    print(PAGE)
    generated = {
        **{REPRODUCTION: reproduction, TEACHING: teaching},
        **{MENTOR_CHECK: checked, MENTOR_CACHE: cached},
    }
    for path, generate in generated.items():
        atomic_write(path, generate(path.read_text(encoding="utf-8"), devices))
        print(path)
    for device, records in devices.items():
        for name, record in records.items():
            for file, drawing in drawings(device, name, record).items():
                path = PAGE.parent / "figures" / file
                try:
                    svg = drawing.svg()
                except ModuleNotFoundError as error:
                    print(f"no figures: pip install {error.name}", file=sys.stderr)
                    return 1
                path.parent.mkdir(exist_ok=True)
                atomic_write(path, svg)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
