"""scripts/tools.py compares what it says, and what docs/tools.md tells users to do gives torch.nn's answer."""

import ast
import dataclasses
import json
import math
import sys

import pytest
import torch
from torch import nn

from bench.tools import TOOLS, Remedy, Tool, every_rank, products
from scripts import tools

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.ao and torch.jit, which are asked all the same
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao.*"),
]
RECORD = json.loads(tools.RECORD.read_text())
TORCHS_OWN = [tool for tool in TOOLS if not tool.packages]


def asked(tool):
    """A row, made in this process."""
    return tools.row_of(tool, {way: tools.ask(tool, way) for way in tools.ways(tool)})


@pytest.mark.parametrize("tool", TORCHS_OWN, ids=lambda tool: tool.name)
def test_a_tool_of_torchs(tool, device):
    if device != "cpu":
        pytest.skip("the table is of the interpreter's kernels")
    row = asked(tool)
    assert not tools.wrong(tool, row), {way: tools.cell(tool, row, way) for way in row["ways"]}
    stored = RECORD[tool.name]
    if row["version"].split("+")[0] == stored["version"].split("+")[0]:
        assert tools.remedy(tool, row) == tools.remedy(tool, stored)


def test_the_document_is_the_record():
    assert tools.PAGE.read_text() == tools.page(RECORD)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_row_is_right_or_says_what_to_do(tool):
    assert not tools.wrong(tool, RECORD[tool.name])


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_torchs_classes_give_torchs_answer(tool):
    assert not tools.differences(tool, RECORD[tool.name], tools.RESTORED)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_what_the_document_says_to_type_is_python(tool):
    for code in (tool.code, tools.restored(tool.code), tool.remedy.code if tool.remedy else ""):
        ast.parse(code)


def test_a_training_step_takes_three_times_the_flops_of_its_forward_pass():
    forward, both = (RECORD[f"FlopCounterMode, {what}"]["ways"] for what in ("forward", "forward and backward"))
    assert both["replace_"]["answer"]["FLOPs"] == 3 * forward["replace_"]["answer"]["FLOPs"]
    assert both["torch.nn"]["answer"]["FLOPs"] > 3 * forward["torch.nn"]["answer"]["FLOPs"]  # as the row's note says


def layer_names(model, x):
    return {"names": [f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()]}


def example(question, **more):
    return Tool("example", (), "ask(model, x)", question, every_rank, **more)


def test_a_tool_that_looks_at_classes_needs_restored():
    row = asked(example(layer_names))
    assert tools.differences(example(layer_names), row, "replace_") == ["names"]
    assert not tools.differences(example(layer_names), row, "enable()")
    assert tools.remedy(example(layer_names), row) == "`with tconv.restored(model): ask(model, x)`"


def test_a_remedy_is_shown_only_where_it_gave_torchs_answer():
    for answer, text in (("torch.nn.modules.conv.Conv2d", "`tell()`"), ("another", None)):
        tool = example(
            lambda model, x: {"first": f"{type(model[0]).__module__}.{type(model[0]).__name__}"},
            remedy=Remedy("tell()", lambda model, x, answer=answer: {"first": answer}),
        )
        row = asked(tool)
        row["ways"][tools.RESTORED] = {"failed": "RuntimeError: as if"}
        assert tools.remedy(tool, row) == text
        assert tools.wrong(tool, row) == (text is None)


def test_launches_show_whose_kernels_answered():
    tool = example(lambda model, x: {"output": model(x).flatten().tolist()})
    row = asked(tool)
    assert tools.remedy(tool, row) == "nothing"
    assert [row["ways"][way]["launches"] for way in tools.WAYS] == [0, 4, 4]
    assert row["ways"][tools.RESTORED]["launches"] == 0


def test_a_tool_that_fails_shows_its_first_line():
    def raises(model, x):
        raise ValueError("first\nsecond")

    row = asked(example(raises))
    assert tools.cell(example(raises), row, "replace_") == "**ValueError: first**"
    assert tools.wrong(example(raises), row)


@pytest.mark.parametrize(
    ("code", "limit", "said"),
    [
        ("import os, sys; print('gone', file=sys.stderr); os._exit(3)", 60, "the process ended with 3: gone"),
        ("import os; os.kill(os.getpid(), 9)", 60, "the process ended with -9: no message"),
        ("import time; time.sleep(60)", 0.5, "no answer in 0.5 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_row_too(code, limit, said, monkeypatch):
    answers = f"""print('{tools.MARK}{{"answer": {{"a": 1}}}}', flush=True)"""  # to the first of three questions
    codes = {3: f"{answers}; {code}", 2: code, 1: code}
    monkeypatch.setattr(tools, "command", lambda tool, ways: [sys.executable, "-c", codes[len(ways)]])
    found = tools.in_a_process(TOOLS[0], tools.WAYS, limit)
    assert found == {"torch.nn": {"answer": {"a": 1}}, "replace_": {"failed": said}, "enable()": {"failed": said}}


def test_an_answer_comes_through_a_process(device):
    if device != "cpu":
        pytest.skip("the table is of the interpreter's kernels")
    tool = next(tool for tool in TOOLS if tool.name == "FlopCounterMode, forward")
    here, there = tools.ask(tool, "replace_"), tools.in_a_process(tool, ["replace_"], 200)["replace_"]
    assert here["answer"] == there["answer"]
    assert here["launches"] == there["launches"] == 4


def test_counts_are_exact_and_tensors_close():
    assert tools.alike(3, 3, 1.0)
    assert not tools.alike(3, 4, 1.0)
    assert not tools.alike(["a"], ["a", "b"], 1.0)
    assert tools.alike([3.0, 4.0], [3.0, 4.0004], 1e-4)
    assert not tools.alike([3.0, 4.0], [3.0, 4.006], 1e-3)
    assert not tools.alike([3.0], [3.0, 4.0], 1.0)
    assert not tools.alike([math.nan], [math.nan], 1.0)
    row = {"ways": {"torch.nn": {"answer": {"a": 1, "b": 2}}, "replace_": {"answer": {"a": 1}}}}
    assert tools.differences(TOOLS[0], row, "replace_") == ["b"]


def test_any_change_of_a_tensor_shows():
    t = torch.randn(3, 4)
    assert tools.alike(products(t * (1 + 1e-6)), products(t), 1e-4)
    for changed in (t.flip(0), t.T.reshape(3, 4), t + nn.functional.one_hot(torch.tensor([1, 2, 3]), 4)):
        assert not tools.alike(products(changed), products(t), 1e-4)


def test_a_row_is_made_again_where_it_is_wrong_or_old():
    tool = TORCHS_OWN[0]
    row = {
        "version": tool.version,
        "ran": tools.here(),
        "ways": {way: {"answer": {"a": 1}, "launches": 0, "left": 0} for way in tools.WAYS},
    }
    assert not tools.stale(tool, row)
    assert tools.stale(tool, None)
    assert tools.stale(tool, row | {"version": "torch 1.0"})
    assert tools.stale(tool, row | {"ways": row["ways"] | {"enable()": {"answer": {"a": 2}, "launches": 0, "left": 0}}})
    absent = dataclasses.replace(tool, packages=("no_such_package",))
    assert not absent.there
    assert not tools.stale(absent, row | {"version": "no_such_package 1.0"})


def test_the_table_has_a_line_for_each_tool():
    rows = dict(RECORD)
    first, second, third = (tool.name for tool in TOOLS[:3])
    rows[first] = {"absent": "thop not installed"}
    del rows[second]
    rows[third] = rows[third] | {"ways": {way: {"failed": "TypeError: a | b"} for way in tools.ways(TOOLS[2])}}
    lines = tools.table(rows).splitlines()
    assert len(lines) == 2 + len(TOOLS)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "thop not installed" in lines[2]
    assert "not asked" in lines[3]
    assert "TypeError: a \\| b" in lines[4]
    assert third in tools.verdict(rows)


def test_models_have_what_tools_look_for():
    model, x = every_rank()
    assert {type(m) for m in model} >= {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d}
    assert not model.training
    assert model(x).isfinite().all()


def test_a_remedy_that_was_not_asked_for_is_not_shown():
    said = {"answer": {"a": 1}, "launches": 0, "left": 0}, {"answer": {"a": 2}, "launches": 0, "left": 0}
    row = {"ways": {"torch.nn": said[0], "replace_": said[1], "enable()": said[0], tools.RESTORED: said[0]}}
    tool = example(layer_names, remedy=Remedy("tell()", layer_names))
    assert tools.remedy(tool, row) == "`with tconv.restored(model): ask(model, x)`"
    row["ways"][tools.REMEDY] = said[0]
    assert tools.remedy(tool, row) == "`tell()`"
    row["ways"]["enable()"] = said[1]
    assert tools.remedy(tool, row) is None
    assert tools.remedy(example(layer_names, note="as it should"), row) == "as it should"
