"""A plan's kernel on a smaller problem, in the simulator.

It has fewer images, pixels, groups and channels, but the same compiled code, the same tile, and the same tails of tiles. Copies
of operands and the sum of splits are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

import simulator
from simulator.counters import Counts
from tconv.launching.arguments import Prepared, tensor_cores
from tconv.launching.compiled import run_once
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.prepare import PADDED, PATCH, prepare_pass
from tconv.planning.addressing import aligned_channels
from tconv.planning.cost import Cost, Work
from tconv.planning.device import Device
from tconv.planning.families import FAMILIES
from tconv.planning.operands import GatherPass, Pass, PatchPass, WgradPass
from tconv.planning.plan import Plan, force
from tconv.planning.problem import ConvProblem

OPERANDS = {"fprop": ("x", "w", "y"), "dgrad": ("dy", "w", "dx"), "wgrad": ("dy", "x", "dw")}  # the last one is the result
BOX = ("BN", "B0", "B1", "B2")  # constants that follow the problem's extents, in kernels that are otherwise the same
PIXELS = 512  # of a smaller problem's output, at least: several tiles
MOST = 2  # splits of a smaller problem


@dataclass(frozen=True)
class Launch:
    """A plan's launch on a problem, and what the cost model says of it.

    Attributes:
        prepared: the launch.
        tensors: of the kernel's pointers, without storage.
        work, cost: the model's counts.
        length: the model's length of the main loop, without what `work` adds for loads that are waited for.
    """

    prepared: Prepared
    tensors: tuple[torch.Tensor, ...]
    work: Work
    cost: Cost
    length: float

    @property
    def constants(self) -> dict[str, Any]:
        """What makes it another compiled kernel."""
        return {k: v for k, v in self.prepared.constants.items() if k not in BOX}

    def count(self) -> Counts:
        """Runs it in the simulator, on zeros, and returns what it did. Races are not looked for."""
        tensors = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_() for t in self.tensors}
        with simulator.checking(simulator.Options(races=False)), simulator.profile() as counts:
            run_once(self.prepared, tuple(tensors[id(t)] for t in self.tensors))
        (found,) = counts.launches
        return found


def planned(p: ConvProblem, plan: Plan, splits: int, channels_last: bool, dtype: torch.dtype, device: Device) -> Launch:
    """Returns the launch of a plan's kernel, tile and precision on a problem.

    Raises:
        ValueError: the plan cannot run there.
    """
    pass_, family = plan.pass_, FAMILIES[plan.kernel]
    tensors = [shaped(p.shape(n.removeprefix("d")), channels_last or n in plan.staged, dtype) for n in OPERANDS[pass_]]
    first, second, third = map(addressing, tensors)
    c: Pass
    if pass_ == "wgrad":
        c = WgradPass(p, second, third, first, tensor_cores(dtype))
    elif plan.kernel == PATCH:
        c = PatchPass(p, first, second, third, tensor_cores(dtype))
    else:
        c = GatherPass(pass_, p, first, second, third, tensor_cores(dtype))
    with force(plan.kernel, plan.tile, splits):
        prepared = prepare_pass(c, p, tensors[2], device, plan.kernel, plan.precision)
    cost = prepared.call.plan.cost if prepared.call.plan else None
    assert cost is not None
    access = family.access(c.operands(), c.p, pass_, plan.tile, plan.precision)
    work = family.work(c.p, pass_, plan.tile, splits, access, device)
    pointers = tensors[:2][:: -1 if prepared.swapped else 1]
    pointers += [] if pass_ == "wgrad" else [tensors[0]]  # in place of a bias, which is not read
    if splits > 1:
        pointers.append(torch.empty(splits * tensors[2].numel(), dtype=prepared.pointers[-1], device="meta"))
    else:
        pointers.append(tensors[2])
    return Launch(prepared, tuple(pointers), work, cost, family.length(c.p, pass_, plan.tile, access))


def smaller(
    p: ConvProblem, plan: Plan, channels_last: bool, dtype: torch.dtype, device: Device
) -> tuple[ConvProblem, Launch, Launch]:
    """Returns a smaller problem whose plan is the same compiled kernel, its launch, and the launch of the whole problem.

    Raises:
        ValueError: there is none.
    """
    p = as_computed(p, plan, dtype)
    whole = planned(p, plan, plan.splits, channels_last, dtype, device)
    for scale, row, images in itertools.product((1, 2, 4, 8), (False, True), dict.fromkeys((0, p.N))):
        q = shrunk(p, scale, row, images)
        try:
            part = planned(q, plan, min(plan.splits, MOST), channels_last, dtype, device)
        except ValueError:
            continue
        if part.constants == whole.constants:
            return q, part, whole
    raise ValueError(f"no smaller problem has this plan: {plan}")


def as_computed(p: ConvProblem, plan: Plan, dtype: torch.dtype) -> ConvProblem:
    """Returns the problem with the channels that the kernel sees, more than there are where the copies of a plan are padded."""
    if not plan.reason.startswith(PADDED):
        return p
    given = {"fprop": "C", "dgrad": "K"}
    names = [given[plan.pass_]] if plan.pass_ in given else [{"x": "C", "dy": "K"}[name] for name in plan.staged]
    return dataclasses.replace(p, **{name: aligned_channels(getattr(p, name), dtype.itemsize) for name in names})


def shrunk(p: ConvProblem, scale: int, row: bool, images: int) -> ConvProblem:
    """Returns a problem with fewer channels, groups, pixels and images, and the same remainders of them.

    Args:
        scale: how many times larger than the smallest.
        row: whether the last dimension keeps its extent, along which boxes may lie.
        images: how many to keep; 0 for as many as make PIXELS pixels.
    """
    unit = scale * {1: 256, 2: 16, 3: 8}[p.rank]
    y0, y1, y2 = (_kept(n, unit) for n in p.Y)
    y = y0, y1, p.Y[2] if row else y2
    x0, x1, x2 = (e - s * (n - m) for e, s, n, m in zip(p.X, p.S, p.Y, y, strict=True))
    c, k = (_kept(n // p.G, 256) for n in (p.C, p.K))
    groups = _kept(p.G, scale * (64 if p.depthwise else max(2, 128 // max(c, k))))
    n = images or min(p.N, math.ceil(scale * PIXELS / math.prod(y)))
    return dataclasses.replace(p, N=n, C=groups * c, K=groups * k, G=groups, X=(x0, x1, x2), Y=y)


def _kept(n: int, unit: int) -> int:
    return n if n < 2 * unit else unit + n % unit
