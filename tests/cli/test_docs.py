"""What the pages under docs/ show must run, each block by itself, and their links lead somewhere.

So must the README's and the pages' commands of ``classroomkd``, one after another as printed, with
less work. Of other commands only the files are looked at here: each has a test of its own.
"""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classroomkd.cli import main
from classroomkd.cli.parser import make_parser
from classroomkd.loss.methods import method_names
from classroomkd.runs.recipe import load_recipe
from image_folders import make_cifar

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LESS = {
    "train": ["--epochs", "1", "--image-size", "32", "mentor_training.epochs=1", "alone=false"],
    "reproduce": ["--plan"],
}


def blocks(language: str) -> list:
    """The code blocks of a language, each with the page and line that it begins at."""
    found = []
    for page in (README, *PAGES):
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
def test_yaml_blocks_are_recipes(code, page, tmp_path):
    (tmp_path / "recipe.yaml").write_text(code)
    load_recipe(tmp_path / "recipe.yaml")


def test_the_table_of_methods_has_every_option():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) ?\|$", text, re.MULTILINE))
    assert list(rows) == method_names.names()

    def shown(default):
        if isinstance(default, str):
            return f'"{default}"'
        return f"{default:g}" if isinstance(default, float) else str(default)

    for name, row in rows.items():
        options = method_names.entry(name).options
        if name == "classroom":  # method.md has those of the loss
            options = {"standardise": options["standardise"]}
        expected = [f"{option}={shown(default)}" for option, default in options.items()]
        assert re.findall(r"`(\w+=[^`]*)`", row) == expected


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the commands are given: with small sets of images under the names that they use."""
    folder = tmp_path / "commands"
    rng = np.random.default_rng(0)
    for name in ("photos", "tinyimagenet20", "tinyimagenet100", "tinyimagenet100x200", "imagenet"):
        for part, count in (("train", 6), ("test", 2)):
            for label in ("cat", "dog"):
                (folder / name / part / label).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (240, 260, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / name / part / label / f"{i}.jpg")
    make_cifar(folder / "cifar", "cifar100")
    page = (ROOT / "docs/networks.md").read_text(encoding="utf-8")
    nets = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (folder / "nets.py").write_text(nets[1])  # the file that the page shows
    return folder


@pytest.mark.parametrize(
    "page",
    [pytest.param(README, marks=pytest.mark.slow), *PAGES],
    ids=lambda page: page.name,
)
def test_commands_run(page, folder, monkeypatch, capsys):
    def no_network(url: str, *_: object) -> None:
        raise OSError("no network")

    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.M):
        for line in block.splitlines():
            words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
            if words[0] == "torchrun":  # tests/training/test_distributed.py starts processes
                assert make_parser().parse_args(words[words.index("classroomkd") + 1 :]).data
            elif words[0] != "classroomkd":  # .ci/run, or a test of what the script does, runs it
                paths = [ROOT / word for word in words if re.match("(scripts|benchmarks)/", word)]
                assert all(
                    os.access(path, os.X_OK if path.suffix == ".sh" else os.F_OK) for path in paths
                )
            elif words[1] != "data" or importlib.util.find_spec("ffcv"):
                status = main([*words[1:], *LESS.get(words[1], [])])
                error = capsys.readouterr().err
                if "imagenet/resnet34-resnet18" in words:  # whose teacher is torchvision's
                    assert "cannot download the weights of tv:resnet34 (no network)" in error
                elif "cuda:0" in words and status:
                    assert "no device 'cuda:" in error
                else:
                    assert status == 0, f"{line}: {error}"
