"""A mechanism that no plain kernel needs is checked on the device itself before the planner may choose it."""

import collections
import contextlib
import dataclasses
import functools

import pytest
import torch
from triton.runtime.errors import OutOfResources

import tconv
from tconv.explain import Explanation
from tconv.launching import launch, self_check
from tconv.launching.compiled import run_once
from tconv.launching.dry_run import dry_run
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.launching.variants import float32_precision
from tconv.planning.device import DEPENDENT, DEVICES, INTERPRETER
from tconv.planning.persistent import SPECIALISED
from tconv.planning.problem import Geometry, forward_problem
from tconv.planning.tiles import BF16X6, Tile
from tests import oracle

CPU = torch.device("cpu")
DENSE = forward_problem((32, 256, 14, 14), (256, 256, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
MECHANISMS = ("tma", BF16X6, *([SPECIALISED] if oracle.compiled() else []))  # the interpreter does not run Gluon
PASSES = [(mechanism, pass_) for mechanism in MECHANISMS for pass_ in self_check.KERNELS[mechanism]]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch, device, own_record):
    if device != "cpu":
        pytest.skip("on a GPU tests/test_gpu.py checks it")
    monkeypatch.setattr(self_check, "_works", {})
    monkeypatch.setattr(self_check, "_failures", collections.Counter())


def check(mechanism):
    planned = DEVICES["H100"] if oracle.compiled() else INTERPRETER
    return self_check.works_on(CPU, planned, mechanism)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_is_right_works_and_is_asked_once(mechanism, monkeypatch):
    state = torch.random.get_rng_state()
    with tconv.recording() as calls:
        assert check(mechanism)
    assert calls == []
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(self_check, "run_once", None)
    assert check(mechanism)


@pytest.mark.parametrize("wrong", ["zero", "one element", "unwritten"])
@pytest.mark.parametrize(("mechanism", "pass_"), PASSES)
def test_what_is_wrong_is_barred_with_one_warning(mechanism, pass_, wrong, monkeypatch):
    def broken(prepared, pointers):
        plan = prepared.call.plan
        ours = plan.pass_ == pass_ and plan.mechanism == mechanism
        if not ours or wrong != "unwritten":
            run_once(prepared, pointers)
        if ours and wrong == "zero":
            pointers[-1].zero_()
        elif ours and wrong == "one element":
            pointers[-1].as_strided((1,), (1,), 77).add_(1)  # of the result or the workspace, whose memory orders are the same

    monkeypatch.setattr(self_check, "run_once", broken)
    with pytest.warns(UserWarning, match=f"will not use {mechanism} on cpu: its results differ"):
        assert not check(mechanism)
    assert not check(mechanism)  # without another warning, which would be an error


@pytest.mark.parametrize("waits", [True, False])
def test_a_chain_of_dependent_launches_is_checked(waits, monkeypatch):
    """Here launches run one after another. One that did not wait would find NaN in what it reads."""
    if not oracle.compiled():
        pytest.skip("the interpreter has no such launches")

    def early(prepared, pointers):
        if prepared.constants["DEPENDENT"] and not waits:
            pointers = (torch.full_like(pointers[0], float("nan")), pointers[1])
        run_once(prepared, pointers)

    monkeypatch.setattr(self_check, "CHAINED", 2**11)
    monkeypatch.setattr(self_check, "REPEATS", 2)
    monkeypatch.setattr(self_check, "run_once", early)
    barred = pytest.warns(UserWarning, match="will not use dependent launch on cpu: its results differ")
    with contextlib.nullcontext() if waits else barred:
        assert check(DEPENDENT) == waits


def test_old_drivers_have_no_dependent_launches(monkeypatch):
    monkeypatch.setattr(self_check, "_driver", lambda: 12020)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(self_check, "capturing", lambda device: False)
    with pytest.warns(UserWarning, match="older than CUDA 12.3"):
        assert not self_check.works_on(torch.device("cuda", 0), DEVICES["H100"], DEPENDENT)


def test_other_checks_do_without_dependent_launches(monkeypatch):
    """A device on which these are wrong must not lose what is right."""
    seen = []

    def watched(prepared, pointers):
        seen.append(prepared.constants)
        run_once(prepared, pointers)

    monkeypatch.setattr(self_check, "run_once", watched)
    assert check("tma")
    assert not any(constants.get("DEPENDENT") for constants in seen)


def failing(monkeypatch, error):
    def fails(launch, pointers):
        raise error

    monkeypatch.setattr(self_check, "run_once", fails)


def test_what_fails_every_time_is_barred(monkeypatch):
    with monkeypatch.context() as m:
        failing(m, OutOfResources(300000, 232448, "shared memory"))
        with pytest.warns(UserWarning, match="will not use tma on cpu: OutOfResources: out of resource: shared memory"):
            assert not check("tma")
    assert not check("tma")


def test_an_error_that_may_not_recur_is_not_remembered_before_it_has_recurred(monkeypatch):
    with monkeypatch.context() as m:
        failing(m, torch.OutOfMemoryError("full"))
        before = self_check.undecided()
        assert not check("tma")
        assert self_check.undecided() == before + 1
    assert check("tma")
    with monkeypatch.context() as m:
        failing(m, RuntimeError("busy"))
        for _ in range(self_check.ATTEMPTS - 1):
            assert not check(BF16X6)
        with pytest.warns(UserWarning, match="will not use bf16x6 on cpu: RuntimeError: busy"):
            assert not check(BF16X6)
    assert not check(BF16X6)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_answer_is_kept_for_other_processes(mechanism, monkeypatch, own_record):
    assert self_check.standing(mechanism) == "untested"
    assert check(mechanism)
    assert self_check.standing(mechanism) == "proven here"
    other_process(monkeypatch, own_record)
    monkeypatch.setattr(self_check, "run_once", None)  # nothing runs
    simulated = oracle.compiled()  # an H100, which this machine is not
    assert self_check.standing(mechanism) == ("proven elsewhere" if simulated else "proven here")
    assert check(mechanism)


def other_process(monkeypatch, own_record):
    monkeypatch.setattr(self_check, "_works", {})
    own_record()


def test_what_is_wrong_stays_barred_in_other_processes_without_a_warning(monkeypatch, own_record):
    def broken(prepared, pointers):
        run_once(prepared, pointers)
        if prepared.call.plan.mechanism == "tma":
            pointers[-1].zero_()

    with monkeypatch.context() as m:
        m.setattr(self_check, "run_once", broken)
        with pytest.warns(UserWarning, match="will not use tma on cpu: its results differ"):
            assert not check("tma")
    other_process(monkeypatch, own_record)
    assert not check("tma")
    assert check(BF16X6)


@pytest.mark.parametrize("change", ["gpu", "driver", "triton", "kernels"])
def test_an_answer_from_elsewhere_is_asked_again(change, monkeypatch, own_record):
    assert check("tma")
    other_process(monkeypatch, own_record)
    here = self_check.machine("interpreter")
    monkeypatch.setattr(self_check, "machine", lambda name: dataclasses.replace(here, **{change: "other"}))
    assert self_check.standing("tma") == "proven elsewhere"
    failing(monkeypatch, OutOfResources(300000, 232448, "shared memory"))
    with pytest.warns(UserWarning, match="will not use tma on cpu"):
        assert not check("tma")
    assert self_check.standing("tma") == "barred here"


def test_errors_that_may_not_recur_are_not_kept_for_other_processes(monkeypatch, own_record):
    with monkeypatch.context() as m:
        failing(m, RuntimeError("busy"))
        for _ in range(self_check.ATTEMPTS - 1):
            assert not check("tma")
        with pytest.warns(UserWarning, match="will not use tma on cpu: RuntimeError: busy"):
            assert not check("tma")
    other_process(monkeypatch, own_record)
    assert check("tma")


def test_explain_says_how_a_mechanism_stands(own_record):
    fprop = launches(DEVICES["H200"], torch.bfloat16)[0].call
    assert fprop.plan.mechanism == "tma"
    assert str(Explanation((fprop,))) == f"{fprop}; tma is untested"
    split = launches(DEVICES["H200"], torch.bfloat16)[2].call
    assert split.plan.splits > 1
    assert str(Explanation((split,))).endswith("; dependent launch is untested")


def test_a_plan_made_when_nothing_could_be_told_is_not_kept(monkeypatch):
    key, g = ("fprop", Geometry(DENSE, True)), []
    monkeypatch.setattr(launch, "_prepared", {})

    def make(tells):
        if not tells:
            self_check._cannot_tell()
        g.append(tells)
        return g

    assert launch.lookup(key, lambda: make(False)) is launch.lookup(key, lambda: make(True)) is launch.lookup(key, None)
    assert g == [False, True]


def test_a_dry_run_launches_nothing(monkeypatch):
    failing(monkeypatch, AssertionError("launched"))
    with dry_run(DEVICES["H200"]):
        assert check("tma")
    monkeypatch.setitem(self_check._works, (CPU, "tma"), False)
    with dry_run(DEVICES["H200"]):
        assert not check("tma")


def test_nothing_is_checked_nor_remembered_in_a_capture(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(self_check, "capturing", lambda device: True)
        assert not check("tma")
    assert check("tma")


@pytest.mark.parametrize("choices", [{"splits": 100}, {"tile": Tile(16, 16, 16)}, {"staged": False}], ids=str)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_nothing_is_checked_nor_remembered_while_a_plan_is_forced(mechanism, choices):
    with tconv.force(**choices):
        assert not check(mechanism)
    assert check(mechanism)


def launches(device, dtype):
    x, w, y = (shaped(DENSE.shape(which), True, dtype) for which in "xwy")
    return (
        prepare_gather("fprop", DENSE, x, w, None, y, device),
        prepare_gather("dgrad", DENSE, y, w, None, x, device),
        prepare_wgrad(DENSE, y, x, w, device),
    )


def asked(answers, name):
    answers.append(name)
    return False


@pytest.mark.parametrize(("dtype", "mechanism"), [(torch.bfloat16, "tma"), (torch.float32, BF16X6)])
def test_plans_use_what_works_and_list_what_does_not(dtype, mechanism):
    names = []
    barring = dataclasses.replace(DEVICES["H200"], check=functools.partial(asked, names))
    with float32_precision(False):
        chosen, barred = launches(DEVICES["H200"], dtype), launches(barring, dtype)
    used = [one.call.plan for one in chosen]
    assert any(plan.mechanism == mechanism for plan in used)
    assert mechanism in names
    assert set(names) <= {mechanism, SPECIALISED, DEPENDENT}
    for plan, refused in zip(used, barred, strict=True):
        other = refused.call.plan
        assert other.mechanism == ""
        if plan.mechanism:
            listed = next(p for p in other.others if p.mechanism)
            assert listed.mechanism in (mechanism, SPECIALISED)
            assert f"not chosen: {listed.mechanism} has not passed its check on this device; predicted" in listed.reason
            assert listed.cost.seconds < other.cost.seconds
            assert f"    {listed}" in str(Explanation((refused.call,)))


def test_plain_kernels_ask_nothing():
    def never(name):
        raise AssertionError(name)

    unasked = dataclasses.replace(DEVICES["A100"], check=never)
    assert all(one.call.plan.mechanism == "" for one in launches(unasked, torch.bfloat16))
