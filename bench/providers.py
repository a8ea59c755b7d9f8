"""Who computes a layer: torch.nn in both layouts, tconv in both, and peers where they are installed.

A provider turns operands into a call per pass, or raises Missing with the reason why it has none. Calls are below
autograd, aten's operators and tconv's launches, but for "step": forward and backward as a training step makes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.layers import Layer
from tconv.dispatch import autograd, entry
from tconv.launching import launch
from tconv.launching.arguments import INTERPRET
from tconv.launching.launch import form_of
from tconv.launching.memory_format import result_is_channels_last, shaped, weight_format
from tconv.planning import problem
from tconv.planning.problem import PREDICTED, Geometry
from tconv.records.book import book
from tconv.records.key import machine
from tconv.tune import tuner
from tconv.tune.subject import Asked, Subject

SINGLE = problem.PASSES  # calls of one pass, below autograd
PASSES = (*SINGLE, "step")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
LAYOUTS = ("contiguous", "channels_last")
aten = torch.ops.aten


class Missing(Exception):
    """A provider is not installed, or has no kernel for a layer or pass; the text says which."""


@dataclass
class Operands:
    """A layer's tensors: x, w, b (where the layer has a bias), dy, in one precision and layout, of random numbers."""

    layer: Layer
    layout: str
    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor | None
    dy: torch.Tensor

    def in_layout(self, layout: str) -> Operands:
        """The same numbers in another layout."""

        def put(t: torch.Tensor) -> torch.Tensor:
            form = shaped(t.shape, layout == "channels_last", t.dtype)
            if t.stride() == form.stride():
                return t
            return torch.empty_strided(form.shape, form.stride(), dtype=t.dtype, device=t.device).copy_(t)

        return Operands(self.layer, layout, put(self.x), put(self.w), self.b, put(self.dy))

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of torch.nn.functional's function."""
        a = self.layer
        found = {"stride": a.stride, "padding": a.padding, "dilation": a.dilation, "groups": a.groups}
        return found | {"output_padding": a.output_padding} if a.transposed else found

    @property
    def aten(self) -> tuple[Any, ...]:
        """The arguments of aten::convolution behind the tensors."""
        a = self.layer
        return a.stride, a.padding, a.dilation, a.transposed, a.output_padding, a.groups


def operands(layer: Layer, precision: str, device: str) -> Operands:
    """Random operands in torch's default layout; weights are scaled so that outputs are of the size of the inputs."""
    dtype = PRECISIONS[precision]
    p = layer.problem
    y = p.shape("x" if layer.transposed else "y")
    scale = (layer.x[1] // layer.groups * p.taps) ** -0.5
    x, w, dy = (torch.randn(shape, device=device, dtype=dtype) for shape in (layer.x, layer.w, y))
    w *= scale
    b = torch.randn(layer.k, device=device, dtype=dtype) if layer.bias else None
    return Operands(layer, "contiguous", x, w, b, dy)


class Held:
    """The operands of one layer and precision at a time, in each layout; made when first asked for.

    Args:
        device: where they are.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.key: tuple[Layer, str] | None = None
        self.made: dict[str, Operands] = {}

    def get(self, layer: Layer, precision: str, layout: str) -> Operands:
        """The operands, the same numbers in every layout."""
        if self.key != (layer, precision):
            self.key, self.made = None, {}  # let go of the last layer's before there are others
            torch.manual_seed(0)
            self.made["contiguous"] = operands(layer, precision, self.device)
            self.key = layer, precision
        if layout not in self.made:
            self.made[layout] = self.made["contiguous"].in_layout(layout)
        return self.made[layout]


def set_precision(precision: str) -> None:
    """Torch's flags for fp32 convolutions, which tconv obeys too: TF32 or not."""
    cudnn, on = torch.backends.cudnn, precision == "tf32"
    cudnn.allow_tf32 = on  # the older flag too: what reads it must not find the two at odds
    cudnn.fp32_precision = "tf32" if on else "ieee"


def torch_nn(o: Operands, pass_: str) -> Callable[[], Any]:
    """cuDNN, through aten."""
    if pass_ == "fprop":
        return lambda: aten.convolution.default(o.x, o.w, o.b, *o.aten)
    if pass_ == "step":
        return _step(function_of(F, o.layer), o)
    mask = [pass_ == "dgrad", pass_ == "wgrad", False]
    index = mask.index(True)
    return lambda: aten.convolution_backward.default(o.dy, o.x, o.w, None, *o.aten, mask)[index]


def tconv_(o: Operands, pass_: str) -> Callable[[], Any]:
    """Our kernels by the planner's own choices: what was measured does not count, nor cudnn.benchmark, which is torch.nn's."""
    if o.x.is_cuda or INTERPRET:
        if pass_ == "step":
            return _step(_predicted(o.layer), o)
        if pass_ == "fprop":
            return lambda: _predicted(o.layer)(o.x, o.w, o.b, **o.settings)
        channels_last = result_is_channels_last(o.x, o.w)
        of_weight = weight_format(o.w, channels_last)
        g = Geometry(o.layer.problem, channels_last, dw_channels_last=of_weight, policy=PREDICTED)
        if pass_ == "dgrad":
            return lambda: autograd.convolve(not o.layer.transposed, o.dy, o.w, None, g)
        pair = (o.x, o.dy) if o.layer.transposed else (o.dy, o.x)  # exchanged, like all else of a transposed layer
        return lambda: autograd.wgrad(*pair, g)
    raise Missing("tconv's kernels need a GPU or TRITON_INTERPRET=1")


def _predicted(layer: Layer) -> Callable[..., torch.Tensor]:
    """tconv.functional's function for a layer, with the planner's own choices."""
    torchs = function_of(F, layer)

    def function(
        x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any, output_padding: Any = 0
    ) -> torch.Tensor:
        y = entry.convolve(layer.transposed, layer.rank, x, w, b, stride, padding, output_padding, groups, dilation, PREDICTED)
        if y is not None:
            return y
        more = {"output_padding": output_padding} if layer.transposed else {}
        return torchs(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups, **more)

    return function


def subject(o: Operands, pass_: str) -> Subject:
    """A pass of a layer, for the tuner."""
    channels_last, transposed = result_is_channels_last(o.x, o.w), o.layer.transposed
    x, y = (o.dy, o.x) if transposed else (o.x, o.dy)  # of the problem
    first, second, like = {"fprop": (x, o.w, y), "dgrad": (y, o.w, x), "wgrad": (y, x, o.w)}[pass_]
    last = weight_format(o.w, channels_last) if pass_ == "wgrad" else channels_last
    forward = pass_ == ("dgrad" if transposed else "fprop")
    bias = form_of(o.b) if forward and o.b is not None else None
    result = form_of(shaped(like.shape, last, like.dtype))
    return Subject(pass_, o.layer.problem, (form_of(first), form_of(second)), bias, result)


def auto(o: Operands, pass_: str) -> Callable[[], Any]:
    """What `tconv.tune` chooses, the fastest of our plans or torch's kernel. A pass that was not measured is measured first."""
    if not (o.x.is_cuda or INTERPRET):
        raise Missing("tconv's kernels need a GPU or TRITON_INTERPRET=1")
    # The tuner's passes are the problem's; a transposed layer's forward is its dgrad, and so on.
    exchanged = {"fprop": "dgrad", "dgrad": "fprop"} if o.layer.transposed else {}
    asked = subject(o, exchanged.get(pass_, pass_))
    device, planned = tuner.device_here()
    tuner.tune_passes([Asked(asked)], device, planned, progress=False)
    found = book().measured_here(machine(planned.name), asked.cell())
    if found is None or found.torch_is_faster:
        return torch_nn(o, pass_)
    made = asked.launch(planned, found.plan)
    pair = (o.x, o.w) if pass_ == "fprop" else (o.dy, o.w)
    if pass_ == "wgrad":
        pair = (o.x, o.dy) if o.layer.transposed else (o.dy, o.x)
        return lambda: launch.execute(made, False, None, pair)
    b = o.b if pass_ == "fprop" else None
    return lambda: launch.convolve(made, *pair, b, False)


def inductor(o: Operands, pass_: str) -> Callable[[], Any]:
    """Inductor's Triton templates."""
    if not o.x.is_cuda:
        raise Missing("Inductor's Triton templates need a GPU")
    # All layers' graphs have one code object: without a reset the eighth is the last that is compiled, the rest run eagerly.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options = {"max_autotune": True, "max_autotune_conv_backends": "TRITON", "max_autotune_gemm_backends": "TRITON"}
    function = torch.compile(function_of(F, o.layer), options=options, dynamic=False)
    return lambda: function(o.x, o.w, o.b, **o.settings)


def flag_gems(o: Operands, pass_: str) -> Callable[[], Any]:
    """FlagGems' Triton kernels."""
    import flag_gems as gems

    function = function_of(gems, o.layer)
    if pass_ == "fprop":
        return lambda: function(o.x, o.w, bias=o.b, **o.settings)
    if pass_ == "step":
        return _step(function, o)
    x, w = o.x.detach().requires_grad_(pass_ == "dgrad"), o.w.detach().requires_grad_(pass_ == "wgrad")
    y = function(x, w, bias=None, **o.settings)
    return lambda: torch.autograd.grad(y, x if pass_ == "dgrad" else w, o.dy, retain_graph=True)[0]


def fla(o: Operands, pass_: str) -> Callable[[], Any]:
    """fla's causal depthwise conv1d, on [batch, time, channels]; a layer that pads both ends gets its last outputs too."""
    from fla.modules.causal_conv1d import causal_conv1d

    taps = o.layer.kernel[0]
    x, w = F.pad(o.x.transpose(1, 2), (0, 0, 0, taps - 1)), o.w.squeeze(1)
    return lambda: causal_conv1d(x, w, o.b)[0].transpose(1, 2)


def _causal(layer: Layer) -> bool:
    once = layer.rank == 1 and not layer.transposed and (*layer.stride, *layer.dilation) == (1, 1)
    return once and layer.family == "depthwise" and layer.k == layer.x[1] and layer.padding[0] == layer.kernel[0] - 1


@dataclass(frozen=True)
class Provider:
    """How a provider makes a call of operands and a pass, what it takes, and the package it needs."""

    call: Callable[[Operands, str], Callable[[], Any]]
    takes: Callable[[Layer, str, str], bool] = lambda layer, pass_, layout: True
    package: str | None = None
    version: str = ""


PROVIDERS = {
    "torch.nn": Provider(torch_nn),
    "tconv": Provider(tconv_),
    "auto": Provider(auto, lambda layer, pass_, layout: pass_ in SINGLE),
    # Forward only, 2-D and 3-D, dilation 1.
    "inductor": Provider(
        inductor,
        lambda layer, pass_, _: pass_ == "fprop" and layer.rank > 1 and not layer.transposed and max(layer.dilation) == 1,
    ),
    # Its weight gradient is wrong for channels_last weights, and its conv3d has none.
    "flag_gems": Provider(
        flag_gems,
        lambda layer, pass_, layout: (
            not layer.transposed and layout == "contiguous" and (pass_ == "fprop" or layer.rank < 3)
        ),
        "flag_gems", "5.0.2",
    ),
    "fla": Provider(
        fla, lambda layer, pass_, layout: pass_ == "fprop" and layout == "channels_last" and _causal(layer), "fla", "0.6.0"
    ),
}  # fmt: skip


def absent() -> dict[str, str]:
    """Peers that are not installed, and what needs a GPU where there is none, with a line for each."""
    found = {
        name: f"{name} is not installed ({p.package} {p.version}): left out"
        for name, p in PROVIDERS.items()
        if p.package and importlib.util.find_spec(p.package) is None
    }
    return found if torch.cuda.is_available() else found | {"auto": "auto measures, which needs a GPU: left out"}


def function_of(library: Any, layer: Layer) -> Callable[..., torch.Tensor]:
    """A library's function of torch.nn.functional's name for a layer."""
    function: Callable[..., torch.Tensor] = getattr(library, f"conv{'_transpose' if layer.transposed else ''}{layer.rank}d")
    return function


def _step(function: Callable[..., torch.Tensor], o: Operands) -> Callable[[], Any]:
    """Forward and backward by autograd, all gradients."""
    leaves = [t.detach().requires_grad_() for t in (o.x, o.w, o.b) if t is not None]
    x, w, b = leaves if len(leaves) == 3 else (*leaves, None)
    return lambda: torch.autograd.grad(function(x, w, b, **o.settings), leaves, o.dy)


def reference(o: Operands, pass_: str) -> tuple[torch.Tensor, ...]:
    """What a pass should give, in fp32 without TF32 (fp64 for fp32 operands on a CPU), by torch."""
    wide = torch.float32 if o.x.is_cuda else torch.float64
    with exact():
        up = Operands(o.layer, o.layout, o.x.to(wide), o.w.to(wide), None if o.b is None else o.b.to(wide), o.dy.to(wide))
        if pass_ == "step":
            return tuple(torch_nn(up, pass_)())
        return (torch_nn(up, pass_)(),)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No TF32, and no search for the fastest algorithm, while the block runs."""
    cudnn = torch.backends.cudnn
    before = "tf32" if cudnn.conv.fp32_precision == "tf32" else "fp32"
    search, cudnn.benchmark = cudnn.benchmark, False
    set_precision("fp32")
    try:
        yield
    finally:
        set_precision(before)
        cudnn.benchmark = search
