"""What was measured of a model, for people to read."""

from __future__ import annotations

from dataclasses import dataclass

from tconv.planning.plan import Forced, Plan
from tconv.records.book import Measured
from tconv.tune.subject import Asked

TORCH = "torch"


@dataclass(frozen=True)
class Row:
    """One distinct pass of a model.

    Attributes:
        layers: the names of the modules that make it; empty for calls outside of modules.
        calls: how often the model makes it.
        shape: the problem, as text.
        pass_: "fprop", "dgrad" or "wgrad".
        torch, guess, best: seconds of torch's kernel, of the plan that tconv's planner chose, and of the fastest that was
            measured; None if it could not run or was not timed.
        choice: what runs from now on: the text of a plan, or "torch".
        seconds: its time; None if nothing could be measured.
        guessed: the planner's choice.
        bound: what the cost model expects to limit it; empty in the interpreter.
    """

    layers: tuple[str, ...]
    calls: int
    shape: str
    pass_: str
    torch: float | None
    guess: float | None
    best: float | None
    choice: str
    seconds: float | None
    guessed: str = ""
    bound: str = ""


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`; it prints as a table.

    Attributes:
        device: the name of the GPU.
        rows: one for each distinct pass, in the order in which the model first makes them.
        barred: plans that were wrong or failed, each with the reason.
        skipped: what could not run this time, and why.
        left: calls that fall back to torch, each with its reason.
    """

    device: str
    rows: tuple[Row, ...]
    barred: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def before(self) -> float:
        """Seconds of all calls by torch's kernels, where those could run."""
        return sum(row.calls * row.torch for row in self.rows if row.torch is not None and row.seconds is not None)

    @property
    def after(self) -> float:
        """Seconds of the same calls as they run from now on."""
        return sum(row.calls * row.seconds for row in self.rows if row.torch is not None and row.seconds is not None)

    def __str__(self) -> str:
        head = ("layer", "calls", "shape", "pass", "torch", "guess", "best", "choice")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(_put(cell, width, i) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        ]
        ratio = f", {self.before / self.after:.2f} times as fast" if self.after else ""
        total = f"total on {self.device}: torch {_us(self.before)} us, from now on {_us(self.after)} us{ratio}"
        notes = [f"barred: {line}" for line in self.barred] + [f"skipped: {line}" for line in self.skipped]
        left = [f"{len(self.left)} calls fall back to torch: {self.left[0]}"] if self.left else []
        return "\n".join([*text, total, *notes, *left])


def _cells(row: Row) -> tuple[str, ...]:
    more = f" +{len(row.layers) - 1}" if len(row.layers) > 1 else ""
    layer = f"{row.layers[0] if row.layers else '-'}{more}"
    return layer, str(row.calls), row.shape, row.pass_, _us(row.torch), _us(row.guess), _us(row.best), row.choice


def _put(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in (1, 4, 5, 6) else cell.ljust(width)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def row_of(asked: Asked, guess: Plan, measured: Measured) -> Row:
    """Returns the row of a pass of a model.

    Args:
        asked: the pass.
        guess: the planner's choice.
        measured: what was measured.
    """
    ours, theirs = measured.plan, measured.torch
    choice, seconds = (TORCH, theirs) if measured.torch_is_faster else ("-" if ours is None else named(ours), measured.seconds)
    return Row(
        tuple(asked.layers), asked.calls, str(asked.subject.problem), asked.subject.pass_, theirs, measured.guess,
        measured.seconds, choice, seconds, named(guess.choices), guess.cost.bound if guess.cost else "",
    )  # fmt: skip


def named(choices: Forced) -> str:
    """Returns the text of a plan's choices, as `explain` names a plan."""
    splits = f", {choices.splits} splits" if choices.splits and choices.splits > 1 else ""
    precision = "" if choices.precision in (None, "ieee") else f" {choices.precision}"
    return f"{choices.kernel} {choices.tile}{precision}{splits}{', copied' if choices.staged else ''}"
