"""Copies an operand to channels last, for kernels that need contiguous channels or run faster with them.

    y[n, j, c] = x[n, c, j]    and zero where x has no image n or no channel c

A tile is loaded along the pixels and stored along the channels, so that both accesses coalesce. The copy may have more
channels than x, or more images (a weight's images are its output channels). This aligns vectors of channels where x's are not
aligned: three channels become four, which are accessed together.
"""

import triton.language as tl

from tconv.kernels.common import APART, decode, kernel, lead, multiple, trail, turned


@kernel
def copy_channels_last(
    x_ptr, y_ptr,
    N, C, M, K,  # images and channels: of x, of y
    X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
    RANK: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program copies a tile [BLOCK_P, BLOCK_C]. Pixel p is (n, j) flattened.

    X_VEC is the vector width of loads along the pixels, and 1 if pixels are not contiguous. Y_VEC divides K. PADDED: y has more
    images or channels than x.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    X_FLIP: tl.constexpr = X_VEC > 1 or APART
    X = (X0, X1, multiple(X2, X_VEC))
    sx = (multiple(sx0, X_VEC), multiple(sx1, X_VEC), 1 if X_VEC > 1 else sx2)
    pixels = M.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= X[d]
    K = multiple(K, Y_VEC)
    tiles_c = tl.cdiv(K, BLOCK_C)
    p = (tl.program_id(0) // tiles_c).to(OFFSET) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image, j = decode(p, X, RANK)
    offset = image.to(OFFSET) * multiple(sxn, X_VEC)
    for d in tl.static_range(3 - RANK, 3):
        offset += j[d].to(OFFSET) * sx[d]
    channel = c.to(OFFSET) * multiple(sxc, X_VEC)
    address = x_ptr + (lead(offset, X_FLIP) + trail(channel, X_FLIP))
    if PADDED:  # what is loaded is [BLOCK_P, BLOCK_C] or transposed
        read = tl.load(address, mask=lead(image < N, X_FLIP) & trail(c < C, X_FLIP), other=0.0)
    else:
        read = tl.load(address, mask=lead(p < pixels, X_FLIP) & trail(c < C, X_FLIP))
    mask = lead(p < pixels, False) & trail(c < K, False)
    tl.store(y_ptr + lead(p * K, False) + trail(c, False), turned(read, X_FLIP, False), mask=mask)
