"""What a line of a record is found by: the machine that measured it, and the pass that it is of."""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import re
from dataclasses import dataclass
from typing import Any

from tconv.planning.operands import GatherPass, Pass

OCTAVE = 4  # buckets between a number and its double
KERNELS = pathlib.Path(__file__).parents[1] / "kernels"
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    Attributes:
        gpu: the device's name, as the driver gives it.
        driver: the version of its driver; empty in the interpreter.
        torch, triton: their versions.
        kernels: a hash of tconv's kernels.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    kernels: str


@functools.cache
def machine(gpu: str) -> Machine:
    """Returns the description of this machine with a device of that name."""
    import torch
    import triton

    return Machine(gpu, _driver() if torch.cuda.is_available() else "", torch.__version__, triton.__version__, _kernels())


def _driver() -> str:
    """Returns the version of the GPU's driver, or of the CUDA API that it has where the version is not told."""
    import torch

    for name in DRIVERS:
        try:
            found = re.search(r"\d+(\.\d+)+", pathlib.Path(name).read_text())
        except OSError:
            continue
        if found:
            return found[0]
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version else ""


def _kernels() -> str:
    """Returns a hash of the source of tconv's kernels."""
    found = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """A pass on given tensors, as far as measurements carry over to others.

    Attributes:
        kind: what must be equal: the pass, the dtype with "tf32" where it is allowed, memory formats and vector widths of the
            operands, and of the simplified problem the rank, channels, groups, taps, stride, dilation, and borders unless they
            are zeros.
        images, pixels: of the simplified problem, in quarters of an octave (`bucket`).
    """

    kind: tuple[Any, ...]
    images: int
    pixels: int

    def distance(self, other: Cell) -> int:
        """Returns how far two cells of one kind are apart, in quarters of an octave."""
        return abs(self.images - other.images) + abs(self.pixels - other.pixels)


def bucket(n: int) -> int:
    """Returns the bucket of a number of images or pixels: four to an octave, so numbers in one differ by at most 19%.

    Example:
        >>> bucket(64), bucket(70), bucket(76)
        (24, 25, 25)
    """
    return round(OCTAVE * math.log2(n))


def cell_of(c: Pass, dtype: str) -> Cell:
    """Returns the cell of a pass.

    Args:
        c: the pass, with its operands as they are given, not copied.
        dtype: of its operands, such as "bfloat16".
    """
    p = c.p
    weight = f"{c.inner or '-'}{c.w_vec}" if isinstance(c, GatherPass) else "i" if c.w.unit else "-"
    x = f"c{c.x_vec}" if c.x.unit else f"{c.lanes_x.unit or '-'}{c.lanes_x.vec}"
    y = f"c{c.y_vec}" if c.y.unit else f"{c.lanes_y.unit or '-'}{c.lanes_y.vec}"
    precision = f"{dtype} tf32" if dtype == "float32" and c.tensor_cores else dtype
    kind: tuple[Any, ...] = c.pass_, precision, (x, weight, y), p.rank, p.C, p.K, p.G, p.T, p.S, p.D
    if p.bordered:
        kind = *kind, p.borders
    return Cell(kind, bucket(p.N), bucket(math.prod(p.Y)))


def tuples(value: Any) -> Any:
    """Returns JSON's lists as tuples, at every level."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value
