"""A layer's repeated call takes a short way; whatever changes in between must look as if it had been the first call."""

import contextlib
import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tconv
from tconv.dispatch import autograd, entry
from tconv.launching import launch, variants
from tconv.launching.dry_run import dry_run
from tconv.launching.record import Fallback
from tconv.planning.tiles import Tile
from tests import parity

TILE = Tile(16, 16, 16)


class Wrapped(torch.Tensor):
    """A subclass that behaves like its parent."""


class Forgetful(dict):
    """Keeps nothing, so that every call goes the long way."""

    def __setitem__(self, key, value):
        pass


class TransientFallback(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def within(context):
    def change(layer, x):
        with context(x):
            return layer(x)

    return change


def given(make):
    return lambda layer, x: layer(make(x))


def assigned(**attributes):
    def change(layer, x):
        for name, value in attributes.items():
            setattr(layer, name, value)
        return layer(x)

    return change


def with_weight(make):
    def change(layer, x):
        layer.weight.data = make(layer.weight.data)
        return layer(x)

    return change


def after(context, other):
    """The second of two calls, in one context and in another."""

    def change(layer, x):
        with context(x):
            layer(x)
        with other(x):
            return layer(x)

    return change


def other_autocast(layer, x):
    layer, x = layer.bfloat16(), x.bfloat16()
    of = {dtype: lambda x, dtype=dtype: torch.autocast(x.device.type, dtype) for dtype in (torch.bfloat16, torch.half)}
    return after(*of.values())(layer, x)


def dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def edited_list(layer, x):
    layer.stride = [1, 1]
    layer(x)
    layer.stride[0] = 2
    return layer(x)


def edited_weight(layer, x):
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def weight_of_a_transposed_layer(layer, x):
    return tconv.functional.conv_transpose2d(
        x, layer.weight, layer.bias, layer.stride, layer.padding, 0, layer.groups, layer.dilation
    )


def misaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)


def batched_gradient(layer, x):
    y = layer(x.requires_grad_())
    return torch.autograd.grad(y, x, torch.ones(2, *y.shape, device=x.device), is_grads_batched=True)[0]


CHANGES = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "a functional gradient": lambda layer, x: torch.func.grad(lambda v: layer(v).sum())(x),
    "other parameters": lambda layer, x: torch.func.functional_call(layer, {"weight": 2 * layer.weight.detach()}, (x,)),
    "forward mode": dual,
    "jit tracing": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False)(x),
    "fx tracing": lambda layer, x: torch.fx.symbolic_trace(layer)(x),
    "a dispatch mode": within(lambda x: FlopCounterMode(display=False)),
    "a function mode": within(lambda x: TransientFallback()),
    "a default device": within(lambda x: torch.device(x.device)),
    "autocast": within(lambda x: torch.autocast(x.device.type, torch.bfloat16)),
    "autocast elsewhere": within(lambda x: torch.autocast("cuda" if x.device.type == "cpu" else "cpu", torch.bfloat16)),
    "autocast to another dtype": other_autocast,
    "inference mode": within(lambda x: torch.inference_mode()),
    "no_grad": within(lambda x: torch.no_grad()),
    "a forced plan": within(lambda x: tconv.force(tile=TILE)),
    "no forced plan": after(lambda x: tconv.force(tile=TILE), lambda x: contextlib.nullcontext()),
    "explain": lambda layer, x: str(tconv.explain(layer, x)),
    "a batched gradient": batched_gradient,
    "a negated view": given(torch._neg_view),
    "a zero tensor": given(lambda x: torch._efficientzerotensor(x.shape, device=x.device)),
    "a sparse tensor": given(lambda x: x.to_sparse()),
    "a subclass": given(lambda x: x.as_subclass(Wrapped)),
    "a list": given(lambda x: x.tolist()),
    "a meta tensor": given(lambda x: x.to("meta")),
    "another dtype": given(torch.Tensor.double),
    "a layer of another dtype": lambda layer, x: layer.double()(x.double()),
    "fewer images": given(lambda x: x[:1]),
    "one image": given(lambda x: x[0]),
    "other strides": given(lambda x: x.transpose(2, 3)),
    "channels_last": given(lambda x: x.to(memory_format=torch.channels_last)),
    "an input that asks for a gradient": lambda layer, x: torch.autograd.grad(layer(x.requires_grad_()).sum(), x),
    "a frozen layer": lambda layer, x: layer.requires_grad_(False)(x),
    "other weights": with_weight(lambda w: w.flip(0).contiguous()),
    "weights of other strides": with_weight(lambda w: w.to(memory_format=torch.channels_last)),
    "smaller weights": with_weight(lambda w: w[:, :, :2, :2].contiguous()),
    "weights edited before backward": edited_weight,
    "a transposed layer of the same weight": weight_of_a_transposed_layer,
    "no bias": assigned(bias=None),
    "stride": assigned(stride=(2, 1)),
    "stride bools": assigned(stride=(True, True)),
    "stride floats": assigned(stride=(1.0, 1.0)),
    "stride equal, another tuple": assigned(stride=tuple([1, 1])),  # noqa: C409  # a literal is one object
    "a stride's list edited": edited_list,
    "padding in words": assigned(padding="same"),
    "padding a bool": assigned(padding=(True, 0)),
    "padding floats": assigned(padding=(0.0, 0.0)),
    "dilation": assigned(dilation=(1, 2)),
    "dilation bools": assigned(dilation=(True, True)),
    "groups": assigned(groups=3),
    "groups a bool": assigned(groups=True),
    "groups a float": assigned(groups=1.0),
    "padding mode": assigned(padding=(1, 1), _reversed_padding_repeated_twice=[1, 1, 1, 1], padding_mode="circular"),
}  # fmt: skip


def observed(change, layer, x):
    """(What a call returns or raises, the record of it)."""
    with tconv.recording() as calls:
        result = parity.outcome(lambda: change(layer, x.clone()))
    return result, list(map(str, calls))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*autocast:UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name, device, monkeypatch):
    warm = tconv.Conv2d(3, 3, 3, device=device)
    cold, x = copy.deepcopy(warm), torch.randn(2, 3, 6, 6, device=device)
    with monkeypatch.context() as m:
        m.setattr(entry, "fast_paths", Forgetful())
        expected, record = observed(CHANGES[name], cold, x)
    for _ in range(2):
        warm(x)
    got, again = observed(CHANGES[name], warm, x)
    assert again == record
    if isinstance(expected, torch.Tensor):
        assert type(got) is type(expected)
        assert got.requires_grad == expected.requires_grad
        assert got.is_inference() == expected.is_inference()
        parity.assert_same(got, expected)
    elif not isinstance(expected, tuple) or not isinstance(expected[0], torch.Tensor):
        assert got == expected


def test_the_flag_for_tf32_is_noticed(device):
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device)
    entry.fast_paths.clear()
    for tf32 in (True, False, True):
        with variants.float32_precision(tf32):
            for _ in range(2):
                layer(x)
            (seen,) = entry.fast_paths.values()
            assert seen.precision == ("tf32" if tf32 else "ieee")


def test_explaining_a_repeated_call_launches_nothing(device, monkeypatch):
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    for _ in range(2):
        layer(x)
    parity.forbid_launches(monkeypatch, pytest.fail.Exception("a kernel was launched"))
    assert tconv.explain(layer, x).ours
    with tconv.recording() as calls, dry_run():  # with the layer's own Parameters, of which explain has copies
        layer(x)
    parity.assert_ours(calls, "fprop")


@pytest.mark.parametrize("off", ["input", "weight"])
def test_an_address_that_is_no_longer_aligned_is_noticed(off, device, monkeypatch):
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device)
    for _ in range(2):
        layer(x)
    if off == "input":
        x = misaligned(x)
    else:
        layer.weight.data = misaligned(layer.weight.data)
    monkeypatch.delattr(entry, "_convolve")
    with pytest.raises(NameError):
        layer(x)


@pytest.mark.parametrize("name", parity.LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_repeated_call_takes_the_short_way(name, bias, device, monkeypatch):
    layer = getattr(tconv, name)(2, 2, 3, bias=bias, device=device)
    x = torch.randn(1, 2, *(5,) * parity.rank(name), device=device)
    for _ in range(2):
        first = layer(x)
    monkeypatch.delattr(entry, "_convolve")
    with tconv.recording() as calls:
        second = layer(x.clone())
    assert torch.equal(first, second)
    assert second.requires_grad
    parity.assert_ours(calls, calls[0].operation)


def test_a_subclass_may_compute_its_weight(device):
    """The short way to a layer's own Parameters is for the plain classes."""

    class Doubled(tconv.Conv2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return 2 * value if name == "weight" else value

    layer, x = Doubled(2, 2, 3, bias=False, device=device), torch.randn(1, 2, 5, 5, device=device)
    plain = tconv.Conv2d(2, 2, 3, bias=False, device=device)
    layer.load_state_dict(plain.state_dict())  # its own were never initialised, but twice what they were
    torch.testing.assert_close(layer(x), 2 * plain(x))


CALLS = {
    "equal tuples": lambda x, w, b, i: tconv.functional.conv2d(x, w, b, stride=tuple([1, 1]), padding=tuple([0, 0])),  # noqa: C409
    "with and without a gradient of the input": lambda x, w, b, i: tconv.functional.conv2d(x.requires_grad_(i % 2 == 1), w, b),
    "frozen and not": lambda x, w, b, i: tconv.functional.conv2d(x, w.requires_grad_(i % 2 == 1), b),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_turn_are_all_repeated(name, device, monkeypatch):
    w, b = (torch.nn.Parameter(torch.randn(s, device=device)) for s in ((4, 3, 3, 3), 4))
    x = torch.randn(2, 3, 6, 6, device=device)
    entry.fast_paths.clear()
    for i in range(4):
        CALLS[name](x.clone(), w, b, i)
    monkeypatch.delattr(entry, "_convolve")
    for i in range(4):
        assert CALLS[name](x.clone(), w, b, i).shape == (2, 4, 4, 4)


def test_nothing_is_prepared_for_shapes_that_do_not_repeat(device):
    layer = tconv.Conv1d(2, 3, 3, device=device)
    entry.fast_paths.clear()
    for n in range(3, 8):
        layer(torch.randn(1, 2, n, device=device))
    assert [*entry.fast_paths.values()] == [None] * 5


# --- backward ---


def grad(y, leaves, dy, **more):
    return torch.autograd.grad(y, leaves, dy, **more)


def backward_within(context):
    def change(y, leaves, dy):
        with context(dy):
            return grad(y, leaves, dy)

    return change


def with_gradient(make):
    return lambda y, leaves, dy: grad(y, leaves, make(dy))


def second_derivative(y, leaves, dy):
    first = grad(y, leaves, dy.requires_grad_(), create_graph=True)
    return grad([(g**2).sum() for g in first], (*leaves[:2], dy))


def weight_edited(y, leaves, dy):
    with torch.no_grad():
        leaves[1].add_(1)
    return grad(y, leaves, dy)


def weight_of_other_strides(y, leaves, dy):
    leaves[1].data = leaves[1].data.to(memory_format=torch.channels_last)
    return grad(y, leaves, dy)


BACKWARD = {
    "the input's alone": lambda y, leaves, dy: grad(y, leaves[:1], dy),
    "the weight's alone": lambda y, leaves, dy: grad(y, leaves[1:2], dy),
    "the bias' alone": lambda y, leaves, dy: grad(y, leaves[2:], dy),
    "twice": lambda y, leaves, dy: (*grad(y, leaves, dy, retain_graph=True), *grad(y, leaves, 2 * dy)),
    "another layout": with_gradient(lambda dy: dy.to(memory_format=torch.channels_last)),
    "an expanded gradient": with_gradient(lambda dy: dy[:1, :1, :1, :1].expand(dy.shape)),
    "a misaligned gradient": with_gradient(misaligned),
    "a negated gradient": with_gradient(torch._neg_view),
    "a zero gradient": with_gradient(lambda dy: torch._efficientzerotensor(dy.shape, device=dy.device)),
    "a subclass": with_gradient(lambda dy: dy.as_subclass(Wrapped)),
    "batched gradients": lambda y, leaves, dy: grad(y, leaves, torch.stack([dy, 2 * dy]), is_grads_batched=True),
    "a second derivative": second_derivative,
    "a dispatch mode": backward_within(lambda dy: FlopCounterMode(display=False)),
    "a function mode": backward_within(lambda dy: TransientFallback()),
    "autocast": backward_within(lambda dy: torch.autocast(dy.device.type, torch.bfloat16)),
    "a forced plan": backward_within(lambda dy: tconv.force(tile=TILE)),
    "another precision": backward_within(lambda dy: variants.float32_precision(True)),
    "forward mode": backward_within(lambda dy: forward_ad.dual_level()),
    "weights edited before": weight_edited,
    "weights of other strides": weight_of_other_strides,
}


def trained(layer, x, change):
    leaves = (x, *layer.parameters())
    return change(layer(x), leaves, torch.linspace(-1, 1, 96, device=x.device).view(2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", BACKWARD)
def test_a_change_is_noticed_in_backward(name, device, monkeypatch):
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    warm, cold = copy.deepcopy(layer), copy.deepcopy(layer)
    with variants.float32_precision(False):
        with monkeypatch.context() as m:
            m.setattr(autograd, "KEPT", 0)
            for _ in range(2):
                trained(cold, x, grad)
            expected, record = observed(lambda layer, x: trained(layer, x.detach().requires_grad_(), BACKWARD[name]), cold, x)
        entry.fast_paths.clear()
        for _ in range(3):
            trained(warm, x, grad)
        (seen,) = entry.fast_paths.values()
        assert seen.how.again is not None
        got, again = observed(lambda layer, x: trained(layer, x.detach().requires_grad_(), BACKWARD[name]), warm, x)
    assert again == record
    if not isinstance(expected, tuple) or not isinstance(expected[0], torch.Tensor):
        assert got == expected
    else:
        for g, right in zip(got, expected, strict=True):
            assert type(g) is type(right)
            parity.assert_same(g, right)


@pytest.mark.parametrize("name", parity.LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_repeated_backward_takes_the_short_way(name, bias, device, monkeypatch):
    layer = getattr(tconv, name)(2, 2, 3, bias=bias, device=device)
    x = torch.randn(1, 2, *(5,) * parity.rank(name), device=device, requires_grad=True)

    def step():
        y = layer(x)
        return torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    for _ in range(2):
        step()
    with tconv.recording() as long:
        first = step()
    monkeypatch.delattr(autograd, "operations")
    with tconv.recording() as short:
        second = step()
    assert all(map(torch.equal, first, second))
    assert list(map(str, short)) == list(map(str, long))
    assert len(short) == (4 if bias else 3)


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_a_kernel_that_fails_is_not_tried_again_and_again(device, monkeypatch):
    """Else the other gradients would be computed twice in every step."""
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    entry.fast_paths.clear()
    for _ in range(3):
        right = trained(layer, x, grad)
    (seen,) = entry.fast_paths.values()
    launches, run = [], launch.run

    def failing(prepared, pointers):
        launches.append(prepared.call.operation)
        if prepared.call.operation == "wgrad":
            raise Fallback("it fails")
        run(prepared, pointers)

    monkeypatch.setattr(launch, "run", failing)
    for _ in range(2):
        launches.clear()
        for got, g in zip(trained(layer, x, grad), right, strict=True):
            parity.assert_same(got, g)
    assert seen.how.again is None
    assert launches.count("dgrad") == 1


def test_a_backward_that_another_thread_forgets_meanwhile(device):
    class Raced(autograd.ForwardState):
        """What is prepared is there when it is looked at first, and gone from then on."""

        @property
        def again(self):
            return self.prepared_backward.pop() if self.prepared_backward else None

        @again.setter
        def again(self, prepared):
            self.prepared_backward = [] if prepared is None else [prepared]

    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    entry.fast_paths.clear()
    for _ in range(3):
        right = trained(layer, x, grad)
    (seen,) = entry.fast_paths.values()
    raced = Raced(False, seen.how.g, seen.how.prepared)
    raced.again, seen.how = seen.how.again, raced
    for got, g in zip(trained(layer, x, grad), right, strict=True):
        assert torch.equal(got, g)


def test_layouts_that_keep_changing_are_not_kept_for_ever(device):
    """A new layout costs what comparing costs, a few times only."""
    layer, x = tconv.Conv2d(3, 3, 3, device=device), torch.randn(2, 3, 6, 6, device=device, requires_grad=True)
    entry.fast_paths.clear()
    for _ in range(2):
        layer(x)
    for i in range(2 * autograd.KEPT):
        dy = torch.ones(2, 3, 4, 4, device=device)
        grad(layer(x), x, dy if i % 2 else dy.to(memory_format=torch.channels_last))
    (seen,) = entry.fast_paths.values()
    assert seen.how.left == 0
