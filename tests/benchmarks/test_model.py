"""The model of the kernels' time: its parts against closed forms, its record."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
ahead_of_time = pytest.importorskip("classroomkd.kernels.ahead_of_time")

import triton.language as tl  # noqa: E402

import known_kernels  # noqa: E402
import model  # noqa: E402
import sass  # noqa: E402
import simulator  # noqa: E402
import walk  # noqa: E402
from processes import context  # noqa: E402
from registers import Registers, choose  # noqa: E402
from sass import UNITS, Instruction  # noqa: E402

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/modelled/model.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(
    not sass.TOOL.exists(), reason="Triton is here without its disassembler for NVIDIA"
)


# ---------------------------------------------------------------- registers

RNG = np.random.default_rng(0)
A, B, C = (RNG.integers(0, 2**32, 64) for _ in range(3))
SIGNED = [x.astype(np.uint32).view(np.int32).astype(object) for x in (A, B)]
LONG = C.astype(object) + (A.astype(object) << 32)  # of the registers R2, R3
WORD = 2**32


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("IADD3", "R9 R0 R1 R2", [A + B + C]),
        ("IADD3", "R9 R0 -R1 0xfffffffe", [A - B - 2]),
        ("IADD3.X", "R9 R0 R1 RZ P0 !PT", [A + B + (A < C)]),
        ("IMAD.WIDE.U32", "R8 R0 R1 R2", [A.astype(object) * B + LONG]),
        ("IMAD.WIDE", "R8 R0 R1 RZ", [SIGNED[0] * SIGNED[1]]),
        ("IMAD.MOV.U32", "R9 RZ RZ R2", [C]),
        ("LEA", "R9 R0 R1 0x4", [A * 16 % WORD + B]),
        ("LEA.HI.X", "R9 R0 R1 R2 0x5 PT", [((C.astype(object) << 32 | A) << 5 >> 32) + B + 1]),
        ("SHF.R.U32.HI", "R9 RZ 0x5 R0", [A >> 5]),
        ("SHF.R.S32.HI", "R9 RZ 0x1f R0", [SIGNED[0] >> 31]),
        ("SHF.L.U64.HI", "R9 R0 0x3 R1", [(B.astype(object) << 32 | A) << 3 >> 32]),
        ("LOP3.LUT", "R9 R0 R1 R2 0xea !PT", [A & B | C]),
        ("LOP3.LUT", "R9 R0 R1 R2 0x96 !PT", [A ^ B ^ C]),
        ("SEL", "R9 R0 R1 P0", [np.where(A < C, A, B)]),
        ("VIMNMX.U32", "R9 R0 R1 PT", [np.minimum(A, B)]),
        ("SGXT", "R9 R0 0x8", [(A % 256 + 128) % 256 - 128]),
        ("PRMT", "R9 R0 0x5410 R1", [A % 65536 + B % 65536 * 65536]),
    ],
)
def test_integer_instructions(opcode, operands, expected):
    registers = Registers({}, {})
    registers.values = {"R0": A, "R1": B, "R2": C, "R3": A, "P0": A < C}
    written = registers.results(_instruction(opcode, operands.split()))
    value = written.get("R9", 0)
    if "R8" in written:
        value = (written["R8"].astype(object) + (value.astype(object) << 32)) % 2**64
        assert np.array_equal(value, expected[0] % 2**64)
    else:
        assert np.array_equal(value, expected[0] % WORD)


@pytest.mark.parametrize(("low", "high"), [("GE", np.greater_equal), ("NE", np.not_equal)])
def test_comparisons_of_two_words_and_of_what_is_unknown(low, high):
    registers = Registers({}, {})
    tie = np.where(np.arange(64) % 2 == 0, A, B)
    registers.values = {"R0": C, "R1": A, "R2": B, "R3": tie}
    registers.values |= registers.results(
        _instruction(f"ISETP.{low}.U32.AND", ["P1", "PT", "R0", "R2", "PT"])
    )
    written = registers.results(
        _instruction(f"ISETP.{low}.U32.AND.EX", ["P2", "PT", "R1", "R3", "PT", "P1"])
    )
    wide = [
        C.astype(object) + (A.astype(object) << 32),
        B.astype(object) + (tie.astype(object) << 32),
    ]
    assert np.array_equal(written["P2"], high(*wide).astype(bool))
    unknown = registers.results(_instruction("FSETP.GT.AND", ["P3", "PT", "R7", "R0", "!PT"]))
    assert unknown["P3"] is False
    unknown = registers.results(_instruction("FSETP.GT.AND", ["P3", "PT", "R7", "R0", "PT"]))
    assert unknown["P3"] is None


def test_what_no_thread_keeps_may_be_unknown():
    assert choose(np.full(64, True), A, None) is A
    assert choose(np.full(64, False), None, B) is B
    assert choose(A < B, A, None) is None


def _instruction(opcode, operands=(), unit="alu", stall=1, sets=7, waits=0):
    return Instruction(0, "", opcode, tuple(operands), unit, stall, sets, 7, waits)


# ---------------------------------------------------------------- the simulator


def play(code, traffic, n_warps=1, slots=1, n_sms=1, n_programs=1, repeat=1):
    unit = {name: i for i, name in enumerate(UNITS)}
    encoded = np.array([(unit[i.unit], i.stall, i.sets, 7, i.waits, 128) for i in code])
    path = np.array([(k % len(code), 2**n_warps - 1, 0) for k in range(repeat * len(code))])
    traffic = np.array([[traffic] * n_warps], float)
    given = (model.MEMORY, n_warps, slots, n_sms, n_programs, 0, 0, 0)
    return simulator.play(encoded, path, traffic, *given)


@pytest.mark.parametrize(
    ("unit", "n_warps", "cycles"),
    [
        ("fma", 1, 1000),  # each scheduler issues one a cycle
        ("fma", 8, 2000),
        ("alu", 4, 2000),
        ("special", 4, 8000),  # four lanes
        ("shuffle", 8, 8000),  # one a cycle for the whole multiprocessor
    ],
)
def test_units_take_what_they_can(unit, n_warps, cycles):
    assert play([_instruction("X", unit=unit)], [0] * 4, n_warps, repeat=1000)[0] == pytest.approx(
        cycles, rel=0.02
    )


def test_a_chain_of_loads_takes_its_latencies_and_many_take_the_bandwidth():
    load = _instruction("LDG.E.128", unit="load", sets=0, waits=1)
    alone = play([load], [0, 0, 512, 0], repeat=100)[0]
    assert alone == pytest.approx(100 * (model.MEMORY.dram_latency + 512 / 13), rel=0.05)
    many = play([load], [0, 0, 512, 0], n_warps=8, slots=8, n_programs=80, repeat=100)[0]
    assert many == pytest.approx(8 * 80 * 100 * 512 / model.MEMORY.dram_bytes, rel=0.03)


def test_a_barrier_waits_for_the_slowest_warp():
    code = [_instruction("MUFU.EX2", unit="special", sets=0), _instruction("BAR", unit="barrier")]
    times = [play(code, [0] * 4, n_warps, repeat=100)[0] for n_warps in (1, 4, 16)]
    assert times[0] < times[1] < times[2]
    assert times[2] == pytest.approx(100 * (3 * 8 + 1 + simulator.COSTS["barrier"][1]), rel=0.1)


# ---------------------------------------------------------------- a launch


def test_registers_are_those_of_a_scheduler():
    assert model.occupancy(registers=200, n_warps=2, shared=0) == 4  # 2 warps a scheduler, not 2.5
    assert model.occupancy(registers=32, n_warps=1, shared=0) == 32
    assert model.occupancy(registers=32, n_warps=4, shared=0) == 16
    assert model.occupancy(registers=32, n_warps=4, shared=100 * 1024) == 2


@pytest.fixture(scope="module")
def fresh():
    """Call in fresh processes, since this one may be interpreting the kernels."""
    with ProcessPoolExecutor(2, mp_context=context()) as pool:
        yield pool.map


def _walked(kernel, block=0):
    """The loss at (2048, 1000, 2), or a plain kernel at 8192 classes."""
    if kernel == "loss":
        given = {"n_classes": 1000, "n_mentors": 2, "n_rows": 2048}
        launch = ahead_of_time.call_launches(**given)["classroom"]
        code = ahead_of_time.machine_code(launch, model.TARGET)
    else:
        known = next(k for k in known_kernels.known() if k.kernel.__name__ == kernel)
        known = known._replace(n_classes=8192, block=block, dtype=torch.float32)
        code = known.code(model.TARGET)
    caches = walk.Caches(l1=1e9 if kernel == "loss" else 0, l2=0, shared_is_cold=False)
    return _walk(code, caches)


def _walk(code, caches, **options):
    instructions, constants = sass.disassemble(code.cubin), model.constants_of(code)
    return walk.walk(instructions, *constants, code.grid, code.num_warps, caches, **options)


def _bytes(walked, path):
    return walked.traffic[path[path[:, 2] >= 0, 2]].sum((0, 1)).tolist()


def test_what_kernels_move_and_how_often_they_loop(fresh):
    jobs = (
        *(("softmax_kernel", 8192), ("two_read_softmax_kernel", 4096)),
        *(("two_read_softmax_kernel", 1024), ("loss", 0)),
    )
    once, twice, in_more_steps, loss = fresh(_walked, *zip(*jobs, strict=True))
    for walked, times in ((once, 2), (twice, 3), (in_more_steps, 3)):
        assert walked.traffic.sum((0, 1)).tolist() == [0, 0, times * 8192 * 4, 0]
        assert not len(walked.tail)
    # With an L1 that forgets nothing: each logit once, the gradient, and a few numbers besides.
    one_read = (2 + 2) * 1000 * 4
    assert one_read <= _bytes(loss, loss.path)[2] <= one_read + 16 * walk.SECTOR
    _, from_l2, dram, _ = _bytes(loss, loss.tail)
    assert from_l2 > 0  # what other programs wrote
    assert dram <= 4 * walk.SECTOR  # results


@triton.jit
def _turns_kernel(counter_ptr, out_ptr, n):
    taken = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while taken < 3:
        tl.store(out_ptr + taken, 1.0)
        taken = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = 0.0
        for i in range(n // tl.num_programs(0)):
            total += tl.load(out_ptr + i)
        tl.store(out_ptr + n, total)


def _turns(first):
    counter, out = (torch.empty(9, dtype=x, device="meta") for x in (torch.int32, torch.float32))
    arguments = {"counter_ptr": counter, "out_ptr": out, "n": 3000}
    code = ahead_of_time.kernel_code(
        _turns_kernel, (100,), arguments, {"num_warps": 4}, model.TARGET
    )
    walked = _walk(code, walk.Caches(0, 0, False), first=first)
    return walked.takes_turns, _bytes(walked, walked.path), _bytes(walked, walked.tail)


def test_turns_are_taken_by_the_first_and_sums_made_by_the_last(fresh):
    others, first = fresh(_turns, (False, True))
    assert others[:2] == (True, [0, 0, 0, 0])
    assert first[:2] == (True, [0, 0, 4, 0])
    for _, _, (from_l1, from_l2, stored, _) in (others, first):
        assert from_l1 + from_l2 == 3000 // 100 * 4 * walk.SECTOR  # for each of four warps
        assert stored == 4


def test_a_loop_whose_end_is_data_is_an_error():
    loop = [
        Instruction(0, "", "LDG.E", ("R0", "desc[UR4][R2.64]"), "load", 1, 0, 7, 0),
        Instruction(16, "", "ISETP.NE.AND", ("P0", "PT", "R0", "RZ", "PT"), "alu", 1, 7, 7, 1),
        Instruction(32, "P0", "BRA", ("0x0",), "control", 1, 7, 7, 0),
        Instruction(48, "", "EXIT", (), "control", 1, 7, 7, 0),
    ]
    with pytest.raises(walk.NotModelledError, match="the end of the loop at 0x20 is data"):
        walk.walk(loop, {}, [], (1,), 1, walk.Caches(0, 0, False))


CHOSEN_ADDRESS = [  # by what was read from memory
    Instruction(0, "", "LDG.E", ("R0", "desc[UR4][R2.64]"), "load", 1, 0, 7, 0),
    Instruction(16, "", "ISETP.NE.AND", ("P0", "PT", "R0", "RZ", "PT"), "alu", 1, 7, 7, 1),
    Instruction(32, "", "MOV", ("R5", "RZ"), "alu", 1, 7, 7, 0),
    Instruction(48, "P0", "MOV", ("R4", "0x40"), "alu", 1, 7, 7, 0),
    Instruction(64, "", "LDG.E.128", ("R8", "desc[UR4][R4.64]"), "load", 1, 0, 7, 0),
    Instruction(80, "", "EXIT", (), "control", 1, 7, 7, 0),
]


def test_what_is_executed_on_a_condition_that_is_data_is_executed():
    """Else an address that was chosen so would be unknown, an error for a load of 16 bytes."""
    caches = walk.Caches(0, 0, shared_is_cold=True)
    walked = walk.walk(CHOSEN_ADDRESS, {}, [], (1,), 1, caches)
    assert walked.traffic[walked.path[4, 2]].tolist() == [[0, 0, 0, walk.SECTOR]]
    without = [i._replace(opcode="FADD", guard="") if i.guard else i for i in CHOSEN_ADDRESS]
    with pytest.raises(walk.NotModelledError, match="the address at 0x40 is data"):
        walk.walk(without, {}, [], (1,), 1, caches)


# ---------------------------------------------------------------- the record


def test_no_headline_size_is_slower_than_recorded(fresh):
    rows = list(fresh(model.row, *zip(*model.HEADLINES, strict=True)))
    command = "python benchmarks/model.py --out benchmarks/results/modelled/model.json"
    slower = model.slower(rows, RECORD["rows"])
    assert not slower, f"{'; '.join(slower)}. If that is meant, write the record anew: {command}"
    faster = [row | {"time": row["time"] / 1.06} for row in rows]
    assert len(model.slower(rows, faster)) == len(rows)
    for row in rows:
        assert row["time"] >= max(row["memory"], row["exponentials"], row["issue"])


def test_the_record_has_what_the_page_says():
    cases = [tuple(row[key] for key in model.CASE) for row in RECORD["rows"]]
    assert len(set(cases)) == len(cases) <= RECORD["calls"] == len(list(model.cases()))
    assert set(model.HEADLINES) <= set(cases) <= set(model.cases())
    assert len(RECORD["sensitivity"]) == len(model.HEADLINES)
    assert [tuple(one) for one in RECORD["assumptions"]] == list(model.ASSUMPTIONS)
    assert len(RECORD["compared"]) == len(list(known_kernels.known()))
    for one in RECORD["compared"]:
        spills = one["classes"] == 65536
        assert math.isclose(one["modelled"], one["published"], rel_tol=0.35 if spills else 0.1), one
