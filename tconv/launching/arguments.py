"""A launch without its pointers: the kernel, its grid, its integers and its compile-time constants.

Only shapes, strides, dtype and alignment are read, so tensors without storage work too. Triton never specialises a kernel on
its integers (kernels/common.py), so layers with the same dtype, rank, layout, tile and alignment share one compiled kernel.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tconv.kernels.common import integers as integers_of
from tconv.kernels.reduce import sum_splits
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import reach
from tconv.launching.record import Call
from tconv.planning.addressing import vector
from tconv.planning.epilogue import NONE, POINTERS, Epilogue
from tconv.planning.families import FAMILIES
from tconv.planning.plan import Plan, forced
from tconv.planning.tiles import Tile

BESIDE = ("state_ptr", "next_ptr")  # pointers of a stream's kernel, after those of an epilogue
Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
INTERPRET = isinstance(sum_splits, InterpretedFunction)  # Triton decides this when the kernels are imported
# Lets the compiler fuse a multiply and an add. Set explicitly, because the default changes with Triton 3.10.
FUSED = {"enable_fp_fusion": True}


def _kernels() -> dict[str, Any]:
    """Returns the kernel of each family, a function by `triton.jit` or `gluon.jit`.

    Gluon is experimental. Where a version of Triton has another one, its kernels are left out.
    """
    found = {}
    for name, family in FAMILIES.items():
        file, function = family.kernel
        try:
            found[name] = getattr(importlib.import_module(f"tconv.kernels.{file}"), function)
        except (ImportError, AttributeError):
            if not family.gluon:
                raise
    return found


KERNELS = _kernels()


@dataclass(frozen=True)
class Prepared:
    """A launch without its pointers.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: the number of programs, along one axis.
        integers: the kernel's runtime integers, which follow its pointers.
        constants: the kernel's compile-time constants and launch options.
        call: the record for `last_calls`.
        shape, strides, dtype: of the result.
        splits: the number of workspace slices that the kernel writes (split-K); 1 if it writes the result itself.
        copies: for each operand that can be copied to channels last, the launch that does so, or None if the operand is used
            as it is; empty if no operand is copied. Of a launch that makes two copies, those of each alone.
        swapped: True if a wgrad kernel takes dy and x in swapped order (planning/simplify.py).
        pointers: the dtype behind each of the kernel's pointers. Those of an epilogue, which are the last, are there only if
            the launch has one.
        total: the launch that sums the workspace slices; None if splits is 1.
        boxes: for each pointer, the (shape, strides, box) of the tensor descriptor that replaces it, or None; empty if no
            pointer is replaced.
        both: the launch that makes both copies at once; None if there are not two.
        then: launches of the same call that follow this one, of normalisations.
        borders: of a dgrad whose problem repeats x beyond its borders, what it adds at them; None if it does not.
        ready: functions that repeat a launch that has succeeded once, by what it was specialised on (launching/compiled.py).
    """

    kernel: Any
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    call: Call
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    splits: int = 1
    copies: tuple[Prepared | None, ...] = ()
    swapped: bool = False
    pointers: tuple[torch.dtype, ...] = ()
    total: Prepared | None = None
    boxes: tuple[Box | None, ...] = ()
    both: Prepared | None = None
    then: tuple[Prepared, ...] = ()
    borders: Borders | None = None
    ready: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def parts(self) -> list[Prepared]:
        """All launches that this one may make: copies of operands, each alone or both, itself, and what follows."""
        return [part for part in (*self.copies, self.both, self, self.total, *self.then) if part]

    def copying(self, missing: list[int]) -> list[Prepared]:
        """Returns the launches that copy the operands with these indices."""
        found = [self.both] if len(missing) == 2 else [self.copies[i] for i in missing]
        return [copy for copy in found if copy]

    def needed(self, missing: list[int]) -> list[Prepared]:
        """Returns the launches that are made if the operands with these indices have to be copied."""
        return [part for part in (*self.copying(missing), self, self.total, *self.then) if part]

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        """All kernel arguments after the pointers, and launch options, by name."""
        return {**dict(zip(integers_of(self.kernel), self.integers, strict=True)), **self.constants}

    @property
    def tail(self) -> tuple[Any, ...]:
        """All kernel arguments after the pointers, in the kernel's order."""
        return tuple(self.named[name] for name in self.kernel.arg_names[len(self.pointers) :])


@dataclass(frozen=True)
class Borders:
    """The launches that add to dx what belongs to padding that repeats x (planning/borders.py).

    Attributes:
        slabs: each slab's dgrad, the dimension of dy along which it reads a part, that part's first element and length, and
            where the slab begins in the workspace. Empty if the dgrad is that of the padded x.
        numel: elements of the workspace.
        total: the launch that adds the slabs to dx, from the workspace, or folds the gradient of the padded x.
        call: the record of the whole.
    """

    slabs: tuple[tuple[Prepared, int, int, int, int], ...]
    numel: int
    total: Prepared
    call: Call


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


def prepared(
    kernel: Any,
    programs: int,
    named: dict[str, int],
    constants: dict[str, Any],
    call: Call,
    result: torch.Tensor,
    swapped: bool = False,
    slices: list[tuple[int, int]] | None = None,
    epilogue: Epilogue = NONE,
    operands: torch.dtype | None = None,
) -> Prepared:
    """Returns a launch with its integers in the kernel's order.

    If the plan has splits (split-K), the kernel writes each split's partial sums to a slice of a workspace, and a second launch
    sums the slices. An epilogue is then the second launch's, since it needs the whole sum.

    Args:
        programs: the grid's size.
        named: the kernel's integers by name; names that the kernel does not have are ignored.
        result: a tensor with the result's shape, strides and dtype.
        swapped: as in `Prepared`.
        slices: the dimensions of a workspace slice, from `Pass.slices`; None if it has the result's memory order.
        epilogue: what is done with a result of fprop or dgrad before it is written.
        operands: the dtype of the operands; None if it is the result's.
    """
    integers = tuple(named[n] for n in integers_of(kernel))
    dtype, splits, total = result.dtype, call.plan.splits if call.plan else 1, None
    beside = (*POINTERS, *BESIDE)
    own = sum(name.endswith(("_ptr", "_desc")) and name not in beside for name in kernel.arg_names)
    pointers = *(operands or dtype,) * (own - 1), dtype
    if splits > 1:
        summed = accumulator(dtype)
        pointers = *pointers[:-1], summed
        dependent = call.plan is not None and call.plan.dependent
        total = sum_of(splits, slices, call, result, summed, dependent, epilogue, operands)
    elif epilogue:
        pointers += _dtypes(epilogue, dtype, operands)
    assert POINTERS[0] in kernel.arg_names or splits > 1 or not epilogue, "a kernel without an epilogue"
    if POINTERS[0] in kernel.arg_names:
        own_epilogue = epilogue if splits == 1 else NONE
        constants = constants | own_epilogue.constants() | fusing(own_epilogue)
    if BESIDE[0] in kernel.arg_names:
        if not constants["NEXT"]:
            constants = constants | dict.fromkeys(BESIDE)
        else:  # the pointers of an epilogue come before, whether there is one or not
            constants = {k: v for k, v in constants.items() if k not in POINTERS}
            pointers += (() if splits == 1 and epilogue else (dtype,) * len(POINTERS)) + (dtype,) * len(BESIDE)
    form = result.shape, result.stride(), dtype
    return Prepared(kernel, (programs,), integers, constants, call, *form, splits, (), swapped, pointers, total)


def _dtypes(epilogue: Epilogue, dtype: torch.dtype, operands: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """Returns the dtype behind each of an epilogue's pointers, for a result of `dtype`; an operand stands for what it lacks."""
    per_channel = accumulator(dtype) if epilogue.wide else dtype
    residual, kept = (dtype if there else operands or dtype for there in (epilogue.residual, epilogue.kept))
    return per_channel, per_channel, residual, kept


def sum_of(
    splits: int,
    slices: list[tuple[int, int]] | None,
    call: Call,
    result: torch.Tensor,
    summed: torch.dtype,
    dependent: bool = False,
    epilogue: Epilogue = NONE,
    operands: torch.dtype | None = None,
) -> Prepared:
    """Returns the launch that sums the slices of a workspace, whose dtype is `summed`, into the result.

    Args:
        dependent: whether it may be launched before the kernel has ended that writes the workspace, which must be the one
            launched last on the stream (`Device.dependent`).
        operands: as in `prepared`.
    """
    numel, dtype = result.numel(), result.dtype
    if slices is None:
        assert reach(result) == numel - 1, "slices are summed as they lie, without gaps"
        slices = [(numel, 1)]
    flat = slices in ([], [(numel, 1)])  # an only element has no dimension
    assert flat or not epilogue, "a result with an epilogue has its slices' memory order"
    vec = vector(0, (dtype if flat else summed).itemsize, numel)
    constants = sum_constants(0 if flat else len(slices), vec, dependent, epilogue)
    inner = slices[::-1] + [(1, 0)] * (5 - len(slices))
    channels = result.shape[1] if epilogue else 1
    named = {"numel": numel, "splits": splits, "channels": channels, "inner": result.stride(1) if channels > 1 else 1}
    named |= {f"E{i}": extent for i, (extent, _) in enumerate(inner)} | {f"s{i}": stride for i, (_, stride) in enumerate(inner)}
    integers = tuple(named[n] for n in integers_of(sum_splits))
    grid, whole = (math.ceil(numel / constants["BLOCK"]),), (result.shape, result.stride(), dtype)
    pointers = (summed, dtype) + (_dtypes(epilogue, dtype, operands) if epilogue else ())
    return Prepared(sum_splits, grid, integers, constants, call, *whole, pointers=pointers)


def sum_constants(dims: int, vec: int, dependent: bool, epilogue: Epilogue = NONE) -> dict[str, Any]:
    """Returns the constants and launch options of `sum_splits`.

    Args:
        dims: dimensions of a slice; 0 if the result has its memory order.
        vec: the vector width, which divides the elements of a slice.
        dependent: as in `sum_of`.
        epilogue: what is done with the sums before they are written.
    """
    constants = {"DIMS": dims, "VEC": vec, "DEPENDENT": dependent, "INTERPRET": interpreted(), "BLOCK": 1024}
    return constants | epilogue.constants() | {"num_warps": 4, **fusing(epilogue)} | dependently(dependent)


def fusing(epilogue: Epilogue) -> dict[str, bool]:
    """Returns FUSED, unless each step of an epilogue is rounded: the compiler would fuse a product, rounded to 16 bits, and a
    sum of 16 bits into one instruction without that rounding.
    """
    return {"enable_fp_fusion": False} if epilogue.stepwise else FUSED


def dependently(dependent: bool) -> dict[str, Any]:
    """Returns the launch option of a dependent launch. Only a kernel that waits before all else may have it."""
    return {"launch_pdl": True} if dependent else {}  # an option of NVIDIA's devices only


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which products are summed, in registers and in a split-K workspace: fp32, but fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constants ACC (the accumulator's dtype) and INTERPRET (True in Triton's interpreter)."""
    return {"ACC": tl.float64 if accumulator(dtype) == torch.float64 else tl.float32, "INTERPRET": interpreted()}


def dot_precision(dtype: torch.dtype, plan: Plan, tensor_cores: bool) -> str:
    """Returns the constant PRECISION, which says how a kernel multiplies fp32 operands.

    Args:
        dtype: of the operands.
        plan: whose precision counts if it has one.
        tensor_cores: True if fp32 may be multiplied as TF32.
    """
    if plan.precision:
        return plan.precision
    return "tf32" if dtype == torch.float32 and tensor_cores and not interpreted() else "ieee"


def options(tile: Tile) -> dict[str, int]:
    """Returns a tile's launch options for Triton."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED}
    if tile.registers and not torch.version.hip:  # AMD's compiler does not have this option
        found["maxnreg"] = tile.registers
    return found
