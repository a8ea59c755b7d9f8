"""aten's `_convolution` and `convolution_backward` by tconv's kernels, as they are put in place of torch's (override.py).

They run below autograd, autocast, functorch, modes, tracing and sharding, on strided tensors that have memory: neither a
context nor a gradient is to be minded here. Tensors may be of a user's class, none of whose methods torch's own kernels call:
they are taken as plain ones. Results are plain tensors as torch's are; the layers above make the user's class of them.
What a kind of call launches is looked up once, by all that may matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._C import DisableTorchFunction, _get_cudnn_enabled
from torch._C import _get_fp32_precision_getter as fp32_precision

from tconv.dispatch import check
from tconv.dispatch.context import PLAIN, plain
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.operators import DTYPES
from tconv.dispatch.selection import Choice, Chooser
from tconv.launching import launch
from tconv.launching.arguments import Prepared
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY, Dry
from tconv.launching.memory_format import FORMATS, weight_format
from tconv.launching.record import Call, Fallback, TransientFallback, record_call
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

Parameters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]
Mask = tuple[bool, ...]
Found = TypeVar("Found")
OPTIONAL = PLAIN | {type(None)}  # classes of what may be left out


@dataclass(frozen=True)
class Parts:
    """A backward pass of which only some gradients are selected, as the masks of two calls: ours and the others'."""

    ours: Mask
    others: Mask


@opaque
def convolution(
    chooser: Chooser,
    torchs: Callable[..., torch.Tensor],
    keys: Any,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    benchmark: bool,
    deterministic: bool,
    cudnn_enabled: bool,
    allow_tf32: bool,
) -> torch.Tensor:
    """aten::_convolution, of what holds, the kernel that was there, the keys that it was called with, and its arguments.

    Nothing is tuned and the same bits come every time: `benchmark` and `deterministic` ask for nothing else. No cuDNN is
    used: `cudnn_enabled` decides on the result's memory format only.
    """
    chosen = chooser.chosen or chooser.look()
    if chosen is None:  # made outside the models that are enabled
        return torchs(
            keys, x, w, b, stride, padding, dilation, transposed, output_padding, groups,
            benchmark, deterministic, cudnn_enabled, allow_tf32,
        )  # fmt: skip
    try:
        with DisableTorchFunction():  # subclasses and function modes have had their say above
            if type(x) not in PLAIN or type(w) not in PLAIN or type(b) not in OPTIONAL:
                x, w, b = plain(x), plain(w), None if b is None else plain(b)
            dtype = x.dtype
            if dtype is torch.float32 and allow_tf32 is not (fp32_precision("cuda", "conv") == "tf32"):
                raise Fallback(f"allow_tf32={allow_tf32}, the process's setting being another")  # from a traced graph
            parameters = tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
            key = dtype if dtype not in DTYPES else (
                transposed, x.shape, x.stride(), dtype, x.device, x.data_ptr() & 15,
                w.shape, w.stride(), w.dtype, w.device, w.data_ptr() & 15,
                None if b is None else (b.shape, b.stride(), b.dtype, b.device), parameters, cudnn_enabled, allow_tf32,
            )  # fmt: skip
            found, dry = _lookup(
                chosen.forward, key, lambda dry: _prepare_forward(chosen, transposed, x, w, b, parameters, dry)
            )
            if not isinstance(found, Call):
                return launch.convolve(found, x, w, b, dry)
    except Fallback as e:
        found = _left("_convolution", e)
    record_call(found)
    return torchs(
        keys, x, w, b, stride, padding, dilation, transposed, output_padding, groups,
        benchmark, deterministic, cudnn_enabled, allow_tf32,
    )  # fmt: skip


@opaque
def convolution_backward(
    chooser: Chooser,
    torchs: Callable[..., launch.Gradients],
    keys: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> launch.Gradients:
    """aten::convolution_backward, likewise: the gradients by x, w and bias, None for those not asked for."""
    chosen = chooser.chosen or chooser.look()
    if chosen is None:
        return torchs(
            keys, dy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
        )  # fmt: skip
    try:
        with DisableTorchFunction():
            parameters = tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
            if type(dy) not in PLAIN or type(x) not in PLAIN or type(w) not in PLAIN:
                dy, x, w = plain(dy), plain(x), plain(w)
            sizes, mask = None if bias_sizes is None else tuple(bias_sizes), tuple(output_mask)
            dtype = x.dtype
            key = dtype if dtype not in DTYPES else (
                transposed, dy.shape, dy.stride(), dy.dtype, dy.device, dy.data_ptr() & 15,
                x.shape, x.stride(), dtype, x.device, x.data_ptr() & 15, w.shape, w.stride(), w.dtype, w.device,
                w.data_ptr() & 15, sizes, mask, parameters, _get_cudnn_enabled(),
                dtype is torch.float32 and fp32_precision("cuda", "conv"),
            )  # fmt: skip
            found, dry = _lookup(
                chosen.backward, key, lambda dry: _prepare_backward(chosen, transposed, dy, x, w, sizes, mask, parameters, dry)
            )
            if type(found) is tuple:
                return launch.gradients(found, transposed, dy, x, w, dry)
    except Fallback as e:
        found = _left("convolution_backward", e)
    if isinstance(found, Parts):
        ours, others = (
            convolution_backward(
                chooser, torchs, keys, dy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
            )
            for mask in ([*found.ours], [*found.others])
        )
        dx, dw, db = (a if mine else b for a, b, mine in zip(ours, others, found.ours, strict=True))
        return dx, dw, db
    record_call(found)
    return torchs(
        keys, dy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
    )  # fmt: skip


def _lookup(
    memory: BoundedCache[Any, Found | Call], key: Any, prepare: Callable[[Dry | None], Found | Call]
) -> tuple[Found | Call, bool]:
    """What a kind of call launches, or how it falls back to torch, and whether it is a dry one."""
    dry = DRY.get()
    if dry or forced() is not None:
        return prepare(dry), dry is not None
    found = memory.get(key)
    if found is None:
        found = memory[key] = prepare(None)
    return found, False


def _left(operator: str, why: Fallback) -> Call:
    return Call(f"aten::{operator}", None, None, str(why))


def _prepare_forward(
    chosen: Choice,
    transposed: bool,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    parameters: Parameters,
    dry: Dry | None,
) -> Prepared | Call:
    try:
        why = _refusal(chosen, "dgrad" if transposed else "fprop", x, w)
        if why:
            raise Fallback(why)
        g = _geometry(transposed, x, w, b, parameters, dry)
    except TransientFallback:  # not to be remembered
        raise
    except Fallback as e:
        return _left("_convolution", e)
    return launch.convolution(transposed, g, x, w, b)


def _refusal(chosen: Choice, operation: str, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """Why an operation is not selected, or None: it is, or tconv has no kernels for it, which is declined elsewhere."""
    return chosen.refusal(operation, w.dim() - 2, x.dtype) if x.dtype in DTYPES and 3 <= w.dim() <= 5 else None


def _prepare_backward(
    chosen: Choice,
    transposed: bool,
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias_sizes: tuple[int, ...] | None,
    mask: Mask,
    parameters: Parameters,
    dry: Dry | None,
) -> launch.Backward | Call | Parts:
    try:
        operations = "fprop" if transposed else "dgrad", "wgrad", "wgrad"
        refused = [wanted and _refusal(chosen, o, x, w) for wanted, o in zip(mask, operations, strict=True)]
        ours = [wanted and not why for wanted, why in zip(mask, refused, strict=True)]
        if any(refused) and any(ours):
            return Parts(tuple(ours), tuple(map(bool, refused)))
        for why in filter(None, refused):
            raise Fallback(why)
        g = _geometry(transposed, x, w, None, parameters, dry)
        if dy.shape != g.problem.shape("x" if transposed else "y") or dy.dtype != x.dtype or dy.device != x.device:
            raise Fallback("an output's gradient that does not fit the layer")
        if mask[2] and bias_sizes != (dy.shape[1],):
            raise Fallback("a bias that does not fit the layer")
    except TransientFallback:
        raise
    except Fallback as e:
        return _left("convolution_backward", e)
    return launch.backward(transposed, g, dy, x, w, mask)


def _geometry(
    transposed: bool, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, parameters: Parameters, dry: Dry | None
) -> Geometry:
    """The geometry of the function's call that this is, in the memory format that torch's own kernels would give here.

    Torch is asked, for the format depends on the library that would run; compiled graphs were told it, and check.
    """
    stride, padding, output_padding, groups, dilation = parameters
    if x.dtype not in DTYPES:  # which is all that is known of such a call
        raise Fallback(f"dtype {x.dtype}")
    if x.dim() != w.dim() or not 3 <= w.dim() <= 5:
        raise Fallback(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    weight = w
    g = check.examine(check.Asked(transposed, w.dim() - 2, stride, padding, output_padding, groups, dilation), x, w, b)
    backend = torch._C._select_conv_backend(x, w, b, stride, padding, dilation, transposed, output_padding, groups)
    if x.dim() == 3:
        try:
            x, w = x.contiguous().unsqueeze(2), w.unsqueeze(2)
        except RuntimeError as e:  # no memory for a copy
            raise TransientFallback(f"{type(e).__name__}: {e}") from e
    format = torch._C._conv_determine_backend_memory_format(x, w, backend)
    channels_last = format == FORMATS[x.dim()]
    of_weight = weight_format(weight, channels_last)
    return Geometry(g.problem, channels_last, dry is not None, dry.device if dry else None, of_weight)
