"""fprop, dgrad and wgrad as implicit GEMM with operands loaded by the tensor memory accelerator (TMA), ranks 1 to 3.

The equations are those of gather.py and wgrad.py, and so are the names: x is read and y is written. Any dilation is
supported. fprop and wgrad need unit stride; dgrad (also the forward of transposed layers) takes any stride.

             GEMM_M     GEMM_N   GEMM_K       per group: K and C are channels per group
    fprop    N*Z*P*Q    K        C*T*R*S
    dgrad    N*D*H*W    C        K*T*R*S
    wgrad    K          C        N*Z*P*Q      per filter tap

fprop and dgrad: a program writes a box of pixels [BN, B0, B1, B2] of one phase. What a filter tap reads of x is the same
box, shifted. TMA loads it at coordinates that may be negative and returns zero outside the tensor, which is the padding. So
the main loop has no masks, no pointers and no words of bits. Like gather's, it runs over channel blocks (outer) and taps
(inner).

The accumulator is transposed, [channels, pixels], which makes the box of x the second operand of the product. As the first
operand it would pass through registers on its way from shared memory to the tensor cores. Weights are used in their memory
order [K, T, R, S, C]. Both passes load boxes [k, c]; dgrad transposes them in the product. Reduced channels past the end are
zero in both operands, so nothing that is stored behind them is multiplied. y is stored as a box where that is possible (unit
stride, channels last, whole tiles of channels per group), and TMA skips what is outside. Otherwise y is stored through
pointers.

wgrad: both operands are boxes of the same pixels, of dy and, shifted by a tap, of x. A box is a run of pixels along one axis
(RUN: the images or a dimension), which the descriptors put next to the channels. With several pixel extents in a box, the
first operand would pass through registers. Where dy ends, x may not, and zero times an infinite x would be NaN. So a run
overhangs the output's extent only where x ends as well: for each tap, runs overhang either the end of the dimension, or its
start. If one tap can do neither, the run's length divides the extent. The planner sees to that (planning/tma.py `run_of`). Past
the last image both operands are zero.
"""

import triton
import triton.language as tl

from tconv.kernels.common import (
    APART,
    decode,
    kernel,
    lead,
    multiple,
    overhanging,
    phase,
    product,
    rounded,
    trail,
    turned,
    write_tap,
)
from tconv.kernels.epilogue import before_activation, finish, from_activation

OUTSIDE = tl.constexpr(-(1 << 20))  # a coordinate that no box reaches back from


@kernel
def tma(
    x_desc, w_desc, b_ptr,
    y_ptr,  # a tensor descriptor if Y_BOX
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None; the last two like y_ptr
    N, CI, CO, G,
    Y0, Y1, Y2, T0, T1, T2,  # extents: written, taps
    S0, S1, S2, D0, D1, D2, P0, P1, P2,  # stride, dilation, leading padding
    g0, g1, g2,  # gcd(S, D)
    syn, syg, syc, sy0, sy1, sy2, sb,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, Y_BOX: tl.constexpr, Y_UNIT: tl.constexpr, Y_VEC: tl.constexpr,
    W_TURNED: tl.constexpr,  # whether a dgrad's reduced channels are the contiguous ones of w
    Y_PIXELS: tl.constexpr,  # vector width along the last dimension, if that is contiguous and it is above 1
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    BN: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,  # the box: images, and pixels per dimension
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    BLOCK_M: tl.constexpr = BN * B0 * B1 * B2
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    S = (S0, S1, S2)
    D = (D0, D1, D2)
    P = (P0, P1, P2)
    gcds = (g0, g1, g2)
    B = (B0, B1, B2)
    sy = (multiple(sy0, Y_VEC).to(OFFSET), multiple(sy1, Y_VEC).to(OFFSET), multiple(sy2, Y_VEC).to(OFFSET))

    # Program order: channel tiles vary fastest, then groups, boxes, images and phases. Phases with more taps come first.
    tiles_n = tl.cdiv(CO, BLOCK_N)
    o_first = tl.program_id(0) % tiles_n * BLOCK_N
    rest = tl.program_id(0) // tiles_n
    group = rest % G
    rest = rest // G
    origin = ()
    for i in tl.static_range(3):
        if i < RANK:
            boxes = tl.cdiv(tl.cdiv(Y[2 - i], S[2 - i]) if TRANSPOSED else Y[2 - i], B[2 - i])
            origin = (rest % boxes * B[2 - i],) + origin
            rest = rest // boxes
        else:
            origin = (0,) + origin
    boxes = tl.cdiv(N, BN)
    image = rest % boxes * BN
    rest = rest // boxes

    # --- per dimension: the number of taps, the first tap, the coordinate that it reads, and the steps of both ---
    m = tl.arange(0, BLOCK_M)
    n_taps = ()
    taps = ()
    reads = ()
    t_step = ()
    x_step = ()
    live = m >= 0
    past = False
    y_offset = (m * 0).to(OFFSET)
    for i in tl.static_range(3):
        if i < RANK:
            index = rest % S[2 - i]
            rest = rest // S[2 - i]
            n, t0, first, outputs, a = phase(index, T[2 - i], S[2 - i], D[2 - i], P[2 - i], gcds[2 - i], Y[2 - i], TRANSPOSED)
            past |= origin[2 - i] >= outputs
            j = origin[2 - i] + m % B[2 - i]
            if i == 0 and Y_PIXELS > 1:
                live &= j < multiple(outputs, Y_PIXELS)
                y_offset += j.to(OFFSET)
            else:
                live &= j < outputs
                y_offset += (j * S[2 - i] + a if TRANSPOSED else j).to(OFFSET) * multiple(sy[2 - i], Y_PIXELS)
            m = m // B[2 - i]
            n_taps = (n,) + n_taps
            taps = (t0,) + taps
            reads = (origin[2 - i] + first,) + reads
            t_step = (S[2 - i] // gcds[2 - i] if TRANSPOSED else 1,) + t_step
            x_step = (-(D[2 - i] // gcds[2 - i]) if TRANSPOSED else D[2 - i],) + x_step
        else:
            n_taps = (1,) + n_taps
            taps = (0,) + taps
            reads = (0,) + reads
            t_step = (0,) + t_step
            x_step = (0,) + x_step
    if past:
        return
    live &= image + m < N
    y_offset += (image + m).to(OFFSET) * multiple(syn, max(Y_VEC, Y_PIXELS))

    i0 = image * 0
    i1 = i0
    i2 = i0
    c = i0
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    # A phase without taps takes one step, on boxes outside both tensors, which read zero: if the loop might not run at all,
    # Triton 3.6 would wait for every wgmma before it issues the next.
    count = n_taps[0] * n_taps[1] * n_taps[2]
    read2 = tl.where(count > 0, reads[2], OUTSIDE) if TRANSPOSED else reads[2]
    tap2 = tl.where(count > 0, taps[2], OUTSIDE) if TRANSPOSED else taps[2]
    steps = (tl.maximum(count, 1) if TRANSPOSED else count) * tl.cdiv(CI, BLOCK_K)
    tl.assume(steps > 0)
    for _ in tl.range(0, steps):
        h0 = reads[0] + i0 * x_step[0]
        h1 = reads[1] + i1 * x_step[1]
        h2 = read2 + i2 * x_step[2]
        t0 = taps[0] + i0 * t_step[0]
        t1 = taps[1] + i1 * t_step[1]
        t2 = tap2 + i2 * t_step[2]
        xv = x_desc.load([image, h0, h1, h2, group * CI + c]).reshape(BLOCK_M, BLOCK_K).T  # [BLOCK_K, BLOCK_M]
        if W_TURNED:
            wv = w_desc.load([t0, t1, t2, o_first, group * CI + c]).reshape(BLOCK_N, BLOCK_K)
        elif TRANSPOSED:
            wv = w_desc.load([t0, t1, t2, group * CI + c, o_first]).reshape(BLOCK_K, BLOCK_N).T  # [BLOCK_N, BLOCK_K]
        else:
            wv = w_desc.load([t0, t1, t2, group * CO + o_first, c]).reshape(BLOCK_N, BLOCK_K)
        acc = product(wv, xv, acc, PRECISION, INTERPRET)
        i2 += 1
        wrap = i2 >= n_taps[2]
        i2 = tl.where(wrap, 0, i2)
        if RANK >= 2:
            i1 += tl.where(wrap, 1, 0)
            wrap = i1 >= n_taps[1]
            i1 = tl.where(wrap, 0, i1)
        if RANK == 3:
            i0 += tl.where(wrap, 1, 0)
            wrap = i0 >= n_taps[0]
            i0 = tl.where(wrap, 0, i0)
        c += tl.where(wrap, BLOCK_K, 0)

    o = o_first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias = tl.load(b_ptr + (group * CO + o) * sb, mask=o < CO, other=0.0)
        acc += trail(bias.to(ACC), True)
    if Y_BOX:
        # The residual and what is kept are boxes of the same pixels and channels.
        at = [image, origin[0], origin[1], origin[2], group * CO + o_first]
        dtype: tl.constexpr = y_ptr.dtype
        more = residual_ptr.load(at).reshape(BLOCK_M, BLOCK_N).T.to(ACC) if RESIDUAL != "" else None
        acc = before_activation(
            acc, more, group * CO + o, o < CO, scale_ptr, shift_ptr, dtype,
            ACTIVATION, SCALE, SHIFT, RESIDUAL, STEPWISE, INTERPRET, True,
        )  # fmt: skip
        if KEPT:
            kept_ptr.store(at, rounded(acc, dtype, INTERPRET).T.reshape(BN, B0, B1, B2, BLOCK_N))
        acc = from_activation(acc, more, dtype, ACTIVATION, SLOPE, RESIDUAL, STEPWISE, INTERPRET)
        y_ptr.store(at, rounded(acc, dtype, INTERPRET).T.reshape(BN, B0, B1, B2, BLOCK_N))
    else:
        y_step = 1 if Y_UNIT else multiple(syc, Y_PIXELS).to(OFFSET)
        Y_FLIP: tl.constexpr = True if Y_UNIT else Y_PIXELS > 1 or APART
        base = group * multiple(syg, max(Y_VEC, Y_PIXELS)).to(OFFSET)
        tile = lead(y_offset, Y_FLIP) + trail(o * y_step, Y_FLIP)
        mask = lead(live, Y_FLIP) & trail(o < multiple(CO, Y_VEC), Y_FLIP)
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        acc = finish(
            acc, base + tile, mask, group * CO + o, o < CO, scale_ptr, shift_ptr, residual_ptr, kept_ptr, dtype,
            ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, True, Y_FLIP,
        )  # fmt: skip
        tl.store(y_ptr + base + tile, turned(rounded(acc, dtype, INTERPRET), True, Y_FLIP), mask=mask)


@triton.jit
def run_last(image, i0, i1, i2, channel, RUN: tl.constexpr):
    """Returns coordinates in the order of the descriptor's axes: the run's axis is next to the channels."""
    if RUN == "n":
        return [i0, i1, i2, image, channel]
    if RUN == 0:
        return [image, i1, i2, i0, channel]
    if RUN == 1:
        return [image, i0, i2, i1, channel]
    return [image, i0, i1, i2, channel]


@kernel
def tma_wgrad(
    dy_desc, x_desc, dw_ptr,
    N, C, K, G,  # C, K: channels per group
    CW, KW,  # the same of dw, as in wgrad.py
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2, D0, D1, D2, P0, P1, P2,
    chunk,  # runs per split
    sws, swg, swk, swc, sw0, sw1, sw2,
    RUN: tl.constexpr, RANK: tl.constexpr, W_UNIT: tl.constexpr, W_VEC: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    BN: tl.constexpr = BLOCK_P if RUN == "n" else 1
    B0: tl.constexpr = BLOCK_P if RUN == 0 else 1
    B1: tl.constexpr = BLOCK_P if RUN == 1 else 1
    B2: tl.constexpr = BLOCK_P if RUN == 2 else 1
    X = (X0, X1, X2)
    Y = (Y0, Y1, Y2)
    T = (T0, T1, T2)
    D = (D0, D1, D2)
    P = (P0, P1, P2)
    B = (B0, B1, B2)
    sw = (multiple(sw0, W_VEC), multiple(sw1, W_VEC), multiple(sw2, W_VEC))

    # --- program order, as in wgrad.py: taps vary fastest, then channels, groups, splits ---
    pid = tl.program_id(0)
    taps = T0 * T1 * T2
    _, tap = decode(pid % taps, T, 3)
    pid = pid // taps
    tiles_c = tl.cdiv(C, BLOCK_C)
    c_first = pid % tiles_c * BLOCK_C
    pid = pid // tiles_c
    tiles_k = tl.cdiv(K, BLOCK_K)
    k_first = pid % tiles_k * BLOCK_K
    pid = pid // tiles_k
    group = pid % G
    split = pid // G

    # --- the split's runs: the first run's coordinates in dy, and the tap's shift to those in x ---
    runs = tl.cdiv(N, BN)
    rest = split * chunk
    j = ()
    start = ()
    shift = ()
    dw_offset = split.to(tl.int64) * multiple(sws, W_VEC) + group * multiple(swg, W_VEC).to(tl.int64)
    for i in tl.static_range(3):
        if i < RANK:
            pieces = tl.cdiv(Y[2 - i], B[2 - i])
            runs *= pieces
            s = tap[2 - i] * D[2 - i] - P[2 - i]
            a = overhanging(Y[2 - i], s, X[2 - i], pieces * B[2 - i])
            j = (a + rest % pieces * B[2 - i],) + j
            rest = rest // pieces
            start = (a,) + start
            shift = (s,) + shift
            dw_offset += tap[2 - i] * sw[2 - i].to(tl.int64)
        else:
            j = (0,) + j
            start = (0,) + start
            shift = (0,) + shift
    image = rest * BN
    j0, j1, j2 = j[0], j[1], j[2]
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=ACC)
    steps = tl.minimum(chunk, runs - split * chunk)
    tl.assume(steps > 0)  # every split has work
    for _ in tl.range(0, steps):
        i0 = j0 + shift[0]
        i1 = j1 + shift[1]
        i2 = j2 + shift[2]
        gv = dy_desc.load(run_last(image, j0, j1, j2, group * K + k_first, RUN)).reshape(BLOCK_P, BLOCK_K)
        xv = x_desc.load(run_last(image, i0, i1, i2, group * C + c_first, RUN)).reshape(BLOCK_P, BLOCK_C)
        acc = product(gv.T, xv, acc, PRECISION, INTERPRET)
        j2 += B2
        wrap = j2 >= Y2
        j2 = tl.where(wrap, start[2], j2)
        if RANK >= 2:
            j1 += tl.where(wrap, B1, 0)
            wrap = j1 >= Y1
            j1 = tl.where(wrap, start[1], j1)
        if RANK == 3:
            j0 += tl.where(wrap, B0, 0)
            wrap = j0 >= Y0
            j0 = tl.where(wrap, start[0], j0)
        image += tl.where(wrap, BN, 0)

    k = k_first + tl.arange(0, BLOCK_K)
    c = c_first + tl.arange(0, BLOCK_C)
    W_FLIP: tl.constexpr = True if W_UNIT else APART
    write_tap(dw_ptr + dw_offset, acc, k, c, KW, CW, swk, swc, W_FLIP, W_UNIT, W_VEC, INTERPRET)
