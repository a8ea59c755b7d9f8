"""A chunk of a stream as one registered torch operator, which torch.compile and tracing keep whole; by tconv's gather kernel,
which reads (state, chunk) as if concatenated and writes the next state in the same launch, or by their concatenation.

Where a gradient is wanted, in functorch's transforms and in forward-mode differentiation they are concatenated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tconv.dispatch import entry, epilogues, operators
from tconv.dispatch.check import CallArguments
from tconv.dispatch.context import plain, taken_apart
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.steps import Steps, with_epilogue
from tconv.dispatch.window import Window, result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import shaped
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.problem import STATE, ZEROS, Geometry

MaybeTensor = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]
VECTOR = 4  # channels of a result that is written channels last
SCHEMA = (
    "(Tensor x, Tensor w, Tensor? b, Tensor? state, Tensor? residual, Tensor? scale, Tensor? shift, str activation, "
    "float slope, str position, bool stepwise, int[] stride, SymInt[] before, SymInt[] after, int[] dilation, SymInt groups) "
    "-> (Tensor, Tensor)"
)
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


def chunk_of(held: int | None, times: int, taps: int, stride: int, dilation: int) -> Chunk:
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


def _is_channels_last(rank: int, channels: int) -> bool:
    """Returns True if the result is channels last. With few channels, which are no vectors, the planner would then take all
    accesses for narrow ones; of rank 1, a single step lies in both formats.
    """
    return rank == 1 or channels % VECTOR == 0


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
        channels_last = _is_channels_last(problem.rank, problem.K)
        found = dataclasses.replace(g, problem=problem, channels_last=channels_last)
        if not g.dry:
            _streamed[g] = found
    return found


@opaque
def by_kernel(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, chunk: Chunk, steps: Steps
) -> Pair:
    """Computes a call by a kernel.

    Raises:
        Fallback: it cannot, and nothing has been launched.
        ValueError: a tensor of the epilogue does not fit the result.
    """
    dry = DRY.get()
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


def concatenated(
    asked: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, chunk: Chunk, steps: Steps
) -> Pair:
    """Computes a call as an ordinary convolution of (state, chunk)."""
    xs = whole(x, state, chunk)
    asked = asked._replace(padding=((0, 0), *asked.padding[1:]))
    if steps.epilogue:
        y = epilogues.convolve(asked, xs, w, b, steps)
    else:
        y = entry.PUBLIC[False][asked.rank](xs, w, b, asked.stride, asked.padding, asked.dilation, asked.groups)
    return y, xs[:, :, chunk.first :].clone()


def whole(x: torch.Tensor, state: MaybeTensor, chunk: Chunk) -> torch.Tensor:
    """Returns (state, chunk)."""
    held = x.new_zeros((*x.shape[:2], chunk.before, *x.shape[3:])) if state is None else state
    return torch.cat((held, x), 2)


# The operator


def _parted(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of `by_kernel` and `concatenated` for those of the operator."""
    x, w, b, state, residual, scale, shift, activation, slope, position, stepwise, stride, before, after, dilation, groups = (
        args
    )
    steps = Steps(activation or None, slope, residual, position, scale, shift, stepwise)
    chunk = chunk_of(None if state is None else state.shape[2], x.shape[2], w.shape[2], stride[0], dilation[0])
    sides = tuple(zip(before, after, strict=True))
    asked = CallArguments(False, x.dim() - 2, tuple(stride), sides, 0, groups, tuple(dilation))
    return asked, x, w, b, state, chunk, steps


def _fake(*args: Any) -> Pair:
    (asked, x, w, _, _, chunk, _), h = _parted(args), Window(*args[11:])
    like = shaped(result_shape("fprop", x, w, h), _is_channels_last(asked.rank, w.shape[0]), x.dtype)
    n, c, _, *frame = x.shape
    return x.new_empty_strided(like.shape, like.stride()), x.new_empty((n, chunk.kept, *frame, c)).movedim(-1, 1)


def _run(*args: Any) -> Pair:
    """Runs the operator by tconv's kernel, or falls back to a concatenation."""
    given = _parted(tuple(plain(t) if isinstance(t, torch.Tensor) else t for t in args))
    try:
        return by_kernel(*given)
    except Fallback as e:
        why = str(e)
    asked, _, w, *_ = given
    record_call(Call(f"conv{asked.rank}d_stream", None, None, f"(state, chunk) concatenated: {why}"))
    y, after = concatenated(*given)
    after = after.movedim(1, -1).contiguous().movedim(-1, 1)
    return operators.laid_out(y, _is_channels_last(asked.rank, w.shape[0])), after


def _autograd(keys: Any, *args: Any) -> Pair:
    if taken_apart() or (torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args)):
        return concatenated(*_parted(args))
    with torch._C._AutoDispatchBelowAutograd():
        found: Pair = STREAM.redispatch(keys & torch._C._after_autograd_keyset, *args)
    return found


def in_aten(*args: Any) -> Pair:
    """Returns what the operator returns, by a concatenation."""
    return concatenated(*_parted(args))


STREAM = operators.register("conv_stream", SCHEMA, _run, _fake, _autograd)
operators.LIBRARY.impl("conv_stream", opaque(in_aten), "FuncTorchBatched")  # whose parts have rules
