"""Causal depthwise convolutions of sequences as registered torch operators, which torch.compile and tracing keep whole, and
which autograd differentiates.

    causal_conv1d         y, and the next states: an empty tensor unless `with_next`
    causal_conv1d_grad    the gradients of x, w, b and the states; empty tensors for those that are not needed
    causal_conv1d_update  y of a decode step, which changes the states in place

Functorch's transforms and forward-mode differentiation take the first one apart, and so do gradients of gradients: what they
make of PyTorch's own functions is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tconv.dispatch import sequences
from tconv.dispatch.context import PLAIN, plain, taken_apart
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.operators import LIBRARY, register
from tconv.dispatch.support import unavailable
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import like_sequences
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.causal import TAPS

MaybeTensor = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
SEQUENCES = "Tensor x, Tensor w, Tensor? b, Tensor? state, Tensor? index, Tensor? starts, str activation"
SCHEMAS = {
    "causal_conv1d": f"({SEQUENCES}, bool with_next) -> (Tensor, Tensor)",
    "causal_conv1d_grad": f"(Tensor? dy, Tensor? dnext, {SEQUENCES}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "causal_conv1d_update": "(Tensor x, Tensor(a!) state, Tensor w, Tensor? b, Tensor? seen, Tensor? slots, str activation)"
    " -> Tensor",
}


# What the operators do


def _kernels(x: torch.Tensor, w: torch.Tensor) -> Any:
    """Returns the module that launches the kernels.

    Raises:
        Fallback: there are none for these tensors.
    """
    dry = DRY.get()
    why = unavailable("cuda" if dry and dry.device else x.device.type)
    if why:
        raise Fallback(why)
    if not x.numel():
        raise Fallback("a tensor without elements")
    if w.shape[1] > TAPS:
        raise Fallback(f"{w.shape[1]} taps, more than {TAPS}")
    from tconv.launching import causal

    return causal


def _plain(tensors: list[Any]) -> list[Any]:
    return [None if t is None else plain(t) for t in tensors]


def run(*args: Any) -> Pair:
    """Runs `causal_conv1d` by tconv's kernels, or falls back to torch."""
    *given, activation, with_next = args
    x, w, b, state, index, starts = _plain(given)
    try:
        kernels = _kernels(x, w)
        y, after = kernels.forward(kernels.Sequences(x, w, b, state, index, starts, activation), with_next)
        return y, x.new_empty(0) if after is None else after
    except Fallback as e:
        why = str(e)
    record_call(Call("causal_conv1d", None, None, why))  # outside `except`: the exception's frames hold memory
    y, after = sequences.forward(x, w, b, state, index, starts, activation, with_next)
    return _laid_out(y, x), _laid_out(after, x) if with_next else after


def _grad_run(*args: Any) -> Four:
    """Runs `causal_conv1d_grad` by tconv's kernels, or falls back to torch."""
    *given, activation, needs = args
    dy, dnext, x, w, b, state, index, starts = _plain(given)
    try:
        kernels = _kernels(x, w)
        s = kernels.Sequences(x, w, b, state, index, starts, activation)
        du, nothing = kernels.laid_out(torch.zeros_like(x) if dy is None else dy, x), x.new_empty(0)
        dx = dw = db = dstate = nothing
        if needs[1] or needs[2] or activation:
            du, dw, db = kernels.weight_gradients(s, du)
        if needs[0] or needs[3]:
            dx, dstate = kernels.input_gradients(s, du, dnext, needs[3])
        return (
            dx if needs[0] else nothing,
            w.new_empty(w.shape).copy_(dw) if needs[1] else nothing.clone(),  # both are parts of the same sums
            b.new_empty(b.shape).copy_(db) if needs[2] else nothing.clone(),
            dstate if needs[3] else nothing.clone(),
        )
    except Fallback as e:
        why = str(e)
    record_call(Call("causal_conv1d gradient", None, None, why))  # outside `except`, as above
    dx, dw, db, dstate = sequences.gradients(dy, dnext, x, w, b, state, index, starts, activation, needs)
    return _laid_out(dx, x) if needs[0] else dx, dw, db, _laid_out(dstate, x) if needs[3] else dstate


def update(*args: Any) -> torch.Tensor:
    """Runs `causal_conv1d_update` by tconv's kernel, or falls back to torch."""
    *given, activation = args
    x, state, w, b, seen, slots = _plain(given)
    try:
        kernels = _kernels(x, w)
        y: torch.Tensor = kernels.step(kernels.Sequences(x, w, b, state, None, None, activation), seen, slots)
        return y
    except Fallback as e:
        why = str(e)
    record_call(Call("causal_conv1d_update", None, None, why))  # outside `except`, as above
    return _laid_out(sequences.update(x, state, w, b, seen, slots, activation), x)


def _laid_out(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns t as it lies beside x: itself, or a copy."""
    like = like_sequences(x, tuple(t.shape))
    return t if t.stride() == like.stride() else like.copy_(t)


def _fake(x: Any, w: Any, b: Any, state: Any, index: Any, starts: Any, activation: str, with_next: bool) -> Pair:
    if DRY.get():
        return run(x, w, b, state, index, starts, activation, with_next)
    count = x.shape[0] if starts is None else starts.shape[0] - 1
    after = like_sequences(x, (count, x.shape[1], w.shape[1] - 1)) if with_next else x.new_empty(0)
    return like_sequences(x, tuple(x.shape)), after


def _grad_fake(dy: Any, dnext: Any, x: Any, w: Any, b: Any, state: Any, index: Any, starts: Any, *rest: Any) -> Four:
    if DRY.get():
        return _grad_run(dy, dnext, x, w, b, state, index, starts, *rest)
    _, needs = rest
    return (
        like_sequences(x, tuple(x.shape)) if needs[0] else x.new_empty(0),
        w.new_empty(w.shape) if needs[1] else x.new_empty(0),
        b.new_empty(b.shape) if needs[2] else x.new_empty(0),
        like_sequences(x, tuple(state.shape)) if needs[3] else x.new_empty(0),
    )


def _update_fake(x: Any, *_: Any) -> torch.Tensor:
    return like_sequences(x, tuple(x.shape))


# Differentiation


class _Differentiable(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, keys: Any, x: Any, w: Any, b: Any, state: Any, index: Any, starts: Any, *rest: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, b, state, index, starts)
        ctx.activation, with_next = rest
        with torch._C._AutoDispatchBelowAutograd():
            y, after = CAUSAL.redispatch(keys & torch._C._after_autograd_keyset, x, w, b, state, index, starts, *rest)
        if not with_next:
            ctx.mark_non_differentiable(after)
        return y, after

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, dnext: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # two gradients, not any number
        saved = ctx.saved_tensors  # read once, as checkpoints want it; it raises if they were edited in place
        if dy is None and dnext is None:
            return (None,) * 9
        dy, dnext = (t if t is None or type(t) in PLAIN else plain(t) for t in (dy, dnext))
        needs = list(ctx.needs_input_grad[1:5])
        grads = GRAD(dy, dnext, *saved, ctx.activation, needs)
        return None, *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None


_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Differentiable)


def _wants_gradient(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args)


def _autograd(keys: Any, *args: Any) -> Any:
    if taken_apart():
        return sequences.forward(*args)
    if _wants_gradient(*args):
        return _apply(keys, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return CAUSAL.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _grad_autograd(keys: Any, *args: Any) -> Any:
    if torch._C._are_functorch_transforms_active() or _wants_gradient(*args):
        return sequences.gradients(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return GRAD.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _below_autograd(keys: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return UPDATE.redispatch(keys & torch._C._after_autograd_keyset, *args)


CAUSAL = register("causal_conv1d", SCHEMAS["causal_conv1d"], run, _fake, _autograd)
GRAD = register("causal_conv1d_grad", SCHEMAS["causal_conv1d_grad"], _grad_run, _grad_fake, _grad_autograd)
UPDATE = register("causal_conv1d_update", SCHEMAS["causal_conv1d_update"], update, _update_fake, _below_autograd)
for _operator, _by_torch in ((CAUSAL, sequences.forward), (GRAD, sequences.gradients), (UPDATE, sequences.update)):
    LIBRARY.impl(_operator._opname, opaque(_by_torch), "FuncTorchBatched")  # whose functions have rules
WAYS: dict[str, tuple[Callable[..., Any], ...]] = {  # what computes a call by kernels, the operator, and PyTorch's functions
    "causal_conv1d": (run, CAUSAL, sequences.forward),
    "causal_conv1d_update": (update, UPDATE, sequences.update),
}
