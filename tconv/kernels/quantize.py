"""Rounds a tensor to fp8 (e4m3): q = nearest(x * (1 / divisor)), where numbers beyond +-448 become +-448, and NaN stays NaN.

    largest   the largest finite |x| of each program's part
    quantize  q, by a divisor that is given, or by the largest of these over 448

Elements are taken in the order in which they lie in memory, so x may have any strides without gaps, and q has the same.
"""

import triton
import triton.language as tl

from tconv.kernels.common import kernel, multiple

LARGEST = tl.constexpr(448.0)  # the largest number of e4m3
LEAST = tl.constexpr(448 * 2.0**-126)  # a tensor whose largest number is less gets the scale 2^-126, whose inverse is finite


@triton.jit
def nearest_fp8(v):
    """Returns fp32 numbers, at most 448, rounded to the nearest that e4m3 has, ties to even, still as fp32.

    For the interpreter, whose conversion rounds otherwise. Numbers have four digits, or fewer below 2^-6, where all are
    multiples of 2^-9: adding 1.5 * 2^14 rounds to these.
    """
    bits = v.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, rounded)


@kernel
def largest(
    x_ptr, part_ptr,
    numel,
    VEC: tl.constexpr,  # divides numel
    WIDE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,  # PARTS: the number of programs
):  # fmt: skip
    """Writes a program's largest finite |x| in fp32, 0 if it has none, to part[program]. Of PARTS blocks it takes one."""
    numel = multiple(numel, VEC)
    i = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(0, tl.cdiv(numel, PARTS * BLOCK)):
        v = tl.abs(tl.load(x_ptr + i, mask=i < numel, other=0.0).to(tl.float32))
        found = tl.maximum(found, tl.where(v < float("inf"), v, 0.0))  # comparisons with NaN are false
        i += PARTS * BLOCK
    tl.store(part_ptr + tl.program_id(0), tl.max(found, axis=0))


@kernel
def quantize(
    x_ptr, divisor_ptr, part_ptr, q_ptr,
    numel,
    VEC: tl.constexpr,  # divides numel
    PARTS: tl.constexpr,  # of `largest`, if the divisor is theirs and is written; 0 if it is read
    WIDE: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = i < multiple(numel, VEC)
    if PARTS:
        most = tl.max(tl.load(part_ptr + tl.arange(0, PARTS)), axis=0)
        divisor = tl.div_rn(tl.where(most > 0, tl.maximum(most, LEAST), 1.0), LARGEST)
        tl.store(divisor_ptr, divisor, mask=tl.program_id(0) == 0)
    else:
        divisor = tl.load(divisor_ptr)
    inverse = tl.div_rn(1.0, divisor)
    v = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32) * inverse
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # comparisons with NaN are false
    if INTERPRET:
        q = tl.where(v == v, nearest_fp8(v), v).to(tl.float8e4nv)
        q = tl.where(v == v, q.to(tl.uint8, bitcast=True), 0x7F).to(tl.float8e4nv, bitcast=True)
    else:
        q = v.to(tl.float8e4nv)
    tl.store(q_ptr + i, q, mask=mask)
