"""Padding that differs by side, where torch computes a call: torch's functions take one number per dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tconv.dispatch.check import by_side, paddings, per_dimension
from tconv.launching.record import Fallback


def pairs(padding: Any, rank: int, name: str = "padding") -> list[tuple[int, int]]:
    """Returns a padding, whose argument has that name, as (before, after) per dimension.

    Raises:
        ValueError: it is none: a number or a pair of numbers per dimension, none of them negative.
    """
    try:
        found = [p if isinstance(p, tuple) else (p, p) for p in per_dimension(paddings(padding), rank, name)]
        if min(map(min, found)) < 0:
            raise Fallback("negative")
    except Fallback:
        wanted = f"a number or a pair (before, after) for each of {rank} dimensions, none of them negative"
        raise ValueError(f"{name} must be {wanted}, got {padding!r}") from None
    return found


def for_pad(padding: Any, rank: int) -> list[int]:
    """Returns a padding as torch.nn.functional.pad takes it: the last dimension's first."""
    return [p for pair in reversed(pairs(padding, rank)) for p in pair]


def by_torch(
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
) -> torch.Tensor | None:
    """Computes a convolution whose padding differs by side by torch: of a padded copy, or cropping what is too much.

    Returns None if the padding is torch's.
    """
    if not by_side(padding):
        return None
    if not transposed:
        y: torch.Tensor = getattr(F, f"conv{rank}d")(F.pad(x, for_pad(padding, rank)), w, b, stride, 0, dilation, groups)
        return y
    y = getattr(F, f"conv_transpose{rank}d")(x, w, b, stride, 0, output_padding, groups, dilation)
    for d, (before, after) in enumerate(pairs(padding, rank), y.dim() - rank):
        y = y.narrow(d, before, max(0, y.shape[d] - before - after))
    return y
