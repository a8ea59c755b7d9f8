"""Holds the cost model's counts to those of the compiled code, without a GPU.

    python -m bench.counted [--only REGEX] [--layout contiguous] [--record PATH]    # of every layer and pass the planner's plan

Each plan for an H100 runs in the simulator once, in bf16, on a smaller problem (bench/smaller.py). What it did is counted
(simulator/counters.py) and compared with what the model says of that smaller problem. A warp's instructions and bytes are
counted per program and per iteration of the main loop, so times the whole layer's programs and iterations they are the layer's.
Where programs stay for several tiles, a tile counts as a program.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import os
import pathlib
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: this is about compiled code

import torch
import triton

import simulator
from bench.layers import layers
from bench.predict import plans
from bench.providers import LAYOUTS
from bench.smaller import smaller
from scripts import codegen_budget as budget
from simulator.counters import Counts, LoopCount
from simulator.resources import occupancy
from tconv.launching.variants import variant_of
from tconv.planning.device import ARCHITECTURES
from tconv.planning.plan import Plan
from tconv.planning.problem import ConvProblem
from tconv.planning.strip import CHUNK

ARCH, DTYPE = "sm_90", torch.bfloat16
DEVICE = ARCHITECTURES[ARCH][3]
RECORD = pathlib.Path(__file__).with_name("counted.csv")
COLUMNS = (
    "layer", "pass", "layout", "kernel", "tile", "splits", "problem", "programs", "model_programs", "steps", "model_steps",
    "operations", "model_operations", "loop", "machine_loop", "model_loop", "outside", "read", "read_once",
    "model_read", "touched", "model_touched", "wavefronts", "conflicts", "wgmma_bytes", "boxes", "waits", "resident",
    "model_resident", "whole_programs", "whole_steps", "whole_instructions", "whole_read",
)  # fmt: skip


@dataclass(frozen=True)
class Each:
    """What a launch does on average.

    Attributes:
        step: instructions of a warp per iteration of the main loop.
        outside: instructions of a warp outside of it.
        read: bytes of the sectors that a program asks for per iteration.
    """

    step: float
    outside: float
    read: float

    @staticmethod
    def of(c: Counts, steps: int, warps: int = 0) -> Each:
        """Returns it for a launch with so many iterations over all programs.

        Args:
            warps: of a program that multiply, if others do other things; 0 if all do the same.
        """
        inside = sum(_without_moves(found.instructions) for found in main_loops(c, warps > 0))
        outside = (_without_moves(c.instructions()) - inside) / (c.programs * (warps or c.warps))
        return Each(inside / (steps * (warps or c.warps)), outside, sum(o.asked for o in c.reads.values()) / steps)

    def whole(self, programs: int, warps: int, steps: int) -> tuple[int, int]:
        """Returns (instructions of all warps, bytes asked for) of a launch with so many programs and iterations in all."""
        return round(warps * (programs * self.outside + steps * self.step)), round(steps * self.read)


def main_loops(c: Counts, parted: bool) -> list[LoopCount]:
    """Returns the loops that run once per iteration of the model's, first the one that multiplies.

    Args:
        parted: whether warps do different things, each in loops of its own, and programs stay for several tiles. Main loops are
            then the innermost ones that multiply or ask for boxes.
    """
    if not parted:
        return [c.main_loop] if c.main_loop else []
    inner = [a for a in c.loops if not any(b.loop.blocks < a.loop.blocks for b in c.loops)]
    return [found for kind in ("tensor", "boxes") for found in inner if found.instructions[kind]]


def _without_moves(instructions: Counter[str]) -> int:
    """Returns the instructions of which ptxas makes one of the machine's, more or less: it drops most moves."""
    return instructions.total() - instructions["move"]


def compare(layer: str, p: ConvProblem, plan: Plan, layout: str, machine: budget.Budget) -> dict[str, Any]:
    """Returns a row of the record: the counts of a plan, and the model's.

    Args:
        machine: what scripts/codegen.py recorded of the compiled variants.
    """
    q, part, whole = smaller(p, plan, layout == "channels_last", DTYPE, DEVICE)
    c, work = part.count(), part.work
    parted = work.turn is not None
    main, warps = main_loops(c, parted), plan.tile.warps if parted else c.warps
    # An iteration of the model's is a row of the filter. Of strip kernels in 1-D there is one, unrolled, or cut in a loop.
    rows = main and (plan.kernel != "strip" or q.T[2] <= CHUNK)
    steps = main[0].iterations // warps if rows else work.steps
    each, read, written = Each.of(c, steps, warps if parted else 0), c.reads.values(), c.writes.values()
    code = machine.get(variant_of(plan.pass_, part.prepared, DTYPE).name, {})
    resident = occupancy(ARCH, 32 * c.warps, code["registers"], code["shared_bytes"]).programs if code else ""
    shared, result = c.memory("shared").values(), part.prepared.shape.numel() * DTYPE.itemsize
    instructions, bytes_ = each.whole(whole.cost.programs, warps, whole.work.steps)
    return {
        "layer": layer, "pass": plan.pass_, "layout": layout, "kernel": plan.kernel, "tile": str(plan.tile),
        "splits": plan.splits, "problem": str(q), "programs": c.programs, "model_programs": part.cost.programs,
        "steps": steps if rows else "", "model_steps": work.steps, "operations": c.operations,
        "model_operations": round(work.steps * work.flops), "loop": round(each.step, 1) if rows else "",
        "machine_loop": code.get("loop_instructions", "") if rows else "", "model_loop": round(part.length, 1),
        "outside": round(each.outside, 1), "read": sum(o.asked for o in read), "read_once": sum(o.first for o in read),
        "model_read": work.steps * work.fetched, "touched": sum(o.touched for o in (*read, *written)),
        # With splits the kernel writes the workspace, and only their sum the result.
        "model_touched": part.cost.bytes + part.cost.workspace - (result if plan.splits > 1 else 0),
        "wavefronts": sum(a.transactions for a in shared), "conflicts": sum(a.transactions - a.least for a in shared),
        "wgmma_bytes": c.wgmma_bytes, "boxes": c.boxes, "waits": round(c.waits.total() / (c.programs * c.warps), 1),
        "resident": resident, "model_resident": work.resident, "whole_programs": whole.cost.programs,
        "whole_steps": whole.work.steps, "whole_instructions": instructions, "whole_read": bytes_,
    }  # fmt: skip


def chosen(only: str, layout: str) -> Iterator[tuple[str, ConvProblem, Plan]]:
    """Yields the planner's plans, those whose "layer pass kernel" matches."""
    for layer in layers():
        for plan in plans(layer, "bf16", layout, DEVICE).values():
            if re.search(only, f"{layer.name} {plan.pass_} {plan.kernel}"):
                yield layer.name, layer.problem, plan


def record(path: pathlib.Path = RECORD) -> list[dict[str, Any]]:
    """Returns the rows of a record, numbers as such; None for what is not known."""
    rows = csv.DictReader(path.read_text().splitlines()[1:])
    texts = ("layer", "pass", "layout", "kernel", "tile", "problem")
    return [{k: v if k in texts else float(v) if v else None for k, v in row.items()} for row in rows]


RATIOS = {  # head of a column: what is divided by what
    "iterations": ("steps", "model_steps"), "loop, machine code": ("machine_loop", "model_loop"),
    "loop, PTX": ("loop", "model_loop"), "bytes in sectors": ("read", "model_read"),
    "bytes, once a program": ("read_once", "model_read"), "programs resident": ("resident", "model_resident"),
    "bank conflicts": ("conflicts", "wavefronts"),
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Returns counts over what the model says, by kernel and pass, as a table in Markdown: least, median, most."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["kernel"], row["pass"]].append(row)
    lines = ["| kernel | pass | plans | " + " | ".join(RATIOS) + " |", "|---" * (3 + len(RATIOS)) + "|"]
    for (kernel, pass_), mine in sorted(found.items()):
        cells = []
        for over, under in RATIOS.values():
            ratios = [row[over] / row[under] for row in mine if row[over] is not None and row[under]]
            least, most = min(ratios, default=0), max(ratios, default=0)
            texts = f"{least:.2f}", f"{statistics.median(ratios or [0]):.2f}", f"{most:.2f}"
            cells.append(texts[0] if len({*texts}) == 1 else ", ".join(texts))
        lines.append(f"| {kernel} | {pass_} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that LAYER PASS KERNEL must match")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last", help="of the operands")
    parser.add_argument(
        "--record", type=pathlib.Path, help=f"write the rows there, as CSV; the committed ones are {RECORD.name}"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print the committed record by kernels")
    args = parser.parse_args()
    if args.table:
        print(table(record()))
        return 0
    from tqdm import tqdm

    simulator.install(ARCH)
    torch.set_num_threads(1)
    machine = budget.load(budget.short(triton.__version__), ARCH)
    tasks, failed = list(chosen(args.only, args.layout)), 0
    if not tasks:
        parser.error(f"no plan matches {args.only!r}")
    with open(args.record, "w", newline="") if args.record else contextlib.nullcontext(sys.stdout) as file:
        file.write(f"# Triton {budget.short(triton.__version__)}, {ARCH}, bf16\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for layer, p, plan in tqdm(tasks, desc="running", unit="plan", disable=None):
            try:
                writer.writerow(compare(layer, p, plan, args.layout, machine))
                file.flush()
            except (ValueError, simulator.Unsupported) as e:
                failed += 1
                print(f"{layer}, {plan}: {e}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
