"""``with ptx_execution("cuda:90") as run:`` the project's launches, executed from their PTX.

Triton decides when a kernel is defined whether it will be interpreted or compiled, and a process of
tests interprets. So a second process compiles; it lives until this one ends, and keeps its results
on disk. The PTX is what the launch's own arguments call for: Triton sees their dtypes, the
alignment of the pointers and the values of integers, as it would at a launch on that GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.ptx.arithmetic import Perturbation
from tests.ptx.machine import WARP, Counts, Launch, Program
from tests.ptx.memory import Finding, Findings, Global, Order, Unwritten, regions
from tests.ptx.parse import WIDTH, PtxError, parse

TARGETS = ("cuda:80", "cuda:90", "cuda:100")

# --- counts

CLASSES: dict[str, Callable[[tuple[str, ...]], bool]] = {
    "ex2 and lg2": lambda op: op[0] in ("ex2", "lg2"),
    "rcp, rsqrt and div": lambda op: op[0] in ("rcp", "rsqrt", "div"),
    "global loads": lambda op: op[0] == "ld" and "global" in op,
    "global stores": lambda op: op[0] == "st" and "global" in op,
    "atomics": lambda op: op[0] == "atom",
    "shared": lambda op: "shared" in op and op[0] != "cvta",
    "shuffles": lambda op: op[0] in ("shfl", "redux"),
    "barriers": lambda op: op[0] == "bar",
    "branches": lambda op: op[0] in ("bra", "ret"),
    "moves": lambda op: op[0] in ("mov", "cvta") or op[:2] == ("ld", "param"),
    "conversions": lambda op: op[0] == "cvt",
    "float32": lambda op: op[-1] in ("f32", "f32x2", "f16", "bf16"),
    "integer and logic": lambda _: True,
}
"""What an instruction is counted as: the first class that it is of."""


@dataclass
class Count:
    """What instructions of a class amount to."""

    warps: int = 0
    """Instructions, each executed by a warp."""
    requests: int = 0
    """Of those to memory, the warps of which a thread at least took part."""
    bytes: int = 0
    """That the threads asked memory for."""
    sectors: int = 0
    """32-byte sectors of global memory, each request by itself."""
    wavefronts: int = 0
    """Passes through shared memory."""

    def __iadd__(self, other: Count) -> Count:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def _by_class(program: Program, counts: Counts) -> dict[str, Count]:
    """Sums over a launch's instructions, of those classes that occur."""
    classes = [
        next(k for k, of in enumerate(CLASSES.values()) if of(instruction.opcode))
        for instruction in program.kernel.code
    ]
    sums = {
        name: np.bincount(classes, weights=values, minlength=len(CLASSES)).astype(int)
        for name, values in vars(counts).items()
    }
    return {
        name: Count(**{of: int(values[k]) for of, values in sums.items()})
        for k, name in enumerate(CLASSES)
        if sums["warps"][k]
    }


@dataclass
class Executed:
    """A launch that has run."""

    kernel: str
    grid: tuple[int, ...]
    n_threads: int
    """Of a program."""
    shared_bytes: int
    counts: dict[str, Count]
    """By class."""
    ptx: str


@dataclass
class Run:
    """What happened while PTX was executed."""

    launches: list[Executed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, Count]:
        """By class, of all launches together."""
        result: dict[str, Count] = {}
        for launch in self.launches:
            for name, count in launch.counts.items():
                total = result.setdefault(name, Count())
                total += count
        return result

    def table(self, n_rows: int, n_columns: int) -> str:
        """The counts as a table: a column's threads' instructions, and the rest for each row."""
        lines = ["class               a column    a row: warps  requests     bytes   sectors"]
        for name in CLASSES:
            if count := self.counts.get(name):
                column = count.warps * WARP / (n_rows * n_columns)
                rest = (count.warps, count.requests, count.bytes, count.sectors)
                each = [f"{value / n_rows:10.1f}" for value in rest]
                lines.append(f"{name:18}{column:10.2f}    {'  '.join(each)}")
        return "\n".join(lines)


# --- the compiling process


@dataclass
class Pointer:
    """What Triton looks at in a tensor."""

    dtype: torch.dtype
    address: int
    """Modulo 16."""

    def data_ptr(self) -> int:
        """The address."""
        return self.address


@dataclass
class CompiledKernel:
    """What the compiling process answers."""

    hash: str
    ptx: str
    signature: dict[str, Any]
    """Argument → Triton's type, or a tuple of them."""
    shared_bytes: int
    n_threads: int


class _NoGpu:
    """What Triton asks a driver when it compiles; a capability doubles as a device's number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)


def serve(descriptor: int) -> None:
    """The compiling process: answer until the other side is gone."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    # The PTX is all that is wanted; ptxas would take as long again.
    CUDABackend.make_cubin = lambda *_: b""
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError):
        while True:
            target, module, name, arguments, options = connection.recv()
            driver.set_active(_NoGpu(int(target.split(":")[1])))
            try:
                kernel = getattr(importlib.import_module(module), name)
                compiled = kernel.run(grid=(1,), warmup=True, **options, **arguments)
                metadata = compiled.metadata
                if metadata.num_ctas != 1 or metadata.global_scratch_size:
                    raise NotImplementedError("clusters or scratch memory")
                answer: object = CompiledKernel(
                    compiled.hash,
                    compiled.asm["ptx"],
                    compiled.src.signature,
                    metadata.shared,
                    WARP * metadata.num_warps,
                )
            except Exception as error:  # whatever it is, the other side has to know
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)


class _Compiler:
    """The compiling process, as seen from here."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "classroomkd-ptx"
        # Not Triton's own cache: a kernel without machine code must not be found there.
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        code = f"import sys; sys.path[:] = {sys.path!r}\nfrom {__name__} import serve\n"
        code += f"serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        atexit.register(self._end)

    def _end(self) -> None:
        self._connection.close()
        self._process.wait()

    def compile(
        self, target: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]
    ) -> CompiledKernel:
        function = kernel.fn
        request = (target, function.__module__, function.__name__, _described(arguments), options)
        self._connection.send(request)
        answer = self._connection.recv()
        if not isinstance(answer, CompiledKernel):
            raise PtxError(f"{function.__name__} does not compile for {target}: {answer}")
        return answer


def _described(value: Any) -> Any:
    """An argument without its tensors' values."""
    if isinstance(value, dict):
        return {name: _described(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    return Pointer(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value


_compiler: list[_Compiler] = []
_programs: dict[tuple[str, int | None, str], Program] = {}

# --- launches

_SCALARS = {
    f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32)
}
_SCALARS |= {"i1": np.dtype("i1"), "i64": np.dtype("i8"), "u64": np.dtype("u8")}
_SCALARS |= {"fp32": np.dtype("f4"), "fp64": np.dtype("f8")}


def _flat(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    """Type, value and name of each argument that reaches the kernel."""
    if isinstance(kind, tuple):
        for k, (each, item) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(each, item, f"{name}[{k}]")
    elif kind != "constexpr":
        yield kind, value, name


@dataclass
class _Executor:
    """What a `ptx_execution` was asked for, and its run."""

    target: str
    rng: np.random.Generator
    perturb: int | None
    edit: Callable[[str], str] | None
    run: Run
    unwritten: Unwritten

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        options: dict[str, int],
        _device: torch.device,
    ) -> None:
        """In place of the project's ``launch.start``."""
        if not _compiler:
            _compiler.append(_Compiler())
        compiled = _compiler[0].compile(self.target, kernel, arguments, options)
        ptx = self.edit(compiled.ptx) if self.edit else compiled.ptx
        key = (compiled.hash, self.perturb, ptx if self.edit else "")
        if key not in _programs:
            perturb = None if self.perturb is None else Perturbation(self.perturb)
            _programs[key] = Program(parse(ptx), perturb)
        program, name = _programs[key], kernel.fn.__name__
        given = [
            each
            for argument, kind in compiled.signature.items()
            for each in _flat(kind, arguments.get(argument), argument)
        ]
        order = Order(int(np.prod(grid)), compiled.n_threads)
        findings = Findings(name, program.kernel.code)
        tensors = [(each.removesuffix("_ptr"), value) for kind, value, each in given if "*" in kind]
        memory = Global(regions(tensors), self.unwritten, order, findings)
        parameters: list[np.generic] = [
            np.uint64(memory.address(value)) if "*" in kind else _SCALARS[kind].type(value)
            for kind, value, _ in given
        ]
        expected = [WIDTH[kind] for kind in program.kernel.parameters.values()]
        scratch = len(expected) - len(
            parameters
        )  # pointers that Triton adds, used by no kernel here
        parameters += [np.uint64(0)] * scratch
        if [each.nbytes for each in parameters] != expected:
            raise PtxError(f"{name}: the PTX's parameters are not the launch's arguments")
        if program.kernel.n_threads != compiled.n_threads:
            raise PtxError(f"{name}: the PTX has another number of threads than the launch")
        launch = Launch(program, grid, parameters, memory, compiled.shared_bytes, self.rng)
        try:
            launch.run()
        finally:
            memory.finish(self.unwritten)
            self.run.findings += findings.found.values()
        self.run.launches.append(
            Executed(
                name,
                grid,
                compiled.n_threads,
                compiled.shared_bytes,
                _by_class(program, launch.counts),
                ptx,
            )
        )

    def watched(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function like ``torch.empty`` whose results' every byte is known to be unwritten."""

        def empty(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            plain = type(tensor) is Tensor and tensor.layout is torch.strided
            if plain and tensor.device.type == "cpu" and tensor.numel():
                self.unwritten.begin(tensor)
            return tensor

        return empty


_MAKERS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
_MAKERS += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]


@contextlib.contextmanager
def ptx_execution(
    target: str = "cuda:90",
    *,
    seed: int = 0,
    perturb: int | None = None,
    edit: Callable[[str], str] | None = None,
) -> Iterator[Run]:
    """Within, the project's launches for CPU tensors are executed from PTX compiled for ``target``.

    Args:
        target: "cuda:80", "cuda:90" or "cuda:100".
        seed: decides in which order the programs run.
        perturb: a seed by which ex2, lg2, rcp, rsqrt, div err, within the error that PTX documents;
            None for the nearest float32.
        edit: a change to the PTX, as for a kernel that is to be damaged.

    Yields:
        The `Run`. What programs may do but should not is in its findings when the launch returns.

    Raises:
        PtxError: where a launch cannot go on: an access out of bounds or misaligned, a divergent
            barrier, a kernel that does not compile, an instruction that is unknown here.

    """
    from classroomkd.kernels import launch
    from classroomkd.loss import fused

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    rng = np.random.default_rng(seed)
    executor = _Executor(target, rng, perturb, edit, Run(), Unwritten())
    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(launch, "start", executor.start)
        patch(fused, "_INTERPRET", True)
        for owner, name in _MAKERS:
            patch(owner, name, executor.watched(getattr(owner, name)))
        yield executor.run
