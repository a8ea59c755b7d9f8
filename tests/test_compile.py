"""torch.compile, export and tracing: whole graphs that hold our operators, and what the layers give without them."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import tconv

LAYERS = {
    "conv": lambda: tconv.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "transposed": lambda: tconv.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
    "1-D, same": lambda: tconv.Conv1d(4, 6, 2, padding="same"),
}


@pytest.fixture(params=LAYERS)
def layer(request, device):
    torch._dynamo.reset()
    return LAYERS[request.param]().to(device, torch.float64)


def inputs(layer, n=2, extent=6):
    shape = (n, 4, *(extent,) * len(layer.kernel_size))
    return torch.randn(shape, dtype=torch.float64, device=layer.weight.device)


def torchs(layer, x):
    """The layer by torch's own class, and gradients."""
    x = x.detach().clone().requires_grad_()
    w, b = (t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias))
    parameters = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    if isinstance(layer, tconv.ConvTranspose2d):
        y = F.conv_transpose2d(x, w, b, output_padding=layer.output_padding, **parameters)
    else:
        y = getattr(F, f"conv{len(layer.kernel_size)}d")(x, w, b, **parameters)
    return y, *torch.autograd.grad(y.square().sum(), (x, w, b))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(layer, backend, device):
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = inputs(layer).requires_grad_()
    right = torchs(layer, x)
    with tconv.recording() as calls:
        y = compiled(x)
        grads = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))
    assert sorted(c.operation for c in calls if c.ours) == ["dgrad", "fprop", "wgrad"]
    torch.testing.assert_close((y, *grads), right)
    assert y.stride() == right[0].stride()


def test_sizes_do_not_recompile(layer):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for n, extent in ((2, 6), (3, 7), (5, 9), (4, 12)):
        x = inputs(layer, n, extent).requires_grad_()
        y = compiled(x)
        torch.testing.assert_close((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))), torchs(layer, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(layer, strict):
    x = inputs(layer)
    dynamic = ({0: torch.export.Dim("n", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes=dynamic)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = inputs(layer, 5)
    with tconv.recording() as calls:
        y = torch.export.load(file).module()(x)
    assert [c.ours for c in calls] == [True]
    torch.testing.assert_close(y, torchs(layer, x)[0])


def test_jit_trace(layer):
    traced = torch.jit.trace(layer, inputs(layer), check_trace=False)
    x = inputs(layer, 3, 7)
    with tconv.recording() as calls:
        y = traced(x)
    assert [c.ours for c in calls] == [True]
    torch.testing.assert_close(y, torchs(layer, x)[0])


def test_autocast_inside_a_graph(layer, device):
    layer = layer.float()
    x = inputs(layer).float()

    def step(x):
        with torch.autocast(device, torch.bfloat16):
            return layer(x)

    with tconv.recording() as calls:
        y = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
        y.float().sum().backward()
    assert sorted(c.operation for c in calls if c.ours) == ["fprop", "wgrad"] or layer.transposed
    assert all(c.ours for c in calls)
    assert (y.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, step(x))


def test_compiled_per_sample_gradients(layer):
    from torch.func import functional_call, grad, vmap

    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def per_sample(x):
        return vmap(grad(lambda p, x: functional_call(layer, p, (x[None],)).square().sum()), (None, 0))(parameters, x)

    x = inputs(layer)
    torch.testing.assert_close(torch.compile(per_sample, backend="aot_eager", fullgraph=True)(x), per_sample(x))
