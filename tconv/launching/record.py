"""What the last calls used, so that nothing falls back unseen."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tconv.planning.plan import Plan
from tconv.planning.problem import ConvProblem


class Declined(Exception):
    """tconv does not take a call; the text says why."""


class Passing(Declined):
    """tconv does not take this call, but may take the next one like it: memory has run out, say."""


@dataclass(frozen=True)
class Call:
    """One pass that ran, or one call that was left to torch.

    Attributes:
        operation: "fprop", "dgrad", "wgrad", "bias", or the torch function that took the call.
        problem: the problem, or None where none was made.
        plan: how our kernels ran it; None where torch did.
        reason: why that plan, or why torch.
    """

    operation: str
    problem: ConvProblem | None
    plan: Plan | None
    reason: str

    @property
    def ours(self) -> bool:
        """Whether tconv's kernels did the work."""
        return self.plan is not None

    def __str__(self) -> str:
        if self.plan:
            return f"{self.plan}  [{self.problem}]"
        return f"{self.operation}: torch ({self.reason})"


LAST: collections.deque[Call] = collections.deque(maxlen=64)
_watchers: list[list[Call]] = []
_apart: contextvars.ContextVar[list[list[Call]] | None] = contextvars.ContextVar("tconv_recording_apart", default=None)
_lock = threading.Lock()


def note(call: Call) -> None:
    """Remember a call."""
    watchers = _apart.get()
    if watchers is None:
        watchers = _watchers
        LAST.append(call)
    for calls in watchers:
        calls.append(call)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """A list that fills with every `Call` of the process while the block runs, backward passes included.

    Example:
        >>> with recording() as calls:
        ...     pass
        >>> calls
        []
    """
    calls: list[Call] = []
    apart = _apart.get()
    watchers = _watchers if apart is None else apart
    with _lock:
        watchers.append(calls)
    try:
        yield calls
    finally:
        with _lock:
            watchers[:] = [w for w in watchers if w is not calls]


@contextlib.contextmanager
def recording_apart() -> Iterator[list[Call]]:
    """A list that fills with the calls that this thread makes in the block, of which no one else learns.

    `last_calls` does not hold them afterwards, nor does a `recording` that was begun before. For calls that are planned only.
    """
    calls: list[Call] = []
    token = _apart.set([calls])
    try:
        yield calls
    finally:
        _apart.reset(token)


def last_calls() -> tuple[Call, ...]:
    """The last calls of the process, oldest first, at most 64."""
    return tuple(LAST)
