"""Jumps and ends; programs that part; what does not end; what the kernel itself says is wrong."""

import re

import numpy as np
import pytest
import torch

from simulator import Fault, Options, Unsupported, run
from tests.simulator.execute import execute, ptx

OUT = ".param .u64 .ptr .global .align 1 out"
STORE = (
    "mov.u32 %r1, %ctaid.x; mul.wide.s32 %rd2, %r1, 4; ld.param.b64 %rd1, [out]; add.s64 %rd3, %rd1, %rd2;"
    "st.global.b32 [%rd3], %r9;"
)


def launch(body, grid=(40,), options=None):
    """What each program of a grid stores at its own place."""
    out = torch.full((grid[0],), -1, dtype=torch.int32)
    run(ptx(body, parameters=OUT), grid, [out], options=options or Options())
    return out.tolist()


def test_each_program_loops_as_often_as_it_likes():
    body = """
        mov.u32 %r1, %ctaid.x; mov.b32 %r9, 0; mov.b32 %r2, 0;
    $loop:
        setp.ge.s32 %p1, %r2, %r1; @%p1 bra $done;
        add.s32 %r9, %r9, %r2; add.s32 %r2, %r2, 1; bra.uni $loop;
    $done:
    """ + STORE  # fmt: skip
    right = [i * (i - 1) // 2 for i in range(40)]
    assert launch(body) == right
    assert launch(body, options=Options(threads_at_once=96)) == right


def test_both_ways_of_a_branch():
    body = """
        mov.u32 %r1, %ctaid.x; and.b32 %r2, %r1, 1; setp.eq.b32 %p1, %r2, 0; @!%p1 bra $odd;
        mov.b32 %r9, 100; bra $end;
    $odd: mov.b32 %r9, 200;
    $end:
    """ + STORE  # fmt: skip
    assert launch(body) == [100, 200] * 20


def test_programs_that_part_keep_their_memory_and_copies():
    """Each program copies its own words; then every second one takes another way, with the copy under way."""
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; shl.b32 %r3, %r2, 2; add.s32 %r4, %r3, 1024; ld.param.b64 %rd1, [x];
        mad.lo.s32 %r5, %r1, 128, %r3; cvt.s64.s32 %rd2, %r5; add.s64 %rd3, %rd1, %rd2;
        cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group;
        and.b32 %r6, %r1, 1; setp.eq.b32 %p1, %r6, 0; mov.b32 %r7, 5; @%p1 bra $even; mov.b32 %r7, 7;
    $even:
        cp.async.wait_group 0; ld.shared.b32 %r8, [%r4]; add.s32 %r9, %r8, %r7; st.global.b32 [%rd3], %r9;
    """
    x = torch.arange(320, dtype=torch.int32)
    right = (x + torch.tensor([5, 7]).repeat(5).repeat_interleave(32)).tolist()
    run(ptx(body, parameters=".param .u64 .ptr .global .align 1 x"), (10,), [x], shared_bytes=128)
    assert x.tolist() == right


def test_a_grid_of_three_dimensions():
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.s32 %r6, %r3, %r5, %r2; mad.lo.s32 %r7, %r6, %r4, %r1; mul.wide.s32 %rd2, %r7, 4; ld.param.b64 %rd1, [out];
        add.s64 %rd3, %rd1, %rd2; mad.lo.s32 %r8, %r3, 100, %r1; mad.lo.s32 %r8, %r2, 10, %r8; st.global.b32 [%rd3], %r8;
    """
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    run(ptx(body, parameters=OUT), (4, 3, 2), [out])
    assert out.tolist() == [[[100 * z + 10 * y + x for x in range(4)] for y in range(3)] for z in range(2)]


def test_threads_of_one_warp_that_part_are_refused():
    body = "mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 5; @%p1 bra $there; mov.b32 %r2, 0; $there: mov.b32 %r3, 0;"
    with pytest.raises(Unsupported, match="threads of one warp that part, as thread 5 does"):
        execute(body)


def test_what_does_not_end_is_stopped_and_says_where():
    text = "mov.b32 %r1, 1;\n    $loop:\n    add.s32 %r1, %r1, 1;\n    bra $loop;"
    with pytest.raises(Fault, match="not done after 500 basic blocks") as e:
        run(ptx(text), (1,), [], options=Options(max_steps=500))
    assert e.value.place.text == "add.s32 %r1, %r1, 1;"
    with pytest.raises(Fault, match=f"not done after {Options().max_steps} basic blocks"):
        run(ptx(text), (1,), [])


def test_programs_that_write_one_address():
    same = "ld.param.b64 %rd1, [out]; mov.b32 %r1, 3; st.global.b32 [%rd1], %r1;"
    out = torch.zeros(1, dtype=torch.int32)
    run(ptx(same, parameters=OUT), (5,), [out])
    assert out.tolist() == [3]
    different = ptx(same.replace("mov.b32 %r1, 3", "mov.u32 %r1, %ctaid.x"), parameters=OUT)
    with pytest.raises(Fault, match="perhaps of another program, writes other values at once"):
        run(different, (5,), [out])
    with pytest.raises(Fault, match="not as another program of the launch wrote them") as e:
        run(different, (5,), [out], options=Options(threads_at_once=32))
    assert e.value.program == (1, 0, 0)


def test_a_value_that_programs_agree_on_is_nobodys_to_change():
    """Whichever of them wrote it last."""
    text = "ld.param.b64 %rd1, [out]; st.global.b32 [%rd1], 5; mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, WHO;"
    text += "@%p1 st.global.b32 [%rd1], 6;"
    for who in ("0", "2"):
        with pytest.raises(Fault, match="not as another program of the launch wrote them"):
            run(ptx(text.replace("WHO", who), parameters=OUT), (3,), [torch.zeros(1, dtype=torch.int32)])


def test_a_program_that_reads_what_another_wrote():
    wrong = (
        "mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, 0; ld.param.b64 %rd1, [out]; @%p1 bra $first;"
        "ld.global.b32 %r2, [%rd1]; bra $end; $first: st.global.b32 [%rd1], 1; $end: mov.b32 %r3, 0;"
    )
    for batch in (32, 8192):
        with pytest.raises(Fault, match="reads 4 bytes that another program of the launch wrote"):
            run(ptx(wrong, parameters=OUT), (2,), [torch.zeros(1)], options=Options(threads_at_once=batch))
    own = "ld.param.b64 %rd1, [out]; st.global.b32 [%rd1], 1; ld.global.b32 %r2, [%rd1];"
    run(ptx(own, parameters=OUT), (1,), [torch.zeros(1)])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("trap;", "the kernel traps"),
        (
            ".param .b64 param0; st.param.b64 [param0], 1; st.param.b32 [param1], 1; call.uni __assertfail, (param0);",
            "assertion",
        ),
    ],
)
def test_what_the_kernel_itself_finds_wrong(body, text):
    with pytest.raises(Fault, match=text):
        execute(body)


@pytest.mark.parametrize("threads", [7, 32])
def test_a_barrier_to_which_only_some_threads_come(threads):
    given = {"%r1": np.arange(64, dtype=np.int32)}
    with pytest.raises(Fault, match="only some threads of the program come to this barrier") as e:
        execute(f"setp.lt.s32 %p1, %r1, {threads}; @%p1 bar.sync 0;", given, threads=64)
    assert e.value.thread == threads
    execute("setp.lt.s32 %p1, %r1, 64; @%p1 bar.sync 0; @!%p1 bar.sync 0;", given, threads=64)


def test_a_barrier_that_a_guard_skips_orders_nothing():
    given = {"%r1": np.arange(1024, 1280, 4, dtype=np.int32), "%r2": np.roll(np.arange(1024, 1280, 4, dtype=np.int32), 32)}
    body = "setp.{}.s32 %p1, %r1, 0; st.shared.b32 [%r1], %r1; @%p1 bar.sync 0; ld.shared.b32 %r3, [%r2];"
    execute(body.format("gt"), given, threads=64, shared_bytes=256)
    with pytest.raises(Fault, match="another thread wrote"):
        execute(body.format("lt"), given, threads=64, shared_bytes=256)


def test_a_barrier_of_some_of_the_programs_is_refused():
    with pytest.raises(Unsupported, match="a barrier of some of the programs"):
        launch("mov.u32 %r1, %ctaid.x; mov.b32 %r9, 0; setp.eq.s32 %p1, %r1, 0; @%p1 bar.sync 0;" + STORE)


@pytest.mark.parametrize("body", ["bar.sync 16;", "bar.sync 0, 33;", "call.uni other, (param0);", "bra nowhere;"])
def test_refused(body):
    with pytest.raises(Unsupported, match=re.escape(body.split()[0])):
        execute(body)


def test_what_only_orders_launches_or_registers_changes_nothing():
    got = execute(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; wgmma.fence.sync.aligned; fence.proxy.async; mov.b32 %r1, 4;"
    )
    assert got["%r1"][0] == 4
