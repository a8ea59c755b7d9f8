"""Boxes from tensor descriptors: every case that they can take, forced, against fp64; and what they refuse."""

import dataclasses
import math

import pytest
import torch

import tconv
from tconv import functional as TF
from tconv.launching.dry_run import dry_run
from tconv.launching.launch import collecting
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.planning.cost import pixel_extents
from tconv.planning.device import DEVICES, INTERPRETER
from tconv.planning.families import FAMILIES
from tconv.planning.gemm import STEPS_OF_32
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import Tile
from tconv.planning.tma import box_of, run_of
from tests import cases, oracle

H200, A100 = DEVICES["H200"], DEVICES["A100"]


def widened(case):
    """The case with more channels in as many groups: strides in multiples of 16 bytes, groups in whole boxes."""
    times = 64 if case.groups > 1 and oracle.compiled() else 16
    return dataclasses.replace(case, x=(case.x[0], times * case.x[1], *case.x[2:]), k=times * case.k)


# Channels of which steps of 64 leave half a step empty.
HALVES = [
    oracle.Case("halves, 1-D", (2, 160, 37), 32, (5,), padding=2),
    oracle.Case("halves, 2-D, in two groups", (2, 192, 9, 7), 64, (3, 3), padding=1, dilation=2, groups=2),
    oracle.Case("halves, 3-D, a strided dgrad", (1, 96, 3, 5, 4), 96, (3, 1, 2), stride=(1, 2, 1), padding=1),
]


def strided(case):
    """Whether the passes that walk x with a stride, fprop and wgrad, are not for boxes."""
    return any(s > 1 for s in ((case.stride,) if isinstance(case.stride, int) else case.stride))


def check(case, x, w, b, **forced):
    """Both passes of a case by boxes, but only its dgrad where it has a stride."""
    ours = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    boxes = {"kernel": "tma", **forced}
    forward, backward = ({}, boxes) if not case.transposed else (boxes, {})
    if not strided(case):
        forward = backward = boxes

    def function(*args, **kwargs):
        with tconv.force(**forward):
            return ours(*args, **kwargs)

    with tconv.force(**backward), tconv.recording() as calls:
        oracle.check(function, case, x, w, b)
    kernels = {c.operation: c.plan.kernel for c in calls if c.ours}
    assert kernels["dgrad"] == "tma"
    assert strided(case) or kernels["fprop"] == "tma"
    return calls


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_every_case(case, device, poisoned):
    wide = widened(case)
    check(wide, *oracle.tensors(wide, torch.float16, device, channels_last=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_every_dtype(case, dtype, device, poisoned):
    if oracle.compiled() and dtype != torch.bfloat16:
        pytest.skip("the tensor cores behind boxes know neither true fp32 nor fp64")
    wide = widened(case)
    check(wide, *oracle.tensors(wide, dtype, device, channels_last=True))


@pytest.mark.parametrize("tile", STEPS_OF_32, ids=str)
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_steps_of_half_as_many_channels(case, tile, device, poisoned):
    """Boxes of 32 channels, which divide 96 channels per group and 160 without groups."""
    calls = check(case, *oracle.tensors(case, torch.bfloat16, device, channels_last=True), tile=tile)
    assert tile in {c.plan.tile for c in calls if c.operation == "dgrad"}


def check_wgrad(case, x, w, b, **forced):
    ours = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    with tconv.force(kernel="tma_wgrad", **forced), tconv.recording() as calls:
        oracle.check(ours, case, x, w, b)
    plans = [c.plan for c in calls if c.operation == "wgrad"]
    assert [plan.kernel for plan in plans] == ["tma_wgrad"]
    return plans[0]


@pytest.mark.parametrize("case", [c for c in cases.ALL if not strided(c) and "large kernel" not in c.reason], ids=str)
def test_every_weight_gradient_of_unit_stride(case, device, poisoned):
    wide = widened(case)
    check_wgrad(wide, *oracle.tensors(wide, torch.bfloat16, device, channels_last=True))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_weight_gradients_have_tails_and_splits(splits, channels_last, device, poisoned):
    """Channels past the last, dilated taps, runs along each axis, of images with a last one that is longer than they are."""
    if oracle.compiled():
        pytest.skip("hardware wants larger tiles")
    for shape in ((7, 24, 6, 10), (1, 24, 16, 3), (2, 24, 3, 16)):
        case = oracle.Case("2-D", shape, 40, (2, 3), padding=(1, 1), dilation=(2, 1))
        x, w, b = oracle.tensors(case, torch.float64, device, channels_last)
        plan = check_wgrad(case, x, w, b, tile=Tile(16, 16, 16), splits=splits)
        assert plan.splits == splits
        assert ("x" in plan.staged) is not channels_last


SPARED = [  # each pixel of x in a channel of its own
    oracle.Case("padded as the extents need: runs overhang either end", (1, 40, 7, 5), 64, (3, 3), padding=1),
    oracle.Case("two taps without padding: one overhangs the end, one the start", (2, 56, 8, 7), 64, (2, 2)),
    oracle.Case("three taps without padding: runs divide the extents", (3, 72, 8, 9), 64, (3, 3)),
    oracle.Case("one dimension that runs pass, one that they do not", (1, 56, 5, 11), 64, (3, 3), padding=(1, 0)),
    oracle.Case("dilated", (1, 72, 9, 8), 64, (3, 3), padding=2, dilation=2),
    oracle.Case("1-D", (2, 24, 19), 64, (5,), padding=2),
    oracle.Case("3-D", (1, 48, 3, 3, 5), 64, (3, 1, 3), padding=(1, 0, 1)),
]


def check_spared(case, value, kernel, device):
    """The weight gradient of a case of SPARED, with this value at the pixels."""
    x, w, b = oracle.tensors(case, torch.float16, device, channels_last=True)
    channels, pixels = case.x[1], x[0, 0].numel()
    for image in x.unbind():
        flat = image.reshape(channels, -1)
        flat[range(pixels), range(pixels)] = value
        image.copy_(flat.reshape(image.shape))
    ours, theirs = getattr(TF, f"conv{case.rank}d"), oracle.FORWARD[case.rank]
    dy = torch.ones_like(ours(x, w, None, **case.arguments))
    with tconv.force(kernel=kernel), tconv.recording() as calls:
        dw = oracle.run(ours, case, x, w, b, dy=dy, only=("y", "dw"))[1]
    assert [("swap" in c.plan.reason, c.plan.kernel) for c in calls if c.operation == "wgrad"] == [(False, kernel)]
    right = oracle.run(theirs, case, x.double(), w.double(), b.double(), dy=dy.double(), only=("y", "dw"))[1]
    torch.testing.assert_close(dw.double(), right, rtol=2**-9, atol=2**-9, equal_nan=True)
    assert not right.isfinite().all()
    assert right[:, :pixels].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("case", SPARED, ids=str)
def test_what_no_window_reads_spoils_no_weight_gradient(case, value, device, poisoned):
    """What runs have beyond dy is zero, but a tap might read x there: infinity times zero would be NaN."""
    check_spared(case, value, "tma_wgrad", device)


@pytest.mark.parametrize(
    ("n", "y", "kernel", "padding", "block", "axis", "runs"),
    [
        (32, (1, 56, 56), 3, 0, 32, "n", 56 * 56),
        (40, (1, 7, 7), 3, 0, 32, "n", 2 * 49),
        (2, (1, 128, 96), 3, 0, 64, 1, 2 * 2 * 96),
        (2, (1, 128, 192), 3, 0, 64, 2, 2 * 128 * 3),
        (1, (1, 1, 30), 3, 0, 64, "n", 30),
        (1, (1, 1, 30), 3, 1, 64, 2, 1),
        (1, (1, 1, 30), 2, 0, 64, 2, 1),
        (2, (1, 60, 28), 3, 1, 64, 1, 2 * 28),
        (2, (1, 60, 28), 3, 1, 32, 1, 2 * 2 * 28),
        (1, (9, 24, 30), 3, 2, 32, 2, 9 * 24),
    ],
)
def test_runs_of_a_weight_gradient_overhang_only_where_x_ends(n, y, kernel, padding, block, axis, runs):
    x, t = [e if e == 1 else e - 2 * padding + kernel - 1 for e in y], [1 if e == 1 else kernel for e in y]
    pads = [(0, 0) if e == 1 else (padding, padding) for e in y]
    p = forward_problem((n, 64, *x), (64, 64, *t), (1, 1, 1), pads, (1, 1, 1), 1)
    assert y == p.Y
    assert run_of(p, block) == (axis, runs)


def test_steps_of_32_pixels_are_for_what_64_do_not_divide():
    for images, extent, padding, wanted in ((32, 14, 1, {32, 64}), (64, 14, 1, {64}), (2, 64, 0, {64}), (2, 28, 1, {32, 64})):
        extents, pads = (extent + 2 - 2 * padding,) * 2, ((padding, padding),) * 2
        p = forward_problem((images, 64, *extents), (64, 64, 3, 3), (1, 1), pads, (1, 1), 1)
        dy, x, dw = (shaped(p.shape(name), True, torch.bfloat16) for name in "yxw")
        with tconv.force(kernel="tma_wgrad"):
            tiles = prepare_wgrad(p, dy, x, dw, H200).call.plan.tiles
        assert {tile.k for tile in tiles} == wanted, (images, extent)


@pytest.mark.parametrize("case", [c for c in cases.FEW if c.rank < 3 and "depthwise" not in c.reason], ids=str)
def test_default_layout_is_copied(case, device, poisoned):
    """Operands copied to channels last first, the result written where it belongs."""
    wide = widened(case)
    calls = check(wide, *oracle.tensors(wide, torch.bfloat16, device))
    assert all(c.plan.staged for c in calls if c.ours and c.plan.kernel == "tma")


TAILS = [
    oracle.Case("1-D", (3, 40, 19), 24, (3,), padding=1),
    oracle.Case("2-D", (3, 24, 5, 3), 40, (2, 2), padding=1),
    oracle.Case("3-D", (1, 24, 2, 3, 5), 24, (2, 1, 2), padding=1, dilation=2),
    oracle.Case("strided", (2, 24, 7, 5), 40, (3, 2), stride=2, padding=1),
    oracle.Case("transposed", (2, 24, 3, 4), 40, (3, 3), stride=(2, 3), padding=1, transposed=True),
    oracle.Case("groups", (2, 32, 5, 4), 64, (3, 3), padding=1, groups=2),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", TAILS, ids=str)
def test_tails_in_every_extent(case, dtype, device, poisoned):
    """The least box a dot allows: several blocks of channels, and partial last ones in images, pixels and channels."""
    if oracle.compiled():
        pytest.skip("hardware wants larger tiles")
    check(case, *oracle.tensors(case, dtype, device, channels_last=True), tile=Tile(16, 16, 16))


def test_the_same_bits_every_time(device, poisoned):
    case = widened(oracle.Case("2-D", (2, 2, 7, 5), 2, (3, 3), padding=1))
    x, w, b = oracle.tensors(case, torch.float16, device, channels_last=True)
    with tconv.force(kernel="tma"):
        first, second = (TF.conv2d(x, w, b, padding=1) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinity_meets_the_halo_but_no_tail(device, poisoned):
    """Padding takes part in the arithmetic as in torch; channels past the last one, and the next tap's, do not."""
    x = oracle.to_channels_last(torch.ones(1, 24, 4, 4, device=device, dtype=torch.float32))
    w = oracle.to_channels_last(torch.ones(16, 24, 3, 3, device=device, dtype=torch.float32))
    w[0, 0, 0, 0] = float("inf")
    right = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    if oracle.compiled():
        x, w = x.half(), w.half()
    with tconv.force(kernel="tma"):
        got = TF.conv2d(x, w, padding=1)
    torch.testing.assert_close(got.double(), right, equal_nan=True)


REFUSED = {
    "a strided fprop": (oracle.Case("", (1, 16, 6, 6), 16, (3, 3), stride=2), "unit stride"),
    "channels that are no multiple of 16 bytes": (oracle.Case("", (1, 12, 6, 6), 16, (3, 3)), "multiples of 16 bytes"),
    "a group that a box would reach beyond": (oracle.Case("", (1, 48, 6, 6), 16, (3, 3), groups=2), "next group"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_are_errors(reason, device):
    case, message = REFUSED[reason]
    x, w, b = oracle.tensors(case, torch.float16, device, channels_last=True)
    with tconv.force(kernel="tma"), pytest.raises(ValueError, match=message):
        TF.conv2d(x, w, b, **case.arguments)


@pytest.mark.parametrize(("c", "k", "groups"), [(16, 16, 16), (24, 16, 2), (16, 24, 2)], ids=["depthwise", "12 in", "12 out"])
def test_a_wgrad_whose_groups_begin_between_16_bytes_is_refused(c, k, groups, device):
    """An H200 met an illegal instruction while the plans of a depthwise wgrad were swept, these among them."""
    x, w = torch.randn(2, c, 6, 6, device=device).half(), torch.randn(k, c // groups, 3, 3, device=device).half()
    x, w = oracle.to_channels_last(x), oracle.to_channels_last(w).requires_grad_()
    y = TF.conv2d(x, w, groups=groups)
    with tconv.force(kernel="tma_wgrad"), pytest.raises(ValueError, match="begin at multiples of 16 bytes"):
        torch.autograd.grad(y, w, torch.ones_like(y))


def test_a_misaligned_address_and_refused_copies_are_errors(device):
    base = torch.randn(16 * 36 + 1, device=device).half()[1:]
    x, w = base.view(1, 6, 6, 16).permute(0, 3, 1, 2), torch.randn(16, 16, 3, 3, device=device).half()
    with tconv.force(kernel="tma"), pytest.raises(ValueError, match="multiples of 16 bytes"):
        TF.conv2d(x, w)
    with tconv.force(kernel="tma", staged=False), pytest.raises(ValueError, match="contiguous channels"):
        TF.conv2d(x.contiguous(), w)


WRITTEN = {
    "channels last": (oracle.Case("", (2, 16, 5, 6), 24, (3, 3), padding=1), True, True),
    "the default layout": (oracle.Case("", (2, 16, 5, 6), 24, (3, 3), padding=1), False, False),
    "phases": (oracle.Case("", (2, 16, 5, 6), 24, (3, 3), stride=2, transposed=True), True, False),
    "groups of whole tiles": (oracle.Case("", (2, 32, 5, 6), 64, (3, 3), groups=2), True, True),
    "groups of parts of tiles": (oracle.Case("", (2, 32, 5, 6), 48, (3, 3), groups=2), True, False),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_box_is_written_only_where_it_is_all_ours(what, device, poisoned):
    """Two groups would race for the channels of one box, which no result in the interpreter would show."""
    if oracle.compiled():
        pytest.skip("hardware wants larger tiles")
    case, channels_last, boxed = WRITTEN[what]
    x, w, b = oracle.tensors(case, torch.float32, device, channels_last)
    function = getattr(TF, f"conv{'_transpose' if case.transposed else ''}2d")
    with tconv.force(kernel="tma", tile=Tile(16, 16, 16)), torch.no_grad():
        y = function(x, w, b, **case.arguments)
        with dry_run(INTERPRETER), collecting() as launches:
            function(x, w, b, **case.arguments)
    assert [(p.boxes[3] is not None, p.constants["Y_BOX"]) for p in launches if p.boxes] == [(boxed, boxed)]
    right = getattr(torch.nn.functional, function.__name__)(x.double(), w.double(), b.double(), **case.arguments)
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def test_what_no_device_before_hopper_has():
    assert "tensor memory" in FAMILIES["tma"].why_illegal(Tile(128, 128, 64, 8, 4), 2, A100)
    assert FAMILIES["tma"].why_illegal(Tile(128, 128, 64, 8, 4), 2, H200) is None
    assert "64 channels" in FAMILIES["tma"].why_illegal(Tile(128, 32, 64, 4, 4), 2, H200)
    assert "shared memory" in FAMILIES["tma"].why_illegal(Tile(256, 256, 64, 8, 4), 2, H200)


@pytest.mark.parametrize(
    ("extent", "waste"), [(7, 1 - 49 / 64), (14, 1 - 196 / 256), (28, 1 - 784 / 1024), (56, 1 - 3136 / 3136)]
)
def test_boxes_are_shaped_to_the_layer(extent, waste):
    """With images enough a 7x7 layer's box is one pixel high and wide and 128 images deep, and wastes nothing."""
    many = forward_problem((128, 64, extent, extent), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    box, pieces = box_of(many, "fprop", 128)
    assert math.prod(box) == 128
    assert pieces * 128 == math.prod(pixel_extents(many, "fprop"))
    one = dataclasses.replace(many, N=1)
    box, pieces = box_of(one, "fprop", 64)
    assert 1 - extent**2 / (64 * pieces) <= waste + 1e-9


def candidate(problem, device, dtype=torch.bfloat16):
    x, w, y = (torch.empty(problem.shape(n), dtype=dtype, device="meta", memory_format=torch.channels_last) for n in "xwy")
    return prepare_gather("fprop", problem, x, w, None, y, device).call.plan


def test_the_planner_chooses_boxes_where_they_are_faster_and_possible():
    p = forward_problem((32, 256, 14, 14), (256, 256, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    assert candidate(p, H200).kernel == "tma"
    assert candidate(p, A100).kernel == "gather"
    strided = dataclasses.replace(p, S=(1, 2, 2), Y=(1, 7, 7))
    assert candidate(strided, H200).kernel == "gather"
    assert not any(other.mechanism for other in candidate(strided, H200).others)
