"""Which accesses of shared memory are ordered.

Time is counted in barriers. An access of a thread is ordered before a later one of another thread if a barrier of the whole
program lies between them, or, in the same warp, a barrier of the warp. (That warps run in lockstep orders nothing since
Volta.) Per granule of shared memory it is noted when it was last written and read, by whom, and what asynchronous
machinery is still at work on it:

- cp.async and bulk copies write it ("arriving") until their group or mbarrier is waited for;
- wgmma and bulk stores read it ("busy") until their group is waited for.

wgmma and bulk stores go through the asynchronous proxy: they see what threads wrote only after a `fence.proxy.async`.
"""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array

# Who accessed a granule: a thread's number, or, of several threads, one of these.
WARP = 1 << 12  # + the warp's number: several threads of it
MANY = 1 << 13  # threads of several warps
ENGINE = 1 << 14  # tensor cores, or the copy engine


def warp_of(who: Array) -> Array:
    """Returns the warp of each accessor, -1 if it is none in particular."""
    return np.where(who < WARP, who >> 5, np.where(who < MANY, who - WARP, -1))


class Races:
    """What happened to each granule, numbered through all programs of a batch. Unless enabled, nothing is noted."""

    NOTES = ("wrote_at", "wrote_by", "read_at", "read_by", "unfenced", "arriving", "busy")

    def __init__(self, enabled: bool, granules: int) -> None:
        self.enabled = enabled
        self.now = 1  # barriers so far, plus one: 0 is long ago
        self.since = 1  # `now` at the last barrier of the whole program
        self.fences = 1  # proxy fences so far, plus one
        n = granules if enabled else 0
        self.wrote_at, self.wrote_by, self.read_at, self.read_by = (np.zeros(n, np.int32) for _ in range(4))
        self.unfenced = np.zeros(n, np.int32)  # `fences` at the last write of a thread
        self.arriving = np.zeros(n, bool)
        self.busy = np.zeros(n, np.int32)  # the group that reads it, 0 for none

    def part(self, programs: Array, of: int) -> Races:
        """Returns the notes of some of the `of` programs."""
        some = object.__new__(Races)
        some.__dict__.update(self.__dict__)
        if self.enabled:
            for name in self.NOTES:
                setattr(some, name, getattr(self, name).reshape(of, -1)[programs].reshape(-1))
        return some

    def block_barrier(self) -> None:
        self.now += 1
        self.since = self.now

    def warp_barrier(self) -> None:
        self.now += 1

    def proxy_fence(self) -> None:
        self.fences += 1

    def _unordered(self, when: Array, by: Array, who: Array) -> Array:
        in_one_warp = (when < self.now) & (warp_of(by) == warp_of(who))
        return (when >= self.since) & (by != who) & ~in_one_warp

    def reading(self, g: Array, who: Array) -> tuple[Array, str] | None:
        """Notes that threads read these granules. Returns which must not, and why, if any."""
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if (bad := self._unordered(self.wrote_at[g], self.wrote_by[g], who)).any():
            return bad, "that another thread wrote since the last barrier"
        before = np.where(self.read_at[g] >= self.since, self.read_by[g], who)
        self.read_by[g] = who
        several = (self.read_by[g] != who) | (before != who)
        if several.any():
            self.read_by[g[several]] = -1
            shared = self.read_by[g] == -1  # all readers of a granule that has several
            h, warp, earlier = g[shared], warp_of(who[shared]), warp_of(before[shared])
            self.read_by[h] = WARP + warp
            many = (self.read_by[h] != WARP + warp) | (earlier != warp)
            self.read_by[h[many]] = MANY
        self.read_at[g] = self.now
        return None

    def writing(self, g: Array, who: Array) -> tuple[Array, str] | None:
        """Returns which granules must not be written by these threads now, and why, if any; notes nothing."""
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if (bad := self.busy[g] != 0).any():
            return bad, "that an asynchronous instruction is still reading"
        if (bad := self._unordered(self.read_at[g], self.read_by[g], who)).any():
            return bad, "that another thread read since the last barrier"
        return None

    def rewritten(self, g: Array, who: Array) -> Array | None:
        """Returns which granules another thread wrote since the last barrier."""
        return self._unordered(self.wrote_at[g], self.wrote_by[g], who) if self.enabled else None

    def wrote(self, g: Array, who: Array, fence_needed: bool) -> None:
        if self.enabled:
            self.wrote_at[g], self.wrote_by[g] = self.now, who
            self.unfenced[g] = self.fences if fence_needed else 0

    # --- asynchronous copies into shared memory ---

    def depart(self, g: Array, who: Array) -> tuple[Array, str] | None:
        """Notes that a copy into these granules begins. Returns which must not be written, and why, if any."""
        problem = self.writing(g, who)
        if problem or not self.enabled:
            return problem
        if (bad := self._unordered(self.wrote_at[g], self.wrote_by[g], who)).any():
            return bad, "that another thread wrote since the last barrier"
        self.arriving[g] = True
        return None

    def arrive(self, g: Array) -> None:
        if self.enabled:
            self.arriving[g] = False

    def arrive_by_engine(self, g: Array) -> None:
        """A bulk copy was waited for at its mbarrier, which orders it for whoever waited."""
        if self.enabled:
            self.arriving[g] = False
            self.wrote_at[g] = self.unfenced[g] = 0

    # --- asynchronous instructions that read shared memory ---

    def engage(self, g: Array, group: int) -> tuple[Array, str] | None:
        """Notes that wgmma or a bulk store of that group reads these granules. Returns which must not be read, and why."""
        if not self.enabled:
            return None
        if (bad := self.arriving[g]).any():
            return bad, "that an asynchronous copy is still writing"
        if (bad := self._unordered(self.wrote_at[g], self.wrote_by[g], np.full(g.size, ENGINE))).any():
            return bad, "that a thread wrote since the last barrier"
        if (bad := self.unfenced[g] == self.fences).any():
            return bad, "through the asynchronous proxy, that a thread wrote without a fence.proxy.async since"
        self.busy[g] = group
        return None

    def release(self, g: Array, group: int) -> None:
        if self.enabled:
            mine = g[self.busy[g] == group]
            self.busy[mine] = 0
            self.read_at[g], self.read_by[g] = self.now, ENGINE
