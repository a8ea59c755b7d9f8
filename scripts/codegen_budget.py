"""What compiled kernels may cost, kept in bench/codegen/triton-VERSION/ARCHITECTURE.csv, a line per variant.

The first line names the compiler, the architecture and the number of variants, so that a cut or foreign file shows; and,
where a budget holds only a part of the variants, the pattern of their names.
"""

from __future__ import annotations

import csv
import pathlib
import re
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent / "bench" / "codegen"
FIELDS = (
    "registers", "spills", "loop_spills", "stack_bytes", "shared_bytes", "mma", "mma_kind", "register_detour", "tma_loads",
    "async_copies", "async_copy_bytes", "loads", "load_bytes", "narrow_loads", "stores", "store_bytes", "loop_instructions",
    "loop_waits", "loop_fences", "before_loop", "after_loop",
)  # fmt: skip
LATER = ("loop_waits", "loop_fences", "before_loop", "after_loop")  # empty in rows from before they were read
LAST = 2  # of these so many at the end may be missing altogether, also in the head of a file
# Field -> how much it may grow: compilers schedule differently for reasons that are not ours.
GROWTH = {
    "spills": lambda old: 0, "loop_spills": lambda old: 0, "stack_bytes": lambda old: 0, "narrow_loads": lambda old: 0,
    "register_detour": lambda old: 0, "shared_bytes": lambda old: 0, "registers": lambda old: 8,
    "loop_instructions": lambda old: old // 10, "loop_waits": lambda old: 0,
}  # fmt: skip

Row = dict[str, Any]
Budget = dict[str, Row]  # variant name -> its fields


class BudgetError(Exception):
    """A budget that does not exist or cannot be read, in one line."""


def short(version: str) -> str:
    """Budgets are kept per minor version of Triton."""
    return ".".join(version.split(".")[:2])


def path(version: str, arch: str) -> pathlib.Path:
    return ROOT / f"triton-{version}" / f"{arch}.csv"


def recorded() -> dict[str, list[str]]:
    """Triton version -> the architectures for which it has a budget."""
    found: dict[str, list[str]] = {}
    for file in sorted(ROOT.glob("triton-*/*.csv")):
        found.setdefault(file.parent.name.removeprefix("triton-"), []).append(file.stem)
    return found


def load(version: str, arch: str) -> Budget:
    """The budget of a compiler and an architecture."""
    return _read(version, arch)[0]


def scope(version: str, arch: str) -> str:
    """The regular expression of the names that a budget holds; empty if it holds all."""
    return _read(version, arch)[1]


def _read(version: str, arch: str) -> tuple[Budget, str]:
    file = path(version, arch)
    if not file.exists():
        known = "; ".join(f"{v}: {', '.join(archs)}" for v, archs in recorded().items())
        raise BudgetError(f"no budget for Triton {version} on {arch} in {ROOT.name}/ (there are {known or 'none'})")
    try:
        return _parse(file.read_text(), version, arch)
    except ValueError as e:
        raise BudgetError(f"{file}: {e}") from None


def _parse(text: str, version: str, arch: str) -> tuple[Budget, str]:
    first, *lines = text.splitlines() or [""]
    head = re.fullmatch(r"# Triton (\S+), (\S+), (\d+) variants(?: of '(.*)')?", first)
    if not head:
        raise ValueError("not a budget: the first line is not '# Triton VERSION, ARCHITECTURE, N variants'")
    if head[1] != version or head[2] != arch:
        raise ValueError(f"a budget of Triton {head[1]} on {head[2]}, not of {version} on {arch}")
    rows = list(csv.reader(lines))
    if not rows or rows[0] not in (["variant", *FIELDS], ["variant", *FIELDS[:-LAST]]):
        raise ValueError("its columns are not those of this version of the gate")
    budget = {}
    for number, found in enumerate(rows[1:], 3):
        row = found + [""] * min(LAST, max(0, len(FIELDS) + 1 - len(found)))
        values = dict(zip(FIELDS, row[1:], strict=False))
        numbers = [v for k, v in values.items() if k != "mma_kind" and (v or k not in LATER)]
        if len(row) != len(FIELDS) + 1 or not all(v.isdigit() for v in numbers):
            raise ValueError(f"line {number} is not a variant's: {','.join(row)[:60]!r}")
        budget[row[0]] = {k: v if k == "mma_kind" else int(v) if v else None for k, v in values.items()}
    if len(budget) != int(head[3]):
        raise ValueError(f"{len(budget)} variants, its first line says {head[3]}")
    return budget, head[4] or ""


def save(version: str, arch: str, budget: Budget, only: str = "") -> None:
    """Writes a budget, sorted by name; only: the pattern of its names, if it is a part."""
    file = path(version, arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = f" of '{only}'" if only else ""
    lines = [f"# Triton {version}, {arch}, {len(budget)} variants{part}", ",".join(["variant", *FIELDS])]
    for name, row in sorted(budget.items()):
        fields = [name, *(_text(row[k]) for k in FIELDS)]
        lines.append(",".join(fields if any(fields[-LAST:]) else fields[:-LAST]))
    file.write_text("\n".join(lines) + "\n")


def _text(value: Any) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def worse(old: Row, new: Row) -> list[str]:
    """The fields in which a variant got worse, the gravest first."""
    found = ["mma_kind"] if new["mma_kind"] != old["mma_kind"] else []
    found += [k for k, slack in GROWTH.items() if None not in (old[k], new[k]) and new[k] > old[k] + slack(old[k])]
    found += [k for k in ("async_copy_bytes", "tma_loads", "loop_fences") if None not in (old[k], new[k]) and new[k] < old[k]]
    # None at all is no narrower: the loop then copies asynchronously, or the fields above say that it does not.
    return found + [k for k in ("load_bytes", "store_bytes") if 0 < new[k] < old[k]]


def changes(old: Row, new: Row, fields: Iterable[str]) -> str:
    return ", ".join(f"{k} {_text(old[k]) or 'none'} -> {_text(new[k]) or 'none'}" for k in fields)


def regressions(rows: list[Row], budgets: dict[str, Budget]) -> list[str]:
    """What is worse than the budgets (architecture -> budget), one line per variant."""
    found = []
    for row in rows:
        label = f"{row['arch']} {row['name']}"
        old = budgets.get(row["arch"], {}).get(row["name"])
        if "error" in row:
            found.append(f"{label}: does not compile: {row['error']}")
        elif old is None:
            found.append(f"{label}: not in the budget; look at it, then --update")
        elif fields := worse(old, row):
            found.append(f"{label}: {changes(old, row, fields)}")
        if "error" not in row and row["mma_kind"] == "HGMMA" and row["async_copies"] and not row["loop_fences"]:
            found.append(f"{label}: wgmma reads what asynchronous copies wrote without a fence")
    return found


def compare(arch: str, names: tuple[str, str], old: Budget, new: Budget, most: int = 12) -> list[str]:
    """How the code of two compilers differs, for people: counts for each field, then the gravest variants."""
    both = sorted(old.keys() & new.keys())
    lines = [f"{arch}, Triton {names[0]} -> {names[1]}: {len(both)} variants in both"]
    for name, here, there in ((names[0], old, new), (names[1], new, old)):
        if only := sorted(here.keys() - there.keys()):
            lines.append(f"  only in {name}: {len(only)}, such as {only[0]}")
    down = {name: fields for name in both if (fields := worse(old[name], new[name]))}
    up = {name: fields for name in both if (fields := worse(new[name], old[name]))}
    for field in FIELDS:
        ups, downs = (sum(field in fields for fields in found.values()) for found in (up, down))
        if field == "mma_kind" and downs:
            lines.append(f"  {field}: differs in {downs}")
        elif ups or downs:
            lines.append(f"  {field}: worse in {downs}, better in {ups}")
    if len(lines) == 1:
        lines.append("  no differences beyond the slack")
    order = ["mma_kind", "register_detour", "loop_spills", "spills", "async_copy_bytes", "narrow_loads", "load_bytes", *FIELDS]
    gravest = sorted(down, key=lambda name: (min(map(order.index, down[name])), -new[name]["registers"], name))
    lines += [f"  {name}: {changes(old[name], new[name], down[name])}" for name in gravest[:most]]
    return lines + ([f"  ... and {len(gravest) - most} more that got worse"] if len(gravest) > most else [])
