"""Causal depthwise convolutions of sequences, and their decode step, as state-space models use them.

tconv's kernels compute them where they may run directly. Elsewhere, and where gradients of gradients are wanted, they are a
sequence of PyTorch's functions; `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from tconv.dispatch import entry
from tconv.dispatch.autocast import without_autocast
from tconv.dispatch.check import require
from tconv.dispatch.context import PLAIN, why_ineligible
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.support import DTYPES
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.causal import TAPS

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
    given = x, w, b, initial_states, index, cu_seqlens, act, return_final_states
    if not is_dynamo_compiling():
        try:
            return _by_kernels(*given)
        except Fallback as e:
            why = str(e)
        record_call(Call("causal_conv1d", None, None, why))
    return by_torch(*given)


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
    if not is_dynamo_compiling():
        try:
            y = _step(xs, conv_state, w, b, act, cache_seqlens, conv_state_indices)
            return y if x.dim() == 3 else y.squeeze(2)
        except Fallback as e:
            why = str(e)
        record_call(Call("causal_conv1d_update", None, None, why))
    y = step_by_torch(xs, conv_state, w, b, act, cache_seqlens, conv_state_indices)
    return y if x.dim() == 3 else y.squeeze(2)


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


def _kernels(x: torch.Tensor, w: torch.Tensor, *more: MaybeTensor) -> Any:
    """Returns the module that launches the kernels.

    Raises:
        Fallback: they cannot run on these tensors here.
    """
    entry.check_context(x, w, *[t for t in more if t is not None])
    if not x.numel():
        raise Fallback("a tensor without elements")
    if w.shape[1] > TAPS:
        raise Fallback(f"{w.shape[1]} taps, more than {TAPS}")
    from tconv.launching import causal

    return causal


@opaque
def _by_kernels(
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    state: MaybeTensor,
    index: MaybeTensor,
    starts: MaybeTensor,
    activation: str,
    with_next: bool,
) -> tuple[torch.Tensor, MaybeTensor]:
    """Computes a call by tconv's kernels.

    Raises:
        Fallback: they cannot.
    """
    kernels = _kernels(x, w, b, state, index, starts)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b, state)):
        y, after = _Causal.apply(x, w, b, state, index, starts, activation, with_next)  # type: ignore[no-untyped-call]  # untyped in torch
        return y, after
    found: tuple[torch.Tensor, MaybeTensor] = kernels.forward(
        kernels.Sequences(x, w, b, state, index, starts, activation), with_next
    )
    return found


@opaque
def _step(
    x: torch.Tensor,
    state: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    activation: str,
    seen: MaybeTensor,
    slots: MaybeTensor,
) -> torch.Tensor:
    kernels = _kernels(x, w, b, state, seen, slots)
    y: torch.Tensor = kernels.step(kernels.Sequences(x, w, b, state, None, None, activation), seen, slots)
    return y


class _Causal(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        b: MaybeTensor,
        state: MaybeTensor,
        index: MaybeTensor,
        starts: MaybeTensor,
        activation: str,
        with_next: bool,
    ) -> tuple[torch.Tensor, MaybeTensor]:
        from tconv.launching import causal as kernels

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, b, state, index, starts)
        ctx.activation, ctx.with_next = activation, with_next
        found: tuple[torch.Tensor, MaybeTensor] = kernels.forward(
            kernels.Sequences(x, w, b, state, index, starts, activation), with_next
        )
        return found

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, dnext: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # two gradients, not any number
        saved = ctx.saved_tensors  # read once, as checkpoints want it; it raises if they were edited in place
        needs, nothing = ctx.needs_input_grad[:4], (None,) * 4
        if dy is None and dnext is None:
            return (None,) * 8
        given = [t for t in (dy, dnext) if t is not None]
        if not (torch.is_grad_enabled() or any(type(t) not in PLAIN for t in given) or why_ineligible(*saved[:2], *given)):
            try:
                return *_gradients_by_kernels(ctx, saved, dy, dnext, needs), *nothing
            except Fallback as e:
                record_call(Call("causal_conv1d gradient", None, None, str(e)))
        return *_gradients_by_torch(ctx, saved, dy, dnext, needs), *nothing


def _gradients_by_kernels(
    ctx: Any, saved: Any, dy: MaybeTensor, dnext: MaybeTensor, needs: tuple[bool, ...]
) -> list[MaybeTensor]:
    """Returns the gradients of x, w, b and the states.

    Raises:
        Fallback: a kernel cannot be launched.
    """
    from tconv.launching import causal as kernels

    x, w, b, state, index, starts = saved
    s = kernels.Sequences(x, w, b, state, index, starts, ctx.activation)
    du = dy = kernels.laid_out(torch.zeros_like(x) if dy is None else dy, x)
    dx = dw = db = dstate = None
    if needs[1] or needs[2] or ctx.activation:
        du, dw, db = kernels.weight_gradients(s, dy)
        dw = dw.to(w.dtype) if needs[1] else None
        db = db.to(b.dtype) if b is not None and needs[2] else None
    if needs[0] or needs[3]:
        dx, dstate = kernels.input_gradients(s, du, dnext, needs[3])
    return [dx if needs[0] else None, dw, db, dstate]


def _gradients_by_torch(
    ctx: Any, saved: Any, dy: MaybeTensor, dnext: MaybeTensor, needs: tuple[bool, ...]
) -> list[MaybeTensor]:
    """Returns the gradients of x, w, b and the states, differentiable themselves, of the same computed by torch's functions."""
    *leaves, index, starts = saved
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one of them may have been computed from another, and what they were computed from is not followed.
        x, w, b, state = leaves = [t if t is None else t.view_as(t) for t in leaves]
        y, after = by_torch(x, w, b, state, index, starts, ctx.activation, ctx.with_next)
        pairs = [(out, g) for out, g in ((y, dy), (after, dnext)) if out is not None and g is not None]
        wanted = [t for t, needed in zip(leaves, needs, strict=True) if needed]
        outs, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, gs, create_graph=again, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


def by_torch(
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    state: MaybeTensor,
    index: MaybeTensor,
    starts: MaybeTensor,
    activation: str,
    with_next: bool,
) -> tuple[torch.Tensor, MaybeTensor]:
    """Returns y and the next states, or None, by a sequence of PyTorch's functions."""
    taps, wide = w.shape[1], torch.promote_types(w.dtype, torch.float32)
    n, channels, times = x.shape
    if index is None:
        held = x.new_zeros(n, channels, taps - 1) if state is None else state
        xs = torch.cat((held, x), 2)
        y = _conv1d(xs.to(wide), w, b).to(wide) if times else xs[:, :, :0].to(wide)
    else:
        if starts is not None:
            known = index < starts.shape[0] - 1
            at = index.clamp(max=starts.shape[0] - 2)
            within = torch.arange(times, device=x.device) - starts[at]
        y = x.new_zeros(x.shape, dtype=wide)
        for t in range(taps):
            back = taps - 1 - t
            shifted, same = x, None
            if back:
                shifted = F.pad(x, (back, 0))[..., :times]
                same = F.pad(index, (back, 0), value=-1)[..., :times] == index
                shifted = torch.where(same[:, None], shifted, 0.0)
            if same is not None and state is not None:
                i = within + t
                before = state.movedim(1, 2)[at, i.clamp(0, taps - 2)].movedim(1, 2)  # [1, C, L]
                shifted = torch.where((known & (i < taps - 1) & ~same)[:, None], before, shifted)
            y = y + shifted.to(wide) * w[:, t, None].to(wide)
        y = y if b is None else y + b[:, None].to(wide)
    y = (F.silu(y) if activation else y).to(x.dtype)
    if not with_next:
        return y, None
    if starts is None:
        return y, torch.cat((x.new_zeros(n, channels, taps - 1) if state is None else state, x), 2)[..., times:].clone()
    i = torch.arange(taps - 1, device=x.device)
    at = starts[1:, None] - (taps - 1) + i  # [sequences, T - 1]
    own = at >= starts[:-1, None]
    after = x[0].t()[at.clamp(0, max(times - 1, 0))].movedim(1, 2)
    held = x.new_zeros(1) if state is None else state.gather(
        2, (at - starts[:-1, None] + taps - 1).clamp(0, max(taps - 2, 0))[:, None].expand(state.shape)
    )  # fmt: skip
    return y, torch.where(own[:, None], after, held)


def _conv1d(x: torch.Tensor, w: torch.Tensor, b: MaybeTensor) -> torch.Tensor:
    with contextlib.nullcontext() if is_dynamo_compiling() else without_autocast(x.device.type):
        w = w.to(x.dtype).unsqueeze(1)
        y: torch.Tensor = F.conv1d(x, w, None if b is None else b.to(x.dtype), groups=x.shape[1])
    return y


def step_by_torch(
    x: torch.Tensor,
    state: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    activation: str,
    seen: MaybeTensor,
    slots: MaybeTensor,
) -> torch.Tensor:
    """Returns y, and changes the states in place, by a sequence of PyTorch's functions."""
    wide = torch.promote_types(w.dtype, torch.float32)
    (n, channels, times), taps, held = x.shape, w.shape[1], state.shape[2]
    own = torch.arange(n, device=x.device) if slots is None else slots.long()
    there = own >= 0
    own = own.clamp(min=0)
    old = torch.where(there[:, None, None], state[own], 0.0)
    if seen is None:
        xs = torch.cat((old, x), 2)
        new, xs = xs[..., times:], xs[..., held - (taps - 1) :]
    else:
        i = (torch.arange(1 - taps, 0, device=x.device) + seen[:, None]) % held
        xs = torch.cat((old.gather(2, i[:, None].expand(n, channels, taps - 1)), x), 2)
        last = times - 1 - (seen[:, None] + times - 1 - torch.arange(held, device=x.device)) % held
        fresh = x.gather(2, last.clamp(min=0)[:, None].expand(n, channels, held))
        new = torch.where((last >= 0)[:, None], fresh, old)
    y = _conv1d(xs.to(wide), w, b)
    y = torch.where(there[:, None, None], F.silu(y) if activation else y, 0.0).to(x.dtype)
    if slots is None:
        state.copy_(new)
    else:
        state[own[there]] = new[there]
    return y
