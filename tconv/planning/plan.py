"""Chooses the kernel, tile and number of splits of a pass, and records the reason for people to read."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tconv.planning.bias import BIAS, COPY
from tconv.planning.cost import Cost, predict_bias, written_elements
from tconv.planning.device import DEPENDENT, Device
from tconv.planning.families import FAMILIES, families
from tconv.planning.family import Family
from tconv.planning.operands import Operands, chunk
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.tiles import BF16X6, Tile, can_cut

INTERPRETED = "one large tile for the interpreter"
WORKSPACE = 32 << 20  # the most bytes that the workspace of a split reduction may take
# Batch-invariant calls are planned for so many images, whatever their batch. Over the suite's layers this costs less, as
# predicted, than fewer would in batches of 64, and than more would for a single image.
IMAGES = 8
# The same of a stream's chunk: by rank, the times that it writes.
TIMES = {1: 1024, 3: 4}
KERNELS = {pass_: tuple(f.name for f in families(pass_)) for pass_ in ("fprop", "dgrad", "wgrad", "bias")}


class Unplannable(ValueError):
    """No kernel has a tile for a pass on a device."""


@dataclass(frozen=True)
class Plan:
    """How one pass of a problem is run.

    Attributes:
        pass_: "fprop", "dgrad", "wgrad", "bias" (the bias gradient) "copy" (an operand's copy to channels last) or "borders"
            (the sum of what padding that repeats x adds to dx).
        kernel: one of KERNELS, "copy" or "borders".
        tile: block extents and launch options.
        splits: parts into which the reduction is cut. Their sums are added in a fixed order afterwards.
        reason: one line for `explain`.
        cost: the cost model's prediction; None in the interpreter.
        staged: operands that are first copied to channels last.
        precision: BF16X6, or empty for the precision of the data type and torch's flag.
        dependent: True if the sum of the splits is a dependent launch (`Device.dependent`).
        kernels: the kernels that the planner considered.
        tiles: the tiles that it considered for this kernel.
        parts: the numbers of splits that it considered for this tile.
        others: the next best plans, three at most, then faster ones whose mechanism does not work on the device.
    """

    pass_: str
    kernel: str
    tile: Tile
    splits: int
    reason: str
    cost: Cost | None = None
    staged: tuple[str, ...] = ()
    precision: str = ""
    dependent: bool = False
    kernels: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tiles: tuple[Tile, ...] = field(default=(), compare=False, repr=False)
    parts: tuple[int, ...] = field(default=(), compare=False, repr=False)
    others: tuple[Plan, ...] = field(default=(), compare=False, repr=False)

    @property
    def mechanism(self) -> str:
        """What a device must do right for this plan and not for a plain kernel: "tma", BF16X6, or "" for nothing."""
        return FAMILIES[self.kernel].mechanism(self.precision) if self.kernel in FAMILIES else ""

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What a device must do right for this plan and for the sum of its splits."""
        return tuple(m for m in (self.mechanism, DEPENDENT if self.dependent else "") if m)

    @property
    def choices(self) -> Forced:
        """What `force` or `given` would have to be told for this plan."""
        return Forced(self.kernel, self.tile, self.splits, bool(self.staged), self.precision or "ieee")

    def barred(self) -> Plan:
        """Returns this plan with the reason that it has if its mechanism does not work on the device."""
        return replace(self, reason=f"not chosen: {self.mechanism} has not passed its check on this device; {self.cost}")

    @property
    def way(self) -> str:
        """The kernel, its tile, and what else is launched: the plan without its pass and its reason."""
        precision = f" {self.precision}" if self.precision else ""
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        splits += " summed by a dependent launch" if self.dependent else ""
        staged = f", {' and '.join(self.staged)} copied to channels last" if self.staged else ""
        return f"{self.kernel} {self.tile}{precision}{splits}{staged}"

    def __str__(self) -> str:
        return f"{self.pass_}: {self.way} ({self.reason})"


@dataclass(frozen=True)
class Forced:
    """The arguments of `force`, or the choices of a plan that was measured (`Plan.choices`)."""

    kernel: str | None
    tile: Tile | None
    splits: int | None
    staged: bool | None
    precision: str | None


_forced: Forced | None = None
_given: contextvars.ContextVar[Forced | None] = contextvars.ContextVar("tconv_given", default=None)


def forced() -> Forced | None:
    """Returns the arguments of the innermost active `force`, or None."""
    return _forced


def requested() -> Forced | None:
    """Returns what the planner is told to choose: by `force`, else by `given`; None if it is free."""
    return _forced or _given.get()


@contextlib.contextmanager
def given(choices: Forced) -> Iterator[None]:
    """Makes every plan that this thread makes inside the block use the given choices, as `force` does in the whole process.

    A plan that cannot be raises ValueError. Where `force` is active, that counts.
    """
    token = _given.set(choices)
    try:
        yield
    finally:
        _given.reset(token)


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
        staged: whether operands are first copied to channels last, where a kernel can gain by it: those without contiguous
            channels, and those whose channels are no whole vectors, which get channels of zeros.
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
    choices = kernel, tile, splits, staged, precision
    before, _forced = _forced, Forced(*choices) if any(c is not None for c in choices) else None
    try:
        yield
    finally:
        _forced = before


def choose(
    problem: ConvProblem,
    pass_: str,
    operands: Operands,
    device: Device,
    only: str | None = None,
    precision: str | None = None,
    whole: bool = False,
) -> Plan:
    """Returns the plan for one pass: of all candidates the one with the least predicted time (planning/cost.py).

    Args:
        problem: the convolution.
        pass_: "fprop", "dgrad" or "wgrad".
        operands: the layout of its operands.
        device: the device to plan for.
        only: the only kernel to consider; None for all kernels that load through pointers.
        precision: the only precision to consider, as in `Plan.precision`; None for all.
        whole: do not split the reduction of fprop or dgrad, unless that is forced.
    Raises:
        ValueError: a forced plan (`force`) cannot run.
        Unplannable: no tile fits.
    """
    request = _request_for(pass_)
    only = only or (request.kernel if request else None)
    if request and request.kernel:
        unfit = FAMILIES[request.kernel].refused(problem, pass_)
        if unfit:
            raise ValueError(f"forced kernel {request.kernel!r} {unfit}, got {problem}")
    if device.interpreted:
        return _interpreter_plan(problem, pass_, operands, device, only, precision)
    takers = _takers(problem, pass_, operands)
    considered = [FAMILIES[only]] if only else [f for f in takers if f.considered(problem, pass_)]
    kernels = tuple(family.name for family in considered)
    plans, refused = [], None
    for family in considered:
        for cut in _precisions(family, operands, device) if precision is None else (precision,):
            try:
                plans += list(_candidates(family, problem, pass_, operands, device, cut, whole, kernels))
            except ValueError as e:
                if request is None:
                    raise
                refused = refused or e  # a forced tile or number of splits is not for this kernel, but may be for another
    if not plans:
        raise refused or Unplannable(f"no tile fits {device.name}: {problem}")
    plan = _fastest(plans, request)
    plain = [other for other in plans if not other.precision]
    if not plan.precision or not plain or device.works(plan.precision):
        return plan
    best = _fastest(plain, request)
    return replace(best, others=(*best.others, plan.barred()))


def _takers(problem: ConvProblem, pass_: str, operands: Operands) -> list[Family]:
    """Returns the families that compute a pass of a problem on operands of that size."""
    return [f for f in families(pass_) if not f.refused(problem, pass_) and (f.fp8 or operands.itemsize > 1)]


def _precisions(family: Family, operands: Operands, device: Device) -> tuple[str, ...]:
    """Returns the precisions to consider, as values of `Plan.precision`. Only fp32 without TF32 has a choice: BF16X6."""
    if operands.itemsize != 4 or operands.tensor_cores or not family.cuts:
        return ("",)
    request = requested()
    if request and request.precision:
        return (BF16X6 if request.precision == BF16X6 else "",)
    return ("", BF16X6) if can_cut(device) and not device.interpreted else ("",)


def _candidates(
    family: Family,
    problem: ConvProblem,
    pass_: str,
    operands: Operands,
    device: Device,
    precision: str,
    whole: bool,
    kernels: tuple[str, ...],
) -> Iterator[Plan]:
    """Yields every plan of a kernel in one precision: its tiles, each with every number of splits."""
    request = _request_for(pass_)

    def illegal(tile: Tile) -> str | None:
        if precision == BF16X6 and not can_cut(device):
            return f"{BF16X6} has been compiled for Hopper only, not for {device.name}"
        return _why_illegal(family, problem, pass_, tile, operands.itemsize, device)

    legal = _legal_tiles(request, family.tiles_for(operands, problem, pass_, device, precision), illegal)
    for tile in legal:
        access = family.access(operands, problem, pass_, tile, precision)
        parts = _all_splits(family, problem, pass_, tile, operands.itemsize, device, whole)
        for splits in parts:
            cost = family.predict(problem, pass_, tile, splits, access, device)
            yield Plan(
                pass_, family.name, tile, splits, "", cost, (), precision, kernels=kernels, tiles=legal, parts=parts
            )  # fmt: skip


def for_batch(plan: Plan, problem: ConvProblem, operands: Operands, device: Device) -> Plan:
    """Returns a plan that was made for `IMAGES` as it is taken for another batch. Only the prediction differs.

    Args:
        problem: the batch's convolution.
        operands: the layout of its operands.
    """
    family, cost = FAMILIES[plan.kernel], None
    if not device.interpreted:
        access = family.access(operands, problem, plan.pass_, plan.tile, plan.precision)
        cost = family.predict(problem, plan.pass_, plan.tile, plan.splits, access, device)
    why = "forced" if _request_for(plan.pass_) else f"as for {IMAGES} images"
    reason = f"batch-invariant: {why}; {cost or INTERPRETED}"
    return replace(plan, reason=reason, cost=cost, staged=(), others=())


def _why_illegal(family: Family, problem: ConvProblem, pass_: str, tile: Tile, itemsize: int, device: Device) -> str | None:
    """Returns why a kernel cannot run a pass with a tile, or None."""
    return family.why_illegal(tile, itemsize, device) or family.why_misfit(problem, pass_, tile, device)


def choose_bias(channels: int, pixels: int, itemsize: int, device: Device) -> Plan:
    """Returns the plan for a bias gradient: for each of `channels`, the sum over `pixels`.

    Raises:
        ValueError: a forced plan (`force`) cannot run.
    """
    request, limit = _request_for("bias"), WORKSPACE // (channels * max(4, itemsize))
    n = pow2(channels, 1, 1024)
    interpreted = (Tile(1, n, pow2(pixels, 1, (1 << 18) // n)),)
    plans = []
    found = interpreted if device.interpreted else BIAS
    legal = _legal_tiles(request, found, lambda tile: FAMILIES["bias"].why_illegal(tile, itemsize, device))
    for tile in legal:
        parts = _split_counts(pixels, tile.k, math.ceil(channels / tile.n), limit, device, request)
        for splits in parts:
            cost = None if device.interpreted else predict_bias(channels, pixels, tile, splits, itemsize, device)
            plans.append(Plan("bias", "bias", tile, splits, INTERPRETED, cost, kernels=("bias",), tiles=legal, parts=parts))
    return plans[0] if device.interpreted else _fastest(plans, request)


def choose_copy(channels: int, pixels: int, itemsize: int, device: Device) -> Plan:
    """Returns the plan for a copy to channels last: the widest tile that is no wider than the channels need."""
    if device.interpreted:
        n = pow2(channels, 1, 1024)
        return Plan("copy", "copy", Tile(pow2(pixels, 1, (1 << 18) // n), n, 1), 1, INTERPRETED)
    found = COPY[itemsize]
    tile = next((t for t in found if t.n <= pow2(channels, 1, found[0].n)), found[-1])
    return Plan("copy", "copy", tile, 1, f"for {channels} channels", kernels=("copy",), tiles=found)


def _fastest(plans: list[Plan], request: Forced | None) -> Plan:
    """Returns the plan that `Cost.rank` sorts first. Its `others` are the next three."""
    first, *rest = sorted(plans, key=lambda plan: plan.cost.rank if plan.cost else (0.0, 0.0))
    why = f"best of {len(plans)}" if request is None else "forced" if _forced else "given"
    return replace(first, reason=f"{why}; {first.cost}", others=tuple(rest[:3]))


def _request_for(pass_: str) -> Forced | None:
    """Returns the forced choices for this pass, or None, also if the forced kernel is not one of this pass."""
    request = requested()
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


def _interpreter_plan(
    problem: ConvProblem, pass_: str, operands: Operands, device: Device, only: str | None, precision: str | None
) -> Plan:
    """Returns the plan for the interpreter: the first tile that is legal, since its time is per operation."""
    request = _request_for(pass_)
    fit = (f for f in _takers(problem, pass_, operands) if f.interpreted(problem))
    family = FAMILIES[only] if only else next(fit)
    candidates = _legal_tiles(
        request, family.interpreter_tiles(problem, pass_),
        lambda tile: _why_illegal(family, problem, pass_, tile, operands.itemsize, device),
    )  # fmt: skip
    if not candidates:
        raise Unplannable(f"no tile of {family.name} fits: {problem}")
    splits = _all_splits(family, problem, pass_, candidates[0], operands.itemsize, device)[0]
    if precision is None:
        (precision,) = _precisions(family, operands, device)
    reason = "forced" if request else INTERPRETED
    return Plan(pass_, family.name, candidates[0], splits, reason, precision=precision)


def _all_splits(
    family: Family, problem: ConvProblem, pass_: str, tile: Tile, itemsize: int, device: Device, whole: bool = False
) -> tuple[int, ...]:
    """Returns the numbers of splits to consider. wgrad splits its pixels; gather splits channels, if it has few tiles."""
    request = _request_for(pass_)
    # A forced number is for wgrad, or for a kernel that is forced too: most others cannot be split so often, or at all.
    asked = pass_ == "wgrad" or (request is not None and request.kernel == family.name and request.splits is not None)
    if not family.splittable or not (asked or (not whole and family.splits(problem, pass_, tile, device))):
        return (1,)
    if pass_ != "wgrad" and request and request.splits == 1:
        return (1,)
    limit = WORKSPACE // (written_elements(problem, pass_) * max(4, itemsize))
    programs, reduced = family.programs(problem, pass_, tile), family.reduction(problem, pass_, tile)
    return _split_counts(reduced, tile.k, programs, limit, device, request if asked else None)


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
