"""Draws docs/data-flow.svg, the README's picture: python docs/data_flow.py"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREY, GREEN = "#dbe8f8", "#fde3cf", "#ececec", "#dff0dd"
ROWS = [
    (
        "tconv      Conv2d, functional, replace_, enable, explain",
        "what users call; Parameters, hooks and state_dict stay",
        BLUE,
    ),
    (
        "dispatch   entry, check, fast_path, operators, aten",
        "who computes a call: kernels, registered operators, or torch",
        BLUE,
    ),
    ("dispatch   autograd: fprop · dgrad · wgrad", "three bilinear operations, each other's derivatives", BLUE),
    ("launching  prepare, compiled, launch", "a plan as a launch, cached; the result and a bounded workspace", ORANGE),
    (
        "planning   simplify, tiles, cost, plan",
        "rewrites; kernel, tile and split-K of least predicted time",
        ORANGE,
    ),
]
KERNELS = [
    ("gather", "fprop, dgrad:\nimplicit GEMM\nin phases"),
    ("wgrad", "implicit GEMM\nsplit over pixels"),
    ("packed", "both of them\nfor few channels"),
    ("depthwise", "all three passes,\nby strips if it can;\nwithout tl.dot"),
    ("tma", "boxes by TMA,\non Hopper;\nforced only"),
    ("reduce, stage", "splits in order;\nbias gradient;\ncopies"),
]


def box(ax, x, y, width, height, colour, title, text, size=9.5):
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="#777777", lw=0.8)
    )
    ax.text(x + width / 2, y + height - 0.2, title, ha="center", va="center", family="monospace", size=size, weight="bold")
    ax.text(x + width / 2, y + (height - 0.36) / 2, text, ha="center", va="center", size=8.5, linespacing=1.15, color="#333333")


def arrow(ax, x, top, bottom):
    ax.annotate("", (x, bottom), (x, top), arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.1})


def main():
    figure, ax = plt.subplots(figsize=(7.6, 5.6))
    height, gap, y = 0.72, 0.26, 6.4
    for title, text, colour in ROWS:
        y -= height
        box(ax, 0, y, 6.6, height, colour, title, text)
        arrow(ax, 3.3, y, y - gap)
        y -= gap
    y -= 1.12
    for i, (title, text) in enumerate(KERNELS):
        box(ax, 1.54 * i, y, 1.45, 1.12, GREEN, title, text)
    ax.text(
        4.6,
        y - 0.18,
        "Triton: compiled for the GPU, or interpreted on the CPU",
        ha="center",
        va="center",
        size=8.5,
        color="#333333",
    )
    box(ax, 7.05, 4.06, 2.1, 1.34, GREY, "torch", "the fallback,\nwith your own arguments:\nits results, its errors")
    ax.annotate("", (7.05, 5.06), (6.6, 5.06), arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.1})
    box(ax, 7.05, 3.12, 2.1, 0.84, BLUE, "enable", "torch's own operators,\nwhoever calls them")
    ax.annotate("", (6.6, 3.3), (7.05, 3.3), arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.1})
    box(ax, 7.05, 1.72, 2.1, 1.24, GREY, "record", "every call and fallback:\nexplain, last_calls,\nrecording")
    ax.annotate("", (7.05, 2.42), (6.6, 2.42), arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.1})
    ax.set_xlim(-0.05, 9.2)
    ax.set_ylim(y - 0.35, 6.45)
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    matplotlib.rcParams["svg.hashsalt"] = "tconv"
    figure.savefig(pathlib.Path(__file__).with_name("data-flow.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
