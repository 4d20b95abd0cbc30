"""The examples run as their docstrings say, and learn; where there is no GPU, on the CPU."""

import ast
import functools
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The package without which it is skipped, and the extra that installs it.
NEEDS = {
    "lightning_module": ("lightning", "examples"),
    "hugging_face": ("transformers", "examples"),
    "timm_task": ("timm", "examples"),
    "segmentation": ("numba", ""),
    "pose": ("numba", ""),
    "language_model": ("transformers", "examples"),
    "trl_distillation": ("trl", "examples"),
}
PLUGS = {"lightning_module", "hugging_face", "timm_task", "trl_distillation"}
DENSE = {"segmentation", "pose"}
# The option, as its library calls it, or because so few images make short epochs.
LENGTH = {"hugging_face": "--max_steps", "segmentation": "--steps", "pose": "--steps"}
# Epochs or steps, not more than by default, and what the held-out accuracy of every network must
# then be above; chance is 0.1, and 0.25 in hugging_face. Background
# everywhere has a mean IoU of 0.2.
LESS = {
    "plain": (3, 0.4),
    "lightning_module": (8, 0.6),
    "hugging_face": (100, 0.5),
    "timm_task": (1, 0.25),
    "segmentation": (80, 0.25),
    "pose": (80, 0.3),
}


def docstring_commands(example: Path) -> list[list[str]]:
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    return [line.split() for line in re.findall(r"^    (.+)$", docstring, re.MULTILINE)]


@pytest.mark.parametrize(
    ("name", "lines"),
    [*((name, 60) for name in sorted(PLUGS)), *((name, 90) for name in sorted(DENSE))],
)
def test_examples_are_short(name, lines):
    assert len((ROOT / f"examples/{name}.py").read_text(encoding="utf-8").splitlines()) <= lines


@pytest.fixture
def output_of(monkeypatch, capsys):
    """What an example prints, run as its docstring says with these arguments.

    It runs in this process, which has imported its libraries, as ``__main__``.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    # Its own folder in place of the tests', as Python does for a script.
    others = [p for p in sys.path if Path(p).parent != ROOT]
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *others])
    return functools.partial(run_example, monkeypatch, capsys)


def run_example(monkeypatch, capsys, example: Path, *arguments: str) -> str:
    install, command = docstring_commands(example)
    package, extra = NEEDS.get(example.stem, ("sklearn", "train"))
    what = f'".[{extra}]"' if extra else "."
    assert install == ["pip", "install", "-c", "constraints.txt", "-e", what]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")

    assert command == ["python", f"examples/{example.name}"]
    monkeypatch.setattr(sys, "argv", [*command[1:], *arguments])
    capsys.readouterr()
    runpy.run_path(str(example), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LESS))
def test_example_learns(output_of, name):
    length, at_least = LESS[name]
    output = output_of(ROOT / f"examples/{name}.py", LENGTH.get(name, "--epochs"), str(length))
    (line,) = re.findall(r"^held-out (?:accuracy|mean IoU|PCK): .*$", output, re.MULTILINE)
    accuracies = [float(number) for number in re.findall(r"\d\.\d+", line)]
    assert len(accuracies) >= 3
    assert all(at_least < accuracy <= 1 for accuracy in accuracies), line


def test_every_example_is_run():
    assert {example.stem for example in EXAMPLES} == {*LESS, "language_model", "trl_distillation"}


@pytest.mark.slow
def test_the_language_model_learns_and_its_sick_mentor_is_named(output_of):
    output = output_of(ROOT / "examples/language_model.py", "--steps", "60")
    teacher, peer, shuffled = re.findall(r"^.*: top-1 .* tokens.*$", output, re.MULTILINE)
    assert teacher.endswith("tokens"), teacher
    assert peer.endswith("tokens"), peer
    assert re.match("shuffled: .* tokens; .*its classes are in another order: ", shuffled)
    (line,) = re.findall(r"^held-out perplexity: .*$", output, re.MULTILINE)
    perplexities = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    assert len(perplexities) == 4
    assert all(1 < perplexity < 15 for perplexity in perplexities), line  # of 40 characters
    (line,) = re.findall(r"^tokens taught: .*$", output, re.MULTILINE)
    *shares, of_the_sick = (float(number) for number in re.findall(r"(\d+\.\d)%", line))
    assert of_the_sick < min(shares), line


@pytest.mark.slow
def test_in_trl_the_student_learns_from_its_mentors_alone(output_of):
    output = output_of(ROOT / "examples/trl_distillation.py", "--steps", "50")
    found = re.findall(r"^(\w+): top-1 (\d+\.\d)% of 14336 tokens", output, re.MULTILINE)
    assert [name for name, _ in found] == ["teacher", "peer", "student"]
    assert min(float(percent) for _, percent in found) > 21, found  # the commonest has 17.5


def test_gradient_accumulation_is_a_larger_batch(tmp_path, monkeypatch):
    """In the Trainer of the example, which says itself how its loss is scaled."""
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    example = runpy.run_path(str(ROOT / "examples/hugging_face.py"), run_name="example")

    def weights_after_a_step(accumulated: int) -> torch.Tensor:
        torch.manual_seed(0)
        student, mentor = example["bert"](8, layers=1), example["bert"](16, layers=1)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        settings = example["hf"].TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=32 // accumulated,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = example["sentences"](32)
        before = torch.nn.utils.parameters_to_vector(student.parameters()).clone()
        example["ClassroomTrainer"](
            student, mentors=[mentor], args=settings, train_dataset=data
        ).train()
        return torch.nn.utils.parameters_to_vector(student.parameters()) - before

    whole, accumulated = weights_after_a_step(1), weights_after_a_step(4)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)
