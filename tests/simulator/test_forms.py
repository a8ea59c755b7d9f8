"""Every opcode that is known is run by a test; every other, and every text that is not understood, is refused by name."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from simulator import Unsupported, run
from simulator.launch import Program
from simulator.translator import FORMS
from tests.simulator.execute import execute, ptx

HERE = pathlib.Path(__file__).parent
OTHERS = {"test_forms.py", "test_examples.py", "test_plugin.py", "test_imports.py", "test_mutations.py", "test_profile.py"}


def test_every_known_opcode_is_run_by_a_test(tmp_path):
    record = tmp_path / "opcodes"
    files = [str(path) for path in HERE.glob("test_*.py") if path.name not in OTHERS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-x", *files]
    done = subprocess.run(
        command, env=os.environ | {"SIMULATOR_OPCODES": str(record)}, capture_output=True, text=True, cwd=HERE.parent.parent
    )
    assert done.returncode == 0, done.stdout
    assert set(FORMS) - set(record.read_text().split()) == set()


UNKNOWN = [
    "add.sat.s32 %r1, %r2, %r3;",
    "mul.wide.u8 %r1, %rs1, %rs2;",
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
    "ld.volatile.global.b32 %r1, [%rd1];",
    "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%rd1];",
    "ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%rd5];",
    "atom.global.add.f32 %r1, [%rd1], %r2;",
    "red.global.add.f32 [%rd1], %r2;",
    "cvt.rn.satfinite.e5m2x2.f32 %rs1, %r1, %r2;",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};",
    "add.cc.u32 %r1, %r2, %r3;",
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e5m2 {%r1}, %rd1, %rd2, 1, 1, 1;",
    "nanosleep.u32 5;",
    "fma.rz.f32 %r1, %r2, %r3, %r4;",
    "cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r5], {%rs1};",
    "cvta.to.shared.u64 %rd1, %rd2;",
    "tcgen05.wait::ld.sync.aligned;",
    "barrier.cluster.arrive;",
    "activemask.b32 %r1;",
]


@pytest.mark.parametrize("instruction", UNKNOWN, ids=lambda i: i.split()[0])
def test_an_opcode_or_suffix_that_is_not_known_is_named(instruction):
    opcode = instruction.split()[0].rstrip(";")
    with pytest.raises(Unsupported) as e:
        execute(f"mov.b32 %r1, 0;\n    {instruction}")
    assert str(e.value).startswith(f"PTX 8.7 for sm_90a: line 13: opcode {opcode} ")


WRONG = {
    "add.s32 %rd1, %r2, %r3;": "a b64 register as s32 destination",
    "add.s32 %r1, %rd2, %r3;": "a b64 register as s32 operand",
    "add.s32 %r1, %r2;": "operands",
    "mov.b32 %r1, 0d3FF0000000000000;": "literal 0d3FF0000000000000 as b32",
    "add.f32 %r1, %r2, 1;": "literal 1 as f32",
    "mov.b32 %r1, somewhere;": "symbol somewhere",
    "mov.b32 %r1, %clock;": "register %clock",
    "mov.b32 %q1, 0;": "register %q1",
    "ld.global.v2.b32 {%r1}, [%rd1];": "1 registers",
    "ld.global.b32 %r1, [%r2];": "a b32 register as b64 operand",
    "ld.shared.b32 %r1, [%rd2];": "a b64 register as b32 operand",
    "ld.global.b64 %r1, [%rd2];": "a register that is too narrow",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2];": "1 registers",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2}, {%r3}, {%r4}, {%r5};": "2 registers where 4 belong",
    "cp.async.ca.shared.global [%r1], [%rd1], 3;": "3 bytes",
    "cp.async.wait_group %r1;": "which is not a literal",
    "mbarrier.arrive.shared.b64 %rd1, [%r1];": "a state",
    ".local .b8 stack[16];": "directive .local",
    "bra.uni nowhere;": "label",
}


@pytest.mark.parametrize("body", WRONG)
def test_operands_that_do_not_fit_are_refused(body):
    with pytest.raises(Unsupported, match=WRONG[body]) as e:
        execute(body)
    assert str(e.value).startswith("PTX 8.7 for sm_90a: line 12: ")


SOUND = ptx("mov.b32 %r1, 0;")
TEXTS = {
    "a version of the future": (SOUND.replace("8.7", "99.1"), "PTX 99.1 for sm_90a: this version of PTX"),
    "another target": (SOUND.replace("sm_90a", "sm_120a"), "PTX 8.7 for sm_120a: this target"),
    "no PTX": ("ELF", "is it PTX"),
    "no kernel": (SOUND.replace(".entry", ".func"), "a module with 0 kernels"),
    "two kernels": (SOUND + SOUND, "a module with 2 kernels"),
    "threads in two dimensions": (SOUND.replace(".reqntid 32", ".reqntid 32, 2"), "more than one dimension"),
    "threads not said": (SOUND.replace(".reqntid 32", ""), "without .reqntid"),
    "a cluster": (SOUND.replace("32", "32\n.reqnctapercluster 2", 1), "clusters"),
    "no end": (SOUND.rstrip().rstrip("}"), "without an end"),
    "a parameter of another type": (SOUND.replace("kernel()", "kernel(.param .b128 p)"), "parameter .param .b128 p"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_is_not_understood_is_refused(what):
    text, words = TEXTS[what]
    with pytest.raises(Unsupported, match=words):
        Program(text, 0)


def test_arguments_must_be_as_many_as_parameters():
    with pytest.raises(Unsupported, match="1 arguments for the 0 parameters of kernel"):
        run(SOUND, (1,), [torch.zeros(1)])
