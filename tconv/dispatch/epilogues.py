"""Convolutions with an epilogue: a per-channel scale and shift, a residual and an activation, in the convolution's own kernel.

A call is computed by a kernel with an epilogue (fused.py) where kernels may run directly, and by a registered operator
(fused_operator.py) in torch.compile, in dispatch modes and for fake tensors. Elsewhere, under functorch's transforms, in
forward-mode differentiation, and where the convolution itself falls back to torch, it is computed as a sequence: the
convolution as it always is, then PyTorch's functions. `tconv.last_calls()` gives the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from tconv.dispatch import entry
from tconv.dispatch.autocast import cast
from tconv.dispatch.check import CallArguments
from tconv.dispatch.context import PLAIN, taken_apart
from tconv.dispatch.dynamo import opaque
from tconv.dispatch.steps import Steps, followed
from tconv.dispatch.window import result_shape
from tconv.launching.cache import BoundedCache
from tconv.launching.dry_run import DRY
from tconv.launching.record import Call, Fallback, record_call
from tconv.planning.batch_invariance import is_batch_invariant

# As entry.py's fast_paths: what tells most calls apart -> a fused.FusedPath, or None after the first call.
fused_paths: BoundedCache[Any, Any] = BoundedCache()


def forget() -> None:
    """Forgets the calls that may be repeated, and the launches that they hold."""
    fused_paths.clear()


def convolve(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps, policy: str = "auto") -> torch.Tensor:
    """Computes one of the six convolutions with an epilogue.

    Args:
        asked: which of the six, and its parameters.
        x, w, b: input, weight and bias.
        steps: the epilogue.
        policy: as in `Geometry`.
    Raises:
        ValueError: a tensor of the epilogue does not fit the result.
        Whatever torch raises for the convolution.
    """
    if is_dynamo_compiling():
        steps.check_kinds()
        found = _by_operator(asked, x, w, b, steps)
        return _by_steps(asked, x, w, b, steps) if found is None else found
    key = None
    if type(x) in PLAIN and type(w) in PLAIN and DRY.get() is None:
        activation, slope, residual, position, scale, shift, *how = steps
        try:
            key = (
                id(w), id(b), policy, is_batch_invariant(), x.shape, x.requires_grad, w.requires_grad, torch.is_grad_enabled(),
                activation, slope, residual is None, position, scale is None, shift is None, *how,
            )  # fmt: skip
            seen = fused_paths.get(key)
        except (TypeError, RuntimeError):  # a bad argument without a hash, or a nested tensor, which has no shape
            key = seen = None
        if seen is not None:
            with contextlib.suppress(Fallback):  # the slow path falls back as well, and tells why
                y: torch.Tensor | None = seen.again(asked, x, w, b, steps)
                if y is not None:
                    return y
    steps.check_kinds()
    for t in (x, w, b, *steps.tensors.values()):
        if isinstance(t, Proxy):
            return _traced(t.tracer, asked, x, w, b, steps)
    if not steps.epilogue:
        return _by_steps(asked, x, w, b, steps)
    try:
        return _by_kernel(key, asked, x, w, b, steps, policy)
    except Fallback as e:
        why = str(e)
    y = _by_steps(asked, x, w, b, steps)  # outside `except`: the exception's frames hold memory
    record_call(Call(f"epilogue of {_public(asked).__name__}", None, None, why))
    return y


def _public(asked: CallArguments) -> Callable[..., torch.Tensor]:
    return entry.PUBLIC[asked.transposed][asked.rank]


def _how(asked: CallArguments) -> tuple[Any, ...]:
    """Returns the parameters of a call in the order of the public function."""
    if asked.transposed:
        return asked.stride, asked.padding, asked.output_padding, asked.groups, asked.dilation
    return asked.stride, asked.padding, asked.dilation, asked.groups


def _mode(asked: CallArguments) -> dict[str, Any]:
    """Returns the keyword of the public function that torch's functions do not have, if it is needed."""
    return {} if asked.mode == "zeros" else {"padding_mode": asked.mode}


def _traced(tracer: Any, asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps) -> torch.Tensor:
    """Returns the proxy that torch.fx records: a call of the public function."""
    more = steps.given | _mode(asked)
    call: torch.Tensor = tracer.create_proxy("call_function", _public(asked), (x, w, b, *_how(asked)), more)
    return call


def _by_steps(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps) -> torch.Tensor:
    """Computes a call as a sequence: the convolution, then PyTorch's functions."""
    y = _public(asked)(x, w, b, *_how(asked), **_mode(asked))
    steps.check_tensors(tuple(y.shape), y.shape[-1 - asked.rank], y.dtype, y.device)
    return followed(y, steps, asked.rank)


def _by_operator(asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps) -> torch.Tensor | None:
    """Computes a call by tconv's registered operator. None if it must be computed as a sequence.

    torch.compile traces this function, as `entry.operators_window`.

    Raises:
        ValueError: a tensor of the epilogue does not fit the result.
    """
    residual, scale, shift = steps.residual, steps.scale, steps.shift
    if steps.activation is None and residual is None and scale is None and shift is None:
        return None
    h = entry.operators_window(asked, x, w, b, residual, scale, shift)
    if h is None:
        return None
    batched = x.dim() == asked.rank + 2
    image = x if batched else x.unsqueeze(0)
    shape, device, dtype = result_shape("dgrad" if asked.transposed else "fprop", image, w, h), x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if is_dynamo_compiling() or not torch._C._get_tracing_state():  # torch.jit.trace's numbers are tensors; the operator checks
        steps.check_tensors(shape if batched else shape[1:], shape[1], dtype, x.device)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w, b, residual, scale, shift)
    )
    kept = differentiable and steps.activation is not None and not steps.recompute and not steps.epilogue.by_result
    if residual is not None and not batched:
        residual = residual.unsqueeze(0)
    slope = float(steps.negative_slope) if steps.activation == "leaky_relu" else 0.0
    y: torch.Tensor = torch.ops.tconv.fused(
        image, w, b, residual, scale, shift, steps.activation or "", slope, steps.residual_position, steps.stepwise, kept,
        asked.transposed, *h,
    )[0]  # fmt: skip
    return y if batched else y.squeeze(0)


@opaque
def _by_kernel(key: Any, asked: CallArguments, x: Any, w: Any, b: Any, steps: Steps, policy: str) -> torch.Tensor:
    """Computes a call by a kernel with an epilogue.

    Args:
        key: where `fused_paths` has the call if it is repeated; None if it must not be there.

    Raises:
        Fallback: it cannot, and nothing has been launched.
        ValueError: a tensor of the epilogue does not fit the result.
    """
    tensors = [t for t in (x, w, b, *steps.tensors.values()) if t is not None]
    dry, why = DRY.get(), None
    try:
        device, fast_path = entry.check_context(*tensors)
    except Fallback as e:
        why = str(e)
    if why:  # outside `except`: the exception's frames hold memory
        found = None if taken_apart() else _by_operator(asked, x, w, b, steps)
        if found is None:
            raise Fallback(why)
        return found
    if torch.is_autocast_enabled(device):
        key, (x, w, b) = None, cast(device, x, w, b)
    g = entry.geometry(asked, x, w, b, policy, is_batch_invariant())
    batched = x.dim() == asked.rank + 2
    shape = g.problem.shape("x" if asked.transposed else "y")
    steps.check_tensors(shape if batched else shape[1:], shape[1], x.dtype, x.device)
    if dry:
        g = dataclasses.replace(g, dry=True, device=dry.device)
    from tconv.dispatch import fused as kernels

    if not batched:
        residual = None if steps.residual is None else steps.residual.unsqueeze(0)
        steps, x = steps._replace(residual=residual), x.unsqueeze(0)
    how = kernels.forward_pass(asked.transposed, x, w, b, steps, g)
    if key is not None and not dry and batched and fast_path.possible(asked, x, w, *(() if b is None else (b,))):
        # None the first time: where shapes never repeat, preparing every call for its repetition would be wasted.
        fused_paths[key] = kernels.FusedPath(asked, how, tensors) if key in fused_paths else None
    y = how(x, w, b, steps.residual, steps.scale, steps.shift)
    return y if batched else y.squeeze(0)
