"""Small cases of every kernel, checked against fp64 on the CPU: what compute-sanitizer watches (bench/sanitize.py).

The device runs tconv's kernels and copies, nothing else, since a sanitizer slows everything a hundredfold.
"""

import pytest
import torch

import tconv
from bench.providers import set_precision
from tconv.planning.tiles import Tile
from tests import cases, oracle

SPLIT = [
    ("wgrad", oracle.Case("split", (2, 8, 9, 9), 12, (3, 3), padding=1), Tile(16, 16, 16)),
    ("depthwise_wgrad", oracle.Case("split depthwise", (2, 8, 9, 9), 8, (3, 3), padding=1, groups=8), Tile(4, 8, 16)),
    ("gather", oracle.Case("split channels", (2, 24, 9, 9), 20, (3, 3), stride=2, padding=1), Tile(16, 16, 16)),
]
STAGED = [
    oracle.Case("copies", (2, 24, 9, 9), 20, (3, 3), stride=2, padding=1),
    oracle.Case("copies of 16 bytes", (2, 16, 4, 8), 24, (1, 3), padding=(0, 1)),
]


def on_device(case, device):
    """The case's function with operands carried to the device and results carried back."""
    name = f"conv{'_transpose' if case.transposed else ''}{case.rank}d"

    def function(x, w, b, **settings):
        return getattr(tconv.functional, name)(x.to(device), w.to(device), b.to(device), **settings).cpu()

    return function


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_small_case(case, dtype, channels_last, device):
    check(case, dtype, channels_last, device)


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_small_copies(case, device):
    with tconv.force(staged=True):
        check(case, torch.float16, False, device)


@pytest.mark.parametrize(("kernel", "case", "tile"), SPLIT, ids=str)
def test_small_split(kernel, case, tile, device):
    with tconv.force(kernel=kernel, tile=tile, splits=2):
        check(case, torch.float16, False, device)


def check(case, dtype, channels_last, device):
    set_precision("fp32")
    torch.manual_seed(0)
    x, w, b = oracle.tensors(case, dtype, "cpu", channels_last)
    with tconv.recording() as calls:
        oracle.check(on_device(case, device), case, x, w, b)
    assert len(calls) == 4
    assert all(call.ours for call in calls)
