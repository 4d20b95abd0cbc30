"""The fused pass against the definition in float64 on classrooms that Hypothesis draws.

``fused_cases.py`` says how they are compared. A GPU's kernels take seconds each to compile, and
these draw hundreds, so that they run in the interpreter, and on the CPU's pass, where there are
thousands; ``test_fused_kernels.py`` runs a fixed set everywhere.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import fused_cases
from classroomkd.limits import MAX_TEMPERATURE
from classroomkd.loss import fused
from classrooms import classroom, probabilities
from fused_cases import (
    EXTREMES,
    MARGIN,
    Case,
    assert_right,
    close,
    decided,
    in_one_launch,
    laid_out,
    through_autograd,
    upstream,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# One class and two; either side of a power of two; several rows a program and one.
CLASSES = (1, 2, 3, 7, 16, 31, 33, 64, 100, 129)


@pytest.fixture
def device(device):
    """The CPU's, or the interpreter's."""
    if device.type == "cuda":
        pytest.skip("draws hundreds of kernels: test_fused_kernels.py has a fixed set of them")
    return device


def drawn(n, **strategies):
    """Make a test of ``device`` from a check of what is drawn: n examples, more on the CPU.

    A fixture does not change between examples: ``device`` is a constant, ``poisoned_memory`` a
    switch that stays on.
    """

    def decorate(check):
        def test(device):
            by_numba = fused.implementation(device.type).__name__.endswith("cpu_pass")
            many = 20 * n if by_numba else n

            @settings(
                max_examples=many,
                deadline=None,
                phases=set(Phase) - {Phase.explain},  # whose tracing slows the interpreter down
                derandomize=bool(os.environ.get("CI")),
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
            )
            @given(**strategies)
            def holds(**values):
                check(device, **values)

            holds()

        test.drawn = True
        return test

    return decorate


options_drawn = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 4.0, MAX_TEMPERATURE]),
        "ranking": st.just("batch"),
        "knowledge_filter": st.sampled_from(["correct", "correct_and_better", "none"]),
        "mentoring": st.sampled_from(["fixed", "none", "dtkd"]),
        "weighting": st.sampled_from(["uniform", "confidence"]),
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
    weighted = draw(st.sampled_from(["not", "for all", "one each"]))
    if weighted == "for all":
        options["mentor_weight"] = draw(st.sampled_from([0.0, 0.3, 2, "auto"]))
    elif weighted == "one each":
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


@pytest.mark.slow
@drawn(12, case=cases())
def test_any_classroom(device, case):
    assume(decided(case))
    assume(assert_right(case, device))


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


@pytest.mark.slow
@drawn(8, case=extreme_cases())
def test_extremes(device, case):
    assume(decided(case))
    assume(assert_right(case, device))


float32_cases = cases(dtypes=(torch.float32,), most_mentors=5)


@drawn(3, case=float32_cases, data=st.data())
def test_the_order_of_mentors_does_not_matter(device, case, data):
    assume(decided(case))
    order = data.draw(st.permutations(range(len(case.mentors))))
    options = dict(case.options)
    if isinstance(options.get("mentor_weight"), torch.Tensor):
        options["mentor_weight"] = options["mentor_weight"][order]
    layouts = [case.layouts[0], *(case.layouts[1 + m] for m in order)]
    shuffled = Case(
        case.student, [case.mentors[m] for m in order], case.targets, options, layouts, case.tiled
    )
    loss, grad, *report = through_autograd(case, device)
    other_loss, other_grad, *other_report = through_autograd(shuffled, device)
    close(other_loss, loss)
    close(other_grad, grad)
    for value, other in zip(report, other_report, strict=True):
        close(other, value[order] if value.dim() else value)


@drawn(3, case=float32_cases.filter(lambda case: len(case.student)), data=st.data())
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


@drawn(3, case=float32_cases)
def test_gradients(device, case):
    """A row's gradient sums to 0, and scaling what comes from above scales it exactly.

    Subnormal numbers have fewer bits, so the smaller of two may be rounded where the larger is not.
    """
    _, grad, *_ = through_autograd(case, device)
    largest_weight = 2 * len(case.mentors) * (1 + 2 * case.options.get("temperature", 12.0))
    assert (grad.sum(1).abs() <= MARGIN * (grad.abs().sum(1) + largest_weight)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_cases, "upstream", lambda case, once=upstream: -4 * once(case))
        _, scaled, *_ = through_autograd(case, device)
        smallest = torch.finfo(torch.float32).tiny
        normal = (grad.abs() >= smallest) | (grad == 0)
        assert torch.equal(scaled[normal], -4 * grad[normal])
        assert (scaled[~normal].abs() <= 5 * smallest).all()
        if case.options.get("reduction") != "none":
            _, scaled, *_ = in_one_launch(case, device)
            close(scaled, -4 * grad)


@drawn(3, case=float32_cases)
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
