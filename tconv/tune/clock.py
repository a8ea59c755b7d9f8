"""The time of one call on a GPU, by events around it, with the L2 cache overwritten before it; on a CPU, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 256 << 20  # bytes: five times the L2 cache of an H200
HEAD_START = 300_000  # cycles, about 0.15 ms: several launches queue up behind them


class Clock:
    """Seconds: asked before and after a call, it tells the time of the call by the difference of its two answers.

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
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # untyped in torch
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
            torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]  # untyped in torch

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, after the flush."""
        self.flush()
        before = self()
        call()
        return self() - before
