"""Compares the cost model of this checkout with the times in records: what was measured over what it predicts, and its regret.

    python -m bench.calibration [--tma] [FOLDER ...]    # folders of bench/results; default: all of an H200

The prediction is made anew for every plan that a sweep or a race timed in bf16 on an H200, to which the model is fitted. The
regret of a cell is the time of the plan that the planner would choose today over that of the fastest plan timed; cells whose
choice was not timed are counted apart.
Plans by TMA are left out unless --tma is given: when the first records were made, TMA was launched by Triton's dispatch, and
the host limited the shorter ones.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # plans only: no GPU is needed

from bench import record, sweep
from bench.layers import layers
from bench.providers import Operands, operands, set_precision
from bench.summary import geometric_mean
from tconv.planning.device import DEVICES, Device
from tconv.planning.families import FAMILIES
from tconv.planning.persistent import SPECIALISED
from tconv.planning.plan import Plan
from tconv.planning.tiles import Tile

TILE = r"(\d+)x\(?(\d+)(?:\+(\d+)\))?x(\d+) w(\d+) s(\d+)(?: r(\d+))?(?: c(\d+))?"
SWEPT = re.compile(rf"(?P<kernel>\w+) (?P<tile>{TILE}) x(?P<splits>\d+)(?P<staged> staged)?")
RACED = re.compile(
    rf"\w+: (?P<kernel>\w+) (?P<tile>{TILE})(?:, (?P<splits>\d+) splits)?(?P<staged>, .* copied to channels last)? \("
)


@dataclass(frozen=True)
class Timed:
    """A plan that was timed.

    Attributes:
        layer, family, pass_, layout: its cell.
        plan: the text that named it, in SWEPT's or RACED's form.
        seconds: the median of its times.
    """

    layer: str
    family: str
    pass_: str
    layout: str
    plan: re.Match[str]
    seconds: float

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.layer, self.pass_, self.layout


def timed(folders: Sequence[pathlib.Path]) -> Iterator[Timed]:
    """Yields every plan timed in bf16 by the sweeps and races of these folders. Passes of several launches are left out."""
    for folder in folders:
        for stage, found in record.read_all(folder)[0].items():
            if "H200" not in found.machine.get("gpu", ""):
                continue
            for line in found.lines:
                if line.get("precision", "bf16") != "bf16":
                    continue
                rows = line.get("rows", {}) if stage == "sweep" else {}
                if stage == "race" and "tconv" in line and len(line["plans"]) == 1:
                    rows = {line["plans"][0]: line["tconv"]}
                for name, row in rows.items():
                    plan = (SWEPT.fullmatch if stage == "sweep" else RACED.match)(name)
                    if plan and "ms" in row:
                        yield Timed(line["layer"], line["family"], line["pass"], line["layout"], plan, row["ms"] / 1e3)


class Model:
    """The planner of this checkout, asked for the suite's layers on a device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._layers = {layer.name: layer for layer in layers()}
        self._operands: dict[tuple[str, str], Operands] = {}
        set_precision("bf16")

    def plan(self, t: Timed, **forced: Any) -> Plan:
        """Returns the plan of a cell.

        Raises:
            ValueError: no plan can be as it is forced.
        """
        key = t.layer, t.layout
        if key not in self._operands:
            self._operands[key] = operands(self._layers[t.layer], "bf16", "meta").in_layout(t.layout)
        found = sweep.prepared(self._operands[key], t.pass_, forced, self.device)[0].call.plan
        assert found is not None
        return found

    def predicted(self, t: Timed) -> float | None:
        """Returns the predicted seconds of a plan that was timed; None if it can no longer be planned."""
        kernel, splits = t.plan["kernel"], int(t.plan["splits"] or 1)
        forced: dict[str, Any] = {"kernel": kernel, "tile": tile_of(t.plan), "staged": t.plan["staged"] is not None}
        if kernel == "gather" or t.pass_ == "wgrad":
            forced["splits"] = splits
        try:
            cost = self.plan(t, **forced).cost
        except ValueError:
            return None
        return cost and cost.seconds


def tile_of(plan: re.Match[str]) -> Tile:
    """Returns the tile that a plan's text names, in SWEPT's or RACED's form."""
    first = plan.re.groupindex["tile"]
    m, n, extra, k, warps, stages, registers, columns = (int(v or 0) for v in plan.groups()[first : first + 8])
    return Tile(m, n, k, warps, stages, registers, columns or 1, extra)


def name(plan: Plan) -> tuple[Any, ...]:
    """What tells plans of a cell apart."""
    return plan.kernel, str(plan.tile), plan.splits, bool(plan.staged)


def compare(found: Sequence[Timed], model: Model) -> list[str]:
    """Returns lines of a table by family and pass: cells, plans, measured over predicted with its spread, regret."""
    ratios: dict[Any, list[float]] = collections.defaultdict(list)
    cells: dict[Any, dict[tuple[Any, ...], Timed]] = collections.defaultdict(dict)
    for t in found:
        predicted = model.predicted(t)
        if predicted:
            ratios[t.family, t.pass_].append(t.seconds / predicted)
            cells[t.cell][t.plan["kernel"], t.plan["tile"], int(t.plan["splits"] or 1), t.plan["staged"] is not None] = t
    regrets: dict[Any, list[float]] = collections.defaultdict(list)
    missing: collections.Counter[Any] = collections.Counter()
    for plans in cells.values():
        one = next(iter(plans.values()))
        if len(plans) > 1:  # a race times one plan
            chosen = plans.get(name(model.plan(one)))
            best = min(t.seconds for t in plans.values())
            if chosen:
                regrets[one.family, one.pass_].append(chosen.seconds / best)
            else:
                missing[one.family, one.pass_] += 1
    rows = ["| family | pass | plans timed | measured / predicted | regret | cells | choice not timed |", "|" + "---|" * 7]
    keys = sorted(ratios)
    for (family, pass_), group in (*((key, [key]) for key in keys), (("all", ""), keys)):
        over = [r for key in group for r in ratios[key]]
        known = [r for key in group for r in regrets[key]]
        unknown = sum(missing[key] for key in group)
        regret = f"{geometric_mean(known):.2f}" if known else ""
        rows.append(f"| {family} | {pass_} | {len(over)} | {_spread(over)} | {regret} | {len(known) + unknown} | {unknown} |")
    return rows


def _spread(ratios: Sequence[float]) -> str:
    """A geometric mean and how far apart the ratios are, as the factor of one standard deviation of their logarithms."""
    mean = geometric_mean(ratios)
    deviation = math.sqrt(sum(math.log(r / mean) ** 2 for r in ratios) / len(ratios))
    return f"{mean:.2f} x/ {math.exp(deviation):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=pathlib.Path, help="folders of records")
    parser.add_argument("--tma", action="store_true", help="plans by TMA too")
    args = parser.parse_args()
    folders = args.folders or sorted(record.RESULTS.glob("nvidia-h200-*"))
    barred = {SPECIALISED} if args.tma else {SPECIALISED, "tma"}  # no record has timed specialised warps
    device = dataclasses.replace(DEVICES["H200"], check=lambda mechanism: mechanism not in barred)
    found = [t for t in timed(folders) if args.tma or not FAMILIES[t.plan["kernel"]].tma]
    if not found:
        parser.error(f"no plans that an H200 timed in bf16 in {', '.join(map(str, folders)) or record.RESULTS}")
    for stage in ("sweep", "race"):
        part = [t for t in found if (t.plan.re is SWEPT) == (stage == "sweep")]
        print(f"\n{stage} of {', '.join(folder.name for folder in folders)}\n")
        print("\n".join(compare(part, Model(device))) if part else "nothing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
