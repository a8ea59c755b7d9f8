"""torch's own test inputs for its convolutions: same results, strides, gradients, errors, and the work done by our kernels.

Both ways in are tested, tconv.functional and torch's own functions under `enable()`. The kernels behind them are the same and
interpreting them takes the time, so each way gets its dtypes: fp64 and fp16 the one, fp32 and bf16 the other.
"""

import contextlib
import importlib.util
import sys
import types
import unittest

import pytest
import torch

import tconv
from tconv.launching.variants import float32_precision
from tests import parity

if importlib.util.find_spec("expecttest") is None:  # torch's test tables import it, for a base class of tests of its own
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

# Importing torch's tests forbids, for the whole process, to set any torch.backends flag; other tests set some.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

OPERATORS = {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.conv")}
MODULES = {info.name.removeprefix("nn."): info for info in module_db if info.name.startswith(("nn.Conv", "nn.LazyConv"))}
WAYS = {torch.float64: "function", torch.float16: "function", torch.float32: "enable", torch.bfloat16: "enable"}
EXACT = [torch.float64, torch.float32]
HALVES = [torch.float16, torch.bfloat16]
PASSES = {"conv": "fprop", "conv_transpose": "dgrad"}
BACKWARD = {"conv": ("dgrad", "wgrad"), "conv_transpose": ("fprop", "wgrad")}


@pytest.fixture(autouse=True)
def _true_fp32():
    """The samples' numbers are as large as 9: between two roundings of them to TF32, a lost tap would not be noticed."""
    with float32_precision(False):
        yield


def samples(name, device, dtype):
    return list(OPERATORS[name].sample_inputs(device, dtype))


def functions(name, way="function"):
    """Ours, which is torch's own under the override, torch's, and the context to call ours in."""
    torchs = getattr(torch.nn.functional, name)
    if way == "enable":
        return torchs, torchs, tconv.enabled
    return getattr(tconv.functional, name), torchs, contextlib.nullcontext


def run(function, sample, dtype=None):
    """The output, and the leaves it can be differentiated by; the sample cast to a dtype if one is given."""
    leaves = [parity.leaf(t if dtype is None or t is None else t.to(dtype)) for t in (sample.input, *sample.args)]
    return function(*leaves, **sample.kwargs), leaves


def test_the_tables_are_torchs():
    assert set(OPERATORS) == set(parity.OPS)
    assert set(MODULES) == {*parity.LAYERS, *parity.LAZY}


# Interpreted, a backward pass costs up to five times an output, and the kernels' text is one for fp32 and fp64. torch lists
# each sample batched (even) and unbatched (odd): gradients of all batched ones in fp64, where an error shows best (of every
# second one in 3-D, which take longest), and of every fifth one, even and odd in turn, in fp32.
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", parity.OPS)
def test_samples(name, dtype, device):
    ours, torchs, context = functions(name, WAYS[dtype])
    kind = name[:-2]
    ran = 0
    for i, sample in enumerate(samples(name, device, dtype)):
        what = f"sample {i}: {sample.summary()}"
        expected, their_leaves = run(torchs, sample)
        backward = i % (4 if parity.rank(name) == 3 else 2) == 0 if dtype == torch.float64 else i % 5 == 1
        theirs = parity.gradients(expected, their_leaves) if backward else []
        with tconv.recording() as calls, context():
            got, leaves = run(ours, sample)
            grads = parity.gradients(got, leaves) if backward else []
        parity.assert_same(got, expected, what)
        for k, (g, e) in enumerate(zip(grads, theirs, strict=True)):
            parity.assert_same(g, e, f"gradient {k} of {what}", weight=k == 1)
        if all(t.numel() for t in leaves if t is not None):
            bias = ("bias",) if leaves[2] is not None else ()
            parity.assert_ours(calls, PASSES[kind], *((*BACKWARD[kind], *bias) if backward else ()))
            ran += 1
    assert ran >= 8, f"{ran} samples with elements: torch's table has changed"


# Only loads and stores differ from fp32's: every third sample.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", parity.OPS)
def test_half_samples(name, dtype, device):
    ours, torchs, context = functions(name, WAYS[dtype])
    eps = torch.finfo(dtype).eps
    ran = 0
    for i, sample in enumerate(samples(name, device, dtype)[::3]):
        right = run(torchs, sample, torch.float64)[0]
        eager = run(torchs, sample)[0]
        with tconv.recording() as calls, context():
            got = run(ours, sample)[0]
        assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
        parity.assert_ours(calls, PASSES[name[:-2]])
        error, eagers = ((t.double() - right).abs().max() for t in (got, eager))
        largest = right.abs().max()
        assert error <= 2 * eps * largest, f"sample {i}: error {error / largest:.3g}, eps {eps:.3g}"
        assert error <= 3 * eagers + eps * largest, f"sample {i}: error {error:.3g}, eager's is {eagers:.3g}"
        ran += 1
    assert ran >= 3


@pytest.mark.parametrize("name", parity.OPS)
def test_dtypes_that_are_left_to_torch(name, device):
    ours, torchs, _ = functions(name)
    for dtype in (torch.complex64, torch.int64) if device == "cpu" else (torch.complex64,):
        for sample in samples(name, device, dtype)[:4]:
            with tconv.recording() as calls:
                got = ours(sample.input, *sample.args, **sample.kwargs)
            assert torch.equal(got, torchs(sample.input, *sample.args, **sample.kwargs))
            assert [str(call) for call in calls] == [f"{name}: torch (dtype {dtype})"]


@pytest.mark.parametrize("way", ["function", "enable"])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_error_samples(name, way, device):
    ours, torchs, context = functions(name, way)
    errors = list(OPERATORS[name].error_inputs_func(OPERATORS[name], device))
    assert len(errors) >= 5
    for error in errors:
        s = error.sample_input
        expected = parity.outcome(lambda s=s: torchs(s.input, *s.args, **s.kwargs))
        assert expected[0] is error.error_type
        with context():
            assert parity.outcome(lambda s=s: ours(s.input, *s.args, **s.kwargs)) == expected


# The layers add no arithmetic to what is tested above: one dtype, gradients of the first sample, and by the override of the
# second.
@pytest.mark.parametrize("name", [*parity.LAYERS, *parity.LAZY])
def test_module_samples(name, device):
    info = MODULES[name]
    kind = "conv_transpose" if "Transpose" in name else "conv"
    inputs = info.module_inputs_func(info, device, torch.float32, requires_grad=True, training=True)
    assert len(inputs) >= 2
    for i, sample in enumerate(inputs):
        construct, call = sample.constructor_input, sample.forward_input
        ours, torchs = parity.twins(name, *construct.args, **construct.kwargs, device=device)
        x, their_x = parity.leaf(call.args[0]), parity.leaf(call.args[0])
        torch.manual_seed(5)  # a lazy layer draws its parameters in its first call
        expected = torchs(their_x, **call.kwargs)
        torch.manual_seed(5)
        with tconv.recording() as calls:
            got = ours(x, **call.kwargs)
            grads = parity.parameter_gradients(got, x, ours) if i == 0 else {}
        parity.assert_ours(calls, PASSES[kind], *((*BACKWARD[kind], "bias") if i == 0 else ()))
        parity.assert_same(got, expected)
        theirs = parity.parameter_gradients(expected, their_x, torchs)
        for parameter, g in grads.items():
            parity.assert_same(g, theirs[parameter], f"gradient by {parameter}", weight=parameter == "weight")
        assert repr(ours) == f"tconv.{torchs!r}"
        torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()), rtol=0, atol=0)
        x = parity.leaf(call.args[0])
        with tconv.enabled(), tconv.recording() as calls:
            got = torchs(x, **call.kwargs)
            grads = parity.parameter_gradients(got, x, torchs) if i == 1 else {}
        parity.assert_ours(calls, PASSES[kind], *((*BACKWARD[kind], "bias") if i == 1 else ()))
        parity.assert_same(got, expected)
        for parameter, g in grads.items():
            parity.assert_same(g, theirs[parameter], f"gradient by {parameter}", weight=parameter == "weight")
