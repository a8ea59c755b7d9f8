"""Convolutions on several ranks, gloo processes on the CPU, against one process; who did the work.

tests/on_ranks.py is what each rank runs; four ranks are started once for all.
"""

from __future__ import annotations

import doctest
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import DTensor  # noqa: F401 - the ranks' answers name its types

import tconv
from tconv import distributed
from tests import on_ranks
from tests.oracle import Case
from tests.ranks import Ranks

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


# Space: the mesh, where the input is cut, and the case.
SPACE = [
    ((2,), "D", Case("1-D, uneven shards", (2, 3, 11), 4, (3,), padding=1)),
    ((3,), "D", Case("a middle rank with two neighbours, stride", (2, 3, 11, 4), 4, (3, 3), stride=2, padding=1)),
    ((2,), "H", Case("the last dimension, no padding", (1, 3, 5, 9), 4, (2, 4))),
    ((3,), "D", Case("a halo wider than the neighbour's shard", (1, 3, 7, 3), 4, (5, 1), padding=(4, 0), dilation=(2, 1))),
    ((4,), "D", Case("a last shard of one, stride 3", (1, 4, 19), 4, (3,), stride=3, padding=2, dilation=2, groups=2)),
    ((3,), "D", Case("a shard without input: padding alone", (1, 2, 4), 3, (3,), padding=3)),
    ((2,), "D", Case("pixels that no output reads", (1, 3, 10, 3), 2, (1, 1), stride=3)),
    ((2,), "D", Case("same padding, even kernels, cut and whole", (1, 2, 6, 5), 3, (4, 2), padding="same")),
    ((2,), "H", Case("3-D, depthwise", (1, 4, 3, 6, 4), 4, (3, 3, 3), padding=1, groups=4)),
    ((2, 2), "DH", Case("two dimensions: corners", (1, 3, 6, 7), 4, (3, 3), padding=1)),
    ((2, 2), "ND", Case("batch and space", (3, 3, 6, 3), 4, (3, 3), padding=1)),
    ((2,), "D", Case("transposed, kernel equals stride", (1, 3, 5, 4), 4, (2, 2), stride=2, transposed=True)),
    ((3,), "D", Case("transposed", (1, 4, 7, 3), 4, (3, 3), stride=2, padding=1, output_padding=1, transposed=True)),
    ((3,), "D", Case("transposed, gaps hold the bias", (1, 3, 4), 4, (2,), stride=5, output_padding=3, transposed=True)),
    ((2,), "D", Case("transposed, dilated, groups", (1, 4, 5), 6, (3,), padding=2, dilation=3, groups=2, transposed=True)),
]  # fmt: skip
# Batch and channels: input, weight (- for a plain one) and output.
REST = [
    ((2,), "N", None, "N", Case("batch", (3, 3, 5, 4), 4, (3, 3), padding=1)),
    ((2,), "R", "K", "C", Case("output channels, uneven", (2, 3, 5), 5, (3,))),
    ((2,), "C", "C", "R", Case("input channels, uneven", (2, 5, 5), 3, (3,))),
    ((2,), "C", None, "R", Case("input channels, a plain weight", (2, 4, 5), 3, (3,), stride=2)),
    ((2,), "C", None, "C", Case("groups", (2, 8, 5), 4, (3,), groups=4)),
    ((2,), "C", "K", "C", Case("depthwise, a sharded weight", (2, 4, 5, 5), 8, (3, 3), padding=1, groups=4)),
    ((2,), "R", "C", "C", Case("transposed, output channels", (2, 4, 5), 5, (3,), stride=2, transposed=True)),
    ((2,), "C", "K", "R", Case("transposed, input channels", (2, 4, 5), 5, (3,), stride=2, transposed=True)),
    ((2, 2), "DR", "RK", "DC", Case("space and output channels", (1, 3, 6), 4, (3,), padding=1)),
    ((2, 2), "NC", None, "NR", Case("batch and input channels", (2, 4, 5), 3, (3,))),
]  # fmt: skip


def asked(ranks, shape, case, x_at, w_at, y_at, dtype=torch.float64, last=False):
    """Every rank's part is right, all by tconv's kernels, and replicated gradients have the same bits everywhere."""
    answers = [a for a in ranks(on_ranks.convolution, shape, case, x_at, w_at, y_at, dtype, last) if a is not None]
    assert len(answers) == torch.Size(shape).numel()
    first, back = ("dgrad", "fprop") if case.transposed else ("fprop", "dgrad")
    for ran, left, bits in answers:
        assert left == []
        assert {first, back, "wgrad"} <= set(ran) <= {first, back, "wgrad", "bias"}, ran
        if w_at is None:
            assert bits == answers[0][2]


@pytest.mark.parametrize(("shape", "x_at", "case"), SPACE, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_space(ranks, shape, x_at, case):
    asked(ranks, shape, case, x_at, None, x_at)


@pytest.mark.parametrize(("shape", "x_at", "w_at", "y_at", "case"), REST, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_batch_and_channels(ranks, shape, x_at, w_at, y_at, case):
    asked(ranks, shape, case, x_at, w_at, y_at)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_space_in_every_dtype_and_channels_last(ranks, dtype):
    asked(ranks, (3,), Case("", (1, 4, 8, 5), 4, (3, 3), padding=1), "D", None, "D", dtype, last=True)


@pytest.mark.parametrize(("rank", "shape", "x_at"), [(1, (3,), "D"), (2, (2,), "H")])
def test_a_model_on_a_sharded_volume(ranks, rank, shape, x_at):
    for answer in ranks(on_ranks.unet, rank, shape, x_at):
        if answer is not None:
            calls, left = answer
            assert left == []
            assert calls == 20  # five layers: forward, input, weight and bias


@pytest.mark.parametrize("way", ["replace_", "enable()"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp bf16"])
def test_training_on_two_ranks_is_training_on_one(ranks, kind, way):
    answers = [a for a in ranks(on_ranks.trained, kind, way) if a is not None]
    assert len(answers) == 2
    for calls, left in answers:
        assert left == []
        assert calls == 22  # two steps of three layers: forward, input but for the first, weight, bias


def test_fsdp_over_the_batch_and_space_over_the_rest(ranks):
    assert ranks(on_ranks.fsdp_and_space) == [[]] * 4


def test_a_layer_not_made_distributed_leaves_a_dtensor_to_torch(ranks):
    for answer in ranks(on_ranks.plain_layer_on_a_dtensor)[:2]:
        calls, left = answer
        assert len(calls) == 1
        assert "DTensor" in calls[0]
        assert left == []


def test_a_repeated_call_is_planned_once(ranks):
    assert ranks(on_ranks.plans)[:2] == [2, 2]


def test_errors(ranks):
    answers = ranks(on_ranks.errors)[:2]
    told = answers[0]
    for name, text in {
        "plain": "TypeError: input must be a DTensor, not Tensor",
        "partial": "an input placed Partial(sum) and a weight placed Replicate()",
        "weight and space": "an input placed Shard(dim=2) and a weight placed Shard(dim=0)",
        "groups": "3 groups cannot be dealt evenly to 2 ranks",
        "nothing": "output dimension 2, 1 long, leaves one of 2 ranks without any",
        "does not fit": "the filter does not fit",
        "channels": "an input of 4 channels does not fit",
        "stride": "rank 2 with stride=(1, 1, 1)",
        "same": "with stride=2, padding='same'",
        "output padding": "output_padding (2, 2) must be smaller than stride (2, 2)",
        "dimensions": "an input of 4 dimensions, batch included, does not fit a weight of 3",
        "circular": "padding_mode='circular' of a sharded input",
    }.items():
        assert text in told[name], (name, told[name])
        assert answers[1][name] == told[name]
    assert "not DTensor's share" in told["share"] + answers[1]["share"]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_range_of_outputs_reads_no_more_than_it_needs(transposed):
    """`_reach` against the taps one by one."""
    for taps, stride, before, dilation in ((3, 1, 1, 1), (3, 2, 1, 1), (2, 4, 0, 1), (4, 3, 2, 2), (1, 3, 0, 1), (5, 2, 4, 3)):
        for a, b in ((0, 1), (2, 5), (3, 9)):
            lo, hi = distributed._reach(transposed, (a, b), taps, stride, before, dilation)
            if transposed:
                pairs = {(i, i * stride - before + dilation * t) for i in range(-40, 60) for t in range(taps)}
                assert lo * stride - before <= a, "the result begins too late"
                assert (hi - 1) * stride - before + dilation * (taps - 1) + 1 >= b, "the result ends too early"
            else:
                pairs = {(o * stride - before + dilation * t, o) for o in range(a, b) for t in range(taps)}
            read = {i for i, o in pairs if a <= o < b}
            assert read <= set(range(lo, hi))
            if not transposed:
                assert (lo, hi) == (min(read), max(read) + 1)


def test_bounds_are_dtensors():
    assert doctest.testmod(distributed) == (0, 1)
    for extent in range(1, 20):
        for count in range(1, 6):
            cuts = distributed.bounds(extent, count)
            lengths = [len(c) for c in torch.arange(extent).chunk(count)]
            assert [b - a for a, b in itertools.pairwise(cuts) if b > a] == lengths
            assert len(cuts) == count + 1


def test_import_tconv_leaves_it_out():
    code = "import sys, tconv; print('tconv.distributed' in sys.modules, 'torch.distributed.tensor' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "False"]


def test_the_example_checks_itself():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "examples/distributed_spatial.py", "--steps", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as of one process" in done.stdout


def test_what_was_replaced_can_be_restored():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), tconv.Conv1d(2, 3, 3), torch.nn.ConvTranspose3d(2, 3, 3))
    distributed.replace_(tconv.replace_(model, lambda module, name: name == "2"))
    assert [type(layer) for layer in model] == [distributed.Conv2d, distributed.Conv1d, distributed.ConvTranspose3d]
    tconv.restore_(model)
    assert [type(layer) for layer in model] == [torch.nn.Conv2d, distributed.Conv1d, torch.nn.ConvTranspose3d]
