"""Convolutions of fp8 operands, and the rounding to fp8, as registered operators: for inference, so without gradients.

fprop_fp8, and dgrad_fp8 for transposed layers, sum products in fp32, multiply by a scale per output channel, add a shift, and
go on like any epilogue. Where no kernel can run, torch computes the same from the operands in fp32, and `tconv.last_calls()`
gives the reason.

Tensor cores multiply 8-bit operands only where those of both are contiguous along the channels that are summed over. For
dgrad_fp8 these are the first dimension of w: its memory format counts, and is best, with its first two dimensions swapped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from tconv.dispatch.check import CallArguments
from tconv.dispatch.context import why_ineligible
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.operators import register
from tconv.dispatch.steps import Steps, followed
from tconv.dispatch.support import TOO_LARGE, problem_of, too_large, unavailable
from tconv.dispatch.window import Window, result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import result_is_channels_last, shaped
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.plan import forced
from tconv.planning.problem import PREDICTED, Geometry

if TYPE_CHECKING:
    from tconv.launching.arguments import Prepared  # which imports Triton

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of e4m3
RESULTS = (torch.bfloat16, torch.float16)
MaybeTensor = torch.Tensor | None
WINDOW = "int[] stride, SymInt[] before, SymInt[] after, int[] dilation, SymInt groups"
STEPS = "str activation, float slope, str residual_position"
CONVOLUTION = (
    f"(Tensor x, Tensor w, Tensor scale, Tensor? shift, Tensor? residual, ScalarType dtype, {WINDOW}, {STEPS}) -> Tensor"
)
SCHEMAS = {
    "fprop_fp8": CONVOLUTION,
    "dgrad_fp8": CONVOLUTION,
    "quantize_fp8": "(Tensor x, Tensor scale) -> Tensor",
    "quantize_largest_fp8": "(Tensor x) -> (Tensor, Tensor)",
}
_known: BoundedCache[Any, Geometry | str] = BoundedCache()


def _is_channels_last(name: str, x: torch.Tensor, w: torch.Tensor) -> bool:
    return result_is_channels_last(x, w if name == "fprop" else w.transpose(0, 1))


def _fake_convolution(
    name: str, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: MaybeTensor, residual: MaybeTensor,
    dtype: torch.dtype, *rest: Any,
) -> torch.Tensor:  # fmt: skip
    like = shaped(result_shape(name, x, w, Window(*rest[:5])), _is_channels_last(name, x, w), dtype)
    return x.new_empty_strided(like.shape, like.stride(), dtype=dtype)


def convolution(
    name: str, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: MaybeTensor, residual: MaybeTensor,
    dtype: torch.dtype, *rest: Any,
) -> torch.Tensor:  # fmt: skip
    """Runs fprop or dgrad by tconv's kernels, or falls back to torch. In a dry run this is called as it is, for any device."""
    h, (activation, slope, position) = Window(*rest[:5]), rest[5:]
    steps = Steps(activation or None, slope, residual, position, scale, shift)
    try:
        how, by = prepared(name, x, w, steps, dtype, h)
        from tconv.dispatch.fused import laid_out
        from tconv.launching import launch

        lying = None if residual is None else laid_out(residual, how.strides)
        return launch.convolve(how, x, by, None, DRY.get() is not None, after=_after(x, scale, shift, lying))
    except Fallback as e:
        why = str(e)
    record_call(Call(f"conv{'' if name == 'fprop' else '_transpose'}{x.dim() - 2}d in fp8", None, None, why))
    y = IN_ATEN[name](x.float(), w.float(), None, *h)
    y = followed(y, steps._replace(residual=None if residual is None else residual.float()), x.dim() - 2)
    like = _fake_convolution(name, x, w, scale, shift, residual, dtype, *rest)
    return like.copy_(y)


def _after(x: torch.Tensor, scale: MaybeTensor, shift: MaybeTensor, residual: MaybeTensor) -> tuple[Any, ...]:
    """Returns the tensors for an epilogue's pointers, where others stand for what is not read (launching/arguments.py)."""
    return scale, scale if shift is None else shift, x if residual is None else residual, x


def prepared(
    name: str, x: torch.Tensor, w: torch.Tensor, steps: Steps, dtype: torch.dtype, h: Window
) -> tuple[Prepared, torch.Tensor]:
    """Returns the launch of a call, which is examined once per kind of call, and the weight as the kernel reads it.

    Raises:
        Fallback: no kernel can run.
    """
    invariant, dry = is_batch_invariant(), DRY.get()
    on = "cuda" if dry and dry.device else x.device.type
    key = (
        name, on, x.shape, x.stride(), x.device, w.shape, w.stride(), steps.shift is None, steps.residual is None, dtype,
        invariant, steps.activation, steps.negative_slope, steps.residual_position, *map(tuple, h[:4]), h.groups,
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        known = _known[key] = _examine(name, on, x, w, steps, dtype, h, invariant)
    if isinstance(known, str):
        raise Fallback(known)
    from tconv.launching import launch

    if dry:
        known = dataclasses.replace(known, dry=True, device=dry.device)
    device = known.device or launch.device_of(x)
    if not device.fp8:
        raise Fallback(f"{device.name} has no tensor cores for fp8")
    by = w if name == "fprop" else reduced_last(w)
    return launch.convolution(name == "dgrad", known, x, by, None), by


def repeated(call: CallArguments, x: torch.Tensor, w: torch.Tensor, steps: Steps, dtype: torch.dtype, h: Window) -> Any:
    """Returns a call, which was computed once, as a fused.FusedPath, which compares the next one with it; None if it has none.

    It has one where a kernel runs on the tensors as they are: aligned, and a residual or a transposed layer's weight as the
    kernel reads them.
    """
    tensors = [t for t in (x, w, steps.residual, steps.scale, steps.shift) if t is not None]
    if (
        any(t.requires_grad for t in tensors)
        or any(t.data_ptr() & 15 for t in tensors)
        or not all(type(v) in (int, str, tuple, bool) for v in call)
        or forced() is not None
        or why_ineligible(*tensors)
        or (call.transposed and reduced_last(w) is not w)
    ):
        return None
    try:
        how, _ = prepared("dgrad" if call.transposed else "fprop", x, w, steps, dtype, h)
    except Fallback:
        return None
    if steps.residual is not None and steps.residual.stride() != how.strides:
        return None
    from tconv.dispatch.fused import FusedPath
    from tconv.launching import launch

    def again(
        x: torch.Tensor, w: torch.Tensor, _: None, residual: MaybeTensor, scale: MaybeTensor, shift: MaybeTensor
    ) -> torch.Tensor:  # fmt: skip
        return launch.convolve(how, x, w, None, False, after=_after(x, scale, shift, residual))

    return FusedPath(call, again, tensors)


def reduced_last(w: torch.Tensor) -> torch.Tensor:
    """Returns a weight whose first dimension is contiguous: itself, or a copy."""
    return w if w.stride(0) == 1 or w.shape[0] == 1 else w.movedim(0, -1).contiguous().movedim(-1, 0)


def _examine(
    name: str, on: str, x: torch.Tensor, w: torch.Tensor, steps: Steps, dtype: torch.dtype, h: Window, invariant: bool
) -> Geometry | str:
    """Returns the geometry of a call, or why it falls back to torch."""
    if not x.numel() or not w.numel():
        return "a tensor without elements"
    problem = problem_of(name, x, w, h)
    if too_large(problem, w, None):
        return TOO_LARGE
    epilogue = dataclasses.replace(steps.epilogue, wide=True, result=str(dtype).removeprefix("torch."))
    return unavailable(on) or Geometry(
        problem, _is_channels_last(name, x, w), policy=PREDICTED, epilogue=epilogue, batch_invariant=invariant
    )  # fmt: skip


def _fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=FP8)


def _quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return rounded(x, scale)[0]


def _fake_quantize_largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty((), dtype=torch.float32)


def _quantize_largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rounded(x, None)


def rounded(x: torch.Tensor, scale: MaybeTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds x / scale to fp8, by kernels where they can run, and returns it and the scale; if that is None, x's own.

    In a dry run this is called as it is, for any device.
    """
    q, own = torch.empty_like(x, dtype=FP8), scale is None
    if scale is None:
        scale = x.new_empty((), dtype=torch.float32)
    dry = DRY.get()
    if not x.numel():
        return q, scale.fill_(1 / LARGEST) if own else scale
    if dry:
        if dry.device and dry.device.fp8 and unavailable("cuda") is None:
            from tconv.launching import launch

            launch.collect(launch.quantizing(x, own))
        return q, scale
    why = unavailable(x.device.type)
    if why is None:
        from tconv.launching import launch

        try:
            if not launch.device_of(x).fp8:
                raise Fallback("the device converts no fp8")
            launch.quantize(x if x.stride() == q.stride() else torch.empty_like(x).copy_(x), scale, q, own)
            return q, scale
        except Fallback as e:
            why = str(e)
    record_call(Call("rounding to fp8", None, None, why))
    if own:
        scale.copy_(largest(x) / LARGEST)
    return q.copy_((x.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST)), scale


def largest(t: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Returns the largest finite |t| in fp32, over a dimension or all; 1 where that is zero, so that scales are not.

    Scales, which are these over 448, are at least 2^-126, so that their inverses are finite.
    """
    if not t.numel():
        return torch.ones(t.shape[:1] if dim else (), device=t.device)
    found = torch.where(t.isfinite(), t, 0).abs().float()
    found = found.amax() if dim is None else found.amax(dim)
    return torch.where(found > 0, found.clamp(min=LARGEST * 2.0**-126), torch.ones_like(found))


def _refuse_gradients(name: str, keys: Any, *args: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
        raise RuntimeError(f"{name}: fp8 convolutions are for inference and have no gradients; call them in torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.tconv, name).default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _bound(function: Any, name: str) -> Any:
    return lambda *args: function(name, *args)


def _register(name: str, run: Any, fake: Any) -> Any:
    return register(name, SCHEMAS[name], run, fake, _bound(_refuse_gradients, name))


fprop_fp8, dgrad_fp8 = (
    _register(f"{name}_fp8", _bound(convolution, name), _bound(_fake_convolution, name)) for name in ("fprop", "dgrad")
)
quantize_fp8 = _register("quantize_fp8", _quantize, _fake_quantize)
quantize_largest_fp8 = _register("quantize_largest_fp8", _quantize_largest, _fake_quantize_largest)
