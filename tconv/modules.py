"""The layers: subclasses of torch.nn's that override `forward` and, where torch.nn has it, `_conv_forward`.

Nothing is derived from attributes at construction: stride, padding and the rest may be changed afterwards, weights may be
parametrized or passed in by an overriding `_conv_forward`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from tconv.functional import convolve
from tconv.guard import PLAIN

ZERO = (0,)  # per dimension


class _Name(str):
    """The `__module__` of a layer's class: on the class the true one, on an instance that of torch's layers.

    torch.fx and the tools on top of it (torchvision's extractors, quantization) take a module for a leaf of the graph, rather
    than trace what it calls, if `module.__module__` starts with "torch.nn". Pickles ask the class.
    """

    def __get__(self, instance: Any, owner: type) -> str:
        return self if instance is None else "torch.nn.modules.conv"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)  # pickles that name the class hold a plain string


class _Layer:
    """What all layers of tconv's have in common."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("tconv."):  # a user's subclass is traced into, as one of torch's layer is
            cls.__module__ = _Name(cls.__module__)

    def __prepare_scriptable__(self) -> Any:
        """TorchScript would read the Python of a layer, and say at length what of it it does not know."""
        raise NotImplementedError("torch.jit.script cannot take tconv's layers: tconv.restore_(model) first, or trace it")


class _Forward(_Layer, torch.nn.modules.conv._ConvNd):
    """What Conv1d, Conv2d and Conv3d share."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rank, x, padding = len(self.kernel_size), input, self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), ZERO
        y = convolve(False, rank, x, weight, bias, self.stride, padding, 0, self.groups, self.dilation)
        return super()._conv_forward(input, weight, bias) if y is None else y  # type: ignore[misc]


class _Transposed(_Layer, torch.nn.modules.conv._ConvTransposeNd):
    """What ConvTranspose1d, ConvTranspose2d and ConvTranspose3d share."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        y = None
        if isinstance(input, (torch.Tensor, Proxy)) and isinstance(self.padding, tuple) and self.padding_mode == "zeros":
            rank = len(self.kernel_size)
            weight, bias = _parameters(self, input)
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
            y = convolve(
                True, rank, input, weight, bias, self.stride, self.padding, tuple(output_padding), self.groups, self.dilation
            )
        return super().forward(input, output_size) if y is None else y  # type: ignore[misc]


def _parameters(layer: Any, input: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight and bias, past `Module.__getattr__`, which takes longer than all of ours, where it adds nothing.

    It does for subclasses and parametrized layers, which may compute them, and where torch.fx traces.
    """
    if type(layer) in PLAIN_LAYERS and type(input) in PLAIN:
        own = layer._parameters
        if "weight" in own and "bias" in own:
            return own["weight"], own["bias"]
    return layer.weight, layer.bias


def _forward(name: str) -> Any:
    """The `forward` of a layer that is not transposed; Python's errors mention the layer's name."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _parameters(self, input)
        return self._conv_forward(input, weight, bias)  # type: ignore[no-any-return]

    forward.__qualname__ = f"{name}.forward"
    return forward


class Conv1d(_Forward, torch.nn.Conv1d):
    """`torch.nn.Conv1d`, by tconv's kernels: (N, C, W) -> (N, K, Q)."""

    forward = _forward("Conv1d")


class Conv2d(_Forward, torch.nn.Conv2d):
    """`torch.nn.Conv2d`, by tconv's kernels: (N, C, H, W) -> (N, K, P, Q)."""

    forward = _forward("Conv2d")


class Conv3d(_Forward, torch.nn.Conv3d):
    """`torch.nn.Conv3d`, by tconv's kernels: (N, C, D, H, W) -> (N, K, Z, P, Q)."""

    forward = _forward("Conv3d")


class ConvTranspose1d(_Transposed, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`, by tconv's kernels: (N, C, W) -> (N, K, Q)."""


class ConvTranspose2d(_Transposed, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, by tconv's kernels: (N, C, H, W) -> (N, K, P, Q)."""


class ConvTranspose3d(_Transposed, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, by tconv's kernels: (N, C, D, H, W) -> (N, K, Z, P, Q)."""


class LazyConv1d(_Forward, torch.nn.LazyConv1d):  # type: ignore[misc]
    """`torch.nn.LazyConv1d`: becomes `Conv1d` on its first call."""

    cls_to_become: Any = Conv1d


class LazyConv2d(_Forward, torch.nn.LazyConv2d):  # type: ignore[misc]
    """`torch.nn.LazyConv2d`: becomes `Conv2d` on its first call."""

    cls_to_become: Any = Conv2d


class LazyConv3d(_Forward, torch.nn.LazyConv3d):  # type: ignore[misc]
    """`torch.nn.LazyConv3d`: becomes `Conv3d` on its first call."""

    cls_to_become: Any = Conv3d


class LazyConvTranspose1d(_Transposed, torch.nn.LazyConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose1d`: becomes `ConvTranspose1d` on its first call."""

    cls_to_become: Any = ConvTranspose1d


class LazyConvTranspose2d(_Transposed, torch.nn.LazyConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose2d`: becomes `ConvTranspose2d` on its first call."""

    cls_to_become: Any = ConvTranspose2d


class LazyConvTranspose3d(_Transposed, torch.nn.LazyConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose3d`: becomes `ConvTranspose3d` on its first call."""

    cls_to_become: Any = ConvTranspose3d


PLAIN_LAYERS = frozenset((Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d))
