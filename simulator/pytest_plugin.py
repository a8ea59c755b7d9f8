"""pytest --compiled sm_90: Triton's kernels run as the code that they are compiled to.

Any project's tests can use it, as `pytest -p simulator.pytest_plugin --compiled sm_90`; their tensors must be on the CPU then.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_90")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulator", "compiled Triton kernels on a CPU")
    group.addoption("--compiled", metavar="ARCH", choices=ARCHITECTURES, help=f"simulate a GPU: {' or '.join(ARCHITECTURES)}")
    group.addoption(
        "--no-async-copy-fence", action="store_true",
        help="do not ask for a fence.proxy.async between cp.async and wgmma, which kernels of Triton before 3.7.1 lack",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: with --compiled, this test expects faults of the kernels it runs")
    arch = config.getoption("--compiled", None)
    if arch is None:
        return
    os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is defined
    from simulator import Options, install

    install(arch, Options(async_copy_fence=not config.getoption("--no-async-copy-fence")))


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--compiled", None) is None:
        return
    from triton.runtime import driver

    programs = driver.active.utils.programs.values()
    if programs:  # under pytest-xdist, the workers have them
        launches = sum(p.launches for p in programs)
        terminalreporter.write_line(f"simulator: {launches} launches of {len(programs)} compiled kernels")
