"""A nested tensor gets torch's own answer: its error of the strided layout, its result of the jagged one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tconv
from tests import parity

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def strided(rank, device):
    return torch.nested.nested_tensor([torch.randn(4, *(n,) * rank) for n in (5, 6)], device=device)


def jagged(rank, device):
    """Unbatched images of two sequences, one after the other."""
    frames = [torch.randn(n, 4, *(5,) * rank) for n in (2, 3)]
    return torch.nested.nested_tensor(frames, layout=torch.jagged, device=device)


def answer(call):
    """What a call raises, or the parts of what it returns."""
    found = parity.outcome(call)
    return found if isinstance(found, tuple) else list(found.unbind())


def assert_same_answer(got, expected):
    """Of two answers: the same error, or parts that are close."""
    if isinstance(expected, tuple):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("nested", [strided, jagged])
@pytest.mark.parametrize("name", parity.LAYERS)
def test_layers(name, nested, device):
    _, torchs = parity.twins(name, 4, 6, 3, device=device)
    _, ours = parity.twins(name, 4, 6, 3, device=device)
    tconv.replace_(ours)
    x = nested(parity.rank(name), device)
    for _ in range(2):
        assert_same_answer(answer(lambda: ours(x)), answer(lambda: torchs(x)))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_answer(answer(lambda: ours(x)), answer(lambda: torchs(x)))
    ours(torch.randn(2, 4, *(5,) * parity.rank(name), device=device))  # an ordinary call is not the worse for it
    assert tconv.last_calls()[-1].ours


@pytest.mark.parametrize("nested", [strided, jagged])
@pytest.mark.parametrize("name", parity.LAYERS)
def test_layers_under_the_override(name, nested, device):
    _, layer = parity.twins(name, 4, 6, 3, device=device)
    x = nested(parity.rank(name), device)
    expected = answer(lambda: layer(x))
    with tconv.enabled():
        got = answer(lambda: layer(x))
    assert_same_answer(got, expected)


@pytest.mark.parametrize("nested", [strided, jagged])
@pytest.mark.parametrize("name", parity.OPS)
def test_functions(name, nested, device):
    ours, torchs = getattr(tconv.functional, name), getattr(nn.functional, name)
    x, rank = nested(parity.rank(name), device), parity.rank(name)
    w, b = torch.randn(4, 4, *(3,) * rank, device=device), torch.randn(4, device=device)
    assert_same_answer(answer(lambda: ours(x, w)), answer(lambda: torchs(x, w)))
    assert_same_answer(answer(lambda: ours(x, w, b, padding=1)), answer(lambda: torchs(x, w, b, padding=1)))
    dense = torch.randn(2, 4, *(5,) * rank, device=device)
    assert_same_answer(answer(lambda: ours(dense, x)), answer(lambda: torchs(dense, x)))
    assert_same_answer(answer(lambda: ours(dense, w, x)), answer(lambda: torchs(dense, w, x)))


def test_it_is_recorded(device):
    x, layer = strided(2, device), tconv.Conv2d(4, 6, 3, device=device)
    with tconv.recording() as calls, pytest.raises(NotImplementedError):
        layer(x)
    assert [str(call) for call in calls] == ["conv2d: torch (not a plain strided tensor)"]


@pytest.mark.parametrize("more", [{"padding_mode": "circular", "padding": 1}, {"padding": "same"}], ids=str)
def test_padding(more, device):
    ours, torchs = parity.twins("Conv2d", 4, 6, 3, **more, device=device)
    x = strided(2, device)
    assert_same_answer(answer(lambda: ours(x)), answer(lambda: torchs(x)))


def test_output_size(device):
    ours, torchs = parity.twins("ConvTranspose2d", 4, 6, 3, stride=2, device=device)
    x = strided(2, device)
    assert_same_answer(answer(lambda: ours(x, output_size=(12, 12))), answer(lambda: torchs(x, output_size=(12, 12))))
