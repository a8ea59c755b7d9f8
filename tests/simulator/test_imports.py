"""The simulator stands by itself: it knows Triton, torch and numpy, not tconv; and it is not in tconv's wheel."""

import pathlib
import re
import subprocess
import sys

import pytest

import simulator
from tests.test_imports import imports

ROOT = pathlib.Path(simulator.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ALLOWED = {"simulator", "triton", "torch", "numpy", "pytest", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_it_imports_nothing_of_tconv(path):
    foreign = {name for name in imports(path) if name.split(".")[0] not in ALLOWED}
    assert foreign == set()


def test_it_is_not_in_the_wheel():
    packages = re.search(r"^packages = \[(.*)\]", (ROOT.parent / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert "tconv.kernels" in packages
    assert "simulator" not in packages


@pytest.mark.parametrize("module", ["simulator", "simulator.pytest_plugin", "simulator.options"])
def test_triton_is_not_imported_before_it_is_needed(module):
    """Whoever loads the plugin may yet choose Triton's interpreter, which Triton must hear before it is imported."""
    code = f"import sys, {module}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
