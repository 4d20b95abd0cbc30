"""A kernel that is right, and damaged in one place at a time: each damage is noticed."""

import re
from contextlib import suppress
from unittest import mock

import pytest
import torch

from tests.ptx import TARGETS, PtxError, UnknownInstructionError, ptx_execution
from tests.ptx.memory import Order

pytest.importorskip("triton", "3.3", reason="needs Triton 3.3")
import triton
import triton.language as tl

from classroomkd.kernels import launch

pytestmark = pytest.mark.ptx

N_ROWS, C, BLOCK, WARPS = 5, 500, 512, 4


@triton.jit
def shares_kernel(
    x_ptr, share_ptr, sums_ptr, total_ptr, counter_ptr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's shares of its sum, one row a program; the last program sums the sums."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + column, mask=column < C, other=0.0)
    total = tl.sum(x, 0)
    tl.store(share_ptr + row * C + column, tl.exp2(x) / total, mask=column < C)
    tl.store(sums_ptr + row, total)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        inside = column < tl.num_programs(0)
        sums = tl.load(sums_ptr + column, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr, tl.sum(sums, 0))


@triton.jit
def transposing_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """A square tile, transposed."""
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.trans(tl.load(x_ptr + place)))


@triton.jit
def refused_kernel(x_ptr):
    """One that does not compile."""
    tl.static_assert(False, "this kernel is refused")


def run_kernel(x):
    """The kernel's outputs for float32 [rows, C]."""
    n_rows = len(x)
    outputs = torch.empty(n_rows, C), torch.empty(n_rows), torch.empty(())
    share, sums, total = outputs
    counter = torch.zeros(1, dtype=torch.int32)
    arguments = {"x_ptr": x, "share_ptr": share, "sums_ptr": sums, "total_ptr": total}
    arguments |= {"counter_ptr": counter, "C": C, "BLOCK": BLOCK}
    launch.start(shares_kernel, (n_rows,), arguments, {"num_warps": WARPS}, x.device)
    assert counter.item() == 0
    return outputs


def make_rows(n_rows=N_ROWS):
    return torch.rand(n_rows, C, generator=torch.Generator().manual_seed(n_rows))


def is_right(x, outputs):
    x = x.double()
    sums = x.sum(1)
    expected = x.exp2() / sums[:, None], sums, sums.sum()
    pairs = zip(outputs, expected, strict=True)
    return all(torch.allclose(got.double(), wanted, rtol=1e-6, atol=0) for got, wanted in pairs)


def damaged(edit, n_rows=N_ROWS):
    """What is found in the kernel as edited: kinds of findings, an error, a wrong result."""
    x, noticed = make_rows(n_rows), set()

    def checked(ptx):
        assert edit(ptx) != ptx, "nothing to change"
        return edit(ptx)

    with ptx_execution("cuda:90", edit=checked) as run, suppress(PtxError):
        if not is_right(x, run_kernel(x)):
            noticed.add("wrong")
    assert run.launches or run.findings, "an error that is no finding"
    return noticed | {finding.kind for finding in run.findings}


def replace(pattern, by, count=1):
    return lambda ptx: re.sub(pattern, by, ptx, count=count)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_is_right(target):
    x = make_rows(40)
    for seed in range(3):
        with ptx_execution(target, seed=seed, perturb=seed) as run:
            assert is_right(x, run_kernel(x))
        assert not run.findings


@pytest.mark.parametrize("target", TARGETS)
def test_matrices_that_are_transposed_as_they_are_loaded(target):
    x = make_rows(32)[:, :32].half().contiguous()
    out, loads = torch.empty_like(x), []

    def edit(ptx):
        loads.extend(re.findall(r"ldmatrix.*[.]trans[.]", ptx))
        return ptx

    with ptx_execution(target, edit=edit) as run:
        arguments = {"x_ptr": x, "out_ptr": out, "N": 32}
        launch.start(transposing_kernel, (1,), arguments, {"num_warps": 1}, x.device)
    assert loads
    assert not run.findings
    assert torch.equal(out, x.T)


def test_tensors_of_any_alignment():
    x = torch.rand(N_ROWS * C + 1)[1:].view(N_ROWS, C)
    with ptx_execution() as run:
        assert is_right(x, run_kernel(x))
    assert not run.findings


def barriers(ptx):
    return [match.span() for match in re.finditer(r"bar\.sync\s+0;", ptx)]


def test_each_barrier_is_missed_when_it_is_removed():
    """In so many rows that no warp's part of their sum is 0: to write what is there is no race."""
    with ptx_execution("cuda:90") as run:
        run_kernel(make_rows())
    spans = barriers(run.launches[0].ptx)
    assert len(spans) == 7
    for begin, end in spans:
        noticed = damaged(lambda ptx, begin=begin, end=end: ptx[:begin] + ptx[end:], n_rows=400)
        assert any(kind.startswith("race") for kind in noticed)


def test_a_mask_that_is_dropped():
    noticed = damaged(replace(r"@%p\d+ (ld\.global\.v)", r"\1", count=0))
    assert noticed == {"access of 16 bytes out of bounds"}


def test_the_neighbour_in_memory_is_out_of_bounds():
    """Two tensors of one storage: what is behind the first is the second's alone."""
    both = torch.rand(2, N_ROWS, C)
    edit = replace(r"@%p\d+ (ld\.global\.v)", r"\1", count=0)
    with ptx_execution(edit=edit) as run, pytest.raises(PtxError, match="out of bounds"):
        run_kernel(both[0])
    assert [finding.kind for finding in run.findings] == ["access of 16 bytes out of bounds"]


VECTOR_LOAD = r"(ld\.global\.v4\.b32 [^;]*\+ )0"


@pytest.mark.parametrize("shift", [4, 2])
def test_a_vector_that_is_shifted_is_misaligned(shift):
    """By one element and by half of one."""
    assert damaged(replace(VECTOR_LOAD, rf"\g<1>{shift}")) == {"misaligned access of 16 bytes"}


def test_a_number_that_is_shifted_by_half():
    noticed = damaged(replace(r"(st\.global\.b32 [^;]*\+ )0", r"\g<1>2"))
    assert noticed == {"misaligned access of 4 bytes"}


def test_a_number_that_is_shifted_by_one():
    noticed = damaged(replace(r"(st\.global\.b32 [^;]*\+ )0", r"\g<1>4"))
    assert "access of 4 bytes out of bounds" in noticed


def test_a_store_that_is_lost():
    noticed = damaged(replace(r"@%p\d+ st\.global\.b32 [^;]*;", ""))
    assert noticed == {"read of memory that nobody wrote", "wrong"}


def test_a_store_to_shared_memory_that_is_lost():
    noticed = damaged(replace(r"@%p\d+ st\.shared\.b32 [^;]*;", ""))
    assert noticed == {"read of memory that nobody wrote", "wrong"}


def test_an_output_that_is_never_written():
    assert damaged(replace(r"@%p\d+ st\.global\.v4\.b32 [^;]*;", "")) == {"wrong"}


def test_a_counter_without_acquire_and_release():
    noticed = damaged(replace(r"atom\.global\.gpu\.acq_rel", "atom.global.gpu.relaxed"))
    assert "race: written, then read" in noticed


def test_a_wrong_shuffle():
    assert damaged(replace(r"(shfl\.sync\.bfly\.b32[^;]*, )16,", r"\g<1>8,")) == {"wrong"}


def test_two_values_for_one_address():
    """All threads of a program store to the row's first element."""

    def edit(ptx):
        shares = re.search(r"ld\.param\.\w+\s+(%rd\d+), \[shares_kernel_param_1\]", ptx)[1]
        return replace(r"(st\.global\.v4\.b32 )\[ %rd\d+ ", rf"\1[ {shares} ")(ptx)

    assert "race: two values, one address" in damaged(edit)


def test_a_barrier_that_some_threads_do_not_reach():
    def edit(ptx):
        guard = re.search(r"@(%p\d+) ld\.global\.v", ptx)[1]
        return replace(r"bar\.sync\s+0;", f"@{guard} bra $AROUND; bar.sync 0;\n$AROUND:")(ptx)

    assert damaged(edit) == {"divergent barrier"}


def test_an_unknown_instruction_is_named_with_its_line():
    def edit(ptx):
        return ptx.replace("ex2.approx.ftz.f32", "tanh.approx.f32", 1)

    with ptx_execution(edit=edit) as run, pytest.raises(UnknownInstructionError) as caught:
        run_kernel(make_rows())
    assert re.search(r"'tanh.approx.f32 .*', PTX line \d+, test_checks.py:\d+", str(caught.value))
    assert not run.launches


def test_a_kernel_that_does_not_compile():
    x = torch.zeros(1)
    with ptx_execution("cuda:80"), pytest.raises(PtxError, match="does not compile for cuda:80"):
        launch.start(refused_kernel, (1,), {"x_ptr": x}, {}, x.device)


def test_counts():
    n_rows = 8
    with ptx_execution("cuda:90") as run:
        run_kernel(make_rows(n_rows))
    counts = run.counts
    loads, stores = counts["global loads"], counts["global stores"]
    row_bytes = 4 * C
    sums = 4 * n_rows  # which the last program reads
    assert loads.bytes == n_rows * row_bytes + sums
    assert stores.bytes == n_rows * (row_bytes + 4) + 8  # a sum, and at last total and counter
    # Rows of 2000 bytes: those of odd numbers begin in the middle of a sector, as their warps do.
    starts = [row * row_bytes + warp * 512 for row in range(n_rows) for warp in range(WARPS)]
    ends = [min(start + 512, (start // row_bytes + 1) * row_bytes) for start in starts]
    sectors = sum(-(-end // 32) - start // 32 for start, end in zip(starts, ends, strict=True))
    # The sums are read by four instructions, each one's of two threads in one sector.
    assert loads.sectors == sectors + 4
    assert loads.requests == n_rows * WARPS + 4
    assert counts["atomics"].warps == n_rows * WARPS
    assert counts["atomics"].requests == n_rows
    assert counts["ex2 and lg2"].warps == n_rows * WARPS * BLOCK // (WARPS * 32)
    assert counts["barriers"].warps % WARPS == 0
    assert f"{loads.bytes / n_rows:10.1f}" in run.table(n_rows, C)


def test_everything_is_put_back():
    before = torch.empty, torch.Tensor.new_empty, launch.start
    with ptx_execution():
        assert torch.empty is not before[0]
    assert (torch.empty, torch.Tensor.new_empty, launch.start) == before
    assert "new_empty" not in vars(torch.Tensor)


def test_a_target_that_is_none():
    with pytest.raises(ValueError, match="'cuda:70'"), ptx_execution("cuda:70"):
        pass


def test_the_order_of_programs_is_the_seed_s():
    """The last program differs among seeds, and is the same for the same one."""

    def last(seed):
        ends = []
        with ptx_execution(seed=seed) as run, mock.patch.object(Order, "acquire_release") as spy:
            run_kernel(make_rows(9))
            ends += [call.args[1] // (32 * WARPS) for call in spy.call_args_list]
        assert sorted(ends) == [*range(9)]
        assert run.findings  # as nothing was acquired
        return ends[-1]

    first = [last(seed) for seed in range(5)]
    assert len(set(first)) > 1
    assert first == [last(seed) for seed in range(5)]
