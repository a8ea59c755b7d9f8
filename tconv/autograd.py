"""The three operations and the bias gradient as autograd's plain calls: the table of ops.py over launches of kernels.

fprop and dgrad are one function here, `convolve`, since each is the other read backwards. In a context that a kernel cannot
take part in (a functorch transform, a batched gradient, a mode, a subclass) a gradient is made of the registered operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tconv import launch, ops
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
        transposed, g, _ = ctx.how
        name = "dgrad" if transposed else "fprop"
        return *ops.gradients(_operations(g, dy, x, w), name, dy, x, w, ctx.needs_input_grad[:3]), None


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
        g = ctx.geometry
        if addressing(gw).reach > LIMIT:  # as a weight it is addressed in 32 bits
            gw = gw.contiguous()
        need_y, need_x, _ = ctx.needs_input_grad
        return ops.gradients(_operations(g, gw, dy, x), "wgrad", gw, dy, x, (need_y, need_x, False))


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


def _operations(g: Geometry, dy: torch.Tensor, *saved: torch.Tensor) -> _Ours | ops.Operators:
    # Compiled autograd traces backward passes, those of eager forward ones too.
    return ops.Operators(ops.window(g)) if is_dynamo_compiling() or unusual(dy, *saved) else _Ours(g, dy)


class _Ours:
    """The operations by tconv's kernels, or, where they decline at the last moment, by the operators, which ask again.

    Args:
        g: the geometry.
        dy: a gradient that several of them take.
    """

    __slots__ = ("g", "shared")

    def __init__(self, g: Geometry, dy: torch.Tensor) -> None:
        self.g = g
        self.shared = launch.Staged(dy)

    def fprop(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        try:
            return convolve(False, x, w, None, self.g, self.shared)
        except Declined:
            return ops.Operators(ops.window(self.g)).fprop(x, w)

    def dgrad(self, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        try:
            return convolve(True, dy, w, None, self.g, self.shared)
        except Declined:
            return ops.Operators(ops.window(self.g)).dgrad(dy, w)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        try:
            return wgrad(dy, x, self.g, self.shared)
        except Declined:
            return ops.Operators(ops.window(self.g)).wgrad(dy, x)

    def bias_grad(self, dy: torch.Tensor) -> torch.Tensor:
        try:
            return bias_grad(dy, self.g)
        except Declined as e:
            note(Call("aten::sum", self.g.problem, None, str(e)))
            return ops.Operators(ops.window(self.g)).bias_grad(dy)
