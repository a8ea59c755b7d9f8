"""Launches kernels/causal.py: causal depthwise convolutions of sequences, their gradients, and the decode step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from tconv.kernels import causal as kernels
from tconv.kernels.common import integers as integers_of
from tconv.launching import profiling
from tconv.launching.arguments import Prepared, accumulator, numerics, options
from tconv.launching.cache import BoundedCache
from tconv.launching.compiled import run
from tconv.launching.dry_run import DRY
from tconv.launching.launch import collect, device_of
from tconv.launching.memory_format import addressing, has_contiguous_channels, like_sequences, reach
from tconv.launching.record import Call, record_call
from tconv.planning.addressing import LIMIT, Lanes, vector
from tconv.planning.causal import choose_causal, choose_step, split, strips
from tconv.planning.device import Device
from tconv.planning.plan import Plan
from tconv.planning.problem import ConvProblem, forward_problem, pow2
from tconv.planning.tiles import Tile

MaybeTensor = torch.Tensor | None
_prepared: BoundedCache[Any, Prepared] = BoundedCache()


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """The arguments of a causal convolution.

    Attributes:
        x: [N, C, L].
        w: [C, T].
        b: [C] or None.
        state: [sequences, C, T - 1], or None for zeros.
        index: [N, L], contiguous: the sequence that each time belongs to; None if each image is a sequence.
        starts: [sequences + 1]: the first time of each sequence and the end; None if there are neither states nor next ones, or
            if each image is a sequence.
        activation: of planning/epilogue.py, or empty.
    """

    x: torch.Tensor
    w: torch.Tensor
    b: MaybeTensor
    state: MaybeTensor
    index: MaybeTensor
    starts: MaybeTensor
    activation: str

    @property
    def count(self) -> int:
        """The number of sequences that have a state."""
        return self.x.shape[0] if self.starts is None else self.starts.shape[0] - 1

    @property
    def problem(self) -> ConvProblem:
        (channels, taps) = self.w.shape
        return forward_problem(self.x.shape, (channels, 1, taps), (1,), [(taps - 1, 0)], (1,), channels)


def forward(s: Sequences, with_next: bool) -> tuple[torch.Tensor, MaybeTensor]:
    """Returns y [N, C, L], and if `with_next` the next state of each sequence [sequences, C, T - 1], in one launch.

    Both lie in memory as x does: with contiguous channels if x's are, else with contiguous times.
    """
    x, y = s.x, like_sequences(s.x, s.x.shape)
    after = like_sequences(x, (s.count, x.shape[1], s.w.shape[1] - 1)) if with_next else None

    def make(device: Device) -> Prepared:
        (images, channels, times), lanes = x.shape, _lanes(x, y)
        tile = choose_causal(lanes, x.itemsize, images, channels, times, device)
        tiles = math.ceil(strips(tile, images, times) / tile.m) * math.ceil(channels / tile.n)
        tails = s.count * math.ceil(channels / tile.n) if with_next else 0
        integers = {"tiles": tiles, **_extents(s), **_strides(s), **_triple("sy", y), **_triple("sn", after)}
        constants = {
            "STATE": s.state is not None, "NEXT": with_next, "INDEXED": s.index is not None, "HAS_BIAS": s.b is not None,
            "ACTIVATION": s.activation, **_window(s), **_access(lanes, tile, x, y, s.state, after),
        }  # fmt: skip
        return _launch(kernels.causal, "fprop", s, tile, 1, tiles + tails, integers, constants)

    _run(("fprop", with_next), s, (), make, (x, s.w, s.b, s.state, s.index, s.starts, y, after))
    return y, after


def weight_gradients(s: Sequences, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (du, dw, db): the gradients of the activation's argument, of w and of the bias, the latter two in fp32 or fp64.

    Without an activation du is dy. The sums over images and times are split, and the parts added in a fixed order.
    """
    x, wide = s.x, accumulator(s.x.dtype)
    (images, channels, times), taps = x.shape, s.w.shape[1]

    def make(device: Device) -> Prepared:
        lanes = _lanes(x, dy)
        tile = choose_causal(lanes, x.itemsize, images, channels, times, device, sums=True)
        parts, chunk = split(tile, images, channels, times, device)
        integers = {"chunk": chunk, **_extents(s), **_strides(s), **_triple("sy", dy)}
        constants = {
            "STATE": s.state is not None, "INDEXED": s.index is not None, "HAS_BIAS": s.b is not None,
            "ACTIVATION": s.activation, **_window(s), **_access(lanes, tile, x, dy, s.state),
        }  # fmt: skip
        return _launch(kernels.causal_wgrad, "wgrad", s, tile, parts, parts * math.ceil(channels / tile.n), integers, constants)

    read = x, s.w, s.b, s.state, s.index, s.starts, dy
    launch = _lookup(("wgrad",), s, (dy,), make, (*_dtypes(s, read), dy.dtype, wide))
    assert launch.call.plan is not None
    du = torch.empty_strided(dy.shape, dy.stride(), dtype=dy.dtype, device=dy.device) if s.activation else dy
    sums = x.new_empty((launch.call.plan.splits, taps + 1, channels), dtype=wide)
    _launched(launch, s, (*read, du, sums))
    total = sums.sum(0)
    return du, total[:taps].t(), total[taps]


def input_gradients(s: Sequences, du: torch.Tensor, dnext: MaybeTensor, of_state: bool) -> tuple[torch.Tensor, MaybeTensor]:
    """Returns the gradients of x and, if `of_state`, of the states, from du and that of the next states."""
    x, dx = s.x, like_sequences(s.x, s.x.shape)
    dstate = like_sequences(x, (s.count, x.shape[1], s.w.shape[1] - 1)) if of_state else None

    def make(device: Device) -> Prepared:
        (images, channels, times), lanes = x.shape, _lanes(du, dx)
        tile = choose_causal(lanes, x.itemsize, images, channels, times, device)
        tiles = math.ceil(strips(tile, images, times) / tile.m) * math.ceil(channels / tile.n)
        tails = s.count * math.ceil(channels / tile.n) if of_state else 0
        integers = {
            "tiles": tiles, **_extents(s), **_strides(s), **_triple("sy", du), **_triple("sx", dx), **_triple("ss", dstate),
            **_triple("sn", dnext),
        }  # fmt: skip
        constants = {
            "DSTATE": of_state, "DNEXT": dnext is not None, "INDEXED": s.index is not None, **_window(s),
            **_access(lanes, tile, du, dx, dstate, dnext),
        }  # fmt: skip
        return _launch(kernels.causal_dgrad, "dgrad", s, tile, 1, tiles + tails, integers, constants)

    _run(("dgrad", of_state), s, (du, dnext), make, (du, s.w, s.index, s.starts, dnext, dx, dstate))
    return dx, dstate


def step(s: Sequences, seen: MaybeTensor, slots: MaybeTensor) -> torch.Tensor:
    """Returns y [N, C, L], and changes the states s.state [slots, C, H] in place (kernels/causal.py `causal_step`)."""
    x, state, y = s.x, s.state, like_sequences(s.x, s.x.shape)
    assert state is not None

    def make(device: Device) -> Prepared:
        tile, held = choose_step(x.shape[1], device), state.shape[2]
        a, b, c = addressing(x), addressing(y), addressing(state)
        channels = x.shape[1]
        integers = {"L": x.shape[2], "H": held, **_extents(s), **_strides(s), **_triple("sy", y)}
        constants = {
            "T": s.w.shape[1], "SEEN": seen is not None, "SLOTS": slots is not None, "HAS_BIAS": s.b is not None,
            "ACTIVATION": s.activation, "X_UNIT": a.unit, "X_VEC": min(a.wide(channels), b.wide(channels)), "S_UNIT": c.unit,
            "S_VEC": c.wide(channels), "WIDE": max(reach(x), reach(y), reach(state)) > LIMIT,
            "WINDOW": pow2(held, 1, 1 << 16), "BLOCK_C": tile.n, **numerics(x.dtype), **options(tile),
        }  # fmt: skip
        programs = x.shape[0] * math.ceil(channels / tile.n)
        return _launch(kernels.causal_step, "fprop", s, tile, 1, programs, integers, constants)

    _run(("step",), s, (seen, slots), make, (x, s.w, s.b, y, state, seen, slots))
    return y


def laid_out(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns t as the kernels read it beside x, a tensor that lies in memory as x does: itself, or a copy.

    One whose elements share memory, as the gradient of a sum's argument does, is copied, since another is written like it.
    """
    same = (t.stride(1) == 1) if has_contiguous_channels(x) else (t.stride(2) == 1)
    return t if same and apart(t) else like_sequences(x, tuple(t.shape)).copy_(t)


def apart(t: torch.Tensor) -> bool:
    """Returns True if each element has memory of its own: every stride steps over all that the smaller ones reach."""
    reached = 0
    for stride, extent in sorted(pair for pair in zip(t.stride(), t.shape, strict=True) if pair[1] > 1):
        if stride <= reached:
            return False
        reached += stride * (extent - 1)
    return True


def _lanes(a: torch.Tensor, b: torch.Tensor) -> Lanes:
    """Returns how two tensors [N, C, L] can both be accessed as vectors."""
    channels, extents = a.shape[1], (1, 1, a.shape[2])
    one, other = addressing(a).lanes(channels, extents), addressing(b).lanes(channels, extents)
    return Lanes(one.unit, min(one.vec, other.vec)) if one.unit == other.unit else Lanes("", 1)


def _triple(name: str, t: MaybeTensor) -> dict[str, int]:
    """Returns a tensor's strides as a kernel's integers. A dimension of extent one may have any, and gets zero."""
    found = (0, 0, 0) if t is None else tuple(s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True))
    return dict(zip((name + d for d in "nct"), found, strict=True))


def _extents(s: Sequences) -> dict[str, int]:
    n, c, times = s.x.shape
    return {"N": n, "C": c, "L": times, "sequences": s.count}


def _strides(s: Sequences) -> dict[str, int]:
    swc, swt = s.w.stride()
    found = {"swc": swc, "swt": swt, "sb": 1 if s.b is None else s.b.stride(0)}
    return found | _triple("sx", s.x) | _triple("ss", s.state)


def _window(s: Sequences) -> dict[str, Any]:
    """Returns the constants of the taps, and of how they and the states are accessed."""
    taps, w, channels = s.w.shape[1], s.w, s.x.shape[1]
    width = pow2(taps, 1, 1 << 16)
    along = taps == 1 or w.stride(1) == 1
    aligned = vector(w.data_ptr(), w.element_size(), w.stride(0) if channels > 1 else 0)
    state = None if s.state is None else addressing(s.state)
    return {
        "T": taps, "WINDOW": pow2(taps - 1, 1, 1 << 16), "WIDTH": width, "W_VEC": min(aligned, width) if along else 0,
        "S_UNIT": state is not None and state.unit, "S_VEC": 1 if state is None else state.wide(channels),
    }  # fmt: skip


def _access(lanes: Lanes, tile: Tile, *tensors: MaybeTensor) -> dict[str, Any]:
    """Returns the constants of how a kernel accesses tensors, the first of which is [N, C, L]."""
    x = tensors[0]
    assert x is not None
    far = max(reach(t) for t in tensors if t is not None) + tile.m * tile.columns
    return {
        "UNIT": lanes.unit, "VEC": lanes.vec, "READ": tile.columns if lanes.unit == "p" else 1, "WIDE": far > LIMIT,
        "FLIP": lanes.unit != "c", "COLUMNS": tile.columns, "BLOCK_M": tile.m, "BLOCK_C": tile.n, **numerics(x.dtype),
        **options(tile),
    }  # fmt: skip


def _launch(
    kernel: Any,
    pass_: str,
    s: Sequences,
    tile: Tile,
    parts: int,
    programs: int,
    integers: dict[str, int],
    constants: dict[str, Any],
) -> Prepared:
    """Returns a launch without the dtypes of its pointers."""
    what = [s.activation, "a state" if s.state is not None else "", "several sequences" if s.index is not None else ""]
    reason = ", ".join(["causal and depthwise", *filter(None, what)])
    plan = Plan(pass_, kernel.__name__, tile, parts, reason)
    values = tuple(integers[name] for name in integers_of(kernel))
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names or k in options(tile)}
    call = Call(pass_, s.problem, plan, reason)
    return Prepared(kernel, (programs,), values, constants, call, s.x.shape, s.x.stride(), s.x.dtype)


def _dtypes(s: Sequences, pointers: tuple[MaybeTensor, ...]) -> tuple[torch.dtype, ...]:
    return tuple(s.x.dtype if t is None else t.dtype for t in pointers)


def _run(
    what: tuple[Any, ...],
    s: Sequences,
    more: tuple[MaybeTensor, ...],
    make: Callable[[Device], Prepared],
    pointers: tuple[MaybeTensor, ...],
) -> None:
    """Looks a launch up and runs it; see `_lookup` and `_launched`."""
    _launched(_lookup(what, s, more, make, _dtypes(s, pointers)), s, pointers)


def _lookup(
    what: tuple[Any, ...],
    s: Sequences,
    more: tuple[MaybeTensor, ...],
    make: Callable[[Device], Prepared],
    dtypes: tuple[torch.dtype, ...],
) -> Prepared:
    """Returns a launch, which `make` prepares for a device once per kind of call.

    Args:
        what: tells launches of the same tensors apart.
        more: the tensors that decide the launch, beside those of s.
        dtypes: those behind the kernel's pointers.
    """
    dry, tensors = DRY.get(), (s.x, s.w, s.b, s.state, s.index, s.starts, *more)
    described = tuple(t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)
    key = (*what, s.activation, described, s.x.device)
    launch = None if dry else _prepared.get(key)
    if launch is None:
        device = dry.device if dry and dry.device else device_of(s.x)
        launch = dataclasses.replace(make(device), pointers=dtypes)
        if not dry:
            _prepared[key] = launch
    return launch


def _launched(launch: Prepared, s: Sequences, pointers: tuple[MaybeTensor, ...]) -> None:
    """Runs a launch, unless this is a dry run, and records the call.

    Args:
        pointers: a tensor for each of the kernel's pointers; None for one that it does not read.
    """
    if DRY.get() is not None:
        collect([launch])
    else:
        event = profiling.begin_launch(launch.call) if profiler._is_profiler_enabled else None
        try:
            run(launch, tuple(s.x if t is None else t for t in pointers))
        finally:
            if event is not None:
                profiling.end(event)
    record_call(launch.call)
