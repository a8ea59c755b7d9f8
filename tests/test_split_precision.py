"""fp32 in three bf16 pieces and six products, forced: every case against fp64, with at most twice the error of torch's fp32.

An error is the norm of a tensor's deviation from fp64. The interpreter makes the products of pieces, which are exact, and adds
them in fp32; how tensor cores add only a GPU can tell, and there these tests hold them to the same.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import functional as TF
from tconv.launching.launch import device_of
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.launching.variants import float32_precision
from tconv.planning.device import DEVICES
from tconv.planning.families import FAMILIES
from tconv.planning.gemm import PIECES_32
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import BF16X6, Access, Tile
from tests import cases, oracle

H200, A100 = DEVICES["H200"], DEVICES["A100"]
STEP = Tile(64, 64, 32, 4, 2)  # sums in steps of 32, as on a GPU


@pytest.fixture
def device(device):
    """A device for which these kernels are compiled."""
    if oracle.compiled() and device_of(torch.empty(0, device=device)).generation < 9:
        pytest.skip("compiled for Hopper only")
    return device


@pytest.fixture(autouse=True)
def _true_fp32():
    """Torch's own convolutions are compared with, not their TF32."""
    with float32_precision(False):
        yield


def measure(ours, theirs, right):
    """Asserts that ours is at most twice as far from the right result as theirs, give or take an eighth of an eps."""
    mine, other = ((t.double() - right).norm().item() for t in (ours, theirs))
    assert mine <= 2 * other + torch.finfo(torch.float32).eps / 8 * right.norm().item(), f"{mine:.3g}, torch's {other:.3g}"


def compare(case, x, w, b, **forced):
    ours = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    eager = (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]
    with tconv.force(precision=BF16X6, **forced), tconv.recording() as calls:
        got = oracle.run(ours, case, x, w, b)
    assert {c.operation for c in calls} == {"fprop", "dgrad", "wgrad", "bias"}
    for call in calls:
        assert call.plan.precision == (BF16X6 if FAMILIES[call.plan.kernel].cuts else "")
    dy = oracle.upstream(got[0])
    theirs = oracle.run(eager, case, x, w, b, dy=dy)
    right = oracle.run(eager, case, *(t.double() for t in (x, w, b)), dy=dy.double())
    for g, e, r in zip(got[:3], theirs, right, strict=False):
        measure(g, e, r)
    return {c.plan.kernel for c in calls}


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_every_case(case, device, poisoned):
    compare(case, *oracle.tensors(case, torch.float32, device))


@pytest.mark.parametrize("case", [c for c in cases.FEW if c.reason in {"plain 1-D", "transposed, uneven groups"}], ids=str)
def test_tails_in_every_extent(case, device, poisoned):
    compare(case, *oracle.tensors(case, torch.float32, device, channels_last=True), tile=Tile(16, 16, 16))


@pytest.mark.parametrize("kernel", ["packed", "packed_wgrad"])
@pytest.mark.parametrize("case", [c for c in cases.ALL if "pack" in c.reason or "four" in c.reason], ids=str)
def test_few_channels(case, kernel, device, poisoned):
    assert kernel in compare(case, *oracle.tensors(case, torch.float32, device), kernel=kernel)


@pytest.mark.parametrize("kernel", ["gather", "wgrad"])
@pytest.mark.parametrize("case", [c for c in cases.FEW if "depthwise" in c.reason], ids=str)
def test_depthwise_by_the_gemm_kernels(case, kernel, device, poisoned):
    assert kernel in compare(case, *oracle.tensors(case, torch.float32, device), kernel=kernel)


def pointwise(x, w):
    """x [pixels, channels] times w [outputs, channels], as a convolution: ours, torch's and fp64's."""
    image = x.t()[None].contiguous()
    with tconv.force(kernel="gather", tile=STEP, precision=BF16X6):
        ours = TF.conv1d(image, w[:, :, None])
    return ours, F.conv1d(image, w[:, :, None]), F.conv1d(image.double(), w[:, :, None].double())


@pytest.mark.parametrize("terms", [1, 2, 4, 16, 33, 147, 576, 4608])
def test_sums_of_any_length(terms, device, poisoned):
    measure(*pointwise(torch.randn(64, terms, device=device), torch.randn(48, terms, device=device)))


@pytest.mark.parametrize("pixels", [1, 40, 3000])
def test_gradients_of_weights_from_any_number_of_pixels(pixels, device, poisoned):
    x, dy = torch.randn(1, 20, pixels, device=device), torch.randn(1, 24, pixels, device=device)
    w = torch.zeros(24, 20, 1, device=device, requires_grad=True)
    with tconv.force(kernel="wgrad", tile=STEP, precision=BF16X6):
        (got,) = torch.autograd.grad(TF.conv1d(x, w), w, dy)
    (eager,) = torch.autograd.grad(F.conv1d(x, w), w, dy)
    measure(got[..., 0], eager[..., 0], dy[0].double() @ x[0].double().t())


@pytest.mark.parametrize("scales", [(1e-30, 1), (1, 1e-30), (1e30, 1), (1e30, 1e-30), (1e-18, 1e-18), (1e18, 1e18)], ids=str)
def test_scales(scales, device, poisoned):
    x, w = (torch.randn(64, 100, device=device) * s for s in scales)
    measure(*pointwise(x, w))


def test_each_number_at_a_scale_of_its_own(device, poisoned):
    x, w = (torch.randn(64, 100, device=device) * 2.0 ** torch.randint(-40, 40, (64, 100), device=device) for _ in range(2))
    measure(*pointwise(x, w))


def test_cancellation(device, poisoned):
    """Sums a millionth of their terms, and sums of nothing but the last bits of their terms."""
    x, w = torch.randn(64, 50, device=device), torch.randn(48, 50, device=device)
    near = x * (1 + 1e-6 * torch.randn_like(x))
    measure(*pointwise(torch.cat([x, -near], 1), torch.cat([w, w], 1)))
    one = torch.ones(48, 1, device=device)
    odd = 1 + 2.0**-23 * torch.randint(0, 99, (64, 1), device=device)
    ours, _, right = pointwise(torch.cat([odd, -torch.ones_like(odd)], 1), torch.cat([one, one], 1))
    assert torch.equal(ours.double(), right)  # exactly: no bit of a factor is lost


def test_numbers_below_what_three_pieces_hold(device, poisoned):
    """Below 2^-110 last bits go: the low piece has none below 2^-133. Nothing else does."""
    x, w = torch.randn(64, 16, device=device) * 2.0**-112, torch.ones(48, 16, device=device)
    ours, _, right = pointwise(x, w)
    assert (ours.double() - right).abs().max() <= 16 * 2.0**-134 + torch.finfo(torch.float32).eps * right.abs().max()


def test_the_largest_numbers_stay_finite(device, poisoned):
    """The nearest bf16 of the largest fp32 is infinite; its leading bits are not."""
    most = torch.finfo(torch.float32).max
    x, w = torch.full((64, 1), most, device=device), torch.tensor([[1.0], [-1.0], [0.5]], device=device)
    ours, _, right = pointwise(x, w)
    assert torch.equal(ours.double(), right)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_infinity_and_nan_are_what_they_are_in_fp32(device, poisoned):
    """Each with each, alone and among other numbers; 1 has pieces that are zero, 1/3 one of the other sign.

    But a product 2^16 times too large for fp32 has pieces that are infinite by themselves, of either sign.
    """
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, -1.0, 1 / 3, -1 / 3, 1e-30, 3e19, -3e19, 3e38], device=device)
    for others in (0, 3):
        x = torch.cat([values[:, None], torch.randn(13, others, device=device)], 1)
        w = torch.cat([values[:, None], torch.randn(13, others, device=device)], 1)
        ours, _, _ = pointwise(x, w)
        right = (w[:, None].double() * x[None].double()).sum(-1)
        beyond = right.isfinite() & (right.abs() > 2.0**16 * torch.finfo(torch.float32).max)
        assert beyond.sum() == 5
        assert not ours[0][beyond].isfinite().any()
        torch.testing.assert_close(ours[0][~beyond], right[~beyond].float(), equal_nan=True)


def test_the_same_bits_every_time(device, poisoned):
    x, w = torch.randn(2, 20, 9, 7, device=device), torch.randn(24, 20, 3, 3, device=device)
    with tconv.force(precision=BF16X6):
        assert torch.equal(TF.conv2d(x, w, padding=1), TF.conv2d(x, w, padding=1))


def test_other_data_types_and_direct_kernels_stay_as_they_are(device):
    for dtype, groups in ((torch.float16, 1), (torch.float64, 1), (torch.float32, 8)):
        x, w = torch.randn(1, 8, 9, device=device, dtype=dtype), torch.randn(8, 8 // groups, 3, device=device, dtype=dtype)
        with tconv.force(precision=BF16X6), tconv.recording() as calls:
            TF.conv1d(x, w, groups=groups)
        assert [c.plan.precision for c in calls] == [""]


def launch(pass_, problem, device):
    x, w, y = (shaped(problem.shape(which), True, torch.float32) for which in "xwy")
    if pass_ == "wgrad":
        return prepare_wgrad(problem, y, x, w, device)
    return prepare_gather(pass_, problem, *((x, w, None, y) if pass_ == "fprop" else (y, w, None, x)), device)


DENSE = forward_problem((32, 256, 14, 14), (256, 256, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_the_planner_chooses_it_on_hopper_where_it_is_faster(pass_):
    plan = launch(pass_, DENSE, A100).call.plan
    assert not any(p.precision for p in (plan, *plan.others))
    chosen = launch(pass_, DENSE, H200)
    assert chosen.call.plan.precision == chosen.constants["PRECISION"] == BF16X6
    with tconv.force(precision="ieee"):
        assert launch(pass_, DENSE, H200).constants["PRECISION"] == "ieee"
    with float32_precision(True):
        assert launch(pass_, DENSE, H200).constants["PRECISION"] in ("tf32", "ieee")  # ieee: the interpreter is at hand
        assert launch(pass_, DENSE, H200).call.plan.precision == ""


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_it_is_forced_whatever_the_flag_says(pass_, tf32):
    with float32_precision(tf32), tconv.force(precision=BF16X6):
        forced = launch(pass_, DENSE, H200)
    assert forced.constants["PRECISION"] == BF16X6
    assert forced.call.plan.tile in PIECES_32


def test_what_cannot_be_forced():
    with tconv.force(precision=BF16X6), pytest.raises(ValueError, match="no tile fits A100"):
        launch("fprop", DENSE, A100)
    with tconv.force(precision=BF16X6, tile=STEP), pytest.raises(ValueError, match="compiled for Hopper only"):
        launch("fprop", DENSE, A100)
    with tconv.force(kernel="tma", precision=BF16X6), pytest.raises(ValueError, match="not cut into pieces"):
        launch("fprop", DENSE, H200)
    with pytest.raises(ValueError, match="precision must be 'ieee' or 'bf16x6', got 'tf32'"), tconv.force(precision="tf32"):
        pass


def test_every_kernel_with_a_dot_has_tiles_for_it():
    for family, narrow in itertools.product((f for f in FAMILIES.values() if f.cuts), (False, True)):
        found = family.tiles_on(Access(4, True, narrow, precision=BF16X6), H200)
        assert found
        # wgmma's least rows, whichever way round; those of rows are always pixels
        assert all(tile.m >= 64 and (tile.n >= 64 or family.name == "rows") for tile in found)
