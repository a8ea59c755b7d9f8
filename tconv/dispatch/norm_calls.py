"""What a call of a normalisation asks for: its check, and its result and gradients as sequences of PyTorch's functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.compiler import is_dynamo_compiling

from tconv.dispatch.autocast import without_autocast
from tconv.dispatch.chain_rule import FORMULAS
from tconv.dispatch.support import DTYPES
from tconv.launching.cache import BoundedCache
from tconv.launching.memory_format import FORMATS
from tconv.launching.record import Fallback
from tconv.planning.addressing import LIMIT
from tconv.planning.normalise import MOST_CHANNELS, Normalisation
from tconv.planning.problem import lift

MaybeTensor = torch.Tensor | None
Gradients = tuple[MaybeTensor, MaybeTensor, MaybeTensor]
_known: BoundedCache[Any, Normalisation | str] = BoundedCache()  # of calls that were checked, or why they fall back


class Asked(NamedTuple):
    """The arguments of a call but its tensors, as the caller gave them; see `tconv.functional`. RMS has groups None."""

    operation: str
    groups: Any
    eps: Any
    activation: Any
    pad: Any


class How(NamedTuple):
    """The arguments of a call but its tensors, once they are checked.

    Attributes:
        groups: of channels that are normalised together; 0 for RMS, where each pixel is alone.
        eps: added to the variance, or to the mean of squares.
        activation: "silu", or empty.
        before, after: zeros around the result, per spatial dimension.
    """

    groups: int
    eps: float
    activation: str
    before: Sequence[int]
    after: Sequence[int]

    @property
    def operation(self) -> str:
        return "group_norm_silu" if self.groups else "rms_norm_silu"


def check_activation(activation: Any) -> None:
    """Raises ValueError for an activation that there is not."""
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def normalisation(asked: Asked, sides: Any, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Normalisation:
    """Returns what a call asks of tconv's kernels, which is examined once per kind of call.

    Args:
        sides: zeros around the result, (before, after) per spatial dimension; None for none.
        w, b: of shape (C,).
    Raises:
        Fallback: torch would refuse the call, or tconv's kernels do not take it.
    """
    of_channels = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in (w, b))
    try:
        kinds = type(asked.groups), type(asked.eps)  # True equals 1
        key = asked[:4], kinds, sides, x.shape, x.stride(), x.dtype, x.device, of_channels
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


def check(asked: Asked, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> None:
    """Checks a call but for its number of elements. torch.compile traces this function.

    Raises:
        Fallback: torch would refuse the call, or tconv's kernels do not take it.
    """
    rms, groups = asked.groups is None, 1 if asked.groups is None else asked.groups
    if type(groups) is not int or type(asked.eps) not in (int, float):
        raise Fallback(f"num_groups={groups!r}, eps={asked.eps!r}")
    if not 2 <= x.dim() <= 5:
        raise Fallback(f"an input of {x.dim()} dimensions")
    if x.dtype not in DTYPES:
        raise Fallback(f"{x.dtype}")
    channels = x.shape[1]
    if groups < 1 or channels < groups or channels % groups:
        raise Fallback(f"{channels} channels in {groups} groups")
    if not rms and x.numel() == groups:  # which torch refuses for one image
        raise Fallback("one number in a group")
    if rms and channels > MOST_CHANNELS:
        raise Fallback(f"{channels} channels, more than {MOST_CHANNELS}")
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and (t.shape != (channels,) or not (t.dtype == x.dtype or _wider(x, t)) or t.device != x.device):
            raise Fallback(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}")


def _examined(asked: Asked, sides: Any, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Normalisation:
    check(asked, x, w, b)
    if not x.numel():
        raise Fallback("a tensor without elements")
    (images, channels), rank = x.shape[:2], x.dim() - 2
    before, after = ((0,) * rank, (0,) * rank) if sides is None else zip(*sides, strict=True)
    n = Normalisation(
        asked.operation, rank, images, channels, asked.groups or 1, lift(x.shape[2:], 1), lift(before, 0), lift(after, 0),
        is_channels_last(x), float(asked.eps), asked.activation or "", w is not None, b is not None,
    )  # fmt: skip
    if max(n.Q, n.N * n.C, math.prod(n.shape("y")) // n.C) > LIMIT // 2:
        raise Fallback("pixels, or channels of images, that 32 bits cannot count")
    return n


def flat(asked: Asked, x: torch.Tensor, w: Any, b: Any) -> tuple[Any, Any]:
    """Returns weight and bias; those of an RMS normalisation that have the shape (C, 1, ...) in the shape (C,)."""
    return (w, b) if asked.groups is not None or x.dim() < 2 else (_flat(x, w), _flat(x, b))


def of_one_dtype(x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> list[MaybeTensor]:
    """Returns weight and bias in the dtype in which the kernels read both: fp32 if one of them is, else x's."""
    own = torch.float32 if any(_wider(x, t) for t in (w, b)) else x.dtype
    return [None if t is None else t.to(own) for t in (w, b)]


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
    return laid_out(y, is_channels_last(x))


def _wider(x: Any, t: Any) -> bool:
    """Returns True if a weight or bias t is fp32, and x of 16 bits."""
    tensors = isinstance(x, torch.Tensor) and isinstance(t, torch.Tensor)
    return tensors and t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)


def _flat(x: torch.Tensor, t: Any) -> Any:
    """Returns a weight or bias of shape (C, 1, ...) in the shape (C,); another as it is."""
    extra = isinstance(t, torch.Tensor) and t.dim() > 1
    return t.reshape(-1) if extra and t.shape[0] == x.shape[1] == t.numel() else t


def laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Returns t without gaps, with contiguous channels or with contiguous pixels: t itself, or a copy."""
    if not channels_last:
        return t.contiguous()
    moved = t.movedim(1, -1)
    return t if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)


def is_channels_last(x: torch.Tensor) -> bool:
    """Returns True if a result like x has contiguous channels: x is channels_last, or at rank 1 lies as (N, L, C)."""
    if x.dim() in FORMATS:
        return suggest_memory_format(x) == FORMATS[x.dim()]
    return x.dim() == 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def by_formulas(how: How, dy: torch.Tensor, x: torch.Tensor, w: MaybeTensor, b: MaybeTensor) -> Gradients:
    """Returns the gradients of x, w and b by PyTorch's differentiable functions; None for those that there are not."""
    for d, before in enumerate(how.before, 2):
        dy = dy.narrow(d, before, x.shape[d])
    wide, channel = torch.promote_types(x.dtype, torch.float32), (-1, *(1,) * (x.dim() - 2))

    def mean(t: torch.Tensor) -> torch.Tensor:
        """The mean over what is normalised together, in t's shape."""
        if not how.groups:
            return t.mean(1, keepdim=True)
        return _in_groups(t, how.groups).mean((2, 3), keepdim=True).expand_as(_in_groups(t, how.groups)).reshape(t.shape)

    v = x.to(wide) - mean(x.to(wide)) if how.groups else x.to(wide)
    scale = (mean(v * v) + how.eps).rsqrt()
    h = v * scale
    own = h.new_ones(()) if w is None else w.to(wide).view(channel)
    z = h * own if b is None else h * own + b.to(wide).view(channel)
    g = FORMULAS[how.activation](dy.to(wide), z, 0.0, False)
    but_channels = [d for d in range(x.dim()) if d != 1]
    dw = None if w is None else (g * h).sum(but_channels).to(w.dtype)
    db = None if b is None else g.sum(but_channels).to(b.dtype)
    g = g * own
    dx = g - mean(g) - h * mean(g * h) if how.groups else g - h * mean(g * h)
    return (dx * scale).to(x.dtype), dw, db


def statistics(how: How, x: torch.Tensor) -> torch.Tensor:
    """Returns what a backward pass keeps of groups, (2, N, groups): the means, and 1/sqrt(variance + eps)."""
    wide = _in_groups(x.to(torch.promote_types(x.dtype, torch.float32)), how.groups)
    variance, mean = torch.var_mean(wide, (2, 3), correction=0)
    return torch.stack((mean, (variance + how.eps).rsqrt()))


def _in_groups(t: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns t as (N, groups, C / groups, pixels)."""
    return t.reshape(t.shape[0], groups, t.shape[1] // groups, math.prod(t.shape[2:]))
