"""Runs a few lines of PTX on registers that are given, so that an instruction can be compared with its definition."""

import os
import re

import numpy as np

from simulator.arrays import STORED, TYPES
from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.machine import Machine
from simulator.options import Options
from simulator.parser import parse

CLASSES = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}
HEADER = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<1000>;
    .reg .b16 %rs<1000>;
    .reg .b32 %r<1000>;
    .reg .b64 %rd<1000>;
    {body}
    ret;
}}
"""


def ptx(body, threads=32, parameters=""):
    return HEADER.format(body=body, threads=threads, parameters=parameters)


def kind_of(register):
    return CLASSES[re.match(r"%([a-z]+)", register)[1]]


class Result:
    """What registers held in the end, each as [threads] of the dtype that its class is stored as."""

    def __init__(self, program, registers, machine):
        self.program, self.registers, self.machine = program, registers, machine

    def __getitem__(self, register):
        a = self.registers[self.program.translation.numbers[register]]
        stored = STORED[kind_of(register)]
        assert a.dtype == stored, f"{register} is {a.dtype}"
        return np.broadcast_to(a, (self.machine.C, self.machine.T))[0].copy()

    def as_type(self, register, kind):
        return self[register].view(TYPES[kind].dtype)


def note_opcodes(text):
    """For test_forms.py, which asks what all tests run."""
    if "SIMULATOR_OPCODES" in os.environ:
        with open(os.environ["SIMULATOR_OPCODES"], "a") as f:
            f.writelines(f"{i.opcode}\n" for block in parse(text).blocks for i in block.code)


def execute(body, given=None, threads=32, shared_bytes=0, tensors=(), options=None, parameters="", arguments=(), maps=None):
    """Runs a body by one program.

    Args:
        given: register: values of its threads, an array of any dtype of its size.
        tensors: register: a tensor, of which it gets the address.
    """
    program = Program(ptx(body, threads, parameters), shared_bytes)
    note_opcodes(program.kernel.text)
    memory = GlobalMemory()
    registers = program.translation.registers()
    values = {name: np.asarray(v) for name, v in (given or {}).items()}
    values |= {name: np.full(threads, memory.pointer(t, name), np.int64) for name, t in dict(tensors).items()}
    for name, value in values.items():
        number = program.translation.numbers.get(name)
        if number is not None:
            stored = STORED[kind_of(name)]
            registers[number] = np.resize(value, threads).view(stored).reshape(1, -1)
    granule = memory.granule = min(program.translation.granule, *(t.size for t in (maps or {}).values()), 16)
    arguments = [*arguments, *[None] * (len(program.kernel.parameters) - len(arguments))]
    m = Machine(
        program.kernel,
        memory,
        np.zeros(1, np.int64),
        (1, 1, 1),
        shared_bytes,
        arguments,
        maps or {},
        granule,
        options or Options(),
    )
    block, steps = 0, 0
    with np.errstate(all="ignore"):
        while block != -1:
            block = program.translation.functions[block](registers, m)
            steps += 1
            assert steps < 1000
    return Result(program, registers, m)


def one(opcode, kinds, to, operands, more=""):
    """Runs one instruction, each source of a kind, and returns what it wrote as a type.

    Args:
        operands: an array per source.
        more: text behind the operands.
    """
    names, given = [], {}
    for i, (kind, values) in enumerate(zip(kinds, operands, strict=True), 1):
        prefix = {"pred": "p", "b16": "rs", "b32": "r", "b64": "rd"}[TYPES[kind].register]
        names.append(f"%{prefix}{i}")
        given[names[-1]] = np.asarray(values).view(TYPES[kind].dtype)
    prefix = {"pred": "p", "b16": "rs", "b32": "r", "b64": "rd"}[TYPES[to].register]
    target = f"%{prefix}99"
    threads = -(-max(len(np.atleast_1d(v)) for v in operands) // 32) * 32
    result = execute(f"{opcode} {', '.join([target, *names])}{more};", given, threads)
    return result.as_type(target, to)[: len(np.atleast_1d(operands[0]))]
