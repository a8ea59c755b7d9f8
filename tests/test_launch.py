"""Launches: direct ones tell C what Triton's would, captures compile nothing, copies are made once, precompile covers calls."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import tconv
from tconv.dispatch import check, entry
from tconv.launching import compiled, launch, workers
from tconv.launching.record import TransientFallback
from tconv.planning.tiles import Tile
from tests import parity
from tests.test_explain import BLOCKED

ROOT = pathlib.Path(tconv.__file__).parents[1]


OWN_CACHE = ("precompiled", "precompiled_in_fp8", "boxes", "nested", "not_loaded")  # of what is compiled


def outside(*command, **environment):
    """A Python process without the interpreter and without a GPU."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.version.hip is not None, reason="the stub is of a CUDA device")
@pytest.mark.parametrize(
    "name",
    [
        "arguments", "dependents", "guards", "devices", "threads", "capture", "splits_in_capture", "precompiled",
        "precompiled_in_fp8", "boxes", "nested", "loaded", "broken_off", "resources", "no_compiler", "not_loaded",
    ],
)  # fmt: skip
def test_compiled(name, tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path)} if name in OWN_CACHE else {}
    assert outside("-m", "tests.launches", name, **environment).splitlines()[-1] == "done"


# --- captures ---


@pytest.fixture
def captured(monkeypatch):
    """As if a graph were being captured and nothing had been compiled; a context in which something can be."""
    monkeypatch.setattr(compiled, "_known", set())
    monkeypatch.setattr(launch, "_prepared", {})
    monkeypatch.setattr(entry, "fast_paths", {})
    monkeypatch.setattr(compiled, "capturing", lambda device: True)
    compiled._warned.clear()
    return monkeypatch


CAPTURED = {
    "Conv2d": ((4, 6, 3), {"padding": "same"}, (2, 4, 5, 6)),
    "Conv1d": ((4, 4, 3), {"groups": 4, "bias": False}, (2, 4, 9)),
    "ConvTranspose2d": ((4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_capture_leaves_what_is_not_compiled_to_torch(name, device, captured):
    args, more, shape = CAPTURED[name]
    ours, torchs = parity.twins(name, *args, **more, device=device)
    x = torch.randn(shape, device=device)
    leaf = parity.leaf(x)
    with tconv.recording() as calls, pytest.warns(UserWarning, match="before the capture of a CUDA graph"):
        got = ours(leaf)
    assert [(c.ours, c.reason) for c in calls] == [(False, compiled.REASON)]
    other = parity.leaf(x)
    expected = torchs(other)
    parity.assert_same(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not again
        ours(leaf)
    gradients = parity.parameter_gradients(got, leaf, ours)
    for key, value in parity.parameter_gradients(expected, other, torchs).items():
        parity.assert_same(gradients[key], value, key, weight=True)


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
@pytest.mark.parametrize("name", CAPTURED)
def test_a_backward_in_a_capture_leaves_what_is_not_compiled_to_torch(name, device, captured):
    args, more, shape = CAPTURED[name]
    ours, torchs = parity.twins(name, *args, **more, device=device)
    x = torch.randn(shape, device=device)
    with captured.context() as before:
        before.setattr(compiled, "capturing", lambda device: False)
        leaf = parity.leaf(x)
        got = ours(leaf)
    with tconv.recording() as calls:
        gradients = parity.parameter_gradients(got, leaf, ours)
        assert ours(leaf).shape == got.shape  # what was compiled before is ours in the capture
    assert [c.ours for c in calls] == [False] * len(calls[:-1]) + [True]
    assert len(calls) == 3 + (ours.bias is not None)
    assert {c.reason for c in calls[:-1]} == {compiled.REASON}
    other = parity.leaf(x)
    for key, value in parity.parameter_gradients(torchs(other), other, torchs).items():
        tolerance = parity.tolerance_of(value.dtype)
        # A window of a padded gradient, maybe: its strides may differ.
        torch.testing.assert_close(gradients[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_what_a_capture_leaves_to_torch_copies_nothing_first(device, captured):
    captured.setattr(launch, "to_channels_last", lambda by, *t: pytest.fail("a copy that nobody reads"))
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    with tconv.force(staged=True), tconv.recording() as calls:
        layer(x).sum().backward()
    assert [c.ours for c in calls] == [False]


@pytest.mark.parametrize("forced", [{"staged": True}, {"kernel": "gather", "tile": Tile(16, 16, 16), "splits": 2}], ids=str)
def test_a_capture_takes_what_is_not_aligned(forced, device, captured):
    layer, one = tconv.Conv2d(32, 40, 3, device=device), torch.randn(2 * 32 * 5 * 6 + 1, device=device)
    x = one[1:].view(2, 32, 5, 6)  # whose copy is none of the weight's kind
    with torch.no_grad(), tconv.force(**forced), tconv.recording() as calls:
        with captured.context() as before:
            before.setattr(compiled, "capturing", lambda device: False)
            layer(x)
        layer(x)
    assert [c.ours for c in calls] == [True, True]


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_a_launch_that_ran_on_other_addresses_copies_nothing_first(device, captured):
    """What ran on aligned tensors need not be compiled for others, such as a bias that is not aligned."""
    x, w, more = (torch.randn(s, device=device) for s in ((2, 4, 5, 6), (8, 4, 3, 3), (9,)))
    g = check.examine(check.CallArguments(False, 2, 1, 0, 0, 1, 1), x, w, more[:8])
    with tconv.force(staged=True):
        prepared = launch.convolution(False, g, x, w, more[:8])
    with captured.context() as before:
        before.setattr(compiled, "capturing", lambda device: False)
        launch.convolve(prepared, x, w, more[:8], False)
    launch.convolve(prepared, x, w, more[:8], False)
    captured.setattr(launch, "to_channels_last", lambda by, *t: pytest.fail("a copy that nobody reads"))
    with pytest.raises(TransientFallback):
        launch.convolve(prepared, x, w, more[1:], False)


@pytest.mark.filterwarnings("ignore:tconv falls back to torch")
def test_gradients_of_gradients_in_a_capture(device, captured):
    x, w = (torch.randn(s, device=device, dtype=torch.float64).requires_grad_() for s in ((2, 3, 6), (4, 3, 3)))
    assert torch.autograd.gradcheck(lambda x, w: tconv.functional.conv1d(x, w, padding=1), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: tconv.functional.conv1d(x, w, padding=1), (x, w))


def test_after_the_capture_calls_are_ours_again(device, captured):
    layer, x = tconv.Conv1d(3, 4, 3, device=device), torch.randn(2, 3, 7, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x)
    captured.setattr(compiled, "capturing", lambda device: False)
    with tconv.recording() as calls:
        layer(x)
        layer(x)
    assert [c.ours for c in calls] == [True, True]


# --- copies ---


@pytest.mark.parametrize("transposed", [False, True])
def test_a_backward_copies_dy_to_channels_last_once(transposed, device, monkeypatch, poisoned):
    copied = []
    copy = launch.to_channels_last
    monkeypatch.setattr(launch, "to_channels_last", lambda by, *t: copied.extend(t) or copy(by, *t))
    name = "ConvTranspose2d" if transposed else "Conv2d"
    ours, torchs = parity.twins(name, 5, 6, 3, stride=2, device=device)
    x = torch.randn(2, 5, 9, 8, device=device)
    with tconv.force(staged=True), tconv.recording() as calls:
        leaf = parity.leaf(x)
        y = ours(leaf)
        copied.clear()
        gradients = parity.parameter_gradients(y, leaf, ours)
    assert [c.plan.staged for c in calls[1:] if c.operation in ("dgrad", "wgrad", "fprop")] == (
        [("x", "w"), ("dy", "x")] if transposed else [("dy", "w"), ("dy", "x")]
    )
    assert sorted(tuple(t.shape) for t in copied) == sorted({tuple(t.shape) for t in (x, y, ours.weight)})
    other = parity.leaf(x)
    for key, value in parity.parameter_gradients(torchs(other), other, torchs).items():
        parity.assert_same(gradients[key], value, key, weight=True)


FAILING = {
    "a copy": (
        {"staged": True},
        lambda kernel, constants: kernel == "copy_both" and constants["uX_VEC"] == 1,
    ),  # the weight's beside x's
    "a sum of splits": ({"kernel": "gather", "tile": Tile(16, 16, 16), "splits": 2}, lambda kernel, _: kernel == "sum_splits"),
}


@pytest.mark.parametrize("part", FAILING)
def test_no_part_is_launched_of_what_has_failed(part, device, captured):
    forced, fails = FAILING[part]
    captured.setattr(compiled, "capturing", lambda device: False)
    layer, x = tconv.Conv2d(32, 6, 3, device=device), torch.randn(2, 32, 6, 6, device=device)
    launched, run = [], launch.run
    captured.setattr(launch, "run", lambda by, pointers: launched.append(by) or run(by, pointers))
    with torch.no_grad(), tconv.force(**forced), tconv.recording() as calls:
        layer(x)
        assert len(launched) == 2
        launched.clear()
        failed = {v: "it fails" for v in compiled._known if fails(v[0].__name__, dict(v[3]))}
        captured.setattr(compiled, "_failed", failed)
        layer(x)
    assert len(failed) == 1
    assert [(c.ours, c.reason) for c in calls[1:]] == [(False, "it fails")]
    assert launched == []


def test_a_copy_is_not_kept(device, monkeypatch):
    import gc
    import weakref

    copies = []
    copy = launch.to_channels_last

    def watched(by, *tensors):
        made = copy(by, *tensors)
        copies.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(launch, "to_channels_last", watched)
    layer, x = tconv.Conv2d(4, 4, 3, device=device), torch.randn(1, 4, 5, 5, device=device, requires_grad=True)
    with tconv.force(staged=True):
        layer(x).sum().backward()
    gc.collect()
    assert copies
    assert all(ref() is None for ref in copies)


# --- precompile ---


def test_in_the_interpreter_there_is_nothing_to_compile_but_for_a_target(device, tmp_path):
    if device != "cpu":
        pytest.skip("the kernels are compiled here")
    done = tconv.precompile(tconv.Conv2d(3, 4, 3), torch.empty(1, 3, 8, 8, device="meta"))
    assert done == tconv.Precompiled(0, 0)
    assert str(done) == "0 kernels compiled, 0 already there"
    code = """
        layer = torch.nn.Sequential(tconv.LazyConv1d(8, 3, bias=False), torch.nn.LazyBatchNorm1d())
        print(tconv.precompile(layer, x, target="sm_90", backward=False, progress=False), layer[0].has_uninitialized_params())
    """
    told = [script(code, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET=interpret) for interpret in ("1", "0")]
    assert told == ["1 kernels compiled, 0 already there True\n", "0 kernels compiled, 1 already there True\n"]


@pytest.mark.parametrize("without", ["the interpreter", "Triton", "a GPU"])
def test_a_target_is_checked_wherever_one_is(without):
    code = """
        import sys
        class Model(torch.nn.Module):
            def forward(self, x):
                print("called")

        for target in ("sm_91", "", "sm90", 90, ["sm_90"], b"sm_90", torch.device("cuda")):
            try:
                print(tconv.precompile(Model(), x, target=target))
            except Exception as e:
                print(type(e).__name__, e)
    """
    interpret = {"TRITON_INTERPRET": "1"} if without == "the interpreter" else {}
    out = script((textwrap.indent(BLOCKED, "    ") if without == "Triton" else "") + code, **interpret).splitlines()
    assert len(out) == 7, out
    for line, got in zip(out[:3], ("'sm_91'", "''", "'sm90'"), strict=True):
        assert re.fullmatch(rf"ValueError precompile: target must be one of \['sm_80', 'sm_90', .*\], got {got}", line)
    for line, got in zip(out[3:], ("90", "['sm_90']", "b'sm_90'", "device(type='cuda')"), strict=True):
        assert line == f"TypeError precompile: target must be a name such as 'sm_90', or None for the GPU here; got {got}"


def script(code, *arguments, **environment):
    head = "import torch, tconv\nlayer, x = tconv.Conv1d(4, 8, 3), torch.empty(2, 4, 16, device='meta')\n"
    return outside("-W", "error::UserWarning:__main__", "-c", head + textwrap.dedent(code), *arguments, **environment)


def test_bad_input_to_precompile():
    out = script(
        """
        def outcome(*args, **more):
            try:
                tconv.precompile(*args, **more)
            except Exception as e:
                print(type(e).__name__, e)

        outcome(layer, x)
        outcome(layer, x, target="sm_91")
        outcome(None, x, target="sm_90")
        outcome(tconv.Conv1d, x, target="sm_90")
        outcome(layer, x, target="sm_90", jobs=0)
        outcome(layer, x, target="sm_90", jobs=1.5)
        outcome(lambda x: layer.to("meta")(x) * x.sum().item(), x, target="sm_90")
        print(tconv.precompile(torch.nn.Conv1d(4, 8, 3), x, target="sm_90"))
        print(tconv.precompile(lambda x: tconv.functional.conv1d(x, x[:, :, :3]), x.int(), target="sm_90"))
        """
    ).splitlines()
    assert out[0] == "RuntimeError precompile: no GPU here; name what to compile for, such as target='sm_90'"
    assert out[1].startswith("ValueError precompile: target must be one of ['sm_80', 'sm_90', ")
    assert out[1].endswith("got 'sm_91'")
    assert out[2] == "TypeError precompile: model must be a module or a function, got NoneType"
    assert out[3] == "TypeError precompile: model must be a module or a function, got the class Conv1d: make a module of it"
    assert out[4] == "ValueError precompile: jobs must be a positive int or None, got 0"
    assert out[5] == "ValueError precompile: jobs must be a positive int or None, got 1.5"
    assert out[6].startswith("RuntimeError the model does not run on meta tensors: RuntimeError: ")
    assert out[7:] == [
        "0 kernels compiled, 0 already there",
        "0 kernels compiled, 0 already there, 1 calls that fall back to torch",
    ]


def test_a_kernel_that_does_not_compile_is_named_and_the_others_go_on(tmp_path):
    out = script(
        """
        import warnings
        from tconv.launching import workers

        make = workers._task
        def spoiled(launch, backend):
            task = make(launch, backend)
            bad = {"wgrad": ("BLOCK_K", 24), "dgrad": ("NO_SUCH", 1)}.get(launch.call.operation)
            constants = {**task.constants, **dict([bad] if bad else [])}
            kernel = ("tests.dying", "kernel") if launch.call.operation == "fprop" else task.kernel
            return workers.Task(task.name, kernel, task.arguments, constants)
        workers._task = spoiled

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            done = tconv.precompile(layer, x, target="sm_90", jobs=1, progress=False)
        print(done)
        for w in said:
            print(w.message)
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    ).splitlines()
    assert out[0].startswith("1 kernels compiled, 0 already there, 3 failed"), out
    failed = sorted(out[1:])
    assert len(failed) == 3, out
    assert re.match(r"precompile: dgrad \w+ .* could not be compiled: KeyError", failed[0]), failed
    assert failed[1].startswith("precompile: fprop ")
    assert failed[1].endswith("the process that compiled it died, with status 3")
    assert failed[2].startswith("precompile: wgrad ")


def test_a_worker_may_write_to_stdout(tmp_path):
    out = script(
        """
        from tconv.launching import workers

        kernel = workers.Task("noisy", ("tests.noisy", "kernel"), (), {})
        gone = workers.Task("gone", ("tests.dying", "kernel"), (), {})
        from triton.backends.compiler import GPUTarget
        print(workers._compile([kernel, gone], GPUTarget("cuda", 90, 32), 1, False))
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert "module 'tests.noisy' has no attribute 'kernel'" in out
    assert "the process that compiled it died, with status 3" in out


@pytest.mark.parametrize("sent", ["written by C", ".", "cos\nnothing\n.", ""])
def test_a_worker_that_sends_no_answer_is_ended(sent):
    """One that lives on would be waited for for ever."""
    worker = workers._Worker.__new__(workers._Worker)
    code = f"import sys, time; sys.stdout.write({sent!r} + '\\n'); sys.stdout.flush(); time.sleep(600 if {sent!r} else 0)"
    worker.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert "died, with status" in worker(workers.Task("", ("", ""), (), {}))
    assert worker.process.poll() is not None
    worker.close()


def test_a_workers_modules_are_not_the_current_directorys(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "queue.py").write_text("raise SystemExit('the current directory was searched')")
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent(
            f"""
            import os, torch, tconv
            os.chdir({str(elsewhere)!r})
            layer = tconv.Conv1d(4, 8, 3, bias=False)
            print(tconv.precompile(layer, torch.empty(2, 4, 16), target="sm_90", backward=False, progress=False))
            """
        )
    )
    out = outside(str(path), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    assert out.splitlines() == ["1 kernels compiled, 0 already there"]


def test_as_many_workers_as_this_process_may_have(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5}, raising=False)
    jobs = []
    monkeypatch.setattr(workers, "_compile", lambda tasks, gpu, jobs_, progress: jobs.append(jobs_) or [])
    workers.compile_launches([], None)
    assert jobs == [2]


def test_workers_do_not_run_the_users_script_again(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch, tconv  # no "if __name__ == '__main__'"
            print("started")
            layer = tconv.Conv1d(4, 8, 3, bias=False)
            print(tconv.precompile(layer, torch.empty(2, 4, 16), target="sm_90", backward=False, progress=False))
            """
        )
    )
    out = outside(str(path), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    assert out.splitlines() == ["started", "1 kernels compiled, 0 already there"]
