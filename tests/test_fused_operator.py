"""A convolution with an epilogue as registered operators: graphs, opcheck, transforms, exports, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import tconv
from tconv import functional as TF
from tests import oracle
from tests.oracle import Case

FORWARD = Case("conv, groups, stride", (2, 4, 4, 3), 6, (2, 1), stride=2, padding=1, groups=2)
TRANSPOSED = Case("transposed", (2, 2, 3), 4, (3,), stride=2, output_padding=1, transposed=True)
WINDOW = (2, 2), (1, 1), (1, 1), (1, 1), 2  # of FORWARD
COMPILED = {
    "silu": (FORWARD, {"activation": "silu", "residual_position": "after"}),
    "silu, recomputed": (FORWARD, {"activation": "silu", "recompute": True}),
    "leaky_relu": (TRANSPOSED, {"activation": "leaky_relu", "negative_slope": 0.3}),
    "no activation": (TRANSPOSED, {}),
}


def setting(case, device, dtype=torch.float64):
    """tconv's function of x, w, b, residual, scale and shift, the same by torch, and the tensors."""
    x, w, b = oracle.tensors(case, dtype, device)
    name = f"conv{'_transpose' if case.transposed else ''}{case.rank}d"
    residual = torch.randn_like(getattr(F, name)(x, w, b, **case.arguments))
    scale, shift = torch.randn(case.k, device=device).to(dtype), torch.randn(case.k, device=device).to(dtype)

    def ours(x, w, b, residual, scale, shift, **how):
        return getattr(TF, name)(x, w, b, **case.arguments, residual=residual, scale=scale, shift=shift, **how)

    def torchs(x, w, b, residual, scale, shift, **how):
        from tconv.dispatch.steps import Steps, followed

        how.pop("recompute", None)
        steps = Steps(residual=residual, scale=scale, shift=shift, **how)
        return followed(getattr(F, name)(x, w, b, **case.arguments), steps, case.rank)

    return ours, torchs, [t.detach().requires_grad_() for t in (x, w, b, residual, scale, shift)]


def graphs(seen):
    """A backend that adds to a list the names of tconv's operators in each graph."""

    def compiler(graph, _):
        seen.append([n.target._opname for n in graph.graph.nodes if str(n.target).startswith("tconv.")])
        return graph

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize(("case", "how"), COMPILED.values(), ids=COMPILED)
def test_a_compiled_call_is_one_operator(case, how, device):
    torch._dynamo.reset()
    ours, torchs, leaves = setting(case, device)
    seen = []
    for wanted in (leaves, leaves[:4]):  # scale and shift with a gradient and without
        for t in leaves[4:]:
            t.requires_grad_(wanted is leaves)
        with tconv.recording() as calls:
            y = torch.compile(ours, backend=graphs(seen), fullgraph=True)(*leaves, **how)
            grads = torch.autograd.grad(y.square().sum(), wanted)
        assert all(c.ours for c in calls)
        right = torchs(*leaves, **how)
        torch.testing.assert_close((y, *grads), (right, *torch.autograd.grad(right.square().sum(), wanted)))
    forward, backward = seen[2:]
    assert forward == ["fused"]
    if "recompute" in how:
        assert backward.pop(0) == "fused"
    assert sorted(backward) == (
        ["dgrad", "epilogue_grad", "wgrad"] if not case.transposed else ["epilogue_grad", "fprop", "wgrad"]
    )


def test_a_compiled_layer_of_any_size_is_one_graph(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = tconv.FusedConv2d(4, 6, 3, padding=1, activation="gelu").to(device, torch.float64)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    compilations = 0
    for n, extent in ((2, 8), (3, 7), (5, 9)):  # none is the number of channels, which is fixed
        x = torch.randn(n, 4, extent, extent, dtype=torch.float64, device=device, requires_grad=True)
        residual = torch.randn(n, 6, extent, extent, dtype=torch.float64, device=device)
        found = []
        for f in (compiled, lambda x, r: F.gelu(F.conv2d(x, layer.weight, layer.bias, padding=1) + r)):
            y = f(x, residual)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
        torch.testing.assert_close(*found)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


def test_inductor(device):
    torch._dynamo.reset()
    ours, torchs, leaves = setting(FORWARD, device)
    leaves = [t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t.detach() for t in leaves]
    with tconv.recording() as calls:
        y = torch.compile(ours, backend="inductor", fullgraph=True)(*leaves, activation="relu")
    assert [c.operation for c in calls] == ["fprop"]
    right = torchs(*leaves, activation="relu")
    torch.testing.assert_close(y, right)
    assert y.stride() == right.stride()


def test_under_autocast_in_a_graph(device):
    torch._dynamo.reset()
    ours, torchs, leaves = setting(FORWARD, device, torch.float32)
    leaves[3] = leaves[3].detach().bfloat16().requires_grad_()

    def step(f):
        def run(*leaves):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                return f(*leaves, activation="silu")

        return run

    y, right = (f(*leaves) for f in (torch.compile(step(ours), backend="aot_eager", fullgraph=True), step(torchs)))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, right, rtol=3e-2, atol=3e-2)
    grads = [torch.autograd.grad(t.float().sum(), leaves) for t in (y, right)]
    assert [g.dtype for g in grads[0]] == [t.dtype for t in leaves]
    torch.testing.assert_close(*grads, rtol=5e-2, atol=1e-1)


@pytest.mark.parametrize("case", [FORWARD, TRANSPOSED], ids=str)
def test_operators_check(case, device):
    x, w, b, residual, scale, shift = setting(case, device)[2]
    n = case.rank
    after = [case.padding - m if case.transposed else case.padding for m in (case.output_padding,)] * n
    window = (case.stride,) * n, (case.padding,) * n, after, (1,) * n, case.groups
    kept = not case.transposed
    how = "silu", 0.0, "before", False, kept, case.transposed
    torch.library.opcheck(torch.ops.tconv.fused.default, (x, w, b, residual, scale, shift, *how, *window))
    tensors = [t.detach() for t in (residual.cos(), x, w, residual, scale)]
    how = "silu", 0.0, "before", kept, kept, case.transposed
    torch.library.opcheck(torch.ops.tconv.epilogue_grad.default, (*tensors, *how, *window))
    tensors[0].requires_grad_()
    du = torch.ops.tconv.epilogue_grad(*tensors, *how, *window)[0]
    (second,) = torch.autograd.grad(du.sum(), tensors[0])  # linear in the gradient of the result
    torch.testing.assert_close((second * tensors[0]).sum(), du.sum())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transforms_take_it_apart(compiled, device):
    torch._dynamo.reset()
    ours, torchs, leaves = setting(FORWARD, device)
    x, w, b, residual, scale, shift = (t.detach() for t in leaves)

    def per_sample(f):
        def loss(w, scale, x, residual):
            return f(x[None], w, b, residual[None], scale, shift, activation="silu").square().sum()

        return lambda: torch.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))(w, scale, x, residual)

    run = per_sample(ours)
    with tconv.recording() as calls:
        got = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)()
    torch.testing.assert_close(got, per_sample(torchs)())
    assert compiled or "inside a functorch transform" in " ".join(map(str, calls))


NAMES = "x", "w", "b", "residual", "scale", "shift"


@pytest.mark.parametrize("case", [FORWARD, TRANSPOSED], ids=str)
@pytest.mark.parametrize("batched", ["residual", "w", "w b", "scale", "x residual", "w residual shift"])
def test_vmap_over_some_of_the_tensors(batched, case, device):
    """As many calls as there are samples, each by the kernels; with a residual before or after the activation."""
    ours, _, leaves = setting(case, device)
    tensors = [torch.stack([t, t.sin(), t.cos()], 1) if n in batched.split() else t for n, t in zip(NAMES, leaves, strict=True)]
    dims = tuple(1 if n in batched.split() else None for n in NAMES)
    for position in ("before", "after"):
        how = {"activation": "silu", "residual_position": position}
        with tconv.recording() as calls:
            found = torch.vmap(lambda *t, how=how: ours(*t, **how), dims)(*tensors)
        assert "inside a functorch transform" in " ".join(map(str, calls))
        assert all(c.ours for c in calls if c.problem is not None)
        for i in range(3):
            one = [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
            torch.testing.assert_close(found[i], ours(*one, **how))


@pytest.mark.parametrize("case", [FORWARD, TRANSPOSED], ids=str)
def test_derivatives_of_functorch(case, device):
    """Forward mode, reverse mode, and one over the other, in every tensor."""
    ours, torchs, leaves = setting(case, device)
    leaves = tuple(t.detach() for t in leaves)
    found = []
    for f in (ours, torchs):
        step = lambda *t, f=f: f(*t, activation="gelu").square().sum()  # noqa: E731
        gradients = torch.func.grad(step, tuple(range(6)))
        tangents = tuple(t.sin() for t in leaves)
        found.append((gradients(*leaves), torch.func.jvp(step, leaves, tangents), torch.func.jvp(gradients, leaves, tangents)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("batched", [(0, None, None), (None, 1, None), (0, 0, 0)], ids=str)
def test_vmap_of_the_operator(batched, device):
    """By its rule, which a mode that calls the operator reaches."""
    x, w, b, residual, scale, shift = (t.detach() for t in setting(FORWARD, device)[2])

    def run(x, w, residual):
        how = "relu", 0.0, "after", False, True, False
        return torch.ops.tconv.fused(x, w, b, residual, scale, shift, *how, *WINDOW)

    tensors = [t if d is None else torch.stack([t, t.sin()], d) for t, d in zip((x, w, residual), batched, strict=True)]
    got = torch.vmap(run, batched)(*tensors)
    for i in range(2):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, batched, strict=True)]
        torch.testing.assert_close(tuple(t[i] for t in got), run(*one))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = tconv.FusedConv2d(4, 4, 3, padding=1, activation="hardswish")

        def forward(self, x):
            return self.layer(x, residual=x)

    net, x = Net().to(device), torch.randn(2, 4, 5, 6, device=device)
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=strict)
    named = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [n for n in named if n.startswith("tconv.")] == ["tconv.fused.default"]
    right = F.hardswish(F.conv2d(x, net.layer.weight, net.layer.bias, padding=1) + x)
    torch.testing.assert_close(program.module()(x), right)
    taken = program.run_decompositions()
    assert not [n for n in taken.graph.nodes if str(n.target).startswith("tconv.")]
    torch.testing.assert_close(taken.module()(x), right)


def test_modes_see_the_operators(device):
    from torch.utils.flop_counter import FlopCounterMode

    ours, _, leaves = setting(FORWARD, device)

    def step(*leaves):
        y = ours(*leaves, activation="gelu")
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    with FlopCounterMode(display=False) as counter:
        right = step(*leaves)
    y, w = right[0], leaves[1]
    assert counter.get_total_flops() == 3 * 2 * y.numel() * w[0].numel()
    graph = make_fx(step, tracing_mode="fake")(*leaves)
    named = {n.target._opname for n in graph.graph.nodes if str(n.target).startswith("tconv.")}
    assert named == {"fused", "epilogue_grad", "dgrad", "wgrad"}
    torch.testing.assert_close(graph(*leaves), right)


def test_a_traced_call_is_one_operator(device):
    ours, torchs, leaves = setting(FORWARD, device)
    leaves = tuple(t.detach() for t in leaves)
    traced = torch.jit.trace(lambda *t: ours(*t, activation="tanh"), leaves, check_trace=False)
    with tconv.recording() as calls:
        torch.testing.assert_close(traced(*leaves), torchs(*leaves, activation="tanh"))
    assert [(c.operation, c.ours) for c in calls] == [("fprop", True)]


@pytest.mark.parametrize("bad", ["residual", "scale", "dtype"])
def test_bad_tensors_in_a_graph_and_in_an_operator(bad, device):
    torch._dynamo.reset()
    ours, _, leaves = setting(FORWARD, device, torch.float32)
    x, w, b, residual, scale, shift = (t.detach() for t in leaves)
    residual = residual[..., :1] if bad == "residual" else residual
    scale = {"scale": scale[:2], "dtype": scale.half()}.get(bad, scale)
    with pytest.raises(Exception, match="residual must have shape" if bad == "residual" else "scale must"):
        torch.compile(ours, backend="eager", fullgraph=True)(x, w, b, residual, scale, shift)
    how = "", 0.0, "before", False, False, False
    with pytest.raises(ValueError, match="residual must have shape" if bad == "residual" else "scale must"):
        torch.ops.tconv.fused(x, w, b, residual, scale, shift, *how, *WINDOW)


def test_the_operators_fall_back_as_the_convolutions_do(device):
    """Without elements no kernel runs; results and gradients are torch's."""
    x = torch.randn(0, 4, 5, 4, device=device, requires_grad=True)
    w = torch.randn(6, 4, 3, 3, device=device, requires_grad=True)
    how = "silu", 0.0, "before", False, True, False
    with tconv.recording() as calls:
        y, v = torch.ops.tconv.fused(x, w, None, None, None, None, *how, (1, 1), (1, 1), (1, 1), (1, 1), 1)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == v.shape == (0, 6, 5, 4)
    assert (dx.shape, dw.abs().sum()) == (x.shape, 0)
    assert not any(c.ours for c in calls)
