"""tconv's operators as aten's, for whoever takes an exported or traced graph that may hold aten's operators alone.

`ExportedProgram.run_decompositions()` has no registry to learn of them from. A kernel for CompositeImplicitAutograd would do,
but it would enter Inductor's table as well, so that torch.compile would no longer run tconv's kernels, and every export would
warn of it. torch._decomp's global table is not read there, and Inductor raises at an operator that is in it. So the table is
extended where torch makes it for export.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from tconv.dispatch.equivalents import IN_ATEN
from tconv.dispatch.operators import OPERATORS


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
    return {operator: IN_ATEN[name] for name, operator in OPERATORS.items()}


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
