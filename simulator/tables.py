"""Counts as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.counters import Access, Counts
from simulator.pipes import PIPES
from simulator.resources import occupancy


def table(c: Counts) -> str:
    """Returns the counts of a kernel's launches as text."""
    each = max(c.programs * c.warps, 1)
    parts = [_title(c), _instructions(c, each), *_loops(c, each), _operands(c)]
    for space, transaction in (("global", "sectors"), ("shared", "wavefronts")):
        if found := c.memory(space):
            parts.append(_accesses(c, space, transaction, found))
    if c.wgmma_bytes or c.boxes:
        told = {"read by wgmma": c.wgmma_bytes, "filled or taken by boxes": c.boxes}
        parts.append("shared memory besides: " + ", ".join(f"{n:,} bytes {what}" for what, n in told.items() if n))
    if waits := c.waits:
        parts.append("waits of a warp: " + ", ".join(f"{what} {_number(n / each)}" for what, n in waits.items()))
    return "\n\n".join(part for part in parts if part)


def _title(c: Counts) -> str:
    counts = (c.launches, "launch"), (c.programs, "program"), (c.warps, "warp")
    launches, programs, warps = (_several(n, what) for n, what in counts)
    lines = [f"{c.kernel.name} ({c.kernel.target}): {launches}, {programs} of {warps}"]
    found = c.resources
    if found is None:
        lines.append(f"{c.shared_bytes:,} bytes of shared memory; registers and occupancy unknown, as no ptxas takes it")
    else:
        o = occupancy(c.kernel.target, c.kernel.threads, found.registers, c.shared_bytes)
        lines.append(
            f"{found.registers} registers, {found.spills} bytes spilled, {c.shared_bytes:,} bytes of shared memory: "
            f"{_several(o.programs, 'program')} on a multiprocessor, {o.warps:.0%} of its warps, by {o.limit}"
        )
    return "\n".join(lines)


def _instructions(c: Counts, each: int) -> str:
    inside, outside = c.instructions(True), c.instructions(False)
    rows = [(p, _number(outside[p] / each), _number(inside[p] / each)) for p in PIPES if inside[p] or outside[p]]
    rows.append(("all", _number(outside.total() / each), _number(inside.total() / each)))
    return _columns(("instructions of a warp", "outside loops", "in loops"), rows)


def _loops(c: Counts, each: int) -> Iterable[str]:
    for loop in c.loops:
        pipes = ", ".join(f"{p} {_number(n / loop.iterations)}" for p, n in loop.instructions.most_common())
        yield f"loop at {loop.place}: {_number(loop.iterations / each)} iterations of a warp, each {pipes}"


def _operands(c: Counts) -> str:
    rows = [
        (f"{name}, {what}", f"{o.touched:,}", f"{o.asked:,}", f"{o.first:,}", f"{o.asked / max(o.touched, 1):.2f}")
        for what, operands in (("read", c.reads), ("written", c.writes))
        for name, o in operands.items()
    ]
    heads = ("global memory, bytes", "of it, least", "in sectors", "once a program", "sectors / least")
    return _columns(heads, rows) if rows else ""


def _accesses(c: Counts, space: str, transaction: str, found: dict[int, Access]) -> str:
    alike: dict[tuple[str, str], list[Access]] = {}  # by opcode and source line, of which unrolled code has many
    for line, a in found.items():
        alike.setdefault((c.code.opcodes[line], c.kernel.sources.get(line) or f"PTX line {line}"), []).append(a)
    rows = []
    for (opcode, place), each in alike.items():
        a = sum(each, Access())
        rows.append(
            (
                f"{len(each)} {opcode}", f"{a.requests:,}", f"{a.transactions:,}", f"{a.transactions / a.requests:.2f}",
                f"{a.transactions - a.least:,}", place,
            )
        )  # fmt: skip
    more = "bank conflicts" if space == "shared" else "above least"
    return _columns((f"{space} memory", "requests", transaction, "per request", more, "source"), rows)


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns rows under heads: the first and a sixth column to the left, others to the right."""
    table = [heads, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    lines = []
    for row in table:
        cells = [cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("ch") else "s")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
