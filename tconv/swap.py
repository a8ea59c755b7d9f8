"""Swaps the convolutions of a model for tconv's, in place, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.utils import parametrize

from tconv import modules

NAMES = tuple(f"{lazy}Conv{transpose}{rank}d" for lazy in ("", "Lazy") for transpose in ("", "Transpose") for rank in (1, 2, 3))
OURS = {getattr(torch.nn, name): getattr(modules, name) for name in NAMES}
TORCHS = {ours: torchs for torchs, ours in OURS.items()}
MARK = "_tconv_replaced"  # set on a replaced module: copies and pickles of a model can be restored too

Filter = Callable[[torch.nn.Module, str], bool]
Report = Callable[[str], object]


def replace_(model: torch.nn.Module, filter_fn: Filter | None = None, *, report: Report | None = None) -> torch.nn.Module:
    """Makes torch.nn's own convolution layers of a model tconv's, in place.

    Only the class of a module changes: its Parameters, hooks, name, parametrizations, ties and mode stay. A subclass of
    the user's own is left as it is.

    Args:
        model: any module; may itself be a convolution.
        filter_fn: called with (module, qualified name) of each convolution; False leaves it alone.
        report: called with one line per convolution and what became of it, e.g. `print`.
    Returns:
        The same model.

    Example:
        >>> replace_(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), report=print)
        0: torch.nn.Conv2d -> tconv.Conv2d
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    for name, module in model.named_modules():
        target = OURS.get(_plain_class(module))
        if target is None:
            if report and isinstance(module, tuple(OURS)) and not isinstance(module, tuple(TORCHS)):
                report(f"{name or 'model'}: {type(module).__name__} left alone, a class of its own")
        elif filter_fn is not None and not filter_fn(module, name):
            if report:
                report(f"{name or 'model'}: {target.__name__} left alone by filter_fn")
        else:
            _become(module, target)
            module.__dict__[MARK] = True
            if report:
                report(f"{name or 'model'}: torch.nn.{target.__name__} -> tconv.{target.__name__}")
    return model


def restore_(model: torch.nn.Module, filter_fn: Filter | None = None, *, report: Report | None = None) -> torch.nn.Module:
    """Undoes `replace_`, in place: what it replaced is torch.nn's again. Layers built as tconv's stay.

    Args:
        model: a model on which `replace_` ran, or a copy of one.
        filter_fn: called with (module, qualified name) of each replaced convolution; False leaves it alone.
        report: called with one line per restored convolution, e.g. `print`.
    Returns:
        The same model.
    """
    for name, module in model.named_modules():
        if MARK not in module.__dict__ or (filter_fn is not None and not filter_fn(module, name)):
            continue
        target = TORCHS.get(_plain_class(module))
        if target is None:
            continue  # the user gave it another class since
        _become(module, target)
        del module.__dict__[MARK]
        if report:
            report(f"{name or 'model'}: tconv.{target.__name__} -> torch.nn.{target.__name__}")
    return model


def _plain_class(module: torch.nn.Module) -> type:
    """The class of a module without the one that torch's parametrize puts in front."""
    cls = type(module)
    return cls.__base__ if parametrize.is_parametrized(module) else cls  # type: ignore[return-value]


def _become(module: torch.nn.Module, target: type) -> None:
    if parametrize.is_parametrized(module):
        members = {k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), members)
    module.__class__ = target
