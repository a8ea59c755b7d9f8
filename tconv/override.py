"""One line for a whole process, or for one model: every convolution that torch computes on a GPU becomes tconv's.

What is replaced are aten's kernels of `_convolution` and `convolution_backward`, below autograd, autocast, functorch, modes,
tracing and sharding: all of these go on seeing torch's own operators. Torch's functions, modules, compiled, traced and
exported graphs end in `_convolution`; `convolution`, above it, is what traced graphs and compiled packages leave out. Only
tensors of a device that tconv has kernels for get here at all. What is not taken goes to the kernel that was there.
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

from tconv.dispatch import chain, entry, scope
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.selection import EVERYTHING, Choice, Selection, choice, select
from tconv.launching.cache import BoundedCache
from tconv.launching.record import Fallback

MADE_BY = ("convolution", "_convolution", "convolution_backward")  # the operators of which autograd makes nodes
DYNAMO = os.path.join("torch", "_dynamo")
F = TypeVar("F", bound=Callable[..., Any])
PROCESS: Any = ...  # what stands for no model: `enable(None)` is a mistake, and must not enable everything

_layers: list[_Layer] = []  # of kernels of ours that are registered, the oldest first
_nodes: chain.Layer | None = None  # registered with autograd while models are enabled


def enable(
    model: torch.nn.Module = PROCESS,
    /,
    *,
    operations: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
) -> None:
    """Makes the convolutions of the process, or those made inside one model, tconv's until `disable()`.

    It holds for those that run on a GPU, and on CPUs where `TRITON_INTERPRET=1` was set before Triton was imported. Without
    Triton, or in a torch that is built without GPUs, it warns and changes nothing.

    Without a model it holds in all threads and in children forked later. With one it holds for the calls made while the
    model is being called, by whatever layers or functions, and for their backward passes. Layers, functions and compiled
    graphs follow at once, in both directions, and a backward pass follows what holds when it runs.

    Several add up: a call is tconv's if any `enable()` that holds selects it, and each is ended by its own `disable()`.
    Where another library has replaced the same kernels, the last one wins and leaves the rest to the one before it.

    Args:
        model: whose calls; a module of any class. Left out, the process's.
        operations: some of "fprop", "dgrad" and "wgrad" (with the bias's gradient), as `Call.operation` names them: a
            transposed convolution is a dgrad, and its gradient by the input an fprop. None: all.
        ranks: some of 1, 2 and 3. None: all.
        dtypes: some of torch.float16, bfloat16, float32 and float64: the input's, after autocast. None: all.

    Raises:
        TypeError: the model is not a module, or a selection is not a collection of what is wanted.
        ValueError: a selection is empty, or asks for what tconv has no kernels for.

    Example:
        >>> enable()
        >>> disable()
        >>> enable(ranks=(1, 2), dtypes=(torch.bfloat16,))
        >>> disable()
    """
    _begin(5, model, False, operations, ranks, dtypes)


def disable(model: torch.nn.Module = PROCESS, /) -> None:
    """Ends the newest `enable()` of the process, or of a model. The last to end gives torch's own kernels back.

    A block, `with enabled():`, ends by itself only.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: there is no `enable()` that holds.
    """
    _check("disable", model)
    with chain.lock:
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
) -> Iterator[None]:
    """`enable()`, with the same arguments, for the length of a block.

    Example:
        >>> with enabled():
        ...     y = torch.nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
        >>> layer = torch.nn.Conv1d(1, 1, 2)
        >>> with enabled(layer):
        ...     y = layer(torch.ones(1, 1, 3))
    """
    one = _begin(6, model, True, operations, ranks, dtypes)  # contextlib is between
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
    """Whether an `enable()` holds: for the process, or for what is called inside a model, which the process's is too.

    Args:
        model: a model. Left out, only the process's count.
        operation, rank, dtype: ask for calls of this kind. None: for any.

    Returns:
        False too where `enable()` only warned.

    Raises:
        TypeError, ValueError: as `enable` does.
    """
    _check("is_enabled", model)
    asked = select(*(None if v is None else (v,) for v in (operation, rank, dtype)))
    every = _process() + ([] if model is PROCESS else _hooked(model))
    return any(one.layer is not None and not one.layer.empty and one.selection.meets(asked) for one in every)


class _Enabled:
    """What one `enable()` asks for.

    Attributes:
        selection: the calls that it takes.
        block: whether it ends with a block rather than with `disable()`.
        layer: the kernels that take them; None before and after.
    """

    def __init__(self, selection: Selection, block: bool) -> None:
        self.selection, self.block = selection, block
        self.layer: _Layer | None = None


def _hook(function: F) -> F:
    """A module's hook that dynamo is not to trace. Says so as torch.compiler.disable does, which would import dynamo."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "tconv.enable(model) has hooks: enable what torch.compile returns"  # type: ignore[attr-defined]
    return opaque(function)


class _Inside(_Enabled):
    """The same for calls made inside one model, whose hooks hold it. A copy of the model is given one of its own."""

    @_hook
    def enter(self, module: torch.nn.Module, args: Any) -> None:
        """The model's first hook."""
        if self.layer is not None:
            scope.enter(self, _caller(sys._getframe(1)))

    @_hook
    def leave(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        """The model's last hook, which is called after an error too."""
        scope.leave(self, _caller(sys._getframe(1)), outputs)

    def __reduce__(self) -> Any:
        return _copied, (self.selection, self.block)


class _Layer(chain.Layer):
    """Our kernels of convolutions, and what was asked for while they were on top.

    Attributes:
        chosen: what holds for all calls; None where that depends on the model that they are made in, or nothing holds.
        process, inside: what was asked for.
        empty: whether there is no device to have kernels for.
    """

    def __init__(self, stacklevel: int) -> None:
        self.chosen: Choice | None = None
        self.process: tuple[_Enabled, ...] = ()
        self.inside: weakref.WeakSet[_Inside] = weakref.WeakSet()
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
        """Begins or ends to take what is asked for."""
        one.layer = self if holds else None
        if not isinstance(one, _Inside):
            self.process = (*self.process, one) if holds else tuple(other for other in self.process if other is not one)
        elif holds:
            self.inside.add(one)
        else:
            self.inside.discard(one)
        selections = [one.selection for one in self.process]
        alike = EVERYTHING in selections or (selections and not self.inside)  # whatever model a call is made in
        self.chosen = choice(selections) if alike else None
        self.forget()

    def look(self) -> Choice | None:
        """What holds for the running call; None if nothing does."""
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
        """Looks anew at what holds, and lets go of models that are gone."""
        self._known = BoundedCache()


def _kernels(layer: _Layer, device: str) -> dict[tuple[str, str], Any]:
    """Our kernels for a device, by operator and dispatch key."""
    if device == "cuda" and not torch.cuda._is_compiled():
        raise Fallback("this torch is built without GPUs")
    entry.kernels_for(device)
    from tconv.dispatch import aten

    ours: dict[str, Callable[..., Any]] = {"_convolution": aten.convolution, "convolution_backward": aten.convolution_backward}
    return {(operator, device.upper()): functools.partial(function, layer) for operator, function in ours.items()}


def _begin(stacklevel: int, model: Any, block: bool, operations: Any, ranks: Any, dtypes: Any) -> _Enabled:
    """`enable()`, for a caller so many frames up from where a warning is given."""
    _check("enabled" if block else "enable", model)
    selection = select(operations, ranks, dtypes)
    if model is PROCESS:
        one = _Enabled(selection, block)
        _open(one, stacklevel)
        return one
    inside = _Inside(selection, block)
    _open(inside, stacklevel)
    try:
        model.register_forward_pre_hook(inside.enter, prepend=True)
        model.register_forward_hook(inside.leave, always_call=True)
    except BaseException:  # of a module that takes no hooks
        _close(inside)
        _unhook(model, inside)
        raise
    return inside


def _check(function: str, model: Any) -> None:
    if model is not PROCESS and not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"tconv.{function}() wants a torch.nn.Module, or none for the whole process; it was given {what}")


def _open(one: _Enabled, stacklevel: int) -> None:
    with chain.lock:
        _tidy()
        if not _layers or not _layers[-1].on_top():
            _layers.append(_Layer(stacklevel))
        _layers[-1].change(one, True)
        _tidy()


def _close(one: _Enabled) -> None:
    with chain.lock:
        if one.layer is not None:
            one.layer.change(one, False)
            _tidy()


def _tidy() -> None:
    """Takes out kernels that serve nothing, unless others are on top of them, and follows whether models are enabled."""
    global _nodes
    for layer in _layers:
        layer.forget()
    while _layers and not _layers[-1].process and not _layers[-1].inside and _layers[-1].on_top():
        _layers.pop().remove()
    if not any(layer.inside for layer in _layers):
        if _nodes is not None and _nodes.on_top():
            _nodes.remove()
            _nodes = None
    elif _nodes is None:
        devices = {below.key for layer in _layers for below in layer.kernels}
        kernels = [(operator, f"Autograd{device}") for operator in MADE_BY for device in devices]
        # Under a dispatch mode torch takes the wrong one of two kernels of autograd's that are written in Python.
        _nodes = chain.Layer({kernel: scope.marking for kernel in kernels if chain.torchs_own(*kernel)})


def _process() -> list[_Enabled]:
    return [one for layer in _layers for one in layer.process]


def _hooked(model: torch.nn.Module) -> list[_Enabled]:
    """What is asked for inside a model, the oldest first; the last hook is run first."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in reversed(owners) if isinstance(owner, _Inside) and owner.layer is not None]


def _unhook(model: torch.nn.Module, one: _Enabled) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is one]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _caller(frame: FrameType) -> FrameType:
    """The frame that called a hook, but for dynamo's, which has ended when the hook has."""
    while DYNAMO in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _copied(selection: Selection, block: bool) -> _Inside:
    """What the hooks of a copied or unpickled model hold: enabled as well, but not by a block, which ends here."""
    inside = _Inside(selection, block)
    if not block:
        _open(inside, 4)
    return inside


if hasattr(os, "register_at_fork"):  # a child inherits a whole state, and a lock that nobody holds
    os.register_at_fork(before=chain.lock.acquire, after_in_parent=chain.lock.release, after_in_child=chain.lock.release)
