"""The plans of a pass that are worth measuring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tconv.planning.device import Device
from tconv.planning.plan import KERNELS, Forced, Plan
from tconv.planning.tiles import BF16X6
from tconv.tune.subject import Subject

WITHIN = 1.6  # how many times the best plan's predicted time a candidate's may be
MOST = 8  # candidates of a pass, unless it has more mechanisms
ANY = Forced(None, None, None, None, None)


def candidates(subject: Subject, device: Device, barred: Iterable[Forced] = ()) -> list[Plan]:
    """Returns the plans of a pass to measure: the planner's choice first, the others by predicted time.

    They are the plans predicted within WITHIN times the best, with half and double the number of splits of the planner's
    choice, and the best plan of each kernel, of copied operands and of each precision, however slow it is predicted to be.
    Plans that are barred or that rely on a mechanism that does not work on the device are left out.

    Args:
        subject: the pass.
        device: the device.
        barred: the choices of plans not to consider.
    """
    barred, first = set(barred), _plan(subject, device, None)
    assert first is not None
    found: dict[Forced, Plan] = {first.choices: first}

    def add(choices: Forced) -> Plan | None:
        plan = _plan(subject, device, choices)
        if plan is not None:
            found.setdefault(plan.choices, plan)
        return plan

    for kernel in KERNELS[subject.pass_]:
        for staged in (False, True):
            for precision in ("ieee", BF16X6):
                best = add(replace(ANY, kernel=kernel, staged=staged, precision=precision))
                for tile in best.tiles if best else ():
                    add(Forced(kernel, tile, None, staged, precision))
    for splits in _other_splits(first):
        add(replace(first.choices, splits=splits))
    plans = sorted(found.values(), key=_time)
    plans = [plan for plan in plans if plan.choices not in barred and device.works(plan.mechanism)]
    best_of: dict[tuple[str, bool, str], Plan] = {}
    for plan in plans:
        best_of.setdefault((plan.kernel, bool(plan.staged), plan.precision), plan)
    chosen = [plan for plan in plans if plan.choices == first.choices]
    chosen += [plan for plan in best_of.values() if plan not in chosen]
    near = [plan for plan in plans if plan not in chosen and _time(plan) <= WITHIN * _time(plans[0])]
    near.sort(key=lambda plan: (plan.kernel, plan.tile) != (first.kernel, first.tile))  # other splits before other tiles
    chosen += near[: max(0, MOST - len(chosen))]
    return chosen[:1] + sorted(chosen[1:], key=_time)


def _plan(subject: Subject, device: Device, choices: Forced | None) -> Plan | None:
    """Returns the plan under some choices, None for the planner's own; None if there is no such plan."""
    try:
        plan: Plan = subject.launch(device, choices).call.plan
    except ValueError:
        return None
    return plan


def _time(plan: Plan) -> float:
    """Returns the predicted time in seconds; zero in the interpreter, where nothing is predicted."""
    return plan.cost.seconds if plan.cost else 0.0


def _other_splits(plan: Plan) -> set[int]:
    """Returns the numbers of splits that the kernel can have nearest to half and to double the plan's."""
    return {min(plan.parts, key=lambda n: abs(n - wanted)) for wanted in (plan.splits // 2, plan.splits * 2) if plan.parts}
