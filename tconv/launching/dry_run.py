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
    """Settings of a `dry_run` block.

    Attributes:
        device: the device to plan for, wherever the tensors are; None for the tensors' own device.
        left: why calls are left to torch, in a block of `left_to_torch`; else empty.
    """

    device: Device | None = None
    left: str = ""


DRY: contextvars.ContextVar[Dry | None] = contextvars.ContextVar("tconv_dry", default=None)


@contextlib.contextmanager
def dry_run(device: Device | None = None) -> Iterator[None]:
    """Plans and records the calls that this thread makes in the block, and their backward passes, without computing them.

    Args:
        device: the device to plan for; tensors may then be on any device, such as "meta". None for the tensors' own device.
    """
    token = DRY.set(Dry(device))
    try:
        with torch.autograd.set_multithreading_enabled(False):  # so that a GPU's backward runs in this thread too
            yield
    finally:
        DRY.reset(token)


@contextlib.contextmanager
def left_to_torch(why: str) -> Iterator[None]:
    """Leaves the calls that this thread makes in the block to torch, also while `enable()` is active."""
    token = DRY.set(Dry(left=why))
    try:
        yield
    finally:
        DRY.reset(token)
