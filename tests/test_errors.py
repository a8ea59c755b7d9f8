"""Bad arguments raise what torch raises, word for word, and odd ones that torch takes give what torch gives."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import tconv
from tconv.dispatch import entry
from tests import parity

X, W = (2, 4, 8, 8), (6, 4, 3, 3)  # of a sound 2-D call
XT, WT = (2, 4, 5, 5), (4, 6, 3, 3)  # and of a sound transposed one
HUGE = 2**40


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of a function: x, w and b are shapes of tensors to make, or anything else to pass as it is."""

    reason: str
    function: str
    x: Any = X
    w: Any = W
    b: Any = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3

    def __str__(self) -> str:
        return f"{self.function}-{self.reason.replace(' ', '-')}"

    def tensors(self, device: str) -> list[Any]:
        made = []
        for value, dtype in zip((self.x, self.w, self.b), self.dtypes, strict=True):
            shape = isinstance(value, tuple)
            made.append(torch.randn(value, dtype=torch.float64).to(device, dtype) if shape else value)
        return made

    def call(self, library: Any, args: list[Any]) -> Any:
        return parity.outcome(lambda: getattr(library, self.function)(*args, **self.more))


F32, F64, F16, I64 = torch.float32, torch.float64, torch.float16, torch.int64
BAD = [
    # Tensors: ranks, channels, groups, dtypes.
    Row("input of too few dimensions", "conv2d", x=(4, 8)),
    Row("input of too many dimensions", "conv2d", x=(1, 2, 4, 8, 8)),
    Row("1-D input of too many dimensions", "conv1d", x=(1, 2, 4, 8), w=(6, 4, 3)),
    Row("3-D input of too few dimensions", "conv3d", x=(4, 8, 8), w=(6, 4, 3, 3, 3)),
    Row("transposed input of too few dimensions", "conv_transpose2d", x=(4, 8), w=WT),
    Row("weight of too few dimensions", "conv2d", w=(6, 4)),
    Row("weight of one rank less", "conv2d", w=(6, 4, 3)),
    Row("weight of one rank more", "conv2d", w=(6, 4, 3, 3, 3)),
    Row("weight without dimensions", "conv2d", w=()),
    Row("transposed weight of one rank less", "conv_transpose2d", x=XT, w=(4, 6, 3)),
    Row("too many input channels", "conv2d", x=(2, 5, 8, 8)),
    Row("too few input channels", "conv1d", x=(2, 3, 8), w=(6, 4, 3)),
    Row("wrong channels, unbatched", "conv3d", x=(3, 4, 4, 4), w=(6, 4, 3, 3, 3)),
    Row("wrong channels of a group", "conv2d", x=(2, 6, 8, 8), more={"groups": 2}),
    Row("transposed, wrong channels", "conv_transpose2d", x=(2, 5, 5, 5), w=WT),
    Row("transposed, wrong channels, unbatched", "conv_transpose3d", x=(3, 4, 4, 4), w=(4, 6, 3, 3, 3)),
    Row("outputs not divisible by groups", "conv2d", x=(2, 16, 8, 8), more={"groups": 4}),
    Row("fewer outputs than groups", "conv2d", x=(2, 28, 8, 8), more={"groups": 7}),
    Row("transposed, inputs not divisible by groups", "conv_transpose2d", x=XT, w=WT, more={"groups": 3}),
    Row("zero groups", "conv2d", more={"groups": 0}),
    Row("negative groups", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3), more={"groups": -1}),
    Row("bias of another length", "conv2d", b=(5,)),
    Row("bias of length one is not broadcast", "conv2d", b=(1,)),
    Row("bias of two dimensions", "conv2d", b=(6, 1)),
    Row("bias without dimensions", "conv2d", b=()),
    Row("transposed bias of a group's length", "conv_transpose2d", x=XT, w=(4, 3, 3, 3), b=(3,), more={"groups": 2}),
    Row("weight of another precision", "conv2d", dtypes=(F32, F64, F32)),
    Row("half weight, float input", "conv1d", x=(2, 4, 8), w=(6, 4, 3), dtypes=(F32, F16, F32)),
    Row("bias of another precision", "conv2d", b=(6,), dtypes=(F32, F32, F64)),
    Row("float bias under halves", "conv2d", b=(6,), dtypes=(F16, F16, F32)),
    Row("integer input, float weight", "conv2d", dtypes=(I64, F32, F32)),
    Row("booleans", "conv2d", dtypes=(torch.bool,) * 3),
    Row("fp8", "conv2d", dtypes=(torch.float8_e4m3fn,) * 3),
    Row("sparse input", "conv2d", x=torch.zeros(X).to_sparse()),
    # What is not a tensor, and arguments that do not parse.
    Row("input None", "conv2d", x=None),
    Row("input a list", "conv2d", x=[[[[1.0]]]]),
    Row("input an array", "conv2d", x=np.ones(X, np.float32)),
    Row("weight None", "conv2d", w=None),
    Row("bias a list", "conv2d", b=[0.0] * 6),
    Row("bias a number", "conv2d", b=0),
    Row("bias a flag, as the layers take", "conv2d", b=True),
    Row("unknown name", "conv2d", more={"strides": 1}),
    Row("a result tensor", "conv2d", more={"out": None}),
    Row("output_padding where there is none", "conv2d", more={"output_padding": 1}),
    Row("padding_mode is the layers'", "conv_transpose2d", more={"padding_mode": "zeros"}),
    Row("weight twice", "conv2d", more={"weight": None}),
    # stride, padding, dilation, output_padding: types.
    Row("stride a float", "conv2d", more={"stride": 1.0}),
    Row("stride a whole float of two", "conv2d", more={"stride": (2.0, 2.0)}),
    Row("stride a bool", "conv2d", more={"stride": True}),
    Row("stride None", "conv2d", more={"stride": None}),
    Row("stride a string", "conv2d", more={"stride": "1"}),
    Row("stride a range", "conv2d", more={"stride": range(1, 3)}),
    Row("stride a tensor of two", "conv2d", more={"stride": torch.tensor([1, 1])}),
    Row("stride a float tensor", "conv2d", more={"stride": torch.tensor(1.0)}),
    Row("stride an array", "conv2d", more={"stride": np.array([1, 1])}),
    Row("stride nested", "conv2d", more={"stride": ((1, 1),)}),
    Row("stride a dictionary", "conv2d", more={"stride": {1: 1}}),
    Row("padding a numpy float", "conv2d", more={"padding": np.float32(1)}),
    Row("padding with a float", "conv2d", more={"padding": (1, 1.0)}),
    Row("padding starting with a bool", "conv2d", more={"padding": (True, 1)}),
    Row("padding None", "conv_transpose2d", x=XT, w=WT, more={"padding": None}),
    Row("dilation a float", "conv_transpose3d", x=(1, 2, 3, 3, 3), w=(2, 2, 2, 2, 2), more={"dilation": 1.0}),
    Row("output_padding a bool", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3), more={"output_padding": False}),
    Row("groups a float", "conv2d", more={"groups": 1.0}),
    Row("groups a bool", "conv2d", more={"groups": True}),
    Row("groups a tuple", "conv2d", more={"groups": (1,)}),
    Row("groups a list", "conv2d", more={"groups": [1]}),
    Row("groups a dictionary", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3), more={"groups": {1: 1}}),
    Row("groups None", "conv_transpose2d", x=XT, w=WT, more={"groups": None}),
    # Their number and range.
    Row("no strides", "conv2d", more={"stride": ()}),
    Row("too many strides", "conv2d", more={"stride": (1, 1, 1)}),
    Row("too many strides in a list", "conv1d", x=(2, 4, 8), w=(6, 4, 3), more={"stride": [1, 1]}),
    Row("too few paddings", "conv3d", x=(1, 2, 4, 4, 4), w=(2, 2, 3, 3, 3), more={"padding": (1, 1)}),
    Row("a padding for each side", "conv2d", more={"padding": (1, 1, 1, 1)}),
    Row("too many dilations", "conv2d", more={"dilation": (1, 1, 1)}),
    Row("too many output_paddings", "conv_transpose2d", x=XT, w=WT, more={"output_padding": (0, 0, 0), "stride": 2}),
    Row("zero stride", "conv2d", more={"stride": 0}),
    Row("negative stride in one dimension", "conv2d", more={"stride": (1, -1)}),
    Row("transposed, zero stride", "conv_transpose2d", x=XT, w=WT, more={"stride": (0, 1)}),
    Row("negative padding", "conv2d", more={"padding": -1}),
    Row("negative padding in the last dimension", "conv3d", x=(1, 2, 4, 4, 4), w=(2, 2, 3, 3, 3), more={"padding": (1, 1, -1)}),
    Row("transposed, negative padding", "conv_transpose2d", x=XT, w=WT, more={"padding": (0, -2)}),
    Row("zero dilation", "conv2d", more={"dilation": 0}),
    Row("zero dilation of a kernel of one", "conv2d", w=(6, 4, 1, 1), more={"dilation": 0}),
    Row("negative dilation", "conv2d", more={"dilation": -1}),
    Row("transposed, negative dilation", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3), more={"dilation": -2}),
    Row("stride beyond 64 bits", "conv2d", more={"stride": 2**63}),
    Row("negative output_padding", "conv_transpose2d", x=XT, w=WT, more={"output_padding": -1, "stride": 2}),
    Row("output_padding of stride and dilation one", "conv_transpose2d", x=XT, w=WT, more={"output_padding": 1}),
    Row("output_padding as large as the stride", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3),
        more={"output_padding": 2, "stride": 2}),
    Row("output_padding beyond one of the strides", "conv_transpose3d", x=(1, 2, 3, 3, 3), w=(2, 2, 2, 2, 2),
        more={"output_padding": (0, 1, 3), "stride": (1, 2, 3)}),
    Row("an unknown padding string", "conv2d", more={"padding": "full"}),
    Row("padding strings know their case", "conv1d", x=(2, 4, 8), w=(6, 4, 3), more={"padding": "SAME"}),
    Row("a string per dimension", "conv2d", more={"padding": ("same", "same")}),
    Row("same with a stride", "conv2d", more={"padding": "same", "stride": 2}),
    Row("same with one stride", "conv3d", x=(1, 2, 4, 4, 4), w=(2, 2, 3, 3, 3), more={"padding": "same", "stride": (1, 1, 2)}),
    Row("transposed, same", "conv_transpose2d", x=XT, w=WT, more={"padding": "same"}),
    Row("transposed, valid", "conv_transpose1d", x=(2, 4, 5), w=(4, 6, 3), more={"padding": "valid"}),
    # Extents.
    Row("kernel larger than the input", "conv2d", w=(6, 4, 9, 3)),
    Row("dilated kernel larger than the padded input", "conv2d", more={"padding": 1, "dilation": (1, 5)}),
    Row("kernel larger than the input, 1-D", "conv1d", x=(2, 4, 2), w=(6, 4, 3)),
    Row("kernel larger than the input, 3-D unbatched", "conv3d", x=(2, 4, 4, 2), w=(2, 2, 3, 3, 3)),
    Row("kernel larger than the input of an empty batch", "conv2d", x=(0, 4, 8, 8), w=(6, 4, 9, 3)),
    Row("kernel larger than the input, valid", "conv2d", w=(6, 4, 9, 3), more={"padding": "valid"}),
    Row("no input rows", "conv2d", x=(2, 4, 0, 8)),
    Row("no input rows but enough padding", "conv2d", x=(2, 4, 0, 8), more={"padding": 2}),
    Row("no input columns, 1-D", "conv1d", x=(2, 4, 0), w=(6, 4, 3), more={"padding": 2}),
    Row("no output channels", "conv2d", w=(0, 4, 3, 3)),
    Row("no input channels but some expected", "conv2d", x=(2, 0, 8, 8)),
    Row("transposed, no input rows", "conv_transpose2d", x=(2, 4, 0, 5), w=WT),
    Row("transposed, no input channels", "conv_transpose2d", x=(2, 0, 5, 5), w=(0, 6, 3, 3)),
    Row("transposed, padding crops more than there is", "conv_transpose2d", x=XT, w=WT, more={"padding": 9}),
]  # fmt: skip

# What torch takes and one would not expect.
ODD = [
    Row("numpy integers", "conv2d", more={"stride": np.int64(2), "padding": (np.int32(1), 0)}),
    Row("numpy groups", "conv2d", x=(2, 8, 8, 8), more={"groups": np.int64(2)}),
    Row("lists", "conv2d", more={"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}),
    Row("lists of one", "conv_transpose2d", x=XT, w=WT, more={"stride": [2], "padding": [1], "output_padding": [1]}),
    Row("tuples of one", "conv3d", x=(1, 2, 4, 4, 4), w=(2, 2, 2, 2, 2), more={"stride": (2,), "padding": (1,)}),
    Row("a Size", "conv2d", more={"stride": torch.Size([2, 1])}),
    Row("0-d integer tensors", "conv2d", more={"stride": torch.tensor(2), "padding": (torch.tensor(1), 0)}),
    Row("0-d tensor groups", "conv2d", more={"groups": torch.tensor(1)}),
    Row("a bool after an int", "conv2d", more={"padding": (1, True)}),
    Row("valid with a stride", "conv2d", more={"padding": "valid", "stride": 2}),
    Row("same, even kernel, odd dilation", "conv1d", x=(2, 4, 8), w=(6, 4, 4), more={"padding": "same"}),
    Row("a stride far beyond the input", "conv2d", more={"stride": HUGE}),
    Row("a dilation that a kernel of one never uses", "conv2d", w=(6, 4, 1, 1), more={"dilation": HUGE}),
    Row("empty batch", "conv2d", x=(0, 4, 8, 8), b=(6,)),
    Row("empty batch, transposed", "conv_transpose1d", x=(0, 4, 5), w=(4, 6, 3), b=(6,)),
    Row("no channels, out come none", "conv2d", x=(2, 0, 8, 8), w=(6, 0, 3, 3), b=(6,)),
    Row("transposed, an output without rows", "conv_transpose2d", x=(2, 4, 1, 1), w=(4, 6, 2, 2), more={"padding": 1}),
    Row("integers", "conv2d", b=(6,), dtypes=(I64,) * 3),
    Row("a float bias under transposed halves", "conv_transpose2d", x=XT, w=WT, b=(6,), dtypes=(F16, F16, F32)),
    Row("complex numbers", "conv_transpose2d", x=XT, w=WT, b=(6,), dtypes=(torch.complex64,) * 3),
]  # fmt: skip
CPU_ONLY = {"integers", "a float bias under transposed halves"}

# Arguments that are equal, as Python and dictionaries see it, to sound ones that came before.
LOOKALIKES = [
    Row("a float equal to an int before it", "conv2d", more={"stride": 1.0}),
    Row("a bool equal to an int before it", "conv2d", more={"stride": True}),
    Row("floats equal to ints before them", "conv2d", more={"padding": (0.0, 0.0)}),
    Row("a bool equal to groups before it", "conv2d", more={"groups": True}),
    Row("a float equal to groups before it", "conv2d", more={"groups": 1.0}),
    Row("a float equal to output_padding before it", "conv_transpose2d", x=XT, w=WT, more={"output_padding": 0.0}),
    Row("a complex dilation", "conv2d", more={"dilation": 1 + 0j}),
]


def expect_error(expected: Any) -> None:
    assert isinstance(expected, tuple), "torch takes this call: it belongs in ODD"
    assert issubclass(expected[0], Exception)


@pytest.mark.parametrize("row", BAD, ids=str)
def test_functions_refuse_as_torch(row, device):
    args = row.tensors(device)
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    expected = row.call(torch.nn.functional, args)
    expect_error(expected)
    assert row.call(tconv.functional, args) == expected
    assert row.call(tconv.functional, args) == expected  # a refusal may be remembered
    for t, (value, version) in zip(tensors, before, strict=True):
        assert t._version == version
        assert torch.equal(t.to_dense(), value.to_dense())


def sound(row):
    """The integers that a row's arguments are equal to."""
    return {k: tuple(map(int, v)) if isinstance(v, tuple) else int(abs(v)) for k, v in row.more.items()}


def batch_of_its_own(row, x, which):
    """The input repeated, so often that no other test has shown tconv a call of its shape."""
    return x.repeat(3 + 2 * LOOKALIKES.index(row) + which, 1, 1, 1)


@pytest.mark.parametrize("row", LOOKALIKES, ids=str)
def test_what_equals_a_sound_argument_is_still_refused(row, device):
    x, w, _ = row.tensors(device)
    args = [batch_of_its_own(row, x, 0), w]
    getattr(tconv.functional, row.function)(*args, **sound(row))
    expected = row.call(torch.nn.functional, args)
    expect_error(expected)
    assert row.call(tconv.functional, args) == expected


@pytest.mark.parametrize("row", LOOKALIKES, ids=str)
def test_a_refused_argument_does_not_spoil_its_equal(row, device):
    x, w, _ = row.tensors(device)
    x = batch_of_its_own(row, x, 1)
    row.call(tconv.functional, [x, w])
    with tconv.recording() as calls:
        getattr(tconv.functional, row.function)(x, w, **sound(row))
    parity.assert_ours(calls, "dgrad" if "transpose" in row.function else "fprop")


@pytest.mark.parametrize("row", ODD, ids=str)
def test_oddities_are_torchs(row, device):
    if device != "cpu" and row.reason in CPU_ONLY:
        pytest.skip("torch takes it on the CPU alone")
    args = row.tensors(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that even kernels are padded by a copy
        expected, got = row.call(torch.nn.functional, args), row.call(tconv.functional, args)
    assert isinstance(expected, torch.Tensor), expected
    assert isinstance(got, torch.Tensor), got
    parity.assert_same(got, expected)


def test_everything_by_name(device):
    x, w, b = (torch.randn(s, device=device) for s in (XT, WT, (6,)))
    named = {"dilation": 2, "groups": 1, "output_padding": 1, "padding": 1, "stride": 3, "bias": b, "weight": w, "input": x}
    with tconv.recording() as calls:
        parity.assert_same(tconv.functional.conv_transpose2d(**named), torch.nn.functional.conv_transpose2d(**named))
    parity.assert_ours(calls, "dgrad")


def test_a_call_without_arguments_is_refused_as_by_torch():
    for name in parity.OPS:
        expected = parity.outcome(getattr(torch.nn.functional, name))
        expect_error(expected)
        assert parity.outcome(getattr(tconv.functional, name)) == expected


def test_too_many_arguments_are_refused_as_by_torch(device):
    x, w = torch.ones(X, device=device), torch.ones(W, device=device)
    args = [x, w, None, 1, 0, 1, 1, 1]
    expected = parity.outcome(lambda: torch.nn.functional.conv2d(*args))
    expect_error(expected)
    assert parity.outcome(lambda: tconv.functional.conv2d(*args)) == expected


def test_an_error_of_our_own_is_not_hidden(device, monkeypatch):
    def examine(*_):
        raise TypeError("a defect of tconv's")

    monkeypatch.setattr(entry, "examine", examine)
    with pytest.raises(TypeError, match="a defect of tconv's"):
        tconv.functional.conv2d(torch.ones(1, *X[1:], device=device), torch.ones(W, device=device))


# --- layers ---


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its constructor's arguments, the shape of an input or None, and what else to call it with."""

    reason: str
    name: str
    args: tuple[Any, ...]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    x: Any = None
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.reason.replace(' ', '-')}"

    def construct(self, library: Any) -> Any:
        torch.manual_seed(0)
        return parity.outcome(lambda: getattr(library, self.name)(*self.args, **self.more))


CONSTRUCTORS = [
    Layer("zero groups", "Conv2d", (4, 6, 3), {"groups": 0}),
    Layer("negative groups", "ConvTranspose1d", (4, 6, 3), {"groups": -2}),
    Layer("inputs not divisible by groups", "Conv1d", (5, 6, 3), {"groups": 2}),
    Layer("outputs not divisible by groups", "Conv3d", (4, 5, 3), {"groups": 2}),
    Layer("transposed, outputs not divisible by groups", "ConvTranspose2d", (4, 5, 3), {"groups": 2}),
    Layer("an unknown padding string", "Conv2d", (4, 6, 3), {"padding": "full"}),
    Layer("same with a stride", "Conv2d", (4, 6, 3), {"padding": "same", "stride": 2}),
    Layer("same with one stride, lazy", "LazyConv3d", (6, 3), {"padding": "same", "stride": (1, 2, 1)}),
    Layer("an unknown padding mode", "Conv1d", (4, 6, 3), {"padding_mode": "mirror"}),
    Layer("a padding mode that is constant in name", "Conv2d", (4, 6, 3), {"padding_mode": "constant"}),
    Layer("transposed, a padding mode", "ConvTranspose2d", (4, 6, 3), {"padding_mode": "reflect"}),
    Layer("transposed lazy, a padding mode", "LazyConvTranspose3d", (6, 3), {"padding_mode": "circular"}),
    Layer("no kernel size", "Conv2d", (4, 6)),
    Layer("no arguments", "ConvTranspose3d", ()),
    Layer("unknown name", "Conv2d", (4, 6, 3), {"strides": 2}),
    Layer("output_padding where there is none", "Conv2d", (4, 6, 3), {"output_padding": 1}),
    Layer("channels twice", "Conv2d", (4, 6, 3), {"in_channels": 4}),
    Layer("lazy takes no input channels", "LazyConv1d", (6, 3), {"in_channels": 4}),
    Layer("negative channels", "Conv2d", (-4, 6, 3)),
    Layer("negative kernel", "Conv2d", (4, 6, -3)),
    Layer("fractional channels", "Conv2d", (4.0, 6, 3)),
    Layer("fractional kernel", "Conv1d", (4, 6, 3.0)),
    Layer("groups a string", "Conv2d", (4, 6, 3), {"groups": "2"}),
    Layer("integer weights cannot be drawn", "Conv2d", (4, 6, 3), {"dtype": torch.int64}),
    Layer("an unknown device", "Conv2d", (4, 6, 3), {"device": "nowhere"}),
]

CALLS = [
    Layer("wrong channels", "Conv2d", (4, 6, 3), x=(2, 5, 8, 8)),
    Layer("wrong channels, unbatched", "ConvTranspose1d", (4, 6, 3), x=(5, 8)),
    Layer("wrong rank", "Conv3d", (4, 6, 3), x=(4, 8, 8)),
    Layer("wrong rank, transposed", "ConvTranspose2d", (4, 6, 3), x=(4, 8)),
    Layer("wrong rank and an output size", "ConvTranspose2d", (4, 6, 3), x=(4, 8), call={"output_size": [9, 9]}),
    Layer("wrong rank, lazy", "LazyConv2d", (6, 3), x=(4, 8)),
    Layer("wrong rank, transposed lazy", "LazyConvTranspose3d", (6, 3), x=(4, 8, 8)),
    Layer("lazy, inputs not divisible by groups", "LazyConv1d", (6, 3), {"groups": 2}, x=(2, 5, 8)),
    Layer("lazy, outputs not divisible by groups", "LazyConv2d", (5, 3), {"groups": 2}, x=X),
    Layer("kernel larger than the input", "Conv2d", (4, 6, 3), x=(2, 4, 8, 2)),
    Layer("too many strides", "Conv2d", (4, 6, 3), {"stride": (1, 1, 1)}, x=X),
    Layer("too few kernel extents", "Conv2d", (4, 6, (3,)), x=X),
    Layer("too many kernel extents", "Conv2d", (4, 6, (3, 3, 3)), x=X),
    Layer("four kernel extents", "Conv1d", (4, 6, (3, 3, 3, 3)), x=(2, 4, 8)),
    Layer("four kernel extents, transposed", "ConvTranspose2d", (4, 6, (3, 3, 3, 3)), x=XT),
    Layer("of another rank", "Conv2d", (4, 6, (3,), (1,), (0,), (1,)), x=(2, 4, 8)),
    Layer("transposed, of another rank", "ConvTranspose1d", (4, 6, (3, 3), (1, 1), (0, 0), (0, 0), 1, True, (1, 1)), x=XT),
    Layer("zero stride", "Conv2d", (4, 6, 3), {"stride": 0}, x=X),
    Layer("negative padding", "Conv2d", (4, 6, 3), {"padding": -1}, x=X),
    Layer("fractional stride", "Conv2d", (4, 6, 3), {"stride": 1.0}, x=X),
    Layer("a bool stride", "Conv2d", (4, 6, 3), {"stride": True}, x=X),
    Layer("transposed, a padding string becomes letters", "ConvTranspose2d", (4, 6, 3), {"padding": "same"}, x=XT),
    Layer("no output channels", "Conv2d", (4, 0, 3), x=X),
    Layer("weights of another precision", "Conv2d", (4, 6, 3), {"dtype": torch.float64}, x=X),
    Layer("reflection wider than the input", "Conv2d", (4, 6, 3), {"padding": 9, "padding_mode": "reflect"}, x=X),
    Layer("circle wound twice", "Conv1d", (4, 6, 3), {"padding": 9, "padding_mode": "circular"}, x=(2, 4, 8)),
    Layer("wrong channels, replicated", "Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate"}, x=(2, 5, 8, 8)),
    Layer("wrong rank under a padding mode", "Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate"}, x=(4, 8)),
    Layer("input None", "Conv2d", (4, 6, 3)),
    Layer("input None, transposed", "ConvTranspose2d", (4, 6, 3)),
    Layer("input a list under a padding mode", "Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate"}, x=[[1.0]]),
    Layer("output size where there is none", "Conv2d", (4, 6, 3), x=X, call={"output_size": (8, 8)}),
    Layer("output too small", "ConvTranspose2d", (4, 6, 3), {"stride": 2}, x=XT, call={"output_size": (10, 11)}),
    Layer("output too large", "ConvTranspose2d", (4, 6, 3), {"stride": 2}, x=XT, call={"output_size": [11, 13]}),
    Layer("output size of wrong length", "ConvTranspose2d", (4, 6, 3), {"stride": 2}, x=XT, call={"output_size": [6, 11, 11]}),
    Layer("output size a number", "ConvTranspose2d", (4, 6, 3), {"stride": 2}, x=XT, call={"output_size": 11}),
    Layer("output size of fractions", "ConvTranspose1d", (4, 6, 3), {"stride": 2}, x=(2, 4, 5), call={"output_size": [11.5]}),
    Layer("output_padding beyond the stride", "ConvTranspose3d", (2, 2, 2), {"output_padding": 1}, x=(1, 2, 3, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("layer", CONSTRUCTORS, ids=str)
def test_constructors_refuse_as_torch(layer):
    expected = layer.construct(torch.nn)
    expect_error(expected)
    assert layer.construct(tconv) == expected


@pytest.mark.parametrize("layer", CALLS, ids=str)
def test_layers_refuse_as_torch(layer, device):
    x = torch.randn(layer.x, device=device) if isinstance(layer.x, tuple) else layer.x
    ours, torchs = layer.construct(tconv), layer.construct(torch.nn)
    assert isinstance(torchs, torch.nn.Module), torchs
    expected = parity.outcome(lambda: torchs.to(device)(x, **layer.call))
    expect_error(expected)
    assert parity.outcome(lambda: ours.to(device)(x, **layer.call)) == expected
