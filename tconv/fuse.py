"""`fuse_`: computes what surrounds a model's convolutions in their own kernels, in place, by giving modules new forwards."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import _get_fp32_precision_getter as fp32_precision

from tconv import subclasses
from tconv.chain import WATCH, Unfit, Watch, unhooked
from tconv.launching.record import Call, record_call
from tconv.rehearsal.runner import StandIns
from tconv.rehearsal.state import Place, exchanged, reach, tensors, thread_kept
from tconv.rewrite import Form, Rewritten, Untraceable, is_constant, is_same, rewrite
from tconv.subclasses import USERS
from tconv.swap import become, checked, plain_class

# How far the result of a module may be from that of its old forward: the norm of the difference over the norm. Twice that for
# the whole model. A step that is lost or done twice is off by tenths.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32 = 1e-2  # for fp32, where convolutions may use it
OWN = vars(nn.Module()).keys() - {"training"}  # attributes that every module has
Errors = dict[nn.Module, str]


@dataclass(frozen=True)
class Fused:
    """What `fuse_` did with one convolution.

    Attributes:
        name: of the convolution.
        steps: what its kernel computes beside it, in order; empty if nothing.
        where: the module whose forward calls it so.
        call: how it ran on the example; of torch's, if no kernel can run there; None if it is as it was.
        why: why the chain ends where it does.
    """

    name: str
    steps: tuple[str, ...]
    where: str
    call: Call | None
    why: str

    @property
    def runs(self) -> str:
        """What computes it."""
        if self.call is None:
            return "-"
        return f"{self.call.plan.kernel} {self.call.plan.tile}" if self.call.plan else f"torch ({self.call.reason})"


@dataclass(frozen=True)
class Fusion:
    """The result of `fuse_`. It prints as a table.

    Attributes:
        convolutions: all of the model, in its order.
        difference: how far the model's result on the example is from the one before, as the norm of the difference over the
            norm.
        allowed: how far it may be.
        stepwise: whether each step rounds.
    """

    convolutions: tuple[Fused, ...]
    difference: float
    allowed: float
    stepwise: bool

    @property
    def fused(self) -> tuple[Fused, ...]:
        """The convolutions whose kernels compute something beside them."""
        return tuple(c for c in self.convolutions if c.steps)

    def __str__(self) -> str:
        rounding = "after each step" if self.stepwise else "once per kernel, where the modules round after each step"
        title = (
            f"{len(self.fused)} of {len(self.convolutions)} convolutions fused; the result differs by {self.difference:.1e}, "
            f"{self.allowed:.0e} being allowed; rounded {rounding}"
        )
        rows = [("convolution", "and in its kernel", "by", "which ends there because")]
        rows += [(c.name or "model", ", ".join(c.steps) or "-", c.runs, c.why) for c in self.convolutions]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])


def fuse_(model: nn.Module, example: Any, *, stepwise: bool = False) -> Fusion:
    """Computes what surrounds a model's convolutions in their own kernels, in place.

    That is a padding by zeros before a convolution, and after it a batch norm in evaluation mode, the addition of a residual
    and an activation, as far as they follow each other in the forward of a module that torch.fx can trace. The module gets a
    class derived from its own, with a new forward. Parameters, buffers, hooks and the modules inside stay as they are. The new
    forward holds for calls like the example's; for others, in another training mode, and after a change of the module's
    attributes the old one runs. `restore_` undoes it. docs/fusing.md has the details.

    Args:
        model: any module. If it is fused already, it is restored first.
        example: its input: a tensor, a tuple of arguments or a dict of keyword arguments. The model is called with it several
            times, without gradients and without leaving a trace, before and after, and the results are compared.
        stepwise: as in `tconv.functional`.
    Returns:
        A `Fusion`, which tells of each convolution what was done and why not more.
    Raises:
        TypeError: `model` is not a module.
        RuntimeError: the model's result on the example changed by more than rounding. The model is then as it was.
        Whatever the model raises on the example.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> print(fuse_(model, torch.randn(1, 3, 8, 8)).fused[0].steps)
        ('batch norm', 'relu')
    """
    checked("fuse_", model)
    example = example if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    before = [(m, plain_class(m)) for m in model.modules() if _is_fused(m)]
    try:
        for m, cls in before:
            become(m, cls.__dict__[USERS])
        return _fuse(model, example, stepwise)
    except BaseException:
        _unfuse(model)
        for m, cls in before:
            become(m, cls)
        raise


def _is_fused(module: nn.Module) -> bool:
    """Returns True if a module has the class that `fuse_` gave it."""
    return FORWARD in plain_class(module).__dict__


def _unfuse(model: nn.Module) -> None:
    for m in model.modules():
        if _is_fused(m):
            become(m, plain_class(m).__dict__[USERS])


def _fuse(model: nn.Module, example: Any, stepwise: bool) -> Fusion:
    forms = dict[nn.Module, Form | str]()
    expected = _run(model, example, forms)
    refused, without_residual = Errors(), defaultdict[nn.Module, set[str]](set)
    while True:  # until no module is refused that was not before
        found, why = _rewritten(model, forms, refused, without_residual, stepwise)
        for r in found:
            become(r.host, _derived(r))
        watch, errors = Watch(), Errors()
        watch.host = functools.partial(_compare, watch, errors)
        _run(model, example, watch=watch)
        misfits = [(r, c) for r in found for c in r.fused if c.added and r.host.get_submodule(c.conv) in watch.misfits]
        if not errors and not misfits:
            break
        _unfuse(model)
        refused |= errors
        for r, chain in misfits:
            without_residual[r.host].add(chain.conv)
    result = _run(model, example)
    difference, allowed = _distance(result, expected)
    if not difference <= 2 * allowed:
        raise RuntimeError(
            f"fuse_: the model's result differs by {difference:.1e} from the one before, where {2 * allowed:.0e} is allowed, "
            "though no module's does. The model is as it was"
        )
    rows = _told(model, found, why, forms, watch)
    return Fusion(tuple(rows), difference, 2 * allowed, stepwise)


def _run(model: nn.Module, example: Any, forms: Any = None, watch: Watch | None = None) -> list[torch.Tensor]:
    """Returns the tensors in a model's result on the example, without gradients and side effects.

    Args:
        forms: gets {module: the form in which it was called first, or why it has none}.
        watch: watches the chains.
    """
    args, kwargs = ([], dict(example)) if isinstance(example, dict) else (list(example), {})
    found = reach(([args, kwargs], Place.INPUT), (model, Place.MODEL))
    with contextlib.ExitStack() as during:
        during.enter_context(thread_kept())
        during.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:
            during.enter_context(torch.compiler.set_stance("force_eager"))
        during.enter_context(exchanged(found, StandIns(False, found, inputs_require_grad=False)))
        during.callback(WATCH.reset, WATCH.set(watch))
        for m in model.modules() if forms is not None else ():
            if not isinstance(m, torch.jit.ScriptModule):
                m.register_forward_pre_hook(functools.partial(_note, forms), with_kwargs=True)
        return [t.detach().clone() for t in tensors([model(*args, **kwargs)])]


def _note(forms: dict[nn.Module, Form | str], module: nn.Module, args: Any, kwargs: Any) -> None:
    if module not in forms:
        try:
            forms[module] = Form.of(args, kwargs)
        except Untraceable as why:
            forms[module] = str(why)


def _compare(watch: Watch, errors: Errors, module: nn.Module, old: Any, new: Any, form: Form, found: list[torch.Tensor]) -> Any:
    """Calls a module's new forward and its old one, compares, and returns the old one's result.

    Args:
        errors: gets the module if they differ.
        form, found: the arguments.
    """
    copies = [t.clone() for t in found]
    inner = WATCH.set(Watch(watch.chains, watch.misfits))  # the modules inside compare themselves when the old forward runs
    error, got = "", None
    try:
        with thread_kept(), torch.no_grad():  # so that both draw the same random numbers
            got = new(module, *copies)
    except Exception as e:  # of any kind: the forward was traced with proxies
        error = f"its traced forward raises {type(e).__name__}: {e}"
    finally:
        WATCH.reset(inner)
    args, kwargs = form.filled(iter(found))
    right = old(module, *args, **kwargs)
    if not error:
        off, allowed = _distance(tensors([got, copies]), tensors([right, found]))
        if not off <= allowed:
            error = f"its traced forward's result differs by {off:.1e}, where {allowed:.0e} is allowed"
    if error:
        errors[module] = error
    return right


def _distance(found: list[torch.Tensor], right: list[torch.Tensor]) -> tuple[float, float]:
    """Returns how far tensors are from the right ones at most, and how far they may be, of the tensor that is furthest off."""
    if len(found) != len(right):
        return float("inf"), 0.0
    worst = 0.0, max((_allowed(t) for t in right), default=0.0)
    for a, b in zip(found, right, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return float("inf"), 0.0
        if a.is_meta or not a.numel():
            continue
        if not a.is_floating_point():
            off = 0.0 if torch.equal(a, b) else float("inf")
        else:
            wide, expected = a.double(), b.double()
            finite = expected.isfinite()
            same = torch.equal(finite, wide.isfinite())
            norm = float(expected[finite].norm())
            off = float((wide - expected)[finite].norm()) / (norm or 1.0) if same else float("inf")
        if not off * worst[1] <= worst[0] * _allowed(b):
            worst = off, _allowed(b)
    return worst


def _allowed(t: torch.Tensor) -> float:
    if t.dtype == torch.float32 and t.is_cuda and fp32_precision("cuda", "conv") == "tf32":
        return TF32
    return TOLERANCE.get(t.dtype, 0.0)


def _rewritten(
    model: nn.Module, forms: Any, refused: Errors, without_residual: dict[nn.Module, set[str]], stepwise: bool
) -> tuple[list[Rewritten], dict[str, str]]:
    """Returns the modules that get new forwards, and {name: why not} of others."""
    found, why = list[Rewritten](), dict[str, str]()
    for name, host in model.named_modules():
        convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in host.modules())
        if not convolutions or host not in forms or isinstance(host, nn.modules.conv._ConvNd):
            continue
        form = forms[host]
        try:
            if host in refused:
                raise Untraceable(refused[host])
            if not isinstance(form, Form):
                raise Untraceable(form)
            _fit_host(host)
            r = rewrite(name, host, form, without_residual[host], stepwise)
        except Untraceable as e:
            why[name] = str(e)
            continue
        if r.forward is not None:
            found.append(r)
        else:
            for chain in r.chains:
                why[f"{name}.{chain.conv}" if name else chain.conv] = chain.why
    return found, why


def _fit_host(host: nn.Module) -> None:
    """Raises Untraceable if a module cannot get a class with another forward."""
    if "forward" in host.__dict__:
        raise Untraceable("it has a forward of its own, set on the module")
    cls = plain_class(host)
    if isinstance(host, torch.jit.ScriptModule) or (cls.__module__.startswith("torch.nn.") and cls is not nn.Sequential):
        raise Untraceable(f"{cls.__name__} is not traced")
    try:
        subclasses.refuse_deriving(cls, cls.__mro__[: cls.__mro__.index(nn.Module)])
    except subclasses.CannotReplace as e:
        raise Untraceable(str(e)) from None


def _told(model: nn.Module, found: list[Rewritten], why: dict[str, str], forms: Any, watch: Watch) -> Iterator[Fused]:
    """Yields what was done with each convolution."""
    # A module that another one's forward holds has a forward of its own too. The outer one, which comes first, calls it.
    chains = {r.host.get_submodule(chain.conv): (r, chain) for r in reversed(found) for chain in r.chains}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.modules.conv._ConvNd):
            continue
        if conv in chains:
            r, chain = chains[conv]
            yield Fused(name, tuple(chain.steps), r.name, watch.chains.get(conv) if chain.steps else None, chain.why)
            continue
        parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)] + [""]
        reason = next((f"{p or 'model'}: {why[p]}" if p != name else why[p] for p in parents if p in why), "")
        yield Fused(name, (), "", None, reason or ("its caller is unknown" if conv in forms else "the example did not call it"))


# --- the new class ---

FORWARD = "_tconv_fused_forward"  # attribute of a derived class: its new forward


def _derived(r: Rewritten) -> type:
    """Returns the class of a module with its new forward."""
    users: Any = plain_class(r.host)
    new, form = r.forward, r.form
    guards = [_guard("", r.host), *(_guard(name, r.host.get_submodule(name)) for name in sorted(r.held))]
    shared = _shared({name: r.host.get_submodule(name) for name in ("", *sorted(r.held))})

    @functools.wraps(users.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # a compiler fuses by itself, and wants torch's own operators for it
            found = form.tensors(args, kwargs)
            if found is not None and _unchanged(self, guards, shared):
                watch = WATCH.get()
                if watch is not None and watch.host is not None:
                    return watch.host(self, users.forward, new, form, found)
                return new(self, *found)  # type: ignore[misc]  # there is one
        return users.forward(self, *args, **kwargs)

    members: dict[str, Any] = {
        "__module__": users.__module__, "__qualname__": users.__qualname__, "__doc__": users.__doc__, "forward": forward,
        "__reduce_ex__": subclasses.reduce, "__prepare_scriptable__": _not_scriptable, USERS: users, FORWARD: new,
    }  # fmt: skip
    if not hasattr(users, "__deepcopy__"):
        members["__deepcopy__"] = _deepcopy
    return type(users.__name__, (users,), members)


def _guard(name: str, module: nn.Module) -> _Guard:
    return _Guard(
        tuple(name.split(".")) if name else (), _users(module), _constants(module), frozenset(vars(module)), _members(module)
    )


def _members(module: nn.Module) -> dict[str, bool]:
    """Returns the names of what is registered in a module, and whether it is None."""
    registered = module._modules, module._parameters, module._buffers
    return {name: value is None for members in registered for name, value in members.items()}


def _shared(modules: dict[str, nn.Module]) -> list[list[tuple[str, ...]]]:
    """Returns the paths of each module that some modules have under several names: a trace knows it by the first."""
    found = defaultdict[nn.Module, list[tuple[str, ...]]](list)
    for name, module in modules.items():
        for child, inside in module._modules.items():
            if inside is not None:
                found[inside].append((*(name.split(".") if name else ()), child))
    return [paths for paths in found.values() if len(paths) > 1]


def _at(host: nn.Module, path: tuple[str, ...]) -> Any:
    """Returns the module at a path; None if there is none."""
    m: Any = host
    for part in path:
        m = getattr(m, "_modules", {}).get(part)
    return m


def _constants(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module whose values its traced forward may hold."""
    return {name: copy.deepcopy(value) for name, value in vars(module).items() if name not in OWN and is_constant(value)}


class _Guard(NamedTuple):
    """A module whose forward is part of a traced one, as it was then.

    Attributes:
        path: from the host to it; empty for the host itself.
        cls: its class, of the user's.
        constants: its attributes that the traced forward may hold.
        attributes: the names of all of them. A new one may hide an attribute of the class.
        members: what is registered in it, and whether that is None.
    """

    path: tuple[str, ...]
    cls: type
    constants: dict[str, Any]
    attributes: frozenset[str]
    members: dict[str, bool]

    def broken(self, host: Any) -> str:
        """Returns what is different in a host; empty if nothing is."""
        m = _at(host, self.path)
        if self.path:
            if _users(m) is not self.cls:
                return f"{'.'.join(self.path)} is a {type(m).__name__}, was a {self.cls.__name__} in fuse_"
            try:
                unhooked(m, ".".join(self.path))
            except Unfit as why:
                return str(why)
        own = m.__dict__
        for name, value in self.constants.items():
            now = own.get(name)
            if not is_same(now, value):
                return f"{'.'.join((*self.path, name))} is {now!r}, was {value!r} in fuse_"
        for name in own.keys() - self.attributes:
            if is_constant(own[name]):
                return f"{'.'.join((*self.path, name))} is {own[name]!r}, was not set in fuse_"
        if (members := _members(m)) != self.members:
            name = next(n for n in {**self.members, **members} if members.get(n) != self.members.get(n))
            return f"{'.'.join((*self.path, name))} is there where it was not in fuse_, or the other way round"
        return ""


def _users(module: nn.Module | None) -> type:
    """Returns a module's class, without the one that `fuse_` derived from it."""
    cls = type(module)
    return cls.__dict__.get(USERS, cls)  # type: ignore[no-any-return]  # of a class


def _unchanged(host: nn.Module, guards: list[_Guard], shared: list[list[tuple[str, ...]]]) -> bool:
    """Returns True if a module and those inside that its forward holds are as they were traced; else records why not."""
    why = next(filter(None, (guard.broken(host) for guard in guards)), "")
    for first, *others in shared if not why else ():
        for path in others:
            if _at(host, path) is not _at(host, first):
                why = f"{'.'.join(path)} and {'.'.join(first)} were the same module in fuse_"
    if why:
        record_call(Call(f"fused forward of {type(host).__name__}", None, None, why))
    return not why


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Copies a fused module as one. Its `__reduce_ex__` names the user's class, for pickle."""
    new = memo[id(self)] = self.__new__(type(self))
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _not_scriptable(self: Any) -> Any:
    raise NotImplementedError("torch.jit.script cannot take a fused module: tconv.restore_(model) first, or trace it")
