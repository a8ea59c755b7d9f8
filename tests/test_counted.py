"""What the cost model counts of a plan is what its compiled kernel does in the simulator.

The record, bench/counted.csv, has the planner's plan of every layer and pass; a few of them are run here again.
"""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench import counted
from bench.layers import layers

ROOT = pathlib.Path(__file__).parent.parent
ROWS = counted.record()
SAMPLE = "resnet50_(l2_3x3|l2_down_1x1s2|stem_7x7s2)|mobilenetv2_dw3_384_14|nnunet3d_in_c1 wgrad"
IDS = [f"{row['layer']}-{row['pass']}" for row in ROWS]


def compiled(*command):
    """Runs Python where kernels are compiled, and returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_record_has_every_layer_and_pass():
    assert [(row["layer"], row["pass"]) for row in ROWS] == [
        (layer, plan.pass_) for layer, _, plan in counted.chosen("", "channels_last")
    ]
    assert len(ROWS) == 3 * len(layers())


def test_the_record_is_of_todays_plans():
    plans = [(plan.kernel, str(plan.tile), plan.splits) for _, _, plan in counted.chosen("", "channels_last")]
    assert [(row["kernel"], row["tile"], row["splits"]) for row in ROWS] == plans


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_counts(row):
    """Programs and operations per iteration are exact. The rest is within stated bounds."""
    stay = row["kernel"].startswith("persistent")  # for several tiles, which the model counts; a H100 has 132 multiprocessors
    assert row["programs"] == (min(132, row["model_programs"]) if stay else row["model_programs"])
    assert 0.999 * row["model_touched"] <= row["touched"] <= row["model_touched"]  # a stride may leave a last column unread
    if row["steps"]:
        assert row["operations"] * row["model_steps"] == pytest.approx(row["model_operations"] * row["steps"])
        # The last split counts in full though it may be shorter, and a 3-D dgrad may skip frames that none of its pixels meets.
        short = row["splits"] > 1 or row["pass"] == "dgrad"
        assert (0.75 if short else 1) * row["model_steps"] <= row["steps"] <= row["model_steps"]
    else:  # no loop over rows of the filter
        assert row["operations"] == row["model_operations"]
    if row["machine_loop"]:
        assert 0.6 < row["machine_loop"] / row["model_loop"] < 1.75
    # Padding is not read, and of a run that overhangs a small image's few pixels little is left. Rows may begin within a
    # sector, and elements that are read one by one share theirs.
    least = 0.1 if row["kernel"] == "tma_wgrad" else 0.2
    most = 3.5 if row["kernel"].startswith(("packed", "rows")) else 1.1
    assert least * row["model_read"] < row["read"] < most * row["model_read"]
    if row["resident"]:
        assert 0.5 <= row["resident"] / row["model_resident"] <= 2


def test_a_sample_counts_today_as_recorded():
    text = compiled("-m", "bench.counted", "--only", SAMPLE)
    first, rest = text.split("\n", 1)
    recorded = {(row["layer"], row["pass"]): row for row in csv.DictReader(counted.RECORD.read_text().splitlines()[1:])}
    found = list(csv.DictReader(io.StringIO(rest)))
    assert {row["kernel"] for row in found} >= {"tma", "wgrad", "gather", "packed", "packed_wgrad", "strip", "strip_wgrad"}
    same = first == counted.RECORD.read_text().split("\n", 1)[0]  # another Triton makes other code
    code = (
        ()
        if same
        else ("loop", "machine_loop", "outside", "wavefronts", "conflicts", "waits", "resident", "whole_instructions")
    )
    for row in found:
        old = recorded[row["layer"], row["pass"]]
        assert {k: v for k, v in row.items() if k not in code} == {k: v for k, v in old.items() if k not in code}


LARGER = """
import dataclasses, json, sys
import simulator
from bench.counted import DEVICE, DTYPE, Each, _without_moves, chosen
from bench.smaller import planned, smaller

simulator.install("sm_90")
rows = {}
for layer, p, plan in chosen(sys.argv[1], "channels_last"):
    q, part, _ = smaller(p, plan, True, DTYPE, DEVICE)
    q = dataclasses.replace(q, N=3 * q.N, C=2 * q.C)
    large = planned(q, plan, 1, True, DTYPE, DEVICE)
    assert large.constants == part.constants
    few, many = part.count(), large.count()
    assert many.programs == large.cost.programs > few.programs
    told = Each.of(few, part.work.steps).whole(many.programs, many.warps, large.work.steps)
    rows[plan.kernel] = told, (_without_moves(many.instructions()), sum(o.asked for o in many.reads.values()))
print(json.dumps(rows))
"""


def test_a_larger_run_counts_what_is_extrapolated():
    """Twice as many iterations for each of three times as many programs, of kernels that read through pointers and by boxes."""
    rows = json.loads(compiled("-c", LARGER, "(resnet50_l3_1x1_expand|sd15_unet_320_64|resnet50_l2_down_1x1s2) fprop"))
    assert set(rows) == {"tma", "gather"}
    for (instructions, read), (counted_instructions, counted_read) in rows.values():
        assert instructions == counted_instructions
        assert read == pytest.approx(counted_read, rel=0.05)  # tails of tiles are another share


EPILOGUE = """
import dataclasses, json, torch
import simulator
from tests import compiled
simulator.install("sm_90")
compiled.install("sm_90")
import tconv

torch.set_num_threads(1)
last = torch.channels_last
rows = {}
for kernel, x, w, stride in (
    ("gather", (1, 64, 8, 8), (64, 64, 3, 3), 1), ("packed", (1, 4, 16, 16), (32, 4, 3, 3), 2),
    ("strip", (1, 32, 8, 8), (32, 1, 3, 3), 1),
):
    x, w = (torch.randn(shape).bfloat16().to(memory_format=last) for shape in (x, w))
    given = x, w, torch.randn(w.shape[0]).bfloat16(), stride, 1, 1, x.shape[1] // w.shape[1]
    y = torch.nn.functional.conv2d(*given).to(memory_format=last)
    for how in ({}, {"activation": "silu", "residual": torch.randn_like(y), "residual_position": "after"}):
        with simulator.checking(simulator.Options(races=False)), simulator.profile() as counts, tconv.force(kernel):
            tconv.functional.conv2d(*given, **how)
        (launch,) = counts.launches
        sides = {**launch.reads, **launch.writes}
        rows.setdefault(kernel, [2 * y.numel()]).append({k.split("/")[0]: dataclasses.astuple(o) for k, o in sides.items()})
print(json.dumps(rows))
"""


def test_an_epilogue_moves_the_residual_once_and_nothing_else():
    """A convolution with bias, SiLU and residual, in bytes: what each operand is asked for, and what of it is touched."""
    rows = json.loads(compiled("-c", EPILOGUE))
    assert set(rows) == {"gather", "packed", "strip"}
    for result, alone, fused in rows.values():
        assert set(fused.pop("residual_ptr")) == {result}
        assert fused == alone


def test_the_page_has_the_records_table():
    assert counted.table(ROWS) in (ROOT / "docs" / "counted.md").read_text()


def test_a_pattern_without_plans_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "bench.counted", "--only", "nothing"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "no plan matches 'nothing'" in done.stderr
