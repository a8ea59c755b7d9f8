"""Three bilinear operations, closed under differentiation, and the bias gradient.

    operation        in its first argument   in its second
    fprop(x, w)      dgrad(g, w)             wgrad(g, x)
    dgrad(dy, w)     fprop(g, w)             wgrad(dy, g)
    wgrad(dy, x)     fprop(x, g)             dgrad(dy, g)

so gradients of any order are these three again. Only what is asked for is computed. In a context that a kernel cannot take
part in (a functorch transform, a batched gradient, a mode, a subclass) the same operation is spelled in torch's operators,
which differentiate further on their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from tconv import launch
from tconv.problem import ConvProblem
from tconv.record import Call, note

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
Optional = torch.Tensor | None


@dataclass(frozen=True)
class Geometry:
    """A problem and the memory format of everything it computes."""

    problem: ConvProblem
    channels_last: bool


def unusual(*tensors: torch.Tensor) -> str | None:
    """Why a kernel must not be run on these tensors right now, or None."""
    if torch._C._are_functorch_transforms_active():
        return "inside a functorch transform"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "inside a dispatch or function mode"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "being traced"
    for t in tensors:
        if type(t) not in PLAIN:
            return f"a tensor subclass, {type(t).__name__}"
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return "a batched gradient"
        if t.layout is not torch.strided or t.is_neg():
            return "not a plain strided tensor"
    return None


def fprop(x: torch.Tensor, w: torch.Tensor, b: Optional, g: Geometry) -> torch.Tensor:
    """y of a problem, differentiable in x, w and b."""
    if _differentiable(x, w, b):
        return _Fprop.apply(x, w, b, g)  # type: ignore[no-any-return, no-untyped-call]
    return launch.fprop(g.problem, x, w, b, g.channels_last)


def dgrad(dy: torch.Tensor, w: torch.Tensor, b: Optional, g: Geometry) -> torch.Tensor:
    """dx of a problem, or a transposed layer's output, differentiable in dy, w and b."""
    if _differentiable(dy, w, b):
        return _Dgrad.apply(dy, w, b, g)  # type: ignore[no-any-return, no-untyped-call]
    return launch.dgrad(g.problem, dy, w, b, g.channels_last)


def wgrad(dy: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
    """dw of a problem, differentiable in dy and x."""
    if _differentiable(dy, x):
        return _Wgrad.apply(dy, x, g)  # type: ignore[no-any-return, no-untyped-call]
    return launch.wgrad(g.problem, dy, x, g.channels_last)


def bias_grad(g_out: torch.Tensor, g: Geometry) -> torch.Tensor:
    """db, the sum of an output's gradient over batch and pixels, differentiable."""
    if _differentiable(g_out):
        return _BiasGrad.apply(g_out, g)  # type: ignore[no-any-return, no-untyped-call]
    return launch.bias_grad(g.problem, g_out)


def _differentiable(*tensors: Optional) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Fprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: Optional, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.geometry = g
        return launch.fprop(g.problem, x, w, b, g.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Optional) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        if dy is None:
            return None, None, None, None
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        op = _Torch if unusual(dy, x, w) else _Ours
        g = ctx.geometry
        return (
            op.dgrad(dy, w, g) if need_x else None,
            op.wgrad(dy, x, g) if need_w else None,
            op.bias_grad(dy, g) if need_b else None,
            None,
        )


class _Dgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, w: torch.Tensor, b: Optional, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, w)
        ctx.geometry = g
        return launch.dgrad(g.problem, dy, w, b, g.channels_last)

    @staticmethod
    def backward(ctx: Any, gx: Optional) -> tuple[Any, ...]:  # type: ignore[override]
        dy, w = ctx.saved_tensors
        if gx is None:
            return None, None, None, None
        need_y, need_w, need_b, _ = ctx.needs_input_grad
        op = _Torch if unusual(gx, dy, w) else _Ours
        g = ctx.geometry
        return (
            op.fprop(gx, w, g) if need_y else None,
            op.wgrad(dy, gx, g) if need_w else None,
            op.bias_grad(gx, g) if need_b else None,
            None,
        )


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x)
        ctx.geometry = g
        return launch.wgrad(g.problem, dy, x, g.channels_last)

    @staticmethod
    def backward(ctx: Any, gw: Optional) -> tuple[Any, ...]:  # type: ignore[override]
        dy, x = ctx.saved_tensors
        if gw is None:
            return None, None, None
        need_y, need_x, _ = ctx.needs_input_grad
        op = _Torch if unusual(gw, dy, x) else _Ours
        g = ctx.geometry
        return op.fprop(x, gw, g) if need_y else None, op.dgrad(dy, gw, g) if need_x else None, None


class _BiasGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g_out: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape = g_out.shape
        return launch.bias_grad(g.problem, g_out)

    @staticmethod
    def backward(ctx: Any, gb: Optional) -> tuple[Any, ...]:  # type: ignore[override]
        if gb is None:
            return None, None
        return gb.view(1, -1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


class _Ours:
    """The operations by tconv's kernels."""

    dgrad = staticmethod(lambda dy, w, g: dgrad(dy, w, None, g))
    fprop = staticmethod(lambda x, w, g: fprop(x, w, None, g))
    wgrad = staticmethod(wgrad)
    bias_grad = staticmethod(bias_grad)


class _Torch:
    """The same operations in torch's own differentiable operators.

    Torch pads both ends alike and derives y's extents from x's. Where a problem differs ("same" with an even kernel, an
    output_padding), x is first padded or cropped to what is read of it.
    """

    @staticmethod
    def _spelled(operator: str, g: Geometry) -> tuple[tuple[Any, ...], list[int]]:
        """aten's parameters after the tensors, and the padding that x needs, in the form torch.nn.functional.pad takes."""
        note(Call(operator, g.problem, None, "a gradient in an unusual context"))
        p = g.problem
        skip = 3 - p.rank
        extra = [
            (y - 1) * s - 2 * q + d * (t - 1) + 1 - x for x, y, s, q, d, t in zip(p.X, p.Y, p.S, p.P, p.D, p.T, strict=True)
        ]
        return (p.S[skip:], p.P[skip:], p.D[skip:], False, (0,) * p.rank, p.G), [
            v for e in reversed(extra[skip:]) for v in (0, e)
        ]

    @staticmethod
    def fprop(x: torch.Tensor, w: torch.Tensor, g: Geometry) -> torch.Tensor:
        parameters, pads = _Torch._spelled("aten::convolution", g)
        y: torch.Tensor = torch.ops.aten.convolution(_pad(x, pads), w, None, *parameters)
        return y

    @staticmethod
    def dgrad(dy: torch.Tensor, w: torch.Tensor, g: Geometry) -> torch.Tensor:
        parameters, pads = _Torch._spelled("aten::convolution_backward", g)
        n, c, *extents = g.problem.shape("x")
        like = w.new_zeros(()).expand(n, c, *(v + e for v, e in zip(extents, reversed(pads[1::2]), strict=True)))
        grads = torch.ops.aten.convolution_backward(dy, like, w, None, *parameters, (True, False, False))
        return _pad(grads[0], [-e for e in pads])

    @staticmethod
    def wgrad(dy: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
        parameters, pads = _Torch._spelled("aten::convolution_backward", g)
        like = x.new_zeros(()).expand(g.problem.shape("w"))
        grads = torch.ops.aten.convolution_backward(dy, _pad(x, pads), like, None, *parameters, (False, True, False))
        dw: torch.Tensor = grads[1]
        return dw

    @staticmethod
    def bias_grad(g_out: torch.Tensor, g: Geometry) -> torch.Tensor:
        note(Call("aten::sum", g.problem, None, "a gradient in an unusual context"))
        return g_out.sum([0, *range(2, g_out.dim())])


def _pad(x: torch.Tensor, pads: list[int]) -> torch.Tensor:
    return torch.nn.functional.pad(x, pads) if any(pads) else x
