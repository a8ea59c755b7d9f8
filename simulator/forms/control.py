"""Jumps, barriers, fences, and the end of a kernel."""

from __future__ import annotations

from simulator.parser import Symbol
from simulator.translator import DONE, Code, form


@form("bra{,.uni}")
def jump(c: Code, _: str) -> None:
    target, guard = c.target(0), c.instruction.guard
    if guard is None:
        c.emit(f"return {target}")
        return
    c.guarded = True
    c.emit(f"to = m.branch({c.line}, {c.register(guard)}, {c.instruction.negated})")
    c.emit(f"if to is True: return {target}")
    c.emit(f"if to is not False: return to, {target}, {c.block + 1}")


@form("ret")
def leave(c: Code) -> None:
    c.emit(f"return {DONE}")


@form("trap")
def trap(c: Code) -> None:
    c.emit(f"m.trap({c.line}, 'the kernel traps')")


@form("call.uni")
def call(c: Code) -> None:
    """Kernels call nothing but what fails their own assertions."""
    if c.operands[0] != Symbol("__assertfail"):
        raise c.unsupported(f"a call of {c.operands[0]}")
    c.emit(f"m.trap({c.line}, 'an assertion of the kernel fails')")


@form("st.param.{b32,b64}")
def pass_argument(c: Code, _: str) -> None:
    """Of a call, which here only fails an assertion."""


@form("bar.sync")
def barrier(c: Code) -> None:
    if len(c.operands) > 1 or c.integer(0) != 0:
        raise c.unsupported("a barrier of some of the warps")
    c.emit("m.shared.races.block_barrier()")


@form("bar.warp.sync")
def warp_barrier(c: Code) -> None:
    c.emit(f"m.whole_warps({c.line}, {c.read(0, 'b32')})")
    c.emit("m.shared.races.warp_barrier()")


@form("fence.proxy.async{,.shared::cta}")
def proxy_fence(c: Code, _: str) -> None:
    c.emit("m.shared.races.proxy_fence()")


@form("griddepcontrol.{wait,launch_dependents}")
def grid_dependency(c: Code, _: str) -> None:
    """Launches run one after another."""
