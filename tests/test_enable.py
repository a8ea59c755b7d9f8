"""The override: every way in which torch may come to a convolution ends in our kernels, gives torch's results, and leaves
torch as it was."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tconv
from tconv import override
from tests import oracle, parity
from tests.contexts import CONTEXTS, GRAPHS, Kept, conv, losses, same, small, tensors
from tests.test_launch import outside

F64 = torch.float64


@pytest.fixture(autouse=True)
def _restored():
    yield
    assert not tconv.is_enabled()
    assert not overridden()


def overridden() -> bool:
    key = "CUDA" if torch.cuda.is_available() else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_convolution", key)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name, device, poisoned):
    context = CONTEXTS[name]
    expected = context(*tensors(device))
    with tconv.enabled(), tconv.recording() as calls:
        got = context(*tensors(device))
    same(got, expected)
    assert calls
    assert all(call.ours for call in calls), [str(call) for call in calls if not call.ours]


# --- graphs ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_made_before_follow(name, device):
    """Nothing is compiled anew: the operator in the graph is torch's, and the formats it was told, which it checks, hold."""
    torch._dynamo.reset()
    x = small(device).to(memory_format=torch.channels_last).requires_grad_()
    graph = GRAPHS[name](device)

    def run():
        y = graph(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *graph.parameters()))

    expected = run()
    frames = torch._dynamo.utils.counters["frames"]["total"]
    with tconv.enabled(), tconv.recording() as calls:
        got = run()
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
    same(got, expected)
    assert len(calls) >= 5 + 2 * 5  # and biases' and, in a "same" with an even kernel, no more
    assert all(call.ours for call in calls)
    with tconv.recording() as calls:
        again = run()
    assert calls == []
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))


def test_compiled_autograd(device):
    """A backward pass traced with torch's operator in it."""
    torch._dynamo.reset()
    leaves = tensors(device)
    expected = losses(conv)(*leaves)[1:]
    by = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))
    with tconv.enabled(), tconv.recording() as calls, by:
        conv(*leaves).square().sum().backward()
    same([t.grad for t in leaves], list(expected))
    parity.assert_ours(calls, "fprop", "dgrad", "wgrad", "bias")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "inductor"])  # costs seconds, and traces as aot_eager
def test_graphs_made_under_it_are_torchs(name, device):
    torch._dynamo.reset()
    x = small(device)
    with tconv.enabled():
        graph = GRAPHS[name](device)
        with tconv.recording() as calls:
            under = graph(x)
    assert calls
    assert all(call.ours for call in calls)
    with tconv.recording() as calls:
        same(graph(x), under)
    assert calls == []


# --- kinds of calls ---


CASES = [
    oracle.Case("uneven groups, strided, an end unread", (2, 4, 6, 5), 6, (3, 2), stride=2, groups=2),
    oracle.Case("transposed, uneven groups", (2, 4, 3, 2), 6, (3, 2), stride=2, groups=2, output_padding=1, transposed=True),
    oracle.Case("same, even kernel", (1, 2, 5), 3, (4,), padding="same", dilation=3),
    oracle.Case("depthwise 3-D", (1, 2, 3, 4, 3), 4, (2, 3, 1), padding=1, groups=2),
]
BY_NAME = {"forward": CASES[0], "transposed": CASES[1]}


def function(case):
    return (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]


FORMATS = [
    *((case, torch.float32, channels_last) for case in CASES for channels_last in (False, True)),
    (CASES[0], F64, True),  # contiguous on CUDA
    (CASES[1], torch.bfloat16, True),
    (CASES[2], torch.float16, True),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("case", "dtype", "channels_last"), FORMATS, ids=str)
def test_results_and_formats(case, dtype, channels_last, device, poisoned):
    given = oracle.tensors(case, dtype, device, channels_last)
    expected = oracle.run(function(case), case, *given)
    with tconv.enabled(), tconv.recording() as calls:
        got = oracle.run(function(case), case, *given)
    same(got, expected)
    forward, back = ("dgrad", "fprop") if case.transposed else ("fprop", "dgrad")
    parity.assert_ours(calls, forward, back, "wgrad", "bias")


@pytest.mark.parametrize(
    "needs", [(False, False, False), (True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("name", BY_NAME)
def test_only_what_is_asked_for(name, needs, device):
    case = BY_NAME[name]
    leaves = [t.requires_grad_(n) for t, n in zip(oracle.tensors(case, torch.float32, device), needs, strict=True)]
    with tconv.enabled(), tconv.recording() as calls:
        y = function(case)(*leaves, **case.arguments)
        if any(needs):
            y.sum().backward()
    forward, back = ("dgrad", "fprop") if case.transposed else ("fprop", "dgrad")
    parity.assert_ours(calls, forward, *(p for p, n in zip((back, "wgrad", "bias"), needs, strict=True) if n))
    assert [t.grad is not None for t in leaves] == list(needs)


def test_the_operators_called_directly(device):
    """Parameters given once for all dimensions, unread arguments, and what does not fit, which torch refuses itself."""
    aten = torch.ops.aten
    x, w, b = (t.detach() for t in tensors(device))
    dy = torch.ones_like(conv(x, w))
    sound = (dy, x, w, [6], (2, 1), (1, 1), (1, 1), False, (0, 0), 2)
    masks = list(itertools.product((False, True), repeat=3))

    def calls():
        yield lambda: aten.convolution(x, w, b, [2], [1], [1], False, [0], 2)
        yield lambda: aten._convolution(x, w, b, [2], [1], [1], False, [0], 2, True, True, False, True)
        yield lambda: aten._convolution(x, w, None, [2, 1], [1, 0], [1, 1], True, [1, 0], 1, False, False, True, True)
        for mask in masks:
            yield lambda mask=mask: aten.convolution_backward(*sound, mask)
        yield lambda: aten.convolution_backward(*sound[:3], None, *sound[4:], (True, True, False))
        yield lambda: aten.convolution_backward(dy[..., :2], *sound[1:], (True, True, True))
        yield lambda: aten.convolution_backward(dy.float(), *sound[1:], (True, True, True))
        yield lambda: aten.convolution(x[0], w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 2)
        yield lambda: aten.convolution(x, w, b, [1, 1, 1], [0, 0], [1, 1], False, [0, 0], 2)
        yield lambda: aten.convolution(x, w, b[:5], [1, 1], [0, 0], [1, 1], False, [0, 0], 2)
        yield lambda: aten.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 0)

    for call in calls():
        expected = parity.outcome(call)
        with tconv.enabled():
            got = parity.outcome(call)
        if isinstance(expected, tuple) and isinstance(expected[0], type):
            assert got == expected
        else:
            same(got, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float32], ids=str)
def test_what_is_left_to_torch(dtype, device):
    """With torch's own kernels for it, backward included, and recorded."""
    if dtype == torch.int32 and device != "cpu":
        pytest.skip("torch convolves integers on the CPU only")
    empty = (0,) if dtype == torch.float32 else (2,)
    x, w = torch.ones(*empty, 4, 5, 5, dtype=dtype, device=device), torch.ones(6, 4, 3, 3, dtype=dtype, device=device)
    x.requires_grad_(dtype.is_floating_point)
    with tconv.enabled(), tconv.recording() as calls:
        y = F.conv2d(x, w)
        if x.requires_grad:
            y.sum().backward()
            assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(y, F.conv2d(x, w))
    operators = ["aten::_convolution", *(["aten::convolution_backward"] if x.requires_grad else [])]
    if dtype != torch.complex64:  # of which torch makes three real convolutions, and those are ours
        assert [call.operation for call in calls] == operators
    else:
        assert all(call.ours for call in calls)
        operators = []
    reason = "a tensor without elements" if x.requires_grad else f"dtype {dtype}"
    assert all(call.reason == reason for call in calls if operators)


def test_other_devices_and_tensors_never_get_here(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    with tconv.enabled(), tconv.recording() as calls:
        assert layer.to("meta")(x.to("meta")).shape == (2, 6, 3, 3)
        with FakeTensorMode() as mode:
            fake = F.conv2d(mode.from_tensor(x), mode.from_tensor(torch.ones(6, 4, 3, 3)))
        assert fake.shape == (2, 6, 3, 3)
        if device == "cpu":
            q = torch.quantize_per_tensor(x, 0.1, 8, torch.quint8)
            m = torch.ao.nn.quantized.Conv2d(4, 6, 3)
            assert m(q).shape == (2, 6, 3, 3)
    assert calls == []


def test_mixed_devices_and_dtypes_raise_torchs_error(device):
    x, w, b = (t.detach() for t in tensors(device))
    mixed = [(x, w.float()), (x, w, b.float()), (x.half(), w), (x, w.int())]
    if device != "cpu":
        mixed += [(x, w.cpu()), (x.cpu(), w), (x, w, b.cpu())]
    for args in mixed:
        expected = parity.outcome(lambda args=args: conv(*args))
        assert isinstance(expected[0], type)
        with tconv.enabled():
            assert parity.outcome(lambda args=args: conv(*args)) == expected


def test_flags(device, own_record):
    """No cuDNN is used and the same bits come every time; only a traced graph's TF32 may be other than the setting."""
    x, w, b = (t.detach().float() for t in tensors(device))
    expected = conv(x, w, b)
    benchmark = {"benchmark": device == "cpu"}  # on a GPU it measures, and torch may be faster
    for flags in ({"enabled": False}, benchmark, {"deterministic": True}, {"allow_tf32": False}):
        with torch.backends.cudnn.flags(**flags), tconv.enabled(), tconv.recording() as calls:
            parity.assert_same(conv(x, w, b), expected)
        parity.assert_ours(calls, "fprop")
    tf32 = torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"
    with tconv.enabled(), tconv.recording() as calls:
        args = (x, w, b, (2, 1), (1, 1), (1, 1), False, (0, 0), 2, False, False, True)
        for allow in (tf32, not tf32):
            parity.assert_same(torch.ops.aten._convolution(*args, allow), expected)
    assert [call.ours for call in calls] == [True, False]
    assert "allow_tf32" in calls[1].reason


def test_explicit_layers_and_the_override(device):
    """Where a layer of tconv's falls back to torch, the override takes the call."""
    layer, x = tconv.Conv2d(4, 6, 3).to(device), torch.randn(2, 4, 5, 5, device=device)
    with tconv.enabled(), tconv.recording() as calls:
        y = layer(x.as_subclass(Kept))
    parity.assert_same(y.as_subclass(torch.Tensor), layer(x))
    assert [call.operation for call in calls] == ["conv2d", "fprop"]
    assert [call.ours for call in calls] == [False, True]


def test_explain_sees_torchs_layers_under_it(device, monkeypatch):
    layer, x = nn.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    parity.forbid_launches(monkeypatch, pytest.fail.Exception("a kernel was launched"))

    def alone(x):
        assert not torch._C._is_multithreading_enabled()  # else a GPU's backward would be another thread's, and not dry
        return layer(x)

    with tconv.enabled():
        assert tconv.explain(alone, x).ours
        explanation = tconv.explain(layer, x)
    assert torch._C._is_multithreading_enabled()
    assert explanation.ours
    assert sorted(call.operation for call in explanation.calls) == ["bias", "dgrad", "fprop", "wgrad"]


def test_a_forced_plan_is_used_or_raises(device):
    x, w, b = (t.detach() for t in tensors(device))
    conv(x, w, b)
    with tconv.enabled(), tconv.recording() as calls:
        with tconv.force(kernel="gather"):
            conv(x, w, b)
        with tconv.force(kernel="depthwise"), pytest.raises(ValueError, match="forced kernel"):
            conv(x, w, b)
    assert [call.plan.kernel for call in calls] == ["gather"]


# --- on and off ---


def test_nests_and_restores(device):
    x, w, b = tensors(device)
    ours = []
    for step in (None, tconv.enable, tconv.enable, tconv.enable, tconv.disable, tconv.disable, tconv.disable):
        if step:
            step()
        with tconv.recording() as calls:
            conv(x, w, b)
        ours.append(len(calls))
    assert ours == [0, 1, 1, 1, 1, 1, 0]


def test_disable_without_enable_raises():
    with pytest.raises(RuntimeError, match=r"tconv\.disable\(\) without a tconv\.enable\(\)"):
        tconv.disable()
    with tconv.enabled():
        pass
    with pytest.raises(RuntimeError, match="without"):
        tconv.disable()
    with tconv.enabled():
        with pytest.raises(RuntimeError, match="without"):  # the block may be another thread's
            tconv.disable()
        assert tconv.is_enabled()


def test_a_block_that_raises_restores():
    with pytest.raises(KeyError), tconv.enabled(), tconv.enabled():
        raise KeyError
    assert not overridden()


def test_a_backward_follows_what_holds_when_it_runs(device):
    x, w, b = tensors(device)
    with tconv.enabled():
        y = conv(x, w, b).sum()
    with tconv.recording() as calls:
        y.backward(retain_graph=True)
    assert calls == []
    y = conv(x, w, b).sum()
    with tconv.enabled(), tconv.recording() as calls:
        y.backward()
    parity.assert_ours(calls, "dgrad", "wgrad", "bias")


# --- threads and processes ---


def test_threads(device):
    """Forward and backward, in threads that know nothing of it."""
    results = []

    def work():
        results.append(losses(conv)(*tensors(device)))

    work()
    with tconv.enabled(), tconv.recording() as calls:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got in results[1:]:
        same(got, results[0])
    parity.assert_ours(calls, *["fprop", "dgrad", "wgrad", "bias"] * 3)


def test_toggling_in_two_threads_while_others_compute(device):
    """Torch would free a kernel that a thread is about to enter; tiny integers are left to it, which is quick."""
    dtype = torch.int64 if device == "cpu" else torch.complex64
    x, w = torch.ones(1, 1, 3, 3, dtype=dtype, device=device), torch.ones(2, 1, 2, 2, dtype=dtype, device=device)
    expected, stop, errors = F.conv2d(x, w), threading.Event(), []

    def compute():
        try:
            while not stop.is_set():
                assert torch.equal(F.conv2d(x, w), expected)
        except BaseException as e:
            errors.append(e)

    def toggle():
        try:
            for _ in range(400):
                with tconv.enabled(), tconv.enabled():
                    F.conv2d(x, w)
        except BaseException as e:
            errors.append(e)

    computing, toggling = [threading.Thread(target=compute) for _ in range(3)], [threading.Thread(target=toggle) for _ in "ab"]
    for thread in (*computing, *toggling):
        thread.start()
    for thread in toggling:
        thread.join()
    stop.set()
    for thread in computing:
        thread.join()
    assert errors == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_inherits_it(device):
    """Also while other threads hold every lock there is; and what the child does stays there."""
    tensors_, pipe = tensors(device), multiprocessing.get_context("fork").Pipe()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            with tconv.enabled():
                losses(conv)(*tensors(device))

    thread = threading.Thread(target=busy)
    with tconv.enabled():
        expected = losses(conv)(*tensors_)
        thread.start()
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    signature = _child(tensors_, expected)
                    pipe[1].send(signature)
                os._exit(0)
            children.append(child)
        for child in children:
            assert pipe[0].poll(120), "a child hangs"
            assert pipe[0].recv() == "ours, then torch's"
            os.waitpid(child, 0)
        stop.set()
        thread.join()
        with tconv.recording() as calls:
            conv(*tensors_)
    parity.assert_ours(calls, "fprop")


def _child(leaves, expected):
    torch.set_num_threads(1)
    with tconv.recording() as calls:
        got = losses(conv)(*leaves)
        parity.assert_ours(calls, "fprop", "dgrad", "wgrad", "bias")
    same(got, expected)
    for one in override._process():  # the busy thread's, too, which is not here
        override._close(one)
    with tconv.recording() as calls:
        conv(*leaves)
    return "ours, then torch's" if not calls else str(calls)


def test_no_kernels_no_override():
    """Without the interpreter and a GPU nothing is registered, nothing of Triton imported, and one warning says why."""
    code = (
        "import sys, warnings, torch, tconv\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    tconv.enable()\n"
        "    tconv.disable()\n"
        "    with tconv.enabled():\n"
        "        pass\n"
        "    tconv.enable()\n"
        "print(caught[0].message)\n"
        "print([w.filename for w in caught])\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('aten::_convolution', 'CPU'), 'triton' in sys.modules)\n"
        "tconv.disable()\n"
    )
    if torch.cuda._is_compiled():
        pytest.skip("this torch knows GPUs")
    said, where, registered = outside("-c", code).splitlines()
    assert said.startswith("tconv.enable() changes nothing here: this torch is built without GPUs, CPU tensors need")
    assert where == str(["<string>"] * 3), "a warning points at the line that enables"
    assert registered == "False False"


# --- several devices ---


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_dtensor(device, tmp_path):
    """Its rules are for torch's operators, whose local calls are ours."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    leaves = tensors(device)
    expected = losses(conv)(*leaves)
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh(device, (1,))
        placed = [
            distribute_tensor(t.detach(), mesh, [where]).requires_grad_()
            for t, where in zip(leaves, (Shard(0), Replicate(), Replicate()), strict=True)
        ]
        with tconv.enabled(), tconv.recording() as calls:
            got = [t.full_tensor() for t in losses(conv)(*placed)]
    finally:
        torch.distributed.destroy_process_group()
    same(got, list(expected))
    parity.assert_ours(calls, "fprop", "dgrad", "wgrad", "bias")
