"""Kernels that are launched before the one before them has ended: whether they wait for it before all else."""

import pytest

from simulator import Fault, dependents
from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.options import DEFAULT
from simulator.parser import parse
from tests.simulator.execute import ptx

WAIT, STORE = "griddepcontrol.wait;", "st.global.b32 [%rd1], %r1;"
CHOOSE = "mov.u32 %r9, %tid.x; setp.lt.s32 %p1, %r9, 9;"
SOUND = {
    "first": WAIT + STORE,
    "behind arithmetic and parameters": f"mov.b32 %r1, 4; ld.param.b32 %r2, [kernel_param_0]; {WAIT} {STORE}",
    "behind shared memory": f"mov.b32 %r1, 1024; st.shared.b32 [%r1], %r1; {WAIT} {STORE}",
    "on both ways": f"{CHOOSE} @%p1 bra $there; {WAIT} {STORE} bra $end; $there: {WAIT} $end: {STORE}",
    "a loop before it": f"{CHOOSE} $again: add.s32 %r9, %r9, 1; @%p1 bra $again; {WAIT} {STORE}",
}
EARLY, NEVER = "touches global memory before griddepcontrol.wait", "may end without a griddepcontrol.wait"
UNSOUND = {
    "a store before it": (STORE + WAIT, EARLY),
    "a load before it": ("ld.global.b32 %r1, [%rd1];" + WAIT, EARLY),
    "a guarded load before it": (f"{CHOOSE} @%p1 ld.global.b32 %r1, [%rd1]; {WAIT}", EARLY),
    "a load of any space before it": ("ld.b32 %r1, [%rd1];" + WAIT, EARLY),
    "a copy before it": (f"mov.b32 %r1, 1024; cp.async.cg.shared.global [%r1], [%rd1], 16; {WAIT}", EARLY),
    "a store on one way": (f"{CHOOSE} @%p1 bra $there; {WAIT} $there: {STORE}", EARLY),
    "only some threads wait": (f"{CHOOSE} @%p1 {WAIT} {STORE}", EARLY),
    "none": ("mov.b32 %r1, 4;", NEVER),
    "none on one way": (f"{CHOOSE} @%p1 bra $end; {WAIT} $end: mov.b32 %r1, 4;", NEVER),
    "the end before it": (f"{CHOOSE} @%p1 ret; {WAIT}", NEVER),
    "only a launch of what follows": ("griddepcontrol.launch_dependents;", NEVER),
}


@pytest.mark.parametrize("what", SOUND)
def test_sound(what):
    assert dependents.fault(parse(ptx(SOUND[what], parameters=".param .u32 kernel_param_0"))) is None


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound(what):
    body, words = UNSOUND[what]
    found = dependents.fault(parse(ptx(body)))
    assert words in str(found)
    assert "PTX line" in str(found)


def test_only_dependent_launches_have_to_wait():
    program = Program(ptx("mov.b32 %r1, 4;"), 0)
    program.run((1, 1, 1), GlobalMemory(), [], DEFAULT)
    with pytest.raises(Fault, match=NEVER):
        program.run((1, 1, 1), GlobalMemory(), [], DEFAULT, dependent=True)
