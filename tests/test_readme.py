"""What the README shows must run; what it counts must be in the record it names."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_two_commands_are_there_once():
    """.ci/run takes them from here."""
    for last in ("quickstart", "pytest"):
        pattern = rf"^python3 -m venv \.venv && .*{last}$"
        assert len(re.findall(pattern, README, re.MULTILINE)) == 1


def test_the_quickstart_table_is_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/quickstart.json").read_text())
    shown = re.findall(r"^\|.*\| (\d+\.\d\d) % \|$", README, re.MULTILINE)
    assert shown == [f"{100 * result['top1']:.2f}" for result in record["results"]]
    assert f"on {record['data']['test_images']} held-out digits" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
