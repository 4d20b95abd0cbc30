"""The CPU's pass: its arithmetic, threads, forks, and when it serves.

What it computes is tested with the kernels: their tests have it as a value of ``device``.
"""

import multiprocessing
import threading

import pytest
import torch

pytest.importorskip("numba")

import numpy as np

from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.compiled import compiled
from classroomkd.loss import cpu_pass, cpu_vectors, fused
from classrooms import classroom, probabilities
from interpreter import INTERPRETED

ALL_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


@compiled()
def _each(function, values, out):
    for i in range(len(values)):
        out[i] = function(values[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_half_precision_is_read(dtype):
    expected = ALL_BITS.view(dtype).float()
    if dtype == torch.float16:
        got = np.empty(2**16, np.float32)
        _each(cpu_vectors._float16, ALL_BITS.numpy().view(np.uint16).astype(np.uint32), got)
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=0, equal_nan=True)
    # And by a whole pass: the loss of a classroom of this number is that of its float32.
    finite = expected[expected.isfinite()].view(-1, 16)
    targets = torch.arange(len(finite)) % 16
    narrow = fused_classroom_loss(finite.to(dtype), [finite.to(dtype).flip(1)], targets)
    assert torch.equal(narrow, fused_classroom_loss(finite, [finite.flip(1)], targets))


@pytest.mark.parametrize(
    ("dtype", "convert"),
    [(torch.float16, cpu_vectors._to_float16), (torch.bfloat16, cpu_vectors._to_bfloat16)],
)
def test_half_precision_is_written_as_torch_rounds(dtype, convert):
    """All numbers of the dtype, those halfway between two, and their float32 neighbours."""
    values = ALL_BITS.view(dtype).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:].double() + values[:-1].double()).div(2).float()
    above, below = (torch.nextafter(between, torch.tensor(x)) for x in (torch.inf, -torch.inf))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.0, 65520.0, 3.4e38, 1e-45])
    values = torch.cat([values, between, above, below, special])
    got = np.empty(len(values), np.uint16)
    _each(convert, values.numpy(), got)
    got = torch.from_numpy(got.view(np.int16)).view(dtype)
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_powers_of_two_are_of_the_error_that_is_stated():
    d = np.concatenate([-np.linspace(0, 126, 400_001), [-np.inf, -1e38, -127.1, 0]])
    d = d.astype(np.float32)
    got = np.empty_like(d)

    @compiled()
    def powers(d, out):
        for i in range(len(d)):
            out[i] = cpu_vectors._power(d[i], np.float32(1))

    powers(d, got)
    truth = 2.0 ** d.astype(np.float64)
    normal = d > -126
    assert np.abs(got[normal] / truth[normal] - 1).max() < 1e-7
    assert got[-4:].tolist() == [0, 0, 0, 1]


def batch(seed=0):
    """Large enough for several threads."""
    return classroom(4, 403, 700, seed=seed)


def everything(student, mentors, targets):
    results = []
    for ranking in ("sample", "batch"):
        loss, grad, report = fused_classroom_loss_and_grad(
            student, mentors, targets, ranking=ranking, return_report=True
        )
        results += [loss, grad, *report]
    return results


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_number_of_threads_gives_the_same_bits(threads, monkeypatch):
    threads(1)
    expected = everything(*batch())
    shares = []
    pool = cpu_pass._pool()
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *a: shares.append(a[1:3]) or submit(*a))
    for n_threads in (2, 3, 7):
        threads(n_threads)
        shares.clear()
        assert all(map(torch.equal, everything(*batch()), expected))
        assert len(shares) == 3 * (n_threads - 1)  # one for the means


def test_small_batches_wake_no_thread(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(cpu_pass, "_pool", None)
    fused_classroom_loss(*classroom())


def test_several_threads_at_once(threads):
    threads(2)
    batches = [batch(seed) for seed in range(4)]
    expected = [everything(*one) for one in batches]
    got = [None] * len(batches)

    def work(index):
        got[index] = [everything(*batches[index]) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, same in zip(got, expected, strict=True):
        assert all(all(map(torch.equal, result, same)) for result in results)


def _in_a_fork(queue, arguments):
    queue.put(fused_classroom_loss(*arguments).item())


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_have_threads_of_their_own(threads):
    """As the loaders' workers, and whoever forks after a loss was computed."""
    threads(2)
    arguments = batch()
    expected = fused_classroom_loss(*arguments).item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_a_fork, args=(queue, arguments))
    process.start()
    assert queue.get() == expected
    process.join()
    assert process.exitcode == 0


def test_who_serves_cpu_tensors(monkeypatch):
    student, mentors, targets = classroom()
    assert fused.implementation("cpu") is cpu_pass
    monkeypatch.setattr(cpu_pass, "classroom_loss_and_grad", None)
    with pytest.raises(TypeError, match="NoneType"):
        fused_classroom_loss(student, mentors, targets)
    double = [student.double(), mentors, targets]
    assert torch.equal(fused_classroom_loss(*double), classroom_loss(*double))
    monkeypatch.setattr(fused, "_NUMBA", False)
    with pytest.warns(UserWarning, match="numba is not installed"):
        loss = fused_classroom_loss(student, mentors, targets)
    assert torch.equal(loss, classroom_loss(student, mentors, targets))
    if INTERPRETED:
        monkeypatch.setattr(fused, "_INTERPRET", True)
        torch.testing.assert_close(fused_classroom_loss(student, mentors, targets), loss)


def test_what_is_compiled_anew(tmp_path):
    """The name under which numba caches a function changes with the files that it calls."""
    other = tmp_path / "other.py"
    names = []
    for text in ("a", "b", "a"):
        other.write_text(text)

        def function():
            return 1

        names.append(compiled(str(other))(function).py_func.__qualname__)
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize("n_classes", [16, 31, 100])
def test_equal_rows_of_different_dtypes_have_the_same_confidence(n_classes):
    """So that a mentor that answers as the student does teaches, in ranking "batch" too."""
    student, _, _ = classroom(1, 50, n_classes)
    student = student.bfloat16()
    targets = probabilities(50, n_classes)
    for row, target in zip(student.split(1), targets.split(1), strict=True):
        _, report = fused_classroom_loss(
            row, [row.float(), row], target, ranking="batch", return_report=True
        )
        assert report.active_share.tolist() == [1.0, 1.0]
