"""kernels/gather.py, fprop and dgrad as an implicit GEMM, as the planner and the launcher see it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from tconv.planning.cost import frames_met, phase_pixels, pixel_tiles
from tconv.planning.device import Device
from tconv.planning.family import Instead, Spills
from tconv.planning.gemm import STEPS_OF_32, General, Stepping
from tconv.planning.operands import GatherPass, Operands, chunk, streaming
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Access, Tile

FILLED = 2  # fprop and dgrad are not split if they have at least so many waves: little of the device is idle then
FIELD = {1: 32, 2: 16, 3: 10}  # by rank: taps per dimension whose masks fit in one 32-bit word per pixel
SHARING = Tile(128, 128, 64, 8, 3)  # two programs share a multiprocessor, which holds one of four stages
# The same where it takes more than the 128 registers that two programs have. It then spills some before and after its loop.
LIMITED = replace(SHARING, registers=128)
# For 320 channels and multiples, in one tile. Where results are written in channels last it spills outside its loop.
WIDEST = Tile(128, 256, 64, 8, 3, extra=64)
SPILLED = 100  # instructions of a warp for what LIMITED and WIDEST spill: up to 250 in code compiled for sm_90
NARROW_APART = Tile(256, 32, 32, 8, 3)  # for 16-bit elements loaded one by one, from tensors whose pixels are contiguous
# For 192 written channels, 320 and 96, of which powers of two leave a sixth or a quarter empty.
TWO_BLOCKS = (
    Tile(128, 128, 64, 8, 4, extra=64), Tile(128, 128, 64, 8, 4, extra=32), Tile(256, 64, 64, 8, 3, extra=32),
    Tile(256, 64, 32, 8, 6, extra=32),
)  # fmt: skip
# For 32 written channels: the loop's instructions serve twice as many pixels as in 128x32x32.
MANY_PIXELS = (Tile(256, 32, 64, 8, 3), Tile(256, 32, 32, 8, 4))
REPEATED = 4  # instructions per pixel and dimension for the coordinate of an element that stands beyond x
NARROW = Tile(64, 32, 16, 8, 2, 128)  # for true fp32 with element-by-element loads, where four warps spill


class Gather(Stepping, General):
    """An implicit GEMM of [pixels, reduced channels] by [reduced channels, written channels], tap by tap."""

    name = "gather"
    passes = ("fprop", "dgrad")
    fp8 = True
    splittable = True
    two_blocks = True
    borders = ("fprop",)
    streams = True
    hopper_16 = (*STEPS_OF_32, *TWO_BLOCKS, *MANY_PIXELS)
    base, copy, one = 50, 8, 4
    around = (540, 58, 2)
    cut = 10
    fma_narrow = (NARROW,)
    spills: ClassVar[Spills] = {
        8: (
            Tile(128, 256, 64, 8, 3),
            Tile(256, 128, 64, 8, 3),
            Tile(128, 64, 64, 4, 3),
            Tile(64, 128, 64, 4, 4),
            Tile(128, 32, 32, 4, 4),
            Tile(128, 64, 32, 4, 3),
        ),
        10: (
            Tile(64, 64, 64, 4, 4),
            Tile(128, 32, 32, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 128, 32, 4, 3),
        ),
    }
    instead: ClassVar[Instead] = {
        0: {Tile(64, 32, 16, 8, 2, 128): Tile(64, 32, 16, 4, 2, 128)},
        8: {Tile(64, 64, 64, 4, 4): Tile(64, 64, 64, 4, 4, 255)},
        10: {
            Tile(128, 128, 64, 8, 4): Tile(128, 128, 64, 8, 4, 255),
            Tile(128, 64, 32, 4, 3): Tile(128, 64, 32, 4, 3, 255),
            Tile(64, 64, 16, 4, 2, 255): Tile(64, 64, 16, 4, 2, 168),
            Tile(64, 32, 16, 8, 2, 128): Tile(64, 32, 16, 8, 2, 240),
        },
    }

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        access = super().access(operands, p, pass_, tile, precision)
        # With a state's pointers beside those of x, the tile for such tensors spills.
        return replace(access, flip=operands.strips is not None and operands.strips[0] and not p.streamed)

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        found = super().tiles(access)
        if access.itemsize != 2:
            return found
        if not access.narrow:
            if not access.epilogue:
                return (*found, SHARING)
            # The widest tile spills with an activation. SHARING, with a limit, does so only after its loop, unless it reads a
            # residual.
            sharing = () if access.epilogue.tensors else (LIMITED,)
            return (*(tile for tile in found if tile.n <= 128), *sharing)
        return (*found, NARROW_APART) if access.flip else found

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        found = super().tiles_for(operands, p, pass_, device, precision)
        # With coordinates that repeat x, two programs no longer have the registers to share a multiprocessor.
        found = tuple(tile for tile in found if tile not in (SHARING, LIMITED)) if p.repeated else found
        if device.generation != 9 or operands.itemsize != 2:
            return found
        written, reduced = self.channels(p, pass_)
        # With masks of many taps, or where a thread copies less than 8 channels at a time, some would spill in the loop.
        spare = not (p.repeated or reduced % 8 or max(p.T) > FIELD[p.rank])
        if p.rank == 3 or (p.rank == 2 and pass_ == "dgrad"):
            found = tuple(LIMITED if tile == SHARING else tile for tile in found if spare or tile != SHARING)
        room = operands.room >= 256 * 128 and not (operands.narrow or operands.epilogue)
        return (*found, WIDEST) if spare and room and written > WIDEST.n else found

    def outside(self, p: ConvProblem, tile: Tile, access: Access) -> float:
        return super().outside(p, tile, access) + SPILLED * (tile in (LIMITED, WIDEST))

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        pixels = tile.m * tile.k * access.itemsize / 16 / (32 * tile.warps)  # whose address a thread works out
        return super().length(p, pass_, tile, access) + REPEATED * pixels * p.repeated

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        if tile.extra and itemsize != 2 and not device.interpreted:
            return f"tile {tile}: a second block is for elements of 16 bits"
        return super().why_unsupported(tile, itemsize, device)

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        written, reduced = self.channels(p, pass_)
        n, k = pow2(written, 16, 1024), pow2(reduced, 16, 256)
        return (Tile(pow2(phase_pixels(p, pass_), 16, (1 << 18) // max(n, k)), n, k),)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return pixel_tiles(p, pass_, tile.m) * math.ceil(self.channels(p, pass_)[0] / tile.across) * p.G

    def splits(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> bool:
        # With the largest tiles there are no registers left for the offsets of a split's slice.
        few = self.programs(p, pass_, tile) < FILLED * device.units
        return few and tile.m * tile.across <= 128 * 128 and not device.interpreted

    def steps(self, p: ConvProblem, pass_: str, tile: Tile, splits: int) -> int:
        steps = super().steps(p, pass_, tile, splits)
        if pass_ == "dgrad" and tile.m * math.prod(p.S[1:]) <= math.prod(p.X[1:]):
            return math.ceil(steps * frames_met(p))
        return steps

    def warps(self, access: Access) -> int:
        return 8 if access.precision else 16

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        split = splits > 1
        # Without splits, "sys" is unused and set to 0: y.numel may exceed 32 bits, which would compile another kernel.
        beside, streams = streaming(c)
        integers = {"chunk": chunk(c.ci, tile.k, splits), "sys": c.y.numel if split else 0, **beside}
        return integers, {
            "X_VEC": c.x_vec, "Y_VEC": c.y_vec, "X_PIXELS": c.pixels_x, "Y_PIXELS": c.pixels_y,
            "EVEN": c.ci % tile.k == 0, "SPLIT": split, "EXTRA": tile.extra,
            # Whether a tile meets a frame depends on the other images in it.
            "FRAMES": c.transposed and c.p.rank == 3 and not c.batch_invariant,
            "FIELD": 0 if max(c.p.T) > FIELD[c.p.rank] or "zeros" not in c.p.borders[-c.p.rank :] else FIELD[c.p.rank],
            **streams,
        }  # fmt: skip
