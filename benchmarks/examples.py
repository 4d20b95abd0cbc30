"""Run the examples with five seeds each, the student alone and in its classroom.

    python benchmarks/examples.py --out OUT

Runs the EXAMPLES as their docstrings say, each in a process of its own, and keeps the results that
it prints. Other seeds chose the settings of all but the dense ones. The same command resumes an
interrupted one.
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

EXAMPLES = ("plain", "lightning_module", "hugging_face", "language_model", "segmentation", "pose")
SEEDS = range(5)
FOLDER = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> dict[str, object]:
    """What an example prints: the measure, that of its mentors, and of the student in two ways.

    Raises RuntimeError, with what it wrote, if the example fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.search(
        r"^held-out (accuracy|perplexity|mean IoU|PCK): (.*)$", done.stdout, re.MULTILINE
    )
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    *mentors, alone, classroom = map(float, re.findall(r"\d+\.\d+", found[2]))
    taught = re.search(r"^tokens taught: (.*)$", done.stdout, re.MULTILINE)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", taught[1])] if taught else None
    return {
        **{"measure": found[1], "mentors": mentors, "alone": alone, "classroom": classroom},
        "taught_percent": shares,  # of the tokens, by the mentors and the sick one
    }


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for examples.json")
    kept = KeptRows(parser.parse_args().out, "examples", ("example", "seed"))
    plan = [(name, seed) for name in EXAMPLES for seed in SEEDS]
    for name, seed in track([key for key in plan if not kept.has(example=key[0], seed=key[1])]):
        begin = time.perf_counter()
        row = {"example": name, "seed": seed} | run(name, "--seed", str(seed))
        kept.add(row | {"seconds": round(time.perf_counter() - begin, 1)})


if __name__ == "__main__":
    main()
