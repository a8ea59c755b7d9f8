"""The pass that puts what follows a convolution in a compiled graph into its kernel: what it takes, and what it must leave."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tconv
from tconv import functional as TF
from tconv.dispatch.steps import SEQUENCE

TABLES = {"aten's operators": {}, "taken apart": select_decomp_table()}
W = torch.randn(4, 3, 2, 2)


def traced(function, *tensors, table=None):
    return make_fx(function, decomposition_table=table, tracing_mode="fake")(*tensors)


def convolved(after, *more):
    return lambda x, w, *tensors: after(TF.conv2d(x, w), *tensors, *more)


def fused(graph):
    """The operators of tconv's in a graph: names, or of `fused` what it does."""
    called = [n for n in graph.nodes if str(n.target).startswith("tconv.")]
    return [_does(n) if n.target is torch.ops.tconv.fused.default else n.target._opname for n in called]


def _does(node):
    _, _, _, residual, scale, shift, activation, slope, position, *_ = node.args
    steps = (
        ("scale", scale is not None),
        ("shift", shift is not None),
        ("residual", residual is not None and position == "before"),
    )
    after = ("residual", residual is not None and position == "after")
    return " ".join(n for n, there in (*steps, (f"{activation}{slope or ''}", activation), after) if there)


class Net(nn.Module):
    """Norms in evaluation, residuals before and after an activation, activations in place, a transposed layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = tconv.Conv2d(2, 4, 3, padding=1, bias=False), tconv.Conv2d(4, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(4), tconv.ConvTranspose2d(4, 3, 2, stride=2)
        for t in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(t)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.a(x)))
        z = F.relu(self.norm(self.b(y)) + y, inplace=True)
        z = F.silu(self.b(z)) + z
        return F.leaky_relu(self.c(z), 0.2)


# A norm that was not taken apart stays itself.
EXPECTED = {
    "aten's operators": ["fprop", "fprop", "silu residual", "leaky_relu0.2"],
    "taken apart": ["scale shift relu", "scale shift residual relu", "silu residual", "leaky_relu0.2"],
}


def compiler(seen, **how):
    def run(graph, _):
        tconv.fuse_epilogues(graph.graph, **how)
        graph.recompile()
        seen.append(fused(graph.graph))
        return graph

    return run


@pytest.mark.parametrize(("table", "dtype"), [*zip(TABLES, (torch.float64, torch.bfloat16), strict=True)], ids=TABLES)
def test_a_model_in_evaluation(table, dtype, device):
    torch._dynamo.reset()
    net, x, seen = Net().to(device, dtype).eval(), torch.randn(2, 2, 4, 5, device=device, dtype=dtype), []
    backend = aot_autograd(fw_compiler=compiler(seen), decompositions=TABLES[table])
    with torch.no_grad(), tconv.recording() as calls:
        y = torch.compile(net, backend=backend, fullgraph=True)(x)
        right = net.double()(x.double())
    assert seen == [EXPECTED[table]]
    assert all(c.ours for c in calls)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-2
    assert (y.double() - right).abs().max() <= tolerance * right.abs().max()


def test_inductor(device):
    torch._dynamo.reset()
    layer, x = tconv.Conv2d(2, 3, 2).to(device), torch.randn(2, 2, 4, 5, device=device)
    r = torch.randn(2, 3, 3, 4, device=device)
    compiled = torch.compile(lambda x, r: F.gelu(layer(x)) + r, options=tconv.compile_options(), fullgraph=True)
    with torch.no_grad(), tconv.recording() as calls:
        torch.testing.assert_close(compiled(x, r), F.gelu(layer(x)) + r)
    assert "with gelu, residual" in str(calls[0])
    assert (
        tconv.compile_options()["post_grad_custom_pre_pass"].uuid()
        != tconv.compile_options(True)["post_grad_custom_pre_pass"].uuid()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_every_activation_is_found(table, dtype, device):
    x, w = torch.randn(2, 3, 4, 4, device=device, dtype=dtype), W.to(device, dtype)
    for name, f in (
        *SEQUENCE.items(),
        ("silu", lambda v, _: v * torch.sigmoid(v)),
        ("leaky_relu", lambda v, _: F.leaky_relu(v)),
    ):
        for slope in (0.2, 1.5):
            graph = traced(convolved(f, slope), x, w, table=TABLES[table]).graph
            assert tconv.fuse_epilogues(graph) == 1
            assert fused(graph)[0].rstrip("0123456789.") == name
            (node,) = (n for n in graph.nodes if n.target is torch.ops.tconv.fused.default)
            if name == "leaky_relu" and f is SEQUENCE[name]:
                assert node.args[7] == slope


FOUND = {
    "a sum and a product per channel": (lambda y, c, r: (y - c) * c[None] + c, "scale shift"),
    "a residual on the left": (lambda y, c, r: r + y, "residual"),
    "one activation only": (lambda y, c, r: torch.tanh(torch.relu(y)), "relu"),
    "one residual only": (lambda y, c, r: y + r + r.sin(), "residual"),
    "no factor after a residual": (lambda y, c, r: (y + r) * c, "residual"),
    "two users": (lambda y, c, r: (torch.relu(y), y), None),
    "two users of what is between": (lambda y, c, r: (torch.relu(t := y * c), t.sin()), "scale"),
    "a user within an activation": (lambda y, c, r: (torch.sigmoid(y) * y, y), None),
    "not quite leaky_relu": (lambda y, c, r: torch.where(y > 1, y, y * 0.2), None),
    "not quite hardswish": (lambda y, c, r: y * (y + 2).clamp(0).clamp(max=6) / 6, None),
    "a number": (lambda y, c, r: y * 0.5, None),
    "a wider result": (lambda y, c, r: y + torch.ones(2, 2, 4, 3, 3), None),
    "a residual that is broadcast": (lambda y, c, r: y + r[:1], None),
    "a residual of another dtype": (lambda y, c, r: y + r.half(), None),
    "a factor per pixel": (lambda y, c, r: y * r[:1, :1], None),
    "the last dimension is no channel": (lambda y, c, r: y * torch.ones(3), None),
    "itself": (lambda y, c, r: y + y, None),
    "itself from the left": (lambda y, c, r: c - y, None),
    "other strides": (lambda y, c, r: y + r.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), "residual"),
    "alpha": (lambda y, c, r: torch.add(y, r, alpha=2), None),
    "another dtype": (lambda y, c, r: torch.relu(y).half(), "relu"),
}


@pytest.mark.parametrize(("after", "found"), FOUND.values(), ids=FOUND)
def test_what_is_taken_and_what_is_left(after, found, device):
    shapes = (2, 3, 4, 4), (4, 3, 2, 2), (4, 1, 1), (2, 4, 3, 3)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    module = traced(convolved(after), *tensors)
    assert tconv.fuse_epilogues(module.graph) == (found is not None)
    assert fused(module.graph) == [found or "fprop"]
    module.recompile()
    torch.testing.assert_close(module(*tensors), convolved(after)(*tensors))


def test_in_training_what_autograd_keeps_is_left(device):
    torch._dynamo.reset()
    layer, x, seen = tconv.Conv2d(2, 3, 2).to(device, torch.float64), torch.randn(2, 2, 4, 5, device=device).double(), []
    leaves = (x.requires_grad_(), *layer.parameters())
    backend = aot_autograd(fw_compiler=compiler(seen), bw_compiler=compiler(seen))
    for f, forward in ((F.relu, "relu"), (F.silu, "fprop")):
        found = []
        for step in (torch.compile(lambda x, f=f: f(layer(x)), backend=backend, fullgraph=True), lambda x, f=f: f(layer(x))):
            y = step(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        torch.testing.assert_close(*found)
        assert [forward] in seen


def test_stepwise_has_the_bits_of_the_graph(device):
    torch._dynamo.reset()
    layer, r = tconv.Conv2d(4, 6, 3, padding=1).to(device, torch.bfloat16), torch.randn(2, 6, 5, 6, device=device).bfloat16()
    x, seen = torch.randn(2, 4, 5, 6, device=device).bfloat16(), []
    with torch.no_grad():
        right = F.relu(layer(x) + r)
        for stepwise in (True, False):
            backend = aot_autograd(fw_compiler=compiler(seen, stepwise=stepwise))
            y = torch.compile(lambda x, r: F.relu(layer(x) + r), backend=backend, fullgraph=True)(x, r)
            assert torch.equal(y, right) is stepwise
    assert seen == [["residual relu"]] * 2


def test_a_copy_to_another_device_stays():
    with FakeTensorMode():
        x, w, r = torch.empty(2, 3, 4, 4, device="cuda:0"), torch.empty(4, 3, 2, 2, device="cuda:0"), torch.empty(2, 4, 3, 3)
        for after, found in ((lambda y, r: y + r.to("cuda:0"), "residual"), (lambda y, r: F.relu(y).cpu() + r, "relu")):
            graph = traced(convolved(after), x, w, r).graph
            assert tconv.fuse_epilogues(graph) == 1
            assert fused(graph) == [found]
            assert [n.target for n in graph.nodes].count(torch.ops.aten._to_copy.default) == 1


def test_symbolic_numbers_of_channels(device):
    def f(x, w, c, r):
        return F.silu((TF.conv2d(x, w) - c) * c + r)

    tensors = [torch.randn(shape, device=device) for shape in ((2, 3, 4, 5), (6, 3, 2, 2), (6, 1, 1), (2, 6, 3, 4))]
    module = make_fx(f, tracing_mode="symbolic")(*tensors)
    assert tconv.fuse_epilogues(module.graph) == 1
    assert fused(module.graph) == ["scale shift residual silu"]
    module.recompile()
    torch.testing.assert_close(module(*tensors), f(*tensors))
