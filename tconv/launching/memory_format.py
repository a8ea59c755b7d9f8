"""Strides and memory formats: how a tensor is addressed, and which format torch would give a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for, suggest_memory_format

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LIMIT = 2**31 - 1


def result_is_channels_last(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether y, dx and dw of this layer are channels_last: if x or w is, but never fp64 on CUDA.

    cuDNN's rule in ATen/native/ConvUtils.h. At rank 1 torch makes x contiguous and applies it to the unsqueezed pair.
    """
    if x.dtype == torch.float64 and not x.is_cpu:  # on a GPU, or on meta in place of one
        return False
    if x.dim() == 3:
        x, w = (
            x.contiguous(memory_format=torch.contiguous_format).unsqueeze(2) if x.is_meta else _as_row(x),
            w.unsqueeze(2),
        )
    return FORMATS[x.dim()] in (suggest_memory_format(x), suggest_memory_format(w))


def weight_format(w: torch.Tensor, channels_last: bool) -> bool:
    """Whether the gradient of a weight is channels_last where y and dx are, or are not.

    It is as they are, unless both formats put the same element at the same place: a filter of one tap, or one channel per
    group. There only strides of extents of one differ, and the gradient takes the weight's own. Autograd hands such a
    gradient on as it is, and DDP compares even those strides with the weight's.
    """
    if w.shape[1] == 1 or math.prod(w.shape[2:]) == 1:
        if w.stride() == make_contiguous_strides_for(w.shape):
            return False
        if w.stride() == make_channels_last_strides_for(w.shape):
            return True
    return channels_last


def _as_row(x: torch.Tensor) -> torch.Tensor:
    """`x.contiguous().unsqueeze(2)` of a 1-D batch, without copying: only its strides are asked for."""
    n, c, w = x.shape
    strides = x.stride() if x.is_contiguous() else (c * w, w, 1)
    return torch.empty(0, device="meta").as_strided((n, c, 1, w), (*strides[:2], strides[2] * w, strides[2]))


def shaped(shape: Sequence[int], channels_last: bool, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape in the format asked for, without memory; rank 1 as the squeezed rank 2.

    Its address, zero, is as aligned as that of any tensor that torch allocates.
    """
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device="meta")
    if len(shape) == 3:
        return shaped((shape[0], shape[1], 1, shape[2]), True, dtype).squeeze(2)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[len(shape)])


@dataclass(frozen=True)
class Addressing:
    """A rank-lifted tensor's strides: (outer, channel, three spatial ones), zero where the extent is one.

    Torch leaves any stride on an extent of one; zero there says nothing that is not so.

    Attributes:
        outer, channel, spatial: strides in elements. For a weight, outer is that of its first axis.
        unit: the channel axis is contiguous and longer than one.
        reach: largest offset of an element.
    """

    outer: int
    channel: int
    spatial: tuple[int, int, int]
    unit: bool
    reach: int


def addressing(t: torch.Tensor) -> Addressing:
    """How a tensor of rank 3 to 5 is addressed."""
    strides = [s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)]
    reach = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    a, b, c = [0] * (5 - len(strides)) + strides[2:]
    return Addressing(strides[0], strides[1], (a, b, c), strides[1] == 1, reach)


def flattened(a: Addressing, extents: Sequence[int]) -> tuple[Addressing, tuple[int, int, int], int]:
    """A tensor's addressing and three extents with dimensions merged that lie one behind the other, and how many are left.

    A merged extent still fits 32 bits. What is left comes last, extents of one before it.
    """
    kept: list[tuple[int, int]] = []
    for extent, stride in zip(extents, a.spatial, strict=True):
        if kept and kept[-1][1] == extent * stride and kept[-1][0] * extent <= LIMIT:
            kept[-1] = kept[-1][0] * extent, stride
        elif extent != 1:
            kept.append((extent, stride))
    (e0, s0), (e1, s1), (e2, s2) = [(1, 0)] * (3 - len(kept)) + kept
    return replace(a, spatial=(s0, s1, s2)), (e0, e1, e2), max(1, len(kept))


def vector(pointer: int, itemsize: int, *multiples: int) -> int:
    """Elements of one access, at most 16 bytes: the largest power of two that divides address, strides and extents."""
    v = 16 // itemsize
    while v > 1 and (pointer % (v * itemsize) or any(m % v for m in multiples)):
        v //= 2
    return v
