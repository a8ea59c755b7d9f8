"""Says how a layer would be run, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tconv.functional import dry_run
from tconv.record import Call, last_calls, recording


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
        return "\n".join(map(str, self.calls)) or "no call of tconv"


def explain(layer: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel, tiles and reason a layer gets for an input, forward and backward; without arguments, the last calls.

    The layer's Python code runs once, with gradients, but no kernel of tconv's is launched and no gradient accumulated:
    explain single layers or small functions rather than models with state.

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
    leaves = [a.detach().requires_grad_() if _real(a) else a for a in args]
    parameters = list(layer.parameters()) if isinstance(layer, torch.nn.Module) else []
    with recording() as calls, torch.enable_grad(), dry_run():
        y = layer(*leaves, **kwargs)
        wanted = [t for t in (*leaves, *kwargs.values(), *parameters) if isinstance(t, torch.Tensor) and t.requires_grad]
        if isinstance(y, torch.Tensor) and y.requires_grad and any(call.ours for call in calls):
            torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
    return Explanation(tuple(calls))


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
