"""What measures a pass when it is first seen. tconv/tune puts itself here, since it is above this layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tconv.planning.problem import Geometry

# Given a pass by name, its geometry, its operands, the bias and a tensor like the result.
Measure = Callable[[str, Geometry, tuple[torch.Tensor, torch.Tensor], "torch.Tensor | None", torch.Tensor], None]
measure: Measure | None = None
