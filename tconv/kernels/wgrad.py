"""wgrad as implicit GEMM with pointer loads.

    dw[k, c, t] = sum over n, j of dy[n, k, j] * x[n, c, j*S - P + t*D]

             GEMM_M     GEMM_N   GEMM_K       per group and filter tap: K and C are channels per group
    wgrad    K          C        N*Z*P*Q

A program computes one filter tap of a tile of channels, over one split of the pixels (split-K). With one split it writes to dw,
else to the split's slice of a workspace, [K, taps, C], in which the rows of a tile are contiguous. `reduce.sum_splits` adds the
slices in a fixed order, so the same call gives the same bits, and writes the sums in dw's own order. Each iteration advances by
BLOCK_P pixels, which are added to images and coordinates as the digits (Bn, B0, B1, B2) with carries, so the main loop has no
division.
"""

import triton
import triton.language as tl

from tconv.kernels.common import (
    APART,
    advance,
    decode,
    found_at,
    inside,
    kernel,
    lead,
    multiple,
    product,
    split_pixels,
    trail,
    turned,
    write_tap,
)


@triton.jit
def told(offset, FLIP: tl.constexpr, VEC: tl.constexpr, PIXELS: tl.constexpr):
    """Returns loop-carried offsets of pixels along their axis, with what the compiler cannot tell of them by itself.

    They are multiples of VEC. If PIXELS > 1, runs of so many neighbours lie one after the other, the first at a multiple of
    PIXELS. Without that it would load 2 bytes at a time: Triton 3.9 in every case, all versions the runs.
    """
    if PIXELS > 1:
        # Written out, since a hint on what a function returns is lost.
        return tl.multiple_of(tl.max_contiguous(offset[None, :], [1, PIXELS]), [1, PIXELS])
    else:
        return tl.multiple_of(lead(offset, FLIP), [VEC, VEC])


@kernel
def wgrad(
    dy_ptr, x_ptr, dw_ptr,
    N, C, K, G,  # C, K: channels per group
    CW, KW,  # the same of dw, which has fewer where copies of x and dy have more
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2,
    Bn, B0, B1, B2, chunk,  # digits of BLOCK_P; chunk: pixels per split
    sxn, sxg, sxc, sx0, sx1, sx2,
    syn, syg, syc, sy0, sy1, sy2, syp,  # syp: stride of dy's pixels, if Y_FLAT
    sws, swg, swk, swc, sw0, sw1, sw2,  # strides of what is written; sws: of splits
    RANK: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, Y_VEC: tl.constexpr, X_PIXELS: tl.constexpr, Y_PIXELS: tl.constexpr,
    Y_FLAT: tl.constexpr,  # all of dy's pixels, over the images too, have one stride: its offsets then have no carries
    WIDE: tl.constexpr,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,  # what reads beyond x find
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIRST: tl.constexpr = 3 - RANK
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    P = (P0, P1, P2)
    B = (B0, B1, B2, Bn)
    BORDERS: tl.constexpr = (BORDER0, BORDER1, BORDER2)
    X_FLIP: tl.constexpr = False if X_UNIT else X_PIXELS > 1 or APART
    Y_FLIP: tl.constexpr = False if Y_UNIT else Y_PIXELS > 1 or APART
    PIXELS: tl.constexpr = max(X_PIXELS, Y_PIXELS)  # above 1: pointwise, and so many neighbours are pixels of one image
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))
    sw = (multiple(sw0, W_VEC), multiple(sw1, W_VEC), multiple(sw2, W_VEC))

    # --- program order: taps vary fastest (neighbours share both operands), then channels, groups, splits ---
    pid = tl.program_id(0)
    taps = T0 * T1 * T2
    rest = pid % taps
    pid = pid // taps
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid_c = pid % tiles_c
    pid = pid // tiles_c
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k = pid % tiles_k
    pid = pid // tiles_k
    group = pid % G
    split = pid // G
    _, tap = decode(rest, T, 3)

    dw_offset = split.to(tl.int64) * multiple(sws, W_VEC) + group * multiple(swg, W_VEC).to(tl.int64)
    first = ()
    stepped = ()  # strides of x along which offsets advance; where it repeats beyond its borders, they follow the coordinate
    for d in tl.static_range(3):
        first = first + (tap[d] * D[d] - P[d],)
        stepped = stepped + (sx[d] if BORDERS[d] == "zeros" else sx[d] * 0,)
        dw_offset += tap[d] * sw[d].to(tl.int64)
    left, xo, yo, h, x_step, y_step, end, carry_x, carry_y = split_pixels(
        split, chunk, N, Y, S, B, first, multiple(sxn, X_VEC), stepped, multiple(syn, Y_VEC), sy, RANK, OFFSET, BLOCK_P
    )
    p = tl.arange(0, BLOCK_P)
    if Y_FLAT:
        sp = multiple(syp, Y_VEC).to(OFFSET)
        yo = (split.to(OFFSET) * chunk + p) * sp

    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k = k < multiple(K, Y_VEC)
    mask_c = c < multiple(C, X_VEC)
    y_c = k if Y_UNIT else k * multiple(syc, Y_PIXELS).to(OFFSET)
    x_c = c if X_UNIT else c * multiple(sxc, X_PIXELS).to(OFFSET)
    yp = dy_ptr + group * multiple(syg, max(Y_VEC, Y_PIXELS)).to(OFFSET) + trail(y_c, Y_FLIP)
    xp = x_ptr + group * multiple(sxg, max(X_VEC, X_PIXELS)).to(OFFSET) + trail(x_c, X_FLIP)
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=ACC)
    # Every split has work. If the compiler did not see that, ptxas would wait for each product of some tiles by itself. It does
    # so for BF16X6 in any case, and would spill.
    steps = tl.cdiv(left, BLOCK_P)
    if PRECISION != "bf16x6":
        steps = tl.maximum(steps, 1)
    for i in tl.range(0, steps):
        live = p < multiple(left - i * BLOCK_P, PIXELS)
        ok = live
        if PIXELS == 1:
            for d in tl.static_range(FIRST, 3):
                if BORDERS[d] == "zeros":
                    ok &= inside(h[d], X[d])
        at = xo
        for d in tl.static_range(FIRST, 3):
            if BORDERS[d] != "zeros":
                at += found_at(h[d], X[d], BORDERS[d]).to(OFFSET) * sx[d]
        yq = yp + told(yo, Y_FLIP, Y_VEC, Y_PIXELS)
        xq = xp + told(at, X_FLIP, X_VEC, X_PIXELS)
        gv = tl.load(yq, mask=lead(live, Y_FLIP) & trail(mask_k, Y_FLIP), other=0.0)  # [BLOCK_P, BLOCK_K]
        xv = tl.load(xq, mask=lead(ok, X_FLIP) & trail(mask_c, X_FLIP), other=0.0)  # [BLOCK_P, BLOCK_C]
        acc = product(turned(gv, Y_FLIP, True), turned(xv, X_FLIP, False), acc, PRECISION, INTERPRET)
        if Y_FLAT:
            xo, _same, h = advance(xo, xo, h, x_step, x_step, end, carry_x, carry_x, Y, S, B, RANK)
            yo += BLOCK_P * sp
        else:
            xo, yo, h = advance(xo, yo, h, x_step, y_step, end, carry_x, carry_y, Y, S, B, RANK)

    W_FLIP: tl.constexpr = True if W_UNIT else APART
    write_tap(dw_ptr + dw_offset, acc, k, c, KW, CW, swk, swc, W_FLIP, W_UNIT, W_VEC, INTERPRET)
