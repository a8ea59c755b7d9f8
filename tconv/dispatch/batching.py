"""vmap's rules for tconv's operators: a batch is folded into N, K, C or the groups of one call."""

from __future__ import annotations

from typing import Any

import torch

from tconv.dispatch.window import Window

# The axis that the batch is folded into, of the argument and of the result, each with whether groups divide that axis.
# FIRST and SECOND are for a batch of the first or second argument. In BOTH, the batch becomes more groups: the axes of the
# first argument, the second and the result.
FIRST = {"fprop": ((0, False), (0, False)), "dgrad": ((0, False), (0, False)), "wgrad": ((1, True), (0, True))}
SECOND = {"fprop": ((0, True), (1, True)), "dgrad": ((1, False), (1, True)), "wgrad": ((1, True), (1, False))}
BOTH = {"fprop": (1, 0, 1), "dgrad": (1, 0, 1), "wgrad": (1, 1, 0)}


def batched(name: str, operator: Any, info: Any, dims: Any, a: Any, b: Any, bias: Any, *rest: Any) -> tuple[torch.Tensor, int]:
    """Computes an operator over the batches of its arguments. Returns the result and its batch dimension.

    Args:
        name, operator: the operator.
        info, dims: what vmap tells: the batch's size, and each argument's batch dimension or None.
        a, b, bias, rest: the operator's arguments.
    """
    h, size = Window(*rest), info.batch_size
    if size == 0:  # compute one sample of zeros for its shape, and return none of it
        one = [t if d is None else t.sum(d) for t, d in zip((a, b, bias), dims[:3], strict=True)]
        return operator(*one, *h)[None, ...][:0], 0
    at_a, at_b, at_bias = dims[:3]
    inside = bias if at_bias is None and at_b is None else None
    axis, groups = 0, 1
    if at_a is not None and at_b is not None:
        axis_a, axis_b, axis = BOTH[name]
        a, b, h = _fold(a, at_a, axis_a, 1), _fold(b, at_b, axis_b, 1), h._replace(groups=h.groups * size)
    elif at_a is not None:
        (axis_a, divided), (axis, result) = FIRST[name]
        a, groups = _fold(a, at_a, axis_a, h.groups if divided else 1), h.groups if result else 1
    elif at_b is not None:
        (axis_b, divided), (axis, result) = SECOND[name]
        b, groups = _fold(b, at_b, axis_b, h.groups if divided else 1), h.groups if result else 1
    y = operator(a, b, inside, *h)
    if at_a is None and at_b is None:
        y = y.unsqueeze(0).expand(size, *y.shape)
    else:
        # `unflatten` has no types in torch.
        y = y.unflatten(axis, (groups, size, y.shape[axis] // (groups * size))).movedim(axis + 1, 0)  # type: ignore[no-untyped-call]  # untyped in torch
        y = y.flatten(axis + 1, axis + 2)
    if bias is not None and inside is None:
        shape = (1, bias.shape[0]) if at_bias is None else (size, 1, bias.shape[1 - at_bias])
        bias = bias if at_bias is None else bias.movedim(at_bias, 0)
        y = y + bias.reshape(*shape, *(1,) * (y.dim() - 3))
    return y, 0


def _fold(t: torch.Tensor, dim: int, axis: int, groups: int) -> torch.Tensor:
    """Folds the batch dimension `dim` of a tensor into `axis`, inside each group."""
    t = t.movedim(dim, 0)
    # `unflatten` has no types in torch.
    split: torch.Tensor = t.unflatten(axis + 1, (groups, t.shape[axis + 1] // groups))  # type: ignore[no-untyped-call]  # untyped in torch
    return split.movedim(0, axis + 1).flatten(axis, axis + 2)
