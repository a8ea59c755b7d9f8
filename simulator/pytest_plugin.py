"""pytest --compiled sm_90: Triton's kernels run as the code that they are compiled to.

Any project's tests can use it, as `pytest -p simulator.pytest_plugin --compiled sm_90`; their tensors must be on the CPU then.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_90")
COUNTS = pytest.StashKey[list[tuple[int, int]]]()  # of launches and of kernels, by process


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulator", "compiled Triton kernels on a CPU")
    group.addoption("--compiled", metavar="ARCH", choices=ARCHITECTURES, help=f"simulate a GPU: {' or '.join(ARCHITECTURES)}")
    group.addoption(
        "--no-async-copy-fence", action="store_true",
        help="do not ask for a fence.proxy.async between cp.async and wgmma, which kernels of Triton before 3.7.1 lack",
    )  # fmt: skip
    group.addoption("--warp-seed", type=int, metavar="N", help="the order in which warps run where those of a program part")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: with --compiled, this test expects faults of the kernels it runs")
    arch = config.getoption("--compiled", None)
    if arch is None:
        for option in ("--no-async-copy-fence", "--warp-seed"):
            if config.getoption(option, None):
                raise pytest.UsageError(f"{option} is for --compiled")
        return
    os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is defined
    from simulator import Options, install

    options = Options(async_copy_fence=not config.getoption("--no-async-copy-fence"), seed=config.getoption("--warp-seed") or 0)
    install(arch, options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A fault fails its test even if the code under test catches it, unless the test is marked to expect faults."""
    if item.config.getoption("--compiled", None) is None or item.get_closest_marker("faults"):
        return (yield)
    from simulator.driver import problems

    problems.clear()
    result = yield
    if problems:
        raise problems[0]
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--compiled", None) is None:
        return
    from triton.runtime import driver

    counted = driver.active.utils.count()
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, whose controller runs nothing itself
        session.config.workeroutput["simulator"] = counted
    else:
        session.config.stash.setdefault(COUNTS, []).append(counted)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counted = getattr(node, "workeroutput", {}).get("simulator")
    if counted:
        node.config.stash.setdefault(COUNTS, []).append(counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(COUNTS, [])
    if any(launches for launches, _ in counts):
        launches, kernels = (sum(column) for column in zip(*counts, strict=True))
        each = " (some of them in several processes)" if len(counts) > 2 else ""
        terminalreporter.write_line(f"simulator: {launches} launches of {kernels} compiled kernels{each}")
