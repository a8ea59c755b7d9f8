"""Chooses how a pass of a problem is run: kernel, tile, splits, and the reason, for people to read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tconv.configs import Tile, tiles, why_illegal
from tconv.device import Device
from tconv.problem import ConvProblem

WORKSPACE = 32 << 20  # bytes that wgrad's splits may take at most
KERNELS = {
    "fprop": ("gather", "depthwise"),
    "dgrad": ("gather", "depthwise"),
    "wgrad": ("wgrad", "depthwise_wgrad"),
    "bias": ("bias",),
}


@dataclass(frozen=True)
class Plan:
    """How one pass of a problem is run.

    Attributes:
        pass_: "fprop", "dgrad", "wgrad" or "bias" (the bias gradient).
        kernel: "gather", "wgrad", "depthwise", "depthwise_wgrad" or "bias".
        tile: block extents and launch options.
        splits: parts into which the reduction is cut, added in a fixed order afterwards.
        reason: one line for `explain`.
    """

    pass_: str
    kernel: str
    tile: Tile
    splits: int
    reason: str

    def __str__(self) -> str:
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        return f"{self.pass_}: {self.kernel} {self.tile}{splits} ({self.reason})"


@dataclass(frozen=True)
class Forced:
    """What `force` was given."""

    kernel: str | None
    tile: Tile | None
    splits: int | None


_forced: Forced | None = None


def forced() -> Forced | None:
    """What plans are forced to now, if anything."""
    return _forced


@contextlib.contextmanager
def force(kernel: str | None = None, tile: Tile | None = None, splits: int | None = None) -> Iterator[None]:
    """Inside the block every plan uses what is given; one that cannot run raises ValueError. For tests and measurements.

    It holds for the whole process: backward passes run on threads of autograd's own.

    Args:
        kernel: name of a kernel; passes that do not know it plan freely.
        tile: block extents for those passes.
        splits: parts of the reduction, for passes that split.

    Example:
        >>> with force(splits=3):
        ...     forced()
        Forced(kernel=None, tile=None, splits=3)
    """
    global _forced
    if kernel is not None and not any(kernel in known for known in KERNELS.values()):
        raise ValueError(f"kernel must be one of {sorted(set().union(*KERNELS.values()))}, got {kernel!r}")
    before, _forced = _forced, Forced(kernel, tile, splits)
    try:
        yield
    finally:
        _forced = before


def pow2(n: int, low: int, high: int) -> int:
    """The power of two at or above n, within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def choose(problem: ConvProblem, pass_: str, itemsize: int, tensor_cores: bool, device: Device, narrow: bool = False) -> Plan:
    """The plan for one pass.

    Args:
        problem: what to compute.
        pass_: "fprop", "dgrad" or "wgrad".
        itemsize: bytes of an element.
        tensor_cores: whether the precision asked for lets tensor cores do the products.
        device: where.
        narrow: whether an operand's layout or alignment allows only element by element loads.
    Raises:
        ValueError: a plan was forced (`force`) that cannot run.
    """
    wish = _wish(pass_)
    kernel, why = _kernel(problem, pass_)
    if wish and wish.kernel and wish.kernel != kernel:
        kernel, why = wish.kernel, "forced"
        if kernel.startswith("depthwise") and not problem.depthwise:
            raise ValueError(f"forced kernel {kernel!r} needs one input channel per group, got {problem}")
    if device.interpreted:
        tile, note = _interpreter_tile(problem, pass_, kernel), "one large tile for the interpreter"
    else:
        tile, note = _gpu_tile(problem, pass_, kernel, tiles(kernel, itemsize, tensor_cores, narrow), itemsize, device)
    tile, note = _forced_tile(wish, kernel, itemsize, device) or (tile, note)
    splits = 1
    if pass_ == "wgrad":
        programs = _programs(problem, pass_, kernel, tile)
        elements = math.prod(problem.shape("w"))
        splits = _splits(problem.gemm("wgrad")[2], tile.k, programs, elements * max(4, itemsize), device, wish)
    return Plan(pass_, kernel, tile, splits, f"{why}; {note}")


def choose_bias(channels: int, pixels: int, itemsize: int, device: Device) -> Plan:
    """The plan for a bias gradient, the sum of `pixels` numbers for each of `channels`.

    Raises:
        ValueError: a plan was forced (`force`) that cannot run.
    """
    wish = _wish("bias")
    n = pow2(channels, 1, 1024)
    tile = Tile(1, n, pow2(pixels, 1, (1 << 18) // n)) if device.interpreted else tiles("bias", itemsize, False, False)[0]
    tile, _ = _forced_tile(wish, "bias", itemsize, device) or (tile, "")
    splits = _splits(pixels, tile.k, math.ceil(channels / tile.n), channels * max(4, itemsize), device, wish)
    return Plan("bias", "bias", tile, splits, "sum of the output gradient's pixels")


def _wish(pass_: str) -> Forced | None:
    """What this pass is forced to; a kernel that it does not know leaves it free."""
    wish = _forced
    return None if wish is None or not (wish.kernel is None or wish.kernel in KERNELS[pass_]) else wish


def _forced_tile(wish: Forced | None, kernel: str, itemsize: int, device: Device) -> tuple[Tile, str] | None:
    if wish is None or wish.tile is None:
        return None
    illegal = why_illegal(kernel, wish.tile, itemsize, device)
    if illegal:
        raise ValueError(f"forced plan cannot run: {illegal}")
    return wish.tile, "forced tile"


def _kernel(problem: ConvProblem, pass_: str) -> tuple[str, str]:
    if problem.depthwise and problem.multiplier <= 8:
        # A dot would read 16 channels for one that counts; up to half as many outputs per channel, multiply-adds are less
        # work. By counting: not yet measured on a GPU.
        return ("depthwise_wgrad" if pass_ == "wgrad" else "depthwise"), "one input channel per group"
    return ("wgrad" if pass_ == "wgrad" else "gather"), "implicit GEMM"


def _channels(problem: ConvProblem, pass_: str, kernel: str) -> tuple[int, int]:
    """(channels written, channels reduced) of a program's reach: per group, or all where a tile spans groups."""
    c, k = problem.C // problem.G, problem.K // problem.G
    if kernel == "depthwise":
        return (problem.K if pass_ == "fprop" else problem.C), 1
    return (k, c) if pass_ == "fprop" else (c, k)


def _interpreter_tile(problem: ConvProblem, pass_: str, kernel: str) -> Tile:
    """The interpreter's time is per operation, not per element: one program, or as few as 2^18 elements a block allow."""
    written, reduced = _channels(problem, pass_, kernel)
    if kernel == "depthwise_wgrad":
        n = pow2(problem.K, 1, 1024)
        return Tile(min(problem.taps, 27), n, pow2(problem.gemm("wgrad")[2], 1, (1 << 18) // n))
    if kernel == "wgrad":
        m, n = pow2(problem.K // problem.G, 16, 1024), pow2(problem.C // problem.G, 16, 1024)
        return Tile(m, n, pow2(problem.gemm("wgrad")[2], 16, (1 << 18) // max(m, n)))
    low = 16 if kernel == "gather" else 1
    n, k = pow2(written, low, 1024), pow2(reduced, low, 256)
    return Tile(pow2(_phase_pixels(problem, pass_), low, (1 << 18) // max(n, k)), n, k)


def _gpu_tile(
    problem: ConvProblem, pass_: str, kernel: str, candidates: tuple[Tile, ...], itemsize: int, device: Device
) -> tuple[Tile, str]:
    """The legal tile with the least padded work per wave of programs."""
    legal = [t for t in candidates if not why_illegal(kernel, t, itemsize, device)]
    best: tuple[float, Tile, str] | None = None
    for tile in legal:
        programs = _programs(problem, pass_, kernel, tile)
        waves = math.ceil(programs / device.units)
        # A program's time: its products, and a part that favours large tiles (operands read per product). The 16 is an
        # estimate, not yet measured on a GPU.
        area = tile.m * tile.n if kernel in ("gather", "wgrad") else tile.n * max(tile.m, tile.k)
        cost = waves * (area + 16 * (tile.m + tile.n))
        if best is None or cost < best[0]:
            best = (cost, tile, f"{programs} programs in {waves} waves on {device.units} units")
    if best is None:
        raise ValueError(f"no tile of {kernel} fits {device.name}")
    return best[1], best[2]


def _programs(problem: ConvProblem, pass_: str, kernel: str, tile: Tile) -> int:
    written, _ = _channels(problem, pass_, kernel)
    if kernel == "wgrad":
        k, c = problem.K // problem.G, problem.C // problem.G
        return math.ceil(k / tile.m) * math.ceil(c / tile.n) * problem.taps * problem.G
    if kernel == "depthwise_wgrad":
        return math.ceil(problem.taps / tile.m) * math.ceil(problem.K / tile.n)
    return pixel_tiles(problem, pass_, tile.m) * math.ceil(written / tile.n) * (problem.G if kernel == "gather" else 1)


def pixel_tiles(problem: ConvProblem, pass_: str, block: int) -> int:
    """Tiles of written pixels over all phases: what the kernels' own numbering (kernels/common.py) expects."""
    return math.ceil(_phase_pixels(problem, pass_) / block) * problem.phases(pass_)


def _phase_pixels(problem: ConvProblem, pass_: str) -> int:
    """Pixels that the largest phase of a pass writes."""
    if pass_ == "fprop":
        return problem.N * math.prod(problem.Y)
    return problem.N * math.prod(math.ceil(x / s) for x, s in zip(problem.X, problem.S, strict=True))


def chunk(pixels: int, block: int, splits: int) -> int:
    """Pixels per split: the least multiple of the block with which `splits` splits are enough."""
    return math.ceil(math.ceil(pixels / block) / splits) * block


def _splits(pixels: int, block: int, programs: int, slice_bytes: int, device: Device, wish: Forced | None) -> int:
    """Parts of a reduction: enough for two programs per unit, none shorter than four steps of the loop.

    Both are estimates, not yet measured on a GPU. The workspace, a slice per split, bounds them. A split's pixels are
    counted in 32 bits, so one per 2^30 is the least.
    """
    steps = math.ceil(pixels / block)
    most = max(1, min(steps, WORKSPACE // slice_bytes))
    splits = 1 if device.interpreted else min(most, math.ceil(2 * device.units / programs), steps // 4)
    if wish and wish.splits is not None:
        if not 1 <= wish.splits <= most:
            raise ValueError(f"forced plan cannot run: {wish.splits} splits, this problem allows 1 to {most}")
        splits = wish.splits
    splits = max(1, splits, math.ceil(pixels / 2**30))
    used = math.ceil(pixels / chunk(pixels, block, splits))  # rounding up may leave the last ones without work
    if wish and wish.splits not in (None, used):
        raise ValueError(f"forced plan cannot run: {wish.splits} splits of {steps} steps, nearest is {used}")
    return used
