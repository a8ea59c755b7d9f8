"""Allocates results and launches kernels: fprop, dgrad, wgrad and the bias gradient of a problem on given tensors.

Launch configs are prepared once per kind of call (launching/prepare.py) and cached.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import profiler

from tconv.launching import first_sight, frozen, profiling
from tconv.launching.arguments import INTERPRET, Borders, Prepared, tensor_cores
from tconv.launching.cache import BoundedCache
from tconv.launching.compiled import capturing, fail, require_launchable, run
from tconv.launching.memory_bound import prepare_activation, prepare_bias, prepare_borders, prepare_quantize
from tconv.launching.memory_format import reach, shaped
from tconv.launching.prepare import prepare_gather, prepare_stream, prepare_wgrad
from tconv.launching.record import Call, Fallback, Slower, record_call
from tconv.launching.self_check import undecided, works_on
from tconv.planning import borders
from tconv.planning import plan as planning
from tconv.planning.addressing import LIMIT
from tconv.planning.device import INTERPRETER, Device, cuda_device
from tconv.planning.epilogue import POINTERS
from tconv.planning.problem import PREDICTED, Geometry

Backward = tuple[Prepared | None, Prepared | None, Prepared | None]  # launches for the gradients of x, w and bias
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_prepared: BoundedCache[Any, Prepared | str] = BoundedCache()  # or why torch's kernel is to run
# The lists of the `collecting()` blocks that this thread is in. Per context, like DRY: other threads rehearse other models.
_collections: contextvars.ContextVar[tuple[list[Prepared], ...]] = contextvars.ContextVar("tconv_collections", default=())

_asked: contextvars.ContextVar[tuple[tuple[list[Asked], Callable[[], str]], ...]] = contextvars.ContextVar(
    "tconv_asked", default=()
)  # of the `asking()` blocks


def convolution(transposed: bool, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Prepared:
    """Returns the launch of fprop, or of dgrad if `transposed`, for these tensors; pass it to `convolve`."""
    key = (
        "dgrad" if transposed else "fprop", g, x.stride(), w.stride(), b is not None and b.stride(),
        x.data_ptr() % 16, w.data_ptr() % 16, tensor_cores(x.dtype),
    )  # fmt: skip
    return lookup(key, lambda: _prepare_convolution(key[0], g, x, w, b))


def _prepare_convolution(pass_: str, g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> Prepared:
    if pass_ == "dgrad" and g.problem.repeated:
        return _prepare_bordered(g, x, w)
    if reach(w) > LIMIT:  # kernels address weights in 32 bits
        raise Fallback("a weight that 32 bits cannot address")
    dtype = getattr(torch, g.epilogue.result) if g.epilogue.result else x.dtype
    y = shaped(g.problem.shape("x" if pass_ == "dgrad" else "y"), g.channels_last, dtype)
    _measure_first(pass_, g, (x, w), b, y)
    device = g.device or device_of(x)
    return prepare_gather(pass_, g.problem, x, w, b, y, device, g.policy, g.epilogue, g.batch_invariant)


def streaming(
    g: Geometry, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, state: torch.Tensor | None, kept: int, first: int
) -> Prepared:
    """Returns the launch of fprop for a chunk of a stream; pass it to `convolve`.

    Args:
        state: [N, C, P, *frame], the P frames before the chunk; None at the beginning of the stream, where they are zeros.
        kept, first: the frames of the next state, and the first of them, counted from that of the chunk.
    """
    key = (
        "stream", g, x.stride(), w.stride(), b is not None and b.stride(), x.data_ptr() % 16, w.data_ptr() % 16,
        tensor_cores(x.dtype), state is not None and (state.stride(), state.data_ptr() % 16), kept, first,
    )  # fmt: skip

    def make() -> Prepared:
        if reach(w) > LIMIT:
            raise Fallback("a weight that 32 bits cannot address")
        y = shaped(g.problem.shape("y"), g.channels_last, x.dtype)
        device = g.device or device_of(x)
        return prepare_stream(g.problem, x, w, b, y, state, kept, first, device, g.epilogue, g.batch_invariant)

    return lookup(key, make)


def _prepare_bordered(g: Geometry, dy: torch.Tensor, w: torch.Tensor) -> Prepared:
    """Returns the launch of a dgrad whose padding repeats x: one for x alone, and what is added to that at its borders; or one
    for the padded x, and what folds it, where that is predicted to be faster.
    """
    apart = _prepare_slabs(g, dy, w)
    if g.batch_invariant:  # which of the two it is may depend on the batch
        return apart
    p, device = g.problem, g.device or device_of(dy)
    padded = _prepare_convolution("dgrad", dataclasses.replace(g, problem=borders.around(p), policy=PREDICTED), dy, w, None)
    dx = shaped(p.shape("x"), g.channels_last, dy.dtype)
    total = prepare_borders(p, dx, g.channels_last, None, device)
    assert apart.borders is not None
    plan, adding, by_slabs = padded.call.plan, total.call.plan, apart.borders.call.plan
    assert plan is not None
    assert adding is not None
    assert by_slabs is not None
    cost = plan.cost and borders.folded(plan.cost, p, adding.tile, dy.itemsize, device)
    if not borders.at_once(cost, by_slabs.cost):
        return apart
    seconds = f" {cost.seconds * 1e6:.1f} us" if cost else ""
    reason = f"{plan.reason}; of the padded input{seconds}, which another launch folds"
    call = Call("dgrad", p, dataclasses.replace(plan, reason=reason, cost=cost), reason)
    return dataclasses.replace(padded, borders=Borders((), 0, total, call))


def _prepare_slabs(g: Geometry, dy: torch.Tensor, w: torch.Tensor) -> Prepared:
    """Returns the launch of a dgrad whose padding repeats x, by slabs."""
    p, aligned = g.problem, 16 // dy.itemsize
    parts, begin, numel = [], [], 0
    for pair in borders.slabs(p):
        for slab in pair:
            begin.append(numel)
            if slab is None:
                continue
            part, size = slab.dimension + p.rank - 1, slab.p.Y[slab.dimension]  # of dy's dimensions, and how much of it
            how = dataclasses.replace(g, problem=slab.p, policy=PREDICTED)
            launch = _prepare_convolution("dgrad", how, dy.narrow(part, slab.first, size), w, None)
            launch = dataclasses.replace(launch, call=dataclasses.replace(launch.call, operation="borders"))  # none to measure
            parts.append((launch, part, slab.first, size, numel))
            numel += -(-math.prod(launch.shape) // aligned) * aligned
    dx = shaped(p.shape("x"), g.channels_last, dy.dtype)
    total = prepare_borders(p, dx, g.channels_last, [*begin, numel], g.device or device_of(dy))
    whole = _prepare_convolution("dgrad", dataclasses.replace(g, problem=borders.within(p)), dy, w, None)
    plan, of_slabs = whole.call.plan, [launch.call.plan for launch, *_ in parts]
    assert plan is not None
    found = plan.cost, *(of_slab and of_slab.cost for of_slab in of_slabs)
    costs, seconds, cost = [each for each in found if each], "", None
    if len(costs) == len(found):
        cost = borders.with_padding(costs[0], costs[1:], p, dy.itemsize, g.device or device_of(dy))
        seconds = f" {cost.seconds * 1e6:.1f} us"
    ways = collections.Counter(of_slab.way for of_slab in of_slabs if of_slab)
    slabs = " and ".join(f"{count} by {way}" for way, count in ways.items())
    reason = f"{plan.reason}; with the padding{seconds}: {len(parts)} more launches, {slabs}, and one that adds"
    call = Call("dgrad", p, dataclasses.replace(plan, reason=reason, cost=cost), reason)
    return dataclasses.replace(whole, borders=Borders(tuple(parts), numel, total, call))


class SharedOperand:
    """A tensor that several launches read, and its channels_last copy, made when the first launch needs it."""

    __slots__ = ("copy", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.copy: torch.Tensor | None = None


def convolve(
    launch: Prepared,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    dry: bool,
    shared: SharedOperand | None = None,
    after: tuple[torch.Tensor, ...] = (),
    beside: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Runs a launch of `convolution`: fprop, dgrad, or the forward pass of a transposed layer.

    Tensors may have any strides, but must share one dtype.

    Args:
        x: x [N, C, *X] for fprop, dy [N, K, *Y] for dgrad.
        w: the weight [K, C/G, *T].
        b: the layer's bias, [K] for fprop and [C] for a transposed layer.
        dry: allocate and record, but launch nothing.
        shared: an operand whose channels_last copy other launches use too.
        after: tensors for an epilogue's pointers.
        beside: of a stream, its state, or any tensor if it has none, and the next state, which is written.

    Returns:
        y [N, K, *Y] for fprop, dx [N, C, *X] for dgrad.
    """
    b = x if b is None else b  # without a bias the kernel does not read its pointer
    if launch.borders is not None:
        return _with_borders(launch, launch.borders, shared, x, w, b, dry)
    return execute(launch, dry, shared, (x, w), b, after=after, beside=beside)


def _with_borders(
    launch: Prepared, by: Borders, shared: SharedOperand | None, dy: torch.Tensor, w: torch.Tensor, b: torch.Tensor, dry: bool
) -> torch.Tensor:
    """Runs a dgrad, adds to dx what belongs to the padding, and returns it. The workspace is as large as the padding, or as the
    padded input where that is folded.
    """
    dx = execute(launch, dry, shared, (dy, w), b, recorded=False)
    if not by.slabs:
        dx = execute(by.total, dry, None, (dx,), recorded=False)
        record_call(by.call)
        return dx
    try:
        workspace = dy.new_empty(by.numel)
    except RuntimeError as e:  # as in `execute`
        fail(by.total, None, e)
    for of_slab, dimension, first, size, begin in by.slabs:
        part, slab = dy.narrow(dimension, first, size), workspace.as_strided(of_slab.shape, of_slab.strides, begin)
        execute(of_slab, dry, None, (part, w), part, out=slab, recorded=False)
    execute(by.total, dry, None, (workspace,), out=dx, recorded=False)
    record_call(by.call)
    return dx


def wgrad(g: Geometry, dy: torch.Tensor, x: torch.Tensor, shared: SharedOperand | None = None) -> torch.Tensor:
    """Returns dw [K, C/G, *T] from dy [N, K, *Y] and x [N, C, *X], with bitwise equal results on every run."""
    return execute(weight_reduction(g, dy, x), g.dry, shared, (dy, x))


def weight_reduction(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> Prepared:
    """Returns the launch of `wgrad` for these tensors."""
    key = ("wgrad", g, dy.stride(), x.stride(), dy.data_ptr() % 16, x.data_ptr() % 16, tensor_cores(x.dtype))
    return lookup(key, lambda: _prepare_wgrad(g, dy, x))


def _prepare_wgrad(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> Prepared:
    channels_last = g.channels_last if g.dw_channels_last is None else g.dw_channels_last
    dw = shaped(g.problem.shape("w"), channels_last, x.dtype)
    _measure_first("wgrad", g, (dy, x), None, dw)
    return prepare_wgrad(g.problem, dy, x, dw, g.device or device_of(x), g.policy)


def _measure_first(
    pass_: str, g: Geometry, operands: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None, result: torch.Tensor
) -> None:
    """Measures a pass that was not measured before, if the policy is "tune", or "auto" and torch's own flag asks for it.

    Not in a dry run, for a plan that is requested, in the capture of a CUDA graph, where nothing can be timed, nor under
    deterministic algorithms, where what runs must not depend on times. Nor for fprop and dgrad if they are batch-invariant.
    """
    x = operands[0]
    if (
        first_sight.measure is not None
        and (g.policy == "tune" or (g.policy == "auto" and x.is_cuda and torch.backends.cudnn.benchmark))
        and not g.dry
        and (pass_ == "wgrad" or not g.batch_invariant)
        and planning.requested() is None
        and not torch.are_deterministic_algorithms_enabled()
        and not capturing(x.get_device())
    ):
        first_sight.measure(pass_, g, operands, bias, result)


def bias_grad(g: Geometry, dy: torch.Tensor) -> torch.Tensor:
    """Returns db [channels], the sum over batch and pixels of dy, the gradient of a layer's output (transposed or not)."""
    return execute(bias_reduction(g, dy), g.dry, None, (dy,))


def bias_reduction(g: Geometry, dy: torch.Tensor) -> Prepared:
    """Returns the launch of `bias_grad` for this tensor."""
    key = ("bias", g, dy.shape, dy.stride(), dy.data_ptr() % 16)
    return lookup(key, lambda: prepare_bias(g.problem, dy, g.device or device_of(dy)))


def activation_grad(
    g: Geometry, dy: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | None, residual: bool, summed: bool
) -> Gradients:
    """Returns the gradients of a convolution's result and of the residual, and of the bias, in one pass over memory.

    Args:
        g: the forward pass, with its epilogue.
        dy: the gradient of the result.
        v: the activation's result or argument (kernels/epilogue.py `gradient`), with dy's strides.
        scale: the epilogue's scale.
        residual, summed: whether the gradients of the residual and of the bias are needed. Without a scale that of the residual
            is the convolution's, and not computed twice.
    """
    residual = residual and scale is not None
    key = ("activation", g, dy.shape, dy.stride(), dy.data_ptr() % 16, v.data_ptr() % 16, residual, summed)
    device = g.device or device_of(dy)
    launch = lookup(key, lambda: prepare_activation(g.problem, dy, g.epilogue, residual, summed, device))
    dv = torch.empty_strided(dy.shape, dy.stride(), dtype=dy.dtype, device=dy.device)
    dr = torch.empty_like(dv) if residual else None
    db = execute(launch, g.dry, None, (dy,), v, dv if scale is None else scale, dv, dv if dr is None else dr)
    return dv, dr, db if summed else None


def quantize(x: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, own: bool) -> None:
    """Writes x over the scale, one number in fp32, rounded to fp8, to q, which has x's strides, without gaps.

    Args:
        own: whether the scale is that of x's largest finite element, and is written.
    Raises:
        Fallback: a kernel cannot be launched.
    """
    *first, last = quantizing(x, own)
    parts = scale
    for of_parts in first:
        parts = scale.new_empty(of_parts.shape)
        run(of_parts, (x, parts))
    run(last, (x, scale, parts, q))


def quantizing(x: torch.Tensor, own: bool) -> tuple[Prepared, ...]:
    """Returns the launches of `quantize`."""
    return prepare_quantize(x.numel(), x.dtype, own)


def backward(
    transposed: bool, g: Geometry, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: Sequence[bool]
) -> Backward:
    """Returns the launches for the gradients of x, w and bias; None for each that `needs` says is not needed."""
    return (
        convolution(not transposed, g, dy, w, None) if needs[0] else None,
        weight_reduction(g, *((x, dy) if transposed else (dy, x))) if needs[1] else None,
        bias_reduction(g, dy) if needs[2] else None,
    )


def gradients(launches: Backward, transposed: bool, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, dry: bool) -> Gradients:
    """Runs the launches of `backward` and returns the gradients of x, w and bias; None for those without a launch."""
    of_x, of_w, of_b = launches
    shared, pair = SharedOperand(dy), (x, dy) if transposed else (dy, x)
    return (
        convolve(of_x, dy, w, None, dry, shared) if of_x else None,
        execute(of_w, dry, shared, pair) if of_w else None,
        execute(of_b, dry, None, (dy,)) if of_b else None,
    )


def device_of(t: torch.Tensor) -> Device:
    """Returns the planner's description of a tensor's device."""
    return INTERPRETER if INTERPRET else checked_device(t.device.index)


@functools.cache
def checked_device(index: int) -> Device:
    """Returns the CUDA or ROCm device with that index, on which mechanisms are checked before plans use them."""
    planned = cuda_device(index)
    return dataclasses.replace(planned, check=functools.partial(works_on, torch.device("cuda", index), planned))


def lookup(key: Any, make: Callable[[], Prepared]) -> Prepared:
    """Returns the launch for this key from the cache, or makes and caches it.

    key[1] is the call's `Geometry`, or the normalisation. The cache is not used for dry calls, nor while plans are forced.
    Deterministic algorithms, which torch's kernel need not be, have entries of their own.

    Raises:
        Slower: torch's kernel was measured to be faster.
        Fallback: no kernel can run the pass on the device.
        ValueError: a forced plan cannot run.
    """
    if planning.forced() is not None:
        return make()
    if torch.are_deterministic_algorithms_enabled():
        key = *key, "deterministic"
    found = None if key[1].dry else _prepared.get(key)
    if found is None:
        before = undecided()
        try:
            found = make()
        except planning.Unplannable as e:
            raise Fallback(str(e)) from e
        except Slower as e:
            found = str(e)
        if not key[1].dry and undecided() == before:
            _prepared[key] = found
    if isinstance(found, str):
        raise Slower(found)
    return found


def forget() -> None:
    """Forgets all launches, so that every pass is planned anew by what is known now."""
    _prepared.clear()


def execute(
    launch: Prepared,
    dry: bool,
    shared: SharedOperand | None,
    operands: tuple[torch.Tensor, ...],
    *more: torch.Tensor,
    after: tuple[torch.Tensor, ...] = (),
    beside: tuple[torch.Tensor, ...] = (),
    out: torch.Tensor | None = None,
    recorded: bool = True,
) -> torch.Tensor:
    """Allocates the result of a launch, runs it, records the call and returns the result.

    With split-K the kernel writes to a workspace, whose slices are then summed in a fixed order.

    Args:
        dry: allocate and record, but launch nothing.
        shared: an operand whose channels_last copy other launches use too.
        operands: the operands that may be copied to channels last first.
        more: other tensors that the kernel reads.
        after: tensors for an epilogue's pointers, which the kernel takes after the result's, or the sum of the splits does.
            Their addresses are multiples of 16 bytes.
        beside: of a stream, its state, or any tensor if it has none, and the next state, which is written.
        out: the result, with the launch's shape and strides, if it is there already.
        recorded: whether the call is recorded here.

    Raises:
        TransientFallback: memory ran out for the result, a copy or the workspace, or a kernel cannot be launched this time.
        Fallback: a kernel fails every time.
    """
    try:
        if out is None:
            out = operands[0].new_empty_strided(launch.shape, launch.strides, dtype=launch.dtype)
        if dry:
            _collect(launch, shared, operands, more)
        else:
            event = profiling.begin_launch(launch.call) if profiler._is_profiler_enabled else None
            try:
                if launch.copies or launch.total:
                    held = _held(launch, shared, operands) if launch.copies else []
                    require_launchable(launch, [i for i, t in enumerate(held) if t is None], operands, (*more, out))
                    if launch.copies:
                        operands = _copied(launch, shared, operands, held)
                if launch.swapped:
                    operands = operands[::-1]
                # A kernel takes the pointers of an epilogue before a stream's, also if it has no epilogue itself.
                unused = (out,) * len(POINTERS) if beside else ()
                if launch.total is None:
                    run(launch, (*operands, *more, out, *(after or unused), *beside))
                else:
                    workspace = torch.empty(launch.splits * out.numel(), dtype=launch.total.pointers[0], device=out.device)
                    run(launch, (*operands, *more, workspace, *unused, *beside))
                    run(launch.total, (workspace, out, *after))
            finally:
                if event is not None:
                    profiling.end(event)
    except RuntimeError as e:  # an allocation failed: fall back, since torch may need less memory
        fail(launch, None, e)
    if recorded:
        record_call(launch.call)
    return out


def _held(launch: Prepared, shared: SharedOperand | None, operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    """Returns the operands of a launch as it needs them, as they are or copied before; None for each that has to be copied."""

    def held(copy: Prepared | None, t: torch.Tensor) -> torch.Tensor | None:
        if copy is None:
            return t
        if shared is None or t is not shared.tensor:
            return frozen.find(copy, t)
        return shared.copy if shared.copy is not None and shared.copy.shape == copy.shape else None

    return list(map(held, launch.copies or (None,) * len(operands), operands))


def _copied(
    launch: Prepared, shared: SharedOperand | None, operands: tuple[torch.Tensor, ...], held: list[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Returns the operands of a launch as it needs them, after copying those that `_held` did not find."""
    missing = [i for i, t in enumerate(held) if t is None]
    made = [m for by in launch.copying(missing) for m in to_channels_last(by, *(operands[i] for i in missing))]
    for i, copied in zip(missing, made, strict=True):
        held[i], copy = copied, launch.copies[i]
        if shared is not None and operands[i] is shared.tensor:
            shared.copy = copied
        elif copy is not None:
            frozen.add(copy, operands[i], copied)
    return tuple(t for t in held if t is not None)


def to_channels_last(by: Prepared, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns channels_last copies of tensors, made by one launch, of `prepare_copy` for one or of `prepare_both` for two."""
    made = tuple(t.new_empty_strided(c.shape, c.strides) for c, t in zip(by.copies or (by,), tensors, strict=True) if c)
    run(by, tuple(t for pair in zip(tensors, made, strict=True) for t in pair))
    return made


def _collect(
    launch: Prepared, shared: SharedOperand | None, operands: tuple[torch.Tensor, ...], more: tuple[torch.Tensor, ...]
) -> None:
    missing = [i for i, t in enumerate(_held(launch, shared, operands)) if t is None]
    for i in missing:
        copy = launch.copies[i]
        if shared is not None and operands[i] is shared.tensor and copy:
            shared.copy = torch.empty_strided(copy.shape, copy.strides, device="meta")  # as if it had been made
    collect(launch.needed(missing))
    for asked, where in _asked.get():
        bias = next((form_of(t) for t in more if t is not operands[0]), None)
        asked.append(Asked(launch, tuple(map(form_of, operands)), bias, where()))


def collect(launches: Sequence[Prepared]) -> None:
    """Adds the launches that a dry call would make to the lists of `collecting`."""
    for found in _collections.get():
        found += launches


@dataclasses.dataclass(frozen=True)
class Form:
    """A tensor without its elements: shape, strides, dtype, and the remainder of its address modulo 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0


def form_of(t: torch.Tensor) -> Form:
    """Returns the form of a tensor."""
    return Form(tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % 16)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A pass that a dry call asked for.

    Attributes:
        launch: what would run.
        operands: the forms of its two operands; of one for the bias gradient.
        bias: the form of the bias that it adds, or None.
        where: what the function given to `asking` returned.
    """

    launch: Prepared
    operands: tuple[Form, ...]
    bias: Form | None
    where: str


@contextlib.contextmanager
def asking(where: Callable[[], str] = str) -> Iterator[list[Asked]]:
    """Yields a list that fills with the passes that this thread's dry calls in the block ask for.

    Args:
        where: called for each, to tell where it was asked for.
    """
    asked: list[Asked] = []
    token = _asked.set((*_asked.get(), (asked, where)))
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def collecting() -> Iterator[list[Prepared]]:
    """Yields a list that fills with the launches that this thread's dry calls in the block would make."""
    launches: list[Prepared] = []
    token = _collections.set((*_collections.get(), launches))
    try:
        yield launches
    finally:
        _collections.reset(token)
