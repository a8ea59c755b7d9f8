"""The machine code of the kernels that matter most, compiled for Hopper without a GPU.

`scripts/codegen.py --check` holds every variant to its budget; this is the part of it that fits a test run.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import triton

from tconv.kernels.common import APART
from tconv.launching.variants import NAMES, launches, variants
from tconv.planning.families import FAMILIES
from tconv.planning.gather import LIMITED, SPILLED, WIDEST
from tconv.planning.problem import forward_problem
from tconv.planning.tiles import BF16X6, Access

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "scripts"))
import codegen
import codegen_budget as budget
import machine_code

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
GEMM = r"(gather|wgrad) [123]d bf16 128x\d+x64 .*inner=cc[ioc] vec=8/(8/8( even)?|4/8 split)$"
TMA = (
    r"tma [123]d bf16 128x(128|256)x64 .*inner=c vec=8( y_box)?$|tma_wgrad [123]d bf16 128x128x64 .*inner=c vec=(8|4 split)$"
    r"|persistent(_wgrad)? .* bf16"
)
DIRECT = r"(depthwise|strip)(_wgrad)? [123]d bf16 .*inner=cc vec=8/8( row=\S+)?( split)?$"
EPILOGUES = r"(gather|strip) 2d bf16 .* with=silu\+residual$"
VERSION = budget.short(triton.__version__)
ROW = {
    "name": "a", "arch": "sm_90", "registers": 100, "spills": 0, "loop_spills": 0, "stack_bytes": 0, "shared_bytes": 1024,
    "mma": 4, "mma_kind": "HGMMA", "register_detour": False, "tma_loads": 2, "async_copies": 8, "async_copy_bytes": 16,
    "loads": 4, "load_bytes": 16, "narrow_loads": 0, "stores": 8, "store_bytes": 16, "loop_instructions": 100,
    "loop_waits": 1, "loop_fences": 2, "before_loop": 1000, "after_loop": 100,
}  # fmt: skip
WORSE = {
    "spills": 1, "loop_spills": 1, "stack_bytes": 8, "narrow_loads": 1, "registers": 109, "shared_bytes": 1025,
    "loop_instructions": 111, "mma_kind": "HMMA", "register_detour": True, "async_copy_bytes": 4, "tma_loads": 1,
    "load_bytes": 8, "store_bytes": 8, "loop_waits": 4, "loop_fences": 1,
}  # fmt: skip


def gate(*arguments):
    """scripts/codegen.py, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPTS / "codegen.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows():
    """The 16-bit channels_last variants of a few layers."""
    recorded = f"|{EPILOGUES}" if VERSION == "3.7" else ""  # other versions' records are older
    done = gate("--quick", "--only", f"{GEMM}|{DIRECT}{recorded}", "--jobs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # nothing else is printed there
    assert report["triton"] == triton.__version__
    return report["variants"]


def test_16_bit_channels_last_uses_the_tensor_cores_and_wide_asynchronous_copies(rows):
    gemm = [row for row in rows if not row["memory_bound"]]
    assert {row["name"].split()[0] for row in gemm} == {"fprop", "dgrad", "wgrad"}
    assert {row["name"].split()[2] for row in gemm} == {"1d", "2d", "3d"}
    for row in gemm:
        assert row["mma_kind"] == "HGMMA", row
        assert not row["register_detour"], row
        assert row["async_copy_bytes"] == 16, row
        assert row["narrow_loads"] == 0, row
        assert row["loop_instructions"] > 0, row
        assert row["loop_fences"] == 1, row
        assert row["loop_waits"] == 1, row
        assert row["store_bytes"] == 16 or "wgrad" not in row["name"], row


def test_boxes_go_from_shared_memory_straight_to_the_tensor_cores():
    done = gate("--quick", "--only", TMA, "--jobs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    boxes = json.loads(done.stdout)["variants"]
    assert {row["name"].split()[0] for row in boxes} == {"fprop", "dgrad", "wgrad"}
    assert {row["name"].split()[2] for row in boxes} == {"1d", "2d", "3d"}
    for row in boxes:
        assert row["mma_kind"] == "HGMMA", row
        assert not row["register_detour"], row
        assert row["tma_loads"] > 0, row
        assert row["async_copies"] == row["loads"] == row["spills"] == row["stack_bytes"] == 0, row
        kernel = row["name"].split()[1]
        persistent = kernel.startswith("persistent")
        assert not persistent or row["loop_waits"] == 1, row  # one product stays in flight
        boxed = kernel == "persistent" or row["name"].endswith("y_box")
        assert (row["tma_stores"] > 0) is boxed, row
        # Pairs of accumulators, as they lie in registers; one by one if dw's channels are not contiguous.
        pairs = (8 if row["name"].endswith("split") else 4) // (1 if "inner=c" in row["name"] else 2)
        assert row["store_bytes"] == (0 if boxed else pairs if persistent else 16), row
    assert {row["name"].split()[0] for row in boxes if row["tma_stores"]} == {"fprop", "dgrad"}


def test_what_a_variant_does_is_counted_beside_its_code():
    """In the simulator on a small problem: the same registers, and as many products in the loop as the machine code has."""
    variant = "wgrad tma_wgrad 2d bf16 64x64x64 w4 s4 inner=c vec=4 split"
    done = gate("--quick", "--only", f"^({variant}|sum sum_splits 0d bf16 .* vec=8)$", "--jobs", "1", "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    gated, counts = done.stdout.split(f"\nsm_90 {variant}\n")
    line = next(line for line in gated.splitlines() if line.endswith(f" sm_90 {variant}"))
    row = dict(zip((title for _, title in codegen.COLUMNS), line.split(), strict=False))
    assert counts.startswith("on N1 C256 ")
    assert f"\n{row['regs']} registers, {row['spill']} bytes spilled, {int(row['smem']):,} bytes of shared memory" in counts
    assert f", tensor {row['mma']}, " in counts
    assert "wgmma" in counts
    assert "sum sum_splits" in gated
    assert "not run: --run is for fprop, dgrad and wgrad" in gated
    assert gate("--run", "--arch", "gfx942").returncode == 2


def test_lanes_are_read_off_however_a_layout_is_spelled():
    ttgir = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[0, 1], [0, 2]], lane = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], warp = [[32, 0]]}>
#mma = #ttg.amd_mfma<{version = 3, warpsPerCTA = [4, 1], instrShape = [16, 16, 16], isTransposed = true}>
    %1 = tt.load %0 : tensor<64x8x!tt.ptr<bf16>, #blocked>
    tt.store %3, %2 : tensor<64x4x!tt.ptr<f32>, #linear>
    tt.store %5, %4 : tensor<64x4x!tt.ptr<f32>, #mma>
"""
    assert machine_code._lanes(ttgir) == [1, 0, 0]
    assert machine_code._lanes(ttgir.replace("= true", "= false")) == [1, 0, 1]


def test_in_the_default_layout_neighbouring_threads_take_neighbouring_pixels():
    narrow = r"(gather|wgrad|depthwise|depthwise_wgrad) 2d bf16 \S+ w\d s\d inner=pp-? .*1( even)?$"
    sums = r"bias 1d bf16 .*inner=p vec=\d$"
    done = gate("--quick", "--only", rf"{narrow}|{sums}|gather 2d bf16 128x\S+ .*inner=cpi", "--jobs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["variants"]
    assert {"gather", "wgrad", "depthwise", "depthwise_wgrad", "bias"} <= {row["name"].split()[1] for row in rows}
    for row in rows:
        # Which axis of a tile the pixels are depends on Triton's version (`APART`), unless the compiler sees them contiguous.
        pixels = int(APART.value or ("inner=p " in row["name"] and not row["name"].endswith("vec=1")))
        assert row["lanes"][-1] == pixels, row
        assert set(row["lanes"]) == {pixels} or "inner=cp" in row["name"], row


def test_direct_kernels_read_and_write_16_bytes_at_a_time(rows):
    direct = [row for row in rows if row["memory_bound"]]
    assert {row["name"].split()[0] for row in direct} == {"fprop", "dgrad", "wgrad"}
    for row in direct:
        if row["name"].startswith("wgrad"):
            assert row["load_bytes"] == 16, row
        else:  # taps of the weight, read 2 bytes at a time, lie in a cache
            assert row["load_bytes"] >= 6, row
            assert row["store_bytes"] == 16, row


def test_sums_and_copies_read_and_write_16_bytes_at_a_time():
    widest = r"^(sum sum_splits 0d|copy|bias) .*((bf|fp)16 .* vec=8|fp32 .* vec=4)(/8|/4)?( split)?$"
    done = gate("--quick", "--only", widest, "--jobs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(done.stdout)["variants"] if "inner=c" not in row["name"]]
    found = {tuple(row["name"].split()[:4:3]): row for row in rows}
    assert found.keys() == set(itertools.product(("sum", "copy", "bias"), ("bf16", "fp16", "fp32")))
    for (kind, _), row in found.items():
        assert row["load_bytes"] == 16, row
        assert row["store_bytes"] == 16 or kind == "bias", row  # one number a channel


def test_normalisations_read_and_write_16_bytes_at_a_time():
    done = gate("--beside", "--only", "norm_silu .*(normalise|channel_moments)", "--jobs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["variants"]
    assert {tuple(row["name"].split()[i] for i in (0, -1)) for row in rows} >= {
        ("group_norm_silu", "inner=c"),
        ("rms_norm_silu", "inner=p"),
    }
    assert len(rows) == 12
    for row in rows:
        words = row["name"].split()
        assert row["spills"] == row["stack_bytes"] == 0, row
        assert row["narrow_loads"] == 0 or "normalise" in words, row  # numbers per channel, of which there are few
        if "normalise" not in words:
            assert row["load_bytes"] == 16, row  # in the loop
        if "normalise" in words or words[-1] == "dx":
            assert row["store_bytes"] >= (16 if "sums" not in words else 8), row  # sums are one number a channel
        assert set(row["lanes"]) == {1}, row


def wrong_spills(rows):
    """The names of variants that spill where none may: in a loop, or of a tile with which that is not priced."""
    priced = re.compile("|".join(rf"gather .* {re.escape(str(tile))} " for tile in (LIMITED, WIDEST)))
    return [
        name for name, row in rows.items()
        if row["loop_spills"] or ((row["spills"] or row["stack_bytes"]) and not priced.search(name))
    ]  # fmt: skip


def test_nothing_spills(rows):
    assert wrong_spills({row["name"]: row for row in rows}) == []


def test_within_the_budget(rows):
    if VERSION not in budget.recorded():
        pytest.skip(f"Triton {VERSION} has no budget in bench/codegen")
    known = [row for row in rows if re.search(budget.scope(VERSION, "sm_90"), row["name"])]
    assert known
    assert budget.regressions(known, {"sm_90": budget.load(VERSION, "sm_90")}) == []


@pytest.mark.skipif(VERSION != "3.7", reason="other versions have a record of sm_90 only")
def test_every_architecture_compiles_and_is_read():
    archs = sorted(set(codegen.ARCHS) - {"sm_90"})
    chosen = [word for arch in archs for word in ("--arch", arch)]
    pattern = r"fprop gather 2d bf16 (64x64|128x128)x64 .*inner=cci .*even$"
    done = gate(*chosen, "--quick", "--only", pattern, "--check", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["arch"]: row["mma_kind"] for row in json.loads(done.stdout)["variants"]}
    assert found == {"gfx942": "mfma_f32_32x32x8_bf16", "sm_80": "HMMA", "sm_100": "UTCHMMA"}


@pytest.mark.parametrize("arch", codegen.ARCHS)
def test_the_record_knows_no_spill_but_those_that_are_priced(arch):
    """Of Triton 3.7, which tiles are chosen by; of others docs/evidence.md says what spills."""
    known = budget.load("3.7", arch)
    assert budget.scope("3.7", arch) == ""  # every variant
    assert len(known) > 2000
    assert wrong_spills(known) == []
    priced = [row["spills"] for row in known.values() if row["spills"]]
    assert max(priced, default=0) < 3 * SPILLED
    assert bool(priced) == (arch == "sm_90")


def test_a_spill_in_a_loop_or_of_another_tile_is_wrong():
    limited, other = f"dgrad gather 3d bf16 {LIMITED} inner=cco", "dgrad gather 3d bf16 128x128x64 w8 s3 inner=cco"
    spills = {"spills": 9, "loop_spills": 0, "stack_bytes": 8}
    assert wrong_spills({limited: ROW | spills, other: ROW}) == []
    assert wrong_spills({limited: ROW | spills | {"loop_spills": 1}, other: ROW | spills}) == [limited, other]


def test_an_epilogue_leaves_the_main_loop_alone():
    """Nor does it spill, or store in narrower pieces. What it adds after the loop docs/epilogues.md has."""
    known = budget.load("3.7", "sm_90")
    found = {name: row for name, row in known.items() if " with=" in name and " bf16 " in name}
    assert len(found) == 2 * len(codegen.EPILOGUES)
    assert {name.split()[1] for name in found} == set(codegen.EPILOGUES)
    for name, row in found.items():
        plain = name.split(" with=")[0]
        alone = known[plain]
        assert row["spills"] == row["stack_bytes"] == 0
        assert row["store_bytes"] >= alone["store_bytes"], name
        assert row["narrow_loads"] <= alone["narrow_loads"], name
        more = 3 if name.split()[1] == "persistent" else 1
        assert row["loop_instructions"] <= alone["loop_instructions"] + more, name
        assert alone["loop_waits"] in (None, row["loop_waits"]), name  # of old rows it is not known
        if alone["tma_loads"]:  # the result is stored as a box, as without an epilogue, and the residual is loaded as one
            teams = 2 if " persistent " in name and " w4 " in name else 1  # that take turns; each has its own code
            assert (row["stores"], row["tma_loads"]) == (0, alone["tma_loads"] + teams), name


def test_borders_streams_and_sequences_are_on_record():
    """None of them spills, and those that multiply load 16 bytes at a time, or 8 of four channels, and wait once per step."""
    known, listed = budget.load("3.7", "sm_90"), codegen.beside("sm_90")
    assert listed.keys() <= known.keys()
    found = {name: known[name] for name in listed if " with=" not in name}
    kernels = {(name.split()[1], mark) for name in found for mark in name.split()[3:] if not re.search(r"\d", mark)}
    modes = ("reflect", "replicate", "circular")
    wanted = itertools.product(("gather", "packed", "wgrad", "strip", "strip_wgrad", "add_borders"), modes)
    assert kernels >= {*wanted, ("gather", "state"), ("gather", "next"), ("causal", "state"), ("causal_dgrad", "dstate")}
    words = {word for name in found for word in name.split()}
    assert words >= {"causal_wgrad", "causal_step", "quantize", "normalise", "normalise_gradient"}
    for name, row in found.items():
        assert row["spills"] == row["stack_bytes"] == row["register_detour"] == 0, name
        if row["mma_kind"]:
            assert row["mma_kind"] == "HGMMA", name
            assert (row["loop_waits"], row["loop_fences"]) == (1, 1), name
            assert row["async_copy_bytes"] in (8, 16), name
            assert row["store_bytes"] == 16, name


def test_fp8_is_multiplied_by_tensor_cores_from_shared_memory():
    """In steps each of which is waited for once; nothing spills, and accesses are 16 bytes wide."""
    known = budget.load("3.7", "sm_90")
    found = {name: row for name, row in known.items() if " fp8e4nv " in name}
    assert {name.split()[1] for name in found} == {"gather", "tma"}
    for name, row in found.items():
        assert row["mma_kind"] == "QGMMA", name
        assert row["spills"] == row["stack_bytes"] == row["register_detour"] == row["narrow_loads"] == 0, name
        assert row["loop_waits"] == 1, name
        assert row["async_copy_bytes"] == (16 if name.split()[1] == "gather" else 0), name
        assert row["store_bytes"] in (0, 16), name  # or a box


@pytest.fixture(scope="module")
def names():
    """What the gate would compile."""
    done = gate("--arch", "all", "--list")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_gate_knows_every_pass_dtype_layout_and_architecture(names):
    found = set()
    for line in names:
        arch, pass_, kernel, rank, dtype, *rest = line.split()
        layout = next((word[6:8] for word in rest if word.startswith("inner=")), "")
        found.add((arch, pass_, kernel, rank, dtype + " tf32" * ("tf32" in rest), layout))
    dtypes = [*NAMES.values(), "fp32 tf32"]
    layouts = ("cc", "pp")  # channels_last and contiguous
    passes = [(p, k) for p in ("fprop", "dgrad") for k in ("gather", "depthwise")]
    passes += [(p, "strip") for p in ("fprop", "dgrad")]
    passes += [("wgrad", "wgrad"), ("wgrad", "depthwise_wgrad"), ("wgrad", "strip_wgrad")]
    for arch, (pass_, kernel), rank, dtype, layout in itertools.product(codegen.ARCHS, passes, "123", dtypes, layouts):
        if "tf32" in dtype and kernel.startswith(("depthwise", "strip")):
            continue  # multiply-adds, whatever tensor cores may do
        if dtype == "fp64" and kernel.startswith("strip"):
            continue
        assert (arch, pass_, kernel, f"{rank}d", dtype, layout) in found
    for arch, dtype in itertools.product(codegen.ARCHS, NAMES.values()):
        assert (arch, "sum", "sum_splits", "0d", dtype, "") in found
        # Dimensions that lie one behind the other are one.
        assert {(arch, "bias", "bias", "1d", dtype, "c"), (arch, "bias", "bias", "1d", dtype, "p")} <= found
        assert (arch, "copy", "copy", "1d", dtype, "p") in found


def test_the_gate_knows_every_legal_tile_and_no_other(names):
    found = {(line.split()[0], line.split()[2], line.split()[4], line.split(" inner=")[0].split(" ", 5)[-1]) for line in names}
    legal = {
        (arch, family.name, name, str(tile))
        for arch, family, (dtype, name) in itertools.product(codegen.ARCHS, FAMILIES.values(), NAMES.items())
        for tensor_cores, narrow, flip in itertools.product((True, False), repeat=3)
        if tensor_cores or dtype.itemsize == 4
        for tile in family.tiles_on(Access(dtype.itemsize, tensor_cores, narrow, flip), codegen.ARCHS[arch][3])
        if not family.why_illegal(tile, dtype.itemsize, codegen.ARCHS[arch][3])
    }
    legal |= {
        ("sm_90", family.name, "fp32", str(tile))
        for family, narrow in itertools.product((f for f in FAMILIES.values() if f.cuts), (True, False))
        for tile in family.tiles_on(Access(4, True, narrow, precision=BF16X6), codegen.ARCHS["sm_90"][3])
    }
    legal |= {
        ("sm_90", family.name, "fp8e4nv", str(tile))
        for family in FAMILIES.values()
        if family.fp8
        for tile in family.tiles_on(Access(1, True), codegen.ARCHS["sm_90"][3])
    }
    legal |= {  # which depend on the problem: its rank, pass and written channels
        ("sm_90", "gather", name, str(tile)) for name in ("bf16", "fp16") for tile in (LIMITED, WIDEST)
    }
    # No layer's rows are read one by one in 16 bits with 32 columns: their vectors are of channels, or along the pixels.
    legal = {key for key in legal if not (key[1] == "rows" and key[2] in ("fp16", "bf16") and key[3] == "64x32x32 w4 s2")}
    # A copy's tile goes by its channels: there are those that the layers have.
    assert {key for key in found if key[1] in FAMILIES} == legal
    spills = {arch for arch, kernel, name, tile in found if (kernel, name, tile) == ("wgrad", "bf16", "128x64x64 w4 s3")}
    assert spills == {"sm_90"}  # on sm_80 and sm_100; gfx942 has too little shared memory


@pytest.mark.parametrize("arch", codegen.ARCHS)
def test_the_planner_picks_among_what_the_gate_compiles(arch):
    device = codegen.ARCHS[arch][3]
    for problem, dtype, last in itertools.product(codegen.layers(quick=True), NAMES, (True, False)):
        for prepare in launches(problem, dtype, last, device).values():
            prepared = prepare()
            assert prepared.call.plan.tile in prepared.call.plan.tiles, prepared.call


def test_small_layers_are_compiled_whole_and_split():
    """As the planner may choose them, with the workspace's type for the result's."""
    problem = forward_problem((1, 1024, 8, 8), (1024, 1024, 3, 3), (1, 1), [(1, 1)] * 2, (1, 1), 1)
    for dtype, workspace in ((torch.bfloat16, "*fp32"), (torch.float32, "*fp32"), (torch.float64, "*fp64")):
        found = {v.name: v for v in variants(problem, dtype, True, codegen.ARCHS["sm_90"][3])}
        for pass_, prepare in list(launches(problem, dtype, True, codegen.ARCHS["sm_90"][3]).items())[:2]:
            plan = prepare().call.plan
            assert plan.splits > 1
            split = [v for name, v in found.items() if name.startswith(f"{pass_} gather") and name.endswith(" split")]
            assert any(f" {plan.tile} " in v.name for v in split)
            for v in split:
                whole = found[v.name.removesuffix(" split")]
                assert (whole.constants["SPLIT"], v.constants["SPLIT"]) == (False, True)
                assert (whole.signature["y_ptr"], v.signature["y_ptr"]) == ("*" + NAMES[dtype], workspace)


def test_a_regression_is_named():
    budgets = {"sm_90": {"a": ROW}}
    assert budget.regressions([ROW], budgets) == []
    for key, worse in WORSE.items():
        (line,) = budget.regressions([ROW | {key: worse}], budgets)
        assert line.startswith("sm_90 a: ")
        assert line.endswith(f"{key} {int(ROW[key]) if key != 'mma_kind' else 'HGMMA'} -> {worse if worse is not True else 1}")
    within = {"registers": 108, "loop_instructions": 110, "loads": 9, "stores": 2, "mma": 2, "async_copies": 4}
    assert budget.regressions([ROW | within], budgets) == []
    better = dict.fromkeys(budget.GROWTH, 0) | {"tma_loads": 4}
    assert budget.regressions([ROW | better], budgets) == []
    (lost,) = budget.regressions([ROW | {"mma_kind": "", "async_copies": 0, "async_copy_bytes": 0}], budgets)
    assert "mma_kind HGMMA -> none, async_copy_bytes 16 -> 0" in lost
    unfenced = "sm_90 a: wgmma reads what asynchronous copies wrote without a fence"
    for known in (ROW, ROW | {"loop_fences": 0}, ROW | {"loop_fences": None}):  # whatever the record says
        assert budget.regressions([ROW | {"loop_fences": 0}], {"sm_90": {"a": known}})[-1] == unfenced
    assert budget.regressions([ROW], {"sm_90": {"a": ROW | {"loop_fences": None}}}) == []
    assert "not in the budget" in budget.regressions([ROW | {"name": "b"}], budgets)[0]
    assert "not in the budget" in budget.regressions([ROW | {"arch": "sm_80"}], budgets)[0]
    assert "does not compile: E" in budget.regressions([{"name": "a", "arch": "sm_90", "error": "E"}], budgets)[0]


def test_every_field_is_judged_or_says_how_many_there_are():
    assert set(budget.FIELDS) - WORSE.keys() == {"mma", "async_copies", "loads", "stores", "before_loop", "after_loop"}


def test_differences_between_compilers_are_named():
    old = {"a": ROW, "b": ROW, "c": ROW, "gone": ROW}
    new = {"a": ROW, "b": ROW | {"registers": 168}, "c": ROW | {"mma_kind": "HMMA", "shared_bytes": 0}, "fresh": ROW}
    lines = budget.compare("sm_90", ("3.6", "3.7"), old, new)
    assert lines == [
        "sm_90, Triton 3.6 -> 3.7: 3 variants in both",
        "  only in 3.6: 1, such as gone",
        "  only in 3.7: 1, such as fresh",
        "  registers: worse in 1, better in 0",
        "  shared_bytes: worse in 0, better in 1",
        "  mma_kind: differs in 1",
        "  c: mma_kind HGMMA -> HMMA",
        "  b: registers 100 -> 168",
    ]
    assert budget.compare("sm_90", ("3.6", "3.7"), old, old)[1:] == ["  no differences beyond the slack"]
    many = {str(i): ROW | {"spills": 1} for i in range(20)}
    assert budget.compare("sm_90", ("3.6", "3.7"), dict.fromkeys(many, ROW), many, most=12)[-1].endswith(
        "8 more that got worse"
    )


def test_budgets_survive_a_round_trip_and_bad_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "ROOT", tmp_path)
    rows = {"a x": ROW, "b": ROW | {"mma_kind": "", "register_detour": True}}
    early = {"a x": ROW, "c": ROW | {"before_loop": None, "after_loop": None}}  # of which the last columns were not read
    budget.save("3.7", "sm_90", early)
    assert budget.path("3.7", "sm_90").read_text().endswith(",1,2\n")
    assert budget.load("3.7", "sm_90") == {n: {k: r[k] for k in budget.FIELDS} for n, r in early.items()}
    budget.save("3.7", "sm_90", rows)
    assert budget.load("3.7", "sm_90") == {n: {k: r[k] for k in budget.FIELDS} for n, r in rows.items()}
    assert budget.recorded() == {"3.7": ["sm_90"]}
    assert budget.scope("3.7", "sm_90") == ""
    budget.save("3.6", "sm_90", rows, " (bf16|fp16) ")
    assert budget.load("3.6", "sm_90") == budget.load("3.7", "sm_90")
    assert budget.scope("3.6", "sm_90") == " (bf16|fp16) "
    file = budget.path("3.7", "sm_90")
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    for bad, why in {
        text[: len(text) - 15]: "line 4 is not a variant's",  # cut inside a line
        "".join(lines[:-1]): "1 variants, its first line says 2",  # cut between lines
        "".join(lines[:1]): "columns",
        "": "not a budget",
        '{"3.7": {}}': "not a budget",
        text.replace("registers", "regs"): "columns",
        text.replace(",100,", ",many,"): "line 3 is not a variant's",
        text.replace("3.7", "3.6"): "a budget of Triton 3.6 on sm_90, not of 3.7 on sm_90",
    }.items():
        file.write_text(bad)
        with pytest.raises(budget.BudgetError, match=why) as error:
            budget.load("3.7", "sm_90")
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(budget.BudgetError, match="triton-3"):
        budget.load("3.7", "sm_90")


def test_the_command_compares_recorded_budgets_and_names_what_is_not_there():
    versions = [v for v, archs in budget.recorded().items() if "sm_90" in archs]
    done = gate("--compare", versions[0], versions[-1], "--arch", "sm_90")
    assert done.returncode == 0, done.stderr
    assert f"sm_90, Triton {versions[0]} -> {versions[-1]}: " in done.stdout
    for arguments in (["--compare", "1.0", versions[0]], ["--compare", "1.0"]):
        done = gate(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("no budget for Triton 1.0 on sm_90")
        assert done.stderr.count("\n") == 1


def test_a_triton_without_disassemblers_is_named(monkeypatch, tmp_path):
    import machine_code

    assert machine_code.missing_tools() is None
    monkeypatch.setattr(machine_code, "tools", lambda: tmp_path)
    shutil.copy(__file__, tmp_path / "nvdisasm")
    assert machine_code.missing_tools() == f"this Triton comes without cuobjdump (looked in {tmp_path})"
