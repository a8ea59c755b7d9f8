"""What tests/test_distributed.py runs on each rank. Every rank has the whole and compares its part with one process's result.

The mesh of the first so many ranks; the others have no part in a question and answer None.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import tconv
import tconv.distributed as td
from tests import oracle

KINDS = {"R": Replicate(), "N": Shard(0), "C": Shard(1), "K": Shard(0), "D": Shard(2), "H": Shard(3), "W": Shard(4)}


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """The first ranks of the world in that shape; every rank asks for the same ones in the same order."""
    return DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))


def outside(m: DeviceMesh) -> bool:
    return m.get_coordinate() is None


def part(whole: torch.Tensor, m: DeviceMesh, placements: Any) -> torch.Tensor:
    """This rank's part, cut here and not by DTensor."""
    for i, p in enumerate(placements):
        if isinstance(p, Shard):
            empty = whole.narrow(p.dim, 0, 0)
            pieces = [*whole.chunk(m.size(i), p.dim), *[empty] * m.size(i)]  # chunk may give fewer than asked for
            whole = pieces[m.get_local_rank(i)]
    return whole


def placed(whole: torch.Tensor, m: DeviceMesh, placements: Any) -> tuple[torch.Tensor, DTensor]:
    """A leaf that is this rank's part, and the DTensor of all of them."""
    memory = torch.preserve_format
    leaf = part(whole, m, placements).clone(memory_format=memory).requires_grad_()
    return leaf, DTensor.from_local(leaf, m, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def convolution(
    shape: tuple[int, ...], case: oracle.Case, x_at: str, w_at: str | None, y_at: str, dtype: Any, last: bool
) -> Any:
    """A case on a mesh of that shape: result and gradients, against one process in fp64; the passes that ran.

    Args:
        x_at, y_at: a letter per dimension of the mesh, of KINDS.
        w_at: the same; None for plain tensors.
    """
    m = mesh(*shape)
    if outside(m):
        return None
    x, w, b = oracle.tensors(case, dtype, "cpu", last)
    wide = (t.double() for t in (x, w, b))
    function = oracle.TRANSPOSED if case.transposed else oracle.FORWARD
    y, dx, dw, db = oracle.run(function[case.rank], case, *wide)
    places, y_places = [KINDS[c] for c in x_at], [KINDS[c] for c in y_at]
    x_part, x_whole = placed(x, m, places)
    if w_at is None:
        w_part, w_whole = (w.clone(memory_format=torch.preserve_format).requires_grad_(),) * 2
        b_part, b_whole = (b.clone().requires_grad_(),) * 2
        w_places = b_places = [Replicate()] * m.ndim
    else:
        w_places = [KINDS[c] for c in w_at]
        splits_outputs = [p == Shard(0 if case.groups > 1 or not case.transposed else 1) for p in w_places]
        b_places = [Shard(0) if s else Replicate() for s in splits_outputs]
        (w_part, w_whole), (b_part, b_whole) = placed(w, m, w_places), placed(b, m, b_places)
    with tconv.recording() as calls:
        convolve = td.conv_transpose if case.transposed else td.conv
        got = convolve(x_whole, w_whole, b_whole, **case.arguments)
        assert got.shape == y.shape
        assert list(got.placements) == y_places, got.placements
        upstream = part(oracle.upstream(y), m, y_places).to(dtype)
        (got.to_local() * upstream).sum().backward()
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 0.15}
    for name, found, right, at in (
        ("y", got.to_local(), y, y_places), ("dx", x_part.grad, dx, places), ("dw", w_part.grad, dw, w_places),
        ("db", b_part.grad, db, b_places),
    ):  # fmt: skip
        assert found.dtype == dtype, name
        torch.testing.assert_close(found.double(), part(right, m, at), **tolerance, msg=lambda t, n=name: f"{n}: {t}")
    if last and case.rank == 2:
        assert got.to_local().is_contiguous(memory_format=torch.channels_last)
    left = [str(c) for c in calls if not c.ours]
    return sorted(c.operation for c in calls), left, {n: part_bits(t) for n, t in (("dw", w_part.grad), ("db", b_part.grad))}


def part_bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


class UNet(nn.Module):
    """Two levels, a skip connection, a strided convolution down and a transposed one up."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
        self.stem = conv(1, 3, 3, padding=1)
        self.down = conv(3, 4, 3, stride=2, padding=1)
        self.inner = conv(4, 4, 3, padding=2, dilation=2)
        self.up = up(4, 3, 2, stride=2)
        self.head = conv(6, 2, 1)

    def forward(self, x: Any) -> Any:
        a = F.relu(self.stem(x))
        b = F.relu(self.inner(F.relu(self.down(a))))
        return self.head(torch.cat([a, self.up(b)], 1))


def unet(rank: int, shape: tuple[int, ...], x_at: str) -> Any:
    """A plain model on a sharded volume: output and every gradient as of one process."""
    m = mesh(*shape)
    if outside(m):
        return None
    model = UNet(rank).double()
    sharded = td.replace_(copy.deepcopy(model))
    x = torch.randn(1, 1, *(10, 14)[:rank], dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    places = [KINDS[c] for c in x_at]
    x_part, x_whole = placed(x.detach(), m, places)
    with tconv.recording() as calls:
        got = sharded(x_whole)
        got.square().sum().backward()
    torch.testing.assert_close(got.to_local(), part(y.detach(), m, places), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_part.grad, part(x.grad, m, places), rtol=1e-9, atol=1e-9)
    for (name, right), found in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert type(found) is nn.Parameter
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")
    return len(calls), [str(c) for c in calls if not c.ours]


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)
    )


def trained(kind: str, way: str) -> Any:
    """Two steps of two ranks, each on half of the batch, by DDP or FSDP2: parameters as of one process on all of it.

    tconv's kernels are reached by its layers, `replace_`, or by the override, `enable()`.
    """
    m = mesh(2)
    if outside(m):
        return None
    dtype = torch.bfloat16 if kind == "fsdp bf16" else torch.float64
    reference, model = small_model(), small_model()
    if way == "replace_":
        tconv.replace_(model)
    if dtype == torch.float64:
        reference, model = reference.double(), model.double()
    x = torch.randn(4, 2, 7, 6, dtype=next(model.parameters()).dtype)
    mine = x.chunk(2)[m.get_local_rank()]
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=m.get_group())
    else:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if kind == "fsdp bf16" else None
        more = {"mp_policy": policy} if policy else {}
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=m, **more)
        fully_shard(model, mesh=m, **more)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (reference, model)]
    with tconv.recording() as calls:
        for _ in range(2):
            for net, optimizer, data in zip((reference, model), optimizers, (x, mine), strict=True):
                optimizer.zero_grad()
                with tconv.enabled() if way == "enable()" and net is model else contextlib.nullcontext():
                    net(data).square().mean().backward()
                optimizer.step()
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
    for (name, right), found in zip(reference.named_parameters(), model.parameters(), strict=True):
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert found.dtype == right.dtype
        torch.testing.assert_close(found, right, **tolerance, msg=lambda t, n=name: f"{n}: {t}")
    return len(calls), [str(c) for c in calls if not c.ours]


def fsdp_and_space() -> Any:
    """Batch over one dimension of a mesh by FSDP2, space over the other: gradients as of one process."""
    m = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("batch", "space"))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3, stride=2, padding=1)).double()
    sharded = td.replace_(copy.deepcopy(model))
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    (model(x).square().sum() / 2).backward()  # FSDP2 averages over its ranks
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=m["batch"])
    mine = x.chunk(2)[m.get_local_rank("batch")]
    with tconv.recording() as calls:
        sharded(placed(mine, m["space"], [Shard(2)])[1]).square().sum().backward()
    for (name, right), found in zip(model.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad.full_tensor(), right.grad, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}"
        )
    return [str(c) for c in calls if not c.ours]


def plain_layer_on_a_dtensor() -> Any:
    """A tconv layer, not made distributed, on a batch that is sharded: torch's operator, the right result, said so."""
    m = mesh(2)
    if outside(m):
        return None
    layer = tconv.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    right = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    placed_layer = distribute_module(copy.deepcopy(layer), m)
    with tconv.recording() as calls:
        y = placed_layer(distribute_tensor(x, m, [Shard(0)]))
    torch.testing.assert_close(y.to_local(), part(right, m, [Shard(0)]))
    ours = td.replace_(placed_layer)
    with tconv.recording() as after:
        y = ours(distribute_tensor(x, m, [Shard(0)]))
        y.to_local().sum().backward()
    torch.testing.assert_close(y.to_local(), part(right, m, [Shard(0)]))
    grad = torch.autograd.grad(right.sum(), layer.weight)[0]
    torch.testing.assert_close(ours.weight.grad.full_tensor(), grad)
    return [str(c) for c in calls], [str(c) for c in after if not c.ours]


def plans() -> Any:
    """How many plans three equal calls and another one need."""
    m = mesh(2)
    if outside(m):
        return None
    x, w = placed(torch.randn(1, 2, 8), m, [Shard(2)])[1], torch.randn(3, 2, 3)
    made, planned = [], td._planned
    td._planned = lambda *args: made.append(args) or planned(*args)
    td._plans.clear()
    try:
        for stride in (1, 1, (1,), 2):
            td.conv(x, w, stride=stride, padding=1)
    finally:
        td._planned = planned
    return len(made)


def errors() -> Any:
    """What a rank is told, per bad call; every rank the same, so that none is left waiting."""
    m = mesh(2)
    if outside(m):
        return None

    def dtensor(shape: tuple[int, ...], *at: Any) -> DTensor:
        return placed(torch.zeros(shape), m, at)[1]

    x, w, form = dtensor((2, 4, 6, 6), Shard(2)), torch.zeros(4, 4, 3, 3), {"shape": torch.Size((2, 4, 6, 6))}
    wrong = DTensor.from_local(torch.zeros(2, 4, 4, 6), m, [Shard(2)], **form, stride=(144, 36, 6, 1))
    calls = {
        "plain": lambda: td.conv(torch.zeros(2, 4, 6, 6), w),
        "partial": lambda: td.conv(DTensor.from_local(torch.zeros(2, 4, 6, 6), m, [Partial()]), w),
        "weight and space": lambda: td.conv(x, dtensor((4, 4, 3, 3), Shard(0))),
        "groups": lambda: td.conv(dtensor((2, 3, 6, 6), Shard(1)), torch.zeros(3, 1, 3, 3), groups=3),
        "nothing": lambda: td.conv(x, torch.zeros(4, 4, 6, 3)),
        "does not fit": lambda: td.conv(x, torch.zeros(4, 4, 7, 3)),
        "channels": lambda: td.conv(x, torch.zeros(4, 3, 3, 3)),
        "stride": lambda: td.conv(x, w, stride=(1, 1, 1)),
        "same": lambda: td.conv(x, w, stride=2, padding="same"),
        "output padding": lambda: td.conv_transpose(x, w, stride=2, output_padding=2),
        "dimensions": lambda: td.conv(x, torch.zeros(4, 4, 3)),
        "share": lambda: td.conv(wrong, w),
        "circular": lambda: td.Conv2d(4, 4, 3, padding=1, padding_mode="circular")(x),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "nothing was raised"
        except Exception as e:
            told[name] = f"{type(e).__name__}: {e}"
    return told
