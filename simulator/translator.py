"""Basic blocks of PTX into Python functions.

Each block becomes a function of the registers, a list of arrays, and the machine. It returns the number of the block that runs
next, `DONE`, or, where programs or warps take different ways, one for each of them, as [programs, warps].

What an instruction does is said in simulator/forms/: for each complete opcode, type suffix included, a function that writes
Python into a `Code`. An opcode that is not there is refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from simulator.arrays import POISON, STORED, TYPES, Array, single
from simulator.errors import Unsupported
from simulator.global_memory import PARAMETERS, TAG, VARIABLES
from simulator.parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)
from simulator.shared_memory import START

Handler = Callable[..., None]
FORMS: dict[str, tuple[Handler, tuple[str, ...]]] = {}  # complete opcode: who translates it, its alternatives
SPECIALS = {
    "%tid.x": "m.tid", "%ctaid.x": "m.ctaid[0]", "%ctaid.y": "m.ctaid[1]", "%ctaid.z": "m.ctaid[2]",
    "%laneid": "m.lane", "%warpid": "m.warp",
}  # fmt: skip


def form(*patterns: str) -> Callable[[Handler], Handler]:
    """Registers a function for opcodes such as "add{,.rn}.{f32,f64}".

    It is called with the code, and with what was chosen of each pair of braces.
    """

    def register(handler: Handler) -> Handler:
        for pattern in patterns:
            fixed = re.split(r"\{[^}]*\}", pattern)
            choices = [group.split(",") for group in re.findall(r"\{([^}]*)\}", pattern)]
            for chosen in itertools.product(*choices):
                opcode = "".join(itertools.chain(*itertools.zip_longest(fixed, chosen, fillvalue="")))
                assert opcode not in FORMS, opcode
                FORMS[opcode] = handler, chosen
        return handler

    return register


class Code:
    """The Python of one instruction."""

    def __init__(self, instruction: Instruction, block: int, translation: Translation) -> None:
        self.instruction, self.block, self.translation = instruction, block, translation
        self.line = instruction.line
        self.operands = instruction.operands
        self.lines: list[str] = []
        self.guarded = instruction.guard is None  # whether the guard was heeded

    def unsupported(self, what: str) -> Unsupported:
        i = self.instruction
        return Unsupported(f"line {i.line}: {what} of {i.opcode} ({self.translation.kernel.place(i.line)})")

    @property
    def guard(self) -> str:
        """The guard as an expression: of a bool array, or None."""
        self.guarded = True
        guard = self.instruction.guard
        if guard is None:
            return "None"
        return f"~{self.register(guard)}" if self.instruction.negated else self.register(guard)

    def register(self, operand: Operand) -> str:
        if not isinstance(operand, Register):
            raise self.unsupported(f"operand {operand}")
        return f"R[{self.translation.number(operand)}]"

    def kind(self, operand: Operand) -> str:
        """The class of a register: pred, b16, b32, b64."""
        assert isinstance(operand, Register)
        return self.translation.kernel.registers[operand.name]

    def read(self, operand: Operand | int, type_: str, low: bool = False) -> str:
        """An operand as an expression of an array of that type.

        Args:
            low: whether a wider register is allowed, of which the low bits count.
        """
        operand = self.operands[operand] if isinstance(operand, int) else operand
        wanted = TYPES[type_]
        if isinstance(operand, Register):
            held = self.kind(operand)
            text = self.register(operand)
            if held != wanted.register:
                if not low or held == "pred" or STORED[held]().itemsize < STORED[wanted.register]().itemsize:
                    raise self.unsupported(f"a {held} register as {type_} operand")
                text += f".astype({self.name(STORED[wanted.register])})"
            return text if STORED[wanted.register] is wanted.dtype else f"{text}.view({self.name(wanted.dtype)})"
        if isinstance(operand, Special):
            return self._special(operand, type_)
        if isinstance(operand, Immediate):
            return self.constant(self._bits(operand, type_), STORED[wanted.register], wanted.dtype)
        if isinstance(operand, Symbol):
            return self.constant(self._address_of(operand), STORED[wanted.register], wanted.dtype)
        raise self.unsupported(f"operand {operand}")

    def integer(self, operand: Operand | int) -> int:
        """An operand that must be a literal."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if not isinstance(operand, Immediate):
            raise self.unsupported(f"operand {operand}, which is not a literal,")
        return int(operand.text.rstrip("U"), 0)

    def address(self, operand: Operand | int, type_: str) -> str:
        """A base and offset as an expression of 32 (shared) or 64 bits."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if not isinstance(operand, Address) or operand.coordinates:
            raise self.unsupported(f"operand {operand}")
        base = self.read(operand.base, type_)
        return f"{base} + {self.constant(operand.offset, TYPES[type_].dtype)}" if operand.offset else base

    def vector(self, operand: Operand | int) -> tuple[Operand, ...]:
        """The registers of {a, b}, or of a alone."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def write(self, operand: Operand | int, expression: str, type_: str) -> None:
        """Assigns an expression of an array of that type to a register, in the threads of the guard."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        wanted, target = TYPES[type_], self.register(operand)
        if self.kind(operand) != wanted.register:
            raise self.unsupported(f"a {self.kind(operand)} register as {type_} destination")
        if STORED[wanted.register] is not wanted.dtype:
            expression = f"({expression}).view({self.name(STORED[wanted.register])})"
        if self.guard != "None":
            expression = f"{self.name(np.where)}({self.guard}, {expression}, {target})"
        self.emit(f"{target} = {expression}")

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def call(self, function: Callable[..., Any], *arguments: str) -> str:
        return f"{self.name(function)}({', '.join(arguments)})"

    def name(self, thing: Any) -> str:
        return self.translation.name(thing)

    def constant(self, value: int, stored: Any, dtype: Any = None) -> str:
        return self.translation.constant(value, stored, dtype or stored)

    def target(self, operand: Operand | int) -> int:
        """The block that a label names."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if not isinstance(operand, Symbol) or operand.name not in self.translation.labels:
            raise self.unsupported(f"label {operand}")
        return self.translation.labels[operand.name]

    def targets(self, operand: int) -> tuple[int, ...]:
        """The blocks of a table of jumps."""
        table = self.operands[operand]
        if not isinstance(table, Symbol) or table.name not in self.translation.kernel.tables:
            raise self.unsupported(f"table {table}")
        return tuple(self.target(Symbol(label)) for label in self.translation.kernel.tables[table.name])

    def parameter(self, operand: Operand) -> int | None:
        """The number of a kernel's parameter; None if it is none."""
        return self.translation.parameters.get(operand.name) if isinstance(operand, Symbol) else None

    def _special(self, operand: Special, type_: str) -> str:
        kernel = self.translation.kernel
        if type_ not in ("b32", "u32", "s32"):
            raise self.unsupported(f"{operand.name} as {type_}")
        view = "" if TYPES[type_].dtype is np.int32 else f".view({self.name(TYPES[type_].dtype)})"
        if operand.name in SPECIALS:
            return SPECIALS[operand.name] + view
        if found := re.fullmatch(r"%nctaid\.([xyz])", operand.name):
            return f"{self.name(single)}(m.grid[{'xyz'.index(found[1])}], {self.name(np.int32)}){view}"
        fixed = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": kernel.threads, "%ntid.y": 1, "%ntid.z": 1}
        if operand.name not in fixed:
            raise self.unsupported(f"register {operand.name}")
        return self.constant(fixed[operand.name], np.int32, TYPES[type_].dtype)

    def _bits(self, operand: Immediate, type_: str) -> int:
        text, wanted = operand.text, TYPES[type_]
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            if wanted.register != ("b32" if found[1] else "b64"):
                raise self.unsupported(f"literal {text} as {type_}")
            return int(found[1] or found[2], 16)
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) or wanted.dtype in (np.float16, np.float32, np.float64):
            raise self.unsupported(f"literal {text} as {type_}")
        value = int(text.rstrip("U"), 0)
        return int(value != 0) if type_ == "pred" else value

    def _address_of(self, operand: Symbol) -> int:
        number = self.parameter(operand)
        if number is not None:
            return (PARAMETERS << TAG) | number
        space = self.translation.kernel.variables.get(operand.name)
        if space == "shared":
            return START
        if space is None:
            raise self.unsupported(f"symbol {operand.name}")
        return VARIABLES << TAG


class Translation:
    """A kernel's blocks as functions.

    Attributes:
        source: the Python that was made, to read.
        functions: one per block.
        lines: of the PTX, where each block, or the next one that is not empty, begins.
        numbers: each register's place in the list of them, by its name.
        kinds: the class of each register, by its number.
        granule: bytes of the narrowest access of memory; what accesses are tracked by.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.granule = 16
        self.kinds: list[str] = []
        self.labels = {block.label: i for i, block in enumerate(kernel.blocks) if block.label}
        self.parameters = {p.name: i for i, p in enumerate(kernel.parameters)}
        self.numbers: dict[str, int] = {}
        self._constants: dict[tuple[int, str, str], str] = {}
        self._space: dict[str, Any] = {}
        texts = []
        for i, block in enumerate(kernel.blocks):
            lines = [line for instruction in block.code for line in self._translate(instruction, i)]
            if not lines or not lines[-1].startswith("return"):
                lines.append(f"return {i + 1}")
            texts.append("\n    ".join([f"def block{i}(R, m):", *lines]) + "\n")
        self.source = "\n".join(texts)
        exec(compile(self.source, f"<{kernel.name}>", "exec"), self._space)
        self.functions = [self._space[f"block{i}"] for i in range(len(kernel.blocks))]
        self.lines = [0] * len(kernel.blocks)
        for i, block in reversed([*enumerate(kernel.blocks)]):
            self.lines[i] = block.code[0].line if block.code else self.lines[min(i + 1, len(self.lines) - 1)]

    def registers(self) -> list[Array]:
        """Returns registers that nothing wrote: a NaN in every format, far outside every tensor."""
        return [single(POISON[kind], STORED[kind]) for kind in self.kinds]

    def failing(self, *blocks: int) -> int | None:
        """Returns which of these blocks does nothing but end the program as wrong, if any."""
        for block in blocks:
            if block < len(self.kernel.blocks) and any(
                i.opcode in ("trap", "call.uni") for i in self.kernel.blocks[block].code
            ):
                return block
        return None

    def number(self, register: Register) -> int:
        if register.name not in self.numbers:
            self.numbers[register.name] = len(self.numbers)
            self.kinds.append(self.kernel.registers[register.name])
        return self.numbers[register.name]

    def name(self, thing: Any) -> str:
        """Makes a function or type known to the blocks, by its own name."""
        name = thing.__name__
        assert self._space.setdefault(name, thing) is thing, name
        return str(name)

    def constant(self, value: int, stored: Any, dtype: Any) -> str:
        bits = value if stored is np.bool_ else value & (1 << 8 * np.dtype(stored).itemsize) - 1
        key = bits, np.dtype(stored).str, np.dtype(dtype).str
        if key not in self._constants:
            name = self._constants[key] = f"K{len(self._constants)}"
            self._space[name] = single(bits, stored).view(dtype)
        return self._constants[key]

    def accesses(self, size: int) -> None:
        """Notes that an instruction accesses so many bytes at once."""
        self.granule = min(self.granule, size)

    def _translate(self, instruction: Instruction, block: int) -> list[str]:
        if instruction.opcode not in FORMS:
            raise Unsupported(f"line {instruction.line}: opcode {instruction.opcode} ({self.kernel.place(instruction.line)})")
        handler, alternatives = FORMS[instruction.opcode]
        code = Code(instruction, block, self)
        try:
            handler(code, *alternatives)
        except (IndexError, ValueError) as e:  # there are fewer or more of them than the handler knows
            raise code.unsupported(f"operands ({e})") from e
        if not code.guarded:
            raise code.unsupported("a guard")
        return code.lines
