"""Keeps the channels_last copies of frozen weights between calls.

A kernel that needs a weight in channels last, or with more channels, copies it in every call, because the weight may have
changed. Of a frozen weight the copy is kept, and made anew only when the weight's version counter or its storage has changed.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tconv.launching.arguments import Prepared
from tconv.launching.compiled import capturing

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
        if weight.data_ptr():  # a meta tensor has no memory
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


def find(copy: Prepared, t: torch.Tensor) -> torch.Tensor | None:
    """Returns the copy of an operand that was kept, if it is a frozen weight that has not changed since."""
    if not _kept:
        return None
    with _lock:
        found = _entry(t)
        return found.copies.get((copy.shape, copy.strides)) if found else None


def add(copy: Prepared, t: torch.Tensor, made: torch.Tensor) -> None:
    """Keeps the copy of an operand, if it is a frozen weight."""
    if not _kept or capturing(t.get_device()):  # a copy in a CUDA graph's own memory is made whenever the graph is replayed
        return
    with _lock:
        found = _entry(t)
        if found is not None:
            if t.is_cuda:  # once, so that any stream may read it
                torch.cuda.current_stream(t.device).synchronize()
            found.copies[copy.shape, copy.strides] = made


def _entry(t: torch.Tensor) -> _Kept | None:
    """Returns what is kept of the frozen weight that an operand is, without copies if the weight has changed."""
    found = _kept.get(t.data_ptr())
    weight = found.weight() if found else None
    if found is None or weight is None or _form(weight) != _form(t) or t.untyped_storage()._cdata != found.storage.cdata:
        return None  # another tensor at the same address, another view of the weight, or its `.data` was set
    if found.version != _version(weight):
        found.version = _version(weight)
        found.copies.clear()
    return found


def _form(t: torch.Tensor) -> Any:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def _version(t: torch.Tensor) -> int:
    return -1 if t.is_inference() else t._version
