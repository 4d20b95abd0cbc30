"""The states of the kernels' launches, with streams that are made up."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
from classroomkd.kernels import counters

CUDA = torch.device("cuda", 0)
THREADS = 8


def test_no_two_threads_get_one_state(monkeypatch):
    """Each thread has a stream of its own; all meet where a state is about to be taken."""
    meeting = threading.Barrier(THREADS)
    together = threading.Barrier(THREADS)

    class Meeting(counters._States):
        def _next(self):
            taken = self._taken
            # Without a lock all arrive here before any goes on; with one, only the first waits.
            with suppress(threading.BrokenBarrierError):
                together.wait(0.2)
            self._taken = taken
            return super()._next()

    def stream(_device):
        return SimpleNamespace(cuda_stream=threading.get_ident(), wait_event=lambda event: None)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(counters, "_states", {})
    monkeypatch.setattr(counters, "_States", Meeting)

    def take():
        meeting.wait()
        return [counters.launch_state(CUDA).data_ptr() for _ in range(2)]

    with ThreadPoolExecutor(THREADS) as threads:
        taken = [future.result() for future in [threads.submit(take) for _ in range(THREADS)]]
    assert all(first == second for first, second in taken)
    assert len({first for first, _ in taken}) == THREADS
