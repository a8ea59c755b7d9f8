"""A pass to measure: its operands, tconv's launch of it under any plan, and torch's own call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tconv.dispatch.window import window
from tconv.launching.dry_run import left_to_torch
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.record import Call
from tconv.planning import plan as planning
from tconv.planning.device import Device
from tconv.planning.operands import GatherPass, Pass, WgradPass
from tconv.planning.plan import Forced
from tconv.planning.problem import PASSES, ConvProblem, Geometry
from tconv.records.book import set_aside
from tconv.records.key import Cell, cell_of, tuples
from tconv.rehearsal.runner import rehearse


@dataclass(frozen=True)
class Subject:
    """A pass on operands of given forms.

    Attributes:
        pass_: "fprop", "dgrad" or "wgrad".
        problem: the convolution.
        operands: the forms of (x, w) for fprop, (dy, w) for dgrad, (dy, x) for wgrad.
        bias: the form of the bias, or None.
        result: the form of the result.
    """

    pass_: str
    problem: ConvProblem
    operands: tuple[Any, ...]
    bias: Any
    result: Any

    def cell(self) -> Cell:
        """Returns where a record has this pass. It depends on torch's setting for TF32."""
        from tconv.launching.arguments import tensor_cores

        dtype = self.result.dtype
        first, second, result = (addressing(_empty(form, "meta")) for form in (*self.operands, self.result))
        c: Pass
        if self.pass_ == "wgrad":
            c = WgradPass(self.problem, second, result, first, tensor_cores(dtype))
        else:
            bias = self.bias and self.bias.strides[0]
            c = GatherPass(self.pass_, self.problem, first, second, result, tensor_cores(dtype), bias)
        return cell_of(c, str(dtype).removeprefix("torch."))

    def to_line(self) -> dict[str, Any]:
        """Returns the pass for a line of a record."""
        problem = dataclasses.asdict(self.problem)
        if not self.problem.bordered:
            del problem["borders"]
        forms = [None if f is None else [f.shape, f.strides] for f in (*self.operands, self.bias, self.result)]
        return {
            "pass": self.pass_,
            "problem": problem,
            "forms": forms,
            "dtype": str(self.result.dtype)[6:],
        }

    @staticmethod
    def from_line(line: dict[str, Any]) -> Subject:
        """Returns the pass of a line. Raises KeyError, TypeError, ValueError or AttributeError if it is none."""
        from tconv.launching.launch import Form

        if line["pass"] not in PASSES:
            raise ValueError(f"no pass: {line['pass']!r}")
        dtype = getattr(torch, line["dtype"])
        first, second, bias, result = (None if f is None else Form(tuple(f[0]), tuple(f[1]), dtype) for f in line["forms"])
        return Subject(
            line["pass"], ConvProblem(**{k: tuples(v) for k, v in line["problem"].items()}), (first, second), bias, result
        )

    def tensors(self, device: str) -> tuple[torch.Tensor, ...]:
        """Returns random operands, and the bias if there is one, on a device. Nobody else's random numbers are used up."""
        seeded = torch.Generator(device).manual_seed(0)
        return tuple(_random(form, device, seeded) for form in (*self.operands, self.bias) if form is not None)

    def empty_result(self, device: str) -> torch.Tensor:
        """Returns an uninitialized result."""
        return _empty(self.result, device)

    def launch(self, device: Device, choices: Forced | None = None) -> Any:
        """Returns tconv's launch, planned by prediction, or with given choices.

        Raises:
            ValueError: no such plan can run.
        """
        from tconv.launching.prepare import prepare_gather, prepare_wgrad

        first, second = (_empty(form, "meta") for form in self.operands)
        bias = None if self.bias is None else _empty(self.bias, "meta")
        with planning.given(choices) if choices else contextlib.nullcontext():
            if self.pass_ == "wgrad":
                return prepare_wgrad(self.problem, first, second, self.empty_result("meta"), device)
            return prepare_gather(self.pass_, self.problem, first, second, bias, self.empty_result("meta"), device)

    def torchs(self, tensors: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        """Returns the call of torch's own kernel on the operands: what a call that falls back runs."""
        from tconv.dispatch.equivalents import IN_ATEN

        channels_last = shaped(torch.Size(self.result.shape), True, self.result.dtype).stride() == self.result.strides
        h, (first, second, *bias) = window(Geometry(self.problem, channels_last)), tensors

        def call() -> torch.Tensor:
            with left_to_torch("measured"):
                return IN_ATEN[self.pass_](first, second, bias[0] if bias else None, *h)

        return call


def _empty(form: Any, device: str) -> torch.Tensor:
    """Returns an uninitialized tensor of a form. On "meta" its address is that of an aligned one."""
    start = 0 if device == "meta" else form.offset // form.dtype.itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(form.shape, form.strides, strict=True))
    return torch.empty(start + reach, dtype=form.dtype, device=device).as_strided(form.shape, form.strides, start)


def _random(form: Any, device: str, seeded: torch.Generator) -> torch.Tensor:
    made = _empty(form, device)
    if 0 in form.strides:  # an expanded tensor, as the gradient of a sum is
        return made.fill_(0.5)
    return made.normal_(generator=seeded)


@dataclass
class Asked:
    """A pass of a model.

    Attributes:
        subject: the pass.
        layers: the names of the modules whose forward pass has such a problem; empty for calls outside of modules.
        calls: how often the model makes it.
    """

    subject: Subject
    layers: list[str] = field(default_factory=list)
    calls: int = 0


def passes_of(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool, device: Device | None = None
) -> tuple[list[Asked], list[Call]]:
    """Returns the distinct passes that a model's forward and backward make, and the calls that fall back to torch.

    The bias gradient is not among them: it has one kernel, and torch's is no convolution. Nor are passes whose operands do not
    begin at a multiple of 16 bytes, as views may not: the next call's may begin elsewhere.

    Args:
        model, args, kwargs, backward: as `tune` takes them.
        device: the device to plan for, for a model that runs on meta tensors; None for the tensors' own device.
    """
    from tconv.launching.launch import Form, asking

    with _modules(model) as running, asking(lambda: running[-1] if running else "") as asked, set_aside():
        calls = rehearse(model, args, kwargs, device, backward)
    layers: dict[Any, list[str]] = {}
    for one in asked:
        if one.where and one.where not in layers.setdefault(one.launch.call.problem, []):
            layers[one.launch.call.problem].append(one.where)
    found: dict[Subject, Asked] = {}
    for one in asked:
        call = one.launch.call
        aligned = not any(form.offset for form in one.operands)
        if call.operation in PASSES and isinstance(call.problem, ConvProblem) and aligned:
            form = Form(tuple(one.launch.shape), one.launch.strides, one.operands[0].dtype)
            subject = Subject(call.operation, call.problem, one.operands, one.bias, form)
            found.setdefault(subject, Asked(subject, layers.get(call.problem, []))).calls += 1
    return [*found.values()], [call for call in calls if not call.ours]


@contextlib.contextmanager
def _modules(model: Any) -> Iterator[list[str]]:
    """Yields a list of the names of the modules of a model whose forward pass is running, outermost first."""
    names = {id(m): name or type(m).__name__ for name, m in model.named_modules()} if isinstance(model, torch.nn.Module) else {}
    running: list[str] = []

    def begin(module: torch.nn.Module, args: Any) -> None:
        running.append(names.get(id(module), type(module).__name__))

    def end(module: torch.nn.Module, args: Any, result: Any) -> None:
        running.pop()

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
