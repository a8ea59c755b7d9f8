"""Output and every gradient of every case against fp64, from buffers full of NaN, in every dtype and layout."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import functional as TF
from tconv.launching.memory_format import addressing
from tconv.planning.gather import TWO_BLOCKS, WIDEST
from tconv.planning.gemm import STEPS_OF_32
from tconv.planning.operands import GatherPass
from tconv.planning.packed import PACKED_WGRAD_16
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import Tile
from tests import cases, oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def ours(case):
    return getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")


def eager(case):
    return getattr(F, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")


def check(case, x, w, b, eager_too=False):
    with tconv.recording() as calls:
        oracle.check(ours(case), case, x, w, b, eager(case) if eager_too else None)
    assert [c for c in calls if not c.ours] == []
    assert {c.operation for c in calls} == {"fprop", "dgrad", "wgrad", "bias"}
    return calls


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_every_case(case, device, poisoned):
    check(case, *oracle.tensors(case, torch.float32, device), eager_too=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_every_dtype(case, dtype, device, poisoned):
    check(case, *oracle.tensors(case, dtype, device, channels_last=True), eager_too=True)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_channels_last_with_16_byte_accesses(case, device, poisoned):
    """Channels in multiples of eight, where 16-bit tensors are read and written 16 bytes at a time."""
    wide = oracle.dataclasses.replace(case, x=(case.x[0], 8 * case.x[1], *case.x[2:]), k=8 * case.k, groups=max(1, case.groups))
    if case.groups in (case.x[1], case.k):  # stay depthwise
        wide = oracle.dataclasses.replace(wide, groups=8 * case.groups)
    check(wide, *oracle.tensors(wide, torch.float16, device, channels_last=True))


# What planning/simplify.py rewrites, in the layout in which it rewrites most of it.
REWRITTEN = [
    c for c in cases.ALL
    if c.reason in (
        "pointwise", "kernel equals stride", "kernel covers the input", "one output pixel", "transposed, kernel equals stride"
    ) or "from one pixel" in c.reason
] + [
    oracle.Case("patches of frames", (2, 3, 4, 4, 4), 5, (1, 2, 4), stride=(1, 2, 4)),
    oracle.Case("temporal kernel", (1, 3, 5, 3, 4), 4, (3, 1, 1), padding=(1, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("case", REWRITTEN, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_rewritten_problems(case, channels_last, device, poisoned):
    check(case, *oracle.tensors(case, torch.float32, device, channels_last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.FEW, *REWRITTEN], ids=str)
def test_staged_operands(case, dtype, device, poisoned):
    """Operands copied to channels last first, results in the default layout."""
    with tconv.force(staged=True), tconv.recording() as calls:
        check(case, *oracle.tensors(case, dtype, device))
    if "depthwise" not in case.reason:
        assert any(call.plan.staged for call in calls)


PADDED = [
    oracle.Case("one channel to four", (2, 1, 11), 8, (3,), stride=2, padding=1),
    oracle.Case("three channels to four, both sides", (2, 3, 4, 5), 3, (3, 2)),
    oracle.Case("three channels to four", (2, 3, 9, 7), 8, (7, 5), stride=2, padding=3),
    oracle.Case("three channels to four, padding beyond the kernel", (1, 3, 3, 4), 4, (2, 2), padding=3, dilation=2),
    oracle.Case("five channels to eight, 3-D", (1, 5, 3, 4, 3), 8, (2, 1, 3), padding=1, stride=(1, 2, 1)),
    oracle.Case("nine channels to sixteen, both sides", (2, 9, 6, 5), 17, (3, 3), padding=1),
    oracle.Case("few output channels, which wgrad takes for input channels", (2, 32, 7, 6), 3, (3, 3), padding=1),
    oracle.Case("transposed", (2, 3, 5, 4), 5, (4, 4), stride=2, padding=1, transposed=True),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_channels_padded_to_whole_vectors(case, dtype, channels_last, device, poisoned):
    """Copies have channels that the tensors do not have, which are zero, and whose gradients are not stored."""
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    with tconv.force(staged=True), tconv.recording() as calls:
        check(case, x, w, b)
    padded = [call.plan.pass_ for call in calls if call.plan and "padded with zeros" in call.plan.reason]
    assert "wgrad" in padded
    assert len(padded) >= 2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(special, device):
    """The channels that a copy adds are zero in both operands: nothing infinite meets their zeros where it is stored."""
    x, w = torch.ones(1, 3, 5, 5, device=device), torch.ones(8, 3, 3, 3, device=device)
    x[0, 1, 2, 2], w[3, 2, 1, 1] = special, special
    expected, results = [], []
    for functions, into in ((F, expected), (TF, results)):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        with tconv.force(staged=True):
            y = functions.conv2d(*leaves, padding=1)
            into += [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    for ours, right in zip(results, expected, strict=True):
        assert not right.isfinite().all()
        torch.testing.assert_close(ours, right, equal_nan=True)


PIXELS = [
    oracle.Case("planes of three vectors", (3, 24, 4, 6), 20, (1, 1)),
    oracle.Case("planes of half a vector", (2, 17, 2, 6), 33, (1, 1)),
    oracle.Case("frames, a tile across images", (3, 16, 2, 3, 4), 24, (1, 1, 1)),
    oracle.Case("rows", (2, 20, 40), 70, (1,)),
    oracle.Case("two groups", (2, 34, 4, 4), 70, (1, 1), groups=2),
    oracle.Case("read otherwise, written along the pixels", (2, 16, 4, 6), 18, (3, 3), padding=1),
]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kernel", ["gather", "wgrad"])
@pytest.mark.parametrize("case", PIXELS, ids=str)
def test_vectors_along_the_pixels(case, kernel, splits, device, poisoned):
    """Pointwise layers read the default layout as it is, and results are written along their pixels."""
    k = 64 if device == "cuda" or oracle.compiled() else 16
    with tconv.force(kernel=kernel, tile=Tile(64, 64, k), staged=False, splits=splits if case.x[1] > splits * k else None):
        check(case, *oracle.tensors(case, torch.bfloat16, device))


@pytest.mark.parametrize(
    ("shape", "change", "read", "written"),
    [
        ((2, 16, 4, 6), {}, 8, 8),
        ((2, 16, 2, 6), {}, 4, 4),
        ((2, 16, 3, 5), {}, 1, 1),
        ((2, 16, 4, 8), {"S": (1, 1, 2), "Y": (1, 4, 4)}, 1, 8),
        ((2, 16, 4, 6), {"P": (0, 1, 1), "Y": (1, 6, 8)}, 1, 8),
        ((2, 16, 4, 6), {"T": (1, 3, 3), "P": (0, 1, 1)}, 1, 8),
    ],
    ids=str,
)
def test_what_is_read_and_written_along_the_pixels(shape, change, read, written):
    p = dataclasses.replace(forward_problem(shape, (8, 16, 1, 1), (1, 1), [(0, 0)] * 2, (1, 1), 1), **change)
    x, w, y = (torch.empty(p.shape(which), dtype=torch.half, device="meta") for which in "xwy")
    c = GatherPass("fprop", p, addressing(x), addressing(w), addressing(y), True)
    assert (c.pixels_x, c.pixels_y) == (read, written)
    last = torch.channels_last
    c = GatherPass("fprop", p, addressing(x.to(memory_format=last)), addressing(w), addressing(y.to(memory_format=last)), True)
    assert (c.pixels_x, c.pixels_y) == (1, 1)


# More than one block of channels, so that every tap counter wraps: 20 and 17 are no multiples of the tile's 16, 32 is.
BLOCKS = [
    oracle.Case("channel blocks, 1-D", (1, 32, 7), 20, (3,), padding=1),
    oracle.Case("channel blocks, 2-D", (1, 20, 4, 3), 32, (2, 2), padding=1),
    oracle.Case("channel blocks, 3-D", (1, 17, 2, 2, 3), 18, (2, 1, 2)),
]


@pytest.mark.parametrize("case", [c for c in cases.FEW if c.rank < 3] + BLOCKS, ids=str)
def test_tails_in_every_extent(case, device, poisoned):
    """The least tile a dot allows, so that every extent has several tiles and a partial last one."""
    x, w, b = oracle.tensors(case, torch.float32, device)
    if "depthwise" not in case.reason:
        with tconv.force(tile=Tile(16, 16, 16)):
            check(case, x, w, b)
        return
    # On a GPU strips would be planned: by name, the kernels that such a tile is for, of each pass that knows one.
    with tconv.force(kernel="depthwise", tile=Tile(16, 4, 16)):
        calls = check(case, x, w, b)
    with tconv.force(kernel="depthwise_wgrad", tile=Tile(16, 4, 16)):
        calls += check(case, x, w, b)
    assert {c.plan.kernel for c in calls} >= {"depthwise", "depthwise_wgrad"}


SPLIT = [
    oracle.Case("rows", (3, 5, 40), 7, (3,), padding=1),
    oracle.Case("transposed", (2, 4, 5, 9), 6, (1, 2), stride=2, groups=2, transposed=True),
    oracle.Case("depthwise", (2, 6, 7, 9), 6, (3, 3), padding=1, groups=6),
]


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_split_reductions(case, splits, device, poisoned):
    """Parts of wgrad's and the bias gradient's reduction, one of them short, add up, and to the same bits every time."""
    x, w, b = oracle.tensors(case, torch.float32, device)
    plan = {"tile": Tile(16, 16, 16), "splits": splits}
    if "depthwise" in case.reason:
        plan = {"kernel": "depthwise_wgrad", "tile": Tile(4, 16, 16), "splits": splits}
    runs = []
    for _ in range(2):
        with tconv.force(**plan), tconv.recording() as calls:
            oracle.check(ours(case), case, x, w, b)
            runs.append(oracle.run(ours(case), case, x, w, b)[2:])
        assert {c.plan.splits for c in calls if c.operation == "wgrad"} == {splits}
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def widened(case):
    """A case with 33 to 48 channels read and written in every group: three blocks of 16, most of them with a tail."""
    c, k = (n // case.groups * math.ceil(33 * case.groups / n) for n in (case.x[1], case.k))
    x = (case.x[0], c * case.groups, *case.x[2:])
    return oracle.dataclasses.replace(case, x=x, k=k * case.groups)


@pytest.mark.parametrize(("splits", "channels_last"), [(2, True), (3, False)], ids=["2", "3"])
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_split_channels(case, splits, channels_last, device, poisoned):
    """Parts of fprop's and dgrad's reduction, with phases of all kinds; of two splits the second is the shorter."""
    wide = widened(case)
    with tconv.force(kernel="gather", tile=Tile(256, 64, 16), splits=splits):
        calls = check(wide, *oracle.tensors(wide, torch.float32, device, channels_last))
    assert [c.plan.splits for c in calls if c.operation in ("fprop", "dgrad")] == [splits, splits]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_split_channels_in_every_dtype(dtype, channels_last, device, poisoned):
    """Whole blocks in one direction, tails in the other, 16-byte accesses in both; and to the same bits every time."""
    case = oracle.Case("", (2, 48, 7, 5), 40, (3, 3), stride=2, padding=1)
    tensors = oracle.tensors(case, dtype, device, channels_last)
    with tconv.force(kernel="gather", tile=Tile(32, 64, 16), splits=3):
        check(case, *tensors)
        first, second = (oracle.run(ours(case), case, *tensors)[:2] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# 96 and 32 channels, of which steps of 64 leave half a step empty: taps that wrap once a step, and a strided dgrad.
HALVES = [
    oracle.Case("halves, 1-D", (2, 96, 37), 32, (5,), stride=2, padding=2),
    oracle.Case("halves, 2-D", (2, 32, 9, 7), 96, (3, 3), padding=1, dilation=2),
    oracle.Case("halves, 3-D, in two groups", (1, 192, 3, 5, 4), 64, (3, 1, 2), stride=(1, 2, 1), padding=1, groups=2),
    oracle.Case("halves, transposed", (2, 96, 6, 5), 160, (2, 3), stride=2, transposed=True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", STEPS_OF_32, ids=str)
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_steps_of_half_as_many_channels(case, tile, dtype, device, poisoned):
    with tconv.force(kernel="gather", tile=tile):
        calls = check(case, *oracle.tensors(case, dtype, device, channels_last=True))
    assert {c.plan.tile for c in calls if c.operation in ("fprop", "dgrad")} == {tile}


# Channels that end within the second block, within the first, and with a tile; of dgrad the same, the other way round.
BLOCKS_OF_TWO = [
    oracle.Case("second, first, 1-D", (2, 200, 37), 160, (5,), stride=2, padding=2),
    oracle.Case("first, whole, 2-D", (1, 192, 9, 7), 264, (3, 3), padding=1, dilation=2),
    oracle.Case("whole, second, 2-D in two groups", (2, 144, 5, 7), 192, (2, 3), stride=(1, 2), groups=2),
    oracle.Case("second, whole, 3-D", (1, 96, 3, 5, 4), 88, (3, 1, 2), stride=(1, 2, 1), padding=1),
    oracle.Case("transposed, whole, second", (2, 176, 6, 5), 96, (2, 3), stride=2, transposed=True),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [*TWO_BLOCKS, WIDEST], ids=str)
@pytest.mark.parametrize("case", BLOCKS_OF_TWO, ids=str)
def test_tiles_of_two_blocks_of_written_channels(case, tile, dtype, channels_last, device, poisoned):
    with tconv.force(kernel="gather", tile=tile, staged=not channels_last):
        calls = check(case, *oracle.tensors(case, dtype, device, channels_last))
    assert {c.plan.tile for c in calls if c.operation in ("fprop", "dgrad")} == {tile}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_blocks_of_split_channels(dtype, device, poisoned):
    """Rows of pixels too, of which the accumulators are the transposes, and element by element."""
    if oracle.compiled():
        pytest.skip("so small a block is no tensor core's")
    case = oracle.Case("", (2, 52, 7, 5), 42, (3, 3), stride=2, padding=1)
    for channels_last in (False, True):
        with tconv.force(kernel="gather", tile=Tile(64, 32, 16, extra=16), splits=2, staged=False):
            calls = check(case, *oracle.tensors(case, dtype, device, channels_last))
        assert [c.plan.splits for c in calls if c.operation in ("fprop", "dgrad")] == [2, 2]


@pytest.mark.parametrize("case", [c for c in cases.ALL if c.groups > 1 and "depthwise" in c.reason], ids=str)
def test_depthwise_by_the_gemm_kernels_too(case, device, poisoned):
    x, w, b = oracle.tensors(case, torch.float32, device)
    with tconv.force(kernel="gather"):
        oracle.check(ours(case), case, x, w, b)
    with tconv.force(kernel="wgrad"):
        oracle.check(ours(case), case, x, w, b)


PACKED = {"packed": ("fprop", "dgrad"), "packed_wgrad": ("wgrad",)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_packs_of_one_group_of_many_channels(channels_last, dtype, device, poisoned):
    """48 channels and 35 taps, more than a packed field holds: steps of 64 columns end within a tap."""
    case = oracle.Case("one group in a tile", (2, 96, 40), 80, (35,), padding=17, groups=2)
    tile = Tile(128, 64, 64, 8, 3) if dtype == torch.bfloat16 else Tile(64, 32, 32, 8, 2)
    with tconv.force(kernel="packed", tile=tile):
        calls = check(case, *oracle.tensors(case, dtype, device, channels_last))
    assert {c.plan.tile for c in calls if c.operation in ("fprop", "dgrad")} == {tile}


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_every_case_by_the_packed_kernels(case, channels_last, kernel, device, poisoned):
    with tconv.force(kernel=kernel):
        calls = check(case, *oracle.tensors(case, torch.float32, device, channels_last))
    assert {c.plan.kernel for c in calls if c.operation in PACKED[kernel]} == {kernel}


FEW_CHANNELS = [c for c in cases.ALL if "stem" in c.reason or "groups" in c.reason]


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("case", FEW_CHANNELS, ids=str)
def test_packs_have_tails_in_every_extent(case, kernel, device, poisoned):
    """Tiles of 16: packs of part of the groups, the last one partial, taps cut between steps."""
    for channels_last in (False, True):
        with tconv.force(kernel=kernel, tile=Tile(16, 16, 16)):
            check(case, *oracle.tensors(case, torch.float32, device, channels_last))


@pytest.mark.parametrize("case", FEW_CHANNELS, ids=str)
def test_packs_of_few_output_channels_are_columns_of_the_product(case, device, poisoned):
    for channels_last, dtype in ((False, torch.float64), (True, torch.bfloat16)):
        with tconv.force(kernel="packed_wgrad", tile=Tile(16, 64, 32)):
            check(case, *oracle.tensors(case, dtype, device, channels_last))


@pytest.mark.parametrize("k", [24, 72])
@pytest.mark.parametrize("tile", PACKED_WGRAD_16, ids=str)
def test_a_tile_of_several_taps_of_many_channels(tile, k, device, poisoned):
    """With a GPU's tiles: output channels that leave one half empty, or want two, and columns that end within one."""
    case = oracle.Case("several taps in a tile", (2, 24, 9, 7), k, (3, 3), stride=(1, 2), padding=1)
    with tconv.force(kernel="packed_wgrad", tile=tile, splits=2):
        calls = check(case, *oracle.tensors(case, torch.bfloat16, device, channels_last=True))
    assert {c.plan.tile for c in calls if c.operation == "wgrad"} == {tile}


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in FEW_CHANNELS if "pack" in c.reason or "four" in c.reason], ids=str)
def test_packs_in_every_dtype(case, dtype, kernel, device, poisoned):
    with tconv.force(kernel=kernel, tile=Tile(32, 16, 16)):
        check(case, *oracle.tensors(case, dtype, device, channels_last=True), eager_too=True)


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("per_group", [(4, 4), (3, 6), (8, 2)], ids=str)
def test_packs_with_wide_accesses(per_group, kernel, device, poisoned):
    """bf16 in tiles of the size that a GPU is given, groups by the dozen, channels_last."""
    c, k = per_group
    case = oracle.Case("a dozen groups", (2, 16 * c, 9, 7), 16 * k, (3, 3), padding=1, groups=16)
    with tconv.force(kernel=kernel, tile=Tile(64, 32, 64)):
        check(case, *oracle.tensors(case, torch.bfloat16, device, channels_last=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinity_stays_within_its_pack(device):
    """In the other groups of its pack it meets zeros of the block-diagonal weight and gives NaN; elsewhere nothing."""
    x, w = torch.ones(1, 64, 5, device=device), torch.ones(64, 4, 3, device=device)
    x[0, 0, 2] = float("inf")
    with tconv.force(kernel="packed", tile=Tile(16, 16, 16)):  # four groups of four
        y = TF.conv1d(x, w, groups=16)
    assert torch.equal(y[:, :4], F.conv1d(x, w, groups=16)[:, :4])
    assert torch.equal(y[:, 16:], F.conv1d(x, w, groups=16)[:, 16:])


STRIDED = {
    "a crop of a larger tensor": lambda t: torch.randn([n + 3 for n in t.shape], dtype=t.dtype, device=t.device)[
        tuple(slice(1, n + 1) for n in t.shape)
    ],
    "every second element": lambda t: torch.randn([2 * n for n in t.shape], dtype=t.dtype, device=t.device)[
        tuple(slice(None, None, 2) for _ in t.shape)
    ],
    "channels and pixels swapped": lambda t: torch.randn(t.shape[::-1], dtype=t.dtype, device=t.device).permute(
        *range(t.dim())[::-1]
    ),
    "one channel expanded to all": lambda t: torch.randn(t[:, :1].shape, dtype=t.dtype, device=t.device).expand(t.shape),
    "one image expanded to all": lambda t: torch.randn(1, *t.shape[1:], dtype=t.dtype, device=t.device).expand(t.shape),
    "everything one number": lambda t: torch.randn((), dtype=t.dtype, device=t.device).expand(t.shape),
}  # fmt: skip


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("case", [c for c in cases.FEW if c.rank == 2 and c.padding != "same"][:5], ids=str)
def test_any_strides(case, view, device, poisoned):
    x, w, b = oracle.tensors(case, torch.float32, device)
    check(case, STRIDED[view](x), STRIDED[view](w), STRIDED[view](b) if b.dim() > 2 else b.repeat(3)[::3])


@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
def test_offsets_beyond_32_bits(which, device):
    """Two images 2^31 elements apart, in input and in output: only the touched pages of the views become memory."""
    from tconv.launching import launch
    from tconv.launching.prepare import prepare_gather
    from tconv.planning.problem import Geometry, forward_problem

    g = Geometry(forward_problem((2, 4, 5, 5), (6, 4, 3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1), False)
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    y = F.conv2d(x, w, None, 2, 1)
    dy = torch.randn_like(y)
    back = torch.ops.aten.convolution_backward(dy, x, w, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False))
    right = {"fprop": y, "dgrad": back[0], "wgrad": back[1]}

    def apart(t):
        base = torch.empty(2**31 + t.numel(), dtype=t.dtype, device=device)
        return base.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)

    x, dy, w = apart(x), apart(dy), w.to(device)
    if which == "wgrad":
        got = launch.wgrad(g, dy, x)
        (prepared,) = (v for key, v in launch._prepared.items() if key[1] is g)
    else:
        got, read = apart(right[which]).fill_(float("nan")), x if which == "fprop" else dy
        prepared = prepare_gather(which, g.problem, read, w, None, got, launch.device_of(x))
        launch.run(prepared, (read, w, read, got))
    assert prepared.constants["WIDE"]
    torch.testing.assert_close(got.cpu(), right[which])


FRAMES = [
    oracle.Case("outer frames meet few taps", (2, 3, 6, 4, 4), 5, (3, 3, 3), padding=(0, 1, 1)),
    oracle.Case("frames in phases", (1, 3, 9, 4, 4), 5, (5, 1, 3), stride=(2, 1, 1), padding=(1, 0, 1)),
    oracle.Case("a factor of stride and dilation", (1, 3, 12, 4, 8), 5, (3, 3, 2), stride=(4, 1, 2), dilation=(2, 1, 1)),
    oracle.Case("taps more frames apart than there are", (1, 3, 5, 4, 4), 5, (3, 3, 3), padding=(7, 1, 1), dilation=(7, 1, 1)),
    oracle.Case("frames that meet nothing", (1, 3, 8, 4, 4), 5, (2, 2, 2), stride=(5, 1, 1)),
    oracle.Case(
        "a transposed layer's bias, in frames that meet nothing", (1, 3, 2, 4, 4), 5, (2, 3, 3), stride=(4, 1, 1),
        padding=(0, 1, 1), output_padding=(3, 0, 0), transposed=True,
    ),
    oracle.Case("tiles of several frames and images", (3, 3, 4, 3, 3), 5, (3, 2, 2), padding=(2, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FRAMES, ids=str)
def test_frames(case, channels_last, splits, device, poisoned):
    """Tiles that stay in a frame, of which a dgrad walks those taps only that meet one."""
    case = dataclasses.replace(case, x=(case.x[0], case.x[1] * 8, *case.x[2:]), k=case.k * 4)  # 20 and 24 are two steps
    with tconv.force(kernel="gather", tile=Tile(16, 16, 16), splits=splits if splits > 1 else None):
        check(case, *oracle.tensors(case, torch.float64, device, channels_last))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_tap_that_meets_no_frame_is_not_walked(device):
    """It is infinite, and would make NaN of the zeros that it meets."""
    w, dy = (torch.ones(shape, device=device, dtype=torch.float64) for shape in ((16, 16, 3, 3, 3), (1, 16, 4, 4, 4)))
    w[:, :, 0] = 0
    right = F.conv_transpose3d(dy, w, padding=(0, 1, 1))
    w[:, :, 0] = torch.inf
    with tconv.force(kernel="gather", tile=Tile(16, 16, 16)):
        dx = TF.conv_transpose3d(dy, w, padding=(0, 1, 1))
    assert not dx[:, :, :4].isfinite().any()
    assert torch.equal(dx[:, :, 4:], right[:, :, 4:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinity_meets_the_halo(device):
    """Padding zeros take part in the arithmetic: an infinite weight over them gives NaN, as in torch's own kernels.

    In fp64, because on CPUs torch hands fp32 depthwise layers to a library that skips the halo.
    """
    x = torch.ones(1, 2, 4, 4, device=device, dtype=torch.float64)
    w = torch.ones(2, 2, 3, 3, device=device, dtype=torch.float64)
    w[0, 0, 0, 0] = float("inf")
    for groups in (1, 2):
        weight = w[:, : 2 // groups].contiguous()
        right = F.conv2d(x, weight, padding=1, groups=groups)
        assert right.isnan().any()
        torch.testing.assert_close(TF.conv2d(x, weight, padding=1, groups=groups), right, equal_nan=True)
    x[0, 1, 2, 2] = float("nan")
    torch.testing.assert_close(TF.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1), equal_nan=True)
