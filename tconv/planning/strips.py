"""Which depthwise problems the strip kernels (kernels/strip.py) support, and how many columns a strip reads.

A strip is a run of neighbouring outputs in the last dimension, computed by one thread per channel or vector of channels. Its
window is the range of columns that it reads. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tconv.planning.problem import ConvProblem

CHUNK = 8  # the most taps of a filter row whose products with a strip are unrolled
READ = 8  # columns per load where columns are contiguous
UNROLLED = 64  # the most columns of a window
UNROLLED_WGRAD = 24  # the same for wgrad, which also holds all of a strip's dy in registers
ACCUMULATORS = 12  # the most accumulators of a strip_wgrad program, one per tap


@dataclass(frozen=True)
class Strips:
    """How the strip kernels access a depthwise problem's operands.

    Attributes:
        flip: True if the operand read has no contiguous channels; usually its columns are contiguous.
        narrow: True if some operand is read or written element by element.
    """

    flip: bool
    narrow: bool


def why_not(p: ConvProblem, pass_: str, columns: int, rows: int = 1) -> str | None:
    """Returns why a pass cannot run as strips of so many columns, or None.

    Args:
        p, pass_: the problem and "fprop", "dgrad" or "wgrad".
        columns: outputs of a strip (wgrad: columns of dy).
        rows: for wgrad, rows of the filter per program.
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
    """Returns the number of columns, first to last, that a strip reads for one chunk of a filter row's taps."""
    taps = (min(CHUNK, p.T[2]) - 1) * p.D[2]
    if pass_ == "dgrad":
        shift = p.P[2] % p.S[2]
        return (shift + columns - 1) // p.S[2] - (shift - taps) // p.S[2] + 1
    return (columns - 1) * p.S[2] + taps + 1


def chunks(p: ConvProblem) -> int:
    """Returns the number of chunks of a filter row. The last one may be shorter than CHUNK."""
    return math.ceil(p.T[2] / CHUNK)


def phases(p: ConvProblem, pass_: str) -> int:
    """Returns the number of phases over the first two dimensions. A strip contains all phases of the last dimension."""
    return p.S[0] * p.S[1] if pass_ == "dgrad" else 1


def strips_of(p: ConvProblem, pass_: str, columns: int) -> int:
    """Returns the number of strips that a pass writes (wgrad: reads of dy); for a dgrad, those of its largest phase."""
    if pass_ != "dgrad":
        return p.N * p.Y[0] * p.Y[1] * math.ceil(p.Y[2] / columns)
    return p.N * math.ceil(p.X[0] / p.S[0]) * math.ceil(p.X[1] / p.S[1]) * math.ceil(p.X[2] / columns)
