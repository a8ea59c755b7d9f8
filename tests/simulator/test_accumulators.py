"""Registers of wgmma: what may touch them, and when, whichever way leads there."""

import pytest

from simulator import Fault, accumulators
from simulator.launch import Program
from simulator.parser import parse
from tests.simulator.execute import execute, ptx

FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd1, %rd2, 1, 1, 1, 0, 0;"
OTHER = PRODUCT.replace("%r1, %r2, %r3, %r4", "%r11, %r12, %r13, %r14")
FROM_REGISTERS = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, {%r21, %r22, %r23, %r24}, %rd2, 1, 1, 1, 0;"
)
ZERO = "mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0; mov.b32 %r4, 0;"
READ = "add.s32 %r9, %r2, 1;"


def wait(left):
    return f"wgmma.wait_group.sync.aligned {left};"


SOUND = {
    "waited for": FENCE + PRODUCT + COMMIT + wait(0) + READ,
    "one after another": FENCE + PRODUCT + PRODUCT + COMMIT + PRODUCT + COMMIT + wait(0) + READ,
    "the group before the last": FENCE + PRODUCT + COMMIT + OTHER + COMMIT + wait(1) + READ,
    "moved before it is waited for": FENCE + PRODUCT + COMMIT + "mov.b32 %r5, %r2;" + wait(0) + "add.s32 %r9, %r5, 1;",
    "another register": FENCE + PRODUCT + COMMIT + "add.s32 %r9, %r8, 1;" + wait(0),
    "an operand that is read": FENCE + FROM_REGISTERS + COMMIT + "add.s32 %r9, %r21, 1;" + wait(0),
    "an operand that is changed later": FENCE + FROM_REGISTERS + COMMIT + wait(0) + "add.s32 %r21, %r21, 1;",
    "a loop that waits for the one before": (
        f"{ZERO} $loop: {FENCE} {PRODUCT} {COMMIT} {wait(1)} add.s32 %r9, %r9, 1; setp.lt.s32 %p1, %r9, 9; @%p1 bra $loop;"
        f"{wait(0)} {READ}"
    ),
    "a loop that moves its accumulators": (
        f"{ZERO} $loop: mov.b32 %r1, %r31; {FENCE} {PRODUCT} {COMMIT} mov.b32 %r31, %r1; add.s32 %r9, %r9, 1;"
        f"setp.lt.s32 %p1, %r9, 9; @%p1 bra $loop; {wait(0)} add.s32 %r8, %r31, 1;"
    ),
}
UNSOUND = {
    "not waited for": (FENCE + PRODUCT + COMMIT + READ, "touches register %r2, an accumulator"),
    "not committed": (FENCE + PRODUCT + wait(0) + READ, "touches register %r2, an accumulator"),
    "a group too few": (FENCE + PRODUCT + COMMIT + OTHER + COMMIT + wait(1) + "add.s32 %r9, %r12, 1;", "register %r12"),
    "written before it is waited for": (FENCE + PRODUCT + COMMIT + "add.s32 %r3, %r8, 1;", "touches register %r3"),
    "stored": (FENCE + PRODUCT + COMMIT + "st.global.b32 [%rd9], %r4;", "touches register %r4"),
    "a copy of it": (FENCE + PRODUCT + COMMIT + "mov.b32 %r5, %r2; add.s32 %r9, %r5, 1;", "touches register %r5"),
    "on one of two ways": (
        f"{FENCE} {PRODUCT} {COMMIT} setp.lt.s32 %p1, %r9, 9; @%p1 bra $there; {wait(0)} $there: {READ}", "touches register %r2"
    ),
    "the next time around": (
        f"$loop: {READ} {FENCE} {PRODUCT} {COMMIT} setp.lt.s32 %p1, %r9, 9; @%p1 bra $loop; {wait(0)}", "touches register %r2"
    ),
    "an operand that is changed": (FENCE + FROM_REGISTERS + COMMIT + "add.s32 %r21, %r21, 1;", "writes register %r21"),
    "another copied over an operand": (FENCE + FROM_REGISTERS + COMMIT + "mov.b32 %r21, %r8;", "writes register %r21"),
    "another copied over it": (FENCE + PRODUCT + COMMIT + "mov.b32 %r2, %r8;", "writes register %r2"),
    "an operand that is an accumulator": (
        FENCE + PRODUCT.replace("%r1, %r2, %r3, %r4", "%r21, %r22, %r23, %r24") + COMMIT + FROM_REGISTERS, "uses register %r21"
    ),
    "no fence at all": (PRODUCT + COMMIT + wait(0), "without a wgmma.fence"),
    "set behind the fence": (FENCE + "add.s32 %r1, %r8, 1;" + PRODUCT + COMMIT + wait(0), "uses register %r1, which something"),
    "an operand that is set behind the fence": (FENCE + "add.s32 %r22, %r8, 1;" + FROM_REGISTERS, "uses register %r22"),
    "a loop without a fence": (
        f"{ZERO} {FENCE} $loop: {PRODUCT} {COMMIT} {wait(0)} add.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, 9; @%p1 bra $loop;",
        "uses register %r1",
    ),
    "through a table": (
        f"{FENCE} {PRODUCT} {COMMIT} $table: .branchtargets $one, $two; brx.idx %r9, $table; $one: {wait(0)} $two: {READ}",
        "touches register %r2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SOUND)
def test_sound(what):
    assert accumulators.fault(parse(ptx(SOUND[what], threads=128))) is None


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound(what):
    body, text = UNSOUND[what]
    found = accumulators.fault(parse(ptx(body, threads=128)))
    assert found is not None
    assert text in found.what
    assert found.place is not None


def test_it_is_a_fault_of_the_launch():
    program = Program(ptx(UNSOUND["not waited for"][0], threads=128), 0)
    with pytest.raises(Fault, match=r"touches register %r2.*PTX line \d+"):
        program.run((1, 1, 1), None, [], None)


def test_kernels_without_wgmma_have_none():
    assert execute("mov.b32 %r1, 4;").program.fault is None
