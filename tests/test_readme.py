"""The README's, the documents' and the docstrings' examples run."""

import contextlib
import doctest
import io
import pathlib
import re

import pytest
import torch

import tconv  # noqa: F401 - loads the modules whose docstrings are run

ROOT = pathlib.Path(__file__).parent.parent
PRINTED = {  # what the examples of a document print, among else
    "README.md": ("torch.nn.Conv2d -> tconv.Conv2d", *["gather"] * 4),
    "docs/distributed.md": ("(Shard(dim=2),)", "fprop: gather"),
    "docs/explain.md": ("fprop: gather", "dgrad: gather", "wgrad: wgrad", "bias: bias"),
    "docs/kernels.md": ("fprop: gather",),
    "docs/swapping.md": ("fprop: ", "dgrad: ", "wgrad: ", "0: torch.nn.Conv1d -> tconv.Conv1d", "filter_fn"),
}


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_every_document_with_python_is_run():
    names = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {name for name in names if blocks(name)} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_the_python_runs_as_it_stands(name, device):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.device(device):
        for block in blocks(name):
            exec(block, {})
    for text in PRINTED[name]:
        assert out.getvalue().count(text) >= PRINTED[name].count(text), text


def test_docstring_examples():
    import sys

    found = 0
    for name in ("explain", "override", "plan", "record", "swap"):
        result = doctest.testmod(sys.modules[f"tconv.{name}"], raise_on_error=False)
        assert result.failed == 0, name
        found += result.attempted
    assert found >= 8
