"""Checks a call's tensors and parameters the way torch does.

A call that torch would refuse, or that tconv's kernels do not support, raises Fallback. The caller then passes its own
arguments to torch, so that users see torch's error, type and text.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tconv.dispatch.support import DTYPES, TOO_LARGE, problem_of, too_large
from tconv.dispatch.window import Window
from tconv.launching.memory_format import result_is_channels_last, weight_format
from tconv.launching.record import Fallback
from tconv.planning.addressing import LIMIT
from tconv.planning.problem import MODES, Geometry


class CallArguments(NamedTuple):
    """The arguments of a call besides its tensors, exactly as the caller gave them. The first two tell which function it is."""

    transposed: bool
    rank: int
    stride: Any
    padding: Any
    output_padding: Any
    groups: Any
    dilation: Any
    mode: Any = "zeros"  # torch's padding_mode


def require(holds: bool, name: str, what: str, got: Any) -> None:
    """Raises ValueError unless a condition holds: the argument of that name must do `what`, and was `got`."""
    if not holds:
        raise ValueError(f"{name} must {what}, got {got}")


def parameter(value: Any) -> int | tuple[int, ...]:
    """Returns a stride, padding or dilation as an int or a tuple of ints.

    Raises:
        Fallback: it is anything else, a float for example, which torch refuses.
    """
    if type(value) is int:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([v if type(v) is int else index(v) for v in value])  # faster than of a generator
    return index(value)


def paddings(value: Any) -> Any:
    """Returns a padding as `parameter` does, where a pair (before, after) may stand for a number.

    Raises:
        Fallback: it is anything else.
    """
    if not by_side(value):
        return parameter(value)
    sides = tuple([parameter(v) for v in value])
    if any(isinstance(v, tuple) and len(v) != 2 for v in sides):
        raise Fallback(f"padding={value!r}")
    return sides


def by_side(padding: Any) -> bool:
    """Returns True if a padding has a pair (before, after) for some dimension, which torch's functions do not know."""
    return isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding)


def index(value: Any) -> int:
    if isinstance(value, (bool, torch.Tensor, torch.SymInt)):
        raise Fallback(f"a parameter that is a {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:
        raise Fallback(f"a parameter that is a {type(value).__name__}") from None


def per_dimension(value: Any, rank: int, name: str) -> tuple[Any, ...]:
    """Returns a parameter as one int per spatial dimension; a single value stands for all of them.

    Raises:
        Fallback: the number of values is neither 1 nor `rank`.
    """
    values = value if isinstance(value, tuple) else (value,)
    if len(values) == 1:
        values = values * rank
    if len(values) != rank:
        raise Fallback(f"{name}={value!r}")
    return values


def accepted(
    asked: CallArguments, x: Any, w: Any, b: Any, autocast: bool = False, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Window:
    """Checks what torch checks, and returns the call's window: stride, padding, dilation and groups, one per dimension.

    Args:
        autocast: whether autocast will give the tensors one dtype.
        dtypes: those that x may have.
    Raises:
        Fallback: torch would refuse the call.
    """
    transposed, rank, stride, padding, output_padding, groups, dilation, mode = asked
    if type(groups) is not int:
        raise Fallback("groups that are no int")
    if x.dtype not in dtypes:
        raise Fallback(f"dtype {x.dtype}")
    for t in (w, b):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            wide = torch.float64 in (t.dtype, x.dtype)
            if not autocast or wide or t.device != x.device or t.dtype not in DTYPES:
                raise Fallback("tensors of several dtypes or devices")
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        raise Fallback(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    s, d = per_dimension(parameter(stride), rank, "stride"), per_dimension(parameter(dilation), rank, "dilation")
    op = per_dimension(parameter(output_padding), rank, "output_padding")
    if groups < 1 or min(s) < 1 or min(d) < 1 or min(op) < 0 or max(groups, *s, *d, *op) > LIMIT:
        raise Fallback("a stride, dilation, output_padding or number of groups out of range")
    if x.numel() == 0 or w.numel() == 0:
        raise Fallback("a tensor without elements")
    c, k = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
    if x.shape[-1 - rank] != c or w.shape[0] % groups or (b is not None and (b.dim() != 1 or b.shape[0] != k)):
        raise Fallback("channels, groups and weight that do not fit together")
    pads = pads_of(padding, rank, transposed, w.shape[2:], s, d)
    before, after = [p for p, _ in pads], [p for _, p in pads]
    if mode != "zeros":
        _check_mode(mode, transposed, pads, x.shape[-rank:])
    if transposed:
        for o, si, di in zip(op, s, d, strict=True):
            if o >= max(si, di):
                raise Fallback("output_padding not smaller than stride or dilation")
        after = [p - o for p, o in zip(after, op, strict=True)]
    h = Window(s, before, after, d, groups, None, mode)
    for e, t, si, p, q, di in zip(x.shape[-rank:], w.shape[2:], s, before, after, d, strict=True):
        if ((e - 1) * si + di * (t - 1) + 1 - p - q if transposed else e + p + q - di * (t - 1)) < 1:
            raise Fallback("an output without elements")
    return h


def examine(asked: CallArguments, x: Any, w: Any, b: Any) -> Geometry:
    """Returns the geometry of a call that torch accepts and tconv's kernels support.

    Raises:
        Fallback: one of them does not.
    """
    h = accepted(asked, x, w, b)
    x = x if x.dim() == asked.rank + 2 else x.unsqueeze(0)
    problem = problem_of("dgrad" if asked.transposed else "fprop", x, w, h)
    if too_large(problem, w, b):
        raise Fallback(TOO_LARGE)
    channels_last = result_is_channels_last(x, w)
    return Geometry(problem, channels_last, dw_channels_last=weight_format(w, channels_last))


def _check_mode(mode: Any, transposed: bool, pads: Sequence[tuple[int, int]], extents: Sequence[int]) -> None:
    """Raises Fallback where torch.nn.functional.pad would refuse a mode."""
    if mode not in MODES or transposed:
        raise Fallback(f"padding_mode={mode!r}")
    room = {"reflect": -1, "circular": 0}.get(mode)
    if room is not None and any(max(pair) > extent + room for pair, extent in zip(pads, extents, strict=True)):
        raise Fallback(f"padding that a {mode} input has too few elements for")


def pads_of(
    padding: Any, rank: int, transposed: bool, taps: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Returns the padding (before, after) of each dimension. Like torch, "same" puts an odd element after.

    Raises:
        Fallback: torch would refuse it.
    """
    if isinstance(padding, str):
        if transposed or padding not in ("same", "valid") or (padding == "same" and max(stride) > 1):
            raise Fallback(f"padding={padding!r}")
        totals = [d * (t - 1) if padding == "same" else 0 for d, t in zip(dilation, taps, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    pads = [p if isinstance(p, tuple) else (p, p) for p in per_dimension(paddings(padding), rank, "padding")]
    if min(map(min, pads)) < 0:
        raise Fallback("negative padding")
    return pads
