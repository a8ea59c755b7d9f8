"""Tensors of a user's class: their methods are not ours to call, and results are of the type that torch would give."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tconv
from tests import parity
from tests.contexts import same


def forbidden(name):
    def method(self, *_, **__):
        raise AssertionError(f"{name} of a user's tensor was called")

    return method


METHODS = (
    "new_empty", "new_empty_strided", "new_zeros", "stride", "size", "data_ptr", "dim", "numel", "get_device", "element_size",
    "is_contiguous", "contiguous", "is_neg", "untyped_storage", "unsqueeze", "squeeze", "view", "expand", "to", "sum", "detach",
    "clone", "is_floating_point", "is_inference", "as_subclass",
)  # fmt: skip
Strict = type("Strict", (torch.Tensor,), {name: forbidden(name) for name in METHODS})
# Whose properties are the user's, too. Torch itself asks a gradient that is passed in for some of them.
Stricter = type("Stricter", (Strict,), {n: property(forbidden(n)) for n in ("shape", "dtype", "device", "ndim", "layout")})


class Traced(torch.Tensor):
    """A MetaTensor of MONAI's kind: sees functions, adds to each result, and makes memory its own way."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.applied = getattr(function, "__name__", str(function))
        return result

    def new_empty(self, *args, **kwargs):
        raise TypeError("a size and its meta data")

    def new_empty_strided(self, *args, **kwargs):
        raise TypeError("a size and its meta data")


class Plain(torch.Tensor):
    """Asks torch to leave results as they are."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Sealed(Strict):
    """Knows one function."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function in (F.conv2d, F.conv_transpose2d, F.conv1d), function
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


CLASSES = {"strict": Strict, "stricter": Stricter, "traced": Traced, "plain": Plain, "sealed": Sealed}
LAYERS = {
    "Conv2d": ((4, 6, 3), (2, 4, 6, 5)),
    "ConvTranspose2d": ((4, 6, 3), (2, 4, 3, 3)),
    "Conv1d": ((4, 6, 3), (2, 4, 9)),
}


def of(cls, t):
    with torch._C.DisableTorchFunction():
        return torch.Tensor.as_subclass(torch.Tensor.detach(t), cls)


def plainly(t):
    with torch._C.DisableTorchFunction():
        return torch.Tensor.as_subclass(t, torch.Tensor)


def called(cls, which, name, library, device):
    """A function with one argument of a class: the result and its type, gradients and theirs."""
    args, shape = LAYERS[name]
    torch.manual_seed(3)
    layer = getattr(nn, name)(*args, device=device)
    x = torch.randn(shape, device=device)
    given = [x, layer.weight.detach(), layer.bias.detach()]
    leaves = [given[i] if i != which else of(cls, given[i]) for i in range(3)]
    with torch._C.DisableTorchFunction():
        for t in leaves:
            torch.Tensor.requires_grad_(t)
    function = getattr(library, {"Conv2d": "conv2d", "ConvTranspose2d": "conv_transpose2d", "Conv1d": "conv1d"}[name])
    y = function(*leaves)
    dy = torch.linspace(-1, 1, plainly(y).numel(), device=device).view_as(plainly(y))
    plainly(y).backward(dy)
    with torch._C.DisableTorchFunction():
        grads = [torch.Tensor.grad.__get__(t) for t in leaves]
    return [type(y), *map(type, grads)], [plainly(t) for t in (y, *grads)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_users_class_under_the_override(cls, which, name, device):
    types, expected = called(CLASSES[cls], which, name, F, device)
    with tconv.enabled(), tconv.recording() as calls:
        got_types, got = called(CLASSES[cls], which, name, F, device)
    assert got_types == types
    same(got, expected)
    forward, back = ("dgrad", "fprop") if "Transpose" in name else ("fprop", "dgrad")
    parity.assert_ours(calls, forward, back, "wgrad", "bias")


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_users_class_in_our_functions(cls, which, device):
    """Is torch's to take, whose function it is to see; nothing of it is asked before."""
    types, expected = called(CLASSES[cls], which, "Conv2d", F, device)
    with tconv.recording() as calls:
        got_types, got = called(CLASSES[cls], which, "Conv2d", tconv.functional, device)
    assert got_types == types
    same(got, expected)
    assert [str(call) for call in calls] == [f"conv2d: torch (a user's tensor subclass, {CLASSES[cls].__name__})"]


@pytest.mark.parametrize("second", [False, True], ids=["gradients", "their gradients"])
@pytest.mark.parametrize("way", ["enable", "layer", "autocast", "forward mode"])
@pytest.mark.parametrize("cls", ["traced", "plain"])
def test_a_gradient_of_a_users_class(cls, way, second, device):
    """A gradient that is passed in: types and values of what comes of it are torch's, the kernels ours."""

    def run(library):
        torch.manual_seed(3)
        layer, x = library.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
        lower = torch.autocast(torch.device(device).type, torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
        dual = torch.autograd.forward_ad.dual_level() if way == "forward mode" else contextlib.nullcontext()
        with lower, dual:
            y = layer(x)
        leaves = x, layer.weight, layer.bias
        dy = of(CLASSES[cls], torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(y.dtype))
        grads = torch.autograd.grad(y, leaves, dy, create_graph=second)
        if second:
            grads = torch.autograd.grad(sum(plainly(g).square().sum() for g in grads[:2]), leaves[:2])
        return [*map(type, grads)], [plainly(g).float() for g in grads]

    types, expected = run(nn)
    assert set(types) == {torch.Tensor}
    with tconv.enabled() if way == "enable" else contextlib.nullcontext(), tconv.recording() as calls:
        got_types, got = run(nn if way == "enable" else tconv)
    assert got_types == types
    tolerance = 4e-2 if way == "autocast" else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert all(call.ours for call in calls), [*map(str, calls)]


def test_after_a_users_class_plain_tensors_are_still_ours(device):
    layer, x = nn.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 5, device=device)
    with tconv.enabled(), tconv.recording() as calls:
        for t in (x, of(Traced, x), x):
            layer(t)
    parity.assert_ours(calls, *["fprop"] * 3)


def test_an_operator_called_with_a_users_class(device):
    """By its name, as what was traced would."""
    x, w = torch.randn(2, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    with tconv.recording() as calls:
        y = torch.ops.tconv.fprop(of(Strict, x), w, None, (1, 1), (0, 0), (0, 0), (1, 1), 1)
    parity.assert_same(plainly(y), F.conv2d(x, w))
    parity.assert_ours(calls, "fprop")
