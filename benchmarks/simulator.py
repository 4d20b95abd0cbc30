"""Simulate the instructions of a grid's warps on the multiprocessors of a GPU, cycle by cycle.

Each of four schedulers per multiprocessor issues one instruction per cycle, from the warp that
issued last if it is ready, else from the oldest ready warp. A warp is ready if its stall count has
passed, its scoreboards are free, and the unit accepts an instruction. `COSTS` has the costs of
units, `Memory` those of memory; ``model.py`` gives the sources of the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from sass import UNITS

# Of each unit: cycles between two warps' instructions on one scheduler, and until the result.
COSTS = {
    "fma": (1, 4),
    "imad": (2, 5),
    "alu": (2, 4),
    "special": (8, 22),
    "shuffle": (2, 23),
    "shared": (2, 26),
    "load": (2, 38),  # from L1; from L2 and DRAM as `Memory` says
    "async_copy": (2, 38),
    "store": (2, 20),
    "atomic": (2, 450),
    "fence": (1, 600),
    "barrier": (1, 16),
    "uniform": (2, 12),
    "constant": (2, 40),
    "control": (1, 20),
    "async_commit": (1, 20),
    "async_wait": (1, 20),
    "unknown": (1, 20),
}
_ID = {name: i for i, name in enumerate(UNITS)}
_COST = np.array([COSTS[name] for name in UNITS], np.float64)
_SHUFFLE, _SHARED, _LOAD, _STORE = (_ID[x] for x in ("shuffle", "shared", "load", "store"))
_ATOMIC, _FENCE, _BARRIER, _SPECIAL = (_ID[x] for x in ("atomic", "fence", "barrier", "special"))
_COPY, _COMMIT, _WAIT = (_ID[x] for x in ("async_copy", "async_commit", "async_wait"))
_GROUPS = 32  # groups of asynchronous copies that a warp may have in flight


class Memory(NamedTuple):
    """Bytes per cycle and multiprocessor, cycles."""

    dram_bytes: float
    l2_bytes: float
    dram_latency: float
    l2_latency: float


@numba.njit(cache=True)
def play(
    code,  # int64 [instructions, 6]: unit, stall, sets, reads, waits, bytes a warp
    path,  # int64 [steps, 3]: instruction, warps that execute it (bits), row of traffic or number
    traffic,  # int64 [accesses, warps, 4]: bytes from L1, L2, DRAM, and from DRAM once for all
    memory,  # `Memory`
    n_warps,  # of a program
    n_slots,  # programs that are resident on a multiprocessor
    n_sms,
    n_programs,  # on all of them
    launch,  # cycles until the first program's first instruction
    replace,  # and the next program's, from the end of the previous one
    stagger,  # cycles between the first and the last multiprocessor's first program
):
    """Cycles until the last program ends, and the bytes that are on their way to a multiprocessor,
    their mean over that time.
    """
    n_steps = path.shape[0]
    per_sm = n_warps * n_slots
    shape = (n_sms, per_sm)
    at = np.full(shape, n_steps)  # the step each warp issues next; n_steps: none
    ready = np.full(shape, np.inf)  # and when it is ready
    held = np.zeros((n_sms, per_sm, 8))  # until when a scoreboard is held
    copies = np.zeros((n_sms, per_sm, _GROUPS))  # when each group of asynchronous copies arrives
    copied = np.zeros(shape)
    committed = np.zeros(shape, np.int64)
    waiting = np.zeros(shape, np.bool_)  # at a barrier
    resumes = np.zeros(shape)
    arrived = np.zeros((n_sms, n_slots), np.int64)
    ended = np.zeros((n_sms, n_slots), np.int64)
    unit_free = np.zeros((n_sms, 4, _COST.shape[0]))
    shared_free, l1_free, port_free = np.zeros(n_sms), np.zeros(n_sms), np.zeros(n_sms)
    wake = np.zeros((n_sms, 4))  # when a scheduler looks again
    last = np.zeros((n_sms, 4), np.int64)
    dram_free = l2_free = now = 0.0
    on_the_way = 0.0
    begun = finished = 0
    for slot in range(n_slots):
        for sm in range(n_sms):
            if begun < n_programs:
                begun += 1
                for w in range(slot * n_warps, (slot + 1) * n_warps):
                    at[sm, w], ready[sm, w] = 0, launch + sm * stagger / n_sms
    while finished < n_programs:
        for sm in range(n_sms):
            for scheduler in range(4):
                if wake[sm, scheduler] > now:
                    continue
                chosen, again = -1, np.inf
                for turn in range(-1, (per_sm - scheduler + 3) // 4):
                    w = last[sm, scheduler] if turn < 0 else scheduler + 4 * turn
                    if w >= per_sm or w % 4 != scheduler:
                        continue
                    if ready[sm, w] > now:
                        again = min(again, ready[sm, w])
                        continue
                    unit = code[path[at[sm, w], 0], 0]
                    free = unit_free[sm, scheduler, unit]
                    through_queue = unit in (_SHUFFLE, _SHARED, _LOAD, _COPY, _STORE, _ATOMIC)
                    if through_queue and shared_free[sm] > now + 8:
                        free = max(free, now + 1)
                    if free > now:
                        again = min(again, free)
                        continue
                    chosen = w
                    break
                if chosen < 0:
                    wake[sm, scheduler] = again
                    continue
                w = chosen
                last[sm, scheduler] = w
                slot, warp = w // n_warps, w % n_warps
                step = at[sm, w]
                instruction, access = path[step, 0], path[step, 2]
                unit, stall = code[instruction, 0], code[instruction, 1]
                unit_free[sm, scheduler, unit] = now + _COST[unit, 0]
                done = now + _COST[unit, 1]
                read = done
                if unit == _SPECIAL:
                    read = now + 8
                elif unit in (_SHUFFLE, _SHARED):
                    start = max(now, shared_free[sm])
                    n_bytes = code[instruction, 5] if unit == _SHARED else 0
                    shared_free[sm] = start + max(1.0, n_bytes / 128)
                    done, read = start + _COST[unit, 1], now + 12
                elif unit in (_LOAD, _COPY, _STORE):
                    near, l2, dram, cold = traffic[access, warp]
                    l2 += cold
                    start = max(now, l1_free[sm])
                    cost = max(1.0, (near + l2 + dram) / 128)
                    l1_free[sm] = start + cost
                    done, read = start + _COST[unit, 1] + cost, now + 12
                    if unit == _STORE:
                        if dram:
                            dram_free = max(dram_free, start) + dram / (memory.dram_bytes * n_sms)
                    elif l2 + dram:
                        start = max(start, port_free[sm])
                        port_free[sm] = start + (l2 + dram) / 64
                        if l2:
                            l2_free = max(l2_free, start) + l2 / (memory.l2_bytes * n_sms)
                            done = l2_free + memory.l2_latency
                            if cold:
                                done = l2_free + memory.dram_latency
                        if dram:
                            dram_free = max(dram_free, start) + dram / (memory.dram_bytes * n_sms)
                            done = max(done, dram_free + memory.dram_latency)
                        on_the_way += (l2 + dram) * (done - now)
                    if unit == _COPY:
                        copied[sm, w] = max(copied[sm, w], done)
                elif unit == _COMMIT:
                    copies[sm, w, committed[sm, w] % _GROUPS] = copied[sm, w]
                    committed[sm, w] += 1
                held[sm, w, code[instruction, 2]] = max(held[sm, w, code[instruction, 2]], done)
                held[sm, w, code[instruction, 3]] = max(held[sm, w, code[instruction, 3]], read)

                # What the warp issues next, and when at the earliest.
                can = now + max(1, stall)
                if unit == _FENCE:
                    can = done
                step += 1
                while step < n_steps and not path[step, 1] >> warp & 1:
                    step += 1
                if step < n_steps:
                    waits = code[path[step, 0], 4]
                    for board in range(6):
                        if waits >> board & 1:
                            can = max(can, held[sm, w, board])
                    if code[path[step, 0], 0] == _WAIT:
                        group = committed[sm, w] - path[step, 2] - 1  # the last that must be there
                        if group >= 0:
                            can = max(can, copies[sm, w, group % _GROUPS])
                wake[sm, scheduler] = now + 1
                if unit == _BARRIER:
                    waiting[sm, w] = True
                    resumes[sm, w], can = can, np.inf
                    arrived[sm, slot] += 1
                    if arrived[sm, slot] == _ones(path[at[sm, w], 1]):
                        arrived[sm, slot] = 0
                        opens = now + (_COST[unit, 1] if n_warps > 1 else 8)
                        for k in range(slot * n_warps, (slot + 1) * n_warps):
                            if waiting[sm, k]:
                                waiting[sm, k] = False
                                ready[sm, k] = max(resumes[sm, k], opens)
                                wake[sm, k % 4] = min(wake[sm, k % 4], ready[sm, k])
                        can = ready[sm, w]
                at[sm, w], ready[sm, w] = step, can
                if step < n_steps:
                    continue
                ready[sm, w] = np.inf
                ended[sm, slot] += 1
                if ended[sm, slot] < n_warps:
                    continue
                ended[sm, slot] = 0
                finished += 1
                if begun < n_programs:
                    begun += 1
                    for k in range(slot * n_warps, (slot + 1) * n_warps):
                        at[sm, k], ready[sm, k], committed[sm, k] = 0, now + replace, 0
                        held[sm, k] = 0
                        wake[sm, k % 4] = min(wake[sm, k % 4], now + replace)
        soonest = wake.min()
        if finished < n_programs and not soonest < np.inf:
            raise RuntimeError("no warp can go on")
        now = max(np.ceil(soonest), now + 1)
    now = max(now, dram_free)  # what was stored must be there
    return now, on_the_way / (now * n_sms)


@numba.njit(cache=True)
def _ones(bits):
    count = 0
    while bits:
        count += bits & 1
        bits >>= 1
    return count
