"""Integer instructions against Python's integers, which do not wrap around by themselves."""

import pytest

from tests.simulator.execute import one
from tests.simulator.values import integers, packed, wrap

KINDS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def divided(a, b):
    """Towards zero. Division by zero is left to the machine: here all bits are set."""
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def rest(a, b):
    return a - b * divided(a, b)


def high(kind):
    return lambda a, b, c=0: (a * b >> int(kind[1:])) + c


TWO = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": divided,
    "min": min,
    "max": max,
}
SIGNED = {"neg": lambda a: -a, "abs": abs}
COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}

# opcode: (types of the sources, of the result, the definition)
ROWS = {
    **{f"{op}.{k}": ((k, k), k, f) for op, f in TWO.items() for k in KINDS},
    **{f"rem.{k}": ((k, k), k, rest) for k in KINDS},
    **{f"mad.lo.{k}": ((k, k, k), k, lambda a, b, c: a * b + c) for k in KINDS},
    **{f"mul.hi.{k}": ((k, k), k, high(k)) for k in KINDS},
    **{f"mad.hi.{k}": ((k, k, k), k, high(k)) for k in KINDS[:4]},
    **{f"mul.wide.{k}": ((k, k), w, lambda a, b: a * b) for k, w in WIDER.items()},
    **{f"mad.wide.{k}": ((k, k, w), w, lambda a, b, c: a * b + c) for k, w in WIDER.items()},
    **{f"{op}.{k}": ((k,), k, f) for op, f in SIGNED.items() for k in ("s16", "s32", "s64")},
    **{f"setp.{how}.{k}": ((k, k), "pred", f) for how, f in COMPARE.items() for k in KINDS},
    **{f"setp.{how}.{k}": ((k, k), "pred", COMPARE[how]) for how in ("eq", "ne") for k in ("b16", "b32", "b64")},
    **{f"setp.{u}.{k}": ((k, k), "pred", COMPARE[how]) for u, how in UNSIGNED.items() for k in ("u16", "u32", "u64")},
}


@pytest.mark.parametrize("opcode", ROWS)
def test_against_python(opcode):
    kinds, to, definition = ROWS[opcode]
    operands = [integers(kind, 300, seed) for seed, kind in enumerate(kinds)]
    if opcode.startswith("setp"):
        operands[1][::3] = operands[0][::3]  # equal ones, too
    if opcode.startswith("rem"):
        operands[1] = [b or 1 for b in operands[1]]  # the rest of a division by zero is anything
    got = one(opcode, kinds, to, [packed(v, k) for v, k in zip(operands, kinds, strict=True)])
    right = [definition(*row) for row in zip(*operands, strict=True)]
    assert got.tolist() == [bool(r) if to == "pred" else wrap(r, to) for r in right]


HAND = [
    ("add.s32", (0x7FFFFFFF, 1), -0x80000000),
    ("sub.u16", (0, 1), 0xFFFF),
    ("mul.lo.s32", (0x10000, 0x10000), 0),
    ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.hi.s32", (-1, 1), -1),
    ("mul.hi.u64", (1 << 63, 4), 2),
    ("mul.wide.u16", (0xFFFF, 0xFFFF), 0xFFFE0001),
    ("mul.wide.s32", (-2, 3), -6),
    ("mad.lo.s32", (3, 4, 5), 17),
    ("mad.wide.s32", (-1, 2, 1 << 40), (1 << 40) - 2),
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("div.u32", (0xFFFFFFF9, 2), 0x7FFFFFFC),
    ("neg.s16", (-0x8000,), -0x8000),
    ("abs.s32", (-5,), 5),
    ("min.u32", (0xFFFFFFFF, 1), 1),
    ("min.s32", (-1, 1), -1),
    ("setp.lt.u32", (0xFFFFFFFF, 1), False),
    ("setp.lt.s32", (-1, 1), True),
    ("setp.hi.u64", (1 << 63, 1), True),
]


@pytest.mark.parametrize(("opcode", "operands", "right"), HAND)
def test_by_hand(opcode, operands, right):
    kinds, to, _ = ROWS[opcode]
    assert one(opcode, kinds, to, [packed([v], k) for v, k in zip(operands, kinds, strict=True)]).tolist() == [right]
