"""The bias gradient and the copy to channels last: kernels that multiply nothing, each with one kind of tile."""

from __future__ import annotations

from tconv.planning.family import Family
from tconv.planning.tiles import Access, Tile

BIAS = (Tile(1, 64, 64, 4, 3),)
# Copies of 8 KiB by itemsize. Unless channels are few, both the load and the store access runs of 128 bytes or more.
COPY = {size: tuple(Tile(8192 // size // n, n, 1, 4, 1) for n in (64, 32, 16, 8, 4)) for size in (1, 2, 4, 8)}


class Bias(Family):
    """Sums of the pixels of each channel, split over the pixels."""

    name = "bias"
    passes = ("bias",)
    dot = False
    splittable = True

    @property
    def kernel(self) -> tuple[str, str]:
        return "reduce", "sum_pixels"

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return BIAS
