"""Pictures of results, as PNG files: a dot per layer, so that a mean hides nothing."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench.layers import FAMILIES
from bench.providers import LAYOUTS
from bench.summary import geometric_mean

Cell = dict[str, Any]
COLOURS = {"fprop": "#1f6fb4", "dgrad": "#d9722e", "wgrad": "#3a8f4a", "step": "#6b4fa0"}


def speedup(rows: list[Cell], title: str, path: pathlib.Path) -> None:
    """Speed-up in the same layout by family, a dot per layer and pass, a bar for the geometric mean."""
    _by_family(rows, "same", title, "torch.nn's time / tconv's", path)


def shares(rows: list[Cell], title: str, path: pathlib.Path) -> None:
    """Share of the roofline by family."""
    _by_family(rows, "roof", title, "share of what the device allows", path)


def change(rows: list[Cell], title: str, path: pathlib.Path) -> None:
    """Old time over new by family: above one is faster now."""
    _by_family(rows, "ratio", title, "old time / new time", path)


def _by_family(rows: list[Cell], value: str, title: str, label: str, path: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axis, layout in zip(axes, LAYOUTS, strict=True):
        families = [f for f in FAMILIES if any(r["family"] == f for r in rows)]
        for x, family in enumerate(families):
            mine = [r for r in rows if r["family"] == family and r["layout"] == layout]
            passes = [p for p in COLOURS if any(r["pass"] == p for r in mine)]
            for i, p in enumerate(passes):
                ys = [r[value] for r in mine if r["pass"] == p]
                centre = x + (i - (len(passes) - 1) / 2) * 0.2
                axis.scatter([centre] * len(ys), ys, s=18, color=COLOURS[p], alpha=0.65, linewidths=0)
                mean = geometric_mean(ys)
                axis.plot([centre - 0.08, centre + 0.08], [mean, mean], color=COLOURS[p], linewidth=2.5)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.grid(axis="y", which="both", linewidth=0.3)
        axis.set_xticks(range(len(families)), families, rotation=25, ha="right")
        axis.set_title(layout.replace("_", " "))
    axes[0].set_ylabel(label)
    _legend(axes[0], rows)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _legend(axis: Any, cells: list[Cell]) -> None:
    for p, colour in COLOURS.items():
        if any(c["pass"] == p for c in cells):
            axis.scatter([], [], color=colour, label=p)
    axis.legend(frameon=False, loc="lower right")


def roofline(cells: list[Cell], limits: dict[str, float], title: str, path: pathlib.Path) -> None:
    """TFLOP/s over operations per least byte, under the device's two limits; torch.nn hollow where it is in the cells."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    precision = cells[0]["precision"] if cells else "bf16"
    peak = limits[{"tf32": "matrix_tf32", "fp32": "fma_32"}.get(precision, "matrix_16")] / 1e12
    bandwidth = limits["bandwidth"] / 1e12
    for axis, layout in zip(axes, LAYOUTS, strict=True):
        xs = [2.0**i for i in range(-2, 14)]
        axis.plot(xs, [min(peak, x * bandwidth) for x in xs], color="black", linewidth=1)
        for c in cells:
            if c["layout"] != layout or c["pass"] not in COLOURS or c["provider"] not in ("tconv", "torch.nn"):
                continue
            ours = c["provider"] == "tconv"
            colour = COLOURS[c["pass"]]
            axis.scatter(
                c["tflops"] * 1e3 / c["gbs"], c["tflops"], s=20, linewidths=0.8, edgecolors=colour,
                facecolors=colour if ours else "none", alpha=0.7,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.grid(which="major", linewidth=0.3)
        axis.set_xlabel("operations per byte, each operand moved once")
        axis.set_title(layout.replace("_", " "))
    axes[0].set_ylabel("TFLOP/s")
    _legend(axes[0], cells)
    hollow = any(c["provider"] == "torch.nn" for c in cells)
    figure.suptitle(title + (" (hollow: torch.nn)" if hollow else ""))
    figure.savefig(path, dpi=120)
    plt.close(figure)
