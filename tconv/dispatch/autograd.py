"""The three operations and the bias gradient as autograd's plain calls: the table of operators.py over launches of kernels.

fprop and dgrad are one function here, `convolve`, since each is the other read backwards. In a context that a kernel cannot
take part in (a functorch transform, a batched gradient, a mode, a subclass) a gradient is made of the registered operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import operators
from tconv.dispatch.context import PLAIN, global_state_differs, plain, tensor_guard, why_ineligible
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.window import window
from tconv.launching import launch
from tconv.launching.arguments import Prepared
from tconv.launching.memory_format import LIMIT, addressing
from tconv.launching.record import Call, Fallback, TransientFallback, record_call
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

MaybeTensor = torch.Tensor | None
KEPT = 4  # layouts of gradients for which a layer's backward is worked out to be kept


def convolve(
    transposed: bool, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, g: Geometry, shared: launch.Staged | None = None
) -> torch.Tensor:
    """fprop of a problem, x -> y, or, transposed, its dgrad, x being dy; differentiable in x, w and b."""
    prepared = launch.convolution(transposed, g, x, w, b)
    if _differentiable(x, w, b):
        return apply_convolve(x, w, b, ForwardState(transposed, g, prepared))
    return launch.convolve(prepared, x, w, b, g.dry, shared)


class ForwardState:
    """How a forward pass is launched, and its backward if it has been before.

    Attributes:
        transposed, g, prepared: the forward pass.
        left: how often a backward is still to be worked out so that it can be repeated; none of a call that will not be.
        again: the last one so kept.
    """

    __slots__ = ("again", "g", "left", "prepared", "transposed")

    def __init__(self, transposed: bool, g: Geometry, prepared: Prepared, repeated: bool = False) -> None:
        self.transposed, self.g, self.prepared = transposed, g, prepared
        self.left = KEPT if repeated else 0
        self.again: _CachedBackward | None = None


class _CachedBackward:
    """A backward that is launched again for a gradient that lies as one did before.

    What may differ is compared as by dispatch/fast_path.py for the forward pass, and the gradients that are needed.
    """

    __slots__ = ("launches", "needs", "precision", "tensor_guard", "transposed")

    def __init__(self, how: ForwardState, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple[bool, ...]) -> None:
        self.launches = launch.backward(how.transposed, how.g, dy, x, w, needs)
        self.transposed, self.needs = how.transposed, needs
        self.precision = fp32_precision("cuda", "conv")
        self.tensor_guard = tensor_guard(dy, x, w)

    def __call__(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple[bool, ...]) -> launch.Gradients | None:
        """The gradients, or None if the call differs.

        Raises:
            Fallback: a kernel is not launched; which one, the long way says.
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
    @opaque
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, how: ForwardState) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.how = how
        return launch.convolve(how.prepared, x, w, b, how.g.dry)

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors  # also where they are not needed: edited in place, they must raise
        if dy is None:
            return None, None, None, None
        if type(dy) not in PLAIN:
            dy = plain(dy)
        how, needs = ctx.how, operators.wanted(ctx, ctx.needs_input_grad[:3])
        # Compiled autograd traces backward passes of eager forward ones too.
        traced, repeatable = is_dynamo_compiling(), how.left > 0
        if not traced and how.again is not None:
            found = None
            try:
                found = how.again(dy, x, w, needs)
            except TransientFallback:
                repeatable = False  # this time; what is kept is kept
            except Fallback:  # every time: what does launch would be launched here and again below
                how.again, how.left, repeatable = None, 0, False
            if found is not None:
                return *found, None
        operations = _operations(how.g, dy, x, w)
        grads = operators.gradients(operations, "dgrad" if how.transposed else "fprop", dy, x, w, needs)
        if not traced and repeatable and type(operations) is _ByKernels and not torch.is_grad_enabled() and forced() is None:
            how.left -= 1
            how.again = _CachedBackward(how, dy, x, w, needs)
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
    def backward(ctx: Any, gw: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        dy, x = ctx.saved_tensors
        if gw is None:
            return None, None, None
        if type(gw) not in PLAIN:
            gw = plain(gw)
        g = ctx.geometry
        if addressing(gw).reach > LIMIT:  # as a weight it is addressed in 32 bits
            gw = gw.contiguous()
        need_y, need_x = operators.wanted(ctx, ctx.needs_input_grad[:2])
        return operators.gradients(_operations(g, gw, dy, x), "wgrad", gw, dy, x, (need_y, need_x, False))


class _BiasGrad(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, dy: torch.Tensor, g: Geometry) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape = dy.shape
        return launch.bias_grad(g, dy)

    @staticmethod
    @opaque
    def backward(ctx: Any, gb: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]
        if gb is None:
            return None, None
        return plain(gb).view(1, -1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


apply_convolve, _apply_wgrad, _apply_bias_grad = map(_apply, (_Convolve, _Wgrad, _BiasGrad))


def _operations(g: Geometry, dy: torch.Tensor, *saved: torch.Tensor) -> _ByKernels | operators.Operators:
    return operators.Operators(window(g)) if is_dynamo_compiling() or why_ineligible(dy, *saved) else _ByKernels(g, dy)


class _ByKernels:
    """The operations by tconv's kernels, or, where they decline at the last moment, by torch's operators.

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
        """What our kernels declined, when the error is gone: its frames hold copies, and torch may need the memory."""
        self.shared.copy = None
        h = window(self.g)
        if name == "wgrad" and self.g.dw_channels_last is not None:
            h = h._replace(channels_last=self.g.dw_channels_last)
        return operators.by_torch(name, a, b, None, h, why)
