"""A run over many cells of a table that is recorded, bounded in time, and resumed behind the cell that ended it."""

from __future__ import annotations

import argparse
import faulthandler
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from bench.record import Writer, machine
from bench.stage import CUT, FATAL, first_line, rounded

HANGS = 60  # seconds after which a cell is taken to hang


def parser(description: str) -> argparse.ArgumentParser:
    """What every such run is told."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--record", type=pathlib.Path, required=True, help="file of JSON lines to write to, and to go on with")
    found.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so many seconds")
    found.add_argument("--commit", help="the commit, where the checkout has no git beside it")
    found.add_argument("--tiny", action="store_true", help="shrink the layers: a dry run, on a CPU by the interpreter")
    return found


class Cells:
    """The cells of one record.

    Args:
        args: what `parser` made of the command line.

    Attributes:
        status: of the process so far: 0, CUT if there is more to do, 1 if a cell failed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        path = args.record.absolute()
        self.deadline = time.monotonic() + args.seconds
        self.writer = Writer(path, machine(args.commit) | {"tiny": args.tiny})
        self.running = path.with_name(f".{path.stem}.running")
        if self.running.exists():  # the process that ran it did not live to report
            self.writer.write({"cell": self.running.read_text(), "error": "the process died in it"})
            self.running.unlink()
        self.done = {line["cell"] for line in self.writer.lines if "cell" in line}
        self.status = 0

    def late(self) -> bool:
        """Returns True if no more cells are to be started."""
        return time.monotonic() > self.deadline

    def each(self, names: list[str]) -> Iterator[str]:
        """The cells that are left to do, as long as there is time."""
        for name in names:
            if name in self.done:
                continue
            if self.late():
                self.status = self.status or CUT
                return
            self.running.write_text(name)
            # A kernel that hangs takes its process with it; the next one goes on behind the cell.
            faulthandler.dump_traceback_later(HANGS, exit=True)
            yield name
            faulthandler.cancel_dump_traceback_later()
            self.running.unlink(missing_ok=True)

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Adds a cell's line. A line that has an "error" makes the run a failed one."""
        self.writer.write(rounded({"cell": name} | line))
        self.done.add(name)
        if "error" in line:
            self.status = 1

    def failed(self, name: str, error: Exception, line: dict[str, Any]) -> None:
        """Adds the line of a cell that raised.

        Raises:
            SystemExit: the device can no longer be used in this process; the same command goes on behind the cell.
        """
        self.write(name, line | {"error": first_line(error)})
        if any(text in str(error) for text in FATAL):
            self.running.unlink(missing_ok=True)
            raise SystemExit(CUT) from error
