"""Registers copied, packed, chosen between; parameters and addresses."""

from __future__ import annotations

import numpy as np

from simulator.arrays import STORED, TYPES, Array, integer
from simulator.global_memory import PARAMETERS, TAG
from simulator.parser import Address, Symbol, Vector
from simulator.translator import Code, form


@form("mov.{pred,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}")
def move(c: Code, kind: str) -> None:
    target, source = c.operands
    plain = "pred" if kind == "pred" else "b" + kind[1:]
    if isinstance(source, Vector):
        low, high = source.parts
        half = HALVES[plain]
        c.write(target, c.call(packed, c.read(low, half), c.read(high, half)), "u" + kind[1:])
    elif isinstance(target, Vector):
        for part, shift in zip(target.parts, (0, int(plain[1:]) // 2), strict=True):
            if part != Symbol("_"):
                half = f"{c.read(source, 'u' + plain[1:])} >> {c.constant(shift, TYPES['u' + plain[1:]].dtype)}"
                c.write(part, f"({half}).astype({c.name(TYPES[HALVES[plain]].dtype)})", HALVES[plain])
    else:
        c.write(target, c.read(source, plain), plain)


HALVES = {"b32": "u16", "b64": "u32"}


def packed(low: Array, high: Array) -> Array:
    wide = np.dtype(f"u{2 * low.dtype.itemsize}").type
    return low.astype(wide) | high.astype(wide) << wide(8 * low.dtype.itemsize)


@form("selp.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}")
def select(c: Code, kind: str) -> None:
    kind = "b" + kind[1:]
    c.write(0, c.call(np.where, c.read(3, "pred"), c.read(1, kind), c.read(2, kind)), kind)


@form("cvta{,.to}.{global,param}.u64")
def generic_address(c: Code, to: str, space: str) -> None:
    """Generic addresses of global memory are the addresses themselves. Those of parameters have the parameters' tag, which is
    lost where their own addresses are 32 bits wide. (Of shared memory they are not known: nothing here reads through those.)"""
    tag = c.constant(PARAMETERS << TAG, np.int64)
    c.write(0, f"{c.read(1, 'b64')} | {tag}" if space == "param" and not to else c.read(1, "b64"), "b64")


@form("ld.param.{u8,s8,b8,u16,s16,b16,u32,s32,b32,f32,u64,s64,b64,f64}")
def load_parameter(c: Code, kind: str) -> None:
    address = c.operands[1]
    number = c.parameter(address.base) if isinstance(address, Address) and not address.offset else None
    if number is None or c.translation.kernel.parameters[number].size:
        raise c.unsupported(f"operand {address}")
    register = c.kind(c.operands[0])
    held = f"{'s' if kind[0] == 's' else 'u'}{8 * STORED[register]().itemsize}"
    narrow, wide = c.name(integer(kind)), c.name(TYPES[held].dtype)
    c.write(0, f"m.parameter({number}, {narrow}).astype({wide})", held)
