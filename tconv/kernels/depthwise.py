"""Depthwise convolutions (one input channel per group) without tensor cores: fprop and dgrad in one kernel, and wgrad.

    fprop  y[n, k, j] = sum over t of x[n, k // m, j*S - P + t*D] * w[k, t]                  m = K / G, the channel multiplier
    dgrad  x[n, c, j*S - P + t*D] += sum over r < m of y[n, c*m + r, j] * w[c*m + r, t]
    wgrad  dw[k, t] = sum over n, j of dy[n, k, j] * x[n, k // m, j*S - P + t*D]

There is no GEMM: each element of a tile [pixels, channels] is multiplied and added on its own, in fp32 (in fp64 for fp64).
x and y in the code, and phases, are as in gather.py. Pixels are split and advanced as in wgrad.py.
"""

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
    rounded,
    split_pixels,
    trail,
    turned,
    written_pixels,
)
from tconv.kernels.epilogue import finish


@kernel
def depthwise(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    N, C, M,  # C: channels written; M: the multiplier
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2, g0, g1, g2,
    sxn, sxc, sx0, sx1, sx2, swk, sw0, sw1, sw2, syn, syc, sy0, sy1, sy2, sb,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    MULTIPLIED: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,  # what reads beyond x find
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIRST: tl.constexpr = 3 - RANK
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    P = (P0, P1, P2)
    gcds = (g0, g1, g2)
    BORDERS: tl.constexpr = (BORDER0, BORDER1, BORDER2)
    X_FLIP: tl.constexpr = FLIP if X_UNIT else APART
    Y_FLIP: tl.constexpr = FLIP if Y_UNIT else APART
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sw = (sw0, sw1, sw2)
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))

    tiles_c = tl.cdiv(C, BLOCK_C)
    past, live, x_offset, y_offset, n_taps, t_first, h = written_pixels(
        tl.program_id(0) // tiles_c, BLOCK_M, N, Y, T, S, D, P, gcds,
        multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, TRANSPOSED, RANK, OFFSET, BLOCK_M,
    )  # fmt: skip
    if past:
        return

    o = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_o = o < multiple(multiple(C, X_VEC), Y_VEC)
    repeats = M if TRANSPOSED else 1
    if MULTIPLIED:
        read = o * M if TRANSPOSED else o // M
        w_row = o * M if TRANSPOSED else o
    else:
        read = o
        w_row = o
    x_step = 1 if X_UNIT else sxc.to(OFFSET)
    xp = x_ptr + (lead(x_offset, X_FLIP) + trail(read * x_step, X_FLIP))
    if FLIP:
        acc = tl.zeros((BLOCK_C, BLOCK_M), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for i in tl.range(0, n_taps[0] * n_taps[1] * n_taps[2] * repeats):
        r, tap = decode(i, n_taps, 3)  # scalar divisions, cheap next to the work on a tile
        ok = live
        if MULTIPLIED:
            dx = r * x_step
            wo = r * swk
        else:
            dx = tl.zeros((), OFFSET)
            wo = 0
        for d in tl.static_range(FIRST, 3):
            step = -(D[d] // gcds[d]) if TRANSPOSED else D[d]
            if BORDERS[d] == "zeros":
                ok &= inside(h[d] + tap[d] * step, X[d])
                dx += (tap[d] * step).to(OFFSET) * sx[d]
            else:
                dx += lead((found_at(h[d] + tap[d] * step, X[d], BORDERS[d]) - h[d]).to(OFFSET) * sx[d], X_FLIP)
            wo += (t_first[d] + tap[d] * (S[d] // gcds[d] if TRANSPOSED else 1)) * sw[d]
        xv = tl.load(xp + dx, mask=lead(ok, X_FLIP) & trail(mask_o, X_FLIP), other=0.0)  # [BLOCK_M, BLOCK_C]
        wv = tl.load(w_ptr + w_row * swk + wo, mask=mask_o, other=0.0).to(ACC)  # [BLOCK_C]
        acc += turned(xv, X_FLIP, FLIP).to(ACC) * trail(wv, FLIP)
    if HAS_BIAS:
        acc += trail(tl.load(b_ptr + o * sb, mask=mask_o, other=0.0).to(ACC), FLIP)
    y_step = 1 if Y_UNIT else syc.to(OFFSET)
    tile = lead(y_offset, Y_FLIP) + trail(o * y_step, Y_FLIP)
    mask = lead(live, Y_FLIP) & trail(mask_o, Y_FLIP)
    acc = finish(
        acc, tile, mask, o, mask_o, scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
        ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, Y_FLIP,
    )  # fmt: skip
    tl.store(y_ptr + tile, turned(rounded(acc, y_ptr.dtype.element_ty, INTERPRET), FLIP, Y_FLIP), mask=mask)


@kernel
def depthwise_wgrad(
    dy_ptr, x_ptr, dw_ptr,
    N, K, M,  # K: output channels; M: the multiplier
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2,
    Bn, B0, B1, B2, chunk,
    sxn, sxc, sx0, sx1, sx2, syn, syc, sy0, sy1, sy2, sws, swk, sw0, sw1, sw2,
    RANK: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    MULTIPLIED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program computes TAPS taps of a tile of channels over one split of the pixels. It loads dy once for all its taps."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLIP: tl.constexpr = False if Y_UNIT else APART
    X_FLIP: tl.constexpr = FLIP if X_UNIT else APART
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    B = (B0, B1, B2, Bn)
    BORDERS: tl.constexpr = (BORDER0, BORDER1, BORDER2)
    first = (-P0, -P1, -P2)
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))

    tap_tiles = tl.cdiv(T0 * T1 * T2, TAPS)
    tiles_k = tl.cdiv(K, BLOCK_C)
    pid = tl.program_id(0)
    tap_low = pid % tap_tiles * TAPS
    k = pid // tap_tiles % tiles_k * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // (tap_tiles * tiles_k)
    left, xo, yo, h, x_step, y_step, end, carry_x, carry_y = split_pixels(
        split, chunk, N, Y, S, B, first, multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, RANK, OFFSET, BLOCK_P
    )
    p = tl.arange(0, BLOCK_P)
    mask_k = k < multiple(multiple(K, Y_VEC), X_VEC)
    read = k // M if MULTIPLIED else k
    yp = dy_ptr + trail(k if Y_UNIT else k * syc.to(OFFSET), FLIP)
    xp = x_ptr + trail(read if X_UNIT else read * sxc.to(OFFSET), X_FLIP)
    if FLIP:
        zero = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    else:
        zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    accs = (zero,) * TAPS
    for _ in tl.range(0, tl.cdiv(left, BLOCK_P)):
        live = p < left
        yq = yp + tl.multiple_of(lead(yo, FLIP), [Y_VEC, Y_VEC])
        gv = tl.load(yq, mask=lead(live, FLIP) & trail(mask_k, FLIP), other=0.0).to(ACC)
        for u in tl.static_range(TAPS):
            past, tap = decode(tap_low + u, T, 3)
            ok = live
            dx = past * 0
            for d in tl.static_range(3 - RANK, 3):
                if BORDERS[d] == "zeros":
                    extent = tl.where(past == 0, X[d], 0) if d == 2 else X[d]
                    ok &= inside(h[d] + tap[d] * D[d], extent)
                    dx += (tap[d] * D[d]).to(OFFSET) * sx[d]
                else:
                    ok &= past == 0
                    dx += lead((found_at(h[d] + tap[d] * D[d], X[d], BORDERS[d]) - h[d]).to(OFFSET) * sx[d], X_FLIP)
            xq = xp + (tl.multiple_of(lead(xo, X_FLIP), [X_VEC, X_VEC]) + dx)
            xv = tl.load(xq, mask=lead(ok, X_FLIP) & trail(mask_k, X_FLIP), other=0.0)
            accs = accs[:u] + (accs[u] + gv * turned(xv, X_FLIP, FLIP).to(ACC),) + accs[u + 1 :]
        p += BLOCK_P
        xo, yo, h = advance(xo, yo, h, x_step, y_step, end, carry_x, carry_y, Y, S, B, RANK)

    for u in tl.static_range(TAPS):
        past, tap = decode(tap_low + u, T, 3)
        out = dw_ptr + split.to(tl.int64) * sws + (tap[0] * sw0 + tap[1] * sw1 + tap[2] * sw2) + k * swk
        total = tl.sum(accs[u], axis=1 if FLIP else 0)
        tl.store(out, rounded(total, dw_ptr.dtype.element_ty, INTERPRET), mask=k < tl.where(past == 0, K, 0))
