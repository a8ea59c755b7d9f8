"""The README's and the docstrings' examples run."""

import contextlib
import doctest
import io
import pathlib
import re

import tconv  # noqa: F401 - loads the modules whose docstrings are run

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readmes_python_runs_as_it_stands(device):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks:
            exec(block if device == "cpu" else f"import torch; torch.set_default_device({device!r})\n{block}", {})
    assert "torch.nn.Conv2d -> tconv.Conv2d" in out.getvalue()
    assert out.getvalue().count("gather") >= 4


def test_docstring_examples():
    import sys

    found = 0
    for name in ("explain", "plan", "record", "swap"):
        result = doctest.testmod(sys.modules[f"tconv.{name}"], raise_on_error=False)
        assert result.failed == 0, name
        found += result.attempted
    assert found >= 5
