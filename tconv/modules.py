"""The layers: subclasses of torch.nn's that override `forward` and, where torch.nn has it, `_conv_forward`.

Nothing is derived from attributes at construction: stride, padding and the rest may be changed afterwards, weights may be
parametrized or passed in by an overriding `_conv_forward`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from tconv.dispatch.context import PLAIN
from tconv.dispatch.entry import convolve

ZERO = (0,)  # per dimension
# Torch's own methods are called by their class's name: a bound method of ours may outlive the layer's class, kept by a tool
# that wraps `forward`, and `super()` raises where `self` is torch.nn's again.
TORCHS = (
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip


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
    """What all layers of tconv's have in common.

    Attributes:
        _tconv_rank: spatial dimensions. `kernel_size` does not tell: torch.nn takes any number, and raises at the call.
    """

    _tconv_rank: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("tconv."):  # a user's subclass is traced into, as one of torch's layer is
            cls.__module__ = _Name(cls.__module__)

    def __repr__(self) -> str:
        """Torch's text, which says nothing of whose layer it is. Error texts, made of `_get_name()`, stay torch's."""
        return f"tconv.{super().__repr__()}"

    def __prepare_scriptable__(self) -> Any:
        """TorchScript would read the Python of a layer, and say at length what of it it does not know."""
        raise NotImplementedError("torch.jit.script cannot take tconv's layers: tconv.restore_(model) first, or trace it")


class _Forward(_Layer, torch.nn.modules.conv._ConvNd):
    """What Conv1d, Conv2d and Conv3d share."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = None
        if isinstance(self, _Forward):  # not where this bound method outlived `restore_`
            x, padding = input, self.padding
            if self.padding_mode != "zeros":
                x, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), ZERO
            y = convolve(False, self._tconv_rank, x, weight, bias, self.stride, padding, 0, self.groups, self.dilation)
        return _torchs(self)._conv_forward(self, input, weight, bias) if y is None else y  # type: ignore[no-any-return]


class _Transposed(_Layer, torch.nn.modules.conv._ConvTransposeNd):
    """What ConvTranspose1d, ConvTranspose2d and ConvTranspose3d share."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        y = None
        if (
            isinstance(self, _Transposed)  # not where this bound method outlived `restore_`
            and isinstance(input, (torch.Tensor, Proxy))
            and isinstance(self.padding, tuple)
            and self.padding_mode == "zeros"
        ):
            rank = self._tconv_rank
            weight, bias = _parameters(self, input)
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
            y = convolve(
                True, rank, input, weight, bias, self.stride, self.padding, tuple(output_padding), self.groups, self.dilation
            )
        return _torchs(self).forward(self, input, output_size) if y is None else y  # type: ignore[no-any-return]


def _torchs(layer: Any) -> Any:
    """The class of torch.nn's that a layer's class is, or comes from."""
    for cls in TORCHS:
        if isinstance(layer, cls):
            return cls
    raise TypeError(f"{type(layer).__name__} is no convolution of torch.nn's")


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
    _tconv_rank = 1


class Conv2d(_Forward, torch.nn.Conv2d):
    """`torch.nn.Conv2d`, by tconv's kernels: (N, C, H, W) -> (N, K, P, Q)."""

    forward = _forward("Conv2d")
    _tconv_rank = 2


class Conv3d(_Forward, torch.nn.Conv3d):
    """`torch.nn.Conv3d`, by tconv's kernels: (N, C, D, H, W) -> (N, K, Z, P, Q)."""

    forward = _forward("Conv3d")
    _tconv_rank = 3


class ConvTranspose1d(_Transposed, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`, by tconv's kernels: (N, C, W) -> (N, K, Q)."""

    _tconv_rank = 1


class ConvTranspose2d(_Transposed, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, by tconv's kernels: (N, C, H, W) -> (N, K, P, Q)."""

    _tconv_rank = 2


class ConvTranspose3d(_Transposed, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, by tconv's kernels: (N, C, D, H, W) -> (N, K, Z, P, Q)."""

    _tconv_rank = 3


class LazyConv1d(Conv1d, torch.nn.LazyConv1d):  # type: ignore[misc]
    """`torch.nn.LazyConv1d`: becomes `Conv1d` on its first call."""

    cls_to_become: Any = Conv1d


class LazyConv2d(Conv2d, torch.nn.LazyConv2d):  # type: ignore[misc]
    """`torch.nn.LazyConv2d`: becomes `Conv2d` on its first call."""

    cls_to_become: Any = Conv2d


class LazyConv3d(Conv3d, torch.nn.LazyConv3d):  # type: ignore[misc]
    """`torch.nn.LazyConv3d`: becomes `Conv3d` on its first call."""

    cls_to_become: Any = Conv3d


class LazyConvTranspose1d(ConvTranspose1d, torch.nn.LazyConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose1d`: becomes `ConvTranspose1d` on its first call."""

    cls_to_become: Any = ConvTranspose1d


class LazyConvTranspose2d(ConvTranspose2d, torch.nn.LazyConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose2d`: becomes `ConvTranspose2d` on its first call."""

    cls_to_become: Any = ConvTranspose2d


class LazyConvTranspose3d(ConvTranspose3d, torch.nn.LazyConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose3d`: becomes `ConvTranspose3d` on its first call."""

    cls_to_become: Any = ConvTranspose3d


PLAIN_LAYERS = frozenset((Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d))
