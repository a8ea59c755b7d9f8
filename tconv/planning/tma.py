"""kernels/tma.py, implicit GEMMs with operands loaded by TMA, as the planner and the launcher see them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any, ClassVar

from tconv.planning.addressing import LIMIT
from tconv.planning.cost import phase_taps, pixel_extents
from tconv.planning.device import Device
from tconv.planning.family import Boxes, Instead
from tconv.planning.gemm import Gemm, Stepping, weight_tiles
from tconv.planning.operands import GatherPass, Operands, Pass, WgradPass
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import Access, Tile

Box = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of a tensor descriptor
BOX = 256  # the most elements of a box in one dimension
# The accelerator writes to shared memory without using registers, which leaves room for more accumulators.
TMA_16 = (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3))
# wgrad needs dy's box transposed on its way to the tensor cores, which wgmma does for 16-bit elements only.
TMA_WGRAD_16 = (Tile(128, 256, 64, 8, 3), *TMA_16, Tile(64, 64, 64, 4, 4))
# With runs of 32 pixels, for problems of which those of 64 would be zeros to a larger part. As many bytes are on their way.
TMA_WGRAD_HALVES = (
    Tile(128, 256, 32, 8, 6), Tile(256, 128, 32, 8, 6), Tile(128, 128, 32, 8, 6), Tile(128, 64, 32, 4, 6),
    Tile(64, 64, 32, 4, 8),
)  # fmt: skip
# Beside the accumulators there are the partial sums of `product`.
TMA_8 = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 3), Tile(128, 64, 64, 4, 4))
TMA_32 = (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4))
APART = "boxes need contiguous channels, and address and strides in multiples of 16 bytes"


class _Tma(Gemm):
    """What the two TMA kernels share."""

    tma = True

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        if device.interpreted:
            return None
        if device.generation < 9:
            return f"{device.name} has no tensor memory accelerator"
        if itemsize == 8 or tile.n < 64:
            return f"tile {tile}: wgmma wants 64 channels written and no more than 4 bytes an element"
        return None

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        # Boxes are wide, however else the tensors are accessed.
        return Access(operands.itemsize, operands.tensor_cores, epilogue=operands.epilogue, written=operands.written)

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        # One thread issues the loads. In fp8 a step's sum is added.
        return 100.0 + (tile.m * tile.n / (32 * tile.warps) if access.itemsize == 1 else 0.0)

    def ineligible(self, c: Any, device: Device) -> str | None:
        """Returns why tensors cannot be given to the kernel as boxes, or None."""
        p = c.p
        if c.pass_ != "dgrad" and any(stride > 1 and n > 1 for stride, n in zip(p.S, p.Y, strict=True)):
            return f"boxes of {c.pass_} need unit stride"
        if not device.interpreted and (
            (c.pass_ == "wgrad" and c.itemsize != 2) or (c.transposed and c.itemsize == 1 and c.inner != "i")
        ):
            return "wgmma turns operands of 2 bytes an element only"
        if not device.interpreted and c.itemsize == 8:
            return "wgmma knows no fp64"
        reason = self.groups_apart(c, device)
        if reason:
            return reason
        if not c.tensor_cores and not device.interpreted:
            return "true fp32 has no tensor cores to fetch boxes for"
        return APART if None in self.described(c) else None

    def described(self, c: Any) -> tuple[Box | None, Box | None]:
        """Returns (shape, strides) of the operands' tensor descriptors, None for an operand that is not eligible."""
        raise NotImplementedError

    def groups_apart(self, c: Pass, device: Device) -> str | None:
        """Returns why boxes cannot tell the groups apart, or None."""
        raise NotImplementedError


class Tma(Stepping, _Tma):
    """`gather` with boxes of pixels by channels."""

    name = "tma"
    passes = ("fprop", "dgrad")
    fp8 = True
    around = (550, 0, 3)
    instead: ClassVar[Instead] = {10: {Tile(128, 64, 32, 4, 4): Tile(128, 64, 32, 4, 4, 255)}}

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        found = {1: TMA_8, 4: TMA_32}.get(access.itemsize, TMA_16)
        # The largest tile has no registers for the addresses of a second result.
        return tuple(tile for tile in found if tile.m * tile.n <= 128 * 128) if access.epilogue.kept else found

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        # A box's extents are powers of two, and it must not cross into the next group.
        written, reduced = self.channels(p, pass_)
        n, k = pow2(written, 16, 1024), pow2(reduced, 16, 256)
        m = math.prod(pow2(e, 1, 64) for e in pixel_extents(p, pass_))
        return (Tile(pow2(m, 16, (1 << 18) // max(n, k)), n, k if p.G == 1 else min(k, reduced & -reduced)),)

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        written, reduced = self.channels(p, pass_)
        if p.G > 1 and reduced % tile.k:
            return f"tile {tile}: its boxes of channels would reach into the next group"
        if tile.m * tile.n > 128 * 128 and written % 8 and not device.interpreted:
            return f"tile {tile}: it spills where channels are written one by one"
        return None

    def groups_apart(self, c: Pass, device: Device) -> str | None:
        least = 16 if device.interpreted else min(t.k for t in self.tiles_for(c.operands(), c.p, c.pass_, device, ""))
        if c.p.G > 1 and c.ci % least:
            return f"boxes would reach into the next group: {c.ci} channels per group are no multiple of {least}"
        return None

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return box_of(p, pass_, tile.m)[1] * math.ceil(self.channels(p, pass_)[0] / tile.n) * p.G

    def steps(self, p: ConvProblem, pass_: str, tile: Tile, splits: int) -> int:
        # A phase without taps walks one whose boxes lie outside, and multiplies zeros.
        empty = p.phases(pass_) - len(phase_taps(p, pass_))
        each = self.programs(p, pass_, tile) // p.phases(pass_)
        return super().steps(p, pass_, tile, splits) + empty * each * math.ceil(self.reduction(p, pass_, tile) / tile.k)

    def arguments(self, c: GatherPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        box, _ = box_of(c.p, c.pass_, tile.m)
        return {}, {
            "Y_BOX": self._result(c, tile) is not None, "Y_VEC": c.y_vec, "WIDE": c.y.reach > LIMIT,
            "Y_PIXELS": min(c.row_y, box[3]), "W_TURNED": self._turned(c),
            **dict(zip(("BN", "B0", "B1", "B2"), box, strict=True)),
        }  # fmt: skip

    def described(self, c: GatherPass) -> tuple[Box | None, Box | None]:
        k, channels, w = c.p.K, c.p.C // c.p.G, c.w
        if self._turned(c):
            k, channels, w = channels, k, replace(w, outer=w.channel, channel=w.outer, unit=True)
        return c.x.boxed((c.p.N, *c.extents_read, c.read)), w.boxed((k, *c.p.T, channels), last=0)

    def _turned(self, c: GatherPass) -> bool:
        """Returns True if a dgrad in fp8 reads the weights along the channels that it sums over."""
        return c.transposed and c.inner == "i" and c.itemsize == 1

    def boxes(self, c: GatherPass, tile: Tile) -> Boxes:
        box, _ = box_of(c.p, c.pass_, tile.m)
        x, w = self.described(c)
        assert x is not None and w is not None, "ineligible"  # noqa: PT018 - one condition
        weights = (1, 1, 1, tile.k, tile.n) if c.transposed and not self._turned(c) else (1, 1, 1, tile.n, tile.k)
        written = self._result(c, tile)
        y = written and (*written, (*box, tile.n))
        beside = (None, None, y if c.epilogue.residual else None, y if c.epilogue.kept else None)  # in the order of POINTERS
        return (*x, (*box, tile.k)), (*w, weights), None, y, *(beside if y and c.epilogue.tensors else ())

    def _result(self, c: GatherPass, tile: Tile) -> Box | None:
        """Returns (shape, strides) of the result's tensor descriptor, or None if it is stored through pointers."""
        # A strided dgrad's phase writes pixels that are not neighbours. A channel tile that passes the end of a group would
        # overwrite the next group's channels. Both store through pointers, with a mask.
        if (c.transposed and max(c.p.S) > 1) or (c.p.G > 1 and c.co % tile.n):
            return None
        return c.y.boxed((c.p.N, *c.extents, c.wrote))


class TmaWgrad(_Tma):
    """`wgrad` with runs of pixels along one axis by channels."""

    name = "tma_wgrad"
    passes = ("wgrad",)
    around = (680, 0, 2)
    splittable = True

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        return (*TMA_WGRAD_16, *TMA_WGRAD_HALVES) if access.itemsize == 2 else ()

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        found = super().tiles_for(operands, p, pass_, device, precision)
        halves = run_of(p, 32)[1] < 2 * run_of(p, 64)[1]
        return found if halves else tuple(tile for tile in found if tile not in TMA_WGRAD_HALVES)

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        return (Tile(pow2(p.K // p.G, 16, 256), pow2(p.C // p.G, 16, 256), pow2(max(p.N, *p.Y), 16, 256)),)

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        if device.generation >= 9 and not device.interpreted and (itemsize > 2 or min(tile.m, tile.n) < 64):
            return f"tile {tile}: wgmma turns an operand of 2 bytes an element only, and wants 64 rows"
        return super().why_unsupported(tile, itemsize, device)

    def groups_apart(self, c: Pass, device: Device) -> str | None:
        aligned = 16 // c.itemsize
        if c.p.G > 1 and (c.ci % aligned or c.co % aligned):
            return (
                f"boxes must begin at multiples of 16 bytes: {c.ci} or {c.co} channels per group are no multiple of {aligned}"
            )
        return None

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        return weight_tiles(p, tile)

    def reduction(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        """Returns the pixels of whole runs."""
        return run_of(p, tile.k)[1] * tile.k

    def arguments(self, c: WgradPass, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        run, runs = run_of(c.p, tile.k)
        return {"chunk": math.ceil(runs / splits)}, {"RUN": run}

    def described(self, c: WgradPass, last: int | None = None) -> tuple[Box | None, Box | None]:
        return c.x.boxed((c.p.N, *c.p.X, c.p.C), last), c.y.boxed((c.p.N, *c.p.Y, c.p.K), last)

    def boxes(self, c: WgradPass, tile: Tile) -> Boxes:
        run, _ = run_of(c.p, tile.k)
        x, y = self.described(c, 0 if run == "n" else 1 + int(run))
        assert x is not None and y is not None, "ineligible"  # noqa: PT018 - one condition
        return (*y, (1, 1, 1, tile.k, tile.m)), (*x, (1, 1, 1, tile.k, tile.n)), None


@functools.lru_cache(1024)
def box_of(p: ConvProblem, pass_: str, block: int) -> tuple[tuple[int, int, int, int], int]:
    """Returns the box [images, 3 extents] of `block` pixels that covers the largest phase of fprop or dgrad in the fewest
    pieces, and the number of pieces over all phases.
    """
    box, pieces = _fewest(pixel_extents(p, pass_), block, (True,) * 4)
    return box, pieces * p.phases(pass_)


@functools.lru_cache(1024)
def weight_box(p: ConvProblem, block: int) -> tuple[tuple[int, int, int, int], int]:
    """Returns the box [images, 3 extents] of `block` pixels that covers dy in the fewest pieces, and the number of pieces.

    It may reach past the last image, and past an extent with which x ends (`ends_with_x`). It divides the others.
    """
    return _fewest((p.N, *p.Y), block, (True, *(ends_with_x(p, d) for d in range(3))))


def _fewest(extents: tuple[int, ...], block: int, passable: tuple[bool, ...]) -> tuple[tuple[int, int, int, int], int]:
    """Returns the box of `block` pixels that covers the extents in the fewest pieces, and the number of pieces.

    Extents of a box are powers of two. Of equally good boxes, the longest in the last dimension is returned.

    Args:
        passable: for each extent, whether the box may reach past it.
    """
    logs, found = block.bit_length(), []
    for b, c, d in itertools.product(range(logs), repeat=3):
        box = (block >> b + c + d, 1 << b, 1 << c, 1 << d)
        fits = all(e and (ok or n % e == 0) for n, e, ok in zip(extents, box, passable, strict=True))
        if fits and max(box) <= BOX:
            pieces = math.prod(math.ceil(n / e) for n, e in zip(extents, box, strict=True))
            found.append((pieces, (-d, -c, -b), box))
    pieces, _, best = min(found)
    return best, pieces


def run_of(p: ConvProblem, block: int) -> tuple[str | int, int]:
    """Returns the axis along which tma_wgrad's boxes are runs of `block` pixels, and the number of runs.

    The axis is "n" for images, or a dimension whose output extent is a multiple of `block`, or with which x ends
    (`ends_with_x`). A run along the images may reach past the last one.
    """
    pixels = math.prod(p.Y)
    along = [d for d in (2, 1, 0) if p.Y[d] % block == 0 or ends_with_x(p, d)]
    found: list[tuple[int, str | int]] = [(p.N * pixels // p.Y[d] * math.ceil(p.Y[d] / block), d) for d in along]
    runs, axis = min([*found, (math.ceil(p.N / block) * pixels, "n")], key=lambda f: f[0])
    return axis, runs


def ends_with_x(p: ConvProblem, d: int) -> bool:
    """Returns True if at each tap x ends where dy does, at the end of a dimension or at its start.

    What a tap reads beyond there is then zero in both. It is so for all filters whose padding keeps the extent. False for an
    extent of 1, which no box has a reason to pass.
    """
    shifts = [t * p.D[d] - p.P[d] for t in range(p.T[d])]
    return p.Y[d] > 1 and all(p.Y[d] + shift >= p.X[d] or shift <= 0 for shift in shifts)
