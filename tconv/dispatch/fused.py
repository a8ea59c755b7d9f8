"""Convolutions with an epilogue, as a torch.autograd.Function that launches tconv's kernels.

What is kept for the gradient of the activation is its result where that is enough (relu, leaky_relu, sigmoid, tanh), else its
argument, which the kernel writes beside the result. With `recompute` the argument is not kept but computed again.

The backward pass first makes the gradient of the convolution's result, and the bias gradient, in one pass over memory. The
rest is the backward pass of a convolution. Where gradients of gradients are wanted, PyTorch's own differentiable formulas take
the place of that kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from tconv.dispatch import autograd
from tconv.dispatch.context import PLAIN, plain, why_ineligible
from tconv.dispatch.derivatives import gradients, wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.steps import Steps, followed, with_epilogue
from tconv.launching import launch, profiling
from tconv.launching.arguments import Prepared
from tconv.launching.record import Fallback
from tconv.planning.epilogue import Epilogue
from tconv.planning.problem import Geometry

MaybeTensor = torch.Tensor | None
aten = torch.ops.aten
# The gradient of an activation from g and its result or argument v, as PyTorch differentiates it.
FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor, float, bool], torch.Tensor]] = {
    "": lambda g, *_: g,
    "relu": lambda g, v, *_: aten.threshold_backward(g, v, 0),
    "leaky_relu": lambda g, v, slope, result: aten.leaky_relu_backward(g, v, slope, result),
    "silu": lambda g, v, *_: g * torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v))),  # aten.silu_backward has no derivative
    "gelu": lambda g, v, *_: aten.gelu_backward(g, v),
    "gelu_tanh": lambda g, v, *_: aten.gelu_backward(g, v, approximate="tanh"),
    "sigmoid": lambda g, v, _, result: aten.sigmoid_backward(g, v if result else torch.sigmoid(v)),
    "tanh": lambda g, v, _, result: aten.tanh_backward(g, v if result else torch.tanh(v)),
    "hardswish": lambda g, v, *_: aten.hardswish_backward(g, v),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Forward:
    """A forward pass: its launch, its geometry with the epilogue and without, and the arguments that ask for the epilogue."""

    transposed: bool
    prepared: Prepared
    fused: Geometry
    g: Geometry
    steps: Steps


def convolve(
    transposed: bool,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    residual: MaybeTensor,
    steps: Steps,
    g: Geometry,
) -> torch.Tensor:
    """Returns the result of a convolution with an epilogue. Differentiable in x, w, b and the residual.

    Args:
        transposed: whether it is a transposed one.
        x, w, b, residual: batched tensors of one dtype.
        steps: the arguments that ask for the epilogue.
        g: the geometry without it.
    Raises:
        Fallback: a kernel cannot be launched.
    """
    epilogue = steps.epilogue
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b, residual))
    if differentiable and epilogue.activation and not (epilogue.by_result or steps.recompute):
        epilogue = dataclasses.replace(epilogue, kept=True)
    how = _forward(transposed, x, w, b, steps, g, epilogue)
    event = profiling.begin_call(transposed, g, x, w, b) if profiler._is_profiler_enabled and not g.dry else None
    try:
        if not differentiable:
            return _run(how, x, w, b, residual)[0]
        y: torch.Tensor = _apply(x, w, b, residual, how)[0]
        return y
    finally:
        if event is not None:
            profiling.end(event)


def _forward(
    transposed: bool, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, steps: Steps, g: Geometry, epilogue: Epilogue
) -> _Forward:
    fused = with_epilogue(g, epilogue)
    return _Forward(transposed, launch.convolution(transposed, fused, x, w, b), fused, g, steps)


def _run(
    how: _Forward, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, residual: MaybeTensor
) -> tuple[torch.Tensor, MaybeTensor]:
    """Launches a forward pass. Returns its result, and the activation's argument if that is kept."""
    shape, strides, e = how.prepared.shape, how.prepared.strides, how.fused.epilogue
    if residual is not None:
        residual = _laid_out(residual, strides)
    scale, shift = per_channel(how.steps, x.dtype)
    kept = x.new_empty_strided(shape, strides) if e.kept else None
    given = tuple(x if t is None else t for t in (scale, shift, residual, kept))  # the kernel reads only what there is
    return launch.convolve(how.prepared, x, w, b, how.fused.dry, after=given), kept


def per_channel(steps: Steps, dtype: torch.dtype) -> tuple[MaybeTensor, MaybeTensor]:
    """Returns scale and shift as the kernels read them: contiguous, aligned, and of one dtype."""
    found = [t for t in (steps.scale, steps.shift) if t is not None]
    wide = torch.float32 if any(t.dtype == torch.float32 for t in found) else dtype

    def read(t: MaybeTensor) -> MaybeTensor:
        return None if t is None else _laid_out(t.detach().to(wide), (1,))

    return read(steps.scale), read(steps.shift)


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Returns a tensor with these strides and an aligned address: the tensor itself, or a copy."""
    same = all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True))
    return t if same and not t.data_ptr() & 15 else t.new_empty_strided(t.shape, strides).copy_(t)


class _Fused(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, residual: MaybeTensor, how: _Forward) -> Any:
        ctx.set_materialize_grads(False)
        y, kept = _run(how, x, w, b, residual)
        again = how.steps.recompute and not how.fused.epilogue.by_result
        v = y if how.fused.epilogue.by_result else kept  # None without an activation, and if it is computed again
        ctx.save_for_backward(x, w, v, how.steps.scale, *((b, residual, how.steps.shift) if again else (None,) * 3))
        ctx.how = how
        return y, kept

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, dkept: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, v, scale, b, residual, shift = ctx.saved_tensors  # read even if unused: this raises if they were edited in place
        if dy is None and dkept is None:
            return (None,) * 5
        how, e = ctx.how, ctx.how.fused.epilogue
        needs = wanted(ctx, ctx.needs_input_grad[:4])
        if e.activation and v is None:
            v = _again(how, x, w, b, residual, scale, shift)
        if dy is not None and type(dy) not in PLAIN:
            dy = plain(dy)
        du = dr = db = None
        if (
            dy is not None
            and dkept is None
            and (e.activation or e.scale)
            and not torch.is_grad_enabled()
            and not why_ineligible(dy, x, w)
        ):
            try:
                du, dr, db = _by_kernel(how, dy, v, needs)
            except Fallback:
                du = None
        if du is None:
            dr, du = _by_formulas(how, dy, dkept, v, scale, x)
        more = gradients(
            autograd.operations(how.g, du, x, w), "dgrad" if how.transposed else "fprop", du, x, w,
            (*needs[:2], needs[2] and db is None),
        )  # fmt: skip
        return more[0], more[1], db if more[2] is None else more[2], dr if needs[3] else None, None


_apply = autograd.apply_of(_Fused)


def _by_kernel(how: _Forward, dy: torch.Tensor, v: MaybeTensor, needs: tuple[bool, ...]) -> launch.Gradients:
    """Returns the gradients of the convolution's result, of the residual and of the bias, by tconv's kernel."""
    dy = _laid_out(dy, how.prepared.strides)
    before = needs[3] and how.fused.epilogue.residual == "before"
    scale, _ = per_channel(how.steps, dy.dtype)
    du, dr, db = launch.activation_grad(how.fused, dy, dy if v is None else v, scale, before, needs[2])
    if how.fused.epilogue.residual == "after":
        return du, dy, db
    return du, du if dr is None else dr, db


def _by_formulas(
    how: _Forward, dy: MaybeTensor, dkept: MaybeTensor, v: MaybeTensor, scale: MaybeTensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of the residual and of the convolution's result, by PyTorch's differentiable functions.

    Args:
        dkept: the gradient of the activation's argument, where that was differentiated itself.
    """
    e = how.fused.epilogue
    if dy is None:
        assert dkept is not None
        dz = dkept
    else:
        dz = dy if v is None else FORMULAS[e.activation](dy, v, e.slope, e.by_result)
        dz = dz if dkept is None else dz + dkept
    du = dz if scale is None else (dz * scale.view(-1, *(1,) * (dz.dim() - 2))).to(dz.dtype)
    return dy if e.residual == "after" and dy is not None else dz, du


def _again(
    how: _Forward,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    residual: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
) -> torch.Tensor:
    """Computes the activation's argument again."""
    residual = residual if how.fused.epilogue.residual == "before" else None
    steps = dataclasses.replace(how.steps, activation=None, residual=residual, scale=scale, shift=shift)
    if not torch.is_grad_enabled() and steps.epilogue:
        with contextlib.suppress(Fallback):
            return _run(_forward(how.transposed, x, w, b, steps, how.g, steps.epilogue), x, w, b, residual)[0]
    op = autograd.operations(how.g, x, w)
    y: torch.Tensor = op.dgrad(x, w) if how.transposed else op.fprop(x, w)
    if b is not None:
        y = y + b.view(-1, *(1,) * (y.dim() - 2))
    return followed(y, steps, y.dim() - 2)
