"""Run the tests that need a GPU in several processes, which compile kernels in parallel.

    python benchmarks/gpu_tests.py [--seconds N] [--processes N]

Needs torch and pytest. Test files that need another missing package are skipped and listed. The
kernels of the loss come first (tests/loss/test_fused_kernels.py). Without a GPU, only the tests of
the definition run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
# The most important ones first, because time may run out.
ON_A_GPU = ("loss/test_fused_kernels.py", "loss/test_operator.py", "data/test_augment_kernel.py")
ON_A_GPU += ("data/test_loaders.py", "training/test_mentor_bank.py", "loss/test_methods.py")
ON_A_GPU += ("training/test_training.py", "loss/test_fused.py")


def main() -> int:
    """Run the tests; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=math.inf, help="start no test after N seconds")
    add("--processes", type=int, default=min(12, os.cpu_count() or 1), help="(%(default)s)")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU: running only the tests of the definition")
    count = arguments.processes if gpu else 1
    files = [str(TESTS / name) for name in (ON_A_GPU if gpu else ("loss/test_definition.py",))]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p"]
    command += ["no:cacheprovider", *(["-m", "gpu"] if gpu else [])]
    command += [*files, f"--seconds={arguments.seconds}"]

    totals: Counter[str] = Counter()
    failed = False
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        runs = [
            subprocess.Popen([*command, f"--share={i}/{count}"], stdout=log, stderr=log)
            for i, log in enumerate(logs)
        ]
        skipped = set()
        for run, log in zip(runs, logs, strict=True):
            code = run.wait()
            log.seek(0)
            lines = log.read().splitlines()
            skipped |= {line for line in lines if line.startswith("SKIPPED")}
            totals.update(
                {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", "".join(lines[-1:]))}
            )
            out_of_time = any(
                re.fullmatch(r"!+ Interrupted: out of time !+", line) for line in lines
            )
            if code not in (0, 5) and not (code == 2 and out_of_time):  # 5: no test in its share
                failed = True
                print(*lines, sep="\n")
            totals["processes out of time"] += out_of_time
    print(*sorted(skipped), sep="\n")
    kinds = ("passed", "failed", "errors", "error", "skipped", "processes out of time")
    print(", ".join(f"{totals[kind]} {kind}" for kind in kinds if totals[kind]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
