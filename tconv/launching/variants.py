"""Lists the compiled kernels that a layer needs, from tensors without storage, for compiling ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tconv.kernels.common import integers
from tconv.kernels.reduce import sum_splits
from tconv.launching.arguments import Prepared, accumulator, sum_constants, tensor_cores
from tconv.launching.descriptors import signature as descriptor_type
from tconv.launching.memory_bound import prepare_bias
from tconv.launching.memory_format import shaped
from tconv.launching.normalise import prepare_backward, prepare_forward
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.launching.record import Call
from tconv.planning.device import Device
from tconv.planning.epilogue import NONE, Epilogue
from tconv.planning.families import FAMILIES, families
from tconv.planning.normalise import Normalisation
from tconv.planning.plan import force
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, Tile, can_cut

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
FP8 = torch.float8_e4m3fn  # of fprop, and of dgrad as a transposed layer's forward pass: the result is then in bf16
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "ptx_options", "launch_pdl")
VECTORS = ("X_VEC", "W_VEC", "Y_VEC")
# The pointer that points to a workspace instead if the reduction is split.
RESULT = {"fprop": "y_ptr", "dgrad": "y_ptr", "wgrad": "dw_ptr", "bias": "out_ptr"}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: all input to Triton's compiler.

    Attributes:
        name: a readable, unique name: pass, kernel, rank, dtype, layout, tile, and whatever else distinguishes the kernel.
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton's type, "constexpr" for constants.
        constants: constant name -> value.
        options: launch options, such as num_warps.
        memory_bound: a direct kernel, without tl.dot.
        call: what it was prepared for; None for the sum of splits.
    """

    name: str
    kernel: Any = field(compare=False)
    signature: dict[str, str] = field(compare=False)
    constants: dict[str, Any] = field(compare=False)
    options: dict[str, Any] = field(compare=False)
    memory_bound: bool = False
    call: Call | None = field(compare=False, default=None)


def variants(problem: ConvProblem, dtype: torch.dtype, channels_last: bool, device: Device) -> Iterator[Variant]:
    """Yields every variant that the passes of a layer may use on a device, without bias and with aligned tensors.

    These are all legal tiles of every kernel, not only those that the cost model prefers, and the copies of operands to
    channels last. Reductions come both whole and split; those of fprop and dgrad are split only if the layer is small enough.

    The shape of a TMA box is not part of the name. Layers whose variants have the same name are represented by the first one;
    boxes of 128 pixels differ by only a few instructions in the loop.
    """
    # Where fp32 may be computed in BF16X6, both are listed, whichever the planner prefers.
    exact = "ieee" if dtype == torch.float32 and not tensor_cores(dtype) and can_cut(device) else None
    for pass_, prepare in launches(problem, dtype, channels_last, device).items():
        choices: list[tuple[str, bool | None, str | None]] = []
        for copied in (False, True):
            with force(staged=copied):
                plan = prepare().call.plan
            assert plan is not None
            choices += [(kernel, copied, exact) for kernel in plan.kernels]
            if exact:
                choices += [(kernel, copied, BF16X6) for kernel in plan.kernels if FAMILIES[kernel].cuts]
        choices += [(f.name, None, None) for f in families(pass_) if f.tma and takes_boxes(prepare, f.name)]
        choices += [("patch", copied, exact) for copied in (False, True) if pass_ == "dgrad"]
        for kernel, staged, precision in choices:
            with force(kernel, staged=staged, precision=precision):
                try:
                    plan = prepare().call.plan
                except ValueError:  # the kernel has no tile for this layer
                    continue
            assert plan is not None
            for tile in plan.tiles:
                for prepared in _whole_and_split(prepare, kernel, tile, staged, precision):
                    yield variant_of(pass_, prepared, dtype)
                    yield from (variant_of("copy", copy, dtype) for copy in prepared.copies if copy)
    for dims, itemsize in ((0, dtype.itemsize), (2, accumulator(dtype).itemsize), (3, accumulator(dtype).itemsize)):
        yield from (_sum_splits(dtype, dims, vec, device.dependent) for vec in (1, 2, 4, 8) if vec * itemsize <= 16)


def _whole_and_split(
    prepare: Callable[[], Prepared], kernel: str, tile: Tile, staged: bool | None, precision: str | None
) -> Iterator[Prepared]:
    """Yields the launches of a kernel with a tile: the one without splits, and if it can be split that with the fewest."""
    with force(kernel, tile, staged=staged, precision=precision):
        prepared = prepare()
    plan = prepared.call.plan
    assert plan is not None
    for splits in plan.parts[:2]:  # in ascending order
        if "SPLIT" in prepared.constants:  # not by force, since operands may have too few channels before they are copied
            constants = prepared.constants | {"SPLIT": splits > 1}
            yield dataclasses.replace(prepared, splits=splits, constants=constants)
        else:
            with force(kernel, tile, splits, staged, precision):
                yield prepare()


def launches(
    problem: ConvProblem, dtype: torch.dtype, channels_last: bool, device: Device, epilogue: Epilogue = NONE
) -> dict[str, Callable[[], Prepared]]:
    """Returns, for each pass, a function that prepares its launch on tensors without storage.

    Args:
        epilogue: of fprop, and in fp8 of dgrad.
    """
    x, w, y = (shaped(problem.shape(which), channels_last, dtype) for which in "xwy")
    if dtype == FP8:
        turned = w.movedim(0, -1).contiguous().movedim(-1, 0)  # as dispatch/fp8.py lays out a transposed layer's
        into = {"x": x.to(torch.bfloat16), "y": y.to(torch.bfloat16)}
        return {
            "fprop": lambda: prepare_gather("fprop", problem, x, w, None, into["y"], device, epilogue=epilogue),
            "dgrad": lambda: prepare_gather("dgrad", problem, y, turned, None, into["x"], device, epilogue=epilogue),
        }
    return {
        "fprop": lambda: prepare_gather("fprop", problem, x, w, None, y, device, epilogue=epilogue),
        "dgrad": lambda: prepare_gather("dgrad", problem, y, w, None, x, device),
        "wgrad": lambda: prepare_wgrad(problem, y, x, w, device),
        "bias": lambda: prepare_bias(problem, y, device),
    }


def takes_boxes(prepare: Callable[[], Prepared], kernel: str) -> bool:
    """Returns True if a launch is eligible for this TMA kernel when it is forced."""
    try:
        with force(kernel):
            return prepare().boxes != ()
    except ValueError:  # raised by a forced plan that cannot run
        return False


@contextlib.contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Sets torch's flag for fp32 convolutions to TF32 or to IEEE fp32 while the block runs."""
    before = torch._C._get_fp32_precision_getter("cuda", "conv")
    torch._C._set_fp32_precision_setter("cuda", "conv", "tf32" if tf32 else "ieee")
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter("cuda", "conv", before)


def variant_of(pass_: str, prepared: Prepared, dtype: torch.dtype) -> Variant:
    """Returns the variant of a launch."""
    c = prepared.constants
    # Of other dtypes the workspace has the result's dtype: what is not told that the reduction is split is the same kernel.
    split = prepared.splits > 1 and ("SPLIT" in c or dtype.itemsize == 2)
    summed = "*" + NAMES[accumulator(dtype)]
    names, behind = NAMES | {FP8: "fp8e4nv"}, dict(zip(prepared.kernel.arg_names, prepared.pointers, strict=False))
    if pass_ in RESULT:  # and not the workspace
        behind[RESULT[pass_]] = prepared.dtype
    signature = {}
    boxes = dict(zip(prepared.kernel.arg_names, prepared.boxes, strict=False))
    for argument in prepared.kernel.arg_names:
        if argument in c:
            signature[argument] = "constexpr"
        elif box := boxes.get(argument):
            behind_it = behind[argument]
            signature[argument] = descriptor_type(prepared.kernel, behind_it, names[behind_it], box)
        elif argument.endswith("_ptr"):
            signature[argument] = summed if split and argument == RESULT[pass_] else "*" + names[behind.get(argument, dtype)]
        else:
            signature[argument] = "i32"
    plan = prepared.call.plan
    assert plan is not None
    direct = "PRECISION" not in c  # without tl.dot
    inner = {True: "c", False: "p", "": "-"}
    marks = ["p"] if pass_ == "copy" else []
    marks += [inner.get(c[k], c[k]) for k in ("X_UNIT", "Y_UNIT") if k in c]
    marks.append({True: "c", False: "-"}.get(c.get("W_UNIT", ""), c.get("W_UNIT", "")))
    vectors = [str(c[k]) for k in VECTORS if k in c]
    pixels = [c.get(k, 1) for k in ("X_PIXELS", "Y_PIXELS")]
    flags = ["pixels=" + "/".join(map(str, pixels))] if max(pixels) > 1 else []
    flags += [k.lower() for k in ("EVEN", "MULTIPLIED", "PACKED", "WIDE", "Y_BOX", "STATE", "NEXT") if c.get(k)]
    flags += sorted({c.get(f"BORDER{d}", "zeros") for d in range(3)} - {"zeros", "state"})
    if "COLUMNS" in c:
        flags.append(f"row={c['T2']}s{c['S2']}d{c['D2']}p{c['P2']}")
    if c.get("JOINED", 1) > 1:
        flags.append(f"joined={c['JOINED']}")
    if c.get("FIELD") == 0:
        flags.append("unpacked")
    if c.get("PRECISION", "ieee") != "ieee":
        flags.append(c["PRECISION"])
    if split:
        flags.append("split")
    if c.get("STEPWISE") is not None and pass_ != "bias":
        residual = c["RESIDUAL"]
        steps = (
            ("scale", c["SCALE"]), ("shift", c["SHIFT"]), ("residual", residual == "before"), ("kept", c["KEPT"]),
            (c["ACTIVATION"], c["ACTIVATION"]), ("residual", residual == "after"), ("stepwise", c["STEPWISE"]),
        )  # fmt: skip
        with_ = "+".join(name for name, there in steps if there)
        flags += [f"with={with_}"] if with_ else []
    name = " ".join(
        [
            pass_,
            plan.kernel,
            f"{c.get('RANK', 3)}d",  # a kernel that is not told the rank takes every problem as one of three dimensions
            names[dtype],
            str(plan.tile),
            "inner=" + "".join(marks),
            "vec=" + "/".join(vectors),
        ]
        + flags
    )
    options = {k: c[k] for k in OPTIONS if k in c}
    constants = {k: v for k, v in c.items() if k not in OPTIONS}
    return Variant(name, prepared.kernel, signature, constants, options, direct, prepared.call)


def normalisation_variants(n: Normalisation, dtype: torch.dtype, device: Device) -> Iterator[Variant]:
    """Yields the variants that the passes of a normalisation use on a device, with aligned tensors of one dtype."""
    for prepared in (*prepare_forward(n, dtype, dtype, device), *prepare_backward(n, dtype, dtype, device, True)):
        c = prepared.constants
        flags = [key.lower() for key in ("SUMS", "DX", "PADDED") if c.get(key)]
        layout = [f"inner={'c' if c['UNIT'] else 'p'}"] if "UNIT" in c else []
        yield direct_variant(prepared, prepared.call.operation, dtype, *layout, *flags)


def direct_variant(prepared: Prepared, what: str, dtype: torch.dtype, *flags: str) -> Variant:
    """Returns the variant of a launch that takes neither boxes nor splits, of a kernel without tl.dot that is not planned.

    Args:
        what: the operation.
        dtype: of its operands.
        flags: what else distinguishes the kernel.
    """
    c, kernel, names = prepared.constants, prepared.kernel, NAMES | {FP8: "fp8e4nv"}
    behind = dict(zip((name for name in kernel.arg_names if name.endswith("_ptr")), prepared.pointers, strict=True))
    signature = {
        name: "constexpr" if name in c else f"*{names[behind[name]]}" if name in behind else "i32" for name in kernel.arg_names
    }
    blocks = "x".join(str(c[k]) for k in ("BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK") if k in c)
    options = {k: c[k] for k in OPTIONS if k in c}
    constants = {k: v for k, v in c.items() if k not in OPTIONS}
    name = " ".join([what, kernel.__name__, names[dtype], blocks, f"w{c['num_warps']}", *flags])
    return Variant(name, kernel, signature, constants, options, True, prepared.call)


def _sum_splits(dtype: torch.dtype, dims: int, vec: int, dependent: bool) -> Variant:
    """Returns the variant that sums a split reduction's workspace, whose slices have so many dimensions (`sum_constants`)."""
    pointers = {"ws_ptr": f"*{NAMES[accumulator(dtype)]}", "out_ptr": f"*{NAMES[dtype]}"}
    given = sum_constants(dims, vec, dependent) | {"INTERPRET": False}
    constants = {k: v for k, v in given.items() if k not in OPTIONS}
    types = pointers | dict.fromkeys(integers(sum_splits), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in sum_splits.arg_names}
    options = {k: v for k, v in given.items() if k in OPTIONS} | {"num_stages": 3}
    tile = f"{constants['BLOCK']} w{options['num_warps']} s{options['num_stages']}"
    name = f"sum sum_splits {dims}d {NAMES[dtype]} {tile} vec={vec}"
    return Variant(name, sum_splits, signature, constants, options, True)
