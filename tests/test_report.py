"""A model's convolutions by their share, and the cost model beside a record."""

from __future__ import annotations

import re

import pytest
import torch

import tconv
from tconv.planning import cost
from tconv.planning.device import DEVICES
from tconv.planning.problem import forward_problem
from tconv.records import book
from tconv.records.book import Measured, line_of, plan_to
from tconv.records.key import machine
from tconv.tune import fit
from tconv.tune.__main__ import main
from tconv.tune.candidates import candidates
from tconv.tune.subject import passes_of
from tests.test_tune import dense, own, small, timed

__all__ = ["own", "timed"]  # fixtures
H200 = DEVICES["H200"]


def model():
    layers = tconv.Conv2d(64, 128, 3, padding=1), torch.nn.ReLU(), tconv.Conv2d(128, 64, 1), tconv.Conv2d(64, 64, 3, groups=64)
    return torch.nn.Sequential(*layers).to(torch.bfloat16), torch.empty(8, 64, 28, 28, dtype=torch.bfloat16)


# --- report ---


def test_without_a_gpu_it_is_predicted_and_says_so():
    found = tconv.report(*model())
    assert found.title == "convolutions on H200, PREDICTED: nothing was measured"
    assert len(found.shares) == 9
    assert {one.layer for one in found.shares} == {"0", "2", "3"}
    assert [one.runs for one in found.shares] == sorted((one.runs for one in found.shares), reverse=True)
    assert {one.why for one in found.shares} == {"predicted to be fastest"}
    assert {one.bound for one in found.shares} <= {"products", "issue", "cache", "memory"}
    assert sum(float(share) for share in re.findall(r"^([\d.]+)%", str(found), re.M)) == pytest.approx(100, abs=0.5)
    assert all(one.torch is None for one in found.shares)


def test_another_gpu_can_be_named():
    slower, faster = (tconv.report(*model(), backward=False, target=name) for name in ("A100", "H200"))
    assert slower.device == "A100"
    assert sum(one.runs for one in slower.shares) > sum(one.runs for one in faster.shares)


def test_what_was_measured_is_told_as_such(own):
    m, x = model()
    asked, _ = passes_of(m, (x,), {}, True, H200)
    plans = [candidates(one.subject, H200)[0].choices for one in asked]
    where = machine("H200")
    own().add(
        line_of(where, one.subject.cell(), "", Measured(plan, 2e-5, 1e-5 if i == 0 else 4e-5))
        for i, (one, plan) in enumerate(zip(asked, plans, strict=True))
        if i < 4
    )
    found = tconv.report(m, x)
    assert found.title == "convolutions on H200, measured 4 of 9 passes, the others predicted"
    torchs = [one for one in found.shares if one.choice == "torch"]
    assert [(one.seconds, one.torch, one.runs, one.why) for one in torchs] == [(2e-5, 1e-5, 1e-5, "measured to be faster")]
    assert sum(one.why == "measured to be fastest" for one in found.shares) == 3


def test_it_is_saved_as_html_and_as_a_picture(tmp_path):
    m, x = model()
    found = tconv.report(torch.nn.ModuleDict({"<b>": m})["<b>"], x)
    found.save(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert text.count("<tr>") == 1 + len(found.shares)
    assert "PREDICTED" in text
    assert "-&gt; K128" in text
    found.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"ends in one of \('.html', '.png'\) is wanted, got 'a.pdf'"):
        found.save("a.pdf")


@pytest.mark.parametrize(
    ("given", "keywords", "error", "text"),
    [
        (3, {}, TypeError, "report: model must be a module or a function, got int"),
        (tconv.Conv1d(4, 4, 2), {"target": "H300"}, ValueError, "target must be one of .*, got 'H300'"),
        (torch.nn.ReLU(), {}, RuntimeError, "report: nothing to tell, no call of tconv"),
    ],
)
def test_bad_input(given, keywords, error, text):
    with pytest.raises(error, match=text):
        tconv.report(given, torch.empty(1, 4, 6), **keywords)


# --- the cost model beside a record ---


def subjects():
    """Passes of several sizes, of which several parts of the cost model take the most time."""
    for n, c, k, extent, t in [
        (2, 64, 64, 8, 3), (32, 128, 128, 28, 3), (64, 256, 256, 14, 3), (8, 512, 512, 7, 3), (64, 64, 256, 56, 1),
        (32, 256, 64, 56, 1), (16, 32, 32, 112, 3), (128, 64, 64, 28, 3),
    ]:  # fmt: skip
        problem = forward_problem((n, c, extent, extent), (k, c, t, t), (1, 1), ((t // 2,) * 2,) * 2, (1, 1), 1)
        for pass_ in ("fprop", "wgrad"):
            yield dense(pass_, problem=problem)


def recorded(path, values):
    """A record of an H200 on which the cost model, with these times, is exact."""
    lines = []
    for subject in subjects():
        choices = [plan.choices for plan in candidates(subject, H200)]
        with fit._constants(values, H200) as changed:
            seconds = {one: subject.launch(changed, one).call.plan.cost.seconds for one in choices}
        best = min(seconds, key=seconds.__getitem__)
        details = {"asked": subject.to_line(), "times": [[plan_to(one), 1e3 * s] for one, s in seconds.items()]}
        found = Measured(best, seconds[best], None, details=details)
        lines.append(line_of(machine("NVIDIA H200"), subject.cell(), str(subject.problem), found))
    book.Book(path).add(lines)
    return fit.timed(path)


@pytest.fixture
def now():
    return {name: getattr(cost, name) for name in fit.CONSTANTS} | {"l2_bandwidth": H200.limits.l2_bandwidth}


def test_a_fit_finds_the_times_that_made_the_record(tmp_path, now):
    changed = {"LAUNCH": 2 * now["LAUNCH"], "START": 1.8 * now["START"], "l2_bandwidth": 0.6 * now["l2_bandwidth"]}
    true = now | changed
    found = fit.fit(recorded(tmp_path / "a.jsonl", true), H200)
    for name in changed:
        assert found.after[name] == pytest.approx(true[name], rel=0.05), name
    assert found.error_before > 0.1
    assert found.error_after < 0.01
    assert {name: getattr(cost, name) for name in fit.CONSTANTS} == {name: now[name] for name in fit.CONSTANTS}


def test_regret_is_one_where_the_model_is_exact_and_more_where_it_is_not(tmp_path, now):
    exact = fit.regrets(recorded(tmp_path / "a.jsonl", now), H200)
    assert len(exact) == 2 + 2
    for line in exact[2:]:
        assert "| 1.00 x/ 1.00 | 1.000 | 0 |" in line
    wrong = fit.regrets(recorded(tmp_path / "b.jsonl", now | {"l2_bandwidth": now["l2_bandwidth"] / 20}), H200)
    assert max(float(line.split("|")[6]) for line in wrong[2:]) > 1.02


def test_the_command_reads_a_record(tmp_path, now, capsys):
    recorded(tmp_path / "a.jsonl", now)
    assert main(["--regret", "--record", str(tmp_path / "a.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out
    assert "| dense 2-D | fprop | 8 |" in out


def test_the_command_says_why_it_cannot(tmp_path, capsys):
    assert main(["--fit", "--record", str(tmp_path / "none")]) == 2
    (tmp_path / "a.jsonl").write_text("cut {")
    assert main(["--regret", "--record", str(tmp_path / "a.jsonl")]) == 2
    assert "cannot be read" in (err := capsys.readouterr().err)
    assert "has no times of candidates" in err


def test_what_tune_writes_is_what_a_fit_reads(own, timed, tmp_path):
    layer, x = small()
    timed(packed=1e-5, gather=2e-5)
    tconv.tune(layer, x, record=tmp_path / "a.jsonl")
    found = fit.timed(tmp_path / "a.jsonl")
    assert [one.subject for one in found] == [one.subject for one in passes_of(layer, (x,), {}, True)[0]]
    assert min(found[0].seconds, key=found[0].seconds.__getitem__).kernel == "packed"
