"""fprop, dgrad, wgrad and the bias gradient as torch.autograd.Functions that launch tconv's kernels.

fprop and dgrad share one function, `convolve`, since each is the other's gradient (see the table in derivatives.py). Where a
backward pass cannot launch kernels (a functorch transform, a batched gradient, a mode, a subclass), it calls the registered
operators of operators.py instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import operators
from tconv.dispatch.context import PLAIN, global_state_differs, plain, tensor_guard, why_ineligible
from tconv.dispatch.derivatives import gradients, wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.window import window
from tconv.launching import launch
from tconv.launching.arguments import Prepared
from tconv.launching.record import Call, Fallback, Slower, TransientFallback, record_call
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

MaybeTensor = torch.Tensor | None
KEPT = 4  # how many times a layer's backward is prepared for reuse; every new layout of dy needs another


def convolve(
    transposed: bool, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, g: Geometry, shared: launch.SharedOperand | None = None
) -> torch.Tensor:
    """Returns the fprop of a problem, x -> y, or its dgrad if `transposed`, where `x` is dy. Differentiable in x, w and b."""
    prepared = launch.convolution(transposed, g, x, w, b)
    if _differentiable(x, w, b):
        return apply_convolve(x, w, b, ForwardState(transposed, g, prepared))
    return launch.convolve(prepared, x, w, b, g.dry, shared)


class ForwardState:
    """The prepared launch of a forward pass, and that of its backward pass once it has run.

    Attributes:
        transposed, g, prepared: the forward pass.
        left: how many more times a backward pass may be prepared for reuse; 0 if the call is not expected to be repeated.
        again: the last backward pass prepared for reuse, or None.
    """

    __slots__ = ("again", "g", "left", "prepared", "transposed")

    def __init__(self, transposed: bool, g: Geometry, prepared: Prepared, repeated: bool = False) -> None:
        self.transposed, self.g, self.prepared = transposed, g, prepared
        self.left = KEPT if repeated else 0
        self.again: _CachedBackward | None = None


class _CachedBackward:
    """A prepared backward pass, launched again if the next dy has the same layout.

    It compares what fast_path.FastPath compares for the forward pass, and which gradients are needed.
    """

    __slots__ = ("launches", "needs", "precision", "tensor_guard", "transposed")

    def __init__(self, how: ForwardState, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple[bool, ...]) -> None:
        self.launches = launch.backward(how.transposed, how.g, dy, x, w, needs)
        self.transposed, self.needs = how.transposed, needs
        self.precision = fp32_precision("cuda", "conv")
        self.tensor_guard = tensor_guard(dy, x, w)

    def __call__(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple[bool, ...]) -> launch.Gradients | None:
        """Returns the gradients, or None if the call differs.

        Raises:
            Fallback: a kernel could not be launched. The slow path then records which one.
        """
        if (
            needs != self.needs
            or torch.is_grad_enabled()
            or not self.tensor_guard(dy, x, w)
            or (dy.data_ptr() | x.data_ptr() | w.data_ptr()) & 15
            or global_state_differs(self.precision)
        ):
            return None
        return launch.gradients(self.launches, self.transposed, dy, x, w, dry=False)


def wgrad(dy: torch.Tensor, x: torch.Tensor, g: Geometry, shared: launch.SharedOperand | None = None) -> torch.Tensor:
    """Returns dw of a problem. Differentiable in dy and x."""
    return _apply_wgrad(dy, x, g) if _differentiable(dy, x) else launch.wgrad(g, dy, x, shared)


def bias_grad(dy: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Returns db, the sum of dy over batch and spatial dimensions, one element per channel. Differentiable."""
    return _apply_bias_grad(dy, g) if _differentiable(dy) else launch.bias_grad(g, dy)


def _differentiable(*tensors: MaybeTensor) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., torch.Tensor]:
    """Returns `Function.apply` without its functorch handling, which is not needed: no kernel runs in a functorch transform."""
    apply: Callable[..., torch.Tensor] = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)
    return apply


class _Convolve(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, how: ForwardState) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.how = how
        return launch.convolve(how.prepared, x, w, b, how.g.dry)

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # one gradient, not any number
        x, w = ctx.saved_tensors  # read even if unused: this raises if they were edited in place
        if dy is None:
            return None, None, None, None
        if type(dy) not in PLAIN:
            dy = plain(dy)
        how, needs = ctx.how, wanted(ctx, ctx.needs_input_grad[:3])
        # Compiled autograd also traces the backward of an eager forward.
        traced, repeatable = is_dynamo_compiling(), how.left > 0
        again = how.again  # read once: another thread's backward pass may replace it
        if not traced and again is not None:
            found = None
            try:
                found = again(dy, x, w, needs)
            except TransientFallback:
                repeatable = False  # prepare nothing new; the prepared backward stays
            except Fallback:  # permanent: on every call, kernels that do launch would run here and again below
                how.again, how.left, repeatable = None, 0, False
            if found is not None:
                return *found, None
        ops = operations(how.g, dy, x, w)
        grads = gradients(ops, "dgrad" if how.transposed else "fprop", dy, x, w, needs)
        if not traced and repeatable and type(ops) is _ByKernels and not torch.is_grad_enabled() and forced() is None:
            how.left -= 1
            try:
                how.again = _CachedBackward(how, dy, x, w, needs)
            except Slower:  # torch runs a part of it
                how.left = 0
        return *grads, None


class _Wgrad(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, dy: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x)
        ctx.geometry = g
        return launch.wgrad(g, dy, x)

    @staticmethod
    @opaque
    def backward(ctx: Any, gw: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # one gradient, not any number
        dy, x = ctx.saved_tensors
        if gw is None:
            return None, None, None
        if type(gw) not in PLAIN:
            gw = plain(gw)
        need_y, need_x = wanted(ctx, ctx.needs_input_grad[:2])
        return gradients(operations(ctx.geometry, gw, dy, x), "wgrad", gw, dy, x, (need_y, need_x, False))


class _BiasGrad(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, dy: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape = dy.shape
        return launch.bias_grad(g, dy)

    @staticmethod
    @opaque
    def backward(ctx: Any, gb: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # one gradient, not any number
        if gb is None:
            return None, None
        return plain(gb).view(1, -1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


apply_convolve, _apply_wgrad, _apply_bias_grad = map(apply_of, (_Convolve, _Wgrad, _BiasGrad))


def operations(g: Geometry, dy: torch.Tensor, *saved: torch.Tensor) -> _ByKernels | operators.Operators:
    """Returns what computes the gradients from dy and saved tensors: the kernels where they may run, else the operators."""
    return operators.Operators(window(g)) if is_dynamo_compiling() or why_ineligible(dy, *saved) else _ByKernels(g, dy)


class _ByKernels:
    """The operations by tconv's kernels, each falling back to torch's operators if its kernel cannot be launched.

    Args:
        g: the geometry.
        dy: an operand of several operations, which share its channels_last copy.
    """

    __slots__ = ("g", "shared")

    def __init__(self, g: Geometry, dy: torch.Tensor) -> None:
        self.g = g
        self.shared = launch.SharedOperand(dy)

    def fprop(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        try:
            return convolve(False, x, w, None, self.g, self.shared)
        except Fallback as e:
            why = str(e)
        return self._by_torch("fprop", x, w, why)

    def dgrad(self, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        try:
            return convolve(True, dy, w, None, self.g, self.shared)
        except Fallback as e:
            why = str(e)
        return self._by_torch("dgrad", dy, w, why)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        try:
            return wgrad(dy, x, self.g, self.shared)
        except Fallback as e:
            why = str(e)
        return self._by_torch("wgrad", dy, x, why)

    def bias_grad(self, dy: torch.Tensor) -> torch.Tensor:
        try:
            return bias_grad(dy, self.g)
        except Fallback as e:
            record_call(Call("aten::sum", self.g.problem, None, str(e)))
        return dy.sum([0, *range(2, dy.dim())])

    def _by_torch(self, name: str, a: torch.Tensor, b: torch.Tensor, why: str) -> torch.Tensor:
        """Computes by torch an operation that fell back.

        To be called outside the `except` block: the exception's frames hold copies, whose memory torch may need.
        """
        self.shared.copy = None
        h = window(self.g)
        if name == "wgrad" and self.g.dw_channels_last is not None:
            h = h._replace(channels_last=self.g.dw_channels_last)
        return operators.by_torch(name, a, b, None, h, why)
