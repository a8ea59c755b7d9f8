"""Loads, stores, and asynchronous copies of single threads; matrices of 16 bits that a warp loads and stores."""

from __future__ import annotations

import numpy as np

from simulator.arrays import LOADED, STORED, integer, single
from simulator.fragments import load_matrices, store_matrices
from simulator.translator import Code, form

STORE_HINTS = ",.L1::evict_first,.L1::evict_last,.L1::no_allocate"  # of caches: nothing that a result depends on
HINTS = STORE_HINTS + ",.nc"
NARROW, WIDE = "b8,u8,s8,b16,u16,s16,b32,u32,s32,f32", "b64,u64,s64,f64"  # of which 16 bytes hold four, or two


@form(
    f"{{ld.global}}{{{HINTS}}}{{,.v2,.v4}}.{{{NARROW}}}",
    f"{{ld.global}}{{{HINTS}}}{{,.v2}}.{{{WIDE}}}",
    f"{{ld.shared}}{{,::cta}}{{,.v2,.v4}}.{{{NARROW}}}",
    f"{{ld.shared}}{{,::cta}}{{,.v2}}.{{{WIDE}}}",
)
def load(c: Code, op: str, _: str, vector: str, kind: str) -> None:
    targets, space, size = c.vector(0), op[3:], int(kind[1:]) // 8
    _same_count(c, vector, len(targets))
    c.translation.accesses(size * len(targets))
    address = c.address(1, "b64" if space == "global" else "b32")
    held = [STORED[c.kind(t)]().itemsize for t in targets]
    if held == [size] * len(targets):
        registers = "".join(c.register(t) + ", " for t in targets)
        c.emit(f"{registers}= m.load({c.line}, {space!r}, {address}, {size}, {len(targets)}, {c.guard}, ({registers}))")
        return
    if min(held) < size:
        raise c.unsupported("a register that is too narrow")
    # Into wider registers, extended; other threads than the guard's keep what they have there.
    zeros = f"({c.name(single)}(0, {c.name(LOADED[size])}),) * {len(targets)}"
    c.emit(f"loaded = m.load({c.line}, {space!r}, {address}, {size}, {len(targets)}, {c.guard}, {zeros})")
    for i, (target, width) in enumerate(zip(targets, held, strict=True)):
        narrow, wide = c.name(integer(kind)), c.name(integer(kind, width))
        c.write(target, f"loaded[{i}].view({narrow}).astype({wide})", f"{'s' if kind[0] == 's' else 'u'}{8 * width}")


@form(
    f"{{st.global}}{{{STORE_HINTS}}}{{,.v2,.v4}}.{{{NARROW}}}",
    f"{{st.global}}{{{STORE_HINTS}}}{{,.v2}}.{{{WIDE}}}",
    f"{{st.shared}}{{,::cta}}{{,.v2,.v4}}.{{{NARROW}}}",
    f"{{st.shared}}{{,::cta}}{{,.v2}}.{{{WIDE}}}",
)
def store(c: Code, op: str, _: str, vector: str, kind: str) -> None:
    """The low bits of each register."""
    sources, space, size = c.vector(1), op[3:], int(kind[1:]) // 8
    _same_count(c, vector, len(sources))
    c.translation.accesses(size * len(sources))
    address = c.address(0, "b64" if space == "global" else "b32")
    if size == 1:
        values = [f"{c.read(s, 'b16', low=True)}.astype({c.name(np.uint8)})" for s in sources]
    else:
        values = [c.read(s, f"b{8 * size}", low=True) for s in sources]
    c.emit(f"m.store({c.line}, {space!r}, {address}, {size}, ({''.join(v + ', ' for v in values)}), {c.guard})")


def _same_count(c: Code, vector: str, count: int) -> None:
    if count != int(vector[2:] or 1):
        raise c.unsupported(f"{count} registers")


@form("cp.async.{ca,cg}.shared.global")
def copy(c: Code, _: str) -> None:
    """Of the bytes that are given as the third operand, the fourth says how many are read; the rest are zeros."""
    size = c.integer(2)
    if size not in (4, 8, 16):
        raise c.unsupported(f"{size} bytes")
    c.translation.accesses(size)
    given = c.read(3, "b32") if len(c.operands) > 3 else c.constant(size, np.int32)
    c.emit(f"m.copies.begin(m, {c.line}, {c.address(0, 'b32')}, {c.address(1, 'b64')}, {size}, {given}, {c.guard})")


@form("cp.async.commit_group")
def commit(c: Code) -> None:
    c.emit("m.copies.commit()")


@form("cp.async.wait_group")
def wait(c: Code) -> None:
    c.emit(f"m.copies.wait(m, {c.integer(0)})")


@form("cp.async.wait_all")
def wait_for_all(c: Code) -> None:
    c.emit("m.copies.commit()")
    c.emit("m.copies.wait(m, 0)")


@form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def load_matrix(c: Code, count: str, transposed: str, _: str) -> None:
    targets = c.vector(0)
    if len(targets) != int(count[1:]):
        raise c.unsupported(f"{len(targets)} registers")
    registers = "".join(c.register(t) + ", " for t in targets)
    call = c.call(load_matrices, "m", str(c.line), c.address(1, "b32"), str(len(targets)), str(bool(transposed)))
    c.emit(f"{registers}= {call}")


@form("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def store_matrix(c: Code, count: str, transposed: str, _: str) -> None:
    sources = c.vector(1)
    if len(sources) != int(count[1:]):
        raise c.unsupported(f"{len(sources)} registers")
    values = "".join(c.read(s, "b32") + ", " for s in sources)
    c.emit(c.call(store_matrices, "m", str(c.line), c.address(0, "b32"), f"({values})", str(bool(transposed))))
