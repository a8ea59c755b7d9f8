"""Convolutions for PyTorch, written by hand in Triton: drop-ins for torch.nn's six layers and their lazy forms.

    replace_, restore_                the convolutions of one model become tconv's, and torch's again
    restored                          torch's classes for the length of a block, for tools that look at `type(module)`
    enable, disable, enabled          the same of every convolution of the process, or made in one model, that runs on a GPU
    is_enabled                        whether that holds
    Conv2d and its likes, functional  layers and functions to be written where they are wanted
    last_calls, recording, explain    what ran, or would run, and why; what fell back to torch, and why
    precompile                        compiles ahead what a model will launch
    decompositions                    tconv's operators in aten's, for graphs that are to hold those alone
    force, Tile                       plans by hand, for tests and measurements
    tconv.distributed                 convolutions of DTensors; imported by its name

The README and docs/ say more.
"""

from tconv import functional
from tconv.decompositions import decompositions
from tconv.explain import Explanation, explain
from tconv.launching.record import Call, last_calls, recording
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
from tconv.override import disable, enable, enabled, is_enabled
from tconv.planning.plan import force
from tconv.planning.tiles import Tile
from tconv.precompile import Precompiled, precompile
from tconv.restored import restored
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
    "Tile",
    "decompositions",
    "disable",
    "enable",
    "enabled",
    "explain",
    "force",
    "functional",
    "is_enabled",
    "last_calls",
    "precompile",
    "recording",
    "replace_",
    "restore_",
    "restored",
]
