"""Padding that differs by side or repeats the input, where torch computes a call: torch's functions pad both sides by zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tconv.dispatch.check import by_side, paddings, pads_of, parameter, per_dimension
from tconv.launching.record import Fallback
from tconv.planning.problem import MODES


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
    mode: Any = "zeros",
) -> torch.Tensor | None:
    """Computes a convolution whose padding torch's functions do not have: of a padded copy, or cropping what is too much.

    Returns None if the padding is torch's.

    Raises:
        ValueError: the padding or its mode is none.
        Whatever torch raises for the convolution or for padding in that mode.
    """
    if mode not in MODES:
        raise ValueError(f"padding_mode must be one of {MODES}, got {mode!r}")
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{rank}d")
    if mode != "zeros" and isinstance(padding, str):
        try:
            steps, dilations = (per_dimension(parameter(v), rank, "") for v in (stride, dilation))
            padding = tuple(pads_of(padding, rank, transposed, w.shape[2:], steps, dilations))
        except Fallback:
            return function(x, w, b, stride, padding, dilation, groups)  # type: ignore[no-any-return]  # which raises
    if not by_side(padding) and mode == "zeros":
        return None
    if not transposed:
        pads = for_pad(padding, rank)
        x = F.pad(x, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else x
        y: torch.Tensor = function(x, w, b, stride, 0, dilation, groups)
        return y
    y = function(x, w, b, stride, 0, output_padding, groups, dilation)
    for d, (before, after) in enumerate(pairs(padding, rank), y.dim() - rank):
        y = y.narrow(d, before, max(0, y.shape[d] - before - after))
    return y
