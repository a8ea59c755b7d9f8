"""A pass on given tensors, in numbers only: its simplified problem, and how its operands are addressed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tconv.planning.addressing import LIMIT, Addressing, merged, vector
from tconv.planning.epilogue import NONE, Epilogue
from tconv.planning.problem import STATE, ConvProblem
from tconv.planning.simplify import Form, Strides, all_tiled, simplify
from tconv.planning.tiles import BF16X6, Access, Tile


@dataclass(frozen=True)
class Operands:
    """The layout of a pass's operands, as far as planning depends on it.

    Attributes:
        itemsize: bytes of an element.
        tensor_cores: True if the precision asked for lets tensor cores compute the products.
        narrow: True if an operand's layout or alignment allows only element-by-element access.
        room: the most elements of a tile's accumulators for which the accesses leave enough registers.
        strips: for strip kernels, (flip, narrow): whether the operand read has no contiguous channels (usually its columns
            are contiguous), and whether an operand is accessed element by element; None if as `narrow` says.
        pack_narrow: maps the groups per pack to `narrow` for a packed kernel, which ignores how weights are accessed; None if
            as `narrow` says.
        epilogue: what is done with the result before it is written.
        along: vector width along the last dimension of the operand read, if its channels are not contiguous; for rows.
        written: bytes of an element of the result; 0 if those are as many.
    """

    itemsize: int
    tensor_cores: bool
    narrow: bool = False
    room: int = 256 * 128
    strips: tuple[bool, bool] | None = None
    pack_narrow: Callable[[int], bool] | None = None
    epilogue: Epilogue = NONE
    along: int = 1
    written: int = 0

    def access(self, narrow: bool, precision: str) -> Access:
        """Returns how a kernel accesses the operands in a precision, given whether it does so element by element."""
        cores = self.tensor_cores or precision == BF16X6
        return Access(
            self.itemsize, cores, narrow, room=self.room, precision=precision, epilogue=self.epilogue, written=self.written
        )  # fmt: skip


@dataclass(frozen=True)
class Stream:
    """What a chunk of a stream has beside its operands.

    Attributes:
        state: addressing of the state [N, C, P, *frame], P frames that come before the chunk; None at the beginning, where the
            P frames are zeros.
        kept: the frames of the next state.
        first: the first of them, counted from that of the chunk.
    """

    state: Addressing | None
    kept: int
    first: int


class Pass:
    """A pass on given tensors, after its problem was simplified (planning/simplify.py).

    Attributes:
        pass_: "fprop", "dgrad" or "wgrad".
        p: the simplified problem.
        rules: names of the rewrites that were applied.
        x, w, y: addressing of (x, w, y) for fprop, (dy, w, dx) for dgrad, and (x, dw, dy) for wgrad, or (dy, dw, x) if
            `swapped`.
        read, wrote: channels, over all groups, of the tensors that x and y stand for.
        extents_read, extents: spatial extents of the tensors that x and y stand for.
        itemsize: bytes of an element.
        tensor_cores: True if the precision asked for lets tensor cores compute the products.
        x_vec, y_vec: vector widths along channels within a group.
        direct_x, direct_y: the same across groups, for kernels of depthwise layers.
        lanes_x, lanes_y: vectors along any axis, for strip kernels.
        pixels_x: vector width along the pixels of x, if a kernel can read it so: for pointwise problems in the default layout,
            which then need no copy to channels last; else 1.
        pixels_y: the same of y in a wgrad, whose pixels are read too; else vector width along the pixels written, 1 if the
            channels are contiguous, or a strided dgrad's phases lie between each other.
        row_x: vector width along the last dimension of x, whose channels are then not contiguous, for elements of 16 bits; else
            1.
        row_y: the same of y in any dtype, 1 if `pixels_y` would be for its phases.
        epilogue: what is done with the result before it is written.
        batch_invariant: True if an image's result must not depend on the batch.
    """

    epilogue = NONE

    def __init__(
        self,
        pass_: str,
        problem: ConvProblem,
        x: Addressing,
        w: Addressing,
        y: Addressing,
        tensor_cores: bool,
        channels_stay: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        """Simplifies the problem.

        Args:
            x, w, y: (x, w, y) for fprop, (dy, w, dx) for dgrad, (x, dw, dy) for wgrad.
            channels_stay: keep the output channels as they are, because something is added to each, or multiplied by, in a
                transposed forward.
        """
        self.pass_, self.transposed, self.batch_invariant = pass_, pass_ == "dgrad", batch_invariant
        self.itemsize, self.tensor_cores = x.itemsize, tensor_cores
        before = [y, w, x] if self.transposed else [x, w, y]
        big, weight, small = (Strides(a.outer, a.channel, a.spatial) for a in before)
        form = Form(problem, big, weight, small)
        if not problem.streamed:  # the rules would have to hold for the state's strides too
            form = simplify(form, pass_, channels_stay, batch_invariant)
        self.rules, self.p = form.rules, form.p
        p = self.p
        if self.swapped:
            before.reverse()
        x, self.w, y = (
            dataclasses.replace(a, outer=s.outer, channel=s.channel, spatial=s.spatial, unit=s.channel == 1)
            for a, s in zip(before, (form.x, form.w, form.y), strict=True)
        )
        if self.transposed:
            x, y = y, x
        self.x, self.y = x, y
        self.read, self.wrote = (p.K, p.C) if self.transposed else (p.C, p.K)
        self.extents_read, self.extents = (p.Y, p.X) if self.transposed else (p.X, p.Y)
        self.x_vec, self.y_vec = x.wide(self.ci), y.wide(self.co)
        self.direct_x = x.wide(self.wrote) if p.depthwise and p.multiplier == 1 else 1
        self.direct_y = y.wide(self.wrote) if p.depthwise else 1
        self.lanes_x, self.lanes_y = x.lanes(self.wrote, self.extents_read), y.lanes(self.wrote, self.extents)
        self.pixels_x = x.pixels(p.X) if self.native and not x.unit else 1
        written = not (self.transposed and max(p.S) > 1) if pass_ != "wgrad" else self.native
        self.pixels_y = y.pixels(self.extents) if written and not y.unit else 1
        self.row_x = self.lanes_x.vec if self.itemsize == 2 and self.lanes_x.unit == "p" else 1
        self.row_y = self.lanes_y.vec if written and self.lanes_y.unit == "p" else 1

    @property
    def swapped(self) -> bool:
        """True for a wgrad in which x and dy are swapped."""
        return "swap" in self.rules

    @property
    def native(self) -> bool:
        """True if the pixels read are those written, so that x can be read along them. For elements of 16 bits only.

        wgmma cannot turn the tiles of wider ones, and each 3x3 filter's tap is at another alignment.
        """
        p = self.p
        return self.itemsize == 2 and p.taps == 1 and max(p.S) == 1 and not any(p.P) and p.X == p.Y

    @property
    def ci(self) -> int:
        """Channels per group of the tensor that x stands for."""
        return self.read // self.p.G

    @property
    def co(self) -> int:
        """Channels per group of the tensor that y stands for."""
        return self.wrote // self.p.G

    def pack_vectors(self, groups: int) -> tuple[int, int]:
        """Returns the vector widths of x and y in a packed kernel whose tiles hold so many groups."""
        return self.x.wide(groups * self.ci, self.read), self.y.wide(groups * self.co, self.wrote)

    def operands(self) -> Operands:
        """Returns what the planner asks about the operands."""
        raise NotImplementedError

    def _operands(self, least: int, room: int, pack_narrow: Callable[[int], bool]) -> Operands:
        """Returns what the planner asks, given the least vector width of the accesses within a group."""
        narrow = (min(self.direct_x, self.direct_y) if self.p.depthwise else least) == 1
        strips = self.lanes_x.unit != "c", min(self.lanes_x.vec, self.lanes_y.vec) == 1
        written = self.y.itemsize if self.epilogue.result else 0
        return Operands(
            self.itemsize, self.tensor_cores, narrow, room, strips, pack_narrow, self.epilogue, self.row_x, written
        )  # fmt: skip

    def integers(self, tile: Tile, splits: int) -> dict[str, int]:
        """Returns the integers that the kernels of this pass share, by the names of their parameters."""
        raise NotImplementedError

    def constants(self, tile: Tile, splits: int, dot: bool) -> dict[str, Any]:
        """Returns the compile-time constants that the kernels of this pass share, by the names of their parameters."""
        raise NotImplementedError

    def slices(self) -> list[tuple[int, int]] | None:
        """Returns the dimensions of a workspace slice, outermost first, each as its extent and its stride in the result.

        None if a slice lies as the result does.
        """
        return None


class GatherPass(Pass):
    """fprop or dgrad on given tensors; x is the tensor read and y the tensor written.

    Attributes:
        bias: the bias's stride, None without a bias.
        reduced, written, group: strides of w along the reduced channels, the written channels and the groups.
        stream: of a chunk of a stream, else None.
        inner: the contiguous channel axis of w: "i" (reduced), "o" (written) or "" for neither.
        w_vec: vector width along that axis within a group.
    """

    def __init__(
        self,
        pass_: str,
        problem: ConvProblem,
        x: Addressing,
        w: Addressing,
        y: Addressing,
        tensor_cores: bool,
        bias: int | None = None,
        epilogue: Epilogue = NONE,
        batch_invariant: bool = False,
        stream: Stream | None = None,
    ) -> None:
        self.stream = stream
        stay = pass_ == "dgrad" and (bias is not None or epilogue.per_channel)
        super().__init__(pass_, problem, x, w, y, tensor_cores, stay, batch_invariant)
        self.bias, self.epilogue, w = bias, epilogue, self.w
        self.reduced, self.written = (w.outer, w.channel) if self.transposed else (w.channel, w.outer)
        self.group = self.p.K // self.p.G * w.outer
        self.inner, self.w_vec = _weight_axis(w, self.transposed), 1
        if self.inner:
            outer, extent = (self.written, self.ci) if self.inner == "i" else (self.reduced, self.co)
            self.w_vec = vector(w.address, w.itemsize, outer, *w.spatial, self.group, extent)

    def operands(self) -> Operands:
        # y counts only if its channels are contiguous. If they are not, the accumulator is transposed and stored along its
        # pixels, at no loss.
        read = max(self.x_vec, self.pixels_x)
        least = min(read, self.w_vec, self.y_vec if self.y.unit else read)
        # The larger tiles have no registers to spare for the addresses of narrower accesses, and the largest ones none for the
        # pixels of a 3-D dgrad either.
        room = 256 * 128 if self.itemsize * least == 16 else 128 * 128
        # Nor for the addresses of a residual.
        if (self.transposed and self.p.rank == 3 and self.y.unit) or self.epilogue.tensors:
            room = min(room, 128 * 192)
        return self._operands(least, room, lambda groups: self.pack_vectors(groups)[0] == 1)

    def integers(self, tile: Tile, splits: int) -> dict[str, int]:
        return {
            "N": self.p.N, "C": self.wrote, "CI": self.ci, "CO": self.co, "G": self.p.G, **window(self.p),
            **triple("X", self.extents_read), **triple("Y", self.extents), **strides("sx", self.x),
            **triple("sw", self.w.spatial), **strides("sy", self.y), "sb": self.bias or 0,
            "sxg": self.ci * self.x.channel, "syg": self.co * self.y.channel,
            "swg": self.group, "swi": self.reduced, "swo": self.written, "swk": self.w.outer,
        }  # fmt: skip

    def constants(self, tile: Tile, splits: int, dot: bool) -> dict[str, Any]:
        p, state = self.p, self.stream.state if self.stream else None
        held = 0 if state is None else state.reach + state.halo(p)
        return {
            "TRANSPOSED": self.transposed, "RANK": p.rank, **border_constants(p), "X_UNIT": self.x.unit, "Y_UNIT": self.y.unit,
            "HAS_BIAS": self.bias is not None, "W_UNIT": self.inner, "W_VEC": self.w_vec,
            # Offsets may pass the ends of x by the halo: the first tap may be outside x while a later one is inside.
            "WIDE": max(self.x.reach + self.x.halo(p), held, self.y.reach, p.N * math.prod(self.extents) + tile.m) > LIMIT,
            # If pixels are contiguous, they become the accumulator's columns. Its rows are channels, and wgmma needs 64 rows.
            "FLIP": not (self.x.unit and self.y.unit) and (self.itemsize > 2 or (tile.extra or tile.n) >= 64 or not dot),
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_C": tile.n,
        }  # fmt: skip


class PatchPass(GatherPass):
    """dgrad of patches that do not overlap and cover dx, as a product of dy's pixels by columns: the channels of every tap.

    Its problem has as many channels as there are columns, one tap, and dy's extents. The stride of y (dx) along a dimension is
    that from one patch to the next.

    Attributes:
        rows: the columns' dimensions but for the last, outermost first, each as its extent and its stride in dx.
        run: the columns of the last dimension, which is contiguous.
        joined: `run`, if runs are so short that those of neighbouring pixels are stored together; else 1.
        line_vec: vector width along a run, or along joined ones.
    """

    def __init__(
        self,
        problem: ConvProblem,
        x: Addressing,
        w: Addressing,
        y: Addressing,
        tensor_cores: bool,
        bias: int | None = None,
        epilogue: Epilogue = NONE,
        batch_invariant: bool = False,
    ) -> None:
        """Raises ValueError, with the reason, if the columns of w or of dx do not lie so that vectors can be accessed."""
        channels = problem.C // problem.G
        if not all_tiled(problem):
            raise ValueError(f"{problem} has no patches that cover dx and do not overlap")
        ways = [(channels, w.channel, y.channel), *zip(problem.T, w.spatial, y.spatial, strict=True)]
        for inner, order in ((problem.taps, ways), (1, ways[1:] + ways[:1])):
            *self.rows, (self.run, unit) = merged((extent, step) for extent, _, step in order)
            lying = merged((extent, step) for extent, step, _ in order)
            if unit == 1 and len(self.rows) <= 3 and lying == [(channels * problem.taps, 1)]:
                self.each = inner
                break
        else:
            raise ValueError("w and dx do not have the same order of channels and taps in memory")
        p = dataclasses.replace(problem, C=problem.C * problem.taps, X=problem.Y, T=(1, 1, 1), S=(1, 1, 1))
        self.channels, self.between = channels, channels * y.channel if problem.G > 1 else 0
        s0, s1, s2 = (t * s if n > 1 else 0 for n, t, s in zip(problem.Y, problem.T, y.spatial, strict=True))
        y = dataclasses.replace(y, channel=1, spatial=(s0, s1, s2), unit=True)
        w = dataclasses.replace(w, channel=1, spatial=(0, 0, 0), unit=True)
        super().__init__("dgrad", p, x, w, y, tensor_cores, bias, epilogue, batch_invariant)
        self.rules = ("columns", *self.rules)
        y, extent = self.y, self.p.X[2]
        short, alone = self.run * self.itemsize < 16, extent == 1
        if short and (self.run & (self.run - 1) or not (alone or y.spatial[2] == self.run)):
            raise ValueError(f"{self.run} contiguous columns are too few, and cannot be joined with those of the next pixel")
        self.joined = self.run if short else 1
        along = (extent * self.run,) if short else (self.run, y.spatial[2])
        steps = (y.outer, self.between, *(step for _, step in self.rows), *y.spatial[:2])
        self.line_vec = vector(y.address, y.itemsize, *steps, *along)

    def operands(self) -> Operands:
        least = min(max(self.x_vec, self.pixels_x), self.w_vec)
        return self._operands(least, 256 * 128 if self.itemsize * least == 16 else 128 * 128, lambda groups: least == 1)

    def columns(self) -> dict[str, int]:
        """Returns where columns lie in dx, and their channels, as kernel arguments."""
        (_, r0), (e1, r1), (e2, r2) = [(1, 0)] * (3 - len(self.rows)) + self.rows
        named = {"L": self.run, "R1": e1, "R2": e2, "r0": r0, "r1": r1, "r2": r2}
        return named | {"syg": self.between, "b_each": self.each, "b_all": self.channels}

    def far(self, tile: Tile) -> bool:
        """Returns True if offsets need 64 bits."""
        pixels = self.p.N * math.prod(self.p.X) + tile.m
        return max(self.x.reach, self.y.reach, pixels * self.joined) > LIMIT


class WgradPass(Pass):
    """wgrad on given tensors; y is dy and x is x as the kernel takes them, w is dw.

    Attributes:
        stored: (input channels, output channels) of dw per group, fewer than x and dy have if their copies are padded.
    """

    def __init__(
        self,
        problem: ConvProblem,
        x: Addressing,
        dw: Addressing,
        dy: Addressing,
        tensor_cores: bool,
        stored: tuple[int, int] | None = None,
    ) -> None:
        """Simplifies the problem.

        Args:
            stored: as above if channels are padded, None if not. Rewrites may change channels that are not padded.
        """
        super().__init__("wgrad", problem, x, dw, dy, tensor_cores)
        self.stored = (self.ci, self.co) if stored is None else stored[::-1] if self.swapped else stored

    def operands(self) -> Operands:
        least = min(max(self.x_vec, self.pixels_x), max(self.y_vec, self.pixels_y))
        room = 256 * 128 if self.itemsize * least == 16 else 128 * 128
        return self._operands(least, room, lambda groups: min(self.pack_vectors(groups)) == 1)

    def integers(self, tile: Tile, splits: int) -> dict[str, int]:
        p, w = self.p, self.written(splits)
        return {
            "N": p.N, "C": self.ci, "K": self.co, "CW": self.stored[0], "KW": self.stored[1], "G": p.G,
            **window(p), **triple("X", p.X), **triple("Y", p.Y),
            **self.steps(p.Y, tile, splits), **strides("sx", self.x), **strides("sy", self.y), **triple("sw", w.spatial),
            "sws": w.numel, "swg": self.co * w.outer, "swk": w.outer, "swc": w.channel,
            "sxg": self.ci * self.x.channel, "syg": self.co * self.y.channel,
        }  # fmt: skip

    def constants(self, tile: Tile, splits: int, dot: bool) -> dict[str, Any]:
        p, w = self.p, self.written(splits)
        return {
            "RANK": p.rank, "X_UNIT": self.x.unit, "W_UNIT": w.unit, "Y_UNIT": self.y.unit, "WIDE": self.far(p.Y, tile),
            **border_constants(p), "W_VEC": w.wide(self.stored[0]), "BLOCK_P": tile.k, "BLOCK_K": tile.m, "BLOCK_C": tile.n,
        }  # fmt: skip

    def written(self, splits: int) -> Addressing:
        """Returns how the kernel addresses what it writes: dw, or with several splits a slice of the workspace.

        The dimensions of a slice are output channels, taps and input channels, so that the rows of a tile lie in one piece
        each. In the default layout dw's own rows are scattered: each element of a 3x3 filter would touch a sector of its own.
        """
        if splits == 1:
            return self.w
        channels = self.stored[0]
        outer, a, b, c = (math.prod((*self.p.T, channels)[d:]) for d in range(4))
        return Addressing(0, max(4, self.itemsize), self.w.numel, outer, 1, (a, b, c), channels > 1, self.w.numel - 1)

    def slices(self) -> list[tuple[int, int]]:
        w, (c, k) = self.w, self.stored
        return merged([(k * self.p.G, w.outer), *zip(self.p.T, w.spatial, strict=True), (c, w.channel)])

    def steps(self, extents: tuple[int, int, int], tile: Tile, splits: int) -> dict[str, int]:
        """Returns how the reduction over the images and these extents advances: pixels per split, and an iteration's digits."""
        pixels = self.p.N * math.prod(extents)
        return {"chunk": chunk(pixels, tile.k, splits), **digits(tile.k, extents)}

    def far(self, extents: tuple[int, int, int], tile: Tile) -> bool:
        """Returns True if offsets need 64 bits in a reduction over the images and these extents."""
        pixels = self.p.N * math.prod(extents) + tile.k
        return max(self.x.reach + self.x.halo(self.p), self.y.reach, pixels) > LIMIT


def _weight_axis(w: Addressing, transposed: bool) -> str:
    """Returns the weight's contiguous channel axis: "i" for the reduced one, "o" for the written one, or ""."""
    if w.unit:
        return "o" if transposed else "i"
    if w.outer == 1:
        return "i" if transposed else "o"
    return ""


def chunk(reduced: int, block: int, splits: int) -> int:
    """Returns the pixels or channels per split: the least multiple of `block` with which `splits` splits are enough."""
    return math.ceil(math.ceil(reduced / block) / splits) * block


def digits(block: int, extents: tuple[int, int, int]) -> dict[str, int]:
    """Returns a step of `block` pixels as kernel arguments: whole images (Bn) and output coordinates (B0, B1, B2)."""
    rest, found = block, {}
    for d in (2, 1, 0):
        found[f"B{d}"] = rest % extents[d]
        rest //= extents[d]
    return {**found, "Bn": rest}


def triple(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """Returns the values as kernel arguments named prefix0, prefix1 and prefix2."""
    return {f"{prefix}{i}": v for i, v in enumerate(values)}


def strides(prefix: str, a: Addressing) -> dict[str, int]:
    """Returns a tensor's strides as kernel arguments: prefix + n, c, 0, 1 and 2."""
    return {f"{prefix}n": a.outer, f"{prefix}c": a.channel, **triple(prefix, a.spatial)}


def window(p: ConvProblem) -> dict[str, int]:
    """Returns filter extents T, stride S, dilation D, leading padding P and g = gcd(S, D) as kernel arguments."""
    common = [math.gcd(s, d) for s, d in zip(p.S, p.D, strict=True)]
    return triple("T", p.T) | triple("S", p.S) | triple("D", p.D) | triple("P", p.P) | triple("g", common)


def border_constants(p: ConvProblem) -> dict[str, str]:
    """Returns what reads beyond x find, as kernel constants: BORDER0, BORDER1 and BORDER2."""
    return {f"BORDER{d}": border for d, border in enumerate(p.borders)}


def streaming(c: GatherPass) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the integers and constants of what a kernel reads and writes beside the operands of a chunk of a stream."""
    stream, p = c.stream, c.p
    state = stream.state if stream else None
    integers = dict.fromkeys(("ssn", "ssc", "ss0", "ss1", "ss2"), 0) if state is None else strides("ss", state)
    constants: dict[str, Any] = {
        "STATE": state is not None, "NEXT": stream is not None, "S_UNIT": state is not None and state.unit,
        "S_VEC": 1 if state is None else state.wide(c.ci),
    }  # fmt: skip
    if state is None:  # at its beginning a stream finds zeros
        constants |= {name: "zeros" for name, border in border_constants(p).items() if border == STATE}
    kept, first = (stream.kept, stream.first) if stream else (0, 0)
    return {"kept": kept, "first": first, **integers}, constants


def tails(c: Pass, tile: Tile) -> int:
    """Returns the programs that write the next state of a stream; 0 without one."""
    if not isinstance(c, GatherPass) or c.stream is None:
        return 0
    frame = math.prod(c.p.X[4 - c.p.rank :])
    return math.ceil(c.p.N * c.stream.kept * frame / tile.m) * math.ceil(c.p.C / tile.k)
