"""What the kernels that multiply with tl.dot have in common: their tiles by precision, and how their work is counted."""

from __future__ import annotations

import math

from tconv.planning.cost import Work, split_steps
from tconv.planning.device import Device
from tconv.planning.family import Family
from tconv.planning.operands import Operands
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, Access, Tile

# Tiles, named by bits of an element. They were chosen by compiling for sm_90, where none may spill registers
# (`scripts/codegen.py` prints registers, spills and shared memory).
GEMM_16 = (
    Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4),
    Tile(128, 32, 32, 4, 4), Tile(64, 32, 64, 4, 4),  # for 32 channels or fewer
)  # fmt: skip
# For 16-bit elements on Hopper, where the last of the steps of 64 reduced channels would be half empty. They have about as many
# bytes on their way as steps of 64. With 128x128x32 in four stages, which have fewer, an H200 took a third longer than with
# 128x128x64 in three, in a layer that both fit.
STEPS_OF_32 = (Tile(256, 128, 32, 8, 6), Tile(128, 128, 32, 8, 6), Tile(256, 64, 32, 8, 5), Tile(128, 64, 32, 4, 6))
GEMM_32 = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3, 255), Tile(64, 128, 32, 4, 3))
# fp8. Beside the accumulators there are the partial sums of kernels/common.py `product`.
GEMM_8 = (
    Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3), Tile(64, 32, 128, 4, 4),
    Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4),
)  # fmt: skip
# fp64, and true fp32 on CUDA cores. Tiles that need at most 128 registers let two programs of eight warps share a
# multiprocessor. In fp32 the fewer accumulators a thread has, the more instructions a product needs.
GEMM_64 = (Tile(64, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 128))
FMA_32 = (Tile(64, 64, 16, 4, 2, 255), Tile(64, 32, 16, 4, 2, 255))
# Element-by-element loads pass through registers and hold one address per element: larger tiles spill up to 470 registers.
GEMM_16_NARROW = (Tile(64, 64, 32, 8, 2),)
GEMM_8_NARROW = (Tile(64, 64, 32, 8, 2),)
GEMM_32_NARROW = (Tile(64, 64, 32, 8, 2),)
# BF16X6, whose pieces pass through registers: larger tiles spill, and so do four warps with element-by-element loads.
PIECES_32 = (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2))
PIECES_32_NARROW = (Tile(64, 64, 32, 8, 2),)


class Gemm(Family):
    """A kernel that multiplies with tl.dot.

    Attributes:
        base, copy, one: instructions per iteration of the main loop, per 16-byte copy, and per element of narrow loads.
        around: instructions outside the main loop: of any program, per 16-byte copy of an iteration and dimension, and per
            accumulator. All are a warp's, as fitted to code compiled for sm_90 in 16 bits.
        cut: instructions to cut an element into BF16X6 pieces.
        waiting: how much longer the loop takes than its instructions if tensor cores are fed by element-by-element loads,
            which are not pipelined, as fitted to an H200's times.
        fma_narrow: tiles for true fp32 with element-by-element loads.
    """

    base, copy, one = 0, 0, 0
    around: tuple[float, float, float] = (0, 0, 0)
    cut = 0
    waiting = 3.5
    fma_narrow: tuple[Tile, ...] = FMA_32[1:]

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        if access.precision == BF16X6:
            return PIECES_32_NARROW if access.narrow else PIECES_32
        if access.itemsize == 8:
            return GEMM_64
        if access.itemsize == 4 and not access.tensor_cores:
            return self.fma_narrow if access.narrow else FMA_32
        if access.itemsize == 4:
            return GEMM_32_NARROW if access.narrow else GEMM_32
        if access.itemsize == 1:
            return GEMM_8_NARROW if access.narrow else GEMM_8
        return GEMM_16_NARROW if access.narrow else fitting(GEMM_16, access)

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        threads = 32 * tile.warps
        products = 0.0 if access.tensor_cores else 1.1 * tile.m * tile.across * tile.k / threads
        if access.precision == BF16X6:  # each warpgroup cuts the rows it reads; a step's sum is added
            shared = max(1, 16 * tile.warps // tile.m)
            products = self.cut * (shared * tile.m + tile.across) * tile.k / threads + tile.m * tile.across / threads
        if access.itemsize == 1:  # a step's sum is added
            products = tile.m * tile.across / threads
        return self.loads(p, tile, access) + products

    def loads(self, p: ConvProblem, tile: Tile, access: Access) -> float:
        """Returns the instructions per iteration besides the products'."""
        loaded = (tile.m + tile.across) * tile.k / (32 * tile.warps)
        return self.base + loaded * (self.one if access.narrow else self.copy * access.itemsize / 16)

    def reduction(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return super().reduction(p, pass_, tile) if pass_ == "wgrad" else self.channels(p, pass_)[1]

    def steps(self, p: ConvProblem, pass_: str, tile: Tile, splits: int) -> int:
        """Returns the iterations of the main loops of all programs."""
        tiles, blocks = self.programs(p, pass_, tile), split_steps(self.reduction(p, pass_, tile), tile.k, splits)
        # A tap belongs to exactly one phase of a dgrad, so over all phases each tap counts once.
        return tiles * blocks if pass_ == "wgrad" else tiles // p.phases(pass_) * p.taps * blocks

    def warps(self, access: Access) -> int:
        """Returns how many warps of a unit the registers suffice for."""
        # BF16X6 pieces take many registers, and so do per-element addresses beside true fp32 products.
        return 8 if access.precision == BF16X6 or (access.narrow and not access.tensor_cores) else 16

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        pipeline = tile.stages * (tile.m + tile.across) * tile.k * access.itemsize  # bytes of shared memory
        sums = access.itemsize == 1 and tile.m * tile.across >= 128 * 128  # and those of a step, which take as many registers
        resident = min(device.shared_bytes // pipeline, (8 if sums else self.warps(access)) // tile.warps)
        length = self.length(p, pass_, tile, access) * (self.waiting if access.narrow and access.tensor_cores else 1)
        return Work(
            self.steps(p, pass_, tile, splits), 2 * tile.m * tile.across * tile.k, length,
            access.itemsize * tile.k * (tile.m + tile.across), resident, self.outside(p, tile, access),
        )  # fmt: skip

    def outside(self, p: ConvProblem, tile: Tile, access: Access) -> float:
        """Returns a warp's instructions before and after the main loop: addresses, the first copies, the result."""
        fixed, copy, stored = self.around
        threads = 32 * tile.warps
        copies = (tile.m + tile.across) * tile.k * access.itemsize / 16 / threads
        return fixed + p.rank * copies * copy + tile.m * tile.across / threads * stored


class Advancing(Gemm):
    """A weight gradient, whose iterations advance through the pixels.

    With wide accesses a thread copies some pixels of either operand, and advances the digits of those of x.

    Attributes:
        apart: instructions per iteration besides these.
    """

    apart = 0

    def loads(self, p: ConvProblem, tile: Tile, access: Access) -> float:
        if access.narrow:
            return super().loads(p, tile, access)
        y, x = (extent * tile.k * access.itemsize / 16 / (32 * tile.warps) for extent in (tile.m, tile.n))
        return self.apart + self.advanced(p, y, x)

    def advanced(self, p: ConvProblem, y: float, x: float) -> float:
        """Returns the instructions of a thread's copies per iteration, of so many pixels of y and of x."""
        return self.copy * y + (8 + 12.5 * p.rank) * x


class Stepping(Gemm):
    """fprop and dgrad, whose iterations advance through the reduced channels, in steps of 32 where 64 do not fit them.

    Attributes:
        hopper_16: further tiles, for wide accesses to 16-bit elements on Hopper.
    """

    hopper_16: tuple[Tile, ...] = STEPS_OF_32

    def tiles_on(self, access: Access, device: Device) -> tuple[Tile, ...]:
        found = super().tiles_on(access, device)
        if device.generation != 9 or access.itemsize != 2 or access.narrow:
            return found
        return (*found, *fitting(self.hopper_16, access))

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        found = super().tiles_for(operands, p, pass_, device, precision)
        reduced = self.channels(p, pass_)[1]
        halves = reduced > 8 and 0 < reduced % 64 <= 32  # fewer are for packed, whose steps are of several taps
        return found if halves else tuple(tile for tile in found if tile not in self.hopper_16 or tile.k > 32)


class General(Gemm):
    """A kernel that takes every problem: always compared with others, and the interpreter's where no other is."""

    cuts = True

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        return True

    def interpreted(self, p: ConvProblem) -> bool:
        return True

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        # A group of a depthwise problem has one channel, so tl.dot's operands can only be loaded element by element.
        return operands.access(operands.narrow or p.depthwise, precision)


def weight_tiles(p: ConvProblem, tile: Tile) -> int:
    """Returns the tiles of a weight gradient that is computed tap by tap."""
    return math.ceil(p.K // p.G / tile.m) * math.ceil(p.C // p.G / tile.n) * p.taps * p.G


def fitting(tiles: tuple[Tile, ...], access: Access) -> tuple[Tile, ...]:
    """Returns the tiles for whose accumulators the accesses leave enough registers."""
    return tuple(tile for tile in tiles if tile.m * tile.across <= access.room)
