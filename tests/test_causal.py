"""Causal depthwise convolutions of sequences: against torch's convolution of each sequence by itself in fp64."""

import functools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import tconv
from tconv.dispatch import causal, causal_ops
from tconv.functional import causal_conv1d, causal_conv1d_update
from tconv.launching.record import Fallback
from tconv.planning.device import DEVICES
from tconv.precompile import rehearse

LENGTHS = {"one token": [1], "uneven": [5, 1, 2, 11], "an empty one": [3, 0, 7], "shorter than the filter": [2, 1, 1, 2]}


def random(*shape, dtype=torch.float32, device="cpu", channels_last=False):
    t = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else t


def right(x, w, b, states, silu):
    """(y, final states) of sequences [C, L], each by torch."""
    ys, finals = [], []
    for x_of, state in zip(x, states, strict=True):
        whole = torch.cat((state, x_of), 1)
        y = F.conv1d(whole[None], w[:, None], b, groups=len(w))[0] if x_of.shape[1] else x_of
        ys.append(F.silu(y) if silu else y)
        finals.append(whole[:, x_of.shape[1] :])
    return ys, finals


def close(got, expected, dtype):
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 3e-2}
    tolerance = {"rtol": 1e-12, "atol": 1e-11} if dtype == torch.float64 else tolerance
    torch.testing.assert_close(got.double(), expected, **tolerance)


@pytest.fixture(params=["kernels", "torch"])
def how(request, monkeypatch):
    """Who computes it: tconv's kernels, or torch where these cannot run."""
    if request.param == "torch":
        monkeypatch.setattr(causal_ops, "unavailable", lambda device: "for a test")
    return request.param


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("taps", "state", "silu"), [(4, True, True), (4, False, True), (2, True, False), (1, False, True)])
def test_values_and_gradients(taps, state, silu, channels_last, how, device, poisoned):
    x = random(2, 6, 19, device=device, channels_last=channels_last)
    w, b = random(6, taps, device=device), random(6, device=device)
    states = random(2, 6, taps - 1, device=device) if state else None
    check(x, w, b, states, silu, None, how)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sequences_one_after_the_other(lengths, channels_last, how, device, poisoned):
    total = sum(lengths) + 2  # the last two times are no sequence's
    x = random(1, 8, total, device=device, channels_last=channels_last)
    w, b, states = random(8, 4, device=device), random(8, device=device), random(len(lengths), 8, 3, device=device)
    check(x, w, b, states, True, lengths, how)
    check(x, w, None, None, False, lengths, how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtypes(dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = random(2, 16, 24, dtype=dtype, device=device, channels_last=True)
    w, b, states = (
        random(*shape, dtype=d, device=device) for shape, d in (((16, 4), wide), ((16,), wide), ((2, 16, 3), dtype))
    )
    check(x, w, b, states, True, None, "kernels")


def check(x, w, b, states, silu, lengths, how):
    """Compares results and gradients with those in fp64."""
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=x.device)
    leaves = [t.detach().requires_grad_() for t in (x, w, b, states) if t is not None]
    x, w, *rest = leaves
    b = rest.pop(0) if b is not None else None
    states = rest.pop(0) if states is not None else None
    with tconv.recording() as calls:
        y, finals = causal_conv1d(
            x, w, b, initial_states=states, return_final_states=True, cu_seqlens=cu, activation="silu" if silu else None
        )
        dy, dfinals = torch.randn_like(y), torch.randn_like(finals)
        if lengths:
            dy[..., sum(lengths) :] = 0
        grads = torch.autograd.grad((y, finals), leaves, (dy, dfinals))
    assert {c.ours for c in calls} == {how == "kernels"}
    assert finals.dtype == y.dtype == x.dtype
    assert how == "torch" or y.stride(1) == x.stride(1)
    wides = [t.detach().double().requires_grad_() for t in leaves]
    wx, ww, *rest = wides
    wb = rest.pop(0) if b is not None else None
    ws = rest.pop(0) if states is not None else wx.new_zeros(finals.shape)
    xs = wx.unbind() if lengths is None else wx[0, :, : sum(lengths)].split(lengths, 1)
    ys, fs = right(xs, ww, wb, ws, silu)
    wy = torch.stack(ys) if lengths is None else torch.cat(ys, 1)[None]
    wf = torch.stack(fs)
    expected = torch.autograd.grad((wy, wf), wides, (dy[..., : wy.shape[2]].double(), dfinals.double()))
    close(y[..., : wy.shape[2]], wy, x.dtype)
    assert torch.equal(finals.double(), wf)  # they are copies
    for got, of in zip(grads, expected, strict=True):
        close(got, of, x.dtype)


def test_a_sequence_index(how, device):
    index = torch.tensor([[0, 0, 0, 5, 5, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3, 2]], device=device)
    x, w, b = random(2, 5, 9, device=device), random(5, 4, device=device), random(5, device=device)
    y = causal_conv1d(x, w.unsqueeze(1), b, seq_idx=index, activation="swish")
    for n, lengths in enumerate(([3, 2, 4], [8, 1])):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
        torch.testing.assert_close(y[n : n + 1], causal_conv1d(x[n : n + 1], w, b, cu_seqlens=cu, activation="silu"))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5), channels_last=st.booleans(), decode=st.booleans())
def test_any_chunks_have_the_bits_of_the_whole(device, chunks, channels_last, decode):
    """Also where the last chunk is decoded, and whatever else is in the batch."""
    x = random(2, 8, sum(chunks), dtype=torch.bfloat16, device=device, channels_last=channels_last)
    w, b = random(8, 4, device=device), random(8, device=device)
    whole, final = causal_conv1d(x, w, b, return_final_states=True, activation="silu")
    state, ys = None, []
    for i, chunk in enumerate(x[1:].split(chunks, 2)):
        before = None if state is None else state.clone()
        if decode and state is not None and i == len(chunks) - 1:
            ys.append(causal_conv1d_update(chunk, state, w, b, "silu"))
            continue
        y, after = causal_conv1d(chunk, w, b, initial_states=state, return_final_states=True, activation="silu")
        assert tconv.last_calls()[-1].ours
        assert state is None or torch.equal(state, before)  # which the caller owns
        state, ys = after, [*ys, y]
    assert torch.equal(torch.cat(ys, 2), whole[1:])
    assert torch.equal(state, final[1:])


@pytest.mark.parametrize("state_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("ring", [False, True], ids=["shifted", "ring"])
def test_decoding(ring, length, state_last, how, device, poisoned):
    x, w, b = random(3, 8, 17, device=device), random(8, 4, device=device), random(8, device=device)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    states = random(5, 8, length, device=device, channels_last=state_last)
    before, states[slots[slots >= 0].long()] = states.clone(), 0.0
    whole = causal_conv1d(x, w, b, activation="silu")
    done = 0
    for chunk in x.split([1, 2, 1, 7, 6], 2):
        seen = torch.full((3,), done, dtype=torch.int32, device=device) if ring else None
        given = chunk.squeeze(2) if chunk.shape[2] == 1 else chunk
        with tconv.recording() as calls:
            y = causal_conv1d_update(given, states, w, b, "silu", seen, slots)
        assert [c.ours for c in calls] == [how == "kernels"]
        assert y.shape == given.shape
        y = y.reshape(chunk.shape)
        assert torch.equal(y[1], torch.zeros_like(y[1]))
        torch.testing.assert_close(y[[0, 2]], whole[[0, 2], :, done : done + chunk.shape[2]])
        done += chunk.shape[2]
    for n, slot in ((0, 4), (2, 0)):
        order = [(done - length + i) % length for i in range(length)] if ring else slice(None)
        assert torch.equal(states[slot][:, order], x[n, :, -length:])
    assert torch.equal(states[1:4], before[1:4])


def test_gradients_of_gradients_and_contexts(device):
    x, w, states = (random(*shape, dtype=torch.float64, device=device) for shape in ((1, 2, 4), (2, 3), (1, 2, 2)))

    def step(x, w, states):
        return causal_conv1d(x, w, initial_states=states, return_final_states=True, activation="silu")

    leaves = [t.clone().requires_grad_() for t in (x, w, states)]
    assert torch.autograd.gradgradcheck(step, leaves, fast_mode=True)
    y, final = step(x, w, states)
    for others in (
        torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, states),
        torch.vmap(step, in_dims=(0, None, 0))(x[:, None], w, states[:, None]),
    ):
        torch.testing.assert_close([t.reshape(s.shape) for t, s in zip(others, (y, final), strict=True)], [y, final])
    torch.func.jvp(lambda x: step(x, w, states)[0], (x,), (x,))
    assert step(*(t.to("meta") for t in (x, w, states)))[0].shape == x.shape


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("over", [(0,), (1,), (2,), (0, 1)], ids=str)
def test_gradients_of_a_sum(over, channels_last, device, poisoned):
    """A sum's gradient repeats its elements by strides of zero, and the gradient of SiLU's argument does not."""
    x, w = random(3, 6, 9, device=device, channels_last=channels_last), random(6, 4, device=device)
    leaves = [t.requires_grad_() for t in (x, w)]
    wides = [t.detach().double().requires_grad_() for t in leaves]
    y = causal_conv1d(*leaves, activation="silu").sum(over)
    right = F.silu(F.conv1d(F.pad(wides[0], (3, 0)), wides[1][:, None], groups=6)).sum(over)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(right, wides, dy.double())
    for got, of in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        close(got, of, x.dtype)


def test_gradients_of_gradients_where_the_input_depends_on_the_filter(device):
    x, w = random(1, 2, 5, dtype=torch.float64, device=device), random(2, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradgradcheck(lambda w: causal_conv1d(x * w.sum(), w, activation="silu"), (w.requires_grad_(),))
    right = F.silu(F.conv1d(F.pad(x * w.sum(), (2, 0)), w[:, None], groups=2)).sin().sum()
    y = causal_conv1d(x * w.sum(), w, activation="silu").sin().sum()
    torch.testing.assert_close(*(torch.autograd.grad(t, w, create_graph=True)[0] for t in (y, right)))


def test_a_gradient_whose_kernel_fails_is_torchs(device, monkeypatch):
    from tconv.launching import causal as launching

    def failing(*_):
        raise Fallback("for a test")

    x, w = random(2, 4, 6, device=device).requires_grad_(), random(4, 3, device=device).requires_grad_()
    y, dy = causal_conv1d(x, w, activation="silu"), torch.randn(2, 4, 6, device=device)
    expected = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    monkeypatch.setattr(launching, "run", failing)
    with tconv.recording() as calls:
        got = torch.autograd.grad(y, (x, w), dy)
    assert "for a test" in calls[0].reason
    torch.testing.assert_close(got, expected)


def test_a_checkpoint(how, device):
    """Which lets the saved tensors be read once."""
    x, w = random(2, 4, 6, device=device).requires_grad_(), random(4, 3, device=device)
    step = functools.partial(causal_conv1d, activation="silu")
    y = torch.utils.checkpoint.checkpoint(step, x, w, use_reentrant=False)
    again = how == "torch"
    dy = torch.randn(2, 4, 6, device=device)
    got, expected = (torch.autograd.grad(t, x, dy, create_graph=again)[0] for t in (y, step(x, w)))
    torch.testing.assert_close(got, expected)


def test_filters_that_no_kernel_has(device):
    x, w = random(1, 4, 12, device=device), random(4, 11, device=device)
    y = causal_conv1d(x, w)
    assert "11 taps" in tconv.last_calls()[-1].reason
    torch.testing.assert_close(y, F.conv1d(F.pad(x, (10, 0)), w[:, None], groups=4))


X, W = torch.zeros(2, 4, 6), torch.zeros(4, 3)
BAD = {
    "x": [((torch.zeros(4, 6), W), {}), ((X.int(), W), {}), ((X, W), {"cu_seqlens": torch.tensor([0, 6])})],
    "weight": [((X, torch.zeros(3, 3)), {}), ((X, torch.zeros(4, 2, 3)), {}), ((X, W.half()), {}), ((X, W.to("meta")), {})],
    "bias": [((X, W, torch.zeros(3)), {}), ((X, W, torch.zeros(4, dtype=torch.bfloat16)), {})],
    "activation": [((X, W), {"activation": "relu"})],
    "initial_states": [
        ((X, W), {"initial_states": torch.zeros(shape)}) for shape in ((2, 4, 3), (1, 4, 2), (2, 3, 2), (2, 4))
    ] + [
        ((X, W), {"initial_states": torch.zeros(2, 4, 2, dtype=torch.half)}),
        ((X, W), {"initial_states": torch.zeros(2, 4, 2), "seq_idx": torch.zeros(2, 6, dtype=torch.int32)}),
        ((X[:1], W), {"initial_states": torch.zeros(1, 4, 2), "cu_seqlens": torch.tensor([0, 2, 6])}),
    ],
    "seq_idx": [((X, W), {"seq_idx": torch.zeros(2, 5, dtype=torch.int32)}), ((X, W), {"seq_idx": torch.zeros(2, 6)})],
    "return_final_states": [((X, W), {"return_final_states": True, "seq_idx": torch.zeros(2, 6, dtype=torch.int32)})],
    "cu_seqlens": [
        ((X[:1], W), {"cu_seqlens": torch.tensor([0])}),
        ((X[:1], W), {"cu_seqlens": torch.tensor([0, 6]), "seq_idx": torch.zeros(1, 6, dtype=torch.int32)}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in BAD.items() for call in calls], ids=str)
def test_bad_arguments(name, call, monkeypatch):
    monkeypatch.setattr(causal, "_computed", lambda *_: pytest.fail("a launch"))
    args, kwargs = call
    with pytest.raises(ValueError, match=rf"^{name} must"):
        causal_conv1d(*args, **kwargs)


@pytest.mark.parametrize(
    ("match", "x", "more"),
    [
        ("conv_state must", torch.zeros(2, 4), {"conv_state": torch.zeros(2, 4, 1)}),
        ("conv_state must", torch.zeros(3, 4), {}),
        ("conv_state must", torch.zeros(2, 4, dtype=torch.half), {}),
        ("x must", torch.zeros(2, 4, 1, 1), {}),
        ("cache_seqlens must", torch.zeros(2, 4), {"cache_seqlens": torch.zeros(3, dtype=torch.int32)}),
        ("conv_state_indices must", torch.zeros(2, 4), {"conv_state_indices": torch.zeros(2)}),
        ("no gradient", torch.zeros(2, 4, requires_grad=True), {}),
    ],
)
def test_bad_arguments_of_decoding(match, x, more):
    state = more.pop("conv_state", torch.ones(2, 4, 2))
    with pytest.raises(ValueError, match=match):
        causal_conv1d_update(x, state, W, **more)
    assert (state == state.flatten()[0]).all()


def sequences(name, device, dtype=torch.float64, channels_last=False):
    """Tensors of `torch.ops.tconv.causal_conv1d`, x, w, b and the states of which require gradients."""
    varlen = name == "several sequences"
    x = random(1 if varlen else 2, 4, 11, dtype=dtype, device=device, channels_last=channels_last)
    w, b = random(4, 3, dtype=dtype, device=device), random(4, dtype=dtype, device=device)
    states = None if name == "no states" else random(3 if varlen else 2, 4, 2, dtype=dtype, device=device)
    starts = torch.tensor([0, 1, 6, 11], device=device) if varlen else None
    index = torch.tensor([[0] + [1] * 5 + [2] * 5], device=device, dtype=torch.int32) if varlen else None
    return [t if t is None else t.requires_grad_() for t in (x, w, b, states)] + [index, starts]


KINDS = ("states", "no states", "several sequences")


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_check(kind, channels_last, how, device):
    *leaves, index, starts = sequences(kind, device, channels_last=channels_last)
    forward, backward = torch.ops.tconv.causal_conv1d.default, torch.ops.tconv.causal_conv1d_grad.default
    torch.library.opcheck(forward, (*leaves, index, starts, "silu", leaves[3] is not None))
    leaves = [t if t is None else t.detach() for t in leaves]
    dy, dnext, needs = leaves[0].cos(), leaves[3], [True, True, True, leaves[3] is not None]
    torch.library.opcheck(backward, (dy, dnext, *leaves, index, starts, "silu", needs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_formulas(kind, device):
    """Of the operator, of its gradient, and in batches."""
    *leaves, index, starts = sequences(kind, device)

    def step(*leaves):
        y, after = torch.ops.tconv.causal_conv1d(*leaves, index, starts, "silu", leaves[3] is not None)
        return (y, after) if leaves[3] is not None else y

    assert torch.autograd.gradcheck(step, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(step, leaves, fast_mode=True)
    outs = step(*leaves)
    total = sum(t.sin().sum() for t in (outs if isinstance(outs, tuple) else (outs,)))
    wanted = [t for t in leaves if t is not None]
    by_kernels = torch.autograd.grad(total, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, wanted, create_graph=True), by_kernels)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_call_is_one_operator(kind, channels_last, device):
    torch._dynamo.reset()
    *leaves, _, starts = sequences(kind, device, channels_last=channels_last)
    seen = []

    def compiler(graph, _):
        seen.append([n.target._opname for n in graph.graph.nodes if str(n.target).startswith("tconv.")])
        return graph

    def step(x, w, b, states):
        return causal_conv1d(x, w, b, None, states, states is not None, cu_seqlens=starts, activation="silu")

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))):
        outs = run(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = torch.autograd.grad([t.sin().sum() for t in outs], [t for t in leaves if t is not None])
        found.append([*outs, *grads])
    assert seen == [["causal_conv1d"], ["causal_conv1d_grad"]]
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
        assert eager.stride() == compiled.stride()


def test_graphs_of_any_length(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(functools.partial(causal_conv1d, activation="silu"), fullgraph=True, backend=counter, dynamic=True)
    w = random(4, 3, device=device)
    for length in (5, 9, 20):
        x = random(2, 4, length, device=device)
        assert torch.equal(step(x, w), causal_conv1d(x, w, activation="silu"))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["slots", "a ring"])
def test_a_compiled_decode_step_changes_its_states(kind, device):
    torch._dynamo.reset()
    x, w, states = random(2, 4, device=device), random(4, 3, device=device), random(5, 4, 3, device=device)
    how = {"conv_state_indices": torch.tensor([3, 0], device=device)}
    how |= {"cache_seqlens": torch.tensor([4, 1], device=device)} if kind == "a ring" else {}
    step = functools.partial(causal_conv1d_update, activation="silu", **how)
    compiled, mine = torch.compile(step, fullgraph=True, backend="aot_eager"), states.clone()
    assert torch.equal(compiled(x, mine, w), step(x, states, w))
    assert torch.equal(mine, states)
    torch.library.opcheck(
        torch.ops.tconv.causal_conv1d_update.default,
        (x[..., None], states, w, None, how.get("cache_seqlens"), how["conv_state_indices"], "silu"),
    )


def test_exported_and_traced(device):
    class Model(torch.nn.Module):
        def forward(self, x, w, states):
            return causal_conv1d(x, w, initial_states=states, return_final_states=True, activation="silu")

    x, w, _, states, *_ = (t if t is None else t.detach() for t in sequences("states", device))
    expected = Model()(x, w, states)
    exported = torch.export.export(Model(), (x, w, states))
    assert [n.target._opname for n in exported.graph.nodes if str(n.target).startswith("tconv.")] == ["causal_conv1d"]
    graph = make_fx(Model())(x, w, states)
    assert "tconv.causal_conv1d" in graph.code
    decomposed = exported.run_decompositions()
    assert not any(str(n.target).startswith("tconv.") for n in decomposed.graph.nodes)
    for run in (exported.module(), graph, decomposed.module(), torch.jit.trace(Model(), (x, w, states))):
        torch.testing.assert_close(run(x, w, states), expected)


def test_fx_records_one_call(device):
    def net(x, w, state):
        y, last = causal_conv1d(x, w, None, None, state, True, activation="silu")
        return y, last, causal_conv1d_update(y, state, w, None, "silu")

    traced = torch.fx.symbolic_trace(net)
    called = [n.target for n in traced.graph.nodes if n.op == "call_function" and n.target.__module__ == "tconv.functional"]
    assert called == [causal_conv1d, causal_conv1d_update]
    x, w, state = (torch.randn(s, device=device) for s in ((2, 3, 7), (3, 4), (2, 3, 3)))
    torch.testing.assert_close(traced(x, w, state.clone()), net(x, w, state.clone()))


def test_a_rehearsal_knows_the_launches():
    """Those of a device that is not here, forward, backward and decoding."""
    x, w, states = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 64, 32), (64, 4), (2, 64, 3)))

    def model(x, w, states):
        return causal_conv1d(x, w, None, None, states, True, activation="silu")

    launches, left = rehearse(model, (x, w, states), {}, DEVICES["H200"], True)
    assert {p.kernel.__name__ for p in launches} == {"causal", "causal_wgrad", "causal_dgrad"}
    assert not left
    decode = torch.no_grad()(functools.partial(causal_conv1d_update, activation="silu"))
    launches, left = rehearse(decode, (x[..., 0], states, w), {}, DEVICES["H200"], False)
    assert {p.kernel.__name__ for p in launches} == {"causal_step"}
    assert not left
