"""A bound `forward` that a tool keeps follows the layer's class, or the report says that it is in front of it.

The hooks are accelerate's, written again: `add_hook_to_module` and `remove_hook_from_module` of accelerate/hooks.py.
"""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import nn

import tconv
from tests import parity, third_party

LAYERS = {**{name: (getattr(nn, name), parity.rank(name)) for name in parity.LAYERS}, "a user's": (third_party.Documented, 2)}


class Hook:
    """Does nothing but count."""

    no_grad = False

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        return output


def add_hook(module, hook):
    if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward"):
        old_forward = module._old_forward
    else:
        old_forward = module.forward
        module._old_forward = old_forward
    module._hf_hook = hook

    def new_forward(module, *args, **kwargs):
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        output = module._old_forward(*args, **kwargs)
        return module._hf_hook.post_forward(module, output)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)
    return module


def remove_hook(module):
    del module._hf_hook
    module.forward = module._old_forward
    del module._old_forward
    return module


def ran(layer, x, expected, ours):
    """Asserts the result, and by whose kernels it came."""
    with tconv.recording() as calls:
        got = layer(x)
    parity.assert_same(got, expected)
    assert [call.ours for call in calls] == ([True] if ours else [])


@pytest.fixture(params=LAYERS)
def case(request, device):
    """A layer of torch.nn's or the user's, an input, and the result."""
    cls, rank = LAYERS[request.param]
    layer = cls(4, 6, 3).to(device)
    x = torch.randn(2, 4, *(5,) * rank, device=device)
    return layer, x, layer(x)


def test_hooked_then_replaced(case):
    layer, x, expected = case
    hook, lines = Hook(), []
    add_hook(layer, hook)
    tconv.replace_(layer, report=lines.append)
    assert lines[0].endswith(" (behind its own forward, set on the module)")
    ran(layer, x, expected, ours=True)
    assert hook.calls == 1
    remove_hook(layer)  # leaves the bound method on the module
    ran(layer, x, expected, ours=True)
    tconv.restore_(layer, report=lines.append)
    assert "behind" not in lines[1]
    ran(layer, x, expected, ours=False)


def test_hooked_replaced_and_restored(case):
    layer, x, expected = case
    cls = type(layer)
    kept = add_hook(layer, Hook())._old_forward
    tconv.restore_(tconv.replace_(layer))
    assert layer._old_forward == kept
    ran(layer, x, expected, ours=False)
    assert type(remove_hook(layer)) is cls
    ran(layer, x, expected, ours=False)


def test_replaced_hooked_and_restored(case):
    layer, x, expected = case
    lines = []
    add_hook(tconv.replace_(layer), Hook())
    ran(layer, x, expected, ours=True)
    tconv.restore_(layer, report=lines.append)
    assert lines[0].endswith(" (behind its own forward, set on the module)")
    ran(layer, x, expected, ours=False)
    remove_hook(layer)
    ran(layer, x, expected, ours=False)


def test_a_copy_of_a_hooked_layer(case):
    layer, x, expected = case
    twin = copy.deepcopy(tconv.replace_(add_hook(layer, Hook())))
    ran(twin, x, expected, ours=True)
    assert twin._old_forward.__self__ is twin
    tconv.restore_(twin)
    ran(twin, x, expected, ours=False)
    ran(layer, x, expected, ours=True)


def test_a_bound_method_that_a_closure_keeps(case):
    """Nobody can reach into it: ours runs on as long as it lasts, and becomes torch's with the layer."""
    layer, x, expected = case
    tconv.replace_(layer)
    kept, lines = layer.forward, []
    layer.forward = lambda x: kept(x)
    ran(layer, x, expected, ours=True)
    tconv.restore_(layer, report=lines.append)
    assert lines[0].endswith(" (behind its own forward, set on the module)")
    ran(layer, x, expected, ours=False)


def test_torchs_bound_method_that_a_closure_keeps(device):
    layer = nn.ConvTranspose2d(4, 6, 3).to(device)
    kept, lines = layer.forward, []
    layer.forward = lambda x: kept(x)
    x = torch.randn(2, 4, 5, 5, device=device)
    expected = layer(x)
    tconv.replace_(layer, report=lines.append)
    assert lines == ["model: torch.nn.ConvTranspose2d -> tconv.ConvTranspose2d (behind its own forward, set on the module)"]
    ran(layer, x, expected, ours=False)


def test_a_conv_forward_set_on_the_module(device):
    """As those who make images that tile do, to pad otherwise."""
    layer = nn.Conv2d(4, 6, 3, padding=1).to(device)

    def tiled(self, input, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = types.MethodType(tiled, layer)
    x, lines = torch.randn(2, 4, 5, 5, device=device), []
    expected = layer(x)
    tconv.replace_(layer, report=lines.append)
    assert lines == ["model: torch.nn.Conv2d -> tconv.Conv2d (behind its own _conv_forward, set on the module)"]
    ran(layer, x, expected, ours=False)
    layer._conv_forward = types.MethodType(tconv.Conv2d._conv_forward, layer)
    assert tconv.replace_(layer) is layer
    tconv.restore_(layer)
    assert layer._conv_forward.__func__ is nn.Conv2d._conv_forward


def test_methods_of_other_modules_are_left(device):
    first, second = nn.Conv2d(4, 4, 1).to(device), nn.Conv2d(4, 4, 1).to(device)
    first.neighbour = second.forward
    tconv.replace_(first)
    assert first.neighbour.__func__ is nn.Conv2d.forward
    assert first.neighbour.__self__ is second


def test_what_is_left_to_torch_through_a_method_that_outlived_the_class():
    """It used to raise "super(type, obj): obj must be an instance or subtype of type"."""
    transposed, layer = (tconv.replace_(make(4, 6, 3)) for make in (nn.ConvTranspose2d, nn.Conv2d))
    kept = transposed.forward, layer._conv_forward
    for m in (transposed, layer):
        tconv.restore_(m)
    whole = torch.ones(1, 4, 5, 5, dtype=torch.int64)  # which no kernel of tconv's takes
    weight = layer.weight.long()
    assert torch.equal(kept[1](whole, weight, None), layer._conv_forward(whole, weight, None))
    assert parity.outcome(lambda: kept[0](whole)) == parity.outcome(lambda: transposed(whole))  # an error of torch's
