"""Which operations compute the gradients of an operation, and which gradients a running backward pass needs.

operation        gradient of its first argument   of its second
fprop(x, w)      dgrad(g, w)                      wgrad(g, x)
dgrad(dy, w)     fprop(g, w)                      wgrad(dy, g)
wgrad(dy, x)     fprop(x, g)                      dgrad(dy, g)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # a leaf's autograd node
_pass_for_leaves = -2  # id of the last backward pass seen to ask for a leaf's gradient; -1 is the id outside of any pass


def gradients(op: Any, name: str, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, needs: Sequence[bool]) -> tuple[Any, ...]:
    """Returns the gradients of an operation's arguments a, b and bias, None for those not needed.

    Args:
        op: computes them, an `Operators` for example. Its `wgrad` is also given the weight, whose strides decide the memory
            format of dw where two formats have the same strides.
        name: the operation.
        g: gradient of its result.
        a, b: its operands.
        needs: which of the three gradients are needed.
    """
    need_a, need_b, need_bias = needs
    da = db = None
    if name == "fprop":
        da, db = op.dgrad(g, b) if need_a else None, op.wgrad(g, a, b) if need_b else None
    elif name == "dgrad":
        da, db = op.fprop(g, b) if need_a else None, op.wgrad(a, g, b) if need_b else None
    else:
        da, db = op.fprop(b, g) if need_a else None, op.dgrad(a, g) if need_b else None
    return da, db, op.bias_grad(g) if need_bias else None


def wanted(ctx: Any, needs: Sequence[bool], given: Sequence[bool] | None = None) -> tuple[bool, ...]:
    """Returns which gradients the running backward pass needs, of those that the forward pass expected.

    torch.autograd.grad(y, x), for example, does not need the weight's. The autograd engine knows, but it raises an exception
    for a leaf whose gradient is asked for, which takes longer than a launch. So after one such exception this assumes that
    the pass needs the gradients of all leaves.

    Args:
        needs: ctx.needs_input_grad of the tensors among the arguments, from the first one on.
        given: which of them are tensors, where one that is None stands before one that is not: None has no autograd node.
    """
    if is_dynamo_compiling():
        return tuple(needs)
    nodes, found = ctx.next_functions, [*needs]
    places = range(len(found)) if given is None else [*itertools.accumulate(given, initial=0)]
    # The input is asked about last: if it is the only leaf asked for, its exception must not make the others count as needed.
    for i in reversed(range(len(found))):
        found[i] = found[i] and _executes(nodes[places[i]][0])
    return tuple(found)


def _executes(node: Any) -> bool:
    global _pass_for_leaves
    task = torch._C._current_graph_task_id()
    if task == _pass_for_leaves and type(node) is ACCUMULATE:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        _pass_for_leaves = task
        return True
