"""Convolutions in fp8, for inference: operands in e4m3 (torch.float8_e4m3fn), sums in fp32, results in bf16 or fp16.

    y = conv(input, weight) * (input_scale * weight_scale) + bias;  y = activation(y + residual)

The scales are what a stored number must be multiplied by. `quantize` makes fp8 tensors with their scales, `Conv2d` etc. are
layers that hold such weights, and `convert_` puts them into a model. On devices before Hopper, and on AMD, torch computes the
same from fp32 copies; `tconv.last_calls()` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling

from tconv.dispatch.check import CallArguments, accepted
from tconv.dispatch.context import PLAIN
from tconv.dispatch.fp8 import (
    FP8,
    LARGEST,
    RESULTS,
    convolution,
    dgrad_fp8,
    fprop_fp8,
    largest,
    quantize_fp8,
    quantize_largest_fp8,
    repeated,
    rounded,
)
from tconv.dispatch.sides import by_torch
from tconv.dispatch.steps import Steps
from tconv.dispatch.window import result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.record import Fallback
from tconv.planning.batch_invariance import is_batch_invariant

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Converted",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert_",
    "quantize",
]

FEWEST = 16  # input channels per group: fewer fill no 16 bytes, and the first layer of a model has the most to lose
Scale = float | torch.Tensor


def quantize(t: torch.Tensor, scale: Scale | None = None, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a tensor to fp8, to nearest even. Numbers beyond 448 times the scale, infinities too, become that; NaN stays NaN.

    Args:
        t: fp16, bf16 or fp32, any strides.
        scale: a number, or a tensor with one; by default the largest finite |t| over 448, so that nothing finite is cut off.
        dim: a dimension, each of whose slices gets a scale of its own, as 0 for the output channels of a weight.
    Returns:
        (fp8 tensor with t's memory format, fp32 scale of shape (), or (t.shape[dim],)).
    Raises:
        ValueError: t is of another dtype, scale has several elements, or both scale and dim are given.
    """
    if t.dtype not in (*RESULTS, torch.float32):
        raise ValueError(f"t must be of torch.bfloat16, torch.float16 or torch.float32, got {t.dtype}")
    if scale is not None and dim is not None:
        raise ValueError("scale and dim cannot both be given")
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise ValueError(f"scale must be a number, or a tensor with one, got shape {tuple(scale.shape)}")
    dry = not is_dynamo_compiling() and DRY.get() is not None
    if dim is None and scale is None:
        return rounded(t, None) if dry else quantize_largest_fp8(t)  # type: ignore[no-any-return]  # an operator has no types
    if dim is None:
        given = torch.as_tensor(scale, dtype=torch.float32, device=t.device)
        given = given if given.dim() == 0 else given.reshape(())
        return (rounded(t, given)[0] if dry else quantize_fp8(t, given)), given
    found = largest(t.movedim(dim, 0).flatten(1), 1) / LARGEST
    shape = [-1 if d == dim % t.dim() else 1 for d in range(t.dim())]
    return (t.float() / found.view(shape)).clamp_(-LARGEST, LARGEST).to(FP8), found


# As dispatch/entry.py's fast_paths: what tells most calls apart -> the output channels and a fused.FusedPath, or None after the
# first call.
_repeated: BoundedCache[Any, Any] = BoundedCache()


def _convolve(
    asked: CallArguments,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: Scale,
    weight_scale: Scale,
    out_dtype: torch.dtype,
    steps: Steps,
) -> torch.Tensor:
    """Computes one of the six convolutions. `steps` has no scale and no shift yet."""
    key, dry = None, not is_dynamo_compiling() and DRY.get() is not None
    if not is_dynamo_compiling() and not dry and type(input) in PLAIN and type(weight) in PLAIN:
        activation, slope, residual, position, *_ = steps
        try:
            key = (
                asked.transposed, asked.groups, id(weight), id(bias), is_batch_invariant(), input.shape, weight.shape,
                out_dtype, activation, slope, residual is None, position,
            )  # fmt: skip
            seen = _repeated.get(key)
        except (TypeError, RuntimeError):  # a bad argument without a hash, or a nested tensor, which has no shape
            key = seen = None
        if seen is not None and not profiler._is_profiler_enabled:
            channels, path = seen
            scale = _scale(input_scale, weight_scale, input.device, channels)
            shift = None if bias is None else bias.float().contiguous()
            whole = Steps(activation, slope, residual, position, scale, shift)
            try:
                y: torch.Tensor | None = path.again(asked, input, weight, None, whole)
                if y is not None:
                    return y
            except Fallback:  # the slow path falls back as well, and tells why
                pass
    return _examined(key, dry, asked, input, weight, bias, input_scale, weight_scale, out_dtype, steps)


def _examined(
    key: Any,
    dry: bool,
    asked: CallArguments,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: Scale,
    weight_scale: Scale,
    out_dtype: torch.dtype,
    steps: Steps,
) -> torch.Tensor:
    """Computes a call by its registered operator, or if `dry` without.

    Args:
        key: where `_repeated` has the call if it is repeated; None if it must not be there.
    """
    transposed, rank, stride, padding, output_padding, groups, dilation, _ = asked
    for name, t in (("input", input), ("weight", weight)):
        if t.dtype != FP8:
            raise ValueError(f"{name} must be of {FP8}, got {t.dtype}")
    if out_dtype not in RESULTS:
        raise ValueError(f"out_dtype must be one of {RESULTS}, got {out_dtype}")
    steps.check_kinds()
    try:
        h = accepted(asked, input, weight, None, dtypes=(FP8,))
    except Fallback:  # torch has a result without elements, or an error
        whole = input.float(), weight.float(), None, stride, padding
        empty = by_torch(transposed, rank, *whole, output_padding, groups, dilation)
        if empty is None and transposed:
            empty = getattr(F, f"conv_transpose{rank}d")(*whole, output_padding, groups, dilation)
        elif empty is None:
            empty = getattr(F, f"conv{rank}d")(*whole, dilation, groups)
        if empty.numel():
            raise ValueError(f"these arguments are not for fp8: {asked}") from None
        return empty.to(out_dtype)
    batched = input.dim() == rank + 2
    x = input if batched else input.unsqueeze(0)
    shape = result_shape("dgrad" if transposed else "fprop", x, weight, h)
    scale = _scale(input_scale, weight_scale, input.device, shape[1])
    shift = None if bias is None else bias.float().contiguous()
    if shift is not None and shift.shape != scale.shape:
        raise ValueError(f"bias must have shape {tuple(scale.shape)}, got {tuple(shift.shape)}")
    if steps.residual is not None:
        steps.check_tensors(shape if batched else shape[1:], shape[1], out_dtype, input.device)
        steps = steps if batched else steps._replace(residual=steps.residual.unsqueeze(0))
    steps = steps._replace(scale=scale, shift=shift)
    run = functools.partial(convolution, "dgrad" if transposed else "fprop")
    y: torch.Tensor = (run if dry else dgrad_fp8 if transposed else fprop_fp8)(
        x, weight, scale, shift, steps.residual, out_dtype, *h[:5], steps.activation or "", float(steps.negative_slope),
        steps.residual_position,
    )  # fmt: skip
    if key is not None and batched:
        # None the first time: where shapes never repeat, preparing every call for its repetition would be wasted.
        path = repeated(asked, x, weight, steps, out_dtype, h) if key in _repeated else None
        _repeated[key] = None if path is None else (shape[1], path)
    return y if batched else y.squeeze(0)


def _documented(conv: Callable[..., torch.Tensor], transposed: bool, rank: int) -> Callable[..., torch.Tensor]:
    """Gives a function of that rank its name and its docstring."""
    name = f"conv{'_transpose' if transposed else ''}{rank}d"
    extents, taps, out = (", ".join(letters[3 - rank :]) for letters in ("DHW", "TRS", "ZPQ"))
    weight = f"(C, K/groups, {taps})" if transposed else f"(K, C/groups, {taps})"
    fastest = "; fastest if `weight.transpose(0, 1)` is channels_last, and copied if not" if transposed else ""
    window = "stride, padding, output_padding, groups, dilation" if transposed else "stride, padding, dilation, groups"
    conv.__name__ = conv.__qualname__ = name
    conv.__doc__ = f"""{rank}-D {"transposed " if transposed else ""}convolution of fp8 operands.

    Args:
        input: (N, C, {extents}) or, unbatched, (C, {extents}); torch.float8_e4m3fn; fastest in channels_last.
        weight: {weight}, torch.float8_e4m3fn{fastest}.
        bias: (K,) or None, of any floating-point dtype; added in fp32.
        {window}: as in `tconv.functional.{name}`.
        input_scale: a number, or a tensor with one.
        weight_scale: the same, or (K,): one per output channel.
        out_dtype: torch.bfloat16 or torch.float16.
        activation, negative_slope, residual, residual_position: as in `tconv.functional.{name}`; the residual is of
            out_dtype.
    Returns:
        (N, K, {out}) of out_dtype, rounded once.
    Raises:
        ValueError: a dtype, scale, bias or argument of the epilogue does not fit.
        RuntimeError: gradients are enabled and a tensor requires one.
        Whatever torch raises for the others.
    """
    return conv


def _public(rank: int) -> Callable[..., torch.Tensor]:
    def conv(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        input_scale: Scale = 1.0,
        weight_scale: Scale = 1.0,
        out_dtype: torch.dtype = torch.bfloat16,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: torch.Tensor | None = None,
        residual_position: str = "before",
    ) -> torch.Tensor:
        asked = CallArguments(False, rank, stride, padding, 0, groups, dilation)
        steps = Steps(activation, negative_slope, residual, residual_position)
        return _convolve(asked, input, weight, bias, input_scale, weight_scale, out_dtype, steps)

    return _documented(conv, False, rank)


def _transposed(rank: int) -> Callable[..., torch.Tensor]:
    def conv(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        *,
        input_scale: Scale = 1.0,
        weight_scale: Scale = 1.0,
        out_dtype: torch.dtype = torch.bfloat16,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: torch.Tensor | None = None,
        residual_position: str = "before",
    ) -> torch.Tensor:
        asked = CallArguments(True, rank, stride, padding, output_padding, groups, dilation)
        steps = Steps(activation, negative_slope, residual, residual_position)
        return _convolve(asked, input, weight, bias, input_scale, weight_scale, out_dtype, steps)

    return _documented(conv, True, rank)


def _scale(of_input: Scale, of_weight: Scale, device: torch.device, channels: int) -> torch.Tensor:
    """Returns the product of the scales as (K,) in fp32."""
    if type(of_input) is float and of_input == 1 and isinstance(of_weight, torch.Tensor) and of_weight.shape == (channels,):
        return of_weight.float().contiguous()
    for name, s, shapes in (("input_scale", of_input, ((), (1,))), ("weight_scale", of_weight, ((), (1,), (channels,)))):
        if isinstance(s, torch.Tensor) and tuple(s.shape) not in shapes:
            raise ValueError(f"{name} must have one of the shapes {shapes}, got {tuple(s.shape)}")
    product = torch.as_tensor(of_input, dtype=torch.float32, device=device) * of_weight
    return product.expand(channels).float().contiguous()


conv1d, conv2d, conv3d = map(_public, (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = map(_transposed, (1, 2, 3))


class _Layer(torch.nn.Module):
    """Base of the layers.

    Attributes:
        weight: in fp8, (K, C/groups, *taps) in channels_last; of a transposed layer (C, K/groups, *taps), channels_last with
            its first two dimensions swapped.
        scale: (K,) in fp32: the weight's scales, times the input's if that is fixed.
        bias: (K,) in fp32, or None.
        input_scale: () in fp32, or None to take the largest element of each input, which costs a pass over it.
    """

    _conv: Callable[..., torch.Tensor]
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None

    def __init__(self, layer: torch.nn.modules.conv._ConvNd, input_scale: Scale | None = None) -> None:
        """Args: a layer of torch's or tconv's of this rank, padded with zeros, and its input's scale."""
        super().__init__()
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {layer.padding_mode!r}")
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups
        with torch.no_grad():
            weight, scale = self._quantized(layer.weight, layer.groups)
            bias = None if layer.bias is None else layer.bias.detach().float().clone()
            fixed = None
            if input_scale is not None:
                fixed = torch.as_tensor(input_scale, dtype=torch.float32, device=weight.device).reshape(()).clone()
                scale = scale * fixed
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", fixed)

    @staticmethod
    def _quantized(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's weight in fp8, in the memory format that is fastest, and its scales (K,)."""
        found, scale = quantize(weight, dim=0)
        return found.movedim(1, -1).contiguous().movedim(-1, 1), scale

    def _arguments(self, input: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns the input in fp8, and the scales and the dtype of the result.

        Raises:
            ValueError: the input is neither in bf16 nor in fp16.
        """
        device = input.device.type
        if input.dtype == torch.float32 and device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if input.dtype not in RESULTS:
            raise ValueError(f"input must be of torch.bfloat16 or torch.float16, got {input.dtype}")
        fixed = self.input_scale
        x, own = quantize(input, fixed)
        return x, {"input_scale": own if fixed is None else 1.0, "weight_scale": self.scale, "out_dtype": input.dtype}

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Rounds the input, bf16 or fp16, to fp8 and returns the result in its dtype.

        In autocast an input in fp32 is first cast to autocast's dtype.

        Raises:
            ValueError: the input is of another dtype.
        """
        x, how = self._arguments(input)
        window = self.stride, self.padding, self.dilation, self.groups
        return type(self)._conv(x, self.weight, self.bias, *window, residual=residual, **how)

    def extra_repr(self) -> str:
        k, c, *taps = self.weight.shape
        return self._described(c * self.groups, k, taps)

    def _described(self, c: int, k: int, taps: list[int]) -> str:
        how = "of each input" if self.input_scale is None else "fixed"
        return f"{c}, {k}, kernel_size={tuple(taps)}, stride={self.stride}, scale {how}"


class _TransposedLayer(_Layer):
    """Base of the transposed layers."""

    def __init__(self, layer: torch.nn.modules.conv._ConvTransposeNd, input_scale: Scale | None = None) -> None:
        super().__init__(layer, input_scale)
        self.output_padding = layer.output_padding

    @staticmethod
    def _quantized(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        def other_way(w: torch.Tensor) -> torch.Tensor:  # (C, K/groups, *taps) as (K, C/groups, *taps), or back
            return w.view(groups, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)

        found, scale = quantize(other_way(weight), dim=0)
        return other_way(found).movedim(0, -1).contiguous().movedim(-1, 0), scale

    def forward(  # type: ignore[override]  # the second argument is that of torch's layer
        self, input: torch.Tensor, output_size: Any = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rounds the input, bf16 or fp16, to fp8 and returns the result in its dtype.

        In autocast an input in fp32 is first cast to autocast's dtype.

        Args:
            output_size: the result's spatial extents, as in torch's layers, instead of output_padding.
        Raises:
            ValueError: the input is of another dtype, or no output_padding gives that output_size.
        """
        x, how = self._arguments(input)
        rank = self.weight.dim() - 2
        extra: Any = self.output_padding
        if output_size is not None:
            # It reads nothing of the layer but its output_padding, which torch's stub does not say.
            extra = torch.nn.modules.conv._ConvTransposeNd._output_padding(
                self, input, output_size, self.stride, self.padding, self.weight.shape[2:], rank, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
        window = self.stride, self.padding, extra, self.groups, self.dilation
        return type(self)._conv(x, self.weight, self.bias, *window, residual=residual, **how)

    def extra_repr(self) -> str:
        c, k, *taps = self.weight.shape
        return self._described(c, k * self.groups, taps)


class Conv1d(_Layer):
    """A layer like torch.nn.Conv1d, with a weight in fp8: (N, C, W) -> (N, K, Q)."""

    _conv = staticmethod(conv1d)


class Conv2d(_Layer):
    """A layer like torch.nn.Conv2d, with a weight in fp8: (N, C, H, W) -> (N, K, P, Q).

    Example:
        >>> layer = Conv2d(torch.nn.Conv2d(16, 8, 3, padding=1), input_scale=0.01)
        >>> layer(torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)).shape
        torch.Size([1, 8, 4, 4])
    """

    _conv = staticmethod(conv2d)


class Conv3d(_Layer):
    """A layer like torch.nn.Conv3d, with a weight in fp8: (N, C, D, H, W) -> (N, K, Z, P, Q)."""

    _conv = staticmethod(conv3d)


class ConvTranspose1d(_TransposedLayer):
    """A layer like torch.nn.ConvTranspose1d, with a weight in fp8: (N, C, W) -> (N, K, Q)."""

    _conv = staticmethod(conv_transpose1d)


class ConvTranspose2d(_TransposedLayer):
    """A layer like torch.nn.ConvTranspose2d, with a weight in fp8: (N, C, H, W) -> (N, K, P, Q)."""

    _conv = staticmethod(conv_transpose2d)


class ConvTranspose3d(_TransposedLayer):
    """A layer like torch.nn.ConvTranspose3d, with a weight in fp8: (N, C, D, H, W) -> (N, K, Z, P, Q)."""

    _conv = staticmethod(conv_transpose3d)


LAYERS: tuple[tuple[type, type[_Layer]], ...] = (
    (torch.nn.Conv1d, Conv1d), (torch.nn.Conv2d, Conv2d), (torch.nn.Conv3d, Conv3d),
    (torch.nn.ConvTranspose1d, ConvTranspose1d), (torch.nn.ConvTranspose2d, ConvTranspose2d),
    (torch.nn.ConvTranspose3d, ConvTranspose3d),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What `convert_` did. It prints a line per layer.

    Attributes:
        scales: by the name of each layer that is in fp8 now, its input's scale; None if each input gets its own.
        kept: by the name of each convolution that is as it was, why.
        replaced: with `keep`, by the name of each layer that is in fp8 now, the one that it replaced.
    """

    scales: dict[str, float | None]
    kept: dict[str, str]
    replaced: dict[str, torch.nn.Module] = field(default_factory=dict, repr=False)

    def undo_(self, model: torch.nn.Module) -> torch.nn.Module:
        """Puts back into the model the layers that were replaced: the same objects, as they were and where they were.

        Raises:
            RuntimeError: `convert_` was not told to keep them.
        """
        if len(self.replaced) < len(self.scales):
            raise RuntimeError("the layers that were replaced are gone: convert_(..., keep=True) keeps them")
        for name, layer in self.replaced.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
        return model

    def __str__(self) -> str:
        done = (
            f"{name}: fp8, " + (f"input scale {s:.3g}" if s else "a scale for each input") for name, s in self.scales.items()
        )
        return "\n".join([*done, *(f"{name}: as it was, {why}" for name, why in self.kept.items())])


def convert_(model: torch.nn.Module, *example: Any, skip: tuple[str, ...] = (), keep: bool = False) -> Converted:
    """Replaces the convolution layers of a model by layers with weights in fp8.

    Left as they are: layers with fewer than 16 input channels per group, with another padding mode than zeros, with a
    parametrized weight, and the model itself if it is one layer.

    Args:
        model: in eval mode, usually in bf16 or fp16.
        example: inputs for the model. It runs once with them, and each layer's input scale becomes the largest element that it
            then got, over 448. Without an example, each input gets a scale of its own, at the price of a pass over it.
        skip: names of layers to leave as they are, as in `model.named_modules()`; often the first and the last.
        keep: keep the layers that are replaced in the result, whose `undo_` puts them back. In bf16 their weights take
            twice the memory of those in fp8. `tconv.restore_` does not know them.
    Returns:
        What was done, and what not and why.
    Raises:
        ValueError: `skip` names no module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # a layer may be in several places
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"skip names no module of the model: {unknown}")
    kept: dict[str, str] = {}
    found: dict[str, torch.nn.modules.conv._ConvNd] = {}
    for name, layer in modules.items():
        if isinstance(layer, torch.nn.modules.conv._ConvNd):
            why = "skipped" if name in skip else _why_not(name, layer)
            if why:
                kept[name] = why
            else:
                found[name] = layer
    most = _observed(model, example, found) if example else {}
    scales: dict[str, float | None] = {}
    made: dict[torch.nn.Module, torch.nn.Module] = {}
    for name, layer in found.items():
        if example and name not in most:
            kept[name] = "the example did not reach it"
            continue
        scales[name] = most[name] / LARGEST if example else None
        kind = next(ours for torchs, ours in LAYERS if isinstance(layer, torchs))
        parent, _, own = name.rpartition(".")
        if layer not in made:
            made[layer] = kind(layer, scales[name]).train(layer.training)
        setattr(modules[parent], own, made[layer])
    return Converted(scales, kept, {name: found[name] for name in scales} if keep else {})


def _why_not(name: str, layer: torch.nn.modules.conv._ConvNd) -> str | None:
    """Returns why a layer stays as it is, or None."""
    if not name:
        return "the model itself"
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if layer.padding_mode != "zeros":
        return f"padding_mode {layer.padding_mode!r}"
    if layer.in_channels // layer.groups < FEWEST:
        return f"{layer.in_channels // layer.groups} input channels per group, fewer than {FEWEST}"
    return None


def _observed(model: torch.nn.Module, example: tuple[Any, ...], layers: dict[str, Any]) -> dict[str, float]:
    """Runs the model once and returns the largest finite |element| of each layer's inputs."""
    most: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(_: Any, args: tuple[Any, ...]) -> None:
            most[name] = max(most.get(name, 0.0), float(largest(args[0].detach())))

        return seen

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return most
