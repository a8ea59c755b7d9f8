"""Layers whose activation, residual, scale and shift the convolution's own kernel computes. See `tconv.functional`."""

from __future__ import annotations

from typing import Any

import torch

from tconv import modules
from tconv.dispatch import epilogues
from tconv.dispatch.check import CallArguments
from tconv.dispatch.steps import Steps


class _Fused(torch.nn.modules.conv._ConvNd):
    """Base of the layers. Their parameters and state_dict are those of the layer without the epilogue.

    Args:
        activation, negative_slope, residual_position, stepwise, recompute: as in `tconv.functional`; the others are torch's.
    Raises:
        ValueError: one of them does not exist.
    """

    _tconv_rank: int
    _tconv_policy: str

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_position: str = "before",
        stepwise: bool = False,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        Steps(activation, negative_slope, residual_position=residual_position).check_kinds()
        super().__init__(*args, **kwargs)
        self.activation, self.negative_slope, self.residual_position = activation, negative_slope, residual_position
        self.stepwise, self.recompute = stepwise, recompute

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{super().extra_repr()}{activation}"  # type: ignore[no-untyped-call]  # untyped in torch

    def _steps(self, residual: Any, scale: Any, shift: Any) -> Steps:
        return Steps(
            self.activation, self.negative_slope, residual, self.residual_position, scale, shift, self.stepwise, self.recompute
        )


class _Forward(_Fused):
    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the result. `residual`, `scale` and `shift` are as in `tconv.functional`."""
        mode = self.padding_mode
        padding = self.padding if mode == "zeros" else modules.pads(self, self._tconv_rank)
        asked = CallArguments(False, self._tconv_rank, self.stride, padding, 0, self.groups, self.dilation, mode)
        return epilogues.convolve(
            asked, input, self.weight, self.bias, self._steps(residual, scale, shift), self._tconv_policy
        )  # fmt: skip


class _Transposed(_Fused, torch.nn.modules.conv._ConvTransposeNd):
    def forward(
        self,
        input: torch.Tensor,
        output_size: list[int] | None = None,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the result. `residual`, `scale` and `shift` are as in `tconv.functional`."""
        rank = self._tconv_rank
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        asked = CallArguments(True, rank, self.stride, self.padding, tuple(output_padding), self.groups, self.dilation)
        return epilogues.convolve(
            asked, input, self.weight, self.bias, self._steps(residual, scale, shift), self._tconv_policy
        )  # fmt: skip


class FusedConv1d(_Forward, modules.Conv1d):
    """`tconv.Conv1d` with an epilogue: (N, C, W) -> (N, K, Q)."""


class FusedConv2d(_Forward, modules.Conv2d):
    """`tconv.Conv2d` with an epilogue: (N, C, H, W) -> (N, K, P, Q).

    Example:
        >>> layer = FusedConv2d(8, 8, 3, padding=1, activation="relu")
        >>> x = torch.randn(1, 8, 4, 4)
        >>> layer(x, residual=x).shape
        torch.Size([1, 8, 4, 4])
    """


class FusedConv3d(_Forward, modules.Conv3d):
    """`tconv.Conv3d` with an epilogue: (N, C, D, H, W) -> (N, K, Z, P, Q)."""


class FusedConvTranspose1d(_Transposed, modules.ConvTranspose1d):
    """`tconv.ConvTranspose1d` with an epilogue: (N, C, W) -> (N, K, Q)."""


class FusedConvTranspose2d(_Transposed, modules.ConvTranspose2d):
    """`tconv.ConvTranspose2d` with an epilogue: (N, C, H, W) -> (N, K, P, Q)."""


class FusedConvTranspose3d(_Transposed, modules.ConvTranspose3d):
    """`tconv.ConvTranspose3d` with an epilogue: (N, C, D, H, W) -> (N, K, Z, P, Q)."""
