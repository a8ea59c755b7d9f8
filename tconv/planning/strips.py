"""How the strip kernels (kernels/strip.py) cut a depthwise problem: which they take, and what a strip reads. Standard library
only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tconv.planning.problem import ConvProblem

CHUNK = 8  # taps of a filter's row whose products with a strip are unrolled
READ = 8  # columns that one load takes, where they are contiguous
UNROLLED = 64  # columns of a window at most
UNROLLED_WGRAD = 24  # there all of a strip's gradients are kept beside the window
ACCUMULATORS = 12  # of a program of strip_wgrad, one for each of its taps, at most


@dataclass(frozen=True)
class Strips:
    """How a depthwise problem's operands lie.

    Attributes:
        flip: columns, not channels, are contiguous in what is read.
        narrow: something is read or written element by element.
    """

    flip: bool
    narrow: bool


def why_not(p: ConvProblem, pass_: str, columns: int, rows: int = 1) -> str | None:
    """Why a pass cannot be cut into strips of so many columns, or None.

    Args:
        p, pass_: the problem and "fprop", "dgrad" or "wgrad".
        columns: outputs of a strip.
        rows: of wgrad, rows of the filter that a program owns.
    """
    stride, step = p.S[2], min(CHUNK, p.T[2]) * p.D[2]
    if not p.depthwise or p.multiplier > 1:
        return f"strip kernels take one filter per channel, got {p}"
    if pass_ == "dgrad" and (columns % stride or (p.T[2] > CHUNK and step % stride)):
        return f"strips of {columns} columns are no multiple of the stride {stride}"
    if columns & (columns - 1) and (pass_ != "dgrad" or stride % 3):
        return f"{columns} columns are for a dgrad with a stride of three"
    most = UNROLLED_WGRAD if pass_ == "wgrad" else UNROLLED
    if window(p, pass_, columns) > most:
        return f"a strip of {columns} columns meets more than {most}"
    if rows > 1 and (rows > p.T[0] * p.T[1] or rows * min(CHUNK, p.T[2]) > ACCUMULATORS):
        return f"{rows} rows of this filter are too many"
    return None


def window(p: ConvProblem, pass_: str, columns: int) -> int:
    """Columns from the first to the last that a strip meets in one chunk of a row's taps."""
    taps = (min(CHUNK, p.T[2]) - 1) * p.D[2]
    if pass_ == "dgrad":
        shift = p.P[2] % p.S[2]
        return (shift + columns - 1) // p.S[2] - (shift - taps) // p.S[2] + 1
    return (columns - 1) * p.S[2] + taps + 1


def chunks(p: ConvProblem) -> int:
    """Chunks of a filter's row, the last of which may be shorter."""
    return math.ceil(p.T[2] / CHUNK)


def phases(p: ConvProblem, pass_: str) -> int:
    """Groups of rows that meet the same taps; columns of all phases lie in one strip."""
    return p.S[0] * p.S[1] if pass_ == "dgrad" else 1


def strips_of(p: ConvProblem, pass_: str, columns: int) -> int:
    """Strips that a pass writes (wgrad: reads of dy), of a dgrad those of its largest phase."""
    if pass_ != "dgrad":
        return p.N * p.Y[0] * p.Y[1] * math.ceil(p.Y[2] / columns)
    return p.N * math.ceil(p.X[0] / p.S[0]) * math.ceil(p.X[1] / p.S[1]) * math.ceil(p.X[2] / columns)
