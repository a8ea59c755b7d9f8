#!/usr/bin/env python3
"""Runs tests on compiled code, in the simulator, under one Triton after another, and counts what passed.

    python scripts/lane.py 3.6.0 3.9.0 --chosen                     # the tests that CI runs on compiled code
    python scripts/lane.py 3.8.0 -- tests/test_kernels.py -n 2      # what follows -- goes to pytest; default: all tests
    python scripts/lane.py build/triton --arch sm_80 --chosen       # a folder with a Triton, as `pip install --target` makes it
    python scripts/lane.py --write                                  # the record as a table in docs/evidence.md

A version is installed into out/triton-VERSION, if it is not there yet; the environment's own Triton stays as it is. The record
is bench/results/lane.json. Exit status: 0 if tests passed and none failed, under each Triton; 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "lane.json"
MARKS = ("<!-- lane -->", "<!-- /lane -->")
COUNTS = ("passed", "failed", "skipped", "launches", "kernels", "seconds")


def installed(name: str) -> pathlib.Path:
    """The folder of a Triton: the one named, or that of a version, which is installed if need be."""
    folder = pathlib.Path(name)
    if re.fullmatch(r"\d+\.\d+\.\d+\S*", name):
        folder = ROOT / "out" / f"triton-{name}"
        if version(folder) is None:
            pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps", "--upgrade"]
            subprocess.run([*pip, "--target", folder, f"triton=={name}"], check=True)
    return folder.absolute()


def version(folder: pathlib.Path) -> str | None:
    """Which Triton a folder has; None if it has none."""
    found = importlib.metadata.distributions(name="triton", path=[str(folder)])
    return next((distribution.version for distribution in found), None)


def run(folder: pathlib.Path, arch: str, arguments: list[str]) -> dict[str, Any]:
    """Runs pytest under the Triton of a folder, and returns its counts."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        report = pathlib.Path(scratch) / "junit.xml"
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--compiled", arch, f"--junitxml={report}"]
        began = time.monotonic()
        process = subprocess.Popen([*pytest, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        process.wait()
        seconds = time.monotonic() - began
        suites = ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else ()
        return counted([suite.attrib for suite in suites], "".join(lines)) | {"seconds": round(seconds)}


def counted(suites: list[dict[str, str]], output: str) -> dict[str, int]:
    """The counts of pytest's XML report, and those of the simulator's last line."""
    total, failed, errors, skipped = (sum(int(s[k]) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
    said = re.findall(r"^simulator: (\d+) launches of (\d+) compiled kernels", output, re.MULTILINE)
    launches, kernels = map(int, said[-1]) if said else (0, 0)
    return {
        "passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped,
        "launches": launches, "kernels": kernels,
    }  # fmt: skip


def good(row: dict[str, Any]) -> bool:
    """Whether tests passed, and none failed."""
    return bool(row["passed"]) and not row["failed"]


def place(row: dict[str, Any]) -> tuple[list[int], str, str]:
    """Where a row stands among others: the older Triton first."""
    return [int(part) for part in re.findall(r"\d+", row["triton"])], row["arch"], row["tests"]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the record as Markdown."""
    lines = [f"| Triton | code | tests | {' | '.join(COUNTS)} |", "|---" * (3 + len(COUNTS)) + "|"]
    for row in rows:
        cells = (row["triton"], row["arch"], row["tests"], *(f"{row[k]:,}" for k in COUNTS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tritons", nargs="*", metavar="TRITON", help="versions, or folders")
    parser.add_argument("--arch", choices=("sm_80", "sm_90"), default="sm_90")
    parser.add_argument("--chosen", action="store_true", help="only the tests of tests/chosen.py")
    parser.add_argument("--record", type=pathlib.Path, default=RECORD)
    parser.add_argument("--write", action="store_true", help="put the record into docs/evidence.md")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, arguments = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if not args.tritons and not args.write:
        parser.error("name a version of Triton, or a folder that has one")
    arguments = ["--chosen"] * args.chosen + arguments
    folders = [installed(name) for name in args.tritons]
    for folder in folders:
        if version(folder) is None:
            parser.error(f"no Triton in {folder}")
    record = json.loads(args.record.read_text()) if args.record.exists() else []
    done = []
    for folder in folders:
        what = {"triton": version(folder), "arch": args.arch, "tests": " ".join(arguments) or "all"}
        print(f"== Triton {what['triton']}", flush=True)
        done.append(what | run(folder, args.arch, arguments))
        record = sorted([row for row in record if any(row[k] != what[k] for k in what)] + done[-1:], key=place)
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")  # as they come: what is cut later keeps them
    if done:
        print(table(done))
    if args.write:
        evidence = ROOT / "docs" / "evidence.md"
        before, after = evidence.read_text().split(MARKS[0])[0], evidence.read_text().split(MARKS[1])[1]
        evidence.write_text(f"{before}{MARKS[0]}\n{table(record)}\n{MARKS[1]}{after}")
    return int(not all(map(good, done)))


if __name__ == "__main__":
    sys.exit(main())
