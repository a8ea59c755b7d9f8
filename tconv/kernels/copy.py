"""Copies an operand to channels last, for kernels that need contiguous channels or run faster with them.

    y[n, j, c] = x[n, c, j]

A tile is loaded along the pixels and stored along the channels, so that both accesses coalesce.
"""

import triton.language as tl

from tconv.kernels.common import APART, decode, kernel, lead, multiple, trail, turned


@kernel
def copy_channels_last(
    x_ptr, y_ptr, N, C, X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
    RANK: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program copies a tile [BLOCK_P, BLOCK_C]. Pixel p is (n, j) flattened.

    X_VEC is the vector width of loads along the pixels, and 1 if pixels are not contiguous. Y_VEC divides C.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    X_FLIP: tl.constexpr = X_VEC > 1 or APART
    X = (X0, X1, multiple(X2, X_VEC))
    sx = (multiple(sx0, X_VEC), multiple(sx1, X_VEC), 1 if X_VEC > 1 else sx2)
    pixels = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= X[d]
    C = multiple(C, Y_VEC)
    tiles_c = tl.cdiv(C, BLOCK_C)
    p = (tl.program_id(0) // tiles_c).to(OFFSET) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image, j = decode(p, X, RANK)
    offset = image.to(OFFSET) * multiple(sxn, X_VEC)
    for d in tl.static_range(3 - RANK, 3):
        offset += j[d].to(OFFSET) * sx[d]
    channel = c.to(OFFSET) * multiple(sxc, X_VEC)
    mask = lead(p < pixels, X_FLIP) & trail(c < C, X_FLIP)
    read = tl.load(x_ptr + (lead(offset, X_FLIP) + trail(channel, X_FLIP)), mask=mask)  # [BLOCK_P, BLOCK_C] or transposed
    mask = lead(p < pixels, False) & trail(c < C, False)
    tl.store(y_ptr + lead(p * C, False) + trail(c, False), turned(read, X_FLIP, False), mask=mask)
