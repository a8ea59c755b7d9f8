"""Events for torch.profiler.

A call of a tconv layer or function is recorded as an event with the name and arguments of torch's operator, from which the
profiler counts FLOPs. Within it each launch is an event that names its pass, kernel, tile and problem. Callers check
`torch.autograd.profiler._is_profiler_enabled` first: it is a plain flag, so a call without a profiler costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._C._profiler import _RecordFunctionFast as Event

from tconv.launching.record import Call
from tconv.planning.problem import Geometry


def begin_call(transposed: bool, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Event:
    """Begins the event of a layer's forward call and returns it; pass it to `end`.

    The profiler supports symmetric padding only. Where trailing and leading padding differ, it is given the leading one and
    counts a row or column too few. (For torch's own call with padding="same" it counts nothing.)

    Args:
        x: the layer's input; for a transposed layer this is the problem's y.
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
    """Begins the event of the kernels that a pass launches and returns it; pass it to `end`."""
    plan = call.plan
    assert plan is not None
    return _begun(f"tconv::{plan.pass_} {plan.kernel} {plan.tile} [{call.problem}]")


def end(event: Event) -> None:
    event.__exit__(None, None, None)


def _begun(name: str, arguments: tuple[object, ...] = ()) -> Event:
    event = Event(name, arguments)
    event.__enter__()
    return event
