"""Group and RMS normalisation with silu and padding, in either memory format, against the sequence in fp64."""

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tconv
from tconv import functional as TF
from tconv.dispatch.sides import for_pad
from tconv.launching import compiled, launch
from tconv.launching import normalise as launching
from tconv.planning import normalise as planning
from tconv.planning.device import DEVICES, Device
from tests import oracle, parity

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GROUP, RMS = "group_norm_silu", "rms_norm_silu"
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
OPERATIONS = pytest.mark.parametrize("operation", [GROUP, RMS])


def laid_out(x, channels_last):
    return oracle.to_channels_last(x) if channels_last and x.dim() > 2 else x.contiguous()


def ours(operation, groups, x, w, b, **how):
    return TF.group_norm_silu(x, groups, w, b, **how) if operation == GROUP else TF.rms_norm_silu(x, w, b, **how)


def sequence(operation, groups, x, w, b, eps=None, activation="silu", pad=None):
    if operation == GROUP:
        y = F.group_norm(x, groups, w, b, 1e-5 if eps is None else eps)
    else:
        y = F.rms_norm(x.movedim(1, -1), (x.shape[1],), w, 1e-6 if eps is None else eps)
        y = (y if b is None else y + b).movedim(-1, 1)
    y = y if activation is None else F.silu(y)
    return y if pad is None else F.pad(y, for_pad(pad, x.dim() - 2))


def check(operation, shape, groups=1, dtype=torch.float32, device="cpu", channels_last=False, own=None, affine=True, **how):
    """Asserts that the result and every gradient are the sequence's in fp64, and x's memory format. Returns the calls."""
    x = laid_out(torch.randn(shape, dtype=torch.float64).to(device, dtype), channels_last)
    w, b = (torch.randn(shape[1], dtype=torch.float64).to(device, own or dtype) if affine else None for _ in range(2))
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    given = [t for t in leaves if t is not None]
    with tconv.recording() as calls:
        y = ours(operation, groups, *leaves, **how)
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, given, dy)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    right = sequence(operation, groups, *wide, **how)
    rights = torch.autograd.grad(right, [t for t in wide if t is not None], dy.double())
    for name, a, e in zip(("y", "dx", "dw", "db"), (y, *grads), (right, *rights), strict=False):
        assert a.shape == e.shape
        error = (a.double() - e).abs().max() / e.abs().max().clamp(min=1e-6)
        assert error <= TOLERANCE[dtype] * (1 if name == "y" else 3), (name, float(error))
    for name, t, like in (("y", y, laid_out(right, channels_last)), ("dx", grads[0], x)):
        assert t.stride() == like.stride(), (name, t.stride(), like.stride())
    assert all(c.ours for c in calls), calls
    assert [c.operation for c in calls] == [operation, f"{operation} gradient"]
    return calls


CASES = {
    "no spatial dimension": ((3, 8), 2, {}),
    "1-D, odd extents": ((2, 6, 13), 3, {}),
    "2-D, 16 bytes": ((2, 32, 8, 8), 4, {}),
    "2-D, odd extents": ((2, 10, 7, 5), 5, {}),
    "3-D": ((1, 12, 3, 4, 6), 3, {}),
    "one group": ((2, 6, 5, 4), 1, {}),
    "a channel a group": ((2, 6, 5, 4), 6, {}),
    "one channel": ((2, 1, 5, 4), 1, {"eps": 0.5}),
    "one pixel": ((2, 12, 1, 1), 3, {}),
    "no activation": ((2, 6, 5, 4), 2, {"activation": None, "eps": 1e-3}),
    "nothing learned": ((2, 6, 5, 4), 2, {"affine": False}),
    "padded": ((2, 6, 5, 4), 2, {"pad": 1}),
    "padded by side, 1-D": ((2, 6, 9), 2, {"pad": ((3, 0),)}),
    "padded by side, 3-D": ((1, 8, 2, 3, 4), 2, {"pad": ((2, 0), 1, (0, 1))}),
    "padded, 16 bytes": ((2, 32, 8, 8), 4, {"pad": ((4, 4), (8, 0))}),
}


@LAYOUTS
@OPERATIONS
@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_values_and_gradients(case, operation, channels_last, device, poisoned):
    shape, groups, how = case
    check(operation, shape, groups, torch.float32, device, channels_last, **how)


@LAYOUTS
@OPERATIONS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(dtype, operation, channels_last, device, poisoned):
    check(operation, (2, 16, 6, 8), 4, dtype, device, channels_last)
    if dtype.itemsize == 2:
        check(operation, (2, 16, 6, 8), 4, dtype, device, channels_last, own=torch.float32, pad=((1, 0), 2))


@pytest.fixture
def planned(monkeypatch):
    """A GPU's plans, also in the interpreter, of a device with few units: several tiles and chunks of small images."""
    if not oracle.compiled():
        monkeypatch.setattr(launch, "device_of", lambda t: Device("few", 2, 232448))
    launch.forget()
    yield
    launch.forget()


@LAYOUTS
@OPERATIONS
@pytest.mark.parametrize(
    ("shape", "pad"),
    [((1, 8, 52, 42), None), ((1, 6, 35, 61), ((1, 2), 0)), ((1, 72, 12, 9), None)],
    ids=["whole vectors", "tails of pixels, padded", "tails of channels"],
)
def test_tiles_and_chunks(shape, pad, operation, channels_last, planned, device, poisoned):
    calls = check(operation, shape, 2, torch.bfloat16, device, channels_last, pad=pad)
    assert calls[1].plan.splits > 1 or shape[1] == 72


@LAYOUTS
@OPERATIONS
def test_offsets_of_64_bits(operation, channels_last, device, monkeypatch, poisoned):
    monkeypatch.setattr(launching, "LIMIT", 0)
    launch.forget()
    check(operation, (2, 8, 6, 5), 4, torch.float32, device, channels_last, pad=1)
    assert all(part.constants.get("WIDE", True) for one in launch._prepared.values() for part in one.parts)
    launch.forget()


@LAYOUTS
def test_a_large_mean_takes_no_digits(channels_last, planned, device):
    """In fp32 a sum of squares of about 10^6 would leave the variance, which is one, an error of several percent."""
    x = laid_out(torch.randn(1, 8, 65, 40, device=device) + 1000, channels_last).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, right = TF.group_norm_silu(x, 2), F.silu(F.group_norm(wide, 2))
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    (dx,), (expected,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(right, wide, dy.double())
    torch.testing.assert_close(dx.double(), expected, rtol=5e-4, atol=5e-4)


@st.composite
def combinations(draw):
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    shape = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 5)), *(draw(st.integers(2, 6)) for _ in range(rank)))
    how = {
        "affine": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", None])),
        "eps": draw(st.sampled_from([0.01, 0.5])),
    }
    if draw(st.booleans()):
        how["pad"] = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    return draw(st.sampled_from([GROUP, RMS])), shape, groups, draw(st.booleans()), how


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(combinations())
def test_combinations(device, poisoned, drawn):
    operation, shape, groups, channels_last, how = drawn
    check(operation, shape, groups, torch.float64, device, channels_last, **how)


def test_nan_and_infinity_stay_where_they_are_normalised(device):
    x = torch.randn(2, 8, 3, 4, device=device)
    x[0, 0, 0, 0], x[0, 6, 1, 1] = float("nan"), float("inf")
    for operation in (GROUP, RMS):
        torch.testing.assert_close(
            ours(operation, 4, x, None, None, pad=1), sequence(operation, 4, x, None, None, pad=1), equal_nan=True
        )


def test_zeros_by_the_formula_of_wan(device):
    """Its gamma is (C, 1, 1, 1), and a pixel of zeros stays one."""
    x, gamma = torch.randn(1, 24, 2, 3, 4, device=device), torch.randn(24, 1, 1, 1, device=device)
    x[0, :, 1, 1] = 0
    right = F.silu(F.normalize(x, dim=1) * 24**0.5 * gamma)
    with tconv.recording() as calls:
        torch.testing.assert_close(TF.rms_norm_silu(x, gamma, eps=1e-24 / 24), right)
    assert calls[0].ours


def test_any_strides(device, poisoned):
    for x in (
        torch.randn(2, 5, 6, 8, device=device).permute(0, 3, 2, 1),
        torch.randn(2, 8, 6, 10, device=device)[..., ::2],
        torch.randn(2, 1, 1, 5, device=device).expand(2, 8, 6, 5),
        oracle.to_channels_last(torch.randn(2, 9, 6, 5, device=device))[:, 1:],
        torch.randn(2 * 8 * 6 * 5 + 1, device=device)[1:].view(2, 8, 6, 5),
        torch.randn(2, 8, 30, device=device).transpose(0, 1),
    ):
        groups, before = 4 if x.shape[1] == 8 else 2, x.clone()
        for operation in (GROUP, RMS):
            with tconv.recording() as calls:
                leaf = x.detach().requires_grad_()
                y, right = ours(operation, groups, leaf, None, None), sequence(operation, groups, leaf, None, None)
                dy = torch.randn(y.shape, device=device)[..., :1].expand(y.shape)
                torch.testing.assert_close(y, right)
                torch.testing.assert_close(torch.autograd.grad(y, leaf, dy), torch.autograd.grad(right, leaf, dy))
            assert [c.ours for c in calls] == [True, True]
        assert torch.equal(x, before)


@LAYOUTS
@OPERATIONS
def test_an_images_bits_do_not_depend_on_the_batch(operation, channels_last, planned, device):
    x, dy = (laid_out(torch.randn(2, 4, 48, 44, device=device), channels_last) for _ in range(2))
    w = torch.randn(4, device=device)

    def run(x, dy):
        x = x.detach().requires_grad_()
        y = ours(operation, 2, x, w, w)
        return y, *torch.autograd.grad(y, x, dy)

    whole = run(x, dy)
    for i in range(2):
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, run(x[i : i + 1], dy[i : i + 1]), strict=True))


# Autograd and contexts


@OPERATIONS
@pytest.mark.parametrize("how", [{"pad": ((1, 0), 2)}, {"activation": None}], ids=["padded", "no activation"])
def test_gradients_of_any_order(operation, how, device):
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    w, b = (torch.randn(4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))

    def step(x, w, b):
        return ours(operation, 2, x, w, b, **how)

    more = "pad" in how  # what calls the function again and again
    assert torch.autograd.gradcheck(step, (x, w, b), check_batched_grad=more, check_forward_ad=more, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, (x, w, b), fast_mode=True)


@OPERATIONS
def test_only_what_is_asked_for(operation, device):
    x, w, b = torch.randn(2, 6, 5, 4, device=device), torch.randn(6, device=device), torch.randn(6, device=device)
    for needed in itertools.product([False, True], repeat=3):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        y, right = ours(operation, 2, *leaves), sequence(operation, 2, *leaves)
        asked = [t for t in leaves if t.requires_grad]
        assert y.requires_grad is bool(asked)
        if asked:
            for got, e in zip(*(torch.autograd.grad(t.sum(), asked) for t in (y, right)), strict=True):
                torch.testing.assert_close(got, e)


def test_what_is_kept_for_the_gradient(device):
    x, w = torch.randn(2, 6, 5, 4, device=device, requires_grad=True), torch.randn(6, device=device, requires_grad=True)
    kept = [
        [t for t in y.grad_fn.saved_tensors if t is not None] for y in (TF.group_norm_silu(x, 2, w), TF.rms_norm_silu(x, w))
    ]
    assert [t.data_ptr() in (x.data_ptr(), w.data_ptr()) for t in kept[0]] == [True, True, False]
    assert kept[0][2].shape == (2, 2, 2)
    assert [t.data_ptr() in (x.data_ptr(), w.data_ptr()) for t in kept[1]] == [True, True]
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(TF.group_norm_silu(x * 1, 2).sum() + kept[0][0].sum() * 0 + _edited(x), x)


def _edited(x):
    h = x * 1
    y = TF.group_norm_silu(h, 2)
    h.add_(1)
    return y.sum()


@LAYOUTS
@OPERATIONS
def test_under_torch_compile_vmap_and_checkpoint(operation, channels_last, device):
    x = laid_out(torch.randn(2, 6, 5, 4, device=device), channels_last).requires_grad_()
    w, b = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))

    def step(x, w, b):
        return ours(operation, 2, x, w, b, pad=1)

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    again = lambda *args: checkpoint(step, *args, use_reentrant=False)  # noqa: E731
    y = step(x, w, b)
    grads = torch.autograd.grad(y.sum(), (x, w, b))
    for other in (compiled_step, again):
        found = other(x, w, b)
        assert found.stride() == y.stride()
        torch.testing.assert_close(found, y)
        for got, e in zip(torch.autograd.grad(found.sum(), (x, w, b)), grads, strict=True):
            torch.testing.assert_close(got, e)
    with tconv.recording() as calls:
        torch.testing.assert_close(torch.vmap(lambda x: step(x, w, b))(x.unsqueeze(1)).squeeze(1), y)
    assert [str(c) for c in calls] == [f"{operation}: torch (inside a functorch transform)"]


# Registered operators


def calls_of(graph):
    return [n.target._opname for n in graph.graph.nodes if str(n.target).startswith("tconv.")]


def functions(operation, **how):
    """tconv's function of x, w and b, and the sequence."""
    return (lambda x, w, b: ours(operation, 2, x, w, b, **how)), (lambda x, w, b: sequence(operation, 2, x, w, b, **how))


def leaves(device, channels_last=False, dtype=torch.float64):
    x = laid_out(torch.randn(2, 6, 5, 4, device=device).to(dtype), channels_last)
    return [t.requires_grad_() for t in (x, *(torch.randn(6, device=device).to(dtype) for _ in range(2)))]


@LAYOUTS
@OPERATIONS
def test_a_compiled_call_is_one_operator(operation, channels_last, device):
    torch._dynamo.reset()
    seen = []

    def compiler(graph, _):
        seen.append(calls_of(graph))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    f, right = functions(operation, pad=((1, 0), 2))
    given = leaves(device, channels_last)
    with tconv.recording() as calls:
        y = torch.compile(f, backend=backend, fullgraph=True)(*given)
        grads = torch.autograd.grad(y.square().sum(), given)
    expected = right(*given)
    torch.testing.assert_close((y, *grads), (expected, *torch.autograd.grad(expected.square().sum(), given)))
    assert [(c.operation, c.ours) for c in calls] == [(operation, True), (f"{operation} gradient", True)]
    assert seen == [["normalise"], ["normalise_grad"]]
    assert (y.stride(), grads[0].stride()) == (laid_out(y, channels_last).stride(), given[0].stride())


@OPERATIONS
def test_a_compiled_layer_of_any_size_is_one_graph(operation, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = tconv.GroupNormSiLU(2, 6, pad=1) if operation == GROUP else tconv.RMSNormSiLU(6, pad=1)
    compiled_layer = torch.compile(layer.to(device), backend=counter, fullgraph=True, dynamic=True)
    compilations = 0
    for shape in ((2, 6, 8, 5), (3, 6, 7, 9), (5, 6, 9, 4)):
        x = torch.randn(shape, device=device, requires_grad=True)
        found = []
        with tconv.recording() as calls:
            for f in (compiled_layer, layer):
                y = f(x)
                found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
        torch.testing.assert_close(*found)
        assert [c.ours for c in calls] == [True] * 4
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


@OPERATIONS
def test_inductor(operation, device):
    torch._dynamo.reset()
    f, right = functions(operation, pad=1)
    given = leaves(device, True)
    with tconv.recording() as calls:
        y = torch.compile(lambda *t: f(*t).sin(), fullgraph=True)(*given)
        grads = torch.autograd.grad(y.sum(), given)
    assert [(c.operation, c.ours) for c in calls] == [(operation, True), (f"{operation} gradient", True)]
    expected = right(*given).sin()
    torch.testing.assert_close((y, *grads), (expected, *torch.autograd.grad(expected.sum(), given)))


@pytest.mark.parametrize("strict", [False, True])
@OPERATIONS
def test_export(operation, strict, device):
    layer = tconv.GroupNormSiLU(2, 6, pad=1) if operation == GROUP else tconv.RMSNormSiLU(6, pad=1)
    layer, x = layer.to(device), torch.randn(2, 6, 5, 4, device=device)
    sizes = {"input": {0: torch.export.Dim("n", min=2, max=16), 3: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict)
        assert calls_of(program) == ["normalise"]
        taken = program.run_decompositions()
        assert calls_of(taken) == []
        for size in ((2, 6, 5, 4), (3, 6, 5, 7)):
            x = torch.randn(size, device=device)
            for made in (program, taken):
                torch.testing.assert_close(made.module()(x), layer(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@OPERATIONS
def test_graphs_of_gradients(operation, mode, device):
    f, _ = functions(operation, pad=1)
    given = leaves(device)

    def step(*t):
        y = f(*t)
        first = torch.autograd.grad(y.square().sum(), t)
        return y, *first

    def second(*t):
        (dx,) = torch.autograd.grad(f(*t).square().sum(), t[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), t)

    graph = make_fx(step, tracing_mode=mode)(*given)
    assert calls_of(graph) == ["normalise", "normalise_grad"]
    torch.testing.assert_close(graph(*given), step(*given))
    taken = make_fx(step, tracing_mode=mode, decomposition_table=tconv.decompositions())(*given)
    assert calls_of(taken) == []
    torch.testing.assert_close(taken(*given), step(*given))
    graph = make_fx(second, tracing_mode=mode)(*given)
    assert calls_of(graph) == ["normalise", "normalise_grad"]  # and formulas, which have another derivative
    torch.testing.assert_close(graph(*given), second(*given))


@LAYOUTS
@OPERATIONS
def test_operators_check(operation, channels_last, device):
    for affine in (True, False):
        x, w, b = leaves(device, channels_last) if affine else (*leaves(device, channels_last)[:1], None, None)
        how = 2 if operation == GROUP else 0, 1e-5, "silu", (1, 0), (0, 2)
        torch.library.opcheck(torch.ops.tconv.normalise.default, (x, w, b, *how))
        x, w, b = (None if t is None else t.detach() for t in (x, w, b))
        y, stats = torch.ops.tconv.normalise(x, w, b, *how)
        for needed in (True, False):
            torch.library.opcheck(torch.ops.tconv.normalise_grad.default, (y.cos(), x, w, b, stats, needed, *how))


def test_an_operator_falls_back(device):
    """Without elements no kernel runs; the results are torch's, and have the shapes that a graph was promised."""
    how = 2, 1e-5, "silu", (1,), (0,)
    x, w = torch.randn(0, 6, 4, device=device, requires_grad=True), torch.randn(6, device=device, requires_grad=True)
    with tconv.recording() as calls:
        y, stats = torch.ops.tconv.normalise(x, w, None, *how)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert (y.shape, stats.shape, dx.shape) == ((0, 6, 5), (2, 0, 2), (0, 6, 4))
    assert torch.equal(dw, torch.zeros_like(dw))
    assert [c.reason for c in calls] == ["a tensor without elements"] * 2


@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_the_operators(batched, device):
    """By their rule, which a mode that calls the operator reaches."""
    x, w, b = (t.detach() for t in leaves(device))
    how = 2, 1e-5, "silu", (1, 0), (0, 2)

    def run(x, w):
        y, stats = torch.ops.tconv.normalise(x, w, b, *how)
        return y, *torch.ops.tconv.normalise_grad(y.cos(), x, w, b, stats, True, *how)

    given = [t if d is None else torch.stack([t, t.sin()]) for t, d in zip((x, w), batched, strict=True)]
    found = torch.vmap(run, batched)(*given)
    for i in range(2):
        one = run(*[t if d is None else t[i] for t, d in zip(given, batched, strict=True)])
        torch.testing.assert_close(tuple(t[i] for t in found), one)


@OPERATIONS
def test_transforms_in_a_graph(operation, device):
    torch._dynamo.reset()
    f, right = functions(operation, pad=1)
    x, w, b = (t.detach() for t in leaves(device))

    def per_sample(f):
        loss = lambda w, x: f(x[None], w, b).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss), (None, 0))(w, x)

    found = torch.compile(lambda: per_sample(f), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(found, per_sample(right))


@OPERATIONS
def test_under_autocast(operation, device):
    """The result has x's dtype, by the kernels, by the operator and by torch's functions."""
    x, w = torch.randn(2, 6, 5, 4, device=device).bfloat16(), torch.randn(6, device=device, requires_grad=True)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        with tconv.recording() as calls:
            y = ours(operation, 2, x, w, None)
            compiled_y = torch.compile(lambda x, w: ours(operation, 2, x, w, None), backend="aot_eager", fullgraph=True)(x, w)
        by_torch = torch.vmap(lambda x, w: ours(operation, 2, x, w, None), (0, None))(x[:, None], w)[:, 0]
    assert [c.ours for c in calls] == [True, True]
    right = sequence(operation, 2, x.double(), w.double(), None)
    for found in (y, compiled_y, by_torch):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), right, rtol=8e-3, atol=1e-3)
        (dw,) = torch.autograd.grad(found.sum(), w)
        assert dw.dtype == torch.float32


def test_fx_records_one_call(device):
    class Net(torch.nn.Module):
        def forward(self, x):
            return TF.rms_norm_silu(TF.group_norm_silu(x, 2, pad=1), activation=None)

    traced = torch.fx.symbolic_trace(Net())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [TF.group_norm_silu, TF.rms_norm_silu]
    x = torch.randn(1, 4, 3, 3, device=device)
    torch.testing.assert_close(traced(x), Net()(x))


# Planning and launching


def norm(operation=GROUP, n=1, c=128, x=(1, 512, 512), channels_last=True, groups=32, pad=0):
    before = (0, pad, pad)
    return planning.Normalisation(
        operation, 2, n, c, groups if operation == GROUP else 1, x, before, before, channels_last, 1e-6, "silu", True, True
    )  # fmt: skip


@LAYOUTS
def test_bytes_and_programs_as_counted(channels_last):
    """A forward pass reads x twice and writes y; a single image of a decoder gives every unit several programs."""
    device, image = DEVICES["H200"], 128 * 512 * 512 * 2
    for c, x in ((128, (1, 512, 512)), (512, (1, 128, 128)), (256, (1, 256, 256))):
        n = norm(c=c, x=x, channels_last=channels_last)
        plan, write, moments = planning.forward_plan(n, 2, device)
        elements = c * n.P
        assert plan.cost.bytes == 3 * elements * 2
        assert plan.cost.workspace < 0.04 * elements * 2
        assert min(write.programs(n), moments.programs(n)) >= 4 * device.units
        assert planning.gradient_plan(n, 2, device)[0].cost.bytes == 5 * elements * 2
        many = planning.forward_plan(norm(n=9, c=c, x=x, channels_last=channels_last), 2, device)
        assert many[1:] == (write, moments)
    plan = planning.forward_plan(norm(RMS, channels_last=channels_last), 2, device)[0]
    assert plan.cost.bytes == 2 * image


@LAYOUTS
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_pixel_and_channel_has_a_program(channels_last, itemsize):
    for operation, c, extent, pad in itertools.product((GROUP, RMS), (1, 3, 20, 96, 130, 2048), (1, 7, 31, 300), (0, 1)):
        n = norm(operation, c=c, x=(1, 1, extent), channels_last=channels_last, groups=1, pad=pad)
        for share, pixels in (
            (planning.written(n, itemsize, DEVICES["H100"], n.Q), n.Q), (planning.summed(n, itemsize, DEVICES["H100"]), n.P)
        ):  # fmt: skip
            assert share.chunk % share.tile.m == 0
            assert (share.chunks - 1) * share.chunk < pixels <= share.chunks * share.chunk
            assert operation == GROUP or share.tile.n >= c
            assert share.tile.m * share.tile.n <= 32 * share.tile.warps * 32


def test_explain_and_last_calls(device):
    layer, x = tconv.GroupNormSiLU(2, 8, pad=1).to(device), torch.randn(2, 8, 4, 4, device=device)
    explanation = tconv.explain(layer, x)
    assert explanation.ours
    assert [c.operation for c in explanation.calls] == [GROUP, f"{GROUP} gradient"]
    assert "[N2 C8 4x4 -> 6x6, 2 groups, silu]" in str(explanation)
    layer(x)
    assert tconv.last_calls()[-1].operation == GROUP


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: no such thing")]
)
def test_a_kernel_that_cannot_be_launched(error, device, monkeypatch):
    for name in ("_failed", "_warned"):
        monkeypatch.setattr(compiled, name, type(getattr(compiled, name))())
    x = torch.randn(2, 6, 5, 4, device=device, requires_grad=True)
    right = sequence(GROUP, 2, x, None, None)
    y = TF.group_norm_silu(x, 2)
    with monkeypatch.context() as now, tconv.recording() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parity.forbid_launches(now, error)
        launch.forget()
        torch.testing.assert_close(TF.group_norm_silu(x, 2), right)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(right.sum(), x))
    assert [c.operation for c in calls] == [GROUP, f"{GROUP} gradient"]
    assert all(not c.ours and str(error) in c.reason for c in calls), calls


# Bad arguments

X = torch.randn(2, 6, 4, 4)
WANTED = "pad must be a number or a pair (before, after) for each of 2 dimensions, none of them negative, got "
BAD = {
    "activation must be 'silu' or None, got 'relu'": {"activation": "relu"},
    f"{WANTED}-1": {"pad": -1},
    f"{WANTED}(1, 1, 1)": {"pad": (1, 1, 1)},
    f"{WANTED}'same'": {"pad": "same"},
    "pad must be None for an input without spatial dimensions, got 1": {"pad": 1, "x": X[:, :, 0, 0]},
}


@OPERATIONS
@pytest.mark.parametrize(("text", "bad"), BAD.items(), ids=list(BAD))
def test_bad_arguments(text, bad, operation, device):
    x, how = bad.get("x", X).to(device), {k: v for k, v in bad.items() if k != "x"}
    with tconv.recording() as calls, pytest.raises(ValueError, match=re.escape(text)):
        ours(operation, 2, x, None, None, **how)
    assert calls == []


TORCHS = {  # groups, x, w, b and more
    "groups that do not divide": (4, X, None, None),
    "no groups": (0, X, None, None),
    "groups that are no number": ("two", X, None, None),
    "too few dimensions": (2, X[0, :, 0, 0], None, None),
    "one number in each group": (6, X[:1, :, :1, :1], None, None),
    "a weight of another length": (2, X, torch.ones(5), None),
    "a weight of another shape": (2, X, torch.ones(1, 6), None),
    "a bias of another length": (2, X, None, torch.ones(5)),
    "a weight of another dtype": (2, X, torch.ones(6).double(), None),
    "an integer input": (2, X.long(), None, None),
    "no tensor": (2, 5, None, None),
    "an eps that is no number": (2, X, None, None, "small"),
}


@pytest.mark.parametrize("call", TORCHS.values(), ids=TORCHS)
def test_what_torch_refuses(call, device):
    call = [t.to(device) if isinstance(t, torch.Tensor) else t for t in call]
    groups, x, w, b, *eps = call
    for mine, torchs in (
        (lambda: TF.group_norm_silu(x, groups, w, b, *eps), lambda: F.group_norm(x, groups, w, b, *eps)),
        (lambda: TF.rms_norm_silu(x, w, None, *eps), lambda: F.rms_norm(x.movedim(1, -1), (x.shape[1],), w, *eps)),
    ):
        try:
            torchs()
        except Exception as e:
            with pytest.raises(type(e), match=f"^{re.escape(str(e))}$"):
                mine()


def test_what_torch_computes(device):
    """Beyond the kernels, and recorded."""
    for x in (torch.randn(2, 2, 2, 2, 2, 2, device=device), torch.randn(0, 4, 3, device=device)):
        with tconv.recording() as calls:
            torch.testing.assert_close(TF.group_norm_silu(x, 2), F.silu(F.group_norm(x, 2)))
        assert [c.ours for c in calls] == [False]
    x = torch.randn(1, 2049, 2, device=device)
    with tconv.recording() as calls:
        torch.testing.assert_close(TF.rms_norm_silu(x), sequence(RMS, 1, x, None, None))
    assert "2049 channels, more than 2048" in calls[0].reason


# Layers


def test_layers(device):
    x = torch.randn(2, 8, 5, 4, device=device)
    layer, plain = tconv.GroupNormSiLU(2, 8, eps=1e-3).to(device), torch.nn.GroupNorm(2, 8, eps=1e-3).to(device)
    torch.nn.init.normal_(plain.weight)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x), F.silu(plain(x)))
    assert "activation='silu', pad=None" in repr(layer)
    rms, plain = tconv.RMSNormSiLU(8, activation=None, pad=1).to(device), torch.nn.RMSNorm(8, eps=1e-6).to(device)
    torch.nn.init.normal_(plain.weight)
    rms.load_state_dict(plain.state_dict())
    torch.testing.assert_close(rms(x), F.pad(plain(x.movedim(1, -1)).movedim(-1, 1), (1, 1, 1, 1)))
    assert repr(rms) == "RMSNormSiLU(8, eps=1e-06, elementwise_affine=True, activation=None, pad=1)"
    for module in (layer, rms):
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(again(x), module(x))
    rms.reset_parameters()
    assert torch.equal(rms.weight, torch.ones_like(rms.weight))
    assert [*tconv.RMSNormSiLU(8, elementwise_affine=False).state_dict()] == []
    for cls, size in ((tconv.GroupNormSiLU, (2, 8)), (tconv.RMSNormSiLU, (8,))):
        with pytest.raises(ValueError, match="activation must be 'silu' or None"):
            cls(*size, activation="gelu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace(device):
    x = torch.randn(2, 4, 3, 5, device=device)

    def both(x):
        return TF.rms_norm_silu(TF.group_norm_silu(x, 2, pad=1))

    traced = torch.jit.trace(both, (x,))
    assert [n.kind() for n in traced.graph.nodes() if n.kind().startswith("tconv::")] == ["tconv::normalise"] * 2
    torch.testing.assert_close(traced(x), both(x))
