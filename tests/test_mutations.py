"""The mutations (scripts/mutations.py, which runs them) still find what they break."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "scripts"))
import mutations

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_what_a_mutation_breaks_is_there(mutation):
    assert mutation.old in (ROOT / "tconv" / mutation.file).read_text()
    assert mutation.old != mutation.new
    assert (ROOT / "tests" / mutation.among).exists()


def test_a_mutation_is_run_and_caught():
    """In a copy of the tree, which must have all that the tests import."""
    (strides,) = (m for m in mutations.MUTATIONS if m.name == "strides of x swapped")
    assert not mutations.survives(strides)
