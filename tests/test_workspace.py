"""The workspace of a weight gradient that is split: how its slices lie, and how their sums become dw, whatever its strides."""

import math

import pytest
import torch

import tconv
from tconv.launching.launch import device_of
from tconv.launching.prepare import prepare_wgrad
from tconv.launching.self_check import run_poisoned
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import Tile
from tests import cases, oracle
from tests.test_kernels import check


def pixels(case):
    """The terms of an element of dw: images times pixels of the smaller tensor."""
    if case.transposed:
        return case.x[0] * math.prod(case.x[2:])
    arguments = {k: v for k, v in case.arguments.items() if k != "output_padding"}
    y = oracle.FORWARD[case.rank](torch.empty(case.x, device="meta"), torch.empty(case.weight, device="meta"), **arguments)
    return y.numel() // case.k


LONG = [case for case in cases.ALL if pixels(case) > 16 and "depthwise" not in case.reason]


def halved(case):
    """A tile with which half of the pixels, or more, are one step. Larger tiles take the interpreter less time."""
    return Tile(64, 64, 1 << (pixels(case) - 1).bit_length() - 1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_every_case_in_two_splits(case, channels_last, device, poisoned):
    with tconv.force(kernel="wgrad", tile=halved(case), splits=2):
        calls = check(case, *oracle.tensors(case, torch.float32, device, channels_last))
    assert [c.plan.splits for c in calls if c.operation == "wgrad"] == [2]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [c for c in LONG if "stem" in c.reason or "groups" in c.reason], ids=str)
def test_few_channels_in_two_splits(case, channels_last, device, poisoned):
    with tconv.force(kernel="packed_wgrad", tile=halved(case), splits=2):
        calls = check(case, *oracle.tensors(case, torch.float32, device, channels_last))
    assert [c.plan.splits for c in calls if c.operation == "wgrad"] == [2]


def lying(shape, order, step=1):
    """Strides of a shape whose dimensions lie in memory in this order, outermost first, and the elements that they span."""
    strides, room = [0] * len(shape), step
    for d in reversed(order):
        strides[d], room = room, room * shape[d]
    return strides, room


# Rank, the order of dw's dimensions [K, C, *T] in memory, the distance of its elements, and the dimensions of the sum.
ORDERS = {
    "channels last": (2, (0, 2, 3, 1), 1, 0),
    "contiguous": (2, (0, 1, 2, 3), 1, 3),
    "input channels outermost": (2, (1, 0, 2, 3), 1, 2),
    "output channels innermost": (2, (1, 2, 3, 0), 1, 3),
    "taps exchanged": (2, (0, 1, 3, 2), 1, 4),
    "every third element": (2, (0, 2, 3, 1), 3, 1),
    "volumes, contiguous": (3, (0, 1, 2, 3, 4), 1, 3),
    "volumes, nothing behind its neighbour": (3, (4, 2, 1, 0, 3), 1, 5),
    "rows, contiguous": (1, (0, 1, 2), 1, 3),
}


@pytest.mark.parametrize("kernel", ["wgrad", "packed_wgrad", "tma_wgrad"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_of_dw_changes_no_bit(order, kernel, device):
    """Of two splits, against dw in channels_last, whose slices are summed as they lie. What lies between is left alone."""
    rank, order, step, dims = order
    x, w = (4, 24, *{1: (30,), 2: (6, 8), 3: (2, 5, 5)}[rank]), (40, 24, *(2,) * rank)
    p = forward_problem(x, w, (1,) * rank, [(0, 0)] * rank, (1,) * rank, 1)
    x, dy = (oracle.to_channels_last(torch.randn(p.shape(n), dtype=torch.bfloat16, device=device)) for n in "xy")

    def gradient(dw):
        with tconv.force(kernel=kernel, tile=Tile(64, 64, 32, 4, 3), splits=2):
            launch = prepare_wgrad(p, dy, x, dw, device_of(x))
        run_poisoned(launch, (dy, x), (), dw)
        return launch

    strides, room = lying(w, order, step)
    memory = torch.full((room,), 7.0, dtype=torch.bfloat16, device=device)
    dw = memory.as_strided(w, strides)
    flat = oracle.to_channels_last(torch.empty(w, dtype=torch.bfloat16, device=device))
    assert gradient(flat).total.constants["DIMS"] == 0
    assert gradient(dw).total.constants["DIMS"] == dims
    assert torch.equal(dw, flat)
    right = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), flat.double(), None, [1] * rank, [0] * rank, [1] * rank, False, [0] * rank, 1,
        [False, True, False],
    )[1]  # fmt: skip
    torch.testing.assert_close(dw.double(), right, rtol=2**-8, atol=1e-3)
    assert (memory == 7).sum() >= room - dw.numel()


def test_a_weight_of_one_element_has_no_dimension(device, poisoned):
    x, w = torch.randn(2, 1, 8, 8, device=device), torch.randn(1, 1, 1, 1, device=device, requires_grad=True)
    with tconv.force(kernel="wgrad", tile=Tile(16, 16, 16), splits=2):
        y = tconv.functional.conv2d(x, w)
        y.sum().backward()
    torch.testing.assert_close(w.grad, x.sum().view(1, 1, 1, 1), rtol=1e-2, atol=1e-2)


# dtype of the products, kernel, memory format, splits, and what is known of the input channels written: their vector width.
WIDTHS = [
    (torch.bfloat16, "wgrad", True, 1, (True, 8)),
    (torch.bfloat16, "wgrad", True, 2, (True, 4)),
    (torch.bfloat16, "wgrad", False, 1, (False, 1)),
    (torch.bfloat16, "wgrad", False, 2, (True, 4)),
    (torch.bfloat16, "tma_wgrad", False, 2, (True, 4)),
    (torch.bfloat16, "packed_wgrad", False, 2, (True, 4)),
    (torch.float64, "wgrad", False, 2, (True, 2)),
]


@pytest.mark.parametrize(("dtype", "kernel", "channels_last", "splits", "known"), WIDTHS)
def test_rows_are_written_as_wide_as_their_memory_allows(dtype, kernel, channels_last, splits, known):
    from tconv.planning.device import DEVICES

    def tensor(shape):
        t = torch.empty(shape, dtype=dtype, device="meta")
        return oracle.to_channels_last(t) if channels_last else t

    p = forward_problem((8, 24, 14, 14), (40, 24, 3, 3), (1, 1), [(1, 1)] * 2, (1, 1), 1)
    with tconv.force(kernel=kernel, splits=splits):
        launch = prepare_wgrad(p, tensor(p.shape("y")), tensor(p.shape("x")), tensor(p.shape("w")), DEVICES["H100"])
    assert (launch.constants["W_UNIT"], launch.constants["W_VEC"]) == known
