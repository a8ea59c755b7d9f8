"""Which accesses of shared memory are ordered: what happened before what, by vector clocks.

Those who access it are the parties of a program: each warp; for each warpgroup its tensor cores, which read the operands of
wgmma; for each warp the engine that stores its boxes; and for each mbarrier the engine whose boxes complete there. Time is
counted in synchronisations. Each warp knows up to which time each party's accesses are over (`seen`), and an access is a race
with an earlier one of the same place if it is not known to be over. Knowledge is passed on

- by a barrier, to all warps that meet at it;
- by an mbarrier, from those who arrive at a phase to those who wait for it, and there also of the boxes that completed it;
- by waiting for a group of wgmma or of stored boxes, of what these read.

Threads of one warp are told apart: a barrier of the warp orders them. (That a warp runs in lockstep orders nothing since
Volta.) Tensor cores and boxes go through the asynchronous proxy: they see what threads wrote only behind a
`fence.proxy.async`, of the writer, of whoever asks for the read, or of a warp on the way between. So each warp also knows up
to which time each other one's writes are fenced.
"""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array

ENGINE = 1 << 12  # who wrote: a thread's number, or this plus an engine's party
SEVERAL = -1  # threads: readers of one warp, or writers of one value
FLYING = 1 << 30  # time of a read that goes on, plus the number of its group
ANY = -1  # a reader that is no thread
Problem = tuple[Array, str]  # which granules, and what is wrong with them
NONE: Array = np.zeros(1, bool)


class Races:
    """What happened to each granule, numbered through all programs of a batch. Unless enabled, nothing is noted.

    Attributes:
        seen: [programs, warps, parties]: the time before which a warp knows a party's accesses to be over. The parties are
            those that read (`readers` of them), the fences of each warp, which end at `fenced`, and mbarriers.
        now: the time, of all programs of the batch.
    """

    NOTES = ("wrote_at", "wrote_by", "read_at", "read_by", "last_read", "unfenced", "arriving")

    def __init__(self, enabled: bool, programs: int, warps: int, granules: int) -> None:
        """
        Args:
            granules: of one program.
        """
        self.enabled, self.programs, self.warps, self.granules = enabled, programs, warps, granules
        self.stores = warps + -(-warps // 4)  # the first party that stores boxes
        self.readers = self.stores + warps
        self.fenced = self.readers + warps
        self.now = 1
        self.seen = np.ones((programs, warps, self.fenced), np.int32)
        self.active = np.zeros(self.fenced, bool)  # engines that ever accessed anything, and all warps
        self.active[:warps] = True
        self.mbarriers: dict[int, int] = {}  # the parties of mbarriers, by their place
        self.arrived: dict[int, Array] = {}  # what those who arrived at its present phase know: [programs, parties]
        self.completed: dict[int, Array] = {}  # what those learn who wait for its last complete phase
        self.boxes = np.zeros((programs, 0), np.int32)  # by mbarriers, the time when a warp knows its last boxes to be there
        n = programs * granules if enabled else 0
        self.wrote_at, self.wrote_by = np.zeros(n, np.int32), np.zeros(n, np.int16)
        self.read_at, self.read_by = np.zeros(n * self.readers, np.int32), np.zeros(n * warps, np.int16)  # by party, by warp
        self.last_read = np.zeros(n, np.int32)  # the largest of read_at
        self.unfenced = np.zeros(n, bool)  # the last write is one that needs a proxy fence
        self.arriving = np.zeros(n, bool)  # a copy of a thread's (cp.async), or a box, is under way
        self._learnt()

    def part(self, programs: Array) -> Races:
        """Returns the notes of some of the programs."""
        some = object.__new__(Races)
        some.__dict__.update(self.__dict__)
        some.programs = programs.size
        some.seen, some.active = self.seen[programs], self.active.copy()
        some.mbarriers, some.boxes = dict(self.mbarriers), self.boxes[programs]
        some.arrived = {slot: known[programs] for slot, known in self.arrived.items()}
        some.completed = {slot: known[programs] for slot, known in self.completed.items()}
        if self.enabled:
            for name in self.NOTES:
                setattr(some, name, getattr(self, name).reshape(self.programs, -1)[programs].reshape(-1))
        some._learnt()
        return some

    def tensor_cores(self, warps: Array) -> Array:
        """Returns the parties that are the tensor cores of these warps' warpgroups."""
        return self.warps + warps // 4

    # --- knowledge ---

    def _learnt(self) -> None:
        """Notes the times before which all warps know all reads, and all accesses, to be over: most are."""
        earliest = self.seen.min((0, 1))
        self.reading_parties = np.flatnonzero(self.active[: self.readers])
        self.reads_over = int(earliest[self.reading_parties].min())
        self.over = int(earliest[self.active].min())

    def barrier(self, warps: Array) -> None:
        """All threads of these warps meet."""
        self.now += 1
        known = self.seen[:, warps].max(1)
        known[:, warps] = self.now
        self.seen[:, warps] = known[:, None]
        self._learnt()

    def warp_barrier(self, warps: Array) -> None:
        """The threads of each of these warps meet."""
        self.now += 1
        self.seen[:, warps, warps] = self.now
        self._learnt()

    def proxy_fence(self, warps: Array) -> None:
        """All that these warps know of is fenced, and what they wrote themselves."""
        self.now += 1
        known = self.seen[:, warps]
        fences = known[:, :, self.readers : self.fenced]
        np.maximum(fences, known[:, :, : self.warps], out=fences)
        self.seen[:, warps] = known
        self.seen[:, warps, self.readers + warps] = self.now

    def initialised(self, rows: Array, slots: Array) -> None:
        """mbarriers of these programs begin, or begin anew."""
        for slot in map(int, np.unique(slots)):
            if slot not in self.mbarriers:
                self.mbarriers[slot] = self.seen.shape[2]
                self.seen = np.pad(self.seen, ((0, 0), (0, 0), (0, 1)), constant_values=1)
                self.active = np.append(self.active, False)
                self.boxes = np.pad(self.boxes, ((0, 0), (0, 1)))
                for known in (self.arrived, self.completed):
                    for other in known:
                        known[other] = np.pad(known[other], ((0, 0), (0, 1)))
                for known in (self.arrived, self.completed):
                    known[slot] = np.zeros((self.programs, self.seen.shape[2]), np.int32)
            for known in (self.arrived, self.completed):
                known[slot][rows[slots == slot]] = 0

    def arrive(self, rows: Array, slots: Array, warps: Array) -> None:
        """Threads of these warps arrive, each at an mbarrier of its program.

        They pass on what their warp knew at its last barrier, and, if all threads of a warp arrive, what these did since.
        """
        self.now += 1
        arrivals, counts = np.unique(np.stack([rows, slots, warps], 1), axis=0, return_counts=True)
        for (row, slot, warp), count in zip(arrivals.tolist(), counts.tolist(), strict=True):
            known = self.arrived[slot]
            np.maximum(known[row], self.seen[row, warp], out=known[row])
            if count == 32:
                known[row, warp] = self.now

    def complete(self, rows: Array, slots: Array) -> None:
        """A phase of these mbarriers is complete, boxes included."""
        self.now += 1
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            known = self.completed[slot]
            np.maximum(known[row], self.arrived[slot][row], out=known[row])
            known[row, self.mbarriers[slot]] = self.now

    def waited(self, warps: Array, slots: Array) -> None:
        """These warps of each program have waited for the mbarrier at that place of the program."""
        for row, slot in enumerate(slots.tolist()):
            self.seen[row, warps] = np.maximum(self.seen[row, warps], self.completed[slot][row])
        self._learnt()

    # --- accesses ---

    def _going_on(self, g: Array, when: Array, party: Array, warp: Array) -> Array:
        """Returns which accesses of a party are not known to be over."""
        over: Array = when >= self.seen[g // self.granules, warp, party]
        return over

    def _party(self, by: Array) -> Array:
        return np.where(by < ENGINE, np.maximum(by, 0) >> 5, by - ENGINE)

    def _written(self, g: Array, thread: Array | int, warp: Array) -> Array:
        """Returns which granules were written by another thread, or an engine, without an order."""
        when = self.wrote_at[g]
        if not when.size or when.max() < self.over:
            return NONE
        by = self.wrote_by[g]
        going_on = self._going_on(g, when, self._party(by), warp)
        if (several := by == SEVERAL).any():
            h, warps = g[several], np.broadcast_to(warp, g.shape)[several]
            going_on[several] = when[several] >= self.seen[h // self.granules, warps, : self.warps].min(1)
        return (by != thread) & going_on

    def _why_written(self, g: Array, bad: Array) -> str:
        if self.wrote_by[g[bad][0]] >= ENGINE:
            return "that an asynchronous copy writes, which was not waited for"
        return "that another thread wrote since the last barrier"

    def unordered(self, g: Array, thread: Array) -> Problem | None:
        """Returns which granules these threads must not look at, and why, if any; notes nothing."""
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if (bad := self._written(g, thread, thread >> 5)).any():
            return bad, self._why_written(g, bad)
        return None

    def reading(self, g: Array, thread: Array) -> Problem | None:
        """Notes that threads read these granules. Returns which must not, and why, if any."""
        problem = self.unordered(g, thread)
        if problem or not self.enabled:
            return problem
        warp = thread >> 5
        here, by = g * self.readers + warp, g * self.warps + warp
        at, before = self.read_at[here], thread
        if at.size and at.max() >= self.reads_over:  # earlier reads of the warp count unless they are over for it
            before = np.where(self._going_on(g, at, warp, warp), self.read_by[by], thread)
        self.read_by[by] = thread
        several = (self.read_by[by] != thread) | (before != thread)
        if several.any():
            self.read_by[by[several]] = SEVERAL
        self.read_at[here] = self.now
        self.last_read[g] = np.maximum(self.last_read[g], self.now)
        return None

    def writing(self, g: Array, thread: Array) -> Problem | None:
        """Returns which granules must not be written by these threads now, and why, if any; notes nothing."""
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if self.mbarriers and (bad := self._written(g, thread, thread >> 5) & (self.wrote_by[g] >= ENGINE)).any():
            return bad, self._why_written(g, bad)
        recent = self.last_read[g] >= self.reads_over
        if not recent.any():
            return None
        some = np.flatnonzero(recent)
        h, threads = g[some], thread[some]
        warp = threads >> 5
        parties = self.reading_parties  # of which the first ones are all warps
        at = self.read_at.reshape(-1, self.readers)[h[:, None], parties]
        going_on = at >= self.seen[(h // self.granules)[:, None], warp[:, None], parties]
        going_on[np.arange(h.size), warp] &= self.read_by[h * self.warps + warp] != threads
        if not going_on.any():
            return None
        bad = np.zeros(g.size, bool)
        bad[some] = going_on.any(1)
        if (at[going_on] >= FLYING).any():
            bad[some] = (going_on & (at >= FLYING)).any(1)
            return bad, "that an asynchronous instruction is still reading"
        return bad, "that another thread read since the last barrier"

    def rewritten(self, g: Array, thread: Array) -> Array | None:
        """Returns which granules another thread wrote since the last barrier."""
        return self._written(g, thread, thread >> 5) if self.enabled else None

    def wrote(self, g: Array, thread: Array, fence_needed: bool, again: Array | None) -> None:
        """Notes that threads write. Where several of them write, at once or `again`, it is the same value."""
        if self.enabled:
            self.wrote_at[g], self.wrote_by[g] = self.now, thread
            several = self.wrote_by[g] != thread
            if again is not None:
                several = several | again
            if several.any():
                self.wrote_by[g[several]] = SEVERAL
            self.unfenced[g] = fence_needed

    # --- asynchronous copies into shared memory ---

    def depart(self, g: Array, thread: Array) -> Problem | None:
        """Notes that a copy into these granules begins. Returns which must not be written, and why, if any."""
        problem = self.writing(g, thread)
        if problem or not self.enabled:
            return problem
        if (bad := self._written(g, thread, thread >> 5)).any():
            return bad, self._why_written(g, bad)
        self.arriving[g] = True
        return None

    def arrive_copy(self, g: Array) -> None:
        """A copy of a thread's is over; it is noted as that thread's write by whoever calls this."""
        if self.enabled:
            self.arriving[g] = False

    def arrive_box(self, g: Array, row: int, slot: int) -> None:
        """Boxes are there, since a phase of that mbarrier of a program is complete: for whoever waits for it."""
        self.boxes[row, self.mbarriers[slot] - self.fenced] = self.now
        if self.enabled:
            self.arriving[g] = False
            self.wrote_at[g], self.wrote_by[g] = self.now - 1, ENGINE + self.mbarriers[slot]
            self.unfenced[g] = False
            if not self.active[self.mbarriers[slot]]:
                self.active[self.mbarriers[slot]] = True
                self._learnt()

    def unknown_boxes(self) -> Array:
        """Returns the programs of which no warp knows that all boxes that have come are there."""
        known = self.seen[:, :, self.fenced :].max(1)
        return np.flatnonzero((self.boxes > known).any(1))

    # --- asynchronous instructions that read shared memory ---

    def engage(self, g: Array, party: Array, group: int, thread: Array | int, warp: Array) -> Problem | None:
        """Notes that wgmma, or a stored box, of that group reads these granules.

        Args:
            thread: that asked for it, or ANY if it were several.
            warp: of these threads.

        Returns:
            Which must not be read, and why, if any.
        """
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if (bad := self._written(g, thread, warp)).any():
            return bad, self._why_written(g, bad)
        unfenced = self.unfenced[g]
        if unfenced.any():
            writer = np.minimum(self._party(self.wrote_by[g]), self.warps - 1)  # an engine's writes need no fence
            if (bad := unfenced & self._going_on(g, self.wrote_at[g], self.readers + writer, warp)).any():
                return bad, "through the asynchronous proxy, that a thread wrote without a fence.proxy.async since"
        self.read_at[g * self.readers + party] = FLYING + group
        self.last_read[g] = FLYING + group
        if not self.active[party].all():
            self.active[party] = True
            self._learnt()
        return None

    def release(self, g: Array, party: Array, group: int) -> None:
        """These reads of a group are over."""
        if self.enabled:
            here = g * self.readers + party
            mine = self.read_at[here] == FLYING + group
            h = g[mine]
            self.read_at[here[mine]] = self.last_read[h] = self.now
            engines = np.flatnonzero(self.active[self.warps : self.readers])
            if engines.size > 1:  # another one may be at it still
                at = self.read_at.reshape(-1, self.readers)[h[:, None], self.warps + engines]
                self.last_read[h] = np.maximum(at.max(1), self.now)

    def released(self, warps: Array, parties: Array) -> None:
        """Warps know that what the parties read until now is over, a party for each warp."""
        self.now += 1
        self.seen[:, warps, parties] = self.now
        self._learnt()
