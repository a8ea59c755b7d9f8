"""Operands: random ones, and those at which definitions change."""

import numpy as np


def integers(kind, count, seed=0):
    """Python integers of a type: its ends, small ones, and random ones of all lengths."""
    width = int(kind[1:])
    generator = np.random.default_rng(seed)
    ends = [0, 1, 2, 3, -1, -2, -3, 1 << width - 1, (1 << width - 1) - 1, (1 << width - 1) + 1, (1 << width) - 2, 7, -7]
    many = [
        int(generator.integers(0, 1 << 63)) * 2 + int(generator.integers(2)) >> int(generator.integers(0, 64))
        for _ in range(count)
    ]
    signed = [-n if generator.integers(2) else n for n in many]
    found = [wrap(n, kind) for n in ends + signed]
    order = generator.permutation(len(found))
    return [found[i] for i in order]


def wrap(value, kind):
    """An integer modulo 2 to the width of a type, within the type's range."""
    width = int(kind[1:])
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> width - 1 else value


def packed(numbers, kind):
    """Python integers as an array of a type's bits."""
    width = int(kind[1:])
    return np.array([n & (1 << width) - 1 for n in numbers], f"u{max(width, 8) // 8}")


FLOAT_EDGES = {
    "f16": [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x3C01, 0x3555],
    "bf16": [0x0000, 0x8000, 0x0001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x3F81, 0x4049],
    "f32": [
        0x00000000,
        0x80000000,
        0x00000001,
        0x807FFFFF,
        0x00800000,
        0x3F800000,
        0xBF800000,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x3F800001,
    ],
    "f64": [0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FEFFFFFFFFFFFFF],
}
WIDTHS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def floats(kind, count, seed=0):
    """Bits of finite numbers: edges, and random ones, half of them of all sizes, half of them near one."""
    generator = np.random.default_rng(seed)
    width = WIDTHS[kind]
    exponent_bits, fraction_bits = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}[kind]
    found = list(FLOAT_EDGES[kind])
    while len(found) < count + len(FLOAT_EDGES[kind]):
        bits = int(generator.integers(0, 1 << 32)) << 32 | int(generator.integers(0, 1 << 32))
        bits &= (1 << width) - 1
        exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
        if exponent == (1 << exponent_bits) - 1:
            continue
        if generator.integers(2):
            near = (1 << exponent_bits - 1) - 1 + int(generator.integers(-4, 5))
            bits = bits & ~(((1 << exponent_bits) - 1) << fraction_bits) | near << fraction_bits
        found.append(bits)
    order = generator.permutation(len(found))
    return [found[i] for i in order]
