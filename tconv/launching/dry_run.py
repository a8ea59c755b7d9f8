"""Calls that are planned and recorded but not computed."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tconv.planning.device import Device


@dataclass(frozen=True)
class Dry:
    """How calls are made that are not computed.

    Attributes:
        device: what to plan for, tensors being anywhere; None for the tensors' own device.
    """

    device: Device | None = None


DRY: contextvars.ContextVar[Dry | None] = contextvars.ContextVar("tconv_dry", default=None)


@contextlib.contextmanager
def dry_run(device: Device | None = None) -> Iterator[None]:
    """Calls made in the block, by this thread, and their backward passes, are planned and recorded but not computed.

    Args:
        device: plan for this one, and take tensors on any device, such as "meta".
    """
    token = DRY.set(Dry(device))
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward runs in this thread too
            yield
    finally:
        DRY.reset(token)
