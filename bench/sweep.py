"""Every plan that could have been chosen, beside the one that was: how much the planner leaves, and to which kernel.

    python -m bench.sweep --record bench/results/DIR/sweep.jsonl --seconds 100 [--part first|rest]

A cell is a layer, pass and layout; its line has a time for each kernel, tile and number of splits, and for some tiles that the
planner does not have. The kernels of some cells are compiled on all cores, then those cells are timed.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import tconv
from bench import cells
from bench.correctness import TOLERANCE, relative_error
from bench.layers import Layer, part_of_suite
from bench.providers import LAYOUTS, SINGLE, Held, Operands, operands, torch_nn
from bench.stage import FATAL, first_line
from bench.timing import Clock, in_turns
from tconv.launching import launch
from tconv.launching.arguments import INTERPRET, Prepared
from tconv.launching.memory_format import result_is_channels_last, weight_format
from tconv.launching.workers import COMPILED, FOUND, compile_launches
from tconv.planning.device import INTERPRETER, Device, cuda_device
from tconv.planning.families import FAMILIES
from tconv.planning.plan import KERNELS, Plan
from tconv.planning.problem import PREDICTED, Geometry
from tconv.planning.tiles import Tile

SPLITS = 2  # numbers of splits to try on either side of the planned one
SLICE = 24  # cells whose kernels are compiled at a time, so that a run that is cut has measured some
LIKELY = 3  # plans, the best by prediction, of which other splits and layouts of operands are tried too
# Tiles that the planner does not have, by kernel, to see what it would gain by them.
QUESTIONS = {
    "gather": (Tile(128, 128, 32, 8, 4), Tile(256, 64, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    "wgrad": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 128, 64, 4, 3)),
    "tma": (Tile(256, 64, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
}
Forced = dict[str, Any]


def prepared(
    o: Operands, pass_: str, forced: Forced, planned: Device | None = None
) -> tuple[Prepared, Callable[[], torch.Tensor]]:
    """The launch of a layer's pass under a forced plan, and the call that makes it.

    Args:
        planned: the device to plan for, for operands on "meta"; the call is a dry one.
    Raises:
        ValueError: no such plan can run.
    """
    channels_last, dry = result_is_channels_last(o.x, o.w), planned is not None
    g = Geometry(o.layer.problem, channels_last, dry, planned, weight_format(o.w, channels_last), PREDICTED)
    with tconv.force(**forced):
        if pass_ == "wgrad":
            pair = (o.x, o.dy) if o.layer.transposed else (o.dy, o.x)
            made = launch.weight_reduction(g, *pair)
            return made, lambda: launch.execute(made, dry, None, pair)
        forward = pass_ == "fprop"
        x, b = (o.x, o.b) if forward else (o.dy, None)
        made = launch.convolution(o.layer.transposed == forward, g, x, o.w, b)
        return made, lambda: launch.convolve(made, x, o.w, b, dry)


def candidates(o: Operands, pass_: str, device: Device) -> list[tuple[Plan, Forced]]:
    """The plans worth timing, each with what forces it; the planner's own choice first. Operands may be on "meta"."""

    def plan(**forced: Any) -> Plan | None:
        with contextlib.suppress(ValueError):
            found: Plan = prepared(o, pass_, forced, device)[0].call.plan
            return found
        return None

    chosen = plan()
    assert chosen is not None
    found: dict[Any, tuple[Plan, Forced]] = {_key(chosen): (chosen, {})}

    def add(**forced: Any) -> Plan | None:
        other = plan(**forced)
        if other is not None:
            found.setdefault(_key(other), (other, forced))
        return other

    for kernel in KERNELS[chosen.pass_]:
        best = plan(kernel=kernel)
        for tile in (*best.tiles, *QUESTIONS.get(kernel, ())) if best and best.kernel == kernel else ():
            add(kernel=kernel, tile=tile)
    likely = sorted(found.values(), key=lambda pair: pair[0].cost.rank if pair[0].cost else (0.0, 0.0))[:LIKELY]
    for own, _ in likely:
        at = own.parts.index(own.splits) if own.splits in own.parts else 0
        for splits in own.parts[max(0, at - SPLITS) : at + SPLITS + 1]:
            add(kernel=own.kernel, tile=own.tile, splits=splits)
        add(kernel=own.kernel, staged=not own.staged)
    return list(found.values())


def _key(plan: Plan) -> Any:
    return plan.kernel, plan.tile, plan.splits, plan.staged, plan.precision


Todo = dict[str, tuple[Operands, str, list[tuple[Plan, Forced]]]]


def plans_of(part: str, layouts: Sequence[str], tiny: bool, device: Device) -> tuple[dict[str, tuple[Layer, str, str]], Todo]:
    """The cells of a part of the suite, (layer, pass, layout) by name, and the plans of each, with operands on "meta"."""
    table = {
        f"{layer.name} bf16 {pass_} {layout}": (layer, pass_, layout)
        for layer, layout, pass_ in itertools.product(part_of_suite(part, tiny), layouts, SINGLE)
    }
    todo = {}
    for name, (layer, pass_, layout) in table.items():
        empty = operands(layer.tiny() if tiny else layer, "bf16", "meta").in_layout(layout)
        todo[name] = empty, pass_, candidates(empty, pass_, device)
    return table, todo


def compile_all(todo: Iterable[tuple[Operands, str, list[tuple[Plan, Forced]]]], device: Device, jobs: int | None) -> None:
    """Compiles the kernels of all candidates in parallel, and says how many failed."""
    from triton.runtime import driver

    with launch.collecting() as launches:
        for o, pass_, plans in todo:
            for _, forced in plans:
                prepared(o, pass_, forced, device)[1]()
    answers = compile_launches(launches, driver.active.get_current_target(), jobs, progress=False)
    bad = [f"{task.name}: {answer}" for task, _, answer in answers if answer not in (COMPILED, FOUND)]
    print(f"{len(answers)} kernels of {len(launches)} launches, {len(bad)} failed", *bad[:20], sep="\n", flush=True)


def sweep(o: Operands, pass_: str, plans: list[tuple[Plan, Forced]], clock: Clock, most: int) -> dict[str, Any]:
    """Returns a cell: the time of each plan, of at most so many rounds, and its error against torch.nn's result."""
    right = torch_nn(o, pass_)()
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for plan, forced in plans:
        name = f"{plan.kernel} {plan.tile} x{plan.splits}{' staged' if plan.staged else ''}"
        row = rows[name] = {"predicted_ms": plan.cost and 1e3 * plan.cost.seconds, "bound": plan.cost and plan.cost.bound}
        try:
            call = prepared(o, pass_, forced)[1]
            row["error_norm"] = relative_error(call(), right)
            if row["error_norm"] > 2 * TOLERANCE["bf16"]:  # both sides round
                row["error"] = "wrong result"
            else:
                calls[name] = call
        except Exception as e:
            row["error"] = first_line(e)
            if any(text in str(e) for text in FATAL):
                raise RuntimeError(f"{name}: {e}") from e
    chosen = next(iter(rows))
    for name, times in in_turns(clock, calls, budget=0.02 * len(calls), most=most).items():
        rows[name] |= {"ms": times.ms, "low_ms": times.low_ms, "high_ms": times.high_ms}
    timed = {name: row["ms"] for name, row in rows.items() if "ms" in row}
    without_tma = {name: ms for name, ms in timed.items() if not FAMILIES[name.split()[0]].tma}
    line: dict[str, Any] = {"chosen": chosen, "rows": rows}
    if chosen in timed:
        for key, among in (("", timed), ("_without_tma", without_tma)):
            best = min(among, key=among.__getitem__)
            line |= {f"best{key}": best, f"regret{key}": timed[chosen] / among[best]}
    else:
        line["error"] = f"the planner's choice: {rows[chosen].get('error')}"
    return line


def main() -> int:
    parser = cells.parser(__doc__ or "")
    parser.add_argument(
        "--part", choices=("first", "rest"), default="first", help="the 24 layers that stand for all, or the rest"
    )
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="only this layout")
    parser.add_argument("--jobs", type=int, help="processes that compile; one per core if not given")
    args = parser.parse_args()
    device = "cpu" if INTERPRET else "cuda"
    run, clock, held = cells.Cells(args), Clock(device), Held(device)
    torch.backends.cudnn.benchmark = False
    planned = INTERPRETER if INTERPRET else cuda_device(torch.cuda.current_device())
    table, todo = plans_of(args.part, args.layout or LAYOUTS, args.tiny, planned)
    names = list(table)
    for start in range(0, len(names), SLICE):
        part = names[start : start + SLICE]
        left = [todo[name] for name in part if name not in run.done]
        if left and not INTERPRET and not run.late():
            compile_all(left, planned, args.jobs)
        for name in run.each(part):
            layer, pass_, layout = table[name]
            line = {"layer": layer.name, "family": layer.family, "pass": pass_, "layout": layout}
            plans = todo[name][2][: 2 if args.tiny else None]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    o = held.get(layer.tiny() if args.tiny else layer, "bf16", layout)
                    run.write(name, line | sweep(o, pass_, plans, clock, 2 if args.tiny else 15))
            except Exception as e:
                run.failed(name, e, line)
    return run.status


if __name__ == "__main__":
    raise SystemExit(main())
