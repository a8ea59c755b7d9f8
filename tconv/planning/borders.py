"""The gradient of an input that is padded with its own elements: of x alone, and of its padding, which is added at its borders.

The padding of x [X] has up to two slabs per dimension, before x and after it. The gradient of a slab is a dgrad with extents
of its own, of the outputs that read it. Or the gradient of the padded x is one dgrad, into a workspace that is then folded.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from tconv.planning.cost import ISSUE, LAUNCH, Cost
from tconv.planning.device import Device
from tconv.planning.plan import INTERPRETED, WORKSPACE, Plan
from tconv.planning.problem import ZEROS, ConvProblem, Triple, pow2
from tconv.planning.tiles import Tile

# Pixels by channels: a thread has 32 elements in vectors, or 8 one by one, each of which takes registers for its address.
ADDING = 300  # instructions of a warp for a choice in a tile, counted for sm_90
TILE, SINGLY = Tile(64, 64, 1, 4, 1), Tile(64, 16, 1, 4, 1)


@dataclass(frozen=True)
class Slab:
    """A part of the padding, before x or after it in one dimension.

    Attributes:
        p: the problem whose dgrad is the slab's gradient.
        dimension: the dimension, of three.
        first: the first output along it that the dgrad reads. It reads `p.Y[dimension]` of them.
    """

    p: ConvProblem
    dimension: int
    first: int


def within(p: ConvProblem) -> ConvProblem:
    """Returns the problem whose dgrad is the gradient of x, without what its padding adds to it."""
    return dataclasses.replace(p, borders=ZEROS)


def around(p: ConvProblem) -> ConvProblem:
    """Returns the problem whose dgrad is the gradient of x and its padding, in one piece."""
    before, after = padding(p)
    X = [x + b + a for x, b, a in zip(p.X, before, after, strict=True)]
    P = [n - b for n, b in zip(p.P, before, strict=True)]
    return dataclasses.replace(p, X=_three(X), P=_three(P), borders=ZEROS)


def padding(p: ConvProblem) -> tuple[Triple, Triple]:
    """Returns the padding that repeats elements, before and after x, as far as it is read."""
    before, after = [0, 0, 0], [0, 0, 0]
    for d in range(3):
        if p.borders[d] != "zeros":
            last = (p.Y[d] - 1) * p.S[d] + (p.T[d] - 1) * p.D[d] - p.P[d]
            before[d], after[d] = max(0, p.P[d]), max(0, last + 1 - p.X[d])
    return _three(before), _three(after)


def slabs(p: ConvProblem) -> list[tuple[Slab | None, Slab | None]]:
    """Returns the slabs (before, after) of each dimension, None where there is no padding.

    That of dimension d has x's extent in the dimensions before d, and the padded one in those after d.
    """
    before, after = padding(p)
    found = []
    for d in range(3):
        X, P = list(p.X), list(p.P)
        for e in range(d + 1, 3):
            X[e], P[e] = p.X[e] + before[e] + after[e], p.P[e] - before[e]
        pair = []
        for extent, start in ((before[d], -before[d]), (after[d], p.X[d])):
            # Output j reads coordinates j*S - P to j*S - P + D*(T - 1). Those of the slab begin at `start`.
            reach, start = p.D[d] * (p.T[d] - 1), start + p.P[d]
            first = max(0, min(-((reach - start) // p.S[d]), start // p.S[d]))
            end = min(p.Y[d], (start + extent - 1) // p.S[d] + 1)
            Y = list(p.Y)
            X[d], Y[d], P[d] = extent, end - first, start - first * p.S[d]
            q = dataclasses.replace(p, X=_three(X), Y=_three(Y), P=_three(P), borders=ZEROS)
            pair.append(Slab(q, d, first) if extent else None)
        found.append((pair[0], pair[1]))
    return found


def shown(p: ConvProblem) -> tuple[Triple, Triple, Triple]:
    """Returns, per dimension, how many elements positions of the padding show: at the start, and in all; and the most choices.

    The others are at the end. A choice is the element's own position, or one of the padding that may show it.
    """
    low, every, choices = [0, 0, 0], [0, 0, 0], [1, 1, 1]
    for d, (border, extent, before, after) in enumerate(zip(p.borders, p.X, *padding(p), strict=True)):
        if border == "reflect":
            start, end = before and before + 1, after and after + 1
        elif border == "circular":
            start, end = after, before
        else:
            start, end = min(before, 1), min(after, 1)
        low[d], every[d] = min(start, extent), min(start + end, extent)
        if border != "zeros":
            choices[d] = 1 + before + after if border == "replicate" else 3
    return _three(low), _three(every), _three(choices)


def choose_borders(p: ConvProblem, written: int, vectors: bool, device: Device) -> Plan:
    """Returns the plan for adding the padding's gradient to that of x.

    Args:
        written: pixels that are written.
        vectors: whether elements are read in vectors, of four channels or more.
    """
    if device.interpreted:
        n = pow2(p.C, 1, 1024)
        return Plan("borders", "borders", Tile(pow2(written, 1, (1 << 18) // n), n, 1), 1, INTERPRETED)
    tile = TILE if vectors else SINGLY
    return Plan("borders", "borders", tile, 1, f"for {written} pixels", kernels=("borders",), tiles=(tile,))


def with_padding(whole: Cost, parts: Iterable[Cost], p: ConvProblem, itemsize: int, device: Device) -> Cost:
    """Returns the cost of a dgrad, given that of x alone and those of the slabs, with the sum that ends it.

    The sum reads and writes the elements that positions of the padding show, and reads the slabs.
    """
    parts = tuple(parts)
    slabs = math.prod(x + before + after for x, before, after in zip(p.X, *padding(p), strict=True)) - math.prod(p.X)
    workspace = p.N * p.C * slabs * itemsize
    moved = 2 * pixels(p) * p.C * itemsize + workspace
    seconds = whole.seconds + sum(part.seconds for part in parts) + LAUNCH + moved / device.limits.bandwidth
    most = max(whole.workspace, *(part.workspace for part in parts))
    return dataclasses.replace(whole, seconds=seconds, workspace=most + workspace)


def folded(padded: Cost, p: ConvProblem, tile: Tile, itemsize: int, device: Device) -> Cost | None:
    """Returns the cost of a dgrad by that of the padded x, which is given, and folding; None if it takes too much memory.

    Folding reads that gradient and writes dx. In a tile of `tile`, a warp takes about ADDING instructions for each choice.
    """
    written = p.N * p.C * math.prod(p.X)
    workspace = p.N * p.C * math.prod(around(p).X) * itemsize
    if workspace > WORKSPACE:
        return None
    _, _, choices = shown(p)
    issued = written / (tile.m * tile.n) * tile.warps * ADDING * math.prod(choices) / (ISSUE * device.units)
    seconds = LAUNCH + max((workspace + written * itemsize) / device.limits.bandwidth, issued / device.limits.clock)
    return dataclasses.replace(padded, seconds=padded.seconds + seconds, workspace=padded.workspace + workspace)


def at_once(fold: Cost | None, apart: Cost | None) -> bool:
    """Returns True if the padded gradient is to be folded, given the costs of that and of slabs; not if they are not known."""
    return fold is not None and apart is not None and fold.seconds < apart.seconds


def pixels(p: ConvProblem) -> int:
    """Returns the elements per channel, over all images, that positions of the padding show."""
    _, every, _ = shown(p)
    return p.N * (math.prod(p.X) - math.prod(x - n for x, n in zip(p.X, every, strict=True)))


def _three(v: list[int]) -> Triple:
    return v[0], v[1], v[2]
