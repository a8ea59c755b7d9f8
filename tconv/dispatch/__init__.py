"""Takes a call of PyTorch apart: whether tconv computes it, as which problem, and in which of PyTorch's contexts.

A plain tensor's call goes to the kernels under autograd's own functions. torch.compile, vmap, modes and torch's own fake
tensors get registered operators. Any other call, such as one with a user's tensor subclass, falls back to torch. In reading
order:

    context         whether a kernel may run here: plain tensors, modes, transforms, precision
    dynamo          marks code that torch.compile must not compile
    window          padding, stride and dilation of a call; padding and cropping around one
    support         what kernels exist for: dtypes, devices, sizes
    check           what torch would accept
    sides           padding that differs by side, where torch computes a call
    autocast        casts to autocast's dtype
    equivalents     tconv's operators in aten's
    derivatives     gradients of the three operations by each other
    batching        vmap's rules for tconv's operators
    flops           FLOPs of tconv's operators, for torch's counter
    operators       tconv's registered operators
    autograd        forward and backward over launches
    steps           the steps of an epilogue, one after the other
    chain_rule      gradients of a convolution with an epilogue
    fast_path       a call that repeats an earlier one
    fused           forward and backward of a convolution with an epilogue over launches
    fused_operator  the same as a registered operator
    fp8             fprop and dgrad of fp8 operands, and the rounding to fp8, as registered operators
    entry           a call of one of the six functions
    epilogues       the same with an epilogue
    norm_calls      checks of a normalisation's call, and its sequence of PyTorch's functions
    normalised      forward and backward of a normalisation over launches
    norm_operator   the same as a registered operator
    norms           a call of one of the two normalisations
    stream_ops      a chunk of a stream by a kernel, as a registered operator, and by concatenation
    stream          convolutions of a stream, chunk by chunk
    sequences       causal depthwise convolutions of sequences by PyTorch's functions
    causal_ops      the same by kernels, as registered operators
    causal          calls of causal depthwise convolutions of sequences, and their decode step
    selection       which shapes and layers `enable()` takes
    aten            what `enable()` runs in place of aten's `_convolution` and `convolution_backward`
    scope           which modules `enable(model)` holds in
    registration    registers tconv's kernels for aten's operators, and finds the kernels registered before, for fallbacks
"""
