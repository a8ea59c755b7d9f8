"""How far a result may be from the right one before it is called wrong, the same in every benchmark."""

from __future__ import annotations

import itertools
import math

import torch

from tconv.planning.problem import ConvProblem

# A rounding of the output, and for TF32 of the inputs. Long fp32 sums add their own, and so does the fp32 reference's.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}


def tolerance(precision: str, problem: ConvProblem) -> float:
    """The largest relative error that rounding explains in any pass of a problem."""
    terms = max(problem.gemm("fprop")[2], problem.gemm("wgrad")[2])
    return max(TOLERANCE[precision], 2**-24 * math.sqrt(terms))


def relative_error(got: torch.Tensor | tuple[torch.Tensor, ...], right: torch.Tensor | tuple[torch.Tensor, ...]) -> float:
    """||got - right|| / ||right||, of several results the largest; infinite where shapes differ or something is not finite."""
    pairs = itertools.zip_longest(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, right)))
    worst = 0.0
    for g, r in pairs:
        if g is None or r is None or g.shape != r.shape:
            return math.inf
        error = float((g.to(r.dtype) - r).norm() / r.norm().clamp_min(1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
