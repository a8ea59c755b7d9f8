"""cp.async: copies from global to shared memory that end when their group is waited for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import UNITS, Array
from simulator.errors import Unsupported
from simulator.shared_memory import START

if TYPE_CHECKING:
    from simulator.machine import Machine


@dataclass(frozen=True)
class Copy:
    """What the threads of a batch copy by one instruction, a row per program; where offsets are -1, none."""

    line: int
    size: int
    offsets: Array  # in shared memory
    data: Array
    threads: Array


class AsyncCopies:
    """Groups of copies under way, oldest first."""

    def __init__(self, fence_needed: bool) -> None:
        self.fence_needed = fence_needed
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []

    @property
    def pending(self) -> bool:
        """Whether anything is under way."""
        return bool(self.open) or any(self.groups)

    def part(self, programs: Array) -> AsyncCopies:
        some = AsyncCopies(self.fence_needed)
        some.open = [_part(copy, programs) for copy in self.open]
        some.groups = [[_part(copy, programs) for copy in group] for group in self.groups]
        return some

    def begin(self, m: Machine, line: int, to: Array, source: Array, size: int, given: Array, guard: Array | None) -> None:
        """Starts copying `size` bytes per thread, the first `given` of them from `source`, the rest zeros."""
        chosen = m.chosen(guard)
        if chosen is not None and chosen.size == 0:
            return
        lanes = m.lanes if chosen is None else chosen
        offsets, source, given = (m.full(a).reshape(-1)[lanes] for a in (to, source, given))
        offsets = offsets.astype(np.int64) - START
        data: Array = np.zeros(lanes.size, UNITS[size])
        some = np.flatnonzero(given)
        if some.size:
            if (given[some] != size).any():
                raise Unsupported(f"{m.kernel.place(line)}: cp.async of a part of its bytes")
            data[some] = m.memory.read(m, line, source[some], lanes[some], size)
        places = m.shared.locate(m, line, offsets, lanes, size, "copies")
        g = m.shared.granules(places, size)
        problem = m.shared.races.depart(g, np.repeat(m.threads(lanes), g.size // places.size))
        if problem:
            m.shared.blame(m, line, f"copies {size} bytes to a part", problem, places, lanes)
        self.open.append(Copy(line, size, *_by_program(m, lanes, offsets, data, lanes % m.T)))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, m: Machine, left: int) -> None:
        """Ends all but the last `left` groups. Their data is then the copying thread's own write."""
        while len(self.groups) > left:
            for copy in self.groups.pop(0):
                row, column = np.nonzero(copy.offsets >= 0)
                offsets, data = copy.offsets[row, column], copy.data[row, column]
                lanes = row * m.T + copy.threads[row, column]
                m.shared.races.arrive_copy(m.shared.granules(offsets + row * m.shared.row, copy.size))
                m.shared.write(m, copy.line, offsets, lanes, copy.size, data, self.fence_needed)


def _part(copy: Copy, programs: Array) -> Copy:
    cut = {name: getattr(copy, name)[programs] for name in ("offsets", "data", "threads")}
    return replace(copy, **cut)


def _by_program(m: Machine, lanes: Array, *values: Array) -> list[Array]:
    """Returns values of lanes, which are in order, as a row per program; a shorter row is filled up with -1, units with 0."""
    rows = lanes // m.T
    counts = np.bincount(rows, minlength=m.C)
    column = np.arange(lanes.size) - np.repeat(np.cumsum(counts) - counts, counts)
    found = []
    for value in values:
        table = np.full((m.C, counts.max()), -1 if value.dtype.kind == "i" else 0, value.dtype)
        table[rows, column] = value
        found.append(table)
    return found
