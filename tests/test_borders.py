"""Padding that repeats the input, which the kernels read where it is: as torch.nn.functional.pad and a convolution give it."""

import pytest
import torch
import torch.nn.functional as F

from tconv.launching import launch
from tconv.planning.problem import Geometry, forward_problem

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 5, 6, 7), (1, 5, 4, 5, 6)], ids=str)
def test_what_a_kernel_reads_beyond_the_input(shape, mode, device, poisoned):
    rank = len(shape) - 2
    x = torch.randn(shape, dtype=torch.float64, device=device)
    w = torch.randn((6, 5, *(3,) * rank), dtype=torch.float64, device=device)
    p = forward_problem(shape, w.shape, [1] * rank, [(3, 2)] * rank, [2] * rank, 1, mode)
    y = launch.convolve(launch.convolution(False, Geometry(p, False), x, w, None), x, w, None, False)
    torch.testing.assert_close(y, FORWARD[rank](F.pad(x, [3, 2] * rank, mode=mode), w, dilation=2))
