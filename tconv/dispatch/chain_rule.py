"""The gradients of a convolution with an epilogue, whatever computes its parts: kernels, or registered operators.

The gradient of the activation's argument, dz, comes first, from that of the result. The convolution's own is du = dz * scale,
and its gradients are those of any convolution. If scale or shift requires a gradient, they are made of dz instead:

    dx = dgrad(dz, w * scale)    dw = wgrad(dz, x) * scale    db = dshift * scale
    dshift = the sum of dz over pixels    dscale = the sum of w * wgrad(dz, x) over a filter, + b * dshift

which is the sum of dz times the convolution's result, without that result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tconv.dispatch.derivatives import gradients
from tconv.planning.epilogue import Epilogue

MaybeTensor = torch.Tensor | None
# (epilogue, gradient of the result, activation's result or argument, scale, whether the residual's gradient is needed, whether
# the bias's is) -> the gradients of the convolution's result, of the residual and of the bias, in one pass over memory; None
# for those not needed.
OnePass = Callable[[Epilogue, torch.Tensor, MaybeTensor, MaybeTensor, bool, bool], Sequence[MaybeTensor] | None]
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


def all_gradients(
    operations: Callable[[torch.Tensor], Any],
    one_pass: OnePass | None,
    transposed: bool,
    groups: int,
    epilogue: Epilogue,
    dy: MaybeTensor,
    dv: MaybeTensor,
    v: MaybeTensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    scale: MaybeTensor,
    needs: Sequence[bool],
) -> tuple[MaybeTensor, ...]:
    """Returns the gradients of x, w, b, residual, scale and shift, None for those not needed.

    Args:
        operations: returns what computes the convolution's gradients (see `gradients`), given that of its result.
        one_pass: a kernel for the epilogue's; None if PyTorch's differentiable functions are to be used.
        dy: the gradient of the result, None if there is none.
        dv: that of the activation's argument, where that was differentiated itself.
        v: the activation's result if `epilogue.by_result`, else its argument; None without an activation.
        b: the bias, where the scale's gradient is needed.
        needs: which of the six are needed.
    """
    name, apart = "dgrad" if transposed else "fprop", needs[4] or needs[5]
    factor = None if apart else scale
    inner = dataclasses.replace(epilogue, scale=factor is not None)
    before = needs[3] and epilogue.residual == "before"
    found: Sequence[MaybeTensor] | None = None
    if one_pass is not None and dy is not None and dv is None and (inner.activation or inner.scale):
        found = one_pass(inner, dy, v, factor, before and inner.scale, needs[2] or apart)
    du, dz, sums = found or (None, None, None)
    if du is None:
        dz = argument_gradient(inner, dy, dv, v)
        du = dz if factor is None else per_channel(dz, factor)
    elif dz is None:  # without a scale they are the same
        dz = du
    dr = None if not needs[3] else dy if epilogue.residual == "after" else dz
    op = operations(du)
    if sums is None and (apart or needs[2]):
        sums = gradients(op, name, du, x, w, (False, False, True))[2]
    if factor is scale:
        dx, dw, _ = gradients(op, name, du, x, w, (*needs[:2], False))
        return dx, dw, sums if needs[2] else None, dr, None, sums if needs[5] else None
    assert scale is not None
    assert sums is not None
    wide = torch.promote_types(w.dtype, torch.float32)
    weights, factors = w.unflatten(0, (groups, -1)), scale.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]  # untyped in torch
    axis = 2 if transposed else 1  # of a group's channels in the result
    factors = factors.view(groups, *(-1 if d == axis else 1 for d in range(1, weights.dim())))
    dx = dw = dscale = None
    if needs[0]:
        dx = gradients(op, name, du, x, (weights * factors).to(w.dtype).flatten(0, 1), (True, False, False))[0]
    if needs[1] or needs[4]:
        of_w = gradients(op, name, du, x, w, (False, True, False))[1]
        split = of_w.unflatten(0, (groups, -1))
        dw = (split * factors).to(w.dtype).flatten(0, 1)
        rest = [d for d in range(1, weights.dim()) if d != axis]
        dscale = (weights.to(wide) * split).sum(rest).flatten()
        dscale = (dscale if b is None else dscale + b * sums).to(scale.dtype)
    return (
        dx, dw if needs[1] else None, (sums * scale).to(sums.dtype) if needs[2] else None, dr,
        dscale if needs[4] else None, sums if needs[5] else None,
    )  # fmt: skip


def argument_gradient(e: Epilogue, dy: MaybeTensor, dv: MaybeTensor, v: MaybeTensor) -> torch.Tensor:
    """Returns the gradient of the activation's argument by PyTorch's differentiable functions. As in `all_gradients`."""
    if dy is None:
        assert dv is not None
        return dv
    dz = dy if v is None else FORMULAS[e.activation](dy, v, e.slope, e.by_result)
    return dz if dv is None else dz + dv


def per_channel(t: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns t (N, K, *spatial) times a factor per channel, in t's dtype."""
    return (t * factor.view(-1, *(1,) * (t.dim() - 2))).to(t.dtype)
