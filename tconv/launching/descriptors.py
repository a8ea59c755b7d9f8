"""Tensor descriptors, which tell the tensor memory accelerator (TMA) of a tensor and of its boxes.

Triton's and Gluon's differ: Gluon's also say how a box lies in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tconv.launching.arguments import Box, Prepared


def descriptor(kernel: Any, t: Any, box: Box) -> Any:
    """Returns the descriptor, Triton's or Gluon's, of a tensor that a kernel takes.

    Args:
        kernel: a function by `triton.jit` or `gluon.jit`.
        t: the tensor, or a `MockTensor` in its place.
        box: (shape, strides, box).
    """
    shape, strides, extents = map(list, box)
    if _is_gluon(kernel):
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(t, shape, strides, extents, _layout(t.dtype, extents))
    return TensorDescriptor(t, shape, strides, extents)


def descriptors(kernel: Any, dtype: torch.dtype, box: Box) -> Callable[[torch.Tensor], Any]:
    """Returns a function that makes descriptors of this shape, strides and box, without repeating the checks of their class."""
    first = descriptor(kernel, MockTensor(dtype), box)
    kind: Any = type(first)
    fields = vars(first)

    def of(t: torch.Tensor) -> Any:
        made = kind.__new__(kind)
        made.__dict__.update(fields)
        made.base = t
        return made

    return of


def stand_ins(launch: Prepared) -> tuple[Any, ...]:
    """Returns placeholders for a kernel's pointers and tensor descriptors, as JITFunction.warmup takes them.

    Only the box of a descriptor matters there; its shape and strides are dummies.
    """
    boxes = launch.boxes or (None,) * len(launch.pointers)
    return tuple(
        dtype if box is None else descriptor(launch.kernel, MockTensor(dtype), ((1,) * 5, (16,) * 4 + (1,), box[2]))
        for dtype, box in zip(launch.pointers, boxes, strict=True)
    )


def signature(kernel: Any, dtype: torch.dtype, named: str, box: Box) -> str:
    """Returns Triton's type of a descriptor; `named` is Triton's name of the dtype."""
    extents = list(box[2])
    layout = f",{_layout(dtype, extents)!r}" if _is_gluon(kernel) else ""
    return f"tensordesc<{named}{extents}{layout}>"


def _is_gluon(kernel: Any) -> bool:
    return isinstance(kernel, JITFunction) and kernel.is_gluon()


def _layout(dtype: torch.dtype, extents: list[int]) -> Any:
    """Returns how Gluon lays out a box in shared memory: with the widest swizzle that fits it."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(extents, getattr(gl, str(dtype).removeprefix("torch.")))
