"""wgrad with operands loaded through pointers: the arguments of each kernel family, a function for each.

A family's function returns the kernel and what that kernel takes beyond the arguments that all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tconv.kernels.depthwise import depthwise_wgrad
from tconv.kernels.packed import packed_wgrad
from tconv.kernels.strip import strip_wgrad
from tconv.kernels.wgrad import wgrad
from tconv.launching.arguments import (
    Prepared,
    digits,
    halo,
    lanes,
    numerics,
    options,
    precision,
    prepared,
    simplified,
    strides,
    strip_constants,
    strips_of,
    tensor_cores,
    triple,
    wide,
    window,
)
from tconv.launching.memory_format import LIMIT
from tconv.launching.pointers import Arguments
from tconv.planning import cost
from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.plan import Operands, Plan
from tconv.planning.problem import ConvProblem


def prepare_wgrad_pointers(
    problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device
) -> Prepared:
    """Returns the launch of wgrad (dy, x -> dw)."""
    c = _Pass(problem, dy, x, dw)
    plan = planning.choose(c.p, "wgrad", c.operands(), device)
    kernel, integers, constants = FAMILIES[plan.kernel](c, plan)
    shared_integers, shared_constants = c.shared(plan)
    programs = cost.tiles_of(c.p, "wgrad", plan.kernel, plan.tile) * plan.splits
    call = c.s.call("wgrad", problem, plan)
    return prepared(kernel, programs, shared_integers | integers, shared_constants | constants, call, dw, c.s.swapped)


class _Pass:
    """wgrad on given tensors.

    Attributes:
        s, p: the operands and the problem after simplification, which may swap dy and x.
        dy, x, dw: the tensors as the kernel takes them.
        x_vec, y_vec: vector widths along channels within a group.
        direct_x, direct_y: the same across groups, for kernels of depthwise layers.
        lanes_x, lanes_y: vectors along any axis, for strip kernels.
    """

    def __init__(self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor) -> None:
        self.s = s = simplified("wgrad", problem, x, dw, dy)
        self.p = p = s.p
        self.dy, self.x, self.dw = (x, dy, dw) if s.swapped else (dy, x, dw)
        self.x_vec, self.y_vec = wide(self.x, s.x, s.ci), wide(self.dy, s.y, s.co)
        self.direct_x = wide(self.x, s.x, p.K) if p.depthwise and p.multiplier == 1 else 1
        self.direct_y = wide(self.dy, s.y, p.K) if p.depthwise else 1
        self.lanes_x, self.lanes_y = lanes(self.x, s.x, p.K, p.X), lanes(self.dy, s.y, p.K, p.Y)

    def pack_vectors(self, group: int) -> tuple[int, int]:
        """Returns the vector widths of x and dy in a packed kernel whose tiles hold so many groups."""
        s, p = self.s, self.p
        return wide(self.x, s.x, group * s.ci, p.C), wide(self.dy, s.y, group * s.co, p.K)

    def operands(self) -> Operands:
        """Returns what the planner asks about the operands."""
        size, least = self.x.element_size(), min(self.x_vec, self.y_vec)
        narrow = (min(self.direct_x, self.direct_y) if self.p.depthwise else least) == 1
        return Operands(
            size, tensor_cores(self.x.dtype), narrow, size * least == 16, strips_of(self.lanes_x, self.lanes_y),
            lambda group: min(self.pack_vectors(group)) == 1,
        )  # fmt: skip

    def shared(self, plan: Plan) -> tuple[dict[str, int], dict[str, Any]]:
        """Returns the integers and the constants that all families share."""
        s, p, tile, extents = self.s, self.p, plan.tile, self.p.Y
        if plan.kernel == "strip_wgrad":
            extents = (p.Y[0], p.Y[1], math.ceil(p.Y[2] / tile.columns))
        pixels = p.N * math.prod(extents)
        integers = {
            "N": p.N, **window(p), **triple("X", p.X), **triple("Y", p.Y), **digits(tile.k, extents),
            "chunk": planning.chunk(pixels, tile.k, plan.splits), **strides("sx", s.x), **strides("sy", s.y),
            **triple("sw", s.w.spatial), "sws": self.dw.numel(), "swk": s.w.outer,
        }  # fmt: skip
        constants = {
            "RANK": p.rank, "X_UNIT": s.x.unit, "Y_UNIT": s.y.unit, "BLOCK_P": tile.k,
            "WIDE": max(s.x.reach + halo(p, s.x), s.y.reach, pixels + tile.k) > LIMIT,
            **numerics(self.x.dtype), **options(tile),
        }  # fmt: skip
        return integers, constants


def _strip(c: _Pass, plan: Plan) -> Arguments:
    tile, p, x, y = plan.tile, c.p, c.lanes_x, c.lanes_y
    return strip_wgrad, {"C": p.K}, {
        **strip_constants(p, tile, x, y, tile.columns * p.S[2]), "BLOCK_C": tile.n, "ROWS": tile.m,
        # Along columns, the vector width must divide the first column of every strip.
        "Y_VEC": y.vec if y.unit == "c" else math.gcd(y.vec, tile.columns),
        "READ_DY": tile.columns if x.unit != "c" and y.unit == "p" else 1,
    }  # fmt: skip


def _depthwise(c: _Pass, plan: Plan) -> Arguments:
    tile, many = plan.tile, c.p.multiplier
    return depthwise_wgrad, {"K": c.p.K, "M": many}, {
        "X_VEC": c.direct_x, "Y_VEC": c.direct_y, "MULTIPLIED": many > 1, "TAPS": tile.m, "BLOCK_C": tile.n,
    }  # fmt: skip


def _wgrad(c: _Pass, plan: Plan) -> Arguments:
    s, tile = c.s, plan.tile
    integers = {
        "C": s.ci, "K": s.co, "G": c.p.G, "sxg": s.ci * s.x.channel, "syg": s.co * s.y.channel,
        "swg": s.co * s.w.outer, "swc": s.w.channel,
    }  # fmt: skip
    return wgrad, integers, {
        "X_VEC": c.x_vec, "Y_VEC": c.y_vec, "PRECISION": precision(c.x.dtype, plan), "BLOCK_K": tile.m, "BLOCK_C": tile.n,
    }  # fmt: skip


def _packed(c: _Pass, plan: Plan) -> Arguments:
    (_, integers, constants), tile = _wgrad(c, plan), plan.tile
    group = cost.pack(c.p, "wgrad", tile)
    x_vec, y_vec = c.pack_vectors(group)
    constants |= {"X_VEC": x_vec, "Y_VEC": y_vec, "PACKED": group > 1, "TURN": tile.m < min(tile.n, 64)}
    return packed_wgrad, integers | {"PACK": group}, constants


FAMILIES: dict[str, Callable[[_Pass, Plan], Arguments]] = {
    "wgrad": _wgrad, "packed_wgrad": _packed, "depthwise_wgrad": _depthwise, "strip_wgrad": _strip,
}  # fmt: skip
