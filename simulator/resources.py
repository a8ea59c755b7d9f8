"""What ptxas makes of a kernel, and how many of its programs then fit on a multiprocessor."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

REGISTERS = 16384  # of a quarter of a multiprocessor, on all targets; a warp gets them in portions of 256
RESERVED = 1024  # bytes of shared memory that the system takes of each program's
PORTION = 128  # bytes in which shared memory is given out


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on a multiprocessor share (NVIDIA's table of compute capabilities)."""

    warps: int
    programs: int
    shared_bytes: int


TARGETS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10), "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10), "sm_90": Multiprocessor(64, 32, 228 << 10),
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What ptxas reports.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory that a thread stores registers to and loads them from.
    """

    registers: int
    spills: int


@dataclass(frozen=True)
class Occupancy:
    """How many programs a multiprocessor holds at once, the share of its warps that they are, and what limits them."""

    programs: int
    warps: float
    limit: str


def occupancy(target: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Returns the occupancy of a kernel.

    Args:
        target: "sm_90a", for instance.
        threads: of a program.
        registers: of a thread.
        shared_bytes: of a program.
    """
    unit, warps = TARGETS[target.rstrip("a")], threads // 32
    shared = -(-(shared_bytes + RESERVED) // PORTION) * PORTION
    limits = {
        "registers": 4 * (REGISTERS // (-(-registers * 32 // 256) * 256)) // warps,
        "shared memory": unit.shared_bytes // shared,
        "warps": unit.warps // warps,
        "programs": unit.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / unit.warps, limit)


@functools.lru_cache(1024)
def resources(ptx: str) -> Resources | None:
    """Returns what ptxas reports of a module with one kernel; None if Triton has no ptxas, or none that takes it."""
    from triton import knobs

    target = re.search(r"^\s*\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for tool in ("ptxas", "ptxas_blackwell"):  # the newer one knows later versions of PTX
            try:
                command = [getattr(knobs.nvidia, tool).path, "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
                told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            except (OSError, RuntimeError, subprocess.CalledProcessError):
                continue
            used, spilled = re.search(r"Used (\d+) registers", told), re.findall(r"(\d+) bytes spill", told)
            return Resources(int(used[1]), sum(map(int, spilled))) if used else None
    return None
