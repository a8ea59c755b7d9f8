"""The cost model stays as near to the times of the committed records as it was fitted."""

import dataclasses
import re

import pytest

from bench import calibration
from bench.record import RESULTS
from tconv.planning.device import DEVICES
from tconv.planning.families import FAMILIES
from tconv.planning.persistent import SPECIALISED

WITHOUT_TMA = dataclasses.replace(DEVICES["H200"], check=lambda mechanism: mechanism not in ("tma", SPECIALISED))


def last_row(pattern):
    found = [t for t in calibration.timed(sorted(RESULTS.glob("nvidia-h200-*"))) if t.plan.re is pattern]
    plain = [t for t in found if not FAMILIES[t.plan["kernel"]].tma]
    cells = calibration.compare(plain, calibration.Model(WITHOUT_TMA))[-1].split("|")
    return [cell.strip() for cell in cells[1:-1]]


def test_predictions_of_the_planners_choices_are_near_what_was_measured():
    _, _, plans, ratio, *_ = last_row(calibration.RACED)
    mean, spread = map(float, re.fullmatch(r"(\S+) x/ (\S+)", ratio).groups())
    assert int(plans) > 150
    assert 0.85 < mean < 1.2
    assert spread < 1.4


def test_the_planner_chooses_nearly_the_fastest_of_the_plans_that_were_timed():
    _, _, _, _, regret, cells, unknown = last_row(calibration.SWEPT)
    assert int(cells) - int(unknown) > 25  # in the others the planner chooses a plan that is newer than the record
    assert 1 <= float(regret) < 1.06


def test_folders_without_such_records_are_named(tmp_path, monkeypatch, capsys):
    for folder in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr("sys.argv", ["calibration", str(folder)])
        with pytest.raises(SystemExit) as ended:
            calibration.main()
        assert ended.value.code == 2
        assert f"no plans that an H200 timed in bf16 in {folder}" in capsys.readouterr().err
