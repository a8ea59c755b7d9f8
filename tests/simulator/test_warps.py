"""Exchanges within a warp against the pseudo-code of PTX, lane by lane."""

import numpy as np
import pytest

from simulator import Unsupported
from tests.simulator.execute import execute


def shuffled(mode, lane, b, c):
    """(the source lane, whether it is in range), as PTX defines it."""
    segment_mask, clamp = c >> 8 & 31, c & 31
    max_lane = lane & segment_mask | clamp & ~segment_mask & 31
    min_lane = lane & segment_mask
    if mode == "up":
        j = lane - b
        inside = j >= max_lane
    elif mode == "down":
        j = lane + b
        inside = j <= max_lane
    elif mode == "bfly":
        j = lane ^ b
        inside = j <= max_lane
    else:
        j = min_lane | b & ~segment_mask & 31
        inside = j <= max_lane
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("segment", [32, 16, 8])
@pytest.mark.parametrize("by", [0, 1, 3, 16, 31])
def test_shuffle(mode, segment, by):
    clamp = (0 if mode == "up" else 31) | (32 - segment) << 8
    values = np.random.default_rng(by).integers(0, 1 << 31, 64).astype(np.int32)
    got = execute(f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;", {"%r1": values}, threads=64)
    for t in range(64):
        lane, inside = shuffled(mode, t % 32, by, clamp)
        assert got["%r2"][t] == values[t // 32 * 32 + lane]
        assert got["%p1"][t] == inside


def test_shuffle_by_lanes_of_each_threads_own():
    values, lanes = np.arange(64, dtype=np.int32), (np.arange(64, dtype=np.int32) * 7 + 3) % 32
    got = execute("shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;", {"%r1": values, "%r2": lanes}, threads=64)
    assert got["%r3"].tolist() == [t // 32 * 32 + lanes[t] for t in range(64)]


REDUCED = {
    ("add", "s32"): sum, ("add", "u32"): sum, ("min", "s32"): min, ("max", "s32"): max,
    ("min", "u32"): min, ("max", "u32"): max,
    ("and", "b32"): lambda v: np.bitwise_and.reduce(v), ("or", "b32"): lambda v: np.bitwise_or.reduce(v),
    ("xor", "b32"): lambda v: np.bitwise_xor.reduce(v),
}  # fmt: skip


@pytest.mark.parametrize(("op", "kind"), REDUCED)
def test_reduction(op, kind):
    values = np.random.default_rng(1).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)
    got = execute(f"redux.sync.{op}.{kind} %r2, %r1, -1;", {"%r1": values}, threads=64)["%r2"]
    seen = values.view(np.uint32) if kind == "u32" else values
    for warp in (0, 1):
        right = int(REDUCED[op, kind]([int(v) for v in seen[32 * warp : 32 * warp + 32]]))
        assert (got[32 * warp : 32 * warp + 32].view(np.uint32) == right % (1 << 32)).all()


def test_votes():
    p = np.arange(64) % 5 == 0
    p[32:] = False
    got = execute("vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1; vote.sync.ballot.b32 %r1, %p1, -1;",
                  {"%p1": p}, threads=64)  # fmt: skip
    assert got["%p2"].tolist() == [True] * 32 + [False] * 32
    assert not got["%p3"].any()
    assert got["%r1"].view(np.uint32).tolist() == [sum(1 << i for i in range(0, 32, 5))] * 32 + [0] * 32
    everyone = execute("vote.sync.all.pred %p3, %p1, -1;", {"%p1": np.ones(64, bool)}, threads=64)
    assert everyone["%p3"].all()


def test_one_thread_of_each_warp_is_elected():
    got = execute("elect.sync %r1|%p1, -1;", threads=64)
    assert got["%p1"].tolist() == [t % 32 == 0 for t in range(64)]
    assert got["%r1"].tolist() == [0] * 64


@pytest.mark.parametrize(
    "body", ["shfl.sync.idx.b32 %r2, %r1, 0, 31, 255;", "redux.sync.add.s32 %r2, %r1, 1;", "vote.sync.any.pred %p2, %p1, 3;",
             "elect.sync %r1|%p1, 15;", "bar.warp.sync 15;"],
)  # fmt: skip
def test_a_part_of_a_warp_is_refused(body):
    with pytest.raises(Unsupported, match="a part of a warp"):
        execute(body, {"%r1": np.zeros(32, np.int32), "%p1": np.zeros(32, bool)})


def test_a_part_of_a_warp_by_a_register_is_refused():
    with pytest.raises(Unsupported, match="a part of a warp"):
        execute("redux.sync.add.s32 %r2, %r1, %r3;", {"%r1": np.zeros(32, np.int32), "%r3": np.full(32, 7, np.int32)})
