"""How the values of PTX lie in numpy arrays.

A register is an array of two dimensions, [programs, threads], either of which is 1 if the value is the same for all. Its
dtype depends on its size alone, as PTX's registers do; instructions look at it as the type that their suffix names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Type:
    """A type suffix: the register class that holds it, and the numpy dtype that computes with it."""

    register: str
    dtype: Any


STORED = {"pred": np.bool_, "b16": np.uint16, "b32": np.int32, "b64": np.int64}  # register class: dtype
TYPES = {
    "pred": Type("pred", np.bool_),
    "b16": Type("b16", np.uint16),
    "u16": Type("b16", np.uint16),
    "s16": Type("b16", np.int16),
    "f16": Type("b16", np.float16),
    "b32": Type("b32", np.int32),
    "u32": Type("b32", np.uint32),
    "s32": Type("b32", np.int32),
    "f32": Type("b32", np.float32),
    "b64": Type("b64", np.int64),
    "u64": Type("b64", np.uint64),
    "s64": Type("b64", np.int64),
    "f64": Type("b64", np.float64),
}
UNITS = {  # bytes: a dtype of that size, by which memory is moved. complex128 is numpy's only one of 16, and is just copied.
    1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128,
}  # fmt: skip
LOADED = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}  # bytes: what a load makes of them
POISON = {  # a register's bits before anything wrote it: a NaN in every format
    "pred": False, "b16": 0x7FFF, "b32": 0x7FFFFFFF, "b64": 0x7FFFFFFFFFFFFFFF,
}  # fmt: skip


def integer(kind: str, size: int = 0) -> Any:
    """Returns the dtype of integers of `size` bytes, by default as wide as a type suffix says: signed if that is, as s8."""
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size or int(kind[1:]) // 8}").type


def single(value: int | float, dtype: Any) -> Array:
    """Returns a number as an array that is the same for all programs and threads; integers wrap around."""
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        bits = int(value) & ((1 << 8 * kind.itemsize) - 1)
        return np.array([[bits]], f"u{kind.itemsize}").view(kind)
    return np.array([[value]], kind)


def _e4m3() -> Array:
    """Returns the numbers that a byte stands for: sign, four bits of exponent, three of fraction, no infinity, one NaN."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    size[[0x7F, 0xFF]] = np.nan
    found: Array = np.where(bits > 127, -size, size).astype(np.float32)
    return found


E4M3 = _e4m3()
