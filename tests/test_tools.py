"""Tools that read, rewrite or measure models: what they see in tconv's layers is what they see in torch's."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tconv
from tconv import functional as TF
from tconv.dispatch.window import Window
from tests import parity

F64 = torch.float64
MODULE = "torch.nn.modules.conv"
LAYERS = {
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 5)),
    "strided, grouped, dilated": (lambda: nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2, groups=2, bias=False), (2, 4, 7, 6)),
    "same, odd filter": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 6, 5)),
    "same, even filter": (lambda: nn.Conv2d(4, 6, (4, 2), padding="same"), (2, 4, 6, 5)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "3-D": (lambda: nn.Conv3d(4, 2, 2, stride=2), (1, 4, 4, 4, 5)),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, (2, 3), padding=1, output_padding=(1, 2), groups=2), (2, 4, 3, 4)),
    "transposed 3-D": (lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False), (1, 4, 2, 3, 2)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
}  # fmt: skip
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(params=LAYERS)
def pair(request, device):
    """torch's layer, tconv's with the same parameters, and an input."""
    make, shape = LAYERS[request.param]
    torchs = make().to(device, F64).eval()
    return torchs, tconv.replace_(copy.deepcopy(torchs)), torch.randn(shape, dtype=F64, device=device)


def block(device="cpu", dtype=F64):
    """A convolution, its batch norm and an activation, with statistics of its own, and a transposed convolution."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, stride=2))
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.to(device, dtype).eval()


def classes(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]


# --- torch.fx ---


def nodes(graph):
    return [(node.op, node.name, str(node.target)) for node in graph.nodes]


def built_as_tconvs():
    return nn.Sequential(
        tconv.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), tconv.ConvTranspose2d(6, 3, 2, stride=2)
    )


@pytest.mark.parametrize("make", [lambda: tconv.replace_(block(dtype=torch.float32)), built_as_tconvs])
def test_layers_are_leaves_of_fx_graphs(make, device):
    from torch.ao.quantization.fx.tracer import QuantizationTracer

    model = make().to(device).eval()
    torchs = block(device, torch.float32)
    x = torch.randn(2, 4, 6, 5, device=device)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced.graph) == nodes(torch.fx.symbolic_trace(torchs).graph)
    assert nodes(QuantizationTracer([], []).trace(model)) == nodes(QuantizationTracer([], []).trace(torchs))
    with tconv.restored(model):
        expected = model(x)
    for g in (traced, pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced)):
        with tconv.recording() as calls:
            torch.testing.assert_close(g(x), expected)
        assert [call.ours for call in calls] == [True, True]


@EVEN
def test_a_layer_that_is_traced_itself_calls_our_function(pair):
    torchs, ours, x = pair
    if ours.transposed:  # of which torch.fx can trace neither, unless told that there is no output_size
        for layer in (torchs, ours):
            with pytest.raises(torch.fx.proxy.TraceError):
                torch.fx.symbolic_trace(layer)
        graph = torch.fx.symbolic_trace(ours, concrete_args={"output_size": None})
    else:
        graph = torch.fx.symbolic_trace(ours)
    assert TF.__name__ in {getattr(node.target, "__module__", "") for node in graph.graph.nodes}
    with tconv.recording() as calls:
        torch.testing.assert_close(graph(x), torchs(x))
    assert [call.ours for call in calls] == [True]


class Own(tconv.Conv2d):
    """Of a user's, who may have changed what it computes."""


class TorchsOwn(nn.Conv2d):
    """The same of torch's."""


def test_a_subclass_of_the_users_is_no_leaf_as_of_torchs():
    for cls in (Own, TorchsOwn):
        assert cls(1, 1, 1).__module__ == cls.__module__ == __name__
        graph = torch.fx.symbolic_trace(nn.Sequential(cls(1, 1, 1)))
        assert "call_module" not in {node.op for node in graph.graph.nodes}


def test_only_an_instance_shows_torchs_module():
    layer = tconv.Conv2d(1, 1, 1)
    assert (layer.__module__, type(layer).__module__, Own.__module__) == (MODULE, "tconv.modules", __name__)
    assert "__module__" not in layer.__dict__
    assert str(tconv.Conv2d) == "<class 'tconv.modules.Conv2d'>"
    torchs = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))
    for ours in (nn.utils.parametrizations.weight_norm(layer), tconv.replace_(torchs)):
        assert ours.__module__ == type(ours).__module__ == "torch.nn.utils.parametrize"


def test_the_same_of_distributed_layers():
    from tconv import distributed

    layer = distributed.Conv2d(1, 1, 1)
    assert (layer.__module__, type(layer).__module__) == (MODULE, "tconv.distributed")
    with tconv.restored(layer):
        assert type(layer) is nn.Conv2d
    assert type(layer) is distributed.Conv2d


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_name_the_true_module(protocol):
    model = nn.Sequential(tconv.Conv2d(1, 1, 1), tconv.LazyConv1d(1, 1))
    for dumps in (pickle.dumps, pickle._dumps):
        text = dumps(model, protocol=protocol)
        assert b"tconv.modules" in text
        assert b"_Name" not in text
        assert [type(m) for m in pickle.loads(text)] == [tconv.Conv2d, tconv.LazyConv1d]


def test_whole_models_are_saved_and_loaded():
    file = io.BytesIO()
    torch.save(nn.Sequential(tconv.Conv2d(1, 1, 1)), file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, tconv.Conv2d, set]):
        assert type(torch.load(file, weights_only=True)[0]) is tconv.Conv2d


# --- decompositions ---


def calls_of(program):
    """The operators of an exported program's graph and their arguments, tensors by name."""
    return [
        (str(node.target), [a.name if isinstance(a, torch.fx.Node) else a for a in node.args])
        for node in program.graph.nodes
        if node.op == "call_function"
    ]


def holds_ours(program):
    return any(name.startswith("tconv.") for name, _ in calls_of(program))


@EVEN
@pytest.mark.parametrize("strict", [False, True])
def test_the_default_decompositions_give_torchs_graph(pair, strict):
    torchs, ours, x = pair
    program = torch.export.export(ours, (x,), strict=strict)
    expected = torch.export.export(torchs, (x,), strict=strict).run_decompositions()
    assert holds_ours(program)
    for decomposed in (
        program.run_decompositions(),
        program.run_decompositions(torch.export.default_decompositions()),
        program.run_decompositions(decompose_custom_triton_ops=True),
    ):
        if torchs.padding_mode == "zeros":  # F.pad writes a circle in place, into a new tensor
            assert calls_of(decomposed) == calls_of(expected)
        assert not holds_ours(decomposed)
        torch.testing.assert_close(decomposed.module()(x), torchs(x))


def test_a_table_without_ours_keeps_our_operators(device):
    x = torch.randn(2, 4, 6, 5, dtype=F64, device=device)
    program = torch.export.export(tconv.replace_(block(device)), (x,))
    kept = torch.export.default_decompositions()
    del kept[torch.ops.tconv.fprop.default]
    for table, expected in (({}, ["dgrad", "fprop"]), (kept, ["fprop"])):
        names = sorted(name.split(".")[1] for name, _ in calls_of(program.run_decompositions(table)) if "tconv." in name)
        assert names == expected
    with tconv.recording() as calls:
        program.run_decompositions({}).module()(x)
    assert [call.ours for call in calls] == [True, True]


def test_our_table_alone_gives_the_convolutions_that_quantizers_look_for(device):
    torchs = block(device)
    ours = tconv.replace_(copy.deepcopy(torchs))
    x = torch.randn(2, 4, 6, 5, dtype=F64, device=device)
    found = torch.export.export(ours, (x,)).run_decompositions(tconv.decompositions())
    expected = torch.export.export(torchs, (x,)).run_decompositions({})
    assert calls_of(found) == calls_of(expected)
    assert "aten.conv2d.default" in dict(calls_of(found))


@pytest.mark.parametrize("name", ["padded", "strided, grouped, dilated", "transposed"])
def test_dynamic_sizes_stay_dynamic(name, device):
    make, shape = LAYERS[name]
    torchs = make().to(device, F64).eval()
    ours = tconv.replace_(copy.deepcopy(torchs))
    sizes = ({0: torch.export.Dim("n", min=2, max=64), 2: torch.export.Dim("h", min=4, max=64)},)
    x = torch.randn(2, shape[1], 6, *shape[3:], dtype=F64, device=device)
    program = torch.export.export(ours, (x,), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    decomposed = torch.export.load(file).run_decompositions()
    assert calls_of(decomposed) == calls_of(torch.export.export(torchs, (x,), dynamic_shapes=sizes).run_decompositions())
    x = torch.randn(3, shape[1], 11, *shape[3:], dtype=F64, device=device)
    torch.testing.assert_close(decomposed.module()(x), torchs(x))


WINDOWS = {  # x, w, window
    "symmetric": ((2, 4, 6, 5), (6, 2, 3, 3), Window((2, 1), (1, 1), (1, 1), (1, 1), 2)),
    "more behind": ((2, 4, 6, 5), (6, 4, 2, 4), Window((1, 1), (0, 1), (1, 2), (1, 1), 1)),
    "less behind, unread": ((2, 4, 6, 6), (6, 4, 3, 3), Window((2, 3), (1, 1), (0, -1), (1, 1), 1)),
    "less behind": ((2, 4, 6, 6), (6, 4, 3, 3), Window((1, 1), (2, 1), (0, 0), (1, 1), 1)),
    "cropped": ((2, 4, 9, 8), (6, 4, 3, 2), Window((2, 1), (0, 0), (-2, -3), (1, 2), 1)),
    "cropped in front": ((2, 4, 9, 8), (6, 4, 3, 2), Window((1, 1), (-1, 0), (0, 1), (1, 1), 1)),
    "1-D": ((2, 4, 9), (8, 1, 3), Window((3,), (2,), (1,), (2,), 4)),
    "3-D": ((1, 2, 4, 5, 4), (3, 2, 2, 1, 2), Window((1, 2, 1), (1, 0, 0), (0, 0, -1), (1, 1, 2), 1)),
    "channels last": ((2, 4, 6, 5), (6, 2, 3, 3), Window((2, 1), (1, 1), (1, 1), (1, 1), 2, True)),
    "contiguous": ((2, 4, 6, 5), (6, 2, 3, 3), Window((2, 1), (1, 1), (1, 1), (1, 1), 2, False)),
}  # fmt: skip


def normalisations(x):
    """Arguments of the operators of normalisations, whose gradients get the statistics of the first."""
    w, pads = torch.randn(x.shape[1], dtype=x.dtype, device=x.device), [(1,) * (x.dim() - 2), (0,) * (x.dim() - 2)]
    forward, backward = [], []
    for groups in (0, 2):
        for b in (None, w.sin()):
            how = groups, 1e-5, "silu", *pads
            y, stats = torch.ops.tconv.normalise(x, w, b, *how)
            forward.append((x, w, b, *how))
            backward.append((y.cos(), x, w, b, stats, True, *how))
    return {torch.ops.tconv.normalise.default: forward, torch.ops.tconv.normalise_grad.default: backward}


@pytest.mark.parametrize("name", WINDOWS)
def test_decompositions_of_every_window(name, device):
    """Values and layout, against the operators themselves, whose own are tested against fp64 elsewhere."""
    shape, w_shape, h = WINDOWS[name]
    x, w = torch.randn(shape, dtype=F64, device=device), torch.randn(w_shape, dtype=F64, device=device)
    if name == "contiguous":
        x = x.to(memory_format=torch.channels_last)
    fprop, dgrad, wgrad = (getattr(torch.ops.tconv, name).default for name in ("fprop", "dgrad", "wgrad"))
    y = fprop(x, w, None, *h)
    # What dgrad and wgrad are to give back shows in `after`, so it is the padding that is read.
    parts = zip(shape[2:], y.shape[2:], w_shape[2:], h.stride, h.before, h.dilation, strict=True)
    after = [(b - 1) * s + d * (t - 1) + 1 - a - p for a, b, t, s, p, d in parts]
    exact = h._replace(after=after)
    arguments = {
        fprop: [(x, w, b, *window) for b in (None, torch.randn(w_shape[0], dtype=F64, device=device)) for window in (h, exact)],
        dgrad: [(y, w, b, *exact) for b in (None, torch.randn(shape[1], dtype=F64, device=device))],
        wgrad: [(y, x, None, *exact)],
        torch.ops.tconv.fused.default: [
            (x, w, None, y.sin(), y.sum([0, *range(2, y.dim())]), None, "silu", 0.0, where, False, True, False, *exact)
            for where in ("before", "after")
        ],
        torch.ops.tconv.epilogue_grad.default: [
            (y, x, w, y.cos(), y.sin().sum([0, *range(2, y.dim())]), "silu", 0.0, "before", True, True, False, *exact)
        ],
        **normalisations(x),
    }
    for operator, calls in arguments.items():
        decomposition = tconv.decompositions()[operator]
        for given in calls:
            got, expected = decomposition(*given), operator(*given)
            torch.testing.assert_close(got, expected)
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            assert h.channels_last is None or all(a.stride() == e.stride() for a, e in pairs)
            graph = make_fx(operator, decomposition_table=tconv.decompositions())(*given)
            assert not any(str(node.target).startswith("tconv.") for node in graph.graph.nodes)
            torch.testing.assert_close(graph(*given), expected)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("transposed", [False, True])
def test_decomposed_gradients(transposed, mode, device):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1) if transposed else nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer = tconv.replace_(layer.to(device, F64))

    def step(x, w, b):
        y = torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))
        return torch.autograd.grad(y.square().sum(), (x, w, b))

    given = [torch.randn(2, 4, 6, 5, dtype=F64, device=device).requires_grad_(), *layer.parameters()]
    graph = make_fx(step, decomposition_table=tconv.decompositions(), tracing_mode=mode)(*given)
    names = collections.Counter(str(node.target) for node in graph.graph.nodes)
    assert not any(name.startswith("tconv.") for name in names)
    if mode == "real":
        assert (names["aten.convolution.default"], names["aten.convolution_backward.default"]) == (2, 1)
        assert not names["aten.constant_pad_nd.default"]
    for x in (given[0], torch.randn(3, 4, 9, 7, dtype=F64, device=device).requires_grad_()):
        if mode == "symbolic" or x is given[0]:
            torch.testing.assert_close(graph(x, *given[1:]), step(x, *given[1:]))


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
def test_torch_compile_does_not_decompose(backend, device, monkeypatch):
    """Also where torch asks of every operator whether a decomposition is known, as it does in CI."""
    monkeypatch.setenv("CI", "1")
    torch._dynamo.reset()
    model = tconv.replace_(block(device)).train()
    x = torch.randn(2, 4, 6, 5, dtype=F64, device=device)
    with tconv.recording() as calls:
        torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    assert [call.operation for call in calls if call.ours][:2] == ["fprop", "dgrad"]
    assert all(call.ours for call in calls)


# --- ONNX ---


def exported(model, x, dynamo):
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False)
    return file.getvalue()


def onnx_nodes(onnx, model):
    return [
        (node.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
        for node in onnx.load_from_string(model).graph.node
        if node.op_type != "Constant"
    ]


@EVEN
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_exporters_give_torchs_graph(pair, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    torchs, ours, x = (t.float().cpu() for t in pair)
    found = exported(ours, x, dynamo)
    assert onnx_nodes(onnx, found) == onnx_nodes(onnx, exported(torchs, x, dynamo))
    if ours.transposed and ours.groups > 1:
        return  # onnx 1.23's evaluator raises on these
    session = evaluator(onnx.load_from_string(found))
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), torchs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_that_hold_our_operators_become_onnx(strict):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = block(dtype=torch.float32)
    x = torch.randn(2, 4, 6, 5)
    program = torch.export.export(tconv.replace_(copy.deepcopy(model)), (x,), strict=strict)
    found = torch.onnx.export(program, verbose=False).model_proto.SerializeToString()
    expected = torch.onnx.export(torch.export.export(model, (x,), strict=strict), verbose=False)
    assert onnx_nodes(onnx, found) == onnx_nodes(onnx, expected.model_proto.SerializeToString())


def test_a_call_within_an_onnx_export_is_torchs(monkeypatch, device):
    """What both exporters set is enough, without their packages."""
    import torch.onnx

    layer = tconv.Conv2d(1, 1, 1, device=device)
    x = torch.randn(1, 1, 2, 2, device=device)
    assert "tconv::fprop" in str(torch.jit.trace(layer, x).inlined_graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "aten::_convolution" in str(torch.jit.trace(layer, x).inlined_graph)


# --- profilers and counters ---


def profiled(*calls):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True) as p:
        for call in calls:
            call()
    return p.events()


def rows(events, prefix="aten::conv"):
    names = [f"{prefix}{transpose}{rank}d" for transpose in ("", "_transpose") for rank in (1, 2, 3)]
    return [(e.name, e.flops, [s for s in e.input_shapes if s]) for e in events if e.name in names]


@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_counts_flops_and_names_launches(pair, grad):
    torchs, ours, x = pair
    if torchs.padding == "same":  # of which torch's profiler cannot tell the flops, and says so on stderr
        torchs.padding = ours.padding = 1
    x = x.unsqueeze(0) if x.dim() == 3 and x.shape[0] == 4 else x
    x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        expected = rows(profiled(lambda: torchs(x)))
        if torchs.padding_mode != "zeros":  # torch's convolution reads a padded copy
            expected = [(name, flops, [[*x.shape], *others]) for name, flops, (_, *others) in expected]
        ours(x)
        for call in (lambda: ours(x), lambda: tconv.replace_(copy.deepcopy(torchs))(x)):  # a repeated call, and a first one
            events = profiled(call)
            assert rows(events) == expected
            (launch,) = [e.name for e in events if e.name.startswith("tconv::")]
            assert launch.startswith(f"tconv::{'dgrad' if ours.transposed else 'fprop'} ")
            assert "[N" in launch
    assert expected


def test_the_profiler_names_the_launches_of_a_backward_pass_and_of_the_override(device):
    layer = tconv.Conv2d(4, 6, 3, device=device)
    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    launches = ["bias", "dgrad", "fprop", "wgrad"]
    for _ in range(2):
        events = profiled(lambda: layer(x).sum().backward())
        assert sorted(e.name[7:].split()[0] for e in events if e.name.startswith("tconv::")) == launches
    with tconv.enabled():
        events = profiled(lambda: F.conv2d(x, layer.weight, layer.bias).sum().backward())
    assert sorted(e.name[7:].split()[0] for e in events if e.name.startswith("tconv::")) == launches
    assert [e.flops for e in events if e.name == "aten::conv2d"] == [2 * 2 * 6 * 4 * 3 * 4 * 9]


def test_what_is_not_computed_is_not_profiled(device):
    layer = tconv.Conv2d(4, 6, 3, device=device)
    x = torch.randn(2, 4, 6, 5, device=device)
    assert not [e for e in profiled(lambda: tconv.explain(layer, x)) if e.name.startswith(("aten::conv", "tconv::"))]
    left = x.to(torch.complex64), layer.weight.to(torch.complex64)  # to torch, whose own events are the only ones
    assert rows(profiled(lambda: TF.conv2d(*left))) == rows(profiled(lambda: F.conv2d(*left)))


def test_an_event_ends_with_a_launch_that_fails(device, monkeypatch):
    layer = tconv.Conv2d(4, 6, 3, device=device)
    x = torch.randn(2, 4, 6, 5, device=device)
    layer(x)

    def failing():
        parity.forbid_launches(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            layer(x)
        with torch.profiler.record_function("after"):
            pass

    (after,) = [e for e in profiled(failing) if e.name == "after"]
    assert after.cpu_parent is None


def test_the_flop_counter_counts_what_was_recorded_outside_it(device):
    """A repeated forward pass outside the counter, its backward inside; and per module."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    counts = []
    for model in (block(device, torch.float32), tconv.replace_(block(device, torch.float32))):
        model(x)
        y = model(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        with FlopCounterMode(display=False) as forward:
            model(x)
        by_module = {name: sum(found.values()) for name, found in forward.get_flop_counts().items()}
        counts.append((backward.get_total_flops(), forward.get_total_flops(), by_module))
    assert counts[0] == counts[1]
    assert len(counts[0][2]) == 4
    assert min(counts[0][:2]) > 0


# --- torch's classes for a while ---


def mixed(device="cpu"):
    """A replaced layer, one built as tconv's, one left as torch's, a parametrized one, a user's, a lazy one."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1)))
    tconv.replace_(model, filter_fn=lambda _, name: name != "1")
    model.extend([tconv.ConvTranspose2d(4, 4, 2), Own(4, 4, 1), tconv.LazyConv2d(2, 1)])
    return model.to(device)


def test_restored_gives_torchs_classes_and_takes_them_back(device):
    model = mixed(device)
    before, state = classes(model), list(model.state_dict())
    x = torch.randn(2, 4, 6, 5, device=device)
    with tconv.restored(model) as same:
        assert same is model
        found = classes(model)
        assert found[:2] == [nn.Conv2d, nn.Conv2d]
        assert found[2].__base__ is nn.Conv2d
        assert found[3:] == [nn.ConvTranspose2d, Own, nn.LazyConv2d]
        assert [type(m) for m in pickle.loads(pickle.dumps(nn.Sequential(*model[:2])))] == [nn.Conv2d, nn.Conv2d]
        model(x)  # the lazy layer becomes one that is not
        assert type(model[5]) is nn.Conv2d
    after = classes(model)
    assert after[2].__base__ is tconv.Conv2d
    assert after[5] is tconv.Conv2d
    assert [*after[:2], *after[3:5]] == [*before[:2], *before[3:5]]
    assert list(model.state_dict()) == [*state[:-2], "5.weight", "5.bias"] or list(model.state_dict()) == state
    assert not any("_tconv_restored" in m.__dict__ for m in model.modules())
    tconv.restore_(model)  # what replace_ replaced, and no more
    assert [type(model[i]) for i in (0, 1, 3)] == [nn.Conv2d, nn.Conv2d, tconv.ConvTranspose2d]


def test_restored_takes_back_after_an_exception_and_in_nested_blocks():
    model = nn.Sequential(tconv.Conv2d(1, 1, 1))

    def fail():
        assert type(model[0]) is nn.Conv2d
        raise RuntimeError("the tool's")

    with pytest.raises(RuntimeError, match="the tool's"), tconv.restored(model), tconv.restored(model[0]):
        fail()
    assert type(model[0]) is tconv.Conv2d
    with tconv.restored(model):
        with tconv.restored(model):
            pass
        assert type(model[0]) is nn.Conv2d
    assert type(model[0]) is tconv.Conv2d
    layer = tconv.Conv1d(1, 1, 1)
    with tconv.restored(layer):
        assert type(layer) is nn.Conv1d
    assert type(layer) is tconv.Conv1d


def test_restored_gives_the_users_class_of_a_layer_that_replace_derived():
    model = tconv.replace_(nn.Sequential(TorchsOwn(1, 1, 1)))
    derived = type(model[0])
    assert derived is not TorchsOwn
    assert model[0].__module__ == __name__  # traced into, as the user's is
    with tconv.restored(model):
        assert type(model[0]) is TorchsOwn
    assert type(model[0]) is derived


def test_restored_asks_for_a_module():
    with pytest.raises(TypeError, match=r"restored takes a torch\.nn\.Module, but got a dict"), tconv.restored({}):
        pass


def test_what_a_tool_removes_makes_or_copies_in_the_block():
    model = nn.Sequential(tconv.Conv2d(1, 1, 1), tconv.Conv2d(1, 1, 1), tconv.Conv2d(1, 1, 1))
    removed, changed = model[0], model[1]
    with tconv.restored(model):
        elsewhere = copy.deepcopy(model)
        del model[0]
        changed.__class__ = Own
        model.append(nn.Conv2d(1, 1, 1))
        model.append(copy.deepcopy(model[1]))
    assert type(removed) is tconv.Conv2d
    assert classes(model) == [Own, tconv.Conv2d, nn.Conv2d, tconv.Conv2d]
    assert classes(elsewhere) == [nn.Conv2d] * 3
    loaded = pickle.loads(pickle.dumps(elsewhere))
    with tconv.restored(nn.Sequential(*loaded)):  # an older block's marks say nothing
        pass
    assert classes(loaded) == [nn.Conv2d] * 3
    assert classes(tconv.replace_(elsewhere)) == [tconv.Conv2d] * 3


# --- tools that look for torch.nn's very classes ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
class TestTools:
    """Each gives of a replaced model, in `tconv.restored`, what it gives of torch's."""

    @pytest.fixture(autouse=True)
    def models(self, device):
        self.torchs = block(device, torch.float32)
        self.ours = tconv.replace_(copy.deepcopy(self.torchs))
        self.x = torch.randn(2, 4, 6, 5, device=device)

    def names(self, model):
        return [(name, type(m).__qualname__) for name, m in model.named_modules()]

    def agree(self, tool):
        expected = tool(self.torchs)
        with tconv.restored(self.ours):
            found = tool(self.ours)
            assert self.names(found) == self.names(expected)
            torch.testing.assert_close(found(self.x), expected(self.x))
        assert classes(self.ours) == [tconv.Conv2d, tconv.ConvTranspose2d]
        return found, expected

    def test_fuse_modules(self):
        from torch.ao.quantization import fuse_modules

        found, expected = self.agree(lambda model: fuse_modules(model, ["0", "1", "2"]))
        tconv.replace_(found)
        with tconv.recording() as calls:
            torch.testing.assert_close(found(self.x), expected(self.x))
        parity.assert_ours(calls, "fprop", "dgrad")

    def test_fuse_modules_in_place(self):
        from torch.ao.quantization import fuse_modules

        expected = self.torchs(self.x)
        with tconv.restored(self.ours):
            fuse_modules(self.ours, ["0", "1"], inplace=True)
        assert isinstance(self.ours[1], nn.Identity)
        with tconv.recording() as calls:
            torch.testing.assert_close(self.ours(self.x), expected)
        parity.assert_ours(calls, "fprop", "dgrad")

    def test_fx_fuse(self):
        from torch.fx.experimental.optimization import fuse

        found, _ = self.agree(fuse)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="quantized kernels are the CPU's")
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("kind", ["eager", "fx"])
    def test_quantization(self, kind, training):
        from torch.ao import quantization as Q
        from torch.ao.quantization import quantize_fx

        def eager(model):
            model = copy.deepcopy(model)[:3].train(training)
            prepared = Q.QuantWrapper(model if training else Q.fuse_modules(model, ["0", "1", "2"]))
            prepared.qconfig = Q.get_default_qat_qconfig("x86") if training else Q.get_default_qconfig("x86")
            (Q.prepare_qat if training else Q.prepare)(prepared, inplace=True)
            prepared(self.x)
            return Q.convert(prepared.eval())

        def fx(model):
            model = copy.deepcopy(model)[:3].train(training)
            mapping = (Q.get_default_qat_qconfig_mapping if training else Q.get_default_qconfig_mapping)("x86")
            prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
            prepared = prepare(model, mapping, (self.x,))
            prepared(self.x)
            return quantize_fx.convert_fx(prepared.eval())

        found, _ = self.agree({"eager": eager, "fx": fx}[kind])
        assert any("quantized" in type(m).__module__ and "Conv" in type(m).__name__ for m in found.modules())

    def test_optimize_for_inference(self):
        expected = self.torchs(self.x)
        with tconv.restored(self.ours), torch.no_grad():
            found = torch.jit.optimize_for_inference(torch.jit.script(self.ours))
        assert "batch_norm" not in str(found.graph)
        torch.testing.assert_close(found(self.x), expected)

    def test_exported_graphs(self):
        """What pt2e's quantizers are given."""
        with tconv.restored(self.ours):
            found = torch.export.export(self.ours, (self.x,))
        assert calls_of(found) == calls_of(torch.export.export(self.torchs, (self.x,)))

    def test_counters_by_class(self):
        """As thop, ptflops and their likes count: a table of classes."""

        def count(model):
            return sum(type(m) in (nn.Conv2d, nn.ConvTranspose2d) for m in model.modules())

        assert count(self.ours) == 0
        with tconv.restored(self.ours):
            assert count(self.ours) == count(self.torchs) == 2
