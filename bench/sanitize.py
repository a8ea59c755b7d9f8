#!/usr/bin/env python3
"""Runs bench/test_small.py under compute-sanitizer's memcheck and racecheck and records what they find.

    python -m bench.sanitize --out bench/results/DIR [--seconds 480] [--tiny]

Where compute-sanitizer is not installed one line says so. --tiny runs the cases without it, in the interpreter.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys

from bench.record import ROOT, Writer, machine
from bench.stage import CUT

TOOLS = ("memcheck", "racecheck")


def findings(log: str) -> int | None:
    """Errors or hazards that a sanitizer's log ends with; None where it has no end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    return int(found[-1]) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="for both tools together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--commit")
    args = parser.parse_args()
    out = args.out.absolute()
    pytest = [sys.executable, "-m", "pytest", "-p", "bench.stage", "-q", "bench/test_small.py"]
    pytest += (["--tiny"] if args.tiny else []) + (["--commit", args.commit] if args.commit else [])
    if args.tiny:
        done = subprocess.run([*pytest, "--record", out / "sanitize.jsonl", "--seconds", str(args.seconds)], cwd=ROOT)
        return done.returncode
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here: nothing was checked by it")
        return 0
    probe = [tool, sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
    if subprocess.run(probe, cwd=ROOT, capture_output=True).returncode:
        print("compute-sanitizer does not work on this device: nothing was checked by it")
        return 0
    writer = Writer(out / "sanitize.jsonl", machine(args.commit) | {"tiny": False})
    for name in TOOLS:
        before = [line for line in writer.lines if line.get("tool") == name]
        if any(line["complete"] for line in before):
            print(f"{name}: already recorded")
            continue
        log, record = out / f"sanitize-{name}-{len(before) + 1}.log", out / f"sanitize_{name}.jsonl"
        command = [tool, "--tool", name, "--log-file", log, *pytest, "--record", record]
        status = subprocess.run([*command, "--seconds", str(args.seconds / len(TOOLS))], cwd=ROOT).returncode
        found = findings(log.read_text() if log.exists() else "")
        said = "no summary" if found is None else f"{found} found"
        print(f"{name}: {said}{', cut' if status == CUT else ''}; the log is {log}")
        writer.write({"tool": name, "found": found, "status": status, "complete": found is not None and status != CUT})
    if any(line.get("found") or line.get("status", 0) not in (0, CUT) for line in writer.lines):
        return 1
    done = {line["tool"] for line in writer.lines if line.get("complete")}
    return 0 if done == set(TOOLS) else CUT


if __name__ == "__main__":
    sys.exit(main())
