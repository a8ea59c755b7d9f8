"""Triton's third tutorial: a product of matrices by blocks, with an activation, and an autotuner over tiles."""

import sys

import torch
import triton
import triton.language as tl

import simulator

simulator.install(sys.argv[1] if len(sys.argv) > 1 else "sm_90")

TILES = [(128, 128, 64, 3, 8), (64, 32, 32, 4, 4), (16, 16, 16, 2, 1)]  # BLOCK_M, _N, _K, stages, warps
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_stages=stages, num_warps=warps)
    for m, n, k, stages, warps in TILES
]


@triton.autotune(CONFIGS, key=["M", "N", "K"])  # in the simulator each configuration runs once, none is faster than another
@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs go through the tiles by groups of rows, which share columns of b in the L2 cache.
    pid, rows, columns = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * columns) * GROUP_M
    height = min(rows - first, GROUP_M)
    pid_m, pid_n = first + pid % (GROUP_M * columns) % height, pid % (GROUP_M * columns) // height

    offs_m, offs_n = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M, (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    c = tl.where(acc >= 0, acc, 0.01 * acc).to(c_ptr.dtype.element_ty)

    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn  # [BLOCK_M, BLOCK_N]
    tl.store(c_ptrs, c, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


def main() -> None:
    m, n, k = 136, 152, 104
    for dtype, eps in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2**-9)):  # fp32 as TF32
        for transposed in (False, True) if dtype == torch.float16 else (False,):
            a, c = torch.randn(m, k).to(dtype), torch.full((m, n), float("nan"), dtype=dtype)
            b = torch.randn(n, k).to(dtype).t() if transposed else torch.randn(k, n).to(dtype)
            matmul[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)](
                a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride()
            )
            right = a.double() @ b.double()
            right = torch.where(right >= 0, right, 0.01 * right)
            torch.testing.assert_close(c.double(), right, rtol=eps, atol=eps * k**0.5)


if __name__ == "__main__":
    main()
