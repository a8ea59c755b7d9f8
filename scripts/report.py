#!/usr/bin/env python3
"""Turns the records under bench/results/ into tables and pictures; without records, the cost model's predictions.

    python scripts/report.py [--out DIR] [--readme] [FOLDER ...]    # tables.md and PNGs into DIR (out/report)
    python scripts/report.py --summary FOLDER                      # a short table of one run, to the terminal

Of several records of a GPU the newest is reported, and the change since the one before it. --readme also writes the table
into README.md, between its two report marks, and predictions into docs/predicted.md with their picture. Files that are cut or
foreign are named and skipped.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import shutil
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.layers import FAMILIES, layers
from bench.providers import LAYOUTS, PRECISIONS
from bench.record import RESULTS, ROOT, Record, read_all
from bench.summary import facts

Cell = dict[str, Any]
MARKS = ("<!-- report -->", "<!-- /report -->")
PASSES = ("fprop", "dgrad", "wgrad", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=pathlib.Path, help="records; default all under bench/results")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "report")
    parser.add_argument("--summary", type=pathlib.Path, help="print a short table of one folder and stop")
    parser.add_argument("--together", action="store_true", help="one report of all folders: parts of one measurement")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    args = parser.parse_args()
    if args.summary:
        records, complaints = read_all(args.summary)
        print("\n".join([*complaints, *summary(records)]))
        return 0
    folders = args.folders or sorted(p for p in RESULTS.glob("*") if p.is_dir())
    runs = []
    for folder in folders:
        records, complaints = read_all(folder)
        for line in complaints:
            print(f"skipped: {line}")
        if "layers" not in records and "race" in records:
            records["layers"] = as_layers(records)
        if "layers" in records and (args.folders or not records["layers"].machine.get("tiny")):
            runs.append(records)
    if args.together and runs:
        first = runs[0]["layers"]
        every = Record(first.path, first.machine, [line for run in runs for line in run["layers"].lines], None)
        runs = [runs[0] | {"layers": every}]
    runs.sort(key=lambda records: str(records["layers"].machine.get("date")))
    args.out.mkdir(parents=True, exist_ok=True)
    text, short = measured(runs, args) if runs else predicted(args)
    (args.out / "tables.md").write_text(text + "\n")
    print(text)
    print(f"\nwritten to {args.out}")
    if args.readme:
        write_readme(ROOT / "README.md", short)
        if not runs:
            shutil.copyfile(args.out / "tables.md", ROOT / "docs" / "predicted.md")
            shutil.copyfile(args.out / "roofline-predicted.png", ROOT / "docs" / "roofline-predicted.png")
    return 0


def as_layers(records: dict[str, Record]) -> Record:
    """What bench/race.py and bench/facts.py recorded, as bench/test_layers.py would have."""
    race = records["race"]
    lines: list[Cell] = []
    for line in race.lines:
        for provider in ("torch.nn", "tconv"):
            cell = {k: line.get(k) for k in ("layer", "family", "precision", "pass", "layout")} | {"provider": provider}
            if provider in line:
                ms = line[provider]["ms"]
                cell |= {"ms": ms, "tflops": line["flops"] / ms / 1e9, "gbs": line["bytes"] / ms / 1e6}
            elif provider == "tconv" and cell["layer"]:
                cell["error"] = line.get("error")
            else:
                continue
            lines.append({"test": f"{line['cell']} {provider}", "cell": cell})
    for line in records["facts"].lines if "facts" in records else []:
        if line["cell"] == "limits" and "error" not in line:
            lines.append({"limits": {k: v for k, v in line.items() if k != "cell"}})
    return Record(race.path, race.machine, lines, None)


def cells_of(record: Record) -> list[Cell]:
    """A record's cells, the last word on each."""
    found = {}
    for line in record.lines:
        cell = line.get("cell")
        if isinstance(cell, dict):
            found[line.get("test")] = cell
    return list(found.values())


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


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
    """Geometric means by family and pass, both layouts beside each other, and the worst layer."""
    passes = [p for p in PASSES if any(r["pass"] == p for r in rows)]
    columns = [(layout, p) for layout in LAYOUTS for p in passes]
    titles = [title, *(f"{p}, {layout.replace('_', ' ')}" for layout, p in columns), "least"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for family in FAMILIES:
        mine = [r for r in rows if r["family"] == family]
        if not mine:
            continue
        means = [geomean([r[value] for r in mine if (r["layout"], r["pass"]) == column]) for column in columns]
        least = min(mine, key=lambda r: r[value])
        lines.append(
            f"| {family} | " + " | ".join("" if math.isnan(m) else f"{m:.2f}" for m in means)
            + f" | {least[value]:.2f} {least['layer']} {least['pass']} |"
        )  # fmt: skip
    return "\n".join(lines)


def machine_line(machine: Cell) -> str:
    return (
        f"{machine.get('gpu') or 'CPU'}, driver {machine.get('driver')}, torch {machine.get('torch')}, "
        f"Triton {machine.get('triton')}, commit {str(machine.get('commit'))[:9]}"
    )


def measured(runs: list[dict[str, Record]], args: argparse.Namespace) -> tuple[str, str]:
    """(tables, the README's part) of the newest run, with its pictures."""
    newest = runs[-1]
    record = newest["layers"]
    cells = cells_of(record)
    there = [p for p in PRECISIONS if any(c["precision"] == p and "ms" in c for c in cells)]
    if there and args.precision not in there:
        print(f"no {args.precision} in the record: reporting {there[0]}")
        args.precision = there[0]
    rows = speedups(cells, args.precision)
    limits = next((line["limits"] for line in record.lines if "limits" in line), None)
    head = f"Measured on {machine_line(record.machine)}; {args.precision}."
    short = "\n\n".join([
        head, family_table(rows, "same", "torch.nn's time over tconv's, same layout"),
        family_table(rows, "best", "torch.nn's better layout over tconv"),
    ])  # fmt: skip
    parts = ["# Measured", short, errors_table(cells), layer_table(rows), models_table(newest.get("models"))]
    if limits:
        parts.append(calibration(cells, args.precision, limits, record.machine))
    from bench import pictures

    if rows:
        pictures.speedup(
            rows, f"torch.nn's time / tconv's, {args.precision}, {record.machine.get('gpu')}", args.out / "speedup.png"
        )
    if limits:
        done = [c for c in cells if c["precision"] == args.precision and "ms" in c and c["pass"] != "step"]
        pictures.roofline(done, limits, f"{record.machine.get('gpu')}, {args.precision}", args.out / "roofline.png")
    before = next((r for r in runs[-2::-1] if r["layers"].machine.get("gpu") == record.machine.get("gpu")), None)
    if before:
        changed = changes(cells_of(before["layers"]), cells)
        old = str(before["layers"].machine.get("commit"))[:9]
        pictures.change(changed, f"time at {old} / time now, tconv", args.out / "change.png")
        worst = sorted(changed, key=lambda c: c["ratio"])[:5]
        parts.append(f"Since {old}: geometric mean {geomean([c['ratio'] for c in changed]):.3f}; slowest against it: "
                     + ", ".join(f"{c['layer']} {c['pass']} {c['ratio']:.2f}" for c in worst))  # fmt: skip
    return "\n\n".join(p for p in parts if p), short


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


def models_table(record: Record | None) -> str:
    if record is None:
        return ""
    by = {(c["model"], c["step"], c["layout"], c["provider"]): c for c in cells_of(record)}
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
    return "\n\n".join(["# Predictions", short, picture, wasted, "\n".join(lines)]), short


def summary(records: dict[str, Record]) -> list[str]:
    """What a run has, stage by stage."""
    if not records:
        return ["no records"]
    lines = [machine_line(next(iter(records.values())).machine)]
    for name, record in records.items():
        last = {line["test"]: line["outcome"] for line in record.lines if "test" in line and "outcome" in line}
        tally = collections.Counter(last.values())
        lines.append(f"{name:18} " + (", ".join(f"{n} {what}" for what, n in sorted(tally.items())) or "nothing yet"))
        lines += [f"    {what}: {test}" for test, what in last.items() if what in ("failed", "died")][:20]
        for line in record.lines:
            if "tool" in line:
                lines.append(f"    {line['tool']}: {line['found']} found{'' if line['complete'] else ', incomplete'}")
    for precision in PRECISIONS:
        rows = speedups(cells_of(records["layers"]), precision) if "layers" in records else []
        if rows:
            lines += ["", f"torch.nn's better layout over tconv, {precision}:", family_table(rows, "best", "family")]
    if "models" in records:
        lines += ["", models_table(records["models"])]
    if "facts" in records:
        lines += ["", *facts(records["facts"].lines)]
    return lines


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
