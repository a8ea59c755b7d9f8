"""Launches of the TMA kernels (kernels/tma.py): which passes and tensors are eligible, and their tensor descriptors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tconv.kernels.tma import tma, tma_wgrad
from tconv.launching.arguments import (
    PassOperands,
    Prepared,
    numerics,
    options,
    precision,
    prepared,
    simplified,
    strides,
    tensor_cores,
    triple,
    wide,
    window,
)
from tconv.launching.memory_format import LIMIT, Addressing
from tconv.planning import cost
from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, Access, tiles


class Ineligible(ValueError):
    """A pass on these tensors is not eligible for a kernel."""


def prepare_tma(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    """Returns the TMA launch of fprop (x -> y) or dgrad (x is dy, y is dx).

    Raises:
        Ineligible: the problem or its tensors are not eligible for TMA.
    """
    transposed = pass_ == "dgrad"
    s = simplified(pass_, problem, x, w, y, transposed and b is not None)
    p = s.p
    box_x = _tensor(x, (p.N, *(p.Y if transposed else p.X), s.read), s.x)
    box_w = _tensor(w, (p.K, *p.T, p.C // p.G), s.w, last=0)
    why = _why_no_tma(pass_, s, x.dtype, device)
    if why or box_x is None or box_w is None:
        raise Ineligible(f"forced plan cannot run: {why or APART}")
    plan = planning.choose(p, pass_, planning.Operands(x.element_size(), tensor_cores(x.dtype)), device, only="tma")
    tile = plan.tile
    box, _ = cost.box_of(p, pass_, tile.m)
    box_y = _tensor(y, (p.N, *s.extents, s.wrote), s.y)
    # A strided dgrad's phase writes pixels that are not neighbours. A channel tile that passes the end of a group would
    # overwrite the next group's channels. Both store through pointers, with a mask.
    if (transposed and max(p.S) > 1) or (p.G > 1 and s.co % tile.n):
        box_y = None
    integers = {
        "N": p.N, "CI": s.ci, "CO": s.co, "G": p.G, **window(p), **triple("Y", s.extents),
        **strides("sy", s.y), "syg": s.co * s.y.channel, "sb": b.stride(0) if b is not None else 0,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "Y_BOX": box_y is not None, "Y_UNIT": s.y.unit, "Y_VEC": wide(y, s.y, s.co),
        "HAS_BIAS": b is not None, "WIDE": s.y.reach > LIMIT, "PRECISION": precision(x.dtype, plan),
        "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        **dict(zip(("BN", "B0", "B1", "B2"), box, strict=True)), **numerics(x.dtype), **options(tile),
    }  # fmt: skip
    programs = cost.tiles_of(p, pass_, "tma", tile)
    launch = prepared(tma, programs, integers, constants, s.call(pass_, problem, plan), y)
    weights = (1, 1, 1, tile.k, tile.n) if transposed else (1, 1, 1, tile.n, tile.k)
    written = box_y and (*box_y, (*box, tile.n))
    return dataclasses.replace(launch, boxes=((*box_x, (*box, tile.k)), (*box_w, weights), None, written))


def prepare_wgrad_tma(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    """Returns the TMA launch of wgrad, from dy and x into dw, or into a workspace if the plan has splits.

    Raises:
        Ineligible: the problem or its tensors are not eligible for TMA.
    """
    s = simplified("wgrad", problem, x, dw, dy)
    p = s.p
    if s.swapped:
        dy, x = x, dy
    why = _why_no_tma("wgrad", s, x.dtype, device)
    if why:
        raise Ineligible(f"forced plan cannot run: {why}")
    plan = planning.choose(p, "wgrad", planning.Operands(x.element_size(), tensor_cores(x.dtype)), device, only="tma_wgrad")
    tile = plan.tile
    run, runs = cost.run_of(p, tile.k)
    last = 0 if run == "n" else 1 + int(run)
    box_x, box_y = _tensor(x, (p.N, *p.X, p.C), s.x, last), _tensor(dy, (p.N, *p.Y, p.K), s.y, last)
    if box_x is None or box_y is None:
        raise Ineligible(f"forced plan cannot run: {APART}")
    integers = {
        "N": p.N, "C": s.ci, "K": s.co, "G": p.G, **window(p), **triple("Y", p.Y), "chunk": math.ceil(runs / plan.splits),
        "sws": dw.numel(), "swg": s.co * s.w.outer, "swk": s.w.outer, "swc": s.w.channel, **triple("sw", s.w.spatial),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "RUN": run, "RANK": p.rank, "PRECISION": precision(x.dtype, plan),
        "BLOCK_K": tile.m, "BLOCK_C": tile.n, "BLOCK_P": tile.k, **numerics(x.dtype), **options(tile),
    }  # fmt: skip
    programs = cost.tiles_of(p, "wgrad", "tma_wgrad", tile) * plan.splits
    launch = prepared(tma_wgrad, programs, integers, constants, s.call("wgrad", problem, plan), dw, s.swapped)
    boxes = ((*box_y, (1, 1, 1, tile.k, tile.m)), (*box_x, (1, 1, 1, tile.k, tile.n)), None)
    return dataclasses.replace(launch, boxes=boxes)


def _tensor(
    t: torch.Tensor, shape: tuple[int, ...], a: Addressing, last: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns (shape, strides) of t for a tensor descriptor, channels last; None if t is not eligible for TMA.

    t is eligible if its channels are contiguous and its address and strides are multiples of 16 bytes.

    Args:
        shape: t's extents in the order of the descriptor, channels last.
        last: the axis to move next to the channels. If a box is longer than one along this axis and the channels only, the
            tensor cores read it from shared memory directly; otherwise it passes through registers.
    """
    aligned = 16 // t.element_size()
    pairs = list(zip(shape[:-1], (a.outer, *a.spatial), strict=True))
    if not a.unit or t.data_ptr() % 16 or any(n > 1 and (s == 0 or s % aligned) for n, s in pairs):
        return None
    if last is not None:
        pairs.append(pairs.pop(last))
    return (*(n for n, _ in pairs), shape[-1]), (*(s if n > 1 else aligned for n, s in pairs), 1)


APART = "boxes need contiguous channels, and address and strides in multiples of 16 bytes"


def _why_no_tma(pass_: str, s: PassOperands, dtype: torch.dtype, device: Device) -> str | None:
    """Returns why a pass is not eligible for TMA, whatever the layout of its tensors; None if it is eligible."""
    p = s.p
    if pass_ != "dgrad" and any(stride > 1 and n > 1 for stride, n in zip(p.S, p.Y, strict=True)):
        return f"boxes of {pass_} need unit stride"
    if pass_ == "wgrad" and dtype.itemsize != 2 and not device.interpreted:
        return "wgmma turns operands of 2 bytes an element only"
    if not device.interpreted and dtype == torch.float64:
        return "wgmma knows no fp64"
    least = 16 if device.interpreted else min(t.k for t in tiles("tma", Access(dtype.itemsize, True), device))
    if pass_ != "wgrad" and p.G > 1 and s.ci % least:
        return f"boxes would reach into the next group: {s.ci} channels per group are no multiple of {least}"
    aligned = 16 // dtype.itemsize
    if pass_ == "wgrad" and p.G > 1 and (s.ci % aligned or s.co % aligned):
        return f"boxes must begin at multiples of 16 bytes: {s.ci} or {s.co} channels per group are no multiple of {aligned}"
    request = planning.forced()
    if dtype == torch.float32 and request and request.precision == BF16X6:
        return "boxes are not cut into pieces"
    if not tensor_cores(dtype) and not device.interpreted:
        return "true fp32 has no tensor cores to fetch boxes for"
    return None
