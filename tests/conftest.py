"""Chooses where the tests run: on a GPU if there is one, else under Triton's interpreter on the CPU."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

    from tests import hints

    hints.install()

torch.set_num_threads(1)  # tests run in parallel, one process per core


def pytest_collection_modifyitems(config, items):
    tiny = config.getoption("--tiny", False)  # of bench/stage.py: a dry run of what needs a GPU
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark and not HAS_GPU and not (tiny and mark.kwargs.get("shrinks")):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every uninitialised tensor is NaN, so that an element a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
