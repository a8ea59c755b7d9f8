"""Counts the work of a pass and of a plan for it, and predicts the plan's time on a device. Standard library only.

Operations and bytes are exact counts. The time is a model: a launch, the start and end of each round of programs, and four
parts that overlap in part: their powers of OVERLAP add up.

    products  the products of the padded tiles, at the rate of tensor cores or of multiply-adds
    issue     instructions: four warps per cycle on each multiprocessor, but few warps issue less (PACE)
    cache     the operands that programs fetch: from L2, or for depthwise kernels, whose taps share them, mostly from L1
    memory    the least bytes, the workspace, and bytes that are read again because no cache holds them, at memory bandwidth

Programs run in waves, so the first three parts are counted for the multiprocessor with the most programs. A split-K reduction
ends with a second launch, which reads the workspace and overlaps with nothing. Instructions in the main loop and outside of it
are fitted to compiled code, as scripts/codegen.py reads it (tests/test_cost.py compares them). What is outside overlaps with
the loops of other programs of the multiprocessor, and with nothing if there is only one. Fixed times, latencies and the rates
of caches are fitted to the plans of eight layers, in bf16, that an H200 timed (bench/results; docs/first-light.md has the fit).

Shared memory is left out, but where warpgroups take tiles by turns (planning/persistent.py). To read a tile's operands there
should take tensor cores up to 1.75 times as long as to multiply them (128x64), and some of the times show it: gather's 128x256
is faster than 256x128. But as a part of its own, or as a bound on the products, it made the planner's choices worse
(docs/first-light.md).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tconv.planning.device import Device
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, Access, Tile

LAUNCH = 2.7e-6  # seconds of a kernel that does next to nothing, after one that has left the caches cold
START = 1.0e-6  # seconds that a program waits for its first loads and last stores, besides its instructions
LATENCY = 1650.0  # cycles from a load to its data, in a main loop whose loads are not pipelined
ISSUE = 4  # warp instructions that a unit issues per cycle, one per scheduler
PACE = 2.5  # cycles from an instruction of a warp to its next: what a program takes for one that waits for no other's
OVERLAP = 1.5  # of parts a and b, the exponent in (a^OVERLAP + b^OVERLAP)^(1/OVERLAP): 1 is one after the other
L1 = 36  # bytes that a unit reads from its L1 cache per cycle, in the kernels without tl.dot
SHARED = 128  # bytes that a unit reads from and writes to its shared memory per cycle


@dataclass(frozen=True)
class Cost:
    """The counted work and predicted time of one pass under a plan.

    Attributes:
        flops: operations of the pass, two per multiply-add. Taps that fall in the padding count too.
        bytes: least bytes: each operand read once, the result written once.
        executed: operations of the padded tiles.
        programs: programs, over all splits. Where programs stay for several tiles, each tile counts as one.
        waves: programs that the unit with the most programs runs.
        units: multiprocessors of the device.
        workspace: bytes allocated besides the result.
        parts: seconds of "products", "issue", "cache" and "memory".
        seconds: the predicted time.
        alone: seconds of what overlaps with nothing: "launch", "start" (and end of programs), "sum" (of splits), "copies".
    """

    flops: int
    bytes: int
    executed: int
    programs: int
    waves: int
    units: int
    workspace: int
    parts: tuple[tuple[str, float], ...]
    seconds: float
    alone: tuple[tuple[str, float], ...] = ()

    @property
    def bound(self) -> str:
        """The name of the part that takes longest."""
        return max(self.parts, key=lambda part: part[1])[0]

    @property
    def rank(self) -> tuple[float, float]:
        """The key by which plans are sorted: the predicted time, then the sum of the parts, as if none overlapped."""
        return self.seconds, sum(seconds for _, seconds in self.parts)

    @property
    def tile_waste(self) -> float:
        """The share of executed operations wasted in the tails of tiles. Zero if a dgrad skips more taps in the padding."""
        return max(0.0, 1 - self.flops / self.executed)

    @property
    def wave_waste(self) -> float:
        """The share of the units' time that is idle in the last wave."""
        return 1 - self.programs / (self.waves * self.units)

    def __str__(self) -> str:
        return (
            f"predicted {self.seconds * 1e6:.1f} us, bound by {self.bound}; "
            f"{self.programs} programs in {self.waves} waves, waste: tiles {self.tile_waste:.0%}, waves {self.wave_waste:.0%}"
        )


def flops(p: ConvProblem) -> int:
    """Returns the operations of fprop, dgrad or wgrad. All three multiply the same pairs of elements."""
    return 2 * p.N * math.prod(p.Y) * p.K * (p.C // p.G) * p.taps


def least_bytes(p: ConvProblem, pass_: str, itemsize: int, written: int = 0) -> int:
    """Returns the bytes of x, w and y. A pass reads two of them and writes the third.

    dgrad writes all of x. The other passes read at most Y*T elements of it along each dimension.

    Args:
        itemsize: bytes of an element.
        written: bytes of an element of the result; 0 if those are as many.
    """
    met = [x if pass_ == "dgrad" else min(x, y * t) for x, y, t in zip(p.X, p.Y, p.T, strict=True)]
    least = itemsize * (p.N * p.C * math.prod(met) + math.prod(p.shape("w")) + math.prod(p.shape("y")))
    return least + (written - itemsize) * written_elements(p, pass_) if written else least


def written_elements(p: ConvProblem, pass_: str) -> int:
    """Returns the elements of a pass's result, which is also the size of one split's slice of the workspace."""
    return math.prod(p.shape({"fprop": "y", "dgrad": "x", "wgrad": "w"}[pass_]))


def slices(p: ConvProblem, pass_: str, splits: int, itemsize: int) -> int:
    """Returns the bytes of a split reduction's workspace, 0 without splits."""
    return splits * written_elements(p, pass_) * max(4, itemsize) if splits > 1 else 0


def phase_pixels(p: ConvProblem, pass_: str) -> int:
    """Returns the pixels that the largest phase of fprop or dgrad writes."""
    return math.prod(pixel_extents(p, pass_))


def pixel_extents(p: ConvProblem, pass_: str) -> tuple[int, ...]:
    """Returns the images and the written extents of the largest phase of fprop or dgrad."""
    return p.N, *(p.Y if pass_ == "fprop" else (math.ceil(x / s) for x, s in zip(p.X, p.S, strict=True)))


def pixel_tiles(p: ConvProblem, pass_: str, block: int) -> int:
    """Returns the tiles of written pixels over all phases, as kernels/common.py `written_pixels` numbers them."""
    return math.ceil(phase_pixels(p, pass_) / block) * p.phases(pass_)


def phase_taps(p: ConvProblem, pass_: str) -> list[int]:
    """Returns the number of taps of each phase of fprop or dgrad, without the phases that have none."""
    if pass_ == "fprop":
        return [p.taps]
    met = []
    for t, s, d in zip(p.T, p.S, p.D, strict=True):
        step = s // math.gcd(s, d)
        met.append([math.ceil((t - first) / step) for first in range(min(t, step))])
    return [math.prod(taps) for taps in itertools.product(*met)]


@functools.lru_cache(1024)
def frames_met(p: ConvProblem) -> float:
    """Returns the share of the first dimension's taps that a 3-D dgrad walks if each tile stays within one frame.

    See kernels/common.py `met_frames`.
    """
    if p.rank < 3:
        return 1.0
    x, y, stride, before, dilation = p.X[0], p.Y[0], p.S[0], p.P[0], p.D[0]
    met = sum(0 <= j * stride - before + t * dilation < x for t in range(p.T[0]) for j in range(y))
    return met / (math.ceil(x / stride) * p.T[0])


@dataclass(frozen=True)
class Work:
    """The work of a plan's programs.

    Attributes:
        steps: iterations of the main loops of all programs.
        flops, length, fetched: operations, issue slots of a warp, and bytes fetched, all per iteration.
        resident: the most programs that fit on a unit at once (occupancy).
        outside: instructions of a warp outside the main loop.
        turn: seconds between two tiles' main loops, if a program stays for the next tile; None if each is a program's own.
        beside: seconds of a tile's end that pass beside the next tile's main loop, as far as that lasts.
        shared: bytes of shared memory that boxes fill and products read, per iteration; 0 where that is not counted.
    """

    steps: int
    flops: float
    length: float
    fetched: int
    resident: int
    outside: float = 0
    turn: float | None = None
    beside: float = 0.0
    shared: int = 0


def price(
    p: ConvProblem,
    pass_: str,
    tile: Tile,
    splits: int,
    access: Access,
    device: Device,
    work: Work,
    programs: int,
    phases: int,
    dot: bool,
    start: float,
) -> Cost:
    """Returns the cost of a plan on a device.

    Args:
        p, pass_: the problem and "fprop", "dgrad" or "wgrad".
        tile, splits, access: the plan.
        device: the device, whose limits set the rates.
        work: what the plan's kernel counts (planning/family.py).
        programs: programs of the plan, over all splits.
        phases: groups of programs that run one after the other and each read all of dy.
        dot: True if the kernel multiplies with tl.dot.
        start: seconds that a program takes at its start, besides START and its instructions.
    """
    limits, itemsize = device.limits, access.itemsize
    waves = math.ceil(programs / device.units)
    steps = work.steps / programs * waves  # of the unit with the most programs
    products = steps * work.flops / (_rate(access, device, dot) / device.units)
    resident = max(1, min(waves, work.resident))
    busy = tile.warps / ISSUE  # cycles of an instruction of each warp, if the unit always has one to issue
    pace = max(busy, PACE / resident)
    if access.narrow or not dot:
        cycles = max(busy * work.length, LATENCY / resident)
    else:
        cycles = pace * work.length
        if resident == 1 and (access.precision == BF16X6 or access.itemsize == 1):
            products += steps * cycles / limits.clock  # a lone BF16X6 program cuts, then multiplies; in fp8, then adds
    products = max(products, steps * work.shared / (SHARED * limits.clock))
    workspace = slices(p, pass_, splits, itemsize)
    least = least_bytes(p, pass_, itemsize, access.written)
    # The phases of a strided dgrad run one after the other, and each reads all of dy. If dy does not fit in L2, it is read from
    # memory each time.
    again = 0
    read = itemsize * math.prod(p.shape("y"))
    if pass_ == "dgrad" and read > limits.l2_bytes:
        again = read * (min(phases, p.taps) - 1)
    first = max(busy, PACE) * work.outside / limits.clock
    # A lone program's instructions outside its loop overlap with nothing, those of the first round of others neither.
    later = pace * work.outside * (waves - resident) if resident > 1 else 0.0
    parts = {
        "products": products,
        "issue": (steps * cycles + later) / limits.clock,
        "cache": steps * work.fetched / (limits.l2_bandwidth / device.units if dot else L1 * limits.clock),
        "memory": (least + again + workspace) / limits.bandwidth,
    }
    rounds = math.ceil(waves / max(1, work.resident))
    turn = work.turn
    if turn is None:
        turn = START + first if resident == 1 else START
    # Of two tiles by turns, each begins when the other's products have ended, and its own end has too.
    turn += max(0.0, work.beside - products / waves) / 2
    ends, summing = start + START + first + (rounds - 1) * turn, _summing(workspace, device)
    seconds = LAUNCH + ends + together(parts.values()) + summing
    alone = ("launch", LAUNCH), ("start", ends), ("sum", summing)
    executed = math.ceil(work.steps * work.flops)
    return Cost(flops(p), least, executed, programs, waves, device.units, workspace, tuple(parts.items()), seconds, alone)


def together(parts: Iterable[float]) -> float:
    """Returns the seconds of parts that overlap in part."""
    total: float = sum([part**OVERLAP for part in parts])
    return float(total ** (1 / OVERLAP))


def _rate(access: Access, device: Device, dot: bool) -> float:
    """Returns the operations per second of a kernel's products on the whole device."""
    limits = device.limits
    if access.itemsize == 8:
        return limits.matrix_64 if dot else limits.fma_32 / 2
    if access.precision == BF16X6:
        return limits.matrix_16 / 6
    if not dot or not access.tensor_cores:
        return limits.fma_32
    return {1: limits.matrix_8, 2: limits.matrix_16, 4: limits.matrix_tf32}[access.itemsize]


def split_steps(reduced: int, block: int, splits: int) -> int:
    """Returns the iterations over all splits of a reduction. The last split may be shorter but is counted in full."""
    return splits * math.ceil(math.ceil(reduced / block) / splits)


def _summing(workspace: int, device: Device) -> float:
    """Returns the seconds of a split reduction's second launch, which reads the workspace after all slices are written."""
    return 1.5 * LAUNCH + workspace / device.limits.bandwidth if workspace else 0.0


def with_copies(cost: Cost, read: int, written: int, device: Device) -> Cost:
    """Returns the cost of a plan with copies of its operands to another layout before it, made by one launch.

    Args:
        cost: the plan's cost without the copies.
        read, written: bytes that the copies read and write. They write more where channels are padded.
        device: the device.
    """
    seconds = (read + written) / device.limits.bandwidth + LAUNCH
    return replace(
        cost, workspace=cost.workspace + written, seconds=cost.seconds + seconds, alone=(*cost.alone, ("copies", seconds))
    )


def predict_bias(channels: int, pixels: int, tile: Tile, splits: int, itemsize: int, device: Device) -> Cost:
    """Returns the cost of a bias gradient: one addition per element of the output's gradient."""
    limits = device.limits
    tiles = math.ceil(channels / tile.n)
    steps = math.ceil(math.ceil(pixels / tile.k) / splits)
    programs, work = tiles * splits, channels * pixels
    waves = math.ceil(programs / device.units)
    workspace = splits * channels * max(4, itemsize) if splits > 1 else 0
    least = itemsize * (work + channels)
    resident = max(1, min(waves, 16 // tile.warps))
    parts = {
        "issue": waves * steps * LATENCY / resident / limits.clock,
        "memory": (least + workspace) / limits.bandwidth,
    }
    seconds = LAUNCH + max(parts.values()) + _summing(workspace, device)
    executed = tiles * tile.n * splits * steps * tile.k
    return Cost(work, least, executed, programs, waves, device.units, workspace, tuple(parts.items()), seconds)
