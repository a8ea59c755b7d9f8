"""Allocates and launches: fprop, dgrad, wgrad and the bias gradient of a problem on given tensors.

What a launch needs besides its pointers is worked out once per kind of call (prepare.py) and kept.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from tconv import plan as planning
from tconv.device import INTERPRETER, Device, cuda_device
from tconv.kernels.reduce import sum_splits
from tconv.layout import empty
from tconv.prepare import INTERPRET, Prepared, prepare_bias, prepare_gather, prepare_wgrad, tensor_cores
from tconv.problem import Geometry
from tconv.record import note

REMEMBERED = 4096  # kinds of calls kept; a program whose shapes never repeat starts over
_prepared: dict[Any, Prepared] = {}
# Triton's interpreter patches its language module while it runs: one launch at a time.
_lock: contextlib.AbstractContextManager[Any] = threading.RLock() if INTERPRET else contextlib.nullcontext()


def fprop(g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """y [N, K, *Y] from x [N, C, *X], w [K, C/G, *T], b [K]; any strides, one dtype."""
    y = empty(g.problem.shape("y"), g.channels_last, x)
    gather("fprop", g, x, w, b, y)
    return y


def dgrad(g: Geometry, dy: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """dx [N, C, *X] from dy [N, K, *Y] and w; with b [C] the forward of a transposed layer."""
    dx = empty(g.problem.shape("x"), g.channels_last, dy)
    gather("dgrad", g, dy, w, b, dx)
    return dx


def gather(pass_: str, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor) -> None:
    """Runs "fprop" (x -> y) or "dgrad" (x is dy, y is dx) into a tensor given, of any strides."""
    bias = None if b is None else b.stride()
    key = (pass_, g.problem, x.stride(), w.stride(), y.stride(), bias, w.data_ptr() % 16, *_facts(x, y))
    launch = _lookup(key, lambda: prepare_gather(pass_, g.problem, x, w, b, y, device_of(x)))
    _run(launch, g.dry, x, w, x if b is None else b, y)  # without a bias its pointer is not read


def wgrad(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dw [K, C/G, *T] from dy [N, K, *Y] and x [N, C, *X]; the same bits on every run."""
    dw = empty(g.problem.shape("w"), g.channels_last, x)
    key = ("wgrad", g.problem, dy.stride(), x.stride(), g.channels_last, *_facts(dy, x))
    _run_split(_lookup(key, lambda: prepare_wgrad(g.problem, dy, x, dw, device_of(x))), g.dry, dw, dy, x)
    return dw


def bias_grad(g: Geometry, dy: torch.Tensor) -> torch.Tensor:
    """db [channels] from the gradient of an output, fprop's or a transposed layer's: its sum over batch and pixels."""
    db = torch.empty(dy.shape[1], dtype=dy.dtype, device=dy.device)
    key = ("bias", g.problem, dy.shape, dy.stride(), *_facts(dy, dy))
    _run_split(_lookup(key, lambda: prepare_bias(g.problem, dy, device_of(dy))), g.dry, db, dy)
    return db


def device_of(t: torch.Tensor) -> Device:
    """The planner's view of a tensor's device."""
    return INTERPRETER if INTERPRET else cuda_device(t.device.index)


def _facts(a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
    return a.dtype, a.device, a.data_ptr() % 16, b.data_ptr() % 16, tensor_cores(a.dtype)


def _lookup(key: Any, make: Callable[[], Prepared]) -> Prepared:
    if planning.forced() is not None:
        return make()
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= REMEMBERED:
            _prepared.clear()
        found = _prepared[key] = make()
    return found


def _run(launch: Prepared, dry: bool, *pointers: torch.Tensor) -> None:
    note(launch.call)
    if not dry:
        _call(launch.kernel, launch.grid, pointers, launch.integers, launch.constants)


def _run_split(launch: Prepared, dry: bool, out: torch.Tensor, *inputs: torch.Tensor) -> None:
    """A reduction that may be cut into splits: straight into out, or through a workspace that is then summed in order."""
    if launch.splits == 1 or dry:
        _run(launch, dry, *inputs, out)
        return
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
    workspace = torch.empty(launch.splits * out.numel(), dtype=accumulator, device=out.device)
    _run(launch, dry, *inputs, workspace)
    constants = {"INTERPRET": INTERPRET, "BLOCK": 1024, "num_warps": 4}
    _call(sum_splits, (math.ceil(out.numel() / 1024),), (workspace, out), (out.numel(), launch.splits), constants)


def _call(kernel: Any, grid: tuple[int], pointers: tuple[torch.Tensor, ...], integers: Any, constants: Any) -> None:
    device = pointers[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext(), _lock:
        kernel[grid](*pointers, *integers, **constants)
