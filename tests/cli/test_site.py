"""docs/ as a site: no warning, nothing fetched, every public name in the reference."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("classroomkd", "classroomkd.data", "classroomkd.loss", "classroomkd.loss.methods"),
    "classroomkd.models",
)
FETCHED = re.compile(
    r"""<(?:script|img|iframe|link)\b[^>]*\s(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The HTML of each page by its path."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    built = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
        for path in site.rglob("*.html")
    }


def test_every_page_has_one_title(pages):
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for path, html in pages.items():
        assert len(re.findall("<h1", html)) == 1, path


def test_nothing_is_fetched(pages):
    for path, html in pages.items():
        assert not FETCHED.findall(html), path


def test_linked_files_come_along(pages):
    assert "fused_classroom_loss" in pages["repository/examples/plain.py/index.html"]
    assert '<a href="repository/examples/plain.py/">' in pages["index.html"]
    assert '<a href="../repository/classroomkd/loss/definition.py/">' in pages["method/index.html"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package, pages):
    described = "".join(html for path, html in pages.items() if path.startswith("reference/"))
    described = {*re.findall(r'<h2 id="([\w.]+)"', described)}
    for name in importlib.import_module(package).__all__:
        shorter = {f"{package}.{name}", f"classroomkd.{name}"}
        assert shorter & described, f"{package}.{name}"
        assert not importlib.util.find_spec(f"{package}.{name}")  # the page would be the module's
