"""Checks on a device that a mechanism gives right results there, before the planner may choose it.

The plain kernels need nothing but loads, stores and tl.dot. TMA, specialised warps and BF16X6 rely on more: tensor descriptors
that the driver encodes, barriers, warps that part, the order of pieces. Dependent launches rely on a wait on the device. The
first time such a plan would be chosen on a device, a small fixed convolution runs through it and through plain kernels, every
pass that it computes, from results that hold NaN; for dependent launches, a chain of sums whose first is slow. Up to nine
small kernels are compiled for that if Triton's cache has none. Agreement is kept on disk for that GPU, driver, torch, Triton
and these kernels (tconv/records); disagreement, too, which bars the mechanism with one warning. This shows that the mechanism
works, on one tile of one rank; that the kernels do, the tests show.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tconv.launching.arguments import Prepared, sum_of
from tconv.launching.compiled import capturing, lasting, run_once
from tconv.launching.dry_run import DRY
from tconv.launching.memory_format import addressing
from tconv.launching.prepare import prepare_pass
from tconv.launching.record import Call
from tconv.planning.device import DEPENDENT, INTERPRETER, Device
from tconv.planning.operands import GatherPass, Pass, WgradPass
from tconv.planning.persistent import SPECIALISED
from tconv.planning.plan import Forced, forced, given
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import BF16X6, Tile
from tconv.records.book import book, mechanism_line
from tconv.records.key import machine

PROBLEM = forward_problem((2, 64, 9, 9), (64, 64, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
PLAIN = {"fprop": "gather", "dgrad": "gather", "wgrad": "wgrad"}
KERNELS = {  # by mechanism, the kernel of each pass that relies on it
    "tma": {"fprop": "tma", "dgrad": "tma", "wgrad": "tma_wgrad"},
    SPECIALISED: {"fprop": "persistent", "dgrad": "persistent", "wgrad": "persistent_wgrad"},
    BF16X6: PLAIN,
}
# Where a kernel's tiles are computed in several ways, one of each: by warpgroups that share it, and that take tiles by turns.
TILES: dict[str, tuple[Tile | None, ...]] = {"persistent": (Tile(128, 128, 64, 8, 6), Tile(128, 64, 64, 4, 7))}
# Of the largest element: two roundings to bf16; fp32 sums in two orders.
TOLERANCE = {"tma": 2**-7, SPECIALISED: 2**-7, BF16X6: 1e-5, DEPENDENT: 0}
# A chain of sums, each of the result of the one before: slices that each adds. The first is slow: its few programs read 32 MiB.
CHAIN = (512, 4, 4)
CHAINED = 2**14  # elements of a slice of the first
REPEATS = 20
GRAPHS = 12030  # CUDA 12.3, the first whose graphs have the edges of dependent launches
ATTEMPTS = 3  # after so many errors, even of a kind that may not recur, a mechanism is barred
_lock = threading.RLock()
_works: dict[tuple[torch.device, str], bool] = {}
_failures: collections.Counter[tuple[torch.device, str]] = collections.Counter()
_undecided = 0


def works_on(device: torch.device, planned: Device, mechanism: str) -> bool:
    """Returns True if a mechanism gives right results on a device.

    The answer is remembered, and kept in the record for later processes, except the False of a call that could not tell:
    during the capture of a CUDA graph, while a plan is forced (which would force the check's own plans too), or after an error
    that may not recur, such as out of memory. A dry run launches nothing, so it takes what was never checked to work.

    Args:
        device: the device.
        planned: the planner's description of it, without a check.
        mechanism: "tma", SPECIALISED, BF16X6 or DEPENDENT.
    """
    key = device, mechanism
    if key in _works:
        return _works[key]
    where = machine(planned.name)
    kept = book().works(where, mechanism)
    if kept is not None:
        _works[key] = kept
        return kept
    if DRY.get() is not None:
        return True
    if forced() is not None or capturing(-1 if device.index is None else device.index):
        return _cannot_tell()
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _lock, here, torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        if key not in _works:
            try:
                certain = True
                reason = _lacking(device, mechanism)
                if not reason and max(_errors(device, planned, mechanism)) > TOLERANCE[mechanism]:
                    reason = "its results differ from those of plain kernels"
            except Exception as e:
                _failures[key] += 1
                certain = lasting(e) or isinstance(e, ValueError)
                if not certain and _failures[key] < ATTEMPTS:
                    return _cannot_tell()
                reason = f"{type(e).__name__}: {str(e).strip()[:1000]}"
            if reason:
                warnings.warn(f"tconv will not use {mechanism} on {device}: {reason}", stacklevel=2)
            _works[key] = not reason
            if certain:
                book().add([mechanism_line(where, mechanism, not reason)])
    return _works[key]


def standing(mechanism: str) -> str:
    """Returns how a mechanism stands on the current device: "proven here", "proven elsewhere", "barred here" or "untested".

    An untested one is checked before its first launch.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if cuda else INTERPRETER.name
    here = _works.get((device, mechanism), book().works(machine(name), mechanism))
    if here is not None:
        return "proven here" if here else "barred here"
    return "proven elsewhere" if book().works_elsewhere(mechanism) else "untested"


def undecided() -> int:
    """Returns how often it could not be told whether a mechanism works. A plan made then is not for later calls."""
    return _undecided


def _cannot_tell() -> bool:
    global _undecided
    _undecided += 1
    return False


def _lacking(device: torch.device, mechanism: str) -> str:
    """Returns why a mechanism must not be used on a device whatever a check would find, or an empty string."""
    if mechanism == DEPENDENT and device.type == "cuda" and _driver() < GRAPHS:
        return "the driver is older than CUDA 12.3, whose graphs are the first to have dependent launches"
    return ""


def _driver() -> int:
    """Returns the version of CUDA that the driver has, 12030 for 12.3."""
    return int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def _errors(device: torch.device, planned: Device, mechanism: str) -> Iterator[float]:
    """Yields, for each pass that it computes, a mechanism's largest difference from a plain kernel, over the largest element.

    NaN counts as infinite.
    """
    if mechanism == DEPENDENT:
        yield from _chains(device)
        return
    planned = dataclasses.replace(planned, check=lambda other: other != DEPENDENT)  # each is checked by itself
    dtype = torch.float32 if mechanism == BF16X6 else torch.bfloat16
    # One program that stays computes all tiles.
    here = dataclasses.replace(planned, units=1) if mechanism == SPECIALISED else planned
    seeded = torch.Generator(device).manual_seed(0)
    x, w, dy = (
        torch.randn(PROBLEM.shape(name), generator=seeded, device=device).to(dtype, memory_format=torch.channels_last)
        for name in "xwy"
    )
    for pass_, operands, like in (("fprop", (x, w), dy), ("dgrad", (dy, w), x), ("wgrad", (dy, x), w)):
        if pass_ not in KERNELS[mechanism]:
            continue
        kernel, precision = KERNELS[mechanism][pass_], BF16X6 if mechanism == BF16X6 else ""
        expected = _result(pass_, operands, like, planned, PLAIN[pass_], "")
        for tile in TILES.get(kernel, (None,)):
            got = _result(pass_, operands, like, here, kernel, precision, tile)
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            yield error if error == error else float("inf")


def _chains(device: torch.device) -> Iterator[float]:
    """Yields, for each of several runs, the largest difference of a chain of dependent sums from one of plain launches.

    What a sum reads held NaN before the launch that writes it. NaN counts as infinite.
    """
    seeded = torch.Generator(device).manual_seed(0)
    first = torch.randn(CHAIN[0] * CHAINED, generator=seeded, device=device)
    expected = _chained(first, False)
    for _ in range(REPEATS):
        error = (_chained(first, True) - expected).abs().max().item()
        yield error if error == error else float("inf")


def _chained(slices: torch.Tensor, dependent: bool) -> torch.Tensor:
    """Returns the result of a chain of sums that begins with these slices: all but the first dependent launches, or none."""
    call = Call(DEPENDENT, None, None, "a check")
    sums = [slices.new_full((CHAINED,), float("nan"))]
    for splits in CHAIN[1:]:
        sums.append(slices.new_full((sums[-1].numel() // splits,), float("nan")))
    for i, splits in enumerate(CHAIN):
        launch = sum_of(splits, None, call, sums[i], slices.dtype, dependent and i > 0)
        run_once(launch, (sums[i - 1] if i else slices, sums[i]))
    return sums[-1]


def _result(
    pass_: str,
    operands: tuple[torch.Tensor, torch.Tensor],
    like: torch.Tensor,
    planned: Device,
    kernel: str,
    precision: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Returns the result of a pass by a kernel in a precision, in memory that held NaN. It has the shape of `like`.

    Args:
        tile: None for the planner's choice.
    """
    result = torch.empty_like(like)
    fast = like.dtype != torch.float32  # whatever torch's flag says of TF32
    first, second, third = (addressing(t) for t in (*operands, result))
    c: Pass
    more: tuple[torch.Tensor, ...] = ()
    if pass_ == "wgrad":
        c = WgradPass(PROBLEM, second, third, first, fast)
    else:
        c, more = GatherPass(pass_, PROBLEM, first, second, third, fast), operands[:1]  # no bias is read
    with given(Forced(kernel, tile, None, None, None)):
        launch = prepare_pass(c, PROBLEM, result, planned, kernel, precision)
    run_poisoned(launch, operands, more, result)
    return result


def run_poisoned(
    launch: Prepared, operands: tuple[torch.Tensor, ...], more: tuple[torch.Tensor, ...], result: torch.Tensor
) -> None:
    """Runs every part of a launch once, by Triton's dispatch, into memory that held NaN. Errors are raised as they are.

    Args:
        operands: the operands that may be copied to channels last first.
        more: other tensors that the kernel reads.
        result: the tensor to write, with the launch's shape and strides.
    """
    nan = float("nan")
    result.fill_(nan)
    if launch.copies:
        operands = tuple(_copied(copy, t) if copy else t for copy, t in zip(launch.copies, operands, strict=True))
    if launch.swapped:
        operands = operands[::-1]
    if launch.total is None:
        run_once(launch, (*operands, *more, result))
    else:
        workspace = torch.full((launch.splits * result.numel(),), nan, dtype=launch.total.pointers[0], device=result.device)
        run_once(launch, (*operands, *more, workspace))
        run_once(launch.total, (workspace, result))


def _copied(copy: Prepared, t: torch.Tensor) -> torch.Tensor:
    made = t.new_empty_strided(copy.shape, copy.strides).fill_(float("nan"))
    run_once(copy, (t, made))
    return made
