"""The k largest logits are what is said of them, and every way of storing has its base."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import softmax

import mentor_cache
from classroomkd.data import Parts
from mentor_cache import Stored
from tests.small_runs import colours


def test_the_k_largest_and_the_target_are_exact_and_the_others_equal():
    probabilities = torch.tensor([[0.05, 0.5, 0.15, 0.2, 0.1], [0.4, 0.3, 0.2, 0.06, 0.04]])
    logits = 7 + probabilities.log().expand(3, 2, 5)  # an offset of logits changes nothing
    found, share = mentor_cache.top_k(logits, torch.tensor([0, 1]), 2)
    expected = torch.tensor([[0.05, 0.5, 0.125, 0.2, 0.125], [0.4, 0.3, 0.1, 0.1, 0.1]])
    assert found.shape == (3, 2, 5)
    assert torch.allclose(found.exp(), expected.expand(3, 2, 5), atol=1e-6)
    assert torch.allclose(share, torch.tensor([0.75, 0.7]).double().expand(3, 2))


def test_all_of_the_classes_are_the_logits_themselves():
    logits = 3 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found, share = mentor_cache.top_k(logits, torch.tensor([0, 5, 2, 2]), 6)
    assert torch.allclose(softmax(found, -1), softmax(logits, -1), atol=1e-6)
    assert torch.allclose(share, torch.ones(2, 4).double())


def test_every_way_of_storing_is_paired_with_float32():
    rows = list(mentor_cache.plan())
    keys = [tuple(row.values()) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all((*Stored(row["epochs"]), row["seed"]) in keys for row in rows)


def made_up(way, tops):
    data = {"name": "photos", "classes": 100, "train_images": 6000}
    data |= {"validation_images": 2000, "test_images": 2500}
    about = {"data": data, "cpu_seconds": 30.0}
    about |= {"largest_difference": 0.002, "largest_logit": 7.5} if way.dtype == "float16" else {}
    about |= {"exact_share": 0.4} if way.top else {}
    return [
        way._asdict() | about | {"seed": seed, "top1": top, "validation_top1": top - 0.01}
        for seed, top in enumerate(tops)
    ]


def test_the_table_has_sizes_and_paired_differences():
    rows = [
        *made_up(Stored(20), [0.1, 0.2, 0.3]),
        *made_up(Stored(20, repeat=1), [0.11, 0.22, 0.33]),
        *made_up(Stored(5), [0.1, 0.2]),
        *made_up(Stored(5, "float16"), [0.1, 0.2]),
        *made_up(Stored(5, top=5), [0.1, 0.2]),
    ]
    text, table, *more = mentor_cache.markdown({"rows": rows})
    assert "12 students, 6 minutes of one core" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    # Bytes of a row: 404 in float32, 204 in float16, and 5 + 7 · 4 + 4 of the 5 largest.
    assert [line[:3] for line in lines[2:]] == [
        ["5", "float32", "100 %"],
        ["5", "float16", "50 %"],
        ["5", "5 largest", "9 %"],
        ["20", "float32", "100 %"],
        ["20", "`epochs: 1`", "5 %"],
    ]
    # Differences of 1 to 3 points: mean 2, deviation 1, and t of 2 degrees of freedom 4.303.
    half = f"+2.00 ± {4.303 / math.sqrt(3):.2f}"
    assert lines[-1][3:] == ["22.00 ± 11.00", half, half, "3"]
    assert lines[2][4:] == ["", "", "2"]
    assert "0.002" in more[0]
    assert "40 % with k = 5" in more[1]


def test_students_learn_from_what_is_stored(tmp_path, monkeypatch):
    small = ("mentors=[resnet8]", "mentor_training.epochs=1", "training.batch_size=8")
    monkeypatch.setattr(mentor_cache, "SHARED", (*mentor_cache.SHARED, *small))
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    sets = Parts(colours(27, 0, 12), colours(12, 1, 12), colours(12, 2, 12))

    def measured(way):
        row = way._asdict() | {"seed": 0}
        return mentor_cache.measure(row, Path("colours"), sets, tmp_path)

    assert 0 < measured(Stored(2))["top1"] <= 1
    rounded = measured(Stored(2, "float16"))
    # A float16 has 11 bits.
    assert 0 < rounded["largest_difference"] <= rounded["largest_logit"] * 2**-11
    measured(Stored(2, repeat=1))
    largest = measured(Stored(2, top=1))
    assert 1 / 3 < largest["exact_share"] < 1
    assert np.load(tmp_path / "resnet8.npy").shape == (2, 27, 3)
    assert "resnet8.npy" in (tmp_path / "run/config.yaml").read_text()
    shapes = {np.load(file).shape for file in tmp_path.glob("cache/mentor-logits/*/logits.npy")}
    assert shapes == {(2, 27, 3), (1, 27, 3)}
