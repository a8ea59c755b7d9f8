"""Sums the splits of a workspace, and the pixels of dy (the bias gradient).

    sum_splits  out[i] = sum over s of ws[s, i], where out may lie in another order than the slices of ws
    sum_pixels  db[c] = sum over n, j of dy[n, c, j]

One program computes a sum, or a split's part of it, in a fixed order, so the same call gives the same bits.
"""

import triton.language as tl

from tconv.kernels.common import APART, kernel, lead, multiple, part_of_sum, pixels_of_sum, rounded, trail
from tconv.kernels.epilogue import finish


@kernel
def sum_splits(
    ws_ptr, out_ptr,
    scale_ptr, shift_ptr, residual_ptr, kept_ptr,  # for the epilogue (epilogue.py), or None
    numel, splits, E0, E1, E2, E3, s0, s1, s2, s3, s4, channels, inner,
    DIMS: tl.constexpr, VEC: tl.constexpr, DEPENDENT: tl.constexpr, INTERPRET: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr, KEPT: tl.constexpr,  # the epilogue
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the slices of a split-K workspace in ascending order, in the workspace's dtype, and rounds once to out's dtype.

    Args:
        DIMS: 0 if out lies as the slices do; else the number of dimensions of a slice, at most five.
        E0, E1, E2, E3: their extents, the last dimension's first; that of the first dimension is not needed.
        s0, s1, s2, s3, s4: their strides in out, in the same order.
        channels, inner: the channels of out and their stride, for an epilogue. DIMS is 0 then.
        VEC: the vector width. It divides numel.
        DEPENDENT: launched, perhaps, before the kernel that writes the workspace has ended. All threads first wait for that,
            which makes what it wrote visible. It was launched when all before it had ended, or waits in the same way, so
            nothing earlier on the stream is under way then either, and nothing later begins before these threads have ended.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    numel = multiple(numel, VEC)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    acc = tl.load(ws_ptr + i, mask=mask, other=0.0)
    for s in tl.range(1, splits):
        acc += tl.load(ws_ptr + s * numel.to(tl.int64) + i, mask=mask, other=0.0)
    if DIMS == 0:
        offset = i
    else:
        extents = (E0, E1, E2, E3)
        strides = (s0, s1, s2, s3, s4)
        rest = tl.minimum(i, numel - 1).to(tl.int32)  # a weight's elements can be counted in 32 bits
        offset = i * 0
        for d in tl.static_range(DIMS - 1):
            offset += rest % extents[d] * strides[d].to(tl.int64)
            rest = rest // extents[d]
        offset += rest * strides[DIMS - 1].to(tl.int64)
    acc = finish(
        acc, offset, mask, i // inner % channels, mask, scale_ptr, shift_ptr, residual_ptr, kept_ptr, out_ptr.dtype.element_ty,
        ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT, INTERPRET, None, None,
    )  # fmt: skip
    tl.store(out_ptr + offset, rounded(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@kernel
def sum_pixels(
    dy_ptr, out_ptr, N, C, Y0, Y1, Y2, chunk, syn, syc, sy0, sy1, sy2,
    RANK: tl.constexpr, Y_UNIT: tl.constexpr, Y_VEC: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes out[split, c], the sum of dy[n, c, j] over the `chunk` pixels of a split. A program sums a tile of channels.

    Pixels are contiguous if not Y_UNIT and Y_VEC > 1: Y_VEC is the vector width along the contiguous axis.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    P_VEC: tl.constexpr = 1 if Y_UNIT else Y_VEC
    FLIP: tl.constexpr = False if Y_UNIT else P_VEC > 1 or APART
    Y = (Y0, Y1, multiple(Y2, P_VEC))
    sy = (multiple(sy0, Y_VEC), multiple(sy1, Y_VEC), 1 if P_VEC > 1 else multiple(sy2, Y_VEC // P_VEC))
    split, c, mask_c, low, left, channel = part_of_sum(N, C, Y, chunk, syc, RANK, Y_UNIT, Y_VEC, P_VEC, OFFSET, BLOCK_C)
    if FLIP:
        acc = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC)
    for start in tl.range(0, left, BLOCK_P):
        offset, live = pixels_of_sum(start, low, left, Y, syn, sy, RANK, Y_VEC, OFFSET, BLOCK_P)
        mask = lead(live, FLIP) & trail(mask_c, FLIP)
        # [BLOCK_P, BLOCK_C], transposed if FLIP
        acc += tl.load(dy_ptr + (lead(offset, FLIP) + trail(channel, FLIP)), mask=mask, other=0.0).to(ACC)
    total = tl.sum(acc, axis=1 if FLIP else 0)
    tl.store(out_ptr + split * C + c, rounded(total, out_ptr.dtype.element_ty, INTERPRET), mask=mask_c)
