"""Kernels of simulator/examples/ as Triton compiles them, and a small launch of each, for test_mutations.py to edit and run.

`python -m tests.simulator.kernels` compiles them, in a process of its own: where the tests run, Triton may be interpreting.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simulator.global_memory import GlobalMemory
from simulator.launch import Program
from simulator.options import Options
from simulator.tensor_maps import TensorMap

ROOT = pathlib.Path(__file__).parent.parent.parent
TRITON = "3.7.1"  # whose code the rows of test_mutations.py count instructions of
M, N, K = 80, 48, 144  # of the products: no whole number of tiles
ROWS, COLUMNS = 10, 500  # of the softmax
_generator = torch.Generator().manual_seed(0)
A, B = (torch.randn(shape, generator=_generator).half() for shape in ((M, K), (K, N)))
X = torch.randn(ROWS, COLUMNS, generator=_generator)


@dataclass(frozen=True)
class Kernel:
    """A kernel, how it is compiled, and its launch.

    Attributes:
        name: of a file in simulator/examples/ and of the function in it.
        signature: Triton's types of the arguments that are not constants.
        programs: of the launch.
        arguments: makes (arguments, the tensor that is written, what it should hold), given the memory that pointers are of.
        aligned: whether pointers and numbers are multiples of 16.
    """

    name: str
    arch: int
    warps: int
    stages: int
    signature: dict[str, str]
    constants: dict[str, int]
    programs: int
    arguments: Callable
    aligned: bool = True


def product(memory):
    c = torch.full((M, N), float("nan"), dtype=torch.float16)
    right = A.double() @ B.double()
    pointers = [memory.pointer(tensor, name) for tensor, name in ((A, "a"), (B, "b"), (c, "c"))]
    return [*pointers, M, N, K, K, N, N], c, torch.where(right >= 0, right, 0.01 * right)


def product_by_boxes(memory):
    c = torch.full((M, N), float("nan"), dtype=torch.float16)
    arguments = []
    for tensor, name, box in ((A, "a", (32, 64)), (B, "b", (32, 32)), (c, "c", (32, 64))):
        rows, columns = tensor.shape
        described = TensorMap(memory.pointer(tensor, name), 2, (columns, rows), (2 * columns,), box, swizzle=64)
        arguments += [described, rows, columns, columns, 1]
    return [*arguments, M, N, K], c, A.double() @ B.double()


def softmax(memory):
    out = torch.full_like(X, float("nan"))
    return [memory.pointer(out, "out"), memory.pointer(X, "x"), COLUMNS, COLUMNS, ROWS, COLUMNS], out, torch.softmax(X, 1)


POINTERS = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp16")
NUMBERS = dict.fromkeys(("M", "N", "K", "stride_am", "stride_bk", "stride_cm"), "i32")
UNIT = dict.fromkeys(("stride_ak", "stride_bn", "stride_cn"), 1)
HOPPER = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}
AMPERE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
BOXES = {"a": "tensordesc<fp16[64,32]>", "b": "tensordesc<fp16[32,32]>", "c": "tensordesc<fp16[64,32]>"}
KERNELS = {
    "pointers": Kernel("matmul", 90, 4, 3, POINTERS | NUMBERS, UNIT | HOPPER | {"GROUP_M": 8}, 4, product),
    "boxes": Kernel("persistent_matmul", 90, 4, 3, BOXES | dict.fromkeys("MNK", "i32"), HOPPER, 2, product_by_boxes),
    "ampere": Kernel("matmul", 80, 4, 3, POINTERS | NUMBERS, UNIT | AMPERE | {"GROUP_M": 8}, 10, product),
    "one warp": Kernel("matmul", 80, 1, 3, POINTERS | NUMBERS, UNIT | AMPERE | {"GROUP_M": 8}, 10, product),
    "softmax": Kernel(
        "softmax", 90, 4, 1,
        {"out_ptr": "*fp32", "x_ptr": "*fp32"} | dict.fromkeys(("x_stride", "out_stride", "rows", "columns"), "i32"),
        {"BLOCK": 512, "STAGES": 4}, 2, softmax, aligned=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    kernel: Kernel
    ptx: str
    shared_bytes: int

    def run(self, ptx=None, edit=lambda arguments: arguments):
        """Launches the kernel, or an edited text of it, or with edited arguments.

        Returns:
            (the tensor that it wrote, what it should hold)
        """
        program, memory = Program(ptx or self.ptx, self.shared_bytes), GlobalMemory()
        arguments, out, right = self.kernel.arguments(memory)
        scratch = len(program.kernel.parameters) - len(arguments)  # pointers that Triton appends, to no memory
        program.run((self.kernel.programs, 1, 1), memory, edit(arguments) + [0] * scratch, Options(max_steps=2000))
        return out, right


@functools.cache
def compiled():
    """Returns all kernels, compiled, by their names in KERNELS."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.simulator.kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name: Compiled(KERNELS[name], *found) for name, found in json.loads(done.stdout).items()}


def main():
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simulator.examples import matmul, persistent_matmul
    from simulator.examples import softmax as softmax_

    functions = {
        "matmul": matmul.matmul.fn, "persistent_matmul": persistent_matmul.persistent_matmul, "softmax": softmax_.softmax,
    }  # fmt: skip
    found = {}
    for name, k in KERNELS.items():
        f = functions[k.name]
        multiples = [i for i, a in enumerate(f.arg_names) if a in k.signature and (k.aligned or k.signature[a][0] == "*")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in multiples}
        signature = {a: k.signature.get(a, "constexpr") for a in f.arg_names}
        source = ASTSource(f, signature, k.constants, attributes)
        binary = compile(source, GPUTarget("cuda", k.arch, 32), {"num_warps": k.warps, "num_stages": k.stages})
        found[name] = binary.asm["ptx"], binary.metadata.shared
    print(json.dumps(found))


if __name__ == "__main__":
    main()
