"""`enable()`: torch's own convolutions on GPUs run tconv's kernels, in the whole process or inside one model.

It overrides aten's kernels of `_convolution` and `convolution_backward`. They are below autograd, autocast, functorch, modes,
tracing and sharding, which all still see torch's own operators. Torch's functions and modules, and compiled, traced and
exported graphs, all end in `_convolution`. The operator above it, `convolution`, would not do: traced graphs and compiled
packages skip it. Only tensors on a device that tconv has kernels for get here. Calls that are not selected or not supported
fall back to the kernel registered before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch

from tconv.dispatch import entry, registration, scope
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.selection import Choice, Selection, choice, one_policy, select
from tconv.launching.cache import BoundedCache
from tconv.launching.record import Fallback
from tconv.planning.problem import check_policy

MADE_BY = ("convolution", "_convolution", "convolution_backward")  # the operators for which autograd creates nodes
DYNAMO = os.path.join("torch", "_dynamo")
F = TypeVar("F", bound=Callable[..., Any])
PROCESS: Any = ...  # the default for `model`. Not None: `enable(None)` is a mistake, and must not enable the whole process

_overrides: list[_Override] = []  # our registered kernels, oldest first
_nodes: registration.Registration | None = None  # kernels that mark autograd's nodes, registered while models are enabled


def enable(
    model: torch.nn.Module = PROCESS,
    /,
    *,
    operations: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    policy: str = "auto",
) -> None:
    """Runs torch's convolutions by tconv's kernels, in the whole process or inside one model, until `disable()`.

    This affects convolutions on GPUs, and on CPUs if `TRITON_INTERPRET=1` was set before Triton was imported. Without
    Triton, or if torch is built without GPU support, it warns and changes nothing.

    Without a model, it affects all threads, and child processes forked later. With a model, it affects all calls made while
    the model is being called, from any layer or function, and their backward passes. `enable` and `disable` take effect at
    once, for layers, functions and compiled graphs. A backward pass uses what is enabled when it runs.

    Several `enable()` add up: tconv computes a call if any of them selects it, and each needs its own `disable()`. If another
    library overrides the same kernels, the last one registered wins, and calls that it does not compute fall back to the one
    before it.

    Args:
        model: a module of any class. Default: the whole process.
        operations: some of "fprop", "dgrad" and "wgrad" (which includes the bias gradient), as in `Call.operation`.
            A transposed convolution is a dgrad, and the gradient of its input an fprop. None: all.
        ranks: some of 1, 2 and 3. None: all.
        dtypes: some of torch.float16, bfloat16, float32 and float64: the input's dtype after autocast. None: all.
        policy: what to do where torch's kernel was measured to be faster, "auto", "always" or "tune", as in `replace_`. If
            several `enable()` select a call, "always" goes before "tune", and that before "auto".

    Raises:
        TypeError: the model is not a module, or a selection is not a collection of values of the right type.
        ValueError: a selection is empty, or has a value that tconv has no kernels for, or the policy does not exist.

    Example:
        >>> enable()
        >>> disable()
        >>> enable(ranks=(1, 2), dtypes=(torch.bfloat16,))
        >>> disable()
    """
    _begin(5, model, False, operations, ranks, dtypes, policy)


def disable(model: torch.nn.Module = PROCESS, /) -> None:
    """Ends the newest `enable()` of the process, or of a model. Ending the last one restores torch's own kernels.

    It does not end a `with enabled():` block.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: no `enable()` is active.
    """
    _check("disable", model)
    with registration.lock:
        every = _process() if model is PROCESS else _hooked(model)
        one = next((one for one in reversed(every) if not one.block), None)
        if one is None:
            of = "" if model is PROCESS else f"a {type(model).__name__}"
            raise RuntimeError(f"tconv.disable({of}) without a tconv.enable({of}) before it that still holds")
        _close(one)
    if model is not PROCESS:
        _unhook(model, one)


@contextlib.contextmanager
def enabled(
    model: torch.nn.Module = PROCESS,
    /,
    *,
    operations: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    policy: str = "auto",
) -> Iterator[None]:
    """A context manager: `enable()`, with the same arguments, until the block ends.

    Example:
        >>> with enabled():
        ...     y = torch.nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
        >>> layer = torch.nn.Conv1d(1, 1, 2)
        >>> with enabled(layer):
        ...     y = layer(torch.ones(1, 1, 3))
    """
    one = _begin(6, model, True, operations, ranks, dtypes, policy)  # one frame more than `enable`: contextlib's
    try:
        yield
    finally:
        _close(one)
        if model is not PROCESS:
            _unhook(model, one)


def is_enabled(
    model: torch.nn.Module = PROCESS,
    /,
    *,
    operation: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Returns True if an `enable()` is active for the process, or for calls inside a model.

    Args:
        model: a model; an `enable()` of the process counts for it too. Default: only those of the process count.
        operation, rank, dtype: ask about calls of this kind only. None: any.

    Returns:
        False also if `enable()` only warned.

    Raises:
        TypeError, ValueError: as `enable` does.
    """
    _check("is_enabled", model)
    one_of = [None if v is None else (v,) for v in (operation, rank, dtype)]
    asked = select(one_of[0], one_of[1], one_of[2])
    every = _process() + ([] if model is PROCESS else _hooked(model))
    return any(one.layer is not None and not one.layer.empty and one.selection.meets(asked) for one in every)


class _Enabled:
    """One `enable()`.

    Attributes:
        selection: the calls that it selects.
        block: True if it ends with a `with` block instead of `disable()`.
        layer: the registered kernels that serve it; None before it begins and after it ends.
    """

    def __init__(self, selection: Selection, block: bool) -> None:
        self.selection, self.block = selection, block
        self.layer: _Override | None = None


def _hook(function: F) -> F:
    """Keeps dynamo from tracing a module hook. Does what torch.compiler.disable does, without importing dynamo."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # not in torch's stubs
    function._torchdynamo_disable_msg = "tconv.enable(model) has hooks: enable what torch.compile returns"  # type: ignore[attr-defined]
    return opaque(function)


class _Inside(_Enabled):
    """One `enable(model)`, referred to by the model's hooks. A copy of the model gets its own."""

    @_hook
    def enter(self, module: torch.nn.Module, args: Any) -> None:
        """The model's first hook."""
        if self.layer is not None:
            scope.enter(self, _caller(sys._getframe(1)))

    @_hook
    def leave(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        """The model's last hook, called after an error too."""
        scope.leave(self, _caller(sys._getframe(1)), outputs)

    def __reduce__(self) -> Any:
        return _copied, (self.selection, self.block)


class _Override(registration.Registration):
    """Our convolution kernels, and the `enable()`s made while they were on top.

    Attributes:
        chosen: the choice for all calls; None if it depends on the model that a call is made in, or if nothing is enabled.
        process, inside: the active `enable()`s of the process and of models.
        empty: True if tconv has kernels for no device here.
    """

    def __init__(self, stacklevel: int) -> None:
        self.chosen: Choice | None = None
        self.process: tuple[_Enabled, ...] = ()
        self.inside: weakref.WeakSet[_Inside] = weakref.WeakSet()
        self._deleted = False  # whether a model of `inside` was deleted, and nobody has acted on that yet
        self._known: BoundedCache[tuple[_Inside, ...], Choice | None] = BoundedCache()
        kernels: dict[tuple[str, str], Any] = {}
        reasons = []
        for device in ("cuda", "cpu"):
            try:
                kernels |= _kernels(self, device)
            except Fallback as e:
                reasons.append(str(e))
        self.empty = not kernels
        super().__init__(kernels)
        if self.empty:
            warnings.warn(f"tconv.enable() changes nothing here: {', '.join(dict.fromkeys(reasons))}", stacklevel=stacklevel)

    def change(self, one: _Enabled, holds: bool) -> None:
        """Begins (`holds`) or ends one `enable()`."""
        one.layer = self if holds else None
        if not isinstance(one, _Inside):
            self.process = (*self.process, one) if holds else tuple(other for other in self.process if other is not one)
        elif holds:
            self.inside.add(one)
            weakref.finalize(one, self._note_deleted).atexit = False
        else:
            self.inside.discard(one)
        self._choose()

    def _note_deleted(self) -> None:
        """Makes the next call act on the deletion of a model. The garbage collector calls this anywhere: it takes no lock."""
        self._deleted, self.chosen = True, None

    def _choose(self) -> None:
        selections = [one.selection for one in self.process]
        # The same choice inside and outside of models.
        alike = selections and (
            not self.inside
            or (any(s.everything for s in selections) and one_policy([*selections, *[one.selection for one in self.inside]]))
        )
        self.chosen = choice(selections) if alike else None
        self.forget()

    def look(self) -> Choice | None:
        """Returns the choice for the running call, or None if nothing is enabled for it."""
        if self._deleted:
            with registration.lock:
                self._deleted = False
                self._choose()
                _tidy()  # may remove these kernels; the running call ends by the one below
        scopes = scope.current() if self.inside else ()
        try:
            return self._known[scopes]
        except KeyError:
            pass
        known = self._known
        selections = [one.selection for one in (*self.process, *scopes) if one.layer is self]
        known[scopes] = found = choice(selections) if selections else None
        return found

    def forget(self) -> None:
        """Clears the cache of choices, which refers to models that may have been deleted."""
        self._known = BoundedCache()


def _kernels(layer: _Override, device: str) -> dict[tuple[str, str], Any]:
    """Returns our kernels for a device, by operator and dispatch key.

    Raises:
        Fallback: tconv cannot run on that device here.
    """
    if device == "cuda" and not torch.cuda._is_compiled():
        raise Fallback("this torch is built without GPUs")
    entry.kernels_for(device)
    from tconv.dispatch import aten

    ours: dict[str, Callable[..., Any]] = {"_convolution": aten.convolution, "convolution_backward": aten.convolution_backward}
    return {(operator, device.upper()): functools.partial(function, layer) for operator, function in ours.items()}


def _begin(stacklevel: int, model: Any, block: bool, operations: Any, ranks: Any, dtypes: Any, policy: str) -> _Enabled:
    """Does what `enable()` and `enabled()` do. `stacklevel` is that of the user's call in a warning of `_Override`."""
    name = "enabled" if block else "enable"
    _check(name, model)
    check_policy(f"tconv.{name}", policy)
    selection = select(operations, ranks, dtypes, policy)
    if model is PROCESS:
        one = _Enabled(selection, block)
        _open(one, stacklevel)
        return one
    inside = _Inside(selection, block)
    _open(inside, stacklevel)
    try:
        model.register_forward_pre_hook(inside.enter, prepend=True)
        model.register_forward_hook(inside.leave, always_call=True)
    except BaseException:  # a module that does not support hooks
        _close(inside)
        _unhook(model, inside)
        raise
    return inside


def _check(function: str, model: Any) -> None:
    if model is not PROCESS and not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"tconv.{function}() wants a torch.nn.Module, or none for the whole process; it was given {what}")


def _open(one: _Enabled, stacklevel: int) -> None:
    with registration.lock:
        _tidy()
        if not _overrides or not _overrides[-1].on_top():
            _overrides.append(_Override(stacklevel))
        _overrides[-1].change(one, True)
        _tidy()


def _close(one: _Enabled) -> None:
    with registration.lock:
        if one.layer is not None:
            one.layer.change(one, False)
            _tidy()


def _tidy() -> None:
    """Removes kernels that serve no `enable()`, unless others' are on top. Adds or removes the kernels that mark nodes."""
    global _nodes
    for layer in _overrides:
        layer.forget()
    while _overrides and not _overrides[-1].process and not _overrides[-1].inside and _overrides[-1].on_top():
        _overrides.pop().remove()
    if not any(layer.inside for layer in _overrides):
        if _nodes is not None and _nodes.on_top():
            _nodes.remove()
            _nodes = None
    elif _nodes is None:
        devices = {below.key for layer in _overrides for below in layer.kernels}
        kernels = [(operator, f"Autograd{device}") for operator in MADE_BY for device in devices]
        # If two Autograd kernels are registered from Python, torch runs the wrong one under a dispatch mode.
        _nodes = registration.Registration({kernel: scope.marking for kernel in kernels if registration.torchs_own(*kernel)})


def _process() -> list[_Enabled]:
    return [one for layer in _overrides for one in layer.process]


def _hooked(model: torch.nn.Module) -> list[_Enabled]:
    """Returns the active `enable()`s of a model, oldest first. Its hooks are in the opposite order."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in reversed(owners) if isinstance(owner, _Inside) and owner.layer is not None]


def _unhook(model: torch.nn.Module, one: _Enabled) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is one]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _caller(frame: FrameType) -> FrameType:
    """Returns the frame that called a hook, skipping dynamo's frames, which end together with the hook."""
    while DYNAMO in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _copied(selection: Selection, block: bool) -> _Inside:
    """Returns the `_Inside` of a copied or unpickled model. It is enabled too, except by a block, which ends here only."""
    inside = _Inside(selection, block)
    if not block:
        _open(inside, 4)
    return inside


if hasattr(os, "register_at_fork"):  # a child inherits consistent state and a free lock
    lock = registration.lock
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
