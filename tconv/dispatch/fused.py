"""Convolutions with an epilogue, as a torch.autograd.Function that launches tconv's kernels.

What is kept for the gradient of the activation is its result where that is enough (relu, leaky_relu, sigmoid, tanh), else its
argument, which the kernel writes beside the result. With `recompute` the argument is not kept but computed again.

The backward pass first makes the gradient of the convolution's result, and the bias gradient, in one pass over memory. The
rest is the backward pass of a convolution (chain_rule.py). Where gradients of gradients are wanted, PyTorch's differentiable
formulas take the place of that kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _get_fp32_precision_getter as fp32_precision
from torch.autograd import profiler

from tconv.dispatch import autograd
from tconv.dispatch.chain_rule import all_gradients
from tconv.dispatch.check import CallArguments
from tconv.dispatch.context import PLAIN, global_state_differs, plain, tensor_guard, why_ineligible
from tconv.dispatch.derivatives import wanted
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.fast_path import alike
from tconv.dispatch.steps import Steps, followed, with_epilogue
from tconv.launching import launch, profiling
from tconv.launching.arguments import Prepared
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.epilogue import Epilogue
from tconv.planning.problem import Geometry

MaybeTensor = torch.Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass without its tensors. Differentiable in all of them.

    Attributes:
        transposed: whether it is a transposed convolution.
        prepared: its launch.
        fused, g: its geometry with the epilogue and without.
        differentiable: whether a gradient is wanted.
        again: whether the activation's argument is computed again in the backward pass.
    """

    transposed: bool
    prepared: Prepared
    fused: Geometry
    g: Geometry
    differentiable: bool
    again: bool

    def __call__(
        self, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, residual: MaybeTensor, scale: MaybeTensor, shift: MaybeTensor
    ) -> torch.Tensor:
        """Returns the result.

        Raises:
            Fallback: a kernel cannot be launched.
        """
        event = None
        if profiler._is_profiler_enabled and not self.g.dry:
            event = profiling.begin_call(self.transposed, self.g, x, w, b)
        try:
            if not self.differentiable:
                return self.run(x, w, b, residual, scale, shift)[0]
            y: torch.Tensor = _apply(x, w, b, residual, scale, shift, self)[0]
            return y
        finally:
            if event is not None:
                profiling.end(event)

    def run(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        b: MaybeTensor,
        residual: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        beside: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, MaybeTensor]:
        """Launches it. Returns its result, and the activation's argument if that is kept.

        Args:
            beside: as in `launch.convolve`.
        """
        shape, strides = self.prepared.shape, self.prepared.strides
        if residual is not None:
            residual = laid_out(residual, strides)
        scale, shift = (per_channel(self.fused.epilogue, t, x.dtype) for t in (scale, shift))
        kept = x.new_empty_strided(shape, strides) if self.fused.epilogue.kept else None
        given = tuple([x if t is None else t for t in (scale, shift, residual, kept)])  # the kernel reads only what there is
        after = given if self.fused.epilogue else ()
        return launch.convolve(self.prepared, x, w, b, self.fused.dry, after=after, beside=beside), kept


def forward_pass(transposed: bool, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, steps: Steps, g: Geometry) -> ForwardPass:
    """Returns the forward pass of a convolution with an epilogue, prepared for these batched tensors of one dtype.

    Args:
        transposed: whether it is a transposed one.
        steps: the arguments that ask for the epilogue.
        g: the geometry without it.
    Raises:
        Fallback: no kernel can run it.
    """
    epilogue, again = steps.epilogue, False
    tensors = (x, w, b, *steps.tensors.values())
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if differentiable and epilogue.activation and not epilogue.by_result:
        again = steps.recompute
        epilogue = dataclasses.replace(epilogue, kept=not again)
    return prepared(transposed, x, w, b, epilogue, g, differentiable, again)


def prepared(
    transposed: bool,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    epilogue: Epilogue,
    g: Geometry,
    differentiable: bool = False,
    again: bool = False,
) -> ForwardPass:
    """Returns the forward pass with this epilogue. Raises as `forward_pass` does."""
    fused = with_epilogue(g, epilogue)
    return ForwardPass(transposed, launch.convolution(transposed, fused, x, w, b), fused, g, differentiable, again)


class FusedPath:
    """An accepted call with an epilogue, prepared so that the next one like it only has to be compared and launched.

    It compares what fast_path.FastPath compares.

    Args:
        call: transposed, rank, stride, padding, output_padding, groups, dilation, mode, as they were given.
        how: the call's forward pass, called as a ForwardPass.
        tensors: the call's tensors, in the order of `again`.
    """

    __slots__ = ("call", "deterministic", "how", "precision", "tensor_guard")

    def __init__(self, call: CallArguments, how: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        self.call, self.how = call, how
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.precision = fp32_precision("cuda", "conv")
        self.tensor_guard = tensor_guard(*tensors)

    @opaque
    def again(self, call: CallArguments, x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, steps: Steps) -> torch.Tensor | None:
        """Returns the result, or None if the call differs from the accepted one.

        Raises:
            Fallback: a kernel cannot be launched.
        """
        residual, scale, shift = steps.residual, steps.scale, steps.shift
        tensors, either = [t for t in (x, w, b, residual, scale, shift) if t is not None], 0
        for t in tensors:
            either |= t.data_ptr()
        if (
            not (all(map(operator.is_, call, self.call)) or alike(call, self.call))
            or not self.tensor_guard(*tensors)
            or either & 15
            or global_state_differs(self.precision)
            or self.deterministic is not torch.are_deterministic_algorithms_enabled()
        ):
            return None
        return self.how(x, w, b, residual, scale, shift)


def per_channel(e: Epilogue, t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """Returns a scale or shift as the kernels read it: contiguous, aligned, and both of one dtype.

    Args:
        dtype: the result's.
    """
    return None if t is None else laid_out(t.detach().to(torch.float32 if e.wide else dtype), (1,))


def laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Returns a tensor with these strides and an aligned address: the tensor itself, or a copy."""
    same = all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True))
    return t if same and not t.data_ptr() & 15 else t.new_empty_strided(t.shape, strides).copy_(t)


class _Fused(torch.autograd.Function):
    @staticmethod
    @opaque
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        b: MaybeTensor,
        residual: MaybeTensor,
        scale: MaybeTensor,
        shift: MaybeTensor,
        how: ForwardPass,
    ) -> Any:
        ctx.set_materialize_grads(False)
        y, kept = how.run(x, w, b, residual, scale, shift)
        v = y if how.fused.epilogue.by_result else kept  # None without an activation, and if it is computed again
        of_scale = b if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(x, w, v, scale, *((b, residual, shift) if how.again else (of_scale, None, None)))
        ctx.how, ctx.given = how, [t is not None for t in (x, w, b, residual, scale, shift)]
        return y, kept

    @staticmethod
    @opaque
    def backward(ctx: Any, dy: MaybeTensor, dkept: MaybeTensor) -> tuple[Any, ...]:  # type: ignore[override]  # two gradients, not any number
        x, w, v, scale, b, residual, shift = ctx.saved_tensors  # read even if unused: this raises if they were edited in place
        if dy is None and dkept is None:
            return (None,) * 7
        how = ctx.how
        if how.again:
            v = _again(how, x, w, b, residual, scale, shift)
        if dy is not None and type(dy) not in PLAIN:
            dy = plain(dy)
        possible = not torch.is_grad_enabled() and dy is not None and not why_ineligible(dy, x, w)
        grads = all_gradients(
            lambda du: autograd.operations(how.g, du, x, w), functools.partial(_one_pass, how) if possible else None,
            how.transposed, how.g.problem.G, how.fused.epilogue, dy, dkept, v, x, w, b, scale,
            wanted(ctx, ctx.needs_input_grad[:6], ctx.given),
        )  # fmt: skip
        return *grads, None


_apply = autograd.apply_of(_Fused)


def _one_pass(how: ForwardPass, e: Epilogue, dy: torch.Tensor, *args: Any) -> launch.Gradients | None:
    """Does what `one_pass` does for a forward pass, and returns None if no kernel can. It is a `chain_rule.OnePass`."""
    try:
        return one_pass(how.g, e, laid_out(dy, how.prepared.strides), *args)
    except Fallback as err:
        record_call(Call(f"gradient of {e}", how.g.problem, None, str(err)))
    return None


def one_pass(
    g: Geometry, e: Epilogue, dy: torch.Tensor, v: MaybeTensor, scale: MaybeTensor, residual: bool, summed: bool
) -> launch.Gradients:
    """Returns the gradients of the convolution's result, of the residual and of the bias by tconv's kernel.

    Args:
        dy, v: with the result's strides.
        residual, summed: whether the gradients of the residual (where it differs) and of the bias are needed.
    Raises:
        Fallback: a kernel cannot be launched.
    """
    dy = laid_out(dy, dy.stride())  # aligned
    v = dy if v is None else laid_out(v, dy.stride())
    return launch.activation_grad(with_epilogue(g, e), dy, v, per_channel(e, scale, dy.dtype), residual, summed)


def _again(
    how: ForwardPass,
    x: torch.Tensor,
    w: torch.Tensor,
    b: MaybeTensor,
    residual: MaybeTensor,
    scale: MaybeTensor,
    shift: MaybeTensor,
) -> torch.Tensor:
    """Computes the activation's argument again."""
    e = how.fused.epilogue
    steps = Steps(None, 0.0, residual if e.residual == "before" else None, "before", scale, shift, e.stepwise)
    if not torch.is_grad_enabled() and steps.epilogue:
        with contextlib.suppress(Fallback):
            return forward_pass(how.transposed, x, w, b, steps, how.g)(x, w, b, steps.residual, scale, shift)
    op = autograd.operations(how.g, x, w)
    y: torch.Tensor = op.dgrad(x, w) if how.transposed else op.fprop(x, w)
    if b is not None:
        y = y + b.view(-1, *(1,) * (y.dim() - 2))
    return followed(y, steps, y.dim() - 2)
