"""Medians of calls on a GPU, by events around each call, with the L2 cache overwritten before it; on a CPU, by the clock.

pytest-benchmark repeats, warms up and does the statistics; what is ours is its timer.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from tconv.planning.device import Limits
from tconv.tune import clock

BUDGET = 0.06  # seconds of measured calls


class Clock(clock.Clock):
    """The tuner's clock, which is also a timer for pytest-benchmark: that asks it before and after each call."""

    def rounds(self, call: Callable[[], Any]) -> int:
        """How many calls fit the budget, from one that is timed: 5 to 100."""
        return int(min(100, max(5, BUDGET / max(self.once(call), 1e-6))))


def median(clock: Clock, call: Callable[[], Any]) -> float:
    """Median seconds of a call."""
    call()
    times = sorted(clock.once(call) for _ in range(clock.rounds(call)))
    return times[len(times) // 2]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of a call: the median, the first and third quartile, and of how many."""

    ms: float
    low_ms: float
    high_ms: float
    rounds: int


def in_turns(clock: Clock, calls: dict[str, Callable[[], Any]], budget: float = BUDGET, most: int = 40) -> dict[str, Times]:
    """Times calls in turns, so that whatever drifts affects all of them. Each is called once before, to warm up.

    Args:
        budget: seconds to spend on the timed rounds, of which there are at least 5 unless `most` is less.
        most: the largest number of rounds, at least 2.
    """
    once = 0.0
    for call in calls.values():
        call()
        once += clock.once(call)
    rounds = int(min(most, max(5, budget / max(once, 1e-6))))  # quartiles need two
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock.once(call))
    found = {}
    for name, each in seconds.items():
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
        found[name] = Times(1e3 * middle, 1e3 * low, 1e3 * high, rounds)
    return found


def measured_limits(device: str, clock: Clock, known: Limits, tiny: bool) -> Limits:
    """A device's limits with the rates that its own library reaches here: matrix products and a copy of random data."""
    n = 64 if tiny else 8192
    rates = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32, extent in (
            ("matrix_16", torch.bfloat16, False, n), ("matrix_tf32", torch.float32, True, n // 2),
            ("fma_32", torch.float32, False, n // 2), ("matrix_64", torch.float64, False, n // 4),
        ):  # fmt: skip
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(extent, extent, device=device, dtype=dtype) for _ in range(2))
            rates[name] = 2 * extent**3 / median(clock, lambda a=a, b=b: torch.mm(a, b))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.randn((1 << 16) if tiny else (1 << 30), device=device)
    target = torch.empty_like(source)
    rates["bandwidth"] = 2 * source.nbytes / median(clock, lambda: target.copy_(source))
    return dataclasses.replace(known, **rates)
