"""PTX text, as Triton's compiler writes it, into basic blocks of instructions.

One kernel (`.entry`) per text. Names that are declared within braces are made unique, so that nothing after the parser
knows scopes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from simulator.errors import Place, Unsupported

VERSIONS = range(70, 95)  # of the PTX language, times ten: what Triton 3.6 to 3.9 write, and before
TARGETS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"}
CLASSES = {  # how many bits a register has, whatever kind of number its declaration says
    "pred": "pred",
    **dict.fromkeys(("b16", "u16", "s16", "f16"), "b16"),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), "b32"),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), "b64"),
}
JUMPS, WAITS = ("bra", "brx.", "ret", "trap"), ("bar.sync", "barrier.sync", "setmaxnreg.")  # opcodes that end a basic block
DONE = -1  # in place of the block that follows the last one
SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid")


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A register that tells a thread where it is."""

    name: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, or a variable."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor map."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b, of which the second is a predicate."""

    first: Register
    second: Register


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


def names(operands: Sequence[Operand]) -> Iterator[str]:
    """Yields the names of the registers in operands."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.name
        elif isinstance(operand, Vector):
            yield from names(operand.parts)
        elif isinstance(operand, Pair):
            yield from names((operand.first, operand.second))
        elif isinstance(operand, Address):
            yield from names((operand.base, *operand.coordinates))


@dataclass(frozen=True)
class Instruction:
    """One instruction; `line` counts the PTX's lines from 1."""

    opcode: str
    operands: tuple[Operand, ...]
    line: int
    guard: Register | None = None
    negated: bool = False

    @property
    def jumps(self) -> bool:
        """Whether something else than the next instruction may follow."""
        return self.opcode.startswith(JUMPS)

    @property
    def ends_block(self) -> bool:
        """Whether it jumps, or may have to wait for other warps."""
        return self.opcode.startswith(JUMPS + WAITS)


@dataclass
class Block:
    """Instructions that run one after another; only the last may jump, or wait for other warps."""

    label: str
    code: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter. `size` is that of a byte array (a tensor map), 0 for a number."""

    name: str
    type: str
    size: int = 0


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        threads: of a program.
        registers_per_thread: that it is launched with, by .maxnreg; 0 if it does not say.
        registers: the class of every register: pred, b16, b32, or b64.
        variables: names of module variables in global or shared memory.
        tables: the labels of tables of jumps.
        sources: the line of Triton's source of each line of the PTX that has an instruction.
    """

    name: str
    version: str
    target: str
    text: str
    threads: int
    registers_per_thread: int
    parameters: list[Parameter]
    blocks: list[Block]
    registers: dict[str, str]
    variables: dict[str, str]
    tables: dict[str, tuple[str, ...]]
    sources: dict[int, str]

    def place(self, line: int) -> Place:
        """Returns where an instruction stands."""
        text = " ".join(self.text.split("\n")[line - 1].split())[:160]
        return Place(self.name, line, text, self.sources.get(line, ""))


def parse(text: str) -> Kernel:
    """Parses a module with one kernel.

    Raises:
        Unsupported: something in it is not known; the message names the PTX version, the target and the line.
    """
    version, target = _directive(text, "version"), _directive(text, "target")
    try:
        if int(version.replace(".", "")) not in VERSIONS:
            raise Unsupported("this version of PTX")
        if target not in TARGETS:
            raise Unsupported("this target")
        return _Parser(text, version, target).kernel()
    except Unsupported as e:
        raise Unsupported(f"PTX {version} for {target}: {e}") from None


def _directive(text: str, name: str) -> str:
    found = re.search(rf"^\s*\.{name}\s+([\w.]+)", text, re.MULTILINE)
    if not found:
        raise Unsupported(f"a text without .{name}: is it PTX?")
    return found[1]


class _Parser:
    def __init__(self, text: str, version: str, target: str) -> None:
        self.text, self.version, self.target = text, version, target
        self.registers: dict[str, str] = {}
        self.ranges: list[tuple[str, str]] = []  # (prefix, class) of declarations such as %r<99>
        self.scopes: list[tuple[set[str], int]] = []
        self.count = 0  # of scopes so far
        self.operands: dict[str, Operand] = {}  # that were read outside scopes, by their text
        self.blocks = [Block("")]
        self.source = ""  # file:line:column, of the statements that follow
        self.sources: dict[int, str] = {}
        self.tables: dict[str, tuple[str, ...]] = {}

    def kernel(self) -> Kernel:
        entries = re.findall(r"\.entry", self.text)
        if len(entries) != 1:
            raise Unsupported(f"a module with {len(entries)} kernels")
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", self.text, re.DOTALL)
        if not entry:
            raise Unsupported("a kernel whose header cannot be read")
        name, parameters, directives = entry.groups()
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives, re.MULTILINE)
        if not threads:
            raise Unsupported("a kernel without .reqntid, or of more than one dimension of threads")
        if re.search(r"\.(reqnctapercluster|explicitcluster)", directives) and "reqnctapercluster 1" not in directives:
            raise Unsupported("a kernel of clusters of thread blocks")
        most = re.search(r"\.maxnreg\s+(\d+)", directives)
        self.body(entry.end())
        return Kernel(
            name, self.version, self.target, self.text, int(threads[1]), int(most[1]) if most else 0,
            [*map(_parameter, _split(parameters))], self.blocks, self.registers, _variables(self.text[: entry.start()]),
            self.tables, self.sources,
        )  # fmt: skip

    def body(self, start: int) -> None:
        """Reads statements from behind the kernel's opening brace to its closing one."""
        files = dict(re.findall(r'\.file\s+(\d+) "([^"]*)"', self.text))
        first = self.text.count("\n", 0, start) + 1
        pending, began = "", first
        for number, raw in enumerate(self.text[start:].split("\n"), first):
            line = raw.split("//")[0].strip()
            if not line:
                continue
            if not pending:
                began = number
            pending = f"{pending} {line}".strip()
            while pending:
                if pending[0] == "{":
                    self.count += 1
                    self.scopes.append((set(), self.count))
                    pending = pending[1:].strip()
                elif pending[0] == "}":
                    if not self.scopes:
                        return
                    self.scopes.pop()
                    pending = pending[1:].strip()
                elif label := re.match(r"([\w$]+):(?!:)\s*", pending):
                    self.label(label[1])
                    pending = pending[label.end() :]
                elif loc := re.match(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)", pending):
                    self.source = f"{files.get(loc[1], loc[1])}:{loc[2]}:{loc[3]}"
                    pending = ""
                elif ";" in pending:
                    statement, pending = (part.strip() for part in pending.split(";", 1))
                    self.statement(statement, began)
                else:
                    break
        raise Unsupported("a kernel without an end")

    def label(self, name: str) -> None:
        if self.scopes:
            self.scopes[-1][0].add(name)
        if not name.startswith(("$L__tmp", "$L__func")):  # these are for debuggers: nothing jumps there
            self.blocks.append(Block(self.renamed(name)))

    def statement(self, statement: str, line: int) -> None:
        if statement.startswith(".reg"):
            self.declare(statement)
        elif statement.startswith((".param", ".pragma")):  # an argument of a call (forms/control.py), advice for ptxas
            return
        elif statement.startswith(".branchtargets"):  # of the label before it
            labels = _split(statement.removeprefix(".branchtargets"))
            self.tables[self.blocks[-1].label] = tuple(map(self.renamed, labels))
        elif statement.startswith("."):
            raise Unsupported(f"line {line}: directive {statement.split()[0]}")
        else:
            found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", statement, re.DOTALL)
            if not found:
                raise Unsupported(f"line {line}: {statement}")
            guard = self.operand(found[2], line) if found[2] else None
            if guard is not None and not isinstance(guard, Register):
                raise Unsupported(f"line {line}: guard {found[2]}")
            operands = tuple(self.operand(part, line) for part in _split(found[4]))
            code = Instruction(found[3], operands, line, guard, found[1] == "!")
            self.sources[line] = self.source
            self.blocks[-1].code.append(code)
            if code.ends_block:
                self.blocks.append(Block(""))

    def declare(self, statement: str) -> None:
        """.reg .b32 %r<99>, or .reg .pred complete"""
        _, kind, names = statement.split(None, 2)
        if kind[1:] not in CLASSES:
            raise Unsupported(f"registers of type {kind}")
        for name in map(str.strip, names.split(",")):
            if many := re.fullmatch(r"([%\w$]+)<(\d+)>", name):
                self.ranges.append((many[1], CLASSES[kind[1:]]))
            else:
                if self.scopes:
                    self.scopes[-1][0].add(name)
                self.registers[self.renamed(name)] = CLASSES[kind[1:]]

    def renamed(self, name: str) -> str:
        for names, number in reversed(self.scopes):
            if name in names:
                return f"{name}@{number}"
        return name

    def operand(self, text: str, line: int) -> Operand:
        if self.scopes:  # where a name may be another's
            return self.read_operand(text, line)
        found = self.operands.get(text)
        if found is None:
            found = self.operands[text] = self.read_operand(text, line)
        return found

    def read_operand(self, text: str, line: int) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(part, line) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text, line)
        if "|" in text:
            first, second = (self.operand(part.strip(), line) for part in text.split("|"))
            if isinstance(first, Register) and isinstance(second, Register):
                return Pair(first, second)
            raise Unsupported(f"line {line}: operand {text}")
        if text.startswith(SPECIAL):
            return Special(text)
        if re.fullmatch(r"-?\d\w*", text):
            return Immediate(text)
        name = self.renamed(text)
        if name not in self.registers and (prefix := re.fullmatch(r"([%A-Za-z_$]+)\d+", text)):
            kind = next((kind for p, kind in self.ranges if p == prefix[1]), None)
            if kind:
                self.registers[name] = kind
        if name in self.registers:
            return Register(name)
        if text.startswith("%"):
            raise Unsupported(f"line {line}: register {text}")
        return Symbol(name)

    def address(self, text: str, line: int) -> Address:
        base, *rest = _split(text[1:-1])
        if rest:
            coordinates = self.operand(rest[0], line)
            if len(rest) > 1 or not isinstance(coordinates, Vector):
                raise Unsupported(f"line {line}: address {text}")
            return Address(self.operand(base, line), 0, coordinates.parts)
        found = re.fullmatch(r"([%\w$.]+)\s*(?:\+\s*(-?\w+))?", base)
        if not found:
            raise Unsupported(f"line {line}: address {text}")
        return Address(self.operand(found[1], line), int(found[2], 0) if found[2] else 0)


def _split(text: str) -> list[str]:
    """Splits at commas outside braces and brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _parameter(text: str) -> Parameter:
    found = re.fullmatch(
        r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?", text
    )
    if not found or found[1] not in (*CLASSES, "b8", "u8", "s8"):
        raise Unsupported(f"parameter {text}")
    return Parameter(found[2], found[1], int(found[3] or 0))


def _variables(text: str) -> dict[str, str]:
    """Names of variables before the kernel, and the memory that each is in."""
    pattern = r"\.(shared|global|const)\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\s*\["
    return {name: space for space, name in re.findall(pattern, text)}
