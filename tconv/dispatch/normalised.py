"""Normalisations as a torch.autograd.Function that launches tconv's kernels.

What is kept is x, and of groups the mean and 1/sqrt(variance + eps). The backward pass computes the normalised x and the
activation's argument again from these. Where gradients of gradients are wanted, or a kernel cannot be launched, PyTorch's
differentiable functions take the place of the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tconv.dispatch.autograd import apply_of
from tconv.dispatch.chain_rule import FORMULAS
from tconv.dispatch.context import PLAIN, plain, why_ineligible
from tconv.dispatch.derivatives import wanted
from tconv.dispatch.dynamo import opaque
from tconv.launching import normalise as launching
from tconv.launching.arguments import accumulator
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.normalise import Normalisation

MaybeTensor = torch.Tensor | None
Gradients = tuple[MaybeTensor, MaybeTensor, MaybeTensor]


def normalise(n: Normalisation, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> torch.Tensor:
    """Returns y. Differentiable in x, w and b.

    Raises:
        Fallback: a kernel cannot be launched.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return _apply(x, w, b, n)
    return launching.forward(n, x, w, b)[0]


class _Normalise(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor, n: Normalisation) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        y, stats = launching.forward(n, x, w, b)
        ctx.save_for_backward(x, w, b, stats)
        ctx.n = n
        return y

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # one gradient, not any number
        x, w, b, stats = ctx.saved_tensors  # read even if unused: this raises if they were edited in place
        if dy is None:
            return (None,) * 4
        n, needs = ctx.n, wanted(ctx, ctx.needs_input_grad[:3])
        if type(dy) not in PLAIN:
            dy = plain(dy)
        found: Gradients | None = None
        if not torch.is_grad_enabled() and not is_dynamo_compiling() and not why_ineligible(dy, x):
            try:
                found = launching.backward(n, _laid_out(dy, n), x, stats, w, b, needs[0])
            except Fallback as e:
                record_call(Call(f"{n.operation} gradient", n, None, str(e)))
        if found is None:
            found = by_formulas(n, dy, x, w, b)
        return *(t if need else None for t, need in zip(found, needs, strict=True)), None


_apply = apply_of(_Normalise)


def _laid_out(dy: torch.Tensor, n: Normalisation) -> torch.Tensor:
    """Returns dy without gaps, in the memory format of y."""
    strides = launching.shaped_as(n, "y", dy.dtype).stride()
    same = all(e == 1 or a == b for e, a, b in zip(dy.shape, dy.stride(), strides, strict=True))
    return dy if same else dy.new_empty_strided(dy.shape, strides).copy_(dy)


def by_formulas(n: Normalisation, dy: torch.Tensor, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Gradients:
    """Returns the gradients of x, w and b by PyTorch's differentiable functions."""
    for d in range(2, dy.dim()):
        dy = dy.narrow(d, n.before[d - dy.dim()], x.shape[d])
    wide, channel = accumulator(x.dtype), (-1, *(1,) * (x.dim() - 2))

    def mean(t: torch.Tensor) -> torch.Tensor:
        """The mean over what is normalised together, in t's shape."""
        if n.rms:
            return t.mean(1, keepdim=True)
        of_groups = t.reshape(n.N, n.G, -1)
        return of_groups.mean(-1, keepdim=True).expand(of_groups.shape).reshape(t.shape)

    v = x.to(wide) if n.rms else x.to(wide) - mean(x.to(wide))
    scale = (mean(v * v) + n.eps).rsqrt()
    h = v * scale
    own = h.new_ones(()) if w is None else w.to(wide).view(channel)
    z = h * own if b is None else h * own + b.to(wide).view(channel)
    g = FORMULAS[n.activation](dy.to(wide), z, 0.0, False)
    but_channels = [d for d in range(x.dim()) if d != 1]
    dw = None if w is None else (g * h).sum(but_channels).to(w.dtype)
    db = None if b is None else g.sum(but_channels).to(b.dtype)
    g = g * own
    dx = g - h * mean(g * h) if n.rms else g - mean(g) - h * mean(g * h)
    return (dx * scale).to(x.dtype), dw, db
