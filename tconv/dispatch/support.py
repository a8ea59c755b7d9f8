"""What tconv has kernels for: dtypes, devices, and problems whose numbers fit 32 bits."""

from __future__ import annotations

import functools
import os

import torch

from tconv.dispatch.window import Window, extents
from tconv.launching.memory_format import reach
from tconv.planning.addressing import LIMIT
from tconv.planning.problem import ConvProblem, forward_problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("fprop", "dgrad", "wgrad")
TOO_LARGE = "a weight, or coordinates or programs, that 32 bits cannot count"
INTERPRETED = ("1", "true", "yes", "on", "y")  # the values of TRITON_INTERPRET that Triton reads as true


@functools.cache
def unavailable(device: str) -> str | None:
    """Returns why the kernels cannot run for tensors on that type of device, or None if they can.

    Imports the kernels, and Triton with them, so it must be called only when they are needed.
    """
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return "CPU tensors need TRITON_INTERPRET=1" if device == "cpu" else f"device {device}"
    try:
        from tconv.launching.arguments import INTERPRET
    except ImportError as e:
        return f"Triton cannot be imported ({e})"
    if device == "cpu" and not INTERPRET:
        return "TRITON_INTERPRET was set after Triton's kernels were loaded"
    return None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED


def problem_of(name: str, a: torch.Tensor, b: torch.Tensor, h: Window) -> ConvProblem:
    """Returns the problem of an operator, given by name, of its operands and window."""
    x, w = extents(name, a, b, h)
    return forward_problem(x, w, h.stride, list(zip(h.before, h.after, strict=True)), h.dilation, h.groups, h.mode)


def too_large(p: ConvProblem, w: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Returns True if a coordinate, an offset into the weight or bias, or a dgrad's number of programs may not fit 32 bits."""
    far = max(*p.X, *p.Y, *p.P, *p.T) * max(*p.S, *p.D)
    programs = p.phases("dgrad") * p.C * (p.N * max(p.X) // 16 + 1)
    weights = [0 if w is None else reach(w), 0 if b is None else b.shape[0] * b.stride(0)]
    return max(far, max(p.S) * max(p.D), programs, *weights) > LIMIT
