"""What can go wrong: PTX that the simulator does not know, and programs that do what no GPU defines."""

from __future__ import annotations

from dataclasses import dataclass


class Unsupported(Exception):
    """PTX, or a kind of launch, that the simulator does not know. It never guesses."""


@dataclass(frozen=True)
class Place:
    """An instruction: its kernel, its line of the PTX, the text there, and the line of Triton's source that it comes from."""

    kernel: str
    line: int
    text: str
    source: str

    def __str__(self) -> str:
        return f"kernel {self.kernel}, {self.source or 'no source line'}, PTX line {self.line}: {self.text}"


class Fault(Exception):
    """Something that hardware would punish, or whose result PTX leaves undefined.

    Attributes:
        what: what happened.
        place: the instruction.
        program: the program (thread block) in the grid, as (x, y, z); None if it concerns a whole launch.
        thread: the thread's number in its program; None if it concerns all of them.
        address: what was accessed: a tensor and a byte in it, or an offset in shared memory; None if nothing was.
    """

    def __init__(
        self,
        what: str,
        place: Place | None = None,
        program: tuple[int, int, int] | None = None,
        thread: int | None = None,
        address: str | None = None,
    ) -> None:
        self.what, self.place, self.program, self.thread, self.address = what, place, program, thread, address
        told = [what]
        if address is not None:
            told.append(f"at {address}")
        if program is not None:
            told.append(f"by program {program}" + ("" if thread is None else f", thread {thread}"))
        super().__init__(" ".join(told) + ("" if place is None else f"; {place}"))
