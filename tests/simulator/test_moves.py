"""Moves, selections, parameters, guards, and registers that tell a thread where it is."""

import numpy as np
import pytest

from simulator import Unsupported, global_memory
from simulator.arrays import LOADED, single
from tests.simulator.execute import execute, one

PREFIX = {"16": "rs", "32": "r", "64": "rd"}
KINDS = ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")


def random_bits(kind, count=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count * int(kind[1:]) // 8, np.uint8).view(f"u{int(kind[1:]) // 8}")


@pytest.mark.parametrize("kind", KINDS)
def test_move_and_select(kind):
    a, b = random_bits(kind, seed=1), random_bits(kind, seed=2)
    unsigned = "b" + kind[1:]
    assert one(f"mov.{kind}", (unsigned,), unsigned, [a]).view(a.dtype).tolist() == a.tolist()
    p = np.arange(64) % 3 == 0
    got = one(f"selp.{kind}", (unsigned, unsigned, "pred"), unsigned, [a, b, p])
    assert got.view(a.dtype).tolist() == np.where(p, a, b).tolist()


def test_literals():
    got = execute(
        "mov.b32 %r1, 0f3F800000; mov.b64 %rd1, 0d4000000000000000; mov.b32 %r2, -1; mov.b32 %r3, 0xFFU; mov.b16 %rs1, -2;"
        "mov.pred %p1, -1; mov.pred %p2, 0; mov.f32 %r4, 0f40000000;"
    )
    assert got.as_type("%r1", "f32")[0] == 1.0
    assert got.as_type("%rd1", "f64")[0] == 2.0
    assert (got["%r2"][0], got["%r3"][0], got["%rs1"][0]) == (-1, 255, 0xFFFE)
    assert got["%p1"].all()
    assert not got["%p2"].any()
    assert got.as_type("%r4", "f32")[0] == 2.0


def test_packing_and_unpacking():
    low, high = random_bits("b16", seed=1), random_bits("b16", seed=2)
    got = execute(
        "mov.b32 %r1, {%rs1, %rs2}; mov.b32 {%rs3, %rs4}, %r1; mov.b32 {_, %rs5}, %r1; mov.b64 %rd1, {%r1, %r2};"
        "mov.b64 {%r3, %r4}, %rd1;",
        {"%rs1": low, "%rs2": high, "%r2": np.arange(64, dtype=np.int32)}, threads=64,
    )  # fmt: skip
    assert got["%r1"].view(np.uint32).tolist() == [h << 16 | n for n, h in zip(low.tolist(), high.tolist(), strict=True)]
    assert got["%rs3"].tolist() == low.tolist()
    assert got["%rs4"].tolist() == got["%rs5"].tolist() == high.tolist()
    assert got["%r3"].tolist() == got["%r1"].tolist()
    assert got["%r4"].tolist() == list(range(64))
    assert (got["%rd1"] >> 32).tolist() == list(range(64))


def test_a_guard_leaves_other_threads_alone():
    old, new, p = np.arange(64, dtype=np.int32), -np.arange(64, dtype=np.int32), np.arange(64) % 2 == 0
    given = {"%r1": old, "%r2": new, "%p1": p}
    assert execute("@%p1 mov.b32 %r1, %r2;", given, threads=64)["%r1"].tolist() == np.where(p, new, old).tolist()
    assert execute("@!%p1 mov.b32 %r1, %r2;", given, threads=64)["%r1"].tolist() == np.where(p, old, new).tolist()


def test_a_guard_that_would_not_be_heeded_is_refused():
    with pytest.raises(Unsupported, match=r"a guard of bar\.warp\.sync"):
        execute("@%p1 bar.warp.sync -1;", {"%p1": np.ones(32, bool)})


def test_a_register_that_nothing_wrote_is_nan():
    got = execute("mov.b32 %r2, %r1; mov.b64 %rd2, %rd1; mov.b16 %rs2, %rs1;")
    assert np.isnan(got.as_type("%r2", "f32")).all()
    assert np.isnan(got.as_type("%rd2", "f64")).all()
    assert np.isnan(got.as_type("%rs2", "f16")).all()


def test_where_a_thread_is():
    got = execute(
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %nctaid.y; mov.u32 %r5, %laneid;"
        "mov.u32 %r6, %warpid; mov.u32 %r7, %tid.y;", threads=96,
    )  # fmt: skip
    assert got["%r1"].tolist() == list(range(96))
    assert [got[f"%r{i}"][0] for i in (2, 3, 4, 7)] == [0, 96, 1, 0]
    assert got["%r5"].tolist() == [t % 32 for t in range(96)]
    assert got["%r6"].tolist() == [t // 32 for t in range(96)]


def test_names_in_braces_are_of_their_own():
    got = execute("mov.b32 %r1, 1; { .reg .b32 tmp; mov.b32 tmp, 5; add.s32 %r1, %r1, tmp; } { .reg .b32 tmp; mov.b32 tmp, 7;"
                  "add.s32 %r1, %r1, tmp; }")  # fmt: skip
    assert got["%r1"][0] == 13


PARAMETERS = [
    ("u8", "%rs1", 200, 200), ("s8", "%rs1", 0xFF, 0xFFFF), ("b8", "%rs1", 7, 7),
    ("u16", "%rs1", 65535, 65535),
    ("s16", "%rs1", 0xFFFE, 0xFFFE), ("b16", "%rs1", 3, 3), ("u32", "%r1", 1 << 31, -(1 << 31)),
    ("s32", "%r1", -5, -5), ("b32", "%r1", 9, 9), ("f32", "%r1", 0x3F800000, 0x3F800000),
    ("u64", "%rd1", 1 << 63, -(1 << 63)), ("s64", "%rd1", -1, -1), ("b64", "%rd1", 12, 12),
    ("f64", "%rd1", 5, 5),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "register", "value", "right"), PARAMETERS)
def test_parameters(kind, register, value, right):
    given = single(value, LOADED[max(int(kind[1:]) // 8, 1)])
    got = execute(f"ld.param.{kind} {register}, [p];", parameters=f".param .{kind} p", arguments=[given])
    assert got[register][0] == right


def test_addresses_of_parameters_and_global_memory_are_generic():
    got = execute("cvta.to.global.u64 %rd2, %rd1; cvta.global.u64 %rd3, %rd1; cvta.to.param.u64 %rd4, %rd1;",
                  {"%rd1": np.arange(32)})  # fmt: skip
    for i in range(2, 5):
        assert got[f"%rd{i}"].tolist() == list(range(32))


def test_a_parameter_has_one_generic_address_however_wide_its_own_is():
    """Triton 3.9 takes it as 32 bits, those before as 64."""
    got = execute(
        "mov.b32 %r1, second; cvt.u64.u32 %rd1, %r1; cvta.param.u64 %rd2, %rd1;"
        "mov.b64 %rd3, second; cvta.param.u64 %rd4, %rd3;",
        parameters=".param .u64 first, .param .u64 second",
    )
    assert (got["%rd2"] == got["%rd4"]).all()
    assert (got["%rd2"] == (global_memory.PARAMETERS << global_memory.TAG) + 1).all()
