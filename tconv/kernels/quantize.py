"""Rounds a tensor to fp8 (e4m3): q = nearest(x * (1 / divisor)), where numbers beyond +-448 become +-448, and NaN stays NaN.

Elements are taken in the order in which they lie in memory, so x may have any strides without gaps, and q has the same.
"""

import triton
import triton.language as tl

from tconv.kernels.common import kernel, multiple

LARGEST = tl.constexpr(448.0)  # the largest number of e4m3


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
def quantize(
    x_ptr, divisor_ptr, q_ptr,
    numel,
    VEC: tl.constexpr,  # divides numel
    WIDE: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = i < multiple(numel, VEC)
    inverse = tl.div_rn(1.0, tl.load(divisor_ptr))
    v = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32) * inverse
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # comparisons with NaN are false
    if INTERPRET:
        q = tl.where(v == v, nearest_fp8(v), v).to(tl.float8e4nv)
        q = tl.where(v == v, q.to(tl.uint8, bitcast=True), 0x7F).to(tl.float8e4nv, bitcast=True)
    else:
        q = v.to(tl.float8e4nv)
    tl.store(q_ptr + i, q, mask=mask)
