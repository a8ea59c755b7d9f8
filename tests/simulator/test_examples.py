"""Kernels after Triton's own tutorials, compiled for both architectures, as anybody would run them."""

import os
import pathlib
import subprocess
import sys

import pytest

import simulator

EXAMPLES = sorted((pathlib.Path(simulator.__file__).parent / "examples").glob("*.py"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(pathlib.Path(simulator.__file__).parent.parent)
    return kept | {"PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, arch, environment):
    done = subprocess.run([sys.executable, str(example), arch], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if example.stem == "vector_add":  # which also shows a fault
        assert "Of an n that is too large by one: reads" in done.stdout
        assert "vector_add.py:18" in done.stdout
