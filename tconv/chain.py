"""What a fused forward calls in place of a chain of modules: one convolution with an epilogue, or the chain as it was.

A chain is a zero padding, a convolution, a batch norm in evaluation mode, the addition of a residual and an activation, each
left out if it is None. The modules stay as they are and are only read. So whatever changes after `fuse_` is seen by the next
call: another mode, another module in a place, a hook. Where a kernel cannot compute the chain then, its modules are called.
"""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from tconv.dispatch import entry, epilogues
from tconv.dispatch.check import CallArguments
from tconv.dispatch.sides import pairs
from tconv.dispatch.steps import SEQUENCE, Steps
from tconv.launching.record import Call, Fallback, record_call, recording
from tconv.modules import pads
from tconv.subclasses import COMPUTES, OURS, TORCHS

Activation = tuple[str, float]  # one of planning.epilogue's ACTIVATIONS, and leaky_relu's slope
ACTIVATIONS: dict[type, Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: ("relu", 0.0),
    nn.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope),
    nn.SiLU: lambda m: ("silu", 0.0),
    nn.GELU: lambda m: ("gelu_tanh" if m.approximate == "tanh" else "gelu", 0.0),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0),
    nn.Tanh: lambda m: ("tanh", 0.0),
    nn.Hardswish: lambda m: ("hardswish", 0.0),
}
NORMS: dict[type, int | None] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}  # rank
Pad = tuple[str, Sequence[int]]  # the mode and the amounts that torch.nn.functional.pad gets
PADS: dict[type, str] = {
    getattr(nn, f"{kind}Pad{rank}d"): mode
    for kind, mode in (
        ("Zero", "constant"), ("Constant", "constant"), ("Reflection", "reflect"), ("Replication", "replicate"),
        ("Circular", "circular"),
    )
    for rank in (1, 2, 3)
}  # fmt: skip


class Unfit(Exception):
    """A convolution's kernel cannot compute a module. The text says why."""


@dataclass
class Watch:
    """What the chains of a thread did, while `fuse_` runs a model.

    Attributes:
        chains: {convolution: the call that computed its chain}; one of torch's says why.
        misfits: {convolution: why its residual did not fit its result}.
        host: called by a fused forward in its own place, with the module, the old forward, the new one and the arguments.
    """

    chains: dict[nn.Module, Call] = field(default_factory=dict)
    misfits: dict[nn.Module, str] = field(default_factory=dict)
    host: Callable[..., Any] | None = None


WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("tconv_watch", default=None)


def chained(
    conv: Any,
    x: torch.Tensor,
    norm: Any = None,
    activation: Any = None,
    residual: Any = None,
    position: str = "before",
    pad: Any = None,
    stepwise: bool = False,
) -> torch.Tensor:
    """Computes a chain by the convolution's kernel if that can, else by its modules one after the other.

    Args:
        conv: the convolution layer.
        x: its input, before `pad`.
        norm: the batch norm.
        activation: a module, or an `Activation` for a function.
        residual: a tensor, added "before" or "after" the activation, as `position` says.
        pad: a module, or a `Pad` for a function.
        stepwise: as in `tconv.functional`.
    """
    watch = WATCH.get()
    if watch is not None:
        with recording() as calls:
            token = WATCH.set(None)
            try:
                y = chained(conv, x, norm, activation, residual, position, pad, stepwise)
            finally:
                WATCH.reset(token)
        watch.chains[conv] = next((call for call in calls if not call.ours), calls[0])
        if watch.chains[conv].reason.startswith("residual must"):
            watch.misfits[conv] = watch.chains[conv].reason
        return y
    try:
        return _by_kernel(conv, x, norm, activation, residual, position, pad, stepwise)
    except (Unfit, Fallback, ValueError) as e:  # a ValueError is of a residual that does not fit, before any launch
        why = str(e)
    record_call(Call("chain", None, None, why))
    return _by_modules(conv, x, norm, activation, residual, position, pad)  # outside `except`, whose frames hold memory


def _by_modules(conv: Any, x: Any, norm: Any, activation: Any, residual: Any, position: str, pad: Any) -> torch.Tensor:
    """Computes a chain by its modules."""
    if pad is not None:
        x = pad(x) if isinstance(pad, nn.Module) else F.pad(x, pad[1], mode=pad[0])
    y = conv(x)
    if norm is not None:
        y = norm(y)
        activation = None if norm_act(norm) and activation is norm.act else activation
    if residual is not None and position == "before":
        y = y + residual
    if activation is not None:
        y = activation(y) if isinstance(activation, nn.Module) else SEQUENCE[activation[0]](y, activation[1])
    if residual is not None and position == "after":
        y = y + residual
    return y  # type: ignore[no-any-return]  # of modules


def _by_kernel(
    conv: Any, x: Any, norm: Any, activation: Any, residual: Any, position: str, pad: Any, stepwise: bool
) -> torch.Tensor:
    """Computes a chain by the convolution's kernel.

    Raises:
        Unfit, Fallback: it cannot, and nothing has been launched.
        ValueError: the residual does not fit the result, and nothing has been launched.
    """
    transposed, rank = fit_conv(conv, pad is not None)
    for hook in conv._forward_pre_hooks.values():
        hook(conv, (x,))  # torch.nn.utils' own, which compute the weight
    w, b = conv.weight, conv.bias
    entry.check_context(x, w)
    if x.dim() != rank + 2:
        raise Unfit("an input without a batch")
    padding, mode = fit_padding(conv, pad, rank)
    scale = shift = None
    if norm is not None:
        fit_norm(norm, rank)
        if norm_act(norm) and type(norm.act) is not nn.Identity and activation is not norm.act:
            raise Unfit("the batch norm has an activation of its own now")
        scale, shift = _scale_and_shift(norm)
    name, slope = None, 0.0
    if activation is not None:
        name, slope = fit_activation(activation) if isinstance(activation, nn.Module) else activation
    asked = CallArguments(
        transposed, rank, conv.stride, padding, conv.output_padding if transposed else 0, conv.groups, conv.dilation, mode
    )  # fmt: skip
    steps = Steps(name, slope, residual, position, scale, shift, stepwise)
    return epilogues.convolve(asked, x, w, b, steps, getattr(conv, "_tconv_policy", "auto"))


# --- what fits ---


def fit_conv(conv: Any, padded: bool = False) -> tuple[bool, int]:
    """Returns whether a layer's convolution is transposed, and its rank.

    Args:
        padded: whether a padding before it is to be computed with it.
    Raises:
        Unfit: its kernel cannot be called in the layer's place.
    """
    kind = _kind(type(conv))  # type: ignore[arg-type]  # a class has a hash
    if kind is None:
        raise Unfit(f"{type(conv).__name__} has a forward of its own")
    if padded and kind[0]:
        raise Unfit("a padding before a transposed convolution")
    unhooked(conv, "the convolution", torch.nn.utils.__name__)
    if is_lazy(conv._parameters.get("weight")):
        raise Unfit("it is lazy and has no weight yet")
    return kind


@functools.cache
def _kind(cls: type) -> tuple[bool, int] | None:
    """Returns whether the convolution of a layer's class is transposed, and its rank; None if it overrides `forward`."""
    base = next((b for b in cls.__mro__ if b in OURS or b in TORCHS), None)
    if base is None or any(getattr(cls, name, None) is not getattr(base, name, None) for name in COMPUTES):
        return None
    return issubclass(cls, nn.modules.conv._ConvTransposeNd), int(base.__name__[-2])


def fit_norm(norm: Any, rank: int) -> None:
    """Raises Unfit unless a batch norm is a scale and a shift per channel of a convolution of this rank."""
    if NORMS.get(nn.BatchNorm2d if norm_act(norm) else type(norm), 0) not in (rank, None):
        raise Unfit(f"{type(norm).__name__} is no batch norm of rank {rank}")
    unhooked(norm, "the batch norm")
    if norm.training or norm.running_mean is None:
        raise Unfit("the batch norm is in training" if norm.training else "the batch norm keeps no statistics")


def norm_act(module: Any) -> bool:
    """Returns True for timm's BatchNormAct2d, a BatchNorm2d whose forward ends in its `act`, if it drops nothing between."""
    cls = type(module)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.startswith("timm.") and type(module.drop) is nn.Identity


def fit_activation(activation: Any) -> Activation:
    """Returns which activation a module is. Raises Unfit if the kernels have none like it."""
    of = ACTIVATIONS.get(type(activation))
    if of is None:
        raise Unfit(f"{type(activation).__name__} is no activation of the kernels")
    unhooked(activation, "the activation")
    return of(activation)


def fit_pad(pad: nn.Module | Pad, rank: int) -> tuple[str, list[tuple[int, int]]]:
    """Returns the mode of a padding, as a layer's padding_mode, and (before, after) per spatial dimension.

    Args:
        pad: a module, or a `Pad`.
    Raises:
        Unfit: it is no padding, pads by other numbers than zero, crops, or pads other dimensions too.
    """
    if isinstance(pad, nn.Module):
        if getattr(pad, "value", 0) != 0:
            raise Unfit(OTHER_NUMBERS)
        unhooked(pad, "the padding")
        if type(pad) not in PADS:
            raise Unfit(f"{type(pad).__name__} is no padding of the kernels")
        mode, amounts = PADS[type(pad)], cast(Any, pad).padding
    else:
        mode, amounts = pad
    if len(amounts) > 2 * rank or len(amounts) % 2 or not all(type(n) is int and n >= 0 for n in amounts):
        raise Unfit(f"a padding of {tuple(amounts)}")
    given = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    return "zeros" if mode == "constant" else mode, [(0, 0)] * (rank - len(given)) + given[::-1]


def fit_padding(conv: Any, pad: nn.Module | Pad | None, rank: int) -> tuple[Any, str]:
    """Returns a layer's padding and one before it as one: in pairs if there is one before, and its mode.

    Raises:
        Unfit: they are not one, or not the kernels'.
    """
    mode = conv.padding_mode
    padding = conv.padding if mode == "zeros" else pads(conv, rank)
    if pad is None:
        return padding, mode
    before, more = fit_pad(pad, rank)
    if padding == "same":
        raise Unfit('padding="same" after a padding')
    own = pairs(0 if padding == "valid" else padding, rank)
    if not any(map(any, own)):
        return tuple(more), before
    if (mode, before) != ("zeros", "zeros") and any(map(any, more)):
        raise Unfit("a padding in another mode than the convolution's own, or a repeated one of a repeated one")
    return tuple([(p + m, q + n) for (p, q), (m, n) in zip(own, more, strict=True)]), mode


OTHER_NUMBERS = "a padding by other numbers than zero"


def unhooked(module: Any, what: str, but: str = "-") -> None:
    """Raises Unfit if a module has hooks, which would not be called, or an own `forward`.

    Args:
        what: the module, in the reason.
        but: the module of Python whose pre-hooks do not count.
    """
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unfit(f"{what} has a hook, which would not be called or see another result")
    if any(not type(hook).__module__.startswith(but) for hook in module._forward_pre_hooks.values()):
        raise Unfit(f"{what} has a forward pre-hook, which would not be called")
    if "forward" in module.__dict__:
        raise Unfit(f"{what} has a forward of its own, set on the module")
    if _has_any_global_hook():  # type: ignore[no-untyped-call]  # untyped in torch
        raise Unfit("a hook on every module")


# --- batch norm ---

# {a batch norm: (its tensors, their versions and addresses, eps, scale, shift)}
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch norm in evaluation mode as a scale and a shift, in fp32 or fp64.

    They are kept until it changes, except where gradients are wanted for its parameters.
    """
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    given = [t for t in tensors if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    state, kept = None, _kept.get(norm)
    if not differentiable and not any(t.is_inference() for t in given):  # whose changes have no versions to be seen by
        state = [(t._version, t.data_ptr(), t.dtype) for t in given]
        if kept and kept[1] == state and kept[2] == norm.eps and all(a is b for a, b in zip(tensors, kept[0], strict=True)):
            return kept[3], kept[4]
    # Not as inference mode's own tensors, which no later call with gradients could save.
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        wide = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.to(wide)
        shift = -scale * norm.running_mean.to(wide)
        shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    if state is not None and not (scale.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is its own
        _kept[norm] = tensors, state, norm.eps, scale, shift
    return scale, shift
