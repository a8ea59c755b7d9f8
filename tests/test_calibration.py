"""The cost model stays as near to the times of the committed records as it was fitted."""

import dataclasses
import re

import pytest

from bench import calibration
from bench.record import RESULTS
from tconv.planning.device import DEVICES
from tconv.planning.families import FAMILIES
from tconv.planning.persistent import SPECIALISED
from tconv.planning.tiles import Tile

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
    assert int(cells) - int(unknown) > 20  # in the others the planner chooses a plan that is newer than the record
    assert 1 <= float(regret) < 1.07


@pytest.mark.parametrize(
    "tile",
    [
        Tile(64, 32, 16), Tile(128, 128, 64, 8, 4, extra=64), Tile(64, 64, 64, 4, 4, 255),
        Tile(64, 4, 1, 4, 1, 255, columns=8),
    ],
    ids=str,
)  # fmt: skip
def test_the_text_of_a_tile_is_read_as_that_tile(tile):
    swept, raced = f"gather {tile} x3 staged", f"fprop: gather {tile}, 3 splits (best of 5)"
    assert calibration.tile_of(calibration.SWEPT.fullmatch(swept)) == tile
    assert calibration.tile_of(calibration.RACED.match(raced)) == tile


def test_folders_without_such_records_are_named(tmp_path, monkeypatch, capsys):
    for folder in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr("sys.argv", ["calibration", str(folder)])
        with pytest.raises(SystemExit) as ended:
            calibration.main()
        assert ended.value.code == 2
        assert f"no plans that an H200 timed in bf16 in {folder}" in capsys.readouterr().err
