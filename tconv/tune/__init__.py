"""Measures a model's convolutions on the GPU here: tconv's plans and torch's kernel beside each other (docs/tuning.md).

`python -m tconv.tune` is the command. In reading order:

    clock       the time of one call
    subject     a pass to measure: its operands, tconv's launch of it under any plan, and torch's call
    candidates  the plans of a pass that are worth measuring
    marker      a note of the candidate that runs, for the next process should this one die of it
    measure     checks each candidate, then times them, fewer and fewer
    table       what was measured of a model, for people to read
    tuner       `tune` and `load_record`
    report      `report`: the share of each pass, as text, HTML or a picture
    fit         the cost model compared with a record and fitted to it
    __main__    the command
"""

from tconv.tune.report import Report, report
from tconv.tune.table import Row, Tuned
from tconv.tune.tuner import load_record, tune

__all__ = ["Report", "Row", "Tuned", "load_record", "report", "tune"]
