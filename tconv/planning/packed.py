"""kernels/packed.py, implicit GEMMs over taps times few channels, as the planner and the launcher see them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from tconv.planning.cost import phase_pixels, phase_taps, pixel_tiles
from tconv.planning.device import Device
from tconv.planning.family import Instead, Spills
from tconv.planning.gemm import FMA_32, PIECES_32_NARROW, Advancing, Gemm
from tconv.planning.operands import GatherPass, Operands, WgradPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.simplify import FEW
from tconv.planning.tiles import BF16X6, Access, Tile

MOST_COLUMNS = 1 << 15  # the most taps times reduced channels of a pack that the packed kernel can decode
FIELD = {1: 31, 2: 15, 3: 10}  # as in gather.py, with one bit reserved
# With element-by-element loads, tiles of 128 pixels by 16 or 32 channels spill.
PACKED_16 = (Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 32, 64, 8, 3), Tile(128, 16, 64, 8, 3))
PACKED_WGRAD_16 = (
    Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), *(Tile(m, 128, 64, 8, 3) for m in (16, 32, 64)),
)  # fmt: skip
PACKED_WGRAD_16_NARROW = (Tile(64, 64, 64, 8, 3), Tile(16, 64, 64, 8, 3))
PACKED_32 = (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2))
PACKED_64 = (Tile(32, 32, 16, 8, 2, 255),)
REPEATED = 5  # instructions per address and dimension for the coordinate of an element that stands beyond x


class _Packed(Gemm):
    """What the two packed kernels share. They mask every element."""

    cuts = True
    one = 9
    waiting = 2.0
    few = FEW  # up to so many channels per group count as few

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        few = min(p.C, p.K) <= self.few * p.G and (p.taps > 1 or p.G > 1)
        return few and not p.depthwise and not self.unfit(p, pass_)

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        if access.precision == BF16X6:
            return PIECES_32_NARROW
        if access.itemsize == 2:
            return self.tiles_16(access.narrow)
        found = PACKED_64 if access.itemsize == 8 else PACKED_32 if access.tensor_cores else FMA_32[1:]
        return found[:1] if access.narrow else found

    def tiles_16(self, narrow: bool) -> tuple[Tile, ...]:
        """Returns the tiles for 16-bit elements."""
        raise NotImplementedError

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        best = self.access(operands, p, pass_, None, precision)
        every = dict.fromkeys((*self.tiles_on(best, device), *self.tiles_on(replace(best, narrow=True), device)))
        met = {tile: self.access(operands, p, pass_, tile, precision) for tile in every}
        return tuple(tile for tile in every if tile in self.tiles_on(met[tile], device))

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        if operands.pack_narrow:
            return operands.access(tile is not None and operands.pack_narrow(pack(p, pass_, tile)), precision)
        return operands.access(operands.narrow or p.depthwise, precision)


class Packed(_Packed):
    """An implicit GEMM whose reduced axis is taps times channels of a pack of groups. It also decodes every column."""

    name = "packed"
    passes = ("fprop", "dgrad")
    borders = ("fprop",)
    base, copy = 120, 10
    around = (510, 91, 0)
    cut = 10
    spills: ClassVar[Spills] = {
        8: (Tile(128, 64, 64, 8, 3),),
        10: (
            Tile(128, 32, 64, 8, 3),
            Tile(128, 16, 64, 8, 3),
        ),
    }
    instead: ClassVar[Instead] = {
        0: {Tile(64, 32, 32, 8, 2): Tile(64, 32, 32, 4, 2)},
        8: {Tile(128, 16, 64, 8, 3): Tile(128, 16, 64, 8, 3, 96)},
        10: {Tile(64, 64, 64, 8, 3): Tile(64, 64, 64, 8, 3, 128)},
    }

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        # Groups of more channels, but less than 64: in steps of 64 channels of one tap some are empty, in steps of taps times
        # channels none.
        grouped = p.G > 1 < p.taps and FEW < self.channels(p, pass_)[1] < 2 * FEW
        return super().considered(p, pass_) or (grouped and not self.unfit(p, pass_))

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        pixels = tile.m * tile.k * access.itemsize / 8 / (32 * tile.warps)  # whose address a thread works out
        return super().length(p, pass_, tile, access) + REPEATED * pixels * p.repeated

    def unfit(self, p: ConvProblem, pass_: str) -> str | None:
        return self._uncountable(p, pass_, 1)

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        return self._uncountable(p, pass_, pack(p, pass_, tile))

    def _uncountable(self, p: ConvProblem, pass_: str, groups: int) -> str | None:
        """Returns why `quotient` (kernels/common.py) cannot decode GEMM_K's columns of a pack of so many groups, or None."""
        if groups * self.channels(p, pass_)[1] * p.taps <= MOST_COLUMNS:
            return None
        return f"counts at most {MOST_COLUMNS} taps times channels"

    def tiles_16(self, narrow: bool) -> tuple[Tile, ...]:
        return PACKED_16[:1] if narrow else PACKED_16

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        written, _ = self.channels(p, pass_)
        n, k = pow2(min(written * p.G, max(written, 64)), 16, 1024), 256
        return (Tile(pow2(phase_pixels(p, pass_), 16, (1 << 18) // max(n, k)), n, k),)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        groups = pack(p, pass_, tile)
        columns = math.ceil(groups * self.channels(p, pass_)[0] / tile.n)
        return pixel_tiles(p, pass_, tile.m) * columns * math.ceil(p.G / groups)

    def steps(self, p: ConvProblem, pass_: str, tile: Tile, splits: int) -> int:
        reduced = self.channels(p, pass_)[1] * pack(p, pass_, tile)
        per_phase = self.programs(p, pass_, tile) // p.phases(pass_)
        return per_phase * sum(math.ceil(taps * reduced / tile.k) for taps in phase_taps(p, pass_))

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        p, groups = c.p, pack(c.p, c.pass_, tile)
        x_vec, y_vec = c.pack_vectors(groups)
        return {"PACK": groups}, {
            "X_VEC": x_vec, "Y_VEC": y_vec, "Y_PIXELS": c.pixels_y, "PACKED": groups > 1,
            "FIELD": 0 if max(p.T) > FIELD[p.rank] or "zeros" not in p.borders[-p.rank :] else FIELD[p.rank],
        }  # fmt: skip


class PackedWgrad(Advancing, _Packed):
    """A GEMM of [output channels of a pack, pixels] by [pixels, taps times input channels of the pack]."""

    name = "packed_wgrad"
    passes = ("wgrad",)
    splittable = True
    apart, base, copy = 50, 100, 14
    cut = 20
    waiting = 3.0
    few = 2 * FEW  # its tiles are up to 128 wide, two taps of so many channels
    around = (660, 34, 3)
    spills: ClassVar[Spills] = {
        8: (Tile(16, 128, 64, 8, 3),),
        10: (Tile(128, 64, 64, 8, 3),),
    }
    instead: ClassVar[Instead] = {
        8: {Tile(128, 64, 64, 8, 3): Tile(128, 64, 64, 8, 3, 255)},
    }

    def tiles_16(self, narrow: bool) -> tuple[Tile, ...]:
        return PACKED_WGRAD_16_NARROW if narrow else PACKED_WGRAD_16

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        m, n = pow2(p.K, 16, 256), pow2(p.C * p.taps, 16, 256)
        return (Tile(m, n, pow2(p.gemm("wgrad")[2], 16, (1 << 18) // max(m, n))),)

    def advanced(self, p: ConvProblem, y: float, x: float) -> float:
        # Both operands' pixels are decoded: those of the operand of which a thread has more serve both.
        return (12 + 17 * p.rank) * max(y, x)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        groups = pack(p, pass_, tile)
        rows, columns = groups * p.K // p.G, p.taps * groups * (p.C // p.G)
        return math.ceil(rows / tile.m) * math.ceil(columns / tile.n) * math.ceil(p.G / groups)

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        groups = pack(c.p, "wgrad", tile)
        x_vec, y_vec = c.pack_vectors(groups)
        constants = {"X_VEC": x_vec, "Y_VEC": y_vec, "PACKED": groups > 1, "TURN": tile.m < min(tile.n, 64)}
        return {"PACK": groups}, constants


def pack(p: ConvProblem, pass_: str, tile: Tile) -> int:
    """Returns the groups per pack of a packed kernel: all, or the largest power of two whose written channels fit in the tile.

    At least one. A power of two keeps accesses wide.
    """
    written = p.C // p.G if pass_ == "dgrad" else p.K // p.G
    room = (tile.m if pass_ == "wgrad" else tile.n) // written
    return p.G if room >= p.G else 1 << max(0, room.bit_length() - 1)
