"""Finds the chains in a module's `forward` by torch.fx, and writes a forward that calls `chain.chained` for each.

Modules are traced one by one: what a module calls stays a call. So hooks, modes and classes of the modules inside keep their
meaning, and a model of which a part cannot be traced is fused in the others. A module inside is traced into only if a chain
begins in it and ends outside, such as a padded convolution before the addition of a residual.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import linecache
import operator
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from tconv.chain import (
    ACTIVATIONS,
    NORMS,
    OTHER_NUMBERS,
    PADS,
    Activation,
    Unfit,
    chained,
    fit_activation,
    fit_conv,
    fit_norm,
    fit_padding,
    norm_act,
    unhooked,
)
from tconv.rehearsal.state import Place, exchanged, reach

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
TENSOR = object()  # stands for a tensor among the arguments of a call
CONSTANTS = (types.NoneType, bool, int, float, str, torch.dtype, torch.device)
INSIDE = "tconv_inside"  # in a node's meta: the modules traced into that it came from
ADDS = {operator.add: False, operator.iadd: True, torch.add: False}  # whether it writes into its first argument
ADD_METHODS = {"add": False, "add_": True}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.leaky_relu: "leaky_relu", F.silu: "silu",
    F.gelu: "gelu", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh",
    F.hardswish: "hardswish",
}  # fmt: skip
METHODS = {f"{name}{_}": name for name in ("relu", "sigmoid", "tanh") for _ in ("", "_")}


def is_constant(value: Any) -> bool:
    """Returns True for an argument or attribute whose value a traced forward may hold, because it can be compared."""
    if type(value) in (tuple, list):
        return all(map(is_constant, value))
    return type(value) in CONSTANTS


def is_same(now: Any, value: Any) -> bool:
    """Returns True if something is equal to a constant, and of its type."""
    return now is value or (type(now) is type(value) and now == value)


class Untraceable(Exception):
    """torch.fx cannot say what a module's forward does in every call. The text says why."""


@dataclass(frozen=True)
class Form:
    """The arguments with which a module was called: TENSOR for a tensor, otherwise the value.

    A traced forward is for calls of this form only.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
        """Raises Untraceable for an argument that is neither a tensor nor a constant."""

        def kind(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) and not is_constant(value):
                raise Untraceable(f"it is called with a {type(value).__name__}")
            return TENSOR if isinstance(value, torch.Tensor) else copy.deepcopy(value)

        return Form(tuple(map(kind, args)), {name: kind(value) for name, value in kwargs.items()})

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
        """Returns the tensors among the arguments of a call; None if it has another form."""
        if len(args) != len(self.args) or kwargs.keys() != self.kwargs.keys():
            return None
        pairs = [*zip(args, self.args, strict=True), *((kwargs[name], kind) for name, kind in self.kwargs.items())]
        for value, kind in pairs:
            if not (isinstance(value, torch.Tensor) if kind is TENSOR else is_same(value, kind)):
                return None
        return [value for value, kind in pairs if kind is TENSOR]

    def filled(self, tensors: Iterator[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns arguments of this form with these tensors."""

        def value(kind: Any) -> Any:
            return next(tensors) if kind is TENSOR else kind

        return tuple(map(value, self.args)), {name: value(kind) for name, kind in self.kwargs.items()}


@dataclass
class Chain:
    """Nodes of a graph that become one convolution with an epilogue.

    Attributes:
        conv: the name of the convolution.
        nodes: from the padding or the convolution to the last one.
        steps: what the kernel computes beside the convolution, as text.
        norm, activation, position: as in `chain.chained`; names for modules.
        added: the node that adds the residual.
        pad: the padding's module; empty for a function, which is then the first node; None without a padding.
        passed: names of modules in it that do nothing, and of those with another one inside: they must stay what they are.
        why: why it ends.
    """

    conv: str
    nodes: list[fx.Node]
    steps: list[str] = field(default_factory=list)
    norm: str | None = None
    activation: str | Activation | None = None
    added: fx.Node | None = None
    position: str = "before"
    pad: str | None = None
    passed: list[str] = field(default_factory=list)
    why: str = ""


class _Tracer(fx.Tracer):
    """Traces a module's forward for calls of one form.

    Args:
        inlined: names of the modules inside that are traced into.
    """

    proxy_buffer_attributes = True  # else a forward may compute with a buffer's values, and the trace hold them

    def __init__(self, form: Form, inlined: set[str]) -> None:
        super().__init__()
        self.form, self.inlined = form, inlined
        self.inside: list[str] = []
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inlined

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = (self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(1_000_000))
        args, kwargs = self.form.filled(iter(proxies))
        return functools.partial(root_fn, **kwargs), [self.root, *args]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        self.inside.append(name)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.inside.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("it changes the grad mode or autocast")
        node = super().create_node(*args, **kwargs)
        node.meta[INSIDE] = frozenset(self.inside) & self.inlined
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and all(a is not t for t in (*self.root.parameters(), *self.root.buffers())):
            raise Untraceable("it makes a tensor that does not depend on its input")
        return super().create_arg(a)


def _modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


@contextlib.contextmanager
def unchanged(host: nn.Module) -> Iterator[None]:
    """Sets back what a module's forward changes in a block in which it is traced.

    Raises:
        Untraceable: the block does, or the forward sets attributes or draws random numbers.
    """
    before = [(m, dict(m.__dict__)) for m in host.modules()]
    state, why = (torch.get_rng_state(), random.getstate()), ""
    with exchanged(reach((host, Place.MODEL)), lambda t, _: t):
        try:
            yield
        except Untraceable as e:
            why = str(e)
        changed = [
            name for m, old in before for name in {*old, *m.__dict__} if m.__dict__.get(name) is not old.get(name, before)
        ]
    if not torch.equal(state[0], torch.get_rng_state()) or state[1] != random.getstate():
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        why = "it draws random numbers that do not depend on its input"
    elif changed:
        why = f"it sets its attribute {changed[0]}"
    if why:
        raise Untraceable(why)


def traced(host: nn.Module, form: Form, inlined: set[str]) -> fx.Graph:
    """Returns the graph of a module's forward for calls of one form.

    Raises:
        Untraceable: it has none that is right for all such calls.
    """
    try:
        return _Tracer(form, inlined).trace(host)
    except Untraceable:
        raise
    except Exception as e:  # of any kind: the user's code was given proxies
        raise Untraceable(f"torch.fx cannot trace its forward: {_first_line(e)}") from None


def _first_line(e: BaseException) -> str:
    text = str(e).strip().partition("\n")[0]
    return f"{type(e).__name__}{': ' if text else ''}{text[:100]}"


# --- chains ---


def chains_of(host: nn.Module, graph: fx.Graph, without_residual: set[str]) -> list[Chain]:
    """Returns a chain for each convolution that a graph calls, fused with something or not.

    Args:
        without_residual: names of convolutions whose residual is known not to fit.
    """
    found, taken = [], set[fx.Node]()
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(host.get_submodule(node.target), nn.modules.conv._ConvNd):
            chain = _chain(host, graph, node, taken, without_residual)
            taken |= {*chain.nodes}
            found.append(chain)
    return found


def _chain(host: nn.Module, graph: fx.Graph, node: fx.Node, taken: set[fx.Node], without_residual: set[str]) -> Chain:
    chain = Chain(str(node.target), [node])
    conv = host.get_submodule(chain.conv)
    try:
        _, rank = fit_conv(conv)
        if len(node.args) != 1 or node.kwargs:
            raise Unfit("it is called with more than its input")
    except Unfit as why:
        chain.why = str(why)
        return chain
    try:
        _take_pad(host, chain, node, rank)
    except Unfit as why:
        chain.why = f"after {why}"
    try:
        while True:
            last = chain.nodes[-1]
            if len(last.users) != 1:
                raise Unfit(f"its result is used {len(last.users)} times")
            step = next(iter(last.users))
            if step in taken:
                raise Unfit("what follows belongs to another convolution")
            if step.op == "output":
                raise Unfit("its result is the module's")
            longer = copy.copy(chain)
            longer.nodes, longer.steps, longer.passed = [*chain.nodes], [*chain.steps], [*chain.passed]
            _take(host, longer, step, rank, without_residual)
            _undisturbed(host, graph, longer)
            chain = longer
    except Unfit as why:
        chain.why = f"{chain.why}; {why}" if chain.why else str(why)
    return chain


def _take_pad(host: nn.Module, chain: Chain, node: fx.Node, rank: int) -> None:
    """Adds a padding before a convolution to its chain. Raises Unfit if there is one that its kernel cannot compute."""
    before, known = node.args[0], cast(Any, None)
    if not isinstance(before, fx.Node):
        return
    if before.op == "call_module" and type(module := host.get_submodule(str(before.target))) in PADS:
        pad, known = str(before.target), module
    elif before.op == "call_function" and before.target is F.pad:
        _, amounts, mode, value = _bound(before, *PAD)
        if value not in (None, 0):
            raise Unfit(OTHER_NUMBERS)
        if mode not in PADS.values():
            raise Unfit(f"a padding in mode {mode!r}")
        if not isinstance(amounts, (tuple, list)) or len(amounts) > 2 * rank:
            raise Unfit("a padding of other dimensions")
        pad, known = "", (mode, amounts) if all(type(n) is int for n in amounts) else None
    else:
        return
    conv = host.get_submodule(chain.conv)
    fit_conv(conv, padded=True)
    fit_padding(conv, known, rank)
    if len(before.users) != 1:
        raise Unfit(f"a padding that is used {len(before.users)} times")
    x = before.args[0] if before.args else before.kwargs["input"]
    for user in cast(fx.Node, x).users:
        if _writes(host, user):
            raise Unfit(f"a padding whose input {user.name} writes in place")  # autograd would keep that, not the padded copy
    chain.nodes.insert(0, before)
    chain.pad = pad
    chain.steps.append("pad")


def _bound(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> list[Any]:
    """Returns a call's arguments in order. Raises Unfit if some have other names."""
    order = [*names, *defaults]
    given = dict(zip(order, node.args, strict=False)) | dict(node.kwargs)
    if len(node.args) > len(order) or given.keys() - order:
        raise Unfit("arguments of other names")
    return [given[name] if name in given else defaults.get(name) for name in order]


def _take(host: nn.Module, chain: Chain, step: fx.Node, rank: int, without_residual: set[str]) -> None:
    """Adds what follows a chain to it. Raises Unfit if the kernel cannot compute that, or not in this place."""
    last, module = chain.nodes[-1], cast(Any, None)
    if step.op == "call_module":
        module = host.get_submodule(str(step.target))
        if step.args != (last,) or step.kwargs:
            raise Unfit(f"its result is an argument of {type(module).__name__}")
    if type(module) in NORMS or norm_act(module):
        fit_norm(module, rank)
        if chain.norm or chain.activation or chain.added:
            raise Unfit("a batch norm after other steps")
        chain.norm = str(step.target)
        chain.steps.append("batch norm")
        if norm_act(module):
            chain.passed += [str(step.target), f"{step.target}.drop"]
            if type(module.act) is not nn.Identity:
                chain.activation = f"{step.target}.act"
                chain.steps.append(fit_activation(module.act)[0])
    elif _does_nothing(module):
        chain.passed.append(str(step.target))
    elif module is not None:
        if type(module) not in ACTIVATIONS:
            why = ", no activation of the kernels" if type(module).__module__ == nn.modules.activation.__name__ else ""
            raise Unfit(f"followed by {type(module).__name__}{why}")
        name, _ = fit_activation(module)
        _only_one(chain)
        chain.activation = str(step.target)
        chain.steps.append(name)
    elif activation := _activation(step, last):
        _only_one(chain)
        chain.activation = activation
        chain.steps.append(activation[0])
    else:
        _added(step, last)
        if chain.added:
            raise Unfit("a second residual")
        if chain.conv in without_residual:
            raise Unfit("the residual is of another shape, dtype or device than the result")
        chain.added, chain.position = step, "after" if chain.activation else "before"
        chain.steps.append("residual")
    chain.nodes.append(step)


def _does_nothing(module: nn.Module | None) -> bool:
    """Returns True for an Identity, and for a dropout in evaluation mode."""
    if type(module) is not nn.Identity and (type(module) not in DROPOUTS or module.training):  # type: ignore[union-attr]  # None has no such type
        return False
    return _hookless(module)


def _hookless(module: Any) -> bool:
    try:
        unhooked(module, "it")
    except Unfit:
        return False
    return True


def _only_one(chain: Chain) -> None:
    if chain.activation:
        raise Unfit("a second activation")


def _activation(step: fx.Node, last: fx.Node) -> Activation | None:
    """Returns which activation a call of a function or method is; None if it is none that the kernels have."""
    name = FUNCTIONS.get(step.target) if step.op == "call_function" else METHODS.get(str(step.target))
    if name is None or (step.op == "call_method") != (step.target in METHODS) or not step.args or step.args[0] is not last:
        return None
    try:
        if name == "leaky_relu":
            slope = _bound(step, ("input",), {"negative_slope": 0.01, "inplace": False})[1]
            return (name, float(slope)) if isinstance(slope, (int, float)) else None
        if name == "gelu":
            approximate = _bound(step, ("input",), {"approximate": "none"})[1]
            return {"none": ("gelu", 0.0), "tanh": ("gelu_tanh", 0.0)}.get(approximate)
        _bound(step, ("input",), {"inplace": False})
    except Unfit:
        return None
    return name, 0.0


def _added(step: fx.Node, last: fx.Node) -> fx.Node:
    """Returns what a node adds to a chain's result. Raises Unfit if it does not, or writes it into another tensor."""
    adds: dict[Any, bool] = ADDS if step.op == "call_function" else ADD_METHODS if step.op == "call_method" else {}
    writes = adds.get(step.target)
    if writes is None:
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", step.target)
        raise Unfit(f"followed by {name}")
    if step.kwargs or len(step.args) != 2 or not all(isinstance(a, fx.Node) for a in step.args):
        raise Unfit("followed by an addition of another kind than of two tensors")
    a, b = step.args
    if writes and a is not last:
        raise Unfit("its result is added to another tensor in place")
    if a is b:
        raise Unfit("its result is added to itself")
    return b if a is last else a  # type: ignore[return-value]  # nodes, as asked above


def _undisturbed(host: nn.Module, graph: fx.Graph, chain: Chain) -> None:
    """Raises Unfit if other nodes write in place while a chain would be computed.

    A chain is computed where its last step was, and so reads its input later than the convolution did.
    """
    nodes = [*graph.nodes]
    between = nodes[nodes.index(chain.nodes[0]) : nodes.index(chain.nodes[-1])]
    for node in between:
        if node not in chain.nodes and _writes(host, node):
            raise Unfit(f"{node.name} writes in place before {chain.nodes[-1].name}")


def _writes(host: nn.Module, node: fx.Node) -> bool:
    """Returns True if a node may write into its arguments, as far as its name and its modules tell."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) is True for m in host.get_submodule(str(node.target)).modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.kwargs.get("inplace") is True or "out" in node.kwargs or node.target in IN_PLACE


PAD: tuple[tuple[str, ...], dict[str, Any]] = ("input", "pad"), {"mode": "constant", "value": None}  # F.pad's arguments
IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "and", "or")} | {operator.setitem}


# --- rewriting ---


@dataclass
class Rewritten:
    """A module and the forward that takes the place of its own.

    Attributes:
        name, host: the module.
        chains: one for each convolution that it calls, fused or not.
        inlined: names of modules that it calls no more, since their forward is in the new one.
        held: names of all modules that must stay what they are: those inlined, those of `Chain.passed`, and those that it
            never calls, of whose modules it calls some, such as a ModuleList.
        forward: (module, tensors) -> result; None if there is nothing to fuse.
    """

    name: str
    host: nn.Module
    form: Form
    chains: list[Chain]
    inlined: frozenset[str]
    held: frozenset[str]
    forward: Callable[..., Any] | None

    @property
    def fused(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.steps]


def rewrite(name: str, host: nn.Module, form: Form, without_residual: set[str], stepwise: bool) -> Rewritten:
    """Returns a module with a new forward for calls of one form. The module is not changed.

    Raises:
        Untraceable: there is none.
    """
    with unchanged(host), torch.no_grad():
        inlined = set[str]()
        graph = traced(host, form, inlined)
        chains = chains_of(host, graph, without_residual)
        tried = set[str]()
        while more := {*_worth_entering(host, graph, chains)} - tried:
            tried |= more
            try:
                graph = traced(host, form, inlined | more)
                inlined |= more
            except Untraceable:  # because of some of them
                for one in sorted(more):
                    with contextlib.suppress(Untraceable):
                        graph = traced(host, form, inlined | {one})
                        inlined.add(one)
            chains = chains_of(host, graph, without_residual)
        crossed = {m for m in inlined if any({m in node.meta[INSIDE] for node in c.nodes} == {True, False} for c in chains)}
        if crossed != inlined:
            inlined, graph = crossed, traced(host, form, crossed)
            chains = chains_of(host, graph, without_residual)
        with torch.enable_grad():
            if str(traced(host, form, inlined)) != str(graph):
                raise Untraceable("it asks for the grad mode")
    fused = [chain for chain in chains if chain.steps]
    held = {*inlined, *_not_called(host, graph), *(n for c in fused for n in c.passed)}
    forward = _compiled(graph, fused, stepwise, name or type(host).__name__) if fused else None
    return Rewritten(name, host, form, chains, frozenset(inlined), frozenset(held), forward)


def _not_called(host: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Yields the names of modules in a host that a graph does not call, without those inside modules that it calls."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name, _ in host.named_modules():
        parts = name.split(".")
        if name and not any(".".join(parts[: i + 1]) in called for i in range(len(parts))):
            yield name


def _worth_entering(host: nn.Module, graph: fx.Graph, chains: list[Chain]) -> Iterator[str]:
    """Yields the modules that a graph calls and in which a chain may begin or end.

    One with a convolution begins a chain if a norm, an activation or an addition follows it. One without may be an activation
    by another name.
    """
    ends = {chain.nodes[-1] for chain in chains}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1:
            continue
        module, after = host.get_submodule(str(node.target)), next(iter(node.users))
        if not enterable(module):
            continue
        if any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
            followed = host.get_submodule(str(after.target)) if after.op == "call_module" else None
            known = type(followed) in ACTIVATIONS or type(followed) in NORMS or norm_act(followed)
            if known or after.target in ADDS or after.target in ADD_METHODS or _activation(after, node):
                yield str(node.target)
        elif len(node.args) == 1 and node.args[0] in ends:
            yield str(node.target)


def enterable(module: nn.Module) -> bool:
    """Returns True if a module's forward may be traced: it is the user's or a Sequential's, and nothing else is called."""
    if isinstance(module, (torch.jit.ScriptModule, nn.modules.conv._ConvNd)):
        return False
    if type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Sequential:
        return False
    return _hookless(module)


_numbers = itertools.count()


def _compiled(graph: fx.Graph, chains: list[Chain], stepwise: bool, name: str) -> Callable[..., Any]:
    """Returns a graph with its chains fused, as a function."""
    # What one chain reads another one may compute: nodes' arguments are up to date, those that were seen before are not.
    for chain in chains:
        first, last = chain.nodes[0], chain.nodes[-1]
        with graph.inserting_after(last):
            fused = graph.call_function(chained, ())
        with graph.inserting_before(fused):

            def module(target: Any) -> Any:
                return graph.get_attr(target) if isinstance(target, str) else target

            x, pad = first.args[0] if first.args else first.kwargs["input"], module(chain.pad or None)
            if chain.pad == "":
                x, amounts, mode, _ = _bound(first, *PAD)
                pad = mode, amounts
            residual = chain.added and _added(chain.added, chain.nodes[chain.nodes.index(chain.added) - 1])
            kwargs = {
                "norm": module(chain.norm), "activation": module(chain.activation), "residual": residual,
                "position": None if chain.position == "before" else chain.position, "pad": pad, "stepwise": stepwise or None,
            }  # fmt: skip
            fused.args = (module(chain.conv), x)
        fused.kwargs = {name: value for name, value in kwargs.items() if value is not None}
        last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    file = f"<fused forward {next(_numbers)} of {name}>"
    linecache.cache[file] = len(code.src), None, code.src.splitlines(True), file  # for tracebacks
    made = dict(code.globals)
    exec(compile(code.src, file, "exec"), made)
    forward: Callable[..., Any] = made["forward"]
    return forward
