"""The files of a record: JSON lines, appended under a lock, with nothing lost or half-written.

Several processes may append to one file. A line that was cut, by a full disk or a process that died, is left in the file and
passed over, and so are lines of other versions or programs.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

VERSION = 1  # of the lines' format
NAME = "measured.jsonl"
PATIENCE = 10.0  # seconds to wait for another process that appends
Line = dict[str, Any]


def folder() -> pathlib.Path:
    """Returns the folder of the user's own record: TCONV_CACHE_DIR, or the platform's cache folder."""
    given = os.environ.get("TCONV_CACHE_DIR")
    if given:
        return pathlib.Path(given)
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("tconv", False))


def own() -> pathlib.Path:
    """Returns the path of the user's own record."""
    return folder() / NAME


def read(path: pathlib.Path) -> Iterator[Line]:
    """Yields the lines of a record of this version; what is cut, foreign or of another version is passed over.

    Raises:
        OSError: the file cannot be read.
    """
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (RecursionError, ValueError):  # which a text that is not UTF-8 raises too
            continue
        if isinstance(line, dict) and line.get("tconv") == VERSION:
            yield line


def append(path: pathlib.Path, lines: Iterable[Line]) -> bool:
    """Adds lines to a record, whose folder is made if need be. Returns False, with a warning, if they cannot be kept."""
    import filelock

    text = "".join(json.dumps({"tconv": VERSION} | line, separators=(",", ":")) + "\n" for line in lines).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=PATIENCE):
            _append(path, text)
    except (OSError, NotImplementedError, filelock.Timeout) as e:  # read-only, full, without locks, or locked for long
        warnings.warn(f"tconv does not keep what it measured: {path}: {type(e).__name__}: {e}", stacklevel=3)
        return False
    return True


def _append(path: pathlib.Path, text: bytes) -> None:
    """Adds text behind the last whole line. If not all of it can be written, the file is as before."""
    with open(path, "a+b", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        if end:
            f.seek(end - 1)
            text = text if f.read(1) == b"\n" else b"\n" + text
        try:
            if f.write(text) != len(text):
                raise OSError(f"no room for {len(text)} bytes")
            os.fsync(f.fileno())
        except OSError:
            f.truncate(end)
            raise
