"""Jumps, barriers, fences, and the end of a kernel."""

from __future__ import annotations

from simulator.parser import DONE, Symbol
from simulator.strands import NAMED_BARRIERS
from simulator.translator import Code, form


@form("bra{,.uni}")
def jump(c: Code, _: str) -> None:
    target = c.target(0)
    if c.instruction.guard is None:
        c.emit(f"return {target}")
        return
    c.emit(f"return m.branch({c.line}, {c.guard}, {target}, {c.block + 1}, {c.translation.failing(target, c.block + 1)})")


@form("brx.idx{,.uni}")
def jump_through_table(c: Code, _: str) -> None:
    c.emit(f"return m.select({c.line}, {c.read(0, 'b32')}, {c.targets(1)})")


@form("ret")
def leave(c: Code) -> None:
    c.emit(f"m.leave({c.line})")
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


@form("{bar.sync,barrier.sync,barrier.sync.aligned}")
def barrier(c: Code, _: str) -> None:
    """Which of the 16 barriers, and of how many threads it is; by default of all."""
    number, threads = c.integer(0), c.integer(1) if len(c.operands) > 1 else None
    if not 0 <= number < NAMED_BARRIERS or (threads is not None and (threads % 32 or threads <= 0)):
        raise c.unsupported(f"operands {number}, {threads}")
    c.emit(f"m.barrier({c.line}, {number}, {threads}, {c.guard})")


@form("setmaxnreg.{inc,dec}.sync.aligned.u32")
def allot(c: Code, _: str) -> None:
    count = c.integer(0)
    if count % 8 or not 24 <= count <= 256:
        raise c.unsupported(f"{count} registers")
    c.emit(f"m.allot({c.line}, {count})")


@form("bar.warp.sync")
def warp_barrier(c: Code) -> None:
    c.emit(f"m.whole_warps({c.line}, {c.read(0, 'b32')})")
    c.emit("m.shared.races.warp_barrier(m.warps)")


@form("fence.proxy.async{,.shared::cta}")
def proxy_fence(c: Code, _: str) -> None:
    c.emit("m.shared.races.proxy_fence(m.warps)")


@form("griddepcontrol.{wait,launch_dependents}")
def grid_dependency(c: Code, _: str) -> None:
    """Launches run one after another. Whether a dependent one waits in time, dependents.py finds."""
