"""Shared memory of a batch of programs, and checks of every access: bounds, alignment, initialisation, races."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import UNITS, Array
from simulator.global_memory import differ
from simulator.races import Races

if TYPE_CHECKING:
    from simulator.machine import Machine

START = 1024  # address of the first byte: not 0, so that an address that was forgotten is noticed


class SharedMemory:
    """One row of bytes per program.

    Offsets are int64, counted from the beginning of a program's shared memory; `lanes` are the threads that access them,
    numbered through the batch.
    """

    def __init__(self, programs: int, warps: int, size: int, granule: int, races: bool) -> None:
        self.programs, self.size, self.granule = programs, size, granule
        self.row = max(16, -(-size // 16) * 16)
        self.bytes = np.zeros(programs * self.row, np.uint8)
        self.written = np.zeros(programs * self.row // granule, bool)
        self.mbarriers = np.zeros_like(self.written)  # what live mbarriers take
        self.races = Races(races, programs, warps, self.row // granule)
        self._view()

    def _view(self) -> None:
        self.units: dict[int, Array] = {size: self.bytes.view(unit) for size, unit in UNITS.items()}

    def part(self, programs: Array) -> SharedMemory:
        """Returns the memory of some of the programs."""
        some = object.__new__(SharedMemory)
        some.__dict__.update(self.__dict__)
        some.programs = programs.size
        some.bytes = self.bytes.reshape(self.programs, -1)[programs].reshape(-1)
        some.written = self.written.reshape(self.programs, -1)[programs].reshape(-1)
        some.mbarriers = self.mbarriers.reshape(self.programs, -1)[programs].reshape(-1)
        some.races = self.races.part(programs)
        some._view()
        return some

    def locate(self, m: Machine, line: int, offsets: Array, lanes: Array, size: int, what: str) -> Array:
        """Returns where accesses lie in `bytes`, all aligned and inside."""
        if np.bitwise_or.reduce(offsets & (size - 1)):
            bad = int(np.flatnonzero(offsets & (size - 1))[0])
            m.fault(line, f"{what} {size} bytes, misaligned,", lanes[bad], f"shared memory, byte {offsets[bad]}")
        if int(offsets.min()) < 0 or int(offsets.max()) + size > self.size:
            bad = int(np.flatnonzero((offsets < 0) | (offsets + size > self.size))[0])
            where = f"shared memory, byte {offsets[bad]} of {self.size}"
            m.fault(line, f"{what} {size} bytes out of bounds", lanes[bad], where)
        return offsets + lanes // m.T * self.row

    def granules(self, places: Array, size: int) -> Array:
        """Returns the granules of accesses, flat, those of one access side by side."""
        first = places // self.granule
        if size <= self.granule:
            return first
        return (first[:, None] + np.arange(size // self.granule)).reshape(-1)

    def read(self, m: Machine, line: int, offsets: Array, lanes: Array, size: int) -> Array:
        """Returns what threads read, in units of `size` bytes."""
        places = self.locate(m, line, offsets, lanes, size, "reads")
        g = self.granules(places, size)
        problem = self.races.reading(g, np.repeat(m.threads(lanes), g.size // places.size))
        if problem:
            self.blame(m, line, f"reads {size} bytes", problem, places, lanes)
        self.must_be_written(m, line, g, places, lanes, size)
        self.must_be_data(m, line, g, places, lanes, f"reads {size} bytes")
        if m.tally:
            m.tally.shared(m, line, offsets, lanes, size)
        return self.units[size][places // size]

    def write(
        self, m: Machine, line: int, offsets: Array, lanes: Array, size: int, data: Array, fence_needed: bool = True
    ) -> None:
        """Writes units of `size` bytes. Threads may write one place without a barrier between only if they agree.

        Args:
            fence_needed: whether the asynchronous proxy sees this only after a fence.
        """
        places = self.locate(m, line, offsets, lanes, size, "writes")
        g = self.granules(places, size)
        thread = np.repeat(m.threads(lanes), g.size // places.size)
        unit, index = self.units[size], places // size
        self.must_be_data(m, line, g, places, lanes, f"writes {size} bytes")
        problem = self.races.writing(g, thread)
        if problem:
            self.blame(m, line, f"writes {size} bytes", problem, places, lanes)
        again = self.races.rewritten(g, thread)
        if again is not None and again.any():
            bad = again.reshape(places.size, -1).any(1) & differ(unit[index], data)
            if bad.any():
                why = "where another thread wrote other values since the last barrier"
                self.blame(m, line, f"writes {size} bytes", (bad, why), places, lanes)
        self.races.wrote(g, thread, fence_needed, again)
        self.written[g] = True
        unit[index] = data
        if (lost := differ(unit[index], data)).any():
            why = "where another thread writes other values at once"
            self.blame(m, line, f"writes {size} bytes", (lost, why), places, lanes)
        if m.tally:
            m.tally.shared(m, line, offsets, lanes, size)

    def must_be_written(self, m: Machine, line: int, g: Array, places: Array, lanes: Array, size: int) -> None:
        fresh = ~self.written[g]
        if fresh.any():
            self.blame(m, line, f"reads {size} bytes", (fresh, "that nothing wrote"), places, lanes)

    def must_be_data(self, m: Machine, line: int, g: Array, places: Array, lanes: Array, what: str) -> None:
        taken = self.mbarriers[g]
        if taken.any():
            self.blame(m, line, what, (taken, "where a live mbarrier is"), places, lanes)

    def blame(self, m: Machine, line: int, what: str, problem: tuple[Array, str], places: Array, lanes: Array) -> None:
        """Raises the fault of the first access that has a problem; of each, its granules lie side by side."""
        found, why = problem
        bad = int(np.flatnonzero(found)[0]) * places.size // found.size
        where = f"shared memory, byte {int(places[bad]) % self.row}"
        m.fault(line, f"{what} of shared memory {why}", int(lanes[bad]), where)
