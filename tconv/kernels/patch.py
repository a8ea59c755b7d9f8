"""dgrad of patches that do not overlap and cover dx (also the forward of such transposed layers), as one matrix product.

    dx[n, c, j*T + t] = sum over k of dy[n, k, j] * w[k, c, t]

             GEMM_M     GEMM_N   GEMM_K       per group: K and C are channels per group
    dgrad    N*Z*P*Q    C*T*R*S  K

In the code x is the tensor read (dy, or a transposed layer's input) and y the tensor written (dx). CI are the channels per
group of x, CO the columns per group: every channel of every tap, in the order in which they lie in w. A tile of columns is
loaded once for all phases of a pixel, of which `gather` would make a product each.

A run of L columns is contiguous in y. What distinguishes runs are the rows of columns, which have up to three strides. Where
channels are contiguous, a run is the channels, and rows are taps. Where pixels are, a run is the taps of the last dimension,
and rows are the other taps and the channels. Runs shorter than 16 bytes are joined with those of the neighbouring pixels
(JOINED), beside which they lie in y: the tile is rearranged, and stored in vectors along a line of y.
"""

import triton
import triton.language as tl

from tconv.kernels.common import APART, decode, flat_pixels, kernel, lead, multiple, product, rounded, trail, turned
from tconv.kernels.epilogue import finish


@triton.jit
def row_offset(row, R1, R2, r0, r1, r2, Y_VEC: tl.constexpr, OFFSET: tl.constexpr):
    """Returns where a row of columns begins in y. R1 and R2 are the inner extents of rows, r0, r1 and r2 their strides."""
    offset = (row // (R1 * R2)).to(OFFSET) * multiple(r0, Y_VEC)
    offset += (row // R2 % R1).to(OFFSET) * multiple(r1, Y_VEC)
    return offset + (row % R2).to(OFFSET) * multiple(r2, Y_VEC)


@kernel
def patch(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    N, CI, CO, G, X0, X1, X2,  # X: extents of x
    L, R1, R2, r0, r1, r2,  # columns: the run, inner extents of rows, strides of rows
    b_each, b_all,  # the channel of column o is o // b_each % b_all, of a group
    sxn, sxg, sxc, sx0, sx1, sx2, swg, swi,
    syn, syg, sy0, sy1, sy2, sb,  # of y: sy0, sy1 and sy2 from one pixel of x to the next
    RANK: tl.constexpr, X_UNIT: tl.constexpr,
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, Y_VEC: tl.constexpr, X_PIXELS: tl.constexpr, JOINED: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """JOINED is the length of runs that are joined, else 1. Y_VEC is the vector width along joined runs, or along one."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    X_FLIP: tl.constexpr = False if X_UNIT else X_PIXELS > 1 or APART
    X = (X0, X1, X2)
    sx = (multiple(sx0, X_VEC), multiple(sx1, X_VEC), multiple(sx2, X_VEC))
    # Tiles of columns of all groups vary fastest, because they read the same pixels.
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    group = tl.program_id(0) // tiles_n % G
    pid_m = tl.program_id(0) // (tiles_n * G)

    pixels = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= X[d]
    m = pid_m.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    if X_PIXELS > 1:
        live, x_offset = flat_pixels(pid_m, N, X, sxn, RANK, OFFSET, BLOCK_M, X_PIXELS)
    else:
        live = m < pixels
        image, j = decode(m, X, RANK)
        x_offset = image.to(OFFSET) * multiple(sxn, X_VEC)
        for d in tl.static_range(3 - RANK, 3):
            x_offset += j[d].to(OFFSET) * sx[d]
    c = tl.arange(0, BLOCK_K)
    o = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    reduced = multiple(CI, X_VEC)
    columns = multiple(CO, W_VEC)
    x_step = 1 if X_UNIT else multiple(sxc, X_PIXELS).to(OFFSET)
    w_step = multiple(swi, W_VEC)
    xp = x_ptr + group * multiple(sxg, max(X_VEC, X_PIXELS)).to(OFFSET) + (lead(x_offset, X_FLIP) + trail(c * x_step, X_FLIP))
    wp = w_ptr + group * multiple(swg, W_VEC) + (c[:, None] * w_step + o[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    dx = x_step * 0
    dw = w_step * 0
    for done in tl.range(0, CI, BLOCK_K):
        if EVEN:
            xv = tl.load(xp + dx, mask=lead(live, X_FLIP), other=0.0)
            wv = tl.load(wp + dw, mask=o[None, :] < columns, other=0.0)
        else:
            tail = c < reduced - done
            xv = tl.load(xp + dx, mask=lead(live, X_FLIP) & trail(tail, X_FLIP), other=0.0)
            wv = tl.load(wp + dw, mask=(o[None, :] < columns) & tail[:, None], other=0.0)
        acc = product(turned(xv, X_FLIP, False), wv, acc, PRECISION, INTERPRET)
        dx += BLOCK_K * x_step
        dw += BLOCK_K * w_step
    if HAS_BIAS:
        channel = o // b_each % b_all
        acc += tl.load(b_ptr + (group * b_all + channel) * sb, mask=o < CO, other=0.0).to(ACC)[None, :]

    # With an epilogue, sums are rounded after its steps; else before they are rearranged, so that half as much is.
    FUSED: tl.constexpr = ACTIVATION != "" or SCALE or SHIFT or RESIDUAL != ""
    y = acc if FUSED else rounded(acc, y_ptr.dtype.element_ty, INTERPRET)
    base = group * multiple(syg, Y_VEC).to(OFFSET)
    sy = (multiple(sy0, Y_VEC), multiple(sy1, Y_VEC), 1 if JOINED > 1 else multiple(sy2, Y_VEC))
    if JOINED > 1:
        y = y.reshape(BLOCK_M, BLOCK_N // JOINED, JOINED).permute(1, 0, 2).reshape(BLOCK_N // JOINED, BLOCK_M * JOINED)
        row = pid_n * (BLOCK_N // JOINED) + tl.arange(0, BLOCK_N // JOINED)
        e = pid_m.to(OFFSET) * (BLOCK_M * JOINED) + tl.arange(0, BLOCK_M * JOINED)
        image, j = decode(e, (X0, X1, multiple(X2 * JOINED, Y_VEC)), RANK)
        mask = (row < CO // JOINED)[:, None] & (e < pixels * JOINED)[None, :]
    else:
        run = multiple(L, Y_VEC)
        row = o // run
        image, j = decode(m, X, RANK)
        mask = (m < pixels)[:, None] & (o < multiple(CO, Y_VEC))[None, :]
    offset = image.to(OFFSET) * multiple(syn, Y_VEC)
    for d in tl.static_range(3 - RANK, 3):
        offset += j[d].to(OFFSET) * sy[d]
    rows = row_offset(row, R1, R2, r0, r1, r2, Y_VEC, OFFSET)
    if JOINED > 1:
        tile = rows[:, None] + offset[None, :]
    else:
        tile = offset[:, None] + (rows + o % run)[None, :]
    if FUSED:
        if JOINED > 1:
            column = row[:, None] * JOINED + (e % JOINED).to(tl.int32)[None, :]
        else:
            column = o[None, :]
        y = finish(
            y, base + tile, mask, group * b_all + column // b_each % b_all, column < CO,
            scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
            ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, None, None,
        )  # fmt: skip
        y = rounded(y, y_ptr.dtype.element_ty, INTERPRET)
    tl.store(y_ptr + base + tile, y, mask=mask)
