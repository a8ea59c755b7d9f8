"""`fuse_`: what surrounds a model's convolutions, in their own kernels; the same outputs and gradients, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tconv
from bench import fusing

D = torch.float64


class Bottleneck(nn.Module):
    """A residual block as torchvision writes it: one ReLU in place for all, an addition in place, a batch norm on the way."""

    def __init__(self, c=4, k=6):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(c, k, 1, stride=2, bias=False), nn.BatchNorm2d(k))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class Causal(nn.Module):
    """A convolution padded before the first step, as video and audio models wrap it."""

    def __init__(self, c, k, taps=3):
        super().__init__()
        self.conv = nn.Conv1d(c, k, taps)
        self.pads = [taps - 1, 0]

    def forward(self, x):
        return self.conv(F.pad(x, self.pads))


class Conditioned(nn.Module):
    """A block with an argument that is None in some calls, and functions instead of modules."""

    def __init__(self, c=4):
        super().__init__()
        self.norm, self.first, self.second = nn.GroupNorm(2, c), Causal(c, c), Causal(c, c)

    def forward(self, x, shift=None):
        h = F.gelu(self.first(self.norm(x)), approximate="tanh")
        if shift is not None:
            h = h + shift
        return x + self.second(F.elu(h))


class Through(nn.Module):
    """Any function of modules as a module's forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def ready(model, training=False):
    """A model in fp64 and evaluation mode, whose batch norms have random numbers."""
    model = model.to(D).train(training)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
            for t, least in ((m.weight, -1), (m.bias, -1), (m.running_mean, -1), (m.running_var, 0.5)):
                if t is not None:
                    t.data.uniform_(least, 2)
    return model


def block(c=3, k=4, act=None, **how):
    """A Sequential of convolution, batch norm and activation."""
    return nn.Sequential(nn.Conv2d(c, k, 3, **how), nn.BatchNorm2d(k), act or nn.ReLU())


def fused_steps(fusion):
    return {c.name: c.steps for c in fusion.fused}


def why(fusion, name):
    return next(c.why for c in fusion.convolutions if c.name == name)


def gradients(model, *args):
    """A model's result, and its gradients for the arguments and parameters."""
    args = [a.detach().clone().requires_grad_() for a in args]
    y = model(*args)
    leaves = [*args, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)


def assert_as_before(model, before, *args):
    """Asserts that a model gives the same output and gradients as another one, and has the same state."""
    for a, b in zip(gradients(model, *args), gradients(before, *args), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    state, old = model.state_dict(), before.state_dict()
    assert [*state] == [*old]
    assert all(torch.equal(state[k], old[k]) for k in state)


def launches(model, *args):
    """The calls of a forward pass without gradients."""
    with torch.no_grad(), tconv.recording() as calls:
        model(*args)
    return calls


class Residuals(nn.Module):
    """Several chains in one forward, each of which reads the last one's result, also as its residual and in its padding."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Causal(3, 3) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv1d(3, 3, 3) for _ in range(2))

    def forward(self, x):
        for first, second in zip(self.first, self.second, strict=True):
            h = F.leaky_relu(first(x), 0.1)
            x = second(F.pad(h, (h.shape[-1] - x.shape[-1] + 1, 1))) + x
        return x


class Clamped(nn.Module):
    """Two paddings before a convolution, the second one, which is the kernel's, by a function and without an amount."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.leaky_relu(self.conv(F.pad(x, (0, 0, 0, 0), mode="replicate")), 0.3)


MODELS = {
    "sequential": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), *block(), nn.MaxPool2d(2)), (2, 3, 7, 6)),
    "residual block": (Bottleneck, (2, 4, 5, 6)),
    "conditioned": (Conditioned, (2, 4, 7)),
    "residuals": (Residuals, (2, 3, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), nn.BatchNorm1d(4), nn.LeakyReLU(0.2)),
        (2, 3, 5),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.ConstantPad3d((1, 1, 1, 1, 2, 0), 0.0), nn.Conv3d(2, 3, 3), nn.Hardswish()), (1, 2, 3, 4, 4),
    ),
    "weight norm, old and new": (
        lambda: nn.Sequential(
            torch.nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.SiLU(),
            torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 3)), nn.GELU(),
        ), (2, 3, 8),
    ),
    "padding that repeats the input": (
        lambda: nn.Sequential(
            nn.ReflectionPad2d((1, 2, 0, 1)), nn.Conv2d(3, 4, 3), nn.ReLU(),
            nn.ReplicationPad2d(1), nn.Conv2d(4, 4, 3, padding="valid"), nn.SiLU(), nn.CircularPad2d((1, 1, 1, 1)), Clamped(4),
        ), (2, 3, 6, 5),
    ),
    "other padding modes, no affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, padding_mode="circular"), nn.BatchNorm2d(4, affine=False), nn.Tanh()),
        (2, 3, 5, 4),
    ),
}  # fmt: skip
STEPS = {
    "sequential": {"1": ("pad", "batch norm", "relu")},
    "residual block": {
        "conv1": ("batch norm", "relu"), "conv2": ("batch norm", "residual", "relu"), "downsample.0": ("batch norm",),
    },
    "conditioned": {"first.conv": ("pad", "gelu_tanh"), "second.conv": ("pad", "residual")},
    "residuals": {
        "first.0.conv": ("pad", "leaky_relu"), "first.1.conv": ("pad", "leaky_relu"),
        "second.0": ("pad", "residual"), "second.1": ("pad", "residual"),
    },
    "transposed": {"0": ("batch norm", "leaky_relu")},
    "three dimensions": {"1": ("pad", "hardswish")},
    "weight norm, old and new": {"0": ("silu",), "2": ("gelu",)},
    "padding that repeats the input": {"1": ("pad", "relu"), "4": ("pad", "silu"), "7.conv": ("pad", "leaky_relu")},
    "other padding modes, no affine": {"0": ("batch norm", "tanh")},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay_and_each_chain_is_one_launch(name, device, poisoned):
    build, shape = MODELS[name]
    model = ready(build()).to(device)
    before, x = ready(build()).to(device), torch.randn(shape, dtype=D, device=device)
    before.load_state_dict(model.state_dict())
    fusion = tconv.fuse_(model, x)
    assert fused_steps(fusion) == STEPS[name]
    assert fusion.difference < 1e-13
    assert_as_before(model, before, x)
    calls = launches(model, x)
    assert [c.operation for c in calls] == ["dgrad" if name == "transposed" else "fprop"] * len(STEPS[name])
    assert all(c.ours for c in calls)


def attributes(model):
    """Everything in a model's modules by identity, hooks and modes included."""
    return [(type(m), [(k, id(v)) for k, v in vars(m).items()]) for m in model.modules()]


def test_restore_gives_back_what_was(device):
    model = ready(nn.Sequential(block(3, 4), Bottleneck(4))).to(device)
    x, was = torch.randn(2, 3, 6, 6, dtype=D, device=device), attributes(model)
    y = model(x)
    first = tconv.fuse_(model, x)
    classes = [type(m) for m in model.modules()]
    assert [(t, a) for (_, a), t in zip(was, classes, strict=True)] == attributes(model)  # only classes change
    again = tconv.fuse_(model, x)
    assert str(again) == str(first)
    assert [c.__qualname__ for c in classes] == [type(m).__qualname__ for m in model.modules()]
    lines = []
    tconv.restore_(model, report=lines.append)
    assert lines[1] == f"1: tconv.Bottleneck -> {__name__}.Bottleneck"
    assert attributes(model) == was
    assert torch.equal(model(x), y)


def test_restore_undoes_replace_and_fuse_at_once(device):
    model = ready(Bottleneck()).to(device)
    x, was = torch.randn(1, 4, 4, 4, dtype=D, device=device), attributes(model)
    tconv.replace_(model)
    assert fused_steps(tconv.fuse_(model, x)) == STEPS["residual block"]
    assert isinstance(model.conv1, tconv.Conv2d)
    with tconv.restored(model):  # tools that compare classes see the user's
        assert type(model) is Bottleneck
    assert type(model) is not Bottleneck
    assert len(launches(model, x)) == 3
    tconv.restore_(model)
    assert attributes(model) == was


def test_training_mode_runs_the_modules(device):
    # A batch norm in training reads the batch; a forward that was traced in evaluation mode must not be used.
    model = ready(Through(lambda self, x: F.dropout(self.body(x), 0.5, self.training), body=block())).to(device)
    before, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5, dtype=D, device=device)
    tconv.fuse_(model, x)
    for m in (model, before):
        m.train()
        torch.manual_seed(1)
        with tconv.recording() as calls:
            m.result = m(x)
        m.reason = calls[0].reason if calls else ""
    assert torch.equal(model.result, before.result)
    assert torch.equal(model.body[1].running_mean, before.body[1].running_mean)
    assert "training is True, was False in fuse_" in model.reason
    model.eval(), before.eval()
    torch.testing.assert_close(model(x), before(x))
    assert [c.ours for c in launches(model, x)] == [True]  # with the statistics that training left

    model.body[1].train()  # this module alone
    assert "the batch norm is in training" in launches(model, x)[0].reason
    assert why(tconv.fuse_(model, x), "body.0") == "the batch norm is in training"


def test_a_batch_norm_that_changes_is_seen(device):
    model, x = ready(block()).to(device), torch.randn(2, 3, 5, 5, dtype=D, device=device)
    tconv.fuse_(model, x)
    for change in (
        lambda n: n.running_mean.add_(1),
        lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
        lambda n: setattr(n, "eps", 0.5),
        lambda n: setattr(n, "running_var", n.running_var + 1),
        lambda n: setattr(n, "weight", nn.Parameter(n.weight * 3, requires_grad=False)),
    ):
        with torch.no_grad():
            change(model[1])
            y = model(x)
            torch.testing.assert_close(y, model[2](model[1](model[0](x))))
    # What is kept from a call in inference mode must be good for later gradients of others.
    model[1].weight, model[1].bias = (nn.Parameter(p.detach().clone(), requires_grad=False) for p in model[1].parameters())
    with torch.inference_mode():
        model(x)
    assert_as_before(model, nn.Sequential(*model), x)
    for p in (model[1].weight, model[1].bias):  # with gradients of its parameters they are computed each time
        p.requires_grad_()
    with tconv.recording() as calls:
        fused = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    assert all(c.ours for c in calls)
    right = torch.autograd.grad(by_modules(model, x).square().sum(), [*model.parameters()])
    for a, b in zip(fused, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def hook(*_):
    return None


class Control(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x)) if x.shape[1] == 3 else x


class Counts(Control):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.relu(self.conv(x))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def with_hook(module, register, hook=hook):
    getattr(module, register)(hook)
    return module


def through(function, **modules):
    return lambda: Through(function, conv=nn.Conv2d(3, 3, 3, padding=1), relu=nn.ReLU(), **modules)


def adds_into_x(self, x):
    return self.relu((x * 1).add_(self.conv(x)))


def adds_into_its_input(self, x):
    x += self.conv(x)  # torch.fx sees no difference to x = x + ...; the comparison does
    return self.relu(x)


def writes_between(self, x):
    x = x * 1
    y = self.conv(x)
    x.mul_(2)
    return y + x


def writes_what_was_padded(self, x):
    x = x * 1
    y = self.conv(F.pad(x, (1, 1)))
    return y.sin() + x.mul_(2).sum()


class Gated(Control):
    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x):
        return self.relu(self.conv(x)) if self.on else x


REFUSED = {  # a model, and why nothing of its convolution is fused
    "a hook on the activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), with_hook(nn.ReLU(), "register_forward_hook")),
        "the activation has a hook, which would not be called or see another result",
    ),
    "a hook on the convolution": (
        lambda: nn.Sequential(with_hook(nn.Conv2d(3, 4, 3), "register_full_backward_hook"), nn.ReLU()),
        "the convolution has a hook, which would not be called or see another result",
    ),
    "a pre-hook on the batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), with_hook(nn.BatchNorm2d(4), "register_forward_pre_hook")),
        "the batch norm has a forward pre-hook, which would not be called",
    ),
    "an activation that kernels do not have": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU()), "followed by ELU, no activation of the kernels",
    ),
    "a result that is used twice": (
        through(lambda self, x: self.relu(y := self.conv(x)) * y), "its result is used 2 times",
    ),
    "a residual that is broadcast": (
        through(lambda self, x: self.conv(x) + x.mean((2, 3), keepdim=True)),
        "the residual is of another shape, dtype or device than the result",
    ),
    "an addition into another tensor": (through(adds_into_x), "its result is added to another tensor in place"),
    "an addition into the input": (through(adds_into_its_input), "model: its traced forward's result differs by"),
    "an input that is written meanwhile": (through(writes_between), "mul_ writes in place before add"),
    "a factor": (
        through(lambda self, x: torch.add(self.conv(x), x, alpha=2)),
        "followed by an addition of another kind than of two tensors",
    ),
    "added to itself": (through(lambda self, x: (y := self.conv(x)) + y), "its result is added to itself"),
    "reflection before zeros": (
        lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3, padding=1)),
        "after a padding in another mode than the convolution's own",
    ),
    "ones, by a function": (
        through(lambda self, x: self.conv(F.pad(x, (1, 1, 0, 0), value=1.0))),
        "after a padding by other numbers than zero; its result is the module's",
    ),
    "ones": (
        lambda: nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(3, 4, 3)),
        "after a padding by other numbers than zero; its result is the module's",
    ),
    "cropping": (
        lambda: nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(3, 4, 3)),
        "after a padding of (-1, -1, -1, -1); its result is the module's",
    ),
    "control flow": (Control, "model: torch.fx cannot trace its forward: TraceError: symbolically traced variables"),
    "a buffer's value": (Gated, "model: torch.fx cannot trace its forward: TraceError: symbolically traced variables"),
    "an input that is written after it was padded": (
        through(writes_what_was_padded), "after a padding whose input mul_ writes in place; followed by sin",
    ),
    "an attribute that is set": (Counts, "model: it sets its attribute calls"),
    "a class of the user's": (
        lambda: nn.Sequential(OwnForward(3, 4, 3), nn.ReLU()), "OwnForward has a forward of its own",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "the batch norm keeps no statistics",
    ),
    "the grad mode": (
        through(lambda self, x: self.relu(self.conv(x)) if torch.is_grad_enabled() else self.relu(self.conv(x) * 1)),
        "model: it asks for the grad mode",
    ),
    "another grad mode": (
        through(torch.no_grad()(lambda self, x: self.relu(self.conv(x)))), "model: it changes the grad mode or autocast",
    ),
    "a random number": (
        through(lambda self, x: self.relu(self.conv(x) * torch.rand(()).item())),
        "model: it draws random numbers that do not depend on its input",
    ),
    "a branch on the class of x": (  # the proxy is no tensor, so the trace takes the other branch; the results tell
        through(lambda self, x: self.relu(self.conv(x)) if isinstance(x, torch.Tensor) else self.relu(self.conv(x) + 1.0)),
        "followed by an addition of another kind than of two tensors",
    ),
    "a wrong trace": (
        through(lambda self, x: self.relu(self.conv(x if isinstance(x, torch.Tensor) else x * 2))),
        "model: its traced forward's result differs by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_stays(name, device):
    build, reason = REFUSED[name]
    model = build().to(device, D).eval()
    was, x = attributes(model), torch.randn(2, 3, 5, 5, dtype=D, device=device)
    torch.manual_seed(1)
    y = model(x.clone())
    fusion = tconv.fuse_(model, x)
    assert not fusion.fused
    assert fusion.convolutions[0].why.startswith(reason)
    if name != "an attribute that is set":
        assert attributes(model) == was
    torch.manual_seed(1)
    assert torch.equal(model(x), y)


def by_modules(model, x):
    """What a Sequential computes if its modules are called one after the other."""
    for m in model:
        x = m(x)
    return x


def test_hooks_and_modules_that_come_later_are_called(device):
    model = ready(nn.Sequential(*block(), nn.Dropout(), nn.Identity(), nn.Conv2d(4, 2, 1))).to(device)
    x, seen = torch.randn(1, 3, 6, 6, dtype=D, device=device), []
    assert fused_steps(tconv.fuse_(model, x)) == {"0": ("batch norm", "relu")}
    assert len(launches(model, x)) == 1
    for m in (model[0], model[1], model[2], model[4]):
        handle = m.register_forward_hook(lambda *_: seen.append(1))
        y = model(x)
        assert seen == [1]
        seen.clear()
        handle.remove()
        torch.testing.assert_close(y, by_modules(model, x))
    for i, new in ((2, nn.ELU()), (4, nn.Sigmoid()), (1, nn.GroupNorm(2, 4).to(device, D))):
        model[i] = new
        torch.testing.assert_close(model(x), by_modules(model, x))


class Built(nn.Module):
    """Modules in a list, under two names, and perhaps; an attribute of the class."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.convs, self.last = nn.ModuleList([nn.Conv2d(3, 3, 1)]), nn.Conv2d(3, 3, 3, padding=1)
        self.act = self.last_act = nn.ReLU()
        self.skip, self.gain = None, nn.ParameterDict({"a": torch.ones(3, 1, 1)})

    def forward(self, x):
        y = x
        for conv in self.convs:
            y = self.act(conv(y)) * self.factor
        if self.skip is not None:
            x = self.skip(x)
        for gain in self.gain.values():
            y = y * gain
        return self.last_act(self.last(y) + x)


def test_modules_that_come_and_go_are_seen(device):
    model = ready(nn.Sequential(nn.ZeroPad2d(1), *block(3, 3), Built())).to(device)
    before, x = copy.deepcopy(model), torch.randn(1, 3, 4, 4, dtype=D, device=device)
    assert fused_steps(tconv.fuse_(model, x)) == {
        "1": ("pad", "batch norm", "relu"), "4.convs.0": ("relu",), "4.last": ("residual", "relu"),
    }  # fmt: skip
    conv = nn.Conv2d(3, 3, 1).to(device, D)
    for change in (
        lambda m: m.__setitem__(0, nn.Identity()),
        lambda m: m[4].convs.append(copy.deepcopy(conv)),
        lambda m: setattr(m[4], "skip", copy.deepcopy(conv)),
        lambda m: m[4].gain.update({"b": torch.full((3, 1, 1), 2.0, dtype=D, device=device)}),
        lambda m: setattr(m[4], "factor", 0.5),
        lambda m: setattr(m[4], "act", nn.Tanh()),
        lambda m: m.append(nn.Tanh()),
        lambda m: m.__delitem__(3),
    ):
        one, other = copy.deepcopy(model), copy.deepcopy(before)  # a copy of a fused model is fused
        for m in (one, other):
            change(m)
        with torch.no_grad():
            torch.testing.assert_close(one(x), other(x), rtol=1e-11, atol=1e-11)


def test_modules_that_are_shared_and_called_twice(device):
    def twice(self, x):
        return self.act(self.norm(self.conv(self.act(self.norm(self.conv(x))))))

    model = ready(Through(twice, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), act=nn.SiLU())).to(device)
    model.other = nn.Sequential(model.conv, model.act)  # never called
    before, x = copy.deepcopy(model), torch.randn(1, 3, 4, 4, dtype=D, device=device)
    assert fused_steps(tconv.fuse_(model, x)) == {"conv": ("batch norm", "silu")}
    assert len(launches(model, x)) == 2
    assert_as_before(model, before, x)


def test_calls_of_another_form_run_the_old_forward(device):
    model, (x, s) = ready(Conditioned()).to(device), torch.randn(2, 2, 4, 7, dtype=D, device=device)
    before = copy.deepcopy(model)
    tconv.fuse_(model, x)
    for args, kwargs in (((x, s), {}), ((x,), {"shift": s}), ((x, None), {}), ((), {"x": x})):
        assert torch.allclose(model(*args, **kwargs), before(*args, **kwargs), rtol=1e-12)
    assert len(launches(model, x, s)) == 2  # those of the modules inside: nothing is lost but the activation and the residual
    fusion = tconv.fuse_(model, {"x": x, "shift": s})
    assert fused_steps(fusion) == {"first.conv": ("pad", "gelu_tanh", "residual"), "second.conv": ("pad", "residual")}
    assert len(launches(model, x, s)) == 2
    for m in (model, before):
        m.second.pads[0] = 1  # an attribute that the forward holds, of a module that it was traced into
    model.second.conv, before.second.conv = (nn.Conv1d(4, 4, 2).to(device, D) for _ in range(2))
    before.second.conv.load_state_dict(model.second.conv.state_dict())
    assert torch.allclose(model(x=x, shift=s), before(x, s), rtol=1e-12)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it: a batch norm with its activation inside."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, c, act):
        super().__init__(c)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize(("act", "steps"), [("SiLU", ("batch norm", "silu")), ("Identity", ("batch norm", "residual"))])
def test_a_batch_norm_with_its_activation_inside(act, steps, device):
    def added(self, x):
        return self.last(self.norm(self.conv(x)) + x)

    norm = BatchNormAct2d(3, getattr(nn, act)())
    model = ready(Through(added, conv=nn.Conv2d(3, 3, 1), last=nn.ReLU(), norm=norm)).to(device)
    before, x = copy.deepcopy(model), torch.randn(1, 3, 4, 4, dtype=D, device=device)
    assert fused_steps(tconv.fuse_(model, x))["conv"][:2] == steps
    assert_as_before(model, before, x)
    with model.conv.register_forward_hook(hook):  # the modules run, and each activation once
        torch.testing.assert_close(model(x), before(x))
    for m in (model, before):
        m.norm.drop = nn.ReLU()
    torch.testing.assert_close(model(x), before(x))
    for m in (model, before):
        m.norm = nn.BatchNorm2d(3).to(device, D).eval()
    torch.testing.assert_close(model(x), before(x))
    tconv.fuse_(model, x)
    for m in (model, before):
        m.norm = BatchNormAct2d(3, nn.Tanh()).to(device, D).eval()
    torch.testing.assert_close(model(x), before(x))


def adding(self, x):
    return self.body(x) + x


def test_copies_pickles_and_other_tools(device):
    model = ready(nn.Sequential(Through(adding, body=block(c=3, k=3, padding=1)))).to(device)
    x = torch.randn(1, 3, 4, 4, dtype=D, device=device)
    tconv.fuse_(model, x)
    y = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].body[1].running_mean += 1
    assert len(launches(twin, x)) == 1
    assert not torch.allclose(twin(x), y)  # it has its own statistics
    assert torch.equal(model(x), y)
    loaded = pickle.loads(pickle.dumps(model))  # of the user's classes, which need no tconv
    assert type(loaded[0]) is Through
    torch.testing.assert_close(loaded(x), y)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), y)
    torch.testing.assert_close(torch.vmap(model)(x[None])[0], y)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    with pytest.raises(NotImplementedError, match="restore_"):
        torch.jit.script(model)


def test_channels_last_and_sixteen_bits(device):
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).to(device, torch.bfloat16)
    model, x = model.to(memory_format=torch.channels_last), torch.randn(2, 3, 6, 6, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double())
    stepped = tconv.fuse_(model, x, stepwise=True)
    assert stepped.stepwise
    assert "rounded after each step" in str(stepped)
    once = tconv.fuse_(model, x)
    assert 0 < once.difference < once.allowed == 0.1
    with torch.no_grad():
        y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, exact.bfloat16())  # scale and shift are of fp32, and one rounding ends it


def test_elsewhere_the_modules_run_bit_for_bit(device, monkeypatch):
    model, x = ready(Bottleneck()).to(device), torch.randn(1, 4, 4, 4, dtype=D, device=device)
    y = model(x)
    monkeypatch.setattr(tconv.dispatch.entry, "unavailable", lambda device: "no kernels here")
    fusion = tconv.fuse_(model, x)
    assert fusion.difference == 0
    assert "torch (no kernels here)" in str(fusion)
    assert torch.equal(model(x), y)


def test_what_is_wrong_changes_nothing(device):
    model, x = ready(block()).to(device), torch.randn(1, 3, 5, 5, dtype=D, device=device)
    with pytest.raises(TypeError, match=r"tconv\.fuse_ takes a torch\.nn\.Module, but got a function"):
        tconv.fuse_(lambda x: x, x)
    with pytest.raises(RuntimeError, match="expected input"):
        tconv.fuse_(model, x[:, :2])
    assert type(model) is nn.Sequential
    tconv.fuse_(model, x)
    fused = type(model)
    with pytest.raises(RuntimeError, match="expected input"):
        tconv.fuse_(model, x[:, :2])
    assert type(model) is fused
    tconv.restore_(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tconv.fuse, "_compare", lambda watch, errors, module, old, new, form, found: new(module, *found))
        patch.setattr(tconv.chain, "_scale_and_shift", lambda norm: (norm.running_var, norm.running_mean))
        with pytest.raises(RuntimeError, match="The model is as it was"):
            tconv.fuse_(model, x)
    assert type(model) is nn.Sequential


PIECES = {
    "norm": lambda c: nn.BatchNorm2d(c), "relu": lambda c: nn.ReLU(inplace=True), "silu": lambda c: nn.SiLU(),
    "elu": lambda c: nn.ELU(), "pad": lambda c: nn.ZeroPad2d((1, 0, 0, 2)), "identity": lambda c: nn.Identity(),
    "conv": lambda c: nn.Conv2d(c, c, 3, padding=1), "transposed": lambda c: nn.ConvTranspose2d(c, c, 3, padding=1),
    "dropout": lambda c: nn.Dropout(),
}  # fmt: skip


class Drawn(nn.Module):
    """Pieces one after the other. `keeps` are places whose input is added behind a later place, `adds`."""

    def __init__(self, pieces, keep, add, in_place):
        super().__init__()
        self.pieces = nn.ModuleList(PIECES[p](2) for p in pieces)
        self.keep, self.add, self.in_place = keep, add, in_place

    def forward(self, x):
        kept = x
        for i, piece in enumerate(self.pieces):
            if i == self.keep:
                kept = x
            x = piece(x)
            if i == self.add:
                if self.in_place:
                    x += kept
                else:
                    x = kept + x
        return x


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from([*PIECES, "conv", "norm"]), min_size=2, max_size=6), keep=st.integers(0, 3),
    add=st.integers(0, 6), in_place=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_chains(pieces, keep, add, in_place, seed, device):
    torch.manual_seed(seed)
    model = ready(Drawn(pieces, keep, add, in_place)).to(device)
    before, x = copy.deepcopy(model), torch.randn(1, 2, 3, 4, dtype=D, device=device)
    try:
        y = before(x.clone())
    except RuntimeError:  # a residual of another shape than what it is added to
        return
    was = attributes(model)
    tconv.fuse_(model, x)
    torch.testing.assert_close(model(x.clone()), y, rtol=1e-11, atol=1e-11)
    try:
        right = differentiated(before, x)
    except RuntimeError:  # a ReLU in place has written over what a gradient needs
        return
    for a, b in zip(differentiated(model, x), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    tconv.restore_(model)
    assert attributes(model) == was


def differentiated(model, x):
    """A model's gradients, for an input that is no leaf and so may be written into."""
    leaf = x.detach().clone().requires_grad_()
    y = model(leaf * 1)
    return torch.autograd.grad(y.square().sum(), [leaf, *(p for p in model.parameters() if p.requires_grad)], allow_unused=True)


@pytest.mark.parametrize("name", fusing.MODELS)
def test_whole_models_launch_and_move_less(name):
    # On meta tensors, planned for an H200. `python -m bench.fusing` compares their results too.
    build, _, shape = fusing.MODELS[name]
    model, x = build(True).eval().to("meta", torch.bfloat16), torch.empty(shape, device="meta", dtype=torch.bfloat16)
    tconv.replace_(model)
    fused = copy.deepcopy(model)
    fusion = tconv.fuse_(fused, x)
    left = [c.why for c in fusion.convolutions if not c.steps]
    assert {*left} <= {"followed by SeanetBlock", "what follows belongs to another convolution"}  # of a sum of two, one has it
    (before, _), (after, remain) = fusing.counted(model, x), fusing.counted(fused, x)
    assert before.launches - after.launches == sum(len(c.steps) for c in fusion.fused)  # each step was an operator
    assert after.bytes < before.bytes
    assert not {"constant_pad_nd", "native_batch_norm", "add", "relu_"} & remain.keys()
