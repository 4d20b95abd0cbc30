"""A whole run: the mentors, the student alone and with its mentors, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from classroomkd.data import Loader
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method, create
from classroomkd.loss.methods.classroom import Classroom
from classroomkd.models import NetworkInfo
from classroomkd.models.layout import bare, to_channels_last
from classroomkd.models.network_names import PRETRAINED, is_checkpoint, is_logits
from classroomkd.report.page import write_report
from classroomkd.runs.builder import Builder
from classroomkd.runs.context import RunContext
from classroomkd.runs.given_mentors import check_given, part_to_check
from classroomkd.runs.images import (
    AnyPart,
    ImageSets,
    counts,
    example_of,
    network_info,
    open_loaders,
    sets_of_run,
)
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.jobs import TrainingJob, student_jobs
from classroomkd.runs.machine import (
    device_name,
    find_device,
    find_precision,
    keep_freed_memory,
    start,
    versions,
)
from classroomkd.runs.mentor_answers import MentorAnswers, find_own, fit_own, names_in_order
from classroomkd.runs.mentor_setup import (
    Mentor,
    find_mentors,
    fit_mentor,
    mentor_trainings,
    weights_digest,
)
from classroomkd.runs.networks import NetworkTrainer
from classroomkd.runs.progress import TrainingProgress, print_line
from classroomkd.runs.recipe import (
    Recipe,
    code_sources,
    split_seed,
    teaching,
    to_dict,
    with_absolute_paths,
)
from classroomkd.runs.run_checks import RunChecks
from classroomkd.runs.run_folder import RunFolder, errors_name_run
from classroomkd.runs.store import MentorStore
from classroomkd.runs.stored_mentors import StoredMentors
from classroomkd.training.distributed import Processes, local_device
from classroomkd.training.evaluation import TeachingShares, evaluation_loader, require_finite
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors


class TrainingRun:
    """A student and its mentors.

    The constructor checks everything that does not need the data: names, checkpoints, the device,
    the sizes of images and batches. It raises UserError if one is wrong.
    """

    def __init__(
        self,
        recipe: Recipe,
        console: Console,
        modules: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        self.builder = Builder(modules)
        self.students: dict[str, nn.Module] = {}  # trained, by phase
        self.device = local_device(find_device(recipe.device))
        self.processes = Processes(self.device)
        threads = recipe.threads or torch.get_num_threads()
        recipe = replace(
            with_absolute_paths(recipe),
            device=self.device.type if self.processes.together else str(self.device),
            threads=threads,
        )
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True  # batches have one shape, so the search pays off
        if self.device.type == "cpu":
            keep_freed_memory()
        self.recipe = recipe
        self.console = console if self.processes.is_main else Console(quiet=True)
        self.dtype = find_precision(recipe.precision, self.device)
        epochs = recipe.mentor_training.epochs
        networks = [mentor for mentor in teaching(recipe) if not is_logits(mentor.source)]
        self.mentors = find_mentors(networks, epochs, self._print, modules)
        self.own_logits = find_own(recipe)
        method = self._method() if recipe.student else None
        self._checks = RunChecks(recipe, self.mentors, self.builder, self.processes)
        self._checks.before_data(method)

    def run(
        self,
        train_set: AnyPart,
        test_set: AnyPart,
        out: Path,
        resume: bool = False,
        *,
        validation_set: AnyPart | None = None,
        folders: Mapping[str, str] = MappingProxyType({}),
        temporary: bool = False,
    ) -> dict[str, Any]:
        """Train everything, write the run folder ``out`` with its report, return the summary.

        The student's best epoch is selected on ``validation_set``, or if that is None on a share
        of ``train_set``; it is not selected if the recipe's ``data.validation`` is 0. ``folders``
        maps parts to their folders, to be shown to the user; ``out`` is not, if it is
        ``temporary``.

        With ``resume`` the run in ``out`` continues from its last checkpoint and ends with the
        same results, on a CPU bit for bit.

        Raises UserError if a given mentor does not fit the data, a training diverges, or the run
        to resume had other inputs; OSError naming the file or ``out`` if writing fails; and
        KeyboardInterrupt, after SIGINT or SIGTERM too, with a message that says what was saved.
        """
        self._print_unused_mentors()
        info = network_info(self.recipe.student, self.recipe.data, train_set)
        example = example_of(train_set, info.image_size)
        self._checks.with_data(info, example)
        for mentor in self.mentors:
            if mentor.network is not None:
                fit_mentor(mentor, info, example, self._print)
        resuming = (
            f"distill(…, out={str(out)!r}, resume=True)"
            if self.builder.modules or not self.recipe.data.source
            else f"classroomkd train --resume {out}"
        )
        with errors_name_run(out, resuming):
            share = self.recipe.data.validation
            if validation_set is not None and not share:
                name = folders.get("validation", "the validation part")
                self._print(f"{name} is not used: data.validation is 0")
            sets = sets_of_run(
                *(train_set, test_set, validation_set),
                share=share,
                seed=split_seed(self.recipe),
                world_size=self.processes.world_size,
            )
            classes = len(info.classes)
            fit_own(self.own_logits, train_set, classes, self.recipe, validation_set is None)
            self._check_mentors(sets, info)
            self._print(
                f"images: {counts(sets, folders)}, of {classes} classes; "
                f"{device_name(self.device)}{'' if temporary else f'; run in {out}'}"
            )
            with ExitStack() as opened:
                trainer, answers = self._open(opened, out, resume, info, sets)
                results = self._train_all(trainer, answers)
            summary = self._summary(sets, results)
            trainer.run.finish(summary)
            if self.processes.is_main:
                write_report(out)
        return summary

    def _print_unused_mentors(self) -> None:
        """Print which of the recipe's mentors the method does not use."""
        names = names_in_order(self.recipe, self.mentors, self.own_logits)
        if len(names) < len(self.recipe.mentors):
            used = f"the mentor {names[0]} only; the others" if names else "no mentor; they"
            self._print(f"method {self.recipe.method} uses {used} are not loaded")

    def _check_mentors(self, sets: ImageSets, info: NetworkInfo) -> None:
        """Print a line per given mentor; raise UserError for a fault if the recipe is strict."""
        part = part_to_check(sets.get("validation"), sets["test"])
        checks = check_given(self.mentors, part, info, self.device)
        for check in checks:
            self._print(f"mentor {check}")
        if self.recipe.strict and any(check.findings for check in checks):
            raise UserError("a mentor has the faults printed above, and strict=true is set")

    def _open(
        self,
        opened: ExitStack,
        out: Path,
        resume: bool,
        info: NetworkInfo,
        sets: ImageSets,
    ) -> tuple[NetworkTrainer, MentorAnswers]:
        """Open the run folder and the loaders, to be closed with ``opened``."""
        recipe = self.recipe
        loaders = open_loaders(
            recipe.data.loader, list(sets.values()), info.image_size, self.device
        )
        held_out: dict[str, Loader] = {
            name: opened.enter_context(
                evaluation_loader(loaders, sets[name], info, **self.processes.place)
            )
            for name in ("validation", "test")
            if name in sets
        }
        digests = {name: images.digest() for name, images in sets.items()}
        run = self._open_folder(opened, out, resume, digests)
        self._print(f"loader: {loaders.backend} ({loaders.reason})")
        context = RunContext(
            recipe=recipe,
            info=info,
            builder=self.builder,
            sets=sets,
            digests=digests,
            loaders=loaders,
            dtype=self.dtype,
            processes=self.processes,
            interrupts=opened.enter_context(Interrupts()),
            notify=self._print,
        )
        trainer = NetworkTrainer(
            **vars(context),
            held_out=held_out,
            run=run,
            stored=StoredMentors(**vars(context), store=MentorStore()),
            progress=opened.enter_context(TrainingProgress(self.console)),
        )
        answers = MentorAnswers(**vars(context), mentors=self.mentors, own=self.own_logits)
        return trainer, answers

    def _open_folder(
        self, opened: ExitStack, out: Path, resume: bool, digests: Mapping[str, str]
    ) -> RunFolder:
        """The run folder, with this process recorded; UserError if it has other inputs."""
        run = RunFolder(
            out,
            to_dict(self.recipe),
            resume,
            writes=self.processes.is_main,
            tensorboard=self.recipe.tensorboard,
        )
        opened.callback(run.close)
        images = {f"the {name} images": digest for name, digest in digests.items()}
        run.require_same(images | self._inputs())
        run.begin(start(self.device, self.processes.world_size))
        self.processes.wait()
        return run

    def _inputs(self) -> dict[str, str]:
        """The digests of weights, checkpoints, files of logits and code that the run reads."""
        recipe = self.recipe
        given = [recipe.init, *(mentor.weights for mentor in teaching(recipe))]
        given += [mentor.source for mentor in self.mentors if is_checkpoint(mentor.source)]
        given += [str(logits.path) for logits in self.own_logits.values()]
        files = {name: weights_digest(name) for name in given if name not in (None, PRETRAINED)}
        codes = {name: self.builder.code(name) for name in code_sources(recipe)}
        known = {name: code for name, code in codes.items() if code is not None}
        return files | known | self.builder.digests()

    def _summary(self, sets: ImageSets, results: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of summary.json."""
        recipe, classes = self.recipe, sets["train"].classes
        source = recipe.data.source
        return {
            "data": {
                "name": Path(source).resolve().name if source else "data given in Python",
                "classes": len(classes),
                "class_names": classes,
                **{f"{name}_images": len(images) for name, images in sets.items()},
            },
            "method": recipe.method,
            "seed": recipe.seed,
            "device": device_name(self.device),
            "versions": versions(),
            "results": results,
        }

    def _train_all(self, trainer: NetworkTrainer, answers: MentorAnswers) -> list[dict[str, Any]]:
        """Train and measure every network; the results in the summary's order."""
        # Given mentors come first, so that a nonfinite one is found before anything is trained.
        networks = {m.name: m.network for m in self.mentors if m.network is not None}
        results = {
            mentor.name: self._measure_given(mentor, networks[mentor.name], trainer)
            for mentor in self.mentors
            if mentor.name in networks
        }
        trainings, students = mentor_trainings(self.mentors), student_jobs(self.recipe)
        steps = sum(map(trainer.steps, trainings))
        trainer.progress.begin_run(steps + sum(trainer.steps([student]) for student in students))
        for jobs in trainings:
            trained = trainer.train(jobs, create("alone"))
            for job, (network, result) in zip(jobs, trained, strict=True):
                networks[job.name], results[job.name] = network, result
        mentors = {mentor.name: networks[mentor.name] for mentor in self.mentors}
        for job in students:
            results[job.phase] = self._train_student(job, trainer, answers, mentors)
        return [results[key] for key in (*mentors, *(job.phase for job in students))]

    def _train_student(
        self,
        job: TrainingJob,
        trainer: NetworkTrainer,
        answers: MentorAnswers,
        mentors: Mapping[str, nn.Module],
    ) -> dict[str, Any]:
        """Train the student, alone or by the recipe's method; its result."""
        method, teaching = create("alone"), None
        teachers: MentorBank | CachedMentors | None = None
        with ExitStack() as opened:
            if job.phase == "student":
                method = self._method()
                teachers = MentorBank(
                    mentors,
                    len(trainer.info.classes),
                    device=self.device,
                    dtype=self.dtype,
                    compile=self.recipe.compile,
                    features=method.uses_features,
                    layers=method.teacher_layers,
                )
                if not self.processes.from_main(trainer.run.finished(job.phase, job.name)):
                    teachers = answers.cached(opened, job, method, teachers, mentors)
                if isinstance(method, Classroom) and mentors:
                    teaching = TeachingShares(
                        method, mentors, trainer.held_out["test"], self.processes
                    )
            # Both have number 0: the same initial weights, the same batches.
            ((network, result),) = trainer.train([job], method, teachers, teaching)
        self.students[job.phase] = bare(network)
        return result

    def _method(self) -> Method:
        recipe = self.recipe
        if recipe.method != "classroom":
            return create(recipe.method, **recipe.method_options)
        across = self.processes.together and recipe.ranking_across_processes
        return create(
            "classroom", **vars(recipe.loss), process_group=dist.group.WORLD if across else None
        )

    def _measure_given(
        self, mentor: Mentor, network: nn.Module, trainer: NetworkTrainer
    ) -> dict[str, Any]:
        """Measure a given mentor; raises UserError if its loss is not finite."""
        to_channels_last(network, self.device)
        measured = trainer.evaluate(network, "test")
        require_finite(measured, f"mentor {mentor.called}")
        return mentor.job.result(network, measured)

    def _print(self, line: str) -> None:
        print_line(self.console, line)
