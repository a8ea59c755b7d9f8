"""No kernel tells Triton's compiler what is not true: each kind of hint is checked, and a false one is noticed.

`conftest.py` installs the check for every test that runs in the interpreter, so the kernels' own hints are held to the truth
by all of those tests. Here: that the check can fail.
"""

import pytest
import torch
import triton
import triton.language as tl

from tconv.kernels.common import multiple
from tconv.launching.arguments import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="hints are checked in the interpreter")


@triton.jit
def contiguous_pairs(x_ptr, out_ptr, step, AXIS: tl.constexpr):
    """Promises that pairs along AXIS of a tile [4, 8] of addresses, row * 8 + column * step, lie side by side."""
    at = x_ptr + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :] * step
    at = tl.max_contiguous(at, [2, 1] if AXIS == 0 else [1, 2])
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :], tl.load(at))


@triton.jit
def constant_pairs(out_ptr, n):
    i = tl.max_constancy(tl.arange(0, 8) // n, [2])
    tl.store(out_ptr + tl.arange(0, 8), i.to(tl.float32))


@triton.jit
def divisible_offsets(out_ptr, n):
    i = tl.multiple_of(tl.arange(0, 8) * n, [4])
    tl.store(out_ptr + tl.arange(0, 8), i.to(tl.float32))


@triton.jit
def divisible_runs(out_ptr, n, first):
    i = tl.multiple_of(tl.max_contiguous(tl.arange(0, 8) + first, [4]), [n])
    tl.store(out_ptr + tl.arange(0, 8), i.to(tl.float32))


@triton.jit
def divisible_scalar(out_ptr, n):
    tl.store(out_ptr, multiple(n, 4).to(tl.float32))


@triton.jit
def assumed(out_ptr, n):
    tl.assume(n > 2)
    tl.store(out_ptr, n.to(tl.float32))


FALSE = "FalseHint|Assume failed"


@pytest.mark.parametrize(("step", "axis", "true"), [(1, 1, True), (2, 1, False), (1, 0, False)])
def test_contiguity_of_addresses(step, axis, true):
    x, out = torch.arange(64.0), torch.empty(32)
    if true:
        contiguous_pairs[(1,)](x, out, step, axis)
        assert torch.equal(out, x[:32])
    else:
        with pytest.raises(Exception, match=FALSE):
            contiguous_pairs[(1,)](x, out, step, axis)


def test_divisibility_of_neighbours():
    """It is that of the first of each run of neighbours, as it is for the compiler."""
    out = torch.empty(8)
    divisible_runs[(1,)](out, 4, 12)
    with pytest.raises(Exception, match=FALSE):
        divisible_runs[(1,)](out, 4, 2)


@pytest.mark.parametrize(
    ("kernel", "true", "false"), [(constant_pairs, 2, 3), (divisible_offsets, 8, 6), (divisible_scalar, 8, 6), (assumed, 3, 2)]
)
def test_other_hints(kernel, true, false):
    out = torch.empty(8)
    kernel[(1,)](out, true)
    with pytest.raises(Exception, match=FALSE):
        kernel[(1,)](out, false)
