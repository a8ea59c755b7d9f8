"""Calls a model, and the backward pass of its result, without computing convolutions and without side effects.

`explain` and `precompile` use this. The model's own Python code runs, with stand-ins for every tensor that can be found in it
and in its inputs. rehearsal/state.py finds them, and restores whatever the code changes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tconv.dispatch.context import PLAIN
from tconv.launching.dry_run import dry_run
from tconv.launching.record import Call, recording_apart
from tconv.planning.device import Device
from tconv.rehearsal.state import Place, Reached, exchanged, reach, tensors, thread_kept

COPIED = 1 << 30  # parameters are copied up to this many bytes in total; a larger model would need twice its memory


def check_callable(function: str, name: str, model: Any) -> None:
    """Raises TypeError unless a model can be called with inputs."""
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise TypeError(
            f"{function}: {name} must be a module or a function, got the class {model.__name__}: make a module of it"
        )
    if not callable(model):
        raise TypeError(f"{function}: {name} must be a module or a function, got {type(model).__name__}")


def rehearse(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: Device | None = None,
    backward: bool = True,
) -> list[Call]:
    """Returns the calls that a model's forward and backward pass would make.

    Args:
        model: a module or a function.
        args, kwargs: its inputs, in any containers and objects. Every floating-point or complex tensor among them is treated
            as if it had `requires_grad`; a Parameter only if it has.
        device: the device to plan for. The model then runs on meta tensors, unless all of its tensors are on a GPU. None: the
            tensors' own device.
        backward: whether to run the backward pass too, from every tensor in the result that has a gradient, to all leaves.
    Raises:
        RuntimeError: the model does not run on meta tensors. Other errors of the model are passed on.
    """
    while isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module  # DDP would exchange gradients with other processes; DataParallel would call replicas
    inputs = [list(args), dict(kwargs)]
    found = reach((inputs, Place.INPUT), (model, Place.MODEL))
    meta = device is not None and not _on_gpu(found)
    differentiable = StandIns(meta, found, inputs_require_grad=True)
    try:
        return _attempt(model, inputs, found, differentiable, device, backward)
    except Exception:
        if not differentiable.added_grad:
            raise
    # The model may raise because inputs require gradients which the caller's do not, for example if it calls `.numpy()`.
    return _attempt(model, inputs, found, StandIns(meta, found, inputs_require_grad=False), device, backward)


def _attempt(
    model: Callable[..., Any], inputs: list[Any], found: Reached, stand_ins: StandIns, device: Device | None, backward: bool
) -> list[Call]:
    """Does `rehearse` with these stand-ins. `found` are the contents of the model and of `inputs`, [args, kwargs]."""
    with contextlib.ExitStack() as during:
        calls = during.enter_context(recording_apart())
        during.enter_context(thread_kept())
        during.enter_context(dry_run(device))
        if "torch._dynamo" in sys.modules:  # a compiled model must neither compile for this nor run a compiled graph
            during.enter_context(torch.compiler.set_stance("force_eager"))
        during.enter_context(exchanged(found, stand_ins))
        try:
            result = model(*inputs[0], **inputs[1])
            if backward and any(call.ours for call in calls):
                _backward(tensors([result]))
        except Exception as e:
            if not stand_ins.meta:
                raise
            raise RuntimeError(f"the model does not run on meta tensors: {type(e).__name__}: {e}") from e
    return calls


def _on_gpu(found: Reached) -> bool:
    """Returns True if inputs, parameters and buffers are all on a GPU, not counting scalars."""
    held = {id(t) for module in found.modules for t in (*module.parameters(), *module.buffers())}
    counted = [t for t, place in found.tensors if (place is Place.INPUT or id(t) in held) and (is_lazy(t) or t.dim())]
    return bool(counted) and all(t.is_cuda for t in counted)  # GPU computations may use CPU scalars


class StandIns:
    """Creates the tensors that a model sees instead of its own and its inputs'.

    They do not share memory with the originals, so the model may write to them. There are two exceptions: the parameters of
    a large model, and tensors found only in objects of other classes.

    Args:
        meta: whether to create meta tensors.
        found: has all tensors to replace.
        inputs_require_grad: whether floating-point and complex inputs require gradients even if the caller's do not.

    Attributes:
        added_grad: True if the stand-in of an input requires a gradient that the input itself does not.
    """

    def __init__(self, meta: bool, found: Reached, inputs_require_grad: bool) -> None:
        self.meta, self.inputs_require_grad, self.added_grad = meta, inputs_require_grad, False
        parameters = [t for t, _ in found.tensors if isinstance(t, torch.nn.Parameter) and not is_lazy(t)]
        self.shared = sum(p.nbytes for p in parameters) > COPIED

    def __call__(self, t: torch.Tensor, place: Place) -> torch.Tensor:
        if is_lazy(t):
            return _lazy(t, "meta" if self.meta else t.data.device)
        parameter = isinstance(t, torch.nn.Parameter)
        if place is Place.ELSEWHERE and not parameter and not self.meta:
            return t
        added = (
            self.inputs_require_grad
            and place is Place.INPUT
            and not (parameter or t.requires_grad)
            and (t.is_floating_point() or t.is_complex())
        )
        self.added_grad |= added
        requires_grad = added or t.requires_grad
        if self.meta:
            # Models read the values of scalars, such as BatchNorm's number of batches.
            new = _meta(t) if t.dim() or requires_grad or t.is_meta else t.detach().to("cpu", copy=True)
        elif parameter and self.shared and not t.is_inference():
            new = t.detach()
        else:
            new = _copy(t)
        if parameter:
            new = torch.nn.Parameter(new, requires_grad=requires_grad)
        elif added and _plain(new):
            new = _written(new)
        elif requires_grad:
            new.requires_grad_()
        for name, value in vars(t).items():
            new.__dict__.setdefault(name, value)
        return new


def _plain(t: torch.Tensor) -> bool:
    """Returns True if shape, strides and memory fully describe a tensor: it is dense, not quantized, no lazy view etc."""
    ordinary = type(t) in PLAIN and t.layout is torch.strided
    return ordinary and not (t.is_quantized or t.is_nested or t.is_neg() or t.is_conj())


def _written(t: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that requires a gradient and can still be written in place, like an input that requires none."""
    leaf = torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape).requires_grad_()
    new: torch.Tensor = _Follows.apply(leaf, t)  # type: ignore[no-untyped-call]  # untyped in torch
    return new


class _Follows(torch.autograd.Function):
    """Returns the tensor itself, with a graph as if it had been computed from a leaf of its shape."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(t)
        return t

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def _lazy(t: Any, device: Any) -> torch.Tensor:
    """Returns a new uninitialized parameter or buffer, for the model to initialize."""
    more = {"persistent": t.persistent} if isinstance(t, torch.nn.parameter.UninitializedBuffer) else {}
    new: torch.Tensor = type(t)(requires_grad=t.requires_grad, device=device, dtype=t.data.dtype, **more)
    return new


def _meta(t: torch.Tensor) -> torch.Tensor:
    if _plain(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return t.detach().to("meta")


def _copy(t: torch.Tensor) -> torch.Tensor:
    """Returns a copy with the same strides and an address with the same remainder modulo 16."""
    t = t.detach()
    if not _plain(t):
        return t.clone()
    if t.is_meta or not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    offset = t.data_ptr() % 16 // t.itemsize
    memory = torch.empty(offset + reach, dtype=t.dtype, device=t.device)
    memory[offset:].copy_(t.as_strided((reach,), (1,)))
    return memory.as_strided(t.shape, t.stride(), offset).detach()  # not a view of `memory` for autograd


# --- backward ---


def _backward(results: list[torch.Tensor]) -> None:
    """Runs the backward pass from all results that have a graph to all leaves, without changing the leaves' `grad`."""
    results = [t for t in results if t.grad_fn is not None]
    if not results:
        return
    nodes = _nodes(results)
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    upstream = [torch.empty_like(t) for t in results]
    try:
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            # Reentrant checkpoints, torch's or another library's, do not support autograd.grad: accumulate into `grad`.
            with _gradients_aside(leaves):
                torch.autograd.backward(results, upstream)
        else:
            torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    except RuntimeError as e:
        if "backward through the graph a second time" not in str(e):
            raise  # else the model has run its own backward pass, as a training step does


@contextlib.contextmanager
def _gradients_aside(leaves: list[torch.Tensor]) -> Iterator[None]:
    """Sets the leaves' `grad` to None within a block and restores it after. Some leaves may be the user's own tensors."""
    kept = [(t, t.grad) for t in leaves]
    for t in leaves:
        t.grad = None
    try:
        yield
    finally:
        for t, gradient in kept:
            t.grad = gradient


def _nodes(results: list[torch.Tensor]) -> list[Any]:
    """Returns all nodes of the autograd graph of results."""
    nodes: dict[Any, None] = dict.fromkeys(t.grad_fn for t in results)
    stack = [*nodes]
    while stack:
        new = [n for n, _ in stack.pop().next_functions if n is not None and n not in nodes]
        nodes |= dict.fromkeys(new)
        stack += new
    return [*nodes]
