"""The 60 layers, every pass, precision and layout, by every provider: correct first, then timed.

    python -m pytest -p bench.stage --record bench/results/DIR/layers.jsonl --seconds 500 bench/test_layers.py [--quick]

A provider that is not there, fails, or computes something else has a cell that says so; the run goes on.
"""

import pytest
import torch

import tconv
from bench.layers import layers
from bench.providers import LAYOUTS, PASSES, PRECISIONS, PROVIDERS, Missing, absent, operands, reference, set_precision
from bench.stage import FATAL, first_line
from tconv.planning.cost import flops, least_bytes

# ||got - right|| / ||right||: a rounding of the output, and for TF32 of the inputs. Long fp32 sums add their own, and so does
# the fp32 reference's.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}
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


class Held:
    """The operands and right results that neighbouring tests share; one layer's at a time."""

    key = None

    @classmethod
    def get(cls, layer, precision, pass_, device):
        if cls.key != (layer.name, precision):
            cls.key, cls.operands, cls.right = None, {}, {}  # let go of the last layer's before there are others
            torch.manual_seed(0)
            contiguous = operands(layer, precision, device)
            cls.operands = {"contiguous": contiguous, "channels_last": contiguous.in_layout("channels_last")}
            cls.key = (layer.name, precision)
        if pass_ not in cls.right:
            cls.right = {pass_: reference(cls.operands["contiguous"], pass_)}
        return cls.operands, cls.right[pass_]


def error_of(got, right):
    """The largest ||got - right|| / ||right|| of the results; NaN counts as infinite."""
    worst = 0.0
    for g, r in zip(got, right, strict=True):
        if g.shape != r.shape:
            return float("inf")
        worst = max(worst, ((g.to(r.dtype) - r).norm() / r.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item())
    return worst


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


def test_layer(layer, precision, pass_, provider, layout, device, tiny, limits, timed, record_property):
    shown = layer.tiny() if tiny else layer
    line = cell(layer, precision, pass_, provider, layout)
    set_precision(precision)
    try:
        held, right = Held.get(shown, precision, pass_, device)
        call = PROVIDERS[provider].call(held[layout], pass_)
        if device == "cuda":
            call()  # what compiles, searches or tunes does so now, and takes its memory now
        with tconv.recording() as calls:
            got, line["peak_bytes"], line["workspace_bytes"] = run(call)
        line["error_norm"] = error_of(got, right)
        del got
        terms = max(shown.problem.gemm("fprop")[2], shown.problem.gemm("wgrad")[2])
        if line["error_norm"] > max(TOLERANCE[precision], 2**-24 * terms**0.5):
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
        passes = ("fprop", "dgrad", "wgrad") if pass_ == "step" else (pass_,)
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
