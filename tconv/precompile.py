"""Compiles what a model will launch, before it does: in parallel, on any machine, into Triton's own cache on disk.

A worker is a process of its own with a driver that knows a target and no device, in which JITFunction itself compiles: so
the cache's keys are those that the first real call will look for. Workers are not forked and do not import the user's
`__main__`; a GPU that is in use here is not touched there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import os
import pickle
import queue
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tconv.planning.device import ARCHITECTURES, DEVICES, Device, cuda_device
from tconv.rehearsal import runner


@dataclass(frozen=True)
class Precompiled:
    """What `precompile` did; printing it says so.

    Attributes:
        compiled: kernels compiled now.
        found: kernels that Triton's cache held already.
        failed: those that could not be compiled, or not be loaded on the GPU, each with its error.
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


@dataclass(frozen=True)
class Task:
    """One kernel to compile: what JITFunction.warmup is told. It goes to another process."""

    name: str
    kernel: tuple[str, str]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def precompile(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    backward: bool = True,
    jobs: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Precompiled:
    """Compiles every kernel that a model launches for such inputs, forward and backward, so that no call has to wait.

    The model's Python code runs, but no kernel of tconv's: on copies of its own tensors if all are on a GPU, else on meta
    tensors in their place, which know shapes, strides and dtypes only. What the code changes is set back, and lazy layers
    stay lazy, as with `explain` (docs/explain.md). Tensors are taken to be aligned as torch allocates them, the results'
    gradients to be laid out as the results, and plans to be those of the moment (`torch.backends`' fp32 precision,
    autocast). Gradients of gradients are left out.

    Args:
        model: a module or a function; its layers tconv's (`replace_`), or torch's own on a GPU while `enable()` holds.
        args, kwargs: example inputs, real or meta, in containers and objects of any kind.
        target: what to compile for, "sm_90" or "H200", say, on a machine that need not have one; None for the current GPU,
            on which the kernels are also loaded, so that a CUDA graph can be captured without a call before.
        backward: whether also for gradients, those of all inputs.
        jobs: worker processes; None for one per core, at most one per kernel.
        progress: whether to show a bar (tqdm); None where there is a terminal.
    Returns:
        How many were compiled and how many already there. A named target is compiled for in the interpreter, too; without
        one nothing is compiled there.
    Raises:
        TypeError: a model that cannot be called, or a target that is no name.
        ValueError: a target that is not known, or `jobs` below 1.
        RuntimeError: no GPU and no target, no Triton, or a model that does not run on meta tensors.
    """
    runner.check_callable("precompile", "model", model)
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise ValueError(f"precompile: jobs must be a positive int or None, got {jobs!r}")
    named = None if target is None else _target(target)
    try:
        from triton.backends.compiler import GPUTarget

        from tconv.launching.arguments import INTERPRET
    except ImportError as e:
        raise RuntimeError(f"precompile: Triton cannot be imported ({e})") from e
    if named is not None:
        gpu, device = GPUTarget(*named[0]), named[1]
    elif INTERPRET:
        return Precompiled()
    elif torch.cuda.is_available():
        from triton.runtime import driver

        gpu, device = driver.active.get_current_target(), cuda_device(torch.cuda.current_device())
    else:
        raise RuntimeError("precompile: no GPU here; name what to compile for, such as target='sm_90'")
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


def compile_launches(
    launches: Iterable[Any], gpu: Any, jobs: int | None = None, progress: bool | None = None
) -> list[tuple[Task, Any, str]]:
    """Compiles what launches need, each kernel once, in parallel: (what, one of its launches, the answer) of each.

    Args:
        launches: as `launch.collecting` lists them.
        gpu: Triton's target.
        jobs, progress: as for `precompile`.
    Returns:
        The answer is COMPILED, FOUND, or an error in a line.
    """
    tasks = {pickle.dumps((t.kernel, t.arguments, t.constants)): (t, x) for x in launches for t in [_task(x, gpu.backend)]}
    answers = _compile([task for task, _ in tasks.values()], gpu, jobs or os.cpu_count() or 1, progress)
    return [(task, launch, answer) for (task, launch), answer in zip(tasks.values(), answers, strict=True)]


def _loaded(launch: Any) -> str:
    """Loads a kernel on the current GPU: what went wrong, or nothing."""
    from tconv.launching.compiled import load

    try:
        load(launch, torch.cuda.current_device())
    except Exception as e:  # more shared memory than there is, no memory left; the other kernels go on
        return _said(e)
    return ""


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _target(name: Any) -> tuple[tuple[Any, ...], Device]:
    """What Triton's target is made of, and the planner's device, of an architecture's or a device's name."""
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
    """The launches that a model's call and its backward would make on a device, and the calls that fall back to torch."""
    from tconv.launching.launch import collecting

    with collecting() as launches:
        calls = runner.rehearse(model, args, kwargs, device, backward)
    return launches, tuple(str(call) for call in calls if not call.ours)


def _task(launch: Any, backend: str) -> Task:
    from tconv.launching.compiled import stand_ins

    plan, kernel = launch.call.plan, launch.kernel
    dtypes = " ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in launch.pointers))
    name = f"{launch.call.operation} {kernel.__name__} {plan.tile} {dtypes}"
    # What an integer is does not count, but for whether 32 bits hold it.
    integers = tuple(0 if -(2**31) <= i < 2**31 else 2**40 for i in launch.integers)
    constants = {k: v for k, v in launch.constants.items() if k != "maxnreg" or backend == "cuda"}
    return Task(name, (kernel.fn.__module__, kernel.__name__), (*stand_ins(launch), *integers), constants)


# --- worker processes ---

COMPILED, FOUND = "compiled", "found"
WORKER = "from tconv.precompile import _work; _work()"


class _Worker:
    """A process that compiles one task after the other. It is given a pickle by its input and answers by its output."""

    def __init__(self, gpu: Any) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._send(gpu)

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        pickle.dump(value, self.process.stdin)
        self.process.stdin.flush()

    def __call__(self, task: Task) -> str:
        assert self.process.stdout is not None
        try:
            self._send(task)
            return str(pickle.load(self.process.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            return f"the process that compiled it died, with status {self.process.wait()}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _compile(tasks: list[Task], gpu: Any, jobs: int, progress: bool | None) -> list[str]:
    """An answer per task: COMPILED, FOUND, or what went wrong."""
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []

    def one(task: Task) -> str:
        try:
            worker = idle.get_nowait()
        except queue.Empty:
            started.append(worker := _Worker(gpu))
        answer = worker(task)
        if worker.process.poll() is None:
            idle.put(worker)
        return answer

    pool = concurrent.futures.ThreadPoolExecutor(max(1, min(jobs, len(tasks))))
    try:
        return list(_bar(pool.map(one, tasks), len(tasks), progress))
    finally:  # interrupted, too
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()


def _bar(answers: Iterator[str], total: int, progress: bool | None) -> Iterator[str]:
    """The answers, under a progress bar where tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped]

        disable = None if progress is None else not progress
        return iter(tqdm(answers, total=total, desc="compiling", unit="kernel", disable=disable))
    return answers


class _Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def _work() -> None:
    """The loop of a worker process."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing else may be written there
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(_Target(pickle.load(sys.stdin.buffer)))
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    while True:
        try:
            task: Task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        hits.clear()
        try:
            kernel = getattr(importlib.import_module(task.kernel[0]), task.kernel[1])
            kernel.warmup(*task.arguments, grid=(1,), **task.constants)
            answer = FOUND if all(hits) else COMPILED
        except Exception as e:  # the other kernels go on
            answer = _said(e)
        pickle.dump(answer, answers)
        answers.flush()
