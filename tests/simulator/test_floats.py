"""Floating-point instructions against fractions, rounded once; approximations against fp64."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.simulator.exact import fraction, rounded
from tests.simulator.execute import one
from tests.simulator.values import WIDTHS, floats

ARITHMETIC = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


def bits(values, width):
    return np.array(values, f"u{width // 8}")


def view(kind):
    """The type by which an instruction's registers are given and read: bits."""
    return {16: "b16", 32: "u32", 64: "u64"}[WIDTHS[kind]]


def fused(a, b, c):
    return a * b + c


def exactly(kind, definition, operands):
    """Bits of a definition's correctly rounded results; a zero sum of numbers that are not zero is positive."""
    return [rounded(definition(*(fraction(v, kind) for v in row)), kind) for row in zip(*operands, strict=True)]


ROWS = {
    **{f"{op}{rn}.{k}": (k, 2, f) for op, f in ARITHMETIC.items() for rn in ("", ".rn") for k in ("f16", "bf16", "f32", "f64")},
    **{f"fma.rn.{k}": (k, 3, fused) for k in ("f16", "bf16", "f32", "f64")},
    **{f"div.rn.{k}": (k, 2, lambda a, b: a / b) for k in ("f32", "f64")},
    **{f"div.{how}.f32": ("f32", 2, lambda a, b: a / b) for how in ("full", "approx")},
    **{f"rcp.rn.{k}": (k, 1, lambda a: 1 / a) for k in ("f32", "f64")},
}


@pytest.mark.parametrize("opcode", ROWS)
def test_rounded_once(opcode):
    kind, count, definition = ROWS[opcode]
    operands = [floats(kind, 300, seed) for seed in range(count)]
    if opcode.startswith(("div", "rcp")):
        operands[-1] = [v if fraction(v, kind) else rounded(Fraction(1), kind) for v in operands[-1]]
    if count == 3:  # sums that all but cancel, and sums whose addend decides the rounding
        product = exactly(kind, lambda a, b: -a * b, operands[:2])
        operands[2] = [p if i % 4 == 0 else c for i, (p, c) in enumerate(zip(product, operands[2], strict=True))]
    if count > 1:
        keep = [i for i, row in enumerate(zip(*operands, strict=True)) if all(math.isfinite(fraction(v, kind)) for v in row)]
        operands = [[v[i] for i in keep] for v in operands]
    kinds = (view(kind),) * count
    got = one(opcode, kinds, view(kind), [bits(v, WIDTHS[kind]) for v in operands]).tolist()
    right = exactly(kind, definition, operands)
    zero = {0, 1 << WIDTHS[kind] - 1}
    wrong = [(g, r) for g, r in zip(got, right, strict=True) if g != r and not {g, r} <= zero]
    assert wrong == []


PAIRS = [*(f"{op}{rn}" for op in ARITHMETIC for rn in ("", ".rn")), "fma.rn"]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", PAIRS)
def test_pairs_are_two_numbers(op, kind):
    low, high = ([floats(kind, 120, seed) for seed in seeds] for seeds in ((0, 1, 2), (3, 4, 5)))
    count = 3 if op == "fma.rn" else 2
    pairs = [bits([h << 16 | n for n, h in zip(*pair, strict=True)], 32) for pair in zip(low, high, strict=True)][:count]
    got = one(f"{op}.{kind}x2", ("u32",) * count, "u32", pairs)
    for shift, operands in ((0, low), (16, high)):
        alone = one(f"{op}.{kind}", ("b16",) * count, "b16", [bits(v, 16) for v in operands[:count]])
        assert (got >> shift & 0xFFFF).tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["f16", "f32", "f64", "bf16"])
def test_signs_are_a_bit(kind):
    width = WIDTHS[kind]
    a = floats(kind, 100)
    top = 1 << width - 1
    assert one(f"neg.{kind}", (view(kind),), view(kind), [bits(a, width)]).tolist() == [v ^ top for v in a]
    assert one(f"abs.{kind}", (view(kind),), view(kind), [bits(a, width)]).tolist() == [v & top - 1 for v in a]


NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@pytest.mark.parametrize(("kind", "nan"), [("f16", ""), ("f16", ".NaN"), ("f32", ""), ("f32", ".NaN"), ("f64", "")])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extremes(kind, nan, op):
    special = NUMPY[kind]([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0])
    a, b = (v.reshape(-1) for v in np.meshgrid(special, special))
    got = one(f"{op}{nan}.{kind}", (kind, kind), kind, [a, b])
    for x, y, g in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        if math.isnan(x) or math.isnan(y):
            rest = [v for v in (x, y) if not math.isnan(v)]
            assert math.isnan(g) if nan or not rest else g == rest[0]
        else:
            right = (min if op == "min" else max)((x, y), key=lambda v: (v, math.copysign(1, v)))
            assert (g, math.copysign(1, g)) == (right, math.copysign(1, right))


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("how", [*COMPARE, *(f"{how}u" for how in COMPARE), "num", "nan"])
def test_comparisons_with_nan_are_false_unless_unordered(how, kind):
    special = NUMPY[kind]([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 2.0])
    a, b = (v.reshape(-1) for v in np.meshgrid(special, special))
    got = one(f"setp.{how}.{kind}", (kind, kind), "pred", [a, b])
    for x, y, g in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        unordered = math.isnan(x) or math.isnan(y)
        if how in ("num", "nan"):
            assert g == (unordered == (how == "nan"))
        elif unordered:
            assert g == how.endswith("u")
        else:
            assert g == COMPARE[how[:2]](x, y)


FUNCTIONS = {
    "ex2": lambda a: 2.0**a if a < 1000 else math.inf,
    "lg2": lambda a: math.log2(a) if a > 0 else -math.inf if a == 0 else math.nan,
    "rsqrt": lambda a: 1 / math.sqrt(a) if a > 0 else math.copysign(math.inf, a) if a == 0 else math.nan,
    "rcp": lambda a: 1 / a if a else math.copysign(math.inf, a),
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else math.nan,
    "cos": lambda a: math.cos(a) if math.isfinite(a) else math.nan,
    "tanh": math.tanh,
}
APPROXIMATIONS = [
    *(f"{f}.approx{ftz}.f32" for f in FUNCTIONS if f != "tanh" for ftz in ("", ".ftz")), "tanh.approx.f32",
    *(f"{f}.rn.ftz.f32" for f in ("rcp", "sqrt")), "sqrt.rn.f32", "sqrt.rn.f64",
]  # fmt: skip


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_functions(opcode):
    f, kind = opcode.split(".")[0], opcode.split(".")[-1]
    generator = np.random.default_rng(3)
    edges = [0.0, 1.0, -1.0, math.inf, -math.inf, -200.0, 1e-42]
    a = np.concatenate([generator.normal(size=200) * 3, np.exp(generator.normal(size=100) * 9), edges]).astype(NUMPY[kind])
    got = one(opcode, (kind,), kind, [a])
    for x, g in zip(a.tolist(), got.tolist(), strict=True):
        least = 2.0**-126
        if "ftz" in opcode and abs(x) < least:
            x = math.copysign(0, x)
        right = FUNCTIONS[f](x)
        if "ftz" in opcode and abs(right) < least:
            right = math.copysign(0, right)
        if math.isnan(right):
            assert math.isnan(g)
        elif math.isinf(right) or abs(right) > 3.4028235e38:
            assert g == math.copysign(math.inf, right)
        else:
            assert abs(g - right) <= 2.0**-23 * abs(right) + 2.0**-149
            assert right or math.copysign(1, g) == math.copysign(1, right)


@pytest.mark.parametrize("how", [*COMPARE, *(f"{how}u" for how in COMPARE)])
def test_comparisons_of_bf16(how):
    special = np.float32([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0])
    a, b = (v.reshape(-1) for v in np.meshgrid(special, special))
    bits_of = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (a, b)]
    got = one(f"setp.{how}.bf16", ("u16", "u16"), "pred", bits_of)
    for x, y, g in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        assert g == (how.endswith("u") if math.isnan(x) or math.isnan(y) else COMPARE[how[:2]](x, y))


def test_subnormal_numbers_are_flushed_where_it_says_so():
    a = np.float32([1.5, -1.5, 1e-42, -1e-42, -math.inf])
    assert one("abs.ftz.f32", ("f32",), "f32", [a]).tolist() == [1.5, 1.5, 0.0, 0.0, math.inf]
    negated = one("neg.ftz.f32", ("f32",), "f32", [a])
    assert negated.tolist() == [-1.5, 1.5, 0.0, 0.0, math.inf]
    assert np.signbit(negated).tolist() == [True, False, True, False, False]
    x, y, z = np.float32([2.0, 1e-42, 1e-30, 1e-20]), np.float32([3.0, 1e20, 1e-10, 1e-20]), np.float32([1.0, 0.0, 0.0, 1e-42])
    fused = ("f32", "f32", "f32")
    assert one("fma.rn.ftz.f32", fused, "f32", [x, y, z]).tolist() == [7.0, 0.0, 0.0, 0.0]
    kept = one("fma.rn.f32", fused, "f32", [x, y, z]).tolist()
    assert kept[0] == 7.0
    assert all(v > 0 for v in kept[1:])


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_copysign_takes_the_first_ones_sign(kind):
    a, b = NUMPY[kind]([1.0, -0.0, -5.0]), NUMPY[kind]([-3.0, 2.0, math.inf])
    assert one(f"copysign.{kind}", (kind, kind), kind, [a, b]).tolist() == [3.0, -2.0, -math.inf]


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize(
    ("what", "right"), {"finite": "ttff", "infinite": "fftf", "number": "tttf", "notanumber": "ffft"}.items()
)
def test_testp(what, right, kind):
    a = NUMPY[kind]([0.0, -1.5, math.inf, math.nan])
    assert one(f"testp.{what}.{kind}", (kind,), "pred", [a]).tolist() == [r == "t" for r in right]


def test_a_fused_product_is_not_rounded_before_the_sum():
    """(1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: rounded first, its last bit is lost."""
    a = np.float32([1 + 2.0**-12])
    assert one("fma.rn.f32", ("f32",) * 3, "f32", [a, a, np.float32([-1.0])]).tolist() == [2.0**-11 + 2.0**-24]
    assert (a * a - np.float32(1)).tolist() == [2.0**-11]


def test_a_sum_just_between_two_numbers_is_rounded_once():
    """2^24 + 1 + 2^-60 is beyond the middle of two fp32 numbers, by less than fp64 has bits for."""
    a, b, c = np.float32([2.0**-30]), np.float32([2.0**-30]), np.float32([2.0**24 + 2])
    assert one("fma.rn.f32", ("f32",) * 3, "f32", [a, b, c]).tolist() == [2.0**24 + 2]
    one_ = np.float32([1 + 2.0**-23])
    got = one("fma.rn.f32", ("f32",) * 3, "f32", [one_, np.float32([2.0**-24]), np.float32([1.0])])
    assert got.tolist() == [1 + 2.0**-23]  # 1 + 2^-24 + 2^-47
