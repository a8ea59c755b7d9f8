"""Causal depthwise convolutions of sequences, their gradients and their decode step by PyTorch's functions, which can be
differentiated.

Arguments, here and in causal_ops.py:
    x: [N, C, L].
    w, b: [C, T], and [C] or None.
    state: [sequences, C, T - 1], or None for zeros; in `update` [slots, C, H].
    index: [N, L], the sequence that each time belongs to; None if each image is a sequence.
    starts: [sequences + 1], the first time of each sequence and the end; None if no state is asked for.
    activation: of planning/epilogue.py, or empty.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from tconv.dispatch.autocast import without_autocast
from tconv.dispatch.chain_rule import argument_gradient
from tconv.planning.epilogue import Epilogue

MaybeTensor = torch.Tensor | None


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    state: MaybeTensor,
    index: MaybeTensor,
    starts: MaybeTensor,
    activation: str,
    with_next: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y, and the next states or an empty tensor."""
    u = _argument(x, w, b, state, index, starts)
    y = (F.silu(u) if activation else u).to(x.dtype)
    (n, channels, times), taps = x.shape, w.shape[1]
    if not with_next:
        return y, x.new_empty(0)
    if starts is None:
        return y, torch.cat((x.new_zeros(n, channels, taps - 1) if state is None else state, x), 2)[..., times:].clone()
    at, own, held = _tails(starts, taps)
    after = x[0].t()[at.clamp(0, max(times - 1, 0))].movedim(1, 2)
    before = x.new_zeros(1) if state is None else state.gather(2, held[:, None].expand(state.shape))
    return y, torch.where(own[:, None], after, before)


def _argument(
    x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, state: MaybeTensor, index: MaybeTensor, starts: MaybeTensor
) -> torch.Tensor:
    """Returns the activation's argument, in fp32 or fp64."""
    wide = torch.promote_types(w.dtype, torch.float32)
    if index is None:
        held = x.new_zeros(*x.shape[:2], w.shape[1] - 1) if state is None else state
        xs = torch.cat((held, x), 2)
        return _conv1d(xs.to(wide), w, b).to(wide) if x.shape[2] else xs[:, :, :0].to(wide)
    y = x.new_zeros(x.shape, dtype=wide)
    for t, read in enumerate(_reads(x, w.shape[1], state, index, starts)):
        y = y + read.to(wide) * w[:, t, None].to(wide)
    return y if b is None else y + b[:, None].to(wide)


def _reads(x: torch.Tensor, taps: int, state: MaybeTensor, index: MaybeTensor, starts: MaybeTensor) -> list[torch.Tensor]:
    """Returns what each tap reads, as (N, C, L)."""
    times = x.shape[2]
    if index is None:
        xs = torch.cat((x.new_zeros(*x.shape[:2], taps - 1) if state is None else state, x), 2)
        return [xs[:, :, t : t + times] for t in range(taps)]
    found = []
    for t in range(taps):
        read, same = F.pad(x, (taps - 1 - t, 0))[..., :times], _same(index, taps - 1 - t)
        read = torch.where(same[:, None], read, 0.0)
        if state is not None and starts is not None:
            at, i, there = _in_state(index, starts, taps, t)
            read = torch.where(there[:, None], state.movedim(1, 2)[at, i].movedim(2, 1), read)
        found.append(read)
    return found


def _same(index: torch.Tensor, back: int) -> torch.Tensor:
    """Returns whether the time so much earlier belongs to the same sequence, as (N, L)."""
    return F.pad(index, (back, 0), value=-1)[..., : index.shape[1]] == index


def _in_state(index: torch.Tensor, starts: torch.Tensor, taps: int, t: int) -> tuple[torch.Tensor, ...]:
    """Returns (sequence, element of its state, whether that is what tap t reads) of each time."""
    at = index.clamp(max=starts.shape[0] - 2)
    i = torch.arange(index.shape[1], device=index.device) - starts[at] + t
    return at, i.clamp(0, max(taps - 2, 0)), (index < starts.shape[0] - 1) & (i < taps - 1)


def _tails(starts: torch.Tensor, taps: int) -> tuple[torch.Tensor, ...]:
    """Returns, for each element of each sequence's next state, the time at which it is in x, whether it is there, and the
    element of the state that it is otherwise.
    """
    at = starts[1:, None] - (taps - 1) + torch.arange(taps - 1, device=starts.device)
    return at, at >= starts[:-1, None], (at - starts[:-1, None] + taps - 1).clamp(0, max(taps - 2, 0))


def _conv1d(x: torch.Tensor, w: torch.Tensor, b: MaybeTensor) -> torch.Tensor:
    with contextlib.nullcontext() if is_dynamo_compiling() else without_autocast(x.device.type):
        w = w.to(x.dtype).unsqueeze(1)
        y: torch.Tensor = F.conv1d(x, w, None if b is None else b.to(x.dtype), groups=x.shape[1])
    return y


def update(
    x: torch.Tensor,
    state: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    seen: MaybeTensor,
    slots: MaybeTensor,
    activation: str,
) -> torch.Tensor:
    """Returns y of a decode step, and changes the states in place."""
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


def gradients(
    dy: MaybeTensor,
    dnext: MaybeTensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    state: MaybeTensor,
    index: MaybeTensor,
    starts: MaybeTensor,
    activation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of x, w, b and the states; empty tensors for those that are not needed."""
    (_, channels, times), taps = x.shape, w.shape[1]
    wide = torch.promote_types(w.dtype, torch.float32)
    du = x.new_zeros(x.shape, dtype=wide) if dy is None else dy.to(wide)
    if activation:
        du = argument_gradient(Epilogue(activation), du, None, _argument(x, w, b, state, index, starts))
    by_tap = [du * w[:, t, None].to(wide) for t in range(taps)]
    if index is None:  # of (state, x), which the taps read one element apart
        dxs = functools.reduce(torch.add, [F.pad(g, (t, taps - 1 - t)) for t, g in enumerate(by_tap)])
        dxs = dxs if dnext is None else dxs + F.pad(dnext.to(wide), (times, 0))
        dstate, dx = dxs[..., : taps - 1], dxs[..., taps - 1 :]
    else:
        count = 0 if starts is None else starts.shape[0] - 1
        dx, dstate = du.new_zeros(x.shape), du.new_zeros(count, taps - 1, channels)
        for t, g in enumerate(by_tap):
            same, back = _same(index, taps - 1 - t), taps - 1 - t
            dx = dx + F.pad(torch.where(same[:, None], g, 0.0)[..., back:], (0, min(back, times)))
            if state is not None and starts is not None:
                at, i, there = _in_state(index, starts, taps, t)
                dstate = dstate.index_put((at, i), torch.where(there[:, None], g, 0.0).movedim(1, 2), accumulate=True)
        if dnext is not None and starts is not None:
            at, own, held = _tails(starts, taps)
            after, rows = dnext.to(wide).movedim(1, 2), torch.arange(count, device=x.device)[:, None]
            into = torch.where(own[..., None], after, 0.0)
            dx = dx + du.new_zeros(times, channels).index_put((at.clamp(0, times - 1),), into, accumulate=True).t()
            dstate = dstate.index_put((rows, held), torch.where(own[..., None], 0.0, after), accumulate=True)
        dstate = dstate.movedim(1, 2)
    nothing = x.new_empty(0)
    return (
        dx.to(x.dtype) if needs[0] else nothing,
        torch.stack([(du * read.to(wide)).sum((0, 2)) for read in _reads(x, taps, state, index, starts)], 1).to(w.dtype)
        if needs[1]
        else nothing.clone(),
        du.sum((0, 2)).to(b.dtype) if b is not None and needs[2] else nothing.clone(),
        dstate.to(x.dtype) if needs[3] else nothing.clone(),
    )
