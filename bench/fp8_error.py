"""How far models' outputs in fp8 are from those in fp32, beside bf16: `python -m bench.fp8_error`.

Models are those of bench/models.py that are installed, with random weights and inputs, so the numbers tell of the rounding and
of nothing that a trained model has learnt. Without a GPU, torch computes the fp8 layers from the same rounded operands.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from typing import Any

import torch

from bench.models import COMPARED, MODELS, Model
from tconv import fp8

NAMES = ("ResNet-50", "ConvNeXt-B", "R3D-18", "SD VAE decoder", "Diffusion U-Net", "DAC decoder")


def first_tensor(out: Any) -> torch.Tensor:
    """Returns the tensor that a model's output is, or begins with."""
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out.float()


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the root mean square of the difference over that of the right output."""
    return float((got - right).square().mean().sqrt() / right.square().mean().sqrt())


def measure(model: Model, device: str) -> str:
    """Returns a row of the table."""
    torch.manual_seed(0)
    net, inputs = model.build(False)
    inputs = tuple(t[:1].to(device) if t.dim() > 2 else t.to(device) for t in inputs)
    net = net.eval().to(device)
    low = tuple(t.bfloat16() if t.is_floating_point() else t for t in inputs)
    right = first_tensor(net(*inputs))
    errors = [error(first_tensor(net.bfloat16()(*low)), right)]
    done = None
    for example in (low, ()):
        converted = copy.deepcopy(net)
        done = fp8.convert_(converted, *example)
        errors.append(error(first_tensor(converted(*low)), right))
    assert done is not None
    layers = f"{len(done.scales)} of {len(done.scales) + len(done.kept)}"
    return f"| {model.name} | {layers} | " + " | ".join(f"{100 * e:.2f} %" for e in errors) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="names of models")
    names = parser.parse_args().only or NAMES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| model | layers in fp8 | bf16 | fp8, scales from an example | fp8, a scale for each input |\n|---|---|---|---|---|")
    with torch.no_grad():
        for model in itertools.chain(MODELS, COMPARED):
            if model.name in names and model.there:
                print(measure(model, device), flush=True)


if __name__ == "__main__":
    main()
