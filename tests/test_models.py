"""scripts/models.py compares what it says: a model that is right passes by each route, one that is wrong is seen."""

import json
import math

import pytest
import torch
from torch import nn

from bench.models import COMPARED
from scripts import models

QUICK = [model for model in COMPARED if model.name in ("ViT", "Whisper encoder", "SegResNet")]


class Same(nn.Conv2d):
    """Pads in its own forward, as timm's."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), Same(4, 6, 2)
    return nn.Sequential(*layers), (torch.randn(2, 3, 5, 4),)


def test_a_model_is_right_and_its_layers_are_counted():
    row = models.compare(*small())
    swap, on = row["replace_"], row["enable()"]
    assert (row["layers"], row["operators"]) == (2, 2)
    assert row["tensors"] == 8  # the output, the input, two convolutions' and one norm's parameters
    assert row["noise"] == 1  # the bias before a norm of one channel
    assert (swap["layers"], swap["entries"], swap["calls"], on["calls"]) == (1, 1, 1, 2)
    assert swap["left layers"] == {"Same left alone: it overrides forward (tconv.enable() reaches what that calls)": 1}
    assert [sum(way["kernels"].values()) for way in (swap, on)] == [3, 6]
    assert swap["excess"] == on["excess"] == {}
    assert 0 < row["torch"]["gradients"] < 1e-5
    assert not models.wrong(row)


@pytest.mark.parametrize("model", QUICK, ids=lambda model: model.name)
def test_a_model_of_another_package(model, device):
    if not model.there:
        pytest.skip(f"{model.package} is not installed")
    row = models.run(model, device)
    assert not models.wrong(row), row


def test_parameters_that_begin_as_zeros_are_made_random():
    net, inputs = small()
    nn.init.zeros_(net[3].weight)
    net[1].weight.requires_grad_(False)
    models.compare(net, inputs)
    assert net[3].weight.any()


def test_what_is_wrong_is_seen():
    exact = {"output": torch.ones(4).double(), "weight": torch.ones(3).double() / 3, "noise": torch.full((2,), 1e-17).double()}
    right = {name: t.float() for name, t in exact.items()} | {"noise": torch.full((2,), 1e-9)}
    torchs = models.errors(right, exact)
    assert models.excess(torchs, torchs) == []
    assert models.worst(torchs, torchs)["gradients"] < 1e-6
    assert models.excess(models.errors(right | {"noise": torch.full((2,), -9e-9)}, exact), torchs) == []
    assert models.excess(models.errors(right | {"noise": torch.full((2,), 1.1e-8)}, exact), torchs) == ["noise"]
    for wrong in (1.001, float("nan"), float("inf")):
        off = models.errors(right | {"weight": right["weight"] * wrong}, exact)
        assert models.excess(off, torchs) == ["weight"]
        assert not models.worst(off, torchs)["gradients"] < 1e-4


def test_a_zero_has_to_be_zero():
    zero = torch.zeros(2).double()
    assert models.distance(zero, zero) == 0
    assert models.distance(zero + 1e-30, zero) == math.inf


def test_a_gradient_that_is_missing_is_seen():
    exact = {"output": torch.ones(1), "weight": torch.ones(1)}
    with pytest.raises(AssertionError, match="weight"):
        models.errors({"output": torch.ones(1)}, exact)


def test_the_table_has_a_line_for_each_model():
    way = {"output": 1e-7, "gradients": 2e-7, "excess": {}, "calls": 2, "calls left": 0, "kernels": {"gather": 4, "wgrad": 2}}
    swap = way | {"calls": 1, "layers": 1, "entered": 1, "entries": 1, "left calls": {}}
    swap["left layers"] = {"Same left alone, a class of its own": 1}
    right = {"package": "p", "version": "1", "ran": "here", "layers": 2, "operators": 2, "tensors": 9, "noise": 1}
    right |= {"torch": {"output": 1e-7, "gradients": 1e-7}, "replace_": swap, "enable()": way | {"left calls": {}}}
    wrong = right | {"replace_": swap | {"excess": {"weight": [1.0, 1e-7]}}}
    failed = {"package": "p", "version": "1", "ran": "here", "failed": "ImportError: no"}
    rows = {"a": right, "b": wrong, "c": failed}
    assert [models.wrong(row) for row in rows.values()] == [False, True, True]
    assert models.wrong(right | {"replace_": swap | {"calls": 0}})
    assert models.wrong(right | {"enable()": right["enable()"] | {"calls": 1}})
    lines = models.table(rows).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "1 of 2 | 2 of 2" in lines[2]
    assert "gather 4, wgrad 2 | 1 x Same left alone" in lines[2]
    assert "**off: weight (1)**" in lines[3]
    assert "ImportError: no" in lines[4]
    assert len({line.count("|") for line in models.summary(rows).splitlines()}) == 1
    assert models.verdict(rows) == "1 of 3 models are right by both ways (not: b, c): here."


def test_the_documents_are_the_records():
    records = [json.loads(file.read_text()) for file in models.RECORDS.glob("*.json")]
    page, evidence = ((models.ROOT / name).read_text() for name in ("docs/models.md", "docs/evidence.md"))
    (rows,) = [rows for rows in records if models.page(rows) == page]
    assert models.summary(rows) in evidence
    assert models.verdict(rows) in evidence
    assert sum(not models.wrong(row) for row in rows.values()) >= 15
