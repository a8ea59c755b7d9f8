"""Logic and shifts against Python's integers, bit by bit where PTX defines them so."""

import numpy as np
import pytest

from tests.simulator.execute import one
from tests.simulator.values import integers, packed, wrap

LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


def shl(width):
    return lambda a, by: a << min(by, width)


def shr(a, by):
    return a >> min(by, 64)


def funnel(to, amount):
    def f(low, high, by):
        both, by = high << 32 | low, amount(by)
        return both << by >> 32 if to == "l" else both >> by

    return f


def bfe(width, signed):
    def f(a, position, length):
        position, length = position & 255, length & 255
        a &= (1 << width) - 1
        last = a >> min(position + length - 1, width - 1) & 1 if signed and length else 0
        bits = [a >> position + i & 1 if i < length and position + i < width else last for i in range(width)]
        return sum(bit << i for i, bit in enumerate(bits))

    return f


def bfi(width):
    def f(a, b, position, length):
        position, length = position & 255, length & 255
        for i in range(length):
            if position + i < width:
                b = b & ~(1 << position + i) | (a >> i & 1) << position + i
        return b

    return f


def prmt(a, b, selector):
    found = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (choice & 7) & 255
        found |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * i
    return found


ROWS = {
    **{f"{op}.{k}": ((k, k), k, f) for op, f in LOGIC.items() for k in ("b16", "b32", "b64")},
    **{f"not.{k}": ((k,), k, lambda a: ~a) for k in ("b16", "b32", "b64")},
    **{f"cnot.{k}": ((k,), k, lambda a: int(a == 0)) for k in ("b16", "b32", "b64")},
    **{f"shl.{k}": ((k, "u32"), k, shl(int(k[1:]))) for k in ("b16", "b32", "b64")},
    **{f"shr.{t}{n}": ((f"{t}{n}", "u32"), f"{t}{n}", shr) for n in (16, 32, 64) for t in "bus"},
    **{f"shf.{to}.wrap.b32": (("u32",) * 3, "u32", funnel(to, lambda by: by & 31)) for to in "lr"},
    **{f"shf.{to}.clamp.b32": (("u32",) * 3, "u32", funnel(to, lambda by: min(by, 32))) for to in "lr"},
    **{f"bfe.{t}{n}": ((f"{t}{n}", "u32", "u32"), f"{t}{n}", bfe(n, t == "s")) for n in (32, 64) for t in "us"},
    **{f"bfi.b{n}": ((f"u{n}", f"u{n}", "u32", "u32"), f"u{n}", bfi(n)) for n in (32, 64)},
    **{f"popc.b{n}": ((f"u{n}",), "u32", lambda a: a.bit_count()) for n in (32, 64)},
    **{f"clz.b{n}": ((f"u{n}",), "u32", lambda a, n=n: n - a.bit_length()) for n in (32, 64)},
    **{f"brev.b{n}": ((f"u{n}",), f"u{n}", lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2)) for n in (32, 64)},
    "prmt.b32": (("u32",) * 3, "u32", prmt),
}
UNSIGNED = {"b16": "u16", "b32": "u32", "b64": "u64"}
OTHERS = {"lop3.b32", "and.pred", "or.pred", "xor.pred", "not.pred"}  # tested below


@pytest.mark.parametrize("opcode", ROWS)
def test_against_python(opcode):
    kinds, to, definition = ROWS[opcode]
    kinds_ = [UNSIGNED.get(k, k) for k in kinds]
    operands = [integers(kind, 300, seed) for seed, kind in enumerate(kinds_)]
    if opcode.startswith(("sh", "bf")):  # amounts that matter, as often as not
        for column, kind in zip(operands, kinds, strict=True):
            if kind == "u32" and column is not operands[0]:
                column[::2] = [n % 70 for n in column[::2]]
        if opcode.startswith("shf"):
            operands[1] = integers("u32", 300, 7)
    got = one(opcode, kinds, to, [packed(v, k) for v, k in zip(operands, kinds_, strict=True)])
    to = UNSIGNED.get(to, to)
    got = got.view(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    assert got.tolist() == [wrap(int(definition(*row)), to) for row in zip(*operands, strict=True)]


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xCA, 0x1D])
def test_lop3_is_a_table_of_three_bits(table):
    operands = [integers("u32", 100, seed) for seed in range(3)]
    got = one("lop3.b32", ("u32",) * 3, "u32", [packed(v, "u32") for v in operands], more=f", {table:#x}")
    for a, b, c, result in zip(*operands, got.tolist(), strict=True):
        bits = [table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1 for i in range(32)]
        assert result == sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("op", LOGIC)
def test_logic_of_predicates(op):
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    assert one(f"{op}.pred", ("pred", "pred"), "pred", [a, b]).tolist() == [
        bool(LOGIC[op](x, y)) for x, y in zip(a, b, strict=True)
    ]
    assert one("not.pred", ("pred",), "pred", [a]).tolist() == [True, True, False, False]


HAND = [
    ("shl.b32", (1, 31), 0x80000000),
    ("shl.b32", (1, 32), 0),
    ("shr.u32", (0x80000000, 99), 0),
    ("shr.s32", (-8, 1), -4),
    ("shr.s32", (-8, 99), -1),
    ("shf.l.wrap.b32", (0x80000000, 1, 1), 3),
    ("shf.r.clamp.b32", (1, 0xABCDEF, 32), 0xABCDEF),
    ("bfe.u32", (0b110100, 2, 3), 0b101),
    ("bfe.s32", (0b110100, 2, 3), -3),
    ("bfi.b32", (0b11, 0, 4, 2), 0b110000),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7632), 0x77663322),
    ("prmt.b32", (0x00000080, 0, 0x8888), 0xFFFFFFFF),
    ("clz.b32", (1,), 31),
    ("brev.b32", (1,), 0x80000000),
]


@pytest.mark.parametrize(("opcode", "operands", "right"), HAND)
def test_by_hand(opcode, operands, right):
    kinds, to, _ = ROWS[opcode]
    got = one(opcode, kinds, to, [packed([v], UNSIGNED.get(k, k)) for v, k in zip(operands, kinds, strict=True)])
    to = UNSIGNED.get(to, to)
    assert got.view(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}").tolist() == [right]


@pytest.mark.parametrize("by", [0, 1, 31])
@pytest.mark.parametrize("op", ["shl.b32", "shr.u32", "shr.s32"])
def test_a_literal_shift_is_as_one_by_a_register(op, by):
    a = packed(integers("u32", 50), "u32")
    kinds = ("u32",) if op != "shr.s32" else ("s32",)
    by_register = one(op, (*kinds, "u32"), kinds[0], [a, np.full(a.size, by, np.uint32)])
    assert one(op, kinds, kinds[0], [a], more=f", {by}").tolist() == by_register.tolist()
