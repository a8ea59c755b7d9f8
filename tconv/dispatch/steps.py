"""The steps of an epilogue, as a call asks for them, and as PyTorch's functions compute them one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from tconv.launching.cache import BoundedCache
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


class Steps(NamedTuple):
    """The keyword arguments of a call that ask for an epilogue, as the caller gave them; see `tconv.functional`."""

    activation: Any = None
    negative_slope: Any = 0.01
    residual: Any = None
    residual_position: Any = "before"
    scale: Any = None
    shift: Any = None
    stepwise: bool = False
    recompute: bool = False

    def check_kinds(self) -> None:
        """Raises ValueError, with the argument's name, for what no call can have."""
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
    def given(self) -> dict[str, Any]:
        """The arguments that are not their defaults."""
        return {name: value for name, value in self._asdict().items() if value is not self._field_defaults[name]}

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

    def check_tensors(self, shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError, with the argument's name, unless the tensors fit a result of this shape, dtype and device."""
        for name, t in self.tensors.items():
            wanted = shape if name == "residual" else (channels,)
            if tuple(t.shape) != tuple(wanted):
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
