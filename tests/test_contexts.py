"""The layers and functions wherever a convolution can stand: results, gradients and formats are torch's, the kernels ours."""

from __future__ import annotations

import copy
import pathlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tconv
from tconv import functional as TF
from tconv.dispatch import operators
from tests import contexts, oracle, parity
from tests.contexts import CONTEXTS, F64, net, same, small, tensors

ROOT = pathlib.Path(tconv.__file__).parents[1]
TORCHS = {  # what knows aten's operators alone gets them
    "tensor subclass", "function mode", "expanded weights",
}  # fmt: skip
OTHER = {
    "dispatch mode",  # sees tconv's operators, not aten's: tests/test_transforms.py
    "FlopCounterMode",  # counts a grouped wgrad right, which torch does not: tests/test_transforms.py
    "jit.script",  # not possible: restore_ first, or enable()
}
VIEWS = {"vmap over w", "double backward"}  # torch's results are views, in whatever order its way there left them


@pytest.fixture
def explicit(monkeypatch):
    """Has the contexts call tconv's functions, and build models with tconv's layers."""

    def use():
        monkeypatch.setattr(contexts, "F", TF)
        monkeypatch.setattr(contexts, "made", tconv.replace_)

    return use


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name not in OTHER])
def test_contexts(name, device, explicit, poisoned):
    context = CONTEXTS[name]
    expected = context(*tensors(device))
    explicit()
    with tconv.recording() as calls:
        got = context(*tensors(device))
    same(got, expected, formats=name not in VIEWS)
    assert calls
    assert {call.ours for call in calls} == {name not in TORCHS}, [str(call) for call in calls]


def test_a_scripted_model_is_refused(device):
    """Whereas torch.nn's, restored, is not: as README's limits say."""
    model = tconv.replace_(nn.Sequential(nn.Conv2d(4, 6, 3))).to(device, F64)
    with pytest.raises(NotImplementedError, match=r"tconv\.restore_\(model\) first"):
        torch.jit.script(model)
    x = small(device)
    same(torch.jit.script(tconv.restore_(model))(x), model(x))


# --- torch.fx ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_symbolic_trace_calls_our_layers(device, explicit):
    x = small(device)
    expected = net(device)(x)
    explicit()
    graph = torch.fx.symbolic_trace(net(device))
    called = [type(graph.get_submodule(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    layers = [layer for layer in called if layer.__module__ == "tconv.modules"]
    assert layers == [tconv.Conv2d, tconv.ConvTranspose2d, tconv.Conv2d, tconv.Conv1d, tconv.Conv3d]
    for g in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), torch.fx.symbolic_trace(graph)):
        with tconv.recording() as calls:
            same(g(x), expected)
        assert [call.ours for call in calls] == [True] * 5


def test_fusing_and_quantizing_tools_take_restored_models(device):
    """They look for torch.nn's own classes; a model may be replaced again afterwards."""
    from torch.ao.quantization import fuse_modules

    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).to(device, F64).eval()
    nn.init.uniform_(model[1].running_mean)
    x = small(device)
    expected = model(x)
    fused = fuse_modules(tconv.restore_(tconv.replace_(model)), ["0", "1", "2"])
    assert isinstance(fused[1], nn.Identity)
    with tconv.recording() as calls:
        same(tconv.replace_(fused)(x), expected)
    parity.assert_ours(calls, "fprop")


# --- graphs ---


def fullgraph(module, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def test_compiled_channels_last_keeps_its_format(device):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2)).to(device, F64)
    model, x = model.to(memory_format=torch.channels_last), small(device).to(memory_format=torch.channels_last).requires_grad_()

    def run(f):
        y = f(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))

    expected = run(model)
    with tconv.recording() as calls:
        same(run(fullgraph(tconv.replace_(model))), expected)
    assert all(call.ours for call in calls)


NORMS = {
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "spectral norm": lambda m: parametrizations.spectral_norm(m),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NORMS)
def test_computed_weights(name, graph, device):
    results = []
    for library in (nn, tconv):
        torch.manual_seed(3)
        layer = NORMS[name](library.ConvTranspose2d(4, 6, 3, stride=2, groups=2).to(device, F64)).eval()
        f = fullgraph(layer) if graph else layer
        x = small(device).requires_grad_()
        with tconv.recording() as calls:
            y = f(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    same(results[1], results[0])
    assert {call.operation for call in calls} >= {"fprop", "dgrad", "wgrad"}
    assert all(call.ours for call in calls)


def test_ahead_of_time_inductor(device, tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(4)
    layers = tconv.Conv1d(4, 6, 2, padding="same"), nn.ReLU(), tconv.ConvTranspose1d(6, 2, 2, stride=2)
    model = nn.Sequential(*layers).to(device)
    dynamic = ({0: torch.export.Dim("n", min=2, max=16)},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 4, 7, device=device),), dynamic_shapes=dynamic)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded, x = torch._inductor.aoti_load_package(package), torch.randn(5, 4, 7, device=device)
        with tconv.recording() as calls:
            y = loaded(x)
        parity.assert_ours(calls, "fprop", "dgrad")
        same(y, tconv.restore_(model)(x))


def test_compiled_autograd(device):
    torch._dynamo.reset()
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2)).to(device, F64)
    results = []
    for change in (lambda m: m, tconv.replace_):
        twin, x = change(copy.deepcopy(model)), small(device).requires_grad_()
        enable = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))
        with tconv.recording() as calls, enable:
            twin(x).square().sum().backward()
        results.append((x.grad, *(p.grad for p in twin.parameters())))
    same(results[1], results[0])
    parity.assert_ours([c for c in calls if c.operation != "bias"], *["fprop", "dgrad", "wgrad"] * 2)


KEPT = []


def policy(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective():
    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
def test_a_checkpoint_policy_may_keep_convolutions(graph, device, monkeypatch):
    """Under a policy, which is a dispatch mode, tconv's operators are what it sees and may name."""
    torch.manual_seed(5)
    layer, x = tconv.Conv2d(4, 6, 3).to(device, F64), small(device).requires_grad_()

    def block(x):
        return layer(x.sin()).tanh()

    def step(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=selective)

    y = block(x)
    expected = y, *torch.autograd.grad(y.sum(), (x, layer.weight))
    for kept in ([torch.ops.tconv.fprop.default], []):
        monkeypatch.setattr(sys.modules[__name__], "KEPT", kept)
        with tconv.recording() as calls:
            y = (fullgraph(step) if graph else step)(x)
            same((y, *torch.autograd.grad(y.sum(), (x, layer.weight))), expected)
        parity.assert_ours([c for c in calls if c.operation != "bias"], *["fprop"] * (1 if kept else 2), "dgrad", "wgrad")


# --- settings ---


def test_the_same_bits_in_deterministic_mode_and_out_of_it(device):
    layer, x = tconv.Conv2d(4, 6, 3, stride=2, groups=2).to(device), torch.randn(2, 4, 9, 9, device=device).requires_grad_()
    results, before = [], torch.are_deterministic_algorithms_enabled()
    try:
        for wish in (True, False, True):
            torch.use_deterministic_algorithms(wish)
            y = layer(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("flags", [{"enabled": False}, {"benchmark": True}, {"deterministic": True}], ids=str)
def test_cudnn_flags_change_nothing(flags, device, own_record):
    """They choose among cuDNN's kernels, which are not used. On a GPU, `benchmark` measures (tests/test_policy.py)."""
    if flags == {"benchmark": True} and device == "cuda":
        pytest.skip("it measures, and torch may be faster")
    layer, x = tconv.Conv2d(4, 6, 3).to(device), torch.randn(2, 4, 5, 6, device=device)
    expected = layer(x)
    with torch.backends.cudnn.flags(**flags), tconv.recording() as calls:
        assert torch.equal(layer(x), expected)
    parity.assert_ours(calls, "fprop")


TF32 = """
import torch, tconv
from tconv.planning.device import DEVICES
from tconv.launching.dry_run import dry_run
from tconv.launching.variants import float32_precision

layer, x = tconv.Conv2d(64, 64, 3, device="meta"), torch.empty(2, 64, 16, 16, device="meta")
backends, cudnn = torch.backends, torch.backends.cudnn


def planned():
    with tconv.recording() as calls, dry_run(DEVICES["H200"]):
        layer(x)
    assert len(calls) == 1 and calls[0].ours
    return str(calls[0])


expected = []
for allow in (False, True):
    with float32_precision(allow):
        expected.append(planned())
assert expected[0] != expected[1]
for name, owner, attribute in (
    ("cudnn.allow_tf32", cudnn, "allow_tf32"), ("cudnn.conv", cudnn.conv, "fp32_precision"),
    ("cudnn", cudnn, "fp32_precision"), ("everything", backends, "fp32_precision"),
):
    for allow in (True, False, True):
        setattr(owner, attribute, allow if attribute == "allow_tf32" else "tf32" if allow else "ieee")
        torch.set_float32_matmul_precision("highest" if allow else "high")
        assert planned() == expected[allow], (name, allow)
    if attribute == "fp32_precision":
        owner.fp32_precision = "none"  # as the next one says
print("as torch says")
"""


def test_tf32_is_torchs_to_allow():
    """By each of torch's settings, as read at every call; matrix products' own is another. They cannot all be set back."""
    done = subprocess.run([sys.executable, "-c", TF32], capture_output=True, text=True, check=False)
    assert done.stdout == "as torch says\n", done.stderr


ADVICE = """
import sys, torch, tconv
from tconv.planning.device import DEVICES
from tconv.launching.dry_run import dry_run
from tconv.launching.variants import float32_precision

x, layers = torch.empty(2, 64, 16, 16), (tconv.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 64, 3))


def planned():
    with tconv.recording() as calls, dry_run(DEVICES["H200"]):
        layers[0].to("meta")(x.to("meta"))
    return str(calls[0])


with float32_precision(True):
    by_tensor_cores = planned()
with float32_precision(False):
    true = planned()
assert planned() == by_tensor_cores != true
exec(sys.argv[1])
assert planned() == true
for layer in layers:
    for strict in (False, True):
        torch.export.export(layer.to_empty(device="cpu"), (x,), strict=strict)
print("true fp32, and exported")
"""


def test_the_readmes_way_to_true_fp32_can_be_exported():
    (advice,) = re.findall(r"`(torch\.backends\.[^`]*)` asks for true fp32", (ROOT / "README.md").read_text())
    done = subprocess.run([sys.executable, "-c", ADVICE, advice], capture_output=True, text=True, check=False)
    assert done.stdout == "true fp32, and exported\n", done.stderr


# --- the operators themselves ---

MISUSE = {
    "channels": ("fprop", (1, 3, 5, 5), (2, 4, 3, 3), None),
    "a bias of another length": ("fprop", (1, 4, 5, 5), (2, 4, 3, 3), (3,)),
    "outputs that the groups do not divide": ("dgrad", (1, 3, 5, 5), (3, 4, 3, 3), None, 2),
    "batches that differ": ("wgrad", (1, 2, 3, 3), (2, 4, 5, 5), None),
}


@pytest.mark.parametrize("name", MISUSE)
def test_operators_refuse_tensors_that_do_not_fit_together(name, device):
    operator, a, b, bias, *groups = MISUSE[name]
    a, b, bias = (None if shape is None else torch.randn(shape, device=device) for shape in (a, b, bias))
    with pytest.raises(ValueError, match=rf"{operator}: tensors of .* do not fit"):
        getattr(torch.ops.tconv, operator)(a, b, bias, (1, 1), (0, 0), (0, 0), (1, 1), *groups or (1,))


DECLINED = [
    oracle.Case("uneven ends", (2, 4, 5, 6), 6, (2, 4), padding="same", groups=2),
    oracle.Case("a remainder unread", (2, 4, 8, 7), 6, (3, 2), stride=(3, 2), padding=(1, 0)),
    oracle.Case("transposed with output padding", (2, 4, 4, 3), 6, (3, 3), stride=2, output_padding=1, transposed=True),
]


@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_what_the_kernels_decline_within_an_operator_is_torchs(case, device, monkeypatch):
    """With padding that differs at the ends, and none of the elements that the last step leaves unread."""
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, F64, device))
    f = getattr(TF, "conv_transpose2d" if case.transposed else "conv2d")
    expected = oracle.run(f, case, x, w, b)
    monkeypatch.setattr(operators, "_known", {})
    monkeypatch.setattr(operators, "_examine", lambda *_: "not today")
    with tconv.recording() as calls:
        got = torch.func.vjp(lambda x, w, b: f(x, w, b, **case.arguments), x.detach(), w.detach(), b.detach())
        got = got[0], *got[1](oracle.upstream(got[0]).to(F64))
    assert {call.reason for call in calls} == {"not today"}
    same(got, expected)


def test_a_dry_run_reaches_into_transforms(device, monkeypatch):
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(3, 2, 4, 5, 5, device=device)
    parity.forbid_launches(monkeypatch, pytest.fail.Exception("a kernel was launched"))
    explanation = tconv.explain(torch.vmap(layer), x)
    assert explanation.ours
    assert [call.operation for call in explanation.calls][:1] == ["fprop"]
