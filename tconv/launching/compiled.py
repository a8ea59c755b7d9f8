"""Launches kernels, and knows which are compiled.

Triton's own dispatch binds, specialises and hashes some fifty arguments anew on every call. Of a launch that was prepared
only the addresses change, so from the second time on the compiled kernel is handed them directly. What it was specialised
on is compared exactly: the device, which addresses are multiples of 16, Triton's settings. Whatever else may want a say in a
launch (hooks, the interpreter, AMD's compiler, which looks at sizes too) gets Triton's dispatch, and so do descriptors.

A kernel that does not compile, or wants more than the device has, is remembered: whoever asks for that variant again is
declined at once. Any other error (memory has run out, a driver's) costs one call, and the next one tries again.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from triton import knobs
from triton.compiler import CompilationError, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tconv.launching.arguments import INTERPRET, Prepared
from tconv.launching.cache import BoundedCache
from tconv.launching.record import Fallback, TransientFallback
from tconv.planning.plan import forced

Pointers = tuple[torch.Tensor, ...]
Go = Callable[[Pointers, list[int]], bool]
AMD = torch.version.hip is not None
SMALL = 2**31 - 1  # bytes of storage that AMD's compiler is told of
NOBODY: Any = knobs.HookChain()  # type: ignore[var-annotated]  # of hooks of any kind
REASON = "not compiled before the capture of a CUDA graph: call the model once before it, or tconv.precompile()"

_known: set[Any] = set()  # what is compiled, and loaded where it runs
_failed: dict[Any, str] = {}  # what cannot be compiled, or has not the resources it needs, and why
_warned: BoundedCache[Any, bool] = BoundedCache()  # (variant, text without its numbers) of the warnings given
# A kernel is compiled and loaded by one thread at a time: Triton hands out one that is half loaded.
_first_time = threading.RLock()
# Triton's interpreter patches its language module while it runs: one launch at a time.
_alone: Any = threading.RLock() if INTERPRET else contextlib.nullcontext()
for _lock in (_alone, _first_time):  # a fork waits for kernels that other threads compile or interpret; the last one first
    if hasattr(_lock, "acquire"):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def run(launch: Prepared, pointers: Pointers) -> None:
    """Launches a kernel on tensors of one device, on torch's current stream there.

    Raises:
        TransientFallback: it would have to be compiled while a CUDA graph is being captured, or fails this time.
        Fallback: it fails every time.
    """
    device = pointers[0].get_device()  # -1 is the CPU's
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(launch, pointers)
    addresses, either = [t.data_ptr() for t in pointers], 0
    for address in addresses:
        either |= address
    key = _specialised(device, pointers) if either & 15 or AMD else device
    go = launch.ready.get(key)
    try:
        done = go is not None and go(pointers, addresses)
    except Exception as e:
        fail(launch, key, e)
    if not done:
        _run_first(launch, pointers, device, key)
    return None


def _specialised(device: int, pointers: Pointers) -> Any:
    """What Triton specialises a kernel on besides types; a device alone stands for aligned addresses there."""
    aligned = tuple(t.data_ptr() % 16 == 0 for t in pointers)
    if AMD:
        return device, aligned, tuple(t.untyped_storage().size() <= SMALL for t in pointers)
    return device if all(aligned) else (device, aligned)


def _run_first(launch: Prepared, pointers: Pointers, device: int, key: Any) -> None:
    """A launch by Triton's dispatch, which compiles what is not compiled yet."""
    with _first_time:
        _decline(device, (launch, key), *_sum(launch, device))
        try:
            kernel = _by_triton(launch, pointers)
            if kernel is None and not INTERPRET:
                raise RuntimeError("a hook of Triton's did not let it be compiled")
        except Exception as e:
            _unload(launch)
            fail(launch, key, e)
        _known.add(_variant(launch, key))
        if INTERPRET or AMD or launch.boxes:
            launch.ready[key] = _indirectly(launch)
        elif type(kernel) is CompiledKernel and not _watched(launch.kernel):
            launch.ready[key] = _directly(launch, kernel, device)


def announce(launch: Prepared, operands: Pointers, more: Pointers) -> None:
    """Says that a launch of several parts is to come, before work is done for it: copies of operands, sums of splits.

    Args:
        operands: what may be copied first.
        more: the kernel's other pointers.

    Raises:
        TransientFallback: a part would have to be compiled while a CUDA graph is being captured.
        Fallback: a part fails every time.
    """
    if launch.ready and (launch.total is None or launch.total.ready):
        return
    device = operands[0].get_device()
    parts, given = [], []
    for copy, t in zip(launch.copies or (None,) * len(operands), operands, strict=True):
        made = torch.empty_strided(copy.shape, copy.strides, dtype=t.dtype, device="meta") if copy else t
        given.append(made)
        if copy:
            parts.append((copy, _specialised(device, (t, made))))
    if launch.swapped:
        given.reverse()
    _decline(device, *parts, (launch, _specialised(device, (*given, *more))), *_sum(launch, device))


def fail(launch: Prepared, key: Any, error: Exception) -> NoReturn:
    """Raises what an error of a launch means for the call that wanted it; a forced launch's error as it is.

    Args:
        key: what the launch is specialised on; None if it did not come so far.

    Raises:
        TransientFallback: the next call may go well.
        Fallback: none will. The variant is remembered, and declined before it is launched again.
    """
    if forced() is not None:
        raise error
    text = str(error).strip()[:1000]  # of what a compiler prints, which may be pages
    what = f"{launch.kernel.__name__} of {launch.call.operation} in {str(launch.pointers[0]).removeprefix('torch.')}"
    reason = f"{what} failed: {type(error).__name__}: {text}"
    variant = _variant(launch, key)
    if not _lasting(error):
        _warn(variant, f"tconv falls back to torch for one call, and will try again: {reason}")
        raise TransientFallback(reason) from error
    _failed[variant] = reason
    launch.ready.pop(key, None)
    _warn(variant, f"tconv falls back to torch for every call whose kernel failed: {reason}")
    raise Fallback(reason) from error


def _lasting(error: Exception) -> bool:
    """Whether a launch would fail so every time: its kernel does not compile, or the device lacks what it needs."""
    if isinstance(error, (CompilationError, PTXASError, OutOfResources)):
        return True
    if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):  # a full disk stops a compiler, too
        return False
    # The compiler's own passes raise errors of any type, RuntimeError for one. What is left is a launch's.
    return any(frame.f_code is triton_compile.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _decline(device: int, *parts: tuple[Prepared, Any]) -> None:
    """Asks of launches, given with what they are specialised on, whether they can be made.

    Raises:
        TransientFallback: one would have to be compiled while a CUDA graph is being captured.
        Fallback: one fails every time.
    """
    if _failed:
        for part in parts:
            reason = _failed.get(_variant(*part))
            if reason is not None:
                raise Fallback(reason)
    if capturing(device):
        for launch, key in parts:
            variant = _variant(launch, key)
            if variant not in _known:
                _warn(variant, f"tconv falls back to torch for one call: its kernel {launch.kernel.__name__} was {REASON}")
                raise TransientFallback(REASON)


def _unload(launch: Prepared) -> None:
    """Has Triton load a kernel again whose loading was broken off, by a lack of memory, say.

    Triton sets up a compiled kernel's launcher before it loads the module, and would launch it without one.
    """
    for kernels, *_ in getattr(launch.kernel, "device_caches", {}).values():
        for kernel in kernels.values():
            if getattr(kernel, "module", kernel) is None and type(kernel._run) is driver.active.launcher_cls:
                kernel._run = None


def _sum(launch: Prepared, device: int) -> list[tuple[Prepared, Any]]:
    """The launch that sums another's splits, if there are any, and what it is specialised on."""
    return [(launch.total, _aligned(launch.total, device))] if launch.total else []


def _aligned(launch: Prepared, device: int) -> Any:
    """What `_specialised` says of aligned tensors, which AMD's compiler is told are small."""
    return (device, *[(True,) * len(launch.pointers)] * 2) if AMD else device


def _by_triton(launch: Prepared, pointers: Pointers) -> Any:
    given: tuple[Any, ...] = pointers
    if launch.boxes:
        given = tuple(t if box is None else TensorDescriptor(t, *box) for t, box in zip(pointers, launch.boxes, strict=True))
    with _alone:
        return launch.kernel[launch.grid](*given, *launch.integers, **launch.constants)


def _indirectly(launch: Prepared) -> Go:
    def go(pointers: Pointers, _: list[int]) -> bool:
        _by_triton(launch, pointers)
        return True

    return go


def _directly(launch: Prepared, kernel: CompiledKernel, device: int) -> Go:
    """The launch as JITFunction.run ends it: the same arguments, constants among them, but addresses for tensors."""
    programs, tail = launch.grid[0], launch.tail
    run, stream = kernel.run, driver.active.get_current_stream
    runtime, compilation = vars(knobs.runtime), vars(knobs.compilation)
    runtime_was, compilation_was = dict(runtime), dict(compilation)
    # A hook that is another object is seen in `runtime`.
    enter, leave = knobs.runtime.launch_enter_hook or NOBODY, knobs.runtime.launch_exit_hook or NOBODY
    before = launch.kernel.pre_run_hooks

    def go(_: Pointers, addresses: list[int]) -> bool:
        if enter.calls or leave.calls or before or runtime != runtime_was or compilation != compilation_was:
            return False
        run(
            programs, 1, 1, stream(device), kernel.function, kernel.packed_metadata, None, None, None, *addresses, *tail
        )  # fmt: skip
        return True

    return go


def _watched(kernel: Any) -> bool:
    """Whether somebody is to be told of every launch: a profiler, say."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or kernel.pre_run_hooks
    )


def _variant(launch: Prepared, key: Any) -> Any:
    """What tells a compiled kernel from others, as Triton does: an integer counts by whether 32 bits hold it."""
    wide = tuple(not -(2**31) <= i < 2**31 for i in launch.integers)
    settings = str((vars(knobs.runtime), vars(knobs.compilation)))
    return launch.kernel, launch.pointers, wide, tuple(launch.constants.items()), key, settings


def capturing(device: int) -> bool:
    """Whether the current stream is being captured into a graph."""
    return device >= 0 and torch.cuda.is_current_stream_capturing()


def _warn(variant: Any, text: str) -> None:
    """Warns once of each variant and text. Numbers make no other text: how much memory was free, say."""
    said = variant, re.sub(r"0x[0-9a-f]+|\d+", "#", text)
    if said not in _warned:
        # Not by warnings.warn, whose registry knows texts alone: the same text of another variant would go unsaid.
        warnings.warn_explicit(text, UserWarning, __file__, _warn.__code__.co_firstlineno, __name__)
        _warned[said] = True


def stand_ins(launch: Prepared) -> tuple[Any, ...]:
    """What JITFunction.warmup takes for a kernel's pointers and descriptors; of these only the box counts."""
    boxes = launch.boxes or (None,) * len(launch.pointers)
    return tuple(
        dtype if box is None else TensorDescriptor(MockTensor(dtype), [1] * 5, [16] * 4 + [1], list(box[2]))
        for dtype, box in zip(launch.pointers, boxes, strict=True)
    )


def load(launch: Prepared, device: int) -> None:
    """Makes a kernel ready on the current device for aligned tensors, without launching it; compiles it if need be."""
    with _first_time:
        kernel = launch.kernel.warmup(*stand_ins(launch), *launch.integers, grid=launch.grid, **launch.constants)
        try:
            kernel.run  # noqa: B018 - a property, which loads it
        except Exception:
            _unload(launch)
            raise
        _known.add(_variant(launch, _aligned(launch, device)))
