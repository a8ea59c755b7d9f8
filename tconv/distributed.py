"""Convolutions of tensors that no single device holds: DTensors sharded over batch, channels or space.

A shard is a rank's part of one dimension, cut as DTensor cuts it (`bounds`): where a shard lies follows from the whole's
extent and the number of ranks alone, so any two tensors of one extent agree, whichever layers made them (skip connections).
Each rank runs tconv's own functions on what its part of the result needs:

    sharded               each rank first, or last
    batch                 nothing
    space                 fetches the halo that its outputs read from whichever ranks hold it; zeros beyond the whole
    input channels        last, sums the outputs
    output channels       last, sums the gradients of the input
    groups                nothing

A weight that several parts of the input met has its gradients summed. The adjoint of a halo's exchange sends each gradient
back to where its element lives, and adds them in the order of the ranks: the same bits every run.

Import it by its name; `import tconv` does not load torch's DTensor.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard

from tconv import functional, modules
from tconv.dispatch.dynamo import opaque
from tconv.swap import MARK, TORCHS, become, checked, plain_class
from tconv.swap import OURS as SWAPPED

FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
Range = tuple[int, int]
_met: weakref.WeakSet[Any] = weakref.WeakSet()  # groups all of whose ranks have spoken once


def bounds(extent: int, ranks: int) -> tuple[int, ...]:
    """Where the shards of a dimension begin, and its end: rank r holds [bounds[r], bounds[r + 1]), as of `torch.chunk`.

    Example:
        >>> bounds(10, 3)
        (0, 4, 8, 10)
    """
    each = -(-extent // ranks)
    return tuple(min(r * each, extent) for r in range(ranks + 1))


@dataclass(frozen=True)
class Halo:
    """One dimension's exchange: what the ranks of a group have of it, and what each wants.

    Attributes:
        group: their process group.
        rank: this one's place in it.
        dim: the tensor's dimension.
        have: `bounds` of the whole.
        want: per rank the range that it computes from; may reach beyond the whole, where there are zeros.
    """

    group: Any
    rank: int
    dim: int
    have: tuple[int, ...]
    want: tuple[Range, ...]

    def shared(self, owner: int, reader: int) -> Range:
        """What one rank has of what another wants; empty where the end is not larger."""
        (a, b), (lo, hi) = (self.have[owner], self.have[owner + 1]), self.want[reader]
        return max(a, lo), min(b, hi)

    def of_shard(self, t: torch.Tensor, part: Range) -> torch.Tensor:
        """A range of the whole in this rank's shard."""
        return t.narrow(self.dim, part[0] - self.have[self.rank], part[1] - part[0])

    def of_wanted(self, t: torch.Tensor, part: Range) -> torch.Tensor:
        """A range of the whole in what this rank wants."""
        return t.narrow(self.dim, part[0] - self.want[self.rank][0], part[1] - part[0])

    def fetch(self, shard: torch.Tensor) -> torch.Tensor:
        """What this rank wants, of everyone's shards."""
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
        """The adjoint of `fetch`: gradients of this rank's shard from those of what everyone wanted."""
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
        """The other ranks for whom a range is not empty, ascending, with it."""
        ranges = [(r, part(r)) for r in range(len(self.want)) if r != self.rank]
        return [(r, found) for r, found in ranges if found[1] > found[0]]

    def _swap(
        self, give: dict[int, torch.Tensor], take: dict[int, torch.Tensor], device: torch.device
    ) -> dict[int, torch.Tensor]:
        """Sends pieces and receives others of the shapes in `take`; both by rank, ascending."""
        if self.group not in _met:  # NCCL wants all of a group to speak before some of it exchange in pairs
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            _met.add(self.group)
        came = {r: torch.empty_like(piece, memory_format=torch.contiguous_format) for r, piece in take.items()}
        peer = [dist.get_global_rank(self.group, r) for r in range(len(self.want))]
        ops = [dist.P2POp(dist.isend, piece.contiguous(), peer[r], self.group) for r, piece in give.items()]
        ops += [dist.P2POp(dist.irecv, piece, peer[r], self.group) for r, piece in came.items()]
        for request in dist.batch_isend_irecv(ops) if ops else ():
            request.wait()
        return came


def _empty(like: torch.Tensor, dim: int, extent: int) -> torch.Tensor:
    """Memory in the layout of a tensor, with another extent of one dimension."""
    shape = [*like.shape[:dim], extent, *like.shape[dim + 1 :]]
    return torch.empty_strided(shape, _strides(like, shape), dtype=like.dtype, device=like.device)


def _strides(like: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Dense strides of a shape, its dimensions in the order of a tensor's."""
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
    """What every rank holds alike and uses for another part of the work."""

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
    """The sum over the ranks, which then all hold it."""

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
    """The sum over a group's ranks, of 16-bit floats in fp32 and rounded once."""
    wide = torch.promote_types(t.dtype, torch.float32)
    total = torch.empty(t.shape, dtype=wide, device=t.device).copy_(t)
    dist.all_reduce(total, group=group)
    return total if total.dtype == t.dtype and t.is_contiguous() else torch.empty_like(t).copy_(total)


@dataclass
class _Split:
    """How a convolution is cut over a mesh.

    Attributes:
        x, w, b, y: placements, one per dimension of the mesh.
        space: spatial dimension -> dimension of the mesh that cuts it.
        sum_x, sum_w: dimensions of the mesh over which gradients of x, and of w and b, are summed.
        sum_y: those over which y is.
        groups: of each rank's convolution.
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


def _split(transposed: bool, x: DTensor, w: torch.Tensor, groups: int) -> _Split:
    """How x and w, as they lie, are to be convolved, or ValueError."""
    mesh, n = x.device_mesh, x.device_mesh.ndim
    whole = [Replicate()] * n
    if isinstance(w, DTensor) and w.device_mesh != mesh:
        raise ValueError(f"weight is on {w.device_mesh}, input on {mesh}")
    given = list(w.placements) if isinstance(w, DTensor) else whole
    s = _Split(list(x.placements), list(given), list(whole), list(whole), {}, [], [], [], groups)
    reads, writes = (Shard(0), Shard(1)) if transposed else (Shard(1), Shard(0))  # the weight's channels
    for m, (px, pw) in enumerate(zip(x.placements, given, strict=True)):
        known = type(px) in (Replicate, Shard) and type(pw) in (Replicate, Shard)
        if known and isinstance(px, Shard) and px.dim != 1 and pw == Replicate():
            s.y[m] = px
            s.sum_w.append(m)
            if px.dim >= 2:
                if px.dim - 2 in s.space:
                    raise ValueError(f"input dimension {px.dim} is cut by two dimensions of the mesh: {x.placements}")
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
    """This rank's part of a tensor that is placed so, a plain one being the same on every rank; differentiable."""
    if not isinstance(t, DTensor):
        if all(p == Replicate() for p in placements):
            return t  # type: ignore[no-any-return]
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
    """The inputs that a range of outputs reads, those beyond the input's ends included."""
    (a, b), span = out, dilation * (taps - 1)
    if not transposed:
        return a * stride - before, (b - 1) * stride - before + span + 1
    # Input i writes i*stride - before + dilation*t. The second of each pair makes the result reach over the gaps of a
    # stride that is wider than the filter.
    lo = min(-((span - a - before) // stride), (a + before) // stride)
    last = max((b - 1 + before) // stride, -((span + 1 - b - before) // stride))
    return lo, last + 1


def _check_all_work(what: str, shape: Sequence[int], placements: Sequence[Any], mesh: Any) -> None:
    """That no rank is left without channels or pixels."""
    for m, p in enumerate(placements):
        if isinstance(p, Shard) and p.dim and bounds(shape[p.dim], mesh.size(m))[-2] == shape[p.dim]:
            extent, ranks = shape[p.dim], mesh.size(m)
            raise ValueError(f"{what} dimension {p.dim}, {extent} long, leaves one of {ranks} ranks without any")


def _each(value: Any, rank: int, name: str) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= rank
    if len(values) != rank or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be a number or {rank} of them, not {value!r}")
    return values


def _convolve(
    transposed: bool, x: Any, w: Any, b: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any, groups: int
) -> DTensor:
    if not isinstance(x, DTensor):
        raise TypeError(f"input must be a DTensor, not {type(x).__name__}: tconv.functional takes plain tensors")
    mesh, rank = x.device_mesh, w.dim() - 2
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank has no part in {mesh}")
    if rank not in FORWARD or x.dim() != rank + 2:
        raise ValueError(f"an input of {x.dim()} dimensions, batch included, does not fit a weight of {w.dim()}")
    taps = tuple(w.shape[2:])
    stride, dilation = _each(stride, rank, "stride"), _each(dilation, rank, "dilation")
    extra = _each(output_padding, rank, "output_padding")
    spans = [d * (t - 1) for d, t in zip(dilation, taps, strict=True)]
    if padding == "same" and max(stride) == 1 and not transposed:
        pads = [(span // 2, span - span // 2) for span in spans]  # the odd one behind, as torch has it
    elif isinstance(padding, str):
        if padding != "valid" or transposed:
            raise ValueError(f"padding={padding!r} with stride {stride}")
        pads = [(0, 0)] * rank
    else:
        pads = [(p, p) for p in _each(padding, rank, "padding")]
    if min(stride) < 1 or min(dilation) < 1 or min(map(min, pads)) < 0 or min(extra) < 0:
        raise ValueError("strides and dilations must be positive, paddings not negative")
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding {extra} must be smaller than stride {stride} or dilation {dilation}")
    extents = [
        (n - 1) * s - sum(p) + span + e + 1 if transposed else (n + sum(p) - span - 1) // s + 1
        for n, s, p, span, e in zip(x.shape[2:], stride, pads, spans, extra, strict=True)
    ]
    s = _split(transposed, x, w, groups)
    whole = (x.shape[0], w.shape[1] * groups if transposed else w.shape[0], *extents)
    if min(extents) < 1:
        raise ValueError(f"the filter does not fit: an output of {whole} from {tuple(x.shape)}")
    if x.shape[1] != (w.shape[0] if transposed else w.shape[1] * groups):
        raise ValueError(f"an input of {x.shape[1]} channels does not fit {groups} group(s) of a weight of {tuple(w.shape)}")
    _check_all_work("output", whole, s.y, mesh)
    _check_all_work("input", x.shape, [p if p == Shard(1) else None for p in s.x], mesh)

    local, w, bias = _local(x, mesh, s.x), _local(w, mesh, s.w), None if b is None else _local(b, mesh, s.b)
    for m in s.sum_x:
        local = _sum_gradient(local, mesh.get_group(m))
    for m in s.sum_w:
        w = _sum_gradient(w, mesh.get_group(m))
        bias = None if bias is None else _sum_gradient(bias, mesh.get_group(m))
    crop: list[tuple[int, int, int]] = []  # dimension, first, length of a transposed result
    for i in range(rank):
        if i in s.space:
            m = s.space[i]
            ranks, me = mesh.size(m), mesh.get_local_rank(m)
            cuts = bounds(extents[i], ranks)
            outs = list(itertools.pairwise(cuts))
            want = tuple(_reach(transposed, out, taps[i], stride[i], pads[i][0], dilation[i]) for out in outs)
            have = bounds(x.shape[2 + i], ranks)
            if want != tuple(itertools.pairwise(have)):  # pointwise layers have all they need
                local = _fetch(local, Halo(mesh.get_group(m), me, 2 + i, have, want))
            if transposed:
                crop.append((2 + i, outs[me][0] - (want[me][0] * stride[i] - pads[i][0]), outs[me][1] - outs[me][0]))
        elif pads[i][1] > pads[i][0]:
            local = F.pad(local, [0, 0] * (rank - 1 - i) + [0, pads[i][1] - pads[i][0]])
    sides = [0 if i in s.space else pads[i][0] for i in range(rank)]
    inside = bias if not s.sum_y else None
    if transposed:
        ends = [0 if i in s.space else extra[i] for i in range(rank)]
        y = TRANSPOSED[rank](local, w, inside, stride, sides, ends, s.groups, dilation)
    else:
        y = FORWARD[rank](local, w, inside, stride, sides, dilation, s.groups)
    for dim, first, length in crop:
        y = y.narrow(dim, first, length)
    if y.stride() != _strides(y, y.shape):
        y = _empty(y, 0, y.shape[0]).copy_(y)
    for m in s.sum_y:
        y = _sum(y, mesh.get_group(m))
    if s.sum_y and bias is not None:
        y = y + bias.view(1, -1, *(1,) * rank)
    return DTensor.from_local(y, mesh, s.y, run_check=False, shape=torch.Size(whole), stride=_strides(y, whole))


def conv(
    input: DTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> DTensor:
    """The 1-D, 2-D or 3-D convolution of a DTensor, by tconv's kernels on each rank's shard.

    Args:
        input: (N, C, *spatial), sharded over batch, channels or spatial dimensions, or replicated.
        weight, bias: DTensors on the input's mesh, or plain tensors that are the same on every rank.
        others: as `tconv.functional` takes them.
    Returns:
        (N, K, *spatial), sharded like the input; over output channels where weight or groups are; replicated where input
        channels were.
    Raises:
        ValueError: placements that fit no convolution, an output of which a rank would hold nothing, bad parameters. On
            every rank alike, before anything is sent.
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
    """The transposed convolution of a DTensor; otherwise as `conv`."""
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
        more = self._output_padding(input, output_size, *known)  # type: ignore[arg-type]
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
    """Makes the convolutions of a model, torch.nn's and tconv's, ones that take DTensors too, in place.

    Parameters stay as they are: plain ones count as the same on every rank, and so do their gradients. Plain inputs are
    computed as before. Layers of a class of the user's own, and lazy ones before their first call, are left as they are.
    `tconv.restore_` makes those that were torch.nn's so again.

    Returns:
        The same model.
    Raises:
        TypeError: `model` is no module.
    """
    checked("distributed.replace_", model)
    for module in model.modules():
        before = plain_class(module)
        if before in OURS:
            become(module, OURS[before])
            if before in SWAPPED:
                module.__dict__[MARK] = True
    return model
