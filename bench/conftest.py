"""What the benchmarks share: the device, the clock, its limits measured once per run."""

import dataclasses
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for dry runs


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--without", action="append", default=[], metavar="PROVIDER", help="leave this provider out")
    group.addoption("--quick", action="store_true", help="a tenth of the suite: every sixth layer, bf16, fprop and step")


def pytest_configure(config):
    if config.getoption("--compiled", None):  # of the simulator (bench/sanitize.py)
        from tests import compiled

        compiled.install(config.getoption("--compiled"))
    elif not (HAS_GPU or config.getoption("--tiny", False)):
        raise pytest.UsageError("no GPU here: only `python bench/dispatch.py` measures anything; --tiny makes a dry run")
    torch.backends.cudnn.benchmark = True


@pytest.fixture(scope="session")
def device(pytestconfig):
    return "cuda" if HAS_GPU and not pytestconfig.getoption("--compiled", None) else "cpu"


@pytest.fixture(scope="session")
def tiny(pytestconfig):
    return pytestconfig.getoption("--tiny")


@pytest.fixture(scope="session")
def clock(device):
    from bench.timing import Clock

    return Clock(device)


@pytest.fixture(scope="session")
def limits(device, clock, tiny, pytestconfig):
    """The device's limits, measured in this run and recorded."""
    from bench.timing import measured_limits
    from tconv.planning.device import DEVICES, cuda_device

    known = cuda_device(torch.cuda.current_device()).limits if HAS_GPU else DEVICES["H200"].limits
    measured = measured_limits(device, clock, known, tiny)
    stage = pytestconfig.pluginmanager.get_plugin("tconv-stage")
    if stage:
        stage.writer.write({"limits": dataclasses.asdict(measured)})
    return measured


@pytest.fixture
def timed(request, clock, tiny):
    """Times a call by pytest-benchmark: flushed, warmed up, as often as fits; statistics in milliseconds."""
    request.node.add_marker(pytest.mark.benchmark(timer=clock))

    def time(call):
        benchmark = request.getfixturevalue("benchmark")
        rounds = 1 if tiny else clock.rounds(call)
        benchmark.pedantic(call, setup=clock.flush, rounds=rounds, warmup_rounds=0 if tiny else 2)
        s = benchmark.stats.stats
        return {"ms": s.median * 1e3, "iqr_ms": s.iqr * 1e3, "min_ms": s.min * 1e3, "rounds": s.rounds}

    return time
