"""`tune`: measures the passes of a model on the GPU here, and keeps what is fastest. `load_record` reads what others kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tconv.launching import first_sight
from tconv.launching.record import recording_apart
from tconv.launching.workers import bar, compile_launches
from tconv.planning.device import Device
from tconv.planning.plan import Plan, forced
from tconv.planning.problem import Geometry
from tconv.records import file
from tconv.records.book import Measured, barring, book, line_of
from tconv.records.key import Cell, Machine, machine
from tconv.rehearsal.runner import check_callable
from tconv.tune.candidates import candidates
from tconv.tune.clock import Clock
from tconv.tune.marker import Note, left_behind, noting
from tconv.tune.measure import Outcome, Timer, measure
from tconv.tune.subject import Asked, Subject, passes_of
from tconv.tune.table import Row, Tuned, named, row_of

NOTHING = Measured(None, None, None)
new_timer: Callable[[str], Timer] = Clock  # makes the timer for a type of device; tests put a stand-in here


def tune(
    model: Callable[..., Any],
    *inputs: Any,
    backward: bool = True,
    record: str | os.PathLike[str] | None = None,
    again: bool = False,
    jobs: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Tuned:
    """Measures every distinct convolution pass of a model on the current GPU, tconv's plans beside torch's kernel.

    What is fastest is kept in the record on disk, and this process and later ones choose by it (docs/tuning.md). The model is
    only rehearsed, as by `precompile`: its parameters, gradients, buffers, hooks and random numbers are as before. An
    interrupt ends it; what was measured until then is kept, and the next `tune` goes on behind it.

    Args:
        model: a module or a function, with tconv layers (`replace_`), or with torch's while `enable()` is active.
        inputs, kwargs: example inputs on the GPU, in containers and objects of any kind.
        backward: whether to include the backward pass, with gradients of all inputs.
        record: a file to which the lines of this model are added too, to ship with it: `load_record` reads it.
        again: whether to measure also what the record has.
        jobs: number of processes that compile candidates. None: one per core that this process may use.
        progress: whether to show progress bars (tqdm). None: only in a terminal.
    Returns:
        A `Tuned`; its text is a table.
    Raises:
        TypeError: the model cannot be called, or `record` is no path. Errors of the model itself are passed on.
        ValueError: `jobs` is below 1.
        RuntimeError: no GPU, no Triton, a plan is forced, or the model makes no convolution that tconv computes.
    """
    check_callable("tune", "model", model)
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise ValueError(f"tune: jobs must be a positive int or None, got {jobs!r}")
    if forced() is not None:
        raise RuntimeError("tune: a plan is forced (tconv.force), which would be the only candidate")
    if record is not None and not isinstance(record, (str, os.PathLike)):
        raise TypeError(f"tune: record must be a path or None, got {record!r}")
    device, planned = device_here()
    asked, left = passes_of(model, inputs, kwargs, backward)
    if not asked:
        why = f"all calls fall back to torch: {left[0]}" if left else "no call of tconv: see replace_ and enable"
        raise RuntimeError(f"tune: nothing to measure, {why}")
    return tune_passes(asked, device, planned, [str(call) for call in left], record, again, jobs, progress)


def device_here() -> tuple[str, Device]:
    """Returns where to measure: the type of device for torch, and the planner's description.

    Raises:
        RuntimeError: there is no GPU, and no interpreter either, or no Triton.
    """
    try:
        from tconv.launching.arguments import INTERPRET
        from tconv.launching.launch import checked_device
    except ImportError as e:
        raise RuntimeError(f"tune: Triton cannot be imported ({e})") from e
    if INTERPRET:
        from tconv.planning.device import INTERPRETER

        return "cpu", INTERPRETER
    if not torch.cuda.is_available():
        raise RuntimeError("tune: no GPU here, and nothing to measure without one")
    return "cuda", checked_device(torch.cuda.current_device())


def tune_passes(
    asked: Sequence[Asked],
    device: str,
    planned: Device,
    left: Iterable[str] = (),
    record: str | os.PathLike[str] | None = None,
    again: bool = False,
    jobs: int | None = None,
    progress: bool | None = None,
) -> Tuned:
    """Does `tune` for passes.

    Args:
        asked: the passes.
        device: where to put operands.
        planned: the planner's description of the device.
        left: calls that fall back to torch, for the table.
        record, again, jobs, progress: as in `tune`.
    """
    _bar_what_killed()
    where, cells = machine(planned.name), [one.subject.cell() for one in asked]
    known = {cell: found for cell in cells if not again and (found := book().measured_here(where, cell))}
    plans = {
        one.subject: candidates(one.subject, planned, book().barred(where, cell))
        for one, cell in zip(asked, cells, strict=True) if cell not in known
    }  # fmt: skip
    if device == "cuda":
        _compile([(s, plan) for s, some in plans.items() for plan in some], planned, jobs, progress)
    rows: list[Row] = []
    barred: list[str] = []
    skipped: list[str] = []
    try:
        with _quiet(), noting(file.folder()) as note:
            timer = new_timer(device)
            for one, cell in zip(bar(asked, len(asked), progress, "measuring", "pass"), cells, strict=True):
                if cell not in known:
                    out = measure_and_keep(one.subject, cell, plans[one.subject], device, planned, timer, where, note)
                    barred += [f"{one.subject.pass_}: {named(plan.choices)}: {reason}" for plan, reason in out.barred]
                    skipped += out.skipped
                    known[cell] = out.measured
                rows.append(row_of(one, one.subject.launch(planned).call.plan, known[cell]))
    finally:  # also after an interrupt
        forget()
        if record is not None:
            lines = [
                line_of(where, cell, str(one.subject.problem), known[cell])
                for one, cell in zip(asked, cells, strict=True) if known.get(cell, NOTHING) != NOTHING
            ]  # fmt: skip
            file.append(pathlib.Path(record), lines)
    return Tuned(planned.name, tuple(rows), tuple(barred), tuple(dict.fromkeys(skipped)), tuple(left))


def measure_and_keep(
    subject: Subject,
    cell: Cell,
    plans: Sequence[Plan],
    device: str,
    planned: Device,
    timer: Timer,
    where: Machine,
    note: Note,
) -> Outcome:
    """Measures a pass and adds what was seen to the record. Warns of each plan that is barred."""

    def running(plan: Plan | None) -> None:
        note(None if plan is None else barring(where, cell, plan.choices, ""))

    out = measure(subject, plans, planned, device, timer, running)
    lines: list[file.Line] = [barring(where, cell, plan.choices, reason) for plan, reason in out.barred]
    if out.measured != NOTHING:
        lines.append(line_of(where, cell, str(subject.problem), out.measured))
    book().add(lines)
    for plan, reason in out.barred:
        warnings.warn(
            f"tconv bars a plan of {subject.pass_} of {subject.problem}: {named(plan.choices)}: {reason}", stacklevel=2
        )
    return out


def _bar_what_killed() -> None:
    """Bars the plans that earlier processes died of, with a warning."""
    lines = left_behind(file.folder())
    if lines:
        book().add(lines)
        warnings.warn(f"tconv bars {len(lines)} plans that processes died of while they were measured", stacklevel=3)


_one = threading.RLock()  # one thread measures at a time: two would time each other's work


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Measures without a trace: calls are not recorded, nothing is differentiated, and cuDNN's flag is as before.

    Only that flag is touched: what torch.backends.cudnn.flags does besides raises where TF32 is set by torch's newer names.
    """
    _one.acquire()
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = True
    try:
        with recording_apart(), torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        cudnn.benchmark = before
        _one.release()


def on_sight(
    pass_: str,
    g: Geometry,
    operands: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """Measures a pass that a call makes for the first time, for the policy "tune". It raises nothing.

    Each pass is measured once per process, and not while another process measures it, or another thread measures any: this one
    then plans by prediction.
    """
    import filelock

    from tconv.launching.launch import form_of

    x = operands[0]
    forms = tuple(map(form_of, operands))
    subject = Subject(pass_, g.problem, forms, None if bias is None else form_of(bias), form_of(result))
    if any(form.offset for form in forms):
        return
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        device, planned = device_here()
        where, cell = machine(planned.name), subject.cell()
        if (where, cell) in _tried or book().measured_here(where, cell) or not _one.acquire(blocking=False):
            return
        _tried.add((where, cell))
        name = hashlib.sha256(repr((where, cell)).encode()).hexdigest()[:16]
        lock = filelock.FileLock(file.folder() / f"measuring-{name}.lock", timeout=0)
        try:
            file.folder().mkdir(parents=True, exist_ok=True)
            _bar_what_killed()
            with lock, noting(file.folder()) as note, _quiet(), _disable_current_modes(), torch._C.DisableTorchFunction():
                plans = candidates(subject, planned, book().barred(where, cell))
                if device == "cuda":
                    _compile([(subject, plan) for plan in plans], planned, None, False)
                measure_and_keep(subject, cell, plans, device, planned, new_timer(device), where, note)
        except filelock.Timeout:
            return
        except Exception as e:  # no memory for operands, a folder that cannot be written: the call itself goes on
            warnings.warn(f"tconv could not measure {pass_} of {g.problem}: {type(e).__name__}: {e}", stacklevel=2)
        finally:
            _one.release()


first_sight.measure = on_sight
_tried: set[tuple[Machine, Cell]] = set()  # what `on_sight` has measured or could not


def _compile(plans: Sequence[tuple[Subject, Plan]], planned: Device, jobs: int | None, progress: bool | None) -> None:
    """Compiles the kernels of all candidates in parallel. One that cannot be compiled is found out when it is measured."""
    from triton.runtime import driver

    launches = [part for subject, plan in plans for part in subject.launch(planned, plan.choices).parts]
    compile_launches(launches, driver.active.get_current_target(), jobs, progress)


def load_record(path: str | os.PathLike[str]) -> int:
    """Reads a record that came with a model, for this process to choose plans by.

    It counts where the user's own record has nothing, for the GPU of the same name and for the same version of tconv's
    kernels; the driver, torch and Triton may differ. Lines that are cut or foreign are passed over.

    Args:
        path: a file that `tune(record=...)` wrote.
    Returns:
        The number of lines read.
    Raises:
        OSError: the file cannot be read.
    """
    count = book().load(pathlib.Path(path))
    forget()
    return count


def forget() -> None:
    """Forgets the launches that this process has prepared, so that calls are planned anew by what is known now."""
    from tconv.dispatch import entry, epilogues, selection
    from tconv.launching import launch

    launch.forget()
    entry.forget()
    epilogues.forget()
    selection.forget()
