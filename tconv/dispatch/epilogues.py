"""Convolutions with an epilogue: a per-channel scale and shift, a residual and an activation, in the convolution's own kernel.

A call is computed by a kernel with an epilogue (fused.py) where kernels may run directly. Elsewhere, in torch.compile, under
functorch's transforms, where a scale or shift needs a gradient, and where the convolution itself falls back to torch, it is
computed as a sequence: the convolution as it always is, then PyTorch's functions. `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv.dispatch.autocast import cast
from tconv.dispatch.check import CallArguments
from tconv.dispatch.context import PLAIN, why_ineligible
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.entry import PUBLIC, geometry, kernels_for
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant
from tconv.planning.epilogue import ACTIVATIONS, Epilogue
from tconv.planning.problem import Geometry

SEQUENCE: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "relu": lambda v, _: F.relu(v),
    "leaky_relu": lambda v, slope: F.leaky_relu(v, slope),
    "silu": lambda v, _: F.silu(v),
    "gelu": lambda v, _: F.gelu(v),
    "gelu_tanh": lambda v, _: F.gelu(v, approximate="tanh"),
    "sigmoid": lambda v, _: torch.sigmoid(v),
    "tanh": lambda v, _: torch.tanh(v),
    "hardswish": lambda v, _: F.hardswish(v),
}
POSITIONS = ("before", "after")


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The keyword arguments of a call that ask for an epilogue, as the caller gave them; see `tconv.functional`."""

    activation: Any = None
    negative_slope: Any = 0.01
    residual: Any = None
    residual_position: Any = "before"
    scale: Any = None
    shift: Any = None
    stepwise: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {self.activation!r}")
        if self.residual_position not in POSITIONS:
            raise ValueError(f"residual_position must be one of {POSITIONS}, got {self.residual_position!r}")
        if isinstance(self.negative_slope, bool) or not isinstance(self.negative_slope, (int, float)):
            raise ValueError(f"negative_slope must be a number, got {self.negative_slope!r}")
        for name, t in self.tensors.items():
            if not isinstance(t, (torch.Tensor, Proxy)):
                raise ValueError(f"{name} must be a tensor, got {type(t).__name__}")

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors among them, by the name of the argument."""
        named = {"residual": self.residual, "scale": self.scale, "shift": self.shift}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def epilogue(self) -> Epilogue:
        """What the kernel does, without what it keeps for the gradient."""
        per_channel = [t.dtype for t in (self.scale, self.shift) if t is not None]
        return Epilogue(
            self.activation or "", float(self.negative_slope) if self.activation == "leaky_relu" else 0.0,
            self.scale is not None, self.shift is not None, torch.float32 in per_channel,
            "" if self.residual is None else self.residual_position, self.stepwise,
        )  # fmt: skip

    def check(self, shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError, with the argument's name, unless the tensors fit a result of this shape, dtype and device."""
        for name, t in self.tensors.items():
            wanted = shape if name == "residual" else (channels,)
            if tuple(t.shape) != wanted:
                raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(t.shape)}")
            dtypes = (dtype,) if name == "residual" else (dtype, torch.float32)
            if t.dtype not in dtypes:
                raise ValueError(f"{name} must be of {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {t.dtype}")
            if t.device != device:
                raise ValueError(f"{name} must be on {device}, got {t.device}")


_fused: BoundedCache[Any, Geometry] = BoundedCache()


def with_epilogue(g: Geometry, epilogue: Epilogue) -> Geometry:
    """Returns a geometry with an epilogue: always the same object for the same two, since launches are cached by it."""
    if g.dry:
        return dataclasses.replace(g, epilogue=epilogue)
    found = _fused.get((g, epilogue))
    if found is None:
        found = _fused[g, epilogue] = dataclasses.replace(g, epilogue=epilogue)
    return found


def convolve(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps, policy: str = "auto") -> torch.Tensor:
    """Computes one of the six convolutions with an epilogue.

    Args:
        asked: which of the six, and its parameters.
        x, w, b: input, weight and bias.
        steps: the epilogue.
        policy: as in `Geometry`.
    Raises:
        ValueError: a tensor of the epilogue does not fit the result.
        Whatever torch raises for the convolution.
    """
    for t in () if is_dynamo_compiling() else (x, w, b, *steps.tensors.values()):
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b, steps)
    if is_dynamo_compiling() or not steps.epilogue:
        return _by_steps(asked, x, w, b, steps)
    try:
        return _by_kernel(asked, x, w, b, steps, policy)
    except Fallback as e:
        why = str(e)
    y = _by_steps(asked, x, w, b, steps)
    record_call(Call(f"epilogue of {_public(asked).__name__}", None, None, why))
    return y


def _public(asked: CallArguments) -> Callable[..., torch.Tensor]:
    return PUBLIC[asked.transposed][asked.rank]


def _how(asked: CallArguments) -> tuple[Any, ...]:
    """Returns the parameters of a call in the order of the public function."""
    if asked.transposed:
        return asked.stride, asked.padding, asked.output_padding, asked.groups, asked.dilation
    return asked.stride, asked.padding, asked.dilation, asked.groups


def _traced(tracer: Any, asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps) -> torch.Tensor:
    """Returns the proxy that torch.fx records: a call of the public function."""
    given = {f.name: getattr(steps, f.name) for f in dataclasses.fields(steps) if getattr(steps, f.name) is not f.default}
    call: torch.Tensor = tracer.create_proxy("call_function", _public(asked), (x, w, b, *_how(asked)), given)
    return call


def _by_steps(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps) -> torch.Tensor:
    """Computes a call as a sequence: the convolution, then PyTorch's functions."""
    y = _public(asked)(x, w, b, *_how(asked))
    steps.check(tuple(y.shape), y.shape[-1 - asked.rank], y.dtype, y.device)
    return followed(y, steps, asked.rank)


def followed(y: torch.Tensor, steps: Steps, rank: int) -> torch.Tensor:
    """Returns what PyTorch's functions make of a convolution's result y, (N, K, *spatial) or unbatched."""
    dtype, channel = y.dtype, (-1, *(1,) * rank)
    if steps.scale is not None:
        y = (y * steps.scale.view(channel)).to(dtype)
    if steps.shift is not None:
        y = (y + steps.shift.view(channel)).to(dtype)
    if steps.residual is not None and steps.residual_position == "before":
        y = y + steps.residual
    if steps.activation is not None:
        y = SEQUENCE[steps.activation](y, steps.negative_slope)
    if steps.residual is not None and steps.residual_position == "after":
        y = y + steps.residual
    return y


@opaque
def _by_kernel(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps, policy: str) -> torch.Tensor:
    """Computes a call by a kernel with an epilogue.

    Raises:
        Fallback: it cannot, and nothing has been launched.
        ValueError: a tensor of the epilogue does not fit the result.
    """
    tensors = [t for t in (x, w, b, *steps.tensors.values()) if t is not None]
    for t in tensors:
        if type(t) not in PLAIN:
            raise Fallback(f"a {type(t).__name__}")
    dry = DRY.get()
    device = "cuda" if dry and dry.device else x.device.type
    kernels_for(device)
    why = why_ineligible(*tensors)
    if why and not (dry and dry.device):
        raise Fallback(why)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (steps.scale, steps.shift)):
        raise Fallback("a gradient for scale or shift, which needs the convolution's own result")
    if torch.is_autocast_enabled(device):
        x, w, b = cast(device, x, w, b)
    g = geometry(asked, x, w, b, policy, is_batch_invariant())
    batched = x.dim() == asked.rank + 2
    shape = g.problem.shape("x" if asked.transposed else "y")
    steps.check(shape if batched else shape[1:], shape[1], x.dtype, x.device)
    if dry:
        g = dataclasses.replace(g, dry=True, device=dry.device)
    from tconv.dispatch import fused as kernels

    residual = steps.residual if batched or steps.residual is None else steps.residual.unsqueeze(0)
    x = x if batched else x.unsqueeze(0)
    y = kernels.convolve(asked.transposed, x, w, b, residual, steps, g)
    return y if batched else y.squeeze(0)
