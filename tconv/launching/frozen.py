"""Keeps the channels_last copies of frozen weights between calls.

A kernel that needs a weight in channels last, or with more channels, copies it in every call, because the weight may have
changed. Of a frozen weight the copy is kept, and made anew only when the weight's version counter or its storage has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tconv.launching.arguments import Prepared
from tconv.launching.compiled import capturing

Make = Callable[[Prepared, torch.Tensor], torch.Tensor]
_lock = threading.RLock()
_kept: dict[int, _Kept] = {}  # by the weight's address


class _Kept:
    """The copies of one frozen weight, by shape and strides."""

    __slots__ = ("copies", "storage", "version", "weight")

    def __init__(self, weight: torch.Tensor, address: int) -> None:
        self.weight = weakref.ref(weight, lambda _: _kept.pop(address, None))
        # No other storage is taken for it, even at its address.
        self.storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        self.version = _version(weight)
        self.copies: dict[Any, torch.Tensor] = {}


def keep(weight: torch.Tensor) -> None:
    """Keeps the copies of a weight from now on. It must not be changed behind its version counter's back, as by `.data`."""
    with _lock:
        _kept[weight.data_ptr()] = _Kept(weight, weight.data_ptr())


def release(weight: torch.Tensor) -> bool:
    """Forgets the copies of a weight. Returns whether they were kept."""
    with _lock:
        found = _kept.get(weight.data_ptr())
        if found is None or found.weight() is not weight:
            return False
        if weight.is_cuda:  # other streams may still read them
            torch.cuda.synchronize(weight.device)
        del _kept[weight.data_ptr()]
        return True


def copied(copy: Prepared, t: torch.Tensor, make: Make) -> torch.Tensor:
    """Returns the copy of an operand: of a frozen weight the one that is kept, else one that `make` makes."""
    found = _kept.get(t.data_ptr()) if _kept else None
    if found is None:
        return make(copy, t)
    with _lock:
        weight = found.weight()
        if weight is None or _form(weight) != _form(t) or t.untyped_storage()._cdata != found.storage.cdata:
            return make(copy, t)  # another tensor at the same address, another view of the weight, or its `.data` was set
        if found.version != _version(weight):
            found.version = _version(weight)
            found.copies.clear()
        key = copy.shape, copy.strides
        if key not in found.copies:
            made = make(copy, t)
            if capturing(t.get_device()):  # it is made when the graph is replayed, and in the graph's own memory
                return made
            if t.is_cuda:  # once, so that any stream may read it
                torch.cuda.current_stream(t.device).synchronize()
            found.copies[key] = made
        return found.copies[key]


def _form(t: torch.Tensor) -> Any:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def _version(t: torch.Tensor) -> int:
    return -1 if t.is_inference() else t._version
