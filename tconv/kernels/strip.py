"""Depthwise convolutions with one filter per channel. Each thread computes a strip of neighbouring columns.

    fprop  y[n, c, j] = sum over t of x[n, c, j*S - P + t*D] * w[c, t]
    dgrad  x[n, c, j*S - P + t*D] += y[n, c, j] * w[c, t]
    wgrad  dw[c, t] = sum over n, j of dy[n, c, j] * x[n, c, j*S - P + t*D]

There is no GEMM. A strip is COLUMNS neighbouring outputs in the last dimension (wgrad: pixels of dy). Its window is the
columns that it reads. A thread loads each column of the window once, for all outputs of the strip and for CHUNK taps of the
last dimension.

The geometry of the last dimension is known at compile time, so it takes no instructions to find which output uses which column
at which tap. A strip contains all phases of a strided dgrad in that dimension. The other two dimensions are runtime data, with
phases as in gather.py; wgrad splits and advances strips as wgrad.py does pixels.

Where channels are contiguous, a tile is [strips, channels], and each column is one load, vectorised along the channels. Where
columns are contiguous, a tile is [channels, strips], and one load takes READ columns from an aligned address. The columns are
then separated into tensors without exchanging data between threads.
"""

import triton
import triton.language as tl

from tconv.kernels.common import (
    advance,
    apart,
    found_at,
    inside,
    kernel,
    lead,
    multiple,
    rounded,
    split_pixels,
    together,
    trail,
    written_pixels,
)
from tconv.kernels.epilogue import finish


@triton.jit
def column_products(
    accs, xv, others, I: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    TRANSPOSED: tl.constexpr, WGRAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns accs with the products of xv added, which is column I of a strip's window.

    Output v uses column I at tap t if I = v*S + t*D (TRANSPOSED: if v + P % S = I*S + t*D). accs has one entry per output and
    others one per tap. For wgrad accs has one entry per tap, and others are the columns of dy.
    """
    for t in tl.static_range(T):
        if TRANSPOSED:
            if (I * S + t * D - P % S >= 0) and (I * S + t * D - P % S < COLUMNS):
                accs = added(accs, xv * others[t], I * S + t * D - P % S)
        elif (I - t * D >= 0) and ((I - t * D) % S == 0) and ((I - t * D) // S < COLUMNS):
            if WGRAD:
                accs = added(accs, xv * others[(I - t * D) // S], t)
            else:
                accs = added(accs, xv * others[t], (I - t * D) // S)
    return accs


@triton.jit
def added(accs, product, AT: tl.constexpr):
    """Returns accs with the product added to entry AT."""
    return accs[:AT] + (accs[AT] + product,) + accs[AT + 1 :]


@triton.jit
def window(
    accs, others, xp, start, ok, mask_c, X2, sx2, shift, last,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TRANSPOSED: tl.constexpr, WGRAD: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGNED: tl.constexpr, READ: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns accs with the products of one row of x and T taps of the last dimension added.

    Args:
        accs, others: as for `column_products`.
        xp: pointers to the column at coordinate `start`, in the shape of a tile.
        start: coordinate in the last dimension from which the window is counted [strips].
        ok: mask of the strips whose row is inside the input [strips].
        shift: columns by which the first of the T taps moves the window.
        last: the coordinate of the last column that an output reads.
        BORDER: what columns beyond x find. Unless that is zeros, READ is 1.
    """
    # First and last column of the window, relative to start + ORIGIN + shift. That is the column that output 0 of the strip
    # reads at tap 0 (TRANSPOSED: rounded down).
    LOW: tl.constexpr = (P % S - (T - 1) * D) // S if TRANSPOSED else 0
    HIGH: tl.constexpr = (P % S + COLUMNS - 1) // S if TRANSPOSED else (COLUMNS - 1) * S + (T - 1) * D
    ORIGIN: tl.constexpr = P // S if TRANSPOSED else -P
    if READ == 1:
        for i in tl.static_range(LOW, HIGH + 1):
            at = start + (ORIGIN + i + shift)
            if BORDER == "zeros":
                mask = lead(ok & inside(at, X2), FLIP) & trail(mask_c, FLIP)
                column = (ORIGIN + i + shift) * sx2
            else:  # beyond `last` there may be no element that the padding repeats
                mask = lead(ok & (at <= last), FLIP) & trail(mask_c, FLIP)
                column = lead((found_at(at, X2, BORDER) - start) * sx2, FLIP)
            xv = tl.load(xp + column, mask=mask, other=0.0).to(ACC)
            accs = column_products(accs, xv, others, i, T, S, D, P, TRANSPOSED, WGRAD, COLUMNS)
    else:
        FROM: tl.constexpr = (ORIGIN + LOW) // ALIGNED * ALIGNED
        BLOCK_C: tl.constexpr = xp.shape[0]
        BLOCK_P: tl.constexpr = xp.shape[1]
        r = tl.arange(0, READ)
        for b in tl.static_range((ORIGIN + HIGH - FROM) // READ + 1):
            at = start[:, None] + ((FROM + b * READ + shift) + r[None, :])
            mask = (ok[:, None] & inside(at, X2))[None, :, :] & mask_c[:, None, None]
            block = tl.load(xp[:, :, None] + ((FROM + b * READ + shift) + r[None, None, :]), mask=mask, other=0.0)
            columns = apart(block, BLOCK_C, BLOCK_P, READ)
            for j in tl.static_range(READ):
                accs = column_products(
                    accs, columns[j].to(ACC), others, FROM + b * READ + j - ORIGIN, T, S, D, P, TRANSPOSED, WGRAD, COLUMNS
                )
    return accs


@triton.jit
def filter_row(wp, mask_c, sw2, tap, T: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr):
    """Returns taps `tap` to tap + T - 1 of a filter row, each as a tensor that broadcasts over strips.

    WIDTH is T rounded up to a power of two. The taps are loaded as one tile, because they are usually contiguous and one
    exchange between threads is then enough for all of them.
    """
    t = tl.arange(0, WIDTH)
    BLOCK_C: tl.constexpr = wp.shape[0]
    tile = tl.load(wp[:, None] + ((tap + t) * sw2)[None, :], mask=mask_c[:, None] & (t < T)[None, :], other=0.0).to(ACC)
    if FLIP:
        taps = apart(tl.reshape(tile, (BLOCK_C, 1, WIDTH)), BLOCK_C, 1, WIDTH)
    else:
        taps = apart(tl.reshape(tile, (1, BLOCK_C, WIDTH)), 1, BLOCK_C, WIDTH)
    return taps


@kernel
def strip(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    N, C,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, S0, S1, D0, D1, P0, P1, g0, g1,
    sxn, sxc, sx0, sx1, sx2, swk, sw0, sw1, sw2, syn, syc, sy0, sy1, sy2, sb,
    T2: tl.constexpr, S2: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,  # contiguous axis: "c" channels, "p" columns, or ""
    X_VEC: tl.constexpr, Y_VEC: tl.constexpr, READ: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,  # what reads beyond x find
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FIRST: tl.constexpr = 3 - RANK
    BORDERS: tl.constexpr = (BORDER0, BORDER1)
    STEP: tl.constexpr = COLUMNS // S2 if TRANSPOSED else COLUMNS * S2  # columns of x from one strip to the next
    X2 = multiple(X2, X_VEC if X_UNIT == "p" else 1)
    Y2 = multiple(Y2, Y_VEC if Y_UNIT == "p" else 1)
    C = multiple(multiple(C, X_VEC if X_UNIT == "c" else 1), Y_VEC if Y_UNIT == "c" else 1)
    sx2 = 1 if X_UNIT == "p" else multiple(sx2, X_VEC).to(OFFSET)
    sy2 = 1 if Y_UNIT == "p" else multiple(sy2, Y_VEC).to(OFFSET)
    sxc = 1 if X_UNIT == "c" else multiple(sxc, X_VEC).to(OFFSET)
    syc = 1 if Y_UNIT == "c" else multiple(syc, Y_VEC).to(OFFSET)
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET))
    strips = tl.cdiv(Y2, COLUMNS)
    tiles_c = tl.cdiv(C, BLOCK_C)
    past, live, x_offset, y_offset, n_taps, t_first, h = written_pixels(
        tl.program_id(0) // tiles_c, BLOCK_M, N, (Y0, Y1, strips),
        (T0, T1, 1), (S0, S1, 1), (D0, D1, 1), (P0, P1, 0), (g0, g1, 1),
        multiple(sxn, X_VEC), (sx[0], sx[1], sx2 * STEP),
        multiple(syn, Y_VEC), (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), sy2 * COLUMNS),
        TRANSPOSED, RANK, OFFSET, BLOCK_M,
    )  # fmt: skip
    if past:
        return

    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    start = h[2] * STEP
    last = (Y2 - 1) * S2 + (T2 - 1) * D2 - P2
    xp = x_ptr + (lead(x_offset, FLIP) + trail(c * sxc, FLIP))
    wp = w_ptr + c * swk
    if FLIP:
        zero = tl.zeros((BLOCK_C, BLOCK_M), dtype=ACC)
    else:
        zero = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    accs = (zero,) * COLUMNS
    for i in tl.range(0, n_taps[0] * n_taps[1]):
        tap = (i // n_taps[1], i % n_taps[1])
        ok = live
        dx = tl.zeros((), OFFSET)
        dw = 0
        for d in tl.static_range(2):
            if d >= FIRST:
                step = -((D0, D1)[d] // (g0, g1)[d]) if TRANSPOSED else (D0, D1)[d]
                if BORDERS[d] == "zeros":
                    ok &= inside(h[d] + tap[d] * step, (X0, X1)[d])
                    dx += (tap[d] * step).to(OFFSET) * sx[d]
                else:
                    dx += lead((found_at(h[d] + tap[d] * step, (X0, X1)[d], BORDERS[d]) - h[d]).to(OFFSET) * sx[d], FLIP)
                dw += (t_first[d] + tap[d] * ((S0, S1)[d] // (g0, g1)[d] if TRANSPOSED else 1)) * (sw0, sw1)[d]
        for u in tl.range(0, T2 // CHUNK):
            taps = filter_row(wp + dw, mask_c, sw2, u * CHUNK, CHUNK, WIDTH, ACC, FLIP)
            shift = -(u * (CHUNK * D2 // S2)) if TRANSPOSED else u * (CHUNK * D2)
            accs = window(
                accs, taps, xp + dx, start, ok, mask_c, X2, sx2, shift, last,
                CHUNK, S2, D2, P2, TRANSPOSED, False, BORDER2, X_VEC, READ, ACC, FLIP, COLUMNS,
            )  # fmt: skip
        if T2 % CHUNK:
            REST: tl.constexpr = T2 // CHUNK * CHUNK
            taps = filter_row(wp + dw, mask_c, sw2, REST, T2 % CHUNK, REST_WIDTH, ACC, FLIP)
            accs = window(
                accs, taps, xp + dx, start, ok, mask_c, X2, sx2, -(REST * D2 // S2) if TRANSPOSED else REST * D2,
                last, T2 % CHUNK, S2, D2, P2, TRANSPOSED, False, BORDER2, X_VEC, READ, ACC, FLIP, COLUMNS,
            )  # fmt: skip

    if HAS_BIAS:
        bias = trail(tl.load(b_ptr + c * sb, mask=mask_c, other=0.0).to(ACC), FLIP)
    tile = lead(y_offset, FLIP) + trail(c * syc, FLIP)
    if FLIP and Y_UNIT == "p" and COLUMNS & (COLUMNS - 1) == 0:
        y = together(accs, BLOCK_C, BLOCK_M, COLUMNS)
        if HAS_BIAS:
            y += bias[:, :, None]
        v = tl.arange(0, COLUMNS)
        mask = (live[:, None] & (h[2][:, None] * COLUMNS + v[None, :] < Y2))[None, :, :] & mask_c[:, None, None]
        y = finish(
            y, tile[:, :, None] + v[None, None, :], mask, c[:, None], mask_c[:, None],
            scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
            ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, True, True,
        )  # fmt: skip
        yp = (y_ptr + tile)[:, :, None] + v[None, None, :]
        tl.store(yp, rounded(y, y_ptr.dtype.element_ty, INTERPRET), mask=mask)
    else:
        for v in tl.static_range(COLUMNS):
            y = accs[v]
            if HAS_BIAS:
                y += bias
            mask = lead(live & (h[2] * COLUMNS + v < Y2), FLIP) & trail(mask_c, FLIP)
            y = finish(
                y, tile + v * sy2, mask, c, mask_c, scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
                ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, FLIP,
            )  # fmt: skip
            tl.store(y_ptr + tile + v * sy2, rounded(y, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@kernel
def strip_wgrad(
    dy_ptr, x_ptr, dw_ptr,
    N, C,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, S0, S1, D0, D1, P0, P1,
    Bn, B0, B1, B2, chunk,  # digits of BLOCK_P strips; chunk: strips per split
    sxn, sxc, sx0, sx1, sx2, syn, syc, sy0, sy1, sy2, sws, swk, sw0, sw1, sw2,
    T2: tl.constexpr, S2: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    READ: tl.constexpr, READ_DY: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,
    FLIP: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes CHUNK taps of each of ROWS filter rows, for a tile of channels, over one split of dy's strips."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    BORDERS: tl.constexpr = (BORDER0, BORDER1)
    CHUNKS: tl.constexpr = (T2 + CHUNK - 1) // CHUNK
    X2 = multiple(X2, X_VEC if X_UNIT == "p" else 1)
    Y2 = multiple(Y2, Y_VEC if Y_UNIT == "p" else 1)
    C = multiple(multiple(C, X_VEC if X_UNIT == "c" else 1), Y_VEC if Y_UNIT == "c" else 1)
    sx2 = 1 if X_UNIT == "p" else multiple(sx2, X_VEC).to(OFFSET)
    sy2 = 1 if Y_UNIT == "p" else multiple(sy2, Y_VEC).to(OFFSET)
    sxc = 1 if X_UNIT == "c" else multiple(sxc, X_VEC).to(OFFSET)
    syc = 1 if Y_UNIT == "c" else multiple(syc, Y_VEC).to(OFFSET)
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), sx2 * (COLUMNS * S2))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), sy2 * COLUMNS)
    Y = (Y0, Y1, tl.cdiv(Y2, COLUMNS))
    S = (S0, S1, tl.full((), 1, tl.int32))
    B = (B0, B1, B2, Bn)

    pid = tl.program_id(0)
    u = pid % CHUNKS
    row_tiles = tl.cdiv(T0 * T1, ROWS)
    row = pid // CHUNKS % row_tiles * ROWS
    pid = pid // (CHUNKS * row_tiles)
    tiles_c = tl.cdiv(C, BLOCK_C)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    split = pid // tiles_c
    left, xo, yo, h, x_step, y_step, end, carry_x, carry_y = split_pixels(
        split, chunk, N, Y, S, B, (-P0, -P1, 0), multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, RANK, OFFSET, BLOCK_P
    )
    last = (Y2 - 1) * S2 + (T2 - 1) * D2 - P2
    p = tl.arange(0, BLOCK_P)
    yp = dy_ptr + trail(c * syc, FLIP)
    xp = x_ptr + trail(c * sxc, FLIP)
    if FLIP:
        zero = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    else:
        zero = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    accs = (zero,) * (ROWS * CHUNK)
    for _ in tl.range(0, tl.cdiv(left, BLOCK_P)):
        live = p < left
        yq = yp + tl.multiple_of(lead(yo, FLIP), [Y_VEC, Y_VEC])
        xq = xp + tl.multiple_of(lead(xo, FLIP), [X_VEC, X_VEC])
        gs = ()
        for v in tl.static_range(0, COLUMNS, READ_DY):
            if READ_DY == 1:
                mask = lead(live & (h[2] * COLUMNS + v < Y2), FLIP) & trail(mask_c, FLIP)
                gs = gs + (tl.load(yq + v * sy2, mask=mask, other=0.0).to(ACC),)
            else:
                r = v + tl.arange(0, READ_DY)
                mask = (live[:, None] & (h[2][:, None] * COLUMNS + r[None, :] < Y2))[None, :, :] & mask_c[:, None, None]
                block = tl.load(yq[:, :, None] + r[None, None, :], mask=mask, other=0.0).to(ACC)
                gs = gs + apart(block, BLOCK_C, BLOCK_P, READ_DY)
        for r in tl.static_range(ROWS):
            tap = ((row + r) // T1, (row + r) % T1)
            ok = live & (tap[0] < T0)
            dx = tl.zeros((), OFFSET)
            for d in tl.static_range(2):
                if d >= 3 - RANK:
                    if BORDERS[d] == "zeros":
                        ok &= inside(h[d] + tap[d] * (D0, D1)[d], (X0, X1)[d])
                        dx += (tap[d] * (D0, D1)[d]).to(OFFSET) * sx[d]
                    else:
                        i = found_at(h[d] + tap[d] * (D0, D1)[d], (X0, X1)[d], BORDERS[d])
                        dx += lead((i - h[d]).to(OFFSET) * sx[d], FLIP)
            sums = window(
                accs[r * CHUNK : (r + 1) * CHUNK], gs, xq + dx, h[2] * (COLUMNS * S2), ok, mask_c, X2, sx2,
                u * (CHUNK * D2), last, CHUNK, S2, D2, P2, False, True, BORDER2, X_VEC, READ, ACC, FLIP, COLUMNS,
            )  # fmt: skip
            accs = accs[: r * CHUNK] + sums + accs[(r + 1) * CHUNK :]
        p += BLOCK_P
        xo, yo, h = advance(xo, yo, h, x_step, y_step, end, carry_x, carry_y, Y, S, B, RANK)

    for r in tl.static_range(ROWS):
        out = dw_ptr + split.to(tl.int64) * sws + ((row + r) // T1 * sw0 + (row + r) % T1 * sw1) + c * swk
        for t in tl.static_range(CHUNK):
            total = tl.sum(accs[r * CHUNK + t], axis=1 if FLIP else 0)
            mask = mask_c & (row + r < T0 * T1) & (u * CHUNK + t < T2)
            tl.store(out + (u * CHUNK + t) * sw2, rounded(total, dw_ptr.dtype.element_ty, INTERPRET), mask=mask)
