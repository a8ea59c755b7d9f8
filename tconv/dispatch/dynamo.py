"""Functions that dynamo is not to compile: those that C++ calls, and what only eager calls reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

F = TypeVar("F", bound=Callable[..., Any])
_SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # the frame itself, and all frames that start within it


def opaque(function: F) -> F:
    """Keeps dynamo from compiling a function and everything that it calls.

    Where torch.compile leaves a frame to Python (a graph break within `try`, a hook), dynamo is offered every frame that
    starts inside. Frames that C++ starts are among them: an operator's kernel, an autograd function's backward. It would
    compile the planner and Triton's launcher piece by piece.

    The mark is on the function's code, so a call costs no more than before. Dynamo does not look at it where it traces
    through a call, so compiled autograd still sees what a backward does.
    """
    set_code_exec_strategy(function.__code__, _SKIP)
    return function
