"""Policies: what runs where torch's kernel was measured to be faster, and what is measured when it is first seen."""

from __future__ import annotations

import pickle
import threading

import filelock
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tconv
from tconv.dispatch.selection import choice, select
from tconv.launching import launch
from tconv.records import file
from tconv.tune import measure, tuner
from tests.test_tune import own, ran, timed

__all__ = ["own", "timed"]  # fixtures


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(tuner, "_tried", set())


def replaced(policy):
    layer = torch.nn.Conv1d(4, 4, 2, bias=False)
    tconv.replace_(layer, policy=policy)
    return layer, torch.randn(1, 4, 6)


SLOWER = "conv1d: torch (measured: tconv 50.0 us, torch 10.0 us)"


@pytest.mark.parametrize("policy", ["never", "Auto", "", None, True])
def test_a_policy_that_does_not_exist_is_named(policy):
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 2))
    for call in (tconv.enable, lambda **more: tconv.enabled(**more).__enter__()):
        with pytest.raises(ValueError, match=f"policy must be one of .*'auto', 'always', 'tune'.*, got {policy!r}"):
            call(policy=policy)
    with pytest.raises(ValueError, match=f"tconv.replace_: policy must be one of .*, got {policy!r}"):
        tconv.replace_(model, policy=policy)
    assert type(model[0]) is torch.nn.Conv1d
    assert not tconv.is_enabled()


@pytest.mark.parametrize(("policy", "ours"), [("auto", False), ("always", True), ("tune", False)])
def test_where_torch_is_faster(timed, policy, ours):
    layer, x = replaced(policy)
    timed(torch=1e-5)
    tconv.tune(layer, x, backward=False)
    for _ in range(4):
        assert ran(layer, x).ours == ours
    for _ in range(2):
        with tconv.enabled(policy=policy), tconv.recording() as calls:
            torch.nn.functional.conv1d(x, layer.weight.detach())
        assert [call.ours for call in calls] == [ours]


def test_the_policy_stays_with_a_copy_and_goes_with_restore(timed):
    layer, x = replaced("always")
    timed(torch=1e-5)
    tconv.tune(layer, x, backward=False)
    assert ran(pickle.loads(pickle.dumps(layer)), x).ours
    tconv.restore_(layer)
    assert not any("tconv" in name for name in vars(layer))
    tconv.replace_(layer)
    assert str(ran(layer, x)) == SLOWER


def test_of_several_enables_the_stronger_policy_counts():
    auto, always, tune = (select(policy=policy) for policy in ("auto", "always", "tune"))
    narrow = select(ranks=(2,), policy="always")
    assert choice([auto, auto]) is choice([auto, select(ranks=(1,))])
    for selections, one, two in [
        ([auto], "auto", "auto"), ([auto, tune], "tune", "tune"), ([tune, always], "always", "always"),
        ([auto, narrow], "auto", "always"),
    ]:  # fmt: skip
        found = choice(selections)
        assert [found.policy(("fprop",), rank, torch.float32) for rank in (1, 2)] == [one, two]
    assert str(narrow) == "ranks=(2,), policy='always'"


def test_a_models_policy_holds_inside_it_only(timed):
    layer, x = torch.nn.Conv1d(4, 4, 2, bias=False), torch.randn(1, 4, 6)
    timed(torch=1e-5)
    with tconv.enabled():
        tconv.tune(layer, x, backward=False)
    with tconv.enabled(), tconv.enabled(layer, policy="always"), tconv.recording() as calls:
        layer(x)
        torch.nn.functional.conv1d(x, layer.weight)
    assert [call.ours for call in calls] == [True, False]


# --- measured on first sight ---


def test_tune_measures_what_it_first_sees_once(own, timed):
    layer, x = replaced("tune")
    timer = timed(packed=1e-5)
    assert ran(layer, x).plan.kernel == "packed"
    count = len(timer.asked)
    assert count
    layer(x)
    assert len(timer.asked) == count
    own()
    layer(x)
    assert len(timer.asked) == count  # another process finds it
    assert file.own().read_text().count('"ms"') == 1


def test_tune_measures_the_backward_pass_of_a_checkpoint_once(timed):
    layer, x = replaced("tune")
    timer = timed(packed=1e-5)
    for _ in range(2):
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    passes = [run for run in timer.asked if run == "torch"]
    assert len(passes) == 3 * 13  # fprop, dgrad and wgrad, each RUNS + LAST times


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_other_policies_do_not_measure(timed, policy):
    layer, x = replaced(policy)
    timer = timed()
    with torch.backends.cudnn.flags(benchmark=True):  # which counts for tensors on a GPU
        layer(x)
    assert timer.asked == []


def test_torchs_own_flag_measures_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(launch.first_sight, "measure", lambda *args: seen.append(args[0]))
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    g = tconv.planning.problem.Geometry(None, False)

    class OnGpu:
        is_cuda = True

        def get_device(self):
            return 0

    for flag in (False, True):
        with torch.backends.cudnn.flags(benchmark=flag):
            launch._measure_first("fprop", g, (OnGpu(), None), None, None)
    assert seen == ["fprop"]


@pytest.mark.parametrize("kept", ["capture", "deterministic", "forced", "dry"])
def test_nothing_is_measured_where_it_cannot_be_or_must_not(timed, monkeypatch, kept):
    layer, x = replaced("tune")
    timer = timed()
    if kept == "capture":
        monkeypatch.setattr(launch, "capturing", lambda device: True)
        layer(x)
    elif kept == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            layer(x)
        finally:
            torch.use_deterministic_algorithms(False)
    elif kept == "forced":
        with tconv.force(kernel="gather"):
            layer(x)
    else:
        tconv.explain(layer, x)
    assert timer.asked == []


def test_what_another_process_measures_is_planned_by_prediction(timed, monkeypatch):
    layer, x = replaced("tune")
    timer = timed(packed=1e-5)
    acquire = filelock.FileLock.acquire

    def taken(self, *args, **kwargs):
        if "measuring-" in str(self.lock_file):
            raise filelock.Timeout(self.lock_file)
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", taken)
    assert ran(layer, x).plan.kernel == "gather"
    assert timer.asked == []


def test_a_call_goes_on_if_it_cannot_be_measured(monkeypatch):
    layer, x = replaced("tune")

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuner, "measure_and_keep", fails)
    with pytest.warns(UserWarning, match="could not measure fprop of .*: OutOfMemoryError: CUDA out of memory"):
        assert ran(layer, x).plan.kernel == "gather"
    assert ran(layer, x).plan.kernel == "gather"  # without another warning, which would be an error


def test_what_was_wrong_does_not_run_under_any_policy(own, timed, monkeypatch):
    """All plans are barred: torch runs, though "always" and deterministic algorithms ask for ours."""

    def wrong(*_):
        raise measure.Wrong("off by 3")

    monkeypatch.setattr(measure, "_checked", wrong)
    timed(torch=3e-5)
    layer, x = replaced("always")
    with pytest.warns(UserWarning, match="off by 3"):
        tconv.tune(layer, x, backward=False)
    assert not ran(layer, x).ours
    torch.use_deterministic_algorithms(True)
    try:
        assert not ran(replaced("auto")[0], x).ours
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_leave_no_trace(timed):
    layer, x = replaced("auto")
    timed(torch=1e-5)
    tconv.tune(layer, x, backward=False)
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            assert [ran(layer, x).ours for _ in range(3)] == [deterministic] * 3
        finally:
            torch.use_deterministic_algorithms(False)


class TorchsBackward:
    """Times by which torch's kernels are faster at both gradients only."""

    def __call__(self, device):
        return self

    def once(self, run):
        return 1e-5 if (run.choices is None) == (run.subject.pass_ != "fprop") else 5e-5


def test_torchs_gradients_within_autocast_have_the_forwards_dtype(own, timed, monkeypatch):
    """torch's own backward does not autocast, and the kernel that a record chooses must not either."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(tuner, "new_timer", TorchsBackward())
    layer, x = replaced("auto")
    x.requires_grad_()
    tconv.tune(layer, x)
    y = layer(x)
    dy = torch.randn_like(y)
    with torch.autocast("cpu", dtype=torch.bfloat16), tconv.recording() as calls:
        got = torch.autograd.grad(y, (x, layer.weight), dy)
    assert not any(call.ours for call in calls)
    right = torch.autograd.grad(torch.nn.functional.conv1d(x, layer.weight), (x, layer.weight), dy)
    for g, r in zip(got, right, strict=True):
        torch.testing.assert_close(g, r)


def test_what_is_measured_within_autocast_is_the_pass_itself(own, timed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    timed(torch=9e-5)
    layer, x = replaced("tune")
    x.requires_grad_()
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.autograd.grad(y, (x, layer.weight), torch.randn_like(y))
    assert '"barred"' not in file.own().read_text()
    assert file.own().read_text().count('"ms"') == 3


def test_each_gradient_has_the_policy_that_selects_it(timed):
    timed(torch=1e-5)
    layer, x = torch.nn.Conv1d(4, 4, 2, bias=False), torch.randn(1, 4, 6, requires_grad=True)
    with tconv.enabled():
        tconv.tune(layer, x)
    with tconv.enabled(), tconv.enabled(operations=("dgrad",), policy="always"), tconv.recording() as calls:
        layer(x).backward(torch.randn(1, 4, 5))
    ours = {call.operation: call.ours for call in calls}
    assert ours["dgrad"]
    assert not any(is_ours for operation, is_ours in ours.items() if operation != "dgrad")


def test_replacing_again_changes_the_policy(timed):
    layer, x = replaced("auto")
    timed(torch=1e-5)
    tconv.tune(layer, x, backward=False)
    for policy, ours in (("always", True), ("auto", False)):
        tconv.replace_(layer, policy=policy)
        assert ran(layer, x).ours == ours


def test_two_threads_that_measure_leave_cudnns_flag_as_it_was(timed, monkeypatch):
    """One measures, the other plans by prediction meanwhile."""
    timer, inside, go = timed(torch=9e-5), threading.Event(), threading.Event()
    once = timer.once

    def waiting(run):
        inside.set()
        assert go.wait(60)
        return once(run)

    monkeypatch.setattr(timer, "once", waiting)
    before = torch.backends.cudnn.benchmark
    first, x = replaced("tune")
    thread = threading.Thread(target=first, args=(x,))
    thread.start()
    assert inside.wait(60)
    second = torch.nn.Conv1d(8, 4, 2, bias=False)
    tconv.replace_(second, policy="tune")
    assert ran(second, torch.randn(1, 8, 6)).ours
    go.set()
    thread.join()
    assert torch.backends.cudnn.benchmark == before
