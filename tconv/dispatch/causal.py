"""Causal depthwise convolutions of sequences, and their decode step, as state-space models use them.

tconv's kernels compute them, directly or by the registered operators of causal_ops.py. In functorch's transforms and in
forward-mode differentiation they are a sequence of PyTorch's functions; `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import causal_ops, entry
from tconv.dispatch.check import require
from tconv.dispatch.context import taken_apart
from tconv.dispatch.support import DTYPES
from tconv.launching.record import Call, record_call

MaybeTensor = torch.Tensor | None
ACTIVATIONS = {None: "", "silu": "silu", "swish": "silu"}


def convolve(
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    seq_idx: MaybeTensor,
    initial_states: MaybeTensor,
    return_final_states: bool,
    cu_seqlens: MaybeTensor,
    activation: str | None,
) -> tuple[torch.Tensor, MaybeTensor]:
    """Computes `tconv.functional.causal_conv1d`. Returns y, and the final states or None.

    Raises:
        ValueError: an argument does not fit.
    """
    w = _check_filter(x, w, b, activation, (3,))
    n, channels, times = x.shape
    if seq_idx is not None:
        _check_integers("seq_idx", seq_idx, x, (n, times))
        for name, asked in (("initial_states", initial_states is not None), ("return_final_states", return_final_states)):
            require(not asked, name, "not be given with seq_idx, which does not tell where a sequence begins", "both")
    count = n
    if cu_seqlens is not None:
        require(seq_idx is None, "cu_seqlens", "not be given with seq_idx", "both")
        require(n == 1, "x", "have one image, (1, C, L), with cu_seqlens", tuple(x.shape))
        _check_integers("cu_seqlens", cu_seqlens, x, None)
        count = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        _check_like("initial_states", initial_states, x, (count, channels, w.shape[1] - 1))
    act = ACTIVATIONS[activation]
    index = seq_idx
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        index = torch.searchsorted(
            cu_seqlens[1:], torch.arange(times, device=x.device, dtype=cu_seqlens.dtype), right=True, out_int32=True
        ).unsqueeze(0)  # fmt: skip
    index = None if index is None else index.contiguous()
    found = _computed("causal_conv1d", x, w, b, initial_states, index, cu_seqlens, act, return_final_states)
    return found[0], found[1] if return_final_states else None


def update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    activation: str | None,
    cache_seqlens: MaybeTensor,
    conv_state_indices: MaybeTensor,
) -> torch.Tensor:
    """Computes `tconv.functional.causal_conv1d_update`.

    Raises:
        ValueError: an argument does not fit.
    """
    w = _check_filter(x, w, b, activation, (2, 3))
    xs = x if x.dim() == 3 else x.unsqueeze(2)
    n, channels, _ = xs.shape
    shape = tuple(conv_state.shape) if isinstance(conv_state, torch.Tensor) else (type(conv_state).__name__,)
    least = max(1, w.shape[1] - 1)
    fits = len(shape) == 3 and shape[1] == channels and shape[2] >= least and (conv_state_indices is not None or shape[0] == n)
    slots = n if conv_state_indices is None else "slots"
    require(fits, "conv_state", f"have shape ({slots}, {channels}, {least} or more)", shape)
    _check_like("conv_state", conv_state, x, shape)
    for name, t in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if t is not None:
            _check_integers(name, t, x, (n,))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conv_state, w, b)):
        raise ValueError("causal_conv1d_update has no gradient: call it under torch.no_grad()")
    act = ACTIVATIONS[activation]
    y: torch.Tensor = _computed("causal_conv1d_update", xs, conv_state, w, b, cache_seqlens, conv_state_indices, act)
    return y if x.dim() == 3 else y.squeeze(2)


def _computed(name: str, *args: Any) -> Any:
    """Computes one of the two by tconv's kernels, by the registered operator, or as a sequence of PyTorch's functions."""
    run, operator, by_torch = causal_ops.WAYS[name]
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    why = "torch.compile" if is_dynamo_compiling() else entry.why_not_directly(*tensors)
    if why is None:
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return operator(*args) if differentiable else run(*args)
    if (is_dynamo_compiling() or not taken_apart()) and entry.operators_run(*tensors):
        return operator(*args)
    if not is_dynamo_compiling():
        record_call(Call(name, None, None, why))
    return by_torch(*args)


def _check_filter(x: Any, w: Any, b: Any, activation: Any, dims: tuple[int, ...]) -> torch.Tensor:
    """Checks what both functions take, and returns the weight as (C, T). x may have so many dimensions."""
    for name, t in (("x", x), ("weight", w), ("bias", b)):
        if not (name == "bias" and t is None):
            require(isinstance(t, torch.Tensor), name, "be a tensor", type(t).__name__)
    require(x.dtype in DTYPES, "x", f"be of one of {DTYPES}", x.dtype)
    require(x.dim() in dims, "x", "have shape (N, C, L)" + " or (N, C)" * (2 in dims), tuple(x.shape))
    channels = x.shape[1]
    plain: torch.Tensor = w.squeeze(1) if w.dim() == 3 and w.shape[1] == 1 else w
    fits = plain.dim() == 2 and plain.shape[0] == channels and plain.shape[1] > 0
    require(fits, "weight", f"have shape ({channels}, taps) or ({channels}, 1, taps)", tuple(w.shape))
    require(
        b is None or tuple(b.shape) == (channels,), "bias", f"have shape ({channels},)", None if b is None else tuple(b.shape)
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("weight", w), ("bias", b)):
        if t is not None:
            require(t.dtype in (x.dtype, wide), name, f"be of x's dtype, {x.dtype}, or {wide}", t.dtype)
            require(t.device == x.device, name, f"be on x's device, {x.device}", t.device)
    require(activation in ACTIVATIONS, "activation", f"be one of {tuple(ACTIVATIONS)}", repr(activation))
    return plain


def _check_like(name: str, t: Any, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    require(isinstance(t, torch.Tensor), name, "be a tensor", type(t).__name__)
    require(tuple(t.shape) == shape, name, f"have shape {shape}", tuple(t.shape))
    require(t.dtype == x.dtype, name, f"be of x's dtype, {x.dtype}", t.dtype)
    require(t.device == x.device, name, f"be on x's device, {x.device}", t.device)


def _check_integers(name: str, t: Any, x: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    """Checks a tensor of 32- or 64-bit integers of this shape; by default of one dimension with two elements or more."""
    require(isinstance(t, torch.Tensor), name, "be a tensor", type(t).__name__)
    if shape is None:
        require(t.dim() == 1 and t.shape[0] > 1, name, "have shape (sequences + 1,)", tuple(t.shape))
    else:
        require(tuple(t.shape) == shape, name, f"have shape {shape}", tuple(t.shape))
    require(t.dtype in (torch.int32, torch.int64), name, "be of torch.int32 or torch.int64", t.dtype)
    require(t.device == x.device, name, f"be on x's device, {x.device}", t.device)
