"""A kernel that goes wrong: the call is torch's, recorded and warned of; only what would go wrong again is given up."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import tconv
from tconv import functional
from tconv.dispatch import aten, autograd, entry, operators, selection
from tconv.launching import compiled, launch
from tconv.planning.tiles import Tile
from tests import parity
from tests.contexts import F64, conv, same, tensors

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 15.06 MiB free.")
PASSING = {  # errors that say nothing of the next call
    "no memory": NO_MEMORY,
    "a driver's": RuntimeError("Triton Error [CUDA]: out of memory"),
    "anything else": ValueError("no such instruction"),
}
LASTING = {
    "Triton's compiler": CompilationError("x = 1", None, "no such thing"),
    "ptxas": PTXASError("no such instruction"),
    "shared memory": OutOfResources(300000, 232448, "shared memory"),
}
WAYS = ["enable", "layer", "function"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in ("_failed", "_warned"):
        monkeypatch.setattr(compiled, name, type(getattr(compiled, name))())
    monkeypatch.setattr(entry, "fast_paths", {})


@pytest.fixture
def failing(monkeypatch):
    """Has every launch of a kernel raise an error, until `.undo()`."""
    with monkeypatch.context() as now:
        yield lambda error: parity.forbid_launches(now, error) or now


class Way:
    """A layer by one of the ways, and torch's with its weights."""

    def __init__(self, way, device, dtype=F64, channels=4):
        self.way = way
        torch.manual_seed(8)
        self.layer = (tconv if way == "layer" else nn).Conv2d(channels, channels + 2, 3, device=device, dtype=dtype)
        self.torchs = nn.Conv2d(channels, channels + 2, 3, device=device, dtype=dtype)
        self.torchs.load_state_dict(self.layer.state_dict())
        self.x = tensors(device, dtype, x=(2, channels, 6, 5))[0]
        self.expected = self.run(self.torchs)

    def run(self, m):
        y = functional.conv2d(self.x, m.weight, m.bias) if m is self.layer and self.way == "function" else m(self.x)
        return y, *torch.autograd.grad(y.square().sum(), (self.x, *m.parameters()))

    def check(self):
        """A forward and backward pass, which is right: the calls it made, the warnings it gave."""
        override = tconv.enabled() if self.way == "enable" else contextlib.nullcontext()
        with override, tconv.recording() as calls, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same(self.run(self.layer), self.expected)
        return calls, [str(w.message) for w in caught]


def assert_all_ours(way):
    calls, said = way.check()
    parity.assert_ours(calls, "fprop", "dgrad", "wgrad", "bias")
    assert said == []


@pytest.mark.parametrize("error", PASSING)
@pytest.mark.parametrize("way", WAYS)
def test_a_passing_error_costs_its_call(way, error, device, failing):
    way, error = Way(way, device), PASSING[error]
    now = failing(error)
    for attempt in range(2):
        calls, said = way.check()
        assert calls
        assert not any(call.ours for call in calls)
        assert f" failed: {type(error).__name__}: {error}" in calls[0].reason
        assert bool(said) == (attempt == 0), "each kernel is warned of once"
        assert all(text.startswith("tconv falls back to torch for one call, and will try again: ") for text in said)
    assert compiled._failed == {}
    now.undo()
    assert_all_ours(way)
    assert_all_ours(way)


@pytest.mark.parametrize("error", LASTING)
@pytest.mark.parametrize("way", WAYS)
def test_an_error_that_would_come_again_is_remembered(way, error, device, failing):
    """Of a variant: what has another dtype is another kernel, and tried."""
    way, other, error = Way(way, device), Way(way, device, torch.float32), LASTING[error]
    now = failing(error)
    calls, said = way.check()
    assert not any(call.ours for call in calls)
    assert said
    assert len(said) == len(compiled._failed)
    assert all(text.startswith("tconv falls back to torch for every call whose kernel failed: ") for text in said)
    now.undo()
    again, said = way.check()
    assert (again[0].ours, again[0].reason) == (False, calls[0].reason)
    assert said == []
    assert_all_ours(other)
    compiled._failed.clear()
    assert_all_ours(way)


def test_an_interrupted_call_is_no_fault(device, failing):
    for way in map(Way, WAYS, [device] * 3):
        now = failing(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            way.check()
        now.undo()
        assert compiled._failed == {}
        assert_all_ours(way)


def test_a_forced_kernel_that_fails_raises(device, failing):
    x, w, b = tensors(device)
    failing(ValueError("no such instruction"))
    for function in (F.conv2d, tconv.functional.conv2d):
        with tconv.enabled(), tconv.force(kernel="gather"), pytest.raises(ValueError, match="no such instruction"):
            function(x, w, b, groups=2)
    assert compiled._failed == {}


def test_an_error_within_a_kernel_is_one_of_it(device, monkeypatch):
    """As the interpreter gives it, which goes on afterwards."""
    if device != "cpu":
        pytest.skip("of the interpreter")
    from triton.runtime import interpreter

    x, w, b = tensors(device)
    expected = conv(x, w, b)
    with monkeypatch.context() as now, tconv.enabled(), tconv.recording() as calls:
        now.setattr(interpreter.InterpreterBuilder, "create_masked_load", None)
        with pytest.warns(UserWarning, match="gather of fprop in float64 failed: InterpreterError"):
            same(conv(x, w, b), expected)
    assert [call.ours for call in calls] == [False]
    with tconv.enabled(), tconv.recording() as calls:
        same(conv(x, w, b), expected)
    parity.assert_ours(calls, "fprop")


# --- warnings ---


def warned(*faults):
    """How many warnings a sequence of (variant, text) gives, though all are of one line of code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for fault in faults:
            compiled._warn(*fault)
    return len(caught)


def test_each_variant_and_reason_is_warned_of_once():
    assert warned(("a", "no memory"), ("a", "no memory")) == 1
    assert warned(("b", "no memory"), ("a", "no instruction"), ("a", "no memory")) == 2
    assert warned(("c", "12 MiB free at 0x7fa0"), ("c", "3 MiB free at 0x7fbc")) == 1


def test_a_warning_that_is_raised_is_not_taken_for_given(device, failing):
    way = Way("layer", device)
    failing(NO_MEMORY)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="and will try again"):
                way.layer(way.x)


# --- memory ---

PLANS = {  # whose allocations a call makes, of the forward pass and of the gradient by the input
    "result": {},
    "copy": {"staged": True},
    "workspace": {"kernel": "gather", "tile": Tile(16, 16, 16), "splits": 2},
}


class Scarce:
    """Convolutions are planned so that something is allocated, and memory for it may run out."""

    def __init__(self, monkeypatch, kind):
        self.kind, self.none_left, self.asked = kind, False, 0
        lookup, strided, empty = launch.lookup, torch.Tensor.new_empty_strided, torch.empty
        self.empty = empty

        def planned(key, make):
            if key[0] not in ("fprop", "dgrad"):
                return lookup(key, make)
            with tconv.force(**PLANS[kind]):
                return make()

        monkeypatch.setattr(launch, "lookup", planned)
        monkeypatch.setattr(selection, "_choices", {})
        monkeypatch.setattr(operators, "_known", {})
        monkeypatch.setattr(torch.Tensor, "new_empty_strided", lambda *args, **more: self.allocate(strided, *args, **more))
        monkeypatch.setattr(torch, "empty", lambda *args, **more: self.allocate(empty, *args, **more))

    def allocate(self, by, *args, **more):
        function = sys._getframe(2).f_code
        if function.co_name == "<genexpr>":
            function = sys._getframe(3).f_code
        asks = launch.to_channels_last if self.kind == "copy" else launch.execute
        if function is asks.__code__ and (by is self.empty) == (self.kind == "workspace"):
            self.asked += 1
            if self.none_left:
                raise NO_MEMORY
        return by(*args, **more)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("way", WAYS)
def test_no_memory_for_what_we_allocate_is_torchs_call(way, kind, device, monkeypatch):
    """Torch may need less; and if there is none for the result, says so itself."""
    way, scarce = Way(way, device, channels=32), Scarce(monkeypatch, kind)
    assert_all_ours(way)
    assert scarce.asked
    scarce.none_left = True
    calls, said = way.check()
    left = [call for call in calls if not call.ours]
    assert left
    assert all("OutOfMemoryError: CUDA out of memory." in call.reason for call in left)
    assert said
    scarce.none_left = False
    assert_all_ours(way)


def test_a_plan_that_was_forced_says_that_there_is_no_memory(device, monkeypatch):
    way, scarce = Way("function", device), Scarce(monkeypatch, "copy")
    scarce.none_left = True
    with tconv.force(staged=True), pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 20\.00 MiB"):
        way.run(way.layer)


@pytest.fixture
def copies(monkeypatch):
    """Operands are copied, then the kernel finds no memory: references to the copies that there were."""
    made, copy, run = [], launch.to_channels_last, launch.run

    def watched(by, *tensors):
        results = copy(by, *tensors)
        made.extend(map(weakref.ref, results))
        return results

    def no_memory(by, pointers):
        if by.call.operation != "copy":
            fail(by, None, NO_MEMORY)
        run(by, pointers)

    Scarce(monkeypatch, "copy")
    fail = compiled.fail
    monkeypatch.setattr(launch, "to_channels_last", watched)
    monkeypatch.setattr(launch, "run", no_memory)
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_the_overrides_copies_are_gone_when_torch_takes_a_call(device, copies):
    x, w, b = (t.detach() for t in tensors(device))
    taken, everything = [], types.SimpleNamespace(chosen=selection.choice([selection.select()]))

    def torchs(*_):
        assert copies
        assert all(ref() is None for ref in copies)
        taken.append(True)

    aten.convolution(everything, torchs, None, x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 2, False, False, True, True)
    dy = torch.ones_like(conv(x, w))
    parameters = [2, 1], [1, 1], [1, 1], False, [0, 0], 2
    aten.convolution_backward(everything, torchs, None, dy, x, w, [6], *parameters, [True, True, True])
    assert taken == [True, True]


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_a_layers_copies_are_gone_when_torch_takes_a_call(device, copies, monkeypatch):
    taken, by_torch = [], operators.by_torch

    def watched(*args):
        assert all(ref() is None for ref in copies)
        taken.append(args[0])
        return by_torch(*args)

    way = Way("layer", device)
    with monkeypatch.context() as now:
        now.setattr(launch, "run", lambda by, pointers: compiled.run(by, pointers))
        y = way.layer(way.x)
    monkeypatch.setattr(operators, "by_torch", watched)
    torch.autograd.grad(y.sum(), (way.x, way.layer.weight))
    assert copies
    assert taken == ["dgrad", "wgrad"]


# --- repeated calls ---


def repeated(device):
    """A layer that is called again by the short way, forward and backward, and its last call."""
    way = Way("layer", device)
    for _ in range(3):
        assert_all_ours(way)
    (seen,) = entry.fast_paths.values()
    assert seen.how.again is not None
    return way, seen.how


def test_a_passing_error_does_not_end_the_short_way(device, failing, monkeypatch):
    way, how = repeated(device)
    again, left = how.again, how.left
    for _ in range(autograd.KEPT + 1):
        y = way.layer(way.x)
        now = failing(NO_MEMORY)
        with warnings.catch_warnings(), tconv.recording() as calls:
            warnings.simplefilter("ignore")
            same(torch.autograd.grad(y.square().sum(), (way.x, *way.layer.parameters())), way.expected[1:])
        assert not any(call.ours for call in calls)
        now.undo()
    assert how.again is again
    assert how.left == left
    monkeypatch.delattr(autograd, "operations")
    assert_all_ours(way)


def test_an_error_that_would_come_again_ends_it(device, monkeypatch):
    """Or what does launch would be launched twice, every time."""
    way, how = repeated(device)
    wgrad = compiled._variant(how.again.launches[1], way.x.get_device())
    monkeypatch.setitem(compiled._failed, wgrad, "it fails")
    for part in how.again.launches:
        part.ready.clear()
    left = [("aten::convolution_backward", False), ("bias", True), ("dgrad", True)]
    for times in (2, 1):
        y = way.layer(way.x)
        with tconv.recording() as calls:
            same(torch.autograd.grad(y.square().sum(), (way.x, *way.layer.parameters())), way.expected[1:])
        assert sorted((call.operation, call.ours) for call in calls) == sorted(left + left[2:] * (times - 1))
    assert how.again is None
    assert how.left == 0


@pytest.mark.parametrize("lasting", [False, True])
def test_a_gradient_that_torch_takes_can_be_differentiated(lasting, device, failing):
    """What torch makes of a call that our kernels decline has torch's own derivatives."""
    x, w, b = tensors(device)

    def gradients(f):
        y = f(x, w, b, stride=(2, 1), padding=1, groups=2)
        now = failing(LASTING["ptxas"] if lasting else NO_MEMORY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = torch.autograd.grad(y.pow(3).sum(), (x, w, b), create_graph=True)
        now.undo()
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))

    same(gradients(functional.conv2d), gradients(F.conv2d), formats=False)
