"""kernels/wgrad.py, wgrad as an implicit GEMM, as the planner and the launcher see it."""

from __future__ import annotations

from typing import Any, ClassVar

from tconv.planning.family import Instead, Spills
from tconv.planning.gemm import Advancing, General, weight_tiles
from tconv.planning.operands import WgradPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Tile


class Wgrad(Advancing, General):
    """A GEMM of [output channels, pixels] by [pixels, input channels] for each tap, split over the pixels."""

    name = "wgrad"
    passes = ("wgrad",)
    splittable = True
    borders = ("wgrad",)
    apart, base, copy, one = 30, 110, 14, 4
    around = (560, 32, 2)
    cut = 20
    spills: ClassVar[Spills] = {
        8: (
            Tile(128, 256, 64, 8, 3),
            Tile(256, 128, 64, 8, 3),
            Tile(128, 64, 64, 4, 3),
            Tile(64, 128, 64, 4, 4),
            Tile(128, 32, 32, 4, 4),
            Tile(128, 128, 32, 8, 3),
            Tile(128, 64, 32, 4, 3),
            Tile(64, 128, 32, 4, 3),
        ),
        10: (
            Tile(128, 64, 64, 4, 3),
            Tile(64, 128, 64, 4, 4),
            Tile(64, 32, 16, 8, 2, 255),
        ),
    }
    instead: ClassVar[Instead] = {
        10: {Tile(128, 64, 32, 4, 3): Tile(128, 64, 32, 4, 3, 255), Tile(64, 64, 32, 8, 2): Tile(64, 64, 32, 8, 2, 168)},
    }

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        m, n = pow2(p.K // p.G, 16, 1024), pow2(p.C // p.G, 16, 1024)
        return (Tile(m, n, pow2(p.gemm("wgrad")[2], 16, (1 << 18) // max(m, n))),)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return weight_tiles(p, tile)

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        step = c.y.pixel_stride((c.p.N, *c.p.Y)) if c.y.unit else None
        return {"syp": step or 0}, {
            "X_VEC": c.x_vec, "Y_VEC": c.y_vec, "X_PIXELS": c.pixels_x, "Y_PIXELS": c.pixels_y, "Y_FLAT": step is not None,
        }  # fmt: skip
