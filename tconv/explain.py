"""Says how a layer would be run, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tconv.dry import dry_run
from tconv.record import Call, last_calls, recording

NONE = "no call of tconv: make the layers tconv's by replace_, or all convolutions on a GPU by enable()"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: one `Call` per pass, or per call left to torch. Printing it gives a line each.

    Attributes:
        calls: in the order in which they were, or would be, made.
    """

    calls: tuple[Call, ...]

    @property
    def ours(self) -> bool:
        """Whether tconv's kernels take every call."""
        return bool(self.calls) and all(call.ours for call in self.calls)

    def __str__(self) -> str:
        return "\n".join(line for call in self.calls for line in _lines(call)) or NONE


def _lines(call: Call) -> list[str]:
    """A call, and which plans were left out for want of having run on hardware."""
    unproven = [plan for plan in call.plan.others if plan.unproven] if call.plan else []
    return [str(call), *(f"    {plan}" for plan in unproven)]


def explain(layer: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel, tiles and reason a layer gets for an input, forward and backward; without arguments, the last calls.

    The layer's Python code runs once, with gradients, but no kernel of tconv's is launched and no gradient accumulated.
    Results are left unset; buffers that it changes, such as a batch norm's statistics, are copies. Torch's own convolutions
    are explained too while `enable()` holds.

    Args:
        layer: a module or a function such as `tconv.functional.conv2d`; None for what the last calls used.
        args, kwargs: its inputs.
    Returns:
        An `Explanation`; its text has one line per pass.

    Example:
        >>> import tconv
        >>> print(tconv.explain(tconv.Conv2d(3, 8, 3, device="meta"), torch.empty(1, 3, 8, 8, device="meta")))
        conv2d: torch (device meta)
    """
    if layer is None:
        return Explanation(last_calls())
    with recording() as calls, torch.inference_mode(False), torch.enable_grad(), dry_run():
        leaves = [_leaf(a) for a in args]
        named = {k: _leaf(v) for k, v in kwargs.items()}
        parameters: dict[str, torch.Tensor] = dict(layer.named_parameters()) if isinstance(layer, torch.nn.Module) else {}
        if any(map(is_lazy, parameters.values())) or not isinstance(layer, torch.nn.Module):
            y = layer(*leaves, **named)
        else:  # with stand-ins for its parameters: nobody's hooks run
            parameters = {k: _leaf(p) if p.requires_grad else p.detach() for k, p in parameters.items()}
            buffers = {k: b.detach().clone() for k, b in layer.named_buffers()}
            y = torch.func.functional_call(layer, {**parameters, **buffers}, tuple(leaves), named)
        wanted = [t for t in (*leaves, *named.values(), *parameters.values()) if _real(t) and t.requires_grad]
        if _real(y) and y.requires_grad and any(call.ours for call in calls):
            torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
    return Explanation(tuple(calls))


def _leaf(value: Any) -> Any:
    """A stand-in for a floating tensor that asks for a gradient; other values as they are."""
    if not _real(value):
        return value
    return (value.clone() if value.is_inference() else value).detach().requires_grad_()


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
