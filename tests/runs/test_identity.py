"""What tells results apart, by the marks on the recipe's fields."""

from pathlib import Path

import pytest

from classroomkd.reproduce.plan import mentors_plan
from classroomkd.runs.identity import difference, marks, values_without
from classroomkd.runs.recipe import Recipe, load_recipe

VALUES = {"student": "resnet8", "mentors": ["resnet20"], "data": {"source": "digits"}}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(values=VALUES, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "tells_apart", "for_the_student_alone"),
    [
        ("threads=3", False, False),
        ("checkpoint_keep=3", False, False),
        ("data.loader=torch", False, False),
        ("data.source=elsewhere", False, False),
        ("seed=5", True, True),
        ("data_seed=5", True, True),
        ("mentor_cache.dtype=float16", True, True),
        ("mentor_cache.epochs=3", True, True),
        ("data.cutout=4", True, True),
        ("training.momentum=0.5", True, True),
        ("precision=bfloat16", True, True),
        ("loss.temperature=3", True, False),
        ("mentor_training.momentum=0.5", True, False),
        ("mentor_seed=4", True, False),
        ("mentors=[resnet14]", True, False),
    ],
)
def test_what_a_change_of_one_key_tells_apart(override, tells_apart, for_the_student_alone):
    one, other = recipe("data.flip=true"), recipe("data.flip=true", override)

    def differ(*left_out):
        return values_without(one, *left_out) != values_without(other, *left_out)

    assert differ("machine", "place") is tells_apart
    assert differ("machine", "place", "teaching") is for_the_student_alone


def test_every_key_of_a_section_has_the_sections_mark():
    known = marks(Recipe)
    assert {known[key] for key in known if key.startswith("loss.")} == {"teaching"}
    assert (known["data.source"], known["data.cutout"]) == ("place", "recipe")


@pytest.mark.parametrize(
    ("override", "digest"),
    [
        ("seed=0", "2214580e"),
        ("data.loader=torch", "2214580e"),
        ("loss.temperature=3", "2214580e"),
        ("seed=1", "3ad639d4"),
        ("threads=1", "df4d9ec3"),
    ],
)
def test_mentors_of_earlier_plans_are_found_again(override, digest):
    """The folders' names are those that version 0.1.0 gave."""
    (task,) = mentors_plan(recipe(override), Path("recipe.yaml")).mentors
    assert task.id == f"mentors/resnet20-{digest}"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [2]}}, ""),
        ({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [3]}}, "b.c [2], which is [3]"),
        ({"b": {"c": 2}}, {"b": None}, 'b {"c": 2}, which is null'),
        ({"b": {"c": 2}}, {"b": {}}, "b.c 2, which is null"),
        ({"b": {}}, {"b": {"c": 2}}, "b.c null, which is 2"),
    ],
)
def test_the_first_difference(old, new, text):
    assert difference(old, new) == text
