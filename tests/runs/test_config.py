"""Recipes: what a file, options and overrides make, and what they may not hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from classroomkd import cli
from classroomkd.errors import UserError
from classroomkd.loss.methods import method_names
from classroomkd.runs.recipe import MentorConfig, Recipe, TrainingConfig, load_recipe, to_dict
from classroomkd.runs.recipe_keys import keys

FILE = """
student: mobilenetv2
mentors:
- resnet50
- {source: resnet8, epochs: 40}
data: {source: photos, image_size: 64}
training: {epochs: 60, learning_rate: 1e-1}
loss: {task_weight: 0.5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    return path


def test_a_file_and_what_it_leaves_out(file, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load_recipe(file)
    assert recipe.student == "mobilenetv2"
    assert recipe.mentors == [MentorConfig("resnet50"), MentorConfig("resnet8", 40)]
    assert (recipe.data.source, recipe.data.image_size, recipe.data.padding) == ("/photos", 64, 8)
    assert (recipe.training.epochs, recipe.training.learning_rate) == (60, 0.1)
    assert (recipe.loss.task_weight, recipe.loss.temperature) == (0.5, 12.0)
    assert recipe.mentor_training == replace(Recipe().mentor_training, epochs=60)
    changed = load_recipe(file, ["mentor_training={batch_size: 8}"]).mentor_training
    assert (changed.epochs, changed.batch_size) == (60, 8)


def test_overrides_win_over_options_and_those_over_the_file(file):
    recipe = load_recipe(
        file,
        [
            *("training.epochs=7", "mentors=[resnet8,a/b.pt]", "data.cutout=8"),
            *("data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "loss.rank_decimals=2"),
        ],
        {"training": {"epochs": 8, "batch_size": 128}},
    )
    assert (recipe.training.epochs, recipe.training.batch_size) == (7, 128)
    assert recipe.training.learning_rate == 0.1
    assert recipe.mentors == [MentorConfig("resnet8"), MentorConfig("a/b.pt")]
    assert (recipe.data.mean, recipe.loss.rank_decimals) == ([0.5, 0.5, 0.5], 2)
    assert load_recipe(file, ["mentors.1.epochs=3"]).mentors[1].epochs == 3
    assert load_recipe(file, ["mentors.1.source=vgg8@9"]).mentors[1] == MentorConfig("vgg8", 40, 9)
    assert load_recipe(file, ["mentors.1=vgg8@9"]).mentors[1] == MentorConfig("vgg8", None, 9)


def test_what_is_saved_is_what_was_loaded(file, tmp_path):
    recipe = load_recipe(file, ["seed=3"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(to_dict(recipe)))
    assert load_recipe(again) == recipe


def test_mixing_and_clipping_that_are_off_are_in_no_key():
    """What the store kept before there were any has none in its key."""
    deciding = TrainingConfig().deciding()
    assert list(deciding) == [
        *("epochs", "batch_size", "learning_rate", "schedule", "milestones", "warmup_epochs"),
        *("momentum", "nesterov", "weight_decay", "decay_norms_and_biases"),
    ]
    assert TrainingConfig(mixup=0.2).deciding() == deciding | {"mixup": 0.2}
    assert TrainingConfig(cutmix=1.0).deciding() == deciding | {"cutmix": 1.0}
    assert TrainingConfig(clip_norm=1.0).deciding() == deciding | {"clip_norm": 1.0}


def test_who_says_nothing_of_the_mentors_weight(tmp_path):
    """A recipe has "auto"; a run that was begun before there was the key has the paper's 1."""
    values = to_dict(load_recipe(overrides=["loss.temperature=4"]))
    assert values["loss"].pop("mentor_weight") == "auto"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    old, new = load_recipe(file, of_run=True), load_recipe(file)
    assert (old.loss.mentor_weight, new.loss.mentor_weight) == (None, "auto")
    assert replace(old, loss=new.loss) == new
    assert old.loss.temperature == 4
    for weight in (None, "auto", 0.3):
        values["loss"]["mentor_weight"] = weight
        file.write_text(yaml.safe_dump(values))
        assert load_recipe(file, of_run=True).loss.mentor_weight == weight
    del values["loss"]
    file.write_text(yaml.safe_dump(values))
    paper = replace(Recipe().loss, mentor_weight=None, task_weight="confidence")
    assert load_recipe(file, of_run=True).loss == paper


def test_defaults_are_the_published_recipe():
    recipe = load_recipe(values={"data": {"source": "photos"}})
    training = recipe.training
    assert (training.epochs, training.batch_size, training.schedule) == (240, 64, "classroom")
    assert (training.momentum, training.nesterov, training.weight_decay) == (0.9, False, 5e-4)
    assert (recipe.data.padding, recipe.data.flip) == (4, True)
    digits = load_recipe(values={"data": {"source": "digits"}}).data
    assert (digits.source, digits.flip) == ("digits", False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=many", "training.epochs: Value 'many' .* Integer"),
        ("training.epoch=3", r"no key training\.epoch: did you mean training\.epochs=3\?$"),
        ("trainings=3", "no key trainings: classroomkd config lists all keys$"),
        ("loss.ranking=class", "loss.ranking: .*'class'.*'sample', 'batch'"),
        ("loss.temperature=0", "loss: temperature must be greater than 0"),
        ("loss.task_weight=-1", r"loss: task_weight must not be negative, got -1\.0$"),
        ("loss.task_weight=half", "loss: task_weight must be 'confidence' or a number"),
        ("loss.mentor_weight=-1", r"loss: mentor_weight must not be negative, got -1\.0$"),
        ("loss.mentor_weight=half", "loss: mentor_weight must be a number or 'auto', got 'half'$"),
        ("loss.mentor_weight=true", "loss.mentor_weight: must be a number or a text, not True$"),
        ("loss.mentor_weight=[1,2]", r"loss.mentor_weight: must be .* text, not \[1, 2\]$"),
        ("training.epochs", r"an override is like training\.epochs=60, not 'training\.epochs'"),
        ("training.epochs=0", r"training\.epochs must be at least 1, not 0"),
        ("training.mixup=-1", r"training\.mixup must be 0, or from 0\.001 to 1000, not -1"),
        (
            "training.cutmix=1e-4",
            r"training\.cutmix must be 0, or from 0\.001 to 1000, not 0\.0001",
        ),
        ("mentor_training.cutmix=nan", r"mentor_training\.cutmix must be 0, or from 0\.001 .*nan"),
        ("training.learning_rate=-1", r"training\.learning_rate must be a number above 0, not -1"),
        ("training.learning_rate=nan", r"training\.learning_rate must be a number above 0"),
        ("training.clip_norm=0", r"training\.clip_norm must be a number above 0, not 0"),
        ("mentor_training.clip_norm=nan", r"mentor_training\.clip_norm must be a number above 0"),
        ("training.milestones=[0.5,0.2]", r"training\.milestones must be shares"),
        ("mentor_training.momentum=1", r"mentor_training\.momentum must be from 0 to below 1"),
        ("training.warmup_epochs=300", r"training\.warmup_epochs must be from 0 to the epochs"),
        ("data.validation=1", r"data\.validation must be from 0 to below 1, not 1"),
        ("data.image_size=0", r"data\.image_size must be 1 to 1024 pixels, not 0"),
        ("data.std=[1,1,0]", r"data\.std must be three positive numbers"),
        ("data.std=[1,1,1]", r"data\.std must be given with data\.mean"),
        ("mentors.0.epochs=0", r"mentors\.0\.epochs must be at least 1, not 0"),
        ("mentors=resnet8", r"mentors: must be a list, like \[a,b\]"),
        ("data=photos", "data must be like {name: value}, not photos"),
        ("mentors.7.epochs=1", "there are 2 mentors, counted from 0"),
        ("threads=0", "threads must be 1 to 1024, not 0"),
        ("threads=99999999999", "threads must be 1 to 1024, not 99999999999"),
        ("=3", "an override is like training.epochs=60, not '=3'"),
        ("seed=???", r"seed: needs a value: \?\?\? means that it is missing$"),
        ("method=[a]", r"method: must be one text, not \['a'\]$"),
        ("student=${nope}", r"student: there is no key nope for \$\{nope\} to stand for$"),
        ("student=${", r"cannot take the override 'student=\$\{': \$\{…\} is for another key"),
        ("loss=foo", "recipe.yaml: loss must be like {name: value}, not foo$"),
        ("training.epochs={a: b", "it is not YAML: .*; quote it or close its brackets"),
        ("mentors.x=3", r"cannot take the override 'mentors\.x=3'"),
        ("student=[", r"cannot take the override 'student=\['"),
        ("training.weight_decay=inf", r"training\.weight_decay must be ≥ 0, not inf"),
        (f"mentors=[{','.join(['resnet8'] * 17)}]", "mentors must be at most 16, not 17"),
    ],
)
def test_values_that_cannot_be(file, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("temperature=4", "did you mean loss.temperature=4?"),
        ("method=kd temperature=4", "did you mean method_options.temperature=4?"),
        ("temperature=4 method=kd", "did you mean method_options.temperature=4?"),
        ("method=dkd alpha=2", "did you mean method_options.alpha=2?"),
        ("method=dkd method_options.alpa=2", "temperature, alpha, beta, ce_weight"),
        ("alpha=2", "method_options.alpha is for method=ca_mkd, method=dtkd or method=dkd"),
        ("method=kd loss.temperature=4", "did you mean method_options.temperature=4?"),
        ("loss.ranking=batch method=kd", "loss.ranking is for method=classroom, not method=kd: "),
        ("method=kd loss={}", "classroomkd config method=kd lists its options"),
        ("method=dkd ranking=batch", "loss.ranking is for method=classroom"),
        (
            "weight_decay=0",
            "did you mean training.weight_decay=0 or mentor_training.weight_decay=0?",
        ),
        ("mentor.weight_decay=0", "mentor_training.weight_decay=0 or training.weight_decay=0?"),
        ("training.weigth_decay=1", "did you mean training.weight_decay=1?"),
        ("training={epoch: 3}", "no key training.epoch: did you mean training.epochs?"),
        ("mentors.1.epoch=3", "did you mean mentors.1.epochs=3"),
        ("cutuot=8", "did you mean data.cutout=8?"),
    ],
)
def test_a_key_that_there_is_not_hints_at_those_there_are(file, override, hint):
    with pytest.raises(UserError) as caught:
        load_recipe(file, override.split() if ": " not in override else [override])
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_a_key_that_there_is_not(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: kd\ntemperature: 3\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert (
        str(caught.value) == f"{path}: there is no key temperature: did you mean loss.temperature?"
    )


@pytest.mark.parametrize("method", ["classroom", *sorted({*method_names.names()} - {"classroom"})])
def test_every_key_is_explained_and_takes_the_value_that_it_is_listed_with(file, method):
    recipe = load_recipe(file, [f"method={method}", "mentors.0=resnet50@7"])
    listed = keys(recipe)
    assert all(key.meaning and key.kind for key in listed)
    of_all = [key for key in listed if key.value is not None]
    assert {key.name for key in listed} - {key.name for key in of_all} == {
        *(f"mentors.N.{name}" for name in ("source", "epochs", "at", "weights", "mean", "std")),
        *(f"mentor_cache.{name}" for name in ("epochs", "dtype")),  # which would turn it on
    }
    again = load_recipe(None, [f"{key.name}={key.value}" for key in of_all])
    assert again.method_options == method_names.entry(method).options or method == "classroom"
    loss = again.loss if method == "classroom" else recipe.loss  # which only a file sets there
    assert replace(again, method_options={}, loss=loss) == recipe


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("key", ["task_weight", "mentor_weight"])
def test_whole_numbers_are_weights(tmp_path, key, weight):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"loss: {{{key}: {weight}}}")
    overrides = (f"loss.{key}={weight}", f"loss={{{key}: {weight}}}")
    for recipe in (load_recipe(path), *(load_recipe(None, [one]) for one in overrides)):
        assert getattr(recipe.loss, key) == weight
        assert isinstance(getattr(recipe.loss, key), float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "is not YAML"),
        ("- resnet8", "is not a recipe, but a list"),
        ("", "is not a recipe, but a NoneType"),
        ("student: [1, 2]", "student: "),
        ("data: digits", "data must be like {name: value}, not digits"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*absent"):
        load_recipe(tmp_path / "absent.yaml")


def test_on_the_command_line(file, tmp_path, capsys, monkeypatch):
    """Everything is checked before data is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    train = ["train", "--recipe", str(file)]
    assert cli.main([*train, "training.epochs=x"]) == 2
    assert "training.epochs: Value 'x'" in capsys.readouterr().err
    assert cli.main([*train, "--epochs", "3", "mentors=[resnet9]"]) == 2
    assert "no network is called 'resnet9'" in capsys.readouterr().err
    for epochs in ("240", "3"):  # an option counts, also where it says what is the default
        assert cli.main([*train, "--epochs", epochs, "loss.temperature=-1"]) == 2
    capsys.readouterr()
    assert cli.main([*train, "--mentors", "resnet8", "training.epochs=0"]) == 2
    assert "training.epochs must be at least 1, not 0" in capsys.readouterr().err
    assert cli.main([*train, "mentors=[]"]) == 2
    assert "--mentors is required, here or in a --recipe" in capsys.readouterr().err
    assert cli.main([*train, "data.source=nowhere", "device=cpu", "mentors=[resnet8]"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_numbers_of_method_options_in_a_file(tmp_path):
    """YAML 1.1 takes 1e-1 for a text."""
    path = tmp_path / "recipe.yaml"
    path.write_text("student: resnet8\nmethod: kd\nmethod_options: {kd_weight: 1e-1}\n")
    assert load_recipe(path).method_options == {"kd_weight": 0.1}
    path.write_text("student: resnet8\nmethod: kd\nmethod_options: {kd_weight: -1}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: method kd: kd_weight must be"):
        load_recipe(path)


def test_mentors_are_trained_for_as_long_as_the_student_unless_said_otherwise(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("student: resnet8\nmentors: [resnet20]\ntraining: {epochs: 30}\n")
    assert load_recipe(path).mentor_training.epochs == 30
    assert load_recipe(path, ["training.epochs=7"]).mentor_training.epochs == 7
    assert load_recipe(path, ["mentor_training.epochs=9"]).mentor_training.epochs == 9
    path.write_text(path.read_text() + "mentor_training: {epochs: 50}\n")
    assert load_recipe(path, ["training.epochs=7"]).mentor_training.epochs == 50


def test_any_key_of_the_mentor_cache_turns_it_on():
    assert load_recipe().mentor_cache is None
    on = load_recipe(overrides=["mentor_cache.dtype=float16"])
    assert vars(on.mentor_cache) == {"epochs": None, "dtype": "float16"}
    assert load_recipe(values=to_dict(on)) == on
    listed = {key.name: key.value for key in keys(on) if key.name.startswith("mentor_cache")}
    again = load_recipe(overrides=[f"{name}={value}" for name, value in listed.items()])
    assert again.mentor_cache == on.mentor_cache
    off = load_recipe(overrides=["mentor_cache.epochs=3", "mentor_cache=null"])
    assert off.mentor_cache is None
