"""Casts to autocast's dtype. Those of weights are kept as long as torch's autocast keeps its own.

Torch casts a weight once and keeps the cast until the outermost autocast ends, or `torch.clear_autocast_cache()` is called.
Its cache cannot be read from Python, so tconv has its own. To end with torch's it is attached to something in that: torch is
made to cast a leaf without elements, and the autograd node of the cast holds tconv's casts. When torch clears its cache the
node is deleted, and they with it.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch

KEY = "tconv.autocast"  # in the node's metadata
MaybeTensor = torch.Tensor | None


Kept = tuple[torch.Tensor, int, int, torch.Tensor]  # a tensor, its version, its address, its cast


class _Casts(dict[Any, dict[int, Kept]]):
    """The casts of one autocast: by dtype and modes, then by the tensor's id, which is no other's while the tensor is kept."""


_leaves: dict[str, torch.Tensor] = {}  # the leaf without elements, by type of device
_current: dict[str, weakref.ref[_Casts]] = {}  # the casts that torch's cache holds now, by type of device


def cast(device: str, *tensors: MaybeTensor) -> tuple[Any, ...]:
    """Casts floating-point tensors, except fp64, to autocast's dtype.

    The cast is differentiable, so gradients arrive in the parameters' dtype.
    """
    dtype = torch.get_autocast_dtype(device)
    return tuple([_cast(t, dtype) for t in tensors])


def cast_once(device: str, *tensors: MaybeTensor) -> tuple[Any, ...]:
    """Does what `cast` does, and casts a leaf that requires a gradient only once in an autocast, as torch does.

    Unlike torch's, the cast of a tensor that was edited in place since is not used again. Must not be called in a dry
    run, or while a mode or transform could see the tensors.
    """
    dtype = torch.get_autocast_dtype(device)
    if not torch.is_autocast_cache_enabled():
        return tuple([_cast(t, dtype) for t in tensors])
    held = _current.get(device)
    casts = None if held is None else held()
    if casts is None:
        casts = _attached(device)
    # A cast made without gradients must not be used where there are some.
    mode = dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kept = casts.get(mode)
    if kept is None:
        kept = casts[mode] = {}
    return tuple([_cast(t, dtype) if t is None or not t.requires_grad else _cast_once(kept, t, dtype) for t in tensors])


def _cast(t: Any, dtype: torch.dtype) -> Any:
    if t is None or t.dtype is dtype or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


def _cast_once(kept: dict[int, Kept], t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found = kept.get(id(t))
    if found is not None and found[1] == t._version and found[2] == t.data_ptr():
        return found[3]
    new: torch.Tensor = _cast(t, dtype)
    # What torch keeps too. An inference tensor has no version.
    if t.dtype is torch.float32 and t.is_leaf and new is not t and not (t._is_view() or t.is_inference()):
        kept[id(t)] = t, t._version, t.data_ptr(), new
    return new


def _attached(device: str) -> _Casts:
    """Returns the casts that torch's cache holds, empty ones if it was cleared since."""
    with torch.inference_mode(False), torch.enable_grad():
        if device not in _leaves:
            _leaves[device] = torch.zeros(0, 0, dtype=torch.float32, device=device, requires_grad=True)
        leaf = _leaves[device]
        zero = leaf.detach()
        node: Any = torch.addmm(leaf, zero, zero).grad_fn  # saves no tensor, which a checkpoint would see
    casts: _Casts = node.next_functions[0][0].metadata.setdefault(KEY, _Casts())
    _current[device] = weakref.ref(casts)
    return casts


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Leaves operands in their dtype, as torch's own backward does also where `backward` is called within autocast."""
    on = device in ("cuda", "cpu") and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()
