"""fprop, dgrad and wgrad as implicit GEMM for few channels: one GEMM axis holds taps and channels, a tile several groups.

The equations are those of gather.py and wgrad.py. K and C are channels per group.

             GEMM_M     GEMM_N        GEMM_K          per pack
    fprop    N*Z*P*Q    PACK*K        T*R*S*PACK*C
    dgrad    N*D*H*W    PACK*C        T*R*S*PACK*K
    wgrad    PACK*K     T*R*S*PACK*C  N*Z*P*Q

A pack is PACK neighbouring groups. In the code R is the number of channels of a pack that are read. Taps and channels share
one GEMM axis, whose columns are tap * R + channel. So three channels and 7x7 taps give one extent of 147, instead of 49
extents of 3 that are each padded to a tile.

The weight of a pack is block-diagonal. fprop and dgrad load zero off the diagonal, and wgrad stores only the diagonal. The
zeros are multiplied, so in fprop and dgrad a NaN or an infinity in one group gives NaN in the other groups of its pack.
"""

import triton.language as tl

from tconv.kernels.common import (
    APART,
    advance,
    flat_pixels,
    found_at,
    inside,
    kernel,
    lead,
    multiple,
    outside_word,
    product,
    quotient,
    reciprocal,
    rounded,
    split_pixels,
    tap_word,
    trail,
    turned,
    written_pixels,
)
from tconv.kernels.epilogue import finish


@kernel
def packed(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    N, CI, CO, G, PACK,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2, g0, g1, g2,
    sxn, sxc, sx0, sx1, sx2,
    swg, swi, swo, sw0, sw1, sw2,
    syn, syc, sy0, sy1, sy2, sb,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, Y_VEC: tl.constexpr, Y_PIXELS: tl.constexpr,
    PACKED: tl.constexpr, FIELD: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,  # what reads beyond x find
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fprop and dgrad. Arguments are as in gather.py. PACKED: PACK > 1. FIELD: bits per dimension of a word, or 0."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIRST: tl.constexpr = 3 - RANK
    RUN: tl.constexpr = max(X_VEC, W_VEC if W_UNIT == "i" else 1)  # so many neighbouring columns of GEMM_K share a tap
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    P = (P0, P1, P2)
    gcds = (g0, g1, g2)
    BORDERS: tl.constexpr = (BORDER0, BORDER1, BORDER2)
    X_FLIP: tl.constexpr = FLIP if X_UNIT else APART
    W_FLIP: tl.constexpr = FLIP if W_UNIT != "" else APART
    Y_FLIP: tl.constexpr = FLIP if Y_UNIT else Y_PIXELS > 1 or APART
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sw = (multiple(sw0, W_VEC), multiple(sw1, W_VEC), multiple(sw2, W_VEC))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))

    tiles_n = tl.cdiv(PACK * CO, BLOCK_N)
    packs = tl.cdiv(G, PACK)
    group = tl.program_id(0) // tiles_n % packs * PACK
    groups = tl.minimum(PACK, G - group)
    pid_m = tl.program_id(0) // (tiles_n * packs)
    past, live, x_offset, y_offset, n_taps, t_first, h = written_pixels(
        pid_m, BLOCK_M, N, Y, T, S, D, P, gcds,
        multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, TRANSPOSED, RANK, OFFSET, BLOCK_M,
    )  # fmt: skip
    if past:
        return

    # Bit 31 of the word is set for every pixel. Columns past the end of GEMM_K select it, so they are masked.
    PAST: tl.constexpr = -(1 << 31)
    bits = tl.where(live, PAST, -1)
    w_first = group * multiple(swg, W_VEC)
    x_tap = ()
    ax = ()
    aw = ()
    for d in tl.static_range(3):
        step = -(D[d] // gcds[d]) if TRANSPOSED else D[d]
        x_tap = x_tap + (step,)
        ax = ax + (step * sx[d] if BORDERS[d] == "zeros" else 0,)
        if BORDERS[d] != "zeros":  # the loop adds what it finds at each tap
            x_offset -= h[d].to(OFFSET) * sx[d]
        aw = aw + ((S[d] // gcds[d] if TRANSPOSED else 1) * sw[d],)
        if d >= FIRST:
            w_first += t_first[d] * sw[d]
    if FIELD:
        bits = outside_word(bits, h, X, D, gcds, BORDERS, TRANSPOSED, RANK, FIELD)

    # --- written channels: rows of the weight ---
    o = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    written = multiple(groups * CO, Y_VEC)
    x_step = 1 if X_UNIT else sxc.to(OFFSET)
    w_step_i = 1 if W_UNIT == "i" else multiple(swi, W_VEC)
    w_step_o = 1 if W_UNIT == "o" else multiple(swo, W_VEC)
    if PACKED:
        wide = multiple(CO, W_VEC) if W_UNIT == "o" else CO
        of = o // wide
        diagonal = multiple(CI, W_VEC if W_UNIT == "i" else 1)
        low = tl.where(o < groups * wide, of * diagonal, -(1 << 30))  # the first channel that o's group reads
        w_row = of * multiple(swg - diagonal * w_step_i, W_VEC) + o % wide * w_step_o
    else:
        mask_o = o < multiple(CO, W_VEC if W_UNIT == "o" else 1)
        w_row = (o if W_UNIT == "o" else tl.minimum(o, CO - 1)) * w_step_o
    x_first = multiple(group * CI, X_VEC) if X_UNIT else group * CI
    xp = x_ptr + x_first.to(OFFSET) * x_step + lead(x_offset, X_FLIP)
    wp = w_ptr + w_first + trail(w_row, W_FLIP)

    # --- main loop over GEMM_K: each column is decoded into tap and channel, by multiplications ---
    R = multiple(PACK * CI, RUN)
    read = multiple(groups * CI, RUN)
    total = n_taps[0] * n_taps[1] * n_taps[2] * R
    by_r = reciprocal(R)
    by_2 = reciprocal(tl.maximum(n_taps[2], 1))
    by_1 = reciprocal(tl.maximum(n_taps[1], 1))
    if FLIP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in tl.range(0, total, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        t2 = quotient(k // RUN * RUN, by_r, RUN)
        c = k - t2 * R
        within = (k < total) & (c < read) if PACKED else k < total
        t1 = t2 * 0
        t0 = t1
        if RANK >= 2:
            t1 = quotient(t2, by_2, RUN)
            t2 -= t1 * n_taps[2]
        if RANK == 3:
            t0 = quotient(t1, by_1, RUN)
            t1 -= t0 * n_taps[1]
        dx = c * x_step + t2 * ax[2]
        dw = c * w_step_i + t2 * aw[2]
        if RANK >= 2:
            dx += t1 * ax[1]
            dw += t1 * aw[1]
        if RANK == 3:
            dx += t0 * ax[0]
            dw += t0 * aw[0]
        tap = (t0, t1, t2)
        if FIELD:
            select = tl.where(within, tap_word(tap, RANK, FIELD), PAST)
            ok = (lead(bits, X_FLIP) & trail(select, X_FLIP)) == 0
        else:
            ok = lead(live, X_FLIP) & trail(within, X_FLIP)
            for d in tl.static_range(FIRST, 3):
                if BORDERS[d] == "zeros":
                    ok &= inside(lead(h[d], X_FLIP) + trail(tap[d] * x_tap[d], X_FLIP), X[d])
        at = trail(dx, X_FLIP)
        for d in tl.static_range(FIRST, 3):
            if BORDERS[d] != "zeros":
                i = lead(h[d], X_FLIP) + trail(tap[d] * x_tap[d], X_FLIP)
                at += found_at(i, X[d], BORDERS[d]).to(OFFSET) * sx[d]
        if PACKED:
            keep = inside(lead(c, W_FLIP) - trail(low, W_FLIP), diagonal) & lead(k < total, W_FLIP)
        elif W_UNIT == "o":
            keep = trail(mask_o, W_FLIP) & lead(within, W_FLIP)
        else:
            keep = lead(within, W_FLIP)
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N], transposed if FLIP
        xv = turned(tl.load(xp + at, mask=ok, other=0.0), X_FLIP, FLIP)
        wv = turned(tl.load(wp + lead(dw, W_FLIP), mask=keep, other=0.0), W_FLIP, FLIP)
        if FLIP:
            acc = product(wv, xv, acc, PRECISION, INTERPRET)
        else:
            acc = product(xv, wv, acc, PRECISION, INTERPRET)

    if HAS_BIAS:
        bias = tl.load(b_ptr + (group * CO + o) * sb, mask=o < written, other=0.0)
        acc += trail(bias.to(ACC), FLIP)
    if Y_PIXELS > 1:
        live, y_offset = flat_pixels(pid_m, N, Y, syn, RANK, OFFSET, BLOCK_M, Y_PIXELS)
    y_step = 1 if Y_UNIT else multiple(syc, Y_PIXELS).to(OFFSET)
    y_first = multiple(group * CO, Y_VEC) if Y_UNIT else group * CO
    base = y_first.to(OFFSET) * y_step
    tile = lead(y_offset, Y_FLIP) + trail(o * y_step, Y_FLIP)
    mask = lead(live, Y_FLIP) & trail(o < written, Y_FLIP)
    acc = finish(
        acc, base + tile, mask, y_first + o, o < written, scale_ptr, shift_ptr, residual_ptr, kept_ptr,
        y_ptr.dtype.element_ty, ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, Y_FLIP,
    )  # fmt: skip
    tl.store(y_ptr + base + tile, turned(rounded(acc, y_ptr.dtype.element_ty, INTERPRET), FLIP, Y_FLIP), mask=mask)


@kernel
def packed_wgrad(
    dy_ptr, x_ptr, dw_ptr,
    N, C, K, G, PACK,  # C, K: channels per group
    CW, KW,  # the same of dw, as in wgrad.py
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2,
    Bn, B0, B1, B2, chunk,
    sxn, sxc, sx0, sx1, sx2, syn, syc, sy0, sy1, sy2,
    sws, swk, swc, sw0, sw1, sw2,
    PACKED: tl.constexpr, TURN: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, Y_VEC: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """wgrad. Arguments are as in wgrad.py, but the BLOCK_C columns are taps of channels, so dy is loaded once for several taps.

    TURN: compute the transposed product. wgmma needs at least 64 rows, so with fewer output channels the columns become rows.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIRST: tl.constexpr = 3 - RANK
    RUN: tl.constexpr = max(X_VEC, W_VEC)  # so many neighbouring columns share a tap
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    B = (B0, B1, B2, Bn)
    X_FLIP: tl.constexpr = False if X_UNIT else APART
    Y_FLIP: tl.constexpr = False if Y_UNIT else APART
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))
    sw = (multiple(sw0, W_VEC), multiple(sw1, W_VEC), multiple(sw2, W_VEC))

    # --- program order: columns vary fastest (neighbours share both operands), then output channels, packs, splits ---
    pid = tl.program_id(0)
    R = multiple(PACK * C, RUN)
    columns = T0 * T1 * T2 * R
    tiles_c = tl.cdiv(columns, BLOCK_C)
    column = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    tiles_k = tl.cdiv(PACK * K, BLOCK_K)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // tiles_k
    packs = tl.cdiv(G, PACK)
    group = pid % packs * PACK
    split = pid // packs
    groups = tl.minimum(PACK, G - group)
    mask_k = k < multiple(groups * K, Y_VEC)
    c = column % R
    mask_c = column < columns
    if PACKED:
        mask_c &= c < multiple(groups * C, RUN)

    rest = column // R
    x_c = c if X_UNIT else c * sxc.to(OFFSET)
    w_c = c.to(tl.int64) if W_UNIT else c.to(tl.int64) * swc
    shift = ()  # from tap 0 to the column's tap, in coordinates of x
    for i in tl.static_range(3):
        if i < RANK:
            tap = rest % T[2 - i]
            rest = rest // T[2 - i]
            x_c += (tap * D[2 - i]).to(OFFSET) * sx[2 - i]
            w_c += tap.to(tl.int64) * sw[2 - i]
            shift = (tap * D[2 - i],) + shift
        else:
            shift = (tap * 0,) + shift

    left, xo, yo, h, x_step, y_step, end, carry_x, carry_y = split_pixels(
        split, chunk, N, Y, S, B, (-P0, -P1, -P2), multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, RANK, OFFSET, BLOCK_P
    )
    p = tl.arange(0, BLOCK_P)
    y_first = multiple(group * K, Y_VEC) if Y_UNIT else group * K.to(OFFSET) * syc
    x_first = multiple(group * C, X_VEC) if X_UNIT else group * C.to(OFFSET) * sxc
    yp = dy_ptr + y_first + trail(k if Y_UNIT else k * syc.to(OFFSET), Y_FLIP)
    xp = x_ptr + x_first + trail(x_c, X_FLIP)
    if TURN:
        acc = tl.zeros((BLOCK_C, BLOCK_K), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=ACC)
    steps = tl.cdiv(left, BLOCK_P)
    if X_VEC > 1 and Y_VEC > 1 and PRECISION != "bf16x6":  # as in wgrad.py; loops of narrow loads would only be longer
        steps = tl.maximum(steps, 1)
    for _ in tl.range(0, steps):
        live = p < left
        ok = lead(live, X_FLIP) & trail(mask_c, X_FLIP)
        for d in tl.static_range(FIRST, 3):
            ok &= inside(lead(h[d], X_FLIP) + trail(shift[d], X_FLIP), X[d])
        yq = yp + tl.multiple_of(lead(yo, Y_FLIP), [Y_VEC, Y_VEC])  # as in wgrad.py
        xq = xp + tl.multiple_of(lead(xo, X_FLIP), [X_VEC, X_VEC])
        gv = tl.load(yq, mask=lead(live, Y_FLIP) & trail(mask_k, Y_FLIP), other=0.0)  # [BLOCK_P, BLOCK_K]
        xv = tl.load(xq, mask=ok, other=0.0)  # [BLOCK_P, BLOCK_C]
        if TURN:
            acc = product(turned(xv, X_FLIP, True), turned(gv, Y_FLIP, False), acc, PRECISION, INTERPRET)
        else:
            acc = product(turned(gv, Y_FLIP, True), turned(xv, X_FLIP, False), acc, PRECISION, INTERPRET)
        p += BLOCK_P
        xo, yo, h = advance(xo, yo, h, x_step, y_step, end, carry_x, carry_y, Y, S, B, RANK)

    W_FLIP: tl.constexpr = True if W_UNIT else APART
    kept = lead(mask_c, W_FLIP) & trail(mask_k, W_FLIP)
    if not PACKED:
        kept &= lead(c < multiple(CW, W_VEC), W_FLIP) & trail(k < KW, W_FLIP)
    row = (group * K + k).to(tl.int64) * multiple(swk, W_VEC)
    if PACKED:
        own = multiple(C, W_VEC)
        low = k // K * own  # the first channel that k's group reads
        kept &= inside(lead(c, W_FLIP) - trail(low, W_FLIP), own)
        row -= low.to(tl.int64) if W_UNIT else low * swc.to(tl.int64)
    out = dw_ptr + split.to(tl.int64) * multiple(sws, W_VEC) + (trail(row, W_FLIP) + lead(w_c, W_FLIP))
    tl.store(out, turned(rounded(acc, dw_ptr.dtype.element_ty, INTERPRET), not TURN, W_FLIP), mask=kept)
