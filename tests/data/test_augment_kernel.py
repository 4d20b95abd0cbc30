"""The kernel of the resident loader, bit by bit against one pixel after another in plain Python."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from classroomkd.data.augmentation import AUGMENT, CUTOUT, normalisation_table, stream_key
from processes import context
from slow_augmentation import SEEDS, slow_augment, slow_cutout

pytest.importorskip("triton", "3.3", reason="needs Triton 3.3")
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from classroomkd.kernels import augment
from classroomkd.kernels.ahead_of_time import compile_augmentation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # black is a value of its own
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
BIG_SEED, BIG_EPOCH = 2**64 - 3, 2**31 + 7


class Recipe(NamedTuple):
    """An augmentation in an epoch."""

    padding: int = 4
    flip: bool = True
    cutout: int = 0
    seed: int = 0
    epoch: int = 0

    def run(self, images, targets, order, table):
        """Launch."""
        return augment.gather_augment(
            images,
            targets,
            order,
            table,
            padding=self.padding,
            flip=self.flip,
            cutout=self.cutout,
            augment_key=stream_key(AUGMENT, self.seed, self.epoch),
            cutout_key=stream_key(CUTOUT, self.seed, self.epoch),
        )

    def slow(self, image, index, table):
        """One image of a batch, [H, W, 3], as bits."""
        image = slow_augment(image, self.padding, self.flip, self.seed, self.epoch, index)
        erased = slow_cutout(image.shape, self.cutout, self.seed, self.epoch, index)
        table = bits(table).numpy()
        result = np.empty(image.shape, table.dtype)
        for (y, x, channel), value in np.ndenumerate(image):
            result[y, x, channel] = 0 if erased[y, x] else table[channel, value]
        return result


def bits(tensor):
    """Tell apart what == does not: 0 from −0."""
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def make_set(count, height, width, seed=0):
    """Images without a black pixel, and targets that fill 64 bits."""
    generator = np.random.default_rng(seed)
    images = generator.integers(1, 256, (count, height, width, 3), dtype=np.uint8)
    targets = generator.integers(-(2**63), 2**63, count, dtype=np.int64)
    return torch.from_numpy(images), torch.from_numpy(targets)


def make_table(dtype):
    return torch.from_numpy(normalisation_table(MEAN, STD)).to(dtype)


def check(device, recipe, images, targets, order, dtype):
    """The launch's bits, place in memory and targets are those of the slow way."""
    table = make_table(dtype)
    got, got_targets = recipe.run(images.to(device), targets.to(device), order, table.to(device))
    order = order.cpu()
    assert got.shape == (len(order), 3, *images.shape[1:3])
    assert got.dtype == dtype
    assert got.permute(0, 2, 3, 1).is_contiguous()
    assert torch.equal(got_targets.cpu(), targets[order])
    got = bits(got.permute(0, 2, 3, 1)).cpu().numpy()
    for place, index in enumerate(order.tolist()):
        expected = recipe.slow(images[index].numpy(), index, table)
        np.testing.assert_array_equal(got[place], expected, f"sample {index} at {place}")


SIZES = [(1, 1), (5, 7), (8, 8), (16, 16), (32, 32), (33, 31), (2, 40), (12, 100)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_bit_is_that_of_the_slow_way(device, size, dtype):
    """Stores of each width, images of one program and of two, programs that overhang."""
    images, targets = make_set(3, *size)
    order = torch.tensor([2, 0, 2, 1], device=device)
    recipes = (
        Recipe(padding=4, flip=True, cutout=max(1, size[1] // 2)),
        Recipe(padding=0, flip=True),
        Recipe(padding=1, flip=False, seed=BIG_SEED, epoch=BIG_EPOCH),
        Recipe(padding=0, flip=False, cutout=0),
    )
    first = (SIZES.index(size) + DTYPES.index(dtype)) % 2  # each with each size, and each dtype
    for recipe in recipes[first::2]:
        check(device, recipe, images, targets, order, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@settings(
    max_examples=200 if torch.cuda.is_available() else 60,
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 20),
    recipe=st.builds(
        Recipe,
        padding=st.integers(0, 30),
        flip=st.booleans(),
        cutout=st.integers(0, 40),
        seed=SEEDS,
        epoch=st.integers(0, 2**32 - 1),
    ),
    order=st.lists(st.integers(0, 4), max_size=6),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size_augmentation_and_order(device, height, width, recipe, order, step, dtype):
    """Duplicates, no sample at all, and orders whose entries are not neighbours."""
    images, targets = make_set(5, height, width, recipe.seed)
    spread = torch.full((len(order) * step,), 4)
    spread[::step] = torch.tensor(order, dtype=torch.int64)
    check(device, recipe, images, targets, spread.to(device)[::step], dtype)


def test_a_batch_does_not_depend_on_how_the_order_is_cut(device):
    images, targets = (tensor.to(device) for tensor in make_set(9, 6, 10))
    table = make_table(torch.bfloat16).to(device)
    order = torch.tensor([4, 8, 1, 0, 7, 2, 3, 6, 5], device=device)
    recipe = Recipe(padding=2, cutout=3)
    whole = recipe.run(images, targets, order, table)
    parts = [
        recipe.run(images, targets, part, table) for part in (order[:1], order[1:6], order[6:])
    ]
    for tensor, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(pieces))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_sample(device, dtype):
    images, targets = (tensor.to(device) for tensor in make_set(2, 4, 6))
    order = torch.empty(0, dtype=torch.int64, device=device)
    got, got_targets = Recipe().run(images, targets, order, make_table(dtype).to(device))
    assert got.shape == (0, 3, 4, 6)
    assert got.dtype == dtype
    assert got_targets.shape == (0,)


def test_images_beyond_two_gigabytes(device):
    """The last of 2³¹ bytes and more; on the CPU, memory never written costs none."""
    count = 2**31 // (32 * 32 * 3) + 2
    images = torch.from_numpy(np.zeros((count, 32, 32, 3), np.uint8)).to(device)
    last, _ = make_set(1, 32, 32)
    images[-1] = last[0].to(device)
    targets = torch.arange(count, device=device)
    table = make_table(torch.float32)
    order = torch.tensor([count - 1], device=device)
    got, got_targets = Recipe().run(images, targets, order, table.to(device))
    expected = Recipe().slow(last[0].numpy(), count - 1, table)
    np.testing.assert_array_equal(bits(got.permute(0, 2, 3, 1))[0].cpu().numpy(), expected)
    assert got_targets.item() == count - 1


def test_no_epoch_and_no_batch_compiles_anew(monkeypatch):
    """What Triton tells compilations apart by, for launches that may not differ and one that does.

    Odd batches begin at addresses that 16 does not always divide; keys may be 0, 1, multiples of
    16, and beyond the signed 32-bit numbers.
    """
    kernel = augment.gather_augment_kernel
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    calls = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append(str(bind(*args, **options)[1]))

    monkeypatch.setattr(augment, "gather_augment_kernel", Recorder())
    images, targets = make_set(8, 4, 4)
    order = torch.arange(64)

    def launch(start, key, padding):
        augment.gather_augment(
            *(images, targets, order[start : start + 7], make_table(torch.float32)),
            **{"padding": padding, "flip": True, "cutout": 2},
            **{"augment_key": key, "cutout_key": 2**32 - 1 - key},
        )

    for batch, key in enumerate((0, 1, 16, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1)):
        launch(7 * batch, key, padding=2)
    assert len(calls) == 7
    assert len(set(calls)) == 1
    launch(0, 0, padding=3)
    assert len(set(calls)) == 2


@pytest.fixture(scope="module")
def fresh_processes():
    """Processes that compile, since this one may be interpreting the kernels."""
    with ProcessPoolExecutor(2, mp_context=context()) as pool:
        yield pool


CASES = [
    (32, 32, {"dtype": "fp32"}, {16: 6}),
    (32, 32, {"dtype": "bf16", "cutout": 16}, {16: 3}),
    (32, 32, {"dtype": "fp16", "padding": 0, "flip": False}, {16: 3}),
    (224, 224, {"dtype": "bf16"}, {16: 3}),
    (28, 28, {"dtype": "bf16"}, {8: 6}),  # rows are multiples of 8 bytes
    (33, 31, {"dtype": "fp32"}, {4: 24}),  # of 4
]


@pytest.mark.parametrize("target", TARGETS)
def test_each_byte_is_read_once_and_stores_are_wide(fresh_processes, target):
    """A thread has 24 elements, whatever the image's size."""
    # The older and the newer of NVIDIA's have half of them each.
    cases = {"cuda:80": CASES[::2], "cuda:100": CASES[1::2]}.get(target, CASES)
    jobs = [
        fresh_processes.submit(compile_augmentation, height, width, target=target, **options)
        for height, width, options, _ in cases
    ]
    for case, job in zip(cases, jobs, strict=True):
        got = job.result()
        assert got.spilled_bytes == 0, case
        assert got.registers <= 64, case  # 8 programs of 128 threads a multiprocessor
        pixels = got.blocks.GROUP * got.blocks.GROUPS
        threads = got.blocks.num_warps * (32 if target.startswith("cuda") else 64)
        assert pixels == 8 * threads
        loads, stores = Counter(got.loads), Counter(got.stores)
        itemsize = 4 if case[2]["dtype"] == "fp32" else 2
        loads[16] -= 1024 * itemsize // (16 * threads)  # the table
        stores[8] -= 1  # the target
        if target.startswith("cuda"):
            assert loads == Counter({1: 24, 8: 2}), case  # and index and target
            assert stores == Counter(case[3]), case
        else:  # joins neighbouring accesses where it may; index and target are scalars
            assert sum(width * n for width, n in loads.items()) == 24, case
            assert sum(width * n for width, n in stores.items()) == 24 * itemsize, case
            assert min(width for width, n in stores.items() if n) >= min(case[3]), case
