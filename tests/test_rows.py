"""The kernel for few written channels: fprop and dgrad of what it takes, forced, against fp64; what it does not take."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import functional as TF
from tconv.planning.device import DEVICES
from tconv.planning.families import FAMILIES
from tconv.planning.problem import forward_problem
from tconv.planning.rows import PIXELS
from tconv.planning.tiles import Tile
from tests import oracle
from tests.test_kernels import STRIDED, ours

Case = oracle.Case
ROWS = FAMILIES["rows"]
# By unit stride along the last dimension fprop and dgrad are both rows'.
FORWARD = [
    Case("plain 1-D", (2, 5, 11), 7, (3,), padding=1),
    Case("seven taps, one channel written", (2, 4, 50), 1, (7,), padding=3),
    Case("one channel in and out", (1, 1, 6, 6), 1, (3, 3)),
    Case("rows shorter than the halo", (2, 5, 4, 2), 4, (3, 3), padding=(1, 2)),
    Case("more taps than columns", (2, 4, 5, 3), 2, (2, 7), padding=(0, 3)),
    Case("padding beyond the kernel", (2, 3, 4, 4), 4, (2, 2), padding=4),
    Case("taps apart along the last dimension", (1, 4, 5, 21), 3, (2, 4), padding=(1, 7), dilation=(1, 5)),
    Case("rows that are strided and apart", (2, 5, 11, 9), 3, (3, 3), stride=(2, 1), padding=(2, 1), dilation=(3, 1)),
    Case("strided rows without taps in dgrad", (1, 4, 11, 6), 3, (2, 3), stride=(4, 1)),
    Case("as many rows of taps as a mask has bits", (1, 2, 20, 5), 3, (16, 2), padding=(8, 0)),
    Case("one row of two pixels", (3, 2, 3, 5), 4, (3, 4)),
    Case("one tap along the last dimension", (1, 4, 5, 6), 5, (3, 1), padding=(1, 0)),
    Case("same padding, even kernel pads one side more", (2, 3, 6, 7), 4, (4, 2), padding="same"),
    Case("plain 3-D", (2, 3, 4, 5, 6), 4, (3, 3, 3), padding=1),
    Case("3-D, every parameter differs", (1, 4, 7, 6, 9), 6, (1, 2, 3), (2, 3, 1), padding=(0, 2, 1), dilation=(1, 3, 2)),
]
TRANSPOSED = [
    Case("transposed, kernel 4", (2, 6, 5, 4), 3, (4, 4), stride=2, padding=1, transposed=True),
    Case("transposed, phases of unlike numbers of taps", (2, 5, 4, 6), 3, (3, 3), stride=2, padding=1, transposed=True),
    Case("transposed, one tap in one phase", (1, 5, 9), 4, (2,), stride=2, padding=1, transposed=True),
    Case("transposed, a stem's seven taps", (1, 9, 5, 7), 3, (7, 7), stride=2, padding=3, output_padding=1, transposed=True),
    Case("transposed, by threes", (2, 5, 3, 7), 2, (5, 5), stride=3, padding=2, output_padding=(1, 2), transposed=True),
    Case("transposed, by threes, six taps", (2, 5, 7), 2, (6,), stride=3, padding=1, transposed=True),
    Case("transposed, by fives", (2, 9, 8), 1, (10,), stride=5, padding=2, transposed=True),
    Case("transposed, gaps hold the bias", (2, 3, 4, 3), 3, (2, 1), stride=(4, 3), transposed=True),
    Case("transposed, one row of outputs", (3, 4, 1, 9), 2, (3, 4), stride=2, padding=1, transposed=True),
    Case("transposed, output padding within dilation", (1, 3, 5), 4, (3,), dilation=4, output_padding=3, transposed=True),
    Case("transposed, padding crops all but a little", (2, 3, 4, 4), 4, (3, 3), padding=2, transposed=True),
    Case("transposed, a factor of stride and dilation",
         (2, 4, 5, 6), 3, (3, 3), stride=4, padding=2, dilation=6, output_padding=2, transposed=True),
    Case("transposed, dilation equals stride", (2, 4, 7), 2, (3,), stride=3, padding=1, dilation=3, transposed=True),
    Case("transposed, stride and dilation without a factor", (2, 4, 9), 3, (4,), stride=2, dilation=3, transposed=True),
    Case("transposed 3-D", (1, 4, 3, 4, 3), 3, (2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 0), transposed=True),
]  # fmt: skip
CASES = FORWARD + TRANSPOSED


def check(case, x, w, b, **plan):
    """Asserts that what rows compute of a case is right: the result, and where strides allow it the gradient of x."""
    only = ("y",) if case.transposed else ("y", "dx")
    with tconv.force(kernel="rows", **plan), tconv.recording() as calls:
        oracle.check(ours(case), case, x, w, b, only=only)
    assert [c.plan.kernel for c in calls if c.operation in ("fprop", "dgrad")] == ["rows"] * len(only)
    return calls


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, channels_last, device, poisoned):
    check(case, *oracle.tensors(case, torch.float32, device, channels_last))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [c for c in CASES if "tap" in c.reason], ids=str)
def test_every_dtype(case, channels_last, dtype, device, poisoned):
    check(case, *oracle.tensors(case, dtype, device, channels_last))


TILED = [
    Case("three tiles, two blocks of channels", (2, 20, 3, 45), 3, (3, 3), padding=1),
    Case("a halo of half a tile", (1, 20, 3, 50), 2, (2, 8), padding=(0, 3), dilation=(1, 2)),
    Case("transposed, tiles of both phases", (2, 20, 3, 37), 3, (4, 4), stride=2, padding=1, transposed=True),
    Case("transposed, tiles of phases, 3-D", (1, 17, 3, 2, 21), 2, (3, 2, 4), stride=(2, 1, 2), transposed=True),
]


@pytest.mark.parametrize("columns", [1, PIXELS])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles_overlap_by_the_halo(case, channels_last, columns, device, poisoned):
    """Small tiles, so that every extent has several and a partial last one, and runs of rows end within a tile."""
    m, n, k = (64, 16, 32) if oracle.compiled() else (32, 16, 16)
    plan = {"kernel": "rows", "tile": Tile(m, n, k, 4, 2, columns=columns)}
    with tconv.force(**plan), tconv.recording() as calls:
        oracle.check(ours(case), case, *oracle.tensors(case, torch.float16, device, channels_last), only=("y",))
    assert [c.plan.kernel for c in calls] == ["rows"]


ALONG = [  # of these, vectors of 8, 4 and 2 pixels can be read
    Case("columns by eights", (2, 20, 5, 24), 3, (3, 3), padding=1),
    Case("columns by fours, taps apart", (2, 20, 5, 36), 3, (3, 3), padding=(1, 4), dilation=(1, 5)),
    Case("columns by twos, strided rows", (2, 20, 7, 22), 3, (3, 3), stride=(2, 1)),
    Case("one row after the other", (3, 32, 80), 1, (7,), padding=3),
    Case("3-D", (1, 20, 3, 4, 16), 2, (2, 3, 3), padding=1),
    Case("transposed, by eights", (2, 20, 5, 16), 3, (4, 4), stride=2, padding=1, transposed=True),
    Case("transposed, by fours, three phases", (2, 20, 3, 20), 2, (5, 5), stride=3, padding=2, transposed=True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALONG, ids=str)
def test_the_default_layout_is_read_along_its_rows(case, dtype, device, poisoned):
    """As it is, in vectors: only the taps of other dimensions move what is read."""
    from tconv.launching.prepare import prepare_gather

    tile = Tile(128, 16, 64, 4, 3, columns=PIXELS)
    x, w, b = oracle.tensors(case, dtype, device)
    with tconv.force(kernel="rows", tile=tile, staged=False), tconv.recording() as calls:
        oracle.check(ours(case), case, x, w, b, only=("y",))
        y = ours(case)(x, w, b, **case.arguments)
        launch = prepare_gather(calls[0].operation, calls[0].problem, x, w, b, y, DEVICES["H200"])
    assert {c.plan.tile for c in calls} == {tile}
    assert launch.constants["X_PIXELS"] == next(v for v in (8, 4, 2) if case.x[-1] % v == 0)


@pytest.mark.parametrize("columns", [1, PIXELS])
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("case", [FORWARD[3], TRANSPOSED[3]], ids=str)
def test_any_strides(case, view, columns, device, poisoned):
    x, w, b = oracle.tensors(case, torch.float16, device)
    n = 16 if case is FORWARD[3] else 32
    with tconv.force(kernel="rows", tile=Tile(64, n, 32, 4, 2, columns=columns)):
        oracle.check(ours(case), case, STRIDED[view](x), STRIDED[view](w), b.repeat(3)[::3], only=("y",))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_finite_is_where_torch_has_it(transposed, special, device):
    """Columns that stand for no tap, and rows of other pixels, are added to nothing."""
    x = torch.ones(1, 2, 5, 24, device=device, dtype=torch.float64)
    w = torch.ones(2, 2, 3, 3, device=device, dtype=torch.float64)
    x[0, 1, 0, 0] = x[0, 0, 2, 9] = x[0, 0, 4, 23] = special
    names, options = ("conv_transpose2d", {"stride": 2}) if transposed else ("conv2d", {"padding": 1})
    for weight in (w, w.clone().index_fill_(3, torch.tensor(0, device=device), special)):
        right = getattr(F, names)(x, weight, **options)
        with tconv.force(kernel="rows", tile=Tile(32, 16, 16, columns=PIXELS)):
            got = getattr(TF, names)(x, weight, **options)
        if transposed and weight is not w:  # infinity times the zeros of a padding that torch's CPU kernels do not multiply
            assert (got.isfinite() <= right.isfinite()).all()
        else:
            torch.testing.assert_close(got, right, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(transposed, device):
    """Two images 2^31 elements apart; only the touched pages of the view become memory."""
    x, w = (torch.randint(-4, 5, shape).half() for shape in ((2, 3, 4, 8), (3, 3, 3, 3)))  # their sums are exact
    base = torch.empty(2**31 + x.numel(), dtype=x.dtype, device=device)
    far = base.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x)
    name = "conv_transpose2d" if transposed else "conv2d"
    with tconv.force(kernel="rows"):
        got = getattr(TF, name)(far, w.to(device), padding=1)
    assert torch.equal(got.cpu(), getattr(F, name)(x, w, padding=1))


REFUSED = {
    "groups": (Case("", (1, 4, 9), 4, (3,), groups=2), {}, "takes no groups"),
    "a strided row": (Case("", (1, 4, 9), 4, (3,), stride=2), {}, "no strides along the last dimension in fprop"),
    "many rows of taps": (Case("", (1, 2, 20, 4), 2, (17, 2)), {}, "at most 16 taps along a dimension before the last one"),
    "many channels": (Case("", (1, 2, 9), 9, (3,)), {}, "32 taps of the last dimension times written channels, not 64"),
    "other columns": (Case("", (1, 2, 9), 8, (3,)), {"tile": Tile(64, 16, 16)}, "written channels need 32 columns"),
    "a long halo": (Case("", (1, 2, 99), 2, (3,), dilation=40), {"tile": Tile(64, 16, 16)}, "reach further than its pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_refused_not_done_otherwise(name, device):
    case, plan, words = REFUSED[name]
    x, w, b = oracle.tensors(case, torch.float32, device)
    with tconv.force(kernel="rows", **plan), pytest.raises(ValueError, match=words):
        ours(case)(x, w, b, **case.arguments)


def test_runs_hold_every_row_that_their_pixels_take():
    """Against the pairs of written pixels and taps, one by one."""
    extents = itertools.product((1, 2, 4, 7), (1, 2, 3, 5), (1, 2, 3, 6), (0, 1, 5), (1, PIXELS))
    for taps, stride, dilation, padding, columns in extents:
        p = forward_problem((1, 2, 61), (2, 2, taps), (stride,), [(padding, padding)], (dilation,), 1)
        tile = Tile(64, 16, 16, columns=columns)
        for pass_ in ("fprop", "dgrad") if stride == 1 else ("dgrad",):
            span, step, low = ROWS.run(p, pass_, tile)
            if pass_ == "fprop":
                read = {(q, q + t * dilation - padding) for q in range(p.Y[2]) for t in range(taps)}
            else:
                pairs = itertools.product(range(p.X[2]), range(taps))
                met = ((i, i + padding - t * dilation) for i, t in pairs)
                read = {(i // stride, n // stride) for i, n in met if n % stride == 0}
            rows = [j - q - low for q, j in read]
            assert min(rows) >= 0
            assert min(rows) < columns
            assert max(j - low for _, j in read) < span
            assert step + max(rows) <= tile.m
            assert step + max(rows) > tile.m - 2 * columns
            assert {span % columns, step % columns, low % columns} == {0}


def test_rows_worked_by_hand():
    """2 x 5 rows of 7 pixels, 3x3 taps without padding, 20 channels: runs of 9 rows, tiles of 64 that are 62 apart."""
    p = forward_problem((2, 20, 7, 9), (3, 20, 3, 3), (1, 1), [(0, 0)] * 2, (1, 1), 1)
    tile = Tile(64, 16, 16, 4, 2)
    assert ROWS.layout(p, "fprop") == (4, 1, 4)
    assert ROWS.run(p, "fprop", tile) == (9, 62, 0)
    assert ROWS.programs(p, "fprop", tile) == 2
    assert ROWS.steps(p, "fprop", tile, 1) == 2 * 3 * 2
    # dgrad by two: 2 x 4 rows of each phase, with 2 rows of taps and with 1; runs of 5 pixels and the one before.
    q = forward_problem((2, 3, 7, 9), (20, 3, 3, 3), (2, 2), [(0, 0)] * 2, (1, 1), 1)
    assert ROWS.layout(q, "dgrad") == (2, 2, 4)
    assert ROWS.run(q, "dgrad", tile) == (6, 63, -1)
    assert ROWS.programs(q, "dgrad", tile) == 2
    assert ROWS.steps(q, "dgrad", tile, 1) == (2 + 1) * 2


def test_the_planner_takes_it_for_few_written_channels():
    from tconv.launching.memory_format import shaped
    from tconv.launching.prepare import prepare_gather

    p = forward_problem((1, 128, 512, 512), (3, 128, 3, 3), (1, 1), [(1, 1)] * 2, (1, 1), 1)
    for channels_last in (True, False):
        x, w, y = (shaped(p.shape(name), channels_last, torch.bfloat16) for name in "xwy")
        plan = prepare_gather("fprop", p, x, w, None, y, DEVICES["H200"]).call.plan
        assert plan.kernel == "rows"
        assert plan.staged == ()  # in either layout x is read as it is
        assert plan.tile.columns == (1 if channels_last else PIXELS)
    wider = dataclasses.replace(p, K=64)
    x, w, y = (shaped(wider.shape(name), True, torch.bfloat16) for name in "xwy")
    assert prepare_gather("fprop", wider, x, w, None, y, DEVICES["H200"]).call.plan.kernel != "rows"
