"""What batch invariance costs, by the cost model: predicted times of the suite's layers with it, over those without.

python -m bench.invariance    # for an H100, in bf16: both layouts, several batches
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable

import torch

from bench.layers import Layer, layers
from bench.providers import LAYOUTS
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather
from tconv.planning.device import DEVICES, Device

BATCHES = (1, 2, 4, 8, 16, 64)


def ratios(chosen: Iterable[Layer], layout: str, images: int, device: Device) -> dict[tuple[str, str], float]:
    """The ratio of each layer's fprop and dgrad in batches of so many images, by the layer's name and the pass."""
    found = {}
    for layer in chosen:
        p = dataclasses.replace(layer.problem, N=images)
        x, w, y = (shaped(p.shape(which), layout == "channels_last", torch.bfloat16) for which in "xwy")
        for pass_, read, result in (("fprop", x, y), ("dgrad", y, x)):
            with_it, without = (
                prepare_gather(pass_, p, read, w, None, result, device, batch_invariant=on).call.plan for on in (True, False)
            )
            assert with_it is not None
            assert without is not None
            assert with_it.cost is not None
            assert without.cost is not None
            found[layer.name, pass_] = with_it.cost.seconds / without.cost.seconds
    return found


def main() -> None:
    print("| images | layout | geometric mean | above 1.05 | most |\n|---|---|---|---|---|")
    for images in BATCHES:
        for layout in LAYOUTS:
            found = ratios(layers(), layout, images, DEVICES["H100"])
            worst = max(found, key=lambda cell: found[cell])
            slower = f"{sum(ratio > 1.05 for ratio in found.values())} of {len(found)}"
            mean = statistics.geometric_mean(found.values())
            print(f"| {images} | {layout} | {mean:.2f} | {slower} | {found[worst]:.2f} {' '.join(worst)} |")


if __name__ == "__main__":
    main()
