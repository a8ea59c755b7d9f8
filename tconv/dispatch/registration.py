"""Registers kernels for aten's operators, next to other libraries that override the same operators.

The dispatcher keeps a list of kernels for each operator and key, and runs the last one registered. When a kernel is removed,
in whatever order, the one before it runs again. But the dispatcher does not help a kernel call the one before it.
`torch.library.get_kernel` returns a handle to that, which becomes invalid when its kernel is removed.

So a `Registration` looks the kernel below up again when that has been removed. If another library has registered a kernel on
top of it, it stays registered, inactive, since that library may have a handle to it.
"""

from __future__ import annotations

import collections
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

lock = threading.RLock()  # held during all changes to registrations
# Torch frees its callback together with a registration, even while threads are inside it, waiting for the GIL. A handle keeps
# it alive. Handles of the last 4096 registrations are kept: enough for any thread to leave, and bounded memory.
_kept: collections.deque[Any] = collections.deque(maxlen=4096)
VOID = "SafeKernelFunction has been invalidated"  # torch's error for a handle whose kernel was removed
TRIES = 8  # attempts to call the kernel below while other threads register and remove kernels
UNUSED = ("VE", "XPU", "HPU", "IPU")  # backends that get torch's kernel for all backends, unless somebody registers another


class Below:
    """The kernel registered before one of ours, for calls that fall back.

    Args:
        layer: the layer that our kernel is part of.
        operator: the operator's name in aten.
        key: the dispatch key.
    """

    __slots__ = ("_handle", "_layer", "key", "operator")

    def __init__(self, layer: Registration, operator: str, key: str) -> None:
        self._layer, self.operator, self.key = layer, operator, key
        self._handle: Any = None

    def look(self) -> None:
        """Looks up the kernel that runs now. Our kernel must not be registered."""
        self._handle = torch.library.get_kernel(f"aten::{self.operator}", self.key)

    def __call__(self, keys: Any, *args: Any) -> Any:
        """Calls the kernel. If it has been removed, looks up its successor, while other threads may register more."""
        for _ in range(TRIES):
            handle = self._handle
            try:
                return handle.call_boxed(keys, *args)
            except RuntimeError as e:
                if VOID not in str(e):
                    raise
                error = e
            with lock:
                if handle is self._handle:  # else another thread has looked
                    self._layer.look_below(self)
        raise error  # the kernel below itself calls a handle that is invalid

    def use_torchs(self) -> None:
        """Uses torch's own kernel from now on, since kernels between that and ours cannot be looked up."""
        backends = (self.key.replace("CPU", other).replace("CUDA", other) for other in UNUSED)
        known = [backend for backend in backends if backend in torch._C.DispatchKey.__members__]
        handles = [torch.library.get_kernel(f"aten::{self.operator}", backend) for backend in known]
        self._handle = next((h for h in handles if not written_in_python(h)), handles[0])


def written_in_python(handle: Any) -> bool:
    """Returns True if a kernel was registered from Python. Its handle's repr names the Python file."""
    return ".py:" in repr(handle)


class Registration:
    """Kernels of ours that are registered together, on top of those registered before.

    Args:
        kernels: our functions by operator and dispatch key. Each is called with its `Below`, the dispatch keys of the call,
            and the operator's arguments.

    Attributes:
        kernels: the same functions, each by its `Below`.
    """

    def __init__(self, kernels: dict[tuple[str, str], Callable[..., Any]]) -> None:
        self.kernels = {Below(self, operator, key): function for (operator, key), function in kernels.items()}
        self._texts: dict[tuple[str, str], str] = {}  # of the handles of our kernels, by operator and key
        self._library: Any = None
        self._register()

    def _register(self) -> None:
        # Torch 2.11 warns that a kernel is overridden, which is intended. Removing the filter again would not be thread-safe.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # untyped in torch
        try:
            _registered.append(self)
            for below, function in self.kernels.items():
                below.look()
                self._library.impl(
                    below.operator, functools.partial(function, below), below.key, with_keyset=True, allow_override=True
                )
                handle = torch.library.get_kernel(f"aten::{below.operator}", below.key)
                self._texts[below.operator, below.key] = repr(handle)
                _kept.append(handle)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Removes the kernels."""
        self._library._destroy()
        if self in _registered:
            _registered.remove(self)

    def on_top(self) -> bool:
        """Returns True if these are the kernels that run, that is if nobody has registered others since.

        A handle's repr names the line of code that registered the kernel. That line is the same for all layers, so the order
        of registration is compared too.
        """
        return all(
            repr(torch.library.get_kernel(f"aten::{operator}", key)) == text and _newest(operator, key) is self
            for (operator, key), text in self._texts.items()
        )

    def look_below(self, below: Below) -> None:
        """Finds the kernel to call after the one below has been removed.

        The kernel below ours can be looked up only while ours are not registered. If others are on top, ours must stay.
        """
        if self.on_top():
            self.remove()
            self._register()
        else:
            below.use_torchs()


_registered: list[Registration] = []  # in the order in which they were registered


def _newest(operator: str, key: str) -> Registration | None:
    """Returns the layer registered last for an operator and a key, or None."""
    return next((layer for layer in reversed(_registered) if (operator, key) in layer._texts), None)


def torchs_own(operator: str, key: str) -> bool:
    """Returns True if the kernel that runs now is torch's."""
    return not written_in_python(torch.library.get_kernel(f"aten::{operator}", key))
