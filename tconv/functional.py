"""torch.nn.functional's convolutions, with its signatures, results, gradients and errors.

A call is first asked whether tconv takes it: cheap questions about context and tensors, then one dictionary lookup; the
full examination of shapes and parameters happens once per kind of call. A layer's call that repeats an earlier one has a
shorter way still (repeat.py). What is not taken goes to torch with the caller's
own arguments, so that an error is torch's to the letter; `tconv.last_calls()` says so.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling, is_dynamo_compiling

from tconv.device import Device
from tconv.guard import PLAIN, unusual
from tconv.problem import ConvProblem, Geometry, forward_problem, transposed_problem
from tconv.record import Call, Declined, note

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEMBERED = 4096  # kinds of calls kept; a program whose shapes never repeat starts over
INTERPRETED = ("1", "true", "yes", "on", "y")  # Triton's own reading of TRITON_INTERPRET
_known: dict[Any, Geometry | str] = {}
_seen: dict[Any, Any] = {}  # (id of weight, of bias, shape of input) -> repeat.Repeat, which checks all: ids may be used again
_dry: contextvars.ContextVar[Dry | None] = contextvars.ContextVar("tconv_dry", default=None)


@dataclass(frozen=True)
class Dry:
    """How calls are made that are not computed.

    Attributes:
        device: what to plan for, tensors being anywhere; None for the tensors' own device.
    """

    device: Device | None = None


@functools.cache
def _engine(device: str) -> Any:
    """The kernels' side of the house, imported late, for tensors on that type of device; else Declined."""
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED):
        raise Declined("CPU tensors need TRITON_INTERPRET=1" if device == "cpu" else f"device {device}")
    engine = _imported()
    if isinstance(engine, str):
        raise Declined(engine)
    repeat, interpreted = engine
    if device == "cpu" and not interpreted:
        raise Declined("TRITON_INTERPRET was set after Triton's kernels were loaded")
    return repeat


@functools.cache
def _imported() -> tuple[Any, bool] | str:
    """(repeat.py, whether kernels are interpreted), or why they cannot be imported: Triton is missing."""
    try:
        from tconv import repeat
        from tconv.arguments import INTERPRET
    except ImportError as e:
        return f"Triton cannot be imported ({e})"
    return repeat, INTERPRET


def convolve(
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
) -> torch.Tensor | None:
    """Any of the six convolutions by our kernels, or None where torch is to take the call (recorded, with the reason).

    Args:
        transposed, rank: which of the six.
        others: as torch takes them.
    """
    if is_dynamo_compiling():
        return None
    try:
        if type(x) in PLAIN and _dry.get() is None:
            seen = _seen.get((id(w), id(b), x.shape))
            if seen is not None:
                y: torch.Tensor | None = seen.again(
                    transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation
                )
                if y is not None:
                    return y
        if is_compiling():
            return None
        return _convolve(transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation)
    except Declined as e:
        note(Call(f"conv{'_transpose' if transposed else ''}{rank}d", None, None, str(e)))
        return None


@contextlib.contextmanager
def dry_run(device: Device | None = None) -> Iterator[None]:
    """Calls made in the block, by this thread, and their backward passes, are planned and recorded but not computed.

    Args:
        device: plan for this one, and take tensors on any device, such as "meta".
    """
    token = _dry.set(Dry(device))
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward runs in this thread too
            yield
    finally:
        _dry.reset(token)


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
    dry = _dry.get()
    device = "cuda" if dry and dry.device else x.device.type
    repeat = _engine(device)
    why = unusual(*tensors)
    if why:
        raise Declined(why)
    call = transposed, rank, stride, padding, output_padding, groups, dilation
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        tensors = _autocast(tensors, torch.get_autocast_dtype(device))
        x, w, b = tensors if b is not None else (*tensors, None)
    if type(groups) is not int:  # True and 1.0 equal 1, as keys too
        raise Declined(f"groups={groups!r}")
    stride, output_padding, dilation = _parameter(stride), _parameter(output_padding), _parameter(dilation)
    padding = padding if type(padding) is str else _parameter(padding)
    key = (
        transposed, x.shape, x.stride(), x.dtype, x.device, w.shape, w.stride(), w.dtype, w.device,
        None if b is None else (b.shape, b.stride(), b.dtype, b.device),
        stride, padding, output_padding, groups, dilation, rank,
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        try:
            known = _examine(transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation)
        except Declined as e:
            known = str(e)
        _remember(_known, key, known)
    if isinstance(known, str):
        raise Declined(known)
    batched = x.dim() == rank + 2
    if dry:
        known = dataclasses.replace(known, dry=True, device=dry.device)
    elif batched and not autocast and repeat.possible(call, *tensors):
        _remember(_seen, (id(w), id(b), x.shape), repeat.Repeat(call, known, x, w, b))
    y: torch.Tensor = repeat.autograd.convolve(transposed, x if batched else x.unsqueeze(0), w, b, known)
    return y if batched else y.squeeze(0)


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value


def _parameter(value: Any) -> int | tuple[int, ...]:
    """A stride, padding or dilation as a plain int or a tuple of them, or Declined: torch refuses floats, say."""
    if type(value) is int:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([v if type(v) is int else _index(v) for v in value])  # faster than of a generator
    return _index(value)


def _index(value: Any) -> int:
    if isinstance(value, (bool, torch.Tensor, torch.SymInt)):
        raise Declined(f"a parameter that is a {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:
        raise Declined(f"a parameter that is a {type(value).__name__}") from None


def _autocast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Floating tensors in autocast's dtype, but for fp64; differentiable, so gradients arrive in the parameters' dtype."""
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _per_dimension(value: int | tuple[int, ...], rank: int, name: str) -> tuple[int, ...]:
    """A parameter as one int per dimension: an int, or a sequence of one or `rank` of them."""
    values = value if isinstance(value, tuple) else (value,)
    if len(values) == 1:
        values = values * rank
    if len(values) != rank:
        raise Declined(f"{name}={value!r}")
    return values


def _examine(
    transposed: bool,
    rank: int,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Geometry:
    """Everything torch checks, and what our kernels need: the geometry of a call that both accept, else Declined."""
    from tconv.layout import LIMIT, addressing, result_is_channels_last

    if x.dtype not in DTYPES:
        raise Declined(f"dtype {x.dtype}")
    for t in (w, b):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise Declined("tensors of several dtypes or devices")
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        raise Declined(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    s, d = _per_dimension(stride, rank, "stride"), _per_dimension(dilation, rank, "dilation")
    op = _per_dimension(output_padding, rank, "output_padding")
    if groups < 1 or min(s) < 1 or min(d) < 1 or min(op) < 0 or max(groups, *s, *d, *op) > LIMIT:
        raise Declined("a stride, dilation, output_padding or number of groups out of range")
    if x.numel() == 0 or w.numel() == 0:
        raise Declined("a tensor without elements")
    x = x if x.dim() == rank + 2 else x.unsqueeze(0)
    c, k = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
    if x.shape[1] != c or w.shape[0] % groups or (b is not None and tuple(b.shape) != (k,)):
        raise Declined("channels, groups and weight that do not fit together")
    pads = _padding(padding, rank, transposed, w.shape[2:], s, d)
    if transposed:
        if any(o >= max(si, di) for o, si, di in zip(op, s, d, strict=True)):
            raise Declined("output_padding not smaller than stride or dilation")
        problem = transposed_problem(x.shape, w.shape, s, [p for p, _ in pads], op, d, groups)
    else:
        problem = forward_problem(x.shape, w.shape, s, pads, d, groups)
    if min(problem.X) < 1 or min(problem.Y) < 1:
        raise Declined("an output without elements")
    if addressing(w).reach > LIMIT or (b is not None and k * b.stride(0) > LIMIT) or _overflows(problem, LIMIT):
        raise Declined("a weight, or coordinates or programs, that 32 bits cannot count")
    return Geometry(problem, result_is_channels_last(x, w))


def _padding(
    padding: Any, rank: int, transposed: bool, taps: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(before, after) per dimension; torch puts the odd one of "same" behind."""
    if isinstance(padding, str):
        if transposed or padding not in ("same", "valid") or (padding == "same" and max(stride) > 1):
            raise Declined(f"padding={padding!r}")
        totals = [d * (t - 1) if padding == "same" else 0 for d, t in zip(dilation, taps, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    pads = _per_dimension(padding, rank, "padding")
    if min(pads) < 0:
        raise Declined("negative padding")
    return [(p, p) for p in pads]


def _overflows(p: ConvProblem, limit: int) -> bool:
    """Whether a coordinate, or the number of programs of a strided dgrad, may not fit 32 bits."""
    far = max(*p.X, *p.Y, *p.P, *p.T) * max(*p.S, *p.D)
    programs = p.phases("dgrad") * p.C * (p.N * max(p.X) // 16 + 1)
    return max(far, max(p.S) * max(p.D), programs) > limit


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
