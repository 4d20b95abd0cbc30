"""Networks of one's own, by FILE.py:NAME and package.module:NAME, wherever a network is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from classroomkd.cli import main
from classroomkd.models import NetworkInfo, create, load_network, save_network
from classroomkd.models.layout import Renormalised
from classroomkd.models.network_names import code_digest, is_checkpoint, is_code, split_weights
from classroomkd.models.recognition import expected
from classroomkd.reproduce.plan import mentors_plan, require_same_recipe
from classroomkd.runs.mentor_setup import find_mentors, fit_mentor
from classroomkd.runs.recipe import MentorConfig, load_recipe, with_absolute_paths
from classroomkd.runs.training_run import TrainingRun
from refusals import refusal
from small_runs import CLASSES, colours, recipe, same, stored_run, values_of

CODE = '''
import torch
from torch import nn

def small(num_classes):
    """Five lines, as people write them."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes))

class Wide(nn.Module):
    """Buffers with names that foreign checkpoints have for other things; made on the CPU only."""
    def __init__(self, n_classes=1000):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.scale = nn.Parameter(torch.tensor(torch.ones(1, device="cpu").item()))
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, n_classes)

    def forward(self, images):
        if images.sum().item() == 12345.0:
            raise AssertionError
        return self.fc(self.body((images - self.mean) * self.scale).mean((2, 3)))

five = small
def three(): return small(3)
def raises(num_classes): raise ValueError("no such width")
def no_module(num_classes): return [small(num_classes)]
def seven(num_classes): return small(7)
def maps(num_classes): return nn.Conv2d(3, num_classes, 3)
def two(num_classes): return Pair()
class Pair(nn.Module):
    def forward(self, images): return images, images
network = small(3)
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of one's own in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize(
    ("text", "code", "checkpoint"),
    [
        ("nets.py:small", True, False),
        ("deep/folder/nets.py:small", True, False),
        ("torchvision.models:resnet18", True, False),
        ("nets.py", True, False),
        ("best.pth:model_ema", False, True),
        ("runs/one/last.ckpt:teacher", False, True),
        ("tv:resnet18", False, False),
        ("timm:resnet50", False, False),
        ("resnet20", False, False),
    ],
)
def test_what_a_name_means(text, code, checkpoint):
    assert (is_code(text), is_checkpoint(text)) == (code, checkpoint)


@pytest.mark.parametrize(
    ("text", "name", "weights"),
    [
        ("nets.py:small=w.pth", "nets.py:small", "w.pth"),
        ("a=b/nets.py:small=c=d.pth", "a=b/nets.py:small", "c=d.pth"),
        ("tv:resnet18=pretrained", "tv:resnet18", "pretrained"),
        ("data.source=a:b", "data.source=a:b", None),
        ("resnet8=w.pth", "resnet8", "w.pth"),
        ("nets.py=w.pth", "nets.py", "w.pth"),  # so that the error can say what is missing
        ("student=w.pth", "student=w.pth", None),
    ],
)
def test_a_name_with_weights(text, name, weights):
    assert split_weights(text) == (name, weights)


@pytest.mark.parametrize("name", ["small", "Wide"])
def test_a_checkpoint_of_ones_own_network_is_loaded_bit_by_bit(nets, tmp_path, name):
    source = f"{nets}:{name}"
    network = create(source, 5)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    forms = {"bare": network.state_dict(), "nested": {"epoch": 3, "model": network.state_dict()}}
    forms["parallel"] = {f"module.{k}": v for k, v in network.state_dict().items()}
    for form, content in forms.items():
        torch.save(content, tmp_path / f"{form}.pth")
        loaded, info, _ = load_network(tmp_path / f"{form}.pth", 5, architecture=source)
        assert same(values_of(loaded), values_of(network))
        assert info is None
        assert not loaded.training
    message = refusal(load_network, tmp_path / "bare.pth", 4, architecture=source)
    assert message.endswith(f"is a nets.py:{name} for 5 classes, but 4 are needed")
    other = {"small": "Wide", "Wide": "small"}[name]
    message = refusal(load_network, tmp_path / "bare.pth", architecture=f"{nets}:{other}")
    assert f"bare.pth does not fit nets.py:{other}: missing: " in message


def test_what_is_saved_loads_with_its_file_beside_it(nets, tmp_path):
    info = NetworkInfo(f"{nets}:small", CLASSES, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 8)
    network = create(info.architecture, 3)
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / "teacher.safetensors"
    save_network(path, network, info)
    digest = code_digest(info.architecture)
    nets.unlink()  # the copy beside the weights serves
    loaded, found, architecture = load_network(path, 3)
    assert same(values_of(loaded), values_of(network))
    assert (found.architecture, found.code, found.mean) == ("nets.py:small", digest, info.mean)
    (copy,) = (tmp_path / "kept").rglob("nets.py")
    assert architecture == f"{copy}:small"
    moved = copy.rename(path.with_name("nets.py"))  # so does one that was put there by hand
    assert load_network(path)[2] == f"{moved}:small"

    told: list[str] = []
    moved.write_text(CODE + "# another comment\n")
    load_network(path, notify=told.append)
    assert told == [
        f"{moved} has changed since {path} was written: its network may compute otherwise"
    ]
    moved.unlink()
    assert f"of nets.py:small, whose file is missing: put {copy} back" in refusal(
        load_network, path
    )


def test_tied_weights_are_saved(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    path = tmp_path / "tied.safetensors"
    save_network(path, network, NetworkInfo("own", ["a", "b", "c"], (0,) * 3, (1,) * 3, 8))
    assert "unknown network, 'own': if it is a module of your own" in refusal(load_network, path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"nets.py:raises raised ValueError: no such width (line 27 of nets.py)"),
        ("no_module", "nets.py:no_module must return a torch.nn.Module, not list"),
        ("seven", "nets.py:seven has 7 outputs for 10 classes: let it take"),
        ("maps", "nets.py:maps gives [2, 2, 14, 14] for 2 images: its logits must be [B, classes]"),
        ("two", "nets.py:two returns a tuple, not logits [B, classes]"),
        ("network", "nets.py:network is a Sequential: name a function or class that returns"),
        ("smal", "has no smal; the nearest names in it are small"),
        ("three", "nets.py:three has 3 outputs for 10 classes"),
    ],
)
@pytest.mark.parametrize("role", ["student", "mentor"])
def test_a_factory_that_will_not_do_gets_one_line(nets, capsys, role, name, message):
    other = {"student": "mentors", "mentor": "student"}[role]
    options = [f"--{other}", "resnet8", f"--{role}{'s' * (role == 'mentor')}", f"nets.py:{name}"]
    command = ["train", "--data", "digits", "--image-size", "16", "--epochs", "1", *options]
    assert main([*command, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("classroomkd: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nets.py", "nets.py needs the name of what makes the network, nets.py:NAME"),
        ("other.py:small", "there is no file other.py, which other.py:small names"),
        ("no.such.module:small", "cannot import no.such.module"),
        ("broken.py:small", "broken.py cannot be imported: SyntaxError"),
        ("needy.py:small", "needy.py cannot be imported: ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_that_will_not_do_gets_one_line(nets, source, message):
    Path("broken.py").write_text("def small(:\n")
    Path("needy.py").write_text("import a_package_that_nobody_has\n")
    assert message in refusal(create, source, 3)


def test_a_neighbour_and_a_package_are_imported(nets, tmp_path):
    (tmp_path / "neighbour.py").write_text("from nets import small\n")
    assert isinstance(create("neighbour.py:small", 3), nn.Sequential)
    assert create("nets:small", 3)[4].out_features == 3
    assert create("torchvision.models:resnet18", 7).fc.out_features == 7
    assert expected("nets.py:small", 9)["4.weight"] == (9, 4)
    nets.write_text(CODE.replace("(4, num_classes)", "(4, num_classes, bias=False)"))
    assert "4.bias" not in expected("nets.py:small", 9)  # its name is the same, its file is not


def run_of(overrides, out, resume=False):
    chosen = recipe(
        "mentors=[resnet8]", "training.epochs=1", "mentor_training.epochs=1", *overrides
    )
    return TrainingRun(chosen, Console(quiet=True)).run(colours(28), colours(13, 1), out, resume)


def test_a_run_is_identified_by_the_file_too(nets, tmp_path, store, trained):
    """In the run's inputs, in the store's keys, and in what `reproduce` takes for done."""
    own = f"mentors=[{nets}:small]"
    stored_run(tmp_path / "first", own, f"student={nets}:Wide")
    inputs = json.loads((tmp_path / "first/inputs.json").read_bytes())
    assert inputs[f"{nets}:Wide"] == inputs[f"{nets}:small"] == code_digest(f"{nets}:small")
    (kept,) = [json.loads(path.read_bytes())["deciding"] for path in store.glob("*.json")]
    assert (kept["architecture"], kept["code"]) == ("nets.py:small", code_digest(f"{nets}:small"))
    trained.clear()
    summary, _ = stored_run(tmp_path / "second", own, 'student=""')
    assert trained == []
    assert summary["results"][0]["name"] == "nets.py:small"
    chosen = load_recipe(tmp_path / "first/config.yaml")
    before = mentors_plan(chosen, tmp_path / "first/config.yaml").mentors[0]

    nets.write_text(CODE + "# changed\n")
    stored_run(tmp_path / "third", own, 'student=""')
    assert trained == ["nets.py:small (mentor)"]
    after = mentors_plan(chosen, tmp_path / "first/config.yaml").mentors[0]
    assert before.id.startswith("mentors/nets.py-small-")
    assert before.id != after.id
    run = type(before)("", (), chosen, 1, 1.0)
    assert f"{nets}:Wide has changed since" in refusal(require_same_recipe, run, tmp_path / "first")
    (tmp_path / "first/summary.json").unlink()
    message = refusal(run_of, [f"student={nets}:Wide", own], tmp_path / "first", resume=True)
    assert "changed since" in message


def test_an_edit_during_a_run_does_not_reach_it(nets, tmp_path, monkeypatch):
    """What was imported at the start is what is trained and saved."""
    original = TrainingRun._train_all

    def edited(self, *opened):
        nets.write_text("raise RuntimeError\n")
        return original(self, *opened)

    monkeypatch.setattr(TrainingRun, "_train_all", edited)
    digest = code_digest(f"{nets}:small")
    run_of([f"student={nets}:small"], tmp_path / "run")
    network, info, _ = load_network(tmp_path / "run")
    assert info.code == digest
    assert len(network) == 5


def test_first_weights_under_a_new_classifier(nets, tmp_path, capsys, monkeypatch):
    """A backbone of other classes is trained on; as it is it is refused, with what to do."""
    for source in (f"{nets}:Wide", "tv:resnet18"):
        backbone = create(source, 7)
        weights = tmp_path / "backbone.pth"
        torch.save(backbone.state_dict(), weights)
        text: list[str] = []
        monkeypatch.setattr(TrainingRun, "_print", lambda self, line, text=text: text.append(line))
        out = tmp_path / source.rpartition(":")[2]
        mentor = f"{{source: {source}, weights: {weights}, epochs: 1}}"
        rates = ("training.learning_rate=1e-12", "mentor_training.learning_rate=1e-12")
        still = (*rates, "training.weight_decay=0", "mentor_training.weight_decay=0")
        run_of([f"student={source}", f"init={weights}", f"mentors=[{mentor},resnet8]", *still], out)
        began = [line for line in text if "starts from" in line]
        assert len(began) == 4
        assert sum("starts from random weights" in line for line in began) == 1
        expected_words = f"starts from {weights}, with a new classifier (fc.weight, fc.bias)"
        assert sum(expected_words in line for line in began) == 3
        name = "nets.py:Wide" if source.endswith("Wide") else source
        for file in ("student.safetensors", f"mentors/{name}.safetensors"):
            network = load_network(out / file)[0].state_dict()
            assert network["fc.weight"].shape[0] == 3
            for key, value in backbone.named_parameters():
                if not key.startswith("fc."):
                    torch.testing.assert_close(network[key], value.detach(), atol=1e-5, rtol=1e-5)
        message = refusal(run_of, [f"mentors=[{source}={weights}]"], tmp_path / "refused")
        assert "has 7 classes, the data has 3" in message
        assert "or train it on them with a new classifier, as {source: …" in message


def test_the_same_classes_keep_their_classifier(nets, tmp_path, monkeypatch):
    run_of([f"student={nets}:small"], tmp_path / "first")
    text: list[str] = []
    monkeypatch.setattr(TrainingRun, "_print", lambda self, line: text.append(line))
    mentors = f"mentors=[{{source: {tmp_path / 'first'}, epochs: 1}}]"
    summary = run_of([f"student={nets}:small", mentors], tmp_path / "second")
    assert summary["results"][0]["epochs"] == 1
    assert f"starts from {tmp_path / 'first'}, its classifier included" in " ".join(text)


def test_a_mentors_own_normalisation(nets, tmp_path):
    """One that teaches as it is, one that is trained, and a foreign file."""
    data = NetworkInfo("resnet8", CLASSES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 8)
    network = create(f"{nets}:small", 3).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    own = MentorConfig(f"{nets}:small", weights="w.pth", mean=[0.1] * 3, std=[0.5] * 3)
    (mentor,) = find_mentors([own], 1, print)
    raw = torch.rand(4, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    fit_mentor(mentor, data, raw, print)
    with torch.no_grad():
        theirs, ours = mentor.network((raw - mean) / std), network((raw - 0.1) / 0.5)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)

    normalised = f"{{source: {nets}:small, mean: [0.1,0.2,0.3], std: [1,1,1]}}"
    run_of([f"mentors=[{normalised}]"], tmp_path / "run")
    trained, info, _ = load_network(tmp_path / "run/mentors/nets.py:small.safetensors")
    assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert not isinstance(trained, Renormalised)
    again = TrainingRun(recipe(f"mentors=[{normalised}]", "training.epochs=1"), Console(quiet=True))
    assert again.mentors[0].job.mean == (0.1, 0.2, 0.3)


def test_the_forms_of_a_recipe(nets, tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    student = {"source": "nets.py:small", "weights": "w.pth", "mean": [0, 0, 0], "std": [1, 1, 1]}
    mentors = [
        "nets.py:Wide=v.pth",
        {"source": "tv:resnet18", "weights": "pretrained", "epochs": 5},
    ]
    file.write_text(yaml.safe_dump({"student": student | {"epochs": 9}, "mentors": mentors}))
    found = load_recipe(file)
    assert (found.student, found.init, found.data.mean) == ("nets.py:small", "w.pth", [0.0] * 3)
    assert found.training.epochs == found.mentor_training.epochs == 9
    assert found.mentors == [
        MentorConfig("nets.py:Wide", weights="v.pth"),
        MentorConfig("tv:resnet18", 5, weights="pretrained"),
    ]
    whole = with_absolute_paths(found)
    assert whole.student == f"{tmp_path / 'nets.py'}:small"
    assert whole.init == str(tmp_path / "w.pth")
    assert whole.mentors[1] == found.mentors[1]
    assert load_recipe(None, ["student=nets.py:small=w.pth"]).init == "w.pth"
    given = "student={source: nets.py:small, epochs: 4}"
    assert load_recipe(None, [given]).training.epochs == 4
    for override, message in (
        (
            "student={source: a, width: 3}",
            "student has source, weights, mean, std, epochs, not wid",
        ),
        ("student={weights: a}", "student: give its source"),
        ("mentors=[{source: resnet8, mean: [1,2,3]}]", "mentors.0.std must be given with"),
        ("mentors=[{source: resnet8, weights: ''}]", "mentors.0.weights must be a file"),
        ("mentors=[{source: a.pth, weights: b.pth}]", "mentors.0.weights: a.pth is a checkpoint"),
    ):
        assert message in refusal(load_recipe, None, [override])


def test_commands(nets, tmp_path, capsys, store):
    """mentors, train with weights, evaluate with a normalisation, and what they refuse."""
    common = ["--data", "digits", "--image-size", "16", "--batch-size", "256", "threads=1"]
    assert main(["mentors", *common, "--epochs", "1", "--mentors", "nets.py:small"]) == 0
    (weights,) = store.glob("*.safetensors")
    options = ["--student", "nets.py:small", "--init", str(weights), "alone=false"]
    teachers = ["--mentors", f"nets.py:five={weights}", "resnet8"]
    command = ["train", *common, "--epochs", "1", *options, *teachers, "--out", "run"]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert f"mentor nets.py:five ({weights}): top-1" in printed
    assert "nets.py:five (mentor)" in printed
    assert main(["evaluate", "run"]) == 0
    plain = capsys.readouterr().out
    assert "nets.py:small of run on the held-out part" in plain
    named = f"nets.py:small={Path('run/student.safetensors')}"
    assert main(["evaluate", named]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == plain.splitlines()[1:]
    assert main(["evaluate", named, "--mean", "0", "0", "0", "--std", "9", "9", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] != plain.splitlines()[1:]
    for arguments, message in (
        (["evaluate", "nets.py:small", "--data", "digits"], "nets.py:small has no weights yet"),
        (["evaluate", named, "--mean", "0", "0", "0"], "--mean and --std go together"),
        (["evaluate", "nets.py:small=no.pth", "--data", "digits"], "there is no checkpoint no.pth"),
        ([*command[:-1], "x", "--init", "pretrained"], "nets.py:small has no pretrained weights"),
        ([*command[:-1], "x", "--student", "run"], "the student run is a file: name its network"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_layers_are_listed_and_compared(nets, tmp_path, capsys):
    assert main(["models", "nets.py:Wide", "--features", "--image-size", "8"]) == 0
    listed = capsys.readouterr().out
    assert [line.split() for line in listed.splitlines() if line.startswith("body.2")] == [
        ["body.2", "8", "×", "6", "×", "6"]
    ]
    assert main(["models", "resnet8", "--features"]) == 0
    stages = [line for line in capsys.readouterr().out.splitlines() if line.endswith("a stage")]
    assert [line.split()[0] for line in stages] == ["layer1", "layer2", "layer3"]
    assert main(["models", "resnet8"]) == 2
    layers = "method_options.student_layers"
    message = refusal(run_of, [f"student={nets}:Wide", "method=at"], tmp_path / "no")
    assert "the stages of a Wide are not known" in message
    message = refusal(
        run_of, [f"student={nets}:Wide", "method=at", f"{layers}=body.9"], tmp_path / "no"
    )
    assert "a Wide has no layer 'body.9'; the nearest are body.2" in message
    for method in ("fitnet", "at"):
        chosen = [f"method={method}", f"{layers}=body", "method_options.teacher_layers=layer1.0"]
        summary = run_of([f"student={nets}:Wide", *chosen, "alone=false"], tmp_path / method)
        assert summary["results"][-1]["phase"] == "student"
