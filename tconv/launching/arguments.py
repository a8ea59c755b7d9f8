"""What a kernel is told besides its pointers: a pass's geometry, strides and constants by the names that kernels use.

Only shapes, strides, dtype and alignment are read, so tensors without storage do. Integers are never specialised
(kernels/common.py): layers that share dtype, rank, layout, tile and alignment share one compiled kernel.
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
from tconv.planning.tiles import Tile

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
INTERPRET = isinstance(sum_splits, InterpretedFunction)  # Triton decided so when the kernels were loaded
# A product and a sum become one instruction. Said explicitly, for the compiler's default changes with Triton 3.10.
FUSED = {"enable_fp_fusion": True}


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
        copies: per operand that may be staged the launch that copies it to channels last first, or None; empty for none.
        swapped: whether the kernel takes its operands, dy and x of a wgrad, in each other's place (planning/simplify.py).
        pointers: dtypes of what the kernel's pointers point to.
        total: the launch that adds the slices; None if there is one.
        ready: how it is launched where it has been before (launching/compiled.py).
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
    copies: tuple[Prepared | None, ...] = ()
    swapped: bool = False
    pointers: tuple[torch.dtype, ...] = ()
    total: Prepared | None = None
    boxes: tuple[Box | None, ...] = ()
    ready: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def tail(self) -> tuple[Any, ...]:
        """Every argument of the kernel that follows its pointers."""
        named = {**dict(zip(integers_of(self.kernel), self.integers, strict=True)), **self.constants}
        return tuple(named[name] for name in self.kernel.arg_names[len(self.pointers) :])


def interpreted() -> bool:
    """Whether a kernel that is prepared now will be interpreted: in the interpreter, unless it is for another device."""
    dry = DRY.get()
    return INTERPRET and (dry is None or dry.device is None or dry.device.interpreted)


def tensor_cores(dtype: torch.dtype) -> bool:
    """Whether tensor cores may do the products as they are: fp32 only where torch's flag for convolutions says TF32."""
    if dtype != torch.float32:
        return True
    wish = forced()
    if wish and wish.precision:
        return False
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


@dataclass(frozen=True)
class PassOperands:
    """A pass of a problem as it is computed (planning/simplify.py): who reads and who writes.

    Attributes:
        p: the problem computed.
        rules: the rewrites that made it so.
        x, w, y: how what is read, the weight, and what is written are addressed; of wgrad x, dw and dy, or dy, dw and x.
        read, wrote: channels of what is read and of what is written; of wgrad those of x and dy.
        extents: those of what is written.
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
        """Whether a wgrad's x stands for dy and its dy for x."""
        return "swap" in self.rules

    @property
    def ci(self) -> int:
        """Channels per group of what is read."""
        return self.read // self.p.G

    @property
    def co(self) -> int:
        """Channels per group of what is written."""
        return self.wrote // self.p.G

    def call(self, pass_: str, problem: ConvProblem, plan: Plan) -> Call:
        """What `last_calls` will say of a plan for the problem that this one stands for."""
        if self.rules:
            done = " + ".join(dict.fromkeys(self.rules))
            plan = dataclasses.replace(plan, reason=f"{done} to {self.p}; {plan.reason}")
        return Call(pass_, problem, plan, plan.reason)


def sides(
    pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, channels_stay: bool = False
) -> PassOperands:
    """The sides of a pass; x is what is read, y what is written, of wgrad x is x and y is dy.

    Args:
        channels_stay: the channels written must not be merged with anything: there is a bias.
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
    """A launch, its integers in the kernel's order; strides of channels that a kernel has no use for may be left over.

    With splits the kernel writes slices of a workspace instead, each in the result's own memory order.
    """
    integers = tuple(named[n] for n in integers_of(kernel))
    dtype, count, total = result.dtype, sum(name.endswith(("_ptr", "_desc")) for name in kernel.arg_names), None
    pointers, splits = (dtype,) * count, call.plan.splits if call.plan else 1
    if splits > 1:
        reach = sum((n - 1) * s for n, s in zip(result.shape, result.stride(), strict=True))
        assert reach == result.numel() - 1, "slices are summed as they lie, without gaps"
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        ends = {"VEC": vector(0, dtype.itemsize, result.numel()), "INTERPRET": interpreted(), "BLOCK": 1024, "num_warps": 4}
        ends |= FUSED
        pointers = *pointers[:-1], accumulator
        grid, whole = (math.ceil(result.numel() / 1024),), (result.shape, result.stride())
        total = Prepared(sum_splits, grid, (result.numel(), splits), ends, call, *whole, pointers=(accumulator, dtype))
    form = result.shape, result.stride()
    return Prepared(kernel, (programs,), integers, constants, call, *form, splits, (), swapped, pointers, total)


def triple(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """One integer per dimension."""
    return {f"{prefix}{i}": v for i, v in enumerate(values)}


def strides(prefix: str, a: Addressing) -> dict[str, int]:
    """A tensor's strides."""
    return {f"{prefix}n": a.outer, f"{prefix}c": a.channel, **triple(prefix, a.spatial)}


def window(p: ConvProblem) -> dict[str, int]:
    """Filter extents, stride, dilation, padding, and what stride and dilation share."""
    common = [math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)]
    return triple("T", p.T) | triple("S", p.S) | triple("D", p.D) | triple("P", p.P) | triple("g", common)


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """The type that sums have, and whether Triton interprets."""
    return {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "INTERPRET": interpreted()}


def precision(dtype: torch.dtype, plan: Plan) -> str:
    """What a kernel's products of fp32 operands are told."""
    if plan.precision:
        return plan.precision
    return "tf32" if dtype == torch.float32 and tensor_cores(dtype) and not interpreted() else "ieee"


def options(tile: Tile) -> dict[str, int]:
    """Launch options."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED}
    if tile.registers and not torch.version.hip:  # AMD's compiler knows no such option
        found["maxnreg"] = tile.registers
    return found


def wide(t: torch.Tensor, a: Addressing, *channels: int) -> int:
    """Elements per access along the channels of t, which end at multiples of `channels`; 1 where they are not contiguous."""
    return vector(t.data_ptr(), t.element_size(), a.outer, *a.spatial, *channels) if a.unit else 1


def halo(problem: ConvProblem, a: Addressing) -> int:
    """How far past a tensor's ends a read that will be masked may point, in elements."""
    taps = (abs(t * d) + abs(p) + s for t, d, p, s in zip(problem.T, problem.D, problem.P, problem.S, strict=True))
    return sum(t * s for t, s in zip(taps, a.spatial, strict=True))


def digits(block: int, extents: tuple[int, int, int]) -> dict[str, int]:
    """block as images (Bn) and coordinates (B0, B1, B2) in the mixed radix of an output's extents."""
    rest, found = block, {}
    for d in (2, 1, 0):
        found[f"B{d}"] = rest % extents[d]
        rest //= extents[d]
    return {**found, "Bn": rest}
