"""A fixed set of the loss's kernels against the definition in float64, on any numbers.

So few that a GPU compiles them in a minute or two, and chosen so that each value of each option,
each dtype, layout and kind of target, one class and many, one mentor and 16, rows in registers and
rows in tiles occur. ``test_fused_properties.py`` draws many more for the interpreter.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from classroomkd import classroom_loss, fused_classroom_loss, fused_classroom_loss_and_grad
from classrooms import classroom, probabilities
from fused_cases import EXTREMES, Case, assert_right, decided, laid_out, sweep
from tests.ptx import ptx_execution

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
N_ROWS = 6
NUMBERS = ((0, 3.0), (1, 0.3), (2, 1.0), (3, 10.0))  # seed and scale


class Kernel(NamedTuple):
    """What a kernel is compiled for."""

    n_classes: int
    n_mentors: int
    options: Mapping[str, Any] = MappingProxyType({})
    dtypes: tuple[torch.dtype, ...] = (FLOAT32,)  # the student's, then the mentors' in turn
    layout: str = "contiguous"
    soft: bool = False  # targets are class probabilities
    tiled: bool = False
    weighted: bool = False

    def case(self, seed: int, scale: float, extreme: str = "") -> Case:
        """A call of it on random numbers; with an extreme in a row of all, or of one mentor."""
        student, mentors, indices = classroom(
            self.n_mentors, N_ROWS, self.n_classes, scale=scale, seed=seed
        )
        everyone = [
            logits.to(self.dtypes[i % len(self.dtypes)])
            for i, logits in enumerate([student, *mentors])
        ]
        if extreme:
            at = min(2, self.n_classes - 1)
            for logits in everyone:
                EXTREMES[extreme](logits[1], at)
            EXTREMES[extreme](everyone[-1][4], at)
        soft = probabilities(N_ROWS, self.n_classes, seed).to(self.dtypes[0])
        options = dict(self.options)
        if self.weighted:
            options["mentor_weight"] = torch.tensor([0.3, 0.0, 2.0] * 6)[: self.n_mentors]
        everyone = [laid_out(logits, self.layout).contiguous() for logits in everyone]
        layouts = [self.layout] * len(everyone)
        targets = soft if self.soft else indices
        return Case(everyone[0], everyone[1:], targets, options, layouts, self.tiled)


KERNELS = {
    "defaults": Kernel(100, 6),
    "one class, one mentor": Kernel(1, 1, dtypes=(BFLOAT16,)),
    "16 mentors": Kernel(33, 16, {"reduction": "sum"}, layout="repeated", weighted=True),
    "13 mentors, swept": Kernel(
        *(530, 13, {"mentoring": "dtkd", "label_smoothing": 0.1}),
        dtypes=(FLOAT16, FLOAT32, BFLOAT16),
        layout="padded",
        soft=True,
    ),
    "released": Kernel(100, 3, {"ranking": "batch", "rank_decimals": 2}),
    "ablation": Kernel(
        *(10, 3),
        {
            **{"ranking": "batch", "knowledge_filter": "none", "weighting": "uniform"},
            **{"mentoring": "none", "task_weight": 1.0},
        },
        dtypes=(FLOAT16,),
    ),
    "right, fixed": Kernel(
        *(129, 2),
        {"knowledge_filter": "correct", "mentoring": "fixed", "label_smoothing": 0.1},
        dtypes=(BFLOAT16, FLOAT32),
        layout="padded",
    ),
    "one step of bfloat16, odd rows": Kernel(136, 2, dtypes=(BFLOAT16,), layout="padded"),
    "one step of pairs": Kernel(130, 2, dtypes=(BFLOAT16,)),
    "one step of four pairs": Kernel(136, 2, dtypes=(BFLOAT16,)),
    "one step, aligned": Kernel(135, 2, layout="aligned"),
    "right and ahead, dtkd": Kernel(
        *(64, 3),
        {"knowledge_filter": "correct_and_better", "mentoring": "dtkd", "temperature": 4.0},
        soft=True,
    ),
    "rows": Kernel(16, 2, {"reduction": "none", "rank_decimals": 3}, layout="transposed"),
    "tiles": Kernel(100, 3, tiled=True, dtypes=(BFLOAT16,)),
    "tiles, released": Kernel(
        *(70, 2), {"ranking": "batch", "rank_decimals": 2, "task_weight": 0.7}, tiled=True
    ),
    "tiles, smoothed probabilities, dtkd": Kernel(
        *(77, 3),
        {
            **{"label_smoothing": 0.1, "mentoring": "dtkd", "knowledge_filter": "correct"},
            "weighting": "uniform",
        },
        dtypes=(FLOAT32, FLOAT16),
        layout="every other row",
        soft=True,
        tiled=True,
        weighted=True,
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_on_any_numbers(device, name):
    numbers = NUMBERS if device.type == "cuda" else NUMBERS[:1]  # the interpreter takes its time
    cases = [KERNELS[name].case(*each) for each in numbers]
    compared = [assert_right(case, device) for case in cases if decided(case)]
    assert any(compared)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_student_beside_the_mentors(device, monkeypatch, dtype, keep):
    """In one step its row is kept in registers, or read again beside each mentor's."""
    sweep(monkeypatch, 128, KEEP_STUDENT=keep)
    options = {"knowledge_filter": "none", "mentoring": "dtkd", "temperature": 4.0}
    for kernel in (Kernel(120, 3, dtypes=(dtype,)), Kernel(120, 3, options, dtypes=(dtype,))):
        assert assert_right(kernel.case(0, 1.0), device)


@pytest.mark.parametrize("name", KERNELS)
def test_on_extremes(device, name):
    extremes = EXTREMES if device.type == "cuda" else ("one NaN",)
    cases = [KERNELS[name].case(4, 3.0, extreme) for extreme in extremes]
    compared = [assert_right(case, device) for case in cases if decided(case)]
    assert any(compared)


def test_class_indices_that_wrap_around(device):
    """Class 156 as uint8 has the bits of -100, the index that is ignored, as int8."""
    student, mentors, _ = classroom(n_rows=3, n_classes=200).to(device)
    targets = torch.tensor([156, 3, 199], device=device)
    expected = fused_classroom_loss_and_grad(student, mentors, targets)
    narrow = fused_classroom_loss_and_grad(student, mentors, targets.to(torch.uint8))
    assert all(map(torch.equal, narrow, expected))


@pytest.mark.parametrize(
    ("n_rows", "ignored"), [(512, -100), (513, -100), (1100, -100), (512, 2**40), (513, 2**40)]
)
def test_the_mean_is_of_the_valid_rows(device, n_rows, ignored):
    """Up to 512 rows each program counts them; beyond, all programs share the count."""
    student, mentors, targets = classroom(1, n_rows, 2, seed=1)  # 32 rows a program
    targets[torch.arange(n_rows) % 3 == 1] = ignored
    targets[-1] = 0
    options = {} if ignored == -100 else {"ignore_index": ignored}
    case = Case(student, mentors, targets, options, ["contiguous"] * 2, False)
    assert assert_right(case, device)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("mentoring", ["adaptive", "none"])
def test_large_logits_with_fewer_networks_than_lanes(device, mentoring, mixed):
    """The student's softmax overflows in the others, unless its maximum is subtracted there too."""
    student, mentors, targets = classroom(2, 4, 20)
    student[torch.arange(4), targets] += 1000
    mentors = [mentors[0], mentors[1].bfloat16() if mixed else mentors[1]]
    case = Case(student, mentors, targets, {"mentoring": mentoring}, ["contiguous"] * 3, False)
    assert assert_right(case, device)


@pytest.mark.ptx
@pytest.mark.parametrize("n_classes", [1, 16])
def test_rows_at_a_distance_of_one_unit(n_classes):
    """The mentors' rows lie as far apart as they are aligned, the student's farther."""
    student, mentors, targets = classroom(2, 4, n_classes)
    student = torch.cat([student, student], 1)[:, :n_classes]
    mentors = [mentor.clone() for mentor in mentors]
    with ptx_execution() as run:
        loss = fused_classroom_loss(student, mentors, targets, reduction="none")
    assert not run.findings
    torch.testing.assert_close(loss, classroom_loss(student, mentors, targets, reduction="none"))


@pytest.mark.ptx
def test_any_program_completes_the_count():
    """The first programs count all slices unless others, which run before them, need the count."""
    student, mentors, targets = classroom(1, 1100, 2, seed=1)
    targets[torch.arange(1100) % 3 == 1] = -100
    results, atomics = [], set()
    for seed in range(4):
        with ptx_execution(seed=seed) as run:
            results.append(fused_classroom_loss_and_grad(student, mentors, targets)[:2])
        assert not run.findings
        atomics.add(run.launches[0].counts["atomics"].warps)
    assert len(atomics) > 1  # more tickets in some orders
    assert all(all(map(torch.equal, result, results[0])) for result in results)
    z = student.double().requires_grad_()
    loss = classroom_loss(z, mentors.double(), targets)
    loss.backward()
    torch.testing.assert_close(results[0][0].double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1].double(), z.grad, rtol=1e-5, atol=1e-8)


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
