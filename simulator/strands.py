"""Programs whose warps take different ways, as with warp specialisation: producers, consumers, and what they wait for.

A strand is a run of neighbouring warps that go the same way. From the branch at which the warps of a program part, its strands
run by turns, in an order that the seed of `Options` chooses, and each until it must wait: at a named barrier, at an mbarrier,
or for registers. If all that are left wait, that is a deadlock, and a fault which says for what.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import Array
from simulator.parser import DONE

if TYPE_CHECKING:
    from simulator.machine import Machine
    from simulator.translator import Translation

NAMED_BARRIERS = 16
TURN = 8  # basic blocks that a strand runs before another one may, on average


@dataclass(frozen=True)
class Wait:
    """What a strand waits for.

    Attributes:
        ready: whether it can go on; what it waited for is then its own.
        what: what is missing.
        lane, address: of the fault, should it wait for ever.
    """

    line: int
    ready: Callable[[], bool]
    what: Callable[[], str]
    lane: int = 0
    address: str | None = None


@dataclass
class Strand:
    """Warps that go the same way: their machine and registers, and the basic block that they run next."""

    machine: Machine
    registers: list[Array]
    block: int


class NamedBarrier:
    """A barrier of a program: how many threads it is of, and the warps that have come since it last opened."""

    def __init__(self) -> None:
        self.threads = 0
        self.warps: list[int] = []
        self.openings = 0


class Team:
    """The strands of one program.

    Attributes:
        spare: registers that no warp holds. A kernel is launched with .maxnreg per thread; setmaxnreg gives and takes.
    """

    def __init__(self, m: Machine) -> None:
        self.warps = m.W
        self.barriers = [NamedBarrier() for _ in range(NAMED_BARRIERS)]
        self.held = np.full(m.W, m.registers)
        self.spare = (m.kernel.registers_per_thread - m.registers) * m.W
        self.random = np.random.default_rng([m.options.seed, int(m.programs[0])])
        self.left: list[Array] = []  # warps that are done

    # --- what strands wait for ---

    def meet(self, m: Machine, line: int, number: int, threads: int | None) -> None:
        """These warps come to a barrier of so many threads, by default of all of the program."""
        barrier, expected = self.barriers[number], threads or 32 * self.warps
        if barrier.warps and barrier.threads != expected:
            what = f"comes to barrier {number} of {expected} threads, to which others came as one of {barrier.threads};"
            m.fault(line, what, 0)
        barrier.threads = expected
        barrier.warps += m.warps.tolist()
        if 32 * len(barrier.warps) > expected:
            m.fault(line, f"{32 * len(barrier.warps)} threads come to barrier {number} of {expected};", 0)
        if 32 * len(barrier.warps) == expected:
            m.shared.races.barrier(np.array(barrier.warps))
            barrier.warps = []
            barrier.openings += 1
            return
        openings = barrier.openings

        def missing() -> str:
            return (
                f"waits for ever: {expected - 32 * len(barrier.warps)} threads are missing at barrier {number} of {expected};"
            )

        m.wait(line, lambda: barrier.openings > openings, missing)

    def allot(self, m: Machine, line: int, registers: int) -> None:
        """setmaxnreg: gives registers back, or waits until there are enough for these warps to have so many each."""

        def ready() -> bool:
            more = int((registers - self.held[m.warps]).sum())
            if more > self.spare:
                return False
            self.spare -= more
            self.held[m.warps] = registers
            return True

        if not ready():
            m.wait(line, ready, lambda: f"waits for ever for {registers} registers per thread: {32 * self.spare} are left;")

    def are_last(self, warps: Array) -> bool:
        """Returns whether all other warps are done."""
        return sum(done.size for done in self.left) + warps.size == self.warps

    # --- by turns ---

    def run(self, strands: Sequence[Strand], translation: Translation, steps: int) -> None:
        """Runs strands to their ends.

        Args:
            steps: basic blocks that may run, all strands together.
        """
        functions, lines = translation.functions, translation.lines
        going = list(strands)
        while going:
            runnable = [s for s in going if s.machine.waiting is None or s.machine.waiting.ready()]
            if not runnable:
                self._deadlock(going)
            s = runnable[self.random.integers(len(runnable))]
            s.machine.waiting = None
            for _ in range(self.random.geometric(1 / TURN)):
                steps -= 1
                if steps < 0:
                    s.machine.stopped(lines[s.block])
                to = s.machine.step(functions[s.block], s.block, s.registers)
                if isinstance(to, np.ndarray):
                    going.remove(s)
                    going += cut(s.machine, s.registers, to[0], self, lines[s.block])
                    break
                s.block = to
                if to == DONE:
                    self.left.append(s.machine.warps)
                    going.remove(s)
                    break
                if s.machine.waiting is not None:
                    break

    def _deadlock(self, going: Sequence[Strand]) -> None:
        """Raises the fault of the first strand, with what all others are at."""
        first, *others = going
        wait = first.machine.waiting
        assert wait is not None
        told = [f"{_names(warps)} are done" for warps in self.left]
        for other in others:
            w = other.machine.waiting
            assert w is not None
            place = other.machine.kernel.place(w.line)
            told.append(f"{_names(other.machine.warps)}, at PTX line {w.line} ({place.source}), {w.what().rstrip(';')}")
        more = f" ({_names(first.machine.warps)}; {'; '.join(told)})" if told else ""
        first.machine.fault(wait.line, f"{wait.what().rstrip(';')}{more};", wait.lane, wait.address)


def cut(m: Machine, registers: Sequence[Array], blocks: Array, team: Team, line: int) -> list[Strand]:
    """Cuts one program into strands, neighbours that go on with the same block.

    Args:
        blocks: which one each warp goes on with.
    """
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), m.W]
    strands = []
    for first, end in itertools.pairwise(edges):
        mine = slice(32 * first, 32 * end)
        own = [a[:, mine] if a.shape[1] > 1 else a for a in registers]
        strands.append(Strand(m.strand(line, m.warps[first:end], team), own, int(blocks[first])))
    return strands


def _names(warps: Array) -> str:
    return f"warp {warps[0]}" if warps.size == 1 else f"warps {warps[0]} to {warps[-1]}"
