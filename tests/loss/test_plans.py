"""Calls like earlier ones: the same results, the same errors, and never what another call needs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from classroomkd import fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.loss import fused, plans
from classrooms import OPTIONS, at, classroom, probabilities


@pytest.fixture
def found(monkeypatch):
    """For each call, whether it had a plan."""
    results = []
    find = plans.find

    def spy(*call):
        plan = find(*call)
        results.append(plan is not None)
        return plan

    monkeypatch.setattr(plans, "find", spy)
    return results


def batches(device, n=3, **size):
    """Of one kind, with other numbers."""
    return [classroom(seed=seed, **size).to(device) for seed in range(n)]


def through_autograd(student, mentors, targets, **options):
    """Loss, report, and gradient under another gradient than 1."""
    student = student.detach().clone().requires_grad_()
    loss, report = fused_classroom_loss(student, mentors, targets, return_report=True, **options)
    (grad,) = torch.autograd.grad(loss, student, torch.full_like(loss, 0.7))
    return loss.detach(), *report, grad


def in_one(student, mentors, targets, **options):
    loss, grad, report = fused_classroom_loss_and_grad(
        student, mentors, targets, return_report=True, **options
    )
    return loss, *report, grad


CASES = {
    **{name: (through_autograd, options) for name, options in OPTIONS.items()},
    "in_one": (in_one, {}),
    "in_one_batch": (in_one, {"ranking": "batch", "reduction": "sum"}),
    "in_one_scaled": (in_one, {"scale": torch.tensor([8.0])}),
    "weighted": (through_autograd, {"mentor_weight": torch.tensor([1.0, 0.0, 2.0])}),
    "soft": (through_autograd, {"targets": probabilities(6, 10)}),
    "listed": (in_one, {"mentors": list}),
    "half": (through_autograd, {"student": torch.float16}),
    "wide_rows": (in_one, {"strided": True}),
    "columns": (through_autograd, {"columns": True}),
}


# Options that are one more constant of a launch are tried on the pass that takes no time.
CONSTANTS = {"temperature", "correct", "correct_and_better", "unfiltered", "fixed", "unmentored"}
CONSTANTS |= {"uniform", "by_confidence", "no_task", "rounded", "released_ablation"}
ON_DEVICES = [("cpu", name) for name in CASES]
for name in [name for name in CASES if name not in CONSTANTS]:
    ON_DEVICES += [("interpreter", name), pytest.param("ptx", name, marks=pytest.mark.ptx)]
    ON_DEVICES += [pytest.param("gpu", name, marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("device", "name"), ON_DEVICES, indirect=["device"])
def test_the_same_as_without_a_plan(device, found, name):
    """Twice, as the second call of a plan is the first that repeats a launch."""
    function, options = CASES[name]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    soft, listed = options.pop("targets", None), options.pop("mentors", None)
    dtype = options.pop("student", torch.float32)
    strided, columns = options.pop("strided", False), options.pop("columns", False)
    given = []
    for student, mentors, targets in batches(device):
        student = student.to(dtype)
        if strided:
            student = torch.cat([student, student], 1)[:, : student.shape[1]]
        if columns:
            mentors = mentors.transpose(1, 2).contiguous().transpose(1, 2)
        targets = targets if soft is None else soft
        given.append((student, mentors if listed is None else listed(mentors), targets))
    expected = []
    for batch in given:
        plans._kind.cache_clear()
        expected.append(function(*batch, **options))
    assert not any(found)
    plans._kind.cache_clear()
    results = [function(*batch, **options) for batch in given]
    assert found[-3:] == [False, True, True]
    for result, same in zip(results, expected, strict=True):
        assert all(map(torch.equal, result, same))


def of_a_kind(device, **more):
    student, mentors, targets = classroom().to(device)
    mentor_weight, scale = torch.ones(3, device=device), torch.ones((), device=device)
    arguments = {"student_logits": student, "mentor_logits": list(mentors), "targets": targets}
    return {**arguments, "mentor_weight": mentor_weight, "scale": scale} | more


# What to change, and what the error says.
BAD = {
    "student": ({"student_logits": torch.ones(6, 10).long()}, TypeError, "student_logits must be"),
    "no tensor": ({"student_logits": [[1.0]]}, TypeError, "student_logits must be a tensor"),
    "rows": ({"student_logits": torch.ones(5, 10)}, ValueError, "mentor_logits.0. must have"),
    "mentor": ({"mentor_logits": [torch.ones(6, 10)] * 2 + [None]}, TypeError, "mentor_logits.2."),
    "mentor's shape": (
        {"mentor_logits": [torch.ones(6, 10)] * 2 + [torch.ones(6, 9)]},
        ValueError,
        r"mentor_logits\[2\] must have the student's shape",
    ),
    "mentor's device": (
        {"mentor_logits": [torch.ones(6, 10)] * 2 + [torch.ones(6, 10, device="meta")]},
        ValueError,
        "student's device",
    ),
    "mentors": ({"mentor_logits": "abc"}, TypeError, "mentor_logits"),
    "targets": ({"targets": torch.ones(6)}, TypeError, "must be integers"),
    "targets' shape": ({"targets": torch.ones(5).long()}, ValueError, "targets must have shape"),
    "weight": ({"mentor_weight": torch.ones(2)}, ValueError, "mentor_weight must have shape"),
    "weight's dtype": ({"mentor_weight": torch.ones(3).int()}, TypeError, "mentor_weight must be"),
    "scale": ({"scale": torch.ones(2)}, ValueError, "scale must be a tensor of one number"),
    "no scale": ({"scale": 1.0}, ValueError, "scale must be a tensor of one number"),
    "row_weight": ({"row_weight": torch.ones(5)}, ValueError, "row_weight must have shape"),
    "option": ({"temperature": 0.0}, ValueError, "temperature must be greater"),
    "boolean": ({"temperature": True}, TypeError, "temperature must be a number"),
    "none": ({"reduction": "none"}, ValueError, "reduction must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_after_good(found, name):
    """Its error, before as after a call of the same kind, and after itself."""
    change, error, message = BAD[name]
    bad = of_a_kind("cpu", **change)
    with pytest.raises(error, match=message):
        fused_classroom_loss_and_grad(**bad)
    for _ in range(2):
        fused_classroom_loss_and_grad(**of_a_kind("cpu", temperature=1.0))
    assert found[-1]
    for _ in range(2):
        with pytest.raises(error, match=message):
            fused_classroom_loss_and_grad(**{"temperature": 1.0} | bad)


def test_a_class_out_of_range_after_good_ones(found):
    """On a CPU, where classes are looked at."""
    student, mentors, targets = classroom()
    for function in (fused_classroom_loss, fused_classroom_loss_and_grad):
        for _ in range(2):
            function(student, mentors, targets)
        for bad in (10, -1):
            with pytest.raises(ValueError, match=f"got {bad} in row 3"):
                function(student, mentors, targets.clone().index_fill_(0, torch.tensor(3), bad))
        assert found[-1]


def test_what_a_gradient_needs(device, found):
    """Whether the student or a mentor needs one, and whether any is wanted, may change."""
    student, mentors, targets = classroom().to(device)
    batch = list(mentors), targets
    z = student.clone().requires_grad_()
    taught = [mentor.clone().requires_grad_() for mentor in mentors], targets
    expected = fused_classroom_loss(z, *batch)
    (grad,) = torch.autograd.grad(expected, z)
    for _ in range(2):
        assert not fused_classroom_loss(student, *batch).requires_grad
        assert not fused_classroom_loss(student, *taught).requires_grad
        with torch.no_grad():
            assert not fused_classroom_loss(z, *taught).requires_grad
        direct = fused_classroom_loss_and_grad(z, *taught)
        assert not any(result.requires_grad for result in direct)
        loss = fused_classroom_loss(z, *taught)
        assert torch.equal(loss, expected)
        assert torch.equal(*torch.autograd.grad(loss, z), grad)
    assert all(found[-5:])
    weight = torch.ones(3, device=device)
    for needed in (False, False, True, True):
        with torch.no_grad():
            weighted = fused_classroom_loss(z, *batch, mentor_weight=weight.requires_grad_(needed))
        assert torch.equal(weighted, expected)
    loss = fused_classroom_loss(z, *batch)
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), z)


def test_alignment(device, found):
    """Kernels have a plan for each, so that none loads 16 bytes at an odd place; four are kept."""
    student, mentors, targets = classroom(n_classes=32).to(device)
    expected = in_one(student, mentors, targets)
    for offset in (0, 1, 2, 4, 8, 1, 0):
        torch.testing.assert_close(in_one(at(offset, student), mentors, targets), expected)
    if fused.implementation(device.type).__name__.endswith("launch"):
        assert found == [False, True, False, False, False, False, True, False]
    else:
        assert found == [False] + [True] * 7


def test_kinds_are_bounded():
    for n_rows in range(1, plans._MAX_KINDS + 5):
        fused_classroom_loss_and_grad(*classroom(1, n_rows, 2))
    assert plans._kind.cache_info().currsize == plans._MAX_KINDS


class Seen(TorchDispatchMode):
    """The names of the operators that pass by."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Traced(torch.Tensor):
    """A subclass, as those that stand for other tensors."""


def test_who_looks_on_sees_operators(found):
    """Modes, functorch and subclasses, also where a plain call has left a plan; they leave none."""
    student, mentors, targets = classroom()
    call = lambda z=student: fused_classroom_loss_and_grad(z, mentors, targets)  # noqa: E731
    expected = call()
    call()
    assert found[-1]
    for _ in range(2):
        with Seen() as seen:
            call()
        assert "classroomkd::loss_and_grad" in seen.names
        with FakeTensorMode(allow_non_fake_inputs=True):
            loss, _ = call()
        assert type(loss) is not torch.Tensor
        many = torch.func.vmap(lambda z: z + call()[0])(torch.zeros(2))
        torch.testing.assert_close(many, expected[0].expand(2))
        torch.testing.assert_close(call(student.as_subclass(Traced))[0], expected[0])
        assert not any(found[-4:])
    call()
    assert found[-1]


@pytest.mark.filterwarnings("error:Dynamo")
def test_compiled_beside_planned():
    student, mentors, targets = classroom()
    torch._dynamo.reset()
    fast = torch.compile(fused_classroom_loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for function in (fused_classroom_loss, fast):
            z = student.clone().requires_grad_()
            loss = function(z, mentors, targets)
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
        torch.testing.assert_close(*results)


def test_kernels_where_they_are_asked_for(monkeypatch, found):
    """A plan of the CPU's pass does not keep a CPU's tensors from the kernels, nor the reverse."""
    launch = pytest.importorskip("classroomkd.kernels.launch", reason="needs Triton")
    started = []
    monkeypatch.setattr(launch, "start", lambda kernel, *_: started.append(kernel))
    batch = classroom()
    for interpreted in (False, True, False, True):
        monkeypatch.setattr(fused, "_INTERPRET", interpreted)
        for _ in range(3):
            before = len(started)
            fused_classroom_loss_and_grad(*batch)
            assert len(started) - before == interpreted
    assert found == [False, True, True] * 2 + [True] * 6


def test_ranks_over_a_process_group_with_a_plan(device, monkeypatch, found):
    """The group is no part of a kind: each call adds up over its own, or over none."""
    student, mentors, targets = classroom().to(device)
    groups = []
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda sums, group: groups.append((len(sums), group))
    )
    call = lambda group: through_autograd(  # noqa: E731
        student, mentors, targets, ranking="batch", process_group=group
    )
    results = [call(group) for group in ("a", "a", None, "b")]
    assert groups == [(5, "a"), (5, "a"), (5, "b")]
    assert found == [False, True, True, True]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_threads():
    """Many at once, of several kinds, each with its own results."""
    given = [classroom(3, 4 + k % 4, 10, seed=k) for k in range(8)]
    expected = [fused_classroom_loss_and_grad(*batch) for batch in given]
    plans._kind.cache_clear()
    together = threading.Barrier(len(given))

    def run(k):
        together.wait()
        return [fused_classroom_loss_and_grad(*given[k]) for _ in range(50)]

    with ThreadPoolExecutor(len(given)) as threads:
        for k, results in enumerate(threads.map(run, range(len(given)))):
            for result in results:
                assert all(map(torch.equal, result, expected[k]))
