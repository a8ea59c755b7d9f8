"""The state of a batch of programs that run in lockstep: registers, memories, what is under way; and how it branches.

Registers are lists of arrays (arrays.py) that translated code keeps; the machine knows the rest. All warps of all programs of
a batch are at the same instruction. Where programs take different ways, the batch is cut (`part`); where the threads of one
program do, it is a fault as yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from simulator.arrays import LOADED, UNITS, Array
from simulator.async_copies import AsyncCopies
from simulator.errors import Fault, Unsupported
from simulator.fragments import Products
from simulator.global_memory import GlobalMemory
from simulator.mbarriers import Barriers
from simulator.options import Options
from simulator.parser import Kernel
from simulator.shared_memory import START, SharedMemory
from simulator.tensor_maps import BulkCopies, TensorMap


class Machine:
    """A batch of programs.

    Attributes:
        C, T, W: programs, threads of a program, warps of a program.
        programs: each program's number in the grid, x counting fastest.
        lanes: all threads, numbered through the batch.
        arguments: of the kernel, an array per parameter; None for tensor maps, which are in `maps` by parameter.
    """

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
        self.T, self.W = kernel.threads, kernel.threads // 32
        self.tid = np.arange(self.T, dtype=np.int32).reshape(1, -1)
        self.lane = self.tid & 31
        self.warp = self.tid >> 5
        self.programs = programs.astype(np.int64)
        self._number()
        self.shared = SharedMemory(self.C, shared_bytes, granule, options.races)
        self.barriers = Barriers(self.C, self.shared.row)
        self.copies = AsyncCopies(options.async_copy_fence)
        self.products = Products()
        self.bulk = BulkCopies()
        self.fragments: dict[Any, tuple[Array, Any]] = {}  # operands of mma by the registers that hold them, of a basic block

    def _number(self) -> None:
        self.C = len(self.programs)
        self.shape = self.C, self.T
        self.lanes = np.arange(self.C * self.T)
        x, y, _ = self.grid
        self.ctaid = tuple(
            n.astype(np.int32).reshape(-1, 1) for n in (self.programs % x, self.programs // x % y, self.programs // (x * y))
        )

    def part(self, chosen: Array) -> Machine:
        """Returns the machine of some of the programs."""
        m = object.__new__(Machine)
        m.__dict__.update(self.__dict__)
        m.programs = self.programs[chosen]
        m._number()
        m.shared, m.barriers = self.shared.part(chosen), self.barriers.part(chosen)
        m.copies, m.products, m.bulk = self.copies.part(chosen), self.products.part(chosen), self.bulk.part(chosen)
        m.fragments = {}
        return m

    def fault(self, line: int, what: str, lane: int | None = None, address: str | None = None) -> NoReturn:
        """Raises a fault of an instruction, of one thread if its lane is given."""
        program = thread = None
        if lane is not None:
            row, thread = divmod(int(lane), self.T)
            number, (x, y, _) = int(self.programs[row]), self.grid
            program = number % x, number // x % y, number // (x * y)
        raise Fault(what, self.kernel.place(line), program, thread, address)

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

    def branch(self, line: int, guard: Array, negated: bool) -> bool | Array:
        """Returns whether the programs jump: a bool if all agree, else a bool per program."""
        if guard.size == 1:
            return bool(guard[0, 0]) != negated
        g = self.full(guard)
        first = g[:, :1]
        if (g != first).any():
            lane = int(np.flatnonzero((g != first).reshape(-1))[0])
            self.fault(line, "threads of one program part here, which is not simulated yet;", lane)
        taken = first[:, 0] != negated
        return bool(taken[0]) if (taken == taken[0]).all() else taken

    def trap(self, line: int, what: str) -> NoReturn:
        self.fault(line, what, 0)
