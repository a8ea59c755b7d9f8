"""Tiles: what a kernel is compiled with, and which of them are legal. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tconv.planning.device import Device

BF16X6 = "bf16x6"  # a precision: fp32 as sums of three bf16, of whose nine products six are made (kernels/common.py `product`)
DOTS = ("gather", "wgrad", "packed", "packed_wgrad")  # kernels that can cut their operands so
MAX_TILE = 1 << 20  # elements: Triton's own limit for one block
BOXES = ("tma", "tma_wgrad")  # kernels to which the tensor memory accelerator brings their operands


@dataclass(frozen=True)
class Tile:
    """Block extents and launch options.

    Attributes:
        m, n, k: gather, tma: pixels, written channels, reduced channels. wgrad, tma_wgrad: K, C, pixels (packed kernels:
            K and C of several groups, C or reduced channels times taps). depthwise: pixels, channels, 1.
            depthwise_wgrad: taps, channels, pixels. strip: strips, channels, 1. strip_wgrad: rows of the filter, channels,
            strips. bias: 1, channels, pixels. stage: pixels, channels, 1.
        warps: warps per program.
        stages: depth of the loop's software pipeline.
        registers: what a thread may use at most on NVIDIA; 0 leaves it to ptxas, which then sometimes spills a few for room
            for one more program per multiprocessor.
        columns: outputs side by side that a thread of a strip kernel owns.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    registers: int = 0
    columns: int = 1

    def __str__(self) -> str:
        limit = f" r{self.registers}" if self.registers else ""
        columns = f" c{self.columns}" if self.columns > 1 else ""
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{limit}{columns}"


@dataclass(frozen=True)
class Access:
    """How a kernel meets its operands.

    Attributes:
        itemsize: bytes of an element.
        tensor_cores: whether they may do the products, in the precision asked for.
        narrow: whether some operand is accessed element by element, which is not pipelined either.
        flip: of a strip kernel, whether columns are contiguous, not channels.
        large: whether the largest tiles' accumulators leave it registers enough.
        precision: BF16X6, or empty for that of the data type and torch's flag.
    """

    itemsize: int
    tensor_cores: bool
    narrow: bool = False
    flip: bool = False
    large: bool = True
    precision: str = ""


# Chosen by compiling for sm_90 (`scripts/codegen.py` prints registers, spills and shared memory): none may spill.
GEMM_16 = (
    Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3),  # where Access.large
    Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4),
    Tile(128, 32, 32, 4, 4), Tile(64, 32, 64, 4, 4),  # for 32 channels and fewer
)  # fmt: skip
GEMM_32 = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3, 255), Tile(64, 128, 32, 4, 3))
# CUDA cores (true fp32) and fp64. Where 128 registers are enough they leave room for two programs per multiprocessor. In fp32
# 32 products a thread need 1.2 instructions each, 16 need 1.3, eight 1.6; four warps of 168 registers go three times into a
# multiprocessor, eight once.
GEMM_64 = (Tile(64, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 128))
FMA_32 = (Tile(64, 64, 16, 4, 2, 255), Tile(64, 32, 16, 4, 2, 255))
# Element by element, accesses go through registers and keep an address each: larger tiles spill up to 470 of them.
GEMM_16_NARROW = (Tile(64, 64, 32, 8, 2),)
GEMM_32_NARROW = (Tile(64, 64, 32, 8, 2),)
FMA_32_NARROW = (Tile(64, 32, 16, 8, 2, 128),)  # the gather's, for which four warps spill
# In pieces, which pass through registers: larger tiles spill, and element by element four warps do.
PIECES_32 = (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2))
PIECES_32_NARROW = (Tile(64, 64, 32, 8, 2),)
# The packed kernels. Element by element, pixels of 128 with 16 or 32 channels spill.
PACKED_16 = (Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 8, 3), Tile(128, 16, 64, 8, 3))
PACKED_WGRAD_16 = (
    Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), *(Tile(m, 128, 64, 8, 3) for m in (16, 32, 64)),
)  # fmt: skip
PACKED_WGRAD_16_NARROW = (Tile(64, 64, 64, 8, 3), Tile(16, 64, 64, 8, 3))
PACKED_32 = (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2))
PACKED_FMA = FMA_32[1:]
PACKED_64 = (Tile(32, 32, 16, 8, 2, 255),)
# Direct kernels, [pixels, channels]: 32 fp32 accumulators per thread, half as many where addresses are not shared.
DIRECT = (Tile(64, 64, 1, 4, 3), Tile(128, 32, 1, 4, 3), Tile(256, 16, 1, 4, 3))
DIRECT_NARROW = (Tile(64, 32, 1, 4, 3), Tile(128, 16, 1, 4, 3))
DIRECT_64 = (Tile(32, 32, 1, 4, 3), Tile(64, 16, 1, 4, 3))
DIRECT_WGRAD = (Tile(3, 64, 32, 4, 2), Tile(3, 32, 64, 4, 2))  # taps, channels, pixels
DIRECT_WGRAD_64 = (Tile(1, 32, 32, 4, 2),)
# Strip kernels: where channels are contiguous, 16 bytes of one strip per thread. Six columns are for a dgrad of stride three.
# There are no registers for fp64.
STRIP_16 = (Tile(16, 64, 1, 4, 1, 255, 8), *(Tile(32, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_32 = (Tile(8, 64, 1, 4, 1, 255, 8), *(Tile(16, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_FLIP = tuple(Tile(64, 4, 1, 4, 1, 255, columns) for columns in (8, 6))
STRIP_WGRAD_16 = (Tile(1, 64, 16, 4, 1, 255, 8), *(Tile(rows, 32, 32, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_32 = (Tile(1, 64, 8, 4, 1, 255, 8), *(Tile(rows, 32, 16, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_FLIP = (Tile(1, 4, 64, 4, 1, 255, 8), Tile(3, 4, 64, 4, 1, 255, 8))
# Boxes go past the registers, so there is room for more accumulators.
TMA_16 = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4))
# wgrad turns dy's box on its way to the tensor cores, which only 16 bits allow.
TMA_WGRAD_16 = (
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
TMA_32 = (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4))
BIAS = (Tile(1, 64, 64, 4, 3),)
# Copies: 8 KiB, in both directions runs of 128 bytes or more unless channels are few.
STAGE = {size: tuple(Tile(8192 // size // n, n, 1, 4, 1) for n in (64, 32, 16, 8, 4)) for size in (2, 4, 8)}
# What spills, as (kernel, tile) by generation of the device. Before Hopper tensor cores read operands from registers, where
# they take the place of accumulators.
SPILLING = {
    8: {
        *((kernel, tile) for kernel in ("gather", "wgrad") for tile in (*GEMM_16[:2], GEMM_16[3], GEMM_16[5])),
        *(("wgrad", tile) for tile in (GEMM_32[0], GEMM_32[1], GEMM_32[3], GEMM_16[6])),
        ("gather", GEMM_16[6]),
        ("gather", GEMM_32[1]),
        ("depthwise", DIRECT_NARROW[1]),
        ("packed", PACKED_16[1]),
        ("packed_wgrad", PACKED_WGRAD_16[2]),
    },
    10: {
        *(("wgrad", tile) for tile in (GEMM_16[3], GEMM_16[5], GEMM_64[0])),
        *(("gather", tile) for tile in (GEMM_16[4], GEMM_16[6], GEMM_16[7], GEMM_32[3])),
        *(("packed", tile) for tile in PACKED_16[2:]),
        ("packed_wgrad", PACKED_WGRAD_16[1]),
    },
}
# The same where leaving the tile out would be predicted to lose speed, and what is taken instead: ptxas spills a few registers
# of some variants for room for one more program, and does not where it is given a limit. AMD's wavefronts are twice as wide.
INSTEAD = {
    0: {
        ("gather", FMA_32_NARROW[0]): replace(FMA_32_NARROW[0], warps=4),
        ("packed", PACKED_32[1]): replace(PACKED_32[1], warps=4),
    },
    8: {
        ("gather", GEMM_16[4]): replace(GEMM_16[4], registers=255),
        ("packed", PACKED_16[3]): replace(PACKED_16[3], registers=96),
        ("packed_wgrad", PACKED_WGRAD_16[1]): replace(PACKED_WGRAD_16[1], registers=255),
    },
    10: {
        ("gather", GEMM_16[2]): replace(GEMM_16[2], registers=255),
        **{(kernel, GEMM_32[1]): replace(GEMM_32[1], registers=255) for kernel in ("gather", "wgrad")},
        ("gather", FMA_32[0]): replace(FMA_32[0], registers=168),
        ("gather", FMA_32_NARROW[0]): replace(FMA_32_NARROW[0], registers=240),
        ("wgrad", GEMM_32_NARROW[0]): replace(GEMM_32_NARROW[0], registers=168),
        ("packed", PACKED_16[0]): replace(PACKED_16[0], registers=128),
    },
}


def can_cut(device: Device) -> bool:
    """Whether fp32 may be computed in pieces."""
    return device.interpreted or device.generation == 9


def tiles(kernel: str, access: Access, device: Device) -> tuple[Tile, ...]:
    """Every tile that a planner on a GPU may choose for a kernel that so meets its operands, if `why_illegal` agrees."""
    instead = INSTEAD.get(device.generation, {})
    return tuple(instead.get((kernel, tile), tile) for tile in _tiles(kernel, access))


def _tiles(kernel: str, access: Access) -> tuple[Tile, ...]:
    itemsize, tensor_cores, narrow = access.itemsize, access.tensor_cores, access.narrow
    if kernel == "strip":
        return () if itemsize == 8 else STRIP_FLIP if access.flip else STRIP_16 if itemsize == 2 else STRIP_32
    if kernel == "strip_wgrad":
        if access.flip:  # fp32 has registers for one row
            return STRIP_WGRAD_FLIP[: {2: 2, 4: 1}.get(itemsize, 0)]
        return () if itemsize == 8 else STRIP_WGRAD_16 if itemsize == 2 else STRIP_WGRAD_32
    if kernel == "bias":
        return BIAS
    if kernel == "stage":
        return STAGE[itemsize]
    if kernel == "depthwise":
        return DIRECT_64 if itemsize == 8 else DIRECT_NARROW if narrow else DIRECT
    if kernel == "depthwise_wgrad":
        return DIRECT_WGRAD_64 if itemsize == 8 else DIRECT_WGRAD
    if access.precision == BF16X6:
        return PIECES_32_NARROW if narrow or kernel.startswith("packed") else PIECES_32
    if kernel.startswith("packed"):
        if itemsize == 2 and kernel == "packed_wgrad":
            return PACKED_WGRAD_16_NARROW if narrow else PACKED_WGRAD_16
        found = PACKED_64 if itemsize == 8 else PACKED_16 if itemsize == 2 else PACKED_32 if tensor_cores else PACKED_FMA
        return found[:1] if narrow else found
    if kernel == "tma_wgrad":
        return TMA_WGRAD_16 if itemsize == 2 else ()
    if kernel == "tma":
        return TMA_32 if itemsize == 4 else TMA_16
    if itemsize == 8:
        return GEMM_64
    if itemsize == 4 and not tensor_cores:
        return FMA_32 if not narrow else FMA_32_NARROW if kernel == "gather" else FMA_32[1:]
    if itemsize == 4:
        return GEMM_32_NARROW if narrow else GEMM_32
    return GEMM_16_NARROW if narrow else GEMM_16 if access.large else GEMM_16[2:]


def why_illegal(kernel: str, tile: Tile, itemsize: int, device: Device) -> str | None:
    """Why a tile cannot run, or None: the one place that planner, forced plans and tests ask."""
    if any(v <= 0 or v & (v - 1) for v in (tile.n, tile.k, tile.warps)) or tile.stages < 1:
        return f"tile {tile}: extents and warps must be powers of two"
    if tile.m <= 0 or (kernel not in ("depthwise_wgrad", "strip_wgrad") and tile.m & (tile.m - 1)):
        return f"tile {tile}: extents and warps must be powers of two"
    if not 1 <= tile.columns <= (8 if kernel.startswith("strip") else 1):
        return f"tile {tile}: so many columns are not for {kernel}"
    if max(tile.m * tile.n, tile.n * tile.k, tile.m * tile.k) > MAX_TILE:
        return f"tile {tile}: more than {MAX_TILE} elements in a block"
    if kernel in BOXES and not device.interpreted:
        if device.generation < 9:
            return f"{device.name} has no tensor memory accelerator"
        if kernel == "tma_wgrad" and (itemsize > 2 or min(tile.m, tile.n) < 64):
            return f"tile {tile}: wgmma turns an operand of 2 bytes an element only, and wants 64 rows"
        if itemsize == 8 or tile.n < 64:
            return f"tile {tile}: wgmma wants 64 channels written and no more than 4 bytes an element"
    if kernel in ("gather", "wgrad", "packed", "packed_wgrad", *BOXES):
        if min(tile.m, tile.n, tile.k) < 16:
            return f"tile {tile}: tl.dot needs at least 16 in each extent"
        shared = tile.stages * (tile.m + tile.n) * tile.k * itemsize
        if shared > device.shared_bytes:
            return f"tile {tile}: {shared} bytes of shared memory, {device.name} has {device.shared_bytes}"
    if (kernel, tile) in SPILLING.get(device.generation, ()):
        return f"tile {tile}: {kernel} spills registers on {device.name}"
    return None
