"""Checks, in the interpreter, every hint that a kernel gives to Triton's compiler.

A hint (`tl.multiple_of`, `tl.max_contiguous`, `tl.max_constancy`, and our own `multiple`) is a promise about values. The
interpreter ignores it (only `tl.assume` it evaluates by itself); the compiler relies on it, each version in its own way. A
hint that is false for some input therefore gives right results in the interpreter, and wrong ones on a GPU under one version
of Triton. `install` makes the interpreter evaluate each promise on the actual values, masked lanes included, since the
compiler relies on those too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

from tconv.kernels import common


class FalseHint(AssertionError):
    """A kernel told the compiler something that is not true."""


def runs(data: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Aligned runs of `size` neighbours along an axis, as the last axis of the result; at most the whole axis."""
    data = np.moveaxis(data, axis, -1)
    return data.reshape(*data.shape[:-1], -1, min(size, data.shape[-1]))


def divisible(data: np.ndarray, numbers: list[int], unit: int) -> bool:
    """Each value, of a pointer its address in bytes, is a multiple of each number."""
    return all((data % n == 0).all() for n in numbers)


def contiguous(data: np.ndarray, sizes: list[int], unit: int) -> bool:
    """Along axis d, each aligned run of sizes[d] neighbours goes up by one element at a time."""
    found = (runs(data, d, n) for d, n in enumerate(sizes))
    return all((run - run[..., :1] == unit * np.arange(run.shape[-1])).all() for run in found)


def constant(data: np.ndarray, sizes: list[int], unit: int) -> bool:
    """Along axis d, each aligned run of sizes[d] neighbours has one value."""
    found = (runs(data, d, n) for d, n in enumerate(sizes))
    return all((run == run[..., :1]).all() for run in found)


HOLDS: dict[str, Callable[[np.ndarray, list[int], int], bool]] = {
    "tt.divisibility": divisible,
    "tt.contiguity": contiguous,
    "tt.constancy": constant,
}


def integers(promised: Any) -> list[int]:
    """The numbers of a hint, one per axis."""
    return [int(getattr(n, "value", n)) for n in promised]


def check(name: str, handle: Any, promised: Any) -> None:
    """Raises FalseHint unless an interpreted tensor's values are as promised, one number per axis.

    Divisibility is, as for the compiler, that of the first of each run of neighbours, if contiguity was promised before it.
    """
    numbers = integers(promised)
    element = getattr(handle.dtype, "element_ty", None)  # what a pointer points to
    data = np.atleast_1d(handle.data).astype(np.int64)
    if name == "tt.divisibility":
        data = data[tuple(slice(None, None, size) for size in integers(handle.attr.get("tt.contiguity", ())))]
    if not HOLDS[name](data, numbers, element.primitive_bitwidth // 8 if element else 1):
        raise FalseHint(f"{name} {numbers} is false of {data}")


def install() -> None:
    """Makes the interpreter check hints from here on, in this process."""
    set_attr = TensorHandle.set_attr

    def checked(self: Any, key: str, value: Any) -> None:
        check(key, self, value)
        set_attr(self, key, value)

    TensorHandle.set_attr = checked
    InterpretedFunction.rewritten_fn[common.multiple.fn] = multiple


def multiple(s: Any, VEC: Any) -> Any:
    """`common.multiple` as it is written there, with its promise checked."""
    check("tt.divisibility", s.handle, [VEC])
    return s // VEC * VEC
