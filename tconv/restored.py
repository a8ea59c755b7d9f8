"""`restored`: gives layers torch's classes within a block, for tools that look at `type(module)`."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from tconv.subclasses import theirs
from tconv.swap import become, checked, plain_class

COPIED = "_tconv_restored"  # set on a layer within a block, to recognise copies of it


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Gives a model's tconv layers torch.nn's classes within a block, and tconv's classes back after it.

    For tools that find convolutions by `type(module)`: FLOP counters, fusion, quantization. Unlike `restore_`, it includes
    layers created as tconv's, and it undoes itself. A layer whose class `replace_` derived from a user's class has the user's
    class within the block. Users' subclasses of tconv's layers stay as they are.

    After the block, even if it raises, these have the class that they had before:

    - every layer in the model at the start of the block, wherever it is by then, unless the tool gave it another class;
    - copies of those layers that the tool put into the model, such as a convolution with a folded batch norm.

    torch.nn layers that the tool created stay torch.nn's. So do layers of another model that the tool returned, a copy for
    example: use `tconv.replace_` on that.

    Args:
        model: any module; may itself be a convolution. If blocks are nested, the outermost one does all the work.
    Yields:
        The same model.
    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import tconv
        >>> model = torch.nn.Sequential(tconv.Conv2d(3, 8, 3))
        >>> with restored(model):
        ...     print(type(model[0]) is torch.nn.Conv2d)
        True
        >>> type(model[0]) is tconv.Conv2d
        True
    """
    checked("restored", model)
    block = uuid.uuid4().hex  # not a counter: a pickled copy of the model may outlive the process
    layers = [(module, cls, torchs) for module in model.modules() if (torchs := theirs(cls := plain_class(module)))]
    try:
        for i, (module, _, torchs) in enumerate(layers):
            become(module, torchs)
            module.__dict__[COPIED] = block, i
        yield model
    finally:
        for module, cls, _ in layers:
            _return(module, cls)
            module.__dict__.pop(COPIED, None)
        for module in model.modules():
            of, i = module.__dict__.get(COPIED, (None, 0))
            if of == block:
                _return(module, layers[i][1])
                del module.__dict__[COPIED]


def _return(module: torch.nn.Module, cls: Any) -> None:
    """Gives a module its tconv class back. A lazy layer that was called gets the class that it becomes."""
    for ours in (cls, getattr(cls, "cls_to_become", None)):
        if ours is not None and plain_class(module) is theirs(ours):
            become(module, ours)
            break
