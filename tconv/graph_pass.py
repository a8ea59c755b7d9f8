"""A pass over torch.compile's graphs that puts what follows a convolution into its kernel.

From each of tconv's operators `fprop` and `dgrad` it walks on as long as a result has one user and that is a step of an
epilogue: a product or sum per channel, as of a batch norm in evaluation, a residual, an activation. It finds activations as
aten's operators and as Inductor takes them apart, since its patterns are PyTorch's own functions, traced in both ways.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tconv.dispatch.fused_operator import FUSED, How
from tconv.dispatch.operators import OPERATORS
from tconv.dispatch.steps import SEQUENCE

if TYPE_CHECKING:
    from torch.fx.passes.utils.matcher_utils import InternalMatch

aten, prims = torch.ops.aten, torch.ops.prims
SLOPE = 0.3  # stands in a pattern for any slope of leaky_relu
KINDS: dict[Any, str] = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul"}
CASTS = (prims.convert_element_type.default, aten._to_copy.default)


def compile_options(stepwise: bool = False) -> dict[str, Any]:
    """Returns options for torch.compile, with which Inductor puts what follows a convolution into its kernel.

    Args:
        stepwise: as in `fuse_epilogues`.

    Example:
        >>> compiled = torch.compile(torch.nn.ReLU(), options=compile_options())
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        """Has an identity, by which Inductor's cache tells graphs with it from graphs without it."""

        def __call__(self, graph: Graph) -> None:
            fuse_epilogues(graph, stepwise)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,), str(stepwise))

    return {"post_grad_custom_pre_pass": Pass()}


def fuse_epilogues(graph: Graph, stepwise: bool = False) -> int:
    """Replaces convolutions with what follows them by calls of `torch.ops.tconv.fused`, in place.

    Args:
        graph: of aten's operators, functional, with fake tensors in its nodes' metadata, as a compiler of AOTAutograd gets it.
        stepwise: whether each step rounds to the result's dtype, as it does in the graph. By default the result is rounded
            once.
    Returns:
        The number of convolutions that were replaced.
    """
    convolutions = [n for n in graph.nodes if n.target in (OPERATORS["fprop"], OPERATORS["dgrad"]) and "val" in n.meta]
    activations = _activations(graph, {dtype for n in convolutions for dtype in _dtypes(n.meta["val"].dtype)})
    replaced = sum([_fuse(graph, node, activations, stepwise) for node in convolutions])
    if replaced:
        graph.eliminate_dead_code()
    return replaced


# Activations


@dataclasses.dataclass(frozen=True)
class _Activation:
    name: str
    slope: float
    end: Node


@functools.cache
def _patterns(dtype: torch.dtype) -> tuple[tuple[str, Graph], ...]:
    """Returns the activations' names and graphs for a dtype, whole and taken apart."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_any_slope(f: Callable[[torch.Tensor, float], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: f(v, SLOPE)

    functions = [(name, of_any_slope(f)) for name, f in SEQUENCE.items()]
    functions += [("leaky_relu", lambda v: F.leaky_relu(v)), ("silu", lambda v: v * torch.sigmoid(v))]
    found = {}
    for name, function in functions:
        for table in ({}, select_decomp_table()):
            with torch.no_grad():
                traced = make_fx(function, decomposition_table=table)(torch.empty(2, 3, dtype=dtype))
            found[traced.code] = name, traced.graph
    return tuple(found.values())


def _activations(graph: Graph, dtypes: set[torch.dtype]) -> dict[Node, _Activation]:
    """Returns the activations in a graph by their arguments, of those that have no other user."""
    from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

    found = {}
    for dtype in dtypes:
        for name, pattern in _patterns(dtype):
            matcher = SubgraphMatcher(pattern, remove_overlapping_matches=False, ignore_literals=True)
            for match in matcher.match(graph):
                (argument,), slope = match.placeholder_nodes, _slope(match)
                alone = set(argument.users) <= {*match.nodes_map.values()}
                if slope is not None and alone and getattr(argument.meta.get("val"), "dtype", None) is dtype:
                    found[argument] = _Activation(name, slope if name == "leaky_relu" else 0.0, match.returning_nodes[0])
    return found


def _slope(match: InternalMatch) -> float | None:
    """Returns the slope of a match whose literals are the pattern's, that of leaky_relu by default; else None."""
    slope = 0.01
    for ours, theirs in match.nodes_map.items():
        mine, others = (*ours.args, *ours.kwargs.values()), (*theirs.args, *theirs.kwargs.values())
        if ours.op != "placeholder" and len(mine) != len(others):  # a default that only one of them has written down
            return None
        for a, b in zip(mine, others, strict=False):
            if isinstance(a, Node) and isinstance(b, Node):
                continue
            if a == SLOPE and isinstance(b, (int, float)):
                slope = float(b)
            elif a != b:
                return None
    return slope


# Chains


@dataclasses.dataclass
class _Chain:
    """What follows a convolution. `factors` has the products and sums per channel, in their order."""

    end: Node
    factors: tuple[tuple[str, Node], ...] = ()
    residual: Node | None = None
    position: str = "before"
    activation: str = ""
    slope: float = 0.0


def _fuse(graph: Graph, node: Node, activations: dict[Node, _Activation], stepwise: bool) -> bool:
    """Replaces one convolution and what follows it. Returns False if nothing follows that its kernel can do."""
    chain = _followed(node, activations)
    if chain.end is node or node.kwargs:
        return False
    value = node.meta["val"]

    def emit(target: Any, *args: Any) -> Node:
        new = graph.call_function(target, args)
        new.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
        return new

    scale: Node | None = None
    shift: Node | None = None
    with graph.inserting_before(chain.end), torch.no_grad():
        for kind, factor in chain.factors:
            t = emit(aten.reshape.default, factor, [-1])
            if len(chain.factors) > 1:
                t = emit(prims.convert_element_type.default, t, torch.promote_types(value.dtype, torch.float32))
            if kind == "mul":
                scale = t if scale is None else emit(aten.mul.Tensor, scale, t)
                shift = None if shift is None else emit(aten.mul.Tensor, shift, t)
            else:
                t = emit(aten.neg.default, t) if kind == "sub" else t
                shift = t if shift is None else emit(aten.add.Tensor, shift, t)
        how = How(chain.activation, chain.slope, chain.position, stepwise, False, node.target is OPERATORS["dgrad"])
        y = emit(operator.getitem, emit(FUSED, *node.args[:3], chain.residual, scale, shift, *how, *node.args[3:]), 0)
    chain.end.replace_all_uses_with(y)
    return True


def _followed(node: Node, activations: dict[Node, _Activation]) -> _Chain:
    """Returns the longest chain after a convolution that has a result of the same dtype, shape and strides."""
    chain = longest = _Chain(node)
    while True:
        found = _step(chain, node.meta["val"], activations)
        if found is None:
            return longest
        chain = found
        if _alike(chain.end.meta["val"], node.meta["val"]):
            longest = chain


def _step(chain: _Chain, value: torch.Tensor, activations: dict[Node, _Activation]) -> _Chain | None:
    """Returns the chain with the step that follows it, or None if no step of an epilogue does.

    Args:
        value: the convolution's result.
    """
    v = chain.end
    if v in activations and not chain.activation:
        found = activations[v]
        return dataclasses.replace(chain, end=found.end, activation=found.name, slope=found.slope)
    user = next(iter(v.users), None)
    if user is None or len(v.users) > 1 or not isinstance(user.meta.get("val"), torch.Tensor):
        return None
    result = user.meta["val"]
    if not _same(result.shape, value.shape) or result.dtype not in _dtypes(value.dtype) or result.device != value.device:
        return None
    if user.target in CASTS:
        return dataclasses.replace(chain, end=user)
    kind = KINDS.get(user.target)
    if kind is None or user.kwargs or len(user.args) != 2 or (kind == "sub" and user.args[0] is not v):
        return None
    other = user.args[1] if user.args[0] is v else user.args[0]
    if not isinstance(other, Node) or other is v:
        return None
    t = other.meta["val"]
    if not (chain.residual or chain.activation) and t.dtype in _dtypes(value.dtype) and _per_channel(t.shape, value.shape):
        return dataclasses.replace(chain, end=user, factors=(*chain.factors, (kind, other)))
    if other.target in CASTS and t.dtype in _dtypes(value.dtype):
        (narrow,) = other.all_input_nodes
        if (narrow.meta["val"].dtype, narrow.meta["val"].device) == (value.dtype, value.device):
            other, t = narrow, narrow.meta["val"]  # the kernel widens it itself
    if kind == "add" and chain.residual is None and t.dtype == value.dtype and _same(t.shape, value.shape):
        return dataclasses.replace(chain, end=user, residual=other, position="after" if chain.activation else "before")
    return None


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtypes that a number of an epilogue may have."""
    return dtype, torch.promote_types(dtype, torch.float32)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # and sympy with it

    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and _same(a.shape, b.shape) and _same(a.stride(), b.stride())


def _per_channel(shape: Sequence[Any], result: Sequence[Any]) -> bool:
    """Returns True if a tensor of this shape has a number for each channel of a result (N, C, *spatial), broadcast to it."""
    wanted = [1] * len(result)
    wanted[1] = result[1]
    return len(result) - 1 <= len(shape) <= len(result) and _same(shape, wanted[-len(shape) :])
