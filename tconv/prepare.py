"""Turns a pass on given tensors into a launch: plan, grid, integers and compile-time constants.

Only shapes, strides, dtype and alignment are read, so tensors without storage do. Integers are never specialised
(kernels/common.py): layers that share dtype, rank, layout and tile share one compiled kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tconv import cost
from tconv import plan as planning
from tconv.configs import Tile, tiles
from tconv.device import Device
from tconv.kernels.common import integers as integers_of
from tconv.kernels.depthwise import depthwise, depthwise_wgrad
from tconv.kernels.gather import gather
from tconv.kernels.packed import packed, packed_wgrad
from tconv.kernels.reduce import sum_pixels, sum_splits
from tconv.kernels.strip import strip, strip_wgrad
from tconv.kernels.tma import tma
from tconv.kernels.wgrad import wgrad
from tconv.layout import LIMIT, Addressing, addressing, shaped, vector
from tconv.problem import ConvProblem, lift
from tconv.record import Call
from tconv.simplify import Form, Strides, simplify
from tconv.strips import CHUNK, READ, Strips

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
INTERPRET = isinstance(gather, InterpretedFunction)  # Triton decided so when the kernels were loaded
FIELD = {1: 32, 2: 16, 3: 10}  # taps per dimension in a packed word, by rank
FLAT_FIELD = {1: 31, 2: 15, 3: 10}  # the same of the packed kernel, which needs one bit itself


class Unfit(ValueError):
    """A kernel cannot take a pass of these tensors."""


@dataclass(frozen=True)
class Prepared:
    """A launch without its pointers.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs, along one axis.
        integers: the kernel's runtime integers, after its pointers.
        constants: its compile-time constants and launch options.
        call: what `last_calls` will say.
        shape, strides: of the result.
        splits: slices of a workspace that the kernel fills; 1 if it writes the result itself.
        staged: which of the two operands are copied to channels last first; empty for none.
        pointers: dtypes of what the kernel's pointers point to.
        total: the launch that adds the slices; None if there is one.
        ready: how it is launched where it has been before (compiled.py).
        boxes: per pointer the (shape, strides, box) of the tensor descriptor that takes its place, or None; empty for none.
    """

    kernel: Any
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    call: Call
    shape: torch.Size
    strides: tuple[int, ...]
    splits: int = 1
    staged: tuple[bool, ...] = ()
    pointers: tuple[torch.dtype, ...] = ()
    total: Prepared | None = None
    boxes: tuple[Box | None, ...] = ()
    ready: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def tail(self) -> tuple[Any, ...]:
        """Every argument of the kernel that follows its pointers."""
        named = {**dict(zip(integers_of(self.kernel), self.integers, strict=True)), **self.constants}
        return tuple(named[name] for name in self.kernel.arg_names[len(self.pointers) :])


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
    """fprop (x -> y) or dgrad (x is dy, y is dx), by whichever kernel is planned.

    Operands whose channels lie apart can be loaded one element at a time only. They are copied to channels last first where
    that is predicted to pay, or forced; the result is written where it belongs all the same.
    """
    names = ("dy" if pass_ == "dgrad" else "x", "w")
    wish = planning.forced()
    if wish and wish.kernel == "tma":
        return _prepare_tma(pass_, problem, x, w, b, y, device, names, wish.staged)

    def prepare(x: torch.Tensor, w: torch.Tensor) -> Prepared:
        return _prepare_gather(pass_, problem, x, w, b, y, device)

    launch = _staged(prepare, names, (x, w), problem, device)
    if wish or device.interpreted or device.generation < 9 or problem.depthwise:
        return launch
    try:
        return _faster(launch, _prepare_tma(pass_, problem, x, w, b, y, device, names, None))
    except Unfit:
        return launch


def _faster(launch: Prepared, rival: Prepared) -> Prepared:
    """Of two launches the one of less predicted time; a rival that no hardware has seen is listed, but not chosen."""
    plan, other = launch.call.plan, rival.call.plan
    assert plan is not None
    assert other is not None
    assert plan.cost is not None
    assert other.cost is not None
    if other.kernel not in planning.UNPROVEN:
        return rival if other.cost.seconds < plan.cost.seconds else launch
    other = dataclasses.replace(other, reason=f"not chosen: not seen on hardware yet; {other.cost}")
    plan = dataclasses.replace(plan, others=(*plan.others, other))
    return dataclasses.replace(launch, call=dataclasses.replace(launch.call, plan=plan))


def _staged(
    prepare: Callable[..., Prepared],
    names: tuple[str, ...],
    operands: tuple[torch.Tensor, ...],
    problem: ConvProblem,
    device: Device,
) -> Prepared:
    """A launch on operands as they are, or on channels_last copies of those whose channels lie apart."""
    native, wish = prepare(*operands), planning.forced()
    forced = wish.staged if wish else None
    apart = tuple(t.shape[1] > 1 and t.stride(1) != 1 for t in operands)
    if forced is False or not any(apart) or problem.depthwise or (device.interpreted and not forced):
        return native
    launch = prepare(*(shaped(t.shape, True, t.dtype) if a else t for t, a in zip(operands, apart, strict=True)))
    plan, other = launch.call.plan, native.call.plan
    assert plan is not None
    assert other is not None
    plan = dataclasses.replace(plan, staged=tuple(name for name, a in zip(names, apart, strict=True) if a))
    if plan.cost is not None and other.cost is not None:
        copied = sum(t.numel() * t.element_size() for t, a in zip(operands, apart, strict=True) if a)
        total = cost.with_copies(plan.cost, copied, sum(apart), device)
        if not forced and total.seconds >= other.cost.seconds:
            return native
        us = f"with the copies {total.seconds * 1e6:.1f} us, without {other.cost.seconds * 1e6:.1f} us"
        plan = dataclasses.replace(plan, cost=total, reason=f"{plan.reason}; {us}")
    return dataclasses.replace(launch, call=dataclasses.replace(launch.call, plan=plan, reason=plan.reason), staged=apart)


def _prepare_gather(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    size, transposed = x.element_size(), pass_ == "dgrad"
    big, small = (y, x) if transposed else (x, y)
    p, a_big, aw, a_small, rules = _simplified(pass_, problem, big, w, small, transposed and b is not None)
    ax, ay = (a_small, a_big) if transposed else (a_big, a_small)
    read, wrote = (p.K, p.C) if transposed else (p.C, p.K)
    ci, co = read // p.G, wrote // p.G
    reduced, written = (aw.outer, aw.channel) if transposed else (aw.channel, aw.outer)
    group = p.K // p.G * aw.outer
    inner = _weight_axis(aw, transposed)
    x_vec, y_vec, w_vec = _vector(x, ax, ci), _vector(y, ay, co), 1
    if inner:
        outer = written if inner == "i" else reduced
        w_vec = vector(w.data_ptr(), size, outer, *aw.spatial, group, ci if inner == "i" else co)

    if p.depthwise:  # tiles span groups
        direct_x = _vector(x, ax, wrote) if p.multiplier == 1 else 1
        direct_y = _vector(y, ay, wrote)
    # Where the result's channels lie apart, the accumulator is turned so that its pixels are neighbours, and nothing is lost.
    narrow = min((direct_x, direct_y) if p.depthwise else (x_vec, w_vec, y_vec if ay.unit else x_vec)) == 1
    lanes_x, lanes_y = _lanes(x, ax, wrote, p.Y if transposed else p.X), _lanes(y, ay, wrote, p.X if transposed else p.Y)
    strips = Strips(lanes_x.unit != "c", min(lanes_x.vec, lanes_y.vec) == 1)

    def pack_vector(group: int) -> int:  # of x in a packed kernel
        return _vector(x, ax, group * ci, read)

    plan = planning.choose(
        p, pass_, size, tensor_cores(x.dtype), device, narrow, strips, lambda group: pack_vector(group) == 1
    )  # fmt: skip
    tile = plan.tile
    integers = {
        "N": p.N, **_window(p), **_triple("g", [math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)]),
        **_triple("X", p.Y if transposed else p.X), **_triple("Y", p.X if transposed else p.Y),
        **_strides("sx", ax), **_triple("sw", aw.spatial), **_strides("sy", ay), "sb": b.stride(0) if b is not None else 0,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "X_UNIT": ax.unit, "Y_UNIT": ay.unit, "HAS_BIAS": b is not None,
        # The first tap's offset may lie in the halo, before a later one brings it back.
        "WIDE": max(ax.reach + _halo(p, ax), ay.reach, p.N * math.prod(p.X if transposed else p.Y) + tile.m) > LIMIT,
        # Pixels that lie side by side in the result are the accumulator's columns; but wgmma's rows are 64 at least.
        "FLIP": not ay.unit and (size > 2 or tile.n >= 64 or plan.kernel == "depthwise"),
        "BLOCK_M": tile.m, **_numerics(x.dtype), **_options(tile),
    }  # fmt: skip
    call, tiles = _call(pass_, problem, plan, p, rules), cost.pixel_tiles(p, pass_, tile.m)
    if plan.kernel == "strip":
        step = tile.columns // p.S[2] if transposed else tile.columns * p.S[2]
        integers |= {"C": wrote, "swk": aw.outer}
        constants |= {
            **_strip(p, tile, lanes_x, lanes_y, step), "BLOCK_C": tile.n,
            "WIDTH": planning.pow2(min(CHUNK, p.T[2]), 1, CHUNK), "REST_WIDTH": planning.pow2(p.T[2] % CHUNK, 1, CHUNK),
        }  # fmt: skip
        return _prepared(strip, cost.tiles_of(p, pass_, "strip", tile), integers, constants, call, y)
    if plan.kernel == "depthwise":
        integers |= {"C": wrote, "M": p.multiplier, "swk": aw.outer}
        constants |= {
            "X_VEC": direct_x, "Y_VEC": direct_y, "MULTIPLIED": p.multiplier > 1, "BLOCK_C": tile.n,
        }  # fmt: skip
        return _prepared(depthwise, tiles * math.ceil(wrote / tile.n), integers, constants, call, y)
    integers |= {
        "CI": ci, "CO": co, "G": p.G, "sxg": ci * ax.channel, "syg": co * ay.channel,
        "swg": group, "swi": reduced, "swo": written,
    }  # fmt: skip
    if plan.kernel == "packed":
        group = cost.pack(p, pass_, tile)
        integers |= {"PACK": group}
        constants |= {
            "W_UNIT": inner, "X_VEC": pack_vector(group), "W_VEC": w_vec, "Y_VEC": _vector(y, ay, group * co, wrote),
            "PACKED": group > 1, "FIELD": FLAT_FIELD[p.rank] if max(p.T) <= FLAT_FIELD[p.rank] else 0,
            "PRECISION": _precision(x.dtype), "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        }  # fmt: skip
        programs = tiles * math.ceil(group * co / tile.n) * math.ceil(p.G / group)
        return _prepared(packed, programs, integers, constants, call, y)
    constants |= {
        "W_UNIT": inner, "X_VEC": x_vec, "W_VEC": w_vec, "Y_VEC": y_vec, "EVEN": ci % tile.k == 0,
        "FIELD": FIELD[p.rank] if max(p.T) <= FIELD[p.rank] else 0, "PRECISION": _precision(x.dtype),
        "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    return _prepared(gather, tiles * math.ceil(co / tile.n) * p.G, integers, constants, call, y)


def _prepare_tma(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
    names: tuple[str, str],
    staged: bool | None,
) -> Prepared:
    """fprop or dgrad by boxes, on channels_last copies of operands whose channels lie apart, unless staged is False.

    Raises:
        Unfit: boxes cannot be fetched from such tensors, or for such a problem.
    """
    apart = tuple(staged is not False and t.shape[1] > 1 and t.stride(1) != 1 for t in (x, w))
    x, w = (shaped(t.shape, True, t.dtype) if a else t for t, a in zip((x, w), apart, strict=True))
    transposed = pass_ == "dgrad"
    big, small = (y, x) if transposed else (x, y)
    p, a_big, aw, a_small, rules = _simplified(pass_, problem, big, w, small, transposed and b is not None)
    ax, ay = (a_small, a_big) if transposed else (a_big, a_small)
    read, wrote = (p.K, p.C) if transposed else (p.C, p.K)
    ci, co, c = read // p.G, wrote // p.G, p.C // p.G
    box_x = _tensor(x, (p.N, *(p.Y if transposed else p.X), read), ax)
    box_w = _tensor(w, (p.K, *p.T, c), aw, outer_last=True)
    if why := _no_boxes(pass_, p, box_x and box_w, ci, x.dtype, device):
        raise Unfit(f"forced plan cannot run: {why}")
    assert box_x is not None
    assert box_w is not None
    plan = planning.choose(p, pass_, x.element_size(), tensor_cores(x.dtype), device, only="tma")
    if plan.cost is not None and any(apart):
        copied = sum(t.numel() * t.element_size() for t, a in zip((x, w), apart, strict=True) if a)
        total = cost.with_copies(plan.cost, copied, sum(apart), device)
        plan = dataclasses.replace(plan, cost=total, reason=f"{plan.reason}; with the copies {total.seconds * 1e6:.1f} us")
    plan = dataclasses.replace(plan, staged=tuple(name for name, a in zip(names, apart, strict=True) if a))
    tile, y_vec = plan.tile, _vector(y, ay, co)
    box, tiles = cost.box_of(p, pass_, tile.m)
    integers = {
        "N": p.N, "CI": ci, "CO": co, "G": p.G, **_window(p),
        **_triple("g", [math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)]), **_triple("Y", p.X if transposed else p.Y),
        **_strides("sy", ay), "syg": co * ay.channel, "sb": b.stride(0) if b is not None else 0,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "Y_UNIT": ay.unit, "Y_VEC": y_vec, "HAS_BIAS": b is not None,
        "WIDE": ay.reach > LIMIT, "PRECISION": _precision(x.dtype), "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        **dict(zip(("BN", "B0", "B1", "B2"), box, strict=True)), **_numerics(x.dtype), **_options(tile),
    }  # fmt: skip
    call = _call(pass_, problem, plan, p, rules)
    launch = _prepared(tma, tiles * math.ceil(co / tile.n) * p.G, integers, constants, call, y)
    weights = (1, 1, 1, tile.k, tile.n) if transposed else (1, 1, 1, tile.n, tile.k)
    boxes = ((*box_x, (*box, tile.k)), (*box_w, weights), None, None)
    return dataclasses.replace(launch, staged=apart if any(apart) else (), boxes=boxes)


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


def _no_boxes(pass_: str, p: ConvProblem, tensors: Any, ci: int, dtype: torch.dtype, device: Device) -> str | None:
    """Why boxes cannot be fetched for a pass, or None."""
    if tensors is None:
        return "boxes need contiguous channels, and address and strides in multiples of 16 bytes"
    if pass_ == "fprop" and any(s > 1 and n > 1 for s, n in zip(p.S, p.Y, strict=True)):
        return "boxes of fprop need unit stride"
    if not device.interpreted and dtype == torch.float64:
        return "wgmma knows no fp64"
    least = 16 if device.interpreted else min(t.k for t in tiles("tma", dtype.itemsize, True, False))
    if p.G > 1 and ci % least:
        return f"boxes would reach into the next group: {ci} channels per group are no multiple of {least}"
    if not tensor_cores(dtype) and not device.interpreted:
        return "true fp32 has no tensor cores to fetch boxes for"
    return None


def prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    """wgrad of dy and x into dw, or into a workspace of dw's strides, one per split; operands staged as in fprop."""

    def prepare(dy: torch.Tensor, x: torch.Tensor) -> Prepared:
        return _prepare_wgrad(problem, dy, x, dw, device)

    return _staged(prepare, ("dy", "x"), (dy, x), problem, device)


def _prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    size = x.element_size()
    p, ax, aw, ay, rules = _simplified("wgrad", problem, x, dw, dy)
    c, k = p.C // p.G, p.K // p.G
    x_vec, y_vec = _vector(x, ax, c), _vector(dy, ay, k)
    if p.depthwise:  # tiles span groups
        direct_x, direct_y = _vector(x, ax, p.K) if p.multiplier == 1 else 1, _vector(dy, ay, p.K)
    narrow = min((direct_x, direct_y) if p.depthwise else (x_vec, y_vec)) == 1
    lanes_x, lanes_y = _lanes(x, ax, p.K, p.X), _lanes(dy, ay, p.K, p.Y)
    strips = Strips(lanes_x.unit != "c", min(lanes_x.vec, lanes_y.vec) == 1)

    def pack_vectors(group: int) -> tuple[int, int]:
        return _vector(x, ax, group * c, p.C), _vector(dy, ay, group * k, p.K)

    plan = planning.choose(
        p, "wgrad", size, tensor_cores(x.dtype), device, narrow, strips, lambda group: min(pack_vectors(group)) == 1
    )  # fmt: skip
    tile, splits, extents = plan.tile, plan.splits, p.Y
    if plan.kernel == "strip_wgrad":
        extents = (p.Y[0], p.Y[1], math.ceil(p.Y[2] / tile.columns))
    pixels = p.N * math.prod(extents)
    chunk = planning.chunk(pixels, tile.k, splits)
    integers = {
        "N": p.N, **_window(p), **_triple("X", p.X), **_triple("Y", p.Y), **_digits(tile.k, extents), "chunk": chunk,
        **_strides("sx", ax), **_strides("sy", ay), **_triple("sw", aw.spatial), "sws": dw.numel(), "swk": aw.outer,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "RANK": p.rank, "X_UNIT": ax.unit, "Y_UNIT": ay.unit, "BLOCK_P": tile.k,
        "WIDE": max(ax.reach + _halo(p, ax), ay.reach, pixels + tile.k) > LIMIT,
        **_numerics(x.dtype), **_options(tile),
    }  # fmt: skip
    call = _call("wgrad", problem, plan, p, rules)
    if plan.kernel == "strip_wgrad":
        integers |= {"C": p.K}
        constants |= {
            **_strip(p, tile, lanes_x, lanes_y, tile.columns * p.S[2]), "BLOCK_C": tile.n, "ROWS": tile.m,
            "READ_DY": tile.columns if lanes_x.unit != "c" and lanes_y.unit == "p" else 1,
        }  # fmt: skip
        programs = cost.tiles_of(p, "wgrad", "strip_wgrad", tile) * splits
        return _prepared(strip_wgrad, programs, integers, constants, call, dw, splits)
    if plan.kernel == "depthwise_wgrad":
        integers |= {"K": p.K, "M": p.multiplier}
        constants |= {
            "X_VEC": direct_x, "Y_VEC": direct_y, "MULTIPLIED": p.multiplier > 1, "TAPS": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip
        programs = math.ceil(p.taps / tile.m) * math.ceil(p.K / tile.n) * splits
        return _prepared(depthwise_wgrad, programs, integers, constants, call, dw, splits)
    integers |= {
        "C": c, "K": k, "G": p.G, "sxg": c * ax.channel, "syg": k * ay.channel, "swg": k * aw.outer, "swc": aw.channel,
    }  # fmt: skip
    if plan.kernel == "packed_wgrad":
        group = cost.pack(p, "wgrad", tile)
        x_vec, y_vec = pack_vectors(group)
        integers |= {"PACK": group}
        constants |= {
            "X_VEC": x_vec, "Y_VEC": y_vec, "PACKED": group > 1, "PRECISION": _precision(x.dtype),
            "BLOCK_K": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip
        programs = math.ceil(group * k / tile.m) * math.ceil(p.taps * group * c / tile.n) * math.ceil(p.G / group) * splits
        return _prepared(packed_wgrad, programs, integers, constants, call, dw, splits)
    constants |= {
        "X_VEC": x_vec, "Y_VEC": y_vec, "PRECISION": _precision(x.dtype), "BLOCK_K": tile.m, "BLOCK_C": tile.n,
    }  # fmt: skip
    programs = math.ceil(k / tile.m) * math.ceil(c / tile.n) * p.taps * p.G * splits
    return _prepared(wgrad, programs, integers, constants, call, dw, splits)


def prepare_bias(problem: ConvProblem, g: torch.Tensor, device: Device) -> Prepared:
    """The bias gradient of an output's gradient g [N, channels, *extents]: fprop's or a transposed layer's."""
    channels, extents = g.shape[1], lift(g.shape[2:], 1)
    pixels = g.shape[0] * math.prod(extents)
    plan, a = planning.choose_bias(channels, pixels, g.element_size(), device), addressing(g)
    tile = plan.tile
    integers = {
        "N": g.shape[0], "C": channels, **_triple("Y", extents), **_strides("sy", a),
        "chunk": planning.chunk(pixels, tile.k, plan.splits),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "RANK": problem.rank, "Y_UNIT": a.unit, "Y_VEC": _vector(g, a, channels), "WIDE": max(a.reach, pixels + tile.k) > LIMIT,
        "BLOCK_P": tile.k, "BLOCK_C": tile.n, **_numerics(g.dtype), **_options(tile),
    }  # fmt: skip
    call = Call("bias", problem, plan, plan.reason)
    db, programs = shaped((channels,), False, g.dtype), math.ceil(channels / tile.n) * plan.splits
    return _prepared(sum_pixels, programs, integers, constants, call, db, plan.splits)


def _prepared(
    kernel: Any,
    programs: int,
    named: dict[str, int],
    constants: dict[str, Any],
    call: Call,
    result: torch.Tensor,
    splits: int = 1,
) -> Prepared:
    """A launch, its integers in the kernel's order; strides of channels that a kernel has no use for may be left over."""
    integers = tuple(named[n] for n in integers_of(kernel))
    dtype, count, total = result.dtype, sum(name.endswith(("_ptr", "_desc")) for name in kernel.arg_names), None
    pointers = (dtype,) * count
    if splits > 1:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        pointers, ends = (*pointers[:-1], accumulator), {"INTERPRET": INTERPRET, "BLOCK": 1024, "num_warps": 4}
        grid, whole = (math.ceil(result.numel() / 1024),), (result.shape, result.stride())
        total = Prepared(sum_splits, grid, (result.numel(), splits), ends, call, *whole, pointers=(accumulator, dtype))
    form = result.shape, result.stride()
    return Prepared(kernel, (programs,), integers, constants, call, *form, splits, pointers=pointers, total=total)


def _simplified(
    pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, channels_stay: bool = False
) -> tuple[ConvProblem, Addressing, Addressing, Addressing, tuple[str, ...]]:
    """The problem as it is computed (simplify.py), how its tensors are addressed, and the rules that made it so."""
    before = [addressing(t) for t in (x, w, y)]
    sx, sw, sy = (Strides(a.outer, a.channel, a.spatial) for a in before)
    form = simplify(Form(problem, sx, sw, sy), pass_, channels_stay)
    after = [
        dataclasses.replace(a, outer=s.outer, channel=s.channel, spatial=s.spatial, unit=s.channel == 1)
        for a, s in zip(before, (form.x, form.w, form.y), strict=True)
    ]
    return form.p, after[0], after[1], after[2], form.rules


def _call(pass_: str, problem: ConvProblem, plan: planning.Plan, computed: ConvProblem, rules: tuple[str, ...]) -> Call:
    if rules:
        done = " + ".join(dict.fromkeys(rules))
        plan = dataclasses.replace(plan, reason=f"{done} to {computed}; {plan.reason}")
    return Call(pass_, problem, plan, plan.reason)


def _triple(prefix: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{prefix}{i}": v for i, v in enumerate(values)}


def _strides(prefix: str, a: Addressing) -> dict[str, int]:
    return {f"{prefix}n": a.outer, f"{prefix}c": a.channel, **_triple(prefix, a.spatial)}


def _window(p: ConvProblem) -> dict[str, int]:
    return _triple("T", p.T) | _triple("S", p.S) | _triple("D", p.D) | _triple("P", p.P)


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "INTERPRET": INTERPRET}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and tensor_cores(dtype) and not INTERPRET else "ieee"


def _options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers and not torch.version.hip:  # AMD's compiler knows no such option
        options["maxnreg"] = tile.registers
    return options


def _vector(t: torch.Tensor, a: Addressing, *channels: int) -> int:
    """Elements per access along the channels of t, which end at multiples of `channels`; 1 where they are not contiguous."""
    return vector(t.data_ptr(), t.element_size(), a.outer, *a.spatial, *channels) if a.unit else 1


@dataclass(frozen=True)
class _Lanes:
    """The axis along which a strip kernel's accesses are wide, "c", "p" (the last dimension) or neither, and how wide."""

    unit: str
    vec: int


def _lanes(t: torch.Tensor, a: Addressing, channels: int, extents: Sequence[int]) -> _Lanes:
    if a.unit:
        return _Lanes("c", _vector(t, a, channels))
    if a.spatial[2] != 1:
        return _Lanes("", 1)
    return _Lanes("p", vector(t.data_ptr(), t.element_size(), a.outer, a.channel, *a.spatial[:2], extents[2]))


def _strip(p: ConvProblem, tile: Tile, x: _Lanes, y: _Lanes, step: int) -> dict[str, Any]:
    """What both strip kernels know at compile time; step: columns read from one strip to the next."""
    x_vec = x.vec if x.unit == "c" else math.gcd(x.vec, step)
    return {
        "T2": p.T[2], "S2": p.S[2], "D2": p.D[2], "P2": p.P[2], "X_UNIT": x.unit, "Y_UNIT": y.unit, "X_VEC": x_vec,
        "Y_VEC": y.vec, "READ": (x_vec if x_vec >= 4 else READ) if x.unit == "p" else 1, "FLIP": x.unit != "c",
        "COLUMNS": tile.columns, "CHUNK": min(CHUNK, p.T[2]),
    }  # fmt: skip


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


def _digits(block: int, extents: tuple[int, int, int]) -> dict[str, int]:
    """block as images (Bn) and coordinates (B0, B1, B2) in the mixed radix of an output's extents."""
    rest, digits = block, {}
    for d in (2, 1, 0):
        digits[f"B{d}"] = rest % extents[d]
        rest //= extents[d]
    return {**digits, "Bn": rest}
