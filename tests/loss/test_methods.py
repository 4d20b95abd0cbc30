"""Every method against its paper's formula, written out row by row in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from classroomkd.errors import UserError
from classroomkd.limits import MAX_TEMPERATURE
from classroomkd.loss import ClassroomLoss, classroom_loss
from classroomkd.loss.methods import Method, Outputs, create, method_names, names
from classroomkd.loss.options import LossOptions
from classrooms import EXTREME_MAXIMA

B, C, M = 7, 6, 3
IGNORED_ROWS = (1, 4)
SHAPES = [(2, 8, 8), (3, 4, 4), (4, 2, 2)]  # of the student's features, C, H, W
MENTOR_SHAPES = [(5, 8, 8), (3, 8, 8), (4, 2, 4), (6, 1, 1)]  # one stage more, other sizes


# The formulas. Names follow the papers; z are logits [C] of one row.


def softmax(z: np.ndarray, T: float = 1.0) -> np.ndarray:
    powers = np.array([math.exp((value - max(z)) / T) for value in z])
    return powers / powers.sum()


def ce(z: np.ndarray, y: int | list[float]) -> float:
    if isinstance(y, list):
        return -sum(t * math.log(p) for t, p in zip(y, softmax(z), strict=True))
    return -math.log(softmax(z)[y])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def z_score(z: np.ndarray) -> np.ndarray:
    mean = sum(z) / len(z)
    return (z - mean) / math.sqrt(sum((z - mean) ** 2) / len(z))


def kd(s, mentors, y, temperature=4.0, ce_weight=0.1, kd_weight=0.9, standardise=False):
    u, v = (z_score(s), z_score(mentors[0])) if standardise else (s, mentors[0])
    kd_term = kl(softmax(v, temperature), softmax(u, temperature))
    return ce_weight * ce(s, y) + kd_weight * temperature**2 * kd_term


def aver(s, mentors, y, temperature=4.0, ce_weight=0.1, kd_weight=0.9):
    teacher = sum(softmax(m, temperature) for m in mentors) / len(mentors)
    kd_term = kl(teacher, softmax(s, temperature))
    return ce_weight * ce(s, y) + kd_weight * temperature**2 * kd_term


def ca_mkd(s, mentors, y, temperature=4.0, alpha=1.0):
    errors = [math.exp(ce(m, y)) for m in mentors]
    loss = 0.0
    for m, error in zip(mentors, errors, strict=True):
        w = 1.0 if len(mentors) == 1 else (1 - error / sum(errors)) / (len(mentors) - 1)
        loss += w * kl(softmax(m, temperature), softmax(s, temperature))
    return ce(s, y) + alpha * temperature**2 * loss


def dynamic_temperatures(s, t, T):
    if max(s) <= 0 or max(t) <= 0:
        return T, T
    return 2 * max(s) / (max(s) + max(t)) * T, 2 * max(t) / (max(s) + max(t)) * T


def dtkd(s, mentors, y, temperature=4.0, alpha=3.0, beta=1.0, gamma=1.0):
    t, T = mentors[0], temperature
    T_s, T_t = dynamic_temperatures(s, t, T)
    dynamic = T_s * T_t * kl(softmax(t, T_t), softmax(s, T_s))
    return alpha * dynamic + beta * T**2 * kl(softmax(t, T), softmax(s, T)) + gamma * ce(s, y)


def dkd(s, mentors, y, temperature=4.0, alpha=1.0, beta=8.0, ce_weight=1.0):
    p_s, p_t = softmax(s, temperature), softmax(mentors[0], temperature)
    others = [c for c in range(len(s)) if c != y]
    tckd = kl([p_t[y], sum(p_t[others])], [p_s[y], sum(p_s[others])])
    nckd = kl(p_t[others] / sum(p_t[others]), p_s[others] / sum(p_s[others]))
    return ce_weight * ce(s, y) + temperature**2 * (alpha * tckd + beta * nckd)


def classroom(s, mentors, y, temperature=12.0, standardise=False):
    """With every other option as it is by default."""
    u, vs = (z_score(s), [z_score(m) for m in mentors]) if standardise else (s, mentors)
    p = [math.exp(-ce(z, y)) for z in (u, *vs)]
    r_s, *r = [len(mentors) * value / sum(p) for value in p]
    loss = math.exp(-ce(s, y)) * ce(s, y)
    for r_m, v in zip(r, vs, strict=True):
        tau = 1 + temperature * abs(r_m - r_s) / max(r_m, r_s)
        if r_m >= r_s:
            loss += r_m * tau**2 * kl(softmax(v, tau), softmax(u, tau))
    return loss


def by_rows(formula):
    def loss(student, mentors, targets, **options):
        rows = [
            formula(student[b], [m[b] for m in mentors], y, **options)
            for b, y in enumerate(targets)
            if y != -100
        ]
        return sum(rows) / len(rows)

    return loss


def pearson(a, b):
    a, b = a - sum(a) / len(a), b - sum(b) / len(b)
    norms = math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))
    return sum(a * b) / norms if norms else 0.0


def dist(student, mentors, targets, temperature=4.0, beta=2.0, gamma=2.0, ce_weight=1.0):
    rows = [b for b, y in enumerate(targets) if y != -100]
    p_s = np.array([softmax(student[b], temperature) for b in rows])
    p_t = np.array([softmax(mentors[0][b], temperature) for b in rows])
    classes = range(p_s.shape[1])
    inter = sum(1 - pearson(p_s[i], p_t[i]) for i in range(len(rows))) / len(rows)
    intra = sum(1 - pearson(p_s[:, j], p_t[:, j]) for j in classes) / len(classes)
    task = sum(ce(student[b], targets[b]) for b in rows) / len(rows)
    return ce_weight * task + temperature**2 * (beta * inter + gamma * intra)


FORMULAS = {
    "alone": by_rows(lambda s, mentors, y: ce(s, y)),
    "classroom": by_rows(classroom),
    "kd": by_rows(kd),
    "aver": by_rows(aver),
    "ca_mkd": by_rows(ca_mkd),
    "dtkd": by_rows(dtkd),
    "dkd": by_rows(dkd),
    "dist": dist,
}
CASES = [
    *((name, {}) for name in FORMULAS),
    ("classroom", {"standardise": True}),
    ("classroom", {"standardise": True, "temperature": 4.0}),
    ("kd", {"temperature": 2.0, "ce_weight": 0.5, "kd_weight": 3.0}),
    ("kd", {"temperature": 2.0, "kd_weight": 9.0, "standardise": True}),
    ("aver", {"temperature": 1.0, "ce_weight": 1.0, "kd_weight": 2.0}),
    ("ca_mkd", {"temperature": 2.0, "alpha": 0.3}),
    ("dtkd", {"temperature": 2.0, "alpha": 0.5, "beta": 0.3, "gamma": 0.2}),
    ("dkd", {"temperature": 2.0, "alpha": 2.0, "beta": 0.5, "ce_weight": 0.1}),
    ("dist", {"temperature": 1.0, "beta": 1.0, "gamma": 3.0, "ce_weight": 0.5}),
]


def batch(
    rows: int = B,
    mentors: int = M,
    ignored: tuple[int, ...] = IGNORED_ROWS,
    dtype: torch.dtype = torch.float64,
    mentor_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Outputs, list[Outputs], Tensor]:
    """Outputs whose ignored rows are NaN everywhere, the mentors' made in inference mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shapes, dtype) -> Outputs:
        sizes = [(C,), *shapes]
        tensors = [torch.randn(rows, *size, generator=generator, dtype=dtype) for size in sizes]
        for tensor in tensors:
            tensor[list(ignored)] = math.nan
        return Outputs(3 * tensors[0], tuple(tensors[1:]))

    targets = torch.randint(C, (rows,), generator=generator)
    targets[list(ignored)] = -100
    student = draw(SHAPES, dtype)
    with torch.inference_mode():
        others = [draw(MENTOR_SHAPES, mentor_dtype or dtype) for _ in range(mentors)]
    student.logits.requires_grad_()
    for features in student.features:
        features.requires_grad_()
    return student, others, targets


def numpy_logits(outputs: Outputs) -> np.ndarray:
    return outputs.logits.detach().double().numpy()


def expected_loss(name: str, student, mentors, targets, **options) -> float:
    everyone = [numpy_logits(mentor) for mentor in mentors]
    return FORMULAS[name](numpy_logits(student), everyone, targets.tolist(), **options)


def make(name: str, **options):
    """The method, told the features' shapes, in float64."""
    torch.manual_seed(0)
    method = create(name, **options)
    method.prepare(SHAPES, [MENTOR_SHAPES] * M)
    return method.double()


def inputs(student: Outputs) -> list[Tensor]:
    return [student.logits, *student.features]


def grads(student: Outputs) -> list[Tensor]:
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs(student)]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("mentors", [1, 2, 3])
def test_the_loss_is_the_formulas(name: str, options: dict, mentors: int) -> None:
    cases = [batch(mentors=mentors, seed=seed) for seed in range(3)]
    for case in (*cases, batch(rows=1, mentors=mentors, ignored=())):
        loss, _ = create(name, **options).backward(*case)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected_loss(name, *case, **options), rel=1e-10)
        assert case[0].logits.grad[case[2] >= 0].isfinite().all()


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(
    ("dtype", "mentor_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_arithmetic_is_in_float32(name: str, options: dict, dtype, mentor_dtype) -> None:
    case = batch(dtype=dtype, mentor_dtype=mentor_dtype)
    loss, _ = create(name, **options).backward(*case)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss(name, *case, **options), rel=1e-5)
    assert case[0].logits.grad.dtype == dtype


def test_dtkd_where_a_largest_logit_is_not_positive() -> None:
    student, mentors, targets = batch(ignored=())
    with torch.no_grad():
        student.logits[:3] -= 20
    with torch.inference_mode():
        mentors[0].logits[2:5] -= 20
    loss = create("dtkd")(student, mentors, targets)
    expected = expected_loss("dtkd", student, mentors, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("x_s", "x_t"), EXTREME_MAXIMA)
def test_dtkd_of_extreme_maxima(x_s: float, x_t: float) -> None:
    student, teacher = torch.tensor([[x_s, -1.0, -2.0]]), torch.tensor([[x_t, -3.0, -1.0]])
    method, targets = create("dtkd"), torch.tensor([0])
    exact = method.row_losses(student.double(), [teacher.double()], targets)
    loss = method.row_losses(student, [teacher], targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


SMOOTH = [(name, options) for name, options in CASES if name not in ("classroom", "dtkd")]


@pytest.mark.parametrize(
    ("name", "options"),
    [*SMOOTH, ("fitnet", {}), ("fitnet", {"stage": 3}), ("fitnet", {"stage": 1}), ("at", {})],
)
def test_the_gradient_is_the_losss(name: str, options: dict) -> None:
    student, mentors, targets = batch(rows=3, ignored=())
    method = make(name, **options)

    def loss(logits: Tensor, *features: Tensor) -> Tensor:
        return method(Outputs(logits, features), mentors, targets)

    used = method.uses_features
    assert torch.autograd.gradcheck(loss, inputs(student) if used else [student.logits])


def test_the_gradient_of_dtkd_holds_its_temperatures() -> None:
    student, mentors, targets = batch(ignored=())
    T, alpha, beta, gamma = 3.0, 0.5, 0.7, 0.2
    create("dtkd", temperature=T, alpha=alpha, beta=beta, gamma=gamma).backward(
        student, mentors, targets
    )
    everyone = zip(numpy_logits(student), numpy_logits(mentors[0]), targets.tolist(), strict=True)
    for row, (s, t, y) in enumerate(everyone):
        T_s, T_t = dynamic_temperatures(s, t, T)
        expected = (
            alpha * T_t * (softmax(s, T_s) - softmax(t, T_t))
            + beta * T * (softmax(s, T) - softmax(t, T))
            + gamma * (softmax(s) - np.eye(C)[y])
        )
        np.testing.assert_allclose(student.logits.grad[row].numpy(), expected / B, rtol=1e-9)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("scale", [None, 1.0, -2.5])
def test_backward_is_forward_and_its_scaled_gradient(name: str, scale: float | None) -> None:
    method = make(name)
    case = batch()
    given = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    loss, _ = method.backward(*case, given)
    assert not loss.requires_grad
    own = [p.grad for p in method.parameters()]
    method.zero_grad()
    again = batch()
    forward = method(*again)
    torch.testing.assert_close(loss, forward.detach(), rtol=1e-12, atol=0)
    (forward * (scale or 1.0)).backward()
    for actual, expected in zip(grads(case[0]), grads(again[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    for actual, p in zip(own, method.parameters(), strict=True):
        assert actual.norm() > 0
        torch.testing.assert_close(actual, p.grad, rtol=1e-10, atol=1e-14)


ALL = [*CASES, ("fitnet", {}), ("at", {})]


@pytest.mark.parametrize(("name", "options"), ALL)
def test_ignored_rows_count_nowhere(name: str, options: dict) -> None:
    student, mentors, targets = batch()
    method = make(name, **options)
    loss, report = method.backward(student, mentors, targets)
    keep = [b for b in range(B) if b not in IGNORED_ROWS]

    def without(outputs: Outputs) -> Outputs:
        rest = [t.detach()[keep].requires_grad_() for t in inputs(outputs)]
        return Outputs(rest[0], tuple(rest[1:]))

    rest = without(student)
    with torch.inference_mode():
        others = [without(mentor) for mentor in mentors]
    expected, expected_report = method.backward(rest, others, targets[keep])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    if report is not None:
        for actual, value in zip(report, expected_report, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-14)
    for actual, value in zip(grads(student), grads(rest), strict=True):
        assert actual[list(IGNORED_ROWS)].eq(0).all()
        torch.testing.assert_close(actual[keep], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_without_a_row_that_counts_loss_and_gradient_are_0(name: str, options: dict) -> None:
    case = batch(ignored=tuple(range(B)))
    method = make(name, **options)
    loss, _ = method.backward(*case)
    assert loss.item() == 0
    assert all(grad.eq(0).all() for grad in grads(case[0]))
    assert all(p.grad.eq(0).all() for p in method.parameters())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_nonfinite_network_makes_the_loss_nan(name: str, options: dict) -> None:
    method = make(name, **options)
    student, mentors, targets = batch()
    with torch.no_grad():
        student.logits[0, 2] = math.nan
    assert method(student, mentors, targets).isnan()
    if name == "alone":
        return
    student, mentors, targets = batch()
    with torch.inference_mode():
        for tensor in inputs(mentors[0]) if method.uses_features else [mentors[0].logits]:
            tensor[0] = math.nan
    assert method(student, mentors, targets).isnan()


@pytest.mark.parametrize(("name", "options"), ALL)
def test_who_teaches(name: str, options: dict) -> None:
    method = make(name, **options)
    student, mentors, targets = batch()
    loss = method(student, mentors, targets)
    if method.single_mentor or name == "alone":
        assert torch.equal(method(student, mentors[:1], targets), loss)
    else:
        turned = method(student, mentors[::-1], targets)
        torch.testing.assert_close(turned, loss, rtol=1e-12, atol=0)
        assert not torch.equal(method(student, mentors[:1], targets), loss)


@pytest.mark.parametrize(("name", "options"), [case for case in ALL if case[0] != "classroom"])
def test_no_value_is_looked_at(name: str, options: dict) -> None:
    """On the meta device there are none, so a look or a shape that depends on one raises."""
    with torch.device("meta"):
        method = create(name, **options)
        method.prepare(SHAPES, [MENTOR_SHAPES])
        networks = [
            Outputs(
                torch.empty(B, C, requires_grad=True),
                tuple(torch.empty(B, *shape, requires_grad=True) for shape in shapes),
            )
            for shapes in (SHAPES, MENTOR_SHAPES)
        ]
        targets = torch.empty(B, dtype=torch.int64)
        loss, _ = method.backward(networks[0], networks[1:], targets, torch.empty(()))
    assert loss.shape == ()
    assert networks[0].logits.grad is not None
    assert all(tensor.grad is None for tensor in inputs(networks[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_cuda_graph_can_capture_a_step(name: str, options: dict) -> None:
    method = make(name, **options).float().cuda()
    student, mentors, targets = batch(dtype=torch.float32)

    def on_gpu(outputs: Outputs) -> Outputs:
        moved = [t.detach().cuda().requires_grad_(t.requires_grad) for t in inputs(outputs)]
        return Outputs(moved[0], tuple(moved[1:]))

    student, targets, scale = on_gpu(student), targets.cuda(), torch.tensor(2.0, device="cuda")
    with torch.inference_mode():
        mentors = [on_gpu(mentor) for mentor in mentors]
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            expected, _ = method.backward(student, mentors, targets, scale)
    torch.cuda.synchronize()
    expected_grad, student.logits.grad = student.logits.grad / 3, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = method.backward(student, mentors, targets, scale)
    graph.replay()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.logits.grad, expected_grad)


# The extremes of single methods.


def test_dkd_of_a_certain_teacher() -> None:
    """Where 1 − p_y vanishes in float32, the other classes' shares still count."""
    z_s, z_t = np.array([30.0, -150.0, -149.0, -152.0]), np.array([200.0, 3.0, 1.0, 0.0])
    targets = torch.tensor([0])
    student = Outputs(torch.tensor(z_s[None], dtype=torch.float32, requires_grad=True))
    teacher = Outputs(torch.tensor(z_t[None], dtype=torch.float32))
    method = create("dkd", temperature=1.0)
    loss, _ = method.backward(student, [teacher], targets)
    assert loss.item() == pytest.approx(dkd(z_s, [z_t], 0, temperature=1.0), rel=1e-5)
    assert student.logits.grad.isfinite().all()


def test_dkd_at_equal_logits_is_0_but_for_the_task() -> None:
    student, _, targets = batch()
    same = Outputs(student.logits.detach())
    loss = create("dkd", ce_weight=0.0)(student, [same], targets)
    assert abs(loss.item()) < 1e-14


def test_dkd_is_kd_where_its_beta_is_the_teachers_rest() -> None:
    student, mentors, targets = batch(rows=1, ignored=())
    rest = 1 - softmax(numpy_logits(mentors[0])[0], 4.0)[targets[0]]
    coupled = create("dkd", alpha=1.0, beta=float(rest), ce_weight=0.1)(student, mentors, targets)
    plain = create("kd", ce_weight=0.1, kd_weight=1.0)(student, mentors, targets)
    assert coupled.item() == pytest.approx(plain.item(), rel=1e-12)


CONSTANT = torch.tensor([[0.0], [5.0], [-300.0]]).expand(3, C)


@pytest.mark.parametrize("bits", [0, 1], ids=["equal", "but for a last bit"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("dist", {}), ("kd", {"standardise": True}), ("classroom", {"standardise": True})],
)
def test_what_is_constant_correlates_with_nothing(name: str, options: dict, bits: int) -> None:
    """Rows of a head that was initialised with zeros teach nothing of their rounding errors."""
    logits = CONSTANT.clone()
    for row in range(3):
        logits[row, row] = torch.nextafter(logits[row, row], 6.0 * logits[row, row])
    student = (logits if bits else CONSTANT.clone()).requires_grad_()
    teacher = torch.randn(3, C, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(3)
    off = {"task_weight": 0.0} if name == "classroom" else {"ce_weight": 0.0}
    for ours, theirs in ((student, teacher), (teacher.requires_grad_(), logits.detach())):
        method = create(name, **options, **off)
        loss, _ = method.backward(Outputs(ours), [Outputs(theirs)], targets)
        assert loss.isfinite()
        if name == "dist":  # nothing correlates, neither classes nor rows
            assert loss.item() == pytest.approx(4.0**2 * 4, rel=1e-6)
            assert not ours.grad.any()
    assert not student.grad.any()


def test_a_head_of_zeros_begins_with_the_task() -> None:
    _, mentors, targets = batch(dtype=torch.float32)
    logits = [torch.zeros(B, C, requires_grad=True) for _ in range(2)]
    for name, student in zip(("dist", "alone"), logits, strict=True):
        create(name).backward(Outputs(student), mentors, targets)
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["kd", "aver", "ca_mkd", "dtkd", "dkd"])
def test_float32_bears_every_temperature(name: str) -> None:
    """The KD terms alone are right to 1e-3, also where they are nearly nothing, and not below 0."""
    off = {} if name == "ca_mkd" else {"gamma" if name == "dtkd" else "ce_weight": 0.0}
    method = create(name, temperature=MAX_TEMPERATURE, **off)
    for classes in (2, 10, 1000, 30_000):
        for scale in (0.01, 1.0, 10.0):
            rng = torch.Generator().manual_seed(classes)
            student, teacher = scale * torch.randn(2, 4, classes, generator=rng)
            targets = torch.randint(classes, (4,), generator=rng)
            for mentor in (teacher, torch.nextafter(student, torch.zeros(()))):
                for row in range(4):
                    loss, exact = (
                        method(
                            Outputs(student[row : row + 1].to(dtype)),
                            [Outputs(mentor[row : row + 1].to(dtype))],
                            targets[row : row + 1],
                        )
                        for dtype in (torch.float32, torch.float64)
                    )
                    assert loss >= 0
                    assert abs(loss - exact) <= 1e-3 * exact.clamp_min(1.0)


def test_one_class() -> None:
    logits = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    teacher = Outputs(torch.ones(3, 1, dtype=torch.float64))
    for name in FORMULAS:
        loss, _ = create(name).backward(
            Outputs(logits), [teacher], torch.zeros(3, dtype=torch.int64)
        )
        # Of DIST the two weights are left, for no correlation is defined.
        assert loss.item() == (4.0**2 * 4 if name == "dist" else 0), name
    assert logits.grad.eq(0).all()


def test_standardisation_forgets_shift_and_scale() -> None:
    student, mentors, targets = batch(ignored=())
    moved = [Outputs(5 * mentor.logits - 7) for mentor in mentors]
    for name in ("kd", "classroom"):
        method = create(name, standardise=True)
        loss, other = method(student, mentors, targets), method(student, moved, targets)
        assert other.item() == pytest.approx(loss.item(), rel=1e-10)
        plain = create(name)
        assert plain(student, mentors, targets) != plain(student, moved, targets)


# The classroom.

CLASSROOMS = [
    {},
    {"ranking": "batch", "rank_decimals": 2},
    {"temperature": 4.0, "knowledge_filter": "none", "mentoring": "fixed", "task_weight": 0.5},
    {"mentor_weight": [0.5, 2.0, 1.0], "label_smoothing": 0.1, "reduction": "sum"},
]


@pytest.mark.parametrize("options", CLASSROOMS)
def test_the_classroom_is_classroom_loss(options: dict) -> None:
    student, mentors, targets = batch()
    scale = torch.tensor(3.0)
    loss, report = create("classroom", **options).backward(student, mentors, targets, scale)
    expected = ClassroomLoss(**options).loss_and_grad(
        student.logits, [m.logits for m in mentors], targets, scale=scale, return_report=True
    )
    assert torch.equal(loss, expected[0])
    assert torch.equal(student.logits.grad, expected[1])
    assert all(map(torch.equal, report, expected[2]))


def test_the_standardised_classrooms_gradient_and_report() -> None:
    temperature, n = 12.0, B - len(IGNORED_ROWS)
    student, mentors, targets = batch()
    _, report = create("classroom", standardise=True).backward(student, mentors, targets)
    shares, ranks, temperatures, kls = (np.zeros((M, B)) for _ in range(4))
    confidence, task, mentor_loss = [], [], 0.0
    for b, y in enumerate(targets.tolist()):
        if y == -100:
            continue
        s = numpy_logits(student)[b]
        u = z_score(s)
        kd_terms = np.zeros(C)
        vs = [z_score(numpy_logits(mentor)[b]) for mentor in mentors]
        p = [math.exp(-ce(z, y)) for z in (u, *vs)]
        r_s, *r = [M * value / sum(p) for value in p]
        for m, v in enumerate(vs):
            tau = 1 + temperature * abs(r[m] - r_s) / max(r[m], r_s)
            ranks[m, b], temperatures[m, b] = r[m], tau
            if r[m] >= r_s:
                shares[m, b], kls[m, b] = 1, kl(softmax(v, tau), softmax(u, tau))
                kd_terms += r[m] * tau * (softmax(u, tau) - softmax(v, tau))
                mentor_loss += r[m] * tau**2 * kls[m, b]
        deviation = math.sqrt(sum((s - s.mean()) ** 2) / C)
        jacobian = (np.eye(C) - 1 / C - np.outer(u, u) / C) / deviation
        confidence.append(math.exp(-ce(s, y)))
        task.append(ce(s, y))
        raw = confidence[-1] * (softmax(s) - np.eye(C)[y])
        expected = (jacobian @ kd_terms + raw) / n
        np.testing.assert_allclose(student.logits.grad[b].numpy(), expected, rtol=1e-9, atol=1e-14)
    assert 0 < shares.sum() < n * M
    expected = (
        shares.sum(1) / n,
        ranks.sum(1) / n,
        temperatures.sum(1) / n,
        kls.sum(1) / shares.sum(1).clip(1),
        sum(confidence) / n,
        sum(task) / n,
        mentor_loss / n,
    )
    for actual, value in zip(report, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), value, rtol=1e-7)


def test_the_standardised_classroom_with_batch_ranking() -> None:
    """The task's weight is the exponential of the mean over the batch, of raw logits."""
    student, mentors, targets = batch()
    options = {"ranking": "batch", "rank_decimals": 2, "label_smoothing": 0.1}
    loss, report = create("classroom", standardise=True, **options).backward(
        student, mentors, targets
    )
    valid = [b for b, y in enumerate(targets.tolist()) if y != -100]
    ells = []
    for b in valid:
        t = 0.9 * np.eye(C)[targets[b]] + 0.1 / C
        ells.append(sum(t * np.log(softmax(numpy_logits(student)[b]))))
    task = -math.exp(sum(ells) / len(ells)) * sum(ells) / len(ells)
    scores = [
        torch.tensor(np.array([z_score(numpy_logits(network)[b]) for b in valid]))
        for network in (student, *mentors)
    ]
    kd_terms = ClassroomLoss(task_weight=0.0, **options)(scores[0], scores[1:], targets[valid])
    assert loss.item() == pytest.approx(task + kd_terms.item(), rel=1e-10)
    assert report.student_confidence.item() == pytest.approx(math.exp(sum(ells) / len(ells)))


# Features.


def pooled(features: np.ndarray, height: int, width: int) -> np.ndarray:
    """[C, H, W] to [C, height, width], which divide H and W, by means over blocks."""
    channels, H, W = features.shape
    result = np.zeros((channels, height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * H // height, (i + 1) * H // height)
            columns = slice(j * W // width, (j + 1) * W // width)
            result[:, i, j] = features[:, rows, columns].mean((1, 2))
    return result


def pairs_of(student: Outputs, teacher: Outputs, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The last three stages' features, pooled to the smaller size, of one row."""
    pairs = []
    for back in (3, 2, 1):
        f, g = (o.features[-back][row].detach().numpy() for o in (student, teacher))
        size = min(f.shape[1], g.shape[1]), min(f.shape[2], g.shape[2])
        pairs.append((pooled(f, *size), pooled(g, *size)))
    return pairs


@pytest.mark.parametrize(
    ("stage", "beta", "ce_weight"), [(None, 100.0, 1.0), (1, 3.0, 0.2), (3, 1.0, 0)]
)
def test_fitnet_is_its_formula(stage: int | None, beta: float, ce_weight: float) -> None:
    student, mentors, targets = batch()
    method = make("fitnet", stage=stage, beta=beta, ce_weight=ce_weight)
    for parameter in (method.regressor.scale, method.regressor.shift):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    weight = method.regressor.conv.weight.detach().numpy()[:, :, 0, 0]
    scale, shift = (
        parameter.detach().numpy()[:, None]
        for parameter in (method.regressor.scale, method.regressor.shift)
    )
    counting = [b for b, y in enumerate(targets.tolist()) if y != -100]
    guesses, hints = {}, {}
    for b in counting:
        f, g = pairs_of(student, mentors[0], b)[(stage or 2) - 1]
        places = [(i, j) for i in range(f.shape[1]) for j in range(f.shape[2])]
        guesses[b] = np.stack([weight @ f[:, i, j] for i, j in places], 1)
        hints[b] = np.stack([g[:, i, j] for i, j in places], 1)
    everywhere = np.concatenate(list(guesses.values()), 1)
    middle, deviation = everywhere.mean(1), np.sqrt(everywhere.var(1) + 1e-5)
    rows = []
    for b in counting:
        normal = (guesses[b] - middle[:, None]) / deviation[:, None] * scale + shift
        own = ce(numpy_logits(student)[b], targets[b].item())
        rows.append(ce_weight * own + beta * np.mean((normal - hints[b]) ** 2))
    loss = method(student, mentors, targets)
    assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-10)


@pytest.mark.parametrize(("beta", "ce_weight"), [(1000.0, 1.0), (2.0, 0.3)])
def test_at_is_its_formula(beta: float, ce_weight: float) -> None:
    student, mentors, targets = batch()
    rows = []
    for b, y in enumerate(targets.tolist()):
        if y == -100:
            continue
        rows.append(ce_weight * ce(numpy_logits(student)[b], y))
        for pair in pairs_of(student, mentors[0], b):
            ours, theirs = (np.mean(features**2, 0).flatten() for features in pair)
            ours, theirs = (q / math.sqrt(sum(q * q)) for q in (ours, theirs))
            rows[-1] += beta * np.mean((ours - theirs) ** 2)
    loss = make("at", beta=beta, ce_weight=ce_weight)(student, mentors, targets)
    assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-10)


def test_stages_are_paired_from_the_last_whoever_has_more() -> None:
    student, mentors, targets = batch()
    method = make("at", ce_weight=0.0)
    loss = method(student, mentors, targets)
    assert method(mentors[0], [student], targets).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["fitnet", "at"])
def test_features_of_other_dtypes(name: str) -> None:
    student, mentors, targets = batch(dtype=torch.bfloat16)
    method = make(name)
    same = [
        Outputs(o.logits.detach().double(), tuple(f.detach().double() for f in o.features))
        for o in (student, *mentors)
    ]
    expected = method(same[0], same[1:], targets).item()
    loss, _ = method.float().backward(student, mentors, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert {grad.dtype for grad in grads(student)} == {torch.bfloat16}


def test_a_constant_map_has_a_gradient() -> None:
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    student = Outputs(torch.zeros(2, C, requires_grad=True), (features,))
    teacher = Outputs(torch.zeros(2, C), (torch.randn(2, 3, 4, 4),))
    create("at").backward(student, [teacher], torch.tensor([0, 1]))
    assert features.grad.isfinite().all()


def test_only_fitnet_has_parameters_and_they_fit_the_teacher() -> None:
    for name in names():
        shapes = sorted(tuple(p.shape) for p in make(name).parameters())
        assert shapes == ([(4,), (4,), (4, 3, 1, 1)] if name == "fitnet" else [])


def test_which_methods_need_what() -> None:
    made = {name: create(name) for name in names()}
    single = {"kd", "dtkd", "dkd", "dist", "fitnet", "at"}
    assert {name for name, method in made.items() if method.single_mentor} == single
    assert {name for name, method in made.items() if method.uses_features} == {"fitnet", "at"}
    assert {name for name, method in made.items() if method.reports} == {"classroom"}
    assert {name for name, method in made.items() if not method.soft_labels} == {"dkd"}


# Class probabilities.

SOFT = [(name, options) for name, options in ALL if name != "dkd"]


def probabilities(rows: int = B) -> Tensor:
    """Those of mixed images: two classes, of which one has 0 in the first row."""
    own = torch.linspace(1, 0.1, rows, dtype=torch.float64)[:, None]
    one_hot = torch.eye(C, dtype=torch.float64)
    classes = torch.arange(rows) % C
    return own * one_hot[classes] + (1 - own) * one_hot[(classes + 2) % C]


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "dkd"])
def test_of_class_probabilities_it_is_the_formulas(name: str, options: dict) -> None:
    student, mentors, _ = batch(ignored=())
    targets = probabilities()
    loss, _ = create(name, **options).backward(student, mentors, targets)
    expected = expected_loss(name, student, mentors, targets, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("name", "options"), SOFT)
def test_probability_one_is_the_index(name: str, options: dict) -> None:
    results = []
    for soft in (False, True):
        student, mentors, targets = batch(ignored=())
        given = torch.nn.functional.one_hot(targets, C).double() if soft else targets
        loss, _ = make(name, **options).backward(student, mentors, given)
        results.append([loss, *grads(student)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_a_class_that_is_ruled_out_and_has_no_share() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    loss = create("alone")(Outputs(logits), [], torch.tensor([[0.25, 0.0, 0.75]]))
    loss.backward()
    p = 1 / (1 + math.e)  # of class 0
    assert loss.item() == pytest.approx(-0.25 * math.log(p) - 0.75 * math.log(1 - p))
    torch.testing.assert_close(logits.grad, torch.tensor([[p - 0.25, 0.0, 0.25 - p]]))


@pytest.mark.parametrize(("name", "options"), [("at", {}), ("fitnet", {}), ("alone", {})])
def test_the_task_is_linear_in_the_probabilities(name: str, options: dict) -> None:
    student, mentors, _ = batch(rows=1, ignored=())
    method, targets = make(name, **options), probabilities(2)[1:]
    each = [method(student, mentors, torch.tensor([c])) for c in range(C)]
    expected = sum(t * loss for t, loss in zip(targets[0], each, strict=True))
    torch.testing.assert_close(method(student, mentors, targets), expected, rtol=1e-12, atol=0)


class OfIndices(Method):
    """A method of someone's own that looks up the class's logit."""

    soft_labels = False

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        return -student.logits.gather(1, targets[:, None]).mean()


@pytest.mark.parametrize("method", [create("dkd"), OfIndices()], ids=["DKD", "OfIndices"])
def test_class_probabilities_are_refused_where_a_method_needs_the_class(method: Method) -> None:
    student, mentors, targets = batch(ignored=())
    name = type(method).__name__
    for call in (method, method.backward):
        with pytest.raises(UserError, match=f"{name} takes class indices, not class probabilities"):
            call(student, mentors, probabilities())
        call(student, mentors, targets)


# Creation by name.


def test_names() -> None:
    expected = "alone classroom kd aver ca_mkd dtkd dkd dist fitnet at"
    assert names() == expected.split()
    with pytest.raises(UserError, match=r"^no method is called 'KDD'; .* names are kd, dkd, dtkd$"):
        create("KDD")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ca_mkd", {"alpa": 1}, " has no option 'alpa'; its options are temperature, alpha"),
        ("alone", {"temperature": 1}, " has no option 'temperature'; it has none"),
        ("kd", {"temperature": 0}, ": temperature must be a number above 0, at most 20, got 0"),
        ("at", {"beta": -1}, ": beta must be a number from 0 to 1e+06, got -1"),
        ("kd", {"standardise": 1}, ": standardise must be true or false, got 1"),
        ("fitnet", {"stage": 0}, ": stage must be a whole number of at least 1, got 0"),
        ("classroom", {"ranking": "x"}, ": ranking must be one of 'sample', 'batch', got 'x'"),
        ("classroom", {"temperature": "x"}, ": temperature must be a number, got str"),
        (
            *("classroom", {"reduction": "none"}),
            ": reduction must be 'mean' or 'sum' where a student is trained",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        create(name, **options)
    assert str(raised.value) == f"method {name}{message}"


@pytest.mark.parametrize("name", names())
def test_every_number_among_the_options_is_checked(name: str) -> None:
    options = method_names.entry(name).options
    for option, default in options.items():
        if not isinstance(default, float):
            continue
        for wrong in (-1, math.nan, math.inf, "4", True, None):
            with pytest.raises(UserError, match=f"^method {name}: {option} must"):
                create(name, **{option: wrong})


@pytest.mark.parametrize("name", names())
def test_descriptions_match_the_classes(name: str) -> None:
    """It reads them from the source, so that listing them takes no torch."""
    entry, method = method_names.entry(name), type(create(name))
    of_class = inspect.signature(method).parameters
    options = {p.name: p.default for p in of_class.values() if p.default is not p.empty}
    if name == "classroom":
        options |= {field.name: field.default for field in fields(LossOptions)}
        loss = inspect.signature(classroom_loss).parameters
        assert {option: loss[option].default for option in options if option != "standardise"} == {
            option: value for option, value in options.items() if option != "standardise"
        }
    assert entry.options == options
    assert list(entry.meanings) == list(options)
    assert all(entry.meanings.values())
    shown = [meaning for option, meaning in entry.meanings.items() if option != "process_group"]
    assert not any("ClassroomLoss" in meaning for meaning in shown)  # the reader is not in Python
    assert entry.single_mentor == method.single_mentor
    assert entry.loss in " ".join(method.__doc__.split())
    assert entry.title
    assert bool(entry.source) == (name != "alone")


def test_classroom_options_are_named() -> None:
    with pytest.raises(UserError, match="standardise, mentor_weight, process_group, temperature, "):
        create("classroom", temprature=3)


def test_a_stage_that_the_networks_lack() -> None:
    method = create("fitnet", stage=4)
    with pytest.raises(UserError) as raised:
        method.prepare(SHAPES, [MENTOR_SHAPES])
    assert str(raised.value) == (
        "method fitnet: stage must be at most 3 for networks of 3 and 4 stages, got 4"
    )
