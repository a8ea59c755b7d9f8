"""torch.nn.functional's convolutions, with its signatures, results, gradients and errors, and an epilogue; normalisations.

An epilogue is what often follows a convolution. The convolution's own kernel computes it, before it writes the result:

    y = conv(input, weight, bias);  y = y * scale + shift;  y = y + residual ("before");  y = activation(y);
    y = y + residual ("after")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tconv.dispatch import epilogues, norms
from tconv.dispatch.check import CallArguments
from tconv.dispatch.entry import PUBLIC, convolve
from tconv.dispatch.sides import by_torch
from tconv.dispatch.steps import Steps
from tconv.planning.epilogue import ACTIVATIONS

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _public(rank: int, transposed: bool) -> Callable[..., torch.Tensor]:
    """Returns the public function of a rank. It has torch's signature, followed by an epilogue's keyword arguments.

    Torch raises for arguments of its own that do not fit.
    """
    torchs = (TRANSPOSED if transposed else FORWARD)[rank]

    def forward(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1,
        *, activation: Any = None, negative_slope: Any = 0.01, residual: Any = None, residual_position: Any = "before",
        scale: Any = None, shift: Any = None, stepwise: bool = False, recompute: bool = False,
    ) -> Any:  # fmt: skip
        if activation is None and residual is None and scale is None and shift is None:
            call = (False, rank, input, weight, bias, stride, padding, 0, groups, dilation)
            y = convolve(*call)
            return by_torch(*call) if y is None else y
        asked = CallArguments(False, rank, stride, padding, 0, groups, dilation)
        steps = Steps(activation, negative_slope, residual, residual_position, scale, shift, stepwise, recompute)
        return epilogues.convolve(asked, input, weight, bias, steps)

    def backward(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: Any = 1, dilation: Any = 1,
        *, activation: Any = None, negative_slope: Any = 0.01, residual: Any = None, residual_position: Any = "before",
        scale: Any = None, shift: Any = None, stepwise: bool = False, recompute: bool = False,
    ) -> Any:  # fmt: skip
        if activation is None and residual is None and scale is None and shift is None:
            call = (True, rank, input, weight, bias, stride, padding, output_padding, groups, dilation)
            y = convolve(*call)
            return by_torch(*call) if y is None else y
        asked = CallArguments(True, rank, stride, padding, output_padding, groups, dilation)
        steps = Steps(activation, negative_slope, residual, residual_position, scale, shift, stepwise, recompute)
        return epilogues.convolve(asked, input, weight, bias, steps)

    parse = backward if transposed else forward

    def conv(*args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            y = parse(*args, **kwargs)
        except TypeError:
            if _parses(parse, args, kwargs):
                raise
            y = None
        return torchs(*args, **kwargs) if y is None else y

    conv.__name__ = conv.__qualname__ = torchs.__name__
    conv.__module__ = __name__
    conv.__wrapped__ = parse  # type: ignore[attr-defined]  # inspect.signature and editors show torch's signature
    shape = ", ".join("DHW"[3 - rank :])
    epilogue = f"""activation: None, or one of {ACTIVATIONS}.
        negative_slope: leaky_relu's factor for negative numbers.
        residual: a tensor like the result, added "before" or "after" the activation, as residual_position says. It is read.
        scale, shift: (K,), of the input's dtype or fp32. A call in which one of them requires a gradient is computed as a
            sequence of PyTorch's functions.
        stepwise: round to the result's dtype after each step, as a sequence of PyTorch's functions does. By default the steps
            are computed in the accumulator's dtype, and the result is rounded once.
        recompute: compute the activation's argument again in the backward pass, where the result is not enough for the
            gradient (silu, gelu, hardswish), instead of keeping it."""
    taps = ", ".join("TRS"[3 - rank :])
    out = ", ".join("ZPQ"[3 - rank :])
    if transposed:
        conv.__doc__ = f"""{rank}-D transposed convolution; `torch.nn.functional.{torchs.__name__}`, by tconv's kernels.

    Args:
        input: (N, C, {shape}) or, unbatched, (C, {shape}); fp16, bf16, fp32 or fp64; any strides.
        weight: (C, K/groups, {taps}), of the input's dtype.
        bias: (K,) or None.
        stride, padding, output_padding, dilation: a number, or one per spatial dimension, in elements; beyond torch, padding
            may have a pair (before, after) in place of a number.
        groups: number of groups.
        {epilogue}
    Returns:
        (N, K, {out}), in the memory format torch would give; each extent is
        (in - 1)*stride - 2*padding + dilation*(taps - 1) + output_padding + 1.
    Raises:
        ValueError: an argument of the epilogue does not fit.
        Whatever torch raises for the others, by calling torch.
    """
    else:
        conv.__doc__ = f"""{rank}-D convolution; `torch.nn.functional.{torchs.__name__}`, by tconv's kernels.

    Args:
        input: (N, C, {shape}) or, unbatched, (C, {shape}); fp16, bf16, fp32 or fp64; any strides.
        weight: (K, C/groups, {taps}), of the input's dtype.
        bias: (K,) or None.
        stride, dilation: a number, or one per spatial dimension, in elements.
        padding: the same, or "same" (stride 1 only) or "valid"; or, beyond torch, a pair (before, after) in place of a number,
            such as ((2, 0), 1, 1) for frames that read no later ones. Nothing is copied for it.
        groups: number of groups.
        {epilogue}
    Returns:
        (N, K, {out}), in the memory format torch would give; each extent is
        (in + 2*padding - dilation*(taps - 1) - 1) // stride + 1.
    Raises:
        ValueError: an argument of the epilogue does not fit.
        Whatever torch raises for the others, by calling torch.
    """
    return conv


def _parses(parse: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    import inspect

    try:
        inspect.signature(parse).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


conv1d, conv2d, conv3d = _public(1, False), _public(2, False), _public(3, False)
conv_transpose1d, conv_transpose2d, conv_transpose3d = _public(1, True), _public(2, True), _public(3, True)
PUBLIC[False].update({1: conv1d, 2: conv2d, 3: conv3d})
PUBLIC[True].update({1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d})


def group_norm_silu(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    pad: Any = None,
) -> torch.Tensor:
    """Group normalisation, then silu, as torch's two functions compute them, by tconv's kernels; x keeps its memory format.

    Args:
        input: (N, C, *spatial), of up to three spatial dimensions; fp16, bf16, fp32 or fp64; any strides. What is neither
            contiguous nor channels_last is copied first.
        num_groups: number of groups that the channels are divided into.
        weight, bias: (C,), of the input's dtype or fp32, or None.
        eps: added to the variance.
        activation: "silu", or None.
        pad: zeros around the result, which a convolution without padding may read next: a number, or one per spatial dimension,
            or a pair (before, after) in place of a number. None for no padding.
    Returns:
        (N, C, *spatial), each extent larger by its padding; of the input's dtype and memory format, in autocast too.
        Statistics, normalisation and activation are computed in fp32 (fp64 for fp64), and the result is rounded once. An
        image's bits do not depend on the batch.
    Raises:
        ValueError: activation or pad does not fit.
        Whatever torch.nn.functional.group_norm raises for the others.
    """
    return norms.normalise(norms.Asked("group_norm_silu", num_groups, eps, activation, pad), input, weight, bias)


def rms_norm_silu(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = "silu",
    pad: Any = None,
) -> torch.Tensor:
    """RMS normalisation over the channels of each pixel, then silu: x / sqrt(mean(x^2) + eps) * weight + bias.

    This is what the decoders of Wan and HunyuanVideo do, with eps=1e-24 / C and their gamma for the weight: they divide by
    the norm of a pixel's channels, at least 1e-12, and multiply by the root of C.

    Args:
        input: (N, C, *spatial), of up to three spatial dimensions; fp16, bf16, fp32 or fp64; any strides. What is neither
            contiguous nor channels_last is copied first.
        weight, bias: (C,) or (C, 1, ..., 1), of the input's dtype or fp32, or None.
        eps: added to the mean of squares.
        activation, pad: as for `group_norm_silu`.
    Returns:
        As `group_norm_silu`. torch computes what has more than 2,048 channels.
    Raises:
        ValueError: activation or pad does not fit.
        Whatever torch.nn.functional.rms_norm raises for the others.
    """
    return norms.normalise(norms.Asked("rms_norm_silu", None, eps, activation, pad), input, weight, bias)


norms.PUBLIC.update({"group_norm_silu": group_norm_silu, "rms_norm_silu": rms_norm_silu})
