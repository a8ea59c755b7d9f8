"""kernels/patch.py, dgrad of patches that do not overlap as one matrix product, as the planner and the launcher see it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from tconv.planning.family import Spills
from tconv.planning.gemm import Gemm
from tconv.planning.operands import PatchPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Access, Tile


class Patch(Gemm):
    """A product of [pixels of dy, reduced channels] by [reduced channels, columns]: the channels of every tap.

    The planner is given the problem in that form, as of one tap (planning/operands.py `PatchPass`).
    """

    name = "patch"
    passes = ("dgrad",)
    weight_stays = True
    base, copy, one = 40, 6, 4
    around = (340, 14, 6)
    spills: ClassVar[Spills] = {8: (Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3))}

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        found = () if access.narrow else super().tiles(access)
        if not access.epilogue:
            return found
        # An epilogue's steps take registers. Of numbers per channel there is one for each element, since a channel's columns
        # may lie anywhere in a tile.
        most = 64 * 64 if access.epilogue.per_channel or access.epilogue.tensors > 1 else 128 * 128
        return tuple(tile for tile in found if tile.m * tile.n <= most)

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        columns, reduced = self.channels(p, pass_)
        n, k = pow2(columns, 16, 1024), pow2(reduced, 16, 256)
        return (Tile(pow2(p.N * math.prod(p.X), 16, (1 << 18) // max(n, k)), n, k),)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return math.ceil(p.N * math.prod(p.X) / tile.m) * math.ceil(self.channels(p, pass_)[0] / tile.n) * p.G

    def arguments(self, c: PatchPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        return c.columns(), {
            "X_VEC": c.x_vec, "X_PIXELS": c.pixels_x, "Y_VEC": c.line_vec, "JOINED": c.joined, "EVEN": c.ci % tile.k == 0,
            "WIDE": c.far(tile),
        }  # fmt: skip
