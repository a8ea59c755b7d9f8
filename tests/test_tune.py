"""`tune` measures right candidates only, keeps what it saw, leaves the model alone, and what it kept is what runs.

A stand-in tells the times, so that every choice is known beforehand; all other code is what runs on a GPU.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import types
import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

import tconv
from tconv.launching import self_check
from tconv.launching.arguments import INTERPRET
from tconv.launching.launch import form_of
from tconv.launching.memory_format import shaped
from tconv.planning.device import DEVICES, INTERPRETER
from tconv.planning.plan import Forced
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import BF16X6
from tconv.records import book, file
from tconv.records.book import Book
from tconv.tune import tuner
from tconv.tune.__main__ import main
from tconv.tune.candidates import MOST, WITHIN, candidates
from tconv.tune.marker import left_behind, noting
from tconv.tune.measure import HANGS, LAST, RUNS, TooLarge, _must_be_small
from tconv.tune.subject import Subject, passes_of
from tests import parity

TORCH = None  # as the choices of torch's kernel


class Timer:
    """Tells times by kernel, without making the calls."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def __call__(self, device):
        return self

    def once(self, run):
        kernel = "torch" if run.choices is TORCH else run.choices.kernel
        self.asked.append(kernel)
        told = self.times.get(kernel, 5e-5)
        if isinstance(told, BaseException):
            raise told
        return told


@pytest.fixture(autouse=True)
def own(own_record, device):
    """A record of this test's own, where the kernels run in the interpreter."""
    if device != "cpu" or not INTERPRET:
        pytest.skip("the stand-in's plans are the interpreter's")
    return own_record


@pytest.fixture
def timed(monkeypatch):
    def use(**times):
        timer = Timer(**times)
        monkeypatch.setattr(tuner, "new_timer", timer)
        return timer

    return use


def small():
    return tconv.Conv1d(4, 4, 2, bias=False), torch.randn(1, 4, 6)


def ran(layer, x):
    with tconv.recording() as calls:
        y = layer(x)
    parity.assert_same(y, torch.nn.functional.conv1d(x, layer.weight))
    return calls[-1]


# --- what is chosen ---


def test_the_fastest_plan_runs_from_then_on_and_in_other_processes(own, timed):
    layer, x = small()
    assert ran(layer, x).plan.kernel == "gather"
    timed(packed=1e-5, gather=2e-5, torch=3e-5)
    tuned = tconv.tune(layer, x, backward=False)
    for _ in range(2):
        plan = ran(layer, x).plan
        assert plan.kernel == "packed"
        assert plan.reason.startswith("measured: tconv 10.0 us, torch 30.0 us; ")
        own()
    (row,) = tuned.rows
    assert (row.torch, row.guess, row.best, row.seconds) == (3e-5, 2e-5, 1e-5, 1e-5)
    assert row.choice.startswith("packed ")
    assert row.guessed.startswith("gather ")
    assert (tuned.before, tuned.after) == (3e-5, 1e-5)


def test_what_torch_is_faster_at_is_torchs_and_last_calls_says_so(own, timed):
    layer, x = small()
    timed(torch=1e-5)
    (row,) = tconv.tune(layer, x, backward=False).rows
    assert row.choice == "torch"
    for _ in range(4):  # the slow path, the fast path's first call, and two that it repeats
        call = ran(layer, x)
        assert not call.ours
        assert str(call) == "conv1d: torch (measured: tconv 50.0 us, torch 10.0 us)"
    assert str(tconv.explain(layer, x)) == "conv1d: torch (measured: tconv 50.0 us, torch 10.0 us)"


def test_each_pass_has_its_own_choice(timed):
    layer, x = small()
    timed(torch=2e-5, wgrad=1e-5, packed=1e-5)
    rows = tconv.tune(layer, x).rows
    assert [(row.pass_, row.choice.split()[0]) for row in rows] == [
        ("fprop", "packed"),
        ("dgrad", "packed"),
        ("wgrad", "wgrad"),
    ]
    timed(torch=2e-5, wgrad=3e-5, packed=1e-5, packed_wgrad=3e-5)
    tconv.tune(layer, x, again=True)
    w = layer.weight.detach().clone().requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.conv1d(x, w).square().sum(), w)[0]
    for _ in range(4):
        with tconv.recording() as calls:
            (dw,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
        parity.assert_same(dw, expected)
        assert [call.ours for call in calls] == [True, False]
        assert calls[1].reason == "measured: tconv 30.0 us, torch 20.0 us"


def test_enable_leaves_the_slower_passes_to_torch(timed):
    layer, x = torch.nn.Conv1d(4, 4, 2), torch.randn(1, 4, 6)
    timed(torch=2e-5, packed=1e-5, wgrad=3e-5, packed_wgrad=3e-5)

    def calls():
        with tconv.enabled(), tconv.recording() as found:
            layer(x.requires_grad_()).square().sum().backward()
        return [(call.operation, call.ours) for call in found]

    with tconv.enabled():
        tconv.tune(layer, x)
    for _ in range(2):
        assert calls() == [("fprop", True), ("dgrad", True), ("aten::convolution_backward", False)]
    timed(torch=1e-6)
    with tconv.enabled():
        tconv.tune(layer, x, again=True)
    for _ in range(2):
        assert calls() == [("aten::_convolution", False), ("aten::convolution_backward", False)]


def test_fewer_and_fewer_are_timed(timed):
    layer, x = small()
    timer = timed(gather=1e-5, packed=1.1e-5, tma=3e-5, torch=2e-5)
    tconv.tune(layer, x, backward=False)
    runs = {kernel: timer.asked.count(kernel) for kernel in set(timer.asked)}
    assert runs["tma"] == RUNS
    assert runs["packed"] == 2 * runs["tma"] // RUNS * (RUNS + LAST) or runs["packed"] % (RUNS + LAST) == 0
    assert runs["torch"] == RUNS + LAST


def test_what_is_slow_is_timed_once(timed):
    layer, x = small()
    timer = timed(gather=1.0, packed=1.0, tma=1.0, torch=1.0)
    tconv.tune(layer, x, backward=False)
    assert timer.asked.count("torch") <= 2


def test_what_is_known_is_not_measured_again_unless_asked(timed):
    layer, x = small()
    timer = timed()
    first = tconv.tune(layer, x, backward=False)
    timer.asked.clear()
    assert tconv.tune(layer, x, backward=False).rows == first.rows
    assert timer.asked == []
    tconv.tune(layer, x, backward=False, again=True)
    assert timer.asked


def test_a_record_to_ship_is_what_another_machine_loads(own, timed, tmp_path):
    layer, x = small()
    timed(packed=1e-5)
    tconv.tune(layer, x, record=tmp_path / "model.jsonl")
    file.own().unlink()
    own()
    assert ran(layer, x).plan.kernel == "gather"
    assert tconv.load_record(tmp_path / "model.jsonl") == 3
    assert ran(layer, x).plan.kernel == "packed"
    with pytest.raises(FileNotFoundError):
        tconv.load_record(tmp_path / "none.jsonl")


EVERY = {
    "transposed, with a bias": (lambda: tconv.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 3, 3)),
    "depthwise": (lambda: tconv.Conv1d(4, 4, 3, groups=4), (2, 4, 9)),
    "3-D": (lambda: tconv.Conv3d(2, 4, (1, 2, 2), stride=2), (1, 2, 2, 4, 4)),
    "a patch embedding": (lambda: tconv.Conv2d(3, 8, 2, stride=2), (2, 3, 4, 4)),
    "channels_last": (lambda: tconv.Conv2d(8, 8, 3).to(memory_format=torch.channels_last), (1, 8, 4, 5)),
    "in fp16": (lambda: tconv.Conv2d(4, 4, 1).half(), (1, 4, 3, 5)),
    "unbatched": (lambda: tconv.Conv1d(4, 4, 2), (4, 6)),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_pass_that_was_measured_is_found_again(timed, monkeypatch, name):
    make, shape = EVERY[name]
    layer = make()
    x = torch.randn(shape).to(layer.weight.dtype).requires_grad_()
    monkeypatch.setattr(tuner, "candidates", lambda *args: candidates(*args)[:1])
    timed(torch=1.0)
    assert len(tconv.tune(layer, x).rows) == 3
    with tconv.recording() as calls:
        y = layer(x)
        y.backward(torch.ones_like(y))
    found = [call for call in calls if call.operation != "bias"]
    assert len(found) == 3
    for call in found:
        assert call.reason.startswith("measured: tconv 50.0 us, torch 1000000.0 us; ")


# --- candidates ---


DENSE = forward_problem((32, 128, 28, 28), (128, 128, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def dense(pass_, dtype=torch.bfloat16, strides=True, problem=DENSE):
    x, w, y = (form_of(shaped(torch.Size(problem.shape(which)), strides, dtype)) for which in "xwy")
    operands, result = ((x, w), y) if pass_ == "fprop" else ((y, x), w)
    return Subject(pass_, problem, operands, None, result)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("pass_", ["fprop", "wgrad"])
def test_candidates_are_of_every_mechanism_and_near_the_best(pass_, channels_last):
    subject, device = dense(pass_, strides=channels_last), DEVICES["H200"]
    plans = candidates(subject, device)
    assert plans[0] == subject.launch(device).call.plan
    kernels = {"gather", "packed", "tma"} if pass_ == "fprop" else {"wgrad", "tma_wgrad", "persistent_wgrad"}
    kernels |= {"persistent"} if pass_ == "fprop" and channels_last else set()  # it stores boxes, which are channels_last
    assert {plan.kernel for plan in plans} >= kernels
    assert {bool(plan.staged) for plan in plans} == ({False} if channels_last else {True, False})
    assert len({plan.choices for plan in plans}) == len(plans) <= MOST
    groups = [(plan.kernel, bool(plan.staged), plan.precision) for plan in plans]
    best = min(plan.cost.seconds for plan in plans)
    for plan, group in zip(plans[1:], groups[1:], strict=True):
        assert plan.cost.seconds <= WITHIN * best or groups.count(group) == 1 or groups.index(group) == plans.index(plan)


def test_true_fp32_has_candidates_in_both_precisions():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        found = {plan.precision for plan in candidates(dense("fprop", torch.float32), DEVICES["H200"])}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert found == {"", BF16X6}


def test_what_is_barred_is_no_candidate():
    subject, device = dense("fprop"), DEVICES["H200"]
    plans = candidates(subject, device)
    assert plans[0].choices not in {plan.choices for plan in candidates(subject, device, [plans[0].choices])}


def test_every_part_of_every_candidate_is_compiled_in_parallel(monkeypatch):
    subject, device = dense("fprop", strides=False), DEVICES["H200"]
    plans, compiled = candidates(subject, device), []
    stub = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=lambda: "the GPU here"))
    monkeypatch.setattr("triton.runtime.driver", stub)
    monkeypatch.setattr(tuner, "compile_launches", lambda *args: compiled.append(args))
    tuner._compile([(subject, plan) for plan in plans], device, 3, False)
    ((launches, *rest),) = compiled
    assert rest == ["the GPU here", 3, False]
    ours = {launch.call.plan.choices for launch in launches if launch.call.operation == "fprop"}
    assert ours == {plan.choices for plan in plans}
    assert any(launch.call.operation == "copy" for launch in launches)


# --- what is left alone ---


def test_the_model_is_as_before(timed):
    timed()
    model = torch.nn.Sequential(tconv.Conv1d(4, 4, 2), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    x = torch.randn(2, 4, 6)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), torch.backends.cudnn.benchmark, tconv.last_calls()
    hooks = len(torch.nn.modules.module._global_forward_pre_hooks), len(torch.nn.modules.module._global_forward_hooks)
    tconv.tune(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.backends.cudnn.benchmark, tconv.last_calls()) == states[1:]
    assert hooks == (len(torch.nn.modules.module._global_forward_pre_hooks), len(torch.nn.modules.module._global_forward_hooks))


def test_layers_are_named_and_equal_passes_measured_once():
    model = torch.nn.Sequential(tconv.Conv1d(4, 4, 3, padding=1), tconv.Conv1d(4, 4, 3, padding=1), tconv.Conv1d(4, 2, 1))
    asked, left = passes_of(model, (torch.randn(1, 4, 6),), {}, True)
    assert left == []
    assert [(one.layers, one.subject.pass_, one.calls) for one in asked if one.subject.pass_ == "fprop"] == [
        (["0", "1"], "fprop", 2), (["2"], "fprop", 1),
    ]  # fmt: skip
    assert {(tuple(one.layers), one.calls) for one in asked if one.subject.pass_ == "wgrad"} == {(("0", "1"), 2), (("2",), 1)}


def test_a_model_that_raises_raises_its_own_error_and_leaves_nothing(own, timed):
    timed()

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = small()[0]

        def forward(self, x):
            self.layer(x)
            raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        tconv.tune(Broken(), torch.randn(1, 4, 6))
    assert not torch.nn.modules.module._global_forward_hooks
    assert not file.own().exists()


# --- bad input and faults ---


@pytest.mark.parametrize(
    ("model", "inputs", "keywords", "error", "text"),
    [
        (3, (), {}, TypeError, "tune: model must be a module or a function, got int"),
        (tconv.Conv1d, (), {}, TypeError, "got the class Conv1d"),
        (lambda x: x, (torch.ones(1),), {"jobs": 0}, ValueError, "jobs must be a positive int or None, got 0"),
        (lambda x: x, (torch.ones(1),), {"record": 3}, TypeError, "tune: record must be a path or None, got 3"),
        (lambda x: x, (torch.ones(1),), {}, RuntimeError, "nothing to measure, no call of tconv"),
        (torch.nn.Conv1d(4, 4, 2), (torch.ones(1, 4, 6),), {}, RuntimeError, "nothing to measure, no call of tconv"),
        (tconv.Conv1d(4, 4, 2).to("meta"), (torch.ones(1, 4, 6, device="meta"),), {}, RuntimeError, "device meta"),
        (tconv.Conv1d(4, 4, 2), (torch.ones(1, 4, 6, device="meta"),), {}, RuntimeError, "meta"),
        (tconv.Conv1d(4, 4, 2), (torch.ones(1, 3, 6),), {}, RuntimeError, "expected input"),
    ],
)
def test_bad_input(model, inputs, keywords, error, text):
    with pytest.raises(error, match=text):
        tconv.tune(model, *inputs, **keywords)


def test_without_a_gpu_it_says_so():
    code = "import torch, tconv; tconv.tune(tconv.Conv1d(1, 1, 1), torch.ones(1, 1, 1))"
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "RuntimeError: tune: no GPU here" in done.stderr


RUN_POISONED = self_check.run_poisoned


def spoiled(monkeypatch, kernel, do):
    def run(launch, operands, more, result):
        RUN_POISONED(launch, operands, more, result)
        if launch.call.plan.kernel == kernel:
            do(result)

    monkeypatch.setattr(self_check, "run_poisoned", run)


def raising(error):
    def do(result):
        raise error

    return do


def set_nan(result):
    result.view(-1)[3] = float("nan")


def off(result):
    result.view(-1)[3] += result.abs().max() / 50


def noise(result):
    result.view(-1)[3] *= 1 + 1e-3 * random.random()


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (off, "Wrong: its result is off by"), (set_nan, "Wrong: its result is off by"), (noise, "other bits the second time"),
        (raising(OutOfResources(300000, 232448, "shared memory")), "OutOfResources"),
        (raising(ValueError("no such box")), "no such box"),
    ],
)  # fmt: skip
def test_a_candidate_that_is_wrong_is_barred_for_good_with_one_warning(own, timed, monkeypatch, do, why):
    layer, x = small()
    timer = timed(packed=1e-6)  # it would have been the fastest
    spoiled(monkeypatch, "packed", do)
    with pytest.warns(UserWarning, match=f"tconv bars a plan of fprop of N1 C4 6 -> K4 5, filter 2: packed .*{why}") as said:
        tuned = tconv.tune(layer, x, backward=False)
    assert sum(str(one.message).startswith("tconv bars") for one in said) == len(tuned.barred)
    assert "packed" not in timer.asked
    assert ran(layer, x).plan.kernel == "gather"
    own()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert tconv.tune(layer, x, backward=False, again=True).barred == ()
    assert "packed" not in timer.asked


def test_a_plan_that_needs_more_memory_than_its_tensors_is_left_out():
    """On an H200: split-K of a layer whose weight is larger than its activations, and copies of both operands."""
    layer, x = tconv.Conv1d(256, 256, 3, bias=False), torch.randn(1, 256, 130, requires_grad=True)
    asked, _ = passes_of(layer, (x,), {}, True)
    subject = next(a.subject for a in asked if a.subject.pass_ == "wgrad")
    tensors, device = subject.tensors("cpu"), DEVICES["H200"]
    for splits, fits in ((1, True), (2, False)):
        plan = subject.launch(device, Forced("wgrad", None, splits, False, "ieee")).call.plan
        assert plan.splits == splits
        if fits:
            _must_be_small(subject, plan, device, tensors)
        else:
            with pytest.raises(
                TooLarge, match="needs 1,572,864 bytes beside its operands and its result, which take 1,050,624"
            ):
                _must_be_small(subject, plan, device, tensors)
    copied = subject.launch(device, Forced("wgrad", None, 1, True, "ieee")).call.plan
    assert copied.staged
    _must_be_small(subject, copied, device, tensors)


def test_a_candidate_without_memory_is_skipped_this_time_only(own, timed, monkeypatch):
    layer, x = small()
    timer = timed(packed=1e-6)
    with monkeypatch.context() as m:
        spoiled(m, "packed", raising(torch.OutOfMemoryError("CUDA out of memory")))
        tuned = tconv.tune(layer, x, backward=False)
    assert any(line.startswith("packed ") and "out of memory" in line for line in tuned.skipped)
    assert tuned.barred == ()
    assert "packed" not in timer.asked
    assert ran(layer, x).plan.kernel == "gather"
    own()
    tconv.tune(layer, x, backward=False, again=True)
    assert ran(layer, x).plan.kernel == "packed"


def test_where_none_of_ours_has_memory_nothing_is_concluded(own, timed, monkeypatch):
    layer, x = small()
    timed()

    def fails(launch, operands, more, result):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as m:
        m.setattr(self_check, "run_poisoned", fails)
        tuned = tconv.tune(layer, x, backward=False)
    assert [row.choice for row in tuned.rows] == ["-"]
    assert tuned.skipped
    assert not file.own().exists()
    assert ran(layer, x).ours


def test_operands_without_memory_are_skipped_and_the_other_passes_measured(own, timed, monkeypatch):
    layer, x = small()
    timed(packed=1e-5)
    tensors = Subject.tensors

    def fails(self, device):
        if self.pass_ == "dgrad":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensors(self, device)

    monkeypatch.setattr(Subject, "tensors", fails)
    tuned = tconv.tune(layer, x, record=own().path.with_name("model.jsonl"))
    assert [(row.pass_, row.seconds is None) for row in tuned.rows] == [("fprop", False), ("dgrad", True), ("wgrad", False)]
    assert tuned.skipped == ("dgrad of N1 C4 6 -> K4 5, filter 2: OutOfMemoryError: CUDA out of memory",)
    assert tconv.load_record(own().path.with_name("model.jsonl")) == 2


def test_a_forced_plan_is_no_choice(timed):
    layer, x = small()
    timed()
    with tconv.force(kernel="gather"), pytest.raises(RuntimeError, match="tune: a plan is forced"):
        tconv.tune(layer, x)


def test_torchs_newer_setting_of_true_fp32_is_measured_too(timed):
    layer, x = small()
    timed(packed=1e-5)
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        tconv.tune(layer, x, backward=False)
        assert "measured" in ran(layer, x).plan.reason
        conv.fp32_precision = "tf32"
        assert "measured" not in ran(layer, x).plan.reason  # another cell
    finally:
        conv.fp32_precision = before


def test_a_candidate_that_hangs_is_barred(own, timed):
    layer, x = small()
    timed(tma=HANGS + 1)
    with pytest.warns(UserWarning, match="tma .*: it took 11.0 seconds"):
        tconv.tune(layer, x, backward=False)
    assert ran(layer, x).plan.kernel != "tma"


def test_a_candidate_that_fails_while_it_is_timed_is_dropped(timed):
    layer, x = small()
    timed(packed=RuntimeError("an illegal instruction"), torch=1.0)
    tuned = tconv.tune(layer, x, backward=False)
    assert any("illegal instruction" in line for line in tuned.skipped)
    assert tuned.rows[0].choice.split()[0] not in ("packed", "torch")


def test_where_torch_fails_ours_runs(timed, monkeypatch):
    layer, x = small()
    timed()

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Subject, "torchs", lambda self, tensors: fails)
    tuned = tconv.tune(layer, x, backward=False)
    assert tuned.rows[0].torch is None
    assert any(line.startswith("torch: OutOfMemoryError") for line in tuned.skipped)
    assert ran(layer, x).plan.reason.startswith("measured: tconv 50.0 us; ")


def test_where_nothing_of_ours_is_right_torch_runs(timed, monkeypatch):
    layer, x = small()
    timed()
    monkeypatch.setattr(self_check, "run_poisoned", lambda launch, operands, more, result: off(result.fill_(1.0)))
    with pytest.warns(UserWarning, match="tconv bars"):
        tuned = tconv.tune(layer, x, backward=False)
    assert tuned.rows[0].choice == "torch"
    assert ran(layer, x).reason == "measured: none of tconv's plans was right, torch 50.0 us"


def test_an_interrupt_keeps_what_is_known(own, timed):
    layer, x = small()
    model = torch.nn.Sequential(layer, tconv.Conv1d(4, 2, 1))
    timer = timed(packed=1e-5)
    once, subjects = timer.once, set()

    def interrupted(run):
        subjects.add(run.subject)
        if len(subjects) > 1:
            raise KeyboardInterrupt
        return once(run)

    timer.once = interrupted
    with pytest.raises(KeyboardInterrupt):
        tconv.tune(model, x, backward=False)
    kept = file.own().read_text().count('"ms"')
    assert kept == 1
    assert ran(layer, x).plan.kernel == "packed"
    timer.once = once
    timer.asked.clear()
    assert len(tconv.tune(model, x, backward=False).rows) == 2
    assert file.own().read_text().count('"ms"') == 2


def test_two_processes_tune_at_once(tmp_path):
    code = textwrap.dedent(
        """
        import torch, tconv
        tconv.tune(tconv.Conv1d(4, 4, 2, bias=False), torch.randn(1, 4, 6), backward=False, progress=False)
        """
    )
    environment = os.environ | {"TCONV_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [p.wait(300) for p in both] == [0, 0]
    found = Book(tmp_path / file.NAME)
    assert not found.empty
    assert len(list(file.read(found.path))) == len(found.path.read_text().splitlines())


DIES = """
import os, torch, tconv
from tconv.launching import self_check

run = self_check.run_poisoned

def dies(launch, operands, more, result):
    if launch.call.plan.kernel == "packed" and not launch.call.plan.staged:
        os._exit(9)
    run(launch, operands, more, result)

self_check.run_poisoned = dies
tconv.tune(tconv.Conv1d(4, 4, 2, bias=False), torch.randn(1, 4, 6), backward=False, progress=False)
"""


def test_a_candidate_that_takes_the_process_with_it_is_barred_by_the_next(own, timed):
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", DIES], env=environment, timeout=300, check=False).returncode == 9
    layer, x = small()
    timed(packed=1e-6)
    with pytest.warns(UserWarning, match="tconv bars 1 plans that processes died of"):
        tconv.tune(layer, x, backward=False)
    plan = ran(layer, x).plan
    assert plan.kernel == "packed"
    own()
    assert ran(layer, x).plan == plan
    assert [path.name for path in file.folder().glob("running-*")] == []


def test_one_that_still_runs_is_not_barred(own):
    with noting(file.folder()) as note:
        note({"a": 1})
        assert left_behind(file.folder()) == []
        assert len(list(file.folder().glob("running-*.json"))) == 1
    assert left_behind(file.folder()) == []


def test_where_nothing_can_be_noted_it_goes_on(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with noting(tmp_path / "file") as note:
        note({"a": 1})


def test_a_gpu_of_another_name_measures_anew(own, timed, monkeypatch):
    layer, x = small()
    timer = timed()
    tconv.tune(layer, x, backward=False)
    own()
    timer.asked.clear()
    monkeypatch.setattr(tuner, "machine", lambda name: book.Machine("another GPU", "", "", "", ""))
    tconv.tune(layer, x, backward=False)
    assert timer.asked


def test_it_prints_a_table(timed):
    layer, x = small()
    timed(packed=1e-5, gather=2e-5, torch=4e-5)
    lines = str(tconv.tune(torch.nn.Sequential(layer), x, backward=False)).splitlines()
    assert lines[0].split() == ["layer", "calls", "shape", "pass", "torch", "guess", "best", "choice"]
    assert lines[1].split()[:2] == ["0", "1"]
    assert lines[1].split()[10:] == ["fprop", "40.0", "20.0", "10.0", "packed", "16x16x256", "w4", "s3"]
    assert lines[-1] == "total on interpreter: torch 40.0 us, from now on 10.0 us, 4.00 times as fast"


def test_the_suite_is_measured_by_the_command(timed, capsys):
    timed(packed=1e-5)
    assert main(["--suite", "--tiny", "--layer", "whisper_lv3_conv1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("whisper_lv3_conv1 bf16 channels_last")]) == 3
    assert lines[-1].startswith("total on interpreter: ")


@pytest.mark.parametrize("kernel", ["ours", "torch"])
@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", ["whisper_lv3_conv1", "nnunet3d_tconv_64_32_k2s2"])
def test_the_suites_column_auto_is_what_was_fastest(timed, name, pass_, kernel):
    from bench import providers
    from bench.layers import layers

    timed(torch=1e-3 if kernel == "ours" else 1e-6)
    o = providers.operands(next(layer for layer in layers() if layer.name == name).tiny(), "fp32", "cpu")
    call = providers.auto(o, pass_)
    with tconv.recording() as calls:
        parity.assert_same(call(), providers.torch_nn(o, pass_)())
    assert [one.ours for one in calls] == ([True] if kernel == "ours" else [])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "one of the arguments --suite --regret --fit is required"),
        (["--suite", "--precision", "tf32", "--precision", "fp32"], "run twice"),
        (["--suite", "--layer", "no"], "no layer 'no'"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_it_cannot_do(arguments, text, capsys):
    try:
        status = main(arguments)
    except SystemExit as e:
        status = e.code
    assert status == 2
    assert text in capsys.readouterr().err


def test_the_function_and_the_command_have_one_name():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tconv.tune", "--help"], capture_output=True, text=True, timeout=300, check=True
    )
    assert "python -m tconv.tune --suite" in done.stdout
    assert callable(tconv.tune)


def test_the_planner_of_the_interpreter_is_asked_for_the_interpreter():
    assert tuner.device_here() == ("cpu", INTERPRETER)
