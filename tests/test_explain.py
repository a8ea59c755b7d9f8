"""What explain and the record of calls say is what happens, and nothing falls back to torch without a word."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import tconv
from tconv.launching import record
from tests import parity

ROOT = pathlib.Path(tconv.__file__).parents[1]


@pytest.fixture
def no_launch(monkeypatch):
    parity.forbid_launches(monkeypatch, pytest.fail.Exception("a kernel was launched"))


def conv2d(device, **more):
    return tconv.Conv2d(4, 6, 3, device=device, **more), torch.randn(2, 4, 5, 6, device=device)


def run(layer, x):
    """The calls of a forward and backward pass."""
    with tconv.recording() as calls:
        y = layer(x.detach().requires_grad_())
        y.backward(torch.ones_like(y))
    return tuple(calls)


# --- explain ---

EXPLAINED = {
    "Conv2d": (
        tconv.Conv2d, (4, 6, 3), {}, (2, 4, 5, 6), {"fprop": "gather", "dgrad": "gather", "wgrad": "wgrad", "bias": "bias"},
    ),
    "depthwise": (
        tconv.Conv1d, (4, 4, 3), {"groups": 4}, (2, 4, 9),
        {"fprop": "depthwise", "dgrad": "depthwise", "wgrad": "depthwise_wgrad", "bias": "bias"},
    ),
    "without bias": (
        tconv.Conv3d, (2, 3, 2), {"bias": False}, (1, 2, 3, 3, 3), {"fprop": "gather", "dgrad": "gather", "wgrad": "wgrad"},
    ),
    "transposed": (
        tconv.ConvTranspose2d, (4, 6, 3), {"stride": 2}, (2, 4, 3, 3),
        {"dgrad": "gather", "fprop": "gather", "wgrad": "wgrad", "bias": "bias"},
    ),
    "a padding mode": (
        tconv.Conv1d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 9),
        {"fprop": "gather", "dgrad": "gather", "wgrad": "wgrad", "bias": "bias"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINED)
def test_it_names_kernel_and_tile_of_each_pass_and_launches_nothing(name, device, no_launch):
    cls, args, more, shape, kernels = EXPLAINED[name]
    layer, x = cls(*args, **more, device=device), torch.randn(shape, device=device)
    with pytest.raises(pytest.fail.Exception, match="a kernel was launched"):
        layer(x)
    explanation = tconv.explain(layer, x)
    assert explanation.ours
    assert {call.operation: call.plan.kernel for call in explanation.calls} == kernels
    lines = str(explanation).splitlines()
    assert len(lines) == len(kernels)
    for line, call in zip(lines, explanation.calls, strict=True):
        assert line.startswith(f"{call.operation}: {call.plan.kernel} {call.plan.tile} ")
        assert call.plan.reason in line
        assert str(call.problem) in line


@pytest.mark.parametrize("name", ["Conv2d", "transposed"])
def test_what_it_says_is_what_runs(name, device):
    cls, args, more, shape, _ = EXPLAINED[name]
    layer, x = cls(*args, **more, device=device), torch.randn(shape, device=device)
    assert tconv.explain(layer, x).calls == run(layer, x)


def test_nothing_is_left_behind(device):
    layer, x = conv2d(device)
    x.requires_grad_()
    layer.weight.grad = torch.ones_like(layer.weight)
    state, value = {k: v.clone() for k, v in layer.state_dict().items()}, x.detach().clone()
    tconv.explain(layer, x)
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    assert layer.bias.grad is None
    assert x.grad is None
    assert torch.equal(x, value)
    for key, before in state.items():
        assert torch.equal(layer.state_dict()[key], before)
    parity.assert_same(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias))  # kernels run again


def test_a_batch_norm_in_training_keeps_its_statistics(device):
    """What it would take up is whatever memory holds."""
    layer, x = conv2d(device)
    norm = torch.nn.BatchNorm2d(layer.out_channels, device=device)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    assert tconv.explain(torch.nn.Sequential(layer, norm), x).ours
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_kernels_run_again_after_a_layer_has_raised(device):
    layer, x = conv2d(device)
    with pytest.raises(RuntimeError, match="expected input"):
        tconv.explain(layer, x[:, :3])
    parity.assert_same(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias))


def test_functions_frozen_weights_and_disabled_gradients(device, no_launch):
    layer, x = conv2d(device)
    w, b = layer.weight.detach(), layer.bias.detach()
    passes = ["fprop", "dgrad", "wgrad", "bias"]
    assert [c.operation for c in tconv.explain(tconv.functional.conv2d, x, w, b).calls] == passes
    assert [c.operation for c in tconv.explain(tconv.functional.conv2d, x, w, stride=2).calls] == passes[:3]
    with torch.no_grad():
        assert [c.operation for c in tconv.explain(layer, x).calls] == passes
    layer.requires_grad_(False)
    assert [c.operation for c in tconv.explain(layer, x).calls] == passes[:2]


def test_inputs_by_name_count_like_others(device, no_launch):
    layer, x = conv2d(device)
    assert tconv.explain(layer, input=x).calls == tconv.explain(layer, x).calls


def test_inference_mode(device, no_launch):
    layer, x = conv2d(device)
    expected = tconv.explain(layer, x).calls
    with torch.inference_mode():
        assert tconv.explain(layer, x).calls == expected
        of_inference = torch.randn_like(x)
        assert tconv.explain(layer, of_inference).calls == expected
    assert tconv.explain(layer, of_inference).calls == expected


def test_several_layers(device, no_launch):
    model = torch.nn.Sequential(tconv.Conv1d(2, 3, 3), torch.nn.ReLU(), tconv.ConvTranspose1d(3, 2, 3)).to(device)
    explanation = tconv.explain(model, torch.randn(1, 2, 9, device=device))
    assert sorted(call.operation for call in explanation.calls) == sorted(("fprop", "dgrad", "wgrad", "bias") * 2)


def test_a_forced_plan_is_explained(device, no_launch):
    layer, x = conv2d(device, groups=2)
    tile = tconv.explain(layer, x).calls[0].plan.tile
    forced = type(tile)(16, 16, 16, tile.warps, tile.stages)
    assert forced != tile
    with tconv.force(kernel="gather", tile=forced):
        explanation = tconv.explain(layer, x)
    assert explanation.calls[0].plan.tile == forced
    assert "forced" in str(explanation)


def test_a_lazy_layer(device, no_launch):
    layer = tconv.LazyConv1d(3, 3, device=device)
    assert tconv.explain(layer, torch.randn(1, 2, 9, device=device)).ours
    assert type(layer) is tconv.LazyConv1d
    assert layer.has_uninitialized_params()


BAD = {
    "a tensor": ((torch.ones(1),), "explain: layer must be a module or a function, got Tensor"),
    "a class": ((tconv.Conv2d, 1), "explain: layer must be a module or a function, got the class Conv2d: make a module of it"),
    "None and an input": ((None, torch.ones(1)), "explain: layer must be a module or a function, got NoneType"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_explained(what):
    args, message = BAD[what]
    with pytest.raises(TypeError, match=f"^{message}$"):
        tconv.explain(*args)


def test_explaining_is_not_recorded(device):
    layer, x = conv2d(device)
    layer(x)
    before = tconv.last_calls()

    def watched(x):
        with tconv.recording() as inside:
            layer(x)
        assert [call.operation for call in inside] == ["fprop"]
        return layer(x)

    with tconv.recording() as calls:
        explanation = tconv.explain(watched, x)
        assert calls == []
        layer(x)
    assert len(calls) == 1
    assert tconv.last_calls() == (*before, *calls)[-len(tconv.last_calls()) :]  # the oldest may have been dropped
    assert [call.operation for call in explanation.calls][:2] == ["fprop", "fprop"]


def test_without_arguments_it_repeats_the_last_calls(device):
    layer, x = conv2d(device)
    layer(x)
    explanation = tconv.explain()
    assert explanation.calls == tconv.last_calls()
    assert explanation.calls[-1].operation == "fprop"


def test_layers_that_are_not_ours(device):
    x = torch.randn(1, 2, 4, 4, device=device)
    explanation = tconv.explain(torch.nn.Conv2d(2, 3, 3, device=device), x)
    assert str(explanation).startswith("no call of tconv: ")
    assert not explanation.ours
    meta = tconv.explain(tconv.Conv2d(2, 3, 3, device="meta"), torch.empty(1, 2, 4, 4, device="meta"))
    assert str(meta) == "conv2d: torch (device meta)"
    assert not meta.ours


# --- the record ---


def test_the_record_keeps_the_last_64_calls_oldest_first(device):
    x, w = torch.randn(1, 1, 4, device=device), torch.randn(1, 1, 2, device=device)
    empty = torch.empty(0, 1, 4, device=device)
    tconv.functional.conv1d(x, w)
    for _ in range(63):
        tconv.functional.conv1d(empty, w)
    calls = tconv.last_calls()
    assert len(calls) == 64
    assert calls[0].ours
    tconv.functional.conv1d(empty, w)
    assert len(tconv.last_calls()) == 64
    assert not any(call.ours for call in tconv.last_calls())


def test_recordings_nest_and_end(device):
    x, w = torch.empty(0, 1, 4, device=device), torch.randn(1, 1, 2, device=device)
    with tconv.recording() as outer:
        tconv.functional.conv1d(x, w)
        with pytest.raises(TypeError), tconv.recording() as inner:
            tconv.functional.conv1d(x, w, stride="1")
        tconv.functional.conv1d(x, w)
    tconv.functional.conv1d(x, w)
    assert (len(outer), len(inner)) == (3, 1)


def test_recordings_that_end_elsewhere_hide_no_call():
    """A list that shrinks while another thread goes through it would skip one."""

    class Ending(list):
        def append(self, call):
            super().append(call)
            stack.close()  # another thread's recording ends here

    with contextlib.ExitStack() as stack:
        stack.enter_context(tconv.recording())
        first, last = Ending(), []
        record._watchers += [first, last]
        try:
            record.record_call(record.Call("", None, None, ""))
        finally:
            record._watchers[:] = []
    assert (len(first), len(last)) == (1, 1)


# --- what falls back to torch, and why ---


def conv(x, w):
    return tconv.functional.conv2d(x, w)


class Wrapped(torch.Tensor):
    """A subclass that behaves like its parent."""


def vmapped(x, w):
    return torch.func.vmap(lambda image: conv(image, w))(x)


def functional_gradient(x, w):
    return torch.func.grad(lambda v: conv(v, w).square().sum())(x)


def forward_mode(x, w):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(conv(forward_ad.make_dual(x, torch.ones_like(x)), w)).tangent


def symbolically_traced(x, w):
    return torch.fx.symbolic_trace(conv)(x, w)


def negated(x, w):
    return conv(torch._neg_view(torch._neg_view(x).contiguous()), w)


def jit_traced(x, w):
    return torch.jit.trace(conv, (x, w), check_trace=False)(x, w)


def counted(x, w):
    with FlopCounterMode(display=False) as counter:
        y = conv(x, w)
    assert counter.get_total_flops() > 0
    return y


def batched_gradient(x, w):
    x = x.detach().requires_grad_()
    y = conv(x, w)
    upstream = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    return torch.autograd.grad(y, x, upstream, is_grads_batched=True)[0]


def expected_of(what, x, w):
    """The same with torch's function in place of tconv's."""
    reference = torch.nn.functional.conv2d
    gradient = torch.autograd.functional.vjp(lambda v: reference(v, w), x, torch.ones(2, 3, 3, 4, device=x.device))[1]
    return {
        functional_gradient: lambda: torch.func.grad(lambda v: reference(v, w).square().sum())(x),
        forward_mode: lambda: reference(torch.ones_like(x), w),
        batched_gradient: lambda: torch.stack([gradient, 2 * gradient]),
    }.get(what, lambda: reference(x, w))()


TAKEN = [vmapped, functional_gradient, forward_mode, symbolically_traced, negated, jit_traced, counted, batched_gradient]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", TAKEN)
def test_contexts_that_the_operators_take(what, device):
    x, w = torch.randn(2, 2, 5, 6, device=device), torch.randn(3, 2, 3, 3, device=device)
    with tconv.recording() as calls:
        got = what(x, w)
    assert calls
    assert all(call.ours for call in calls)
    torch.testing.assert_close(got, expected_of(what, x, w), rtol=1e-4, atol=1e-4)


TENSORS = {
    "integers": (lambda x, w: (x.long(), w.long()), "dtype torch.int64"),
    "complex numbers": (lambda x, w: (x.cfloat(), w.cfloat()), "dtype torch.complex64"),
    "no images": (lambda x, w: (x[:0], w), "a tensor without elements"),
    "a subclass": (lambda x, w: (x.as_subclass(Wrapped), w), "a user's tensor subclass, Wrapped"),
    "a meta tensor": (lambda x, w: (x.to("meta"), w.to("meta")), "device meta"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_left_to_torch(kind, device):
    if kind == "integers" and device != "cpu":
        pytest.skip("torch has integer convolutions on the CPU alone")
    make, reason = TENSORS[kind]
    x, w = make(torch.randn(2, 2, 5, 6, device=device), torch.randn(3, 2, 3, 3, device=device))
    with tconv.recording() as calls:
        got = conv(x, w)
    assert [str(call) for call in calls] == [f"conv2d: torch ({reason})"]
    expected = torch.nn.functional.conv2d(x, w)
    assert type(got) is type(expected)
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    if not got.is_meta:
        assert torch.equal(got, expected)


# --- other processes: Triton missing, or not asked for ---

BLOCKED = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocked())
"""
CHECK = """
    import torch, tconv
    torch.manual_seed(0)
    m = tconv.replace_(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ConvTranspose2d(3, 2, 2)))
    x = torch.randn(1, 2, 5, 5)
    with tconv.recording() as calls:
        y = m(x)
        y.sum().backward()
    explained = str(tconv.explain(m, x))
    tconv.restore_(m)
    assert torch.equal(y, m(x)) and m[0].weight.grad is not None
    assert [c.operation for c in calls] == ["conv2d", "conv_transpose2d"], calls
    assert explained.splitlines() == list(map(str, calls)), explained
    print(explained)
"""
PROCESSES = {
    "Triton missing": (BLOCKED + CHECK, {"TRITON_INTERPRET": "1"}, "Triton cannot be imported (No module named 'triton"),
    "CPU without the interpreter": (CHECK, {}, "CPU tensors need TRITON_INTERPRET=1"),
    "interpreter asked for too late": (
        "\n    import os, tconv.launching.launch\n    os.environ['TRITON_INTERPRET'] = '1'\n" + CHECK,
        {},
        "TRITON_INTERPRET was set after Triton's kernels were loaded",
    ),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_in_which_torch_takes_all(name):
    code, more, reason = PROCESSES[name]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | more
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["conv2d", "conv_transpose2d"]
    for line in lines:
        assert f"torch ({reason}" in line
