"""fprop and dgrad with operands loaded through pointers: the arguments of each kernel family, a function for each.

A family's function returns the kernel and what that kernel takes beyond the arguments that all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tconv.kernels.depthwise import depthwise
from tconv.kernels.gather import gather
from tconv.kernels.packed import packed
from tconv.kernels.strip import strip
from tconv.launching.arguments import (
    Prepared,
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
from tconv.launching.memory_format import LIMIT, Addressing, vector
from tconv.planning import cost
from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.plan import Operands, Plan
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.strips import CHUNK

FIELD = {1: 32, 2: 16, 3: 10}  # by rank: taps per dimension whose masks fit in one 32-bit word per pixel
FLAT_FIELD = {1: 31, 2: 15, 3: 10}  # the same for the packed kernel, which reserves one bit
Arguments = tuple[Any, dict[str, int], dict[str, Any]]  # a kernel, its integers and its constants by name


def prepare_pointers(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    """Returns the launch of fprop (x -> y) or dgrad (x is dy, y is dx)."""
    c = _Pass(pass_, problem, x, w, b, y)
    plan = planning.choose(c.p, pass_, c.operands(), device)
    kernel, integers, constants = FAMILIES[plan.kernel](c, plan)
    programs = cost.tiles_of(c.p, pass_, plan.kernel, plan.tile) * plan.splits
    call = c.s.call(pass_, problem, plan)
    return prepared(kernel, programs, c.integers() | integers, c.constants(plan) | constants, call, y)


class _Pass:
    """fprop or dgrad on given tensors; x is the tensor read and y the tensor written.

    Attributes:
        s, p: the operands and the problem after simplification.
        read: spatial extents of x.
        reduced, written, group: strides of w along the reduced channels, the written channels and the groups.
        inner: the contiguous channel axis of w: "i" (reduced), "o" (written) or "" for neither.
        x_vec, w_vec, y_vec: vector widths along channels within a group.
        direct_x, direct_y: the same across groups, for kernels of depthwise layers.
        lanes_x, lanes_y: vectors along any axis, for strip kernels.
    """

    def __init__(
        self, pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor
    ) -> None:
        self.pass_, self.transposed = pass_, pass_ == "dgrad"
        self.x, self.b, self.y = x, b, y
        self.s = s = simplified(pass_, problem, x, w, y, self.transposed and b is not None)
        self.p = p = s.p
        self.read = p.Y if self.transposed else p.X
        self.reduced, self.written = (s.w.outer, s.w.channel) if self.transposed else (s.w.channel, s.w.outer)
        self.group = p.K // p.G * s.w.outer
        self.inner = _weight_axis(s.w, self.transposed)
        self.x_vec, self.y_vec, self.w_vec = wide(x, s.x, s.ci), wide(y, s.y, s.co), 1
        if self.inner:
            outer, extent = (self.written, s.ci) if self.inner == "i" else (self.reduced, s.co)
            self.w_vec = vector(w.data_ptr(), w.element_size(), outer, *s.w.spatial, self.group, extent)
        self.direct_x = wide(x, s.x, s.wrote) if p.depthwise and p.multiplier == 1 else 1
        self.direct_y = wide(y, s.y, s.wrote) if p.depthwise else 1
        self.lanes_x, self.lanes_y = lanes(x, s.x, s.wrote, self.read), lanes(y, s.y, s.wrote, s.extents)

    def pack_vector(self, group: int) -> int:
        """Returns the vector width of x in a packed kernel whose tiles hold so many groups."""
        return wide(self.x, self.s.x, group * self.s.ci, self.s.read)

    def operands(self) -> Operands:
        """Returns what the planner asks about the operands."""
        s, size = self.s, self.x.element_size()
        # y counts only if its channels are contiguous. If they are not, the accumulator is transposed and stored along
        # its pixels, at no loss.
        least = min(self.x_vec, self.w_vec, self.y_vec if s.y.unit else self.x_vec)
        narrow = (min(self.direct_x, self.direct_y) if self.p.depthwise else least) == 1
        # The largest tiles have no registers to spare for the addresses of narrower accesses, or of a 3-D dgrad's pixels.
        large = size * least == 16 and not (self.transposed and self.p.rank == 3 and s.y.unit)
        return Operands(
            size, tensor_cores(self.x.dtype), narrow, large, strips_of(self.lanes_x, self.lanes_y),
            lambda group: self.pack_vector(group) == 1,
        )  # fmt: skip

    def integers(self) -> dict[str, int]:
        """Returns the integers that all families share."""
        s = self.s
        return {
            "N": self.p.N, **window(self.p), **triple("X", self.read), **triple("Y", s.extents), **strides("sx", s.x),
            **triple("sw", s.w.spatial), **strides("sy", s.y), "sb": self.b.stride(0) if self.b is not None else 0,
        }  # fmt: skip

    def constants(self, plan: Plan) -> dict[str, Any]:
        """Returns the constants that all families share."""
        s, p, tile = self.s, self.p, plan.tile
        return {
            "TRANSPOSED": self.transposed, "RANK": p.rank, "X_UNIT": s.x.unit, "Y_UNIT": s.y.unit,
            "HAS_BIAS": self.b is not None,
            # Offsets may pass the ends of x by the halo: the first tap may be outside x while a later one is inside.
            "WIDE": max(s.x.reach + halo(p, s.x), s.y.reach, p.N * math.prod(s.extents) + tile.m) > LIMIT,
            # If pixels are contiguous, they become the accumulator's columns. Its rows are channels, and wgmma needs 64 rows.
            "FLIP": not (s.x.unit and s.y.unit) and (self.x.element_size() > 2 or tile.n >= 64 or plan.kernel == "depthwise"),
            "BLOCK_M": tile.m, **numerics(self.x.dtype), **options(tile),
        }  # fmt: skip


def _strip(c: _Pass, plan: Plan) -> Arguments:
    tile, p = plan.tile, c.p
    step = tile.columns // p.S[2] if c.transposed else tile.columns * p.S[2]
    constants = {
        **strip_constants(p, tile, c.lanes_x, c.lanes_y, step), "BLOCK_C": tile.n,
        "WIDTH": pow2(min(CHUNK, p.T[2]), 1, CHUNK), "REST_WIDTH": pow2(p.T[2] % CHUNK, 1, CHUNK),
    }  # fmt: skip
    return strip, {"C": c.s.wrote, "swk": c.s.w.outer}, constants


def _depthwise(c: _Pass, plan: Plan) -> Arguments:
    many = c.p.multiplier
    constants = {"X_VEC": c.direct_x, "Y_VEC": c.direct_y, "MULTIPLIED": many > 1, "BLOCK_C": plan.tile.n}
    return depthwise, {"C": c.s.wrote, "M": many, "swk": c.s.w.outer}, constants


def _gemm(c: _Pass, plan: Plan) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns what gather and packed share: channels per group, strides of groups, and the weight's tile."""
    s, tile = c.s, plan.tile
    integers = {
        "CI": s.ci, "CO": s.co, "G": c.p.G, "sxg": s.ci * s.x.channel, "syg": s.co * s.y.channel,
        "swg": c.group, "swi": c.reduced, "swo": c.written,
    }  # fmt: skip
    constants = {
        "W_UNIT": c.inner, "W_VEC": c.w_vec, "PRECISION": precision(c.x.dtype, plan), "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    return integers, constants


def _packed(c: _Pass, plan: Plan) -> Arguments:
    (integers, constants), p, s = _gemm(c, plan), c.p, c.s
    group = cost.pack(p, c.pass_, plan.tile)
    return packed, integers | {"PACK": group}, constants | {
        "X_VEC": c.pack_vector(group), "Y_VEC": wide(c.y, s.y, group * s.co, s.wrote), "PACKED": group > 1,
        "FIELD": FLAT_FIELD[p.rank] if max(p.T) <= FLAT_FIELD[p.rank] else 0,
    }  # fmt: skip


def _gather(c: _Pass, plan: Plan) -> Arguments:
    (integers, constants), p, tile = _gemm(c, plan), c.p, plan.tile
    split = plan.splits > 1
    # Without splits, "sys" is unused and set to 0: y.numel() may exceed 32 bits, which would compile another kernel.
    integers |= {"chunk": planning.chunk(c.s.ci, tile.k, plan.splits), "sys": c.y.numel() if split else 0}
    return gather, integers, constants | {
        "X_VEC": c.x_vec, "Y_VEC": c.y_vec, "EVEN": c.s.ci % tile.k == 0, "SPLIT": split,
        "FIELD": FIELD[p.rank] if max(p.T) <= FIELD[p.rank] else 0,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[_Pass, Plan], Arguments]] = {
    "gather": _gather, "packed": _packed, "depthwise": _depthwise, "strip": _strip,
}  # fmt: skip


def _weight_axis(w: Addressing, transposed: bool) -> str:
    """Returns the weight's contiguous channel axis: "i" for the reduced one, "o" for the written one, or ""."""
    if w.unit:
        return "o" if transposed else "i"
    if w.outer == 1:
        return "i" if transposed else "o"
    return ""
