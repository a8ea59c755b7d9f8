"""tconv's operators as aten's, for whoever takes an exported or traced graph that may hold aten's operators alone.

`ExportedProgram.run_decompositions()` has no registry to learn of them from. A kernel for CompositeImplicitAutograd would do,
but it would enter Inductor's table as well, so that torch.compile would no longer run tconv's kernels, and every export would
warn of it. torch._decomp's global table is not read there, and Inductor raises at an operator that is in it. So the table is
extended where torch makes it for export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from tconv.layout import FORMATS
from tconv.ops import OPERATORS, MaybeTensor, Window, _result

CONVOLUTION = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def decompositions() -> dict[Any, Callable[..., torch.Tensor]]:
    """What tconv's operators are in aten's: one convolution where torch's layer is one, else with padding or cropping.

    `ExportedProgram.run_decompositions()`, `torch.export.default_decompositions()` and `torch.onnx.export` know them already.
    This table is for whoever brings a table: `make_fx(decomposition_table=...)`, or
    `ExportedProgram.run_decompositions(tconv.decompositions())`, which leaves aten's `conv2d` and its likes whole.

    Returns:
        A new dictionary from `torch.ops.tconv.fprop.default`, `dgrad` and `wgrad` to functions of the same arguments.

    Example:
        >>> sorted(str(operator) for operator in decompositions())
        ['tconv.dgrad.default', 'tconv.fprop.default', 'tconv.wgrad.default']
    """
    return {OPERATORS["fprop"]: _fprop, OPERATORS["dgrad"]: _dgrad, OPERATORS["wgrad"]: _wgrad}


def _fprop(x: torch.Tensor, w: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    padding = h.before
    if not _all_ints(h.before, h.after):
        x, padding = _pad(x, h.before, h.after), [0] * len(h.before)
    elif [*h.before] != [*h.after] and not _reads_no_further(x, w, h):
        padding = [max(min(ends), 0) for ends in zip(h.before, h.after, strict=True)]
        x = _pad(x, _less(h.before, padding), _less(h.after, padding))
    y = CONVOLUTION[len(padding)](x, w, b, h.stride, padding, h.dilation, h.groups)
    return _laid_out(y, h)


def _dgrad(dy: torch.Tensor, w: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    rank = len(h.stride)
    transposed = TRANSPOSED[rank]
    if _all_ints(h.before, h.after) and min(h.before) >= 0:
        more = _less(h.before, h.after)  # what torch calls output_padding
        if all(0 <= m < max(s, d) for m, s, d in zip(more, h.stride, h.dilation, strict=True)):
            return _laid_out(transposed(dy, w, b, h.stride, h.before, more, h.groups, h.dilation), h)  # type: ignore[arg-type]
    zero = [0] * rank
    dx = transposed(dy, w, None, h.stride, zero, zero, h.groups, h.dilation)  # type: ignore[arg-type]
    dx = _pad(dx, [-n for n in h.before], [-n for n in h.after])
    if b is not None:  # where nothing was read there is a bias still
        dx = dx + b.view(-1, *(1,) * rank)
    return _laid_out(dx, h)


def _wgrad(dy: torch.Tensor, x: torch.Tensor, b: MaybeTensor, *rest: Any) -> torch.Tensor:
    h = Window(*rest)
    rank = len(h.stride)
    like = x.new_zeros(()).expand(_result("wgrad", dy, x, h))  # torch asks for its shape only
    padding = h.before
    symmetric = _all_ints(h.before, h.after) and min(h.before) >= 0
    if not symmetric or any(not 0 <= p - q < s for p, q, s in zip(h.before, h.after, h.stride, strict=True)):
        x, padding = _pad(x, h.before, h.after), [0] * rank
    parameters = h.stride, padding, h.dilation, False, [0] * rank, h.groups
    dw = torch.ops.aten.convolution_backward(dy, x, like, None, *parameters, (False, True, False))[1]
    return _laid_out(dw, h)


def _all_ints(*parameters: Sequence[Any]) -> bool:
    """Whether all are plain numbers, about which a graph of any size may ask."""
    return all(type(n) is int for numbers in parameters for n in numbers)


def _reads_no_further(x: torch.Tensor, w: torch.Tensor, h: Window) -> bool:
    """Whether as much padding behind x as before it gives the same result, since no step reaches the difference."""
    if min(h.before) < 0 or not _all_ints(x.shape, w.shape):
        return False
    return _result("fprop", x, w, h._replace(after=h.before)) == _result("fprop", x, w, h)


def _less(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    return [m - n for m, n in zip(a, b, strict=True)]


def _pad(t: torch.Tensor, before: Sequence[Any], after: Sequence[Any]) -> torch.Tensor:
    """Zeros before and behind each spatial dimension; negative numbers crop."""
    ends = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return t if _all_ints(ends) and not any(ends) else torch.constant_pad_nd(t, ends)


def _laid_out(t: torch.Tensor, h: Window) -> torch.Tensor:
    """A result in the memory format that the operator was asked for; without one, and at rank 1, in torch's own."""
    if h.channels_last is None or t.dim() not in FORMATS:
        return t
    return t.contiguous(memory_format=FORMATS[t.dim()] if h.channels_last else torch.contiguous_format)


def _extend_torchs_default_table() -> None:
    """Wraps the two functions that give it out: Inductor takes it by another way, and stays without."""
    torchs_table: Any = torch.export.default_decompositions
    run: Any = ExportedProgram.run_decompositions

    @functools.wraps(torchs_table)
    def default_decompositions() -> Any:
        table = torchs_table()
        table.update(decompositions())
        return table

    @functools.wraps(run)
    def run_decompositions(self: Any, decomp_table: Any = None, *args: Any, **kwargs: Any) -> Any:
        return run(self, default_decompositions() if decomp_table is None else decomp_table, *args, **kwargs)

    torch.export.default_decompositions = default_decompositions  # type: ignore[assignment]
    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]


_extend_torchs_default_table()
