#!/usr/bin/env python3
"""Microseconds of Python per call, from the layer to the point of launch, beside torch.nn's own; needs no GPU.

    python bench/dispatch.py [--json out/dispatch.json]

tconv's launches are stubbed, so its rows are dispatch alone: guard, lookups, autograd, allocation of the result. torch.nn's
rows include its real CPU kernel on a one-pixel problem, about the least that it can be. A row is the least of 25 batches'
mean thread time; both libraries run in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # so that CPU tensors get as far as a launch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

import tconv
from tconv import launch

BATCHES, CALLS = 25, 200


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least mean time of each call over the batches, the calls taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(BATCHES):
        for name, call in calls.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.thread_time_ns() - start) / CALLS / 1000)
    return best


def measure() -> dict[str, dict[str, float]]:
    """{row: {"torch.nn": us, "tconv": us}}"""
    x = torch.randn(1, 1, 4, 4)
    layers = {"torch.nn": torch.nn.Conv2d(1, 1, 1), "tconv": tconv.Conv2d(1, 1, 1)}

    def without_grad(layer: torch.nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return layer(x)

        return call

    def with_backward(layer: torch.nn.Module) -> Callable[[], object]:
        leaves = (x.clone().requires_grad_(), *layer.parameters())
        up = torch.ones(1, 1, 4, 4)
        return lambda: torch.autograd.grad(layer(leaves[0]), leaves, up)

    rows = {
        "forward, no_grad": without_grad,
        "forward, weight gradient recorded": lambda layer: lambda: layer(x),
        "forward and backward, x, w and b": with_backward,
    }
    return {row: microseconds({name: make(layer) for name, layer in layers.items()}) for row, make in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch._call = lambda *_: None
    rows = measure()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}; microseconds per call\n")
    print(f"{'':36}{'torch.nn':>10}{'tconv':>10}{'ratio':>8}")
    for row, us in rows.items():
        print(f"{row:36}{us['torch.nn']:10.1f}{us['tconv']:10.1f}{us['tconv'] / us['torch.nn']:8.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "python": platform.python_version(), "us": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
