"""replace_ takes subclasses of the user's that leave the computation to torch.nn, and says of the others why not."""

from __future__ import annotations

import copy
import gc
import io
import pathlib
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tconv
from tconv import subclasses
from tests import parity, third_party

REMEDY = "(tconv.enable() reaches "
# A layer of each class that is taken, and the class of tconv's.
TAKEN = {
    "another constructor": (lambda: third_party.Simple(4, 6), tconv.Conv3d),
    "repr and initialisation": (lambda: third_party.Documented(4, 6, 3, note="n"), tconv.Conv2d),
    "a subclass of a subclass": (lambda: third_party.Further(4, 6, 3), tconv.Conv2d),
    "output padding": (lambda: third_party.Wider(4, 6, 3, stride=2), tconv.ConvTranspose2d),
    "a computed weight": (lambda: third_party.Scaled(4, 6, 3), tconv.Conv2d),
    "a mixin": (lambda: third_party.Mixed(4, 6, 3), tconv.Conv2d),
    "a reduction of its own": (lambda: third_party.Rebuilt(4, 6, 3), tconv.Conv2d),
}
LEFT = {
    "forward": (third_party.Same, "it overrides forward (tconv.enable() reaches what that calls)"),
    "_conv_forward": (third_party.Standardized, "it overrides _conv_forward (tconv.enable() reaches what that calls)"),
    "slots": (third_party.Slotted, f"it has __slots__ {REMEDY}it)"),
    "a metaclass": (third_party.WithMetaclass, f"its metaclass Meta may mind a class derived from it {REMEDY}it)"),
    "a registry": (third_party.Registered, f"Registered.__init_subclass__ may mind a class derived from it {REMEDY}it)"),
    "sealed": (third_party.Sealed, f"Sealed.__init_subclass__ may mind a class derived from it {REMEDY}it)"),
}


def sample(layer, device="cpu"):
    return torch.randn(2, layer.in_channels, *(5, 6, 4)[: len(layer.kernel_size)], device=device)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def answers(layer, x):
    x = parity.leaf(x)
    y = layer(x)
    return y, parity.parameter_gradients(y, x, layer)


@pytest.mark.parametrize("name", TAKEN)
def test_there_and_back(name, device):
    make, ours = TAKEN[name]
    layer, lines = make().to(device), []
    cls, text, x = type(layer), repr(layer), sample(layer, device)
    expected, gradients = answers(layer, x)
    before = {key: id(p) for key, p in layer.named_parameters()}
    tconv.replace_(layer, report=lines.append)
    assert isinstance(layer, cls)
    assert isinstance(layer, ours)
    assert repr(layer) == f"tconv.{text}"
    assert {key: id(p) for key, p in layer.named_parameters()} == before
    with tconv.recording() as calls:
        got, found = answers(layer, x)
    assert {call.operation for call in calls} >= {"fprop", "dgrad", "wgrad"}
    assert all(call.ours for call in calls)
    parity.assert_same(got, expected)
    for key, g in gradients.items():
        parity.assert_same(found[key], g, key, weight=key == "weight")
    tconv.restore_(layer, report=lines.append)
    assert type(layer) is cls
    assert "_tconv_replaced" not in layer.__dict__
    assert torch.equal(layer(x), expected)
    full = f"tests.third_party.{cls.__name__}"
    assert lines == [f"model: {full} -> tconv.{cls.__name__}", f"model: tconv.{cls.__name__} -> {full}"]


def test_most_layers_of_a_video_network(device):
    """Of torchvision's R3D-18 sixteen layers in twenty are of such a class."""
    model, lines = third_party.network().to(device), []
    x = torch.randn(1, 3, 3, 8, 8, device=device)
    expected = model(x)
    tconv.replace_(model, report=lines.append)
    assert [line.split(" -> ")[1] for line in lines] == ["tconv.Conv3d", "tconv.Simple", "tconv.Simple"]
    with tconv.recording() as calls:
        parity.assert_same(model(x), expected)
    assert [call.ours for call in calls] == [True] * 3


def test_what_the_class_brings_is_kept(device):
    layer = tconv.replace_(third_party.Documented(4, 6, 3, note="kept").to(device))
    assert layer.note == "kept"
    assert type(layer).__name__ == "Documented"
    assert type(layer).__doc__ == third_party.Documented.__doc__
    layer.reset_parameters()
    assert (layer.weight == 0.5).all()
    x = sample(layer, device)
    with tconv.recording() as calls:  # a method that calls torch.nn's forward calls ours
        parity.assert_same(layer.twice(x), 2 * layer(x))
    parity.assert_ours(calls, "fprop", "fprop")
    assert third_party.Simple.get_downsample_stride(2) == tconv.replace_(third_party.Simple(4, 4)).get_downsample_stride(2)


def test_output_padding_of_its_own(device):
    layer = third_party.Wider(4, 6, 3, stride=2).to(device)
    x = sample(layer, device)
    expected = layer(x, output_size=(9, 9))
    parity.assert_same(tconv.replace_(layer)(x, output_size=(9, 9)), expected)


def test_one_class_per_class_while_it_is_used():
    first, second, further = (tconv.replace_(c(3, 4, 1)) for c in [third_party.Documented] * 2 + [third_party.Further])
    assert type(first) is type(second) is not type(further)

    class TransientFallback(nn.Conv1d):
        pass

    layer = tconv.replace_(TransientFallback(1, 1, 1))
    classes = weakref.ref(type(layer)), weakref.ref(TransientFallback)
    del layer, TransientFallback
    for _ in range(2):  # the derived class, then what it came from
        gc.collect()
    assert [ref() for ref in classes] == [None, None]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved], ids=["deep", "shallow", "saved"])
@pytest.mark.parametrize("name", TAKEN)
def test_copies(name, copied, device):
    layer = tconv.replace_(TAKEN[name][0]().to(device))
    cls, x = subclasses.theirs(type(layer)), sample(layer, device)
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert type(tconv.restore_(twin)) is cls


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(protocol):
    layer = tconv.replace_(nn.Sequential(third_party.Documented(4, 6, 3, note="n"), third_party.Rebuilt(4, 6, 3)))
    twin = pickle.loads(pickle.dumps(layer, protocol))
    assert [type(m) for m in twin] == [type(m) for m in layer]
    assert twin[0].note == "n"
    assert [type(m) for m in tconv.restore_(twin)] == [third_party.Documented, third_party.Rebuilt]


def test_a_pickle_is_loaded_by_a_fresh_process(tmp_path):
    torch.save(tconv.replace_(third_party.network()), tmp_path / "model.pt")
    program = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import tconv
print(*(type(m).__name__ for m in model.modules() if isinstance(m, tconv.Conv3d)))
tconv.restore_(model)
print(*(f"{{type(m).__module__}}.{{type(m).__name__}}" for m in model.modules() if isinstance(m, torch.nn.Conv3d)))
"""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "Conv3d Simple Simple",
        "torch.nn.modules.conv.Conv3d tests.third_party.Simple tests.third_party.Simple",
    ]


def test_parametrized(device):
    layer = third_party.Documented(4, 6, 3, note="n").to(device)
    nn.init.normal_(layer.weight)
    parametrizations.weight_norm(layer)
    original, text, x = type(layer), repr(layer), sample(layer, device)
    expected = layer(x)
    tconv.replace_(layer)
    assert (type(layer).__name__, repr(layer)) == (original.__name__, f"tconv.{text}")
    assert isinstance(layer, third_party.Documented)
    with tconv.recording() as calls:
        parity.assert_same(layer(x), expected)
        parity.assert_same(copy.deepcopy(layer)(x), expected)
    parity.assert_ours(calls, "fprop", "fprop")
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(layer)
    tconv.restore_(layer)
    assert not isinstance(layer, tconv.Conv2d)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is third_party.Documented


def test_a_parametrization_may_come_after_replacing(device):
    layer = tconv.replace_(third_party.Documented(4, 6, 3).to(device))
    nn.init.normal_(layer.weight)
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(tconv.restore_(layer), "weight")
    assert type(layer) is third_party.Documented


def test_lazy(device):
    layer = tconv.replace_(third_party.LazySimple(6, 3, device=device))
    assert isinstance(layer, tconv.LazyConv2d)
    layer.note = "n"
    with tconv.recording() as calls:
        layer(torch.randn(2, 4, 5, 5, device=device))
    parity.assert_ours(calls, "fprop")
    assert isinstance(layer, third_party.Documented)
    assert isinstance(layer, tconv.Conv2d)
    assert type(tconv.restore_(layer)) is third_party.Documented


def test_a_lazy_layer_that_becomes_what_is_left_alone(device):
    layer, lines = third_party.LazySame(6, 3, device=device), []
    with pytest.warns(UserWarning, match="replaced none of the 1 convolutions"):
        tconv.replace_(layer, report=lines.append)
    assert type(layer) is third_party.LazySame
    assert lines == [f"model: LazySame left alone: it becomes a Same, which is left alone: {LEFT['forward'][1]}"]


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    cls, why = LEFT[name]
    model, lines = nn.Sequential(cls(3, 4, 3), nn.Conv2d(4, 4, 1)), []
    made = len(third_party.Meta.made), len(third_party.Registered.made)
    tconv.replace_(model, report=lines.append)
    assert type(model[0]) is cls
    assert lines == [f"0: {cls.__name__} left alone: {why}", "1: torch.nn.Conv2d -> tconv.Conv2d"]
    assert (len(third_party.Meta.made), len(third_party.Registered.made)) == made
    with pytest.warns(UserWarning, match=f"replaced none of the 1 convolutions of this {cls.__name__}"):
        tconv.replace_(model[0])


def test_subclasses_of_our_layers_are_ours_already():
    class Own(tconv.Conv2d):
        pass

    lines = []
    tconv.replace_(Own(3, 4, 1), report=lines.append)
    assert lines == ["model: no convolution to replace"]


def test_compiled(device):
    layer = tconv.replace_(third_party.Documented(4, 6, 3).to(device))
    x = sample(layer, device)
    with tconv.recording() as calls:
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    parity.assert_same(got, layer(x))
    assert calls
    assert all(call.ours for call in calls)
