"""The tensor memory accelerator: tensor maps, and the boxes that bulk copies move by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
from simulator.errors import Fault, Unsupported
from simulator.fragments import swizzled
from simulator.global_memory import PARAMETERS, TAG
from simulator.shared_memory import START

if TYPE_CHECKING:
    from simulator.machine import Machine

Coordinates = tuple[Array, ...]


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled makes; the innermost dimension comes first.

    Attributes:
        address: of the tensor, as kernels see it.
        size: bytes of an element.
        shape: elements.
        strides: bytes, of every dimension but the first.
        box: elements that a copy moves.
        swizzle: bytes in which 16-byte pieces are permuted; 0 for none.
        fill: bits of an element outside the tensor: zeros, or NaN.

    Raises:
        Fault: cuTensorMapEncodeTiled would refuse it.
    """

    address: int
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    fill: int = 0

    def __post_init__(self) -> None:
        inner = self.box[0] * self.size
        rules = {
            "an address that is a multiple of 16": self.address % 16 == 0,
            "1 to 5 dimensions": 1 <= len(self.shape) <= 5 and len(self.shape) == len(self.box) == len(self.strides) + 1,
            "extents of 1 to 2^32": all(1 <= n <= 2**32 for n in self.shape),
            "strides in multiples of 16 bytes below 2^40": all(s % 16 == 0 and 0 <= s < 2**40 for s in self.strides),
            "a box of 1 to 256 elements each way": all(1 <= n <= 256 for n in self.box),
            "rows of a box in multiples of 16 bytes": inner % 16 == 0,
            "rows of a box no wider than the swizzle": not self.swizzle or inner <= self.swizzle,
        }
        for rule, kept in rules.items():
            if not kept:
                raise Fault(f"a tensor map must have {rule}: {self}")


@dataclass(frozen=True)
class Boxes:
    """The boxes that one instruction moves: who asked, and where their elements are, a row per box.

    Attributes:
        rows, lanes: the program, and the thread that asked.
        offsets: in shared memory.
        addresses: in global memory, as kernels see them.
        inside: whether an element is one of the tensor's.
    """

    map: TensorMap
    rows: Array
    lanes: Array
    offsets: Array
    addresses: Array
    inside: Array


class BoxLoads:
    """Boxes on their way into a program's shared memory, until a phase of their mbarrier is complete."""

    def __init__(self) -> None:
        self.arriving: list[tuple[int, Array, Array]] = []  # bytes of an element, barriers, offsets; -1 for none

    def part(self, programs: Array) -> BoxLoads:
        some = BoxLoads()
        some.arriving = [(size, slots[programs], offsets[programs]) for size, slots, offsets in self.arriving]
        return some

    def under_way(self) -> Array:
        """Returns the programs of which boxes have not come."""
        return _programs(slots for _, slots, _ in self.arriving)

    def load(
        self,
        m: Machine,
        line: int,
        to: Array,
        which: Array,
        coordinates: Coordinates,
        barrier: Array,
        guard: Array | None,
    ) -> None:
        """Copies boxes to shared memory, zeros for what is outside the tensor; their bytes count at the mbarrier."""
        b = _boxes(m, line, to, which, coordinates, guard)
        if b is None:
            return
        size = b.map.size
        data = np.full(b.offsets.shape, b.map.fill, m.shared.units[size].dtype)
        if b.inside.any():
            data[b.inside] = m.memory.read(m, line, b.addresses[b.inside], _each(b.lanes, b.inside), size)
        slots = m.barriers.named(m, line, b.lanes, m.full(barrier).reshape(-1)[b.lanes])
        lanes = np.repeat(b.lanes, b.offsets.shape[1])
        places = m.shared.locate(m, line, b.offsets.reshape(-1), lanes, size, "copies a box to")
        g = m.shared.granules(places, size)
        problem = m.shared.races.depart(g, np.repeat(m.threads(lanes), g.size // places.size))
        if problem:
            m.shared.blame(m, line, "copies a box to a part", problem, places, lanes)
        m.shared.written[g] = True
        m.shared.units[size][places // size] = data.reshape(-1)
        self.arriving.append((size, _table(m, b.rows, slots), _table(m, b.rows, b.offsets)))
        m.barriers.come(m, line, b.rows, slots, b.offsets.shape[1] * size)
        if m.tally:
            m.tally.box(b.offsets.size * size)

    def arrived(self, m: Machine, rows: Array, slots: Array) -> None:
        """A phase of these programs' mbarriers is complete: the boxes that were on their way there have come."""
        left = []
        for size, barriers, offsets in self.arriving:
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                mine = np.flatnonzero(barriers[row] == slot)
                if mine.size:
                    g = m.shared.granules((offsets[row, mine] + row * m.shared.row).reshape(-1), size)
                    m.shared.races.arrive_box(g, row, slot)
                    barriers[row, mine] = -1
            if (barriers >= 0).any():
                left.append((size, barriers, offsets))
        self.arriving = left


class BoxStores:
    """Boxes that are read from shared memory until their group is waited for."""

    def __init__(self) -> None:
        self.number = 1  # of the open group of stores
        self.open: list[tuple[int, Array, Array]] = []  # bytes of an element, lanes that asked, offsets; -1 for none
        self.groups: list[tuple[int, list[tuple[int, Array, Array]]]] = []

    @property
    def pending(self) -> bool:
        """Whether anything is under way."""
        return bool(self.open) or any(group for _, group in self.groups)

    def part(self, programs: Array) -> BoxStores:
        def cut(group: list[tuple[int, Array, Array]]) -> list[tuple[int, Array, Array]]:
            return [(size, warps[programs], offsets[programs]) for size, warps, offsets in group]

        some = BoxStores()
        some.number, some.open = self.number, cut(self.open)
        some.groups = [(n, cut(group)) for n, group in self.groups]
        return some

    def store(self, m: Machine, line: int, source: Array, which: Array, coordinates: Coordinates, guard: Array | None) -> None:
        """Copies boxes from shared memory; what is outside the tensor is dropped."""
        b = _boxes(m, line, source, which, coordinates, guard)
        if b is None:
            return
        size, races = b.map.size, m.shared.races
        lanes = np.repeat(b.lanes, b.offsets.shape[1])
        places = m.shared.locate(m, line, b.offsets.reshape(-1), lanes, size, "copies a box from")
        g = m.shared.granules(places, size)
        threads = np.repeat(m.threads(lanes), g.size // places.size)
        problem = races.engage(g, races.stores + (threads >> 5), self.number, threads, threads >> 5)
        if problem:
            m.shared.blame(m, line, "copies a box from a part", problem, places, lanes)
        m.shared.must_be_written(m, line, g, places, lanes, size)
        self.open.append((size, _table(m, b.rows, m.threads(b.lanes) >> 5), _table(m, b.rows, b.offsets)))
        if b.inside.any():
            data = m.shared.units[size][places // size].reshape(b.offsets.shape)
            m.memory.write(m, line, b.addresses[b.inside], _each(b.lanes, b.inside), size, data[b.inside])
        if m.tally:
            m.tally.box(b.offsets.size * size)

    def under_way(self) -> Array:
        """Returns the programs whose boxes are still being read."""
        return _programs(warps for group in (self.open, *(group for _, group in self.groups)) for _, warps, _ in group)

    def commit(self) -> None:
        self.groups.append((self.number, self.open))
        self.open = []
        self.number += 1

    def wait(self, m: Machine, left: int) -> None:
        """Ends all but the last `left` groups, which the warps of those who asked for the boxes know."""
        races = m.shared.races
        while len(self.groups) > left:
            number, group = self.groups.pop(0)
            for size, warps, offsets in group:
                row, box = np.nonzero(warps >= 0)
                g = m.shared.granules((offsets[row, box] + row[:, None] * m.shared.row).reshape(-1), size)
                races.release(g, np.repeat(races.stores + warps[row, box], g.size // row.size), number)
                asked = np.unique(warps[row, box])
                races.released(asked, races.stores + asked)


def _boxes(m: Machine, line: int, shared: Array, which: Array, coordinates: Coordinates, guard: Array | None) -> Boxes | None:
    active = np.ones(m.shape, bool) if guard is None else m.full(guard)
    lanes = np.flatnonzero(active)
    if lanes.size == 0:
        return None
    wanted = m.full(which).reshape(-1)[lanes]
    if (wanted != wanted[0]).any():
        raise Unsupported(f"{m.kernel.place(line)}: several tensor maps in one instruction")
    t = m.maps.get(int(wanted[0]) & ((1 << TAG) - 1)) if int(wanted[0]) >> TAG == PARAMETERS else None
    if t is None:
        raise Unsupported(f"{m.kernel.place(line)}: a tensor map that is no parameter of the kernel")
    if len(coordinates) != len(t.box):
        m.fault(line, f"{len(coordinates)} coordinates in a tensor map of {len(t.box)} dimensions;", lanes[0])
    start = m.full(shared).reshape(-1)[lanes].astype(np.int64)
    if (start % 128).any():
        bad = int(np.flatnonzero(start % 128)[0])
        m.fault(line, "a box in shared memory at no multiple of 128", lanes[bad], f"shared memory, byte {start[bad] - START}")
    offsets = np.zeros((lanes.size, *(1,) * len(t.box)), np.int64)  # in the tensor, then [box, ..., second, first dimension]
    inside = np.ones_like(offsets, bool)
    for d, (extent, coordinate) in enumerate(zip(t.box, coordinates, strict=True)):
        first = m.full(coordinate).reshape(-1)[lanes].astype(np.int64).reshape(-1, *(1,) * len(t.box))
        i = first + np.arange(extent).reshape(-1, *(1,) * d)
        offsets = offsets + i * (t.size if d == 0 else t.strides[d - 1])
        inside = inside & (i >= 0) & (i < t.shape[d])
    n = lanes.size
    linear = start[:, None] + np.arange(offsets[0].size) * t.size
    return Boxes(
        t, lanes // m.T, lanes, (swizzled(linear, t.swizzle) if t.swizzle else linear) - START,
        t.address + offsets.reshape(n, -1), inside.reshape(n, -1),
    )  # fmt: skip


def _programs(tables: Iterable[Array]) -> Array:
    """Returns the rows of tables that have an entry."""
    return np.unique([row for table in tables for row in np.flatnonzero((table >= 0).any(1))]).astype(np.int64)


def _each(lanes: Array, inside: Array) -> Array:
    """Returns, for each element that is inside, the lane of its box."""
    return np.broadcast_to(lanes[:, None], inside.shape)[inside]


def _table(m: Machine, rows: Array, values: Array) -> Array:
    """Returns values of boxes as a row per program, its boxes in the second dimension, filled up with -1."""
    column = np.arange(rows.size) - np.searchsorted(rows, rows)
    table = np.full((m.C, column.max() + 1, *values.shape[1:]), -1, np.int64)
    table[rows, column] = values
    return table
