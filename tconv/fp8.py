"""Convolutions in fp8, for inference: operands in e4m3 (torch.float8_e4m3fn), sums in fp32, results in bf16 or fp16.

    y = conv(input, weight) * (input_scale * weight_scale) + bias;  y = activation(y + residual)

The scales are what a stored number must be multiplied by. `quantize` makes fp8 tensors with their scales, `Conv2d` etc. are
layers that hold such weights, and `convert_` puts them into a model. On devices before Hopper, and on AMD, torch computes the
same from fp32 copies; `tconv.last_calls()` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tconv.dispatch.check import CallArguments, accepted
from tconv.dispatch.fp8 import FP8, LARGEST, RESULTS, fprop_fp8, quantize_fp8
from tconv.dispatch.sides import by_torch
from tconv.dispatch.steps import Steps
from tconv.dispatch.window import result_shape
from tconv.launching.record import Fallback

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Converted", "conv1d", "conv2d", "conv3d", "convert_", "quantize"]

FEWEST = 16  # input channels per group: fewer fill no 16 bytes, and the first layer of a model has the most to lose
Scale = float | torch.Tensor


def quantize(t: torch.Tensor, scale: Scale | None = None, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a tensor to fp8, to nearest even. Numbers beyond 448 times the scale become that, NaN stays NaN.

    Args:
        t: fp16, bf16 or fp32, any strides.
        scale: a number, or a tensor with one; by default the largest |t| over 448, so that nothing is cut off.
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
    if dim is None:
        found = _largest(t) / LARGEST if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=t.device)
        found = found.reshape(())
        return quantize_fp8(t, found), found
    found = _largest(t.movedim(dim, 0).flatten(1), 1) / LARGEST
    shape = [-1 if d == dim % t.dim() else 1 for d in range(t.dim())]
    return (t.float() / found.view(shape)).clamp_(-LARGEST, LARGEST).to(FP8), found


def _largest(t: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Returns the largest |t| in fp32, over a dimension or all; 1 where that is zero, so that scales are not."""
    if not t.numel():
        return torch.ones(t.shape[:1] if dim else (), device=t.device)
    found = torch.linalg.vector_norm(t, float("inf"), dim, dtype=torch.float32)
    return torch.where(found > 0, found, torch.ones_like(found))


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
        for name, t in (("input", input), ("weight", weight)):
            if t.dtype != FP8:
                raise ValueError(f"{name} must be of {FP8}, got {t.dtype}")
        if out_dtype not in RESULTS:
            raise ValueError(f"out_dtype must be one of {RESULTS}, got {out_dtype}")
        scale = _scale(input_scale, weight_scale, input.device, weight.shape[0])
        shift = None if bias is None else bias.float().contiguous()
        steps = Steps(activation, negative_slope, residual, residual_position, scale, shift)
        steps.check_kinds()
        if shift is not None and shift.shape != scale.shape:
            raise ValueError(f"bias must have shape {tuple(scale.shape)}, got {tuple(shift.shape)}")
        asked = CallArguments(False, rank, stride, padding, 0, groups, dilation)
        try:
            h = accepted(asked, input, weight, None, dtypes=(FP8,))
        except Fallback:  # torch has a result without elements, or an error
            call = (input.float(), weight.float(), None, stride, padding)
            empty = by_torch(False, rank, *call, 0, groups, dilation)
            empty = getattr(F, f"conv{rank}d")(*call, dilation, groups) if empty is None else empty
            if empty.numel():
                raise ValueError(f"these arguments are not for fp8: {asked}") from None
            return empty.to(out_dtype)
        batched = input.dim() == rank + 2
        x = input if batched else input.unsqueeze(0)
        if residual is not None:
            shape = result_shape("fprop", x, weight, h)
            steps.check_tensors(shape if batched else shape[1:], shape[1], out_dtype, input.device)
            residual = residual if batched else residual.unsqueeze(0)
        y: torch.Tensor = fprop_fp8(
            x, weight, scale, shift, residual, out_dtype, *h[:5], activation or "", float(negative_slope), residual_position
        )  # fmt: skip
        return y if batched else y.squeeze(0)

    extents, taps, out = (", ".join(letters[3 - rank :]) for letters in ("DHW", "TRS", "ZPQ"))
    conv.__name__ = conv.__qualname__ = f"conv{rank}d"
    conv.__doc__ = f"""{rank}-D convolution of fp8 operands.

    Args:
        input: (N, C, {extents}) or, unbatched, (C, {extents}); torch.float8_e4m3fn; fastest in channels_last.
        weight: (K, C/groups, {taps}), torch.float8_e4m3fn.
        bias: (K,) or None, of any floating-point dtype; added in fp32.
        stride, padding, dilation, groups: as in `tconv.functional.conv{rank}d`.
        input_scale: a number, or a tensor with one.
        weight_scale: the same, or (K,): one per output channel.
        out_dtype: torch.bfloat16 or torch.float16.
        activation, negative_slope, residual, residual_position: as in `tconv.functional.conv{rank}d`; the residual is of
            out_dtype.
    Returns:
        (N, K, {out}) of out_dtype, rounded once.
    Raises:
        ValueError: a dtype, scale, bias or argument of the epilogue does not fit.
        RuntimeError: gradients are enabled and a tensor requires one.
        Whatever torch raises for the others.
    """
    return conv


def _scale(of_input: Scale, of_weight: Scale, device: torch.device, channels: int) -> torch.Tensor:
    """Returns the product of the scales as (K,) in fp32."""
    for name, s, shapes in (("input_scale", of_input, ((), (1,))), ("weight_scale", of_weight, ((), (1,), (channels,)))):
        if isinstance(s, torch.Tensor) and tuple(s.shape) not in shapes:
            raise ValueError(f"{name} must have one of the shapes {shapes}, got {tuple(s.shape)}")
    if isinstance(of_weight, torch.Tensor) and of_weight.shape == (channels,) and isinstance(of_input, float) and of_input == 1:
        return of_weight.float().contiguous()
    product = torch.as_tensor(of_input, dtype=torch.float32, device=device) * of_weight
    return product.expand(channels).float().contiguous()


conv1d, conv2d, conv3d = _public(1), _public(2), _public(3)


class _Layer(torch.nn.Module):
    """Base of the layers.

    Attributes:
        weight: (K, C/groups, *taps) in fp8, channels_last.
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
            weight, scale = quantize(layer.weight, dim=0)
            if weight.dim() > 3:
                weight = weight.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[weight.dim() - 4])
            bias = None if layer.bias is None else layer.bias.detach().float().clone()
            fixed = None
            if input_scale is not None:
                fixed = torch.as_tensor(input_scale, dtype=torch.float32, device=weight.device).reshape(()).clone()
                scale = scale * fixed
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", fixed)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Rounds the input, bf16 or fp16, to fp8 and returns the result in its dtype.

        In autocast an input in fp32 is first cast to autocast's dtype.

        Raises:
            ValueError: the input is of another dtype.
        """
        device = input.device.type
        if input.dtype == torch.float32 and device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if input.dtype not in RESULTS:
            raise ValueError(f"input must be of torch.bfloat16 or torch.float16, got {input.dtype}")
        x, own = quantize(input, self.input_scale)
        return type(self)._conv(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            input_scale=own if self.input_scale is None else 1.0, weight_scale=self.scale, out_dtype=input.dtype,
            residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        k, c, *taps = self.weight.shape
        how = "of each input" if self.input_scale is None else "fixed"
        return f"{c * self.groups}, {k}, kernel_size={tuple(taps)}, stride={self.stride}, scale {how}"


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


LAYERS: tuple[tuple[type, type[_Layer]], ...] = (
    (torch.nn.Conv1d, Conv1d), (torch.nn.Conv2d, Conv2d), (torch.nn.Conv3d, Conv3d),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What `convert_` did. It prints a line per layer.

    Attributes:
        scales: by the name of each layer that is in fp8 now, its input's scale; None if each input gets its own.
        kept: by the name of each convolution that is as it was, why.
    """

    scales: dict[str, float | None]
    kept: dict[str, str]

    def __str__(self) -> str:
        done = (
            f"{name}: fp8, " + (f"input scale {s:.3g}" if s else "a scale for each input") for name, s in self.scales.items()
        )
        return "\n".join([*done, *(f"{name}: as it was, {why}" for name, why in self.kept.items())])


def convert_(model: torch.nn.Module, *example: Any, skip: tuple[str, ...] = ()) -> Converted:
    """Replaces the convolution layers of a model by layers with weights in fp8. It cannot be undone: keep a copy.

    Left as they are: transposed layers, layers with fewer than 16 input channels per group, with another padding mode than
    zeros, with a parametrized weight, and the model itself if it is one layer.

    Args:
        model: in eval mode, usually in bf16 or fp16.
        example: inputs for the model. It runs once with them, and each layer's input scale becomes the largest element that it
            then got, over 448. Without an example, each input gets a scale of its own, at the price of a pass over it.
        skip: names of layers to leave as they are, as in `model.named_modules()`; often the first and the last.
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
    largest = _observed(model, example, found) if example else {}
    scales: dict[str, float | None] = {}
    made: dict[torch.nn.Module, torch.nn.Module] = {}
    for name, layer in found.items():
        if example and name not in largest:
            kept[name] = "the example did not reach it"
            continue
        scales[name] = largest[name] / LARGEST if example else None
        kind = next(ours for torchs, ours in LAYERS if isinstance(layer, torchs))
        parent, _, own = name.rpartition(".")
        if layer not in made:
            made[layer] = kind(layer, scales[name]).train(layer.training)
        setattr(modules[parent], own, made[layer])
    return Converted(scales, kept)


def _why_not(name: str, layer: torch.nn.modules.conv._ConvNd) -> str | None:
    """Returns why a layer stays as it is, or None."""
    if not isinstance(layer, tuple(torchs for torchs, _ in LAYERS)):
        return "a transposed layer"
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
    """Runs the model once and returns the largest |element| of each layer's inputs."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(_: Any, args: tuple[Any, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(_largest(args[0].detach())))

        return seen

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
