"""What explain and precompile do to a model: nothing. And what they find out: all that its call would launch."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import random
import textwrap
import threading
import types
import weakref
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tconv
from tconv.planning.device import DEVICES
from tconv.precompile import rehearse
from tconv.rehearsal import runner
from tests import parity

PASSES = ["bias", "dgrad", "fprop", "wgrad"]


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch):
    parity.forbid_launches(monkeypatch, pytest.fail.Exception("a kernel was launched"))


def explained(model, *args, **kwargs):
    return [call.operation for call in tconv.explain(model, *args, **kwargs).calls if call.ours]


def rehearsed(model, *args, **kwargs):
    """By what precompile does for an H100: with meta tensors unless all are on a GPU."""
    launches, left = rehearse(model, args, kwargs, DEVICES["H100"])
    assert left == ()
    return list({id(launch.call): launch.call.operation for launch in launches}.values())


HOW = {"explain": explained, "precompile": rehearsed}
both = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


# --- what a model is, to the bit ---


def picture(value: Any, seen: dict[int, Any]) -> Any:
    """All that can be reached: identities, classes, what containers and attributes hold in order, every bit of tensors.

    Args:
        seen: fills with the objects, which it keeps alive, so that no id is another object's.
    """
    if isinstance(value, (int, float, str, bool, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device)):
        return value if not isinstance(value, (type, types.ModuleType)) else id(value)
    if id(value) in seen:
        return id(value)
    seen[id(value)] = value
    inside: list[Any] = []
    if isinstance(value, torch.Tensor):
        if nn.parameter.is_lazy(value):
            return id(value), type(value)
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if not value.is_meta else None
        inside = [value.shape, value.stride(), value.requires_grad, value._version, bits, picture(value.grad, seen)]
    elif isinstance(value, torch.Generator):
        inside = value.get_state().tolist()
    elif isinstance(value, dict):
        inside = [(picture(k, seen), picture(v, seen)) for k, v in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        inside = [picture(v, seen) for v in value]
    elif isinstance(value, types.MethodType):
        return "method", picture(value.__self__, seen)
    elif isinstance(value, types.FunctionType):
        inside = [picture(c.cell_contents, seen) for c in value.__closure__ or ()]
        inside += [picture(value.__defaults__, seen), picture(value.__kwdefaults__, seen)]
    elif isinstance(value, functools.partial):
        inside = [picture(v, seen) for v in (value.func, value.args, value.keywords)]
    if hasattr(value, "__dict__") and not isinstance(value, types.FunctionType):
        inside.append([(k, picture(v, seen)) for k, v in vars(value).items()])
    return id(value), type(value), inside


def process() -> Any:
    """What of the process and the thread a model could change."""
    return [
        torch.get_rng_state().tolist(), random.getstate(), [*map(str, numpy.random.get_state())],
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        torch.is_autocast_cache_enabled(),
        torch._C._is_multithreading_enabled(), tconv.last_calls(),
        [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
    ]  # fmt: skip


def unchanged(call, *held):
    """Does it; and nothing of these, nor of the process, is other than before."""
    kept: dict[int, Any] = {}
    before = picture(held, kept), process()
    with tconv.recording() as calls:
        done = call()
    assert calls == []
    assert picture(held, {}) == before[0]
    assert process() == before[1]
    return done


# --- models that change while they run ---


class Counting(nn.Module):
    """Counts calls, replaces a buffer, keeps results in lists and dicts, remembers shapes, draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = tconv.Conv2d(4, 6, 3)
        self.calls, self.last, self.kept, self.by_shape = 0, None, [], collections.OrderedDict(first=1)
        self.seen, self.recent = {1}, collections.deque([1, 2], maxlen=2)
        self.stats = Statistics()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("window", torch.ones(3), persistent=False)
        self.register_buffer("nothing", None)
        self.plain = torch.zeros(2)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        y = self.conv(x)
        self.mean = 0.9 * self.mean + y.detach().mean((0, 2, 3))
        self.window.mul_(2)
        self.nothing = torch.ones(1)
        self.plain += 1
        self.last = y
        self.kept.append(y)
        self.by_shape[y.shape] = y
        self.by_shape.move_to_end("first")
        self.seen.add(self.calls)
        self.recent.append(y)
        self.stats.update(y)
        self.stats.log["y"] = y
        self.train(False)
        if not hasattr(self, "head"):
            self.head = nn.Linear(y.shape[-1], 2, device=y.device)
            self.conv.register_forward_hook(lambda *_: None)
        noise = random.random() + numpy.random.rand() + float(torch.rand((), generator=self.generator))
        return self.head(y) * noise


class Statistics:
    def __init__(self):
        self.count, self.total, self.log = 0, None, {}

    def update(self, y):
        self.count += 1
        self.total = y if self.total is None else self.total + y


class Writing(nn.Module):
    """Writes to its parameters and inputs, as constrained layers do."""

    def __init__(self):
        super().__init__()
        self.conv = tconv.Conv2d(4, 6, 3)
        self.embedding = nn.Embedding(3, 4, max_norm=0.1)

    def forward(self, x):
        x.clamp_(min=0).mul_(2)
        self.conv.weight.data.clamp_(-0.01, 0.01)
        with torch.no_grad():
            self.conv.bias.zero_()
        self.conv.bias.requires_grad_(True)
        return self.conv(x + self.embedding(torch.zeros(1, dtype=torch.long, device=x.device)).view(1, 4, 1, 1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.conv, self.drop, self.norm = tconv.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)

    def forward(self, x):
        return checkpoint(lambda v: self.norm(self.drop(self.conv(v))), x, use_reentrant=self.reentrant)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = tconv.Conv2d(4, 4, 3, padding=1)
        self.b = tconv.Conv2d(4, 4, 3, padding=1)
        self.b.weight, self.again = self.a.weight, self.a
        self.alone = [nn.BatchNorm2d(4)]  # not registered

    def forward(self, x):
        return self.again(self.alone[0](self.b(self.a(x))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn = tconv.Conv1d(4, 6, 3), nn.LSTM(6, 5, dropout=0.5, num_layers=2)

    def forward(self, x):
        return self.rnn(self.conv(x).permute(2, 0, 1))


def old_style():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(tconv.Conv2d(4, 6, 3))
    layer.weight = layer.weight.detach() * 1  # a tensor that is no parameter, computed before each call
    return layer


def hooked():
    """Hooks that keep and change what they see."""
    layer, kept = tconv.Conv2d(4, 6, 3), []
    layer.register_forward_hook(lambda module, args, y: kept.append(y))
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "seen", args[0]))
    layer.register_full_backward_hook(lambda module, dx, dy: kept.append(dx))
    layer.weight.register_hook(lambda g: kept.append(g))
    layer.weight.register_post_accumulate_grad_hook(lambda p: kept.append(p))
    return layer


def lazy():
    return nn.Sequential(
        tconv.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.Dropout(), tconv.LazyConvTranspose2d(4, 3),
        nn.LazyInstanceNorm2d(affine=True), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


ZOO = {
    "batch norm": lambda: nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "batch norm over all batches": lambda: nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None)),
    "instance norm": lambda: nn.Sequential(tconv.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)),
    "dropout": lambda: nn.Sequential(nn.Dropout(), tconv.Conv2d(4, 6, 3), nn.Dropout2d(), nn.RReLU()),
    "lazy": lazy,
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), tconv.Conv2d(4, 6, 3), nn.ReLU(inplace=True)),
    "spectral norm": lambda: parametrizations.spectral_norm(tconv.Conv2d(4, 6, 3)),
    "weight norm": lambda: parametrizations.weight_norm(tconv.Conv2d(4, 6, 3)),
    "weight norm, old": old_style,
    "counting": Counting,
    "writing": Writing,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "tied": Tied,
    "hooked": hooked,
    "frozen in part": lambda: nn.Sequential(tconv.Conv2d(4, 6, 3).requires_grad_(False), tconv.Conv2d(6, 4, 3)),
    "nested": lambda: nn.ModuleDict({"a": nn.ModuleList([tconv.Conv2d(4, 6, 3)])})["a"][0],
}


@both
@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_as_it_was(name, how, device):
    model = ZOO[name]().to(device)
    x = torch.randn(2, 4, 6, 7, device=device)
    for p in model.parameters():
        if not nn.parameter.is_lazy(p):
            p.grad = torch.ones_like(p)
            break
    operations = unchanged(lambda: how(model, x), model, x)
    assert {"fprop", "dgrad"} <= set(operations)
    assert "wgrad" in operations


@both
def test_a_recurrent_model_is_as_it_was(how, device):
    model, x = Recurrent().to(device), torch.randn(2, 4, 9, device=device)
    assert sorted(unchanged(lambda: how(model, x), model, x)) == PASSES


@both
def test_a_lazy_model_initializes_as_it_would_have(how, device, monkeypatch):
    x = torch.randn(2, 4, 6, 7, device=device)
    torch.manual_seed(5)
    expected = lazy().to(device)
    torch.manual_seed(5)
    model = lazy().to(device)
    assert sorted(set(how(model, x))) == PASSES
    assert all(m.has_uninitialized_params() for m in model if isinstance(m, nn.modules.lazy.LazyModuleMixin))
    assert len(list(model.parameters())) == len(list(expected.parameters()))
    monkeypatch.undo()  # kernels run
    for net in (model, expected):
        torch.manual_seed(6)
        net(x)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


class Raises(nn.Module):
    def __init__(self, when):
        super().__init__()
        self.conv, self.norm, self.drop, self.when, self.calls = (
            tconv.LazyConv2d(6, 3),
            nn.BatchNorm2d(6),
            nn.Dropout(),
            when,
            [],
        )

    def forward(self, x):
        self.calls.append(x)
        y = self.drop(self.norm(self.conv(x)))
        if self.when == "backward":
            y.register_hook(self.fail)
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_default_dtype(torch.float64)
        return y if self.when == "backward" else self.fail(y)

    def fail(self, y):
        raise LookupError("not today")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_model_that_raises_is_as_it_was(when, device):
    model, x = Raises(when).to(device), torch.randn(2, 4, 6, 7, device=device)

    def call():
        with pytest.raises(LookupError, match="not today"):
            tconv.explain(model, x)
        expected = (RuntimeError, "meta tensors: LookupError: not today") if device == "cpu" else (LookupError, "not today")
        with pytest.raises(expected[0], match=expected[1]) as raised:
            rehearsed(model, x)
        assert isinstance(raised.value.__cause__ or raised.value, LookupError)

    unchanged(call, model, x)


def test_settings_of_the_thread_are_kept(device):
    model, x = nn.Sequential(tconv.Conv2d(4, 6, 3)).to(device), torch.randn(2, 4, 6, 7, device=device)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert sorted(unchanged(lambda: explained(model, x), model, x)) == PASSES


# --- functions, and what they refer to ---

LAYER = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout())
SEEN: list[torch.Tensor] = []
COUNT = 0


def by_global(x):
    global COUNT
    COUNT += 1
    SEEN.append(x)
    return LAYER(x)


class Pipeline:
    """Not a module."""

    def __init__(self, model):
        self.model, self.steps, self.cache = model, 0, {}

    def __call__(self, x):
        self.steps += 1
        self.cache["y"] = y = self.model(x)
        return y

    def method(self, x):
        return self(x)


def closure(model):
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        return model(x)

    return function


FUNCTIONS = {
    "a closure": closure,
    "a lambda": lambda model: lambda x: model(x),
    "a default": lambda model: lambda x, model=model: model(x),
    "a partial": lambda model: functools.partial(lambda model, x: model(x), model),
    "keywords": lambda model: functools.partial(lambda x, model: model(x), model=model),
    "a bound method": lambda model: model.forward,
    "an object": Pipeline,
    "an object's method": lambda model: Pipeline(model).method,
    "within a list": lambda model: lambda x, models=[model]: models[0](x),
    "a wrapper of torch's": lambda model: torch.no_grad()(torch.enable_grad()(closure(model))),
    "data parallel": nn.DataParallel,
}


@both
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leaves_the_modules_it_calls_as_they_were(name, how, device):
    model = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout()).to(device)
    function, x = FUNCTIONS[name](model), torch.randn(2, 4, 6, 7, device=device)
    assert sorted(unchanged(lambda: how(function, x), model, function, x)) == PASSES


@both
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_nobody_else_hears_of_a_replicated_model(wrapper, how, device, monkeypatch):
    """Its own forward may talk to other processes or run replicas; the model within is taken."""
    monkeypatch.setattr(wrapper, "forward", lambda *_: pytest.fail("other processes were asked"))
    model, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device)
    wrapped = wrapper.__new__(wrapper)  # a process group would have to be made first
    nn.Module.__init__(wrapped)
    wrapped.module = model
    assert sorted(how(wrapped, x)) == PASSES


@both
def test_a_function_leaves_the_globals_it_names_as_they_were(how, device):
    x = torch.randn(2, 4, 6, 7, device=device)
    if device != "cpu":
        LAYER.to(device)
    operations = unchanged(lambda: how(lambda x: by_global(x), x), LAYER, SEEN, x)
    assert sorted(operations) == PASSES
    assert COUNT == 0


@both
def test_a_librarys_wrapper_keeps_count(how, device):
    """What it calls is found through it; what it keeps for itself is the library's business."""
    library = {"__name__": "torch.wrappers"}
    code = """
        def wrapped(function):
            count = 0
            def wrapper(x):
                nonlocal count
                count += 1
                return function(x)
            return wrapper, lambda: count
    """
    exec(textwrap.dedent(code), library)
    model = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(device)
    x, (wrapper, count) = torch.randn(2, 4, 6, 7, device=device), library["wrapped"](model)
    assert sorted(unchanged(lambda: how(wrapper, x), model, x)) == PASSES
    assert count() == 1


@both
def test_tensors_that_a_function_closes_over(how, device):
    w, x = torch.randn(6, 4, 3, 3, device=device, requires_grad=True), torch.randn(2, 4, 6, 7, device=device)
    b = torch.randn(6, device=device)
    operations = unchanged(lambda: how(lambda x: tconv.functional.conv2d(x, w, b), x), w, b, x)
    assert sorted(operations) == ["dgrad", "fprop", "wgrad"]
    convolve = tconv.functional.conv2d
    for function in (
        functools.partial(convolve, weight=w),
        functools.partial(lambda w, x: convolve(x, w), w),
        lambda x, w=w: convolve(x, w),
        lambda x, *, w=w: convolve(x, w),
    ):
        operations = unchanged(lambda function=function: how(function, x), w, x, function)
        assert sorted(operations) == ["dgrad", "fprop", "wgrad"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_scripted_model_keeps_its_statistics(way, device):
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(device), torch.randn(2, 4, 6, 7, device=device)
    model = torch.jit.script(model) if way == "script" else torch.jit.trace(model, x, check_trace=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with tconv.enabled():
        assert sorted(explained(model, x)) == PASSES
        assert sorted(explained(lambda x: model(x), x)) == PASSES
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_is_not_compiled_for_it(device):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout()).to(device)
    x = torch.randn(2, 4, 6, 7, device=device)
    compiled = torch.compile(model, backend=backend)
    for how in HOW.values():
        assert sorted(unchanged(lambda how=how: how(compiled, x), model, x)) == PASSES
    assert graphs == []


def test_threads_that_rehearse_at_once_collect_their_own_launches(device):
    x, both_in = torch.randn(2, 4, 6, 7, device=device), threading.Barrier(2, timeout=60)

    class Meeting(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = tconv.Conv2d(4, channels, 3, device=device)

        def forward(self, x):
            both_in.wait()
            y = self.conv(x)
            both_in.wait()
            return y

    found = {}

    def work(channels):
        launches, _ = rehearse(Meeting(channels), (x,), {}, DEVICES["H100"], False)
        found[channels] = {launch.call.problem.K for launch in launches}

    threads = [threading.Thread(target=work, args=(channels,)) for channels in (6, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {6: {6}, 8: {8}}


# --- inputs and results in containers and objects ---


class Pair(NamedTuple):
    x: Any
    more: Any = None


@dataclasses.dataclass
class Batch:
    x: Any
    more: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


@dataclasses.dataclass(slots=True)
class Slots:
    x: Any
    more: Any = dataclasses.field(init=False)


class Output(collections.OrderedDict):
    """As transformers' ModelOutput, which lets nobody add or take away."""

    def __setitem__(self, key, value):
        raise TypeError("read only")

    def update(self, *args, **kwargs):
        raise TypeError("read only")

    @classmethod
    def of(cls, **items):
        new = cls()
        for k, v in items.items():
            collections.OrderedDict.__setitem__(new, k, v)
        new.__dict__.update(items)
        return new


class User(collections.UserDict):
    """As transformers' BatchEncoding."""


CONTAINERS = {
    "list": lambda x: [x, None],
    "tuple": lambda x: (1, (x,)),
    "dict": lambda x: {"a": [{"b": x}], "c": "d"},
    "named tuple": lambda x: Pair(x),
    "dataclass": lambda x: Batch([x]),
    "slots": Slots,
    "frozen dataclass": lambda x: Frozen({"x": x}),
    "ordered dict": lambda x: collections.OrderedDict(a=1, x=x),
    "model output": lambda x: Output.of(x=x),
    "user dict": lambda x: User(x=x),
    "plain user dict": lambda x: collections.UserDict(x=x),
    "user list": lambda x: collections.UserList([x]),
    "object": lambda x: types.SimpleNamespace(x=x),
    "packed sequence": lambda x: nn.utils.rnn.PackedSequence(x, torch.tensor([2])),
    "deque": lambda x: collections.deque([x]),
    "set": lambda x: {x},
    "frozen set": lambda x: [frozenset((x, None))],
    "keys": lambda x: {(x, 1): None},
}


def find(value):
    """The one floating tensor in a container of any kind."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (str, int, type(None))):
        return None
    if isinstance(value, Slots):
        return value.x
    inside = [*value.keys(), *value.values()] if isinstance(value, (dict, collections.UserDict)) else value
    listed = dict, collections.UserDict, list, collections.UserList, tuple, collections.deque, set, frozenset
    inside = inside if isinstance(value, listed) else vars(value).values()
    return next((t for v in inside if (t := find(v)) is not None), None)


class Containers(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.make = tconv.Conv2d(4, 6, 3), make

    def forward(self, value):
        return self.make(self.conv(find(value).mul_(2)))  # a write that must not reach the caller's tensor


@both
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_inputs_and_results(name, how, device):
    model, x = Containers(CONTAINERS[name]).to(device), torch.randn(2, 4, 6, 7, device=device)
    value = CONTAINERS[name](x)
    assert sorted(unchanged(lambda: how(model, value), model, value, x)) == PASSES
    assert sorted(how(model, value=value)) == PASSES


@both
def test_every_differentiable_result_gets_a_backward(how, device):
    a, b = tconv.Conv2d(4, 6, 3, device=device), tconv.Conv2d(4, 6, 3, bias=False, device=device)

    def model(x, y):
        z = b(y)
        return {"a": a(x), "b": [z, z], "index": z.argmax(), "none": None, "in": x, "detached": z.detach()}, 3

    x = torch.randn(2, 4, 6, 7, device=device)
    assert sorted(how(model, x, x)) == sorted([*PASSES, "dgrad", "fprop", "wgrad"])
    distribution = how(lambda x: torch.distributions.Normal(a(x), 1.0), x)
    assert sorted(distribution) == PASSES


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_leaves_that_cannot_be_found_get_gradients_and_keep_theirs(reentrant, how, device):
    """A layer behind a class, and one made in the call."""

    class Registry:
        layer = tconv.Conv2d(4, 4, 3, device="meta" if how is rehearsed and device == "cpu" else device)

    Registry.layer.bias.grad = torch.ones_like(Registry.layer.bias)

    def model(x):
        y = checkpoint(torch.tanh, Registry.layer(x), use_reentrant=reentrant)
        return tconv.Conv2d(4, 6, 3, device=x.device)(y)

    x = torch.randn(2, 4, 6, 7, device=device)
    assert sorted(unchanged(lambda: how(model, x), Registry.layer, x)) == sorted(2 * PASSES)


class Tagged(torch.Tensor):
    """A subclass that behaves like its parent."""


KINDS = {
    "sparse": lambda x: x.to_sparse(),
    "conjugated": lambda x: x.cfloat().conj(),
    "negated": lambda x: x.cfloat().conj().imag,
    "a subclass": lambda x: x.as_subclass(Tagged),
    "empty": lambda x: x[:0],
    "a scalar": lambda x: x[0, 0, 0, 0],
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "computed": lambda x: x.requires_grad_() * 2,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(kind, device):
    """Each is seen as it is, kept as it is, and the layer beside it explained."""
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device)
    strange = KINDS[kind](x.clone())
    strange.tag = "kept"
    before, facts = strange.detach().clone(), (type(strange), strange.dtype, strange.layout, "kept")

    def model(x, other):
        assert (type(other), other.dtype, other.layout, other.tag) == facts
        with torch.no_grad():
            other *= 2
        return layer(x)

    assert sorted(explained(model, x, strange)) == PASSES
    for a, b in zip(strange.unbind(), before.unbind(), strict=True) if kind == "nested" else [(strange, before)]:
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=0)
    assert strange.grad_fn is None or kind == "computed"


@both
def test_a_model_may_take_its_inputs_apart(how, device):
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device)

    def model(batch):
        batch["labels"] = 1
        return layer(batch.pop("x").sub_(1))

    def with_slots(batch):
        batch.more = batch.x
        del batch.x
        return layer(batch.more)

    batch, slots = {"x": x, "y": [1]}, Slots(x)
    assert sorted(unchanged(lambda: how(model, batch), layer, batch)) == PASSES
    assert sorted(unchanged(lambda: how(with_slots, slots), layer, x)) == PASSES
    assert slots.x is x
    assert not hasattr(slots, "more")


class Tracked:
    """In use by other threads, by the look of it."""

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0


@both
def test_what_belongs_to_others_is_not_touched(how, device):
    """An object with a lock is left alone; of one of another class the tensors are shared, not copied, where they are real."""
    layer, x, tracked = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device), Tracked()
    layer.tracker, layer.trainer = tracked, types.SimpleNamespace(data=torch.ones(3, device=device), steps=0)
    data = layer.trainer.data

    def model(x):
        layer.tracker.count += 1
        layer.trainer.steps += 1
        assert how is rehearsed or layer.trainer.data is data
        return layer(x) + layer.trainer.data[0]

    assert sorted(how(model, x)) == PASSES
    assert (tracked.count, layer.trainer.steps) == (1, 0)
    assert layer.trainer.data is data


@pytest.mark.parametrize("copied", [True, False])
def test_parameters_of_a_large_model_are_shared(copied, device, monkeypatch):
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device)
    monkeypatch.setattr(runner, "COPIED", layer.weight.nbytes + layer.bias.nbytes - (not copied))
    own = layer.weight.data_ptr(), layer.bias.data_ptr()

    def model(x):
        raise Seen(
            layer.weight.data_ptr() == own[0], layer.bias.data_ptr() == own[1], type(layer.weight), layer.weight is weight()
        )

    weight = weakref.ref(layer.weight)
    with pytest.raises(Seen) as seen:
        tconv.explain(model, x)
    assert seen.value.args == (not copied, not copied, nn.Parameter, False)
    assert layer.weight is weight()
    assert sorted(unchanged(lambda: explained(layer, x), layer, x)) == PASSES


@pytest.mark.parametrize("accumulating", [False, True])
def test_a_training_step_trains_nothing(accumulating, device):
    layer, x = tconv.Conv2d(4, 6, 3, device=device), torch.randn(2, 4, 6, 7, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.weight.grad = torch.ones_like(layer.weight)

    def step(x):
        loss = layer(x).square().mean()
        if not accumulating:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    expected = ["bias", "fprop", "wgrad", "dgrad"]
    assert sorted(unchanged(lambda: explained(step, x), layer, x)) == sorted(expected)
    assert sorted(unchanged(lambda: rehearsed(step, x), layer, x)) == sorted(expected)


@both
def test_autocast_keeps_no_casts_of_stand_ins(how, device):
    """Nor by them the stand-ins, for as long as the user's block lasts."""

    def alive():
        gc.collect()
        return sum(type(o) is nn.Parameter for o in gc.get_objects())

    model = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.Linear(5, 5)).to(device)
    x, before = torch.randn(2, 4, 6, 7, device=device), alive()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16):
        assert sorted(unchanged(lambda: how(model, x), model, x)) == PASSES
        assert alive() == before


@both
def test_which_inputs_ask_for_gradients(how, device):
    """Floating tensors; a Parameter if it does; a module's own tensors as they do, wherever the module is."""
    x, w = torch.randn(2, 4, 6, 7, device=device), torch.randn(6, 4, 3, 3, device=device)
    conv = tconv.functional.conv2d
    assert sorted(how(conv, x, w)) == ["dgrad", "fprop", "wgrad"]
    assert sorted(how(conv, x, nn.Parameter(w))) == ["dgrad", "fprop", "wgrad"]
    assert sorted(how(conv, x, nn.Parameter(w, requires_grad=False))) == ["dgrad", "fprop"]
    layer = tconv.Conv2d(4, 6, 3, device=device).requires_grad_(False)
    assert sorted(how(lambda model, x: model(x), layer, x)) == ["dgrad", "fprop"]
    assert sorted(how(lambda i, x: layer(x)[i], torch.tensor([1], device=device), x)) == ["dgrad", "fprop"]


REFUSED = {
    "NumPy": lambda x: torch.from_numpy(x.numpy()),
    "requires_grad": lambda x: x[:, :].requires_grad_(False),
    "a setter": lambda x: setattr(y := x[:, None], "requires_grad", True) or y[:, 0],  # as wav2vec 2.0 does
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_takes_no_inputs_that_ask_for_gradients(why, device):
    if device != "cpu":
        pytest.skip("of a tensor on the CPU")
    layer, x = nn.Sequential(tconv.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 4, 6, 7)
    operations = unchanged(lambda: explained(lambda x: layer(REFUSED[why](x)), x), layer, x)
    assert sorted(operations) == (PASSES if why == "a setter" else ["bias", "fprop", "wgrad"])


STRIDED = {
    "expanded": lambda: torch.randn(1, 4, 1, 7).expand(2, 4, 6, 7),
    "channels last": lambda: torch.randn(2, 4, 6, 7).to(memory_format=torch.channels_last),
    "every other column": lambda: torch.randn(2, 4, 6, 14)[..., ::2],
    "not aligned": lambda: torch.randn(2 * 4 * 6 * 7 + 1)[1:].view(2, 4, 6, 7),
    "turned": lambda: torch.randn(7, 6, 4, 2).permute(3, 2, 1, 0),
    "of inference": lambda: torch.inference_mode()(torch.randn)(2, 4, 6, 7),
}


class Seen(Exception):
    """Takes out of a rehearsal what nothing else would: whatever is written there is set back."""


@pytest.mark.parametrize("name", STRIDED)
def test_a_stand_in_lies_as_what_it_stands_for(name, device):
    x = STRIDED[name]().to(device)
    elements, address = x.tolist(), x.data_ptr()  # the function would see a stand-in in x, too

    def model(v):
        raise Seen(v.shape, v.stride(), v.dtype, v.device, v.data_ptr() % 16, v.tolist() == elements, v.data_ptr() == address)

    with pytest.raises(Seen) as seen:
        tconv.explain(model, x)
    assert seen.value.args == (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, True, False)
