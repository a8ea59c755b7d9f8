"""A product of matrices in Gluon whose warps part: one fetches boxes of the operands, the others multiply them.

Whoever fetches fills a ring of slots in shared memory. Two mbarriers per slot pass it to and fro: at `ready` its bytes are
counted as they come, at `empty` whoever multiplied it arrives. Programs stay and go through the tiles.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import simulator

arch = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9, and before
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def fetch(a, b, a_slots, b_slots, empty, ready, tiles, columns, steps, SLOTS: gl.constexpr):
    BLOCK_M: gl.constexpr = a.block_type.shape[0]
    BLOCK_K: gl.constexpr = a.block_type.shape[1]
    BLOCK_N: gl.constexpr = b.block_type.shape[1]
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(steps):
            slot = i % SLOTS
            mbarrier.wait(empty.index(slot), (i // SLOTS & 1) ^ 1)  # of a new mbarrier the phase before the first is complete
            mbarrier.expect(ready.index(slot), a.block_type.nbytes + b.block_type.nbytes)
            load(a, [tile // columns * BLOCK_M, step * BLOCK_K], ready.index(slot), a_slots.index(slot))
            load(b, [step * BLOCK_K, tile % columns * BLOCK_N], ready.index(slot), b_slots.index(slot))
            i += 1


@gluon.jit
def multiply(c, a_slots, b_slots, c_box, empty, ready, tiles, columns, steps, SLOTS: gl.constexpr, WARPS: gl.constexpr):
    BLOCK_M: gl.constexpr = c.block_type.shape[0]
    BLOCK_N: gl.constexpr = c.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16])
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for _step in range(steps):
            slot = i % SLOTS
            mbarrier.wait(ready.index(slot), i // SLOTS & 1)
            acc = warpgroup_mma(a_slots.index(slot), b_slots.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            i += 1
        tma.store_wait(0)  # c_box is free again
        c_box.store(acc.to(c.dtype))
        fence_async_shared()
        store(c, [tile // columns * BLOCK_M, tile % columns * BLOCK_N], c_box)
    tma.store_wait(0)


@gluon.jit
def matmul(a, b, c, tiles, columns, steps, SLOTS: gl.constexpr, WARPS: gl.constexpr):
    a_slots = gl.allocate_shared_memory(a.dtype, [SLOTS, a.block_type.shape[0], a.block_type.shape[1]], a.layout)
    b_slots = gl.allocate_shared_memory(b.dtype, [SLOTS, b.block_type.shape[0], b.block_type.shape[1]], b.layout)
    c_box = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(ready.index(slot), count=1)
    gl.warp_specialize(
        [
            (multiply, (c, a_slots, b_slots, c_box, empty, ready, tiles, columns, steps, SLOTS, WARPS)),
            (fetch, (a, b, a_slots, b_slots, empty, ready, tiles, columns, steps, SLOTS)),
        ],
        [1],  # warps that fetch
        [24],  # and their registers
    )


def descriptor(t: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [*block], gl.NVMMASharedLayout.get_default_for([*block], gl.bfloat16))


def main() -> None:
    m, n, k = 168, 136, 232
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.full((m, n), float("nan")).bfloat16()
    block_m, block_n, block_k, warps = 128, 64, 64, 8
    rows, columns, steps = -(-m // block_m), -(-n // block_n), -(-k // block_k)
    right = a.double() @ b.double()
    for seed in range(3):  # the order in which warps run
        with simulator.checking(simulator.Options(seed=seed)):
            matmul[(2,)](
                descriptor(a, block_m, block_k), descriptor(b, block_k, block_n), descriptor(c, block_m, block_n),
                rows * columns, columns, steps, SLOTS=3, WARPS=warps, num_warps=warps,
            )  # fmt: skip
        torch.testing.assert_close(c.double(), right, rtol=2**-7, atol=2**-7 * k**0.5)
        c.fill_(float("nan"))
    print(f"{m}x{k} times {k}x{n}: right, in three orders of the warps")


if arch == "sm_90":  # boxes, mbarriers and wgmma are Hopper's
    simulator.install(arch)
    main()
