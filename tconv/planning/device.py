"""What a device has and how fast it can be. Only `cuda_device` imports torch, when it is first called."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

DEPENDENT = "dependent launch"  # the mechanism of `Device.dependent`
SWITCH = "TCONV_DEPENDENT_LAUNCH"


@dataclass(frozen=True)
class Limits:
    """Peak rates that a device reaches in practice, per second: operations (a multiply-add counts two), bytes, cycles.

    Attributes:
        matrix_16, matrix_tf32, matrix_64: operations of dense matrix products in fp16 or bf16, in TF32, and in fp64.
        fma_32: operations of fp32 multiply-adds without tensor cores.
        bandwidth: device memory, bytes read plus bytes written.
        l2_bandwidth: from the L2 cache to the multiprocessors.
        l2_bytes: size of the L2 cache, or of a larger cache behind it that serves repeated reads.
        clock: cycles of a multiprocessor.
        matrix_8: operations of dense matrix products in fp8; 0 if there are none.
    """

    matrix_16: float
    matrix_tf32: float
    matrix_64: float
    fma_32: float
    bandwidth: float
    l2_bandwidth: float
    l2_bytes: float
    clock: float
    matrix_8: float = 0.0


# H200 as measured (bench/results): 800 TFLOP/s in a bf16 product of random data, 397 in TF32, 58 in fp64, 51 in fp32
# multiply-adds, 4.3 TB/s in a copy. fp8 was not measured: its data sheet has twice the rate of bf16. The L2 bandwidth is the
# one that fits the times of tiles best; plain reads of 20 MB reach 9.9 TB/s. Of the other devices nothing was measured: 0.8 of
# their data sheets' matrix rates, 0.9 of the bandwidth, and estimates of their L2, raised by as much as the H200's was.
H100 = Limits(800e12, 397e12, 58e12, 51e12, 3.0e12, 20e12, 50e6, 1.755e9, 1600e12)
H200 = dataclasses.replace(H100, bandwidth=4.3e12)
A100 = Limits(250e12, 125e12, 15.6e12, 15.6e12, 1.83e12, 11.3e12, 40e6, 1.41e9)
MI300X = Limits(1045e12, 522e12, 130e12, 130e12, 4.8e12, 40e12, 256e6, 2.1e9)


@dataclass(frozen=True)
class Device:
    """What planning needs to know about a device.

    Attributes:
        name: as the driver gives it, or "interpreter".
        units: multiprocessors (compute units).
        shared_bytes: shared memory that one program may use.
        interpreted: True if Triton's interpreter runs the kernels. Its time is per operation, not per element.
        limits: peak rates; by default those of an H100.
        generation: CUDA's major compute capability, 0 for AMD.
        check: tells whether a mechanism, such as TMA, gives right results on this very device (launching/self_check.py); None
            for a device that is only planned for, where all are taken to.
    """

    name: str
    units: int
    shared_bytes: int
    interpreted: bool = False
    limits: Limits = H100
    generation: int = 9
    check: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)

    def works(self, mechanism: str) -> bool:
        """Returns True if plans may use a mechanism on this device. The empty mechanism is that of every plain kernel."""
        return not mechanism or self.check is None or self.check(mechanism)

    @property
    def fp8(self) -> bool:
        """Whether tensor cores multiply fp8 (e4m3 as torch.float8_e4m3fn has it), and kernels were compiled that do."""
        return self.interpreted or (self.generation >= 9 and self.limits.matrix_8 > 0)

    @property
    def dependent(self) -> bool:
        """Whether a kernel that only sums what the one before it wrote may be launched before that one has ended.

        Then it waits on the device (programmatic dependent launch, from compute capability 9 on), and its launch overlaps the
        end of the kernel before.

        Raises:
            ValueError: the environment variable TCONV_DEPENDENT_LAUNCH, by which it is switched off, is neither 0 nor 1.
        """
        if os.environ.get(SWITCH, "1") not in ("0", "1"):
            raise ValueError(f"the environment variable {SWITCH} must be 0 or 1, got {os.environ[SWITCH]!r}")
        allowed = os.environ.get(SWITCH) != "0" and self.generation >= 9 and not self.interpreted
        return allowed and self.works(DEPENDENT)


DEVICES = {
    "H200": Device("H200", 132, 232448, limits=H200),
    "H100": Device("H100", 132, 232448, limits=H100),
    "A100": Device("A100", 108, 166912, limits=A100, generation=8),
    "MI300X": Device("MI300X", 304, 65536, limits=MI300X, generation=0),
}
ARCHITECTURES = {  # name: (Triton's backend, its name for the architecture, warp size, a device of that architecture)
    "sm_80": ("cuda", 80, 32, DEVICES["A100"]),
    "sm_90": ("cuda", 90, 32, DEVICES["H100"]),
    "sm_100": ("cuda", 100, 32, Device("B200", 148, 232448, generation=10)),
    "gfx942": ("hip", "gfx942", 64, DEVICES["MI300X"]),
}
INTERPRETER = Device("interpreter", 1, 1 << 40, interpreted=True)


def limits_of(name: str, units: int, generation: int) -> Limits:
    """Returns the limits of a device, scaled from a listed device to its number of units.

    The listed device is the one whose name occurs in `name`, else a listed one of the same or the nearest generation.

    Args:
        name: the name that the driver gives.
        units: number of multiprocessors.
        generation: CUDA's major compute capability, 0 for AMD.
    """
    nearest = "MI300X" if generation == 0 else "A100" if generation < 9 else "H100"
    like = next((d for key, d in DEVICES.items() if key in name), DEVICES[nearest])
    kept = {"clock": like.limits.clock, "l2_bytes": like.limits.l2_bytes}
    return Limits(**{k: v * units / like.units for k, v in dataclasses.asdict(like.limits).items()} | kept)


@functools.cache
def cuda_device(index: int) -> Device:
    """Returns the CUDA or ROCm device with that index."""
    import torch

    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 0) or 65536
    generation = 0 if torch.version.hip else p.major
    limits = limits_of(p.name, p.multi_processor_count, generation)
    return Device(p.name, p.multi_processor_count, shared, limits=limits, generation=generation)
