"""Three models written here, to be fused: a ResNet-50, the decoder of a video autoencoder, and an audio codec.

Each has the blocks and the order of layers of a published one, with random weights: ResNet-50 (He et al. 2015), the decoders of
CogVideoX and Wan (causal 3-D convolutions, group norm before SiLU), and SEANet (Tagliasacchi et al. 2020) as EnCodec and
SoundStream have it, padded by zeros. `tiny` makes few channels of the same graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with batch norms, added to a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """Images (N, 3, H, W) -> (N, 1000)."""

    def __init__(self, tiny: bool = False) -> None:
        super().__init__()
        width, depths = (4, (1, 1, 1, 1)) if tiny else (64, (3, 4, 6, 3))
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inputs, layers = width, list[nn.Module]()
        for i, depth in enumerate(depths):
            for j in range(depth):
                layers.append(Bottleneck(inputs, width << i, 2 if i and not j else 1))
                inputs = 4 * width << i
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class CausalConv3d(nn.Module):
    """A convolution that reads no later frames, as video models write it: padded before time, and around each frame."""

    def __init__(self, inputs: int, outputs: int, taps: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, taps)
        self.pads = (taps // 2,) * 4 + (taps - 1, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.pads))


class ResnetBlock3d(nn.Module):
    """Norm, SiLU, convolution, twice, added to a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), CausalConv3d(inputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), CausalConv3d(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Upsample3d(nn.Module):
    """Twice the height and width, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class VideoDecoder(nn.Module):
    """Latents (N, 16, D, H, W) -> frames (N, 3, D, 4H, 4W)."""

    def __init__(self, tiny: bool = False) -> None:
        super().__init__()
        first, second, third = (8, 8, 4) if tiny else (512, 256, 128)
        self.conv_in = CausalConv3d(16, first)
        self.blocks = nn.Sequential(
            ResnetBlock3d(first, first), ResnetBlock3d(first, first), Upsample3d(first),
            ResnetBlock3d(first, second), ResnetBlock3d(second, second), Upsample3d(second),
            ResnetBlock3d(second, third), ResnetBlock3d(third, third),
        )  # fmt: skip
        self.norm_out, self.conv_out = nn.GroupNorm(4, third), CausalConv3d(third, 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(self.blocks(self.conv_in(z)))))


class CausalConv1d(nn.Module):
    """A convolution with weight norm that reads no later samples."""

    def __init__(self, inputs: int, outputs: int, taps: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, outputs, taps, stride, dilation=dilation))
        self.before = dilation * (taps - 1) + 1 - stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (self.before, 0)))


class SeanetBlock(nn.Module):
    """ELU and a dilated convolution, ELU and one of one tap, added to the input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ELU(), CausalConv1d(channels, channels // 2, 3, dilation=dilation), nn.ELU(),
            CausalConv1d(channels // 2, channels, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class Seanet(nn.Module):
    """Sound (N, 1, W) -> sound of the same length: the encoder and the decoder, without the quantizer between."""

    def __init__(self, tiny: bool = False) -> None:
        super().__init__()
        width, latent, strides = (4, 8, (2, 3)) if tiny else (32, 128, (2, 4, 5, 8))
        encoder: list[nn.Module] = [CausalConv1d(1, width, 7)]
        for stride in strides:
            encoder += [SeanetBlock(width, 1), nn.ELU(), CausalConv1d(width, 2 * width, 2 * stride, stride)]
            width *= 2
        encoder += [nn.ELU(), CausalConv1d(width, latent, 7)]
        decoder: list[nn.Module] = [CausalConv1d(latent, width, 7)]
        for stride in reversed(strides):
            up = nn.ConvTranspose1d(width, width // 2, 2 * stride, stride, padding=stride // 2, output_padding=stride % 2)
            decoder += [nn.ELU(), nn.utils.parametrizations.weight_norm(up), SeanetBlock(width // 2, 1)]
            width //= 2
        decoder += [nn.ELU(), CausalConv1d(width, 1, 7), nn.Tanh()]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))
