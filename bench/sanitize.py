#!/usr/bin/env python3
"""Runs bench/test_small.py under what watches every access of memory, and records what that finds: compute-sanitizer's memcheck
and racecheck, or, where there is no GPU, the simulator (simulator/README.md) on the code compiled for sm_90.

    python -m bench.sanitize --out bench/results/DIR [--seconds 480] [--tiny]

A line says so where a GPU is there and compute-sanitizer is not. --tiny runs the cases unwatched, in the interpreter.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from bench.record import ROOT, Writer, machine, read
from bench.stage import CUT

TOOLS = ("memcheck", "racecheck")
SIMULATOR = "simulator"
ARCH = "sm_90"


def findings(log: str) -> int | None:
    """Errors or hazards that a sanitizer's log ends with; None where it has no end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    return int(found[-1]) if found else None


def faults(lines: list[dict[str, Any]]) -> list[str]:
    """The simulator's findings in the record of a stage: for each test that ended in a fault, its name and what happened."""
    last = {line["test"]: line.get("detail", "") for line in lines if "test" in line}
    return [f"{test}: {detail}" for test, detail in last.items() if "simulator.errors.Fault" in detail]


def chosen() -> tuple[str, ...]:
    """The tools to run here. Says in a line where the simulator takes compute-sanitizer's place, and why nothing can run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        problem = "is not here"
    else:
        probe = [tool, sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
        if not subprocess.run(probe, cwd=ROOT, capture_output=True).returncode:
            return TOOLS
        problem = "does not work on this device"
    if torch.cuda.is_available():
        print(f"compute-sanitizer {problem}: nothing was checked by it")
        return ()
    print(f"No GPU here: the simulator runs the code for {ARCH}")
    return (SIMULATOR,)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="for all tools together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--commit")
    args = parser.parse_args()
    out = args.out.absolute()
    pytest = [sys.executable, "-m", "pytest", "-p", "bench.stage", "-q", "bench/test_small.py"]
    pytest += (["--tiny"] if args.tiny else []) + (["--commit", args.commit] if args.commit else [])
    if args.tiny:
        done = subprocess.run([*pytest, "--record", out / "sanitize.jsonl", "--seconds", str(args.seconds)], cwd=ROOT)
        return done.returncode
    tools = chosen()
    if not tools:
        return 0
    writer = Writer(out / "sanitize.jsonl", machine(args.commit) | {"tiny": False})
    for name in tools:
        before = [line for line in writer.lines if line.get("tool") == name]
        if any(line["complete"] for line in before):
            print(f"{name}: already recorded")
            continue
        log, record = out / f"sanitize-{name}-{len(before) + 1}.log", out / f"sanitize_{name}.jsonl"
        command = [*pytest, "--record", record, "--seconds", str(args.seconds / len(tools))]
        if name == SIMULATOR:
            status = subprocess.run([*command, "-p", "simulator.pytest_plugin", "--compiled", ARCH], cwd=ROOT).returncode
            found = faults(read(record).lines) if record.exists() else None
            log.write_text("".join(f"{line}\n" for line in found or []))
            count = None if found is None else len(found)
        else:
            status = subprocess.run(["compute-sanitizer", "--tool", name, "--log-file", log, *command], cwd=ROOT).returncode
            count = findings(log.read_text() if log.exists() else "")
        said = "no summary" if count is None else f"{count} found"
        print(f"{name}: {said}{', cut' if status == CUT else ''}; the log is {log}")
        writer.write({"tool": name, "found": count, "status": status, "complete": count is not None and status != CUT})
    if any(line.get("found") or line.get("status", 0) not in (0, CUT) for line in writer.lines):
        return 1
    done = {line["tool"] for line in writer.lines if line.get("complete")}
    return 0 if done >= set(tools) else CUT


if __name__ == "__main__":
    sys.exit(main())
