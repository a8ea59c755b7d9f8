"""The state of warps that run in lockstep: registers, memories, what is under way; and how they branch.

Registers are lists of arrays (arrays.py) that translated code keeps; the machine knows the rest. At first these are all warps
of all programs of a batch. Where programs take different ways, the batch is cut (`part`); where the warps of one program do, it
is cut into strands (`strand`), which strands.py runs. Threads of one warp never part: Triton has no such branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from simulator.arrays import LOADED, UNITS, Array
from simulator.async_copies import AsyncCopies
from simulator.counters import Tally
from simulator.errors import Fault, Unsupported
from simulator.fragments import Products
from simulator.global_memory import GlobalMemory
from simulator.mbarriers import Barriers
from simulator.options import Options
from simulator.parser import Kernel
from simulator.shared_memory import START, SharedMemory
from simulator.strands import Team, Wait
from simulator.tensor_maps import BoxLoads, BoxStores, TensorMap


class Machine:
    """Warps that are all at the same instruction.

    Attributes:
        C, T, W: programs; threads and warps of a program that are here.
        warps: their numbers in the program.
        programs: each program's number in the grid, x counting fastest.
        lanes: all threads that are here, numbered through the batch.
        arguments: of the kernel, an array per parameter; None for tensor maps, which are in `maps` by parameter.
        team: the strands of the program, if its warps have parted.
        waiting: what these warps wait for before they go on; None if nothing.
        tally: what everything is reported to while somebody counts (counters.py).
    """

    tally: Tally | None = None

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        programs: Array,
        grid: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[Array | None],
        maps: dict[int, TensorMap],
        granule: int,
        options: Options,
    ) -> None:
        self.kernel, self.memory, self.grid, self.options = kernel, memory, grid, options
        self.arguments, self.maps = arguments, maps
        self.programs = programs.astype(np.int64)
        self._number(np.arange(kernel.threads // 32))
        self.shared = SharedMemory(self.C, self.W, shared_bytes, granule, options.races)
        self.barriers = Barriers(self.C, self.shared.row)
        self.boxes = BoxLoads()
        self.copies = AsyncCopies(options.async_copy_fence)
        self.products = Products()
        self.stores = BoxStores()
        self.team: Team | None = None
        self.waiting: Wait | None = None
        self.culprit = 0  # the lane that went to a trap
        self.registers = kernel.registers_per_thread  # of each thread, while all warps of the program are here
        self.fragments: dict[Any, tuple[Array, Any]] = {}  # operands of mma by the registers that hold them, of a basic block

    def _number(self, warps: Array) -> None:
        self.warps, self.C, self.W = warps, len(self.programs), warps.size
        self.T = 32 * self.W
        self.shape = self.C, self.T
        self.lanes = np.arange(self.C * self.T)
        self.tid = np.arange(32 * warps[0], 32 * warps[0] + self.T, dtype=np.int32).reshape(1, -1)
        self.lane = self.tid & 31
        self.warp = self.tid >> 5
        x, y, _ = self.grid
        self.ctaid = tuple(
            n.astype(np.int32).reshape(-1, 1) for n in (self.programs % x, self.programs // x % y, self.programs // (x * y))
        )

    def part(self, chosen: Array) -> Machine:
        """Returns the machine of some of the programs."""
        m = object.__new__(Machine)
        m.__dict__.update(self.__dict__)
        m.programs = self.programs[chosen]
        m._number(self.warps)
        m.shared, m.barriers, m.boxes = self.shared.part(chosen), self.barriers.part(chosen), self.boxes.part(chosen)
        m.copies, m.products, m.stores = self.copies.part(chosen), self.products.part(chosen), self.stores.part(chosen)
        m.fragments = {}
        return m

    def strand(self, line: int, warps: Array, team: Team) -> Machine:
        """Returns the machine of some of the warps, neighbours, of one program."""
        if self.copies.pending or self.products.pending or self.stores.pending:
            raise Unsupported(f"{self.kernel.place(line)}: warps that part with asynchronous copies or products under way")
        m = object.__new__(Machine)
        m.__dict__.update(self.__dict__)
        m._number(warps)
        m.copies, m.products, m.stores = AsyncCopies(self.options.async_copy_fence), Products(), BoxStores()
        m.team, m.fragments = team, {}
        return m

    def step(self, function: Callable[[list[Array], Machine], int | Array], block: int, registers: list[Array]) -> int | Array:
        """Runs a basic block; returns the next one, or one for each program and warp."""
        self.fragments.clear()
        if self.tally:
            self.tally.block(self, block)
        return function(registers, self)

    def threads(self, lanes: Array) -> Array:
        """Returns the numbers of threads in their programs."""
        return lanes % self.T + self.warps[0] * 32

    def fault(self, line: int, what: str, lane: int | None = None, address: str | None = None) -> NoReturn:
        """Raises a fault of an instruction, of one thread if its lane is given."""
        program = thread = None
        if lane is not None:
            number, (x, y, _) = int(self.programs[int(lane) // self.T]), self.grid
            program = number % x, number // x % y, number // (x * y)
            thread = int(self.threads(np.array(lane)))
        raise Fault(what, self.kernel.place(line), program, thread, address)

    def stopped(self, line: int) -> NoReturn:
        """Raises the fault of a program that does not end."""
        self.fault(line, f"not done after {self.options.max_steps} basic blocks; it was stopped here:", 0)

    def wait(
        self, line: int, ready: Callable[[], bool], what: Callable[[], str], lane: int = 0, address: str | None = None
    ) -> None:
        """Leaves these warps waiting for other warps of their program. A fault if there are none.

        Args:
            ready: whether they can go on.
            what: what is missing, if they never can.
        """
        if self.team is None:
            self.fault(line, what(), lane, address)
        self.waiting = Wait(line, ready, what, lane, address)

    def full(self, a: Array) -> Array:
        return np.broadcast_to(a, self.shape)

    def chosen(self, guard: Array | None) -> Array | None:
        """Returns the lanes in which a guard is true; None if it is in all."""
        if guard is None:
            return None
        if guard.size == 1:
            return None if guard[0, 0] else self.lanes[:0]
        g = self.full(guard)
        return None if g.all() else np.flatnonzero(g)

    def whole_warps(self, line: int, mask: Array) -> None:
        """What a warp does together, it does with all of its threads."""
        if (mask != -1).any():
            raise Unsupported(f"{self.kernel.place(line)}: a part of a warp")

    # --- loads and stores ---

    def load(
        self, line: int, space: str, address: Array, size: int, count: int, guard: Array | None, old: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Returns what `count` registers load, of `size` bytes each; registers of other threads than `guard`'s keep `old`."""
        chosen = self.chosen(guard)
        if chosen is not None and chosen.size == 0:
            return tuple(old)
        a = self.full(address).reshape(-1)
        lanes = self.lanes
        if chosen is not None:
            a, lanes = a[chosen], chosen
        if space == "global":
            data = self.memory.read(self, line, a, lanes, size * count)
        else:
            data = self.shared.read(self, line, a - START, lanes, size * count)
        kind = LOADED[size]
        rows = data.view(kind).reshape(-1, count).T
        if chosen is None:
            return tuple(np.ascontiguousarray(rows).reshape(count, *self.shape))
        loaded = []
        for row, before in zip(rows, old, strict=True):
            new = np.array(self.full(before))
            new.reshape(-1)[chosen] = row
            loaded.append(new)
        return tuple(loaded)

    def store(self, line: int, space: str, address: Array, size: int, values: Sequence[Array], guard: Array | None) -> None:
        """Stores registers side by side, `size` bytes of each."""
        chosen = self.chosen(guard)
        if chosen is not None and chosen.size == 0:
            return
        a = self.full(address).reshape(-1)
        lanes = self.lanes
        if chosen is not None:
            a, lanes = a[chosen], chosen
        kind = LOADED[size]
        data = np.empty((a.size, len(values)), kind)
        for i, value in enumerate(values):
            flat = self.full(value).reshape(-1)
            data[:, i] = (flat if chosen is None else flat[chosen]).view(kind)
        total = size * len(values)
        units: Array = data.reshape(-1).view(UNITS[total])
        if space == "global":
            self.memory.write(self, line, a, lanes, total, units)
        else:
            self.shared.write(self, line, a - START, lanes, total, units)

    def parameter(self, index: int, dtype: Any) -> Array:
        value = self.arguments[index]
        assert value is not None, "a tensor map is not loaded from"
        return value.astype(dtype)

    # --- control ---

    def branch(self, line: int, guard: Array, target: int, following: int, failing: int | None = None) -> int | Array:
        """Returns the next block: one for all, or [programs, warps].

        Args:
            guard: where to go to `target`; others go on to `following`.
            failing: which of the two ends in a trap, if any.
        """
        if guard.size == 1:
            return target if guard[0, 0] else following
        g = self.full(guard)
        if failing is not None and (failed := g == (failing == target)).any():
            self.culprit = int(np.flatnonzero(failed)[0])
            return failing
        return self._next(line, np.where(g, target, following))

    def select(self, line: int, index: Array, targets: Sequence[int]) -> int | Array:
        """Returns the next block of a jump through a table, as `branch` does."""
        i = index.view(np.uint32)
        if i.max() >= len(targets):
            self.fault(line, f"jumps to entry {i.max()} of {len(targets)}", 0)
        return self._next(line, self.full(np.array(targets)[i]))

    def _next(self, line: int, blocks: Array) -> int | Array:
        if (blocks == blocks[0, 0]).all():
            return int(blocks[0, 0])
        by_warp = blocks.reshape(self.C, self.W, 32)
        if (odd := by_warp != by_warp[:, :, :1]).any():
            thread = self.threads(np.flatnonzero(odd.reshape(-1)))[0]
            raise Unsupported(f"{self.kernel.place(line)}: threads of one warp that part, as thread {thread} does")
        return by_warp[:, :, 0]

    def barrier(self, line: int, number: int, threads: int | None, guard: Array | None) -> None:
        """A barrier of so many threads of the program, by default of all. A guard may choose the warps that it is of."""
        warps = self.warps
        if guard is not None:
            by_warp = self.full(guard).reshape(self.C, self.W, 32)
            here = np.any(by_warp, axis=2)
            if (here != here[:1]).any():
                raise Unsupported(f"{self.kernel.place(line)}: a barrier of some of the programs")
            warps = self.warps[here[0]]
            if not warps.size:
                return
            missing: Array = ~by_warp & (here[:, :, None] | (threads != 32 * warps.size))
            if missing.any():
                lane = int(np.flatnonzero(missing)[0])
                self.fault(line, "only some threads of the program come to this barrier, and this one does not;", lane)
            if warps.size < self.W and self.team is not None:
                raise Unsupported(f"{self.kernel.place(line)}: a barrier of some of the warps that have not parted")
        if self.team is not None:
            self.team.meet(self, line, number, threads)
        elif threads not in (None, 32 * warps.size):
            self.fault(line, f"{32 * warps.size} threads come to a barrier of {threads};", 0)
        else:
            self.shared.races.barrier(warps)

    def leave(self, line: int) -> None:
        """These warps are done. The shared memory of a program may then be another's at once: no box may be under way."""
        if (rows := self.stores.under_way()).size:
            what = "the program ends while a box that it stores is still read from its shared memory"
            self.fault(line, what, int(rows[0]) * self.T)
        if self.team is not None and not self.team.are_last(self.warps):
            return
        if (rows := np.union1d(self.boxes.under_way(), self.shared.races.unknown_boxes())).size:
            self.fault(line, "the program ends while a box is still copied to its shared memory", int(rows[0]) * self.T)

    def allot(self, line: int, registers: int) -> None:
        """setmaxnreg: each warp is to have so many registers per thread."""
        if not self.kernel.registers_per_thread:
            raise Unsupported(f"{self.kernel.place(line)}: setmaxnreg in a kernel without .maxnreg")
        if self.team is not None:
            self.team.allot(self, line, registers)
        elif registers > self.kernel.registers_per_thread:
            self.fault(line, f"waits for ever for {registers} registers per thread: all warps ask for them;", 0)
        else:
            self.registers = registers

    def trap(self, line: int, what: str) -> NoReturn:
        self.fault(line, what, self.culprit)
