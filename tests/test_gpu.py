"""What only a GPU can show: the same cases at real sizes, 2^31 elements for real, CUDA graphs, streams, devices.

A dry run (`--tiny`, scripts/gpu.sh --dry-run) takes the real layers through the same code, shrunk for the interpreter.
"""

import contextlib
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import functional as TF
from tconv.launching import compiled, launch, self_check
from tconv.planning.device import cuda_device
from tconv.planning.tiles import Tile
from tests import cases, oracle
from tests.test_kernels import DTYPES, check, ours

pytestmark = pytest.mark.gpu

REAL = [
    oracle.Case("ResNet 3x3", (8, 64, 56, 56), 64, (3, 3), padding=1),
    oracle.Case("ResNet stem, three channels", (8, 3, 224, 224), 64, (7, 7), stride=2, padding=3),
    oracle.Case("late layer, 7x7 pixels", (8, 512, 7, 7), 512, (3, 3), padding=1),
    oracle.Case("channels no multiple of eight", (4, 100, 29, 31), 75, (3, 3), padding=1),
    oracle.Case("patch embedding", (8, 3, 224, 224), 768, (16, 16), stride=16),
    oracle.Case("ResNeXt groups", (8, 128, 56, 56), 128, (3, 3), padding=1, groups=32),
    oracle.Case("ConvNeXt depthwise 7x7", (8, 128, 56, 56), 128, (7, 7), padding=3, groups=128),
    oracle.Case("MobileNet strided depthwise", (8, 72, 56, 56), 72, (5, 5), stride=2, padding=2, groups=72),
    oracle.Case("ASPP dilation", (2, 256, 65, 65), 256, (3, 3), padding=12, dilation=12),
    oracle.Case("DCGAN generator", (8, 512, 8, 8), 256, (4, 4), stride=2, padding=1, transposed=True),
    oracle.Case("HiFi-GAN upsampling", (2, 256, 800), 128, (16,), stride=8, padding=4, transposed=True),
    oracle.Case("3-D U-Net", (1, 32, 48, 48, 48), 32, (3, 3, 3), padding=1),
    oracle.Case("3-D upsampling", (1, 64, 24, 24, 24), 32, (2, 2, 2), stride=2, transposed=True),
    oracle.Case("1-D depthwise", (4, 256, 2048), 256, (4,), padding=3, groups=256),
]


@pytest.mark.parametrize("groups", [1, 64], ids=["dense", "depthwise"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(channels_last, groups, device):
    """Images beyond the 32-bit mark agree with the same images alone, gradients included: only they have one."""
    n = 2**31 // (64 * 256 * 256) + 2
    x = torch.randn(n, 64, 256, 256, device=device, dtype=torch.bfloat16)
    w = torch.randn(64, 64 // groups, 3, 3, device=device, dtype=torch.bfloat16)
    b = torch.randn(64, device=device, dtype=torch.bfloat16)
    if channels_last:
        x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    results = []
    for images in (x, x[-1:].clone(memory_format=torch.preserve_format)):
        leaves = [t.detach().requires_grad_() for t in (images, w, b)]
        y = TF.conv2d(*leaves, padding=1, groups=groups)
        y[-1].sum().backward()
        results.append([y.detach()[-1:], *(t.grad for t in leaves)])
    (y, dx, dw, db), (y1, dx1, dw1, db1) = results
    assert torch.equal(y, y1)
    assert torch.equal(dx[-1:], dx1)
    assert not dx[:-1].any()
    for all_images, alone in ((dw, dw1), (db, db1)):  # added in another order
        torch.testing.assert_close(all_images, alone, rtol=2e-2, atol=2e-2 * alone.abs().max().item())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", REAL, ids=str)
def test_two_hundred_runs_give_the_same_bits(case, channels_last, device):
    """A race between copies into shared memory and the products that read it would show as bits that change."""
    x, w, b = oracle.tensors(case, torch.bfloat16, device, channels_last)
    first = oracle.run(ours(case), case, x, w, b)
    changed = torch.zeros(len(first), dtype=torch.int64, device=device)
    for _ in range(199):
        again = oracle.run(ours(case), case, x, w, b)
        changed += torch.stack([(a != f).any() for a, f in zip(again, first, strict=True)])
    assert not changed.any(), f"of 199 runs changed, in y, dx, dw, db: {changed.tolist()}"


@pytest.mark.parametrize("way", ["layer", "enable"])
def test_cuda_graph(way, device):
    layer = (tconv if way == "layer" else torch.nn).Conv2d(64, 64, 3, padding=1).to(device, torch.bfloat16)
    with tconv.recording() as calls, tconv.enabled() if way == "enable" else contextlib.nullcontext():
        capture(layer, device)
    assert calls
    assert all(call.ours for call in calls)


def capture(layer, device):
    """A layer's graph, forward and backward, gives the same bits as its calls."""
    x = torch.randn(8, 64, 28, 28, device=device, dtype=torch.bfloat16, requires_grad=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compile before capture
        layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    grads = x.grad.clone(), layer.weight.grad.clone()
    x.grad, layer.weight.grad = None, None
    again = layer(x)
    again.sum().backward()
    assert torch.equal(y, again)
    assert torch.equal(grads[0], x.grad)
    assert torch.equal(grads[1], layer.weight.grad)


def test_a_capture_of_what_is_not_compiled_is_left_to_torch(device):
    x = torch.randn(2, 24, 9, 9, device=device, dtype=torch.float16)
    layer = tconv.Conv2d(24, 40, 3, groups=8, padding=1).to(device, torch.float16).requires_grad_(False)
    torch.nn.functional.conv2d(x, layer.weight, layer.bias, 1, 1, 1, 8)  # cuDNN's own first call
    torch.cuda.synchronize()
    launch._prepared.clear()
    known, compiled._known = compiled._known, set()
    graph = torch.cuda.CUDAGraph()
    try:
        with tconv.recording() as calls, warnings.catch_warnings(), torch.cuda.graph(graph):
            warnings.simplefilter("ignore")
            y = layer(x)
    finally:
        compiled._known = known
    assert [(c.ours, c.reason) for c in calls] == [(False, compiled.REASON)]
    graph.replay()
    torch.testing.assert_close(y, layer(x), rtol=1e-2, atol=1e-2)


def test_what_was_precompiled_is_captured_without_a_call(device):
    layer = tconv.Conv2d(48, 72, 5, padding=2).to(device, torch.float16)
    x = torch.randn(4, 48, 15, 15, device=device, dtype=torch.float16, requires_grad=True)
    done = tconv.precompile(layer, x, progress=False)
    assert done.compiled + done.found >= 4
    assert not done.failed
    graph = torch.cuda.CUDAGraph()
    with tconv.recording() as calls, torch.cuda.graph(graph):
        y = layer(x)
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), torch.ones_like(y))
    assert [c.ours for c in calls] == [True] * 4
    graph.replay()
    again = layer(x)
    assert torch.equal(y, again)
    for got, right in zip(grads, torch.autograd.grad(again, (x, layer.weight, layer.bias), torch.ones_like(y)), strict=True):
        assert torch.equal(got, right)


def test_precompile_leaves_the_statistics_of_a_batch_norm(device):
    model = torch.nn.Sequential(tconv.Conv2d(16, 24, 3), torch.nn.BatchNorm2d(24)).to(device)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not tconv.precompile(model, torch.randn(2, 16, 9, 9, device=device), progress=False).failed
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_direct_launches_give_the_bits_of_tritons_own(device):
    layer = tconv.Conv2d(16, 32, 3).to(device)
    x = torch.randn(2, 16, 20, 20, device=device)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))  # the second is direct
        flat = torch.randn(x.numel() + 1, device=device)[1:].view_as(x)  # addresses that are not aligned
        torch.testing.assert_close(layer(flat), layer(flat.clone()), rtol=1e-2, atol=1e-2)
        assert torch.equal(layer(flat), layer(flat))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    layers = [tconv.Conv2d(8, 16, 3).to(f"cuda:{i}") for i in (0, 1)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 8, 12, 12)
    results = [[layer(x.to(f"cuda:{i}")).cpu() for i, layer in enumerate(layers)] for _ in range(3)]
    assert all(torch.equal(y, results[0][0]) for row in results for y in row)


def test_two_streams(device):
    x = torch.randn(8, 64, 56, 56, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(64, 64, 3, 3, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = TF.conv2d(x, w, padding=1)
        return y.detach(), *torch.autograd.grad(y, (x, w), y)

    right = step()
    torch.cuda.synchronize()
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results += [step() for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(got, t) for result in results for got, t in zip(result, right, strict=True))


def tiny(case):
    """A case with at most 8 channels a group, 4 groups, 5 taps a dimension and few pixels."""
    n, c, *extents = case.x
    groups = min(case.groups, 4)
    c, k = (groups * min(v // case.groups, 8) for v in (c, case.k))
    kernel = tuple(min(t, 5) for t in case.kernel)
    extents = [min(e, 4 * case.dilation + 3) for e in extents]
    padding = min(case.padding, 2 * case.dilation)
    return dataclasses.replace(case, x=(min(n, 2), c, *extents), k=k, kernel=kernel, padding=padding, groups=groups)


@pytest.mark.gpu(shrinks=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_sizes(case, dtype, channels_last, device, poisoned, pytestconfig):
    case = tiny(case) if pytestconfig.getoption("--tiny", False) else case
    check(case, *oracle.tensors(case, dtype, device, channels_last))


@pytest.mark.parametrize("case", cases.ALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_case_in_bf16(case, channels_last, device, poisoned):
    check(case, *oracle.tensors(case, torch.bfloat16, device, channels_last))


def test_true_fp32_is_as_accurate_as_eager(device, poisoned):
    case = REAL[0]
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        check(case, *oracle.tensors(case, torch.float32, device), eager_too=True)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_one_compilation_serves_layers_of_any_geometry(device):
    from tconv.kernels.gather import gather

    def conv(n, c, k, extent, taps, **parameters):
        x = torch.randn(n, c, extent, extent, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        w = torch.randn(k, c, taps, taps, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        # One split: with several, a plan's result is a workspace of another dtype, and the kernel another.
        with tconv.force(kernel="gather", tile=Tile(64, 64, 64, 4, 4), splits=1):
            TF.conv2d(x, w, **parameters)

    conv(1, 64, 64, 8, 3)
    before = sum(len(cache[0]) for cache in gather.device_caches.values())
    conv(2, 128, 192, 17, 1, stride=2)
    conv(3, 256, 64, 33, 5, padding=3, dilation=2)
    assert sum(len(cache[0]) for cache in gather.device_caches.values()) == before


@pytest.mark.parametrize("mechanism", self_check.TOLERANCE)
def test_mechanisms_of_hopper_pass_their_check(mechanism, device):
    known = torch.device("cuda", torch.cuda.current_device())
    planned = cuda_device(known.index)
    if planned.generation != 9:
        pytest.skip("they are chosen on Hopper only")
    assert self_check.works_on(known, planned, mechanism)


def test_mixed_devices_raise_as_torch(device):
    x, w = torch.randn(1, 2, 5, 5, device=device), torch.randn(2, 2, 3, 3)
    with pytest.raises(RuntimeError) as right:
        F.conv2d(x, w)
    with pytest.raises(RuntimeError) as ours:
        TF.conv2d(x, w)
    assert str(ours.value) == str(right.value)
