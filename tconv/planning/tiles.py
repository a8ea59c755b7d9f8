"""Block extents and launch options of a kernel, and how a kernel accesses its operands."""

from __future__ import annotations

from dataclasses import dataclass

from tconv.planning.device import Device
from tconv.planning.epilogue import NONE, Epilogue

BF16X6 = "bf16x6"  # a precision: fp32 as three bf16, and six of their nine products (kernels/common.py `product`)


@dataclass(frozen=True)
class Tile:
    """Block extents and launch options.

    The meaning of m, n and k depends on the kernel:

        gather, tma, persistent    pixels, written channels, reduced channels
        patch               pixels of dy, written channels of all taps, reduced channels
        packed              pixels, written channels of a pack of groups, taps times reduced channels of the pack
        wgrad, tma_wgrad, persistent_wgrad    output channels, input channels, pixels
        rows                pixels read, taps of the last dimension times written channels, reduced channels
        packed_wgrad        output channels of a pack, taps times input channels of the pack, pixels
        depthwise           pixels, channels, 1
        depthwise_wgrad     taps, channels, pixels
        strip               strips, channels, 1
        strip_wgrad         rows of the filter, channels, strips
        bias                1, channels, pixels
        copy, normalise     pixels, channels, 1

    Attributes:
        m, n, k: block extents.
        warps: warps per program.
        stages: stages of the main loop's software pipeline.
        registers: limit of registers per thread on NVIDIA. 0 leaves it to ptxas, which sometimes spills a few registers to
            fit one more program on a multiprocessor.
        columns: neighbouring outputs that a thread of a strip kernel computes; of rows, the pixels to whose multiples its tiles
            are aligned along the last dimension, so that x can be read along it.
        extra: written channels of a second block, with an accumulator of its own (gather); 0 if there is one block.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    registers: int = 0
    columns: int = 1
    extra: int = 0

    @property
    def across(self) -> int:
        """The extent of n over both blocks."""
        return self.n + self.extra

    def __str__(self) -> str:
        n = f"({self.n}+{self.extra})" if self.extra else self.n
        limit = f" r{self.registers}" if self.registers else ""
        columns = f" c{self.columns}" if self.columns > 1 else ""
        return f"{self.m}x{n}x{self.k} w{self.warps} s{self.stages}{limit}{columns}"


@dataclass(frozen=True)
class Access:
    """How a kernel accesses its operands.

    Attributes:
        itemsize: bytes of an element.
        tensor_cores: True if tensor cores may compute the products in the precision asked for.
        narrow: True if some operand is accessed element by element. Such loads are not pipelined either.
        flip: True if x has no contiguous channels; usually its columns are contiguous. For kernels that ask for it.
        room: the most elements of a tile's accumulators for which the accesses leave enough registers.
        precision: BF16X6, or empty for the precision of the data type and torch's flag.
        epilogue: what is done with the result before it is written.
        written: bytes of an element of the result; 0 if those are as many.
    """

    itemsize: int
    tensor_cores: bool
    narrow: bool = False
    flip: bool = False
    room: int = 256 * 128
    precision: str = ""
    epilogue: Epilogue = NONE
    written: int = 0


def can_cut(device: Device) -> bool:
    """Returns True if the device may compute fp32 products in BF16X6."""
    return device.interpreted or device.generation == 9
