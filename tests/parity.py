"""Puts one question to tconv and to torch, and compares what can be seen of the two answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import tconv
from tests import oracle

RANKS = (1, 2, 3)
OPS = tuple(f"conv{transpose}{rank}d" for transpose in ("", "_transpose") for rank in RANKS)
LAYERS = tuple(f"Conv{transpose}{rank}d" for transpose in ("", "Transpose") for rank in RANKS)
LAZY = tuple(f"Lazy{name}" for name in LAYERS)
# Two correct summation orders differ by this much; compiled, fp32 may be TF32, whose inputs keep 10 bits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TF32_TOLERANCE = 1e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two right results may differ: by nothing for what is not a floating dtype."""
    return TF32_TOLERANCE if oracle.tf32(dtype) else TOLERANCE.get(dtype, 0.0)


def rank(name: str) -> int:
    """The rank in an operation's or a layer's name."""
    return int(name[-2])


def plain(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous()


def cl(t: torch.Tensor) -> torch.Tensor:
    """Copied, since to() leaves alone what is in both formats at once; in 1-D, the strides of a channels_last row."""
    if t.dim() == 3:
        return cl(t.unsqueeze(2)).squeeze(2)
    return torch.empty_like(t, memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d).copy_(t)


def assert_same(got: torch.Tensor | None, expected: torch.Tensor | None, what: str = "result", weight: bool = False) -> None:
    """Shape, dtype, device, strides and values; None only where the other is None.

    Of a weight's gradient, only strides that address something: those of extents of one differ between torch's backends.
    """
    if got is None or expected is None:
        assert got is expected, what
        return
    tolerance = tolerance_of(got.dtype)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}")
    strides, expected_strides = (
        [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 or not weight] for t in (got, expected)
    )
    assert strides == expected_strides, f"{what}: strides {got.stride()}, torch's are {expected.stride()}"


def leaf(t: Any) -> Any:
    """The same elements as a tensor that collects its own gradient; whatever is not a floating tensor as it is."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        return t
    return t.detach().requires_grad_()


def gradients(y: torch.Tensor, leaves: Iterable[Any]) -> list[torch.Tensor]:
    """Gradients by the leaves for an upstream gradient that depends on y's shape alone."""
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.device, y.dtype)
    return list(torch.autograd.grad(y, [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad], upstream))


def parameter_gradients(y: torch.Tensor, x: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the input and by every parameter of a module, by name."""
    named = {"input": x, **dict(module.named_parameters())}
    return dict(zip(named, gradients(y, named.values()), strict=True))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type and text of what it raises."""
    try:
        return call()
    except Exception as e:
        return type(e), str(e)


def assert_ours(calls: list[tconv.Call], *operations: str) -> None:
    """tconv's kernels did all the work, each of these passes and no other, and torch none."""
    left = "; ".join(str(call) for call in calls if not call.ours)
    assert not left, f"fell back to torch: {left}"
    done = sorted(call.operation for call in calls)
    assert done == sorted(operations), f"ran {done}, not {sorted(operations)}"


def forbid_launches(monkeypatch: Any, error: BaseException) -> None:
    """From here to the test's end, launching any kernel raises that error; an Exception means that the kernel failed."""
    from tconv.kernels.gather import gather

    def launch(*_: Any) -> None:
        raise error

    monkeypatch.setattr(type(gather), "__getitem__", launch)


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """tconv's and torch's layer of that name, built from the same seed."""
    layers = []
    for library in (tconv, torch.nn):
        torch.manual_seed(3)
        layers.append(getattr(library, name)(*args, **kwargs))
    return layers[0], layers[1]
