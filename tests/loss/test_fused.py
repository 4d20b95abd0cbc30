"""The kernels against the definition in float64: in Triton's interpreter, and on a GPU if there.

The bar: the kernel's relative error (in norm) may not exceed that of the definition on the same
inputs, computed like the kernel in float32, by more than a small margin.
"""

import itertools
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import library

from classroomkd import (
    ClassroomLoss,
    classroom_loss,
    fused_classroom_loss,
    fused_classroom_loss_and_grad,
)
from classroomkd.loss import fused
from classroomkd.loss.options import LossOptions
from classrooms import EXTREME_MAXIMA, OPTIONS, SOFT, Classroom, classroom, probabilities
from fused_cases import sweep
from tests.ptx import ptx_execution

launch = pytest.importorskip("classroomkd.kernels.launch", reason="needs Triton")
FUNCTIONS = (classroom_loss, fused_classroom_loss)
every_option = pytest.mark.parametrize(
    ("name", "soft"), [*((name, False) for name in OPTIONS), *((name, True) for name in SOFT)]
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Temperature multiplies the roundings of ℓ, so every batch has its own luck: over 40 batches the
# loss's mean error was 2.4e-7 for the kernel and 3.6e-7 for the definition, the largest 8e-7 and
# 1.7e-6; of KL_m alone the largest were 6e-6 and 5e-6.
MARGIN = {"loss": 3e-6, "kl": 1e-5}
OTHER_MARGIN = 1e-6


def evaluate(function, student, mentors, targets, **options):
    """Loss, gradient under a random upstream gradient, and report, in float64 on the CPU."""
    student = student.detach().clone().requires_grad_()
    loss, report = function(student, mentors, targets, return_report=True, **options)
    rng = torch.Generator().manual_seed(1)
    loss.backward(torch.randn(loss.shape, generator=rng).to(loss))
    return [value.detach().double().cpu() for value in (loss, student.grad, *report)]


def relative_error(value, truth):
    if not truth.norm() > 0:
        return value.norm().item()
    return ((value - truth).norm() / truth.norm()).item()


def assert_as_good_as_pytorch(batch: Classroom, device, **options):
    """Compare on one batch; mentors may be a list, dtypes mixed."""
    student, mentors, targets = batch
    truth = evaluate(
        classroom_loss,
        student.double(),
        [mentor.double() for mentor in mentors],
        targets,
        **options,
    )
    pytorch = evaluate(classroom_loss, student, mentors, targets, **options)
    if "mentor_weight" in options:
        options["mentor_weight"] = options["mentor_weight"].to(device)
    kernel = evaluate(
        fused_classroom_loss,
        student.to(device),
        [mentor.to(device) for mentor in mentors],
        targets.to(device),
        **options,
    )
    names = ("loss", "grad", *fused.ClassroomReport._fields)
    for name, got, same, exact in zip(names, kernel, pytorch, truth, strict=True):
        assert got.shape == exact.shape, name
        assert got.isfinite().all(), name
        margin = MARGIN.get(name, OTHER_MARGIN)
        if name == "grad" and student.dtype != torch.float32:
            # Rounded when the pass stores it and again when backward has scaled it.
            margin += torch.finfo(student.dtype).eps / 2
        error, allowed = relative_error(got, exact), relative_error(same, exact) + margin
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def kernels_ran(device, monkeypatch):
    """Fail a test whose calls all took the definition."""
    calls = []
    passes = fused.implementation(device.type)
    original = passes.classroom_loss_and_grad
    monkeypatch.setattr(
        passes, "classroom_loss_and_grad", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    yield
    assert calls


# Of five rows and so many classes, seeds by which a mentor is behind over the whole batch, every
# filter lets some mentors teach in some rows, and a target is the class ``ignore_index`` names.
WITH_ALL_KINDS = {10: 5, 37: 32}


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(device, name, soft):
    batch = classroom(n_rows=5, seed=WITH_ALL_KINDS[10])
    if soft:
        batch = batch._replace(targets=probabilities(*batch.student.shape))
    assert_as_good_as_pytorch(batch, device, **OPTIONS[name])


# 1: the shortest rows; 10, 16: several rows a warp, one of them exactly full; 100: one row a
# warp; 127, 129: either side of a block; 1000: several warps a row; 9000: tiles, also for M = 1
# twice the last single pass, and few rows, which the interpreter takes one after another.
@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize(
    ("n_classes", "n_mentors"),
    [*itertools.product([1, 10, 16, 100, 127, 129, 1000, 9000], [1, 6])],
)
def test_sizes(device, n_classes, n_mentors):
    # Of fewer rows the errors, PyTorch's as well, are luck.
    batch = classroom(n_mentors, 2 if (n_classes, n_mentors) == (9000, 6) else 5, n_classes)
    assert_as_good_as_pytorch(batch, device)
    assert_as_good_as_pytorch(batch, device, ranking="batch", rank_decimals=2)


# The sweeps over tiles at sizes where the single pass would serve too: less than a tile, one, some.
@pytest.mark.usefixtures("kernels_ran")
@every_option
def test_every_option_tiled(device, monkeypatch, name, soft):
    sweep(monkeypatch, 32)
    batch = classroom(3, 5, 37, seed=WITH_ALL_KINDS[37])
    if soft:
        batch = batch._replace(targets=probabilities(*batch.student.shape))
    assert_as_good_as_pytorch(batch, device, **OPTIONS[name])


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize("n_classes", [32, 80, 96])
def test_tiles_and_extremes(device, monkeypatch, n_classes):
    """Tiles in which every class is ruled out, first, in the middle and last; large logits."""
    sweep(monkeypatch, 32)
    student, mentors, targets = classroom(n_mentors=2, n_rows=3, n_classes=n_classes)
    targets %= 32
    for row in range(3):
        targets[row] = (targets[row] + 32 * row) % n_classes
        out = torch.arange(n_classes) // 32 != targets[row] // 32
        student[row, out] = mentors[:, row, out] = -torch.inf
    loss, grad, *_ = same_as_definition(student, mentors, targets, device)
    assert loss.isfinite()
    assert grad.isfinite().all()
    same_as_definition(student * 3000, mentors * 3000, targets, device)
    student[1] = -torch.inf
    loss, grad, *_ = same_as_definition(student, mentors, targets, device, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.ptx
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("n_mentors", [1, 13])
def test_probabilities_that_are_no_numbers_read_nothing_beyond_the_row(n_mentors, value):
    """The class of the largest, whose logits the filter asks for, is inside the row even then."""
    student, mentors, _ = classroom(n_mentors, 2, 136)
    mentors = [mentor.clone() for mentor in mentors]  # each in memory of its own
    targets = probabilities(2, 136)
    targets[1] = value
    with ptx_execution() as run:
        loss = fused_classroom_loss(
            student, mentors, targets, knowledge_filter="correct", reduction="none"
        )
    assert not run.findings
    assert loss.isfinite().tolist() == [True, False]


@pytest.mark.usefixtures("kernels_ran")
def test_a_mentor_that_sits_out_in_steps(device, monkeypatch):
    """Its row is not read, and what stands for it must not become 0 · ∞."""
    sweep(monkeypatch, 32)
    student, mentors, targets = classroom(n_mentors=2, n_rows=3, n_classes=70)
    mentors[0] -= 3000
    mentors[0, torch.arange(3), targets] -= 100
    _, grad, report = same_as_definition(student, mentors, targets, device)[:3]
    assert grad.isfinite().all()
    assert report[0] == 0


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize("n_classes", [50, 150, 600])
@pytest.mark.parametrize("n_mentors", [12, 13, 16])
def test_many_mentors(device, n_mentors, n_classes):
    assert_as_good_as_pytorch(classroom(n_mentors, 4, n_classes), device)


@pytest.mark.usefixtures("kernels_ran")
@every_option
def test_every_option_with_many_mentors(device, name, soft):
    """Swept rows of all networks in one tile, in two steps, the last incomplete."""
    batch = classroom(13, 5, 530)
    if soft:
        batch = batch._replace(targets=probabilities(*batch.student.shape))
    assert_as_good_as_pytorch(batch, device, **OPTIONS[name])


@pytest.mark.parametrize(
    ("value", "number", "tiled"),
    [
        *((0.3, 0.3, False), (2, 2.0, False), (0, 0.0, False), ("auto", 1 / 6, False)),
        *((0.3, 0.3, True), ("auto", 1 / 6, True)),
    ],
)
def test_a_mentor_weight_for_all(device, monkeypatch, value, number, tiled):
    """As the definition in float64 with that number for each of the three mentors."""
    if tiled:
        sweep(monkeypatch, 32)
    batch = classroom()
    exact = Classroom(batch.student.double(), batch.mentors.double(), batch.targets)
    weights = torch.full((3,), number, dtype=torch.float64)
    expected = evaluate(classroom_loss, *exact, mentor_weight=weights)
    same = evaluate(classroom_loss, *exact, mentor_weight=value)
    torch.testing.assert_close(same, expected, rtol=1e-14, atol=1e-16)
    got = evaluate(fused_classroom_loss, *batch.to(device), mentor_weight=value)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    loss, grad = fused_classroom_loss_and_grad(*batch.to(device), mentor_weight=value)
    student = exact.student.requires_grad_()
    truth = classroom_loss(student, *exact[1:], mentor_weight=weights)
    torch.testing.assert_close(loss.double().cpu(), truth.detach(), rtol=1e-5, atol=0)
    (truth,) = torch.autograd.grad(truth, student)
    torch.testing.assert_close(grad.double().cpu(), truth, rtol=2e-5, atol=2e-6)


def test_a_mentor_weight_of_one_changes_no_bit(device):
    batch = classroom().to(device)
    for function in (fused_classroom_loss_and_grad, partial(evaluate, classroom_loss)):
        one, none = (function(*batch, mentor_weight=weight) for weight in (1.0, None))
        assert all(map(torch.equal, one, none))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_target_dtypes(device, dtype):
    student, mentors, targets = classroom().to(device)
    expected = fused_classroom_loss(student, mentors, targets)
    assert torch.equal(fused_classroom_loss(student, mentors, targets.to(dtype)), expected)
    loss, _ = fused_classroom_loss_and_grad(student, mentors, targets.to(dtype))
    assert torch.equal(loss, expected)


def test_mentor_weight_of_any_stride_and_dtype(device):
    student, mentors, targets = classroom().to(device)
    weight = torch.tensor([[0.3, 9.0], [1.0, 9.0], [2.0, 9.0]], device=device)
    expected = fused_classroom_loss(
        student, mentors, targets, mentor_weight=weight[:, 0].contiguous()
    )
    for same in (weight[:, 0], weight[:, 0].double()):
        assert torch.equal(
            fused_classroom_loss(student, mentors, targets, mentor_weight=same), expected
        )


@pytest.mark.parametrize("n_rows", [0, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_row(device, n_rows, reduction):
    student, mentors, _ = classroom(n_rows=n_rows).to(device)
    student.requires_grad_()
    targets = torch.full((n_rows,), -100, device=device)
    for function, ranking in itertools.product(FUNCTIONS, ("sample", "batch")):
        loss, report = function(
            student, mentors, targets, ranking=ranking, reduction=reduction, return_report=True
        )
        assert loss.shape == ((n_rows,) if reduction == "none" else ())
        assert not loss.any()
        assert not any(value.any() for value in report)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert grad.shape == student.shape
        assert not grad.any()


def same_as_definition(student, mentors, targets, device, rtol=1e-5, **options):
    """Compare in float32, NaN and inf included."""
    results = []
    for function, place in ((classroom_loss, "cpu"), (fused_classroom_loss, device)):
        z = student.to(place, copy=True).requires_grad_()
        loss, report = function(
            z, mentors.to(place), targets.to(place), return_report=True, **options
        )
        loss.sum().backward()
        results.append([value.detach().cpu() for value in (loss, z.grad, *report)])
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-6, equal_nan=True)
    return results[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("who", ["student", "mentor"])
@pytest.mark.parametrize("ranking", ["sample", "batch"])
def test_a_nonfinite_row_is_nan(device, ranking, who, value):
    student, mentors, targets = classroom()
    (student if who == "student" else mentors[1])[2, 7] = value
    for function, knowledge_filter in itertools.product(FUNCTIONS, ("better", "correct", "none")):
        z = student.to(device, copy=True).requires_grad_()
        loss = function(
            z,
            mentors.to(device),
            targets.to(device),
            ranking=ranking,
            knowledge_filter=knowledge_filter,
            task_weight=0.0,
            reduction="none",
        )
        loss.sum().backward()
        expected = torch.full((6,), True) if ranking == "batch" else torch.arange(6) == 2
        assert loss.isnan().tolist() == expected.tolist()
        assert z.grad.isnan().all(1).tolist() == expected.tolist()
        assert z.grad.isnan().any(1).tolist() == expected.tolist()


def test_ruled_out_classes(device):
    student, mentors, targets = classroom(n_classes=12)
    targets %= 10
    mentors[:, :, 10:] = -torch.inf
    student[:, 11] = -torch.inf
    loss, grad, *_ = same_as_definition(student, mentors, targets, device)
    assert loss.isfinite()
    assert grad.isfinite().all()
    # A class that the student alone rules out while a mentor believes in it: infinitely wrong.
    mentors[:, :, 11] = 0.0
    loss, *_ = same_as_definition(student, mentors, targets, device, knowledge_filter="none")
    assert loss == torch.inf


def test_a_target_everyone_rules_out(device):
    student, mentors, targets = classroom(n_rows=1)
    student[0, targets[0]] = mentors[:, 0, targets[0]] = -torch.inf
    loss, *_ = same_as_definition(student, mentors, targets, device)
    assert loss.isfinite()
    loss, *_ = same_as_definition(student, mentors, targets, device, task_weight=1.0)
    assert loss == torch.inf


def test_confidences_that_underflow(device):
    """Logits of ±10⁴: every exp(ℓ) is 0 and ranks, temperatures and KL are still right."""
    student = torch.tensor([[-1e4, 1e4, 3.0], [1e4, -1e4, 3.0]])
    mentors = torch.stack([student + torch.tensor([d, 0.0, 1.0]) for d in (1.0, -1.0, 0.0)])
    batch = Classroom(student, mentors, torch.tensor([0, 1]))
    assert_as_good_as_pytorch(batch, device)
    same_as_definition(*batch, device, knowledge_filter="none")


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize("mentoring", ["adaptive", "fixed", "dtkd"])
@pytest.mark.parametrize(("n_rows", "n_classes"), [(64, 2), (16, 10), (2, 1000), (1, 5000)])
def test_the_kernels_bear_every_temperature(device, n_rows, n_classes, mentoring):
    """As the definition does in ``test_definition.py``."""
    for scale, temperature in ((0.01, 20.0), (1.0, 20.0), (10.0, 20.0), (1.0, 1e-45)):
        student, mentors, targets = classroom(1, n_rows, n_classes, scale=scale)
        for mentor in (mentors[0], torch.nextafter(student, torch.zeros(()))):
            options = {
                "temperature": temperature,
                "mentoring": mentoring,
                "knowledge_filter": "none",
                "weighting": "uniform",
                "task_weight": 0.0,
                "reduction": "none",
            }
            exact = classroom_loss(student.double(), [mentor.double()], targets, **options)
            loss = fused_classroom_loss(
                student.to(device), [mentor.to(device)], targets.to(device), **options
            ).cpu()
            assert (loss >= 0).all()
            assert ((loss - exact).abs() <= 1e-3 * exact.clamp_min(1.0)).all()


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize(("x_s", "x_m"), EXTREME_MAXIMA)
def test_dtkd_of_extreme_maxima(device, x_s, x_m):
    student, mentor = torch.tensor([[x_s, -1.0, -2.0]]), torch.tensor([[x_m, -3.0, -1.0]])
    options = {"mentoring": "dtkd", "knowledge_filter": "none"}
    truth = student.double().requires_grad_()
    exact = classroom_loss(truth, [mentor.double()], torch.tensor([0]), **options)
    exact.backward()
    student, mentor, targets = (t.to(device) for t in (student, mentor, torch.tensor([0])))
    for function in FUNCTIONS:
        z = student.clone().requires_grad_()
        loss = function(z, [mentor], targets, **options)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        loss.backward()  # NaN, were a temperature 0
        torch.testing.assert_close(z.grad.cpu().double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels_ran")
@pytest.mark.parametrize("tiled", [False, True], ids=["one pass", "tiled"])
@pytest.mark.parametrize("mentoring", ["adaptive", "fixed", "none", "dtkd"])
def test_logits_near_the_largest_float(device, monkeypatch, mentoring, tiled):
    """Their differences overflow to inf; neither loss nor gradient becomes NaN."""
    if tiled:
        sweep(monkeypatch, 32)
    rng = torch.Generator().manual_seed(0)
    values = torch.tensor([3e38, -3e38, 1e38, 1.0, 2.0, 1e-30])
    n_rows = 6 if tiled else 12  # the interpreter takes a row after another in tiles
    n_classes = 40 if tiled else 9
    drawn = torch.randint(len(values), (4, n_rows, n_classes), generator=rng)
    student, *mentors = values[drawn]
    student[:2] = values[3:][drawn[0, :2] % 3]  # beside students as they should be
    indices, soft = torch.arange(n_rows) % n_classes, probabilities(n_rows, n_classes)
    calls = [(indices, "sample"), (soft, "batch")]
    if not tiled:
        calls += [(indices, "batch"), (soft, "sample")]
    for targets, ranking in calls:
        results = []
        for function, place in ((classroom_loss, "cpu"), (fused_classroom_loss, device)):
            z = student.to(place, copy=True).requires_grad_()
            loss = function(
                z,
                [mentor.to(place) for mentor in mentors],
                targets.to(place),
                mentoring=mentoring,
                ranking=ranking,
                temperature=0.5,
                knowledge_filter="none",
                reduction="none",
            )
            loss.sum().backward()
            # Just below the largest number one may overflow where the other does not.
            results.append((loss.detach().cpu().clamp_max(1e37), z.grad.cpu()))
        for loss, grad in results:
            assert not loss.isnan().any()
            assert grad.isfinite().all()
            assert (loss >= 0).all()
        assert (results[0][0] < 1e37).any()
        if tiled and targets.dim() == 2:
            continue  # a sum of differences from several maxima, of which none overflows
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_exact_ties(device):
    student, mentors, targets = classroom()
    mentors[1] = student
    mentors[2] = mentors[0]
    _, _, *report = same_as_definition(student, mentors, targets, device)
    assert report[0][1] == 1.0  # an equal of the student teaches
    assert report[2][1] == 1.0
    assert report[0][0] == report[0][2]
    top = torch.zeros(1, 3)
    mentors = torch.tensor([[[2.0, 2.0, 0.0]], [[1.0, 2.0, 0.0]]])
    _, _, share, *_ = same_as_definition(
        top, mentors, torch.tensor([0]), device, knowledge_filter="correct"
    )
    assert share.tolist() == [1.0, 0.0]


def test_class_indices_out_of_range(device):
    student, mentors, targets = classroom(n_rows=4).to(device)
    targets[:3] = torch.tensor([10, -1, 2**32 + 1])
    if device.type == "cpu":  # the definition says so, and so does the CPU's pass
        for function in (classroom_loss, fused_classroom_loss)[: 1 + (not fused._INTERPRET)]:
            for ranking in ("sample", "batch"):
                with pytest.raises(ValueError, match="got 10 in row 0"):
                    function(student, mentors, targets, ranking=ranking)
        if not fused._INTERPRET:
            return
    student.requires_grad_()
    loss = fused_classroom_loss(student, mentors, targets, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, True, True, False]
    assert student.grad.isnan().all(1).tolist() == [True, True, True, False]


def test_inputs_are_not_written_to(device):
    batch = classroom().to(device)
    copies = [tensor.clone() for tensor in batch]
    student = batch.student.requires_grad_()
    fused_classroom_loss(student, batch.mentors, batch.targets).backward()
    for tensor, copy in zip(batch, copies, strict=True):
        assert torch.equal(tensor.detach(), copy)


def test_upstream_gradients(device):
    student, mentors, targets = classroom().to(device)
    student.requires_grad_()
    rows = fused_classroom_loss(student, mentors, targets, reduction="none")
    (unit,) = torch.autograd.grad(rows.sum(), student, retain_graph=True)
    (again,) = torch.autograd.grad(rows.sum(), student, retain_graph=True)
    assert torch.equal(unit, again)
    factor = torch.tensor([[1.5, 9.0], [-2.0, 9.0], [0.0, 9.0]] * 2, device=device)[:, 0]
    (grad,) = torch.autograd.grad(rows, student, factor, retain_graph=True)
    torch.testing.assert_close(grad, unit * factor[:, None], rtol=1e-6, atol=0)
    mean = fused_classroom_loss(student, mentors, targets)
    (grad,) = torch.autograd.grad(mean * -3.0, student)
    torch.testing.assert_close(grad, unit * (-3.0 / 6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["defaults", "released", "sum", "smoothed", "task_weight"])
@pytest.mark.parametrize("n_rows", [1, 7, 9])
def test_loss_and_grad(device, name, n_rows):
    """The same numbers as through autograd."""
    student, mentors, targets = classroom(n_rows=n_rows).to(device)
    targets[n_rows // 2 + 1 :: 3] = -100
    options = OPTIONS[name]
    z = student.clone().requires_grad_()
    expected, expected_report = fused_classroom_loss(
        z, mentors, targets, return_report=True, **options
    )
    expected.backward()
    loss, grad, report = fused_classroom_loss_and_grad(
        student, mentors, targets, return_report=True, **options
    )
    assert torch.equal(loss, expected.detach())
    torch.testing.assert_close(grad, z.grad, rtol=1e-6, atol=1e-9)
    assert all(map(torch.equal, report, expected_report))
    assert not grad.requires_grad
    scale = torch.tensor([1024.0], device=device)
    scaled = fused_classroom_loss_and_grad(
        student, mentors, targets, return_report=True, scale=scale, **options
    )
    assert torch.equal(scaled[0], loss)
    torch.testing.assert_close(scaled[1], grad * 1024.0, rtol=1e-6, atol=0)
    # Without a report the rows' losses are summed in another order.
    alone = fused_classroom_loss_and_grad(student, mentors, targets, **options)
    assert torch.equal(alone[0], fused_classroom_loss(student, mentors, targets, **options))
    torch.testing.assert_close(alone[0], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(alone[1], grad, rtol=1e-6, atol=1e-9)


def test_loss_and_grad_by_definition():
    """In float64, which no fused pass takes; and what both ways refuse."""
    student, mentors, targets = classroom().to(torch.float64)
    z = student.clone().requires_grad_()
    expected, expected_report = classroom_loss(z, mentors, targets, return_report=True)
    expected.backward()
    scale = torch.tensor(2.0)
    with torch.no_grad():
        loss, grad, report = fused_classroom_loss_and_grad(
            student, mentors, targets, scale=scale, return_report=True
        )
    assert torch.equal(loss, expected.detach())
    assert torch.equal(grad, z.grad * 2)
    assert all(map(torch.equal, report, expected_report))
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        fused_classroom_loss_and_grad(student, mentors, targets, reduction="none")
    with pytest.raises(ValueError, match="scale must be a tensor of one number"):
        fused_classroom_loss_and_grad(student, mentors, targets, scale=2.0)
    with pytest.raises(ValueError, match="scale must be on the student's device cpu, got meta"):
        fused_classroom_loss_and_grad(student, mentors, targets, scale=scale.to("meta"))
    # A gradient scaler's usual scale, beyond float16 itself; the gradient is rounded only then.
    half = fused_classroom_loss_and_grad(
        student.half(), mentors, targets, scale=torch.tensor(65536.0), reduction="mean"
    )[1]
    z = student.half().double().requires_grad_()
    classroom_loss(z, mentors, targets).backward()
    torch.testing.assert_close(half, (z.grad * 65536.0).half(), rtol=0, atol=0)


def test_a_second_derivative_raises(device):
    student, mentors, targets = classroom().to(device)
    student.requires_grad_()
    for function in (fused_classroom_loss, classroom_loss):
        loss = function(student, mentors, targets)
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        # Also where another path leads to the student, on which a silent 0 would not be seen.
        penalty = grad.square().sum() + student.square().sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(penalty, student)


def test_gradients_reach_the_student_only(device):
    student, mentors, targets = classroom().to(device)
    mentors.requires_grad_()
    weight = torch.ones(3, device=device, requires_grad=True)
    loss, report = fused_classroom_loss(
        student.requires_grad_(), mentors, targets, mentor_weight=weight, return_report=True
    )
    loss.backward()
    assert mentors.grad is None
    assert weight.grad is None
    assert not any(value.requires_grad for value in report)
    assert student.grad is not None


def test_without_gradient(device):
    student, mentors, targets = classroom().to(device)
    expected = fused_classroom_loss(student.requires_grad_(), mentors, targets).detach()
    with torch.no_grad():
        assert torch.equal(fused_classroom_loss(student, mentors, targets), expected)
    with torch.inference_mode():
        assert torch.equal(fused_classroom_loss(student, mentors, targets), expected)
    assert not fused_classroom_loss(student.detach(), mentors, targets).requires_grad


@pytest.mark.parametrize("layout", ["rows", "dense in place", "dense rows"])
def test_operator_contract(device, layout):
    """What fake tensors promise, strides too."""
    student, mentors, targets = classroom().to(device)
    if layout != "rows":
        student, mentors = (z.unflatten(-2, (2, 3)).transpose(-2, -1) for z in (student, mentors))
    if layout == "dense in place":
        student, mentors = student.contiguous(), mentors.contiguous()
    rows = torch.rand(6, device=device)
    weight = torch.ones(3, device=device)
    operators = torch.ops.classroomkd
    flat = LossOptions(ranking="batch", mentor_weight=0.5).flat()
    sums = operators.confidence_sums(student, list(mentors), targets, *flat)
    library.opcheck(
        torch.ops.classroomkd.confidence_sums.default, (student, list(mentors), targets, *flat)
    )
    # Strides do not depend on the reduction.
    others = [("sum", False), ("none", True)] if layout == "rows" else []
    for reduction, with_report in (("mean", True), *others):
        inputs = (student.clone().requires_grad_(), list(mentors), targets, rows, weight, sums)
        flat = LossOptions(ranking="batch", mentor_weight="auto", reduction=reduction).flat()
        library.opcheck(torch.ops.classroomkd.loss.default, (*inputs, True, with_report, *flat))
    inputs = (student, list(mentors), targets, rows, None, None)
    scale = torch.tensor(2.0, device=device)
    flat = LossOptions(task_weight=0.5, rank_decimals=2).flat()
    library.opcheck(torch.ops.classroomkd.loss_and_grad.default, (*inputs, scale, True, *flat))
    library.opcheck(operators.scale_rows.default, (student, scale, None, scale))
    library.opcheck(operators.scale_rows.default, (student, rows, rows, scale))


def test_module(device):
    student, mentors, targets = classroom().to(device)
    loss_fn = ClassroomLoss(temperature=4.0, knowledge_filter="none", mentor_weight=[1.0, 0.5, 2])
    loss_fn = loss_fn.to(device)
    expected = fused_classroom_loss(
        student,
        mentors,
        targets,
        temperature=4.0,
        knowledge_filter="none",
        mentor_weight=torch.tensor([1.0, 0.5, 2.0], device=device),
    )
    assert torch.equal(loss_fn(student, mentors, targets), expected)
    loss, report = loss_fn(student, list(mentors), targets, return_report=True)
    # With a report the rows' losses are summed beside its numbers, in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert report.kl.shape == (3,)
    assert "mentor_weight" in loss_fn.state_dict()
    assert "temperature=4.0" in repr(loss_fn)
    for value in (0.3, "auto"):
        loss_fn = ClassroomLoss(mentor_weight=value)
        expected = fused_classroom_loss(student, mentors, targets, mentor_weight=value)
        assert torch.equal(loss_fn(student, mentors, targets), expected)
        assert not loss_fn.state_dict()
    for value in (-1.0, torch.nan):
        with pytest.raises(ValueError, match=f"finite and not negative, got {value} at index 1"):
            ClassroomLoss(mentor_weight=[1.0, value])
    with pytest.raises(ValueError, match="mentor_weight must be a number or 'auto', got 'half'"):
        ClassroomLoss(mentor_weight="half")
    with pytest.raises(ValueError, match="ranking must be one of"):
        ClassroomLoss(ranking="rows")
    with pytest.raises(TypeError, match="temprature"):
        ClassroomLoss(temprature=4.0)


def test_limits_are_named(device):
    student, mentors, targets = classroom().to(device)
    if fused.implementation(device.type) is not launch:  # the CPU's pass has none
        many = [*mentors] * 6
        torch.testing.assert_close(
            fused_classroom_loss(student, many, targets), classroom_loss(student, many, targets)
        )
        return
    with pytest.raises(TypeError, match=r"student_logits must be float32.*float64; classroom_loss"):
        fused_classroom_loss(student.double(), mentors, targets)
    with pytest.raises(ValueError, match="at most 16 mentors for the kernels, got 17"):
        fused_classroom_loss(student, [mentors[0]] * 17, targets)
    wide = torch.zeros(1, 262_145, device=device)
    with pytest.raises(ValueError, match="at most 262,144 classes for the kernels, got 262,145"):
        fused_classroom_loss(wide, [wide], targets[:1])


@pytest.mark.parametrize(
    ("version", "serves"), [("3.3.0", True), ("3.10.1", True), ("3.2.0", False), (None, False)]
)
def test_without_a_fit_triton_the_definition_serves(monkeypatch, version, serves):
    monkeypatch.setattr(fused, "_obstacles", [])
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr("triton.__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert [fused._use_kernels("cuda") for _ in range(2)] == [serves, serves]
    assert len(caught) == (not serves)


def test_environment_variable_chooses_the_interpreter():
    """In a fresh process, as a user would."""
    program = (
        "import torch, classroomkd; z = torch.zeros(2, 3);"
        "targets = torch.tensor([0, 7]);"  # out of range: the kernel makes it NaN, nobody raises
        "print(classroomkd.fused_classroom_loss(z, [z], targets, reduction='none').tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("nan]")
