"""What the commands do that train networks and measure them.

What takes torch is imported where it is used, after all that can be wrong without it was checked.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.arguments import DEFAULT_IMAGE_SIZE, DEFAULT_SEED, DEFAULT_TEST_SHARE, nested
from classroomkd.data import NAMED_SOURCES, is_split_by_seed, join
from classroomkd.errors import UserError
from classroomkd.models.catalogue import (
    is_checkpoint,
    is_external,
    require_known,
    split_entry,
)
from classroomkd.recipes import find as find_recipe
from classroomkd.training.config import DataConfig, Recipe, load_recipe, split_seed, teaching
from classroomkd.training.folders import (
    choose_folder,
    recorded_source,
    recorded_split,
    unfinished,
)

if TYPE_CHECKING:
    from classroomkd.training.classroom import Classroom
    from classroomkd.training.images import Sets


def quickstart(arguments: argparse.Namespace) -> None:
    """Train a small classroom on scikit-learn's digits."""
    epochs = arguments.epochs
    recipe = load_recipe(
        values={
            "student": "resnet8",
            # A teacher, and two peers that are weaker because they are smaller and trained less.
            "mentors": [
                "resnet20",
                {"source": "resnet14", "epochs": max(epochs // 3, 1)},
                {"source": "resnet8", "epochs": max(epochs // 5, 1)},
            ],
            "data": {
                "source": "digits",
                "image_size": 16,
                "test_share": 1 / 3,
                "validation": 0.0,  # nothing is chosen
                "loader": arguments.loader,
            },
            "training": {"epochs": epochs},
            "mentor_training": {"epochs": epochs},
            "seed": arguments.seed,
            "store": False,  # it shows all of the way
            "device": "cpu",
            # Networks this small gain little from a second thread, but on a machine that is busy
            # they lose most of their speed waiting for it; and so the numbers do not depend on the
            # count of cores.
            "threads": 1,
        }
    )
    _train_recipe(recipe, arguments.out, "quickstart")


# The options of train that stand for values of its recipe.
_SHORT_FOR = {
    "data": ("data.source",),
    "student": ("student",),
    "mentors": ("mentors",),
    "epochs": ("training.epochs", "mentor_training.epochs"),
    "mentor_epochs": ("mentor_training.epochs",),
    "batch_size": ("training.batch_size", "mentor_training.batch_size"),
    "learning_rate": ("training.learning_rate",),
    "temperature": ("loss.temperature",),
    "ranking": ("loss.ranking",),
    "image_size": ("data.image_size",),
    "test_share": ("data.test_share",),
    "validation": ("data.validation",),
    "flip": ("data.flip",),
    "loader": ("data.loader",),
    "device": ("device",),
    "seed": ("seed",),
}


def train(arguments: argparse.Namespace) -> None:
    """Train on the recipe that file, options and overrides make, or go on with a run."""
    if arguments.resume is not None:
        others = sorted(_given(arguments).keys() - {"resume"})
        if others:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            options = options.replace("--override", "KEY=VALUE")
            arguments.parser.error(
                f"--resume takes all other options from the run: leave out {options}"
            )
        _resume(arguments.resume)
        return
    recipe = _recipe(arguments)
    if not recipe.student:
        _lacks(arguments, "--student")
    _train_recipe(recipe, arguments.out, "train", download=_given(arguments).get("download"))


def mentors(arguments: argparse.Namespace) -> None:
    """Train the mentors of a recipe one after another, so that runs find them in the store."""
    download = _given(arguments).get("download")
    _train_recipe(mentors_recipe(arguments), arguments.out, "mentors", download=download)


def mentors_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that file, options and overrides make, without its student."""
    recipe = _recipe(arguments)
    if not recipe.mentors:
        _lacks(arguments, "--mentors")
    if not recipe.store:
        raise UserError("mentors are trained for the store: leave out store=false")
    return replace(recipe, student="")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    default = arguments.parser.get_default
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "parser") and value != default(name)
    }


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = _given(arguments)
    if "data" in given:
        given["data"] = str(arguments.data)
    overrides = list(given.get("override", ()))
    if "mentors" in given:  # an option that takes what follows it, overrides too
        overrides += [text for text in given["mentors"] if _is_override(text)]
        given["mentors"] = [text for text in given["mentors"] if not _is_override(text)]
    short = {key: given[name] for name, keys in _SHORT_FOR.items() if name in given for key in keys}
    if "recipe" in given and "mentor_epochs" not in given:  # a file says what mentors are to have
        short = {key: value for key, value in short.items() if "mentor_training" not in key}
    file = find_recipe(given["recipe"]) if "recipe" in given else None
    recipe = load_recipe(file, overrides, nested(short))
    for option in ("temperature", "ranking"):
        if option in given and recipe.method != "classroom":
            arguments.parser.error(
                f"--{option} is the classroom's: method {recipe.method} takes method_options"
            )
    if not recipe.data.source:
        _lacks(arguments, "--data")
    if not recipe.mentors and recipe.method != "alone":
        _lacks(arguments, "--mentors")
    if "download" not in given:
        _require_images(recipe.data.source)
    require_networks(recipe)
    return recipe


def require_networks(recipe: Recipe) -> None:
    """Raise UserError for a student or mentor that is neither a name of the zoo nor there."""
    for name in (recipe.student, *(mentor.source for mentor in teaching(recipe))):
        if is_checkpoint(name):
            _require_checkpoint(name)
        elif name and not is_external(name):
            require_known(name)


def _require_images(source: str) -> None:
    """Raise UserError if there is no data set at ``source``."""
    if source not in NAMED_SOURCES and not Path(source).expanduser().exists():
        raise UserError(f"no such folder: {source}")


def _require_checkpoint(source: str) -> None:
    """Raise UserError if there is no file or folder at ``source``."""
    path, _ = split_entry(source)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _lacks(arguments: argparse.Namespace, option: str) -> None:
    arguments.parser.error(f"{option} is required, here or in a --recipe")


def _train_recipe(
    recipe: Recipe,
    out: Path | None,
    default_out: str,
    *,
    download: str | None = None,
) -> None:
    """Train and report; the folder is looked at before the data, which may take long to read."""
    folder = choose_folder(out, default_out)
    classroom = _classroom(recipe)
    if out is None and classroom.processes.together:
        raise UserError("several processes need to be told where to write: give --out")
    classroom.processes.wait()  # until each has looked at the folder
    _run(classroom, _read_data(recipe, download), folder)


def _resume(out: Path) -> None:
    """Go on with the run in ``out``; of a finished one there is its page, if that is missing."""
    if (out / "summary.json").exists() and not (out / "report.html").exists():
        from classroomkd.report import write_report

        print(f"the run in {out} is finished\nreport: {write_report([out])}")
        return
    recipe = load_recipe(unfinished(out))
    _require_images(recipe.data.source)
    classroom = _classroom(recipe)
    _run(classroom, _read_data(recipe), out, resume=True)


def _classroom(recipe: Recipe) -> Classroom:
    from rich.console import Console

    from classroomkd.training.classroom import Classroom

    return Classroom(recipe, Console())


def _read_data(recipe: Recipe, download: str | None = None) -> Sets:
    from classroomkd.training.images import read_images

    return read_images(recipe.data, split_seed(recipe), download)


def _run(classroom: Classroom, sets: Sets, out: Path, resume: bool = False) -> None:
    from classroomkd.report import results_table

    summary = classroom.run(
        sets.train, sets.test, out, resume, validation_set=sets.validation, folders=sets.folders
    )
    classroom.console.print(results_table(summary))
    classroom.console.print(
        f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Print how well a network does on held-out images."""
    _require_checkpoint(str(arguments.student))
    source = _source(arguments)

    import torch

    from classroomkd.data import channel_statistics
    from classroomkd.models import NetworkInfo, load_network
    from classroomkd.training.evaluation import evaluate as measure
    from classroomkd.training.evaluation import evaluation_loader, require_finite
    from classroomkd.training.images import open_loaders, read_images
    from classroomkd.training.machine import find_device
    from classroomkd.training.mentors import fit_to_data

    device = find_device(arguments.device)
    network, info, architecture = load_network(arguments.student, notify=print)
    image_size = info.image_size if info else DEFAULT_IMAGE_SIZE
    if info is None and arguments.data is None:
        raise UserError(
            f"{arguments.student} is of no run, though it lies in the folder of one: give --data"
        )
    split = _split(arguments, ours=info is not None)
    photos, loader = split.pop("crop") == "resize", split.pop("loader")
    if photos and info is None:
        raise UserError(
            f"{arguments.student} does not say how its images were prepared: only images that are "
            "decoded at one size can tell, without --crop resize"
        )
    data = DataConfig(source, image_size, test_share=split["test_share"])
    data.crop = "resize" if photos else "pad"
    sets = read_images(data, split["seed"])
    train_set, test_set = sets.train, sets.test
    if info is None:
        info = NetworkInfo(
            architecture, test_set.classes, *channel_statistics(train_set), image_size
        )
        print(
            f"{arguments.student} does not say how its images were prepared: taking the mean and "
            f"deviation of {source}'s training part, {image_size}×{image_size} pixels"
        )
    fit_to_data(network, info, replace(info, classes=test_set.classes), str(arguments.student))
    network.to(device, memory_format=torch.channels_last)
    images = join(*sets.sets().values()) if arguments.all else test_set
    loaders = open_loaders(loader, [images], image_size, device)
    with evaluation_loader(loaders, images, info) as batches:
        result = measure(network, batches)
    require_finite(result, str(arguments.student))
    own = ", as in its run" if arguments.data is None else ""
    part = "all images" if arguments.all else "the held-out part"
    print(f"{architecture} of {arguments.student} on {part} of {source}{own}:")
    chosen = ""
    if not arguments.all and is_split_by_seed(source):
        total = len(train_set) + len(test_set)
        chosen = f" of {total} (held out by seed {split['seed']}; --all measures every image)"
    print(f"images  {result.images}{chosen}")
    print(f"top-1   {result.top1:.2%}")
    print(f"top-5   {f'{result.top5:.2%}' if len(info.classes) > 5 else '–'}")
    print(f"loss    {result.loss:.4f}")
    print(f"calibration error {result.calibration_error:.4f}")


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a run, or one that compares several."""
    from classroomkd.report.records import require_records

    for folder in arguments.runs:  # before the plots' library is imported, which takes long
        require_records(folder)
    from classroomkd.report import write_report

    print(f"report: {write_report(arguments.runs, arguments.out)}")


def _source(arguments: argparse.Namespace) -> str:
    """The images that are given, or those of the run that the network comes from."""
    if arguments.data is not None:
        _require_images(str(arguments.data))
        return str(arguments.data)
    source = recorded_source(arguments.student)
    if not source:
        arguments.parser.error(
            f"--data is required: {arguments.student} lies in no run folder that names its images"
        )
    if source not in NAMED_SOURCES and not Path(source).exists():
        raise UserError(f"the images of the run are no longer at {source}: give --data")
    return source


def _split(arguments: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """Seed, share and crop, by default those of the run that ``ours`` comes from, and the loader.

    With another split a network would be measured on images that it was trained on. Loaders resize
    photographs each in its own way, so those are loaded as in the run; of other images all make the
    same.
    """
    split = {"seed": DEFAULT_SEED, "test_share": DEFAULT_TEST_SHARE, "crop": "pad"}
    recorded = recorded_split(arguments.student) if ours else {}
    loader = recorded.pop("loader", "auto")
    split |= recorded
    given = {name: getattr(arguments, name) for name in split}
    split |= {name: value for name, value in given.items() if value is not None}
    return split | {"loader": loader if split["crop"] == "resize" else "resident"}
