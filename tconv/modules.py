"""The layers: subclasses of torch.nn's that override `forward` and, where torch.nn has it, `_conv_forward`.

Construction derives nothing from a layer's attributes. So stride, padding etc. may be changed later, and weights may be
parametrized or passed in by an overriding `_conv_forward`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from tconv.dispatch.check import by_side
from tconv.dispatch.context import PLAIN
from tconv.dispatch.entry import convolve
from tconv.dispatch.sides import by_torch, for_pad

ZERO = {1: (0,), 2: (0, 0), 3: (0, 0, 0)}  # the padding of an input that is padded already, by rank, as torch.nn gives it
# Torch's own methods are called through these classes, not by `super()`. A tool that wraps `forward` may keep a bound method
# of ours after `restore_` has changed the layer's class back, and `super()` would then raise.
TORCHS = (
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip


class _Name(str):
    """The `__module__` of a layer's class: the true name on the class, that of torch's layers on an instance.

    torch.fx and the tools on top of it (torchvision's extractors, quantization) keep a module as a leaf of the graph, instead
    of tracing into it, if `module.__module__` starts with "torch.nn". Pickle reads the name from the class.
    """

    def __get__(self, instance: Any, owner: type) -> str:
        return self if instance is None else "torch.nn.modules.conv"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)  # a pickle has a plain string for it


class _Layer:
    """Base of all tconv layers.

    Attributes:
        _tconv_rank: number of spatial dimensions. Not taken from `kernel_size`, for which torch.nn accepts any length at
            construction and raises at the call.
        _tconv_policy: one of planning.problem's POLICIES.
    """

    _tconv_rank: int
    _tconv_policy = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("tconv."):  # torch.fx traces into a user's subclass, as it does for torch's layers
            cls.__module__ = _Name(cls.__module__)

    def __repr__(self) -> str:
        """Returns torch's text with "tconv." in front. Error texts use `_get_name()`, so they stay torch's."""
        return f"tconv.{super().__repr__()}"

    def __prepare_scriptable__(self) -> Any:
        """Raises a short error. TorchScript cannot compile the layer's Python code, and its own error would be long."""
        raise NotImplementedError("torch.jit.script cannot take tconv's layers: tconv.restore_(model) first, or trace it")


class _Forward(_Layer, torch.nn.modules.conv._ConvNd):
    """Base of Conv1d, Conv2d and Conv3d."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(self, _Forward):  # a tool kept this bound method past `restore_`
            return _torchs(self)._conv_forward(self, input, weight, bias)  # type: ignore[no-any-return]
        rank, padding, mode = self._tconv_rank, self.padding, self.padding_mode
        if mode != "zeros":
            padding = pads(self, rank)
        call = (False, rank, input, weight, bias, self.stride, padding, 0, self.groups, self.dilation)
        y = convolve(*call, self._tconv_policy, mode)
        if y is None and mode != "zeros":  # by torch, as its `_conv_forward` does it
            input, padding = padded(self, input), ZERO[rank]
        elif y is None:
            y = by_torch(*call)
        if y is None:
            y = getattr(F, f"conv{rank}d")(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y


class _Transposed(_Layer, torch.nn.modules.conv._ConvTransposeNd):
    """Base of ConvTranspose1d, ConvTranspose2d and ConvTranspose3d."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        y = None
        if (
            isinstance(self, _Transposed)  # False if a tool kept this bound method past `restore_`
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
                True, rank, input, weight, bias, self.stride, self.padding, tuple(output_padding), self.groups, self.dilation,
                self._tconv_policy,
            )  # fmt: skip
        return _torchs(self).forward(self, input, output_size) if y is None else y  # type: ignore[no-any-return]


def pads(layer: Any, rank: int) -> Any:
    """Returns the padding (before, after) of each dimension of a layer of that rank whose padding_mode is not zeros.

    Like torch's layers it has a padding of its own then, which does not follow if `layer.padding` is changed.
    """
    if by_side(layer.padding):
        return layer.padding
    ends = layer._reversed_padding_repeated_twice  # (before, after) of the last dimension first
    return tuple(zip(ends[-2::-2], ends[::-2], strict=False)) if len(ends) == 2 * rank else None


def padded(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Returns a layer's input with its padding, in its padding_mode."""
    ends = layer._reversed_padding_repeated_twice
    return F.pad(input, for_pad(layer.padding, layer._tconv_rank) if by_side(layer.padding) else ends, mode=layer.padding_mode)


def _torchs(layer: Any) -> Any:
    """Returns the torch.nn class of a layer: its own class or a base of it."""
    for cls in TORCHS:
        if isinstance(layer, cls):
            return cls
    raise TypeError(f"{type(layer).__name__} is no convolution of torch.nn's")


def _parameters(layer: Any, input: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns a layer's weight and bias, without `Module.__getattr__` where possible, which is slower than all of our code.

    Subclasses and parametrized layers need it, since they may compute the two, and so does torch.fx tracing.
    """
    if type(layer) in PLAIN_LAYERS and type(input) in PLAIN:
        own = layer._parameters
        if "weight" in own and "bias" in own:
            return own["weight"], own["bias"]
    return layer.weight, layer.bias


def _forward(name: str) -> Any:
    """Returns the `forward` of a layer that is not transposed, with the layer's name in it for Python's error texts."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _parameters(self, input)
        return self._conv_forward(input, weight, bias)  # type: ignore[no-any-return]  # `self` is Any

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
