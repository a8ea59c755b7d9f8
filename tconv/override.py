"""One line for a whole process: every convolution that torch computes on a GPU becomes tconv's.

What is replaced are aten's kernels of `_convolution` and `convolution_backward`, below autograd, autocast, functorch, modes,
tracing and sharding: all of these go on seeing torch's own operators. Torch's functions, modules, compiled, traced and
exported graphs end in `_convolution`; `convolution`, above it, is what traced graphs and compiled packages leave out. Only
tensors of a device that tconv has kernels for get here at all. What is not taken goes to the kernel that was there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tconv import functional
from tconv.record import Declined

_lock = threading.Lock()
_depth = 0
_library: torch.library.Library | None = None
# Torch frees what it calls us by with the registration, under threads that have entered it and wait for Python's lock inside.
# A handle keeps it: of the last registrations, so that no thread can be that late and toggling for ever costs bounded memory.
_kept: collections.deque[Any] = collections.deque(maxlen=4096)


def enable() -> None:
    """Makes every convolution of the process that runs on a GPU tconv's, in all threads and in children forked later, until
    `disable()`. Those on CPUs too where `TRITON_INTERPRET=1` was set before Triton was imported.

    Calls nest: the override ends with the `disable()` that matches the first `enable()`. Layers, functions and compiled
    graphs follow at once, in both directions, and a backward pass follows what holds when it runs. Without Triton, or in a
    torch that is built without GPUs, it warns and changes nothing.

    Raises:
        RuntimeError: another library has replaced torch's convolutions in the same way.

    Example:
        >>> enable()
        >>> disable()
    """
    _begin(4)


def _begin(stacklevel: int) -> None:
    """`enable()`, for a caller so many frames up from where a warning is given."""
    global _depth, _library
    with _lock:
        if _depth == 0:
            _library = _override(stacklevel)
        _depth += 1


def disable() -> None:
    """Ends the override that `enable()` began; the outermost one gives torch's own kernels back.

    Raises:
        RuntimeError: there was no `enable()` before it.
    """
    global _depth, _library
    with _lock:
        if _depth == 0:
            raise RuntimeError("tconv.disable() without a tconv.enable() before it")
        _depth -= 1
        if _depth == 0 and _library is not None:
            _library._destroy()  # type: ignore[no-untyped-call]
            _library = None


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable()` for the length of a block, in the whole process.

    Example:
        >>> with enabled():
        ...     y = torch.nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    """
    _begin(5)  # contextlib is between
    try:
        yield
    finally:
        disable()


def _override(stacklevel: int) -> torch.library.Library:
    """Registers our kernels for the devices that tconv has some for; warns if there is none."""
    # Torch 2.11 warns of what is meant here. The filter stays: taking it back is not safe in threads.
    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    reasons = []
    try:
        for device in ("cuda", "cpu"):
            try:
                _replace(library, device)
            except Declined as e:
                reasons.append(str(e))
    except BaseException:
        library._destroy()  # type: ignore[no-untyped-call]
        raise
    if len(reasons) == 2:
        warnings.warn(f"tconv.enable() changes nothing here: {', '.join(dict.fromkeys(reasons))}", stacklevel=stacklevel)
    return library


def _replace(library: torch.library.Library, device: str) -> None:
    if device == "cuda" and not torch.cuda._is_compiled():
        raise Declined("this torch is built without GPUs")
    functional._engine(device)
    from tconv import aten

    key = device.upper()
    for operator, ours in (("_convolution", aten.convolution), ("convolution_backward", aten.convolution_backward)):
        torchs = torch.library.get_kernel(f"aten::{operator}", key)
        kernel = functools.partial(ours, torchs.call_boxed)
        library.impl(operator, kernel, key, with_keyset=True, allow_override=False)  # type: ignore[no-untyped-call]
        _kept.append(torch.library.get_kernel(f"aten::{operator}", key))


if hasattr(os, "register_at_fork"):  # a child inherits a whole state, and a lock that nobody holds
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
