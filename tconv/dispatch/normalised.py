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
from tconv.dispatch.context import PLAIN, plain, why_ineligible
from tconv.dispatch.derivatives import wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.norm_calls import Gradients, How, by_formulas, laid_out
from tconv.launching import normalise as launching
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.normalise import Normalisation

MaybeTensor = torch.Tensor | None


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
                found = launching.backward(n, laid_out(dy, n.channels_last), x, stats, w, b, needs[0])
            except Fallback as e:
                record_call(Call(f"{n.operation} gradient", n, None, str(e)))
        if found is None:
            skip = 3 - n.rank
            how = How(0 if n.rms else n.G, n.eps, n.activation, n.before[skip:], n.after[skip:])
            found = by_formulas(how, dy, x, w, b)
        return *(t if need else None for t, need in zip(found, needs, strict=True)), None


_apply = apply_of(_Normalise)
