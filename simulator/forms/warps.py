"""Exchanges between the threads of a warp. A warp takes part as a whole, or is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
from simulator.parser import Immediate, Pair
from simulator.translator import Code, form

if TYPE_CHECKING:
    from simulator.machine import Machine

LANES = np.arange(32)


def _whole_warp(c: Code, mask: int) -> None:
    operand = c.operands[mask]
    if isinstance(operand, Immediate):
        if c.integer(operand) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise c.unsupported("a part of a warp")
    else:
        c.emit(f"m.whole_warps({c.line}, {c.read(operand, 'b32')})")


@form("shfl.sync.{bfly,idx,up,down}.b32")
def shuffle(c: Code, mode: str) -> None:
    _whole_warp(c, 4)
    target = c.operands[0]
    source, lane, clamp = c.read(1, "b32"), c.read(2, "b32"), c.read(3, "b32")
    c.emit(f"data, inside = {c.call(shuffled, 'm', repr(mode), source, lane, clamp)}")
    if isinstance(target, Pair):
        c.write(target.second, "inside", "pred")
        target = target.first
    c.write(target, "data", "b32")


def shuffled(m: Machine, mode: str, a: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """Returns each thread's value from another lane of its segment, its own where there is none; and where there was one.

    `clamp` holds the last lane of a segment, for "up" its first, and above 8 bits the mask of a segment's number.
    """
    lane = LANES if by.size == 1 and clamp.size == 1 else m.lane
    segment, last = clamp >> 8 & 31, clamp & 31
    first_lane = lane & segment
    limit = first_lane | (last & ~segment)
    if mode == "up":
        source = lane - by
        inside = source >= limit
    else:
        source = {"down": lane + by, "bfly": lane ^ by, "idx": first_lane | (by & ~segment & 31)}[mode]
        inside = source <= limit
    source = np.where(inside, source, lane)
    if a.shape[1] == 1:
        return a, np.broadcast_to(inside, m.shape) if inside.shape[1] > 32 else np.tile(inside, (1, m.W))
    rows = max(a.shape[0], source.shape[0] if source.shape[1] > 32 else 1)
    v = np.broadcast_to(a, (rows, m.T)).reshape(rows, m.W, 32)
    if source.shape[1] == 32:  # the same for all warps
        return v[:, :, source[0]].reshape(rows, m.T), np.tile(inside, (1, m.W))
    at = np.broadcast_to(source, (rows, m.T)).reshape(rows, m.W, 32)
    return np.take_along_axis(v, at, 2).reshape(rows, m.T), inside


@form("redux.sync.{add,min,max}.{s32,u32}", "redux.sync.{and,or,xor}.{b32}")
def reduce(c: Code, op: str, kind: str) -> None:
    _whole_warp(c, 2)
    f = {"min": np.minimum, "max": np.maximum, "add": np.add}.get(op) or getattr(np, f"bitwise_{op}")
    c.write(0, c.call(reduced, "m", c.read(1, kind), c.name(f)), kind)


def reduced(m: Machine, a: Array, f: np.ufunc) -> Array:
    v = m.full(a).reshape(m.C, m.W, 32)
    return np.repeat(f.reduce(v, 2, dtype=a.dtype), 32, 1)


@form("vote.sync.{any,all}.{pred}", "vote.sync.{ballot}.{b32}")
def vote(c: Code, mode: str, kind: str) -> None:
    _whole_warp(c, 2)
    c.write(0, c.call(voted, "m", repr(mode), c.read(1, "pred")), kind)


def voted(m: Machine, mode: str, a: Array) -> Array:
    v = m.full(a).reshape(m.C, m.W, 32)
    if mode == "ballot":
        bits = np.where(v, np.uint32(1) << LANES.astype(np.uint32), np.uint32(0))
        return np.repeat(np.bitwise_or.reduce(bits, 2).view(np.int32), 32, 1)
    return np.repeat((np.any if mode == "any" else np.all)(v, 2), 32, 1)


@form("elect.sync")
def elect(c: Code) -> None:
    """Any thread may be chosen, says PTX: the first one is."""
    _whole_warp(c, 1)
    target = c.operands[0]
    if not isinstance(target, Pair):
        raise c.unsupported(f"operand {target}")
    c.write(target.first, c.constant(0, np.int32), "b32")
    c.write(target.second, f"m.lane == {c.constant(0, np.int32)}", "pred")
