"""Logic, shifts, and bits moved about."""

from __future__ import annotations

import numpy as np

from simulator.arrays import TYPES, Array
from simulator.parser import Immediate
from simulator.translator import Code, form

LOGIC = {"and": "&", "or": "|", "xor": "^"}


@form("{and,or,xor}.{pred,b16,b32,b64}")
def logic(c: Code, op: str, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} {LOGIC[op]} {c.read(2, kind)}", kind)


@form("not.{pred,b16,b32,b64}")
def invert(c: Code, kind: str) -> None:
    c.write(0, f"~{c.read(1, kind)}", kind)


@form("lop3.b32")
def lookup(c: Code) -> None:
    c.write(0, c.call(lop3, c.read(1, "b32"), c.read(2, "b32"), c.read(3, "b32"), str(c.integer(4))), "b32")


def lop3(a: Array, b: Array, d: Array, table: int) -> Array:
    """Any function of three bits: bit i of the table is its value where (a, b, d) are the bits of i."""
    found = a & ~a
    for i in range(8):
        if table >> i & 1:
            found = found | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (d if i & 1 else ~d))
    return found


@form("{shl}.{b16,b32,b64}", "{shr}.{b16,b32,b64,u16,s16,u32,s32,u64,s64}")
def shift(c: Code, op: str, kind: str) -> None:
    kind = kind if kind[0] == "s" else "u" + kind[1:]
    by = c.operands[2]
    if isinstance(by, Immediate) and 0 <= c.integer(by) < int(kind[1:]):  # most are, and numpy shifts by these as PTX does
        sign = {"shl": "<<", "shr": ">>"}[op]
        c.write(0, f"{c.read(1, kind)} {sign} {c.constant(c.integer(by), TYPES[kind].dtype)}", kind)
        return
    c.write(0, c.call({"shl": shl, "shr": shr}[op], c.read(1, kind), c.read(by, "u32")), kind)


def shl(a: Array, by: Array) -> Array:
    """A shift by the register's width or more leaves nothing."""
    width = 8 * a.dtype.itemsize
    shifted = a << np.minimum(by, np.uint32(width - 1)).astype(a.dtype)
    return np.where(by >= width, a.dtype.type(0), shifted) if (by >= width).any() else shifted


def shr(a: Array, by: Array) -> Array:
    """A shift by the register's width or more leaves nothing but signs."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, np.uint32(width - 1)).astype(a.dtype)
    if a.dtype.kind == "u" and (by >= width).any():
        return np.where(by >= width, a.dtype.type(0), shifted)
    return shifted


@form("shf.{l,r}.{wrap,clamp}.b32")
def funnel_shift(c: Code, to: str, mode: str) -> None:
    f = {"l": funnel_left, "r": funnel_right}[to]
    c.write(0, c.call(f, c.read(1, "u32"), c.read(2, "u32"), c.read(3, "u32"), str(mode == "wrap")), "u32")


def _amount(by: Array, wrap: bool) -> Array:
    return (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)


def funnel_left(low: Array, high: Array, by: Array, wrap: bool) -> Array:
    """Returns the upper half of high:low, shifted left."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both << _amount(by, wrap) >> np.uint64(32)).astype(np.uint32)


def funnel_right(low: Array, high: Array, by: Array, wrap: bool) -> Array:
    """Returns the lower half of high:low, shifted right."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both >> _amount(by, wrap)).astype(np.uint32)


@form("bfe.{u32,s32,u64,s64}")
def extract(c: Code, kind: str) -> None:
    c.write(0, c.call(field, c.read(1, kind), c.read(2, "u32"), c.read(3, "u32")), kind)


def field(a: Array, position: Array, length: Array) -> Array:
    """Returns `length` bits from `position` on. Where the register or the field ends, signed ones are extended by the last."""
    width = 8 * a.dtype.itemsize
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    position, length = position & np.uint32(255), length & np.uint32(255)
    there = np.minimum(length, np.maximum(np.uint32(width), position) - position)
    mask = shl(np.ones_like(a, unsigned), there) - unsigned.type(1)
    bits = shr(a.view(unsigned), position) & mask
    if a.dtype.kind == "u":
        return bits
    last = np.clip(position.astype(np.int64) + length - 1, 0, width - 1)
    negative = (length > 0) & (a >> last.astype(a.dtype) & a.dtype.type(1) != 0)
    return np.where(negative, bits | ~mask, bits).view(a.dtype)


@form("bfi.{b32,b64}")
def insert(c: Code, kind: str) -> None:
    kind = "u" + kind[1:]
    c.write(0, c.call(inserted, c.read(1, kind), c.read(2, kind), c.read(3, "u32"), c.read(4, "u32")), kind)


def inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    """Returns b with `length` bits from `position` on replaced by a's lowest."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = shl(shl(np.ones_like(b), length) - b.dtype.type(1), position)
    return (b & ~mask) | (shl(a, position) & mask)


@form("popc.{b32,b64}")
def count_ones(c: Code, kind: str) -> None:
    c.write(0, f"{c.call(np.bitwise_count, c.read(1, 'u' + kind[1:]))}.astype({c.name(np.int32)})", "b32")


@form("clz.{b32,b64}")
def leading_zeros(c: Code, kind: str) -> None:
    c.write(0, c.call(zeros_before, c.read(1, "u" + kind[1:])), "b32")


def zeros_before(a: Array) -> Array:
    width = 8 * a.dtype.itemsize
    filled = a
    for by in (1, 2, 4, 8, 16, 32)[: width.bit_length() - 1]:
        filled = filled | filled >> a.dtype.type(by)
    return (width - np.bitwise_count(filled).astype(np.int32)).astype(np.int32)


@form("brev.{b32,b64}")
def reverse(c: Code, kind: str) -> None:
    c.write(0, c.call(reversed_bits, c.read(1, "u" + kind[1:])), "u" + kind[1:])


def reversed_bits(a: Array) -> Array:
    found = np.zeros_like(a)
    for i in range(8 * a.dtype.itemsize):
        found = found << a.dtype.type(1) | (a >> a.dtype.type(i) & a.dtype.type(1))
    return found


@form("prmt.b32")
def permute(c: Code) -> None:
    c.write(0, c.call(bytes_of, c.read(1, "u32"), c.read(2, "u32"), c.read(3, "u32")), "u32")


def bytes_of(a: Array, b: Array, selector: Array) -> Array:
    """Each byte is one of the eight of b:a, by four bits of the selector; the fourth of them asks for its sign instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros((1, 1), np.uint64)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> ((choice & np.uint64(7)) << np.uint64(3)) & np.uint64(255)
        signs = (byte >> np.uint64(7)) * np.uint64(255)
        found = found | np.where(choice & np.uint64(8), signs, byte) << np.uint64(8 * i)
    return found.astype(np.uint32)


@form("cnot.{b16,b32,b64}")
def is_zero(c: Code, kind: str) -> None:
    c.write(0, f"({c.read(1, kind)} == 0).astype({c.name(TYPES[kind].dtype)})", kind)
