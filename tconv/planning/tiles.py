"""The tiles that each kernel may be compiled with, and which of them a device can run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tconv.planning.device import Device

BF16X6 = "bf16x6"  # a precision: fp32 as three bf16, and six of their nine products (kernels/common.py `product`)
DOTS = ("gather", "wgrad", "packed", "packed_wgrad")  # kernels that support BF16X6
MAX_TILE = 1 << 20  # elements of a block: Triton's own limit
TMA_KERNELS = ("tma", "tma_wgrad")  # kernels that load with the tensor memory accelerator


@dataclass(frozen=True)
class Tile:
    """Block extents and launch options.

    The meaning of m, n and k depends on the kernel:

        gather, tma         pixels, written channels, reduced channels
        packed              pixels, written channels of a pack of groups, taps times reduced channels of the pack
        wgrad, tma_wgrad    output channels, input channels, pixels
        packed_wgrad        output channels of a pack, taps times input channels of the pack, pixels
        depthwise           pixels, channels, 1
        depthwise_wgrad     taps, channels, pixels
        strip               strips, channels, 1
        strip_wgrad         rows of the filter, channels, strips
        bias                1, channels, pixels
        stage               pixels, channels, 1

    Attributes:
        m, n, k: block extents.
        warps: warps per program.
        stages: stages of the main loop's software pipeline.
        registers: limit of registers per thread on NVIDIA. 0 leaves it to ptxas, which sometimes spills a few registers to
            fit one more program on a multiprocessor.
        columns: neighbouring outputs that a thread of a strip kernel computes.
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
    """How a kernel accesses its operands.

    Attributes:
        itemsize: bytes of an element.
        tensor_cores: True if tensor cores may compute the products in the precision asked for.
        narrow: True if some operand is accessed element by element. Such loads are not pipelined either.
        flip: for a strip kernel, True if the operand read has no contiguous channels; usually its columns are contiguous.
        large: True if the accesses leave enough registers for the accumulators of the largest tiles.
        precision: BF16X6, or empty for the precision of the data type and torch's flag.
    """

    itemsize: int
    tensor_cores: bool
    narrow: bool = False
    flip: bool = False
    large: bool = True
    precision: str = ""


# Tiles for tl.dot kernels, named by bits of an element. They were chosen by compiling for sm_90, where none may spill registers
# (`scripts/codegen.py` prints registers, spills and shared memory).
GEMM_16 = (
    Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3),  # only if Access.large
    Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4),
    Tile(128, 32, 32, 4, 4), Tile(64, 32, 64, 4, 4),  # for 32 channels or fewer
)  # fmt: skip
GEMM_32 = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3, 255), Tile(64, 128, 32, 4, 3))
# fp64, and true fp32 on CUDA cores. Tiles that need at most 128 registers let two programs of eight warps share a
# multiprocessor. In fp32 a product needs 1.2 instructions at 32 accumulators per thread, 1.3 at 16 and 1.6 at eight. At 168
# registers per thread a multiprocessor holds three programs of four warps, but one of eight warps.
GEMM_64 = (Tile(64, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 128))
FMA_32 = (Tile(64, 64, 16, 4, 2, 255), Tile(64, 32, 16, 4, 2, 255))
# Element-by-element loads pass through registers and hold one address per element: larger tiles spill up to 470 registers.
GEMM_16_NARROW = (Tile(64, 64, 32, 8, 2),)
GEMM_32_NARROW = (Tile(64, 64, 32, 8, 2),)
FMA_32_NARROW = (Tile(64, 32, 16, 8, 2, 128),)  # for gather, which spills with four warps
# BF16X6, whose pieces pass through registers: larger tiles spill, and so do four warps with element-by-element loads.
PIECES_32 = (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2))
PIECES_32_NARROW = (Tile(64, 64, 32, 8, 2),)
# Packed kernels. With element-by-element loads, tiles of 128 pixels by 16 or 32 channels spill.
PACKED_16 = (Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 8, 3), Tile(128, 16, 64, 8, 3))
PACKED_WGRAD_16 = (
    Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), *(Tile(m, 128, 64, 8, 3) for m in (16, 32, 64)),
)  # fmt: skip
PACKED_WGRAD_16_NARROW = (Tile(64, 64, 64, 8, 3), Tile(16, 64, 64, 8, 3))
PACKED_32 = (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2))
PACKED_FMA = FMA_32[1:]
PACKED_64 = (Tile(32, 32, 16, 8, 2, 255),)
# Depthwise kernels, [pixels, channels]: 32 fp32 accumulators per thread, half as many if elements do not share addresses.
DIRECT = (Tile(64, 64, 1, 4, 3), Tile(128, 32, 1, 4, 3), Tile(256, 16, 1, 4, 3))
DIRECT_NARROW = (Tile(64, 32, 1, 4, 3), Tile(128, 16, 1, 4, 3))
DIRECT_64 = (Tile(32, 32, 1, 4, 3), Tile(64, 16, 1, 4, 3))
DIRECT_WGRAD = (Tile(3, 64, 32, 4, 2), Tile(3, 32, 64, 4, 2))  # taps, channels, pixels
DIRECT_WGRAD_64 = (Tile(1, 32, 32, 4, 2),)
# Strip kernels. Where channels are contiguous, a thread owns 16 bytes of channels of one strip. Six columns are for a dgrad of
# stride three. fp64 would need too many registers.
STRIP_16 = (Tile(16, 64, 1, 4, 1, 255, 8), *(Tile(32, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_32 = (Tile(8, 64, 1, 4, 1, 255, 8), *(Tile(16, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_FLIP = tuple(Tile(64, 4, 1, 4, 1, 255, columns) for columns in (8, 6))
STRIP_WGRAD_16 = (Tile(1, 64, 16, 4, 1, 255, 8), *(Tile(rows, 32, 32, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_32 = (Tile(1, 64, 8, 4, 1, 255, 8), *(Tile(rows, 32, 16, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_FLIP = (Tile(1, 4, 64, 4, 1, 255, 8), Tile(3, 4, 64, 4, 1, 255, 8))
# The tensor memory accelerator writes to shared memory without using registers, which leaves room for more accumulators.
TMA_16 = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4))
# wgrad needs dy's box transposed on its way to the tensor cores, which wgmma does for 16-bit elements only.
TMA_WGRAD_16 = (
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
TMA_32 = (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4))
BIAS = (Tile(1, 64, 64, 4, 3),)
# Copies of 8 KiB by itemsize. Unless channels are few, both the load and the store access runs of 128 bytes or more.
STAGE = {size: tuple(Tile(8192 // size // n, n, 1, 4, 1) for n in (64, 32, 16, 8, 4)) for size in (2, 4, 8)}
# (kernel, tile) pairs that spill registers, by generation of the device. Before Hopper, tensor cores read their operands from
# registers, which leaves fewer for accumulators.
SPILLING = {
    8: {  # A100, sm_80
        *((kernel, tile) for kernel in ("gather", "wgrad") for tile in (*GEMM_16[:2], GEMM_16[3], GEMM_16[5])),
        *(("wgrad", tile) for tile in (GEMM_32[0], GEMM_32[1], GEMM_32[3], GEMM_16[6])),
        ("gather", GEMM_16[6]),
        ("gather", GEMM_32[1]),
        ("depthwise", DIRECT_NARROW[1]),
        ("packed", PACKED_16[1]),
        ("packed_wgrad", PACKED_WGRAD_16[2]),
    },
    10: {  # B200, sm_100
        *(("wgrad", tile) for tile in (GEMM_16[3], GEMM_16[5], GEMM_64[0])),
        *(("gather", tile) for tile in (GEMM_16[4], GEMM_16[6], GEMM_16[7], GEMM_32[3])),
        *(("packed", tile) for tile in PACKED_16[2:]),
        ("packed_wgrad", PACKED_WGRAD_16[1]),
    },
}
# Pairs that spill but cannot be left out without a predicted loss of speed, and the tile that replaces each. ptxas spills a few
# registers of some variants to fit one more program, but not if it is given a limit. AMD's wavefronts are twice as wide, so
# fewer are needed.
INSTEAD = {
    0: {  # AMD
        ("gather", FMA_32_NARROW[0]): replace(FMA_32_NARROW[0], warps=4),
        ("packed", PACKED_32[1]): replace(PACKED_32[1], warps=4),
    },
    8: {  # A100, sm_80
        ("gather", GEMM_16[4]): replace(GEMM_16[4], registers=255),
        ("packed", PACKED_16[3]): replace(PACKED_16[3], registers=96),
        ("packed_wgrad", PACKED_WGRAD_16[1]): replace(PACKED_WGRAD_16[1], registers=255),
    },
    10: {  # B200, sm_100
        ("gather", GEMM_16[2]): replace(GEMM_16[2], registers=255),
        **{(kernel, GEMM_32[1]): replace(GEMM_32[1], registers=255) for kernel in ("gather", "wgrad")},
        ("gather", FMA_32[0]): replace(FMA_32[0], registers=168),
        ("gather", FMA_32_NARROW[0]): replace(FMA_32_NARROW[0], registers=240),
        ("wgrad", GEMM_32_NARROW[0]): replace(GEMM_32_NARROW[0], registers=168),
        ("packed", PACKED_16[0]): replace(PACKED_16[0], registers=128),
    },
}


def can_cut(device: Device) -> bool:
    """Returns True if the device may compute fp32 products in BF16X6."""
    return device.interpreted or device.generation == 9


def tiles(kernel: str, access: Access, device: Device) -> tuple[Tile, ...]:
    """Returns the tiles that the planner may consider for a kernel on a GPU. `why_illegal` then rules out some of them."""
    instead = INSTEAD.get(device.generation, {})
    return tuple(instead.get((kernel, tile), tile) for tile in _tiles(kernel, access))


def _tiles(kernel: str, access: Access) -> tuple[Tile, ...]:
    itemsize, tensor_cores, narrow = access.itemsize, access.tensor_cores, access.narrow
    if kernel == "strip":
        return () if itemsize == 8 else STRIP_FLIP if access.flip else STRIP_16 if itemsize == 2 else STRIP_32
    if kernel == "strip_wgrad":
        if access.flip:  # fp32 has registers for one filter row only
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
    """Returns why a kernel cannot run with a tile on a device, or None. The planner, forced plans and tests all ask here."""
    if any(v <= 0 or v & (v - 1) for v in (tile.n, tile.k, tile.warps)) or tile.stages < 1:
        return f"tile {tile}: extents and warps must be powers of two"
    if tile.m <= 0 or (kernel not in ("depthwise_wgrad", "strip_wgrad") and tile.m & (tile.m - 1)):
        return f"tile {tile}: extents and warps must be powers of two"
    if not 1 <= tile.columns <= (8 if kernel.startswith("strip") else 1):
        return f"tile {tile}: so many columns are not for {kernel}"
    if max(tile.m * tile.n, tile.n * tile.k, tile.m * tile.k) > MAX_TILE:
        return f"tile {tile}: more than {MAX_TILE} elements in a block"
    if kernel in TMA_KERNELS and not device.interpreted:
        if device.generation < 9:
            return f"{device.name} has no tensor memory accelerator"
        if kernel == "tma_wgrad" and (itemsize > 2 or min(tile.m, tile.n) < 64):
            return f"tile {tile}: wgmma turns an operand of 2 bytes an element only, and wants 64 rows"
        if itemsize == 8 or tile.n < 64:
            return f"tile {tile}: wgmma wants 64 channels written and no more than 4 bytes an element"
    if kernel in ("gather", "wgrad", "packed", "packed_wgrad", *TMA_KERNELS):
        if min(tile.m, tile.n, tile.k) < 16:
            return f"tile {tile}: tl.dot needs at least 16 in each extent"
        shared = tile.stages * (tile.m + tile.n) * tile.k * itemsize
        if shared > device.shared_bytes:
            return f"tile {tile}: {shared} bytes of shared memory, {device.name} has {device.shared_bytes}"
    if (kernel, tile) in SPILLING.get(device.generation, ()):
        return f"tile {tile}: {kernel} spills registers on {device.name}"
    return None
