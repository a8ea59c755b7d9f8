"""What is planned, what may be forced, what is compiled, and the arithmetic of problems."""

import dataclasses
import itertools
import math

import pytest
import torch

import tconv
from tconv import functional as TF
from tconv.launching.memory_bound import prepare_bias
from tconv.launching.memory_format import shaped
from tconv.launching.prepare import prepare_gather, prepare_wgrad
from tconv.planning import plan
from tconv.planning.addressing import Addressing
from tconv.planning.depthwise import DIRECT
from tconv.planning.device import ARCHITECTURES, DEPENDENT, DEVICES, INTERPRETER, Device
from tconv.planning.families import FAMILIES
from tconv.planning.gemm import GEMM_16, STEPS_OF_32
from tconv.planning.packed import pack
from tconv.planning.problem import forward_problem, transposed_problem
from tconv.planning.strip import STRIP_16
from tconv.planning.tiles import Access, Tile

H200 = Device("H200", 132, 232448)
SMALL = Device("a GPU with little shared memory", 40, 65536)


def conv(x, w, stride=1, padding=0, dilation=1, groups=1):
    rank = len(x) - 2
    return forward_problem(x, w, (stride,) * rank, ((padding,) * 2,) * rank, (dilation,) * rank, groups)


def test_a_problem_worked_by_hand():
    p = conv((2, 6, 7, 9), (4, 3, 3, 2), stride=2, padding=1, groups=2)
    assert (p.X, p.Y, p.T, p.S, p.P, p.D) == ((1, 7, 9), (1, 4, 5), (1, 3, 2), (1, 2, 2), (0, 1, 1), (1, 1, 1))
    assert p.gemm("fprop") == (2 * 4 * 5, 2, 3 * 6)
    assert p.gemm("dgrad") == (2 * 7 * 9, 3, 2 * 6)
    assert p.gemm("wgrad") == (2, 3 * 6, 2 * 4 * 5)
    assert [p.phases(name) for name in ("fprop", "dgrad", "wgrad")] == [1, 4, 1]
    assert p.shape("x") == (2, 6, 7, 9)
    assert p.shape("w") == (4, 3, 3, 2)
    assert p.shape("y") == (2, 4, 4, 5)
    assert str(p) == "N2 C6 7x9 -> K4 4x5, filter 3x2 stride 2x2 padding 1x1 groups 2"


def test_a_transposed_problem_is_the_one_whose_dgrad_it_is():
    t = transposed_problem((2, 4, 4, 5), (4, 3, 3, 2), (2, 2), (1, 1), (0, 0), (1, 1), 2)
    p = conv((2, 6, *t.X[1:]), (4, 3, 3, 2), stride=2, padding=1, groups=2)
    assert t == p
    assert hash(t) == hash(p)


def test_a_stride_past_the_only_output_makes_no_phases():
    assert conv((1, 1, 1, 1), (1, 1, 1, 1), stride=1000).phases("dgrad") == 1


@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_every_plan_on_a_gpu_is_legal_and_says_why(pass_):
    shapes = [((32, 64, 56, 56), (64, 64, 3, 3)), ((1, 3, 20, 20), (7, 3, 5, 5)), ((8, 512, 7, 7), (2048, 512, 1, 1))]
    for (x, w), itemsize, tc, narrow, device in itertools.product(
        shapes, (2, 4, 8), (True, False), (True, False), (H200, SMALL)
    ):
        chosen = plan.choose(conv(x, w), pass_, plan.Operands(itemsize, tc, narrow), device)
        assert FAMILIES[chosen.kernel].why_illegal(chosen.tile, itemsize, device) is None
        assert chosen.reason
        assert chosen.splits * math.prod(w) * 4 <= max(plan.WORKSPACE, math.prod(w) * 8)


def test_large_layers_get_large_tiles_and_small_ones_fill_the_device():
    large = plan.choose(conv((64, 256, 56, 56), (256, 256, 3, 3), padding=1), "fprop", plan.Operands(2, True), H200)
    assert large.tile in GEMM_16[:2]
    small = plan.choose(conv((1, 64, 14, 14), (64, 64, 3, 3), padding=1), "fprop", plan.Operands(2, True), H200)
    assert small.tile.m * small.tile.n < GEMM_16[0].m * GEMM_16[0].n
    wgrad = plan.choose(conv((32, 64, 56, 56), (64, 64, 3, 3), padding=1), "wgrad", plan.Operands(2, True), H200)
    assert wgrad.splits > 1


def test_channels_are_split_where_tiles_are_few_and_only_there():
    def chosen(x, w, pass_="fprop", **parameters):
        return plan.choose(conv(x, w, **parameters), pass_, plan.Operands(2, True), H200)

    for pass_ in ("fprop", "dgrad"):
        small = chosen((2, 1280, 8, 8), (1280, 1280, 3, 3), pass_, padding=1)
        assert small.splits > 2
        assert f"{small.splits} splits" in str(small)
        with tconv.force(splits=1):
            whole = chosen((2, 1280, 8, 8), (1280, 1280, 3, 3), pass_, padding=1)
        assert whole.splits == 1
        assert small.cost.seconds < whole.cost.seconds
    assert chosen((64, 256, 56, 56), (256, 256, 3, 3), padding=1).parts == (1,)  # fills the device by itself
    assert chosen((1, 64, 8, 8), (64, 64, 3, 3), padding=1).parts == (1,)  # one block of channels
    wide = chosen((1, 1024, 96, 80), (128, 1024, 1, 1))
    assert max(wide.parts) > 1
    assert max(wide.parts) * 4 * 128 * 96 * 80 <= plan.WORKSPACE


def test_the_default_layout_is_copied_where_that_pays_and_only_there():
    def plans(p):
        x, w, y = (shaped(p.shape(name), False, torch.bfloat16) for name in "xwy")
        launches = prepare_gather("fprop", p, x, w, None, y, H200), prepare_wgrad(p, y, x, w, H200)
        return [launch.call.plan for launch in launches]

    dense = conv((32, 256, 28, 28), (256, 256, 3, 3), padding=1)
    forward, weight = plans(dense)
    assert (forward.staged, weight.staged) == (("x", "w"), ("dy", "x"))
    assert "x and w copied to channels last" in str(forward)
    assert "with the copies" in forward.reason
    with tconv.force(staged=False):
        native = plans(dense)
    assert [plan.staged for plan in native] == [(), ()]
    assert all(a.cost.seconds < b.cost.seconds for a, b in zip((forward, weight), native, strict=True))
    assert [plan.staged for plan in plans(conv((1, 3, 8, 8), (4, 3, 3, 3)))] == [(), ()]


def test_few_channels_are_packed_or_read_by_rows_and_only_they():
    def kernels(p):
        return [plan.choose(p, pass_, plan.Operands(2, True), H200).kernel for pass_ in ("fprop", "dgrad", "wgrad")]

    packed = ["packed", "packed", "packed_wgrad"]
    assert kernels(conv((32, 128, 56, 56), (128, 4, 3, 3), padding=1, groups=32)) == packed
    stem = conv((32, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    x, w, y = (shaped(stem.shape(name), True, torch.bfloat16) for name in "xwy")
    launches = (
        prepare_gather("fprop", stem, x, w, None, y, H200),
        prepare_gather("dgrad", stem, y, w, None, x, H200),
        prepare_wgrad(stem, y, x, w, H200),
    )
    assert [launch.call.plan.kernel for launch in launches] == ["packed", "rows", "packed_wgrad"]
    assert kernels(conv((32, 48, 56, 56), (48, 48, 3, 3), padding=1)) == ["gather", "gather", "packed_wgrad"]
    assert kernels(conv((32, 96, 56, 56), (96, 96, 3, 3), padding=1)) == ["gather", "gather", "wgrad"]
    assert kernels(conv((8, 768, 499), (768, 48, 128), padding=64, groups=16)) == packed  # 48 of 64 in each tap's step
    with tconv.force(kernel="gather"):
        assert plan.choose(stem, "fprop", plan.Operands(2, True), H200).cost.seconds > 0
    with tconv.force(kernel="packed"), pytest.raises(ValueError, match="counts at most 32768 taps times channels"):
        plan.choose(conv((1, 4096, 9, 9), (8, 4096, 3, 3)), "fprop", plan.Operands(2, True), H200)


def test_a_pack_of_too_many_columns_is_refused_by_tile():
    """Groups of 48 channels and 128 taps, 6,144 columns each: a tile of 64 holds one group, one of 512 eight."""
    p, packed = conv((8, 768, 499), (768, 48, 128), padding=64, groups=16), FAMILIES["packed"]
    assert packed.why_misfit(p, "fprop", Tile(16, 64, 64), H200) is None
    assert packed.why_misfit(p, "fprop", Tile(16, 512, 64), H200) == "counts at most 32768 taps times channels"


def test_a_forced_tile_is_for_the_kernels_that_can_take_it():
    layer = conv((2, 32, 9, 9), (32, 1, 3, 3), padding=1, groups=32)
    operands = plan.Operands(2, True)
    with tconv.force(tile=DIRECT[0]):
        assert plan.choose(layer, "fprop", operands, H200).tile == DIRECT[0]  # though gather cannot take it
    with tconv.force(tile=STRIP_16[0]):
        assert plan.choose(layer, "fprop", operands, H200).kernel == "strip"
    with tconv.force(tile=Tile(48, 2, 1)), pytest.raises(ValueError, match="extents and warps must be powers of two"):
        plan.choose(layer, "fprop", operands, H200)


def test_a_device_without_room_for_any_tile_falls_back(monkeypatch):
    tiny = Device("a GPU with next to no shared memory", 4, 1024)
    x, w = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    monkeypatch.setattr("tconv.launching.launch.device_of", lambda t: tiny)
    with tconv.recording() as calls:
        y = TF.conv2d(x, w)
    assert [(call.ours, call.reason) for call in calls] == [
        (False, f"no tile fits {tiny.name}: N1 C16 8x8 -> K16 6x6, filter 3x3"),
    ]
    assert torch.equal(y, torch.nn.functional.conv2d(x, w))
    with tconv.force(kernel="gather"), pytest.raises(plan.Unplannable, match="no tile fits"):
        TF.conv2d(x, w)


def test_packs_are_all_groups_or_a_power_of_two():
    p = conv((1, 42, 9), (70, 3, 3), groups=14)  # 3 channels read, 5 written
    assert [pack(p, "fprop", Tile(64, n, 64)) for n in (4, 16, 32, 64, 128)] == [1, 2, 4, 8, 14]
    assert [pack(p, "dgrad", Tile(64, n, 64)) for n in (16, 32, 64)] == [4, 8, 14]
    assert pack(p, "wgrad", Tile(64, 16, 64)) == 8


def test_no_gpu_tile_lacks_a_device_that_can_run_it():
    for kernel, itemsize, tc, narrow in itertools.product(("gather", "wgrad"), (2, 4, 8), (True, False), (True, False)):
        family = FAMILIES[kernel]
        tiles = family.tiles_on(Access(itemsize, tc, narrow), H200)
        assert tiles
        assert all(family.why_illegal(t, itemsize, H200) is None for t in tiles)


@pytest.mark.parametrize("kernel", ["gather", "tma"])
def test_steps_of_32_channels_are_for_layers_that_steps_of_64_do_not_fit(kernel):
    fitting = {4: False, 16: True, 48: False, 64: False, 96: True, 128: False, 160: True, 320: False}
    for channels, fits in fitting.items():
        p = conv((8, channels, 56, 56), (256, channels, 3, 3), padding=1)
        operands = plan.Operands(2, True)
        offered = FAMILIES[kernel].tiles_for(operands, p, "fprop", H200, "")
        assert set(STEPS_OF_32) & set(offered) == (set(STEPS_OF_32) if fits else set())
        assert not set(STEPS_OF_32) & set(FAMILIES[kernel].tiles_for(operands, p, "fprop", DEVICES["A100"], ""))
        assert (plan.choose(p, "fprop", operands, H200, kernel).tile.k == 32) is fits


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.instead], ids=lambda f: f.name)
def test_where_a_tile_spills_another_is_taken(family):
    for generation, instead in family.instead.items():
        device = next(d for *_, d in ARCHITECTURES.values() if d.generation == generation)
        for tile, other in instead.items():
            precisions = itertools.product((2, 4, 8), (True, False), (True, False), (True, False))
            found = [access for access in itertools.starmap(Access, precisions) if tile in family.tiles_on(access, H200)]
            assert found
            for access in found:
                assert other in family.tiles_on(access, device)
                assert tile not in family.tiles_on(access, device)
                assert family.why_illegal(other, access.itemsize, device) is None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_tiles_that_spill_are_tiles_of_the_kernel_that_no_other_replaces(family):
    accesses = [Access(size, *flags) for size in (2, 4, 8) for flags in itertools.product((True, False), repeat=3)]
    own = {tile for access in accesses for tile in family.tiles(access)}
    for generation, tiles in family.spills.items():
        assert set(tiles) <= own
        assert not set(tiles) & set(family.instead.get(generation, {}))


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ({"kernel": "gathre"}, "kernel must be one of .*'gather'.*, got 'gathre'"),
        ({"kernel": "depthwise"}, "forced kernel 'depthwise' needs one input channel per group"),
        ({"tile": Tile(48, 16, 16)}, "extents and warps must be powers of two"),
        ({"tile": Tile(8, 16, 16)}, "tl.dot needs at least 16"),
        ({"kernel": "gather", "tile": Tile(64, 32, 16, extra=64)}, r"64x\(32\+64\)x16 w4 s3: no such second block for gather"),
        ({"kernel": "packed", "tile": Tile(64, 32, 16, extra=16)}, "no such second block for packed"),
        ({"tile": Tile(2048, 2048, 16)}, "more than 1048576 elements"),
        ({"kernel": "wgrad", "splits": 99}, "99 splits, this problem allows 1 to"),
        ({"kernel": "gather", "splits": 2}, "2 splits, this problem allows 1 to 1"),
        ({"kernel": "wgrad", "splits": 0}, "0 splits, this problem allows 1 to"),
        ({"kernel": "wgrad", "tile": Tile(16, 16, 16), "splits": 5}, "5 splits of 8 steps, nearest is 4"),
    ],
)
def test_a_forced_plan_that_cannot_run_raises(forced, message, device):
    x = torch.randn(8, 4, 6, 6, device=device)
    w = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=message), tconv.force(**forced):
        TF.conv2d(x, w).sum().backward()


def test_a_tile_that_is_none_is_refused_at_once():
    message = r"tile must be a tconv\.Tile, got \(16, 16\)"
    with pytest.raises(TypeError, match=message), tconv.force(tile=(16, 16)):
        pass


def test_shared_memory_bounds_a_tile():
    assert FAMILIES["gather"].why_illegal(GEMM_16[2], 2, H200) is None
    assert "bytes of shared memory" in FAMILIES["gather"].why_illegal(GEMM_16[2], 2, SMALL)
    assert FAMILIES["gather"].why_illegal(Tile(256, 256, 64, 8, 9), 8, INTERPRETER) is None


def test_forcing_reaches_the_backward_pass_on_another_thread(device):
    import threading

    w = torch.randn(4, 4, 3, device=device, requires_grad=True)
    y = TF.conv1d(torch.randn(2, 4, 66, device=device), w)
    with tconv.force(kernel="wgrad", tile=Tile(16, 16, 16), splits=3), tconv.recording() as calls:
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()
    assert [c.plan.splits for c in calls if c.operation == "wgrad"] == [3]


def test_no_integer_of_a_kernel_is_specialised():
    """Geometry as runtime data: layers that differ in it alone share one compiled kernel."""
    from tconv.kernels import common, copy, depthwise, gather, packed, reduce, rows, strip, wgrad

    for kernel in (
        gather.gather, wgrad.wgrad, packed.packed, packed.packed_wgrad, rows.rows,
        depthwise.depthwise, depthwise.depthwise_wgrad, strip.strip, strip.strip_wgrad, reduce.sum_pixels, reduce.sum_splits,
        copy.copy_channels_last,
    ):  # fmt: skip
        given = getattr(kernel, "kwargs", None) or {"do_not_specialize": kernel.do_not_specialize}
        assert tuple(given["do_not_specialize"]) == common.integers(kernel)
        assert not any(name.endswith("_ptr") for name in common.integers(kernel))


def test_layers_share_compile_time_constants():
    """The first call of a new layer does not compile: nothing about its geometry is a constant."""
    from tconv.launching.prepare import prepare_gather, prepare_wgrad

    def constants(x, w, **parameters):
        p = conv(x, w, **parameters)
        x, w, y = (
            torch.empty(p.shape(n), dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last) for n in "xwy"
        )
        forward, back = prepare_gather("fprop", p, x, w, None, y, H200), prepare_gather("dgrad", p, y, w, None, x, H200)
        return [launch.constants for launch in (forward, back, prepare_wgrad(p, y, x, w, H200))]

    tile = Tile(64, 64, 64, 4, 4)
    with tconv.force(tile=tile, splits=1):
        first = constants((8, 192, 56, 56), (128, 192, 3, 3), padding=1)
        assert first == constants((1, 128, 7, 9), (192, 128, 2, 2))
        assert first == constants((3, 256, 31, 17), (256, 128, 5, 2), stride=3, padding=4, dilation=2, groups=2)
        assert first != constants((8, 124, 56, 56), (128, 124, 3, 3))


def test_nothing_is_kept_without_bound(device, monkeypatch):
    from tconv.dispatch import entry
    from tconv.launching import cache, launch

    monkeypatch.setattr(cache, "REMEMBERED", 3)
    w = torch.nn.Parameter(torch.randn(2, 2, 1, device=device))
    for n in range(1, 9):
        TF.conv1d(torch.randn(1, 2, n, device=device), w)
        assert len(entry.geometries) <= 3
        assert 1 <= len(entry.fast_paths) <= 3
        assert len(launch._prepared) <= 3


def test_a_full_cache_can_change_an_entry(monkeypatch):
    from tconv.launching import cache

    monkeypatch.setattr(cache, "REMEMBERED", 2)
    kept = cache.BoundedCache()
    kept["a"], kept["b"] = 1, 2
    kept["b"] = 3
    assert kept == {"a": 1, "b": 3}


def test_equal_keys_of_other_types_are_not_confused(device):
    """1 == 1.0 == True, but torch takes only the first as a stride."""
    x, w = torch.randn(1, 2, 5, device=device), torch.randn(2, 2, 3, device=device)
    for bad in ({"stride": 1.0}, {"groups": True}, {"groups": [1]}):
        with tconv.recording() as calls, pytest.raises(TypeError):
            TF.conv1d(x, w, **bad)
        assert not calls[0].ours
        with tconv.recording() as calls:
            TF.conv1d(x, w, stride=1)
        assert calls[0].ours


@pytest.mark.parametrize(
    ("shape", "weight", "kwargs"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), {"stride": 65537, "dilation": 65536, "padding": 65537}),
        ((1, 1, 9, 9), (1, 1, 1, 1), {"padding": 2**20, "stride": 2**19}),
    ],
)
def test_geometry_beyond_32_bits_is_left_to_torch(shape, weight, kwargs, device):
    with tconv.recording() as calls, torch.device(device):
        TF.conv2d(torch.randn(shape), torch.randn(weight), **kwargs)
    assert [c.reason for c in calls] == ["a weight, or coordinates or programs, that 32 bits cannot count"]


def test_a_weight_that_reaches_beyond_32_bits_is_left_to_torch(device):
    base = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=device)
    w = base.as_strided((4, 2, 1), (2**30, 1, 1)).fill_(1)
    with tconv.recording() as calls:
        TF.conv1d(torch.ones(1, 8, 3, dtype=torch.float16, device=device), w, groups=4)
    assert not calls[0].ours


DEEP = conv((32, 64, 28, 28), (64, 64, 3, 3), padding=1)


def test_sums_of_splits_are_dependent_launches_from_hopper_on(monkeypatch):
    x, w, y = (shaped(DEEP.shape(name), True, torch.bfloat16) for name in "xwy")

    def sums(device):
        launch = prepare_wgrad(DEEP, y, x, w, device)
        assert launch.splits > 1
        plan, constants = launch.call.plan, launch.total.constants
        assert plan.dependent == constants["DEPENDENT"] == constants.get("launch_pdl", False)
        assert ("splits summed by a dependent launch" in str(plan)) == plan.dependent
        assert "launch_pdl" not in launch.constants
        return plan.dependent

    assert sums(DEVICES["H200"])
    assert sums(ARCHITECTURES["sm_100"][3])
    assert not sums(DEVICES["A100"])
    assert not sums(DEVICES["MI300X"])
    assert not sums(dataclasses.replace(DEVICES["H200"], check=lambda mechanism: mechanism != DEPENDENT))
    with tconv.force(kernel="wgrad", splits=1):
        assert not prepare_wgrad(DEEP, y, x, w, DEVICES["H200"]).call.plan.dependent
    monkeypatch.setenv("TCONV_DEPENDENT_LAUNCH", "0")
    assert not sums(DEVICES["H200"])
    monkeypatch.setenv("TCONV_DEPENDENT_LAUNCH", "off")
    with pytest.raises(ValueError, match="TCONV_DEPENDENT_LAUNCH must be 0 or 1, got 'off'"):
        sums(DEVICES["H200"])


def test_a_bias_gradient_in_splits_is_summed_so_too():
    launch = prepare_bias(DEEP, shaped(DEEP.shape("y"), True, torch.bfloat16), DEVICES["H200"])
    assert launch.splits > 1
    assert launch.total.constants["launch_pdl"]


@pytest.mark.parametrize(
    ("outer", "spatial", "extents", "step"),
    [
        (48, (0, 24, 8), (2, 1, 2, 3), 8),
        (0, (0, 24, 8), (1, 1, 2, 3), 8),
        (24, (0, 0, 8), (2, 1, 1, 3), 8),
        (56, (0, 24, 8), (2, 1, 2, 3), None),
        (48, (0, 32, 8), (2, 1, 2, 3), None),
        (0, (0, 0, 0), (2, 1, 2, 3), 0),
        (0, (0, 0, 0), (1, 1, 1, 1), 0),
        (16, (0, 0, 0), (4, 1, 1, 1), 16),
    ],
)
def test_the_one_stride_of_all_pixels(outer, spatial, extents, step):
    a = Addressing(0, 2, 96, outer, 1, spatial, True, 95)
    assert a.pixel_stride(extents) == step
