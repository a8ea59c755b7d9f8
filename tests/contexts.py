"""What a convolution can stand in: functions of x, w and b, and graphs.

The convolutions are torch's; a test may set `F`, whose functions are called, and `made`, which is given each model built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests import parity

F64 = torch.float64


def made(model):
    return model


def tensors(device, dtype=F64, x=(2, 4, 6, 5), w=(6, 2, 3, 3)):
    """x, w, b of a 2-D layer of two groups, leaves."""
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(shape, generator=generator, dtype=F64).to(device, dtype).requires_grad_() for shape in (x, w, (w[0],))
    )


def conv(x, w, b=None):
    return F.conv2d(x, w, b, stride=(2, 1), padding=1, groups=2)


def same(got, expected, what="result", formats=True):
    """Equal in structure, values and, if asked, memory format."""
    if isinstance(expected, dict):
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            same(g, e, f"{what} {i}", formats)
    elif formats:
        parity.assert_same(got, expected, what, weight=True)
    else:
        parity.assert_same(got.contiguous(), expected.contiguous(), what)


# --- what a convolution can stand in ---


class Standardized(nn.Conv2d):
    """A third party's layer, whose weight is computed anew and which calls the function itself."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Kept(torch.Tensor):
    """A subclass that torch's default wraps again."""


class Counted(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    """All six layers that matter here: forward, transposed, circular, "same" with an even kernel, 1-D and 3-D."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.b = nn.ConvTranspose2d(6, 3, 2, stride=2, output_padding=1)
        self.c = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.d = nn.Conv1d(3, 2, 2, padding="same")
        self.e = nn.Conv3d(1, 2, (2, 1, 2))

    def forward(self, x):
        y = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.e(self.d(y.flatten(2)).unsqueeze(1).unflatten(3, (-1, y.shape[3])))


def net(device):
    torch.manual_seed(4)
    return made(Net().to(device, F64))


def losses(function):
    """The output and the gradients by all leaves of a function of x, w and b."""

    def run(x, w, b):
        y = function(x, w, b)
        return y, *torch.autograd.grad(y.square().sum(), [t for t in (x, w, b) if t.requires_grad], allow_unused=True)

    return run


def trained(module):
    def run(x, w, b):
        m = module(x.device)
        y = m(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *m.parameters()))

    return run


def standardized(device):
    torch.manual_seed(5)
    return made(Standardized(4, 6, 3, groups=2).to(device, F64))


def parametrized(device):
    torch.manual_seed(6)
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 3, 3, stride=2))
    return made(nn.Sequential(layer, nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 2, 1))).to(device, F64).eval())


def function_call(x, w, b):
    m = net(x.device)
    parameters = {name: p.detach() * 1.5 for name, p in m.named_parameters()}
    return torch.func.functional_call(m, parameters, (x,))


def dual(x, w, b):
    tangents = [torch.ones_like(t) for t in (x, w, b)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), tangent) for t, tangent in zip((x, w, b), tangents, strict=True)]
        return forward_ad.unpack_dual(conv(*duals))


def forward_over_reverse(x, w, b):
    tangent = torch.ones_like(x)
    with forward_ad.dual_level():
        d = forward_ad.make_dual(x, tangent)
        (g,) = torch.autograd.grad(conv(d, w).pow(3).sum(), d, create_graph=True)
        return forward_ad.unpack_dual(g)


def twice(x, w, b):
    gradients = torch.autograd.grad(conv(x, w, b).pow(3).sum(), (x, w, b), create_graph=True)
    return gradients, torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, w, b))


def batched_gradients(x, w, b):
    y = conv(x, w)
    return torch.autograd.grad(y, (x, w), torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)


def autocast(x, w, b):
    x, w, b = (t.detach().float().requires_grad_() for t in (x, w, b))
    with torch.autocast(x.device.type, torch.bfloat16):
        y = conv(x, w, b)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, w, b))
    assert {g.dtype for g in gradients} == {torch.float32}
    # The sums differ in order only; a gradient was rounded to bf16 on its way.
    return y, *(g.bfloat16() for g in gradients)


def subclass(x, w, b):
    kept = x.detach().as_subclass(Kept).requires_grad_()
    y = conv(kept, w, b)
    assert type(y) is Kept
    (g,) = torch.autograd.grad(y.sum(), kept)
    return y.as_subclass(torch.Tensor), g.as_subclass(torch.Tensor)


def function_mode(x, w, b):
    with Counted() as mode:
        y = conv(x, w, b)
        y.square().sum().backward(inputs=(x, w))
    assert nn.functional.conv2d in mode.seen
    assert not {torch.Tensor.new_empty_strided, torch.empty, torch.Tensor.data_ptr} & set(mode.seen), "saw inside"
    gradients = x.grad, w.grad
    x.grad = w.grad = None
    return y, *gradients


def dispatch_mode(x, w, b):
    with Operators() as mode:
        y = conv(x, w, b)
        gradients = torch.autograd.grad(y.sum(), (x, w, b))
    seen = [f.overloadpacket for f in mode.seen]
    assert torch.ops.aten.convolution in seen
    assert torch.ops.aten.convolution_backward in seen
    assert torch.ops.aten.new_empty_strided not in seen, "saw inside"
    return y, *gradients


def flops(x, w, b):
    with FlopCounterMode(display=False) as counter:
        y = conv(x, w, b)
        gradients = torch.autograd.grad(y.sum(), (x, w, b))
    assert counter.get_total_flops() == 2 * 3 * y.numel() * 2 * 9 + 2 * y.numel() * 2 * 9  # torch's count, by groups too many
    return y, *gradients


def default_device(x, w, b):
    with torch.device(x.device):
        return losses(conv)(x, w, b)


def packed_hooks(x, w, b):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = conv(x, w, b)
    return torch.autograd.grad(y.sum(), (x, w, b))


def reentrant(x, w, b):
    checkpoint(conv, x, w, b, use_reentrant=True).square().sum().backward()
    return x.grad, w.grad, b.grad


def per_sample(x, w, b):
    def loss(w, b, x):
        return conv(x.unsqueeze(0), w, b).square().sum()

    return torch.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(w.detach(), b.detach(), x.detach())


def expanded_weights(x, w, b):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    torch.manual_seed(7)
    m = made(nn.Conv2d(4, 6, 3, groups=2).to(x.device, F64))
    call_for_per_sample_grads(m)(x.detach()).sum().backward()
    return m.weight.grad_sample, m.bias.grad_sample


def hessian(x, w, b):
    w = w.detach()[:2, :1, :1, :1]
    return torch.func.hessian(lambda x: F.conv2d(x, w, groups=2).pow(3).sum())(x.detach()[:1, :2, :2, :2])


def jacobians(x, w, b):
    x, w = x.detach()[:1, :2, :3, :3], w.detach()[:2, :1, :2, :2]
    return tuple(
        jac(lambda w: F.conv2d(x, w, groups=2).square().flatten())(w) for jac in (torch.func.jacrev, torch.func.jacfwd)
    )


def nested_jvp(x, w, b):
    x, w = x.detach(), w.detach()

    def once(x):
        return torch.func.jvp(lambda x: conv(x, w).pow(3), (x,), (torch.ones_like(x),))[1]

    return torch.func.jvp(once, (x,), (torch.ones_like(x),))


def inference(x, w, b):
    with torch.inference_mode():
        return net(x.device)(x).clone()


def scripted(x, w, b):
    return torch.jit.script(net(x.device))(x)


def fx(x, w, b):
    return torch.fx.symbolic_trace(net(x.device))(x)


def views(x, w, b):
    """Strides of every kind: a conjugate's real view and a negation, expanded weights and gradients, slices."""
    z = torch.complex(x.detach(), -x.detach()).conj()
    return losses(conv)(z.imag.requires_grad_(), w[:, :, ::2, :1].expand(6, 2, 2, 3), b[::1].flip(0))


CONTEXTS = {
    "plain": losses(conv),
    "no grad": lambda x, w, b: conv(x.detach(), w.detach(), b.detach()),
    "all layers": trained(net),
    "a third party's subclass": trained(standardized),
    "parametrized layers": trained(parametrized),
    "functional_call": function_call,
    "inference mode": inference,
    "views": views,
    "forward mode": dual,
    "forward over reverse": forward_over_reverse,
    "double backward": twice,
    "batched gradients": batched_gradients,
    "vmap over x": lambda x, w, b: torch.vmap(lambda x: conv(x, w, b))(torch.stack([x, 2 * x])),
    "vmap over w": lambda x, w, b: torch.vmap(lambda w: conv(x, w))(torch.stack([w, 2 * w])),
    "vmap over both": lambda x, w, b: torch.vmap(conv)(torch.stack([x, 2 * x]), torch.stack([w, 3 * w])),
    "vmap(grad)": per_sample,
    "expanded weights": expanded_weights,
    "hessian": hessian,
    "jacobians": jacobians,
    "jvp of jvp": nested_jvp,
    "autocast": autocast,
    "reentrant checkpoint": reentrant,
    "checkpoint": losses(lambda x, w, b: checkpoint(conv, x, w, b, use_reentrant=False)),
    "saved tensors' hooks": packed_hooks,
    "tensor subclass": subclass,
    "function mode": function_mode,
    "dispatch mode": dispatch_mode,
    "default device": default_device,
    "FlopCounterMode": flops,
    "FX": fx,
    "jit.script": scripted,
}


# --- graphs ---


def small(device):
    return tensors(device, x=(2, 4, 4, 3))[0].detach()


def compiled_by(backend):
    return lambda device: torch.compile(net(device), backend=backend, fullgraph=True)


def traced(device):
    return torch.jit.trace(net(device), small(device))


def exported(device):
    return torch.export.export(net(device), (small(device),)).module()


GRAPHS = {
    "aot_eager": compiled_by("aot_eager"),
    "inductor": compiled_by("inductor"),
    "jit.trace": traced,
    "export": exported,
}
