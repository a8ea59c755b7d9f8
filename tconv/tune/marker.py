"""A note on disk of the candidate that runs, so that one that takes its process with it is barred by the next one.

A kernel that hangs, or breaks the GPU's context, cannot be stopped from within its process. So the line that would bar it is
written before it runs, and removed after. The file is locked as long as its process lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator

from tconv.records.file import VERSION, Line, read

Note = Callable[["Line | None"], None]
REASON = "the process that ran it died"


@contextlib.contextmanager
def noting(folder: pathlib.Path) -> Iterator[Note]:
    """Yields a function that is told what is about to run, as the line that would bar it; None if nothing is.

    Where the folder cannot be written, nothing is noted.
    """
    import filelock

    path = folder / f"running-{uuid.uuid4().hex}.json"
    lock = filelock.FileLock(f"{path}.lock", timeout=0)

    def note(line: Line | None) -> None:
        with contextlib.suppress(OSError):
            if line is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(json.dumps({"tconv": VERSION} | line | {"reason": REASON}))

    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        except (OSError, NotImplementedError, filelock.Timeout):  # NotImplementedError: a file system without locks
            yield lambda line: None
            return
        try:
            yield note
        finally:
            note(None)
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)


def left_behind(folder: pathlib.Path) -> list[Line]:
    """Returns the lines that processes left which died while a candidate ran, and removes them."""
    import filelock

    found: list[Line] = []
    for path in sorted(folder.glob("running-*.json")):
        with (
            contextlib.suppress(OSError, NotImplementedError, filelock.Timeout),
            filelock.FileLock(f"{path}.lock", timeout=0) as lock,
        ):
            found += read(path)
            path.unlink()
            os.unlink(lock.lock_file)
    return found
