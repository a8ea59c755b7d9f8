"""fprop and dgrad (also the forward of transposed layers) as implicit GEMM with pointer loads, ranks 1 to 3, any strides.

    fprop  y[n, k, j] = sum over c, t of x[n, c, j*S - P + t*D] * w[k, c, t]
    dgrad  x[n, c, j*S - P + t*D] += y[n, k, j] * w[k, c, t]

             GEMM_M     GEMM_N   GEMM_K       per group: K and C are channels per group
    fprop    N*Z*P*Q    K        C*T*R*S
    dgrad    N*D*H*W    C        K*T*R*S

In the code x is the tensor read and y the tensor written, so for a dgrad x is dy (or a transposed layer's input) and y is
dx. CI and CO are the channels per group of x and y.

A strided dgrad is cut into phases: sets of written pixels that use the same filter taps. One launch runs all phases, those
with more taps first. No product is computed for a tap that a phase does not use. A phase without taps writes zero or the bias.

The main loop is a single loop over channel blocks (outer) and taps (inner). Its offsets advance by scalars that are computed
in the prologue, so it has no division and the software pipeline does not drain between taps. The mask of the padding comes
from one word of bits per pixel, in which each tap that falls outside the input has its bit set. FIELD is the bits per
dimension: 32, 16 or 10 at rank 1, 2 or 3. For filters with more taps FIELD is 0, and coordinates are compared instead.

A tile may have a second block of written channels (EXTRA), with an accumulator of its own: 128 + 64 channels in one tile, which
a block of 256 would fill by three quarters. Both blocks multiply the same pixels, which are loaded once.

A chunk of a stream (BORDER "state") finds the frames of its state before x: at each tap, a pixel's pointer is one of two. With
NEXT, the programs after those of y write the next state, the last frames of (state, x).

If a layer has too few tiles to fill the device, the channel blocks are cut into splits (SPLIT, split-K). Each split writes
its sums to its slice of a workspace, the first split with the bias, and `reduce.sum_splits` adds the slices in a fixed order.
"""

import triton
import triton.language as tl

from tconv.kernels.common import (
    APART,
    decode,
    flat_pixels,
    found_at,
    inside,
    kernel,
    lead,
    met_frames,
    multiple,
    outside_word,
    product,
    rounded,
    tap_word,
    trail,
    turned,
    written_pixels,
)
from tconv.kernels.epilogue import finish


@triton.jit
def multiply(
    acc, xv, wp, o, tail, written,
    W_UNIT: tl.constexpr, EVEN: tl.constexpr, W_FLIP: tl.constexpr, FLIP: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Returns acc plus the pixels xv times the weights at wp, which are those of a block of written channels o."""
    if EVEN:
        if W_UNIT == "o":
            wv = tl.load(wp, mask=trail(o < written, W_FLIP), other=0.0)
        else:
            wv = tl.load(wp)
    else:
        if W_UNIT == "o":
            wv = tl.load(wp, mask=trail(o < written, W_FLIP) & lead(tail, W_FLIP), other=0.0)
        else:
            wv = tl.load(wp, mask=lead(tail, W_FLIP), other=0.0)
    wv = turned(wv, W_FLIP, FLIP)  # [reduced channels, written channels], transposed if FLIP
    if FLIP:
        return product(wv, xv, acc, PRECISION, INTERPRET)
    else:
        return product(xv, wv, acc, PRECISION, INTERPRET)


@triton.jit
def write(
    acc, y_ptr, base, b_ptr, first, o, once, live, written, sb, y_offset, y_step,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr, Y_FLIP: tl.constexpr,
):  # fmt: skip
    """Writes the sums of a block of written channels o, plus the bias of those below `once`, after the epilogue's steps."""
    if HAS_BIAS:
        bias = tl.load(b_ptr + (first + o) * sb, mask=o < once, other=0.0)
        acc += trail(bias.to(acc.dtype), FLIP)
    tile = lead(y_offset, Y_FLIP) + trail(o * y_step, Y_FLIP)
    mask = lead(live, Y_FLIP) & trail(o < written, Y_FLIP)
    acc = finish(
        acc, base + tile, mask, first + o, o < written, scale_ptr, shift_ptr, residual_ptr, kept_ptr, y_ptr.dtype.element_ty,
        ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, Y_FLIP,
    )  # fmt: skip
    tl.store(y_ptr + base + tile, turned(rounded(acc, y_ptr.dtype.element_ty, INTERPRET), FLIP, Y_FLIP), mask=mask)


@triton.jit
def write_next_state(
    pid, x_ptr, state_ptr, next_ptr, N, C, X, P, kept, first, sxn, x_step, sx, ssn, s_step, ss,
    RANK: tl.constexpr, X_UNIT: tl.constexpr, X_VEC: tl.constexpr, STATE: tl.constexpr, S_UNIT: tl.constexpr,
    S_VEC: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes tile `pid` of the next state: `kept` frames from frame `first` of x on, channels last.

    Frames before x, which are negative, are those of the state, or zeros.
    """
    TIME: tl.constexpr = 3 - RANK
    extents = ()
    pixels = N.to(OFFSET)
    for d in tl.static_range(3):
        extent = kept if d == TIME else X[d]
        extents = extents + (extent,)
        if d >= TIME:
            pixels *= extent
    C = multiple(multiple(C, X_VEC), S_VEC)
    tiles_c = tl.cdiv(C, BLOCK_C)
    p = (pid // tiles_c).to(OFFSET) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image, j = decode(p, extents, RANK)
    time = j[TIME] + first
    x_offset = image.to(OFFSET) * sxn + time.to(OFFSET) * sx[TIME]
    s_offset = image.to(OFFSET) * ssn + (time + P[TIME]).to(OFFSET) * ss[TIME]
    for d in tl.static_range(TIME + 1, 3):
        x_offset += j[d].to(OFFSET) * sx[d]
        s_offset += j[d].to(OFFSET) * ss[d]
    live = p < pixels
    X_FLIP: tl.constexpr = not X_UNIT  # pixels then mostly lie one after the other
    mask = lead(live & (time >= 0), X_FLIP) & trail(c < C, X_FLIP)
    v = tl.load(x_ptr + (lead(x_offset, X_FLIP) + trail(c * x_step, X_FLIP)), mask=mask, other=0.0)
    v = turned(v, X_FLIP, False)
    if STATE:
        S_FLIP: tl.constexpr = not S_UNIT
        mask = lead(live & (time < 0), S_FLIP) & trail(c < C, S_FLIP)
        before = tl.load(state_ptr + (lead(s_offset, S_FLIP) + trail(c * s_step, S_FLIP)), mask=mask, other=0.0)
        v = tl.where(lead(time >= 0, False), v, turned(before, S_FLIP, False))
    tl.store(next_ptr + (lead(p * C, False) + trail(c, False)), v, mask=lead(live, False) & trail(c < C, False))


@kernel
def gather(
    x_ptr, w_ptr, b_ptr, y_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    state_ptr, next_ptr,  # of a stream, or None
    N, CI, CO, G,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2,  # extents: read, written, taps
    S0, S1, S2, D0, D1, D2, P0, P1, P2,  # stride, dilation, leading padding
    g0, g1, g2,  # gcd(S, D)
    sxn, sxg, sxc, sx0, sx1, sx2,
    swg, swi, swo, sw0, sw1, sw2,  # of w: i is the reduced channel (CI), o the written channel (CO)
    syn, syg, syc, sy0, sy1, sy2, sb, sys, chunk,  # sys: stride of splits; chunk: channels per split
    ssn, ssc, ss0, ss1, ss2, kept, first, programs,  # of a stream: strides of the state; the next one; programs that write y
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,  # contiguous channel axis? (w: "i", "o" or "")
    X_VEC: tl.constexpr, W_VEC: tl.constexpr, Y_VEC: tl.constexpr,  # vector width: divides all other strides
    X_PIXELS: tl.constexpr, Y_PIXELS: tl.constexpr,  # vector width along the pixels, if these are contiguous and it is above 1
    EVEN: tl.constexpr, FIELD: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    FRAMES: tl.constexpr,  # of a 3-D dgrad: walk only the taps that meet a frame
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr,  # what reads beyond x find
    STATE: tl.constexpr, NEXT: tl.constexpr, S_UNIT: tl.constexpr, S_VEC: tl.constexpr,  # whether a stream has a state, ...
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXTRA: tl.constexpr,
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
    # Whether a dimension of x repeats beyond its ends: the loop then adds what it finds at each tap.
    REPEATS: tl.constexpr = (
        BORDER0 != "zeros" and BORDER0 != "state", BORDER1 != "zeros" and BORDER1 != "state",
        BORDER2 != "zeros" and BORDER2 != "state",
    )  # fmt: skip
    X_FLIP: tl.constexpr = FLIP if X_UNIT else X_PIXELS > 1 or APART
    W_FLIP: tl.constexpr = FLIP if W_UNIT != "" else APART
    Y_FLIP: tl.constexpr = FLIP if Y_UNIT else Y_PIXELS > 1 or APART
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))
    sw = (multiple(sw0, W_VEC), multiple(sw1, W_VEC), multiple(sw2, W_VEC))
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))

    ss = (multiple(ss0, S_VEC).to(OFFSET), multiple(ss1, S_VEC).to(OFFSET), multiple(ss2, S_VEC).to(OFFSET))
    s_step = 1 if S_UNIT else ssc.to(OFFSET)
    if NEXT:
        if tl.program_id(0) >= programs:
            write_next_state(
                tl.program_id(0) - programs, x_ptr, state_ptr, next_ptr, N, CI * G, X, P, kept, first,
                multiple(sxn, X_VEC), 1 if X_UNIT else sxc, sx, multiple(ssn, S_VEC), s_step, ss,
                RANK, X_UNIT, X_VEC, STATE, S_UNIT, S_VEC, OFFSET, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            return

    # Program order: channel tiles of all groups vary fastest, because they read the same pixels; then splits, then pixel tiles.
    # Phases with more taps come first.
    tiles_n = tl.cdiv(CO, BLOCK_N + EXTRA)
    pid_n = tl.program_id(0) % tiles_n
    group = tl.program_id(0) // tiles_n % G
    splits = tl.cdiv(CI, chunk) if SPLIT else 1
    pid_m = tl.program_id(0) // (tiles_n * G * splits)
    past, live, x_offset, y_offset, n_taps, t_first, h = written_pixels(
        pid_m, BLOCK_M, N, Y, T, S, D, P, gcds,
        multiple(sxn, X_VEC), sx, multiple(syn, Y_VEC), sy, TRANSPOSED, RANK, OFFSET, BLOCK_M,
    )  # fmt: skip
    if past:
        return
    if FRAMES:
        n_taps, t_first, h, x_offset = met_frames(live, n_taps, t_first, h, x_offset, X0, S0, D0, g0, sx[0])

    if X_PIXELS > 1:  # pointwise: the pixels read are those written
        live, x_offset = flat_pixels(pid_m, N, X, sxn, RANK, OFFSET, BLOCK_M, X_PIXELS)

    x_tap = ()  # change of the coordinate read from one tap to the next
    w_offset = group * multiple(swg, W_VEC)
    bits = tl.where(live, 0, -1)
    for d in tl.static_range(3):
        step = -(D[d] // gcds[d]) if TRANSPOSED else D[d]
        x_tap = x_tap + (step,)
        if d >= FIRST:
            w_offset += t_first[d] * sw[d]
            if REPEATS[d]:
                x_offset -= h[d].to(OFFSET) * sx[d]
    if FIELD:
        bits = outside_word(bits, h, X, D, gcds, BORDERS, TRANSPOSED, RANK, FIELD)

    # --- channels and pointers ---
    o = pid_n * (BLOCK_N + EXTRA) + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    reduced = multiple(multiple(CI, X_VEC), W_VEC if W_UNIT == "i" else 1)
    written = multiple(multiple(CO, Y_VEC), W_VEC if W_UNIT == "o" else 1)
    x_step = 1 if X_UNIT else multiple(sxc, X_PIXELS).to(OFFSET)
    w_step_i = 1 if W_UNIT == "i" else multiple(swi, W_VEC)
    w_step_o = 1 if W_UNIT == "o" else multiple(swo, W_VEC)
    # Written channels past the last one are clamped instead of masked, because their results are never stored. If they are the
    # contiguous axis they are masked after all, because clamping would prevent vector loads.
    ow = o if W_UNIT == "o" else tl.minimum(o, CO - 1)
    xp = x_ptr + group * multiple(sxg, max(X_VEC, X_PIXELS)).to(OFFSET) + (lead(x_offset, X_FLIP) + trail(c * x_step, X_FLIP))
    wp = w_ptr + w_offset + (lead(c * w_step_i, W_FLIP) + trail(ow * w_step_o, W_FLIP))
    if EXTRA:
        more = pid_n * (BLOCK_N + EXTRA) + BLOCK_N + tl.arange(0, EXTRA)
        ow = more if W_UNIT == "o" else tl.minimum(more, CO - 1)
        more_wp = w_ptr + w_offset + (lead(c * w_step_i, W_FLIP) + trail(ow * w_step_o, W_FLIP))

    if STATE:
        _, _, s_offset, _, _, _, _ = written_pixels(
            pid_m, BLOCK_M, N, Y, T, S, D, P, gcds,
            multiple(ssn, S_VEC), ss, multiple(syn, Y_VEC), sy, TRANSPOSED, RANK, OFFSET, BLOCK_M,
        )  # fmt: skip
        s_offset += P[FIRST].to(OFFSET) * ss[FIRST]
        sp = state_ptr + group * multiple(CI, S_VEC) * s_step + (lead(s_offset, X_FLIP) + trail(c * s_step, X_FLIP))
    else:
        sp = xp

    # --- what the offsets add when a dimension's tap advances (fx, fw) and when it wraps (wrap_x, wrap_w) ---
    fx = ()
    fw = ()
    wrap_x = ()
    wrap_w = ()
    fs = ()
    wrap_s = ()
    hop_s = BLOCK_K * s_step
    hop_x = BLOCK_K * x_step  # when the outermost dimension wraps, the channel block advances
    hop_w = BLOCK_K * w_step_i
    for d in tl.static_range(3):
        if d >= FIRST:
            ax = x_tap[d] * sx[d] if X_PIXELS == 1 and not REPEATS[d] else 0
            aw = (S[d] // gcds[d] if TRANSPOSED else 1) * sw[d]
            fx = fx + (ax,)
            fw = fw + (aw,)
            wrap_x = wrap_x + (hop_x - n_taps[d] * ax,)
            wrap_w = wrap_w + (hop_w - n_taps[d] * aw,)
            hop_x = ax
            hop_w = aw
            a_s = x_tap[d] * ss[d]
            fs = fs + (a_s,)
            wrap_s = wrap_s + (hop_s - n_taps[d] * a_s,)
            hop_s = a_s
        else:
            fs = fs + (0,)
            wrap_s = wrap_s + (0,)
            fx = fx + (0,)
            fw = fw + (0,)
            wrap_x = wrap_x + (0,)
            wrap_w = wrap_w + (0,)
    dx = hop_x * 0
    dw = hop_w * 0
    ds = hop_s * 0
    counter = (0, 0, 0)
    done = 0
    left = CI
    if SPLIT:
        split = tl.program_id(0) // (tiles_n * G) % splits
        done = split * multiple(chunk, BLOCK_K)
        left = tl.minimum(chunk, CI - done)
        xp += done * x_step
        wp += done * w_step_i
        sp += done * s_step
        if EXTRA:
            more_wp += done * w_step_i
        y_ptr += split.to(tl.int64) * multiple(sys, max(Y_VEC, Y_PIXELS))
    if FLIP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if EXTRA:
        if FLIP:
            more_acc = tl.zeros((EXTRA, BLOCK_M), dtype=ACC)
        else:
            more_acc = tl.zeros((BLOCK_M, EXTRA), dtype=ACC)
    for _ in tl.range(0, n_taps[0] * n_taps[1] * n_taps[2] * tl.cdiv(left, BLOCK_K)):
        if X_PIXELS > 1:
            ok = live
        elif FIELD:
            ok = (bits & tap_word(counter, RANK, FIELD)) == 0
        else:
            ok = live
            for d in tl.static_range(FIRST, 3):
                if BORDERS[d] == "zeros":
                    ok &= inside(h[d] + counter[d] * x_tap[d], X[d])
        at = dx
        for d in tl.static_range(FIRST, 3):
            if REPEATS[d]:
                at += lead(found_at(h[d] + counter[d] * x_tap[d], X[d], BORDERS[d]).to(OFFSET) * sx[d], X_FLIP)
        tail = c < reduced - done
        address = xp + at
        if STATE:
            address = tl.where(lead(h[FIRST] + counter[FIRST] * x_tap[FIRST] >= 0, X_FLIP), address, sp + ds)
        if EVEN:
            xv = tl.load(address, mask=lead(ok, X_FLIP), other=0.0)
        else:
            xv = tl.load(address, mask=lead(ok, X_FLIP) & trail(tail, X_FLIP), other=0.0)
        xv = turned(xv, X_FLIP, FLIP)  # [BLOCK_M, BLOCK_K], transposed if FLIP
        acc = multiply(acc, xv, wp + dw, o, tail, written, W_UNIT, EVEN, W_FLIP, FLIP, PRECISION, INTERPRET)
        if EXTRA:
            more_acc = multiply(
                more_acc, xv, more_wp + dw, more, tail, written, W_UNIT, EVEN, W_FLIP, FLIP, PRECISION, INTERPRET,
            )  # fmt: skip
        dx += fx[2]
        dw += fw[2]
        ds += fs[2]
        i2 = counter[2] + 1
        wrap = i2 >= n_taps[2]
        i2 = tl.where(wrap, 0, i2)
        dx += tl.where(wrap, wrap_x[2], 0)
        dw += tl.where(wrap, wrap_w[2], 0)
        ds += tl.where(wrap, wrap_s[2], 0)
        i1 = counter[1]
        i0 = counter[0]
        if RANK >= 2:
            i1 += tl.where(wrap, 1, 0)
            wrap = i1 >= n_taps[1]
            i1 = tl.where(wrap, 0, i1)
            dx += tl.where(wrap, wrap_x[1], 0)
            dw += tl.where(wrap, wrap_w[1], 0)
            ds += tl.where(wrap, wrap_s[1], 0)
        if RANK == 3:
            i0 += tl.where(wrap, 1, 0)
            wrap = i0 >= n_taps[0]
            i0 = tl.where(wrap, 0, i0)
            dx += tl.where(wrap, wrap_x[0], 0)
            dw += tl.where(wrap, wrap_w[0], 0)
            ds += tl.where(wrap, wrap_s[0], 0)
        counter = (i0, i1, i2)
        done += tl.where(wrap, BLOCK_K, 0)

    if Y_PIXELS > 1:
        live, y_offset = flat_pixels(pid_m, N, Y, syn, RANK, OFFSET, BLOCK_M, Y_PIXELS)
    once = tl.where(split == 0, CO, 0) if SPLIT else CO
    y_step = 1 if Y_UNIT else multiple(syc, Y_PIXELS).to(OFFSET)
    base = group * multiple(syg, max(Y_VEC, Y_PIXELS)).to(OFFSET)
    write(
        acc, y_ptr, base, b_ptr, group * written, o, once, live, written, sb, y_offset, y_step,
        scale_ptr, shift_ptr, residual_ptr, kept_ptr, HAS_BIAS,
        ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, Y_FLIP,
    )  # fmt: skip
    if EXTRA:
        write(
            more_acc, y_ptr, base, b_ptr, group * written, more, once, live, written, sb, y_offset, y_step,
            scale_ptr, shift_ptr, residual_ptr, kept_ptr, HAS_BIAS,
            ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, FLIP, Y_FLIP,
        )  # fmt: skip
