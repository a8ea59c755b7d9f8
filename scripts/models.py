"""Other people's models by torch and by tconv: outputs and gradients against fp64, and which convolutions tconv took.

    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m scripts.models [--only REGEX] [--record FILE] [--write]

A model that the record already holds as right is not run again; --write makes docs/models.md, docs/models.png and the table in
docs/evidence.md of the record.

Each model is tiny, in true fp32, in eval mode (dropout and stochastic depth draw other numbers in fp64), built and called by
its own package's unchanged code, with that package's random weights; parameters that begin as zeros, such as the last gain of
a residual branch, are made random too, else nothing behind them would show.

What is compared are the output and the gradients of its product with a random tensor with respect to every parameter and every
floating-point input, each as one tensor t, by |t - t64| / |t64| (2-norms) where t64 is the same model's in fp64. tconv may be
at most twice as far off as torch, plus 1e-5, on each tensor. Gradients of which torch's own are off by more than a tenth are
zero but for rounding (a bias before a norm): tconv may be ten times as far off there, and they are counted apart.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import math
import pathlib
import re
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import tconv
from bench.models import COMPARED, MODELS, Model
from tconv.swap import OURS, TORCHS

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = ROOT / "bench" / "results" / "models"
MARKS = ("<!-- models -->", "<!-- /models -->")
FACTOR, MARGIN, NOISE, NOISE_FACTOR = 2, 1e-5, 0.1, 10
ROUTES = ("replace_", "enable()")
LEGEND = """\
Errors are the output's and the farthest gradient's, noise apart. Convolutions are layers of torch.nn's classes and of
subclasses; `replace_` leaves alone those that override `forward` or `_conv_forward`. Calls are forward ones, of all that
torch's dispatcher saw; backward ones are among the kernels, which are counted under `enable()`: fprop, dgrad and wgrad of a
call are three. In the interpreter the planner takes one kernel for dense and one for depthwise layers; on a GPU also strips
and packed ones."""
THREADS = """\
Torch's own rounding depends on the number of threads, and so does what tconv is allowed. With two threads instead of one,
torch's error in one gradient of Hybrid Demucs, a bias's whose terms nearly cancel, was 5.4e-06 instead of 1.1e-05; tconv's
was 2.4e-05 both times, and with two threads beyond the limit of 2.1e-05."""
Tensors = dict[str, torch.Tensor]
Rows = dict[str, dict[str, Any]]


def output(result: Any) -> torch.Tensor:
    """A model's result as one tensor."""
    if isinstance(result, torch.Tensor):
        return result
    return output(next(iter(result.values())) if isinstance(result, Mapping) else result[0])


def answers(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Tensors:
    """The output and all gradients, by name."""
    model.zero_grad(set_to_none=True)
    inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs)
    y = output(model(*inputs))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weights.to(y)).sum().backward()
    found = {"output": y.detach()}
    found |= {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    """How far off each tensor is."""
    assert found.keys() == exact.keys(), found.keys() ^ exact.keys()
    return {name: distance(t.double(), exact[name]) for name, t in found.items()}


def distance(t: torch.Tensor, exact: torch.Tensor) -> float:
    return float((t - exact).norm() / exact.norm()) if exact.any() else float(t.norm()) * math.inf if t.any() else 0.0


def worst(off: dict[str, float], torchs: dict[str, float]) -> dict[str, float]:
    """The output's error and the largest of the gradients' that are not noise; NaN wins."""
    gradients = torch.tensor([0.0] + [e for name, e in off.items() if name != "output" and not noise(torchs[name])])
    return {"output": off["output"], "gradients": float(gradients.max())}


def noise(e: float) -> bool:
    """Whether torch's own error says that a gradient is zero but for rounding."""
    return not e <= NOISE


def excess(ours: dict[str, float], torchs: dict[str, float]) -> list[str]:
    """The tensors on which tconv is further off than allowed."""
    return [name for name, e in ours.items() if not e <= allowed(torchs[name])]


def allowed(torchs: float) -> float:
    return NOISE_FACTOR * torchs if noise(torchs) else FACTOR * torchs + MARGIN


def double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


class Operators(TorchDispatchMode):
    """Counts torch's own convolution operators."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def listen(model: torch.nn.Module) -> list[str]:
    """Will hold the name of each of tconv's layers that is called."""
    entered = list[str]()
    for name, m in model.named_modules():
        if isinstance(m, tuple(TORCHS)):
            m.register_forward_hook(lambda *_, name=name: entered.append(name))
    return entered


def compare(built: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """One model by every route."""
    model = built.float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    layers = [m for m in model.modules() if isinstance(m, tuple(OURS))]
    exact = answers(copy.deepcopy(model).double(), tuple(map(double, inputs)))
    with Operators() as operators:
        torchs = errors(answers(model, inputs), exact)
    row: dict[str, Any] = {
        "layers": len(layers), "operators": operators.seen, "tensors": len(exact),
        "noise": sum(map(noise, torchs.values())), "torch": worst(torchs, torchs),
    }  # fmt: skip
    for route in ROUTES:
        twin, lines = copy.deepcopy(model), list[str]()
        if route == "replace_":
            tconv.replace_(twin, report=lines.append)
        entered = listen(twin)
        start = time.perf_counter()
        with tconv.recording() as calls, tconv.enabled() if route == "enable()" else contextlib.nullcontext():
            found = answers(twin, inputs)
        off = errors(found, exact)
        forward = [c for c in calls if c.operation == "fprop"]
        row[route] = {
            **worst(off, torchs),
            "excess": {name: [off[name], torchs[name]] for name in excess(off, torchs)},
            "layers": sum(" -> " in line for line in lines),
            "entered": len(set(entered)),
            "entries": len(entered),
            "calls": sum(c.ours for c in forward),
            "calls left": sum(not c.ours for c in forward),
            "kernels": dict(collections.Counter(c.plan.kernel for c in calls if c.plan and c.operation != "bias")),
            "left layers": dict(collections.Counter(line.split(": ", 1)[1] for line in lines if " -> " not in line)),
            "left calls": dict(collections.Counter(str(c) for c in calls if not c.ours)),
            "seconds": round(time.perf_counter() - start, 1),
        }
    return row


def left(row: dict[str, Any]) -> str:
    """What tconv did not take, and why."""
    swap = row["replace_"]
    parts = [f"{n} x {what}" for what, n in swap["left layers"].items()]
    if (idle := swap["layers"] - swap["entered"]) > 0:
        parts.append(f"{idle} x taken but never called: the model hands their weights to a function")
    for route in ROUTES:
        parts += [f"{route}: {n} x {what}" for what, n in row[route]["left calls"].items()]
    return "; ".join(parts).replace("|", "\\|") or "nothing"


def cell(errors: dict[str, Any]) -> str:
    """A way's errors."""
    text = f"{errors['output']:.1e}, {errors['gradients']:.1e}"
    bad = errors.get("excess")
    return f"{text}; **off: {', '.join(list(bad)[:3])} ({len(bad)})**" if bad else text


def ordered(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    return sorted(rows.items(), key=lambda item: (item[1]["package"], item[0].lower()))


def table(rows: Rows) -> str:
    """The record in Markdown, a line per model."""
    lines = [
        "| Model | Package | Tensors | Convolutions | Layers by `replace_` | Calls by `enable()` "
        "| torch.nn | `replace_` | `enable()` | Kernels | Left to torch, and why |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ordered(rows):
        package = f"{row['package']} {row['version']}"
        if "failed" in row:
            lines.append(f"| {name} | {package} | failed: {row['failed']} |" + " |" * 8)
            continue
        swap, on = (row[route] for route in ROUTES)
        kernels = ", ".join(f"{k} {n}" for k, n in sorted(on["kernels"].items()))
        cells = [
            name, package, f"{row['tensors']}, {row['noise']} noise", row["layers"],
            f"{swap['layers']} of {row['layers']}", f"{on['calls']} of {row['operators']}",
            *(cell(row[way]) for way in ("torch", *ROUTES)), kernels, left(row),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(rows: Rows) -> str:
    """The record in Markdown, a line per package."""
    lines = [
        "| Package | Models | Layers by `replace_` | Calls by `enable()` | Errors of torch.nn | `replace_` | `enable()` |",
        "|---|---|---|---|---|---|---|",
    ]
    packages = collections.defaultdict(list)
    for name, row in ordered(rows):
        if "failed" not in row:
            packages[f"{row['package']} {row['version']}"].append((name, row))
    for package, group in packages.items():
        found = [row for _, row in group]
        swap, on = ([row[route] for row in found] for route in ROUTES)
        farthest = [
            ", ".join(f"{max(row[way][key] for row in found):.1e}" for key in ("output", "gradients"))
            for way in ("torch", *ROUTES)
        ]
        cells = [
            package, ", ".join(name for name, _ in group), f"{total(swap, 'layers')} of {total(found, 'layers')}",
            f"{total(on, 'calls')} of {total(found, 'operators')}", *farthest,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def total(rows: list[dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def verdict(rows: Rows) -> str:
    """What the record shows, in a sentence."""
    bad = [name for name, _ in ordered(rows) if wrong(rows[name])]
    where = " and ".join(sorted({row["ran"] for row in rows.values()}))
    right = f"{len(rows) - len(bad)} of {len(rows)} models are right by both ways"
    return f"{right}{' (not: ' + ', '.join(bad) + ')' if bad else ''}: {where}."


def page(rows: Rows) -> str:
    """The whole document."""
    text = (__doc__ or "").split("\n\n", 3)[3].strip()
    return "\n\n".join([
        "# Other people's models",
        "Made by `TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m scripts.models --write`, which runs the models whose\n"
        "packages are installed; the numbers are in `bench/results/models/`.",
        verdict(rows),
        text,
        THREADS,
        LEGEND,
        "![errors by model](models.png)",
        table(rows),
    ]) + "\n"  # fmt: skip


def picture(rows: Rows, file: pathlib.Path) -> None:
    """Errors of each model by each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(name, row) for name, row in reversed(ordered(rows)) if "failed" not in row]
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 1.5 + 0.24 * len(shown)))
    looks = {"torch": ("o", "#999999", 70), "replace_": ("x", "#0b6e99", 40), "enable()": ("+", "#d9480f", 60)}
    for axis, key in zip(axes, ("output", "gradients"), strict=True):
        for way, (marker, color, size) in looks.items():
            label = "torch.nn" if way == "torch" else f"tconv, {way}"
            places = [row[way][key] for _, row in shown]
            axis.scatter(places, range(len(shown)), s=size, marker=marker, color=color, label=label)
        axis.set_xscale("log")
        axis.set_xlabel({"output": "output", "gradients": "farthest gradient"}[key] + ": error against fp64")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [f"{name} ({row['package']})" for name, row in shown], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row shows no parity: it failed, a tensor is off, or a call that tconv should have seen passed it by."""
    if "failed" in row:
        return True
    swap, on = (row[route] for route in ROUTES)
    unseen = [swap["calls"] + swap["calls left"] - swap["entries"], on["calls"] + on["calls left"] - row["operators"]]
    return bool(swap["excess"] or on["excess"] or any(unseen))


def run(model: Model, device: str) -> dict[str, Any]:
    """One row, or why there is none."""
    row: dict[str, Any] = {"package": model.package, "version": model.version, "ran": here()}
    torch.manual_seed(0)
    try:
        built, inputs = model.build(True)
        return row | compare(built.to(device), tuple(t.to(device) for t in inputs))
    except Exception as e:  # a model that its own package cannot build or run is a row too
        return row | {"failed": complaint(e)}


def here() -> str:
    """With what, and where, kernels run."""
    where = "in Triton's interpreter" if triton.knobs.runtime.interpret else f"on {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, Triton {triton.__version__}, kernels {where}"


def complaint(e: Exception) -> str:
    """What an error says, short enough for a table."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(e).__name__}: {e}")  # without a terminal's colours
    return text.splitlines()[0][:160]


def write(rows: Rows) -> None:
    """The document, its picture and the table in docs/evidence.md."""
    (ROOT / "docs" / "models.md").write_text(page(rows))
    picture(rows, ROOT / "docs" / "models.png")
    evidence = ROOT / "docs" / "evidence.md"
    before, after = evidence.read_text().split(MARKS[0])[0], evidence.read_text().split(MARKS[1])[1]
    evidence.write_text(f"{before}{MARKS[0]}\n{verdict(rows)}\n\n{summary(rows)}\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="models whose name has this in it")
    parser.add_argument("--record", type=pathlib.Path, metavar="FILE", help="default bench/results/models/DEVICE.json")
    parser.add_argument("--write", action="store_true", help="make the documents of the record")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False
    interpreted = triton.knobs.runtime.interpret
    device = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    if device == "cpu" and not interpreted:
        parser.error("no GPU here: TRITON_INTERPRET=1 runs the kernels in Triton's interpreter")
    record = options.record or RECORDS / f"{'interpreter' if interpreted else 'gpu'}.json"
    rows = json.loads(record.read_text()) if record.exists() else {}
    chosen = [m for m in (*COMPARED, *MODELS) if re.search(options.only, m.name)]
    for i, model in enumerate(chosen):
        if not model.there:
            print(f"{model.name}: {model.package} is not installed, left out", flush=True)
        elif wrong(rows.get(model.name, {"failed": "not run"})):
            print(f"[{i + 1}/{len(chosen)}] {model.name}", flush=True)
            rows[model.name] = run(model, device)
            print("   ", json.dumps(rows[model.name]), flush=True)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(rows, indent=1) + "\n")
    if options.write:
        write(rows)
    print(verdict(rows))
    return 1 if not rows or any(map(wrong, rows.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
