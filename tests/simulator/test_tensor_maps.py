"""Boxes against numpy's own cutting and padding of arrays; mbarriers against their definition; what is a fault of either."""

import itertools

import numpy as np
import pytest
import torch

from simulator import Fault, Unsupported
from simulator.fragments import swizzled
from simulator.global_memory import GlobalMemory
from simulator.tensor_maps import TensorMap
from tests.simulator import execute as harness

BAR = 1024 + 8192  # address of an mbarrier behind the boxes
SETUP = f"mov.u32 %r90, {BAR}; mov.u32 %r91, 1024; mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 0; mov.b64 %rd1, map;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r90], 1; bar.sync 0;"
WAIT = (
    "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r90], 0;"
    "@!complete bra.uni waitLoop; }"
)
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"


def expect(count):
    return f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r90], {count};"


def load(coordinates, space="cluster", mode=""):
    text = ", ".join(str(c) for c in coordinates)
    kind = f"{len(coordinates)}d.shared::{space}.global{mode}.mbarrier::complete_tx::bytes"
    return f"@%p1 cp.async.bulk.tensor.{kind} [%r91], [%rd1, {{{text}}}], [%r90];"


def store(coordinates, mode=""):
    text = ", ".join(str(c) for c in coordinates)
    return f"@%p1 cp.async.bulk.tensor.{len(coordinates)}d.global.shared::cta{mode}.bulk_group [%rd1, {{{text}}}], [%r91];"


def execute(body, tensor, box, swizzle=0, shape=None, fill=0):
    """Runs a body with a map of a tensor, whose last dimension is the innermost; returns (result, shared memory's bytes)."""
    memory = GlobalMemory()
    size = tensor.element_size()
    shape = tensor.shape if shape is None else shape
    t = TensorMap(
        memory.pointer(tensor), size, tuple(reversed(shape)), tuple(s * size for s in reversed(tensor.stride()[:-1])),
        tuple(reversed(box)), swizzle, fill,
    )  # fmt: skip
    result = harness.execute(
        SETUP + body,
        threads=128,
        shared_bytes=8192 + 64,
        parameters=".param .align 64 .b8 map[128]",
        maps={0: t},
        tensors={"%rd80": tensor},
    )
    return result, result.machine.shared.bytes[:8192]


DTYPES = {2: torch.int16, 4: torch.int32, 1: torch.int8, 8: torch.int64}


def cut(array, box, first):
    """Part of an array from `first` on, with zeros for what is outside it."""
    found = np.zeros(box, array.dtype)
    for at in itertools.product(*map(range, box)):
        source = [f + i for f, i in zip(first, at, strict=True)]
        if all(0 <= i < n for i, n in zip(source, array.shape, strict=True)):
            found[at] = array[tuple(source)]
    return found


CASES = [
    ((64,), (32,), (8,)),
    ((9, 32), (4, 16), (3, 8)),
    ((9, 32), (4, 16), (-2, -8)),
    ((9, 32), (4, 16), (7, 24)),
    ((3, 5, 16), (2, 3, 8), (2, 4, 8)),
    ((2, 3, 4, 16), (1, 2, 3, 8), (1, -1, 2, 0)),
    ((2, 2, 3, 2, 16), (2, 1, 2, 2, 16), (1, 1, -1, 0, 0)),
    ((4, 8), (2, 8), (99, 0)),
]


@pytest.mark.parametrize("size", DTYPES)
@pytest.mark.parametrize(("shape", "box", "first"), CASES)
def test_a_box_is_a_cut_with_zeros_around(shape, box, first, size):
    box = (*box[:-1], max(box[-1], 16 // size))
    tensor = torch.arange(1, np.prod(shape) + 1).reshape(shape).to(DTYPES[size])
    if shape[-1] * size % 16:
        shape = (*shape[:-1], 16 // size)
        tensor = torch.arange(1, np.prod(shape) + 1).reshape(shape).to(DTYPES[size])
    for space, mode in itertools.product(("cluster", "cta"), ("", ".tile")):
        body = (
            INIT + expect(np.prod(box) * size) + load(tuple(reversed(first)), space, mode) + WAIT + "ld.shared.b32 %r5, [%r91];"
        )
        _, memory = execute(body, tensor, box)
        right = cut(tensor.numpy(), box, first)
        assert memory[: right.nbytes].tobytes() == right.tobytes()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles_permute_16_bytes_within_rows(swizzle):
    tensor = torch.arange(16 * swizzle // 2).reshape(16, -1).to(torch.int16)
    body = INIT + expect(16 * swizzle) + load((0, 0)) + WAIT
    _, memory = execute(body, tensor, tuple(tensor.shape), swizzle)
    plain = tensor.numpy().view(np.uint8).reshape(-1, 16)
    per_row = swizzle // 16
    for piece, content in enumerate(plain):
        row, column = divmod(piece, per_row)
        turn = row * swizzle // 128 % per_row  # every 128 bytes of memory the pieces are exchanged otherwise
        assert memory.reshape(-1, 16)[row * per_row + (column ^ turn)].tolist() == content.tolist()


def test_swizzling_twice_changes_nothing():
    a = np.arange(0, 4096, 16)
    for span in (16, 32, 64, 128):
        assert (swizzled(swizzled(a, span), span) == a).all()
        assert sorted(swizzled(a, span)) == a.tolist()


def test_what_is_outside_can_be_nan():
    tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
    _, memory = execute(INIT + expect(64) + load((0, 2)) + WAIT, tensor, (4, 8), fill=0x7FFF)
    assert memory[:64].view(np.uint16).tolist() == [0] * 16 + [0x7FFF] * 16


FILL = "cvt.u16.u32 %rs1, %r1; shl.b32 %r2, %r1, 1; add.s32 %r2, %r2, %r91; st.shared.b16 [%r2], %rs1;"


@pytest.mark.parametrize("mode", ["", ".tile"])
@pytest.mark.parametrize(("shape", "box", "first"), [c for c in CASES if len(c[0]) < 4])
def test_a_stored_box_drops_what_is_outside(shape, box, first, mode):
    tensor = torch.full(shape, -1, dtype=torch.int16)
    body = FILL + FENCE + store(tuple(reversed(first)), mode) + "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
    execute(body, tensor, box)
    right = np.full(shape, -1)
    for number, at in enumerate(itertools.product(*map(range, box))):
        target = [f + i for f, i in zip(first, at, strict=True)]
        if all(0 <= i < n for i, n in zip(target, shape, strict=True)):
            right[tuple(target)] = number
    assert tensor.tolist() == right.tolist()


@pytest.mark.parametrize("rank", [4, 5])
def test_stored_boxes_of_more_dimensions(rank):
    tensor = torch.zeros((2,) * (rank - 1) + (8,), dtype=torch.int16)
    wait = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"
    execute(FILL + FENCE + store((0,) * rank) + store((0,) * rank, ".tile") + wait, tensor, tuple(tensor.shape))
    assert tensor.reshape(-1).tolist() == list(range(tensor.numel()))


TENSOR = torch.zeros(8, 32, dtype=torch.int16)
BOX = (4, 16)
WRONG = {
    "bytes that never come": (INIT + expect(999) + load((0, 0)) + WAIT, "waits for ever: 0 arrivals and 871 bytes are missing"),
    "nobody arrives": (INIT + load((0, 0)) + WAIT, "waits for ever: 1 arrivals"),
    "the other parity": (INIT + expect(128) + load((0, 0)) + WAIT.replace(", 0;", ", 1;"), "waits for ever"),
    "no mbarrier": (expect(128), "an mbarrier that is not initialised"),
    "a copy without an mbarrier": (load((0, 0)), "an mbarrier that is not initialised"),
    "an invalidated mbarrier": (INIT + "@%p1 mbarrier.inval.shared::cta.b64 [%r90];" + expect(128), "not initialised"),
    "two arrivals for one": (INIT + expect(128) + expect(128), "arrives more often at an mbarrier than it was initialised for"),
    "a misaligned mbarrier": ("add.s32 %r90, %r90, 4;" + INIT, "outside shared memory or misaligned"),
    "a misaligned box": ("add.s32 %r91, %r91, 64;" + INIT + expect(128) + load((0, 0)), "at no multiple of 128"),
    "coordinates missing": (INIT + expect(128) + load((0,)), "1 coordinates in a tensor map of 2"),
    "read before it is waited for": (INIT + expect(128) + load((0, 0)) + "ld.shared.b16 %rs1, [%r91];", "not waited for"),
    "written while it comes": (INIT + expect(128) + load((0, 0)) + "st.shared.b16 [%r91], 0;", "not waited for"),
    "over what was just stored": (INIT + FILL + expect(128) + load((0, 0)), "that another thread wrote since the last barrier"),
    "stored without a fence": (FILL + "bar.sync 0;" + store((0, 0)), "without a fence.proxy.async"),
    "stored without a barrier": (FILL + "fence.proxy.async;" + store((0, 0)), "that another thread wrote since the last"),
    "changed while it is stored": (
        FILL + FENCE + store((0, 0)) + "cp.async.bulk.commit_group; st.shared.b16 [%r91], 9;", "still reading"
    ),
    "never written": (store((0, 0)), "that nothing wrote"),
    "the end while it comes": (INIT + expect(128) + load((0, 0)), "ends while a box is still copied to its shared memory"),
    "the end while it is stored": (FILL + FENCE + store((0, 0)), "ends while a box that it stores is still read"),
    "beyond shared memory": ("add.s32 %r91, %r91, 8192;" + INIT + expect(128) + load((0, 0)), "out of bounds"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_faults(what):
    body, text = WRONG[what]
    with pytest.raises(Fault, match=text):
        execute(body, TENSOR.clone(), BOX)


def test_mbarriers_turn_phase_by_phase():
    """Two arrivals a phase; then the next phase counts anew."""
    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r90];"
    body = "@%p1 mbarrier.init.shared.b64 [%r90], 2; bar.sync 0;" + arrive + arrive + WAIT
    execute(body, TENSOR, BOX)
    twice = "@%p1 mbarrier.arrive.shared.b64 _, [%r90], 2;" + WAIT.replace(", 0;", ", 1;").replace("waitLoop", "again")
    execute(body + twice, TENSOR, BOX)
    with pytest.raises(Fault, match="waits for ever: 1 arrivals"):
        execute(body + arrive + WAIT.replace(", 0;", ", 1;").replace("waitLoop", "again"), TENSOR, BOX)


@pytest.mark.parametrize("space", ["", ".shared", ".shared::cta"])
def test_mbarriers_by_every_name_of_their_memory(space):
    body = (
        f"@%p1 mbarrier.init{space}.b64 [%r90], 2; bar.sync 0; @%p1 mbarrier.arrive{space}.b64 _, [%r90];"
        f"@%p1 mbarrier.arrive.expect_tx{space}.b64 _, [%r90], 128;" + load((0, 0)) + WAIT.replace(".shared::cta", space)
        + f"bar.sync 0; @%p1 mbarrier.inval{space}.b64 [%r90];"
    )  # fmt: skip
    execute(body, TENSOR, BOX)


def test_groups_of_stores_end_in_order():
    body = FILL + FENCE + store((0, 0)) + "cp.async.bulk.commit_group; cp.async.bulk.commit_group;"
    after = "bar.sync 0; @%p1 st.shared.b16 [%r91], 9;"
    for read in ("", ".read"):
        execute(f"{body} cp.async.bulk.wait_group{read} 1; {after}", TENSOR.clone(), BOX)
    with pytest.raises(Fault, match="still reading"):
        execute(f"{body} cp.async.bulk.wait_group 2; {after}", TENSOR.clone(), BOX)


MAPS = {
    "a multiple of 16": {"address": 8},
    "1 to 5 dimensions": {"box": (8,)},
    "extents of 1": {"shape": (0, 8)},
    "strides in multiples of 16": {"strides": (40,)},
    "1 to 256 elements": {"box": (8, 257)},
    "multiples of 16 bytes": {"box": (12, 2)},
    "no wider than the swizzle": {"box": (32, 2), "swizzle": 32},
}


@pytest.mark.parametrize("rule", MAPS)
def test_a_map_that_the_driver_would_refuse(rule):
    sound = {"address": 0, "size": 2, "shape": (64, 8), "strides": (128,), "box": (8, 2), "swizzle": 0}
    TensorMap(**sound)
    with pytest.raises(Fault, match=rule):
        TensorMap(**sound | MAPS[rule])


def test_a_map_that_is_no_parameter_is_refused():
    with pytest.raises(Unsupported, match="a tensor map that is no parameter"):
        execute(INIT + expect(128) + "mov.b64 %rd1, 64;" + load((0, 0)), TENSOR, BOX)
