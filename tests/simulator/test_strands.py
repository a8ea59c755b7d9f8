"""Programs whose warps part: what they pass to each other in every order, what is a race between them, and what never ends.

Four warps. Each thread has its number in %r90, its warp's in %r91, its own word of shared memory in %r92, and that of the
thread two warps on in %r93. The first two warps go to $front; the others go on.
"""

import numpy as np
import pytest
import torch

from simulator import Fault, Options, Unsupported, run
from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.tensor_maps import TensorMap
from tests.simulator.execute import note_opcodes, ptx

SETUP = """
    mov.u32 %r90, %tid.x; shr.u32 %r91, %r90, 5; shl.b32 %r94, %r90, 2; add.s32 %r92, %r94, 1024;
    xor.b32 %r95, %r90, 64; shl.b32 %r95, %r95, 2; add.s32 %r93, %r95, 1024;
    ld.param.b64 %rd1, [out]; cvt.u64.u32 %rd2, %r94; add.s64 %rd3, %rd1, %rd2;
    and.b32 %r97, %r90, 63; setp.eq.b32 %p8, %r97, 0;
    setp.lt.u32 %p9, %r91, 2;
"""
PART = "@%p9 bra $front;"
MINE, OTHERS, STORE = "st.shared.b32 [%r92], %r90;", "ld.shared.b32 %r1, [%r93];", "st.global.b32 [%rd3], %r1;"
FIRST, SECOND = "mov.b32 %r80, 1536;", "mov.b32 %r81, 1544;"  # addresses of two mbarriers


def launch(body, seed=0, maxnreg=0, **options):
    out = torch.full((128,), -1, dtype=torch.int32)
    text = ptx(SETUP + body, 128, ".param .u64 .ptr .global .align 1 out")
    if maxnreg:
        text = text.replace(".reqntid 128", f".reqntid 128\n.maxnreg {maxnreg}")
    note_opcodes(text)
    run(text, (1,), [out], 512 + 64, Options(seed=seed, **options))
    return out.tolist()


def parted(back, front, before=""):
    return f"{before} {PART} {back} bra $end; $front: {front} bra $end; $end: mov.b32 %r99, 0;"


def init(count=1):
    """Two mbarriers that every warp may use, of which thread 0 and 64 arrive."""
    return (
        f"{FIRST} {SECOND} setp.eq.b32 %p7, %r90, 0; @%p7 mbarrier.init.shared::cta.b64 [%r80], {count};"
        f"@%p7 mbarrier.init.shared::cta.b64 [%r81], {count}; bar.sync 0;"
    )


def arrive(which, guard="@%p8"):
    return f"{guard} mbarrier.arrive.shared::cta.b64 _, [%r{which}];"


def wait(which, parity, name):
    return (
        f"{{ .reg .pred complete; {name}: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r{which}], {parity};"
        f"@!complete bra.uni {name}; }}"
    )


PASSED = {
    "each way its own": (parted("mov.b32 %r1, 7;" + STORE, "mov.b32 %r1, 5;" + STORE), [5] * 64 + [7] * 64),
    "a barrier of all, from two places": (
        parted(MINE + "bar.sync 1;" + OTHERS + STORE, MINE + "barrier.sync 1;" + OTHERS + STORE), [i ^ 64 for i in range(128)],
    ),
    "barriers of a half each": (
        parted(
            "mov.b32 %r1, %r90; bar.sync 2, 64;" + STORE,
            "mov.b32 %r1, %r91; barrier.sync.aligned 3, 64; bar.sync 3, 64;" + STORE,
        ),
        [i // 32 for i in range(64)] + [*range(64, 128)],
    ),
    "by an mbarrier": (
        parted(MINE + "bar.sync 2, 64;" + arrive(80) + "mov.b32 %r1, %r90;" + STORE, wait(80, 0, "a") + OTHERS + STORE, init()),
        [i ^ 64 for i in range(64)] + [*range(64, 128)],
    ),
    "to and fro": (  # the second waits before it writes anew until the first has read
        parted(
            MINE + "bar.sync 2, 64;" + arrive(80) + wait(81, 0, "b") + "st.shared.b32 [%r92], 9; mov.b32 %r1, 8;" + STORE,
            wait(80, 0, "a") + OTHERS + "bar.sync 3, 64;" + arrive(81) + STORE, init(),
        ),
        [i ^ 64 for i in range(64)] + [8] * 64,
    ),
    "every thread arrives": (
        parted(
            MINE + "bar.sync 2, 64;" + arrive(80, "") + "mov.b32 %r1, 1;" + STORE, wait(80, 0, "a") + OTHERS + STORE, init(64)
        ),
        [i ^ 64 for i in range(64)] + [1] * 64,
    ),
    "every thread arrives by itself": (  # which needs no barrier before
        parted(MINE + arrive(80, "") + "mov.b32 %r1, 1;" + STORE, wait(80, 0, "a") + OTHERS + STORE, init(64)),
        [i ^ 64 for i in range(64)] + [1] * 64,
    ),
    "a barrier that a guard gives to some warps": (
        "@%p9 " + MINE + "@%p9 bar.sync 2, 64; xor.b32 %r2, %r90, 32; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, 1024;"
        "mov.b32 %r1, 7; @%p9 ld.shared.b32 %r1, [%r2];" + STORE, [i ^ 32 for i in range(64)] + [7] * 64,
    ),
    "known at third hand": (  # warp 1 has not waited, but met warp 0 that has
        parted(
            MINE + "bar.sync 2, 64;" + arrive(80) + "mov.b32 %r1, 1;" + STORE,
            "setp.eq.b32 %p6, %r91, 1; @%p6 bra $met;" + wait(80, 0, "a") + "$met: bar.sync 3, 64;" + OTHERS + STORE, init(),
        ),
        [i ^ 64 for i in range(64)] + [1] * 64,
    ),
    "through a table": (
        "$table: .branchtargets $zero, $one, $two, $two; brx.idx %r91, $table; $zero: mov.b32 %r1, 10; bra $end;"
        "$one: mov.b32 %r1, 11; bra $end; $two: mov.b32 %r1, 12; $end:" + STORE,
        [10] * 32 + [11] * 32 + [12] * 64,
    ),
    "through a table in step": (
        "mov.b32 %r2, 1; $table: .branchtargets $zero, $one; brx.idx.uni %r2, $table; $zero: trap; $one: mov.b32 %r1, 11;"
        + STORE,
        [11] * 128,
    ),
    "parting twice": (
        parted("mov.b32 %r1, 7;" + STORE, "setp.eq.b32 %p6, %r91, 0; @%p6 bra $zero; mov.b32 %r1, 1; bra $one;"
               "$zero: mov.b32 %r1, 0; $one:" + STORE), [0] * 32 + [1] * 32 + [7] * 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("what", PASSED)
def test_warps_that_part(what, seed):
    body, right = PASSED[what]
    assert launch(body, seed) == right


RACES = {
    "without any barrier": parted(MINE, OTHERS, MINE + "bar.sync 0;"),
    "barriers of a half each do not order the halves": parted(
        MINE + "bar.sync 2, 64;", "bar.sync 3, 64;" + OTHERS, MINE + "bar.sync 0;"
    ),
    "an arrival before the others of its half are done": parted(MINE + arrive(80), wait(80, 0, "a") + OTHERS, init()),
    "waiting for another mbarrier": parted(
        arrive(81) + MINE + "bar.sync 2, 64;" + arrive(80), wait(81, 0, "a") + OTHERS, init() + MINE + "bar.sync 0;"
    ),
    "written anew before the other has read": parted(
        MINE + "bar.sync 2, 64;" + arrive(80) + wait(81, 0, "b") + "st.shared.b32 [%r92], 9;",
        wait(80, 0, "a") + arrive(81) + OTHERS, init(),
    ),
    "all store one value, and one of them another": (
        "mov.b32 %r7, 1024; st.shared.b32 [%r7], 5; setp.eq.b32 %p1, %r90, 127; @%p1 st.shared.b32 [%r7], 6;"
    ),
    "both store one value, and one of them another": parted(
        "mov.b32 %r7, 1024; st.shared.b32 [%r7], 5; bar.sync 2, 64; @%p8 st.shared.b32 [%r7], 6;",
        "mov.b32 %r7, 1024; st.shared.b32 [%r7], 5;",
    ),
    "an mbarrier that ends while others wait at it": (
        init() + arrive(80, "@%p7") + wait(80, 0, "a") + "@%p7 mbarrier.inval.shared::cta.b64 [%r80];"
    ),
    "written by both": parted(MINE, "st.shared.b32 [%r93], 0;"),
    "an mbarrier that is just being initialised": parted(
        "bar.sync 2, 64;" + arrive(80), wait(80, 0, "a"), init().replace("bar.sync 0;", "")
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RACES)
def test_races_between_warps_that_part(what):
    """Whichever comes first: the order of their instructions hides none."""
    words = "that another thread (wrote|read) since the last barrier|where another thread wrote other values"
    for seed in range(6):
        with pytest.raises(Fault, match=words):
            launch(RACES[what], seed)


BOX = """
    mov.u32 %r90, %tid.x; shr.u32 %r91, %r90, 5; shl.b32 %r94, %r90, 2; add.s32 %r92, %r94, 1024; and.b32 %r97, %r90, 63;
    setp.eq.b32 %p8, %r97, 0; setp.lt.u32 %p9, %r91, 2; mov.b64 %rd1, map; mov.b32 %r60, 1024; mov.b32 %r61, 1280;
"""
PROXY = "fence.proxy.async.shared::cta;"
DONE = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"


def stored(which, guard="@%p8"):
    """Stores a box of 64 words: the first ones of shared memory (0), or the next ones (1)."""
    return f"{guard} cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd1, {{{64 * which}}}], [%r6{which}];"


def boxed(body, seed):
    """Runs a body with a map of 128 words, of which it may store boxes."""
    tensor = torch.zeros(128, dtype=torch.int32)
    memory = GlobalMemory()
    maps = {0: TensorMap(memory.pointer(tensor), 4, (128,), (), (64,), 0)}
    program = Program(ptx(BOX + body, 128, ".param .align 64 .b8 map[128]"), 512 + 64)
    program.run((1, 1, 1), memory, [maps[0]], Options(seed=seed))
    return tensor.tolist()


BACK = MINE + "bar.sync 2, 64;" + arrive(80)
FENCED = {  # what the last two warps write, the first two store
    "by the writer": (parted(MINE + PROXY + "bar.sync 2, 64;" + arrive(80), wait(80, 0, "a") + stored(1) + DONE, init()), None),
    "by whoever asks": (parted(BACK, wait(80, 0, "a") + PROXY + stored(1) + DONE, init()), None),
    "by a third warp on the way": (  # from warp 2 by warp 3 to warp 0
        MINE + "bar.sync 0; setp.eq.b32 %p1, %r91, 3; @!%p1 bra $past;" + PROXY + "$past: bar.sync 1;" + stored(1) + DONE, None
    ),
    "by the writer, too late": (
        parted(BACK + PROXY, wait(80, 0, "a") + stored(1) + DONE, init()), "without a fence"
    ),
    "by whoever asks, too early": (
        parted(BACK, PROXY + wait(80, 0, "a") + stored(1) + DONE, init()), "without a fence"
    ),
    "of another warp's box": (  # warp 0 stores one, warp 2 the other; each has waited for its own
        MINE + PROXY + "bar.sync 0;"
        + parted(stored(1) + DONE, stored(0) + DONE + "bar.sync 2, 64; add.s32 %r92, %r92, 256;" + MINE),
        "still reading|(read|wrote) since the last barrier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FENCED)
def test_boxes_of_warps_that_part(what):
    body, text = FENCED[what]
    for seed in range(6):
        if text is None:
            assert boxed(body, seed) == [0] * 64 + [*range(64, 128)]
        else:
            with pytest.raises(Fault, match=text):
                boxed(body, seed)


def test_mbarriers_of_programs_at_different_places():
    """One program's second mbarrier is where the other's first is; each keeps what those who arrived knew."""
    body = SETUP + (
        "mov.u32 %r2, %ctaid.x; shl.b32 %r3, %r2, 3; add.s32 %r80, %r3, 1536; sub.s32 %r81, 1544, %r3;"
        "setp.eq.b32 %p7, %r90, 0;"
        "@%p7 mbarrier.init.shared::cta.b64 [%r80], 1; bar.sync 0; setp.eq.b32 %p6, %r91, 0; @%p6 "
        + MINE
        + "bar.warp.sync -1;"
        + arrive(80, "@%p7")
        + "@%p7 mbarrier.init.shared::cta.b64 [%r81], 1;"
        + wait(80, 0, "a")
        + "and.b32 %r4, %r94, 127; add.s32 %r4, %r4, 1024; ld.shared.b32 %r1, [%r4];"
        "shl.b32 %r5, %r2, 9; cvt.u64.u32 %rd4, %r5; add.s64 %rd3, %rd3, %rd4;" + STORE
    )
    for batch in (128, 8192):
        out = torch.full((2, 128), -1, dtype=torch.int32)
        text = ptx(body, 128, ".param .u64 .ptr .global .align 1 out")
        run(text, (2,), [out], 512 + 64, Options(threads_at_once=batch))
        assert out.tolist() == [[i % 32 for i in range(128)]] * 2


DEADLOCKS = {
    "nobody arrives": (
        parted("mov.b32 %r1, 0;", wait(80, 0, "a"), init()),
        r"waits for ever: 1 arrivals and 0 bytes are missing \(warps 0 to 1; warps 2 to 3 are done\)",
    ),
    "the other parity": (
        parted("bar.sync 2, 64;" + arrive(80), wait(80, 1, "a") + wait(80, 0, "b") + wait(80, 1, "c"), init()),
        "waits for ever",
    ),
    "each waits for the other": (
        parted(wait(81, 0, "b") + arrive(80), wait(80, 0, "a") + arrive(81), init()),
        r"1 arrivals and 0 bytes are missing \(warps \d to \d; warps \d to \d, at PTX line \d+",
    ),
    "a barrier that some never come to": (
        parted("bar.sync 1;", "mov.b32 %r1, 0;"),
        r"waits for ever: 64 threads are missing at barrier 1 of 128 \(warps 2 to 3; warps 0 to 1 are done\)",
    ),
    "different barriers": (parted("bar.sync 1;", "bar.sync 2;"), "64 threads are missing at barrier [12] of 128"),
    "registers that nobody gives back": (
        parted("setmaxnreg.inc.sync.aligned.u32 200;", "setmaxnreg.dec.sync.aligned.u32 160;"),
        "waits for ever for 200 registers per thread",
    ),
}  # fmt: skip
CONFUSED = {
    "counts that differ": (parted("bar.sync 1, 96;", "bar.sync 1, 128;"), "to which others came as one of"),
    "more threads than it is of": (parted("bar.sync 1, 96;", "bar.sync 1, 96;"), "128 threads come to barrier 1 of 96"),
    "data where an mbarrier is": (init() + "@%p7 st.shared.b32 [%r80], 77;", "writes 4 bytes .* where a live mbarrier"),
    "registers for all, in step": ("setmaxnreg.inc.sync.aligned.u32 200;", "waits for ever for 200 registers"),
    "in step, of fewer": ("bar.sync 1, 64;", "128 threads come to a barrier of 64"),
    "beyond a table": (
        "mov.b32 %r2, 2; $table: .branchtargets $zero, $one; brx.idx %r2, $table; $zero: $one: mov.b32 %r1, 1;", "entry 2 of 2",
    ),
    "one warp that does not end": (parted("$for_ever: bra $for_ever;", "mov.b32 %r1, 0;"), "not done after 400 basic blocks"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEADLOCKS)
def test_deadlocks(what):
    body, text = DEADLOCKS[what]
    for seed in range(3):
        with pytest.raises(Fault, match=text) as e:
            launch(body, seed, maxnreg=168)
        assert e.value.place is not None
        assert e.value.program == (0, 0, 0)


@pytest.mark.parametrize("what", CONFUSED)
def test_what_no_order_makes_right(what):
    body, text = CONFUSED[what]
    with pytest.raises(Fault, match=text):
        launch(body, maxnreg=168, max_steps=400)


def test_registers_are_given_and_taken():
    """Two warps wait for the registers that the other two give back."""
    give, take = "setmaxnreg.dec.sync.aligned.u32 136;", "setmaxnreg.inc.sync.aligned.u32 200;"
    for seed in range(4):
        body = parted(give + "mov.b32 %r1, 1;" + STORE, take + "mov.b32 %r1, 2;" + STORE)
        assert launch(body, seed, 168) == [2] * 64 + [1] * 64
    body = parted("mov.b32 %r1, 1;" + STORE, take + "mov.b32 %r1, 2;" + STORE, give)  # all give some back before they part
    assert launch(body, 0, 168) == [2] * 64 + [1] * 64
    with pytest.raises(Unsupported, match=r"several phases in one instruction"):
        launch(init() + arrive(80, "@%p7") + "and.b32 %r50, %r91, 1;" + wait(80, "%r50", "a"))
    with pytest.raises(Unsupported, match=r"without \.maxnreg"):
        launch(parted(give, take))
    with pytest.raises(Unsupported, match="20 registers"):
        launch("setmaxnreg.dec.sync.aligned.u32 20;")


@pytest.mark.parametrize(
    "under_way",
    [
        "cp.async.ca.shared.global [%r92], [%rd3], 4;",
        "cp.async.ca.shared.global [%r92], [%rd3], 4; cp.async.commit_group;",
    ],
)
def test_what_is_under_way_where_warps_part_is_refused(under_way):
    with pytest.raises(Unsupported, match="warps that part with asynchronous copies"):
        launch(parted("mov.b32 %r1, 0;", "mov.b32 %r1, 0;", under_way))


def test_programs_part_each_for_itself():
    """Odd programs stay in step, of even ones the warps part; every thread of every program stores."""
    body = SETUP + (
        "mov.u32 %r2, %ctaid.x; and.b32 %r3, %r2, 1; setp.eq.b32 %p1, %r3, 0; and.pred %p2, %p1, %p9; mov.b32 %r1, 1;"
        "@%p2 bra $front; bra $end; $front: mov.b32 %r1, 2; $end:"
        "shl.b32 %r4, %r2, 9; cvt.u64.u32 %rd4, %r4; add.s64 %rd3, %rd3, %rd4;" + STORE
    )
    out = torch.full((6, 128), -1, dtype=torch.int32)
    run(ptx(body, 128, ".param .u64 .ptr .global .align 1 out"), (6,), [out], 512)
    right = np.ones((6, 128), np.int32)
    right[::2, :64] = 2
    assert (out.numpy() == right).all()


def test_the_thread_of_an_assertion_is_told():
    body = "setp.ne.b32 %p1, %r90, 70; @%p1 bra $fine; call.uni __assertfail, (param0); $fine: mov.b32 %r1, 0;"
    with pytest.raises(Fault, match="an assertion of the kernel fails") as e:
        launch(body)
    assert e.value.thread == 70
