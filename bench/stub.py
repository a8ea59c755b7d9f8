"""A CUDA device that is not there: Triton's own launch path, compiler included, down to where it would enter C.

Kernels are compiled for an architecture, "loaded" and "launched"; what C would have been told goes to a function. For
processes without the interpreter and without a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

STREAM = 7


class Driver:
    """Triton's driver of devices without hardware.

    Args:
        launch: called with what the C launcher would be.
        capability: of the architecture, 90 for sm_90.
    """

    def __init__(self, launch: Callable[..., None], capability: int = 90) -> None:
        self.target, self.device, self.loaded = GPUTarget("cuda", capability, 32), 0, []
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = types.SimpleNamespace(
            launch=launch,
            build_signature_metadata=lambda signature: tuple(signature),
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            fill_tma_descriptor=_tensor_map,  # of Triton 3.6
            fill_tma_descriptor_tiled=_tensor_map,
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append((name, device))
        return 1, len(self.loaded), 32, 0, 1024  # module, function, registers, spills, threads

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return STREAM + max(device, 0)  # -1 is the CPU, which stands for the device


def _tensor_map(address: int, *description: object) -> tuple[object, ...]:
    """In place of an encoded tensor descriptor: what it would say."""
    return address, *(tuple(part) if isinstance(part, list) else part for part in description)


def install(launch: Callable[..., None] = lambda *_: None, capability: int = 90) -> Driver:
    """Makes such a driver Triton's for the rest of the process, and tconv take CPU tensors for its device's."""
    from tconv.dispatch import entry, fast_path, fp8
    from tconv.launching import launch as launching
    from tconv.planning.device import ARCHITECTURES

    nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)  # of Triton 3.7 and later
    nvidia.compile_module_from_src = lambda **_: types.SimpleNamespace(launch=launch)  # 3.6 compiles a launcher per kernel
    nvidia.library_dirs = list
    made = Driver(launch, capability)
    driver.set_active(made)
    entry.kernels_for = lambda device: fast_path
    fp8.unavailable = lambda device: None
    planned = ARCHITECTURES[f"sm_{capability}"][3]
    launching.device_of = lambda t: planned
    return made
