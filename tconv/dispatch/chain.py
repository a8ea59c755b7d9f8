"""Kernels in the place of aten's, among others' that do the same.

The dispatcher keeps a list of kernels for each operator and key. The last one registered runs; when it is taken out, the
one before it runs again, in whatever order they go. What the dispatcher does not look after is how one kernel falls through
to the one before it. `torch.library.get_kernel` gives a handle to it, and a handle is void once its kernel is taken out.
So a `Layer` looks again when the kernel below it has gone, and it stays, inactive, where another library's kernel has been
put on top of it and may hold a handle to it.
"""

from __future__ import annotations

import collections
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

lock = threading.RLock()  # of all changes to what is registered
# Torch frees what it calls us by with the registration, under threads that have entered it and wait for Python's lock inside.
# A handle keeps it: of the last registrations, so that no thread can be that late and toggling for ever costs bounded memory.
_kept: collections.deque[Any] = collections.deque(maxlen=4096)
VOID = "SafeKernelFunction has been invalidated"  # what torch says of a handle whose kernel was taken out
TRIES = 8  # of finding a kernel below while others come and go
UNUSED = ("VE", "XPU", "HPU", "IPU")  # backends for which torch gives its kernel for all of them, unless somebody has one


class Below:
    """The kernel that was there before one of ours, to fall through to.

    Args:
        layer: that ours is part of.
        operator: its name in aten.
        key: the dispatch key.
    """

    __slots__ = ("_handle", "_layer", "key", "operator")

    def __init__(self, layer: Layer, operator: str, key: str) -> None:
        self._layer, self.operator, self.key = layer, operator, key
        self._handle: Any = None

    def look(self) -> None:
        """Takes for it what runs now, ours not being registered."""
        self._handle = torch.library.get_kernel(f"aten::{self.operator}", self.key)

    def __call__(self, keys: Any, *args: Any) -> Any:
        """Runs it, or what is there instead once it has been taken out; other threads may go on registering meanwhile."""
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
        raise error  # of a kernel below that falls through to one that is gone

    def settle(self) -> None:
        """Takes torch's own kernel for it, since what lies between cannot be seen."""
        backends = (self.key.replace("CPU", other).replace("CUDA", other) for other in UNUSED)
        known = [backend for backend in backends if backend in torch._C.DispatchKey.__members__]
        handles = [torch.library.get_kernel(f"aten::{self.operator}", backend) for backend in known]
        self._handle = next((h for h in handles if not written_in_python(h)), handles[0])


def written_in_python(handle: Any) -> bool:
    """Whether a kernel was registered from Python, which its handle's text tells."""
    return ".py:" in repr(handle)


class Layer:
    """Kernels of ours that are registered together, on top of what is there now.

    Args:
        kernels: our function by operator and dispatch key. It is called with what is `Below` it, the set of keys that the
            dispatcher was called with, and the operator's arguments.

    Attributes:
        kernels: the same by what is below each.
    """

    def __init__(self, kernels: dict[tuple[str, str], Callable[..., Any]]) -> None:
        self.kernels = {Below(self, operator, key): function for (operator, key), function in kernels.items()}
        self._texts: dict[tuple[str, str], str] = {}  # of the handles of our kernels, by operator and key
        self._library: Any = None
        self._register()

    def _register(self) -> None:
        # Torch 2.11 warns of what is meant here. The filter stays: taking it back is not safe in threads.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
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
        """Takes the kernels out."""
        self._library._destroy()
        if self in _registered:
            _registered.remove(self)

    def on_top(self) -> bool:
        """Whether these are the kernels that run: nobody has registered others since.

        A handle's text says which line of code registered a kernel, which is the same for all layers.
        """
        return all(
            repr(torch.library.get_kernel(f"aten::{operator}", key)) == text and _newest(operator, key) is self
            for (operator, key), text in self._texts.items()
        )

    def look_below(self, below: Below) -> None:
        """Finds what to fall through to after the kernel that was there has been taken out.

        What is registered below ours can be seen only while ours are not there. Where others are on top, ours must stay.
        """
        if self.on_top():
            self.remove()
            self._register()
        else:
            below.settle()


_registered: list[Layer] = []  # in the order in which they were registered


def _newest(operator: str, key: str) -> Layer | None:
    """The layer that was registered last for an operator and a key."""
    return next((layer for layer in reversed(_registered) if (operator, key) in layer._texts), None)


def torchs_own(operator: str, key: str) -> bool:
    """Whether the kernel that runs now is torch's."""
    return not written_in_python(torch.library.get_kernel(f"aten::{operator}", key))
