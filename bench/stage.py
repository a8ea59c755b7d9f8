"""A pytest plugin: runs tests as a stage that is recorded, bounded in time, and resumed where it was cut.

    python -m pytest -p bench.stage --record bench/results/DIR/parity.jsonl --seconds 500 tests/test_gpu.py

Tests that the record has as passed or skipped, and those in which a process died, are not run again; failed ones are. A test
adds its own numbers to its line through pytest's `record_property`.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import pytest

from bench.record import Writer, machine

FATAL = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
DONE = ("passed", "skipped", "died")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stage")
    group.addoption("--record", type=pathlib.Path, help="file of JSON lines to write to, and to go on with")
    group.addoption("--seconds", type=float, default=float("inf"), help="start no test after so many seconds")
    group.addoption("--tiny", action="store_true", help="shrink what is run: a dry run, on a CPU by the interpreter")
    group.addoption("--commit", help="the commit, where the checkout has no git beside it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Stage(config), "tconv-stage")


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

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = {line["test"] for line in self.writer.lines if line.get("outcome") in DONE}
        skip = [item for item in items if item.nodeid in done]
        config.hook.pytest_deselected(items=skip)
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        self.left = len(session.items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.running.write_text(item.nodeid)
        self.reports: list[pytest.TestReport] = []
        result = yield
        self.running.unlink(missing_ok=True)
        worst = next((r for r in self.reports if r.failed), None) or next((r for r in self.reports if r.skipped), None)
        report = worst or self.reports[-1]
        crash = getattr(report.longrepr, "reprcrash", None)
        detail = str(crash.message if crash else report.longrepr).strip()[:300] if report.failed else ""
        fatal = any(text in str(r.longrepr) for r in self.reports if r.failed for text in FATAL)
        outcome, seconds = "died" if fatal else report.outcome, sum(r.duration for r in self.reports)
        line = {"test": item.nodeid, "outcome": outcome, "seconds": seconds} | dict(item.user_properties)
        self.writer.write(_rounded(line | ({"detail": detail} if detail else {})))
        self.left -= 1
        if time.monotonic() > self.deadline and self.left:
            item.session.shouldstop = "the stage's time is up; the same command goes on from here"
        if fatal:  # nothing on this device works any more in this process
            item.session.shouldstop = "the device failed; the same command goes on behind this test"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tally: dict[str, int] = {}
        for line in {line["test"]: line for line in self.writer.lines if "test" in line}.values():
            tally[line["outcome"]] = tally.get(line["outcome"], 0) + 1
        left = getattr(self, "left", 0)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(tally.items())) or "nothing run"
        terminalreporter.write_line(f"{self.writer.path.stem}: {counts}, {left} still to run; recorded in {self.writer.path}")


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def _rounded(value: Any) -> Any:
    """Numbers to five digits: what lies behind them was never measured."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
