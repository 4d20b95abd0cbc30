"""A repeated launch against Triton's own: what its launcher is given, of kernels compiled here."""

import os
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch import multiprocessing

from classroomkd import fused_classroom_loss, fused_classroom_loss_and_grad
from classrooms import at, classroom, probabilities

N_ROWS, N_CLASSES, N_MENTORS = 6, 32, 2


def through_autograd(factor):
    """Also with the kernel of autograd's backward."""

    def call(student, *batch, **options):
        loss = fused_classroom_loss(student.requires_grad_(), *batch, **options)
        return loss.detach(), *torch.autograd.grad(loss, student, factor)

    return call


WEIGHT, SCALE = torch.ones(N_MENTORS), torch.tensor(8.0)
# A function, its options, and where in the student and the targets begin.
CASES = {
    "in one": (fused_classroom_loss_and_grad, {}, 0, 0),
    "odd logits": (fused_classroom_loss_and_grad, {}, 2, 0),
    "odd targets": (fused_classroom_loss_and_grad, {}, 0, 1),
    "everything": (
        fused_classroom_loss_and_grad,
        {
            **{"ranking": "batch", "rank_decimals": 2, "temperature": 4.0, "label_smoothing": 0.1},
            **{"mentor_weight": WEIGHT, "scale": SCALE, "ignore_index": 2**40, "soft": True},
        },
        *(0, 0),
    ),
    "odd weight and scale": (
        fused_classroom_loss_and_grad,
        {"mentor_weight": at(1, WEIGHT), "scale": at(1, SCALE[None])},
        *(0, 0),
    ),
    "autograd": (through_autograd(at(0, torch.ones(1))[0]), {}, 0, 0),
    "odd factor": (through_autograd(at(1, torch.ones(1))[0]), {}, 0, 0),
    "rows": (through_autograd(torch.ones(N_ROWS)), {"reduction": "none"}, 0, 0),
}


# Where autograd's factor is not one aligned number, Triton looks for its kernel.
NOT_ALL_REPEATED = {"odd factor", "rows"}


def batches(student_offset, targets_offset, soft):
    for seed in range(2):
        student, mentors, targets = classroom(N_MENTORS, N_ROWS, N_CLASSES, seed=seed)
        if soft:
            targets = probabilities(N_ROWS, N_CLASSES, seed)
        mentors = [at(0, mentor) for mentor in mentors]
        yield at(student_offset, student), mentors, at(targets_offset, targets)


def seen(value, inputs):
    """What Triton and the kernel see of an argument; the addresses of all but ``inputs`` differ."""
    if isinstance(value, tuple):
        return [seen(each, inputs) for each in value]
    if isinstance(value, torch.Tensor):
        address = value.data_ptr()
        which = address if address in inputs else address % 16
        return which, value.dtype, value.shape, value.stride()
    return type(value), value


def compare(_rank):
    """In a process that does not interpret kernels."""
    import triton

    import bench_calls
    import loss_cpu
    from classroomkd.loss import plans
    from stub_driver import stub_driver

    launched, looked_up = [], []
    run = triton.JITFunction.run

    def spy(kernel, *arguments, **options):
        looked_up.append(kernel)
        return run(kernel, *arguments, **options)

    triton.JITFunction.run = spy

    def launches(call, batch, options):
        """What the launcher gets in a call, and how often Triton looked a kernel up."""
        launched.clear()
        looked_up.clear()
        results = call(*batch, **options)
        tensors = [batch[0], *batch[1], batch[2], *options.values()]
        inputs = {each.data_ptr() for each in tensors if isinstance(each, torch.Tensor)}
        given = []
        for *where, metadata, enter_hook, exit_hook in (each[:9] for each in launched):
            name = metadata and metadata.get()["name"]
            given.append((*where, name, enter_hook, exit_hook))
        # The last launch writes the gradient that is returned.
        assert any(results[1] is argument for argument in launched[-1][9:])
        return [given, seen(tuple(each[9:] for each in launched), inputs)], len(looked_up)

    with stub_driver(lambda *given: launched.append(given)) as driver:
        for name, (call, options, *offsets) in CASES.items():
            options = dict(options)
            for batch in batches(*offsets, options.pop("soft", False)):
                plans._kind.cache_clear()
                driver.stream += 1
                expected, n_launches = launches(call, batch, options)
                again, n_lookups = launches(call, batch, options)  # has a plan, and leaves a kernel
                assert n_lookups == n_launches == len(expected[0]), name
                repeated, n_lookups = launches(call, batch, options)
                assert n_lookups == (name in NOT_ALL_REPEATED), name
                assert expected == again == repeated, name
                driver.stream += 1
                elsewhere, _ = launches(call, batch, options)
                streams = [[where[3] for where in given] for given, _ in (repeated, elsewhere)]
                assert streams == [[driver.stream + k] * n_launches for k in (-1, 0)], name

    # The benchmark of the host's time needs such a process too.
    loss_cpu.SIZES = ((N_ROWS, N_CLASSES, N_MENTORS),)
    os.environ.pop("PYTEST_ADDOPTS", None)  # such as more processes
    once = "--benchmark-disable", "-p", "no:cacheprovider"
    assert pytest.main([*once, "-k", "test_host", bench_calls.__file__]) == 0


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_repeated_launches():
    if version("triton").split(".")[:2] != ["3", "7"]:
        pytest.skip("the stub of a driver is for Triton 3.7")
    # Elsewhere here kernels are interpreted, for which Triton decides as they are defined.
    multiprocessing.start_processes(compare, (), 1, start_method="spawn")
