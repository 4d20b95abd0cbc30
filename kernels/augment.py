"""One pass over a batch of images: gather, crop, flip, normalise, cut out and cast.

``classroomkd/data/augmentation.py`` specifies the arithmetic, bit by bit. The layout minimises
index arithmetic:

- A thread processes groups of adjacent pixels of a row, sized so that its three stores per group
  are 16 bytes wide. So each element's channel and position in its group are compile-time constants,
  and a pixel takes one address and three loads. The price: adjacent threads store 48 bytes apart,
  half a sector at a time, which the L2 cache merges.
- Crop offset, flip direction and cutout corner are the same for a whole image. Each thread hashes
  the sample index itself, about 30 instructions, instead of waiting for another thread.
- A pixel of the black border is loaded from three bytes known to be 0, in the upper half of its
  sample's index: one select per pixel instead of one per element.
- The table is loaded into shared memory while the index load is in flight: a lookup is a shift and
  a shared load, and does not wait for a cache line after the pixel bytes arrive.

The lower bound is memory traffic: 3·H·W bytes read and as many numbers written, each once. For
32×32 images to bfloat16 that is 3072 + 6144 = 9216 bytes, at an assumed 3 TB/s 325 million
images/s. Instructions per element (machine code for cuda:90 at 32×32, 24 elements per thread):

    ============================  ========  =======
    .                             bfloat16  float32
    crop and flip                     10.0      9.0
    crop, flip and cutout             12.5     11.6
    neither                            5.8      5.8

An image is one program of 4 warps. On 132 multiprocessors at an assumed 1.7 GHz, an image takes

    issue      4 warps · 240 instructions / 4 schedulers      240 clocks   935 million images/s
    lookups    96 a warp wide, 2.8 clocks each: random banks  270 clocks   830
    loads      96 a warp wide, of single bytes                 96 clocks  2300

so large batches should be bound by traffic. A batch of 512 is four images per multiprocessor, all
in flight at once, and 1.6 µs of traffic; it should be bound by latency: one chain of index, bytes,
lookup and store, an estimated 2.5 to 3.5 µs, or 150 to 200 million images/s. Hence a thread issues
the loads of all its 24 bytes before using any. None of these times has been measured yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from classroomkd.kernels import launch

_THREADS = 128  # of a program, with 8 pixels each


class Tiles(NamedTuple):
    """The tiling of an image: GROUPS groups of GROUP pixels for num_warps warps."""

    GROUP: int
    GROUPS: int
    num_warps: int

    def compiler_options(self) -> dict[str, int]:
        """What Triton is told besides the kernel's arguments."""
        return {"num_warps": self.num_warps}


def tiles(width: int, itemsize: int, warp_size: int) -> Tiles:
    """Groups within rows, of the power of two of pixels needed for 16-byte stores.

    If that does not divide the width, rows are not aligned to 16 bytes, and the largest power of
    two that does is used. Programs are not smaller for small images: with fewer warps lookups would
    become shuffles, and with fewer pixels per thread stores would be narrower.
    """
    group = math.gcd(width, 16 // itemsize)
    return Tiles(group, 8 * _THREADS // group, _THREADS // warp_size)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(index, key):
    """The hash of a sample's index, uint32; the key's bits come as an int32."""
    return _mix(_mix(index.to(tl.uint32)) ^ key.to(tl.uint32, bitcast=True))


@triton.jit
def _place(word, n_rows, n_columns):
    """A row below ``n_rows`` and a column below ``n_columns``."""
    row = ((word >> 17) * n_rows) >> 15
    column = (((word >> 2) & 0x7FFF) * n_columns) >> 15
    return row.to(tl.int32), column.to(tl.int32)


@triton.jit
def _within(at, first, length):
    """first ≤ at < first + length, in one comparison."""
    return (at - first).to(tl.uint32, bitcast=True) < length


# A new epoch key or position of the batch in the order must not trigger a compilation.
@triton.jit(
    do_not_specialize=["augment_key", "cutout_key"],
    do_not_specialize_on_alignment=["order_ptr"],
)
def gather_augment_kernel(
    image_ptr,
    target_ptr,
    order_ptr,
    table_ptr,
    out_ptr,
    out_target_ptr,
    order_stride,
    augment_key,
    cutout_key,
    H: tl.constexpr,
    W: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    CUTOUT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """GROUPS groups of pixels of one image per program; its first program copies the target too.

    Offsets within an image have 32 bits, those of images 64.
    """
    N_GROUPS: tl.constexpr = H * W // GROUP
    PROGRAMS: tl.constexpr = (N_GROUPS + GROUPS - 1) // GROUPS
    entry = tl.arange(0, 1024)
    table = tl.load(table_ptr + entry, mask=entry < 768, other=0.0)
    sample = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    part = tl.program_id(0) % PROGRAMS
    index_ptr = order_ptr + sample * order_stride
    index = tl.load(index_ptr)
    # An index is below 2³², so its upper half, at the higher address, is 0.
    black_ptr = index_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + 4
    target = tl.load(target_ptr + index)

    group = part * GROUPS + tl.arange(0, GROUPS)
    y = group // (W // GROUP)
    x = group % (W // GROUP) * GROUP

    # The source of each group's first pixel, and the direction of the others.
    row, column, step = y, x, 1
    if PADDING > 0 or FLIP:
        word = _word(index, augment_key)
        if FLIP:
            flip = (word & 1).to(tl.int32)
            step = 1 - 2 * flip
            column = step * x + flip * (W - 1)
        if PADDING > 0:
            top, left = _place(word, 2 * PADDING + 1, 2 * PADDING + 1)
            row += top - PADDING
            column += left - PADDING
    row_ptr = (image_ptr + (index * (H * W * 3) + row * (W * 3)))[:, None]
    row_inside = _within(row, 0, H)[:, None]

    entries = ()
    for k in tl.static_range(3):
        element = k * GROUP + tl.arange(0, GROUP)[None, :]
        channel = element % 3
        at = column[:, None] + step * (element // 3)
        inside = row_inside
        if PADDING > 0:
            inside = inside & _within(at, 0, W)
        pixel_ptr = tl.where(inside, row_ptr + at.to(tl.int64) * 3, black_ptr)
        value = tl.load(pixel_ptr + channel).to(tl.int32)
        entries = entries + (value + channel * 256,)

    # One gather for all three, because each would load the table into shared memory again; the
    # fourth pads to a power of two and is eliminated by the compiler.
    joined = tl.join(tl.join(entries[0], entries[1]), tl.join(entries[2], entries[2]))
    looked_up = tl.gather(table, joined.reshape(GROUPS * GROUP * 4), 0)
    first, second = tl.split(looked_up.reshape(GROUPS, GROUP, 2, 2))
    values = tl.split(first) + tl.split(second)

    if CUTOUT > 0:
        center_row, center_column = _place(_word(index, cutout_key), H, W)
        cut_column = center_column - CUTOUT // 2
        cut_row = _within(y, center_row - CUTOUT // 2, CUTOUT)[:, None]
    group_ptr = (out_ptr + (sample * (H * W * 3) + group * (3 * GROUP)))[:, None]
    for k in tl.static_range(3):
        element = k * GROUP + tl.arange(0, GROUP)[None, :]
        value = values[k]
        if CUTOUT > 0:
            cut = cut_row & _within(x[:, None] + element // 3, cut_column, CUTOUT)
            value = tl.where(cut, 0.0, value)
        tl.store(group_ptr + element, value, mask=(group < N_GROUPS)[:, None])
    if part == 0:
        tl.store(out_target_ptr + sample, target)


def gather_augment(
    images: Tensor,
    targets: Tensor,
    order: Tensor,
    table: Tensor,
    *,
    padding: int,
    flip: bool,
    cutout: int,
    augment_key: int,
    cutout_key: int,
) -> tuple[Tensor, Tensor]:
    """A batch of augmented, normalised images and their targets, in one launch.

    Compiles once per image size, dtype, padding, flip and cutout. Nothing is checked, and the host
    does not wait for the device: an index outside 0..N−1 reads out of bounds.

    Args:
        images: uint8 [N, H, W, 3], contiguous; H, W ≤ 1024.
        targets: int64 [N], contiguous.
        order: the sample indices, int64 [B], any stride.
        table: the normalised value of each channel's pixel values, [3, 256], contiguous, float32,
            float16 or bfloat16.
        padding: width in pixels of the black border for crops, 0 for no crop; flip: whether to flip
            half of the images; cutout: side in pixels of the square set to 0, 0 for none.
        augment_key: the epoch's key for crop and flip, 0 ≤ key < 2³²; cutout_key: for cutout.

    Returns:
        images [B, 3, H, W] of the table's dtype, in channels-last memory; targets int64 [B].

    """
    _, height, width, _ = images.shape
    n_samples = len(order)
    out = torch.empty((n_samples, height, width, 3), dtype=table.dtype, device=images.device)
    out_targets = torch.empty(n_samples, dtype=torch.int64, device=images.device)
    if n_samples:
        cut = tiles(width, table.itemsize, launch.WARP_SIZE)
        arguments = {
            "image_ptr": images,
            "target_ptr": targets,
            "order_ptr": order,
            "table_ptr": table,
            "out_ptr": out,
            "out_target_ptr": out_targets,
            "order_stride": order.stride(0),
            "augment_key": _signed(augment_key),
            "cutout_key": _signed(cutout_key),
            "H": height,
            "W": width,
            "PADDING": padding,
            "FLIP": flip,
            "CUTOUT": cutout,
            "GROUP": cut.GROUP,
            "GROUPS": cut.GROUPS,
        }
        grid = (n_samples * triton.cdiv(height * width, cut.GROUP * cut.GROUPS),)
        launch.start(gather_augment_kernel, grid, arguments, cut.compiler_options(), images.device)
    return out.permute(0, 3, 1, 2), out_targets


def _signed(key: int) -> int:
    """The int32 with the same 32 bits: Triton types keys from 2³¹ on as 64-bit integers."""
    return key - 2**32 if key >= 2**31 else key
