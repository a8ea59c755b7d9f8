"""Padding that differs by side, and the causal layers: as a padded copy would give it, without the copy."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import functional as TF
from tests import oracle
from tests.oracle import Case

FORWARD = {1: (TF.conv1d, F.conv1d), 2: (TF.conv2d, F.conv2d), 3: (TF.conv3d, F.conv3d)}
TRANSPOSED = {
    1: (TF.conv_transpose1d, F.conv_transpose1d),
    2: (TF.conv_transpose2d, F.conv_transpose2d),
    3: (TF.conv_transpose3d, F.conv_transpose3d),
}
# The padding of each dimension, (before, after), beside a case whose own padding is left out.
SIDES = {
    "causal 1-D": (Case("", (2, 5, 11), 6, (3,)), ((2, 0),)),
    "causal 1-D, dilated": (Case("", (2, 5, 11), 6, (3,), dilation=3), ((6, 0),)),
    "causal 3-D, around each frame": (Case("", (1, 4, 4, 5, 6), 5, (3, 3, 3)), ((2, 0), (1, 1), 1)),
    "after only, strided": (Case("", (2, 4, 9, 8), 6, (3, 3), stride=2), ((0, 1), (0, 1))),
    "more than the filter": (Case("", (2, 3, 4, 4), 4, (2, 2)), ((5, 0), (0, 7))),
    "a number beside a pair": (Case("", (2, 3, 6, 5), 4, (3, 3)), (1, (2, 0))),
    "groups": (Case("", (2, 8, 6, 6), 12, (3, 3), groups=4), ((2, 0), (0, 2))),
    "depthwise": (Case("", (2, 6, 9), 6, (4,), groups=6), ((3, 0),)),
    "few channels": (Case("", (2, 3, 9, 9), 8, (3, 3)), ((2, 1), (1, 0))),
    "pointwise": (Case("", (2, 4, 5, 5), 6, (1, 1)), ((1, 0), (0, 2))),
    "transposed, cropped after": (Case("", (2, 5, 7), 4, (4,), stride=2, transposed=True), ((0, 2),)),
    "transposed 2-D": (Case("", (2, 4, 5, 4), 4, (3, 3), stride=2, output_padding=1, transposed=True), ((2, 0), 1)),
}


def by_copy(case, padding, x, w, b):
    """The same by torch, of a padded copy, or cropped."""
    rank, pairs = case.rank, [p if isinstance(p, tuple) else (p, p) for p in padding]
    arguments = {k: v for k, v in case.arguments.items() if k != "padding"}
    if not case.transposed:
        return FORWARD[rank][1](F.pad(x, [p for pair in reversed(pairs) for p in pair]), w, b, **arguments)
    y = TRANSPOSED[rank][1](x, w, b, **arguments)
    return y[(..., *(slice(before, n - after) for n, (before, after) in zip(y.shape[2:], pairs, strict=True)))]


@pytest.fixture
def no_copy(monkeypatch):
    """Fails where anything pads a tensor."""
    monkeypatch.setattr(F, "pad", lambda *_, **__: pytest.fail("a padded copy"))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("case", "padding"), SIDES.values(), ids=SIDES)
def test_values_and_gradients(case, padding, channels_last, device, poisoned, monkeypatch):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float32, device, channels_last))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    right = by_copy(case, padding, *wide)
    dy = torch.randn_like(right)
    rights = torch.autograd.grad(right, wide, dy)
    monkeypatch.setattr(F, "pad", lambda *_, **__: pytest.fail("a padded copy"))
    ours = (TRANSPOSED if case.transposed else FORWARD)[case.rank][0]
    with tconv.recording() as calls:
        y = ours(x, w, b, **case.arguments | {"padding": padding})
        grads = torch.autograd.grad(y, (x, w, b), dy.float())
    assert all(c.ours for c in calls)
    for got, expected in zip((y, *grads), (right, *rights), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(("case", "padding"), SIDES.values(), ids=SIDES)
def test_where_torch_computes(case, padding, device):
    x, w, b = (t.round().to(torch.int64).cpu() for t in oracle.tensors(case, torch.float64, device))  # no kernel has integers
    if case.transposed:
        x, w, b = x.to(torch.complex64), w.to(torch.complex64), b.to(torch.complex64)
    ours = (TRANSPOSED if case.transposed else FORWARD)[case.rank][0]
    with tconv.recording() as calls:
        y = ours(x, w, b, **case.arguments | {"padding": padding})
    assert not calls[-1].ours
    torch.testing.assert_close(y, by_copy(case, padding, x, w, b))


def test_under_torch_compile_and_vmap(device, no_copy):
    x, w = torch.randn(2, 4, 9, device=device), torch.randn(6, 4, 3, device=device)

    def step(x):
        return TF.conv1d(x, w, padding=((2, 0),))

    right = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), right)
    torch.testing.assert_close(torch.vmap(step)(x), right)


def test_an_epilogue_after_it(device, no_copy):
    x, w = torch.randn(2, 4, 9, device=device), torch.randn(6, 4, 3, device=device)
    y = TF.conv1d(x, w, padding=((2, 0),), activation="silu")
    torch.testing.assert_close(y, F.silu(TF.conv1d(x, w, padding=((2, 0),))))


@pytest.mark.parametrize("bad", [((1, 2, 3),), ((-1, 0),), ((1, 0), (1, 0)), ((1.5, 0),), (("same", 0),)], ids=str)
def test_bad_padding(bad, device):
    x, w = torch.randn(2, 4, 9, device=device), torch.randn(6, 4, 3, device=device)
    for call in (lambda: TF.conv1d(x, w, padding=bad), lambda: TF.conv1d(x, w, padding=bad, activation="relu")):
        with pytest.raises(ValueError, match="padding must be a number or a pair"):
            call()


def test_a_layer(device, no_copy):
    layer = tconv.Conv3d(4, 6, 3, padding=((2, 0), (1, 1), (1, 1))).to(device)
    x = torch.randn(2, 4, 3, 5, 4, device=device)
    y = layer(x)
    assert tconv.last_calls()[-1].ours
    torch.testing.assert_close(y, TF.conv3d(x, layer.weight, layer.bias, padding=((2, 0), 1, 1)))
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)


# Causal layers

LAYERS = {
    "CausalConv1d": (lambda **more: tconv.CausalConv1d(4, 6, 3, **more), torch.nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "CausalConv3d": (lambda **more: tconv.CausalConv3d(4, 6, 3, padding=1, **more), torch.nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 5)),
}


@pytest.mark.parametrize("more", [{}, {"dilation": 2}, {"stride": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize(("make", "plain", "shape"), LAYERS.values(), ids=LAYERS)
def test_causal_layers(make, plain, shape, more, device, no_copy):
    layer, x = make(**more).to(device), torch.randn(shape, device=device)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    y = layer(x)
    assert tconv.last_calls()[-1].ours
    stride = more.get("stride", 1)
    assert y.shape[2] == (shape[2] - 1) // stride + 1
    for j in range(y.shape[2]):
        later = x.clone()
        later[:, :, j * stride + 1 :] = float("nan")
        assert torch.equal(layer(later)[:, :, : j + 1], y[:, :, : j + 1])


def test_a_causal_layer_that_repeats_the_first_frame(device):
    layer = tconv.CausalConv3d(4, 6, 3, padding=1, padding_mode="replicate").to(device)
    x = torch.randn(2, 4, 4, 5, 6, device=device)
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    torch.testing.assert_close(layer(x), F.conv3d(padded, layer.weight, layer.bias))


@pytest.mark.parametrize("bad", [(2, 1, 1), 1.5, "same", (1, "same"), ((1, 0.5), 1), None], ids=str)
def test_causal_layers_refuse_a_padding(bad):
    with pytest.raises(ValueError, match="for each of 2 dimensions"):
        tconv.CausalConv3d(4, 6, 3, padding=bad)
