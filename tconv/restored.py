"""Torch's classes for the length of a block, for tools that look at `type(module)`."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from tconv.subclasses import theirs
from tconv.swap import become, checked, plain_class

COPIED = "_tconv_restored"  # set on a layer in a block, so that its copies are known


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Within the block, tconv's layers of a model are of torch.nn's classes; after it they are tconv's again.

    For tools that find convolutions by `type(module)`: counters of operations, fusing, quantization. Unlike `restore_` it
    also takes layers built as tconv's, and it knows by itself what to undo. A layer whose class `replace_` derived from
    a user's has the user's class in the block; subclasses of tconv's layers stay as they are.

    After the block, exceptions included, these are of the class they had before it:

    - every layer that the block was entered with, wherever it is by then, unless the tool gave it another class;
    - copies of them that the tool put into the model, such as a convolution with its batch norm folded in.

    Layers of torch.nn's that the tool made anew stay torch.nn's, and so do layers of another model that the tool returned, a
    copy of the first one: `tconv.replace_` makes those tconv's.

    Args:
        model: any module; may itself be a convolution. Blocks may nest; the outermost one does all the work.
    Yields:
        The same model.
    Raises:
        TypeError: `model` is no module.

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
    block = uuid.uuid4().hex  # no number: a copy of the model may be pickled, and outlive the process
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
    """Give a module its class of tconv's back, or, to a lazy one that was called, the class it has become."""
    for ours in (cls, getattr(cls, "cls_to_become", None)):
        if ours is not None and plain_class(module) is theirs(ours):
            become(module, ours)
            break
