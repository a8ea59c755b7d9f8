"""Global memory: the tensors of this process that a launch may touch, and checks of every access.

A pointer that a kernel is given carries the number of its tensor's storage in its upper 16 bits. Storages are thereby as far
apart as can be, and what reaches beyond one of them is noticed even if another one lies there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simulator.arrays import UNITS, Array

if TYPE_CHECKING:
    from simulator.machine import Machine

TAG = 48  # bits of an address below the number of its storage
REAL = (1 << TAG) - 1
PARAMETERS = 0x7000  # a number that no storage has: kernel parameters, of which tensor maps have addresses
VARIABLES = 0x7001  # and the module's variables, which nothing reads
FIRST_PAGE = 4096  # numpy makes no array at address 0
SEVERAL = -1  # programs wrote it, all the same value
LARGEST_MAP = 1 << 26  # bytes of a storage up to which it is known which of them belong to the tensor


class _Everything:
    """All memory of this process as one numpy array. Whoever indexes it has checked the index."""

    def __init__(self, unit: Any) -> None:
        kind = np.dtype(unit)
        count = (1 << 47) // kind.itemsize - FIRST_PAGE
        self.__array_interface__ = {"data": (FIRST_PAGE, False), "shape": (count,), "typestr": kind.str, "version": 3}


EVERYTHING = {size: np.asarray(_Everything(unit)) for size, unit in UNITS.items()}


class Storage:
    """The memory of one or several tensors.

    Attributes:
        writers: per granule the number, from 1, of the program that wrote it in this launch, 0 for none.
        elements: per byte whether it belongs to an element of a tensor that the launch was given; None if all do.
    """

    def __init__(self, number: int, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        self.number, self.start, self.size = number, storage.data_ptr(), storage.nbytes()
        self.names = [name] if name else []
        self.writers: Array | None = None
        self.elements: Array | None = _elements(tensor)

    @property
    def name(self) -> str:
        """The names of its tensors in the launch."""
        return "/".join(self.names) or "a tensor"

    def add(self, tensor: torch.Tensor, name: str) -> None:
        self.names += [name] if name else []
        more = _elements(tensor)
        self.elements = None if self.elements is None or more is None else self.elements | more


def _elements(tensor: torch.Tensor) -> Array | None:
    bytes_ = tensor.untyped_storage().nbytes()
    size = tensor.element_size()
    if bytes_ > LARGEST_MAP or (tensor.is_contiguous() and tensor.numel() * size == bytes_):
        return None
    mine = torch.zeros(bytes_ // size, dtype=torch.bool)
    shape = [n if stride else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    mine.as_strided(shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    found = np.zeros(bytes_, bool)
    found[: mine.numel() * size] = mine.numpy().repeat(size)
    return found


class GlobalMemory:
    """The storages of a launch. Addresses are int64, of one access each; `lanes` are the threads that make them.

    Attributes:
        granule: bytes by which it is tracked who wrote them.
    """

    def __init__(self) -> None:
        self.granule = 1
        self.storages: list[Storage] = []
        self._by_start: dict[int, Storage] = {}

    def pointer(self, tensor: torch.Tensor, name: str = "") -> int:
        """Makes a tensor's memory accessible, and returns its address as kernels see it."""
        start = tensor.untyped_storage().data_ptr()
        storage = self._by_start.get(start)
        if storage is None:
            storage = self._by_start[start] = Storage(len(self.storages) + 1, tensor, name)
            self.storages.append(storage)
        else:
            storage.add(tensor, name)
        return (storage.number << TAG) | tensor.data_ptr()

    def find(self, address: int, name: str) -> int | None:
        """Returns an address in this process as kernels see it; None if no tensor given to the launch is there.

        Args:
            name: of the argument whose value this address is.
        """
        for s in self.storages:
            if s.start <= address < s.start + max(s.size, 1):
                s.names.append(name)
                return (s.number << TAG) | address
        return None

    def describe(self, address: int) -> str:
        number, real = address >> TAG, address & REAL
        if 1 <= number <= len(self.storages):
            s = self.storages[number - 1]
            return f"byte {real - s.start} of the {s.size} of {s.name}"
        return f"{address:#x}, which is in no tensor of the launch"

    def read(self, m: Machine, line: int, addresses: Array, lanes: Array, size: int) -> Array:
        """Returns what lies at these addresses, in units of `size` bytes."""
        for storage, part in self._checked(m, line, addresses, lanes, size, "reads"):
            real = addresses[part] & REAL
            self._must_be_elements(m, line, storage, addresses, part, lanes, size, "reads")
            if storage.writers is not None:
                writers = storage.writers[self._granules(storage, real, size)]
                others = (writers != 0) & (writers != m.programs[lanes[part] // m.T, None] + 1)
                if others.any():
                    bad = int(np.flatnonzero(others.any(1))[0])
                    what = f"reads {size} bytes that another program of the launch wrote"
                    m.fault(line, what, lanes[part][bad], self.describe(int(addresses[part][bad])))
        if m.tally:
            m.tally.access(m, "reads", line, addresses, lanes, size)
        return EVERYTHING[size][((addresses & REAL) - FIRST_PAGE) // size]

    def write(self, m: Machine, line: int, addresses: Array, lanes: Array, size: int, data: Array) -> None:
        """Writes units of `size` bytes. Two programs may write one address only if they write the same value."""
        index = ((addresses & REAL) - FIRST_PAGE) // size
        memory = EVERYTHING[size]
        for storage, part in self._checked(m, line, addresses, lanes, size, "writes"):
            self._must_be_elements(m, line, storage, addresses, part, lanes, size, "writes")
            if storage.writers is None:
                storage.writers = np.zeros(-(-storage.size // self.granule), np.int32)
            granules = self._granules(storage, addresses[part] & REAL, size)
            mine = m.programs[lanes[part] // m.T, None] + 1
            before = storage.writers[granules]
            others = (before != 0) & (before != mine)
            again = others.any(1)
            if again.any() and (changed := again & differ(memory[index[part]], data[part])).any():
                bad = int(np.flatnonzero(changed)[0])
                what = f"writes {size} bytes, not as another program of the launch wrote them"
                m.fault(line, what, lanes[part][bad], self.describe(int(addresses[part][bad])))
            storage.writers[granules] = mine
            storage.writers[granules[others | (storage.writers[granules] != mine)]] = SEVERAL
        memory[index] = data
        if (lost := differ(memory[index], data)).any():
            bad = int(np.flatnonzero(lost)[0])
            what = f"writes {size} bytes, where another thread, perhaps of another program, writes other values at once"
            m.fault(line, what, lanes[bad], self.describe(int(addresses[bad])))
        if m.tally:
            m.tally.access(m, "writes", line, addresses, lanes, size)

    def _granules(self, storage: Storage, real: Array, size: int) -> Array:
        first = (real - storage.start) // self.granule
        return first[:, None] + np.arange(max(1, size // self.granule))

    def _checked(self, m: Machine, line: int, a: Array, lanes: Array, size: int, what: str) -> list[tuple[Storage, Any]]:
        """Returns the storages that are accessed, each with its part of the accesses, all aligned and inside."""
        if np.bitwise_or.reduce(a & (size - 1)):
            bad = int(np.flatnonzero(a & (size - 1))[0])
            m.fault(line, f"{what} {size} bytes, misaligned,", lanes[bad], self.describe(int(a[bad])))
        first, last = int(a.min()), int(a.max())
        if first >> TAG == last >> TAG and 1 <= first >> TAG <= len(self.storages):
            s = self.storages[(first >> TAG) - 1]
            if s.start <= first & REAL and (last & REAL) + size <= s.start + s.size:
                return [(s, slice(None))]
        found: list[tuple[Storage, Any]] = []
        for number in np.unique(a >> TAG):
            part = np.flatnonzero(a >> TAG == number)
            outside = np.ones(part.size, bool)
            if 1 <= number <= len(self.storages):
                s, real = self.storages[number - 1], a[part] & REAL
                outside = (real < s.start) | (real + size > s.start + s.size)
                found.append((s, part))
            if outside.any():
                bad = int(part[np.flatnonzero(outside)[0]])
                m.fault(line, f"{what} {size} bytes out of bounds", lanes[bad], self.describe(int(a[bad])))
        return found

    def _must_be_elements(
        self, m: Machine, line: int, s: Storage, a: Array, part: Any, lanes: Array, size: int, what: str
    ) -> None:
        if s.elements is None or not m.options.elements:
            return
        outside = ~s.elements[((a[part] & REAL) - s.start)[:, None] + np.arange(size)].all(1)
        if outside.any():
            bad = int(np.flatnonzero(outside)[0])
            what = f"{what} {size} bytes between the tensor's elements"
            m.fault(line, what, lanes[part][bad], self.describe(int(a[part][bad])))


def differ(a: Array, b: Array) -> Array:
    """Returns where units of the same size differ in any bit (numbers would not do: NaN differs from itself)."""
    if a.dtype.itemsize < 16:
        return a.view(f"u{a.dtype.itemsize}") != b.view(f"u{b.dtype.itemsize}")
    return (a.view(np.uint64).reshape(-1, 2) != b.view(np.uint64).reshape(-1, 2)).any(1)
