"""cvt: numbers of one type to another. A register wider than the source type is read by its low bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import E4M3, STORED, TYPES, Array, integer
from simulator.translator import Code, form

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@form("cvt.{u8,s8,u16,s16,u32,s32,u64,s64}.{u8,s8,u16,s16,u32,s32,u64,s64}")
def integers(c: Code, to: str, source: str) -> None:
    """Extended by the source's sign, or cut; a destination of 8 bits lies, extended, in a wider register."""
    a = _integer(c, source)
    _write_integer(c, a if to == source else f"{a}.astype({c.name(integer(to))})", to)


def _integer(c: Code, kind: str) -> str:
    if kind not in ("u8", "s8"):
        return c.read(1, kind, low=True)
    return f"{c.read(1, 'b16', low=True)}.astype({c.name(integer('u8'))}).view({c.name(integer(kind))})"


def _write_integer(c: Code, expression: str, kind: str) -> None:
    register = c.kind(c.operands[0])
    held = STORED[register]().itemsize
    if held > int(kind[1:]) // 8:
        expression, kind = f"({expression}).astype({c.name(integer(kind, held))})", f"{kind[0]}{8 * held}"
    c.write(0, expression, kind)


@form("cvt.{rni,rzi,rmi,rpi}.{u16,s16,u32,s32,u64,s64}.{f16,f32,f64}")
def float_to_integer(c: Code, how: str, to: str, source: str) -> None:
    c.write(0, c.call(to_integer, c.read(1, source), c.name(ROUND[how]), c.name(TYPES[to].dtype)), to)


def to_integer(a: Array, rounding: np.ufunc, dtype: Any) -> Array:
    """Numbers beyond the integers' range become the nearest of them, NaN zero."""
    limits = np.iinfo(dtype)
    rounded = rounding(a.astype(np.float64))
    inside = (rounded >= limits.min) & (rounded < limits.max + 1)
    found: Array = np.where(inside, rounded, 0).astype(dtype)
    found = np.where(rounded >= limits.max + 1, dtype(limits.max), found)
    return np.where(rounded < limits.min, dtype(limits.min), found)


@form("cvt.rn.{f16,f32,f64}.{u16,s16,u32,s32,u64,s64}")
def integer_to_float(c: Code, to: str, source: str) -> None:
    c.write(0, f"{c.read(1, source)}.astype({c.name(TYPES[to].dtype)})", to)


@form("cvt.rn.{f16}.{f32,f64}", "cvt.rn.{f32}.{f64}", "cvt.{f32,f64}.f16", "cvt.{f64}.{f32}")
def floats(c: Code, to: str, source: str = "f16") -> None:
    c.write(0, f"{c.read(1, source)}.astype({c.name(TYPES[to].dtype)})", to)


@form("cvt.{rni,rzi,rmi,rpi}.{f32.f32,f64.f64,f16.f16}")
def to_whole_number(c: Code, how: str, kinds: str) -> None:
    kind = kinds[:3]
    c.write(0, f"{c.name(ROUND[how])}({c.read(1, kind)})", kind)


@form("cvt.f32.bf16")
def from_bf16(c: Code) -> None:
    c.write(0, f"{c.read(1, 'b16')}.astype({c.name(np.uint32)}) << {c.constant(16, np.uint32)}", "u32")


@form("cvt.{rn,rz}.bf16.f32")
def to_bf16(c: Code, how: str) -> None:
    c.write(0, c.call(bf16, c.read(1, "u32"), str(how == "rn")), "b16")


def bf16(bits: Array, nearest: bool) -> Array:
    """Returns the bits of fp32 numbers in bf16, rounded to nearest even or towards zero; NaN is 0x7fff."""
    up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) if nearest else np.uint32(0)
    rounded = (bits + up >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FFF), rounded)


@form("cvt.rn.{bf16x2,f16x2}.f32")
def pack(c: Code, kind: str) -> None:
    """The first source is the upper half."""
    f = {"bf16x2": bf16_pair, "f16x2": f16_pair}[kind]
    c.write(0, c.call(f, c.read(1, "u32"), c.read(2, "u32")), "u32")


def bf16_pair(high: Array, low: Array) -> Array:
    return bf16(high, True).astype(np.uint32) << np.uint32(16) | bf16(low, True)


def f16_pair(high: Array, low: Array) -> Array:
    first, second = (v.view(np.float32).astype(np.float16).view(np.uint16) for v in (high, low))
    return first.astype(np.uint32) << np.uint32(16) | second


@form("cvt.rn.satfinite.e4m3x2.f32")
def pack_e4m3(c: Code) -> None:
    """The first source is the upper half."""
    c.write(0, c.call(e4m3_pair, c.read(1, "u32"), c.read(2, "u32")), "b16")


def e4m3_pair(high: Array, low: Array) -> Array:
    return e4m3(high).astype(np.uint16) << np.uint16(8) | e4m3(low).astype(np.uint16)


def e4m3(bits: Array) -> Array:
    """Returns the bits of fp32 numbers in e4m3, rounded to nearest even; numbers beyond its range become its largest one."""
    v = bits.view(np.float32)
    size = np.minimum(np.abs(v), np.float32(448))
    _, exponent = np.frexp(size)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 4, -9))  # between neighbours: 4 digits, or those of the smallest
    nearest = np.rint(size / step) * step
    code = np.searchsorted(E4M3[:127], nearest).astype(np.uint8)
    return np.where(np.isnan(v), np.uint8(0x7F), code) | (bits >> np.uint32(24) & np.uint32(0x80)).astype(np.uint8)


@form("cvt.{rna,rn}.tf32.f32")
def to_tf32(c: Code, how: str) -> None:
    c.write(0, c.call(tf32, c.read(1, "u32"), str(how == "rn")), "u32")


def tf32(bits: Array, even: bool) -> Array:
    """Returns fp32 numbers rounded to ten bits of fraction: nearest, ties to even or away from zero."""
    up = np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1)) if even else np.uint32(0x1000)
    rounded = bits + up & np.uint32(0xFFFFE000)
    special = bits & np.uint32(0x7F800000) == np.uint32(0x7F800000)
    return np.where(special, bits, rounded)
