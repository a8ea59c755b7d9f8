"""Tools that read, count, rewrite or export models, torch's own and other people's, each with a small model and a question.

scripts/tools.py asks them about the model of torch.nn's layers, of tconv's, and of torch.nn's under `tconv.enable()`. Packages
are imported when they are asked.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import importlib.util
import io
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tconv

Answer = dict[str, int | str | list[str] | list[float]]  # as JSON can hold it; counts and names are exact, floats are not
Built = tuple[nn.Module, torch.Tensor]
Ask = Callable[[Any, torch.Tensor], Answer]


@dataclass(frozen=True)
class Remedy:
    """What to do where the tool has to be called in another way.

    Attributes:
        code: the lines for docs/tools.md.
        ask: does just that to a model on which `replace_` ran.
    """

    code: str
    ask: Ask


@dataclass(frozen=True)
class Tool:
    """A tool and what is asked of it.

    Attributes:
        name: for the table.
        packages: what has to be installed besides torch.
        code: the call, for the table; `model` and `x` are the model and its input.
        ask: (model, input) -> answer.
        build: () -> (model, input), in eval mode.
        tolerance: how far off a list of floats may be, relative to its 2-norm.
        remedy: for tools that are to be called otherwise; most need `with tconv.restored(model):` at most.
        note: why another answer than torch.nn's is right, if it is.
    """

    name: str
    packages: tuple[str, ...]
    code: str
    ask: Ask
    build: Callable[[], Built]
    tolerance: float = 1e-4
    remedy: Remedy | None = None
    note: str = ""

    @property
    def there(self) -> bool:
        return all(importlib.util.find_spec(package) for package in self.packages)

    @property
    def version(self) -> str:
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in self.packages or ("torch",))


# Models


class Classifier(nn.Module):
    """Three convolutions, dense, depthwise and 1x1, each with its norm and its ReLU, and a linear layer."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3, stride=2, groups=8), norm(8), nn.ReLU()
        self.conv3, self.norm3, self.relu3 = nn.Conv2d(8, 6, 1, bias=False), norm(6), nn.ReLU()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.norm2(self.conv2(x)))
        x = self.relu3(self.norm3(self.conv3(x)))
        result: torch.Tensor = self.linear(self.pool(x).flatten(1))
        return result


GROUPS = [["conv1", "norm1", "relu1"], ["conv2", "norm2", "relu2"], ["conv3", "norm3", "relu3"]]


def classifier() -> Built:
    """With batch norms that have statistics."""
    model = Classifier(nn.BatchNorm2d)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            # torch types both as None, which they are unless statistics are tracked.
            nn.init.normal_(m.running_mean, std=0.3)  # type: ignore[arg-type]  # as the next
            nn.init.uniform_(m.running_var, 0.5, 2)  # type: ignore[arg-type]  # None in the stubs unless statistics are tracked
    return model.eval(), torch.randn(2, 3, 8, 8)


def without_batch_norm() -> Built:
    """With norms that keep samples apart."""
    return Classifier(lambda channels: nn.GroupNorm(2, channels)), torch.randn(2, 3, 8, 8)


def quantizable() -> Built:
    """Between a stub that quantizes and one that undoes it."""
    model, x = classifier()
    return torch.ao.quantization.QuantWrapper(model).eval(), x


def every_rank() -> Built:
    """Convolutions of one, two and three dimensions, and a transposed one."""
    layers = (
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.Flatten(2),
        nn.Conv1d(4, 4, 5, padding=4, dilation=2), nn.Unflatten(2, (4, 8, 8)), nn.Conv3d(4, 2, 3),
    )  # fmt: skip
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)


def offloaded() -> Built:
    """With accelerate's hooks, which are there before `replace_` comes."""
    from accelerate import cpu_offload

    model, x = every_rank()
    return cpu_offload(model, torch.device("cpu")), x


# Answers


def products(t: torch.Tensor) -> list[float]:
    """A tensor as few numbers: its products with eight random tensors."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(8, t.numel(), generator=generator, dtype=torch.float64)
    return (weights @ t.detach().double().flatten().cpu()).tolist()  # type: ignore[no-any-return]  # a list of floats


def counted(things: Sequence[str]) -> str:
    """Names and how often each occurs."""
    return ", ".join(f"{n} {name}" for name, n in sorted(collections.Counter(things).items()))


def left(model: nn.Module, kind: type) -> int:
    """How many modules of a kind a model has, wrapped ones included."""
    return sum(isinstance(m, kind) for m in model.modules())


# Counters and summaries


def thop(model: nn.Module, x: torch.Tensor) -> Answer:
    from thop import profile

    macs, parameters = profile(model, (x,), verbose=False)
    return {"MACs": int(macs), "parameters": int(parameters)}


def ptflops(backend: str) -> Ask:
    def ask(model: nn.Module, x: torch.Tensor) -> Answer:
        from ptflops import get_model_complexity_info

        macs, parameters = get_model_complexity_info(
            model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend
        )
        return {"MACs": int(macs), "parameters": int(parameters)}

    return ask


def fvcore(model: nn.Module, x: torch.Tensor) -> Answer:
    from fvcore.nn import FlopCountAnalysis

    counts = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    return {"FLOPs": int(counts.total()), "operators": counted(list(counts.by_operator()))}


def profiler(model: nn.Module, x: torch.Tensor) -> Answer:
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as found:
        model(x)
    events = found.key_averages()
    return {"FLOPs": sum(e.flops for e in events), "conv2d": sum(e.count for e in events if e.key == "aten::conv2d")}


def flop_counter(backward: bool) -> Ask:
    def ask(model: nn.Module, x: torch.Tensor) -> Answer:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            y = model(x.requires_grad_(backward))
            if backward:
                y.sum().backward()
        modules = [f"{name} {sum(ops.values())}" for name, ops in counter.get_flop_counts().items()]
        return {"FLOPs": counter.get_total_flops(), "by module": sorted(modules)}

    return ask


def torchinfo(model: nn.Module, x: torch.Tensor) -> Answer:
    from torchinfo import summary

    found = summary(model, input_data=x, verbose=0)
    layers = [f"{layer.class_name} {layer.output_size}" for layer in found.summary_list]
    return {"multiply-adds": found.total_mult_adds, "parameters": found.total_params, "layers": layers}


def torchsummary(model: nn.Module, x: torch.Tensor) -> Answer:
    from torchsummary import summary

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summary(model, tuple(x.shape[1:]), device="cpu")
    return {"lines": printed.getvalue().splitlines()}


# Graphs


def symbolic_trace(model: nn.Module, x: torch.Tensor) -> Answer:
    graph = torch.fx.symbolic_trace(model)
    return {"nodes": [f"{node.op} {target(node)}" for node in graph.graph.nodes], "output": products(graph(x))}


def target(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def fx_fuse(model: nn.Module, x: torch.Tensor) -> Answer:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model)
    return {"batch norms left": left(fused, nn.BatchNorm2d), "output": products(fused(x))}


def fx_optimize(model: nn.Module, x: torch.Tensor) -> Answer:
    from torch.fx.experimental.optimization import optimize_for_inference

    fast = optimize_for_inference(model)
    moved = [m for m in fast.modules() if type(m).__name__.startswith("Mkldnn")]
    return {"batch norms left": left(fast, nn.BatchNorm2d), "layers by MKL-DNN": len(moved), "output": products(fast(x))}


def fuse_conv_bn(model: Any, x: torch.Tensor) -> Answer:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    fused = fuse_conv_bn_eval(model.conv1, model.norm1)
    return {"output": products(fused(x)), "layer": type(fused).__name__}


def fuse_modules(model: nn.Module, x: torch.Tensor) -> Answer:
    fused = torch.ao.quantization.fuse_modules(model, GROUPS)
    return {"batch norms left": left(fused, nn.BatchNorm2d), "output": products(fused(x))}


def export(model: nn.Module, x: torch.Tensor) -> Answer:
    program = torch.export.export(model, (x,)).run_decompositions()
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return {"operators": counted(names), "output": products(program.module()(x))}


def jit_trace(model: nn.Module, x: torch.Tensor) -> Answer:
    return scripted(torch.jit.trace(model, x), x)


def jit_script(model: nn.Module, x: torch.Tensor) -> Answer:
    return scripted(torch.jit.script(model), x)


def jit_freeze(model: nn.Module, x: torch.Tensor) -> Answer:
    return scripted(torch.jit.freeze(torch.jit.trace(model, x)), x)


def jit_optimize(model: nn.Module, x: torch.Tensor) -> Answer:
    return scripted(torch.jit.optimize_for_inference(torch.jit.trace(model, x)), x)


def scripted(module: Any, x: torch.Tensor) -> Answer:
    """The operators of a scripted or traced module and what it gives."""
    kinds = [node.kind() for node in module.inlined_graph.nodes()]
    computing = [kind for kind in kinds if not kind.startswith("prim::") or "mkldnn" in kind]
    return {"operators": counted(computing), "output": products(module(x))}


def onnx(dynamo: bool) -> Ask:
    def ask(model: nn.Module, x: torch.Tensor) -> Answer:
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = str(pathlib.Path(folder, "model.onnx"))
            torch.onnx.export(model, (x,), file, dynamo=dynamo, external_data=False)
            nodes = [node.op_type for node in onnx.load(file).graph.node]
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return {"nodes": counted(nodes), "output": products(torch.from_numpy(y))}

    return ask


# Quantization


def quantized(model: nn.Module, x: torch.Tensor) -> Answer:
    """The layers and functions of a converted model that compute with integers, and what it gives."""
    names = [type(m).__name__ for m in model.modules() if "quantized" in type(m).__module__]
    if isinstance(model, torch.fx.GraphModule):
        names += [target(node) for node in model.graph.nodes if node.op == "call_function"]
    return {"quantized": counted(names), "output": products(model(x))}


def eager(model: Any, x: torch.Tensor) -> Answer:
    ao = torch.ao.quantization
    model.qconfig = ao.get_default_qconfig("x86")
    groups = [[f"module.{name}" for name in group] for group in GROUPS]
    prepared = ao.prepare(ao.fuse_modules(model, groups))
    prepared(x)
    return quantized(ao.convert(prepared), x)


def eager_training(model: Any, x: torch.Tensor) -> Answer:
    ao = torch.ao.quantization
    model.qconfig = ao.get_default_qat_qconfig("x86")
    groups = [[f"module.{name}" for name in group] for group in GROUPS]
    prepared = ao.prepare_qat(ao.fuse_modules_qat(model.train(), groups))
    step(prepared, x)
    return quantized(ao.convert(prepared.eval()), x)


def step(model: Any, x: torch.Tensor) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(x).square().sum().backward()
    optimizer.step()


def fx(model: nn.Module, x: torch.Tensor) -> Answer:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, torch.ao.quantization.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return quantized(convert_fx(prepared), x)


def fx_training(model: nn.Module, x: torch.Tensor) -> Answer:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    prepared = prepare_qat_fx(model.train(), torch.ao.quantization.get_default_qat_qconfig_mapping("x86"), (x,))
    step(prepared, x)
    return quantized(convert_fx(prepared.eval()), x)


def x86_quantizer() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def xnnpack_quantizer() -> Any:
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config())


def pt2e(quantizer: Callable[[], Any], decomposed: bool = False) -> Ask:
    def ask(model: nn.Module, x: torch.Tensor) -> Answer:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        program = torch.export.export(model, (x,))
        if decomposed:
            program = program.run_decompositions(tconv.decompositions())
        prepared = prepare_pt2e(program.module(), quantizer())
        prepared(x)
        converted = convert_pt2e(prepared)
        names = [str(n.target).split(".")[1] for n in converted.graph.nodes if "quantize" in str(n.target)]
        return {"nodes": counted(names), "output": products(converted(x))}

    return ask


# Attribution


def integrated_gradients(model: nn.Module, x: torch.Tensor) -> Answer:
    from captum.attr import IntegratedGradients

    return {"attribution": products(IntegratedGradients(model).attribute(x, target=1, n_steps=4))}


def lrp(model: nn.Module, x: torch.Tensor) -> Answer:
    from captum.attr import LRP

    return {"attribution": products(LRP(model).attribute(x, target=1))}


def gradcam(model: Any, x: torch.Tensor) -> Answer:
    from captum.attr import LayerGradCam

    return {"attribution": products(LayerGradCam(model, model.conv3).attribute(x, target=1))}


# Features, privacy, adapters, offload


def node_names(model: nn.Module, x: torch.Tensor) -> Answer:
    from torchvision.models.feature_extraction import get_graph_node_names

    return {"names": get_graph_node_names(model)[1]}


def feature_extractor(model: nn.Module, x: torch.Tensor) -> Answer:
    from torchvision.models.feature_extraction import create_feature_extractor

    found = create_feature_extractor(model, ["conv1", "conv2", "norm3"])(x)
    return {name: products(t) for name, t in found.items()}


def per_sample(model: nn.Module, x: torch.Tensor) -> Answer:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model)
    wrapped(x).square().sum().backward()
    return {name: products(p.grad_sample) for name, p in model.named_parameters()}


def private_step(model: nn.Module, x: torch.Tensor) -> Answer:
    from opacus import PrivacyEngine

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=len(x))
    private, optimizer, data = PrivacyEngine().make_private(
        module=model.train(), optimizer=torch.optim.SGD(model.parameters(), 0.1), data_loader=data,
        noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    for (batch,) in data:
        private(batch).square().sum().backward()
        optimizer.step()
    return {name: products(p) for name, p in model.named_parameters()}


def lora(model: nn.Module, x: torch.Tensor) -> Answer:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["conv1", "conv3"], init_lora_weights=False))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    y = adapted(x)
    return {"trained": trained, "output": products(y), "merged": products(adapted.merge_and_unload()(x))}


def cpu_offload(model: nn.Module, x: torch.Tensor) -> Answer:
    from accelerate import cpu_offload

    return {"output": products(cpu_offload(model, torch.device("cpu"))(x))}


def disk_offload(model: nn.Module, x: torch.Tensor) -> Answer:
    from accelerate import disk_offload

    with tempfile.TemporaryDirectory() as folder:
        return {"output": products(disk_offload(model, folder, torch.device("cpu"))(x))}


def call(model: nn.Module, x: torch.Tensor) -> Answer:
    return {"output": products(model(x))}


FUSED = "fuse_modules(model, [['conv1', 'norm1', 'relu1'], ...])"
EXPORTED = "torch.export.export(model, (x,))"
PT2E = "convert_pt2e(calibrated(prepare_pt2e({}.module(), quantizer)))"
# fmt: off
TOOLS = (
    Tool("thop", ("thop",), "thop.profile(model, (x,))", thop, every_rank),
    Tool("ptflops, by modules", ("ptflops",), "get_model_complexity_info(model, x.shape[1:], backend='pytorch')",
         ptflops("pytorch"), every_rank),
    Tool("ptflops, by operators", ("ptflops",), "get_model_complexity_info(model, x.shape[1:], backend='aten')",
         ptflops("aten"), every_rank),
    Tool("fvcore", ("fvcore",), "FlopCountAnalysis(model, x).total()", fvcore, every_rank),
    Tool("torchinfo", ("torchinfo",), "torchinfo.summary(model, input_data=x)", torchinfo, every_rank),
    Tool("torchsummary", ("torchsummary",), "torchsummary.summary(model, x.shape[1:])", torchsummary, every_rank),
    Tool("torch.profiler", (), "with profile(with_flops=True) as found: model(x)", profiler, classifier),
    Tool("FlopCounterMode, forward", (), "with FlopCounterMode() as counter: model(x)", flop_counter(False), every_rank),
    Tool("FlopCounterMode, forward and backward", (), "with FlopCounterMode() as counter: model(x).sum().backward()",
         flop_counter(True), every_rank,
         note="torch counts the weight gradient of a grouped layer `groups` times; tconv's layers report the true count"),
    Tool("FX, trace", (), "torch.fx.symbolic_trace(model)", symbolic_trace, every_rank),
    Tool("FX, fuse", (), "torch.fx.experimental.optimization.fuse(model)", fx_fuse, classifier),
    Tool("FX, optimize_for_inference", (), "torch.fx.experimental.optimization.optimize_for_inference(model)",
         fx_optimize, classifier),
    Tool("fuse_conv_bn_eval", (), "fuse_conv_bn_eval(model.conv1, model.norm1)", fuse_conv_bn, classifier),
    Tool("fuse_modules", (), FUSED, fuse_modules, classifier),
    Tool("quantization, eager", (), f"convert(calibrated(prepare({FUSED})))", eager, quantizable, 0.05),
    Tool("quantization-aware training, eager", (), f"convert(trained(prepare_qat({FUSED.replace('modules', 'modules_qat')})))",
         eager_training, quantizable, 0.05),
    Tool("quantization, FX", (), "convert_fx(calibrated(prepare_fx(model, mapping, (x,))))", fx, classifier, 0.05),
    Tool("quantization-aware training, FX", (), "convert_fx(trained(prepare_qat_fx(model, mapping, (x,))))", fx_training,
         classifier, 0.05),
    Tool("quantization, pt2e, X86InductorQuantizer", ("torchao",), PT2E.format(EXPORTED),
         pt2e(x86_quantizer), classifier, 0.05),
    Tool("quantization, pt2e, XNNPACKQuantizer", ("torchao",), PT2E.format(EXPORTED),
         pt2e(xnnpack_quantizer), classifier, 0.05,
         Remedy(PT2E.format(f"{EXPORTED}.run_decompositions(tconv.decompositions())"),
                pt2e(xnnpack_quantizer, decomposed=True))),
    Tool("export, decomposed", (), f"{EXPORTED}.run_decompositions()", export, every_rank),
    Tool("TorchScript, traced", (), "torch.jit.trace(model, x)", jit_trace, every_rank),
    Tool("TorchScript, scripted", (), "torch.jit.script(model)", jit_script, every_rank),
    Tool("TorchScript, frozen", (), "torch.jit.freeze(torch.jit.trace(model, x))", jit_freeze, classifier),
    Tool("TorchScript, optimize_for_inference", (), "torch.jit.optimize_for_inference(torch.jit.trace(model, x))", jit_optimize,
         classifier),
    Tool("ONNX, dynamo=True", ("onnx", "onnxscript", "onnxruntime"), "torch.onnx.export(model, (x,), file, dynamo=True)",
         onnx(True), every_rank),
    Tool("ONNX, dynamo=False", ("onnx", "onnxruntime"), "torch.onnx.export(model, (x,), file, dynamo=False)", onnx(False),
         every_rank),
    Tool("captum, IntegratedGradients", ("captum",), "IntegratedGradients(model).attribute(x, target=1)", integrated_gradients,
         classifier),
    Tool("captum, LRP", ("captum",), "LRP(model).attribute(x, target=1)", lrp, classifier),
    Tool("captum, GradCAM", ("captum",), "LayerGradCam(model, model.conv3).attribute(x, target=1)", gradcam, classifier),
    Tool("torchvision, get_graph_node_names", ("torchvision",), "get_graph_node_names(model)", node_names, classifier),
    Tool("torchvision, create_feature_extractor", ("torchvision",), "create_feature_extractor(model, ['conv1', 'norm3'])",
         feature_extractor, classifier),
    Tool("opacus, GradSampleModule", ("opacus",), "GradSampleModule(model)", per_sample, without_batch_norm),
    Tool("opacus, PrivacyEngine", ("opacus",),
         "PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=batches)",
         private_step, without_batch_norm),
    Tool("peft, LoRA", ("peft",), "get_peft_model(model, LoraConfig(target_modules=['conv1', 'conv3']))", lora, classifier),
    Tool("accelerate, cpu_offload", ("accelerate",), "cpu_offload(model, device)", cpu_offload, every_rank),
    Tool("accelerate, disk_offload", ("accelerate",), "disk_offload(model, folder, device)", disk_offload, every_rank),
    Tool("accelerate, hooks before replace_", ("accelerate",), "tconv.replace_(cpu_offload(model, device))", call, offloaded),
)
