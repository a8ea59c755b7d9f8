"""Floating-point arithmetic and comparison.

Rounding is to nearest even, subnormal numbers are kept, unless a form ends in `.ftz`. The payload of a NaN is not specified
in PTX. Approximations are computed in fp64 and rounded: nearer to the exact result than hardware must be.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from simulator.arrays import Array
from simulator.forms.conversions import bf16
from simulator.translator import Code, form

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
LEAST = np.float32(2.0**-126)  # the least normal fp32
SPLIT = float(2**27 + 1)


@form("{add,sub,mul}.{f16,f32,f64}", "{add,sub,mul}.rn.{f16,f32,f64}", "{div}.rn.{f32,f64}")
def arithmetic(c: Code, op: str, kind: str) -> None:
    c.write(0, f"{c.read(1, kind)} {SIGNS[op]} {c.read(2, kind)}", kind)


@form("div.{full,approx}.f32")
def divide(c: Code, _: str) -> None:
    """Within two units in the last place, says PTX; correctly rounded here."""
    c.write(0, f"{c.read(1, 'f32')} / {c.read(2, 'f32')}", "f32")


@form("fma.rn.{f32,f64}")
def fused(c: Code, kind: str) -> None:
    f = {"f32": fma_32, "f64": fma_64}[kind]
    c.write(0, c.call(f, c.read(1, kind), c.read(2, kind), c.read(3, kind)), kind)


@form("fma.rn.ftz.{f32}")
def fused_flushed(c: Code, kind: str) -> None:
    a, b, addend = (c.call(flushed, c.read(i, kind)) for i in (1, 2, 3))
    c.write(0, c.call(flushed, c.call(fma_32, a, b, addend)), kind)


def fma_32(a: Array, b: Array, c: Array) -> Array:
    """In fp64 the product is exact, and only the sum is rounded. Rounded again, it is wrong only if it lies, by then, just
    between two fp32 numbers: there, and below fp32's normal range, it is first rounded to odd, which keeps what was lost.
    """
    product = a.astype(np.float64) * b
    total = product + c
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    small = np.abs(total) < LEAST
    if halfway.any() or (small & (total != 0)).any():
        total = _sum_to_odd(product, c.astype(np.float64))
    return total.astype(np.float32)


def fma_64(a: Array, b: Array, c: Array) -> Array:
    """The product and the sum as exact pairs of numbers, their last bits added to odd (Boldo and Melquiond, 2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high = a * b
    plain = high + c
    low = _product_error(a, b, high)
    first, first_error = _exact_sum(c, low)
    second, second_error = _exact_sum(high, first)
    found = second + _sum_to_odd(first_error, second_error)
    unsafe = ~np.isfinite(found) | (np.abs(a) > 1e150) | (np.abs(b) > 1e150) | (np.abs(high) < 1e-250)
    return np.where(unsafe, _fma_exactly(a, b, c, plain, unsafe), found)


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a + b and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """Returns the rounding error of a product (Dekker)."""
    a_high, b_high = (SPLIT * v - (SPLIT * v - v) for v in (a, b))
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _sum_to_odd(a: Array, b: Array) -> Array:
    """Returns a + b, where it is not exact with its last bit set: of its two neighbours the odd one."""
    total, error = _exact_sum(a, b)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error)
    return np.where(even, bits + towards, bits).view(np.float64)


def _fma_exactly(a: Array, b: Array, c: Array, plain: Array, where: Array) -> Array:
    """Near overflow and underflow, by whole numbers: slow, and rare. Zeros, infinities and NaN come out of plain arithmetic."""
    found = plain.copy()
    for i in np.argwhere(where & np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)):
        x, y, z = (Fraction(float(v[tuple(i)])) for v in (a, b, c))
        total = x * y + z
        if total:
            try:
                found[tuple(i)] = total.numerator / total.denominator  # Python's division of whole numbers rounds correctly
            except OverflowError:
                found[tuple(i)] = np.inf if total > 0 else -np.inf
        else:
            found[tuple(i)] = 0.0
    return found


@form("fma.rn.{f16,bf16}")
def fused_half(c: Code, kind: str) -> None:
    _write_half(c, c.call(fma_half, *(_halves(c, i, kind) for i in (1, 2, 3))), kind)


def fma_half(a: Array, b: Array, c: Array) -> Array:
    """The exact product, and the sum to odd, in fp64: rounded to 16 bits from there, it is as if it were rounded only once."""
    return _sum_to_odd(a.astype(np.float64) * b, c.astype(np.float64))


@form("{add,sub,mul}.bf16", "{add,sub,mul}.rn.bf16")
def arithmetic_bf16(c: Code, op: str) -> None:
    """fp32 has more than twice the bits: rounded to bf16 from there, the result is right."""
    _write_half(c, f"{_halves(c, 1, 'bf16')} {SIGNS[op]} {_halves(c, 2, 'bf16')}", "bf16")


def _halves(c: Code, operand: int, kind: str) -> str:
    return c.read(operand, "f16") if kind == "f16" else c.call(widened, c.read(operand, "u16"))


def _write_half(c: Code, expression: str, kind: str) -> None:
    if kind == "f16":
        c.write(0, f"({expression}).astype({c.name(np.float16)})", "f16")
    else:
        c.write(0, c.call(narrowed, expression), "u16")


def widened(bits: Array) -> Array:
    """Returns bf16 numbers as fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(a: Array) -> Array:
    """Returns the bits in bf16 of fp32 numbers, or of fp64 ones that were rounded to odd."""
    if a.dtype == np.float64:  # to odd again, in fp32: towards zero, and the last bit set if anything is lost
        cut = a.astype(np.float32)
        cut = np.where(np.abs(cut) > np.abs(a), np.nextafter(cut, np.float32(0)), cut)
        bits = cut.view(np.uint32) | (cut != a) & np.isfinite(a)
        return bf16(bits.astype(np.uint32), True)
    return bf16(a.view(np.uint32), True)


@form("{add,sub,mul}.{f16x2,bf16x2}", "{add,sub,mul,fma}.rn.{f16x2,bf16x2}")
def arithmetic_pairs(c: Code, op: str, kind: str) -> None:
    operands = (c.read(i, "u32") for i in range(1, len(c.operands)))
    c.write(0, c.call(pairwise, c.name(FUNCTIONS[op]), str(kind == "f16x2"), *operands), "u32")


def pairwise(f: Callable[..., Array], f16: bool, *operands: Array) -> Array:
    """Applies a function to the lower and upper halves of registers."""
    found = []
    for shift in (0, 16):
        halves = ((v >> np.uint32(shift)).astype(np.uint16) for v in operands)
        result = f(*(h.view(np.float16) if f16 else widened(h) for h in halves))
        found.append(result.astype(np.float16).view(np.uint16) if f16 else narrowed(result))
    return found[0] | found[1].astype(np.uint32) << np.uint32(16)


FUNCTIONS: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma_half}


@form("{neg,abs}.{f16,f32,f64}")
def sign(c: Code, op: str, kind: str) -> None:
    c.write(0, f"-{c.read(1, kind)}" if op == "neg" else c.call(np.abs, c.read(1, kind)), kind)


@form("{neg,abs}.ftz.f32")
def sign_flushed(c: Code, op: str) -> None:
    a = c.call(flushed, c.read(1, "f32"))
    c.write(0, f"-{a}" if op == "neg" else c.call(np.abs, a), "f32")


@form("{neg,abs}.bf16")
def sign_bf16(c: Code, op: str) -> None:
    bit = {"neg": f"^ {c.constant(0x8000, np.uint16)}", "abs": f"& {c.constant(0x7FFF, np.uint16)}"}[op]
    c.write(0, f"{c.read(1, 'b16')} {bit}", "b16")


@form("{min,max}{,.NaN}.{f16,f32}", "{min,max}{}.{f64}")
def extreme(c: Code, op: str, nan: str, kind: str) -> None:
    f = {"min": least, "max": greatest}[op]
    c.write(0, c.call(f, c.read(1, kind), c.read(2, kind), str(bool(nan))), kind)


def least(a: Array, b: Array, keep_nan: bool) -> Array:
    """-0 is less than 0. Of a number and NaN, the number is returned, unless NaN is to be kept."""
    found = (np.minimum if keep_nan else np.fmin)(a, b)
    return np.where(a == b, np.where(np.signbit(a), a, b), found)


def greatest(a: Array, b: Array, keep_nan: bool) -> Array:
    found = (np.maximum if keep_nan else np.fmax)(a, b)
    return np.where(a == b, np.where(np.signbit(a), b, a), found)


def ex2(a: Array) -> Array:
    return np.exp2(a)


def lg2(a: Array) -> Array:
    return np.log2(a)


def rsqrt(a: Array) -> Array:
    return 1 / np.sqrt(a)


def rcp(a: Array) -> Array:
    return 1 / a


UNARY: dict[str, Callable[[Array], Array]] = {
    "ex2": ex2, "lg2": lg2, "rsqrt": rsqrt, "rcp": rcp, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@form("{ex2,lg2,rsqrt,rcp,sqrt,sin,cos}.approx{,.ftz}.f32", "{rcp,sqrt}.rn{,.ftz}.f32", "{tanh}.approx{}.f32")
def function(c: Code, op: str, ftz: str) -> None:
    a = c.read(1, "f32")
    a = c.call(flushed, a) if ftz else a
    found = f"{c.name(UNARY[op])}({a}.astype({c.name(np.float64)})).astype({c.name(np.float32)})"
    c.write(0, c.call(flushed, found) if ftz else found, "f32")


@form("{rcp,sqrt}.rn.f64")
def function_64(c: Code, op: str) -> None:
    c.write(0, c.call(UNARY[op], c.read(1, "f64")), "f64")


def flushed(a: Array) -> Array:
    """Returns fp32 numbers with zeros, of the same sign, for subnormal ones."""
    return np.where(np.abs(a) < LEAST, np.copysign(np.float32(0), a), a)


@form("setp.{eq,ne,lt,le,gt,ge}{,u}.{f16,bf16,f32,f64}")
def compare(c: Code, how: str, unordered: str, kind: str) -> None:
    """True of NaN only if `u` is appended; != needs care, since numpy's is true of NaN."""
    a, b = (_halves(c, i, kind) if kind == "bf16" else c.read(i, kind) for i in (1, 2))
    found = f"({a} {SIGNS[how]} {b})"
    if unordered and how != "ne":
        found += f" | {c.call(unordered_pair, a, b)}"
    elif not unordered and how == "ne":
        found += f" & ~{c.call(unordered_pair, a, b)}"
    c.write(0, found, "pred")


@form("setp.{num,nan}.{f16,f32,f64}")
def compare_kinds(c: Code, how: str, kind: str) -> None:
    found = c.call(unordered_pair, c.read(1, kind), c.read(2, kind))
    c.write(0, found if how == "nan" else f"~{found}", "pred")


def unordered_pair(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


@form("copysign.{f32,f64}")
def copy_sign(c: Code, kind: str) -> None:
    """The first operand's sign with the second's magnitude."""
    c.write(0, c.call(np.copysign, c.read(2, kind), c.read(1, kind)), kind)


@form("testp.{finite,infinite,number,notanumber}.{f32,f64}")
def test(c: Code, what: str, kind: str) -> None:
    f = {"finite": np.isfinite, "infinite": np.isinf, "number": np.isnan, "notanumber": np.isnan}[what]
    found = c.call(f, c.read(1, kind))
    c.write(0, f"~{found}" if what == "number" else found, "pred")
