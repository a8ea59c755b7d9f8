"""Copies an operand to channels last, for kernels that need contiguous channels or run faster with them.

    y[n, j, c] = x[n, c, j]    and zero where x has no image n or no channel c

A tile is loaded along the pixels and stored along the channels, so that both accesses coalesce. The copy may have more
channels than x, or more images (a weight's images are its output channels). This aligns vectors of channels where x's are not
aligned: three channels become four, which are accessed together.
"""

import triton
import triton.language as tl

from tconv.kernels.common import APART, decode, kernel, lead, multiple, trail, turned


@triton.jit
def copy_tile(
    pid, x_ptr, y_ptr, N, C, M, K, X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
    X_FLIP: tl.constexpr, RANK: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copies tile `pid` [BLOCK_P, BLOCK_C]. Pixel p is (n, j) flattened.

    X_VEC is the vector width of loads along the pixels, and 1 if pixels are not contiguous. Y_VEC divides K. PADDED: y has more
    images or channels than x. X_FLIP is worked out by the kernels: a global constant that only a callee reads gives a kernel
    one of two cache keys in Triton, depending on which kernel was compiled first.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    X = (X0, X1, multiple(X2, X_VEC))
    sx = (multiple(sx0, X_VEC), multiple(sx1, X_VEC), 1 if X_VEC > 1 else sx2)
    pixels = M.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= X[d]
    K = multiple(K, Y_VEC)
    tiles_c = tl.cdiv(K, BLOCK_C)
    p = (pid // tiles_c).to(OFFSET) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
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


@kernel
def copy_channels_last(
    x_ptr, y_ptr,
    N, C, M, K,  # images and channels: of x, of y
    X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
    RANK: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copies x to y, a tile per program."""
    copy_tile(
        tl.program_id(0), x_ptr, y_ptr, N, C, M, K, X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
        X_VEC > 1 or APART, RANK, X_VEC, Y_VEC, PADDED, WIDE, BLOCK_P, BLOCK_C,
    )  # fmt: skip


@kernel
def copy_both(
    x_ptr, y_ptr, u_ptr, v_ptr,
    programs,  # of the first copy
    N, C, M, K, X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
    uN, uC, uM, uK, uX0, uX1, uX2, usxn, usxc, usx0, usx1, usx2,
    RANK: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    uRANK: tl.constexpr, uX_VEC: tl.constexpr, uY_VEC: tl.constexpr, uPADDED: tl.constexpr, uWIDE: tl.constexpr,
    uBLOCK_P: tl.constexpr, uBLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copies x to y and u to v in one launch. u's arguments are those of x with a u in front."""
    pid = tl.program_id(0)
    if pid < programs:
        copy_tile(
            pid, x_ptr, y_ptr, N, C, M, K, X0, X1, X2, sxn, sxc, sx0, sx1, sx2,
            X_VEC > 1 or APART, RANK, X_VEC, Y_VEC, PADDED, WIDE, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    else:
        copy_tile(
            pid - programs, u_ptr, v_ptr, uN, uC, uM, uK, uX0, uX1, uX2, usxn, usxc, usx0, usx1, usx2,
            uX_VEC > 1 or APART, uRANK, uX_VEC, uY_VEC, uPADDED, uWIDE, uBLOCK_P, uBLOCK_C,
        )  # fmt: skip
