"""What was measured is kept on disk, found again, and used where it holds; nothing is lost or half-written."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys

import filelock
import pytest
import torch

from tconv.launching import launch, prepare
from tconv.launching.launch import convolution
from tconv.launching.memory_format import shaped
from tconv.launching.record import Slower
from tconv.planning.device import DEVICES
from tconv.planning.plan import Forced
from tconv.planning.problem import PREDICTED, Geometry, forward_problem
from tconv.planning.tiles import Tile
from tconv.records import book, file
from tconv.records.book import Book, Measured, barring, line_of, mechanism_line
from tconv.records.key import OCTAVE, Cell, Machine, bucket, machine

H200 = DEVICES["H200"]
HERE = Machine("H200", "580.1", "2.13", "3.7.1", "abc")
CELL = Cell(("fprop", "bfloat16", ("c8", "i8", "c8"), 2, 64, 64, 1, (1, 3, 3), (1, 1, 1), (1, 1, 1)), 20, 40)
PLAN = Forced("gather", Tile(128, 128, 64, 8, 3), 1, False, "ieee")
TWO_BLOCKS = Forced("gather", Tile(128, 128, 64, 8, 4, extra=64), 1, False, "ieee")
FOUND = Measured(PLAN, 1e-5, 2e-5, 0.03, 1.1e-5, 1.2e-5)
PROBLEM = forward_problem((32, 256, 14, 14), (256, 256, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "measured.jsonl"


def written(path, *lines):
    Book(path).add(lines)
    return Book(path)


def moved(octaves, cell=CELL):
    return dataclasses.replace(cell, pixels=cell.pixels + round(octaves * OCTAVE))


# --- what is found ---


def test_what_is_written_is_read_by_another_process(path):
    read = written(
        path, line_of(HERE, CELL, "N32 C64", FOUND), barring(HERE, CELL, PLAN, "wrong"), mechanism_line(HERE, "tma", True)
    )
    assert read.find(HERE, CELL) == (CELL, FOUND)
    assert read.barred(HERE, CELL) == {PLAN}
    assert read.works(HERE, "tma") is True
    assert read.works(HERE, "bf16x6") is None
    assert read.works_elsewhere("tma")


def test_a_pass_that_torch_alone_can_run_has_no_plan(path):
    found = Measured(None, None, 2e-5)
    assert written(path, line_of(HERE, CELL, "", found)).find(HERE, CELL) == (CELL, found)
    assert found.torch_is_faster


@pytest.mark.parametrize("change", [{f.name: "other"} for f in dataclasses.fields(Machine)], ids=lambda c: next(iter(c)))
def test_a_measurement_elsewhere_is_not_used(path, change):
    assert written(path, line_of(dataclasses.replace(HERE, **change), CELL, "", FOUND)).find(HERE, CELL) is None


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({}, True), ({"driver": "1"}, True), ({"torch": "3"}, True), ({"triton": "4"}, True),
        ({"gpu": "A"}, False), ({"kernels": "b"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_loaded_record_holds_for_the_gpu_and_the_kernels(tmp_path, path, change, used):
    written(tmp_path / "model.jsonl", line_of(dataclasses.replace(HERE, **change), CELL, "", FOUND))
    found = Book(path)
    assert found.load(tmp_path / "model.jsonl") == 1
    assert (found.find(HERE, CELL) is not None) == used


def test_the_users_own_measurement_goes_before_a_loaded_one(tmp_path, path):
    other = dataclasses.replace(FOUND, seconds=8e-6)
    written(tmp_path / "model.jsonl", line_of(HERE, CELL, "", other))
    found = written(path, line_of(HERE, CELL, "", FOUND))
    found.load(tmp_path / "model.jsonl")
    assert found.find(HERE, CELL) == (CELL, FOUND)


def test_shipped_records_come_last(tmp_path, path, monkeypatch):
    monkeypatch.setattr(book, "SHIPPED", tmp_path)
    written(tmp_path / "gpu.jsonl", line_of(HERE, CELL, "", FOUND))
    assert Book(path).find(HERE, CELL) == (CELL, FOUND)
    other = dataclasses.replace(FOUND, seconds=8e-6)
    assert written(path, line_of(HERE, CELL, "", other)).find(HERE, CELL) == (CELL, other)


def test_a_miss_takes_the_nearest_bucket_within_an_octave(path):
    near, far = dataclasses.replace(FOUND, seconds=1e-6), dataclasses.replace(FOUND, seconds=2e-6)
    found = written(path, line_of(HERE, moved(0.5), "", near), line_of(HERE, moved(-1), "", far))
    assert found.find(HERE, CELL) == (moved(0.5), near)
    assert found.find(HERE, moved(-1)) == (moved(-1), far)
    assert found.find(HERE, moved(1.5)) == (moved(0.5), near)
    assert found.find(HERE, moved(1.75)) is None
    assert found.find(HERE, dataclasses.replace(CELL, kind=("dgrad", *CELL.kind[1:]))) is None


def test_numbers_in_one_bucket_are_within_a_fifth():
    for n in range(1, 3000):
        assert bucket(n) <= bucket(n + 1)
        assert bucket(2 * n) == bucket(n) + OCTAVE
    ranges = {}
    for n in range(64, 3000):
        ranges.setdefault(bucket(n), []).append(n)
    assert all(max(r) / min(r) < 2 ** (1 / OCTAVE) + 0.01 for r in ranges.values())


# --- faults ---


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\n\n", b"\xff\xfe\x00", b"[" * 5000 + b"\n",
        b"[1, 2]\n", b'"tconv"\n', b"{}\n", b'{"tconv": 1}\n', b'{"tconv": 2, "gpu": "H200"}\n',
        b'{"tconv":1,"gpu":"H200","driver":"580.1","torch":"2.13","triton":"3.7.1","kernels":"abc","kind":{"a":1}}\n',
        b'{"tconv":1,"gpu":"H200","driver":"580.1","torch":"2.13","triton":"3.7.1","kernels":"abc","kind":["fprop"],'
        b'"images":1e999,"pixels":2,"plan":null,"ms":null,"torch_ms":1,"predicted_ms":null,"guess_ms":null,"spread":0}\n',
    ],
)  # fmt: skip
def test_what_is_foreign_is_passed_over_and_kept(path, text):
    path.parent.mkdir()
    path.write_bytes(text)
    assert Book(path).empty
    assert written(path, line_of(HERE, CELL, "", FOUND)).find(HERE, CELL) == (CELL, FOUND)
    assert path.read_bytes().startswith(text)


def test_any_cut_of_a_record_loses_the_cut_line_only(path):
    other = moved(3)
    written(path, line_of(HERE, CELL, "", FOUND), line_of(HERE, other, "", FOUND))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole), 7):
        path.write_bytes(whole[:end])
        assert Book(path).find(HERE, CELL) == (CELL, FOUND)
    third = moved(-3)
    assert written(path, line_of(HERE, third, "", FOUND)).find(HERE, third) == (third, FOUND)  # behind the cut line


@pytest.mark.parametrize(
    "change",
    [
        {"tile": [1, 2]},
        {"tile": ["a"] * 7},
        {"splits": "2"},
        {"staged": 1},
        {"kernel": None},
        {"precision": []},
        {"tile": [64, 64, 64, 64, 3, 0, 1]},
        {"tile": [64, 64, 64, 4, 3, -7, 1]},
    ],
    ids=str,
)
def test_a_plan_that_is_none_is_passed_over(path, change):
    line = line_of(HERE, CELL, "", FOUND)
    found = written(path, line | {"plan": line["plan"] | change})
    assert found.find(HERE, CELL) is None


def test_a_full_disk_leaves_the_file_as_it_was(path):
    found = written(path, line_of(HERE, CELL, "", FOUND))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.warns(UserWarning, match="does not keep what it measured: .*no room"):
            found.add([line_of(HERE, moved(3), "", FOUND)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert found.find(HERE, moved(3)) == (moved(3), FOUND)  # the process goes on with what it knows


def test_a_folder_that_cannot_be_written_is_told_and_survived(tmp_path):
    (tmp_path / "file").write_text("no folder")
    found = Book(tmp_path / "file" / "measured.jsonl")
    with pytest.warns(UserWarning, match="does not keep what it measured"):
        found.add([line_of(HERE, CELL, "", FOUND)])
    assert found.find(HERE, CELL) == (CELL, FOUND)


def test_a_lock_that_another_process_never_leaves_is_not_waited_for_forever(path, monkeypatch):
    monkeypatch.setattr(file, "PATIENCE", 0.05)
    found = written(path, line_of(HERE, CELL, "", FOUND))
    with filelock.FileLock(f"{path}.lock"), pytest.warns(UserWarning, match="does not keep what it measured: .*Timeout"):
        found.add([line_of(HERE, moved(3), "", FOUND)])


APPENDS = """
import sys, pathlib
from tconv.records import file
for i in range(100):
    assert file.append(pathlib.Path(sys.argv[1]), [{"who": sys.argv[2], "i": i, "long": "x" * 5000}])
"""


def test_two_processes_append_at_once(path):
    both = [subprocess.Popen([sys.executable, "-c", APPENDS, str(path), who]) for who in "ab"]
    assert [p.wait(120) for p in both] == [0, 0]
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for who in "ab":
        assert [line["i"] for line in lines if line["who"] == who] == [*range(100)]


# --- what is chosen ---


@pytest.fixture
def known(path, monkeypatch):
    """An empty book in place of the process's, and a function that adds what was measured of PROBLEM's forward pass."""
    found = Book(path)
    monkeypatch.setattr(prepare, "book", lambda: found)

    def know(measured, device=H200, dtype="bfloat16", x=None):
        given = operands() if x is None else (x, *operands()[1:])
        addressed = [prepare.addressing(t) for t in given]
        cell = prepare.cell_of(prepare.GatherPass("fprop", PROBLEM, *addressed, True), dtype)
        found.add([line_of(machine(device.name), cell, "", measured)])

    know.book = found
    return know


def operands(channels_last=True):
    return tuple(shaped(PROBLEM.shape(which), channels_last, torch.bfloat16) for which in "xwy")


def planned(policy="always", channels_last=True):
    x, w, y = operands(channels_last)
    return prepare.prepare_gather("fprop", PROBLEM, x, w, None, y, H200, policy).call.plan


def test_the_plan_that_was_measured_is_chosen(known):
    guess = planned()
    tile = next(t for t in guess.tiles if t != guess.tile)
    known(dataclasses.replace(FOUND, plan=dataclasses.replace(guess.choices, tile=tile)))
    plan = planned()
    assert (plan.kernel, plan.tile) == (guess.kernel, tile)
    assert plan.reason.startswith("measured: tconv 10.0 us, torch 20.0 us; ")
    assert planned(channels_last=False).reason.startswith("best of")  # another memory format is another cell


def test_a_plan_of_two_blocks_is_kept_and_older_plans_of_one_are_read(known):
    known(dataclasses.replace(FOUND, plan=TWO_BLOCKS))
    assert planned().tile == TWO_BLOCKS.tile
    assert book.plan_from(book.plan_to(TWO_BLOCKS)) == TWO_BLOCKS
    before = book.plan_to(PLAN)
    assert book.plan_from(before | {"tile": before["tile"][:7]}) == PLAN


def test_a_plan_of_another_size_gets_splits_that_fit(known):
    known(dataclasses.replace(FOUND, plan=Forced("gather", Tile(128, 128, 64, 8, 3), 999, False, "ieee")))
    plan = planned()
    assert plan.kernel == "gather"
    assert plan.tile == Tile(128, 128, 64, 8, 3)
    assert plan.reason.startswith("measured")


@pytest.mark.parametrize(
    "plan",
    [
        dataclasses.replace(PLAN, tile=Tile(3, 5, 7)), dataclasses.replace(PLAN, tile=Tile(1024, 1024, 1024)),
        dataclasses.replace(PLAN, kernel="wgrad"), dataclasses.replace(PLAN, kernel="none of ours"), None,
    ],
)  # fmt: skip
def test_a_plan_that_cannot_run_leaves_the_choice_to_the_planner(known, plan):
    before = planned()
    known(dataclasses.replace(FOUND, plan=plan))
    assert planned() == before


def test_a_mechanism_that_does_not_work_here_is_not_chosen_by_a_record_either(known):
    known(dataclasses.replace(FOUND, plan=Forced("tma", Tile(128, 128, 64, 8, 3), 1, False, "ieee")))
    assert planned().kernel == "tma"
    x, w, y = operands()
    broken = dataclasses.replace(H200, check=lambda mechanism: False)
    assert prepare.prepare_gather("fprop", PROBLEM, x, w, None, y, broken, "always").call.plan.kernel != "tma"


def test_a_plan_that_is_barred_is_not_chosen(known):
    guess = planned()
    choices = dataclasses.replace(guess.choices, tile=next(t for t in guess.tiles if t != guess.tile))
    known(dataclasses.replace(FOUND, plan=choices))
    assert planned().tile == choices.tile
    cell = prepare.cell_of(
        prepare.GatherPass("fprop", PROBLEM, *map(prepare.addressing, operands()), True), "bfloat16"
    )  # fmt: skip
    known.book.add([barring(machine(H200.name), cell, choices, "wrong")])
    assert planned().tile == guess.tile


SLOW = dataclasses.replace(FOUND, seconds=2e-5, torch=1e-5)


def test_torch_runs_what_it_is_faster_at_if_it_may(known):
    known(SLOW)
    assert planned(policy="always").kernel == "gather"
    with pytest.raises(Slower, match=r"^measured: tconv 20.0 us, torch 10.0 us$"):
        planned(policy="auto")


def test_a_prediction_is_asked_for_by_name(known):
    before = planned(PREDICTED)
    known(SLOW)
    assert planned(PREDICTED) == before


def test_what_is_repeated_asks_no_record(known, monkeypatch):
    monkeypatch.setattr(launch, "_prepared", {})
    monkeypatch.setattr(launch, "device_of", lambda t: H200)
    known(FOUND)
    g, (x, w, _) = Geometry(PROBLEM, True), operands()
    first = convolution(False, g, x, w, None)
    assert first.call.reason.startswith("measured")
    monkeypatch.setattr(prepare, "book", None)
    assert convolution(False, g, x, w, None) is first


def test_within_the_spread_torch_is_not_faster(known):
    known(dataclasses.replace(SLOW, seconds=1.02e-5, spread=0.03))
    assert planned(policy="auto").kernel == "gather"


def test_deterministic_algorithms_keep_to_our_own_plans(known, poisoned):
    known(SLOW)
    assert planned(policy="auto").kernel == "gather"


def test_the_flag_for_deterministic_algorithms_is_asked_on_every_call(known, monkeypatch):
    monkeypatch.setattr(launch, "_prepared", {})
    monkeypatch.setattr(launch, "device_of", lambda t: H200)
    known(SLOW)
    g, (x, w, _) = Geometry(PROBLEM, True), operands()
    for _ in range(2):
        with pytest.raises(Slower, match="measured"):
            convolution(False, g, x, w, None)
        torch.use_deterministic_algorithms(True)
        try:
            assert convolution(False, g, x, w, None).call.ours
        finally:
            torch.use_deterministic_algorithms(False)
    assert convolution(False, dataclasses.replace(g, policy="always"), x, w, None).call.ours


def test_a_forced_plan_goes_before_what_was_measured(known):
    import tconv

    known(SLOW)
    with tconv.force(kernel="gather"):
        assert planned(policy="auto").reason.startswith("forced")
