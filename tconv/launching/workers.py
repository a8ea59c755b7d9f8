"""Compiles kernels in parallel, each in another process, into Triton's own cache on disk.

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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

One = TypeVar("One")
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
from tconv.launching.workers import _work
_work(answers)
"""


@dataclass(frozen=True)
class Task:
    """One kernel to compile: the arguments of JITFunction.warmup. It is pickled and sent to a worker."""

    name: str
    kernel: tuple[str, str]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


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


def _task(launch: Any, backend: str) -> Task:
    from tconv.kernels.common import integers as integers_of
    from tconv.launching.descriptors import stand_ins

    plan, kernel = launch.call.plan, launch.kernel
    dtypes = " ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in launch.pointers))
    name = f"{launch.call.operation} {kernel.__name__} {plan.tile} {dtypes}"
    # Compilation depends only on whether an integer fits 32 bits, not on its value.
    sizes = (0 if -(2**31) <= i < 2**31 else 2**40 for i in launch.integers)
    integers = dict(zip(integers_of(kernel), sizes, strict=True))
    constants = {k: v for k, v in launch.constants.items() if k != "maxnreg" or backend == "cuda"}
    return Task(name, (kernel.fn.__module__, kernel.__name__), stand_ins(launch), integers | constants)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
        return list(bar(pool.map(one, tasks), len(tasks), progress, "compiling", "kernel"))
    finally:  # also after an interrupt
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()


def bar(values: Iterable[One], total: int, progress: bool | None, doing: str, unit: str) -> Iterable[One]:
    """Returns the values, with a progress bar if tqdm is installed.

    Args:
        values: what is iterated over, `total` of them.
        progress: whether to show the bar. None: only in a terminal.
        doing, unit: what the bar says.
    """
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped]

        disable = None if progress is None else not progress
        shown: Iterable[One] = tqdm(values, total=total, desc=doing, unit=unit, disable=disable)
        return shown
    return values


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
            answer = in_one_line(e)
        pickle.dump(answer, answers)
        answers.flush()
