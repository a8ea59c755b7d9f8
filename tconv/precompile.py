"""Compiles a model's kernels ahead of time: in parallel, on any machine, into Triton's own cache on disk.

A worker is a separate process. Its Triton driver has a target but no device. Triton's JITFunction itself compiles there, so
the cache keys are those that the first real call will look up. Workers are not forked, do not import the user's `__main__`,
and do not use the GPU.
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


@dataclass(frozen=True)
class Task:
    """One kernel to compile: the arguments of JITFunction.warmup. It is pickled and sent to a worker."""

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
    """Compiles every kernel that a model launches for such inputs, forward and backward, so that no later call compiles.

    With a target, the first call on the device still compiles what checks TMA or bf16x6 there (launching/self_check.py).

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
    checked = [device.works(mechanism) for mechanism in {launch.call.plan.mechanism for launch in launches}]
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


def compile_launches(
    launches: Iterable[Any], gpu: Any, jobs: int | None = None, progress: bool | None = None
) -> list[tuple[Task, Any, str]]:
    """Compiles the kernels of launches in parallel, each kernel once.

    Args:
        launches: as listed by `launch.collecting`.
        gpu: Triton's target.
        jobs, progress: as in `precompile`.
    Returns:
        Per kernel: its task, one of its launches, and COMPILED, FOUND or an error in one line.
    """
    tasks = {pickle.dumps((t.kernel, t.arguments, t.constants)): (t, x) for x in launches for t in [_task(x, gpu.backend)]}
    answers = _compile([task for task, _ in tasks.values()], gpu, jobs or _cores(), progress)
    return [(task, launch, answer) for (task, launch), answer in zip(tasks.values(), answers, strict=True)]


def _cores() -> int:
    """Returns the number of cores that this process may use: a container or taskset may grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _loaded(launch: Any) -> str:
    """Loads a kernel on the current GPU. Returns the error in one line, or an empty string."""
    from tconv.launching.compiled import load

    try:
        load(launch, torch.cuda.current_device())
    except Exception as e:  # too much shared memory, out of memory; continue with the other kernels
        return _in_one_line(e)
    return ""


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def _task(launch: Any, backend: str) -> Task:
    from tconv.launching.compiled import stand_ins

    plan, kernel = launch.call.plan, launch.kernel
    dtypes = " ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in launch.pointers))
    name = f"{launch.call.operation} {kernel.__name__} {plan.tile} {dtypes}"
    # Compilation depends only on whether an integer fits 32 bits, not on its value.
    integers = tuple(0 if -(2**31) <= i < 2**31 else 2**40 for i in launch.integers)
    constants = {k: v for k, v in launch.constants.items() if k != "maxnreg" or backend == "cuda"}
    return Task(name, (kernel.fn.__module__, kernel.__name__), (*stand_ins(launch), *integers), constants)


# --- worker processes ---

COMPILED, FOUND = "compiled", "found"
# What a worker runs. `-c` puts the current directory first on sys.path, where a file of the user's may have a library's name.
# (Python 3.11 has the option -P against that.) Answers get a file descriptor of their own, and whatever writes to stdout, in
# Python or C, reaches stderr.
WORKER = """
import os, sys
if sys.path[0] == "":
    del sys.path[0]
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
from tconv.precompile import _work
_work(answers)
"""


class _Worker:
    """A process that compiles one task after another. It reads pickled tasks from stdin and writes answers to stdout."""

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
        except Exception:  # the process has died, or has sent what is no answer: pickle then raises errors of many types
            self.process.kill()
            return f"the process that compiled it died, with status {self.process.wait()}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _compile(tasks: list[Task], gpu: Any, jobs: int, progress: bool | None) -> list[str]:
    """Returns an answer per task: COMPILED, FOUND, or an error in one line."""
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
    finally:  # also after an interrupt
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()


def _bar(answers: Iterator[str], total: int, progress: bool | None) -> Iterator[str]:
    """Returns the answers, with a progress bar if tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped]

        disable = None if progress is None else not progress
        return iter(tqdm(answers, total=total, desc="compiling", unit="kernel", disable=disable))
    return answers


class _Target:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def _work(answers: Any) -> None:
    """The loop of a worker process, which writes to the file `answers`."""
    from triton import knobs
    from triton.runtime import driver

    from tconv.launching.fences import install

    install()
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
        except Exception as e:  # continue with the other kernels
            answer = _in_one_line(e)
        pickle.dump(answer, answers)
        answers.flush()
