"""torch.nn.functional's convolutions, with its signatures, results, gradients and errors.

A call is first asked whether tconv takes it: cheap questions about context and tensors, then one dictionary lookup; the
full examination of shapes and parameters happens once per kind of call. What is not taken goes to torch with the caller's
own arguments, so that an error is torch's to the letter; `tconv.last_calls()` says so.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tconv.problem import forward_problem, transposed_problem
from tconv.record import Call, note

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEMBERED = 4096  # kinds of calls kept; a program whose shapes never repeat starts over
_known: dict[Any, Any] = {}


class Declined(Exception):
    """tconv does not take a call; the text says why."""


@functools.cache
def _engine() -> Any:
    """The kernels' side of the house, imported when first needed: Triton is not needed to import tconv."""
    try:
        from tconv import autograd, launch
    except ImportError as e:
        raise Declined(f"Triton cannot be imported ({e})") from None
    return autograd, launch


def convolve(
    transposed: bool,
    rank: int,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> torch.Tensor | None:
    """Any of the six convolutions by our kernels, or None where torch is to take the call (recorded, with the reason)."""
    if torch.compiler.is_compiling():
        return None
    try:
        return _convolve(transposed, rank, input, weight, bias, stride, padding, output_padding, groups, dilation)
    except Declined as e:
        name = f"conv{'_transpose' if transposed else ''}{rank}d"
        note(Call(name, None, None, str(e)))
        return None


def _convolve(
    transposed: bool,
    rank: int,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> torch.Tensor:
    tensors: tuple[Any, ...] = (x, w) if b is None else (x, w, b)
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            raise Declined(f"a {type(t).__name__} where a tensor was expected")
    device = x.device
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise Declined(f"{device.type} tensors need TRITON_INTERPRET=1" if device.type == "cpu" else f"device {device}")
    autograd, launch = _engine()
    if device.type == "cpu" and not launch.INTERPRET:
        raise Declined("TRITON_INTERPRET was set after Triton's kernels were loaded")
    why = autograd.unusual(*tensors)
    if why:
        raise Declined(why)
    if torch.is_autocast_enabled(device.type):
        tensors = _autocast(tensors, torch.get_autocast_dtype(device.type))
        x, w, b = tensors if b is not None else (*tensors, None)
    key = (
        transposed, x.shape, x.stride(), x.dtype, device, w.shape, w.stride(), w.dtype, w.device,
        None if b is None else (b.shape, b.dtype, b.device),
        stride, padding, output_padding, groups, dilation, rank,
    )  # fmt: skip
    try:
        known = _known.get(key)
    except TypeError:  # a list among the parameters
        stride, padding, output_padding, dilation = map(_hashable, (stride, padding, output_padding, dilation))
        return _convolve(transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation)
    if known is None:
        if len(_known) >= REMEMBERED:
            _known.clear()
        try:
            known = _examine(transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation)
        except Declined as e:
            known = str(e)
        _known[key] = known
    if isinstance(known, str):
        raise Declined(known)
    batched = x.dim() == rank + 2
    operation = autograd.dgrad if transposed else autograd.fprop
    y: torch.Tensor = operation(x if batched else x.unsqueeze(0), w, b, known)
    return y if batched else y.squeeze(0)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    try:
        hash(value)
    except TypeError:
        raise Declined(f"a parameter of type {type(value).__name__}") from None
    return value


def _autocast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Floating tensors in autocast's dtype, but for fp64; differentiable, so gradients arrive in the parameters' dtype."""
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _numbers(value: Any, rank: int, name: str) -> tuple[int, ...]:
    """A parameter as one int per dimension: an int, or a sequence of one or `rank` of them."""
    values = tuple(value) if isinstance(value, (tuple, torch.Size)) else (value,) * rank
    if len(values) == 1:
        values = values * rank
    if len(values) != rank or any(isinstance(v, (bool, torch.Tensor)) for v in values):
        raise Declined(f"{name}={value!r}")
    try:
        return tuple(operator.index(v) for v in values)
    except TypeError:
        raise Declined(f"{name}={value!r}") from None


def _examine(
    transposed: bool,
    rank: int,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> Any:
    """Everything torch checks, and what our kernels need: the geometry of a call that both accept, else Declined."""
    from tconv.layout import LIMIT, result_is_channels_last

    autograd, _ = _engine()
    if x.dtype not in DTYPES:
        raise Declined(f"dtype {x.dtype}")
    for t in (w, b):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise Declined("tensors of several dtypes or devices")
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        raise Declined(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    s, d = _numbers(stride, rank, "stride"), _numbers(dilation, rank, "dilation")
    op = _numbers(output_padding, rank, "output_padding")
    if type(groups) is not int or groups < 1 or min(s) < 1 or min(d) < 1 or min(op) < 0:
        raise Declined("a stride, dilation, output_padding or number of groups out of range")
    if x.numel() == 0 or w.numel() == 0:
        raise Declined("a tensor without elements")
    if w.numel() > LIMIT or any(v < 0 for t in (x, w) for v in t.stride()):
        raise Declined("a weight of 2^31 elements or more")
    shape = tuple(x.shape) if x.dim() == rank + 2 else (1, *x.shape)
    c, k = (w.shape[1] * groups, w.shape[0]) if not transposed else (w.shape[0], w.shape[1] * groups)
    if shape[1] != c or w.shape[0] % groups or (b is not None and tuple(b.shape) != (k,)):
        raise Declined("channels, groups and weight that do not fit together")
    if isinstance(padding, str) and not transposed:
        if padding not in ("same", "valid") or (padding == "same" and max(s) > 1):
            raise Declined(f"padding={padding!r} with stride {s}")
        totals = [d[i] * (w.shape[2 + i] - 1) if padding == "same" else 0 for i in range(rank)]
        pads = [(t // 2, t - t // 2) for t in totals]
    else:
        pads = [(p, p) for p in _numbers(padding, rank, "padding")]
    if min(p for p, _ in pads) < 0:
        raise Declined("negative padding")
    if transposed:
        if any(o >= max(si, di) for o, si, di in zip(op, s, d, strict=True)):
            raise Declined("output_padding not smaller than stride or dilation")
        problem = transposed_problem(shape, w.shape, s, [p for p, _ in pads], op, d, groups)
        extents = problem.X
    else:
        problem = forward_problem(shape, w.shape, s, pads, d, groups)
        extents = problem.Y
    if min(extents) < 1 or max(map(abs, (*problem.X, *problem.Y, *problem.P))) * max(*problem.S, *problem.D) > LIMIT:
        raise Declined("an output without elements, or extents beyond 2^31")
    batched = x if x.dim() == rank + 2 else x.unsqueeze(0)
    return autograd.Geometry(problem, result_is_channels_last(batched, w))


def _public(rank: int, transposed: bool) -> Callable[..., torch.Tensor]:
    """The public function of a rank: parse as torch does; whatever does not parse is torch's to refuse."""
    torchs = (TRANSPOSED if transposed else FORWARD)[rank]

    def forward(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
    ) -> Any:
        return convolve(False, rank, input, weight, bias, stride, padding, 0, groups, dilation)

    def backward(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: Any = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        return convolve(True, rank, input, weight, bias, stride, padding, output_padding, groups, dilation)

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
    taps = ", ".join("TRS"[3 - rank :])
    out = ", ".join("ZPQ"[3 - rank :])
    if transposed:
        conv.__doc__ = f"""{rank}-D transposed convolution; `torch.nn.functional.{torchs.__name__}`, by tconv's kernels.

    Args:
        input: (N, C, {shape}) or, unbatched, (C, {shape}); fp16, bf16, fp32 or fp64; any strides.
        weight: (C, K/groups, {taps}), of the input's dtype.
        bias: (K,) or None.
        stride, padding, output_padding, dilation: a number, or one per spatial dimension, in elements.
        groups: number of groups.
    Returns:
        (N, K, {out}), in the memory format torch would give; each extent is
        (in - 1)*stride - 2*padding + dilation*(taps - 1) + output_padding + 1.
    Raises:
        Whatever torch raises, by calling torch.
    """
    else:
        conv.__doc__ = f"""{rank}-D convolution; `torch.nn.functional.{torchs.__name__}`, by tconv's kernels.

    Args:
        input: (N, C, {shape}) or, unbatched, (C, {shape}); fp16, bf16, fp32 or fp64; any strides.
        weight: (K, C/groups, {taps}), of the input's dtype.
        bias: (K,) or None.
        stride, dilation: a number, or one per spatial dimension, in elements.
        padding: the same, or "same" (stride 1 only) or "valid".
        groups: number of groups.
    Returns:
        (N, K, {out}), in the memory format torch would give; each extent is
        (in + 2*padding - dilation*(taps - 1) - 1) // stride + 1.
    Raises:
        Whatever torch raises, by calling torch.
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
