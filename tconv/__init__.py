"""Convolutions for PyTorch, written by hand in Triton: drop-ins for torch.nn's six layers and their lazy forms."""

from tconv import functional
from tconv.explain import Explanation, explain
from tconv.modules import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from tconv.override import disable, enable, enabled
from tconv.plan import force
from tconv.precompile import Precompiled, precompile
from tconv.record import Call, last_calls, recording
from tconv.swap import replace_, restore_

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Explanation",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "Precompiled",
    "disable",
    "enable",
    "enabled",
    "explain",
    "force",
    "functional",
    "last_calls",
    "precompile",
    "recording",
    "replace_",
    "restore_",
]
