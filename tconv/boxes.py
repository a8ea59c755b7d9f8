"""Launches by boxes (kernels/tma.py): what the tensor memory accelerator can fetch, and how it is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tconv import cost
from tconv import plan as planning
from tconv.arguments import (
    Prepared,
    Sides,
    numerics,
    options,
    precision,
    prepared,
    sides,
    strides,
    tensor_cores,
    triple,
    wide,
    window,
)
from tconv.configs import Access, tiles
from tconv.device import Device
from tconv.kernels.tma import tma
from tconv.layout import LIMIT, Addressing
from tconv.problem import ConvProblem


class Unfit(ValueError):
    """A kernel cannot take a pass of these tensors."""


def prepare_boxes(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    """fprop (x -> y) or dgrad (x is dy, y is dx) by boxes.

    Raises:
        Unfit: boxes cannot be fetched from such tensors, or for such a problem.
    """
    transposed = pass_ == "dgrad"
    s = sides(pass_, problem, x, w, y, transposed and b is not None)
    p = s.p
    box_x = _tensor(x, (p.N, *(p.Y if transposed else p.X), s.read), s.x)
    box_w = _tensor(w, (p.K, *p.T, p.C // p.G), s.w, outer_last=True)
    why = _no_boxes(pass_, s, x.dtype, device)
    if why or box_x is None or box_w is None:
        raise Unfit(f"forced plan cannot run: {why or APART}")
    plan = planning.choose(p, pass_, planning.Operands(x.element_size(), tensor_cores(x.dtype)), device, only="tma")
    tile = plan.tile
    box, _ = cost.box_of(p, pass_, tile.m)
    integers = {
        "N": p.N, "CI": s.ci, "CO": s.co, "G": p.G, **window(p), **triple("Y", s.extents),
        **strides("sy", s.y), "syg": s.co * s.y.channel, "sb": b.stride(0) if b is not None else 0,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "Y_UNIT": s.y.unit, "Y_VEC": wide(y, s.y, s.co), "HAS_BIAS": b is not None,
        "WIDE": s.y.reach > LIMIT, "PRECISION": precision(x.dtype), "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        **dict(zip(("BN", "B0", "B1", "B2"), box, strict=True)), **numerics(x.dtype), **options(tile),
    }  # fmt: skip
    programs = cost.tiles_of(p, pass_, "tma", tile)
    launch = prepared(tma, programs, integers, constants, s.call(pass_, problem, plan), y)
    weights = (1, 1, 1, tile.k, tile.n) if transposed else (1, 1, 1, tile.n, tile.k)
    return dataclasses.replace(launch, boxes=((*box_x, (*box, tile.k)), (*box_w, weights), None, None))


def _tensor(
    t: torch.Tensor, shape: tuple[int, ...], a: Addressing, outer_last: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(shape, strides) of t for the tensor memory accelerator, channels last; None where it cannot have them.

    outer_last: the first axis is put next to the channels, behind the spatial ones. A box of one tap then has extents of one
    in front only, and goes from shared memory straight to the tensor cores, not through registers.
    """
    aligned = 16 // t.element_size()
    pairs = list(zip(shape[:-1], (a.outer, *a.spatial), strict=True))
    if not a.unit or t.data_ptr() % 16 or any(n > 1 and (s == 0 or s % aligned) for n, s in pairs):
        return None
    pairs = [*pairs[1:], pairs[0]] if outer_last else pairs
    return (*(n for n, _ in pairs), shape[-1]), (*(s if n > 1 else aligned for n, s in pairs), 1)


APART = "boxes need contiguous channels, and address and strides in multiples of 16 bytes"


def _no_boxes(pass_: str, s: Sides, dtype: torch.dtype, device: Device) -> str | None:
    """Why boxes cannot be fetched for a pass, however its tensors lie, or None."""
    p = s.p
    if pass_ == "fprop" and any(stride > 1 and n > 1 for stride, n in zip(p.S, p.Y, strict=True)):
        return "boxes of fprop need unit stride"
    if not device.interpreted and dtype == torch.float64:
        return "wgmma knows no fp64"
    least = 16 if device.interpreted else min(t.k for t in tiles("tma", Access(dtype.itemsize, True)))
    if p.G > 1 and s.ci % least:
        return f"boxes would reach into the next group: {s.ci} channels per group are no multiple of {least}"
    if not tensor_cores(dtype) and not device.interpreted:
        return "true fp32 has no tensor cores to fetch boxes for"
    return None
