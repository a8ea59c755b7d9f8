"""Frames that torch.compile leaves to Python: dynamo watches what they call, and compiles none of our kernels' Python."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

import tconv

ROOT = pathlib.Path(tconv.__file__).parents[1]
# Dynamo compiles the Python of an explicit layer, as of anybody's module, so that it can be traced; but nothing beneath it.
TRACED = ("tconv/modules.py", "tconv/functional.py", "tconv/dispatch/entry.py")


@functools.cache
def observed(way):
    """What tests/watched.py saw, by situation."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.watched", way]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_right(seen, torchs, name):
    assert torchs["error"] is None
    assert seen["error"] is None
    assert seen["failed"] == []
    assert seen["left"] == []
    assert len(seen["ours"]) >= 4
    rel = 1e-3 if name == "autocast" else 1e-9
    assert sorted(v for v in seen["values"] if v) == pytest.approx(sorted(v for v in torchs["values"] if v), rel=rel)


def test_under_the_override_dynamo_compiles_what_it_does_without():
    torchs = observed("torch")
    assert all(seen["ours"] == [] for seen in torchs.values())
    for name, seen in observed("enable").items():
        assert_right(seen, torchs[name], name)
        assert sum(seen["frames"].values()) == sum(torchs[name]["frames"].values()), (name, seen["frames"])
        assert not [frame for frame in seen["frames"] if "/tconv/" in frame or "/triton/" in frame], name


def test_below_explicit_layers_dynamo_compiles_nothing():
    torchs = observed("torch")
    for name, seen in observed("replace").items():
        if name != "a second derivative":  # of which torch says that what its compiler made of a layer has none
            assert_right(seen, torchs[name], name)
        ours = [frame.split(": ")[0] for frame in seen["frames"] if "/tconv/" in frame or "/triton/" in frame]
        assert all(path.endswith(TRACED) for path in ours), (name, ours)
