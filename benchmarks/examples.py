"""Run the examples with five seeds each, the student alone and in its classroom.

    python benchmarks/examples.py --out OUT

Runs examples/plain.py, lightning_module.py and hugging_face.py as their docstrings say, each in a
process of its own, and keeps the accuracies that it prints. Other seeds chose the examples'
settings. The same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import track

from measure import KeptRows

EXAMPLES = ("plain", "lightning_module", "hugging_face")
SEEDS = range(5)
FOLDER = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> list[float]:
    """The held-out accuracies an example prints: its mentors', then alone, and in the classroom.

    Raises RuntimeError, with what it wrote, if the example fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.search(r"^held-out accuracy: .*$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return [float(number) for number in re.findall(r"\d\.\d+", found[0])]


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for examples.json")
    kept = KeptRows(parser.parse_args().out, "examples", ("example", "seed"))
    plan = [(name, seed) for name in EXAMPLES for seed in SEEDS]
    for name, seed in track([key for key in plan if not kept.has(example=key[0], seed=key[1])]):
        begin = time.perf_counter()
        *mentors, alone, classroom = run(name, "--seed", str(seed))
        row = {"example": name, "seed": seed, "mentors_top1": mentors, "alone_top1": alone}
        seconds = round(time.perf_counter() - begin, 1)
        kept.add(row | {"classroom_top1": classroom, "seconds": seconds})


if __name__ == "__main__":
    main()
