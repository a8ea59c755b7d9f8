"""Says how a layer would be run, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tconv.launching.record import Call, last_calls
from tconv.rehearsal.runner import check_callable, rehearse

NONE = "no call of tconv: make the layers tconv's by replace_, or all convolutions on a GPU by enable()"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: one `Call` per pass, or per call that falls back to torch. Printing it gives a line each.

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

    The layer's Python code runs, but no kernel of tconv's is launched: results of convolutions are left unset. The code sees
    stand-ins for the tensors of the layer and of its inputs, and what it changes is set back: buffers, attributes, random
    numbers, lazy layers (docs/explain.md). The backward pass starts from every tensor of the result that has a gradient.
    Torch's own convolutions are explained too while `enable()` holds. `last_calls` and `recording` do not see any of it.

    Args:
        layer: a module or a function such as `tconv.functional.conv2d`; None for what the last calls used.
        args, kwargs: its inputs, in containers and objects of any kind. Floating tensors among them ask for their gradients
            as if they had `requires_grad`; a Parameter only if it has.
    Returns:
        An `Explanation`; its text has one line per pass.
    Raises:
        TypeError: a layer that is neither a module nor a function. What the layer itself raises comes as it is.

    Example:
        >>> import torch, tconv
        >>> print(tconv.explain(tconv.Conv2d(3, 8, 3, device="meta"), torch.empty(1, 3, 8, 8, device="meta")))
        conv2d: torch (device meta)
    """
    if layer is None and not args and not kwargs:
        return Explanation(last_calls())
    check_callable("explain", "layer", layer)
    return Explanation(tuple(rehearse(layer, args, kwargs)))  # type: ignore[arg-type]
