"""A record of recent calls: which plan ran, or why the call fell back to torch.

Every fallback is recorded, except what torch.compile decides while it traces.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.normalise import Normalisation
from tconv.planning.plan import Plan
from tconv.planning.problem import ConvProblem


class Fallback(Exception):
    """The call falls back to torch. The text is the reason that users see in `last_calls()`."""


class TransientFallback(Fallback):
    """This call falls back to torch, but the next one like it may not: memory ran out, for example."""


class Slower(Fallback):
    """The call falls back to torch because torch's kernel was measured to be faster. The text has both times."""


@dataclass(frozen=True)
class Call:
    """One pass that tconv computed, or one call that fell back to torch.

    Attributes:
        operation: "fprop", "dgrad", "wgrad" or "bias", or of a normalisation the name of its function, with " gradient" behind
            it for its backward pass; for a fallback, the name of the function.
        problem: the convolution or normalisation, or None if the call fell back before it was worked out.
        plan: how tconv's kernels computed it, or None for a fallback.
        reason: why this plan was chosen, or why the call fell back.
    """

    operation: str
    problem: ConvProblem | Normalisation | None
    plan: Plan | None
    reason: str

    @property
    def ours(self) -> bool:
        """True if tconv's kernels computed it."""
        return self.plan is not None

    def __str__(self) -> str:
        if self.plan:
            return f"{self.plan}  [{self.problem}]"
        return f"{self.operation}: torch ({self.reason})"


LAST: collections.deque[Call] = collections.deque(maxlen=64)
_watchers: list[list[Call]] = []
_apart: contextvars.ContextVar[list[list[Call]] | None] = contextvars.ContextVar("tconv_recording_apart", default=None)
_lock = threading.Lock()


def record_call(call: Call) -> None:
    """Adds a call to `last_calls()` and to every `recording()` in progress.

    The reason of a fallback in a `batch_invariant()` block says that torch's kernels promise nothing of the kind.
    """
    if call.plan is None and is_batch_invariant():
        call = dataclasses.replace(call, reason=f"{call.reason}; its result may depend on the batch")
    watchers = _apart.get()
    if watchers is None:
        watchers = _watchers
        LAST.append(call)
    for calls in tuple(watchers):  # a copy: other threads begin and end recordings meanwhile
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
    """A list that fills with the calls this thread makes in the block, and is the only record of them.

    `last_calls()` and recordings begun before do not see them. Used for calls that are planned but not computed.
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
