"""torch.nn and tconv in turns on the suite's layers: every pass in both layouts, bf16, by calls below autograd.

    python -m bench.race --record bench/results/DIR/race.jsonl --seconds 150 [--part first|rest] [--precision bf16]

A cell is a layer, pass and layout. Both sides get the same tensors, in turns, in one process, with the L2 cache overwritten
before each call; torch.nn with cudnn.benchmark. Before that tconv's result is compared with one in fp32.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

import tconv
from bench import cells
from bench.layers import Layer, part_of_suite
from bench.providers import LAYOUTS, PRECISIONS, Operands, operands, reference, set_precision, tconv_, torch_nn
from bench.timing import Clock, in_turns
from tconv.launching.arguments import INTERPRET
from tconv.planning.cost import flops, least_bytes

PASSES = ("fprop", "dgrad", "wgrad")
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 2e-5}


def error_norm(got: torch.Tensor, right: torch.Tensor) -> float:
    """||got - right|| / ||right||; infinite where something is NaN or shapes differ."""
    if got.shape != right.shape:
        return float("inf")
    norm = (got.to(right.dtype) - right).norm() / right.norm().clamp_min(1e-30)
    return float(norm.nan_to_num(float("inf")))


class Held:
    """The operands of a layer in each layout, made when first asked for; one layer's at a time."""

    def __init__(self, precision: str, device: str, tiny: bool) -> None:
        self.precision, self.device, self.tiny = precision, device, tiny
        self.layer: Layer | None = None

    def get(self, layer: Layer, layout: str) -> Operands:
        if layer is not self.layer:
            self.layer, self.made = layer, {}
            torch.manual_seed(0)
            shown = layer.tiny() if self.tiny else layer
            self.made["contiguous"] = operands(shown, self.precision, self.device)
        if layout not in self.made:
            self.made[layout] = self.made["contiguous"].in_layout(layout)
        return self.made[layout]


def race(o: Operands, pass_: str, clock: Clock, tolerance: float, most: int) -> dict[str, object]:
    """Returns a cell: the error of tconv's result, its plans, and both sides' times of at most so many rounds."""
    mine, theirs = tconv_(o, pass_), torch_nn(o, pass_)
    with tconv.recording() as calls:
        got = mine()
    error = error_norm(got, reference(o, pass_)[0])
    line: dict[str, object] = {"error_norm": error, "plans": [str(c.plan) for c in calls if c.ours]}
    if error > tolerance:
        return line | {"error": f"wrong result: relative error {error:.3g}"}
    if not all(c.ours for c in calls):
        line["not_ours"] = "; ".join(str(c) for c in calls if not c.ours)
    costs = [c.plan.cost for c in calls if c.ours and c.plan and c.plan.cost]
    times = in_turns(clock, {"torch.nn": theirs, "tconv": mine}, most=most)
    problem = o.layer.problem
    return line | {
        "predicted_ms": 1e3 * sum(c.seconds for c in costs),
        "flops": flops(problem),
        "bytes": least_bytes(problem, pass_, o.x.element_size()),
        "ratio": times["torch.nn"].ms / times["tconv"].ms,
        "torch.nn": dataclasses.asdict(times["torch.nn"]),
        "tconv": dataclasses.asdict(times["tconv"]),
    }


def main() -> int:
    parser = cells.parser(__doc__ or "")
    parser.add_argument(
        "--part", choices=("first", "rest"), default="first", help="the 24 layers that stand for all, or the rest"
    )
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    args = parser.parse_args()
    device = "cpu" if INTERPRET else "cuda"
    run, clock, held = cells.Cells(args), Clock(device), Held(args.precision, device, args.tiny)
    set_precision(args.precision)
    torch.backends.cudnn.benchmark = True
    chosen = part_of_suite(args.part, args.tiny)
    table = {
        f"{layer.name} {args.precision} {pass_} {layout}": (layer, pass_, layout)
        for layer, layout, pass_ in itertools.product(chosen, LAYOUTS, PASSES)
    }
    for name in run.each(list(table)):
        layer, pass_, layout = table[name]
        line = {
            "layer": layer.name, "family": layer.family, "precision": args.precision, "pass": pass_, "layout": layout,
        }  # fmt: skip
        try:
            run.write(
                name, line | race(held.get(layer, layout), pass_, clock, TOLERANCE[args.precision], 2 if args.tiny else 40)
            )
        except Exception as e:
            run.failed(name, e, line)
    return run.status


if __name__ == "__main__":
    raise SystemExit(main())
