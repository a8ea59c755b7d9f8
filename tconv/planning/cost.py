"""Counts the work of a pass and of a plan for it, and predicts the plan's time on a device. Standard library only.

Operations and bytes are exact counts. The time is a model: a launch, plus the longest of four parts.

    products  the products of the padded tiles, at the rate of tensor cores or of multiply-adds
    issue     the instructions of the main loop, four warps per cycle on each multiprocessor
    cache     the operands that programs fetch: from L2, or for depthwise kernels, whose taps share them, mostly from L1
    memory    the least bytes, the workspace, and bytes that are read again because no cache holds them, at memory bandwidth

Programs run in waves, so the first three parts are counted for the multiprocessor with the most programs. A split-K reduction
ends with a second launch, which reads the workspace and overlaps with nothing. Loop lengths are fitted to compiled code, as
scripts/codegen.py reads it (tests/test_cost.py compares them). Latencies and fixed times are estimates, not yet measured on
a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

from tconv.planning import strips
from tconv.planning.device import Device
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, TMA_KERNELS, Access, Tile

LAUNCH = 2e-6  # seconds between the starts of two consecutive empty kernels: an estimate
LATENCY = 1000  # cycles from a load to its data, in a main loop whose loads are not pipelined: an estimate
BOX = 256  # the most elements of a tensor memory accelerator's box in one dimension
ISSUE = 4  # warp instructions that a unit issues per cycle, one per scheduler
L1 = 128  # bytes that a unit reads from its L1 cache per cycle
START = 300  # instructions of a strip kernel's warp outside the main loop
MOST_COLUMNS = 1 << 15  # the most taps times reduced channels of a pack that the packed kernel can decode
CUT = {"gather": 10, "packed": 10, "wgrad": 20, "packed_wgrad": 20}  # instructions to cut an element into pieces
ALONE = 1.5  # how much longer products take if a unit has one program, which then waits at its own barriers: an estimate


@dataclass(frozen=True)
class Cost:
    """The counted work and predicted time of one pass under a plan.

    Attributes:
        flops: operations of the pass, two per multiply-add. Taps that fall in the padding count too.
        bytes: least bytes: each operand read once, the result written once.
        executed: operations of the padded tiles.
        programs: programs launched, over all splits.
        waves: programs that the unit with the most programs runs.
        units: multiprocessors of the device.
        workspace: bytes allocated besides the result.
        parts: seconds of "products", "issue", "cache" and "memory".
        seconds: the predicted time.
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


def least_bytes(p: ConvProblem, pass_: str, itemsize: int) -> int:
    """Returns the bytes of x, w and y. A pass reads two of them and writes the third.

    dgrad writes all of x. The other passes read at most Y*T elements of it along each dimension.
    """
    met = [x if pass_ == "dgrad" else min(x, y * t) for x, y, t in zip(p.X, p.Y, p.T, strict=True)]
    return itemsize * (p.N * p.C * math.prod(met) + math.prod(p.shape("w")) + math.prod(p.shape("y")))


def written_elements(p: ConvProblem, pass_: str) -> int:
    """Returns the elements of a pass's result, which is also the size of one split's slice of the workspace."""
    return math.prod(p.shape({"fprop": "y", "dgrad": "x", "wgrad": "w"}[pass_]))


def channels_of(problem: ConvProblem, pass_: str, kernel: str) -> tuple[int, int]:
    """Returns (channels written, channels reduced): per group, or over all groups if the kernel's tiles span groups."""
    c, k = problem.C // problem.G, problem.K // problem.G
    if kernel == "depthwise":
        return (problem.K if pass_ == "fprop" else problem.C), 1
    return (k, c) if pass_ == "fprop" else (c, k)


def phase_pixels(p: ConvProblem, pass_: str) -> int:
    """Returns the pixels that the largest phase of fprop or dgrad writes."""
    return math.prod(pixel_extents(p, pass_))


def pixel_extents(p: ConvProblem, pass_: str) -> tuple[int, ...]:
    """Returns the images and the written extents of the largest phase of fprop or dgrad."""
    return p.N, *(p.Y if pass_ == "fprop" else (math.ceil(x / s) for x, s in zip(p.X, p.S, strict=True)))


def pixel_tiles(p: ConvProblem, pass_: str, block: int) -> int:
    """Returns the tiles of written pixels over all phases, as kernels/common.py `written_pixels` numbers them."""
    return math.ceil(phase_pixels(p, pass_) / block) * p.phases(pass_)


def pack(p: ConvProblem, pass_: str, tile: Tile) -> int:
    """Returns the groups per pack of a packed kernel: all, or the largest power of two whose written channels fit in the tile.

    At least one. A power of two keeps accesses wide.
    """
    written = p.C // p.G if pass_ == "dgrad" else p.K // p.G
    room = (tile.m if pass_ == "wgrad" else tile.n) // written
    return p.G if room >= p.G else 1 << max(0, room.bit_length() - 1)


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


@functools.lru_cache(1024)
def box_of(p: ConvProblem, pass_: str, block: int) -> tuple[tuple[int, int, int, int], int]:
    """Returns the box [images, 3 extents] of `block` pixels that covers the largest phase of fprop or dgrad in the fewest
    pieces, and the number of pieces over all phases.

    Extents of a box are powers of two. Of equally good boxes, the longest in the last dimension is returned.
    """
    extents, logs = pixel_extents(p, pass_), block.bit_length()
    found = []
    for b, c, d in itertools.product(range(logs), repeat=3):
        box = (block >> b + c + d, 1 << b, 1 << c, 1 << d)
        if box[0] and max(box) <= BOX:
            pieces = math.prod(math.ceil(n / e) for n, e in zip(extents, box, strict=True))
            found.append((pieces, (-d, -c, -b), box))
    pieces, _, best = min(found)
    return best, pieces * p.phases(pass_)


def run_of(p: ConvProblem, block: int) -> tuple[str | int, int]:
    """Returns the axis along which tma_wgrad's boxes are runs of `block` pixels, and the number of runs.

    The axis is "n" for images, or a dimension whose output extent is a multiple of `block`. A run along the images may reach
    past the last one.
    """
    pixels = math.prod(p.Y)
    found: list[tuple[int, str | int]] = [(p.N * pixels // block, d) for d in (2, 1, 0) if p.Y[d] % block == 0]
    runs, axis = min([*found, (math.ceil(p.N / block) * pixels, "n")], key=lambda f: f[0])
    return axis, runs


def reduction(p: ConvProblem, pass_: str, kernel: str, tile: Tile) -> int:
    """Returns the length of wgrad's reduction in pixels, strips, or pixels of whole runs. An iteration takes tile.k of them."""
    if kernel == "strip_wgrad":
        return strips.strips_of(p, pass_, tile.columns)
    if kernel == "tma_wgrad":
        return run_of(p, tile.k)[1] * tile.k
    return p.gemm("wgrad")[2]


def tiles_of(p: ConvProblem, pass_: str, kernel: str, tile: Tile) -> int:
    """Returns the programs of a plan without splits."""
    c, k = p.C // p.G, p.K // p.G
    if kernel in ("wgrad", "tma_wgrad"):
        return math.ceil(k / tile.m) * math.ceil(c / tile.n) * p.taps * p.G
    if kernel == "packed_wgrad":
        group = pack(p, pass_, tile)
        return math.ceil(group * k / tile.m) * math.ceil(p.taps * group * c / tile.n) * math.ceil(p.G / group)
    if kernel == "depthwise_wgrad":
        return math.ceil(p.taps / tile.m) * math.ceil(p.K / tile.n)
    if kernel == "strip_wgrad":
        return strips.chunks(p) * math.ceil(p.T[0] * p.T[1] / tile.m) * math.ceil(p.K / tile.n)
    if kernel == "strip":
        phases = strips.phases(p, pass_)
        return math.ceil(strips.strips_of(p, pass_, tile.columns) / tile.m) * phases * math.ceil(p.K / tile.n)
    tiles = box_of(p, pass_, tile.m)[1] if kernel == "tma" else pixel_tiles(p, pass_, tile.m)
    if kernel == "depthwise":
        return tiles * math.ceil((p.K if pass_ == "fprop" else p.C) / tile.n)
    group = pack(p, pass_, tile) if kernel == "packed" else 1
    return tiles * math.ceil(group * (k if pass_ == "fprop" else c) / tile.n) * math.ceil(p.G / group)


def loop_length(kernel: str, tile: Tile, access: Access) -> float:
    """Returns a warp's instructions per iteration of a kernel's main loop, as fitted to code compiled for sm_90."""
    threads = 32 * tile.warps
    if kernel in ("depthwise", "depthwise_wgrad"):
        taps, pixels = (1, tile.m) if kernel == "depthwise" else (tile.m, tile.k)
        products = taps * pixels * tile.n / threads
        return 60 + products * (10 if access.narrow else 6)
    if kernel in TMA_KERNELS:  # one thread issues the loads
        return 110.0
    loaded = (tile.m + tile.n) * tile.k / threads
    # Instructions per iteration, per 16-byte copy, and per element of narrow loads. wgrad advances pixel digits with carries,
    # and both operands' offsets with them. The packed kernels mask every element, and `packed` also decodes every column.
    base, copy, one = {"gather": (50, 8, 4), "wgrad": (110, 14, 4), "packed": (120, 10, 9), "packed_wgrad": (100, 14, 9)}[
        kernel
    ]
    copies = loaded * one if access.narrow else copy * loaded * access.itemsize / 16
    products = 0.0 if access.tensor_cores else 1.1 * tile.m * tile.n * tile.k / threads
    if access.precision == BF16X6:  # each warpgroup cuts the rows it reads; a step's sum is added
        shared = max(1, 16 * tile.warps // tile.m)
        products = CUT[kernel] * (shared * tile.m + tile.n) * tile.k / threads + tile.m * tile.n / threads
    return base + copies + products


def strip_length(p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
    """Returns a warp's instructions of a strip kernel per filter row, or in wgrad per iteration over the strips."""
    itemsize, narrow = access.itemsize, access.narrow
    taps, columns = min(strips.CHUNK, p.T[2]), strips.window(p, pass_, tile.columns)
    wide = 1 if narrow else strips.READ if access.flip else 16 // itemsize
    load = 3.5 if narrow and pass_ == "wgrad" else 8 if narrow or itemsize == 2 else 2
    read = (1.5 if itemsize == 2 else 0.3) + load / wide  # unpacking an element, and its share of a load
    if pass_ == "wgrad":
        elements, loaded = tile.n * tile.k / (32 * tile.warps), tile.m * columns + tile.columns
        return 120 + 30 * tile.m + elements * (tile.m * tile.columns * taps + loaded * (read - 0.5))
    elements, met = tile.n * tile.m / (32 * tile.warps), tile.columns * taps / (p.S[2] if pass_ == "dgrad" else 1)
    return 40 + strips.chunks(p) * (30 + elements * (met + taps + columns * read))


def predict(
    p: ConvProblem,
    pass_: str,
    kernel: str,
    tile: Tile,
    splits: int,
    access: Access,
    device: Device,
) -> Cost:
    """Returns the cost of a plan on a device.

    Args:
        p, pass_: the problem and "fprop", "dgrad" or "wgrad".
        kernel, tile, splits, access: the plan.
        device: the device, whose limits set the rates.
    """
    limits, itemsize, strip = device.limits, access.itemsize, kernel.startswith("strip")
    direct = strip or kernel.startswith("depthwise")
    if strip:
        work = _strip_work(p, pass_, tile, splits, access)
    elif direct:
        work = _direct_work(p, pass_, kernel, tile, splits, access)
    else:
        work = _gemm_work(p, pass_, kernel, tile, splits, access, device)
    programs = tiles_of(p, pass_, kernel, tile) * splits
    waves = math.ceil(programs / device.units)
    steps = work.steps / programs * waves  # of the unit with the most programs

    rate = limits.fma_32 if direct or not access.tensor_cores else limits.matrix_tf32 if itemsize == 4 else limits.matrix_16
    if access.precision == BF16X6:
        rate = limits.matrix_16 / 6
    if itemsize == 8:
        rate = limits.fma_32 / 2 if direct else limits.matrix_64
    products = steps * work.flops / (rate / device.units)
    cycles = tile.warps * work.length / ISSUE
    resident = max(1, min(waves, work.resident))
    if access.narrow or direct:
        cycles = max(cycles, LATENCY / resident)
    elif resident == 1:  # a lone BF16X6 program cuts, then multiplies
        products = products + steps * cycles / limits.clock if access.precision == BF16X6 else products * ALONE
    workspace = splits * written_elements(p, pass_) * max(4, itemsize) if splits > 1 else 0
    least = least_bytes(p, pass_, itemsize)
    # The phases of a strided dgrad run one after the other, and each reads all of dy. If dy does not fit in L2, it is read from
    # memory each time.
    again = 0
    read = itemsize * math.prod(p.shape("y"))
    if pass_ == "dgrad" and read > limits.l2_bytes:
        again = read * (min(strips.phases(p, pass_) if strip else p.phases(pass_), p.taps) - 1)
    start = waves * tile.warps * work.start / ISSUE
    parts = {
        "products": products,
        "issue": (steps * cycles + start) / limits.clock,
        "cache": steps * work.fetched / (L1 * limits.clock if direct else limits.l2_bandwidth / device.units),
        "memory": (least + again + workspace) / limits.bandwidth,
    }
    seconds = LAUNCH + max(parts.values()) + _summing(workspace, device)
    executed = math.ceil(work.steps * work.flops)
    return Cost(flops(p), least, executed, programs, waves, device.units, workspace, tuple(parts.items()), seconds)


@dataclass(frozen=True)
class _Work:
    """The work of a plan's programs.

    Attributes:
        steps: iterations of the main loops of all programs.
        flops, length, fetched: operations, instructions of a warp, and bytes fetched, all per iteration.
        resident: the most programs that fit on a unit at once (occupancy).
        start: instructions of a warp outside the main loop, where they matter.
    """

    steps: int
    flops: float
    length: float
    fetched: int
    resident: int
    start: int = 0


def _gemm_work(
    p: ConvProblem,
    pass_: str,
    kernel: str,
    tile: Tile,
    splits: int,
    access: Access,
    device: Device,
) -> _Work:
    tiles, itemsize = tiles_of(p, pass_, kernel, tile), access.itemsize
    if pass_ == "wgrad":
        steps = tiles * _split_steps(reduction(p, pass_, kernel, tile), tile.k, splits)
    else:
        # A tap belongs to exactly one phase of a dgrad, so over all phases each tap counts once.
        reduced, per_phase = (p.C if pass_ == "fprop" else p.K) // p.G, tiles // p.phases(pass_)
        steps = per_phase * p.taps * _split_steps(reduced, tile.k, splits)
        if kernel == "gather" and pass_ == "dgrad" and tile.m * math.prod(p.S[1:]) <= math.prod(p.X[1:]):
            steps = math.ceil(steps * frames_met(p))
        if kernel == "packed":
            reduced *= pack(p, pass_, tile)
            steps = per_phase * sum(math.ceil(taps * reduced / tile.k) for taps in phase_taps(p, pass_))
    length = loop_length(kernel, tile, access)
    shared = tile.stages * (tile.m + tile.n) * tile.k * itemsize  # bytes of the software pipeline
    # How many warps the registers suffice for. BF16X6 pieces take many registers, and so do per-element addresses beside true
    # fp32 products.
    many = access.precision == BF16X6 or (access.narrow and not access.tensor_cores and kernel != "gather")
    warps = 8 if many else 16
    resident = min(device.shared_bytes // shared, warps // tile.warps)
    return _Work(steps, 2 * tile.m * tile.n * tile.k, length, itemsize * tile.k * (tile.m + tile.n), resident)


def _direct_work(p: ConvProblem, pass_: str, kernel: str, tile: Tile, splits: int, access: Access) -> _Work:
    tiles, fetched = tiles_of(p, pass_, kernel, tile), access.itemsize * tile.n * tile.m
    if pass_ == "wgrad":
        steps = tiles * _split_steps(p.N * math.prod(p.Y), tile.k, splits)
        fetched = access.itemsize * tile.n * (tile.m + 1) * tile.k
    else:
        steps = tiles // p.phases(pass_) * p.taps * (p.multiplier if pass_ == "dgrad" else 1)
    length = loop_length(kernel, tile, access)
    return _Work(steps, 2 * tile.m * tile.n * tile.k, length, fetched, 16 // tile.warps)


def _strip_work(p: ConvProblem, pass_: str, tile: Tile, splits: int, access: Access) -> _Work:
    kernel = "strip_wgrad" if pass_ == "wgrad" else "strip"
    tiles, columns = tiles_of(p, pass_, kernel, tile), strips.window(p, pass_, tile.columns)
    if pass_ == "wgrad":
        taps = min(strips.CHUNK, p.T[2])
        steps = tiles * _split_steps(strips.strips_of(p, pass_, tile.columns), tile.k, splits)
        elements, accumulators = tile.n * tile.k, tile.m * taps + tile.columns / 2
        met, fetched = float(tile.m * tile.columns * taps), elements * (tile.columns + tile.m * columns)
    else:
        steps = tiles // strips.phases(p, pass_) * p.T[0] * p.T[1]
        elements, accumulators = tile.n * tile.m, tile.columns
        met, fetched = tile.columns * p.T[2] / (p.S[2] if pass_ == "dgrad" else 1), elements * strips.chunks(p) * columns
    threads = 32 * tile.warps
    resident = int(65536 / (threads * (56 + elements / threads * (accumulators + 6))))  # registers limit the occupancy
    length = strip_length(p, pass_, tile, access)
    return _Work(steps, 2 * elements * met, length, access.itemsize * fetched, resident, START)


def _split_steps(reduced: int, block: int, splits: int) -> int:
    """Returns the iterations over all splits of a reduction. The last split may be shorter but is counted in full."""
    return splits * math.ceil(math.ceil(reduced / block) / splits)


def _summing(workspace: int, device: Device) -> float:
    """Returns the seconds of a split reduction's second launch, which reads the workspace after all slices are written."""
    return LAUNCH + workspace / device.limits.bandwidth if workspace else 0.0


def with_copies(cost: Cost, copied: int, operands: int, device: Device) -> Cost:
    """Returns the cost of a plan with copies of its operands to another layout before it.

    Args:
        cost: the plan's cost without the copies.
        copied: bytes copied, each read once and written once.
        operands: number of operands copied, one launch each.
        device: the device.
    """
    seconds = cost.seconds + 2 * copied / device.limits.bandwidth + operands * LAUNCH
    return replace(cost, workspace=cost.workspace + copied, seconds=seconds)


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
