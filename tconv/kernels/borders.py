"""Adds to a gradient dx what belongs to the padding that repeats x's elements (reflect, replicate, circular).

    dx[n, c, i] += sum over all padding positions u that show element i of g[n, c, u]

g, the gradient of the padded input outside of x, lies in a workspace as up to six slabs, two per dimension: before x and after
it. The slab of dimension d has x's own extent in the dimensions before d and the padded extent in those after d, so that each
position of the padding is in one slab.

Only elements that some position shows are read and written: in each dimension `low` at the start and the others at the end.
Each has one program, which adds in a fixed order, so the same call gives the same bits.

With FOLD the workspace has the gradient of the whole padded input instead, in one piece, and all of dx is written:

    dx[n, c, i] = sum over all positions u that show element i, its own too, of g[n, c, u]
"""

import triton
import triton.language as tl

from tconv.kernels.common import APART, kernel, lead, multiple, rounded, trail


@triton.jit
def shown_at(i, choice, extent, before, after, BORDER: tl.constexpr):
    """Returns the `choice`-th position that shows element i of a dimension, and whether there is one. Position 0 is i itself.

    A reflected or circular dimension has two other choices, one before x and one after it. A replicated one has as many as
    padding, those before it first.
    """
    if BORDER == "reflect":
        u = tl.where(choice == 0, i, tl.where(choice == 1, -i, 2 * (extent - 1) - i))
        beyond = tl.where(choice == 1, (u < 0) & (u >= -before), (u >= extent) & (u < extent + after))
    elif BORDER == "circular":
        u = tl.where(choice == 0, i, tl.where(choice == 1, i - extent, i + extent))
        beyond = (u >= -before) & (u < extent + after)
    elif BORDER == "replicate":
        first = choice <= before
        u = tl.where(choice == 0, i, tl.where(first, -choice, extent - 1 + choice - before))
        beyond = i == tl.where(first, 0, extent - 1)
    else:
        u = i
        beyond = i >= 0
    return u, (choice == 0) | beyond


@kernel
def add_borders(
    g_ptr, x_ptr,
    N, C, X0, X1, X2,
    A0, A1, A2, E0, E1, E2,  # padding before and after x, where it repeats elements
    low0, low1, low2, n0, n1, n2,  # elements that are shown: at the start, in all
    m0, m1, m2,  # choices
    a0, a1, a2, e0, e1, e2,  # where the slabs begin: before, after
    sxn, sxc, sx0, sx1, sx2,
    BORDER0: tl.constexpr, BORDER1: tl.constexpr, BORDER2: tl.constexpr, FOLD: tl.constexpr,
    X_UNIT: tl.constexpr, X_VEC: tl.constexpr,  # contiguous channels, in dx and the slabs? vector width along them
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    FLIP: tl.constexpr = False if X_UNIT else APART
    BORDERS: tl.constexpr = (BORDER0, BORDER1, BORDER2)
    X = (X0, X1, X2)
    A = (A0, A1, A2)
    E = (E0, E1, E2)
    low = (low0, low1, low2)
    shown = (n0, n1, n2)
    starts = (a0, a1, a2)
    ends = (e0, e1, e2)
    sx = (multiple(sx0, X_VEC).to(OFFSET), multiple(sx1, X_VEC).to(OFFSET), multiple(sx2, X_VEC).to(OFFSET))

    # Region d has the elements that are shown along dimension d, and along none before it.
    rest0 = X0 - n0
    rest1 = X1 - n1
    size0 = n0 * X1 * X2
    size1 = rest0 * n1 * X2
    size = size0 + size1 + rest0 * rest1 * n2
    tiles_c = tl.cdiv(C, BLOCK_C)
    m = (tl.program_id(0) // tiles_c).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image = m // size
    q = (m % size).to(tl.int32)
    region = tl.where(q < size0, 0, tl.where(q < size0 + size1, 1, 2))
    q -= tl.where(region == 0, 0, tl.where(region == 1, size0, size0 + size1))
    along2 = tl.where(region == 2, n2, X2)
    along1 = tl.where(region == 0, X1, tl.where(region == 1, n1, rest1))
    numbers = (q // along2 // along1, q // along2 % along1, q % along2)
    i = ()
    x_offset = image * multiple(sxn, X_VEC)
    for d in tl.static_range(3):
        gap = X[d] - shown[d]
        inner = numbers[d] + tl.where(numbers[d] < low[d], 0, gap)
        apart = numbers[d] + low[d]
        i = i + (tl.where(region == d, inner, tl.where(region > d, apart, numbers[d])),)
        x_offset += i[d].to(OFFSET) * sx[d]
    mask = lead(m < N * size.to(OFFSET), FLIP) & trail(c < multiple(C, X_VEC), FLIP)
    xp = x_ptr + (lead(x_offset, FLIP) + trail(c if X_UNIT else c * sxc.to(OFFSET), FLIP))
    if FOLD:
        acc = tl.zeros(xp.shape, ACC)
    else:
        acc = tl.load(xp, mask=mask, other=0.0).to(ACC)
    for choice in tl.range(0 if FOLD else 1, m0 * m1 * m2):
        choices = (choice // m2 // m1, choice // m2 % m1, choice % m2)
        along = tl.where(choices[0] > 0, 0, tl.where(choices[1] > 0, 1, 2))  # whose slab it is
        ok = m >= 0
        slab = starts[0]
        pixel = image * 0
        pixels = choice * 0 + 1
        for e in tl.static_range(3):
            u, found = shown_at(i[e], choices[e], X[e], A[e], E[e], BORDERS[e])
            ok &= found
            if FOLD:
                extent = A[e] + X[e] + E[e]
                u += A[e]
            else:
                before = choices[e] <= (A[e] if BORDERS[e] == "replicate" else 1)
                extent = tl.where(e < along, X[e], tl.where(e > along, A[e] + X[e] + E[e], tl.where(before, A[e], E[e])))
                u += tl.where(e < along, 0, tl.where((e > along) | before, A[e], -X[e]))
                slab = tl.where(e == along, tl.where(before, starts[e], ends[e]), slab)
            pixel = pixel * extent + u
            pixels *= extent
        if X_UNIT:
            at = lead((image * pixels + pixel) * multiple(C, X_VEC), FLIP) + trail(c, FLIP)
        else:
            at = lead(image * C * pixels + pixel, FLIP) + trail(c.to(OFFSET) * pixels, FLIP)
        acc += tl.load(g_ptr + multiple(slab, X_VEC) + at, mask=mask & lead(ok, FLIP), other=0.0).to(ACC)
    tl.store(xp, rounded(acc, x_ptr.dtype.element_ty, INTERPRET), mask=mask)
