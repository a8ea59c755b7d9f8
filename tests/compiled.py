"""tconv on compiled code without a GPU: its kernels' PTX runs in the simulator, on CPU tensors.

tconv plans for the device that is simulated, and launches as on that device, directly from the second time on. Only what asks
for a device of CUDA's is answered here.
"""

import importlib
import pkgutil
import sys

import simulator
from tconv import kernels
from tconv.dispatch import entry, support
from tconv.launching import compiled, launch
from tconv.planning.device import ARCHITECTURES


def replace(old, new):
    """Puts a function in the place of another, under whatever name a module of tconv knows it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "tconv":
            for known, value in list(vars(module).items()):
                if value is old:
                    setattr(module, known, new)


def install(arch):
    """Makes tconv take CPU tensors for those of a GPU of an architecture. The simulator is Triton's driver already."""
    # Triton decides when a kernel is defined whether it is interpreted, and a file of tests may set the variable that says so.
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    planned = ARCHITECTURES[arch][-1]
    run = compiled.run

    def with_tensors(prepared, pointers):
        """Direct launches pass addresses; the simulator wants to know whose they are."""
        with simulator.tensors(*pointers):
            run(prepared, pointers)

    replace(support.unavailable, lambda device: None if device == "cpu" else f"device {device}")
    replace(launch.device_of, lambda tensor: planned)
    replace(run, with_tensors)
    entry.INTERPRETED = True  # that is, CPU tensors are ours
