"""tconv's operators expressed in aten's: one convolution if torch has that layer, else one with padding or cropping around it.

Used by decompositions.py in graphs, where sizes may be symbolic, and by operators.py when an operator falls back to torch.
Padding and cropping are needed because torch pads both ends alike and derives the output's extents from x. A window may pad
its two ends differently or leave the end of x unread. Nor do torch's functions have a padding that repeats x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tconv.dispatch.window import Window, result_shape
from tconv.launching.memory_format import FORMATS

MaybeTensor = torch.Tensor | None
CONVOLUTION = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def fprop(x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    x, h = _repeated(x, Window(*rest))
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
    if h.mode != "zeros":
        padded = dgrad(dy, w, None, *h._replace(before=[0] * rank, after=[0] * rank, mode="zeros"))
        for d, (before, after) in enumerate(zip(h.before, h.after, strict=True), 2):
            padded = _folded(padded, d, before, after, h.mode)
        return _laid_out(padded, h)
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
    x, h = _repeated(x, Window(*rest))
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


def _repeated(x: torch.Tensor, h: Window) -> tuple[torch.Tensor, Window]:
    """Returns x padded by its own elements, as a window's mode has it, and the window of the padded x."""
    if h.mode == "zeros":
        return x, h
    before, after = ([max(n, 0) for n in side] for side in (h.before, h.after))
    if h.mode == "circular":  # not by F.pad, which writes in place, as no graph of aten's operators may
        for d, (left, right) in enumerate(zip(before, after, strict=True), 2):
            x = torch.cat([x.narrow(d, x.shape[d] - left, left), x, x.narrow(d, 0, right)], d)
    else:
        x = F.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair], mode=h.mode)
    return x, h._replace(before=_less(h.before, before), after=_less(h.after, after), mode="zeros")


def _folded(g: torch.Tensor, d: int, before: Any, after: Any, mode: str) -> torch.Tensor:
    """Returns the gradient of x from that of x padded by its own elements in dimension d; negative numbers cropped x."""
    if _all_ints([before, after]) and before == after == 0:
        return g

    def placed(part: torch.Tensor, start: Any, end: Any) -> torch.Tensor:
        return torch.constant_pad_nd(part, [0, 0] * (g.dim() - 1 - d) + [start, end])

    left, right = max(before, 0), max(after, 0)
    g = placed(g, left - before, right - after)
    extent = g.shape[d] - left - right
    parts, found = (g.narrow(d, 0, left), g.narrow(d, left + extent, right)), g.narrow(d, left, extent)
    if mode == "reflect":
        first, last = (part.flip(d) for part in parts)
        start, end = 1, extent - 1 - right
    elif mode == "circular":
        first, last = parts
        start, end = extent - left, 0
    else:
        first, last = (part.sum(d, keepdim=True) for part in parts)
        start, end, left, right = 0, extent - 1, 1, 1
    return found + placed(first, start, extent - start - left) + placed(last, end, extent - end - right)


def _laid_out(t: torch.Tensor, h: Window) -> torch.Tensor:
    """Returns a result in the window's memory format; unchanged if the window has none, or at rank 1."""
    if h.channels_last is None or t.dim() not in FORMATS:
        return t
    return t.contiguous(memory_format=FORMATS[t.dim()] if h.channels_last else torch.contiguous_format)


IN_ATEN: dict[str, Callable[..., torch.Tensor]] = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}
