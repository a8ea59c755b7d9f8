"""A driver for Triton whose devices are simulated: kernels are compiled to PTX as always, and that PTX is run here.

The binary that Triton's compiler backend makes, caches and loads is the PTX itself; ptxas does not run.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from simulator import options as options_
from simulator.errors import Fault, Unsupported
from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.options import Options
from simulator.tensor_maps import TensorMap

KEPT = 1024  # programs that stay translated
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle: bytes
FLOATS = {  # Triton's type of a number: its dtype, and that of its bits
    "fp16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16), "fp32": (torch.float32, torch.int32),
    "f32": (torch.float32, torch.int32), "fp64": (torch.float64, torch.int64),
}  # fmt: skip
NANS = {2: 0x7FFF, 4: 0x7FFFFFFF}


@dataclass(frozen=True)
class Chip:
    """What a simulated device tells Triton: multiprocessors, and bytes of shared memory that a program may use."""

    units: int
    shared_bytes: int


CHIPS = {"sm_80": Chip(108, 166912), "sm_90": Chip(132, 232448)}  # A100, H100
problems: list[Fault | Unsupported] = []  # of all launches so far, whether or not somebody caught them
_options: ContextVar[Options] = ContextVar("_options", default=options_.DEFAULT)
_owners: ContextVar[tuple[torch.Tensor, ...]] = ContextVar("_owners", default=())


class SimulatedBackend(CUDABackend):
    """Triton's backend for NVIDIA GPUs up to PTX."""

    def make_cubin(self, src: str, metadata: Any, opt: Any, capability: int) -> bytes:
        return src.encode()

    def hash(self) -> str:
        """Part of the key of Triton's cache: a GPU must not be given what is made here, nor the other way round."""
        return f"simulated-{super().hash()}"


class Utils:
    """What Triton asks of a device, and how it loads kernels."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.programs: OrderedDict[bytes, Program] = OrderedDict()
        self.loaded = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.chip.shared_bytes, "multiprocessor_count": self.chip.units, "warpSize": 32,
            "max_num_regs": 65536, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Program, Program, int, int, int]:
        """Returns (module, function, registers, spills, threads of a program at most).

        Registers are not allocated, so the number is the most that a program of this size could have.
        """
        program = self.programs.pop(binary, None)
        if program is None:
            program = Program(binary.decode(), shared)
            self.loaded += 1
        self.programs[binary] = program
        if len(self.programs) > KEPT:
            self.programs.popitem(last=False)
        return program, program, min(255, 65536 // program.kernel.threads), 0, 1024

    def count(self) -> tuple[int, int]:
        """Returns how many launches ran so far, and how many kernels were loaded for them."""
        return Program.launches, self.loaded

    def unload_module(self, module: Program) -> None:
        pass


class Launcher:
    """Launches one kernel, with what Triton passes: values for all parameters of the Python function, in order."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = src.fn.__name__ if isinstance(getattr(src, "fn", None), JITFunction) else metadata.name
        self.names = list(getattr(getattr(src, "fn", None), "arg_names", [])) or [str(i) for i in range(len(src.signature))]
        self.types = list(src.signature.values())
        self.boxes = [m if isinstance(m, dict) else vars(m) for m in getattr(metadata, "tensordesc_meta", None) or []]
        self.dependent = bool(getattr(metadata, "launch_pdl", False))
        if getattr(metadata, "num_ctas", 1) != 1:
            raise Unsupported(f"kernel {self.name}: clusters of {metadata.num_ctas} thread blocks")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Unsupported(f"kernel {self.name}: scratch memory")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        program: Program,
        packed: Any,
        about: Any,
        enter: Any,
        leave: Any,
        *given: Any,
    ) -> None:
        if enter is not None:
            enter(about)
        try:
            self._run(program, (x, y, z), given)
        except (Fault, Unsupported) as e:
            problems.append(e)
            raise
        if leave is not None:
            leave(about)

    def _run(self, program: Program, grid: tuple[int, int, int], given: tuple[Any, ...]) -> None:
        memory, arguments, boxes = GlobalMemory(), [], list(self.boxes)
        for tensor in _owners.get():
            memory.pointer(tensor)
        if len(given) != len(self.types):
            raise Unsupported(f"kernel {self.name}: {len(given)} arguments for {len(self.types)} parameters")
        for name, kind, value in zip(self.names, self.types, given, strict=True):
            arguments += _flattened(memory, name, kind, value, boxes)
        scratch = len(program.kernel.parameters) - len(arguments)  # pointers that Triton appends, to no memory
        program.run(grid, memory, arguments + [0] * scratch, _options.get(), self.dependent)


def _flattened(memory: GlobalMemory, name: str, kind: Any, value: Any, boxes: list[Any]) -> list[Any]:
    """Returns what a parameter of the Python function is for the PTX: nothing, one argument, or several."""
    if isinstance(kind, tuple):
        return [part for k, v in zip(kind, value, strict=True) for part in _flattened(memory, name, k, v, boxes)]
    if kind == "constexpr":
        return []
    if isinstance(value, TensorDescriptor | GluonDescriptor):
        pointer = memory.pointer(value.base, name)
        if boxes:
            return [_tensor_map(pointer, value, boxes.pop(0)), *value.shape, *value.strides]
        flags = [int(value.padding == "nan"), int(getattr(value, "round_f32_to_tf32", False))]
        given = len(flags) if hasattr(value, "round_f32_to_tf32") else 1
        return [pointer, *value.shape, *value.strides, *flags[:given], *value.shape, *value.strides]
    if isinstance(kind, str) and kind.startswith("*"):
        if isinstance(value, torch.Tensor):
            return [memory.pointer(value, name)]
        address = value if isinstance(value, int) else value.data_ptr()
        known = memory.find(address, name)
        if address and known is None:
            raise Unsupported(f"argument {name}: an address without its tensor; say `with simulator.tensors(...)`")
        return [known or 0]
    if kind in FLOATS:
        dtype, bits = FLOATS[kind]
        return [int(torch.tensor(value, dtype=dtype).view(bits))]
    return [int(value)]


def _tensor_map(pointer: int, d: TensorDescriptor | GluonDescriptor, box: dict[str, Any]) -> TensorMap:
    size = d.base.element_size()
    if box.get("is_im2col") or box.get("fp4_padded") or getattr(d, "round_f32_to_tf32", False):
        raise Unsupported(f"a tensor map with {box}, rounded to TF32: {getattr(d, 'round_f32_to_tf32', False)}")
    return TensorMap(
        pointer, size, tuple(reversed(d.shape)), tuple(n * size for n in reversed(d.strides[:-1])),
        tuple(reversed(box["block_size"])), SWIZZLES[box["swizzle"]], NANS[size] if d.padding == "nan" else 0,
    )  # fmt: skip


class SimulatedDriver:
    """The driver of one simulated device. Its tensors are on the CPU."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        self.utils = Utils(CHIPS[arch])
        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """What an autotuner measures with: every configuration runs once, and takes no time; the first one is chosen."""

        def benchmark(call: Callable[[], Any], quantiles: Iterable[float] = (0.5,), **_: Any) -> list[float]:
            call()
            return [0.0 for _ in quantiles]

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def install(arch: str, options: Options = options_.DEFAULT) -> SimulatedDriver:
    """Makes Triton run every kernel of this process in the simulator, on CPU tensors.

    Args:
        arch: "sm_80" or "sm_90".
        options: see `Options`.

    Raises:
        ValueError: another architecture, or TRITON_INTERPRET is set, with which kernels would run in Triton's interpreter.
    """
    if arch not in CHIPS:
        raise ValueError(f"arch must be one of {[*CHIPS]}, got {arch!r}")
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels would run in Triton's interpreter, unchecked")
    backends["nvidia"] = type(backends["nvidia"])(compiler=SimulatedBackend, driver=backends["nvidia"].driver)
    driver = SimulatedDriver(arch)
    triton_driver.set_active(driver)
    _options.set(options)
    return driver


@contextlib.contextmanager
def tensors(*owners: torch.Tensor) -> Iterator[None]:
    """For launches that are given addresses in place of tensors: the tensors that these addresses are in."""
    before = _owners.set(owners)
    try:
        yield
    finally:
        _owners.reset(before)


@contextlib.contextmanager
def checking(options: Options) -> Iterator[None]:
    """Launches run with other options."""
    before = _options.set(options)
    try:
        yield
    finally:
        _options.reset(before)
