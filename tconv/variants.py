"""Which compiled kernels a layer needs, worked out on tensors without storage: for compiling ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tconv.device import Device
from tconv.layout import shaped
from tconv.prepare import Prepared, prepare_bias, prepare_gather, prepare_wgrad
from tconv.problem import ConvProblem

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: everything Triton's compiler is told.

    Attributes:
        name: readable and unique: pass, kernel, rank, dtype, layout, tile, and what else tells it from its likes.
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton's type, "constexpr" for constants.
        constants: constant name -> value.
        options: launch options, num_warps and num_stages.
        memory_bound: a direct kernel, without tl.dot.
    """

    name: str
    kernel: Any = field(compare=False)
    signature: dict[str, str] = field(compare=False)
    constants: dict[str, Any] = field(compare=False)
    options: dict[str, int] = field(compare=False)
    memory_bound: bool = False


def variants(problem: ConvProblem, dtype: torch.dtype, channels_last: bool, device: Device) -> Iterator[Variant]:
    """The variants that the passes of a layer use on a device, without bias and with aligned tensors."""
    x, w, y = (shaped(problem.shape(which), channels_last, dtype) for which in "xwy")
    wide = "fp64" if dtype == torch.float64 else "fp32"
    yield _variant("fprop", prepare_gather("fprop", problem, x, w, None, y, device), dtype, {})
    yield _variant("dgrad", prepare_gather("dgrad", problem, y, w, None, x, device), dtype, {})
    prepared = prepare_wgrad(problem, y, x, w, device)
    yield _variant("wgrad", prepared, dtype, {"dw_ptr": wide} if prepared.splits > 1 else {})
    prepared = prepare_bias(problem, y, device)
    yield _variant("bias", prepared, dtype, {"out_ptr": wide} if prepared.splits > 1 else {})


@contextlib.contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Torch's flag for fp32 convolutions set to TF32 or to true fp32 while the block runs."""
    before = torch._C._get_fp32_precision_getter("cuda", "conv")
    torch._C._set_fp32_precision_setter("cuda", "conv", "tf32" if tf32 else "ieee")
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter("cuda", "conv", before)


def _variant(pass_: str, prepared: Prepared, dtype: torch.dtype, pointers: dict[str, str]) -> Variant:
    c = prepared.constants
    signature = {}
    for argument in prepared.kernel.arg_names:
        if argument in c:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointers.get(argument, NAMES[dtype])
        else:
            signature[argument] = "i32"
    plan = prepared.call.plan
    assert plan is not None
    direct = plan.kernel not in ("gather", "wgrad")
    inner = {True: "c", False: "p"}
    marks = [inner[c[k]] for k in ("X_UNIT", "Y_UNIT") if k in c] + [c.get("W_UNIT", "")]
    vectors = [str(c[k]) for k in ("X_VEC", "W_VEC", "Y_VEC") if k in c]
    flags = [k.lower() for k in ("EVEN", "MULTIPLIED", "WIDE") if c.get(k)]
    if c.get("FIELD") == 0:
        flags.append("unpacked")
    if c.get("PRECISION") == "tf32":
        flags.append("tf32")
    if pointers:
        flags.append("split")
    name = " ".join(
        [
            pass_,
            plan.kernel,
            f"{c['RANK']}d",
            NAMES[dtype],
            str(plan.tile),
            "inner=" + "".join(marks),
            "vec=" + "/".join(vectors),
        ]
        + flags
    )
    options = {k: c[k] for k in OPTIONS}
    constants = {k: v for k, v in c.items() if k not in OPTIONS}
    return Variant(name, prepared.kernel, signature, constants, options, direct)
