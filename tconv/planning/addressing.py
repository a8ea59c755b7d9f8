"""How a kernel reaches a tensor's elements: strides, vector widths and the axis that is contiguous. Numbers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tconv.planning.problem import ConvProblem

LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Lanes:
    """How a tensor's elements can be accessed as vectors.

    Attributes:
        unit: the contiguous axis: "c" for channels, "p" for the last spatial dimension, "" for neither.
        vec: the vector width along it, in elements.
    """

    unit: str
    vec: int


@dataclass(frozen=True)
class Addressing:
    """The address and the strides of a tensor, with its spatial dimensions padded to three in front.

    The stride of a dimension of extent one is set to zero, because torch may leave any value there.

    Attributes:
        address: of the first element, in bytes.
        itemsize: bytes of an element.
        numel: number of elements.
        outer: stride of the first dimension, in elements: the batch, or a weight's first axis.
        channel: stride of the second dimension, in elements.
        spatial: strides of the three spatial dimensions, in elements.
        unit: True if the channel stride is one and there is more than one channel.
        reach: the largest offset of an element, in elements.
    """

    address: int
    itemsize: int
    numel: int
    outer: int
    channel: int
    spatial: tuple[int, int, int]
    unit: bool
    reach: int

    def wide(self, *channels: int) -> int:
        """Returns the vector width along the channels; it divides each of `channels`. 1 if channels are not contiguous."""
        return vector(self.address, self.itemsize, self.outer, *self.spatial, *channels) if self.unit else 1

    def lanes(self, channels: int, extents: Sequence[int]) -> Lanes:
        """Returns the lanes of a tensor that has so many channels and such spatial extents where it is accessed."""
        if self.unit:
            return Lanes("c", self.wide(channels))
        if self.spatial[2] != 1:
            return Lanes("", 1)
        return Lanes("p", vector(self.address, self.itemsize, self.outer, self.channel, *self.spatial[:2], extents[2]))

    def pixels(self, extents: Sequence[int]) -> int:
        """Returns the vector width along the pixels of an image, if they all lie one after the other; else 1."""
        a, (_, _, plane), rank = flattened(self, extents)
        return vector(a.address, a.itemsize, a.outer, a.channel, plane) if rank == 1 and a.spatial[2] == 1 else 1

    def halo(self, problem: ConvProblem) -> int:
        """Returns an upper bound, in elements, on how far a masked-out read may point past either end of the tensor."""
        taps = (abs(t * d) + abs(p) + s for t, d, p, s in zip(problem.T, problem.D, problem.P, problem.S, strict=True))
        return sum(t * s for t, s in zip(taps, self.spatial, strict=True))

    def pixel_stride(self, extents: tuple[int, int, int, int]) -> int | None:
        """Returns the one stride with which all pixels lie, those of the next image behind the last; None if there is none.

        Args:
            extents: of the images and the spatial dimensions.
        """
        first, step = 0, None
        for extent, stride in zip(extents[::-1], (self.outer, *self.spatial)[::-1], strict=True):
            if extent > 1:
                first, step = (stride, stride) if step is None else (first, step)
                if stride != step:
                    return None
                step *= extent
        return first

    def boxed(self, shape: tuple[int, ...], last: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Returns (shape, strides) for a tensor descriptor, channels last; None if the tensor is not eligible for TMA.

        It is eligible if its channels are contiguous and its address and strides are multiples of 16 bytes.

        Args:
            shape: extents in the order of the descriptor, channels last.
            last: the axis to move next to the channels. If a box is longer than one along this axis and the channels only,
                the tensor cores read it from shared memory directly; otherwise it passes through registers.
        """
        aligned = 16 // self.itemsize
        pairs = list(zip(shape[:-1], (self.outer, *self.spatial), strict=True))
        if not self.unit or self.address % 16 or any(n > 1 and (s == 0 or s % aligned) for n, s in pairs):
            return None
        if last is not None:
            pairs.append(pairs.pop(last))
        return (*(n for n, _ in pairs), shape[-1]), (*(s if n > 1 else aligned for n, s in pairs), 1)


def flattened(a: Addressing, extents: Sequence[int]) -> tuple[Addressing, tuple[int, int, int], int]:
    """Merges neighbouring spatial dimensions that one stride can walk.

    Two dimensions are merged if the outer stride equals the inner extent times the inner stride, and the merged extent fits a
    signed 32-bit integer.

    Returns:
        The addressing and the three extents after merging, and the number of spatial dimensions left, at least one. The
        dimensions left come last; those before them have extent one.
    """
    kept = merged(zip(extents, a.spatial, strict=True))
    (e0, s0), (e1, s1), (e2, s2) = [(1, 0)] * (3 - len(kept)) + kept
    return replace(a, spatial=(s0, s1, s2)), (e0, e1, e2), max(1, len(kept))


def merged(dimensions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns dimensions, as (extent, stride), with neighbours merged as by `flattened`; those of extent one are left out."""
    kept: list[tuple[int, int]] = []
    for extent, stride in dimensions:
        if kept and kept[-1][1] == extent * stride and kept[-1][0] * extent <= LIMIT:
            kept[-1] = kept[-1][0] * extent, stride
        elif extent != 1:
            kept.append((extent, stride))
    return kept


def vector(pointer: int, itemsize: int, *multiples: int) -> int:
    """Returns the vector width in elements: the largest, up to 16 bytes, that divides the address and each of `multiples`."""
    v = 16 // itemsize
    while v > 1 and (pointer % (v * itemsize) or any(m % v for m in multiples)):
        v //= 2
    return v


def aligned_channels(channels: int, itemsize: int) -> int:
    """Returns how many channels a copy gets so that they are accessed as vectors: `channels` if they are already.

    A multiple of 16 bytes, or 8 bytes if no more are needed: the least that the main loops copy asynchronously in one
    instruction per pixel. fp64 elements are accessed one by one by most of its tiles, so padding would gain nothing.
    """
    least, most = 8 // itemsize, 16 // itemsize
    if itemsize == 8 or channels % least == 0:
        return channels
    return least if channels < least else -(-channels // most) * most
