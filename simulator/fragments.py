"""Tensor cores: how matrices lie in the registers of a warp and in shared memory, and their products.

A warp holds a matrix in fragments: with g = lane // 4 and c = lane % 4, a thread has rows g and g + 8, and in them the columns
that begin at c times as many as fit 32 bits (64 for f64). PTX draws these layouts per shape and type; all of them are that
one rule, which `left`, `right` and `spread` apply.

How tensor cores round sums of products, PTX does not say. Here products are summed in the accumulator's type, in an order of
numpy's. Hopper's sums of fp8 products, which have some 14 bits, are not imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import E4M3, Array
from simulator.errors import Unsupported
from simulator.races import ANY
from simulator.shared_memory import START

if TYPE_CHECKING:
    from simulator.machine import Machine

Registers = Sequence[Array]
ELEMENTS = {"e4m3": np.uint8, "bf16": np.uint16, "f16": np.uint16, "tf32": np.int32, "f64": np.int64}  # how operands are stored
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # a descriptor's mode: bytes of a row in which 16-byte pieces are permuted


def numbers(bits: Array, kind: str) -> Array:
    """Returns stored operands as numbers, fp64 ones in fp64 and all others in fp32."""
    if kind == "e4m3":
        return E4M3[bits]
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":  # the hardware does not read the 13 bits that TF32 lacks
        return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return bits.view(np.float64)


def stacked(m: Machine, registers: Registers) -> Array:
    """Returns registers as [programs, warps, g, c, register]."""
    table = np.empty((len(registers), *m.shape), registers[0].dtype)
    for row, register in zip(table, registers, strict=True):
        row[...] = register
    return np.ascontiguousarray(np.moveaxis(table, 0, -1)).reshape(m.C, m.W, 8, 4, len(registers))


def left(m: Machine, registers: Registers, kind: str, rows: int) -> Array:
    """Returns the first operand of a product, [programs, warps, rows, k]. Registers go by row halves, then along k."""
    v = stacked(m, registers).view(ELEMENTS[kind])
    halves, per = rows // 8, v.shape[-1] // len(registers)
    v = v.reshape(m.C, m.W, 8, 4, -1, halves, per)  # g c step half element
    return numbers(np.ascontiguousarray(v.transpose(0, 1, 5, 2, 4, 3, 6)).reshape(m.C, m.W, rows, -1), kind)


def right(m: Machine, registers: Registers, kind: str) -> Array:
    """Returns the second operand of a product, [programs, warps, k, 8]: its columns are what g counts."""
    v = stacked(m, registers).view(ELEMENTS[kind]).reshape(m.C, m.W, 8, 4, len(registers), -1)  # g c step element
    return numbers(np.ascontiguousarray(v.transpose(0, 1, 4, 3, 5, 2)).reshape(m.C, m.W, -1, 8), kind)


def spread(m: Machine, product: Array) -> Array:
    """Returns a product [programs, warps, rows, columns] as registers: by column blocks of 8, row halves, two columns each."""
    *_, rows, columns = product.shape
    p = product.reshape(m.C, m.W, rows // 8, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return np.ascontiguousarray(p).reshape(rows * columns // 32, *m.shape)


def mma(m: Machine, kind: str, rows: int, a: Registers, b: Registers, c: Registers) -> tuple[Array, ...]:
    """mma.sync: a times b plus c, by each warp."""
    x = _once(m, a, f"a, {kind}, {rows}", lambda: left(m, a, kind, rows))
    y = _once(m, b, f"b, {kind}", lambda: right(m, b, kind))
    p = spread(m, np.matmul(x, y))
    return tuple((q + r.view(p.dtype)).view(r.dtype) for q, r in zip(p, c, strict=True))


def _once(m: Machine, registers: Registers, what: str, make: Callable[[], Array]) -> Array:
    """Unrolled code multiplies each fragment by several others: `make` is called once per basic block, registers, and use.

    The registers are kept with what was made, so that no array gets the id of one that is gone.
    """
    key = (what, *map(id, registers))
    found = m.fragments.get(key)
    if found is None:
        found = m.fragments[key] = make(), registers
    return found[0]


# --- ldmatrix and stmatrix: 8x8 matrices of 16 bits ---


def _rows(m: Machine, address: Array, count: int) -> tuple[Array, Array]:
    """Returns the offsets and lanes of the rows: eight threads give those of a matrix, 16 bytes each."""
    offsets = m.full(address).astype(np.int64).reshape(-1, 32)[:, : 8 * count] - START
    return offsets.reshape(-1), m.lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)


def load_matrices(m: Machine, line: int, address: Array, count: int, transposed: bool) -> tuple[Array, ...]:
    data = m.shared.read(m, line, *_rows(m, address, count), 16)
    if transposed:
        data = np.ascontiguousarray(data.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2))
    words = data.view(np.int32).reshape(m.C, m.W, count, 32)
    return tuple(np.ascontiguousarray(words[:, :, i]).reshape(m.shape) for i in range(count))


def store_matrices(m: Machine, line: int, address: Array, registers: Registers, transposed: bool) -> None:
    words = np.stack([m.full(r).reshape(m.C, m.W, 32) for r in registers], 2)
    if transposed:
        words = np.ascontiguousarray(words.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2))
    m.shared.write(m, line, *_rows(m, address, len(registers)), 16, np.ascontiguousarray(words).reshape(-1).view(np.complex128))


# --- wgmma: products by four warps at a time, with operands in shared memory ---


class Products:
    """wgmma runs at once, but reads its operands until its group is waited for. Offsets are rows per program."""

    def __init__(self) -> None:
        self.number = 1  # of the open group
        self.open: list[tuple[int, Array]] = []  # (bytes of an element, offsets [programs, warpgroups, elements])
        self.groups: list[tuple[int, list[tuple[int, Array]]]] = []

    @property
    def pending(self) -> bool:
        """Whether anything is under way."""
        return bool(self.open) or any(group for _, group in self.groups)

    def part(self, programs: Array) -> Products:
        some = Products()
        some.number = self.number
        some.open = [(size, offsets[programs]) for size, offsets in self.open]
        some.groups = [(n, [(size, offsets[programs]) for size, offsets in group]) for n, group in self.groups]
        return some

    def commit(self) -> None:
        self.groups.append((self.number, self.open))
        self.open = []
        self.number += 1

    def wait(self, m: Machine, left: int) -> None:
        """Ends all but the last `left` groups."""
        if len(self.groups) <= left:
            return
        races = m.shared.races
        while len(self.groups) > left:
            number, group = self.groups.pop(0)
            for size, offsets in group:
                places = offsets + np.arange(m.C)[:, None, None] * m.shared.row
                g = m.shared.granules(places.reshape(-1), size)
                m.shared.races.release(g, _each_warpgroup(m, races.tensor_cores(m.warps[::4]), g.size), number)
        races.released(m.warps, races.tensor_cores(m.warps))


def _each_warpgroup(m: Machine, values: Array, count: int) -> Array:
    """Returns a value of each warpgroup for `count` granules that go by programs, then warpgroups."""
    return np.tile(np.repeat(values, count // (m.C * values.size)), m.C)


def multiply(
    m: Machine,
    line: int,
    n: int,
    k: int,
    kind: str,
    d: Registers,
    a: Registers | Array,
    b: Array,
    add: bool | Array,
    sign: int,
    transposed: tuple[bool, bool],
) -> tuple[Array, ...]:
    """wgmma: sign times a [64, k] times b [k, n], plus d where `add`, by each group of four warps.

    Args:
        a: registers, or a descriptor, as b.
        transposed: whether a and b lie in shared memory with k as the slower dimension.
    """
    if m.W % 4 or m.warps[0] % 4:
        if m.team is not None:
            raise Unsupported(f"{m.kernel.place(line)}: wgmma by warps of one warpgroup that have parted")
        m.fault(line, "wgmma by less than four warps, or by warps of two warpgroups;")
    groups = m.W // 4
    if isinstance(a, np.ndarray):
        x = _described(m, line, a, 64, k, kind, transposed[0])
    else:
        x = left(m, a, kind, 16).reshape(m.C, groups, 64, k)
    y = _described(m, line, b, n, k, kind, transposed[1]).swapaxes(2, 3)
    product = np.matmul(x, y)
    p = spread(m, (product if sign > 0 else -product).reshape(m.C, m.W, 16, n))
    if isinstance(add, np.ndarray):
        add = m.full(add).reshape(m.C, groups, 128)
        if (add != add[:, :, :1]).any():
            m.fault(line, "threads of a warpgroup give different scale-d")
        add = bool(add[0, 0, 0]) if (add == add[0, 0, 0]).all() else add.reshape(m.shape)
    if add is False:
        return tuple(p.view(np.int32))
    sums = ((q, q + r.view(np.float32)) for q, r in zip(p, d, strict=True))
    return tuple((s if add is True else np.where(add, s, q)).view(np.int32) for q, s in sums)


def _described(m: Machine, line: int, descriptor: Array, rows: int, k: int, kind: str, transposed: bool) -> Array:
    """Reads an operand [programs, groups, rows, k] of wgmma as its descriptor says."""
    groups, size = m.W // 4, np.dtype(ELEMENTS[kind]).itemsize
    d = m.full(descriptor).reshape(m.C, groups, 128)
    if (d != d[:, :, :1]).any():
        m.fault(line, "threads of a warpgroup give different descriptors")
    d = d[:, :, 0]
    offsets = operand_offsets(m, line, d, rows, k, size, transposed)
    flat = offsets.reshape(-1)
    lanes = np.repeat(np.arange(m.C * groups) * 128, rows * k)  # the first thread of each warpgroup
    places = m.shared.locate(m, line, flat, lanes, size, "reads, by wgmma,")
    g = m.shared.granules(places, size)
    races, warp = m.shared.races, _each_warpgroup(m, m.warps[::4], g.size)
    problem = races.engage(g, races.tensor_cores(warp), m.products.number, ANY, warp)
    if problem:
        m.shared.blame(m, line, "wgmma reads a part", problem, places, lanes)
    m.shared.must_be_written(m, line, g, places, lanes, size)
    m.products.open.append((size, offsets.reshape(m.C, groups, -1)))
    return numbers(m.shared.units[size][places // size].view(ELEMENTS[kind]).reshape(offsets.shape), kind)


def operand_offsets(m: Machine, line: int, d: Array, rows: int, k: int, size: int, transposed: bool) -> Array:
    """Returns where in shared memory the elements [..., rows, k] lie that matrix descriptors [...] describe.

    Shared memory is cut into core matrices, eight rows of 16 bytes, or of the swizzle's bytes. Descriptors say where the
    first is, and how far it is to the next in either direction ("leading" and "stride" offsets).
    """
    start, leading, stride = ((d >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = int(d.reshape(-1)[0] >> 62 & 3)
    if (d >> 49 & 7).any():
        raise Unsupported(f"{m.kernel.place(line)}: a descriptor with a base offset")
    if ((d >> 62 & 3) != mode).any():
        raise Unsupported(f"{m.kernel.place(line)}: descriptors with several swizzles in one instruction")
    span = SWIZZLES[mode]
    per = span // size  # elements of a row of a core matrix
    start, leading, stride = (v[..., None, None] for v in (start, leading, stride))
    i, j = np.arange(rows)[:, None], np.arange(k)
    if not transposed and mode:
        if k * size > span:
            m.fault(line, "k is wider than the swizzle")
        at = start + i // 8 * stride + i % 8 * span + j * size
    elif not transposed:
        at = start + i // 8 * stride + j // per * leading + i % 8 * span + j % per * size
    elif mode:
        at = start + i // per * leading + j // 8 * stride + j % 8 * span + i % per * size
    else:
        at = start + i // per * stride + j // 8 * leading + j % 8 * span + i % per * size
    return swizzled(at, span) - START


def swizzled(address: Array, span: int) -> Array:
    """Returns addresses in shared memory with their 16-byte pieces permuted within `span` bytes."""
    return address ^ ((address >> 7 & span // 16 - 1) << 4)
