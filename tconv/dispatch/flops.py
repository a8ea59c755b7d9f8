"""FLOPs of tconv's operators, for torch's FlopCounterMode."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tconv.dispatch.dynamo import opaque
from tconv.dispatch.support import NAMES


def count_flops() -> None:
    """Registers the operators' FLOP formulas with torch's FlopCounterMode, and with active counters, which hold copies.

    Does nothing until the user imports FlopCounterMode, which imports Triton.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    packets = {getattr(torch.ops.tconv, name): formula for name, formula in _FLOPS.items()}
    if not packets.keys() <= counter.flop_registry.keys():
        for packet, formula in packets.items():
            counter.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            registry.update({packet: counter.flop_registry[packet] for packet in packets})


def _flops(pass_: str) -> Any:
    @opaque
    def formula(a: Any, b: Any, bias: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        """Returns two FLOPs per product: elements of the layer's output times elements of one filter."""
        y, w = {"fprop": (out_shape, b), "dgrad": (a, b), "wgrad": (a, out_shape)}[pass_]
        count: int = 2 * math.prod(y) * math.prod(w[1:])
        return count

    return formula


@opaque
def _fused(x: Any, w: Any, b: Any, residual: Any, scale: Any, shift: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """Returns the FLOPs of the convolution; an epilogue's are not counted, as torch does not count those functions'."""
    transposed = rest[5]
    count: int = _FLOPS["dgrad" if transposed else "fprop"](x, w, b, out_shape=out_shape[0])
    return count


_FLOPS = {name: _flops(name) for name in NAMES} | {"fused": _fused}
