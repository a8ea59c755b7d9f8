"""Decompositions of tconv's operators into aten's, for tools whose graphs may have aten's operators only.

There is no registry from which `ExportedProgram.run_decompositions()` would learn them. A CompositeImplicitAutograd kernel
would work, but Inductor would use it too, so that torch.compile no longer ran tconv's kernels, and every export would warn.
torch._decomp's global table is not read for export, and Inductor raises an error for an operator in it. So this wraps the
functions in which torch creates the table for export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from tconv.dispatch import causal_ops, norm_operator, sequences, stream_ops
from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.fused_operator import FUSED, GRAD, grad_by_formulas, in_aten
from tconv.dispatch.operators import OPERATORS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns decompositions of tconv's operators into aten's: a convolution, with padding or cropping where needed.

    `ExportedProgram.run_decompositions()`, `torch.export.default_decompositions()` and `torch.onnx.export` use them already.
    This table is for functions that take one: `make_fx(decomposition_table=...)`, or
    `ExportedProgram.run_decompositions(tconv.decompositions())`, which does not decompose aten's `conv2d` etc.

    Returns:
        A new dictionary from `torch.ops.tconv.fprop.default`, `dgrad`, `wgrad`, `fused`, `epilogue_grad`, `normalise`,
        `normalise_grad`, `causal_conv1d`, `causal_conv1d_grad` and `conv_stream` to functions of the same arguments.

    Example:
        >>> sorted(operator._opname for operator in decompositions())[:5]
        ['causal_conv1d', 'causal_conv1d_grad', 'conv_stream', 'dgrad', 'epilogue_grad']
    """
    convolutions: dict[Any, Callable[..., Any]] = {operator: IN_ATEN[name] for name, operator in OPERATORS.items()}
    return convolutions | {
        FUSED: in_aten,
        GRAD: grad_by_formulas,
        norm_operator.NORMALISE: norm_operator.in_aten,
        norm_operator.GRAD: norm_operator.grad_in_aten,
        causal_ops.CAUSAL: sequences.forward,
        causal_ops.GRAD: sequences.gradients,
        stream_ops.STREAM: stream_ops.in_aten,
    }


def _extend_torchs_default_table() -> None:
    """Wraps the two functions that return or use torch's export table. Inductor uses neither, so it keeps tconv's operators."""
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

    # torch looks both names up when it calls them, so replacing them here is enough; types know one function only.
    torch.export.default_decompositions = default_decompositions  # type: ignore[assignment]
    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]


_extend_torchs_default_table()
