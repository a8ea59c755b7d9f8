"""tconv's kernels with one mistake each, as compiled code: a check of the simulator's must name it, with the line.

Mistakes are made in Triton's source (a mask, a stride, a hint) or in the PTX that is made of it (a wait, a barrier, a fence, a
count of bytes). Those that only a wrong result shows are in scripts/mutations.py.
"""

import contextlib
import dataclasses
import pathlib
import re
from unittest import mock

import pytest
import torch
import triton

import tconv
from tconv import functional as TF
from tconv.kernels import (
    borders,
    causal,
    common,
    copy,
    depthwise,
    gather,
    normalise,
    packed,
    patch,
    persistent,
    quantize,
    reduce,
    rows,
    strip,
    tma,
    wgrad,
)
from tconv.launching import causal as sequences
from tconv.launching import launch
from tconv.launching.memory_bound import prepare_quantize
from tconv.planning.tiles import Tile
from tests import oracle

KERNELS = pathlib.Path(gather.__file__).parent
DENSE = oracle.Case("dense", (2, 72, 9, 7), 72, (3, 3), padding=1)
TWENTY = oracle.Case("twenty channels", (2, 20, 9, 7), 20, (3, 3), padding=1)
SLICED = oracle.Case("64 of 68 channels of w", (2, 64, 9, 7), 72, (3, 3), padding=1)
PATCHES = oracle.Case("patches", (2, 20, 8, 12), 16, (2, 2), stride=2)
STEM = oracle.Case("stem", (2, 3, 9, 7), 24, (3, 3), padding=1)
LAST = oracle.Case("last", (2, 64, 5, 16), 3, (3, 3), padding=1)
DEPTHWISE = oracle.Case("depthwise", (2, 20, 9, 7), 20, (3, 3), padding=1, groups=20)
BOXES = oracle.Case("boxes", (2, 192, 8, 8), 64, (3, 3), padding=1)


TURNS = oracle.Case("more boxes than slots", (2, 136, 8, 16), 64, (1, 3), padding=(0, 1))
TILES = oracle.Case("five tiles of three steps", (5, 64, 8, 16), 64, (1, 3), padding=(0, 1))
PIXELS = oracle.Case("boxes of two extents", (4, 72, 16, 16), 64, (1, 2), padding=(0, 1))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that launches a kernel: a forward pass, or if `of` is not empty the gradient of that operand.

    Attributes:
        sliced: whether w is part of a tensor with four channels more, so that 8 bytes of it are aligned, but not 16.
        units: multiprocessors of the device, of which a program that stays has several tiles.
        more: of an epilogue; a residual where `residual` is true.
    """

    kernel: object
    case: oracle.Case
    plan: dict
    of: str = ""
    channels_last: bool = True
    sliced: bool = False
    units: int = 132
    residual: bool = False
    more: dict = dataclasses.field(default_factory=dict)

    def run(self):
        planned = dataclasses.replace(launch.device_of(torch.empty(0)), units=self.units)
        with mock.patch.object(launch, "device_of", return_value=planned):
            self.on_device()

    def on_device(self):
        x, w, b = oracle.tensors(self.case, torch.bfloat16, "cpu", self.channels_last)
        if self.sliced:
            w = oracle.to_channels_last(torch.cat([w, w[:, :4]], 1))[:, :-4]
        more = dict(self.more)
        if self.residual:  # of the result's shape, which is x's here
            more["residual"] = torch.randn_like(x)
        with tconv.force(**self.plan):
            y = TF.conv2d(x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), **self.case.arguments, **more)
            if self.of:
                torch.autograd.grad(y, {"x": x, "w": w, "b": b}[self.of], torch.ones_like(y))


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """A call that launches a kernel of a normalisation, forward and backward, of groups or of each pixel's channels."""

    kernel: object
    groups: int = 0
    channels_last: bool = True
    pad: object = None

    def run(self):
        x = torch.randn(2, 20, 35, 33, dtype=torch.bfloat16)
        x, w = (oracle.to_channels_last(x) if self.channels_last else x), torch.randn(20, dtype=torch.bfloat16)
        x, w = x.requires_grad_(), w.requires_grad_()
        how = {"pad": self.pad}
        with tconv.force(kernel="gather"):  # then an error is raised, and no fallback made of it
            y = TF.group_norm_silu(x, self.groups, w, w, **how) if self.groups else TF.rms_norm_silu(x, w, **how)
            torch.autograd.grad(y, (x, w), torch.ones_like(y))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A call that launches a kernel of sequences with states, forward and backward."""

    kernel: object
    channels_last: bool = True
    times: int = 37

    def run(self):
        x, state = (
            torch.randn(2, 20, self.times, dtype=torch.bfloat16),
            torch.randn(2, 20, 3, dtype=torch.bfloat16).requires_grad_(),
        )
        x, w = (oracle.to_channels_last(x) if self.channels_last else x).requires_grad_(), torch.randn(20, 4).bfloat16()
        with tconv.force(kernel="gather"):  # as in `Normalisation`
            w, b = w.requires_grad_(), w[:, 0].detach().requires_grad_()
            y, after = TF.causal_conv1d(x, w, b, activation="silu", initial_states=state, return_final_states=True)
            torch.autograd.grad((y, after), (x, w, state), (torch.ones_like(y), torch.ones_like(after)))


@dataclasses.dataclass(frozen=True)
class Token:
    """A decode step, which changes the states of sequences in place."""

    kernel: object

    def run(self):
        x, w = torch.randn(2, 20, 1, dtype=torch.bfloat16), torch.randn(20, 4, dtype=torch.bfloat16)
        with tconv.force(kernel="gather"):
            TF.causal_conv1d_update(x, torch.randn(2, 20, 3, dtype=torch.bfloat16), w, activation="silu")


@dataclasses.dataclass(frozen=True)
class Borders:
    """The gradient of an input that is padded by reflection."""

    kernel: object

    def run(self):
        x, w = (oracle.to_channels_last(torch.randn(s, dtype=torch.bfloat16)) for s in ((2, 72, 9, 7), (8, 72, 3, 3)))
        with tconv.force(kernel="gather"):
            y = TF.conv2d(x.requires_grad_(), w, padding=(1, 2), padding_mode="reflect")
            torch.autograd.grad(y, x, torch.ones_like(y))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Rounds to fp8."""

    kernel: object

    def run(self):
        with tconv.force(kernel="gather"):
            tconv.fp8.quantize(torch.randn(3001, dtype=torch.bfloat16), 0.5)


CALLS = {
    "gather": Call(gather.gather, DENSE, {"kernel": "gather"}),
    "gather of a part of w": Call(gather.gather, SLICED, {"kernel": "gather"}, sliced=True),
    "wgrad": Call(wgrad.wgrad, DENSE, {"kernel": "wgrad"}, "w"),
    "wgrad in splits": Call(wgrad.wgrad, TWENTY, {"kernel": "wgrad", "splits": 2}, "w"),
    "sum_splits": Call(reduce.sum_splits, TWENTY, {"kernel": "wgrad", "splits": 2}, "w"),
    "sum_splits into rows": Call(reduce.sum_splits, TWENTY, {"kernel": "wgrad", "splits": 2}, "w", channels_last=False),
    "sum_pixels": Call(reduce.sum_pixels, TWENTY, {"kernel": "wgrad"}, "b"),
    "copy": Call(copy.copy_both, TWENTY, {"staged": True}, channels_last=False),
    "patch": Call(patch.patch, PATCHES, {"kernel": "patch"}, "x"),
    "patch by lines": Call(patch.patch, PATCHES, {"kernel": "patch"}, "x", channels_last=False),
    "packed": Call(packed.packed, STEM, {"kernel": "packed"}),
    "packed_wgrad": Call(packed.packed_wgrad, STEM, {"kernel": "packed_wgrad"}, "w"),
    "rows": Call(rows.rows, LAST, {"kernel": "rows"}),
    "rows along themselves": Call(rows.rows, LAST, {"kernel": "rows", "staged": False}, channels_last=False),
    "depthwise": Call(depthwise.depthwise, DEPTHWISE, {"kernel": "depthwise"}),
    "depthwise_wgrad": Call(depthwise.depthwise_wgrad, DEPTHWISE, {"kernel": "depthwise_wgrad"}, "w"),
    "strip": Call(strip.strip, DEPTHWISE, {"kernel": "strip"}),
    "strip_wgrad": Call(strip.strip_wgrad, DEPTHWISE, {"kernel": "strip_wgrad"}, "w"),
    "tma": Call(tma.tma, BOXES, {"kernel": "tma"}),
    "persistent": Call(persistent.persistent, TURNS, {"kernel": "persistent", "tile": Tile(128, 128, 64, 8, 6)}),
    "persistent by turns": Call(
        persistent.persistent, TILES, {"kernel": "persistent", "tile": Tile(128, 64, 64, 4, 2)}, units=1
    ),
    "persistent with a residual": Call(
        persistent.persistent,
        TILES,
        {"kernel": "persistent", "tile": Tile(128, 128, 64, 8, 2)},
        units=1,
        residual=True,
        more={"activation": "silu"},
    ),
    "persistent_wgrad": Call(
        persistent.persistent_wgrad, PIXELS, {"kernel": "persistent_wgrad", "tile": Tile(128, 128, 64, 8, 2), "splits": 2}, "w"
    ),
    "tma_wgrad": Call(tma.tma_wgrad, BOXES, {"kernel": "tma_wgrad"}, "w"),
    "moments": Normalisation(normalise.channel_moments, 4),
    "moments of groups": Normalisation(normalise.finish_moments, 4),
    "normalise": Normalisation(normalise.normalise, 4, channels_last=False, pad=1),
    "normalise pixels": Normalisation(normalise.normalise),
    "normalise_gradient": Normalisation(normalise.normalise_gradient, 4, pad=((0, 1), 2)),
    "finish_gradient": Normalisation(normalise.finish_gradient, 4),
    "tma_wgrad in splits": Call(tma.tma_wgrad, BOXES, {"kernel": "tma_wgrad", "splits": 2}, "w"),
    "causal": Sequences(causal.causal),
    "causal along times": Sequences(causal.causal, channels_last=False, times=40),
    "causal_wgrad": Sequences(causal.causal_wgrad),
    "causal_dgrad": Sequences(causal.causal_dgrad),
    "causal_step": Token(causal.causal_step),
    "add_borders": Borders(borders.add_borders),
    "quantize": Rounding(quantize.quantize),
}
OUTSIDE, MISALIGNED = "(reads|writes) .* out of bounds", "(reads|writes|copies) .* misaligned"
OVERLAPPING = "writes .* (not as|where) another (program|thread)"
LATE, BUSY, UNORDERED = "is still writing", "is still reading", "since the last barrier"
SOURCES = [  # call, mistake, words of the fault, what stands on the line that it names, (old, new) ...
    ("gather", "the padding is read", OUTSIDE, "xv = tl.load", ("mask=lead(ok, X_FLIP) & trail(tail", "mask=trail(tail")),
    ("gather", "channels past the last are read", OUTSIDE, "wv = tl.load",
     ("wv = tl.load(wp, mask=lead(tail, W_FLIP), other=0.0)", "wv = tl.load(wp)")),
    ("gather", "pixels past the last are written", OUTSIDE, "tl.store", ("mask = lead(live, Y_FLIP) & ", "mask = ")),
    ("gather", "a bias past the last is read", OUTSIDE, "bias = tl.load", ("mask=o < once", "mask=o >= 0")),
    ("gather", "images overlap", OVERLAPPING, "tl.store", ("multiple(syn, Y_VEC), sy", "multiple(syn, Y_VEC) - 8, sy")),
    ("gather of a part of w", "strides are said to be multiples of 8", "between the tensor's elements", "wv = tl.load",
     ("    W_FLIP: tl.constexpr", "    W_VEC = 8; W_FLIP: tl.constexpr")),
    ("wgrad", "the padding is read", OUTSIDE, "xv = tl.load", ("mask=lead(ok, X_FLIP) & trail(mask_c", "mask=trail(mask_c")),
    ("wgrad", "taps lie too far apart", OUTSIDE, "tl.store", ("tap[d] * sw[d]", "tap[d] * 2 * sw[d]")),
    ("wgrad in splits", "splits share a slice", OVERLAPPING, "tl.store", ("* multiple(sws, W_VEC)", "* 0")),
    ("wgrad in splits", "rows lie too far apart", OUTSIDE, "tl.store", ("KW, CW, swk,", "KW, CW, swk * 2,")),
    ("sum_splits", "the workspace's writer is not waited for", "before griddepcontrol.wait", "acc = tl.load",
     ("tl.extra.cuda.gdc_wait()", "pass")),
    ("sum_splits", "what is not first waits", "before griddepcontrol.wait", "acc = tl.load",
     ("tl.extra.cuda.gdc_wait()", "pass"), ("    if DIMS == 0:", "    tl.extra.cuda.gdc_wait()\n    if DIMS == 0:")),
    ("sum_splits", "a split too many", OUTSIDE, "acc += tl.load", ("tl.range(1, splits)", "tl.range(1, splits + 1)")),
    ("sum_splits", "sums past the last are written", OUTSIDE, "tl.store", ("INTERPRET), mask=mask)", "INTERPRET))")),
    ("sum_splits into rows", "taps in place of channels", OVERLAPPING, "tl.store", ("rest // extents[d]", "rest % extents[d]")),
    ("sum_splits into rows", "elements past the last are written", OUTSIDE, "tl.store",
     ("tl.minimum(i, numel - 1)", "i"), ("INTERPRET), mask=mask)", "INTERPRET))")),
    ("sum_pixels", "pixels past the last are read", OUTSIDE, "tl.load", ("return offset, p < left", "return offset, p >= 0")),
    ("copy", "pixels overlap", OVERLAPPING, "tl.store", ("p * K,", "p * (K - 4),")),
    ("copy", "pixels past the last are read", OUTSIDE, "tl.load", ("lead(p < pixels, X_FLIP) &", "lead(p >= 0, X_FLIP) &")),
    ("patch", "columns past the last are written", OVERLAPPING, "tl.store", ("(o < multiple(CO, Y_VEC))", "(o >= 0)")),
    ("patch", "pixels past the last are read", OUTSIDE, "xv = tl.load", ("lead(live, X_FLIP) & trail(tail", "trail(tail")),
    ("patch by lines", "pixels past the last are written", OUTSIDE, "tl.store", ("(e < pixels * JOINED)", "(e >= 0)")),
    ("patch by lines", "lines overlap", OVERLAPPING, "tl.store", ("multiple(sy1, Y_VEC)", "multiple(sy1 // 2, Y_VEC)")),
    ("packed", "the padding is read", OUTSIDE, "xv = turned", ("xp + at, mask=ok", "xp + at, mask=ok | True")),
    ("packed", "taps past the last are read", OUTSIDE, "wv = turned", ("keep = lead(within,", "keep = lead(c >= 0,")),
    ("packed_wgrad", "the padding is read", OUTSIDE, "xv = tl.load", ("xq, mask=ok", "xq, mask=ok | True")),
    ("rows", "the padding is read", OUTSIDE, "xv = tl.load", ("(xp + dx, mask=ok, ", "(xp + dx, mask=ok | True, ")),
    ("rows", "columns past the last are written", OVERLAPPING, "tl.store", ("keep &= lead(q * stride", "keep &= lead(q * 0")),
    ("rows", "the halo's sums are written", OVERLAPPING, "tl.store", ("live & (m < step)", "live")),
    ("rows along themselves", "rows are said to begin at other addresses", MISALIGNED, "xv = tl.load",
     ("    begin = multiple(low, X_PIXELS)", "    begin = low + 1")),
    ("depthwise", "pixels past the last are written", OUTSIDE, "tl.store", ("mask = lead(live, Y_FLIP) & ", "mask = ")),
    ("depthwise_wgrad", "channels share a place", OVERLAPPING, "tl.store", ("+ k * swk", "+ k * 0")),
    ("strip", "columns past the last are written", OUTSIDE, "tl.store", ("live & (h[2] * COLUMNS + v < Y2)", "live")),
    ("moments", "pixels past the last are read", OUTSIDE, "v = tl.load",
     ("mask=live & trail", "mask=trail")),
    ("moments", "chunks share a place", OVERLAPPING, "tl.store",
     ("out_ptr + part.to(tl.int64) * 2 * C", "out_ptr + part.to(tl.int64) * 0")),
    ("moments of groups", "sums past the last are read", OUTSIDE, "tl.load",
     ("at, mask=i < chunks, other=0.0) - origin", "at) - origin")),
    ("normalise", "the padding is read", OUTSIDE, "v = tl.load",
     ("RANK)\n        read = mask & lead(exists, FLIP)", "RANK)\n        read = mask")),
    ("normalise", "pixels past the last are written", OVERLAPPING, "tl.store",
     ("mask = lead(r < left, FLIP) & ", "mask = ")),
    ("normalise pixels", "channels past the last are read", OUTSIDE, "v = tl.load",
     (" & trail(mask_c, FLIP)", "")),
    ("normalise_gradient", "padding on the other side", OUTSIDE, "g = tl.load",
     ("(B0, B1, B2), RANK)", "(B0 + 2, B1 + 2, B2), RANK)")),
    ("finish_gradient", "channels past the last are written", OUTSIDE, "tl.store",
     ("INTERPRET), mask=c < C)", "INTERPRET), mask=c >= 0)")),
    ("tma_wgrad in splits", "splits share a slice", OVERLAPPING, "tl.store", ("* multiple(sws, W_VEC)", "* 0")),
    ("causal", "times before the first are read", OUTSIDE, "tl.load(p + (LOW + i) * st",
     ("mask = lead(live & inside(j + (LOW + i), L), FLIP) &", "mask = lead(live, FLIP) &")),
    ("causal", "times past the last are written", OUTSIDE, "tl.store",
     ("mask = lead(live & (j + v < L), FLIP) &", "mask = lead(live, FLIP) &")),
    ("causal", "channels past the state's last are read", OUTSIDE, "tl.load(p",
     ("inside(i, T - 1), FLIP) & trail(mask_c, FLIP)", "inside(i, T - 1), FLIP)")),
    ("causal along times", "strips past the last are written", OUTSIDE, "tl.store",
     ("mask = (live[:, None] & (j[:, None] + v[None, :] < L))[None,", "mask = (j[:, None] + v[None, :] < L)[None,")),
    ("causal_wgrad", "splits share a place", OVERLAPPING, "tl.store(sums_ptr", ("(split * (T + 1) + t)", "(split * 0 + t)")),
    ("causal_dgrad", "channels past the last of a state are written", OUTSIDE, "tl.store",
     ("INTERPRET), mask=lead(live, FLIP) & trail(mask_c, FLIP))", "INTERPRET), mask=lead(live, FLIP))")),
    ("causal_step", "channels past the last are written", OUTSIDE, "tl.store",
     ("INTERPRET), mask=mask_c)", "INTERPRET))")),
    ("add_borders", "elements past the last are read", OUTSIDE, "tl.load",
     ("mask = lead(m < N * size.to(OFFSET), FLIP) & ", "mask = ")),
    ("add_borders", "positions that show nothing are read", OUTSIDE, "tl.load(g_ptr",
     ("mask=mask & lead(ok, FLIP)", "mask=mask")),
    ("add_borders", "pixels overlap", OVERLAPPING, "tl.store",
     ("i[d].to(OFFSET) * sx[d]", "i[d].to(OFFSET) * (sx[d] - 8)")),
    ("quantize", "numbers past the last are read", OUTSIDE, "v = tl.load",
     ("(x_ptr + i, mask=mask, other=0.0)", "(x_ptr + i)")),
    ("quantize", "numbers past the last are written", OUTSIDE, "tl.store", ("q, mask=mask)", "q)")),
    ("persistent by turns", "a team does not wait for its turn", "that nothing wrote", "warpgroup_mma(",
     ("mbarrier.wait(turns.index(team), turn)", "pass")),
    ("persistent by turns", "a team never hands over", "waits for ever", "mbarrier.wait(turns",
     ("mbarrier.arrive(turns.index(1 - team), count=1)", "pass")),
    ("persistent by turns", "a team hands over to itself", "waits for ever", "mbarrier.wait(",
     ("mbarrier.arrive(turns.index(1 - team), count=1)", "mbarrier.arrive(turns.index(team), count=1)")),
    ("persistent by turns", "every turn is the first", BUSY, "fetch_box(", ("turn ^= 1", "turn ^= 0")),
    ("persistent by turns", "both teams have the first turn", "that nothing wrote", "warpgroup_mma(",
     ("turn = team ^ 1", "turn = team * 0 + 1")),
    ("persistent by turns", "a team takes the other's boxes", "waits for ever", "",
     ("slot, phase = further(slot, phase, steps, SLOTS)", "pass")),
    ("persistent with a residual", "the residual is not waited for", "was not waited for", "y_tile.load",
     ("mbarrier.wait(fetched.index(team), box)", "pass")),
    ("persistent with a residual", "every residual is the first", "waits for ever", "", ("box ^= 1", "box ^= 0")),
    ("persistent with a residual", "a residual is fetched over the last result", BUSY, "fetch_box(",
     ("tma.store_wait(0)  # the last tile's box has left\n            mbarrier.exp", "pass\n            mbarrier.exp")),
    ("persistent with a residual", "the result is written over what is kept", BUSY, "y_tile.store",
     ("tma.store_wait(0)  # it has left", "pass  # it has left")),
    ("persistent_wgrad", "splits share a slice", OVERLAPPING, "gl.store", ("* multiple(sws, W_VEC)", "* 0")),
    ("persistent_wgrad", "rows lie too far apart", OUTSIDE, "gl.store", ("k * multiple(swk", "k * 2 * multiple(swk")),
]  # fmt: skip
TEXTS = [  # call, mistake, words, on the line, pattern of which the first match is changed, what it becomes
    ("gather", "copies are not waited for", LATE, "tl.dot", r"(cp\.async\.wait_group\s+)\d+", r"\1 9"),
    ("gather", "products are not waited for", BUSY, "xv = tl.load", r"(wgmma\.wait_group\.sync\.aligned )\d+", r"\1 9"),
    ("gather", "no fence between proxies", "without a fence.proxy.async", "tl.dot", r"fence\.proxy\.async.*;", ""),
    ("gather", "no mask of a copy", OUTSIDE, "xv = tl.load", r"(cp\.async\.c[ag]\..*0x[0-9a-f]+), %r\d+;", r"\1;"),
    ("gather", "no barrier after copies", UNORDERED, "tl.dot", r"(cp\.async\.wait_group\s+\d+;\n)\tbar\.sync.*;", r"\1"),
    ("rows", "copies are not waited for", LATE, "tl.dot", r"(cp\.async\.wait_group\s+)\d+", r"\1 9"),
    ("rows", "no barrier before rows are taken", UNORDERED, "", r"(?s)(.*)\tbar\.sync[^\n]*;", r"\1"),
    ("wgrad", "copies are not waited for", LATE, "tl.dot", r"(cp\.async\.wait_group\s+)\d+", r"\1 9"),
    ("tma", "too few bytes expected", "waits for ever", "tl.range", r"(expect_tx.*, )\d+;", r"\1 64;"),
    ("tma", "an mbarrier is not initialised", "not initialised", "tl.range", r"@%p\d+ mbarrier\.init.*;", ""),
    ("tma", "boxes are not waited for", "was not waited for", "tl.dot", r"mbarrier\.try_wait.*\n(.*\n)*?\t@!complete.*;", ""),
    ("tma", "products are not waited for", BUSY, "_desc.load", r"(wgmma\.wait_group\.sync\.aligned )\d+", r"\1 9"),
    ("tma", "no fence between proxies", "without a fence.proxy.async", "y_ptr.store", r"fence\.proxy\.async.*;", ""),
    ("tma", "a stored box is not waited for", "the program ends", "", r"(cp\.async\.bulk\.wait_group\.read\s+)0", r"\1 1"),
    ("persistent", "too few bytes expected", "waits for ever", "", r"(expect_tx.*, )\d+;", r"\1 64;"),
    ("persistent", "an mbarrier is not initialised", "not initialised", "", r"@%p\d+ mbarrier\.init.*;", ""),
    ("persistent", "products are not waited for", BUSY, "", r"(wgmma\.wait_group\.sync\.aligned )1", r"\1 9"),
    ("persistent", "the last product is not waited for", "touches register", "acc += ",
     r"(wgmma\.wait_group\.sync\.aligned )0", r"\1 9"),
    ("persistent", "a slot is never handed back", "waits for ever", "", r"(?s)(.*)@%p\d+ mbarrier\.arrive\.shared.*?;", r"\1"),
    ("persistent", "no fence between proxies", "without a fence.proxy.async", "store_box", r"fence\.proxy\.async.*;", ""),
    ("persistent", "a stored box is not waited for", "the program ends", "",
     r"(?s)(.*cp\.async\.bulk\.wait_group\.read\s+)0", r"\1 1"),
    ("persistent_wgrad", "too few bytes expected", "waits for ever", "", r"(expect_tx.*, )\d+;", r"\1 64;"),
    ("persistent_wgrad", "products are not waited for", BUSY, "", r"(wgmma\.wait_group\.sync\.aligned )1", r"\1 9"),
    ("persistent_wgrad", "the last product is not waited for", "touches register", "",
     r"(wgmma\.wait_group\.sync\.aligned )0", r"\1 9"),
    ("persistent_wgrad", "a slot is never handed back", "waits for ever", "",
     r"(?s)(.*)@%p\d+ mbarrier\.arrive\.shared.*?;", r"\1"),
    ("tma_wgrad", "too few bytes expected", "waits for ever", "tl.range", r"(expect_tx.*, )\d+;", r"\1 64;"),
    ("sum_pixels", "no barrier in a sum", UNORDERED, "", r"^\tbar\.sync.*;", ""),
    ("moments", "no barrier in a sum", UNORDERED, "", r"^\tbar\.sync.*;", ""),
    ("normalise_gradient", "no barrier in a sum", UNORDERED, "", r"^\tbar\.sync.*;", ""),
    ("causal", "no barrier before taps are taken", UNORDERED, "", r"^\tbar\.sync.*;", ""),
    ("causal_wgrad", "no barrier in a sum", UNORDERED, "", r"(?s)(.*)\tbar\.sync[^\n]*;", r"\1"),
    ("copy", "no barrier in a transposition", UNORDERED, "tl.store", r"^\tbar\.sync.*;", ""),
    ("depthwise_wgrad", "no barrier in a sum", UNORDERED, "", r"^\tbar\.sync.*;", ""),
    ("strip_wgrad", "no barrier in a sum", UNORDERED, "", r"^\tbar\.sync.*;", ""),
]  # fmt: skip


def ids(rows):
    return [f"{call}: {what}".replace(" ", "-") for call, what, *_ in rows]


@pytest.fixture(autouse=True)
def _on_compiled_code(request):
    if request.config.getoption("--compiled", None) != "sm_90":
        pytest.skip("the simulator's checks, of code for Hopper: pytest --compiled sm_90")
    if not triton.__version__.startswith("3.7."):
        pytest.skip("the rows are of what Triton 3.7 makes of the kernels")


HELPERS = {  # functions that a kernel calls, which the text of a mistake may be in
    gather.gather: (gather.multiply, gather.write),
    copy.copy_both: (copy.copy_tile,),
    causal.causal: (
        causal.columns, causal.of_state, causal.store_columns, causal.read_by, causal.write_outputs, causal.write_next_states,
    ),
    causal.causal_dgrad: (causal.write_state_gradients,),
    persistent.persistent: (persistent.multiply, persistent.part),
    persistent.persistent_wgrad: (persistent.multiply_pixels,),
    reduce.sum_pixels: (common.pixels_of_sum,),
}  # fmt: skip


@contextlib.contextmanager
def source(kernel, edits):
    """A kernel with another source, its own or that of a function that it calls, compiled anew."""
    functions = (*HELPERS.get(kernel, ()), kernel)

    def become(texts):
        for function, text in zip(functions, texts, strict=True):
            function._unsafe_update_src(text)
        kernel.device_caches.clear()
        launch._prepared.clear()
        sequences._prepared.clear()
        prepare_quantize.cache_clear()

    before = [function.src for function in functions]
    texts = list(before)
    for old, new in edits:
        i = next(i for i, text in enumerate(texts) if old in text)
        texts[i] = texts[i].replace(old, new, 1)
    become(texts)
    try:
        yield
    finally:
        become(before)


def fault(call, words, at):
    """Asserts that a call raises a fault of its kernel, with these words, a line of PTX, and a line of source that has `at`."""
    from simulator import Fault

    with pytest.raises(Fault, match=words) as caught:
        call.run()
    assert caught.value.place.kernel == call.kernel.__name__
    assert re.search(r"PTX line \d+: \S", str(caught.value))
    file, line, _ = caught.value.place.source.rsplit(":", 2)  # of whoever's checkout, since Triton caches by the text
    if at:
        assert at in (KERNELS / pathlib.Path(file).name).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("name", CALLS)
def test_without_a_mistake(name):
    CALLS[name].run()


@pytest.mark.faults
@pytest.mark.parametrize("row", SOURCES, ids=ids(SOURCES))
def test_a_mistake_in_the_source(row):
    name, _, words, at, *edits = row
    with source(CALLS[name].kernel, edits):
        fault(CALLS[name], words, at)


@pytest.mark.faults
@pytest.mark.parametrize("row", TEXTS, ids=ids(TEXTS))
def test_a_mistake_in_the_ptx(row, monkeypatch):
    from simulator.launch import Program

    name, _, words, at, pattern, to = row
    run = Program.run

    def edited(program, *arguments):
        if program.kernel.name == CALLS[name].kernel.__name__:
            text, found = re.subn(pattern, to, program.kernel.text, count=1, flags=re.MULTILINE)
            assert found
            program = Program(text, program.shared_bytes)
        run(program, *arguments)

    monkeypatch.setattr(Program, "run", edited)
    fault(CALLS[name], words, at)
