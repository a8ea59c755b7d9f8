"""What the kernels do with a result before they write it, and the gradient of an activation.

    finish                v = v * scale + shift (per channel), + residual, activation(v), + residual; then it is stored
    activation_gradient   dv = dy * activation'(v), from the activation's result or argument, and the sums of dv per channel

Numbers are in the accumulator's dtype. STEPWISE rounds them to the result's dtype after each step, as a sequence of PyTorch's
functions does. NaN and infinity give what they give there.
"""

import triton
import triton.language as tl

from tconv.kernels.common import APART, kernel, lead, multiple, part_of_sum, pixels_of_sum, rounded, trail, turned


@triton.jit
def exponential(v, FACTOR: tl.constexpr):
    """Returns exp(FACTOR * v) to the precision of v's dtype. In fp32, results below 2^-126 are zeros."""
    if v.dtype == tl.float64:
        e = tl.exp(FACTOR * v)
    else:
        e = tl.exp2(v * (FACTOR * 1.4426950408889634))  # tl.exp has three more instructions, for results below 2^-126
    return e


@triton.jit
def inverse(v):
    """Returns 1 / v for a positive v, in fp32 to 2^-21 of it: in two instructions, where a division has six."""
    if v.dtype == tl.float64:
        r = 1 / v
    else:
        root = tl.rsqrt(v)
        r = root * root
    return r


@triton.jit
def sigmoid(v):
    """Returns 1 / (1 + exp(-v))."""
    return inverse(1 + exponential(v, -1))


@triton.jit
def hyperbolic_tangent(v):
    """Returns tanh(v) to the precision of v's dtype.

    The exponential loses digits where v is small. There a quotient of polynomials is used, of Cephes' tanh.c (S. L. Moshier).
    """
    size = tl.abs(v)
    z = v * v
    above = (-0.964399179425052238628 * z - 99.2877231001918586564) * z - 1614.68768441708447952
    below = ((z + 112.811678491632931402) * z + 2235.48839060100448583) * z + 4844.06305325125486048
    small = v + v * z * (above * inverse(below))
    large = 1 - 2 * inverse(exponential(size, 2) + 1)
    large = tl.where(v < 0, -large, large)
    return tl.where(size < 0.625, small, large)


@triton.jit
def normal_below(v):
    """Returns the share of a standard normal distribution below v, (1 + erf(v / sqrt(2))) / 2.

    In fp32 by formula 7.1.26 of Abramowitz and Stegun, whose erf is off by 1.5e-7 at most: CUDA's branches for each element.
    """
    if v.dtype == tl.float64:
        below = 0.5 * (1 + tl.erf(v * 0.7071067811865476))
    else:
        x = tl.abs(v) * 0.7071067811865476
        t = 1 / (1 + 0.3275911 * x)  # `inverse` would add 2e-7 to the error
        t *= (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
        above = 0.5 * t * exponential(x * x, -1)
        below = tl.where(v < 0, above, 1 - above)
    return below


@triton.jit
def activated(v, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns the activation of v, which is fp32 or fp64."""
    if ACTIVATION == "relu":
        v = tl.where(v <= 0, 0.0, v)  # NaN stays
    elif ACTIVATION == "leaky_relu":
        v = tl.where(v > 0, v, v * SLOPE)
    elif ACTIVATION == "silu":
        v = v * sigmoid(v)
    elif ACTIVATION == "gelu":
        v = v * normal_below(v)
    elif ACTIVATION == "gelu_tanh":
        v = v * sigmoid(v * (1.5957691216057308 + 0.07135481627260025 * v * v))  # (1 + tanh(u)) / 2 is sigmoid(2 * u)
    elif ACTIVATION == "sigmoid":
        v = sigmoid(v)
    elif ACTIVATION == "tanh":
        v = hyperbolic_tangent(v)
    elif ACTIVATION == "hardswish":
        v = v * tl.minimum(tl.maximum(v + 3, 0.0), 6.0) / 6
    return v


@triton.jit
def gradient(g, v, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Returns g times the activation's derivative.

    Args:
        v: for sigmoid and tanh the activation's result, for relu and leaky_relu its result or its argument, which have the
            same sign, for the others its argument.
    """
    if ACTIVATION == "relu":
        g = tl.where(v <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(v > 0, g, g * SLOPE)
    elif ACTIVATION == "silu":
        s = sigmoid(v)
        g = g * s * (1 + v * (1 - s))
    elif ACTIVATION == "gelu":
        g = g * (normal_below(v) + v * exponential(v * v, -0.5) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        t = hyperbolic_tangent(0.7978845608028654 * (v + 0.044715 * v * v * v))
        g = g * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * v * v))
    elif ACTIVATION == "sigmoid":
        g = g * (1 - v) * v
    elif ACTIVATION == "tanh":
        g = g * (1 - v * v)
    elif ACTIVATION == "hardswish":
        g = tl.where(v <= -3, 0.0, tl.where(v < 3, g * (v / 3 + 0.5), g))
    return g


@triton.jit
def step(v, dtype: tl.constexpr, STEPWISE: tl.constexpr, INTERPRET: tl.constexpr):
    """Returns v, rounded to dtype if STEPWISE."""
    if STEPWISE:
        v = rounded(v, dtype, INTERPRET).to(v.dtype)
    return v


@triton.jit
def of_channels(ptr, channel, exists, dtype: tl.constexpr, FLIP: tl.constexpr):
    """Returns numbers per channel, loaded, converted and shaped to broadcast over a tile of `finish`."""
    v = tl.load(ptr + channel, mask=exists, other=0.0).to(dtype)
    return v if FLIP is None else trail(v, FLIP)


@triton.jit
def before_activation(
    acc, more, channel, exists, scale_ptr, shift_ptr, dtype: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, STEPWISE: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Returns a tile of sums after the steps before the activation. It is what may be kept for the gradient.

    Args:
        more: the residual, like acc; None if there is none.
        acc, channel, exists, dtype: as in `finish`.
    """
    if SCALE or SHIFT or RESIDUAL != "" or ACTIVATION != "":
        acc = step(acc, dtype, STEPWISE, INTERPRET)
    if SCALE:
        acc *= of_channels(scale_ptr, channel, exists, acc.dtype, FLIP)
        acc = step(acc, dtype, STEPWISE, INTERPRET)
    if SHIFT:
        acc += of_channels(shift_ptr, channel, exists, acc.dtype, FLIP)
        acc = step(acc, dtype, STEPWISE, INTERPRET)
    if RESIDUAL == "before":
        acc = step(acc + more, dtype, STEPWISE, INTERPRET)
    return acc


@triton.jit
def from_activation(
    acc, more, dtype: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Returns what `before_activation` returned after the activation and the residual that follows it."""
    if ACTIVATION != "":
        acc = activated(acc, ACTIVATION, SLOPE)
    if RESIDUAL == "after":
        acc = step(acc, dtype, STEPWISE, INTERPRET) + more
    return acc


@triton.jit
def finish(
    acc, tile, mask, channel, exists, scale_ptr, shift_ptr, residual_ptr, kept_ptr, dtype: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr, INTERPRET: tl.constexpr, FLIP: tl.constexpr, Y_FLIP: tl.constexpr,
):  # fmt: skip
    """Returns a tile of sums after the epilogue's steps, and writes what is kept for the gradient.

    Args:
        acc: the sums, with the bias, in the orientation of FLIP; None for a tile of one dimension.
        tile: offsets of the result's elements, in the orientation of Y_FLIP. Those of the residual and of what is kept are the
            same.
        mask: which of them exist.
        channel: the channels in the result, one per channel of the tile, or per element if it has one dimension.
        exists: which of them exist.
        dtype: the result's.
    """
    if RESIDUAL != "":
        more = turned(tl.load(residual_ptr + tile, mask=mask, other=0.0), Y_FLIP, FLIP).to(acc.dtype)
    else:
        more = None
    acc = before_activation(
        acc, more, channel, exists, scale_ptr, shift_ptr, dtype, ACTIVATION, SCALE, SHIFT, RESIDUAL, STEPWISE, INTERPRET, FLIP
    )
    if KEPT:
        tl.store(kept_ptr + tile, turned(rounded(acc, dtype, INTERPRET), FLIP, Y_FLIP), mask=mask)
    return from_activation(acc, more, dtype, ACTIVATION, SLOPE, RESIDUAL, STEPWISE, INTERPRET)


@kernel
def activation_gradient(
    dy_ptr, v_ptr, factor_ptr, dv_ptr, dr_ptr, out_ptr, N, C, Y0, Y1, Y2, chunk, syn, syc, sy0, sy1, sy2,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SUM: tl.constexpr,
    RESULT: tl.constexpr, RANK: tl.constexpr, Y_UNIT: tl.constexpr, Y_VEC: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a convolution's result and of the residual, and their sums, in one pass over memory.

    All tensors but the scale and out have the same strides. Programs, tiles and vectors are those of `reduce.sum_pixels`.

    Args:
        v_ptr: the activation's result if RESULT, else its argument.
        factor_ptr: the epilogue's scale [C], if SCALE.
        dv_ptr: gets dy * activation'(v) * scale.
        dr_ptr: gets dy * activation'(v), if RESIDUAL.
        out_ptr: if SUM, out[split, c] gets the sum of dv over the split's `chunk` pixels.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    P_VEC: tl.constexpr = 1 if Y_UNIT else Y_VEC
    FLIP: tl.constexpr = False if Y_UNIT else P_VEC > 1 or APART
    Y = (Y0, Y1, multiple(Y2, P_VEC))
    sy = (multiple(sy0, Y_VEC), multiple(sy1, Y_VEC), 1 if P_VEC > 1 else multiple(sy2, Y_VEC // P_VEC))
    split, c, mask_c, low, left, channel = part_of_sum(N, C, Y, chunk, syc, RANK, Y_UNIT, Y_VEC, P_VEC, OFFSET, BLOCK_C)
    if SCALE:
        factor = trail(tl.load(factor_ptr + c, mask=mask_c, other=0.0).to(ACC), FLIP)
    if FLIP:
        acc = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for start in tl.range(0, left, BLOCK_P):
        offset, live = pixels_of_sum(start, low, left, Y, syn, sy, RANK, Y_VEC, OFFSET, BLOCK_P)
        mask = lead(live, FLIP) & trail(mask_c, FLIP)
        tile = lead(offset, FLIP) + trail(channel, FLIP)  # [BLOCK_P, BLOCK_C], transposed if FLIP
        g = tl.load(dy_ptr + tile, mask=mask, other=0.0).to(ACC)
        if ACTIVATION != "":
            v = tl.load(v_ptr + tile, mask=mask, other=0.0).to(ACC)
            if not RESULT and (ACTIVATION == "sigmoid" or ACTIVATION == "tanh"):
                v = activated(v, ACTIVATION, SLOPE)
            g = gradient(g, v, ACTIVATION, SLOPE)
        if RESIDUAL:
            tl.store(dr_ptr + tile, rounded(g, dr_ptr.dtype.element_ty, INTERPRET), mask=mask)
        if SCALE:
            g *= factor
        g = rounded(g, dv_ptr.dtype.element_ty, INTERPRET)
        tl.store(dv_ptr + tile, g, mask=mask)
        if SUM:
            acc += tl.where(mask, g.to(ACC), 0.0)  # outside the tensor an activation may have made NaN of zeros
    if SUM:
        total = tl.sum(acc, axis=1 if FLIP else 0)
        tl.store(out_ptr + split * C + c, rounded(total, out_ptr.dtype.element_ty, INTERPRET), mask=mask_c)
