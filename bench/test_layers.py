"""The 60 layers, every pass, precision and layout, by every provider: correct first, then timed.

    python -m pytest -p bench.stage --record bench/results/DIR/layers.jsonl --seconds 500 bench/test_layers.py [--quick]

A provider that is not there, fails, or computes something else has a cell that says so; the run goes on.
"""

import pytest
import torch

import tconv
from bench.correctness import relative_error, tolerance
from bench.layers import layers
from bench.providers import (
    LAYOUTS,
    PASSES,
    PRECISIONS,
    PROVIDERS,
    SINGLE,
    Held,
    Missing,
    absent,
    reference,
    set_precision,
)  # fmt: skip
from bench.stage import FATAL, first_line
from tconv.planning.cost import flops, least_bytes

PEERS = [name for name in PROVIDERS if name not in ("torch.nn", "tconv")]


def pytest_generate_tests(metafunc):
    quick, without = metafunc.config.getoption("--quick"), set(metafunc.config.getoption("--without"))
    if not without <= set(PROVIDERS):
        raise pytest.UsageError(f"--without {', '.join(without - set(PROVIDERS))}: the providers are {', '.join(PROVIDERS)}")
    precisions = ["bf16"] if quick else list(PRECISIONS)
    chosen = layers(quick)
    # What matters most before what a run that is cut may lack: torch.nn and ours in one precision over all layers, then in the
    # next, then the peers, whose tuning takes long.
    groups = [["torch.nn", "tconv"], [name for name in PEERS if name not in absent()]]
    groups = [[name for name in group if name not in without] for group in groups]
    cells = [
        (layer, precision, pass_, provider, layout)
        for providers in groups
        for precision in precisions
        for layer in chosen
        for pass_ in (("fprop", "step") if quick else PASSES)
        for provider in providers
        for layout in LAYOUTS
        if PROVIDERS[provider].takes(layer, pass_, layout)
    ]
    names = [f"{layer.name}-{precision}-{pass_}-{provider}-{layout}" for layer, precision, pass_, provider, layout in cells]
    metafunc.parametrize(("layer", "precision", "pass_", "provider", "layout"), cells, ids=names)


class HeldWithRight(Held):
    """Operands, and the right results of the last pass that was asked for, which neighbouring tests share."""

    answered = answer = None

    def right(self, layer, precision, pass_):
        contiguous = self.get(layer, precision, "contiguous")
        if self.answered != (layer, precision, pass_):
            self.answered = self.answer = None  # let go of the last pass's before there is another
            self.answer = reference(contiguous, pass_)
            self.answered = layer, precision, pass_
        return self.answer


@pytest.fixture(scope="module")
def held(device):
    return HeldWithRight(device)


def run(call):
    """(results, peak bytes beside what was there, bytes of them that are no result)"""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    got = call()
    got = tuple(got) if isinstance(got, (tuple, list)) else (got,)
    if not cuda:
        return got, None, None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return got, peak, max(0, peak - sum(g.nbytes for g in got))


def cell(layer, precision, pass_, provider, layout):
    return {
        "layer": layer.name, "family": layer.family, "precision": precision, "pass": pass_, "provider": provider,
        "layout": layout,
    }  # fmt: skip


def test_layer(layer, precision, pass_, provider, layout, device, tiny, held, limits, timed, record_property):
    shown = layer.tiny() if tiny else layer
    line = cell(layer, precision, pass_, provider, layout)
    set_precision(precision)
    try:
        right = held.right(shown, precision, pass_)
        call = PROVIDERS[provider].call(held.get(shown, precision, layout), pass_)
        if device == "cuda":
            call()  # what compiles, searches or tunes does so now, and takes its memory now
        with tconv.recording() as calls:
            got, line["peak_bytes"], line["workspace_bytes"] = run(call)
        line["error_norm"] = relative_error(got, right)
        del got
        if line["error_norm"] > tolerance(precision, shown.problem):
            line["error"] = f"wrong result: relative error {line['error_norm']:.3g}"
        elif provider == "tconv" and not all(c.ours for c in calls):
            line["error"] = "not ours: " + "; ".join(str(c) for c in calls if not c.ours)
        else:
            line |= timed(call)
    except Missing as e:
        line["missing"] = str(e)
        record_property("cell", line)
        pytest.skip(str(e))  # why the provider has none, as its cell says
    except Exception as e:  # a cell that says so; the run goes on
        line["error"] = first_line(e)
        if any(text in str(e) for text in FATAL):
            record_property("cell", line)
            raise
    if "error" not in line:
        p = shown.problem
        passes = SINGLE if pass_ == "step" else (pass_,)
        moved = sum(least_bytes(p, done, PRECISIONS[precision].itemsize) for done in passes)
        seconds = line["ms"] / 1e3
        line["tflops"] = len(passes) * flops(p) / seconds / 1e12
        line["gbs"] = moved / seconds / 1e9
        peak = {"tf32": limits.matrix_tf32, "fp32": limits.fma_32}.get(precision, limits.matrix_16)
        line["of_matrix_peak"] = line["tflops"] * 1e12 / peak
        line["of_copy_peak"] = line["gbs"] * 1e9 / limits.bandwidth
        if provider == "tconv":
            plans = [c.plan for c in calls]
            line["plans"] = [str(plan) for plan in plans]
            if all(plan.cost for plan in plans):
                line["predicted_ms"] = 1e3 * sum(plan.cost.seconds for plan in plans)
    record_property("cell", line)
    if provider == "tconv" and "error" in line:
        pytest.fail(line["error"])
