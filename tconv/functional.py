"""torch.nn.functional's convolutions, with its signatures, results, gradients and errors.

A call is first asked whether tconv takes it: cheap questions about context and tensors, then one dictionary lookup; the
full examination of shapes and parameters happens once per kind of call. A layer's call that repeats an earlier one has a
shorter way still (repeat.py). What is not taken goes to torch with the caller's
own arguments, so that an error is torch's to the letter; `tconv.last_calls()` says so.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv import ops, profiled
from tconv.dry import DRY
from tconv.guard import PLAIN, STRANGE, foreign_modes, unusual
from tconv.kinds import Kinds
from tconv.layout import LIMIT, result_is_channels_last, weight_format
from tconv.opaque import opaque
from tconv.problem import Geometry
from tconv.record import Call, Declined, note
from tconv.window import Window

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
INTERPRETED = ops.interpreted()  # a plain flag, for torch.compile to read
_known: Kinds[Any, Geometry | str] = Kinds()
# (id of weight, of bias, shape of input) -> repeat.Repeat, which checks all: ids may be used again.
_seen: Kinds[Any, Any] = Kinds()


class Asked(NamedTuple):
    """What a caller said beside the tensors, as it was said; the first two name the function."""

    transposed: bool
    rank: int
    stride: Any
    padding: Any
    output_padding: Any
    groups: Any
    dilation: Any


def _engine(device: str) -> Any:
    """The kernels' side of the house, imported late, for tensors on that type of device; else Declined."""
    why = ops.unavailable(device)
    if why:
        raise Declined(why)
    from tconv import repeat

    return repeat


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
        return _operator(Asked(transposed, rank, stride, padding, output_padding, groups, dilation), x, w, b)
    try:
        if type(x) in PLAIN and DRY.get() is None:
            try:
                seen = _seen.get((id(w), id(b), x.shape))
            except TypeError:  # symbolic extents have no hash
                seen = None
            except RuntimeError:  # a nested tensor has no shape
                raise Declined(STRANGE) from None
            if seen is not None:
                y: torch.Tensor | None = seen.again(
                    transposed, rank, x, w, b, stride, padding, output_padding, groups, dilation
                )
                if y is not None:
                    return y
        return _convolve(Asked(transposed, rank, stride, padding, output_padding, groups, dilation), x, w, b)
    except Declined as e:
        note(Call(f"conv{'_transpose' if transposed else ''}{rank}d", None, None, str(e)))
        return None


@opaque
def _convolve(asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    tensors: tuple[Any, ...] = (x, w) if b is None else (x, w, b)
    for t in tensors:
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b)
        if not isinstance(t, torch.Tensor):
            raise Declined(f"a {type(t).__name__} where a tensor was expected")
        if type(t) not in PLAIN and not type(t).__module__.startswith("torch."):  # whose methods are the user's
            raise Declined(f"a tensor subclass, {type(t).__name__}")
    dry = DRY.get()
    device = "cuda" if dry and dry.device else x.device.type
    repeat = _engine(device)
    why = unusual(*tensors)
    if why and not (dry and dry.device):
        found = _operator(asked, x, w, b)
        if found is not None:
            return found
    if why:
        raise Declined(why)
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        tensors = ops.lower(device, *tensors)
        x, w, b = tensors if b is not None else (*tensors, None)
    transposed, rank, stride, padding, output_padding, groups, dilation = asked
    if type(groups) is not int:  # True and 1.0 equal 1, as keys too
        raise Declined(f"groups={groups!r}")
    stride, output_padding, dilation = _parameter(stride), _parameter(output_padding), _parameter(dilation)
    padding = padding if type(padding) is str else _parameter(padding)
    try:
        key = (
            transposed, x.shape, x.stride(), x.dtype, x.device, w.shape, w.stride(), w.dtype, w.device,
            None if b is None else (b.shape, b.stride(), b.dtype, b.device),
            stride, padding, output_padding, groups, dilation, rank,
        )  # fmt: skip
    except RuntimeError:  # one of them is nested
        raise Declined(STRANGE) from None
    known = _known.get(key)
    if known is None:
        try:
            known = _examine(asked, x, w, b)
        except Declined as e:
            known = str(e)
        _known[key] = known
    if isinstance(known, str):
        raise Declined(known)
    batched = x.dim() == rank + 2
    if dry:
        known = dataclasses.replace(known, dry=True, device=dry.device)
    elif batched and not autocast and repeat.possible(asked, *tensors):
        _seen[id(w), id(b), x.shape] = repeat.Repeat(asked, known, x, w, b)
    x = x if batched else x.unsqueeze(0)
    event = profiled.begin_call(transposed, known, x, w, b) if profiler._is_profiler_enabled and not dry else None
    try:
        y: torch.Tensor = repeat.autograd.convolve(transposed, x, w, b, known)
    finally:
        if event is not None:
            profiled.end(event)
    return y if batched else y.squeeze(0)


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


def _per_dimension(value: int | tuple[int, ...], rank: int, name: str) -> tuple[int, ...]:
    """A parameter as one int per dimension: an int, or a sequence of one or `rank` of them."""
    values = value if isinstance(value, tuple) else (value,)
    if len(values) == 1:
        values = values * rank
    if len(values) != rank:
        raise Declined(f"{name}={value!r}")
    return values


def _operator(asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor | None:
    """By the registered operator, which every context of torch understands; None where torch's own is to be called.

    Nothing is asked here that torch.compile could not trace or that would bind a graph to one size.
    """
    tensors = (x, w) if b is None else (x, w, b)
    for t in tensors:
        if not isinstance(t, torch.Tensor) or not _understood(t):
            return None
    device = x.device.type
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return None
    if torch._C._len_torch_function_stack() and not is_dynamo_compiling() and foreign_modes():
        return None
    if not is_dynamo_compiling() and _exporting_to_onnx():  # which knows aten's operators alone
        return None
    tracing = None if is_dynamo_compiling() else torch._C._get_tracing_state()
    if tracing:  # torch.jit.trace would take the extents that are asked for below for the graph's
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        autocast = torch.is_autocast_enabled(device)
        h = _check(asked, x, w, b, autocast)
    except Declined:
        return None
    finally:
        if tracing:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
    if not is_dynamo_compiling() and torch._C._len_torch_dispatch_stack():
        ops.count_flops()  # as the operator's autograd does, which inference_mode passes over
    run: Any = torch.ops.tconv.dgrad if asked.transposed else torch.ops.tconv.fprop
    batched = x.dim() == asked.rank + 2
    y: torch.Tensor = run(x if batched else x.unsqueeze(0), w, b, *h)
    return y if batched else y.squeeze(0)


def _exporting_to_onnx() -> bool:
    onnx = sys.modules.get("torch.onnx")  # loaded by whoever exports
    return onnx is not None and bool(onnx.is_in_onnx_export())


def _traced(tracer: Any, asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    """What stands in for the result where torch.fx traces: a call of the public function."""
    transposed, rank, stride, padding, output_padding, groups, dilation = asked
    how = (stride, padding, output_padding, groups, dilation) if transposed else (stride, padding, dilation, groups)
    call: torch.Tensor = tracer.create_proxy("call_function", PUBLIC[transposed][rank], (x, w, b, *how), {})
    return call


def _understood(t: torch.Tensor) -> bool:
    """Whether a tensor is dense, and of torch's own making: another subclass may know aten's operators alone."""
    return (
        (type(t) in PLAIN or type(t).__module__.startswith("torch._subclasses"))
        and t.layout is torch.strided
        and not t.is_nested
    )


def _check(asked: Asked, x: Any, w: Any, b: Any, autocast: bool = False) -> Window:
    """Everything torch checks: the window of a call that it accepts, else Declined."""
    transposed, rank, stride, padding, output_padding, groups, dilation = asked
    if type(groups) is not int:
        raise Declined("groups that are no int")
    if x.dtype not in ops.DTYPES:
        raise Declined(f"dtype {x.dtype}")
    for t in (w, b):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            wide = torch.float64 in (t.dtype, x.dtype)
            if not autocast or wide or t.device != x.device or t.dtype not in ops.DTYPES:
                raise Declined("tensors of several dtypes or devices")
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        raise Declined(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    s, d = _per_dimension(_parameter(stride), rank, "stride"), _per_dimension(_parameter(dilation), rank, "dilation")
    op = _per_dimension(_parameter(output_padding), rank, "output_padding")
    if groups < 1 or min(s) < 1 or min(d) < 1 or min(op) < 0 or max(groups, *s, *d, *op) > LIMIT:
        raise Declined("a stride, dilation, output_padding or number of groups out of range")
    if x.numel() == 0 or w.numel() == 0:
        raise Declined("a tensor without elements")
    c, k = (w.shape[0], w.shape[1] * groups) if transposed else (w.shape[1] * groups, w.shape[0])
    if x.shape[-1 - rank] != c or w.shape[0] % groups or (b is not None and (b.dim() != 1 or b.shape[0] != k)):
        raise Declined("channels, groups and weight that do not fit together")
    pads = _padding(padding, rank, transposed, w.shape[2:], s, d)
    before, after = [p for p, _ in pads], [p for _, p in pads]
    if transposed:
        for o, si, di in zip(op, s, d, strict=True):
            if o >= max(si, di):
                raise Declined("output_padding not smaller than stride or dilation")
        after = [p - o for p, o in zip(after, op, strict=True)]
    h = Window(s, before, after, d, groups)
    for e, t, si, p, q, di in zip(x.shape[-rank:], w.shape[2:], s, before, after, d, strict=True):
        if ((e - 1) * si + di * (t - 1) + 1 - p - q if transposed else e + p + q - di * (t - 1)) < 1:
            raise Declined("an output without elements")
    return h


def _examine(asked: Asked, x: Any, w: Any, b: Any) -> Geometry:
    """Everything torch checks, and what our kernels need: the geometry of a call that both accept, else Declined."""
    h = _check(asked, x, w, b)
    x = x if x.dim() == asked.rank + 2 else x.unsqueeze(0)
    problem = ops.problem_of("dgrad" if asked.transposed else "fprop", x, w, h)
    if ops.too_large(problem, w, b):
        raise Declined(ops.TOO_LARGE)
    channels_last = result_is_channels_last(x, w)
    return Geometry(problem, channels_last, dw_channels_last=weight_format(w, channels_last))


def _padding(
    padding: Any, rank: int, transposed: bool, taps: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(before, after) per dimension; torch puts the odd one of "same" behind."""
    if isinstance(padding, str):
        if transposed or padding not in ("same", "valid") or (padding == "same" and max(stride) > 1):
            raise Declined(f"padding={padding!r}")
        totals = [d * (t - 1) if padding == "same" else 0 for d, t in zip(dilation, taps, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    pads = _per_dimension(_parameter(padding), rank, "padding")
    if min(pads) < 0:
        raise Declined("negative padding")
    return [(p, p) for p in pads]


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
PUBLIC = {1: conv1d, 2: conv2d, 3: conv3d}, {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}
