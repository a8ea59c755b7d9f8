"""Launches kernels, and tracks which variants are compiled and which failed.

Triton's own dispatch binds, specialises and hashes about fifty arguments on every call. Only the addresses of a prepared
launch change, so from the second time on the compiled kernel is launched with them directly. That happens only if everything
it was specialised on is the same: the device, which addresses are multiples of 16, and Triton's settings. Launches still go
through Triton's dispatch if hooks are set, in the interpreter, and on AMD, whose compiler also specialises on sizes.

If a kernel does not compile, or needs more resources than the device has, its variant is remembered as failed and later calls
that need it fall back to torch at once. After any other error (out of memory, a driver error) one call falls back, and the
next one tries again.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from triton import knobs
from triton.compiler import CompilationError, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from tconv.launching.arguments import INTERPRET, Prepared
from tconv.launching.cache import BoundedCache
from tconv.launching.descriptors import descriptor, descriptors, stand_ins
from tconv.launching.record import Fallback, TransientFallback
from tconv.planning.plan import requested

Pointers = tuple[torch.Tensor, ...]
Relaunch = Callable[[Pointers, list[int]], bool]
AMD = torch.version.hip is not None
SMALL = 2**31 - 1  # AMD's compiler specialises on whether a tensor's storage has at most this many bytes
NOBODY: Any = knobs.HookChain()  # type: ignore[var-annotated]  # an empty chain, for hooks that are None
REASON = "not compiled before the capture of a CUDA graph: call the model once before it, or tconv.precompile()"

_known: set[Any] = set()  # variants that are compiled, and loaded on their device
_failed: dict[Any, str] = {}  # variants that fail every time, and why
_warned: BoundedCache[Any, bool] = BoundedCache()  # warnings given, as (variant, text without numbers)
# One thread at a time compiles and loads a kernel, because Triton may return to another thread one that is half loaded.
_first_time = threading.RLock()
# Triton's interpreter patches triton.language while it runs, so only one launch may run at a time.
_alone: Any = threading.RLock() if INTERPRET else contextlib.nullcontext()
# A fork waits until no other thread compiles or interprets a kernel. It acquires the locks in reverse order of registration:
# _first_time, then _alone, as `_run_first` does.
for _lock in (_alone, _first_time):
    if hasattr(_lock, "acquire"):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def run(launch: Prepared, pointers: Pointers) -> None:
    """Launches a kernel on torch's current stream of the tensors' device.

    Args:
        pointers: a tensor for each of the kernel's pointers, all on one device.

    Raises:
        TransientFallback: the kernel is not compiled and a CUDA graph is being captured, or an error occurred that may not
            recur.
        Fallback: this variant of the kernel fails every time.
        Exception: the original error, if a plan is requested.
    """
    device = pointers[0].get_device()  # -1 for the CPU
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
    """Returns what Triton specialises a kernel on besides types, as a hashable key.

    The key is the device and, for each pointer, whether its address is a multiple of 16 bytes; if all are, it is the device
    alone. On AMD it is the device, the alignments, and for each pointer whether its storage has at most `SMALL` bytes.
    """
    aligned = tuple(t.data_ptr() % 16 == 0 for t in pointers)
    if AMD:
        return device, aligned, tuple(t.untyped_storage().size() <= SMALL for t in pointers)
    return device if all(aligned) else (device, aligned)


def _run_first(launch: Prepared, pointers: Pointers, device: int, key: Any) -> None:
    """Launches through Triton's dispatch, which compiles the kernel if need be.

    Keeps a function that repeats the launch, unless hooks must see every launch.

    Raises:
        TransientFallback, Fallback: as for `run`.
    """
    with _first_time:
        _require_launchable(device, (launch, key), *_sum(launch, device))
        try:
            kernel = _by_triton(launch, pointers)
            if kernel is None and not INTERPRET:
                raise RuntimeError("a hook of Triton's did not let it be compiled")
        except Exception as e:
            _unload(launch)
            fail(launch, key, e)
        _known.add(_variant(launch, key))
        if INTERPRET or AMD:
            launch.ready[key] = _indirectly(launch)
        elif type(kernel) is CompiledKernel and not _watched(launch.kernel):
            launch.ready[key] = _directly(launch, kernel, device)


def run_once(launch: Prepared, pointers: Pointers) -> None:
    """Launches on the tensors' device, which is the current one, through Triton's dispatch. Errors are raised as they are."""
    with _first_time:
        _by_triton(launch, pointers)


def require_launchable(launch: Prepared, missing: list[int], operands: Pointers, more: Pointers) -> None:
    """Checks that every part of a launch can run, before any part does: copies of operands, the kernel, the sum of splits.

    Args:
        missing: the indices of the operands that will be copied: others that need a copy have one.
        operands: the operands that may be copied to channels last first.
        more: tensors for the kernel's other pointers.

    Raises:
        TransientFallback: a part is not compiled, and a CUDA graph is being captured.
        Fallback: a part fails every time.
    """
    device = operands[0].get_device()
    if (
        not AMD
        and all(device in part.ready for part in launch.needed(missing))
        and not any(t.data_ptr() & 15 for t in (*operands, *more))
    ):
        return  # each part has run on aligned tensors, as copies and the workspace are too
    if not _failed and not capturing(device):
        return
    given = [
        torch.empty_strided(copy.shape, copy.strides, dtype=t.dtype, device="meta") if copy else t
        for copy, t in zip(launch.copies or (None,) * len(operands), operands, strict=True)
    ]
    pairs = [(operands[i], given[i]) for i in missing]
    copied = [(*pairs[0], *pairs[1])] if len(pairs) == 2 else pairs
    parts = [(copy, _specialised(device, pair)) for copy, pair in zip(launch.copying(missing), copied, strict=True)]
    if launch.swapped:
        given.reverse()
    _require_launchable(device, *parts, (launch, _specialised(device, (*given, *more))), *_sum(launch, device))


def require_all(parts: Sequence[tuple[Prepared, Pointers]]) -> None:
    """Checks that several launches, each given with its pointers, can run, before the first one does.

    Raises:
        TransientFallback, Fallback: as for `require_launchable`.
    """
    device = parts[0][1][0].get_device()
    if _failed or capturing(device):
        _require_launchable(device, *((launch, _specialised(device, pointers)) for launch, pointers in parts))


def fail(launch: Prepared, key: Any, error: Exception) -> NoReturn:
    """Turns an error of a launch into a fallback of its call, with a warning. If a plan is requested, raises the error itself.

    Args:
        key: what the launch is specialised on, from `_specialised`; None if the error came before that was known.

    Raises:
        TransientFallback: the error may not recur, so the next call tries again.
        Fallback: the error would recur. The variant is remembered, and later calls that need it fall back at once.
    """
    if requested() is not None:
        raise error
    text = str(error).strip()[:1000]  # a compiler may print pages
    what = f"{launch.kernel.__name__} of {launch.call.operation} in {str(launch.pointers[0]).removeprefix('torch.')}"
    reason = f"{what} failed: {type(error).__name__}: {text}"
    variant = _variant(launch, key)
    if not lasting(error):
        _warn(variant, f"tconv falls back to torch for one call, and will try again: {reason}")
        raise TransientFallback(reason) from error
    _failed[variant] = reason
    launch.ready.pop(key, None)
    _warn(variant, f"tconv falls back to torch for every call whose kernel failed: {reason}")
    raise Fallback(reason) from error


def lasting(error: Exception) -> bool:
    """Returns True if a launch would fail every time: its kernel does not compile, or needs more than the device has."""
    if isinstance(error, (CompilationError, PTXASError, OutOfResources)):
        return True
    if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):  # a full disk breaks compilation, too
        return False
    # Compiler passes raise errors of any type, such as RuntimeError, so the traceback decides. An error from outside
    # triton.compile is an error of the launch.
    return any(frame.f_code is triton_compile.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _require_launchable(device: int, *parts: tuple[Prepared, Any]) -> None:
    """Raises if one of these launches, each given as (launch, what it is specialised on), cannot run.

    Raises:
        TransientFallback: one is not compiled, and a CUDA graph is being captured.
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
    """Makes Triton load a kernel again after loading failed, for example because memory ran out.

    Triton creates a compiled kernel's launcher before it loads the module. Unless the launcher is removed, it would launch the
    kernel without a module.
    """
    for kernels, *_ in getattr(launch.kernel, "device_caches", {}).values():
        for kernel in kernels.values():
            if getattr(kernel, "module", kernel) is None and type(kernel._run) is driver.active.launcher_cls:
                kernel._run = None


def _sum(launch: Prepared, device: int) -> list[tuple[Prepared, Any]]:
    """Returns the launch that sums the splits and what it is specialised on; an empty list if there are no splits."""
    return [(launch.total, _aligned(launch.total, device))] if launch.total else []


def _aligned(launch: Prepared, device: int) -> Any:
    """Returns `_specialised`'s key for tensors that are all aligned and, for AMD, have at most `SMALL` bytes of storage."""
    return (device, *[(True,) * len(launch.pointers)] * 2) if AMD else device


def _by_triton(launch: Prepared, pointers: Pointers) -> Any:
    given: tuple[Any, ...] = pointers
    if launch.boxes:
        pairs = zip(pointers, launch.boxes, strict=True)
        given = tuple(t if box is None else descriptor(launch.kernel, t, box) for t, box in pairs)
    with _alone:
        return launch.kernel[launch.grid](*given, **launch.named)


def _indirectly(launch: Prepared) -> Relaunch:
    def go(pointers: Pointers, _: list[int]) -> bool:
        _by_triton(launch, pointers)
        return True

    return go


def _directly(launch: Prepared, kernel: CompiledKernel, device: int) -> Relaunch:
    """Returns a function that launches a compiled kernel without Triton's dispatch.

    It passes the same arguments as the end of JITFunction.run, constants included, but addresses in place of tensors, and
    tensor descriptors without the checks that the first launch has made. It launches nothing and returns False if hooks are
    set or Triton's settings have changed.
    """
    programs, tail = launch.grid[0], launch.tail
    run, stream = kernel.run, driver.active.get_current_stream
    runtime, compilation = vars(knobs.runtime), vars(knobs.compilation)
    runtime_was, compilation_was = dict(runtime), dict(compilation)
    # If a hook chain is replaced by another object, `runtime` differs from `runtime_was`.
    enter, leave = knobs.runtime.launch_enter_hook or NOBODY, knobs.runtime.launch_exit_hook or NOBODY
    before = launch.kernel.pre_run_hooks
    boxes = [(i, descriptors(launch.kernel, launch.pointers[i], box)) for i, box in enumerate(launch.boxes) if box]

    def go(pointers: Pointers, addresses: list[int]) -> bool:
        if enter.calls or leave.calls or before or runtime != runtime_was or compilation != compilation_was:
            return False
        given: list[Any] = addresses
        for i, made in boxes:
            given[i] = made(pointers[i])
        run(
            programs, 1, 1, stream(device), kernel.function, kernel.packed_metadata, None, None, None, *given, *tail
        )  # fmt: skip
        return True

    return go


def _watched(kernel: Any) -> bool:
    """Returns True if Triton has hooks, such as a profiler's, that must see every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or kernel.pre_run_hooks
    )


def _variant(launch: Prepared, key: Any) -> Any:
    """Returns a key that is unique for each compiled kernel. Integers only count by whether they fit 32 bits, as in Triton."""
    wide = tuple(not -(2**31) <= i < 2**31 for i in launch.integers)
    settings = str((vars(knobs.runtime), vars(knobs.compilation)))
    return launch.kernel, launch.pointers, wide, tuple(launch.constants.items()), key, settings


def capturing(device: int) -> bool:
    """Returns True if the current stream is being captured into a CUDA graph; False on the CPU (device -1)."""
    return device >= 0 and torch.cuda.is_current_stream_capturing()


def _warn(variant: Any, text: str) -> None:
    """Warns once for each variant and text. Texts that differ only in numbers, such as the free memory, count as equal."""
    said = variant, re.sub(r"0x[0-9a-f]+|\d+", "#", text)
    if said not in _warned:
        # Not warnings.warn: its registry compares only texts, so the same text for another variant would not be shown.
        warnings.warn_explicit(text, UserWarning, __file__, _warn.__code__.co_firstlineno, __name__)
        _warned[said] = True


def load(launch: Prepared, device: int) -> None:
    """Compiles a kernel if need be and loads it on the current device, for aligned tensors, without launching it."""
    with _first_time:
        kernel = launch.kernel.warmup(*stand_ins(launch), grid=launch.grid, **launch.named)
        try:
            kernel.run  # noqa: B018 - reading this property loads the kernel
        except Exception:
            _unload(launch)
            raise
        _known.add(_variant(launch, _aligned(launch, device)))
