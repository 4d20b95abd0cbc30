"""What a run reads besides its images, by digest: a resumed run must find the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from classroomkd.models.network_names import PRETRAINED, is_checkpoint
from classroomkd.runs.builder import Builder
from classroomkd.runs.mentor_setup import Mentor, weights_digest
from classroomkd.runs.recipe import Recipe, code_sources, teaching
from classroomkd.training.logits_files import OwnLogits


def input_digests(
    recipe: Recipe, mentors: Sequence[Mentor], own: Mapping[str, OwnLogits], builder: Builder
) -> dict[str, str]:
    """The digests of weights, checkpoints, files of logits and code, by what they are called."""
    given = [recipe.init, *(mentor.weights for mentor in teaching(recipe))]
    given += [mentor.source for mentor in mentors if is_checkpoint(mentor.source)]
    given += [str(logits.path) for logits in own.values()]
    files = {name: weights_digest(name) for name in given if name not in (None, PRETRAINED)}
    codes = {name: builder.code(name) for name in code_sources(recipe)}
    files |= {name: code for name, code in codes.items() if code is not None}
    return files | builder.digests()
