"""Compiles a model's kernels ahead of time: in parallel, on any machine, into Triton's own cache on disk.

Workers compile (launching/workers.py); they need no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tconv.launching.workers import COMPILED, FOUND, compile_launches, in_one_line
from tconv.planning.device import ARCHITECTURES, DEVICES, Device
from tconv.rehearsal import runner


@dataclass(frozen=True)
class Precompiled:
    """The result of `precompile`; it prints as a summary.

    Attributes:
        compiled: number of kernels compiled now.
        found: number of kernels that were already in Triton's cache.
        failed: kernels that could not be compiled, or not loaded on the GPU, each with its error.
        left: calls that fall back to torch, each with its reason.
    """

    compiled: int = 0
    found: int = 0
    failed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        left = f", {len(self.left)} calls that fall back to torch" if self.left else ""
        return f"{self.compiled} kernels compiled, {self.found} already there{failed}{left}"


def precompile(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    backward: bool = True,
    jobs: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Precompiled:
    """Compiles every kernel that a model launches for such inputs, forward and backward, so that no later call compiles.

    With a target, the first call on the device still compiles what checks TMA and the like there (launching/self_check.py).

    The model's Python code runs, but tconv launches no kernel. The code sees copies of the model's tensors if all are on
    a GPU, else meta tensors, which have shapes, strides and dtypes only. Whatever it changes is restored, and lazy layers stay
    lazy, as in `explain` (docs/explain.md). This assumes that tensors are aligned as torch allocates them, that gradients of
    results have the results' strides, and that plans use the current settings (`torch.backends`' fp32 precision, autocast).
    Gradients of gradients are not included.

    Args:
        model: a module or a function, with tconv layers (`replace_`), or with torch's on a GPU while `enable()` is active.
        args, kwargs: example inputs, real or meta, in containers and objects of any kind.
        target: architecture or GPU to compile for, for example "sm_90" or "H200"; this machine need not have one. None: the
            current GPU. The kernels are then also loaded, so that a CUDA graph can be captured without a call before it.
        backward: whether to include the backward pass, with gradients of all inputs.
        jobs: number of worker processes, at most one per kernel. None: one per core that this process may use.
        progress: whether to show a progress bar (tqdm). None: only in a terminal.
    Returns:
        How many kernels were compiled, were already in the cache, or failed. In Triton's interpreter, kernels are compiled
        only if a target is given.
    Raises:
        TypeError: the model cannot be called, or the target is not a str.
        ValueError: the target is unknown, or `jobs` is below 1.
        RuntimeError: no GPU and no target, no Triton, or a model that does not run on meta tensors.
    """
    runner.check_callable("precompile", "model", model)
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise ValueError(f"precompile: jobs must be a positive int or None, got {jobs!r}")
    named = None if target is None else _target(target)
    try:
        from triton.backends.compiler import GPUTarget

        from tconv.launching.arguments import INTERPRET
        from tconv.launching.launch import checked_device
    except ImportError as e:
        raise RuntimeError(f"precompile: Triton cannot be imported ({e})") from e
    if named is not None:
        gpu, device = GPUTarget(*named[0]), named[1]
    elif INTERPRET:
        return Precompiled()
    elif torch.cuda.is_available():
        from triton.runtime import driver

        gpu, device = driver.active.get_current_target(), checked_device(torch.cuda.current_device())
    else:
        raise RuntimeError("precompile: no GPU here; name what to compile for, such as target='sm_90'")
    launches, left = rehearse(model, args, kwargs, device, backward)
    # A rehearsal takes mechanisms to work that were not checked on the device yet.
    checked = [device.works(mechanism) for mechanism in {m for launch in launches for m in launch.call.plan.mechanisms}]
    if not all(checked):
        launches, left = rehearse(model, args, kwargs, device, backward)
    failed, answers = [], []
    for task, launch, answer in compile_launches(launches, gpu, jobs, progress):
        error, done = answer, "compiled"
        if answer in (COMPILED, FOUND):
            error, done = _loaded(launch) if target is None else "", "loaded"
        if error:
            failed.append(f"{task.name}: {error}")
            warnings.warn(f"precompile: {task.name} could not be {done}: {error}", stacklevel=2)
        answers.append(answer)
    return Precompiled(answers.count(COMPILED), answers.count(FOUND), tuple(failed), left)


def _loaded(launch: Any) -> str:
    """Loads a kernel on the current GPU. Returns the error in one line, or an empty string."""
    from tconv.launching.compiled import load

    try:
        load(launch, torch.cuda.current_device())
    except Exception as e:  # too much shared memory, out of memory; continue with the other kernels
        return in_one_line(e)
    return ""


def _target(name: Any) -> tuple[tuple[Any, ...], Device]:
    """Returns the arguments of Triton's GPUTarget and the planner's device, for the name of an architecture or a GPU.

    Raises:
        TypeError: the name is not a str.
        ValueError: the name is unknown.
    """
    if not isinstance(name, str):
        raise TypeError(f"precompile: target must be a name such as 'sm_90', or None for the GPU here; got {name!r}")
    if name in ARCHITECTURES:
        *made_of, device = ARCHITECTURES[name]
        return tuple(made_of), device
    if name in DEVICES:
        device = DEVICES[name]
        *made_of, _ = next(a for a in ARCHITECTURES.values() if a[3].generation == device.generation)
        return tuple(made_of), device
    raise ValueError(f"precompile: target must be one of {[*ARCHITECTURES, *DEVICES]}, got {name!r}")


# --- what to compile ---


def rehearse(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: Device, backward: bool = True
) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the launches that a model's forward and backward would make on a device, and the calls that fall back."""
    from tconv.launching.launch import collecting

    with collecting() as launches:
        calls = runner.rehearse(model, args, kwargs, device, backward)
    return launches, tuple(str(call) for call in calls if not call.ours)
