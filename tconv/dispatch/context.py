"""Whether a kernel may be run on given tensors right now: what changes from call to call, not what a kind of call is."""

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

STRANGE = "not a plain strided tensor"
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def unusual(*tensors: Any) -> str | None:
    """Why a kernel must not be run, or None."""
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
            return "a batched gradient" if torch._C._functorch.is_legacy_batchedtensor(t) else STRANGE
        if t.is_neg() or (pointer == 0 and t._is_zerotensor()):
            return STRANGE
    return None


def plain(t: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as a tensor of torch's own class, so that no method of a user's subclass is called.

    A subclass that wants to see operators (`__torch_dispatch__`) stays as it is.
    """
    if type(t) in PLAIN or torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python):
        return t
    with DisableTorchFunction():
        return torch.Tensor.as_subclass(t, torch.Tensor)


def same(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Torch's own native check, which guards the graphs of torch.compile, of whether tensors are like these.

    Type, dtype, device, shape, strides, requires_grad and dispatch keys, those of the thread's state included: autocast,
    functorch, tracing, inference mode; sparse, batched, negated and zero tensors.
    """
    make: Any = TensorGuards  # whose stub leaves the tensors out
    check: Callable[..., bool] = make(
        *tensors,
        dynamic_dims_sizes=[[*t.shape] for t in tensors],
        dynamic_dims_strides=[[*t.stride()] for t in tensors],
    ).check
    return check


def moment_differs(precision: str) -> bool:
    """Whether what no tensor tells asks for the long way: modes, forward-mode differentiation, another precision of fp32."""
    return bool(
        dispatch_modes()
        or (any_function_modes() and function_modes())
        or forward_ad._current_level >= 0
        or fp32_precision("cuda", "conv") != precision
        or forced() is not None
    )


def function_modes() -> bool:
    """Whether a function mode is active other than torch.set_default_device's, which a convolution does not concern."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def foreign_modes() -> bool:
    """Whether a function mode is active that is not torch's own, as tracing's are: it is to see torch's function."""
    return any(not type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
