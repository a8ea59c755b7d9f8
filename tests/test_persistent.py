"""Persistent programs with specialised warps: every case that they can take, forced, against fp64; and what they refuse.

Triton's interpreter does not run Gluon, so the kernel is tested as compiled code: on a Hopper, or `pytest --compiled sm_90`.
"""

import dataclasses
import pathlib
import subprocess
import sys

import pytest
import torch

import tconv
from tconv import functional as TF
from tconv.dispatch.steps import Steps, followed
from tconv.launching import launch
from tconv.launching.cache import BoundedCache
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather
from tconv.planning.cost import LAUNCH, OVERLAP, PACE, START
from tconv.planning.device import ARCHITECTURES, DEVICES
from tconv.planning.epilogue import Epilogue
from tconv.planning.families import FAMILIES
from tconv.planning.persistent import HANDOVER, PERSISTENT_16, TURN, shared_bytes
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import Access, Tile
from tconv.planning.tma import weight_box
from tests import oracle
from tests.test_epilogues import check as check_epilogue
from tests.test_tma import SPARED, check_spared

ROOT = pathlib.Path(__file__).parent.parent
H200, A100, B200 = DEVICES["H200"], DEVICES["A100"], ARCHITECTURES["sm_100"][3]
PERSISTENT = FAMILIES["persistent"]
SQUARE, WIDE, TALL = Tile(128, 128, 64, 8, 6), Tile(256, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)
# Whose warpgroups take tiles by turns.
TURNS, LONG, SMALL = Tile(128, 128, 64, 4, 5), Tile(256, 64, 64, 4, 4), Tile(128, 64, 64, 4, 7)
CASES = [
    (oracle.Case("1-D, padding beyond the kernel", (3, 72, 45), 136, (3,), padding=5), SQUARE),
    (oracle.Case("2-D, every parameter differs", (6, 80, 9, 7), 72, (2, 3), padding=(3, 1), dilation=(3, 2)), SQUARE),
    (oracle.Case("3-D", (2, 64, 18, 3, 5), 72, (2, 2, 2), padding=(1, 0, 1), dilation=(2, 1, 2)), SQUARE),
    (oracle.Case("pointwise, tiles of 256 pixels", (2, 136, 17, 17), 200, (1, 1)), WIDE),
    (oracle.Case("tiles of 256 channels", (3, 72, 6, 9), 264, (1, 2), padding=(0, 1)), TALL),
    (oracle.Case("two slots", (3, 64, 8, 16), 64, (3, 1), padding=(1, 0)), Tile(128, 128, 64, 8, 2)),
    (oracle.Case("groups", (3, 256, 8, 16), 256, (1, 2), groups=2), SQUARE),
    (oracle.Case("transposed", (3, 72, 9, 7), 136, (2, 1), padding=1, transposed=True), SQUARE),
    (oracle.Case("by turns, 1-D, padding beyond the kernel", (3, 72, 45), 136, (3,), padding=5), TURNS),
    (oracle.Case("by turns, 2-D, every parameter differs", (6, 80, 9, 7), 72, (2, 3), padding=(3, 1), dilation=(3, 2)), TURNS),
    (oracle.Case("by turns, 3-D", (2, 64, 18, 3, 5), 72, (2, 2, 2), padding=(1, 0, 1), dilation=(2, 1, 2)), SMALL),
    (oracle.Case("by turns, pointwise, tiles of 256 pixels", (2, 136, 17, 33), 72, (1, 1)), LONG),
    (oracle.Case("by turns, two slots", (3, 64, 8, 16), 64, (3, 1), padding=(1, 0)), dataclasses.replace(TURNS, stages=2)),
    (oracle.Case("by turns, groups", (3, 128, 8, 16), 128, (1, 2), groups=2), SMALL),
    (oracle.Case("by turns, transposed", (3, 72, 9, 7), 136, (2, 1), padding=1, transposed=True), TURNS),
]
IDS = [str(case) for case, _ in CASES]
WGRAD, HIGH, BROAD = Tile(128, 128, 64, 8, 6), Tile(256, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)
FLAT = Tile(128, 128, 64, 8, 2)
WEIGHTS = [  # case, tile, splits
    (oracle.Case("1-D, padding beyond the kernel", (3, 72, 45), 136, (3,), padding=5), WGRAD, 3),
    (oracle.Case("2-D, every parameter differs", (6, 80, 9, 7), 72, (2, 3), padding=(3, 1), dilation=(3, 2)), WGRAD, 2),
    (oracle.Case("3-D", (2, 64, 6, 3, 5), 72, (2, 2, 2), padding=(1, 0, 1), dilation=(2, 1, 2)), WGRAD, 1),
    (oracle.Case("pointwise, tiles of 256 output channels", (2, 136, 17, 17), 264, (1, 1)), HIGH, 2),
    (oracle.Case("tiles of 256 input channels", (3, 264, 6, 9), 136, (1, 2), padding=(0, 1)), BROAD, 1),
    (oracle.Case("an odd extent that boxes divide", (2, 64, 9, 18), 64, (3, 3)), WGRAD, 2),
    (oracle.Case("one image, rows of one pixel, two slots", (1, 64, 70, 1), 64, (3, 1), padding=(1, 0)), FLAT, 1),
    (oracle.Case("groups of less than a tile", (2, 48, 6, 9), 80, (2, 2), groups=2), WGRAD, 2),
    (oracle.Case("transposed", (3, 72, 9, 7), 136, (2, 1), padding=1, transposed=True), WGRAD, 1),
]


@pytest.fixture
def small(monkeypatch, device):
    """A Hopper of two multiprocessors, so that a program computes several tiles."""
    planned = launch.device_of(torch.empty(0, device=device))
    if planned.interpreted or planned.generation != 9:
        pytest.skip("compiled code for Hopper: on one, or pytest --compiled sm_90")
    monkeypatch.setattr(launch, "device_of", lambda tensor: dataclasses.replace(planned, units=2))
    monkeypatch.setattr(launch, "_prepared", BoundedCache())
    return device


def check(case, tile, dtype, device, only=("y", "dx")):
    """Both passes of a case, in channels_last."""
    x, w, b = oracle.tensors(case, dtype, device, channels_last=True)
    ours = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    with tconv.force(kernel="persistent", tile=tile), tconv.recording() as calls:
        oracle.check(ours, case, x, w, b, only=only)
    assert [c.plan.kernel for c in calls if c.ours] == ["persistent"] * len(only)
    return calls


@pytest.mark.parametrize(("case", "tile"), CASES, ids=IDS)
def test_every_case(case, tile, small, poisoned):
    calls = check(case, tile, torch.bfloat16, small)
    assert max(c.plan.cost.programs for c in calls) > 2, "some program computes several tiles"


SEVERAL = oracle.Case("several tiles each", (3, 72, 8, 16), 136, (1, 2))
UPSIDE = oracle.Case("transposed", (3, 72, 9, 7), 136, (2, 1), padding=1, transposed=True)
GROUPS = oracle.Case("groups", (3, 128, 8, 16), 128, (1, 2), groups=2)
ALL = {"activation": "relu", "residual": "before", "scale": True, "shift": True}
ENDS = {  # case, tile, epilogue, whether the activation's argument is kept
    "all steps": (SEVERAL, WIDE, ALL, False),
    "all steps, by turns": (SEVERAL, TURNS, ALL, False),
    "all steps, by turns, transposed": (UPSIDE, TURNS, ALL, False),
    "all steps, by turns, groups": (GROUPS, SMALL, ALL, False),
    "a residual last, by turns": (SEVERAL, LONG, ALL | {"residual": "after"}, False),
    "an argument kept": (SEVERAL, SQUARE, {"activation": "silu"}, True),
    "an argument with a residual kept": (SEVERAL, SQUARE, ALL | {"activation": "silu"}, True),
    "an argument kept, and a residual last": (SEVERAL, SQUARE, ALL | {"activation": "gelu", "residual": "after"}, True),
    "nothing kept": (SEVERAL, TALL, {"activation": "silu", "residual": "after"}, False),
    "nothing kept, by turns": (SEVERAL, TURNS, {"activation": "silu", "scale": True}, False),
}


@pytest.mark.parametrize(("case", "tile", "how", "kept"), ENDS.values(), ids=ENDS)
def test_every_epilogue(case, tile, how, kept, small, poisoned):
    more = {} if kept else {"recompute": True}
    calls = check_epilogue(case, how, torch.bfloat16, small, True, {"kernel": "persistent", "tile": tile}, **more)
    plan = calls[0].plan
    assert (plan.kernel, plan.tile) == ("persistent", tile)
    assert plan.cost.programs > 2, "some program computes several tiles"


@pytest.mark.parametrize("tile", [SQUARE, TURNS], ids=["shared", "by turns"])
def test_an_epilogue_may_round_at_each_step(tile, small):
    """Its bits are those of the sequence, and those of both schedules are the same."""
    x, w, b = oracle.tensors(SEVERAL, torch.bfloat16, small, channels_last=True)
    with tconv.force(kernel="persistent", tile=SQUARE):
        y = TF.conv2d(x, w, b)
    given = {"scale": torch.randn(136).bfloat16(), "shift": torch.randn(136).bfloat16(), "residual": torch.randn_like(y)}
    with tconv.force(kernel="persistent", tile=tile):
        assert torch.equal(TF.conv2d(x, w, b), y)
        got = TF.conv2d(x, w, b, stepwise=True, **given)
    assert torch.equal(got, followed(y, Steps(**given), 2))


def check_weights(case, tile, splits, dtype, device, channels_last=True):
    """The weight gradient of a case."""
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    ours = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    with tconv.force(kernel="persistent_wgrad", tile=tile, splits=splits), tconv.recording() as calls:
        oracle.check(ours, case, x, w, b, only=("y", "dw"))
    (plan,) = (c.plan for c in calls if c.operation == "wgrad")
    assert (plan.kernel, plan.splits) == ("persistent_wgrad", splits)
    return plan


@pytest.mark.parametrize(("case", "tile", "splits"), WEIGHTS, ids=[str(case) for case, *_ in WEIGHTS])
def test_every_weight_gradient(case, tile, splits, small, poisoned):
    plan = check_weights(case, tile, splits, torch.bfloat16, small)
    assert plan.cost.programs > 2 or case.kernel == (1, 1), "some program computes several tiles"


@pytest.mark.parametrize("splits", [1, 2])
def test_a_weight_gradient_in_the_default_layout(splits, small, poisoned):
    """The operands are copied to channels last, dw is written where it belongs."""
    case = oracle.Case("", (2, 64, 8, 8), 64, (2, 2), padding=1)
    assert check_weights(case, WGRAD, splits, torch.float16, small, channels_last=False).staged == ("dy", "x")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", SPARED[:5], ids=str)
def test_what_no_window_reads_spoils_no_weight_gradient(case, small, poisoned):
    check_spared(case, float("inf"), "persistent_wgrad", small)


@pytest.mark.parametrize(
    ("n", "y", "kernel", "padding", "box", "boxes"),
    [
        (32, (1, 56, 56), 3, 0, (1, 1, 8, 8), 32 * 49),
        (2, (1, 14, 14), 3, 1, (2, 1, 2, 16), 7),
        (2, (1, 14, 14), 3, 0, (16, 1, 2, 2), 49),
        (2, (1, 14, 14), 2, 0, (2, 1, 2, 16), 7),
        (1, (1, 1, 30), 3, 1, (1, 1, 1, 64), 1),
        (1, (1, 1, 30), 3, 0, (32, 1, 1, 2), 15),
        (2, (8, 8, 8), 3, 1, (1, 1, 8, 8), 16),
    ],
)
def test_boxes_of_a_weight_gradient_overhang_only_where_x_ends(n, y, kernel, padding, box, boxes):
    x, t = [e if e == 1 else e - 2 * padding + kernel - 1 for e in y], [1 if e == 1 else kernel for e in y]
    pads = [(0, 0) if e == 1 else (padding, padding) for e in y]
    p = forward_problem((n, 64, *x), (64, 64, *t), (1, 1, 1), pads, (1, 1, 1), 1)
    assert y == p.Y
    assert weight_box(p, 64) == (box, boxes)


def test_half_precision(small, poisoned):
    check(*CASES[0], torch.float16, small)


@pytest.mark.parametrize("seed", range(1, 5))
def test_warps_run_in_any_order(seed, small, poisoned, request):
    """What is right whoever goes first: the warp that fetches, or those that multiply."""
    if not request.config.getoption("--compiled", None):
        pytest.skip("a GPU chooses the order itself")
    import simulator

    case, tile = oracle.Case("", (3, 72, 8, 16), 136, (1, 2)), dataclasses.replace(SQUARE, stages=2 + seed % 3)
    with simulator.checking(simulator.Options(seed=seed)):
        check(case, tile, torch.bfloat16, small, only=("y",))
        check(case, dataclasses.replace(TURNS, stages=2 + seed % 3), torch.bfloat16, small, only=("y",))
        check_weights(case, tile, 2, torch.bfloat16, small)


@pytest.mark.parametrize("units", [1, 4, 5, 9])
def test_tiles_are_handed_from_team_to_team(units, small, poisoned, monkeypatch):
    """Nine tiles: of one program; three or two of each; two or one; one of each, so that a team has nothing to do."""
    planned = launch.device_of(torch.empty(0, device=small))
    monkeypatch.setattr(launch, "device_of", lambda tensor: dataclasses.replace(planned, units=units))
    case = oracle.Case("", (9, 64, 8, 17), 64, (1, 2))
    (call,) = check(case, dataclasses.replace(SMALL, stages=3), torch.bfloat16, small, only=("y",))
    assert call.plan.cost.programs == 9


def test_what_passes_through_shared_memory_is_counted_as_priced(small, request):
    """Bytes that boxes fill and products read, for tiles of both schedules."""
    if not request.config.getoption("--compiled", None):
        pytest.skip("the simulator counts")
    import simulator

    case = oracle.Case("", (4, 128, 8, 16), 64, (1, 1))
    x, w, _ = oracle.tensors(case, torch.bfloat16, small, channels_last=True)
    for tile in (SQUARE, TURNS, SMALL, LONG):
        with tconv.force(kernel="persistent", tile=tile), simulator.profile() as counts:
            y = TF.conv2d(x, w)
        (kernel,) = counts.kernels
        tiles = 4 * 128 // tile.m
        stored = tiles * tile.m * tile.n * 2
        assert kernel.wgmma_bytes + kernel.boxes - stored == tiles * 2 * shared_bytes(tile, 2), tile
        assert y.shape == (4, 64, 8, 16)


def test_a_repeated_call_gives_the_same_bits(small, poisoned):
    """The first is launched by Triton's dispatch, the others directly. 19 steps a tile leave the ring in its midst."""
    case = oracle.Case("", (3, 72, 9, 7), 136, (1, 3))
    x, w, b = oracle.tensors(case, torch.bfloat16, small, channels_last=True)
    with tconv.force(kernel="persistent"), torch.no_grad():
        first, *others = (TF.conv2d(x, w, b) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    residual = torch.randn_like(first)
    with tconv.force(kernel="persistent"), torch.no_grad():
        ended, *others = (TF.conv2d(x, w, b, activation="relu", residual=residual) for _ in range(3))
    assert all(torch.equal(ended, other) for other in others)
    torch.testing.assert_close(ended, torch.relu(first + residual), rtol=2**-6, atol=2**-4)
    w.requires_grad_()
    y = TF.conv2d(x, w)
    with tconv.force(kernel="persistent_wgrad", splits=2):
        first, *others = (torch.autograd.grad(y, w, y.detach(), retain_graph=True)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_the_default_layout_is_copied_but_not_written(small, poisoned):
    case = oracle.Case("", (2, 64, 8, 8), 64, (1, 1), padding=1)
    x, w, b = oracle.tensors(case, torch.bfloat16, small)
    right = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1)
    with tconv.force(kernel="persistent"), tconv.recording() as calls:
        y = TF.conv2d(x, oracle.to_channels_last(w), b, padding=1)
    assert calls
    torch.testing.assert_close(y.double(), right, rtol=2**-7, atol=2**-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinity_meets_the_halo_but_no_tail(small, poisoned):
    """As by tma: padding takes part in the arithmetic; channels past the last one, and the next tap's, do not."""
    x = oracle.to_channels_last(torch.ones(1, 72, 4, 4, device=small, dtype=torch.float16))
    w = oracle.to_channels_last(torch.ones(64, 72, 1, 3, device=small, dtype=torch.float16))
    w[0, 0, 0, 0] = float("inf")
    x[0, 3, 2, 1] = float("nan")
    right = torch.nn.functional.conv2d(x.double(), w.double(), padding=(0, 1))
    with tconv.force(kernel="persistent"):
        got = TF.conv2d(x, w, padding=(0, 1))
    torch.testing.assert_close(got.double(), right, equal_nan=True)


REFUSED = {
    "a strided fprop": (oracle.Case("", (1, 64, 6, 6), 64, (3, 3), stride=2), "unit stride"),
    "a strided transposed layer": (oracle.Case("", (1, 64, 6, 6), 64, (3, 3), stride=2, transposed=True), "strided dgrad"),
    "channels that are no multiple of 16 bytes": (oracle.Case("", (1, 12, 6, 6), 64, (3, 3)), "multiples of 16 bytes"),
    "a result whose channels are not": (oracle.Case("", (1, 64, 6, 6), 12, (3, 3)), "multiples of 16 bytes"),
    "groups of parts of tiles": (oracle.Case("", (1, 128, 6, 6), 192, (3, 3), groups=2), "no tile fits"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_are_errors(reason, small):
    case, message = REFUSED[reason]
    x, w, b = oracle.tensors(case, torch.float16, small, channels_last=True)
    with tconv.force(kernel="persistent"), pytest.raises(ValueError, match=message):
        getattr(TF, f"conv{'_transpose' if case.transposed else ''}2d")(x, w, b, **case.arguments)


def test_other_dtypes_and_layouts_of_the_result_are_refused(small):
    x, w = torch.randn(1, 64, 6, 6, device=small), torch.randn(64, 64, 3, 3, device=small)
    with tconv.force(kernel="persistent"):
        with pytest.raises(ValueError, match="2 bytes an element, not 4"):
            TF.conv2d(oracle.to_channels_last(x), oracle.to_channels_last(w))
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            TF.conv2d(x.half(), w.half())


def test_the_interpreter_does_not_run_it(device):
    if oracle.compiled():
        pytest.skip("this is compiled code")
    x, w = torch.randn(1, 64, 6, 6).half(), torch.randn(64, 64, 3, 3).half()
    with tconv.force(kernel="persistent"), pytest.raises(ValueError, match="interpreter does not run Gluon"):
        TF.conv2d(oracle.to_channels_last(x), oracle.to_channels_last(w))


WITHOUT = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = None
import torch, tconv
from tconv.planning.device import DEVICES
from tests.test_persistent import dense, prepared

x, w = torch.ones(1, 64, 4, 4), torch.ones(64, 64, 1, 1)
assert torch.equal(tconv.functional.conv2d(x, w), torch.full((1, 64, 4, 4), 64.0))
assert prepared(dense(64, 56), DEVICES["H200"]).call.plan.kernel == "tma"
with tconv.force(kernel="persistent"):
    try:
        prepared(dense(64, 56), DEVICES["H200"])
    except ValueError as e:
        print(e)
"""


def test_a_triton_with_another_gluon_goes_without_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "forced plan cannot run: this version of Triton has another Gluon than persistent is written in\n"


def test_what_devices_and_tiles_it_is_for():
    assert PERSISTENT.why_illegal(SQUARE, 2, H200) is None
    for device in (A100, B200):
        assert "no wgmma" in PERSISTENT.why_illegal(SQUARE, 2, device)
    assert "2 bytes an element" in PERSISTENT.why_illegal(SQUARE, 4, H200)
    assert PERSISTENT.why_illegal(TURNS, 2, H200) is None
    assert "with the result's" in PERSISTENT.why_illegal(dataclasses.replace(TURNS, stages=6), 2, H200)
    for change in ({"warps": 2}, {"n": 64}, {"m": 512}, {"k": 32}, {"stages": 1}):
        assert "want 4 or 8 warps" in PERSISTENT.why_illegal(dataclasses.replace(SQUARE, **change), 2, H200), change
    assert "bytes of shared memory with the result's" in PERSISTENT.why_illegal(dataclasses.replace(WIDE, stages=4), 2, H200)


def dense(images, extent, channels=256):
    return forward_problem((images, channels, extent, extent), (channels, channels, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def prepared(problem, device, pass_="fprop"):
    x, w, y = (shaped(problem.shape(name), True, torch.bfloat16) for name in "xwy")
    first, third = (x, y) if pass_ == "fprop" else (y, x)
    return prepare_gather(pass_, problem, first, w, None, third, device)


def plan(problem, device, pass_="fprop"):
    return prepared(problem, device, pass_).call.plan


@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_the_planner_prefers_it_for_several_tiles_per_multiprocessor(pass_):
    large, small_ = dense(64, 56), dense(16, 14)
    assert plan(large, H200, pass_).kernel == "persistent"
    assert plan(large, H200, pass_).cost.waves >= 3
    assert plan(small_, H200, pass_).kernel == "tma"
    for device in (A100, B200):
        assert plan(large, device, pass_).kernel != "persistent"


def test_only_what_has_not_passed_its_check_is_passed_over():
    large = dense(64, 56)
    without = plan(large, dataclasses.replace(H200, check=lambda mechanism: mechanism != "specialised"))
    assert without.kernel == "tma"
    (barred,) = (other for other in without.others if other.kernel == "persistent")
    assert barred.reason.startswith("not chosen: specialised has not passed its check on this device")
    plain = plan(large, dataclasses.replace(H200, check=lambda mechanism: False))
    assert plain.mechanism == ""
    assert {other.kernel for other in plain.others} >= {"tma", "persistent"}


def test_a_tile_after_the_first_costs_a_turn():
    p = dense(64, 56)
    with tconv.force(kernel="persistent", tile=WIDE):
        cost = plan(p, H200).cost
    parts = sum(seconds**OVERLAP for _, seconds in cost.parts) ** (1 / OVERLAP)
    first = PACE * PERSISTENT.outside(p, WIDE, Access(2, True)) / H200.limits.clock
    assert cost.seconds == pytest.approx(LAUNCH + START + PERSISTENT.start + first + (cost.waves - 1) * TURN + parts)


def test_by_turns_the_end_of_a_tile_is_hidden_as_far_as_a_loop_lasts():
    for p, hidden in (
        (dense(64, 56), True),
        (forward_problem((64, 64, 56, 56), (64, 64, 1, 1), (1, 1), ((0, 0),) * 2, (1, 1), 1), False),
    ):
        with tconv.force(kernel="persistent", tile=SMALL):
            cost = plan(p, H200).cost
        loop = dict(cost.parts)["products"] / cost.waves
        assert (loop > TURN) is hidden
        turn = HANDOVER + max(0, TURN - loop) / 2
        parts = sum(seconds**OVERLAP for _, seconds in cost.parts) ** (1 / OVERLAP)
        first = PACE * PERSISTENT.outside(p, SMALL, Access(2, True)) / H200.limits.clock
        assert cost.seconds == pytest.approx(LAUNCH + START + PERSISTENT.start + first + (cost.waves - 1) * turn + parts)


def test_by_turns_is_for_short_loops():
    short, long = dense(64, 56, 64), dense(64, 56, 512)
    assert plan(short, H200).kernel == plan(long, H200).kernel == "persistent"
    assert (plan(short, H200).tile.warps, plan(long, H200).tile.warps) == (4, 8)


def test_a_tile_is_offered_with_the_epilogues_that_it_has_registers_for():
    def tiles(**how):
        return PERSISTENT.tiles(Access(2, True, epilogue=Epilogue(**how)))

    assert tiles() == tiles(activation="silu", scale=True) == PERSISTENT_16
    assert tiles(activation="relu", residual="before", shift=True) == PERSISTENT_16
    for how in ({"residual": "after"}, {"kept": True}, {"stepwise": True}):
        assert tiles(activation="silu", **how) == (SQUARE,), how
    assert tiles(activation="gelu") == (SQUARE,)


@pytest.mark.parametrize(("images", "programs"), [(64, 132), (1, 4)])
def test_a_grid_has_at_most_a_program_per_multiprocessor(images, programs):
    with tconv.force(kernel="persistent", tile=SQUARE):
        assert prepared(dense(images, 14), H200).grid == (programs,)
