"""`enable(model)`: the calls made inside one model are ours, with their backward passes, and no others."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tconv
from tconv import override
from tconv.dispatch import scope
from tests import parity
from tests.contexts import F64, Operators, same
from tests.test_enable import overridden
from tests.test_launch import outside


@pytest.fixture(autouse=True)
def _restored():
    yield
    gc.collect()  # of models that a test leaves enabled
    with tconv.enabled():
        pass
    assert override._overrides == []
    assert override._nodes is None
    assert scope._passes.get() == ()
    assert not overridden()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "AutogradCPU")


class Net(nn.Module):
    """A layer, a subclass of one, a transposed one and a function's call."""

    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * 2, self.bias, padding=1)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), self.Own(2, 2, 3), nn.ConvTranspose2d(2, 2, 2)
        self.w = nn.Parameter(torch.randn(2, 2, 1, 1))
        self.double()

    def forward(self, x):
        return F.conv2d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))), self.w)


FORWARD = ("fprop", "fprop", "dgrad", "fprop")
BACKWARD = ("dgrad", "dgrad", "fprop", "dgrad", *["wgrad"] * 4, *["bias"] * 3)


@pytest.fixture
def x(device):
    return torch.randn(1, 2, 3, 3, dtype=F64, device=device, requires_grad=True)


@pytest.fixture
def net(device):
    return Net().to(device)


def forward(function, *args):
    """The result and the passes that were ours, without a fallback to torch."""
    with tconv.recording() as calls:
        y = function(*args)
    assert all(call.ours for call in calls), [str(call) for call in calls]
    return y, sorted(call.operation for call in calls)


def backward(y, leaves, **kwargs):
    return forward(lambda: torch.autograd.grad(y.square().sum(), leaves, **kwargs))


def nothing(function, *args):
    """The result of what must not be ours."""
    y, operations = forward(function, *args)
    assert operations == []
    return y


def test_all_its_calls_and_no_others(net, x):
    leaves = (x, *net.parameters())
    expected = net(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    with tconv.enabled(net):
        y, ran = forward(net, x)
        same(y, expected)
        assert ran == sorted(FORWARD)
        nothing(net.a, x)
        nothing(torch.autograd.grad, net.a(x).sum(), x)
        nothing(F.conv2d, x, net.w)
        got, ran = backward(y, leaves)
        same(got, gradients)
        assert ran == sorted(BACKWARD)
    nothing(net, x)


def test_a_backward_follows_what_holds_when_it_runs(net, x):
    before = net(x)
    tconv.enable(net)
    y = net(x)
    assert backward(before, x)[1] == []  # of a forward pass that was not inside
    tconv.disable(net)
    nothing(lambda: torch.autograd.grad(y.sum(), x, retain_graph=True))
    tconv.enable(net)
    assert backward(y, x, retain_graph=True)[1] == []  # what was enabled then has ended
    with tconv.enabled():
        assert backward(y, x)[1] == ["dgrad", "dgrad", "dgrad", "fprop"]
    tconv.disable(net)


def test_two_models_share_a_layer_and_an_input(net, x):
    """The same tensors, so only the graph tells whose backward it is."""
    other = nn.Sequential(net.a)
    alone = nn.Sequential(net.a)
    with tconv.enabled(other):
        y, ran = forward(other, x)
        assert ran == ["fprop"]
        z = nothing(alone, x)
        assert backward(z, (x, net.a.weight))[1] == []
        assert backward(y, (x, net.a.weight))[1] == ["dgrad", "wgrad"]
        y, z = other(x), alone(x)
        assert backward(y + z, (x, net.a.weight))[1] == ["dgrad", "wgrad"]


def test_results_that_are_not_returned(net, x):
    """Their backward passes are the model's too."""

    class Keeps(nn.Module):
        def forward(self, x):
            self.kept = net.a(x)
            return x

    keeps = Keeps()
    with tconv.enabled(keeps):
        keeps(x)
        assert backward(keeps.kept, x)[1] == ["dgrad"]


def test_gradients_of_gradients(net, x):
    def twice():
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, *net.parameters()), allow_unused=True)

    expected = twice()
    with tconv.enabled():
        everything = forward(twice)[1]
    with tconv.enabled(net):
        got, ran = forward(twice)
    same(got, expected)
    assert ran == everything


def test_nested_models(net, x):
    """Outside and in, each with its own selection; they add up, and each ends with its own call."""
    outer = nn.Sequential(nn.Conv2d(2, 2, 1, dtype=F64, device=x.device), net, nn.Conv2d(2, 2, 1, dtype=F64, device=x.device))
    with tconv.enabled(outer, operations=("fprop",)):
        inner = [call.ours for call in recorded(outer, x)]
        assert inner == [True, True, True, False, True, True]
        with tconv.enabled(net, operations=("dgrad",)):
            assert [call.ours for call in recorded(outer, x)] == [True] * 6
            assert [call.ours for call in recorded(net, x)] == [False, False, True, False]
    assert recorded(outer, x) == []


def recorded(function, *args):
    with tconv.recording() as calls:
        function(*args)
    return calls


def test_a_model_within_the_processs(net, x):
    with tconv.enabled(ranks=(1,)):
        assert [call.ours for call in recorded(net, x)] == [False] * 4
        with tconv.enabled(net, operations=("fprop",)):
            calls = recorded(net, x)
            assert [call.ours for call in calls] == [True, True, False, True]
            reason = calls[2].reason
            assert (
                reason
                == "dgrad of rank 2 in torch.float64 is not selected by enable(operations=('fprop',)) or enable(ranks=(1,))"
            )
            assert [call.ours for call in recorded(net.a, x)] == [False]


def test_a_model_twice(net, x):
    tconv.enable(net, operations=("fprop",))
    tconv.enable(net, operations=("dgrad",))
    assert [call.ours for call in recorded(net, x)] == [True] * 4
    tconv.disable(net)
    assert [call.ours for call in recorded(net, x)] == [True, True, False, True]
    tconv.disable(net)
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    assert not net._forward_hooks_always_called
    with pytest.raises(RuntimeError, match=r"tconv.disable\(a Net\) without a tconv.enable\(a Net\)"):
        tconv.disable(net)


# --- however a forward pass ends ---


class Raises(nn.Module):
    error = None

    def forward(self, x):
        y = F.conv2d(x, x.detach())
        if self.error:
            raise self.error
        return y


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_an_error_ends_it(error, x):
    """Torch calls no hook after an interrupt; what follows is outside all the same."""
    model = Raises()
    model.error = error
    outer = nn.Sequential(model)
    with tconv.enabled(model), tconv.enabled(outer):
        with pytest.raises(type(error)):
            outer(x)
        nothing(F.conv2d, x, x)
        model.error = None
        assert forward(model, x)[1] == ["fprop"]
        nothing(F.conv2d, x, x)


def test_another_hook_raises_before_ours(x):
    model = Raises()
    with tconv.enabled(model):
        handle = model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        with tconv.enabled(nn.Sequential(model)), pytest.raises(ZeroDivisionError):
            model(x)
        nothing(F.conv2d, x, x)
        handle.remove()
        assert forward(model, x)[1] == ["fprop"]


def test_a_model_that_calls_itself(x):
    class Twice(nn.Module):
        def forward(self, x, again=True):
            if again:
                x = F.conv2d(self(x, False), x.new_ones(2, 2, 1, 1))
            return F.conv2d(x, x.new_ones(2, 2, 1, 1))

    model = Twice()
    with tconv.enabled(model):
        assert forward(model, x)[1] == ["fprop"] * 3
        nothing(F.conv2d, x, x)


def test_a_call_of_itself_that_fails_before_it_begins(x):
    """Ends nothing of the call around it."""

    class Tries(nn.Module):
        def forward(self, x, again=True):
            handle = self.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
            with contextlib.suppress(ZeroDivisionError):
                self(x, False)
            handle.remove()
            return F.conv2d(x, x)

    model = Tries()
    with tconv.enabled(model):
        assert forward(model, x)[1] == ["fprop"]


# --- threads ---


def test_threads(net, x):
    """A thread's calls are inside where its own call of the model is, and at no time because another's is."""
    inside, go_on, results = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert go_on.wait(60)
            return net.a(x)

    waits = Waits()

    def work():
        results.append(forward(waits, x)[1])

    with tconv.enabled(waits):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,))
        thread.start()
        assert inside.wait(60)
        nothing(net.a, x)
        go_on.set()
        thread.join()
    assert results == [["fprop"]]


def test_a_thread_that_a_model_starts_is_outside(net, x):
    results = []

    class Starts(nn.Module):
        def forward(self, x):
            context = contextvars.copy_context()  # as asyncio.to_thread does
            thread = threading.Thread(target=context.run, args=(lambda: results.append(recorded(net.a, x)),))
            thread.start()
            thread.join()
            return x

    model = Starts()
    with tconv.enabled(model):
        model(x)
    assert results == [[]]


def test_replicas_as_data_parallel_makes_them(net, x):
    """They share the hooks, and are called in threads of their own."""
    expected, results = net(x), []
    with tconv.enabled(net):
        replicas = [net._replicate_for_data_parallel() for _ in range(2)]
        for replica in replicas:
            replica._parameters = net._parameters
        threads = [threading.Thread(target=lambda r=r: results.append(r(x))) for r in replicas]
        with tconv.recording() as calls:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        parity.assert_ours(calls, *FORWARD * 2)
        assert backward(sum(results), x)[1] == ["dgrad"] * 6 + ["fprop"] * 2
    same(results, [expected] * 2)


def test_a_backward_in_another_thread(net, x):
    results = []
    with tconv.enabled(net):
        y = net(x)
        thread = threading.Thread(target=lambda: results.append(backward(y, x)[1]))
        thread.start()
        thread.join()
    assert results == [["dgrad", "dgrad", "dgrad", "fprop"]]


def test_a_backward_inside_of_a_graph_outside(net, x):
    """On a GPU another thread runs it, so where it is called from cannot count."""
    y = net(x)

    class Differentiates(nn.Module):
        def forward(self, x):
            (g,) = torch.autograd.grad(y.sum(), x)
            return net.a(g)

    model = Differentiates()
    with tconv.enabled(model):
        assert forward(model, x)[1] == ["fprop"]


# --- what computes again, and what is compiled ---


class Part(nn.Module):
    """A net, all of it or a part of it, that is computed again in the backward pass."""

    def __init__(self, net, reentrant, function=False):
        super().__init__()
        self.net, self.reentrant, self.function = net, reentrant, function

    def forward(self, x):
        part = (lambda x: torch.relu(self.net(x))) if self.function else self.net
        return (checkpoint(part, torch.tanh(x), use_reentrant=self.reentrant) * 2,)


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant, function, net, x):
    """What is computed again is inside, too, by whatever code."""
    model = Part(net, reentrant, function)
    leaves = (x, *net.parameters())

    def run():
        (y,) = model(x)
        y.square().sum().backward()
        grads = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return y, *grads

    expected = run()
    with tconv.enabled():
        everything = forward(run)[1]
    assert len(everything) > len(FORWARD) + len(BACKWARD)
    with tconv.enabled(model):
        got, ran = forward(run)
        nothing(net, x)
    same(list(got), list(expected))
    assert ran == everything
    nothing(run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it(reentrant, net, x):
    """The model is called anew in the backward pass, as part of that."""

    def run():
        checkpoint(lambda x: net(torch.tanh(x)), x, use_reentrant=reentrant).square().sum().backward()

    with tconv.enabled():
        everything = forward(run)[1]
    assert len(everything) > len(FORWARD) + len(BACKWARD)
    with tconv.enabled(net):
        assert forward(run)[1] == everything


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    more: dict


def test_outputs_of_any_structure(net, x):
    class Wraps(nn.Module):
        def forward(self, x):
            y = checkpoint(net, x, use_reentrant=True)
            return {"out": [Output(y, {}), None, "text", Output]}

    model = Wraps()
    with tconv.enabled(model):
        y = model(x)["out"][0].logits
        assert forward(lambda: y.sum().backward())[1] == sorted((*FORWARD, *BACKWARD))


def test_a_graph_made_before_is_not_marked(net, x):
    """Of what is computed again, all nodes are marked that lie between the outputs and the inputs, and none before."""
    model = Part(net, True)
    given = net.a(x)
    with tconv.enabled(model):
        (y,) = model(given)
        assert forward(lambda: y.sum().backward())[1] == sorted((*FORWARD, *BACKWARD))  # not another dgrad, wgrad, bias


@pytest.mark.parametrize("way", ["outer", "inner", "in place"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, way, net, x):
    """Enabled is what torch.compile returns, or the model within; no frame of ours is compiled."""
    torch._dynamo.reset()
    expected = net(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, *net.parameters()))
    compiled = net
    if way == "in place":
        net.compile(backend=backend)
    else:
        compiled = torch.compile(net, backend=backend, fullgraph=way == "outer")
    enabled = compiled if way == "outer" else net
    frames = torch._dynamo.utils.counters["frames"]["total"]
    tconv.enable(enabled)
    for _ in range(2):  # the first one traces
        y, ran = forward(compiled, x)
        same(y, expected)
        assert ran == sorted(FORWARD)
        got, ran = backward(y, (x, *net.parameters()))
        same(got, gradients)
        assert ran == sorted(BACKWARD)
    assert torch._dynamo.utils.counters["frames"]["total"] - frames <= (1 if way == "outer" else 3)
    tconv.disable(enabled)
    nothing(compiled, x)


def test_a_whole_graph_of_a_model_with_hooks_says_what_to_do():
    """In a fresh process: what dynamo has once left to Python, it does not look at again."""
    code = (
        "import torch, tconv, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))\n"
        "tconv.enable(model)\n"
        "try:\n"
        "    torch.compile(model, backend='eager', fullgraph=True)(torch.ones(1, 1, 1, 1))\n"
        "except Exception as e:\n"
        "    print('enable what torch.compile returns' in str(e))\n"
    )
    assert outside("-c", code) == "True\n"


# --- copies ---


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_are_enabled_themselves(copied, net, x):
    """And end by themselves, also where a block's copy lives on."""
    tconv.enable(net, operations=("fprop",))
    twin = copied(net)
    tconv.disable(net)
    assert not tconv.is_enabled(net)
    assert tconv.is_enabled(twin)
    assert [call.ours for call in recorded(twin, x)] == [True, True, False, True]
    nothing(net, x)
    tconv.disable(twin)
    nothing(twin, x)
    with tconv.enabled(net):
        twin = copied(net)
        assert not tconv.is_enabled(twin)
        nothing(twin, x)
    nothing(twin, x)


def test_a_model_that_goes_takes_its_override_along(net, x):
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    tconv.enable(model)
    assert overridden()
    del model
    gc.collect()
    nothing(net, x)
    with tconv.enabled(net):
        pass
    assert not overridden()


@pytest.mark.parametrize("process", [False, True])
def test_a_call_notices_that_a_model_has_gone(process, net, x):
    with tconv.enabled() if process else contextlib.nullcontext():
        model = nn.Sequential(nn.Conv2d(2, 2, 1))
        tconv.enable(model)
        assert override._nodes is not None
        del model
        gc.collect()
        recorded(net, x)
        assert override._nodes is None
        assert overridden() is process
        assert (override._overrides != []) is process


# --- the rest ---


def test_is_enabled(net):
    with tconv.enabled(net, ranks=(2,)):
        assert tconv.is_enabled(net)
        assert tconv.is_enabled(net, rank=2)
        assert not tconv.is_enabled(net, rank=1)
        assert not tconv.is_enabled()
        assert not tconv.is_enabled(net.a)
        with tconv.enabled(ranks=(1,)):
            assert tconv.is_enabled(net, rank=1)
            assert tconv.is_enabled(net.a)
    assert not tconv.is_enabled(net)


@pytest.mark.parametrize("function", [tconv.enable, tconv.disable, tconv.is_enabled, lambda m: tconv.enabled(m).__enter__()])
@pytest.mark.parametrize(("given", "what"), [(None, "a NoneType"), (nn.Conv2d, "the class Conv2d"), ("cuda", "a str")])
def test_what_is_no_module_is_refused(function, given, what):
    with pytest.raises(TypeError, match=rf"wants a torch.nn.Module, or none for the whole process; it was given {what}"):
        function(given)
    assert not overridden()


def test_a_bad_selection_hooks_nothing(net):
    with pytest.raises(ValueError, match="ranks"):
        tconv.enable(net, ranks=(4,))
    assert not net._forward_pre_hooks
    assert not overridden()


def test_modes_and_transforms_inside(net, x):
    """Autograd's operators are the same to who watches, and to transforms."""
    leaves = (x, *net.parameters())
    with Operators() as expected:
        torch.autograd.grad(net(x).sum(), leaves)
    with tconv.enabled(net):
        with Operators() as got:
            assert forward(lambda: torch.autograd.grad(net(x).sum(), leaves))[1] == sorted((*FORWARD, *BACKWARD))
        assert got.seen == expected.seen
        want = torch.func.jacrev(lambda x: net(x).sum())(x.detach())
        gradient, ran = forward(torch.func.grad(lambda x: net(x).sum()), x.detach())
        assert len(ran) == 8
        same(gradient, want)


def test_explain(net, x):
    with tconv.enabled(net):
        explanation = tconv.explain(net, x)
        assert explanation.ours
        assert sorted(call.operation for call in explanation.calls) == sorted((*FORWARD, *BACKWARD))


def test_frozen_layers_and_inference(net, x):
    """Neither a graph nor a mark is needed there."""
    with tconv.enabled(net):
        with torch.inference_mode():
            assert forward(net, x.detach().clone())[1] == sorted(FORWARD)
        net.requires_grad_(False)
        assert forward(net, x.detach())[1] == sorted(FORWARD)
        assert backward(net(x), x)[1] == ["dgrad", "dgrad", "dgrad", "fprop"]


def test_another_librarys_kernel_of_autograds(net, x):
    """Then nodes are marked from the outputs alone: under a mode, torch would take one of two such kernels for the other."""
    library = torch.library.Library("aten", "IMPL")
    key = "AutogradCPU" if x.device.type == "cpu" else "AutogradCUDA"
    before = torch.library.get_kernel("aten::convolution", key)
    library.impl("convolution", lambda keys, *args: before.call_boxed(keys, *args), key, with_keyset=True, allow_override=True)
    with tconv.enabled(net):
        with Operators():
            y, ran = forward(net, x)
        assert ran == sorted(FORWARD)
        assert backward(y, x)[1] == ["dgrad", "dgrad", "dgrad", "fprop"]
    library._destroy()
