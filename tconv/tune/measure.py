"""Checks each candidate of a pass, then times them beside torch's kernel, in turns, fewer and fewer.

A candidate is right before its time counts: it starts from memory that holds NaN, agrees with torch's kernel, and gives the
same bits twice. One that is wrong, fails every time or hangs is barred in the record.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.plan import Forced, Plan
from tconv.records.book import Measured, plan_to
from tconv.tune.subject import Subject

RUNS = 3  # of each candidate, before the slower ones are dropped
LAST = 10  # runs of each of those that are left
DROPPED = 1.15  # what takes so many times as long as the fastest is dropped
BUDGET = 10e-3  # seconds of the GPU for a pass, beyond one run of each candidate
PIECE = 1 << 24  # elements of results that are compared at once
HANGS = 10.0  # seconds after which a candidate is taken to hang
# Of the largest element: results that are rounded once, of sums in two orders and in TF32 of rounded operands.
TOLERANCE = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 1e-4, torch.float64: 1e-10}
TF32_TOLERANCE = 2**-8


class Timer(Protocol):
    """What measures a call: the clock of clock.py, or a stand-in."""

    def once(self, call: Callable[[], Any]) -> float:
        """Makes a call and returns the seconds that it took."""


class Wrong(Exception):
    """A candidate's result is not right."""


class TooLarge(Exception):
    """A candidate needs more memory, beside its operands and result, than these take."""


@dataclass(frozen=True)
class Run:
    """A call to time.

    Attributes:
        subject: the pass.
        choices: of tconv's plan; None for torch's kernel.
        call: what to run.
    """

    subject: Subject
    choices: Forced | None
    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


@dataclass
class Outcome:
    """What was seen of a pass.

    Attributes:
        measured: the best plan, and torch's time.
        barred: plans that are not to be chosen again, each with the reason.
        skipped: candidates that could not run this time, such as for lack of memory, and why.
        seconds: the times of every candidate that was timed, None standing for torch's kernel.
    """

    measured: Measured
    barred: list[tuple[Plan, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[Forced | None, list[float]] = field(default_factory=dict)


def measure(
    subject: Subject,
    plans: Sequence[Plan],
    planned: Device,
    device: str,
    timer: Timer,
    running: Callable[[Plan | None], None] = lambda plan: None,
) -> Outcome:
    """Measures the candidates of a pass.

    Args:
        subject: the pass.
        plans: the candidates, the planner's choice first.
        planned: the planner's description of the device.
        device: where to put the operands.
        timer: measures each call.
        running: told of each candidate before it runs for the first time, and None when all have.
    """
    out = Outcome(Measured(None, None, None))
    try:
        tensors = subject.tensors(device)
    except RuntimeError as e:  # no memory for the operands
        out.skipped.append(f"{subject.pass_} of {subject.problem}: {_first_line(e)}")
        return out
    torchs = _torchs(subject, tensors, out)
    runs: list[Run] = []
    # Without torch's result, a plan that needs nothing special of the device is what the others are compared with.
    for plan in plans if torchs else sorted(plans, key=lambda plan: plan.mechanism):
        running(plan)
        try:
            if plan is not plans[0]:
                _must_be_small(subject, plan, planned, tensors)
            runs.append(_checked(subject, plan, planned, tensors, torchs or next(iter(runs), None)))
        except Exception as e:
            _refuse(out, plan, e)
    running(None)
    if torchs is not None:
        runs.append(torchs)
    out.seconds = _halved(runs, plans, timer, out)
    barred = {plan.choices for plan, _ in out.barred}
    medians = {choices: statistics.median(times) for choices, times in out.seconds.items() if choices not in barred}
    ours = [choices for choices in medians if choices is not None]
    if not ours and len(barred) < len(plans):
        return out  # some could not run this time, for lack of memory perhaps: that says nothing about the next time
    best = min(ours, key=medians.__getitem__, default=None)
    cost = next((plan.cost for plan in plans if plan.choices == best), None)
    out.measured = Measured(
        best,
        None if best is None else medians[best],
        medians.get(None),
        max((_spread(out.seconds[c]) for c in (best, None) if c in out.seconds), default=0.0),
        cost.seconds if cost else None,
        medians.get(plans[0].choices) if plans else None,
        {
            "asked": subject.to_line(),
            "times": [[plan_to(choices), round(medians[choices] * 1e3, 6)] for choices in ours],
        },
    )
    return out


def _torchs(subject: Subject, tensors: tuple[torch.Tensor, ...], out: Outcome) -> Run | None:
    """Returns the call of torch's kernel; None if it fails."""
    call = subject.torchs(tensors)
    try:
        call()
    except RuntimeError as e:  # out of memory, or a kernel that torch does not have
        out.skipped.append(f"torch: {_first_line(e)}")
        return None
    return Run(subject, None, call)


def _must_be_small(subject: Subject, plan: Plan, planned: Device, tensors: tuple[torch.Tensor, ...]) -> None:
    """Raises TooLarge for a plan whose copies and workspace take more than the operands and the result."""
    launch = subject.launch(planned, plan.choices)
    needed = sum(math.prod(copy.shape) * t.itemsize for copy, t in zip(launch.copies, tensors, strict=False) if copy)
    if launch.total is not None:
        needed += launch.splits * math.prod(subject.result.shape) * launch.total.pointers[0].itemsize
    room = sum(t.nbytes for t in tensors) + math.prod(subject.result.shape) * tensors[0].itemsize
    if needed > room:
        raise TooLarge(f"needs {needed:,} bytes beside its operands and its result, which take {room:,}")


def _checked(subject: Subject, plan: Plan, planned: Device, tensors: tuple[torch.Tensor, ...], reference: Run | None) -> Run:
    """Returns the call of a candidate, after two runs that were right. No more than two results are in memory at once.

    Args:
        reference: what makes the result that it must agree with; None if there is nothing to compare it with.
    Raises:
        Wrong: its result differs from the reference's, or the second result from the first.
        Exception: it cannot run.
    """
    from tconv.launching import launch
    from tconv.launching.self_check import run_poisoned

    prepared = subject.launch(planned, plan.choices)
    operands, bias = tensors[:2], tensors[2:]
    more = () if subject.pass_ == "wgrad" else bias or operands[:1]  # without a bias the kernel does not read its pointer
    result = subject.empty_result(str(tensors[0].device))
    run_poisoned(prepared, operands, more, result)
    error, tolerance = _error(result, reference() if reference else result), _tolerance(subject)
    if not error <= tolerance:  # NaN is not either
        raise Wrong(f"its result is off by {error:.1e} of the largest element, {tolerance:.1e} are allowed")
    again = subject.empty_result(str(tensors[0].device))
    run_poisoned(prepared, operands, more, again)
    if not torch.equal(result, again):
        raise Wrong("it gave other bits the second time")

    def call() -> torch.Tensor:
        with planning.given(plan.choices):  # so that an error is raised as it is
            return launch.execute(prepared, False, None, operands, *more)

    return Run(subject, plan.choices, call)


def _error(result: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the largest difference over the largest element, NaN if there is one; a piece at a time, for lack of memory."""
    along = max(range(result.dim()), key=lambda d: result.shape[d])
    size = max(1, PIECE * result.shape[along] // max(1, result.numel()))
    pieces = zip(torch.split(result, size, along), torch.split(right, size, along), strict=True)
    worst = torch.stack([torch.stack([(a - b).abs().max(), b.abs().max()]) for a, b in pieces]).amax(0)
    return float(worst[0] / worst[1].clamp_min(1e-30))


def _tolerance(subject: Subject) -> float:
    from tconv.launching.arguments import tensor_cores

    dtype: torch.dtype = subject.result.dtype
    return TF32_TOLERANCE if dtype == torch.float32 and tensor_cores(dtype) else TOLERANCE[dtype]


def _refuse(out: Outcome, plan: Plan, error: Exception) -> None:
    """Notes that a candidate is not to be timed: barred if it is wrong or fails every time, else skipped this time."""
    from tconv.launching.compiled import lasting

    reason = _first_line(error)
    if isinstance(error, (Wrong, ValueError)) or lasting(error):
        out.barred.append((plan, reason))
    else:
        out.skipped.append(f"{plan.kernel} {plan.tile}: {reason}")
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _halved(runs: list[Run], plans: Sequence[Plan], timer: Timer, out: Outcome) -> dict[Forced | None, list[float]]:
    """Returns the times of the calls by their choices. Those that turn out slower are run less often.

    Each is run once, so that no time counts in which something is loaded or chosen, as cudnn.benchmark does, and then timed
    RUNS times, and those that are left LAST times. The budget ends it early, but each is timed once.
    """
    seconds: dict[Forced | None, list[float]] = {}
    spent, left = 0.0, []
    by_choices = {plan.choices: plan for plan in plans}
    for run in runs:
        try:
            run()
            took = timer.once(run)
        except Exception as e:
            if run.choices is None:
                out.skipped.append(f"torch: {_first_line(e)}")
            else:
                _refuse(out, by_choices[run.choices], e)
            continue
        if run.choices is not None and took > HANGS:
            out.barred.append((by_choices[run.choices], f"it took {took:.1f} seconds"))
            continue
        seconds[run.choices] = [took]
        left.append(run)
    for times in (RUNS, RUNS + LAST):
        while left and len(seconds[left[0].choices]) < times and spent < BUDGET:
            for run in left:
                seconds[run.choices].append(took := timer.once(run))
                spent += took
        medians = {run.choices: statistics.median(seconds[run.choices]) for run in left}
        fastest = min(medians.values(), default=0.0)
        # Torch's kernel stays, so that the verdict about it is as sure as that about ours.
        left = [run for run in left if run.choices is None or medians[run.choices] <= DROPPED * fastest] or left
    return seconds


def _spread(times: Sequence[float]) -> float:
    """Returns the larger distance of a quartile to the median, over the median; 0 of a single time."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return max(middle - low, high - middle) / middle if middle else 0.0
