"""What `fuse_` saves: launches and bytes of three models, counted before and after, and how far their results are apart.

    TRITON_INTERPRET=1 python -m bench.fusing [--write]

The models are those of bench/blocks.py. Launches and bytes are counted without a GPU: the model runs on meta tensors, in bf16
and channels last, planned for an H200. Both sides have tconv's layers. Of tconv's kernels every launch counts, the copies of
operands and the sums of split reductions too; of PyTorch's functions one per operator that computes something. Bytes are the
least: each operand is read once, each result is written once. The difference of the results is a tiny model's, with the same
graph, in fp32 in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import tconv
from bench import blocks
from bench.models import in_layout
from tconv.launching.dry_run import dry_run
from tconv.launching.record import Call, recording_apart
from tconv.planning.cost import written_elements
from tconv.planning.device import DEVICES

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "fusing.md"
MARKS = ("<!-- counted -->", "<!-- /counted -->")
MODELS: dict[str, tuple[Callable[[bool], torch.nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "ResNet-50, 32 images of 224x224": (blocks.ResNet50, (32, 3, 224, 224), (2, 3, 32, 32)),
    "video decoder, 9 frames of 256x256": (blocks.VideoDecoder, (1, 16, 9, 64, 64), (1, 16, 3, 3, 2)),
    "SEANet codec, 4 seconds at 24 kHz": (blocks.Seanet, (1, 1, 96000), (1, 1, 24)),
}
ITEMSIZE = 2  # of bf16
NO_WORK = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view")


@dataclass
class Count:
    """Launches, and least bytes."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.launches + other.launches, self.bytes + other.bytes)


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch's that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen = Count(), dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_WORK:
            seen = [t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, torch.Tensor)]
            self.count += Count(1, sum({id(t): t.numel() * t.itemsize for t in seen}.values()))
            self.seen[name] = self.seen.get(name, 0) + 1
        return result


def of_call(call: Call) -> Count:
    """What one of tconv's calls launches and moves."""
    assert call.plan is not None, call
    assert call.plan.cost is not None
    assert call.problem is not None
    residual = "residual" in call.plan.reason
    moved = call.plan.cost.bytes + 2 * call.plan.cost.workspace
    moved += ITEMSIZE * residual * written_elements(call.problem, call.plan.pass_)
    return Count(1 + bool(call.plan.staged) + (call.plan.splits > 1), moved)


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called outside of dispatch modes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def counted(model: torch.nn.Module, x: torch.Tensor) -> tuple[Count, dict[str, int]]:
    """What a forward pass on an H200 launches and moves, and how often each operator of PyTorch's is called."""
    with contextlib.ExitStack() as during:
        for module in (tconv.modules, tconv.dispatch.epilogues):  # their kernels do not run in a dispatch mode
            during.enter_context(mock.patch.object(module, "convolve", outside(module.convolve)))
        during.enter_context(torch.no_grad())
        during.enter_context(dry_run(DEVICES["H200"]))
        model(x)  # keeps batch norms' scales and shifts
        calls, operators = during.enter_context(recording_apart()), during.enter_context(Operators())
        model(x)
    left = [call for call in calls if not call.ours]
    assert not left, left
    return sum(map(of_call, calls), operators.count), operators.seen


def difference(model: torch.nn.Module, x: torch.Tensor) -> tconv.Fusion:
    """Fuses a model that runs here, with random numbers in its batch norms, and compares."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t, least in ((m.weight, 0.5), (m.bias, -1), (m.running_mean, -1), (m.running_var, 0.5)):
                torch.nn.init.uniform_(t, least, 2)
    return tconv.fuse_(model, x)


def rows() -> list[str]:
    """The table's lines in Markdown."""
    lines = [
        "| model | convolutions, fused | launches | bytes | of PyTorch's operators remain | the results differ by |",
        "|---|---|---|---|---|---|",
    ]
    for name, (build, shape, tiny) in MODELS.items():
        torch.manual_seed(0)
        fusion = difference(build(True).eval(), torch.randn(tiny))
        with torch.device("meta"):
            model = in_layout(build(False).eval().to(torch.bfloat16), "channels_last")
            x = in_layout(torch.empty(shape, dtype=torch.bfloat16), "channels_last")
        tconv.replace_(model)
        fused = copy.deepcopy(model)
        convolutions = tconv.fuse_(fused, x)
        (before, _), (after, remain) = counted(model, x), counted(fused, x)
        most = sorted(remain.items(), key=lambda item: -item[1])
        cells = [
            name, f"{len(convolutions.convolutions)}, {len(convolutions.fused)}", f"{before.launches} -> {after.launches}",
            f"{before.bytes / 1e9:.2f} -> {after.bytes / 1e9:.2f} GB", ", ".join(f"{n} {op}" for op, n in most),
            f"{fusion.difference:.1e}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/fusing.md")
    write, lines = parser.parse_args().write, rows()
    if write:
        text = PAGE.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
