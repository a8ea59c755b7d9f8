"""Padding that repeats the input, which the kernels read where it is: as torch.nn.functional.pad and a convolution give it."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tconv
from tconv import functional as TF
from tconv.dispatch import operators
from tconv.dispatch.window import window
from tconv.launching import launch
from tconv.launching.launch import device_of
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.planning import borders
from tconv.planning.cost import LAUNCH
from tconv.planning.device import DEVICES
from tconv.planning.operands import GatherPass
from tconv.planning.problem import ZEROS, Geometry, forward_problem
from tconv.records.key import cell_of
from tests import oracle
from tests.oracle import Case
from tests.test_random import COMMON

MODES = "reflect", "replicate", "circular"
OURS = {1: TF.conv1d, 2: TF.conv2d, 3: TF.conv3d}
ALL, NO_REFLECTION, REPLICATED = MODES, MODES[1:], MODES[1:2]
# A case beside its padding, (before, after) of each dimension, and the modes that this padding may have.
CASES = {
    "1-D": (Case("", (2, 5, 9), 6, (3,)), ((1, 1),), ALL),
    "2-D, sides differ": (Case("", (2, 3, 6, 7), 4, (3, 2)), ((2, 0), (1, 3)), ALL),
    "3-D": (Case("", (1, 4, 3, 4, 5), 3, (2, 3, 3)), ((1, 2), (1, 1), (2, 0)), ALL),
    "one frame": (Case("", (1, 2, 1, 4, 5), 3, (3, 3, 3)), ((2, 0), (1, 1), (1, 1)), REPLICATED),
    "strided and dilated": (Case("", (2, 3, 9, 8), 5, (3, 2), stride=(2, 3), dilation=(3, 2)), ((4, 3), (2, 5)), ALL),
    "a stride longer than the filter": (Case("", (2, 4, 11), 4, (2,), stride=5), ((3, 4),), ALL),
    "the last elements unread": (Case("", (2, 3, 7), 4, (2,), stride=4), ((0, 3),), ALL),
    "all but one element": (Case("", (2, 2, 5, 4), 3, (4, 4)), ((4, 4), (3, 3)), ALL),
    "all elements": (Case("", (1, 2, 3, 2), 3, (4, 3)), ((3, 3), (2, 2)), NO_REFLECTION),
    "more than the filter and the input": (Case("", (2, 2, 2, 3), 3, (2, 2)), ((5, 0), (1, 7)), REPLICATED),
    "one pixel": (Case("", (2, 1, 1, 1), 2, (3, 3)), ((2, 1), (1, 1)), REPLICATED),
    "groups": (Case("", (2, 6, 5, 6), 8, (3, 3), groups=2), ((1, 1), (2, 2)), ALL),
    "depthwise": (Case("", (2, 6, 5, 7), 12, (5, 3), stride=(1, 2), groups=6), ((2, 3), (1, 2)), ALL),
    "a filter that covers the input": (Case("", (2, 3, 4), 5, (7,)), ((0, 3),), ALL),
    "one tap": (Case("", (2, 4, 5, 5), 6, (1, 1)), ((1, 0), (0, 2)), ALL),
    "columns pointwise": (Case("", (2, 4, 5, 3), 6, (3, 1)), ((1, 2), (0, 0)), ALL),
    "more taps than bits": (Case("", (1, 2, 40), 2, (35,)), ((17, 17),), ALL),
}  # fmt: skip
EVERY = "1-D", "2-D, sides differ", "strided and dilated"  # with every mode; the others with one, in turn
ROWS = [(name, mode) for i, (name, (*_, modes)) in enumerate(CASES.items())
        for mode in (modes if name in EVERY else [modes[i % len(modes)]])]  # fmt: skip


def flat(padding):
    """As torch.nn.functional.pad takes it."""
    return [p for pair in reversed(padding) for p in pair]


def by_copy(case, padding, mode, x, w, b=None):
    """The same by torch, of a padded copy."""
    arguments = {k: v for k, v in case.arguments.items() if k != "padding"}
    return oracle.FORWARD[case.rank](F.pad(x, flat(padding), mode=mode), w, b, **arguments)


def ours(case, padding, mode, x, w, b=None):
    return OURS[case.rank](x, w, b, **case.arguments | {"padding": padding, "padding_mode": mode})


def tensors(name, device, dtype=torch.float64, channels_last=False):
    return tuple(t.requires_grad_() for t in oracle.tensors(CASES[name][0], dtype, device, channels_last))


def problem(case, padding, mode):
    stride, dilation = ((v,) * case.rank if isinstance(v, int) else v for v in (case.stride, case.dilation))
    return forward_problem(case.x, case.weight, stride, padding, dilation, case.groups, mode)


def agree(found, right, **tolerance):
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.fixture
def at_once(monkeypatch):
    """Has gradients folded, or computed by slabs."""

    def choose(fold):
        monkeypatch.setattr(borders, "at_once", lambda *_: fold)
        launch.forget()

    yield choose
    launch.forget()


@pytest.fixture
def no_copy(monkeypatch):
    """Fails where anything pads a tensor."""
    monkeypatch.setattr(F, "pad", lambda *_, **__: pytest.fail("a padded copy"))


# Values


@pytest.mark.parametrize("fold", [False, True], ids=["slabs", "folded"])
@pytest.mark.parametrize(("name", "mode"), ROWS, ids=[f"{name}, {mode}" for name, mode in ROWS])
def test_values_and_gradients(name, mode, fold, device, poisoned, monkeypatch, at_once):
    at_once(fold)
    case, padding, _ = CASES[name]
    given = tensors(name, device, channels_last=ROWS.index((name, mode)) % 2 == 0)
    right = by_copy(case, padding, mode, *given)
    dy = torch.randn_like(right)
    rights = torch.autograd.grad(right, given, dy)
    monkeypatch.setattr(F, "pad", lambda *_, **__: pytest.fail("a padded copy"))
    with tconv.recording() as calls:
        y = ours(case, padding, mode, *given)
        grads = torch.autograd.grad(y, given, dy)
    assert all(call.ours for call in calls)
    assert ("folds" in calls[1].reason) == fold
    agree((y, *grads), (right, *rights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["2-D, sides differ", "groups", "3-D", "more taps than bits"])
def test_several_taps_in_one_product(name, device, poisoned):
    case, padding, modes = CASES[name]
    for mode in modes:
        x, w, b = (t.detach() for t in tensors(name, device, channels_last=mode == "circular"))
        with tconv.force(kernel="packed"):
            y = ours(case, padding, mode, x, w, b)
        torch.testing.assert_close(y, by_copy(case, padding, mode, x, w, b), rtol=1e-10, atol=1e-10)


STRIPS = {
    "3x3, odd columns": (Case("", (2, 4, 5, 11), 4, (3, 3), groups=4), ((1, 1), (1, 1))),
    "7x7 in 16 bytes": (Case("", (2, 8, 9, 24), 8, (7, 7), groups=8), ((3, 3), (3, 3))),
    "strided, sides differ": (Case("", (2, 4, 9, 13), 4, (3, 5), stride=2, groups=4), ((0, 2), (3, 1))),
    "dilated": (Case("", (1, 3, 11, 14), 3, (3, 3), stride=(1, 2), dilation=2, groups=3), ((2, 2), (3, 0))),
    "four chunks of taps": (Case("", (1, 3, 18), 3, (31,), groups=3), ((15, 15),)),
    "rows only": (Case("", (1, 4, 8, 16), 4, (5, 1), groups=4), ((2, 2), (0, 0))),
    "columns only": (Case("", (1, 4, 3, 9), 4, (1, 4), groups=4), ((0, 0), (2, 1))),
    "3-D": (Case("", (1, 2, 4, 5, 6), 2, (3, 3, 3), groups=2), ((2, 0), (1, 1), (1, 1))),
    "all columns": (Case("", (2, 2, 3, 4), 2, (3, 9), groups=2), ((1, 1), (3, 3))),
}  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STRIPS)
def test_strips(name, mode, channels_last, device, poisoned):
    case, padding = STRIPS[name]
    dtype = torch.bfloat16 if "16 bytes" in name else torch.float32
    x, w, b = (t.detach() for t in oracle.tensors(case, dtype, device, channels_last))
    w.requires_grad_()
    with tconv.force(kernel="strip"), tconv.recording() as calls:
        y = ours(case, padding, mode, x, w, b)
    dy = torch.randn_like(y)
    with tconv.force(kernel="strip_wgrad"), tconv.recording() as more:
        (dw,) = torch.autograd.grad(y, w, dy)
    assert [c.plan.kernel for c in (*calls, *more)] == ["strip", "strip_wgrad"]
    x, w, b = x.double(), w.detach().double().requires_grad_(), b.double()
    right = by_copy(case, padding, mode, x, w, b)
    close = 2e-2 if dtype == torch.bfloat16 else 1e-4
    agree((y.double(), dw.double()), (right, *torch.autograd.grad(right, w, dy.double())), rtol=close, atol=10 * close)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, channels_last, device, poisoned):
    case, padding, _ = CASES["2-D, sides differ"]
    given = tensors("2-D, sides differ", device, dtype, channels_last)
    wide = [t.detach().double().requires_grad_() for t in given]
    right, y = by_copy(case, padding, "reflect", *wide), ours(case, padding, "reflect", *given)
    dy = torch.randn_like(y)
    rights, grads = torch.autograd.grad(right, wide, dy.double()), torch.autograd.grad(y, given, dy)
    close = 1e-5 if dtype == torch.float32 and not oracle.tf32(dtype) else 2e-2
    agree([t.double() for t in (y, *grads)], (right, *rights), rtol=close, atol=10 * close)


@pytest.mark.parametrize(("name", "mode"), [("2-D, sides differ", "reflect"), ("1-D", "replicate")])
def test_gradients_of_gradients(name, mode, device, poisoned):
    case, padding, _ = CASES[name]
    found = []
    for way in (ours, by_copy):
        torch.manual_seed(0)
        x, w, b = tensors(name, device)
        y = way(case, padding, mode, x, w, b)
        dy = torch.randn_like(y).requires_grad_()
        grads = torch.autograd.grad(y, (x, w), dy, create_graph=True)
        found.append(torch.autograd.grad(sum((g**3).sum() for g in grads), (x, w, dy)))
    agree(*found, rtol=1e-9, atol=1e-9)


@st.composite
def padded(draw):
    rank, mode = draw(st.sampled_from([1, 2, 2, 3])), draw(st.sampled_from(MODES))
    small = st.integers(1, 3)
    kernel, dilation, stride = (tuple(draw(small) for _ in range(rank)) for _ in range(3))
    extents = tuple(draw(st.integers(1, 6 if rank < 3 else 4)) for _ in range(rank))
    most = {"reflect": -1, "circular": 0, "replicate": 3}[mode]
    padding = tuple((draw(st.integers(0, e + most)), draw(st.integers(0, e + most))) for e in extents)
    assume(math.prod(stride) <= 6)  # phases are programs, and the interpreter runs them one by one
    groups, per_group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    k = groups * draw(st.sampled_from([1, 2]))
    for e, (before, after), t, d in zip(extents, padding, kernel, dilation, strict=True):
        assume(e + before + after > d * (t - 1))
    return Case("random", (2, groups * per_group, *extents), k, kernel, stride, 0, dilation, groups), padding, mode


@settings(max_examples=6, **COMMON)
@given(padded(), st.booleans())
def test_random(device, case, channels_last):
    case, padding, mode = case
    given = [t.requires_grad_() for t in oracle.tensors(case, torch.float64, device, channels_last)]
    y, right = ours(case, padding, mode, *given), by_copy(case, padding, mode, *given)
    assert tconv.last_calls()[-1].ours
    dy = torch.randn_like(right)
    found, rights = (torch.autograd.grad(t, given, dy) for t in (y, right))
    agree((y, *found), (right, *rights), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("odd", "mode"), [(math.nan, "reflect"), (math.inf, "replicate"), (math.nan, "circular")])
def test_what_is_not_finite_stays_where_torch_has_it(odd, mode, device):
    case, padding, _ = CASES["2-D, sides differ"]
    x, w, _ = tensors("2-D, sides differ", device)
    x.data[0, 1, 1, 2] = x.data[1, 0, 0, 0] = odd
    y, right = ours(case, padding, mode, x, w), by_copy(case, padding, mode, x, w)
    dy = torch.randn_like(right)
    dy[1, 2, 0, 0] = odd
    (dx,), (expected,) = (torch.autograd.grad(t, x, dy) for t in (y, right))
    for got, wanted in ((y, right), (dx, expected)):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())


# Memory


def allocated(step):
    """Bytes of each tensor that a step allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [n for n in sizes if n > 0]


def test_nothing_of_the_inputs_size_is_allocated_but_its_gradient(device):
    if device != "cpu":
        pytest.skip("the profiler is asked for the CPU's memory")
    x, w = (oracle.to_channels_last(torch.randn(shape)).requires_grad_() for shape in ((1, 8, 40, 48), (4, 8, 3, 3)))
    y = TF.conv2d(x, w, padding=1, padding_mode="reflect")
    assert allocated(lambda: TF.conv2d(x, w, padding=1, padding_mode="reflect")) == [y.nbytes]
    dy = torch.randn_like(y)
    *rest, most = sorted(allocated(lambda: torch.autograd.grad(y, (x, w), dy)))
    around = 42 * 50 - 40 * 48
    assert most == x.nbytes
    assert sum(rest) == w.nbytes + around * 8 * 4


# Where it comes from: layers and functions


LAYERS = {
    "Conv1d": (lambda: tconv.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "Conv2d": (lambda: tconv.Conv2d(4, 6, (3, 4), padding="same", padding_mode="circular"), (2, 4, 6, 5)),
    "Conv3d": (lambda: tconv.Conv3d(2, 3, 3, padding=(1, 0, 2), padding_mode="replicate"), (1, 2, 4, 5, 4)),
    "replaced": (
        lambda: tconv.replace_(torch.nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), padding_mode="reflect")), (4, 7, 6),
    ),
    "FusedConv2d": (lambda: tconv.FusedConv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers_take_this_way_by_themselves(make, shape, device, monkeypatch):
    layer, x = make().to(device), torch.randn(shape, device=device)
    plain = getattr(torch.nn, type(layer).__name__.removeprefix("Fused"))
    right = plain._conv_forward(layer, x, layer.weight, layer.bias)
    monkeypatch.setattr(F, "pad", lambda *_, **__: pytest.fail("a padded copy"))
    for again in (layer, layer, layer, copy.deepcopy(layer)):  # the third call is a repeated one
        torch.testing.assert_close(again(x), right)
        assert tconv.last_calls()[-1].ours


def test_causal_layers(device, no_copy):
    layer, x = (
        tconv.CausalConv3d(4, 6, 3, padding=1, padding_mode="replicate").to(device),
        torch.randn(1, 4, 3, 5, 4, device=device),
    )
    before = torch.cat((x[:, :, :1], x[:, :, :1], x), 2)
    right = TF.conv3d(before, layer.weight, layer.bias, padding=(0, 1, 1), padding_mode="replicate")
    torch.testing.assert_close(layer(x), right)
    assert all(call.ours for call in tconv.last_calls()[-2:])


def test_a_layer_whose_mode_changes(device):
    layer, x = tconv.Conv2d(4, 6, 3, padding=1).to(device), torch.randn(2, 4, 6, 5, device=device)
    for mode in ("zeros", "circular", "zeros"):
        layer.padding_mode = mode
        right = torch.nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)
        for _ in range(3):
            torch.testing.assert_close(layer(x), right)


def test_with_an_epilogue(device, no_copy):
    case, padding, _ = CASES["1-D"]
    x, w, b = tensors("1-D", device)
    y, skip = ours(case, padding, "circular", x, w, b), torch.randn(2, 6, 9, dtype=torch.float64, device=device)
    with tconv.recording() as calls:
        z = TF.conv1d(x, w, b, padding=padding, padding_mode="circular", activation="silu", residual=skip)
        grads = torch.autograd.grad(z.sum(), (x, w))
    assert all(call.ours for call in calls)
    agree((z, *grads), (F.silu(y + skip), *torch.autograd.grad(F.silu(y + skip).sum(), (x, w))))

    def step(x):
        return TF.conv1d(x, w, b, padding=padding, padding_mode="circular", activation="silu", residual=skip)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), z)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_under_torch_compile_and_vmap(mode, device, no_copy):
    x, w = (t.requires_grad_() for t in (torch.randn(2, 4, 9, device=device), torch.randn(6, 4, 3, device=device)))

    def step(x, w):
        return TF.conv1d(x, w, padding=((2, 1),), padding_mode=mode)

    right = step(x, w)
    dy = torch.randn_like(right)
    rights = torch.autograd.grad(right, (x, w), dy)
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    agree((y, *torch.autograd.grad(y, (x, w), dy)), (right, *rights))
    torch.testing.assert_close(torch.vmap(step, (0, None))(x, w), right)
    window = (1,), (2,), (1,), (1,), 1, None, mode
    torch.library.opcheck(torch.ops.tconv.fprop.default, (x, w, None, *window), test_utils="test_schema")


def test_autocast_and_one_image_of_a_batch(device):
    x, w = torch.randn(3, 4, 6, 6, device=device), torch.randn(6, 4, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = TF.conv2d(x, w, padding=1, padding_mode="reflect")
    assert y.dtype == torch.bfloat16
    x.requires_grad_()
    with tconv.batch_invariant():
        both = [TF.conv2d(t, w, padding=1, padding_mode="reflect") for t in (x, x[1:2])]
        all_, one = (torch.autograd.grad(y.sum(), x)[0] for y in both)
    # numpy, by which the interpreter and the simulator multiply, may add in another order in another row of a tile.
    close = 1e-4 if device == "cpu" else 0
    torch.testing.assert_close(both[0][1:2], both[1], rtol=0, atol=close)
    torch.testing.assert_close(all_[1], one[1], rtol=0, atol=close)


# Where torch computes


@pytest.mark.parametrize(("name", "mode"), ROWS[::2], ids=[f"{name}, {mode}" for name, mode in ROWS[::2]])
def test_in_aten(name, mode, device):
    """The operators that stand in for the kernels, and what a call without kernels gives."""
    case, padding, _ = CASES[name]
    x, w, b = tensors(name, device)
    right = by_copy(case, padding, mode, x, w, b)
    dy = torch.randn_like(right)
    dx, dw = torch.autograd.grad(right, (x, w), dy)
    h = window(Geometry(problem(case, padding, mode), False))
    found = [operators.by_torch(*call, None, h, "asked") for call in (("fprop", x, w), ("dgrad", dy, w), ("wgrad", dy, x))]
    agree(found, (right - b.view(-1, *(1,) * case.rank), dx, dw), rtol=1e-10, atol=1e-10)
    complexes = [t.detach().to(torch.complex64) for t in (x, w, b)]  # no kernel has complex numbers
    if mode == "circular" or case.rank < 3:
        torch.testing.assert_close(ours(case, padding, mode, *complexes), by_copy(case, padding, mode, *complexes))
        assert not tconv.last_calls()[-1].ours


BAD = {
    "reflection of as much as the input": ((2, 4, 6, 5), {"padding": (1, 5), "padding_mode": "reflect"}),
    "a circle wound twice": ((2, 4, 6, 5), {"padding": ((0, 7), (0, 0)), "padding_mode": "circular"}),
    "other channels": ((2, 5, 6, 5), {"padding": 1, "padding_mode": "replicate"}),
    "no batch and no channels": ((6, 5), {"padding": 1, "padding_mode": "replicate"}),
    "a filter that does not fit": ((2, 4, 1, 5), {"padding": 0, "padding_mode": "reflect"}),
    "no elements": ((2, 4, 0, 5), {"padding": 1, "padding_mode": "reflect"}),
}


@pytest.mark.parametrize(("shape", "more"), BAD.values(), ids=BAD)
def test_errors_are_torchs(shape, more, device):
    x, w = torch.randn(shape, device=device), torch.randn(6, 4, 3, 3, device=device)
    padding = more["padding"]
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (padding if isinstance(padding, tuple) else (padding,) * 2)]
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - whatever it is
        F.conv2d(F.pad(x, flat(pairs), mode=more["padding_mode"]), w)
    for activation in (None, "relu"):
        with pytest.raises(torchs.type) as found:
            TF.conv2d(x, w, activation=activation, **more)
        assert str(found.value) == str(torchs.value)


@pytest.mark.parametrize("mode", ["mirror", None, ["reflect"]], ids=str)
def test_no_such_mode(mode, device):
    x, w = torch.randn(2, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    for activation in (None, "relu"):
        with pytest.raises(ValueError, match="padding_mode must be one of"):
            TF.conv2d(x, w, padding=1, padding_mode=mode, activation=activation)


def test_an_empty_batch(device):
    x, w = torch.randn(0, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    assert TF.conv2d(x, w, padding=2, padding_mode="reflect").shape == (0, 6, 8, 7)


# Plans


def test_other_kernels_refuse_it(device):
    x, w = torch.randn(2, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    for kernel in ("rows", "tma"):
        with (
            tconv.force(kernel=kernel),
            warnings.catch_warnings(),
            pytest.raises(ValueError, match="reads nothing but zeros beyond the input"),
        ):
            TF.conv2d(x, w, padding=1, padding_mode="reflect")


def test_what_a_problem_remembers():
    p = forward_problem((1, 4, 9, 8, 7), (4, 4, 3, 2, 1), [1, 2, 1], [(1, 1), (0, 1), (0, 0)], [1] * 3, 1, "reflect")
    assert p.borders == ("reflect", "zeros", "zeros")  # nothing beyond the end of the others is read
    plain = borders.within(p)
    assert (plain.borders, hash(p) != hash(plain)) == (ZEROS, True)
    assert "borders reflectxzerosxzeros" in str(p)
    assert "borders" not in str(plain)


def test_a_record_tells_modes_apart(device):
    cells = []
    for mode in ("zeros", *MODES):
        p = forward_problem((2, 4, 6, 5), (6, 4, 3, 3), [1, 1], [(1, 1), (1, 1)], [1, 1], 1, mode)
        given = [addressing(shaped(p.shape(which), False, torch.float32)) for which in "xwy"]
        cells.append(cell_of(GatherPass("fprop", p, *given, True), "float32"))
    assert len({cell.kind for cell in cells}) == 4
    assert cells[0].kind[-2:] == ((1, 1, 1), (1, 1, 1))  # as it was before there were modes


def test_slabs_are_as_large_as_the_padding(device):
    """Each position of the padding is in one slab, whose dgrad reads no output that does not read the slab."""
    for case, padding, _ in CASES.values():
        p = problem(case, padding, "replicate")
        before, after = borders.padding(p)
        found = [slab for pair in borders.slabs(p) for slab in pair if slab]
        around = math.prod(map(sum, zip(p.X, before, after, strict=True))) - math.prod(p.X)
        assert sum(math.prod(slab.p.X) for slab in found) == around
        for slab in found:
            d, q = slab.dimension, slab.p
            reads = [{j * q.S[d] - q.P[d] + t * q.D[d] for t in range(q.T[d])} for j in range(q.Y[d])]
            assert 0 <= slab.first <= slab.first + q.Y[d] <= p.Y[d]
            assert min(reads[0]) < q.X[d]
            assert min(reads[-1]) < q.X[d]


def test_the_padding_is_predicted_and_named(device, at_once):
    """The time of an input's gradient is that of all its launches, and its record names the kernels of the slabs."""
    h200 = DEVICES["H200"]
    p = forward_problem((8, 64, 28, 28), (64, 64, 3, 3), [1, 1], [(1, 1), (2, 0)], [1, 1], 1, "reflect")
    dy, w = (shaped(p.shape(which), True, torch.bfloat16) for which in "yw")
    at_once(False)
    call = launch.convolution(True, Geometry(p, True, device=h200), dy, w, None).borders.call
    found = [slab for pair in borders.slabs(p) for slab in pair if slab]
    assert len(found) == 3
    plans = []
    for q in (borders.within(p), *(slab.p for slab in found)):
        dy, dx = (shaped(q.shape(which), True, torch.bfloat16) for which in "yx")
        plans.append(prepare_gather("dgrad", q, dy, w, None, dx, h200).call.plan)
    shown, slabs = borders.pixels(p), 8 * (30 * 30 - 28 * 28)
    adding = LAUNCH + (2 * shown + slabs) * 64 * 2 / h200.limits.bandwidth
    assert call.plan.cost.seconds == pytest.approx(sum(plan.cost.seconds for plan in plans) + adding)
    assert call.plan.cost.workspace >= slabs * 64 * 2
    for plan in plans:
        assert plan.way in str(call)
    assert f"with the padding {call.plan.cost.seconds * 1e6:.1f} us: 3 more launches, " in call.reason


def test_small_gradients_are_folded_and_large_ones_not():
    """The workspace is then as large as the padded input, of at most 32 MiB, and the time less than that of slabs."""
    h200 = DEVICES["H200"]
    for images, extent, fold in ((8, 28, True), (8, 512, False)):
        p = forward_problem((images, 64, extent, extent), (64, 64, 3, 3), [1, 1], [(1, 1)] * 2, [1, 1], 1, "reflect")
        dy, w = (shaped(p.shape(which), True, torch.bfloat16) for which in "yw")
        g = Geometry(p, True, device=h200)
        made = launch.convolution(True, g, dy, w, None)
        apart = launch._prepare_slabs(g, dy, w).borders
        cost = made.borders.call.plan.cost
        assert (not made.borders.slabs) == fold
        assert (cost.seconds < apart.call.plan.cost.seconds) == fold
        if fold:
            padded = images * (extent + 2) ** 2 * 64 * 2
            assert padded <= cost.workspace <= padded + (32 << 20)
            assert f"of the padded input {cost.seconds * 1e6:.1f} us, which another launch folds" in made.borders.call.reason
        invariant = launch.convolution(True, dataclasses.replace(g, batch_invariant=True), dy, w, None)
        assert invariant.borders.slabs


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_strips_are_chosen(channels_last):
    """Eight columns of one take too many registers, where each is found and has all channels."""
    for taps, stride, columns in ((7, 1, 8), (5, 2, 4 if channels_last else 8)):
        half = taps // 2
        sides = [(half, half)] * 2
        p = forward_problem((64, 128, 56, 56), (128, 1, taps, taps), [stride] * 2, sides, [1, 1], 128, "reflect")
        x, w, y = (shaped(p.shape(which), channels_last, torch.bfloat16) for which in "xwy")
        plan = prepare_gather("fprop", p, x, w, None, y, DEVICES["H200"]).call.plan
        assert (plan.kernel, plan.tile.columns) == ("strip", columns)
        assert prepare_wgrad(p, y, x, w, DEVICES["H200"]).call.plan.kernel == "strip_wgrad"


def test_the_plan_is_told(device):
    x, w = torch.randn(2, 4, 6, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    p = forward_problem(x.shape, w.shape, [1, 1], [(1, 1), (1, 1)], [1, 1], 1, "circular")
    planned = prepare_gather("fprop", p, x, w, None, torch.empty(p.shape("y"), device=device), device_of(x))
    assert planned.constants["BORDER1"] == planned.constants["BORDER2"] == "circular"
    assert planned.constants["FIELD"] == 0  # no mask is needed


def test_without_memory_for_the_workspace_torch_computes_the_gradient(device, monkeypatch):
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, device=device)
    y = tconv.functional.conv2d(x, w, padding=1, padding_mode="reflect")
    dy = torch.randn_like(y)

    def none_left(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.Tensor, "new_empty", none_left)
    with tconv.recording() as calls, pytest.warns(UserWarning, match="falls back to torch for one call"):
        (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    monkeypatch.undo()
    (right,) = torch.autograd.grad(F.conv2d(F.pad(x, (1,) * 4, mode="reflect"), w), x, dy)
    torch.testing.assert_close(got, right)
    assert [c for c in calls if not c.ours]
    with tconv.recording() as calls:  # the next one is ours again
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], right)
    assert all(c.ours for c in calls)
