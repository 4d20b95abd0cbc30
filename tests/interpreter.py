"""Triton's interpreter, made ready before the kernels are defined.

Triton decides when a kernel is defined whether it will be interpreted, so one process can do only
one of the two. CPU tensors still take the definition, except in tests that ask for ``device``.
"""

import contextlib
import functools
import importlib.util
import os

import numpy as np
import torch


def _round_bfloat16_to_nearest():
    """Make the interpreter round float32 to bfloat16 as GPUs do; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, destination, mode):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return convert(data, source, destination, mode)
        rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()

    interpreter._convert_float = rounding


def _sum_in_a_tree():
    """Sum as GPUs do; along any but the last axis NumPy adds one number after another."""
    from triton.runtime import interpreter

    def sum_in_a_tree(self, input):
        data, axis = input.handle.data, self.axis
        if axis is not None:
            data, axis = np.ascontiguousarray(np.moveaxis(data, axis, -1)), -1
        result = np.sum(data, axis=axis)
        if self.keep_dims:
            result = np.expand_dims(result, tuple(range(data.ndim)) if axis is None else self.axis)
        return self.to_tensor(result, input.dtype)

    interpreter.ReduceOps.sum = sum_in_a_tree


def _patch_the_language_once_a_launch():
    """Triton patches its language anew at every call of a device function, which takes longer than
    most of them; once for each module and launch is enough.
    """
    from triton.runtime import interpreter

    patched = set()
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_patched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch_patched


def _skip_work_without_effect():
    """Leave out what takes a third of the time and changes no result."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    # Integers are added and multiplied twice, for an assertion that only debugging would make.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    tl.block_type.to_ir = lambda self, builder: self  # a new type that equals it

    broadcast = TritonSemantic.broadcast_impl_value

    def unless_alike(self, a, b):
        if a.type.is_block() and b.type.is_block() and a.type.shape == b.type.shape:
            return a, b
        return broadcast(self, a, b)

    TritonSemantic.broadcast_impl_value = unless_alike

    # A dictionary of all types is written anew at each call.
    of_type = interpreter._get_np_dtype
    of_number = functools.cache(of_type)

    def get_np_dtype(kind):
        return of_type(kind) if kind.scalar.is_ptr() else of_number(kind.scalar)

    interpreter._get_np_dtype = get_np_dtype


TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and (
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    import classroomkd.kernels.augment
    import classroomkd.kernels.launch  # noqa: F401

    with contextlib.suppress(ImportError):  # Triton imports it at the first launch, and minds
        import triton.experimental.gluon  # noqa: F401
    _round_bfloat16_to_nearest()
    _sum_in_a_tree()
    _patch_the_language_once_a_launch()
    _skip_work_without_effect()
# Commands that tests start must not inherit it: there CPU tensors take the definition.
os.environ.pop("TRITON_INTERPRET", None)

from classroomkd.loss import fused  # noqa: E402

fused._INTERPRET = False
