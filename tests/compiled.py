"""tconv on compiled code without a GPU: its kernels' PTX runs in the simulator, on CPU tensors.

tconv plans for the device that is simulated, and launches as on that device, directly from the second time on. Only what asks
for a device of CUDA's is answered here.
"""

import simulator
from tconv.dispatch import entry, operators
from tconv.launching import compiled, launch
from tconv.planning.device import ARCHITECTURES


def install(arch):
    """Makes tconv take CPU tensors for those of a GPU of an architecture. The simulator is Triton's driver already."""
    planned = ARCHITECTURES[arch][-1]
    run = compiled.run

    def with_tensors(prepared, pointers):
        """Direct launches pass addresses; the simulator wants to know whose they are."""
        with simulator.tensors(*pointers):
            run(prepared, pointers)

    operators.unavailable = lambda device: None if device == "cpu" else f"device {device}"
    entry.INTERPRETED = True  # that is, CPU tensors are ours
    launch.device_of = lambda tensor: planned
    launch.run = with_tensors
