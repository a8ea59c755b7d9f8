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
from torch.fx import Proxy

from tconv.dispatch import causal, epilogues, norms, stream
from tconv.dispatch.check import CallArguments
from tconv.dispatch.entry import PUBLIC, convolve
from tconv.dispatch.norm_calls import Asked
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
        *, padding_mode: Any = "zeros", activation: Any = None, negative_slope: Any = 0.01, residual: Any = None,
        residual_position: Any = "before", scale: Any = None, shift: Any = None, stepwise: bool = False,
        recompute: bool = False,
    ) -> Any:  # fmt: skip
        if activation is None and residual is None and scale is None and shift is None:
            call = (False, rank, input, weight, bias, stride, padding, 0, groups, dilation)
            y = convolve(*call, mode=padding_mode)
            return by_torch(*call, padding_mode) if y is None else y
        asked = CallArguments(False, rank, stride, padding, 0, groups, dilation, padding_mode)
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
        y: torch.Tensor | None
        try:
            y = parse(*args, **kwargs)
        except TypeError:
            if _parses(parse, args, kwargs):
                raise
            y = None
        if y is None and not transposed:
            kwargs.pop("padding_mode", None)  # zeros, which torch's function has no name for
        return torchs(*args, **kwargs) if y is None else y

    conv.__name__ = conv.__qualname__ = torchs.__name__
    conv.__module__ = __name__
    conv.__wrapped__ = parse  # type: ignore[attr-defined]  # inspect.signature and editors show torch's signature
    shape = ", ".join("DHW"[3 - rank :])
    epilogue = f"""activation: None, or one of {ACTIVATIONS}.
        negative_slope: leaky_relu's factor for negative numbers.
        residual: a tensor like the result, added "before" or "after" the activation, as residual_position says. It is read.
        scale, shift: (K,), of the input's dtype or fp32.
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
        padding_mode: what the padding repeats, beyond torch: "zeros", "reflect", "replicate" or "circular", as
            torch.nn.Conv{rank}d has it. Nothing is copied for it.
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
    return norms.normalise(Asked("group_norm_silu", num_groups, eps, activation, pad), input, weight, bias)


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
    return norms.normalise(Asked("rms_norm_silu", None, eps, activation, pad), input, weight, bias)


norms.PUBLIC.update({"group_norm_silu": group_norm_silu, "rms_norm_silu": rms_norm_silu})


def _traced(function: Callable[..., Any], tensors: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the proxy of a call that torch.fx records, if one of its tensors is a proxy; else None."""
    for t in tensors:
        if isinstance(t, Proxy):
            return t.tracer.create_proxy("call_function", function, args, kwargs)
    return None


def _stream(rank: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Returns the public function of a rank for a stream's chunks."""

    def conv(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, state: torch.Tensor | None = None,
        stride: Any = 1, padding: Any = None, dilation: Any = 1, groups: int = 1,
        *, activation: Any = None, negative_slope: Any = 0.01, residual: Any = None, residual_position: Any = "before",
        scale: Any = None, shift: Any = None, stepwise: bool = False, recompute: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        steps = Steps(activation, negative_slope, residual, residual_position, scale, shift, stepwise, recompute)
        tensors = input, weight, bias, state
        proxy = _traced(conv, (*tensors, *steps.tensors.values()), (*tensors, stride, padding, dilation, groups), steps.given)
        if proxy is not None:
            return proxy  # type: ignore[no-any-return]  # which unpacks as a pair does
        return stream.convolve(rank, input, weight, bias, state, stride, padding, dilation, groups, steps)

    conv.__name__ = conv.__qualname__ = f"conv{rank}d_stream"
    shape, taps, out = (", ".join(letters[3 - rank :]) for letters in ("DHW", "TRS", "ZPQ"))
    frames = "" if rank == 1 else ", H, W"
    time = shape[0]
    conv.__doc__ = f"""{rank}-D convolution of a stream, chunk by chunk; {time} is time, and no output reads a later one.

    The state holds the inputs that the next output still needs, at most dilation*(taps - 1) times. The kernel reads (state,
    input) as if concatenated, without a copy, and writes the next state in the same launch. However a stream is cut into
    chunks, its outputs are those of one convolution that is padded by dilation*(taps - 1) zeros before the first time; inside
    `tconv.batch_invariant()` also to the bit. A chunk may have any number of times, and may give no output.

    Where a gradient is wanted, and where no kernel can run, the state and the chunk are concatenated.

    Args:
        input: (N, C, {shape}), the next times of the stream; fp16, bf16, fp32 or fp64; any strides.
        weight: (K, C/groups, {taps}), of the input's dtype.
        bias: (K,) or None.
        state: (N, C, times{frames}), of the input's dtype, as the call for the chunk before returned it; None at the beginning.
            times is dilation*(taps - 1), or up to stride - 1 less. It is read, and never changed.
        stride, dilation: a number, or one per spatial dimension, in elements.
        padding: by default ((dilation*(taps - 1), 0){", 0, 0" if rank == 3 else ""}), and nothing else in its first dimension.
        groups: number of groups.
        activation, negative_slope, residual, residual_position, scale, shift, stepwise, recompute: as in `conv{rank}d`.
    Returns:
        (y, state): (N, K, {out}), and a new tensor for the next chunk. By the kernel the state lies channels last, and so does
        y{"" if rank == 1 else " if its channels are a multiple of four"}.
    Raises:
        ValueError: an argument does not fit, by its name. Nothing has been launched then.
        Whatever torch raises for input, weight, bias and groups that do not fit together.
    """
    return conv


conv1d_stream, conv3d_stream = _stream(1), _stream(3)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Depthwise 1-D convolution that reads nothing later, with SiLU, as state-space models have it.

        y[n, c, j] = activation(bias[c] + sum over t of weight[c, t] * x[n, c, j - (taps - 1) + t])

    Before a sequence there is its initial state, or zeros. Sequences of a batch have one length, unless they lie one after the
    other along the time of x: `cu_seqlens` or `seq_idx` then tells where, and none reads its predecessor. Differentiable in x,
    weight, bias and initial_states. An output has the same bits however a sequence is cut into calls.

    Args:
        x: (N, C, L), fp16, bf16, fp32 or fp64; any strides. Contiguous channels, as of a transposed (N, L, C), and contiguous
            times are both read as they are.
        weight: (C, taps) or (C, 1, taps); weight and bias are of x's dtype or fp32. More than 8 taps are left to torch.
        bias: (C,) or None.
        seq_idx: (N, L), int32 or int64: a number per time, the same for the times of one sequence. Without states.
        initial_states: (N, C, taps - 1), of x's dtype: the inputs before each sequence; (sequences, C, taps - 1) with
            cu_seqlens. None for zeros. They are not changed.
        return_final_states: return the last taps - 1 of (initial state, inputs) of each sequence as well, new tensors that are
            the initial states of what follows.
        cu_seqlens: (sequences + 1,), int32 or int64, from 0 to L: where each sequence begins, and the end. N is 1 then.
        activation: None, "silu" or "swish", which are one.
    Returns:
        y, (N, C, L), or (y, final_states). By tconv's kernels they lie in memory as x does.
    Raises:
        ValueError: an argument does not fit. Nothing has been launched then.
    """
    tensors = x, weight, bias, seq_idx, initial_states, cu_seqlens
    more = {"cu_seqlens": cu_seqlens, "activation": activation}
    proxy = _traced(causal_conv1d, tensors, (*tensors[:5], return_final_states), more)
    if proxy is not None:
        return proxy
    y, states = causal.convolve(x, weight, bias, seq_idx, initial_states, return_final_states, cu_seqlens, activation)
    return (y, states) if return_final_states else y


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode step of `causal_conv1d`: the next outputs of sequences whose latest inputs are in a state.

    It CHANGES conv_state in place, as no other function of tconv changes an argument: x enters it, and its oldest inputs leave.
    There is no gradient.

    Args:
        x: (N, C), the next input of each sequence, or (N, C, L), the next L.
        conv_state: (N, C, length), of x's dtype, the latest inputs of each sequence, oldest first; length is taps - 1 or more.
        weight, bias, activation: as for `causal_conv1d`.
        cache_seqlens: (N,), int32 or int64: how many inputs each sequence has had. The state is then a ring, in which input i
            is at i % length.
        conv_state_indices: (N,), int32 or int64: which of the states, (slots, C, length), belongs to each sequence; no two the
            same. A negative one is a place without a sequence: its result is zero, and no state is changed for it.
    Returns:
        (N, C) or (N, C, L), like x.
    Raises:
        ValueError: an argument does not fit, or requires a gradient. Nothing has been launched then.
    """
    tensors = x, conv_state, weight, bias, cache_seqlens, conv_state_indices
    proxy = _traced(causal_conv1d_update, tensors, (*tensors[:4], activation, *tensors[4:]), {})
    if proxy is not None:
        return proxy  # type: ignore[no-any-return]  # of a tensor
    return causal.update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
