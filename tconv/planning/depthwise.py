"""kernels/depthwise.py, depthwise problems without tensor cores, as the planner and the launcher see it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from tconv.planning.cost import Work, phase_pixels, pixel_tiles, split_steps
from tconv.planning.device import Device
from tconv.planning.family import Family, Spills
from tconv.planning.operands import GatherPass, WgradPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Access, Tile

# [pixels, channels]: 32 fp32 accumulators per thread, half as many if elements do not share addresses.
DIRECT = (Tile(64, 64, 1, 4, 3), Tile(128, 32, 1, 4, 3), Tile(256, 16, 1, 4, 3))
DIRECT_NARROW = (Tile(64, 32, 1, 4, 3), Tile(128, 16, 1, 4, 3))
DIRECT_64 = (Tile(32, 32, 1, 4, 3), Tile(64, 16, 1, 4, 3))
DIRECT_WGRAD = (Tile(3, 64, 32, 4, 2), Tile(3, 32, 64, 4, 2))  # taps, channels, pixels
DIRECT_WGRAD_64 = (Tile(1, 32, 32, 4, 2),)


class _Direct(Family):
    """What the two depthwise kernels share."""

    dot = False

    def unfit(self, p: ConvProblem, pass_: str) -> str | None:
        return None if p.depthwise else "needs one input channel per group"

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        return p.depthwise

    def interpreted(self, p: ConvProblem) -> bool:
        return p.depthwise and p.multiplier <= 8  # the interpreter's time grows with the multiplier

    def products(self, tile: Tile) -> int:
        """Returns the products of a program's iteration."""
        raise NotImplementedError

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        return 60 + self.products(tile) / (32 * tile.warps) * (10 if access.narrow else 6)


class Depthwise(_Direct):
    """Every tap's products with a tile of pixels and channels."""

    name = "depthwise"
    passes = ("fprop", "dgrad")
    borders = ("fprop",)
    spills: ClassVar[Spills] = {
        8: (Tile(128, 16, 1, 4, 3),),
    }

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return DIRECT_64 if access.itemsize == 8 else DIRECT_NARROW if access.narrow else DIRECT

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        n = pow2(self.channels(p, pass_)[0], 1, 1024)
        return (Tile(pow2(phase_pixels(p, pass_), 1, (1 << 18) // n), n, 1),)

    def channels(self, p: ConvProblem, pass_: str) -> tuple[int, int]:
        return (p.K if pass_ == "fprop" else p.C), 1

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return pixel_tiles(p, pass_, tile.m) * math.ceil(self.channels(p, pass_)[0] / tile.n)

    def products(self, tile: Tile) -> int:
        return tile.m * tile.n

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        steps = self.programs(p, pass_, tile) // p.phases(pass_) * p.taps * (p.multiplier if pass_ == "dgrad" else 1)
        length = self.length(p, pass_, tile, access)
        return Work(steps, 2 * tile.m * tile.n * tile.k, length, access.itemsize * tile.n * tile.m, 16 // tile.warps)

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        many = c.p.multiplier
        return {"M": many}, {"X_VEC": c.direct_x, "Y_VEC": c.direct_y, "MULTIPLIED": many > 1}


class DepthwiseWgrad(_Direct):
    """Every pixel's products with a tile of taps and channels, split over the pixels."""

    name = "depthwise_wgrad"
    passes = ("wgrad",)
    splittable = True
    borders = ("wgrad",)
    any_rows = True

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return DIRECT_WGRAD_64 if access.itemsize == 8 else DIRECT_WGRAD

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        n = pow2(p.K, 1, 1024)
        return (Tile(min(p.taps, 27), n, pow2(p.gemm("wgrad")[2], 1, (1 << 18) // n)),)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return math.ceil(p.taps / tile.m) * math.ceil(p.K / tile.n)

    def products(self, tile: Tile) -> int:
        return tile.m * tile.k * tile.n

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        steps = self.programs(p, pass_, tile) * split_steps(self.reduction(p, pass_, tile), tile.k, splits)
        fetched = access.itemsize * tile.n * (tile.m + 1) * tile.k
        length = self.length(p, pass_, tile, access)
        return Work(steps, 2 * tile.m * tile.n * tile.k, length, fetched, 16 // tile.warps)

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        many = c.p.multiplier
        constants = {"X_VEC": c.direct_x, "Y_VEC": c.direct_y, "MULTIPLIED": many > 1, "TAPS": tile.m}
        return {"K": c.p.K, "M": many}, constants
