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
    runs = [
        run
        for table in ("ca_mkd", "methods")  # the second has what both have
        for run in json.loads(
            (ROOT / f"benchmarks/results/cpu/reproduction-{table}.json").read_text()
        )["runs"]
        if run["classroom"] == "small-100-longer"
    ]
    shown = re.findall(r"^\|[^|]*\| (\d+\.\d\d) ± (\d+\.\d\d) \|$", README, re.MULTILINE)
    assert "100 classes of Tiny ImageNet, 16×16 pixels, 10 epochs, 5 seeds" in README
    assert load_recipe(recipes.find("small-100-longer")).data.image_size == 16
    assert {(run["epochs"], run["test_images"], run["classes"]) for run in runs} == {
        (10, 5000, 100)
    }
    variants = ("alone", "kd", "dkd", "dist", "ca_mkd", "classroom", "ca_mkd+ranks")
    for numbers, variant in zip(shown, variants, strict=True):
        last = {run["seed"]: 100 * run["last"] for run in runs if run["variant"] == variant}
        assert sorted(last) == [0, 1, 2, 3, 4]
        assert numbers == (f"{mean(last.values()):.2f}", f"{stdev(last.values()):.2f}")
