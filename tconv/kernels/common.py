"""Device helpers that every kernel shares: tile orientation, stride phases, pixel decoding, rounding.

A two-dimensional tile has a pixel axis and a channel axis. Where channels are contiguous in memory the tile is
[pixels, channels]; where pixels are (the default layout) it is turned round, `FLIP`, so that neighbouring threads
still read neighbouring addresses. `lead` and `trail` spread a vector over the first and the second axis of the
unflipped tile, so that no kernel is written twice.

Geometry travels as one scalar per dimension, always three of them; dimensions before `3 - RANK` have extent one and are
skipped. Scalars, because Triton 3.6 and 3.7 specialise the elements of a tuple argument on being 1 or divisible by 16
whatever `do_not_specialize` says, which would compile anew for nearly every layer.
"""

import functools
import inspect

import triton
import triton.language as tl

# FLIP for a tile of addresses whose channels are not contiguous. Its pixels mostly are, but not all: across the ends of rows
# and between the phases of a strided dgrad they are not, so the compiler must not be told so (Triton 3.9 computes the second
# of two neighbours' addresses from the first). Without a contiguous axis, Triton 3.6 gives neighbouring threads the first axis
# of the tile and later versions the last one. The pixels are put there, and the loaded or stored tile is `turned`.
APART = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


def kernel(fn):
    """`triton.jit` for a kernel that is launched: none of its integers is specialised."""
    return triton.jit(fn, do_not_specialize=_integers(fn))


@functools.cache
def integers(jitted):
    """Names of a kernel's runtime integers, in order: neither pointer, nor tensor descriptor, nor compile-time constant."""
    return _integers(jitted.fn)


def _integers(fn):
    parameters = inspect.signature(fn).parameters.items()
    return tuple(n for n, p in parameters if p.annotation is not tl.constexpr and not n.endswith(("_ptr", "_desc")))


@triton.jit
def lead(v, FLIP: tl.constexpr):
    """v as the first axis of the unflipped tile."""
    return v[None, :] if FLIP else v[:, None]


@triton.jit
def trail(v, FLIP: tl.constexpr):
    """v as the second axis of the unflipped tile."""
    return v[:, None] if FLIP else v[None, :]


@triton.jit
def turned(tile, FROM: tl.constexpr, TO: tl.constexpr):
    """A tile that was built with FLIP=FROM, as one with FLIP=TO."""
    return tile if FROM == TO else tile.T


@triton.jit
def inside(i, extent):
    return (i >= 0) & (i < extent)


@triton.jit
def outside_bits(h, step, extent, BACKWARD: tl.constexpr, FIELD: tl.constexpr):
    """FIELD bits, bit t set where tap t falls outside: h + t*step (h - t*step if BACKWARD) not in [0, extent).

    The taps inside are an interval [low, high), so two divisions of non-negative numbers do, whatever FIELD is.
    """
    if BACKWARD:
        low = (tl.maximum(h - extent + 1, 0) + step - 1) // step
        high = tl.where(h < 0, 0, tl.maximum(h, 0) // step + 1)
    else:
        low = (tl.maximum(-h, 0) + step - 1) // step
        high = (tl.maximum(extent - h, 0) + step - 1) // step
    ALL: tl.constexpr = -1 if FIELD == 32 else (1 << FIELD) - 1
    below = tl.where(low >= FIELD, ALL, (1 << tl.minimum(low, FIELD - 1)) - 1)
    under = tl.where(high >= FIELD, ALL, (1 << tl.minimum(high, FIELD - 1)) - 1)
    return below | (ALL ^ under)


@triton.jit
def outside_word(bits, h, X, D, gcds, TRANSPOSED: tl.constexpr, RANK: tl.constexpr, FIELD: tl.constexpr):
    """bits, and set in it, FIELD bits per dimension and the last dimension's lowest, the taps that fall outside."""
    for d in tl.static_range(3 - RANK, 3):
        step = D[d] // gcds[d] if TRANSPOSED else D[d]
        bits |= outside_bits(h[d], step, X[d], TRANSPOSED, FIELD) << ((2 - d) * FIELD)
    return bits


@triton.jit
def tap_word(tap, RANK: tl.constexpr, FIELD: tl.constexpr):
    """The bits that a tap has in such a word."""
    word = 1 << tap[2]
    if RANK >= 2:
        word |= (1 << FIELD) << tap[1]
    if RANK == 3:
        word |= (1 << (2 * FIELD)) << tap[0]
    return word


@triton.jit
def multiple(s, VEC: tl.constexpr):
    """s, known on the host to be a multiple of VEC, in a form from which the compiler sees it too."""
    return s // VEC * VEC


@triton.jit
def reciprocal(d):
    """What `quotient` needs of a divisor from 1 to 2^15: 2^31 / d, rounded up."""
    return (2147483647 + d.to(tl.uint32)) // d.to(tl.uint32)


@triton.jit
def quotient(n, by, RUN: tl.constexpr):
    """n // d for 0 <= n <= 2^16 and by = reciprocal(d), by a multiplication; n is the same for RUN neighbours.

    by is (2^31 + e) / d with 0 <= e < d, so n * by / 2^31 exceeds n / d by n*e / (d * 2^31), less than 1 / d.
    """
    if RUN == 1:
        return tl.umulhi(n.to(tl.uint32) * 2, by).to(tl.int32)
    # Of this form the compiler sees that neighbours have the same quotient, of umulhi it does not.
    return (n.to(tl.int64) * by.to(tl.int64) >> 31).to(tl.int32)


@triton.jit
def phase(index, taps, stride, dilation, padding, gcd, extent, TRANSPOSED: tl.constexpr):
    """One dimension's (taps, first tap, first input coordinate, outputs, first output) of phase `index`.

    Forward, one phase: in = j*stride - padding + i*dilation for every tap i and output j. Transposed, `stride` phases:
    output a + j*stride meets tap t where a + padding - t*dilation is a multiple of the stride. With g = gcd(stride,
    dilation) a phase meets no tap, or every (stride/g)-th one from t0 < stride/g on; numbering phases by that t0 puts
    those with most taps first and needs no modular inverse. Numerators are kept from being negative, so truncating
    division does; that of the input coordinate is exact.
    """
    if TRANSPOSED:
        step = stride // gcd
        t0 = index % step
        without = index // step  # 0, or the residue modulo g that no tap reaches
        a = (t0 * dilation + without + stride - padding % stride) % stride
        n = tl.where(without == 0, (tl.maximum(taps - t0, 0) + step - 1) // step, 0)
        first = (a + padding - t0 * dilation) // stride
        outputs = (extent - a + stride - 1) // stride
    else:
        a = index * 0
        t0 = a
        n = taps
        first = -padding
        outputs = extent
    return n, t0, first, outputs, a


@triton.jit
def decode(m, extents, RANK: tl.constexpr):
    """Pixel number -> (image, coordinate per dimension); the last dimension runs fastest."""
    coords = ()
    for i in tl.static_range(3):
        if i < RANK:
            coords = ((m % extents[2 - i]).to(tl.int32),) + coords
            m = m // extents[2 - i]
        else:
            coords = (0,) + coords
    return m, coords


@triton.jit
def written_pixels(
    pid, N, Y, T, S, D, P, gcds, sxn, sx, syn, sy,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The pixels that program `pid` writes: tiles of a phase run fastest, phases with more taps come first.

    Returns whether the tile lies past its phase's end; then per pixel: live, offset read at the phase's first tap, offset
    written; then per dimension: taps met, the first of them, the coordinate read at it [BLOCK_M].
    """
    most = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        most *= tl.cdiv(Y[d], S[d]) if TRANSPOSED else Y[d]
    tiles = tl.cdiv(most, BLOCK_M).to(tl.int32)
    m = (pid % tiles).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = pid // tiles
    n_taps = ()
    t_first = ()
    x_first = ()
    J = ()
    a_first = ()
    pixels = N.to(OFFSET)
    for i in tl.static_range(3):
        if i < RANK:
            index = rest % S[2 - i]
            rest = rest // S[2 - i]
            n, t0, first, outputs, a = phase(index, T[2 - i], S[2 - i], D[2 - i], P[2 - i], gcds[2 - i], Y[2 - i], TRANSPOSED)
            pixels *= outputs
        else:
            n, t0, first, outputs, a = 1, 0, 0, 1, 0
        n_taps = (n,) + n_taps
        t_first = (t0,) + t_first
        x_first = (first,) + x_first
        J = (tl.maximum(outputs, 1),) + J  # a phase without outputs is past its end, and must not divide by zero
        a_first = (a,) + a_first
    past = (pid % tiles).to(OFFSET) * BLOCK_M >= pixels
    live = m < pixels
    image, j = decode(m, J, RANK)
    x_offset = image.to(OFFSET) * sxn
    y_offset = image.to(OFFSET) * syn
    h = ()
    for d in tl.static_range(3):
        if d >= 3 - RANK:
            if TRANSPOSED:
                hd = j[d] + x_first[d]
                y_offset += (j[d] * S[d] + a_first[d]).to(OFFSET) * sy[d]
            else:
                hd = j[d] * S[d] + x_first[d]
                y_offset += j[d].to(OFFSET) * sy[d]
            x_offset += hd.to(OFFSET) * sx[d]
            h = h + (hd,)
        else:
            h = h + (0,)
    return past, live, x_offset, y_offset, n_taps, t_first, h


@triton.jit
def met_frames(live, n_taps, t_first, h, x_offset, X0, S0, D0, g0, sx0):
    """What `written_pixels` says of a 3-D dgrad's tile, less the first dimension's taps that meet no frame for any pixel.

    A tile seldom leaves its frame, and of few frames the outer ones meet few taps: of a 3-tap filter over 4 frames without
    padding, which writes 6, a third of all. Forward this would hide an infinite weight's NaN, which padding owes it.
    """
    step = D0 // g0
    low = tl.min(tl.where(live, h[0], 2147483647), 0)
    high = tl.max(tl.where(live, h[0], -2147483648), 0)
    first = tl.cdiv(tl.maximum(low - X0 + 1, 0), step)
    end = tl.where(high < 0, 0, tl.minimum(high // step + 1, n_taps[0]))
    back = first * step
    x_offset -= back.to(x_offset.dtype) * sx0
    n_taps = (tl.maximum(end - first, 0), n_taps[1], n_taps[2])
    t_first = (t_first[0] + first * (S0 // g0), t_first[1], t_first[2])
    return n_taps, t_first, (h[0] - back, h[1], h[2]), x_offset


@triton.jit
def split_pixels(
    split, chunk, N, Y, S, B, first, sxn, sx, syn, sy, RANK: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The pixels of dy that a split owns, and how to go from BLOCK_P of them to the next without dividing.

    BLOCK_P is (Bn, B0, B1, B2) images and coordinates, B[3] = Bn; `first` is the coordinate of x that output 0 reads.
    Returns (pixels left, offset in x, offset in dy, coordinates in x [BLOCK_P] per dimension), then what `advance` needs.
    """
    pixels = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= Y[d]
    low = split.to(OFFSET) * chunk
    left = tl.minimum(chunk, pixels - low).to(tl.int32)  # low + chunk might not fit 32 bits
    image, j = decode(low + tl.arange(0, BLOCK_P), Y, RANK)
    xo = image.to(OFFSET) * sxn
    yo = image.to(OFFSET) * syn
    x_step = B[3].to(OFFSET) * sxn
    y_step = B[3].to(OFFSET) * syn
    # What a coordinate that runs over its end adds: back to its start, and one step of the digit before it.
    hop_x = sxn.to(OFFSET)
    hop_y = syn.to(OFFSET)
    h = ()
    end = ()
    carry_x = ()
    carry_y = ()
    for d in tl.static_range(3):
        if d >= 3 - RANK:
            hd = j[d] * S[d] + first[d]
            xo += hd.to(OFFSET) * sx[d]
            yo += j[d].to(OFFSET) * sy[d]
            x_step += (B[d] * S[d]).to(OFFSET) * sx[d]
            y_step += B[d].to(OFFSET) * sy[d]
            h = h + (hd,)
            end = end + (Y[d] * S[d] + first[d],)
            carry_x = carry_x + (hop_x - (Y[d] * S[d]).to(OFFSET) * sx[d],)
            carry_y = carry_y + (hop_y - Y[d].to(OFFSET) * sy[d],)
            hop_x = S[d].to(OFFSET) * sx[d]
            hop_y = sy[d]
        else:
            h = h + (0,)
            end = end + (0,)
            carry_x = carry_x + (0,)
            carry_y = carry_y + (0,)
    return left, xo, yo, h, x_step, y_step, end, carry_x, carry_y


@triton.jit
def advance(xo, yo, h, x_step, y_step, end, carry_x, carry_y, Y, S, B, RANK: tl.constexpr):
    """Offsets and coordinates BLOCK_P pixels on: addition in mixed radix, last dimension first."""
    xo += x_step
    yo += y_step
    h0, h1 = h[0], h[1]
    h2 = h[2] + B[2] * S[2]
    over = h2 >= end[2]
    h2 = tl.where(over, h2 - Y[2] * S[2], h2)
    xo += tl.where(over, carry_x[2], 0)
    yo += tl.where(over, carry_y[2], 0)
    if RANK >= 2:
        h1 += tl.where(over, (B[1] + 1) * S[1], B[1] * S[1])
        over = h1 >= end[1]
        h1 = tl.where(over, h1 - Y[1] * S[1], h1)
        xo += tl.where(over, carry_x[1], 0)
        yo += tl.where(over, carry_y[1], 0)
    if RANK == 3:
        h0 += tl.where(over, (B[0] + 1) * S[0], B[0] * S[0])
        over = h0 >= end[0]
        h0 = tl.where(over, h0 - Y[0] * S[0], h0)
        xo += tl.where(over, carry_x[0], 0)
        yo += tl.where(over, carry_y[0], 0)
    return xo, yo, (h0, h1, h2)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b. PRECISION is what tl.dot is told of fp32 operands, or "bf16x6".

    "bf16x6": of nine products of three pieces each, the six that matter to fp32, least first, in an accumulator of their own:
    what tensor cores cut off when they add is then of the size of this step's sum, not of all before it.
    """
    if PRECISION == "bf16x6":
        ah, am, al = pieces(a, INTERPRET)
        bh, bm, bl = pieces(b, INTERPRET)
        step = tl.zeros(acc.shape, dtype=tl.float32)
        step = dot(al, bh, step, "ieee", INTERPRET)
        step = dot(ah, bl, step, "ieee", INTERPRET)
        step = dot(am, bm, step, "ieee", INTERPRET)
        step = dot(am, bh, step, "ieee", INTERPRET)
        step = dot(ah, bm, step, "ieee", INTERPRET)
        return acc + dot(ah, bh, step, "ieee", INTERPRET)
    else:
        return dot(a, b, acc, PRECISION, INTERPRET)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b. The interpreter's dot multiplies the raw bits of bf16, so there they are widened first."""
    if INTERPRET and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def pieces(v, INTERPRET: tl.constexpr):
    """fp32 as a sum of three bf16: the 8 leading bits cut off, the next 8 rounded, the rest; exact where |v| >= 2^-110.

    Cut off, not rounded: nothing finite becomes infinite. Rounded, so that middle times low, which is left out, has either
    sign. What is not finite must meet the whole of the other factor, none of its zero pieces, once: it is the low piece, which
    meets the high ones only, and 1 or -1 the high one, so that infinity times infinity is met too.
    """
    finite = tl.abs(v) < float("inf")
    bits = v.to(tl.uint32, bitcast=True)
    high = (bits & tl.where(finite, 0xFFFF0000, 0xBF800000).to(tl.uint32)).to(tl.float32, bitcast=True)
    rest = v - high
    bits = rest.to(tl.uint32, bitcast=True) + 0x8000
    middle = (bits & tl.where(finite, 0xFFFF0000, 0).to(tl.uint32)).to(tl.float32, bitcast=True)
    low = rest - middle
    if INTERPRET:  # fp32 that bf16 would hold
        return high, middle, nearest_bf16(low)
    else:
        return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def nearest_bf16(v):
    """The bf16 nearest to v, to even, still in fp32."""
    bits = v.to(tl.uint32, bitcast=True)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(v == v, kept, v)


@triton.jit
def rounded(acc, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """acc in the output's type, to nearest even. The interpreter cuts fp32 to bf16 off, and gets what is smaller than 2^-126
    wrong, so there the bits are rounded and moved."""
    if INTERPRET and dtype == tl.bfloat16:
        return (nearest_bf16(acc).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return acc.to(dtype)
