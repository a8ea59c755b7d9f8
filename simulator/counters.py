"""Counts what launches do: instructions by pipe, sectors of global memory, wavefronts of shared memory, waits.

    with simulator.profile() as counts:
        kernel[grid](x, y, ...)
    print(counts)

The code is PTX, so an instruction is one of PTX: ptxas drops most moves, fuses some, and makes several of a division. An
instruction that a guard turns off in all threads of a warp counts too, as it takes its turn. Caches are not simulated. What
they could spare is told by two counts of each tensor: bytes of the sectors that instructions ask for, and of those that a
program asks for the first time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
from simulator.global_memory import REAL, TAG, GlobalMemory
from simulator.loops import Loop, loops
from simulator.parser import Instruction, Kernel, parse
from simulator.pipes import operations, pipe, waits_for, wgmma_bytes
from simulator.resources import Resources, resources

if TYPE_CHECKING:
    from simulator.machine import Machine

SECTOR = 32  # bytes that global memory moves at least
BANKS = 32  # of shared memory, 4 bytes wide; one wavefront reads or writes a word of each
KEPT = 1 << 22  # numbers of sectors that are kept before those that occur twice are dropped


@dataclass
class Access:
    """What the warps did in memory by one instruction.

    Attributes:
        requests: how often a warp asked, with one thread at least.
        transactions: sectors of global memory, or wavefronts of shared memory.
        least: of these, had the bytes lain side by side.
        bytes: asked for; what several threads of a warp asked for counts once.
    """

    requests: int = 0
    transactions: int = 0
    least: int = 0
    bytes: int = 0

    def __add__(self, other: Access) -> Access:
        return Access(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Operand:
    """What was read or written of one tensor, in bytes.

    Attributes:
        touched: different bytes, of each launch.
        asked: sectors that instructions asked for: what L2 serves if no L1 cache keeps anything.
        first: sectors that each program asked for the first time: what L2 serves if L1 caches keep everything.
    """

    touched: int = 0
    asked: int = 0
    first: int = 0

    def __add__(self, other: Operand) -> Operand:
        return Operand(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LoopCount:
    """A loop as it ran.

    Attributes:
        loop: its blocks.
        place: where its first instruction comes from, "file:line:column", or its line of the PTX.
        iterations: of all warps.
        instructions: of all warps, by pipe.
    """

    loop: Loop
    place: str
    iterations: int
    instructions: Counter[str]


class Code:
    """A kernel's instructions, by basic blocks.

    Attributes:
        opcodes: of what accesses memory, by its line of the PTX.
        loops: its loops.
        looped: the blocks of all loops.
    """

    def __init__(self, kernel: Kernel) -> None:
        parsed = parse(kernel.text)
        self.blocks = [block.code for block in parsed.blocks]
        memory = ("global", "shared", "boxes")
        self.opcodes = {i.line: i.opcode for code in self.blocks for i in code if pipe(i.opcode) in memory}
        self.loops = loops(parsed)
        self.looped = frozenset[int]().union(*(loop.blocks for loop in self.loops))


class Counts:
    """Counts of one launch, or of several launches of one kernel.

    Attributes:
        kernel: the kernel.
        shared_bytes, warps: of a program.
        launches, programs: how many there were.
        runs: how many warps ran each basic block.
        accesses: by ("global" or "shared", line of the PTX). An asynchronous copy of a thread is in both.
        reads, writes: by the tensor's name in the launch. Names of one memory are joined by "/".
        boxes: bytes that boxes of tensor maps filled or took of shared memory.
    """

    def __init__(self, kernel: Kernel, code: Code, shared_bytes: int) -> None:
        self.kernel, self.code, self.shared_bytes = kernel, code, shared_bytes
        self.launches = self.programs = self.boxes = 0
        self.warps = kernel.threads // 32
        self.runs = [0] * len(code.blocks)
        self.accesses: dict[tuple[str, int], Access] = {}
        self.reads: dict[str, Operand] = {}
        self.writes: dict[str, Operand] = {}

    def add(self, other: Counts) -> None:
        """Adds the counts of other launches of the same kernel."""
        self.launches += other.launches
        self.programs += other.programs
        self.boxes += other.boxes
        self.runs = [a + b for a, b in zip(self.runs, other.runs, strict=True)]
        for at, access in other.accesses.items():
            self.accesses[at] = self.accesses.get(at, Access()) + access
        for mine, theirs in ((self.reads, other.reads), (self.writes, other.writes)):
            for name, operand in theirs.items():
                mine[name] = mine.get(name, Operand()) + operand

    def instructions(self, inside: bool | None = None) -> Counter[str]:
        """Returns the instructions of all warps by pipe: those inside loops, those outside, or both."""
        return self._pipes(b for b in range(len(self.runs)) if inside is None or (b in self.code.looped) is inside)

    @property
    def loops(self) -> list[LoopCount]:
        """The loops that ran, in the order of the code."""
        found = []
        for loop in self.code.loops:
            iterations = sum(self.runs[b] for b in loop.latches)
            if iterations:
                line = next(i.line for b in sorted(loop.blocks) for i in self.code.blocks[b])
                place = self.kernel.sources.get(line) or f"PTX line {line}"
                found.append(LoopCount(loop, place, iterations, self._pipes(loop.blocks)))
        return found

    @property
    def main_loop(self) -> LoopCount | None:
        """The loop with most operations, then with most instructions: of loops in one another the outer one."""

        def rank(found: LoopCount) -> tuple[float, int]:
            return self._total(operations, found.loop.blocks), found.instructions.total()

        return max(self.loops, key=rank, default=None)

    @property
    def operations(self) -> int:
        """Operations of all products, two per multiply-add, whether or not threads are turned off."""
        return round(self._total(operations, range(len(self.runs))))

    @property
    def wgmma_bytes(self) -> int:
        """Bytes of shared memory that wgmma reads. `accesses` do not have them."""
        return round(self._total(wgmma_bytes, range(len(self.runs))))

    @property
    def waits(self) -> Counter[str]:
        """How often warps waited, by what for."""
        found: Counter[str] = Counter()
        for runs, code in zip(self.runs, self.code.blocks, strict=True):
            found.update({what: runs * n for what, n in Counter(waits_for(i.opcode) for i in code).items() if what and runs})
        return found

    @property
    def resources(self) -> Resources | None:
        """What ptxas reports; None if Triton came without one."""
        return resources(self.kernel.text)

    def memory(self, space: str) -> dict[int, Access]:
        """Returns the accesses of "global" or "shared" memory by their lines of the PTX, in order."""
        return {line: access for (where, line), access in sorted(self.accesses.items()) if where == space}

    def _pipes(self, blocks: Iterable[int]) -> Counter[str]:
        found: Counter[str] = Counter()
        for b in blocks:
            for name, n in Counter(pipe(i.opcode) for i in self.code.blocks[b]).items():
                found[name] += n * self.runs[b]
        return +found

    def _total(self, count: Callable[[Instruction], float], blocks: Iterable[int]) -> float:
        return sum(self.runs[b] * sum(map(count, self.code.blocks[b])) for b in blocks)

    def __str__(self) -> str:
        from simulator.tables import table

        return table(self)


class Tally:
    """What the machine reports of one launch to.

    Storages are laid out one behind the other, in whole sectors, so that one number says which byte of which storage.
    """

    def __init__(self, profile: Profile, counts: Counts, memory: GlobalMemory) -> None:
        self.profile, self.counts, self.memory = profile, counts, memory
        starts = np.array([0, *(s.start // SECTOR * SECTOR for s in memory.storages)])
        sizes = [0, *(-(-(s.start % SECTOR + s.size) // SECTOR) * SECTOR for s in memory.storages)]
        self.ends = np.cumsum(sizes)  # of each storage, by its number from 1
        self.shifts = self.ends - sizes - starts
        self.total = max(int(self.ends[-1]), SECTOR)
        self.touched = {kind: np.zeros(self.total // memory.granule, bool) for kind in ("reads", "writes")}
        self.asked = {kind: np.zeros(self.ends.size, np.int64) for kind in self.touched}
        self.first: dict[str, list[Array]] = {kind: [] for kind in self.touched}

    def block(self, m: Machine, number: int) -> None:
        """All warps of the machine run a basic block."""
        self.counts.runs[number] += m.C * m.W

    def box(self, bytes_: int) -> None:
        """Boxes fill, or take, so many bytes of shared memory."""
        self.counts.boxes += bytes_

    def access(self, m: Machine, kind: str, line: int, addresses: Array, lanes: Array, size: int) -> None:
        """Threads access `size` bytes each of global memory; kind is "reads" or "writes"."""
        flat = (addresses & REAL) + self.shifts[addresses >> TAG]
        distinct = _distinct(lanes // 32 * self.total + flat)  # those of a warp lie together
        per_warp = _lengths(distinct // self.total)
        sectors = _distinct(distinct // SECTOR)
        bytes_ = distinct.size * size
        self._note("global", line, Access(per_warp.size, sectors.size, int(-(-per_warp * size // SECTOR).sum()), bytes_))
        granule = self.memory.granule
        self.touched[kind][(flat // granule)[:, None] + np.arange(size // granule)] = True
        in_all = self.total // SECTOR
        warps, sectors = np.divmod(sectors, in_all)
        self.asked[kind] += self._by_storage(sectors)
        self.first[kind].append(_distinct(m.programs[warps // m.W] * in_all + sectors))
        if sum(a.size for a in self.first[kind]) > KEPT:
            self.first[kind] = [_distinct(np.concatenate(self.first[kind]))]

    def shared(self, m: Machine, line: int, offsets: Array, lanes: Array, size: int) -> None:
        """Threads access `size` bytes each of shared memory: up to 128 bytes at a time, those of a half or a quarter of a warp
        if threads have 8 or 16. (The initialisation of an mbarrier is none of these.)"""
        if line not in self.counts.code.opcodes:
            return
        group = lanes // (32 if size <= 4 else 128 // size)
        span = -(-m.shared.row // 128) * 128
        distinct = _distinct(group * span + offsets)
        words = distinct // 4 if size <= 4 else (distinct[:, None] // 4 + np.arange(size // 4)).reshape(-1)
        words = _distinct(words)
        per_group = _lengths(words * 4 // span)
        banks = np.sort(words * 4 // span * BANKS + words % BANKS)
        per_bank, of_group = _lengths(banks), _distinct(banks) // BANKS
        most = np.maximum.reduceat(per_bank, np.flatnonzero(np.diff(of_group, prepend=-1)))
        requests = _distinct(lanes // 32).size
        self._note("shared", line, Access(requests, int(most.sum()), int(-(-per_group // BANKS).sum()), distinct.size * size))

    def end(self, programs: int) -> None:
        """The launch is over."""
        c = self.counts
        c.launches, c.programs = 1, programs
        for kind, operands in (("reads", c.reads), ("writes", c.writes)):
            first = np.zeros(self.ends.size, np.int64)
            if self.first[kind]:
                first = self._by_storage(_distinct(np.concatenate(self.first[kind])) % (self.total // SECTOR))
            granule = self.memory.granule
            for s in self.memory.storages:
                if self.asked[kind][s.number]:
                    mine = self.touched[kind][self.ends[s.number - 1] // granule : self.ends[s.number] // granule]
                    found = Operand(
                        int(mine.sum()) * granule, int(self.asked[kind][s.number]) * SECTOR, int(first[s.number]) * SECTOR
                    )
                    operands[s.name] = operands.get(s.name, Operand()) + found
        self.profile.launches.append(c)

    def _by_storage(self, sectors: Array) -> Array:
        return np.bincount(np.searchsorted(self.ends, sectors * SECTOR, "right"), minlength=self.ends.size)

    def _note(self, space: str, line: int, found: Access) -> None:
        at = space, line
        self.counts.accesses[at] = self.counts.accesses.get(at, Access()) + found


def _distinct(a: Array) -> Array:
    """Returns the different numbers of an array, in order, as np.unique does, but sooner for those that are nearly in order."""
    a = np.sort(a, kind="stable")
    return a[np.diff(a, prepend=a[0] - 1) != 0]


def _lengths(a: Array) -> Array:
    """Returns how often each number of an array in order occurs."""
    starts = np.flatnonzero(np.diff(a, prepend=a[0] - 1))
    return np.diff(starts, append=a.size)


@dataclass
class Profile:
    """The launches of a `with simulator.profile()` block that ran to their end, in order."""

    launches: list[Counts] = field(default_factory=list)
    codes: dict[str, Code] = field(default_factory=dict, repr=False)  # by PTX

    @property
    def kernels(self) -> list[Counts]:
        """The counts of each kernel's launches, summed; a Python function that was compiled twice is two kernels."""
        found: dict[tuple[str, int], Counts] = {}
        for launch in self.launches:
            key = launch.kernel.text, launch.shared_bytes
            if key not in found:
                found[key] = Counts(launch.kernel, launch.code, launch.shared_bytes)
            found[key].add(launch)
        return list(found.values())

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.kernels)) or "no launches"


_profile: ContextVar[Profile | None] = ContextVar("_profile", default=None)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Counts what the launches of the block do. They take about twice as long."""
    found = Profile()
    before = _profile.set(found)
    try:
        yield found
    finally:
        _profile.reset(before)


def tally(kernel: Kernel, shared_bytes: int, memory: GlobalMemory) -> Tally | None:
    """Returns what a launch of a kernel is to be reported to; None if nobody counts."""
    found = _profile.get()
    if found is None:
        return None
    if kernel.text not in found.codes:
        found.codes[kernel.text] = Code(kernel)
    return Tally(found, Counts(kernel, found.codes[kernel.text], shared_bytes), memory)
