"""What the planner and the launcher ask of a kernel, with the answers that most kernels give.

A kernel's family states in one place what the kernel can take, its tiles, its cost and its launch arguments. Each file of
families stands beside a file of kernels with the same name (planning/gather.py beside kernels/gather.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tconv.planning.cost import Cost, Work, price
from tconv.planning.device import Device
from tconv.planning.operands import Operands
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, Access, Tile

MAX_TILE = 1 << 20  # elements of a block: Triton's own limit
Spills = Mapping[int, tuple[Tile, ...]]
Instead = Mapping[int, Mapping[Tile, Tile]]
Boxes = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None, ...]


class Family:
    """A kernel, as the planner and the launcher see it.

    Attributes:
        name: the kernel's name in plans, records and `force`.
        passes: the passes that it computes, of "fprop", "dgrad", "wgrad" and "bias" (the bias gradient).
        dot: True if it multiplies with tl.dot, False if with multiply-adds.
        cuts: True if it can compute fp32 in BF16X6.
        fp8: True if it takes operands of 8 bits.
        tma: True if the tensor memory accelerator loads its operands.
        gluon: True if the kernel is written in Gluon, Triton's experimental lower level.
        splittable: True if its reduction can be split (split-K).
        weight_stays: True if w is taken as it is, never copied.
        start: seconds that a program takes at its start beyond what the others do.
        columns: the most columns of its tiles.
        two_blocks: True if its tiles may have a second block of written channels.
        borders: the passes in which the kernel reads x's own elements in place of padding (`ConvProblem.borders`); the others
            know zeros only.
        streams: True if the kernel reads the state of a stream and writes the next one, in fprop.
        any_rows: True if the first extent of its tiles need not be a power of two.
        spills: by generation of the device, tiles that spill registers there and must not be used. Before Hopper, tensor cores
            read their operands from registers, which leaves fewer for accumulators.
        instead: by generation, tiles that spill but cannot be left out without a predicted loss of speed, and the tile that
            replaces each. ptxas spills a few registers of some variants to fit one more program, but not if it is given a
            limit. AMD's wavefronts are twice as wide, so fewer are needed.
    """

    name: str
    passes: tuple[str, ...]
    dot = True
    cuts = False
    fp8 = False
    tma = False
    gluon = False
    splittable = False
    weight_stays = False
    start = 0.0
    columns = 1
    two_blocks = False
    any_rows = False
    borders: tuple[str, ...] = ()
    streams = False
    spills: ClassVar[Spills] = {}
    instead: ClassVar[Instead] = {}

    @property
    def kernel(self) -> tuple[str, str]:
        """The file in tconv/kernels that holds the kernel, and the name of its `@triton.jit` function."""
        return type(self).__module__.rpartition(".")[2], self.name

    def mechanism(self, precision: str) -> str:
        """Returns what a device must do right for the kernel in a precision (`Plan.mechanism`)."""
        return precision if precision == BF16X6 else "tma" if self.tma else ""

    # --- what it can take ---

    def unfit(self, p: ConvProblem, pass_: str) -> str | None:
        """Returns why the kernel does not support a pass, or None."""
        return None

    def refused(self, p: ConvProblem, pass_: str) -> str | None:
        """Returns why the kernel is not for a pass, or None: `unfit`, or what it finds beyond x."""
        if p.streamed and not (self.streams and pass_ == "fprop"):
            return "reads no state"
        if p.bordered and pass_ not in self.borders:
            return "reads nothing but zeros beyond the input"
        return self.unfit(p, pass_)

    def considered(self, p: ConvProblem, pass_: str) -> bool:
        """Returns True if the planner should compare this kernel with others where nothing is forced."""
        return False

    def interpreted(self, p: ConvProblem) -> bool:
        """Returns True if the interpreter should run a problem with this kernel, where nothing is forced."""
        return False

    def ineligible(self, c: Any, device: Device) -> str | None:
        """Returns why tensors addressed like those of a pass cannot be given to the kernel, or None."""
        return None

    # --- tiles ---

    def tiles(self, access: Access) -> tuple[Tile, ...]:
        """Returns the tiles that may be considered for a way to access the operands, before any device is asked."""
        raise NotImplementedError

    def tiles_on(self, access: Access, device: Device) -> tuple[Tile, ...]:
        """Returns the tiles that may be considered on a device. `why_illegal` then rules out some of them."""
        instead = self.instead.get(device.generation, {})
        return tuple(instead.get(tile, tile) for tile in self.tiles(access))

    def tiles_for(self, operands: Operands, p: ConvProblem, pass_: str, device: Device, precision: str) -> tuple[Tile, ...]:
        """Returns the tiles with which the kernel can access the operands."""
        return self.tiles_on(self.access(operands, p, pass_, None, precision), device)

    def interpreter_tiles(self, p: ConvProblem, pass_: str) -> tuple[Tile, ...]:
        """Returns the interpreter's tiles: one program, or as few as blocks of at most 2^18 elements allow.

        The interpreter's time is per operation and not per element.
        """
        raise NotImplementedError

    def why_illegal(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        """Returns why the kernel cannot run with a tile on a device, or None. The planner and forced plans both ask here."""
        extents = (tile.n, tile.k, tile.warps, *(() if self.any_rows else (tile.m,)))
        if any(v <= 0 or v & (v - 1) for v in extents) or tile.stages < 1 or tile.m <= 0:
            return f"tile {tile}: extents and warps must be powers of two"
        if not 1 <= tile.columns <= self.columns:
            return f"tile {tile}: so many columns are not for {self.name}"
        if tile.extra and not (self.two_blocks and 16 <= tile.extra <= tile.n and not tile.extra & (tile.extra - 1)):
            return f"tile {tile}: no such second block for {self.name}"
        if max(tile.m * tile.n, tile.n * tile.k, tile.m * tile.k) > MAX_TILE:
            return f"tile {tile}: more than {MAX_TILE} elements in a block"
        reason = self.why_unsupported(tile, itemsize, device)
        if reason:
            return reason
        if self.dot:
            if min(tile.m, tile.n, tile.k) < 16:
                return f"tile {tile}: tl.dot needs at least 16 in each extent"
            shared = tile.stages * (tile.m + tile.across) * tile.k * itemsize
            if shared > device.shared_bytes:
                return f"tile {tile}: {shared} bytes of shared memory, {device.name} has {device.shared_bytes}"
        if tile in self.spills.get(device.generation, ()):
            return f"tile {tile}: {self.name} spills registers on {device.name}"
        return None

    def why_unsupported(self, tile: Tile, itemsize: int, device: Device) -> str | None:
        """Returns why a device's instructions rule out a tile, or None."""
        return None

    def why_misfit(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> str | None:
        """Returns why a tile does not fit a problem, or None."""
        return None

    def access(self, operands: Operands, p: ConvProblem, pass_: str, tile: Tile | None = None, precision: str = "") -> Access:
        """Returns how the kernel accesses the operands with a tile; None is the best case of any tile."""
        return operands.access(operands.narrow, precision)

    # --- cost ---

    def channels(self, p: ConvProblem, pass_: str) -> tuple[int, int]:
        """Returns (channels written, channels reduced): per group, or over all groups if the kernel's tiles span groups."""
        c, k = p.C // p.G, p.K // p.G
        return (k, c) if pass_ == "fprop" else (c, k)

    def programs(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        """Returns the programs of a plan without splits."""
        raise NotImplementedError

    def grid(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, device: Device) -> int:
        """Returns the programs that a plan launches: `programs` of each split, but fewer if a program stays for several."""
        return self.programs(p, pass_, tile) * splits

    def reduction(self, p: ConvProblem, pass_: str, tile: Tile) -> int:
        """Returns the length of the reduction that splits divide: channels, for wgrad pixels. An iteration takes tile.k."""
        return p.gemm("wgrad")[2]

    def splits(self, p: ConvProblem, pass_: str, tile: Tile, device: Device) -> bool:
        """Returns True if the planner should consider splitting the reduction. wgrad has few programs otherwise."""
        return self.splittable

    def phases(self, p: ConvProblem, pass_: str) -> int:
        """Returns the groups of programs that run one after the other and each read all of dy: those of a strided dgrad."""
        return p.phases(pass_)

    def length(self, p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
        """Returns a warp's instructions per iteration of the main loop, as fitted to code compiled for sm_90."""
        raise NotImplementedError

    def work(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Work:
        """Counts the work of a plan."""
        raise NotImplementedError

    def predict(self, p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access, device: Device) -> Cost:
        """Returns the cost of a plan on a device."""
        work = self.work(p, pass_, tile, splits, access, device)
        programs = self.programs(p, pass_, tile) * splits
        return price(p, pass_, tile, splits, access, device, work, programs, self.phases(p, pass_), self.dot, self.start)

    # --- launch ---

    def arguments(self, c: Any, tile: Tile, splits: int) -> tuple[dict[str, int], dict[str, Any]]:
        """Returns the integers and the constants that the kernel takes beyond those that all kernels of a pass share.

        Args:
            c: the pass on given tensors, a `GatherPass` for fprop and dgrad or a `WgradPass`.
            tile, splits: the plan.
        """
        raise NotImplementedError

    def boxes(self, c: Any, tile: Tile) -> Boxes:
        """Returns, for each pointer, the (shape, strides, box) of the tensor descriptor that replaces it, or None.

        Empty if no pointer is replaced. The tensors are eligible.
        """
        return ()
