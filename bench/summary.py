"""A folder of records in at most 40 lines: what failed, what the device reaches, where tconv wins and loses.

It serves every stage of scripts/gpu.sh, whichever of them have left a record.
"""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from bench.record import read_all

MOST = 40  # lines
CELL = ("provider", "layer", "precision", "pass", "layout")
Line = dict[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def tests(name: str, lines: list[Line], most: int) -> list[str]:
    """A stage of tests: counts, and what went wrong in the first ones."""
    last = {line["test"]: line for line in lines if "outcome" in line}
    counts = collections.Counter(line["outcome"] for line in last.values())
    wrong = [line for line in last.values() if line["outcome"] not in ("passed", "skipped")]
    found = [f"{name}: " + (", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "nothing run")]
    for line in wrong[:most]:
        detail = " ".join(str(line.get("detail", "")).split())
        found.append(f"  {line['test'].removeprefix('tests/')}: {detail}"[:200])
    return found


def facts(lines: list[Line]) -> list[str]:
    by_name = {line["cell"]: line for line in lines if "cell" in line}
    found = []
    limits = by_name.get("limits", {})
    if "matrix_16" in limits:
        rates = ", ".join(f"{k} {limits[k] / 1e12:.0f}" for k in ("matrix_16", "matrix_tf32", "fma_32", "matrix_64"))
        found.append(f"device: {rates} TFLOP/s, copy {limits['bandwidth'] / 1e12:.2f} TB/s")
    if "bytes_per_second" in by_name.get("L2 read", {}):
        found.append(f"  L2 read {by_name['L2 read']['bytes_per_second'] / 1e12:.1f} TB/s")
    gap = by_name.get("launch gap", {})
    if "graph" in gap:
        found.append("  us per small kernel: " + ", ".join(f"{k} {1e6 * gap[k]:.1f}" for k in gap if k != "cell"))
    for row, sides in by_name.get("host share", {}).items():
        if isinstance(sides, dict):
            found.append(f"  host us, {row}: " + ", ".join(f"{side} {us:.1f}" for side, us in sides.items()))
    return found + [f"  {line['cell']}: {line['error']}"[:200] for line in by_name.values() if "error" in line]


def as_raced(cells: list[Line]) -> list[Line]:
    """Pairs of torch.nn's and tconv's cells of bench/test_layers.py in a layout, as lines of bench/race.py."""
    both: dict[tuple[str, ...], dict[str, Line]] = collections.defaultdict(dict)
    for c in cells:
        both[c["layer"], c["precision"], c["pass"], c["layout"]][c["provider"]] = c
    return [
        {**pair["tconv"], "cell": " ".join(key), "ratio": pair["torch.nn"]["ms"] / pair["tconv"]["ms"], **pair}
        for key, pair in both.items()
        if all("ms" in pair.get(provider, {}) for provider in ("torch.nn", "tconv"))
    ]


def better_layout(cells: list[Line]) -> dict[str, float]:
    """Each cell's name -> the least of torch.nn's times in the layouts that were measured, over tconv's time."""
    least: dict[tuple[str, ...], float] = {}
    for c in cells:
        key = c["layer"], c["precision"], c["pass"]
        least[key] = min(least.get(key, math.inf), c["torch.nn"]["ms"])
    return {c["cell"]: least[c["layer"], c["precision"], c["pass"]] / c["tconv"]["ms"] for c in cells}


def ratios(lines: list[Line]) -> list[str]:
    """Geometric means of torch.nn's time over tconv's by family, and the worst and best cells."""
    cells = [line for line in lines if "ratio" in line]
    if not cells:
        return []
    groups: dict[str, dict[tuple[str, str], list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    better = better_layout(cells)
    for line in cells:
        at = line["layout"], line["pass"]
        if line["precision"] == "bf16":
            groups[line["family"]][at].append(line["ratio"])
            groups["all"][at].append(line["ratio"])
            groups["all, better layout"][at].append(better[line["cell"]])
        else:
            groups[f"all, {line['precision']}"][at].append(line["ratio"])
    passes = [p for p in ("fprop", "dgrad", "wgrad", "step") if any(line["pass"] == p for line in cells)]
    columns = [(layout, pass_) for layout in ("contiguous", "channels_last") for pass_ in passes]
    found = [f"torch.nn's time / tconv's over {len(cells)} cells; contiguous, then channels_last: {' '.join(passes)}"]
    for family, by in sorted(groups.items(), key=lambda item: item[0].startswith("all")):
        shown = " ".join(f"{geometric_mean(by[c]):6.2f}" if by.get(c) else "     -" for c in columns)
        found.append(f"  {family:18s}{shown}")
    worst = sorted(cells, key=lambda line: line["ratio"])
    for title, chosen in (("worst", worst[:6]), ("best", worst[:-4:-1])):
        found += [f"  {title}: {c['cell']} {c['ratio']:.2f} ({c['tconv']['ms'] * 1e3:.0f} us)" for c in chosen]
    return found


def regret(lines: list[Line]) -> list[str]:
    """How many times as long as the best plan the planner's choice takes, by family."""
    by: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for line in lines:
        if "regret" in line:
            without = line.get("regret_without_tma", line.get("proven_regret"))  # its name in the first records
            by[line["family"]].append((line["regret"], without))
    found = ["the planner's choice over the best plan, and over the best without TMA:"] if by else []
    return found + [
        f"  {family:18s} {geometric_mean(r for r, _ in each):.2f} {geometric_mean(w for _, w in each):.2f} ({len(each)} cells)"
        for family, each in by.items()
    ]


def models(cells: list[Line]) -> list[str]:
    """torch.nn's time over tconv's for whole models: inference and training, each contiguous, then channels_last."""
    ms = {(c["model"], c["step"], c["layout"], c["provider"]): c["ms"] for c in cells if "ms" in c}
    found = ["whole models, torch.nn's time / tconv's; inference, then training: contiguous channels_last"] if ms else []
    for model in dict.fromkeys(key[0] for key in ms):
        shown = []
        for step, layout in ((s, way) for s in ("inference", "training") for way in ("contiguous", "channels_last")):
            both = [ms.get((model, step, layout, provider)) for provider in ("torch.nn", "tconv")]
            shown.append(f"{both[0] / both[1]:6.2f}" if both[0] and both[1] else "     -")
        found.append(f"  {model:22s}{' '.join(shown)}")
    return found + [f"  {c['model']} {c['step']}: {c['error']}"[:200] for c in cells if "error" in c]


def lines(folder: pathlib.Path) -> list[str]:
    """The summary."""
    records, complaints = read_all(folder)
    if not records:
        return [*complaints, f"no records in {folder}"]
    m = next(iter(records.values())).machine
    found = [" ".join(f"{key} {m.get(key)}" for key in ("gpu", "driver", "torch", "triton", "cudnn", "commit"))]
    for name, record in records.items():
        if any("outcome" in line for line in record.lines):
            found += tests("tests" if name == "checks" else name, record.lines, 8)
    if "facts" in records:
        found += facts(records["facts"].lines)
    raced = records["race"].lines if "race" in records else []
    last = {line["test"]: line["cell"] for line in records["layers"].lines if "cell" in line} if "layers" in records else {}
    measured = list(last.values())
    swept = records["sweep"].lines if "sweep" in records else []
    broken = [f"{line['cell']}: {line['error']}" for line in raced if "error" in line]
    broken += [f"sweep, {line['cell']}: {line['error']}" for line in swept if "error" in line]
    broken += [" ".join(c[k] for k in CELL) + f": {c['error']}" for c in measured if "error" in c]
    found += [f"  {text}"[:200] for text in broken[:4]]
    if len(broken) > 4:
        found.append(f"  and {len(broken) - 4} more cells that failed")
    found += ratios(as_raced(measured) or raced)
    found += regret(swept)
    if "models" in records:
        found += models([line["cell"] for line in records["models"].lines if "cell" in line])
    found += [
        f"{line['tool']}: {line['found']} found{'' if line.get('complete', True) else ', incomplete'}"
        for r in records.values()
        for line in r.lines
        if "tool" in line
    ]
    found += complaints
    return found if len(found) <= MOST else [*found[: MOST - 1], f"({len(found) - MOST + 1} more lines: see the records)"]
