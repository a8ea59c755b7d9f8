"""Allocates and launches: fprop, dgrad, wgrad and the bias gradient of a problem on given tensors.

What a launch needs besides its pointers is worked out once per kind of call (prepare.py) and kept.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tconv import plan as planning
from tconv.device import INTERPRETER, Device, cuda_device
from tconv.kernels.reduce import sum_splits
from tconv.layout import empty
from tconv.prepare import INTERPRET, Prepared, prepare_bias, prepare_gather, prepare_wgrad, tensor_cores
from tconv.problem import ConvProblem
from tconv.record import note

REMEMBERED = 4096  # kinds of calls kept; a program whose shapes never repeat starts over
_prepared: dict[Any, Prepared] = {}
_dry = False
# Triton's interpreter patches its language module while it runs: one launch at a time.
_lock: contextlib.AbstractContextManager[Any] = threading.RLock() if INTERPRET else contextlib.nullcontext()


def fprop(problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """y [N, K, *Y] from x [N, C, *X], w [K, C/G, *T], b [K]; any strides, one dtype; y in the format asked for."""
    y = empty(problem.shape("y"), channels_last, x)
    gather("fprop", problem, x, w, b, y)
    return y


def dgrad(problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """dx [N, C, *X] from dy [N, K, *Y] and w; with b [C] the forward of a transposed layer."""
    dx = empty(problem.shape("x"), channels_last, dy)
    gather("dgrad", problem, dy, w, b, dx)
    return dx


def gather(pass_: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor) -> None:
    """Runs "fprop" (x -> y) or "dgrad" (x is dy, y is dx) into a tensor given, of any strides."""
    bias = None if b is None else b.stride()
    key = (pass_, problem, x.stride(), w.stride(), y.stride(), bias, w.data_ptr() % 16, *_facts(x, y))
    launch = _lookup(key, lambda: prepare_gather(pass_, problem, x, w, b, y, device_of(x)))
    _run(launch, x, w, x if b is None else b, y)  # without a bias its pointer is not read


def wgrad(problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """dw [K, C/G, *T] from dy [N, K, *Y] and x [N, C, *X]; the same bits on every run."""
    dw = empty(problem.shape("w"), channels_last, x)
    key = ("wgrad", problem, dy.stride(), x.stride(), channels_last, *_facts(dy, x))
    _run_split(_lookup(key, lambda: prepare_wgrad(problem, dy, x, dw, device_of(x))), dw, dy, x)
    return dw


def bias_grad(problem: ConvProblem, g: torch.Tensor) -> torch.Tensor:
    """db [channels] from the gradient of an output, fprop's or a transposed layer's: its sum over batch and pixels."""
    db = torch.empty(g.shape[1], dtype=g.dtype, device=g.device)
    key = ("bias", problem, g.shape, g.stride(), *_facts(g, g))
    _run_split(_lookup(key, lambda: prepare_bias(problem, g, device_of(g))), db, g)
    return db


def device_of(t: torch.Tensor) -> Device:
    """The planner's view of a tensor's device."""
    return INTERPRETER if INTERPRET else cuda_device(t.device.index)


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Inside the block everything is planned and recorded, nothing is launched: results are uninitialised. One thread."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def _facts(a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
    return a.dtype, a.device, a.data_ptr() % 16, b.data_ptr() % 16, tensor_cores(a.dtype)


def _lookup(key: Any, make: Callable[[], Prepared]) -> Prepared:
    if planning.FORCED.get() is not None:
        return make()
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= REMEMBERED:
            _prepared.clear()
        found = _prepared[key] = make()
    return found


def _run(launch: Prepared, *pointers: torch.Tensor) -> None:
    note(launch.call)
    _call(launch.kernel, launch.grid, pointers, launch.integers, launch.constants)


def _run_split(launch: Prepared, out: torch.Tensor, *inputs: torch.Tensor) -> None:
    """A reduction that may be cut into splits: straight into out, or through a workspace that is then summed in order."""
    if launch.splits == 1:
        _run(launch, *inputs, out)
        return
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
    workspace = torch.empty(launch.splits * out.numel(), dtype=accumulator, device=out.device)
    _run(launch, *inputs, workspace)
    constants = {"INTERPRET": INTERPRET, "BLOCK": 1024, "num_warps": 4}
    grid = (math.ceil(out.numel() / 1024),)
    _call(sum_splits, grid, (workspace, out), (out.numel(), launch.splits), constants)


def _call(kernel: Any, grid: tuple[int], pointers: tuple[torch.Tensor, ...], integers: Any, constants: Any) -> None:
    if _dry:
        return
    device = pointers[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext(), _lock:
        kernel[grid](*pointers, *integers, **constants)
