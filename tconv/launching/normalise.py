"""Prepares and launches normalisations, forward and backward: each a few kernels, one after the other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.autograd import profiler

from tconv.kernels import normalise as kernels
from tconv.kernels.common import integers as integers_of
from tconv.launching import launch, profiling
from tconv.launching.arguments import Prepared, accumulator, numerics, options
from tconv.launching.compiled import fail, require_all, run
from tconv.launching.memory_format import shaped
from tconv.launching.record import Call, record_call
from tconv.planning.addressing import LIMIT, vector
from tconv.planning.device import Device
from tconv.planning.normalise import Normalisation, Share, forward_plan, gradient_plan
from tconv.planning.operands import triple
from tconv.planning.plan import Plan

MaybeTensor = torch.Tensor | None
BLOCK = 1024  # partial sums that a program takes at a time
# For the sums of products over a pixel's channels. With products fused into their sum, two threads that add each other's would
# have two sums, since each rounds the other's product, and write both to one place. Triton 3.9 fuses so.
UNFUSED = {"enable_fp_fusion": False}


def forward(n: Normalisation, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> tuple[torch.Tensor, MaybeTensor]:
    """Returns y, and for groups their statistics [2, N, G]: the means, and 1/sqrt(variance + eps).

    Args:
        x: without gaps, in the memory format that n says.
        w, b: contiguous, of one dtype, x's or the accumulator's; None where there is none.
    Raises:
        TransientFallback, Fallback: memory ran out, or a kernel cannot be launched. Nothing was launched.
    """
    launches = _find(n, x, _own(x, w, b), None)
    *moments, write = launches
    try:
        y = x.new_empty_strided(write.shape, write.strides)
        stats = parts = None
        if moments:
            parts, stats = (torch.empty(m.shape, dtype=accumulator(x.dtype), device=x.device) for m in moments)
        w, b, held = _or(w, x), _or(b, x), _or(stats, x)
        pointers = ((x, _or(parts, x)), (_or(parts, x), held))[: len(moments)] + ((x, held, w, b, y),)
        _execute(n, launches, pointers)
    except RuntimeError as e:  # an allocation failed
        fail(write, None, e)
    return y, stats


def backward(
    n: Normalisation,
    dy: torch.Tensor,
    x: torch.Tensor,
    stats: MaybeTensor,
    w: MaybeTensor,
    b: MaybeTensor,
    dx_needed: bool,
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
    """Returns the gradients of x, w and b; None for those that there are not, and for x's if it is not needed.

    Args:
        dy: without gaps, in the memory format that n says.
        x, stats, w, b: as in `forward`.
    Raises:
        TransientFallback, Fallback: as `forward`.
    """
    launches = _find(n, x, _own(x, w, b), dx_needed)
    try:
        dx = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if dx_needed else None
        dw, db = (None if t is None else torch.empty_like(t) for t in (w, b))
        means = None if stats is None else torch.empty_like(stats)
        parts = torch.empty(launches[0].shape, dtype=accumulator(x.dtype), device=x.device)
        given = dy, x, _or(stats, x), _or(w, x), _or(b, x)
        finish = parts, _or(w, x), _or(means, x), _or(dw, x), _or(db, x)
        both = *given, _or(means, x), _or(dx, x), parts
        _execute(n, launches, (both, finish, both)[: len(launches)])
    except RuntimeError as e:
        fail(launches[0], None, e)
    return dx, dw, db


def _or(t: MaybeTensor, other: torch.Tensor) -> torch.Tensor:
    """Returns t, or where there is none another tensor, which the kernel does not touch."""
    return other if t is None else t


def _execute(n: Normalisation, launches: tuple[Prepared, ...], pointers: tuple[tuple[torch.Tensor, ...], ...]) -> None:
    """Runs launches, all of them or none, and records the call, which is the last one's."""
    call = launches[-1].call
    if n.dry:
        launch.collect(launches)
    else:
        event = profiling.begin_launch(call) if profiler._is_profiler_enabled else None
        try:
            pairs = tuple(zip(launches, pointers, strict=True))
            require_all(pairs)
            for one, given in pairs:
                run(one, given)
        finally:
            if event is not None:
                profiling.end(event)
    record_call(call)


def _own(x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> torch.dtype:
    """Returns the dtype of the weight and the bias."""
    return next((t.dtype for t in (w, b) if t is not None), x.dtype)


def _find(n: Normalisation, x: torch.Tensor, own: torch.dtype, dx_needed: bool | None) -> tuple[Prepared, ...]:
    """Returns the launches of a forward pass, or of a backward pass if `dx_needed` is no None, prepared once per kind."""
    device = n.device or launch.device_of(x)

    def make() -> Prepared:
        if dx_needed is None:
            first, *then = prepare_forward(n, x.dtype, own, device)
        else:
            first, *then = prepare_backward(n, x.dtype, own, device, dx_needed)
        return dataclasses.replace(first, then=tuple(then))

    first = launch.lookup(("normalisation", n, x.dtype, own, x.device, dx_needed), make)
    return first, *first.then


def prepare_forward(n: Normalisation, dtype: torch.dtype, own: torch.dtype, device: Device) -> tuple[Prepared, ...]:
    """Returns the launches of a forward pass: for groups the moments in two steps, and what writes y.

    Args:
        dtype: of x and y.
        own: of the weight and the bias.
    """
    plan, write, moments = forward_plan(n, dtype.itemsize, device)
    acc = accumulator(dtype)
    result = shaped_as(n, "y", dtype)
    pointers = dtype, dtype if n.rms else acc, own, own, dtype
    last = _launch(kernels.normalise, n, plan, write, write.programs(n), {}, pointers, result)
    if moments is None:
        return (last,)
    first = _launch(
        kernels.channel_moments, n, plan, moments, moments.programs(n), {}, (dtype, acc), _sums(n, moments, acc)
    )  # fmt: skip
    groups = n.N * n.G
    second = _launch(
        kernels.finish_moments, n, plan, moments, groups, {"programs": groups}, (acc, acc), _stats(n, acc)
    )  # fmt: skip
    return first, second, last


def prepare_backward(
    n: Normalisation, dtype: torch.dtype, own: torch.dtype, device: Device, dx_needed: bool
) -> tuple[Prepared, ...]:
    """Returns the launches of a backward pass: the sums, what finishes them, and for groups what writes dx.

    Without a weight and a bias, RMS needs no sums. dx of RMS is written by the first launch.
    """
    plan, write, sums = gradient_plan(n, dtype.itemsize, device)
    acc = accumulator(dtype)
    pointers = dtype, dtype, dtype if n.rms else acc, own, own, dtype if n.rms else acc, dtype, acc
    learned = n.weight or n.bias
    summing = {"SUMS": learned or not n.rms, "DX": n.rms and dx_needed}
    result = _sums(n, sums, acc)
    first = _launch(kernels.normalise_gradient, n, plan, sums, sums.programs(n), summing, pointers, result)
    if n.rms and not learned:
        return (first,)
    groups, channels = 0 if n.rms or not dx_needed else n.N * n.G, _channels(n) if learned else 0
    finishing = acc, own, dtype if n.rms else acc, own, own
    finish = _launch(
        kernels.finish_gradient, n, plan, sums, groups + channels, {"groups": groups}, finishing, result
    )  # fmt: skip
    if n.rms or not dx_needed:
        return first, finish
    writing = {"SUMS": False, "DX": True}
    last = _launch(
        kernels.normalise_gradient, n, plan, write, write.programs(n), writing, pointers, shaped_as(n, "x", dtype)
    )  # fmt: skip
    return first, finish, last


def shaped_as(n: Normalisation, which: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns a meta tensor with the shape and strides of "x" or "y"."""
    shape = n.shape(which)
    return shaped(shape, n.channels_last and n.rank > 0, dtype)


def _sums(n: Normalisation, share: Share, acc: torch.dtype) -> torch.Tensor:
    return torch.empty((n.N * share.chunks, 2, n.C), dtype=acc, device="meta")


def _stats(n: Normalisation, acc: torch.dtype) -> torch.Tensor:
    return torch.empty((2, n.N, n.G), dtype=acc, device="meta")


FINISH = {"BLOCK_N": 32, "BLOCK_C": 32}  # rows and channels of sums that a program of `finish_gradient` takes at a time


def _channels(n: Normalisation) -> int:
    """Returns how many programs of `finish_gradient` add per channel."""
    return math.ceil(n.C / FINISH["BLOCK_C"])


def _launch(
    kernel: Any,
    n: Normalisation,
    plan: Plan,
    share: Share,
    programs: int,
    more: dict[str, Any],
    pointers: tuple[torch.dtype, ...],
    result: torch.Tensor,
) -> Prepared:
    """Returns a launch; of the arguments it is given those that the kernel has.

    Args:
        share: how the kernel takes an image, or what it finishes was taken.
        more: integers and constants beyond those of every kernel.
        pointers, result: as in `Prepared`.
    """
    dtype = pointers[0]
    itemsize, tile = dtype.itemsize, share.tile
    unit = n.channels_last
    widest = max(n.P, n.Q) + tile.m
    named = {
        "groups": n.N * n.G, "programs": programs, "C": n.C, "G": n.G, "P": n.P, "Q": n.Q,
        "chunk": share.chunk, "chunks": share.chunks, "parts": n.N * share.chunks,
        **triple("X", n.X), **triple("Y", n.Y), **triple("B", n.before),
        "RMS": n.rms, "EPS": n.eps, "WEIGHT": n.weight, "BIAS": n.bias, "ACTIVATION": n.activation,
        "PADDED": n.padded, "RANK": max(n.rank, 1), "UNIT": unit,
        "C_VEC": vector(0, itemsize, n.C) if unit else 1,
        "P_VEC": 1 if unit else vector(0, itemsize, n.P, tile.m), "Q_VEC": 1 if unit else vector(0, itemsize, n.Q, tile.m),
        "WIDE": max(n.N * n.C, n.C + tile.n) * widest > LIMIT, **numerics(dtype),
        "BLOCK_P": tile.m, "BLOCK_C": tile.n, "BLOCK": BLOCK, **more,
    }  # fmt: skip
    if kernel is kernels.finish_gradient:
        named |= FINISH
    integers = integers_of(kernel)
    constants = {name: named[name] for name in kernel.arg_names if name in named and name not in integers}
    constants |= options(tile) | (UNFUSED if n.rms else {})
    call = Call(plan.pass_, n, plan, plan.reason)
    return Prepared(
        kernel, (programs,), tuple(named[i] for i in integers), constants, call, result.shape,
        result.stride(), result.dtype, pointers=pointers,
    )  # fmt: skip
