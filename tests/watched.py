"""What tests/test_watched.py runs in processes of their own: frames that torch.compile leaves to Python, and dynamo watches.

python -m tests.watched WAY prints, as JSON, what dynamo compiled and what ran in each situation. WAY is "torch", "enable"
or "replace". A process for each: what dynamo skips once it skips for good.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo import convert_frame
from torch.utils.checkpoint import checkpoint

import tconv
from tconv.launching import compiled

BACKEND = "aot_eager"
frames: list[str] = []  # "file: function" of each frame that dynamo starts to compile
_compile = convert_frame.ConvertFrameAssert.__call__


def _noted(self, frame, *args, **kwargs):
    frames.append(f"{frame.f_code.co_filename}: {frame.f_code.co_name}")
    return _compile(self, frame, *args, **kwargs)


convert_frame.ConvertFrameAssert.__call__ = _noted


def say(*_):
    """What dynamo cannot trace, as a hook of a user's."""
    print(end="")


def module(m, x):
    m.compile(backend=BACKEND)
    return m(x)


def whole(m, x):
    return torch.compile(m, backend=BACKEND)(x)


def hook(m, x):
    m[0].register_forward_hook(say)
    return whole(m, x)


def backward_hook(m, x):
    m[2].register_full_backward_hook(say)
    return whole(m, x)


def broken(m, x):
    """A graph break within `try`, which leaves all of the frame to Python, and every frame that starts in it to dynamo."""

    def step(x):
        try:
            torch._dynamo.graph_break()
            return m(x)
        finally:
            say()

    return torch.compile(step, backend=BACKEND)(x)


def left(function):
    """A situation: a function that dynamo leaves to Python in the same way."""
    torch._dynamo.eval_frame.skip_code(function.__code__)

    def situation(m, x):
        return torch.compile(lambda x: torch._dynamo.graph_break() or function(m, x), backend=BACKEND)(x)

    return situation


@contextlib.contextmanager
def manager():
    say()
    yield


def within(m, x):
    def step(x):
        with manager():
            torch._dynamo.graph_break()
            return m(x)

    return torch.compile(step, backend=BACKEND)(x)


def training(m, x):
    def step(x):
        y = m(x)
        y.square().sum().backward(retain_graph=True)
        return y

    return torch.compile(step, backend=BACKEND)(x)


def backward(m, x):
    y = m(x)
    y.register_hook(lambda g: g * 2)
    y.square().sum().backward(retain_graph=True)
    return y


def functions(m, x):
    library = tconv.functional if type(m[0]) is tconv.Conv2d else F
    return library.conv_transpose2d(library.conv2d(x, m[0].weight, m[0].bias), m[2].weight, m[2].bias)


def second(m, x):
    (g,) = torch.autograd.grad(functions(m, x).pow(3).sum(), x, create_graph=True)
    return g


def vmapped(m, x):
    return torch.vmap(m)(torch.stack([x, 2 * x]))


def forward_mode(m, x):
    return torch.func.jvp(lambda x: functions(m, x), (x,), (x.cos(),))[1]


def lowered(m, x):
    m.float()
    with torch.autocast(x.device.type, torch.bfloat16):
        return m(x.float()).float()


def recomputed(m, x):
    return checkpoint(m, x, use_reentrant=False)


def over_the_limit(m, x):
    graph = torch.compile(m, backend=BACKEND, dynamic=False)
    for n in range(3, 4 + torch._dynamo.config.recompile_limit):
        graph(x.detach()[:1].expand(n, *x.shape[1:]))
    return graph(x)


def compiled_autograd(m, x):
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=BACKEND)):
        y = m(x)
        y.square().sum().backward(retain_graph=True)
    return y


SITUATIONS = {
    "module.compile()": module,
    "compile(module)": whole,
    "a hook": hook,
    "a hook of backward": backward_hook,
    "try": broken,
    "with": within,
    "a step of training": training,
    "a backward with a tensor's hook": left(backward),
    "functions": left(functions),
    "a second derivative": left(second),
    "vmap": left(vmapped),
    "forward mode": left(forward_mode),
    "autocast": left(lowered),
    "a checkpoint": left(recomputed),
    "more shapes than are compiled": over_the_limit,
    "compiled autograd": compiled_autograd,
}


def observed(way, situation):
    """What happens in a situation: frames, results, calls by whom, kernels given up, or an error."""
    torch._dynamo.reset()
    frames.clear()
    compiled._failed.clear()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = nn.Conv2d(4, 6, 3), nn.Tanh(), nn.ConvTranspose2d(6, 4, 3, stride=2)
    model, x = nn.Sequential(*layers).double().to(device), torch.randn(2, 4, 6, 5, dtype=torch.float64, device=device)
    if way == "replace":
        tconv.replace_(model)
    with tconv.enabled() if way == "enable" else contextlib.nullcontext(), tconv.recording() as calls:
        try:
            y = situation(model, x.requires_grad_())
            grads = torch.autograd.grad(y.square().sum(), (x, *model.parameters()), allow_unused=True)
            values, error = [float(t.square().sum()) for t in (y, *grads) if t is not None], None
        except Exception as e:
            values, error = None, f"{type(e).__name__}: {e}"
    return {
        "frames": collections.Counter(frames),
        "values": values,
        "error": error,
        "ours": [call.operation for call in calls if call.ours],
        "left": [str(call) for call in calls if not call.ours],
        "failed": [*map(str, compiled._failed.values())],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: observed(sys.argv[1], situation) for name, situation in SITUATIONS.items()}))
