"""Decides how a convolution is computed, and needs nothing but the standard library for it.

A pass of a problem is simplified, every kernel, tile and split-K that could take it is priced by a model of the device, and
the plan with the least predicted time is chosen. In reading order:

    device       what a device has and what it reaches at best
    problem      what to compute: extents, strides, padding, dilation, groups; 1-D and 2-D are 3-D with unit extents
    simplify     the same result from an easier problem
    tiles        the tiles of each kernel, and which of them a device can run
    strips       how depthwise problems are cut for the strip kernels
    cost         operations, bytes and predicted time of a plan
    interpreter  tiles for Triton's interpreter
    plan         all plans of a pass, the chosen one, and plans forced by hand
"""
