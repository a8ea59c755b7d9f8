"""Normalisation layers whose activation and padding are in the normalisation's own kernel. See `tconv.functional`."""

from __future__ import annotations

from typing import Any

import torch

from tconv import functional
from tconv.dispatch.norms import check_activation


class GroupNormSiLU(torch.nn.GroupNorm):
    """Group normalisation, then silu: (N, C, *spatial) -> the same, or larger by `pad`.

    Parameters and state_dict are those of torch.nn.GroupNorm.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as for torch.nn.GroupNorm.
        activation, pad: as for `tconv.functional.group_norm_silu`.
    Raises:
        ValueError: the activation does not exist, or torch's errors.

    Example:
        >>> import torch
        >>> GroupNormSiLU(2, 8, pad=1)(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(self, *args: Any, activation: str | None = "silu", pad: Any = None, **kwargs: Any) -> None:
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation, self.pad = activation, pad

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps, self.activation, self.pad
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, pad={self.pad!r}"


class RMSNormSiLU(torch.nn.Module):
    """RMS normalisation over the channels of each pixel, then silu: (N, C, *spatial) -> the same, or larger by `pad`.

    Its parameter and state_dict are those of torch.nn.RMSNorm(num_channels).

    Args:
        num_channels: channels of the input, C.
        eps: added to the mean of squares.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
        activation, pad: as for `tconv.functional.rms_norm_silu`.
    Raises:
        ValueError: the activation does not exist.

    Example:
        >>> import torch
        >>> RMSNormSiLU(8)(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    weight: torch.nn.Parameter | None

    def __init__(
        self, num_channels: int, eps: float = 1e-6, elementwise_affine: bool = True, device: Any = None, dtype: Any = None,
        *, activation: str | None = "silu", pad: Any = None,
    ) -> None:  # fmt: skip
        check_activation(activation)
        super().__init__()
        self.num_channels, self.eps, self.elementwise_affine = num_channels, eps, elementwise_affine
        self.activation, self.pad = activation, pad
        weight = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm_silu(input, self.weight, None, self.eps, self.activation, self.pad)

    def extra_repr(self) -> str:
        affine = f"elementwise_affine={self.elementwise_affine}"
        return f"{self.num_channels}, eps={self.eps}, {affine}, activation={self.activation!r}, pad={self.pad!r}"
