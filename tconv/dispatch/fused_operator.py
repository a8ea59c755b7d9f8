"""A convolution with an epilogue as one registered torch operator, for the contexts of operators.py; and the gradient of its
epilogue as another, which a compiled backward pass calls before the operators that compute the convolution's gradients.

    fused          the result, and the activation's argument if `kept`: else an empty tensor, and a backward pass that needs
                   the argument computes it again
    epilogue_grad  the gradients of the convolution's result, of the residual and of the bias; empty tensors for those not
                   asked for. x and w tell the problem; they are not read.

Functorch's transforms (vmap too) and forward-mode differentiation take `fused` apart: what they make of the convolution, and of
PyTorch's own functions, is known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tconv.dispatch import autocast, operators
from tconv.dispatch.chain_rule import all_gradients, argument_gradient, per_channel
from tconv.dispatch.context import PLAIN, plain, taken_apart
from tconv.dispatch.derivatives import wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.flops import count_flops
from tconv.dispatch.operators import LIBRARY, OPERATORS, WINDOW, Operators, register
from tconv.dispatch.steps import Steps, followed
from tconv.dispatch.window import Window, exact, result_shape
from tconv.launching.memory_format import shaped
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.epilogue import Epilogue

MaybeTensor = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SCHEMAS = {
    "fused": "(Tensor x, Tensor w, Tensor? b, Tensor? residual, Tensor? scale, Tensor? shift, str activation, float slope, "
    f"str position, bool stepwise, bool kept, bool transposed, {WINDOW}) -> (Tensor, Tensor)",
    "epilogue_grad": "(Tensor dy, Tensor x, Tensor w, Tensor? v, Tensor? scale, str activation, float slope, str residual, "
    f"bool apart, bool summed, bool transposed, {WINDOW}) -> (Tensor, Tensor, Tensor)",
}


class How(NamedTuple):
    """The arguments of `fused` between its tensors and its window.

    Attributes:
        activation: one of ACTIVATIONS, or empty.
        slope: leaky_relu's factor for negative numbers; 0 for other activations.
        position: "before" or "after", where the residual is added if there is one.
        stepwise, kept: as in `Epilogue`.
        transposed: whether it is a transposed convolution.
    """

    activation: str
    slope: float
    position: str
    stepwise: bool
    kept: bool
    transposed: bool

    @property
    def name(self) -> str:
        """The operator that computes the convolution alone."""
        return "dgrad" if self.transposed else "fprop"

    def steps(self, residual: MaybeTensor, scale: MaybeTensor, shift: MaybeTensor) -> Steps:
        return Steps(self.activation or None, self.slope, residual, self.position, scale, shift, self.stepwise)

    def epilogue(self, residual: MaybeTensor, scale: MaybeTensor, shift: MaybeTensor) -> Epilogue:
        return dataclasses.replace(self.steps(residual, scale, shift).epilogue, kept=self.kept)


class GradHow(NamedTuple):
    """The arguments of `epilogue_grad` between its tensors and its window.

    Attributes:
        activation, slope, transposed: as in `How`.
        residual: where the epilogue has a residual, "before" or "after"; empty if it has none.
        apart: whether the residual's gradient, which without a scale is the convolution's, is written too.
        summed: whether the bias gradient is computed.
    """

    activation: str
    slope: float
    residual: str
    apart: bool
    summed: bool
    transposed: bool

    @property
    def name(self) -> str:
        """The operator that computes the convolution alone."""
        return "dgrad" if self.transposed else "fprop"

    def epilogue(self, scale: MaybeTensor) -> Epilogue:
        wide = scale is not None and scale.dtype is torch.float32
        return Epilogue(self.activation, self.slope, scale is not None, wide=wide, residual=self.residual)


def _parted(rest: tuple[Any, ...]) -> tuple[How, Window]:
    return How(*rest[:6]), Window(*rest[6:])


def _grad_parted(rest: tuple[Any, ...]) -> tuple[GradHow, Window]:
    return GradHow(*rest[:6]), Window(*rest[6:])


def in_sequence(
    convolution: Callable[..., torch.Tensor],
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    residual: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
    *rest: Any,
) -> Pair:
    """Returns what `fused` returns, by a convolution that takes (x, w, b, *window), and PyTorch's functions after it."""
    how, h = _parted(rest)
    steps = how.steps(residual, scale, shift)
    after = residual if how.position == "after" else None
    before = steps._replace(activation=None, residual=None if residual is after else residual)
    v = followed(convolution(x, w, b, *h), before, len(h.stride))
    y = followed(v, steps._replace(residual=after, scale=None, shift=None), len(h.stride))
    if not how.kept:
        return y, x.new_empty(0)
    return y, v.clone() if v is y else v


def in_aten(x: torch.Tensor, w: torch.Tensor, *args: Any) -> Pair:
    """Returns what `fused` returns, by aten's operators."""
    how, _ = _parted(args[4:])
    return in_sequence(IN_ATEN[how.name], x, w, *args)


# What the operators do


def _fake(x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any, *rest: Any) -> Pair:
    how, h = _parted(rest)
    y = operators.fake(how.name, x, w, b, *h)
    return y, torch.empty_like(y) if how.kept else x.new_empty(0)


def _run(x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any, *rest: Any) -> Pair:
    """Runs `fused` by one of tconv's kernels, or falls back to torch.

    Raises:
        ValueError: the tensors do not fit together.
    """
    how, h = _parted(rest)
    tensors = [None if t is None else plain(t) for t in (x, w, b, residual, scale, shift)]
    (x, w, b), (residual, scale, shift) = tensors[:3], tensors[3:]
    after = residual, scale, shift
    shape = result_shape(how.name, x, w, h)
    how.steps(*after).check_tensors(shape, shape[1], x.dtype, x.device)
    try:
        g = operators.geometry(how.name, x, w, b, h)
        from tconv.dispatch import fused

        y, v = fused.prepared(how.transposed, x, w, b, how.epilogue(*after), g).run(x, w, b, *after)
        return y, x.new_empty(0) if v is None else v
    except Fallback as e:
        why = str(e)
    record_call(Call(f"epilogue of {how.name}", None, None, why))  # outside `except`: the exception's frames hold memory
    with autocast.without_autocast(x.device.type):
        y, v = in_aten(x, w, b, *after, *rest)
    channels_last = operators.is_channels_last(x, w, h)
    return operators.laid_out(y, channels_last), operators.laid_out(v, channels_last) if how.kept else v


def _grad_fake(dy: Any, x: Any, w: Any, v: Any, scale: Any, *rest: Any) -> Triple:
    how, h = _grad_parted(rest)
    like = shaped(dy.shape, operators.is_channels_last(x, w, h), dy.dtype)
    du = dy.new_empty_strided(like.shape, like.stride())
    return du, torch.empty_like(du) if how.apart else dy.new_empty(0), dy.new_empty(dy.shape[1] if how.summed else 0)


def _grad_run(dy: Any, x: Any, w: Any, v: Any, scale: Any, *rest: Any) -> Triple:
    """Runs `epilogue_grad` by tconv's kernel, or falls back to torch.

    Raises:
        ValueError: the tensors do not fit together.
    """
    how, h = _grad_parted(rest)
    dy, x, w, v, scale = (None if t is None else plain(t) for t in (dy, x, w, v, scale))
    channels_last, shape = operators.is_channels_last(x, w, h), result_shape(how.name, x, w, h)
    for what, t, wants in (("dy", dy, shape), ("v", v, shape), ("scale", scale, shape[1:2])):
        if t is not None and (tuple(t.shape), t.device) != (wants, x.device):
            raise ValueError(f"{what} must have shape {wants} on {x.device}, got {tuple(t.shape)} on {t.device}")
    dy, v = operators.laid_out(dy, channels_last), None if v is None else operators.laid_out(v.to(dy.dtype), channels_last)
    try:
        g = operators.geometry(how.name, x, w, None, h)
        from tconv.dispatch import fused

        du, dr, sums = fused.one_pass(g, how.epilogue(scale), dy, v, scale, how.apart, how.summed)
        assert du is not None
        return du, dy.new_empty(0) if dr is None else dr, dy.new_empty(0) if sums is None else sums
    except Fallback as e:
        why = str(e)
    record_call(Call(f"gradient of {how.epilogue(scale)}", None, None, why))  # outside `except`, as above
    du, dr, sums = grad_by_formulas(dy, x, w, v, scale, *rest)
    return operators.laid_out(du, channels_last), operators.laid_out(dr, channels_last) if how.apart else dr, sums


def grad_by_formulas(dy: Any, x: Any, w: Any, v: Any, scale: Any, *rest: Any) -> Triple:
    """Returns what `epilogue_grad` returns, by PyTorch's differentiable functions."""
    how, _ = _grad_parted(rest)
    dz = argument_gradient(how.epilogue(scale), dy, None, v)
    du = per_channel(dz, scale) if scale is not None else dz.clone()
    nothing = dy.new_empty(0)
    return du, dz.clone() if how.apart else nothing, du.sum([0, *range(2, du.dim())]) if how.summed else nothing.clone()


# Differentiation


class _Differentiable(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, keys: Any, x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any, rest: Any) -> Any:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            y, v = FUSED.redispatch(keys & torch._C._after_autograd_keyset, x, w, b, residual, scale, shift, *rest)
        how, _ = ctx.how = _parted(rest)
        ctx.given = [t is not None for t in (x, w, b, residual, scale, shift)]
        if not how.kept:
            ctx.mark_non_differentiable(v)
        ctx.epilogue = e = how.epilogue(residual, scale, shift)
        ctx.again = bool(e.activation) and not (e.by_result or e.kept)
        argument = y if e.by_result else v if e.activation and e.kept else None
        of_scale = b if ctx.needs_input_grad[5] else None
        ctx.save_for_backward(x, w, argument, scale, *((b, residual, shift) if ctx.again else (of_scale, None, None)))
        return y, v

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, dv: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # two gradients, not any number
        x, w, v, scale, b, residual, shift = ctx.saved_tensors
        (how, h), e = ctx.how, ctx.epilogue
        dv = dv if how.kept else None
        if dy is None and dv is None:
            return (None,) * 8
        if dy is not None and type(dy) not in PLAIN:
            dy = plain(dy)
        if ctx.again:
            v = _again(how, h, x, w, b, residual, scale, shift)
        needs = wanted(ctx, ctx.needs_input_grad[1:7], ctx.given)
        shape = result_shape(how.name, x, w, h)
        ends = (shape, x.shape) if how.transposed else (x.shape, shape)
        whole = exact(h, ends[0][2:], ends[1][2:], w.shape[2:])
        whole = whole._replace(channels_last=operators.is_channels_last(x, w, h))

        def one_pass(
            e: Epilogue, dy: torch.Tensor, v: MaybeTensor, scale: MaybeTensor, residual: bool, summed: bool
        ) -> tuple[MaybeTensor, ...]:
            grad = GradHow(e.activation, e.slope, e.residual, residual, summed, how.transposed)
            du, dr, sums = GRAD(dy, x, w, v, scale, *grad, *h)
            return du, dr if residual else None, sums if summed else None

        possible = not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        grads = all_gradients(
            lambda du: Operators(whole), one_pass if possible else None, how.transposed, h.groups, e, dy, dv, v, x, w, b, scale,
            needs,
        )  # fmt: skip
        return None, *grads, None


_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Differentiable)


def _again(how: How, h: Window, x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any) -> torch.Tensor:
    """Computes the activation's argument again."""
    how, residual = how._replace(activation="", kept=False), residual if how.position == "before" else None
    if torch.is_grad_enabled() or (residual is None and scale is None and shift is None):
        return in_sequence(OPERATORS[how.name], x, w, b, residual, scale, shift, *how, *h)[0]
    v: torch.Tensor = FUSED(x, w, b, residual, scale, shift, *how, *h)[0]
    return v


def _autograd(keys: Any, x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any, *rest: Any) -> Any:
    tensors = x, w, b, residual, scale, shift
    if taken_apart():
        return in_sequence(OPERATORS[_parted(rest)[0].name], *tensors, *rest)
    if torch._C._len_torch_dispatch_stack():
        count_flops()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply(keys, *tensors, rest)
    with torch._C._AutoDispatchBelowAutograd():
        return FUSED.redispatch(keys & torch._C._after_autograd_keyset, *tensors, *rest)


def _grad_autograd(keys: Any, *args: Any) -> Any:
    if torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5])
    ):
        return grad_by_formulas(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return GRAD.redispatch(keys & torch._C._after_autograd_keyset, *args)


@opaque
def _autocast(device: str, key: Any, x: Any, w: Any, b: Any, *rest: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return FUSED(*autocast.cast(device, x, w, b), *rest)


def _taken_apart(*args: Any) -> Any:
    return in_sequence(OPERATORS[_parted(args[6:])[0].name], *args)


FUSED = register("fused", SCHEMAS["fused"], _run, _fake, _autograd)
GRAD = register("epilogue_grad", SCHEMAS["epilogue_grad"], _grad_run, _grad_fake, _grad_autograd)
for _name, _parts in (("fused", _taken_apart), ("epilogue_grad", grad_by_formulas)):
    LIBRARY.impl(_name, opaque(_parts), "FuncTorchBatched")  # vmap has rules for what they call
for _key in ("CPU", "CUDA"):
    _cast = functools.partial(_autocast, _key.lower(), getattr(torch._C.DispatchKey, f"Autocast{_key}"))
    LIBRARY.impl("fused", _cast, f"Autocast{_key}")
