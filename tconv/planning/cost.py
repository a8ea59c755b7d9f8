"""Counts what a pass must do and what a plan of it does, and predicts its time on a device. Standard library only.

Operations and bytes are exact counts. The time is a model: the slowest of four rates, plus a launch.

    products  of padded tiles, at the tensor cores' (or the multiply-adders') rate
    issue     instructions of the main loop, four warps a cycle on each unit
    cache     operands that programs fetch: from L2, or, by direct kernels, whose taps share them, mostly from L1
    memory    the least bytes, and what is read again because no cache holds it, at the memory's bandwidth

Programs fill a device in waves: the first three are of the fullest unit. A split reduction ends with a launch of its own,
which reads the workspace and overlaps with nothing. Loop lengths are fitted to the compiled code that
scripts/codegen.py reads (tests/test_cost.py holds them to it); what a step's latency hides behind and the fixed times are
estimates until a GPU has had its say.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

from tconv.planning import strips
from tconv.planning.device import Device
from tconv.planning.problem import ConvProblem
from tconv.planning.tiles import BF16X6, BOXES, Access, Tile

LAUNCH = 2e-6  # seconds from one kernel's start to that of an empty next one: an estimate
LATENCY = 1000  # cycles from asking the memory to having it, where a loop's loads are not pipelined: an estimate
BOX = 256  # elements of a tensor memory accelerator's box in one dimension
ISSUE = 4  # instructions a unit starts per cycle, one for each of its schedulers
L1 = 128  # bytes a unit takes from its own cache per cycle
START = 300  # instructions of a strip kernel's warp outside its loop
MOST_COLUMNS = 1 << 15  # taps times channels of a pack that the packed gather can count
CUT = {"gather": 10, "packed": 10, "wgrad": 20, "packed_wgrad": 20}  # instructions that cut an element into its pieces
ALONE = 1.5  # a program with a unit to itself is slowed so by its own barriers: an estimate


@dataclass(frozen=True)
class Cost:
    """What one pass costs under a plan.

    Attributes:
        flops: operations of the pass, two per multiply-add, every tap counted, the halo's too.
        bytes: least bytes: each operand read once, the result written once.
        executed: operations of the padded tiles.
        programs: programs launched, all splits together.
        waves: programs of the fullest unit.
        units: units of the device.
        workspace: bytes allocated beside the result.
        parts: seconds by each of "products", "issue", "cache" and "memory".
        seconds: the prediction.
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
        """The part that takes longest."""
        return max(self.parts, key=lambda part: part[1])[0]

    @property
    def rank(self) -> tuple[float, float]:
        """What plans are sorted by: the prediction, then all that would take time if it did not overlap."""
        return self.seconds, sum(seconds for _, seconds in self.parts)

    @property
    def tile_waste(self) -> float:
        """Share of the executed operations that tiles' tails make for nothing; none where a dgrad leaves out the halo."""
        return max(0.0, 1 - self.flops / self.executed)

    @property
    def wave_waste(self) -> float:
        """Share of the units' time that the last wave leaves idle."""
        return 1 - self.programs / (self.waves * self.units)

    def __str__(self) -> str:
        return (
            f"predicted {self.seconds * 1e6:.1f} us, bound by {self.bound}; "
            f"{self.programs} programs in {self.waves} waves, waste: tiles {self.tile_waste:.0%}, waves {self.wave_waste:.0%}"
        )


def flops(p: ConvProblem) -> int:
    """Operations of fprop, dgrad or wgrad: the three meet the same pairs of elements."""
    return 2 * p.N * math.prod(p.Y) * p.K * (p.C // p.G) * p.taps


def least_bytes(p: ConvProblem, pass_: str, itemsize: int) -> int:
    """Bytes of x, w and y, of which a pass reads two and writes the third; of x, dgrad writes all, the others read what
    the taps meet.
    """
    met = [x if pass_ == "dgrad" else min(x, y * t) for x, y, t in zip(p.X, p.Y, p.T, strict=True)]
    return itemsize * (p.N * p.C * math.prod(met) + math.prod(p.shape("w")) + math.prod(p.shape("y")))


def written_elements(p: ConvProblem, pass_: str) -> int:
    """Elements of a pass's result, and of a slice of its workspace."""
    return math.prod(p.shape({"fprop": "y", "dgrad": "x", "wgrad": "w"}[pass_]))


def phase_pixels(p: ConvProblem, pass_: str) -> int:
    """Pixels that the largest phase of fprop or dgrad writes."""
    return math.prod(pixel_extents(p, pass_))


def pixel_extents(p: ConvProblem, pass_: str) -> tuple[int, ...]:
    """Images, and per dimension the outputs, of the largest phase of fprop or dgrad."""
    return p.N, *(p.Y if pass_ == "fprop" else (math.ceil(x / s) for x, s in zip(p.X, p.S, strict=True)))


def pixel_tiles(p: ConvProblem, pass_: str, block: int) -> int:
    """Tiles of written pixels over all phases: what the kernels' own numbering (kernels/common.py) expects."""
    return math.ceil(phase_pixels(p, pass_) / block) * p.phases(pass_)


def pack(p: ConvProblem, pass_: str, tile: Tile) -> int:
    """Groups of which a packed kernel's tile takes the written channels: all, or a power of two for wide accesses' sake."""
    written = p.C // p.G if pass_ == "dgrad" else p.K // p.G
    room = (tile.m if pass_ == "wgrad" else tile.n) // written
    return p.G if room >= p.G else 1 << max(0, room.bit_length() - 1)


def phase_taps(p: ConvProblem, pass_: str) -> list[int]:
    """Taps that each phase of fprop or dgrad meets, phases without any left out."""
    if pass_ == "fprop":
        return [p.taps]
    met = []
    for t, s, d in zip(p.T, p.S, p.D, strict=True):
        step = s // math.gcd(s, d)
        met.append([math.ceil((t - first) / step) for first in range(min(t, step))])
    return [math.prod(taps) for taps in itertools.product(*met)]


@functools.lru_cache(1024)
def frames_met(p: ConvProblem) -> float:
    """Of the first dimension's taps the share that a 3-D dgrad walks whose tiles stay in a frame (kernels/gather.py)."""
    if p.rank < 3:
        return 1.0
    x, y, stride, before, dilation = p.X[0], p.Y[0], p.S[0], p.P[0], p.D[0]
    met = sum(0 <= j * stride - before + t * dilation < x for t in range(p.T[0]) for j in range(y))
    return met / (math.ceil(x / stride) * p.T[0])


@functools.lru_cache(1024)
def box_of(p: ConvProblem, pass_: str, block: int) -> tuple[tuple[int, int, int, int], int]:
    """The box [images, 3 extents] of `block` pixels, powers of two, that covers the largest phase of fprop or dgrad in the
    fewest pieces, and over all phases their number. Of equal ones the one longest in the last dimension.
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
    """The axis along which wgrad's boxes are runs of `block` pixels, "n" for images or a dimension, and the number of runs.

    A run ends where a dimension does, but may reach past the last image.
    """
    pixels = math.prod(p.Y)
    found: list[tuple[int, str | int]] = [(p.N * pixels // block, d) for d in (2, 1, 0) if p.Y[d] % block == 0]
    runs, axis = min([*found, (math.ceil(p.N / block) * pixels, "n")], key=lambda f: f[0])
    return axis, runs


def reduction(p: ConvProblem, pass_: str, kernel: str, tile: Tile) -> int:
    """What wgrad's splits share out, in units of which a step takes tile.k: pixels, strips, or those of whole runs."""
    if kernel == "strip_wgrad":
        return strips.strips_of(p, pass_, tile.columns)
    if kernel == "tma_wgrad":
        return run_of(p, tile.k)[1] * tile.k
    return p.gemm("wgrad")[2]


def tiles_of(p: ConvProblem, pass_: str, kernel: str, tile: Tile) -> int:
    """Programs of a plan without splits."""
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
    """Instructions of a warp per iteration of a kernel's main loop, fitted to what compilers for sm_90 make of it."""
    threads = 32 * tile.warps
    if kernel in ("depthwise", "depthwise_wgrad"):
        taps, pixels = (1, tile.m) if kernel == "depthwise" else (tile.m, tile.k)
        products = taps * pixels * tile.n / threads
        return 60 + products * (10 if access.narrow else 6)
    if kernel in BOXES:  # one thread asks for the boxes
        return 110.0
    loaded = (tile.m + tile.n) * tile.k / threads
    # wgrad's pixels carry digits, and both operands move with them; packed kernels mask, and the gather decodes, every element.
    base, copy, one = {"gather": (50, 8, 4), "wgrad": (110, 14, 4), "packed": (120, 10, 9), "packed_wgrad": (100, 14, 9)}[
        kernel
    ]
    copies = loaded * one if access.narrow else copy * loaded * access.itemsize / 16
    products = 0.0 if access.tensor_cores else 1.1 * tile.m * tile.n * tile.k / threads
    if access.precision == BF16X6:  # every element is cut, by each four warps that share its row; a step's sum is added
        shared = max(1, 16 * tile.warps // tile.m)
        products = CUT[kernel] * (shared * tile.m + tile.n) * tile.k / threads + tile.m * tile.n / threads
    return base + copies + products


def strip_length(p: ConvProblem, pass_: str, tile: Tile, access: Access) -> float:
    """The same of a strip kernel, per row of the filter, or in wgrad per step over the strips."""
    itemsize, narrow = access.itemsize, access.narrow
    taps, columns = min(strips.CHUNK, p.T[2]), strips.window(p, pass_, tile.columns)
    wide = 1 if narrow else strips.READ if access.flip else 16 // itemsize
    load = 3.5 if narrow and pass_ == "wgrad" else 8 if narrow or itemsize == 2 else 2
    read = (1.5 if itemsize == 2 else 0.3) + load / wide  # an element's share of a load, and its unpacking
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
    """What a plan costs on a device whose limits are known.

    Args:
        p, pass_: what to compute, "fprop", "dgrad" or "wgrad".
        kernel, tile, splits, access: how.
        device: where.
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
    steps = work.steps / programs * waves  # of the fullest unit

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
    elif resident == 1:  # in pieces, a program cuts, then multiplies
        products = products + steps * cycles / limits.clock if access.precision == BF16X6 else products * ALONE
    workspace = splits * written_elements(p, pass_) * max(4, itemsize) if splits > 1 else 0
    least = least_bytes(p, pass_, itemsize)
    # Phases of a strided dgrad run one after the other over all of dy; what the L2 cache has lost by then is read again.
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
    """What the programs of a plan do.

    Attributes:
        steps: iterations of all their loops together.
        flops, length, fetched: operations, instructions of a warp, and bytes fetched, all per iteration.
        resident: programs at most that a unit has room for.
        start: instructions of a warp outside the loop, where they count.
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
        # A tap belongs to one phase of a dgrad, so over the phases each counts once.
        reduced, per_phase = (p.C if pass_ == "fprop" else p.K) // p.G, tiles // p.phases(pass_)
        steps = per_phase * p.taps * _split_steps(reduced, tile.k, splits)
        if kernel == "gather" and pass_ == "dgrad" and tile.m * math.prod(p.S[1:]) <= math.prod(p.X[1:]):
            steps = math.ceil(steps * frames_met(p))
        if kernel == "packed":
            reduced *= pack(p, pass_, tile)
            steps = per_phase * sum(math.ceil(taps * reduced / tile.k) for taps in phase_taps(p, pass_))
    length = loop_length(kernel, tile, access)
    shared = tile.stages * (tile.m + tile.n) * tile.k * itemsize  # of its pipeline
    # Warps for which there are registers: pieces take many, and so do addresses one by one beside fp32 products.
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
    resident = int(65536 / (threads * (56 + elements / threads * (accumulators + 6))))  # by registers
    length = strip_length(p, pass_, tile, access)
    return _Work(steps, 2 * elements * met, length, access.itemsize * fetched, resident, START)


def _split_steps(reduced: int, block: int, splits: int) -> int:
    """Iterations over all splits of a reduction, the last of which may be short but takes as long."""
    return splits * math.ceil(math.ceil(reduced / block) / splits)


def _summing(workspace: int, device: Device) -> float:
    """Seconds of a split reduction's second launch, which reads the slices when all are written."""
    return LAUNCH + workspace / device.limits.bandwidth if workspace else 0.0


def with_copies(cost: Cost, copied: int, operands: int, device: Device) -> Cost:
    """A plan's cost with so many bytes of operands copied to another layout before it, each read and written once."""
    seconds = cost.seconds + 2 * copied / device.limits.bandwidth + operands * LAUNCH
    return replace(cost, workspace=cost.workspace + copied, seconds=seconds)


def predict_bias(channels: int, pixels: int, tile: Tile, splits: int, itemsize: int, device: Device) -> Cost:
    """What a bias gradient costs: an addition per element of the output's gradient."""
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
