"""Convolutions whose first spatial dimension is time, and whose outputs read nothing that comes later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tconv import functional, modules


class CausalConv1d(modules.Conv1d):
    """`tconv.Conv1d`, padded before the first step of time only: (N, C, W) -> (N, K, (W - 1) // stride + 1).

    Output j reads inputs j*stride - dilation*(kernel_size - 1) to j*stride. Nothing is copied for the padding.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode, device, dtype: as for
            torch.nn.Conv1d.

    Example:
        >>> import torch
        >>> CausalConv1d(2, 4, 3)(torch.randn(1, 2, 8)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, dilation: Any = 1, groups: int = 1,
        bias: bool = True, padding_mode: Any = "zeros", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        _pad(self, 0)

    def stream(self, input: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the outputs for the next steps of a stream, and the state for the call after it.

        Args:
            input: (N, C, W), the next steps, any number of them.
            state: what the call before returned; None at the beginning of the stream. It is not changed.
        Raises:
            ValueError: the state does not fit, or the layer has another padding_mode than zeros.
        """
        return _stream(functional.conv1d_stream, self, input, state)


class CausalConv3d(modules.Conv3d):
    """`tconv.Conv3d`, padded before the first frame and around each frame: (N, C, D, H, W) -> (N, K, Z, P, Q).

    Output frame j reads frames j*stride - dilation*(kernel_size - 1) to j*stride. Nothing is copied for the padding.

    Args:
        padding: of the two dimensions of a frame: a number, or two, or a pair (before, after) in place of each.
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode, device, dtype: as for
            torch.nn.Conv3d.

    Example:
        >>> import torch
        >>> CausalConv3d(2, 4, 3, padding=1)(torch.randn(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = True, padding_mode: Any = "zeros", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        _pad(self, padding)

    def stream(self, input: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output frames for the next frames of a stream, and the state for the call after it.

        Args:
            input: (N, C, D, H, W), the next frames, any number of them.
            state: what the call before returned; None at the beginning of the stream. It is not changed.
        Raises:
            ValueError: the state does not fit, or the layer has another padding_mode than zeros.
        """
        return _stream(functional.conv3d_stream, self, input, state)


def _stream(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], layer: Any, x: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' for a stream, got {layer.padding_mode!r}")
    return function(x, layer.weight, layer.bias, state, layer.stride, layer.padding, layer.dilation, layer.groups)


def _pad(layer: Any, padding: Any) -> None:
    """Sets a layer's padding: time's, which follows from the filter, and `padding` for the other dimensions.

    Raises:
        ValueError: it has another number of dimensions.
    """
    others = len(layer.kernel_size) - 1
    spatial = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,) * others
    numbers = [n for p in spatial for n in (p if isinstance(p, (tuple, list)) else (p,))]
    if len(spatial) != others or not all(type(n) is int for n in numbers):
        raise ValueError(f"padding must be a number, or one or a pair for each of {others} dimensions, got {padding!r}")
    layer.padding = ((layer.dilation[0] * (layer.kernel_size[0] - 1), 0), *spatial)
