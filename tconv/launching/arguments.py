"""The arguments of a kernel besides its pointers: geometry, strides and constants, under the kernels' parameter names.

Only shapes, strides, dtype and alignment are read, so tensors without storage work too. Triton never specialises a kernel on
its integers (kernels/common.py), so layers with the same dtype, rank, layout, tile and alignment share one compiled kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tconv.kernels.common import integers as integers_of
from tconv.kernels.reduce import sum_splits
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import Addressing, addressing, vector
from tconv.launching.record import Call
from tconv.planning.plan import Plan, forced
from tconv.planning.problem import ConvProblem
from tconv.planning.simplify import Form, Strides, simplify
from tconv.planning.strips import CHUNK, READ, Strips
from tconv.planning.tiles import Tile

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
INTERPRET = isinstance(sum_splits, InterpretedFunction)  # Triton decides this when the kernels are imported
# Lets the compiler fuse a multiply and an add. Set explicitly, because the default changes with Triton 3.10.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Prepared:
    """A launch without its pointers.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: the number of programs, along one axis.
        integers: the kernel's runtime integers, which follow its pointers.
        constants: the kernel's compile-time constants and launch options.
        call: the record for `last_calls`.
        shape, strides: shape and strides of the result.
        splits: the number of workspace slices that the kernel writes (split-K); 1 if it writes the result itself.
        copies: for each operand that can be copied to channels last, the launch that does so, or None if the operand is used
            as it is; empty if no operand is copied.
        swapped: True if a wgrad kernel takes dy and x in swapped order (planning/simplify.py).
        pointers: the dtype behind each of the kernel's pointers.
        total: the launch that sums the workspace slices; None if splits is 1.
        boxes: for each pointer, the (shape, strides, box) of the tensor descriptor that replaces it, or None; empty if no
            pointer is replaced.
        ready: functions that repeat a launch that has succeeded once, by what it was specialised on (launching/compiled.py).
    """

    kernel: Any
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    call: Call
    shape: torch.Size
    strides: tuple[int, ...]
    splits: int = 1
    copies: tuple[Prepared | None, ...] = ()
    swapped: bool = False
    pointers: tuple[torch.dtype, ...] = ()
    total: Prepared | None = None
    boxes: tuple[Box | None, ...] = ()
    ready: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def tail(self) -> tuple[Any, ...]:
        """All kernel arguments after the pointers, in the kernel's order."""
        named = {**dict(zip(integers_of(self.kernel), self.integers, strict=True)), **self.constants}
        return tuple(named[name] for name in self.kernel.arg_names[len(self.pointers) :])


def interpreted() -> bool:
    """Returns True in Triton's interpreter, except in a dry run for a device that compiles kernels."""
    dry = DRY.get()
    return INTERPRET and (dry is None or dry.device is None or dry.device.interpreted)


def tensor_cores(dtype: torch.dtype) -> bool:
    """Returns True if tensor cores may be used: for fp32, if torch's flag allows TF32 and no precision is forced."""
    if dtype != torch.float32:
        return True
    request = forced()
    if request and request.precision:
        return False
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


@dataclass(frozen=True)
class PassOperands:
    """A pass after the problem was simplified (planning/simplify.py): the problem and the addressing of its tensors.

    Attributes:
        p: the simplified problem.
        rules: names of the rewrites that were applied.
        x, w, y: addressing of (x, w, y) for fprop, (dy, w, dx) for dgrad, and (x, dw, dy) for wgrad, or (dy, dw, x) if
            `swapped`.
        read, wrote: channels, over all groups, of the tensors that x and y stand for.
        extents: spatial extents of the tensor that y stands for.
    """

    p: ConvProblem
    rules: tuple[str, ...]
    x: Addressing
    w: Addressing
    y: Addressing
    read: int
    wrote: int
    extents: tuple[int, int, int]

    @property
    def swapped(self) -> bool:
        """True for a wgrad in which x and dy are swapped."""
        return "swap" in self.rules

    @property
    def ci(self) -> int:
        """Channels per group of the tensor that x stands for."""
        return self.read // self.p.G

    @property
    def co(self) -> int:
        """Channels per group of the tensor that y stands for."""
        return self.wrote // self.p.G

    def call(self, pass_: str, problem: ConvProblem, plan: Plan) -> Call:
        """Returns the record for `last_calls`: it names the original problem, and its plan's reason the rewrites applied."""
        if self.rules:
            done = " + ".join(dict.fromkeys(self.rules))
            plan = dataclasses.replace(plan, reason=f"{done} to {self.p}; {plan.reason}")
        return Call(pass_, problem, plan, plan.reason)


def simplified(
    pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, channels_stay: bool = False
) -> PassOperands:
    """Simplifies the problem of a pass and returns the operands of the simplified one.

    Args:
        x, w, y: (x, w, y) for fprop, (dy, w, dx) for dgrad, (x, dw, dy) for wgrad.
        channels_stay: keep the output channels as they are, because a bias is added to them in a transposed forward.
    """
    transposed = pass_ == "dgrad"
    big, small = (y, x) if transposed else (x, y)
    before = [addressing(t) for t in (big, w, small)]
    big_, w_, small_ = (Strides(a.outer, a.channel, a.spatial) for a in before)
    form = simplify(Form(problem, big_, w_, small_), pass_, channels_stay)
    if "swap" in form.rules:
        before.reverse()
    a_big, aw, a_small = [
        dataclasses.replace(a, outer=s.outer, channel=s.channel, spatial=s.spatial, unit=s.channel == 1)
        for a, s in zip(before, (form.x, form.w, form.y), strict=True)
    ]
    p = form.p
    if transposed:
        return PassOperands(p, form.rules, a_small, aw, a_big, p.K, p.C, p.X)
    return PassOperands(p, form.rules, a_big, aw, a_small, p.C, p.K, p.Y)


def prepared(
    kernel: Any,
    programs: int,
    named: dict[str, int],
    constants: dict[str, Any],
    call: Call,
    result: torch.Tensor,
    swapped: bool = False,
) -> Prepared:
    """Returns a launch with its integers in the kernel's order.

    If the plan has splits (split-K), the kernel writes each split's partial sums to a slice of a workspace that has the
    result's memory order, and a second launch sums the slices.

    Args:
        programs: the grid's size.
        named: the kernel's integers by name; names that the kernel does not have are ignored.
        result: a tensor with the result's shape, strides and dtype.
    """
    integers = tuple(named[n] for n in integers_of(kernel))
    dtype, count, total = result.dtype, sum(name.endswith(("_ptr", "_desc")) for name in kernel.arg_names), None
    pointers, splits = (dtype,) * count, call.plan.splits if call.plan else 1
    if splits > 1:
        reach = sum((n - 1) * s for n, s in zip(result.shape, result.stride(), strict=True))
        assert reach == result.numel() - 1, "slices are summed as they lie, without gaps"
        summed = accumulator(dtype)
        ends = {"VEC": vector(0, dtype.itemsize, result.numel()), "INTERPRET": interpreted(), "BLOCK": 1024, "num_warps": 4}
        ends |= FUSED
        pointers = *pointers[:-1], summed
        grid, whole = (math.ceil(result.numel() / 1024),), (result.shape, result.stride())
        total = Prepared(sum_splits, grid, (result.numel(), splits), ends, call, *whole, pointers=(summed, dtype))
    form = result.shape, result.stride()
    return Prepared(kernel, (programs,), integers, constants, call, *form, splits, (), swapped, pointers, total)


def triple(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """Returns the values as kernel arguments named prefix0, prefix1 and prefix2."""
    return {f"{prefix}{i}": v for i, v in enumerate(values)}


def strides(prefix: str, a: Addressing) -> dict[str, int]:
    """Returns a tensor's strides as kernel arguments: prefix + n, c, 0, 1 and 2."""
    return {f"{prefix}n": a.outer, f"{prefix}c": a.channel, **triple(prefix, a.spatial)}


def window(p: ConvProblem) -> dict[str, int]:
    """Returns filter extents T, stride S, dilation D, leading padding P and g = gcd(S, D) as kernel arguments."""
    common = [math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)]
    return triple("T", p.T) | triple("S", p.S) | triple("D", p.D) | triple("P", p.P) | triple("g", common)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which products are summed, in registers and in a split-K workspace: fp32, but fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constants ACC (the accumulator's dtype) and INTERPRET (True in Triton's interpreter)."""
    return {"ACC": tl.float64 if accumulator(dtype) == torch.float64 else tl.float32, "INTERPRET": interpreted()}


def precision(dtype: torch.dtype, plan: Plan) -> str:
    """Returns the constant PRECISION, which says how a kernel multiplies fp32 operands."""
    if plan.precision:
        return plan.precision
    return "tf32" if dtype == torch.float32 and tensor_cores(dtype) and not interpreted() else "ieee"


def options(tile: Tile) -> dict[str, int]:
    """Returns a tile's launch options for Triton."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED}
    if tile.registers and not torch.version.hip:  # AMD's compiler does not have this option
        found["maxnreg"] = tile.registers
    return found


def wide(t: torch.Tensor, a: Addressing, *channels: int) -> int:
    """Returns the vector width along the channels of t; it divides each of `channels`. 1 if channels are not contiguous."""
    return vector(t.data_ptr(), t.element_size(), a.outer, *a.spatial, *channels) if a.unit else 1


def halo(problem: ConvProblem, a: Addressing) -> int:
    """Returns an upper bound, in elements, on how far a masked-out read may point past either end of a tensor."""
    taps = (abs(t * d) + abs(p) + s for t, d, p, s in zip(problem.T, problem.D, problem.P, problem.S, strict=True))
    return sum(t * s for t, s in zip(taps, a.spatial, strict=True))


def digits(block: int, extents: tuple[int, int, int]) -> dict[str, int]:
    """Returns a step of `block` pixels as kernel arguments: whole images (Bn) and output coordinates (B0, B1, B2)."""
    rest, found = block, {}
    for d in (2, 1, 0):
        found[f"B{d}"] = rest % extents[d]
        rest //= extents[d]
    return {**found, "Bn": rest}


@dataclass(frozen=True)
class Lanes:
    """How a tensor's elements can be accessed as vectors.

    Attributes:
        unit: the contiguous axis: "c" for channels, "p" for the last spatial dimension, "" for neither.
        vec: the vector width along it, in elements.
    """

    unit: str
    vec: int


def lanes(t: torch.Tensor, a: Addressing, channels: int, extents: Sequence[int]) -> Lanes:
    """Returns the lanes of t, which has so many channels and such spatial extents where it is accessed."""
    if a.unit:
        return Lanes("c", wide(t, a, channels))
    if a.spatial[2] != 1:
        return Lanes("", 1)
    return Lanes("p", vector(t.data_ptr(), t.element_size(), a.outer, a.channel, *a.spatial[:2], extents[2]))


def strip_constants(p: ConvProblem, tile: Tile, x: Lanes, y: Lanes, step: int) -> dict[str, Any]:
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


def strips_of(x: Lanes, y: Lanes) -> Strips:
    """Returns how strip kernels access tensors with such lanes."""
    return Strips(x.unit != "c", min(x.vec, y.vec) == 1)
