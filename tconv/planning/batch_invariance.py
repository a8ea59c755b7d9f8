"""Whether results must not depend on what else is in the batch: a setting of the process, which each call reads once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_process = False  # what `use_batch_invariance` was told
_blocks = 0  # how many `batch_invariant()` blocks are open, of all threads


def is_batch_invariant() -> bool:
    """Returns True if calls made now are batch-invariant: by `use_batch_invariance`, or in a `batch_invariant()` block."""
    return _process or _blocks > 0


def use_batch_invariance(mode: bool) -> None:
    """Makes the calls of the whole process batch-invariant, or no longer: see `batch_invariant`, whose blocks stay as they are.

    Raises:
        TypeError: the mode is not a bool.

    Example:
        >>> use_batch_invariance(True)
        >>> is_batch_invariant()
        True
        >>> use_batch_invariance(False)
    """
    global _process
    if not isinstance(mode, bool):
        raise TypeError(f"mode must be True or False, got {mode!r}")
    _process = mode


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the block, an image's result and input gradient have the same bits whatever else is in the batch.

    tconv then plans for eight images, whatever the batch, and does not split channels (split-K). So single images leave more
    of the device idle than they would, and large batches may have smaller tiles. The gradients of weight and bias are sums over
    the batch and are computed as ever. docs/design.md has the conditions.

    It holds for the whole process, not for the thread, until the last open block ends. A backward pass of tconv's layers and
    functions is batch-invariant if its forward pass was. Under `enable()`, in compiled graphs and in transforms, it is if the
    setting holds when it runs.

    Example:
        >>> with batch_invariant():
        ...     is_batch_invariant()
        True
    """
    global _blocks
    with _lock:
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
