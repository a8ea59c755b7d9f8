"""cvt against Python's integers and fractions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from simulator.arrays import E4M3
from tests.simulator.exact import FORMATS, fraction, rounded
from tests.simulator.execute import execute, one
from tests.simulator.values import WIDTHS, floats, integers, packed, wrap

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def register(kind):
    """The type of the narrowest register that holds one."""
    return {"u8": "u16", "s8": "s16"}.get(kind, kind)


@pytest.mark.parametrize(("to", "source"), list(itertools.product(INTEGERS, INTEGERS)))
def test_between_integers(to, source):
    a = integers(source, 100)
    got = one(
        f"cvt.{to}.{source}",
        (register(source),),
        register(to),
        [packed([wrap(n, register(source)) for n in a], register(source))],
    )
    assert got.tolist() == [wrap(n, to) for n in a]


def test_a_wider_register_is_read_by_its_low_bits():
    a = np.array([-1, 0x1_0000_0005, 1 << 31], np.int64)
    got = execute("cvt.u64.u32 %rd2, %rd1; cvt.s64.s32 %rd3, %rd1; cvt.s32.s8 %r1, %rd1;", {"%rd1": a})
    assert got["%rd2"][:3].tolist() == [0xFFFFFFFF, 5, 1 << 31]
    assert got["%rd3"][:3].tolist() == [-1, 5, -(1 << 31)]
    assert got["%r1"][:3].tolist() == [-1, 5, 0]


FLOATS = ("f16", "f32", "f64")


def bits(values, kind):
    return np.array(values, f"u{WIDTHS[kind] // 8}")


def unsigned(kind):
    return {16: "b16", 32: "u32", 64: "u64"}[WIDTHS[kind]]


@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize(("to", "source"), list(itertools.product(INTEGERS[2:], FLOATS)))
def test_floats_to_integers(how, to, source):
    halves = [rounded(Fraction(n, 2), source) for n in range(-9, 10)]
    infinity = {"f16": 0x7C00, "f32": 0x7F800000, "f64": 0x7FF0000000000000}[source]
    a = [*floats(source, 200), *halves, infinity, infinity | 1 << WIDTHS[source] - 1, infinity + 1]
    got = one(f"cvt.{how}.{to}.{source}", (unsigned(source),), to, [bits(a, source)])
    width = int(to[1:])
    low, high = (0, (1 << width) - 1) if to[0] == "u" else (-(1 << width - 1), (1 << width - 1) - 1)
    for v, g in zip(a, got.tolist(), strict=True):
        number = fraction(v, source)
        if isinstance(number, float):
            right = 0 if math.isnan(number) else high if number > 0 else low
        else:
            right = min(max(ROUNDINGS[how](number), low), high)
        assert g == right


@pytest.mark.parametrize(("to", "source"), list(itertools.product(FLOATS, INTEGERS[2:])))
def test_integers_to_floats(to, source):
    a = integers(source, 200)
    got = one(f"cvt.rn.{to}.{source}", (source,), unsigned(to), [packed(a, source)])
    assert got.tolist() == [rounded(Fraction(n), to) for n in a]


BETWEEN = [("f16", "f32"), ("f16", "f64"), ("f32", "f64"), ("bf16", "f32")]


@pytest.mark.parametrize(("to", "source"), BETWEEN)
def test_narrowing_rounds_to_nearest_even(to, source):
    ties = [rounded(fraction(v, to) + fraction(1, to) / 2, source) for v in floats(to, 50) if v >> WIDTHS[to] - 1 == 0]
    a = [*floats(source, 300), *ties]
    got = one(f"cvt.rn.{to}.{source}", (unsigned(source),), unsigned(to), [bits(a, source)])
    assert got.tolist() == [
        rounded(fraction(v, source), to) if fraction(v, source) else v >> WIDTHS[source] - WIDTHS[to] for v in a
    ]


def test_towards_zero():
    a = floats("f32", 300)
    got = one("cvt.rz.bf16.f32", ("u32",), "b16", [bits(a, "f32")])
    assert got.tolist() == [v >> 16 for v in a]


@pytest.mark.parametrize(("to", "source"), [("f32", "f16"), ("f64", "f16"), ("f64", "f32"), ("f32", "bf16")])
def test_widening_keeps_every_number(to, source):
    a = floats(source, 300)
    got = one(f"cvt.{to}.{source}", (unsigned(source),), unsigned(to), [bits(a, source)])
    for v, g in zip(a, got.tolist(), strict=True):
        assert fraction(g, to) == fraction(v, source)
        assert g >> WIDTHS[to] - 1 == v >> WIDTHS[source] - 1


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_have_the_first_source_above(kind):
    high, low = floats("f32", 100, 1), floats("f32", 100, 2)
    got = one(f"cvt.rn.{kind}x2.f32", ("u32", "u32"), "u32", [bits(high, "f32"), bits(low, "f32")])
    halves = [one(f"cvt.rn.{kind}.f32", ("u32",), "b16", [bits(v, "f32")]).tolist() for v in (high, low)]
    assert got.tolist() == [h << 16 | n for h, n in zip(*halves, strict=True)]


def test_pairs_of_e4m3_are_rounded_as_torch_rounds_and_end_at_448():
    beyond = np.float32([1e-4, 449, 1e9, math.inf, math.nan])
    a = np.concatenate([E4M3, (E4M3[:126] + E4M3[1:127]) / 2, beyond, np.linspace(-9, 9, 99)])
    a = a.astype(np.float32)
    got = one("cvt.rn.satfinite.e4m3x2.f32", ("f32", "f32"), "b16", [a, -a])
    right = [torch.from_numpy(v).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) for v in (a, -a)]
    numbers = ~np.isnan(a)
    assert (got >> 8)[numbers].tolist() == right[0][numbers].tolist()
    assert (got & 255)[numbers].tolist() == right[1][numbers].tolist()
    assert np.isnan(E4M3[got[~numbers] & 255]).all()


@pytest.mark.parametrize(("how", "ties"), [("rna", "away"), ("rn", "even")])
def test_tf32_keeps_ten_bits(how, ties):
    assert FORMATS["tf32"] == (8, 10)
    halfway = [0x3F800000 | n << 12 for n in range(8)]
    a = [*floats("f32", 300), *halfway]
    got = one(f"cvt.{how}.tf32.f32", ("u32",), "u32", [bits(a, "f32")])
    assert got.tolist() == [rounded(fraction(v, "f32"), "tf32", ties) << 13 if fraction(v, "f32") else v for v in a]


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_to_whole_numbers(how, kind):
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    a = dtype([0.5, 1.5, 2.5, -0.5, -1.5, 3.0, -2.75, 1000.25, math.inf])
    got = one(f"cvt.{how}.{kind}.{kind}", (kind,), kind, [a])
    assert got.tolist() == [v if math.isinf(v) else float(ROUNDINGS[how](v)) for v in a.tolist()]


@pytest.mark.parametrize(("opcode", "to"), [("cvt.rn.f16.f32", "b16"), ("cvt.rn.bf16.f32", "b16")])
def test_nan_stays_nan(opcode, to):
    (got,) = one(opcode, ("u32",), to, [np.array([0x7F800001], np.uint32)]).tolist()
    assert math.isnan(fraction(got, opcode.split(".")[2]))


BY_HAND = [
    ("cvt.rn.bf16.f32", "f32", "b16", 1.0, 0x3F80),
    ("cvt.rn.f16.f32", "f32", "b16", 65520.0, 0x7C00),
    ("cvt.rzi.s32.f32", "f32", "s32", -2.9, -2),
    ("cvt.rni.s32.f32", "f32", "s32", 2.5, 2),
    ("cvt.rn.f32.s32", "s32", "f32", 16777217, 16777216.0),
]


@pytest.mark.parametrize(("opcode", "source", "to", "value", "right"), BY_HAND)
def test_by_hand(opcode, source, to, value, right):
    dtype = np.float32 if source == "f32" else np.int32
    assert one(opcode, (source,), to, [dtype([value])]).tolist() == [right]
