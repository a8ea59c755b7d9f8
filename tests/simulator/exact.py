"""Floating-point numbers as fractions: an independent way to say what a correctly rounded result is."""

import math
from fractions import Fraction

FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52), "tf32": (8, 10)}  # bits of exponent and fraction


def fraction(bits, kind):
    """The number that bits are, a Fraction; a float if it is infinite or NaN."""
    exponent_bits, fraction_bits = FORMATS[kind]
    sign = -1 if bits >> (exponent_bits + fraction_bits) else 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    rest = bits & (1 << fraction_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if rest else sign * math.inf
    if exponent == 0:
        return sign * Fraction(rest) * Fraction(2) ** (1 - bias - fraction_bits)
    return sign * Fraction(rest + (1 << fraction_bits)) * Fraction(2) ** (exponent - bias - fraction_bits)


def rounded(value, kind, ties="even"):
    """The bits of the number nearest to a Fraction; of two, the even one, or the larger ("away"); or towards "zero"."""
    exponent_bits, fraction_bits = FORMATS[kind]
    bias = (1 << exponent_bits - 1) - 1
    sign = int(value < 0) << (exponent_bits + fraction_bits)
    value = abs(value)
    if value == 0:
        return sign
    exponent = max(math.floor(math.log2(value.numerator) - math.log2(value.denominator)) - 1, 1 - bias)
    while exponent > 1 - bias and value < Fraction(2) ** exponent:
        exponent -= 1
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    scaled = value / Fraction(2) ** (exponent - fraction_bits)
    whole, rest = divmod(scaled, 1)
    whole = int(whole)
    if ties != "zero" and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (ties == "away" or whole % 2))):
        whole += 1
    bits = whole if exponent == 1 - bias else whole + ((exponent + bias - 1) << fraction_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    return sign | min(bits, infinity)
