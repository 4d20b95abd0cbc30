"""The bank: every mentor's own logits, however they were made fast."""

from __future__ import annotations

import copy
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.loss.fused import fused_classroom_loss_and_grad
from classroomkd.models import NetworkInfo, create
from classroomkd.models.layout import Renormalised
from classroomkd.training.mentor_bank import MentorBank
from zoo_weights import fill

CLASSES = 10
DATA = NetworkInfo("", [], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)
OWN = NetworkInfo("", [], (0.3, 0.4, 0.5), (0.4, 0.2, 0.3), 16)


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def classroom() -> dict[str, nn.Module]:
    """Norms that fold and norms that stay, other statistics, and a network of torchvision."""
    built = {name: fill(create(name, CLASSES)) for name in ("resnet8", "wrn_16_1", "shufflenetv2")}
    built["resnet8-2"] = Renormalised(fill(create("resnet8", CLASSES)), DATA, OWN)
    built["tv:resnet18"] = fill(create("tv:resnet18", CLASSES))
    return built


@torch.no_grad()
def own_logits(mentors: dict[str, nn.Module], batch: Tensor) -> list[Tensor]:
    return [copy.deepcopy(mentor).eval()(batch) for mentor in mentors.values()]


def logits_of(bank: MentorBank, batch: Tensor) -> list[Tensor]:
    return [outputs.logits for outputs in bank(batch)]


def test_logits_are_the_mentors_own_in_their_order() -> None:
    mentors = classroom()
    states = {name: copy.deepcopy(mentor.state_dict()) for name, mentor in mentors.items()}
    bank = MentorBank(mentors, CLASSES, device="cpu")
    assert (len(bank), bank.names) == (5, list(mentors))
    for batch in (images(), images(3, seed=1).double()):
        logits = logits_of(bank, batch)
        for ours, theirs in zip(logits, own_logits(mentors, batch.float()), strict=True):
            assert (ours.dtype, ours.is_contiguous()) == (torch.float32, True)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    first = logits_of(bank, images())
    kept = [rows.clone() for rows in first]
    bank(images(seed=1))
    assert all(map(torch.equal, first, kept))  # fresh tensors
    for name, mentor in mentors.items():  # the mentors themselves are as they were
        assert all(module.training for module in mentor.modules())
        assert all(parameter.requires_grad for parameter in mentor.parameters())
        assert all(torch.equal(states[name][n], t) for n, t in mentor.state_dict().items())


def test_rows_do_not_depend_on_their_neighbours_nor_logits_on_the_students_autocast() -> None:
    bank = MentorBank(classroom(), CLASSES, device="cpu")
    whole, part = logits_of(bank, images()), logits_of(bank, images()[:1])
    for rows, row in zip(whole, part, strict=True):  # in train mode they would
        torch.testing.assert_close(rows[:1], row, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, logits_of(bank, images()), whole))


# The smallest network of each family and the deepest.
@pytest.mark.parametrize(
    "name",
    [
        *("resnet8", "resnet8x4", "resnet34", "resnet110", "wrn_16_1", "vgg8"),
        *("mobilenetv2", "shufflenetv1", "shufflenetv2"),
    ],
)
def test_bfloat16_is_close_to_float32(name: str) -> None:
    """Each number is the worst of the zoo, rounded up: half of it is the rounding of the logits."""
    mentor = fill(create(name))
    exact = own_logits({name: mentor}, images(16))[0]
    bank = MentorBank({name: mentor}, 100, device="cpu", dtype=torch.bfloat16)
    (logits,) = logits_of(bank, images(16))
    assert logits.dtype == torch.bfloat16
    rounded = logits.clone().float()
    assert (rounded - exact).norm() / exact.norm() < 0.006
    # As peaked as a trained network's: of standard deviation 3.
    p, q = (3 * rows / exact.std() for rows in (exact, rounded))
    kl = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none")
    assert kl.sum(1).mean() < 3e-4
    best = exact.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 2**-6 * exact.abs().amax(1)
    assert clear.any()
    assert torch.equal(rounded.argmax(1)[clear], exact.argmax(1)[clear])


def test_bfloat16_of_other_mentors_and_norms() -> None:
    mentors = classroom()
    bank = MentorBank(mentors, CLASSES, device="cpu", dtype=torch.bfloat16)
    for ours, theirs in zip(logits_of(bank, images()), own_logits(mentors, images()), strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.02
    for network in bank._networks:
        for module in network.modules():
            is_norm = isinstance(module, nn.BatchNorm2d)
            for tensor in module._parameters.values():
                expected = torch.float32 if is_norm else torch.bfloat16
                assert tensor is None or (tensor.dtype, tensor.requires_grad) == (expected, False)
    assert any(isinstance(module, nn.BatchNorm2d) for module in bank._networks[1].modules())
    conv = bank._networks[0].layer1[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_wrong_class_count_is_named() -> None:
    mentors = {"good": fill(create("resnet8", 7)), "bad": fill(create("resnet8", CLASSES))}
    bank = MentorBank(mentors, 7, device="cpu")
    with pytest.raises(UserError, match=r"mentor bad returns logits of shape \[4, 10\].* 7 cl"):
        bank(images())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.float16"):
        MentorBank({}, CLASSES, device="cpu", dtype=torch.float16)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_mentors_give_the_same_logits() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    mentors = {"small": fill(nn.Sequential(*layers, nn.Linear(8, CLASSES)))}
    (logits,) = logits_of(MentorBank(mentors, CLASSES, device="cpu", compile=True), images())
    torch.testing.assert_close(
        logits.clone(), own_logits(mentors, images())[0], rtol=1e-4, atol=1e-5
    )


class FakeStream:
    """Notes what waits for what, and which stream each mentor runs on."""

    current: FakeStream

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))


def test_streams_fork_from_the_current_one_and_join_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, ...]] = []
    current = FakeStream("current", log)
    stack = [current]

    @contextmanager
    def on_stream(stream: FakeStream):
        stack.append(stream)
        yield
        stack.pop()

    fakes = SimpleNamespace(current_stream=lambda _: stack[-1], stream=on_stream)
    mentors = {name: nn.Flatten() for name in "abc"}
    bank = MentorBank(mentors, 3 * 16 * 16, device="cpu")
    bank._streams = [FakeStream(name, log) for name in "123"]
    for network in bank._networks:
        network.register_forward_hook(lambda *_: log.append((stack[-1].name, "runs")))
    monkeypatch.setattr(torch, "cuda", fakes)
    assert all(torch.equal(rows, images().flatten(1)) for rows in logits_of(bank, images()))
    for name in "123":
        waits, runs = log.index((name, "waits for", "current")), log.index((name, "runs"))
        assert waits < runs < log.index(("current", "waits for", name))
    # None waits for another: the current stream joins only after the last has started.
    assert [event[0] for event in log][-3:] == ["current"] * 3


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_give_what_one_stream_gives(cuda: str, dtype: torch.dtype) -> None:
    bank = MentorBank(classroom(), CLASSES, device=cuda, dtype=dtype)
    batches = [images(64, seed).to(cuda) for seed in range(20)]
    side_by_side = [[rows.clone() for rows in logits_of(bank, batch)] for batch in batches]
    bank._streams = None
    for batch, logits in zip(batches, side_by_side, strict=True):
        for ours, theirs in zip(logits, logits_of(bank, batch), strict=True):
            torch.testing.assert_close(ours, theirs.clone(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_never_waits_for_the_gpu_and_can_be_captured(cuda: str) -> None:
    bank = MentorBank(classroom(), CLASSES, device=cuda, dtype=torch.bfloat16)
    batch, targets = images(64).to(cuda), torch.arange(64, device=cuda) % CLASSES
    student = images(64, 9).to(cuda)[:, 0, 0, :CLASSES].contiguous()

    def step() -> list[Tensor]:
        logits = logits_of(bank, batch)
        return [*logits, *fused_classroom_loss_and_grad(student, logits, targets)]

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(), step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        batch.copy_(images(64, seed))
        graph.replay()
        for ours, theirs in zip(captured, step(), strict=True):
            torch.testing.assert_close(ours.clone(), theirs.clone(), rtol=1e-3, atol=1e-3)
