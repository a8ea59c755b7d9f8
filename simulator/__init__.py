"""Runs what Triton's compiler makes of a kernel, its PTX for sm_80 or sm_90, on CPU tensors, and checks every access.

    import simulator
    simulator.install("sm_90")  # before the first launch, and without TRITON_INTERPRET
    kernel[grid](x, y, ...)     # tensors are on the CPU

README.md says what is checked, and what cannot be seen.
"""

import importlib
from typing import TYPE_CHECKING, Any

from simulator.errors import Fault, Place, Unsupported
from simulator.options import Options

if TYPE_CHECKING:
    from simulator.counters import profile
    from simulator.driver import checking, install, tensors
    from simulator.launch import run

__all__ = ["Fault", "Options", "Place", "Unsupported", "checking", "install", "profile", "run", "tensors"]
HOMES = {"checking": "driver", "install": "driver", "tensors": "driver", "run": "launch", "profile": "counters"}


def __getattr__(name: str) -> Any:
    """Imports Triton only when it is needed: what it sees of TRITON_INTERPRET when it is imported, counts."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"simulator.{HOMES[name]}"), name)
