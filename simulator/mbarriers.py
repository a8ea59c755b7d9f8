"""mbarriers: barriers in shared memory that count arrivals of threads and bytes of bulk copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
from simulator.errors import Unsupported
from simulator.shared_memory import START

if TYPE_CHECKING:
    from simulator.machine import Machine


class Barriers:
    """A row per program of what its mbarriers hold, by their place in shared memory, in units of 8 bytes.

    Attributes:
        expected: arrivals of a phase.
        pending: of these, how many are missing.
        bytes: that were announced and have not come.
        phase: how many phases are complete.
        live: whether it is initialised.
    """

    ROWS = ("expected", "pending", "bytes", "phase", "live")

    def __init__(self, programs: int, row: int) -> None:
        shape = programs, row // 8
        self.expected, self.pending, self.phase = (np.zeros(shape, np.int32) for _ in range(3))
        self.bytes, self.live = np.zeros(shape, np.int64), np.zeros(shape, bool)

    def part(self, programs: Array) -> Barriers:
        some = object.__new__(Barriers)
        for name in self.ROWS:
            setattr(some, name, getattr(self, name)[programs])
        return some

    def initialise(self, m: Machine, line: int, address: Array, count: int, guard: Array | None) -> None:
        rows, slots, lanes = self._named(m, line, address, guard, live=False)
        if not rows.size:
            return
        if (again := self.live[rows, slots]).any():
            bad = int(np.flatnonzero(again)[0])
            what = "initialises an mbarrier that has not ended"
            m.fault(line, what, int(lanes[bad]), f"shared memory, byte {8 * slots[bad]}")
        m.shared.write(m, line, 8 * slots, lanes, 8, np.full(slots.size, count, np.uint64))
        self.expected[rows, slots] = self.pending[rows, slots] = count
        self.bytes[rows, slots] = self.phase[rows, slots] = 0
        self._live(m, rows, slots, True)
        m.shared.races.initialised(rows, slots)

    def invalidate(self, m: Machine, line: int, address: Array, guard: Array | None) -> None:
        rows, slots, lanes = self._named(m, line, address, guard)
        if rows.size:
            self._live(m, rows, slots, False)
            m.shared.write(m, line, 8 * slots, lanes, 8, np.zeros(slots.size, np.uint64))

    def arrive(self, m: Machine, line: int, address: Array, count: int, expect: int, guard: Array | None) -> None:
        """Threads arrive, each `count` times, and announce `expect` bytes each."""
        rows, slots, lanes = self._named(m, line, address, guard)
        if not rows.size:
            return
        np.add.at(self.bytes, (rows, slots), expect)
        np.subtract.at(self.pending, (rows, slots), count)
        if (self.pending[rows, slots] < 0).any():
            bad = int(np.flatnonzero(self.pending[rows, slots] < 0)[0])
            what = "arrives more often at an mbarrier than it was initialised for"
            m.fault(line, what, int(lanes[bad]), f"shared memory, byte {8 * slots[bad]}")
        m.shared.races.arrive(rows, slots, m.threads(lanes) >> 5)
        self._complete(m, rows, slots)

    def come(self, m: Machine, line: int, rows: Array, slots: Array, count: int) -> None:
        """A box has brought `count` bytes to each of these programs' barriers."""
        np.subtract.at(self.bytes, (rows, slots), count)
        self._complete(m, rows, slots)

    def wait(self, m: Machine, line: int, address: Array, parity: Array) -> Array:
        """Returns whether the phase of that parity is complete.

        If it is not, and no other warps of the program could complete it (boxes come at once), that is a fault; where there are
        others, these threads are left waiting.
        """
        a = m.full(address)
        if (a != a[:, :1]).any():
            raise Unsupported(f"{m.kernel.place(line)}: threads that wait for several mbarriers in one instruction")
        rows, slots = np.arange(m.C), self._slots(m, line, a[:, 0])
        self._must_live(m, line, np.repeat(rows, m.T), np.repeat(slots, m.T), m.lanes)
        p = m.full(parity)
        if (p != p[:, :1]).any():
            raise Unsupported(f"{m.kernel.place(line)}: threads that wait for several phases in one instruction")
        never = (self.phase[rows, slots] & 1) == p[:, 0]
        if never.any():
            row = int(np.flatnonzero(never)[0])
            slot, phase = int(slots[row]), int(self.phase[row, slots[row]])
            m.wait(
                line,
                lambda: int(self.phase[row, slot]) != phase,
                lambda: f"waits for ever: {self.pending[row, slot]} arrivals and {self.bytes[row, slot]} bytes are missing;",
                row * m.T,
                f"shared memory, byte {8 * slot}",
            )
            return np.zeros((1, 1), bool)
        m.shared.races.waited(m.warps, slots)
        return np.ones((1, 1), bool)

    def named(self, m: Machine, line: int, lanes: Array, addresses: Array) -> Array:
        """Returns the places of the mbarriers that threads name, which must be initialised."""
        slots = self._slots(m, line, addresses)
        self._must_live(m, line, lanes // m.T, slots, lanes)
        return slots

    def _slots(self, m: Machine, line: int, addresses: Array) -> Array:
        offsets = addresses.astype(np.int64) - START
        wrong = (offsets % 8 != 0) | (offsets < 0) | (offsets + 8 > m.shared.size)
        if wrong.any():
            m.fault(line, f"an mbarrier outside shared memory or misaligned, at byte {offsets[wrong][0]};")
        return offsets // 8

    def _named(
        self, m: Machine, line: int, address: Array, guard: Array | None, live: bool = True
    ) -> tuple[Array, Array, Array]:
        """Returns (row, place, lane) of the barriers that the threads of a guard name."""
        lanes = m.lanes if (chosen := m.chosen(guard)) is None else chosen
        addresses = m.full(address).reshape(-1)[lanes]
        slots = self.named(m, line, lanes, addresses) if live and lanes.size else self._slots(m, line, addresses)
        return lanes // m.T, slots, lanes

    def _live(self, m: Machine, rows: Array, slots: Array, live: bool) -> None:
        self.live[rows, slots] = live
        m.shared.mbarriers[m.shared.granules(8 * slots + rows * m.shared.row, 8)] = live

    def _must_live(self, m: Machine, line: int, rows: Array, slots: Array, lanes: Array) -> None:
        """Whoever uses an mbarrier must know that it is initialised."""
        dead = ~self.live[rows, slots]
        if dead.any():
            bad = int(np.flatnonzero(dead)[0])
            m.fault(line, "an mbarrier that is not initialised", int(lanes[bad]), f"shared memory, byte {8 * slots[bad]}")
        places = 8 * slots + rows * m.shared.row
        g = m.shared.granules(places, 8)
        problem = m.shared.races.reading(g, np.repeat(m.threads(lanes), g.size // places.size))
        if problem:
            m.shared.blame(m, line, "uses an mbarrier in a part", problem, places, lanes)

    def _complete(self, m: Machine, rows: Array, slots: Array) -> None:
        """Begins the next phase of those of these barriers of which nothing is missing."""
        done = (self.pending[rows, slots] == 0) & (self.bytes[rows, slots] == 0)
        if not done.any():
            return
        rows, slots = np.unique(np.stack([rows[done], slots[done]]), axis=1)
        self.phase[rows, slots] += 1
        self.pending[rows, slots] = self.expected[rows, slots]
        m.shared.races.complete(rows, slots)
        m.boxes.arrived(m, rows, slots)
