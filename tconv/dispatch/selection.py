"""Which convolutions `enable()` is asked for, and what has been worked out under each such choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tconv.dispatch.operators import DTYPES
from tconv.launching.cache import BoundedCache

OPERATIONS = ("fprop", "dgrad", "wgrad")
RANKS = (1, 2, 3)


@dataclass(frozen=True)
class Selection:
    """The calls that one `enable()` takes: those of these operations, ranks and dtypes."""

    operations: frozenset[str]
    ranks: frozenset[int]
    dtypes: frozenset[torch.dtype]

    def takes(self, operation: str, rank: int, dtype: torch.dtype) -> bool:
        """Whether a call is among them."""
        return operation in self.operations and rank in self.ranks and dtype in self.dtypes

    def meets(self, other: Selection) -> bool:
        """Whether some call is among both."""
        return bool(self.operations & other.operations and self.ranks & other.ranks and self.dtypes & other.dtypes)

    def __str__(self) -> str:
        """The keywords of `enable()` that say it."""
        named = (("operations", self.operations, OPERATIONS), ("ranks", self.ranks, RANKS), ("dtypes", self.dtypes, DTYPES))
        return ", ".join(
            f"{name}={tuple(v for v in every if v in some)}" for name, some, every in named if len(some) < len(every)
        )


EVERYTHING = Selection(frozenset(OPERATIONS), frozenset(RANKS), frozenset(DTYPES))


def select(operations: Any = None, ranks: Any = None, dtypes: Any = None) -> Selection:
    """The selection of these keywords of `enable()`; None stands for all there are.

    Raises:
        TypeError: one of them is not a collection, or holds what is no name, number or torch.dtype.
        ValueError: one of them is empty, or holds an operation, rank or dtype that tconv has no kernels for.
    """
    return Selection(
        frozenset(_among("operations", operations, OPERATIONS, str)),
        frozenset(_among("ranks", ranks, RANKS, int)),
        frozenset(_among("dtypes", dtypes, DTYPES, torch.dtype)),
    )


def _among(name: str, given: Any, allowed: tuple[Any, ...], kind: type) -> tuple[Any, ...]:
    if given is None:
        return allowed
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}={given!r}: a tuple of some of {allowed} is wanted, such as ({given!r},)")
    chosen = tuple(given)
    if not chosen:
        raise ValueError(f"{name}={given!r} selects nothing: give some of {allowed}, or leave {name} out for all of them")
    for value in chosen:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: {value!r} is of type {type(value).__name__}; some of {allowed} are wanted")
        if value not in allowed:
            raise ValueError(f"{name}: {value!r} is none of {allowed}")
    return chosen


class Choice:
    """What holds for a call: it is taken if one of the selections takes it.

    What a kind of call launches is remembered here, so that a call costs the same under every choice.

    Attributes:
        forward, backward: what dispatch/aten.py has worked out, by kind of call.
    """

    __slots__ = ("_selections", "backward", "forward")

    def __init__(self, selections: frozenset[Selection]) -> None:
        self._selections = selections
        self.forward: BoundedCache[Any, Any] = BoundedCache()
        self.backward: BoundedCache[Any, Any] = BoundedCache()

    def refusal(self, operation: str, rank: int, dtype: torch.dtype) -> str | None:
        """Why a call of this operation, rank and dtype is not taken, or None if it is."""
        if any(s.takes(operation, rank, dtype) for s in self._selections):
            return None
        asked = " or ".join(sorted(f"enable({s})" for s in self._selections))
        return f"{operation} of rank {rank} in {dtype} is not selected by {asked}"


_choices: BoundedCache[frozenset[Selection], Choice] = BoundedCache()


def choice(selections: Iterable[Selection]) -> Choice:
    """The one `Choice` of these selections: toggling between a few of them forgets nothing."""
    key = frozenset(selections)
    if EVERYTHING in key:
        key = frozenset((EVERYTHING,))
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = Choice(key)
    return found


class Chooser(Protocol):
    """Says what holds for the calls that a registered kernel is given.

    Attributes:
        chosen: what holds for all calls; None where that depends on the call, or nothing holds.
    """

    chosen: Choice | None

    def look(self) -> Choice | None:
        """What holds for the running call; None if nothing does."""
