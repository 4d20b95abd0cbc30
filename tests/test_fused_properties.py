"""The kernels against the definition in float64 on classrooms that Hypothesis draws.

The bar is that of ``test_fused.py``. On few rows, though, a float32 error is luck, PyTorch's as
much as the kernel's; where PyTorch had more of it, the bar is twice the largest of PyTorch's errors
on a few copies of the batch, scaled by factors near 1. Draws on which float32 may decide otherwise
than float64 (who is better, how a share is rounded) are left out, never tolerated.
"""

import os
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.limits import MAX_TEMPERATURE
from classroomkd.loss.definition import classroom_weights, prepare_targets
from classroomkd.loss.fused import ClassroomReport
from classroomkd.loss.options import LossOptions
from classrooms import classroom, probabilities

launch = pytest.importorskip("classroomkd.kernels.launch", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# One class and two; either side of a power of two; several rows a program and one.
CLASSES = (1, 2, 3, 7, 16, 31, 33, 64, 100, 129)
NAMES = ("loss", "grad", *ClassroomReport._fields)
MARGIN = 1e-6  # of the truth's norm
ATOL = 1e-7  # one rounding of the 1 that a softmax sums up to
COPIES = 16


def examples(n):
    """Settings for so many examples in the interpreter and three times as many on a GPU.

    A fixture does not change between examples: ``device`` is a constant, ``poisoned_memory`` a
    switch that stays on.
    """
    return settings(
        max_examples=3 * n if torch.cuda.is_available() else n,
        deadline=None,
        phases=set(Phase) - {Phase.explain},  # whose tracing slows the interpreter down
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Case(NamedTuple):
    """A call of the loss, as drawn; ``layouts`` say how the logits shall lie in memory."""

    student: Tensor
    mentors: list[Tensor]
    targets: Tensor
    options: dict
    layouts: list[str]
    tiled: bool

    def change(self, **options):
        """The same call with other options."""
        return self._replace(options=self.options | options)


def laid_out(logits, layout):
    """The same logits in other strides, with NaN between the rows."""
    if layout == "padded":
        wide = logits.new_full((logits.shape[0], logits.shape[1] + 5), torch.nan)
        wide[:, 3:-2] = logits
        return wide[:, 3:-2]
    if layout == "every other row":
        tall = logits.new_full((2 * logits.shape[0], logits.shape[1]), torch.nan)
        tall[::2] = logits
        return tall[::2]
    if layout == "transposed":
        return logits.t().contiguous().t()
    return logits[:1].expand(logits.shape) if layout == "repeated" else logits.contiguous()


options_drawn = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 4.0, MAX_TEMPERATURE]),
        "ranking": st.just("batch"),
        "knowledge_filter": st.sampled_from(["correct", "correct_and_better", "none"]),
        "mentoring": st.sampled_from(["fixed", "none", "dtkd"]),
        "weighting": st.just("uniform"),
        "task_weight": st.sampled_from([0.0, 0.7]),
        "rank_decimals": st.sampled_from([0, 1, 2, 3, 15]),
        "label_smoothing": st.sampled_from([0.1, 1.0]),
        "reduction": st.sampled_from(["sum", "none"]),
    },
)


@st.composite
def cases(draw, dtypes=FLOATS, most_mentors=16):
    """A classroom of any shape, dtypes, strides and options."""
    n_mentors = draw(st.integers(1, most_mentors))
    n_classes = draw(st.sampled_from(CLASSES))
    tiled = draw(st.sampled_from([False, False, True]))
    # In the interpreter a program takes its time, for every mentor anew.
    programs = max(1, (3 if tiled else 8) // n_mentors)
    rows_a_program = 1 if tiled else max(1, 128 // n_classes)
    n_rows = draw(st.integers(0, min(12, programs * rows_a_program)))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = draw(st.sampled_from([3.0, 0.3, 1.0, 10.0]))
    student, mentors, indices = classroom(n_mentors, n_rows, n_classes, scale=scale, seed=seed)
    dtype = st.sampled_from(dtypes)
    layout = st.sampled_from(["contiguous", "padded", "every other row", "transposed", "repeated"])
    student = student.to(draw(dtype))
    layouts = [draw(layout)]
    student = laid_out(student, layouts[0]).contiguous()
    twins = draw(st.booleans())
    drawn = []
    for mentor in mentors:
        kind = draw(st.sampled_from(["itself", "behind", "student", "first"])) if twins else ""
        if kind == "behind":
            mentor[torch.arange(n_rows), indices] -= 50.0
        elif kind == "student":
            mentor = student
        elif kind == "first":
            mentor = (drawn or [mentor])[0]
        layouts.append(draw(layout))
        drawn.append(laid_out(mentor.to(draw(dtype)), layouts[-1]).contiguous())

    options = draw(options_drawn)
    if draw(st.booleans()):
        strided = torch.tensor([0.0, 0.3, 1.0, 2.0]).to(draw(dtype)).repeat(8)
        options["mentor_weight"] = strided[:: draw(st.integers(1, 2))][:n_mentors]
    if draw(st.booleans()):
        return Case(
            student,
            drawn,
            probabilities(n_rows, n_classes, seed).to(draw(dtype)),
            options,
            layouts,
            tiled,
        )
    small = [torch.int8, torch.uint8] if n_classes < 128 else [torch.uint8]
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, *small]))
    targets = indices.to(kind)
    if draw(st.booleans()):
        options["ignore_index"] = 255 if kind == torch.uint8 else -7
        ignored = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed)) < 0.3
        targets[ignored] = options["ignore_index"]
        if layouts[0] != "repeated":
            student[ignored] = torch.nan
    return Case(student, drawn, targets, options, layouts, tiled)


@contextmanager
def cut_up(case):
    """Sweep over tiles, also where a single pass would do; count beforehand, also few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_MAX_ROWS_COUNTED_IN_PASS", 6)
        if case.tiled:
            patch.setattr(launch, "blocks", lambda *_: None)
            patch.setattr(launch, "tile_blocks", lambda _: launch.Blocks(32, 1, 1))
        yield


def upstream(case):
    shape = case.targets.shape[:1] if case.options.get("reduction") == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def definition(case, dtype, factor=1.0):
    """Loss, gradient and report by definition, computed in this precision, as float64."""
    student = (case.student.float() * factor).to(dtype).requires_grad_()
    mentors = [(mentor.float() * factor).to(dtype) for mentor in case.mentors]
    loss, report = classroom_loss(
        student, mentors, case.targets, return_report=True, **case.options
    )
    loss.backward(upstream(case).to(dtype))
    return [value.detach().double() for value in (loss, student.grad, *report)]


def on_device(case, device):
    logits = [
        laid_out(value.detach().to(device), layout)
        for value, layout in zip([case.student, *case.mentors], case.layouts, strict=True)
    ]
    options = dict(case.options)
    if "mentor_weight" in options:
        weight = options["mentor_weight"]
        options["mentor_weight"] = torch.empty_strided(
            weight.shape, weight.stride(), dtype=weight.dtype, device=device
        ).copy_(weight)
    return logits[0], logits[1:], case.targets.to(device), options


def through_autograd(case, device):
    student, mentors, targets, options = on_device(case, device)
    with cut_up(case):
        loss, report = fused_classroom_loss(
            student.requires_grad_(), mentors, targets, return_report=True, **options
        )
        loss.backward(upstream(case).to(device))
    return [value.detach().double().cpu() for value in (loss, student.grad, *report)]


def in_one_launch(case, device):
    student, mentors, targets, options = on_device(case, device)
    with cut_up(case):
        loss, grad, report = fused_classroom_loss_and_grad(
            student,
            mentors,
            targets,
            scale=upstream(case).to(device),
            return_report=True,
            **options,
        )
    return [value.double().cpu() for value in (loss, grad, *report)]


def decided(case):
    """Whether float32 must decide as float64 does: no near-tie, no share rounded from near a half.

    Equal rows are equal in any precision; so are confidences of exactly 0 and 1.
    """
    names = {*case.options} - {"mentor_weight"}
    options = LossOptions(**{name: case.options[name] for name in names})
    student = case.student.double()
    mentors = torch.stack([mentor.double() for mentor in case.mentors])
    target = prepare_targets(case.targets, student.shape[1], options, torch.float64)
    if not target.valid.any():
        return True
    keep = target.valid
    student, mentors = student[keep], mentors[:, keep]
    target = prepare_targets(case.targets[keep], student.shape[1], options, torch.float64)
    weights = classroom_weights(student, mentors, target, options)
    ell = weights.log_confidence
    healthy = ~weights.sick
    low, high = torch.minimum(ell[0], ell[1:]), torch.maximum(ell[0], ell[1:])
    twin = (mentors == student).all(-1)
    if options.ranking == "batch":
        twin = twin.all(1, keepdim=True)
    floor = torch.finfo(torch.float64).min
    same = twin | ((low == high) & ((low == 0) | (low == floor)))
    if options.rank_decimals is not None:
        share = torch.softmax(ell, 0) * 10.0**options.rank_decimals
        from_half = (share - share.floor() - 0.5).abs()
        clear = (from_half > 1e-4 * share + 1e-6) | (share > 1e7)
        if not clear[:, healthy].all():
            return False
    return (same | (high - low > 1e-4 * (1 - low)))[:, healthy].all().item()


def pattern(value):
    """Which values are NaN, inf and −inf."""
    return (value.isnan() + 2 * value.isposinf() + 3 * value.isneginf()).tolist()


def finite_norm(value):
    return value[value.isfinite()].norm().item()


def assert_no_worse_than_pytorch(case, results):
    """Compare results, lists of loss, gradient and report, with the definition in float64.

    Args:
        results: triples of a name, the values, and how often the gradient was rounded to the
            student's dtype on its way.

    """
    truth = definition(case, torch.float64)
    same = definition(case, torch.float32)
    assume([*map(pattern, same)] == [*map(pattern, truth)])  # else float32 overflows
    errors = [[finite_norm(a - b) for a, b in zip(same, truth, strict=True)]]
    dtype = torch.finfo(case.student.dtype)
    for path, values, roundings in results:
        assert [v.shape for v in values] == [v.shape for v in truth], path
        compared = NAMES
        if truth[1].isnan().any():  # in a sick row there is not much to report on
            assert any(value.isnan().any() for value in values[2:])
            compared = NAMES[:2]
        for index, name in enumerate(compared):
            assert pattern(values[index]) == pattern(truth[index]), f"{path}, {name}"
            error, norm = finite_norm(values[index] - truth[index]), finite_norm(truth[index])
            margin = MARGIN * norm + ATOL
            if name == "grad" and case.student.dtype != torch.float32:
                subnormal = dtype.smallest_normal * dtype.eps * truth[index].numel() ** 0.5
                margin += roundings * (dtype.eps / 2 * norm + 2 * subnormal)
            if error <= errors[0][index] + margin:
                continue
            while len(errors) < COPIES:
                factor = 1 + len(errors) * 2.0**-16
                copy, exact = (definition(case, d, factor) for d in (torch.float32, torch.float64))
                errors.append([finite_norm(a - b) for a, b in zip(copy, exact, strict=True)])
            allowed = 2 * max(each[index] for each in errors) + margin
            assert error <= allowed, f"{path}, {name}: {error:.2e} of {norm:.2e}, not {allowed:.2e}"


def assert_right(case, device):
    results = [("autograd", through_autograd(case, device), 2)]
    if case.options.get("reduction") != "none":
        results.append(("one launch", in_one_launch(case, device), 1))
    assert_no_worse_than_pytorch(case, results)


@examples(40)
@given(case=cases())
def test_any_classroom(device, case):
    assume(decided(case))
    assert_right(case, device)


EXTREMES = {
    "NaN": lambda row, at: row.fill_(torch.nan),
    "one NaN": lambda row, at: row[at].fill_(torch.nan),
    "inf": lambda row, at: row[at].fill_(torch.inf),
    "ruled out": lambda row, at: row[at].fill_(-torch.inf),
    "one class left": lambda row, at: row.masked_fill_(torch.arange(len(row)) != at, -torch.inf),
    "no class left": lambda row, at: row.fill_(-torch.inf),
    "level": lambda row, at: row.fill_(1.5),
    "huge": lambda row, at: row.mul_(1e4 / row.abs().max()),
    "huge twins": lambda row, at: row.fill_(-1e4)[: at + 1].fill_(1e4),
}


@st.composite
def extreme_cases(draw):
    """A drawn classroom in which some rows are not as rows should be."""
    case = draw(cases())
    everyone = [logits.clone() for logits in (case.student, *case.mentors)]
    n_rows, n_classes = case.student.shape
    for extreme in draw(st.lists(st.sampled_from([*EXTREMES]), max_size=4)) if n_rows else ():
        # One mentor or the student, or all of them, in one row or in all.
        who = draw(st.integers(-1, len(everyone) - 1))
        where = draw(st.integers(-1, n_rows - 1))
        at = draw(st.integers(0, n_classes - 1))
        for logits in everyone if who < 0 else [everyone[who]]:
            for row in logits if where < 0 else [logits[where]]:
                EXTREMES[extreme](row, at)
    everyone = [
        laid_out(logits, layout).contiguous()
        for logits, layout in zip(everyone, case.layouts, strict=True)
    ]
    return case._replace(student=everyone[0], mentors=everyone[1:])


@examples(30)
@given(case=extreme_cases())
def test_extremes(device, case):
    assume(decided(case))
    assert_right(case, device)


float32_cases = cases(dtypes=(torch.float32,), most_mentors=5)


def close(got, expected, rtol=3e-6):
    assert finite_norm(got - expected) <= rtol * finite_norm(expected) + ATOL


@examples(8)
@given(case=float32_cases, data=st.data())
def test_the_order_of_mentors_does_not_matter(device, case, data):
    assume(decided(case))
    order = data.draw(st.permutations(range(len(case.mentors))))
    options = dict(case.options)
    if "mentor_weight" in options:
        options["mentor_weight"] = options["mentor_weight"][order]
    layouts = [case.layouts[0], *(case.layouts[1 + m] for m in order)]
    shuffled = Case(
        case.student,
        [case.mentors[m] for m in order],
        case.targets,
        options,
        layouts,
        case.tiled,
    )
    loss, grad, *report = through_autograd(case, device)
    other_loss, other_grad, *other_report = through_autograd(shuffled, device)
    close(other_loss, loss)
    close(other_grad, grad)
    for value, other in zip(report, other_report, strict=True):
        close(other, value[order] if value.dim() else value)


@examples(8)
@given(case=float32_cases.filter(lambda case: len(case.student)), data=st.data())
def test_a_row_is_its_own_affair(device, case, data):
    """Ranked per sample, a row is the same to the last bit whatever its neighbours hold."""
    layouts = ["contiguous" if layout == "repeated" else layout for layout in case.layouts]
    case = case.change(reduction="none", ranking="sample")._replace(layouts=layouts)
    row = data.draw(st.integers(0, len(case.student) - 1))
    others = (torch.arange(len(case.student)) != row)[:, None]
    alone = case._replace(
        student=case.student.masked_fill(others, torch.nan),
        mentors=[mentor.masked_fill(others, torch.nan) for mentor in case.mentors],
    )
    loss, grad, *_ = through_autograd(case, device)
    other_loss, other_grad, *_ = through_autograd(alone, device)
    assert torch.equal(other_loss[row], loss[row])
    assert torch.equal(other_grad[row], grad[row])


@examples(8)
@given(case=float32_cases)
def test_gradients(device, case):
    """A row's gradient sums to 0, and scaling what comes from above scales it exactly."""
    _, grad, *_ = through_autograd(case, device)
    largest_weight = 2 * len(case.mentors) * (1 + 2 * case.options.get("temperature", 12.0))
    assert (grad.sum(1).abs() <= MARGIN * (grad.abs().sum(1) + largest_weight)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "upstream", lambda case, once=upstream: -4 * once(case))
        _, scaled, *_ = through_autograd(case, device)
        assert torch.equal(scaled, -4 * grad)
        if case.options.get("reduction") != "none":
            _, scaled, *_ = in_one_launch(case, device)
            close(scaled, -4 * grad)


@examples(8)
@given(case=float32_cases)
def test_every_row_twice(device, case):
    """The mean stays, the report too, and each copy gets half the gradient."""
    assume(decided(case))
    case = case.change(reduction="mean")
    twice = case._replace(
        student=case.student.repeat(2, 1),
        mentors=[mentor.repeat(2, 1) for mentor in case.mentors],
        targets=torch.cat([case.targets] * 2),
    )
    # Of twice the rows the mean confidence may round otherwise, and temperatures follow it.
    rtol = 1e-4 if "ranking" in case.options else 3e-6
    loss, grad, *report = through_autograd(case, device)
    other_loss, other_grad, *other_report = through_autograd(twice, device)
    close(other_loss, loss, rtol)
    close(2 * other_grad, grad.repeat(2, 1), rtol * 2**0.5)
    for value, other in zip(report, other_report, strict=True):
        close(other, value, rtol)


def test_class_indices_that_wrap_around(device, monkeypatch):
    """Class 156 as uint8 has the bits of -100, the index that is ignored, as int8."""
    student, mentors, _ = classroom(n_rows=3, n_classes=200).to(device)
    targets = torch.tensor([156, 3, 199], device=device)
    for most in (1, 1024):
        monkeypatch.setattr(launch, "_MAX_ROWS_COUNTED_IN_PASS", most)
        expected = fused_classroom_loss_and_grad(student, mentors, targets)
        narrow = fused_classroom_loss_and_grad(student, mentors, targets.to(torch.uint8))
        assert all(map(torch.equal, narrow, expected))


@pytest.mark.parametrize(("n_mentors", "decimals", "rounded"), [(1, 0, 0), (3, 1, 2), (7, 2, 12)])
def test_halves_are_rounded_to_even(device, n_mentors, decimals, rounded):
    """Mentors that equal the student have shares of exactly 1/2, 1/4, 1/8."""
    student, _, targets = classroom().to(device)
    _, report = fused_classroom_loss(
        student, [student] * n_mentors, targets, rank_decimals=decimals, return_report=True
    )
    rank = torch.full((n_mentors,), n_mentors * rounded / 10**decimals, device=device)
    torch.testing.assert_close(report.rank_weight, rank, rtol=1e-6, atol=0)
    assert report.active_share.tolist() == [1.0] * n_mentors
