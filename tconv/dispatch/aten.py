"""aten's `_convolution` and `convolution_backward` by tconv's kernels, which override.py registers in place of torch's.

They run below autograd, autocast, functorch, modes, tracing and sharding, on strided tensors that have memory. So this code
need not check the context or compute gradients. A tensor subclass is treated as a plain tensor, since torch's own kernels
call none of its methods either. Results are plain tensors, like torch's; the levels above wrap them in the subclass.

Launches are prepared once per kind of call and cached. The key has everything that may change them.
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
from tconv.dispatch.selection import Choice, Chooser
from tconv.dispatch.support import DTYPES
from tconv.launching import launch
from tconv.launching.arguments import Prepared
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY, Dry
from tconv.launching.memory_format import FORMATS, weight_format
from tconv.launching.record import Call, Fallback, Slower, TransientFallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.plan import forced
from tconv.planning.problem import Geometry

Parameters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]
Mask = tuple[bool, ...]
Found = TypeVar("Found")
OPTIONAL = PLAIN | {type(None)}  # types of an optional tensor


@dataclass(frozen=True)
class Parts:
    """A backward pass of which `enable()` selects only some gradients. It is split into two calls with these output masks.

    Attributes:
        ours: the gradients that tconv computes.
        others: the gradients that fall back to torch.
    """

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
    """Computes aten::_convolution.

    Args:
        chooser: tells which calls are selected.
        torchs: the kernel registered before this one, for calls that fall back.
        keys: the dispatch keys of the call.
        x, ...: the arguments of aten::_convolution. `benchmark` and `deterministic` change nothing, since nothing is tuned
            and results are bitwise reproducible. cuDNN is not used: `cudnn_enabled` affects the result's memory format only.
    """
    chosen = chooser.chosen or chooser.look()
    if chosen is None:  # the call is made outside the enabled models
        return torchs(
            keys, x, w, b, stride, padding, dilation, transposed, output_padding, groups,
            benchmark, deterministic, cudnn_enabled, allow_tf32,
        )  # fmt: skip
    try:
        with DisableTorchFunction():  # subclasses and function modes have already seen the call
            if type(x) not in PLAIN or type(w) not in PLAIN or type(b) not in OPTIONAL:
                x, w, b = plain(x), plain(w), None if b is None else plain(b)
            dtype, invariant = x.dtype, is_batch_invariant()  # read once: another thread may change it
            if dtype is torch.float32 and allow_tf32 is not (fp32_precision("cuda", "conv") == "tf32"):
                raise Fallback(f"allow_tf32={allow_tf32}, the process's setting being another")  # a traced graph keeps its own
            parameters = tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
            key = dtype if dtype not in DTYPES else (
                transposed, x.shape, x.stride(), dtype, x.device, x.data_ptr() & 15,
                w.shape, w.stride(), w.dtype, w.device, w.data_ptr() & 15,
                None if b is None else (b.shape, b.stride(), b.dtype, b.device), parameters, cudnn_enabled, allow_tf32,
                invariant,
            )  # fmt: skip
            found, dry = _lookup(
                chosen.forward, key, lambda dry: _prepare_forward(chosen, transposed, x, w, b, parameters, dry, invariant)
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
    """Computes aten::convolution_backward, with the same first arguments as `convolution`.

    Returns the gradients of x, w and bias, None for those not in `output_mask`.
    """
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
            dtype, invariant = x.dtype, is_batch_invariant()
            key = dtype if dtype not in DTYPES else (
                transposed, dy.shape, dy.stride(), dy.dtype, dy.device, dy.data_ptr() & 15,
                x.shape, x.stride(), dtype, x.device, x.data_ptr() & 15, w.shape, w.stride(), w.dtype, w.device,
                w.data_ptr() & 15, sizes, mask, parameters, _get_cudnn_enabled(),
                dtype is torch.float32 and fp32_precision("cuda", "conv"), invariant,
            )  # fmt: skip
            found, dry = _lookup(
                chosen.backward, key,
                lambda dry: _prepare_backward(chosen, transposed, dy, x, w, sizes, mask, parameters, dry, invariant),
            )  # fmt: skip
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
    """Returns the launches of a kind of call, or the record of its fallback, and whether this is a dry run.

    Dry runs and forced plans neither use nor fill the cache. Deterministic algorithms, which torch's kernel need not be, have
    entries of their own.
    """
    dry = DRY.get()
    if dry and dry.left:
        raise Fallback(dry.left)
    if dry or forced() is not None:
        return prepare(dry), dry is not None
    found = memory.get(key)
    if (found is None or type(found) is not Prepared) and torch.are_deterministic_algorithms_enabled():
        key = key, "deterministic"
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
    invariant: bool,
) -> Prepared | Call:
    try:
        why = _refusal(chosen, "dgrad" if transposed else "fprop", x, w)
        if why:
            raise Fallback(why)
        g = _geometry(chosen, ("dgrad" if transposed else "fprop",), transposed, x, w, b, parameters, dry, invariant)
    except TransientFallback:  # must not be cached
        raise
    except Fallback as e:
        return _left("_convolution", e)
    try:
        return launch.convolution(transposed, g, x, w, b)
    except Slower as e:
        return _left("_convolution", e)


def _refusal(chosen: Choice, operation: str, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """Returns why `enable()` does not select an operation, or None.

    Also None for a dtype or rank without kernels: `_geometry` raises Fallback for those.
    """
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
    invariant: bool,
) -> launch.Backward | Call | Parts:
    try:
        operations = "fprop" if transposed else "dgrad", "wgrad", "wgrad"
        refused = [wanted and _refusal(chosen, o, x, w) for wanted, o in zip(mask, operations, strict=True)]
        ours = [wanted and not why for wanted, why in zip(mask, refused, strict=True)]
        if any(refused) and any(ours):
            return Parts(tuple(ours), tuple(map(bool, refused)))
        for why in filter(None, refused):
            raise Fallback(why)
        # Several enable() may select one gradient each, with policies of their own: each is then prepared by itself.
        policies = [wanted and chosen.policy((o,), w.dim() - 2, x.dtype) for wanted, o in zip(mask, operations, strict=True)]
        first = next(filter(None, policies), None)
        if any(p and p != first for p in policies):
            return Parts(tuple(p == first for p in policies), tuple(bool(p) and p != first for p in policies))
        asked = tuple(o for wanted, o in zip(mask, operations, strict=True) if wanted)
        g = _geometry(chosen, asked, transposed, x, w, None, parameters, dry, invariant)
        if dy.shape != g.problem.shape("x" if transposed else "y") or dy.dtype != x.dtype or dy.device != x.device:
            raise Fallback("an output's gradient that does not fit the layer")
        if mask[2] and bias_sizes != (dy.shape[1],):
            raise Fallback("a bias that does not fit the layer")
    except TransientFallback:
        raise
    except Fallback as e:
        return _left("convolution_backward", e)
    try:
        return launch.backward(transposed, g, dy, x, w, mask)
    except Slower as e:
        slower = e
    # Some of these gradients are torch's. That of the bias goes with that of the weight.
    of_x, of_w = (wanted and _is_slower(transposed, g, dy, x, w, i) for i, wanted in enumerate(mask[:2]))
    torchs = of_x, of_w, mask[2] and (of_w or not mask[1])
    kept = tuple(wanted and not other for wanted, other in zip(mask, torchs, strict=True))
    return Parts(kept, torchs) if any(kept) else _left("convolution_backward", slower)


def _is_slower(transposed: bool, g: Geometry, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, which: int) -> bool:
    """Returns True if torch's kernel was measured to be faster at the gradient of x (`which` is 0) or of w (1)."""
    try:
        launch.backward(transposed, g, dy, x, w, [which == i for i in range(3)])
    except Slower:
        return True
    return False


def _geometry(
    chosen: Choice,
    operations: tuple[str, ...],
    transposed: bool,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    parameters: Parameters,
    dry: Dry | None,
    invariant: bool,
) -> Geometry:
    """Returns the geometry of a call, with the memory format that torch's own kernels would give its result.

    That format depends on the backend torch would select, so this asks torch. Compiled graphs assume it and check it.

    Raises:
        Fallback: tconv does not support the call.
    """
    stride, padding, output_padding, groups, dilation = parameters
    if x.dtype not in DTYPES:  # checked first: the cache key of such a call is its dtype alone
        raise Fallback(f"dtype {x.dtype}")
    if x.dim() != w.dim() or not 3 <= w.dim() <= 5:
        raise Fallback(f"an input of {x.dim()} and a weight of {w.dim()} dimensions")
    weight = w
    g = check.examine(check.CallArguments(transposed, w.dim() - 2, stride, padding, output_padding, groups, dilation), x, w, b)
    backend = torch._C._select_conv_backend(x, w, b, stride, padding, dilation, transposed, output_padding, groups)
    if x.dim() == 3:
        try:
            x, w = x.contiguous().unsqueeze(2), w.unsqueeze(2)
        except RuntimeError as e:  # no memory for a copy
            raise TransientFallback(f"{type(e).__name__}: {e}") from e
    format = torch._C._conv_determine_backend_memory_format(x, w, backend)
    channels_last = format == FORMATS[x.dim()]
    of_weight = weight_format(weight, channels_last)
    policy = chosen.policy(operations, weight.dim() - 2, x.dtype)
    return Geometry(
        g.problem, channels_last, dry is not None, dry.device if dry else None, of_weight, policy, batch_invariant=invariant
    )
