"""Cross-compile the kernels for GPUs that this machine does not have, and read the machine code.

    compile_call(n_classes=100, n_mentors=6, target="cuda:90")["classroom"].registers

works on any Linux machine with Triton. The arguments are those of ``launch.py`` itself, for tensors
that have shapes, strides and dtypes but no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from classroomkd.kernels.augment import Tiles, gather_augment_kernel, tiles
from classroomkd.kernels.blocks import Blocks
from classroomkd.kernels.disassembly import read_amdgcn, read_cubin
from classroomkd.kernels.launch import Launch
from classroomkd.kernels.meta_calls import call_launches

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target."""

    registers: int
    """A thread's; on AMD, vector registers."""
    spilled_bytes: int
    """Bytes a thread keeps in local memory."""
    shared_bytes: int
    loads: dict[int, int]
    """Global loads in the machine code: bytes a thread and load → how many."""
    stores: dict[int, int]
    """Global stores, likewise."""
    blocks: Blocks | Tiles


def compile_call(*, target: str, **call: Any) -> dict[str, Compiled]:
    """Compile each kernel of `call_launches`, by its name there.

    Args:
        target: "cuda:<compute capability × 10>" or "hip:<architecture>".
        call: the arguments of `call_launches`.

    """
    launches = call_launches(warp_size=_gpu(target).warp_size, **call)
    return {
        name: _compile(
            launch.plan.kernel,
            _described(launch.plan.kernel, launch.arguments),
            target,
            launch.plan.blocks,
        )
        for name, launch in launches.items()
    }


def compile_augmentation(
    height: int,
    width: int,
    *,
    target: str,
    dtype: str,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 0,
) -> Compiled:
    """Compile the resident loader's kernel for images of this size; other arguments as above."""
    cut = tiles(width, tl.dtype(dtype).primitive_bitwidth // 8, _gpu(target).warp_size)
    arguments = {
        "image_ptr": "*u8 of 16",
        "target_ptr": "*i64 of 16",
        "order_ptr": "*i64 of 16",
        "table_ptr": f"*{dtype} of 16",
        "out_ptr": f"*{dtype} of 16",
        "out_target_ptr": "*i64 of 16",
        "order_stride": 1,
        "augment_key": "i32",
        "cutout_key": "i32",
        "H": height,
        "W": width,
        "PADDING": padding,
        "FLIP": flip,
        "CUTOUT": cutout,
        "GROUP": cut.GROUP,
        "GROUPS": cut.GROUPS,
    }
    return _compile(gather_augment_kernel, arguments, target, cut)


def _gpu(target: str) -> GPUTarget:
    backend, architecture = target.split(":")
    if backend == "cuda":
        return GPUTarget(backend, int(architecture), 32)
    return GPUTarget(backend, architecture, 64)


def _compile(
    kernel: triton.JITFunction, arguments: dict[str, object], target: str, cut: Blocks | Tiles
) -> Compiled:
    compiled = _compiled(kernel, arguments, target, cut.compiler_options())
    read = read_cubin if "cubin" in compiled.asm else read_amdgcn
    return Compiled(**read(compiled), blocks=cut)


class MachineCode(NamedTuple):
    """A launch on an NVIDIA GPU, in terms of its machine code."""

    name: str
    cubin: bytes
    arguments: list[tuple[str, Any]]
    """Type, as Triton writes it, and value of each that the code takes, in its order."""
    grid: tuple[int, ...]
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def machine_code(launch: Launch, target: str) -> MachineCode:
    """Compile one of `call_launches` for an NVIDIA GPU."""
    plan = launch.plan
    options = plan.blocks.compiler_options()
    return kernel_code(plan.kernel, plan.grid, launch.arguments, options, target)


def kernel_code(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    options: dict[str, int],
    target: str,
) -> MachineCode:
    """Compile any kernel for an NVIDIA GPU; arguments by name, tensors without memory."""
    types = _described(kernel, arguments)
    compiled = _compiled(kernel, types, target, options)
    taken = []
    for name, kind in types.items():
        several = isinstance(kind, tuple)
        values = zip(kind, arguments[name], strict=True) if several else [(kind, arguments[name])]
        taken += [(k.removesuffix(" of 16"), value) for k, value in values if isinstance(k, str)]
    read = {key: value for key, value in read_cubin(compiled).items() if key in MachineCode._fields}
    cubin = compiled.asm["cubin"]
    return MachineCode(kernel.__name__, cubin, taken, grid, options["num_warps"], **read)


def _compiled(
    kernel: triton.JITFunction,
    arguments: dict[str, object],
    target: str,
    options: dict[str, int],
) -> CompiledKernel:
    return triton.compile(_source(kernel, arguments), target=_gpu(target), options=options)


def _described(kernel: triton.JITFunction, given: Mapping[str, Any]) -> dict[str, object]:
    """Arguments in the form of `_source`, specialised as Triton does at launch."""
    arguments = {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr:
            arguments[parameter.name] = tl.constexpr(value)
        elif parameter.do_not_specialize and value is not None:
            # Where no type is given, it is the value's, of which Triton looks at nothing else.
            arguments[parameter.name] = parameter.annotation_type or _integer(value)
        elif isinstance(value, tuple):
            arguments[parameter.name] = tuple(map(_type_of, value))
        else:
            arguments[parameter.name] = _type_of(value)
    return arguments


def _type_of(value: object) -> object:
    """The type of a value, with its divisibility; 1 and None are constants."""
    if isinstance(value, Tensor):  # a meta tensor, whose alignment is unknown
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return f"*{TYPES[value.dtype]}" + (" of 16" if aligned else "")
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return value
    return _integer(value) + (" of 16" if value % 16 == 0 else "")


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _source(kernel: triton.JITFunction, arguments: dict[str, object]) -> ASTSource:
    """Describe a call: strings are types, "of 16" if divisible by 16; the rest are constants."""
    signature, constants, aligned = {}, {}, {}

    def describe(place: tuple[int, ...], value: object) -> str:
        if not isinstance(value, str):
            constants[place] = value.value if isinstance(value, tl.constexpr) else value
            return "constexpr"
        if value.endswith(" of 16"):
            aligned[place] = [["tt.divisibility", 16]]
        return value.removesuffix(" of 16")

    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, tuple):
            signature[name] = tuple(describe((index, i), item) for i, item in enumerate(value))
        else:
            signature[name] = describe((index,), value)
    return ASTSource(kernel, signature, constants, aligned)
