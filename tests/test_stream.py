"""Convolutions of a stream: chunk by chunk they are the convolution of the whole, by one kernel and without a copy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import tconv
from tconv.dispatch import entry, stream
from tconv.functional import conv1d_stream, conv3d_stream
from tconv.launching.record import Fallback
from tests.oracle import tf32, to_channels_last

STREAMS = {1: conv1d_stream, 3: conv3d_stream}
CHUNKS = {"whole": [9], "single": [1] * 9, "uneven": [1, 3, 0, 5]}
CASES = {  # input, weight, stride, padding of a frame, dilation, groups
    "1-D": ((2, 4, 9), (6, 4, 3), 1, (), 1, 1),
    "1-D, dilated, groups": ((2, 4, 9), (6, 2, 4), 1, (), 2, 2),
    "1-D, strided": ((1, 3, 9), (4, 3, 4), 3, (), 1, 1),
    "3-D": ((2, 4, 9, 4, 5), (5, 4, 3, 3, 3), 1, (1, (1, 0)), 1, 1),
    "3-D, strided": ((1, 16, 9, 5, 4), (8, 16, 3, 2, 2), 2, (0, 0), 1, 1),
    "3-D, one frame at a time": ((1, 4, 9, 4, 3), (4, 4, 1, 3, 3), 1, (1, 1), 1, 1),
}


def tensors(case, device, dtype=torch.float32, channels_last=False):
    x, w, *_ = case
    made = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in (x, w, w[:1])]
    return [to_channels_last(t) if channels_last and t.dim() > 2 else t for t in made]


def arguments(case, w):
    _, _, stride, frame, dilation, groups = case
    return {"stride": stride, "padding": ((dilation * (w.shape[2] - 1), 0), *frame), "dilation": dilation, "groups": groups}


def whole(case, x, w, b):
    """The convolution of all of a stream, by torch in fp64."""
    _, _, stride, frame, dilation, groups = case
    pads = [(dilation * (w.shape[2] - 1), 0), *(p if isinstance(p, tuple) else (p, p) for p in frame)]
    x = F.pad(x.double(), [p for pair in reversed(pads) for p in pair])
    return (F.conv1d if x.dim() == 3 else F.conv3d)(x, w.double(), b.double(), stride, 0, dilation, groups)


def in_chunks(case, chunks, x, w, b, **more):
    """All outputs of a stream, and its last state."""
    state, ys = None, []
    for chunk in x.split(chunks, 2):
        before = None if state is None else state.clone()
        with tconv.recording() as calls:
            y, after = STREAMS[x.dim() - 2](chunk, w, b, state, **arguments(case, w), **more)
        assert all(c.ours for c in calls), calls
        assert state is None or torch.equal(state, before)
        assert state is not after
        state, ys = after, [*ys, y]
    return torch.cat(ys, 2), state


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunks_against_the_whole(case, chunks, channels_last, device, poisoned):
    x, w, b = tensors(case, device, channels_last=channels_last)
    y, state = in_chunks(case, chunks, x, w, b)
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if tf32(x.dtype) else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.double(), whole(case, x, w, b), **tolerance)
    read = x.shape[2] - y.shape[2] * case[2]  # from here on, and as far back as the state reaches
    assert torch.equal(state, F.pad(x, (0, 0) * (x.dim() - 3) + (state.shape[2], 0))[:, :, x.shape[2] :])
    assert state.shape[2] == read + case[4] * (w.shape[2] - 1)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4), name=st.sampled_from(["1-D", "3-D"]), more=st.booleans())
def test_bits_do_not_depend_on_the_chunks(device, chunks, name, more):
    case = ((2, 4, sum(chunks), *(3, 2) * (name == "3-D")), *CASES[name][1:])
    x, w, b = tensors(case, device, torch.bfloat16, sum(chunks) % 2 > 0)
    more = {"activation": "silu", "scale": b.float()} if more else {}
    with tconv.batch_invariant():
        right, last = in_chunks(case, [sum(chunks)], x, w, b, **more)
        y, state = in_chunks(case, chunks, x[1:], w, b, **more)
    assert torch.equal(y, right[1:])
    assert torch.equal(state, last[1:])
    assert "batch-invariant" in tconv.last_calls()[-1].reason


@pytest.mark.parametrize("rank", [1, 3])
def test_plans_do_not_depend_on_the_chunk(rank):
    """Those for a GPU, which the interpreter does not show."""
    from tconv.launching.dry_run import dry_run
    from tconv.planning.device import DEVICES

    plans, frame = set(), (8, 12) * (rank == 3)
    with tconv.batch_invariant(), torch.no_grad(), dry_run(DEVICES["H100"]):
        for n, times in ((1, 1), (1, 4), (2, 80), (1, 9000 if rank == 1 else 200)):
            x = torch.empty(n, 96, times, *frame, dtype=torch.bfloat16, device="meta")
            w = torch.empty(96, 96, 3, *(3, 3) * (rank == 3), dtype=torch.bfloat16, device="meta")
            state = torch.empty(n, 96, 2, *frame, dtype=torch.bfloat16, device="meta")
            for s in (None, state):
                with tconv.recording() as calls:
                    STREAMS[rank](x, w, None, s, padding=((2, 0), 1, 1)[:rank])
                (call,) = calls
                plans.add((call.plan.kernel, call.plan.tile, call.plan.splits, call.plan.precision))
    assert len(plans) == 1
    assert call.plan.kernel == "gather"


def test_no_memory_but_the_results(device):
    case = CASES["3-D"]
    x, w, b = tensors(case, device, channels_last=True)
    state = torch.randn(2, 4, 2, 4, 5, device=device)
    conv3d_stream(x, w, b, state, **arguments(case, w))
    with torch.profiler.profile(profile_memory=True) as profile:
        y, after = conv3d_stream(x, w, b, state, **arguments(case, w))
    made = sum(max(0, e.self_cpu_memory_usage + e.self_device_memory_usage) for e in profile.key_averages())
    assert made <= (y.numel() + after.numel()) * 4 + 4096


@pytest.mark.parametrize("name", ["1-D", "3-D, strided"])
def test_gradients(name, device):
    """Of two chunks, through the state between them."""
    case = CASES[name]
    leaves = [t.requires_grad_() for t in tensors(case, device)]
    x, w, b = leaves
    with tconv.recording() as calls:
        y, state = STREAMS[x.dim() - 2](x[:, :, :4], w, b, None, **arguments(case, w))
        z, _ = STREAMS[x.dim() - 2](x[:, :, 4:], w, b, state, **arguments(case, w))
    assert any("a gradient is wanted" in c.reason for c in calls)
    y = torch.cat((y, z), 2)
    dy = torch.randn_like(y)
    wides = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(whole(case, *wides), wides, dy.double())
    atol = 5e-2 if tf32(x.dtype) else 1e-3
    for got, right in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=atol)


def test_layers_and_contexts(device):
    x = torch.randn(2, 4, 6, 5, 5, device=device)
    with torch.no_grad():
        for layer, of in ((tconv.CausalConv3d(4, 6, 3, padding=1), x), (tconv.CausalConv1d(4, 6, 3, dilation=2), x[..., 0, 0])):
            layer.to(device)
            y, state = layer.stream(of[:, :, :2])
            z, state = layer.stream(of[:, :, 2:], state)
            torch.testing.assert_close(torch.cat((y, z), 2), layer(of), rtol=1e-4, atol=1e-5)
        step = torch.compile(lambda x, s: layer.stream(x, s), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(of, state), layer.stream(of, state))
    with pytest.raises(ValueError, match="padding_mode must"):
        tconv.CausalConv3d(4, 6, 3, padding_mode="replicate").stream(x)


@pytest.mark.parametrize("differentiable", [False, True])
def test_autocast(differentiable, device):
    """A state is what the convolution has read, so it is of autocast's dtype, and the next chunk takes it."""
    layer, x = tconv.CausalConv1d(4, 6, 3).to(device), torch.randn(2, 4, 6, device=device)
    with torch.set_grad_enabled(differentiable), torch.autocast(device, torch.bfloat16):
        y, state = layer.stream(x[..., :1])
        z, state = layer.stream(x[..., 1:], state)
        _, state = layer.stream(x[..., :0], state)
        whole = layer(x)
    assert y.dtype == z.dtype == state.dtype == torch.bfloat16
    assert torch.equal(state, x[..., 4:].bfloat16())
    torch.testing.assert_close(torch.cat((y, z), 2), whole, rtol=1e-2, atol=1e-2)


def test_fx_records_one_call(device):
    """Functions stay calls and `stream` becomes one, so that the traced model streams as the model does."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = tconv.CausalConv1d(4, 6, 3), tconv.CausalConv3d(2, 3, 3, padding=1)

        def forward(self, x, a, v, b):
            y, a = self.first.stream(x, a)
            y, _ = conv1d_stream(y, self.first.weight.transpose(0, 1), None, activation="relu", scale=a[0, :, 0])
            v, b = self.second.stream(v, b)
            return y, a, v, b

    net = Net().to(device)
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.target in (conv1d_stream, conv3d_stream)] == (
        [conv1d_stream, conv1d_stream, conv3d_stream]
    )
    x, v = torch.randn(1, 4, 5, device=device), torch.randn(1, 2, 3, 4, 5, device=device)
    a, b = torch.randn(1, 4, 2, device=device), torch.randn(1, 2, 2, 4, 5, device=device)
    with torch.no_grad(), tconv.recording() as calls:
        torch.testing.assert_close(traced(x, a, v, b), net(x, a, v, b))
    assert [c.ours for c in calls] == [True] * 6


X, W = torch.zeros(2, 4, 5, 6, 7), torch.zeros(3, 4, 3, 3, 3)
BAD = {
    "input": [(X[0], W, None, {})],
    "weight": [(X, W[0], None, {})],
    "padding": [(X, W, None, {"padding": p}) for p in (1, ((1, 0), 0, 0), ((2, 1), 0, 0), ((2, 0), -1, 0))],
    "stride": [(X, W, None, {"stride": s}) for s in (0, "a", (1, 1))],
    "dilation": [(X, W, None, {"dilation": 0, "padding": ((0, 0), 0, 0)})],
    "state": [(X, W, state, {}) for state in (
        X[:, :, :1], X[:, :, :3], X[:1, :, :2], X[:, :3, :2], X[:, :, :2, 1:], X[0], X[:, :, :2].half(), 1,
        X[:, :, :2].to("meta"),
    )],
    "residual": [(X, W, None, {"residual": X})],
    "activation": [(X, W, None, {"activation": "none"})],
}  # fmt: skip


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in BAD.items() for call in calls])
def test_bad_arguments(name, call, monkeypatch):
    from tconv.launching import compiled

    monkeypatch.setattr(compiled, "run", lambda *_: pytest.fail("a launch"))
    x, w, state, more = call
    with torch.no_grad(), pytest.raises(ValueError, match=rf"\b{name}\b.* must"):
        conv3d_stream(x, w, None, state, **{"padding": ((2, 0), 0, 0)} | more)


def test_a_stride_that_skips_what_has_not_come():
    x, w = torch.zeros(1, 2, 4), torch.zeros(2, 2, 1)
    assert conv1d_stream(x, w, stride=2)[0].shape == (1, 2, 2)
    with pytest.raises(ValueError, match="stride 2 skips 1 times"):
        conv1d_stream(x[..., :3], w, stride=2)


def test_chunk():
    """Any cut of any number of times gives the outputs of the whole, and no state is longer than the filter."""
    for taps, stride, dilation in ((1, 1, 1), (3, 1, 1), (3, 2, 1), (4, 3, 2), (2, 3, 2)):
        for first in range(9):
            a = stream.chunk_of(None, first, taps, stride, dilation)
            b = stream.chunk_of(a.kept, 9 - first, taps, stride, dilation)
            assert a.outputs + b.outputs == -(-9 // stride)
            assert max(a.kept, b.kept) <= dilation * (taps - 1)


class Codec(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tconv.CausalConv3d(4, 8, 3, padding=1)

    def forward(self, x, state, residual):
        return conv3d_stream(
            x, self.conv.weight, self.conv.bias, state, padding=((2, 0), 1, 1), activation="silu", residual=residual
        )


def codec(device):
    """A model, a chunk, its state and a residual, without gradients."""
    shapes = (1, 4, 3, 5, 4), (1, 4, 2, 5, 4), (1, 8, 3, 5, 4)
    return Codec().to(device).requires_grad_(False), *(torch.randn(shape, device=device) for shape in shapes)


def ours(graph):
    return [n.target._opname for n in graph.nodes if str(n.target).startswith("tconv.")]


def test_graphs_keep_one_operator(device):
    torch._dynamo.reset()
    model, *tensors = codec(device)
    expected, seen = model(*tensors), []

    def compiler(graph, _):
        seen.extend(ours(graph.graph))
        return graph

    exported = torch.export.export(model, tuple(tensors))
    graph = make_fx(model)(*tensors)
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    for run in (compiled, exported.module(), graph):
        y, after = run(*tensors)
        assert torch.equal(y, expected[0])
        assert torch.equal(after, expected[1])
        assert (y.stride(), after.stride()) == (expected[0].stride(), expected[1].stride())
    assert seen == ours(exported.graph) == ours(graph.graph) == ["conv_stream"]
    decomposed = exported.run_decompositions()
    assert not ours(decomposed.graph)
    for run in (decomposed.module(), torch.jit.trace(model, tuple(tensors))):
        torch.testing.assert_close(run(*tensors), expected)


def test_a_compiled_gradient(device):
    """Of (state, chunk) concatenated."""
    torch._dynamo.reset()
    model, *tensors = codec(device)
    leaves = [t.double().requires_grad_() for t in tensors]
    model = model.double().requires_grad_()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y, after = run(*leaves)
        found.append([y, after, *torch.autograd.grad(y.sin().sum() + after.cos().sum(), [*leaves, *model.parameters()])])
    torch.testing.assert_close(*found)


def test_compiled_chunks_of_any_length(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    w, b = torch.randn(6, 4, 3, device=device), torch.randn(6, device=device)
    step = torch.compile(conv1d_stream, fullgraph=True, backend=counter, dynamic=True)
    state, compiled = torch.randn(2, 4, 2, device=device), []
    for length in (5, 9, 13):  # none of which is another extent
        x = torch.randn(2, 4, length, device=device)
        torch.testing.assert_close(step(x, w, b, state), conv1d_stream(x, w, b, state))
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [0, 2])
def test_the_operator(held, dtype, device, monkeypatch):
    """Its schema, strides and rules, and what it falls back to."""
    x, w = torch.randn(2, 4, 6, device=device).to(dtype), torch.randn(8, 4, 3, device=device).to(dtype)
    state = torch.randn(2, 4, held, device=device).to(dtype) if held else None
    how = "relu", 0.0, "after", False, (1,), (2,), (0,), (1,), 1
    given = x, w, None, state, None, None, None, *how
    torch.library.opcheck(torch.ops.tconv.conv_stream.default, given)
    expected = torch.ops.tconv.conv_stream(*given)
    monkeypatch.setattr(entry, "geometry", lambda *_: (_ for _ in ()).throw(Fallback("for a test")))
    with tconv.recording() as calls:
        got = torch.ops.tconv.conv_stream(*given)
    assert "concatenated: for a test" in " ".join(map(str, calls))
    torch.testing.assert_close(got, expected, check_stride=True)
    batch = torch.vmap(lambda x: torch.ops.tconv.conv_stream(x, *given[1:]))(torch.stack((x, x.sin())))
    torch.testing.assert_close(tuple(t[0] for t in batch), tuple(expected))
