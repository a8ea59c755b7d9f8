"""dgrad of patches that do not overlap, as one product (kernels/patch.py), and what is left to other kernels."""

import dataclasses

import pytest
import torch

import tconv
from tconv import functional as TF
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather
from tconv.planning.device import DEVICES
from tconv.planning.problem import forward_problem, transposed_problem
from tests import oracle
from tests.oracle import Case
from tests.test_kernels import check

H200 = DEVICES["H200"]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
# In 16 bits. Runs of 2 and 4 taps are joined; one of 14 is stored four bytes at a time, one of 16 in vectors of 16 bytes.
PATCHES = [
    Case("pairs", (2, 5, 16), 8, (2,), stride=2),
    Case("lines of sixteen", (2, 3, 64), 8, (16,), stride=16),
    Case("downsampling", (2, 6, 8, 12), 10, (2, 2), stride=2),
    Case("downsampling to images of 7x7", (1, 4, 14, 14), 8, (2, 2), stride=2),
    Case("fours", (2, 3, 8, 16), 6, (4, 4), stride=4),
    Case("patch embedding", (2, 3, 32, 48), 24, (16, 16), stride=16),
    Case("patches of fourteen", (1, 3, 28, 14), 12, (14, 14), stride=14),
    Case("lines only", (2, 4, 3, 8), 6, (1, 2), stride=(1, 2)),
    Case("patches of frames", (1, 3, 4, 6, 8), 8, (2, 2, 4), stride=(2, 2, 4)),
    Case("patches within frames", (2, 4, 3, 4, 6), 8, (1, 2, 2), stride=(1, 2, 2)),
    Case("groups", (2, 12, 6, 8), 8, (2, 2), stride=2, groups=4),
    Case("groups of eight channels", (2, 32, 4, 6), 16, (2, 2), stride=2, groups=4),
    Case("groups of lines of eight", (2, 6, 16), 4, (8,), stride=8, groups=2),
    Case("kernel covers the input", (2, 4, 2, 8), 6, (2, 8)),
    Case("an image", (1, 16, 16, 32), 40, (2, 2), stride=2),
    Case("transposed", (2, 8, 3, 5), 6, (2, 2), stride=2, transposed=True),
    Case("transposed, groups", (2, 8, 3, 4), 6, (2, 2), stride=2, groups=2, transposed=True),
    Case("transposed volumes", (1, 6, 2, 3, 2), 4, (2, 2, 2), stride=2, transposed=True),
    Case("transposed lines", (2, 20, 7), 3, (16,), stride=16, transposed=True),
]


@LAYOUTS
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patches(case, channels_last, device, poisoned):
    x, w, b = oracle.tensors(case, torch.float16, device, channels_last)
    if channels_last and "groups" in case.reason and case.x[1] < 32:
        pytest.skip("runs of less than 16 bytes lie between those of other groups")
    with tconv.force(kernel="patch"):
        calls = check(case, x, w, b)
    assert [c.plan.kernel for c in calls if c.plan.pass_ == "dgrad"] == ["patch"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [PATCHES[2], PATCHES[12], PATCHES[15]], ids=str)
def test_every_dtype(case, dtype, device, poisoned):
    with tconv.force(kernel="patch"):
        check(case, *oracle.tensors(case, dtype, device))


@pytest.mark.parametrize("staged", [False, True])
def test_dy_as_it_is_and_copied(staged, device, poisoned):
    case = Case("downsampling", (2, 16, 8, 12), 32, (2, 2), stride=2)
    x, w, b = oracle.tensors(case, torch.float16, device)
    with tconv.force(kernel="patch", staged=staged):
        calls = check(case, x, w, b)
    (plan,) = (c.plan for c in calls if c.operation == "dgrad")
    assert plan.staged == (("dy",) if staged else ())


@LAYOUTS
def test_tiles_with_tails(channels_last, device, poisoned):
    case = Case("tails", (3, 10, 6, 10), 36, (2, 2), stride=2)
    with tconv.force(kernel="patch", tile=tconv.Tile(16, 16, 16)):
        check(case, *oracle.tensors(case, torch.float16, device, channels_last))


@LAYOUTS
def test_the_gradient_has_torchs_format(channels_last, device):
    x = torch.randn(2, 6, 8, 12, device=device, dtype=torch.float16)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    w = torch.randn(8, 6, 2, 2, device=device, dtype=torch.float16)
    w = w.to(memory_format=torch.channels_last) if channels_last else w
    with tconv.force(kernel="patch"):
        (dx,) = torch.autograd.grad(TF.conv2d(x, w, stride=2).sum(), x)
    assert dx.stride() == x.stride()


REFUSED = {
    "pixels are left over": Case("", (2, 4, 9, 8), 5, (2, 2), stride=2),
    "patches overlap": Case("", (2, 4, 9, 9), 5, (3, 3), stride=2),
    "gaps": Case("", (2, 4, 8, 8), 5, (2, 2), stride=4),
    "padding": Case("", (2, 4, 6, 6), 5, (2, 2), stride=2, padding=1),
    "dilation": Case("", (2, 4, 6, 6), 5, (2, 2), stride=2, dilation=2),
    "one tap": Case("", (2, 4, 6, 6), 5, (1, 1)),
    "runs of three": Case("", (2, 4, 9, 9), 5, (3, 3), stride=3),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_does_not_take(why, device, poisoned):
    """Forced, it raises. Otherwise others compute it, and what no patch covers is zero."""
    case = REFUSED[why]
    x, w, b = oracle.tensors(case, torch.float16, device)
    check(case, x, w, b)
    with tconv.force(kernel="patch"), pytest.raises(ValueError, match="forced plan cannot run: "):
        torch.autograd.grad(TF.conv2d(x.requires_grad_(), w, **case.arguments).sum(), x)


def test_mixed_formats_are_left_to_others(device, poisoned):
    """A weight in channels_last has another order of channels and taps than dx by pixels."""
    p = forward_problem((2, 4, 6, 8), (5, 4, 2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), 1)
    x, y = (shaped(p.shape(n), False, torch.float16) for n in "xy")
    with tconv.force(kernel="patch"), pytest.raises(ValueError, match="do not have the same order of channels and taps"):
        prepare_gather("dgrad", p, y, shaped(p.shape("w"), True, torch.float16), None, x, H200)


CHOSEN = {
    "ConvNeXt-T, first downsampling": forward_problem((64, 96, 56, 56), (192, 96, 2, 2), (2, 2), ((0, 0),) * 2, (1, 1), 1),
    "ViT-B/16": forward_problem((64, 3, 224, 224), (768, 3, 16, 16), (16, 16), ((0, 0),) * 2, (1, 1), 1),
    "U-Net": transposed_problem((8, 512, 32, 32), (512, 256, 2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1),
}


def dgrad(p, device):
    x, w, y = (shaped(p.shape(n), False, torch.bfloat16) for n in "xwy")
    return prepare_gather("dgrad", p, y, w, None, x, device).call.plan


@pytest.mark.parametrize("name", CHOSEN)
def test_the_planner_prefers_it_where_it_is_predicted_to_be_faster(name):
    plan = dgrad(CHOSEN[name], H200)
    assert plan.kernel == "patch"
    assert "columns to " in plan.reason
    with tconv.force(kernel="gather"):
        assert plan.cost.seconds < dgrad(CHOSEN[name], H200).cost.seconds
    assert dgrad(dataclasses.replace(CHOSEN[name], S=(1, 3, 3)), H200).kernel != "patch"
