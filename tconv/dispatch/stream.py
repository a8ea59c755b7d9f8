"""Convolutions of a stream, chunk by chunk: the frames that the next output still needs are handed on as a state.

tconv's gather kernel reads (state, chunk) as if concatenated and writes the next state in the same launch. Elsewhere, and where
a gradient is wanted, they are concatenated; `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import entry
from tconv.dispatch.autocast import cast
from tconv.dispatch.check import CallArguments, paddings, parameter, per_dimension, require
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.steps import Steps, with_epilogue
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.problem import STATE, ZEROS, Geometry

MaybeTensor = torch.Tensor | None
VECTOR = 4  # channels of a result that is written channels last
_streamed: BoundedCache[Geometry, Geometry] = BoundedCache()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a chunk gives, in times.

    Attributes:
        before: the times before it: those of its state, or zeros at the beginning of the stream.
        outputs: the outputs.
        first: the first time of (before, chunk) that the next output reads.
        kept: the times of the next state.
    """

    before: int
    outputs: int
    first: int
    kept: int


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `tconv.functional.conv1d_stream` or `conv3d_stream`. Returns y and the next state.

    Raises:
        ValueError: an argument does not fit.
    """
    x, state = _in_autocast(x, state)
    stride, padding, dilation = _check(rank, x, w, b, state, stride, padding, dilation, groups)
    steps.check_kinds()
    t, times = w.shape[2], x.shape[2]
    chunk = _chunk(None if state is None else state.shape[2], times, t, stride[0], dilation[0])
    if not chunk.outputs or not x.numel():
        return _without_outputs(rank, x, w, state, chunk, stride, padding, dilation)
    sides = ((chunk.before, 0), *padding[1:])
    asked = CallArguments(False, rank, stride, sides, 0, groups, dilation)
    if not is_dynamo_compiling():
        try:
            return _by_kernel(asked, x, w, b, state, chunk, steps)
        except Fallback as e:
            why = str(e)
        record_call(Call(f"conv{rank}d_stream", None, None, f"(state, chunk) concatenated: {why}"))
    return _concatenated(rank, x, w, b, state, chunk, asked, steps)


def _in_autocast(x: Any, state: Any) -> tuple[Any, Any]:
    """Returns input and state in autocast's dtype, where it is enabled: what is handed on is what the convolution reads."""
    if not isinstance(x, torch.Tensor) or not (state is None or isinstance(state, torch.Tensor)):
        return x, state
    dry = None if is_dynamo_compiling() else DRY.get()
    device = "cuda" if dry and dry.device else x.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return x, state
    x, state = cast(device, x, state)
    return x, state


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
        require(fits, "state", f"have shape ({', '.join(map(str, shape))})", tuple(state.shape))
        require(state.dtype == x.dtype, "state", f"be of the input's dtype, {x.dtype}", state.dtype)
        require(state.device == x.device, "state", f"be on the input's device, {x.device}", state.device)
    return s, p, d


def _seen(t: Any) -> Any:
    return tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__


def _chunk(held: int | None, times: int, taps: int, stride: int, dilation: int) -> Chunk:
    """Returns what a chunk of so many times gives, after a state of `held` times; None at the beginning of the stream.

    Raises:
        ValueError: the next output skips times that have not come yet.
    """
    reach = dilation * (taps - 1)
    before = reach if held is None else held
    outputs = max(0, (before + times - reach - 1) // stride + 1)
    first = outputs * stride
    kept = before + times - first
    if kept < 0:
        raise ValueError(f"stride {stride} skips {-kept} times after this chunk: give chunks of a multiple of {stride} times")
    return Chunk(before, outputs, first, kept)


def _geometry(g: Geometry, stride: int) -> Geometry:
    """Returns the geometry of a stream's chunk, given that of a convolution that is padded as much in its first dimension.

    Args:
        stride: along time, also if there is one output, since a chunk of another length must get the same plan.
    """
    found = _streamed.get(g)
    if found is None:
        time = 3 - g.problem.rank
        borders, strides = list(ZEROS), list(g.problem.S)
        borders[time], strides[time] = STATE, stride
        (a, b, c), (r, s, t) = borders, strides
        problem = dataclasses.replace(g.problem, borders=(a, b, c), S=(r, s, t))
        # Few channels are no vectors. Written channels last, they would make the planner take all accesses for narrow ones.
        channels_last = time == 2 or problem.K % VECTOR == 0  # a single step lies in both formats
        found = dataclasses.replace(g, problem=problem, channels_last=channels_last)
        if not g.dry:
            _streamed[g] = found
    return found


@opaque
def _by_kernel(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, chunk: Chunk, steps: Steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a call by a kernel.

    Raises:
        Fallback: it cannot, and nothing has been launched.
        ValueError: a tensor of the epilogue does not fit the result.
    """
    tensors = [t for t in (x, w, b, state, *steps.tensors.values()) if t is not None]
    dry, (device, _) = DRY.get(), entry.check_context(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise Fallback("a gradient is wanted")
    if torch.is_autocast_enabled(device):
        w, b = cast(device, w, b)
    g = entry.geometry(asked, x, w, b, "always", is_batch_invariant())
    shape = g.problem.shape("y")
    steps.check_tensors(shape, shape[1], x.dtype, x.device)
    if dry:
        g = dataclasses.replace(g, dry=True, device=dry.device)
    from tconv.dispatch import fused
    from tconv.launching import launch

    g = _geometry(g, asked.stride[0])
    with_steps = with_epilogue(g, steps.epilogue)
    held = state if chunk.before else None
    prepared = launch.streaming(with_steps, x, w, b, held, chunk.kept, chunk.first - chunk.before)
    how = fused.ForwardPass(False, prepared, with_steps, g, False, False)
    n, c, _, *frame = x.shape
    after = x.new_empty((n, chunk.kept, *frame, c)).movedim(-1, 1)
    y, _ = how.run(x, w, b, steps.residual, steps.scale, steps.shift, (x if held is None else held, after))
    return y, after


def _concatenated(
    rank: int,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    state: MaybeTensor,
    chunk: Chunk,
    asked: CallArguments,
    steps: Steps,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a call as an ordinary convolution of (state, chunk)."""
    from tconv.dispatch import epilogues

    whole = _whole(x, state, chunk)
    asked = asked._replace(padding=((0, 0), *asked.padding[1:]))
    if steps.epilogue:
        y = epilogues.convolve(asked, whole, w, b, steps)
    else:
        y = entry.PUBLIC[False][rank](whole, w, b, asked.stride, asked.padding, asked.dilation, asked.groups)
    return y, whole[:, :, chunk.first :].clone()


def _whole(x: torch.Tensor, state: MaybeTensor, chunk: Chunk) -> torch.Tensor:
    held = x.new_zeros((*x.shape[:2], chunk.before, *x.shape[3:])) if state is None else state
    return torch.cat((held, x), 2)


def _without_outputs(
    rank: int,
    x: torch.Tensor,
    w: torch.Tensor,
    state: MaybeTensor,
    chunk: Chunk,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns no outputs, and the state of a chunk after which none is due."""
    frame = [
        max(0, (e + before + after - d * (t - 1) - 1) // s + 1)
        for e, (before, after), d, t, s in zip(x.shape[3:], padding[1:], dilation[1:], w.shape[3:], stride[1:], strict=True)
    ]
    y = x.new_zeros((x.shape[0], w.shape[0], chunk.outputs, *frame))
    return y, _whole(x, state, chunk)[:, :, chunk.first :].clone()
