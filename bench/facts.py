"""What a device reaches, and what a call costs there: the numbers behind the planner's constants.

python -m bench.facts --record bench/results/DIR/facts.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

import tconv
from bench import cells
from bench.timing import Clock, in_turns, measured_limits
from tconv.launching.arguments import INTERPRET
from tconv.planning.device import DEVICES, cuda_device

READ = 20 << 20  # bytes that fit into the L2 cache of any device of interest
CHUNK = 4096  # elements of 4 bytes that a program reads at a time


@triton.jit
def read_all(source, sums, chunks, CHUNK: tl.constexpr):
    """Each program reads all of `source`, from a place of its own on, and keeps the sum so that the reads are needed."""
    offsets, total = tl.arange(0, CHUNK), tl.zeros((CHUNK,), tl.float32)
    first = tl.program_id(0) * 7
    for i in range(chunks):
        total += tl.load(source + (first + i) % chunks * CHUNK + offsets)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def l2_read(clock: Clock, units: int) -> dict[str, Any]:
    """Bytes per second that all multiprocessors together read of what the L2 cache holds."""
    source = torch.randn(READ // 4, device="cuda")
    chunks, best = source.numel() // CHUNK, {}
    for programs in (units, 2 * units, 4 * units):
        sums = torch.empty(programs, device="cuda")
        times = in_turns(clock, {"read": lambda s=sums, n=programs: read_all[(n,)](source, s, chunks, CHUNK, num_warps=8)})
        best[programs] = programs * READ / times["read"].ms * 1e3
    return {"bytes_per_second": max(best.values()), "by_programs": best}


def launch_gap(clock: Clock) -> dict[str, Any]:
    """Seconds from one small kernel's start to the next one's: in a graph, and launched by torch; and of an empty timing."""
    one, count = torch.zeros(1, device="cuda"), 200

    def launch() -> None:
        for _ in range(count):
            one.add_(1)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = in_turns(clock, {"graph": graph.replay, "stream": launch, "nothing": lambda: None, "one": lambda: one.add_(1)})
    found = {"graph": times["graph"].ms / count / 1e3, "stream": times["stream"].ms / count / 1e3}
    return found | {"event_pair": times["nothing"].ms / 1e3, "one_small_kernel": times["one"].ms / 1e3}


def host_microseconds(call: Callable[[], Any], device: str) -> float:
    """The host's time per call with launches that queue up: the best of 15 batches of 50 (of one call in the interpreter).

    By the wall clock, since autograd runs a GPU's backward in a thread of its own; bench/dispatch.py, without a GPU, takes its
    own thread's time, which a loaded machine does not lengthen.
    """
    best, batches, calls = float("inf"), *((15, 50) if device == "cuda" else (1, 1))
    for _ in range(batches):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def host_share(device: str) -> dict[str, Any]:
    """Microseconds of the host per call of a small layer, tconv's and torch.nn's, launches included."""
    x = torch.randn(1, 64, 8, 8, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    rows: dict[str, Any] = {}
    for name, library in (("torch.nn", torch.nn), ("tconv", tconv)):
        layer = library.Conv2d(64, 64, 3, padding=1).to(device, torch.bfloat16, memory_format=torch.channels_last)
        leaf = x.clone().requires_grad_()
        up = torch.ones_like(layer(leaf))

        def inference(layer: Any = layer) -> None:
            with torch.no_grad():
                layer(x)

        def step(layer: Any = layer, leaf: Any = leaf, up: Any = up) -> None:
            torch.autograd.grad(layer(leaf), (leaf, layer.weight, layer.bias), up)

        for row, call in (("forward, no_grad", inference), ("forward and backward", step)):
            call()
            rows.setdefault(row, {})[name] = host_microseconds(call, device)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device, torch.bfloat16, memory_format=torch.channels_last)
    with tconv.enabled(), torch.no_grad():
        layer(x)
        rows["forward, no_grad"]["torch.nn under enable()"] = host_microseconds(lambda: layer(x), device)
    return rows


def questions(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The facts in the order of their worth, each with what finds it out."""
    device = "cpu" if INTERPRET else "cuda"
    clock = Clock(device)
    known = DEVICES["H200"] if INTERPRET else cuda_device(torch.cuda.current_device())
    if not INTERPRET:
        yield "launch gap", lambda: launch_gap(clock)
        yield "L2 read", lambda: l2_read(clock, known.units)
    yield "limits", lambda: dataclasses.asdict(measured_limits(device, clock, known.limits, args.tiny))
    yield "host share", lambda: host_share(device)


def main() -> int:
    args = cells.parser(__doc__ or "").parse_args()
    run = cells.Cells(args)
    asked = dict(questions(args))
    for name in run.each(list(asked)):
        try:
            run.write(name, asked[name]())
        except Exception as e:
            run.failed(name, e, {})
    return run.status


if __name__ == "__main__":
    raise SystemExit(main())
