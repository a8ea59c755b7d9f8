"""Batch invariance: an image's result and input gradient have the same bits whatever else is in the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import pytest
import torch

import tconv
from bench import invariance
from bench.layers import layers
from tconv import functional as TF
from tconv.kernels.common import integers
from tconv.launching import prepare
from tconv.launching.memory_format import addressing, shaped
from tconv.launching.prepare import prepare_gather
from tconv.launching.record import Slower
from tconv.planning import batch_invariance
from tconv.planning.device import DEVICES
from tconv.planning.operands import GatherPass
from tconv.planning.problem import forward_problem
from tests import cases, oracle
from tests.test_cost import problem

FUNCTIONS = {(rank, t): getattr(TF, f"conv{'_transpose' if t else ''}{rank}d") for rank in (1, 2, 3) for t in (False, True)}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# What may differ between batches, since no product's place in a sum depends on it: the extents of a box of pixels, whether the
# result is stored as one, the width of offsets, and whether a pointwise dimension counts as images (RANK, and FIELD, a mask's
# bits per dimension).
FREE = {"BN", "B0", "B1", "B2", "Y_PIXELS", "WIDE", "RANK", "FIELD", "Y_BOX"}
LOADS = {"X_VEC", "X_PIXELS", "READ"}  # for tensors that are addressed otherwise than torch allocates them
# Of the integers, those that say which products a sum has, and in which order.
ORDER = {"CI", "CO", "C", "G", "M", "PACK", "chunk", *(f"{name}{d}" for name in "TDSPg" for d in range(3))}


@pytest.fixture(autouse=True)
def ends_off():
    yield
    assert not tconv.is_batch_invariant()


# --- the plan, for devices that are not here ---


def prepared(pass_, p, device, channels_last, dtype, invariant=True, outer=None, offset=0):
    """The launch of fprop or dgrad on tensors without storage, the read one with an image stride and an address of its own."""
    x, w, y = (shaped(p.shape(which), channels_last, dtype) for which in "xwy")
    read, result = (x, y) if pass_ == "fprop" else (y, x)
    if outer is not None or offset:
        strides = (read.stride(0) if outer is None else outer, *read.stride()[1:])
        memory = torch.empty(0, dtype=dtype, device="meta").set_(
            torch.UntypedStorage(1 << 40, device="meta"), offset, read.shape, strides
        )
        read = memory
    return prepare_gather(pass_, p, read, w, None, result, device, batch_invariant=invariant)


def order(launch, besides=FREE):
    """What decides the order in which an element's products are added, and how they are rounded."""
    plan, named = launch.call.plan, zip(integers(launch.kernel), launch.integers, strict=True)
    return (
        plan.kernel, plan.tile, plan.splits, plan.precision,
        {name: value for name, value in launch.constants.items() if name not in besides},
        {name: value for name, value in named if name in ORDER},
    )  # fmt: skip


PROBLEMS = [layer.problem for layer in layers()] + [
    problem(case) for case in cases.ALL if case.padding not in ("same", "valid")
]


def images(p, n):
    return dataclasses.replace(p, N=n)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("H200", torch.bfloat16), ("H200", torch.float32), ("A100", torch.bfloat16), ("MI300X", torch.bfloat16)],
    ids=str,
)
def test_every_batch_has_the_same_plan(device, channels_last, dtype):
    differ, kernels, first = 0, set(), (device, dtype) == ("H200", torch.bfloat16)
    for p in PROBLEMS:
        for pass_ in ("fprop", "dgrad"):
            batches = (1, 2, 3, 9, 64) if first else (1, 3, 64)
            one, *more = (prepared(pass_, images(p, n), DEVICES[device], channels_last, dtype) for n in batches)
            kernels.add(one.call.plan.kernel)
            for launch in more:
                assert order(launch) == order(one), (p, pass_)
                assert launch.call.plan.staged == one.call.plan.staged
                assert [copy and copy.shape[1:] for copy in launch.copies] == [copy and copy.shape[1:] for copy in one.copies]
            if first:
                free = [prepared(pass_, images(p, n), DEVICES[device], channels_last, dtype, False) for n in (1, 64)]
                differ += order(free[0]) != order(free[1])
    assert not first or kernels >= {"gather", "packed", "rows", "patch", "strip", "tma"}
    assert not first or differ > 20, "the plans of this test do not depend on the batch anyway"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_images_that_lie_anywhere_have_the_same_plan(channels_last):
    """With gaps between the images, which may not be whole vectors, or at an address that is no multiple of 16 bytes."""
    copied = 0
    for p in PROBLEMS:
        for pass_ in ("fprop", "dgrad"):
            one = prepared(pass_, p, DEVICES["H200"], channels_last, torch.bfloat16)
            size = shaped(p.shape("x" if pass_ == "fprop" else "y"), channels_last, torch.bfloat16)[0].numel()
            for n, outer, offset in ((3, size * 2, 0), (3, size + 1, 0), (1, size, 5), (2, size, 1)):
                launch = prepared(
                    pass_, images(p, n), DEVICES["H200"], channels_last, torch.bfloat16, outer=outer, offset=offset
                )
                assert order(launch, FREE | LOADS) == order(one, FREE | LOADS), (p, pass_, n, outer, offset)
                assert set(launch.call.plan.staged) >= set(one.call.plan.staged)
                copied += launch.call.plan.staged != one.call.plan.staged
    assert channels_last is (copied > 0), "boxes were copied where they need not be, or none was where it must"


def test_a_problem_is_rewritten_as_for_one_image():
    """A dgrad with one output along a dimension gets a longer stride where a phase has many pixels, of all images."""
    for n in (1, 4, 64):
        p = forward_problem((n, 8, 3, 6, 6), (8, 8, 3, 3, 3), (1, 1, 1), [(0, 0)] * 3, (1, 1, 1), 1)
        rules = [GatherPass("dgrad", p, *addressed(p), True, batch_invariant=on).rules for on in (False, True)]
        assert rules == [("slice",) if n > 1 else (), ()], (n, rules)


def addressed(p):
    return (addressing(shaped(p.shape(which), True, torch.bfloat16)) for which in "ywx")


def test_a_result_is_not_split():
    p = forward_problem((1, 1024, 8, 8), (128, 1024, 3, 3), (1, 1), [(1, 1), (1, 1)], (1, 1), 1)
    split, whole = (prepared("fprop", p, DEVICES["H200"], True, torch.bfloat16, on).call.plan for on in (False, True))
    assert split.splits > 1 == whole.splits
    assert "batch-invariant: as for 8 images; predicted" in str(whole)
    assert "batch-invariant" not in str(split)
    with tconv.force(kernel="gather", splits=2):
        for n in (1, 64):
            forced = prepared("fprop", images(p, n), DEVICES["H200"], True, torch.bfloat16)
            assert forced.splits == 2
            assert "batch-invariant: forced" in forced.call.reason


def test_of_a_record_only_what_was_wrong_counts(monkeypatch):
    p = forward_problem((2, 64, 14, 14), (64, 64, 3, 3), (1, 1), [(1, 1), (1, 1)], (1, 1), 1)
    x, w, y = (shaped(p.shape(which), True, torch.bfloat16) for which in "xwy")

    class Book:
        empty, wrong = False, set()

        def barred(self, where, cell):
            return self.wrong

        def find(self, where, cell):
            raise AssertionError("looked up what was measured in some batch")

    book = Book()
    monkeypatch.setattr(prepare, "book", lambda: book)

    def launch():
        return prepare_gather("fprop", p, x, w, None, y, DEVICES["H200"], "auto", batch_invariant=True)

    book.wrong = {launch().call.plan.choices}
    with pytest.raises(Slower, match="the planner's choice was wrong or failed"):
        launch()


def test_what_it_costs():
    """Nothing in batches of the size that is planned for, if channels are not split there."""
    large = [layer for layer in layers() if layer.name in ("resnet50_l1_3x3", "convnext_b_dw7_128_56")]
    for images_, least, most in ((8, 1, 1), (64, 1, 3)):
        found = invariance.ratios(large, "channels_last", images_, DEVICES["H100"])
        assert len(found) == 4
        assert all(least <= ratio <= most for ratio in found.values()), found


# --- bits ---


def bits(t):
    return t.contiguous().view(BITS[t.itemsize])


def both(case, x, w, b, dy):
    """y and dx."""
    x = x.detach().requires_grad_()
    y = FUNCTIONS[case.rank, case.transposed](x, w, b, **case.arguments)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def batch_of(case, count, dtype, channels_last, device):
    case = dataclasses.replace(case, x=(count, *case.x[1:]))
    x, w, b = oracle.tensors(case, dtype, device, channels_last)
    y = (oracle.TRANSPOSED if case.transposed else oracle.FORWARD)[case.rank](x, w, b, **case.arguments)
    return case, x, w, b, torch.empty_like(y).copy_(oracle.upstream(y))


def differing(case, x, w, b, dy, parts):
    """Of (start, stop) those parts of a batch whose images have other bits than in the whole batch, with "y" or "dx"."""
    whole = both(case, x, w, b, dy)
    found = []
    for start, stop in parts:
        part = both(case, x[start:stop], w, b, dy[start:stop])
        for name, of_part, of_whole in zip(("y", "dx"), part, whole, strict=True):
            if not torch.equal(bits(of_part), bits(of_whole[start:stop])):
                found.append((start, stop, name))
    return found


@pytest.fixture(params=["here", "A100", "H200"])
def planned(request, monkeypatch):
    """The interpreter runs its own plans, or those that a GPU would get. None of these problems is large enough for Gluon."""
    from tconv.dispatch import entry
    from tconv.launching import launch

    if request.param != "here":
        if oracle.compiled():
            pytest.skip("compiled code runs on one device")
        monkeypatch.setattr(launch, "device_of", lambda t: DEVICES[request.param])
    entry.forget()
    launch.forget()
    yield request.param
    entry.forget()
    launch.forget()


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_an_image_alone_is_an_image_of_a_batch(case, device):
    odd = cases.ALL.index(case) % 2 == 1
    given = batch_of(case, 3, torch.bfloat16 if odd else torch.float32, odd, device)
    with tconv.batch_invariant(), tconv.recording() as calls:
        assert differing(*given, [(2, 3)]) == []
    assert all(call.ours and "batch-invariant" in call.reason for call in calls)


SOME = [
    *(c for c in cases.FEW if c.rank < 3),
    oracle.Case("frames that few tiles meet", (1, 8, 3, 6, 6), 8, (3, 3, 3), padding=1),
    oracle.Case("patches, whose taps become channels", (1, 3, 8, 8), 8, (4, 4), stride=4),
    oracle.Case("few written channels", (1, 64, 6, 9), 3, (3, 3), padding=1),
    oracle.Case("channels that are padded", (1, 3, 7, 5), 8, (3, 3), padding=1),
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_with_the_plans_of_a_gpu(case, planned, device):
    if planned == "here" and case in cases.ALL and not oracle.compiled():
        pytest.skip("the test before has it")
    dtype = torch.float32 if "groups" in case.reason else torch.bfloat16
    with tconv.batch_invariant():
        assert differing(*batch_of(case, 3, dtype, planned != "A100", device), [(0, 1), (1, 3)]) == []


DEEP = oracle.Case("many channels, few pixels, which are split", (1, 512, 4, 4), 128, (1, 1))


def test_batches_of_one_to_nine(planned, device):
    given = batch_of(DEEP, 9, torch.float32, True, device)
    every = [(9 - n, 9) for n in (range(1, 9) if planned == "A100" else (1, 4, 8))]
    with tconv.batch_invariant():
        assert differing(*given, every) == []
    if planned == "A100":
        assert differing(*given, every[:1]) != [], "bits do not depend on the batch anyway"


PATCHES = [
    oracle.Case("runs that are joined with those of the next pixel", (1, 5, 6, 8), 20, (2, 2), stride=2),
    oracle.Case("one pixel", (1, 3, 4, 8), 24, (4, 8), stride=(4, 8)),
    oracle.Case("transposed lines", (1, 40, 7), 3, (16,), stride=16, transposed=True),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patches_of_batches_of_one_to_nine(case, channels_last, planned, device):
    if planned == "A100" and channels_last:
        pytest.skip("as the H200")
    given = batch_of(case, 9, torch.bfloat16, channels_last, device)
    every = [(9 - n, 9) for n in (range(1, 9) if planned == "here" else (1, 3, 8))]
    with tconv.force(kernel="patch"), tconv.batch_invariant(), tconv.recording() as calls:
        found = differing(*given, every)
    assert not [name for *_, name in found if name == ("y" if case.transposed else "dx")]  # the other is by another kernel
    plans = [call.plan for call in calls if call.operation == "dgrad"]
    assert {(plan.kernel, plan.tile) for plan in plans} == {("patch", plans[0].tile)}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_weight_gives_nan_in_the_same_pixels(planned, device):
    """A dgrad of several frames walks only the taps that some pixel of a tile needs, but not if it is batch-invariant."""
    case = oracle.Case("frames of 9 pixels", (1, 4, 5, 3, 3), 4, (3, 2, 2))
    case, x, w, b, dy = batch_of(case, 4, torch.float32, False, device)
    w[0, :, 1] = float("inf")
    with tconv.force(kernel="gather", tile=tconv.Tile(16, 16, 16), staged=False), tconv.batch_invariant():
        assert differing(case, x, w, b, dy, [(1, 2), (3, 4)]) == []


def test_an_image_without_a_batch_dimension(device):
    case, x, w, b, _ = batch_of(cases.FEW[1], 2, torch.float32, False, device)
    with tconv.batch_invariant():
        y, alone = (TF.conv2d(t, w, b, **case.arguments) for t in (x, x[1]))
    assert torch.equal(bits(y[1]), bits(alone))


@pytest.mark.parametrize("start", [1, 2])
def test_views_of_a_batch(start, planned, device):
    """Every second image, and images that begin at addresses of any alignment."""
    case = oracle.Case("odd images", (1, 8, 3, 5), 8, (3, 3), padding=1)
    case, x, w, b, dy = batch_of(case, 5, torch.bfloat16, True, device)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:]
    moved = memory.as_strided(x.shape, x.stride()).copy_(x)
    with tconv.batch_invariant():
        whole = both(case, x, w, b, dy)
        for part in (both(case, x[start::2], w, b, dy[start::2]), both(case, moved[start::2], w, b, dy[start::2])):
            assert all(torch.equal(bits(g), bits(s[start::2])) for g, s in zip(part, whole, strict=True))


# --- the setting ---


def test_blocks_count_and_the_process_is_apart():
    with tconv.batch_invariant(), tconv.batch_invariant():
        tconv.use_batch_invariance(False)
        assert tconv.is_batch_invariant()
    assert not tconv.is_batch_invariant()
    tconv.use_batch_invariance(True)
    try:
        with contextlib.suppress(KeyError), tconv.batch_invariant():
            raise KeyError
        assert tconv.is_batch_invariant()
    finally:
        tconv.use_batch_invariance(False)
    for wrong in (1, None, "on"):
        with pytest.raises(TypeError, match=f"mode must be True or False, got {wrong!r}"):
            tconv.use_batch_invariance(wrong)
    assert batch_invariance._blocks == 0


def reasons(calls, *operations):
    return ["batch-invariant" in call.reason for call in calls if call.operation in operations]


def test_it_holds_in_every_thread_until_the_last_block_ends(device):
    layer, x = tconv.Conv1d(4, 4, 3, device=device), torch.randn(2, 4, 8, device=device)
    begun, end = threading.Event(), threading.Event()

    def other():
        with tconv.batch_invariant():
            begun.set()
            end.wait(60)

    thread = threading.Thread(target=other)
    with tconv.batch_invariant():
        thread.start()
        assert begun.wait(60)
    with tconv.recording() as calls:
        layer(x)
        end.set()
        thread.join()
        layer(x)
    assert reasons(calls, "fprop") == [True, False]


def test_a_backward_pass_does_as_its_forward_pass_did(device):
    """In every repetition: the fast path, from the third call on, tells the two settings apart."""
    layer = tconv.Conv1d(4, 4, 3, device=device)
    x = torch.randn(2, 4, 8, device=device, requires_grad=True)
    with tconv.recording() as calls:
        for _ in range(4):
            with tconv.batch_invariant():
                y = layer(x)
            z = layer(x)
            y.sum().backward()
            with tconv.batch_invariant():
                z.sum().backward()
    assert reasons(calls, "fprop", "dgrad") == [True, False] * 8
    assert not any(reasons(calls, "wgrad", "bias"))


@pytest.mark.parametrize("transposed", [False, True])
def test_under_enable_a_backward_pass_does_as_the_setting_says_when_it_runs(transposed, device):
    cls = torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d
    layer, x = cls(4, 4, 3, device=device), torch.randn(2, 4, 8, device=device, requires_grad=True)
    with tconv.enabled(), tconv.recording() as calls:
        for _ in range(2):
            with tconv.batch_invariant():
                y = layer(x)
                y.sum().backward()
                y = layer(x)
            y.sum().backward()
    assert reasons(calls, "fprop", "dgrad") == [True, True, True, False] * 2


def test_a_compiled_graph_does_as_the_setting_says_when_it_runs(device):
    """It is not compiled anew for that."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    layer, x = tconv.Conv1d(4, 4, 3, device=device), torch.randn(2, 4, 8, device=device, requires_grad=True)
    compiled = torch.compile(layer, backend=backend)
    with tconv.recording() as calls:
        compiled(x).sum().backward()
        with tconv.batch_invariant():
            y = compiled(x)
        y.sum().backward()
    assert reasons(calls, "fprop", "dgrad") == [False, False, True, False]
    assert backend.frame_count == 1


def test_what_torch_computes_says_so(device):
    """torch's own kernels give what they give."""
    x, w = (torch.ones(shape, dtype=torch.complex64, device=device) for shape in ((1, 2, 4), (3, 2, 3)))
    with tconv.batch_invariant(), tconv.recording() as calls:
        TF.conv1d(x, w)
    assert str(calls[0]) == "conv1d: torch (dtype torch.complex64; its result may depend on the batch)"


def test_explain(device):
    layer, x = tconv.Conv1d(4, 4, 3, device=device), torch.randn(2, 4, 8, device=device)
    with tconv.batch_invariant():
        found = tconv.explain(layer, x)
    assert reasons(found.calls, "fprop", "dgrad") == [True, True]
    assert not any(reasons(tconv.explain(layer, x).calls, "fprop", "dgrad", "wgrad"))
