"""Registers that nothing wrote: found in the PTX itself, where a way leads to an instruction that does not write what it reads.

A guarded instruction counts as a write: compilers guard a load, and set its register before or look at it under the same
guard. LLVM packs three bytes into a register with a fourth that nothing ever writes, and then puts another in its place: such a
register may be a source of prmt. Its bits are the simulator's poison, so that a byte that is used after all shows as NaN.
"""

from __future__ import annotations

from simulator.errors import Fault
from simulator.loops import successors
from simulator.parser import Address, Immediate, Instruction, Kernel, names

READERS = ("bar.", "bra", "brx.", "call.", "cp.async.", "st.", "stmatrix.")  # opcodes that write no register


def fault(kernel: Kernel) -> Fault | None:
    """Returns the fault of an instruction that may read a register which nothing wrote; None if none does."""
    after = successors(kernel)
    before: list[set[str] | None] = [set(), *[None] * (len(kernel.blocks) - 1)]  # what every way to a block writes
    waiting = [0]
    while waiting:
        n = waiting.pop()
        known = before[n]
        assert known is not None
        end = known.union(*map(_written, kernel.blocks[n].code))
        for following in after[n]:
            there = before[following]
            if there is None or not there <= end:
                before[following] = end if there is None else there & end
                waiting.append(following)
    ever = {name for block in kernel.blocks for i in block.code for name in _written(i)}
    for block, known in zip(kernel.blocks, before, strict=True):
        if known is None:  # no way leads there
            continue
        written = set(known)
        for i in block.code:
            lacking = _read(i) - written
            if i.opcode.startswith("prmt."):
                lacking &= ever
            if lacking:
                return Fault(f"reads register {min(lacking)}, which nothing wrote on a way to here", kernel.place(i.line))
            written |= _written(i)
    return None


def _written(i: Instruction) -> set[str]:
    if not i.operands or i.opcode.startswith(READERS) or isinstance(i.operands[0], Address):
        return set()
    return set(names(i.operands[:1]))


def _read(i: Instruction) -> set[str]:
    found = set(names(i.operands[1 if _written(i) else 0 :]))
    if i.opcode.startswith("wgmma.mma_async") and i.operands[3] != Immediate("0"):  # it adds to its accumulators
        found.update(names(i.operands[:1]))
    if i.guard is not None:
        found.add(i.guard.name)
    return found
