"""fprop, dgrad and wgrad of unit stride on Hopper: persistent programs of specialised warps, in Gluon, ranks 1 to 3.

The equations, the order of the products and, in fprop and dgrad, the boxes are those of tma.py. What differs is who does what,
and for how long:

- A program stays on its multiprocessor and computes every so manieth tile. tma.py starts a program for each tile.
- One warp does nothing but tell the tensor memory accelerator (TMA) which boxes to fetch, into a ring of slots in shared
  memory. It runs ahead of the products, into the next tile too: its boxes arrive while the last tile is stored.
- Two warpgroups, called consumers, multiply. While the tensor cores work on one product, the consumers issue the next. They may
  share a tile: each has half of its channels, all of its pixels.
- Two mbarriers per slot hand it over: at `ready` TMA counts the bytes that it has written, at `empty` the consumers report
  that the product has been computed.

In fprop and dgrad consumers may also be two teams of a warpgroup each (TEAMS), which take tiles by turns ("ping-pong"): while
one multiplies, the other ends its tile. The boxes of their tiles follow each other in one ring, so a team skips those of the
other's tile. It waits for its turn (`turns`) until the other has issued its last product. Without that order it would take a
slot's phase for that of a later box: an mbarrier tells one phase from the next, but not from the one after that.

fprop and dgrad always store the result as a box, and end with the steps of epilogue.py. A residual is fetched as a box too, to
where the result's box will be, while the tile is multiplied. What is kept for the gradient is stored from there before the
result is. No GPU has timed any of it.

wgrad's tiles are those of tma.py: a filter tap of some output and input channels, over one split of the pixels. Its boxes have
several pixel extents where these cover dy with fewer zeros, since here both operands go from any box straight to the tensor
cores. Where they may overhang an extent is said in tma.py. A split's sums are stored from registers, without shared memory,
which is full of boxes.

Triton's interpreter does not run Gluon, so these kernels are tested as compiled code only.
"""

import functools
import types

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tconv.kernels import common, epilogue


@functools.cache
def in_gluon(fn):
    """Returns a device function of Triton's, and whatever it calls, as Gluon's.

    In the interpreter those of common.py and epilogue.py are none that a compiled kernel may call.
    """
    known = fn.fn.__globals__
    named = {name: known[name] for name in fn.fn.__code__.co_names if isinstance(known.get(name), type(common.lead))}
    called = known | {name: in_gluon(other) for name, other in named.items()}
    return gluon.jit(functools.wraps(fn.fn)(types.FunctionType(fn.fn.__code__, called)))


multiple, overhanging = in_gluon(common.multiple), in_gluon(common.overhanging)
before_activation, from_activation = in_gluon(epilogue.before_activation), in_gluon(epilogue.from_activation)
fetch_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names in Triton 3.9, and before
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def place(
    tile, tiles_n, G, boxes0, boxes1, boxes2,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Returns (group, first channel in it, first image, first pixel per dimension) of a tile, in the order of tma.py."""
    o_first = tile % tiles_n * BLOCK_N
    rest = tile // tiles_n
    group = rest % G
    rest = rest // G
    j2 = rest % boxes2 * B2
    rest = rest // boxes2
    j1 = rest % boxes1 * B1
    rest = rest // boxes1
    j0 = rest % boxes0 * B0
    return group, o_first, rest // boxes0 * BN, j0, j1, j2


@gluon.jit
def fetch(
    x_desc, w_desc, x_slots, w_slots, empty, ready, tiles, tiles_n, CI, CO, G, boxes0, boxes1, boxes2,
    T0, T1, T2, D0, D1, D2, P0, P1, P2,
    TRANSPOSED: gl.constexpr, BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What the warp does that fetches boxes: for each tile, by channel blocks (outer) and taps (inner)."""
    slot = 0
    phase = 1  # a new mbarrier counts as having completed the phase before its first
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group, o_first, image, j0, j1, j2 = place(tile, tiles_n, G, boxes0, boxes1, boxes2, BN, B0, B1, B2, BLOCK_N)
        for c in range(0, CI, BLOCK_K):
            for t0 in range(T0):
                for t1 in range(T1):
                    for t2 in range(T2):
                        if TRANSPOSED:
                            pixels = [image, j0 + P0 - t0 * D0, j1 + P1 - t1 * D1, j2 + P2 - t2 * D2, group * CI + c]
                            weights = [t0, t1, t2, group * CI + c, o_first]
                        else:
                            pixels = [image, j0 - P0 + t0 * D0, j1 - P1 + t1 * D1, j2 - P2 + t2 * D2, group * CI + c]
                            weights = [t0, t1, t2, group * CO + o_first, c]
                        mbarrier.wait(empty.index(slot), phase)
                        mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                        fetch_box(x_desc, pixels, ready.index(slot), x_slots.index(slot))
                        fetch_box(w_desc, weights, ready.index(slot), w_slots.index(slot))
                        slot += 1
                        if slot == SLOTS:
                            slot = 0
                            phase ^= 1


@gluon.jit
def further(slot, phase, steps, SLOTS: gl.constexpr):
    """Returns the slot and its phase so many steps further in the ring."""
    slot += steps
    return slot % SLOTS, phase ^ (slot // SLOTS & 1)


@gluon.jit
def multiply(
    y_desc, b_ptr, scale_ptr, shift_ptr, residual_desc, kept_desc, x_slots, w_slots, y_boxes, empty, ready, turns, fetched,
    tiles, tiles_n, steps, CO, G, boxes0, boxes1, boxes2, sb,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr, ACTIVATION: gl.constexpr, SLOPE: gl.constexpr,
    SCALE: gl.constexpr, SHIFT: gl.constexpr, RESIDUAL: gl.constexpr, STEPWISE: gl.constexpr, KEPT: gl.constexpr,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr, TEAMS: gl.constexpr, team,
):  # fmt: skip
    """What a team of consumers does: a tile's products, in an accumulator [channels, pixels], and its end.

    Args:
        turns: per team, an mbarrier at which the other team hands the tensor cores over.
        fetched: per team, an mbarrier at which TMA counts the bytes of the residual's box.
        team: the number of this one.
    """
    BLOCK_M: gl.constexpr = BN * B0 * B1 * B2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    dtype: gl.constexpr = y_desc.dtype
    y_box = y_boxes.index(team)
    y_tile = y_box.reshape([BLOCK_M, BLOCK_N]).permute((1, 0))
    slot, phase = further(0, 0, team * steps, SLOTS)
    last = 0  # the slot before
    turn = team ^ 1  # as above: team 0 has the first turn
    box = 0
    for tile in range(gl.program_id(0) + team * gl.num_programs(0), tiles, TEAMS * gl.num_programs(0)):
        group, o_first, image, j0, j1, j2 = place(tile, tiles_n, G, boxes0, boxes1, boxes2, BN, B0, B1, B2, BLOCK_N)
        where = [image, j0, j1, j2, group * CO + o_first]
        o = o_first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        if HAS_BIAS:
            bias = gl.load(b_ptr + (group * CO + o) * sb, mask=o < CO, other=0.0)
        if RESIDUAL != "":
            tma.store_wait(0)  # the last tile's box has left
            mbarrier.expect(fetched.index(team), y_desc.block_type.nbytes)
            fetch_box(residual_desc, where, fetched.index(team), y_box)
        acc = gl.zeros((BLOCK_N, BLOCK_M), ACC, layout)
        if TEAMS > 1:
            mbarrier.wait(turns.index(team), turn)
            turn ^= 1
        for i in range(steps):
            if TRANSPOSED:
                wv = w_slots.index(slot).reshape([BLOCK_K, BLOCK_N]).permute((1, 0))
            else:
                wv = w_slots.index(slot).reshape([BLOCK_N, BLOCK_K])
            xv = x_slots.index(slot).reshape([BLOCK_M, BLOCK_K]).permute((1, 0))
            mbarrier.wait(ready.index(slot), phase)
            acc = warpgroup_mma(wv, xv, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(empty.index(last), count=1, pred=i > 0)
            last = slot
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
        if TEAMS > 1:
            mbarrier.arrive(turns.index(1 - team), count=1)  # the other team's products follow the last one
            slot, phase = further(slot, phase, steps, SLOTS)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(last), count=1)
        if HAS_BIAS:
            acc += gl.expand_dims(bias.to(ACC), 1)
        if RESIDUAL != "":
            mbarrier.wait(fetched.index(team), box)
            box ^= 1
            more = y_tile.load(layout).to(ACC)
        else:
            more = None
            tma.store_wait(0)  # the last tile's box has left
        acc = before_activation(
            acc, more, group * CO + o, o < CO, scale_ptr, shift_ptr, dtype,
            ACTIVATION, SCALE, SHIFT, RESIDUAL, STEPWISE, False, True,
        )  # fmt: skip
        if KEPT:
            y_tile.store(acc.to(dtype))
            fence_async_shared()
            store_box(kept_desc, where, y_box)
            tma.store_wait(0)  # it has left, and the result may take its place
        acc = from_activation(acc, more, dtype, ACTIVATION, SLOPE, RESIDUAL, STEPWISE, False)
        y_tile.store(acc.to(dtype))
        fence_async_shared()
        store_box(y_desc, where, y_box)
    tma.store_wait(0)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """Returns new mbarriers, each for one arrival a phase."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=1)
    return found


@gluon.jit
def part(multiplying, fetching, TEAMS: gl.constexpr):
    """Parts the warps: each team does `multiply`, whose last argument is its number, and one more warp `fetch`.

    That warp needs few registers. Consumers get 240 each.
    """
    if TEAMS == 2:
        gl.warp_specialize(
            [(multiply, multiplying + (gl.to_tensor(0),)), (multiply, multiplying + (gl.to_tensor(1),)), (fetch, fetching)],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize([(multiply, multiplying + (gl.to_tensor(0),)), (fetch, fetching)], [1], [24])


@functools.partial(common.kernel, jit=gluon.jit)
def persistent(
    x_desc, w_desc, b_ptr, y_desc,
    scale_ptr, shift_ptr,  # for the epilogue (epilogue.py), or None
    residual_ptr, kept_ptr,  # the same: descriptors, of boxes like the result's
    N, CI, CO, G,
    Y0, Y1, Y2, T0, T1, T2,  # extents: written, taps
    D0, D1, D2, P0, P1, P2,  # dilation, leading padding
    sb,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr,
    ACTIVATION: gl.constexpr, SLOPE: gl.constexpr, SCALE: gl.constexpr, SHIFT: gl.constexpr, RESIDUAL: gl.constexpr,
    STEPWISE: gl.constexpr, KEPT: gl.constexpr,  # the epilogue
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,  # the box: images, and pixels per dimension
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr,
    TEAMS: gl.constexpr,  # of consumers: 2 that take tiles by turns, or 1 that shares them
):  # fmt: skip
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    w_slots = gl.allocate_shared_memory(w_desc.dtype, [SLOTS] + w_desc.block_type.shape, w_desc.layout)
    y_boxes = gl.allocate_shared_memory(y_desc.dtype, [TEAMS] + y_desc.block_type.shape, y_desc.layout)
    empty = barriers(SLOTS)
    ready = barriers(SLOTS)
    # An mbarrier that nobody waits at would share its memory with what is allocated next.
    turns = barriers(TEAMS) if TEAMS > 1 else empty
    fetched = barriers(TEAMS) if RESIDUAL != "" else empty
    tiles_n = gl.cdiv(CO, BLOCK_N)
    boxes0 = gl.cdiv(Y0, B0)
    boxes1 = gl.cdiv(Y1, B1)
    boxes2 = gl.cdiv(Y2, B2)
    tiles = tiles_n * G * boxes0 * boxes1 * boxes2 * gl.cdiv(N, BN)
    steps = T0 * T1 * T2 * gl.cdiv(CI, BLOCK_K)
    part(
        (
            y_desc, b_ptr, scale_ptr, shift_ptr, residual_ptr, kept_ptr, x_slots, w_slots, y_boxes, empty, ready, turns,
            fetched, tiles, tiles_n, steps, CO, G, boxes0, boxes1, boxes2, sb,
            TRANSPOSED, HAS_BIAS, ACC, ACTIVATION, SLOPE, SCALE, SHIFT, RESIDUAL, STEPWISE, KEPT,
            BN, B0, B1, B2, BLOCK_N, BLOCK_K, SLOTS, TEAMS,
        ),
        (
            x_desc, w_desc, x_slots, w_slots, empty, ready, tiles, tiles_n, CI, CO, G, boxes0, boxes1, boxes2,
            T0, T1, T2, D0, D1, D2, P0, P1, P2,
            TRANSPOSED, BN, B0, B1, B2, BLOCK_N, BLOCK_K, SLOTS,
        ),
        TEAMS,
    )  # fmt: skip


@gluon.jit
def weights_of(
    tile, tiles_c, tiles_k, G, T0, T1, T2,
    BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Returns (tap per dimension, first input and first output channel in the group, group, split) of a tile of a weight
    gradient, in the order of tma.py."""
    t2 = tile % T2
    rest = tile // T2
    t1 = rest % T1
    rest = rest // T1
    t0 = rest % T0
    rest = rest // T0
    c_first = rest % tiles_c * BLOCK_C
    rest = rest // tiles_c
    k_first = rest % tiles_k * BLOCK_K
    rest = rest // tiles_k
    return t0, t1, t2, c_first, k_first, rest % G, rest // G


@gluon.jit
def fetch_pixels(
    dy_desc, x_desc, dy_slots, x_slots, empty, ready, tiles, tiles_c, tiles_k, C, K, G, boxes, boxes0, boxes1, boxes2, chunk,
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2, D0, D1, D2, P0, P1, P2,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What the warp does that fetches boxes for a weight gradient: for each tile, the pixels of its split."""
    slot = 0
    phase = 1  # a new mbarrier counts as having completed the phase before its first
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        t0, t1, t2, c_first, k_first, group, split = weights_of(tile, tiles_c, tiles_k, G, T0, T1, T2, BLOCK_K, BLOCK_C)
        s0 = t0 * D0 - P0
        s1 = t1 * D1 - P1
        s2 = t2 * D2 - P2
        a0 = overhanging(Y0, s0, X0, boxes0 * B0)
        a1 = overhanging(Y1, s1, X1, boxes1 * B1)
        a2 = overhanging(Y2, s2, X2, boxes2 * B2)
        rest = split * chunk
        j2 = a2 + rest % boxes2 * B2
        rest = rest // boxes2
        j1 = a1 + rest % boxes1 * B1
        rest = rest // boxes1
        j0 = a0 + rest % boxes0 * B0
        image = rest // boxes0 * BN
        for _ in range(min(chunk, boxes - split * chunk)):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(ready.index(slot), dy_desc.block_type.nbytes + x_desc.block_type.nbytes)
            fetch_box(dy_desc, [image, j0, j1, j2, group * K + k_first], ready.index(slot), dy_slots.index(slot))
            pixels = [image, j0 + s0, j1 + s1, j2 + s2, group * C + c_first]
            fetch_box(x_desc, pixels, ready.index(slot), x_slots.index(slot))
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
            j2 += B2
            if j2 >= Y2:
                j2 = a2
                j1 += B1
                if j1 >= Y1:
                    j1 = a1
                    j0 += B0
                    if j0 >= Y0:
                        j0 = a0
                        image += BN


@gluon.jit
def multiply_pixels(
    dw_ptr, dy_slots, x_slots, empty, ready, tiles, tiles_c, tiles_k, CW, KW, G, boxes, chunk, T0, T1, T2,
    sws, swg, swk, swc, sw0, sw1, sw2,
    W_UNIT: gl.constexpr, W_VEC: gl.constexpr, ACC: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_P: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What the consumers do for a weight gradient: a tile's products, in an accumulator [output, input channels]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_C, 16])
    slot = 0
    phase = 0
    last = 0  # the slot before
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        t0, t1, t2, c_first, k_first, group, split = weights_of(tile, tiles_c, tiles_k, G, T0, T1, T2, BLOCK_K, BLOCK_C)
        acc = gl.zeros((BLOCK_K, BLOCK_C), ACC, layout)
        for step in range(min(chunk, boxes - split * chunk)):
            gv = dy_slots.index(slot).reshape([BLOCK_P, BLOCK_K]).permute((1, 0))
            xv = x_slots.index(slot).reshape([BLOCK_P, BLOCK_C])
            mbarrier.wait(ready.index(slot), phase)
            acc = warpgroup_mma(gv, xv, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(empty.index(last), count=1, pred=step > 0)
            last = slot
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(last), count=1)
        k = k_first + gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
        c = c_first + gl.arange(0, BLOCK_C, gl.SliceLayout(0, layout))
        dw_offset = split.to(gl.int64) * multiple(sws, W_VEC) + group * multiple(swg, W_VEC).to(gl.int64)
        dw_offset += t0 * multiple(sw0, W_VEC).to(gl.int64)
        dw_offset += t1 * multiple(sw1, W_VEC).to(gl.int64)
        dw_offset += t2 * multiple(sw2, W_VEC).to(gl.int64)
        row = gl.expand_dims(k * multiple(swk, W_VEC).to(gl.int64), 1)
        column = gl.expand_dims(c if W_UNIT else c * swc.to(gl.int64), 0)
        mask = gl.expand_dims(k < KW, 1) & gl.expand_dims(c < multiple(CW, W_VEC), 0)
        gl.store(dw_ptr + dw_offset + (row + column), acc.to(dw_ptr.dtype.element_ty), mask=mask)


@functools.partial(common.kernel, jit=gluon.jit)
def persistent_wgrad(
    dy_desc, x_desc, dw_ptr,
    N, C, K, G,  # C, K: channels per group
    CW, KW,  # the same of dw, as in wgrad.py
    X0, X1, X2, Y0, Y1, Y2, T0, T1, T2, D0, D1, D2, P0, P1, P2,
    splits, chunk,  # chunk: boxes per split
    sws, swg, swk, swc, sw0, sw1, sw2,
    W_UNIT: gl.constexpr, W_VEC: gl.constexpr, ACC: gl.constexpr,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,  # the box: images, and pixels per dimension
    BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    dy_slots = gl.allocate_shared_memory(dy_desc.dtype, [SLOTS] + dy_desc.block_type.shape, dy_desc.layout)
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    empty = barriers(SLOTS)
    ready = barriers(SLOTS)
    tiles_c = gl.cdiv(C, BLOCK_C)
    tiles_k = gl.cdiv(K, BLOCK_K)
    boxes0 = gl.cdiv(Y0, B0)
    boxes1 = gl.cdiv(Y1, B1)
    boxes2 = gl.cdiv(Y2, B2)
    boxes = boxes0 * boxes1 * boxes2 * gl.cdiv(N, BN)
    tiles = T0 * T1 * T2 * tiles_c * tiles_k * G * splits
    gl.warp_specialize(
        [
            (multiply_pixels, (
                dw_ptr, dy_slots, x_slots, empty, ready, tiles, tiles_c, tiles_k, CW, KW, G, boxes, chunk, T0, T1, T2,
                sws, swg, swk, swc, sw0, sw1, sw2,
                W_UNIT, W_VEC, ACC, BLOCK_K, BLOCK_C, BN * B0 * B1 * B2, SLOTS,
            )),
            (fetch_pixels, (
                dy_desc, x_desc, dy_slots, x_slots, empty, ready, tiles, tiles_c, tiles_k, C, K, G,
                boxes, boxes0, boxes1, boxes2, chunk,
                X0, X1, X2, Y0, Y1, Y2, T0, T1, T2, D0, D1, D2, P0, P1, P2,
                BN, B0, B1, B2, BLOCK_K, BLOCK_C, SLOTS,
            )),
        ],
        [1],  # warps that fetch
        [40],  # and their registers; the consumers get the others
    )  # fmt: skip
