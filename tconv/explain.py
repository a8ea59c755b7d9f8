"""`explain`: tells which kernels a layer would launch, without launching them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tconv.launching.record import Call, last_calls
from tconv.rehearsal.runner import check_callable, rehearse

NONE = "no call of tconv: make the layers tconv's by replace_, or all convolutions on a GPU by enable()"


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`: one `Call` per pass, or per call that falls back to torch. It prints one line for each.

    Attributes:
        calls: in the order in which they were, or would be, made.
    """

    calls: tuple[Call, ...]

    @property
    def ours(self) -> bool:
        """True if there are calls and tconv's kernels compute all of them."""
        return bool(self.calls) and all(call.ours for call in self.calls)

    def __str__(self) -> str:
        return "\n".join(line for call in self.calls for line in _lines(call)) or NONE


def _lines(call: Call) -> list[str]:
    """Returns a line for a call, and one for each faster plan not chosen because its mechanism does not work on the device."""
    barred = [plan for plan in call.plan.others if plan.reason.startswith("not chosen")] if call.plan else []
    return [f"{call}{_standing(call)}", *(f"    {plan}" for plan in barred)]


def _standing(call: Call) -> str:
    """Returns how the mechanisms stand that a plan needs beyond plain kernels, to be put behind its line."""
    mechanisms = call.plan.mechanisms if call.plan else ()
    if not mechanisms:
        return ""
    from tconv.launching.self_check import standing

    return "".join(f"; {mechanism} is {standing(mechanism)}" for mechanism in mechanisms)


def explain(layer: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Explanation:
    """Returns the plan of every pass of a layer for given inputs, forward and backward, and why it was chosen.

    The layer's Python code runs, but tconv launches no kernel: results of convolutions are uninitialized. The code sees
    stand-ins for the tensors of the layer and its inputs. Whatever it changes is restored: buffers, attributes, random number
    generators, lazy layers (docs/explain.md). The backward pass starts from every tensor in the result that has a gradient.
    While `enable()` is active, torch's own convolutions are explained too. `last_calls` and `recording` see none of this.

    Args:
        layer: a module, or a function such as `tconv.functional.conv2d`. Without any arguments, the last calls are explained.
        args, kwargs: its inputs, in containers and objects of any kind. Floating-point tensors among them are treated as if
            they had `requires_grad`; a Parameter only if it has.
    Returns:
        An `Explanation`; its text has one line per pass.
    Raises:
        TypeError: the layer is neither a module nor a function. Errors of the layer itself are passed on.

    Example:
        >>> import torch, tconv
        >>> print(tconv.explain(tconv.Conv2d(3, 8, 3, device="meta"), torch.empty(1, 3, 8, 8, device="meta")))
        conv2d: torch (device meta)
    """
    if layer is None and not args and not kwargs:
        return Explanation(last_calls())
    check_callable("explain", "layer", layer)
    return Explanation(tuple(rehearse(layer, args, kwargs)))  # type: ignore[arg-type]  # check_callable has refused None
