"""Causal depthwise convolutions of sequences with an activation, as state-space models have them: prefill, gradients, decoding.

    y[n, c, j] = activation(b[c] + sum over t of w[c, t] * x[n, c, j - (T - 1) + t])

What comes before a sequence is its state, x at -(T - 1) to -1, or zero. Several sequences may lie one after the other along
the time of x (INDEXED): index[n, j] is the sequence to which time j belongs, and what belongs to another one is not read.

A strip is COLUMNS neighbouring times, and its window is the T - 1 + COLUMNS times that its outputs read. A thread loads each
of these once. Where channels are contiguous, a tile is [strips, channels] and a column is one load, along the channels. Where
times are contiguous, it is [channels, strips], and one load takes COLUMNS times from an aligned address (as in strip.py).

An output's products are added from the first tap to the last, wherever it lies in its strip and whether its inputs are in x or
in the state. So a sequence computed chunk by chunk has the bits of the whole.
"""

import triton
import triton.language as tl

from tconv.kernels.common import apart, inside, kernel, lead, multiple, rounded, together, trail
from tconv.kernels.epilogue import activated, gradient


@triton.jit
def place(pid, N, C, L, COLUMNS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the tile of program `pid`; tiles of channels vary fastest.

    Returns:
        live: mask of the strips that exist [BLOCK_M].
        n, j: image and first time of each strip [BLOCK_M].
        c, mask_c: the channels, and which of them exist [BLOCK_C].
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    strips = tl.cdiv(L, COLUMNS)
    m = (pid // tiles_c).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (m // strips).to(tl.int32)
    return n < N, n, (m % strips).to(tl.int32) * COLUMNS, c, c < C


@triton.jit
def columns(
    p, j, live, mask_c, L, st,
    LOW: tl.constexpr, COUNT: tl.constexpr, READ: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Returns COUNT columns from time j + LOW on, zero where there is no such time.

    Args:
        p: pointers to time j of each strip and channel, in the shape of a tile.
        st: the stride of times; 1 where READ columns are loaded at once.
    """
    found = ()
    if READ == 1:
        for i in tl.static_range(COUNT):
            mask = lead(live & inside(j + (LOW + i), L), FLIP) & trail(mask_c, FLIP)
            found = found + (tl.load(p + (LOW + i) * st, mask=mask, other=0.0).to(ACC),)
    else:
        FROM: tl.constexpr = LOW // READ * READ
        r = tl.arange(0, READ)
        for b in tl.static_range((LOW + COUNT - 1 - FROM) // READ + 1):
            at = j[:, None] + (FROM + b * READ + r[None, :])
            mask = (live[:, None] & inside(at, L))[None, :, :] & mask_c[:, None, None]
            block = tl.load(p[:, :, None] + (FROM + b * READ + r[None, None, :]), mask=mask, other=0.0)
            found = found + apart(block.to(ACC), p.shape[0], p.shape[1], READ)
        found = found[LOW - FROM : LOW - FROM + COUNT]
    return found


@triton.jit
def sequences_of(index_ptr, n, j, live, L, LOW: tl.constexpr, COUNT: tl.constexpr, OFFSET: tl.constexpr):
    """Returns the sequence of each of COUNT columns from time j + LOW on; -1 where there is no such time."""
    found = ()
    for i in tl.static_range(COUNT):
        mask = live & inside(j + (LOW + i), L)
        found = found + (tl.load(index_ptr + n.to(OFFSET) * L + j + (LOW + i), mask=mask, other=-1),)
    return found


@triton.jit
def limits(starts_ptr, q, n, live, L, sequences, INDEXED: tl.constexpr):
    """Returns (sequence, first time, end, exists) of the sequence q, which is image n itself unless INDEXED."""
    if INDEXED:
        known = live & inside(q, sequences)
        found = q, tl.load(starts_ptr + q, mask=known, other=0), tl.load(starts_ptr + q + 1, mask=known, other=0), known
    else:
        found = n, n * 0, n * 0 + L, live
    return found


@triton.jit
def of_state(
    state_ptr, q, i, exists, c, mask_c, ssn, ssc, sst,
    T: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Returns element i of the state of sequence q, both per strip; zero where the state has no such element."""
    p = state_ptr + (lead(q.to(OFFSET) * ssn + i.to(OFFSET) * sst, FLIP) + trail(c * ssc, FLIP))
    mask = lead(exists & inside(i, T - 1), FLIP) & trail(mask_c, FLIP)
    return tl.load(p, mask=mask, other=0.0).to(ACC)


@triton.jit
def filter_taps(
    w_ptr, c, mask_c, swc, swt, T: tl.constexpr, W_VEC: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    """Returns the taps of the channels, each as a tensor that broadcasts over strips.

    They are loaded as one tile, since they mostly lie one after the other, and then separated. WIDTH is T rounded up to a power
    of two. W_VEC is the vector width along the taps, and 0 if their stride is not one.
    """
    t = tl.arange(0, WIDTH)
    BLOCK_C: tl.constexpr = c.shape[0]
    step = 1 if W_VEC else swt
    p = w_ptr + (c[:, None] * multiple(swc, max(W_VEC, 1)) + t[None, :] * step)
    tile = tl.load(p, mask=mask_c[:, None] & (t < T)[None, :], other=0.0).to(ACC)
    if FLIP:
        taps = apart(tl.reshape(tile, (BLOCK_C, 1, WIDTH)), BLOCK_C, 1, WIDTH)
    else:
        taps = apart(tl.reshape(tile, (1, BLOCK_C, WIDTH)), 1, BLOCK_C, WIDTH)
    return taps


@triton.jit
def read_by(
    xs, qs, state_ptr, starts_ptr, n, j, live, L, c, mask_c, sequences, ssn, ssc, sst,
    V: tl.constexpr, T: tl.constexpr, STATE: tl.constexpr, INDEXED: tl.constexpr,
    OFFSET: tl.constexpr, ACC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Returns what output V of each strip multiplies by each tap.

    Args:
        xs: the columns from time j - (T - 1) on.
        qs: their sequences, if INDEXED.
    """
    found = ()
    if STATE:
        q, first, _end, known = limits(starts_ptr, qs[V + T - 1] if INDEXED else n, n, live, L, sequences, INDEXED)
    for t in tl.static_range(T):
        x = xs[V + t]
        if t < T - 1:
            if INDEXED:
                same = qs[V + t] == qs[V + T - 1]
            else:
                same = j + (V + t - (T - 1)) >= 0
            if STATE and (INDEXED or V + t < T - 1):
                i = j + (V + t) - first
                before = of_state(state_ptr, q, i, known & (same == 0), c, mask_c, ssn, ssc, sst, T, OFFSET, ACC, FLIP)
                x = tl.where(lead(same, FLIP), x, before)
            elif INDEXED:
                x = tl.where(lead(same, FLIP), x, 0.0)
        found = found + (x,)
    return found


@triton.jit
def store_columns(
    y_ptr, offset, ys, j, live, mask_c, L, st,
    COLUMNS: tl.constexpr, READ: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Writes the columns of a strip, the inverse of `columns`."""
    if READ == 1:
        for v in tl.static_range(COLUMNS):
            mask = lead(live & (j + v < L), FLIP) & trail(mask_c, FLIP)
            tl.store(y_ptr + offset + v * st, rounded(ys[v], y_ptr.dtype.element_ty, INTERPRET), mask=mask)
    else:
        y = together(ys, offset.shape[0], offset.shape[1], COLUMNS)
        v = tl.arange(0, COLUMNS)
        mask = (live[:, None] & (j[:, None] + v[None, :] < L))[None, :, :] & mask_c[:, None, None]
        tl.store(y_ptr + (offset[:, :, None] + v[None, None, :]), rounded(y, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def products(read, taps, T: tl.constexpr):
    """Returns the sum over the taps of what one output reads, in the order of the taps."""
    acc = read[0] * taps[0]
    for t in tl.static_range(1, T):
        acc += read[t] * taps[t]
    return acc


@triton.jit
def hinted(sn, sc, st, UNIT: tl.constexpr, VEC: tl.constexpr, OFFSET: tl.constexpr):
    """Returns the strides of images, channels and times so that the compiler can tell that VEC elements lie in one piece."""
    n = multiple(sn, VEC).to(OFFSET)
    c = 1 if UNIT == "c" else multiple(sc, VEC).to(OFFSET)
    t = 1 if UNIT == "p" else multiple(st, VEC).to(OFFSET)
    return n, c, t


@triton.jit
def write_outputs(
    pid, x_ptr, w_ptr, b_ptr, state_ptr, index_ptr, starts_ptr, y_ptr, N, C, L, sequences,
    sxn, sxc, sxt, swc, swt, sb, syn, syc, syt, ssn, ssc, sst,
    T: tl.constexpr, STATE: tl.constexpr, INDEXED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    READ: tl.constexpr, W_VEC: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr, FLIP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes tile `pid` of y."""
    live, n, j, c, mask_c = place(pid, N, C, L, COLUMNS, OFFSET, BLOCK_M, BLOCK_C)
    taps = filter_taps(w_ptr, c, mask_c, swc, swt, T, W_VEC, WIDTH, ACC, FLIP)
    p = x_ptr + (lead(n.to(OFFSET) * sxn + j.to(OFFSET) * sxt, FLIP) + trail(c * sxc, FLIP))
    xs = columns(p, j, live, mask_c, L, sxt, 1 - T, T - 1 + COLUMNS, READ, ACC, FLIP)
    qs = ()
    if INDEXED:
        qs = sequences_of(index_ptr, n, j, live, L, 1 - T, T - 1 + COLUMNS, OFFSET)
    ys = ()
    for v in tl.static_range(COLUMNS):
        read = read_by(
            xs, qs, state_ptr, starts_ptr, n, j, live, L, c, mask_c, sequences, ssn, ssc, sst,
            v, T, STATE, INDEXED, OFFSET, ACC, FLIP,
        )  # fmt: skip
        acc = products(read, taps, T)
        if HAS_BIAS:
            acc += trail(tl.load(b_ptr + c * sb, mask=mask_c, other=0.0).to(ACC), FLIP)
        ys = ys + (activated(acc, ACTIVATION, 0.0),)
    offset = lead(n.to(OFFSET) * syn + j.to(OFFSET) * syt, FLIP) + trail(c * syc, FLIP)
    store_columns(y_ptr, offset, ys, j, live, mask_c, L, syt, COLUMNS, READ, INTERPRET, FLIP)


@triton.jit
def write_next_states(
    pid, x_ptr, state_ptr, starts_ptr, next_ptr, C, L, sequences, sxn, sxc, sxt, ssn, ssc, sst, snn, snc, snt,
    T: tl.constexpr, STATE: tl.constexpr, INDEXED: tl.constexpr, OFFSET: tl.constexpr, FLIP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the next state of one sequence, for the channels of tile `pid`."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    i = tl.arange(0, WINDOW)
    n = i * 0 + pid // tiles_c
    live = i < T - 1
    q, first, end, _known = limits(starts_ptr, n, n, live, L, sequences, INDEXED)
    at = end - (T - 1) + i
    image = 0 if INDEXED else n.to(OFFSET)
    p = x_ptr + (lead(image * sxn + at.to(OFFSET) * sxt, FLIP) + trail(c * sxc, FLIP))
    v = tl.load(p, mask=lead(live & (at >= first), FLIP) & trail(mask_c, FLIP), other=0.0)
    if STATE:
        element = x_ptr.dtype.element_ty
        before = of_state(
            state_ptr, q, at - first + T - 1, live & (at < first), c, mask_c, ssn, ssc, sst, T, OFFSET, element, FLIP
        )
        v = tl.where(lead(at >= first, FLIP), v, before)
    out = next_ptr + (lead(n.to(OFFSET) * snn + i * snt, FLIP) + trail(c * snc, FLIP))
    tl.store(out, v, mask=lead(live, FLIP) & trail(mask_c, FLIP))


@kernel
def causal(
    x_ptr, w_ptr, b_ptr, state_ptr, index_ptr, starts_ptr, y_ptr, next_ptr,
    N, C, L, sequences, tiles,  # tiles: programs that write y; the others write the next states
    sxn, sxc, sxt, swc, swt, sb, syn, syc, syt, ssn, ssc, sst, snn, snc, snt,
    T: tl.constexpr, STATE: tl.constexpr, NEXT: tl.constexpr, INDEXED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, READ: tl.constexpr,  # of x and y: contiguous axis ("c", "p", ""), vector width
    W_VEC: tl.constexpr, WIDTH: tl.constexpr, S_UNIT: tl.constexpr, S_VEC: tl.constexpr,  # of w (`filter_taps`); of the state
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes y, and with NEXT the next state of each sequence: the last T - 1 of its state and its inputs.

    Args:
        state_ptr: [sequences, C, T - 1], if STATE.
        index_ptr, starts_ptr: if INDEXED, index[N, L], contiguous, and the first time of each sequence and of the one after
            the last; then N is 1 if there are states.
        next_ptr: [sequences, C, T - 1], if NEXT. WINDOW is T - 1 rounded up to a power of two.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    if S_UNIT:
        C = multiple(C, S_VEC)
    ssn, ssc, sst = hinted(ssn, ssc, sst, "c" if S_UNIT else "", S_VEC, OFFSET)
    if UNIT == "c":
        C = multiple(C, VEC)
    elif UNIT == "p":
        L = multiple(L, VEC)
    sxn, sxc, sxt = hinted(sxn, sxc, sxt, UNIT, VEC, OFFSET)
    syn, syc, syt = hinted(syn, syc, syt, UNIT, VEC, OFFSET)
    if UNIT == "c":  # the next states lie as x does
        snn = multiple(snn, VEC)
        snt = multiple(snt, VEC)
    snc = 1 if UNIT == "c" else snc.to(OFFSET)
    if tl.program_id(0) < tiles:
        write_outputs(
            tl.program_id(0), x_ptr, w_ptr, b_ptr, state_ptr, index_ptr, starts_ptr, y_ptr, N, C, L, sequences,
            sxn, sxc, sxt, swc, swt, sb, syn, syc, syt, ssn, ssc, sst,
            T, STATE, INDEXED, HAS_BIAS, ACTIVATION, READ, W_VEC, WIDTH, OFFSET, ACC, INTERPRET, FLIP,
            COLUMNS, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    elif NEXT:
        write_next_states(
            tl.program_id(0) - tiles, x_ptr, state_ptr, starts_ptr, next_ptr, C, L, sequences,
            sxn, sxc, sxt, ssn, ssc, sst, snn, snc, snt, T, STATE, INDEXED, OFFSET, FLIP, WINDOW, BLOCK_C,
        )  # fmt: skip


@kernel
def causal_wgrad(
    x_ptr, w_ptr, b_ptr, state_ptr, index_ptr, starts_ptr, dy_ptr, du_ptr, sums_ptr,
    N, C, L, sequences, chunk,  # chunk: tiles of strips per split
    sxn, sxc, sxt, swc, swt, sb, syn, syc, syt, ssn, ssc, sst,
    T: tl.constexpr, STATE: tl.constexpr, INDEXED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, READ: tl.constexpr, W_VEC: tl.constexpr, WIDTH: tl.constexpr,
    S_UNIT: tl.constexpr, S_VEC: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the activation's argument, which it computes again, and each split's sums for dw and db.

    Args:
        dy_ptr, du_ptr: the gradient of y, and that of the activation's argument unless ACTIVATION is empty, in y's strides.
        sums_ptr: [splits, T + 1, C]: the products of du and what each tap reads, and du itself.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    if S_UNIT:
        C = multiple(C, S_VEC)
    ssn, ssc, sst = hinted(ssn, ssc, sst, "c" if S_UNIT else "", S_VEC, OFFSET)
    if UNIT == "c":
        C = multiple(C, VEC)
    elif UNIT == "p":
        L = multiple(L, VEC)
    sxn, sxc, sxt = hinted(sxn, sxc, sxt, UNIT, VEC, OFFSET)
    syn, syc, syt = hinted(syn, syc, syt, UNIT, VEC, OFFSET)
    tiles_c = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = filter_taps(w_ptr, c, c < C, swc, swt, T, W_VEC, WIDTH, ACC, FLIP)
    if FLIP:
        zero = tl.zeros((BLOCK_C, BLOCK_M), dtype=ACC)
    else:
        zero = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    accs = (zero,) * (T + 1)
    for i in tl.range(0, chunk):
        pid = (split * chunk + i) * tiles_c + tl.program_id(0) % tiles_c
        live, n, j, c, mask_c = place(pid, N, C, L, COLUMNS, OFFSET, BLOCK_M, BLOCK_C)
        p = x_ptr + (lead(n.to(OFFSET) * sxn + j.to(OFFSET) * sxt, FLIP) + trail(c * sxc, FLIP))
        offset = lead(n.to(OFFSET) * syn + j.to(OFFSET) * syt, FLIP) + trail(c * syc, FLIP)
        xs = columns(p, j, live, mask_c, L, sxt, 1 - T, T - 1 + COLUMNS, READ, ACC, FLIP)
        gs = columns(dy_ptr + offset, j, live, mask_c, L, syt, 0, COLUMNS, READ, ACC, FLIP)
        qs = ()
        if INDEXED:
            qs = sequences_of(index_ptr, n, j, live, L, 1 - T, T - 1 + COLUMNS, OFFSET)
        us = ()
        for v in tl.static_range(COLUMNS):
            read = read_by(
                xs, qs, state_ptr, starts_ptr, n, j, live, L, c, mask_c, sequences, ssn, ssc, sst,
                v, T, STATE, INDEXED, OFFSET, ACC, FLIP,
            )  # fmt: skip
            g = gs[v]
            if ACTIVATION != "":
                u = products(read, taps, T)
                if HAS_BIAS:
                    u += trail(tl.load(b_ptr + c * sb, mask=mask_c, other=0.0).to(ACC), FLIP)
                g = gradient(g, u, ACTIVATION, 0.0)
            us = us + (g,)
            more = ()
            for t in tl.static_range(T):
                more = more + (accs[t] + g * read[t],)
            accs = more + (accs[T] + g,)
        if ACTIVATION != "":
            store_columns(du_ptr, offset, us, j, live, mask_c, L, syt, COLUMNS, READ, INTERPRET, FLIP)
    for t in tl.static_range(T + 1):
        total = tl.sum(accs[t], axis=1 if FLIP else 0)
        tl.store(sums_ptr + (split * (T + 1) + t).to(OFFSET) * C + c, total, mask=c < C)


@triton.jit
def write_input_gradients(
    pid, du_ptr, w_ptr, index_ptr, starts_ptr, dnext_ptr, dx_ptr, N, C, L, sequences,
    syn, syc, syt, swc, swt, sxn, sxc, sxt, snn, snc, snt,
    T: tl.constexpr, DNEXT: tl.constexpr, INDEXED: tl.constexpr, READ: tl.constexpr, W_VEC: tl.constexpr,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes tile `pid` of dx."""
    live, n, j, c, mask_c = place(pid, N, C, L, COLUMNS, OFFSET, BLOCK_M, BLOCK_C)
    taps = filter_taps(w_ptr, c, mask_c, swc, swt, T, W_VEC, WIDTH, ACC, FLIP)
    p = du_ptr + (lead(n.to(OFFSET) * syn + j.to(OFFSET) * syt, FLIP) + trail(c * syc, FLIP))
    us = columns(p, j, live, mask_c, L, syt, 0, T - 1 + COLUMNS, READ, ACC, FLIP)
    qs = ()
    if INDEXED:
        qs = sequences_of(index_ptr, n, j, live, L, 0, T - 1 + COLUMNS, OFFSET)
    xs = ()
    for v in tl.static_range(COLUMNS):
        acc = us[v] * taps[T - 1]
        for t in tl.static_range(T - 1):
            u = us[v + T - 1 - t]
            if INDEXED:
                u = tl.where(lead(qs[v + T - 1 - t] == qs[v], FLIP), u, 0.0)
            acc += u * taps[t]
        if DNEXT:
            q, _first, end, known = limits(starts_ptr, qs[v] if INDEXED else n, n, live, L, sequences, INDEXED)
            i = j + v - end + (T - 1)
            acc += of_state(dnext_ptr, q, i, known & (j + v < end), c, mask_c, snn, snc, snt, T, OFFSET, ACC, FLIP)
        xs = xs + (acc,)
    offset = lead(n.to(OFFSET) * sxn + j.to(OFFSET) * sxt, FLIP) + trail(c * sxc, FLIP)
    store_columns(dx_ptr, offset, xs, j, live, mask_c, L, sxt, COLUMNS, READ, INTERPRET, FLIP)


@triton.jit
def write_state_gradients(
    pid, du_ptr, w_ptr, starts_ptr, dnext_ptr, dstate_ptr, C, L, sequences,
    syn, syc, syt, swc, swt, ssn, ssc, sst, snn, snc, snt,
    T: tl.constexpr, DNEXT: tl.constexpr, INDEXED: tl.constexpr, W_VEC: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one sequence's state, for the channels of tile `pid`."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    i = tl.arange(0, WINDOW)
    n = i * 0 + pid // tiles_c
    live = i < T - 1
    q, first, end, _known = limits(starts_ptr, n, n, live, L, sequences, INDEXED)
    image = 0 if INDEXED else n.to(OFFSET)
    taps = filter_taps(w_ptr, c, mask_c, swc, swt, T, W_VEC, WIDTH, ACC, FLIP)
    if FLIP:
        acc = tl.zeros((BLOCK_C, WINDOW), dtype=ACC)
    else:
        acc = tl.zeros((WINDOW, BLOCK_C), dtype=ACC)
    for t in tl.static_range(T - 1):
        at = first + i - t
        p = du_ptr + (lead(image * syn + at.to(OFFSET) * syt, FLIP) + trail(c * syc, FLIP))
        mask = lead(live & (i >= t) & (at < end), FLIP) & trail(mask_c, FLIP)
        acc += tl.load(p, mask=mask, other=0.0).to(ACC) * taps[t]
    if DNEXT:
        acc += of_state(
            dnext_ptr, q, i - (end - first), live, c, mask_c, snn, snc, snt, T, OFFSET, ACC, FLIP
        )  # fmt: skip
    out = dstate_ptr + (lead(n.to(OFFSET) * ssn + i * sst, FLIP) + trail(c.to(OFFSET) * ssc, FLIP))
    tl.store(out, rounded(acc, dstate_ptr.dtype.element_ty, INTERPRET), mask=lead(live, FLIP) & trail(mask_c, FLIP))


@kernel
def causal_dgrad(
    du_ptr, w_ptr, index_ptr, starts_ptr, dnext_ptr, dx_ptr, dstate_ptr,
    N, C, L, sequences, tiles,
    syn, syc, syt, swc, swt, sxn, sxc, sxt, ssn, ssc, sst, snn, snc, snt,
    T: tl.constexpr, DSTATE: tl.constexpr, DNEXT: tl.constexpr, INDEXED: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, READ: tl.constexpr, W_VEC: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
    COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx, and with DSTATE the gradient of the states, from the gradient du of the activation's argument.

        dx[n, c, j] = sum over t of w[c, t] * du[n, c, j + (T - 1) - t]

    Args:
        dnext_ptr: if DNEXT, the gradient of the next states, which is added to that of what they are a copy of.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    snc = snc.to(OFFSET)
    if UNIT == "c":
        C = multiple(C, VEC)
    elif UNIT == "p":
        L = multiple(L, VEC)
    sxn, sxc, sxt = hinted(sxn, sxc, sxt, UNIT, VEC, OFFSET)
    syn, syc, syt = hinted(syn, syc, syt, UNIT, VEC, OFFSET)
    if tl.program_id(0) < tiles:
        write_input_gradients(
            tl.program_id(0), du_ptr, w_ptr, index_ptr, starts_ptr, dnext_ptr, dx_ptr, N, C, L, sequences,
            syn, syc, syt, swc, swt, sxn, sxc, sxt, snn, snc, snt,
            T, DNEXT, INDEXED, READ, W_VEC, WIDTH, OFFSET, ACC, INTERPRET, FLIP, COLUMNS, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    elif DSTATE:
        write_state_gradients(
            tl.program_id(0) - tiles, du_ptr, w_ptr, starts_ptr, dnext_ptr, dstate_ptr, C, L, sequences,
            syn, syc, syt, swc, swt, ssn, ssc, sst, snn, snc, snt,
            T, DNEXT, INDEXED, W_VEC, WIDTH, OFFSET, ACC, INTERPRET, FLIP, WINDOW, BLOCK_C,
        )  # fmt: skip


@kernel
def causal_step(
    x_ptr, w_ptr, b_ptr, y_ptr, state_ptr, seen_ptr, slots_ptr,
    C, L, H,  # H: times that a state holds, T - 1 at least
    sxn, sxc, sxt, swc, swt, sb, syn, syc, syt, ssn, ssc, sst,
    T: tl.constexpr, SEEN: tl.constexpr, SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    X_UNIT: tl.constexpr, X_VEC: tl.constexpr, S_UNIT: tl.constexpr, S_VEC: tl.constexpr,  # whether channels are contiguous
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Decodes: writes the L times of y that follow a state, and puts x's times into the state, whose oldest leave it.

    A program computes one image and BLOCK_C channels. It reads all that it needs of the state before it writes there.

    Args:
        seen_ptr: if SEEN, how many times each image has seen; then its state is a ring, in which time i is at i % H.
        slots_ptr: if SLOTS, which state each image has; an image with a negative one has none, and its y is zero.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    C = multiple(multiple(C, X_VEC), S_VEC)
    sxc = 1 if X_UNIT else sxc.to(OFFSET)
    syc = 1 if X_UNIT else syc.to(OFFSET)
    ssc = 1 if S_UNIT else ssc.to(OFFSET)
    sxt = multiple(sxt, X_VEC).to(OFFSET)
    syt = multiple(syt, X_VEC).to(OFFSET)
    sst = multiple(sst, S_VEC).to(OFFSET)
    tiles_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    slot = tl.load(slots_ptr + n).to(tl.int32) if SLOTS else n
    # What the state's times are counted from: the ring's next place, or its end.
    past = (tl.load(seen_ptr + n) % H).to(tl.int32) + H if SEEN else H
    xp = x_ptr + n.to(OFFSET) * multiple(sxn, X_VEC)
    yp = y_ptr + n.to(OFFSET) * multiple(syn, X_VEC)
    sp = state_ptr + slot.to(OFFSET) * multiple(ssn, S_VEC)
    there = mask_c & (slot >= 0)
    for j in tl.range(0, L):
        acc = tl.zeros((BLOCK_C,), dtype=ACC)
        for t in tl.static_range(T):
            at = j - (T - 1) + t
            tap = tl.load(w_ptr + c * swc + t * swt, mask=mask_c, other=0.0).to(ACC)
            v = tl.load(xp + at * sxt + c * sxc, mask=mask_c & (at >= 0), other=0.0)
            before = tl.load(sp + (past + at) % H * sst + c * ssc, mask=there & (at < 0), other=0.0)
            v = tl.where(at >= 0, v, before).to(ACC)
            acc = v * tap if t == 0 else acc + v * tap
        if HAS_BIAS:
            acc += tl.load(b_ptr + c * sb, mask=mask_c, other=0.0).to(ACC)
        acc = tl.where(slot >= 0, activated(acc, ACTIVATION, 0.0), 0.0)
        tl.store(yp + j * syt + c * syc, rounded(acc, y_ptr.dtype.element_ty, INTERPRET), mask=mask_c)
    i = tl.arange(0, WINDOW)
    if SEEN:
        from_x = L - 1 - (past + L - 1 - i) % H  # the last time of x whose place in the ring is i
        kept = from_x < 0
    else:
        from_x = i + L - H
        kept = from_x < 0
    row = (i < H)[:, None] & there[None, :]
    new = tl.load(xp + (from_x[:, None] * sxt + c[None, :] * sxc), mask=row & (kept == 0)[:, None], other=0.0)
    if not SEEN:
        moved = tl.load(sp + ((i + L)[:, None] * sst + c[None, :] * ssc), mask=row & kept[:, None], other=0.0)
        new = tl.where(kept[:, None], moved, new)
        kept = kept & False
    tl.debug_barrier()  # a thread may write what another one reads
    tl.store(sp + (i[:, None] * sst + c[None, :] * ssc), new, mask=row & (kept == 0)[:, None])
