"""The suite's layers: 60 convolutions of real models, in layers.json with their sources."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

from tconv.planning.problem import ConvProblem, forward_problem, transposed_problem

FILE = pathlib.Path(__file__).with_name("layers.json")
QUICK = 6  # every so-many-th layer makes the quick subset
# What stands for the families where time is short, the most telling first.
FIRST = (
    "resnet50_l2_3x3", "sdxl_vae_512_256", "resnet50_l3_1x1_expand", "convnext_b_dw7_128_56", "resnet50_stem_7x7s2",
    "nnunet3d_32_128", "whisper_lv3_conv1", "vit_b16_patch_embed", "hifigan_up_512_256_k16s8", "resnext50_l1_g32",
    "sdxl_unet_1280_32", "mamba28b_dw4_5120_2048", "resnet50_l1_3x3", "resnet50_l4_3x3", "sd15_unet_320_64",
    "sdxl_unet_conv_in_c4", "qwen25vl_patch_embed", "mobilenetv2_dw3_384_14", "replknet31b_dw31_128_56",
    "conformer_dw31_1024", "dcgan_g_512_256_k4s2", "nnunet3d_tconv_64_32_k2s2", "hifigan_res_256_k11_d5", "hunyuan_vae_512_32",
)  # fmt: skip
FAMILIES = ("dense 2-D", "few channels", "patch", "depthwise", "grouped", "transposed", "1-D", "3-D")


@dataclass(frozen=True)
class Layer:
    """One convolution of a model.

    Attributes:
        name, model, source: what it is, and where it was read.
        x: input shape, (N, C, *spatial).
        k: output channels.
        kernel, stride, padding, dilation, output_padding: per dimension.
        groups: number of groups.
        transposed: a transposed convolution.
        bias: whether the model's layer has one.
    """

    name: str
    model: str
    source: str
    x: tuple[int, ...]
    k: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool
    bias: bool

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    @property
    def w(self) -> tuple[int, ...]:
        """Weight shape."""
        c, g = self.x[1], self.groups
        return (c, self.k // g, *self.kernel) if self.transposed else (self.k, c // g, *self.kernel)

    @property
    def problem(self) -> ConvProblem:
        if self.transposed:
            return transposed_problem(
                self.x, self.w, self.stride, self.padding, self.output_padding, self.dilation, self.groups
            )
        return forward_problem(self.x, self.w, self.stride, [(p, p) for p in self.padding], self.dilation, self.groups)

    @property
    def family(self) -> str:
        """One of FAMILIES: the first that fits, the more particular ones before rank."""
        if 1 < self.groups == self.x[1]:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        if self.transposed:
            return "transposed"
        if self.kernel == self.stride and max(self.kernel) > 1 and not any(self.padding):
            return "patch"
        if min(self.x[1], self.k) <= 4:
            return "few channels"
        return {1: "1-D", 2: "dense 2-D", 3: "3-D"}[self.rank]

    def tiny(self) -> Layer:
        """The same layer with few channels and pixels, for Triton's interpreter."""
        n, c, *spatial = self.x
        groups = math.gcd(self.groups, 4) if self.groups % 4 == 0 else min(self.groups, 5)
        kernel = tuple(min(t, 6) for t in self.kernel)
        spans = [d * (t - 1) + 1 for d, t in zip(self.dilation, kernel, strict=True)]
        spatial = [min(e, max(6, s + 2)) for e, s in zip(spatial, spans, strict=True)]
        c, k = (groups * min(v // self.groups, 8) for v in (c, self.k))
        stride = kernel if self.kernel == self.stride else self.stride  # a patch embedding stays one
        padding = tuple(min(p, t // 2) for p, t in zip(self.padding, kernel, strict=True))
        x = (min(n, 2), c, *spatial)
        return dataclasses.replace(self, x=x, k=k, kernel=kernel, stride=stride, padding=padding, groups=groups)


def layers(quick: bool = False) -> list[Layer]:
    """All layers, or the quick subset."""
    return [_layer(row) for row in json.loads(FILE.read_text())][:: QUICK if quick else 1]


def first_and_rest() -> tuple[list[Layer], list[Layer]]:
    """FIRST in its order, and all others."""
    every = {layer.name: layer for layer in layers()}
    return [every[name] for name in FIRST], [layer for name, layer in every.items() if name not in FIRST]


def part_of_suite(part: str, tiny: bool) -> list[Layer]:
    """Returns the "first" or the "rest" of `first_and_rest`; for a dry run, one layer of it."""
    return first_and_rest()[part == "rest"][: 1 if tiny else None]


def _layer(row: dict[str, Any]) -> Layer:
    rank = len(row["spatial"])
    return Layer(
        row["name"], row["model"], row["source"], (row["N"], row["C"], *row["spatial"]), row["K"], tuple(row["kernel"]),
        tuple(row["stride"]), tuple(row["padding"]), tuple(row["dilation"]), tuple(row["output_padding"] or (0,) * rank),
        row["groups"], "transpose" in row["op"], bool(row.get("bias")),
    )  # fmt: skip
