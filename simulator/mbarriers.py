"""mbarriers: barriers in shared memory that count arrivals of threads and bytes of bulk copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
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
        at = self._one(m, line, address, guard, live=None)
        self.expected[at] = self.pending[at] = count
        self.bytes[at] = self.phase[at] = 0
        self.live[at] = True

    def invalidate(self, m: Machine, line: int, address: Array, guard: Array | None) -> None:
        self.live[self._one(m, line, address, guard)] = False

    def arrive(self, m: Machine, line: int, address: Array, count: int, expect: int, guard: Array | None) -> None:
        """One thread arrives `count` times, and announces `expect` bytes."""
        at = self._one(m, line, address, guard)
        self.bytes[at] += expect
        self.pending[at] -= count
        if (self.pending[at] < 0).any():
            m.fault(line, "more threads arrive at an mbarrier than it was initialised for;")
        self._complete(at)

    def come(self, m: Machine, line: int, rows: Array, slots: Array, count: int) -> None:
        """A bulk copy has brought `count` bytes to each of these programs' barriers."""
        if not self.live[rows, slots].all():
            m.fault(line, "a copy that completes at an mbarrier which is not initialised;")
        np.subtract.at(self.bytes, (rows, slots), count)
        self._complete(tuple(np.unique(np.stack([rows, slots]), axis=1)))

    def wait(self, m: Machine, line: int, address: Array, parity: Array) -> Array:
        """Returns True, or raises the fault that this wait would never end: copies come at once, threads go in lockstep."""
        a = m.full(address)
        if (a != a[:, :1]).any():
            m.fault(line, "threads of one program wait for several mbarriers, which is not simulated yet;")
        rows, slots = np.arange(m.C), self._slots(m, line, a[:, 0])
        self._must_live(m, line, rows, slots)
        never = (self.phase[rows, slots] & 1) == m.full(parity)[:, 0]
        if never.any():
            row = int(np.flatnonzero(never)[0])
            at = row, slots[row]
            what = f"waits for ever: {self.pending[at]} arrivals and {self.bytes[at]} bytes are missing;"
            m.fault(line, what, row * m.T, f"shared memory, byte {8 * slots[row]}")
        m.bulk.arrived(m, slots)
        return np.ones((1, 1), bool)

    def slots(self, m: Machine, line: int, addresses: Array) -> Array:
        """Returns the places of barriers, one per address."""
        return self._slots(m, line, addresses)

    def _slots(self, m: Machine, line: int, addresses: Array) -> Array:
        offsets = addresses.astype(np.int64) - START
        wrong = (offsets % 8 != 0) | (offsets < 0) | (offsets + 8 > m.shared.size)
        if wrong.any():
            m.fault(line, f"an mbarrier outside shared memory or misaligned, at byte {offsets[wrong][0]};")
        return offsets // 8

    def _one(self, m: Machine, line: int, address: Array, guard: Array | None, live: bool | None = True) -> tuple[Array, Array]:
        """Returns (row, place) of the barrier that one thread of each program that takes part names."""
        active = np.ones(m.shape, bool) if guard is None else m.full(guard)
        if (active.sum(1) > 1).any():
            m.fault(line, "several threads of a program at an mbarrier in one instruction, which is not simulated yet;")
        rows = np.flatnonzero(active.any(1))
        slots = self._slots(m, line, m.full(address)[rows, active.argmax(1)[rows]])
        if live:
            self._must_live(m, line, rows, slots)
        return rows, slots

    def _must_live(self, m: Machine, line: int, rows: Array, slots: Array) -> None:
        dead = ~self.live[rows, slots]
        if dead.any():
            bad = int(np.flatnonzero(dead)[0])
            m.fault(line, "an mbarrier that is not initialised", int(rows[bad]) * m.T, f"shared memory, byte {8 * slots[bad]}")

    def _complete(self, at: tuple[Array, Array]) -> None:
        rows, slots = at
        done = (self.pending[at] == 0) & (self.bytes[at] == 0)
        rows, slots = rows[done], slots[done]
        self.phase[rows, slots] += 1
        self.pending[rows, slots] = self.expected[rows, slots]
