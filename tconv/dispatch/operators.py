"""fprop, dgrad and wgrad as registered torch operators, for contexts where a kernel cannot be launched directly:
torch.compile and export, functorch transforms, forward-mode AD, dispatch modes, tracing.

The gradient of every operator is made of the three operators (derivatives.py), and so is its vmap (batching.py).

All three take the same window: ints or SymInts for stride, the padding `before` the first element of x and `after` its last,
dilation, groups; and what the padding repeats. dgrad and wgrad derive the extent that their tensors do not have (X or T) from
X = (Y - 1)*S + D*(T - 1) + 1 - before - after. So their `after` must be exact: the padding minus the elements that the last
step leaves unread. It may be negative.

Whatever depends on addresses or flags (also `tconv.batch_invariant`) is decided inside the operators, when they run. If the
kernels do not support a problem, the operator falls back to torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from tconv.dispatch import autocast
from tconv.dispatch.batching import batched
from tconv.dispatch.context import PLAIN, plain
from tconv.dispatch.derivatives import gradients, wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.flops import count_flops
from tconv.dispatch.support import DTYPES, NAMES, TOO_LARGE, problem_of, too_large, unavailable
from tconv.dispatch.window import Window, exact, extents, result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import result_is_channels_last, shaped, weight_format
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.problem import Geometry

MaybeTensor = torch.Tensor | None
WINDOW = (
    "int[] stride, SymInt[] before, SymInt[] after, int[] dilation, SymInt groups, bool? channels_last=None, "
    "str padding_mode='zeros'"
)
SCHEMAS = {
    "fprop": f"(Tensor x, Tensor w, Tensor? b, {WINDOW}) -> Tensor",
    "dgrad": f"(Tensor dy, Tensor w, Tensor? b, {WINDOW}) -> Tensor",
    "wgrad": f"(Tensor dy, Tensor x, Tensor? b, {WINDOW}) -> Tensor",
}
LIBRARY: Any = torch.library.Library("tconv", "DEF")  # type: ignore[no-untyped-call]  # untyped in torch
_known: BoundedCache[Any, Geometry | str] = BoundedCache()


def is_channels_last(a: torch.Tensor, b: torch.Tensor, h: Window) -> bool:
    """Returns True if the result of an operator with these operands and window is channels_last."""
    return result_is_channels_last(a, b) if h.channels_last is None else h.channels_last


# What the operators do


def fake(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, *rest: Any) -> torch.Tensor:
    """Returns an empty tensor like an operator's result."""
    h = Window(*rest)
    like = shaped(result_shape(name, a, b, h), is_channels_last(a, b, h), a.dtype)
    return a.new_empty_strided(like.shape, like.stride())


def _run(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, *rest: Any) -> torch.Tensor:
    """Runs an operator by tconv's kernels, or falls back to torch."""
    h, a, b, bias = Window(*rest), plain(a), plain(b), None if bias is None else plain(bias)
    try:
        g = geometry(name, a, b, bias, h)
        from tconv.launching import launch

        if name == "wgrad":
            return launch.wgrad(g, a, b)
        return launch.convolve(launch.convolution(name == "dgrad", g, a, b, bias), a, b, bias, g.dry)
    except Fallback as e:
        why = str(e)
    return by_torch(name, a, b, bias, h, why)  # outside `except`: the exception's frames hold memory


def geometry(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, h: Window) -> Geometry:
    """Returns the geometry of an operator's call, which is examined once per kind of call.

    Raises:
        Fallback: the kernels do not support it.
        ValueError: the tensors do not fit together.
    """
    invariant = is_batch_invariant()
    key = (
        name, invariant, a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device), *map(tuple, h[:4]), *h[4:],
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        known = _known[key] = _examine(name, a, b, bias, h, invariant)
    if isinstance(known, str):
        raise Fallback(known)
    return dataclasses.replace(known, dry=True) if DRY.get() else known


def _examine(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, h: Window, invariant: bool) -> Geometry | str:
    """Returns the geometry of a call, or why it falls back to torch.

    Raises:
        ValueError: the tensors do not fit together.
    """
    (n, c, *_), w = extents(name, a, b, h)
    y = result_shape(name, a, b, h) if name == "fprop" else tuple(a.shape)
    channels = w[0] if name == "fprop" else c
    if (n, c, y[1]) != (y[0], w[1] * h.groups, w[0]) or w[0] % h.groups or (bias is not None and bias.shape != (channels,)):
        raise ValueError(f"{name}: tensors of {[*a.shape]} and {[*b.shape]} do not fit {h}")
    if min(*a.shape, *b.shape, *result_shape(name, a, b, h)) < 1:
        return "a tensor without elements"
    if any(t is not None and (t.dtype != a.dtype or t.device != a.device) for t in (b, bias)):
        return "tensors of several dtypes or devices"
    if a.dtype not in DTYPES:
        return f"dtype {a.dtype}"
    problem = problem_of(name, a, b, h)
    if problem.shape("y") != y:
        raise ValueError(f"{name}: tensors of {[*a.shape]} and {[*b.shape]} do not fit {h}")
    if too_large(problem, None if name == "wgrad" else b, bias):
        return TOO_LARGE
    return unavailable(a.device.type) or Geometry(problem, is_channels_last(a, b, h), batch_invariant=invariant)


def by_torch(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, h: Window, reason: str) -> torch.Tensor:
    """Computes an operator by aten's operators and records the reason. The result has the strides that `fake` promises."""
    record_call(Call("aten::convolution" if name == "fprop" else "aten::convolution_backward", None, None, reason))
    with autocast.without_autocast(a.device.type):
        out = IN_ATEN[name](a, b, bias, *h)
    return laid_out(out, is_channels_last(a, b, h))


def laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Returns a tensor of a result's shape with the strides that `fake` promises."""
    strides = shaped(t.shape, channels_last, t.dtype).stride()
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


# Differentiation


def _call(name: str, *args: Any) -> torch.Tensor:
    y: torch.Tensor = OPERATORS[name](*args)
    return y


class Operators:
    """The operations by tconv's registered operators, for `gradients`.

    Args:
        h: the exact window, with a memory format.
    """

    def __init__(self, h: Window) -> None:
        self.h = h

    def fprop(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _call("fprop", x, w, None, *self.h)

    def dgrad(self, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _call("dgrad", dy, w, None, *self.h)

    def wgrad(self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = self.h._replace(channels_last=weight_format(w, bool(self.h.channels_last)))
        return _call("wgrad", dy, x, None, *h)

    def bias_grad(self, dy: torch.Tensor) -> torch.Tensor:
        return dy.sum([0, *range(2, dy.dim())])


class _Differentiable(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, keys: Any, name: str, a: Any, b: Any, bias: Any, h: Window) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.how = name, h
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        with contextlib.ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():
                _outer_levels(stack)
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            y: torch.Tensor = OPERATORS[name].redispatch(keys & torch._C._after_autograd_keyset, a, b, bias, *h)
        return y

    @staticmethod
    @opaque
    def backward(ctx: Any, g: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # one gradient, not any number
        a, b = ctx.saved_tensors
        if g is None:
            return (None,) * 6
        if type(g) not in PLAIN:
            g = plain(g)
        name, h = ctx.how
        x, y, w = {"fprop": (a, g, b), "dgrad": (g, a, b), "wgrad": (b, a, g)}[name]
        h = exact(h, x.shape[2:], y.shape[2:], w.shape[2:])._replace(channels_last=is_channels_last(a, b, h))
        return None, None, *gradients(Operators(h), name, g, a, b, wanted(ctx, ctx.needs_input_grad[2:5])), None

    @staticmethod
    @opaque
    def jvp(ctx: Any, _: Any, __: Any, da: MaybeTensor, db: MaybeTensor, dbias: MaybeTensor, ___: Any) -> MaybeTensor:
        (name, h), (a, b) = ctx.how, ctx.saved_tensors
        op = OPERATORS[name]
        with contextlib.ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():
                _outer_levels(stack)
                # _VF is made at import, which torch's stubs do not show.
                a, b = (torch._VF._unpack_dual(t, level=0)[0] for t in (a, b))  # type: ignore[attr-defined]
            terms = []
            if da is not None:
                terms.append(op(da, b, dbias, *h))
            if db is not None:
                terms.append(op(a, db, None if terms else dbias, *h))
            if not terms and dbias is not None:
                shape = result_shape(name, a, b, h)
                terms.append(dbias.view(-1, *(1,) * (len(shape) - 2)).expand(shape))
            return sum(terms[1:], terms[0]) if terms else None


def _outer_levels(stack: contextlib.ExitStack) -> None:
    """Turns gradients and forward-mode AD back on, which `apply` turned off, for the outer functorch levels.

    Without this, second derivatives are silently wrong.
    """
    stack.enter_context(torch.enable_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))


_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Differentiable)


def _autograd(name: str, keys: Any, a: Any, b: Any, bias: Any, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    if torch._C._len_torch_dispatch_stack():
        count_flops()
    y: torch.Tensor
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():  # type: ignore[no-untyped-call]  # untyped in torch
            y = _apply(keys, name, a, b, bias, h)
    elif forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, bias))
    ):
        y = _apply(keys, name, a, b, bias, h)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y = OPERATORS[name].redispatch(keys & torch._C._after_autograd_keyset, a, b, bias, *h)
    return y


def _autocast(name: str, device: str, key: Any, a: Any, b: Any, bias: Any, *rest: Any) -> torch.Tensor:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        tensors = autocast.cast(device, a, b, bias)
        y: torch.Tensor = OPERATORS[name](*tensors, *rest)
    return y


def register(name: str, schema: str, run: Any, fake: Any, differentiated: Any) -> Any:
    """Registers an operator, and returns it.

    Args:
        schema: its arguments and results.
        run, fake: take its arguments; compute it, and return empty tensors like its results.
        differentiated: takes the dispatch keys before its arguments; computes it under autograd.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    torch.library.register_fake(f"tconv::{name}", opaque(fake), lib=LIBRARY)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, opaque(run), key)
    LIBRARY.impl(name, opaque(differentiated), "Autograd", with_keyset=True)
    return getattr(torch.ops.tconv, name).default


def _register(name: str) -> Any:
    def bound(f: Any, *more: Any) -> Any:
        return opaque(lambda *args: f(name, *more, *args))

    operator = register(name, SCHEMAS[name], bound(_run), bound(fake), bound(_autograd))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, bound(_autocast, key.lower(), getattr(torch._C.DispatchKey, f"Autocast{key}")), f"Autocast{key}")
    torch.library.register_vmap(f"tconv::{name}", bound(batched, operator), lib=LIBRARY)
    return operator


OPERATORS: dict[str, Any] = {name: _register(name) for name in NAMES}
