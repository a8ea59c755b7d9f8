"""Real models for end-to-end steps, built by their own packages with random weights.

Each builder takes whether to be tiny (for a dry run) and gives the model and its inputs. Packages are imported when asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tconv.launching.memory_format import FORMATS

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

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


def in_layout(t: Any, layout: str) -> Any:
    """A module, in place, or a tensor in that layout, one of providers.LAYOUTS; what has none stays."""
    if layout == "contiguous":
        return t
    if isinstance(t, torch.nn.Module):
        for p in t.parameters():
            if p.dim() in FORMATS:
                p.data = p.data.to(memory_format=FORMATS[p.dim()])
        return t
    return t.to(memory_format=FORMATS[t.dim()]) if t.dim() in FORMATS else t


def _torchvision(name: str) -> Callable[[bool], Built]:
    def build(tiny: bool) -> Built:
        import torchvision

        images = torch.randn(2, 3, 32, 32) if tiny else torch.randn(32, 3, 224, 224)
        return getattr(torchvision.models, name)(weights=None), (images,)

    return build


def _video(tiny: bool) -> Built:
    import torchvision

    clip = torch.randn(2, 3, 4, 16, 16) if tiny else torch.randn(8, 3, 16, 112, 112)
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


def _timm(name: str, extent: int, **sizes: Any) -> Callable[[bool], Built]:
    """A model of timm: `sizes` make the tiny one of `extent` pixels."""

    def build(tiny: bool) -> Built:
        import timm

        images = torch.randn(1, 3, *(extent,) * 2) if tiny else torch.randn(32, 3, 224, 224)
        return timm.create_model(name, pretrained=False, **(sizes if tiny else {})), (images,)

    return build


def _deeplab(tiny: bool) -> Built:
    import torchvision

    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    return model, (torch.randn(1, 3, 32, 32) if tiny else torch.randn(8, 3, 512, 512),)


def _wav2vec2(tiny: bool) -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    config = Wav2Vec2Config(apply_spec_augment=False, **(sizes if tiny else {}))
    return Wav2Vec2Model(config), (torch.randn(1, 3200) if tiny else torch.randn(8, 160000),)


def _whisper(tiny: bool) -> Built:
    from transformers import WhisperConfig, WhisperModel

    sizes: dict[str, Any] = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 16, "vocab_size": 100, "num_mel_bins": 20,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    config = WhisperConfig(**(sizes if tiny else {}))
    return WhisperModel(config).encoder, (torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions),)


def _mamba(tiny: bool) -> Built:
    from transformers import MambaConfig, MambaModel

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4} if tiny else {}
    config = MambaConfig(use_cache=False, **sizes)
    return MambaModel(config), (torch.randint(50, (1, 12) if tiny else (8, 1024)),)


def _segformer(tiny: bool) -> Built:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**(sizes | {"decoder_hidden_size": 16} if tiny else {})))
    return model, (torch.randn(1, 3, 64, 64) if tiny else torch.randn(8, 3, 512, 512),)


def _encodec(tiny: bool) -> Built:
    from transformers import EncodecConfig, EncodecModel

    sizes: dict[str, Any] = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16} if tiny else {}
    model = EncodecModel(EncodecConfig(**sizes)).encoder
    return model, (torch.randn(1, 1, 640) if tiny else torch.randn(4, 1, 48000),)


def _unet2d(tiny: bool) -> Built:
    from diffusers import UNet2DModel

    sizes: dict[str, Any] = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**(sizes if tiny else {})), (
        torch.randn(1, 3, 8, 8) if tiny else torch.randn(4, 3, 64, 64),
        torch.tensor(3),
    )


def _video_vae(tiny: bool) -> Built:
    from diffusers import AutoencoderKLCogVideoX

    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "temporal_compression_ratio": 2,
        "down_block_types": ("CogVideoXDownBlock3D",) * 2, "up_block_types": ("CogVideoXUpBlock3D",) * 2, "latent_channels": 4,
    }  # fmt: skip
    vae = AutoencoderKLCogVideoX(**(sizes if tiny else {}))
    return vae.encoder, (torch.randn(1, 3, 3, 16, 16) if tiny else torch.randn(1, 3, 9, 256, 256),)


def _monai_unet(tiny: bool) -> Built:
    from monai.networks.nets import UNet

    channels = (4, 8, 12) if tiny else (32, 64, 128, 256, 512)
    model = UNet(3, 1, 2, channels, strides=(2,) * (len(channels) - 1), num_res_units=1)
    return model, (torch.randn(1, 1, *((8,) if tiny else (96,)) * 3),)


def _segresnet(tiny: bool) -> Built:
    from monai.networks.nets import SegResNet

    sizes: dict[str, Any] = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)} if tiny else {"init_filters": 32}
    return SegResNet(2 if tiny else 3, **sizes), (torch.randn(1, 1, 16, 16) if tiny else torch.randn(1, 1, 96, 96, 96),)


def _dynunet(tiny: bool) -> Built:
    from monai.networks.nets import DynUNet

    depth = 3 if tiny else 5
    strides = (1, *(2,) * (depth - 1))
    filters = (4, 8, 8) if tiny else (32, 64, 128, 256, 320)
    model = DynUNet(3, 1, 2, (3,) * depth, strides, strides[1:], filters=filters)
    return model, (torch.randn(1, 1, *((8,) if tiny else (96,)) * 3),)


def _snac(tiny: bool) -> Built:
    from snac import SNAC

    sizes: dict[str, Any] = (
        {"encoder_dim": 4, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2]} if tiny else {}
    )
    model = SNAC(noise=False, attn_window_size=None, **sizes)
    return torch.nn.Sequential(model.encoder, model.decoder), (torch.randn(1, 1, 96 if tiny else 44100),)  # no codebook between


def _tasnet(tiny: bool) -> Built:
    from torchaudio.models import ConvTasNet

    sizes: dict[str, Any] = {
        "enc_kernel_size": 8, "enc_num_feats": 16, "msk_num_feats": 8, "msk_num_hidden_feats": 12, "msk_num_layers": 3,
        "msk_num_stacks": 1,
    }  # fmt: skip
    return ConvTasNet(**(sizes if tiny else {})), (torch.randn(1, 1, 120) if tiny else torch.randn(4, 1, 32000),)


def _hdemucs(tiny: bool) -> Built:
    from torchaudio.models import HDemucs

    sizes: dict[str, Any] = {"channels": 4, "nfft": 256, "depth": 4} if tiny else {}
    return HDemucs(["voice", "rest"], **sizes), (torch.randn(1, 2, 1024 if tiny else 220500),)


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

# Models whose answers are compared and whose steps are not timed.
COMPARED = (
    Model("ConvNeXt", "timm", _timm("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    Model("MobileNetV3 (same padding)", "timm", _timm("tf_mobilenetv3_small_minimal_100", 32)),
    Model("RegNetX", "timm", _timm("regnetx_002", 32, depth=5, wa=60.0)),
    Model("ResNetV2 BiT", "timm", _timm("resnetv2_50x1_bit", 32)),
    Model("NF-ResNet", "timm", _timm("nf_resnet26", 32)),
    Model("ViT", "timm", _timm("vit_tiny_patch16_224", 32, img_size=32, embed_dim=32, depth=1, num_heads=2)),
    Model("DeepLabV3", "torchvision", _deeplab),
    Model("wav2vec 2.0", "transformers", _wav2vec2),
    Model("Whisper encoder", "transformers", _whisper),
    Model("Mamba", "transformers", _mamba),
    Model("SegFormer", "transformers", _segformer),
    Model("EnCodec encoder", "transformers", _encodec),
    Model("Diffusion U-Net", "diffusers", _unet2d),
    Model("CogVideoX VAE encoder", "diffusers", _video_vae),
    Model("MONAI U-Net", "monai", _monai_unet),
    Model("SegResNet", "monai", _segresnet),
    Model("DynUNet", "monai", _dynunet),
    Model("SNAC", "snac", _snac),
    Model("Conv-TasNet", "torchaudio", _tasnet),
    Model("Hybrid Demucs", "torchaudio", _hdemucs),
)


def absent() -> list[str]:
    """A line for each timed model whose package is not installed."""
    return [f"{model.name}: {model.package} is not installed, left out" for model in MODELS if not model.there]
