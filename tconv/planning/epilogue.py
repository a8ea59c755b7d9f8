"""What a kernel does with a result before it writes it: per-channel scale and shift, a residual, an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish")
BY_RESULT = frozenset(("relu", "leaky_relu", "sigmoid", "tanh"))  # whose gradient follows from the activation's result


@dataclass(frozen=True)
class Epilogue:
    """The steps from a convolution with its bias to the result. Each is left out if its field is empty.

        v = v * scale + shift, per channel; v = v + residual (BEFORE); v = activation(v); v = v + residual (AFTER)

    Attributes:
        activation: one of ACTIVATIONS, or empty.
        slope: leaky_relu's factor for negative numbers.
        scale, shift: True if there is one.
        wide: True if they are in the accumulator's dtype, False if in the result's.
        residual: "before" or "after" the activation, or empty.
        stepwise: True if each step rounds to the result's dtype, as a sequence of PyTorch's functions does. Otherwise all steps
            are computed in the accumulator's dtype, and the result is rounded once.
        kept: True if the number that the activation gets is written too, for its gradient.
        result: the name of the result's dtype where that is not the operands', which are fp8 then; else empty.
    """

    activation: str = ""
    slope: float = 0.0
    scale: bool = False
    shift: bool = False
    wide: bool = False
    residual: str = ""
    stepwise: bool = False
    kept: bool = False
    result: str = ""

    @property
    def per_channel(self) -> bool:
        """True if a step depends on the channel."""
        return self.scale or self.shift

    @property
    def tensors(self) -> int:
        """The number of tensors of the result's size that are read or written beside it."""
        return bool(self.residual) + self.kept

    @property
    def by_result(self) -> bool:
        """True if the activation's gradient can be computed from its result, which is the result of the whole."""
        rising = self.activation != "leaky_relu" or self.slope > 0  # else the result does not tell its argument's sign
        return self.activation in BY_RESULT and rising and self.residual != "after"

    def constants(self) -> dict[str, Any]:
        """Returns the compile-time constants of the kernels that write a result. Without steps, their pointers are None."""
        found: dict[str, Any] = {
            "ACTIVATION": self.activation, "SLOPE": self.slope, "SCALE": self.scale, "SHIFT": self.shift,
            "RESIDUAL": self.residual, "STEPWISE": self.stepwise, "KEPT": self.kept,
        }  # fmt: skip
        return found if self else found | dict.fromkeys(POINTERS)

    def __bool__(self) -> bool:
        return bool(self.activation or self.scale or self.shift or self.residual)

    def __str__(self) -> str:
        slope = f"({self.slope:g})" if self.activation == "leaky_relu" else ""
        steps = (
            ("scale", self.scale), ("shift", self.shift), ("residual", self.residual == "before"),
            (f"{self.activation}{slope}", self.activation), ("residual", self.residual == "after"),
            ("rounded at each step", self.stepwise), (f"in {self.result}", self.result),
        )  # fmt: skip
        return ", ".join(name for name, there in steps if there)


NONE = Epilogue()
POINTERS = ("scale_ptr", "shift_ptr", "residual_ptr", "kept_ptr")
