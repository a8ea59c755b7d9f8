"""fprop, dgrad and wgrad as registered torch operators, for contexts where a kernel cannot be launched directly:
torch.compile and export, functorch transforms, forward-mode AD, dispatch modes, tracing.

    operator         gradient of its first argument   of its second
    fprop(x, w)      dgrad(g, w)                      wgrad(g, x)
    dgrad(dy, w)     fprop(g, w)                      wgrad(dy, g)
    wgrad(dy, x)     fprop(x, g)                      dgrad(dy, g)

So the gradient of every operator is made of the three operators. vmap is too: it folds the batch into N, K, C or the groups.

All three take the same window of ints or SymInts: stride, the padding `before` the first element of x and `after` its last,
dilation, groups. dgrad and wgrad derive the extent that their tensors do not have (X or T) from
X = (Y - 1)*S + D*(T - 1) + 1 - before - after. So their `after` must be exact: the padding minus the elements that the last
step leaves unread. It may be negative.

Whatever depends on addresses or flags is decided inside the operators, when they run. If the kernels do not support a
problem, the operator falls back to torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tconv.dispatch.context import PLAIN, plain
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.window import Window, exact, extents, result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import reach, result_is_channels_last, shaped, weight_format
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.addressing import LIMIT
from tconv.planning.problem import ConvProblem, Geometry, forward_problem

MaybeTensor = torch.Tensor | None
NAMES = ("fprop", "dgrad", "wgrad")
WINDOW = "int[] stride, SymInt[] before, SymInt[] after, int[] dilation, SymInt groups, bool? channels_last=None"
SCHEMAS = {
    "fprop": f"(Tensor x, Tensor w, Tensor? b, {WINDOW}) -> Tensor",
    "dgrad": f"(Tensor dy, Tensor w, Tensor? b, {WINDOW}) -> Tensor",
    "wgrad": f"(Tensor dy, Tensor x, Tensor? b, {WINDOW}) -> Tensor",
}
TOO_LARGE = "a weight, or coordinates or programs, that 32 bits cannot count"
INTERPRETED = ("1", "true", "yes", "on", "y")  # the values of TRITON_INTERPRET that Triton reads as true
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # a leaf's autograd node
_asks_for_leaves = -2  # id of the last backward pass seen to ask for a leaf's gradient; -1 is the id outside of any pass
_library: Any = torch.library.Library("tconv", "DEF")  # type: ignore[no-untyped-call]  # untyped in torch
_known: BoundedCache[Any, Geometry | str] = BoundedCache()


def _format(a: torch.Tensor, b: torch.Tensor, h: Window) -> bool:
    return result_is_channels_last(a, b) if h.channels_last is None else h.channels_last


def problem_of(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> ConvProblem:
    x, w = extents(name, a, b, h)
    return forward_problem(x, w, h.stride, list(zip(h.before, h.after, strict=True)), h.dilation, h.groups)


def too_large(p: ConvProblem, w: torch.Tensor | None, b: MaybeTensor) -> bool:
    """Returns True if a coordinate, an offset into the weight or bias, or a dgrad's number of programs may not fit 32 bits."""
    far = max(*p.X, *p.Y, *p.P, *p.T) * max(*p.S, *p.D)
    programs = p.phases("dgrad") * p.C * (p.N * max(p.X) // 16 + 1)
    weights = [0 if w is None else reach(w), 0 if b is None else b.shape[0] * b.stride(0)]
    return max(far, max(p.S) * max(p.D), programs, *weights) > LIMIT


# What the operators do


@functools.cache
def unavailable(device: str) -> str | None:
    """Returns why the kernels cannot run for tensors on that type of device, or None if they can.

    Imports the kernels, and Triton with them, so it must be called only when they are needed.
    """
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return "CPU tensors need TRITON_INTERPRET=1" if device == "cpu" else f"device {device}"
    try:
        from tconv.launching.arguments import INTERPRET
    except ImportError as e:
        return f"Triton cannot be imported ({e})"
    if device == "cpu" and not INTERPRET:
        return "TRITON_INTERPRET was set after Triton's kernels were loaded"
    return None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED


def _fake(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    like = shaped(result_shape(name, a, b, h), _format(a, b, h), a.dtype)
    return a.new_empty_strided(like.shape, like.stride())


def _run(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, *rest: Any) -> torch.Tensor:
    """Runs an operator by tconv's kernels, or falls back to torch."""
    h, a, b, bias = Window(*rest), plain(a), plain(b), None if bias is None else plain(bias)
    key = (
        name, a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device), *map(tuple, h[:4]), *h[4:],
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        known = _known[key] = _examine(name, a, b, bias, h)
    try:
        if isinstance(known, str):
            raise Fallback(known)
        if DRY.get():
            known = dataclasses.replace(known, dry=True)
        from tconv.launching import launch

        if name == "wgrad":
            return launch.wgrad(known, a, b)
        return launch.convolve(launch.convolution(name == "dgrad", known, a, b, bias), a, b, bias, known.dry)
    except Fallback as e:
        why = str(e)
    return by_torch(name, a, b, bias, h, why)  # outside `except`: the exception's frames hold memory


def _examine(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, h: Window) -> Geometry | str:
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
    return unavailable(a.device.type) or Geometry(problem, _format(a, b, h))


def by_torch(name: str, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor, h: Window, reason: str) -> torch.Tensor:
    """Computes an operator by aten's operators and records the reason. The result has the strides that `_fake` promises."""
    record_call(Call("aten::convolution" if name == "fprop" else "aten::convolution_backward", None, None, reason))
    out = IN_ATEN[name](a, b, bias, *h)
    strides = shaped(out.shape, _format(a, b, h), a.dtype).stride()
    return out if out.stride() == strides else a.new_empty_strided(out.shape, strides).copy_(out)


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


def gradients(op: Any, name: str, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, needs: Sequence[bool]) -> tuple[Any, ...]:
    """Returns the gradients of an operation's arguments a, b and bias, None for those not needed.

    Args:
        op: computes them, an `Operators` for example. Its `wgrad` is also given the weight, whose strides decide the memory
            format of dw where two formats have the same strides.
        name: the operation.
        g: gradient of its result.
        a, b: its operands.
        needs: which of the three gradients are needed.
    """
    need_a, need_b, need_bias = needs
    da = db = None
    if name == "fprop":
        da, db = op.dgrad(g, b) if need_a else None, op.wgrad(g, a, b) if need_b else None
    elif name == "dgrad":
        da, db = op.fprop(g, b) if need_a else None, op.wgrad(a, g, b) if need_b else None
    else:
        da, db = op.fprop(b, g) if need_a else None, op.dgrad(a, g) if need_b else None
    return da, db, op.bias_grad(g) if need_bias else None


def wanted(ctx: Any, needs: Sequence[bool]) -> tuple[bool, ...]:
    """Returns which gradients the running backward pass needs, of those that the forward pass expected.

    torch.autograd.grad(y, x), for example, does not need the weight's. The autograd engine knows, but it raises an exception
    for a leaf whose gradient is asked for, which takes longer than a launch. So after one such exception this assumes that
    the pass needs the gradients of all leaves.

    Args:
        needs: ctx.needs_input_grad of the tensors among the arguments, from the first one on.
    """
    if is_dynamo_compiling():
        return tuple(needs)
    nodes, found = ctx.next_functions, [*needs]
    # The input is asked about last: if it is the only leaf asked for, its exception must not make the others count as needed.
    for i in reversed(range(len(found))):
        found[i] = found[i] and _executes(nodes[i][0])
    return tuple(found)


def _executes(node: Any) -> bool:
    global _asks_for_leaves
    task = torch._C._current_graph_task_id()
    if task == _asks_for_leaves and type(node) is ACCUMULATE:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        _asks_for_leaves = task
        return True


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
        h = exact(h, x.shape[2:], y.shape[2:], w.shape[2:])._replace(channels_last=_format(a, b, h))
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


# vmap: the axis that the batch is folded into, of the argument and of the result, each with whether groups divide that axis.
# FIRST and SECOND are for a batch of the first or second argument. In BOTH, the batch becomes more groups: the axes of the
# first argument, the second and the result.
FIRST = {"fprop": ((0, False), (0, False)), "dgrad": ((0, False), (0, False)), "wgrad": ((1, True), (0, True))}
SECOND = {"fprop": ((0, True), (1, True)), "dgrad": ((1, False), (1, True)), "wgrad": ((1, True), (1, False))}
BOTH = {"fprop": (1, 0, 1), "dgrad": (1, 0, 1), "wgrad": (1, 1, 0)}


def _vmap(name: str, info: Any, dims: Any, a: Any, b: Any, bias: Any, *rest: Any) -> tuple[torch.Tensor, int]:
    h, size = Window(*rest), info.batch_size
    if size == 0:  # compute one sample of zeros for its shape, and return none of it
        one = [t if d is None else t.sum(d) for t, d in zip((a, b, bias), dims[:3], strict=True)]
        return OPERATORS[name](*one, *h)[None, ...][:0], 0
    at_a, at_b, at_bias = dims[:3]
    inside = bias if at_bias is None and at_b is None else None
    axis, groups = 0, 1
    if at_a is not None and at_b is not None:
        axis_a, axis_b, axis = BOTH[name]
        a, b, h = _fold(a, at_a, axis_a, 1), _fold(b, at_b, axis_b, 1), h._replace(groups=h.groups * size)
    elif at_a is not None:
        (axis_a, divided), (axis, result) = FIRST[name]
        a, groups = _fold(a, at_a, axis_a, h.groups if divided else 1), h.groups if result else 1
    elif at_b is not None:
        (axis_b, divided), (axis, result) = SECOND[name]
        b, groups = _fold(b, at_b, axis_b, h.groups if divided else 1), h.groups if result else 1
    y = OPERATORS[name](a, b, inside, *h)
    if at_a is None and at_b is None:
        y = y.unsqueeze(0).expand(size, *y.shape)
    else:
        # `unflatten` has no types in torch.
        y = y.unflatten(axis, (groups, size, y.shape[axis] // (groups * size))).movedim(axis + 1, 0)  # type: ignore[no-untyped-call]
        y = y.flatten(axis + 1, axis + 2)
    if bias is not None and inside is None:
        shape = (1, bias.shape[0]) if at_bias is None else (size, 1, bias.shape[1 - at_bias])
        bias = bias if at_bias is None else bias.movedim(at_bias, 0)
        y = y + bias.reshape(*shape, *(1,) * (y.dim() - 3))
    return y, 0


def _fold(t: torch.Tensor, dim: int, axis: int, groups: int) -> torch.Tensor:
    """Folds the batch dimension `dim` of a tensor into `axis`, inside each group."""
    t = t.movedim(dim, 0)
    # `unflatten` has no types in torch.
    split: torch.Tensor = t.unflatten(axis + 1, (groups, t.shape[axis + 1] // groups))  # type: ignore[no-untyped-call]
    return split.movedim(0, axis + 1).flatten(axis, axis + 2)


def _autocast(name: str, device: str, key: Any, a: Any, b: Any, bias: Any, *rest: Any) -> torch.Tensor:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        tensors = lower(device, a, b, bias)
        y: torch.Tensor = OPERATORS[name](*tensors, *rest)
    return y


def lower(device: str, *tensors: MaybeTensor) -> tuple[Any, ...]:
    """Casts floating-point tensors, except fp64, to autocast's dtype.

    The cast is differentiable, so gradients arrive in the parameters' dtype.
    """
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def count_flops() -> None:
    """Registers the operators' FLOP formulas with torch's FlopCounterMode, and with active counters, which hold copies.

    Does nothing until the user imports FlopCounterMode, which imports Triton.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    packets = {getattr(torch.ops.tconv, name): _FLOPS[name] for name in NAMES}
    if not packets.keys() <= counter.flop_registry.keys():
        for packet, formula in packets.items():
            counter.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            registry.update({packet: counter.flop_registry[packet] for packet in packets})


def _flops(pass_: str) -> Any:
    @opaque
    def formula(a: Any, b: Any, bias: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        """Returns two FLOPs per product: elements of the layer's output times elements of one filter."""
        y, w = {"fprop": (out_shape, b), "dgrad": (a, b), "wgrad": (a, out_shape)}[pass_]
        count: int = 2 * math.prod(y) * math.prod(w[1:])
        return count

    return formula


_FLOPS = {name: _flops(name) for name in NAMES}


def _register(name: str) -> Any:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(name + SCHEMAS[name], tags=tags)

    def bound(f: Any, *more: Any) -> Any:
        return opaque(lambda *args: f(name, *more, *args))

    torch.library.register_fake(f"tconv::{name}", bound(_fake), lib=_library)
    for key in ("CPU", "CUDA"):
        _library.impl(name, bound(_run), key)
        _library.impl(name, bound(_autocast, key.lower(), getattr(torch._C.DispatchKey, f"Autocast{key}")), f"Autocast{key}")
    _library.impl(name, bound(_autograd), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"tconv::{name}", bound(_vmap), lib=_library)
    return getattr(torch.ops.tconv, name).default


OPERATORS: dict[str, Any] = {name: _register(name) for name in NAMES}
