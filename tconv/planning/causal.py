"""Tiles of kernels/causal.py, causal depthwise convolutions of sequences. Memory limits all of them, so tiles are fixed."""

from __future__ import annotations

import math
from dataclasses import replace

from tconv.planning.addressing import Lanes
from tconv.planning.device import Device
from tconv.planning.problem import pow2
from tconv.planning.tiles import Tile

TAPS = 8  # the most taps: all are unrolled, and a strip's window is in registers
# By the contiguous axis. A thread has 16 bytes of channels and four times, or one or two channels and eight times.
TILES = {"c": Tile(16, 64, 1, 4, 1, columns=4), "p": Tile(64, 4, 1, 4, 1, columns=8), "": Tile(64, 4, 1, 4, 1, columns=8)}
STEP = Tile(1, 256, 1, 4, 1)
WAVES = 4  # programs per multiprocessor over which the sums of a weight gradient are split
LARGEST = 1 << 15  # elements of the interpreter's one tile


def choose_causal(
    lanes: Lanes, itemsize: int, images: int, channels: int, times: int, device: Device, sums: bool = False
) -> Tile:
    """Returns the tile: strips by channels, and the times of a strip.

    Args:
        sums: whether it is for a weight gradient, whose sums take registers, so that strips of several channels are shorter.
    """
    tile = TILES[lanes.unit]
    if sums and lanes.unit == "c":
        tile = replace(tile, columns=tile.columns // 2)
    if device.interpreted:
        n = pow2(channels, 1, 1024)
        return Tile(pow2(strips(tile, images, times), 1, max(1, LARGEST // n)), n, 1, columns=tile.columns)
    if lanes.unit == "c" and itemsize > 2:  # as many bytes of channels per thread
        return replace(tile, m=tile.m * 2 // itemsize)
    return tile


def choose_step(channels: int, device: Device) -> Tile:
    """Returns the tile of a decode step: one image by channels."""
    return Tile(1, pow2(channels, 1, 1024), 1) if device.interpreted else STEP


def strips(tile: Tile, images: int, times: int) -> int:
    """Returns the number of strips."""
    return images * math.ceil(times / tile.columns)


def split(tile: Tile, images: int, channels: int, times: int, device: Device) -> tuple[int, int]:
    """Returns over how many programs the sums of a weight gradient are split, and the tiles of strips of each."""
    tiles = math.ceil(strips(tile, images, times) / tile.m)
    wanted = 2 if device.interpreted else math.ceil(WAVES * device.units / math.ceil(channels / tile.n))
    chunk = math.ceil(tiles / max(1, min(wanted, tiles)))
    return math.ceil(tiles / chunk), chunk
