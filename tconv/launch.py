"""Allocates, prepares and launches: fprop, dgrad, wgrad and the bias gradient of a problem on given tensors.

What a launch needs besides its pointers (grid, integers, compile-time constants) depends on shapes, strides, dtype and
alignment alone; it is worked out once and kept. Integers are never specialised (kernels/common.py), so layers that share
dtype, rank, layout and tile share one compiled kernel.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tconv import plan as planning
from tconv.device import INTERPRETER, Device, cuda_device
from tconv.kernels import depthwise as depthwise_kernels
from tconv.kernels import gather as gather_kernel
from tconv.kernels import reduce as reduce_kernels
from tconv.kernels import wgrad as wgrad_kernel
from tconv.layout import LIMIT, Addressing, addressing, empty, vector
from tconv.problem import ConvProblem
from tconv.record import Call, note

INTERPRET = not hasattr(gather_kernel.gather, "cache_key")
TYPES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
_lock: contextlib.AbstractContextManager[Any] = threading.RLock() if INTERPRET else contextlib.nullcontext()


@dataclass(frozen=True)
class Prepared:
    """A launch without its pointers."""

    kernel: Any
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    call: Call
    splits: int = 1


_prepared: dict[Any, Prepared] = {}
_dry = False


@contextlib.contextmanager
def dry_run() -> Any:
    """Inside the block everything is planned and recorded, nothing is launched: results are uninitialised. One thread."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def device_of(t: torch.Tensor) -> Device:
    """The planner's view of a tensor's device."""
    return INTERPRETER if INTERPRET else cuda_device(t.device.index)


def tensor_cores(dtype: torch.dtype) -> bool:
    """Whether tensor cores may do the products: fp32 only where torch's flag for convolutions says TF32."""
    if dtype != torch.float32:
        return True
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def fprop(problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """y [N, K, *Y] from x [N, C, *X], w [K, C/G, *T], b [K]; any strides, one dtype; y in the format asked for."""
    y = empty(problem.shape("y"), channels_last, x)
    _gather("fprop", problem, x, w, b, y)
    return y


def dgrad(problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """dx [N, C, *X] from dy [N, K, *Y] and w; with b [C] the forward of a transposed layer."""
    dx = empty(problem.shape("x"), channels_last, dy)
    _gather("dgrad", problem, dy, w, b, dx)
    return dx


def wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """dw [K, C/G, *T] from dy [N, K, *Y] and x [N, C, *X]; the same bits on every run."""
    dw = empty(problem.shape("w"), channels_last, x)
    key = ("wgrad", problem, dy.stride(), x.stride(), channels_last, *_facts(dy, x))
    launch = _lookup(key, lambda: _prepare_wgrad(problem, dy, x, dw))
    _run_split(launch, dw, dy, x)
    return dw


def bias_grad(problem: ConvProblem, g: torch.Tensor) -> torch.Tensor:
    """db [channels] from the gradient of an output, fprop's or a transposed layer's: its sum over batch and pixels."""
    db = torch.empty(g.shape[1], dtype=g.dtype, device=g.device)
    key = ("bias", problem, g.shape, g.stride(), *_facts(g, g))
    launch = _lookup(key, lambda: _prepare_bias(problem, g))
    _run_split(launch, db, g)
    return db


# --- launching ---


def _facts(a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
    return a.dtype, a.device, a.data_ptr() % 16, b.data_ptr() % 16, tensor_cores(a.dtype)


def _lookup(key: Any, make: Callable[[], Prepared]) -> Prepared:
    if planning.FORCED.get() is not None:
        return make()
    found = _prepared.get(key)
    if found is None:
        found = _prepared[key] = make()
    return found


def _run(launch: Prepared, *pointers: torch.Tensor) -> None:
    note(launch.call)
    if not _dry:
        _call(launch.kernel, launch.grid, pointers, launch.integers, launch.constants)


def _run_split(launch: Prepared, out: torch.Tensor, *inputs: torch.Tensor) -> None:
    if launch.splits == 1:
        _run(launch, *inputs, out)
        return
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
    workspace = torch.empty(launch.splits * out.numel(), dtype=accumulator, device=out.device)
    _run(launch, *inputs, workspace)
    if not _dry:
        grid = (math.ceil(out.numel() / 1024),)
        constants = {"INTERPRET": INTERPRET, "BLOCK": 1024, "num_warps": 4}
        _call(reduce_kernels.sum_splits, grid, (workspace, out), (out.numel(), launch.splits), constants)


def _call(kernel: Any, grid: tuple[int], pointers: tuple[torch.Tensor, ...], integers: Any, constants: Any) -> None:
    device = pointers[-1].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device), _lock:
            kernel[grid](*pointers, *integers, **constants)
    else:
        with _lock:
            kernel[grid](*pointers, *integers, **constants)


# --- preparing ---


def _accumulate(dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "INTERPRET": INTERPRET}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and tensor_cores(dtype) and not INTERPRET else "ieee"


def _options(tile: Any) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _halo(problem: ConvProblem, a: Addressing) -> int:
    """How far past a tensor's ends the (masked) reads of its halo may point, in elements."""
    taps = (t * d + p + s for t, d, p, s in zip(problem.T, problem.D, problem.P, problem.S, strict=True))
    return sum(t * s for t, s in zip(taps, a.spatial, strict=True))


def _wide(*reaches: int) -> bool:
    return max(reaches) > LIMIT


def _gather(
    pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor
) -> None:
    key = (
        pass_,
        problem,
        x.stride(),
        w.stride(),
        y.stride(),
        b is None or b.stride(),
        w.data_ptr() % 16,
        *_facts(x, y),
    )
    launch = _lookup(key, lambda: _prepare_gather(pass_, problem, x, w, b, y))
    _run(launch, x, w, b if b is not None else x, y)  # without a bias its pointer is not read


def _prepare_gather(
    pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor
) -> Prepared:
    p, size = problem, x.element_size()
    plan = planning.choose(p, pass_, size, tensor_cores(x.dtype), device_of(x))
    tile, transposed = plan.tile, pass_ == "dgrad"
    ax, aw, ay = addressing(x), addressing(w), addressing(y)
    ci, co = x.shape[1] // p.G, y.shape[1] // p.G
    geometry = (
        *((p.Y, p.X) if transposed else (p.X, p.Y)), p.T, p.S, p.D, p.P,
        tuple(math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)),
    )  # fmt: skip
    extents = tuple(v for triple in geometry for v in triple)
    bias_stride = b.stride(0) if b is not None else 0
    block = tile.m * max(1, tile.n, tile.k)
    wide = _wide(ax.reach + 2 * _halo(p, ax) + block, ay.reach + block * p.phases(pass_))
    common: dict[str, Any] = {
        "TRANSPOSED": transposed, "RANK": p.rank, "X_UNIT": ax.unit, "Y_UNIT": ay.unit, "HAS_BIAS": b is not None,
        "WIDE": wide, "FLIP": not ax.unit, **_accumulate(x.dtype), **_options(tile),
    }  # fmt: skip
    call = Call(pass_, p, plan, plan.reason)
    tiles = planning.pixel_tiles(p, pass_, tile.m)
    if plan.kernel == "depthwise":
        multiplied = p.multiplier > 1
        x_vec = vector(x.data_ptr(), size, ax.outer, *ax.spatial, co * p.G) if ax.unit and not multiplied else 1
        y_vec = vector(y.data_ptr(), size, ay.outer, *ay.spatial, co * p.G) if ay.unit else 1
        integers = (
            p.N, co * p.G, p.multiplier, *extents,
            ax.outer, ax.channel, *ax.spatial, aw.outer, *aw.spatial, ay.outer, ay.channel, *ay.spatial, bias_stride,
        )  # fmt: skip
        constants = {
            **common, "X_VEC": x_vec, "Y_VEC": y_vec, "MULTIPLIED": multiplied, "BLOCK_M": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip
        grid = (tiles * math.ceil(co * p.G / tile.n),)
        return Prepared(depthwise_kernels.depthwise, grid, integers, constants, call)

    reduced, written = (aw.outer, aw.channel) if transposed else (aw.channel, aw.outer)
    # The contiguous axis of the weight, if it is one of the two channel axes: the reduced one or the written one.
    unit = {True: "o" if transposed else "i", False: ""}[aw.unit] or ("i" if transposed else "o") * (aw.outer == 1)
    group = p.K // p.G * aw.outer
    others = [s for s, inner in ((reduced, unit == "i"), (written, unit == "o")) if not inner]
    w_vec = vector(w.data_ptr(), size, *others, *aw.spatial, group, ci if unit == "i" else co) if unit else 1
    x_vec = vector(x.data_ptr(), size, ax.outer, *ax.spatial, ci) if ax.unit else 1
    y_vec = vector(y.data_ptr(), size, ay.outer, *ay.spatial, co) if ay.unit else 1
    integers = (
        p.N, ci, co, p.G, *extents,
        ax.outer, ci * ax.channel, ax.channel, *ax.spatial,
        group, reduced, written, *aw.spatial,
        ay.outer, co * ay.channel, ay.channel, *ay.spatial, bias_stride,
    )  # fmt: skip
    field = {1: 32, 2: 16, 3: 10}[p.rank]
    constants = {
        **common, "W_UNIT": unit, "X_VEC": x_vec, "W_VEC": w_vec, "Y_VEC": y_vec, "EVEN": ci % tile.k == 0,
        "PACKED": max(p.T) <= field, "PRECISION": _precision(x.dtype),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    grid = (tiles * math.ceil(co / tile.n) * p.G,)
    return Prepared(gather_kernel.gather, grid, integers, constants, call)


def _digits(block: int, extents: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """block as (images, coordinates...) in the mixed radix of an output's extents."""
    rest, digits = block, []
    for extent in reversed(extents):
        digits.append(rest % extent)
        rest //= extent
    return rest, digits[2], digits[1], digits[0]


def _prepare_wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor) -> Prepared:
    p, size = problem, x.element_size()
    plan = planning.choose(p, "wgrad", size, tensor_cores(x.dtype), device_of(x))
    tile = plan.tile
    ax, ay, aw = addressing(x), addressing(dy), addressing(dw)
    c, k = p.C // p.G, p.K // p.G
    pixels = p.N * math.prod(p.Y)
    chunk = math.ceil(math.ceil(pixels / tile.k) / plan.splits) * tile.k
    splits = math.ceil(pixels / chunk)
    geometry = (*p.X, *p.Y, *p.T, *p.S, *p.D, *p.P, *_digits(tile.k, p.Y), chunk)
    block = tile.k * max(tile.m, tile.n)
    step = 2 * tile.k * max(ax.channel, ay.channel, *ax.spatial, *ay.spatial, 1)
    constants: dict[str, Any] = {
        "RANK": p.rank, "X_UNIT": ax.unit, "Y_UNIT": ay.unit,
        "WIDE": _wide(ax.reach + 2 * _halo(p, ax) + block + step, ay.reach + block + step, pixels + 2 * tile.k),
        **_accumulate(x.dtype), **_options(tile),
    }  # fmt: skip
    call = Call("wgrad", p, plan, plan.reason)
    if plan.kernel == "depthwise_wgrad":
        multiplied = p.multiplier > 1
        constants |= {
            "X_VEC": vector(x.data_ptr(), size, ax.outer, *ax.spatial, p.K) if ax.unit and not multiplied else 1,
            "Y_VEC": vector(dy.data_ptr(), size, ay.outer, *ay.spatial, p.K) if ay.unit else 1,
            "MULTIPLIED": multiplied, "TAPS": tile.m, "BLOCK_C": tile.n, "BLOCK_P": tile.k,
        }  # fmt: skip
        integers = (
            p.N, p.K, p.multiplier, *geometry, ax.outer, ax.channel, *ax.spatial, ay.outer, ay.channel, *ay.spatial,
            dw.numel(), aw.outer, *aw.spatial,
        )  # fmt: skip
        grid = (math.ceil(p.taps / tile.m) * math.ceil(p.K / tile.n) * splits,)
        return Prepared(depthwise_kernels.depthwise_wgrad, grid, integers, constants, call, splits)
    constants |= {
        "X_VEC": vector(x.data_ptr(), size, ax.outer, *ax.spatial, c) if ax.unit else 1,
        "Y_VEC": vector(dy.data_ptr(), size, ay.outer, *ay.spatial, k) if ay.unit else 1,
        "PRECISION": _precision(x.dtype), "BLOCK_K": tile.m, "BLOCK_C": tile.n, "BLOCK_P": tile.k,
    }  # fmt: skip
    integers: tuple[int, ...] = (
        p.N, c, k, p.G, *geometry,
        ax.outer, c * ax.channel, ax.channel, *ax.spatial,
        ay.outer, k * ay.channel, ay.channel, *ay.spatial,
        dw.numel(), k * aw.outer, aw.outer, aw.channel, *aw.spatial,
    )  # fmt: skip
    grid = (math.ceil(k / tile.m) * math.ceil(c / tile.n) * p.taps * p.G * splits,)
    return Prepared(wgrad_kernel.wgrad, grid, integers, constants, call, splits)


def _prepare_bias(problem: ConvProblem, g: torch.Tensor) -> Prepared:
    plan = planning.choose(problem, "bias", g.element_size(), False, device_of(g))
    tile, a, channels = plan.tile, addressing(g), g.shape[1]
    extents = (1,) * (5 - g.dim()) + tuple(g.shape[2:])
    pixels = g.shape[0] * math.prod(extents)
    chunk = math.ceil(math.ceil(pixels / tile.k) / min(plan.splits, math.ceil(pixels / tile.k))) * tile.k
    splits = math.ceil(pixels / chunk)
    integers = (g.shape[0], channels, *extents, chunk, a.outer, a.channel, *a.spatial)
    constants: dict[str, Any] = {
        "RANK": problem.rank, "Y_UNIT": a.unit,
        "Y_VEC": vector(g.data_ptr(), g.element_size(), a.outer, *a.spatial, channels) if a.unit else 1,
        "WIDE": _wide(a.reach + tile.n * tile.k, pixels + 2 * tile.k),
        **_accumulate(g.dtype), **_options(tile), "BLOCK_P": tile.k, "BLOCK_K": tile.n,
    }  # fmt: skip
    grid = (math.ceil(channels / tile.n) * splits,)
    return Prepared(reduce_kernels.sum_pixels, grid, integers, constants, Call("bias", problem, plan, plan.reason), splits)
