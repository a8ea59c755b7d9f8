"""Triton's second tutorial, a softmax of rows by programs that take several rows each, pipelined, and its reductions."""

import sys

import torch
import triton
import triton.language as tl

import simulator

simulator.install(sys.argv[1] if len(sys.argv) > 1 else "sm_90")


@triton.jit
def softmax(out_ptr, x_ptr, x_stride, out_stride, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * x_stride + c, mask=c < columns, other=-float("inf"))
        powers = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * out_stride + c, powers / tl.sum(powers, axis=0), mask=c < columns)


def main() -> None:
    for rows, columns, warps in ((83, 781, 8), (5, 1000, 4), (3, 20, 1)):
        x = torch.randn(rows, columns)
        out = torch.full_like(x, float("nan"))
        softmax[(min(rows, 16),)](
            out, x, x.stride(0), out.stride(0), rows, columns, BLOCK=triton.next_power_of_2(columns), STAGES=4, num_warps=warps
        )
        torch.testing.assert_close(out, torch.softmax(x, 1))


if __name__ == "__main__":
    main()
