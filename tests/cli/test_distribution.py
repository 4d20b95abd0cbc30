"""What a package index gets: an archive of the sources, and a wheel of it that works elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import classroomkd

ROOT = Path(__file__).parents[2]
NAME = f"classroomkd-{classroomkd.__version__}"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
USE = """
import torch
import classroomkd
from classroomkd.kernels import launch

logits, targets = torch.randn(5, 4, 7), torch.arange(4)
loss = classroomkd.fused_classroom_loss(logits[0], logits[1:], targets)
torch.testing.assert_close(loss, classroomkd.classroom_loss(logits[0], logits[1:], targets))
print(classroomkd.__file__, launch.__file__, sep="\\n")
"""

pytestmark = pytest.mark.slow


def run(*command: object, **options) -> str:
    """What a command prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "TRITON_INTERPRET": "1"  # the kernels themselves
    }
    done = subprocess.run(
        list(map(str, command)), env=environment, text=True, capture_output=True, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from an archive of what the repository holds, built in turn in a copy."""
    folder = tmp_path_factory.mktemp("distribution")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # and not removed just now
            copy = folder / "copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
    run(sys.executable, "-c", BUILD.format("sdist"), folder, cwd=folder / "copy")
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-c", BUILD.format("wheel"), folder, cwd=folder / NAME)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_the_library_and_nothing_else(wheel):
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("classroomkd/**/*.py", "classroomkd/recipes/**/*.yaml")
        for path in ROOT.glob(pattern)
    }
    expected |= {f"classroomkd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not name.startswith(f"{NAME}.dist-info/")} == {
        *expected,
        "classroomkd/py.typed",
    }
    assert f"{NAME}.dist-info/licenses/LICENSE" in names


def test_the_metadata_stands_alone(wheel):
    text = zipfile.ZipFile(wheel).read(f"{NAME}.dist-info/METADATA").decode()
    metadata = message_from_string(text)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"train", "docs", "examples"} <= {*metadata.get_all("Provides-Extra")}
    readme = metadata.get_payload()
    assert readme.startswith("# classroomkd\n\n**Distil")
    targets = re.findall(r"\]\(([^)]*)\)", readme)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## {re.escape(classroomkd.__version__)} - \d{{4}}-\d\d-\d\d$", changelog, re.M
    )


def test_the_wheel_works_away_from_the_repository(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    installed = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # What it depends on is here; the files that make an editable installation are not read so.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (installed / "others.pth").write_text("\n".join(others) + "\n")
    imported = run(python, "-c", USE, cwd=tmp_path).split()
    assert imported == [
        str(installed / "classroomkd" / name) for name in ("__init__.py", "kernels/launch.py")
    ]
    command = tmp_path / "venv/bin/classroomkd"
    assert "quickstart" in run(command, "--help", cwd=tmp_path)
    recipes = run(command, "recipes", cwd=tmp_path)
    assert "cifar100/resnet56-resnet20" in recipes
