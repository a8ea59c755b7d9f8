"""What the cost model says of the suite's layers: cells like those that are measured, marked as predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.layers import Layer
from bench.providers import LAYOUTS, PRECISIONS
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.launching.variants import float32_precision
from tconv.planning.cost import phase_taps
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
                        "wasted_taps": walked - layer.problem.taps,
                    }  # fmt: skip
