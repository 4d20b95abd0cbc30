"""The loss of linear heads against the same loss of whole logits."""

import gc
import weakref

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from classroomkd import classroom_loss, fused_linear_classroom_loss
from classroomkd.loss import cut_vocabulary, fused, linear_operators
from classrooms import OPTIONS
from processes import context, group_of_two

N, V, H = 13, 37, 8


def heads(dtype=torch.float32, device="cpu", n_rows=N, seed=0):
    """A student's head, and three mentors: a head, one with a bias and another size, and logits."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=rng)).to(device, dtype)

    student = [part.requires_grad_() for part in (randn(n_rows, H), randn(V, H), randn(V))]
    mentors = [
        (randn(n_rows, H), randn(V, H, scale=1.5)),
        (randn(n_rows, 5), randn(V, 5, scale=2.0), randn(V)),
        randn(n_rows, V, scale=3.0),
    ]
    targets = torch.randint(V, (n_rows,), generator=rng).to(device)
    targets[[1, n_rows - 1]] = -100
    return student, mentors, targets


def logits_of(mentors, dtype):
    return [
        mentor.to(dtype)
        if isinstance(mentor, torch.Tensor)
        else linear(*(part.to(dtype) for part in mentor))
        for mentor in mentors
    ]


def whole(student, mentors, targets, dtype=torch.float64, **options):
    """Loss, report and gradients of whole logits by definition, in that precision."""
    leaves = [part.detach().to(dtype).requires_grad_() for part in student]
    loss, report = classroom_loss(
        linear(*leaves), logits_of(mentors, dtype), targets, return_report=True, **options
    )
    return loss, report, leaves


def assert_right(student, mentors, targets, tolerance, **options):
    """Loss, report and gradients, for an incoming gradient that is no 1."""
    targets = torch.where(targets == -100, options.get("ignore_index", -100), targets)
    call = {"student_bias": student[2], "return_report": True} | options
    options = {key: value for key, value in options.items() if key != "chunk_rows"}
    loss, report = fused_linear_classroom_loss(*student[:2], mentors, targets, **call)
    expected, expected_report, leaves = whole(student, mentors, targets, **options)
    factor = -1.5 * torch.arange(1, 1 + loss.numel(), device=loss.device).reshape(loss.shape)
    grads = torch.autograd.grad((loss * factor).sum(), student)
    expected_grads = torch.autograd.grad((expected * factor).sum(), leaves)
    pairs = [(loss, expected), *zip(report, expected_report, strict=True)]
    for got, truth in [*pairs, *zip(grads, expected_grads, strict=True)]:
        assert (got.double() - truth).norm() <= tolerance * (truth.norm() + 0.01)
    for grad, part in zip(grads, student, strict=True):
        assert grad.dtype == part.dtype


@pytest.mark.parametrize(
    ("name", "chunk_rows"),
    [
        *((name, 5) for name in OPTIONS),
        *((name, rows) for name in ("defaults", "batch", "rows") for rows in (1, N, 100)),
    ],
)
def test_whole_logits_in_float64(name, chunk_rows):
    assert_right(*heads(torch.float64), 1e-11, chunk_rows=chunk_rows, **OPTIONS[name])


# Every option on the passes that take no time; what the kernels make of it has tests of its own.
ON_DEVICES = [("cpu", name) for name in OPTIONS]
ON_DEVICES += [pytest.param("gpu", name, marks=pytest.mark.gpu) for name in OPTIONS]
for name in ("defaults", "batch", "correct_and_better", "dtkd", "rows", "smoothed_batch_dtkd"):
    ON_DEVICES += [("interpreter", name), pytest.param("ptx", name, marks=pytest.mark.ptx)]


@pytest.mark.parametrize(("device", "name"), ON_DEVICES, indirect=["device"])
def test_whole_logits(device, name):
    assert_right(*heads(device=device), 1e-5, chunk_rows=5, **OPTIONS[name])


@pytest.mark.parametrize("name", ["defaults", "batch", "rows"])
def test_bfloat16_is_no_worse_than_whole_logits(device, name):
    """Gradients at hidden states, weight and bias, against those of whole bfloat16 logits."""
    errors = torch.zeros(2, 3)
    # What differs from device to device are the logits' gradients; the products are PyTorch's.
    for seed in range(2 if fused._INTERPRET else 8):
        student, mentors, targets = heads(torch.bfloat16, device, n_rows=24, seed=seed)
        options = OPTIONS[name]
        # The logits of the truth are those that both have, rounded to bfloat16.
        exact = [logits.double() for logits in logits_of(mentors, torch.bfloat16)]
        leaves = [part.detach().double().requires_grad_() for part in student]
        logits = linear(*leaves)
        rounded = linear(*student).detach().double() - logits.detach()
        classroom_loss(logits + rounded, exact, targets, **options).sum().backward()
        loss = fused_linear_classroom_loss(
            *student[:2], mentors, targets, student_bias=student[2], chunk_rows=7, **options
        )
        chunked = torch.autograd.grad(loss.sum(), student)
        loss = classroom_loss(
            linear(*student), logits_of(mentors, torch.bfloat16), targets, **options
        )
        usual = torch.autograd.grad(loss.sum(), student)
        for row, grads in enumerate((chunked, usual)):
            for column, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
                errors[row, column] += (grad.double() - leaf.grad).norm() / leaf.grad.norm()
    assert (errors[0] <= 1.1 * errors[1]).all(), errors


def test_ignored_rows_may_hold_anything(device):
    student, mentors, targets = heads(device=device)
    ignored = targets == -100
    with torch.no_grad():
        student[0][ignored] = torch.nan
        mentors[0][0][ignored] = torch.inf
    loss = fused_linear_classroom_loss(*student[:2], mentors, targets, student_bias=student[2])
    grads = torch.autograd.grad(loss, student)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][ignored] == 0).all()
    kept = [
        mentor[~ignored] if isinstance(mentor, torch.Tensor) else (mentor[0][~ignored], *mentor[1:])
        for mentor in mentors
    ]
    expected = fused_linear_classroom_loss(
        student[0][~ignored], student[1], kept, targets[~ignored], student_bias=student[2]
    )
    torch.testing.assert_close(loss, expected)


def test_ignored_rows_are_not_computed(monkeypatch):
    """Where the targets are on the CPU: the rows of the products are those that count."""
    student, mentors, targets = heads()
    targets[4:] = -100
    rows = []

    def spy(hidden, *head):
        rows.append(len(hidden))
        return linear(hidden, *head)

    monkeypatch.setattr(linear_operators, "linear", spy)
    fused_linear_classroom_loss(*student[:2], mentors[:1], targets)
    assert rows == [3, 3]


def test_no_valid_row(device):
    student, mentors, targets = heads(device=device)
    loss, report = fused_linear_classroom_loss(
        *student[:2], mentors, torch.full_like(targets, -100), return_report=True
    )
    loss.backward()
    assert loss == 0
    assert all((value == 0).all() for value in report)
    assert (student[0].grad == 0).all()
    assert (student[1].grad == 0).all()


def test_sequences(device):
    """Leading dimensions are rows, and reduction "none" has the targets' shape."""
    student, mentors, targets = heads(device=device, n_rows=12)
    flat = fused_linear_classroom_loss(*student[:2], mentors[:1], targets, reduction="none")
    mentor = (mentors[0][0].view(3, 4, H), mentors[0][1])
    loss = fused_linear_classroom_loss(
        student[0].view(3, 4, H), student[1], [mentor], targets.view(3, 4), reduction="none"
    )
    assert loss.tolist() == flat.view(3, 4).tolist()


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """The most bytes that tensors hold at once, without what each row has in inputs and outputs."""

    class Peak(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live, self.peak = 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf._base is None and leaf.numel() > V:
                    storage, size = leaf.untyped_storage(), leaf.untyped_storage().nbytes()
                    if storage.data_ptr() not in known:
                        known.add(storage.data_ptr())
                        self.live += size
                        weakref.finalize(storage, self._free, storage.data_ptr(), size)
            self.peak = max(self.peak, self.live)
            return result

        def _free(self, pointer, size):
            known.discard(pointer)
            self.live -= size

    # What runs below an operator is hidden from the mode; autograd is off there.
    monkeypatch.setattr(linear_operators, "loss", torch.no_grad()(linear_operators._loss))
    peaks = []
    for n_rows in (64, 512):
        student, mentors, targets = heads(n_rows=n_rows)
        given = tree_leaves([student, mentors, targets])
        known = {part.untyped_storage().data_ptr() for part in given}
        gc.collect()
        with Peak() as mode:
            fused_linear_classroom_loss(*student[:2], mentors[:2], targets, chunk_rows=16)
        # A row has its gradient, its target and the number of it among those that count.
        peaks.append(mode.peak - n_rows * (4 * H + 8 + 8))
    assert peaks[1] <= 1.05 * peaks[0]
    logits_and_grad = 4 * 16 * V * 4
    assert peaks[1] < 1.5 * (logits_and_grad + 2 * V * H * 4)


def test_chunk_rows_follow_the_budget():
    from classroomkd.loss.linear import _Head, _rows_per_chunk

    student = _Head(torch.empty(9, 4, dtype=torch.bfloat16), torch.empty(1000, 4), None)
    mentors = [[torch.empty(9, 4), torch.empty(1000, 4)], [torch.empty(9, 1000)]]
    assert _rows_per_chunk(None, 2**20, student, mentors, None) == 2**20 // (1000 * (2 + 2 + 4))
    assert _rows_per_chunk(None, 1, student, mentors, None) == 1
    assert _rows_per_chunk(None, 2**20, student, mentors, torch.float16) == 2**20 // 6000


def test_compile(device):
    backend = "aot_eager" if fused._INTERPRET else "inductor"
    student, mentors, targets = heads(device=device)

    def step(hidden, weight, mentors, targets):
        return fused_linear_classroom_loss(
            2 * hidden, weight, mentors, targets, chunk_rows=5, return_report=True
        )

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        loss, report = function(*student[:2], mentors, targets)
        results.append([loss.detach(), *report, *torch.autograd.grad(loss, student[:2])])
    torch.testing.assert_close(*results)


def test_autocast(device):
    """Products in bfloat16, gradients in the parameters' own dtype."""
    student, mentors, targets = heads(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = fused_linear_classroom_loss(*student[:2], mentors, targets, chunk_rows=5)
    low = [part.detach().bfloat16().requires_grad_() for part in student]
    low_mentors = [
        mentor if isinstance(mentor, torch.Tensor) else tuple(part.bfloat16() for part in mentor)
        for mentor in mentors
    ]
    expected = fused_linear_classroom_loss(*low[:2], low_mentors, targets, chunk_rows=5)
    assert loss.item() == expected.item()
    grads = torch.autograd.grad(loss, student[:2])
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    for grad, other in zip(grads, torch.autograd.grad(expected, low[:2]), strict=True):
        torch.testing.assert_close(grad.bfloat16(), other)


def test_tied_embeddings_accumulation_and_checkpointing(device):
    """A weight that is also the embedding, two micro-batches, recomputed activations."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(V, H, device=device)
    tokens = torch.randint(V, (2, N), device=device)
    _, mentors, targets = heads(device=device)

    def loss_of(part, function):
        hidden = checkpoint(lambda ids: embedding(ids).tanh(), tokens[part], use_reentrant=False)
        return function(hidden, embedding.weight)

    def fused(hidden, weight):
        return fused_linear_classroom_loss(hidden, weight, mentors, targets, chunk_rows=4)

    def usual(hidden, weight):
        return classroom_loss(linear(hidden, weight), logits_of(mentors, torch.float32), targets)

    grads = []
    for function in (fused, usual):
        embedding.weight.grad = None
        for part in range(2):
            (loss_of(part, function) / 2).backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_frozen_parts_get_no_gradient(device):
    student, mentors, targets = heads(device=device)
    student[1].requires_grad_(False)
    loss = fused_linear_classroom_loss(*student[:2], mentors, targets)
    loss.backward()
    assert student[1].grad is None
    assert student[0].grad.norm() > 0
    with torch.no_grad():
        assert not fused_linear_classroom_loss(*student[:2], mentors, targets).requires_grad


def test_second_derivatives_raise(device):
    student, mentors, targets = heads(device=device)
    loss = fused_linear_classroom_loss(*student[:2], mentors, targets)
    (grad,) = torch.autograd.grad(loss, student[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_vocabularies_that_differ():
    student, mentors, targets = heads()
    padded = [
        (mentors[0][0], torch.cat([mentors[0][1], torch.full((3, H), 9.0)])),
        torch.nn.functional.pad(mentors[2], (0, 3), value=9.0),
    ]
    with pytest.raises(ValueError, match=r"mentors\[0\] has 40 classes, the student 37.*cut_voc"):
        fused_linear_classroom_loss(*student[:2], padded, targets)
    cut = [cut_vocabulary(mentor, V) for mentor in padded]
    loss = fused_linear_classroom_loss(*student[:2], cut, targets)
    assert loss == fused_linear_classroom_loss(*student[:2], [mentors[0], mentors[2]], targets)
    with pytest.raises(ValueError, match="37 classes cannot be cut to 40"):
        cut_vocabulary(mentors[0], 40)


def test_the_students_vocabulary_may_be_the_padded_one():
    student, mentors, targets = heads()
    loss = fused_linear_classroom_loss(*student[:2], mentors, targets)
    (expected,) = torch.autograd.grad(loss, student[1])
    weight = torch.cat([student[1].detach(), torch.ones(3, student[1].shape[1])]).requires_grad_()
    hidden, cut, _ = cut_vocabulary((student[0], weight), V)
    fused_linear_classroom_loss(hidden, cut, mentors, targets).backward()
    assert torch.equal(weight.grad[:V], expected)
    assert not weight.grad[V:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mentors": []}, "at least one mentor"),
        ({"targets": torch.zeros(N + 1, dtype=torch.int64)}, r"targets must .* shape \[13\]"),
        ({"targets": torch.zeros(N)}, "targets must be class indices"),
        ({"chunk_rows": 0}, "chunk_rows must be an integer of at least 1, got 0"),
        ({"memory_budget": 0}, "memory_budget must be an integer of at least 1, got 0"),
        ({"memory_budget": 1e6}, "memory_budget must be an integer of at least 1, got 1000000.0"),
        ({"targets": [0] * N}, "targets must be a tensor, got list"),
        ({"student_bias": torch.zeros(V + 1)}, r"student_bias must have shape \[37\]"),
        ({"student_weight": torch.zeros(V, H + 1)}, r"student_weight must have shape \[V, H\]"),
        ({"student_weight": torch.zeros(V, H).half()}, "student_weight must have the dtype"),
        ({"mentors": [(torch.zeros(N, H),)]}, r"mentors\[0\] must be logits .* got tuple of 1"),
        ({"mentors": [None]}, r"mentors\[0\] must be logits .* got NoneType"),
        ({"mentors": (torch.zeros(N, 9), torch.zeros(V, 9))}, r"a single head is \[\(hidden, w"),
        ({"mentors": iter([torch.zeros(N, V)])}, "mentors must be a sequence"),
        (
            {"mentors": [(torch.zeros(N, H), torch.nn.Linear(H, V))]},
            r"mentors\[0\]\[1\] must be a tensor of shape \[V, H\], got Linear",
        ),
        ({"mentors": [torch.zeros(N + 1, V)]}, r"mentors\[0\] must have rows \[13\]"),
        ({"mentor_weight": torch.ones(2)}, r"mentor_weight must have shape \[1\]"),
    ],
)
def test_bad_input(change, message):
    student, mentors, targets = heads()
    call = {
        "student_hidden": student[0],
        "student_weight": student[1],
        "mentors": mentors[:1],
        "targets": targets,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        fused_linear_classroom_loss(**call | change)


class Tied(torch.nn.Module):
    """A student whose embedding is its head too; its forward pass is the loss, as DDP wants."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)

    def forward(self, tokens, mentors, targets, **options):
        hidden = self.body(self.embedding(tokens)).tanh()
        return fused_linear_classroom_loss(
            hidden, self.embedding.weight, mentors, targets, chunk_rows=4, **options
        )


def tied_gradients(model, rows, **options):
    """Gradients of the sum over some of 2 N rows, of which different numbers do not count."""
    _, mentors, targets = heads(n_rows=2 * N)
    tokens = torch.randint(V, (2 * N,), generator=torch.Generator().manual_seed(1))
    targets[2:6] = -100
    mentors = [
        mentor[rows] if isinstance(mentor, torch.Tensor) else (mentor[0][rows], *mentor[1:])
        for mentor in mentors
    ]
    model.zero_grad()
    model(tokens[rows], mentors, targets[rows], reduction="sum", **options).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def one_of_two_processes(rank, folder):
    with group_of_two(rank, folder):
        save_gradients(rank, folder)


def save_gradients(rank, folder):
    model = torch.nn.parallel.DistributedDataParallel(Tied())
    rows = slice(rank * N, (rank + 1) * N)
    found = {
        "sample": tied_gradients(model, rows),
        "batch": tied_gradients(
            model, rows, ranking="batch", process_group=distributed.group.WORLD
        ),
    }
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path, monkeypatch):
    """DDP averages them over the processes: half the gradients of the sum over all rows."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context()
    multiprocessing.start_processes(
        one_of_two_processes, (str(tmp_path),), 2, start_method="forkserver"
    )
    for ranking in ("sample", "batch"):
        expected = [grad / 2 for grad in tied_gradients(Tied(), slice(None), ranking=ranking)]
        for rank in range(2):
            grads = torch.load(tmp_path / f"{rank}.pt")[ranking]
            torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
