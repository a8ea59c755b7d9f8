"""Compiles what the benchmarks will launch, in parallel and before them, so that no cell waits for a compiler.

python -m bench.warm [--quick | --first | --models] [--target sm_90] [--jobs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import tconv
from bench import sweep
from bench.layers import Layer, first_and_rest, layers
from bench.models import MODELS, Model, in_layout
from bench.providers import LAYOUTS, PRECISIONS, function_of, operands, set_precision
from bench.stage import first_line
from tconv.planning.device import cuda_device


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


def warm_model(model: Model, target: str | None = None, jobs: int | None = None) -> tconv.Precompiled:
    """Compiles what bench/test_models.py launches for a model, in both layouts and bf16, which is what autocast makes of it."""
    net, inputs = model.build(False)
    tconv.replace_(net.bfloat16())
    done = tconv.Precompiled()
    for layout in LAYOUTS:
        images = tuple(in_layout(t.bfloat16() if t.is_floating_point() else t, layout) for t in inputs)
        found = tconv.precompile(
            in_layout(net, layout), *images, target=target, jobs=jobs, backward=model.trains, progress=False
        )
        done = tconv.Precompiled(
            done.compiled + found.compiled, done.found + found.found, done.failed + found.failed, done.left + found.left
        )
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="what a quick run of the suite needs")
    parser.add_argument("--first", action="store_true", help="what bench/first.py times, in its order")
    parser.add_argument("--models", action="store_true", help="what bench/test_models.py needs")
    parser.add_argument("--jobs", type=int, help="worker processes; one per core if not given")
    parser.add_argument("--target", help="an architecture or a device, on a machine without it")
    args = parser.parse_args()
    if args.models:
        for model in MODELS:
            if model.there:
                try:
                    print(f"{model.name}: {warm_model(model, args.target, args.jobs)}", flush=True)
                except Exception as e:  # its own package cannot build it here, or it does not run on meta tensors
                    print(f"{model.name}: not compiled ahead: {first_line(e)}", flush=True)
    elif args.first:
        first, rest = first_and_rest()
        print(f"race: {warm(first, 'bf16', None, args.jobs)}", flush=True)
        device = cuda_device(torch.cuda.current_device())
        sweep.compile_all(sweep.plans_of("first", LAYOUTS, False, device)[1].values(), device, args.jobs)
        print(f"race of the rest: {warm(rest, 'bf16', None, args.jobs)}", flush=True)
    else:
        for precision in ["bf16"] if args.quick else PRECISIONS:
            print(f"{precision}: {warm(layers(args.quick), precision, args.target, args.jobs)}", flush=True)


if __name__ == "__main__":
    main()
