"""The cost model's counts: against torch's own counter, against the launches that are made, and worked by hand."""

import collections
import csv
import dataclasses
import itertools
import math
import pathlib
import re
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.layers import layers
from tconv.launching.memory_bound import prepare_bias
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.planning import cost, plan
from tconv.planning.device import A100, DEVICES, H100, H200, Device, Limits, limits_of
from tconv.planning.families import FAMILIES
from tconv.planning.problem import PASSES, forward_problem, transposed_problem
from tconv.planning.strip import CHUNK
from tconv.planning.tiles import BF16X6, Access, Tile
from tests import cases, oracle

BUDGETS = pathlib.Path(__file__).parent.parent / "bench" / "codegen"
LAYERS = layers()
# A device for sums in the head: two units, one operation, byte or cycle a second each.
HAND = Device("by hand", 2, 1 << 20, limits=Limits(2.0, 2.0, 2.0, 2.0, 1.0, 2.0, 1e9, 1.0))


def problem(case):
    """A case of tests/cases.py as a problem."""
    stride, dilation, padding, extra = (
        v if isinstance(v, tuple) else (v,) * case.rank for v in (case.stride, case.dilation, case.padding, case.output_padding)
    )
    if case.transposed:
        return transposed_problem(case.x, case.weight, stride, padding, extra, dilation, case.groups)
    return forward_problem(case.x, case.weight, stride, [(p, p) for p in padding], dilation, case.groups)


def as_case(layer):
    """A layer of the suite as a case."""
    return oracle.Case(
        layer.name, layer.x, layer.k, layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups,
        layer.transposed, layer.output_padding,
    )  # fmt: skip


CASES = [c for c in cases.ALL if not isinstance(c.padding, str)] + [as_case(layer) for layer in LAYERS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operations_and_bytes_are_those_that_torch_counts(case):
    x, w, b = (torch.empty(s, device="meta", requires_grad=True) for s in (case.x, case.weight, (case.k,)))
    function = (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank]
    p = problem(case)
    with FlopCounterMode(display=False) as counter:
        y = function(x, w, b, **case.arguments)
        assert counter.get_total_flops() == cost.flops(p)
        torch.autograd.grad(y, x, torch.empty_like(y), retain_graph=True)
        assert counter.get_total_flops() == 2 * cost.flops(p)
        torch.autograd.grad(y, w, torch.empty_like(y))
        # Torch's formula for wgrad leaves the groups out: it counts every pair of channels.
        assert counter.get_total_flops() == (2 + case.groups) * cost.flops(p)
    assert cost.least_bytes(p, "dgrad", x.element_size()) == sum(t.nbytes for t in (x, w, y))
    assert cost.least_bytes(p, "fprop", x.element_size()) <= cost.least_bytes(p, "dgrad", x.element_size())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [as_case(layer) for layer in LAYERS[::3]], ids=str)
def test_programs_and_workspace_are_those_launched(case, channels_last):
    p = problem(case)
    x, w, y = (shaped(p.shape(which), channels_last, torch.bfloat16) for which in "xwy")
    device = DEVICES["H200"]
    launches = [
        prepare_gather("fprop", p, x, w, None, y, device),
        prepare_gather("dgrad", p, y, w, None, x, device),
        prepare_wgrad(p, y, x, w, device),
        prepare_bias(p, y, device),
    ]
    for launch in launches:
        predicted = launch.call.plan.cost
        stays = launch.call.plan.kernel.startswith("persistent")  # its programs compute several tiles each
        assert (min(predicted.programs, device.units) if stays else predicted.programs) == launch.grid[0], launch.call
        slices = math.prod(launch.shape)
        splits = 4 * launch.splits * slices if launch.splits > 1 else 0
        copied = sum(2 * math.prod(copy.shape) for copy in launch.copies if copy)
        assert predicted.workspace == splits + copied
        assert splits <= plan.WORKSPACE
        assert predicted.waves == math.ceil(predicted.programs / device.units)


def recorded():
    """The recorded machine code of sm_90: (row, kernel, kind, problem, pass, tile, access) of each variant.

    The problem is one of the variant's rank; counts of instructions depend on nothing else of it.
    """
    rows = csv.DictReader((BUDGETS / "triton-3.7" / "sm_90.csv").read_text().splitlines()[1:])
    tile = r"(\d+)x\(?(\d+)(?:\+(\d+)\))?x(\d+) w(\d+) s(\d+)(?: r\d+)?(?: c(\d+))?"
    pattern = re.compile(rf"(\w+) (\w+) (\d)d (\w+) {tile} inner=(\S*) vec=(\S*)(.*)")
    sizes = {"fp8e4nv": 1, "bf16": 2, "fp16": 2, "fp32": 4}
    for row in rows:
        found = pattern.fullmatch(row["variant"])
        if not found or found[2] in ("bias", "copy") or found[4] not in sizes:
            continue
        pass_, kernel, rank, dtype, m, n, extra, k, warps, stages, columns, inner, vectors, flags = found.groups()
        direct = kernel.startswith(("depthwise", "strip"))
        vectors = vectors.split("/")
        # Few of the packed gather's elements, and of rows', are weights, and a weight gradient reads none.
        which = {"packed": [0], "rows": [0], "wgrad": [0, 2], "packed_wgrad": [0, 2]}.get(kernel, [0, 1])
        narrow = "1" in [vectors[i] for i in which if i < len(vectors)]
        narrow &= "pixels=" not in flags
        split = BF16X6 if BF16X6 in flags else ""
        cores = not direct and (dtype != "fp32" or "tf32" in flags or bool(split))
        if kernel.startswith("strip"):
            size, stride, dilation, padding = map(int, re.search(r"row=(\d+)s(\d+)d(\d+)p(\d+)", flags).groups())
            if row["loop_instructions"] == "0" or size > CHUNK:  # unrolled, or a loop in the loop
                continue
            p = forward_problem((1, 2, 9, 99), (2, 1, 3, size), (1, stride), [(0, padding)] * 2, (1, dilation), 2)
        else:
            r = int(rank)
            p = forward_problem((1, 16, *[9] * r), (16, 16, *[3] * r), (1,) * r, [(0, 0)] * r, (1,) * r, 1)
        access = Access(sizes[dtype], cores, narrow, kernel.startswith("strip") and inner[0] != "c", precision=split)
        block = Tile(*map(int, (m, n, k, warps, stages)), columns=int(columns or 1), extra=int(extra or 0))
        yield row, kernel, (dtype, cores, split, narrow), p, pass_, block, access


def test_loop_lengths_are_near_those_compiled():
    """Against the recorded machine code: of every kernel and precision, wide and narrow, the median is within a half."""
    ratios = collections.defaultdict(list)
    for row, kernel, kind, p, pass_, block, access in recorded():
        length = FAMILIES[kernel].length(p, pass_, block, access)
        ratios[(kernel, *kind)].append(int(row["loop_instructions"]) / length)
    assert {kernel for kernel, *_ in ratios} == set().union(*plan.KERNELS.values()) - {"bias"}
    assert {kernel for kernel, _, _, split, _ in ratios if split} == {f.name for f in FAMILIES.values() if f.cuts}
    for kind, found in ratios.items():
        assert 1 / 1.5 < statistics.median(found) < 1.5, kind


def test_loops_of_weight_gradients_are_those_compiled():
    """With 16-byte copies in 16 bits each tile's length, at every rank, is within a sixth of what was compiled."""
    ratios = collections.defaultdict(list)
    for row, kernel, (dtype, *_), p, pass_, block, access in recorded():
        if kernel in ("wgrad", "packed_wgrad") and dtype == "bf16" and re.search(r"vec=8/[148]/8", row["variant"]):
            length = FAMILIES[kernel].length(p, pass_, block, access)
            ratios[kernel, p.rank, block].append(int(row["loop_instructions"]) / length)
    assert len(ratios) > 30
    for kind, found in ratios.items():
        assert 5 / 6 < statistics.median(found) < 7 / 6, kind


def test_instructions_outside_loops_are_near_those_compiled():
    """Of GEMMs with wide accesses in 16 bits: each kernel's median is within a fifth, and most variants within a half."""
    ratios = collections.defaultdict(list)
    for row, kernel, (dtype, _, _, narrow), p, _, block, access in recorded():
        if FAMILIES[kernel].dot and not FAMILIES[kernel].gluon and dtype == "bf16" and not narrow and row["before_loop"]:
            compiled = int(row["before_loop"]) + int(row["after_loop"])
            ratios[kernel].append(compiled / FAMILIES[kernel].outside(p, block, access))
    assert {*ratios} == {f.name for f in FAMILIES.values() if f.dot and not f.gluon}
    for kernel, found in ratios.items():
        assert 5 / 6 < statistics.median(found) < 6 / 5, kernel
        assert sum(2 / 3 < ratio < 3 / 2 for ratio in found) > 0.6 * len(found), kernel


def together(c):
    """The seconds of a cost's parts, which overlap in part."""
    assert c.seconds == pytest.approx(sum(s for _, s in c.alone) + cost.together(s for _, s in c.parts))
    return sum(seconds**cost.OVERLAP for _, seconds in c.parts) ** (1 / cost.OVERLAP)


def test_a_weight_gradients_loop_advances_its_pixels():
    """Tiles of 128x256 and 64 pixels by 256 threads: each copies 8 of x's pixels, of which one takes 33 at rank 2, and 4 of
    dy's. Where taps and channels are packed the pixels of either are decoded."""
    tile, wide = Tile(128, 256, 64, 8, 3), Access(2, True)
    two, three = (forward_problem((1, 16, *[9] * r), (16, 16, *[3] * r), (1,) * r, [(0, 0)] * r, (1,) * r, 1) for r in (2, 3))
    assert FAMILIES["wgrad"].length(two, "wgrad", tile, wide) == 30 + 8 * 33 + 4 * 14
    assert FAMILIES["wgrad"].length(three, "wgrad", tile, wide) == 30 + 8 * 45.5 + 4 * 14
    assert FAMILIES["packed_wgrad"].length(two, "wgrad", Tile(64, 64, 64, 8, 3), wide) == 50 + 2 * 46


def test_boxes_walk_one_tap_in_phases_that_have_none():
    """A 1x1 layer of stride two: of four phases of 7x7 pixels and 128 channels, from 256, one has a tap and four steps."""
    p = forward_problem((2, 128, 14, 14), (256, 128, 1, 1), (2, 2), [(0, 0)] * 2, (1, 1), 1)
    tile = Tile(128, 64, 64, 4, 3)
    programs = FAMILIES["tma"].programs(p, "dgrad", tile)
    assert FAMILIES["tma"].steps(p, "dgrad", tile, 1) == 4 * programs
    assert FAMILIES["gather"].steps(p, "dgrad", tile, 1) == 4 * FAMILIES["gather"].programs(p, "dgrad", tile) // 4
    three = forward_problem((2, 128, 14, 14), (256, 128, 3, 3), (2, 2), [(1, 1)] * 2, (1, 1), 1)
    assert FAMILIES["tma"].steps(three, "dgrad", tile, 1) == 4 * 9 * programs // 4  # each phase has some


def test_pixels_that_no_tap_meets_are_not_read():
    p = forward_problem((1, 8, 9, 8), (4, 8, 1, 2), (2, 3), [(0, 0)] * 2, (1, 1), 1)  # 5 rows and 3 pairs of columns of 9x8
    assert cost.least_bytes(p, "fprop", 2) == 2 * (8 * 5 * 6 + 4 * 8 * 2 + 4 * 5 * 3)
    assert cost.least_bytes(p, "wgrad", 2) == cost.least_bytes(p, "fprop", 2)
    assert cost.least_bytes(p, "dgrad", 2) == 2 * (8 * 9 * 8 + 4 * 8 * 2 + 4 * 5 * 3)


def test_a_gather_worked_by_hand():
    """2 x 5x5 outputs of 3x3 over 20 channels, 40 written: 50 pixels in 4 tiles of 16, 3 of channels, 9 taps, 2 blocks."""
    p = forward_problem((2, 20, 7, 7), (40, 20, 3, 3), (1, 1), [(0, 0)] * 2, (1, 1), 1)
    tile = Tile(16, 16, 16, 4, 2)
    c = FAMILIES["gather"].predict(p, "fprop", tile, 1, Access(4, True), HAND)
    assert c.flops == 2 * 50 * 40 * 20 * 9
    assert c.bytes == 4 * (2 * 20 * 49 + 40 * 20 * 9 + 2 * 40 * 25)
    assert c.programs == 4 * 3
    assert c.waves == 6
    assert c.executed == 12 * 18 * 2 * 16**3
    assert c.tile_waste == 1 - c.flops / c.executed
    assert c.wave_waste == 0
    parts = dict(c.parts)
    assert parts["products"] == 6 * 18 * 2 * 16**3
    assert parts["cache"] == 6 * 18 * 4 * 16 * 32
    # Four elements a thread, in one 16-byte copy. Four programs of four warps fit on a unit, which then always has an
    # instruction to issue. The unit runs six: what two of them do outside their loops overlaps with the others' loops.
    outside = 540 + 2 * 1 * 58 + 2 * 2
    assert parts["issue"] == 6 * 18 * (50 + 8 * 4 * 4 / 16) + 2 * outside
    assert parts["memory"] == c.bytes
    assert c.seconds == pytest.approx(cost.LAUNCH + 2 * cost.START + cost.PACE * outside + together(c), rel=1e-12)
    assert c.bound == "products"


def test_phases_of_a_strided_dgrad_are_counted_one_by_one():
    """Against the kernel's own numbering: for every phase, the taps that meet its pixels."""
    for extent, taps, stride, dilation in itertools.product((5, 8, 9), (1, 2, 3, 5), (1, 2, 3, 4), (1, 2, 6)):
        if extent < dilation * (taps - 1) + 1:
            continue
        p = forward_problem((1, 16, extent), (16, 16, taps), (stride,), [(0, 0)], (dilation,), 1)
        stride = p.S[2]  # a stride past the only output is clamped
        tile = Tile(16, 16, 16, 4, 2)
        met = sum((a - t * dilation) % stride == 0 for a in range(stride) for t in range(taps))
        blocks = math.ceil(math.ceil(extent / stride) / 16)
        c = FAMILIES["gather"].predict(p, "dgrad", tile, 1, Access(2, True), HAND)
        assert c.executed == met * blocks * 2 * 16**3
        assert c.programs == stride * blocks


def test_taps_of_phases_are_all_taps():
    for taps, stride, dilation in itertools.product((1, 2, 3, 5, 7), (1, 2, 3, 4, 9), (1, 2, 3, 6)):
        p = forward_problem((1, 3, 70), (4, 3, taps), (stride,), [(0, 0)], (dilation,), 1)
        met = [sum((a - t * dilation) % stride == 0 for t in range(taps)) for a in range(stride)]
        assert sorted(cost.phase_taps(p, "dgrad")) == sorted(n for n in met if n)


def test_packs_worked_by_hand():
    """6 groups of 3 -> 4 channels, 3x3 taps, 50 pixels: two packs of four groups, 108 columns in 7 steps."""
    p = forward_problem((2, 18, 7, 7), (24, 3, 3, 3), (1, 1), [(0, 0)] * 2, (1, 1), 6)
    c = FAMILIES["packed"].predict(p, "fprop", Tile(16, 16, 16, 4, 2), 1, Access(4, True), HAND)
    assert c.programs == 4 * 2
    assert c.executed == 8 * 7 * 2 * 16**3
    c = FAMILIES["packed_wgrad"].predict(p, "wgrad", Tile(16, 32, 16, 4, 2), 2, Access(4, True), HAND)
    assert c.programs == 2 * 4 * 2
    assert c.executed == 8 * 2 * 2 * 2 * 16 * 32 * 16  # 50 pixels: four blocks, two in each split


def test_a_split_wgrad_worked_by_hand():
    p = forward_problem((4, 16, 10), (16, 16, 1), (1,), [(0, 0)], (1,), 1)
    c = FAMILIES["wgrad"].predict(p, "wgrad", Tile(16, 16, 16, 4, 2), 2, Access(2, True), HAND)
    assert (c.programs, c.waves, c.workspace) == (2, 1, 2 * 256 * 4)
    assert c.executed == 2 * 2 * 2 * 16**3  # 40 pixels: three blocks, two in each split
    assert dict(c.parts)["memory"] == c.bytes + c.workspace
    after = 1.5 * cost.LAUNCH + c.workspace  # one byte a second
    outside = 560 + 1 * (2 * 16 * 16 * 2 / 16 / 128) * 32 + 2 * 2
    assert dict(c.parts)["issue"] == 2 * cost.PACE * (30 + 0.25 * 14 + 0.25 * 20.5)  # two steps of a program alone on its unit
    assert c.seconds == pytest.approx(cost.LAUNCH + cost.START + cost.PACE * outside + together(c) + after, rel=1e-12)


def test_a_split_gather_worked_by_hand():
    """3 blocks of 16 channels in two parts, of two and of one: 25 pixels in 2 tiles, one of channels, 9 taps."""
    p = forward_problem((1, 48, 7, 7), (16, 48, 3, 3), (1, 1), [(0, 0)] * 2, (1, 1), 1)
    tile = Tile(16, 16, 16, 4, 2)
    whole, split = (FAMILIES["gather"].predict(p, "fprop", tile, splits, Access(2, True), HAND) for splits in (1, 2))
    assert (whole.programs, whole.waves, whole.workspace) == (2, 1, 0)
    assert (split.programs, split.waves, split.workspace) == (4, 2, 2 * 16 * 25 * 4)
    assert whole.executed == 2 * 9 * 3 * 2 * 16**3
    assert split.executed == 2 * 9 * 2 * 2 * 2 * 16**3
    assert dict(split.parts)["memory"] == split.bytes + split.workspace
    after = 1.5 * cost.LAUNCH + split.workspace
    first = cost.PACE * (540 + 2 * 0.5 * 58 + 2 * 2)  # of the two programs on each unit, one beside the other
    assert split.seconds == pytest.approx(cost.LAUNCH + cost.START + first + together(split) + after, rel=1e-12)
    strided = forward_problem((1, 16, 9), (48, 16, 3), (2,), [(0, 0)], (1,), 1)
    c = FAMILIES["gather"].predict(strided, "dgrad", tile, 3, Access(8, True), HAND)
    assert (c.programs, c.workspace) == (2 * 3, 3 * 16 * 9 * 8)  # two phases of up to 5 pixels; fp64's own workspace
    assert c.executed == 3 * 3 * 2 * 16**3  # three taps over both phases, a block of each part


def test_frames_that_taps_do_not_meet_are_not_counted():
    """Four frames written as six: of 6 x 3 pairs of frame and tap 4 x 3 meet, and tiles of 16 stay in frames of 64 pixels."""
    p = forward_problem((1, 16, 6, 8, 8), (16, 16, 3, 3, 3), (1, 1, 1), [(0, 0), (1, 1), (1, 1)], (1, 1, 1), 1)
    c = FAMILIES["gather"].predict(p, "dgrad", Tile(16, 16, 16, 4, 2), 1, Access(2, True), HAND)
    assert (c.programs, c.executed) == (24, 24 * 27 * 2 // 3 * 2 * 16**3)
    assert c.tile_waste == 0
    beyond = FAMILIES["gather"].predict(p, "dgrad", Tile(128, 16, 16, 4, 2), 1, Access(2, True), HAND)
    assert beyond.executed == 3 * 27 * 2 * 128 * 16 * 16
    strided = forward_problem((1, 16, 7, 8, 8), (16, 16, 3, 3, 3), (2, 1, 1), [(1, 1)] * 3, (1, 1, 1), 1)
    # Outputs 0 to 3 by taps 0 to 2 meet frames -1 to 7 but for -1 and 7; four outputs of each of two phases were counted.
    assert cost.frames_met(strided) == (4 * 3 - 2) / (4 * 3)


def test_depthwise_is_counted_by_its_taps():
    p = forward_problem((1, 32, 9, 9), (32, 1, 3, 3), (1, 1), [(1, 1)] * 2, (1, 1), 32)
    c = FAMILIES["depthwise"].predict(p, "fprop", Tile(64, 32, 1, 4, 2), 1, Access(2, True), HAND)
    assert c.flops == 2 * 81 * 32 * 9
    assert c.executed == 2 * 9 * 2 * 64 * 32
    assert c.programs == 2


@pytest.mark.parametrize("pass_", PASSES)
def test_the_planner_takes_what_is_predicted_fastest(pass_):
    for layer, device in itertools.product(LAYERS[::5], DEVICES.values()):
        p = layer.problem
        best = plan.choose(p, pass_, plan.Operands(2, True), device)
        assert all(best.cost.seconds <= other.cost.seconds for other in best.others)
        for tile in FAMILIES[best.kernel].tiles_for(plan.Operands(2, True), p, pass_, device, ""):
            try:
                with plan.force(kernel=best.kernel, tile=tile):
                    forced = plan.choose(p, pass_, plan.Operands(2, True), device)
            except ValueError:
                continue  # does not fit the device
            assert forced.tile == tile
            assert forced.cost.seconds >= best.cost.seconds
            assert forced.reason.startswith("forced")
            assert f"predicted {forced.cost.seconds * 1e6:.1f} us, bound by {forced.cost.bound}" in str(forced)


def test_a_better_device_is_never_predicted_slower():
    better = {f.name: 2 * getattr(A100, f.name) for f in dataclasses.fields(Limits)}
    slow, fast = (dataclasses.replace(DEVICES["A100"], limits=limits) for limits in (A100, Limits(**better)))
    for layer, pass_ in itertools.product(LAYERS[::7], PASSES):
        p = layer.problem
        assert (
            plan.choose(p, pass_, plan.Operands(2, True), fast).cost.seconds
            <= plan.choose(p, pass_, plan.Operands(2, True), slow).cost.seconds
        )


def test_nothing_is_predicted_faster_than_the_device():
    for layer, pass_, (name, device) in itertools.product(LAYERS, PASSES, DEVICES.items()):
        c = plan.choose(layer.problem, pass_, plan.Operands(2, True), device).cost
        assert c.bytes / c.seconds <= device.limits.bandwidth, name
        assert c.executed / c.seconds <= device.limits.matrix_16, name
        assert 0 <= c.tile_waste < 1
        assert 0 <= c.wave_waste < 1


def test_limits_of_devices_by_name():
    assert limits_of("NVIDIA H200", 132, 9) == H200
    assert limits_of("NVIDIA A100-SXM4-80GB", 108, 8) == A100
    half = limits_of("a Hopper nobody listed", 66, 9)
    assert half.matrix_16 == H100.matrix_16 / 2
    assert half.clock == H100.clock
    assert limits_of("gfx942", 304, 0) == DEVICES["MI300X"].limits
