"""Which convolutions `enable()` selects, and the cache of launches that belongs to each choice of selections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tconv.dispatch.support import DTYPES
from tconv.launching.cache import BoundedCache

OPERATIONS = ("fprop", "dgrad", "wgrad")
RANKS = (1, 2, 3)


@dataclass(frozen=True)
class Selection:
    """The calls that one `enable()` selects, by operation, rank and dtype, and its policy for them (POLICIES)."""

    operations: frozenset[str]
    ranks: frozenset[int]
    dtypes: frozenset[torch.dtype]
    policy: str = "auto"

    @property
    def everything(self) -> bool:
        """True if every call is selected."""
        return (len(self.operations), len(self.ranks), len(self.dtypes)) == (len(OPERATIONS), len(RANKS), len(DTYPES))

    def takes(self, operation: str, rank: int, dtype: torch.dtype) -> bool:
        """Returns True if a call of this operation, rank and dtype is selected."""
        return operation in self.operations and rank in self.ranks and dtype in self.dtypes

    def meets(self, other: Selection) -> bool:
        """Returns True if some call is in both selections."""
        return bool(self.operations & other.operations and self.ranks & other.ranks and self.dtypes & other.dtypes)

    def __str__(self) -> str:
        """Returns the keywords of `enable()` that give this selection."""
        named = (("operations", self.operations, OPERATIONS), ("ranks", self.ranks, RANKS), ("dtypes", self.dtypes, DTYPES))
        given = [f"{name}={tuple(v for v in every if v in some)}" for name, some, every in named if len(some) < len(every)]
        return ", ".join(given + ([f"policy={self.policy!r}"] if self.policy != "auto" else []))


def select(operations: Any = None, ranks: Any = None, dtypes: Any = None, policy: str = "auto") -> Selection:
    """Returns the selection for these keywords of `enable()`; None selects all operations, ranks or dtypes.

    Raises:
        TypeError: one of them is not a collection, or has an element that is not a str, int or torch.dtype respectively.
        ValueError: one of them is empty, or has an operation, rank or dtype that tconv has no kernels for.
    """
    return Selection(
        frozenset(_among("operations", operations, OPERATIONS, str)),
        frozenset(_among("ranks", ranks, RANKS, int)),
        frozenset(_among("dtypes", dtypes, DTYPES, torch.dtype)),
        policy,
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
    """The selections that apply to a call. tconv computes it if at least one of them selects it.

    It has its own caches, so that a cached call does not have to compare selections again.

    Attributes:
        forward, backward: caches of dispatch/aten.py, by kind of call.
    """

    __slots__ = ("_selections", "backward", "forward")

    def __init__(self, selections: frozenset[Selection]) -> None:
        self._selections = selections
        self.forward: BoundedCache[Any, Any] = BoundedCache()
        self.backward: BoundedCache[Any, Any] = BoundedCache()

    def refusal(self, operation: str, rank: int, dtype: torch.dtype) -> str | None:
        """Returns why a call of this operation, rank and dtype is not selected, or None if it is."""
        if any(s.takes(operation, rank, dtype) for s in self._selections):
            return None
        asked = " or ".join(sorted(f"enable({s})" for s in self._selections))
        return f"{operation} of rank {rank} in {dtype} is not selected by {asked}"

    def policy(self, operations: Iterable[str], rank: int, dtype: torch.dtype) -> str:
        """Returns the policy for a call: of those that select it, "always" goes before "tune", and that before "auto"."""
        asked = {s.policy for s in self._selections if any(s.takes(operation, rank, dtype) for operation in operations)}
        return next((policy for policy in ("always", "tune") if policy in asked), "auto")


_choices: BoundedCache[frozenset[Selection], Choice] = BoundedCache()


def one_policy(selections: Iterable[Selection]) -> bool:
    """Returns True if the selections do not differ in their policies."""
    return len({s.policy for s in selections}) <= 1


def choice(selections: Iterable[Selection]) -> Choice:
    """Returns the `Choice` of these selections, always the same object, so that toggling `enable()` keeps its caches."""
    key = frozenset(selections)
    everything = [s for s in key if s.everything]
    if everything and one_policy(key):
        key = frozenset(everything)
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = Choice(key)
    return found


def forget() -> None:
    """Forgets all launches."""
    for known in list(_choices.values()):  # another thread may add one
        known.forward.clear()
        known.backward.clear()


class Chooser(Protocol):
    """Tells which `Choice` applies to the calls of a registered kernel.

    Attributes:
        chosen: the choice for all calls. None if it depends on the call (then `look` tells), or if nothing is enabled.
    """

    chosen: Choice | None

    def look(self) -> Choice | None:
        """Returns the choice for the running call, or None if nothing is enabled for it."""
