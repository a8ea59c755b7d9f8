"""Turns a pass on given tensors into a launch: plan, grid, integers and compile-time constants.

Only shapes, strides, dtype and alignment are read, so tensors without storage do. Integers are never specialised
(kernels/common.py): layers that share dtype, rank, layout and tile share one compiled kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from tconv import plan as planning
from tconv.configs import Tile
from tconv.device import Device
from tconv.kernels import depthwise as depthwise_kernels
from tconv.kernels import gather as gather_kernel
from tconv.kernels import reduce as reduce_kernels
from tconv.kernels import wgrad as wgrad_kernel
from tconv.layout import LIMIT, Addressing, addressing, vector
from tconv.problem import ConvProblem
from tconv.record import Call

INTERPRET = not hasattr(gather_kernel.gather, "cache_key")  # Triton decided so when the kernels were loaded
FIELD = {1: 32, 2: 16, 3: 10}  # taps per dimension in a packed word, by rank


@dataclass(frozen=True)
class Prepared:
    """A launch without its pointers.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs, along one axis.
        integers: the kernel's runtime integers, after its pointers.
        constants: its compile-time constants and launch options.
        call: what `last_calls` will say.
        splits: slices of a workspace that the kernel fills; 1 if it writes the result itself.
    """

    kernel: Any
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    call: Call
    splits: int = 1


def tensor_cores(dtype: torch.dtype) -> bool:
    """Whether tensor cores may do the products: fp32 only where torch's flag for convolutions says TF32."""
    if dtype != torch.float32:
        return True
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def prepare_gather(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    """fprop (x -> y) or dgrad (x is dy, y is dx), by whichever kernel is planned."""
    p, size, transposed = problem, x.element_size(), pass_ == "dgrad"
    ax, aw, ay = addressing(x), addressing(w), addressing(y)
    ci, co = x.shape[1] // p.G, y.shape[1] // p.G
    reduced, written = (aw.outer, aw.channel) if transposed else (aw.channel, aw.outer)
    group = p.K // p.G * aw.outer
    inner = _weight_axis(aw, transposed)
    x_vec = _vector(x, ax, ci)
    w_vec = 1
    if inner:
        outer = written if inner == "i" else reduced
        w_vec = vector(w.data_ptr(), size, outer, *aw.spatial, group, ci if inner == "i" else co)

    plan = planning.choose(p, pass_, size, tensor_cores(x.dtype), device, narrow=min(x_vec, w_vec) == 1)
    tile = plan.tile
    tiles = planning.pixel_tiles(p, pass_, tile.m)
    extents = (*((p.Y, p.X) if transposed else (p.X, p.Y)), p.T, p.S, p.D, p.P, _gcds(p))
    geometry = tuple(v for triple in extents for v in triple)
    bias_stride = b.stride(0) if b is not None else 0
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed,
        "RANK": p.rank,
        "X_UNIT": ax.unit,
        "Y_UNIT": ay.unit,
        "HAS_BIAS": b is not None,
        # The first tap's offset may lie in the halo, before a later one brings it back.
        "WIDE": max(ax.reach + _halo(p, ax), ay.reach, y.shape[0] * math.prod(y.shape[2:]) + tile.m) > LIMIT,
        "FLIP": not ax.unit,
        **_numerics(x.dtype),
        **_options(tile),
    }
    call = Call(pass_, p, plan, plan.reason)
    if plan.kernel == "depthwise":
        integers: tuple[int, ...] = (p.N, y.shape[1], p.multiplier, *geometry)
        integers += (ax.outer, ax.channel, *ax.spatial, aw.outer, *aw.spatial)
        integers += (ay.outer, ay.channel, *ay.spatial, bias_stride)
        constants |= {
            "X_VEC": _vector(x, ax, y.shape[1]) if p.multiplier == 1 else 1,
            "Y_VEC": _vector(y, ay, y.shape[1]),
            "MULTIPLIED": p.multiplier > 1,
            "BLOCK_M": tile.m,
            "BLOCK_C": tile.n,
        }
        grid = (tiles * math.ceil(y.shape[1] / tile.n),)
        return Prepared(depthwise_kernels.depthwise, grid, integers, constants, call)
    integers = (p.N, ci, co, p.G, *geometry)
    integers += (ax.outer, ci * ax.channel, ax.channel, *ax.spatial)
    integers += (group, reduced, written, *aw.spatial)
    integers += (ay.outer, co * ay.channel, ay.channel, *ay.spatial, bias_stride)
    constants |= {
        "W_UNIT": inner,
        "X_VEC": x_vec,
        "W_VEC": w_vec,
        "Y_VEC": _vector(y, ay, co),
        "EVEN": ci % tile.k == 0,
        "PACKED": max(p.T) <= FIELD[p.rank],
        "PRECISION": _precision(x.dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
    }
    return Prepared(gather_kernel.gather, (tiles * math.ceil(co / tile.n) * p.G,), integers, constants, call)


def prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    """wgrad of dy and x into dw, or into a workspace of dw's strides, one per split."""
    p, size = problem, x.element_size()
    ax, ay, aw = addressing(x), addressing(dy), addressing(dw)
    c, k = p.C // p.G, p.K // p.G
    x_vec, y_vec = _vector(x, ax, c), _vector(dy, ay, k)
    plan = planning.choose(p, "wgrad", size, tensor_cores(x.dtype), device, narrow=min(x_vec, y_vec) == 1)
    tile = plan.tile
    pixels = p.N * math.prod(p.Y)
    chunk, splits = _chunks(pixels, tile.k, plan.splits)
    geometry = (*p.X, *p.Y, *p.T, *p.S, *p.D, *p.P, *_digits(tile.k, p.Y), chunk)
    constants: dict[str, Any] = {
        "RANK": p.rank,
        "X_UNIT": ax.unit,
        "Y_UNIT": ay.unit,
        "WIDE": max(ax.reach + _halo(p, ax), ay.reach, pixels + tile.k) > LIMIT,
        **_numerics(x.dtype),
        **_options(tile),
    }
    call = Call("wgrad", p, plan, plan.reason)
    if plan.kernel == "depthwise_wgrad":
        integers: tuple[int, ...] = (p.N, p.K, p.multiplier, *geometry, ax.outer, ax.channel, *ax.spatial)
        integers += (ay.outer, ay.channel, *ay.spatial, dw.numel(), aw.outer, *aw.spatial)
        constants |= {
            "X_VEC": _vector(x, ax, p.K) if p.multiplier == 1 else 1,
            "Y_VEC": _vector(dy, ay, p.K),
            "MULTIPLIED": p.multiplier > 1,
            "TAPS": tile.m,
            "BLOCK_C": tile.n,
            "BLOCK_P": tile.k,
        }
        grid = (math.ceil(p.taps / tile.m) * math.ceil(p.K / tile.n) * splits,)
        return Prepared(depthwise_kernels.depthwise_wgrad, grid, integers, constants, call, splits)
    integers = (p.N, c, k, p.G, *geometry)
    integers += (ax.outer, c * ax.channel, ax.channel, *ax.spatial)
    integers += (ay.outer, k * ay.channel, ay.channel, *ay.spatial)
    integers += (dw.numel(), k * aw.outer, aw.outer, aw.channel, *aw.spatial)
    constants |= {
        "X_VEC": x_vec,
        "Y_VEC": y_vec,
        "PRECISION": _precision(x.dtype),
        "BLOCK_K": tile.m,
        "BLOCK_C": tile.n,
        "BLOCK_P": tile.k,
    }
    grid = (math.ceil(k / tile.m) * math.ceil(c / tile.n) * p.taps * p.G * splits,)
    return Prepared(wgrad_kernel.wgrad, grid, integers, constants, call, splits)


def prepare_bias(problem: ConvProblem, g: torch.Tensor, device: Device) -> Prepared:
    """The bias gradient of an output's gradient g [N, channels, *extents]: fprop's or a transposed layer's."""
    plan = planning.choose(problem, "bias", g.element_size(), False, device)
    tile, a, channels = plan.tile, addressing(g), g.shape[1]
    extents = (1,) * (5 - g.dim()) + tuple(g.shape[2:])
    pixels = g.shape[0] * math.prod(extents)
    chunk, splits = _chunks(pixels, tile.k, plan.splits)
    integers = (g.shape[0], channels, *extents, chunk, a.outer, a.channel, *a.spatial)
    constants = {
        "RANK": problem.rank,
        "Y_UNIT": a.unit,
        "Y_VEC": _vector(g, a, channels),
        "WIDE": max(a.reach, pixels + tile.k) > LIMIT,
        **_numerics(g.dtype),
        **_options(tile),
        "BLOCK_P": tile.k,
        "BLOCK_K": tile.n,
    }
    grid = (math.ceil(channels / tile.n) * splits,)
    call = Call("bias", problem, plan, plan.reason)
    return Prepared(reduce_kernels.sum_pixels, grid, integers, constants, call, splits)


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "INTERPRET": INTERPRET}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and tensor_cores(dtype) and not INTERPRET else "ieee"


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _gcds(p: ConvProblem) -> tuple[int, ...]:
    return tuple(math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True))


def _vector(t: torch.Tensor, a: Addressing, channels: int) -> int:
    """Elements per access along the channels of t, of which a group has `channels`; 1 where they are not contiguous."""
    return vector(t.data_ptr(), t.element_size(), a.outer, *a.spatial, channels) if a.unit else 1


def _weight_axis(w: Addressing, transposed: bool) -> str:
    """The weight's contiguous channel axis: "i", the reduced one, "o", the written one, or neither."""
    if w.unit:
        return "o" if transposed else "i"
    if w.outer == 1:
        return "i" if transposed else "o"
    return ""


def _halo(problem: ConvProblem, a: Addressing) -> int:
    """How far past a tensor's ends a read that will be masked may point, in elements."""
    taps = (t * d + p + s for t, d, p, s in zip(problem.T, problem.D, problem.P, problem.S, strict=True))
    return sum(t * s for t, s in zip(taps, a.spatial, strict=True))


def _chunks(pixels: int, block: int, splits: int) -> tuple[int, int]:
    """(pixels per split, a multiple of block; splits that get any)."""
    chunk = math.ceil(math.ceil(pixels / block) / splits) * block
    return chunk, math.ceil(pixels / chunk)


def _digits(block: int, extents: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """block as (images, coordinates...) in the mixed radix of an output's extents."""
    rest, digits = block, []
    for extent in reversed(extents):
        digits.append(rest % extent)
        rest //= extent
    return rest, digits[2], digits[1], digits[0]
