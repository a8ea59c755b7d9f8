"""The entry point of all six convolution functions, which decides who computes a call.

1. The fast path (fast_path.py), if a layer repeats an earlier call.
2. tconv's kernels under autograd (autograd.py). Shapes and parameters are examined once per kind of call (check.py) and
   found in a dictionary afterwards.
3. A registered operator (operators.py), in contexts where kernels cannot run directly: torch.compile, vmap, subclasses.
4. torch, with the caller's own arguments, so that errors are torch's too. `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv.dispatch import operators  # noqa: F401  # registers torch.ops.tconv's
from tconv.dispatch.autocast import cast, cast_once
from tconv.dispatch.check import CallArguments, accepted, examine, paddings, parameter
from tconv.dispatch.context import NOT_STRIDED, PLAIN, foreign_modes, why_ineligible
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.flops import count_flops
from tconv.dispatch.support import interpreted, unavailable
from tconv.dispatch.window import Window
from tconv.launching import profiling
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.problem import Geometry

opaque(is_batch_invariant)  # which planning, where it is, cannot mark: it knows no torch
INTERPRETED = interpreted()  # a plain flag, for torch.compile to read
# The functions of tconv.functional by rank, forward and transposed, which put themselves here: torch.fx's graphs call them.
PUBLIC: dict[bool, dict[int, Callable[..., torch.Tensor]]] = {False: {}, True: {}}
geometries: BoundedCache[Any, Geometry | str] = BoundedCache()  # of calls that were checked, or why they fall back
# What tells most calls apart -> a fast_path.FastPath, which checks all (ids may be used again), or None after the first call.
fast_paths: BoundedCache[Any, Any] = BoundedCache()


def forget() -> None:
    """Forgets the calls that may be repeated, and the launches that they hold."""
    fast_paths.clear()
    geometries.clear()


def kernels_for(device: str) -> Any:
    """Returns the fast_path module, and imports with it, when first needed, everything that needs Triton.

    Raises:
        Fallback: tconv has no kernels for this type of device here.
    """
    why = unavailable(device)
    if why:
        raise Fallback(why)
    from tconv.dispatch import fast_path

    return fast_path


def check_context(x: Any, *others: Any) -> tuple[str, Any]:
    """Returns the type of device for which a call is planned, and the fast_path module.

    Raises:
        Fallback: no kernel may run on these tensors in this context of PyTorch.
    """
    for t in (x, *others):
        if type(t) not in PLAIN:
            raise Fallback(f"a {type(t).__name__}")
    dry = DRY.get()
    device = "cuda" if dry and dry.device else x.device.type
    fast_path = kernels_for(device)
    why = why_ineligible(x, *others)
    if why and not (dry and dry.device):
        raise Fallback(why)
    return device, fast_path


@opaque
def why_not_directly(*tensors: Any) -> str | None:
    """Returns why no kernel may run on these tensors in this context of PyTorch, or None if one may."""
    try:
        check_context(*tensors)
    except Fallback as e:
        return str(e)
    return None


def convolve(
    transposed: bool,
    rank: int,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    policy: str = "auto",
    mode: Any = "zeros",
) -> torch.Tensor | None:
    """Computes one of the six convolutions, or records why not and returns None: the caller then calls torch.

    Args:
        transposed, rank: which of the six functions.
        x, w, b: input, weight and bias.
        stride, padding, output_padding, groups, dilation: in any form that torch accepts.
        policy: as in `Geometry`; registered operators have "auto".
        mode: torch's padding_mode.
    """
    if is_dynamo_compiling():
        return _operator(CallArguments(transposed, rank, stride, padding, output_padding, groups, dilation, mode), x, w, b)
    key, invariant = None, is_batch_invariant()  # read once: another thread may change it
    try:
        if type(x) in PLAIN and type(w) in PLAIN and DRY.get() is None:
            try:
                key = id(w), id(b), policy, invariant, x.shape, x.requires_grad, w.requires_grad
                seen = fast_paths.get(key)
            except TypeError:  # symbolic extents have no hash
                key = seen = None
            except RuntimeError:  # a nested tensor has no shape
                raise Fallback(NOT_STRIDED) from None
            if seen is not None:
                y: torch.Tensor | None = seen.again(
                    transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation, mode
                )
                if y is not None:
                    return y
        asked = CallArguments(transposed, rank, stride, padding, output_padding, groups, dilation, mode)
        return _convolve(key, asked, x, w, b, policy, invariant)
    except Fallback as e:
        record_call(Call(f"conv{'_transpose' if transposed else ''}{rank}d", None, None, str(e)))
        return None


@opaque
def _convolve(key: Any, asked: CallArguments, x: Any, w: Any, b: Any, policy: str, invariant: bool) -> torch.Tensor:
    """Computes a call that is no repeated one. `key` is where `fast_paths` has the call; None if it must not be there."""
    tensors: tuple[Any, ...] = (x, w) if b is None else (x, w, b)
    for t in tensors:
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b)
        if not isinstance(t, torch.Tensor):
            raise Fallback(f"a {type(t).__name__} where a tensor was expected")
        if type(t) not in PLAIN and not type(t).__module__.startswith("torch."):  # whose methods are the user's
            raise Fallback(f"a user's tensor subclass, {type(t).__name__}")
    dry = DRY.get()
    device = "cuda" if dry and dry.device else x.device.type
    fast_path = kernels_for(device)
    why = why_ineligible(*tensors)
    if why and not (dry and dry.device):
        found = _operator(asked, x, w, b)
        if found is not None:
            return found
    if why:
        raise Fallback(why)
    y: torch.Tensor | None
    if torch.is_autocast_enabled(device):  # the fast path is of the casts, which are other tensors each time
        x, w, b = (cast if dry else cast_once)(device, x, w, b)
        if key is not None:
            key = *key, x.dtype, torch.is_grad_enabled()
            seen = fast_paths.get(key)
            if seen is not None:
                y = seen.again(*asked[:2], x, w, b, *asked[2:])
                if y is not None:
                    return y
    g = geometry(asked, x, w, b, policy, invariant)
    batched = x.dim() == asked.rank + 2
    if dry:
        g = dataclasses.replace(g, dry=True, device=dry.device)
    elif key is not None and batched and fast_path.possible(asked, x, *tensors[1:]):
        # None the first time: where shapes never repeat, preparing every call for its repetition would be wasted.
        fast_paths[key] = fast_path.FastPath(asked, g, x, w, b) if key in fast_paths else None
    x = x if batched else x.unsqueeze(0)
    event = profiling.begin_call(asked.transposed, g, x, w, b) if profiler._is_profiler_enabled and not dry else None
    try:
        y = fast_path.autograd.convolve(asked.transposed, x, w, b, g)
    finally:
        if event is not None:
            profiling.end(event)
    return y if batched else y.squeeze(0)


def geometry(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, policy: str, invariant: bool
) -> Geometry:
    """Returns the geometry of a call, which is examined once per kind of call.

    Raises:
        Fallback: torch would refuse the call, or tconv's kernels do not support it.
    """
    transposed, rank, stride, padding, output_padding, groups, dilation, mode = asked
    if type(groups) is not int:  # True and 1.0 equal 1, as keys too
        raise Fallback(f"groups={groups!r}")
    if type(mode) is not str:
        raise Fallback(f"padding_mode={mode!r}")
    stride, output_padding, dilation = parameter(stride), parameter(output_padding), parameter(dilation)
    padding = padding if type(padding) is str else paddings(padding)
    try:
        key = (
            transposed, x.shape, x.stride(), x.dtype, x.device, w.shape, w.stride(), w.dtype, w.device,
            None if b is None else (b.shape, b.stride(), b.dtype, b.device),
            stride, padding, output_padding, groups, dilation, mode, rank, policy, invariant,
        )  # fmt: skip
    except RuntimeError:  # one of them is nested
        raise Fallback(NOT_STRIDED) from None
    known = geometries.get(key)
    if known is None:
        try:
            known = dataclasses.replace(examine(asked, x, w, b), policy=policy, batch_invariant=invariant)
        except Fallback as e:
            known = str(e)
        geometries[key] = known
    if isinstance(known, str):
        raise Fallback(known)
    return known


def _operator(asked: CallArguments, x: Any, w: Any, b: Any) -> torch.Tensor | None:
    """Computes a call by a registered operator, which works in every context of PyTorch. None if torch must compute it."""
    h = operators_window(asked, x, w, b)
    if h is None:
        return None
    run: Any = torch.ops.tconv.dgrad if asked.transposed else torch.ops.tconv.fprop
    batched = x.dim() == asked.rank + 2
    y: torch.Tensor = run(x if batched else x.unsqueeze(0), w, b, *h)
    return y if batched else y.squeeze(0)


def operators_window(asked: CallArguments, x: Any, w: Any, b: Any, *more: Any) -> Window | None:
    """Returns the window with which a registered operator computes a call, or None if torch must compute it.

    torch.compile traces this function: it must not ask anything that would specialise a graph to one size.

    Args:
        more: other tensors that the operator gets.
    """
    if not operators_run(x, w, *[t for t in (b, *more) if t is not None]):
        return None
    device = x.device.type
    tracing = None if is_dynamo_compiling() else torch._C._get_tracing_state()
    if tracing:  # torch.jit.trace would take the extents that are asked for below for the graph's
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in torch's stubs
    try:
        autocast = torch.is_autocast_enabled(device)
        h = accepted(asked, x, w, b, autocast)
    except Fallback:
        return None
    finally:
        if tracing:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]  # not in torch's stubs
    if not is_dynamo_compiling() and torch._C._len_torch_dispatch_stack():
        count_flops()  # as the operator's autograd does, which inference_mode passes over
    return h


def operators_run(x: Any, *others: Any) -> bool:
    """Returns True if tconv's registered operators may compute a call with these tensors. torch.compile traces it."""
    for t in (x, *others):
        if not isinstance(t, torch.Tensor) or not _understood(t):
            return False
    device = x.device.type
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return False
    if is_dynamo_compiling():
        return True
    if torch._C._len_torch_function_stack() and foreign_modes():
        return False
    return not _exporting_to_onnx()  # which knows aten's operators alone


def _exporting_to_onnx() -> bool:
    onnx = sys.modules.get("torch.onnx")  # loaded by whoever exports
    return onnx is not None and bool(onnx.is_in_onnx_export())


def _traced(tracer: Any, asked: CallArguments, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Returns the proxy that torch.fx records: a call of the public function."""
    transposed, rank, stride, padding, output_padding, groups, dilation, mode = asked
    how = (stride, padding, output_padding, groups, dilation) if transposed else (stride, padding, dilation, groups)
    more = {} if mode == "zeros" else {"padding_mode": mode}
    call: torch.Tensor = tracer.create_proxy("call_function", PUBLIC[transposed][rank], (x, w, b, *how), more)
    return call


def _understood(t: torch.Tensor) -> bool:
    """Returns True if tconv's operators support a tensor: dense, and plain or one of torch's own subclasses.

    A user's subclass may implement aten's operators only.
    """
    return (
        (type(t) in PLAIN or type(t).__module__.startswith("torch._subclasses"))
        and t.layout is torch.strided
        and not t.is_nested
    )
