"""What torch's profiler is told of a call while one records.

A call of tconv's layers and functions is an event with the name and arguments of torch's operator, from which the profiler
counts flops. Within it each launch is an event that names pass, kernel, tile and problem. Where calls are made,
`torch.autograd.profiler._is_profiler_enabled` is asked first, a plain flag that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._C._profiler import _RecordFunctionFast as Event

from tconv.launching.record import Call
from tconv.planning.problem import Geometry


def begin_call(transposed: bool, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Event:
    """The event of a layer's forward call, begun.

    The profiler knows of symmetric padding alone. Where more is behind than before it is told the latter, and counts a row or
    column too little; of torch's own call with padding="same" it counts nothing.

    Args:
        x: what the layer is given; of a transposed one the problem's y.
    """
    p, skip = g.problem, 3 - g.problem.rank

    def own(numbers: Sequence[int]) -> list[int]:
        return [*numbers[skip:]]

    stride, padding, dilation = own(p.S), own(p.P), own(p.D)
    if transposed:
        whole = [(y - 1) * s - 2 * q + d * (t - 1) + 1 for y, s, q, d, t in zip(p.Y, p.S, p.P, p.D, p.T, strict=True)]
        output_padding = own([n - m for n, m in zip(p.X, whole, strict=True)])
        return _begun(f"aten::conv_transpose{p.rank}d", (x, w, b, stride, padding, output_padding, p.G, dilation))
    return _begun(f"aten::conv{p.rank}d", (x, w, b, stride, padding, dilation, p.G))


def begin_launch(call: Call) -> Event:
    """The event of what a pass launches, begun."""
    plan = call.plan
    assert plan is not None
    return _begun(f"tconv::{plan.pass_} {plan.kernel} {plan.tile} [{call.problem}]")


def end(event: Event) -> None:
    event.__exit__(None, None, None)


def _begun(name: str, arguments: tuple[object, ...] = ()) -> Event:
    event = Event(name, arguments)
    event.__enter__()
    return event
