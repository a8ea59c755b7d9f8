"""Compares the cost model with a record, and fits its times to it by least squares.

The regret of a pass is the time of the plan that the planner chooses today over that of the fastest plan measured.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tconv.planning import cost
from tconv.planning.device import Device
from tconv.planning.plan import Forced, Plan
from tconv.planning.problem import ConvProblem
from tconv.records import file
from tconv.records.book import plan_from
from tconv.tune.subject import Subject

CONSTANTS = ("LAUNCH", "START", "LATENCY", "PACE")  # of the cost model


@dataclass(frozen=True)
class Timed:
    """A pass of which several plans were timed.

    Attributes:
        gpu: where.
        subject: the pass.
        seconds: the time of each plan.
    """

    gpu: str
    subject: Subject
    seconds: dict[Forced, float]


def timed(path: pathlib.Path) -> list[Timed]:
    """Returns the passes of a record that have the times of their candidates, the last line of each.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[Any, Timed] = {}
    for line in file.read(path):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # another kind of line
            subject = Subject.from_line(line["asked"])
            seconds = {plan_from(plan): float(ms) / 1e3 for plan, ms in line["times"] if float(ms) > 0}
            if seconds:
                found[line["gpu"], subject] = Timed(line["gpu"], subject, seconds)
    return [*found.values()]


def kind_of(p: ConvProblem) -> str:
    """Returns the kind of layer that a problem is of, for tables."""
    if p.depthwise:
        return "depthwise"
    if p.G > 1:
        return "grouped"
    if p.taps > 1 and p.T == p.S and not any(p.P):
        return "patch"
    if min(p.C, p.K) <= 4:
        return "few channels"
    return f"dense {p.rank}-D"


def regrets(found: Sequence[Timed], device: Device) -> list[str]:
    """Returns the lines of a table: by kind of layer and pass, what was measured over what is predicted, and the regret."""
    rows: dict[tuple[str, str], list[tuple[list[float], float | None]]] = collections.defaultdict(list)
    for one in found:
        plans = [(plan, seconds) for choices, seconds in one.seconds.items() if (plan := _plan(one.subject, device, choices))]
        ratios = [seconds / plan.cost.seconds for plan, seconds in plans if plan.cost]
        chosen = _plan(one.subject, device, None)
        mine = one.seconds.get(chosen.choices) if chosen else None
        best = min(one.seconds.values())
        rows[kind_of(one.subject.problem), one.subject.pass_].append((ratios, None if mine is None else mine / best))
    lines = [
        "| layers | pass | passes | plans | measured over predicted | regret | choice not timed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, pass_), cells in sorted(rows.items()):
        ratios = [ratio for some, _ in cells for ratio in some]
        known = [regret for _, regret in cells if regret is not None]
        shown = f"{_mean(known):.3f}" if known else "-"
        lines.append(
            f"| {kind} | {pass_} | {len(cells)} | {len(ratios)} | {_spread(ratios)} | {shown} | {len(cells) - len(known)} |"
        )
    return lines


def _plan(subject: Subject, device: Device, choices: Forced | None) -> Plan | None:
    try:
        plan: Plan = subject.launch(device, choices).call.plan
    except ValueError:  # such a plan is no longer possible
        return None
    return plan


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _spread(ratios: Sequence[float]) -> str:
    """Returns a geometric mean and the factor of one standard deviation of the logarithms."""
    if not ratios:
        return "-"
    mean = _mean(ratios)
    return f"{mean:.2f} x/ {math.exp(math.sqrt(sum(math.log(r / mean) ** 2 for r in ratios) / len(ratios))):.2f}"


@dataclass(frozen=True)
class Fit:
    """The cost model's times, as they are and as fitted.

    Attributes:
        before, after: by name: "LAUNCH" and "START" in seconds, "LATENCY" and "PACE" in cycles, "l2_bandwidth" in bytes per
            second.
        error_before, error_after: the root of the mean square of the logarithm of measured over predicted.
        plans: the number of plans fitted to.
    """

    before: dict[str, float]
    after: dict[str, float]
    error_before: float
    error_after: float
    plans: int

    def __str__(self) -> str:
        rows = [f"| {name} | {value:.3g} | {self.after[name]:.3g} |" for name, value in self.before.items()]
        errors = f"| error, as a factor | {math.exp(self.error_before):.3f} | {math.exp(self.error_after):.3f} |"
        return "\n".join([f"| of {self.plans} plans | now | fitted |", "|---|---|---|", *rows, errors])


def fit(found: Sequence[Timed], device: Device) -> Fit:
    """Fits the cost model's constants and the L2 bandwidth to a record.

    The logarithms of measured over predicted times are fitted by least squares, with a loss that bounds what an outlier counts.

    Args:
        found: what was timed, on one GPU.
        device: that GPU, as the planner knows it.
    Raises:
        ValueError: no plan of the record can be planned.
        ImportError: scipy is not installed.
    """
    from scipy.optimize import least_squares  # type: ignore[import-untyped]  # scipy has no types

    samples = [
        (one.subject, choices, seconds)
        for one in found for choices, seconds in one.seconds.items() if _plan(one.subject, device, choices)
    ]  # fmt: skip
    if not samples:
        raise ValueError("no plan of this record can be planned by this version")
    before = {name: float(getattr(cost, name)) for name in CONSTANTS} | {"l2_bandwidth": device.limits.l2_bandwidth}

    def residuals(logarithms: Sequence[float]) -> list[float]:
        values = dict(zip(before, map(math.exp, logarithms), strict=True))
        with _constants(values, device) as changed:
            plans = [_plan(subject, changed, choices) for subject, choices, _ in samples]
        return [
            math.log(seconds / plan.cost.seconds) if plan and plan.cost else 0.0
            for plan, (*_, seconds) in zip(plans, samples, strict=True)
        ]

    start = [math.log(value) for value in before.values()]
    solved = least_squares(residuals, start, loss="soft_l1", f_scale=0.2, diff_step=1e-2, max_nfev=30)
    after = dict(zip(before, map(math.exp, solved.x), strict=True))
    return Fit(before, after, _rms(residuals(start)), _rms(residuals(solved.x)), len(samples))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


@contextlib.contextmanager
def _constants(values: dict[str, float], device: Device) -> Iterator[Device]:
    """Sets the cost model's times within a block, and yields the device with the L2 bandwidth among them."""
    kept = {name: getattr(cost, name) for name in CONSTANTS}
    try:
        for name in CONSTANTS:
            setattr(cost, name, values[name])
        yield dataclasses.replace(device, limits=dataclasses.replace(device.limits, l2_bandwidth=values["l2_bandwidth"]))
    finally:
        for name, value in kept.items():
            setattr(cost, name, value)
