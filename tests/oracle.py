"""The fp64 oracle, and the error that a correct kernel may make.

An output is a sum of products. In fp64 the same convolution of squares gives, per element, the sum of the squared
products; its root is the size of a random sum's rounding error in units of eps, so one bound fits every layer, pass and
dtype: half an eps of the output times the result (it is rounded once, to nearest), plus a few eps of the accumulator times
the square root of the number of terms times that root mean square. A lost tap is orders of magnitude above it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
NAMES = ("y", "dx", "dw", "db")


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution and the reason why it is tested.

    Shapes are torch's: input (N, C, *spatial), kernel per dimension; groups may be uneven (C/G != K/G).
    """

    reason: str
    x: tuple[int, ...]
    k: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    @property
    def weight(self) -> tuple[int, ...]:
        c = self.x[1]
        return (c, self.k // self.groups, *self.kernel) if self.transposed else (self.k, c // self.groups, *self.kernel)

    @property
    def arguments(self) -> dict:
        a = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return a | {"output_padding": self.output_padding} if self.transposed else a

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")


def tensors(case: Case, dtype: torch.dtype, device: str, channels_last: bool = False) -> tuple[torch.Tensor, ...]:
    """Random x, w, b of a case."""
    x = torch.randn(case.x, dtype=torch.float64).to(device, dtype)
    w = torch.randn(case.weight, dtype=torch.float64).to(device, dtype)
    b = torch.randn(case.k, dtype=torch.float64).to(device, dtype)
    if channels_last:
        x, w = to_channels_last(x), to_channels_last(w)
    return x, w, b


def to_channels_last(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 3:
        return t.unsqueeze(2).to(memory_format=torch.channels_last).squeeze(2)
    return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


def run(function, case: Case, x, w, b, dy=None, only=NAMES) -> tuple[torch.Tensor, ...]:
    """(y, dx, dw, db) of a function on a case, or only some of them; dy defaults to fixed random numbers."""
    x, w, b = given = [t.detach().requires_grad_(name in only) for name, t in zip(NAMES[1:], (x, w, b), strict=True)]
    y = function(x, w, b, **case.arguments)
    if dy is None:
        dy = upstream(y)
    asked = [t for t in given if t.requires_grad]
    return y.detach(), *(torch.autograd.grad(y, asked, dy.to(y.dtype)) if asked else ())


def upstream(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def terms(case: Case, y: torch.Tensor) -> tuple[int, ...]:
    """At most so many products are added in an element of y, dx, dw, db."""
    taps = y.new_empty(case.kernel, device="meta").numel()
    c, k = case.x[1] // case.groups, case.k // case.groups
    small = y if not case.transposed else y.new_empty(case.x, device="meta")
    pixels = small.numel() // small.shape[1]
    return c * taps, k * taps, pixels, y.numel() // y.shape[1]


def compiled() -> bool:
    """Whether kernels run as compiled code, on a GPU or in the simulator, and not in Triton's interpreter."""
    from tconv.launching.arguments import INTERPRET

    return not INTERPRET


def tf32(dtype: torch.dtype) -> bool:
    """Whether products may be TF32's, whose factors keep 10 bits: in fp32, by compiled code, where torch's flag allows it."""
    return dtype == torch.float32 and compiled() and torch.backends.cudnn.conv.fp32_precision == "tf32"


def check(function, case: Case, x, w, b, eager=None, only=NAMES) -> None:
    """Asserts that function's output and gradients are right; optionally no worse than three times eager's error.

    Args:
        only: which of NAMES to compute and look at, "y" among them.
    """
    got = run(function, case, x, w, b, only=only)
    oracle = (TRANSPOSED if case.transposed else FORWARD)[case.rank]
    dy = upstream(got[0]).double()
    wide = [t.detach().double() for t in (x, w, b)]
    right = run(oracle, case, *wide, dy=dy, only=only)
    squares = run(oracle, case, *(t.square() for t in wide), dy=dy.square(), only=only)
    # In fp64 the oracle is eager itself. Where TF32 is allowed, cuDNN computes small layers in exact fp32 all the same.
    compared = eager and x.dtype != torch.float64 and not tf32(x.dtype)
    yardstick = run(eager, case, x, w, b, dy=dy, only=only) if compared else (None,) * len(only)
    eps_out = torch.finfo(x.dtype).eps
    # Products of fp16 and bf16 are exact in the fp32 accumulator.
    eps_acc = 2**-10 if tf32(x.dtype) else min(eps_out, torch.finfo(torch.float32).eps)
    most = dict(zip(NAMES, terms(case, got[0]), strict=True))
    for name, g, r, s, e in zip(only, got, right, squares, yardstick, strict=True):
        n = most[name]
        assert g.shape == r.shape, f"{name}: shape {tuple(g.shape)}, not {tuple(r.shape)}"
        assert g.dtype == x.dtype, f"{name}: {g.dtype}"
        error = (g.double() - r).abs()
        budget = eps_out / 2 * r.abs() + 4 * eps_acc * n**0.5 * s.abs().sqrt() + torch.finfo(x.dtype).tiny
        worst = (error / budget).max().item() if error.numel() else 0.0  # NaN compares false below
        assert worst <= 1, f"{name}: {worst:.3g} times the error budget, {case}"
        if e is not None:
            ours, theirs = error.norm(), (e.double() - r).norm()
            luck = eps_out * r.norm() + eps_acc * s.abs().sqrt().norm()  # eager's error may be 0: a rounding of result and sum
            assert ours <= 3 * theirs + luck, f"{name}: error {ours:.3g}, eager's is {theirs:.3g}"
