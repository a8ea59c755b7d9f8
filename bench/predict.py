"""What the cost model says of the suite's layers: cells like those that are measured, marked as predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.layers import Layer
from bench.providers import LAYOUTS, PRECISIONS
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.launching.variants import float32_precision
from tconv.planning.cost import Cost, phase_taps, together
from tconv.planning.device import Device
from tconv.planning.plan import Plan


def plans(layer: Layer, precision: str, layout: str, device: Device) -> dict[str, Plan]:
    """The plan of each pass, by the layer's own names: the forward of a transposed layer is its fprop here."""
    p = layer.problem
    x, w, y = (shaped(p.shape(which), layout == "channels_last", PRECISIONS[precision]) for which in "xwy")
    with float32_precision(precision == "tf32"):
        launches = {
            "fprop": prepare_gather("fprop", p, x, w, None, y, device),
            "dgrad": prepare_gather("dgrad", p, y, w, None, x, device),
            "wgrad": prepare_wgrad(p, y, x, w, device),
        }
    if layer.transposed:
        launches["fprop"], launches["dgrad"] = launches["dgrad"], launches["fprop"]
    found = {name: launch.call.plan for name, launch in launches.items()}
    return {name: plan for name, plan in found.items() if plan is not None}


# What a prediction would be without one term alone: the same plan, nothing else changed.
TERMS = (
    "launch", "start", "copies", "sum", "all apart", "tails of tiles", "idle units", "issue", "cache", "part but the longest",
    "other time",
)  # fmt: skip


def without(cost: Cost, term: str) -> float:
    """The predicted seconds if a term of TERMS took no time."""
    if term in ("launch", "start", "copies", "sum"):
        return cost.seconds - dict(cost.alone).get(term, 0.0)
    parts, apart = dict(cost.parts), sum(seconds for _, seconds in cost.alone)
    if term == "all apart":
        return together(parts.values())
    if term in ("part but the longest", "other time"):
        return max(parts.values()) + (apart if term == "part but the longest" else 0.0)
    if term in parts:
        return apart + together(seconds for name, seconds in cost.parts if name != term)
    waste = cost.tile_waste if term == "tails of tiles" else cost.wave_waste
    return apart + together(seconds * (1 if name == "memory" else 1 - waste) for name, seconds in cost.parts)


def cells(chosen: list[Layer], precisions: list[str], device: Device) -> Iterator[dict[str, Any]]:
    """A cell for every layer, pass, precision and layout."""
    for precision in precisions:
        for layer in chosen:
            for layout in LAYOUTS:
                for pass_, plan in plans(layer, precision, layout, device).items():
                    cost = plan.cost
                    assert cost is not None
                    walked = sum(phase_taps(layer.problem, plan.pass_))  # by all phases, each tap being of one of them
                    yield {
                        "layer": layer.name, "family": layer.family, "precision": precision, "pass": pass_,
                        "provider": "tconv", "layout": layout, "predicted": True, "ms": cost.seconds * 1e3,
                        "tflops": cost.flops / cost.seconds / 1e12, "gbs": cost.bytes / cost.seconds / 1e9,
                        "bound": cost.bound, "tile_waste": cost.tile_waste, "wave_waste": cost.wave_waste, "plan": str(plan),
                        "without_ms": {term: 1e3 * without(cost, term) for term in TERMS},
                        "wasted_taps": walked - layer.problem.taps,
                    }  # fmt: skip
