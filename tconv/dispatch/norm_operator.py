"""A normalisation with an activation and padding as a registered torch operator, for the contexts of operators.py; and its
gradients as another, which a compiled backward pass calls.

    normalise       the result, and of groups what the backward pass keeps of them: else an empty tensor
    normalise_grad  the gradients of x, w and b; empty tensors for those not asked for, or that there are not

Functorch's transforms (vmap too) and forward-mode differentiation take both apart into PyTorch's functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tconv.dispatch.context import PLAIN, plain, taken_apart
from tconv.dispatch.derivatives import wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.norm_calls import (
    Asked,
    How,
    by_formulas,
    by_torch,
    is_channels_last,
    laid_out,
    normalisation,
    statistics,
)  # fmt: skip
from tconv.dispatch.operators import LIBRARY, register
from tconv.dispatch.support import unavailable
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import shaped
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.normalise import Normalisation

MaybeTensor = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HOW = "SymInt groups, float eps, str activation, SymInt[] before, SymInt[] after"
SCHEMA = f"(Tensor x, Tensor? w, Tensor? b, {HOW}) -> (Tensor, Tensor)"
GRAD_SCHEMA = f"(Tensor dy, Tensor x, Tensor? w, Tensor? b, Tensor stats, bool dx, {HOW}) -> (Tensor, Tensor, Tensor)"


def _asked(how: How) -> tuple[Asked, Any]:
    """Returns a call as `norm_calls` has it: what is asked for, and the zeros around the result by side."""
    sides = tuple(zip(how.before, how.after, strict=True))
    asked = Asked(how.operation, how.groups or None, how.eps, how.activation or None, None)
    return asked, sides if any(how.before) or any(how.after) else None


def in_aten(x: torch.Tensor, w: MaybeTensor, b: MaybeTensor, *rest: Any) -> Pair:
    """Returns what `normalise` returns, by PyTorch's functions."""
    how = How(*rest)
    y = by_torch(*_asked(how), x, w, b)
    if not how.groups:
        return y, _nothing(x)
    return y, statistics(how, x)


def grad_in_aten(
    dy: torch.Tensor, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor, stats: torch.Tensor, dx_needed: bool, *rest: Any
) -> Triple:
    """Returns what `normalise_grad` returns, by PyTorch's differentiable functions."""
    dx, dw, db = by_formulas(How(*rest), dy, x, w, b)
    assert dx is not None
    dx = laid_out(dx, is_channels_last(x)) if dx_needed else x.new_empty(0)
    return dx, x.new_empty(0) if dw is None else dw, x.new_empty(0) if db is None else db


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """Returns what stands for the statistics where there are none."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


# What the operators do


def _fake(x: Any, w: Any, b: Any, *rest: Any) -> Pair:
    how = How(*rest)
    parts = zip(x.shape[2:], how.before, how.after, strict=True)
    like = shaped((*x.shape[:2], *(e + before + after for e, before, after in parts)), is_channels_last(x), x.dtype)
    stats = _nothing(x)
    return x.new_empty_strided(like.shape, like.stride()), stats.new_empty((2, x.shape[0], how.groups)) if how.groups else stats


def _run(x: Any, w: Any, b: Any, *rest: Any) -> Pair:
    """Runs `normalise` by tconv's kernels, or falls back to torch."""
    x, w, b = (None if t is None else plain(t) for t in (x, w, b))
    how = How(*rest)
    try:
        n = _normalisation(how, x, w, b)
        from tconv.launching import normalise as launching

        w, b = (None if t is None else t.contiguous() for t in (w, b))
        y, stats = launching.forward(n, laid_out(x, n.channels_last), w, b)
        return y, _nothing(x) if stats is None else stats
    except Fallback as e:
        why = str(e)
    record_call(Call(how.operation, None, None, why))  # outside `except`: the exception's frames hold memory
    return in_aten(x, w, b, *rest)


def _grad_fake(dy: Any, x: Any, w: Any, b: Any, stats: Any, dx_needed: Any, *rest: Any) -> Triple:
    like = shaped(x.shape, is_channels_last(x), x.dtype)
    dx = x.new_empty_strided(like.shape, like.stride()) if dx_needed else x.new_empty(0)
    dw, db = (x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (w, b))
    return dx, dw, db


def _grad_run(dy: Any, x: Any, w: Any, b: Any, stats: Any, dx_needed: Any, *rest: Any) -> Triple:
    """Runs `normalise_grad` by tconv's kernels, or falls back to torch."""
    dy, x, w, b, stats = (None if t is None else plain(t) for t in (dy, x, w, b, stats))
    how = How(*rest)
    try:
        n = _normalisation(how, x, w, b)
        from tconv.launching import normalise as launching

        kept = stats.contiguous() if how.groups else None
        if tuple(dy.shape) != n.shape("y") or dy.dtype != x.dtype or (kept is not None and kept.shape != (2, n.N, n.G)):
            raise Fallback(f"a gradient {tuple(dy.shape)} {dy.dtype}, statistics {tuple(stats.shape)}")
        dy, x = (laid_out(t, n.channels_last) for t in (dy, x))
        w, b = (None if t is None else t.contiguous() for t in (w, b))
        found = launching.backward(n, dy, x, kept, w, b, dx_needed)
        dx, dw, db = (x.new_empty(0) if t is None else t for t in found)
        return dx, dw, db
    except Fallback as e:
        why = str(e)
    record_call(Call(f"{how.operation} gradient", None, None, why))  # outside `except`, as above
    return grad_in_aten(dy, x, w, b, stats, dx_needed, *rest)


def _normalisation(how: How, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Normalisation:
    """Returns what a call asks of the kernels.

    Raises:
        Fallback: they do not support it.
    """
    why = unavailable(x.device.type)
    if why:
        raise Fallback(why)
    n, dry = normalisation(*_asked(how), x, w, b), DRY.get()
    return dataclasses.replace(n, dry=True, device=dry.device) if dry else n


# Differentiation


class _Differentiable(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, keys: Any, x: Any, w: Any, b: Any, rest: Any) -> Any:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            y, stats = NORMALISE.redispatch(keys & torch._C._after_autograd_keyset, x, w, b, *rest)
        ctx.how, ctx.given = How(*rest), [t is not None for t in (x, w, b)]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, w, b, stats)
        return y, stats

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]  # two gradients, not any number
        x, w, b, stats = ctx.saved_tensors
        if dy is None:
            return (None,) * 5
        if type(dy) not in PLAIN:
            dy = plain(dy)
        needs = wanted(ctx, ctx.needs_input_grad[1:4], ctx.given)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            found: Any = by_formulas(ctx.how, dy, x, w, b)
        else:
            found = GRAD(dy, x, w, b, stats, needs[0], *ctx.how)
        return None, *(t if need else None for t, need in zip(found, needs, strict=True)), None


_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Differentiable)


def _autograd(keys: Any, x: Any, w: Any, b: Any, *rest: Any) -> Any:
    if taken_apart():
        return in_aten(x, w, b, *rest)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return _apply(keys, x, w, b, rest)
    with torch._C._AutoDispatchBelowAutograd():
        return NORMALISE.redispatch(keys & torch._C._after_autograd_keyset, x, w, b, *rest)


def _grad_autograd(keys: Any, *args: Any) -> Any:
    if taken_apart() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])):
        return grad_in_aten(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return GRAD.redispatch(keys & torch._C._after_autograd_keyset, *args)


NORMALISE = register("normalise", SCHEMA, _run, _fake, _autograd)
GRAD = register("normalise_grad", GRAD_SCHEMA, _grad_run, _grad_fake, _grad_autograd)
for _name, _parts in (("normalise", in_aten), ("normalise_grad", grad_in_aten)):
    LIBRARY.impl(_name, opaque(_parts), "FuncTorchBatched")  # vmap has rules for what they call
