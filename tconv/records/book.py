"""All lines of this process: the user's own record, those that were loaded, and those that come with the package."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tconv.planning.plan import Forced
from tconv.planning.tiles import Tile
from tconv.records import file
from tconv.records.file import Line
from tconv.records.key import OCTAVE, Cell, Machine, tuples

SHIPPED = pathlib.Path(__file__).parent
_set_aside: contextvars.ContextVar[bool] = contextvars.ContextVar("tconv_set_aside", default=False)
NEAR = OCTAVE  # how far apart a cell and one whose measurement it takes may be: an octave in images and pixels together


@dataclass(frozen=True)
class Measured:
    """What was measured of a pass.

    Attributes:
        plan: tconv's fastest plan, every choice given; None if none was right.
        seconds: its time; None without a plan.
        torch: the time of torch's own kernel; None if that failed.
        spread: the relative spread of the two times, as the larger distance of a quartile to the median.
        predicted: the planner's prediction of the plan, in seconds; None in the interpreter.
        guess: the time of the plan that the planner chose, in seconds; None if it was not timed.
        details: for whoever fits the cost model: "asked", the pass in full, and "times", the milliseconds of every candidate.
    """

    plan: Forced | None
    seconds: float | None
    torch: float | None
    spread: float = 0.0
    predicted: float | None = None
    guess: float | None = None
    details: Line = field(default_factory=dict, compare=False, repr=False)

    @property
    def torch_is_faster(self) -> bool:
        """True if torch's kernel was faster by more than the spread, or tconv has no plan that was right."""
        if self.torch is None:
            return False
        return self.seconds is None or self.torch * (1 + self.spread) < self.seconds

    def __str__(self) -> str:
        ours = "none of tconv's plans was right" if self.seconds is None else f"tconv {self.seconds * 1e6:.1f} us"
        return f"measured: {ours}" + ("" if self.torch is None else f", torch {self.torch * 1e6:.1f} us")


@dataclass
class _Lines:
    """The lines of one source.

    Attributes:
        measured: by machine and kind of cell, and then by cell.
        barred: plans that were wrong or failed, by machine and cell.
        mechanisms: by machine and mechanism, whether it works there.
    """

    measured: dict[Any, dict[Cell, Measured]] = field(default_factory=dict)
    barred: dict[Any, set[Forced]] = field(default_factory=dict)
    mechanisms: dict[tuple[Machine, str], bool] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Adds a line. One that is not understood is passed over: a newer version may write it, or a hand."""
        try:
            where = Machine(*(str(line[name]) for name in Machine.__dataclass_fields__))
            if "mechanism" in line:
                self.mechanisms[where, str(line["mechanism"])] = line["works"] is True
                return
            cell = Cell(tuples(line["kind"]), int(line["images"]), int(line["pixels"]))
            if "barred" in line:
                self.barred.setdefault((where, cell), set()).add(plan_from(line["barred"]))
            else:
                self.measured.setdefault((where, cell.kind), {})[cell] = _measured(line)
        except (KeyError, OverflowError, TypeError, ValueError):
            return

    def find(self, where: Machine, cell: Cell, anywhere: bool) -> tuple[Cell, Measured] | None:
        """Returns the measurement of the nearest cell, at most NEAR away.

        Args:
            where: the machine.
            cell: the cell.
            anywhere: whether one by another driver, torch or Triton counts; the GPU and the kernels must be the same.
        """
        found: dict[Cell, Measured] = {}
        if anywhere:
            for machine, kind in list(self.measured):  # a copy: another thread may add one
                if (machine.gpu, machine.kernels) == (where.gpu, where.kernels) and kind == cell.kind:
                    found |= self.measured[machine, kind]
        found |= self.measured.get((where, cell.kind), {})
        nearest = min(found, key=cell.distance, default=None)
        return None if nearest is None or cell.distance(nearest) > NEAR else (nearest, found[nearest])


class Book:
    """The records that this process knows.

    Args:
        path: the user's own record.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._own, self._loaded, self._shipped = _Lines(), _Lines(), _Lines()
        self._read(self._own, path)
        for shipped in sorted(SHIPPED.glob("*.jsonl")):
            self._read(self._shipped, shipped)

    @property
    def empty(self) -> bool:
        """True if nothing was measured that this process knows of."""
        return not any(lines.measured or lines.barred for lines in (self._own, self._loaded, self._shipped))

    @staticmethod
    def _read(lines: _Lines, path: pathlib.Path) -> None:
        try:
            for line in file.read(path):
                lines.add(line)
        except OSError:  # there is none yet, or it cannot be read: then nothing is known
            return

    def load(self, path: pathlib.Path) -> int:
        """Adds the lines of a file. Returns how many it has.

        Raises:
            OSError: the file cannot be read.
        """
        lines = [*file.read(path)]
        for line in lines:
            self._loaded.add(line)
        return len(lines)

    def add(self, lines: Iterable[Line], path: pathlib.Path | None = None) -> None:
        """Adds lines, and keeps them on disk: in the user's own record, or in another file."""
        lines = [*lines]
        for line in lines:
            self._own.add(line)
        if lines:
            file.append(path or self.path, lines)

    def find(self, where: Machine, cell: Cell) -> tuple[Cell, Measured] | None:
        """Returns the nearest cell that was measured, and what: by the user, else in loaded records, else in shipped ones."""
        return (
            self._own.find(where, cell, False)
            or self._loaded.find(where, cell, True)
            or self._shipped.find(where, cell, True)
        )  # fmt: skip

    def measured_here(self, where: Machine, cell: Cell) -> Measured | None:
        """Returns what was measured on this very machine, of this very cell."""
        return self._own.measured.get((where, cell.kind), {}).get(cell)

    def barred(self, where: Machine, cell: Cell) -> set[Forced]:
        """Returns the plans of a cell that were wrong or failed on a machine."""
        return set().union(*(lines.barred.get((where, cell), ()) for lines in (self._own, self._loaded, self._shipped)))

    def works(self, where: Machine, mechanism: str) -> bool | None:
        """Returns whether a mechanism works on a machine; None if it was not checked there."""
        return self._own.mechanisms.get((where, mechanism))

    def works_elsewhere(self, mechanism: str) -> bool:
        """Returns True if a mechanism is known to work on some machine."""
        known = {**self._shipped.mechanisms, **self._loaded.mechanisms, **self._own.mechanisms}
        return any(works for (_, name), works in known.items() if name == mechanism)


@functools.cache
def book() -> Book:
    """Returns this process's book. The user's record is read when it is first asked for, once per process."""
    return Book(file.own())


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Within the block, this thread plans by prediction alone, as if nothing had been measured."""
    token = _set_aside.set(True)
    try:
        yield
    finally:
        _set_aside.reset(token)


def is_set_aside() -> bool:
    """Returns True within a block of `set_aside`."""
    return _set_aside.get()


def line_of(where: Machine, cell: Cell, problem: str, measured: Measured) -> Line:
    """Returns the line of a measurement. `problem` is for people to read."""
    times = {"ms": measured.seconds, "torch_ms": measured.torch, "predicted_ms": measured.predicted, "guess_ms": measured.guess}
    return {
        **_key(where, cell), "problem": problem, "plan": plan_to(measured.plan) if measured.plan else None,
        **{name: None if t is None else round(t * 1e3, 6) for name, t in times.items()}, "spread": round(measured.spread, 4),
        **measured.details,
    }  # fmt: skip


def barring(where: Machine, cell: Cell, plan: Forced, reason: str) -> Line:
    """Returns the line that bars a plan of a cell on a machine, with the reason for people to read."""
    return {**_key(where, cell), "barred": plan_to(plan), "reason": reason}


def mechanism_line(where: Machine, mechanism: str, works: bool) -> Line:
    """Returns the line that says whether a mechanism works on a machine."""
    return {**vars(where), "mechanism": mechanism, "works": works}


def _key(where: Machine, cell: Cell) -> Line:
    return {**vars(where), "kind": cell.kind, "images": cell.images, "pixels": cell.pixels}


def plan_to(plan: Forced) -> Line:
    """Returns a plan's choices for JSON."""
    assert plan.tile is not None
    return {**vars(plan), "tile": [*vars(plan.tile).values()]}


def plan_from(given: Any) -> Forced:
    """Returns the choices of a plan from JSON. Raises KeyError, TypeError or ValueError if they are no plan's."""
    kernel, tile, splits, staged, precision = (given[name] for name in Forced.__dataclass_fields__)
    types = [type(value) for value in (kernel, splits, staged, precision, *tile)]
    if types != [str, int, bool, str] + [int] * len(tile):
        raise TypeError(f"no plan: {given!r}")
    found = Tile(*tile)
    if found.warps not in (1, 2, 4, 8, 16, 32) or not 1 <= found.stages <= 8 or not 0 <= found.registers <= 255:
        raise ValueError(f"no tile: {tile!r}")
    return Forced(kernel, found, splits, staged, precision)


def _measured(line: Line) -> Measured:
    ms = [line[name] for name in ("ms", "torch_ms", "predicted_ms", "guess_ms")]
    seconds, torch, predicted, guess = (None if t is None else float(t) / 1e3 for t in ms)
    plan = None if line["plan"] is None else plan_from(line["plan"])
    details: Line = {name: line[name] for name in ("asked", "times") if name in line}
    return Measured(plan, None if plan is None else seconds, torch, float(line["spread"]), predicted, guess, details)
