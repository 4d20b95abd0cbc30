"""Global and shared memory, and the shadows by which each access is judged.

Every byte has a shadow: who wrote it last, in which epoch (how many barriers its program had
passed), at which instruction. An access that nothing orders after an earlier one by another thread,
one of the two a write that changes the byte, is a race.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tests.ptx.parse import Instruction, PtxError

Array = np.ndarray
POISON = 0xFF
"""What memory holds that nobody wrote: NaN in every floating-point type, −1 in integers."""
_BASE = 0x7F0000000000  # the address at which global memory begins
_GAP = 512  # bytes between two tensors that belong to none
_ALIGNMENT = 256  # addresses are those of the tensors modulo this
_SECTOR = 32
_ADDRESSABLE, _INITIALISED, _WRITTEN = 1, 2, 4  # bits of a byte's state


@dataclass
class Finding:
    """Something that a kernel may not do, and how often it did it at one instruction."""

    kind: str
    kernel: str
    instruction: Instruction
    detail: str
    """Of the first time."""
    times: int = 1

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.instruction}: {self.detail} ({self.times} times)"


@dataclass
class Findings:
    """The findings of one launch, one of a kind for an instruction."""

    kernel: str
    code: list[Instruction]
    found: dict[tuple[str, int], Finding] = field(default_factory=dict)

    def add(self, kind: str, at: int, detail: str) -> None:
        """Note what the instruction at this index did."""
        if (kind, at) in self.found:
            self.found[kind, at].times += 1
        else:
            self.found[kind, at] = Finding(kind, self.kernel, self.code[at], detail)

    def fatal(self, kind: str, at: int, detail: str) -> PtxError:
        """Note it, and return the error to be raised, as execution cannot go on."""
        self.add(kind, at, detail)
        return PtxError(str(self.found[kind, at]))


@dataclass
class Actors:
    """The threads that execute a memory instruction, and when: arrays [n], of int32."""

    at: int
    """The instruction's index."""
    thread: Array
    """Number in the grid."""
    epoch: Array
    """Barriers that the thread's program has passed."""
    warp_epoch: Array
    """Barriers of its warp, and of its program, that the thread's warp has passed."""
    program: Array
    """Number among the programs that run together."""

    def some(self, which: Array) -> Actors:
        """Those of them."""
        fields = (self.thread, self.epoch, self.warp_epoch, self.program)
        return Actors(self.at, *(each[which] for each in fields))


class Order:
    """What happens before what: barriers within a program, acquire and release between programs."""

    def __init__(self, n_programs: int, n_threads: int) -> None:
        self.n_programs, self.n_threads = n_programs, n_threads
        self.epoch = np.zeros(n_programs, np.int32)
        # Vector clocks, of a program and of an address: writes of which epochs have been seen.
        self._known: dict[int, Array] = {}
        self._released: dict[int, Array] = {}
        self._acquired: dict[int, tuple[int, int]] = {}  # by program: epoch and thread

    def acquire_release(self, address: int, thread: int) -> None:
        """An atomic operation with these semantics on an address.

        It releases what its program wrote before its last barrier. What it acquires is known to the
        thread, and to its whole program from the next barrier on.
        """
        program = thread // self.n_threads
        epoch = int(self.epoch[program])
        known = self._known.setdefault(program, np.zeros(self.n_programs, np.int32))
        released = self._released.setdefault(address, np.zeros(self.n_programs, np.int32))
        np.maximum(known, released, out=known)
        np.maximum(released, known, out=released)
        released[program] = max(released[program], epoch)
        self._acquired[program] = (epoch, thread)

    def holds(self, thread: Array, epoch: Array, later: Array, later_epoch: Array) -> Array:
        """Whether what threads did in their epochs happens before what others do in theirs."""
        program, after = thread // self.n_threads, later // self.n_threads
        same = program == after
        ok = (thread == later) | (same & (epoch < later_epoch))
        across = np.flatnonzero(~same)
        for reader in np.unique(after[across]):
            known = self._known.get(int(reader))
            if known is None:
                continue
            at = across[after[across] == reader]
            since, by = self._acquired[int(reader)]
            seen = known[program[at]] > epoch[at]
            ok[at] |= seen & ((later_epoch[at] > since) | (later[at] == by))
        return ok


@dataclass
class Region:
    """Neighbouring bytes of a storage: a launch's argument, or several whose memory overlaps."""

    address: int
    storage: int
    """The address at which the tensor's storage begins."""
    bytes: Array
    """A view of the tensors' memory."""
    addressable: Array
    names: list[str] = field(default_factory=list)
    offset: int = 0
    """In the arena of `Global`."""


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + size


def regions(tensors: list[tuple[str, Tensor]]) -> list[Region]:
    """Regions that hold the tensors; of those only the elements' bytes are addressable."""
    extents = sorted((*_extent(tensor), name, tensor) for name, tensor in tensors)
    merged: list[tuple[int, int, list[tuple[str, Tensor]]]] = []
    for begin, end, name, tensor in extents:
        if merged and begin < merged[-1][1]:
            begin, before, members = merged.pop()
            merged.append((begin, max(before, end), [*members, (name, tensor)]))
        else:
            merged.append((begin, end, [(name, tensor)]))
    result = []
    for begin, end, members in merged:
        storage = members[0][1].untyped_storage()
        first = begin - storage.data_ptr()
        everything = torch.tensor([], dtype=torch.uint8).set_(storage)
        allowed = torch.zeros(end - begin, dtype=torch.bool)
        for _, tensor in members:
            width = tensor.element_size()
            strides = [stride * width for stride in tensor.stride()]
            at = tensor.data_ptr() - begin
            if tensor.numel():
                allowed.as_strided((*tensor.shape, width), (*strides, 1), at).fill_(True)
        names = [name for name, _ in members]
        memory = everything.numpy()[first : first + end - begin]
        result.append(Region(begin, storage.data_ptr(), memory, allowed.numpy(), names))
    return result


class Unwritten:
    """Storages that began unwritten: which of their bytes kernels have written since."""

    def __init__(self) -> None:
        # By the storage's address. Keeping the tensor keeps that from meaning another storage.
        self._storages: dict[int, tuple[Array, Tensor, int]] = {}

    def begin(self, tensor: Tensor) -> None:
        """A new tensor of which nothing has been written."""
        storage = tensor.untyped_storage()
        torch.tensor([], dtype=torch.uint8).set_(storage).fill_(POISON)
        written = np.zeros(storage.nbytes(), bool)
        self._storages[storage.data_ptr()] = written, tensor, _version(tensor)

    def written(self, region: Region) -> Array | None:
        """A view of what is known of the region's bytes; None where all count as written.

        They do as soon as PyTorch has written to the tensor, too, for nobody watches where.
        """
        written, tensor, version = self._storages.get(region.storage, (None, None, 0))
        if tensor is None or _version(tensor) != version:
            return None
        first = region.address - region.storage
        return written[first : first + len(region.bytes)]


def _version(tensor: Tensor) -> int:
    """How often PyTorch has written to a tensor; of inference tensors it does not count that."""
    return 0 if tensor.is_inference() else tensor._version


class Global:
    """Global memory: the regions in one arena, with gaps that belong to nobody."""

    def __init__(
        self, regions: list[Region], unwritten: Unwritten, order: Order, findings: Findings
    ) -> None:
        size = _GAP
        for region in regions:
            size += (region.address - size) % _ALIGNMENT
            region.offset = size
            size += len(region.bytes) + _GAP
        size += -size % _ALIGNMENT
        self.regions, self.order, self.findings = regions, order, findings
        self.data = np.full(size, POISON, np.uint8)
        self.state = np.zeros(size, np.uint8)
        for region in regions:
            place = slice(region.offset, region.offset + len(region.bytes))
            self.data[place] = region.bytes
            state = np.where(region.addressable, _ADDRESSABLE, 0)
            known = unwritten.written(region)
            good = np.ones(1, bool) if known is None else known | (region.bytes != POISON)
            self.state[place] = state | np.where(good, _INITIALISED, 0)
        self._writer = np.full(size, -1, np.int32)
        self._epoch = np.zeros(size, np.int32)
        self._at = np.zeros(size, np.int32)
        self._time = np.zeros(size, np.int32)  # of the last write
        self._now = 0
        self._reads: list[tuple[int, Actors, Array, int]] = []

    def address(self, tensor: Tensor) -> int:
        """Where the tensor lies."""
        where = tensor.data_ptr()
        if not tensor.numel():
            return _BASE
        for region in self.regions:
            if region.address <= where < region.address + len(region.bytes):
                return _BASE + region.offset + where - region.address
        raise AssertionError("every tensor has a region")

    def load(self, actors: Actors, address: Array, width: int, count: int) -> list[Array]:
        """``count`` neighbouring values of ``width`` bytes for each thread."""
        total = width * count
        offset = self._checked(actors, address, total)
        state = self._states(offset, total)
        unknown = ~(state & _INITIALISED).all(1)
        if unknown.any():
            where = self._name(offset[unknown][0])
            self.findings.add("read of memory that nobody wrote", actors.at, where)
        self._reads.append((self._now, actors, offset, total))
        if (state & _WRITTEN).any():
            self._judge("race: written, then read", actors, offset, total)
        return self._values(offset, width, count)

    def store(self, actors: Actors, address: Array, width: int, values: list[Array]) -> None:
        """Likewise. A write of what is there already is no race."""
        total = width * len(values)
        offset = self._checked(actors, address, total)
        changes = _changes(self._values(offset, width, len(values)), values)
        hit = changes & (self._states(offset, total) & _WRITTEN).any(1)
        if hit.any():
            self._judge("race: written twice", actors.some(hit), offset[hit], total)
        if detail := _clash(offset, values):
            where = f"{self._name(offset[0])}: {detail}"
            self.findings.add("race: two values, one address", actors.at, where)
        data = self.data.view(f"u{width}")
        for k, value in enumerate(values):
            data[offset // width + k] = value
        self._now += 1
        self._mark(actors, offset, total, changes)

    def atomic(
        self,
        actors: Actors,
        address: Array,
        function: Callable[[Array, Array], Array],
        values: Array,
        acquire_release: bool,
        rng: np.random.Generator,
    ) -> Array:
        """Each thread's read-modify-write, one after another in random order; the values before."""
        offset = self._checked(actors, address, values.itemsize)
        before = np.empty_like(values)
        data = self.data.view(values.dtype)
        if not (self._states(offset, values.itemsize) & _INITIALISED).all():
            where = self._name(offset[0])
            self.findings.add("read of memory that nobody wrote", actors.at, where)
        for k in rng.permutation(len(values)):
            place = offset[k] // values.itemsize
            before[k] = data[place]
            data[place] = function(before[k], values[k])
            if acquire_release:
                self.order.acquire_release(int(offset[k]), int(actors.thread[k]))
        self._now += 1
        # Atomic operations need no order among themselves, only with plain accesses.
        earlier = replace(actors, epoch=actors.epoch - 1)
        self._mark(earlier, offset, values.itemsize, np.ones(len(offset), bool))
        return before

    def finish(self, unwritten: Unwritten) -> None:
        """Look for reads that a later write was not ordered after, and copy what was written."""
        for time, actors, offset, total in self._reads:
            if (self._states(offset, total) & _WRITTEN).any():
                self._judge("race: read, then written", actors, offset, total, time)
        for region in self.regions:
            place = slice(region.offset, region.offset + len(region.bytes))
            written = (self.state[place] & _WRITTEN) != 0
            region.bytes[written] = self.data[place][written]
            if (known := unwritten.written(region)) is not None:
                known |= written

    def requests(self, thread: Array, address: Array, total: int) -> tuple[int, int]:
        """How many warps ask, and how many 32-byte sectors they ask for, each warp by itself."""
        warp, sector = thread >> 5, (address - np.uint64(_BASE)).view(np.int64) // _SECTOR
        span = max(1, total // _SECTOR)
        keys = np.unique(warp.astype(np.int64) * (len(self.data) // _SECTOR + 1) + sector)
        return len(np.unique(warp)), len(keys) * span

    def _checked(self, actors: Actors, address: Array, total: int) -> Array:
        """Offsets into the arena of accesses that are aligned and within a tensor's elements."""
        offset = (address - np.uint64(_BASE)).view(np.int64)
        for bad, kind in (
            ((offset < 0) | (offset > len(self.data) - total), "access to no tensor's memory"),
            (offset % total != 0, f"misaligned access of {total} bytes"),
        ):
            if bad.any():
                raise self.findings.fatal(kind, actors.at, self._whose(actors, bad, offset))
        bad = ~(self._states(offset, total) & _ADDRESSABLE).all(1)
        if bad.any():
            kind = f"access of {total} bytes out of bounds"
            raise self.findings.fatal(kind, actors.at, self._whose(actors, bad, offset))
        return offset

    def _whose(self, actors: Actors, bad: Array, offset: Array) -> str:
        program, thread = divmod(int(actors.thread[bad][0]), self.order.n_threads)
        where = self._name(offset[bad][0])
        return f"{where}, thread {thread} of program {program} and {int(bad.sum()) - 1} more"

    def _name(self, offset: int) -> str:
        for region in self.regions:
            first, size = region.offset, len(region.bytes)
            if first - _GAP // 2 <= offset < first + size + _GAP // 2:
                names = "/".join(dict.fromkeys(region.names))
                return f"{names}, byte {offset - first} of {size}"
        return "an address in no tensor"

    def _states(self, offset: Array, total: int) -> Array:
        return self.state.reshape(-1, total)[offset // total]

    def _values(self, offset: Array, width: int, count: int) -> list[Array]:
        data = self.data.view(f"u{width}")
        return [data[offset // width + k] for k in range(count)]

    def _mark(self, actors: Actors, offset: Array, total: int, changes: Array) -> None:
        row = offset // total
        self.state.reshape(-1, total)[row] |= np.uint8(_WRITTEN | _INITIALISED)
        if not changes.all():
            fresh = self._writer.reshape(-1, total)[row] < 0
            changes = changes | fresh.any(1)
            row, actors = row[changes], actors.some(changes)
        self._writer.reshape(-1, total)[row] = actors.thread[:, None]
        self._epoch.reshape(-1, total)[row] = actors.epoch[:, None]
        self._at.reshape(-1, total)[row] = actors.at
        self._time.reshape(-1, total)[row] = self._now

    def _judge(
        self, kind: str, actors: Actors, offset: Array, total: int, read_at: int | None = None
    ) -> None:
        """Find a race with the last writes, which come before; or after a read of that time."""
        row = offset // total
        writer = self._writer.reshape(-1, total)[row]
        concerned = writer >= 0
        if read_at is not None:
            concerned &= self._time.reshape(-1, total)[row] > read_at
        if not concerned.any():
            return
        which, byte = np.nonzero(concerned)
        writer, thread = writer[concerned], actors.thread[which]
        now, then = actors.epoch[which], self._epoch.reshape(-1, total)[row][concerned]
        if read_at is None:
            good = self.order.holds(writer, then, thread, now)
        else:
            good = self.order.holds(thread, now, writer, then)
        if good.all():
            return
        k = int(np.flatnonzero(~good)[0])
        place = int(offset[which[k]] + byte[k])
        n = self.order.n_threads
        self.findings.add(
            kind,
            actors.at,
            f"{self._name(place)}, by thread {thread[k] % n} of program {thread[k] // n}; written "
            f"by thread {writer[k] % n} of program {writer[k] // n} at "
            f"{self.findings.code[self._at[place]]}",
        )


def _changes(before: list[Array], values: list[Array]) -> Array:
    """Which threads' values differ from what is there."""
    return np.any([old != new for old, new in zip(before, values, strict=True)], axis=0)


def _clash(offset: Array, values: list[Array]) -> str:
    """Whether two threads of one instruction write different values to one address."""
    unique, first, back = np.unique(offset, return_index=True, return_inverse=True)
    if len(unique) == len(offset):
        return ""
    differs = _changes([value[first[back]] for value in values], values)
    return f"{int(differs.sum())} threads of one instruction differ" if differs.any() else ""


class Shared:
    """The shared memory of programs that run together, [programs, size] in one array."""

    def __init__(self, n_programs: int, size: int, n_threads: int, findings: Findings) -> None:
        self.size, self.n_threads, self.findings = size + -size % 16, n_threads, findings
        n = max(n_programs * self.size, 16)
        self.limit = size
        self.data = np.full(n, POISON, np.uint8)
        # Thread, epoch and warp's epoch of the last write, of the first read since, and of the
        # last one by another thread.
        self._write, self._read, self._other = (np.full((3, n), -1, np.int32) for _ in range(3))
        self._at = np.zeros(n, np.int32)

    def load(self, actors: Actors, address: Array, width: int, count: int) -> list[Array]:
        """As `Global.load`."""
        offset, place, now = self._checked(actors, address, width * count)
        write = self._write[:, place]
        if (write[0] < 0).any():
            where = f"byte {int(place[write[0] < 0][0]) % self.size} of shared memory"
            self.findings.add("read of memory that nobody wrote", actors.at, where)
        self._judge("race: written, then read", actors, place, write, now)
        first = self._before(self._read[:, place], now)
        self._read[:, place[first]] = now[:, first]
        other = self._read[0, place] != now[0]
        self._other[:, place[other]] = now[:, other]
        data = self.data.view(f"u{width}")
        return [data[offset // width + k] for k in range(count)]

    def store(self, actors: Actors, address: Array, width: int, values: list[Array]) -> None:
        """As `Global.store`."""
        offset, place, now = self._checked(actors, address, width * len(values))
        data = self.data.view(f"u{width}")
        before = [data[offset // width + k] for k in range(len(values))]
        changes = np.repeat(_changes(before, values), width * len(values))
        changes |= self._write[0, place] < 0
        changed, then = place[changes], now[:, changes]
        for kind, shadow in (
            ("race: written twice", self._write),
            ("race: read, then written", self._read),
            ("race: read, then written", self._other),
        ):
            self._judge(kind, actors, changed, shadow[:, changed], then)
        if detail := _clash(offset, values):
            self.findings.add("race: two values, one address", actors.at, detail)
        for k, value in enumerate(values):
            data[offset // width + k] = value
        self._write[:, changed] = then
        self._at[changed] = actors.at

    def wavefronts(self, warp: Array, address: Array, total: int) -> int:
        """Passes that the warps' requests take: distinct words of the bank with most of them."""
        if total > 4:  # at least half-warps at a time; conflicts of wide accesses are left out
            return len(np.unique(warp)) * total // 4
        words = np.unique(warp.astype(np.int64) << 32 | address >> np.uint32(2))
        banks, n = np.unique((words >> 32) * 32 + words % 32, return_counts=True)
        waves = np.zeros(int(warp.max()) + 1, np.int64)
        np.maximum.at(waves, banks // 32, n)
        return int(waves.sum())

    def _checked(self, actors: Actors, address: Array, total: int) -> tuple[Array, Array, Array]:
        """Offsets [n], all their bytes [n · total], and thread, epoch and warp's epoch of those."""
        for bad, kind in (
            (address.astype(np.int64) + total > self.limit, "access beyond shared memory"),
            (address % total != 0, f"misaligned access of {total} bytes"),
        ):
            if bad.any():
                detail = f"byte {int(address[bad][0])} of {self.limit} of shared memory"
                raise self.findings.fatal(kind, actors.at, detail)
        offset = address.astype(np.int64) + actors.program * self.size
        place = (offset[:, None] + np.arange(total)).reshape(-1)
        now = np.stack([actors.thread, actors.epoch, actors.warp_epoch])
        return offset, place, np.repeat(now, total, axis=1)

    @staticmethod
    def _before(then: Array, now: Array) -> Array:
        """Whether accesses happen before others: nobody's, the thread's own, before a barrier."""
        same_warp = then[0] >> 5 == now[0] >> 5
        ordered = (then[1] < now[1]) | (same_warp & (then[2] < now[2]))
        return (then[0] < 0) | (then[0] == now[0]) | ordered

    def _judge(self, kind: str, actors: Actors, place: Array, then: Array, now: Array) -> None:
        good = self._before(then, now)
        if good.all():
            return
        k = int(np.flatnonzero(~good)[0])
        self.findings.add(
            kind,
            actors.at,
            f"byte {place[k] % self.size} of shared memory, by thread {now[0, k] % self.n_threads} "
            f"after thread {then[0, k] % self.n_threads}; last written at "
            f"{self.findings.code[self._at[place[k]]]}",
        )
