"""What tests/test_launch.py runs in processes of their own, where kernels are compiled and a stub stands for the GPU.

python -m tests.launches NAME
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

import tconv
from bench import stub
from tconv.launching import compiled, launch
from tconv.launching.descriptors import descriptor
from tconv.launching.record import Fallback
from tconv.planning.device import SWITCH

PDL = 6  # of what C is told, whether the launch is a dependent one
launched: list[tuple[Any, ...]] = []  # what C would have been told
by_triton: list[str] = []  # names of the kernels that Triton's dispatch has launched
driver = stub.install(lambda *args: launched.append(args))
_run = JITFunction.run


def _counted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    by_triton.append(self.__name__)
    return _run(self, *args, **kwargs)


JITFunction.run = _counted


def plain(value: Any) -> Any:
    """A launch's arguments flattened: an address for a tensor, nothing for hooks that nobody has set."""
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if type(value).__name__ in ("HookChain", "LazyDict"):
        return None
    return value


def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))


def once(layer: torch.nn.Module, x: torch.Tensor) -> list[tuple[Any, ...]]:
    """What a forward and backward pass tells C."""
    launched.clear()
    step(layer, x)
    return [*launched]


def small(
    cls: Any, *args: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Any, torch.Tensor]:
    return cls(*args, **more).to(dtype), torch.randn(shape).to(dtype).requires_grad_()


def last(pair: tuple[torch.nn.Module, torch.Tensor]) -> tuple[torch.nn.Module, torch.Tensor]:
    layer, x = pair
    return layer.to(memory_format=torch.channels_last), x.detach().to(memory_format=torch.channels_last).requires_grad_()


LAYERS = {
    "dense": lambda: small(tconv.Conv2d, 128, 96, 3, shape=(8, 128, 40, 40), dtype=torch.bfloat16),
    "few channels": lambda: small(tconv.Conv2d, 3, 16, 3, shape=(8, 3, 40, 40)),
    "splits of channels": lambda: small(tconv.Conv2d, 256, 64, 3, shape=(1, 256, 8, 8), dtype=torch.bfloat16),
    "boxes": lambda: last(small(tconv.Conv2d, 64, 128, 3, padding=1, shape=(8, 64, 40, 64), dtype=torch.bfloat16)),
    "several tiles": lambda: last(small(tconv.Conv2d, 64, 128, 3, padding=1, shape=(64, 64, 56, 56), dtype=torch.bfloat16)),
    "depthwise": lambda: small(tconv.Conv1d, 16, 32, 3, groups=16, bias=False, shape=(4, 16, 600)),
    "strips": lambda: small(tconv.Conv2d, 16, 16, 3, padding=1, groups=16, shape=(4, 16, 64, 64), dtype=torch.float16),
    "patches": lambda: small(tconv.ConvTranspose2d, 64, 32, 2, stride=2, shape=(4, 64, 32, 32), dtype=torch.bfloat16),
    "epilogue": lambda: small(tconv.FusedConv2d, 16, 16, 3, shape=(2, 16, 20, 20), dtype=torch.bfloat16, activation="silu"),
    "groups": lambda: small(tconv.GroupNormSiLU, 4, 16, shape=(2, 16, 20, 20), dtype=torch.bfloat16),
    "RMS": lambda: small(tconv.RMSNormSiLU, 16, shape=(2, 16, 20, 20), pad=1),
    "transposed": lambda: small(tconv.ConvTranspose3d, 4, 6, 2, stride=2, shape=(2, 4, 5, 6, 7), dtype=torch.float64),
}


def arguments() -> None:
    """C is told the same directly as by Triton's dispatch, for every kernel."""
    kernels = set()
    for make in LAYERS.values():
        layer, x = make()
        by_triton.clear()
        first = once(layer, x)
        assert len(by_triton) == len(first) >= 3, by_triton
        kernels |= {*by_triton}
        by_triton.clear()
        second = once(layer, x)
        assert by_triton == [], "the second call was dispatched by Triton"
        assert len(second) == len(first)
        for a, b in zip(first, second, strict=True):
            a, b = plain(a), plain(b)
            assert a[:5] == b[:5], f"grid, stream or function: {a[:5]}, {b[:5]}"
            assert a[3] == stub.STREAM
            differ = [i for i, (v, u) in enumerate(zip(flat(a), flat(b), strict=True)) if v != u]
            assert all(address(flat(a)[i]) and address(flat(b)[i]) for i in differ), [(flat(a)[i], flat(b)[i]) for i in differ]
    assert kernels == {
        "gather", "packed", "depthwise", "strip",
        "wgrad", "packed_wgrad", "depthwise_wgrad", "strip_wgrad", "sum_pixels", "sum_splits",
        "copy_channels_last", "copy_both", "tma", "tma_wgrad", "persistent", "rows", "patch", "activation_gradient",
        "channel_moments", "finish_moments", "normalise", "normalise_gradient", "finish_gradient",
    }, kernels  # fmt: skip
    # The same tensors, so that nothing at all may differ.
    layer, x = LAYERS["dense"]()
    with torch.no_grad():
        for p in list(launch._prepared.values()):
            tensors = tuple(torch.empty(64, dtype=d) for d in p.pointers)
            launched.clear()
            compiled._by_triton(p, tensors)
            by_triton.clear()
            compiled.run(p, tensors)
            compiled.run(p, tensors)
            a, b, c = map(plain, launched)
            assert b == c
            assert a == c
            assert by_triton == []


def dependents() -> None:
    """C is told of a dependent launch for the sums of splits, and for them alone; for none where that is switched off."""
    for off in (False, True):
        os.environ[SWITCH] = "0" if off else "1"
        told = {"sum_splits": set(), "others": set()}
        for make in LAYERS.values():
            layer, x = make()
            launch.forget()
            by_triton.clear()
            rows = once(layer, x)
            assert len(rows) == len(by_triton)
            names = [*by_triton]
            again = once(layer, x)  # directly
            assert len(by_triton) == len(again)
            for name, *both in zip(names, rows, again, strict=True):
                told[name if name in told else "others"] |= {bool(row[PDL]) for row in both}
        assert told == {"sum_splits": {not off}, "others": {False}}, told


def flat(value: Any) -> list[Any]:
    return [v for item in value for v in flat(item)] if isinstance(value, tuple) else [value]


def address(value: Any) -> bool:
    """Whether it can be one of torch's; a heap may lie low, and no integer of these layers is so large."""
    return isinstance(value, int) and value > 2**24 and value % 16 == 0


def prepared() -> Any:
    """A launch of the bias gradient, which compiles fast, and its tensors."""
    launch._prepared.clear()
    compiled._known.clear()
    g = tconv.planning.problem.Geometry(
        tconv.planning.problem.forward_problem((1, 2, 9), (4, 2, 3), (1,), ((0, 0),), (1,), 1), False
    )
    dy = torch.randn(1, 4, 7)
    launch.bias_grad(g, dy)
    (p,) = launch._prepared.values()
    assert p.total is None
    return p, (dy, torch.empty(8))


def guards() -> None:
    """Whatever changes what Triton would do is Triton's to do."""
    p, (dy, out) = prepared()

    def run(*tensors: torch.Tensor) -> list[str]:
        by_triton.clear()
        compiled.run(p, tensors)
        return [*by_triton]

    mine = ["sum_pixels"]
    run(dy, out)
    assert run(dy, out) == []
    functions = {launched[-1][4]}
    apart = out[1:]  # not a multiple of 16 bytes: another specialisation, which has a launch of its own afterwards
    assert run(dy, apart) == mine
    assert run(dy, apart) == []
    functions.add(launched[-1][4])
    assert len(functions) == 2
    assert run(dy, out) == []
    assert launched[-1][4] in functions
    assert launched[-1][4] != launched[-2][4]

    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    assert run(dy, out) == mine == run(dy, out)
    assert all(type(v).__name__ == "LazyDict" for v in launched[-1] if v is not None and "Dict" in type(v).__name__)
    knobs.runtime.launch_enter_hook.remove(seen.append)
    assert run(dy, out) == []
    with knobs.runtime.scope():
        knobs.runtime.launch_exit_hook = lambda metadata: None
        assert run(dy, out) == mine == run(dy, out)
    assert run(dy, out) == []
    p.kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    assert run(dy, out) == mine
    p.kernel.pre_run_hooks.clear()
    assert run(dy, out) == []
    with knobs.runtime.scope():  # another kernel, compiled with checks; direct in its turn
        knobs.runtime.debug = True
        assert run(dy, out) == mine
        assert run(dy, out) == []
        assert launched[-1][4] not in functions
    assert run(dy, out) == mine
    assert run(dy, out) == []
    assert launched[-1][4] in functions

    p, tensors = prepared()
    p.ready.clear()
    p.kernel.device_caches.clear()
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = lambda **_: True
        with pytest.raises(Fallback, match="a hook of Triton's"), pytest.warns(UserWarning, match="a hook of Triton's"):
            compiled.run(p, tensors)


class On:
    """A tensor that says that it is on a device."""

    def __init__(self, t: torch.Tensor, device: int) -> None:
        self.t, self.device, self.dtype = t, device, t.dtype

    def get_device(self) -> int:
        return self.device

    def data_ptr(self) -> int:
        return self.t.data_ptr()


class current:
    """In place of torch.cuda.device: makes a device of the stub the current one."""

    def __init__(self, device: int) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before, driver.device = driver.device, self.device

    def __exit__(self, *_: object) -> None:
        driver.device = self.before


def devices() -> None:
    """Each device has its own module, and its own current stream."""
    torch.cuda.device, torch.cuda.current_device = current, lambda: driver.device
    compiled.capturing = lambda device: False
    p, tensors = prepared()
    p.kernel.device_caches.clear()
    driver.loaded.clear()
    rows = []
    for device in (0, 1, 0, 1, 1, 0):
        launched.clear()
        compiled.run(p, tuple(On(t, device) for t in tensors))
        assert driver.device == 0
        (args,) = launched
        rows.append((device, args[3], args[4]))
    assert driver.loaded == [("sum_pixels", 0), ("sum_pixels", 1)]
    assert [stream for _, stream, _ in rows] == [stub.STREAM + device for device, *_ in rows]
    assert len({function for *_, function in rows}) == 2
    assert len({(device, function) for device, _, function in rows}) == 2


def threads() -> None:
    """Threads that launch the same for the first time at once compile and load it once, and each launches it."""
    for _ in range(5):
        p, tensors = prepared()
        p.ready.clear()
        p.kernel.device_caches.clear()
        driver.loaded.clear()
        launched.clear()
        barrier = threading.Barrier(8)
        errors: list[BaseException] = []

        def run(p: Any = p, tensors: Any = tensors, barrier: Any = barrier, errors: Any = errors) -> None:
            barrier.wait()
            try:
                for _ in range(50):
                    compiled.run(p, tensors)
            except BaseException as e:
                errors.append(e)

        workers = [threading.Thread(target=run) for _ in range(8)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        assert errors == []
        assert len(launched) == 400
        assert len(driver.loaded) == 1
        assert {args[4] for args in launched} == {1}


def capture() -> None:
    """What was compiled for another layer is launched during a capture; what was not is torch's, and compiles nothing."""
    layer, x = LAYERS["dense"]()
    x = x[:7].detach().requires_grad_()
    step(layer, x)
    compiles: list[Any] = []
    knobs.compilation.listener = lambda **more: compiles.append(more)
    layer(x)  # the settings have changed
    compiled.capturing = lambda device: True
    with tconv.recording() as calls, torch.no_grad():
        layer(x[:6].detach().contiguous())  # by the same kernel and tile
    assert [c.ours for c in calls] == [True]
    other = tconv.Conv1d(3, 5, 3)
    compiles.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with tconv.recording() as calls:
            u = torch.randn(1, 3, 9, requires_grad=True)
            torch.testing.assert_close(other(u), torch.nn.functional.conv1d(u, other.weight, other.bias))
            step(other, u)
    assert compiles == []
    assert {c.ours for c in calls} == {False}
    assert {c.reason for c in calls} == {compiled.REASON}
    assert len([w for w in said if "capture" in str(w.message)]) == 1, [str(w.message) for w in said]


def splits_in_capture() -> None:
    """A reduction whose second kernel is not compiled does not launch its first one either."""
    layer, x = LAYERS["dense"]()
    step(layer, x)
    (p,) = (p for p in launch._prepared.values() if p.total is not None and p.call.operation == "wgrad")
    compiled._known -= {v for v in compiled._known if v[0] is p.total.kernel}
    p.ready.clear()
    by_triton.clear()
    compiled.capturing = lambda device: True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tconv.recording() as calls:
            step(layer, x)
    assert [c.operation for c in calls if not c.ours and "backward" in c.operation] == ["aten::convolution_backward"]
    assert by_triton == [], "launched for the first time in a capture"
    assert not p.ready


def precompiled() -> None:
    """After precompile a real call compiles nothing, and nothing was compiled that it does not use."""
    hits: list[bool] = []
    used: set[str] = set()

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)
        used.add(src.hash())

    for name, make in LAYERS.items():
        layer, x = make()
        done = tconv.precompile(layer, torch.empty_like(x, device="meta"), target="sm_90", jobs=2, progress=False)
        assert not done.failed, done
        assert not done.left, done
        again = tconv.precompile(layer, x, target="sm_90", jobs=1, progress=False)
        assert (again.compiled, again.found) == (0, done.compiled + done.found), again
        for kernel in {part.kernel for p in launch._prepared.values() for part in p.parts}:
            kernel.device_caches.clear()
        launch._prepared.clear()
        hits.clear()
        used.clear()
        with knobs.compilation.scope():
            knobs.compilation.listener = listen
            step(layer, x)
        assert hits, name
        assert all(hits), f"{name}: {hits.count(False)} of {len(hits)} kernels were compiled anew"
        assert len(used) == again.found, f"{name}: {len(used)} kernels used, {again.found} precompiled"


def precompiled_in_fp8() -> None:
    """The same of layers in fp8, whose inputs are rounded by kernels too."""
    hits: list[bool] = []
    plain = tconv.Conv2d(64, 64, 3, padding=1, bias=False), tconv.ConvTranspose2d(64, 32, 2, stride=2)
    for layer, launches in (tconv.fp8.Conv2d(plain[0], 0.02), 2), (tconv.fp8.ConvTranspose2d(plain[1]), 3):
        x = torch.randn(2, 64, 8, 8).bfloat16().to(memory_format=torch.channels_last)
        done = tconv.precompile(layer, torch.empty_like(x, device="meta"), target="sm_90", jobs=1, progress=False)
        assert (done.compiled + done.found, done.failed, done.left) == (launches, (), ()), done
        hits.clear()
        with knobs.compilation.scope(), torch.no_grad(), tconv.recording() as calls:
            knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
            layer(x)
        assert [c.ours for c in calls] == [True]
        assert hits == [True] * launches, f"{hits}: what a call asks for is not what was compiled"


def boxes() -> None:
    """Descriptors, Triton's and Gluon's, are compiled ahead, and loaded, as a call would have them."""
    _boxes("tma")
    _boxes("persistent")


def _boxes(kernel: str) -> None:
    from tconv.planning.device import DEVICES
    from tconv.precompile import rehearse

    layer, x = tconv.Conv2d(64, 128, 3, padding=1).half(), torch.empty(2, 64, 8, 8, dtype=torch.float16, device="meta")
    with tconv.force(kernel=kernel):
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
        done = tconv.precompile(layer, x, target="sm_90", jobs=1, backward=False, progress=False)
        assert (done.compiled, done.failed, done.left) == (1, (), ()), done
        launches, _ = rehearse(layer, (x,), {}, DEVICES["H100"], backward=False)
        again = tconv.precompile(layer, torch.cat([x, x]), target="sm_90", jobs=1, backward=False, progress=False)
        assert (again.compiled, again.found) == (0, 1), again
    (wanted,) = launches
    assert [box is not None for box in wanted.boxes] == [True, True, False, True]
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        compiled.load(wanted, -1)
        memory = torch.empty(1 << 20, dtype=torch.float16)
        real = [descriptor(wanted.kernel, memory, box) for box in wanted.boxes if box]
        wanted.kernel.warmup(*real[:2], torch.float16, real[2], grid=wanted.grid, **wanted.named)
    assert hits == [True], f"{hits}: what a call would ask for is not what was compiled"


class Nested(torch.nn.Module):
    """Takes its input from a list, by name, and gives results in a dictionary; keeps what it has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = tconv.Conv2d(8, 16, 3, bias=False), torch.nn.BatchNorm2d(16)
        self.second = tconv.Conv2d(16, 16, 3, groups=16)

    def forward(self, factor: float, *, images: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        y = self.norm(self.first(images[0])).relu_() * factor
        return {"a": [y], "b": [self.second(y)]}


def nested() -> None:
    """Inputs and results within containers, channels_last, another layout of the weights: all of it is found."""
    model = Nested().half().to(memory_format=torch.channels_last)
    model.norm.float()
    x = torch.randn(2, 8, 9, 9).half().to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    forward = tconv.precompile(model, 2.0, images=[x], target="sm_90", jobs=2, backward=False, progress=False)
    assert (forward.compiled + forward.found, forward.failed, forward.left) == (2, (), ())
    both = tconv.precompile(model, 2.0, images=[x], target="sm_90", jobs=2, progress=False)
    assert both.failed == both.left == ()
    assert both.found >= 2
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert all(p.grad is None for p in model.parameters())
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        out = model(2.0, images=[x.requires_grad_()])
        results = [*out["a"], *out["b"]]
        torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    assert hits
    assert all(hits), hits


def loaded() -> None:
    """What precompile loads is launched during a capture without a call before."""
    from tconv.planning.device import DEVICES
    from tconv.precompile import rehearse

    layer, x = LAYERS["dense"]()
    launches, left = rehearse(layer, (x,), {}, DEVICES["H100"])
    assert left == ()
    kernels = [p.kernel.__name__ for p in launches]
    computing = [k for k in kernels if not k.startswith("copy_")]
    assert computing == [
        "tma",
        "tma",
        "wgrad",
        "sum_splits",
        "sum_pixels",
        "sum_splits",
    ]
    assert kernels.count("copy_both") == 2  # x and w, dy and w
    assert kernels.count("copy_channels_last") == 1  # x, for wgrad
    for p in launches:
        compiled.load(p, -1)
    names = [name for name, _ in driver.loaded]
    # tma twice: fprop and dgrad; copies of two twice: x and dy differ in how many pixels are read at a time; sum_splits twice:
    # dw lies otherwise than the slices of its workspace, the bias gradient does not
    assert len(names) == len({*kernels}) + 3, names
    compiled.capturing = lambda device: True
    compile_ = JITFunction._do_compile
    JITFunction._do_compile = lambda *_: exit("compiled in a capture")
    with tconv.recording() as calls:
        step(layer, x)
    JITFunction._do_compile = compile_
    assert [c.ours for c in calls] == [True] * 4
    assert len(driver.loaded) == len(names), "loaded in a capture"


def _torchs_then_ours() -> list[str]:
    """A layer's call that the stub lets fail, and the one after it, both right: the first one's reason."""
    layer, x = tconv.Conv1d(3, 5, 3), torch.randn(1, 3, 9)
    launched.clear()
    with torch.no_grad(), tconv.recording() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(layer(x), torch.nn.functional.conv1d(x, layer.weight, layer.bias))
        layer(x)
    assert [c.ours for c in calls] == [False, True], [*map(str, calls)]
    assert len(launched) == 1
    assert launched[0][4] == len(driver.loaded), "launched without a module"
    assert compiled._failed == {}
    return [c.reason for c in calls]


def broken_off() -> None:
    """A kernel that could not be loaded once, or not be launched, is loaded and launched by the next call."""
    load = driver.utils.load_binary

    def no_memory(*_: Any) -> Any:
        driver.utils.load_binary = load
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    driver.utils.load_binary = no_memory
    assert "RuntimeError: Triton Error [CUDA]: out of memory" in _torchs_then_ours()[0]


def _always_torchs(error: str) -> None:
    layer, x = tconv.Conv1d(3, 5, 3), torch.randn(1, 3, 9)
    with torch.no_grad(), tconv.recording() as calls, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer(x)
        assert len(compiled._failed) == 1
        by_triton.clear()
        layer(x)
    assert [c.ours for c in calls] == [False, False]
    assert all(error in c.reason for c in calls), [*map(str, calls)]
    assert len(said) == 1, [str(w.message) for w in said]
    assert by_triton == [], "tried again"


def resources() -> None:
    """A kernel that wants more than the device has is not tried again."""
    from triton.compiler import compiler

    compiler.max_shared_mem = lambda device: -1
    _always_torchs("OutOfResources: out of resource: shared memory")


def no_compiler() -> None:
    """Nor is one that the compiler's passes, which raise errors of any type, do not take; a full disk is another matter."""
    from triton.backends.nvidia.compiler import CUDABackend

    make, errors = CUDABackend.make_ttgir, [OSError("No space left on device"), RuntimeError("PassManager::run failed")]

    def fails(*args: Any) -> Any:
        if not errors:
            return make(*args)
        raise errors.pop(0)

    CUDABackend.make_ttgir = staticmethod(fails)
    knobs.compilation.always_compile = True
    layer, x = tconv.Conv1d(3, 5, 3), torch.randn(1, 3, 9)
    with torch.no_grad(), tconv.recording() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            layer(x)
    assert [c.ours for c in calls] == [False] * 3
    assert "OSError: No space left on device" in calls[0].reason
    assert calls[1].reason == calls[2].reason
    assert "RuntimeError: PassManager::run failed" in calls[1].reason
    assert errors == []


def not_loaded() -> None:
    """What precompile cannot load is in its answer; the other kernels are compiled and loaded."""
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: -1
    launch.checked_device = lambda index: tconv.planning.device.ARCHITECTURES["sm_90"][3]
    load = driver.utils.load_binary

    def no_memory(name: str, *args: Any) -> Any:
        if name == "packed_wgrad":
            raise RuntimeError("Triton Error [CUDA]: out of memory\nand more")
        return load(name, *args)

    driver.utils.load_binary = no_memory
    layer, x = tconv.Conv1d(40, 48, 3, bias=False), torch.randn(4, 40, 400)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = tconv.precompile(layer, x, jobs=2, progress=False)
    (failed,) = done.failed
    assert failed.startswith("wgrad packed_wgrad "), failed
    assert failed.endswith(": RuntimeError: Triton Error [CUDA]: out of memory"), failed
    assert [str(w.message) for w in said] == [f"precompile: {failed.replace(': R', ' could not be loaded: R', 1)}"]
    names = [name for name, _ in driver.loaded]
    assert {"gather", "tma", "persistent", "packed"} & {*names}
    assert len(names) == done.compiled + done.found - 1
    driver.utils.load_binary = load
    again = tconv.precompile(layer, x, jobs=1, progress=False)
    assert (again.compiled, again.failed) == (0, ()), again
    assert "packed_wgrad" in [name for name, _ in driver.loaded]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("done")
