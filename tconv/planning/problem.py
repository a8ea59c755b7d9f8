"""The description of a convolution: extents and parameters, without layout, dtype or device. Standard library only.

Glossary, used everywhere below the public functions:

    N C K G     batch, input channels, output channels, groups
    D H W       input extents, as a tuple X; 1-D and 2-D problems have leading extents of one
    T R S       filter extents, as a tuple T
    Z P Q       output extents, as a tuple Y
    S P D       in ConvProblem: stride, padding, dilation
    x w y b     input, weight [K, C/G, T, R, S], output, bias; gradients dx dw dy db
    fprop       y from x and w
    dgrad       dx from dy and w; also the forward of a transposed convolution
    wgrad       dw from dy and x

A transposed layer is described by the convolution that it transposes. The layer's input is that problem's y and its output
is x, so C counts the layer's output channels and K its input channels. Its forward is the problem's dgrad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tconv.planning.device import Device
from tconv.planning.epilogue import NONE, Epilogue

Triple = tuple[int, int, int]
PASSES = ("fprop", "dgrad", "wgrad")
POLICIES = ("auto", "always", "tune")
MODES = ("zeros", "reflect", "replicate", "circular")  # what a read beyond x finds, as torch's padding_mode names it
ZEROS = ("zeros", "zeros", "zeros")
STATE = "state"  # what a stream finds before its chunk: the frames of its state, or zeros at its beginning
PREDICTED = "predicted"  # not one of the user's: plans by prediction alone, whatever was measured


def check_policy(function: str, policy: object) -> None:
    """Raises ValueError unless a policy is one of POLICIES. `function` is the name of the user's call, for the text."""
    if policy not in POLICIES:
        raise ValueError(f"{function}: policy must be one of {POLICIES}, got {policy!r}")


def lift(values: Sequence[int], fill: int) -> Triple:
    """Returns three numbers: `values`, with `fill` for the missing leading dimensions."""
    full = (fill,) * (3 - len(values)) + tuple(values)
    return full[0], full[1], full[2]


@dataclass(frozen=True)
class ConvProblem:
    """Extents and parameters of one convolution. Every tuple has three entries, one per dimension.

    Attributes:
        rank: spatial dimensions of the tensors, 1 to 3.
        N, C, K, G: batch, input channels, output channels, groups.
        X, Y, T: input, output and filter extents.
        S, P, D: stride, padding before the first element, dilation. The padding after the last element is implied by Y.
        borders: per dimension, what a read beyond x finds, one of MODES. "zeros" where nothing beyond x is read. STATE in the
            first dimension of a stream, which is time; P is then the length of the state.
    """

    rank: int
    N: int
    C: int
    K: int
    G: int
    X: Triple
    Y: Triple
    T: Triple
    S: Triple
    P: Triple
    D: Triple
    borders: tuple[str, str, str] = ZEROS

    def __post_init__(self) -> None:
        fields = (self.rank, self.N, self.C, self.K, self.G, self.X, self.Y, self.T, self.S, self.P, self.D, self.borders)
        object.__setattr__(self, "_hash", hash(fields))  # every call needs the hash, so it is computed once

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @property
    def bordered(self) -> bool:
        """True if reads beyond x find something other than zeros."""
        return self.borders != ZEROS

    @property
    def streamed(self) -> bool:
        """True if the problem is a chunk of a stream."""
        return STATE in self.borders

    @property
    def repeated(self) -> int:
        """The number of dimensions in which reads beyond x find x's own elements."""
        return sum(border not in ("zeros", STATE) for border in self.borders)

    @property
    def taps(self) -> int:
        return math.prod(self.T)

    @property
    def multiplier(self) -> int:
        """Output channels per group (depthwise: the channel multiplier)."""
        return self.K // self.G

    @property
    def depthwise(self) -> bool:
        """True if there is more than one group and each has one input channel."""
        return self.G > 1 and self.G == self.C

    def shape(self, which: str) -> tuple[int, ...]:
        """Returns the shape of "x", "y" or "w" as torch sees it, at the problem's rank."""
        skip = 3 - self.rank
        if which == "w":
            return (self.K, self.C // self.G, *self.T[skip:])
        return (self.N, self.C, *self.X[skip:]) if which == "x" else (self.N, self.K, *self.Y[skip:])

    def gemm(self, pass_: str) -> Triple:
        """Returns (GEMM_M, GEMM_N, GEMM_K) of one group's implicit GEMM, with taps that fall in the padding counted."""
        c, k = self.C // self.G, self.K // self.G
        if pass_ == "fprop":
            return self.N * math.prod(self.Y), k, c * self.taps
        if pass_ == "dgrad":
            return self.N * math.prod(self.X), c, k * self.taps
        return k, c * self.taps, self.N * math.prod(self.Y)

    def phases(self, pass_: str) -> int:
        """Returns the number of phases (sets of written pixels that use the same taps), for dgrad the product of strides."""
        return math.prod(self.S) if pass_ == "dgrad" else 1

    def __str__(self) -> str:
        skip = 3 - self.rank

        def times(v: Sequence[object]) -> str:
            return "x".join(map(str, v[skip:]))

        extras = "".join(
            f" {name} {times(v)}"
            for name, v, usual in (("stride", self.S, 1), ("padding", self.P, 0), ("dilation", self.D, 1))
            if any(a != usual for a in v)
        )
        groups = f" groups {self.G}" if self.G > 1 else ""
        borders = f" borders {times(self.borders)}" if self.bordered else ""
        found = f"N{self.N} C{self.C} {times(self.X)} -> K{self.K} {times(self.Y)}, filter {times(self.T)}"
        return f"{found}{extras}{groups}{borders}"


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the passes of one call share: the problem, the memory format of the results, and whether to launch anything.

    Launches are cached by the identity of this object, so an object must be used with one dtype on one device only.

    Attributes:
        problem: the convolution.
        channels_last: True if y, dx and dw are channels_last.
        dry: plan and record, but launch nothing (`explain`).
        device: the device that a dry call is planned for; None for the tensors' own device.
        dw_channels_last: True if dw is channels_last, where its format may differ from that of y and dx
            (launching/memory_format.py `weight_format`).
        policy: PREDICTED, or one of POLICIES, which says whether passes may be left to torch's kernel where that was measured
            to be faster: "auto" does, "always" never, and "tune" first measures what was not measured.
        epilogue: what the forward pass does with its result before it writes it.
        batch_invariant: True if an image's y and dx must not depend on what else is in the batch (`tconv.batch_invariant`).
    """

    problem: ConvProblem
    channels_last: bool
    dry: bool = False
    device: Device | None = None
    dw_channels_last: bool | None = None
    policy: str = "auto"
    epilogue: Epilogue = NONE
    batch_invariant: bool = False


def forward_problem(
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    mode: str = "zeros",
) -> ConvProblem:
    """Returns the problem of a batched convolution.

    Args:
        x: input shape, (N, C, *spatial).
        w: weight shape, (K, C/G, *taps).
        stride, dilation: one number per spatial dimension.
        padding: (before, after) per spatial dimension.
        groups: number of groups.
        mode: what the padding repeats, one of MODES.
    Returns:
        The problem, with Y = (X + before + after - D*(T - 1) - 1) // S + 1. Y is not positive if the filter does not fit.
    """
    rank = len(x) - 2
    y = [(x[2 + i] + sum(padding[i]) - dilation[i] * (w[2 + i] - 1) - 1) // stride[i] + 1 for i in range(rank)]
    borders = ["zeros"] * 3
    for i in range(rank) if mode != "zeros" else ():
        last = (y[i] - 1) * stride[i] + dilation[i] * (w[2 + i] - 1) - padding[i][0]  # the last coordinate that is read
        if padding[i][0] > 0 or last >= x[2 + i]:
            borders[3 - rank + i] = mode
    return ConvProblem(
        rank, x[0], x[1], w[0], groups, lift(x[2:], 1), lift(y, 1), lift(w[2:], 1),
        _useful(stride, x[2:], y), lift([p[0] for p in padding], 0), lift(dilation, 1), (borders[0], borders[1], borders[2]),
    )  # fmt: skip


def transposed_problem(
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """Returns the problem whose dgrad computes a batched transposed convolution of x.

    Args:
        x: the transposed layer's input shape, (N, C_in, *spatial).
        w: its weight shape, (C_in, C_out/G, *taps).
        stride, padding, output_padding, dilation: one number per spatial dimension.
        groups: number of groups.
    Returns:
        The problem, with X = (in - 1)*S - 2*P + D*(T - 1) + output_padding + 1.
    """
    rank = len(x) - 2
    out = [
        (x[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (w[2 + i] - 1) + output_padding[i] + 1 for i in range(rank)
    ]
    return ConvProblem(
        rank, x[0], w[1] * groups, w[0], groups, lift(out, 1), lift(x[2:], 1), lift(w[2:], 1),
        _useful(stride, out, x[2:]), lift(padding, 0), lift(dilation, 1),
    )  # fmt: skip


def _useful(stride: Sequence[int], x: Sequence[int], y: Sequence[int]) -> Triple:
    """Returns the strides, lifted to three. Where there is a single output, the stride is limited to the input's extent.

    With one output any stride gives the same result, but dgrad has as many phases as the stride.
    """
    return lift([s if n > 1 else max(1, min(s, e)) for s, e, n in zip(stride, x, y, strict=True)], 1)


def pow2(n: int, low: int, high: int) -> int:
    """Returns the smallest power of two that is at least n, clamped to [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)
