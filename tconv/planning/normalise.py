"""A normalisation with an activation: what to compute, the tiles of its kernels, and how an image's pixels are shared out.

Nothing here depends on the batch but the number of programs, so neither do an image's bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tconv.planning.cost import LAUNCH, Cost
from tconv.planning.device import Device
from tconv.planning.plan import INTERPRETED, Plan
from tconv.planning.problem import Triple, pow2
from tconv.planning.tiles import Tile

MOST_CHANNELS = 2048  # of a tile that has all of them, in an RMS normalisation
WRITTEN, SUMMED = 8192, 4096  # bytes of a tile's elements: where it is written, and where places keep sums in registers
LARGEST = 16384  # bytes of a tile that has all channels, where vectors of 16 bytes along the pixels would make it larger
RESIDENT = 8  # programs of four warps on a multiprocessor, with 64 registers a thread


@dataclass(frozen=True)
class Normalisation:
    """y = activation((x - mean) / sqrt(variance + eps) * weight + bias), padded with zeros; or of x / sqrt(mean x^2 + eps).

    Attributes:
        operation: "group_norm_silu" or "rms_norm_silu", whatever the activation.
        rank: spatial dimensions, 0 to 3.
        N, C, G: batch, channels, groups of channels that are normalised together; for RMS each pixel is alone, and G is 1.
        X: extents of x.
        before, after: zeros around x in y, per dimension.
        channels_last: whether the channels of x and y are contiguous; if not, the pixels are.
        eps, activation: as in the formula; the activation is "silu" or empty.
        weight, bias: whether there are such.
        dry, device: as in `Geometry`.
    """

    operation: str
    rank: int
    N: int
    C: int
    G: int
    X: Triple
    before: Triple
    after: Triple
    channels_last: bool
    eps: float
    activation: str
    weight: bool
    bias: bool
    dry: bool = False
    device: Device | None = None

    @property
    def rms(self) -> bool:
        """True for an RMS normalisation, False for one of groups."""
        return self.operation == "rms_norm_silu"

    @property
    def Y(self) -> Triple:
        """The extents of y."""
        a, b, c = (x + s + t for x, s, t in zip(self.X, self.before, self.after, strict=True))
        return a, b, c

    @property
    def P(self) -> int:
        """The pixels of an image of x."""
        return math.prod(self.X)

    @property
    def Q(self) -> int:
        """The pixels of an image of y."""
        return math.prod(self.Y)

    @property
    def padded(self) -> bool:
        """True if y has more pixels than x."""
        return self.Y != self.X

    def shape(self, which: str) -> tuple[int, ...]:
        """Returns the shape of "x" or "y" as torch sees it."""
        return self.N, self.C, *(self.X if which == "x" else self.Y)[3 - self.rank :]

    def __str__(self) -> str:
        def times(extents: Triple) -> str:
            return " " + "x".join(map(str, extents[3 - self.rank :])) if self.rank else ""

        groups = "" if self.rms else f", {self.G} groups"
        padded = f" ->{times(self.Y)}" if self.padded else ""
        return f"N{self.N} C{self.C}{times(self.X)}{padded}{groups}" + (f", {self.activation}" if self.activation else "")


@dataclass(frozen=True)
class Share:
    """How a kernel takes an image: by tiles, and in chunks of pixels, one per program and tile of channels.

    Attributes:
        tile: m pixels and n channels.
        chunk, chunks: pixels of a chunk, a multiple of the tile's, and chunks of an image.
    """

    tile: Tile
    chunk: int
    chunks: int

    def programs(self, n: Normalisation) -> int:
        """Returns the programs of all images."""
        return n.N * self.chunks * math.ceil(n.C / self.tile.n)


def written(n: Normalisation, itemsize: int, device: Device, pixels: int) -> Share:
    """Returns how a result of so many pixels per image is written, a tile per program."""
    tile = _tile(n, WRITTEN // itemsize, itemsize, device, pixels)
    return Share(tile, tile.m, math.ceil(pixels / tile.m))


def summed(n: Normalisation, itemsize: int, device: Device) -> Share:
    """Returns how sums over the pixels of x are shared out, so that a single image fills the device where it can.

    A chunk is of two tiles at least, since writing its sums costs as much as reading some of x.
    """
    tile = _tile(n, SUMMED // itemsize, itemsize, device, n.P)
    if device.interpreted:
        return Share(tile, tile.m, math.ceil(n.P / tile.m))
    tiles = math.ceil(n.P / tile.m)
    wanted = math.ceil(device.units * RESIDENT * 4 / tile.warps / math.ceil(n.C / tile.n))
    chunk = math.ceil(tiles / max(1, min(tiles // 2, wanted))) * tile.m
    return Share(tile, chunk, math.ceil(n.P / chunk))


def _tile(n: Normalisation, elements: int, itemsize: int, device: Device, pixels: int) -> Tile:
    """Returns a tile of about so many elements: of all channels if RMS, else as long as may be along the contiguous axis."""
    channels = pow2(n.C, 1, MOST_CHANNELS)
    if device.interpreted:
        return Tile(pow2(pixels, 1, max(1, (1 << 18) // channels)), channels, 1, 4, 1)
    if n.padded and not n.channels_last:  # each of its pixels has an address of its own
        elements //= 2
    if n.rms:
        vector = 1 if n.channels_last else 16 // itemsize
        m = pow2(pixels, 1, max(min(vector, LARGEST // itemsize // channels), elements // channels))
        warps = min(max(4, 4 * m * channels // elements), 16)
        # Left to itself, ptxas spills a few registers of these to fit one more program on a multiprocessor.
        return Tile(m, channels, 1, warps, 1, 128 if warps == 16 or itemsize == 8 else 0)
    if n.channels_last:
        run = 128 // itemsize  # channels of 128 bytes, or fewer if these leave no tail
        wide = next((w for w in (run, run // 2, run // 4) if n.C % w == 0), min(channels, run))
        return Tile(pow2(pixels, 1, elements // wide), wide, 1, 4, 1)
    m = pow2(pixels, 1, elements // 4)
    return Tile(m, pow2(n.C, 1, elements // m), 1, 4, 1)


def forward_plan(n: Normalisation, itemsize: int, device: Device) -> tuple[Plan, Share, Share | None]:
    """Returns the plan of a forward pass, how y is written, and how the moments are summed; None for RMS, which has none."""
    write = written(n, itemsize, device, n.Q)
    moments = None if n.rms else summed(n, itemsize, device)
    x, y = n.N * n.C * n.P * itemsize, n.N * n.C * n.Q * itemsize
    return _plan(n, n.operation, write, moments, (1 if n.rms else 2) * x + y, itemsize, device), write, moments


def gradient_plan(n: Normalisation, itemsize: int, device: Device) -> tuple[Plan, Share, Share]:
    """Returns the plan of a backward pass, how dx is written, and how sums are; for RMS, one launch does both."""
    sums = summed(n, itemsize, device)
    write = sums if n.rms else written(n, itemsize, device, n.P)
    each = n.N * n.C * n.P * itemsize
    return _plan(n, f"{n.operation} gradient", write, sums, (3 if n.rms else 5) * each, itemsize, device), write, sums


def _plan(n: Normalisation, pass_: str, write: Share, sums: Share | None, moved: int, itemsize: int, device: Device) -> Plan:
    """Returns a plan. `moved` are the bytes that its launches read and write."""
    chunks = 1 if sums is None else sums.chunks
    cost = None if device.interpreted else _predict(n, write, sums, moved, itemsize, device)
    return Plan(pass_, "normalise", write.tile, chunks, str(cost or INTERPRETED), cost)


def _predict(n: Normalisation, write: Share, sums: Share | None, moved: int, itemsize: int, device: Device) -> Cost:
    """Returns the cost of a pass: its launches, and its bytes at memory bandwidth."""
    work, programs = n.N * n.C * n.Q, write.programs(n)
    workspace = 0 if sums is None else n.N * sums.chunks * 2 * n.C * max(4, itemsize)
    parts = (("memory", (moved + 2 * workspace) / device.limits.bandwidth),)
    launches = 1 if sums is None else 2 if sums is write else 3
    executed = programs * write.chunk * write.tile.n
    waves = math.ceil(programs / device.units)
    seconds = launches * LAUNCH + parts[0][1]
    return Cost(work, moved, executed, programs, waves, device.units, workspace, parts, seconds)
