"""torch.nn and tconv in turns on the suite's layers: every pass in both layouts, bf16, by calls below autograd.

    python -m bench.race --record bench/results/DIR/race.jsonl --seconds 150 [--part first|rest] [--precision bf16]

A cell is a layer, pass and layout. Both sides get the same tensors, in turns, in one process, with the L2 cache overwritten
before each call; torch.nn with cudnn.benchmark. Before that tconv's result is compared with one in fp32. A cell that is wrong,
or that tconv's kernels did not compute, has an error and no time.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

import tconv
from bench import cells
from bench.correctness import relative_error, tolerance
from bench.layers import part_of_suite
from bench.providers import LAYOUTS, PRECISIONS, SINGLE, Held, Operands, reference, set_precision, tconv_, torch_nn
from bench.timing import Clock, in_turns
from tconv.launching.arguments import INTERPRET
from tconv.planning.cost import flops, least_bytes


def race(o: Operands, pass_: str, precision: str, clock: Clock, most: int) -> dict[str, object]:
    """Returns a cell: the error of tconv's result, its plans, and both sides' times of at most so many rounds.

    It has an "error" instead of times if the result is wrong or not by tconv's kernels.
    """
    mine, theirs = tconv_(o, pass_), torch_nn(o, pass_)
    with tconv.recording() as calls:
        got = mine()
    error = relative_error(got, reference(o, pass_)[0])
    line: dict[str, object] = {"error_norm": error, "plans": [str(c.plan) for c in calls if c.ours]}
    if error > tolerance(precision, o.layer.problem):
        return line | {"error": f"wrong result: relative error {error:.3g}"}
    if not all(c.ours for c in calls):
        return line | {"error": "not ours: " + "; ".join(str(c) for c in calls if not c.ours)}
    costs = [c.plan.cost for c in calls if c.plan and c.plan.cost]
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
    run, clock, held = cells.Cells(args), Clock(device), Held(device)
    set_precision(args.precision)
    torch.backends.cudnn.benchmark = True
    chosen = part_of_suite(args.part, args.tiny)
    table = {
        f"{layer.name} {args.precision} {pass_} {layout}": (layer, pass_, layout)
        for layer, layout, pass_ in itertools.product(chosen, LAYOUTS, SINGLE)
    }
    for name in run.each(list(table)):
        layer, pass_, layout = table[name]
        line = {
            "layer": layer.name, "family": layer.family, "precision": args.precision, "pass": pass_, "layout": layout,
        }  # fmt: skip
        try:
            o = held.get(layer.tiny() if args.tiny else layer, args.precision, layout)
            run.write(name, line | race(o, pass_, args.precision, clock, 2 if args.tiny else 40))
        except Exception as e:
            run.failed(name, e, line)
    return run.status


if __name__ == "__main__":
    raise SystemExit(main())
