"""What FFCV leaves to its users, and the loader does not leave to its own."""

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from classroomkd.data import ResidentLoader, TorchLoader
from classroomkd.errors import UserError
from ffcv_required import requires_ffcv
from loader_cases import OPTIONS, random_set
from patience import LAST_RESORT
from processes import Running

pytestmark = [requires_ffcv, pytest.mark.usefixtures("small_heap")]
TESTS = Path(__file__).parents[1]


@pytest.fixture
def packed(tmp_path):
    from classroomkd.data.ffcv.beton import pack

    pack(random_set(40, 8, 8), tmp_path / "set.beton")
    return tmp_path / "set.beton"


@pytest.fixture
def loader(packed):
    with open_loader(packed, 4) as loader:
        yield loader


def open_loader(*arguments, **options):
    """A loader, which takes FFCV to be imported."""
    from classroomkd.data.ffcv.ffcv_loader import FFCVLoader

    return FFCVLoader(*arguments, **OPTIONS, **options)


def with_preamble(code, packed):
    preamble = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        import torch
        from loader_cases import OPTIONS

        PATH = {str(packed)!r}
    """
    return textwrap.dedent(preamble) + textwrap.dedent(code)


def run(code, packed):
    """Run ``code`` in a process without FFCV; it must succeed and print nothing to stderr."""
    result = Running(with_preamble(code, packed)).wait()
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("batch", [0, 6])
def test_an_error_in_the_pipeline_reaches_the_caller(loader, monkeypatch, batch):
    """FFCV's own iterator would wait for ever."""
    from classroomkd.data.ffcv import ffcv_loader

    augment_batch, calls = ffcv_loader.augment_batch, itertools.count()

    def failing(*arguments):
        if next(calls) == batch:
            raise ValueError("no such pixel")
        augment_batch(*arguments)

    monkeypatch.setattr(ffcv_loader, "augment_batch", failing)
    threads = set(threading.enumerate())
    seen = []
    with pytest.raises(ValueError, match="no such pixel"):
        seen.extend(iter(loader))
    assert len(seen) == batch
    gc.collect()
    assert set(threading.enumerate()) <= threads
    monkeypatch.undo()
    assert len(list(loader)) == 10


def test_asking_on_after_the_end(loader):
    """FFCV's own iterator would wait for ever."""
    batches = iter(loader)
    assert len(list(batches)) == 10
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(batches)


def test_closing_wakes_who_waits_for_a_batch(loader, monkeypatch):
    """In another thread, while the batch is still being made."""
    from classroomkd.data.ffcv import ffcv_loader

    begun, go_on, errors = threading.Event(), threading.Event(), []

    def slow(*_):
        begun.set()
        assert go_on.wait(LAST_RESORT)

    def consume():
        try:
            next(iter(loader))
        except RuntimeError as error:
            errors.append(str(error))

    joined, join = threading.Event(), ffcv_loader._Epoch.join

    def joining(epoch):
        joined.set()
        join(epoch)

    monkeypatch.setattr(ffcv_loader._Epoch, "join", joining)
    monkeypatch.setattr(ffcv_loader, "augment_batch", slow)
    consumer = threading.Thread(target=consume, daemon=True)
    closer = threading.Thread(target=loader.close, daemon=True)
    consumer.start()
    assert begun.wait(LAST_RESORT)
    closer.start()
    assert joined.wait(LAST_RESORT)
    assert consumer.is_alive()  # as long as the batch takes, for it joins the thread that makes it
    go_on.set()
    for thread in (consumer, closer):
        thread.join(LAST_RESORT)
    assert errors == ["the loader is closed"]


def test_a_loader_that_was_used_before_a_fork(packed):
    """Its threads stay in the parent."""
    code = """
        import os
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
        loader = FFCVLoader(PATH, 4, workers=2, **OPTIONS)
        first = [batch[0] for batch in loader]
        child = os.fork()
        if not child:
            import signal
            signal.alarm(900)  # rather than hang for ever
        again = [batch[0] for batch in loader]
        assert all(map(torch.equal, first, again))
        if child:
            assert os.waitpid(child, 0)[1] == 0
            print("both")
    """
    assert run(code, packed) == "both\n"


def test_a_loader_for_the_cpu_leaves_cuda_alone(packed):
    """FFCV's own takes streams wherever there is a GPU."""
    code = """
        def touched(*_, **__):
            raise AssertionError("CUDA was touched")
        torch.cuda.current_stream = torch.cuda.Stream = torch.cuda.Event = touched
        torch.cuda.stream = torch.cuda.device = torch.cuda._lazy_init = touched
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
        sys.modules["ffcv.loader.epoch_iterator"].IS_CUDA = True
        with FFCVLoader(PATH, 4, **OPTIONS) as loader:
            print(len(list(loader)))
    """
    assert run(code, packed) == "10\n"


def test_one_stream_and_one_event_a_batch(packed, monkeypatch):
    """What is asked of CUDA, of which every part is a stand-in here."""
    made = {"streams": [], "events": [], "pinned": [], "recorded": [], "reused": []}

    class Stream:
        def __init__(self, device):
            made["streams"].append(device)

    class Event:
        def __init__(self, blocking):
            assert blocking
            made["events"].append(self)

        def record(self):
            assert current.stream is not caller  # all copies are on the loader's, in its thread

        def synchronize(self):
            made["reused"].append(self)

    class Current(threading.local):
        def __init__(self):
            self.stream = caller

    @contextlib.contextmanager
    def entered(stream):
        current.stream = stream
        yield

    def to(tensor, device=None, *arguments, **options):
        if torch.device("cuda:2") != device:
            return tensor_to(tensor, device, *arguments, **options)
        assert options == {"non_blocking": True}
        return tensor.clone()

    def pin(tensor):
        made["pinned"].append(tensor.shape)
        return tensor

    def record(tensor, stream):
        assert stream is caller
        made["recorded"].append(tensor.shape)

    caller = SimpleNamespace(waited=[])
    caller.wait_event = caller.waited.append
    current, tensor_to = Current(), torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.stream)
    for name, stand_in in (("to", to), ("pin_memory", pin), ("record_stream", record)):
        monkeypatch.setattr(torch.Tensor, name, stand_in)
    reference = open_loader(packed, 4)
    with reference, open_loader(packed, 4, device="cuda:2") as loader:
        for epoch in range(3):
            for one in (reference, loader):
                one.set_epoch(epoch)
            for expected, got in zip(reference, loader, strict=True):
                assert all(map(torch.equal, expected, got))
    assert made["streams"] == [torch.device("cuda:2")]
    assert caller.waited == made["events"]
    assert len(made["events"]) == 30
    assert len(made["recorded"]) == 3 * 30
    assert sum(len(shape) > 1 for shape in made["pinned"]) == 5  # in all epochs together
    assert made["reused"] == made["events"][:25]  # the buffers' last copies


def test_a_path_in_the_home_folder(packed, monkeypatch):
    monkeypatch.setenv("HOME", str(packed.parent))
    with open_loader(f"~/{packed.name}", 4) as loader:
        assert len(list(loader)) == 10


def test_thread_counts_stay_as_they_were(packed):
    code = """
        import numba
        numba.set_num_threads(1)
        torch.set_num_threads(3)
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
        counts = [torch.get_num_threads()]
        with FFCVLoader(PATH, 4, workers=2, **OPTIONS) as loader:
            counts.append(torch.get_num_threads())
            for _ in loader:
                counts.append(torch.get_num_threads())
        counts.append(torch.get_num_threads())
        print(set(counts), numba.get_num_threads())
    """
    assert run(code, packed) == "{3} 1\n"


def test_more_workers_than_cores(packed):
    """FFCV's own loader raises."""
    with open_loader(packed, 4, workers=4 * (os.cpu_count() or 1)) as loader:
        assert len(list(loader)) == 10
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        open_loader(packed, 4, workers=0)


def test_the_process_may_end_in_an_epoch(packed):
    """With an iterator that lives to the end; FFCV's own aborts every other time."""
    code = """
        import os
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
        list(FFCVLoader(PATH, 2, workers=1, **OPTIONS))
        for attempt in range(3):
            child = os.fork()
            if not child:
                loader = FFCVLoader(PATH, 2, workers=1, **OPTIONS)
                batches = iter(loader)
                next(batches)
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0, attempt
        print("here")
    """
    command = [sys.executable, "-c", with_preamble(code, packed)]  # Python itself comes to its end
    result = subprocess.run(command, capture_output=True, text=True, timeout=LAST_RESORT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "here\n", "")


def test_collecting_loaders_prints_nothing(packed):
    """FFCV's own leaves "Exception ignored … KeyError" behind, for any compiled code on bytes."""
    code = """
        import gc
        import numba
        import numpy as np
        kind, key = numba.types.uint8[::1], hash(numba.types.uint8[::1])
        before = numba.njit(lambda a: a.sum())
        assert before(np.ones(3, np.uint8)) == 3
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
        for _ in range(3):
            loader = FFCVLoader(PATH, 4, **OPTIONS)
            list(loader)
            del loader
            gc.collect()
        after = numba.njit(lambda a: a.fill(2))
        array = np.ones(3, np.uint8)
        after(array)
        assert numba.types.uint8[::1] is kind and hash(kind) == key and kind.mutable
        print(array, before(array))
    """
    assert run(code, packed) == "[2 2 2] 6\n"


def test_a_stock_loader_beside_ours(packed):
    """Both in one process, and theirs as it is documented."""
    code = """
        import numba
        kind = numba.types.uint8[::1]  # the one and only, while it is held
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader, ffcv
        ours = FFCVLoader(PATH, 4, **OPTIONS)
        first = [batch[2].tolist() for batch in ours]
        theirs = ffcv.Loader(PATH, 4, num_workers=1, drop_last=False)
        shapes = {(tuple(images.shape), images.dtype) for images, _ in theirs}
        assert [batch[2].tolist() for batch in ours] == first
        assert numba.types.uint8[::1] is kind and kind.mutable
        print(shapes)
    """
    assert run(code, packed) == "{((4, 8, 8, 3), torch.uint8)}\n"


def test_the_file_must_be_one(tmp_path):
    (tmp_path / "notes.beton").write_text("bread, milk")
    with pytest.raises(UserError, match=r"notes\.beton is not a \.beton file"):
        open_loader(tmp_path / "notes.beton", 4)


@pytest.mark.parametrize("kind", ["resident", "torch", "ffcv"])
def test_epochs_without_growth(tmp_path, kind):
    """In threads, processes, open files and memory."""
    from classroomkd.data.ffcv.beton import pack

    images = random_set(40, 32, 32)
    if kind == "ffcv":
        pack(images, tmp_path / "set.beton")
        loader = open_loader(tmp_path / "set.beton", 8, workers=2)
    elif kind == "torch":
        loader = TorchLoader(images, 8, workers=1, **OPTIONS)
    else:
        loader = ResidentLoader(images, 8, **OPTIONS)
    process = psutil.Process()

    def state(first, last):
        for epoch in range(first, last):
            loader.set_epoch(epoch)
            for images, *_ in loader:
                assert torch.isfinite(images).all()
        gc.collect()
        counts = threading.active_count(), len(process.children()), process.num_fds()
        return counts, process.memory_info().rss

    with loader:
        counts, memory = state(0, 10)
        later_counts, later_memory = state(10, 30)
    assert later_counts == counts
    assert later_memory - memory < 4e6  # an epoch's batches are 492 kB: 20 of them, 10 MB
