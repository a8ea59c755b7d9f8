"""Whether a kernel may run on given tensors in the current context of PyTorch.

This covers what can change between two calls of the same shapes: tensor subclasses, functorch transforms, dispatch and
function modes, forward-mode AD, tracing. What a kind of call is (shapes, dtypes, parameters) is checked in check.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DisableTorchFunction
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _len_torch_function_stack as any_function_modes
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tconv.planning.plan import forced

NOT_STRIDED = "not a plain strided tensor"
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def why_ineligible(*tensors: Any) -> str | None:
    """Returns why a kernel must not run on these tensors in this context, or None if it may."""
    if torch._C._are_functorch_transforms_active():
        return "inside a functorch transform"
    if dispatch_modes() or (any_function_modes() and function_modes()):
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
            return "a batched gradient" if torch._C._functorch.is_legacy_batchedtensor(t) else NOT_STRIDED
        if t.is_neg() or (pointer == 0 and t._is_zerotensor()):
            return NOT_STRIDED
    return None


def taken_apart() -> bool:
    """Returns True where a call of several steps takes them one after the other: in functorch's transforms and forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain(t: torch.Tensor) -> torch.Tensor:
    """Returns a tensor subclass's memory as a plain torch.Tensor, so that none of the subclass's methods are called.

    A subclass with `__torch_dispatch__` is returned unchanged: it expects to see every operator.
    """
    if type(t) in PLAIN or torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python):
        return t
    with DisableTorchFunction():
        return torch.Tensor.as_subclass(t, torch.Tensor)


def tensor_guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Returns a function that tells whether other tensors match these, by the native check that guards torch.compile's graphs.

    It compares type, dtype, device, shape, strides, requires_grad and dispatch keys. The keys include the thread's state, so
    it also notices autocast, functorch, tracing, inference mode, and sparse, batched, negated and zero tensors.
    """
    make: Any = TensorGuards  # whose stub leaves the tensors out
    check: Callable[..., bool] = make(
        *tensors,
        dynamic_dims_sizes=[[*t.shape] for t in tensors],
        dynamic_dims_strides=[[*t.stride()] for t in tensors],
    ).check
    return check


def global_state_differs(precision: str) -> bool:
    """Returns True if global state requires the slow path: active modes, forward-mode AD, forced plans, or an fp32 precision
    other than `precision`.
    """
    return bool(
        dispatch_modes()
        or (any_function_modes() and function_modes())
        or forward_ad._current_level >= 0
        or fp32_precision("cuda", "conv") != precision
        or forced() is not None
    )


def function_modes() -> bool:
    """Returns True if a function mode is active, other than torch.set_default_device's, which does not affect convolutions."""
    # The stack has no types in torch.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def foreign_modes() -> bool:
    """Returns True if a function mode from outside torch is active. Such a mode expects to see torch's own function."""
    # The stack has no types in torch.
    return any(not type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
