"""scripts/lane.py: tests on compiled code under one Triton after another."""

import json
import pathlib
import subprocess
import sys
from importlib.metadata import distribution

import triton

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "scripts"))
import lane

ROOT = lane.ROOT


def command(*arguments):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "lane.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def folder_of(path, version):
    """The Triton of this environment, as if it were another version in a folder of its own."""
    about = path / f"triton-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: triton\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(distribution("triton").read_text("entry_points.txt"))  # Triton's backends
    (path / "triton").symlink_to(pathlib.Path(triton.__file__).parent)
    return path


def test_tests_run_under_a_triton_in_a_folder_and_are_counted(tmp_path):
    there, record = folder_of(tmp_path / "there", "0.0.1"), tmp_path / "record.json"
    tests = ["tests/test_split_precision.py", "-k", "test_cancellation"]
    status, out, said = command(str(there), "--record", str(record), "--", *tests)
    assert status == 0, out + said
    (row,) = json.loads(record.read_text())
    assert (row["triton"], row["arch"], row["tests"]) == ("0.0.1", "sm_90", " ".join(tests))
    assert row["passed"] > 0
    assert row["failed"] == 0
    assert row["launches"] >= row["kernels"] > 0
    assert f"| 0.0.1 | sm_90 | {' '.join(tests)} | {row['passed']} | 0 |" in out


def test_what_cannot_run_is_named(tmp_path):
    status, _, said = command(str(tmp_path))
    assert status == 2
    assert f"no Triton in {tmp_path}" in said
    status, _, said = command("--chosen")
    assert status == 2
    assert "name a version of Triton" in said


def test_counts_are_read_off():
    suites = [{"tests": "12", "failures": "2", "errors": "1", "skipped": "4"}]
    output = (
        "simulator: 1 launches of 1 compiled kernels\nsimulator: 44 launches of 30 compiled kernels (some of them in ...)\n"
    )
    found = lane.counted(suites, output)
    assert found == {"passed": 5, "failed": 3, "skipped": 4, "launches": 44, "kernels": 30}
    assert not lane.good(found)
    assert lane.good(found | {"failed": 0})
    assert not lane.good(lane.counted([], ""))  # it died


def test_older_tritons_come_first():
    newest, oldest, middle = (
        {"triton": triton, "arch": arch, "tests": "all"}
        for triton, arch in (("3.10.0", "sm_80"), ("3.6.0", "sm_80"), ("3.6.0", "sm_90"))
    )
    assert sorted([newest, middle, oldest], key=lane.place) == [oldest, middle, newest]


def test_the_table_in_the_evidence_is_that_of_the_record():
    text = (ROOT / "docs" / "evidence.md").read_text()
    between = text.split(lane.MARKS[0])[1].split(lane.MARKS[1])[0]
    assert between.strip() == lane.table(json.loads(lane.RECORD.read_text()))
