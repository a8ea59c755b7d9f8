#!/usr/bin/env python3
"""Microseconds of Python per call, from the layer to the C launcher, beside torch.nn's own; needs no GPU.

    python bench/dispatch.py [--json out/dispatch.json]

tconv's kernels are compiled, and launched on a device that is not there (bench/stub.py): its rows are all of the Python of a
call (guard, lookups, autograd, allocation of the result, launch) up to where Triton's launcher enters C, and nothing of what
C and the GPU do then. torch.nn's rows include its real CPU kernel on a one-pixel problem, about the least that it can be. A
row is the least of 25 batches' mean thread time; both libraries run in turn in one process. The breakdown times tconv's
pieces alone, each called as the layer calls it; what a piece adds to the ones within it is a difference, so its small
numbers are rough.

The override's table is torch.nn's layer with and without `tconv.enable()`, in turn. Our side of a difference has all of the
Python and the launches (one forward, three backward), torch's has its real kernels; a call that falls back to torch pays for
the detour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about compiled kernels
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

import tconv
from bench import stub
from bench.record import machine
from tconv.dispatch import autograd, entry
from tconv.dispatch.context import why_ineligible
from tconv.launching import compiled, launch
from tconv.launching.record import record_call

BATCHES, CALLS = 25, 200


def microseconds(
    calls: dict[str, Callable[[], object]],
    around: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] | None = None,
) -> dict[str, float]:
    """The least mean time of each call over the batches, the calls taking turns, each batch within its context if any."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(BATCHES):
        for name, call in calls.items():
            with around[name]() if around else contextlib.nullcontext():
                start = time.thread_time_ns()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.thread_time_ns() - start) / CALLS / 1000)
    return best


def without_grad(layer: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def with_backward(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    leaves = (x.clone().requires_grad_(), *layer.parameters())
    up = torch.ones(1, 1, 4, 4)

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(leaves[0]).backward(up)

    return call


def measure() -> dict[str, dict[str, float]]:
    """{row: {"torch.nn": us, "tconv": us}}"""
    x = torch.randn(1, 1, 4, 4)
    layers = {"torch.nn": torch.nn.Conv2d(1, 1, 1), "tconv": tconv.Conv2d(1, 1, 1)}
    rows = {
        "forward, no_grad": lambda layer: without_grad(layer, x),
        "forward, weight gradient recorded": lambda layer: lambda: layer(x),
        "forward and backward, x, w and b": lambda layer: with_backward(layer, x),
    }
    return {row: microseconds({name: make(layer) for name, layer in layers.items()}) for row, make in rows.items()}


def override() -> dict[str, dict[str, float]]:
    """{row: {"off": us, "on": us}} of torch.nn's layer under the override."""
    layer, x = torch.nn.Conv2d(1, 1, 1), torch.randn(1, 1, 4, 4)
    elsewhere = torch.nn.Conv2d(1, 1, 1, device="meta")
    whole = torch.ones(1, 1, 1, 1, dtype=torch.int64)
    rows = {
        "forward, no_grad": without_grad(layer, x),
        "forward, weight gradient recorded": lambda: layer(x),
        "forward and backward, x, w and b": with_backward(layer, x),
        "forward, fallback to torch (integers)": without_grad(lambda x: torch.conv2d(x, whole), x.long()),
        "forward, another device's (meta)": without_grad(elsewhere, x.to("meta")),
    }
    around = {"off": contextlib.nullcontext, "on": tconv.enabled}
    return {row: microseconds(dict.fromkeys(around, call), around) for row, call in rows.items()}


def in_fp8() -> dict[str, float]:
    """{layer: us} of a forward pass without gradients, of layers of 16 channels on four pixels in channels_last."""
    x = torch.randn(1, 16, 2, 2).bfloat16().to(memory_format=torch.channels_last)
    layer = tconv.Conv2d(16, 16, 1).bfloat16().to(memory_format=torch.channels_last)
    fixed, free = tconv.fp8.Conv2d(layer, 0.01), tconv.fp8.Conv2d(layer)
    layers = {"bf16": layer, "fp8, a fixed scale": fixed, "fp8, a scale for each input": free}
    return microseconds({name: without_grad(layer, x) for name, layer in layers.items()})


def breakdown() -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """{piece: (us of a forward, us of a forward and backward)}, with gradients by input, weight and bias; and the same of the
    launches if Triton dispatched them.

    Autograd's share of the second is what its engine and `torch.autograd.grad` leave to no other piece.
    """
    layer, up = tconv.Conv2d(1, 1, 1), torch.ones(1, 1, 4, 4)
    x, w, b = leaves = torch.randn(1, 1, 4, 4, requires_grad=True), layer.weight, layer.bias
    call = (False, 2, x, w, b, layer.stride, layer.padding, 0, layer.groups, layer.dilation)
    entry.fast_paths.clear()
    for _ in range(2):  # a repeated call is prepared the second time
        torch.autograd.grad(layer(x), leaves, up)
    (seen,) = entry.fast_paths.values()
    geometry, prepared = seen.how.g, seen.how.prepared
    y = launch.convolve(prepared, x, w, b, False)

    forward = microseconds(
        {
            "layer": lambda: layer(x),
            "convolve": lambda: entry.convolve(*call),
            "again": lambda: seen.again(*call, "zeros"),
            "function": lambda: autograd.apply_convolve(x, w, b, seen.how),
            "run": lambda: launch.convolve(prepared, x, w, b, False),
            "allocate": lambda: x.new_empty_strided(prepared.shape, prepared.strides),
            "note": lambda: record_call(prepared.call),
            "launch": lambda: compiled.run(prepared, (x, w, b, y)),
            "Triton's launch": lambda: compiled._by_triton(prepared, (x, w, b, y)),
            "both": lambda: torch.autograd.grad(layer(x), leaves, up),
        }
    )
    with torch.no_grad():  # as autograd runs a backward
        backward = microseconds(
            {
                "guard": lambda: why_ineligible(up, x, w),
                "dgrad": lambda: autograd.convolve(True, up, w, None, geometry),
                "wgrad": lambda: autograd.wgrad(up, x, geometry),
                "bias": lambda: autograd.bias_grad(up, geometry),
                **{f"allocate {i}": lambda t=t: up.new_empty_strided(t.shape, t.stride()) for i, t in enumerate(leaves)},
            }
        )
    passes = sum(backward[name] for name in ("dgrad", "wgrad", "bias"))
    allocations = sum(us for name, us in backward.items() if name.startswith("allocate"))
    launched = forward["launch"]
    pieces = {
        "module call": (forward["layer"] - forward["convolve"], 0.0),
        "key and lookup": (forward["convolve"] - forward["again"], passes - allocations - 3 * (forward["note"] + launched)),
        "guard": (forward["again"] - forward["function"], backward["guard"]),
        "autograd": (forward["function"] - forward["run"], forward["both"] - forward["layer"] - passes - backward["guard"]),
        "allocation": (forward["allocate"], allocations),
        "note": (forward["note"], 3 * forward["note"]),
        "launch": (launched, 3 * launched),
    }
    by_triton = forward["Triton's launch"]
    return {piece: (there, there + back) for piece, (there, back) in pieces.items()}, (by_triton, 4 * by_triton)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers there")
    parser.add_argument("--commit", help="where the checkout has no git beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stub.install()
    rows = measure()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}; microseconds per call\n")
    print(f"{'':36}{'torch.nn':>10}{'tconv':>10}{'ratio':>8}")
    for row, us in rows.items():
        print(f"{row:36}{us['torch.nn']:10.1f}{us['tconv']:10.1f}{us['tconv'] / us['torch.nn']:8.2f}")
    overridden = override()
    print(f"\n{'torch.nn, tconv.enable()':36}{'off':>10}{'on':>10}{'cost':>8}")
    for row, us in overridden.items():
        print(f"{row:36}{us['off']:10.1f}{us['on']:10.1f}{us['on'] - us['off']:8.1f}")
    fp8 = in_fp8()
    print(f"\n{'tconv, a layer of 16 channels':36}")
    for row, microsecond in fp8.items():
        print(f"{row:36}{microsecond:10.1f}")
    pieces, by_triton = breakdown()
    print(f"\n{'tconv, by pieces timed alone':36}{'forward':>10}{'+ backward':>12}")
    for piece, (forward, both) in pieces.items():
        print(f"{piece:36}{forward:10.1f}{both:12.1f}")
    print(f"{'(launch by Triton, if it were used)':36}{by_triton[0]:10.1f}{by_triton[1]:12.1f}")
    print(f"{'sum':36}{sum(f for f, _ in pieces.values()):10.1f}{sum(b for _, b in pieces.values()):12.1f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(
                {
                    **machine(args.commit),
                    "us": rows,
                    "override": overridden,
                    "fp8": fp8,
                    "pieces": pieces,
                    "launch_by_triton": by_triton,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
