"""Registers that wgmma still works on: found in the PTX itself, for all ways through a kernel, before it runs.

wgmma returns before its products are there. Until its group is waited for, nothing may touch its accumulators, and nothing
may change the registers that hold its operand a. Before it, a `wgmma.fence` must order whatever else touched these registers.
Copies are excepted: where a loop begins anew, compilers move accumulators from one register to another, which ptxas makes one.
A copy takes its source's state over.
"""

from __future__ import annotations

from simulator.errors import Fault
from simulator.loops import successors
from simulator.parser import Address, Instruction, Kernel, Register, Vector, names

OLDEST = 8  # groups that are told apart: wgmma.wait_group leaves at most 7
Ages = dict[str, int]  # register: groups that were committed since the wgmma that works on it, itself included


class _State:
    """What is known of registers at a point of the kernel, whichever way led there.

    Attributes:
        sums: accumulators of products under way, with their ages.
        factors: registers of operands of products under way.
        touched: registers that something touched since the last wgmma.fence; None before the first one: all.
    """

    def __init__(self) -> None:
        self.sums: Ages = {}
        self.factors: Ages = {}
        self.touched: set[str] | None = None

    def copy(self) -> _State:
        new = _State()
        new.sums, new.factors = dict(self.sums), dict(self.factors)
        new.touched = None if self.touched is None else set(self.touched)
        return new

    def join(self, other: _State) -> bool:
        """Takes up what holds on another way to the same point. Returns whether that is news."""
        news = False
        for mine, theirs in ((self.sums, other.sums), (self.factors, other.factors)):
            for register, age in theirs.items():
                if mine.get(register, OLDEST + 1) > age:
                    mine[register], news = age, True
        if self.touched is not None:
            if other.touched is None:
                self.touched, news = None, True
            elif not other.touched <= self.touched:
                self.touched |= other.touched
                news = True
        return news


def fault(kernel: Kernel) -> Fault | None:
    """Returns the fault of a register that is touched while wgmma may work on it, or the other way round; None if none is."""
    if not any(i.opcode.startswith("wgmma.mma_async") for block in kernel.blocks for i in block.code):
        return None
    after = successors(kernel)
    before: list[_State | None] = [_State(), *[None] * (len(kernel.blocks) - 1)]
    waiting = [0]
    while waiting:
        n = waiting.pop()
        known = before[n]
        assert known is not None
        state = known.copy()
        for i in kernel.blocks[n].code:
            problem = _step(state, i)
            if problem:
                return Fault(problem, kernel.place(i.line))
        for following in after[n]:
            there = before[following]
            if there is None:
                before[following] = state.copy()
                waiting.append(following)
            elif there.join(state):
                waiting.append(following)
    return None


def _step(state: _State, i: Instruction) -> str | None:
    """Takes an instruction into account. Returns what is wrong with it, if anything."""
    if i.opcode.startswith("wgmma.mma_async"):
        return _product(state, i)
    if i.opcode.startswith("wgmma.fence"):
        state.touched = set()
    elif i.opcode.startswith("wgmma.commit_group"):
        for ages in (state.sums, state.factors):
            ages.update({register: min(age + 1, OLDEST) for register, age in ages.items()})
    elif i.opcode.startswith("wgmma.wait_group"):
        left = int(getattr(i.operands[0], "text", "0"))
        for ages in (state.sums, state.factors):
            for register in [r for r, age in ages.items() if age > left]:
                del ages[register]
    elif i.opcode.startswith("mov.") and i.guard is None and all(isinstance(o, Register) for o in i.operands):
        to, source = (o.name for o in i.operands if isinstance(o, Register))
        under_way = state.sums.keys() | state.factors.keys()
        if to in under_way and source not in under_way:
            return f"writes register {to}, which products that were not waited for use"
        for ages in (state.sums, state.factors):
            ages.pop(to, None)
            if source in ages:
                ages[to] = ages[source]
        if state.touched is not None:
            state.touched.discard(to)
            if source in state.touched:
                state.touched.add(to)
    else:
        return _other(state, i)
    return None


def _product(state: _State, i: Instruction) -> str | None:
    sums, factors = list(names(i.operands[:1])), list(names(i.operands[1:2])) if isinstance(i.operands[1], Vector) else []
    for register in (*sums, *factors):
        if state.touched is None or register in state.touched:
            return f"wgmma uses register {register}, which something else touched without a wgmma.fence since"
    for register in factors:
        if register in state.sums:
            return f"wgmma uses register {register}, an accumulator of products that were not waited for"
    state.sums.update(dict.fromkeys(sums, 0))
    state.factors.update(dict.fromkeys(factors, 0))
    return None


def _other(state: _State, i: Instruction) -> str | None:
    touched = {*names(i.operands), *([i.guard.name] if i.guard else [])}
    if touched & state.sums.keys():
        return f"touches register {min(touched & state.sums.keys())}, an accumulator of products that were not waited for"
    written = set(names(i.operands[:1])) if i.operands and not isinstance(i.operands[0], Address) else set()
    if written & state.factors.keys():
        return f"writes register {min(written & state.factors.keys())}, which products that were not waited for read"
    if state.touched is not None:
        state.touched |= touched
    return None
