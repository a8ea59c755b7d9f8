"""Integer arithmetic and comparison. Results wrap around, as numpy's do."""

from __future__ import annotations

import numpy as np

from simulator.arrays import TYPES, Array
from simulator.translator import Code, form

SIGNS = {"add": "+", "sub": "-", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
UNSIGNED_NAMES = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@form("{add,sub}.{u16,s16,u32,s32,u64,s64}")
def add(c: Code, op: str, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} {SIGNS[op]} {c.read(2, kind)}", kind)


@form("mul.lo.{u16,s16,u32,s32,u64,s64}")
def multiply(c: Code, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} * {c.read(2, kind)}", kind)


@form("mad.lo.{u16,s16,u32,s32,u64,s64}")
def multiply_add(c: Code, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} * {c.read(2, kind)} + {c.read(3, kind)}", kind)


@form("mul.wide.{u16,s16,u32,s32}")
def multiply_wide(c: Code, kind: str) -> None:
    c.write(0, _wide(c, kind), WIDER[kind])


@form("mad.wide.{u16,s16,u32,s32}")
def multiply_add_wide(c: Code, kind: str) -> None:
    c.write(0, f"{_wide(c, kind)} + {c.read(3, WIDER[kind])}", WIDER[kind])


def _wide(c: Code, kind: str) -> str:
    wide = c.name(TYPES[WIDER[kind]].dtype)
    return f"{c.read(1, kind)}.astype({wide}) * {c.read(2, kind)}"


@form("{mul,mad}.hi.{u16,s16,u32,s32}")
def multiply_high(c: Code, op: str, kind: str) -> None:
    high = f"({_wide(c, kind)} >> {8 * TYPES[kind].dtype().itemsize}).astype({c.name(TYPES[kind].dtype)})"
    c.write(0, high if op == "mul" else f"{high} + {c.read(3, kind)}", kind)


@form("mul.hi.{u64,s64}")
def multiply_high_64(c: Code, kind: str) -> None:
    c.write(0, c.call(high_64, c.read(1, kind), c.read(2, kind)), kind)


def high_64(a: Array, b: Array) -> Array:
    """Returns the upper half of products of 64 bits, from those of halves."""
    low = a.dtype.type(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & low, a >> 32, b & low, b >> 32
    carry = (a_low.view(np.uint64) * b_low.view(np.uint64) >> np.uint64(32)).view(a.dtype)
    first = a_high * b_low + carry
    second = a_low * b_high + (first & low)
    return a_high * b_high + (first >> 32) + (second >> 32)


@form("div.{u16,s16,u32,s32,u64,s64}")
def divide(c: Code, kind: str) -> None:
    c.write(0, c.call(quotient, c.read(1, kind), c.read(2, kind)), kind)


def quotient(a: Array, b: Array) -> Array:
    """Rounds towards zero. What division by zero gives, PTX leaves to the machine; here, all bits are set."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        found = a // b
    elif a.dtype.itemsize < 8:  # exact in fp64, which numpy divides faster
        found = np.trunc(a.astype(np.float64) / b).astype(np.int64).astype(a.dtype)
    else:
        found = (a - np.fmod(a, b)) // b
    return np.where(zero, np.array(-1).astype(a.dtype), found)


@form("rem.{u16,s16,u32,s32,u64,s64}")
def remainder(c: Code, kind: str) -> None:
    c.write(0, c.call(np.fmod, c.read(1, kind), c.read(2, kind)), kind)


@form("neg.{s16,s32,s64}")
def negate(c: Code, kind: str) -> None:
    c.write(0, f"-{c.read(1, kind)}", kind)


@form("abs.{s16,s32,s64}")
def absolute(c: Code, kind: str) -> None:
    c.write(0, c.call(np.abs, c.read(1, kind)), kind)


@form("{min,max}.{u16,s16,u32,s32,u64,s64}")
def extreme(c: Code, op: str, kind: str) -> None:
    c.write(0, c.call(getattr(np, f"{op}imum"), c.read(1, kind), c.read(2, kind)), kind)


@form(
    "setp.{eq,ne}.{b16,b32,b64}",
    "setp.{eq,ne,lt,le,gt,ge}.{u16,s16,u32,s32,u64,s64}",
)
def compare(c: Code, how: str, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} {SIGNS[how]} {c.read(2, kind)}", "pred")


@form("setp.{lo,ls,hi,hs}.{u16,u32,u64}")
def compare_unsigned(c: Code, how: str, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} {UNSIGNED_NAMES[how]} {c.read(2, kind)}", "pred")
