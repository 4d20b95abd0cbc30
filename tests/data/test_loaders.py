"""The loaders: the same bits from each, against a slow, obvious version of everything."""

import gc
import importlib.util
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classroomkd.data import Augmentation, ImageSet, TorchLoader, channel_statistics, pixels
from classroomkd.data.augmentation import normalisation_table, sample_order
from classroomkd.data.loader import Loader
from classroomkd.errors import UserError
from interpreter import INTERPRETED
from loader_cases import ALL, FFCV, MEAN, STD, needs_interpreter, random_set
from patience import LAST_RESORT
from slow_augmentation import slow_augment, slow_cutout

pytestmark = pytest.mark.usefixtures("small_heap")


def running():
    """The threads and child processes that there are."""
    gc.collect()
    return set(threading.enumerate()) | {child.pid for child in psutil.Process().children()}


def left_over(before):
    """What runs beyond ``before``, once whatever is told to end has had the time for it.

    PyTorch's DataLoader tells the threads that feed its workers to end and does not wait for them.
    """
    deadline = time.monotonic() + LAST_RESORT / 10
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    return running() - before


KERNEL = pytest.param("kernel", marks=needs_interpreter)
ONE_EACH = ["resident", KERNEL, "torch-1", FFCV[0]]


def slow_batch(image_set, indices, augmentation, seed, epoch, dtype):
    """[B, 3, H, W], one pixel after another."""
    table = normalisation_table(MEAN, STD)
    batch = []
    for index in indices:
        image = image_set.images[index]
        if augmentation is not None:
            image = slow_augment(image, augmentation.padding, augmentation.flip, seed, epoch, index)
        finished = np.stack([table[c][image[..., c]] for c in range(3)])
        if augmentation is not None and augmentation.cutout:
            finished[:, slow_cutout(image.shape, augmentation.cutout, seed, epoch, index)] = 0
        batch.append(torch.from_numpy(finished).to(dtype))
    return torch.stack(batch)


PLAIN, FLIPPED, CUT = (
    (None, False),
    (Augmentation(0, True), True),
    (Augmentation(2, True, 3), False),
)


@pytest.mark.parametrize(
    ("dtype", "augmentation", "drop_last"),
    [
        *((torch.float32, *CUT), (torch.float32, *PLAIN)),
        *((torch.bfloat16, *FLIPPED), (torch.float16, *CUT)),
    ],
)
@pytest.mark.parametrize("kind", [*ALL, KERNEL])
def test_loader_matches_the_slow_one(make, kind, dtype, augmentation, drop_last):
    """Images, targets and indices of two epochs, to the bit."""
    image_set = random_set()
    loader = make(
        kind, image_set, augmentation=augmentation, drop_last=drop_last, seed=9, dtype=dtype
    )
    for epoch in (0, 5):
        loader.set_epoch(epoch)
        order = sample_order(9, epoch, 23).tolist()
        batches = list(loader)  # kept, so that a buffer used again would be seen
        assert len(batches) == len(loader) == (5 if drop_last else 6)
        assert [len(targets) for _, targets, _ in batches] == [4] * 5 + [3] * (not drop_last)
        for images, targets, indices in batches:
            assert images.shape == (len(targets), 3, 6, 5)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert targets.dtype == indices.dtype == torch.int64
            assert targets.tolist() == image_set.targets[indices].tolist()
            expected = slow_batch(image_set, indices.tolist(), augmentation, 9, epoch, dtype)
            assert images.dtype == dtype
            assert torch.equal(images, expected)
        seen = torch.cat([indices for *_, indices in batches]).tolist()
        assert seen == order[: 20 if drop_last else 23]


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    padding=st.integers(0, 25),
    cutout=st.integers(0, 30),
    flip=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_any_size_and_padding(make, height, width, padding, cutout, flip, seed, epoch):
    image_set = random_set(5, height, width, seed % 2**32)
    augmentation = Augmentation(padding, flip, cutout)
    loader = make("resident", image_set, 5, augmentation=augmentation, seed=seed)
    loader.set_epoch(epoch)
    ((images, _, indices),) = loader
    expected = slow_batch(image_set, indices.tolist(), augmentation, seed, epoch, torch.float32)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("kind", ["torch-0", "map-0", *FFCV])
@pytest.mark.parametrize(
    ("height", "width", "augmentation"),
    [
        (1, 1, Augmentation(0, True)),
        (1, 9, Augmentation(3, True, 2)),
        (17, 3, Augmentation(20, False)),
        (4, 20, Augmentation(1, True, 30)),
    ],
)
def test_some_sizes_and_paddings(make, kind, height, width, augmentation):
    image_set = random_set(7, height, width)
    for images, _, indices in make(kind, image_set, augmentation=augmentation, seed=2**63 + 1):
        expected = slow_batch(
            image_set, indices.tolist(), augmentation, 2**63 + 1, 0, torch.float32
        )
        assert torch.equal(images, expected)


@pytest.mark.parametrize("kind", ALL)
def test_every_loader_gives_the_same_bits(make, kind):
    """At the size of CIFAR's images, across batch sizes, over a few epochs."""
    image_set = random_set(200, 32, 32)
    options = {"augmentation": Augmentation(4, True, 8), "seed": 3}
    reference = make("resident", image_set, 200, shuffle=False, **options)
    for batch_size in (64, 7):
        loader = make(kind, image_set, batch_size, **options)
        for epoch in (0, 1, 4):
            reference.set_epoch(epoch)
            ((expected, *_),) = reference
            loader.set_epoch(epoch)
            images, _, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
            assert torch.equal(images, expected[indices])


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize(("count", "drop_last"), [(50, True), (33, False)])
def test_shares_make_up_the_whole_batch(make, kind, count, drop_last):
    """Processes side by side see what one with the batches of all would see."""
    image_set = random_set(count)
    options = {"drop_last": drop_last, "seed": 5}
    whole = make("resident", image_set, 16, **options)
    ranks = [make(kind, image_set, 4, rank=rank, world_size=4, **options) for rank in range(4)]
    for loader in (whole, *ranks):
        loader.set_epoch(2)
    shares = [list(loader) for loader in ranks]
    assert [len(share) for share in shares] == [len(loader) for loader in ranks]
    for b, (images, targets, indices) in enumerate(whole):
        parts = [share[b] for share in shares if b < len(share)]
        for together, one_by_one in zip(
            (images, targets, indices), zip(*parts, strict=True), strict=True
        ):
            assert torch.equal(torch.cat(one_by_one), together)
        sizes = [len(part[1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        if len(indices) == 16:
            assert sizes == [4] * 4
    seen = torch.cat([indices for share in shares for *_, indices in share]).tolist()
    assert len(set(seen)) == len(seen) == (count // 16 * 16 if drop_last else count)


@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_can_be_taken_up_in_its_middle(make, kind):
    image_set = random_set(40)
    loader = make(kind, image_set, 6, seed=1)
    loader.set_epoch(3)
    whole = list(loader)
    for first in (0, 1, 5, 7):
        again = make(kind, image_set, 6, seed=1) if first == 5 else loader
        again.set_epoch(3, first_batch=first)
        rest = list(again)
        assert len(rest) == 7 - first
        for one, other in zip(rest, whole[first:], strict=True):
            assert all(map(torch.equal, one, other))
    with pytest.raises(UserError, match=r"first batch must be within 0\.\.7, got 8"):
        loader.set_epoch(3, first_batch=8)


@pytest.mark.parametrize("kind", ALL)
def test_a_broken_off_epoch_leaves_nothing_behind(make, kind):
    """Neither a thread, a process nor a batch of the old epoch in the next."""
    image_set = random_set(64)
    loader = make(kind, image_set, 4, seed=1)
    loader.set_epoch(0)
    list(loader)  # whatever lives as long as the loader is there now
    before = running()
    for epoch in range(1, 4):
        loader.set_epoch(epoch)
        for b, _ in enumerate(loader):
            if b == 2:
                break
    loader.set_epoch(9)
    seen = torch.cat([indices for *_, indices in loader]).tolist()
    assert seen == sample_order(1, 9, 64).tolist()
    assert not left_over(before)


@pytest.mark.parametrize("kind", [*ALL, KERNEL])
def test_what_an_iteration_gives_is_fixed_when_it_begins(make, kind):
    image_set = random_set()
    loader, other = (make(kind, image_set, seed=1) for _ in range(2))
    other.set_epoch(2, first_batch=1)
    expected = list(other)
    loader.set_epoch(2, first_batch=1)
    batches = iter(loader)
    loader.set_epoch(7)
    got = [next(batches)]
    loader.set_epoch(8)
    got += batches
    for one, whole in zip(got, expected, strict=True):
        assert all(map(torch.equal, one, whole))


@pytest.mark.parametrize("kind", [*ALL, KERNEL])
def test_a_second_iteration_of_one_loader(make, kind):
    """It changes nothing of the first, or ends it; it is whole itself."""
    loader = make(kind, random_set(24), 8, seed=1)
    whole = list(loader)
    first = iter(loader)
    got = [next(first)]
    loader.set_epoch(3)
    second = iter(loader)
    also = [next(second)]
    if isinstance(loader, TorchLoader):
        with pytest.raises(RuntimeError, match="another epoch: iterate one at a time"):
            next(first)
    else:
        got += first
        for one, other in zip(got, whole, strict=True):
            assert all(map(torch.equal, one, other))
    also += second
    assert torch.cat([batch[2] for batch in also]).tolist() == sample_order(1, 3, 24).tolist()


@pytest.mark.parametrize("kind", ALL)
def test_two_epochs_at_once(make, kind):
    """Evaluation in the middle of training, with the loaders of one set interleaved."""
    image_set = random_set(30)
    one, other = (make(kind, image_set, 5, seed=seed) for seed in (1, 2))
    for (_, _, first), (_, _, second), b in zip(one, other, range(6), strict=True):
        assert first.tolist() == sample_order(1, 0, 30)[5 * b : 5 * b + 5].tolist()
        assert second.tolist() == sample_order(2, 0, 30)[5 * b : 5 * b + 5].tolist()


@pytest.mark.parametrize("kind", ALL)
def test_loader_arguments(make, kind):
    image_set = random_set(10)
    with pytest.raises(UserError, match="batch size must be at least 1, got 0"):
        make(kind, image_set, 0)
    with pytest.raises(UserError, match="batch size 11 is larger than the set of 10 images"):
        make(kind, image_set, 11, drop_last=True)
    with pytest.raises(UserError, match="batch size 6 in each of 2 processes is larger than"):
        make(kind, image_set, 6, drop_last=True, world_size=2)
    with pytest.raises(UserError, match=r"rank must be within 0\.\.1, got 2"):
        make(kind, image_set, rank=2, world_size=2)
    assert len(make(kind, image_set, 11)) == 1
    assert len(make(kind, image_set, 10, drop_last=True)) == 1


@pytest.mark.parametrize("kind", ALL)
def test_closed_loader(make, kind):
    before = running()
    with make(kind, random_set()) as loader:
        assert len(list(loader)) == 6
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)
    assert not left_over(before)


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize("taken", [0, 2, 6])
def test_closed_in_an_epoch_whose_iterator_is_held(make, kind, taken):
    before = running()
    loader = make(kind, random_set())
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    loader.close()
    assert not left_over(before)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(batches)


@pytest.mark.parametrize("kind", ["resident", "torch-0", *FFCV])
def test_another_default_device(make, kind):
    """The loaders allocate on the CPU all the same."""
    loader = make(kind, random_set())
    expected = list(loader)
    torch.set_default_device("meta")
    try:
        if kind == "torch-0":  # PyTorch's own seeds cannot be drawn there
            got = [loader._loader.dataset[key] for key in loader._keys]
            got = [(images.permute(0, 3, 1, 2), *rest) for images, *rest in got]
        else:
            got = list(loader)
    finally:
        torch.set_default_device(None)
    for one, other in zip(got, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_the_current_gpu_is_meant_by_none(monkeypatch):
    class Nothing(Loader):
        def _iterate(self, batches, epoch):
            yield from ()

    options = {"mean": MEAN, "std": STD, "augmentation": None, "shuffle": False, "drop_last": False}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for asked, device in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert Nothing(5, 2, device=asked, **options).device == torch.device(device)


def test_without_a_place_for_compiled_code(monkeypatch):
    """As numba finds it in a container that can only be read."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    spec = importlib.util.spec_from_file_location("pixels_again", pixels.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    out = torch.empty(1, 2, 2, 3)
    table = torch.arange(768.0).view(3, 256)
    place = np.zeros(1, np.int64)
    again.augment_batch(np.arange(12, dtype=np.uint8), place, place, None, 0, 0, table, out)
    assert out.flatten(0, 2).tolist() == [[k, 257 + k, 514 + k] for k in range(0, 12, 3)]


@pytest.mark.parametrize("kind", ALL)
def test_a_set_in_its_own_order(make, kind):
    image_set = random_set()
    loader = make(kind, image_set, augmentation=None, shuffle=False)
    assert torch.cat([indices for *_, indices in loader]).tolist() == list(range(23))
    images = torch.cat([images for images, *_ in loader]).double().numpy()
    expected = (image_set.images / 255 - MEAN) / STD
    np.testing.assert_allclose(images.transpose(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_batches_do_not_alias_the_set_or_each_other(make, kind):
    image_set = random_set(8)
    before = image_set.images.copy()
    loader = make(kind, image_set, augmentation=None, shuffle=False)
    first = [[part.clone() for part in batch] for batch in loader]
    for images, targets, indices in loader:
        images.zero_()
        targets.fill_(-1)
        indices.fill_(-1)
    np.testing.assert_array_equal(image_set.images, before)
    assert (image_set.targets >= 0).all()
    for one, other in zip(first, loader, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", ONE_EACH)
def test_strided_arrays_are_taken_right(make, kind):
    whole = random_set(20)
    strided = ImageSet(whole.images[2::2, :, 0:4], whole.targets[2::2], whole.classes)
    compact = ImageSet(strided.images.copy(), strided.targets.copy(), whole.classes)
    assert not strided.images.flags.c_contiguous
    for one, other in zip(make(kind, strided), make(kind, compact), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_channel_statistics_of_nothing():
    with pytest.raises(UserError, match="no images to compute the mean"):
        channel_statistics(random_set(0))


def test_channel_statistics_match_numpy(make):
    image_set = random_set(200)
    image_set.images[..., 1] //= 3
    mean, std = channel_statistics(image_set)
    values = image_set.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-12)
    flat = ImageSet(np.full((2, 4, 4, 3), 51, np.uint8), np.zeros(2, np.int64), ["a", "b"])
    flat.images[0, 0, 0, 1] = 50
    mean, std = channel_statistics(flat)
    assert std[::2] == (1.0, 1.0)  # instead of 0, by which nothing can be divided
    assert std[1] == pytest.approx(flat.images[..., 1].std() / 255)
    batch = next(iter(make("resident", flat, mean=mean, std=std, augmentation=None)))
    assert (batch[0][:, ::2] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU to compile for")
@pytest.mark.parametrize("kind", ["resident", "torch-2", *FFCV])
def test_on_a_gpu(make, kind):
    """The bits of the CPU, in batches that are kept and whose like are still being made."""
    image_set = random_set(300, 32, 32)
    options = {"augmentation": Augmentation(4, True, 8), "dtype": torch.bfloat16, "seed": 3}
    here = make("resident", image_set, 32, **options)
    there = make(kind, image_set, 32, device="cuda", **options)
    for epoch in range(3):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        for one, other in zip(here, list(there), strict=True):
            assert other[0].device.type == "cuda"
            assert other[0].is_contiguous(memory_format=torch.channels_last)
            for expected, got in zip(one, other, strict=True):
                assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_a_fit_triton_the_host_makes_the_batches(make, monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(
        "classroomkd.data.resident.triton_obstacle", lambda *least: "no Triton {}.{}".format(*least)
    )
    image_set = random_set()
    with pytest.warns(UserWarning, match="no Triton 3.4; the resident loader makes its batches on"):
        loader = make("resident", image_set, device=device)
    batches = list(loader)
    expected = list(make("resident", image_set))
    assert len(batches) == len(expected) == 6
    for ours, theirs in zip(batches, expected, strict=True):
        for part, other in zip(ours, theirs, strict=True):
            assert (part.device.type, part.shape, part.dtype) == (device, other.shape, other.dtype)
            assert part.stride() == other.stride()
            assert device == "meta" or torch.equal(part.cpu(), other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU to compile for")
@pytest.mark.parametrize("kind", ["resident", *FFCV])
def test_the_caller_never_waits_for_a_gpu(make, kind):
    loader = make(kind, random_set(64, 32, 32), 16, device="cuda")
    list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(loader)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU to compile for")
@pytest.mark.parametrize("kind", ["resident", "torch-1", *FFCV])
def test_gpu_memory_does_not_grow(make, kind):
    """As it would if each epoch took streams of its own, whose memory is not shared."""
    loader = make(kind, random_set(64, 32, 32), 16, device="cuda")

    def reserved(epochs):
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for images, *_ in loader:
                images.sum()
        return torch.cuda.memory_reserved()

    assert reserved(20) - reserved(3) < 2**23


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU to compile for")
@pytest.mark.parametrize("kind", ["resident", "torch-1", *FFCV])
def test_batches_taken_on_another_stream(make, kind):
    image_set = random_set(64, 32, 32)
    here, there = (
        make(k, image_set, 16, device=d) for k, d in (("resident", "cpu"), (kind, "cuda"))
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        for one, other in zip(here, there, strict=True):
            for expected, got in zip(one, other, strict=True):
                assert torch.equal(got.cpu(), expected)


# ---------------------------------------------------------------- any map-style data set


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_no_image_is_named(make, workers):
    good = (np.zeros((4, 4, 3), np.uint8), 0)
    for bad, target, message in [
        (np.zeros((4, 4, 3), np.float32), 0, r"sample 1 of the data set .*float32.*not uint8"),
        (np.zeros((4, 4), np.uint8), 0, r"sample 1 of the data set .*\[4, 4\]"),
        (np.zeros((5, 4, 3), np.uint8), 0, r"\[5, 4, 3\].*\[4, 4, 3\].*one size"),
        (good[0], 0.7, r"sample 1 of the data set cannot be used: 'float'"),
        (good[0], torch.tensor(1.0), r"sample 1 of the data set cannot be used: only integer"),
    ]:
        options = {"mean": MEAN, "std": STD, "augmentation": None, "workers": workers}
        with (
            TorchLoader(
                [good, (bad, target)], 2, shuffle=False, drop_last=False, **options
            ) as loader,
            pytest.raises(UserError, match=message) as caught,
        ):
            list(loader)
        assert "\n" not in str(caught.value)


def test_an_error_of_the_data_set_reaches_the_caller():
    class Failing:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise OSError("the disk is gone")

    options = {"mean": MEAN, "std": STD, "augmentation": None, "workers": 1}
    with (
        TorchLoader(Failing(), 2, shuffle=False, drop_last=False, **options) as loader,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_draw_nothing_from_the_global_generator(make, workers):
    """Or a run taken up within an epoch would go on with other random numbers, of dropout say."""
    loader = make(f"torch-{workers}", random_set())
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)
