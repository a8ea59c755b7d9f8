"""Chooses what runs the kernels: a GPU if there is one, else Triton's interpreter, or with --compiled the simulator."""

import os
import tempfile

import pytest
import torch

pytest_plugins = ["simulator.pytest_plugin"]
HAS_GPU = torch.cuda.is_available()

torch.set_num_threads(1)  # tests run in parallel, one process per core


def pytest_addoption(parser):
    parser.addoption(
        "--chosen", action="store_true", help="of the tests, those that CI runs on compiled code (tests/chosen.py)"
    )


def pytest_configure(config):
    """Before any kernel is imported."""
    # What the user's GPU has measured must not choose the plans of tests, nor tests those of the user.
    folder = tempfile.TemporaryDirectory(prefix="tconv-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["TCONV_CACHE_DIR"] = folder.name
    if config.getoption("--compiled", None):
        from tests import compiled

        compiled.install(config.getoption("--compiled"))
    elif not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        from tests import interpreter

        interpreter.look_up_once()
        interpreter.add_alike()

        from tests import hints

        hints.install()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--chosen", False):
        if not config.getoption("--compiled", None):
            raise pytest.UsageError("--chosen is the part of the tests for --compiled")
        from tests.chosen import chosen

        ids = chosen([item.nodeid for item in items])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in ids])
        items[:] = [item for item in items if item.nodeid in ids]
    tiny = config.getoption("--tiny", False)  # of bench/stage.py: a dry run of what needs a GPU
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark and (not HAS_GPU or config.getoption("--compiled", None)) and not (tiny and mark.kwargs.get("shrinks")):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device(request):
    return "cuda" if HAS_GPU and not request.config.getoption("--compiled", None) else "cpu"


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


@pytest.fixture
def own_record(tmp_path, monkeypatch):
    """A function that makes this process read its record anew, as another process would. The record is this test's own."""
    from tconv.records.book import book
    from tconv.tune import tuner

    monkeypatch.setenv("TCONV_CACHE_DIR", str(tmp_path / "own"))

    def afresh():
        book.cache_clear()
        tuner.forget()
        return book()

    afresh()
    yield afresh
    monkeypatch.undo()
    afresh()
