"""Calls of the loss, and how the kernels' results are compared with the definition in float64.

The bar is that of ``test_fused.py``. On few rows, though, a float32 error is luck, PyTorch's as
much as the kernel's; where PyTorch had more of it, the bar is twice the largest of PyTorch's errors
on a few copies of the batch, scaled by factors near 1. Draws on which float32 may decide otherwise
than float64 (who is better, how a share is rounded) are left out, never tolerated.
"""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.kernels.layout import flattened
from classroomkd.loss.definition import classroom_weights
from classroomkd.loss.fused import ClassroomReport
from classroomkd.loss.options import LossOptions
from classroomkd.loss.targets import prepare_targets

launch_plan = pytest.importorskip("classroomkd.kernels.launch_plan", reason="needs Triton")
sum_blocks = launch_plan.sum_blocks
steps = pytest.importorskip("classroomkd.kernels.blocks").steps

NAMES = ("loss", "grad", *ClassroomReport._fields)
MARGIN = 1e-6  # of the truth's norm
ATOL = 1e-7  # one rounding of the 1 that a softmax sums up to
COPIES = 16


class Case(NamedTuple):
    """A call of the loss, as drawn; ``layouts`` say how the logits shall lie in memory."""

    student: Tensor
    mentors: list[Tensor]
    targets: Tensor
    options: dict
    layouts: list[str]
    tiled: bool
    dense: bool = False  # the rows as positions of two images, [2, C, P] in memory of this order

    def change(self, **options):
        """The same call with other options."""
        return self._replace(options=self.options | options)


def laid_out(logits, layout):
    """The same logits in other strides, with NaN between the rows."""
    if layout == "padded":
        wide = logits.new_full((logits.shape[0], logits.shape[1] + 5), torch.nan)
        wide[:, 3:-2] = logits
        return wide[:, 3:-2]
    if layout == "aligned":  # whatever the number of classes
        wide = logits.new_full((logits.shape[0], -(-logits.shape[1] // 16) * 16), torch.nan)
        wide[:, : logits.shape[1]] = logits
        return wide[:, : logits.shape[1]]
    if layout == "every other row":
        tall = logits.new_full((2 * logits.shape[0], logits.shape[1]), torch.nan)
        tall[::2] = logits
        return tall[::2]
    if layout == "transposed":
        return logits.t().contiguous().t()
    return logits[:1].expand(logits.shape) if layout == "repeated" else logits.contiguous()


def as_images(rows):
    """Rows [N, …] as positions of two images, the latter's last: [2, …, P], contiguous."""
    return rows.unflatten(0, (2, -1)).movedim(1, -1).contiguous()


def sweep(patch, width, **how):
    """Read all rows in steps of so many columns; one step if it has them all."""
    warp = launch_plan.WARP_SIZE
    load = max(1, min(4, width // warp))
    patch.setattr(
        launch_plan,
        "blocks",
        lambda n_classes, _m, _i, _w, align, _demand: steps(
            width, 1, load, n_classes, align, warp
        )._replace(**how),
    )


@contextmanager
def cut_up(case):
    """Sweep over rows that registers would hold, and sum few of them at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch_plan,
            "sum_blocks",
            lambda *how: sum_blocks(*how)._replace(BLOCK_R=2, group_shift=1),
        )
        if case.tiled:
            sweep(patch, 64)
        yield


def upstream(case):
    shape = case.targets.shape[:1] if case.options.get("reduction") == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def as_rows(case, loss, grad):
    """The results of a call that `on_device` has laid out, as those of rows."""
    if case.dense:
        assert grad.is_contiguous()  # as the logits are
        grad = flattened(grad)
    return loss.reshape(upstream(case).shape), grad


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
    weight = options.get("mentor_weight")
    if isinstance(weight, Tensor):
        options["mentor_weight"] = torch.empty_strided(
            weight.shape, weight.stride(), dtype=weight.dtype, device=device
        ).copy_(weight)
    targets = case.targets.to(device)
    if "row_weight" in options:
        options["row_weight"] = options["row_weight"].to(device)
    if case.dense:
        logits, targets = [as_images(value) for value in logits], as_images(targets)
        if "row_weight" in options:
            options["row_weight"] = as_images(options["row_weight"])
    return logits[0], logits[1:], targets, options


def through_autograd(case, device):
    student, mentors, targets, options = on_device(case, device)
    with cut_up(case):
        loss, report = fused_classroom_loss(
            student.requires_grad_(), mentors, targets, return_report=True, **options
        )
        loss.backward(upstream(case).to(device).view_as(loss))
    results = (*as_rows(case, loss, student.grad), *report)
    return [value.detach().double().cpu() for value in results]


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
    return [value.double().cpu() for value in (*as_rows(case, loss, grad), *report)]


def decided(case):
    """Whether float32 must decide as float64 does: no near-tie, no share rounded from near a half.

    Equal rows are equal in any precision; so are confidences of exactly 0 and 1.
    """
    names = {*case.options} - {"mentor_weight", "row_weight"}
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
    healthy = ~weights.nonfinite
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

    Returns False if they cannot be compared, as float32 overflows where float64 does not.

    """
    truth = definition(case, torch.float64)
    same = definition(case, torch.float32)
    if [*map(pattern, same)] != [*map(pattern, truth)]:  # float32 overflows
        return False
    errors = [[finite_norm(a - b) for a, b in zip(same, truth, strict=True)]]
    dtype = torch.finfo(case.student.dtype)
    for path, values, roundings in results:
        assert [v.shape for v in values] == [v.shape for v in truth], path
        compared = NAMES
        if truth[1].isnan().any():  # in a nonfinite row there is not much to report on
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
    return True


def assert_right(case, device):
    """Both ways through the kernels; False if there is nothing to compare with."""
    results = [("autograd", through_autograd(case, device), 2)]
    if case.options.get("reduction") != "none":
        results.append(("one launch", in_one_launch(case, device), 1))
    return assert_no_worse_than_pytorch(case, results)


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


def close(got, expected, rtol=3e-6):
    assert finite_norm(got - expected) <= rtol * finite_norm(expected) + ATOL
