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
from tconv.layout import shaped, to_channels_last
from tconv.prepare import INTERPRET, Prepared, prepare_bias, prepare_gather, prepare_wgrad, tensor_cores
from tconv.problem import Geometry
from tconv.record import note

REMEMBERED = 4096  # kinds of calls kept; a program whose shapes never repeat starts over
_prepared: dict[Any, Prepared] = {}
# Triton's interpreter patches its language module while it runs: one launch at a time.
_lock: contextlib.AbstractContextManager[Any] = threading.RLock() if INTERPRET else contextlib.nullcontext()


def convolution(transposed: bool, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Prepared:
    """The launch of `convolve` on such tensors."""
    key = (
        "dgrad" if transposed else "fprop", g, x.stride(), w.stride(), b is not None and b.stride(),
        x.data_ptr() % 16, w.data_ptr() % 16, tensor_cores(x.dtype),
    )  # fmt: skip
    return _lookup(key, lambda: _prepare_convolution(key[0], g, x, w, b))


def _prepare_convolution(pass_: str, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Prepared:
    y = shaped(g.problem.shape("x" if pass_ == "dgrad" else "y"), g.channels_last, x.dtype)
    return prepare_gather(pass_, g.problem, x, w, b, y, device_of(x))


def convolve(launch: Prepared, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, dry: bool) -> torch.Tensor:
    """y [N, K, *Y] from x [N, C, *X], w [K, C/G, *T], b [K], or, transposed, dx from dy and w, b [C] being the layer's.

    Any strides, one dtype.
    """
    y = x.new_empty_strided(launch.shape, launch.strides)
    note(launch.call)
    if not dry:  # without a bias its pointer is not read
        if launch.staged:
            x, w = _stage(launch, x, w)
        _call(launch.kernel, launch.grid, (x, w, x if b is None else b, y), launch.integers, launch.constants)
    return y


def wgrad(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dw [K, C/G, *T] from dy [N, K, *Y] and x [N, C, *X]; the same bits on every run."""
    key = ("wgrad", g, dy.stride(), x.stride(), dy.data_ptr() % 16, x.data_ptr() % 16, tensor_cores(x.dtype))
    return _reduce(_lookup(key, lambda: _prepare_wgrad(g, dy, x)), g.dry, dy, x)


def _prepare_wgrad(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> Prepared:
    return prepare_wgrad(g.problem, dy, x, shaped(g.problem.shape("w"), g.channels_last, x.dtype), device_of(x))


def bias_grad(g: Geometry, dy: torch.Tensor) -> torch.Tensor:
    """db [channels] from the gradient of an output, fprop's or a transposed layer's: its sum over batch and pixels."""
    key = ("bias", g, dy.shape, dy.stride(), dy.data_ptr() % 16)
    return _reduce(_lookup(key, lambda: prepare_bias(g.problem, dy, device_of(dy))), g.dry, dy)


def device_of(t: torch.Tensor) -> Device:
    """The planner's view of a tensor's device."""
    return INTERPRETER if INTERPRET else cuda_device(t.device.index)


def _lookup(key: Any, make: Callable[[], Prepared]) -> Prepared:
    """The launch of a kind of call, key[1] being its geometry."""
    if planning.forced() is not None or key[1].dry:
        return make()
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= REMEMBERED:
            _prepared.clear()
        found = _prepared[key] = make()
    return found


def _run(launch: Prepared, dry: bool, pointers: tuple[torch.Tensor, ...]) -> None:
    note(launch.call)
    if not dry:
        _call(launch.kernel, launch.grid, pointers, launch.integers, launch.constants)


def _reduce(launch: Prepared, dry: bool, *inputs: torch.Tensor) -> torch.Tensor:
    """A reduction that may be cut into splits: straight into its result, or through a workspace summed in order."""
    out = inputs[0].new_empty_strided(launch.shape, launch.strides)
    if launch.staged and not dry:
        inputs = _stage(launch, *inputs)
    if launch.splits == 1 or dry:
        _run(launch, dry, (*inputs, out))
        return out
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
    workspace = torch.empty(launch.splits * out.numel(), dtype=accumulator, device=out.device)
    _run(launch, dry, (*inputs, workspace))
    constants = {"INTERPRET": INTERPRET, "BLOCK": 1024, "num_warps": 4}
    _call(sum_splits, (math.ceil(out.numel() / 1024),), (workspace, out), (out.numel(), launch.splits), constants)
    return out


def _stage(launch: Prepared, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operands of a launch, those that it wants so copied to channels last."""
    return tuple(to_channels_last(t) if staged else t for t, staged in zip(operands, launch.staged, strict=True))


def _call(kernel: Any, grid: tuple[int], pointers: tuple[torch.Tensor, ...], integers: Any, constants: Any) -> None:
    device = pointers[0].get_device()  # -1 is the CPU's
    elsewhere = device >= 0 and device != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext(), _lock:
        kernel[grid](*pointers, *integers, **constants)
