"""Which folders a run trains, chooses and is measured on, and that digits are not mirrored."""

import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from classroomkd.data import list_parts
from classroomkd.runs.images import read_images
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from small_runs import recipe


@pytest.fixture
def source(tmp_path):
    """12, 6 and 4 images of noise in each of two classes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "set"


def hold(source, out, *overrides):
    """The summary of a run on ``source``, and what it prints."""
    text = io.StringIO()
    of_run = recipe("mentors=[]", "method=alone", f"data.source={source}", *overrides)
    classroom = TrainingRun(of_run, Console(file=text, width=500))
    sets = read_images(of_run.data, 0)
    summary = classroom.run(
        sets.train, sets.test, out, validation_set=sets.validation, folders=sets.folders
    )
    return summary, text.getvalue()


@pytest.mark.parametrize("crop", ["pad", "resize"])
def test_val_beside_test_is_validated_on(source, tmp_path, crop):
    options = ["data.validation=0.25", "data.loader=torch", f"data.crop={crop}"]
    summary, text = hold(source, tmp_path / "run", *options)
    assert "images: 24 train (train/), 12 validation (val/), 8 test (test/), of 2" in text
    data = summary["data"]
    counts = [data[f"{part}_images"] for part in ("train", "validation", "test")]
    assert counts == [24, 12, 8]
    digests = json.loads((tmp_path / "run" / "inputs.json").read_text())
    if crop == "resize":
        assert digests["the validation images"] == list_parts(source).validation.digest()
    assert (tmp_path / "run" / "student_alone_best.safetensors").exists()


def test_val_is_not_used_where_nothing_is_validated(source, tmp_path):
    summary, text = hold(source, tmp_path / "run", "data.validation=0")
    assert "val/ is not used: data.validation is 0" in text
    assert "images: 24 train (train/), 8 test (test/), of 2" in text
    assert "validation_images" not in summary["data"]


def test_val_alone_is_the_test_part(source, tmp_path):
    (source / "test").rename(tmp_path / "away")
    _, text = hold(source, tmp_path / "run", "data.validation=0.25")
    assert "images: 18 train (train/), 6 validation (split off train/), 12 test (val/), of" in text


def test_digits_are_not_mirrored_unless_told():
    def flip(source, *overrides):
        return load_recipe(None, overrides, {"data": {"source": source}}).data.flip

    assert flip("digits") is False
    assert flip("digits", "data.flip=true") is True
    assert flip("photos") is True
    assert flip("photos", "data.flip=false") is False


def test_a_run_records_whether_it_mirrors(tmp_path):
    out = tmp_path / "run"
    from classroomkd.runs.recipe import to_dict
    from classroomkd.runs.run_folder import RunFolder

    RunFolder(out, to_dict(load_recipe(None, (), {"data": {"source": "digits"}}))).close()
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["flip"] is False
