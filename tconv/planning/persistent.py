"""kernels/persistent.py, programs that stay for many tiles and whose warps are specialised, as the planner and the launcher
see it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from tconv.planning.cost import Work
from tconv.planning.device import Device
from tconv.planning.epilogue import Epilogue
from tconv.planning.family import Boxes, Family, Instead
from tconv.planning.operands import GatherPass, Operands, WgradPass
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import Access, Tile
from tconv.planning.tma import APART, Tma, TmaWgrad, weight_box

SPECIALISED = "specialised"  # the mechanism: warps that part, a ring that mbarriers hand over
# Stages are slots of the ring. Beside the result's boxes there is room for so many. Eight warps share a tile. Of four, another
# four have the next one.
PERSISTENT_16 = (
    Tile(256, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 6),
    Tile(128, 128, 64, 4, 5), Tile(256, 64, 64, 4, 4), Tile(128, 64, 64, 4, 7),
)  # fmt: skip
# A weight gradient is stored from registers, which leaves room for a slot more.
PERSISTENT_WGRAD_16 = (Tile(256, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 6))
# Activations with next to no numbers between argument and result.
SHORT = ("", "relu", "leaky_relu")
WARPS = 8  # of the two warpgroups that multiply; the one that fetches comes on top
ROWS = 16  # channels that each warp of a tile multiplies at once
# Seconds between the main loops of two tiles of a program, not timed. Its instructions take 0.5 us: 450 of each warp, counted
# for sm_90.
TURN = 1.4e-6
# The same where warpgroups take tiles by turns, and the end of a tile passes beside the next one's loop; a guess as well.
HANDOVER = 0.1e-6


class _Persistent(Family):
    """What the kernels have in common whose programs stay on their multiprocessor for many tiles.

    They have not been timed, so the model is slow to prefer them: products are taken to last as long as tma's, although nobody
    waits while boxes are asked for. What the model grants, besides fewer instructions in the loop, is that the next tile's
    boxes arrive while a tile is stored: each tile after a program's first costs TURN rather than tma's start and end. The first
    one costs a microsecond more, or one and a half in fprop and dgrad. `start`, TURN and HANDOVER are guesses.
    """

    gluon = True
    instead: ClassVar[Instead] = {}

    def mechanism(self, precision: str) -> str:
        return SPECIALISED

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        return ()

    def grid(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, device: Device) -> int:
        return min(device.units, self.programs(p, pass_, tile) * splits)

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        counted = super().work(p, pass_, tile, splits, access, device)
        turn, beside = (TURN, 0.0) if tile.warps == WARPS else (HANDOVER, TURN)
        return dataclasses.replace(counted, resident=1, turn=turn, beside=beside)


class Persistent(_Persistent, Tma):
    """`tma` with a program per multiprocessor, which stays for many tiles, and a warp that does nothing but fetch boxes.

    It is preferred from about three tiles per multiprocessor on. Where warpgroups take tiles by turns, only what is longer
    than the next tile's loop is seen of a tile's end. But a tile is then of half the pixels by channels. For each product more
    is fetched and more is read from shared memory, whose bandwidth bounds products of 64 channels (`shared_bytes`). So it is
    for short loops, of a dozen steps or so.
    """

    name = "persistent"
    passes = ("fprop", "dgrad")
    start = 1.5e-6

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return tuple(tile for tile in PERSISTENT_16 if fits(tile, access.epilogue)) if access.itemsize == 2 else ()

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        reason = _no_wgmma(device) or _wide(itemsize)
        if reason:
            return f"tile {tile}: {reason}"
        if tile.warps not in (4, WARPS) or tile.n % (ROWS * tile.warps) or tile.m > 256 or tile.k < 64 or tile.stages < 2:
            wanted = f"4 or {WARPS} warps, {ROWS} written channels for each, 64 reduced ones, up to 256 pixels, 2 stages"
            return f"tile {tile}: its programs want {wanted}"
        results = WARPS // tile.warps * tile.m * tile.n
        shared = itemsize * (tile.stages * (tile.m + tile.n) * tile.k + results) + 16 * tile.stages
        if shared > device.shared_bytes:
            return f"tile {tile}: {shared} bytes of shared memory with the result's, {device.name} has {device.shared_bytes}"
        return None

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        if p.G > 1 and self.channels(p, pass_)[0] % tile.n:
            return f"tile {tile}: its boxes of channels would be stored over the next group's"
        return super().why_misfit(p, pass_, tile, device)

    def ineligible(self, c: GatherPass, device: Device) -> str | None:
        reason = _no_wgmma(device) or _wide(c.itemsize) or super().ineligible(c, device)
        if reason:
            return reason
        if c.transposed and max(c.p.S) > 1:
            return "a strided dgrad writes pixels that no box holds"
        return APART if c.y.boxed((c.p.N, *c.extents, c.wrote)) is None else None

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        counted = super().work(p, pass_, tile, splits, access, device)
        # The rates of tiles that are shared were fitted to times. What these pass through shared memory as well is in them.
        return dataclasses.replace(counted, shared=0 if tile.warps == WARPS else shared_bytes(tile, access.itemsize))

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        # 46 to 60 of each warp that multiplies, counted for sm_90; those of the warp that fetches are spread over the others.
        return 48 + tile.n / (2 * tile.warps)

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        integers, constants = super().arguments(c, tile, splits)
        return integers, constants | {"SLOTS": tile.stages, "TEAMS": WARPS // tile.warps}


class PersistentWgrad(_Persistent, TmaWgrad):
    """`tma_wgrad` by such programs, with boxes of several pixel extents (`weight_box`), which leave out most of the zeros."""

    name = "persistent_wgrad"
    passes = ("wgrad",)
    start = 1e-6

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return PERSISTENT_WGRAD_16 if access.itemsize == 2 else ()

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        reason = _no_wgmma(device) or _wide(itemsize)
        if reason:
            return f"tile {tile}: {reason}"
        if tile.warps != WARPS or tile.m % (ROWS * WARPS) or not 64 <= tile.n <= 256 or tile.k < 16 or tile.stages < 2:
            wanted = f"{WARPS} warps, a multiple of {ROWS * WARPS} output channels, 64 to 256 input channels, 2 stages"
            return f"tile {tile}: its programs want {wanted}"
        return None

    def ineligible(self, c: WgradPass, device: Device) -> str | None:
        return _no_wgmma(device) or _wide(c.itemsize) or super().ineligible(c, device)

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        return self.tiles_on(self.access(operands, p, pass_, None, precision), device)

    def reduction(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        """Returns the pixels of whole boxes."""
        return weight_box(p, tile.k)[1] * tile.k

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        return 48 + tile.m / 16  # 46 to 61 of each warp that multiplies, counted as those of fprop

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        box, boxes = weight_box(c.p, tile.k)
        return {"splits": splits, "chunk": math.ceil(boxes / splits)}, {
            "SLOTS": tile.stages, **dict(zip(("BN", "B0", "B1", "B2"), box, strict=True)),
        }  # fmt: skip

    def boxes(self, c: WgradPass, tile: Tile) -> Boxes:
        box, _ = weight_box(c.p, tile.k)
        x, y = self.described(c)
        assert x is not None and y is not None, "ineligible"  # noqa: PT018 - one condition
        return (*y, (*box, tile.m)), (*x, (*box, tile.n)), None


def fits(tile: Tile, e: Epilogue) -> bool:
    """Returns True if a tile's consumers have the registers for an epilogue, as compiled for sm_90.

    Beside 128 accumulators a thread there is room for few numbers more, and teams that take turns hold more of them.
    """
    if tile.warps == WARPS and tile.m * tile.n <= 128 * 128:
        return True
    return not (e.kept or e.stepwise) and (e.activation in SHORT or (e.activation == "silu" and not e.residual))


def shared_bytes(tile: Tile, itemsize: int) -> int:
    """Returns the bytes of shared memory that boxes fill and wgmma reads in an iteration, as the simulator counts them.

    Each 64 channels are a product of their own, which reads the pixels anew.
    """
    filled = tile.m + tile.n
    read = tile.n + tile.m * tile.n // 64
    return (filled + read) * tile.k * itemsize


def _no_wgmma(device: Device) -> str | None:
    if device.interpreted:
        return "Triton's interpreter does not run Gluon"
    return None if device.generation == 9 else f"{device.name} has no wgmma, which Hopper alone has"


def _wide(itemsize: int) -> str | None:
    return None if itemsize == 2 else f"its operands have 2 bytes an element, not {itemsize}"
