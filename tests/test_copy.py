"""Copies to channels last, by our own kernel, and how dimensions that lie one behind the other become one."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tconv.launching.launch import device_of, to_channels_last
from tconv.launching.memory_bound import prepare_copy
from tconv.launching.memory_format import FORMATS, addressing
from tconv.launching.prepare import prepare_gather
from tconv.planning.addressing import LIMIT, flattened
from tconv.planning.device import DEVICES, INTERPRETER
from tconv.planning.plan import force
from tconv.planning.problem import forward_problem, lift
from tests import oracle

TENSORS = {
    "less than a tile": lambda rand: rand(2, 5, 7, 9),
    "accesses of 16 bytes": lambda rand: rand(3, 64, 8, 16),
    "tails of pixels and channels": lambda rand: rand(3, 70, 5, 13),
    "one pixel of two": lambda rand: rand(9, 6, 1, 2)[..., 1:],
    "one dimension": lambda rand: rand(2, 5, 33),
    "three dimensions": lambda rand: rand(2, 6, 3, 4, 8),
    "a window, whose rows lie apart": lambda rand: rand(2, 9, 10, 8)[:, 1:, 2:, :5],
    "a window that keeps 16 bytes": lambda rand: rand(2, 8, 6, 32)[:, :, 1:, 8:24],
    "every other plane of a volume": lambda rand: rand(2, 8, 4, 6, 8)[:, :, ::2],
    "rows and columns exchanged": lambda rand: rand(2, 6, 8, 12).transpose(2, 3),
    "every other column": lambda rand: rand(2, 6, 9, 16)[..., ::2],
    "expanded images and columns": lambda rand: rand(1, 6, 2, 1).expand(3, 6, 2, 4),
    "an odd address": lambda rand: rand(2 * 8 * 64 + 1)[1:].view(2, 8, 8, 8),
    "a weight": lambda rand: rand(70, 40, 3, 3),
}


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_a_copy_is_the_same_in_channels_last(make, dtype, wide, device, poisoned):
    """With a GPU's tiles, also in the interpreter: so there are several, and promises that are not kept show."""
    t = make(lambda *shape: torch.randn(shape, dtype=dtype, device=device))
    launch = prepare_copy(None, t, device_of(t) if oracle.compiled() else DEVICES["H100"])
    (made,) = to_channels_last(dataclasses.replace(launch, constants=launch.constants | {"WIDE": wide}), t)
    assert torch.equal(made, t)
    if t.dim() == 3:
        made = made.unsqueeze(2)
    assert made.is_contiguous(memory_format=FORMATS[made.dim()])


def test_the_interpreter_copies_in_one_tile(device, poisoned):
    t = torch.randn(2, 70, 5, 13, device=device)
    launch = prepare_copy(None, t, INTERPRETER)
    assert launch.grid == (1,)
    assert torch.equal(*to_channels_last(launch, t), t)


@pytest.mark.parametrize(
    ("shape", "dtype", "read", "written"),
    [
        ((8, 64, 56, 56), torch.bfloat16, 8, 8),
        ((8, 64, 14, 14), torch.bfloat16, 4, 8),  # 196 pixels, 4 * 49
        ((8, 64, 7, 7), torch.bfloat16, 1, 8),
        ((8, 20, 7, 8), torch.float32, 4, 4),
        ((8, 6, 30), torch.float64, 2, 2),
        ((8, 3, 4, 30, 30), torch.float16, 8, 1),
    ],
    ids=str,
)
def test_accesses_are_as_wide_as_pixels_and_channels_allow(shape, dtype, read, written):
    constants = prepare_copy(None, torch.empty(shape, dtype=dtype, device="meta"), DEVICES["H100"]).constants
    assert (constants["RANK"], constants["X_VEC"], constants["Y_VEC"]) == (1, read, written)


@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_a_weight_that_32_bits_address_as_it_is_only_is_not_copied(pass_):
    """Expanded, it is small, and its copy is not; what is read beside it is copied all the same."""
    p = forward_problem((1, 16384, 32, 32), (16384, 16384, 3, 3), (1, 1), [(1, 1)] * 2, (1, 1), 1)
    x = torch.empty(p.shape("x"), dtype=torch.half, device="meta")
    w = torch.empty(1 << 20, dtype=torch.half, device="meta")
    expanded, small = w.as_strided(p.shape("w"), (9, 0, 3, 1)), w.as_strided((16384, 4096, 3, 3), (9, 0, 3, 1))
    assert expanded.numel() > LIMIT >= addressing(expanded).reach
    assert prepare_gather(pass_, p, x, expanded, None, x, DEVICES["H100"]).call.plan.staged == ()
    with force(staged=True):
        assert prepare_gather(pass_, p, x, expanded, None, x, DEVICES["H100"]).call.plan.staged == (
            ("dy" if pass_ == "dgrad" else "x"),
        )
        fewer = forward_problem((1, 4096, 32, 32), small.shape, (1, 1), [(1, 1)] * 2, (1, 1), 1)
        operands = (x, x[:, :4096]) if pass_ == "dgrad" else (x[:, :4096], x)
        assert "w" in prepare_gather(pass_, fewer, operands[0], small, None, operands[1], DEVICES["H100"]).call.plan.staged


def test_few_channels_get_tiles_of_few():
    blocks = {}
    for channels in (2, 3, 8, 9, 17, 33, 1000):
        constants = prepare_copy(None, torch.empty(8, channels, 64, dtype=torch.half, device="meta"), DEVICES["H100"]).constants
        blocks[channels] = constants["BLOCK_C"]
        assert constants["BLOCK_P"] * constants["BLOCK_C"] == 4096
    assert blocks == {2: 4, 3: 4, 8: 8, 9: 16, 17: 32, 33: 64, 1000: 64}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3))
def test_merged_dimensions_have_the_same_offsets_in_the_same_order(dimensions):
    """Each dimension is (extent, gap): it lies behind the one after it, with a gap between, or is expanded (2)."""
    strides, reach = [], 1
    for extent, gap in reversed(dimensions):
        strides.insert(0, 0 if gap == 2 else reach + gap)
        reach = max(reach, extent * strides[0])
    extents = [extent for extent, _ in dimensions]
    t = torch.empty(1000, device="meta").as_strided((2, 3, *extents), (7, 5, *strides))
    before = addressing(t)
    after, merged, rank = flattened(before, lift(extents, 1))

    def offsets(a, extents):
        return [sum(i * s for i, s in zip(at, a.spatial, strict=True)) for at in itertools.product(*map(range, extents))]

    assert offsets(after, merged) == offsets(before, lift(extents, 1))
    assert all(n == 1 for n in merged[: 3 - rank])
    assert rank <= max(1, sum(n > 1 for n in extents))
    if all(gap == 0 for _, gap in dimensions):
        assert rank == 1


def test_a_merged_extent_fits_32_bits():
    a = addressing(torch.empty((1, 2, 1 << 11, 1 << 11, 1 << 10), device="meta"))
    _, extents, rank = flattened(a, (1 << 11, 1 << 11, 1 << 10))
    assert (math.prod(extents), rank) == (1 << 32, 2)
    assert max(extents) <= LIMIT
