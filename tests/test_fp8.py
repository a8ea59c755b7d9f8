"""Convolutions in fp8, and the rounding to it, against torch's rounding and the same operands in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import tconv
from tconv import fp8
from tconv.dispatch import fp8 as dispatched
from tconv.dispatch.fp8 import FP8, dgrad_fp8, fprop_fp8, quantize_fp8, quantize_largest_fp8
from tconv.planning.device import DEVICES
from tconv.planning.tiles import Tile
from tests import oracle
from tests.oracle import Case

# All but test_schema, which compares fp8 tensors by an operator that torch does not have for them.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OURS = {
    (transposed, rank): getattr(fp8, f"conv{'_transpose' * transposed}{rank}d") for transposed in (0, 1) for rank in (1, 2, 3)
}
PLAIN = Case("plain", (2, 32, 7, 6), 24, (3, 3), padding=1)
CASES = (
    PLAIN,
    Case("1-D", (2, 48, 19), 16, (5,), padding=2),
    Case("3-D", (1, 16, 4, 5, 6), 16, (3, 3, 3), padding=1),
    Case("stride beyond the kernel", (2, 16, 9, 11), 16, (2, 2), stride=3),
    Case("padding beyond the kernel", (1, 16, 4, 3), 16, (2, 3), padding=(4, 5)),
    Case("dilation shares a factor with the stride", (2, 16, 11, 13), 16, (3, 3), stride=4, dilation=2, padding=3),
    Case("uneven groups", (2, 48, 6, 5), 32, (3, 3), padding=1, groups=2),
    Case("channels that fill no vector", (2, 5, 7, 6), 7, (3, 3), padding=1),
    Case("one channel", (2, 1, 7, 6), 3, (3, 3)),
    Case("a channel for each group", (2, 8, 7, 6), 8, (3, 3), padding=1, groups=8),
    Case("padding by side", (1, 16, 5, 6), 16, (3, 3), padding=((2, 0), (0, 3))),
    Case("transposed", (2, 32, 5, 6), 24, (3, 3), stride=2, padding=1, transposed=True, output_padding=1),
    Case("transposed, patches", (2, 32, 5, 4), 16, (2, 2), stride=2, transposed=True),
    Case("transposed, pixels without taps", (1, 16, 4, 5), 16, (2, 2), stride=3, transposed=True),
    Case("transposed, dilated", (1, 16, 5, 6), 16, (3, 3), stride=2, dilation=3, transposed=True),
    Case("transposed 1-D", (2, 48, 9), 16, (8,), stride=4, padding=2, transposed=True),
    Case("transposed 3-D", (1, 16, 3, 4, 3), 16, (3, 3, 3), stride=(1, 2, 2), padding=1, transposed=True),
    Case("transposed, uneven groups", (2, 48, 6, 5), 32, (3, 3), padding=1, groups=2, transposed=True),
    Case("transposed, channels that fill no vector", (2, 5, 7, 6), 7, (3, 3), stride=2, transposed=True),
    Case("transposed, one channel", (2, 1, 7, 6), 3, (3, 3), transposed=True),
    Case("transposed, padding by side", (1, 16, 5, 6), 16, (3, 3), stride=2, padding=((2, 0), (0, 3)), transposed=True),
)


def operands(case, device, channels_last=True):
    """x and w in fp8, with their scales; a bias. A transposed layer's w has one scale, or one per channel without groups."""
    x, w, b = oracle.tensors(case, torch.float32, device, channels_last)
    if not case.transposed:
        return *fp8.quantize(x), *fp8.quantize(w, dim=0), b
    if channels_last:  # with the first two dimensions swapped
        w = oracle.to_channels_last(w.transpose(0, 1)).transpose(0, 1)
    return *fp8.quantize(x), *(fp8.quantize(w, dim=1) if case.groups == 1 else fp8.quantize(w)), b


def expected(case, x, sx, w, sw, b, activation=None, residual=None, position="before", **_):
    """The result in fp64."""
    channel = (1, -1) if case.transposed else (-1, 1)
    wide = x.double() * sx.double(), w.double() * sw.double().view(*channel, *(1,) * case.rank)
    how = dict(case.arguments)
    sides = []
    if isinstance(how["padding"], tuple) and isinstance(how["padding"][0], tuple):
        sides = [n for pair in reversed(how.pop("padding")) for n in pair]
    if not case.transposed:
        wide = F.pad(wide[0], sides), wide[1]
    function = (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]
    y = function(*wide, None if b is None else b.double(), **how)
    if case.transposed:
        y = F.pad(y, [-n for n in sides])
    if residual is not None and position == "before":
        y = y + residual.double()
    y = {None: lambda v: v, "silu": F.silu, "relu": F.relu}[activation](y)
    return y + residual.double() if residual is not None and position == "after" else y


def assert_rounded(got, right, steps=1):
    """Every element is the right one, rounded to got's dtype; sums of products in fp32 may be off by a part of that."""
    allowed = right.abs() * torch.finfo(got.dtype).eps * (0.5 + 0.1 * steps) + 1e-5 * right.abs().max()
    assert got.shape == right.shape
    assert ((got.double() - right).abs() <= allowed).all()


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, channels_last, device, poisoned):
    x, sx, w, sw, b = operands(case, device, channels_last)
    with tconv.recording() as calls:
        y = OURS[case.transposed, case.rank](x, w, b, **case.arguments, input_scale=sx, weight_scale=sw)
    assert y.dtype == torch.bfloat16
    assert_rounded(y, expected(case, x, sx, w, sw, b))
    assert [c.ours for c in calls] == [True], calls


PLANS = {
    "gather": {"kernel": "gather"},
    "tma": {"kernel": "tma"},
    "split": {"kernel": "gather", "splits": 2},
    "copied": {"kernel": "gather", "staged": True},
}


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", fp8.RESULTS, ids=str)
@pytest.mark.parametrize("position", ["before", "after"])
def test_every_kernel_with_an_epilogue(plan, dtype, position, transposed, device, poisoned):
    """Wide enough for a GPU's tiles: the compiled kernels run with them."""
    case = Case("128 channels", (2, 128, 5, 6), 64, (3, 3), padding=1, transposed=transposed)
    forced = PLANS[plan] | ({"tile": Tile(64, 64, 64, 4, 3)} if plan == "split" else {})
    x, sx, w, sw, b = operands(case, device, plan != "copied")
    residual = torch.randn(2, 64, 5, 6, device=device).to(dtype)
    kept = residual.clone()
    how = {"activation": "silu", "residual": residual, "residual_position": position}
    with tconv.force(**forced), tconv.recording() as calls:
        y = OURS[transposed, 2](x, w, b, padding=1, input_scale=sx, weight_scale=sw, out_dtype=dtype, **how)
    assert_rounded(y, expected(case, x, sx, w, sw, b, "silu", residual, position), 2)
    assert calls[0].ours
    assert calls[0].plan.kernel == PLANS[plan]["kernel"]
    assert calls[0].plan.splits == (2 if plan == "split" else 1)
    copied = ("dy",) if transposed else ("x", "w")  # a transposed layer's w must not be channels last
    assert calls[0].plan.staged == (copied if plan == "copied" else ())
    assert torch.equal(residual, kept)


def test_sums_are_carried_to_fp32(device):
    """A sum of 2^14 products of 1 and one of 2^-9, which 14 bits would lose."""
    x = torch.ones(1, 2**14, 1, device=device)
    x[0, 0] = 2.0**-9
    w = torch.ones(16, 2**14, 1, device=device)
    y = fp8.conv1d(x.to(FP8), w.to(FP8), -torch.full((16,), 2.0**14 - 1, device=device))
    assert torch.equal(y, torch.full((1, 16, 1), 2.0**-9, dtype=torch.bfloat16, device=device))


def test_nan_reaches_what_reads_it_and_nothing_else(device):
    x = torch.randn(1, 16, 6, 6, device=device)
    x[0, 3, 2, 2] = float("nan")
    q = fp8.quantize(x, 0.01)[0]
    assert q.float().isnan().sum() == 1
    w = fp8.quantize(torch.randn(16, 16, 3, 3, device=device))[0]
    y = fp8.conv2d(q, w, padding=1)
    right = torch.zeros(6, 6, dtype=torch.bool, device=device)
    right[1:4, 1:4] = True
    assert torch.equal(y.isnan(), right.expand(1, 16, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs_and_ends_at_448(dtype, device):
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    beyond = torch.tensor([449.0, 470.0, -800.0, -1e4, float("inf"), 1e-9])
    t = torch.cat([every, (every[:126] + every[1:127]) / 2, beyond, torch.randn(1000) * 10]).to(device, dtype)
    with tconv.recording() as calls:
        q, scale = fp8.quantize(t, 1.0)
    assert scale == 1
    assert not calls  # torch would have rounded it instead
    right = t.float().clamp(-448, 448).to(FP8)
    assert torch.equal(q.float().nan_to_num(7e7), right.float().nan_to_num(7e7))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "every other", "empty"])
def test_rounding_keeps_the_memory_format(layout, device):
    t = torch.randn(2, 6, 4, 5, device=device)
    t = {
        "contiguous": lambda: t, "channels_last": lambda: t.to(memory_format=torch.channels_last),
        "expanded": lambda: t[:1].expand(3, -1, -1, -1), "every other": lambda: t[:, ::2], "empty": lambda: t[:0],
    }[layout]()  # fmt: skip
    with tconv.recording() as calls:
        q, scale = fp8.quantize(t)
    assert not calls
    assert q.stride() == torch.empty_like(t, dtype=FP8).stride()
    assert torch.equal(q.float(), (t * scale.reciprocal()).to(FP8).float())


NUMBERS = {
    "infinities": [3.0, -7.0, float("inf"), -float("inf")],
    "NaN": [3.0, -7.0, float("nan")],
    "nothing finite": [float("inf"), float("nan")],
    "zeros": [0.0, -0.0],
    "tiny": [0.0, 2.0**-130, -(2.0**-126)],
    "huge": [0.0, 3e38, -1.0],
}


@pytest.mark.parametrize("by", ["kernel", "torch", "slices"])
@pytest.mark.parametrize("length", [1, 5000, 1 << 21])
@pytest.mark.parametrize("what", NUMBERS)
def test_the_scale_is_that_of_the_largest_finite_number(what, length, by, device, monkeypatch):
    """Infinities become the largest number of fp8, and NaN stays; neither decides the scale. No zero becomes NaN."""
    numbers = torch.tensor(NUMBERS[what])
    t = torch.zeros(length + 16, device=device)
    t[-len(numbers) :] = numbers.to(device)  # where the last program looks
    finite = [abs(n) for n in NUMBERS[what] if abs(n) < float("inf")]
    right = max(max(finite, default=0) / 448, 2.0**-126) if any(finite) else 1 / 448
    if by == "torch":
        monkeypatch.setattr("tconv.launching.launch.device_of", lambda t: DEVICES["A100"])
    with tconv.recording() as calls:
        q, scale = fp8.quantize(t.view(1, -1), dim=0) if by == "slices" else fp8.quantize(t)
    assert len(calls) == (by == "torch")
    torch.testing.assert_close(scale, torch.full_like(scale, right), rtol=2e-7, atol=0)
    wanted = (t.double() / right).clamp(-448, 448).float().to(FP8).float()
    assert torch.equal(q.float().flatten().nan_to_num(7e7), wanted.nan_to_num(7e7))


def test_an_infinity_does_not_spoil_the_rest(device):
    x = torch.randn(1, 16, 6, 6, device=device).bfloat16()
    layer = fp8.Conv2d(torch.nn.Conv2d(16, 8, 3, padding=1, device=device))
    with torch.no_grad():
        right = layer(x)
        x[0, 3, 0, 0] = float("inf")
        y = layer(x)
    assert y.isfinite().all()
    assert torch.equal(y[..., 2:, 2:], right[..., 2:, 2:])


def test_a_tensor_of_zeros_has_a_scale(device):
    q, scale = fp8.quantize(torch.zeros(3, device=device))
    assert scale > 0
    assert not q.float().any()
    assert (fp8.quantize(torch.zeros(3, 2, device=device), dim=0)[1] > 0).all()


def test_unbatched_and_empty(device):
    x, sx, w, sw, b = operands(PLAIN, device)
    how = {"padding": 1, "input_scale": sx, "weight_scale": sw}
    whole = fp8.conv2d(x, w, b, **how)
    assert torch.equal(fp8.conv2d(x[1], w, b, **how, residual=torch.zeros_like(whole[1])), whole[1])
    empty = fp8.conv2d(x[:0], w, b, **how)
    assert (empty.shape, empty.dtype) == ((0, 24, 7, 6), torch.bfloat16)


BAD = {
    "input": ({"input": torch.ones(2, 32, 7, 6)}, "input must be of torch.float8_e4m3fn, got torch.float32"),
    "weight": ({"weight": torch.ones(24, 32, 3, 3)}, "weight must be of torch.float8_e4m3fn, got torch.float32"),
    "out_dtype": ({"out_dtype": torch.float32}, "out_dtype must be one of"),
    "input_scale": ({"input_scale": torch.ones(2)}, "input_scale must have one of the shapes"),
    "weight_scale": ({"weight_scale": torch.ones(5)}, "weight_scale must have one of the shapes"),
    "bias": ({"bias": torch.ones(5)}, r"bias must have shape \(24,\), got \(5,\)"),
    "activation": ({"activation": "swish"}, "activation must be None or one of"),
    "residual": ({"residual": torch.ones(2, 24, 7, 5, dtype=torch.bfloat16)}, "residual must have shape"),
    "dtype of the residual": ({"residual": torch.ones(2, 24, 7, 6)}, "residual must be of torch.bfloat16"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what, device):
    x, _, w, _, b = operands(PLAIN, device)
    wrong, text = BAD[what]
    wrong = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in wrong.items()}
    with tconv.recording() as calls, pytest.raises(ValueError, match=text):
        fp8.conv2d(**{"input": x, "weight": w, "bias": b, "padding": 1} | wrong)
    assert not calls


def test_torchs_own_errors(device):
    x, _, w, _, b = operands(PLAIN, device)
    for wrong in ({"groups": 3}, {"stride": 0}, {"padding": (1, 2, 3)}):
        with pytest.raises(Exception) as e:  # noqa: PT011 - whatever torch raises
            F.conv2d(x.float(), w.float(), None, **wrong)
        with pytest.raises(type(e.value)) as ours:
            fp8.conv2d(x, w, b, **wrong)
        assert str(ours.value) == str(e.value)


def test_gradients_are_refused(device):
    x, _, w, _, _ = operands(PLAIN, device)
    residual = torch.zeros(2, 24, 5, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="fp8 convolutions are for inference"):
        fp8.conv2d(x, w, residual=residual)
    with torch.no_grad():
        assert not fp8.conv2d(x, w, residual=residual).requires_grad


def test_where_no_kernel_runs_torch_computes_it_and_the_reason_is_told(device):
    x, sx, w, sw, b = (t.to(device) for t in operands(PLAIN, device))
    how = {"padding": 1, "input_scale": sx, "weight_scale": sw, "activation": "silu"}
    y = fp8.conv2d(x, w, b, **how)
    with pytest.MonkeyPatch.context() as patch, tconv.recording() as calls:
        patch.setattr("tconv.launching.launch.device_of", lambda t: DEVICES["A100"])
        z = fp8.conv2d(x, w, b, **how)
        assert torch.equal(fp8.quantize(b, 0.5)[0].float(), (b * 2).to(FP8).float())
    assert [c.reason for c in calls] == ["A100 has no tensor cores for fp8", "the device converts no fp8"]
    assert z.stride() == y.stride()
    assert (z.double() - y.double()).abs().max() <= 0.01 * y.abs().max()


def test_the_operators_pass_torchs_checks(device):
    x, sx, w, sw, b = operands(PLAIN, device)
    scale, residual = (sx * sw).contiguous(), torch.randn(2, 24, 7, 6, device=device).bfloat16()
    window = [1, 1], [1, 1], [1, 1], [1, 1], 1
    torch.library.opcheck(
        fprop_fp8, (x, w, scale, b, residual, torch.bfloat16, *window, "silu", 0.0, "before"), test_utils=CHECKS
    )
    torch.library.opcheck(fprop_fp8, (x, w, scale, None, None, torch.float16, *window, "", 0.0, "before"), test_utils=CHECKS)
    for transposed in (w.transpose(0, 1).contiguous(), w.transpose(0, 1)):
        there = x, transposed, scale, b, residual, torch.bfloat16, *window, "silu", 0.0, "before"
        torch.library.opcheck(dgrad_fp8, there, test_utils=CHECKS)
    torch.library.opcheck(
        quantize_fp8, (torch.randn(4, 6, device=device), torch.tensor(0.1, device=device)), test_utils=CHECKS[:2]
    )
    torch.library.opcheck(quantize_largest_fp8, (torch.randn(4, 6, device=device),), test_utils=CHECKS[:2])


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "of each input"])
def test_a_compiled_model_has_one_operator_per_layer_and_no_break(fixed, device):
    layer = fp8.Conv2d(torch.nn.Conv2d(16, 8, 3, padding=1, device=device), input_scale=0.02 if fixed else None)
    x = torch.randn(2, 16, 5, 6, device=device, dtype=torch.bfloat16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        got = torch.compile(layer, backend=backend, fullgraph=True)(x)
        assert torch.equal(got, layer(x))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if "tconv" in str(node.target)]
    assert names == [f"tconv.quantize{'' if fixed else '_largest'}_fp8.default", "tconv.fprop_fp8.default"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_layers(name, groups, device):
    """The error of rounding both operands to four digits: 2^-4 at most for each product, 0.04 of the result's root mean
    square as random errors add up over all channels. With another channel's scale most of a weight would be zeros, or 448.
    """
    kind, rank = getattr(fp8, name), int(name[-2])
    torchs = getattr(torch.nn, name)(32, 16, 3, padding=1, stride=2, groups=groups, device=device).bfloat16()
    channel = torch.arange(16, device=device).view(*((groups, 1, -1) if "Transpose" in name else (-1, 1)))
    weight = torchs.weight.data.unflatten(0, (groups, -1)) if "Transpose" in name else torchs.weight.data
    weight *= 4.0 ** (channel.view(*channel.shape, *(1,) * rank) % 8)
    layer = kind(torchs)
    x = torch.randn(2, 32, *(6, 5, 4)[:rank], device=device).bfloat16()
    with torch.no_grad(), tconv.recording() as calls:
        y, right = layer(x), copy.deepcopy(torchs).double()(x.double())
    assert y.dtype == torch.bfloat16
    assert [c.ours for c in calls][:1] == [True]
    for k in range(16):
        assert (y[:, k].double() - right[:, k]).square().mean().sqrt() <= 0.12 * right[:, k].square().mean().sqrt(), k
    twin = kind(torchs)
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(twin)(x), y)
    assert f"32, 16, kernel_size={(3,) * rank}, stride={(2,) * rank}, scale of each input" in repr(layer)


def test_the_size_of_a_transposed_layers_result_may_be_asked_for(device):
    torchs = torch.nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, device=device).bfloat16()
    layer, x = fp8.ConvTranspose2d(torchs, 0.02), torch.randn(1, 16, 4, 5, device=device).bfloat16()
    with torch.no_grad():
        for size in ((7, 9), (8, 10), torch.Size((1, 8, 8, 9))):
            assert layer(x, size).shape == torchs(x, size).shape
        assert torch.equal(layer(x), layer(x, (7, 9)))
        with pytest.raises(ValueError, match="requested an output size"):
            layer(x, (9, 9))


def test_a_transposed_layers_weight_is_not_copied(device):
    layer = fp8.ConvTranspose2d(torch.nn.ConvTranspose2d(32, 16, 2, stride=2, device=device).bfloat16(), 0.02)
    assert layer.weight.transpose(0, 1).is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 4, 5, device=device).bfloat16()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tconv.dispatch.fp8.reduced_last", lambda w: w)
        y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        patch.undo()
        assert torch.equal(layer(x), y)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.body = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 16, 1))
        self.border = torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
        self.up = torch.nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.never = torch.nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.up(self.border(self.body(self.stem(x))))


def test_convert(device):
    model = Net().to(device).bfloat16().eval()
    x = torch.randn(2, 3, 8, 7, device=device).bfloat16()
    with torch.no_grad():
        right = model(x)
        into = model.body[2].weight.clone()
        done = fp8.convert_(model, x)
        got = model(x)
    assert {type(m) for m in model.body} == {fp8.Conv2d, torch.nn.ReLU}
    assert type(model.up) is fp8.ConvTranspose2d
    assert set(done.scales) == {"body.0", "body.2", "up"}
    assert done.kept == {
        "stem": "3 input channels per group, fewer than 16", "border": "padding_mode 'circular'",
        "never": "the example did not reach it",
    }  # fmt: skip
    assert "body.0: fp8, input scale" in str(done)
    assert "border: as it was, padding_mode 'circular'" in str(done)
    last = model.body[2]
    back = last.weight.float() * (last.scale / last.input_scale).view(-1, 1, 1, 1)
    assert (back - into.float()).abs().max() < 0.02
    assert (got.double() - right.double()).square().mean() <= 0.05**2 * right.double().square().mean()
    with pytest.raises(ValueError, match=r"skip names no module of the model: .*nothing"):
        fp8.convert_(model, skip=("nothing",))
    free = Net().to(device).bfloat16().eval()
    assert fp8.convert_(free, skip=("body.0",)).scales == {"body.2": None, "up": None, "never": None}
    assert free.body[2].input_scale is None
    with torch.no_grad():
        assert free(x).isfinite().all()


def test_a_conversion_can_be_undone_if_the_layers_were_kept(device):
    model = Net().to(device).bfloat16().eval()
    x = torch.randn(2, 3, 8, 7, device=device).bfloat16()
    before = dict(model.named_modules())
    with torch.no_grad():
        right = model(x)
    done = fp8.convert_(model, x, keep=True)
    assert set(done.replaced) == set(done.scales) == {"body.0", "body.2", "up"}
    assert done.undo_(model) is model
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in before.items()}
    with torch.no_grad():
        assert torch.equal(model(x), right)
    done = fp8.convert_(model, x)
    kind = type(model.up)
    with pytest.raises(RuntimeError, match=r"keep=True\) keeps them"):
        done.undo_(model)
    assert type(model.up) is kind is fp8.ConvTranspose2d


def test_a_layer_in_two_places_is_converted_in_both(device):
    layer = torch.nn.Conv1d(16, 16, 3, padding=1)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).to(device).bfloat16()
    done = fp8.convert_(model, torch.randn(1, 16, 5, device=device, dtype=torch.bfloat16))
    assert set(done.scales) == {"0", "2"}
    assert isinstance(model[0], fp8.Conv1d)
    assert model[0] is model[2]


REPEATED = {  # what differs from the calls before -> the arguments that do
    "nothing": {},
    "the input's scale": {"input_scale": 0.5},
    "the weight's scale": {"weight_scale": 0.25},
    "a bias": {"bias": None},
    "stride": {"stride": 2},
    "padding": {"padding": 0},
    "an activation": {"activation": "silu"},
    "a residual": {"residual": "before"},
    "the residual's layout": {"residual": "contiguous"},
    "dtype": {"out_dtype": torch.float16},
}


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("what", REPEATED)
def test_a_repeated_call_is_not_examined_again_unless_it_differs(what, transposed, device):
    case = Case("repeated", (2, 32, 7, 6), 16, (3, 3), padding=1, transposed=transposed)
    x, sx, w, sw, b = operands(case, device)
    how = {"bias": b, "stride": 1, "padding": 1, "input_scale": sx, "weight_scale": sw}
    different = dict(REPEATED[what])
    if "residual" in different:
        form = torch.contiguous_format if different["residual"] == "contiguous" else torch.channels_last
        different["residual"] = torch.randn(2, 16, 7, 6, device=device).bfloat16().to(memory_format=form)
    if what == "the residual's layout":
        how["residual"] = different["residual"].contiguous(memory_format=torch.channels_last)
    conv = OURS[transposed, 2]
    for _ in range(3):
        right = conv(x, w, **how)
    with pytest.MonkeyPatch.context() as patch, tconv.recording() as calls:
        patch.setattr(fp8, "accepted", None)  # whoever examines the call fails
        for t in (x, x.clone()):
            assert torch.equal(conv(t, w, **how), right)
        if not different:
            return
        if what not in ("the input's scale", "the weight's scale"):
            with pytest.raises(TypeError):
                conv(x, w, **how | different)
    assert [c.ours for c in calls] == [True] * 2
    y = conv(x, w, **how | different)
    right = conv(x.clone(), w.clone(), **how | different)  # another weight, so no repeated call
    assert torch.equal(y, right)
    assert y.stride() == right.stride()


def test_what_a_repeated_call_must_not_do(device):
    """Nothing that keeps kernels away, or refuses the call, is passed over because an earlier call was accepted."""
    layer = fp8.Conv2d(torch.nn.Conv2d(16, 16, 3, padding=1, device=device), 0.02)
    x = torch.randn(2, 16, 5, 6, device=device).bfloat16()
    for _ in range(3):
        right = layer(x)
    with pytest.raises(RuntimeError, match="fp8 convolutions are for inference"):
        layer(x.clone().requires_grad_())
    with tconv.force(kernel="tma"), tconv.recording() as calls:
        layer(x)
    assert calls[0].plan.kernel == "tma"
    with tconv.batch_invariant(), tconv.recording() as calls:
        layer(x)
    assert "batch-invariant" in calls[0].reason
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer(x)).__name__ == "FakeTensor"
    layer.scale *= 2
    bias = layer.bias.view(1, -1, 1, 1)
    assert (layer(x) - bias - 2 * (right - bias)).abs().max() <= 0.02 * right.abs().max()
    layer.padding = 0
    assert layer(x).shape == (2, 16, 3, 4)


def test_a_layers_input_in_fp32(device):
    layer, x = fp8.Conv1d(torch.nn.Conv1d(16, 16, 3)).to(device), torch.randn(1, 16, 5, device=device)
    with torch.no_grad():
        with torch.autocast(device, torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, layer(x.bfloat16()))
        with pytest.raises(ValueError, match=r"input must be of .*, got torch.float32"):
            layer(x)
    with pytest.raises(ValueError, match=r"scale must be .*, got shape \(3,\)"):
        fp8.quantize(x, torch.ones(3, device=device))


def test_an_images_bits_do_not_depend_on_the_batch(device):
    case = Case("a batch", (5, 32, 7, 6), 32, (3, 3), padding=1)
    x, sx, w, sw, b = operands(case, device)
    with tconv.batch_invariant():
        whole = fp8.conv2d(x, w, b, padding=1, input_scale=sx, weight_scale=sw)
        for i in range(5):
            alone = fp8.conv2d(x[i : i + 1], w, b, padding=1, input_scale=sx, weight_scale=sw)
            assert torch.equal(alone, whole[i : i + 1])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_combination(data, device):
    rank = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from((1, 1, 2, 3)))
    c, k = (groups * data.draw(st.integers(1, 20)) for _ in range(2))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    stride, dilation, padding = (tuple(data.draw(st.integers(low, 2)) for _ in range(rank)) for low in (1, 1, 0))
    spatial = [d * (t - 1) + 1 + data.draw(st.integers(0, 4)) for d, t in zip(dilation, kernel, strict=True)]
    transposed = data.draw(st.booleans())
    case = Case("drawn", (data.draw(st.integers(1, 3)), c, *spatial), k, kernel, stride, padding, dilation, groups, transposed)
    assume(
        not transposed
        or min(
            (e - 1) * s + d * (t - 1) + 1 - 2 * p
            for e, s, d, t, p in zip(spatial, stride, dilation, kernel, padding, strict=True)
        )
        > 0
    )
    x, sx, w, sw, b = operands(case, device, data.draw(st.booleans()))
    b = b if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from((None, "relu", "silu")))
    y = OURS[transposed, rank](x, w, b, **case.arguments, input_scale=sx, weight_scale=sw, activation=activation)
    assert_rounded(y, expected(case, x, sx, w, sw, b, activation), 2)


def test_a_trained_network_loses_hardly_anything():
    """By the way of bench/fp8_trained.py, whose table docs/fp8.md has."""
    pytest.importorskip("sklearn")
    from bench import fp8_trained

    subject = fp8_trained.digits(width=16, epochs=4)
    with torch.no_grad():
        layers, scores = fp8_trained.measure(subject, "cpu")
    right, entropy = zip(*((float(n) for n in score.replace(" %", "").split(", ")) for score in scores), strict=True)
    assert layers == "7 of 8"
    assert min(right) >= 95, scores
    assert max(right) - min(right) <= 1, scores
    assert max(entropy) <= 1.1 * entropy[0], scores
    assert len(set(entropy)) == 4, "fp8 was not there"


def test_a_transposed_weight_is_laid_out_once_a_call(device, monkeypatch):
    made, lay_out = [], dispatched.reduced_last
    monkeypatch.setattr(dispatched, "reduced_last", lambda w: made.append(w) or lay_out(w))
    x, w = (torch.randn(shape, device=device).to(FP8) for shape in ((1, 16, 4, 4), (16, 16, 3, 3)))
    with torch.no_grad(), tconv.recording() as calls:
        fp8.conv_transpose2d(x, w)
    assert calls[0].ours
    assert len(made) == 1
