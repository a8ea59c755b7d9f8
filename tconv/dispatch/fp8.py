"""Convolutions of fp8 operands, and the rounding to fp8, as registered operators: for inference, so without gradients.

fprop_fp8 sums products in fp32, multiplies by a scale per output channel, adds a shift, and goes on like any epilogue. Where no
kernel can run, torch computes the same from the operands in fp32, and `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from tconv.dispatch.dynamo import opaque
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.operators import LIBRARY
from tconv.dispatch.steps import Steps, followed
from tconv.dispatch.support import TOO_LARGE, problem_of, too_large, unavailable
from tconv.dispatch.window import Window, result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import result_is_channels_last, shaped
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.problem import PREDICTED, Geometry

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of e4m3
RESULTS = (torch.bfloat16, torch.float16)
MaybeTensor = torch.Tensor | None
WINDOW = "int[] stride, SymInt[] before, SymInt[] after, int[] dilation, SymInt groups"
STEPS = "str activation, float slope, str residual_position"
SCHEMAS = {
    "fprop_fp8": f"(Tensor x, Tensor w, Tensor scale, Tensor? shift, Tensor? residual, ScalarType dtype, {WINDOW}, {STEPS})"
    " -> Tensor",
    "quantize_fp8": "(Tensor x, Tensor scale) -> Tensor",
}
_known: BoundedCache[Any, Geometry | str] = BoundedCache()


def _fake_fprop(
    x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: MaybeTensor, residual: MaybeTensor, dtype: torch.dtype,
    *rest: Any,
) -> torch.Tensor:  # fmt: skip
    like = shaped(result_shape("fprop", x, w, Window(*rest[:5])), result_is_channels_last(x, w), dtype)
    return x.new_empty_strided(like.shape, like.stride(), dtype=dtype)


def _fprop(
    x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: MaybeTensor, residual: MaybeTensor, dtype: torch.dtype,
    *rest: Any,
) -> torch.Tensor:  # fmt: skip
    """Runs fprop by tconv's kernels, or falls back to torch."""
    h, (activation, slope, position) = Window(*rest[:5]), rest[5:]
    steps = Steps(activation or None, slope, residual, position, scale, shift)
    invariant = is_batch_invariant()
    key = (
        x.shape, x.stride(), x.device, w.shape, w.stride(), residual is None, shift is None, dtype, invariant, rest[5:],
        *map(tuple, h[:4]), h.groups,
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        known = _known[key] = _examine(x, w, steps, dtype, h, invariant)
    try:
        if isinstance(known, str):
            raise Fallback(known)
        dry = DRY.get()
        from tconv.dispatch.fused import laid_out
        from tconv.launching import launch

        if dry:
            known = dataclasses.replace(known, dry=True, device=dry.device)
        device = known.device or launch.device_of(x)
        if not device.fp8:
            raise Fallback(f"{device.name} has no tensor cores for fp8")
        prepared = launch.convolution(False, known, x, w, None)
        after = [scale, shift, None if residual is None else laid_out(residual, prepared.strides), None]
        return launch.convolve(prepared, x, w, None, known.dry, after=tuple([x if t is None else t for t in after]))
    except Fallback as e:
        why = str(e)
    record_call(Call(f"conv{x.dim() - 2}d in fp8", None, None, why))
    y = IN_ATEN["fprop"](x.float(), w.float(), None, *h)
    y = followed(y, steps._replace(residual=None if residual is None else residual.float()), x.dim() - 2)
    like = _fake_fprop(x, w, scale, shift, residual, dtype, *rest)
    return like.copy_(y)


def _examine(x: torch.Tensor, w: torch.Tensor, steps: Steps, dtype: torch.dtype, h: Window, invariant: bool) -> Geometry | str:
    """Returns the geometry of a call, or why it falls back to torch."""
    if not x.numel() or not w.numel():
        return "a tensor without elements"
    problem = problem_of("fprop", x, w, h)
    if too_large(problem, w, None):
        return TOO_LARGE
    epilogue = dataclasses.replace(steps.epilogue, wide=True, result=str(dtype).removeprefix("torch."))
    return unavailable(x.device.type) or Geometry(
        problem, result_is_channels_last(x, w), policy=PREDICTED, epilogue=epilogue, batch_invariant=invariant
    )  # fmt: skip


def _fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=FP8)


def _quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds x / scale to fp8, by one kernel where one can run."""
    q = torch.empty_like(x, dtype=FP8)
    dry = DRY.get()
    if dry or not x.numel():
        return q
    why = unavailable(x.device.type)
    if why is None:
        from tconv.launching import launch

        try:
            if not launch.device_of(x).fp8:
                raise Fallback("the device converts no fp8")
            launch.quantize(x if x.stride() == q.stride() else torch.empty_like(x).copy_(x), scale, q)
            return q
        except Fallback as e:
            why = str(e)
    record_call(Call("rounding to fp8", None, None, why))
    return q.copy_((x.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST))


def _refuse_gradients(name: str, keys: Any, *args: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
        raise RuntimeError(f"{name}: fp8 convolutions are for inference and have no gradients; call them in torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.tconv, name).default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _register(name: str, run: Any, fake: Any) -> Any:
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    torch.library.register_fake(f"tconv::{name}", opaque(fake), lib=LIBRARY)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, opaque(run), key)
    LIBRARY.impl(name, functools.partial(opaque(_refuse_gradients), name), "Autograd", with_keyset=True)
    return getattr(torch.ops.tconv, name).default


fprop_fp8 = _register("fprop_fp8", _fprop, _fake_fprop)
quantize_fp8 = _register("quantize_fp8", _quantize, _fake_quantize)
