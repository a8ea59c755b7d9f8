"""Device functions that the kernels share: tile orientation, dgrad phases, decoding of pixels, products, rounding.

A tile of an operand has a pixel axis and a channel axis. Where channels are contiguous in memory, the tile is
[pixels, channels]. Where pixels are contiguous (torch's default layout), it is transposed to [channels, pixels], which is
called FLIP, so that neighbouring threads still access neighbouring addresses. `lead` and `trail` broadcast a vector along
the pixel axis and the channel axis of either orientation, so that each kernel is written once.

Geometry is passed as three scalars per parameter, one for each dimension. Dimensions before `3 - RANK` have extent one and
are skipped. Tuple arguments are not used, because Triton 3.6 and 3.7 specialise their elements on being 1 or divisible by 16
whatever `do_not_specialize` says, which would compile a kernel anew for nearly every layer.
"""

import functools
import inspect

import triton
import triton.language as tl

# The FLIP of a tile of addresses whose channels are not contiguous. Its pixels mostly are contiguous, but not across the ends
# of rows or between the phases of a strided dgrad. So the compiler must not be told that they are: Triton 3.9 would compute the
# second of two neighbouring addresses from the first. For a tile without a contiguous axis, Triton 3.6 assigns neighbouring
# threads along the first axis, and later versions along the last. APART puts the pixels on that axis, so that accesses
# coalesce, and `turned` transposes the tile after the load or before the store. Kernels hand it to the functions below: if one
# of those read a global, a kernel's key in Triton's cache would depend on which kernel is hashed first.
APART = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


def kernel(fn, jit=triton.jit):
    """Applies `triton.jit`, or Gluon's, to a kernel that is launched, without specialising its runtime integers."""
    return jit(fn, do_not_specialize=_integers(fn))


@functools.cache
def integers(jitted):
    """Returns the names of a kernel's runtime integers in order: arguments but pointers, tensor descriptors and constexprs."""
    return _integers(jitted.fn)


def _integers(fn):
    parameters = inspect.signature(fn).parameters.items()
    return tuple(n for n, p in parameters if p.annotation is not tl.constexpr and not n.endswith(("_ptr", "_desc")))


@triton.jit
def lead(v, FLIP: tl.constexpr):
    """Broadcasts v along the pixel axis, which is the first axis of the unflipped tile."""
    return v[None, :] if FLIP else v[:, None]


@triton.jit
def trail(v, FLIP: tl.constexpr):
    """Broadcasts v along the channel axis, which is the second axis of the unflipped tile."""
    return v[:, None] if FLIP else v[None, :]


@triton.jit
def turned(tile, FROM: tl.constexpr, TO: tl.constexpr):
    """Returns a tile built with FLIP=FROM in the orientation of FLIP=TO, transposed if they differ."""
    return tile if FROM == TO else tile.T


@triton.jit
def apart(t, A: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr):
    """Returns the COUNT slices [A, B] of t [A, B, COUNT], where COUNT is a power of two up to 8."""
    if COUNT == 1:
        slices = (tl.reshape(t, (A, B)),)
    elif COUNT == 2:
        slices = tl.split(t)
    else:
        even, odd = tl.split(tl.reshape(t, (A, B, COUNT // 2, 2)))
        evens = apart(even, A, B, COUNT // 2)
        odds = apart(odd, A, B, COUNT // 2)
        if COUNT == 4:
            slices = (evens[0], odds[0], evens[1], odds[1])
        else:
            slices = (evens[0], odds[0], evens[1], odds[1], evens[2], odds[2], evens[3], odds[3])
    return slices


@triton.jit
def together(slices, A: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr):
    """Returns COUNT slices [A, B] stacked as [A, B, COUNT], the inverse of `apart`."""
    if COUNT == 1:
        t = tl.reshape(slices[0], (A, B, 1))
    elif COUNT == 2:
        t = tl.join(slices[0], slices[1])
    else:
        even = together(slices[0::2], A, B, COUNT // 2)
        odd = together(slices[1::2], A, B, COUNT // 2)
        t = tl.reshape(tl.join(even, odd), (A, B, COUNT))
    return t


@triton.jit
def inside(i, extent):
    return (i >= 0) & (i < extent)


@triton.jit
def found_at(i, extent, BORDER: tl.constexpr):
    """Returns the coordinate in [0, extent) whose element stands at coordinate i of a dimension, as torch's padding modes say.

    The reflected input is larger than its padding, and the circular one at least as large, so i is one step away from it.
    """
    if BORDER == "reflect":
        return nearest_zero(i, -i, 2 * (extent - 1) - i)
    elif BORDER == "replicate":
        return tl.minimum(tl.maximum(i, 0), extent - 1)
    elif BORDER == "circular":
        return nearest_zero(i, i + extent, i - extent)
    else:
        return i


@triton.jit
def nearest_zero(a, b, c):
    """Returns the least of three numbers that is not negative, of which there must be one.

    Without a sign, negative numbers are the largest. So it takes two instructions, where comparing with the ends takes four.
    """
    least = tl.minimum(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True))
    return tl.minimum(least, c.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def outside_bits(h, step, extent, BACKWARD: tl.constexpr, FIELD: tl.constexpr):
    """Returns FIELD bits. Bit t is set if tap t falls outside the input: h + t*step (BACKWARD: h - t*step) not in [0, extent).

    The taps inside form an interval [low, high). Two divisions of non-negative numbers find it, whatever FIELD is.
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
def outside_word(bits, h, X, D, gcds, BORDERS, TRANSPOSED: tl.constexpr, RANK: tl.constexpr, FIELD: tl.constexpr):
    """Returns `bits` with the bits of `outside_bits` set: FIELD bits per dimension, the last dimension's lowest.

    BORDERS: per dimension, what a read beyond x finds; if it is not zeros, no tap is outside.
    """
    for d in tl.static_range(3 - RANK, 3):
        if BORDERS[d] == "zeros":
            step = D[d] // gcds[d] if TRANSPOSED else D[d]
            bits |= outside_bits(h[d], step, X[d], TRANSPOSED, FIELD) << ((2 - d) * FIELD)
    return bits


@triton.jit
def tap_word(tap, RANK: tl.constexpr, FIELD: tl.constexpr):
    """Returns the mask that selects a tap's bits in the word of `outside_word`: one bit per dimension."""
    word = 1 << tap[2]
    if RANK >= 2:
        word |= (1 << FIELD) << tap[1]
    if RANK == 3:
        word |= (1 << (2 * FIELD)) << tap[0]
    return word


@triton.jit
def multiple(s, VEC: tl.constexpr):
    """Returns s, which the host knows to be a multiple of VEC, in a form from which the compiler can tell."""
    return s // VEC * VEC


@triton.jit
def reciprocal(d):
    """Returns 2^31 / d rounded up, for `quotient`. d is from 1 to 2^15."""
    return (2147483647 + d.to(tl.uint32)) // d.to(tl.uint32)


@triton.jit
def quotient(n, by, RUN: tl.constexpr):
    """Returns n // d by a multiplication, for 0 <= n <= 2^16 and by = reciprocal(d). n is the same for RUN neighbours.

    It is exact: by is (2^31 + e) / d with 0 <= e < d, so n * by / 2^31 exceeds n / d by n*e / (d * 2^31), less than 1 / d.
    """
    if RUN == 1:
        return tl.umulhi(n.to(tl.uint32) * 2, by).to(tl.int32)
    # In this form the compiler can tell that neighbours have the same quotient. With umulhi it cannot.
    return (n.to(tl.int64) * by.to(tl.int64) >> 31).to(tl.int32)


@triton.jit
def phase(index, taps, stride, dilation, padding, gcd, extent, TRANSPOSED: tl.constexpr):
    """Returns (taps, first tap, first input coordinate, outputs, first output) of phase `index` in one dimension.

    fprop has one phase: output j reads coordinate j*stride - padding + i*dilation at every tap i.

    dgrad has `stride` phases. Output a + j*stride uses tap t only if a + padding - t*dilation is a multiple of the stride.
    With g = gcd(stride, dilation), a phase uses either no tap, or every (stride/g)-th tap from some t0 < stride/g on. Phases
    are numbered by t0, which puts those with most taps first and needs no modular inverse.

    Numerators are never negative, so division may truncate. The division that gives the input coordinate is exact.
    """
    if TRANSPOSED:
        step = stride // gcd
        t0 = index % step
        without = index // step  # 0, or a residue modulo g that no tap reaches
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
    """Returns (image, coordinate per dimension) of a pixel number. The last dimension varies fastest."""
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
    pid, step, N, Y, T, S, D, P, gcds, sxn, sx, syn, sy,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Returns the pixels that program `pid` writes. Tiles of a phase vary fastest, and phases with more taps come first.

    Args:
        step: pixels from one tile to the next, at most BLOCK_M.
    Returns:
        past: whether the tile is past its phase's end. Every phase is given as many tiles as the largest one needs.
        live: mask of the pixels that exist [BLOCK_M].
        x_offset: offset in x at the phase's first tap [BLOCK_M].
        y_offset: offset in y [BLOCK_M].
        n_taps, t_first: per dimension, the phase's number of taps and its first tap.
        h: per dimension, the coordinate in x at the first tap [BLOCK_M].
    """
    most = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        most *= tl.cdiv(Y[d], S[d]) if TRANSPOSED else Y[d]
    tiles = tl.cdiv(most, step).to(tl.int32)
    m = (pid % tiles).to(OFFSET) * step + tl.arange(0, BLOCK_M)
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
        J = (tl.maximum(outputs, 1),) + J  # a phase without outputs is past its end; avoids division by zero
        a_first = (a,) + a_first
    past = (pid % tiles).to(OFFSET) * step >= pixels
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
def flat_pixels(pid, N, X, sn, RANK: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, PIXELS: tl.constexpr):
    """Returns the pixels of tile `pid` in a tensor with extents X, all of whose pixels lie one after the other.

    PIXELS is the vector width along them. It divides the pixels of an image, and sn, the stride of images.

    Returns:
        live: mask of the pixels that exist [BLOCK_M].
        offset: offset of the pixels [BLOCK_M].
    """
    plane = X[2]
    for d in tl.static_range(3 - RANK, 2):
        plane *= X[d]
    plane = multiple(plane, PIXELS)
    m = pid.to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m < N * plane.to(OFFSET), m // plane * multiple(sn, PIXELS) + m % plane


@triton.jit
def met_frames(live, n_taps, t_first, h, x_offset, X0, S0, D0, g0, sx0):
    """Drops the first dimension's taps that read outside the input for every pixel of a 3-D dgrad's tile.

    A tile seldom spans several frames, and a pixel of an outer frame uses fewer taps. A dgrad of 3 taps that reads 4 frames
    and writes 6 (no padding) skips a third of the taps. In fprop this would be wrong: padding times an infinite weight must
    give NaN.

    Returns `n_taps`, `t_first`, `h` and `x_offset`, as `written_pixels` does.
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
    """Returns a split's first BLOCK_P pixels of dy, and what `advance` needs to step to the next BLOCK_P without dividing.

    Args:
        chunk: pixels per split.
        B: BLOCK_P in the mixed radix of dy's extents, as digits (B0, B1, B2, Bn) of coordinates and images.
        first: per dimension, the coordinate in x that output 0 reads.
    Returns:
        left: the split's number of pixels.
        xo, yo: offsets in x and dy [BLOCK_P].
        h: per dimension, the coordinate in x [BLOCK_P].
        x_step, y_step, end, carry_x, carry_y: for `advance`.
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
    # A coordinate that passes its end goes back to its start and carries one into the next outer coordinate. carry_x and
    # carry_y are what that adds to the offsets.
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
    """Returns offsets and coordinates BLOCK_P pixels further, by mixed-radix addition, last dimension first."""
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
def overhanging(extent, shift, read, covered):
    """Returns the coordinate in dy at which boxes begin that together cover more than its extent in a dimension.

    They overhang the end of the extent if x, which is read at coordinates that are larger by `shift`, has ended there too; else
    its start. So what they have beyond dy is zero in both operands, where the planner lets them overhang at all.

    Args:
        read: the extent of x.
        covered: pixels that the boxes cover.
    """
    return tl.where(extent + shift >= read, 0, extent - covered)


@triton.jit
def part_of_sum(
    N, C, Y, chunk, syc, RANK: tl.constexpr, Y_UNIT: tl.constexpr, Y_VEC: tl.constexpr, P_VEC: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Returns the part of a sum over the pixels of y [N, C, *Y] that this program computes.

    Args:
        chunk: pixels per split.
        Y_VEC, P_VEC: vector widths along the contiguous axis, and along the pixels; P_VEC is 1 if channels are contiguous.
    Returns:
        split: the split. Tiles of channels vary fastest.
        c, mask_c, channel: the channels, which of them exist, and their offsets [BLOCK_C].
        low, left: the split's first pixel and its number of pixels.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < multiple(C, Y_VEC // P_VEC)
    pixels = N.to(OFFSET)
    for d in tl.static_range(3 - RANK, 3):
        pixels *= Y[d]
    low = split.to(OFFSET) * multiple(chunk, P_VEC)
    left = multiple(tl.minimum(chunk, pixels - low).to(tl.int32), P_VEC)
    channel = c if Y_UNIT else c * multiple(syc, Y_VEC).to(OFFSET)
    return split, c, mask_c, low, left, channel


@triton.jit
def pixels_of_sum(
    start, low, left, Y, syn, sy, RANK: tl.constexpr, Y_VEC: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Returns (offset, live) of BLOCK_P pixels from number `start` of a split on (`part_of_sum`): which of them are in it."""
    p = start + tl.arange(0, BLOCK_P)
    image, j = decode(low + p, Y, RANK)
    offset = image.to(OFFSET) * multiple(syn, Y_VEC)
    for d in tl.static_range(3 - RANK, 3):
        offset += j[d].to(OFFSET) * sy[d]
    return offset, p < left


@triton.jit
def write_tap(
    out_ptr, acc, k, c, K, C, swk, swc, FLIP: tl.constexpr, W_UNIT: tl.constexpr, W_VEC: tl.constexpr, INTERPRET: tl.constexpr
):
    """Writes one tap of a weight gradient, the products acc [BLOCK_K, BLOCK_C], to output channels k and input channels c.

    Args:
        out_ptr: pointer to the tap's first element.
        K, C: the channels that exist.
        swk, swc: strides of output and input channels.
        FLIP: the orientation in which neighbouring threads store neighbouring input channels. If these lie apart, their stride
            is still less, mostly, than that of output channels.
        W_UNIT: whether swc is 1.
        W_VEC: the vector width along input channels.
    """
    row = k * multiple(swk, W_VEC).to(tl.int64)
    column = c if W_UNIT else c * swc.to(tl.int64)
    mask = trail(k < K, FLIP) & lead(c < multiple(C, W_VEC), FLIP)
    dw = turned(rounded(acc, out_ptr.dtype.element_ty, INTERPRET), True, FLIP)
    tl.store(out_ptr + (trail(row, FLIP) + lead(column, FLIP)), dw, mask=mask)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Returns acc + a @ b. PRECISION is tl.dot's input_precision for fp32 operands, or "bf16x6".

    "bf16x6" cuts each operand into three bf16 pieces. Of their nine products it computes the six that matter to fp32, smallest
    first. They are summed in an accumulator of their own: tensor cores truncate when they add, and so the error is relative to
    this step's sum, not to the whole accumulator.
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
    """Returns acc + a @ b.

    Hopper's tensor cores add products of fp8 with some 14 bits, so each step's sum is added to acc as fp32. That is written
    here, and not left to tl.dot (max_num_imprecise_acc), whose addition touches registers that wgmma may still work on; ptxas
    then puts a wait in, but PTX does not promise that.

    The interpreter's tl.dot multiplies the raw bits of bf16, and takes the NaN of fp8 for a number, so it gets operands widened
    to fp32.
    """
    if a.dtype == tl.float8e4nv:
        if INTERPRET:
            return tl.dot(from_fp8(a), from_fp8(b), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        else:
            return acc + tl.dot(a, b, out_dtype=acc.dtype)
    else:
        if INTERPRET and a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def from_fp8(v):
    """Returns e4m3 numbers as fp32, in the interpreter, which converts all but NaN."""
    return tl.where((v.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), v.to(tl.float32))


@triton.jit
def pieces(v, INTERPRET: tl.constexpr):
    """Returns (high, middle, low), three bf16 whose sum is the fp32 v. The sum is exact where |v| >= 2^-110.

    The high piece is v truncated to 8 bits. Truncated, because rounding could make a finite number infinite. The middle piece
    is the next 8 bits, rounded, so that middle times low, which `product` leaves out, has either sign. The low piece is what
    remains.

    If v is infinite or NaN it must be multiplied by the other operand once, and never by a zero piece of it, since infinity
    times zero is NaN. So it becomes the low piece, which is multiplied by high pieces only. Its own high piece is 1 or -1, so
    that infinity times infinity is computed too.
    """
    finite = tl.abs(v) < float("inf")
    bits = v.to(tl.uint32, bitcast=True)
    high = (bits & tl.where(finite, 0xFFFF0000, 0xBF800000).to(tl.uint32)).to(tl.float32, bitcast=True)
    rest = v - high
    bits = rest.to(tl.uint32, bitcast=True) + 0x8000
    middle = (bits & tl.where(finite, 0xFFFF0000, 0).to(tl.uint32)).to(tl.float32, bitcast=True)
    low = rest - middle
    if INTERPRET:  # pieces stay fp32, with values that bf16 can hold
        return high, middle, nearest_bf16(low)
    else:
        return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def nearest_bf16(v):
    """Returns v rounded to the nearest bf16, ties to even, still as fp32."""
    bits = v.to(tl.uint32, bitcast=True)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(v == v, kept, v)


@triton.jit
def rounded(acc, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Returns acc in the output's dtype, rounded to nearest even.

    The interpreter's conversion from fp32 to bf16 truncates, and is wrong below 2^-126, so there the bits are rounded here.
    """
    if INTERPRET and dtype == tl.bfloat16:
        return (nearest_bf16(acc).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return acc.to(dtype)
