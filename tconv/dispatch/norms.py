"""Group and RMS normalisation with an activation and padding, by tconv's kernels or as a sequence of PyTorch's functions.

A call is computed by kernels where these may run directly, and by a registered operator (norm_operator.py) in torch.compile, in
dispatch modes and for fake tensors. Under functorch's transforms, in forward-mode differentiation, and for what the kernels do
not take, PyTorch's functions compute it, and raise their errors. `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv.dispatch import entry
from tconv.dispatch.context import taken_apart
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.norm_calls import Asked, by_torch, check, flat, laid_out, normalisation, of_one_dtype
from tconv.dispatch.norm_operator import NORMALISE
from tconv.dispatch.sides import pairs
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call

# The two functions of tconv.functional, which put themselves here: torch.fx's graphs call them.
PUBLIC: dict[str, Callable[..., torch.Tensor]] = {}


def check_activation(activation: Any) -> None:
    """Raises ValueError for an activation that there is not."""
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def normalise(asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Computes a normalisation.

    Raises:
        ValueError: the activation or the padding does not fit.
        Whatever torch raises for the other arguments.
    """
    check_activation(asked.activation)
    for t in (x, w, b):
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b)
    sides = None
    if asked.pad is not None and isinstance(x, torch.Tensor):
        if x.dim() < 3:
            raise ValueError(f"pad must be None for an input without spatial dimensions, got {asked.pad!r}")
        sides = tuple(pairs(asked.pad, x.dim() - 2, "pad"))
    if is_dynamo_compiling():
        found = _by_operator(asked, sides, x, w, b)
        return by_torch(asked, sides, x, w, b) if found is None else found
    try:
        return _by_kernels(asked, sides, x, w, b)
    except Fallback as e:
        why = str(e)
    y = by_torch(asked, sides, x, w, b)  # outside `except`: the exception's frames hold memory
    record_call(Call(asked.operation, None, None, why))
    return y


def _traced(tracer: Any, asked: Asked, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Returns the proxy that torch.fx records: a call of the public function."""
    groups = () if asked.groups is None else (asked.groups,)
    given = (x, *groups, w, b, asked.eps, asked.activation, asked.pad)
    call: torch.Tensor = tracer.create_proxy("call_function", PUBLIC[asked.operation], given, {})
    return call


@opaque
def _by_kernels(asked: Asked, sides: Any, x: Any, w: Any, b: Any) -> torch.Tensor:
    """Computes a call by kernels.

    Raises:
        Fallback: it cannot, and nothing has been launched.
    """
    dry, why = DRY.get(), entry.why_not_directly(*[t for t in (x, w, b) if t is not None])
    if why:
        found = None if taken_apart() else _by_operator(asked, sides, x, w, b)
        if found is None:
            raise Fallback(why)
        return found
    w, b = flat(asked, x, w, b)
    n = normalisation(asked, sides, x, w, b)
    if dry:
        n = dataclasses.replace(n, dry=True, device=dry.device)
    from tconv.dispatch import normalised

    w, b = (None if t is None else t.contiguous() for t in of_one_dtype(x, w, b))
    return normalised.normalise(n, laid_out(x, n.channels_last), w, b)


def _by_operator(asked: Asked, sides: Any, x: Any, w: Any, b: Any) -> torch.Tensor | None:
    """Computes a call by tconv's registered operator. None if it must be computed as a sequence.

    torch.compile traces this function.
    """
    if not entry.operators_run(*[t for t in (x, w, b) if t is not None]):
        return None
    w, b = flat(asked, x, w, b)
    try:
        check(asked, x, w, b)
    except Fallback:
        return None
    before, after = ((0,) * (x.dim() - 2),) * 2 if sides is None else zip(*sides, strict=True)
    y: torch.Tensor = NORMALISE(
        x, *of_one_dtype(x, w, b), asked.groups or 0, float(asked.eps), asked.activation or "", before, after
    )[0]
    return y
