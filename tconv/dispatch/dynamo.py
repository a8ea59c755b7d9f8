"""Marks functions that dynamo must not compile: those called from C++, and those that only eager calls reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

F = TypeVar("F", bound=Callable[..., Any])
_SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # the frame itself, and all frames that it calls


def opaque(function: F) -> F:
    """Keeps dynamo from compiling a function and everything that it calls.

    Where torch.compile runs a frame in plain Python (a graph break within `try`, a module hook), dynamo tries to compile every
    frame called from it. That includes frames called from C++: an operator's kernel, an autograd function's backward. Without
    the mark, dynamo would compile the planner and Triton's launcher piece by piece.

    The mark is on the function's code object, so a call costs no more than before. Dynamo ignores it when it traces through
    a call, so compiled autograd still traces a backward.
    """
    set_code_exec_strategy(function.__code__, _SKIP)
    return function
