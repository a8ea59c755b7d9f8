"""Turns a pass on given tensors into a launch config: plan, grid, integers and compile-time constants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tconv.kernels.depthwise import depthwise, depthwise_wgrad
from tconv.kernels.gather import gather
from tconv.kernels.packed import packed, packed_wgrad
from tconv.kernels.reduce import sum_pixels
from tconv.kernels.stage import stage
from tconv.kernels.strip import strip, strip_wgrad
from tconv.kernels.wgrad import wgrad
from tconv.launching.arguments import (
    Prepared,
    digits,
    halo,
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
from tconv.launching.memory_format import LIMIT, Addressing, addressing, flattened, shaped, vector
from tconv.launching.record import Call
from tconv.launching.tma import Unfit, prepare_boxes, prepare_wgrad_boxes
from tconv.planning import cost
from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.plan import Operands, pow2
from tconv.planning.problem import ConvProblem, lift
from tconv.planning.strips import CHUNK, READ, Strips
from tconv.planning.tiles import Tile

FIELD = {1: 32, 2: 16, 3: 10}  # by rank: taps per dimension whose masks fit in one 32-bit word per pixel
FLAT_FIELD = {1: 31, 2: 15, 3: 10}  # the same for the packed kernel, which reserves one bit
Prepare = Callable[[torch.Tensor, torch.Tensor], Prepared]


def prepare_gather(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
) -> Prepared:
    """Returns the launch of fprop (x -> y) or dgrad (x is dy, y is dx), with the kernel that the planner chooses.

    The implicit GEMM kernels load x one element at a time if its channels are not contiguous. Such operands are copied to
    channels last first if that is predicted to be faster, or is forced. The result keeps its memory format either way.
    """
    names, operands = ("dy" if pass_ == "dgrad" else "x", "w"), (x, w)

    def boxes(x: torch.Tensor, w: torch.Tensor) -> Prepared:
        return prepare_boxes(pass_, problem, x, w, b, y, device)

    def pointers(x: torch.Tensor, w: torch.Tensor) -> Prepared:
        return _prepare_gather(pass_, problem, x, w, b, y, device)

    return _best(pointers, boxes, "tma", names, operands, problem, device)


def prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    """Returns the launch of wgrad, from dy and x into dw.

    If the plan has splits, each is written to a workspace slice with dw's strides. Operands are copied to channels last as in
    `prepare_gather`.
    """

    def prepare(dy: torch.Tensor, x: torch.Tensor) -> Prepared:
        return _prepare_wgrad(problem, dy, x, dw, device)

    def boxes(dy: torch.Tensor, x: torch.Tensor) -> Prepared:
        return prepare_wgrad_boxes(problem, dy, x, dw, device)

    return _best(prepare, boxes, "tma_wgrad", ("dy", "x"), (dy, x), problem, device)


def prepare_bias(problem: ConvProblem, g: torch.Tensor, device: Device) -> Prepared:
    """Returns the launch of the bias gradient, from the gradient g [N, channels, *extents] of a layer's output."""
    channels, extents = g.shape[1], lift(g.shape[2:], 1)
    pixels = g.shape[0] * math.prod(extents)
    plan = planning.choose_bias(channels, pixels, g.element_size(), device)
    a, extents, rank = flattened(addressing(g), extents)
    tile = plan.tile
    integers = {
        "N": g.shape[0], "C": channels, **triple("Y", extents), **strides("sy", a),
        "chunk": planning.chunk(pixels, tile.k, plan.splits),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "RANK": rank, "Y_UNIT": a.unit, "Y_VEC": min(_lanes(g, a, channels, extents).vec, tile.k),
        "WIDE": max(a.reach, pixels + tile.k) > LIMIT, "BLOCK_P": tile.k, "BLOCK_C": tile.n,
        **numerics(g.dtype), **options(tile),
    }  # fmt: skip
    call = Call("bias", problem, plan, plan.reason)
    db, programs = shaped((channels,), False, g.dtype), math.ceil(channels / tile.n) * plan.splits
    return prepared(sum_pixels, programs, integers, constants, call, db)


def prepare_copy(problem: ConvProblem | None, t: torch.Tensor, device: Device) -> Prepared:
    """Returns the launch that copies t, an operand of the problem, to channels last."""
    a, extents, rank = flattened(addressing(t), lift(t.shape[2:], 1))
    images, channels = t.shape[:2]
    pixels = images * math.prod(extents)
    plan = planning.choose_stage(channels, pixels, t.element_size(), device)
    tile = plan.tile
    integers = {"N": images, "C": channels, **triple("X", extents), **strides("sx", a)}
    constants: dict[str, Any] = {
        "RANK": rank, "X_VEC": _lanes(t, a, channels, extents).vec, "Y_VEC": vector(0, t.element_size(), channels),
        "WIDE": max(a.reach, t.numel(), pixels + tile.m) > LIMIT, "BLOCK_P": tile.m, "BLOCK_C": tile.n, **options(tile),
    }  # fmt: skip
    programs = math.ceil(pixels / tile.m) * math.ceil(channels / tile.n)
    call = Call("stage", problem, plan, plan.reason)
    return prepared(stage, programs, integers, constants, call, shaped(t.shape, True, t.dtype))


def _best(
    pointers: Prepare,
    boxes: Prepare,
    kernel: str,
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    problem: ConvProblem,
    device: Device,
) -> Prepared:
    """Returns the launch of a pointer kernel or of the TMA kernel of this name: the forced one, or the faster by prediction.

    Without a forced kernel, TMA is eligible from compute capability 9 on, except for depthwise problems. If anything else is
    forced, or in the interpreter, the pointer kernel runs.
    """
    wish = planning.forced()
    if wish and wish.kernel == kernel:
        return boxes(*operands) if wish.staged is False else _copied(boxes, names, operands, device)
    launch = _staged(pointers, names, operands, problem, device)
    if wish or device.interpreted or device.generation < 9 or problem.depthwise:
        return launch
    try:
        return _faster(launch, _copied(boxes, names, operands, device))
    except Unfit:
        return launch


def _faster(launch: Prepared, rival: Prepared) -> Prepared:
    """Returns the faster launch by prediction. A rival that is unproven on hardware is only listed in the plan, not chosen."""
    plan, other = launch.call.plan, rival.call.plan
    assert plan is not None
    assert other is not None
    assert plan.cost is not None
    assert other.cost is not None
    if not other.unproven:
        return rival if other.cost.seconds < plan.cost.seconds else launch
    plan = dataclasses.replace(plan, others=(*plan.others, other.unchosen()))
    return dataclasses.replace(launch, call=dataclasses.replace(launch.call, plan=plan))


def _staged(
    prepare: Prepare, names: tuple[str, str], operands: tuple[torch.Tensor, torch.Tensor], problem: ConvProblem, device: Device
) -> Prepared:
    """Returns a launch on the operands as they are, or on channels_last copies if that is predicted to be faster, or forced.

    Only operands whose channels are not contiguous are copied, and never those of a depthwise problem.
    """
    native, wish = prepare(*operands), planning.forced()
    forced = wish.staged if wish else None
    if forced is False or not any(map(_apart, operands)) or problem.depthwise or (device.interpreted and not forced):
        return native
    launch = _copied(prepare, names, operands, device)
    before, after = native.call.plan, launch.call.plan
    assert before is not None
    assert after is not None
    if before.cost is None or after.cost is None:
        return launch
    if not forced and after.cost.seconds >= before.cost.seconds:
        return native
    return _replanned(launch, reason=f"{after.reason}, without {before.cost.seconds * 1e6:.1f} us")


def _copied(prepare: Prepare, names: tuple[str, str], operands: tuple[torch.Tensor, torch.Tensor], device: Device) -> Prepared:
    """Returns a launch on channels_last copies of the operands whose channels are not contiguous.

    Its predicted cost includes the copies.
    """
    # Kernels address a weight with 32-bit offsets. An expanded weight may fit these as it is, but not as a copy.
    apart = tuple(_apart(t) and (name != "w" or t.numel() <= LIMIT) for name, t in zip(names, operands, strict=True))
    launch = prepare(*(shaped(t.shape, True, t.dtype) if a else t for t, a in zip(operands, apart, strict=True)))
    if not any(apart):
        return launch
    plan = launch.call.plan
    assert plan is not None
    total, reason = plan.cost, plan.reason
    if total is not None:
        copied = sum(t.numel() * t.element_size() for t, a in zip(operands, apart, strict=True) if a)
        total = cost.with_copies(total, copied, sum(apart), device)
        reason = f"{reason}; with the copies {total.seconds * 1e6:.1f} us"
    staged = tuple(name for name, a in zip(names, apart, strict=True) if a)
    copies = tuple(prepare_copy(launch.call.problem, t, device) if a else None for t, a in zip(operands, apart, strict=True))
    return dataclasses.replace(_replanned(launch, cost=total, reason=reason, staged=staged), copies=copies)


def _apart(t: torch.Tensor) -> bool:
    """Returns True if a tensor has several channels and they are not contiguous."""
    return t.shape[1] > 1 and t.stride(1) != 1


def _replanned(launch: Prepared, **changes: Any) -> Prepared:
    """Returns the launch with these fields of its plan replaced."""
    assert launch.call.plan is not None
    plan = dataclasses.replace(launch.call.plan, **changes)
    return dataclasses.replace(launch, call=dataclasses.replace(launch.call, plan=plan, reason=plan.reason))


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
    s = sides(pass_, problem, x, w, y, transposed and b is not None)
    p, ci, co = s.p, s.ci, s.co
    read = p.Y if transposed else p.X  # extents
    reduced, written = (s.w.outer, s.w.channel) if transposed else (s.w.channel, s.w.outer)
    group = p.K // p.G * s.w.outer
    inner = _weight_axis(s.w, transposed)
    x_vec, y_vec, w_vec = wide(x, s.x, ci), wide(y, s.y, co), 1
    if inner:
        outer = written if inner == "i" else reduced
        w_vec = vector(w.data_ptr(), size, outer, *s.w.spatial, group, ci if inner == "i" else co)

    if p.depthwise:  # a tile spans groups, so vectors may cross them
        direct_x = wide(x, s.x, s.wrote) if p.multiplier == 1 else 1
        direct_y = wide(y, s.y, s.wrote)
    # y counts only if its channels are contiguous. If they are not, the accumulator is transposed and stored along
    # its pixels, at no loss.
    narrow = min((direct_x, direct_y) if p.depthwise else (x_vec, w_vec, y_vec if s.y.unit else x_vec)) == 1
    # The largest tiles have no registers to spare for the addresses of narrower accesses, or of a 3-D dgrad's pixels.
    large = size * min(x_vec, w_vec, y_vec if s.y.unit else x_vec) == 16 and not (transposed and p.rank == 3 and s.y.unit)
    lanes_x, lanes_y = _lanes(x, s.x, s.wrote, read), _lanes(y, s.y, s.wrote, s.extents)

    def pack_vector(group: int) -> int:  # vector width of x in a packed kernel
        return wide(x, s.x, group * ci, s.read)

    operands = Operands(
        size, tensor_cores(x.dtype), narrow, large, _strips(lanes_x, lanes_y), lambda group: pack_vector(group) == 1
    )  # fmt: skip
    plan = planning.choose(p, pass_, operands, device)
    tile = plan.tile
    integers = {
        "N": p.N, **window(p), **triple("X", read), **triple("Y", s.extents),
        **strides("sx", s.x), **triple("sw", s.w.spatial), **strides("sy", s.y), "sb": b.stride(0) if b is not None else 0,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "X_UNIT": s.x.unit, "Y_UNIT": s.y.unit, "HAS_BIAS": b is not None,
        # Offsets may pass the ends of x by the halo: the first tap may be outside x while a later one is inside.
        "WIDE": max(s.x.reach + halo(p, s.x), s.y.reach, p.N * math.prod(s.extents) + tile.m) > LIMIT,
        # If pixels are contiguous, they become the accumulator's columns. Its rows are channels, and wgmma needs 64 rows.
        "FLIP": not (s.x.unit and s.y.unit) and (size > 2 or tile.n >= 64 or plan.kernel == "depthwise"),
        "BLOCK_M": tile.m, **numerics(x.dtype), **options(tile),
    }  # fmt: skip
    if plan.kernel == "strip":
        kernel, step = strip, tile.columns // p.S[2] if transposed else tile.columns * p.S[2]
        integers |= {"C": s.wrote, "swk": s.w.outer}
        constants |= {
            **_strip(p, tile, lanes_x, lanes_y, step), "BLOCK_C": tile.n,
            "WIDTH": pow2(min(CHUNK, p.T[2]), 1, CHUNK), "REST_WIDTH": pow2(p.T[2] % CHUNK, 1, CHUNK),
        }  # fmt: skip
    elif plan.kernel == "depthwise":
        kernel = depthwise
        integers |= {"C": s.wrote, "M": p.multiplier, "swk": s.w.outer}
        constants |= {"X_VEC": direct_x, "Y_VEC": direct_y, "MULTIPLIED": p.multiplier > 1, "BLOCK_C": tile.n}
    else:
        integers |= {
            "CI": ci, "CO": co, "G": p.G, "sxg": ci * s.x.channel, "syg": co * s.y.channel,
            "swg": group, "swi": reduced, "swo": written,
        }  # fmt: skip
        constants |= {
            "W_UNIT": inner,
            "W_VEC": w_vec,
            "PRECISION": precision(x.dtype, plan),
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        }
        if plan.kernel == "packed":
            kernel, group = packed, cost.pack(p, pass_, tile)
            integers |= {"PACK": group}
            constants |= {
                "X_VEC": pack_vector(group), "Y_VEC": wide(y, s.y, group * co, s.wrote), "PACKED": group > 1,
                "FIELD": FLAT_FIELD[p.rank] if max(p.T) <= FLAT_FIELD[p.rank] else 0,
            }  # fmt: skip
        else:
            kernel, field = gather, FIELD[p.rank] if max(p.T) <= FIELD[p.rank] else 0
            split = plan.splits > 1
            # Without splits, "sys" is unused and set to 0: y.numel() may exceed 32 bits, which would compile another kernel.
            integers |= {"chunk": planning.chunk(ci, tile.k, plan.splits), "sys": y.numel() if split else 0}
            constants |= {"X_VEC": x_vec, "Y_VEC": y_vec, "EVEN": ci % tile.k == 0, "FIELD": field, "SPLIT": split}
    programs = cost.tiles_of(p, pass_, plan.kernel, tile) * plan.splits
    return prepared(kernel, programs, integers, constants, s.call(pass_, problem, plan), y)


def _prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device) -> Prepared:
    s = sides("wgrad", problem, x, dw, dy)
    p, c, k = s.p, s.ci, s.co
    if s.swapped:
        dy, x = x, dy
    x_vec, y_vec = wide(x, s.x, c), wide(dy, s.y, k)
    if p.depthwise:  # a tile spans groups, so vectors may cross them
        direct_x, direct_y = wide(x, s.x, p.K) if p.multiplier == 1 else 1, wide(dy, s.y, p.K)
    narrow = min((direct_x, direct_y) if p.depthwise else (x_vec, y_vec)) == 1
    lanes_x, lanes_y = _lanes(x, s.x, p.K, p.X), _lanes(dy, s.y, p.K, p.Y)

    def pack_vectors(group: int) -> tuple[int, int]:
        return wide(x, s.x, group * c, p.C), wide(dy, s.y, group * k, p.K)

    size = x.element_size()
    large, strips = size * min(x_vec, y_vec) == 16, _strips(lanes_x, lanes_y)
    operands = Operands(
        size, tensor_cores(x.dtype), narrow, large, strips, lambda group: min(pack_vectors(group)) == 1
    )  # fmt: skip
    plan = planning.choose(p, "wgrad", operands, device)
    tile, splits, extents = plan.tile, plan.splits, p.Y
    if plan.kernel == "strip_wgrad":
        extents = (p.Y[0], p.Y[1], math.ceil(p.Y[2] / tile.columns))
    pixels = p.N * math.prod(extents)
    integers = {
        "N": p.N, **window(p), **triple("X", p.X), **triple("Y", p.Y), **digits(tile.k, extents),
        "chunk": planning.chunk(pixels, tile.k, splits),
        **strides("sx", s.x), **strides("sy", s.y), **triple("sw", s.w.spatial), "sws": dw.numel(), "swk": s.w.outer,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "RANK": p.rank, "X_UNIT": s.x.unit, "Y_UNIT": s.y.unit, "BLOCK_P": tile.k,
        "WIDE": max(s.x.reach + halo(p, s.x), s.y.reach, pixels + tile.k) > LIMIT,
        **numerics(x.dtype), **options(tile),
    }  # fmt: skip
    if plan.kernel == "strip_wgrad":
        kernel = strip_wgrad
        integers |= {"C": p.K}
        constants |= {
            **_strip(p, tile, lanes_x, lanes_y, tile.columns * p.S[2]), "BLOCK_C": tile.n, "ROWS": tile.m,
            # Along columns, the vector width must divide the first column of every strip.
            "Y_VEC": lanes_y.vec if lanes_y.unit == "c" else math.gcd(lanes_y.vec, tile.columns),
            "READ_DY": tile.columns if lanes_x.unit != "c" and lanes_y.unit == "p" else 1,
        }  # fmt: skip
    elif plan.kernel == "depthwise_wgrad":
        kernel = depthwise_wgrad
        integers |= {"K": p.K, "M": p.multiplier}
        constants |= {
            "X_VEC": direct_x, "Y_VEC": direct_y, "MULTIPLIED": p.multiplier > 1, "TAPS": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip
    else:
        kernel = wgrad
        integers |= {
            "C": c, "K": k, "G": p.G, "sxg": c * s.x.channel, "syg": k * s.y.channel,
            "swg": k * s.w.outer, "swc": s.w.channel,
        }  # fmt: skip
        if plan.kernel == "packed_wgrad":
            kernel, group = packed_wgrad, cost.pack(p, "wgrad", tile)
            x_vec, y_vec = pack_vectors(group)
            integers |= {"PACK": group}
            constants |= {"PACKED": group > 1, "TURN": tile.m < min(tile.n, 64)}
        constants |= {
            "X_VEC": x_vec, "Y_VEC": y_vec, "PRECISION": precision(x.dtype, plan), "BLOCK_K": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip
    programs = cost.tiles_of(p, "wgrad", plan.kernel, tile) * splits
    return prepared(kernel, programs, integers, constants, s.call("wgrad", problem, plan), dw, s.swapped)


@dataclass(frozen=True)
class _Lanes:
    """How a strip kernel vectorizes its accesses to a tensor.

    Attributes:
        unit: the contiguous axis: "c" for channels, "p" for the last spatial dimension, "" for neither.
        vec: the vector width along it, in elements.
    """

    unit: str
    vec: int


def _lanes(t: torch.Tensor, a: Addressing, channels: int, extents: Sequence[int]) -> _Lanes:
    if a.unit:
        return _Lanes("c", wide(t, a, channels))
    if a.spatial[2] != 1:
        return _Lanes("", 1)
    return _Lanes("p", vector(t.data_ptr(), t.element_size(), a.outer, a.channel, *a.spatial[:2], extents[2]))


def _strip(p: ConvProblem, tile: Tile, x: _Lanes, y: _Lanes, step: int) -> dict[str, Any]:
    """Returns the compile-time constants that both strip kernels share.

    Args:
        step: distance from one strip to the next, in columns of the tensor that is read.
    """
    x_vec = x.vec if x.unit == "c" else math.gcd(x.vec, step)
    return {
        "T2": p.T[2], "S2": p.S[2], "D2": p.D[2], "P2": p.P[2], "X_UNIT": x.unit, "Y_UNIT": y.unit, "X_VEC": x_vec,
        "Y_VEC": y.vec, "READ": (x_vec if x_vec >= 4 else READ) if x.unit == "p" else 1, "FLIP": x.unit != "c",
        "COLUMNS": tile.columns, "CHUNK": min(CHUNK, p.T[2]),
    }  # fmt: skip


def _strips(x: _Lanes, y: _Lanes) -> Strips:
    return Strips(x.unit != "c", min(x.vec, y.vec) == 1)


def _weight_axis(w: Addressing, transposed: bool) -> str:
    """Returns the weight's contiguous channel axis: "i" for the reduced one, "o" for the written one, or ""."""
    if w.unit:
        return "o" if transposed else "i"
    if w.outer == 1:
        return "i" if transposed else "o"
    return ""
