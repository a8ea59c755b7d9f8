"""Saves what a model's call may change as a side effect, and restores it after the call.

It saves three things:

- Python objects that can be reached from the model and its inputs: modules, containers, variables that functions close over,
  objects of users' classes;
- the states of random number generators;
- torch's per-thread settings.

The elements of tensors are not saved: runner.py gives the call stand-ins for the tensors.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Items = list[tuple[Any, Any]]
# Objects of these packages' classes are not searched, since they have a library's state and not a model's.
LIBRARIES = sys.stdlib_module_names | {"torch", "triton", "tconv", "numpy"}
ENTERED = ("types.SimpleNamespace", "collections.UserDict", "collections.UserList", "torch.distributions.")  # exceptions
# Objects with an attribute of these types are not searched either: other threads may use them, or they stand for a resource.
LIVE = (type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Condition, threading.Event, io.IOBase)
METHODS = (types.MethodType, types.BuiltinMethodType)
RUNNING = (torch.nn.Module, types.FunctionType, functools.partial, *METHODS)


class Place(enum.Enum):
    """Where a tensor was found."""

    INPUT = "among the inputs, in containers or objects there"
    MODEL = "in a module, in containers there, or among the variables of a function"
    ELSEWHERE = "in an object of another class that the model refers to"


@dataclass(frozen=True)
class Holder:
    """An object that refers to others, with a way to read and replace its references.

    Attributes:
        read: returns its references as (key, value), in order.
        write: replaces all of its references by the given ones.
    """

    read: Callable[[], Items]
    write: Callable[[Items], None]


@dataclass
class Reached:
    """Everything that can be reached from a model and its inputs.

    Attributes:
        holders: each with its references and the place where it was found. A module has one for its class and one for its
            attributes.
        tensors: each once, with the place where it was first found.
        modules: every `torch.nn.Module` except scripted ones.
        scripted: TorchScript modules. Their tensors are in C++ and cannot be replaced.
        generators: the user's own `torch.Generator`s.
    """

    holders: list[tuple[Holder, Items, Place]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, Place]] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)
    scripted: list[torch.nn.Module] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)


def reach(*roots: tuple[Any, Place], within_modules: bool = True) -> Reached:
    """Returns everything that can be reached by following references from the roots, searched one root after another.

    Args:
        roots: the objects to start from, each with its place.
        within_modules: whether to search modules and functions too.
    """
    found, seen = Reached(), {}
    for root in roots:
        stack = [root]
        while stack:
            value, place = stack.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value  # keeps it alive, so that no other object gets its id
            if isinstance(value, torch.Tensor):
                found.tensors.append((value, place))
            elif isinstance(value, torch.Generator):
                found.generators.append(value)
            elif isinstance(value, torch.jit.ScriptModule):
                found.scripted.append(value)
            elif isinstance(value, (tuple, frozenset)):
                stack += [(v, place) for v in reversed([*value])]
            else:
                if isinstance(value, RUNNING) and not within_modules:
                    continue
                if isinstance(value, torch.nn.Module):
                    found.modules.append(value)
                inside, holders = _holders(value, place, value is root[0])
                for holder in reversed(holders):
                    items = holder.read()
                    found.holders.append((holder, items, inside))
                    stack += [(v, inside) for item in reversed(items) for v in reversed(item)]  # keys may be tensors too
    return found


def _holders(value: Any, place: Place, root: bool) -> tuple[Place, list[Holder]]:
    """Returns the place of a value's contents, and the value's holders."""
    if isinstance(value, torch.nn.Module):
        return Place.MODEL, [_class(value), _dictionary(vars(value))]
    if isinstance(value, types.FunctionType):
        return Place.MODEL, _function(value)
    if isinstance(value, METHODS):
        return place, [Holder(lambda: [(0, value.__self__), (1, getattr(value, "__func__", None))], lambda items: None)]
    if isinstance(value, functools.partial):
        return place, [_partial(value)]
    if isinstance(value, dict):
        return place, [_dictionary(value), *_attributes(value)]
    if isinstance(value, (list, deque)):
        return place, [_sequence(value), *_attributes(value)]
    if isinstance(value, set):
        return place, [_set(value)]
    return Place.ELSEWHERE if place is Place.MODEL and not root else place, _attributes(value)


def _attributes(value: Any) -> list[Holder]:
    """Returns holders of an object's attributes and slots; none if it is a library's or other threads may use it."""
    if isinstance(value, (type, types.ModuleType)):
        return []
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name.partition(".")[0] in LIBRARIES and not name.startswith(ENTERED):
        return []
    holders, members = [], [m for c in type(value).__mro__ for m in vars(c).values() if type(m) is types.MemberDescriptorType]
    with contextlib.suppress(AttributeError):
        attributes = object.__getattribute__(value, "__dict__")
        if type(attributes) is dict:
            holders.append(_dictionary(attributes))
    if members:
        holders.append(_slots(value, members))
    return [] if any(isinstance(v, LIVE) for holder in holders for _, v in holder.read()) else holders


# --- holders ---


def _class(module: torch.nn.Module) -> Holder:
    """Returns a holder of a module's class, which a lazy module changes."""
    return Holder(lambda: [(None, module.__class__)], lambda items: object.__setattr__(module, "__class__", items[0][1]))


def _dictionary(d: dict[Any, Any]) -> Holder:
    """Returns a holder of a dict's items. It uses the methods of `dict` itself, which a subclass may have restricted."""
    base: Any = OrderedDict if isinstance(d, OrderedDict) else dict

    def write(items: Items) -> None:
        present = [*base.__iter__(d)]
        if len(present) != len(items) or any(a is not b for a, (b, _) in zip(present, items, strict=True)):
            base.clear(d)
        for key, value in items:
            base.__setitem__(d, key, value)

    return Holder(lambda: [(k, dict.__getitem__(d, k)) for k in base.__iter__(d)], write)


def _sequence(values: list[Any] | deque[Any]) -> Holder:
    base: Any = list if isinstance(values, list) else deque

    def write(items: Items) -> None:
        base.clear(values)
        base.extend(values, [v for _, v in items])

    return Holder(lambda: [*enumerate(base.__iter__(values))], write)


def _set(values: set[Any]) -> Holder:
    def write(items: Items) -> None:
        set.clear(values)
        set.update(values, [v for _, v in items])

    return Holder(lambda: [(v, v) for v in set.__iter__(values)], write)


def _slots(value: Any, members: list[Any]) -> Holder:
    def read() -> Items:
        items = []
        for member in members:
            with contextlib.suppress(AttributeError):  # not set
                items.append((member, member.__get__(value)))
        return items

    def write(items: Items) -> None:
        for member, _ in read():
            member.__delete__(value)
        for member, v in items:
            member.__set__(value, v)

    return Holder(read, write)


def _partial(p: functools.partial[Any]) -> Holder:
    """Returns a holder of a partial's parts. `write` sets all but its keywords, a dict which has its own holder."""

    def write(items: Items) -> None:
        (_, function), (_, args), _ = items
        p.__setstate__((function, args, p.keywords, vars(p)))  # type: ignore[attr-defined]  # typeshed leaves it out

    return Holder(lambda: [(0, p.func), (1, p.args), (2, p.keywords)], write)


def _function(f: types.FunctionType) -> list[Holder]:
    """Returns holders of a function's variables: those it closes over, its defaults, and the globals that its code names.

    Wrappers of a library, such as vmap's, are searched for the functions that they call, but their variables are not restored.
    """
    cells = [c for c in f.__closure__ or () if _filled(c)]
    if str(f.__globals__.get("__name__")).partition(".")[0] in LIBRARIES:
        return [Holder(lambda: [(i, c.cell_contents) for i, c in enumerate(cells) if _filled(c)], lambda items: None)]

    def fill(items: Items) -> None:
        for i, value in items:
            cells[i].cell_contents = value

    def default(items: Items) -> None:
        f.__defaults__ = items[0][1]

    def define(items: Items) -> None:
        f.__globals__.update(items)

    names = [n for n in dict.fromkeys(_names(f.__code__)) if n in f.__globals__]
    return [
        Holder(lambda: [(i, c.cell_contents) for i, c in enumerate(cells) if _filled(c)], fill),
        Holder(lambda: [(None, f.__defaults__)], default),
        *([_dictionary(f.__kwdefaults__)] if f.__kwdefaults__ else []),
        Holder(lambda: [(n, f.__globals__[n]) for n in names if n in f.__globals__], define),
    ]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable has no value yet
        return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Yields the names used in a function's code and in functions defined in it. Globals are among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


# --- exchanging, and setting back ---


@contextlib.contextmanager
def exchanged(found: Reached, of: Callable[[torch.Tensor, Place], torch.Tensor]) -> Iterator[None]:
    """Replaces the tensors in all holders by stand-ins within a block, and restores the holders' references after it.

    The `grad` of the tensors is None within the block, and restored after it.

    Args:
        found: the holders and tensors.
        of: returns the stand-in for a tensor, which may be the tensor itself. Called once per tensor.
    """
    own = [t for t, _ in found.tensors] + [p for module in found.scripted for p in module.parameters()]
    gradients = [(t, t.grad) for t in own if _collects(t)]
    scripted = [(b, b.detach().clone()) for module in found.scripted for b in module.buffers()]
    states = [(g, g.get_state()) for g in found.generators]
    stand_ins = {id(t): of(t, place) for t, place in found.tensors}
    with contextlib.ExitStack() as after:  # runs all callbacks, even if some raise
        for buffer, value in scripted:
            after.callback(_refill, buffer, value)
        for t, gradient in gradients:
            after.callback(setattr, t, "grad", gradient)
            t.grad = None  # so that an optimizer's step in the block does nothing
        for generator, state in states:
            after.callback(generator.set_state, state)
        for holder, items, _ in found.holders:
            after.callback(_set_back, holder, items)
            new = [(_with(k, stand_ins), _with(v, stand_ins)) for k, v in items]
            if not _same(new, items):
                holder.write(new)
        yield


def _refill(t: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        t.copy_(value)


def _set_back(holder: Holder, items: Items) -> None:
    if not _same(holder.read(), items):
        holder.write(items)


def _collects(t: torch.Tensor) -> bool:
    """Returns True if autograd accumulates gradients in a tensor's `grad`."""
    return not torch.nn.parameter.is_lazy(t) and t.is_leaf and t.requires_grad


def _with(value: Any, stand_ins: dict[int, torch.Tensor]) -> Any:
    """Returns a tensor's stand-in, or a tuple or frozenset with its elements' stand-ins; anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return stand_ins.get(id(value), value)
    if isinstance(value, (tuple, frozenset)):
        new = [_with(v, stand_ins) for v in value]
        if any(a is not b for a, b in zip(new, value, strict=True)):
            if hasattr(type(value), "n_sequence_fields"):  # one of torch.return_types
                return type(value)(new)
            base: Any = tuple if isinstance(value, tuple) else frozenset
            return base.__new__(type(value), new)  # works for subclasses with any constructor, such as named tuples
    return value


def _same(a: Items, b: Items) -> bool:
    return len(a) == len(b) and all(k is l and v is w for (k, v), (l, w) in zip(a, b, strict=True))


@contextlib.contextmanager
def thread_kept() -> Iterator[None]:
    """Restores torch's, Python's and NumPy's random number generators, and torch's per-thread settings, after a block.

    Within the block gradients are enabled. Autocast's weight cache is off, since it would keep casts of stand-ins.
    """
    with contextlib.ExitStack() as after:
        on_gpus: Any = torch.cuda
        for generator in (torch.default_generator, *(on_gpus.default_generators if on_gpus.is_initialized() else ())):
            after.callback(generator.set_state, generator.get_state())
        after.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy: Any = sys.modules["numpy"]
            after.callback(numpy.random.set_state, numpy.random.get_state())
        for device in ("cpu", "cuda"):
            after.callback(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device))
            after.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
        after.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        after.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_autocast_cache_enabled(False)
        after.enter_context(torch.inference_mode(False))
        after.enter_context(torch.enable_grad())
        yield


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Returns the tensors in values, their containers and objects' attributes, but not in modules or functions."""
    return [t for t, _ in reach(([*values], Place.INPUT), within_modules=False).tensors]
