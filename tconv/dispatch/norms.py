"""Group and RMS normalisation with an activation and padding, by tconv's kernels or as a sequence of PyTorch's functions.

A call is computed by kernels where these may run directly. In torch.compile, under functorch's transforms, in forward-mode
differentiation, and for what the kernels do not take, PyTorch's functions compute it, and raise their errors.
`tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv.dispatch import entry
from tconv.dispatch.autocast import without_autocast
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.sides import pairs
from tconv.dispatch.support import DTYPES
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import FORMATS
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.addressing import LIMIT
from tconv.planning.normalise import MOST_CHANNELS, Normalisation
from tconv.planning.problem import lift

MaybeTensor = torch.Tensor | None
# The two functions of tconv.functional, which put themselves here: torch.fx's graphs call them.
PUBLIC: dict[str, Callable[..., torch.Tensor]] = {}
_known: BoundedCache[Any, Normalisation | str] = BoundedCache()  # of calls that were checked, or why they fall back


class Asked(NamedTuple):
    """The arguments of a call but its tensors, as the caller gave them; see `tconv.functional`. RMS has groups None."""

    operation: str
    groups: Any
    eps: Any
    activation: Any
    pad: Any


def check_activation(activation: Any) -> None:
    """Raises ValueError for an activation that there is not."""
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def normalise(asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Computes a normalisation.

    Raises:
        ValueError: the activation or the padding does not fit.
        Whatever torch raises for the other arguments.
    """
    check_activation(asked.activation)
    for t in (x, w, b):
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b)
    sides = None
    if asked.pad is not None and isinstance(x, torch.Tensor):
        if x.dim() < 3:
            raise ValueError(f"pad must be None for an input without spatial dimensions, got {asked.pad!r}")
        sides = tuple(pairs(asked.pad, x.dim() - 2, "pad"))
    if is_dynamo_compiling():
        return by_torch(asked, sides, x, w, b)
    try:
        return _by_kernels(asked, sides, x, w, b)
    except Fallback as e:
        why = str(e)
    y = by_torch(asked, sides, x, w, b)  # outside `except`: the exception's frames hold memory
    record_call(Call(asked.operation, None, None, why))
    return y


def _traced(tracer: Any, asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Returns the proxy that torch.fx records: a call of the public function."""
    groups = () if asked.groups is None else (asked.groups,)
    given = (x, *groups, w, b, asked.eps, asked.activation, asked.pad)
    call: torch.Tensor = tracer.create_proxy("call_function", PUBLIC[asked.operation], given, {})
    return call


def by_torch(asked: Asked, sides: Any, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Computes a call as a sequence of PyTorch's functions. The result has x's dtype and memory format, in autocast too.

    With a weight or bias in fp32 beside x in 16 bits, the steps are computed in fp32, and the result is rounded once.
    """
    device = x.device.type if isinstance(x, torch.Tensor) else ""
    with without_autocast(device):
        v = x
        if any(_wider(x, t) for t in (w, b)):
            v, w, b = (None if t is None else t.float() for t in (x, w, b))
        if asked.operation == "group_norm_silu":
            y = F.group_norm(v, asked.groups, w, b, asked.eps)
        else:
            y = F.rms_norm(v.movedim(1, -1), (v.shape[1],), _flat(v, w), asked.eps).movedim(-1, 1)
            if b is not None:
                y = y + _flat(v, b).view(-1, *(1,) * (x.dim() - 2))
        if asked.activation is not None:
            y = F.silu(y)
        y = y.to(x.dtype)
        if sides is not None:
            y = F.pad(y, [p for pair in reversed(sides) for p in pair])
    # A transform may have dimensions that a memory format does not count, and torch.jit.trace extents that are no numbers.
    if not is_dynamo_compiling() and (torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state()):
        return y
    return _laid_out(y, _is_channels_last(x))


def _wider(x: Any, t: Any) -> bool:
    """Returns True if a weight or bias t is fp32, and x of 16 bits."""
    tensors = isinstance(x, torch.Tensor) and isinstance(t, torch.Tensor)
    return tensors and t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)


def _flat(x: torch.Tensor, t: Any) -> Any:
    """Returns a weight or bias of shape (C, 1, ...) in the shape (C,); another as it is."""
    extra = isinstance(t, torch.Tensor) and t.dim() > 1
    return t.reshape(-1) if extra and t.shape[0] == x.shape[1] == t.numel() else t


@opaque
def _by_kernels(asked: Asked, sides: Any, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Computes a call by kernels.

    Raises:
        Fallback: it cannot, and nothing has been launched.
    """
    dry = DRY.get()
    entry.check_context(*[t for t in (x, w, b) if t is not None])
    if asked.operation == "rms_norm_silu" and x.dim() > 1:
        w, b = _flat(x, w), _flat(x, b)
    n = _normalisation(asked, sides, x, w, b)
    if dry:
        n = dataclasses.replace(n, dry=True, device=dry.device)
    from tconv.dispatch import normalised

    own = torch.float32 if any(_wider(x, t) for t in (w, b)) else x.dtype
    w, b = (None if t is None else t.to(own).contiguous() for t in (w, b))
    return normalised.normalise(n, _laid_out(x, n.channels_last), w, b)


def _normalisation(asked: Asked, sides: Any, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Normalisation:
    """Returns what a call asks for, which is examined once per kind of call.

    Raises:
        Fallback: torch would refuse the call, or tconv's kernels do not take it.
    """
    operation, groups, eps, activation, _ = asked
    if not (groups is None or type(groups) is int) or type(eps) not in (int, float):  # True equals 1, as a key too
        raise Fallback(f"num_groups={groups!r}, eps={eps!r}")
    of_channels = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in (w, b))
    try:
        key = operation, groups, eps, activation, sides, x.shape, x.stride(), x.dtype, x.device, of_channels
        known = _known.get(key)
    except (RuntimeError, TypeError):  # nested or sparse, or symbolic extents
        raise Fallback("not a plain strided tensor") from None
    if known is None:
        try:
            known = _examined(asked, sides, x, w, b)
        except Fallback as e:
            known = str(e)
        _known[key] = known
    if isinstance(known, str):
        raise Fallback(known)
    return known


def _examined(asked: Asked, sides: Any, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Normalisation:
    rank, rms = x.dim() - 2, asked.groups is None
    if not 0 <= rank <= 3:
        raise Fallback(f"an input of {x.dim()} dimensions")
    if x.dtype not in DTYPES:
        raise Fallback(f"{x.dtype}")
    if not x.numel():
        raise Fallback("a tensor without elements")
    images, channels = x.shape[:2]
    groups = 1 if rms else asked.groups
    if groups < 1 or channels % groups:
        raise Fallback(f"{channels} channels in {groups} groups")
    if not rms and x.numel() == groups:  # which torch refuses for one image
        raise Fallback("one number in a group")
    if rms and channels > MOST_CHANNELS:
        raise Fallback(f"{channels} channels, more than {MOST_CHANNELS}")
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and (t.shape != (channels,) or not (t.dtype == x.dtype or _wider(x, t)) or t.device != x.device):
            raise Fallback(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}")
    before, after = ((0,) * rank, (0,) * rank) if sides is None else zip(*sides, strict=True)
    n = Normalisation(
        asked.operation, rank, images, channels, groups, lift(x.shape[2:], 1), lift(before, 0), lift(after, 0),
        _is_channels_last(x), float(asked.eps), asked.activation or "", w is not None, b is not None,
    )  # fmt: skip
    if max(n.Q, n.N * n.C, math.prod(n.shape("y")) // n.C) > LIMIT // 2:
        raise Fallback("pixels, or channels of images, that 32 bits cannot count")
    return n


def _laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Returns t without gaps, with contiguous channels or with contiguous pixels: t itself, or a copy."""
    if not channels_last:
        return t.contiguous()
    moved = t.movedim(1, -1)
    return t if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)


def _is_channels_last(x: torch.Tensor) -> bool:
    """Returns True if a result like x has contiguous channels: x is channels_last, or at rank 1 lies as (N, L, C)."""
    if x.dim() in FORMATS:
        return suggest_memory_format(x) == FORMATS[x.dim()]
    return x.dim() == 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
