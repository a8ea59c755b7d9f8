"""The layers are torch.nn's in everything but who computes: attributes, parameters, copies, hooks, utilities, formats."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import tconv
from tests import parity
from tests.parity import cl, plain

EVERY = [*parity.LAYERS, *parity.LAZY]
ATTRIBUTES = (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice", "training")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, the shape of an input and what else the layer is called with."""

    reason: str
    name: str
    args: tuple[Any, ...]
    x: tuple[int, ...]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.reason.replace(' ', '-')}"


def layers(name, **more):
    """Small twins of that name on the CPU."""
    args = (6, 3) if name.startswith("Lazy") else (4, 6, 3)
    return parity.twins(name, *args, **more)


def shape(name, n=2, c=4):
    return (n, c, *(5, 6, 4)[: parity.rank(name)])


def materialized(name, device="cpu"):
    """Small twins that have parameters: lazy ones after a first call."""
    pair = layers(name)
    for m in pair:
        if name.startswith("Lazy"):
            torch.manual_seed(3)
            m(torch.ones(shape(name)))
        m.to(device)
    return pair


def passes(name, bias=True):
    forward, backward = ("dgrad", "fprop") if "Transpose" in name else ("fprop", "dgrad")
    return (forward, backward, "wgrad", "bias") if bias else (forward, backward, "wgrad")


def same_answers(ours, torchs, x, what="", **call):
    """Asserts equal outputs and gradients, by the input and every parameter; returns the calls of our kernels."""
    their_x, x = parity.leaf(x), parity.leaf(x)
    expected = torchs(their_x, **call)
    with tconv.recording() as calls:
        got = ours(x, **call)
        grads = parity.parameter_gradients(got, x, ours)
    parity.assert_same(got, expected, f"output {what}")
    for name, g in parity.parameter_gradients(expected, their_x, torchs).items():
        parity.assert_same(grads[name], g, f"gradient by {name} {what}", weight=name != "input")
    assert [str(call) for call in calls if not call.ours] == []
    return calls


# --- construction ---


@pytest.mark.parametrize("name", EVERY)
def test_signatures_and_ancestry(name):
    ours, torchs = getattr(tconv, name), getattr(nn, name)
    assert issubclass(ours, torchs)
    assert ours.__name__ == torchs.__name__
    assert inspect.signature(ours) == inspect.signature(torchs)
    forwards = [inspect.signature(cls.forward).parameters.values() for cls in (ours, torchs)]
    assert [(p.name, p.kind, p.default) for p in forwards[0]] == [(p.name, p.kind, p.default) for p in forwards[1]]
    assert ours.__doc__
    if name.startswith("Lazy"):
        assert ours.cls_to_become is getattr(tconv, name.removeprefix("Lazy"))


ROWS = [
    Row("defaults", "Conv1d", (4, 6, 3), (2, 4, 9)),
    Row("defaults", "Conv3d", (2, 3, 2), (2, 2, 4, 3, 4)),
    Row("positional arguments in torch's order", "Conv2d", (4, 6, 3, 2, 1, 1, 2, False, "zeros"), (2, 4, 7, 6)),
    Row("positional arguments in torch's order", "ConvTranspose2d", (4, 6, 3, 2, 1, 1, 2, False, 2), (2, 4, 4, 5)),
    Row("a tuple for everything", "Conv2d", (4, 6, (3, 2)), (2, 4, 9, 8),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}),
    Row("depthwise", "Conv1d", (4, 8, 3), (2, 4, 9), {"groups": 4}),
    Row("same", "Conv2d", (4, 6, (4, 3)), (2, 4, 6, 7), {"padding": "same"}),
    Row("same, dilated", "Conv1d", (4, 6, 4), (2, 4, 12), {"padding": "same", "dilation": 3}),
    Row("valid", "Conv1d", (4, 6, 3), (2, 4, 9), {"padding": "valid", "stride": 2}),
    Row("unbatched", "Conv1d", (4, 6, 3), (4, 9)),
    Row("unbatched", "Conv2d", (4, 6, 3), (4, 6, 7), {"padding": 1}),
    Row("unbatched", "Conv3d", (2, 3, 2), (2, 3, 4, 3)),
    Row("unbatched", "ConvTranspose1d", (4, 6, 3), (4, 5), {"stride": 2}),
    Row("unbatched", "ConvTranspose2d", (4, 6, 3), (4, 4, 5), {"padding": 1}),
    Row("unbatched", "ConvTranspose3d", (2, 3, 2), (2, 2, 3, 2)),
    Row("output_padding", "ConvTranspose1d", (4, 6, 3), (2, 4, 5), {"stride": 3, "output_padding": 2}),
    Row("output_padding", "ConvTranspose3d", (2, 3, 2), (1, 2, 2, 3, 2), {"stride": 2, "output_padding": (0, 1, 1)}),
    Row("output size", "ConvTranspose1d", (4, 6, 3), (2, 4, 5), {"stride": 3}, {"output_size": [16]}),
    Row("output size with batch and channels", "ConvTranspose2d", (4, 6, 3), (2, 4, 4, 4), {"stride": 2},
        {"output_size": torch.Size((2, 6, 10, 9))}),
    Row("output size with channels, unbatched", "ConvTranspose2d", (4, 6, 3), (4, 4, 4), {"stride": 2},
        {"output_size": (6, 9, 10)}),
    Row("output size, batch and channels of it ignored", "ConvTranspose1d", (4, 6, 3), (2, 4, 5), {"stride": 2},
        {"output_size": [99, 99, 12]}),
    Row("output size beats output_padding", "ConvTranspose1d", (4, 6, 3), (2, 4, 5), {"stride": 2, "output_padding": 1},
        {"output_size": (11,)}),
    Row("output size, dilated", "ConvTranspose2d", (2, 3, 2), (2, 2, 3, 3), {"stride": 2, "dilation": 2, "padding": 1},
        {"output_size": (6, 5)}),
    Row("zeros in name", "Conv1d", (4, 6, 3), (2, 4, 9), {"padding": 2, "padding_mode": "zeros"}),
    Row("reflected", "Conv1d", (4, 6, 3), (2, 4, 9), {"padding": 2, "padding_mode": "reflect"}),
    Row("replicated beyond the input", "Conv2d", (4, 6, 3), (2, 4, 3, 4), {"padding": (5, 1), "padding_mode": "replicate"}),
    Row("circular, strided", "Conv2d", (4, 6, 3), (2, 4, 5, 6), {"padding": (1, 2), "stride": 2, "padding_mode": "circular"}),
    Row("circular, same", "Conv1d", (4, 6, 4), (2, 4, 9), {"padding": "same", "padding_mode": "circular"}),
    Row("reflected, unbatched", "Conv2d", (4, 6, 3), (4, 5, 6), {"padding": 1, "padding_mode": "reflect"}),
    Row("replicated", "Conv3d", (2, 3, 2), (1, 2, 3, 2, 3), {"padding": (0, 1, 1), "padding_mode": "replicate"}),
    Row("reflected", "Conv3d", (2, 3, 2), (1, 2, 3, 2, 3), {"padding": (0, 1, 1), "padding_mode": "reflect"}),
    Row("a padding mode without padding", "Conv2d", (4, 6, 3), (2, 4, 5, 6), {"padding_mode": "reflect"}),
    Row("numbers that are lists", "Conv2d", (4, 6, [3, 2]), (2, 4, 6, 7), {"stride": [2, 1], "padding": [1, 0]}),
    Row("fp64", "Conv2d", (4, 6, 3), (2, 4, 5, 6), {"dtype": torch.float64}),
    Row("no bias", "ConvTranspose3d", (2, 3, 2), (1, 2, 2, 2, 3), {"bias": False}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_layers_are_torchs(row, device):
    ours, torchs = parity.twins(row.name, *row.args, **row.more)
    assert repr(ours) == f"tconv.{torchs!r}"
    for attribute in ATTRIBUTES:
        assert getattr(ours, attribute) == getattr(torchs, attribute), attribute
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f"{key} was drawn otherwise"
    x = torch.randn(row.x, dtype=torchs.weight.dtype, device=device)
    calls = same_answers(ours.to(device), torchs.to(device), x, **row.call)
    assert sorted(call.operation for call in calls) == sorted(passes(row.name, torchs.bias is not None))


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_a_call_that_falls_back_is_padded_once(name, device, monkeypatch):
    ours, torchs = parity.twins(name, 4, 6, 3, padding=1, padding_mode="circular", dtype=torch.complex64)
    x = torch.randn(2, 4, *(5,) * parity.rank(name), dtype=torch.complex64)
    padded, pad = [], torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *args, **more: padded.append(1) or pad(*args, **more))
    assert torch.equal(ours(x), torchs(x))
    assert len(padded) == 2  # one of each layer


@pytest.mark.parametrize("name", parity.LAZY)
def test_lazy_layers_become_ours(name, device):
    ours, torchs = layers(name, device=device)
    assert repr(ours) == f"tconv.{torchs!r}"
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert ours.has_uninitialized_params()
    torch.manual_seed(1)
    x = torch.randn(shape(name), device=device)
    results = []
    for m in (ours, torchs):
        torch.manual_seed(2)
        results.append(m(x))
    parity.assert_same(*results)
    assert type(ours) is getattr(tconv, name.removeprefix("Lazy"))
    assert repr(ours) == f"tconv.{torchs!r}"
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f"{key} was drawn otherwise"


@pytest.mark.parametrize("name", parity.LAZY)
def test_a_lazy_layer_takes_a_regular_state_dict(name):
    regular = parity.twins(name.removeprefix("Lazy"), 4, 6, 3)[1]
    ours = layers(name)[0]
    ours.load_state_dict(regular.state_dict())
    assert not ours.has_uninitialized_params()
    assert torch.equal(ours.weight, regular.weight)


def test_an_initialisation_into_another_format_is_torchs():
    for pair in (parity.twins("Conv2d", 4, 6, 3), parity.twins("ConvTranspose2d", 4, 6, 3)):
        for m in pair:
            m.to(memory_format=torch.channels_last)
            torch.manual_seed(7)
            m.reset_parameters()
        ours, torchs = pair
        assert torch.equal(ours.weight, torchs.weight)
        assert torch.equal(ours.bias, torchs.bias)
        assert ours.weight.stride() == torchs.weight.stride()


@pytest.mark.parametrize("name", parity.LAYERS)
def test_meta_layers_have_torchs_shapes(name):
    ours, torchs = layers(name, device="meta", dtype=torch.bfloat16)
    x = torch.empty(shape(name), device="meta", dtype=torch.bfloat16)
    y, expected = ours(x), torchs(x)
    assert (y.shape, y.dtype, y.device, y.stride()) == (expected.shape, expected.dtype, expected.device, expected.stride())
    real = ours.to_empty(device="cpu")
    assert real.weight.shape == torchs.weight.shape
    assert real.weight.device.type == "cpu"


@pytest.mark.parametrize("name", parity.LAYERS)
def test_skip_init(name):
    args = (4, 6, 3)
    ours, torchs = (nn.utils.skip_init(getattr(library, name), *args, dtype=torch.float64) for library in (tconv, nn))
    assert type(ours) is getattr(tconv, name)
    assert (ours.weight.shape, ours.weight.dtype) == (torchs.weight.shape, torchs.weight.dtype)
    assert repr(ours) == f"tconv.{torchs!r}"


# --- copies ---


@pytest.mark.parametrize("name", EVERY)
def test_state_dicts_load_both_ways(name):
    for receiver, giver in (materialized(name), materialized(name)[::-1]):
        with torch.no_grad():
            giver.weight.add_(1)
            giver.bias.add_(1)
        receiver.load_state_dict(giver.state_dict(), strict=True)
        assert torch.equal(receiver.weight, giver.weight)
        assert torch.equal(receiver.bias, giver.bias)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "shallow", "pickle"]
)
@pytest.mark.parametrize("name", EVERY)
def test_copies_are_ours(name, copied):
    ours = layers(name, stride=2)[0].eval()
    twin = copied(ours)
    assert type(twin) is type(ours)
    assert repr(twin) == repr(ours)
    assert not twin.training
    assert list(twin.state_dict()) == list(ours.state_dict())
    if not name.startswith("Lazy"):
        assert torch.equal(twin.weight, ours.weight)


def test_a_pickle_from_before_padding_modes_loads():
    state = parity.twins("Conv2d", 4, 6, 3)[0].__getstate__()
    del state["padding_mode"]
    old = tconv.Conv2d.__new__(tconv.Conv2d)
    old.__setstate__(state)
    assert old.padding_mode == "zeros"
    assert old(torch.ones(1, 4, 3, 3)).shape == (1, 6, 1, 1)


def test_a_copy_computes_the_same(device):
    ours = tconv.Conv2d(4, 6, 3, padding=1, device=device)
    x = torch.randn(2, 4, 5, 6, device=device)
    with tconv.recording() as calls:
        assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    parity.assert_ours(calls, "fprop", "fprop")


# --- what may change after construction ---


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to a layer after it was built."""

    reason: str
    name: str
    change: Callable[[nn.Module], Any]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.reason.replace(' ', '-')}"


def assign(**attributes):
    def change(m):
        for name, value in attributes.items():
            setattr(m, name, value)

    return change


def regroup(m):
    m.groups = 2
    m.weight = nn.Parameter(m.weight.detach()[:, : m.weight.shape[1] // 2].clone())


def regroup_transposed(m):
    m.groups = 2
    m.weight = nn.Parameter(m.weight.detach()[:, :3].clone())


def widen(m):
    m.weight = nn.Parameter(torch.cat([m.weight.detach()] * 2))
    m.bias = nn.Parameter(torch.cat([m.bias.detach()] * 2))


CHANGES = [
    Change("padding taken away", "Conv2d", assign(padding=(0, 0)), {"padding": 1}),
    Change("padding as a number", "Conv1d", assign(padding=2)),
    Change("padding as a list", "Conv2d", assign(padding=[1, 0])),
    Change("padding becomes a string", "Conv1d", assign(padding="same")),
    Change("stride", "Conv2d", assign(stride=(2, 1))),
    Change("stride as a number", "Conv3d", assign(stride=2)),
    Change("dilation", "Conv2d", assign(dilation=(1, 2))),
    Change("groups, and the weight they need", "Conv2d", regroup),
    Change("more outputs, out_channels out of date", "Conv2d", widen),
    Change("bias removed", "Conv1d", assign(bias=None)),
    Change("bias frozen", "Conv1d", lambda m: m.bias.requires_grad_(False)),
    Change("weight frozen", "Conv2d", lambda m: m.weight.requires_grad_(False)),
    Change("another padding mode", "Conv2d", assign(padding_mode="circular"), {"padding": 1}),
    Change("padding of a mode that keeps its own", "Conv2d", assign(padding=(9, 9)), {"padding": 1, "padding_mode": "reflect"}),
    Change("transposed, stride", "ConvTranspose2d", assign(stride=(2, 3))),
    Change("transposed, padding", "ConvTranspose1d", assign(padding=(1,))),
    Change("transposed, output_padding", "ConvTranspose2d", assign(output_padding=(1, 0)), {"stride": 2}),
    Change("transposed, dilation", "ConvTranspose1d", assign(dilation=(2,))),
    Change("transposed, groups and the weight they need", "ConvTranspose2d", regroup_transposed),
    Change("transposed, bias removed", "ConvTranspose3d", assign(bias=None)),
    Change("to fp64", "Conv2d", lambda m: m.double()),
    Change("to channels_last", "Conv2d", lambda m: m.to(memory_format=torch.channels_last)),
    Change("weight without memory of its own", "Conv1d",
           lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach()[:1].expand(6, -1, -1)))),
    Change("spectral norm, old", "Conv2d", nn.utils.spectral_norm),
    Change("spectral norm, old", "ConvTranspose2d", nn.utils.spectral_norm),
    Change("weight norm, old", "Conv1d", nn.utils.weight_norm),
    Change("weight norm, old, another axis", "ConvTranspose1d", lambda m: nn.utils.weight_norm(m, dim=1)),
    Change("weight norm", "Conv2d", parametrizations.weight_norm),
    Change("weight norm", "ConvTranspose3d", parametrizations.weight_norm),
    Change("spectral norm", "ConvTranspose1d", parametrizations.spectral_norm),
    Change("orthogonal", "Conv2d", parametrizations.orthogonal),
    Change("pruned", "Conv2d", lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    Change("pruned for good", "ConvTranspose2d",
           lambda m: prune.remove(prune.ln_structured(m, "weight", amount=0.5, n=2, dim=1), "weight")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm
@pytest.mark.parametrize("row", CHANGES, ids=str)
def test_changes_after_construction_are_respected(row, device):
    ours, torchs = parity.twins(row.name, 4, 6, 3, **row.more)
    x = torch.randn(shape(row.name), device=device)
    for m in (ours.to(device), torchs.to(device)):
        torch.manual_seed(4)
        row.change(m)
        m.zero_grad(set_to_none=True)
    assert parity.outcome(lambda: repr(ours)) == parity.outcome(lambda: f"tconv.{torchs!r}")
    x = x.to(next(torchs.parameters()).dtype)
    for m in (ours, torchs):
        m.eval()  # spectral_norm's power iteration would move on with each call
    frozen = [p for p in (*ours.parameters(), *torchs.parameters()) if not p.requires_grad]
    if frozen:
        same_answers_of_frozen(ours, torchs, x)
    else:
        same_answers(ours, torchs, x)
    assert list(ours.state_dict()) == list(torchs.state_dict())


def same_answers_of_frozen(ours, torchs, x):
    results = []
    for m in (ours, torchs):
        y = m(x)
        y.sum().backward()
        results.append((y, m.weight.grad, m.bias.grad))
    for got, expected in zip(*results, strict=True):
        parity.assert_same(got, expected)


def test_an_overridden_conv_forward_is_called(device):
    class Standardised(tconv.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean(), bias)

    torch.manual_seed(0)
    m = Standardised(4, 6, 3, device=device)
    x = torch.randn(2, 4, 5, 6, device=device)
    with tconv.recording() as calls:
        got = m(x)
    parity.assert_same(got, torch.nn.functional.conv2d(x, m.weight - m.weight.mean(), m.bias))
    parity.assert_ours(calls, "fprop")


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_conv_forward_uses_the_weight_it_is_given(mode, device):
    ours, torchs = parity.twins("Conv2d", 4, 6, 3, padding=1, padding_mode=mode, device=device)
    x, w, b = (torch.randn(s, device=device) for s in ((2, 4, 5, 6), (5, 4, 2, 2), (5,)))
    with tconv.recording() as calls:
        parity.assert_same(ours._conv_forward(x, w, b), torchs._conv_forward(x, w, b))
        parity.assert_same(ours._conv_forward(x, w, None), torchs._conv_forward(x, w, None))
    parity.assert_ours(calls, "fprop", "fprop")


def test_a_subclass_may_call_forward_of_its_parent(device):
    class Doubled(tconv.ConvTranspose2d):
        def forward(self, input, output_size=None):
            return 2 * super().forward(input, output_size)

    m = Doubled(4, 6, 3, stride=2, device=device)
    plain = tconv.ConvTranspose2d(4, 6, 3, stride=2, device=device)
    plain.load_state_dict(m.state_dict())
    x = torch.randn(2, 4, 3, 3, device=device)
    parity.assert_same(m(x, output_size=(8, 7)), 2 * plain(x, output_size=(8, 7)))


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_hooks_run_in_torchs_order(name, device):
    logs = []
    for m in layers(name, device=device):
        log = []
        m.register_forward_pre_hook(lambda m, args, log=log: log.append(("pre", args[0].shape)))
        m.register_forward_hook(lambda m, args, y, log=log: log.append(("forward", y.shape)) or 2 * y)
        m.register_full_backward_pre_hook(lambda m, g, log=log: log.append(("backward pre", g[0].sum().item())))
        m.register_full_backward_hook(lambda m, gi, go, log=log: log.append(("backward", gi[0].shape, go[0].shape)))
        m.weight.register_hook(lambda g, log=log: log.append(("weight", g.shape)))
        m.weight.register_post_accumulate_grad_hook(lambda p, log=log: log.append(("accumulated", p.grad.shape)))
        x = torch.ones(shape(name), device=device, requires_grad=True)
        m(x).sum().backward()
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


@pytest.mark.parametrize("name", parity.LAYERS)
def test_functional_call(name, device):
    ours, torchs = layers(name, device=device)
    x = torch.randn(shape(name, n=1), device=device)
    others = {key: torch.randn_like(p) for key, p in torchs.named_parameters()}
    with tconv.recording() as calls:
        got = torch.func.functional_call(ours, others, (x,))
    parity.assert_same(got, torch.func.functional_call(torchs, others, (x,)))
    parity.assert_ours(calls, passes(name)[0])


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_per_sample_gradients(name, device):
    ours, torchs = layers(name, device=device)
    x = torch.randn(shape(name), device=device)
    for m in (ours, torchs):
        call_for_per_sample_grads(m)(x).sum().backward()
    parity.assert_same(ours.weight.grad_sample, torchs.weight.grad_sample)
    parity.assert_same(ours.bias.grad_sample, torchs.bias.grad_sample)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device):
    ours, torchs = layers("Conv2d", device=device)
    x = torch.randn(shape("Conv2d"), device=device)
    with mode(), tconv.recording() as calls:
        got, expected = ours(x), torchs(x)
    parity.assert_same(got, expected)
    assert (got.requires_grad, got.is_inference()) == (expected.requires_grad, expected.is_inference())
    parity.assert_ours(calls, "fprop")


# --- memory formats ---


def spread(t):
    """Every second element of a larger tensor."""
    return torch.stack([t, t], -1)[..., 0]


def flipped(t):
    """Spatial axes stored in the other order."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(t):
    return t[:1].expand_as(t)


@dataclasses.dataclass(frozen=True)
class Formats:
    """Strides of a layer's input and weight."""

    reason: str
    name: str
    x: Callable[[torch.Tensor], torch.Tensor]
    w: Callable[[torch.Tensor], torch.Tensor]
    n: int = 2
    c: int = 4
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.reason.replace(' ', '-')}"


FORMATS = [
    Formats("all contiguous", "Conv2d", plain, plain),
    Formats("input channels_last", "Conv2d", cl, plain),
    Formats("weight channels_last", "Conv2d", plain, cl),
    Formats("both channels_last", "Conv2d", cl, cl),
    Formats("both channels_last, one image", "Conv2d", cl, cl, n=1),
    Formats("one channel, both contiguous and channels_last", "Conv2d", cl, cl, c=1),
    Formats("input of one channel and one image", "Conv2d", cl, plain, n=1, c=1),
    Formats("contiguous, one channel", "Conv2d", plain, plain, c=1),
    Formats("pointwise, a weight in both formats at once", "Conv2d", plain, plain, more={"kernel_size": 1}),
    Formats("depthwise, channels_last", "Conv2d", cl, plain, more={"groups": 4, "out_channels": 4}),
    Formats("same, channels_last", "Conv2d", cl, plain, more={"padding": "same"}),
    Formats("input with gaps", "Conv2d", spread, plain),
    Formats("input with its rows and columns swapped", "Conv2d", flipped, plain),
    Formats("input expanded", "Conv2d", expanded, plain),
    Formats("weight with gaps", "Conv2d", plain, spread),
    Formats("weight expanded", "Conv2d", plain, expanded),
    Formats("1-D, all contiguous", "Conv1d", plain, plain),
    Formats("1-D, input NLC is not asked", "Conv1d", cl, plain),
    Formats("1-D, weight NLC", "Conv1d", plain, cl),
    Formats("1-D, both NLC, one image", "Conv1d", cl, cl, n=1),
    Formats("1-D, one channel", "Conv1d", plain, plain, c=1),
    Formats("1-D, an input both contiguous and NLC", "Conv1d", cl, plain, c=1),
    Formats("transposed 1-D, an input both contiguous and NLC", "ConvTranspose1d", cl, plain, c=1),
    # Not for one image, one channel or a pointwise kernel: torch's CPU kernels for those know no channels_last_3d.
    Formats("3-D, all contiguous", "Conv3d", plain, plain),
    Formats("3-D, input channels_last", "Conv3d", cl, plain),
    Formats("3-D, weight channels_last", "Conv3d", plain, cl),
    Formats("transposed, all contiguous", "ConvTranspose2d", plain, plain),
    Formats("transposed, input channels_last", "ConvTranspose2d", cl, plain),
    Formats("transposed, weight channels_last", "ConvTranspose2d", plain, cl),
    Formats("transposed, one image", "ConvTranspose2d", cl, cl, n=1),
    Formats("transposed, one channel", "ConvTranspose2d", cl, cl, c=1),
    Formats("transposed 1-D, weight NLC", "ConvTranspose1d", plain, cl),
    Formats("transposed 1-D, input NLC", "ConvTranspose1d", cl, plain),
    Formats("transposed 3-D, channels_last", "ConvTranspose3d", cl, cl),
]


@pytest.mark.parametrize("row", FORMATS, ids=str)
def test_results_have_torchs_strides(row, device):
    kernel = 2 if parity.rank(row.name) == 3 else 3
    more = {"in_channels": row.c, "out_channels": 6, "kernel_size": kernel, **row.more}
    ours, torchs = parity.twins(row.name, **more, device=device)
    for m in (ours, torchs):
        m.weight = nn.Parameter(row.w(m.weight.detach()))
    x = row.x(torch.randn(shape(row.name, row.n, row.c), device=device))
    assert parity.leaf(x).stride() == x.stride()
    same_answers(ours, torchs, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_formats_of_other_dtypes(dtype, device):
    for name, x_format, w_format in (("Conv2d", cl, plain), ("ConvTranspose2d", plain, cl)):
        ours, torchs = layers(name, device=device, dtype=dtype)
        for m in (ours, torchs):
            m.weight = nn.Parameter(w_format(m.weight.detach()))
        x = x_format(torch.randn(shape(name), device=device, dtype=dtype))
        same_answers(ours, torchs, x, name)


# --- values ---


@dataclasses.dataclass(frozen=True)
class Special:
    """Where a value that is not finite is put: an index into the input or the weight."""

    reason: str
    name: str
    value: float
    into: str
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.reason.replace(' ', '-')}"


INF, NAN = float("inf"), float("nan")
SPECIALS = [
    Special("an infinite weight meets the halo's zeros", "Conv2d", INF, "weight", {"padding": 1}),
    Special("an infinite weight without halo", "Conv2d", INF, "weight"),
    Special("an infinite weight, depthwise", "Conv2d", INF, "weight", {"padding": 1, "groups": 4, "out_channels": 4}),
    Special("an infinite weight, 1-D", "Conv1d", INF, "weight", {"padding": 2}),
    Special("an infinite input", "Conv2d", -INF, "input", {"padding": 1}),
    Special("a NaN weight stays in its outputs", "Conv2d", NAN, "weight", {"padding": 1}),
    Special("a NaN input reaches its window only", "Conv2d", NAN, "input", {"padding": 1, "stride": 2}),
    Special("a NaN in one group", "Conv1d", NAN, "input", {"groups": 2}),
    Special("a NaN input, transposed", "ConvTranspose2d", NAN, "input", {"stride": 2}),
    Special("an infinite input, transposed", "ConvTranspose1d", INF, "input", {"stride": 2}),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which is the interpreter
@pytest.mark.parametrize("row", SPECIALS, ids=str)
def test_values_that_are_not_finite(row, device):
    more = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **row.more}
    ours, torchs = parity.twins(row.name, **more, device=device)
    x = torch.randn(shape(row.name), device=device)
    with torch.no_grad():
        for t in [x] if row.into == "input" else [ours.weight, torchs.weight]:
            t[0, 0, ..., 0] = row.value
    # In fp64 on the CPU, where torch multiplies the halo's zeros too; its fp32 kernels do or not, depending on the shape.
    expected = torchs.cpu().double()(x.cpu().double())
    assert not expected.isfinite().all()
    assert expected.isfinite().any()
    with tconv.recording() as calls:
        got = ours(x)
    parity.assert_ours(calls, passes(row.name)[0])
    parity.assert_same(got, expected.to(got))


# --- autocast ---


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(name, dtype, device):
    results = []
    for m in layers(name, device=device):
        torch.manual_seed(1)
        x = torch.randn(shape(name), device=device, requires_grad=True)
        with torch.autocast(device, dtype=dtype), tconv.recording() as calls:
            y = m(x)
        y.float().sum().backward()
        results.append((y, x.grad, m.weight.grad, m.bias.grad))
        if isinstance(m, getattr(tconv, name)):
            parity.assert_ours(calls, passes(name)[0])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert [t.dtype for t in results[0]] == [dtype, *[torch.float32] * 3]


def test_autocast_leaves_fp64_and_disabled_regions_alone(device):
    ours, torchs = layers("Conv2d", device=device, dtype=torch.float64)
    x = torch.randn(shape("Conv2d"), device=device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        parity.assert_same(ours(x), torchs(x))
        with torch.autocast(device, enabled=False):
            assert ours.float()(x.float()).dtype == torch.float32


def test_autocast_joins_tensors_of_two_dtypes(device):
    ours, torchs = layers("Conv2d", device=device)
    x = torch.randn(shape("Conv2d"), device=device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        got, expected = ours(x), torchs(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    parity.assert_same(got, expected)
