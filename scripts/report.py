#!/usr/bin/env python3
"""Turns the records under bench/results/ into tables and pictures; without records, the cost model's predictions.

    python scripts/report.py [--out DIR] [--precision P] [--readme] [FOLDER ...]    # tables.md and PNGs into DIR (out/report)
    python scripts/report.py --predicted [--readme]    # the cost model's predictions, whatever is recorded
    python scripts/report.py --summary FOLDER          # at most 40 lines about one folder, to the terminal

All records of a GPU are one report, the newest of each cell, and of several GPUs the one measured last is reported. Cells that
were measured before are compared with the time before. --readme also writes the table of families into README.md, between its
two report marks, and predictions into docs/predicted.md with their picture. Files that are cut or foreign are named and
skipped.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench import summary
from bench.layers import FAMILIES, layers
from bench.providers import LAYOUTS, PASSES, PRECISIONS
from bench.record import RESULTS, ROOT, Record, read_all
from bench.summary import geometric_mean

Cell = dict[str, Any]
MARKS = ("<!-- report -->", "<!-- /report -->")


@dataclass
class Run:
    """What one record of times has: its first line, its cells, whole models' cells, and the device's limits if it has them."""

    machine: Cell
    cells: list[Cell]
    models: list[Cell] = field(default_factory=list)
    limits: dict[str, float] | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=pathlib.Path, help="records; default all under bench/results")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "report")
    parser.add_argument("--summary", type=pathlib.Path, metavar="FOLDER", help="print a short summary of one folder and stop")
    parser.add_argument("--predicted", action="store_true", help="the cost model's predictions, also where there are records")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md, or docs/predicted.md")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    args = parser.parse_args()
    if args.predicted and (args.folders or args.summary):
        parser.error("--predicted reads no records")
    if args.summary:
        if not args.summary.is_dir():
            parser.error(f"{args.summary} is no folder")
        print("\n".join(summary.lines(args.summary)))
        return 0
    runs = [] if args.predicted else recorded(args.folders)
    if args.folders and not runs and not args.predicted:
        parser.error(f"no records in {', '.join(map(str, args.folders))}")
    args.out.mkdir(parents=True, exist_ok=True)
    text, short = measured(runs, args) if runs else predicted(args)
    (args.out / "tables.md").write_text(text + "\n")
    print(text)
    print(f"\nwritten to {args.out}")
    if args.readme:
        if not args.predicted:
            write_readme(ROOT / "README.md", short)
        if not runs:
            shutil.copyfile(args.out / "tables.md", ROOT / "docs" / "predicted.md")
            shutil.copyfile(args.out / "roofline-predicted.png", ROOT / "docs" / "roofline-predicted.png")
    return 0


def recorded(folders: list[pathlib.Path]) -> list[Run]:
    """The records of one GPU, the one that was measured last, in their order of time.

    Args:
        folders: where they are; none for all under bench/results, dry runs left out.
    """
    runs = []
    for folder in folders or sorted(p for p in RESULTS.glob("*") if p.is_dir()):
        records, complaints = read_all(folder)
        for line in complaints:
            print(f"skipped: {line}")
        found = []
        if "race" in records:
            found.append(Run(records["race"].machine, race_cells(records["race"])))
        if "layers" in records:
            record = records["layers"]
            limits = next((line["limits"] for line in reversed(record.lines) if "limits" in line), None)
            found.append(Run(record.machine, cells_of(record), limits=limits))
        if "models" in records:
            found.append(Run(records["models"].machine, [], cells_of(records["models"])))
        if "facts" in records:
            rates = (line for line in records["facts"].lines if line.get("cell") == "limits" and "error" not in line)
            found += [Run(records["facts"].machine, [], limits={k: v for k, v in r.items() if k != "cell"}) for r in rates]
        runs += [run for run in found if folders or not run.machine.get("tiny")]
    runs.sort(key=lambda run: str(run.machine.get("date")))
    timed = [run for run in runs if run.cells or run.models]
    if not timed:
        return []
    gpu = timed[-1].machine.get("gpu")
    others = sorted({str(run.machine.get("gpu")) for run in timed if run.machine.get("gpu") != gpu})
    if others:
        print(f"left out: records of {', '.join(others)}; to report those, name their folders alone")
    return [run for run in runs if run.machine.get("gpu") == gpu]


def race_cells(race: Record) -> list[Cell]:
    """What bench/race.py recorded, as bench/test_layers.py would have."""
    cells: list[Cell] = []
    for line in race.lines:
        for provider in ("torch.nn", "tconv"):
            cell = {k: line.get(k) for k in ("layer", "family", "precision", "pass", "layout")} | {"provider": provider}
            if provider in line:
                ms = line[provider]["ms"]
                cells.append(cell | {"ms": ms, "tflops": line["flops"] / ms / 1e9, "gbs": line["bytes"] / ms / 1e6})
            elif provider == "tconv" and cell["layer"]:
                cells.append(cell | {"error": line.get("error")})
    return cells


def cells_of(record: Record) -> list[Cell]:
    """A record's cells, the last word on each."""
    found = {}
    for line in record.lines:
        cell = line.get("cell")
        if isinstance(cell, dict):
            found[line.get("test")] = cell
    return list(found.values())


def newest(tables: Iterable[list[Cell]], keys: tuple[str, ...]) -> tuple[list[Cell], list[Cell]]:
    """(the last table's cells of each key, tconv's cells of those keys in the table before), so that both sides of a ratio are
    of one run."""
    by: dict[tuple[Any, ...], list[list[Cell]]] = collections.defaultdict(list)
    for table in tables:
        here: dict[tuple[Any, ...], list[Cell]] = collections.defaultdict(list)
        for c in table:
            here[tuple(c[k] for k in keys)].append(c)
        for key, cells in here.items():
            by[key].append(cells)
    now: list[Cell] = []
    before: list[Cell] = []
    for each in by.values():
        ours = [cells for cells in each if any(c["provider"] == "tconv" for c in cells)] or each
        now += ours[-1]
        before += [c for c in (ours[-2] if len(ours) > 1 else []) if c["provider"] == "tconv"]
    return now, before


def speedups(cells: list[Cell], precision: str) -> list[Cell]:
    """A row per layer, pass and layout of ours: torch.nn's time over ours in the "same" layout, and in its "best" one."""
    times = {
        (c["provider"], c["layer"], c["pass"], c["layout"]): c["ms"] for c in cells if c["precision"] == precision and "ms" in c
    }
    rows = []
    for (provider, layer, pass_, layout), ms in times.items():
        theirs = {k: t for k in LAYOUTS if (t := times.get(("torch.nn", layer, pass_, k)))}
        if provider == "tconv" and layout in theirs:
            family = next(c["family"] for c in cells if c["layer"] == layer)
            rows.append({
                "layer": layer, "family": family, "pass": pass_, "layout": layout, "ms": ms,
                "same": theirs[layout] / ms, "best": min(theirs.values()) / ms,
            })  # fmt: skip
    return rows


def family_table(rows: list[Cell], value: str, title: str) -> str:
    """Geometric means by family and pass, both layouts beside each other, of how many layers, and the worst of them."""
    passes = [p for p in PASSES if any(r["pass"] == p for r in rows)]
    columns = [(layout, p) for layout in LAYOUTS for p in passes]
    titles = [title, "layers", *(f"{p}, {layout.replace('_', ' ')}" for layout, p in columns), "least"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for family in FAMILIES:
        mine = [r for r in rows if r["family"] == family]
        if not mine:
            continue
        means = [geometric_mean(r[value] for r in mine if (r["layout"], r["pass"]) == column) for column in columns]
        least = min(mine, key=lambda r: r[value])
        count = len({r["layer"] for r in mine})
        shown = " | ".join("" if math.isnan(m) else f"{m:.2f}" for m in means)
        lines.append(f"| {family} | {count} | {shown} | {least[value]:.2f} {least['layer']} {least['pass']} |")
    return "\n".join(lines)


def machine_line(machines: list[Cell], commits: bool = True) -> str:
    """Where records were made, and with what: every value that one of them has."""

    def every(key: str, size: int | None = None) -> str:
        return ", ".join(dict.fromkeys(str(m.get(key))[:size] for m in machines))

    gpu = machines[0].get("gpu") or "CPU"
    line = f"{gpu}, driver {every('driver')}, torch {every('torch')}, Triton {every('triton')}"
    return f"{line}, commit {every('commit', 9)}" if commits else line


def measured(runs: list[Run], args: argparse.Namespace) -> tuple[str, str]:
    """(tables, the README's part) of a GPU's records, with their pictures."""
    cells, before = newest((run.cells for run in runs), ("layer", "precision", "pass", "layout"))
    there = [p for p in PRECISIONS if any(c["precision"] == p and "ms" in c for c in cells)]
    if there and args.precision not in there:
        print(f"no {args.precision} in the record: reporting {there[0]}")
        args.precision = there[0]
    rows = speedups(cells, args.precision)
    limits = next((run.limits for run in reversed(runs) if run.limits), None)
    machines = [run.machine for run in runs if run.cells or run.models]
    gpu = machines[-1].get("gpu")
    of = f"{len(rows)} cells of {len({r['layer'] for r in rows})} layers"
    same = family_table(rows, "same", "torch.nn's time over tconv's, same layout")
    head = f"{machine_line(machines, commits=False)}; {args.precision}; geometric means of {of}:"
    short = "\n\n".join(p for p in (head, same, spread(rows)) if p)
    models, _ = newest((run.models for run in runs), ("model", "step", "layout"))
    parts = [
        "# Measured", f"Measured on {machine_line(machines)}; {args.precision}, {of}.", same,
        family_table(rows, "best", "torch.nn's better layout over tconv"), spread(rows), errors_table(cells),
        layer_table(rows), models_table(models),
    ]  # fmt: skip
    if limits:
        parts.append(calibration(cells, args.precision, limits, machines[-1]))
    from bench import pictures

    if rows:
        pictures.speedup(rows, f"torch.nn's time / tconv's, {args.precision}, {gpu}", args.out / "speedup.png")
    if limits:
        done = [c for c in cells if c["precision"] == args.precision and "ms" in c and c["pass"] != "step"]
        pictures.roofline(done, limits, f"{gpu}, {args.precision}", args.out / "roofline.png")
    changed = changes(before, cells)
    if changed:
        pictures.change(changed, "time before / time now, tconv", args.out / "change.png")
        worst = sorted(changed, key=lambda c: c["ratio"])[:5]
        parts.append(f"{len(changed)} cells since they were measured before: geometric mean "
                     f"{geometric_mean(c['ratio'] for c in changed):.3f}; slowest against it: "
                     + ", ".join(f"{c['layer']} {c['pass']} {c['ratio']:.2f}" for c in worst))  # fmt: skip
    return "\n\n".join(p for p in parts if p), short


def spread(rows: list[Cell]) -> str:
    """How many cells are slower and faster, which a mean hides."""

    def counts(value: str) -> tuple[int, int, str]:
        ratios = [r[value] for r in rows]
        return sum(r < 0.9 for r in ratios), sum(r > 1.1 for r in ratios), f"{geometric_mean(ratios):.2f}"

    if not rows:
        return ""
    below, above, mean = counts("same")
    below_best, above_best, mean_best = counts("best")
    text = (
        f"Of {len(rows)} cells {below} are below 0.9 and {above} above 1.1 in the same layout (geometric mean {mean}), and "
        f"{below_best} and {above_best} against torch.nn's better layout (geometric mean {mean_best})."
    )
    return textwrap.fill(text, 128)


def calibration(cells: list[Cell], precision: str, limits: dict[str, float], machine: Cell) -> str:
    """The cost model's times, by the limits measured in the run, over the times measured, by family."""
    from bench.predict import cells as predictions
    from tconv.planning.device import DEVICES, Device, Limits

    times = {(c["layer"], c["pass"], c["layout"]): c["ms"] for c in cells if c["provider"] == "tconv" and "ms" in c
             and c["precision"] == precision}  # fmt: skip
    like = next((d for name, d in DEVICES.items() if name in str(machine.get("gpu"))), DEVICES["H100"])
    device = Device(str(machine.get("gpu")), machine.get("units") or like.units, like.shared_bytes, limits=Limits(**limits))
    rows = []
    for c in predictions(layers(), [precision], device):
        seen = times.get((c["layer"], c["pass"], c["layout"]))
        if seen:
            rows.append(c | {"ratio": c["ms"] / seen})
    return family_table(rows, "ratio", "predicted by the measured limits / measured") if rows else ""


def changes(before: list[Cell], now: list[Cell]) -> list[Cell]:
    """Old time over new of each of tconv's cells that both runs have."""

    def key(c: Cell) -> tuple[Any, ...]:
        return c["layer"], c["precision"], c["pass"], c["layout"]

    old = {key(c): c["ms"] for c in before if c["provider"] == "tconv" and "ms" in c}
    return [{**c, "ratio": old[key(c)] / c["ms"]} for c in now if c["provider"] == "tconv" and "ms" in c and key(c) in old]


def errors_table(cells: list[Cell]) -> str:
    """The cells that failed or were wrong, a line each."""
    bad = [c for c in cells if "error" in c]
    lines = [f"- {c['provider']} {c['layer']} {c['precision']} {c['pass']} {c['layout']}: {c['error']}" for c in bad]
    return "\n".join([f"{len(bad)} of {len(cells)} cells failed or were wrong:", "", *lines]) if bad else ""


def layer_table(rows: list[Cell]) -> str:
    lines = ["| layer | pass | layout | ms | same layout | best layout |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['layer']} | {r['pass']} | {r['layout']} | {r['ms']:.4f} | {r['same']:.2f} | {r['best']:.2f} |" for r in rows
    ]
    return "\n".join(lines)


def models_table(cells: list[Cell]) -> str:
    if not cells:
        return ""
    by = {(c["model"], c["step"], c["layout"], c["provider"]): c for c in cells}
    lines = ["| model | step | layout | torch.nn ms | tconv ms | ratio | |", "|---|---|---|---|---|---|---|"]
    for model, step, layout, provider in by:
        if provider != "tconv":
            continue
        ours, theirs = by[model, step, layout, "tconv"], by.get((model, step, layout, "torch.nn"), {})
        a, b = theirs.get("ms"), ours.get("ms")
        note = ours.get("error") or ours.get("missing") or theirs.get("error") or ""
        numbers = [f"{v:.3f}" if v else "" for v in (a, b, a / b if a and b else None)]
        lines.append(f"| {model} | {step} | {layout} | " + " | ".join(numbers) + f" | {note} |")
    return "\n".join(lines)


def predicted(args: argparse.Namespace) -> tuple[str, str]:
    """(tables, the README's part) by the cost model, for an H200, with its roofline."""
    import dataclasses

    from bench import pictures
    from bench.predict import cells
    from tconv.planning.device import DEVICES

    device = DEVICES["H200"]
    found = list(cells(layers(), [args.precision], device))
    peak = {"tf32": device.limits.matrix_tf32, "fp32": device.limits.fma_32}.get(args.precision, device.limits.matrix_16)
    for c in found:  # the larger of the two shares is how near the device's roof
        c["roof"] = max(c["tflops"] * 1e12 / peak, c["gbs"] * 1e9 / device.limits.bandwidth)
    head = (
        f"PREDICTED by the cost model for an {device.name}, {args.precision}; nothing here was measured. Share of what the "
        "device allows (1 is the roofline):"
    )
    short = "\n\n".join([head, family_table(found, "roof", "predicted share")])
    terms = (
        "What holds the share down: geometric means of all three passes, and what they would be, with the same plans, if one "
        "term took no time. The start is that of programs and their end, with what they do outside their main loops; the sum "
        "is of splits; all apart are launch, start, copies and sum; idle units are those of the last wave. Of the parts "
        "(products, issue, cache, memory) only the longest takes time in the last two columns, and in the last one nothing "
        "else does."
    )
    lines = ["| layer | pass | layout | predicted us | TFLOP/s | GB/s | bound by | wasted: taps | tiles | waves |"]
    lines += ["|---" * 10 + "|"]
    lines += [
        f"| {c['layer']} | {c['pass']} | {c['layout']} | {c['ms'] * 1e3:.1f} | {c['tflops']:.1f} | {c['gbs']:.0f} | "
        f"{c['bound']} | {c['wasted_taps']} | {c['tile_waste']:.0%} | {c['wave_waste']:.0%} |" for c in found
    ]  # fmt: skip
    title = f"PREDICTED by the cost model, {device.name}, {args.precision}: nothing here was measured"
    pictures.roofline(found, dataclasses.asdict(device.limits), title, args.out / "roofline-predicted.png")
    pictures.shares(found, title, args.out / "shares-predicted.png")
    wasted = (
        "Wasted are taps that meet no pixel of their phase, what tiles compute beyond the result's edges, and the part of the "
        "last wave that idles. A layer's two layouts are the user's: what is copied first is in the time."
    )
    picture = "![share of the roofline by layer](roofline-predicted.png)"
    return "\n\n".join(["# Predictions", short, terms, terms_table(found), picture, wasted, "\n".join(lines)]), short


def terms_table(found: list[Cell]) -> str:
    """What the share would be without one term of the prediction, by kind of layer."""
    from bench.predict import TERMS

    kinds = {
        "dense 2-D, channels last": lambda c: c["family"] == "dense 2-D" and c["layout"] == "channels_last",
        "1-D and 3-D, channels last": lambda c: c["family"] in ("1-D", "3-D") and c["layout"] == "channels_last",
        "few channels, channels last": lambda c: c["family"] == "few channels" and c["layout"] == "channels_last",
        "depthwise, channels last": lambda c: c["family"] == "depthwise" and c["layout"] == "channels_last",
        "all but depthwise, default layout": lambda c: c["family"] != "depthwise" and c["layout"] == "contiguous",
    }
    lines = ["| share, predicted | as it is | " + " | ".join(f"no {term}" for term in TERMS) + " |"]
    lines += ["|---" * (len(TERMS) + 2) + "|"]
    for name, wanted in kinds.items():
        mine = [c for c in found if wanted(c)]
        shares = [[c["roof"] * c["ms"] / ms for c in mine for ms in [c["without_ms"][term]]] for term in TERMS]
        means = [geometric_mean(each) for each in ([c["roof"] for c in mine], *shares)]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def write_readme(path: pathlib.Path, text: str) -> None:
    """Puts the text between the README's marks."""
    old = path.read_text()
    if not all(mark in old for mark in MARKS):
        sys.exit(f"{path.name} has no {MARKS[0]} ... {MARKS[1]}")
    start, end = old.index(MARKS[0]) + len(MARKS[0]), old.index(MARKS[1])
    path.write_text(f"{old[:start]}\n{text}\n\n{old[end:]}")
    print(f"table written into {path.name}")


if __name__ == "__main__":
    sys.exit(main())
