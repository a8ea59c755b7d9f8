"""Facts about a device, asked for when first needed. Standard library above, torch inside."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What planning needs to know.

    Attributes:
        name: as the driver gives it, or "interpreter".
        units: multiprocessors (compute units).
        shared_bytes: shared memory one program may use.
        interpreted: Triton's interpreter runs the kernels; its cost is per operation, not per element.
        generation: CUDA's major compute capability, 0 for AMD.
    """

    name: str
    units: int
    shared_bytes: int
    interpreted: bool = False
    generation: int = 9


INTERPRETER = Device("interpreter", 1, 1 << 40, interpreted=True)


@functools.cache
def cuda_device(index: int) -> Device:
    """The CUDA or ROCm device of that index."""
    import torch

    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 0) or 65536
    return Device(p.name, p.multi_processor_count, shared, generation=0 if torch.version.hip else p.major)
