"""A stand-in for `torch.cuda`: all that the benchmarks ask of a GPU, done with the CPU's tensors.

Tensors say that they are on "cuda:0" and live in the CPU's memory; a CUDA graph runs its calls when
they are captured, and a replay does nothing but take a captured training step; events read the
clock. It shows that every line for a GPU runs, and nothing of a GPU's speed.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import loader_processes
from classroomkd.training.graph import CapturedStep

CUDA = torch.device("cuda", 0)


class _OnCuda(TorchFunctionMode):
    """What is made or moved there stays here, and says that it is there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return CUDA
        if func == torch.Tensor.record_stream:
            return None
        if func == torch.Tensor.pin_memory:
            return args[0]
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        args, kwargs = tree_map(_here, (args, kwargs))
        return func(*args, **kwargs)


def _here(value: object) -> object:
    named = isinstance(value, (str, torch.device)) and str(value) in ("cuda", "cuda:0")
    return torch.device("cpu") if named else value


class _Event:
    def __init__(self, enable_timing=False, external=False):
        self.timed = enable_timing

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    query = wait = synchronize

    def elapsed_time(self, end):
        assert self.timed
        return 1e3 * (end.at - self.at) + 1e-3


class _Stream:
    cuda_stream = 0

    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        assert isinstance(stream, _Stream)

    def wait_event(self, event):
        assert isinstance(event, _Event)

    def record_event(self):
        event = _Event()
        event.record()
        return event

    def synchronize(self):
        pass


class FakeCuda:
    """Puts the stand-in in place; ``calls`` counts what was asked of it, by name."""

    def __init__(self, patch) -> None:
        self.calls: Counter[str] = Counter()
        self.capturing = False
        here = _Stream()
        properties = SimpleNamespace(
            name="a stand-in", L2_cache_size=2**12, multi_processor_count=1, total_memory=2**30
        )
        calls = self.calls

        class Graph:
            captured = False
            again = None

            def replay(self):
                calls["replay"] += 1
                assert self.captured
                if self.again:
                    self.again()

        @contextlib.contextmanager
        def capture(graph, stream=None, capture_error_mode="global"):
            assert isinstance(graph, Graph)
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False
            graph.captured = True

        answers = {
            "is_available": lambda: True,
            "get_device_properties": lambda device=0: properties,
            "get_device_name": lambda device=0: properties.name,
            "is_bf16_supported": lambda: True,
            "current_device": lambda: 0,
            "device": lambda device: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": capture,
            "is_current_stream_capturing": lambda: self.capturing,
            "Event": _Event,
            "Stream": _Stream,
            "current_stream": lambda device=None: here,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": self._synchronize,
            "mem_get_info": lambda: (2**20, 2**30),
            "memory_allocated": lambda: 2**20,
            "max_memory_allocated": lambda: 2**21,
            "max_memory_reserved": lambda: 2**22,
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: None,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, self._counted(name, answer))
        self.on_cuda = _OnCuda
        capture_step = CapturedStep._capture

        def captured_step(step, given):
            capture_step(step, given)
            step._graph.again = partial(again, step)

        def again(step):
            results = step._step(*step._inputs)
            with torch.inference_mode():  # in which mentors make theirs
                for static, result in zip(step._results or (), results or (), strict=True):
                    static.copy_(result)

        patch.setattr(CapturedStep, "_capture", captured_step)
        autocast = torch.autocast
        patch.setattr(torch, "autocast", lambda kind, *args, **more: autocast("cpu", *args, **more))

    def _synchronize(self, device=None):
        assert not self.capturing, "a capture may not wait"

    def _counted(self, name, answer):
        def call(*args, **kwargs):
            self.calls[name] += 1
            return answer(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def profile(self, activities):
        """A profiler that sees each launch as one kernel of a microsecond."""
        self.calls["profile"] += 1
        kernel = SimpleNamespace(
            device_type=DeviceType.CUDA, time_range=SimpleNamespace(elapsed_us=lambda: 1.0)
        )
        yield SimpleNamespace(events=lambda: [kernel])


class HereProcess:
    """A row's process that is none: the benchmark's own serves."""

    def __init__(self, make, device, ends) -> None:
        self._served, self.connection = make(), self

    def ready(self) -> None:
        """It is."""

    close = stop = ready

    def memory(self) -> int:
        """Bytes, made up."""
        return 2**20

    def ask(self, method: str, memory: list[int] | None = None) -> object:
        """Call it; what it raises ends the row."""
        if memory is not None:
            memory.append(self.memory())
        try:
            return getattr(self._served, method)()
        except Exception as error:
            raise loader_processes.RowError(loader_processes.reason(error)) from error
