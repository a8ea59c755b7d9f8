"""Strides and memory formats: how a tensor is addressed, and the memory format that torch would give a result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for, suggest_memory_format

from tconv.planning.addressing import Addressing

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def result_is_channels_last(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Returns True if y, dx and dw of a layer with input x and weight w are channels_last.

    They are if x or w is, except for fp64 on CUDA. This is the rule that ATen/native/ConvUtils.h applies to cuDNN. At rank 1
    torch makes x contiguous, unsqueezes x and w to rank 2, and applies the rule to those.
    """
    if x.dtype == torch.float64 and not x.is_cpu:  # a meta tensor stands for one on a GPU
        return False
    if x.dim() == 3:
        x, w = (
            x.contiguous(memory_format=torch.contiguous_format).unsqueeze(2) if x.is_meta else _as_row(x),
            w.unsqueeze(2),
        )
    return FORMATS[x.dim()] in (suggest_memory_format(x), suggest_memory_format(w))


def weight_format(w: torch.Tensor, channels_last: bool) -> bool:
    """Returns True if dw, the gradient of weight w, is channels_last.

    dw has the memory format of y and dx, given as `channels_last`, unless both formats have the same element order: a filter
    of one tap, or one channel per group. The formats then differ only in the strides of dimensions of extent one, and dw
    takes the format of w. Autograd passes such a gradient on unchanged, and DDP compares even those strides with the
    weight's.
    """
    if w.shape[1] == 1 or math.prod(w.shape[2:]) == 1:
        if w.stride() == make_contiguous_strides_for(w.shape):
            return False
        if w.stride() == make_channels_last_strides_for(w.shape):
            return True
    return channels_last


def _as_row(x: torch.Tensor) -> torch.Tensor:
    """Returns a meta tensor with the shape and strides of `x.contiguous().unsqueeze(2)`, for x [N, C, W], without a copy."""
    n, c, w = x.shape
    strides = x.stride() if x.is_contiguous() else (c * w, w, 1)
    return torch.empty(0, device="meta").as_strided((n, c, 1, w), (*strides[:2], strides[2] * w, strides[2]))


def shaped(shape: Sequence[int], channels_last: bool, dtype: torch.dtype) -> torch.Tensor:
    """Returns a meta tensor of this shape in the contiguous or channels_last format.

    A channels_last tensor of rank 1 is a squeezed one of rank 2. The address is zero, so the tensor counts as aligned, like
    every tensor that torch allocates.
    """
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device="meta")
    if len(shape) == 3:
        return shaped((shape[0], shape[1], 1, shape[2]), True, dtype).squeeze(2)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[len(shape)])


def like_sequences(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a new tensor [n, channels, times] that lies in memory as the sequences x do: with contiguous channels if x's are,
    else with contiguous times.
    """
    n, channels, times = shape
    if has_contiguous_channels(x):
        return x.new_empty_strided((n, channels, times), (channels * times, 1, channels))
    return x.new_empty(shape)


def has_contiguous_channels(x: torch.Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def reach(t: torch.Tensor) -> int:
    """Returns the largest offset of an element, in elements. Reads no address, so it takes fake tensors too."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)


def addressing(t: torch.Tensor) -> Addressing:
    """Returns the `Addressing` of a tensor with 3 to 5 dimensions."""
    strides = [s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)]
    a, b, c = [0] * (5 - len(strides)) + strides[2:]
    unit = strides[1] == 1
    return Addressing(t.data_ptr(), t.element_size(), t.numel(), strides[0], strides[1], (a, b, c), unit, reach(t))
