"""The short way for a layer that is called again: is the call the same as before but for what the tensors hold?

The long way (functional.py) reads some thirty facts one by one. Here torch's own native check, which guards the graphs of
torch.compile, compares most of them at once, and what it says no to takes the long way again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch.autograd import profiler

from tconv.dispatch import autograd
from tconv.dispatch.context import moment_differs, same
from tconv.dispatch.dynamo import opaque
from tconv.launching import launch, profiling
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

IMMUTABLE = (int, str, tuple, bool)


def possible(call: tuple[Any, ...], x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Whether a call like this is likely to come again (a layer's Parameters will, computed weights will not) and `again`
    could tell: it compares arguments by identity and expects aligned addresses.
    """
    return (
        all(type(v) in IMMUTABLE for v in call)
        and all(type(p) is torch.nn.Parameter for p in parameters)
        and not (x.data_ptr() | parameters[0].data_ptr()) & 15
        and forced() is None
    )


class Repeat:
    """A call that was accepted.

    Args:
        call: transposed, rank, stride, padding, output_padding, groups, dilation, as they were given.
        g: the call's geometry.
        x, w, b: input, weight and bias.
    """

    __slots__ = ("call", "differentiable", "how", "precision", "same")

    def __init__(self, call: tuple[Any, ...], g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> None:
        tensors = (x, w) if b is None else (x, w, b)
        self.call = call
        self.how = autograd.How(call[0], g, launch.convolution(call[0], g, x, w, b), repeated=True)
        self.precision = fp32_precision("cuda", "conv")
        self.differentiable = any(t.requires_grad for t in tensors)
        self.same = same(*tensors)

    @opaque
    def again(
        self,
        transposed: bool,
        rank: int,
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor | None,
        stride: Any,
        padding: Any,
        output_padding: Any,
        groups: Any,
        dilation: Any,
    ) -> torch.Tensor | None:
        """The result, or None if the call differs. Parameters by identity: 1 == 1.0 == True, and torch takes only the first."""
        transposed_, rank_, stride_, padding_, output_padding_, groups_, dilation_ = self.call
        if (
            stride is not stride_
            or padding is not padding_
            or dilation is not dilation_
            or groups is not groups_
            or output_padding is not output_padding_
            or transposed is not transposed_
            or rank is not rank_
            or not (self.same(x, w) if b is None else self.same(x, w, b))
            or (x.data_ptr() | w.data_ptr()) & 15
            or moment_differs(self.precision)
        ):
            return None
        event = profiling.begin_call(transposed, self.how.g, x, w, b) if profiler._is_profiler_enabled else None
        try:
            if self.differentiable and torch.is_grad_enabled():
                return autograd.apply_convolve(x, w, b, self.how)
            return launch.convolve(self.how.prepared, x, w, b, dry=False)
        finally:
            if event is not None:
                profiling.end(event)
