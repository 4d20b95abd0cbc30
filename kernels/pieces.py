"""Loading rows for ``held.py``: logits and targets in pieces, tiles [R, K, L] of registers."""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import smoothed


@triton.jit
def rows_of_type(ptrs, strides, row, lane, ALIGN: tl.constexpr, TYPE: tl.constexpr):
    """The row pointers [R, K] of the lanes with this dtype, and the mask of these lanes."""
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    begin = ptrs[0].to(tl.int64) + (row * ALIGN * strides[0] * size)[:, None] + lane * 0
    mine = (lane == 0) & (ptrs[0].dtype.element_ty == TYPE)
    for k in tl.static_range(1, len(ptrs)):
        here = lane == k
        offset = (row * ALIGN * strides[k] * size)[:, None]
        begin = tl.where(here, ptrs[k].to(tl.int64) + offset, begin)
        mine = mine | (here & (ptrs[k].dtype.element_ty == TYPE))
    begins = begin.to(tl.pointer_type(TYPE))
    return tl.multiple_of(begins, [ALIGN * size, ALIGN * size]), mine


@triton.jit
def _rows_of_lanes(ptrs, strides, row, lane, ALIGN: tl.constexpr):
    """The row pointers [R, K] of networks of one dtype; the student's in lanes without a network.

    They are chosen by one bit of the lane after another, in fewer dependent steps than there are
    networks. Every second address is combined with a zero that the compiler cannot see through
    (rows are below 2³¹). Otherwise it would load the chosen address from the kernel's arguments, at
    an offset that depends on the lane, for which AMD's GPUs wait.
    """
    TYPE: tl.constexpr = ptrs[0].dtype.element_ty
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    begins = ()
    zero = row >> 40
    for k in tl.static_range(lane.shape[1]):
        if k < len(ptrs):
            begin = ptrs[k].to(tl.int64) + row * ALIGN * strides[k] * size
            begins = begins + ((begin ^ zero if k % 2 else begin)[:, None],)
        else:
            begins = begins + (begins[0],)
    for bit in tl.static_range(5):
        if len(begins) > 1:
            halved = ()
            for k in tl.static_range(0, len(begins), 2):
                odd = (lane >> bit) % 2 == 1
                halved = halved + (tl.where(odd, begins[k + 1], begins[k]),)
            begins = halved
    tl.static_assert(len(begins) == 1)
    begin = begins[0].to(tl.pointer_type(TYPE))
    return tl.multiple_of(begin, [ALIGN * size, ALIGN * size])


@triton.jit
def _load_pieces(begin, lanes, column, C: tl.constexpr, PIECES: tl.constexpr, other):
    """Pieces of rows that begin there; ``other`` beyond the row, and in all lanes but these.

    Where all lanes are to be read, ``lanes`` is None, and only the piece in which the row ends has
    a mask: a masked load costs an instruction for each of its registers.
    """
    pieces = ()
    for i in tl.static_range(PIECES):
        at = column + i * column.shape[2]
        if lanes is not None:
            z = tl.load(begin + at, mask=lanes & (at < C), other=other)
        elif (i + 1) * column.shape[2] <= C:
            z = tl.load(begin + at)
        else:
            z = tl.load(begin + at, mask=at < C, other=other)
        pieces = pieces + (z.to(tl.float32),)
    return pieces


@triton.jit
def load_pieces(
    ptrs,  # the student's first, as the strides
    strides,
    row,  # [R]
    lane,  # [1, K]
    column,  # [1, 1, L], of the first piece
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    MIXED: tl.constexpr,
):
    """PIECES tiles [R, K, L] of float32, −inf outside the row.

    Lanes without a network have the student's: finite numbers once its maximum is subtracted.
    """
    outside = -float("inf")
    if MIXED:
        pieces = ()
        for i in tl.static_range(3):
            begin, mine = rows_of_type(
                ptrs, strides, row, lane, ALIGN, (tl.float32, tl.float16, tl.bfloat16)[i]
            )
            if ptrs[0].dtype.element_ty == begin.dtype.element_ty:
                mine = mine | (lane >= len(ptrs))
            mine = mine[:, :, None]
            of_type = _load_pieces(begin[:, :, None], mine, column, C, PIECES, outside)
            chosen = ()
            for piece in tl.static_range(PIECES):
                z = of_type[piece]
                chosen = chosen + (z if i == 0 else tl.where(mine, z, pieces[piece]),)
            pieces = chosen
    else:
        begin = _rows_of_lanes(ptrs, strides, row, lane, ALIGN)
        pieces = _load_pieces(begin[:, :, None], None, column, C, PIECES, outside)
    return pieces


@triton.jit
def load_student(
    ptrs, strides, row, lane, column, C: tl.constexpr, PIECES: tl.constexpr, ALIGN: tl.constexpr
):
    """The student's row in every lane: PIECES tiles [R, K, L], −inf outside the row."""
    begin = ptrs[0] + (row * ALIGN * strides[0])[:, None, None] + (lane * 0)[:, :, None]
    return _load_pieces(begin, None, column, C, PIECES, -float("inf"))


@triton.jit
def load_classes(labels, row, n_rows):
    """The rows' class indices, int64 [R, 1], or for one row [1, 32]; None for probabilities.

    Of one row each thread reads the index itself, at an address that to the compiler depends on the
    thread, since it does not know that ``zero`` is 0. An index common to all threads it would move
    to a uniform register at once, and wait for memory before it loads the logits.
    """
    target_ptr, target_stride, _, _ = labels
    if target_stride is None:
        zero = tl.arange(0, 32 if row.shape[0] == 1 else 1) * (n_rows >> 31)
        return tl.load(target_ptr + row[:, None] + zero[None, :]).to(tl.int64)


@triton.jit
def targets_of(
    labels,
    classes,  # of `load_classes`
    row,
    in_range,  # [R]
    lane,
    column,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The targets of rows: valid [R], out_of_range [R] (an invalid class index), the target class
    [R] (0 if there is none), t in pieces [R, 1 or K, L] (none if it is one class), and Σ_c t(c)
    [R, 1].
    """
    target_ptr, target_stride, label_smoothing, ignore_index = labels
    pieces = ()
    if target_stride is None:
        known = (classes >= 0) & (classes < C)
        code = tl.where(classes == ignore_index, -2, tl.where(known, classes, -1))
        code = tl.max(code.to(tl.int32), 1)
        valid = in_range & (code != -2)
        out_of_range = code == -1
        target = tl.maximum(code, 0)
        t_sum = tl.full([row.shape[0], 1], 1.0, tl.float32)
        if label_smoothing is not None:
            for i in tl.static_range(PIECES):
                at = column + i * column.shape[2]
                t = tl.where(at == target[:, None, None], 1.0, 0.0)
                pieces = pieces + (smoothed(t, label_smoothing, at < C, C),)
    else:
        valid = in_range
        out_of_range = row < 0
        begin = (row * ALIGN * target_stride)[:, None, None] + (lane * 0)[:, :, None]
        ts = _load_pieces(target_ptr + begin, None, column, C, PIECES, 0.0)
        best = begin * 0.0 - float("inf")
        best_at = (begin * 0 + C - 1).to(tl.int32)
        t_sums = begin * 0.0
        for i in tl.static_range(PIECES):
            at = column + i * column.shape[2]
            inside = at < C
            t = ts[i]
            best_at = tl.where(inside & (t > best), at, best_at)
            best = tl.where(inside, tl.maximum(best, t), best)
            t = smoothed(t, label_smoothing, inside, C)
            t_sums += t
            pieces = pieces + (t,)
        largest = tl.max(best, 2)
        at = tl.min(tl.where(best == largest[:, :, None], best_at, C - 1), 2)
        target = tl.max(at, 1)
        t_sum = tl.max(tl.sum(t_sums, 2), 1)[:, None]
    return valid, out_of_range, target, pieces, t_sum
