"""Random problems by hypothesis, biased towards the corners: stride beyond the kernel, padding beyond it, shared factors."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tconv
from tests import oracle
from tests.test_autograd import function


@st.composite
def problems(draw):
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.booleans())
    small = st.integers(1, 3 if rank == 3 else 4)
    kernel = tuple(draw(small) for _ in range(rank))
    dilation = tuple(draw(small) for _ in range(rank))
    # Multiples of the dilation as often as not, so that phases share factors with it.
    stride = tuple(draw(st.one_of(st.integers(1, 4), st.sampled_from([d, 2 * d]))) for d in dilation)
    padding = tuple(draw(st.integers(0, t + 1)) for t in kernel)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.sampled_from([1, 1, 2, 5]))
    x = (draw(st.integers(1, 3)), groups * per_group, *(draw(st.integers(1, 9 if rank < 3 else 5)) for _ in range(rank)))
    k = groups * draw(st.sampled_from([1, 2, 3]))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)) if transposed else 0
    case = oracle.Case("random", x, k, kernel, stride, padding, dilation, groups, transposed, extra)
    for i in range(rank):
        reach = dilation[i] * (kernel[i] - 1) + 1
        out = (
            (x[2 + i] - 1) * stride[i] - 2 * padding[i] + reach + extra[i] if transposed else x[2 + i] + 2 * padding[i] - reach
        )
        assume(out >= (1 if transposed else 0))
        assume(out < 60)
    assume(math.prod(stride) <= 36)  # phases are programs, and the interpreter runs them one by one
    return case


COMMON = {
    "deadline": None, "derandomize": True, "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
}  # fmt: skip
DRAWN = {
    "case": problems(), "channels_last": st.booleans(), "flip": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
}  # fmt: skip


def check(case, device, channels_last, flip, dtype):
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    if flip:  # negative strides do not exist in torch; a transposed view is as odd as strides get
        x = x.transpose(-1, 1).contiguous().transpose(-1, 1)
    oracle.check(function(case), case, x, w, b)


@settings(max_examples=25, **COMMON)
@given(**DRAWN)
def test_random_problems(device, poisoned, case, channels_last, flip, dtype):
    check(case, device, channels_last, flip, dtype)


@pytest.mark.parametrize("kernel", ["packed", "packed_wgrad", "strip", "strip_wgrad"])
@settings(max_examples=10, **COMMON)
@given(**DRAWN)
def test_random_problems_by_one_kernel(device, poisoned, kernel, case, channels_last, flip, dtype):
    """For strips, the same with one filter per channel."""
    if kernel.startswith("strip"):
        channels = case.x[1]
        case = dataclasses.replace(case, k=channels, groups=channels)
        assume(channels > 1)
    with tconv.force(kernel=kernel):
        try:
            check(case, device, channels_last, flip, dtype)
        except ValueError as e:  # it says that it cannot take the problem, and does nothing
            assume("no tile" not in str(e))
            raise
