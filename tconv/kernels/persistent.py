"""fprop and dgrad of unit stride on Hopper: persistent programs of specialised warps, in Gluon, ranks 1 to 3.

The equations, the boxes and the order of the products are those of tma.py. What differs is who does what, and for how long:

- A program stays on its multiprocessor and computes every so manieth tile. tma.py starts a program for each tile.
- One warp does nothing but tell the tensor memory accelerator (TMA) which boxes to fetch, into a ring of slots in shared
  memory. It runs ahead of the products, into the next tile too: its boxes arrive while the last tile is stored.
- Two warpgroups, called consumers, multiply. They share a tile: each has half of its channels, all of its pixels. While the
  tensor cores work on one product, the consumers issue the next.
- Two mbarriers per slot hand it over: at `ready` TMA counts the bytes that it has written, at `empty` the consumers report
  that the product has been computed.

The result is always stored as a box. Triton's interpreter does not run Gluon, so this kernel is tested as compiled code only.
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tconv.kernels.common import kernel

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
def multiply(
    y_desc, b_ptr, x_slots, w_slots, y_box, empty, ready, tiles, tiles_n, steps, CO, G, boxes0, boxes1, boxes2, sb,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What the consumers do: a tile's products, in an accumulator [channels, pixels], and its end."""
    BLOCK_M: gl.constexpr = BN * B0 * B1 * B2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    slot = 0
    phase = 0
    last = 0  # the slot before
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group, o_first, image, j0, j1, j2 = place(tile, tiles_n, G, boxes0, boxes1, boxes2, BN, B0, B1, B2, BLOCK_N)
        if HAS_BIAS:
            o = o_first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
            bias = gl.load(b_ptr + (group * CO + o) * sb, mask=o < CO, other=0.0)
        acc = gl.zeros((BLOCK_N, BLOCK_M), ACC, layout)
        for step in range(steps):
            if TRANSPOSED:
                wv = w_slots.index(slot).reshape([BLOCK_K, BLOCK_N]).permute((1, 0))
            else:
                wv = w_slots.index(slot).reshape([BLOCK_N, BLOCK_K])
            xv = x_slots.index(slot).reshape([BLOCK_M, BLOCK_K]).permute((1, 0))
            mbarrier.wait(ready.index(slot), phase)
            acc = warpgroup_mma(wv, xv, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(empty.index(last), count=1, pred=step > 0)
            last = slot
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(last), count=1)
        if HAS_BIAS:
            acc += gl.expand_dims(bias.to(ACC), 1)
        tma.store_wait(0)  # the last tile's box has left
        y_box.reshape([BLOCK_M, BLOCK_N]).permute((1, 0)).store(acc.to(y_desc.dtype))
        fence_async_shared()
        store_box(y_desc, [image, j0, j1, j2, group * CO + o_first], y_box)
    tma.store_wait(0)


@functools.partial(kernel, jit=gluon.jit)
def persistent(
    x_desc, w_desc, b_ptr, y_desc,
    N, CI, CO, G,
    Y0, Y1, Y2, T0, T1, T2,  # extents: written, taps
    D0, D1, D2, P0, P1, P2,  # dilation, leading padding
    sb,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr,
    BN: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,  # the box: images, and pixels per dimension
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    x_slots = gl.allocate_shared_memory(x_desc.dtype, [SLOTS] + x_desc.block_type.shape, x_desc.layout)
    w_slots = gl.allocate_shared_memory(w_desc.dtype, [SLOTS] + w_desc.block_type.shape, w_desc.layout)
    y_box = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(ready.index(slot), count=1)
    tiles_n = gl.cdiv(CO, BLOCK_N)
    boxes0 = gl.cdiv(Y0, B0)
    boxes1 = gl.cdiv(Y1, B1)
    boxes2 = gl.cdiv(Y2, B2)
    tiles = tiles_n * G * boxes0 * boxes1 * boxes2 * gl.cdiv(N, BN)
    steps = T0 * T1 * T2 * gl.cdiv(CI, BLOCK_K)
    gl.warp_specialize(
        [
            (multiply, (
                y_desc, b_ptr, x_slots, w_slots, y_box, empty, ready, tiles, tiles_n, steps, CO, G, boxes0, boxes1, boxes2, sb,
                TRANSPOSED, HAS_BIAS, ACC, BN, B0, B1, B2, BLOCK_N, BLOCK_K, SLOTS,
            )),
            (fetch, (
                x_desc, w_desc, x_slots, w_slots, empty, ready, tiles, tiles_n, CI, CO, G, boxes0, boxes1, boxes2,
                T0, T1, T2, D0, D1, D2, P0, P1, P2,
                TRANSPOSED, BN, B0, B1, B2, BLOCK_N, BLOCK_K, SLOTS,
            )),
        ],
        [1],  # warps that fetch
        [24],  # and their registers; the consumers get the others
    )  # fmt: skip
