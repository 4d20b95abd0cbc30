"""What the README and the tutorial say must run, and be in the record they name."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

from classroomkd import recipes
from classroomkd.runs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_distilling_takes_ten_lines():
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "distill(" in c)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_the_two_commands_are_there_once():
    """.ci/run takes them from here."""
    for last in ("quickstart", "pytest"):
        pattern = rf"^python3 -m venv \.venv && .*{last}$"
        assert len(re.findall(pattern, README, re.MULTILINE)) == 1


def test_the_quickstart_table_is_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/quickstart.json").read_text())
    shown = re.findall(r"^\|.*\| (\d+\.\d\d) % \|$", TUTORIAL, re.MULTILINE)
    assert shown == [f"{100 * result['top1']:.2f}" for result in record["results"]]
    assert f"on {record['data']['test_images']} held-out digits" in TUTORIAL


def test_the_quickstarts_means_are_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/quickstart-seeds.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2, 3, 4]
    alone, classroom = (
        mean(r["top1"] for run in record["runs"] for r in run["results"] if r["phase"] == phase)
        for phase in ("alone", "student")
    )
    told = f"their means are {alone:.2%} alone and {classroom:.2%} in the classroom"
    assert told.replace("%", " %") in " ".join(TUTORIAL.split())
    assert classroom >= alone


def test_the_table_over_seeds_is_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/reproduction-methods.json").read_text())
    number = r"(\d+\.\d\d) ± (\d+\.\d\d)"
    shown = re.findall(rf"^\|[^|]*\| {number} \| {number} \|$", README, re.MULTILINE)
    columns = (("small", (30, 1000, 20, 16), 3), ("small-100", (5, 2500, 100, 12), 5))
    variants = ("alone", "kd", "dkd", "ca_mkd", "classroom")
    for column, (classroom, (epochs, images, classes, side), seeds) in enumerate(columns):
        assert f"{classes} classes, {side}×{side}, {epochs} epochs, {seeds} seeds" in README
        assert load_recipe(recipes.find(classroom)).data.image_size == side
        runs = [run for run in record["runs"] if run["classroom"] == classroom]
        kinds = {(run["epochs"], run["test_images"], run["classes"]) for run in runs}
        assert kinds == {(epochs, images, classes)}
        for numbers, variant in zip(shown, variants, strict=True):
            last = [100 * run["last"] for run in runs if run["variant"] == variant]
            assert len(last) == seeds
            own = numbers[2 * column : 2 * column + 2]
            assert own == (f"{mean(last):.2f}", f"{stdev(last):.2f}")
