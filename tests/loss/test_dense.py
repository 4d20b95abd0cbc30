"""Dense logits that the kernels read where they lie, and weights of their rows."""

import pytest
import torch

from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.loss import cpu_pass, fused
from classrooms import OPTIONS, SOFT, classroom, probabilities
from fused_cases import EXTREMES, Case, as_images, assert_right, decided
from tests.ptx import TARGETS, ptx_execution

launch = pytest.importorskip("classroomkd.kernels.launch", reason="needs Triton")
from classroomkd.kernels import launch_plan  # noqa: E402
from classroomkd.kernels.layout import MAX_CLASSES_IN_PLACE  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def dense_case(
    n_mentors, n_rows, n_classes, *, soft=False, weighted=False, dtypes=(FLOAT32,), **options
):
    """The first of some random batches on which float32 must decide as float64 does."""
    for seed in range(20):
        student, mentors, targets = classroom(n_mentors, n_rows, n_classes, seed=seed)
        logits = [z.to(dtypes[i % len(dtypes)]) for i, z in enumerate((student, *mentors))]
        given = dict(options)
        if soft:
            targets = probabilities(n_rows, n_classes, seed)
        else:
            targets[1::5] = -100
        if weighted:
            given["row_weight"] = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed))
        layouts = ["contiguous"] * len(logits)
        case = Case(logits[0], logits[1:], targets, given, layouts, tiled=False, dense=True)
        if decided(case):
            return case
    raise AssertionError("no batch is decided")


@pytest.mark.parametrize(
    ("name", "soft"), [*((name, False) for name in OPTIONS), *((name, True) for name in SOFT)]
)
def test_every_option(device, name, soft):
    options = {key: value for key, value in OPTIONS[name].items() if key != "ignore_index"}
    assert assert_right(dense_case(3, 18, 10, soft=soft, weighted=soft, **options), device)


@pytest.mark.parametrize(
    ("n_classes", "n_mentors", "dtypes"),
    [
        *((1, 1, (FLOAT32,)), (2, 2, (BFLOAT16, FLOAT32)), (63, 1, (FLOAT16,))),
        pytest.param(21, 6, (FLOAT32, FLOAT16, BFLOAT16), marks=pytest.mark.slow),
        pytest.param(5, 16, (FLOAT32,), marks=pytest.mark.slow),
    ],
)
def test_sizes(device, n_classes, n_mentors, dtypes):
    """Two images of more positions than a program's, the last of which is not full."""
    case = dense_case(n_mentors, 140, n_classes, dtypes=dtypes, weighted=True)
    assert assert_right(case, device)


@pytest.mark.parametrize("n_rows", [600, 1100])
def test_the_mean_over_many_programs(device, n_rows):
    assert assert_right(dense_case(1, n_rows, 3), device)
    assert assert_right(dense_case(1, n_rows, 3, weighted=True), device)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(device, extreme):
    """In a row of all networks, and in one of a mentor."""
    case = dense_case(2, 8, 6)
    for logits in (case.student, *case.mentors):
        EXTREMES[extreme](logits[2], 4)
    EXTREMES[extreme](case.mentors[-1][5], 4)
    if decided(case):
        assert_right(case, device)


def as_given(n_mentors=2, n_rows=128, n_classes=12, dtype=FLOAT32):
    """Student, mentors and targets of two images, the student's with gradient."""
    student, mentors, targets = classroom(n_mentors, n_rows, n_classes)
    logits = [as_images(z.to(dtype)) for z in (student, *mentors)]
    return logits[0].requires_grad_(), logits[1:], as_images(targets)


@pytest.fixture
def launches(monkeypatch):
    """The arguments of each launch."""
    started, start = [], launch.start

    def watched(kernel, grid, arguments, *rest):
        started.append(arguments)
        start(kernel, grid, arguments, *rest)

    monkeypatch.setattr(launch, "start", watched)
    return started


def test_nothing_is_copied(device, launches):
    """Logits and gradients are, by address, those that the launches are given."""
    if fused.implementation(device.type) is cpu_pass:
        pytest.skip("the CPU's pass copies to rows")
    student, mentors, targets = as_given()
    student, targets = student.detach().to(device).requires_grad_(), targets.to(device)
    mentors = [mentor.to(device) for mentor in mentors]
    loss = fused_classroom_loss(student, mentors, targets)
    (grad,) = torch.autograd.grad(loss, student)
    forward, backward = launches
    address = torch.Tensor.data_ptr
    assert address(forward["student_ptr"]) == address(student)
    assert [*map(address, forward["mentor_ptrs"])] == [*map(address, mentors)]
    assert address(forward["target_ptr"]) == address(targets)
    assert address(backward["grad_ptr"]) == address(forward["grad_ptr"])
    assert address(backward["out_ptr"]) == address(grad)
    assert grad.stride() == student.stride()
    _, finished = fused_classroom_loss_and_grad(student, mentors, targets)
    assert address(launches[2]["grad_ptr"]) == address(finished)
    assert finished.stride() == student.stride()


def test_who_lies_otherwise_is_copied(device, launches):
    """A channels-last mentor, and a slice of channels, which is not."""
    student, mentors, targets = as_given(2)
    expected = fused_classroom_loss_and_grad(student, mentors, targets)
    wide = torch.cat([mentors[1], mentors[0]], 1)
    mixed = [mentors[0].transpose(1, 2).contiguous().transpose(1, 2), wide[:, :12]]
    given = [z.to(device) for z in (student.detach(), *mixed, targets)]
    loss, grad = fused_classroom_loss_and_grad(given[0], given[1:3], given[3])
    torch.testing.assert_close([loss.cpu(), grad.cpu()], [*expected], rtol=1e-5, atol=1e-7)
    if launches:
        assert launches[-1]["mentor_ptrs"][0].is_contiguous()
        assert launches[-1]["mentor_ptrs"][1].data_ptr() == given[2].data_ptr()


def test_more_classes_are_copied_to_rows(device):
    """The gradient then lies as rows do."""
    student, mentors, targets = as_given(1, 4, MAX_CLASSES_IN_PLACE + 1)
    loss, grad = fused_classroom_loss_and_grad(
        student.to(device), [mentors[0].to(device)], targets.to(device)
    )
    expected = classroom_loss(student, mentors, targets)
    (expected_grad,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-4, atol=1e-7)
    assert grad.stride(1) == 1


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("target", "dtype"), [*zip(TARGETS, (FLOAT32, BFLOAT16, FLOAT32), strict=True)]
)
def test_bytes(target, dtype):
    """Three reads of every logit and one write of the gradient, in full sectors, are all."""
    n_mentors, n_rows, n_classes = 3, 256, 10
    student, mentors, targets = as_given(n_mentors, n_rows, n_classes, dtype)
    with ptx_execution(target) as run:
        fused_classroom_loss(student, mentors, targets, reduction="none", knowledge_filter="none")
    assert not run.findings
    (executed,) = run.launches
    loads, stores = executed.counts["global loads"], executed.counts["global stores"]
    n_bytes = n_rows * n_classes * dtype.itemsize  # of one network
    index, loss = 8 * n_rows, 4 * n_rows
    assert loads.bytes == 3 * (1 + n_mentors) * n_bytes + index
    assert stores.bytes == n_bytes + loss
    assert 32 * loads.sectors == loads.bytes
    assert 32 * stores.sectors == stores.bytes
    assert "shuffles" not in executed.counts  # no reduction crosses threads


@pytest.mark.parametrize("function", [fused_classroom_loss, fused_classroom_loss_and_grad])
def test_compiled(device, function):
    """In one graph, with a gradient that lies as the logits do."""
    student, mentors, targets = as_given()
    student, targets = student.detach().to(device).requires_grad_(), targets.to(device)
    mentors = [mentor.to(device) for mentor in mentors]
    weight = torch.rand(targets.shape, device=device)

    def results(call):
        loss, *grad = torch.utils._pytree.tree_leaves(
            call(student, mentors, targets, row_weight=weight)
        )
        return loss, *(grad or torch.autograd.grad(loss, student))

    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(fast), results(function))
    assert results(fast)[1].stride() == student.stride()


@pytest.mark.parametrize("divisor", [2, 3, 7, 128, 129, 65_537, 2**24, 2**31 - 1])
def test_rows_are_divided_among_images(divisor):
    """By a multiplication that stays within 63 bits."""
    _, factor, shift = launch_plan.quotient(divisor)
    numbers = [0, 1, divisor - 1, divisor, 5 * divisor - 1, 5 * divisor, 2**31 - 1]
    for number in [n for n in numbers if n < 2**31]:
        assert number * factor < 2**63
        assert number * factor >> shift == number // divisor


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 2), (2, 3, 0), (2, 3, 1), (2, 1, 4), (1, 3, 2, 2), (2, 3, 2)]
)
def test_odd_shapes(device, shape):
    """No image, no position, one of each, one class."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, *shape, generator=rng).to(device)
    student, mentor = logits[0].requires_grad_(), logits[1]
    targets = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=device)
    for options in ({}, {"reduction": "none"}, {"row_weight": torch.ones_like(targets).float()}):
        losses = [
            function(student, [mentor], targets, **options)
            for function in (fused_classroom_loss, classroom_loss)
        ]
        grads = [torch.autograd.grad(loss.sum(), student) for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert fused_classroom_loss_and_grad(student, [mentor], targets)[1].shape == shape
