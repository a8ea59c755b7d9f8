"""Which part of a multiprocessor executes an instruction, what it waits for, and how much it multiplies."""

from __future__ import annotations

import functools
import re

from simulator.parser import Instruction, Vector

FLOATS = "(f32|f16|f16x2|bf16|bf16x2)"
PIPES = {  # pipe: its opcodes; the first that fits counts
    "tensor": r"mma\.|wgmma\.mma_async\.",
    "boxes": r"cp\.async\.bulk\.tensor\.",
    "wait": r"bar\.|barrier\.|setmaxnreg\.|mbarrier\.|fence\.|wgmma\.|cp\.async\.(bulk\.)?(commit|wait)_|griddepcontrol\.",
    "global": r"(ld|st)\.global\.|cp\.async\.c[ag]\.",
    "shared": r"(ld|st)\.shared[.:]|(ld|st)matrix\.",
    "warp": r"(shfl|redux|vote|elect)\.",
    "control": r"(bra|brx|ret|trap|call)(\.|$)|st\.param\.",
    "move": r"mov\.|cvta\.|ld\.param\.",
    "convert": r"cvt\.",
    "special": r"(div|rem|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\.",
    "fp64": r"(add|sub|mul|fma|min|max|abs|neg|setp|copysign|testp)\.(.*\.)?f64$",
    "fma": rf"(add|sub|mul|fma)\.(.*\.)?{FLOATS}$",
    "integer": (
        r"(abs|add|and|bfe|bfi|brev|clz|cnot|copysign|lop3|mad|max|min|mul|neg|not|or|popc|prmt|selp|setp|shf|shl|shr|sub"
        r"|testp|xor)\."
    ),
}
WAITS = {  # what is waited for: opcodes
    "barriers": r"(bar|barrier)\.sync",
    "barriers of a warp": r"bar\.warp\.sync",
    "mbarriers": r"mbarrier\.try_wait",
    "groups of cp.async": r"cp\.async\.wait_",
    "groups of wgmma": r"wgmma\.wait_group",
    "groups of stored boxes": r"cp\.async\.bulk\.wait_group",
}


@functools.cache
def pipe(opcode: str) -> str:
    """Returns the part of a multiprocessor that executes an instruction, one of PIPES."""
    return next(name for name, pattern in PIPES.items() if re.match(pattern, opcode))


@functools.cache
def waits_for(opcode: str) -> str | None:
    """Returns what an instruction waits for, one of WAITS, or None."""
    return next((name for name, pattern in WAITS.items() if re.match(pattern, opcode)), None)


def operations(i: Instruction) -> float:
    """Returns the operations of a product by one warp, two per multiply-add: of tensor cores and of fma.

    Four warps do a wgmma, so a quarter of it counts for each.
    """
    if shape := _wgmma(i.opcode):
        n, k, _ = shape
        return 2 * 16 * n * k
    if found := re.match(r"mma\.sync\.aligned\.m(\d+)n8k(\d+)", i.opcode):
        return 2 * int(found[1]) * 8 * int(found[2])
    if i.opcode.startswith("fma."):
        return 2 * 32 * (2 if i.opcode.endswith("x2") else 1)
    return 0


def wgmma_bytes(i: Instruction) -> float:
    """Returns the bytes of shared memory that wgmma reads, a quarter of them for each of the four warps; else 0."""
    shape = _wgmma(i.opcode)
    if not shape:
        return 0
    n, k, size = shape
    return (n + (0 if isinstance(i.operands[1], Vector) else 64)) * k * size / 4


@functools.cache
def _wgmma(opcode: str) -> tuple[int, int, int] | None:
    """Returns (n, k, bytes of an element of the operands) of a wgmma, None for other opcodes."""
    found = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)", opcode)
    return (int(found[1]), int(found[2]), {"e4m3": 1, "tf32": 4}.get(found[3], 2)) if found else None
