"""Changes the convolution layers of a model to tconv's, in place, and back."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize

from tconv import subclasses
from tconv.planning.problem import check_policy
from tconv.subclasses import COMPUTES, OURS, TORCHS, USERS

__all__ = ["MARK", "OURS", "TORCHS", "replace_", "restore_"]

POLICY = "_tconv_policy"  # set on a replaced module whose policy is not "auto", the class's
MARK = "_tconv_replaced"  # set on a replaced module, so that copies and pickles of a model can be restored too

Filter = Callable[[torch.nn.Module, str], bool]
Report = Callable[[str], object]


def replace_(
    model: torch.nn.Module,
    filter_fn: Filter | None = None,
    *,
    report: Report | bool | None = None,
    policy: str = "auto",
) -> torch.nn.Module:
    """Replaces the convolution layers of a model by tconv's, in place.

    Only the class of a module changes. Its Parameters, hooks, name, parametrizations, tied weights and training mode stay.
    If the module's class is a user's subclass of a torch.nn layer, the new class derives from both that and tconv's layer.
    A subclass that overrides `forward` or `_conv_forward` is left alone, since it may not call torch.nn's; `enable()` covers
    the convolutions that it calls.

    Args:
        model: any module; may itself be a convolution.
        filter_fn: called with (module, qualified name) of each convolution that could be replaced; False leaves it alone.
        report: called with one line of text per convolution, which says what was done with it; True prints the lines.
        policy: what the replaced layers do where torch's kernel was measured to be faster (docs/tuning.md): "auto" leaves the
            call to torch; "always" runs tconv's kernels all the same; "tune" is "auto", and measures what has not been
            measured when it is first seen. Without measurements tconv's kernels run. Layers that were replaced before get this
            policy too.
    Returns:
        The same model.
    Raises:
        ValueError: the policy does not exist.
        TypeError: `model` is not a module, or `filter_fn` or `report` cannot be called.
        RuntimeError: the class of a module cannot be changed.
        Whatever `filter_fn` or `report` raises. In all cases the model is unchanged.
    Warns:
        UserWarning: the model has no convolution, or none that can be replaced.

    Example:
        >>> replace_(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), report=True)
        0: torch.nn.Conv2d -> tconv.Conv2d
        Sequential(
          (0): tconv.Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    report = checked("replace_", model, filter_fn, report)
    check_policy("tconv.replace_", policy)
    found = [f for name, module in model.named_modules() if (f := _to_replace(module, name, filter_fn))]
    replaced = [
        module
        for name, module in model.named_modules()
        if MARK in module.__dict__
        and module.__dict__.get(POLICY, "auto") != policy
        and (filter_fn is None or filter_fn(module, name))
    ]
    with _undone_if_raised(found):
        for f in found:
            if f.target is not None:
                _change(f.module, f.name, f.target)
                f.module.__dict__[MARK] = True
                if policy != "auto":
                    f.module.__dict__[POLICY] = policy
        _report(report, found, "no convolution to replace")
    for module in replaced:
        module.__dict__.pop(POLICY, None)
        if policy != "auto":
            module.__dict__[POLICY] = policy
    if all(f.cannot for f in found) and not any(isinstance(m, tuple(TORCHS)) for m in model.modules()):
        warnings.warn(_nothing(type(model).__name__, found), stacklevel=2)
    return model


def restore_(
    model: torch.nn.Module, filter_fn: Filter | None = None, *, report: Report | bool | None = None
) -> torch.nn.Module:
    """Undoes `replace_` and `fuse_`, in place: each module gets its old class back. Layers created as tconv's stay tconv's.

    Args:
        model: a model on which `replace_` or `fuse_` ran, or a copy of one.
        filter_fn: called with (module, qualified name) of each such module; False leaves it alone.
        report: called with one line of text per such module, which says what was done; True prints the lines.
    Returns:
        The same model.
    Raises:
        As `replace_`. The model is then unchanged.
    """
    report = checked("restore_", model, filter_fn, report)
    found = [f for name, module in model.named_modules() if (f := _to_restore(module, name, filter_fn))]
    with _undone_if_raised(found):
        for f in found:
            if f.target is not None:
                _change(f.module, f.name, f.target)
                f.module.__dict__.pop(MARK, None)
                f.module.__dict__.pop(POLICY, None)
        _report(report, found, "nothing replaced or fused")
    return model


class _Found(NamedTuple):
    """A convolution of a model, and what will be done with it.

    Attributes:
        target: the new class; None to leave it alone.
        line: its line of the report.
        cannot: True if it is left alone because of its class.
    """

    module: torch.nn.Module
    name: str
    target: type | None
    line: str
    cannot: bool = False


def _to_replace(module: torch.nn.Module, name: str, filter_fn: Filter | None) -> _Found | None:
    place, cls = name or "model", plain_class(module)
    try:
        target = subclasses.ours(cls)
    except subclasses.CannotReplace as why:
        return _Found(module, name, None, f"{place}: {cls.__name__} left alone: {why}", True)
    if target is None:
        return None
    if filter_fn is not None and not filter_fn(module, name):
        return _Found(module, name, None, f"{place}: {cls.__name__} left alone by filter_fn")
    return _Found(module, name, target, f"{place}: {_named(cls)} -> {_named(target)}{_own_forward(module)}")


def _to_restore(module: torch.nn.Module, name: str, filter_fn: Filter | None) -> _Found | None:
    place, cls = name or "model", plain_class(module)
    if MARK not in module.__dict__ and USERS not in cls.__dict__:
        return None
    target = subclasses.theirs(cls)
    if target is None:
        return _Found(module, name, None, f"{place}: {cls.__name__} left alone: it was given this class after replace_")
    if filter_fn is not None and not filter_fn(module, name):
        return _Found(module, name, None, f"{place}: {cls.__name__} left alone by filter_fn")
    return _Found(module, name, target, f"{place}: {_named(cls)} -> {_named(target)}{_own_forward(module)}")


def _nothing(kind: str, found: list[_Found]) -> str:
    """Returns the warning for a model in which nothing could be replaced."""
    if not found:
        return (
            f"tconv.replace_ found no convolution layer in this {kind}, and replaced nothing. Convolutions that are called as "
            "functions, or by a scripted model, are reached by tconv.enable()"
        )
    why = f"{found[0].line}. report=True says why of each"
    return f"tconv.replace_ replaced none of the {len(found)} convolutions of this {kind}: {why}"


def _named(cls: type) -> str:
    """Returns a class's name as reports print it."""
    if cls in OURS:
        return f"torch.nn.{cls.__name__}"
    return f"tconv.{cls.__name__}" if subclasses.theirs(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _own_forward(module: torch.nn.Module) -> str:
    """Returns a note for the report if the module has a `forward` of its own as an attribute, set by hand or by a tool."""
    own = [name for name in COMPUTES if name in module.__dict__ and name not in _bound(module)]
    return f" (behind its own {' and '.join(own)}, set on the module)" if own else ""


def _report(report: Report, found: list[_Found], nothing: str) -> None:
    for f in found:
        report(f.line)
    if not found:
        report(f"model: {nothing}")


def checked(function: str, model: Any, filter_fn: Any = None, report: Any = None) -> Report:
    """Returns `report` as a function, after checking the arguments of the tconv function named `function`.

    Raises:
        TypeError: an argument has the wrong type.
    """
    if isinstance(model, type):
        raise TypeError(f"tconv.{function} takes a model, but got the class {model.__name__}: make an object of it first")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"tconv.{function} takes a torch.nn.Module, but got a {type(model).__name__}: give it one model, or several in a "
            "torch.nn.ModuleList; convolutions outside of modules are reached by tconv.enable()"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"tconv.{function}: filter_fn is called with each module and its name, but got a {type(filter_fn).__name__}"
        )
    if report is None or report is False:
        return lambda _: None
    if report is True:
        return print
    if not callable(report):
        raise TypeError(f"tconv.{function}: report is True or is called with each line, but got a {type(report).__name__}")
    given: Report = report
    return given


@contextlib.contextmanager
def _undone_if_raised(found: Iterable[_Found]) -> Iterator[None]:
    """Gives modules back their classes and attributes if the block raises."""
    before = [(f.module, type(f.module), dict(f.module.__dict__)) for f in found if f.target is not None]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        raise


def _change(module: torch.nn.Module, name: str, target: type) -> None:
    try:
        become(module, target)
    except (AttributeError, TypeError) as e:
        raise RuntimeError(
            f"{name or 'model'}: {_named(type(module))} cannot become {_named(target)} ({e}). The model is as it was; "
            "filter_fn can leave this layer out"
        ) from e


def plain_class(module: torch.nn.Module) -> type:
    """Returns the class of a module, ignoring the subclass that torch's parametrize creates."""
    cls = type(module)
    return cls.__base__ if parametrize.is_parametrized(module) else cls  # type: ignore[return-value]


def become(module: torch.nn.Module, target: type) -> None:
    """Changes the class of a module, and rebinds attributes that are bound methods of its old class (see `_bound`)."""
    bound = {key: types.MethodType(getattr(target, name), module) for key, name in _bound(module).items()}
    if parametrize.is_parametrized(module):
        members = {k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    object.__setattr__(module, "__class__", target)  # bypasses a user's `__setattr__`
    module.__dict__.update(bound)


def _bound(module: torch.nn.Module) -> dict[str, str]:
    """Returns the attributes of a module that are its class's `forward` or `_conv_forward`, bound to it: {attribute: method}.

    Tools that wrap `forward` store the original this way, accelerate as `_old_forward`. Without rebinding, it would remain
    the method of the old class.
    """
    cls, found = plain_class(module), dict[str, str]()
    for key, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            for name in COMPUTES:
                if value.__func__ is getattr(cls, name, None):
                    found[key] = name
    return found
