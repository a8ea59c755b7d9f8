"""Registers that an instruction reads before anything wrote them, whichever way leads there."""

import pytest

from simulator import Fault, run, unwritten
from simulator.parser import parse
from tests.simulator.execute import ptx

SET, READ = "mov.b32 %r1, 4;", "add.s32 %r2, %r1, 1;"
CHOOSE = "mov.u32 %r9, %tid.x; setp.lt.s32 %p1, %r9, 9;"
SOUND = {
    "written before": SET + READ,
    "on both ways": f"{CHOOSE} @%p1 bra $there; {SET} bra $end; $there: {SET} $end: {READ}",
    "under a guard": f"{CHOOSE} @%p1 {SET} {READ}",
    "in a loop, before it": f"{SET} {CHOOSE} $again: {READ} @%p1 bra $again;",
    "a pair": "elect.sync %r1|%p2, -1; @%p2 add.s32 %r2, %r1, 1;",
    "loaded": "mov.b32 %r3, 1024; ld.shared.v2.b32 {%r1, %r4}, [%r3];" + READ,
    "where no way leads": f"bra $end; {READ} $end: mov.b32 %r5, 0;",
    "a byte for another to replace": f"{SET} prmt.b32 %r2, %r1, %r7, 0x3340U; prmt.b32 %r2, %r2, %r1, 0x4010U;",
    "products that add to nothing": (
        "mov.b64 %rd1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd1, 0, 1, 1, 0, 0;"
    ),
}
UNSOUND = {
    "never written": (READ, "%r1"),
    "on one way only": (f"{CHOOSE} @%p1 bra $end; {SET} $end: {READ}", "%r1"),
    "on the other way only": (f"{CHOOSE} @%p1 bra $other; {SET} bra $end; $other: mov.b32 %r5, 0; $end: {READ}", "%r1"),
    "in a loop, behind it": (f"{CHOOSE} $again: {READ} {SET} @%p1 bra $again;", "%r1"),
    "a byte that is written later": (f"{SET} prmt.b32 %r2, %r1, %r7, 0x3340U; mov.b32 %r7, 1;", "%r7"),
    "a guard": (f"@%p7 {SET}", "%p7"),
    "a branch's guard": ("@%p7 bra $end; $end: mov.b32 %r5, 0;", "%p7"),
    "an address": ("ld.shared.b32 %r1, [%r6];", "%r6"),
    "what is stored": ("mov.b32 %r6, 1024; st.shared.v2.b32 [%r6], {%r6, %r7};", "%r7"),
    "what a copy reads": ("mov.b32 %r6, 1024; cp.async.cg.shared.global [%r6], [%rd8], 16;", "%rd8"),
    "what products add to": (
        "mov.b64 %rd1, 0; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4},"
        "%rd1, %rd1, 1, 1, 1, 0, 0;", "%r1",
    ),
    "through a table": (
        f"mov.u32 %r9, %tid.x; $table: .branchtargets $one, $two; brx.idx %r9, $table; $one: {SET} $two: {READ}", "%r1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SOUND)
def test_sound(what):
    assert unwritten.fault(parse(ptx(SOUND[what], threads=128))) is None


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound(what):
    body, register = UNSOUND[what]
    with pytest.raises(Fault, match=rf"reads register {register}, which nothing wrote on a way to here; .*PTX line"):
        run(ptx(body, threads=128), (1,), [])
