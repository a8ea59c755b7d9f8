"""Convolutions of a stream, chunk by chunk: the frames that the next output still needs are handed on as a state.

A kernel computes a call where it may run directly, and a registered operator does in torch.compile and tracing (stream_ops.py).
Where a gradient is wanted and in transforms, (state, chunk) are concatenated; `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import entry
from tconv.dispatch.autocast import cast
from tconv.dispatch.check import CallArguments, paddings, parameter, per_dimension, require
from tconv.dispatch.context import taken_apart
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.steps import Steps
from tconv.dispatch.stream_ops import Chunk, Pair, by_kernel, chunk_of, concatenated, whole
from tconv.dispatch.window import Window, result_shape
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call

MaybeTensor = torch.Tensor | None


def convolve(
    rank: int,
    x: Any,
    w: Any,
    b: Any,
    state: MaybeTensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    steps: Steps,
) -> Pair:
    """Computes `tconv.functional.conv1d_stream` or `conv3d_stream`. Returns y and the next state.

    Raises:
        ValueError: an argument does not fit.
    """
    x, state = _in_autocast(x, state)
    stride, padding, dilation = _check(rank, x, w, b, state, stride, padding, dilation, groups)
    steps.check_kinds()
    t, times = w.shape[2], x.shape[2]
    chunk = chunk_of(None if state is None else state.shape[2], times, t, stride[0], dilation[0])
    if not chunk.outputs or not x.numel():
        return _without_outputs(rank, x, w, state, chunk, stride, padding, dilation)
    sides = ((chunk.before, 0), *padding[1:])
    asked = CallArguments(False, rank, stride, sides, 0, groups, dilation)
    given = asked, x, w, b, state, chunk, steps
    tensors = [t for t in (x, w, b, state, *steps.tensors.values()) if t is not None]
    why = "torch.compile" if is_dynamo_compiling() else entry.why_not_directly(*tensors)
    if why is None:
        try:
            return _directly(*given)
        except Fallback as e:
            why = str(e)
    else:
        found = _by_operator(*given)
        if found is not None:
            return found
    if not is_dynamo_compiling():
        record_call(Call(f"conv{rank}d_stream", None, None, f"(state, chunk) concatenated: {why}"))
    return concatenated(*given)


def _in_autocast(x: Any, state: Any) -> tuple[Any, Any]:
    """Returns input and state in autocast's dtype, where it is enabled: what is handed on is what the convolution reads."""
    if not isinstance(x, torch.Tensor) or not (state is None or isinstance(state, torch.Tensor)):
        return x, state
    device = _planned_for(x)
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return x, state
    x, state = cast(device, x, state)
    return x, state


def _planned_for(x: torch.Tensor) -> str:
    """Returns the type of device that a call is planned for."""
    dry = None if is_dynamo_compiling() else DRY.get()
    return "cuda" if dry and dry.device else x.device.type


def _check(
    rank: int, x: Any, w: Any, b: Any, state: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Returns stride, padding by side and dilation, one per dimension, after checking them and the state."""
    frame = ", ".join("DHW"[3 - rank :])
    for name, t in (("input", x), ("weight", w)):
        require(isinstance(t, torch.Tensor) and t.dim() == rank + 2, name, f"be a tensor of {rank + 2} dimensions", _seen(t))
    require(b is None or isinstance(b, torch.Tensor), "bias", "be a tensor or None", _seen(b))
    try:
        s, d = (per_dimension(parameter(v), rank, "") for v in (stride, dilation))
        before = d[0] * (w.shape[2] - 1)
        padding = ((before, 0), *(0,) * (rank - 1)) if padding is None else padding
        p = tuple(n if isinstance(n, tuple) else (n, n) for n in per_dimension(paddings(padding), rank, ""))
    except Fallback:
        given = f"stride {stride!r}, padding {padding!r}, dilation {dilation!r}"
        raise ValueError(f"stride, padding and dilation must be numbers, or one for each of ({frame}), got {given}") from None
    require(min(s) > 0, "stride", "be positive", stride)
    require(min(d) > 0, "dilation", "be positive", dilation)
    wanted = f"be ({before}, 0) in its first dimension, dilation*(taps - 1) before the first time and nothing after"
    require(p[0] == (before, 0), "padding", wanted, padding)
    require(min(map(min, p)) >= 0, "padding", "not be negative", padding)
    if state is not None:
        least = max(0, before + 1 - s[0])
        fits = isinstance(state, torch.Tensor) and state.dim() == x.dim()
        require(fits, "state", f"be a tensor of {rank + 2} dimensions, or None", _seen(state))
        length = f"{before}" if least == before else f"{least} to {before}"
        shape = (*x.shape[:2], length, *x.shape[3:])
        fits = least <= state.shape[2] <= before and (*state.shape[:2], *state.shape[3:]) == (*x.shape[:2], *x.shape[3:])
        if not fits:  # asked first, since torch.compile cannot write extents that vary
            require(fits, "state", f"have shape ({', '.join(map(str, shape))})", tuple(state.shape))
        require(state.dtype == x.dtype, "state", f"be of the input's dtype, {x.dtype}", state.dtype)
        require(state.device == x.device, "state", f"be on the input's device, {x.device}", state.device)
    return s, p, d


def _seen(t: Any) -> Any:
    return tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__


@opaque
def _directly(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, chunk: Chunk, steps: Steps
) -> Pair:
    """Computes a call by a kernel.

    Raises:
        Fallback: it cannot, and nothing has been launched.
        ValueError: a tensor of the epilogue does not fit the result.
    """
    tensors = [t for t in (x, w, b, state, *steps.tensors.values()) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise Fallback("a gradient is wanted")
    device = _planned_for(x)
    if torch.is_autocast_enabled(device):
        w, b = cast(device, w, b)
    return by_kernel(asked, x, w, b, state, chunk, steps)


def _by_operator(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, chunk: Chunk, steps: Steps
) -> Pair | None:
    """Computes a call by the registered operator. None if (state, chunk) must be concatenated. torch.compile traces it.

    Raises:
        ValueError: a tensor of the epilogue does not fit the result.
    """
    tensors = [t for t in (x, w, b, state, *steps.tensors.values()) if t is not None]
    if not entry.operators_run(*tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None
    if not is_dynamo_compiling() and (taken_apart() or torch._C._get_tracing_state()):  # whose extents are no numbers
        return None
    if torch.is_autocast_enabled(x.device.type):
        w, b = cast(x.device.type, w, b)
    before, after = zip(*asked.padding, strict=True)
    h = Window(asked.stride, before, after, asked.dilation, asked.groups)
    shape = result_shape("fprop", x, w, h)
    steps.check_tensors(shape, shape[1], x.dtype, x.device)
    slope = float(steps.negative_slope) if steps.activation == "leaky_relu" else 0.0
    how = steps.activation or "", slope, steps.residual_position, steps.stepwise
    found: Pair = torch.ops.tconv.conv_stream(x, w, b, state, steps.residual, steps.scale, steps.shift, *how, *h[:5])
    return found


def _without_outputs(
    rank: int,
    x: torch.Tensor,
    w: torch.Tensor,
    state: MaybeTensor,
    chunk: Chunk,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Pair:
    """Returns no outputs, and the state of a chunk after which none is due."""
    frame = [
        max(0, (e + before + after - d * (t - 1) - 1) // s + 1)
        for e, (before, after), d, t, s in zip(x.shape[3:], padding[1:], dilation[1:], w.shape[3:], stride[1:], strict=True)
    ]
    y = x.new_zeros((x.shape[0], w.shape[0], chunk.outputs, *frame))
    return y, whole(x, state, chunk)[:, :, chunk.first :].clone()
