"""A pytest plugin: runs tests as a stage that is recorded, bounded in time, and resumed where it was cut.

    python -m pytest -p bench.stage --record bench/results/DIR/parity.jsonl --seconds 500 tests/test_gpu.py

With `-n 15` (pytest-xdist) they run in so many processes, which share the GPU.

Tests that the record has as passed or skipped are not run again; failed ones are, and those in which the process died, once
more and last. The exit status is 0 if all that the record has is well, 1 if something failed or died, 75 if the stage was cut.
A test adds its own numbers to its line through pytest's `record_property`.
"""

from __future__ import annotations

import collections
import math
import os
import pathlib
import sys
import time
from typing import Any

import pytest

from bench.record import Writer, machine, read

FATAL = (
    "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address", "illegal instruction",
    "invalid program counter", "invalid address space", "hardware stack error", "uncorrectable ECC", "launch timed out",
)  # fmt: skip
DONE = ("passed", "skipped")
DEATHS = 2  # a process may have died of something else, of a time limit say
CUT = 75  # exit status of a stage that is to be gone on with: the system's "try again"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stage")
    group.addoption("--record", type=pathlib.Path, help="file of JSON lines to write to, and to go on with")
    group.addoption("--seconds", type=float, default=float("inf"), help="start no test after so many seconds")
    group.addoption("--tiny", action="store_true", help="shrink what is run: a dry run, on a CPU by the interpreter")
    group.addoption("--commit", help="the commit, where the checkout has no git beside it")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--record"):
        return
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config), "tconv-stage-worker")
    else:
        spread = bool(config.getoption("numprocesses", None))
        config.pluginmanager.register((SpreadStage if spread else Stage)(config), "tconv-stage")


def _left(config: pytest.Config, lines: list[dict[str, Any]], items: list[pytest.Item]) -> None:
    """Drops the items that a record has as done, or as dead too often, and puts those that died before last."""
    died = collections.Counter(line["test"] for line in lines if line.get("outcome") == "died")
    done = {line["test"] for line in lines if line.get("outcome") in DONE} | {t for t, n in died.items() if n >= DEATHS}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = sorted((item for item in items if item.nodeid not in done), key=lambda item: item.nodeid in died)


class Stage:
    """What `--record` turns on."""

    def __init__(self, config: pytest.Config) -> None:
        path = config.getoption("--record").absolute()
        facts = machine(config.getoption("--commit")) | {"tiny": config.getoption("--tiny")}
        try:
            self.writer = Writer(path, facts)
        except ValueError as e:
            raise pytest.UsageError(str(e)) from None
        self.running = path.with_name(f".{path.stem}.running")
        self.deadline = time.monotonic() + config.getoption("--seconds")
        if self.running.exists():  # the process that ran it did not live to report
            self.writer.write({"test": self.running.read_text(), "outcome": "died"})
            self.running.unlink()
        self.cut = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        _left(config, self.writer.lines, items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        self.left = len(session.items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.running.write_text(item.nodeid)
        self.reports: list[pytest.TestReport] = []
        try:
            result = yield
        finally:  # also where the user breaks off
            self.running.unlink(missing_ok=True)
        fatal = self.note(item.nodeid, self.reports)
        if time.monotonic() > self.deadline and self.left:
            self.cut = True
            item.session.shouldstop = "the stage's time is up; the same command goes on from here"
        if fatal:  # nothing on this device works any more in this process
            self.cut = True
            item.session.shouldstop = "the device failed; the same command goes on behind this test"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def note(self, test: str, reports: list[pytest.TestReport]) -> bool:
        """Writes a test's line; whether the device failed in it."""
        worst = next((r for r in reports if r.failed), None) or next((r for r in reports if r.skipped), None)
        report = worst or reports[-1]
        crash = getattr(report.longrepr, "reprcrash", None)
        detail = str(crash.message if crash else report.longrepr).strip()[:300] if report.failed else ""
        fatal = any(_is_fatal(r) for r in reports)
        outcome, seconds = "died" if fatal else report.outcome, sum(r.duration for r in reports)
        line = {"test": test, "outcome": outcome, "seconds": seconds} | dict(reports[-1].user_properties)
        self.writer.write(rounded(line | ({"detail": detail} if detail else {})))
        self.left -= 1
        return fatal

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":  # a whole file that is left out, or broken
            self.writer.write({"test": report.nodeid, "outcome": report.outcome, "detail": str(report.longrepr)[:300]})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        bad = any(outcome in ("failed", "died") for outcome in self.last().values())
        if bad:
            session.exitstatus = 1
        elif self.cut:
            session.exitstatus = CUT
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.writer.lines:
            session.exitstatus = 0

    def last(self) -> dict[str, str]:
        """The last outcome of every test in the record."""
        return {line["test"]: line["outcome"] for line in self.writer.lines if "test" in line}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tally = collections.Counter(self.last().values())
        left = getattr(self, "left", 0)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(tally.items())) or "nothing run"
        terminalreporter.write_line(f"{self.writer.path.stem}: {counts}, {left} still to run; recorded in {self.writer.path}")


class SpreadStage(Stage):
    """The same where pytest-xdist's workers run the tests: here, in the process that hears of them."""

    left = 0

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.config = config
        self.open: dict[str, list[pytest.TestReport]] = collections.defaultdict(list)

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.left = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.open[report.nodeid].append(report)
        if report.when == "teardown" or report.when == "???":  # "???" is xdist's word for a test in which a worker died
            self.note(report.nodeid, self.open.pop(report.nodeid))
        if time.monotonic() > self.deadline and self.left and not self.cut:
            self.cut = True
            self.config.pluginmanager.getplugin("dsession").shouldstop = "the stage's time is up"


class Worker:
    """The same in one of pytest-xdist's workers, which leaves out what the record has as done."""

    def __init__(self, config: pytest.Config) -> None:
        self.lines = read(config.getoption("--record").absolute()).lines

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        _left(config, self.lines, items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if _is_fatal(report):  # nothing on this device works any more in this process: xdist starts another
            sys.stderr.write(f"{report.nodeid}: the device failed\n{report.longrepr}\n")
            sys.stderr.flush()
            os._exit(1)


def _is_fatal(report: pytest.TestReport) -> bool:
    """Whether an error was reported after which a process can no longer use its device."""
    return report.failed and (report.when == "???" or any(text in str(report.longrepr) for text in FATAL))


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def rounded(value: Any) -> Any:
    """Numbers to five digits, what lies behind them was never measured; none where JSON has no number."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
