"""Rewrites a problem, exactly, into one with fewer dimensions or more channels, by viewing the same memory with other strides.

    fold    patches that do not overlap (filter == stride, or one filter covers the input): taps become channels,
            (t, c) -> t*C + c
    slice   dgrad with one output along a dimension: a longer stride, so that each written pixel there uses one tap
    spread  patches that do not overlap, where taps are contiguous and channels are not: taps become the channels, and the
            channels become taps of another dimension
    merge   two dimensions, the inner one pointwise, become one: T' = T, D' = D*X, P' = P*X, where X is the inner extent
    batch   a pointwise outermost dimension becomes part of the batch
    swap    wgrad with few output channels: x and dy change places, so that GEMM_N is few channels times taps, and x is read
            once for several taps

Nothing is copied. A rule takes a problem and the strides of x, w and y, and returns others. It preserves every product
x[i]*w[j] that is added into y[k] (tests/test_simplify.py enumerates them). That is enough for fprop and wgrad; dgrad also
needs the rewritten x to cover all of x. Standard library only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tconv.planning.problem import ConvProblem, Triple

PHASE = 128  # the fewest pixels in a phase that are worth separate programs
FEW = 32  # up to so many channels per group count as few
FAR = 2**30  # no rule makes coordinates larger than this: kernels compute them in 32 bits


@dataclass(frozen=True)
class Strides:
    """A tensor's strides in elements, lifted to three spatial dimensions. The stride of an extent of one is zero.

    Attributes:
        outer: stride of the batch, for a weight that of the output channels.
        channel: stride of the channels, for a weight that of the input channels.
        spatial: strides of the three spatial dimensions.
    """

    outer: int
    channel: int
    spatial: Triple


@dataclass(frozen=True)
class Form:
    """A problem, the strides of its tensors, and the names of the rules applied so far."""

    p: ConvProblem
    x: Strides
    w: Strides
    y: Strides
    rules: tuple[str, ...] = ()


Entry = TypeVar("Entry")
Rule = Callable[[Form, int, str], Form | None]


def simplify(form: Form, pass_: str, channels_stay: bool = False, batch_invariant: bool = False) -> Form:
    """Returns the form after applying rules until none applies. `rules` of the result lists them in order.

    Args:
        form: the form to rewrite.
        pass_: "fprop", "dgrad" or "wgrad".
        channels_stay: True if x's channels must not change: a transposed forward adds a bias to them.
        batch_invariant: decide as for one image which taps become channels and how long strides are, which the order of an
            element's products depends on. Only then the rule "batch", which no order depends on, sees the real batch.
    """
    rules: list[tuple[str, Rule]] = [
        ("fold", _fold), ("slice", _slice), ("merge", _merge), ("batch", _batch), ("spread", _spread), ("swap", _swap),
    ]  # fmt: skip
    if channels_stay:
        rules = [(name, rule) for name, rule in rules if name in ("slice", "merge", "batch")]
    if batch_invariant:
        batch = form.p.N
        form = _applied([rule for rule in rules if rule[0] != "batch"], _of_images(form, 1), pass_)
        form = _of_images(form, batch)
        if batch > 1:  # the pixels of a single image are read in vectors where those of several would be
            form = _applied([("batch", _batch)], form, pass_)
    else:
        form = _applied(rules, form, pass_)
    return _shifted(form) if form.rules else form


def _applied(rules: list[tuple[str, Rule]], form: Form, pass_: str) -> Form:
    """Returns the form after applying these rules until none applies."""
    while True:
        found = ((name, rule(form, d, pass_)) for name, rule in rules for d in (2, 1, 0))
        step = next(((name, after) for name, after in found if after), None)
        if step is None:
            return form
        form = dataclasses.replace(step[1], rules=(*form.rules, step[0]))


def _of_images(form: Form, images: int) -> Form:
    """Returns the form with so many images."""
    return dataclasses.replace(form, p=dataclasses.replace(form.p, N=images))


def _tiled(p: ConvProblem, d: int, pass_: str) -> bool:
    """Returns True if the filter's positions cut dimension d into pieces of T of its elements that do not overlap.

    For dgrad the pieces must also cover the dimension exactly, because dgrad writes all of x.
    """
    apart = p.T[d] > 1 and p.P[d] == 0 and p.D[d] == 1 and (p.S[d] == p.T[d] or p.Y[d] == 1)
    return apart and p.Y[d] * p.T[d] <= p.X[d] and (pass_ != "dgrad" or p.X[d] == p.Y[d] * p.T[d])


def all_tiled(p: ConvProblem) -> bool:
    """Returns True if the filter's positions cut x into pieces that cover it without overlapping, of more than one element."""
    return p.taps > 1 and all(_pointwise(p, d) or _tiled(p, d, "dgrad") for d in range(3))


def _pointwise(p: ConvProblem, d: int) -> bool:
    """Returns True if the convolution leaves dimension d alone: one tap, stride one, no padding."""
    return p.T[d] == 1 and p.S[d] == 1 and p.P[d] == 0 and p.X[d] == p.Y[d]


def _trivial(p: ConvProblem, d: int) -> bool:
    """Returns True if dimension d has one element, one output, one tap and no padding."""
    return p.X[d] == 1 and p.Y[d] == 1 and p.T[d] == 1 and p.P[d] == 0


def _fold(f: Form, d: int, pass_: str) -> Form | None:
    p, taps = f.p, f.p.T[d]
    if p.G > 1 or not _tiled(p, d, pass_):
        return None
    sx, sw = f.x.spatial[d], f.w.spatial[d]
    if p.C == 1 or (sx == p.C * f.x.channel and sw == p.C * f.w.channel):
        cx, cw = (sx, sw) if p.C == 1 else (f.x.channel, f.w.channel)
    elif f.x.channel == taps * sx and f.w.channel == taps * sw:
        cx, cw = sx, sw
    else:
        return None
    return Form(
        _tapless(p, d, C=p.C * taps),
        Strides(f.x.outer, cx, _put(f.x.spatial, d, taps * sx if p.Y[d] > 1 else 0)),
        Strides(f.w.outer, cw, _put(f.w.spatial, d, 0)),
        f.y,
    )


def _slice(f: Form, d: int, pass_: str) -> Form | None:
    """Lengthens the stride of a dgrad with one output along dimension d, which does not change the result.

    With the longer stride a phase has at most one tap. Without it a pixel walks several, of which at most one reads the output.
    """
    p = f.p
    rest = p.N * math.prod(x for e, x in enumerate(p.X) if e != d)
    if pass_ != "dgrad" or p.Y[d] > 1 or p.S[d] // math.gcd(p.S[d], p.D[d]) >= p.T[d] or rest < PHASE:
        return None
    stride = next(s for s in itertools.count(p.X[d]) if s // math.gcd(s, p.D[d]) >= p.T[d])
    if (p.depthwise and d == 2) or stride > 2 * p.X[d]:  # strip kernels handle all column phases; too many phases
        return None
    return dataclasses.replace(f, p=dataclasses.replace(p, S=_put(p.S, d, stride)))


def _spread(f: Form, d: int, pass_: str) -> Form | None:
    p, taps = f.p, f.p.T[d]
    free = next((e for e in (2, 1, 0) if _trivial(p, e)), None)
    if p.G > 1 or not _tiled(p, d, pass_) or free is None or not 1 < p.C < taps or f.x.spatial[d] != 1:
        return None
    # The channels become a dimension with one output, where any stride gives the same result. With a stride of p.C each phase
    # of a dgrad has one tap.
    q = _tapless(p, d, C=taps)
    q = dataclasses.replace(q, X=_put(q.X, free, p.C), T=_put(q.T, free, p.C), S=_put(q.S, free, p.C))
    window = taps * f.x.spatial[d] if p.Y[d] > 1 else 0
    return Form(
        q,
        Strides(f.x.outer, f.x.spatial[d], _put(_put(f.x.spatial, d, window), free, f.x.channel)),
        Strides(f.w.outer, f.w.spatial[d], _put(_put(f.w.spatial, d, 0), free, f.w.channel)),
        f.y,
    )


def _merge(f: Form, d: int, pass_: str) -> Form | None:
    """Merges dimension d into the next outer one."""
    p, a = f.p, d - 1
    if d == 0 or _trivial(p, a) or _trivial(p, d) or not _pointwise(p, d) or p.S[a] != 1 or p.borders[a] != "zeros":
        return None
    if p.depthwise and p.T[a] > 1:  # strip kernels need neighbouring columns, not taps a row apart
        return None
    n = p.X[d]
    chained = all(
        t.spatial[a] == n * t.spatial[d] or extent == 1 for t, extent in ((f.x, p.X[a]), (f.y, p.Y[a]))
    )  # fmt: skip
    if not chained or n * (max(p.X[a], p.Y[a]) + 2 * p.P[a] + p.D[a] * p.T[a]) > FAR:
        return None
    q = dataclasses.replace(
        p, X=_put(_put(p.X, a, p.X[a] * n), d, 1), Y=_put(_put(p.Y, a, p.Y[a] * n), d, 1),
        P=_put(p.P, a, p.P[a] * n), D=_put(p.D, a, p.D[a] * n if p.T[a] > 1 else 1),
    )  # fmt: skip
    x, y = (
        dataclasses.replace(t, spatial=_put(_put(t.spatial, a, t.spatial[d]), d, 0)) for t in (f.x, f.y)
    )  # fmt: skip
    return Form(q, x, f.w, y)


def _batch(f: Form, d: int, pass_: str) -> Form | None:
    p, n = f.p, f.p.X[d]
    if _trivial(p, d) or not _pointwise(p, d) or not all(_trivial(p, e) for e in range(d)) or p.N * n > FAR:
        return None
    if p.N > 1 and not all(t.outer == n * t.spatial[d] for t in (f.x, f.y)):
        return None
    q = dataclasses.replace(p, N=p.N * n, X=_put(p.X, d, 1), Y=_put(p.Y, d, 1))
    x, y = (Strides(t.spatial[d], t.channel, _put(t.spatial, d, 0)) for t in (f.x, f.y))
    return Form(q, x, f.w, y)


def _swap(f: Form, d: int, pass_: str) -> Form | None:
    """Exchanges x and dy of a wgrad. At unit stride, i = j - P + t*D is the same as j = i + P - t*D.

    The swapped kernel multiplies every pixel of x, by zero where no dy belongs to it. The rule does not apply if some pixel
    of x is used by no tap: that pixel may be infinite, and infinity times zero is NaN.
    """
    p = f.p
    few = p.K <= FEW and 2 * p.K <= p.C
    if pass_ != "wgrad" or p.G > 1 or p.taps == 1 or max(p.S) > 1 or not few or p.bordered:
        return None
    for x, y, t, before, dilation in zip(p.X, p.Y, p.T, p.P, p.D, strict=True):
        gaps = t > 1 and y < dilation
        if gaps or before < 0 or y + (t - 1) * dilation - before < x:
            return None
    q = dataclasses.replace(p, C=p.K, K=p.C, X=p.Y, Y=p.X, P=_negative(p.P), D=_negative(p.D))
    return Form(q, f.y, Strides(f.w.channel, f.w.outer, f.w.spatial), f.x)


def _negative(v: Triple) -> Triple:
    return -v[0], -v[1], -v[2]


def _tapless(p: ConvProblem, d: int, C: int) -> ConvProblem:
    """Returns the problem with C channels where dimension d has one element per output, and one tap."""
    return dataclasses.replace(p, C=C, X=_put(p.X, d, p.Y[d]), T=_put(p.T, d, 1), S=_put(p.S, d, 1))


def _shifted(f: Form) -> Form:
    """Moves trivial dimensions outermost and sets the rank to the number of the others, at least one."""
    kept = [d for d in range(3) if not _trivial(f.p, d)]
    order = [d for d in range(3) if d not in kept] + kept

    def moved(v: tuple[Entry, Entry, Entry]) -> tuple[Entry, Entry, Entry]:
        return v[order[0]], v[order[1]], v[order[2]]

    p = f.p
    q = dataclasses.replace(
        p, rank=max(1, len(kept)), X=moved(p.X), Y=moved(p.Y), T=moved(p.T), S=moved(p.S), P=moved(p.P), D=moved(p.D),
        borders=moved(p.borders),
    )  # fmt: skip
    x, w, y = (dataclasses.replace(t, spatial=moved(t.spatial)) for t in (f.x, f.w, f.y))
    return Form(q, x, w, y, f.rules)


def _put(v: Triple, d: int, value: int) -> Triple:
    """Returns v with entry d replaced."""
    out = list(v)
    out[d] = value
    return out[0], out[1], out[2]
