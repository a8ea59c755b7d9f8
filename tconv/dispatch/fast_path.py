"""The fast path: a layer is called again with inputs that match an earlier call in everything but the tensors' values.

The slow path (entry.py) examines about thirty properties one by one. The fast path compares most of them in a single native
call, the tensor guard of torch.compile. If anything differs, the call takes the slow path again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch.autograd import profiler

from tconv.dispatch import autograd
from tconv.dispatch.context import global_state_differs, tensor_guard
from tconv.dispatch.dynamo import opaque
from tconv.launching import launch, profiling
from tconv.launching.record import Slower
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

IMMUTABLE = (int, str, tuple, bool)


def possible(call: tuple[Any, ...], x: torch.Tensor, *parameters: torch.Tensor) -> bool:
    """Returns True if a call is worth a FastPath and can have one.

    It is worth one if its weights are Parameters, which a layer passes again. It can have one if nobody can change its other
    arguments in place, the addresses are multiples of 16 bytes, and no plan is forced.
    """
    return (
        all(type(v) in IMMUTABLE for v in call)
        and all(type(p) is torch.nn.Parameter for p in parameters)
        and not (x.data_ptr() | parameters[0].data_ptr()) & 15
        and forced() is None
    )


class FastPath:
    """An accepted call, prepared so that the next one like it only has to be compared and launched.

    Args:
        call: transposed, rank, stride, padding, output_padding, groups, dilation, mode, as they were given.
        g: the call's geometry.
        x, w, b: input, weight and bias.

    Attributes:
        slower: why torch computes the call, whose kernel was measured to be faster; None if tconv does.
        deterministic: whether deterministic algorithms were asked for, under which tconv computes all calls.
    """

    __slots__ = ("call", "deterministic", "differentiable", "how", "precision", "slower", "tensor_guard")

    def __init__(self, call: tuple[Any, ...], g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> None:
        tensors = (x, w) if b is None else (x, w, b)
        self.call = call
        self.slower: str | None = None
        try:
            self.how = autograd.ForwardState(call[0], g, launch.convolution(call[0], g, x, w, b), repeated=True)
        except Slower as e:
            self.slower = str(e)
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.precision = fp32_precision("cuda", "conv")
        self.differentiable = any(t.requires_grad for t in tensors)
        self.tensor_guard = tensor_guard(*tensors)

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
        mode: Any,
    ) -> torch.Tensor | None:
        """Returns the result, or None if the call differs from the accepted one.

        Raises:
            Slower: torch's kernel was measured to be faster.
        """
        transposed_, rank_, stride_, padding_, output_padding_, groups_, dilation_, mode_ = self.call
        same = (  # a layer passes the same objects again
            stride is stride_
            and padding is padding_
            and dilation is dilation_
            and groups is groups_
            and output_padding is output_padding_
            and transposed is transposed_
            and rank is rank_
            and mode is mode_
        )
        if (
            not (same or alike((transposed, rank, stride, padding, output_padding, groups, dilation, mode), self.call))
            or not (self.tensor_guard(x, w) if b is None else self.tensor_guard(x, w, b))
            or (x.data_ptr() | w.data_ptr()) & 15
            or global_state_differs(self.precision)
            or self.deterministic is not torch.are_deterministic_algorithms_enabled()
        ):
            return None
        if self.slower is not None:
            raise Slower(self.slower)
        event = profiling.begin_call(transposed, self.how.g, x, w, b) if profiler._is_profiler_enabled else None
        try:
            if self.differentiable and torch.is_grad_enabled():
                return autograd.apply_convolve(x, w, b, self.how)
            return launch.convolve(self.how.prepared, x, w, b, dry=False)
        finally:
            if event is not None:
                profiling.end(event)


def alike(given: tuple[Any, ...], accepted: tuple[Any, ...]) -> bool:
    """Returns True if arguments equal accepted ones, in type too: 1 == 1.0 == True, of which torch accepts only the first."""
    return all(
        type(a) is type(b) and (type(a) is not tuple or [*map(type, a)] == [*map(type, b)]) and a == b
        for a, b in zip(given, accepted, strict=True)
    )
