"""kernels/strip.py, depthwise problems with one filter per channel, as the planner and the launcher see it.

A strip is a run of neighbouring outputs in the last dimension, computed by one thread per channel or vector of channels. Its
window is the range of columns that it reads.
"""

from __future__ import annotations

import math
from typing import Any

from tconv.planning.addressing import Lanes
from tconv.planning.cost import Work, split_steps
from tconv.planning.device import Device
from tconv.planning.family import Family
from tconv.planning.operands import GatherPass, Operands, WgradPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Access, Tile

CHUNK = 8  # the most taps of a filter row whose products with a strip are unrolled
READ = 8  # columns per load where columns are contiguous
UNROLLED = 64  # the most columns of a window
UNROLLED_FOUND = 16  # the same of fprop where channels are contiguous and each column is found beyond x; more take registers
UNROLLED_WGRAD = 24  # the same for wgrad, which also holds all of a strip's dy in registers
ACCUMULATORS = 12  # the most accumulators of a strip_wgrad program, one per tap
FOUND = 4  # instructions that find and load an element by itself, where columns are contiguous and repeat x beyond it
START = 300  # instructions of a warp outside the main loop
# Where channels are contiguous, a thread owns 16 bytes of channels of one strip. Six columns are for a dgrad of stride three.
# fp64 would need too many registers.
STRIP_16 = (Tile(16, 64, 1, 4, 1, 255, 8), *(Tile(32, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_32 = (Tile(8, 64, 1, 4, 1, 255, 8), *(Tile(16, 32, 1, 4, 1, 255, columns) for columns in (8, 4, 6)))
STRIP_FLIP = tuple(Tile(64, 4, 1, 4, 1, 255, columns) for columns in (8, 6))
STRIP_WGRAD_16 = (Tile(1, 64, 16, 4, 1, 255, 8), *(Tile(rows, 32, 32, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_32 = (Tile(1, 64, 8, 4, 1, 255, 8), *(Tile(rows, 32, 16, 4, 1, 255, c) for rows, c in ((1, 8), (1, 4), (3, 4))))
STRIP_WGRAD_FLIP = (Tile(1, 4, 64, 4, 1, 255, 8), Tile(3, 4, 64, 4, 1, 255, 8))


class _Strips(Family):
    """What the two strip kernels share."""

    dot = False
    columns = 8

    def unfit(self, p: ConvProblem, pass_: str) -> str | None:
        return None if p.depthwise and p.multiplier == 1 else "needs one filter per channel"

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        return p.depthwise and p.multiplier == 1

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        if operands.strips is None:
            return super().access(operands, p, pass_, tile, precision)
        flip, narrow = operands.strips
        return Access(operands.itemsize, operands.tensor_cores, narrow, flip)

    def rows(self, tile: Tile) -> int:
        """Returns the rows of the filter that a program computes at once."""
        return 1

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        columns, rows, stride = tile.columns, self.rows(tile), p.S[2]
        step = min(CHUNK, p.T[2]) * p.D[2]
        if not p.depthwise or p.multiplier > 1:
            return f"strip kernels take one filter per channel, got {p}"
        if pass_ == "dgrad" and (columns % stride or (p.T[2] > CHUNK and step % stride)):
            return f"strips of {columns} columns are no multiple of the stride {stride}"
        if columns & (columns - 1) and (pass_ != "dgrad" or stride % 3):
            return f"{columns} columns are for a dgrad with a stride of three"
        most = UNROLLED_WGRAD if pass_ == "wgrad" else UNROLLED
        if window(p, pass_, columns) > most:
            return f"a strip of {columns} columns meets more than {most}"
        if rows > 1 and (rows > p.T[0] * p.T[1] or rows * min(CHUNK, p.T[2]) > ACCUMULATORS):
            return f"{rows} rows of this filter are too many"
        return None

    def phases(self, p: ConvProblem, pass_: str) -> int:
        return phases(p, pass_)

    def resident(self, tile: Tile, elements: int, accumulators: float) -> int:
        """Returns the programs per unit for which there are registers, given each thread's accumulators per element."""
        threads = 32 * tile.warps
        return int(65536 / (threads * (56 + elements / threads * (accumulators + 6))))


class Strip(_Strips):
    """Strips of written pixels by channels."""

    name = "strip"
    passes = ("fprop", "dgrad")
    borders = ("fprop",)

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return () if access.itemsize == 8 else STRIP_FLIP if access.flip else STRIP_16 if access.itemsize == 2 else STRIP_32

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        found = super().tiles_for(operands, p, pass_, device, precision)
        if p.borders[2] == "zeros" or self.access(operands, p, pass_).flip:
            return found
        return tuple(tile for tile in found if window(p, pass_, tile.columns) <= UNROLLED_FOUND)

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        n = pow2(p.K, 1, 1024)
        return tuple(Tile(pow2(strips_of(p, pass_, c), 1, (1 << 18) // n), n, 1, columns=c) for c in (4, 8, 6))

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        strips = math.ceil(strips_of(p, pass_, tile.columns) / tile.m)
        return strips * phases(p, pass_) * math.ceil(p.K / tile.n)

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        """Returns a warp's instructions per filter row."""
        taps, columns = min(CHUNK, p.T[2]), window(p, pass_, tile.columns)
        load = 8 if access.narrow or access.itemsize == 2 else 2
        met = tile.columns * taps / (p.S[2] if pass_ == "dgrad" else 1)
        elements = tile.n * tile.m / (32 * tile.warps)
        return 40 + chunks(p) * (30 + elements * (met + taps + columns * (_reading(access, load) + _finding(p, access))))

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        steps = self.programs(p, pass_, tile) // phases(p, pass_) * p.T[0] * p.T[1]
        elements, columns = tile.n * tile.m, window(p, pass_, tile.columns)
        met = tile.columns * p.T[2] / (p.S[2] if pass_ == "dgrad" else 1)
        fetched = access.itemsize * elements * chunks(p) * columns
        resident = self.resident(tile, elements, tile.columns)
        return Work(steps, 2 * elements * met, self.length(p, pass_, tile, access), fetched, resident, START)

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        p = c.p
        step = tile.columns // p.S[2] if c.transposed else tile.columns * p.S[2]
        return {}, {
            **_constants(p, tile, c.lanes_x, c.lanes_y, step), "WIDTH": pow2(min(CHUNK, p.T[2]), 1, CHUNK),
            "REST_WIDTH": pow2(p.T[2] % CHUNK, 1, CHUNK),
        }  # fmt: skip


class StripWgrad(_Strips):
    """Rows of the filter by channels, split over the strips of dy."""

    name = "strip_wgrad"
    passes = ("wgrad",)
    borders = ("wgrad",)
    splittable = True
    any_rows = True

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        if access.flip:  # fp32 has registers for one filter row only
            return STRIP_WGRAD_FLIP[: {2: 2, 4: 1}.get(access.itemsize, 0)]
        return () if access.itemsize == 8 else STRIP_WGRAD_16 if access.itemsize == 2 else STRIP_WGRAD_32

    def rows(self, tile: Tile) -> int:
        return tile.m

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        n = pow2(p.K, 1, 1024)
        k = [(pow2(strips_of(p, pass_, c), 1, (1 << 18) // n), c) for c in (4, 8, 6)]
        return tuple(Tile(rows, n, strips, columns=c) for rows in (3, 1) for strips, c in k)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return chunks(p) * math.ceil(p.T[0] * p.T[1] / tile.m) * math.ceil(p.K / tile.n)

    def reduction(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        """Returns the strips of dy."""
        return strips_of(p, pass_, tile.columns)

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        """Returns a warp's instructions per iteration over the strips."""
        taps, columns = min(CHUNK, p.T[2]), window(p, pass_, tile.columns)
        load = 3.5 if access.narrow else 8 if access.itemsize == 2 else 2
        elements, loaded = tile.n * tile.k / (32 * tile.warps), tile.m * columns + tile.columns
        found = tile.m * columns * _finding(p, access)
        return 120 + 30 * tile.m + elements * (tile.m * tile.columns * taps + loaded * (_reading(access, load) - 0.5) + found)

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        taps, columns = min(CHUNK, p.T[2]), window(p, pass_, tile.columns)
        steps = self.programs(p, pass_, tile) * split_steps(self.reduction(p, pass_, tile), tile.k, splits)
        elements, accumulators = tile.n * tile.k, tile.m * taps + tile.columns / 2
        met, fetched = float(tile.m * tile.columns * taps), access.itemsize * elements * (tile.columns + tile.m * columns)
        resident = self.resident(tile, elements, accumulators)
        return Work(steps, 2 * elements * met, self.length(p, pass_, tile, access), fetched, resident, START)

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        p, x, y = c.p, c.lanes_x, c.lanes_y
        extents = p.Y[0], p.Y[1], math.ceil(p.Y[2] / tile.columns)
        return {"C": p.K, **c.steps(extents, tile, splits)}, {
            **_constants(p, tile, x, y, tile.columns * p.S[2]), "WIDE": c.far(extents, tile), "ROWS": tile.m,
            # Along columns, the vector width must divide the first column of every strip.
            "Y_VEC": y.vec if y.unit == "c" else math.gcd(y.vec, tile.columns),
            "READ_DY": tile.columns if x.unit != "c" and y.unit == "p" else 1,
        }  # fmt: skip


def window(p: ConvProblem, pass_: str, columns: int) -> int:
    """Returns the number of columns, first to last, that a strip reads for one chunk of a filter row's taps."""
    taps = (min(CHUNK, p.T[2]) - 1) * p.D[2]
    if pass_ == "dgrad":
        shift = p.P[2] % p.S[2]
        return (shift + columns - 1) // p.S[2] - (shift - taps) // p.S[2] + 1
    return (columns - 1) * p.S[2] + taps + 1


def chunks(p: ConvProblem) -> int:
    """Returns the number of chunks of a filter row. The last one may be shorter than CHUNK."""
    return math.ceil(p.T[2] / CHUNK)


def phases(p: ConvProblem, pass_: str) -> int:
    """Returns the number of phases over the first two dimensions. A strip contains all phases of the last dimension."""
    return p.S[0] * p.S[1] if pass_ == "dgrad" else 1


def strips_of(p: ConvProblem, pass_: str, columns: int) -> int:
    """Returns the number of strips that a pass writes (wgrad: reads of dy); for a dgrad, those of its largest phase."""
    if pass_ != "dgrad":
        return p.N * p.Y[0] * p.Y[1] * math.ceil(p.Y[2] / columns)
    return p.N * math.ceil(p.X[0] / p.S[0]) * math.ceil(p.X[1] / p.S[1]) * math.ceil(p.X[2] / columns)


def _reading(access: Access, load: float) -> float:
    """Returns the instructions to unpack an element, and its share of a load of so many."""
    wide = 1 if access.narrow else READ if access.flip else 16 // access.itemsize
    return (1.5 if access.itemsize == 2 else 0.3) + load / wide


def _finding(p: ConvProblem, access: Access) -> int:
    """Returns the instructions to find an element of x, beyond those to load and unpack it among its neighbours."""
    return FOUND if access.flip and p.borders[2] != "zeros" else 0


def _constants(p: ConvProblem, tile: Tile, x: Lanes, y: Lanes, step: int) -> dict[str, Any]:
    """Returns the compile-time constants that both strip kernels share.

    Args:
        step: distance from one strip to the next, in columns of the tensor that is read.
    """
    x_vec = x.vec if x.unit == "c" else math.gcd(x.vec, step)
    return {
        "T2": p.T[2], "S2": p.S[2], "D2": p.D[2], "P2": p.P[2], "X_UNIT": x.unit, "Y_UNIT": y.unit, "X_VEC": x_vec,
        "Y_VEC": y.vec, "READ": (x_vec if x_vec >= 4 else READ) if x.unit == "p" and p.borders[2] == "zeros" else 1,
        "FLIP": x.unit != "c",
        "COLUMNS": tile.columns, "CHUNK": min(CHUNK, p.T[2]),
    }  # fmt: skip
