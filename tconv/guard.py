"""Whether a kernel may be run on given tensors right now: what changes from call to call, not what a kind of call is."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

STRANGE = "not a plain strided tensor"
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def unusual(*tensors: Any) -> str | None:
    """Why a kernel must not be run, or None."""
    if torch._C._are_functorch_transforms_active():
        return "inside a functorch transform"
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and function_modes()):
        return "inside a dispatch or function mode"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "being traced"
    for t in tensors:
        if type(t) not in PLAIN:
            return f"a tensor subclass, {type(t).__name__}"
        try:
            pointer = t.data_ptr()
        except RuntimeError:  # no memory of its own
            return "a batched gradient" if torch._C._functorch.is_legacy_batchedtensor(t) else STRANGE
        if t.is_neg() or (pointer == 0 and t._is_zerotensor()):
            return STRANGE
    return None


def function_modes() -> bool:
    """Whether a function mode is active other than torch.set_default_device's, which a convolution does not concern."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def foreign_modes() -> bool:
    """Whether a function mode is active that is not torch's own, as tracing's are: it is to see torch's function."""
    return any(not type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
