"""Turns a pass on given tensors into a launch config: plan, grid, integers and compile-time constants."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from tconv.launching.arguments import (
    KERNELS,
    Prepared,
    dot_precision,
    numerics,
    options,
    prepared,
    tensor_cores,
)
from tconv.launching.fences import marked
from tconv.launching.memory_bound import Shape, prepare_both, prepare_copy, summed
from tconv.launching.memory_format import addressing, reach, shaped
from tconv.launching.record import Call, Slower
from tconv.planning import cost
from tconv.planning import plan as planning
from tconv.planning.addressing import LIMIT, aligned_channels
from tconv.planning.device import Device
from tconv.planning.epilogue import NONE, Epilogue
from tconv.planning.families import FAMILIES
from tconv.planning.operands import (
    GatherPass,
    Pass,
    PatchPass,
    Stream,
    WgradPass,
    tails,
)
from tconv.planning.problem import PREDICTED, ConvProblem, Triple
from tconv.planning.tiles import BF16X6
from tconv.records.book import Measured, book, is_set_aside
from tconv.records.key import Cell, cell_of, machine

PATCH = "patch"  # the kernel that takes the problem in another form (planning/operands.py `PatchPass`)
PADDED = "channels padded with zeros"  # how the reason of such a plan begins
# Describes a pass on two operands.
Describe = Callable[[torch.Tensor, torch.Tensor], Pass]
# Prepares it. The last argument is the only kernel to consider, or None for all that load through pointers.
Prepare = Callable[[torch.Tensor, torch.Tensor, "str | None"], Prepared]


class Ineligible(ValueError):
    """A pass on these tensors is not eligible for a kernel."""


def prepare_gather(
    pass_: str,
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    device: Device,
    policy: str = PREDICTED,
    epilogue: Epilogue = NONE,
    batch_invariant: bool = False,
) -> Prepared:
    """Returns the launch of fprop (x -> y) or dgrad (x is dy, y is dx): the planner's choice, or the plan that was measured.

    The implicit GEMM kernels load x one element at a time if its channels are not contiguous. Such operands are copied to
    channels last first if that is predicted to be faster, or is forced. The result keeps its memory format either way.

    Args:
        policy, batch_invariant: as in `Geometry`. What was measured, in some batch, does not count if batch_invariant.
        epilogue: what is done with the result before it is written.
    Raises:
        Slower: a record says that torch's kernel is faster.
    """
    bias = None if b is None else b.stride(0)
    names = "dy" if pass_ == "dgrad" else "x", "w"
    boxes = "tma", "persistent"

    def describing(problem: ConvProblem, y: torch.Tensor) -> Describe:
        def described(x: torch.Tensor, w: torch.Tensor) -> Pass:
            p = dataclasses.replace(problem, K=w.shape[0], C=w.shape[1] * problem.G)  # padded channels count
            return GatherPass(
                pass_, p, addressing(x), addressing(w), addressing(y), tensor_cores(x.dtype), bias, epilogue,
                batch_invariant,
            )  # fmt: skip

        return described

    described = describing(problem, y)

    def columns(problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Pass:
        try:
            return PatchPass(
                problem, addressing(x), addressing(w), addressing(y), tensor_cores(x.dtype), bias, epilogue, batch_invariant
            )  # fmt: skip
        except ValueError as e:
            raise Ineligible(str(e)) from None

    def best() -> Prepared:
        def prepare(x: torch.Tensor, w: torch.Tensor, only: str | None) -> Prepared:
            c = columns(problem, x, w, y) if only == PATCH else described(x, w)
            return prepare_pass(c, problem, y, device, only)

        return _best(prepare, described, boxes, names, (x, w), problem, device)

    def invariant() -> Prepared:
        some, images, result = dataclasses.replace(problem, N=planning.IMAGES), _images(x), _images(y)
        of_some = describing(some, result)

        def prepare_some(x: torch.Tensor, w: torch.Tensor, only: str | None) -> Prepared:
            c = columns(some, x, w, result) if only == PATCH else of_some(x, w)
            return prepare_pass(c, some, result, device, only)

        by_boxes = boxes if planning.requested() or _copies_alike(x) else ()
        launch = _best(prepare_some, of_some, by_boxes, names, (images, w), some, device)

        def prepare(x: torch.Tensor, w: torch.Tensor, only: str | None) -> Prepared:
            c = columns(problem, x, w, y) if only == PATCH else described(x, w)
            return prepare_pass(c, problem, y, device, only, plan=launch.call.plan)

        return _for_batch(launch, prepare, described, names, (x, w), device)

    by = invariant if batch_invariant else best
    return _as_measured(by, lambda: described(x, w), x.dtype, device, policy, not batch_invariant)


def prepare_stream(
    problem: ConvProblem,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    state: torch.Tensor | None,
    kept: int,
    first: int,
    device: Device,
    epilogue: Epilogue = NONE,
    batch_invariant: bool = False,
) -> Prepared:
    """Returns the launch of fprop for a chunk of a stream.

    Args:
        state, kept, first: as in planning/operands.py `Stream`.
        batch_invariant: if True, the plan is the one for `planning.IMAGES` images of `planning.TIMES` times, whatever the chunk
            has; only the prediction is the chunk's own.
    """
    bias, names = None if b is None else b.stride(0), ("x", "w")

    def describing(problem: ConvProblem, y: torch.Tensor, stream: Stream) -> Describe:
        def described(x: torch.Tensor, w: torch.Tensor) -> Pass:
            return GatherPass(
                "fprop", problem, addressing(x), addressing(w), addressing(y), tensor_cores(x.dtype), bias, epilogue,
                batch_invariant, stream,
            )  # fmt: skip

        return described

    described = describing(problem, y, Stream(None if state is None else addressing(state), kept, first))

    def preparing(described: Describe, problem: ConvProblem, y: torch.Tensor, plan: planning.Plan | None) -> Prepare:
        def prepare(x: torch.Tensor, w: torch.Tensor, only: str | None) -> Prepared:
            return prepare_pass(described(x, w), problem, y, device, "gather", plan=plan)

        return prepare

    prepare = preparing(described, problem, y, None)
    if not batch_invariant:
        return _staged(prepare, described, names, (x, w), problem, device, padded=False)
    some = _of_times(problem)
    # An x of one step lies in both formats. So x is taken to be channels last, and is copied where it is not.
    images = shaped(some.shape("x"), True, x.dtype)
    result = shaped(some.shape("y"), y.shape[1] == 1 or y.stride(1) == 1, x.dtype)
    of_some = describing(some, result, Stream(None, kept, first))
    launch = _staged(preparing(of_some, some, result, None), of_some, names, (images, w), some, device, padded=False)
    prepare, shapes = preparing(described, problem, y, launch.call.plan), _plain_shapes(names, (x, w))
    return _copied(prepare, described, None, names, (x, w), device, shapes if launch.copies else (shapes[0], None))


def _of_times(p: ConvProblem) -> ConvProblem:
    """Returns the problem of `planning.IMAGES` images that write `planning.TIMES` times, of the same frames."""
    time, times = 3 - p.rank, planning.TIMES[p.rank]

    def put(extents: Triple, value: int) -> Triple:
        found = *extents[:time], value, *extents[time + 1 :]
        return found[0], found[1], found[2]

    before = p.D[time] * (p.T[time] - 1)
    read = (times - 1) * p.S[time] + 1
    return dataclasses.replace(p, N=planning.IMAGES, X=put(p.X, read), Y=put(p.Y, times), P=put(p.P, before))


def prepare_wgrad(
    problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, device: Device, policy: str = PREDICTED
) -> Prepared:
    """Returns the launch of wgrad, from dy and x into dw.

    If the plan has splits, each is written to a slice of a workspace (`WgradPass.written`). Operands are copied to channels
    last, and a plan that was measured is taken, as in `prepare_gather`.

    Raises:
        Slower: a record says that torch's kernel is faster.
    """

    def described(dy: torch.Tensor, x: torch.Tensor) -> Pass:
        p = dataclasses.replace(problem, K=dy.shape[1], C=x.shape[1])  # padded channels count
        stored = None if p == problem else (problem.C, problem.K)
        return WgradPass(p, addressing(x), addressing(dw), addressing(dy), tensor_cores(x.dtype), stored)

    def prepare(dy: torch.Tensor, x: torch.Tensor, only: str | None) -> Prepared:
        return prepare_pass(described(dy, x), problem, dw, device, only)

    def best() -> Prepared:
        return _best(prepare, described, ("tma_wgrad", "persistent_wgrad"), ("dy", "x"), (dy, x), problem, device)

    return _as_measured(best, lambda: described(dy, x), x.dtype, device, policy)


def _as_measured(
    best: Callable[[], Prepared],
    describe: Callable[[], Pass],
    dtype: torch.dtype,
    device: Device,
    policy: str,
    measured_counts: bool = True,
) -> Prepared:
    """Returns the launch of the plan that a record has for a pass, if it can run; else the planner's choice.

    Args:
        best: makes the launch that the planner chooses, or is told to choose.
        describe: returns the pass.
        dtype: of its operands.
        device: the device to plan for.
        policy: as in `Geometry`.
        measured_counts: False to take the planner's choice, but for one that was wrong or failed.
    Raises:
        Slower: the record says that torch's kernel is faster, and the policy lets torch run it; or that the plan which would
            run was wrong, or failed.
    """
    if policy == PREDICTED or planning.requested() is not None or is_set_aside() or book().empty:
        return best()
    c, where = describe(), machine(device.name)
    cell = cell_of(c, str(dtype).removeprefix("torch."))
    barred = book().barred(where, cell)

    def guess() -> Prepared:
        launch = best()
        if launch.call.plan is not None and launch.call.plan.choices in barred:
            raise Slower("the planner's choice was wrong or failed when it was measured")
        return launch

    found = book().find(where, cell) if measured_counts else None
    if found is None:
        return guess()
    near, measured = found
    if policy != "always" and measured.torch_is_faster and not torch.are_deterministic_algorithms_enabled():
        raise Slower(f"{measured}{_elsewhere(near, cell)}")
    for choices in _choices(measured, c.pass_, barred):
        if device.works(FAMILIES[choices.kernel or ""].mechanism(choices.precision or "")):
            try:
                with planning.given(choices):
                    launch = best()
            except ValueError:  # not for this problem
                continue
            assert launch.call.plan is not None
            if launch.call.plan.choices in barred:
                continue
            return _replanned(launch, reason=f"{measured}{_elsewhere(near, cell)}; {launch.call.plan.reason}")
    return guess()


def _choices(measured: Measured, pass_: str, barred: set[planning.Forced]) -> list[planning.Forced]:
    """Returns the choices to try for a plan that was measured, here or nearby: with its number of splits, else with another."""
    plan = measured.plan
    if plan is None or plan.kernel not in planning.KERNELS[pass_] or plan in barred:
        return []
    return [plan, dataclasses.replace(plan, splits=None)]


def _elsewhere(measured: Cell, cell: Cell) -> str:
    return "" if measured == cell else ", of a problem nearby"


def prepare_pass(
    c: Pass,
    problem: ConvProblem,
    result: torch.Tensor,
    device: Device,
    only: str | None,
    precision: str | None = None,
    plan: planning.Plan | None = None,
) -> Prepared:
    """Returns the launch of a pass with the kernel that the planner chooses.

    Args:
        c: the pass.
        problem: its problem before it was simplified.
        result: a tensor like the result.
        device: the device to plan for.
        only: the only kernel to consider; None for all that load through pointers.
        precision: the only precision to consider, of `Plan.precision`; None for all.
        plan: the plan, which was made for other images; None to choose one.
    Raises:
        Ineligible: the tensors are not eligible for the only kernel.
    """
    reason = (FAMILIES[only].refused(c.p, c.pass_) or FAMILIES[only].ineligible(c, device)) if only else None
    if only and only not in KERNELS:
        reason = f"this version of Triton has another Gluon than {only} is written in"
    if reason:
        raise Ineligible(reason)
    if plan is None:
        plan = planning.choose(c.p, c.pass_, c.operands(), device, only, precision, whole=c.batch_invariant)
        plan = summed(plan, device)
    else:
        plan = planning.for_batch(plan, c.p, c.operands(), device)
    family, kernel = FAMILIES[plan.kernel], KERNELS[plan.kernel]
    integers, constants = family.arguments(c, plan.tile, plan.splits)
    boxes = family.boxes(c, plan.tile)
    programs = family.grid(c.p, c.pass_, plan.tile, plan.splits, device)
    integers = integers | {"programs": programs}
    shared = (
        c.constants(plan.tile, plan.splits, family.dot)
        | {"PRECISION": dot_precision(result.dtype, plan, c.tensor_cores)}
        | numerics(result.dtype)
    )
    constants = {k: v for k, v in (shared | constants).items() if k in kernel.arg_names} | options(plan.tile)
    if family.dot:
        constants |= marked(device)
    if c.rules:
        done = " + ".join(dict.fromkeys(c.rules))
        plan = dataclasses.replace(plan, reason=f"{done} to {c.p}; {plan.reason}")
    if c.epilogue:
        plan = dataclasses.replace(plan, reason=f"{plan.reason}; with {c.epilogue}")
    call = Call(c.pass_, problem, plan, plan.reason)
    integers = c.integers(plan.tile, plan.splits) | integers
    programs += tails(c, plan.tile)
    operands = torch.float8_e4m3fn if c.itemsize == 1 else None
    launch = prepared(kernel, programs, integers, constants, call, result, c.swapped, c.slices(), c.epilogue, operands)
    return dataclasses.replace(launch, boxes=(*boxes, *[None] * (len(launch.pointers) - len(boxes))) if boxes else ())


def _best(
    prepare: Prepare,
    described: Describe,
    by_boxes: tuple[str, ...],
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    problem: ConvProblem,
    device: Device,
) -> Prepared:
    """Returns the launch of a pointer kernel or of one that loads boxes: the forced one, or the fastest by prediction.

    Without a forced kernel, boxes are eligible from compute capability 9 on for problems without groups, the only ones on which
    a GPU has timed them. If anything else is forced, or in the interpreter, the pointer kernel runs.

    Args:
        by_boxes: the names of the pass's kernels that load boxes.
    """
    request = planning.requested()
    if request and request.kernel in by_boxes:
        only = request.kernel
        try:
            if request.precision == BF16X6 and operands[0].dtype == torch.float32:
                raise Ineligible("boxes are not cut into pieces")
            if request.staged is False:
                return prepare(*operands, only)
            return _copied(prepare, described, only, names, operands, device)
        except Ineligible as e:
            raise Ineligible(f"forced plan cannot run: {e}") from None
    patches = names == ("dy", "w") and operands[0].itemsize > 1
    if request and request.kernel == PATCH and patches:
        try:
            first, *more = _patches(prepare, described, names, operands, device, request.staged)
            return min(first, *more, key=_predicted) if more else first
        except Ineligible as e:
            raise Ineligible(f"forced plan cannot run: {e}") from None
    launch = _staged(prepare, described, names, operands, problem, device)
    if request or device.interpreted:
        return launch
    rivals = []
    if patches:
        with contextlib.suppress(Ineligible, planning.Unplannable):
            rivals += _patches(prepare, described, names, operands, device, None)
    for kernel in by_boxes if device.generation >= 9 and problem.G == 1 else ():
        with contextlib.suppress(Ineligible, planning.Unplannable):
            rivals.append(_copied(prepare, described, kernel, names, operands, device))
    return _fastest(launch, rivals, device)


def _patches(
    prepare: Prepare,
    described: Describe,
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    device: Device,
    staged: bool | None,
) -> list[Prepared]:
    """Returns the launches of a dgrad by kernels/patch.py: on dy as it is, and on its copy in channels last.

    Args:
        staged: only the latter if True, only the former if False.
    Raises:
        Ineligible: the dgrad is not one of patches, or they do not lie in memory as the kernel needs it.
        Unplannable: operands cannot be read in vectors.
    """
    found, refused = [], None
    copies = _channels_apart(operands[0]) and (staged or (staged is None and not device.interpreted))
    for copy in (False, True) if copies and not staged else (copies,):
        try:
            launch = _copied(prepare, described, PATCH, names, operands, device) if copy else prepare(*operands, PATCH)
            found.append(launch)
        except planning.Unplannable as e:
            refused = e
    if refused and not found:
        raise refused
    return found


def _fastest(launch: Prepared, rivals: list[Prepared], device: Device) -> Prepared:
    """Returns the fastest launch by prediction. Faster rivals that do not work on the device are only listed in its plan."""
    barred: list[planning.Plan] = []
    for rival in sorted(rivals, key=_predicted):
        plan = rival.call.plan
        assert plan is not None
        if _predicted(rival) >= _predicted(launch):
            break
        if device.works(plan.mechanism):
            launch = rival
            break
        barred.append(plan.barred())
    plan = launch.call.plan
    assert plan is not None
    return _replanned(launch, others=(*plan.others, *barred)) if barred else launch


def _predicted(launch: Prepared) -> float:
    """Returns the predicted seconds of a launch, copies included."""
    assert launch.call.plan is not None
    assert launch.call.plan.cost is not None
    return launch.call.plan.cost.seconds


def _staged(
    prepare: Prepare,
    described: Describe,
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    problem: ConvProblem,
    device: Device,
    padded: bool = True,
) -> Prepared:
    """Returns a launch on the operands as they are, or on copies of them if that is predicted to be faster, or forced.

    Operands of a depthwise problem are never copied.

    Args:
        padded: whether copies may have more channels than the operands.
    """
    native, request = prepare(*operands, None), planning.requested()
    forced = request.staged if request else None
    if forced is False or problem.depthwise or (device.interpreted and not forced):
        return native
    shapes = None if padded else _plain_shapes(names, operands)
    launch = _copied(prepare, described, None, names, operands, device, shapes)
    if not launch.copies:
        return native
    before, after = native.call.plan, launch.call.plan
    assert before is not None
    assert after is not None
    if before.cost is None or after.cost is None:
        return launch
    if not forced and after.cost.seconds >= before.cost.seconds:
        return native
    return _replanned(launch, reason=f"{after.reason}, without {before.cost.seconds * 1e6:.1f} us")


def _for_batch(
    launch: Prepared,
    prepare: Prepare,
    described: Describe,
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    device: Device,
) -> Prepared:
    """Returns the launch for a batch that has the plan and the copies of `launch`, which is for `planning.IMAGES`.

    Args:
        prepare: prepares the pass with the launch's plan.
    """
    assert launch.call.plan is not None
    only, images = launch.call.plan.kernel, operands[0].shape[0]
    first, second = (tuple(copy.shape) if copy else None for copy in launch.copies or (None, None))
    copied = None if first is None else (images, *first[1:])
    try:
        return _copied(prepare, described, only, names, operands, device, (copied, second))
    except Ineligible:  # boxes cannot begin at these images, but at those of a copy
        return _copied(prepare, described, only, names, operands, device, (tuple(operands[0].shape), second))


def _images(t: torch.Tensor) -> torch.Tensor:
    """Returns a meta tensor of `planning.IMAGES` images like those of a batch, at an aligned address and without gaps."""
    shape, strides = (planning.IMAGES, *t.shape[1:]), (reach(t[:1]) + 1, *t.stride()[1:])
    return torch.empty_strided(shape, strides, dtype=t.dtype, device="meta")


def _copies_alike(t: torch.Tensor) -> bool:
    """Returns True if a copy of a tensor to channels last has the same strides within an image, or a TMA kernel needs one."""
    copy = shaped(t.shape, True, t.dtype)
    same = all(n == 1 or a == b for n, a, b in zip(t.shape[1:], t.stride()[1:], copy.stride()[1:], strict=True))
    return same or _channels_apart(t)


def _copied(
    prepare: Prepare,
    described: Describe,
    only: str | None,
    names: tuple[str, str],
    operands: tuple[torch.Tensor, torch.Tensor],
    device: Device,
    shapes: tuple[Shape | None, ...] | None = None,
) -> Prepared:
    """Returns a launch on copies of the operands in channels last, of those whose channels are not contiguous or not aligned.

    Its predicted cost includes the copies.

    Args:
        shapes: the copies' shapes, None for an operand that is used as it is; by default those of `_copy_shapes`.
    """
    if shapes is None and only and FAMILIES[only].weight_stays:
        shapes = operands[0].shape if _channels_apart(operands[0]) else None, None
    elif shapes is None:
        shapes = _copy_shapes(described, names, operands)
    first, second = (t if shape is None else shaped(shape, True, t.dtype) for t, shape in zip(operands, shapes, strict=True))
    launch = prepare(first, second, only)
    if not any(shapes):
        return launch
    plan, problem = launch.call.plan, launch.call.problem
    assert plan is not None
    assert isinstance(problem, ConvProblem)
    total, reason = plan.cost, plan.reason
    itemsize = operands[0].itemsize
    copied = [(t, shape) for t, shape in zip(operands, shapes, strict=True) if shape is not None]
    padded = any(shape != t.shape for t, shape in copied)
    if padded:
        reason = f"{PADDED}; {reason}"
    if total is not None:
        read, written = sum(t.numel() for t, _ in copied) * itemsize, sum(math.prod(shape) for _, shape in copied) * itemsize
        if padded:  # the zeros are no work of the pass, and in no workspace
            total = dataclasses.replace(
                total, flops=cost.flops(problem), bytes=cost.least_bytes(problem, plan.pass_, itemsize),
                workspace=cost.slices(problem, plan.pass_, plan.splits, itemsize),
            )  # fmt: skip
        total = cost.with_copies(total, read, written, device)
        reason = f"{reason}; with the copies {total.seconds * 1e6:.1f} us"
    staged = tuple(name for name, shape in zip(names, shapes, strict=True) if shape)
    copies = tuple(
        prepare_copy(problem, t, device, shape) if shape else None for t, shape in zip(operands, shapes, strict=True)
    )
    two = [copy for copy in copies if copy]
    both = prepare_both(*two) if len(two) == 2 else None
    return dataclasses.replace(_replanned(launch, cost=total, reason=reason, staged=staged), copies=copies, both=both)


def _copy_shapes(
    described: Describe, names: tuple[str, str], operands: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Shape | None, ...]:
    """Returns the shape of each operand's copy in channels last, or None for an operand that is used as it is.

    Operands whose channels are not contiguous are copied. If reduced channels would still be accessed in vectors of less than 8
    bytes, the copies of both operands get more of them, which are zero. A wgrad writes channels of both operands, so each gets
    its own, and what they would add to dw is not stored. Channels that the rewrites of planning/simplify.py align anyway, as
    those of a patch embedding, are not padded.
    """
    plain = _plain_shapes(names, operands)
    first, second = (t if shape is None else shaped(shape, True, t.dtype) for t, shape in zip(operands, plain, strict=True))
    c = described(first, second)
    if c.p.G > 1 or _stays(names, operands):
        return plain
    if c.pass_ == "wgrad":  # x and dy; dw gets no more channels
        vectors = (c.x_vec, c.y_vec) if c.swapped else (c.y_vec, c.x_vec)
        padded = [_with_channels(t, 1) if v * t.itemsize < 8 else t.shape for t, v in zip(operands, vectors, strict=True)]
    elif c.x_vec * c.itemsize < 8:
        padded = [_with_channels(operands[0], 1), _with_channels(operands[1], 0 if c.transposed else 1)]
    else:
        return plain
    if any(name == "w" and math.prod(shape) > LIMIT for name, shape in zip(names, padded, strict=True)):
        return plain
    return tuple(p if p != t.shape else q for t, p, q in zip(operands, padded, plain, strict=True))


def _plain_shapes(names: tuple[str, str], operands: tuple[torch.Tensor, torch.Tensor]) -> tuple[Shape | None, ...]:
    """Returns the shape of each operand whose channels are not contiguous, None for the others."""
    # Kernels address a weight with 32-bit offsets. An expanded weight may fit these as it is, but not as a copy.
    stays = _stays(names, operands)
    return tuple(
        t.shape if _channels_apart(t) and (name != "w" or (t.numel() <= LIMIT and not stays)) else None
        for name, t in zip(names, operands, strict=True)
    )


def _stays(names: tuple[str, str], operands: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Returns True for a dgrad in fp8, whose weight lies as tensor cores need it (dispatch/fp8.py): not channels last."""
    return names == ("dy", "w") and operands[0].itemsize == 1


def _with_channels(t: torch.Tensor, dimension: int) -> Shape:
    """Returns t's shape with aligned channels along a dimension."""
    return *t.shape[:dimension], aligned_channels(t.shape[dimension], t.itemsize), *t.shape[dimension + 1 :]


def _channels_apart(t: torch.Tensor) -> bool:
    """Returns True if a tensor has several channels and they are not contiguous."""
    return t.shape[1] > 1 and t.stride(1) != 1


def _replanned(launch: Prepared, **changes: Any) -> Prepared:
    """Returns the launch with these fields of its plan replaced."""
    assert launch.call.plan is not None
    plan = dataclasses.replace(launch.call.plan, **changes)
    return dataclasses.replace(launch, call=dataclasses.replace(launch.call, plan=plan, reason=plan.reason))
