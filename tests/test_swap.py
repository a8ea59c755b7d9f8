"""replace_ and restore_ change the class of convolutions and nothing else that a model, an optimizer or a copy can see."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tconv
from tests import parity

EVERY = [*parity.LAYERS, *parity.LAZY]


def layer(name, device="cpu"):
    return getattr(nn, name)(*((6, 3) if name.startswith("Lazy") else (4, 6, 3)), device=device)


def sample(name, device="cpu"):
    return torch.randn(2, 4, *(5, 6, 4)[: parity.rank(name)], device=device)


class Residual(nn.Module):
    """A convolution by attribute, one in a list, one in a dictionary, and one module used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())])
        self.heads = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 2, 2, stride=2)})
        self.again = self.stem
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.heads["up"](x) * self.scale


class Own(nn.Conv2d):
    """A user's class of convolutions."""

    def forward(self, input):
        return super().forward(input) + 1


def classes(model):
    """Name and class of every module."""
    return {name: type(m) for name, m in model.named_modules()}


def identities(model):
    """What of a model has to stay the very same object."""
    return {name: id(t) for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}


def only_ours(model, x):
    """The output, after a check that no convolution of it was torch's."""
    with tconv.recording() as calls:
        y = model(x)
    assert calls
    assert [str(call) for call in calls if not call.ours] == []
    return y


@pytest.mark.parametrize("name", EVERY)
def test_every_class_there_and_back(name):
    m = layer(name)
    before, text, state = identities(m), repr(m), list(m.state_dict())
    lines = []
    assert tconv.replace_(m, report=lines.append) is m
    assert type(m) is getattr(tconv, name)
    assert (identities(m), repr(m), list(m.state_dict())) == (before, f"tconv.{text}", state)
    assert tconv.restore_(m, report=lines.append) is m
    assert type(m) is getattr(nn, name)
    assert (identities(m), repr(m), list(m.state_dict())) == (before, text, state)
    assert lines == [f"model: torch.nn.{name} -> tconv.{name}", f"model: tconv.{name} -> torch.nn.{name}"]


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "ConvTranspose2d", "Conv3d"])
def test_results_and_gradients_stay(name, device):
    m, x = layer(name, device), sample(name, device).requires_grad_()
    y = m(x)
    before = parity.parameter_gradients(y, x, m)
    tconv.replace_(m)
    ours = only_ours(m, x)
    parity.assert_same(ours, y)
    for key, g in parity.parameter_gradients(ours, x, m).items():
        parity.assert_same(g, before[key], key, weight=key == "weight")
    tconv.restore_(m)
    with tconv.recording() as calls:
        assert torch.equal(m(x), y)
    assert calls == []


def test_a_nested_model(device):
    torch.manual_seed(1)
    model = Residual().to(device).eval()
    x = torch.randn(2, 3, 5, 4, device=device)
    expected, before, original = model(x), identities(model), classes(model)
    lines = []
    tconv.replace_(model, report=lines.append)
    assert lines == [
        "stem: torch.nn.Conv2d -> tconv.Conv2d",
        "blocks.0.0: torch.nn.Conv2d -> tconv.Conv2d",
        "heads.up: torch.nn.ConvTranspose2d -> tconv.ConvTranspose2d",
    ]
    changed = {name for name, cls in classes(model).items() if cls is not original[name]}
    assert changed == {"stem", "blocks.0.0", "heads.up"}
    assert model.again is model.stem
    assert identities(model) == before
    assert not any(m.training for m in model.modules())
    parity.assert_same(only_ours(model, x), expected)
    tconv.restore_(model)
    assert classes(model) == original
    assert identities(model) == before
    assert torch.equal(model(x), expected)


def test_replacing_twice_is_replacing_once():
    model = Residual()
    original = classes(model)
    tconv.replace_(model)
    once = classes(model)
    lines = []
    tconv.replace_(model, report=lines.append)
    assert classes(model) == once
    assert lines == ["model: no convolution to replace"]
    tconv.restore_(model)
    assert classes(model) == original
    assert classes(tconv.restore_(model)) == original


def test_a_model_without_convolutions():
    model, lines = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
    original = classes(model)
    with pytest.warns(UserWarning, match=r"no convolution layer in this Sequential, and replaced nothing.*enable\(\)"):
        tconv.replace_(model, report=lines.append)
    assert classes(tconv.restore_(model, report=lines.append)) == original
    assert lines == ["model: no convolution to replace", "model: nothing replaced or fused"]


def test_the_filter_chooses_by_module_and_name():
    model, asked = Residual(), []

    def wide(module, name):
        asked.append(name)
        return module.kernel_size != (1, 1)

    lines = []
    tconv.replace_(model, wide, report=lines.append)
    assert asked == ["stem", "blocks.0.0", "heads.up"]
    assert "blocks.0.0: Conv2d left alone by filter_fn" in lines
    assert type(model.blocks[0][0]) is nn.Conv2d
    assert type(model.stem) is tconv.Conv2d
    asked.clear()
    tconv.restore_(model, lambda _, name: asked.append(name) or name == "stem")
    assert asked == ["stem", "heads.up"]
    assert type(model.stem) is nn.Conv2d
    assert type(model.heads["up"]) is tconv.ConvTranspose2d


def test_a_class_with_a_forward_of_its_own_is_left_alone():
    model = nn.Sequential(Own(3, 4, 3), nn.Conv2d(4, 4, 1))
    parametrizations.weight_norm(model[0])
    original, lines = type(model[0]), []
    tconv.replace_(model, report=lines.append)
    assert type(model[0]) is original
    assert lines[0].startswith("0: ")
    assert lines[0].endswith("Own left alone: it overrides forward (tconv.enable() reaches what that calls)")
    assert lines[1] == "1: torch.nn.Conv2d -> tconv.Conv2d"


def test_a_class_given_since_is_left_alone():
    m = tconv.replace_(nn.Conv2d(3, 4, 3))
    m.__class__ = Own
    tconv.restore_(m)
    assert type(m) is Own


def test_layers_built_as_ours_stay():
    model = nn.Sequential(tconv.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    tconv.restore_(tconv.replace_(model))
    assert [type(m) for m in model] == [tconv.Conv2d, nn.Conv2d]


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose1d"])
def test_hooks_are_kept_and_run(name, device):
    m, log = layer(name, device), []
    m.register_forward_pre_hook(lambda *_: log.append("pre"))
    m.register_forward_hook(lambda *_: log.append("forward"))
    m.register_full_backward_hook(lambda *_: log.append("backward"))
    removable = m.register_forward_hook(lambda *_: log.append("removed"))
    m.weight.register_hook(lambda _: log.append("weight"))
    tconv.replace_(m)
    removable.remove()
    only_ours(m, sample(name, device).requires_grad_()).sum().backward()
    assert sorted(log) == ["backward", "forward", "pre", "weight"]


def test_tied_weights_stay_tied(device):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).to(device)
    model[1].weight = model[0].weight
    x = torch.randn(1, 4, 4, 4, device=device)
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    tconv.replace_(model)
    assert model[1].weight is model[0].weight
    assert len(list(model.parameters())) == 3
    parity.assert_same(torch.autograd.grad(only_ours(model, x).sum(), model[0].weight)[0], expected, weight=True)


def norm_twice(m):
    parametrizations.weight_norm(m)
    parametrize.register_parametrization(m, "bias", nn.Softplus())


@pytest.mark.parametrize(
    ("name", "register"),
    [
        ("Conv2d", parametrizations.weight_norm),
        ("ConvTranspose2d", parametrizations.spectral_norm),
        ("Conv1d", parametrizations.orthogonal),
        ("Conv1d", norm_twice),
    ],
    ids=["weight norm", "spectral norm, transposed", "orthogonal", "of two tensors"],
)
def test_parametrized_layers(name, register, device):
    torch.manual_seed(2)
    m, x = layer(name, device), sample(name, device)
    register(m)
    m.eval()  # spectral_norm's power iteration would move on with each call
    expected, before, original, text = m(x), identities(m), type(m), repr(m)
    tensors = list(m.parametrizations)
    tconv.replace_(m)
    assert isinstance(m, getattr(tconv, name))
    assert (type(m).__name__, repr(m)) == (original.__name__, f"tconv.{text}")
    assert parametrize.is_parametrized(m, "weight")
    parity.assert_same(only_ours(m, x), expected)
    twin = copy.deepcopy(m)
    tconv.restore_(m)
    assert not isinstance(m, getattr(tconv, name))
    assert identities(m) == before
    assert torch.equal(m(x), expected)
    for tensor in tensors:
        parametrize.remove_parametrizations(m, tensor)
    assert type(m) is getattr(nn, name)
    # The copy last: it shares its class with the original, and torch removes from the class.
    parity.assert_same(only_ours(twin, x), expected)
    for tensor in tensors:
        parametrize.remove_parametrizations(twin, tensor)
    assert type(twin) is getattr(tconv, name)
    parity.assert_same(only_ours(twin, x), expected)
    assert type(tconv.restore_(twin)) is getattr(nn, name)


def test_a_parametrization_may_come_after_replacing(device):
    m, x = tconv.replace_(layer("Conv2d", device)), sample("Conv2d", device)
    expected = m(x)
    parametrizations.weight_norm(m)
    parity.assert_same(only_ours(m, x), expected)
    tconv.restore_(m)
    parametrize.remove_parametrizations(m, "weight")
    assert type(m) is nn.Conv2d


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose2d"])
def test_the_old_weight_norm(name, device):
    m, x = nn.utils.weight_norm(layer(name, device)), sample(name, device)
    expected = m(x)
    tconv.replace_(m)
    assert type(m) is getattr(tconv, name)
    parity.assert_same(only_ours(m, x), expected)
    nn.utils.remove_weight_norm(m)
    parity.assert_same(only_ours(m, x), expected)
    assert type(tconv.restore_(m)) is getattr(nn, name)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deep", "pickle", "saved"]
)
def test_copies_of_a_replaced_model_can_be_restored(copied):
    model = nn.Sequential(Residual(), tconv.Conv2d(2, 2, 1), nn.LazyConv2d(2, 1))
    original = classes(model)
    twin = copied(tconv.replace_(model))
    assert classes(twin) == classes(model)
    assert identities(twin).keys() == identities(model).keys()
    assert classes(tconv.restore_(twin)) == original
    assert classes(model) != original


@pytest.mark.parametrize("name", parity.LAZY)
def test_lazy_layers(name, device):
    regular = name.removeprefix("Lazy")
    m, x = tconv.replace_(layer(name, device)), sample(name, device)
    assert type(m) is getattr(tconv, name)
    only_ours(m, x)
    assert type(m) is getattr(tconv, regular)
    assert type(tconv.restore_(m)) is getattr(nn, regular)


def test_lazy_layers_draw_the_same_parameters():
    models = []
    for change in (lambda m: m, tconv.replace_, lambda m: tconv.restore_(tconv.replace_(m))):
        torch.manual_seed(0)
        m = change(layer("LazyConv1d"))
        m(torch.ones(1, 4, 3))
        models.append(m)
    for m in models[1:]:
        assert torch.equal(m.weight, models[0].weight)
        assert torch.equal(m.bias, models[0].bias)


def test_an_optimizer_goes_on(device):
    """Training with the classes changed midway, there and back, is training with torch's alone."""
    results = []
    for swapped in (False, True):
        torch.manual_seed(3)
        model = Residual().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x = torch.randn(2, 3, 5, 4, device=device)
        losses = []
        for step in range(6):
            if swapped and step == 2:
                tconv.replace_(model)
            if swapped and step == 4:
                tconv.restore_(model)
            optimizer.zero_grad()
            with tconv.recording() as calls:
                loss = model(x).square().mean()
                loss.backward()
            assert bool(calls) == (swapped and 2 <= step < 4)
            optimizer.step()
            losses.append(loss.item())
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        results.append((losses, {**model.state_dict(), **dict(enumerate(momenta))}))
    (expected_losses, expected), (losses, state) = results
    assert expected_losses[-1] < expected_losses[0]
    tolerance = parity.tolerance_of(torch.float32)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)


def test_folding_a_batch_norm_into_a_replaced_layer(device):
    conv, norm, x = layer("Conv2d", device).eval(), nn.BatchNorm2d(6, device=device).eval(), sample("Conv2d", device)
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    expected = norm(conv(x))
    fused = torch.nn.utils.fuse_conv_bn_eval(tconv.replace_(conv), norm)
    assert type(fused) is tconv.Conv2d
    parity.assert_same(only_ours(fused, x), expected)
