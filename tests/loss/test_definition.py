"""The definition against published values, hand calculation, finite differences, properties."""

import inspect
import itertools
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from classroomkd import (
    classroom_loss,
    fused_classroom_loss,
    fused_classroom_loss_and_grad,
    fused_linear_classroom_loss,
)
from classroomkd.limits import MAX_TEMPERATURE
from classroomkd.loss import automatic_mentor_weight
from classroomkd.loss.definition import classroom_weights, weighted_row_loss
from classroomkd.loss.inputs import loss_options
from classroomkd.loss.options import LossOptions, OptionValues
from classroomkd.loss.targets import prepare_targets
from classrooms import OPTIONS, classroom, probabilities

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "loss_released.npz")
GOLDEN_OPTIONS = {
    "full": {"ranking": "batch", "rank_decimals": 2},
    "no_mentoring": {"ranking": "batch", "rank_decimals": 2, "mentoring": "none"},
    "no_filter": {
        "ranking": "batch",
        "knowledge_filter": "none",
        "weighting": "uniform",
        "mentoring": "none",
        "task_weight": 1.0,
    },
}


def loss_and_grad(student, mentors, targets, **options):
    student = student.detach().clone().requires_grad_()
    loss = classroom_loss(student, mentors, targets, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in GOLDEN}))
def test_published_values(case):
    values = {name: GOLDEN[f"{case}/{name}"] for name in ("student", "mentors", "targets", "grad")}
    student, mentors = (torch.from_numpy(values[k]).double() for k in ("student", "mentors"))
    options = GOLDEN_OPTIONS[case.split("_", 1)[1]]
    targets = torch.from_numpy(values["targets"])
    loss, grad = loss_and_grad(student, mentors, targets, **options)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}/loss"]), rel=2e-6)
    error = np.linalg.norm(grad.numpy() - values["grad"])
    assert error < 2e-6 * np.linalg.norm(values["grad"])


def by_hand(student, mentors, target, temperature):
    """One row with the defaults, in Python floats, straight from the formulas."""

    def softmax(z, tau=1.0):
        e = [math.exp((x - max(z)) / tau) for x in z]
        return [x / sum(e) for x in e]

    p_s = softmax(student)[target]
    p_m = [softmax(z)[target] for z in mentors]
    everyone = p_s + sum(p_m)
    loss = p_s * -math.log(p_s)
    active, ranks, taus, kls = [], [], [], []
    for z, p in zip(mentors, p_m, strict=True):
        rank, own = len(mentors) * p / everyone, len(mentors) * p_s / everyone
        tau = 1 + temperature * abs(rank - own) / max(rank, own)
        teacher, pupil = softmax(z, tau), softmax(student, tau)
        kl = sum(a * math.log(a / b) for a, b in zip(teacher, pupil, strict=True))
        if rank >= own:
            loss += rank * tau**2 * kl
        active.append(float(rank >= own))
        ranks.append(rank)
        taus.append(tau)
        kls.append(kl if rank >= own else 0.0)
    return loss, active, ranks, taus, kls, p_s


def test_one_row_by_hand():
    student, target = [0.5, -1.0, 2.0, 0.1], 0
    mentors = [[3.0, 0.2, -0.4, 1.0], [-1.0, 0.0, 4.0, 0.3], [0.6, -1.0, 1.5, 0.1]]
    loss, active, ranks, taus, kls, p_s = by_hand(student, mentors, target, 12.0)
    assert active == [1.0, 0.0, 1.0]
    got, report = classroom_loss(
        torch.tensor([student], dtype=torch.float64),
        torch.tensor(mentors, dtype=torch.float64)[:, None],
        torch.tensor([target]),
        return_report=True,
    )
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert report.active_share.tolist() == active
    assert report.rank_weight.tolist() == pytest.approx(ranks, rel=1e-12)
    assert report.temperature.tolist() == pytest.approx(taus, rel=1e-12)
    assert report.kl.tolist() == pytest.approx(kls, rel=1e-12)
    assert report.student_confidence.item() == pytest.approx(p_s, rel=1e-12)
    assert report.task_loss.item() == pytest.approx(-math.log(p_s), rel=1e-12)
    assert report.mentor_loss.item() == pytest.approx(loss + p_s * math.log(p_s), rel=1e-12)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_the_second_half(name, soft):
    options = LossOptions(**OPTIONS[name])
    student, mentors, targets = classroom().to(torch.float64)
    if soft:
        targets = probabilities(*student.shape).double()
    target = prepare_targets(targets, student.shape[1], options, torch.float64)
    weights = classroom_weights(student, mentors, target, options)
    mentor_weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

    def rows(z):
        return weighted_row_loss(z, mentors, target, weights, mentor_weight, options).loss

    assert torch.autograd.gradcheck(rows, student.requires_grad_())
    # What the whole loss differentiates is this half and nothing else.
    _, grad = loss_and_grad(
        student.detach(),
        mentors,
        targets,
        **(OPTIONS[name] | {"reduction": "sum", "mentor_weight": mentor_weight}),
    )
    (expected,) = torch.autograd.grad(rows(student).sum(), student)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_properties(name):
    options = OPTIONS[name] | {"reduction": "sum"}
    student, mentors, targets = classroom(n_mentors=4).to(torch.float64)
    loss, grad = loss_and_grad(student, mentors, targets, **options)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, shuffled_grad = loss_and_grad(student, mentors[order], targets, **options)
    torch.testing.assert_close(shuffled, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(shuffled_grad, grad, rtol=1e-10, atol=1e-12)
    assert grad.sum(1).abs().max() < 1e-12
    if "batch" not in options.values():
        _, alone = loss_and_grad(student[1:2], mentors[:, 1:2], targets[1:2], **options)
        torch.testing.assert_close(alone, grad[1:2], rtol=1e-12, atol=1e-14)


def test_equal_mentor_and_student_leave_only_the_task():
    student, _, targets = classroom().to(torch.float64)
    loss, report = classroom_loss(
        student, [student, student], targets, return_report=True, reduction="none"
    )
    log_p = torch.log_softmax(student, 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(loss, -log_p.exp() * log_p, rtol=1e-12, atol=0)
    assert report.active_share.tolist() == [1.0, 1.0]  # a tie teaches
    assert report.temperature.tolist() == [1.0, 1.0]
    assert report.kl.abs().max() < 1e-15


def test_without_active_mentors_only_the_task_is_left():
    student, mentors, targets = classroom().to(torch.float64)
    at_target = torch.nn.functional.one_hot(targets, 10).bool()
    worse = torch.where(at_target, -50.0, mentors)
    loss, report = classroom_loss(student, worse, targets, task_weight=1.0, return_report=True)
    expected = torch.nn.functional.cross_entropy(student, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert report.active_share.tolist() == report.kl.tolist() == [0.0] * 3


@pytest.mark.parametrize("mentoring", ["adaptive", "fixed", "dtkd"])
@pytest.mark.parametrize("temperature", [1e-45, 1e-3, 1.0, MAX_TEMPERATURE])
@pytest.mark.parametrize("n_classes", [2, 10, 1000, 30_000])
def test_float32_bears_every_temperature(n_classes, temperature, mentoring):
    """The KD terms alone, which have nothing to hide behind, are right to 1e-3, and never below 0.

    So are their gradients. Mentors include one that is the student but for a last bit, where
    rounding is all there is; from the others, the whole gradient is right to a thousandth of it.
    """
    n_rows = 64 if n_classes < 1000 else 4
    for scale in (0.01, 1.0, 10.0):
        student, mentors, targets = classroom(2, n_rows, n_classes, scale=scale)
        same = torch.nextafter(student, torch.zeros(()))
        for mentor in (*mentors, same):
            loss, grad, exact, exact_grad = in_both_precisions(
                student, [mentor], targets, temperature=temperature, mentoring=mentoring
            )
            assert (loss >= 0).all()
            assert ((loss - exact).abs() <= 1e-3 * exact.clamp_min(1.0)).all()
            errors, norms = (grad - exact_grad).norm(dim=1), exact_grad.norm(dim=1)
            assert (errors <= 1e-3 * norms.clamp_min(1.0)).all()
            assert mentor is same or errors.norm() <= 1e-3 * norms.norm()


@pytest.mark.parametrize("mentoring", ["adaptive", "fixed", "dtkd"])
@pytest.mark.parametrize("n_classes", [10, 100, 1000])
def test_float32_bears_sixteen_mentors_at_the_highest_temperature(n_classes, mentoring):
    """Their rounding errors, clamped to be positive, add up; a batch of 4 is right to 1e-3."""
    for scale, like in itertools.product((0.01, 0.1, 1.0), (0.0, 0.99)):
        student, mentors, targets = classroom(16, 64, n_classes, scale=scale)
        mentors = like * student + (1 - like) * mentors
        loss, grad, exact, exact_grad = in_both_precisions(
            student, [*mentors], targets, temperature=MAX_TEMPERATURE, mentoring=mentoring
        )
        batches, truths = (rows.view(-1, 4).mean(1) for rows in (loss, exact))
        assert ((batches - truths).abs() <= 1e-3 * truths.clamp_min(1.0)).all()
        norms = exact_grad.norm(dim=1).clamp_min(1.0)
        assert ((grad - exact_grad).norm(dim=1) <= 1e-3 * norms).all()


@pytest.mark.parametrize("n_mentors", [1, 2, 5])
def test_confidence_weighting(n_mentors):
    student, mentors, targets = classroom(n_mentors=n_mentors).to(torch.float64)
    options = {"knowledge_filter": "none", "mentoring": "none", "task_weight": 0.0}
    whole = classroom_loss(
        student, mentors, targets, weighting="confidence", reduction="none", **options
    )
    for b, target in enumerate(targets.tolist()):
        log_p = torch.log_softmax(mentors[:, b], -1)
        errors = (-log_p[:, target]).exp().tolist()  # exp(CE_m) = 1 / p_m
        weights = (
            [1.0]
            if n_mentors == 1
            else [(1 - error / sum(errors)) / (n_mentors - 1) for error in errors]
        )
        kl = (log_p.exp() * (log_p - torch.log_softmax(student[b], -1))).sum(-1).tolist()
        expected = sum(w * value for w, value in zip(weights, kl, strict=True))
        assert whole[b].item() == pytest.approx(expected, rel=1e-12)


def in_both_precisions(student, mentors, targets, **options):
    """Each row's KD terms with their gradient in float32, then in float64, all as float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.detach().to(dtype, copy=True).requires_grad_()
        loss = classroom_loss(
            leaf,
            [mentor.to(dtype) for mentor in mentors],
            targets,
            knowledge_filter="none",
            weighting="uniform",
            task_weight=0.0,
            reduction="none",
            **options,
        )
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        results += [loss.detach().double(), grad.double()]
    return results


def test_ignored_rows_count_nowhere():
    student, mentors, targets = classroom().to(torch.float64)
    student[1], mentors[2, 4], targets[[1, 4]] = torch.nan, torch.inf, -100
    kept = torch.tensor([0, 2, 3, 5])
    for ranking in ("sample", "batch"):
        loss, grad = loss_and_grad(student, mentors, targets, ranking=ranking)
        expected, expected_grad = loss_and_grad(
            student[kept], mentors[:, kept], targets[kept], ranking=ranking
        )
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[kept], expected_grad, rtol=1e-12, atol=0)
        assert grad[[1, 4]].tolist() == torch.zeros(2, 10).tolist()


def test_one_class_and_one_mentor():
    loss, grad = loss_and_grad(torch.randn(3, 1), torch.randn(1, 3, 1), torch.zeros(3).long())
    assert loss.item() == 0
    assert not grad.any()
    _, report = classroom_loss(
        *classroom(n_mentors=1, n_rows=1), return_report=True, knowledge_filter="none"
    )
    assert report.rank_weight.shape == (1,)
    assert 0 < report.rank_weight.item() < 1


def test_ruled_out_classes():
    """−inf equals a class that is not there, on either side and on both."""
    student, mentors, targets = classroom(n_classes=12).to(torch.float64)
    targets %= 10
    student[:, 10:] = mentors[:, :, 10:] = -torch.inf
    loss, grad = loss_and_grad(student, mentors, targets)
    fewer, fewer_grad = loss_and_grad(student[:, :10], mentors[:, :, :10], targets)
    torch.testing.assert_close(loss, fewer, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[:, :10], fewer_grad, rtol=1e-12, atol=1e-15)
    assert not grad[:, 10:].any()
    # Ruled out by the mentors alone, the student is still taught to forget it.
    student[:, 11] = 0.0
    loss, grad = loss_and_grad(student, mentors, targets)
    assert loss.isfinite()
    assert (grad[:, 11] > 0).any()


def test_a_target_everyone_rules_out():
    """0 · log 0 is 0: confidences of exactly 0 are equal ranks, and the task weighs nothing."""
    student, mentors, targets = classroom(n_rows=1).to(torch.float64)
    student[0, targets[0]] = mentors[:, 0, targets[0]] = -torch.inf
    loss, report = classroom_loss(student, mentors, targets, return_report=True)
    assert loss.isfinite()
    assert report.active_share.tolist() == [1.0] * 3
    assert report.rank_weight.tolist() == pytest.approx([3 / 4] * 3)
    assert classroom_loss(student, mentors, targets, task_weight=1.0) == torch.inf


def test_confidences_that_underflow():
    """exp(ℓ) is 0 for everyone, and the ranks are still right, since ℓ is what is compared."""
    student = torch.tensor([[-1e4, 1e4]], dtype=torch.float64)
    mentors = torch.tensor(
        [[[-1e4 + 1, 1e4]], [[-1e4 - 1, 1e4]], [[-1e4, 1e4]]], dtype=torch.float64
    )
    _, report = classroom_loss(student, mentors, torch.tensor([0]), return_report=True)
    assert report.active_share.tolist() == [1.0, 0.0, 1.0]
    e = math.e
    shares = [3 * x / (1 + e + 1 / e + 1) for x in (e, 1 / e, 1.0)]
    assert report.rank_weight.tolist() == pytest.approx(shares, rel=1e-9)
    assert report.temperature.tolist() == pytest.approx([1 + 12 * (1 - 1 / e)] * 2 + [1.0])
    single, _ = loss_and_grad(student.float(), mentors.float(), torch.tensor([0]))
    assert single.isfinite()


def test_one_hot_probabilities_are_indices():
    student, mentors, targets = classroom().to(torch.float64)
    one_hot = torch.nn.functional.one_hot(targets, 10).double()
    for name, options in OPTIONS.items():
        options = options | {"ignore_index": -100}
        expected, expected_grad = loss_and_grad(student, mentors, targets, **options)
        loss, grad = loss_and_grad(student, mentors, one_hot, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14, msg=name)


def test_a_sequence_is_a_stack():
    student, mentors, targets = classroom()
    torch.testing.assert_close(
        classroom_loss(student, list(mentors), targets), classroom_loss(student, mentors, targets)
    )


def test_half_precision_is_computed_in_float32():
    student, mentors, targets = classroom().to(torch.bfloat16)
    loss, grad = loss_and_grad(student, mentors, targets)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    expected, _ = loss_and_grad(student.float(), mentors.float(), targets)
    assert loss == expected


BAD = {
    "no mentor": ({"mentor_logits": []}, ValueError, "mentor_logits must hold at least one"),
    "empty stack": ({"mentor_logits": torch.zeros(0, 6, 10)}, ValueError, "M = 0"),
    "student 1-d": ({"student_logits": torch.zeros(6)}, ValueError, r"student_logits .* \[6\]"),
    "no class": ({"student_logits": torch.zeros(6, 0)}, ValueError, "at least one class"),
    "integer student": (
        {"student_logits": torch.zeros(6, 10).long()},
        TypeError,
        "student_logits must be float32, float16, bfloat16 or float64, got torch.int64",
    ),
    "integer mentor": (
        {"mentor_logits": [torch.zeros(6, 10).int()]},
        TypeError,
        r"mentor_logits\[0\] must be float32, .* or float64, got torch.int32",
    ),
    "eight bits": (
        {"mentor_weight": torch.ones(3).to(torch.float8_e4m3fn)},
        TypeError,
        "mentor_weight must be float32, .* or float64, got torch.float8_e4m3fn",
    ),
    "mentor shape": (
        {"mentor_logits": [torch.zeros(6, 10), torch.zeros(6, 9)]},
        ValueError,
        r"mentor_logits\[1\] must have the student's shape \[6, 10\], got \[6, 9\]",
    ),
    "stack shape": ({"mentor_logits": torch.zeros(6, 10)}, ValueError, r"\[M, B, C\]"),
    "mentor device": (
        {"mentor_logits": [torch.zeros(6, 10, device="meta")]},
        ValueError,
        r"mentor_logits\[0\] must be on the student's device cpu, got meta",
    ),
    "not tensors": ({"mentor_logits": 3}, TypeError, "got int"),
    "target length": ({"targets": torch.zeros(5).long()}, ValueError, r"targets .* \[6\]"),
    "target shape": ({"targets": torch.zeros(6, 9)}, ValueError, r"targets .* got \[6, 9\]"),
    "target dims": ({"targets": torch.zeros(6, 1, 1)}, ValueError, r"\[6\] .* or \[6, 10\]"),
    "float indices": ({"targets": torch.zeros(6)}, TypeError, "targets .* torch.float32"),
    "integer probabilities": ({"targets": torch.zeros(6, 10).long()}, TypeError, "torch.int64"),
    "class too large": ({"targets": torch.full((6,), 10)}, ValueError, "from 0 to 9 .* got 10"),
    "class negative": ({"targets": torch.full((6,), -1)}, ValueError, "got -1 in row 0"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
    "temperature large": ({"temperature": 20.1}, ValueError, "greater than 0 and at most 20, got"),
    "temperature NaN": ({"temperature": math.nan}, ValueError, "temperature must be finite"),
    "temperature text": ({"temperature": "4"}, TypeError, "temperature must be a number, got str"),
    "ranking": ({"ranking": "rows"}, ValueError, "ranking must be one of 'sample', 'batch'"),
    "filter": ({"knowledge_filter": "best"}, ValueError, "knowledge_filter must be one of"),
    "mentoring": ({"mentoring": None}, ValueError, "mentoring must be one of"),
    "weighting": ({"weighting": "x"}, ValueError, "weighting must be one of"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    "task weight": ({"task_weight": -1.0}, ValueError, "task_weight must not be negative"),
    "task word": ({"task_weight": "all"}, ValueError, "task_weight must be 'confidence' or"),
    "ignored": ({"ignore_index": 2**63}, ValueError, "ignore_index must fit 64 bits, got 9223"),
    "decimals": ({"rank_decimals": -1}, ValueError, "rank_decimals must be None or between"),
    "decimals float": ({"rank_decimals": 2.0}, TypeError, "rank_decimals must be an integer"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
    "mentor weight list": (
        {"mentor_weight": [1.0] * 3},
        TypeError,
        r"mentor_weight must be None, a number, 'auto' or a tensor .* got \[1.0, 1.0, 1.0\]",
    ),
    "mentor weight true": ({"mentor_weight": True}, TypeError, "mentor_weight must .* got True"),
    "mentor weight < 0": (
        {"mentor_weight": -0.5},
        ValueError,
        "mentor_weight .*negative, got -0.5",
    ),
    "mentor weight NaN": (
        {"mentor_weight": math.nan},
        ValueError,
        "mentor_weight .*finite, got nan",
    ),
    "mentor weight inf": (
        {"mentor_weight": math.inf},
        ValueError,
        "mentor_weight .*finite, got inf",
    ),
    "mentor weight word": (
        {"mentor_weight": "half"},
        ValueError,
        "mentor_weight must be a number or 'auto', got 'half'",
    ),
    "mentor weight": ({"mentor_weight": torch.ones(2)}, ValueError, r"mentor_weight .* \[3\]"),
}


@pytest.mark.parametrize(
    ("n_classes", "n_mentors", "weight"),
    [(2, 1, 0.5), (5, 2, 0.25), (100, 4, 0.125), (200, 4, 0.25), (1000, 5, 1.0), (1000, 10, 0.5)],
)
def test_the_automatic_mentor_weight(n_classes, n_mentors, weight):
    assert automatic_mentor_weight(n_classes, n_mentors) == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize("values", [{}, {"task_weight": 0.5}, {"mentor_weight": "auto"}])
def test_flat_options_come_back(values):
    options = LossOptions(ranking="batch", rank_decimals=2, label_smoothing=0.1, **values)
    again = LossOptions.of_flat(options.flat())
    assert again.mentor_weight_for(10, 3) == options.mentor_weight_for(10, 3)
    assert replace(again, mentor_weight=None) == replace(options, mentor_weight=None)


@pytest.mark.parametrize(
    "function", [classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad]
)
def test_signatures_have_every_option(function):
    """With the defaults of the options object; type checkers read a second list of them."""
    parameters = inspect.signature(function).parameters
    defaults = {field.name: field.default for field in fields(LossOptions)}
    assert {name: parameters[name].default for name in defaults} == defaults
    of_linear = inspect.signature(fused_linear_classroom_loss).parameters
    assert {name: of_linear[name].default for name in defaults} == defaults
    others = {"student_logits", "mentor_logits", "targets", "class_weight", "row_weight"}
    others |= {"process_group", "return_report"}
    assert {*parameters} - {*defaults, "scale"} == others
    assert {*OptionValues.__annotations__} == {*defaults} - {"mentor_weight"}


def test_options_are_made_once():
    values = {"temperature": 4.0, "ranking": "batch"}
    options, weights = loss_options(None, **values)
    assert loss_options(None, **values)[0] is options
    assert loss_options(torch.ones(3), **values)[0] is options
    assert options == LossOptions(**values)
    assert weights is None


@pytest.mark.parametrize("task_weight", [0.5, 0.0])
def test_task_and_mentors_add_up_to_the_loss(task_weight):
    student, mentors, targets = classroom().to(torch.float64)
    targets[1], student[1] = -100, torch.nan
    options = {"task_weight": task_weight, "mentor_weight": 0.3, "return_report": True}
    loss, report = classroom_loss(student, mentors, targets, **options)
    torch.testing.assert_close(task_weight * report.task_loss + report.mentor_loss, loss)
    rows, same = classroom_loss(student, mentors, targets, reduction="none", **options)
    assert torch.equal(same.mentor_loss, report.mentor_loss)
    if task_weight == 0:
        torch.testing.assert_close(rows.sum() / 5, report.mentor_loss)
    student[2, 3] = torch.nan
    assert classroom_loss(student, mentors, targets, **options)[1].mentor_loss.isnan()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    student, mentors, targets = classroom()
    arguments = {"student_logits": student, "mentor_logits": mentors, "targets": targets}
    with pytest.raises(error, match=message):
        classroom_loss(**arguments | changes)
