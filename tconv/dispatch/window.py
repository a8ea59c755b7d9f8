"""The window of tconv's operators: how the taps of a filter meet the elements of x. Plain or symbolic numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tconv.planning.problem import Geometry


class Window(NamedTuple):
    """How taps meet elements, one number per spatial dimension.

    Attributes:
        stride, dilation, groups: as torch's.
        before, after: padding in front of the first element of x and behind its last one; negative numbers crop.
        channels_last: memory format of the result; None for the one torch would give a layer's.
    """

    stride: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    dilation: Sequence[int]
    groups: int
    channels_last: bool | None = None


def window(g: Geometry) -> Window:
    """The exact window of a problem."""
    p, skip = g.problem, 3 - g.problem.rank
    loose = Window(p.S[skip:], p.P[skip:], p.P[skip:], p.D[skip:], p.G, g.channels_last)
    return exact(loose, p.X[skip:], p.Y[skip:], p.T[skip:])


def exact(h: Window, x: Sequence[int], y: Sequence[int], taps: Sequence[int]) -> Window:
    """The window with the padding behind x that is read."""
    parts = zip(x, y, taps, h.stride, h.before, h.dilation, strict=True)
    return h._replace(after=[(b - 1) * s + d * (t - 1) + 1 - a - before for a, b, t, s, before, d in parts])


def extents(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of x and w, for the operator of that name and its two arguments."""
    spatial = list(zip(a.shape[2:], b.shape[2:], h.stride, h.before, h.after, h.dilation, strict=True))
    if name == "fprop":
        return tuple(a.shape), tuple(b.shape)
    if name == "dgrad":
        x = [(y - 1) * s + d * (t - 1) + 1 - before - after for y, t, s, before, after, d in spatial]
        return (a.shape[0], b.shape[1] * h.groups, *x), tuple(b.shape)
    taps = [(x + before + after - 1 - (y - 1) * s) // d + 1 for y, x, s, before, after, d in spatial]
    return tuple(b.shape), (a.shape[1], b.shape[1] // h.groups, *taps)


def result_shape(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> tuple[int, ...]:
    """Shape of an operator's result."""
    x, w = extents(name, a, b, h)
    if name != "fprop":
        return x if name == "dgrad" else w
    parts = zip(x[2:], w[2:], *h[:4], strict=True)
    y = [(e + before + after - d * (t - 1) - 1) // s + 1 for e, t, s, before, after, d in parts]
    return x[0], w[0], *y
