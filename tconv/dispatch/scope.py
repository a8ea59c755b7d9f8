"""Which calls are made inside a model: those of its forward pass, and those of the backward passes of these.

A forward pass is inside while the frame that runs the model's hooks is on the thread's stack. So it ends when the call
ends, however that comes about. A backward pass runs later and, on a GPU, in another thread. So the nodes that autograd
makes of calls inside are marked, and a call is inside while a marked node runs.

A convolution's node is marked as it is made (`marking`). Compiled code and checkpoints make other nodes of convolutions:
after such a forward pass, all nodes between the model's outputs and its inputs are marked.
"""

from __future__ import annotations

import contextvars
import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch._C._autograd import _get_sequence_nr as sequence_number
from torch.utils import _pytree as pytree

from tconv.dispatch.dynamo import opaque

MARK = "tconv.enable"  # in the metadata of an autograd node: the scopes that it was made in
Scopes = tuple[Any, ...]


class _Pass:
    """A forward pass that is under way.

    Attributes:
        scope: what `enter` was given.
        frame: the one that runs the model's hooks.
        task: the backward pass that it is part of, if a checkpoint computes something again; else -1.
        first: the number that the next node of autograd has, those of a thread being counted.
        unmarked: how many convolutions ran of which a node other than their own may be the backward.
    """

    __slots__ = ("first", "frame", "scope", "task", "unmarked")

    def __init__(self, scope: Any, frame: FrameType) -> None:
        self.scope, self.frame = scope, frame
        self.task = torch._C._current_graph_task_id()
        self.first = sequence_number()
        self.unmarked = 0


_passes: contextvars.ContextVar[tuple[_Pass, ...]] = contextvars.ContextVar("tconv_passes", default=())


def enter(scope: Any, frame: FrameType) -> None:
    """A model's forward pass begins.

    Args:
        scope: stands for the model; compared by identity.
        frame: of the caller of the model's hooks.
    """
    _passes.set((*_under_way(), _Pass(scope, frame)))


def leave(scope: Any, frame: FrameType, outputs: Any) -> None:
    """A model's forward pass has ended, with these outputs. After an error there are none, and its frame is gone.

    Args:
        scope, frame: as they were given to `enter`.
        outputs: of any structure.
    """
    passes = _under_way()
    ended = next((p for p in reversed(passes) if p.scope is scope and p.frame is frame), None)
    _passes.set(tuple([p for p in passes if p is not ended]))
    if ended is not None and ended.unmarked:
        _mark_all(outputs, ended)


def _under_way() -> list[_Pass]:
    """The passes that have not ended, the outermost first: an interrupt may end one that no hook is told of."""
    found: list[_Pass] = []
    frame: FrameType | None = sys._getframe(1)
    for p in reversed(_passes.get()):
        caller = frame
        while caller is not None and caller is not p.frame:
            caller = caller.f_back
        if caller is not None:
            found.insert(0, p)
            frame = caller
    return found


def _forward_passes() -> list[_Pass]:
    """Those that a call made here is part of: in a backward pass, those begun since it began."""
    if not _passes.get():
        return []
    task = torch._C._current_graph_task_id()
    return [p for p in _under_way() if p.task == task]


def _of_node() -> Scopes:
    """The scopes that the running autograd node was made in."""
    node: Any = torch._C._current_autograd_node()
    return () if node is None else node.metadata.get(MARK, ())


def current() -> Scopes:
    """The scopes that a convolution below autograd is in, which may be in several models' forward passes at once."""
    passes = _forward_passes()
    for p in passes:
        p.unmarked += 1
    return (*_of_node(), *[p.scope for p in passes])


@opaque
def marking(below: Callable[..., Any], keys: Any, *args: Any) -> Any:
    """Runs autograd's kernel of a convolution and marks the node that it makes with the scopes that the call is in."""
    passes = _forward_passes()
    scopes = (*_of_node(), *[p.scope for p in passes])
    counts = [p.unmarked for p in passes]
    made = below(keys, *args)
    if not scopes:
        return made
    for t in made if isinstance(made, tuple) else (made,):
        node = None if t is None else t.grad_fn
        if node is not None:
            _mark(node, scopes)
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        for p, count in zip(passes, counts, strict=True):  # no node, or one that nothing else is computed again for
            p.unmarked = count
    return made


def _mark(node: Any, scopes: Scopes) -> None:
    metadata = node.metadata
    marked = metadata.get(MARK, ())
    metadata[MARK] = (*marked, *[s for s in scopes if s not in marked])


def _mark_all(outputs: Any, ended: _Pass) -> None:
    """Marks the nodes that outputs were computed by since a pass began, as far as they can be reached from the outputs."""
    nodes, seen = [t.grad_fn for t in _tensors(outputs)], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad") or node._sequence_nr() < ended.first:
            continue
        seen.add(node)
        _mark(node, (ended.scope,))
        nodes += [n for n, _ in node.next_functions]


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
