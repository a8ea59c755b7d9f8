"""Counts of launches, each worked by hand."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import simulator
from simulator import Fault, resources, run
from simulator.counters import Access, Operand
from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.loops import loops
from simulator.options import DEFAULT
from simulator.parser import parse
from simulator.pipes import PIPES, pipe
from simulator.tensor_maps import TensorMap
from simulator.translator import FORMS
from tests.simulator.execute import ptx

X = ".param .u64 .ptr .global .align 1 x"
THREAD = "ld.param.b64 %rd1, [x]; mov.u32 %r1, %tid.x;"  # %rd1: the tensor; %r1: the thread


def counted(body, tensor=None, grid=(1,), threads=32, shared_bytes=0, options=DEFAULT):
    """The counts of one launch of a body, which finds the tensor in %rd1 and the thread in %r1."""
    tensor = torch.zeros(1 << 14, dtype=torch.uint8) if tensor is None else tensor
    body = body.replace(";", ";\n")  # accesses are told apart by their lines
    with simulator.profile() as counts:
        run(ptx(THREAD + body, threads, X), grid, [tensor], shared_bytes, options)
    (found,) = counts.launches
    return found


def line_of(counts, text):
    """The line of the one access whose opcode begins so."""
    (line,) = (line for line, opcode in counts.code.opcodes.items() if opcode.startswith(text))
    return line


# --- pipes ---


def test_every_known_opcode_has_a_pipe():
    used = {pipe(opcode) for opcode in FORMS}
    assert used == set(PIPES)


KNOWN = {
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16": "tensor", "wgmma.wait_group.sync.aligned": "wait",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64": "tensor", "fma.rn.f32": "fma", "fma.rn.f64": "fp64",
    "add.s32": "integer", "add.f32": "fma", "mul.f64": "fp64", "mul.wide.s32": "integer", "setp.lt.f32": "integer",
    "max.f32": "integer",
    "setp.lt.f64": "fp64", "ld.global.v4.b32": "global", "ld.shared.b32": "shared", "st.shared::cta.v4.b32": "shared",
    "ld.param.b64": "move", "cp.async.cg.shared.global": "global", "cp.async.wait_group": "wait",
    "cp.async.bulk.commit_group": "wait", "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "shared", "ex2.approx.f32": "special",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group": "boxes", "div.s32": "special", "cvt.rn.bf16.f32": "convert",
    "shfl.sync.bfly.b32": "warp", "bar.sync": "wait", "bar.warp.sync": "wait", "bra.uni": "control", "ret": "control",
    "min.u64": "integer", "fma.rn.bf16x2": "fma",
}  # fmt: skip


@pytest.mark.parametrize("opcode", KNOWN)
def test_pipes(opcode):
    assert opcode in FORMS
    assert pipe(opcode) == KNOWN[opcode]


def test_nothing_is_counted_outside_the_block_or_of_a_launch_that_faults():
    body = "ld.global.b32 %r2, [%rd1];"
    with simulator.profile() as counts:
        pass
    run(ptx(THREAD + body, 32, X), (1,), [torch.zeros(1)])
    assert (counts.launches, str(counts)) == ([], "no launches")
    with simulator.profile() as counts, pytest.raises(Fault):
        run(ptx(THREAD + body, 32, X), (1,), [torch.zeros(0)])
    assert counts.launches == []


# --- loops ---

LOOP = "mov.b32 %r2, 0; $loop: add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, 5; @%p1 bra $loop; mov.b32 %r4, 0;"


@pytest.mark.parametrize("threads_at_once", [64, 8192])
def test_a_loop_that_asks_at_its_end(threads_at_once):
    c = counted(LOOP, grid=(3,), threads=64, options=simulator.Options(threads_at_once=threads_at_once))
    assert (c.launches, c.programs, c.warps) == (1, 3, 2)
    (loop,) = c.loops
    assert loop.iterations == 5 * 3 * 2
    assert loop.instructions == {"integer": 2 * 30, "control": 30}
    assert c.instructions(inside=True) == loop.instructions
    assert c.instructions(inside=False) == {"move": 4 * 6, "control": 6}
    assert c.instructions() == {"integer": 60, "control": 36, "move": 24}


def test_programs_loop_as_often_as_they_like_and_loops_lie_in_loops():
    """Program i: i iterations, each of 2 inner ones; the outer loop asks at its beginning, in a block of its own."""
    c = counted(
        """mov.u32 %r9, %ctaid.x; mov.b32 %r2, 0;
    $outer: setp.ge.s32 %p1, %r2, %r9; @%p1 bra $done;
        mov.b32 %r3, 0;
    $inner: add.s32 %r3, %r3, 1; setp.lt.s32 %p2, %r3, 2; @%p2 bra $inner;
        add.s32 %r2, %r2, 1; bra.uni $outer;
    $done:""",
        grid=(4,),
    )
    outer, inner = c.loops
    assert (outer.iterations, inner.iterations) == (0 + 1 + 2 + 3, 2 * 6)
    assert inner.loop.blocks < outer.loop.blocks
    assert inner.instructions == {"integer": 2 * 12, "control": 12}
    assert outer.instructions == {"integer": 24 + 10 + 6, "control": 12 + 10 + 6, "move": 6}  # it also asks when it ends
    assert c.main_loop.loop == outer.loop


def test_what_waits_for_an_mbarrier_is_no_loop():
    wait = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r90], 0; @!done bra.uni again; }"
    assert loops(parse(ptx(wait))) == []
    assert len(loops(parse(ptx(LOOP)))) == 1


def test_a_loop_through_a_table_of_jumps():
    """Two warps, of which the second goes round once more; each meets the other at the end."""
    c = counted(
        """mov.b32 %r2, 0; shr.u32 %r3, %r1, 5;
    $loop: add.s32 %r2, %r2, 1; setp.gt.u32 %p1, %r2, %r3; selp.b32 %r4, 1, 0, %p1;
        $table: .branchtargets $loop, $done; brx.idx %r4, $table;
    $done: bar.sync 0;""",
        threads=64,
    )
    (loop,) = c.loops
    assert loop.iterations == 1 + 2
    assert c.waits == {"barriers": 2}


# --- global memory ---

PLACES = {  # name: (bytes between threads, first byte, bytes a thread, sectors of a warp, the least, different bytes)
    "side by side": (4, 0, 4, 4, 4, 128),
    "side by side, not from a sector's beginning": (4, 16, 4, 5, 4, 128),
    "every eighth byte": (8, 0, 4, 8, 4, 128),
    "a sector each": (32, 0, 4, 32, 4, 128),
    "all the same": (0, 4, 4, 1, 1, 4),
    "16 bytes": (16, 0, 16, 16, 16, 512),
    "2 bytes": (2, 0, 2, 2, 2, 64),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["reads", "writes"])
def test_sectors(place, kind):
    step, first, size, sectors, least, bytes_ = PLACES[place]
    type_ = {2: "b16", 4: "b32", 16: "v2.b64"}[size]
    registers = {2: "%rs2", 4: "%r3", 16: "{%rd5, %rd6}"}[size]
    address = f"mul.wide.s32 %rd2, %r1, {step}; add.s64 %rd3, %rd1, %rd2; mov.b16 %rs2, 0; mov.b32 %r3, 0; mov.b64 %rd5, 0; "
    address += "mov.b64 %rd6, 0;"
    access = f"ld.global.{type_} {registers}, [%rd3 + {first}];"
    if kind == "writes":
        access = f"st.global.{type_} [%rd3 + {first}], {registers};"
    c = counted(address + access)
    (found,) = c.memory("global").values()
    assert found == Access(1, sectors, least, bytes_)
    assert getattr(c, kind) == {"argument 0": Operand(bytes_, 32 * sectors, 32 * sectors)}
    assert getattr(c, {"reads": "writes", "writes": "reads"}[kind]) == {}


def test_threads_that_are_turned_off_ask_for_nothing():
    """Of two warps the second asks for nothing, of the first every second thread."""
    c = counted(
        """and.b32 %r2, %r1, 33; setp.eq.b32 %p1, %r2, 0; mul.wide.s32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
        @%p1 ld.global.b32 %r3, [%rd3];""",
        threads=64,
    )
    assert [*c.memory("global").values()] == [Access(1, 4, 2, 64)]
    assert c.instructions()["global"] == 2  # it takes both warps' turns


def test_what_caches_could_spare():
    """Both programs read the same 128 bytes, twice each; and one launch after another is counted as often."""
    body = "mul.wide.s32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r2, [%rd3]; ld.global.b32 %r3, [%rd3];"
    tensor = torch.zeros(64)
    with simulator.profile() as counts:
        for _ in range(3):
            run(ptx(THREAD + body, 32, X), (2,), [tensor])
    assert [c.reads["argument 0"] for c in counts.launches] == [Operand(128, 4 * 128, 2 * 128)] * 3
    (kernel,) = counts.kernels
    assert (kernel.launches, kernel.programs) == (3, 6)
    assert kernel.reads["argument 0"] == Operand(3 * 128, 3 * 4 * 128, 3 * 2 * 128)
    assert kernel.instructions()["global"] == 3 * 2 * 2


def test_tensors_are_told_apart():
    """x is read, y written, one storage that lies between sectors included."""
    parameters = f"{X}, .param .u64 .ptr .global .align 1 y"
    body = """ld.param.b64 %rd1, [x]; ld.param.b64 %rd2, [y]; mov.u32 %r1, %tid.x; mul.wide.s32 %rd3, %r1, 4;
        add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3; ld.global.b32 %r2, [%rd4]; st.global.b32 [%rd5], %r2;"""
    whole = torch.zeros(64)
    with simulator.profile() as counts:
        run(ptx(body, 32, parameters), (1,), [whole[4:36], torch.zeros(32)])
    (c,) = counts.launches
    sectors = {(whole.data_ptr() + 16 + i) // 32 for i in range(128)}
    assert c.reads == {"argument 0": Operand(128, 32 * len(sectors), 32 * len(sectors))}
    assert list(c.writes) == ["argument 1"]
    assert c.writes["argument 1"].touched == 128


# --- shared memory ---

BANKS = {  # name: (bytes between threads, bytes a thread, wavefronts, the least, different bytes)
    "a bank each": (4, 4, 1, 1, 128),
    "two words a bank": (8, 4, 2, 1, 128),
    "all in one bank": (128, 4, 32, 1, 128),
    "all the same": (0, 4, 1, 1, 4),
    "two threads a word": (2, 2, 1, 1, 64),
    "8 bytes": (8, 8, 2, 2, 256),
    "8 bytes, every other": (16, 8, 4, 2, 256),
    "16 bytes": (16, 16, 4, 4, 512),
    "16 bytes, every other": (32, 16, 8, 4, 512),
    "16 bytes, a row each": (128, 16, 32, 4, 512),
}


@pytest.mark.parametrize("place", BANKS)
def test_wavefronts(place):
    step, size, wavefronts, least, bytes_ = BANKS[place]
    type_ = {2: "b16", 4: "b32", 8: "b64", 16: "v2.b64"}[size]
    registers = {2: "%rs2", 4: "%r3", 8: "%rd5", 16: "{%rd5, %rd6}"}[size]
    c = counted(
        f"mul.lo.s32 %r2, %r1, {step}; add.s32 %r2, %r2, 1024; mov.b16 %rs2, 0; mov.b32 %r3, 0; mov.b64 %rd5, 0;"
        f"mov.b64 %rd6, 0; st.shared.{type_} [%r2], {registers}; bar.sync 0; ld.shared.{type_} {registers}, [%r2];",
        shared_bytes=4096,
    )
    assert [*c.memory("shared").values()] == [Access(1, wavefronts, least, bytes_)] * 2


@pytest.mark.parametrize(("step", "each"), [(16, 1), (32, 2), (128, 8)])
def test_wavefronts_of_ldmatrix(step, each):
    """Four matrices of eight rows of 16 bytes: one wavefront each, unless rows share banks."""
    fill = "mul.lo.s32 %r2, %r1, 16; add.s32 %r2, %r2, 1024; mov.b64 %rd5, 0;" + "".join(
        f"st.shared.v2.b64 [%r2 + {512 * i}], {{%rd5, %rd5}};" for i in range(8)
    )
    c = counted(
        f"{fill} bar.warp.sync -1; mul.lo.s32 %r3, %r1, {step}; add.s32 %r3, %r3, 1024;"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];",
        shared_bytes=4096,
    )
    assert c.memory("shared")[line_of(c, "ldmatrix")] == Access(1, 4 * each, 4, 512)
    assert c.waits == {"barriers of a warp": 1}


def test_an_asynchronous_copy_counts_in_both_memories():
    """The warps of two programs fetch 16 bytes a thread; of each, the second half gets zeros."""
    c = counted(
        """mul.wide.s32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2; mul.lo.s32 %r2, %r1, 16; add.s32 %r2, %r2, 1024;
        setp.lt.s32 %p1, %r1, 16; selp.b32 %r3, 16, 0, %p1;
        cp.async.cg.shared.global [%r2], [%rd3], 16, %r3; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;""",
        grid=(2,),
        shared_bytes=512,
    )
    line = line_of(c, "cp.async.cg")
    assert c.memory("global") == {line: Access(2, 2 * 8, 2 * 8, 2 * 256)}
    assert c.memory("shared") == {line: Access(2, 2 * 4, 2 * 4, 2 * 512)}
    assert c.reads["argument 0"] == Operand(256, 512, 512)
    assert c.waits == {"groups of cp.async": 2, "barriers": 2}


# --- products, boxes ---


def test_products():
    """Per warp: 2 * 16 * 8 * 16 operations of mma, 2 * 32 of fma, twice as many of two halves."""
    operands = (*range(10, 14), *range(20, 24), 30, 31)
    c = counted(
        "".join(f"mov.b32 %r{i}, 0;" for i in (2, *operands))
        + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10, %r11, %r12, %r13}, {%r20, %r21, %r22, %r23},"
        "{%r30, %r31}, {%r10, %r11, %r12, %r13}; fma.rn.f32 %r2, %r2, %r2, %r2; fma.rn.f16x2 %r2, %r2, %r2, %r2;"
    )
    assert c.operations == 4096 + 64 + 128
    assert c.instructions()["tensor"] == 1
    assert c.instructions()["fma"] == 2


@pytest.mark.parametrize("in_registers", [False, True])
def test_wgmma_reads_shared_memory(in_registers):
    """By two groups of four warps: 64x16 times 16x8, operands of 2 bytes."""
    zeros = "mul.lo.s32 %r2, %r1, 16; add.s32 %r2, %r2, 1024; mov.b64 %rd5, 0; st.shared.v2.b64 [%r2], {%rd5, %rd5};"
    descriptor = (
        f"mov.b64 %rd6, {1024 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32};"  # start, leading and stride offsets, no swizzle
    )
    a, flags = ("{%r50, %r51, %r52, %r53}", "1, 1, 1, 0") if in_registers else ("%rd6", "1, 1, 1, 0, 0")
    registers = "".join(f"mov.b32 %r{i}, 0;" for i in (*range(10, 14), *range(50, 54)))
    c = counted(
        f"{zeros} fence.proxy.async; bar.sync 0; {descriptor} {registers} wgmma.fence.sync.aligned;"
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10, %r11, %r12, %r13}}, {a}, %rd6, {flags};"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        threads=256, shared_bytes=4096,
    )  # fmt: skip
    assert c.operations == 2 * (2 * 64 * 8 * 16)
    assert c.wgmma_bytes == 2 * (8 + (0 if in_registers else 64)) * 16 * 2
    assert c.waits == {"barriers": 8, "groups of wgmma": 8}


def test_boxes():
    """A box of 4 x 16 elements of 2 bytes, of which the tensor has 3 x 16, goes in and out again."""
    x, y = torch.ones(3, 16, dtype=torch.int16), torch.zeros(3, 16, dtype=torch.int16)
    memory = GlobalMemory()
    maps = [TensorMap(memory.pointer(t, name), 2, (16, 3), (32,), (16, 4), 0) for t, name in ((x, "x"), (y, "y"))]
    tma = "cp.async.bulk.tensor.2d"
    body = f"""
        mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 0; mov.u32 %r2, 1024; mov.u32 %r3, 2048; mov.b32 %r4, 0;
        mov.b64 %rd1, x; mov.b64 %rd2, y; @%p1 mbarrier.init.shared::cta.b64 [%r3], 1; bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
        @%p1 {tma}.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {{%r4, %r4}}], [%r3];
        {{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r3], 0; @!done bra.uni again; }}
        @%p1 {tma}.global.shared::cta.bulk_group [%rd2, {{%r4, %r4}}], [%r2]; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;"""
    parameters = ".param .align 64 .b8 x[128], .param .align 64 .b8 y[128]"
    with simulator.profile() as counts:
        Program(ptx(body, 32, parameters), 1152).run((1, 1, 1), memory, maps, DEFAULT)
    assert torch.equal(x, y)
    (c,) = counts.launches
    assert c.boxes == 2 * 128
    sectors = [len({(t.data_ptr() + i) // 32 for i in range(96)}) for t in (x, y)]
    assert c.reads == {"x": Operand(96, 32 * sectors[0], 32 * sectors[0])}
    assert c.writes == {"y": Operand(96, 32 * sectors[1], 32 * sectors[1])}
    assert c.instructions()["boxes"] == 2
    assert c.waits == {"barriers": 1, "mbarriers": 1, "groups of stored boxes": 1}
    assert "256 bytes filled or taken by boxes" in str(c)


# --- registers and occupancy ---

OCCUPANCY = [  # target, threads, registers, shared memory: programs, share of the warps, what limits
    ("sm_90a", 128, 32, 0, 16, 1.0, "registers"),
    ("sm_90a", 128, 16, 0, 16, 1.0, "warps"),
    ("sm_90a", 32, 16, 0, 32, 0.5, "programs"),
    ("sm_90", 256, 255, 0, 1, 0.125, "registers"),
    ("sm_90a", 256, 168, 0, 1, 0.125, "registers"),  # 168 * 32 is 21 portions: 3 warps a quarter, 12 in all
    ("sm_90a", 128, 168, 99 << 10, 2, 0.125, "shared memory"),
    ("sm_80", 128, 128, 82 << 10, 1, 0.0625, "shared memory"),  # with 1 KiB for the system, two would be 166
]


@pytest.mark.parametrize(("target", "threads", "registers", "shared", "programs", "share", "limit"), OCCUPANCY)
def test_occupancy(target, threads, registers, shared, programs, share, limit):
    assert resources.occupancy(target, threads, registers, shared) == resources.Occupancy(programs, share, limit)


def test_the_table_says_what_ptxas_says_or_that_there_is_none(monkeypatch):
    c = counted(LOOP + "mul.wide.s32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r3, [%rd3];")
    monkeypatch.setattr("simulator.counters.resources", lambda ptx: resources.Resources(168, 8))
    text = str(c)
    assert text.startswith(
        "kernel (sm_90a): 1 launch, 1 program of 1 warp\n"
        "168 registers, 8 bytes spilled, 0 bytes of shared memory: 12 programs on a multiprocessor, 19% of its warps, by reg"
    )
    assert "5 iterations of a warp, each integer 2, control 1" in text
    assert "argument 0, read" in text
    monkeypatch.setattr("simulator.counters.resources", lambda ptx: None)
    assert "registers and occupancy unknown" in str(c)


def test_ptxas_is_asked_once_and_may_refuse():
    text = ptx("mov.b32 %r1, 0;")
    found = resources.resources(text)
    if found is None:
        pytest.skip("this Triton came without ptxas")
    assert found.spills == 0
    assert 0 < found.registers <= 255
    assert resources.resources(text) is found
    assert resources.resources(text.replace("mov.b32", "mov.b99")) is None


# --- the command ---


def profiled(*arguments):
    root = pathlib.Path(simulator.__file__).parent.parent
    command = [sys.executable, "-m", "simulator.profile", *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        command, env=kept | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_a_script_is_profiled(tmp_path):
    """98,432 elements in programs of 1,024: 97 of them."""
    example = pathlib.Path(simulator.__file__).parent / "examples" / "vector_add.py"
    done = profiled("--arch", "sm_80", example, "sm_80")
    assert done.returncode == 0, done.stderr
    assert "Of an n that is too large by one: reads" in done.stdout
    assert done.stdout.count("add (sm_80): 1 launch, 97 programs of 4 warps") == 5  # a kernel per dtype
    for size in (1, 2, 4, 8):
        n = f"{size * 98432:,}"
        row = next(line for line in done.stdout.splitlines() if line.startswith("out_ptr") and n in line)
        assert row.split() == ["out_ptr,", "written", n, n, n, "1.00"]


def test_a_script_that_ends_early_or_is_not_there(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    done = profiled(script, "a", "--b")
    assert (done.returncode, done.stdout) == (3, "['a', '--b']\nno launches\n")
    done = profiled(tmp_path / "nothing.py")
    assert done.returncode == 2
    assert "nothing.py" in done.stderr


def test_counts_do_not_change_results():
    body = "mul.wide.s32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r1;"
    out = torch.zeros(32, dtype=torch.int32)
    counted(body, out)
    assert out.tolist() == np.arange(32).tolist()
