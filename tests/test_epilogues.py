"""Epilogues: scale, shift, residual and activation in the convolution's own kernel, against the sequence in fp64."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import tconv
from tconv import functional as TF
from tconv.dispatch.steps import SEQUENCE, Steps, followed
from tconv.planning.epilogue import ACTIVATIONS, BY_RESULT
from tconv.planning.tiles import Tile
from tests import cases, oracle
from tests.oracle import Case

OURS = {
    False: {1: TF.conv1d, 2: TF.conv2d, 3: TF.conv3d},
    True: {1: TF.conv_transpose1d, 2: TF.conv_transpose2d, 3: TF.conv_transpose3d},
}
PLAIN = Case("plain", (2, 5, 7, 6), 6, (3, 3), padding=1)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SOME = {
    "relu": {"activation": "relu"},
    "silu after a residual": {"activation": "silu", "residual": "before"},
    "a residual after gelu": {"activation": "gelu", "residual": "after"},
    "batch norm, residual, relu": {"activation": "relu", "residual": "before", "scale": True, "shift": True},
    "a residual alone": {"residual": "before"},
    "scale alone": {"scale": True},
    "shift and tanh": {"activation": "tanh", "shift": True},
}


def arguments(how, y, leaf=False):
    """The keyword arguments of a call whose result is like y."""
    given = {k: v for k, v in how.items() if k not in ("residual", "scale", "shift")}
    if "residual" in how:
        given |= {"residual": torch.randn_like(y).requires_grad_(leaf), "residual_position": how["residual"]}
    channels = y.shape[1]
    return given | {k: torch.randn(channels).to(y.device, y.dtype) for k in ("scale", "shift") if how.get(k)}


def check(case, how, dtype, device, channels_last=False, plan=None, **more):
    """Asserts that the result and every gradient are those of the sequence in fp64. Returns the calls.

    Args:
        plan: what `force` gets for the forward pass.
    """
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    torchs = (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]
    y = torchs(x.double(), w.double(), b.double(), **case.arguments).to(dtype)
    if channels_last:
        y = oracle.to_channels_last(y)
    extra = arguments(how, y, leaf=True) | more
    leaves = [t.detach().requires_grad_() for t in (x, w, b)] + ([extra["residual"]] if "residual" in extra else [])
    with tconv.recording() as calls:
        with tconv.force(**plan or {}):
            got = OURS[case.transposed][case.rank](*leaves[:3], **case.arguments, **extra)
        dy = torch.randn_like(got)
        grads = torch.autograd.grad(got, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    steps = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    if "residual" in steps:
        steps["residual"] = wide[3]
    right = followed(torchs(*wide[:3], **case.arguments), Steps(**steps), case.rank)
    rights = torch.autograd.grad(right, wide, dy.double())
    for name, a, e in zip(("y", "dx", "dw", "db", "dr"), (got, *grads), (right, *rights), strict=False):
        assert a.shape == e.shape
        error = (a.double() - e).abs().max() / e.abs().max().clamp(min=1e-6)
        tolerance = 1e-2 if oracle.tf32(dtype) else TOLERANCE[dtype]
        assert error <= tolerance * (1 if name in ("y", "dr") else 2), (name, float(error))
    assert all(c.ours for c in calls), calls
    return calls


# Each case with two of the epilogues, each epilogue with cases of several kernels and ranks.
PAIRS = {f"{c}-{n}": (c, SOME[n]) for i, c in enumerate(cases.FEW) for n in ([*SOME] * 3)[2 * i % len(SOME) :][:2]} | {
    f"{c}-{n}": (c, SOME[n]) for c in cases.FEW if "groups" in c.reason for n in ("batch norm, residual, relu",)
}


@pytest.mark.parametrize(("case", "how"), PAIRS.values(), ids=PAIRS)
def test_values_and_gradients(case, how, device, poisoned):
    calls = check(case, how, torch.float32, device)
    assert sum(c.operation in ("fprop", "dgrad") for c in calls) == 2  # the forward pass is one launch


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, position, device, poisoned):
    # The formulas are others in fp64 than in fp32. After the activation its argument is kept, else for some the result is.
    for dtype in (torch.float64, torch.float32):
        check(PLAIN, {"activation": activation, "residual": position, "shift": True}, dtype, device)
    if position == "before":
        check(PLAIN, {"activation": activation}, torch.bfloat16, device, channels_last=True)


# With TF32 a relu may see a number near zero with the other sign, so a smooth function takes its place.
BEFORE = SOME["batch norm, residual, relu"] | {"activation": "silu"}
LARGE = Case("whole tiles", (2, 64, 8, 8), 64, (3, 3), padding=1)
STRIDED = Case("strided dgrad", (2, 64, 4, 4), 64, (4, 4), stride=2, padding=1, transposed=True)
FORCED = {
    "gather": (LARGE, {"kernel": "gather"}),
    "gather in two splits": (LARGE, {"kernel": "gather", "tile": Tile(64, 64, 32), "splits": 2}),
    "gather with two blocks": (
        Case("three quarters", (2, 16, 5, 5), 96, (3, 3)), {"kernel": "gather", "tile": Tile(256, 64, 64, 8, 3, extra=32)},
    ),
    "gather of a strided dgrad": (STRIDED, {"kernel": "gather"}),
    "packed": (Case("stem", (2, 3, 9, 8), 16, (5, 5), stride=2, padding=2), {"kernel": "packed"}),
    "packed groups": (Case("groups", (2, 12, 6, 6), 18, (3, 3), groups=6), {"kernel": "packed"}),
    "rows": (Case("few written", (2, 20, 6, 9), 3, (3, 3), padding=1), {"kernel": "rows"}),
    "rows of a strided dgrad": (
        Case("few written, strided", (2, 20, 5, 6), 3, (4, 4), stride=2, padding=1, transposed=True), {"kernel": "rows"},
    ),
    "tma": (LARGE, {"kernel": "tma"}),
    "tma of a strided dgrad": (STRIDED, {"kernel": "tma"}),
    "patch": (Case("patches", (2, 8, 3, 8), 8, (2, 2), stride=2, transposed=True), {"kernel": "patch"}),
    "patch groups": (Case("groups", (2, 16, 3, 8), 16, (2, 4), stride=(2, 4), groups=2, transposed=True), {"kernel": "patch"}),
    "depthwise": (Case("depthwise", (2, 6, 7, 9), 12, (3, 3), padding=1, groups=6), {"kernel": "depthwise"}),
    "strip": (Case("strips", (2, 8, 6, 16), 8, (3, 3), padding=1, groups=8), {"kernel": "strip"}),
}  # fmt: skip


# A layout is about the addresses of the residual and the orientation of a tile, which both epilogues share.
@pytest.mark.parametrize(
    ("how", "channels_last"),
    [
        pytest.param(BEFORE, False, id="before-contiguous"), pytest.param(BEFORE, True, id="before-channels_last"),
        pytest.param(SOME["a residual after gelu"], True, id="after-channels_last"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
def test_every_kernel(forced, how, channels_last, device, poisoned):
    case, plan = forced
    dtype = torch.bfloat16 if case.reason == "three quarters" else torch.float32  # whose tile is for 16 bits
    calls = check(case, how, dtype, device, channels_last, plan)
    assert calls[0].plan.kernel == plan["kernel"]
    assert calls[0].plan.splits == plan.get("splits", 1)
    assert "residual" in calls[0].plan.reason


def test_a_patch_like_transposed_layer_scales_channels_not_taps(device, poisoned):
    # Without a bias its taps could be merged with the channels written.
    case = Case("kernel equals stride", (2, 4, 5, 4), 3, (2, 2), stride=2, transposed=True)
    x, w, _ = oracle.tensors(case, torch.float32, device)
    scale = torch.randn(3, device=device)
    y = TF.conv_transpose2d(x, w, stride=2, scale=scale)
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, stride=2) * scale.view(-1, 1, 1))


@st.composite
def combinations(draw):
    rank = draw(st.integers(1, 3))
    groups, transposed = draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans())
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    extents = st.integers(5, 7) if rank < 3 else st.integers(5, 5)  # 3-D takes longest
    x = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 3)), *(draw(extents) for _ in range(rank)))
    case = Case(
        "drawn", x, groups * draw(st.integers(1, 3)), kernel, stride, draw(st.integers(0, 1)), dilation, groups, transposed
    )
    how = {}
    if draw(st.booleans()):
        how["activation"] = draw(st.sampled_from(ACTIVATIONS))
        if how["activation"] == "leaky_relu":
            how["negative_slope"] = draw(st.sampled_from([0.2, 0.0, -0.5]))
    if draw(st.booleans()):
        how["residual"] = draw(st.sampled_from(["before", "after"]))
    how |= {k: True for k in ("scale", "shift") if draw(st.booleans())}
    return case, how, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(combinations())
def test_combinations(device, poisoned, drawn):
    case, how, recompute, channels_last = drawn
    check(case, how, torch.float32, device, channels_last, recompute=recompute)


@pytest.mark.parametrize("how", SOME.values(), ids=SOME)
def test_an_unbatched_input(how, device):
    x, w, b = oracle.tensors(PLAIN, torch.float32, device)
    given = arguments(how, F.conv2d(x, w, b, padding=1))
    alone = given | ({"residual": given["residual"][0]} if "residual" in given else {})
    assert torch.equal(TF.conv2d(x[0], w, b, padding=1, **alone), TF.conv2d(x[:1], w, b, padding=1, **given | (
        {"residual": given["residual"][:1]} if "residual" in given else {}
    ))[0])  # fmt: skip


TWICE = SOME | {a: {"activation": a} for a in ACTIVATIONS}
ARGUMENT = [
    n for n, how in TWICE.items() if how.get("activation") in (*set(ACTIVATIONS) - BY_RESULT,)
]  # what is not the result


@pytest.mark.parametrize(
    ("name", "recompute"), [*((n, False) for n in TWICE), *((n, True) for n in ARGUMENT)],
    ids=[*(f"kept-{n}" for n in TWICE), *(f"recomputed-{n}" for n in ARGUMENT)],
)  # fmt: skip
def test_second_derivatives(name, recompute, device):
    how = TWICE[name]
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float64, device))
    given = arguments(how, F.conv2d(x, w, b, padding=1).detach(), leaf=True)
    leaves = [x, w, b] + ([given["residual"]] if "residual" in given else [])
    dy = torch.randn(2, 6, 7, 6, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for y in (
        TF.conv2d(x, w, b, padding=1, recompute=recompute, **given),
        followed(F.conv2d(x, w, b, padding=1), Steps(**given), 2),
    ):
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        into = [torch.ones_like(t) for t in leaves]
        results.append(torch.autograd.grad(first, (*leaves, dy), into, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_what_is_kept_for_the_gradient(device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))

    def kept(**how):
        y = TF.conv2d(x, w, b, padding=1, **how)
        others = {t.data_ptr() for t in (x, w, b, *(t for t in how.values() if isinstance(t, torch.Tensor)))}
        saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.data_ptr() not in others]
        return [t.data_ptr() == y.data_ptr() for t in saved]

    for activation in ("relu", "leaky_relu", "sigmoid", "tanh"):
        assert kept(activation=activation) == [True], activation
    for activation in ("silu", "gelu", "gelu_tanh", "hardswish"):
        assert kept(activation=activation) == [False], activation
        assert kept(activation=activation, recompute=True) == []
    assert kept(activation="relu", residual=torch.randn(2, 6, 7, 6, device=device), residual_position="after") == [False]
    assert kept(activation="leaky_relu", negative_slope=-0.5) == [False]  # the result does not tell the argument's sign
    assert kept(residual=torch.randn(2, 6, 7, 6, device=device)) == []


def test_the_backward_pass_reads_the_gradient_once_for_activation_and_bias(device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))
    y = TF.conv2d(x, w, b, padding=1, activation="silu")
    with tconv.recording() as calls:
        y.sum().backward()
    assert [c.operation for c in calls] == ["bias", "dgrad", "wgrad"]
    assert "gradient of silu" in calls[0].plan.reason


@pytest.mark.parametrize("how", SOME.values(), ids=SOME)
def test_stepwise_has_the_bits_of_the_sequence(how, device):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, w, b = oracle.tensors(PLAIN, dtype, device)
        y = TF.conv2d(x, w, b, padding=1)
        given = arguments(how, y)
        got = TF.conv2d(x, w, b, padding=1, stepwise=True, **given)
        sequence = followed(y, Steps(**given), 2)
        if how.get("activation") in (None, "relu"):
            assert torch.equal(got, sequence)
        else:  # torch's exponential may differ from ours in the last bit
            torch.testing.assert_close(got, sequence)


def test_without_stepwise_the_result_is_rounded_once(device):
    x = torch.full((1, 1, 1, 1), 256.0, device=device, dtype=torch.bfloat16)
    w, shift = torch.ones(1, 1, 1, 1, device=device, dtype=torch.bfloat16), torch.ones(1, device=device, dtype=torch.bfloat16)
    twice = {"shift": shift, "residual": torch.ones_like(x)}
    assert TF.conv2d(x, w, **twice).item() == 258  # 256 + 1 + 1; bf16 has no 257
    assert TF.conv2d(x, w, stepwise=True, **twice).item() == 256


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity(activation, device):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e2, -1e2, 3.0, -3.0], device=device)
    x = special.view(1, 1, 9).requires_grad_()
    w = torch.ones(1, 1, 1, device=device)
    y = TF.conv1d(x, w, activation=activation)
    wide = x.detach().double().requires_grad_()  # torch's gelu of infinity in fp32 is NaN on a CPU
    right = SEQUENCE[activation](wide, 0.01)
    torch.testing.assert_close(y, right.float(), equal_nan=True)
    got, expected = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(right.sum(), wide)[0]
    torch.testing.assert_close(got, expected.float(), equal_nan=True)


def test_gelu_is_accurate(device):
    x = torch.linspace(-8, 8, 20001, device=device).view(1, 1, -1)
    error = TF.conv1d(x, torch.ones(1, 1, 1, device=device), activation="gelu").double() - F.gelu(x.double())
    assert (error.abs() <= 3.2e-7 * x.double().abs()).all()


def test_a_residual_is_not_changed_and_may_have_any_strides(device):
    x, w, b = oracle.tensors(PLAIN, torch.float32, device)
    for residual in (
        torch.randn(2, 7, 6, 6, device=device).permute(0, 3, 1, 2),
        torch.randn(2, 6, 7, 12, device=device)[..., ::2],
        torch.randn(1, 6, 1, 1, device=device).expand(2, 6, 7, 6),
        torch.randn(2 * 6 * 7 * 6 + 1, device=device)[1:].view(2, 6, 7, 6),
    ):
        before = residual.clone()
        y = TF.conv2d(x, w, b, padding=1, residual=residual, activation="relu")
        torch.testing.assert_close(y, F.relu(F.conv2d(x, w, b, padding=1) + before))
        assert torch.equal(residual, before)


def test_an_edited_result_is_noticed(device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))
    y = TF.conv2d(x, w, b, padding=1, activation="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "case",
    [
        Case("two groups", (2, 4, 3, 4), 6, (2, 2), groups=2),
        Case("two groups, transposed", (2, 4, 3), 6, (3,), stride=2, groups=2, transposed=True),
    ],
    ids=str,
)
def test_gradients_of_scale_and_shift(case, device, poisoned):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))
    ours, torchs = OURS[case.transposed][case.rank], (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]
    scale, shift = (torch.randn(6, dtype=torch.float64, device=device) for _ in range(2))
    scale[0] = 0  # where the convolution's result cannot be told from what is kept
    residual = torch.randn_like(torchs(x, w, b, **case.arguments)).requires_grad_()
    for how, asked in (
        ({}, (scale, shift)), ({"activation": "silu", "residual": residual}, (scale,)), ({"activation": "tanh"}, (shift,)),
        ({"activation": "silu"}, (scale, shift)),
    ):  # fmt: skip
        for t in (scale, shift):
            t.requires_grad_(any(t is a for a in asked))
        leaves = [x, w, b, *asked, *((residual,) if "residual" in how else ())]
        given = how | {"scale": scale, "shift": shift}
        with tconv.recording() as calls:
            y = ours(x, w, b, **case.arguments, **given)
            dy = torch.randn_like(y)
            first = torch.autograd.grad(y, leaves, dy)
        assert sorted({c.operation for c in calls}) == ["bias", "dgrad", "fprop", "wgrad"]
        assert len(calls) == 4
        assert all(c.ours for c in calls)
        right = followed(torchs(x, w, b, **case.arguments), Steps(**given), case.rank)
        torch.testing.assert_close((y, *first), (right, *torch.autograd.grad(right, leaves, dy, retain_graph=True)))
    twice = []
    with_residual = given | {"residual": residual}  # and no bias before it
    for y in (
        ours(x, w, **case.arguments, **with_residual),
        followed(torchs(x, w, **case.arguments), Steps(**with_residual), case.rank),
    ):
        twice.append(torch.autograd.grad(y.square().sum(), (x, residual, shift)))
    torch.testing.assert_close(*twice)
    twice = []
    for y in (ours(x, w, b, **case.arguments, **given), right):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*twice)


def test_scale_in_fp32_beside_bf16(device):
    x, w, b = oracle.tensors(PLAIN, torch.bfloat16, device)
    scale, shift = torch.randn(6, device=device), torch.randn(6, device=device).bfloat16()
    y = TF.conv2d(x, w, b, padding=1, scale=scale, shift=shift)
    right = F.conv2d(x.double(), w.double(), b.double(), padding=1) * scale.double().view(-1, 1, 1) + shift.double().view(
        -1, 1, 1
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), right, rtol=8e-3, atol=2e-2)


# Contexts


def test_under_torch_compile(device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))
    residual = torch.randn(2, 6, 7, 6, device=device, requires_grad=True)

    def step(x, w, b, residual):
        return TF.conv2d(x, w, b, padding=1, activation="silu", residual=residual)

    y, right = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b, residual), step(x, w, b, residual)
    torch.testing.assert_close(y, right)
    for got, expected in zip(*(torch.autograd.grad(t.sum(), (x, w, b, residual)) for t in (y, right)), strict=True):
        torch.testing.assert_close(got, expected)


def test_under_vmap_checkpoint_and_forward_mode(device):
    x, w, b = oracle.tensors(PLAIN, torch.float64, device)

    def step(x):
        return TF.conv2d(x, w, b, padding=1, activation="gelu")

    torch.testing.assert_close(torch.vmap(step)(x.unsqueeze(1)).squeeze(1), step(x))
    assert torch.autograd.gradcheck(step, x.requires_grad_(), check_forward_ad=True, fast_mode=True)
    y = checkpoint(step, x, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, step(x))))


def test_under_autocast(device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16), tconv.recording() as calls:
        y = TF.conv2d(x, w, b, padding=1, activation="relu")
        right = F.relu(F.conv2d(x, w, b, padding=1))
    assert y.dtype == torch.bfloat16
    assert len(calls) == 1
    assert calls[0].ours
    torch.testing.assert_close(y, right)
    for got, expected in zip(*(torch.autograd.grad(t.sum(), (x, w, b)) for t in (y, right)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=5e-2)


def test_fx_records_one_call():
    class Net(torch.nn.Module):
        def forward(self, x, w, r):
            return TF.conv2d(x, w, padding=1, activation="relu", residual=r)

    traced = torch.fx.symbolic_trace(Net())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [TF.conv2d]
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(traced(x, w, x), F.relu(F.conv2d(x, w, padding=1) + x))


def test_explain_tells_of_the_epilogue(device):
    layer, x = tconv.FusedConv2d(8, 8, 3, padding=1, activation="silu").to(device), torch.randn(2, 8, 6, 6, device=device)
    explanation = tconv.explain(layer, x, residual=x)
    assert explanation.ours
    assert [c.operation for c in explanation.calls] == ["fprop", "bias", "dgrad", "wgrad"]
    assert "with residual, silu" in str(explanation)


# Bad arguments

X, W = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
BAD = {
    "activation must be None or one of": {"activation": "swish"},
    "residual_position must be one of": {"residual": torch.randn(1, 3, 2, 2), "residual_position": "during"},
    "residual must have shape (1, 3, 2, 2), got (1, 3, 4, 4)": {"residual": torch.randn(1, 3, 4, 4)},
    "residual must be of torch.float32, got torch.float64": {"residual": torch.randn(1, 3, 2, 2).double()},
    "residual must be a tensor, got int": {"residual": 1},
    "scale must have shape (3,), got (1, 3)": {"scale": torch.randn(1, 3)},
    "shift must have shape (3,), got (4,)": {"shift": torch.randn(4)},
    "shift must be of torch.float32, got torch.float16": {"shift": torch.randn(3).half()},
    "negative_slope must be a number, got 'steep'": {"activation": "leaky_relu", "negative_slope": "steep"},
}


@pytest.mark.parametrize(("text", "bad"), BAD.items(), ids=list(BAD))
def test_bad_arguments(text, bad, device):
    bad = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in bad.items()}
    with tconv.recording() as calls, pytest.raises(ValueError, match=re.escape(text)):
        TF.conv2d(X.to(device), W.to(device), **bad)
    assert calls == []


def test_bad_arguments_of_the_convolution_are_torchs(device):
    x, w = X.to(device), W.to(device)
    for bad in ({"stride": 0}, {"padding": -1}, {"groups": 5}, {"unknown": 1}):
        with pytest.raises(Exception) as ours:  # noqa: PT011 - whatever torch raises
            TF.conv2d(x, w, **bad, activation="relu") if "unknown" not in bad else TF.conv2d(x, w, **bad)
        with pytest.raises(type(ours.value)) as torchs:
            F.conv2d(x, w, **bad)
        assert str(ours.value) == str(torchs.value)


# Layers

LAYERS = {
    "FusedConv1d": (tconv.FusedConv1d, torch.nn.Conv1d, (2, 4, 9)),
    "FusedConv2d": (tconv.FusedConv2d, torch.nn.Conv2d, (2, 4, 6, 7)),
    "FusedConv3d": (tconv.FusedConv3d, torch.nn.Conv3d, (2, 4, 4, 5, 4)),
    "FusedConvTranspose1d": (tconv.FusedConvTranspose1d, torch.nn.ConvTranspose1d, (2, 4, 9)),
    "FusedConvTranspose2d": (tconv.FusedConvTranspose2d, torch.nn.ConvTranspose2d, (2, 4, 6, 7)),
    "FusedConvTranspose3d": (tconv.FusedConvTranspose3d, torch.nn.ConvTranspose3d, (2, 4, 4, 5, 4)),
}


@pytest.mark.parametrize(("ours", "torchs", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers(ours, torchs, shape, device):
    layer = ours(4, 6, 3, stride=2, activation="silu", residual_position="after").to(device)
    plain = torchs(4, 6, 3, stride=2).to(device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, device=device)
    y = plain(x)
    residual, scale = torch.randn_like(y), torch.randn(6, device=device)
    by_channel = scale.view(-1, *(1,) * (len(shape) - 2))
    torch.testing.assert_close(layer(x), F.silu(y))
    torch.testing.assert_close(layer(x, residual=residual, scale=scale), F.silu(y * by_channel) + residual)
    assert "activation='silu'" in repr(layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x), layer(x))
    assert type(tconv.restore_(layer)) is ours


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_a_layer_that_pads(mode, device):
    layer = tconv.FusedConv2d(4, 4, 3, padding=1, padding_mode=mode, activation="relu").to(device)
    plain = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode).to(device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 5, device=device)
    torch.testing.assert_close(layer(x, residual=x), F.relu(plain(x) + x))


def test_a_layer_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be None or one of"):
        tconv.FusedConv2d(4, 4, 3, activation="swish")


def test_every_step_is_documented():
    for name in Steps._fields:
        assert name in TF.conv2d.__doc__
        assert name in TF.conv_transpose3d.__doc__


# Repeated calls


def repeated(call, monkeypatch):
    """How many of four equal calls were prepared anew."""
    from tconv.dispatch import epilogues

    epilogues.forget()
    made, slow = [], epilogues._by_kernel
    monkeypatch.setattr(epilogues, "_by_kernel", lambda *a: made.append(a) or slow(*a))
    results = [call() for _ in range(4)]
    assert all(torch.equal(results[0], y) for y in results)
    return len(made)


def test_a_repeated_call_is_only_compared_and_launched(device, monkeypatch):
    layer = tconv.FusedConv2d(5, 6, 3, padding=1, activation="silu").to(device)
    x, residual = torch.randn(2, 5, 7, 6, device=device), torch.randn(2, 6, 7, 6, device=device)
    scale = torch.randn(6, device=device)
    assert repeated(lambda: layer(x), monkeypatch) == 2
    assert repeated(lambda: layer(x, residual, scale, scale * 2), monkeypatch) == 2
    with torch.no_grad():
        assert repeated(lambda: layer(x, residual), monkeypatch) == 2


def test_a_repeated_call_notices_what_differs(device):
    layer = tconv.FusedConv2d(5, 6, 3, padding=1, activation="leaky_relu").to(device)
    x, residual = torch.randn(2, 5, 7, 6, device=device), torch.randn(2, 6, 7, 6, device=device)
    plain = torch.nn.Conv2d(5, 6, 3, padding=1).to(device)
    plain.load_state_dict(layer.state_dict())

    def check(x=x, residual=residual, stride=1):
        r = residual.expand(plain(x).shape) if residual.numel() == 1 else residual
        right = F.leaky_relu(F.conv2d(x, plain.weight, plain.bias, stride, 1) + r, layer.negative_slope)
        torch.testing.assert_close(layer(x, r), right)

    for _ in range(3):
        check()
    layer.negative_slope = 0.5
    check()
    check(residual=torch.randn(2, 7, 6, 6, device=device).permute(0, 3, 1, 2))
    check(x=x.to(memory_format=torch.channels_last))
    with torch.no_grad():
        layer.weight.mul_(2)
        plain.weight.mul_(2)
    check()
    layer.stride = (2, 2)
    check(residual=torch.ones(2, 6, 4, 3, device=device), stride=2)
    with pytest.raises(ValueError, match="residual must have shape"):
        layer(x, residual)


def test_a_graph_does_not_hold_the_residual(device):
    import weakref

    x, w, b = (t.requires_grad_() for t in oracle.tensors(PLAIN, torch.float32, device))
    residual = torch.randn(2, 6, 7, 6, device=device)
    alive = weakref.ref(residual)
    y = TF.conv2d(x, w, b, padding=1, activation="silu", residual=residual)
    del residual
    assert alive() is None
    y.sum().backward()
