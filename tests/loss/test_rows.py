"""Dense outputs, and weights of classes and rows."""

import pytest
import torch
from torch.nn import functional as F

from classroomkd import (
    ClassroomLoss,
    classroom_loss,
    fused_classroom_loss,
    fused_classroom_loss_and_grad,
)
from classroomkd.loss import cpu_pass, fused
from classrooms import classroom, probabilities

FUNCTIONS = (classroom_loss, fused_classroom_loss)
TASK_ONLY = {"task_weight": 1.0, "mentor_weight": 0.0}


def dense(n_mentors=2, shape=(2, 5, 3, 4), seed=0):
    """Logits [B, C, d₁, …] of student and mentors, and class indices with some rows ignored."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1 + n_mentors, *shape, generator=rng)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng)
    targets.view(-1)[::5] = -100
    return logits[0], logits[1:], targets


def as_rows(logits):
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_every_position_is_a_row(device, kind, memory, reduction):
    student, mentors, targets = (value.to(device) for value in dense())
    if kind == "probabilities":
        targets = torch.softmax(mentors[0], 1)
    if memory == "channels last":
        student = student.to(memory_format=torch.channels_last)
        mentors = [mentor.to(memory_format=torch.channels_last) for mentor in mentors]
    z, rows = student.clone().requires_grad_(), as_rows(student).requires_grad_()
    flat_targets = as_rows(targets) if kind == "probabilities" else targets.reshape(-1)
    options = {"reduction": reduction, "return_report": True}
    in_place = memory == "contiguous" and fused.implementation(device.type) is not cpu_pass
    for function in FUNCTIONS:
        # Kernels that read positions in place add up in another order.
        other_order = in_place and function is fused_classroom_loss
        close = {"rtol": 1e-5, "atol": 1e-6} if other_order else {"rtol": 0, "atol": 0}
        loss, report = function(z, mentors, targets, **options)
        expected, expected_report = function(
            rows, [*map(as_rows, mentors)], flat_targets, **options
        )
        assert loss.shape == ((2, 3, 4) if reduction == "none" else ())
        torch.testing.assert_close(loss.reshape(-1), expected.reshape(-1), **close)
        torch.testing.assert_close([*report], [*expected_report], **close)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(as_rows(z.grad), rows.grad, **close)
        z.grad = rows.grad = None


def test_dense_loss_and_grad(device):
    student, mentors, targets = (value.to(device) for value in dense())
    z = student.clone().requires_grad_()
    fused_classroom_loss(z, mentors, targets).backward()
    loss, grad = fused_classroom_loss_and_grad(student, mentors, targets)
    assert grad.shape == student.shape
    torch.testing.assert_close(grad, z.grad, rtol=1e-6, atol=1e-9)
    assert loss.dim() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 7), (2, 5, 3, 4)])
def test_class_weight_as_in_cross_entropy(device, shape, reduction):
    """The task's part alone, whose truth is PyTorch's."""
    student, mentors, targets = (value.to(device) for value in dense(shape=shape))
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0], device=device)
    z, same = student.clone().requires_grad_(), student.double().requires_grad_()
    expected = F.cross_entropy(same, targets, weight.double(), reduction=reduction)
    for function in FUNCTIONS:
        loss = function(z, mentors, targets, class_weight=weight, reduction=reduction, **TASK_ONLY)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        loss.sum().backward()
        (truth,) = torch.autograd.grad(expected.sum(), same, retain_graph=True)
        torch.testing.assert_close(z.grad.double(), truth, rtol=1e-5, atol=1e-7)
        z.grad = None


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_weights_by_definition(device, kind, options):
    """Each row's loss times its weight; the mean over the weights' sum; the same both ways."""
    student, mentors, targets = classroom(n_rows=9).to(device)
    of_class = torch.rand(10, device=device) + 0.5
    row = torch.rand(9, device=device)
    if kind == "probabilities":
        targets = probabilities(9, 10).to(device)
        weight = row * (targets @ of_class)
    else:
        targets[4] = -100
        weight = row * torch.where(targets < 0, 0, of_class[targets.clamp_min(0)])
    weights = {"class_weight": of_class, "row_weight": row}
    z = student.double().requires_grad_()
    losses, expected_report = classroom_loss(
        z, mentors.double(), targets, reduction="none", return_report=True
    )
    expected = (losses * weight).sum() / (1 if options else weight.sum())
    expected.backward()
    for function in FUNCTIONS:
        z32 = student.clone().requires_grad_()
        loss, report = function(z32, mentors, targets, **weights, **options, return_report=True)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(z32.grad.double(), z.grad, rtol=1e-4, atol=1e-6)
        for ours, truth in zip(report, expected_report, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)
    scale = torch.tensor(64.0, device=device)
    loss, grad = fused_classroom_loss_and_grad(
        student, mentors, targets, **weights, **options, scale=scale
    )
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), 64 * z.grad, rtol=1e-4, atol=1e-5)
    module = ClassroomLoss(class_weight=of_class.tolist(), **options).to(device)
    torch.testing.assert_close(module(student, mentors, targets, row_weight=row), loss)


def test_a_row_of_weight_two_counts_twice(device):
    student, mentors, targets = classroom(n_rows=5).to(device)
    twice = torch.tensor([0, 1, 1, 2, 3, 4], device=device)
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], device=device)
    for function in FUNCTIONS:
        loss = function(student, mentors, targets, row_weight=weight)
        expected = function(student[twice], mentors[:, twice], targets[twice])
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_no_weight_to_share(device):
    student, mentors, targets = classroom().to(device)
    z = student.clone().requires_grad_()
    for function in FUNCTIONS:
        loss = function(z, mentors, targets, row_weight=torch.zeros(6, device=device))
        loss.backward()
        assert loss == 0
        assert not z.grad.any()


# Beyond 512 rows programs count the valid ones together.
@pytest.mark.parametrize(
    ("n_rows", "functions"),
    [(9, (*FUNCTIONS, fused_classroom_loss_and_grad)), (520, [fused_classroom_loss_and_grad])],
)
def test_what_an_ignored_row_weighs(device, n_rows, functions):
    """Nothing, whatever it is given; and of other rows a weight that is NaN is seen."""
    student, mentors, targets = classroom(1, n_rows, 2).to(device)
    weight = torch.rand(n_rows, device=device)
    targets[[2, 5]] = -100
    for function in functions:
        expected = _results(function, student, mentors, targets, weight)
        odd = weight.clone()
        odd[2], odd[5] = torch.inf, torch.nan
        results = _results(function, student, mentors, targets, odd)
        assert all(map(torch.equal, results, expected))
        odd[3] = torch.nan
        loss, grad = _results(function, student, mentors, targets, odd)
        assert loss.isnan()
        assert grad[3].isnan().all()


def _results(function, student, mentors, targets, weight):
    """Loss and gradient."""
    z = student.clone().requires_grad_()
    result = function(z, mentors, targets, row_weight=weight)
    if isinstance(result, tuple):
        return result
    result.backward()
    return result.detach(), z.grad


def test_weights_are_the_launch_s(device, monkeypatch):
    """No second pass over the gradient."""
    launch = pytest.importorskip("classroomkd.kernels.launch")
    if fused.implementation(device.type) is not launch:
        pytest.skip("no launch")
    started, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda *how: started.append(how) or start(*how))
    student, mentors, targets = classroom().to(device)
    weights = {"class_weight": torch.rand(10), "row_weight": torch.rand(6)}
    weights = {name: weight.to(device) for name, weight in weights.items()}
    fused_classroom_loss_and_grad(student, mentors, targets, **weights)
    assert len(started) == 1


def test_weights_in_float64_and_compiled():
    """By definition, and in one graph, on the CPU."""
    student, mentors, targets = classroom()
    weights = {"class_weight": torch.rand(10), "row_weight": torch.rand(6)}
    torch._dynamo.reset()
    for function in (fused_classroom_loss, fused_classroom_loss_and_grad):
        fast = torch.compile(function, fullgraph=True, backend="aot_eager")
        for dtype in (torch.float32, torch.float64):
            batch = (student.to(dtype), mentors.to(dtype), targets)
            torch.testing.assert_close(fast(*batch, **weights), function(*batch, **weights))


def test_what_is_refused():
    student, mentors, targets = dense()
    with pytest.raises(ValueError, match=r"class_weight must have shape \[5\], got \[4\]"):
        classroom_loss(student, mentors, targets, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"row_weight must have shape \[2, 3, 4\], got \[2\]"):
        classroom_loss(student, mentors, targets, row_weight=torch.ones(2))
    with pytest.raises(TypeError, match=r"row_weight must be float32, .* got torch.int64"):
        classroom_loss(student, mentors, targets, row_weight=targets)
    with pytest.raises(TypeError, match=r"class_weight must be a tensor of shape \[5\], got list"):
        classroom_loss(student, mentors, targets, class_weight=[1.0] * 5)
    with pytest.raises(ValueError, match=r"targets must have shape \[2, 3, 4\] .class indices."):
        classroom_loss(student, mentors, targets[:, 0])
    with pytest.raises(ValueError, match=r"got \[2, 5, 3\]; if the last dimension .* flatten"):
        classroom_loss(student, mentors, torch.zeros(2, 5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class_weight must be finite and not negative, got -1"):
        ClassroomLoss(class_weight=[1.0, -1.0])


@pytest.mark.parametrize("ranking", ["sample", "batch"])
def test_what_each_mentor_did_with_each_row(device, ranking):
    """Its means over the valid rows are the report's."""
    student, mentors, targets = (value.to(device) for value in dense())
    options = {"ranking": ranking, "knowledge_filter": "correct_and_better"}
    valid = (targets != -100).expand(2, -1, -1, -1)
    for function in (*FUNCTIONS, fused_classroom_loss_and_grad):
        *values, means = function(student, mentors, targets, return_report=True, **options)
        *same, rows = function(student, mentors, targets, return_report="rows", **options)
        for ours, theirs in zip(same, values, strict=True):  # compiled, a report reorders sums
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        assert rows.active.dtype == torch.bool
        for of_rows, mean in zip(rows, means[:3], strict=True):
            assert of_rows.shape == (2, 2, 3, 4)
            assert not of_rows[~valid].any()
            found = of_rows.double().flatten(1).sum(1) / valid[0].sum()
            torch.testing.assert_close(found, mean.double(), rtol=1e-5, atol=1e-7)
    module = ClassroomLoss(**options)
    assert all(map(torch.equal, module(student, mentors, targets, return_report="rows")[1], rows))
