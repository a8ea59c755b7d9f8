"""Products of matrices by tensor cores: of a warp (mma.sync), and of four warps with operands in shared memory (wgmma)."""

from __future__ import annotations

from simulator.fragments import mma, multiply
from simulator.parser import Operand, Register, Vector
from simulator.translator import Code, form

COLUMNS = ",".join(str(n) for n in range(8, 257, 8))


@form(
    "mma.sync.aligned.{m16}n8k{16,8}.row.col.f32.{bf16.bf16,f16.f16}.{f32}",
    "mma.sync.aligned.{m16}n8k{8,4}.row.col.f32.{tf32.tf32}.{f32}",
    "mma.sync.aligned.{m8}n8k{4}.row.col.f64.{f64.f64}.{f64}",
    "mma.sync.aligned.{m16}n8k{4,8,16}.row.col.f64.{f64.f64}.{f64}",
)
def product(c: Code, rows: str, k: str, kinds: str, total: str) -> None:
    kind, m = kinds.split(".")[0], int(rows[1:])
    bits = {"f64": 64, "tf32": 32}.get(kind, 16)
    held = max(bits, 32)
    sizes = {0: m * 8 // 32, 1: m * int(k) * bits // 32 // held, 2: 8 * int(k) * bits // 32 // held, 3: m * 8 // 32}
    d, a, b, e = (_registers(c, i, n) for i, n in sizes.items())
    store = "b64" if total == "f64" else "b32"
    given = (f"({''.join(c.read(r, store) + ', ' for r in group)})" for group in (a, b, e))
    call = c.call(mma, "m", repr(kind), str(m), *given)
    c.emit(f"{''.join(c.register(r) + ', ' for r in d)}= {call}")


def _registers(c: Code, operand: int, count: int) -> tuple[Operand, ...]:
    found = c.vector(operand)
    if len(found) != count:
        raise c.unsupported(f"{len(found)} registers where {count} belong")
    return found


@form(
    f"wgmma.mma_async.sync.aligned.m64n{{{COLUMNS}}}k{{32}}.f32.{{e4m3.e4m3}}",
    f"wgmma.mma_async.sync.aligned.m64n{{{COLUMNS}}}k{{16}}.f32.{{bf16.bf16,f16.f16}}",
    f"wgmma.mma_async.sync.aligned.m64n{{{COLUMNS}}}k{{8}}.f32.{{tf32.tf32}}",
)
def group_product(c: Code, n: str, k: str, kinds: str) -> None:
    """Operands: d, a (registers, or a descriptor), b's descriptor, scale-d, the signs of a and b, and for 16 bits whether
    those of a and b that lie in shared memory are transposed."""
    kind = kinds.split(".")[0]
    size = {"e4m3": 1, "tf32": 4}.get(kind, 2)
    in_registers = isinstance(c.operands[1], Vector)
    flags = [c.integer(i) for i in range(4, len(c.operands))]
    if len(flags) != 2 + (0 if size != 2 else 1 if in_registers else 2) or {*flags[:2]} - {1, -1}:
        raise c.unsupported(f"flags {flags}")
    transposed = [bool(flag) for flag in flags[2:]]
    transposed = [False] * (2 - len(transposed)) + transposed
    d = "".join(c.register(r) + ", " for r in _registers(c, 0, int(n) // 2))
    a = f"({''.join(c.read(r, 'b32') + ', ' for r in _registers(c, 1, 4))})" if in_registers else c.read(1, "b64")
    scale = c.read(3, "pred") if isinstance(c.operands[3], Register) else str(bool(c.integer(3)))
    c.translation.accesses(size)
    call = c.call(
        multiply, "m", str(c.line), n, k, repr(kind), f"({d})", a, c.read(2, "b64"), scale, str(flags[0] * flags[1]),
        str(tuple(transposed)),
    )  # fmt: skip
    c.emit(f"{d}= {call}")


@form("wgmma.fence.sync.aligned")
def order_registers(c: Code) -> None:
    """Products are made at once: there is nothing to order."""


@form("wgmma.commit_group.sync.aligned")
def commit(c: Code) -> None:
    c.emit("m.products.commit()")


@form("wgmma.wait_group.sync.aligned")
def wait(c: Code) -> None:
    c.emit(f"m.products.wait(m, {c.integer(0)})")
