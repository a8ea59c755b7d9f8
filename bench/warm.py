"""Compiles what bench/test_layers.py will launch, in parallel and before it, so that no cell waits for a compiler.

python -m bench.warm [--quick | --first] [--target sm_90] [--jobs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import tconv
from bench.layers import Layer, first_and_rest, layers
from bench.providers import LAYOUTS, PRECISIONS, function_of, operands, set_precision


def warm(chosen: Sequence[Layer], precision: str, target: str | None = None, jobs: int | None = None) -> tconv.Precompiled:
    """Compiles the forward and backward of layers in both layouts.

    Args:
        chosen: the layers.
        precision: one of PRECISIONS.
        target: what for; None for the current GPU.
        jobs: worker processes; None for one per core.
    """
    set_precision(precision)
    calls = [operands(layer, precision, "meta").in_layout(layout) for layer in chosen for layout in LAYOUTS]

    def forward(tensors: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        return [function_of(tconv.functional, o.layer)(*t, **o.settings) for o, t in zip(calls, tensors, strict=True)]

    inputs = [(o.x, o.w) if o.b is None else (o.x, o.w, o.b) for o in calls]
    return tconv.precompile(forward, inputs, target=target, jobs=jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="what a quick run of the suite needs")
    parser.add_argument("--first", action="store_true", help="what bench/race.py needs first, in bf16, then the rest")
    parser.add_argument("--jobs", type=int, help="worker processes; one per core if not given")
    parser.add_argument("--target", help="an architecture or a device, on a machine without it")
    args = parser.parse_args()
    for chosen, precision in (
        [(part, "bf16") for part in first_and_rest()]
        if args.first
        else [(layers(args.quick), p) for p in (["bf16"] if args.quick else PRECISIONS)]
    ):
        print(f"{precision}: {warm(chosen, precision, args.target, args.jobs)}", flush=True)


if __name__ == "__main__":
    main()
