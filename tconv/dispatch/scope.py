"""Tells which convolutions are made inside a model: during its forward pass, or during the backward of that.

A forward pass lasts while the frame that runs the model's hooks is on the thread's stack. So it ends with the model's call,
whether that returns or raises. A backward pass runs later and, on a GPU, in another thread. So the autograd nodes created
inside a model are marked, and a call made while a marked node runs is inside that model.

A convolution's own node is marked when it is created (`marking`). In compiled code and checkpoints, the backward of
a convolution belongs to another node. After such a forward pass, all nodes between the model's outputs and its inputs are
marked.
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

MARK = "tconv.enable"  # key in an autograd node's metadata: the scopes that the node was created in
Scopes = tuple[Any, ...]


class _Pass:
    """A forward pass in progress.

    Attributes:
        scope: the argument of `enter`.
        frame: the frame that runs the model's hooks.
        task: id of the backward pass that this pass is part of, when a checkpoint recomputes it; else -1.
        first: autograd's sequence number, in this thread, at the start of the pass: nodes created in it have this or more.
        unmarked: how many convolutions ran whose backward may belong to a node other than their own.
    """

    __slots__ = ("first", "frame", "scope", "task", "unmarked")

    def __init__(self, scope: Any, frame: FrameType) -> None:
        self.scope, self.frame = scope, frame
        self.task = torch._C._current_graph_task_id()
        self.first = sequence_number()
        self.unmarked = 0


_passes: contextvars.ContextVar[tuple[_Pass, ...]] = contextvars.ContextVar("tconv_passes", default=())


def enter(scope: Any, frame: FrameType) -> None:
    """Begins a model's forward pass.

    Args:
        scope: stands for the model; compared by identity.
        frame: the frame that runs the model's hooks.
    """
    _passes.set((*_under_way(), _Pass(scope, frame)))


def leave(scope: Any, frame: FrameType, outputs: Any) -> None:
    """Ends a model's forward pass.

    Args:
        scope, frame: the arguments of `enter`. After an error the frame has ended.
        outputs: the model's outputs, in any structure; None after an error.
    """
    passes = _under_way()
    ended = next((p for p in reversed(passes) if p.scope is scope and p.frame is frame), None)
    _passes.set(tuple([p for p in passes if p is not ended]))
    if ended is not None and ended.unmarked:
        _mark_all(outputs, ended)


def _under_way() -> list[_Pass]:
    """Returns the forward passes in progress, outermost first.

    This looks for their frames on the stack, since an interrupt can end a pass without calling its hook.
    """
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
    """Returns the forward passes that a call made here is part of; within a backward pass, only those begun within it."""
    if not _passes.get():
        return []
    task = torch._C._current_graph_task_id()
    return [p for p in _under_way() if p.task == task]


def _of_node() -> Scopes:
    """Returns the scopes that the running autograd node was created in."""
    node: Any = torch._C._current_autograd_node()
    return () if node is None else node.metadata.get(MARK, ())


def current() -> Scopes:
    """Returns the scopes of a convolution that runs below autograd, and counts it as unmarked.

    There may be several scopes, for nested models.
    """
    passes = _forward_passes()
    for p in passes:
        p.unmarked += 1
    return (*_of_node(), *[p.scope for p in passes])


@opaque
def marking(below: Callable[..., Any], keys: Any, *args: Any) -> Any:
    """Runs autograd's kernel of a convolution, and marks the node that it creates with the scopes of the call."""
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
        for p, count in zip(passes, counts, strict=True):  # no saved-tensor hooks, so no other node recomputes it
            p.unmarked = count
    return made


def _mark(node: Any, scopes: Scopes) -> None:
    metadata = node.metadata
    marked = metadata.get(MARK, ())
    metadata[MARK] = (*marked, *[s for s in scopes if s not in marked])


def _mark_all(outputs: Any, ended: _Pass) -> None:
    """Marks all autograd nodes that were created since a pass began and can be reached from its outputs."""
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
