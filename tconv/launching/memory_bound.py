"""The launches of kernels that multiply nothing: sums of pixels, copies, borders, the rounding to fp8."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from tconv.kernels.borders import add_borders
from tconv.kernels.common import integers as integers_of
from tconv.kernels.copy import copy_both, copy_channels_last
from tconv.kernels.epilogue import activation_gradient
from tconv.kernels.quantize import largest, quantize
from tconv.launching.arguments import FUSED, KERNELS, Prepared, accumulator, interpreted, numerics, options, prepared
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.record import Call
from tconv.planning import borders
from tconv.planning import plan as planning
from tconv.planning.addressing import LIMIT, flattened, vector
from tconv.planning.device import Device
from tconv.planning.epilogue import Epilogue
from tconv.planning.operands import border_constants, chunk, strides, triple
from tconv.planning.problem import ConvProblem, lift, pow2
from tconv.planning.tiles import Tile

Shape = tuple[int, ...]


def prepare_bias(problem: ConvProblem, g: torch.Tensor, device: Device) -> Prepared:
    """Returns the launch of the bias gradient, from the gradient g [N, channels, *extents] of a layer's output."""
    return _prepare_sum(KERNELS["bias"], problem, g, device, {}, "")


def prepare_activation(
    problem: ConvProblem, g: torch.Tensor, epilogue: Epilogue, residual: bool, summed: bool, device: Device
) -> Prepared:
    """Returns the launch of `activation_gradient`, from the gradient g [N, channels, *extents] of a result with an epilogue.

    Args:
        residual: whether the residual's gradient is written too, which differs from the convolution's by the scale.
        summed: whether the bias gradient is computed; without it, the launch's result stays as it is.
    """
    constants = {
        "ACTIVATION": epilogue.activation, "SLOPE": epilogue.slope, "RESULT": epilogue.by_result, "SCALE": epilogue.scale,
        "RESIDUAL": residual, "SUM": summed,
    }  # fmt: skip
    launch = _prepare_sum(activation_gradient, problem, g, device, constants, f"gradient of {epilogue}; ")
    own = list(launch.pointers)
    own[2] = accumulator(g.dtype) if epilogue.wide else g.dtype  # scale
    if not summed:  # splits only tell how many programs there are
        own[-1] = g.dtype
        launch = dataclasses.replace(launch, splits=1, total=None)
    return dataclasses.replace(launch, pointers=tuple(own))


def _prepare_sum(
    kernel: Any, problem: ConvProblem, g: torch.Tensor, device: Device, constants: dict[str, Any], what: str
) -> Prepared:
    """Returns the launch of a kernel that passes over g [N, channels, *extents] and sums it per channel.

    Args:
        constants: those that the kernel takes beyond those of a sum.
        what: the beginning of the plan's reason.
    """
    channels, extents = g.shape[1], lift(g.shape[2:], 1)
    pixels = g.shape[0] * math.prod(extents)
    plan = summed(planning.choose_bias(channels, pixels, g.element_size(), device), device)
    plan = dataclasses.replace(plan, reason=what + plan.reason)
    a, extents, rank = flattened(addressing(g), extents)
    tile = plan.tile
    integers = {
        "N": g.shape[0], "C": channels, **triple("Y", extents), **strides("sy", a),
        "chunk": chunk(pixels, tile.k, plan.splits),
    }  # fmt: skip
    constants = constants | {
        "RANK": rank, "Y_UNIT": a.unit, "Y_VEC": min(a.lanes(channels, extents).vec, tile.k),
        "WIDE": max(a.reach, pixels + tile.k) > LIMIT, "BLOCK_P": tile.k, "BLOCK_C": tile.n,
        **numerics(g.dtype), **options(tile),
    }  # fmt: skip
    call = Call("bias", problem, plan, plan.reason)
    db, programs = shaped((channels,), False, g.dtype), math.ceil(channels / tile.n) * plan.splits
    return prepared(kernel, programs, integers, constants, call, db)


def prepare_copy(problem: ConvProblem | None, t: torch.Tensor, device: Device, shape: Shape | None = None) -> Prepared:
    """Returns the launch that copies t, an operand of the problem, to channels last.

    Args:
        shape: the copy's shape, which may have more images or channels than t, which are zero; by default t's.
    """
    shape = tuple(t.shape) if shape is None else shape
    a, extents, rank = flattened(addressing(t), lift(t.shape[2:], 1))
    images, channels = shape[:2]
    pixels = images * math.prod(extents)
    plan = planning.choose_copy(channels, pixels, t.element_size(), device)
    tile = plan.tile
    integers = {
        "N": t.shape[0], "C": t.shape[1], "M": images, "K": channels, **triple("X", extents), **strides("sx", a),
    }  # fmt: skip
    lanes = a.lanes(channels, extents)
    constants: dict[str, Any] = {
        "RANK": rank, "X_VEC": lanes.vec if lanes.unit == "p" else 1, "Y_VEC": vector(0, t.element_size(), channels),
        "PADDED": shape != t.shape, "WIDE": max(a.reach, images * channels * math.prod(extents), pixels + tile.m) > LIMIT,
        "BLOCK_P": tile.m, "BLOCK_C": tile.n, **options(tile),
    }  # fmt: skip
    programs = math.ceil(pixels / tile.m) * math.ceil(channels / tile.n)
    call = Call("copy", problem, plan, plan.reason)
    return prepared(copy_channels_last, programs, integers, constants, call, shaped(shape, True, t.dtype))


def prepare_borders(
    problem: ConvProblem, dx: torch.Tensor, channels_last: bool, begin: list[int] | None, device: Device
) -> Prepared:
    """Returns the launch that adds to dx, of a problem that repeats x beyond its borders, the slabs of its padding.

    Args:
        channels_last: whether dx and the workspace are.
        begin: where the slabs before and after x begin in the workspace, for each dimension in turn, and where the last ends;
            None if the workspace has the gradient of the padded x, which is folded into dx.
    """
    a, (before, after), (low, every, choices) = addressing(dx), borders.padding(problem), borders.shown(problem)
    unit = channels_last and problem.C > 1
    vec = vector(0, dx.itemsize, problem.C) if unit else 1
    pixels, fold = borders.pixels(problem), begin is None
    if begin is None:
        low = every = problem.X
        pixels = problem.N * math.prod(problem.X)
        begin = [0] * 6 + [problem.N * problem.C * math.prod(borders.around(problem).X)]
    plan = borders.choose_borders(problem, pixels, vec > 2, device)
    tile = plan.tile
    integers = {
        "N": problem.N, "C": problem.C, **triple("X", problem.X), **triple("A", before), **triple("E", after),
        **triple("low", low), **triple("n", every), **triple("m", choices), **triple("a", begin[:6:2]),
        **triple("e", begin[1:6:2]), **strides("sx", a),
    }  # fmt: skip
    constants = {
        **border_constants(problem), "FOLD": fold, "X_UNIT": unit, "X_VEC": vec,
        "WIDE": max(a.reach, begin[6], pixels + tile.m) > LIMIT, **numerics(dx.dtype), "BLOCK_M": tile.m, "BLOCK_C": tile.n,
        **options(tile),
    }  # fmt: skip
    programs = math.ceil(pixels / tile.m) * math.ceil(problem.C / tile.n)
    return prepared(add_borders, programs, integers, constants, Call("borders", problem, plan, plan.reason), dx)


def prepare_both(first: Prepared, second: Prepared) -> Prepared:
    """Returns the launch that makes two copies, of `prepare_copy`."""
    names = integers_of(copy_channels_last)
    named = dict(zip(names, first.integers, strict=True)) | {"programs": first.grid[0]}
    named |= dict(zip((f"u{name}" for name in names), second.integers, strict=True))
    taken = copy_channels_last.arg_names  # the other constants are launch options, which both share
    constants = first.constants | {f"u{name}": value for name, value in second.constants.items() if name in taken}
    result = torch.empty_strided(first.shape, first.strides, dtype=first.pointers[0], device="meta")
    launch = prepared(copy_both, first.grid[0] + second.grid[0], named, constants, first.call, result)
    return dataclasses.replace(launch, copies=(first, second))


@functools.lru_cache(1024)
def prepare_quantize(numel: int, dtype: torch.dtype, own: bool) -> tuple[Prepared, ...]:
    """Returns the launches that round so many numbers of `dtype` to fp8.

    Args:
        own: whether the scale is that of their largest one, which a launch before the other finds.
    """
    block = 2048
    blocks = math.ceil(numel / block)
    parts = pow2(blocks, 1, 512) if own else 0
    shared = {"VEC": vector(0, 1, numel), "PARTS": parts, "WIDE": numel + max(parts, 1) * block > LIMIT, "BLOCK": block}
    launched = {"num_warps": 4, **FUSED}
    plan = planning.Plan("quantize", "quantize", Tile(block, 1, 1), 1, f"for {numel} numbers")
    call, result = Call("quantize", None, plan, plan.reason), torch.empty(numel, dtype=torch.float8_e4m3fn, device="meta")
    launch = prepared(quantize, blocks, {"numel": numel}, {**shared, "INTERPRET": interpreted(), **launched}, call, result)
    launch = dataclasses.replace(launch, pointers=(dtype, torch.float32, torch.float32, result.dtype))
    if not own:
        return (launch,)
    found = torch.empty(parts, dtype=torch.float32, device="meta")
    first = prepared(largest, parts, {"numel": numel}, shared | launched, call, found)
    return dataclasses.replace(first, pointers=(dtype, torch.float32)), launch


def summed(plan: planning.Plan, device: Device) -> planning.Plan:
    """Returns a plan whose splits, if it has several, are summed by a dependent launch where the device has such launches."""
    return dataclasses.replace(plan, dependent=True) if plan.splits > 1 and device.dependent else plan
