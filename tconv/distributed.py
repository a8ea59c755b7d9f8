"""Convolutions of DTensors, sharded over batch, channels or spatial dimensions.

A shard is a rank's part of one dimension, split as DTensor splits it (`bounds`). Its bounds depend on the full extent and the
number of ranks only. So tensors of equal extent are split alike, whichever layers computed them (skip connections). Each rank
calls tconv.functional on the inputs that its part of the result needs:

    sharded dimension     communication
    batch                 none
    spatial               before: fetches the halo that its outputs read from other ranks; zeros beyond the tensor's ends
    input channels        after: sums the outputs over ranks
    output channels       after: sums the input's gradients over ranks
    groups                none

If ranks use the same weight with different parts of the input, the weight's gradients are summed over ranks. The backward of
a halo exchange sends each gradient to the rank that holds the element, which adds them in rank order: results are bitwise
reproducible.

Import this module by name; `import tconv` does not load torch's DTensor.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard

from tconv import functional, modules
from tconv.dispatch import check
from tconv.dispatch.dynamo import opaque
from tconv.launching.cache import BoundedCache
from tconv.launching.record import Fallback
from tconv.swap import MARK, TORCHS, become, checked, plain_class
from tconv.swap import OURS as SWAPPED

FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
Range = tuple[int, int]
_used_groups: weakref.WeakSet[Any] = weakref.WeakSet()  # process groups that have done one collective


def bounds(extent: int, ranks: int) -> tuple[int, ...]:
    """Returns where the shards of a dimension begin and end, as in `torch.chunk`: rank r has [bounds[r], bounds[r + 1]).

    Example:
        >>> bounds(10, 3)
        (0, 4, 8, 10)
    """
    each = -(-extent // ranks)
    return tuple(min(r * each, extent) for r in range(ranks + 1))


@dataclass(frozen=True)
class Halo:
    """The halo exchange along one dimension: which range each rank of a process group has, and which it needs.

    Attributes:
        group: the process group.
        rank: this rank in the group.
        dim: the tensor's dimension.
        have: `bounds` of the full dimension.
        want: the range that each rank needs. It may extend beyond the full dimension, where it is filled with zeros.
    """

    group: Any
    rank: int
    dim: int
    have: tuple[int, ...]
    want: tuple[Range, ...]

    def shared(self, owner: int, reader: int) -> Range:
        """Returns the range that `owner` has and `reader` needs; it is empty unless its end is larger than its start."""
        (a, b), (lo, hi) = (self.have[owner], self.have[owner + 1]), self.want[reader]
        return max(a, lo), min(b, hi)

    def of_shard(self, t: torch.Tensor, part: Range) -> torch.Tensor:
        """Returns a range of the full dimension as a view of this rank's shard."""
        return t.narrow(self.dim, part[0] - self.have[self.rank], part[1] - part[0])

    def of_wanted(self, t: torch.Tensor, part: Range) -> torch.Tensor:
        """Returns a range of the full dimension as a view of the tensor that this rank needs."""
        return t.narrow(self.dim, part[0] - self.want[self.rank][0], part[1] - part[0])

    def fetch(self, shard: torch.Tensor) -> torch.Tensor:
        """Returns the range that this rank needs, gathered from all ranks' shards."""
        lo, hi = self.want[self.rank]
        wanted = _empty(shard, self.dim, hi - lo)
        first, last = min(max(lo, 0), hi), max(min(hi, self.have[-1]), lo)
        for part in ((lo, first), (max(last, first), hi)):
            self.of_wanted(wanted, part).zero_()
        mine = self.shared(self.rank, self.rank)
        if mine[1] > mine[0]:
            self.of_wanted(wanted, mine).copy_(self.of_shard(shard, mine))
        give = {r: self.of_shard(shard, part) for r, part in self._others(lambda r: self.shared(self.rank, r))}
        take = {r: self.of_wanted(wanted, part) for r, part in self._others(lambda r: self.shared(r, self.rank))}
        for r, piece in self._swap(give, take, shard.device).items():
            take[r].copy_(piece)
        return wanted

    def give_back(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of this rank's shard, summed from the gradients of all ranks' results of `fetch`."""
        shard = _empty(grad, self.dim, self.have[self.rank + 1] - self.have[self.rank]).zero_()
        mine = self.shared(self.rank, self.rank)
        give = {r: self.of_wanted(grad, part) for r, part in self._others(lambda r: self.shared(r, self.rank))}
        take = {r: self.of_shard(shard, part) for r, part in self._others(lambda r: self.shared(self.rank, r))}
        came = self._swap(give, take, grad.device)
        if mine[1] > mine[0]:
            self.of_shard(shard, mine).copy_(self.of_wanted(grad, mine))
        for r, piece in came.items():
            take[r].add_(piece)
        return shard

    def _others(self, part: Callable[[int], Range]) -> list[tuple[int, Range]]:
        """Returns (rank, range) of the other ranks whose range is not empty, in rank order."""
        ranges = [(r, part(r)) for r in range(len(self.want)) if r != self.rank]
        return [(r, found) for r, found in ranges if found[1] > found[0]]

    def _swap(
        self, give: dict[int, torch.Tensor], take: dict[int, torch.Tensor], device: torch.device
    ) -> dict[int, torch.Tensor]:
        """Sends the tensors in `give` and returns received ones of the shapes in `take`; all by rank, in rank order."""
        if self.group not in _used_groups:  # NCCL needs a collective of the whole group before send/recv within part of it
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            _used_groups.add(self.group)
        came = {r: torch.empty_like(piece, memory_format=torch.contiguous_format) for r, piece in take.items()}
        peer = [dist.get_global_rank(self.group, r) for r in range(len(self.want))]
        ops = [dist.P2POp(dist.isend, piece.contiguous(), peer[r], self.group) for r, piece in give.items()]
        ops += [dist.P2POp(dist.irecv, piece, peer[r], self.group) for r, piece in came.items()]
        for request in dist.batch_isend_irecv(ops) if ops else ():
            request.wait()
        return came


def _empty(like: torch.Tensor, dim: int, extent: int) -> torch.Tensor:
    """Returns an uninitialized tensor with the memory format of `like` and another extent of one dimension."""
    shape = [*like.shape[:dim], extent, *like.shape[dim + 1 :]]
    return torch.empty_strided(shape, _strides(like, shape), dtype=like.dtype, device=like.device)


def _strides(like: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns dense strides for a shape, with the dimension order of `like`."""
    strides, step = [0] * len(shape), 1
    for i in sorted(range(len(shape)), key=lambda i: (like.stride(i), -i)):
        strides[i], step = step, step * max(shape[i], 1)
    return tuple(strides)


class _Fetch(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(ctx: Any, shard: torch.Tensor, halo: Halo) -> torch.Tensor:
        ctx.halo = halo
        return halo.fetch(shard)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch's has no types
    @opaque
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.halo.give_back(grad), None


class _SumGradient(torch.autograd.Function):
    """Identity in the forward pass, sums gradients over ranks in the backward pass.

    For a tensor that is the same on all ranks, each of which uses it for another part of the computation.
    """

    @staticmethod
    @opaque
    def forward(ctx: Any, t: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch's has no types
    @opaque
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _total(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sums over ranks in the forward pass (all-reduce), identity in the backward pass."""

    @staticmethod
    @opaque
    def forward(ctx: Any, t: torch.Tensor, group: Any) -> torch.Tensor:
        return _total(t, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch's has no types
    @opaque
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


_fetch: Callable[[torch.Tensor, Halo], torch.Tensor] = _Fetch.apply
_sum_gradient: Callable[[torch.Tensor, Any], torch.Tensor] = _SumGradient.apply
_sum: Callable[[torch.Tensor, Any], torch.Tensor] = _Sum.apply


def _total(t: torch.Tensor, group: Any) -> torch.Tensor:
    """Returns the sum over a group's ranks. fp16 and bf16 are summed in fp32 and rounded once."""
    wide = torch.promote_types(t.dtype, torch.float32)
    total = torch.empty(t.shape, dtype=wide, device=t.device).copy_(t)
    dist.all_reduce(total, group=group)
    return total if total.dtype == t.dtype and t.is_contiguous() else torch.empty_like(t).copy_(total)


@dataclass
class _Split:
    """How a convolution is sharded over a device mesh.

    Attributes:
        x, w, b, y: placements, one per mesh dimension.
        space: {spatial dimension: mesh dimension that shards it}.
        sum_x, sum_w: mesh dimensions over which gradients of x, or of w and b, are summed.
        sum_y: mesh dimensions over which y is summed.
        groups: number of groups of each rank's convolution.
    """

    x: list[Any]
    w: list[Any]
    b: list[Any]
    y: list[Any]
    space: dict[int, int]
    sum_x: list[int]
    sum_w: list[int]
    sum_y: list[int]
    groups: int


def _split(transposed: bool, mesh: Any, placements: Sequence[Any], given: Sequence[Any], groups: int) -> _Split:
    """Returns how to shard the convolution of x and w on a mesh, given x's placements and w's.

    Raises:
        ValueError: their placements do not fit together.
    """
    whole = [Replicate()] * mesh.ndim
    s = _Split(list(placements), list(given), list(whole), list(whole), {}, [], [], [], groups)
    reads, writes = (Shard(0), Shard(1)) if transposed else (Shard(1), Shard(0))  # the weight's channels
    for m, (px, pw) in enumerate(zip(placements, given, strict=True)):
        known = type(px) in (Replicate, Shard) and type(pw) in (Replicate, Shard)
        if known and isinstance(px, Shard) and px.dim != 1 and pw == Replicate():
            s.y[m] = px
            s.sum_w.append(m)
            if px.dim >= 2:
                if px.dim - 2 in s.space:
                    raise ValueError(f"input dimension {px.dim} is cut by two dimensions of the mesh: {placements}")
                s.space[px.dim - 2] = m
        elif known and px == pw == Replicate():
            pass
        elif known and groups > 1 and px in (Replicate(), Shard(1)) and pw in (Replicate(), Shard(0)):
            if s.groups % mesh.size(m):
                raise ValueError(f"{s.groups} groups cannot be dealt evenly to {mesh.size(m)} ranks")
            s.groups //= mesh.size(m)
            s.x[m], s.w[m], s.b[m], s.y[m] = Shard(1), Shard(0), Shard(0), Shard(1)
        elif known and groups == 1 and px == Replicate() and pw == writes:
            s.b[m], s.y[m] = Shard(0), Shard(1)
            s.sum_x.append(m)
        elif known and groups == 1 and px in (Replicate(), Shard(1)) and pw in (Replicate(), reads):
            s.x[m], s.w[m] = Shard(1), reads
            s.sum_y.append(m)
        else:
            raise ValueError(
                f"no convolution of {groups} group(s) for an input placed {px!r} and a weight placed {pw!r}: "
                "redistribute one of them (see docs/distributed.md)"
            )
    return s


def _local(t: Any, mesh: Any, placements: Sequence[Any]) -> torch.Tensor:
    """Returns this rank's part of a tensor with these placements. Differentiable.

    A plain tensor counts as replicated. A DTensor with other placements is redistributed.

    Raises:
        ValueError: the tensor is on another mesh, or this rank's part does not have the shape that DTensor would give it.
    """
    if not isinstance(t, DTensor):
        if all(p == Replicate() for p in placements):
            return t  # type: ignore[no-any-return]  # `t` is Any
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if t.device_mesh != mesh:
        raise ValueError(f"a tensor is on {t.device_mesh}, the input on {mesh}")
    if tuple(t.placements) != tuple(placements):
        t = t.redistribute(mesh, placements)
    part: torch.Tensor = t.to_local()
    expected = list(t.shape)
    for m, p in enumerate(placements):
        if isinstance(p, Shard):
            cuts, r = bounds(expected[p.dim], mesh.size(m)), mesh.get_local_rank(m)
            expected[p.dim] = cuts[r + 1] - cuts[r]
    if list(part.shape) != expected:
        raise ValueError(f"this rank holds {tuple(part.shape)} of {tuple(t.shape)}, not DTensor's share {tuple(expected)}")
    return part


def _reach(transposed: bool, out: Range, taps: int, stride: int, before: int, dilation: int) -> Range:
    """Returns the range of inputs that a range of outputs reads. It may extend beyond the ends of the input."""
    (a, b), span = out, dilation * (taps - 1)
    if not transposed:
        return a * stride - before, (b - 1) * stride - before + span + 1
    # Input i contributes to outputs i*stride - before + dilation*t. If the stride is wider than the filter, outputs have
    # gaps that no input contributes to. The second number of each pair extends the range over those.
    lo = min(-((span - a - before) // stride), (a + before) // stride)
    last = max((b - 1 + before) // stride, -((span + 1 - b - before) // stride))
    return lo, last + 1


def _check_all_work(what: str, shape: Sequence[int], placements: Sequence[Any], mesh: Any) -> None:
    """Raises ValueError if a rank would have no channels or no pixels."""
    for m, p in enumerate(placements):
        if isinstance(p, Shard) and p.dim and bounds(shape[p.dim], mesh.size(m))[-2] == shape[p.dim]:
            extent, ranks = shape[p.dim], mesh.size(m)
            raise ValueError(f"{what} dimension {p.dim}, {extent} long, leaves one of {ranks} ranks without any")


class _Parameters(NamedTuple):
    """A convolution's parameters: one number per spatial dimension, and the number of groups.

    Attributes:
        pads: the padding (before, after) of each dimension.
        extra: output_padding.
    """

    stride: tuple[int, ...]
    pads: tuple[Range, ...]
    extra: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _parameters(
    transposed: bool, taps: Sequence[int], stride: Any, padding: Any, output_padding: Any, dilation: Any, groups: Any
) -> _Parameters:
    """Returns the parameters of a filter of these extents, checked as torch checks them.

    Raises:
        ValueError: they are invalid.
    """
    rank = len(taps)
    try:
        s, d, e = (
            check.per_dimension(check.parameter(value), rank, name)
            for name, value in (("stride", stride), ("dilation", dilation), ("output_padding", output_padding))
        )
        pads = check.pads_of(padding, rank, transposed, taps, s, d)
        if min(*s, *d, check.index(groups)) < 1 or min(e) < 0:
            raise Fallback("stride, dilation and groups must be positive, output_padding not negative")
        if any(n >= max(step, spread) for n, step, spread in zip(e, s, d, strict=True)):
            raise Fallback(f"output_padding {e} must be smaller than stride {s} or dilation {d}")
    except Fallback as error:
        raise ValueError(
            f"no convolution of rank {rank} with stride={stride}, padding={padding!r}, output_padding={output_padding}, "
            f"dilation={dilation}, groups={groups}: {error}"
        ) from None
    return _Parameters(s, tuple(pads), e, d, groups)


@dataclass(frozen=True)
class _Plan:
    """What one rank does for a kind of call. It names mesh dimensions and not process groups, which may be made anew.

    Attributes:
        split: how the convolution is sharded.
        shape: of the whole result.
        halos: (mesh dimension, tensor dimension, have, want) of each exchange, as in `Halo`.
        behind: how many zeros to add behind each spatial dimension, because torch pads both ends alike.
        padding, output_padding: of this rank's convolution.
        crop: (dimension, first, length) of a transposed result.
    """

    split: _Split
    shape: torch.Size
    halos: list[tuple[int, int, tuple[int, ...], tuple[Range, ...]]]
    behind: list[int]
    padding: list[int]
    output_padding: list[int]
    crop: list[tuple[int, int, int]]


_plans: BoundedCache[Any, _Plan] = BoundedCache()


def _planned(
    transposed: bool,
    mesh: Any,
    at: tuple[int, ...],
    x: torch.Size,
    x_placements: tuple[Any, ...],
    w: torch.Size,
    w_placements: tuple[Any, ...],
    p: _Parameters,
) -> _Plan:
    """Returns the plan of the rank `at` these coordinates of a mesh, for shapes and placements of x and w.

    Raises:
        ValueError: placements, shapes and parameters do not fit together, or a rank would have nothing to do.
    """
    taps, spans = w[2:], [d * (t - 1) for d, t in zip(p.dilation, w[2:], strict=True)]
    extents = [
        (n - 1) * s - sum(pads) + span + e + 1 if transposed else (n + sum(pads) - span - 1) // s + 1
        for n, s, pads, span, e in zip(x[2:], p.stride, p.pads, spans, p.extra, strict=True)
    ]
    split = _split(transposed, mesh, x_placements, w_placements, p.groups)
    shape = torch.Size((x[0], w[1] * p.groups if transposed else w[0], *extents))
    if min(extents) < 1:
        raise ValueError(f"the filter does not fit: an output of {tuple(shape)} from {tuple(x)}")
    if x[1] != (w[0] if transposed else w[1] * p.groups):
        raise ValueError(f"an input of {x[1]} channels does not fit {p.groups} group(s) of a weight of {tuple(w)}")
    _check_all_work("output", shape, split.y, mesh)
    _check_all_work("input", x, [q if q == Shard(1) else None for q in split.x], mesh)
    plan = _Plan(split, shape, [], [0] * len(taps), [before for before, _ in p.pads], list(p.extra), [])
    for i, (before, after) in enumerate(p.pads):
        if i not in split.space:
            plan.behind[i] = after - before
            continue
        m = split.space[i]
        outs = list(itertools.pairwise(bounds(extents[i], mesh.size(m))))
        want = tuple(_reach(transposed, out, taps[i], p.stride[i], before, p.dilation[i]) for out in outs)
        have = bounds(x[2 + i], mesh.size(m))
        if want != tuple(itertools.pairwise(have)):  # pointwise layers have all they need
            plan.halos.append((m, 2 + i, have, want))
        if transposed:
            (first, end), (lo, _) = outs[at[m]], want[at[m]]
            plan.crop.append((2 + i, first - (lo * p.stride[i] - before), end - first))
        plan.padding[i] = plan.output_padding[i] = 0
    return plan


def _convolve(
    transposed: bool, x: Any, w: Any, b: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any, groups: int
) -> DTensor:
    if not isinstance(x, DTensor):
        raise TypeError(f"input must be a DTensor, not {type(x).__name__}: tconv.functional takes plain tensors")
    mesh, rank = x.device_mesh, w.dim() - 2
    at = mesh.get_coordinate()
    if at is None:
        raise ValueError(f"this rank has no part in {mesh}")
    if isinstance(w, DTensor) and w.device_mesh != mesh:
        raise ValueError(f"weight is on {w.device_mesh}, input on {mesh}")
    if rank not in FORWARD or x.dim() != rank + 2:
        raise ValueError(f"an input of {x.dim()} dimensions, batch included, does not fit a weight of {w.dim()}")
    p = _parameters(transposed, w.shape[2:], stride, padding, output_padding, dilation, groups)
    placements = tuple(w.placements) if isinstance(w, DTensor) else (Replicate(),) * mesh.ndim
    key = transposed, mesh, tuple(at), x.shape, tuple(x.placements), w.shape, placements, p
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _planned(*key)
    return _run(transposed, plan, p, x, w, b)


def _run(transposed: bool, plan: _Plan, p: _Parameters, x: DTensor, w: Any, b: Any) -> DTensor:
    """Exchanges halos, convolves this rank's part, and sums over ranks."""
    s, mesh, rank = plan.split, x.device_mesh, len(p.stride)
    local, w, bias = _local(x, mesh, s.x), _local(w, mesh, s.w), None if b is None else _local(b, mesh, s.b)
    for m in s.sum_x:
        local = _sum_gradient(local, mesh.get_group(m))
    for m in s.sum_w:
        w = _sum_gradient(w, mesh.get_group(m))
        bias = None if bias is None else _sum_gradient(bias, mesh.get_group(m))
    for m, dim, have, want in plan.halos:
        local = _fetch(local, Halo(mesh.get_group(m), mesh.get_local_rank(m), dim, have, want))
    if any(plan.behind):
        local = F.pad(local, [n for behind in reversed(plan.behind) for n in (0, behind)])
    inside = bias if not s.sum_y else None
    if transposed:
        y = TRANSPOSED[rank](local, w, inside, p.stride, plan.padding, plan.output_padding, s.groups, p.dilation)
    else:
        y = FORWARD[rank](local, w, inside, p.stride, plan.padding, p.dilation, s.groups)
    for dim, first, length in plan.crop:
        y = y.narrow(dim, first, length)
    if y.stride() != _strides(y, y.shape):
        y = _empty(y, 0, y.shape[0]).copy_(y)
    for m in s.sum_y:
        y = _sum(y, mesh.get_group(m))
    if s.sum_y and bias is not None:
        y = y + bias.view(1, -1, *(1,) * rank)
    return DTensor.from_local(y, mesh, s.y, run_check=False, shape=plan.shape, stride=_strides(y, plan.shape))


def conv(
    input: DTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> DTensor:
    """Returns the 1-D, 2-D or 3-D convolution of a DTensor, computed by tconv's kernels on each rank's shard.

    Args:
        input: (N, C, *spatial), sharded over batch, channels or spatial dimensions, or replicated.
        weight, bias: DTensors on the input's mesh, or plain tensors that are the same on every rank.
        stride, padding, dilation, groups: as in `tconv.functional`.
    Returns:
        (N, K, *spatial), sharded like the input in batch and space. Sharded over output channels if the weight's output
        channels or the groups are sharded; replicated if the input channels are.
    Raises:
        ValueError: placements that do not fit together, an output of which a rank would have nothing, or invalid parameters:
            all ranks raise it, before any communication. Or this rank's part does not have the shape that DTensor gives it.
    """
    return _convolve(False, input, weight, bias, stride, padding, 0, dilation, groups)


def conv_transpose(
    input: DTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> DTensor:
    """Returns the 1-D, 2-D or 3-D transposed convolution of a DTensor; otherwise like `conv`."""
    return _convolve(True, input, weight, bias, stride, padding, output_padding, dilation, groups)


class _Forward(modules._Forward):
    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        if not isinstance(input, DTensor):
            return modules._Forward._conv_forward(self, input, weight, bias)
        if self.padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode={self.padding_mode!r} of a sharded input: only zeros")
        return conv(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class _Transposed(modules._Transposed):
    def forward(self, input: Any, output_size: list[int] | None = None) -> Any:
        if not isinstance(input, DTensor):
            return modules._Transposed.forward(self, input, output_size)
        known = self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        more = self._output_padding(input, output_size, *known)  # type: ignore[arg-type]  # torch's stubs want lists of int
        return conv_transpose(
            input, self.weight, self.bias, self.stride, self.padding, more, self.groups, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip


class Conv1d(_Forward, modules.Conv1d):
    """`tconv.Conv1d` that takes DTensors too."""


class Conv2d(_Forward, modules.Conv2d):
    """`tconv.Conv2d` that takes DTensors too."""


class Conv3d(_Forward, modules.Conv3d):
    """`tconv.Conv3d` that takes DTensors too."""


class ConvTranspose1d(_Transposed, modules.ConvTranspose1d):
    """`tconv.ConvTranspose1d` that takes DTensors too."""


class ConvTranspose2d(_Transposed, modules.ConvTranspose2d):
    """`tconv.ConvTranspose2d` that takes DTensors too."""


class ConvTranspose3d(_Transposed, modules.ConvTranspose3d):
    """`tconv.ConvTranspose3d` that takes DTensors too."""


LAYERS = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
TORCHS.update({layer: getattr(torch.nn, layer.__name__) for layer in LAYERS})  # so that `restore_` knows them
OURS = {base: layer for layer in LAYERS for base in (getattr(modules, layer.__name__), getattr(torch.nn, layer.__name__))}


def replace_(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces a model's convolution layers, torch.nn's and tconv's, by ones that also accept DTensors, in place.

    Parameters stay as they are. A plain parameter must be the same on every rank, and its gradient will be. Plain inputs are
    computed as before. Layers of a user's class, and lazy layers before their first call, are left alone. `tconv.restore_`
    restores the layers that were torch.nn's.

    Returns:
        The same model.
    Raises:
        TypeError: `model` is not a module.
    """
    checked("distributed.replace_", model)
    for module in model.modules():
        before = plain_class(module)
        if before in OURS:
            become(module, OURS[before])
            if before in SWAPPED:
                module.__dict__[MARK] = True
    return model
