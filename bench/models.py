"""Real models for end-to-end steps, built by their own packages with random weights.

Each builder takes whether to be tiny (for a dry run) and gives the model and its inputs. Packages are imported when asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Built = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Model:
    """A model and where it comes from.

    Attributes:
        name: for tables.
        package: what has to be installed.
        build: (tiny) -> (model, inputs), on the CPU in fp32.
        trains: whether its training step is measured too.
    """

    name: str
    package: str
    build: Callable[[bool], Built]
    trains: bool = True

    @property
    def there(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _torchvision(name: str) -> Callable[[bool], Built]:
    def build(tiny: bool) -> Built:
        import torchvision

        images = torch.randn(2, 3, 64, 64) if tiny else torch.randn(32, 3, 224, 224)
        return getattr(torchvision.models, name)(weights=None), (images,)

    return build


def _video(tiny: bool) -> Built:
    import torchvision

    clip = torch.randn(2, 3, 8, 32, 32) if tiny else torch.randn(8, 3, 16, 112, 112)
    return torchvision.models.video.r3d_18(weights=None), (clip,)


def _unet3d(tiny: bool) -> Built:
    from monai.networks.nets import BasicUNet

    features = (4, 4, 8, 8, 8, 4) if tiny else (32, 32, 64, 128, 256, 32)
    extent = 32 if tiny else 96
    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=features), (torch.randn(1, 1, *(extent,) * 3),)


def _hifigan(tiny: bool) -> Built:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(upsample_initial_channel=32) if tiny else SpeechT5HifiGanConfig()
    return SpeechT5HifiGan(config), (torch.randn(1, 4, 80) if tiny else torch.randn(8, 200, 80),)


def _dac(tiny: bool) -> Built:
    from transformers import DacConfig, DacModel

    sizes: dict[str, Any] = {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "hidden_size": 16} if tiny else {}
    config = DacConfig(**sizes)
    decoder = DacModel(config).decoder
    return decoder, (torch.randn(1, config.hidden_size, 4) if tiny else torch.randn(4, config.hidden_size, 150),)


def _vae(tiny: bool) -> Built:
    from diffusers import AutoencoderKL

    widths = (8, 8) if tiny else (128, 256, 512, 512)
    blocks = len(widths)
    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=1 if tiny else 2, norm_num_groups=4 if tiny else 32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=4,
    )  # fmt: skip
    return vae.decoder, (torch.randn(1, 4, 8, 8) if tiny else torch.randn(1, 4, 64, 64),)


MODELS = (
    Model("ResNet-50", "torchvision", _torchvision("resnet50")),
    Model("ConvNeXt-B", "torchvision", _torchvision("convnext_base")),
    Model("EfficientNet-B0", "torchvision", _torchvision("efficientnet_b0")),
    Model("R3D-18", "torchvision", _video),
    Model("3-D U-Net", "monai", _unet3d),
    Model("HiFi-GAN", "transformers", _hifigan),
    Model("DAC decoder", "transformers", _dac, trains=False),
    Model("SD VAE decoder", "diffusers", _vae, trains=False),
)


def absent() -> list[str]:
    """A line for each model whose package is not installed."""
    return [f"{model.name}: {model.package} is not installed, left out" for model in MODELS if not model.there]
