"""The README's, the documents' and the docstrings' examples run."""

import contextlib
import doctest
import io
import pathlib
import re

import pytest
import torch

import tconv  # noqa: F401 - loads the modules whose docstrings are run
from tests import oracle

ROOT = pathlib.Path(__file__).parent.parent
PRINTED = {  # what the examples of a document print, among else
    "README.md": ("torch.nn.Conv2d -> tconv.Conv2d", *["gather"] * 4),
    "docs/design.md": ("equal: True", "fprop: ", "batch-invariant"),
    "docs/distributed.md": ("(Shard(dim=2),)", "fprop: gather"),
    "docs/epilogues.md": ("with residual, silu", "gradient of residual, silu", "wgrad"),
    "docs/explain.md": ("fprop: gather", "dgrad: gather", "wgrad: wgrad", "bias: bias"),
    "docs/fp8.md": ("body.0: fp8, input scale", "with scale, shift, in bfloat16"),
    "docs/fusing.md": ("3 of 3 convolutions fused", "batch norm, residual, relu", "no activation of the kernels"),
    "docs/kernels.md": ("fprop: gather",),
    "docs/normalisation.md": ("group_norm_silu: normalise", "fprop: ", "group_norm_silu gradient: normalise", "True"),
    "docs/streaming.md": ("equal: True (1, 4, 2, 6, 5) fprop: gather", "batch-invariant", "decoded: True", "apart: True"),
    "docs/support.md": ("Conv2d(3, 8",),
    "docs/tuning.md": ("pass", "fprop", "total on ", "measured: tconv ", "PREDICTED", "wgrad"),
    "docs/swapping.md": ("fprop: ", "dgrad: ", "wgrad: ", "0: torch.nn.Conv1d -> tconv.Conv1d", "filter_fn"),
}


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def documents():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def test_every_document_with_python_is_run():
    assert {name for path in documents() if blocks(name := str(path.relative_to(ROOT)))} == set(PRINTED)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_what_a_document_names_is_there(path):
    text = path.read_text()
    links = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    files = [ROOT / name for name in re.findall(r"\b(?:tconv|bench|scripts|tests|docs)/[\w/-]+\.\w+", text)]
    tests = [ROOT / "tests" / name for name in re.findall(r"(?<!/)\btest_\w+\.py", text)]
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M)}
    assert [found for found in (*links, *files, *tests) if not found.exists()] == []
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


@pytest.mark.parametrize("name", PRINTED)
def test_the_python_runs_as_it_stands(name, device, own_record):
    if name == "docs/tuning.md" and oracle.compiled():
        pytest.skip("tune finds no GPU beside the simulator")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.device(device):
        for block in blocks(name):
            exec(block, {})
    for text in PRINTED[name]:
        assert out.getvalue().count(text) >= PRINTED[name].count(text), text


def test_docstring_examples():
    import sys

    found = 0
    for name in (
        "decompositions",
        "explain",
        "freeze",
        "launching.record",
        "override",
        "planning.plan",
        "restored",
        "swap",
        "planning.batch_invariance",
    ):
        result = doctest.testmod(sys.modules[f"tconv.{name}"], raise_on_error=False)
        assert result.failed == 0, name
        found += result.attempted
    assert found >= 8
