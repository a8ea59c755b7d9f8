"""kernels/rows.py, fprop and dgrad with few written channels, as the planner and the launcher see it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from tconv.planning.addressing import LIMIT
from tconv.planning.cost import phase_taps, pixel_extents
from tconv.planning.device import Device
from tconv.planning.family import Instead
from tconv.planning.gemm import Gemm
from tconv.planning.operands import GatherPass, Operands
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import BF16X6, Access, Tile

MOST = 32  # columns of the product
FIELD = 16  # the most taps of an outer dimension: the bits of a mask
PIXELS = 8  # 16-bit pixels in 16 bytes
WIDTHS = (16, 32)
ROWS_16 = tuple(
    tile for n in WIDTHS for tile in (Tile(128, n, 64, 4, 3), Tile(256, n, 64, 8, 3), Tile(256, n, 32, 8, 4))
)  # fmt: skip
ROWS_32 = tuple(Tile(128, n, 32, 4, 3) for n in WIDTHS)
ROWS_NARROW = tuple(Tile(64, n, 32, 4, 2) for n in WIDTHS)
FMA_32 = tuple(Tile(64, n, 16, 4, 2) for n in WIDTHS)
ROWS_64 = tuple(Tile(64, n, 16, 8, 2) for n in WIDTHS)
PIECES_32 = tuple(Tile(64, n, 32, 4, 2) for n in WIDTHS)


class Rows(Gemm):
    """A GEMM of [pixels read, reduced channels] by [reduced channels, taps of the last dimension times written channels]."""

    name = "rows"
    passes = ("fprop", "dgrad")
    cuts = True
    columns = PIXELS
    base, copy, one = 50, 8, 3
    around = (520, 19, 48)
    cut = 10
    instead: ClassVar[Instead] = {
        8: {
            Tile(256, 16, 32, 8, 4, columns=PIXELS): Tile(256, 16, 32, 8, 4, 255, columns=PIXELS),
            Tile(64, 16, 16, 4, 2): Tile(64, 16, 16, 4, 2, 255),
        },
        10: {
            Tile(64, 16, 16, 4, 2): Tile(64, 16, 16, 4, 2, 255),
            Tile(64, 16, 32, 4, 2): Tile(64, 16, 32, 4, 2, 255),
        },
    }

    def unfit(self, p: ConvProblem, pass_: str) -> str | None:
        if p.G > 1:
            return "takes no groups"
        if pass_ == "fprop" and p.S[2] > 1:
            return "takes no strides along the last dimension in fprop"
        if max(p.T[:2]) > FIELD:
            return f"takes at most {FIELD} taps along a dimension before the last one"
        columns = math.prod(self.layout(p, pass_))
        return f"takes {MOST} taps of the last dimension times written channels, not {columns}" if columns > MOST else None

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        return p.T[2] > 1 and not self.unfit(p, pass_)

    def layout(self, p: ConvProblem, pass_: str) -> tuple[int, int, int]:
        """Returns what the columns of the product are: (taps per phase, phases, written channels), in powers of two.

        Taps and phases are those of the last dimension.
        """
        transposed = pass_ == "dgrad"
        stride = p.S[2] if transposed else 1
        taps = math.ceil(p.T[2] / (stride // math.gcd(stride, p.D[2])))
        phases, channels = pow2(stride, 1, 1 << 20), pow2(self.channels(p, pass_)[0], 1, 1 << 20)
        return pow2(taps, max(1, 16 // (phases * channels)), 1 << 20), phases, channels

    def run(self, p: ConvProblem, pass_: str, tile: Tile) -> tuple[int, int, int]:
        """Returns (span, step, low) of the kernel: a run's length, the distance of tiles, and the first pixel that a run reads.

        All three are multiples of `tile.columns`. The step is not positive if the tile is no longer than the halo.
        """
        stride = p.S[2] if pass_ == "dgrad" else 1
        taps = [t * p.D[2] - p.P[2] for t in range(p.T[2])]
        # In dgrad, tap t reads for written pixel q*S + a, where a is its phase, the pixel q + (a + P - t*D) / S.
        shifts = [(tap % stride - tap) // stride for tap in taps] if pass_ == "dgrad" else taps
        columns = tile.columns
        low = min(shifts) // columns * columns
        halo = max(shifts) - low
        span = math.ceil((pixel_extents(p, pass_)[3] + halo) / columns) * columns
        return span, (tile.m - halo) // columns * columns, low

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        columns = math.prod(self.layout(p, pass_))
        if tile.n != columns:
            return f"tile {tile}: the taps and written channels need {columns} columns"
        if self.run(p, pass_, tile)[1] <= 0:
            return f"tile {tile}: the taps of the last dimension reach further than its pixels"
        return None

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        if access.precision == BF16X6:
            return PIECES_32
        if access.itemsize == 8:
            return ROWS_64
        if access.itemsize == 4 and not access.tensor_cores:
            return FMA_32
        if access.narrow:
            return ROWS_NARROW
        if access.itemsize == 4:
            return ROWS_32
        return tuple(dataclasses.replace(tile, columns=PIXELS) for tile in ROWS_16) if access.flip else ROWS_16

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        n, k = math.prod(self.layout(p, pass_)), pow2(self.channels(p, pass_)[1], 16, 256)
        span, _, _ = self.run(p, pass_, Tile(1, n, k))
        pixels = math.prod(pixel_extents(p, pass_)[:3]) * span + span
        return (Tile(pow2(pixels, 16, (1 << 18) // max(n, k)), n, k),)

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        apart = operands.pack_narrow(1) if operands.pack_narrow else operands.narrow
        along = apart and operands.along > 1
        return dataclasses.replace(operands.access(apart and not along, precision), flip=along)

    def phases(self, p: ConvProblem, pass_: str) -> int:
        return 1  # those of outer dimensions run next to each other

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        span, step, _ = self.run(p, pass_, tile)
        return math.ceil(math.prod(pixel_extents(p, pass_)[:3]) * span / step) * self._outer(p, pass_).phases(pass_)

    def steps(self, p: ConvProblem, pass_: str, tile: Tile, splits: int) -> int:
        outer = self._outer(p, pass_)
        tiles = self.programs(p, pass_, tile) // outer.phases(pass_)
        return tiles * sum(phase_taps(outer, pass_)) * math.ceil(self.channels(p, pass_)[1] / tile.k)

    def _outer(self, p: ConvProblem, pass_: str) -> ConvProblem:
        """Returns the problem as the loop sees it, with one tap along the last dimension."""
        return dataclasses.replace(p, T=(*p.T[:2], 1), S=(*p.S[:2], 1), D=(*p.D[:2], 1))

    def loads(self, p: ConvProblem, tile: Tile, access: Access) -> float:
        # The weight is read element by element, or in loops that are about as long.
        x, w = (extent * tile.k / (32 * tile.warps) for extent in (tile.m, tile.n))
        return self.base + w * self.one + x * (self.one if access.narrow else self.copy * access.itemsize / 16)

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        p, (span, step, low) = c.p, self.run(c.p, c.pass_, tile)
        _, phases, channels = self.layout(p, c.pass_)
        positions = math.prod(pixel_extents(p, c.pass_)[:3]) * span + tile.m
        integers = {"span": span, "step": step, "low": low, "phases": self._outer(p, c.pass_).phases(c.pass_)}
        return integers, {
            "X_VEC": c.x_vec, "X_PIXELS": min(c.row_x, tile.columns), "PHASES": phases, "CHANNELS": channels,
            "EVEN": c.ci % tile.k == 0,
            "WIDE": max(c.x.reach + c.x.halo(p), c.y.reach, positions) > LIMIT,
        }  # fmt: skip
