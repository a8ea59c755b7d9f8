"""tconv's operators expressed in aten's: one convolution if torch has that layer, else one with padding or cropping around it.

Used by decompositions.py in graphs, where sizes may be symbolic, and by operators.py when an operator falls back to torch.
Padding and cropping are needed because torch pads both ends alike and derives the output's extents from x. A window may pad
its two ends differently or leave the end of x unread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tconv.dispatch.window import Window, result_shape
from tconv.launching.memory_format import FORMATS

MaybeTensor = torch.Tensor | None
CONVOLUTION = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def fprop(x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    padding = h.before
    if not _all_ints(h.before, h.after):
        x, padding = _pad(x, h.before, h.after), [0] * len(h.before)
    elif [*h.before] != [*h.after] and not _reads_no_further(x, w, h):
        padding = [max(min(ends), 0) for ends in zip(h.before, h.after, strict=True)]
        x = _pad(x, _less(h.before, padding), _less(h.after, padding))
    y = CONVOLUTION[len(padding)](x, w, b, h.stride, padding, h.dilation, h.groups)
    return _laid_out(y, h)


def dgrad(dy: torch.Tensor, w: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    rank = len(h.stride)
    transposed = TRANSPOSED[rank]
    if _all_ints(h.before, h.after) and min(h.before) >= 0:
        more = _less(h.before, h.after)  # what torch calls output_padding
        if all(0 <= m < max(s, d) for m, s, d in zip(more, h.stride, h.dilation, strict=True)):
            # torch's stubs want lists of int, where these may be symbolic.
            return _laid_out(transposed(dy, w, b, h.stride, h.before, more, h.groups, h.dilation), h)  # type: ignore[arg-type]
    zero = [0] * rank
    # torch's stubs want lists of int, where these may be symbolic.
    dx = transposed(dy, w, None, h.stride, zero, zero, h.groups, h.dilation)  # type: ignore[arg-type]
    dx = _pad(dx, [-n for n in h.before], [-n for n in h.after])
    if b is not None:  # added after the padding, for dx has a bias also where no tap reads it
        dx = dx + b.view(-1, *(1,) * rank)
    return _laid_out(dx, h)


def wgrad(dy: torch.Tensor, x: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    rank = len(h.stride)
    like = x.new_zeros(()).expand(result_shape("wgrad", dy, x, h))  # torch reads its shape only
    padding = h.before
    symmetric = _all_ints(h.before, h.after) and min(h.before) >= 0
    if not symmetric or any(not 0 <= p - q < s for p, q, s in zip(h.before, h.after, h.stride, strict=True)):
        x, padding = _pad(x, h.before, h.after), [0] * rank
    parameters = h.stride, padding, h.dilation, False, [0] * rank, h.groups
    dw = torch.ops.aten.convolution_backward(dy, x, like, None, *parameters, (False, True, False))[1]
    return _laid_out(dw, h)


def _all_ints(*parameters: Sequence[Any]) -> bool:
    """Returns True if all are ints, none a SymInt. Comparing ints does not specialise a graph to one size."""
    return all(type(n) is int for numbers in parameters for n in numbers)


def _reads_no_further(x: torch.Tensor, w: torch.Tensor, h: Window) -> bool:
    """Returns True if padding x after as much as before gives the same result, since no step reads the difference."""
    if min(h.before) < 0 or not _all_ints(x.shape, w.shape):
        return False
    return result_shape("fprop", x, w, h._replace(after=h.before)) == result_shape("fprop", x, w, h)


def _less(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    return [m - n for m, n in zip(a, b, strict=True)]


def _pad(t: torch.Tensor, before: Sequence[Any], after: Sequence[Any]) -> torch.Tensor:
    """Pads each spatial dimension with zeros before and after; negative numbers crop."""
    ends = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return t if _all_ints(ends) and not any(ends) else torch.constant_pad_nd(t, ends)


def _laid_out(t: torch.Tensor, h: Window) -> torch.Tensor:
    """Returns a result in the window's memory format; unchanged if the window has none, or at rank 1."""
    if h.channels_last is None or t.dim() not in FORMATS:
        return t
    return t.contiguous(memory_format=FORMATS[t.dim()] if h.channels_last else torch.contiguous_format)


IN_ATEN: dict[str, Callable[..., torch.Tensor]] = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}
