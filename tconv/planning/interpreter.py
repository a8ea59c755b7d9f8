"""Tiles for Triton's interpreter, whose time is per operation and not per element: as few programs as possible."""

from __future__ import annotations

import math

from tconv.planning.cost import channels_of, phase_pixels, pixel_extents
from tconv.planning.problem import ConvProblem, pow2
from tconv.planning.strips import strips_of
from tconv.planning.tiles import Tile


def interpreter_tiles(problem: ConvProblem, pass_: str, kernel: str) -> tuple[Tile, ...]:
    """Returns the interpreter's tiles for a kernel: one program, or as few as blocks of at most 2^18 elements allow."""
    if kernel.startswith("strip"):
        n, columns = pow2(problem.K, 1, 1024), (4, 8, 6)
        m = [pow2(strips_of(problem, pass_, c), 1, (1 << 18) // n) for c in columns]
        if kernel == "strip":
            return tuple(Tile(k, n, 1, columns=c) for k, c in zip(m, columns, strict=True))
        return tuple(Tile(rows, n, k, columns=c) for rows in (3, 1) for k, c in zip(m, columns, strict=True))
    return (_tile(problem, pass_, kernel),)


def _tile(problem: ConvProblem, pass_: str, kernel: str) -> Tile:
    """Returns the interpreter's tile for a kernel other than the strip kernels."""
    written, reduced = channels_of(problem, pass_, kernel)
    if kernel == "depthwise_wgrad":
        n = pow2(problem.K, 1, 1024)
        return Tile(min(problem.taps, 27), n, pow2(problem.gemm("wgrad")[2], 1, (1 << 18) // n))
    if kernel == "tma_wgrad":
        k = pow2(problem.N, 16, 256)
        return Tile(pow2(problem.K // problem.G, 16, 256), pow2(problem.C // problem.G, 16, 256), k)
    if kernel.endswith("wgrad"):
        m, n = pow2(problem.K // problem.G, 16, 1024), pow2(problem.C // problem.G, 16, 1024)
        if kernel == "packed_wgrad":
            m, n = pow2(problem.K, 16, 256), pow2(problem.C * problem.taps, 16, 256)
        return Tile(m, n, pow2(problem.gemm("wgrad")[2], 16, (1 << 18) // max(m, n)))
    low = 1 if kernel == "depthwise" else 16
    if kernel == "packed":
        written, reduced = min(written * problem.G, max(written, 64)), 256
    n, k = pow2(written, low, 1024), pow2(reduced, low, 256)
    if kernel == "tma":  # a box's extents are powers of two, and it must not cross into the next group
        m = math.prod(pow2(e, 1, 64) for e in pixel_extents(problem, pass_))
        return Tile(pow2(m, low, (1 << 18) // max(n, k)), n, k if problem.G == 1 else min(k, reduced & -reduced))
    return Tile(pow2(phase_pixels(problem, pass_), low, (1 << 18) // max(n, k)), n, k)
