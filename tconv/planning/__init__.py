"""Decides how a convolution is computed, and needs nothing but the standard library for it.

A pass of a problem is simplified, every kernel, tile and split-K that could take it is priced by a model of the device, and
the plan with the least predicted time is chosen. In reading order:

    device       what a device has and what it reaches at best
    epilogue     what a kernel does with a result before it writes it
    problem      what to compute: extents, strides, padding, dilation, groups; 1-D and 2-D are 3-D with unit extents
    batch_invariance  whether results may depend on what else is in the batch
    simplify     the same result from an easier problem
    addressing   strides and vector widths of a tensor
    tiles        block extents and launch options
    operands     a pass on given tensors: the simplified problem, and how its operands are addressed
    cost         operations, bytes and predicted time of a plan
    family       what the planner and the launcher ask of a kernel: what it can take, its tiles, cost and arguments
    gemm         what the kernels with tl.dot have in common
    gather       answers for kernels/gather.py
    patch        answers for kernels/patch.py
    wgrad        answers for kernels/wgrad.py
    packed       answers for kernels/packed.py
    rows         answers for kernels/rows.py
    depthwise    answers for kernels/depthwise.py
    strip        answers for kernels/strip.py
    tma          answers for kernels/tma.py
    persistent   answers for kernels/persistent.py
    bias         the bias gradient and the copy to channels last
    causal       tiles of kernels/causal.py
    families     all kernels by name
    plan         all plans of a pass, the chosen one, and plans forced by hand
    normalise    what a normalisation computes, and the tiles and chunks of its kernels
    borders      the gradient of an input that is padded with its own elements
"""
