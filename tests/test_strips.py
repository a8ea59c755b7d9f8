"""Strip kernels: every pass of what they take, forced, against fp64; what they do not take; how strips are counted."""

import itertools

import pytest
import torch

import tconv
from tconv.planning.problem import forward_problem, transposed_problem
from tconv.planning.strip import CHUNK, STRIP_16, STRIP_FLIP, STRIP_WGRAD_16, STRIP_WGRAD_FLIP, window
from tconv.planning.tiles import Tile
from tests import cases, oracle
from tests.test_kernels import ours

Case = oracle.Case
CASES = [
    *(c for c in cases.ALL if 1 < c.groups == c.x[1] == c.k),
    Case("depthwise, a row of taps longer than a chunk, with a rest", (1, 3, 5, 19), 3, (2, 9), padding=(1, 4), groups=3),
    Case("depthwise 1-D, four chunks less one tap", (2, 3, 40), 3, (31,), padding=15, groups=3),
    Case("depthwise, two whole chunks", (1, 2, 37), 2, (16,), padding=3, groups=2),
    Case("depthwise, dilation equals stride", (1, 3, 23), 3, (3,), stride=2, padding=2, dilation=2, groups=3),
    Case("depthwise, taps apart in the last dimension", (1, 3, 6, 21), 3, (3, 3), padding=4, dilation=(1, 4), groups=3),
    Case("depthwise, kernel equals stride", (1, 4, 4, 24), 4, (4, 4), stride=4, groups=4),
    Case("depthwise, padding beyond the kernel", (1, 4, 4, 8), 4, (3, 3), stride=2, padding=6, groups=4),
    Case("depthwise, rows of filters without columns", (1, 4, 9, 5), 4, (5, 1), padding=(2, 0), groups=4),
    Case("depthwise, columns that loads of 16 bytes take", (1, 8, 6, 24), 8, (3, 5), padding=(1, 2), groups=8),
    Case("depthwise, strided columns in 16 bytes", (2, 8, 5, 32), 8, (3, 3), stride=(1, 2), padding=1, groups=8),
    Case("depthwise 3-D, strided", (1, 2, 4, 5, 16), 2, (3, 3, 3), stride=(1, 2, 2), padding=1, groups=2),
    Case("transposed depthwise, by threes", (2, 3, 5), 3, (6,), stride=3, padding=2, groups=3, transposed=True),
    Case("transposed depthwise, strided chunks", (2, 3, 9), 3, (12,), stride=2, groups=3, transposed=True),
    Case("transposed depthwise, gaps hold the bias", (1, 2, 3, 4), 2, (1, 2), stride=4, groups=2, transposed=True),
]  # fmt: skip


# Windows of so long a stride that no tile of a GPU's weight gradient holds them, in (the default layout, channels_last).
TOO_LONG = {
    "depthwise, kernel equals stride": (True, False),
    "transposed depthwise, by threes": (True, True),
    "transposed depthwise, gaps hold the bias": (True, True),
}


@pytest.mark.parametrize("kernel", ["strip", "strip_wgrad"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass(case, channels_last, kernel, device, poisoned):
    x, w, b = oracle.tensors(case, torch.float32, device, channels_last)
    if oracle.compiled() and kernel == "strip_wgrad" and TOO_LONG.get(case.reason, (False, False))[channels_last]:
        with tconv.force(kernel=kernel), pytest.raises(ValueError, match="no tile fits"):
            oracle.check(ours(case), case, x, w, b)
        return
    with tconv.force(kernel=kernel), tconv.recording() as calls:
        oracle.check(ours(case), case, x, w, b)
    used = {c.plan.kernel for c in calls if c.operation in (("wgrad",) if kernel == "strip_wgrad" else ("fprop", "dgrad"))}
    assert used == {kernel}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [c for c in CASES if "16 bytes" in c.reason or "chunks" in c.reason], ids=str)
def test_every_dtype(case, channels_last, dtype, device, poisoned):
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    for kernel in ("strip", "strip_wgrad"):
        with tconv.force(kernel=kernel):
            if oracle.compiled() and dtype == torch.float64:  # for which GPUs have no tile
                with pytest.raises(ValueError, match="no tile fits"):
                    oracle.check(ours(case), case, x, w, b)
            else:
                oracle.check(ours(case), case, x, w, b)


TILES = {
    "strip": (Tile(2, 2, 1, columns=4), Tile(4, 4, 1, columns=8), Tile(4, 2, 1, columns=2), Tile(8, 4, 1, columns=1)),
    "strip_wgrad": (Tile(1, 2, 4, columns=4), Tile(3, 4, 2, columns=8), Tile(2, 2, 8, columns=1), Tile(1, 4, 4, columns=2)),
}


@pytest.mark.parametrize(("kernel", "tile"), [(k, t) for k, tiles in TILES.items() for t in tiles], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_tails_in_every_extent(kernel, tile, channels_last, device, poisoned):
    case = Case("strips, channels and rows of taps with a partial last tile", (2, 6, 4, 10), 6, (3, 3), padding=1, groups=6)
    x, w, b = oracle.tensors(case, torch.float32, device, channels_last)
    with tconv.force(kernel=kernel, tile=tile):
        oracle.check(ours(case), case, x, w, b)


def test_split_sums_have_the_same_bits_every_time(device, poisoned):
    case = Case("splits, one of them short", (3, 4, 5, 9), 4, (3, 3), padding=1, groups=4)
    x, w, b = oracle.tensors(case, torch.float32, device)
    runs = []
    for _ in range(2):
        with tconv.force(kernel="strip_wgrad", tile=Tile(3, 4, 4, columns=4), splits=3):
            oracle.check(ours(case), case, x, w, b)
            runs.append(oracle.run(ours(case), case, x, w, b)[2])
    assert torch.equal(*runs)


def test_infinity_stays_in_its_column(device):
    """A window's column that no tap of an output meets leaves that output alone, though its strip has read it."""
    x = torch.ones(1, 2, 3, 16, device=device)
    x[0, 0, 1, 5] = float("inf")
    w = torch.ones(2, 1, 3, 9, device=device)
    right = torch.nn.functional.conv2d(x, w, padding=(1, 4), groups=2)
    with tconv.force(kernel="strip"):
        torch.testing.assert_close(tconv.functional.conv2d(x, w, padding=(1, 4), groups=2), right)


def test_offsets_beyond_32_bits(device):
    """Two images 2^31 elements apart; only the touched pages of the view become memory."""
    x, w = torch.randn(2, 3, 4, 9), torch.randn(3, 1, 3, 3)
    base = torch.empty(2**31 + x.numel(), device=device)
    far = base.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x)
    right = torch.nn.functional.conv2d(x, w, padding=1, groups=3)
    with tconv.force(kernel="strip"):
        torch.testing.assert_close(tconv.functional.conv2d(far, w.to(device), padding=1, groups=3).cpu(), right)


REFUSED = {
    "a multiplier": (Case("", (1, 2, 9), 4, (3,), groups=2), {}, "one filter per channel"),
    "a dense layer": (Case("", (1, 2, 9), 2, (3,)), {}, "one filter per channel"),
    "a stride that no strip is a multiple of": (
        Case("", (1, 2, 9), 2, (3,), stride=5, groups=2, transposed=True),
        {},
        "no tile",
    ),
    "columns by threes": (Case("", (1, 2, 9), 2, (3,), groups=2), {"tile": Tile(4, 2, 1, columns=6)}, "stride of three"),
    "too many columns": (Case("", (1, 2, 9), 2, (3,), groups=2), {"tile": Tile(4, 2, 1, columns=16)}, "so many columns"),
    "a window too long": (Case("", (1, 2, 99), 2, (3,), dilation=40, groups=2), {}, "no tile"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_do_not_take_is_refused_not_done_otherwise(name, device):
    case, plan, words = REFUSED[name]
    x, w, b = oracle.tensors(case, torch.float32, device)
    with tconv.force(kernel="strip", **plan), pytest.raises(ValueError, match=words):
        ours(case)(x, w, b, **case.arguments)


def test_windows_are_as_long_as_what_strips_meet():
    """Against the pairs of outputs and taps, one by one."""
    for size, stride, dilation, padding, columns in itertools.product((1, 3, 8, 11), (1, 2, 3), (1, 2), (0, 1, 4), (4, 6, 8)):
        p = forward_problem((1, 2, 64), (2, 1, size), (stride,), [(padding, padding)], (dilation,), 2)
        taps = range(min(size, CHUNK))
        met = {v * stride + t * dilation for v in range(columns) for t in taps}
        assert window(p, "fprop", columns) == max(met) - min(met) + 1
        if columns % stride == 0:
            t = transposed_problem((1, 2, 9), (2, 1, size), (stride,), (0,), (0,), (dilation,), 2)
            pairs = [(v - t * dilation) for v in range(columns) for t in taps]
            met = {v // stride for v in pairs if v % stride == 0}
            assert window(t, "dgrad", columns) >= max(met) - min(met) + 1


def test_the_planner_takes_strips_where_a_row_has_taps_to_share():
    from tconv.launching.memory_format import shaped
    from tconv.launching.prepare import prepare_gather, prepare_wgrad
    from tconv.planning.device import DEVICES

    p = forward_problem((32, 128, 56, 56), (128, 1, 7, 7), (1, 1), [(3, 3)] * 2, (1, 1), 128)
    lasts, firsts = STRIP_16 + STRIP_WGRAD_16, STRIP_FLIP + STRIP_WGRAD_FLIP
    for channels_last in (True, False):
        x, w, y = (shaped(p.shape(name), channels_last, torch.bfloat16) for name in "xwy")
        for launch in (
            prepare_gather("fprop", p, x, w, None, y, DEVICES["H200"]),
            prepare_gather("dgrad", p, y, w, None, x, DEVICES["H200"]),
            prepare_wgrad(p, y, x, w, DEVICES["H200"]),
        ):
            plan = launch.call.plan
            assert plan.kernel.startswith("strip")
            assert plan.tile in (lasts if channels_last else firsts)
            assert all(plan.cost.seconds <= other.cost.seconds for other in plan.others)
