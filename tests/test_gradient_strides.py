"""A weight's gradient has the weight's own strides where two memory formats are the same memory, so that DDP can take it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tconv
from tests import parity
from tests.parity import cl, plain


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the extent of its input, the formats of input and weight, and whether torch's CPU strides are these too."""

    name: str
    args: tuple[int, ...]
    x: Callable[[torch.Tensor], torch.Tensor]
    w: Callable[[torch.Tensor], torch.Tensor]
    groups: int = 1
    n: int = 2
    extent: int = 3
    torchs: bool = True

    def __str__(self) -> str:
        formats = f"{self.x.__name__},{self.w.__name__}"
        return f"{self.name}{self.args}-groups{self.groups}-{self.n}x{self.extent}-{formats}"


FORMATS = list(itertools.product((plain, cl), repeat=2))
# Torch's CPU kernels of channels_last depthwise filters and of 3-D layers of one tap have strides of their own.
CASES = [
    *(Case(name, (8, 6, 1), *formats, torchs=parity.rank(name) < 3) for name in parity.LAYERS for formats in FORMATS),
    *(Case("Conv2d", (4, 8, 3), *formats, groups=4, torchs=formats != (cl, plain)) for formats in FORMATS),
    *(Case("ConvTranspose2d", (4, 4, 3), *formats, groups=4, torchs=formats != (cl, plain)) for formats in FORMATS),
    Case("Conv2d", (8, 6, 1), cl, plain, groups=2),
    Case("Conv2d", (8, 6, 1), cl, plain, n=1),
    Case("Conv2d", (8, 6, 1), cl, plain, extent=1),
    Case("Conv2d", (8, 1, 1), cl, plain),
    Case("Conv2d", (1, 8, 1), cl, plain),
    Case("Conv1d", (8, 6, 1), cl, plain, extent=1),
]


def gradients(layer, case, device, run=None):
    """The gradients by input and weight, the latter as it is accumulated."""
    torch.manual_seed(0)
    layer.weight = nn.Parameter(case.w(layer.weight.detach()))
    x = case.x(torch.randn(case.n, case.args[0], *(case.extent,) * parity.rank(case.name), device=device)).requires_grad_()
    (layer if run is None else run)(x).square().sum().backward()
    return x.grad, layer.weight


def assert_strides(case, device, got, torchs):
    """The weight's gradient as the weight, the input's as torch's, and the weight's as torch's where that is so on CPUs."""
    dx, w = got
    assert w.grad.stride() == w.stride()
    if case.torchs and device == "cpu":
        expected, theirs = gradients(torchs, case, device)
        assert dx.stride() == expected.stride()
        assert w.grad.stride() == theirs.grad.stride()
        parity.assert_same(w.grad, theirs.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_layers(case, device):
    ours, torchs = parity.twins(case.name, *case.args, groups=case.groups, device=device)
    with tconv.recording() as calls:
        got = gradients(ours, case, device)
    assert all(call.ours for call in calls)
    assert_strides(case, device, got, torchs)
    again = gradients(ours, dataclasses.replace(case, w=lambda t: t), device)  # the remembered backward
    assert again[1].grad.stride() == again[1].stride()


@pytest.mark.parametrize("case", [CASES[i] for i in (6, 18, 26)], ids=str)
def test_of_compiled_layers(case, device):
    """Graphs hold the operators, which have to say the same of a fake tensor as of a real one."""
    ours, torchs = parity.twins(case.name, *case.args, groups=case.groups, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_strides(case, device, gradients(ours, case, device, compiled), torchs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_under_the_override(case, device):
    ours, torchs = (getattr(nn, case.name)(*case.args, groups=case.groups, device=device) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    with tconv.enabled(), tconv.recording() as calls:
        got = gradients(ours, case, device)
    assert calls
    assert all(call.ours for call in calls)
    assert_strides(case, device, got, torchs)


@pytest.fixture
def one_rank():
    """A process group of this process alone; warnings that torch gives once are given each time."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_warn_always(always)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("way", ["replace_", "enable()"])
def test_ddp_takes_the_gradients_as_they_are(way, one_rank, device):
    """Layers in the default format on a channels_last input: of one tap, depthwise, transposed."""
    layers = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ConvTranspose2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers).to(device)
    if way == "replace_":
        tconv.replace_(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = cl(torch.randn(2, 8, 4, 4, device=device))
    with warnings.catch_warnings(record=True) as caught, tconv.recording() as calls:
        warnings.simplefilter("always")
        with tconv.enabled() if way == "enable()" else contextlib.nullcontext():
            for _ in range(2):
                wrapped(x).square().sum().backward()
    assert sum(call.operation == "wgrad" for call in calls) == 2 * len(layers)
    assert [str(w.message) for w in caught if "strides" in str(w.message).lower()] == []
