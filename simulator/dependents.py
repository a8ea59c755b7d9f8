"""Kernels that may be launched before the one before them has ended: found in the PTX itself, whether they wait in time.

Such a kernel (programmatic dependent launch) runs beside what its predecessor still does. It must not read or write global
memory before `griddepcontrol.wait`, and must not end without it: the kernel behind it waits for this one only, not for what
came before.
"""

from __future__ import annotations

from simulator.errors import Fault
from simulator.loops import successors
from simulator.parser import Instruction, Kernel

WAIT = "griddepcontrol.wait"
ENDS = ("ret", "exit")
# Opcodes that touch memory, and the spaces that are a program's own or hold its parameters.
TOUCHES = ("ld.", "st.", "atom.", "red.", "cp.async.", "prefetch", "applypriority", "discard", "tensormap.")
OWN = (".param", ".shared.", ".shared::cta.", ".local", ".const", ".commit_group", ".wait_group", ".wait_all", ".mbarrier")


def fault(kernel: Kernel) -> Fault | None:
    """Returns the fault of an instruction on a way without a wait before it; None if every way waits first."""
    after, waiting, seen = successors(kernel), [0], {0}
    while waiting:
        n = waiting.pop()
        for i in kernel.blocks[n].code:
            if i.opcode == WAIT and i.guard is None:
                break
            if i.opcode in ENDS:
                return Fault("the kernel may end without a griddepcontrol.wait, as a dependent launch", kernel.place(i.line))
            if _outside(i):
                text = "touches global memory before griddepcontrol.wait, as a dependent launch"
                return Fault(f"{i.opcode} {text}", kernel.place(i.line))
        else:
            new = set(after[n]) - seen
            seen |= new
            waiting += new
    return None


def _outside(i: Instruction) -> bool:
    """Returns whether an instruction may touch memory that other programs can reach."""
    return i.opcode.startswith(TOUCHES) and (".global" in i.opcode or not any(space in i.opcode for space in OWN))
