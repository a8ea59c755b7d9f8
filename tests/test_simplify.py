"""Rewrites move no product: every x[i]*w[j] added into y[k] is enumerated by its offsets in memory, before and after."""

import collections
import itertools
import math

import pytest
import torch

import tconv
from tconv import functional as TF
from tconv.launching.launch import device_of
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.prepare import prepare_gather
from tconv.planning.device import DEVICES
from tconv.planning.plan import force
from tconv.planning.problem import PASSES, forward_problem
from tconv.planning.simplify import Form, Strides, simplify
from tconv.planning.tiles import Tile
from tests import cases, oracle
from tests.test_cost import CASES, problem


def form(p, layout="contiguous"):
    found = [addressing(shaped(p.shape(which), layout == "channels_last", torch.float32)) for which in "xwy"]
    return Form(p, *(Strides(a.outer, a.channel, a.spatial) for a in found))


def products(f):
    """Offsets (x, w, y) of every product of a problem, counted; where x and y have changed places, by what they were."""
    p, found = f.p, collections.Counter()
    c, k = p.C // p.G, p.K // p.G
    for n, g, ki, ci in itertools.product(range(p.N), range(p.G), range(k), range(c)):
        for j in itertools.product(*map(range, p.Y)):
            for t in itertools.product(*map(range, p.T)):
                i = [j[d] * p.S[d] - p.P[d] + t[d] * p.D[d] for d in range(3)]
                if all(0 <= i[d] < p.X[d] for d in range(3)):
                    x = n * f.x.outer + (g * c + ci) * f.x.channel + sum(map(math.prod, zip(i, f.x.spatial, strict=True)))
                    w = (g * k + ki) * f.w.outer + ci * f.w.channel + sum(map(math.prod, zip(t, f.w.spatial, strict=True)))
                    y = n * f.y.outer + (g * k + ki) * f.y.channel + sum(map(math.prod, zip(j, f.y.spatial, strict=True)))
                    found[(y, w, x) if "swap" in f.rules else (x, w, y)] += 1
    return found


def written(f, pass_):
    """Offsets that a pass writes, counted."""
    p = f.p
    which = {"fprop": (f.y, p.N, p.K, p.Y), "dgrad": (f.x, p.N, p.C, p.X), "wgrad": (f.w, p.K, p.C // p.G, p.T)}[pass_]
    strides, outer, channels, extents = which
    return collections.Counter(
        o * strides.outer + c * strides.channel + sum(map(math.prod, zip(i, strides.spatial, strict=True)))
        for o in range(outer)
        for c in range(channels)
        for i in itertools.product(*map(range, extents))
    )


def conv(x, k, kernel, stride=1, padding=0, dilation=1, groups=1):
    rank = len(x) - 2
    s, p, d = (v if isinstance(v, tuple) else (v,) * rank for v in (stride, padding, dilation))
    return forward_problem(x, (k, x[1] // groups, *kernel), s, [(v, v) for v in p], d, groups)


FEW_FRAMES = conv((2, 6, 3, 4, 5), 2, (3, 1, 1), padding=(1, 0, 0))
FEW = conv((2, 6, 5, 5), 3, (3, 2), padding=1)
FEW_APART = conv((2, 6, 9, 5), 2, (3, 2), dilation=(4, 1))
OVERHANG = forward_problem((2, 3, 5), (4, 3, 2), [2], [(0, 1)], [1], 1)
LONGER = forward_problem((2, 3, 5), (4, 3, 7), [1], [(0, 2)], [1], 1)
# Problem, layout, pass, what must come out: rules, rank, (N, C, X).
TEMPORAL = conv((2, 3, 4, 5, 6), 4, (3, 1, 1), padding=(1, 0, 0))
FRAMES = conv((2, 3, 4, 5, 6), 4, (1, 3, 3), padding=(0, 1, 1))
FRAME = conv((1, 2, 3, 12, 12), 3, (3, 3, 3))
ONE_PADDED = conv((1, 2, 4, 12, 12), 3, (6, 1, 1), padding=(1, 0, 0))
KNOWN = [
    ("1x1 is one product", conv((2, 3, 4, 5), 6, (1, 1)), "channels_last", "fprop", {"merge", "batch"}, (40, 3, 1)),
    ("1x1 in the default layout keeps its batch", conv((2, 3, 4, 5), 6, (1, 1)), "contiguous", "fprop", {"merge"}, (2, 3, 20)),
    ("a patch embedding's taps of a row", conv((2, 3, 8, 8), 4, (4, 4), 4), "channels_last", "fprop", {"fold"}, (2, 12, 16)),
    ("a row of patches", conv((2, 3, 8, 4), 4, (4, 4), 4), "channels_last", "fprop", {"fold", "batch"}, (4, 48, 1)),
    ("a kernel that covers the input", conv((5, 3, 4, 4), 4, (4, 4)), "contiguous", "fprop", {"fold"}, (5, 48, 1)),
    ("a 3-D patch that covers it", conv((5, 3, 2, 4, 4), 4, (2, 4, 4), (2, 4, 4)), "contiguous", "wgrad", {"fold"}, (5, 96, 1)),
    ("patches in the default layout", conv((2, 3, 8, 8), 4, (4, 4), 4), "contiguous", "fprop", {"spread"}, (2, 4, 48)),
    ("frames are images", FRAMES, "channels_last", "dgrad", {"batch"}, (8, 3, 30)),
    ("a temporal kernel is 1-D", TEMPORAL, "contiguous", "dgrad", {"merge"}, (2, 3, 120)),
    ("one frame out", FRAME, "channels_last", "dgrad", {"slice"}, (1, 2, 432)),
    ("one frame out is one frame read", FRAME, "channels_last", "fprop", set(), (1, 2, 432)),
    ("frames that lie beside the channels are channels", FRAME, "contiguous", "dgrad", {"fold"}, (1, 6, 144)),
    ("one frame out, few pixels", conv((1, 2, 3, 4, 4), 3, (3, 3, 3)), "channels_last", "dgrad", set(), (1, 2, 48)),
    ("one frame out, padded", ONE_PADDED, "contiguous", "dgrad", {"slice", "merge"}, (1, 2, 576)),
    ("patches that overhang the end", OVERHANG, "channels_last", "fprop", set(), (2, 3, 5)),
    ("a filter longer than the input", LONGER, "contiguous", "fprop", set(), (2, 3, 5)),
    ("leftover pixels stay unread", conv((1, 3, 9, 9), 4, (4, 4), 4), "channels_last", "fprop", {"fold"}, (1, 12, 18)),
    ("leftover pixels are written by dgrad", conv((1, 3, 9, 9), 4, (4, 4), 4), "channels_last", "dgrad", set(), (1, 3, 81)),
    ("a dense kernel stays", conv((2, 3, 6, 6), 4, (3, 3), padding=1), "channels_last", "fprop", set(), (2, 3, 36)),
    ("few output channels", FEW, "channels_last", "wgrad", {"swap"}, (2, 3, 30)),
    ("few output frames", FEW_FRAMES, "contiguous", "wgrad", {"merge", "swap"}, (2, 2, 60)),
    ("not so few", conv((2, 6, 5, 5), 4, (3, 2), padding=1), "channels_last", "wgrad", set(), (2, 6, 25)),
    ("few output channels of a stride", conv((2, 6, 5, 5), 3, (3, 3), (1, 2)), "channels_last", "wgrad", set(), (2, 6, 25)),
    ("few output channels, x cropped", conv((2, 6, 5, 5), 3, (2, 2), padding=-1), "channels_last", "wgrad", set(), (2, 6, 25)),
    ("few output channels, pixels that no tap meets", FEW_APART, "channels_last", "wgrad", set(), (2, 6, 45)),
    ("few output channels, not by wgrad", FEW, "channels_last", "fprop", set(), (2, 6, 25)),
    ("groups stay apart", conv((2, 4, 8, 8), 4, (4, 4), 4, groups=2), "channels_last", "fprop", set(), (2, 4, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "p", "layout", "pass_", "rules", "extents"), KNOWN, ids=[row[0] for row in KNOWN])
def test_known_rewrites(reason, p, layout, pass_, rules, extents):
    f = simplify(form(p, layout), pass_)
    assert set(f.rules) == rules
    assert (f.p.N, f.p.C, math.prod(f.p.X)) == extents


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_product_moves(layout, pass_):
    seen = collections.Counter()
    small = [problem(c) for c in cases.ALL if not isinstance(c.padding, str) and math.prod(c.x) < 600]
    for p in [row[1] for row in KNOWN] + small:
        before = form(p, layout)
        after = simplify(before, pass_)
        seen.update(set(after.rules))
        if after.rules:
            assert written(after, pass_) == written(before, pass_), p
            assert products(after) == products(before), p
            assert after.p.rank == max(1, sum(x > 1 or t > 1 for x, t in zip(after.p.X, after.p.T, strict=True)))
        else:
            assert after == before
    assert {"merge", "fold"} <= set(seen)
    assert layout == "contiguous" or "batch" in seen
    assert layout == "channels_last" or "spread" in seen
    assert ("swap" in seen) == (pass_ == "wgrad")


def test_random_pointwise_and_tiled_dimensions():
    """Every mixture of dense, pointwise, tiled, covering and cropped dimensions, with every pass and layout."""
    kinds = [(1, 1, 1, 0), (3, 1, 1, 0), (4, 2, 2, 0), (5, 2, 2, 0), (3, 3, 1, 0), (3, 3, 1, 1), (4, 1, 2, 0)]
    for dims in itertools.product(kinds, repeat=3):
        extents, taps, strides, pads = zip(*dims, strict=True)
        p = conv((2, 2, *extents), 2, taps, strides, pads)
        if min(p.Y) < 1 or math.prod(p.Y) * p.taps > 200:
            continue
        for layout in ("contiguous", "channels_last"):
            before = form(p, layout)
            right = None
            for pass_ in PASSES:
                after = simplify(before, pass_)
                if after.rules:
                    right = right or products(before)
                    assert products(after) == right, (p, layout, pass_)
                    assert written(after, pass_) == written(before, pass_), (p, layout, pass_)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_plan_says_what_is_computed_instead(layout):
    p = conv((32, 3, 224, 224), 768, (16, 16), 16)
    x, w, y = (shaped(p.shape(which), layout == "channels_last", torch.float32) for which in "xwy")
    with force(staged=False):
        call = prepare_gather("fprop", p, x, w, None, y, DEVICES["H200"]).call
    said = {"contiguous": "spread to N32 C16 3x224x14 -> K768 1x14x14", "channels_last": "fold to N32 C48 224x14 -> K768 14x14"}
    assert said[layout] in str(call)
    assert str(p) in str(call)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_output_along_a_dimension(transposed, poisoned):
    """Dilated, cropped, and with more phases than coordinates that they write."""
    case = oracle.Case("one frame", (1, 2, 6, 12, 11), 3, (4, 3, 3), padding=(2, 1, 1), dilation=(3, 1, 1))
    if transposed:
        case = oracle.Case(
            "from one frame", (1, 3, 1, 12, 11), 2, (4, 3, 3), padding=(2, 1, 1), dilation=(3, 1, 1), transposed=True
        )
    ours = getattr(TF, "conv_transpose3d" if transposed else "conv3d")
    with tconv.recording() as calls:
        oracle.check(ours, case, *oracle.tensors(case, torch.float64, "cpu"))
    assert ["slice" in call.plan.reason for call in calls if call.operation == "dgrad"] == [True]


FEW_OUTPUTS = [
    oracle.Case("odd extents", (2, 5, 7, 9), 2, (3, 3), padding=1),
    oracle.Case("dilated, without padding", (1, 6, 9, 8), 1, (3, 2), dilation=(2, 3)),
    oracle.Case("padding beyond the kernel", (2, 8, 15), 2, (3,), padding=4),
    oracle.Case("uneven padding", (2, 9, 6, 5), 3, (4, 2), padding="same"),
    oracle.Case("three dimensions", (1, 8, 4, 5, 6), 3, (2, 3, 2), padding=(1, 0, 2)),
    oracle.Case("merged as well", (2, 8, 5, 4, 6), 3, (3, 1, 1), padding=(1, 0, 0)),
    oracle.Case("transposed, of few inputs", (2, 2, 6, 7), 6, (3, 3), padding=1, dilation=(1, 2), transposed=True),
    oracle.Case("accesses of 16 bytes", (2, 32, 8, 8), 16, (3, 3), padding=1),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "forced"),
    [
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"kernel": "packed_wgrad", "tile": Tile(16, 16, 16), "splits": 2}),
        (torch.float32, {"kernel": "wgrad", "staged": True}),
        (torch.float16, {"kernel": "packed_wgrad", "staged": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", FEW_OUTPUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_operands_change_places(case, dtype, forced, channels_last, device, poisoned):
    ours = getattr(TF, f"conv_transpose{case.rank}d" if case.transposed else f"conv{case.rank}d")
    with tconv.recording() as calls, force(**forced):
        oracle.check(ours, case, *oracle.tensors(case, dtype, device, channels_last))
    assert ["swap" in call.plan.reason for call in calls if call.operation == "wgrad"] == [True]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_channel_when_operands_change_places(device):
    """A corner meets one of the taps; the others multiply it by zero."""
    x, w, dy = (torch.randn(shape, device=device) for shape in ((1, 4, 6, 6), (2, 4, 3, 3), (1, 2, 4, 4)))
    x[0, 1, 0, 0] = torch.inf
    w.requires_grad_()
    with tconv.recording() as calls:
        (dw,) = torch.autograd.grad(TF.conv2d(x, w), w, dy)
    assert any("swap" in call.plan.reason for call in calls)
    assert not dw[:, 1].isfinite().any()
    assert dw[:, [0, 2, 3]].isfinite().all()


def test_operands_change_places_in_boxes(device, poisoned):
    case = oracle.Case("few outputs", (2, 32, 8, 16), 16, (3, 3), padding=1)
    x, w, b = oracle.tensors(case, torch.float16, device, channels_last=True)
    if device_of(x).generation < 9:
        pytest.skip("no tensor memory accelerator")
    with tconv.recording() as calls, force(kernel="tma_wgrad"):
        oracle.check(TF.conv2d, case, x, w, b)
    assert [("swap" in c.plan.reason, c.plan.kernel) for c in calls if c.operation == "wgrad"] == [(True, "tma_wgrad")]


def test_channels_that_a_bias_is_added_to_stay():
    p = conv((2, 3, 4, 4), 4, (4, 4))
    for layout in ("contiguous", "channels_last"):
        assert simplify(form(p, layout), "dgrad").p.C == 48
        assert simplify(form(p, layout), "dgrad", channels_stay=True).p.C == 3


def test_every_layer_is_left_with_its_operations():
    from tconv.planning.cost import flops

    for case, pass_, layout in itertools.product(CASES, PASSES, ("contiguous", "channels_last")):
        p = problem(case)
        f = simplify(form(p, layout), pass_)
        pixels = math.prod(p.X) / math.prod(p.Y) if "swap" in f.rules else 1  # whose every tap is counted
        assert flops(f.p) == flops(p) * pixels, case
        assert f.p.rank <= p.rank or "spread" in f.rules
