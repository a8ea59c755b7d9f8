"""Steps of whole models by torch.nn and by tconv, in both layouts: inference in bf16, training under bf16 autocast with SGD.

    python -m pytest -p bench.stage --record bench/results/DIR/models.jsonl --seconds 500 bench/test_models.py [--quick]

Correct first: outputs (training: all gradients) are compared with torch.nn's in fp32; tconv may be as far off as torch.nn's
own bf16 run, with half as much again for luck.
"""

import copy
import math

import pytest
import torch

import tconv
from bench.correctness import relative_error
from bench.models import MODELS, in_layout
from bench.providers import LAYOUTS, exact
from bench.stage import FATAL, first_line

PROVIDERS = ("torch.nn", "tconv")


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    cells = [
        (model, step, provider, layout)
        for model in MODELS[:: 3 if quick else 1]
        for step in ("inference", "training")
        if model.trains or step == "inference"
        for layout in LAYOUTS
        for provider in PROVIDERS
    ]
    names = [f"{model.name}-{step}-{provider}-{layout}".replace(" ", "_") for model, step, provider, layout in cells]
    metafunc.parametrize(("model", "step", "provider", "layout"), cells, ids=names)


def output(result):
    """A model's result as one tensor."""
    if isinstance(result, torch.Tensor):
        return result
    return result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))


def inference(model, inputs):
    with torch.inference_mode():
        return output(model(*inputs))


def gradients(model, inputs, dtype):
    """Runs forward and backward under autocast; the gradients are left in the parameters."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
        loss = output(model(*inputs)).float().square().mean()
    loss.backward()


def flat_gradients(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def check(step, model, inputs, dtype):
    """What is compared: the output, or all gradients in one."""
    torch.manual_seed(1)  # stochastic depth and dropout draw the same numbers everywhere
    if step == "inference":
        return inference(model, inputs).float()
    gradients(model, inputs, dtype)
    return flat_gradients(model)


class Held:
    """The model, its inputs, fp32's answer and torch.nn's own error that neighbouring tests share."""

    key = None

    @classmethod
    def get(cls, model, step, device, tiny):
        if cls.key != (model.name, step):
            torch.manual_seed(0)
            net, inputs = model.build(tiny)
            net = net.to(device).train(step == "training")
            inputs = tuple(t.to(device) for t in inputs)
            cls.key, cls.model, cls.inputs, cls.errors = None, net, inputs, {}
            with exact():
                cls.right = check(step, copy.deepcopy(net), inputs, torch.float32)
            cls.key = (model.name, step)
        return cls

    @classmethod
    def error(cls, step, layout, got=None):
        """||got - right|| / ||right||; without a result torch.nn's own, worked out once per layout."""
        if got is None:
            if layout not in cls.errors:
                cls.errors[layout] = cls.error(
                    step, layout, check(step, *prepared(cls, step, "torch.nn", layout), torch.bfloat16)
                )
            return cls.errors[layout]
        return relative_error(got, cls.right)


def prepared(held, step, provider, layout):
    """A copy of the model and its inputs as a provider runs them, and how many layers tconv took."""
    model = in_layout(copy.deepcopy(held.model), layout)
    inputs = tuple(in_layout(t, layout) for t in held.inputs)
    if step == "inference":
        model, inputs = model.bfloat16(), tuple(t.bfloat16() for t in inputs)
    if provider == "tconv":
        tconv.replace_(model)
    return model, inputs


def test_model(model, step, provider, layout, device, tiny, timed, record_property):
    line = {"model": model.name, "step": step, "provider": provider, "layout": layout}
    if not model.there:
        line["missing"] = f"{model.package} is not installed"
        record_property("cell", line)
        pytest.skip(line["missing"])  # as its cell says
    try:
        held = Held.get(model, step, device, tiny)
    except Exception as e:  # its own package cannot build or run it here
        line["missing"] = first_line(e)
        record_property("cell", line)
        pytest.skip(line["missing"])  # as its cell says
    try:
        net, inputs = prepared(held, step, provider, layout)
        with tconv.recording() as calls:
            got = check(step, net, inputs, torch.bfloat16)
        error, theirs = held.error(step, layout, got), held.error(step, layout)
        line |= {"error_norm": error, "ours": sum(c.ours for c in calls), "left_to_torch": sum(not c.ours for c in calls)}
        if error == math.inf or (provider == "tconv" and error > 1.5 * theirs + 1e-4):
            line["error"] = f"wrong result: relative error {error:.3g}, torch.nn's is {theirs:.3g}"
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)

        def call():
            if step == "inference":
                return inference(net, inputs)
            gradients(net, inputs, torch.bfloat16)
            return optimizer.step()

        if "error" not in line:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            line |= timed(call)
            line["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    except Exception as e:  # a cell that says so; the run goes on
        line["error"] = first_line(e)
        if any(text in str(e) for text in FATAL):
            raise
    record_property("cell", line)
    if provider == "tconv" and "error" in line:
        pytest.fail(line["error"])
