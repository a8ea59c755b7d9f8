"""`freeze` keeps the copies of weights between calls: the same bits, one copy per weight, and never a stale one."""

import copy
import gc
import warnings

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import tconv
from tconv import functional as TF
from tconv.launching import frozen, launch

pytestmark = pytest.mark.usefixtures("staged")


@pytest.fixture
def staged():
    """Plans that copy their operands, and nothing frozen before or after."""
    with tconv.force(staged=True):
        yield
    frozen._kept.clear()


@pytest.fixture
def copies(monkeypatch):
    """The tensors that were copied, in order."""
    made, make = [], launch.to_channels_last
    monkeypatch.setattr(launch, "to_channels_last", lambda by, *t: made.extend(t) or make(by, *t))
    return made


def of(weight, copies):
    """How many of the copies were of a weight, counted since the last time."""
    count = sum(t.data_ptr() == weight.data_ptr() for t in copies)
    copies.clear()
    return count


@pytest.mark.parametrize("channels", [3, 8], ids=["padded", "whole vectors"])
def test_a_frozen_weight_is_copied_once(channels, device, copies):
    layer = tconv.Conv2d(channels, 6, 3).to(device)
    x = torch.randn(2, channels, 7, 6, device=device)
    before = layer(x)
    assert of(layer.weight, copies) == 1
    assert tconv.freeze(layer) is layer
    with torch.no_grad():
        results = [layer(x) for _ in range(3)]
    assert of(layer.weight, copies) == 1
    assert all(torch.equal(y, before) for y in results)
    assert tconv.unfreeze(layer) is layer
    assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)
    assert of(layer.weight, copies) == 2


def at_its_own_address(weight):
    """Sets other data at the same address, as if memory had been freed and taken again, which no version counter shows."""
    import numpy as np

    memory = weight.data.numpy()
    array = np.ndarray(memory.shape, memory.dtype, memory.data)
    weight.data = torch.from_numpy(array)
    array *= 2


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "by load_state_dict": lambda layer: layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()}),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "a new parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight * 2)),
    "in other order": lambda layer: setattr(layer.weight, "data", layer.weight.data.to(memory_format=torch.channels_last)),
    "through .data, and frozen again": lambda layer: (layer.weight.data.mul_(2), tconv.freeze(layer)),
    "other memory at the same address": lambda layer: at_its_own_address(layer.weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_copied_anew(change, device):
    layer = tconv.freeze(tconv.Conv2d(5, 6, 3).to(device))
    x = torch.randn(2, 5, 7, 6, device=device)
    layer(x)
    change(layer)
    assert torch.equal(layer(x), TF.conv2d(x, layer.weight.clone(), layer.bias))


def test_an_optimizer_step_is_seen(device):
    layer = tconv.freeze(tconv.Conv1d(5, 6, 3).to(device))
    x = torch.randn(2, 5, 9, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer(x), TF.conv1d(x, layer.weight.detach().clone(), layer.bias))


def test_gradients_are_those_of_a_layer_that_is_not_frozen(device):
    layer = tconv.ConvTranspose2d(5, 6, 3, stride=2).to(device)
    x = torch.randn(2, 5, 4, 6, device=device, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    tconv.freeze(layer)
    for _ in range(2):
        for got, right in zip(torch.autograd.grad(layer(x).square().sum(), (x, layer.weight)), expected, strict=True):
            assert torch.equal(got, right)


@torch.no_grad()
def test_another_view_of_the_weight_is_another_operand(device):
    layer = tconv.freeze(tconv.Conv2d(5, 5, 3).to(device))
    x = torch.randn(2, 5, 7, 6, device=device)
    layer(x)
    for view in (layer.weight.transpose(0, 1), layer.weight[:, :, :2], layer.weight.view(torch.int32).view(torch.float32)[:3]):
        assert torch.equal(TF.conv2d(x, view), TF.conv2d(x, view.clone(memory_format=torch.preserve_format)))


def test_tied_weights_share_a_copy_and_copies_of_the_model_do_not(device, copies):
    first, second = (tconv.Conv2d(5, 5, 3, padding=1, bias=False).to(device) for _ in range(2))
    second.weight = first.weight
    model = tconv.freeze(torch.nn.Sequential(first, second))
    other = copy.deepcopy(model)
    x = torch.randn(2, 5, 7, 6, device=device)
    with torch.no_grad():
        expected = model(x)
        assert of(first.weight, copies) == 1
        assert torch.equal(other(x), expected)
        assert of(other[0].weight, copies) == 2


def test_a_weight_that_is_gone_is_forgotten(device):
    layer = tconv.freeze(tconv.Conv2d(5, 6, 3).to(device))
    with torch.no_grad():
        layer(torch.randn(2, 5, 7, 6, device=device))
    assert len(frozen._kept) == 1
    del layer
    gc.collect()
    assert frozen._kept == {}


def test_layers_of_torch_count_too():
    layer = tconv.freeze(torch.nn.Conv2d(5, 6, 3))
    assert [kept.weight() for kept in frozen._kept.values()] == [layer.weight]


def test_inference_tensors_have_no_version(device, copies):
    with torch.inference_mode():
        layer = tconv.freeze(tconv.Conv2d(5, 6, 3).to(device))
        x = torch.randn(2, 5, 7, 6, device=device)
        assert torch.equal(layer(x), layer(x))
    assert of(layer.weight, copies) == 1


def test_a_copy_that_a_graph_makes_is_not_kept(device, copies, monkeypatch):
    monkeypatch.setattr(frozen, "capturing", lambda device: True)
    layer = tconv.freeze(tconv.Conv2d(5, 6, 3).to(device))
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(2, 5, 7, 6, device=device))
    assert of(layer.weight, copies) == 2


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        tconv.freeze(torch.ones(1))
    with pytest.raises(ValueError, match="freeze: 1 has no weight yet"):
        tconv.freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LazyConv2d(4, 3)))
    assert frozen._kept == {}
    for model in (torch.nn.ReLU(), weight_norm(torch.nn.Conv2d(3, 4, 3))):
        with pytest.warns(UserWarning, match="no convolution whose weight can be frozen"):
            tconv.freeze(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tconv.unfreeze(torch.nn.LazyConv2d(4, 3))
        tconv.unfreeze(torch.nn.Conv2d(3, 4, 3))
