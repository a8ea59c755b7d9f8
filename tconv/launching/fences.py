"""The fence that Triton before 3.7.1 leaves out of kernels with wgmma.

On Hopper, wgmma reads shared memory through the asynchronous proxy, and a `cp.async` writes it through the generic one. By the
PTX memory model a `fence.proxy.async` must stand between the two. Triton 3.6.0 and 3.7.0 put none there (triton#9610, in 3.7.1
by #10537). Under these versions tconv marks its kernels for Hopper by a launch option, and puts the fence into the PTX of
kernels that have the mark, before ptxas reads it.

The option is an argument of ptxas, so it is part of the key of Triton's cache, and goes wherever the other options go. ptxas
does not know it. So if it reached ptxas, because `install` did not run, the kernel would not compile: none runs without its
fences. Triton's own hook for compiler stages is not used, because any tool may replace it, and because Triton 3.7.0 calls it at
each launch of any kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from triton import __version__

from tconv.planning.device import Device

NEEDED = tuple(int(part) for part in re.findall(r"\d+", __version__)[:3]) < (3, 7, 1)
MARK = "--tconv-fences-asynchronous-copies"
# A wait for asynchronous copies, and its barrier, after which there is no fence before the next wgmma or the end of the block.
UNFENCED = re.compile(
    r"^.*cp\.async\.wait_group.*\n"
    r"(?:[ \t]*(?:\.loc|//|\$L__tmp).*\n)*"  # lines without code
    r"(?:[ \t]*bar\.sync.*\n)?"
    r"(?=(?:(?!.*fence\.proxy\.async).*\n)*?.*(?:wgmma\.mma_async|\$L__BB))",  # $L__BB: a label, or a jump to one
    re.MULTILINE,
)
FENCE = r"\g<0>\tfence.proxy.async.shared::cta;\n"


def marked(device: Device) -> dict[str, str]:
    """Returns the launch option of a kernel with a matrix product that asks for fences, as a dictionary; empty if none is
    missing on that device.
    """
    if not NEEDED or device.generation != 9 or device.interpreted:
        return {}
    install()
    from triton.backends.nvidia.compiler import CUDAOptions

    return {"ptx_options": " ".join(filter(None, [CUDAOptions.ptx_options, MARK]))}


@functools.cache
def install() -> None:
    """Makes Triton's compiler put fences into marked kernels. Does nothing where Triton does so itself."""
    if NEEDED:
        from triton.backends.nvidia.compiler import CUDABackend

        CUDABackend.add_stages = with_fences(CUDABackend.add_stages)


def with_fences(add_stages: Callable[..., None]) -> Callable[..., None]:
    """Returns Triton's function that lists a kernel's compiler stages, changed so that it fences the PTX of marked kernels."""

    def wrapped(backend: Any, stages: dict[str, Any], options: Any, language: Any) -> None:
        given = (options.ptx_options or "").split()
        if MARK not in given:
            return add_stages(backend, stages, options, language)
        rest = " ".join(option for option in given if option != MARK)
        add_stages(backend, stages, dataclasses.replace(options, ptx_options=rest or None), language)
        ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: fenced(ptx(source, metadata))

    return wrapped


def fenced(ptx: str) -> str:
    """Returns a kernel's PTX with a fence between each wait for asynchronous copies and the wgmma that may follow.

    The fence stands where Triton 3.7.1 has it, behind the wait and its barrier. PTX without wgmma is returned as it is.
    """
    return UNFENCED.sub(FENCE, ptx) if "wgmma.mma_async" in ptx else ptx
