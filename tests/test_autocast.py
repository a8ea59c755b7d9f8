"""Autocast: a weight is cast once, for as long as torch keeps its own casts, and never wrongly."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tconv
from tconv.dispatch import entry
from tests import parity

BF16 = torch.bfloat16


@pytest.fixture
def layers(device):
    """(tconv's layer, torch's, an input)"""
    return *parity.twins("Conv2d", 3, 4, 3, device=device), torch.randn(2, 3, 6, 6, device=device)


@pytest.fixture
def casts(monkeypatch):
    """The shapes of tensors that are cast to bf16 in Python."""
    found, to = [], torch.Tensor.to

    def counting(t, *args, **more):
        if t.numel():
            found.append(tuple(t.shape))
        return to(t, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    return found


def autocast(x, **more):
    return torch.autocast(x.device.type, BF16, **more)


def close(got, right):
    torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


def test_a_weight_is_cast_once_in_an_autocast(layers, casts):
    layer, _, x = layers
    for _ in range(2):
        casts.clear()
        with autocast(x):
            for _ in range(4):
                layer(x)
        assert sorted(casts) == sorted([(4,), (4, 3, 3, 3), *[(2, 3, 6, 6)] * 4])


@pytest.mark.parametrize("end", ["the outermost ends", "torch clears its cache"])
def test_casts_end_with_torchs(end, layers, casts):
    layer, _, x = layers
    with autocast(x):
        with autocast(x):
            layer(x)
        casts.clear()
        layer(x)
        assert casts == [(2, 3, 6, 6)]
        if end == "torch clears its cache":
            torch.clear_autocast_cache()
            layer(x)
    if end == "the outermost ends":
        with autocast(x):
            layer(x)
    assert len(casts) == 4


def test_nothing_is_kept_afterwards(device):
    layer, x = tconv.Conv2d(3, 4, 3, device=device), torch.randn(2, 3, 6, 6, device=device)
    with autocast(x):
        layer(x)
        weight = weakref.ref(layer.weight)
        del layer
    gc.collect()
    assert weight() is None


def test_torchs_cache_switched_off(layers, casts):
    layer, _, x = layers
    with autocast(x, cache_enabled=False):
        layer(x)
        layer(x)
    assert casts.count((4, 3, 3, 3)) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_an_edited_weight_is_cast_again(frozen, layers):
    layer, torchs, x = layers
    layer.weight.requires_grad_(not frozen)
    edits = {
        "in place": lambda p: p.detach().mul_(2),
        "its memory": lambda p: setattr(p, "data", 3 * p.data),
    }
    with autocast(x):
        for edit in (lambda p: p, *edits.values()):
            with torch.no_grad():
                for module in (layer, torchs):
                    edit(module.weight)
            with torch.autocast(x.device.type, BF16, cache_enabled=False):
                right = torchs(x)
            for _ in range(3):
                close(layer(x), right)


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
def test_a_cast_without_a_gradient_is_not_used_with_one(before, layers):
    layer, torchs, x = layers
    with autocast(x):
        for _ in range(3):
            with before():
                y = layer(x)
            assert not y.requires_grad
        layer(x).sum().backward()
        with before():
            assert torch.equal(layer(x), y)
    with autocast(x):
        torchs(x).sum().backward()
    close(layer.weight.grad, torchs.weight.grad)


def test_two_dtypes(layers):
    layer, _, x = layers
    with autocast(x):
        assert layer(x).dtype is BF16
        with torch.autocast(x.device.type, torch.float16):
            assert layer(x).dtype is torch.float16
        assert layer(x).dtype is BF16


def test_training(layers):
    """The layer is used twice in a step, checkpointed once; gradients are those of fp32 parameters."""
    layer, torchs, x = layers
    for _ in range(4):
        for module in (layer, torchs):
            module.zero_grad()
            with autocast(x):
                loss = module(x).float().square().sum() + checkpoint(module, x, use_reentrant=False).float().sum()
            loss.backward()
        for got, right in zip(layer.parameters(), torchs.parameters(), strict=True):
            assert got.grad.dtype is torch.float32
            torch.testing.assert_close(got.grad, right.grad, rtol=5e-2, atol=0.5)


def test_a_repeated_training_step_takes_the_short_way(layers, monkeypatch):
    layer, _, x = layers
    x.requires_grad_()
    entry.fast_paths.clear()

    def step():
        with autocast(x):
            y = layer(x)
        return torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    for _ in range(3):
        first = step()
    monkeypatch.delattr(entry, "geometry")
    with tconv.recording() as calls:
        second = step()
    assert all(map(torch.equal, first, second))
    parity.assert_ours(calls, "fprop", "dgrad", "wgrad", "bias")


def test_a_mode_sees_no_more_than_the_casts(layers):
    layer, _, x = layers

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    with autocast(x), Seen():
        layer(x)
    assert seen == ["aten._to_copy.default"] * 3 + ["tconv.fprop.default"]
