"""Compiled kernels with one edit each. Every edit that hardware could answer with a wrong result, the simulator must notice.

A row says which kernel (kernels.py), which edit of its PTX, and what comes of it: the words of the fault; or `Numbers`, if only
the result shows it, and why; or `Redundant`, if the kernel is as right without, and why.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
import triton

from simulator import Fault
from simulator.tensor_maps import TensorMap
from tests.simulator.kernels import KERNELS, ROOT, TRITON, compiled

pytestmark = pytest.mark.skipif(triton.__version__ != TRITON, reason=f"the rows are of the code of Triton {TRITON}")


class Numbers(str):
    """Why only the result shows an edit."""


class Redundant(str):
    """Why a kernel is right without what an edit takes away."""


@dataclass(frozen=True)
class Edit:
    """An edit of a kernel's PTX, and what comes of it.

    Attributes:
        pattern: a regular expression; what it finds in place `which`, of `count`, becomes `to`.
    """

    kernel: str
    what: str
    pattern: str
    to: str
    outcome: str
    which: int = 0
    count: int = 1

    def apply(self, ptx):
        found = list(re.finditer(self.pattern, ptx, re.MULTILINE))
        assert len(found) == self.count, f"{len(found)} of {self.pattern!r}"
        m = found[self.which]
        return ptx[: m.start()] + m.expand(self.to) + ptx[m.end() :]

    def __str__(self):
        return f"{self.kernel}: {self.what} {self.which}".replace(" ", "-")


def each(kernel, what, pattern, *outcomes, to=""):
    """Returns an edit of each place where the pattern is found, as many as there are outcomes. By default it is removed."""
    return [Edit(kernel, what, pattern, to, outcome, i, len(outcomes)) for i, outcome in enumerate(outcomes)]


OUTSIDE, MISALIGNED = "(reads|writes).* out of bounds", "(reads|writes|copies) .*misaligned"
UNWRITTEN = "reads .* of shared memory that nothing wrote"
LATE = "that an asynchronous copy is still writing"
BUSY = "that an asynchronous instruction is still reading"
UNAWAITED = "that an asynchronous copy writes, which was not waited for"
UNORDERED_FOR_WGMMA = "wgmma reads .* that another thread wrote since the last barrier"
UNORDERED = "reads .* that another thread wrote since the last barrier"
OVER_READ = "(writes|copies) .* that another thread read since the last barrier"
OVER_WRITTEN = "writes .* where another thread wrote other values since the last barrier"
AT_ONCE = "writes .* where another thread.* writes other values at once"
UNFENCED = "through the asynchronous proxy, that a thread wrote without a fence.proxy.async"
DEAD = "an mbarrier that is not initialised"

GUARDED_STORE = r"^\t@%p\d+ (?=st\.global)"
SOURCE_SIZE = r"(?<=0x10), %r\d+;$"
TO_SHARED = r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0"
DESCRIPTOR = r"^(\tor\.b64\s+%rd\d+, %rd\d+), -9223371899415822336;"
MASKED = Redundant("in the first iterations the mask is true for every thread: k has more than two whole blocks")
MEMCHECK = [
    *each("pointers", "guard of a store removed", GUARDED_STORE, OUTSIDE, OUTSIDE),
    *each("ampere", "guard of a store removed", GUARDED_STORE, OUTSIDE),
    *each("one warp", "guard of a store removed", GUARDED_STORE, AT_ONCE, OUTSIDE),
    *each("softmax", "guard of a read removed", r"^\t@%p\d+ (?=ld\.shared)", OUTSIDE, OUTSIDE),
    *each(
        "pointers", "source size of a copy removed", SOURCE_SIZE, *[MASKED] * 6, OUTSIDE,
        Redundant("rows are taken modulo m, so what lies behind k's end is the next row, and it is multiplied by zeros of b"),
        OUTSIDE, to=";",
    ),
    *each("pointers", "copy to a misaligned place", TO_SHARED, *[MISALIGNED] * 9, to=r"\1 4"),
    *each("pointers", "store too far", r"(?<=@%p16 st\.global\.v4\.b32 \[ %rd41 \+ )0", OUTSIDE, to="8192"),
    *each("pointers", "store misaligned", r"(?<=st\.global\.v4\.b32 \[ %rd4[01] \+ )0", MISALIGNED, MISALIGNED, to="8"),
    *each(
        "softmax", "store widened", r"(st\.global)(\.b32 \[ %rd\d+ \+ 0 \], \{) (%r\d+)", *[MISALIGNED] * 4,
        to=r"\1.v2\2 \3, \3",
    ),
    *each("softmax", "read too far", r"(?<=global_smem\+)6144", OUTSIDE, OUTSIDE, to="6160"),
    *each("pointers", "operand of wgmma too far", DESCRIPTOR, OUTSIDE, OUTSIDE, to=r"\1, -9223371899415821312;"),
    *each("boxes", "matrices stored at a misaligned place", r"(stmatrix[^\[]*\[%r\d+)", MISALIGNED, MISALIGNED, to=r"\1+8"),
    *each("boxes", "box at no multiple of 128", r"(?<=%r38, %r31, )12288", "a box .* at no multiple of 128", to="12304"),
    *each("boxes", "box stored from beyond", r"(?<=%r81, %r31, )18432", "copies a box from .* out of bounds", to="20480"),
    *each("boxes", "misaligned mbarrier", r"(?<=%r35, %r31, )22528", "an mbarrier .* misaligned", to="22532"),
]  # fmt: skip

UNSET = "reads register %\\w+, which nothing wrote on a way to here"
STALE = Numbers("the place holds what the kernel wrote there before, for another use")
INITCHECK = [
    *each("pointers", "address not loaded", r"^\tld\.param\.b64.*$", *[UNSET] * 3),
    *each("softmax", "store of partial results removed", r"^\t@%p\d+ st\.shared.*$", UNWRITTEN, STALE, STALE, STALE),
    *each("boxes", "store of results removed", r"^\tstmatrix.*$", UNWRITTEN, UNWRITTEN),
    *each("pointers", "store of results removed", r"^\tst\.shared.*$", STALE, STALE),
    *each("pointers", "copy removed", r"^\tcp\.async\.cg.*$", *[UNWRITTEN] * 9),
    *each("ampere", "copy removed", r"^\tcp\.async\.c[ga].*$", *[UNWRITTEN] * 4, STALE, STALE),
    *each("boxes", "a's first box not loaded", r"6144(;(?:.|\n)*?)^\t@%p12 cp\.async\.bulk.*$", UNWRITTEN, to=r"2048\1"),
    *each("boxes", "b's first box not loaded", r"6144(;(?:.|\n)*?)^\t@%p13 cp\.async\.bulk.*$", UNWRITTEN, to=r"4096\1"),
]  # fmt: skip

BARRIER, WARP_BARRIER = r"^\tbar\.sync\s+0;$", r"^\tbar\.warp\.sync\s+-1;$"
COPY_WAIT, BOX_WAIT = r"^\tcp\.async\.wait_group\s+\d+;$", r"^\tcp\.async\.bulk\.wait_group\.read\s+\d+;$"
WGMMA_WAIT, COMMIT = r"^\twgmma\.wait_group.*$", r"^\tcp\.async\.commit_group;$"
WAITED = Redundant("what wgmma read, the one warpgroup there is has waited for, all of its warps together")
STAGES = Redundant("it lies between the first copies, which go to different places")
PRODUCER = Redundant(
    "one warp initialises mbarriers, announces bytes and starts boxes; any one of these barriers orders that before others wait"
)
LAST = Redundant("the kernel ends: nothing touches shared memory any more")
JOINED = Redundant("the copy then belongs to the next group, and both are waited for together")
ZEROS = Redundant("the group left is b's and masked: it writes zeros, where the epilogue stores nothing")
EARLY = "touches register .*, an accumulator of products that were not waited for"
FENCED = "wgmma uses register .*, which something else touched without a wgmma.fence since"
UNORDERED_MBARRIER = "uses an mbarrier in a part .* that another thread wrote since the last barrier"
STILL_STORED = "ends while a box that it stores is still read"
RACECHECK = [
    *each("pointers", "barrier removed", BARRIER, STAGES, UNORDERED_FOR_WGMMA, WAITED, OVER_WRITTEN, UNORDERED),
    *each("ampere", "barrier removed", BARRIER, STAGES, UNORDERED, OVER_READ, OVER_WRITTEN, UNORDERED),
    *each("one warp", "barrier removed", BARRIER, STAGES, UNORDERED, OVER_READ, OVER_WRITTEN),
    *each("one warp", "barrier of the warp removed", WARP_BARRIER, UNORDERED, OVER_READ, UNORDERED),
    *each(
        "softmax", "barrier removed", BARRIER,
        STAGES, STAGES, UNORDERED, UNORDERED, UNORDERED, OVER_READ, UNORDERED, UNORDERED, LAST,
    ),
    *each(
        "boxes", "barrier removed", BARRIER,
        Redundant("mbarriers end after it, which all warps waited for before another barrier; boxes come after two more"),
        OVER_READ, "copies a box from .* that another thread wrote since the last barrier", *[PRODUCER] * 5,
        Redundant("each warp waits for the box itself, and the next barrier is before the place is loaded again"),
        WAITED, Redundant("a's box and b's box go to different places"), LAST,
    ),
    *each(
        "boxes", "all barriers between mbarriers and the first wait removed",
        r"(?s)(?<=%p10 mbarrier\.init)(.*?)" + r"bar\.sync \t0;(.*?)" * 5, UNORDERED_MBARRIER, to=r"\1\2\3\4\5\6",
    ),
    *each("pointers", "fence removed", r"^\tfence\.proxy.*$", UNFENCED),
    *each("boxes", "fence removed", r"^\tfence\.proxy.*$", UNFENCED),
    *each("pointers", "wait for copies removed", COPY_WAIT, LATE, LATE),
    *each("ampere", "wait for copies removed", COPY_WAIT, LATE, LATE),
    *each("one warp", "wait for copies removed", COPY_WAIT, LATE, LATE),
    *each("softmax", "wait for copies removed", COPY_WAIT, LATE, LAST),
    *each("pointers", "wait for one group of copies less", r"(?<=^\tcp\.async\.wait_group \t)2", LATE, to="3"),
    *each("ampere", "wait for one group of copies less", r"(?<=^\tcp\.async\.wait_group \t)2", LATE, to="3"),
    *each("one warp", "wait for one group of copies less", r"(?<=^\tcp\.async\.wait_group \t)2", LATE, to="3"),
    *each("softmax", "wait for one group of copies less", r"(?<=^\tcp\.async\.wait_group \t)2", LATE, to="3"),
    *each("pointers", "the last group of copies not waited for", r"(?<=^\tcp\.async\.wait_group \t)0", ZEROS, to="1"),
    *each("ampere", "the last group of copies not waited for", r"(?<=^\tcp\.async\.wait_group \t)0", LATE, to="1"),
    *each("one warp", "the last group of copies not waited for", r"(?<=^\tcp\.async\.wait_group \t)0", LATE, to="1"),
    *each("pointers", "commit removed", COMMIT, JOINED, *[LATE] * 5),
    *each("softmax", "commit removed", COMMIT, *[LATE] * 4),
    *each("pointers", "wait for products removed", WGMMA_WAIT, BUSY, EARLY),
    *each("boxes", "wait for products removed", WGMMA_WAIT, EARLY, BUSY),
    *each("pointers", "wait for one product less", r"(?<=^\twgmma\.wait_group\.sync\.aligned )1", BUSY, to="2"),
    *each("boxes", "wait for one product less", r"(?<=^\twgmma\.wait_group\.sync\.aligned )1", BUSY, to="2"),
    *each("pointers", "the last product not waited for", r"(?<=^\twgmma\.wait_group\.sync\.aligned )0", EARLY, to="1"),
    *each("boxes", "the last product not waited for", r"(?<=^\twgmma\.wait_group\.sync\.aligned )0", EARLY, to="1"),
    *each("pointers", "commit of products removed", r"^\twgmma\.commit.*$", EARLY),
    *each("boxes", "commit of products removed", r"^\twgmma\.commit.*$", EARLY),
    *each("pointers", "fence of registers removed", r"^\twgmma\.fence.*$", FENCED),
    *each("boxes", "fence of registers removed", r"^\twgmma\.fence.*$", FENCED),
    *each("boxes", "wait for stored boxes removed", BOX_WAIT, BUSY, STILL_STORED),
    *each("boxes", "the last box not waited for", BOX_WAIT, BUSY, STILL_STORED, to="\tcp.async.bulk.wait_group.read 1;"),
    *each("boxes", "commit of a stored box removed", r"^\tcp\.async\.bulk\.commit_group;$", BUSY),
    *each("boxes", "wait at the mbarrier removed", r"^\tmbarrier\.try_wait.*\n(.*\n)*?\t@!complete.*$", UNAWAITED),
    *each("boxes", "wait at the next mbarrier", r"(mbarrier\.try_wait.*)\[%r52\]", UNAWAITED, to=r"\1[%r52 + 8]"),
]  # fmt: skip

SOME = "only some threads of the program come to this barrier"
ENDLESS = "initialises an mbarrier that has not ended"
TWICE = "arrives more often at an mbarrier than it was initialised for"
SYNCCHECK = [
    *each("softmax", "barrier for a part of a warp", BARRIER, *[SOME] * 9, to="\t@%p4 bar.sync 0;"),
    *each("boxes", "barrier for one warp", BARRIER, *[SOME] * 11, UNSET, to="\t@%p6 bar.sync 0;"),
    *each("boxes", "initialisation removed", r"^\t@%p\d+ mbarrier\.init.*$", DEAD, DEAD, DEAD),
    *each("boxes", "initialised for two", r"(mbarrier\.init.*), 1;$", *["ever: 1 arrivals and 0 bytes"] * 3, to=r"\1, 2;"),
    *each("boxes", "end of an mbarrier removed", r"^\t@%p\d+ mbarrier\.inval.*$", *[ENDLESS] * 3),
    *each("boxes", "arrival removed", r"^\t@%p\d+ mbarrier\.arrive.*$", *["ever: 1 arrivals and -6144 bytes"] * 3),
    *each("boxes", "arrival twice", r"^\t@%p\d+ mbarrier\.arrive.*$", TWICE, TWICE, TWICE, to=r"\g<0>\n\g<0>"),
    *each("boxes", "arrival of all threads", r"^\t@%p\d+ (?=mbarrier\.arrive)", UNORDERED_MBARRIER, TWICE, TWICE),
    *each("boxes", "too few bytes expected", r"6144(?=;)", *["ever: 0 arrivals and -16 bytes"] * 3, to="6128"),
    *each("boxes", "too many bytes expected", r"6144(?=;)", *["ever: 0 arrivals and 16 bytes"] * 3, to="6160"),
    *each("boxes", "parity flipped", r"(mbarrier\.try_wait.*), %r95;", "ever: 1 arr", to=r"xor.b32 %r61, %r95, 1;\n\1, %r61;"),
    *each("boxes", "parity that stays", r"(?<=%r62, )1, 0", "waits for ever", to="0, 0"),
    *each("boxes", "parity that flips each time", r"(?<=%r62, )1, 0", "waits for ever", to="1, 1"),
    *each("boxes", "box of another mbarrier", r"(@%p15 cp\.async\.bulk.*)\[%r36\]", "ever: .* bytes", to=r"\1[%r35]"),
    *each("boxes", "box of no mbarrier", r"(@%p12 cp\.async\.bulk.*)\[%r35\]", "not initialised", to=r"\1[%r35 + -8]"),
]  # fmt: skip

OTHERWISE = Numbers("the operand is read from inside what was copied, in another order")
UNUSED = Redundant("a row of the operand is as wide as the swizzle: nothing lies in the leading direction")


def descriptor(kernel, what, *outcomes, mode=2, leading=0, stride=512):
    """Edits of the constant part of matrix descriptors, of a and of b; Triton's are of mode 2, stride 512."""
    bits = mode << 62 | leading >> 4 << 16 | stride >> 4 << 32
    bits -= bits >> 63 << 64
    return each(kernel, what, DESCRIPTOR, *outcomes, to=rf"\1, {bits};")


SWIZZLE = [
    *descriptor("pointers", "no swizzle", OTHERWISE, OTHERWISE, mode=0),
    *descriptor("pointers", "swizzle of 128 bytes", LATE, OTHERWISE, mode=1),
    *descriptor("pointers", "swizzle of 32 bytes", OTHERWISE, OTHERWISE, mode=3),
    *descriptor("pointers", "stride of 256", OTHERWISE, OTHERWISE, stride=256),
    *descriptor("pointers", "stride of 1024", LATE, OTHERWISE, stride=1024),
    *descriptor("pointers", "leading offset of 2048", UNUSED, UNUSED, leading=2048),
    *descriptor("boxes", "no swizzle", OTHERWISE, OTHERWISE, mode=0),
    *descriptor("boxes", "swizzle of 128 bytes", UNAWAITED, OTHERWISE, mode=1),
    *descriptor("boxes", "swizzle of 32 bytes", OTHERWISE, OTHERWISE, mode=3),
    *each("pointers", "second step reads the first one's a", r"-9223371899415822334", OTHERWISE, to="-9223371899415822336"),
    *each("pointers", "exclusive or of addresses lost", r"^\txor\.b32(.*)$", AT_ONCE, AT_ONCE, OTHERWISE, to=r"\tor.b32\1"),
    *each("boxes", "exclusive or of addresses lost", r"^\txor\.b32(.*%r(?:29|33).*)$", AT_ONCE, UNWRITTEN, to=r"\tor.b32\1"),
]  # fmt: skip

TABLES = {"memcheck": MEMCHECK, "initcheck": INITCHECK, "racecheck": RACECHECK, "synccheck": SYNCCHECK, "swizzle": SWIZZLE}
MAPS = {  # what is changed: of which tensor's map, words
    "address of 8 modulo 16": ("a", lambda m: replace(m, address=m.address + 8), "an address that is a multiple of 16"),
    "box wider than the swizzle": ("a", lambda m: replace(m, box=(64, 64)), "rows of a box no wider than the swizzle"),
    "box of 512 rows": ("a", lambda m: replace(m, box=(32, 512)), "a box of 1 to 256 elements"),
    "box larger than its place": ("a", lambda m: replace(m, box=(32, 128)), f"copies a box to a part of .* {LATE}"),
    "box smaller than expected": ("b", lambda m: replace(m, box=(32, 16)), "waits for ever: 0 arrivals and 1024 bytes"),
    "more rows than there are": ("a", lambda m: replace(m, shape=(144, 144)), "reads 2 bytes out of bounds"),
    "rows too far apart": ("b", lambda m: replace(m, strides=(112,)), "reads 2 bytes out of bounds"),
    "more rows stored than there are": ("c", lambda m: replace(m, shape=(48, 128)), "writes 2 bytes out of bounds"),
    "box stored larger than its place": ("c", lambda m: replace(m, box=(32, 128)), "copies a box from .*out of bounds"),
}


@functools.cache
def unedited(kernel):
    return compiled()[kernel].run()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_is_right(kernel):
    out, right = unedited(kernel)
    torch.testing.assert_close(out.double(), right.double(), rtol=2**-9, atol=1e-5)


def rows():
    for check, table in TABLES.items():
        for row in table:
            yield pytest.param(row, id=f"{check}-{row}")


@pytest.mark.parametrize("row", [*rows()])
def test_edit(row):
    kernel = compiled()[row.kernel]
    edited = row.apply(kernel.ptx)
    if isinstance(row.outcome, Numbers | Redundant):
        out, _ = kernel.run(edited)
        assert torch.equal(out, unedited(row.kernel)[0]) == isinstance(row.outcome, Redundant)
        return
    with pytest.raises(Fault, match=row.outcome) as caught:
        kernel.run(edited)
    place = caught.value.place
    assert " ".join(edited.split("\n")[place.line - 1].split()).startswith(place.text)
    assert re.search(r"\.py:\d+:\d+$", place.source)


@pytest.mark.parametrize("what", MAPS)
def test_edited_tensor_map(what):
    name, change, words = MAPS[what]

    def edit(arguments):
        maps = [i for i, a in enumerate(arguments) if isinstance(a, TensorMap)]
        at = maps["abc".index(name)]
        return [*arguments[:at], change(arguments[at]), *arguments[at + 1 :]]

    with pytest.raises(Fault, match=words):
        compiled()["boxes"].run(edit=edit)


def test_the_rows_are_of_the_pinned_triton():
    assert f"triton=={TRITON}\n" in (ROOT / "requirements.txt").read_text()


def counts():
    """Returns the table in simulator/README.md: check, edits, and how many of them are of each kind of outcome."""
    for check, table in TABLES.items():
        found = Counter(type(row.outcome) for row in table)
        yield check, len(table), *(found[kind] for kind in (str, Numbers, Redundant))


def test_the_readme_says_how_many():
    text = (ROOT / "simulator" / "README.md").read_text()
    for row in counts():
        assert f"| {' | '.join(map(str, row))} |" in text
