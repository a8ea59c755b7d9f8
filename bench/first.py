"""Spends the first minutes on a GPU by worth per second: is it right, what does the device reach, how fast is it.

    scripts/gpu.sh first [--minutes 9] [--out DIR] [--commit ID] [--dry-run] [--only STAGE] [--keep-going]

Stages run one after the other, each a process with a limit of its own; from the first second on, spare cores compile what
later stages will launch. Every number is written to a record as soon as it is known, so what is cut is kept, and the same
command goes on behind it. The last thing printed is a summary of at most 40 lines. Exit status: 0 if all is well, 1 if
something is wrong, 75 if there is more to do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import summary
from bench.record import ROOT
from bench.stage import CUT

LATE = 10  # seconds that a stage has to stop by itself; what takes longer is ended
LEAST = 20  # seconds of which a stage can make use
PATIENCE = 5  # seconds to wait for compilers; what they leave, a stage compiles on all cores or as it needs it
TRIES = 4  # processes for one stage, where they die
SMOKE = "graph or precompile or direct or stream or capture"
# Files of tests that put kernels to the test on the device's own tensors, the most telling first.
CHECKS = (
    "tests/test_gpu.py", "tests/test_tma.py", "tests/test_persistent.py", "tests/test_rows.py", "tests/test_kernels.py",
    "tests/test_workspace.py", "tests/test_freeze.py", "tests/test_strips.py", "tests/test_split_precision.py",
    "tests/test_copy.py", "tests/test_autograd.py", "tests/test_random.py", "tests/test_torch_samples.py",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        name: shown to people. Several stages may write to one record.
        command: the arguments after Python's. LIMIT stands for the seconds that the stage may take.
        share: the largest part of the remaining time that the stage may take.
        vital: if this stage fails, the later ones are not run.
        quiet: the stage measures times, so compilers in the background are ended first.
    """

    name: str
    command: tuple[str, ...]
    share: float
    vital: bool = False
    quiet: bool = False


LIMIT = "{limit}"
ENDED = {0: "is done", CUT: "was cut"}


def stages(out: pathlib.Path, jobs: int, tiny: bool, commit: str | None) -> list[Stage]:
    """The stages in their order. `jobs` processes share the GPU in those that check."""
    common = (*(("--tiny",) if tiny else ()), *(("--commit", commit) if commit else ()), "--seconds", LIMIT)

    def record(name: str) -> tuple[str, ...]:
        return ("--record", str(out / f"{name}.jsonl"), *common)

    def check(*what: str) -> tuple[str, ...]:
        workers = ("-n", str(jobs)) if jobs > 1 else ("-p", "no:xdist")
        pytest = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.stage")
        return (*pytest, *workers, *record("checks"), *what)

    def race(name: str, share: float, *which: str) -> Stage:
        return Stage(name, ("-m", "bench.race", *which, *record("race")), share, quiet=True)

    return [
        Stage("smoke", check("-k", SMOKE, CHECKS[0]), 0.12, vital=True),
        Stage("checks", check(*(CHECKS[:1] if tiny else CHECKS)), 0.3),
        Stage("facts", ("-m", "bench.facts", *record("facts")), 0.15, quiet=True),
        race("race", 0.5),
        Stage("sweep", ("-m", "bench.sweep", *record("sweep")), 0.6, quiet=True),
        race("race-rest", 0.6, "--part", "rest"),
        *(race(f"race-{precision}", 0.5, "--precision", precision) for precision in ("tf32", "fp32", "fp16")),
        Stage("sweep-rest", ("-m", "bench.sweep", "--part", "rest", *record("sweep")), 1.0, quiet=True),
    ]


class Session:
    """Runs stages until the time is up.

    Args:
        seconds: to spend.
        log: file for the output of all processes.
        clock: seconds that pass, for tests.
    """

    def __init__(self, seconds: float, log: pathlib.Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.log = clock, log
        self.start = clock()
        self.end = self.start + seconds
        self.background: subprocess.Popen[bytes] | None = None

    def left(self) -> float:
        return self.end - self.clock()

    def compile_ahead(self, command: Sequence[str]) -> None:
        """Starts what compiles in the background."""
        self.background = self._start(command)

    def wait_for_compilers(self, most: float) -> None:
        """Waits until the compilers in the background end, and ends them after so many seconds."""
        if self.background is not None:
            self._wait(self.background, most)
            self.background = None

    def run(self, stage: Stage) -> int:
        """Runs a stage and returns its exit status: CUT if there was too little time for it."""
        if stage.quiet:
            self.wait_for_compilers(PATIENCE)
        budget = self.left() * stage.share
        if budget < LEAST:
            self.say(f"== {stage.name}: no time left")
            return CUT
        end = self.clock() + budget
        self.say(f"== {stage.name}, at most {budget:.0f} s")
        for _ in range(TRIES):
            before, limit = self.clock(), end - self.clock()
            process = self._start([word.replace(LIMIT, f"{limit - LATE:.0f}") for word in stage.command])
            status = self._wait(process, limit)
            self.say(f"== {stage.name} {ENDED.get(status, f'ended with status {status}')} after {self.clock() - before:.0f} s")
            # If it died, hung, or its device failed, another process goes on with the next cell.
            unfinished = status == CUT or any(self.log.parent.glob(".*.running"))
            if not unfinished or end - self.clock() < LEAST:
                break
        return status

    def say(self, text: str) -> None:
        line = f"[{self.clock() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with self.log.open("a") as f:
            f.write(line + "\n")

    def close(self) -> None:
        self.wait_for_compilers(0)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as f:
            return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=f, stderr=f, start_new_session=True)

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        try:
            return process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return CUT
        finally:
            with contextlib.suppress(ProcessLookupError):  # its workers too, also where it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(session: Session, planned: Sequence[Stage], keep_going: bool = False) -> int:
    """Runs stages in order. Returns 1 if one failed, CUT if one was cut or not run, else 0."""
    statuses = []
    for stage in planned:
        status = session.run(stage)
        statuses.append(status)
        if stage.vital and status not in (0, CUT) and not keep_going:
            session.say(f"{stage.name} failed: nothing else is worth the time before it is mended (--keep-going runs on)")
            break
    if any(status not in (0, CUT) for status in statuses):
        return 1
    return CUT if CUT in statuses or len(statuses) < len(planned) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="to spend; 9, or 4 in a dry run, if not given")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the records")
    parser.add_argument("--commit", help="the commit, where the checkout has no git beside it")
    parser.add_argument("--tiny", action="store_true", help="a dry run, on a CPU by the interpreter")
    parser.add_argument("--only", action="append", help="run only this stage (may be repeated)")
    parser.add_argument("--keep-going", action="store_true", help="go on even where the first stage fails")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    out = args.out.absolute()
    spread = not args.tiny and importlib.util.find_spec("xdist") is not None
    planned = stages(out, max(2, cores * 3 // 4) if spread else 1, args.tiny, args.commit)
    unknown = set(args.only or ()) - {stage.name for stage in planned}
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: the stages are {' '.join(stage.name for stage in planned)}")
    planned = [stage for stage in planned if not args.only or stage.name in args.only]
    out.mkdir(parents=True, exist_ok=True)
    minutes = args.minutes or (4 if args.tiny else 9)
    session = Session(60 * minutes, out / "first.log")
    try:
        if not args.tiny and any(stage.quiet for stage in planned):
            session.compile_ahead(["-m", "bench.warm", "--first", "--jobs", str(max(1, cores // 4))])
        status = run_all(session, planned, args.keep_going)
    finally:
        session.close()
    text = "\n".join(summary.lines(out))
    (out / "summary.txt").write_text(text + "\n")
    print(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
