"""The classrooms and variants of each table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from classroomkd import recipes
from classroomkd.loss.methods import names
from classroomkd.runs.recipe import MentorConfig, Recipe, load_recipe


@dataclass(frozen=True)
class Variant:
    """A change of a classroom's recipe; ``overrides`` are those of the command line."""

    name: str
    method: str = "classroom"
    overrides: tuple[str, ...] = ()


Variants = tuple[Variant, ...] | Callable[[Recipe], Sequence[Variant]]


@dataclass(frozen=True)
class Table:
    """A table's rows: packaged recipes, each with its variants.

    Other classrooms that the user selects get the variants of the first row.
    """

    title: str
    rows: dict[str, Variants]

    def variants(self, classroom: str, recipe: Recipe) -> Sequence[Variant]:
        """The variants of a row or of another classroom, which has this ``recipe``."""
        found = self.rows.get(classroom) or next(iter(self.rows.values()))
        return found(recipe) if callable(found) else found


# Epochs out of 240, before and after the drops of the learning rate from 150 on.
_PEERS_OF_ONE = {
    "weak": (2, 5, 10, 20, 40),
    "mixed": (2, 10, 40, 190, 230),
    "strong": (170, 190, 210, 220, 230),
}
_TEACHERS = ("resnet50", "vgg13", "wrn_40_2")


def mentors_override(mentors: Sequence[MentorConfig]) -> str:
    """The override that sets the mentors of a recipe."""
    values = [
        {key: value for key, value in asdict(mentor).items() if value is not None}
        for mentor in mentors
    ]
    return f"mentors={json.dumps(values)}"


def _changed(changes: dict[str, str]) -> tuple[Variant, ...]:
    """Variants by name, each with options of the loss separated by spaces."""
    return tuple(
        Variant(name, overrides=tuple(f"loss.{change}" for change in text.split()))
        for name, text in changes.items()
    )


_METHODS = tuple(Variant(name, name) for name in ("alone", "kd", "classroom"))
_ALL_METHODS = (
    *(Variant(name, name) for name in names()),
    Variant("classroom-batch", "classroom", ("loss.ranking=batch",)),
    Variant("classroom-standardised", "classroom", ("loss.standardise=true",)),
    Variant("kd-standardised", "kd", ("method_options.standardise=true",)),
)
_ABLATION = (
    Variant("alone", "alone"),
    *_changed(
        {
            "full": "",
            "filter-off": "knowledge_filter=none",
            "filter-correct": "knowledge_filter=correct",
            "mentoring-none": "mentoring=none",
            "mentoring-fixed": "mentoring=fixed temperature=4",
            "mentoring-dtkd": "mentoring=dtkd temperature=4",
            "weights-uniform": "weighting=uniform",
            "task-weight-1": "task_weight=1.0",
            "ranking-batch": "ranking=batch",
            "released": "ranking=batch rank_decimals=2",
            "released-neither": "ranking=batch knowledge_filter=none weighting=uniform "
            "mentoring=none task_weight=1.0",
        }
    ),
)
# The differences between the classroom and CA-MKD, one at a time, from either side; the names of
# the variants say which of the options are CA-MKD's.
_TOWARDS_CA_MKD = (
    *(Variant(name, name) for name in ("alone", "classroom", "ca_mkd")),
    *_changed(
        {
            "classroom+weights": "weighting=confidence",
            "classroom+task-weight": "task_weight=1.0",
            "classroom+temperature": "mentoring=fixed temperature=4.0",
            "classroom+no-filter": "knowledge_filter=none",
            "ca_mkd+filter": "mentoring=fixed task_weight=1.0 temperature=4.0 weighting=confidence",
            "ca_mkd+mentoring": "knowledge_filter=none task_weight=1.0 weighting=confidence",
            "ca_mkd+task-weight": "knowledge_filter=none mentoring=fixed temperature=4.0 "
            "weighting=confidence",
            "ca_mkd+ranks": "knowledge_filter=none mentoring=fixed task_weight=1.0 temperature=4.0",
        }
    ),
)
_TEMPERATURES = _changed({f"T{t}": f"temperature={t}" for t in (4, 8, 12, 20)})


def _peers_of_one(recipe: Recipe) -> list[Variant]:
    """The teacher with five earlier checkpoints of its own training as peers."""
    teacher = recipe.mentors[0]
    epochs = teacher.epochs or recipe.mentor_training.epochs
    variants = [Variant("alone", "alone")]
    for name, of_240 in _PEERS_OF_ONE.items():
        peers = [replace(teacher, at=max(round(epochs * at / 240), 1)) for at in of_240]
        variants.append(Variant(name, overrides=(mentors_override([teacher, *peers]),)))
    return variants


def _grid(recipe: Recipe) -> list[Variant]:
    """0 to 3 teachers, the recipe's own first, with 0 to 5 peers."""
    own, *peers = recipe.mentors
    teachers = [own, *(MentorConfig(name) for name in _TEACHERS if name != own.source)][:3]
    variants = [Variant("alone", "alone")]
    for t in range(len(teachers) + 1):
        for p in range(len(peers) + 1):
            if t + p:
                mentors = mentors_override([*teachers[:t], *peers[:p]])
                variants.append(Variant(f"teachers{t}-peers{p}", overrides=(mentors,)))
    return variants


_MAIN = (
    "resnet50-mobilenetv2 vgg13-mobilenetv2 resnet56-resnet20 resnet110-resnet20 "
    "resnet110-resnet32 wrn_40_2-wrn_16_2 wrn_40_2-wrn_40_1 vgg13-vgg8 resnet32x4-shufflenetv1 "
    "wrn_40_2-shufflenetv1 resnet32x4-shufflenetv2 resnet32x4-resnet8x4"
)
_OTHER_PEERS = (
    "wrn_40_2-wrn_16_2-strong-peers wrn_40_2-shufflenetv1-strong-peers "
    "wrn_40_2-wrn_16_8-strong-peers wrn_40_2-resnet34-strong-peers wrn_40_2-resnet50-strong-peers "
    "resnet56-resnet20-six-equal vgg13-vgg8-six-equal wrn_40_2-wrn_16_2-six-equal"
)


def _rows(classrooms: str, variants: Variants) -> dict[str, Variants]:
    return {f"cifar100/{name}": variants for name in classrooms.split()}


TABLES = {
    "main": Table("Every classroom", _rows(_MAIN, _METHODS)),
    "ablation": Table("The parts of the loss", _rows("resnet50-mobilenetv2", _ABLATION)),
    "methods": Table("Methods", _rows("resnet56-resnet20", _ALL_METHODS)),
    "ca_mkd": Table("From the classroom to CA-MKD", _rows("resnet56-resnet20", _TOWARDS_CA_MKD)),
    "temperature": Table("Temperatures", _rows("resnet56-resnet20", _TEMPERATURES)),
    "peers": Table(
        "Weak, strong and equal peers",
        _rows("resnet56-resnet20", _peers_of_one) | _rows(_OTHER_PEERS, _METHODS),
    ),
    "multi-teacher": Table("Teachers and peers", _rows("resnet50-mobilenetv2", _grid)),
}


def variant_names(table: str) -> list[str]:
    """The names of all variants of a table."""
    rows = {variants: row for row, variants in TABLES[table].rows.items()}
    found = [
        variant.name
        for row in rows.values()
        for variant in TABLES[table].variants(row, load_recipe(recipes.find(row)))
    ]
    return list(dict.fromkeys(found))
