"""What surrounds a convolution: padding before it, bias, activation and residual after it, normalisation, by tconv's kernels.

    python -m pytest -p bench.stage --record bench/results/DIR/around.jsonl bench/test_around.py

Beside it run torch's sequence of functions, in the same memory format, and that sequence under torch.compile. All three are
compared with fp64 before they are timed. Forward only, and forward and backward ("step").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tconv
from bench.correctness import relative_error
from bench.stage import FATAL, first_line
from tconv.dispatch.sides import for_pad
from tconv.dispatch.steps import SEQUENCE
from tests.oracle import to_channels_last

# Relative errors in bf16, each step of a sequence rounded. Numbers near zero may get the other sign, and relu another gradient.
TOLERANCE = {"fprop": 1e-2, "step": 0.15}
IN_FP8 = 0.06  # both operands have four digits


@dataclass(frozen=True)
class Around:
    """A convolution with what surrounds it. Shapes are torch's; padding may differ by side.

    Attributes:
        padding_mode: of torch.nn.functional.pad if not "zeros".
    """

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    padding: Any = 0
    stride: int = 1
    groups: int = 1
    padding_mode: str = "zeros"
    epilogue: dict[str, Any] = field(default_factory=dict)
    residual: bool = False

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    def tiny(self) -> Around:
        """The same with extents that Triton's interpreter takes in a moment."""
        groups = 4 if self.groups > 1 else 1
        w = 4, 4 // groups, *self.w[2:]
        return replace(self, x=(1, 4, *(6 for _ in self.x[2:])), w=w, groups=groups)

    def sequence(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
        """Returns the result by torch's functions."""
        if self.padding:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, for_pad(self.padding, self.rank), mode=mode)
        y: torch.Tensor = getattr(F, f"conv{self.rank}d")(x, w, b, self.stride, 0, 1, self.groups)
        y = y if r is None else y + r
        return SEQUENCE[self.epilogue["activation"]](y, 0.01) if "activation" in self.epilogue else y

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
        """Returns the result by tconv."""
        function = getattr(tconv.functional, f"conv{self.rank}d")
        more = self.epilogue | {"padding_mode": self.padding_mode, "residual": r}
        y: torch.Tensor = function(x, w, b, self.stride, self.padding, 1, self.groups, **more)
        return y

    def operands(self, random: Any) -> list[torch.Tensor | None]:
        """Returns x, w, b and the residual, or None in its place, of numbers by `random`."""
        x, w, b = random(*self.x), random(*self.w) * (self.w[1] * len(self.w)) ** -0.5, random(self.w[0])
        return [x, w, b, random(*self.sequence(x, w, b, None).shape) if self.residual else None]


@dataclass(frozen=True)
class InFp8(Around):
    """The same, by tconv in fp8, the rounding of x included: its scale is known, and the weight is rounded once."""

    passes = ("fprop",)

    def tiny(self) -> Around:
        return replace(super().tiny(), x=(1, 16, 6, 6), w=(16, 16, 3, 3))

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
        """Returns the result by tconv."""
        weight, of_weight = _rounded(w)
        x, of_x = tconv.fp8.quantize(x, 6 / 448)  # of normal numbers, hardly any is beyond 6
        scales = {"input_scale": of_x, "weight_scale": of_weight}
        return tconv.fp8.conv2d(x, weight, b, self.stride, self.padding, 1, self.groups, residual=r, **scales, **self.epilogue)


@functools.lru_cache(1)
def _rounded(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tconv.fp8.quantize(w, dim=0)


@dataclass(frozen=True)
class Normalised:
    """A normalisation with silu, as in the decoders of AutoencoderKL (groups) and of Wan (RMS, without groups)."""

    name: str
    x: tuple[int, ...]
    groups: int | None = None

    def tiny(self) -> Normalised:
        """The same with extents that Triton's interpreter takes in a moment."""
        return replace(self, x=(1, 8, *(6 for _ in self.x[2:])), groups=None if self.groups is None else 4)

    def sequence(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """Returns the result by torch's functions, as the models call them."""
        if self.groups is not None:
            return F.silu(F.group_norm(x, self.groups, w, b, 1e-6))
        return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * w.view(-1, *(1,) * (x.dim() - 2)))

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """Returns the result by tconv."""
        if self.groups is not None:
            return tconv.functional.group_norm_silu(x, self.groups, w, b, 1e-6)
        return tconv.functional.rms_norm_silu(x, w, eps=1e-24 / x.shape[1])

    def operands(self, random: Any) -> list[torch.Tensor | None]:
        """Returns x, w and b, or None in its place, of numbers by `random`."""
        return [random(*self.x), random(self.x[1]), None if self.groups is None else random(self.x[1])]


@dataclass(frozen=True)
class Streamed:
    """A chunk of a video, which a causal convolution reads after its cache of two frames, as decoders of videos run.

    The result is the output and the next cache. There is no step, since a decoder is not trained so.
    """

    name: str
    x: tuple[int, ...]
    passes = ("fprop",)

    def tiny(self) -> Streamed:
        """The same with extents that Triton's interpreter takes in a moment."""
        return replace(self, x=(1, 4, 3, 6, 6))

    def sequence(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> Any:
        """Returns the result by torch's functions, as the models call them."""
        whole = torch.cat((cache, x), 2)
        return F.conv3d(whole, w, b, padding=(0, 1, 1)), whole[:, :, -2:].clone()

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, cache: torch.Tensor) -> Any:
        """Returns the result by tconv."""
        return tconv.functional.conv3d_stream(x, w, b, cache, padding=CAUSAL)

    def operands(self, random: Any) -> list[torch.Tensor | None]:
        """Returns x, w, b and the cache, of numbers by `random`."""
        n, c, _, *frame = self.x
        return [random(*self.x), random(c, c, 3, 3, 3) * (27 * c) ** -0.5, random(c), random(n, c, 2, *frame)]


@dataclass(frozen=True)
class Sequences:
    """The causal depthwise convolution of a state-space model, with SiLU, by `causal_conv1d`.

    Attributes:
        sequences: how many of equal length lie one after the other along the time of x.
    """

    name: str
    x: tuple[int, ...]
    sequences: int = 1

    def tiny(self) -> Sequences:
        """The same with extents that Triton's interpreter takes in a moment."""
        return replace(self, x=(1, 4, 4 * self.sequences))

    def sequence(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns the result by torch's functions."""
        parts = x.unflatten(2, (self.sequences, -1)).squeeze(0).transpose(0, 1)
        y = F.silu(F.conv1d(F.pad(parts, (3, 0)), w, b, groups=w.shape[0]))
        return y.transpose(0, 1).flatten(1).unsqueeze(0)

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns the result by tconv."""
        cu, length = None, x.shape[2] // self.sequences
        if self.sequences > 1:
            cu = torch.arange(self.sequences + 1, dtype=torch.int32, device=x.device) * length
        y: torch.Tensor = tconv.functional.causal_conv1d(x, w, b, cu_seqlens=cu, activation="silu")
        return y

    def operands(self, random: Any) -> list[torch.Tensor | None]:
        """Returns x, w and b, of numbers by `random`."""
        return [random(*self.x), random(self.x[1], 1, 4) / 2, random(self.x[1])]


CAUSAL = ((2, 0), 1, 1)
AROUND: list[Around | Normalised | Streamed | Sequences] = [
    Around("resnet_relu", (64, 256, 14, 14), (256, 256, 3, 3), 1, epilogue={"activation": "relu"}, residual=True),
    Around("unet_silu", (8, 320, 64, 64), (320, 320, 3, 3), 1, epilogue={"activation": "silu"}),
    Around("unet_residual", (8, 320, 64, 64), (320, 320, 3, 3), 1, residual=True),
    Around("wan_vae_causal", (1, 96, 5, 240, 416), (96, 96, 3, 3, 3), CAUSAL),
    Around("wan_vae_causal_silu", (1, 192, 5, 120, 208), (192, 192, 3, 3, 3), CAUSAL, epilogue={"activation": "silu"}),
    Around("hunyuan_vae_replicate", (1, 128, 9, 128, 128), (128, 128, 3, 3, 3), CAUSAL, padding_mode="replicate"),
    Around("style_reflect", (4, 128, 256, 256), (128, 128, 3, 3), 1, padding_mode="reflect", epilogue={"activation": "relu"}),
    Around("cyclegan_residual_reflect", (8, 256, 64, 64), (256, 256, 3, 3), 1, padding_mode="reflect"),
    Around("cyclegan_stem_reflect", (8, 3, 256, 256), (64, 3, 7, 7), 3, padding_mode="reflect"),
    Around("mamba_causal_k4", (1, 12288, 16384), (12288, 1, 4), ((3, 0),), groups=12288, epilogue={"activation": "silu"}),
    Around("seanet_causal_k7", (4, 64, 120000), (64, 64, 7), ((6, 0),), epilogue={"activation": "leaky_relu"}),
    InFp8("resnet_relu_fp8", (64, 256, 14, 14), (256, 256, 3, 3), 1, epilogue={"activation": "relu"}, residual=True),
    InFp8("vae_512_fp8", (1, 512, 128, 128), (512, 512, 3, 3), 1, epilogue={"activation": "silu"}),
    Normalised("sd_vae_norm_128_512", (1, 128, 512, 512), 32),
    Normalised("sd_vae_norm_256_512", (1, 256, 512, 512), 32),
    Normalised("sd_vae_norm_512_128", (1, 512, 128, 128), 32),
    Normalised("wan_vae_norm_96", (1, 96, 5, 240, 416)),
    Normalised("wan_vae_norm_384", (1, 384, 5, 60, 104)),
    Streamed("wan_vae_stream_96", (1, 96, 4, 240, 416)),
    Streamed("wan_vae_stream_384", (1, 384, 4, 60, 104)),
    Streamed("hunyuan_vae_stream_128", (1, 128, 8, 128, 128)),
    Sequences("mamba_sequences_1", (1, 12288, 16384)),
    Sequences("mamba_sequences_8", (1, 12288, 16384), 8),
]
PROVIDERS = ("sequence", "compile", "tconv")
CELLS = [
    (around, layout, pass_, provider)
    for around in AROUND
    for layout in ("contiguous", "channels_last")
    for pass_ in getattr(around, "passes", ("fprop", "step"))
    for provider in PROVIDERS
]


@pytest.mark.parametrize(
    ("around", "layout", "pass_", "provider"), CELLS, ids=["-".join((a.name, *rest)) for a, *rest in CELLS]
)
def test_around(around, layout, pass_, provider, device, tiny, limits, timed, record_property):
    shown = around.tiny() if tiny else around
    line = {
        "layer": around.name, "family": "around", "precision": "bf16", "pass": pass_, "provider": provider, "layout": layout,
    }  # fmt: skip
    if tiny and provider == "compile":
        pytest.skip("nothing to compile for in a dry run")
    try:
        torch.manual_seed(0)
        tensors = operands(shown, device, layout)
        function = shown.ours if provider == "tconv" else shown.sequence
        function = torch.compile(function) if provider == "compile" else function
        with tconv.recording() as calls:
            got = results(function, tensors, pass_)
        right = results(shown.sequence, [None if t is None else t.double() for t in tensors], pass_)
        line["error_norm"] = relative_error(got, right)
        del got, right
        if line["error_norm"] > (IN_FP8 if isinstance(around, InFp8) else TOLERANCE[pass_]):
            line["error"] = f"wrong result: relative error {line['error_norm']:.3g}"
        elif provider == "tconv" and not all(c.ours for c in calls):
            line["error"] = "not ours: " + "; ".join(str(c) for c in calls if not c.ours)
        else:
            line |= timed(lambda: results(function, tensors, pass_))
    except Exception as e:  # a cell that says so; the run goes on
        line["error"] = first_line(e)
        if any(text in str(e) for text in FATAL):
            record_property("cell", line)
            raise
    record_property("cell", line)
    if provider == "tconv" and "error" in line:
        pytest.fail(line["error"])


def operands(shown: Around | Normalised | Streamed | Sequences, device: str, layout: str) -> list[torch.Tensor | None]:
    """Returns the tensors that are given to its functions."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    given = shown.operands(random)
    if layout == "channels_last":
        given = [to_channels_last(t) if t is not None and t.dim() > 2 else t for t in given]
    return given


def results(function: Any, tensors: list[torch.Tensor | None], pass_: str) -> tuple[torch.Tensor, ...]:
    """Returns the result of a forward pass, or of a step with the gradients of all tensors."""
    if pass_ == "fprop":
        with torch.no_grad():
            found = function(*tensors)
            return found if isinstance(found, tuple) else (found,)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))
