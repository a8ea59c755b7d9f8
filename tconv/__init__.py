"""Convolutions for PyTorch in hand-written Triton kernels: drop-ins for torch.nn's six layers and their lazy forms.

    replace_, restore_                change a model's convolution layers to tconv's, and back
    restored                          torch's classes within a block, for tools that look at `type(module)`
    enable, disable, enabled          override torch's convolutions on GPUs, in the whole process or inside one model
    is_enabled                        tells whether such an override is active
    Conv2d etc., functional           layers and functions to call directly
    FusedConv2d etc.                  layers with an activation, a residual, a scale and a shift in the convolution's kernel
    fuse_                             computes what surrounds a model's convolutions in their kernels; restore_ undoes it
    CausalConv1d, CausalConv3d        layers that read no later time, padded without a copy; a stream chunk by chunk
    GroupNormSiLU, RMSNormSiLU        normalisation, activation and padding in one kernel, in either memory format
    last_calls, recording, explain    which plan ran, or would run, and why; which calls fell back to torch, and why
    precompile                        compiles ahead of time what a model will launch
    report                            where the time of a model's convolutions goes, measured or predicted
    freeze, unfreeze                  keeps the copies of weights between calls, for inference
    tune, load_record                 measure a model's convolutions on the GPU here, and choose by what was measured
    compile_options, fuse_epilogues   torch.compile puts what follows a convolution into its kernel
    decompositions                    tconv's operators in terms of aten's, for graphs that may only have aten's
    batch_invariant                   an image's results have the same bits in every batch, inside a block
    use_batch_invariance              the same for the whole process; is_batch_invariant tells whether it holds
    force, Tile                       plans chosen by hand, for tests and measurements
    tconv.fp8                         convolutions and layers in fp8, for inference
    tconv.distributed                 convolutions of DTensors; must be imported by name

See the README and docs/ for more.
"""

from tconv import fp8, functional
from tconv.causal import CausalConv1d, CausalConv3d
from tconv.decompositions import decompositions
from tconv.explain import Explanation, explain
from tconv.freeze import freeze, unfreeze
from tconv.fuse import Fusion, fuse_
from tconv.fused import (
    FusedConv1d,
    FusedConv2d,
    FusedConv3d,
    FusedConvTranspose1d,
    FusedConvTranspose2d,
    FusedConvTranspose3d,
)
from tconv.graph_pass import compile_options, fuse_epilogues
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
from tconv.normalise import GroupNormSiLU, RMSNormSiLU
from tconv.override import disable, enable, enabled, is_enabled
from tconv.planning.batch_invariance import batch_invariant, is_batch_invariant, use_batch_invariance
from tconv.planning.plan import force
from tconv.planning.tiles import Tile
from tconv.precompile import Precompiled, precompile
from tconv.restored import restored
from tconv.swap import replace_, restore_
from tconv.tune import Report, Tuned, load_record, report, tune

__version__ = "0.1.0"

__all__ = [
    "Call",
    "CausalConv1d",
    "CausalConv3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Explanation",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedConvTranspose1d",
    "FusedConvTranspose2d",
    "FusedConvTranspose3d",
    "GroupNormSiLU",
    "Fusion",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "Precompiled",
    "RMSNormSiLU",
    "Report",
    "Tile",
    "Tuned",
    "batch_invariant",
    "compile_options",
    "decompositions",
    "disable",
    "enable",
    "enabled",
    "explain",
    "force",
    "fp8",
    "freeze",
    "functional",
    "fuse_",
    "fuse_epilogues",
    "is_batch_invariant",
    "is_enabled",
    "last_calls",
    "load_record",
    "precompile",
    "recording",
    "replace_",
    "report",
    "restore_",
    "restored",
    "tune",
    "unfreeze",
    "use_batch_invariance",
]
