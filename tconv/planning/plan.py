"""Chooses the kernel, tile and number of splits of a pass, and records the reason for people to read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tconv.planning.cost import (
    MOST_COLUMNS,
    Cost,
    channels_of,
    pack,
    predict,
    predict_bias,
    reduction,
    tiles_of,
    written_elements,
)
from tconv.planning.device import Device
from tconv.planning.interpreter import interpreter_tiles
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.simplify import FEW
from tconv.planning.strips import Strips, why_not
from tconv.planning.tiles import BF16X6, DOTS, TMA_KERNELS, Access, Tile, can_cut, tiles, why_illegal

INTERPRETED = "one large tile for the interpreter"
WORKSPACE = 32 << 20  # the most bytes that the workspace of a split reduction may take
FILLED = 2  # fprop and dgrad are not split if they have at least so many waves: little of the device is idle then
KERNELS = {
    "fprop": ("gather", "packed", "depthwise", "strip", "tma"),
    "dgrad": ("gather", "packed", "depthwise", "strip", "tma"),
    "wgrad": ("wgrad", "packed_wgrad", "depthwise_wgrad", "strip_wgrad", "tma_wgrad"),
    "bias": ("bias",),
}
UNPROVEN = {*TMA_KERNELS, BF16X6}  # tested in the interpreter, never run on hardware: listed, but chosen only if forced


@dataclass(frozen=True)
class Plan:
    """How one pass of a problem is run.

    Attributes:
        pass_: "fprop", "dgrad", "wgrad", "bias" (the bias gradient) or "stage" (an operand's copy to channels last).
        kernel: one of KERNELS, or "stage".
        tile: block extents and launch options.
        splits: parts into which the reduction is cut. Their sums are added in a fixed order afterwards.
        reason: one line for `explain`.
        cost: the cost model's prediction; None in the interpreter.
        staged: operands that are first copied to channels last.
        precision: BF16X6, or empty for the precision of the data type and torch's flag.
        kernels: the kernels that the planner considered.
        tiles: the tiles that it considered for this kernel.
        parts: the numbers of splits that it considered for this tile.
        others: the next best plans, three at most, then unproven plans that the chosen one was compared with.
    """

    pass_: str
    kernel: str
    tile: Tile
    splits: int
    reason: str
    cost: Cost | None = None
    staged: tuple[str, ...] = ()
    precision: str = ""
    kernels: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tiles: tuple[Tile, ...] = field(default=(), compare=False, repr=False)
    parts: tuple[int, ...] = field(default=(), compare=False, repr=False)
    others: tuple[Plan, ...] = field(default=(), compare=False, repr=False)

    @property
    def unproven(self) -> bool:
        """True if the plan uses a kernel or precision that has never run on hardware."""
        return self.kernel in UNPROVEN or self.precision in UNPROVEN

    def unchosen(self) -> Plan:
        """Returns this unproven plan with the reason that it has when a chosen plan lists it."""
        return replace(self, reason=f"not chosen: a mechanism not seen on hardware yet; {self.cost}")

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.precision else ""
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        staged = f", {' and '.join(self.staged)} copied to channels last" if self.staged else ""
        return f"{self.pass_}: {self.kernel} {self.tile}{precision}{splits}{staged} ({self.reason})"


@dataclass(frozen=True)
class Forced:
    """The arguments of `force`."""

    kernel: str | None
    tile: Tile | None
    splits: int | None
    staged: bool | None
    precision: str | None


_forced: Forced | None = None


def forced() -> Forced | None:
    """Returns the arguments of the innermost active `force`, or None."""
    return _forced


@contextlib.contextmanager
def force(
    kernel: str | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
    staged: bool | None = None,
    precision: str | None = None,
) -> Iterator[None]:
    """Makes every plan inside the block use the given choices. For tests and measurements.

    It holds for the whole process, not for the thread, because autograd runs backward passes on threads of its own. A forced
    plan that cannot run raises ValueError when a convolution is called.

    Args:
        kernel: name of a kernel, one of KERNELS. Passes that do not have this kernel are planned freely.
        tile: block extents for those passes, a `tconv.Tile`.
        splits: parts of the reduction, for wgrad and the bias gradient. It applies to fprop and dgrad only together with
            `kernel="gather"`, since most of them have too few channels to split.
        staged: whether operands without contiguous channels are first copied to channels last, where a kernel can gain by it.
        precision: how fp32 products are computed in every pass whose kernel uses tl.dot, whatever torch's flag says. "ieee",
            or "bf16x6": three bf16 for each number and six products on tensor cores. Other data types are not affected.
    Raises:
        ValueError: the kernel or precision does not exist.
        TypeError: the tile is not a `tconv.Tile`.

    Example:
        >>> with force(splits=3):
        ...     forced()
        Forced(kernel=None, tile=None, splits=3, staged=None, precision=None)
    """
    global _forced
    if kernel is not None and not any(kernel in known for known in KERNELS.values()):
        raise ValueError(f"kernel must be one of {sorted(set().union(*KERNELS.values()))}, got {kernel!r}")
    if tile is not None and not isinstance(tile, Tile):
        raise TypeError(f"tile must be a tconv.Tile, got {tile!r}")
    if precision not in (None, "ieee", BF16X6):
        raise ValueError(f"precision must be 'ieee' or {BF16X6!r}, got {precision!r}")
    before, _forced = _forced, Forced(kernel, tile, splits, staged, precision)
    try:
        yield
    finally:
        _forced = before


@dataclass(frozen=True)
class Operands:
    """The layout of a pass's operands, as far as planning depends on it.

    Attributes:
        itemsize: bytes of an element.
        tensor_cores: True if the precision asked for lets tensor cores compute the products.
        narrow: True if an operand's layout or alignment allows only element-by-element access.
        large: True if the accesses leave enough registers for the largest tiles.
        strips: how strip kernels access a depthwise problem's operands; None if as `narrow` says.
        pack_narrow: maps the groups per pack to `narrow` for a packed kernel, which ignores how weights are accessed; None if
            as `narrow` says.
    """

    itemsize: int
    tensor_cores: bool
    narrow: bool = False
    large: bool = True
    strips: Strips | None = None
    pack_narrow: Callable[[int], bool] | None = None

    def precisions(self, kernel: str, device: Device) -> tuple[str, ...]:
        """Returns the precisions to consider, as values of `Plan.precision`. Only fp32 without TF32 has a choice: BF16X6."""
        if self.itemsize != 4 or self.tensor_cores or kernel not in DOTS:
            return ("",)
        if _forced and _forced.precision:
            return (BF16X6 if _forced.precision == BF16X6 else "",)
        return ("", BF16X6) if can_cut(device) and not device.interpreted else ("",)

    def access(self, problem: ConvProblem, pass_: str, kernel: str, tile: Tile | None = None, precision: str = "") -> Access:
        """Returns how a kernel accesses the operands. For a packed kernel that depends on the tile; None is the best case."""
        if kernel.startswith("strip") and self.strips:
            return Access(self.itemsize, self.tensor_cores, self.strips.narrow, self.strips.flip)
        narrow = self.narrow
        if kernel.startswith("packed") and self.pack_narrow:
            narrow = tile is not None and self.pack_narrow(pack(problem, pass_, tile))
        # A group of a depthwise problem has one channel, so tl.dot's operands can only be loaded element by element.
        elif problem.depthwise and kernel in ("gather", "wgrad", "packed", "packed_wgrad"):
            narrow = True
        cores = self.tensor_cores or precision == BF16X6
        return Access(self.itemsize, cores, narrow, large=self.large, precision=precision)

    def tiles(self, problem: ConvProblem, pass_: str, kernel: str, device: Device, precision: str = "") -> tuple[Tile, ...]:
        """Returns the tiles with which a kernel can access the operands."""
        best = self.access(problem, pass_, kernel, precision=precision)
        found = tiles(kernel, best, device)
        if not kernel.startswith("packed"):
            return found
        every = dict.fromkeys((*found, *tiles(kernel, replace(best, narrow=True), device)))
        met = {tile: self.access(problem, pass_, kernel, tile, precision) for tile in every}
        return tuple(tile for tile in every if tile in tiles(kernel, met[tile], device))


def choose(problem: ConvProblem, pass_: str, operands: Operands, device: Device, only: str | None = None) -> Plan:
    """Returns the plan for one pass: of all candidates the one with the least predicted time (planning/cost.py).

    Args:
        problem: the convolution.
        pass_: "fprop", "dgrad" or "wgrad".
        operands: the layout of its operands.
        device: the device to plan for.
        only: the only kernel to consider; None for all kernels that load through pointers.
    Raises:
        ValueError: a forced plan (`force`) cannot run, or no tile fits.
    """
    request, itemsize = _request_for(pass_), operands.itemsize
    if request and request.kernel:
        unfit = _unfit(problem, pass_, request.kernel)
        if unfit:
            raise ValueError(f"forced kernel {request.kernel!r} {unfit}, got {problem}")
    if device.interpreted:
        return _interpreter_plan(problem, pass_, operands, device, request)
    plans = []
    only = only or (request.kernel if request else None)
    kernels = (only,) if only else _kernels(problem, pass_)
    for kernel, precision in [(k, precision) for k in kernels for precision in operands.precisions(k, device)]:
        illegal = _illegal(problem, pass_, kernel, itemsize, device, precision)
        legal = _legal_tiles(request, operands.tiles(problem, pass_, kernel, device, precision), illegal)
        for tile in legal:
            access = operands.access(problem, pass_, kernel, tile, precision)
            parts = _all_splits(problem, pass_, kernel, tile, itemsize, device, request)
            for splits in parts:
                cost = predict(problem, pass_, kernel, tile, splits, access, device)
                plans.append(Plan(pass_, kernel, tile, splits, "", cost, (), precision, kernels, legal, parts))
    asked = _forced is not None and _forced.precision is not None
    proven = [plan for plan in plans if asked or plan.precision not in UNPROVEN]
    if not proven:
        raise ValueError(f"no tile fits {device.name}: {problem}")
    plan = _fastest(proven, request)
    if len(proven) < len(plans):
        rival = _fastest([plan for plan in plans if plan.precision in UNPROVEN], request)
        if plan.cost and rival.cost and rival.cost.seconds < plan.cost.seconds:
            plan = replace(plan, others=(*plan.others, rival.unchosen()))
    return plan


def choose_bias(channels: int, pixels: int, itemsize: int, device: Device) -> Plan:
    """Returns the plan for a bias gradient: for each of `channels`, the sum over `pixels`.

    Raises:
        ValueError: a forced plan (`force`) cannot run.
    """
    request, limit = _request_for("bias"), WORKSPACE // (channels * max(4, itemsize))
    n = pow2(channels, 1, 1024)
    interpreted = (Tile(1, n, pow2(pixels, 1, (1 << 18) // n)),)
    found = interpreted if device.interpreted else tiles("bias", Access(itemsize, False), device)
    plans = []
    legal = _legal_tiles(request, found, lambda tile: why_illegal("bias", tile, itemsize, device))
    for tile in legal:
        parts = _split_counts(pixels, tile.k, math.ceil(channels / tile.n), limit, device, request)
        for splits in parts:
            cost = None if device.interpreted else predict_bias(channels, pixels, tile, splits, itemsize, device)
            plans.append(Plan("bias", "bias", tile, splits, INTERPRETED, cost, kernels=("bias",), tiles=legal, parts=parts))
    return plans[0] if device.interpreted else _fastest(plans, request)


def choose_stage(channels: int, pixels: int, itemsize: int, device: Device) -> Plan:
    """Returns the plan for a copy to channels last: the widest tile that is no wider than the channels need."""
    if device.interpreted:
        n = pow2(channels, 1, 1024)
        return Plan("stage", "stage", Tile(pow2(pixels, 1, (1 << 18) // n), n, 1), 1, INTERPRETED)
    found = tiles("stage", Access(itemsize, False), device)
    tile = next((t for t in found if t.n <= pow2(channels, 1, found[0].n)), found[-1])
    return Plan("stage", "stage", tile, 1, f"for {channels} channels", kernels=("stage",), tiles=found)


def _fastest(plans: list[Plan], request: Forced | None) -> Plan:
    """Returns the plan that `Cost.rank` sorts first. Its `others` are the next three."""
    first, *rest = sorted(plans, key=lambda plan: plan.cost.rank if plan.cost else (0.0, 0.0))
    why = "forced" if request else f"best of {len(plans)}"
    return replace(first, reason=f"{why}; {first.cost}", others=tuple(rest[:3]))


def _request_for(pass_: str) -> Forced | None:
    """Returns the forced choices for this pass, or None, also if the forced kernel is not one of this pass."""
    request = _forced
    return None if request is None or not (request.kernel is None or request.kernel in KERNELS[pass_]) else request


def _legal_tiles(
    request: Forced | None, candidates: tuple[Tile, ...], illegal: Callable[[Tile], str | None]
) -> tuple[Tile, ...]:
    """Returns the candidates that can run, or only the forced tile. Raises ValueError if the forced tile cannot run."""
    if request is None or request.tile is None:
        return tuple(t for t in candidates if not illegal(t))
    reason = illegal(request.tile)
    if reason:
        raise ValueError(f"forced plan cannot run: {reason}")
    return (request.tile,)


def _illegal(
    problem: ConvProblem, pass_: str, kernel: str, itemsize: int, device: Device, precision: str = ""
) -> Callable[[Tile], str | None]:
    """Returns a function from a tile to why the kernel cannot run the pass with it, or None."""

    def illegal(tile: Tile) -> str | None:
        reason = why_illegal(kernel, tile, itemsize, device)
        if precision == BF16X6 and not can_cut(device):
            reason = f"{BF16X6} has been compiled for Hopper only, not for {device.name}"
        if reason is None and kernel.startswith("strip"):
            reason = why_not(problem, pass_, tile.columns, tile.m if kernel == "strip_wgrad" else 1)
        if reason is None and kernel == "tma":
            written, reduced = channels_of(problem, pass_, kernel)
            if problem.G > 1 and reduced % tile.k:
                reason = f"tile {tile}: its boxes of channels would reach into the next group"
            elif tile.m * tile.n > 128 * 128 and written % 8 and not device.interpreted:
                reason = f"tile {tile}: it spills where channels are written one by one"
        return reason

    return illegal


def _kernels(problem: ConvProblem, pass_: str) -> tuple[str, ...]:
    """Returns the kernels to consider for a pass. Some may turn out to have no legal tile."""
    dot, packs, direct, strip = KERNELS[pass_][:4]
    if problem.depthwise:
        return (direct, dot) if problem.multiplier > 1 else (strip, direct, dot)
    few = FEW * (2 if pass_ == "wgrad" else 1)  # its tiles are up to 128 wide, two taps of so many channels
    gains = min(problem.C, problem.K) <= few * problem.G and (problem.taps > 1 or problem.G > 1)
    return (dot, packs) if gains and not _unfit(problem, pass_, packs) else (dot,)


def _unfit(problem: ConvProblem, pass_: str, kernel: str) -> str | None:
    """Returns why a kernel does not support a pass, or None."""
    if kernel.startswith("depthwise") and not problem.depthwise:
        return "needs one input channel per group"
    if kernel.startswith("strip") and not (problem.depthwise and problem.multiplier == 1):
        return "needs one filter per channel"
    if kernel == "packed" and not _countable(problem, pass_):
        return f"counts at most {MOST_COLUMNS} taps times channels"
    return None


def _countable(problem: ConvProblem, pass_: str) -> bool:
    """Returns True if `packed` can decode GEMM_K's columns (kernels/common.py `quotient`) with every tile."""
    written, reduced = channels_of(problem, pass_, "gather")
    groups = problem.G if written < MOST_COLUMNS else 1
    return min(groups, max(1, 1024 // written)) * reduced * problem.taps <= MOST_COLUMNS


def _interpreter_plan(problem: ConvProblem, pass_: str, operands: Operands, device: Device, request: Forced | None) -> Plan:
    """Returns the plan for the interpreter, whose time is per operation, not per element.

    That favours few programs, and depthwise kernels while the channel multiplier is small.
    """
    dot, _, direct, _ = KERNELS[pass_][:4]
    itemsize = operands.itemsize
    kernel = request.kernel if request and request.kernel else direct if problem.depthwise and problem.multiplier <= 8 else dot
    illegal = _illegal(problem, pass_, kernel, itemsize, device)
    candidates = _legal_tiles(request, interpreter_tiles(problem, pass_, kernel), illegal)
    if not candidates:
        raise ValueError(f"no tile of {kernel} fits: {problem}")
    tile = candidates[0]
    splits = _all_splits(problem, pass_, kernel, tile, itemsize, device, request)[0]
    (precision,) = operands.precisions(kernel, device)
    return Plan(pass_, kernel, tile, splits, "forced" if request else INTERPRETED, precision=precision)


def chunk(reduced: int, block: int, splits: int) -> int:
    """Returns the pixels or channels per split: the least multiple of `block` with which `splits` splits are enough."""
    return math.ceil(math.ceil(reduced / block) / splits) * block


def _all_splits(
    problem: ConvProblem, pass_: str, kernel: str, tile: Tile, itemsize: int, device: Device, request: Forced | None
) -> tuple[int, ...]:
    """Returns the numbers of splits to consider. wgrad splits its pixels; gather splits channels, if it has few tiles."""
    limit = WORKSPACE // (written_elements(problem, pass_) * max(4, itemsize))
    programs = tiles_of(problem, pass_, kernel, tile)
    if pass_ == "wgrad":
        return _split_counts(reduction(problem, pass_, kernel, tile), tile.k, programs, limit, device, request)
    named = request is not None and request.kernel == "gather" and request.splits is not None
    # With the largest tiles there are no registers left for the offsets of a split's slice.
    small = programs < FILLED * device.units and tile.m * tile.n <= 128 * 128 and not device.interpreted
    if kernel != "gather" or not (named or small) or (request and request.splits == 1):
        return (1,)
    return _split_counts(channels_of(problem, pass_, kernel)[1], tile.k, programs, limit, device, request if named else None)


def _split_counts(
    reduced: int, block: int, programs: int, limit: int, device: Device, request: Forced | None
) -> tuple[int, ...]:
    """Returns the numbers of splits to consider: 1 to 16, and those that fill one to four waves; at most `limit`.

    A split is rounded up to whole blocks, which may leave the last splits without work. Only numbers for which every split has
    work are returned. A split's pixels are counted in 32 bits, so there is at least one split per 2^30 of them.
    """
    steps = math.ceil(reduced / block)
    most, least = max(1, min(steps, limit)), math.ceil(reduced / 2**30)

    def used(splits: int) -> int:
        return math.ceil(reduced / chunk(reduced, block, max(least, splits)))

    if request and request.splits is not None:
        if not 1 <= request.splits <= most:
            raise ValueError(f"forced plan cannot run: {request.splits} splits, this problem allows 1 to {most}")
        if used(request.splits) != request.splits:
            raise ValueError(
                f"forced plan cannot run: {request.splits} splits of {steps} steps, nearest is {used(request.splits)}"
            )
        return (request.splits,)
    if device.interpreted:
        return (used(1),)
    fill = [device.units * waves // programs for waves in (1, 2, 3, 4)]
    return tuple(sorted({used(min(most, max(1, splits))) for splits in (*range(1, 17), *fill)}))
