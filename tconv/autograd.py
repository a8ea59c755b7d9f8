"""Three bilinear operations, closed under differentiation, and the bias gradient.

    operation        in its first argument   in its second
    fprop(x, w)      dgrad(g, w)             wgrad(g, x)
    dgrad(dy, w)     fprop(g, w)             wgrad(dy, g)
    wgrad(dy, x)     fprop(x, g)             dgrad(dy, g)

so gradients of any order are these three again, and only what is asked for is computed. fprop and dgrad are one function
here, `convolve`, since each is the other read backwards. In a context that a kernel cannot take part in (a functorch
transform, a batched gradient, a mode, a subclass) an operation is spelled in torch's operators, which differentiate further
on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tconv import launch
from tconv.arguments import Prepared
from tconv.guard import unusual
from tconv.layout import LIMIT, addressing
from tconv.problem import Geometry
from tconv.record import Call, Declined, note

MaybeTensor = torch.Tensor | None
How = tuple[bool, Geometry, Prepared]  # whether transposed, and the launch of the forward pass


def convolve(
    transposed: bool, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, g: Geometry, shared: launch.Staged | None = None
) -> torch.Tensor:
    """fprop of a problem, x -> y, or, transposed, its dgrad, x being dy; differentiable in x, w and b."""
    prepared = launch.convolution(transposed, g, x, w, b)
    if _differentiable(x, w, b):
        return apply_convolve(x, w, b, (transposed, g, prepared))
    return launch.convolve(prepared, x, w, b, g.dry, shared)


def wgrad(dy: torch.Tensor, x: torch.Tensor, g: Geometry, shared: launch.Staged | None = None) -> torch.Tensor:
    """dw of a problem, differentiable in dy and x."""
    return _apply_wgrad(dy, x, g) if _differentiable(dy, x) else launch.wgrad(g, dy, x, shared)


def bias_grad(dy: torch.Tensor, g: Geometry) -> torch.Tensor:
    """db, the sum of an output's gradient over batch and pixels, differentiable."""
    return _apply_bias_grad(dy, g) if _differentiable(dy) else launch.bias_grad(g, dy)


def _differentiable(*tensors: MaybeTensor) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _apply(function: type[torch.autograd.Function]) -> Callable[..., torch.Tensor]:
    """`Function.apply` less its handling of functorch, in whose transforms no kernel runs."""
    apply: Callable[..., torch.Tensor] = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)
    return apply


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, how: How) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.how = how
        _, g, prepared = how
        return launch.convolve(prepared, x, w, b, g.dry)

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors  # also where they are not needed: edited in place, they must raise
        if dy is None:
            return None, None, None, None
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        transposed, g, _ = ctx.how
        op, shared = _operations(dy, x, w), launch.Staged(dy)
        dx = op.convolve(not transposed, dy, w, None, g, shared) if need_x else None
        dw = None
        if need_w:
            dw = op.wgrad(x, dy, g, shared) if transposed else op.wgrad(dy, x, g, shared)
        return dx, dw, op.bias_grad(dy, g) if need_b else None, None


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x)
        ctx.geometry = g
        return launch.wgrad(g, dy, x)

    @staticmethod
    def backward(ctx: Any, gw: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        dy, x = ctx.saved_tensors
        if gw is None:
            return None, None, None
        need_y, need_x, _ = ctx.needs_input_grad
        op, g = _operations(gw, dy, x), ctx.geometry
        if addressing(gw).reach > LIMIT:  # as a weight it is addressed in 32 bits
            gw = gw.contiguous()
        return (
            op.convolve(False, x, gw, None, g) if need_y else None,
            op.convolve(True, dy, gw, None, g) if need_x else None,
            None,
        )


class _BiasGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape = dy.shape
        return launch.bias_grad(g, dy)

    @staticmethod
    def backward(ctx: Any, gb: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        if gb is None:
            return None, None
        return gb.view(1, -1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


apply_convolve, _apply_wgrad, _apply_bias_grad = map(_apply, (_Convolve, _Wgrad, _BiasGrad))


def _operations(*tensors: torch.Tensor) -> type[_Ours] | _Torch:
    return _UNUSUAL if unusual(*tensors) else _Ours


def _or_torch(name: str, ours: Callable[..., torch.Tensor]) -> Any:
    """An operation by tconv's kernels, or by torch where they decline at the last moment."""

    def operation(*args: Any) -> torch.Tensor:
        try:
            return ours(*args)
        except Declined as e:
            y: torch.Tensor = getattr(_Torch(str(e)), name)(*args)
            return y

    return staticmethod(operation)


class _Ours:
    """The operations by tconv's kernels."""

    convolve = _or_torch("convolve", convolve)
    wgrad = _or_torch("wgrad", wgrad)
    bias_grad = _or_torch("bias_grad", bias_grad)


class _Torch:
    """The same operations in torch's own differentiable operators.

    Torch pads both ends alike and derives y's extents from x's. A problem may pad its ends differently ("same" with an
    even kernel) or leave the end of x unread, so x is padded and cropped here to exactly what is read, and aten's own
    padding is zero.

    Args:
        reason: why, for the record.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def _spelled(self, operator: str, g: Geometry) -> tuple[Any, ...]:
        """aten's parameters after the tensors."""
        note(Call(operator, g.problem, None, self.reason))
        p = g.problem
        skip = 3 - p.rank
        return p.S[skip:], (0,) * p.rank, p.D[skip:], False, (0,) * p.rank, p.G

    @staticmethod
    def _widths(g: Geometry) -> list[int]:
        """Extents of what the problem reads, halo included; x's first element is the P-th of it."""
        p = g.problem
        return [(y - 1) * s + d * (t - 1) + 1 for y, s, d, t in zip(p.Y, p.S, p.D, p.T, strict=True)][3 - p.rank :]

    @staticmethod
    def _read(x: torch.Tensor, g: Geometry) -> torch.Tensor:
        """x as the problem reads it."""
        padding = g.problem.P[3 - g.problem.rank :]
        for i, (width, before) in enumerate(zip(_Torch._widths(g), padding, strict=True)):
            x = _window(x, 2 + i, before, 0, width)
        return x

    @staticmethod
    def _written(dx: torch.Tensor, g: Geometry) -> torch.Tensor:
        """The gradient of x from that of `_read(x)`."""
        padding = g.problem.P[3 - g.problem.rank :]
        for i, (extent, before) in enumerate(zip(g.problem.shape("x")[2:], padding, strict=True)):
            dx = _window(dx, 2 + i, 0, before, extent)
        return dx

    def convolve(
        self, transposed: bool, x: torch.Tensor, w: torch.Tensor, _: None, g: Geometry, shared: object = None
    ) -> torch.Tensor:
        if not transposed:
            y: torch.Tensor = torch.ops.aten.convolution(_Torch._read(x, g), w, None, *self._spelled("aten::convolution", g))
            return y
        like = w.new_zeros(()).expand(*g.problem.shape("x")[:2], *_Torch._widths(g))
        parameters = self._spelled("aten::convolution_backward", g)
        grads = torch.ops.aten.convolution_backward(x, like, w, None, *parameters, (True, False, False))
        return _Torch._written(grads[0], g)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor, g: Geometry, shared: object = None) -> torch.Tensor:
        like = x.new_zeros(()).expand(g.problem.shape("w"))
        parameters = self._spelled("aten::convolution_backward", g)
        grads = torch.ops.aten.convolution_backward(dy, _Torch._read(x, g), like, None, *parameters, (False, True, False))
        dw: torch.Tensor = grads[1]
        return dw

    def bias_grad(self, dy: torch.Tensor, g: Geometry) -> torch.Tensor:
        note(Call("aten::sum", g.problem, None, self.reason))
        return dy.sum([0, *range(2, dy.dim())])


_UNUSUAL = _Torch("a gradient in an unusual context")


def _window(t: torch.Tensor, dim: int, before: int, start: int, length: int) -> torch.Tensor:
    """`length` elements of a dimension from `start` on, after zeros have been put before it, and behind it as needed."""
    behind = max(0, start + length - before - t.shape[dim])
    if before or behind:
        t = torch.nn.functional.pad(t, [0, 0] * (t.dim() - 1 - dim) + [before, behind])
    return t.narrow(dim, start, length)
