"""What the pages under docs/ show must run, each block by itself, and their links lead somewhere.

A block that begins with ```python fragment is code to read only.
"""

import re
from pathlib import Path

import pytest
import yaml

from classroomkd.training.config import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list:
    """The code blocks of a language, each with the page and line that it begins at."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start(1)].count("\n")
            name = f"{page.name}:{line}"
            found.append(pytest.param("\n" * line + block[1], str(page), id=name))
    return found


@pytest.mark.parametrize(("code", "page"), blocks("python"))
def test_python_blocks_run(code, page):
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(("code", "page"), blocks("yaml"))
def test_yaml_blocks_are_recipes(code, page):
    load_recipe(values=yaml.safe_load(code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
