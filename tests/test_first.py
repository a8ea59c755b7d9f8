"""The first minutes on a GPU: order, limits and what becomes of stages that fail, die or hang, by a clock that is not real."""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from bench import cells, first, race, summary
from bench.correctness import relative_error
from bench.layers import layers
from bench.providers import operands
from bench.record import ROOT
from bench.stage import CUT
from bench.timing import Clock


class Time:
    """A clock that moves only when something takes its time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Session(first.Session):
    """Its processes are entries of a table: stage -> [(seconds it would take, its status), ...], one for each start."""

    def __init__(self, seconds, tmp_path, table):
        self.time, self.table, self.started = Time(), table, []
        super().__init__(seconds, tmp_path / "first.log", self.time)

    def _start(self, command):
        name = command[0]
        plan = self.table.get(name, [(1.0, 0)])
        seconds, status = plan.pop(0) if len(plan) > 1 else plan[0]
        self.started.append((name, self.time.now, list(command)))
        return seconds, status

    def _wait(self, process, seconds):
        took, status = process
        self.time.now += min(took, seconds)
        return status if took <= seconds else CUT


def planned(tmp_path, jobs=12):
    """The real stages, each with its name for its first word, for the table."""
    return [
        first.Stage(s.name, (s.name, *s.command), s.share, s.vital, s.quiet)
        for s in first.stages(tmp_path, jobs, tiny=False, commit="abc")
    ]


def test_what_is_worth_most_comes_first(tmp_path):
    session = Session(540, tmp_path, {})
    assert first.run_all(session, planned(tmp_path)) == 0
    order = [name for name, _, _ in session.started]
    assert order[:5] == ["smoke", "checks", "facts", "race", "sweep"]
    assert order[5:] == ["race-rest", "race-tf32", "race-fp32", "race-fp16", "sweep-rest"]


def test_no_stage_takes_more_than_its_share_and_all_of_them_no_more_than_there_is(tmp_path):
    endless = {stage.name: [(1e9, 0)] for stage in planned(tmp_path)}
    session = Session(540, tmp_path, endless)
    assert first.run_all(session, planned(tmp_path)) == CUT
    assert session.time.now <= 540
    began = {name: at for name, at, _ in session.started}
    assert began["checks"] <= 0.12 * 540
    assert began["race"] <= 270  # half the time at most is spent before anything is timed
    assert {"smoke", "checks", "facts", "race", "sweep", "race-rest"} <= set(began)
    for name, at, command in session.started:
        limit = float(command[command.index("--seconds") + 1])
        assert limit > 0, name
        assert at + limit + first.LATE <= 540 + 1, name


def test_time_that_a_stage_leaves_is_the_next_ones(tmp_path):
    quick, slow = Session(540, tmp_path, {}), Session(540, tmp_path, {"checks": [(1e9, 0)]})
    limits = []
    for session in (quick, slow):
        first.run_all(session, planned(tmp_path))
        command = next(command for name, _, command in session.started if name == "race")
        limits.append(float(command[command.index("--seconds") + 1]))
    assert limits[0] > limits[1] + 50


def test_nothing_is_timed_where_the_first_tests_fail(tmp_path):
    session = Session(540, tmp_path, {"smoke": [(5.0, 1)]})
    assert first.run_all(session, planned(tmp_path)) == 1
    assert [name for name, _, _ in session.started] == ["smoke"]
    session = Session(540, tmp_path, {"smoke": [(5.0, 1)]})
    assert first.run_all(session, planned(tmp_path), keep_going=True) == 1
    assert len(session.started) == len(planned(tmp_path))


def test_first_tests_that_are_cut_do_not_stop_the_rest(tmp_path):
    session = Session(540, tmp_path, {"smoke": [(1e9, 0)]})
    assert first.run_all(session, planned(tmp_path)) == CUT
    assert len(session.started) > 5


def test_a_process_that_dies_has_a_successor(tmp_path):
    session = Session(540, tmp_path, {"race": [(3.0, CUT), (3.0, CUT), (3.0, 0)]})
    assert first.run_all(session, planned(tmp_path)) == 0
    assert [name for name, _, _ in session.started].count("race") == 3


def test_a_process_that_hung_has_a_successor_but_not_for_ever(tmp_path):
    (tmp_path / ".race.running").write_text("a cell")
    session = Session(540, tmp_path, {"race": [(3.0, 1)]})
    assert first.run_all(session, planned(tmp_path)[3:4]) == 1
    assert len(session.started) == first.TRIES


def test_what_is_measured_does_not_share_the_cores_with_compilers(tmp_path):
    session = Session(540, tmp_path, {"warm": [(300.0, 0)]})
    session.compile_ahead(["warm"])
    first.run_all(session, planned(tmp_path))
    at = {name: at for name, at, _ in session.started}
    assert at["warm"] == 0.0
    assert at["facts"] - at["checks"] == 1.0 + first.PATIENCE  # waited for, but not long
    assert at["checks"] - at["smoke"] <= 1.0  # not waited for


def test_what_takes_too_long_is_ended_with_all_its_processes(tmp_path):
    session = first.Session(60, tmp_path / "first.log")
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    process = session._start(["-c", code])
    for _ in range(600):  # a loaded machine takes its time until there is a child
        if (tmp_path / "first.log").read_text().endswith("\n"):
            break
        time.sleep(0.1)
    before = time.monotonic()
    assert session._wait(process, 1.0) == CUT
    assert time.monotonic() - before < 20
    child = pathlib.Path(f"/proc/{int((tmp_path / 'first.log').read_text())}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split(") ")[1][0] == "Z":  # ended, if nobody has asked after it
            return
        time.sleep(0.1)
    pytest.fail("a process of a stage outlived it")


# --- the cells of a record ---


def args(tmp_path, seconds=float("inf")):
    return argparse.Namespace(record=tmp_path / "some.jsonl", seconds=seconds, commit="abc", tiny=True)


def test_cells_go_on_behind_the_one_that_ended_the_process(tmp_path):
    code = (
        "import sys, os, argparse, pathlib; from bench.cells import Cells\n"
        "run = Cells(argparse.Namespace(record=pathlib.Path(sys.argv[1]), seconds=1e9, commit='abc', tiny=True))\n"
        "for name in run.each(['a', 'b', 'c']):\n"
        "    if name == 'b': os._exit(9)\n"
        "    run.write(name, {'ms': 1.0})\n"
    )
    for status in (9, 0):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "some.jsonl")], cwd=ROOT, env={**os.environ})
        assert done.returncode == status
    lines = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()[1:]]
    assert [(line["cell"], line.get("error")) for line in lines] == [
        ("a", None), ("b", "the process died in it"), ("c", None),
    ]  # fmt: skip


def test_cells_stop_when_their_time_is_up_and_say_so(tmp_path):
    run = cells.Cells(args(tmp_path, seconds=-1.0))
    assert list(run.each(["a"])) == []
    assert run.status == CUT
    run = cells.Cells(args(tmp_path))
    for name in run.each(["a", "b"]):
        run.failed(name, ValueError("no"), {"layer": name}) if name == "a" else run.write(name, {})
    assert run.status == 1
    assert [line.get("error") for line in run.writer.lines] == ["ValueError: no", None]


def test_a_device_that_failed_ends_the_process_but_not_the_record(tmp_path):
    run = cells.Cells(args(tmp_path))
    for name in run.each(["a", "b"]):
        with pytest.raises(SystemExit) as stopped:
            run.failed(name, RuntimeError("CUDA error: an illegal memory access was encountered"), {})
        break
    assert stopped.value.code == CUT
    assert not run.running.exists()
    assert list(cells.Cells(args(tmp_path)).each(["a", "b"])) == ["b"]


# --- the whole, and what it says last ---


@pytest.mark.parametrize("stage", ["race", "sweep", "facts"])
def test_measurements_run_on_shrunk_layers(tmp_path, stage):
    record = tmp_path / f"{stage}.jsonl"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"bench.{stage}", "--tiny", "--commit", "abc", "--seconds", "100", "--record", record]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, CUT), done.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    assert lines
    assert [line["error"] for line in lines if "error" in line] == []
    if stage == "race":
        assert all(line["ratio"] == pytest.approx(line["torch.nn"]["ms"] / line["tconv"]["ms"], rel=1e-3) for line in lines)
    if stage == "sweep":
        assert all(line["regret"] >= line["regret_without_tma"] >= 1 for line in lines)


def test_the_summary_is_short_and_says_what_failed(tmp_path):
    head = {"kind": "tconv record", "gpu": "NVIDIA H200", "commit": "abc", "torch": "2.11.0", "triton": "3.6.0", "tiny": False}
    tests = [{"test": f"tests/test_gpu.py::test_{i}", "outcome": "failed", "detail": "wrong\nby far"} for i in range(30)]
    tests += [{"test": "tests/test_gpu.py::test_0", "outcome": "passed"}]  # when it was run again
    race = [
        {
            "cell": f"layer{i} bf16 {pass_} contiguous", "family": ("1-D", "3-D")[i % 2], "precision": "bf16",
            "layer": f"layer{i}", "pass": pass_, "layout": "contiguous", "ratio": ratio,
            "torch.nn": {"ms": 0.1 * ratio}, "tconv": {"ms": 0.1},
        }
        for i in range(20)
        for pass_, ratio in (("fprop", 2.0), ("dgrad", 0.5))
    ]  # fmt: skip
    race += [{"cell": "odd", "error": "wrong result"}]
    sweep = [{"cell": "a", "family": "1-D", "regret": 1.5, "regret_without_tma": 1.25}]
    sweep += [{"cell": "b", "error": "an illegal instruction was encountered"}]
    for name, lines in (("checks", tests), ("race", race), ("sweep", sweep)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    text = summary.lines(tmp_path)
    assert len(text) <= summary.MOST
    assert "gpu NVIDIA H200" in text[0]
    assert "29 failed, 1 passed" in text[1]
    assert "test_gpu.py::test_1: wrong by far" in text[2]
    assert any("odd: wrong result" in line for line in text)
    (family,) = [line for line in text if line.startswith("  1-D") and "cells" not in line]
    assert family.split()[1:3] == ["2.00", "0.50"]
    assert any("1.50 1.25 (1 cells)" in line for line in text)
    assert "  sweep, b: an illegal instruction was encountered" in text


class Mode(torch.overrides.TorchFunctionMode):
    """Within it, explicit calls are left to torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_cell_that_torch_computed_is_an_error_and_has_no_time():
    o = operands(layers()[0].tiny(), "fp32", "cpu")
    with Mode():
        line = race.race(o, "fprop", "fp32", Clock("cpu"), 2)
    assert line["error"].startswith("not ours: conv2d: torch (")
    assert "ratio" not in line
    assert line["error_norm"] < 1e-5


@pytest.mark.parametrize(
    ("got", "error"),
    [([3.0, 4.0], 0.0), ([3.0, 4.5], 0.1), ([3.0, math.nan], math.inf), ([3.0, math.inf], math.inf), ([3.0], math.inf)],
)
def test_a_relative_error(got, error):
    right = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor(got), right) == pytest.approx(error)
    assert relative_error((right, torch.tensor(got)), (right, right)) == pytest.approx(error)
    assert relative_error((right,), (right, right)) == math.inf
