"""The kernels, in Triton and, one of them, in Gluon. Each file opens with what it computes.

They know neither torch nor problems: a launch hands them extents, strides and constants, which the file of the same name in
planning/ works out. In reading order:

    common      numbering of tiles and phases, offsets, masks, and what else several kernels do
    epilogue    what kernels do with a result before they write it, and the gradient of an activation
    gather      fprop and dgrad as implicit GEMM, operands loaded by pointers
    patch       dgrad of patches that do not overlap, as one product
    wgrad       the weight gradient as implicit GEMM
    packed      fprop, dgrad and wgrad of few channels: several taps, or several groups, side by side in one product
    rows        fprop and dgrad with few written channels: each pixel is multiplied by a row of taps at once
    depthwise   fprop, dgrad and wgrad of depthwise layers, without tensor cores
    strip       the same, several neighbouring outputs to a thread
    tma         fprop, dgrad and wgrad, operands brought by the tensor memory accelerator
    persistent  fprop and dgrad of unit stride, the same with programs that stay and a warp that only fetches, in Gluon
    causal      causal depthwise convolutions of sequences, with states: forward, gradients and decode step
    reduce      sums the parts of a split-K reduction, and computes the bias gradient
    copy        copies an operand to channels last
    quantize    rounds a tensor to fp8
    normalise   group and RMS normalisation with an activation, and their gradients
    borders     adds to an input's gradient what belongs to padding that repeats the input
"""
