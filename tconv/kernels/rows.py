"""fprop and dgrad for few written channels: each pixel is multiplied by all taps of the last dimension at once.

The equations are those of gather.py, of one group. Along the last dimension the pixels read are the rows of the product, and
taps times written channels its columns:

    GEMM_M   N*Z*P*(Q + halo)    for dgrad with stride S the outer extents of dx, and its columns divided by S
    GEMM_N   taps of the last dimension, times its phases, times CO
    GEMM_K   outer taps times CI

gather.py loads the pixels once per tap, here they are loaded once per row of taps, and tiles 16 wide have no empty columns to
speak of. At the end each written pixel adds up its taps, each from another row of the accumulator: a written pixel q (of
phase a: q*S + a) takes tap t from row q + shift(t). So the rows of all shifts of a pixel must lie in one tile. To that end

- the pixels of a row of the image, and a halo as long as the largest shift, form a run of SPAN rows of the product. Runs
  follow each other: dimensions before the last one only choose where a run begins;
- neighbouring tiles overlap by the halo: they begin STEP = BLOCK_M - halo rows apart, and the last rows of
  a tile write nothing.

The phases of a strided dgrad along the last dimension are further columns, so dy is read once for all of them. Those of other
dimensions are programs, which vary fastest because they read the same rows of dy. No product is added that is not part of a
pixel's window, so NaN and infinity spread as in gather.py.
"""

import triton
import triton.language as tl

from tconv.kernels.common import (
    APART,
    inside,
    kernel,
    lead,
    multiple,
    outside_bits,
    phase,
    product,
    rounded,
    trail,
    turned,
    written_pixels,
)
from tconv.kernels.epilogue import finish


@triton.jit
def taps_of(
    i, T, S, D, P, gcd, low,
    TRANSPOSED: tl.constexpr, PHASES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Returns what columns i of the product are, by the last dimension's parameters.

    Returns:
        exists: whether a column is a tap's, and not there to fill the tile.
        tap: the tap.
        shift: the row of the product that the tap takes of a written pixel, less the pixel's own.
    """
    k = i // (CHANNELS * PHASES)  # which of the phase's taps
    if TRANSPOSED:
        index = i // CHANNELS % PHASES
        n, t_first, first, _, _ = phase(index, T, S, D, P, gcd, 0, True)
        return (index < S) & (k < n), t_first + k * (S // gcd), first - k * (D // gcd) - low
    else:
        return k < T, k, k * D - P - low


@kernel
def rows(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    N, CI, CO,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,
    S0, S1, S2, D0, D1, D2, P0, P1, P2, g0, g1, g2,
    span, step, low, phases,  # low: the pixel read by the first row of a run; phases: those of the outer dimensions
    sxn, sxc, sx0, sx1, sx2,
    swi, swo, sw0, sw1, sw2,
    syn, syc, sy0, sy1, sy2, sb,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, X_PIXELS: tl.constexpr,
    PHASES: tl.constexpr, CHANNELS: tl.constexpr,  # powers of two; those of the last dimension, and written channels
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Other arguments are as in gather.py. X_PIXELS: the vector width along the last dimension of x, or 1."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    VEC: tl.constexpr = max(X_VEC, X_PIXELS)
    FIELD: tl.constexpr = 16
    LAST: tl.constexpr = PHASES * CHANNELS
    X_FLIP: tl.constexpr = False if X_UNIT else X_PIXELS > 1 or APART
    W_FLIP: tl.constexpr = False if W_UNIT != "" else APART
    Y_FLIP: tl.constexpr = False if Y_UNIT else APART
    sx = (multiple(sx0, VEC).to(OFFSET), multiple(sx1, VEC).to(OFFSET), 1 if X_PIXELS > 1 else multiple(sx2, X_VEC).to(OFFSET))
    ALONG: tl.constexpr = W_VEC if W_UNIT == "i" else 1  # w is read in vectors along the reduced channels only
    sw = (multiple(sw0, ALONG), multiple(sw1, ALONG), multiple(sw2, ALONG))
    begin = multiple(low, X_PIXELS)

    # --- rows: the last dimension counts as one of unit stride and one tap, whose outputs lie S2 pixels apart ---
    pid = tl.program_id(0)
    tiles = tl.num_programs(0) // phases
    past, live, x_offset, y_offset, n_taps, t_first, h = written_pixels(
        pid % phases * tiles + pid // phases, multiple(step, X_PIXELS), N, (Y0, Y1, multiple(span, X_PIXELS)),
        (T0, T1, 1), (S0, S1, 1), (D0, D1, 1), (P0, P1, begin if TRANSPOSED else -begin), (g0, g1, 1),
        multiple(sxn, VEC), sx, syn, (sy0.to(OFFSET), sy1.to(OFFSET), (S2 if TRANSPOSED else 1) * sy2.to(OFFSET)),
        TRANSPOSED, RANK, OFFSET, BLOCK_M,
    )  # fmt: skip
    if past:
        return
    bits = tl.where(live & inside(h[2], multiple(X2, X_PIXELS)), 0, -1)
    if RANK >= 2:
        bits |= outside_bits(h[1], D1 // g1 if TRANSPOSED else D1, X1, TRANSPOSED, FIELD)
    if RANK == 3:
        bits |= outside_bits(h[0], D0 // g0 if TRANSPOSED else D0, X0, TRANSPOSED, FIELD) << FIELD
    if X_PIXELS > 1:  # a vector lies in one run, and within x or outside; the compiler cannot tell
        pixel = tl.multiple_of(tl.max_contiguous(x_offset[None, :], [1, X_PIXELS]), [1, X_PIXELS])
        bits = tl.max_constancy(bits, X_PIXELS)
    else:
        pixel = lead(x_offset, X_FLIP)

    # --- channels and columns ---
    c = tl.arange(0, BLOCK_K)
    reduced = multiple(multiple(CI, X_VEC), ALONG)
    x_step = 1 if X_UNIT else multiple(sxc, X_PIXELS).to(OFFSET)
    w_step_i = 1 if W_UNIT == "i" else swi
    column = tl.arange(0, BLOCK_N)
    exists, tap, shift = taps_of(column, T2, S2, D2, P2, g2, low, TRANSPOSED, PHASES, CHANNELS)
    o = column % CHANNELS
    w_column = tl.where(exists & (o < CO), o * multiple(swo, ALONG) + tap * sw[2], 0)  # other columns' sums are not used
    w_first = t_first[1] * sw[1] if RANK >= 2 else 0
    if RANK == 3:
        w_first += t_first[0] * sw[0]
    xp = x_ptr + (pixel + trail(c * x_step, X_FLIP))
    wp = w_ptr + w_first + (lead(c * w_step_i, W_FLIP) + trail(w_column, W_FLIP))

    # --- main loop: over outer taps, and blocks of channels within a tap ---
    blocks = tl.cdiv(CI, BLOCK_K)
    hop_x = BLOCK_K * x_step
    hop_w = BLOCK_K * w_step_i
    turns = blocks
    if RANK >= 2:
        turns *= n_taps[1]
        next_x = -(D1 // g1) * sx[1] if TRANSPOSED else D1 * sx[1]
        next_w = (S1 // g1 if TRANSPOSED else 1) * sw[1]
        wrap_x = next_x - blocks * hop_x
        wrap_w = next_w - blocks * hop_w
    if RANK == 3:
        turns *= n_taps[0]
        over_x = (-(D0 // g0) * sx[0] if TRANSPOSED else D0 * sx[0]) - n_taps[1] * next_x
        over_w = (S0 // g0 if TRANSPOSED else 1) * sw[0] - n_taps[1] * next_w
    dx = hop_x * 0
    dw = hop_w * 0
    block = 0
    i1 = 0
    i0 = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in tl.range(0, turns):
        word = 1
        if RANK >= 2:
            word = 1 << i1
        if RANK == 3:
            word |= (1 << FIELD) << i0
        ok = lead((bits & word) == 0, X_FLIP)
        tail = c < reduced - block * BLOCK_K
        if EVEN:
            xv = tl.load(xp + dx, mask=ok, other=0.0)
            wv = tl.load(wp + dw)
        else:
            xv = tl.load(xp + dx, mask=ok & trail(tail, X_FLIP), other=0.0)
            wv = tl.load(wp + dw, mask=lead(tail, W_FLIP), other=0.0)
        acc = product(turned(xv, X_FLIP, False), turned(wv, W_FLIP, False), acc, PRECISION, INTERPRET)
        dx += hop_x
        dw += hop_w
        block += 1
        if RANK >= 2:
            wrap = block == blocks
            block = tl.where(wrap, 0, block)
            i1 += tl.where(wrap, 1, 0)
            dx += tl.where(wrap, wrap_x, 0)
            dw += tl.where(wrap, wrap_w, 0)
        if RANK == 3:
            wrap = i1 == n_taps[1]
            i1 = tl.where(wrap, 0, i1)
            i0 += tl.where(wrap, 1, 0)
            dx += tl.where(wrap, over_x, 0)
            dw += tl.where(wrap, over_w, 0)

    # --- each written pixel adds up its taps, in their order: those of one phase and channel are LAST columns apart ---
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(m[:, None] + tl.where(exists, shift, 0)[None, :], BLOCK_M - 1)
    taken = tl.where(exists[None, :], tl.gather(acc, row, 0), 0.0)
    y = tl.sum(tl.reshape(taken, (BLOCK_M, BLOCK_N // LAST, LAST)), 1)

    column = tl.arange(0, LAST)
    o = column % CHANNELS
    index = column // CHANNELS
    stride = 1
    a = index
    if TRANSPOSED:
        stride = S2
        _, _, _, _, a = phase(index, T2, S2, D2, P2, g2, 0, True)
    if HAS_BIAS:
        y += tl.load(b_ptr + o * sb, mask=o < CO, other=0.0).to(ACC)[None, :]
    q = h[2] - begin  # the written pixel, or which one of its phase
    y_step = 1 if Y_UNIT else syc.to(OFFSET)
    last = a.to(OFFSET) * sy2.to(OFFSET) + o * y_step
    keep = lead(live & (m < step), Y_FLIP) & trail((index < stride) & (o < CO), Y_FLIP)
    keep &= lead(q * stride, Y_FLIP) + trail(a, Y_FLIP) < Y2
    tile = lead(y_offset, Y_FLIP) + trail(last, Y_FLIP)
    y = finish(
        y, tile, keep, o, o < CO, scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
        ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, False, Y_FLIP,
    )  # fmt: skip
    tl.store(y_ptr + tile, turned(rounded(y, y_ptr.dtype.element_ty, INTERPRET), False, Y_FLIP), mask=keep)
