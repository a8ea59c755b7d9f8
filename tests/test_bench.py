"""The benchmark suite without a GPU: records, stages that are cut and resumed, faulty providers, the report, the command."""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import tconv
from bench import record
from bench.layers import FAMILIES, layers
from bench.sanitize import chosen, faults, findings
from bench.stage import CUT
from bench.timing import Clock, median
from bench.warm import warm
from tconv.planning.device import DEVICES
from tconv.precompile import rehearse

ROOT = pathlib.Path(__file__).parent.parent
MACHINE = {"gpu": "NVIDIA H200", "commit": "abc", "torch": "2", "triton": "3", "tiny": False}


def run(*command, **environment):
    """(exit status, all output) of a command in the repository's root."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def stage(path, *arguments, **environment):
    """(exit status, output, lines behind the first) of a recorded pytest run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.stage",
        "--record",
        path,
    ]
    status, text = run(*command, *arguments, **environment)
    return status, text, record.read(path).lines


# --- the layers ---


def test_the_suite_has_sixty_layers_with_their_sources():
    found = layers()
    assert len(found) == 60
    assert len({layer.name for layer in found}) == 60
    assert {layer.family for layer in found} == set(FAMILIES)
    assert all(layer.source for layer in found)
    for row, layer in zip(json.loads((ROOT / "bench" / "layers.json").read_text()), found, strict=True):
        p = layer.problem
        assert list(p.shape("x" if layer.transposed else "y")) == row["out_shape"]


def test_shrunk_layers_keep_what_is_particular_about_them():
    for layer in layers():
        small = layer.tiny()
        assert (small.family, small.dilation, small.bias) == (layer.family, layer.dilation, layer.bias), layer.name
        assert small.stride in (layer.stride, small.kernel)
        assert min(small.problem.X) > 0
        assert min(small.problem.Y) > 0
        assert math.prod(small.x) <= math.prod(layer.x)


# --- records ---


def test_a_record_is_read_back_and_gone_on_with(tmp_path):
    path = tmp_path / "a.jsonl"
    record.Writer(path, MACHINE).write({"test": "one"})
    record.Writer(path, MACHINE | {"date": "later"}).write({"test": "two"})
    read = record.read(path)
    assert read.machine == {"kind": record.KIND, **MACHINE}
    assert read.lines == [{"test": "one"}, {"test": "two"}]
    assert read.complaint is None


def test_a_cut_record_keeps_its_whole_lines_and_is_mended(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = record.Writer(path, MACHINE)
    writer.write({"test": "one"})
    writer.write({"test": "two"})
    path.write_text(path.read_text()[:-8])
    read = record.read(path)
    assert read.lines == [{"test": "one"}]
    assert read.complaint == "line 3 of 3 is cut or foreign; what follows it is left out"
    record.Writer(path, MACHINE).write({"test": "three"})
    assert record.read(path).lines == [{"test": "one"}, {"test": "three"}]
    assert record.read(path).complaint is None


@pytest.mark.parametrize(
    "text", [b"{}\n", b"layer,ms\na,1\n", b"[1]\n", b'{"kind": "another"}\n', b"\x00", b"\xff\xfe\x00"], ids=repr
)
def test_a_foreign_file_is_named_and_neither_read_nor_touched(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    records, complaints = record.read_all(tmp_path)
    assert records == {}
    assert [str(path) in line for line in complaints] == [True]
    with pytest.raises(ValueError, match="move it away first"):
        record.Writer(path, MACHINE)
    assert path.read_bytes() == text


def test_a_record_made_elsewhere_is_not_gone_on_with(tmp_path):
    record.Writer(tmp_path / "a.jsonl", MACHINE)
    with pytest.raises(ValueError, match="made with another gpu, triton"):
        record.Writer(tmp_path / "a.jsonl", MACHINE | {"gpu": "A100", "triton": "4"})


def test_facts_of_this_machine():
    facts = record.machine()
    assert facts["torch"] == torch.__version__
    assert facts["triton"]
    assert record.machine("abc")["commit"] == "abc"
    assert record.folder_name({"gpu": "NVIDIA H200", "commit": "0123456789abcdef"}) == "nvidia-h200-012345678"


# --- stages ---


TESTS = """
import os, pathlib, pytest
@pytest.mark.parametrize("i", range(3))
def test_fine(i, record_property):
    record_property("cell", {"i": i, "value": 1 / 3})
def test_fails_at_first():
    assert pathlib.Path(__file__).with_name("mended").exists(), "not yet"
def test_kills_its_process():
    os._exit(7)
def test_breaks_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_last():
    pytest.skip("never")
"""


def test_a_stage_that_is_cut_or_dies_goes_on_where_it_was(tmp_path):
    tests, path = tmp_path / "test_it.py", tmp_path / "record" / "it.jsonl"
    tests.write_text(TESTS)
    where = "--rootdir", tmp_path  # or tests are named by where the checkout lies
    status, text, lines = stage(path, *where, "--seconds", "0", tests)
    assert status == CUT
    assert "1 passed, 6 still to run" in text
    assert [line["cell"] for line in lines] == [{"i": 0, "value": 0.33333}]
    status, _, lines = stage(path, *where, tests)
    assert status == 7
    assert [line["outcome"] for line in lines] == ["passed"] * 3 + ["failed"]
    assert "not yet" in lines[-1]["detail"]
    (tmp_path / "mended").touch()
    status, text, lines = stage(path, *where, tests)
    assert status == 1  # something died: not well, however much is left
    assert "the device failed" in text
    assert [line["outcome"] for line in lines[4:]] == ["died", "passed", "died"]
    status, text, lines = stage(path, *where, tests)  # what died comes last
    assert status == 7
    assert [line["outcome"] for line in lines[7:]] == ["skipped"]
    status, text, lines = stage(path, *where, tests)  # and is given up at the second time
    assert status == 1
    assert [line["outcome"] for line in lines[8:]] == ["died", "died"]
    assert "2 died, 4 passed, 1 skipped, 0 still to run" in text
    status, _, again = stage(path, *where, tests)
    assert (status, again) == (1, lines)


def test_a_finished_stage_is_well_when_run_again(tmp_path):
    tests, path = tmp_path / "test_it.py", tmp_path / "it.jsonl"
    tests.write_text("def test_fine(): pass")
    for _ in range(2):
        status, text, lines = stage(path, tests)
        assert status == 0, text
        assert [line["outcome"] for line in lines] == ["passed"]


def test_files_that_cannot_be_collected_are_recorded(tmp_path):
    left, broken = tmp_path / "test_left.py", tmp_path / "test_broken.py"
    left.write_text("import pytest\npytest.importorskip('not_installed')")
    broken.write_text("import not_installed")
    status, _, lines = stage(tmp_path / "it.jsonl", left)
    assert status == 0
    assert [(line["outcome"], "not_installed" in line["detail"]) for line in lines] == [("skipped", True)]
    status, _, lines = stage(tmp_path / "it.jsonl", left, broken)
    assert status == 1
    assert lines[-1]["outcome"] == "failed"


def test_a_foreign_record_stops_a_stage_with_one_line(tmp_path):
    (tmp_path / "it.jsonl").write_text("mine\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    status, text, _ = stage(tmp_path / "it.jsonl", tmp_path / "test_it.py")
    assert status == 4
    assert "not a record of tconv's; move it away first" in text
    assert "Traceback" not in text


# --- timing ---


class Event:
    """Stands in for torch.cuda.Event: the stream's own clock, in milliseconds, which only work moves."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_calls_on_a_gpu_are_timed_by_events_behind_a_flush(monkeypatch):
    clock = Clock("cpu")
    clock.cuda = True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    order = []

    def call():
        order.append("call")
        Event.now += 3.0

    class Waste:
        def zero_(self):
            order.append("flush")
            Event.now += 100.0

    clock.waste = Waste()
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    assert clock.once(call) == pytest.approx(0.003)
    assert order == ["flush", "sleep", "call"]
    assert clock.rounds(call) == 20
    with pytest.raises(ZeroDivisionError):
        clock.once(lambda: 1 / 0)
    assert clock.once(call) == pytest.approx(0.003)  # what raised has left nothing
    assert median(clock, call) == pytest.approx(0.003)


# --- the layers' benchmark ---

WITHIN = ["--tiny", "--quick", "--benchmark-quiet", "bench/test_layers.py", "-k", "resnet50_l2_down_1x1s2 and contiguous"]
FAULT = {
    "fails": "lambda o, p: (lambda: 1 / 0)",
    "is wrong": "lambda o, p: (lambda: tuple(t * 1.1 for t in right(o, p)))",
    "gives NaN": "lambda o, p: (lambda: tuple(t * float('nan') for t in right(o, p)))",
    "is missing": "missing",
}


def faulty(folder, provider, what):
    """A pytest plugin that spoils a provider."""
    (folder / "faulty.py").write_text(
        "from bench import providers as p\n"
        "def missing(o, pass_): raise p.Missing('not for this layer')\n"
        "def right(o, pass_):\n"
        "    y = p.torch_nn(o, pass_)()\n"
        "    return y if isinstance(y, tuple) else (y,)\n"
        f"p.PROVIDERS[{provider!r}] = p.Provider({FAULT[what]})\n"
    )
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_layers_are_checked_then_timed(tmp_path):
    status, text, lines = stage(tmp_path / "layers.jsonl", *WITHIN)
    assert status == 0, text
    assert lines[0]["limits"]["matrix_16"] > 0
    cells = [line["cell"] for line in lines[1:] if "ms" in line["cell"]]
    assert {(c["provider"], c["pass"]) for c in cells} == {(p, s) for p in ("torch.nn", "tconv") for s in ("fprop", "step")}
    for c in cells:
        assert 0 < c["error_norm"] < 1e-2
        assert c["ms"] > 0
        assert c["tflops"] > 0
        assert c["of_copy_peak"] > 0
    assert all(len(c["plans"]) == (1 if c["pass"] == "fprop" else 3) for c in cells if c["provider"] == "tconv")


def test_what_surrounds_a_convolution_is_checked_then_timed(tmp_path):
    chosen = "(resnet_relu or mamba_causal or mamba_sequences_8 or norm_128 or stream_96) and contiguous and not fp8"
    status, text, lines = stage(tmp_path / "around.jsonl", "--tiny", "--benchmark-quiet", "bench/test_around.py", "-k", chosen)
    assert status == 0, text
    cells = [line["cell"] for line in lines[1:] if "cell" in line]
    timed = {(c["layer"], c["provider"], c["pass"]) for c in cells if "ms" in c}
    layers = ("resnet_relu", "mamba_causal_k4", "mamba_sequences_8", "sd_vae_norm_128_512")
    both = ("sequence", "tconv")
    streamed = {("wan_vae_stream_96", p, "fprop") for p in both}  # which has no step
    assert timed == streamed | {(n, p, q) for n in layers for p in both for q in ("fprop", "step")}
    assert all(0 < c["error_norm"] < 1e-2 for c in cells if c["pass"] == "fprop")


@pytest.mark.parametrize(
    ("what", "said"), [("fails", "ZeroDivisionError"), ("is wrong", "wrong result"), ("gives NaN", "wrong")]
)
def test_a_faulty_provider_has_a_cell_that_says_so(tmp_path, what, said):
    arguments = ["-p", "faulty", *WITHIN[:-1], WITHIN[-1] + " and fprop"]
    status, text, lines = stage(tmp_path / "layers.jsonl", *arguments, **faulty(tmp_path, "torch.nn", what))
    assert status == 0, text  # a rival's fault is no failure of ours, and the run goes on
    cells = {c["provider"]: c for c in (line["cell"] for line in lines[1:])}
    assert said in cells["torch.nn"]["error"]
    assert "ms" not in cells["torch.nn"]
    assert cells["tconv"]["ms"] > 0
    status, _, lines = stage(tmp_path / "ours.jsonl", *arguments, **faulty(tmp_path, "tconv", what))
    assert status == 1
    assert said in next(line["cell"]["error"] for line in lines[1:] if line["cell"]["provider"] == "tconv")


def test_a_provider_that_does_not_take_a_layer_says_why(tmp_path):
    arguments = ["-p", "faulty", *WITHIN[:-1], WITHIN[-1] + " and fprop and torch.nn"]
    _, _, lines = stage(tmp_path / "layers.jsonl", *arguments, **faulty(tmp_path, "torch.nn", "is missing"))
    assert [line["cell"]["missing"] for line in lines[1:]] == ["not for this layer"]


def test_what_the_suite_launches_is_compiled_before(monkeypatch):
    def rehearsed(function, *args, target, jobs):
        seen.append(rehearse(function, args, {}, DEVICES[target]))

    seen = []
    monkeypatch.setattr(tconv, "precompile", rehearsed)
    chosen = [layer.tiny() for layer in layers(quick=True)]
    warm(chosen, "bf16", "H200")
    ((launches, left),) = seen
    counts = collections.Counter(launch.call.operation for launch in launches)
    assert left == ()
    assert counts["fprop"] == counts["dgrad"] == 2 * len(chosen)
    assert counts["wgrad"] >= 2 * len(chosen)  # with a launch for the sum of splits


def test_without_a_gpu_the_suite_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, text = run(sys.executable, "-m", "pytest", "-p", "bench.stage", "bench/test_layers.py")
    assert status == 4
    assert "no GPU here: only `python bench/dispatch.py` measures anything" in text


# --- compute-sanitizer ---


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("========= COMPUTE-SANITIZER\n", None),
    ],
)
def test_what_a_sanitizer_found_is_read_from_its_log(log, found):
    assert findings(log) == found


@pytest.mark.parametrize(
    ("errors", "exits", "status"), [(0, 0, 0), (2, 0, 1), (0, 1, 1), (0, CUT, CUT)], ids=["fine", "errors", "failed", "cut"]
)
def test_sanitizer_runs_are_recorded(tmp_path, errors, exits, status):
    tool = tmp_path / "compute-sanitizer"
    summary = f'[ "$1" = --tool ] || exit 0\necho "========= ERROR SUMMARY: {errors} errors" > "$4"\nexit {exits}\n'
    tool.write_text(f"#!/bin/sh\n{summary}")
    tool.chmod(0o755)
    command = [sys.executable, "-m", "bench.sanitize", "--out", tmp_path / "out"]
    got, text = run(*command, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert got == status, text
    lines = record.read(tmp_path / "out" / "sanitize.jsonl").lines
    assert [(line["tool"], line["found"]) for line in lines] == [("memcheck", errors), ("racecheck", errors)]
    got, text = run(*command, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert got == status
    assert ("memcheck: already recorded" in text) == (exits != CUT)
    assert ("memcheck: 0 found, incomplete" in report("--summary", tmp_path / "out")[1]) == (exits == CUT)


@pytest.mark.parametrize("problem", ["is not here", "does not work on this device"])
def test_a_gpu_without_a_sanitizer_that_works_is_said_so(tmp_path, monkeypatch, capsys, problem):
    if problem != "is not here":
        (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nexit 255\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen() == ()
    assert capsys.readouterr().out == f"compute-sanitizer {problem}: nothing was checked by it\n"


def test_without_a_gpu_the_simulator_looks_at_every_access(tmp_path):
    """One case of it: the time is up by then, and the same command goes on."""
    if torch.cuda.is_available():
        pytest.skip("compute-sanitizer's place")
    command = [sys.executable, "-m", "bench.sanitize", "--out", tmp_path, "--seconds", "0.1"]
    status, text = run(*command)
    assert status == CUT, text
    assert text.startswith("No GPU here: the simulator runs the code for sm_90\n")
    assert "simulator: 0 found, cut" in text
    assert re.search(r"simulator: \d+ launches of \d+ compiled kernels", text)
    (line,) = record.read(tmp_path / "sanitize.jsonl").lines
    assert line == {"tool": "simulator", "found": 0, "status": CUT, "complete": False}
    (case,) = record.read(tmp_path / "sanitize_simulator.jsonl").lines
    assert case["outcome"] == "passed"


def test_faults_are_counted_by_test():
    fault = {"outcome": "failed", "detail": "simulator.errors.Fault: reads 8 bytes out of bounds"}
    lines = [{"test": "a"} | fault, {"test": "b"} | fault, {"test": "b", "outcome": "passed"}]  # mended since
    lines += [{"test": "c", "outcome": "failed", "detail": "AssertionError"}, {"limits": {}}]
    assert faults(lines) == ["a: simulator.errors.Fault: reads 8 bytes out of bounds"]


# --- the report ---


def written(folder, factor, date, gpu="NVIDIA H200", commit="abc"):
    """A record of two layers: torch.nn takes 2 and 8 ms contiguous, 4 and 4 channels_last; ours half of it, times a factor."""
    writer = record.Writer(folder / "layers.jsonl", MACHINE | {"date": date, "commit": commit, "gpu": gpu})
    rates = {"matrix_16": 8e14, "matrix_tf32": 4e14, "fma_32": 5e13, "matrix_64": 5e13, "bandwidth": 4e12}
    writer.write({"limits": rates | {"l2_bandwidth": 8e12, "l2_bytes": 5e7, "clock": 1.7e9}})
    for (layer, family), layout, ms in [
        (("one", "dense 2-D"), "contiguous", 2.0), (("one", "dense 2-D"), "channels_last", 4.0),
        (("two", "depthwise"), "contiguous", 8.0), (("two", "depthwise"), "channels_last", 4.0),
    ]:  # fmt: skip
        for provider, time in (("torch.nn", ms), ("tconv", factor * ms / 2)):
            cell = {"layer": layer, "family": family, "precision": "bf16", "pass": "fprop", "provider": provider,
                    "layout": layout, "ms": time, "tflops": 1 / time, "gbs": 10 / time}  # fmt: skip
            writer.write({"test": f"{layer} {layout} {provider}", "outcome": "passed", "cell": cell})
    bad = {"layer": "one", "family": "dense 2-D", "precision": "bf16", "pass": "dgrad", "provider": "flag_gems",
           "layout": "contiguous", "error": "wrong result: relative error 41"}  # fmt: skip
    writer.write({"test": "bad", "outcome": "passed", "cell": bad})


def report(*arguments):
    return run(sys.executable, "scripts/report.py", *arguments)


def test_the_report_of_records_worked_by_hand(tmp_path):
    written(tmp_path / "a", 2.0, "2026-01-01", commit="old")
    written(tmp_path / "b", 1.0, "2026-01-02", commit="new")
    (tmp_path / "b" / "models.jsonl").write_text("torn")
    status, text = report("--out", tmp_path / "out", tmp_path / "b", tmp_path / "a")
    assert status == 0, text
    assert f"skipped: {tmp_path / 'b' / 'models.jsonl'}: not a record of tconv's" in text
    assert "Measured on NVIDIA H200, driver None, torch 2, Triton 3, commit old, new; bf16, 4 cells of 2 layers." in text
    assert "| dense 2-D | 1 | 2.00 | 2.00 | 2.00 one fprop |" in text  # in the same layout
    assert "| dense 2-D | 1 | 2.00 | 1.00 | 1.00 one fprop |" in text  # against the better layout, 2 ms
    assert "| depthwise | 1 | 1.00 | 2.00 | 1.00 two fprop |" in text
    assert "Of 4 cells 0 are below 0.9 and 4 above 1.1 in the same layout (geometric mean 2.00), and 0 and 2 against" in text
    assert "better\nlayout (geometric mean 1.41)." in text
    assert "- flag_gems one bf16 dgrad contiguous: wrong result: relative error 41" in text
    assert "4 cells since they were measured before: geometric mean 2.000" in text
    pictures = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert pictures == {"speedup.png", "roofline.png", "change.png"}
    status, text = report("--out", tmp_path / "out", "--precision", "fp16", tmp_path / "b")
    assert "no fp16 in the record: reporting bf16" in text
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    status, text = report("--summary", tmp_path / "b")
    assert "layers: 9 passed" in text
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert rows["depthwise"] == rows["all"] == ["2.00", "2.00"]
    assert rows["all, better layout"] == ["1.41", "1.41"]  # of 2 and 1, and of 1 and 2
    assert "flag_gems one bf16 dgrad contiguous: wrong result: relative error 41" in text


def raced(folder, *cells, date="2026-01-01", gpu="NVIDIA H200", commit="abc"):
    """A record of bench/race.py, of one layer's cells: (pass, torch.nn's ms, tconv's ms)."""
    writer = record.Writer(folder / "race.jsonl", MACHINE | {"date": date, "commit": commit, "gpu": gpu})
    for pass_, theirs, ours in cells:
        cell = {"layer": "one", "family": "dense 2-D", "precision": "bf16", "pass": pass_, "layout": "contiguous"}
        times = {"ratio": theirs / ours, "torch.nn": {"ms": theirs}, "tconv": {"ms": ours}}
        writer.write({"cell": f"one bf16 {pass_} contiguous", **cell, "flops": 4e9, "bytes": 1e6, **times})


def test_the_records_of_a_gpu_are_one_report(tmp_path):
    """Two runs of other cells: both are in the table, and nothing has changed."""
    raced(tmp_path / "a", ("fprop", 3.0, 1.0), commit="early")
    raced(tmp_path / "b", ("dgrad", 1.0, 2.0), date="2026-01-02", commit="late")
    status, text = report("--out", tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert status == 0, text
    assert "commit early, late; bf16, 2 cells of 1 layers." in text
    assert "| dense 2-D | 1 | 3.00 | 0.50 |" in text
    assert "since they were measured before" not in text
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"speedup.png"}


def test_both_sides_of_a_ratio_are_of_one_run(tmp_path):
    """The newer run's torch.nn took 8 ms, the older one's 3."""
    raced(tmp_path / "a", ("fprop", 3.0, 1.0), ("wgrad", 5.0, 1.0))
    raced(tmp_path / "b", ("fprop", 8.0, 2.0), date="2026-01-02")
    status, text = report("--out", tmp_path / "out", tmp_path / "b", tmp_path / "a")
    assert status == 0, text
    assert "| dense 2-D | 1 | 4.00 | 5.00 |" in text
    assert "1 cells since they were measured before: geometric mean 0.500" in text


def test_a_run_of_both_commands_has_the_cells_of_both(tmp_path):
    raced(tmp_path / "a", ("dgrad", 3.0, 1.0))
    written(tmp_path / "a", 1.0, "2026-01-02")
    status, text = report("--out", tmp_path / "out", tmp_path / "a")
    assert status == 0, text
    assert "bf16, 5 cells of 2 layers." in text


def test_what_the_first_minutes_recorded_is_reported_as_the_suite_is(tmp_path):
    """One layer in turns: torch.nn 2 ms, ours 1 ms; another was wrong. Limits come from the record of facts."""
    cell = {"layer": "one", "family": "dense 2-D", "precision": "bf16", "pass": "fprop", "layout": "contiguous"}
    race = record.Writer(tmp_path / "a" / "race.jsonl", MACHINE)
    timed = {"flops": 4e9, "bytes": 1e6, "ratio": 2.0, "torch.nn": {"ms": 2.0}, "tconv": {"ms": 1.0}}
    race.write({"cell": "one bf16 fprop contiguous", **cell, **timed})
    race.write({"cell": "one bf16 dgrad contiguous", **cell, "pass": "dgrad", "error": "wrong result"})
    race.write({"cell": "two bf16 dgrad contiguous", "error": "the process died in it"})
    facts = record.Writer(tmp_path / "a" / "facts.jsonl", MACHINE)
    rates = {"matrix_16": 8e14, "matrix_tf32": 4e14, "fma_32": 5e13, "matrix_64": 5e13, "bandwidth": 4e12}
    facts.write({"cell": "limits", **rates, "l2_bandwidth": 8e12, "l2_bytes": 5e7, "clock": 1.7e9})
    facts.write({"cell": "host share", "forward": {"torch.nn": 9.04, "tconv": 6.62}})
    status, text = report("--out", tmp_path / "out", tmp_path / "a")
    assert status == 0, text
    assert "| dense 2-D | 1 | 2.00 |" in text
    assert "- tconv one bf16 dgrad contiguous: wrong result" in text
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"speedup.png", "roofline.png"}
    status, text = report("--summary", tmp_path / "a")
    assert "torch.nn's time / tconv's over 1 cells" in text
    assert "one bf16 dgrad contiguous: wrong result" in text
    assert "nothing" not in text
    assert "host us, forward: torch.nn 9.0, tconv 6.6" in text
    assert "matrix_16 800" in text


def test_a_record_of_another_gpu_is_no_change(tmp_path):
    written(tmp_path / "a", 2.0, "2026-01-01", gpu="NVIDIA A100")
    written(tmp_path / "b", 1.0, "2026-01-02")
    text = report("--out", tmp_path / "out", tmp_path / "a", tmp_path / "b")[1]
    assert "left out: records of NVIDIA A100" in text
    assert not (tmp_path / "out" / "change.png").exists()


def test_a_folder_without_records_is_no_reason_for_predictions(tmp_path):
    for arguments in ([tmp_path / "mistyped"], [tmp_path], ["--summary", tmp_path / "mistyped"]):
        status, text = report("--out", tmp_path / "out", *arguments)
        assert status == 2, text
        assert str(arguments[-1]) in text
    assert not (tmp_path / "out").exists()


def test_predictions_are_labelled_and_in_the_docs(tmp_path):
    status, text = report("--out", tmp_path / "out", "--predicted")
    assert status == 0, text
    assert "PREDICTED by the cost model for an H200, bf16; nothing here was measured" in text
    for layer in layers():
        assert f"| {layer.name} | wgrad | channels_last |" in text
    again = "python scripts/report.py --predicted --readme"
    assert (tmp_path / "out" / "tables.md").read_text() == (ROOT / "docs" / "predicted.md").read_text(), again
    rows = [line.split(" | ") for line in text.splitlines() if " | contiguous | " in line or " | channels_last | " in line]
    assert len(rows) == 6 * len(layers())
    assert {row[7] for row in rows} == {"0"}, "a tap is multiplied that meets nothing"
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"roofline-predicted.png", "shares-predicted.png"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import report as module

    return module


def test_the_readme_has_the_table_of_the_records(tmp_path, script):
    runs = script.recorded([])
    _, part = script.measured(runs, argparse.Namespace(out=tmp_path, precision="bf16"))
    written = f"{script.MARKS[0]}\n{part}\n\n{script.MARKS[1]}"
    assert written in (ROOT / "README.md").read_text(), "python scripts/report.py --readme"


def test_first_light_has_the_tables_of_its_records(tmp_path, script):
    page = (ROOT / "docs" / "first-light.md").read_text()
    folders = [ROOT / "bench" / "results" / name for name in dict.fromkeys(re.findall(r"results/(nvidia-\w+-\w+)/", page))]
    text, _ = script.measured(script.recorded(folders), argparse.Namespace(out=tmp_path, precision="bf16"))
    tables = [part for part in text.split("\n\n") if part.startswith(("| torch.nn's", "Of "))]
    assert len(tables) == 3
    assert [table for table in tables if table not in page] == []


def test_the_readme_is_written_between_its_marks(tmp_path, script):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{script.MARKS[0]}\nold\n{script.MARKS[1]}\nafter\n")
    script.write_readme(path, "new")
    assert path.read_text() == f"before\n{script.MARKS[0]}\nnew\n\n{script.MARKS[1]}\nafter\n"
    path.write_text("nothing")
    with pytest.raises(SystemExit):
        script.write_readme(path, "new")


# --- the command ---


def gpu(*arguments, **environment):
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return run("scripts/gpu.sh", *arguments, **({"PATH": path} | environment))


def test_the_whole_command_in_a_dry_run(tmp_path):
    status, text = gpu("all", "--dry-run", "--quick", "--seconds", "1", "--out", tmp_path, "--commit", "abc")
    assert status == CUT, text
    for name in ("parity", "sanitize", "layers", "models"):
        read = record.read(tmp_path / f"{name}.jsonl")
        assert read.machine["commit"] == "abc", name
        assert read.machine["tiny"] is True
        assert read.lines, name
        assert not any(line.get("outcome") == "failed" for line in read.lines), name
    assert "layers was cut; the same command goes on" in text
    assert {line["cell"] for line in record.read(tmp_path / "facts.jsonl").lines} >= {"limits"}
    assert "device: matrix_16" in text[text.index("== summary") :]
    assert text.rstrip().splitlines()[-1]
    assert text.index("== parity") < text.index("== sanitize") < text.index("== bench") < text.index("== models")
    assert "commit abc" in text[text.index("== summary") :]


def test_the_first_minutes_in_a_dry_run(tmp_path):
    what = ("--only", "facts", "--only", "race")
    status, text = gpu("--keep-going", "--minutes", "2", "first", "--dry-run", *what, "--out", tmp_path, "--commit", "abc")
    assert status == CUT, text
    read = record.read(tmp_path / "race.jsonl")
    assert (read.machine["commit"], read.machine["tiny"]) == ("abc", True)
    assert read.lines
    assert not any("error" in line for line in read.lines)
    assert "== facts: no time left" in text
    assert "== race was cut" in text or "== race is done" in text  # a fast machine runs all of it in its minute
    assert text.rstrip().endswith((tmp_path / "summary.txt").read_text().rstrip())


def test_what_the_command_lacks_it_says_in_a_line(tmp_path):
    old = tmp_path / "triton"
    old.mkdir()
    (old / "__init__.py").write_text("__version__ = '3.4.0'")
    status, text = gpu("parity", PYTHONPATH=str(tmp_path))
    assert status == 1
    assert text.strip().startswith("tconv needs Triton 3.6 or newer")
    assert len(text.strip().splitlines()) == 1
    assert gpu("party")[0] == 2
    assert "unknown argument party" in gpu("party")[1]
    assert "sanitize" in gpu("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--out", "--out needs a value"),
        ("first --minutes", "--minutes needs a value"),
        ("--minutes 5", '--minutes: for "first" alone'),
        ("parity --keep-going --only race", '--keep-going --only: for "first" alone'),
        ("first --seconds 9", '--seconds: not for "first"'),
        ("--quick --without fla first", '--quick --without: not for "first"'),
        ("first bench", '"first" has stages of its own, and does not run bench'),
        ("bench --seconds soon", "--seconds soon: not a number"),
    ],
)
def test_options_that_would_be_lost_are_refused(arguments, said):
    assert gpu(*arguments.split()) == (2, said + "\n")


def test_a_stage_that_first_does_not_have_is_refused(tmp_path):
    status, text = gpu("--only", "party", "first", "--dry-run", "--out", tmp_path)
    assert status == 2
    assert "--only party: the stages are smoke checks facts race" in text


def test_the_command_without_a_gpu_measures_dispatch_only():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, text = gpu("bench")
    assert status == 0
    assert text.startswith("No GPU here: only Python's share of a call can be measured")
    assert "forward and backward" in text
    assert "torch.nn, tconv.enable()" in text
