"""Group normalisation and RMS normalisation over channels, each with an activation and padding, and their gradients.

    channel_moments      mean and squared deviations of each channel, over a chunk of an image's pixels
    finish_moments       mean and 1/deviation of each group of channels, from those
    normalise            y = activation((x - mean) / deviation * w + b), or of x / root mean square; zeros where y is padded
    normalise_gradient   the sums over pixels that the gradients need, or dx, or both
    finish_gradient      the gradients of w and b, and for groups the two means that dx needs

x is [N, P, C] where channels are contiguous (UNIT), else [N, C, P], without gaps; P counts the pixels of an image. y and dy are
the same with Q pixels: the extents Y, in which those of x, X, begin at B. Without padding P is Q. A sum over pixels is cut into
chunks of one image, which are added in a fixed order. So the same call gives the same bits, and an image does in any batch.
"""

import triton
import triton.language as tl

from tconv.kernels.common import decode, inside, kernel, lead, multiple, rounded, trail
from tconv.kernels.epilogue import activated, gradient, of_channels


@triton.jit
def part_of_image(C, P, chunk, chunks, C_VEC: tl.constexpr, P_VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the pixels and channels that this program takes. Tiles of channels vary fastest, then chunks.

    Returns:
        image, part: the image, and the number of the chunk, counted over all images.
        low, left: the chunk's first pixel and its number of pixels.
        c, mask_c: the channels, and which of them exist [BLOCK_C].
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    low = part % chunks * multiple(chunk, P_VEC)
    left = multiple(tl.minimum(chunk, P - low), P_VEC)
    return part // chunks, part, low, left, c, c < multiple(C, C_VEC)


@triton.jit
def tile_at(image, p, c, C, P, UNIT: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr, OFFSET: tl.constexpr):
    """Returns the offsets of pixels p and channels c of an image with P pixels, [BLOCK_P, BLOCK_C], transposed if not UNIT."""
    C = multiple(C, C_VEC).to(OFFSET)
    P = multiple(P, P_VEC).to(OFFSET)
    if UNIT:
        tile = lead(p * C, False) + trail(c, False)
    else:
        tile = lead(p, True) + trail(c * P, True)
    return image * C * P + tile


@triton.jit
def unpadded(q, X, Y, B, RANK: tl.constexpr):
    """Returns the pixels of x at pixels q of y, and whether there are any."""
    _, j = decode(q, Y, RANK)
    pixel = q * 0
    exists = q >= 0
    for d in tl.static_range(3 - RANK, 3):
        h = j[d] - B[d]
        exists &= inside(h, X[d])
        pixel = pixel * X[d] + h
    return pixel, exists


@triton.jit
def padded(p, X, Y, B, RANK: tl.constexpr):
    """Returns the pixels of y at pixels p of x."""
    _, j = decode(p, X, RANK)
    pixel = p * 0
    for d in tl.static_range(3 - RANK, 3):
        pixel = pixel * Y[d] + j[d] + B[d]
    return pixel


@triton.jit
def of_groups(ptr, image, c, mask_c, C, G, FLIP: tl.constexpr):
    """Returns a number per channel, that of its group: ptr[image, group]."""
    return trail(tl.load(ptr + image * G + c // (C // G), mask=mask_c, other=0.0), FLIP)


@triton.jit
def root_mean_square(v, C, EPS: tl.constexpr, FLIP: tl.constexpr):
    """Returns one over the root of the mean of v*v over the channels, per pixel."""
    total = tl.sum(v * v, axis=0 if FLIP else 1)
    return lead(1 / tl.sqrt(total / C + EPS), FLIP)


@kernel
def channel_moments(
    x_ptr, out_ptr, C, P, chunk, chunks,
    UNIT: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes out[image, chunk, 0, c], the mean of the chunk's pixels, and out[image, chunk, 1, c], the sum of (x - mean)^2.

    Each place of a tile keeps its own mean and deviations, by Welford's formulas; the places are then combined about the mean
    of all. A sum of squares less the square of a sum would lose the digits that a large mean takes.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLIP: tl.constexpr = not UNIT
    image, part, low, left, c, mask_c = part_of_image(C, P, chunk, chunks, C_VEC, P_VEC, BLOCK_C)
    if FLIP:
        mean = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    else:
        mean = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    squares = mean
    seen = tl.zeros((1, 1), dtype=ACC)
    r = tl.arange(0, BLOCK_P)
    for start in tl.range(0, left, BLOCK_P):
        live = lead(start + r < left, FLIP)
        tile = tile_at(image, low + start + r, c, C, P, UNIT, C_VEC, P_VEC, OFFSET)
        v = tl.load(x_ptr + tile, mask=live & trail(mask_c, FLIP), other=0.0).to(ACC)
        seen += 1
        d = tl.where(live, v - mean, 0.0)
        mean += d * (1 / seen)
        squares += d * (v - mean)
    count = lead(((left - r + BLOCK_P - 1) // BLOCK_P).to(ACC), FLIP)
    count = tl.where(count > 0, count, 0.0)
    AXIS: tl.constexpr = 1 if FLIP else 0
    whole = tl.sum(mean * count, axis=AXIS) / left
    whole += tl.sum((mean - trail(whole, FLIP)) * count, axis=AXIS) / left  # what rounding to a large mean has lost
    d = mean - trail(whole, FLIP)
    squares = tl.sum(squares + count * d * d, axis=AXIS)
    out = out_ptr + part.to(tl.int64) * 2 * C + c
    tl.store(out, whole, mask=mask_c)
    tl.store(out + C, squares, mask=mask_c)


@kernel
def finish_moments(
    parts_ptr, stats_ptr, programs, C, G, P, chunk, chunks, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the mean and 1/sqrt(variance + EPS) of a group, stats[0, image, group] and stats[1, image, group]."""
    pid = tl.program_id(0)
    image = pid // G
    own = C // G
    parts = parts_ptr + image.to(tl.int64) * chunks * 2 * C + pid % G * own
    numbers = own.to(ACC) * P
    e = tl.arange(0, BLOCK)
    origin = tl.load(parts)  # near the mean, from which what is summed is small
    mean = tl.zeros((BLOCK,), dtype=ACC)
    for start in tl.range(0, chunks * own, BLOCK):
        i = (start + e) // own
        at = i.to(tl.int64) * 2 * C + (start + e) % own
        count = tl.where(i < chunks, tl.minimum(chunk, P - i * chunk), 0)
        mean += (tl.load(parts + at, mask=i < chunks, other=0.0) - origin) * count
    mean = origin + tl.sum(mean) / numbers
    squares = tl.zeros((BLOCK,), dtype=ACC)
    for start in tl.range(0, chunks * own, BLOCK):
        i = (start + e) // own
        at = i.to(tl.int64) * 2 * C + (start + e) % own
        count = tl.where(i < chunks, tl.minimum(chunk, P - i * chunk), 0)
        d = tl.load(parts + at, mask=i < chunks, other=0.0) - mean
        squares += tl.load(parts + at + C, mask=i < chunks, other=0.0) + count * d * d
    tl.store(stats_ptr + pid, mean)
    tl.store(stats_ptr + programs + pid, 1 / tl.sqrt(tl.sum(squares) / numbers + EPS))


@kernel
def normalise(
    x_ptr, stats_ptr, w_ptr, b_ptr, y_ptr, groups, C, G, P, Q, chunk, chunks, X0, X1, X2, Y0, Y1, Y2, B0, B1, B2,
    RMS: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PADDED: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr,
    Q_VEC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes a tile of y, whose chunks are of BLOCK_P pixels.

    Args:
        stats_ptr: what `finish_moments` wrote for these groups, of all images. With RMS a tile has all channels.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLIP: tl.constexpr = not UNIT
    image, _, low, left, c, mask_c = part_of_image(C, Q, chunk, chunks, C_VEC, Q_VEC, BLOCK_C)
    r = tl.arange(0, BLOCK_P)
    mask = lead(r < left, FLIP) & trail(mask_c, FLIP)
    written = tile_at(image, low + r, c, C, Q, UNIT, C_VEC, Q_VEC, OFFSET)
    if PADDED:
        p, exists = unpadded(low + r, (X0, X1, X2), (Y0, Y1, Y2), (B0, B1, B2), RANK)
        read = mask & lead(exists, FLIP)
        v = tl.load(x_ptr + tile_at(image, p, c, C, P, UNIT, C_VEC, 1, OFFSET), mask=read, other=0.0).to(ACC)
    else:
        v = tl.load(x_ptr + written, mask=mask, other=0.0).to(ACC)
    if RMS:
        v *= root_mean_square(v, C, EPS, FLIP)
    else:
        v -= of_groups(stats_ptr, image, c, mask_c, C, G, FLIP)
        v *= of_groups(stats_ptr + groups, image, c, mask_c, C, G, FLIP)
    if WEIGHT:
        v *= of_channels(w_ptr, c, mask_c, ACC, FLIP)
    if BIAS:
        v += of_channels(b_ptr, c, mask_c, ACC, FLIP)
    v = activated(v, ACTIVATION, 0.0)
    if PADDED:
        v = tl.where(read, v, 0.0)
    tl.store(y_ptr + written, rounded(v, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@kernel
def normalise_gradient(
    dy_ptr, x_ptr, stats_ptr, w_ptr, b_ptr, means_ptr, dx_ptr, out_ptr,
    groups, C, G, P, Q, chunk, chunks, X0, X1, X2, Y0, Y1, Y2, B0, B1, B2,
    RMS: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DX: tl.constexpr, SUMS: tl.constexpr,
    PADDED: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, C_VEC: tl.constexpr, P_VEC: tl.constexpr,
    Q_VEC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Passes over the pixels of a chunk of x and dy. With h for the normalised x and g for dy * activation'(h * w + b):

    SUMS    out[image, chunk, 0, c] gets the sum of g, out[image, chunk, 1, c] that of g * h.
    DX      dx gets (g * w - the mean of g * w - h * the mean of g * w * h) / deviation, where the means are over what was
            normalised together. With RMS the first is not subtracted, and the other is of the tile, which has all channels.

    Args:
        stats_ptr: what `finish_moments` wrote.
        means_ptr: what `finish_gradient` wrote.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLIP: tl.constexpr = not UNIT
    AXIS: tl.constexpr = 1 if FLIP else 0
    image, part, low, left, c, mask_c = part_of_image(C, P, chunk, chunks, C_VEC, P_VEC, BLOCK_C)
    r = tl.arange(0, BLOCK_P)
    if not RMS:
        mean = of_groups(stats_ptr, image, c, mask_c, C, G, FLIP)
        scale = of_groups(stats_ptr + groups, image, c, mask_c, C, G, FLIP)
        if DX:
            mean_g = of_groups(means_ptr, image, c, mask_c, C, G, FLIP)
            mean_gh = of_groups(means_ptr + groups, image, c, mask_c, C, G, FLIP)
    if WEIGHT:
        w = of_channels(w_ptr, c, mask_c, ACC, FLIP)
    if BIAS:
        b = of_channels(b_ptr, c, mask_c, ACC, FLIP)
    if SUMS:
        if FLIP:
            sum_g = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
        else:
            sum_g = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
        sum_gh = sum_g
    for start in tl.range(0, left, BLOCK_P):
        p = low + start + r
        live = lead(start + r < left, FLIP)
        mask = live & trail(mask_c, FLIP)
        tile = tile_at(image, p, c, C, P, UNIT, C_VEC, P_VEC, OFFSET)
        if PADDED:
            read = tile_at(image, padded(p, (X0, X1, X2), (Y0, Y1, Y2), (B0, B1, B2), RANK), c, C, Q, UNIT, C_VEC, 1, OFFSET)
        else:
            read = tile
        h = tl.load(x_ptr + tile, mask=mask, other=0.0).to(ACC)
        g = tl.load(dy_ptr + read, mask=mask, other=0.0).to(ACC)
        if RMS:
            scale = root_mean_square(h, C, EPS, FLIP)
            h *= scale
        else:
            h = (h - mean) * scale
        z = h
        if WEIGHT:
            z *= w
        if BIAS:
            z += b
        g = tl.where(live, gradient(g, z, ACTIVATION, 0.0), 0.0)  # NaN where there is nothing would spoil the sums
        if SUMS:
            sum_g += g
            sum_gh += g * h
        if DX:
            if WEIGHT:
                g *= w
            if RMS:
                g -= h * lead(tl.sum(g * h, axis=0 if FLIP else 1) / C, FLIP)
            else:
                g -= mean_g + h * mean_gh
            tl.store(dx_ptr + tile, rounded(g * scale, dx_ptr.dtype.element_ty, INTERPRET), mask=mask)
    if SUMS:
        out = out_ptr + part.to(tl.int64) * 2 * C + c
        tl.store(out, tl.sum(sum_g, axis=AXIS), mask=mask_c)
        tl.store(out + C, tl.sum(sum_gh, axis=AXIS), mask=mask_c)


@kernel
def finish_gradient(
    parts_ptr, w_ptr, means_ptr, dw_ptr, db_ptr, groups, C, G, P, chunks, parts,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds what `normalise_gradient` summed: the first `groups` programs per group of an image, the others per channel.

    Args:
        means_ptr: means[0, image, group] gets the mean of g * w, means[1, image, group] that of g * w * h.
        dw_ptr, db_ptr: get the sums of g * h and of g over all images, if WEIGHT and BIAS.
        groups: groups of all images; 0 to leave the means out.
        parts: chunks of all images.
    """
    pid = tl.program_id(0)
    if pid < groups:
        own = C // G
        first = pid % G * own
        at = parts_ptr + (pid // G).to(tl.int64) * chunks * 2 * C + first
        e = tl.arange(0, BLOCK)
        g = tl.zeros((BLOCK,), dtype=ACC)
        gh = tl.zeros((BLOCK,), dtype=ACC)
        for start in tl.range(0, chunks * own, BLOCK):
            i = (start + e) // own
            o = (start + e) % own
            mask = i < chunks
            row = at + i.to(tl.int64) * 2 * C + o
            if WEIGHT:
                w = tl.load(w_ptr + first + o, mask=mask, other=0.0).to(ACC)
            else:
                w = 1.0
            g += tl.load(row, mask=mask, other=0.0) * w
            gh += tl.load(row + C, mask=mask, other=0.0) * w
        numbers = own.to(ACC) * P
        tl.store(means_ptr + pid, tl.sum(g) / numbers)
        tl.store(means_ptr + groups + pid, tl.sum(gh) / numbers)
    else:
        c = (pid - groups) * BLOCK_C + tl.arange(0, BLOCK_C)
        db = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        dw = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        for start in tl.range(0, parts, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mask = lead(n < parts, False) & trail(c < C, False)
            row = parts_ptr + lead(n.to(tl.int64) * 2 * C, False) + trail(c, False)
            db += tl.load(row, mask=mask, other=0.0)
            dw += tl.load(row + C, mask=mask, other=0.0)
        if BIAS:
            tl.store(db_ptr + c, rounded(tl.sum(db, axis=0), db_ptr.dtype.element_ty, INTERPRET), mask=c < C)
        if WEIGHT:
            tl.store(dw_ptr + c, rounded(tl.sum(dw, axis=0), dw_ptr.dtype.element_ty, INTERPRET), mask=c < C)
