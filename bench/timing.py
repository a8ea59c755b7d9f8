"""Medians of calls on a GPU, by events around each call, with the L2 cache overwritten before it; on a CPU, by the clock.

pytest-benchmark repeats, warms up and does the statistics; what is ours is its timer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tconv.planning.device import Limits

FLUSH = 256 << 20  # bytes: four times the L2 cache of an H200
BUDGET = 0.06  # seconds of measured calls
HEAD_START = 300_000  # cycles, about 0.15 ms: several launches queue up behind them


class Clock:
    """A timer for pytest-benchmark, which asks it before and after each call and takes the difference.

    On a GPU both answers come from events in the stream, so that a launch's time on the host hides behind the flush before
    it: the first answer is zero, the second the seconds between the events.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.start: Any = None
        self.waste = torch.empty(FLUSH if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self) -> float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self.start is None:
            self.start = event
            return 0.0
        event.synchronize()
        seconds: float = self.start.elapsed_time(event) / 1000
        self.start = None
        return seconds

    def flush(self) -> None:
        """Overwrites the L2 cache and gives the host a head start; queued, like everything else."""
        self.start = None  # a call that raised has left it
        self.waste.zero_()
        if self.cuda:
            torch.cuda._sleep(HEAD_START)

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, after the flush."""
        self.flush()
        before = self()
        call()
        return self() - before

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
