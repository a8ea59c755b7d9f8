"""The window of tconv's operators: which elements of x each filter tap reads. Its numbers are ints or SymInts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tconv.planning.problem import Geometry


class Window(NamedTuple):
    """Stride, padding, dilation and groups of an operator; all but groups have one number per spatial dimension.

    Attributes:
        stride, dilation, groups: as in torch.
        before, after: padding before the first element of x and after its last one, in elements; negative numbers crop.
        channels_last: whether the result is channels_last; None for the memory format that torch would give a layer's result.
        mode: what padding repeats, as torch's padding_mode.
    """

    stride: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    dilation: Sequence[int]
    groups: int
    channels_last: bool | None = None
    mode: str = "zeros"


def window(g: Geometry) -> Window:
    """Returns the exact window of a problem (see `exact`)."""
    p, skip = g.problem, 3 - g.problem.rank
    mode = next((border for border in p.borders if border != "zeros"), "zeros")
    loose = Window(p.S[skip:], p.P[skip:], p.P[skip:], p.D[skip:], p.G, g.channels_last, mode)
    return exact(loose, p.X[skip:], p.Y[skip:], p.T[skip:])


def exact(h: Window, x: Sequence[int], y: Sequence[int], taps: Sequence[int]) -> Window:
    """Returns a window whose `after` ends at the last element that is read; negative if that is before the end of x.

    Args:
        h: the window; its `after` is ignored.
        x, y, taps: spatial extents of input, output and filter.
    """
    parts = zip(x, y, taps, h.stride, h.before, h.dilation, strict=True)
    return h._replace(after=[(b - 1) * s + d * (t - 1) + 1 - a - before for a, b, t, s, before, d in parts])


def extents(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of x and w, given the name of an operator and its two operands."""
    spatial = list(zip(a.shape[2:], b.shape[2:], h.stride, h.before, h.after, h.dilation, strict=True))
    if name == "fprop":
        return tuple(a.shape), tuple(b.shape)
    if name == "dgrad":
        x = [(y - 1) * s + d * (t - 1) + 1 - before - after for y, t, s, before, after, d in spatial]
        return (a.shape[0], b.shape[1] * h.groups, *x), tuple(b.shape)
    taps = [(x + before + after - 1 - (y - 1) * s) // d + 1 for y, x, s, before, after, d in spatial]
    return tuple(b.shape), (a.shape[1], b.shape[1] // h.groups, *taps)


def result_shape(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> tuple[int, ...]:
    """Returns the shape of an operator's result."""
    x, w = extents(name, a, b, h)
    if name != "fprop":
        return x if name == "dgrad" else w
    parts = zip(x[2:], w[2:], *h[:4], strict=True)
    y = [(e + before + after - d * (t - 1) - 1) // s + 1 for e, t, s, before, after, d in parts]
    return x[0], w[0], *y
