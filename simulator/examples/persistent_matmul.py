"""After Triton's ninth tutorial: a product of matrices by tensor descriptors, whose programs take several tiles each."""

import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import simulator

simulator.install(sys.argv[1] if len(sys.argv) > 1 else "sm_90")


@triton.jit
def persistent_matmul(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    columns = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * columns, tl.num_programs(0)):
        m, n = tile // columns * BLOCK_M, tile % columns * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
        c.store([m, n], acc.to(c.dtype))


def main() -> None:
    m, n, k = 136, 152, 104
    for block_m, block_n, block_k, warps in ((64, 32, 32, 4), (128, 64, 16, 8)):
        a, b, c = torch.randn(m, k).half(), torch.randn(k, n).half(), torch.full((m, n), float("nan")).half()
        boxes = (a, [block_m, block_k]), (b, [block_k, block_n]), (c, [block_m, block_n])
        persistent_matmul[(4,)](
            *(TensorDescriptor.from_tensor(tensor, box) for tensor, box in boxes), m, n, k,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_stages=3, num_warps=warps,
        )  # fmt: skip
        torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=2**-10, atol=2**-10 * k**0.5)


if __name__ == "__main__":
    main()
