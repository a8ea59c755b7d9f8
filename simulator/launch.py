"""Runs a kernel's PTX over a grid, on tensors of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from simulator import accumulators, dependents, forms, unwritten  # noqa: F401 - forms registers what is known
from simulator.arrays import LOADED, Array, single
from simulator.counters import tally
from simulator.errors import Fault, Unsupported
from simulator.global_memory import GlobalMemory
from simulator.machine import Machine
from simulator.options import DEFAULT, Options
from simulator.parser import DONE, parse
from simulator.strands import Team, cut
from simulator.tensor_maps import TensorMap
from simulator.translator import Translation

LARGEST_BATCH = 1 << 22  # bytes of shared memory of programs that run at once

Argument = int | torch.Tensor | TensorMap


class Program:
    """A kernel that is ready to run.

    Attributes:
        fault: what is wrong with it whatever it runs on; None if nothing is.
        early: what is wrong with it as a dependent launch; None if nothing is.
        launches: how often any kernel ran.
    """

    launches: ClassVar[int] = 0

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.kernel = parse(ptx)
        try:
            self.translation = Translation(self.kernel)
        except Unsupported as e:
            raise Unsupported(f"PTX {self.kernel.version} for {self.kernel.target}: {e}") from None
        self.fault = accumulators.fault(self.kernel) or unwritten.fault(self.kernel)
        self.early = dependents.fault(self.kernel)
        self.kernel.blocks.clear()  # hundreds of programs are kept, and this would be most of what they take
        self.shared_bytes = shared_bytes

    def run(
        self,
        grid: tuple[int, int, int],
        memory: GlobalMemory,
        arguments: Sequence[int | TensorMap],
        options: Options,
        dependent: bool = False,
    ) -> None:
        """Runs all programs of a grid.

        Args:
            arguments: one per parameter: bits of a number, or an address as `memory` gives it, or a tensor map.
            dependent: whether it is a dependent launch, which may begin before the kernel before it has ended.

        Raises:
            Fault: a program does what hardware would punish or PTX does not define, or does not end.
        """
        Program.launches += 1
        if found := self.fault or (self.early if dependent else None):
            raise found
        values, maps = self._parameters(arguments)
        granule = memory.granule = min(self.translation.granule, *(t.size for t in maps.values()), 16)
        count = grid[0] * grid[1] * grid[2]
        batch = min(options.threads_at_once // self.kernel.threads, LARGEST_BATCH // max(self.shared_bytes, 1))
        batch = max(batch, 1)
        counted = tally(self.kernel, self.shared_bytes, memory)
        with np.errstate(all="ignore"):
            for first in range(0, count, batch):
                programs = np.arange(first, min(count, first + batch))
                m = Machine(self.kernel, memory, programs, grid, self.shared_bytes, values, maps, granule, options)
                m.tally = counted
                self._run(m, options.max_steps)
        if counted:
            counted.end(count)

    def _run(self, m: Machine, max_steps: int) -> None:
        """Runs a batch to its end, in the parts into which its branches cut it."""
        functions, lines = self.translation.functions, self.translation.lines
        waiting = [(m, self.translation.registers(), 0, 0)]
        while waiting:
            m, registers, block, steps = waiting.pop()
            while block != DONE:
                steps += 1
                if steps > max_steps:
                    m.stopped(lines[block])
                to = m.step(functions[block], block, registers)
                if not isinstance(to, np.ndarray):
                    block = to
                    continue
                agree = (to == to[:, :1]).all(1)
                for row in np.flatnonzero(~agree):
                    one, own = _some(m, registers, np.array([row]))
                    team = Team(one)
                    team.run(cut(one, own, to[row], team, lines[block]), self.translation, max_steps - steps)
                for block in np.unique(to[agree, 0]):
                    waiting.append((*_some(m, registers, np.flatnonzero(agree & (to[:, 0] == block))), int(block), steps))
                break

    def _parameters(self, arguments: Sequence[int | TensorMap]) -> tuple[list[Array | None], dict[int, TensorMap]]:
        parameters = self.kernel.parameters
        if len(arguments) != len(parameters):
            raise Unsupported(f"{len(arguments)} arguments for the {len(parameters)} parameters of {self.kernel.name}")
        values: list[Array | None] = []
        maps = {}
        for i, (parameter, value) in enumerate(zip(parameters, arguments, strict=True)):
            if isinstance(value, TensorMap) != bool(parameter.size):
                raise Unsupported(f"{value} for parameter {parameter.name} of {self.kernel.name}, of type {parameter.type}")
            if isinstance(value, TensorMap):
                values.append(None)
                maps[i] = value
            else:
                values.append(single(value, LOADED[int(parameter.type[1:]) // 8]))
        return values, maps


def _some(m: Machine, registers: list[Array], programs: Array) -> tuple[Machine, list[Array]]:
    """Returns the machine and registers of some of a batch's programs."""
    return m.part(programs), [a[programs] if a.shape[0] == m.C > 1 else a for a in registers]


def run(
    ptx: str, grid: tuple[int, ...], arguments: Sequence[Argument], shared_bytes: int = 0, options: Options = DEFAULT
) -> None:
    """Runs a kernel once: tensors are passed as their addresses, integers as they are.

    Args:
        ptx: the text of a module with one kernel.
        grid: programs in up to three dimensions.
        arguments: one per parameter of the kernel.
        shared_bytes: dynamic shared memory of a program.

    Raises:
        Unsupported: something in the PTX is not known.
        Fault: see `Program.run`.
    """
    program = Program(ptx, shared_bytes)
    memory = GlobalMemory()
    given = [memory.pointer(a, f"argument {i}") if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)]
    x, y, z = (*grid, 1, 1)[:3]
    program.run((x, y, z), memory, given, options)


__all__ = ["Fault", "Program", "run"]
