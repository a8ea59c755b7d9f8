"""Turns a plan into launches of kernels, and keeps what it worked out.

What a launch needs besides its pointers is worked out once per kind of call; later calls of that kind allocate the result and
launch. In reading order:

    record         what is told to `last_calls()`: a call, its plan, or why torch computed it
    cache          a dictionary that clears itself when it is full
    dry_run        calls that are planned and recorded but not computed
    profiling      events for torch.profiler
    memory_format  strides; the memory format of a result (under `enable()`, dispatch/aten.py asks torch); 64-bit offsets
    arguments      a launch without its pointers
    descriptors    tensor descriptors of a launch, Triton's or Gluon's
    fences         the fence that Triton before 3.7.1 leaves out of kernels with wgmma
    first_sight    what measures a pass when it is first seen: the tuner, which is above
    memory_bound   works out launches of kernels that multiply nothing: sums of pixels, copies, borders, roundings
    prepare        works out a launch: pointers or TMA, operands as they are or copied to channels_last
    compiled       launches a kernel, directly from the second time on; knows what is compiled and what failed
    self_check     whether TMA, specialised warps, BF16X6 and dependent launches are right on a device, asked of the device
    frozen         the copies of frozen weights, which are kept between calls
    launch         fprop, dgrad, wgrad and the bias gradient: allocates the result and the workspace, and launches
    normalise      normalisations, forward and backward
    causal         the launches of kernels/causal.py
    workers        compiles kernels in parallel, in other processes
    variants       every kernel variant that the planner can choose, for scripts/codegen.py
"""
