"""Which orders of accesses of shared memory are races, one by one: between threads, warps, and proxies."""

import numpy as np
import pytest

from simulator import Fault, Options
from tests.simulator.execute import execute

# Each thread stores its own word; a neighbour is the next thread of its warp, a stranger the same thread of another warp.
MINE = "st.shared.b32 [%r1], %r9;"
BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"
NEIGHBOURS = "ld.shared.b32 %r5, [%r2];"
STRANGERS = "ld.shared.b32 %r6, [%r3];"
OTHER = "add.s32 %r9, %r9, 1;"


def run(body, races=True):
    t = np.arange(128)
    given = {
        "%r1": 1024 + 4 * t, "%r2": 1024 + 4 * (t // 32 * 32 + (t + 1) % 32), "%r3": 1024 + 4 * ((t + 32) % 128), "%r9": t,
    }  # fmt: skip
    given = {name: v.astype(np.int32) for name, v in given.items()}
    return execute(body, given, threads=128, shared_bytes=512, options=Options(races=races))


SOUND = {
    "own value": f"{MINE} ld.shared.b32 %r4, [%r1];",
    "a neighbour's, after the warp's barrier": f"{MINE} {WARP} {NEIGHBOURS}",
    "a neighbour's, after the block's barrier": f"{MINE} {BLOCK} {NEIGHBOURS}",
    "a stranger's, after the block's barrier": f"{MINE} {BLOCK} {STRANGERS}",
    "written again after all have read": f"{MINE} {BLOCK} {STRANGERS} {BLOCK} {OTHER} {MINE}",
    "written again after the warp has read": f"{MINE} {WARP} {NEIGHBOURS} {WARP} {OTHER} {MINE}",
    "own value again": f"{MINE} {OTHER} {MINE}",
    "read by many at once": f"{MINE} {BLOCK} mov.b32 %r7, 1024; ld.shared.b32 %r8, [%r7]; ld.shared.b32 %r8, [%r7];",
}
RACES = {
    "a neighbour's value": (f"{MINE} {NEIGHBOURS}", "that another thread wrote"),
    "a stranger's value": (f"{MINE} {STRANGERS}", "that another thread wrote"),
    "a stranger's, after the warp's barrier": (f"{MINE} {WARP} {STRANGERS}", "that another thread wrote since"),
    "written while strangers read": (f"{MINE} {BLOCK} {STRANGERS} {OTHER} {MINE}", "that another thread read"),
    "written while the warp reads": (f"{MINE} {WARP} {NEIGHBOURS} {OTHER} {MINE}", "that another thread read"),
    "written by a stranger": (f"{MINE} {OTHER} st.shared.b32 [%r3], %r9;", "another thread wrote other values"),
    "read by several warps, written by one of them": (
        f"{MINE} {BLOCK} mov.b32 %r7, 1024; ld.shared.b32 %r8, [%r7]; {WARP} {OTHER} {MINE}", "that another thread read"
    ),
    "read by one warp after another, written by the last": (
        f"{MINE} {BLOCK} setp.lt.s32 %p1, %r9, 32; setp.ge.s32 %p2, %r9, 96; @%p2 ld.shared.b32 %r8, [%r3]; {WARP}"
        f"@%p1 ld.shared.b32 %r8, [%r1]; {WARP} {OTHER} @%p1 {MINE}", "that another thread read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SOUND)
def test_ordered(what):
    run(SOUND[what])


@pytest.mark.parametrize("what", RACES)
def test_races(what):
    body, text = RACES[what]
    with pytest.raises(Fault, match=text):
        run(body)
    run(body, races=False)


def test_narrow_accesses_are_told_apart():
    """Two bytes side by side belong to two threads."""
    t = np.arange(32)
    given = {"%r1": (1024 + t).astype(np.int32), "%rs1": t.astype(np.uint16)}
    execute("st.shared.b8 [%r1], %rs1; ld.shared.u8 %rs2, [%r1];", given, shared_bytes=32)
