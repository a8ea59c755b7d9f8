"""Triton's first tutorial, x + y, run as the code that it is compiled to: `python simulator/examples/vector_add.py`."""

import sys

import torch
import triton
import triton.language as tl

import simulator

simulator.install(sys.argv[1] if len(sys.argv) > 1 else "sm_90")


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask) + tl.load(y_ptr + i, mask=mask), mask=mask)


def main() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64):
        x, y = (torch.randint(-60, 60, (98432,)).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        add[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), BLOCK=1024)
        assert torch.equal(out, x + y)
    try:
        add[(1,)](x[:1000], y[:1000], out[:1000].clone(), 1001, BLOCK=1024)
    except simulator.Fault as fault:
        print(f"Of an n that is too large by one: {fault}")
    else:
        raise AssertionError("an access out of bounds was not noticed")


if __name__ == "__main__":
    main()
