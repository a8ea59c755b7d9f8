"""What a launch is checked for, and how much of it runs at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How launches run.

    Attributes:
        races: whether accesses of shared memory that no barrier orders are faults.
        async_copy_fence: whether wgmma, which reads shared memory through the asynchronous proxy, may read what a `cp.async`
            wrote only after a `fence.proxy.async`. The kernels of Triton 3.6.0 and before lack that fence (triton#9610, in
            3.7.1 by #10537); turn this off to look at them for anything else.
        elements: whether accesses between a tensor's elements (inside its storage, but of no element) are faults.
        seed: of the order in which the warps of a program run where they take different ways.
        max_steps: a program that is not done after so many basic blocks is stopped with a fault.
        threads_at_once: programs run in batches of about so many threads.
    """

    races: bool = True
    async_copy_fence: bool = True
    elements: bool = True
    seed: int = 0
    max_steps: int = 200_000
    threads_at_once: int = 8192


DEFAULT = Options()
